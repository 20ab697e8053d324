// The laws on short sequences, for a CPU that is emulated.
#include "catch.hpp"
#include "verdicts.hpp"

#include <hybridattn/testing/judge.hpp>
#include <hybridattn/testing/policies.hpp>

namespace ha = hybridattn;

namespace {

template <class P> struct OnShortSequences : ha::testing::Adaptor<P, ha::Cpu, float> {
  using ha::testing::Adaptor<P, ha::Cpu, float>::Adaptor;
  ha::Sequences batch() const override { return ha::testing::packed({1, 2, 65}); }
  ha::Sequences small_batch() const override { return batch(); }
};

}  // namespace

using Policies = std::tuple<ha::Full, ha::GDN, ha::SparseAttention<ha::SparseOptions{.top_k = 8}>>;
TEMPLATE_LIST_TEST_CASE("a policy keeps every law on sequences of 1, 2 and 65 tokens", "", Policies) {
  check_all(judge(OnShortSequences<TestType>{ha::testing::Samples<TestType>::sizes().front()}));
}
