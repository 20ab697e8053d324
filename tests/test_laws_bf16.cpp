// Policies and operations on tensors in bf16, by all laws, and against golden values.
#include "golden.hpp"
#include "retention.hpp"
#include "verdicts.hpp"

#include <hybridattn/core/with_constant.hpp>
#include <hybridattn/testing/judge.hpp>
#include <hybridattn/testing/operations.hpp>
#include <hybridattn/testing/policies.hpp>

#include <cstdio>
#include <map>

namespace {

using ha::bf16, ha::Cpu;
template <int window> using Windowed = ha::FullAttention<ha::FullOptions{.window = window}>;
template <int top_k> using Sparse = ha::SparseAttention<ha::SparseOptions{.top_k = top_k}>;
using Policies = std::tuple<ha::Full, Windowed<16>, ha::GDN, Sparse<8>, Retention>;

}  // namespace

TEMPLATE_LIST_TEST_CASE("a policy keeps every law in bf16", "[policies]", Policies) {
  check_all(ha::testing::judge<TestType, Cpu, bf16>());
}
TEST_CASE("the indexer keeps every law in bf16 in the stages that train it", "[policies]") {
  for (ha::Stage stage : {ha::Stage::dense_warm_up, ha::Stage::sparse}) {
    auto size = ha::testing::Samples<Sparse<8>>::sizes().front();
    size.stage = stage;
    check_all(judge(ha::testing::Adaptor<Sparse<8>, Cpu, bf16>{size}));
  }
}
TEMPLATE_LIST_TEST_CASE("an operation keeps every law in bf16", "[operations]", ha::testing::AllOperations) {
  check_all(ha::testing::judge<TestType, Cpu, bf16>());
}

namespace {

using ha::testing::HostGroup, ha::testing::HostTensor;

// The elements of x, those of tensors in bf16 rounded to bf16.
HostGroup rounded_as(HostGroup x, HostGroup const& stored) {
  for (std::size_t i = 0; i < x.size(); ++i)
    for (double& value : x[i].values)
      if (stored[i].is_bf16()) value = static_cast<double>(bf16(value));
  return x;
}

}  // namespace

TEMPLATE_LIST_TEST_CASE("an operation in bf16 is the operation in float, rounded once", "[rounding]", ha::testing::AllOperations) {
  for (auto const& size : ha::testing::Operation<TestType>::sizes()) {
    ha::testing::OperationOn<TestType, Cpu, bf16> const in_bf16{size};
    ha::testing::OperationOn<TestType, Cpu, float> const in_float{size};
    auto const x = in_bf16.sample("noise", in_bf16.batch(), 1, true);
    auto const result = in_bf16.run(x, {}), exact = in_float.run(x, {});
    CHECK(first_difference(result.outputs, rounded_as(exact.outputs, result.outputs)) == "");
    CHECK(first_difference(result.gradients, rounded_as(exact.gradients, result.gradients)) == "");
  }
}

namespace {

// The name of a tensor in golden files, or that of its gradient.
std::string in_file(std::string const& prefix, HostTensor const& tensor) {
  return prefix + (tensor.name == "auxiliary_loss" ? "loss" : tensor.name);
}
// Values of a golden file, for the tensors of a group. A tensor that the file does not have is zero.
void fill_from(golden::Case const& c, std::string const& prefix, HostGroup& group) {
  for (auto& tensor : group)
    if (c.contains(in_file(prefix, tensor)) && !tensor.values.empty()) tensor.values = c.doubles(in_file(prefix, tensor));
    else std::fill(tensor.values.begin(), tensor.values.end(), 0);
}
// The largest errors of a family, as shares of the largest element.
struct Worst {
  double error = 0, of_loops = 0;
};
// The policy in bf16 may be twice as far from the golden values as its loops are, which store bf16 and compute in float.
template <class Policy> void compare(golden::Case const& c, typename Policy::Config const& config, Worst& worst) {
  ha::testing::Adaptor<Policy, Cpu, bf16> const policy{config};
  auto x = policy.sample(policy.kinds().front(), c.sequences(), 1, true);
  fill_from(c, "", x.inputs);
  fill_from(c, "d_", x.d_outputs);
  ha::testing::round_inputs(x.inputs);
  ha::testing::round_inputs(x.d_outputs);
  auto const result = policy.run(x, {});
  auto const naive = policy.loops(x, ha::testing::detail::choices_in(result.saved), false);
  auto const judge = [&](std::string const& prefix, HostGroup const& found, HostGroup const& by_loops) {
    for (std::size_t i = 0; i < found.size(); ++i) {
      auto const name = in_file(prefix, found[i]);
      if (!c.contains(name) || found[i].values.empty()) continue;
      auto truth = found[i];
      truth.values = c.doubles(name);
      double const error = max_difference(found[i], truth).size, of_loops = max_difference(by_loops[i], truth).size;
      double const largest = std::max(max_abs(truth), 1e-3);
      INFO(c.name() << ": " << name);
      CHECK(error <= 2 * of_loops + 4 * found[i].eps * largest);
      worst = {std::max(worst.error, error / largest), std::max(worst.of_loops, of_loops / largest)};
    }
  };
  judge("", result.outputs, naive.outputs);
  judge("d_", result.gradients, naive.gradients);
}

}  // namespace

TEST_CASE("policies in bf16 agree with golden values", "[golden]") {
  int compared = 0;
  std::map<std::string, Worst> worst;
  for (auto const& path : golden::files()) {
    golden::Case const c{path};
    if (c.family() == "full") {
      ha::full::Config const config{
          .num_heads = c.size("H"), .num_kv_heads = c.size("HK"), .head_dim = c.size("D"), .scale = c.real("scale")};
      ha::with_constant<0, 16, 64>(
          c.option_or("window", 0), [&](auto window) { compare<Windowed<static_cast<int>(window.value)>>(c, config, worst["full"]); },
          [&] { FAIL(c.name() << ": this window is not compiled here"); });
    } else if (c.family() == "gdn" && !c.is("l2norm_inside")) {
      compare<ha::GDN>(c,
                       {.num_heads = c.size("H"),
                        .num_value_heads = c.size("HV"),
                        .key_dim = c.size("K"),
                        .value_dim = c.size("V"),
                        .scale = c.real("scale")},
                       worst["gdn"]);
    } else if (c.family() == "dsa" || c.family() == "dsa_kl") {
      ha::dsa::Config config{.num_heads = c.size("H"),
                             .num_kv_heads = c.size("HK"),
                             .head_dim = c.size("D"),
                             .scale = c.real("scale"),
                             .index_heads = c.size("HI"),
                             .index_dim = c.size("DI"),
                             .index_scale = c.real("index_scale")};
      if (c.family() == "dsa_kl") config.stage = c.word("over") == "selected" ? ha::Stage::sparse : ha::Stage::dense_warm_up;
      ha::with_constant<1, 8, 16, 33>(
          c.size("top_k"), [&](auto top_k) { compare<Sparse<static_cast<int>(top_k.value)>>(c, config, worst[c.family()]); },
          [&] { FAIL(c.name() << ": this top_k is not compiled here"); });
    } else {
      continue;
    }
    ++compared;
  }
  CHECK(compared > 10);
  for (auto const& [family, of] : worst)
    std::printf("%s in bf16: largest error %.4f of the largest element, %.4f by loops\n", family.c_str(), of.error, of.of_loops);
}
