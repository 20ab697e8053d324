// The command line of `train`.
#ifndef HYBRIDATTN_EXAMPLES_TRAIN_OPTIONS_HPP
#define HYBRIDATTN_EXAMPLES_TRAIN_OPTIONS_HPP

#include "options.hpp"

namespace train {

namespace ha = hybridattn;

struct Settings {
  std::string text, pattern = "LFFL";
  std::filesystem::path out = "model.safetensors";
  ha::Index steps = 1000, batch = 4, seq_len = 128, model_dim = 128, num_heads = 4, save_every = 100;
  double learning_rate = 1e-3;
  std::uint64_t seed = 1;
  int threads = 0;
};

inline Settings parse(int argc, char const* const* argv) {
  Settings s;
  program::Options options{"train", "Trains a language model on the bytes of a text, with checkpoints"};
  options.app().add_option("text", s.text, "a text file or a pipe");
  options.app().add_option("--pattern", s.pattern, "layers: L Gated DeltaNet, F full, D sparse attention")->capture_default_str();
  options.out(s.out, "the checkpoint; an unfinished one is continued");
  options.size("--steps", s.steps, "training steps", 1, std::numeric_limits<ha::Index>::max());
  options.size("--batch", s.batch, "windows of a step");
  options.size("--seq-len", s.seq_len, "bytes of a window", 2);
  options.size("--model-dim", s.model_dim, "width of the model");
  options.size("--heads", s.num_heads, "heads of each layer");
  options.real("--learning-rate", s.learning_rate, "the largest one", true);
  options.size("--save-every", s.save_every, "steps between two checkpoints", 1, std::numeric_limits<ha::Index>::max());
  options.seed(s.seed);
  options.threads(s.threads);
  options.parse(argc, argv);
  ha::check(!s.text.empty(), "no text is named: give a file or a pipe");
  return s;
}

}  // namespace train
#endif
