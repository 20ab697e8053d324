// Compares layer patterns of your own on a text: compare_patterns TEXT_FILE
// All are trained on the same batches, from the same seed. To compare others, change the list in main.
#include <hybridattn/hybridattn.hpp>
#include <hybridattn/io/text.hpp>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numbers>

namespace ha = hybridattn;

// A layer is a policy with options: here full attention that sees the last 32 tokens only.
using Local = ha::FullAttention<ha::FullOptions{.window = 32}>;

struct Result {
  char const* name;
  ha::Index parameters;
  double loss;   // nats a byte, on the tenth of the text that is held out
};

template <class Stack> Result train(char const* name, std::string const& text) {
  constexpr ha::Index steps = 200, batch = 4, seq_len = 64;
  ha::Windows windows{ha::ByteText(text), ha::Seed{1}};
  auto const held_out = windows.validation_batches(batch, seq_len);

  ha::Cpu cpu;
  ha::LanguageModel<Stack> const model{{.model_dim = 64, .num_heads = 2}};
  auto params = model.template initialize<float>(cpu, ha::Seed{42});
  ha::AdamW optimizer{cpu, params, {.learning_rate = 3e-3}};
  ha::Schedule const schedule{.warmup_steps = 20, .total_steps = steps, .min_rate = 0.1};
  for (ha::Index step = 0; step < steps; ++step)
    train_step(cpu, model, params, optimizer, make_batch(cpu, windows.next_batch(batch, seq_len)), {.rate = schedule(step)});

  ha::LossSum total;
  for (auto const& part : held_out) total += model.loss(cpu, params, make_batch(cpu, part));
  std::fprintf(stderr, "%s is trained\n", name);
  return {name, model.parameter_count(), total.mean()};
}

int main(int argc, char** argv) try {
  ha::check(argc == 2, "usage: compare_patterns TEXT_FILE");
  std::string const text = ha::read_text(argv[1]);
  std::vector<Result> results{
      train<ha::Pattern<"LFFL">>("LFFL", text),
      train<ha::Stack<ha::GDN, Local, Local, ha::GDN>>("GDN, Local, Local, GDN", text),
      train<ha::Repeat<2, Local, ha::Full>>("2 x (Local, Full)", text),
  };
  std::ranges::sort(results, {}, &Result::loss);
  std::printf("%-24s %12s %8s %14s\n", "pattern", "parameters", "loss", "bits per byte");
  for (auto const& r : results) std::printf("%-24s %12td %8.4f %14.3f\n", r.name, r.parameters, r.loss, r.loss / std::numbers::ln2);
  ha::check(std::fflush(stdout) == 0 && std::ferror(stdout) == 0, "cannot write to stdout");
} catch (ha::Error const& error) {
  std::fprintf(stderr, "compare_patterns: %s\n", error.what());
  return 2;
}
