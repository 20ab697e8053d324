// The command lines of train and generate, apart from the programs: CLI11 costs the compiler more than either of them.
#include "generate_options.hpp"
#include "options.hpp"
#include "train_options.hpp"

namespace train {

Settings parse(int argc, char const* const* argv) {
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
  options.backend();
  options.dtype(s.dtype);
  options.parse(argc, argv);
  ha::check(!s.text.empty(), "no text is named: give a file or a pipe");
  return s;
}

}  // namespace train

namespace generate {
namespace {

// "5,17,3"
std::vector<std::int32_t> to_tokens(std::string const& list) {
  std::vector<std::int32_t> tokens;
  for (std::size_t start = 0; start <= list.size();) {
    auto const end = std::min(list.find(',', start), list.size());
    tokens.push_back(
        program::to_number<std::int32_t>("--tokens", list.substr(start, end - start), 0, std::numeric_limits<std::int32_t>::max()));
    start = end + 1;
  }
  return tokens;
}

}  // namespace

Settings parse(int argc, char const* const* argv) {
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
  options.backend();
  options.dtype(s.dtype, "scalar of a released model's parameters, float or bf16; a checkpoint has its own");
  options.app()
      .add_option("--ignore-field", s.ignored_fields, "a field of config.json to read as if it were not there; may be given again")
      ->allow_extra_args(false)
      ->type_name("NAME");
  options.parse(argc, argv);
  ha::check(!s.model.empty(), "no model is named: give a checkpoint or a folder");
  ha::Sampler{s.sampling};   // complains of what no sampler can do
  ha::check(!s.prompt.empty() || !s.as_bytes(), "there is nothing to continue: give --prompt or --tokens");
  return s;
}

}  // namespace generate
