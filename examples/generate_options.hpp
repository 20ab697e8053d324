// The command line of `generate`.
#ifndef HYBRIDATTN_EXAMPLES_GENERATE_OPTIONS_HPP
#define HYBRIDATTN_EXAMPLES_GENERATE_OPTIONS_HPP

#include "options.hpp"

#include <hybridattn/infer/sampling.hpp>
#include <hybridattn/train/hugging_face/fields.hpp>

namespace generate {

namespace ha = hybridattn;

struct Settings {
  std::string model, prompt;
  std::vector<std::int32_t> tokens;
  ha::Index max_new_tokens = 200;
  ha::SamplingOptions sampling;
  std::uint64_t seed = 1;
  int threads = 0;
  ha::hugging_face::ReadOptions reading;

  bool as_bytes() const { return tokens.empty(); }
};

// "5,17,3"
inline std::vector<std::int32_t> to_tokens(std::string const& list) {
  std::vector<std::int32_t> tokens;
  for (std::size_t start = 0; start <= list.size();) {
    auto const end = std::min(list.find(',', start), list.size());
    tokens.push_back(
        program::to_number<std::int32_t>("--tokens", list.substr(start, end - start), 0, std::numeric_limits<std::int32_t>::max()));
    start = end + 1;
  }
  return tokens;
}

inline Settings parse(int argc, char const* const* argv) {
  Settings s;
  ha::Index const any = std::numeric_limits<ha::Index>::max();
  program::Options options{"generate", "Continues a text with a trained model"};
  options.app().add_option("model", s.model, "a checkpoint of `train`, or a folder with config.json and model.safetensors");
  options.app().add_option("--prompt", s.prompt, "a text to continue, for models whose tokens are bytes");
  options.app()
      .add_option_function<std::string>(
          "--tokens", [&](std::string const& list) { s.tokens = to_tokens(list); }, "numbers of tokens to continue: 5,17,3")
      ->excludes("--prompt")
      ->type_name("N,N,...");
  options.size("--max-new-tokens", s.max_new_tokens, "at most so many", 0, any);
  options.real("--temperature", s.sampling.temperature, "0: always the likeliest token");
  options.size("--top-k", s.sampling.top_k, "only the k likeliest tokens; 0: all", 0, any);
  options.real("--top-p", s.sampling.top_p, "only the likeliest tokens that together have this probability");
  options.seed(s.seed);
  options.threads(s.threads);
  options.app()
      .add_option("--ignore-field", s.reading.ignore, "a field of config.json to read as if it were not there; may be given again")
      ->allow_extra_args(false)
      ->type_name("NAME");
  options.parse(argc, argv);
  ha::check(!s.model.empty(), "no model is named: give a checkpoint or a folder");
  ha::Sampler{s.sampling};   // complains of what no sampler can do
  ha::check(!s.prompt.empty() || !s.as_bytes(), "there is nothing to continue: give --prompt or --tokens");
  return s;
}

}  // namespace generate
#endif
