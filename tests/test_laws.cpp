// Every policy inherits every law by standing in the list.
#include "catch.hpp"
#include "retention.hpp"

#include <hybridattn/testing/fake.hpp>
#include <hybridattn/testing/judge.hpp>
#include <hybridattn/testing/policies.hpp>

namespace {

template <int window> using Windowed = ha::FullAttention<ha::FullOptions{.window = window}>;
template <int top_k> using Sparse = ha::SparseAttention<ha::SparseOptions{.top_k = top_k}>;
template <int percent> using SparseShare = ha::SparseAttention<ha::SparseOptions{.top_k = 0, .top_k_percent = percent}>;

using Policies =
    std::tuple<ha::Full, Windowed<1>, Windowed<16>, Windowed<64>, ha::GDN, ha::DSA, Sparse<8>, Sparse<1>, SparseShare<25>, Retention>;
// One of each family: a backend that wraps another one shares its kernels.
using OnFake = std::tuple<Windowed<16>, ha::GDN, Sparse<8>, Retention>;

void check_all(std::vector<ha::testing::Verdict> const& verdicts) {
  CHECK_FALSE(verdicts.empty());
  for (auto const& verdict : verdicts) {
    INFO(verdict.law << ": " << verdict.why);
    CHECK(verdict.holds);
  }
}

}  // namespace

TEMPLATE_LIST_TEST_CASE("a policy keeps every law in float", "[float]", Policies) {
  check_all(ha::testing::judge<TestType, ha::Cpu, float>());
}

TEMPLATE_LIST_TEST_CASE("a policy keeps every law in double", "[double]", Policies) {
  check_all(ha::testing::judge<TestType, ha::Cpu, double>());
}

TEMPLATE_LIST_TEST_CASE("a policy keeps every law on a device that the host cannot read, with the bits of the CPU", "[float]", OnFake) {
  using Fake = ha::testing::Fake;
  auto const size = ha::testing::Samples<TestType>::sizes().front();
  ha::testing::Adaptor<TestType, Fake, float> const policy{size};
  check_all(judge(policy));
  check_all({same_on_both(policy, ha::testing::Adaptor<TestType, ha::Cpu, float>{size})});
}
