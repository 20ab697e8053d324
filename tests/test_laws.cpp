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

namespace {

// One size of each family, with scales below 0.
template <class P> typename P::Config opposite() {
  auto size = ha::testing::Samples<P>::sizes().front();
  size.scale = -0.6;
  if constexpr (requires { size.index_scale; }) size.index_scale = -size.index_scale;
  return size;
}

}  // namespace

using OppositePolicies = std::tuple<ha::Full, Windowed<16>, ha::GDN, Sparse<8>>;
TEMPLATE_LIST_TEST_CASE("a policy keeps every law with scales below 0 in float", "[float]", OppositePolicies) {
  check_all(judge(ha::testing::Adaptor<TestType, ha::Cpu, float>{opposite<TestType>()}));
}
TEMPLATE_LIST_TEST_CASE("a policy keeps every law with scales below 0 in double", "[double]", OppositePolicies) {
  check_all(judge(ha::testing::Adaptor<TestType, ha::Cpu, double>{opposite<TestType>()}));
}
TEMPLATE_TEST_CASE("the indexer keeps every law with scales below 0 in the stages that train it", "[double]", float, double) {
  for (ha::Stage stage : {ha::Stage::dense_warm_up, ha::Stage::sparse}) {
    auto size = opposite<Sparse<8>>();
    size.stage = stage;
    check_all(judge(ha::testing::Adaptor<Sparse<8>, ha::Cpu, TestType>{size}));
  }
}

TEMPLATE_LIST_TEST_CASE("a policy keeps every law on a device that the host cannot read, with the bits of the CPU", "[float]", OnFake) {
  using Fake = ha::testing::Fake;
  auto const size = ha::testing::Samples<TestType>::sizes().front();
  ha::testing::Adaptor<TestType, Fake, float> const policy{size};
  check_all(judge(policy));
  check_all({same_on_both(policy, ha::testing::Adaptor<TestType, ha::Cpu, float>{size})});
}
