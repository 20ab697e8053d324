// The study's eight patterns train on a GPU as on the CPU. scripts/gpu_build compiles it; on the emulator the test `backends` compares them.
#include "catch.hpp"
#include "gpu.hpp"

#include <hybridattn/hybridattn.hpp>
#include <hybridattn/testing/machine.hpp>

#include "../examples/study_models.hpp"

#include <cstdio>

namespace ha = hybridattn;

namespace {

template <class B, ha::Text pattern> std::vector<double> losses() {
  using Stack = ha::Pattern<pattern, study::Study1>;
  auto backend = ha::testing::Machine<B>::make(1);
  auto config = study::study1_config<Stack>(32);
  config.model_dim = 64;
  config.feed_forward.expert_dim = 48;
  ha::LanguageModel<Stack> const model{config};
  auto params = model.template initialize<float>(backend, ha::Seed{1});
  ha::AdamW optimizer{backend, params, {.learning_rate = 1e-3}};
  ha::RecallTask task{ha::Seed{2}, {.vocab_size = 32, .pairs = 8}};
  std::vector<double> list;
  for (int step = 0; step < 5; ++step)
    list.push_back(train_step(backend, model, params, optimizer, make_batch(backend, task.next_batch(2, 40))).loss.mean());
  return list;
}
// Choices of keys may differ where two scores are nearly equal. With these seeds none does.
template <ha::Text pattern> void compare() {
  auto const expected = losses<ha::Cpu, pattern>(), found = losses<Gpu, pattern>();
  for (std::size_t step = 0; step < expected.size(); ++step) {
    std::printf("%s step %zu: %.7f, on the CPU %.7f\n", pattern.letters, step + 1, found[step], expected[step]);
    CHECK(found[step] == Approx(expected[step]).epsilon(1e-5));
  }
}

}  // namespace

TEST_CASE("the eight patterns train on a GPU as on the CPU", "[patterns]") {
  compare<"LFFL">();
  compare<"FLFL">();
  compare<"LLFF">();
  compare<"FFLL">();
  compare<"LDDL">();
  compare<"DLDL">();
  compare<"LLDD">();
  compare<"DDLL">();
}
