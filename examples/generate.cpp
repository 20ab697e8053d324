// Continues a text: generate MODEL --prompt "Once upon" --temperature 0.8 --top-p 0.95
// MODEL is a checkpoint that `train` left (its tokens are bytes), or a folder with a released Qwen3-Next or Qwen3.5 text model
// (its tokens are numbers: --tokens 5,17,3; the library has no tokenizer).
#include "generate_options.hpp"
#include "models.hpp"

#include <hybridattn/infer/generate.hpp>
#include <hybridattn/io.hpp>

namespace generate {
namespace {

std::vector<std::int32_t> prompt_tokens(Settings const& s, ha::Index vocab_size) {
  if (!s.as_bytes()) {
    for (auto const token : s.tokens)
      ha::check(token < vocab_size, "--tokens ", token, " is not allowed; ", s.model, " has tokens 0 .. ", vocab_size - 1);
    return s.tokens;
  }
  ha::check(vocab_size == ha::ByteText::vocab_size, s.model, ": its ", vocab_size,
            " tokens are not bytes; give the prompt as --tokens 5,17,3");
  auto const text = ha::ByteText(s.prompt);
  return {text.all().begin(), text.all().end()};
}

// Throws where the cache for all tokens is larger than memory. It grows evenly with them.
template <class Model> void check_length(Model const& model, std::vector<std::int32_t> const& prompt, ha::Index max_new_tokens) {
  auto const cache_of = [&](ha::Index tokens) {
    return static_cast<double>(ha::bytes<float>(ha::cache_shapes(model, {.batch = 1, .capacity = tokens})));
  };
  double const tokens = static_cast<double>(prompt.size()) + static_cast<double>(max_new_tokens);
  double const each = cache_of(2) - cache_of(1) + sizeof(std::int32_t);
  program::check_memory(cache_of(1) + each * tokens, program::formatted("a cache of %.0f tokens (prompt and --max-new-tokens)", tokens));
}

// Streams to stdout; what it took to stderr. load() reads the parameters, once it is clear that they can be used.
template <class Model, class Load> void run(ha::Cpu& cpu, Settings const& s, Model const& model, Load load) {
  auto const prompt = prompt_tokens(s, model.config().vocab_size);
  program::check_memory(static_cast<double>(model.parameter_count()) * sizeof(float),
                        "a model of " + std::to_string(model.parameter_count()) + " parameters");
  check_length(model, prompt, s.max_new_tokens);
  auto const params = load();
  if (s.as_bytes()) program::say_text(s.prompt);
  auto const show = [&](ha::Index, std::int32_t token) {
    program::say_text(s.as_bytes() ? std::string(1, static_cast<char>(token)) : std::to_string(token) + " ");
    program::flush_stdout();
    return true;
  };
  ha::GenerateOptions const options{
      .max_new_tokens = s.max_new_tokens, .sampling = s.sampling, .seed = ha::Seed{s.seed}, .stop_tokens = {}};
  auto const result = ha::generate(cpu, model, params, {prompt}, options, show);
  program::say_text("\n");
  program::flush_stdout();
  auto const speed = [](ha::Index tokens, double seconds) { return tokens == 0 ? 0 : static_cast<double>(tokens) / seconds; };
  program::note(program::formatted("%td tokens of prompt at %.0f tokens/s, then %td at %.0f tokens/s on %d threads\n",
                                   result.prefill_tokens, speed(result.prefill_tokens, result.prefill_seconds), result.decode_tokens,
                                   speed(result.decode_tokens, result.decode_seconds), cpu.threads()));
}

void from_folder(ha::Cpu& cpu, Settings const& s) {
  namespace hf = ha::hugging_face;
  auto const settings = hf::read_settings(s.model, s.reading);
  std::string differs;
  auto const use = [&](auto choice) {
    using Model = ha::LanguageModel<typename decltype(choice)::Stack>;
    try {
      hf::check_types<typename Model::Stack>(settings);
    } catch (ha::Error const& error) {
      differs = error.what();
      return false;
    }
    Model const model{hf::config<Model>(s.model, s.reading)};
    run(cpu, s, model, [&] { return hf::load<float>(cpu, model, s.model, s.reading); });
    return true;
  };
  models::with_pattern(models::Released{}, settings.pattern, use, differs);
}

void from_checkpoint(ha::Cpu& cpu, Settings const& s) {
  auto const header = ha::read_checkpoint_header(s.model);
  models::with_pattern(models::Trained{}, models::letters_of(header.pattern), [&](auto choice) {
    using Model = ha::LanguageModel<typename decltype(choice)::Stack>;
    Model const model{ha::checkpoint_config<Model>(header)};
    run(cpu, s, model, [&] { return ha::load_parameters<float>(cpu, s.model, model); });
    return true;
  });
}

}  // namespace
}  // namespace generate

int main(int argc, char** argv) {
  return program::run("generate", argc, argv, [&] {
    auto const settings = generate::parse(argc, argv);
    hybridattn::check(std::filesystem::exists(settings.model), settings.model, ": there is no such file or folder");
    hybridattn::Cpu cpu{settings.threads};
    if (std::filesystem::is_directory(settings.model)) generate::from_folder(cpu, settings);
    else generate::from_checkpoint(cpu, settings);
    return 0;
  });
}
