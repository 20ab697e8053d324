// What anybody's program does with the library, whichever way it came in: a model of all three policies learns a batch.
#include <hybridattn/hybridattn.hpp>

#include <cstdio>

namespace ha = hybridattn;

int main() try {
  ha::Cpu cpu{2};
  ha::LanguageModel<ha::Stack<ha::GDN, ha::Full, ha::DSA>> const model{{.vocab_size = 32, .model_dim = 32, .num_heads = 2}};
  auto params = model.initialize<float>(cpu, ha::Seed{1});
  ha::AdamW optimizer{cpu, params, {.learning_rate = 1e-2}};
  ha::RecallTask task{ha::Seed{2}, {.vocab_size = 32, .pairs = 4}};
  auto const batch = make_batch(cpu, task.next_batch(2, 24));

  double const before = train_step(cpu, model, params, optimizer, batch).loss.mean();
  train_step(cpu, model, params, optimizer, batch);
  double const after = model.loss(cpu, params, batch).mean();
  std::printf("loss %.4f, after two steps %.4f\n", before, after);
  return after < before && before < 5 ? 0 : 1;   // a loss that is not finite fails both
} catch (ha::Error const& error) {
  std::fprintf(stderr, "consumer: %s\n", error.what());
  return 2;
}
