// Continues a text: generate MODEL --prompt "Once upon" --temperature 0.8 --top-p 0.95
// MODEL is a checkpoint that `train` left (its tokens are bytes), or a folder with a released Qwen3-Next or Qwen3.5 text model
// (its tokens are numbers: --tokens 5,17,3; the library has no tokenizer).
#include "generate_options.hpp"
#include "program.hpp"
#include "stored_model.hpp"

namespace generate {
namespace {

std::vector<std::int32_t> prompt_tokens(Settings const& s, ha::Index vocab_size) {
  if (!s.as_bytes()) {
    for (auto const token : s.tokens)
      ha::check(token < vocab_size, "--tokens ", token, " is not allowed; ", s.model, " has tokens 0 .. ", vocab_size - 1);
    return s.tokens;
  }
  ha::check(vocab_size == 256, s.model, ": its ", vocab_size, " tokens are not bytes; give the prompt as --tokens 5,17,3");
  std::vector<std::int32_t> tokens;
  for (char const letter : s.prompt) tokens.push_back(static_cast<unsigned char>(letter));
  return tokens;
}

// Throws where the cache for all tokens is larger than memory. It grows evenly with them.
void check_length(program::Machine const& machine, models::StoredModel const& model, std::vector<std::int32_t> const& prompt,
                  ha::Index max_new_tokens) {
  double const tokens = static_cast<double>(prompt.size()) + static_cast<double>(max_new_tokens);
  double const each = model.cache_bytes(2) - model.cache_bytes(1) + sizeof(std::int32_t);
  program::check_memory(model.cache_bytes(1) + each * tokens,
                        program::formatted("a cache of %.0f tokens (prompt and --max-new-tokens)", tokens), program::memory_limit(machine));
}

// Streams to stdout; what it took to stderr. The parameters are read once it is clear that they can be used.
void run(program::Machine& machine, Settings const& s, models::StoredModel const& model) {
  auto const prompt = prompt_tokens(s, model.vocab_size());
  program::check_memory(static_cast<double>(model.parameter_count()) * sizeof(float),
                        "a model of " + std::to_string(model.parameter_count()) + " parameters", program::memory_limit(machine));
  check_length(machine, model, prompt, s.max_new_tokens);
  auto const decoder = model.load(machine);
  if (s.as_bytes()) program::say_text(s.prompt);
  auto const show = [&](ha::Index, std::int32_t token) {
    program::say_text(s.as_bytes() ? std::string(1, static_cast<char>(token)) : std::to_string(token) + " ");
    program::flush_stdout();
    return true;
  };
  ha::GenerateOptions const options{
      .max_new_tokens = s.max_new_tokens, .sampling = s.sampling, .seed = ha::Seed{s.seed}, .stop_tokens = {}};
  auto const result = decoder->generate({prompt}, options, show);
  program::say_text("\n");
  program::flush_stdout();
  auto const speed = [](ha::Index tokens, double seconds) { return tokens == 0 ? 0 : static_cast<double>(tokens) / seconds; };
  program::note(program::formatted("%td tokens of prompt at %.0f tokens/s, then %td at %.0f tokens/s on %s\n", result.prefill_tokens,
                                   speed(result.prefill_tokens, result.prefill_seconds), result.decode_tokens,
                                   speed(result.decode_tokens, result.decode_seconds), program::place_of(machine).c_str()));
}

}  // namespace
}  // namespace generate

int main(int argc, char** argv) {
  return program::run("generate", argc, argv, [&] {
    auto const settings = generate::parse(argc, argv);
    hybridattn::check(std::filesystem::exists(settings.model), settings.model, ": there is no such file or folder");
    auto machine = program::make_machine(settings.threads);   // complains at once where there is none
    auto const model = std::filesystem::is_directory(settings.model)
                           ? models::from_folder(settings.model, settings.ignored_fields, settings.dtype)
                           : models::from_checkpoint(settings.model);
    generate::run(machine, settings, *model);
    return 0;
  });
}
