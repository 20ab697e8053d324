// Trains a language model with two kinds of attention on the bytes of a text: quickstart book.txt
#include <hybridattn/hybridattn.hpp>
#include <hybridattn/io/text.hpp>

#include <cstdio>

namespace ha = hybridattn;

using Sandwich = ha::Stack<ha::GDN, ha::Full, ha::Full, ha::GDN>;   // one policy a layer; ha::Pattern<"LFFL"> names the same type

int main(int argc, char** argv) try {
  ha::check(argc == 2, "usage: quickstart TEXT_FILE");
  ha::Windows text{ha::ByteText(ha::read_text(argv[1])), ha::Seed{1}, argv[1]};
  auto const held_out = text.validation_batches(4, 128);   // complains at once of a text that is too short
  std::printf("%s\n", text.description().c_str());

  ha::Cpu machine;
  ha::LanguageModel<Sandwich> const model{{.vocab_size = 256, .model_dim = 128, .num_heads = 4}};
  auto params = model.initialize<float>(machine, ha::Seed{42});
  ha::AdamW optimizer{machine, params, {.learning_rate = 1e-3}};
  std::printf("%td parameters\n", model.parameter_count());

  for (int step = 1; step <= 200; ++step) {
    auto const batch = make_batch(machine, text.next_batch(4, 128));
    auto const result = train_step(machine, model, params, optimizer, batch);
    if (step % 20 == 0) std::printf("step %3d  loss %.3f\n", step, result.loss.mean());
  }

  ha::LossSum total;
  for (auto const& windows : held_out) total += model.loss(machine, params, make_batch(machine, windows));
  std::printf("validation loss %.3f over %td bytes\n", total.mean(), total.count);
  ha::check(std::fflush(stdout) == 0 && std::ferror(stdout) == 0, "cannot write to stdout");
} catch (ha::Error const& error) {
  std::fprintf(stderr, "quickstart: %s\n", error.what());
  return 2;
}
