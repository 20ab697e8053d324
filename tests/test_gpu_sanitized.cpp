// Every kernel for GPUs under sanitizers, on the emulator. Addresses and undefined behaviour: the laws at the smallest sizes, and for
// policies that take long one run in two schedules. Threads: that run, and runs in which one barrier is left out. Each thread of a kernel is a thread for the sanitizer, so a race is
// reported at lines of the kernel.
#include "barriers.hpp"
#include "catch.hpp"
#include "verdicts.hpp"

#include <hybridattn/emulator.hpp>
#include <hybridattn/testing/judge.hpp>
#include <hybridattn/testing/operations.hpp>
#include <hybridattn/testing/policies.hpp>

namespace ha = hybridattn;

namespace {

// Sparse attention in a stage.
template <ha::Stage of> struct Sparse {
  using Policy = ha::SparseAttention<ha::SparseOptions{.top_k = 8}>;
  static constexpr ha::Stage stage = of;
};
template <class Op> auto smallest() {
  if constexpr (ha::testing::HasOperation<Op>) {
    return ha::testing::OperationOn<Op, ha::Emulator, float>{ha::testing::Operation<Op>::sizes().front()};
  } else if constexpr (requires { Op::stage; }) {
    auto size = ha::testing::Samples<typename Op::Policy>::sizes().front();
    size.stage = Op::stage;
    return ha::testing::Adaptor<typename Op::Policy, ha::Emulator, float>{size};
  } else {
    return ha::testing::Adaptor<Op, ha::Emulator, float>{ha::testing::Samples<Op>::sizes().front()};
  }
}
using Judged = decltype(std::tuple_cat(ha::testing::AllOperations{}, std::tuple<ha::Full>{}));
using Policies = std::tuple<ha::GDN, Sparse<ha::Stage::dense_warm_up>, Sparse<ha::Stage::sparse>>;
using Subjects = decltype(std::tuple_cat(Judged{}, Policies{}));

}  // namespace

TEMPLATE_LIST_TEST_CASE("an operation or a policy keeps every law", "[laws]", Judged) {
  check_all(judge(smallest<TestType>()));
}
TEMPLATE_LIST_TEST_CASE("an operation or a policy computes the same in two schedules", "[runs]", Subjects) {
  auto const subject = smallest<TestType>();
  auto const x = subject.sample(subject.kinds().front(), subject.small_batch(), 1, true);
  auto const first = subject.run(x, {.threads = 1}), second = subject.run(x, {.threads = 2});
  CHECK(first_difference(first.outputs, second.outputs) == "");
  CHECK(first_difference(first.gradients, second.gradients) == "");
}

namespace {

template <class Op> void judge_barriers(barriers::Barriers& all) {
  if constexpr (ha::testing::HasOperation<Op>)
    for (auto const& size : ha::testing::Operation<Op>::sizes()) all.judge(ha::testing::OperationOn<Op, ha::Emulator, float>{size});
  else all.judge(smallest<Op>());
}
template <class... Ops> void judge_all_barriers(barriers::Barriers& all, std::tuple<Ops...> const*) { (judge_barriers<Ops>(all), ...); }
// Some barriers matter only for more numbers than the laws' sizes have.
template <class Op> void judge_more(barriers::Barriers& all, typename ha::testing::Operation<Op>::Config const& size, ha::Index tokens) {
  all.judge(ha::testing::OperationOn<Op, ha::Emulator, float>{size}, ha::Sequences::equal(1, tokens));
}

}  // namespace

TEST_CASE("a kernel without one of its barriers is noticed", "[barriers]") {
  barriers::Barriers all{"/hybridattn/"};
  judge_all_barriers(all, static_cast<Judged const*>(nullptr));
  judge_more<ha::SoftmaxLoss>(all, {0, 300}, 3);
  judge_more<ha::TopK>(all, {300, 70}, 3);
  judge_more<ha::Embedding>(all, ha::testing::Operation<ha::Embedding>::sizes().front(), 1100);
  all.judge(ha::testing::Adaptor<ha::Full, ha::Emulator, float>{{.num_heads = 2, .num_kv_heads = 1, .head_dim = 130}},
            ha::Sequences::equal(1, 70));
  CHECK(all.count() > 25);
  all.check_all();
}
TEST_CASE("a kernel of gated DeltaNet or of sparse attention without one of its barriers is noticed", "[policy_barriers]") {
  barriers::Barriers all{"/attention/"};  // the others are judged above
  judge_all_barriers(all, static_cast<Policies const*>(nullptr));
  all.judge(ha::testing::Adaptor<ha::GDN, ha::Emulator, float>{{.num_heads = 1, .num_value_heads = 2, .key_dim = 12, .value_dim = 40}},
            ha::Sequences::equal(1, 20));  // more columns than are summed at a time
  CHECK(all.count() > 25);
  all.check_all();
}
