// bf16 on the emulator of a GPU: policies and operations keep the laws, and a model learns as on the CPU.
#include "catch.hpp"
#include "gpu.hpp"
#include "verdicts.hpp"

#include <hybridattn/hybridattn.hpp>
#include <hybridattn/testing/judge.hpp>
#include <hybridattn/testing/operations.hpp>
#include <hybridattn/testing/policies.hpp>

namespace ha = hybridattn;

namespace {

using Sparse = ha::SparseAttention<ha::SparseOptions{.top_k = 8}>;

// At the first of the laws' sizes.
template <class P> void check_policy(ha::Stage stage = ha::Stage::language_model) {
  auto size = ha::testing::Samples<P>::sizes().front();
  if constexpr (requires { size.stage; }) size.stage = stage;
  check_all(judge(ha::testing::Adaptor<P, Gpu, ha::bf16>{size}));
}

// The losses of a few steps.
template <class B> std::vector<double> learned() {
  B backend = ha::testing::Machine<B>::make(1);
  ha::LanguageModel<ha::Stack<ha::GDN, ha::Full, Sparse>> const model{
      {.vocab_size = 24, .model_dim = 32, .num_heads = 2, .feed_forward = {.hidden_dim = 40}}};
  auto params = model.template initialize<ha::bf16>(backend, ha::Seed{1});
  ha::AdamW optimizer{backend, params, {.learning_rate = 3e-3}};
  ha::RecallTask task{ha::Seed{2}, {.vocab_size = 24, .pairs = 4}};
  std::vector<double> losses;
  for (int step = 0; step < 5; ++step)
    losses.push_back(train_step(backend, model, params, optimizer, make_batch(backend, task.next_batch(2, 24))).loss.mean());
  return losses;
}

}  // namespace

TEST_CASE("policies keep every law on the emulator in bf16", "[bf16]") {
  check_policy<ha::Full>();
  check_policy<ha::GDN>();
  check_policy<Sparse>();
}
TEST_CASE("the indexer keeps every law on the emulator in bf16 in a stage that trains it", "[bf16]") {
  check_policy<Sparse>(ha::Stage::sparse);
}
using Operations = std::tuple<ha::Add, ha::RmsNorm, ha::Linear, ha::CausalConv1d, ha::Combine, ha::TopK, ha::CrossEntropy>;
TEMPLATE_LIST_TEST_CASE("an operation keeps every law on the emulator in bf16", "[bf16]", Operations) {
  check_all(ha::testing::judge<TestType, Gpu, ha::bf16>());
}
TEST_CASE("a model in bf16 learns on the emulator as on the CPU", "[bf16]") {
  auto const expected = learned<ha::Cpu>(), found = learned<Gpu>();
  for (std::size_t step = 0; step < expected.size(); ++step) CHECK(found[step] == Approx(expected[step]).margin(0.01));
}
