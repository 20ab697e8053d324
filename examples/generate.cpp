// Continues a text: generate MODEL --prompt "Once upon" --temperature 0.8 --top-p 0.95
// MODEL is a checkpoint that `train` left (its tokens are bytes), or a folder with a released Qwen3-Next or Qwen3.5 text model
// (its tokens are numbers: --tokens 5,17,3; the library has no tokenizer).
#include "models.hpp"

#include <hybridattn/infer/generate.hpp>
#include <hybridattn/io.hpp>

#include <CLI/CLI.hpp>

#include <cmath>
#include <cstdio>

namespace {

namespace ha = hybridattn;

struct Settings {
  std::string model, prompt;
  std::vector<std::int32_t> tokens;
  ha::GenerateOptions options{.max_new_tokens = 200};
  std::uint64_t seed = 1;

  bool as_bytes() const { return tokens.empty(); }
};

std::vector<std::int32_t> prompt_tokens(Settings const& s, ha::Index vocab_size) {
  if (!s.as_bytes()) return s.tokens;
  ha::check(vocab_size == ha::ByteText::vocab_size, s.model, ": its ", vocab_size,
            " tokens are not bytes; give the prompt as --tokens 5,17,3");
  ha::check(!s.prompt.empty(), "there is nothing to continue: give --prompt or --tokens");
  auto const text = ha::ByteText(s.prompt);
  return {text.all().begin(), text.all().end()};
}

// Streams to stdout; what it took to stderr.
template <class Model, class Params> void generate(ha::Cpu& cpu, Settings const& s, Model const& model, Params const& params) {
  auto const prompt = prompt_tokens(s, model.config().vocab_size);
  if (s.as_bytes()) std::fputs(s.prompt.c_str(), stdout);
  auto const show = [&](ha::Index, std::int32_t token) {
    if (s.as_bytes()) std::fputc(token, stdout);
    else std::printf("%d ", token);
    std::fflush(stdout);
    return true;
  };
  auto const result = ha::generate(cpu, model, params, {prompt}, s.options, show);
  std::puts("");
  auto const speed = [](ha::Index tokens, double seconds) { return tokens == 0 ? 0 : static_cast<double>(tokens) / seconds; };
  std::fprintf(stderr, "%td tokens of prompt at %.0f tokens/s, then %td at %.0f tokens/s on %d threads\n", result.prefill_tokens,
               speed(result.prefill_tokens, result.prefill_seconds), result.decode_tokens,
               speed(result.decode_tokens, result.decode_seconds), cpu.threads());
}

void from_folder(ha::Cpu& cpu, Settings const& s) {
  namespace hf = ha::hugging_face;
  int const percent = static_cast<int>(std::lround(100 * hf::read_settings(s.model).rotary_share));
  models::with_pattern(models::Released{}, hf::pattern(s.model), [&](auto choice) {
    using Model = ha::LanguageModel<typename decltype(choice)::Stack>;
    if (decltype(choice)::rotary_percent != percent) return false;
    Model const model{hf::config<Model>(s.model)};
    generate(cpu, s, model, hf::load<float>(cpu, model, s.model));
    return true;
  });
}

void from_checkpoint(ha::Cpu& cpu, Settings const& s) {
  auto const header = ha::read_checkpoint_header(s.model);
  models::with_pattern(models::Trained{}, models::letters_of(header.pattern), [&](auto choice) {
    using Model = ha::LanguageModel<typename decltype(choice)::Stack>;
    Model const model{ha::checkpoint_config<Model>(header)};
    generate(cpu, s, model, ha::load_parameters<float>(cpu, s.model, model));
    return true;
  });
}

}  // namespace

int main(int argc, char** argv) try {
  Settings s;
  CLI::App app{"Continues a text with a trained model"};
  app.add_option("model", s.model, "a checkpoint of `train`, or a folder with config.json and model.safetensors")->required();
  app.add_option("--prompt", s.prompt, "a text to continue, for models whose tokens are bytes");
  app.add_option("--tokens", s.tokens, "numbers of tokens to continue: 5,17,3")->delimiter(',')->excludes("--prompt");
  app.add_option("--max-new-tokens", s.options.max_new_tokens)->capture_default_str();
  app.add_option("--temperature", s.options.sampling.temperature, "0: always the likeliest token")->capture_default_str();
  app.add_option("--top-k", s.options.sampling.top_k, "only the k likeliest tokens; 0: all")->capture_default_str();
  app.add_option("--top-p", s.options.sampling.top_p, "only the likeliest tokens that together have this probability")
      ->capture_default_str();
  app.add_option("--seed", s.seed)->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  s.options.seed = ha::Seed{s.seed};
  ha::check(std::filesystem::exists(s.model), s.model, ": there is no such file or folder");
  ha::Cpu cpu;
  if (std::filesystem::is_directory(s.model)) from_folder(cpu, s);
  else from_checkpoint(cpu, s);
} catch (std::exception const& error) {
  std::fprintf(stderr, "generate: %s\n", error.what());
  return 2;
}
