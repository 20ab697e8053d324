// The command line of `generate`; command_lines.cpp reads it.
#ifndef HYBRIDATTN_EXAMPLES_GENERATE_OPTIONS_HPP
#define HYBRIDATTN_EXAMPLES_GENERATE_OPTIONS_HPP

#include <hybridattn/infer/sampling.hpp>

#include <cstdint>
#include <string>
#include <vector>

namespace generate {

namespace ha = hybridattn;

struct Settings {
  std::string model, prompt;
  std::vector<std::int32_t> tokens;
  ha::Index max_new_tokens = 200;
  ha::SamplingOptions sampling;
  std::uint64_t seed = 1;
  int threads = 0;
  std::string dtype = "float";               // of a released model
  std::vector<std::string> ignored_fields;   // of config.json

  bool as_bytes() const { return tokens.empty(); }
};

// Throws program::Answer where the words ask for a text, or ha::Error with one sentence.
Settings parse(int argc, char const* const* argv);

}  // namespace generate
#endif
