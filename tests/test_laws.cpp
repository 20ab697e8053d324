// Judges every policy in the list by all laws.
#include "catch.hpp"
#include "verdicts.hpp"
#include "retention.hpp"

#include <hybridattn/testing/fake.hpp>
#include <hybridattn/testing/judge.hpp>
#include <hybridattn/testing/policies.hpp>

namespace {

namespace detail = ha::testing::detail;

template <int window> using Windowed = ha::FullAttention<ha::FullOptions{.window = window}>;
template <int top_k> using Sparse = ha::SparseAttention<ha::SparseOptions{.top_k = top_k}>;
template <int percent> using SparseShare = ha::SparseAttention<ha::SparseOptions{.top_k = 0, .top_k_percent = percent}>;

using Policies =
    std::tuple<ha::Full, Windowed<1>, Windowed<16>, Windowed<64>, ha::GDN, ha::DSA, Sparse<8>, Sparse<1>, SparseShare<25>, Retention>;
// One policy of each family is enough on Fake, because Fake uses the kernels of Cpu.
using OnFake = std::tuple<Windowed<16>, ha::GDN, Sparse<8>, Retention>;

}  // namespace

TEMPLATE_LIST_TEST_CASE("a policy keeps every law in float", "[float]", Policies) {
  check_all(ha::testing::judge<TestType, ha::Cpu, float>());
}

TEMPLATE_LIST_TEST_CASE("a policy keeps every law in double", "[double]", Policies) {
  check_all(ha::testing::judge<TestType, ha::Cpu, double>());
}

namespace {

// A size of each policy, with scales below 0.
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

// Heads that share keys go together: by tiles, or a few at a time with some left over.
TEMPLATE_TEST_CASE("many heads that share keys keep every law in float", "[float]", Sparse<8>, ha::Full) {
  for (ha::Index heads : {5, 8}) {
    auto size = ha::testing::Samples<TestType>::sizes().front();
    size.num_heads = heads;
    check_all(judge(ha::testing::Adaptor<TestType, ha::Cpu, float>{size}));
  }
}
TEST_CASE("many heads that share keys keep every law in double, and in the stages that train the indexer", "[double]") {
  for (ha::Stage stage : {ha::Stage::language_model, ha::Stage::dense_warm_up, ha::Stage::sparse}) {
    auto size = ha::testing::Samples<Sparse<8>>::sizes().front();
    size.num_heads = 8, size.index_heads = 5, size.stage = stage;
    check_all(judge(ha::testing::Adaptor<Sparse<8>, ha::Cpu, double>{size}));
  }
}

// A policy with the bits of Cpu keeps the laws that it keeps on Cpu, so here only the laws about memory are judged besides.
TEMPLATE_LIST_TEST_CASE("a policy has the bits of the CPU on a device that the host cannot read, and keeps the laws about memory there",
                        "[float]", OnFake) {
  using Fake = ha::testing::Fake;
  auto const size = ha::testing::Samples<TestType>::sizes().front();
  ha::testing::Adaptor<TestType, Fake, float> const policy{size};
  check_all({same_on_both(policy, ha::testing::Adaptor<TestType, ha::Cpu, float>{size}), fills_everything(policy), fenced(policy),
             strided(policy), memory_as_announced(policy), decodes_cleanly(policy)});
}

namespace {

using Softmax = std::tuple<ha::Full, Windowed<16>, ha::DSA, Sparse<8>>;

// Two heads that share their keys and values, and any indexer.
template <class P> typename P::Config with_head_dim(ha::Index D) {
  typename P::Config config{.num_heads = 2, .num_kv_heads = 1, .head_dim = D};
  if constexpr (requires { config.index_dim; }) config.index_dim = 4;
  return config;
}

template <class P, class T> void check_bad_values_for_odd_head_dims() {
  for (ha::Index const D : {33, 80}) check_all({bears_bad_values(ha::testing::Adaptor<P, ha::Cpu, T>{with_head_dim<P>(D)})});
}

// A case in which the score of one early key exceeds all others by `lead`. Values are of about `size`.
ha::testing::Case with_a_leading_key(ha::testing::AnyPolicy const& policy, double lead, double size) {
  auto x = detail::sample_to_decode(policy, policy.kinds().front(), ha::testing::packed({150, 40}), 1);
  auto const set_first = [](ha::testing::HostTensor& tensor, ha::Index row, double value) {
    std::fill_n(tensor.row(row), tensor.row_size(), 0);
    for (ha::Index e = 0; e < tensor.row_size(); e += tensor.shape.back()) tensor.row(row)[e] = value;
  };
  for (ha::Index n = 0; n < 190; ++n) {
    set_first(x.inputs.at("q"), n, 1);
    set_first(x.inputs.at("k"), n, n == 3 || n == 153 ? lead * std::sqrt(static_cast<double>(x.inputs.at("k").shape.back())) : 0);
  }
  for (double& v : x.inputs.at("v").values) v *= size;
  ha::testing::round_inputs(x.inputs);
  return x;
}
template <class P> void check_large_values(double lead, double size) {
  ha::testing::Adaptor<P, ha::Cpu, float> const policy{with_head_dim<P>(16)};
  auto const x = with_a_leading_key(policy, lead, size);
  auto const result = policy.run(x, {});
  auto const truth = detail::judges_of(policy, x, result).truth.outputs.front();
  auto const decoded = policy.decode(x, detail::in_pieces(x.sequences, 1).calls, {}).outputs.front();
  INFO(policy.name() << ", a lead of " << lead);
  CHECK(max_difference(result.outputs.front(), truth).size < 1e-5 * size);
  CHECK(max_difference(decoded, truth).size < 1e-5 * size);
}
template <class P> void check_overflow(double value) {
  ha::testing::Adaptor<P, ha::Cpu, float> const policy{with_head_dim<P>(16)};
  for (double const lead : {0., 2., 9., 39., 1e5}) {
    auto x = with_a_leading_key(policy, lead, 1);
    for (double& v : x.inputs.at("v").values) v = value;
    auto const result = policy.run(x, {});
    auto const loops = policy.loops(x, detail::choices_in(result.saved), false).outputs;
    INFO(policy.name() << ", values of " << value << ", a lead of " << lead);
    CHECK(detail::first_other_kind(result.outputs, loops, true).empty());
    CHECK(detail::first_other_kind({policy.decode(x, detail::in_pieces(x.sequences, 1).calls, {}).outputs.front()}, {loops.front()}, true)
              .empty());
  }
}

}  // namespace

TEMPLATE_LIST_TEST_CASE("heads that fill no vector bear bad values in float", "[float]", Softmax) {
  check_bad_values_for_odd_head_dims<TestType, float>();
}
TEMPLATE_LIST_TEST_CASE("heads that fill no vector bear bad values in double", "[double]", Softmax) {
  check_bad_values_for_odd_head_dims<TestType, double>();
}

TEMPLATE_LIST_TEST_CASE("values of 1e30 do not overflow, whatever an early key is ahead by", "[float]", Softmax) {
  for (double const lead : {0., 5., 9.9, 10.1, 20., 39., 41., 79., 81., 100., 1e4, 0x1p31}) check_large_values<TestType>(lead, 1e30);
}
TEMPLATE_LIST_TEST_CASE("values that overflow in the loops are infinite with their sign, others are finite", "[float]", Softmax) {
  for (double const value : {3e38, -3e38, 1e37, -1e36}) check_overflow<TestType>(value);
}

TEMPLATE_LIST_TEST_CASE("a negative scale is as good as any", "[float]", Softmax) {
  auto config = with_head_dim<TestType>(16);
  config.scale = -0.7;
  ha::testing::Adaptor<TestType, ha::Cpu, float> const policy{config};
  check_all({true_values(policy), decodes_the_whole(policy), bears_bad_values(policy)});
}
