// Half of a program, compiled as PART first, which has main, and as PART second, each with all headers in an order of its own.
#include <hybridattn/hybridattn.hpp>

#include <cstdio>

namespace ha = hybridattn;

double first();
double second();

// The loss after one step of training.
double PART() {
  ha::Cpu cpu{1};
  ha::LanguageModel<ha::Stack<ha::Full>> const model{{.vocab_size = 32, .model_dim = 16, .num_heads = 2}};
  auto params = model.initialize<float>(cpu, ha::Seed{1});
  ha::AdamW optimizer{cpu, params};
  ha::RecallTask task{ha::Seed{2}, {.vocab_size = 32, .pairs = 2}};
  auto const batch = make_batch(cpu, task.next_batch(1, 12));
  train_step(cpu, model, params, optimizer, batch);
  return model.loss(cpu, params, batch).mean();
}

#if defined(WITH_MAIN)
int main() {
  std::printf("%.6f and %.6f\n", first(), second());
  return first() == second() ? 0 : 1;
}
#endif
