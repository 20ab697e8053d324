// The command line of `train`; command_lines.cpp reads it.
#ifndef HYBRIDATTN_EXAMPLES_TRAIN_OPTIONS_HPP
#define HYBRIDATTN_EXAMPLES_TRAIN_OPTIONS_HPP

#include <hybridattn/core/view.hpp>

#include <cstdint>
#include <filesystem>
#include <string>

namespace train {

namespace ha = hybridattn;

struct Settings {
  std::string text, pattern = "LFFL";
  std::filesystem::path out = "model.safetensors";
  ha::Index steps = 1000, batch = 4, seq_len = 128, model_dim = 128, num_heads = 4, save_every = 100;
  double learning_rate = 1e-3;
  std::uint64_t seed = 1;
  int threads = 0;
  std::string dtype = "float";
};

// Throws program::Answer where the words ask for a text, or ha::Error with one sentence.
Settings parse(int argc, char const* const* argv);

}  // namespace train
#endif
