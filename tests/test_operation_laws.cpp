// Judges every operation in the list by the laws. Operations with one flaw each show that each law can be broken, and that a flaw breaks
// no other law.
#include "catch.hpp"
#include "verdicts.hpp"

#include <hybridattn/testing/fake.hpp>
#include <hybridattn/testing/judge.hpp>
#include <hybridattn/testing/operations.hpp>

#include <fstream>
#include <set>
#include <sstream>

namespace ha = hybridattn;
using ha::Index;

namespace {

using ha::testing::AllOperations;

std::string the_page() {
  std::ostringstream text;
  text << std::ifstream(HYBRIDATTN_SOURCE_DIR "/docs/add_an_operation.md").rdbuf();
  return text.str();
}
}  // namespace

TEMPLATE_LIST_TEST_CASE("an operation keeps every law in float", "[float]", AllOperations) {
  check_all(ha::testing::judge<TestType, ha::Cpu, float>());
}
TEMPLATE_LIST_TEST_CASE("an operation keeps every law in double, and the page lists those that speak of it", "[double]", AllOperations) {
  auto const verdicts = ha::testing::judge<TestType, ha::Cpu, double>();
  check_all(verdicts);
  std::string row = "\n| `" + ha::type_name<TestType>() + "` |";
  for (char const* law :
       {"independent of the batch", "packed equals its sequences", "causal forward", "finite differences", "agrees in parts", "in place"}) {
    auto const speaks = [&](ha::testing::Verdict const& verdict) { return verdict.law == law && verdict.why.empty(); };
    row += std::any_of(verdicts.begin(), verdicts.end(), speaks) ? " yes |" : " - |";
  }
  INFO(row);
  CHECK(the_page().find(row) != std::string::npos);
}
// Operations that could pass numbers through the host, or make tables of their own. Other tests run whole models on a Fake.
using OnFake = std::tuple<ha::CausalConv1d, ha::CrossEntropy, ha::GroupedLinear, ha::Route, ha::BalanceLoss, ha::AdamWStep>;
TEMPLATE_LIST_TEST_CASE("an operation has the bits of the CPU on a device that the host cannot read", "[float]", OnFake) {
  for (auto const& size : ha::testing::Operation<TestType>::sizes()) {
    ha::testing::OperationOn<TestType, ha::testing::Fake, float> const there{size};
    check_all({same_on_both(ha::testing::OperationOn<TestType, ha::Cpu, float>{size}, there), fenced(there), agrees_with_cpu(there)});
  }
}

namespace {

enum class Flaw {
  none,
  sees_the_next_token,
  gradient_sees_the_token_before,
  sees_another_sequence,
  counts_sequences,
  counts_threads,
  leaves_a_hole_without_tokens,
  needs_fresh_memory,
  reads_outside,
  writes_outside,
  overwrites_an_argument,
  ignores_strides,
  wrong_sign,
  is_not_linear,
  makes_something_of_nothing,
  moves_the_state,
  keeps_memory,
  quadratic_memory,
  is_not_in_place,
  rounds_coarsely,
};
// A convolution over sequences with states, because every law judges it.
struct Flawed {
  static inline Flaw flaw = Flaw::none;   // a variable and no template parameter, so that one operation is compiled for all
};
bool has(Flaw flaw) { return Flawed::flaw == flaw; }

template <class T> void nudge_if(bool condition, T& x) {
  if (condition) x = std::nextafter(x, std::numeric_limits<T>::infinity());
}
template <class T> void nudge_by_much(ha::View<T, 2> y) {
  for (Index n = 0; n < y.extent(0); ++n) y(n, 0) += T(1e-3);
}
using Convolution = ha::testing::Operation<ha::CausalConv1d>;

template <class T> void spoil(ha::Cpu& cpu, ha::Sequences const& s, Convolution::Inputs<ha::In<T>> x, Convolution::Outputs<ha::Out<T>> y) {
  Index const N = s.tokens(), C = x.x.extent(1);
  bool const is_in_place = !y.final_state.empty() && y.final_state.data == x.initial_state.data;
  if (has(Flaw::is_not_in_place) && is_in_place) y.final_state(0, 0, 0) = std::nextafter(y.final_state(0, 0, 0), T(1e9));
  for (Index i = 0; i < s.count() && has(Flaw::moves_the_state); ++i) y.final_state(i, 0, 0) *= T(1 + 1e-10);
  if (N == 0) return;
  if (has(Flaw::counts_sequences)) nudge_if(s.count() > 1, y.y(N - 1, 0));
  if (has(Flaw::counts_threads)) nudge_if(cpu.threads() > 2, y.y(N - 1, 0));
  if (has(Flaw::reads_outside)) nudge_if((&x.x(N - 1, C - 1))[1] < 0, y.y(N - 1, 0));
  if (has(Flaw::writes_outside)) (&y.y(0, 0))[-1] = 0;
  if (has(Flaw::overwrites_an_argument)) nudge_if(true, const_cast<T&>(x.w(0, 0)));
  if (has(Flaw::ignores_strides)) nudge_if(N > 1 && y.y.data[C] != y.y.data[C], y.y(N - 1, 0));
  if (has(Flaw::rounds_coarsely) && sizeof(T) == sizeof(float)) nudge_by_much(y.y);
  if (has(Flaw::needs_fresh_memory)) {
    auto const allocations = cpu.pool().allocations();
    ha::Tensor<T, 1, ha::Cpu> const scratch{cpu, {12345}};
    nudge_if(cpu.pool().allocations() == allocations, y.y(N - 1, 0));   // the run before left something there
  }
  if (has(Flaw::keeps_memory)) {
    static auto& kept = *new std::vector<void*>;   // reachable until the end, so that a leak checker does not report it
    kept.push_back(cpu.take(64));
  }
  if (has(Flaw::quadratic_memory)) ha::Tensor<T, 2, ha::Cpu> scores{cpu, {N, N}};
  for (ha::Sequence const q : s)
    for (Index t = q.start; t < q.start + q.length; ++t) {
      if (has(Flaw::sees_the_next_token)) nudge_if(t + 1 < q.start + q.length && x.x(t + 1, 0) > 0, y.y(t, 0));
      if (has(Flaw::sees_another_sequence)) nudge_if(q.start > 0 && x.x(0, 0) == x.x(0, 0), y.y(t, 0));
    }
}
template <class T> void spoil_gradients(ha::Sequences const& s, Convolution::Outputs<ha::In<T>> d_y, Convolution::Inputs<ha::Out<T>> d_x) {
  if (has(Flaw::leaves_a_hole_without_tokens) && s.tokens() == 0) d_x.w(0, 0) = std::numeric_limits<T>::quiet_NaN();
  if (has(Flaw::wrong_sign)) d_x.w(0, 0) = -d_x.w(0, 0);
  for (ha::Sequence const q : s)
    for (Index t = q.start; t < q.start + q.length; ++t) {
      if (has(Flaw::gradient_sees_the_token_before)) nudge_if(t > q.start && d_y.y(t - 1, 0) > 0, d_x.x(t, 0));
      if (has(Flaw::is_not_linear)) d_x.x(t, 0) += T(1e-11) * d_y.y(t, 0) * d_y.y(t, 0);
      if (has(Flaw::makes_something_of_nothing) && d_x.x(t, 0) == 0) d_x.x(t, 0) = T(1e-30);
    }
}

// An operation that overwrites a result where it should add to it.
struct OverwritesASum {};
// A product that sums from the last column to the first. With `wrong` it also has a wrong value.
template <bool wrong> struct OtherOrder {};

}  // namespace

template <> struct ha::testing::Operation<Flawed> : Convolution {
  static std::vector<Config> sizes() { return {{2, 3}}; }
  template <class B, class T>
  static void forward(B& backend, Config const& c, SequencesOn<B> const& s, Inputs<In<T>> x, Outputs<Out<T>> y) {
    Convolution::forward<B, T>(backend, c, s, x, y);
    spoil<T>(backend, s, x, y);
  }
  template <class B, class T>
  static void backward(B& backend, Config const& c, SequencesOn<B> const& s, Inputs<In<T>> x, Outputs<In<T>> y, Outputs<In<T>> d_y,
                       Inputs<Out<T>> d_x) {
    Convolution::backward<B, T>(backend, c, s, x, y, d_y, d_x);
    spoil_gradients<T>(s, d_y, d_x);
  }
};
template <> struct ha::testing::Operation<OverwritesASum> : Operation<RmsNorm> {
  template <class B, class T>
  static void backward(B& backend, Config c, SequencesOn<B> const& s, Inputs<In<T>> x, Outputs<In<T>> y, Outputs<In<T>> d_y,
                       Inputs<Out<T>> d_x) {
    c.into = Into::overwrite;
    Operation<RmsNorm>::backward<B, T>(backend, c, s, x, y, d_y, d_x);
  }
};
template <bool wrong> struct ha::testing::Operation<OtherOrder<wrong>> : Operation<Linear> {
  template <class B, class T> static void forward(B&, Config const& c, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<Out<T>> y) {
    for (Index n = 0; n < y.y.extent(0); ++n)
      for (Index m = 0; m < c.features; ++m) {
        T sum = 0;
        for (Index e = c.columns; e-- > 0;) sum += x.x(n, e) * x.w(m, e);
        y.y(n, m) = wrong && n == 7 ? sum * T(1 + 1e-4) : sum;
      }
  }
};

namespace {

using Laws = std::set<std::string>;
template <class Op, class T> Laws broken(typename ha::testing::Operation<Op>::Config const& size) {
  Laws names;
  for (auto const& verdict : judge(ha::testing::OperationOn<Op, ha::Cpu, T>{size}))
    if (!verdict.holds) {
      names.insert(verdict.law);
      CHECK_FALSE(verdict.why.empty());
    }
  return names;
}
// Returns the broken laws in double, where every law is judged.
Laws broken(Flaw flaw) {
  Flawed::flaw = flaw;
  return broken<Flawed, double>({2, 3});
}

}  // namespace

TEST_CASE("an operation with a flaw breaks the law about it, and no other") {
  CHECK(broken(Flaw::none) == Laws{});
  CHECK(broken(Flaw::sees_the_next_token) == Laws{"causal forward"});
  CHECK(broken(Flaw::gradient_sees_the_token_before) == Laws{"causal backward"});
  CHECK(broken(Flaw::sees_another_sequence) == Laws{"independent of the batch", "packed equals its sequences"});
  CHECK(broken(Flaw::counts_sequences) == Laws{"packed equals its sequences"});
  CHECK(broken(Flaw::counts_threads) == Laws{"repeatable"});
  CHECK(broken(Flaw::leaves_a_hole_without_tokens) == Laws{"fills everything"});
  CHECK(broken(Flaw::needs_fresh_memory) == Laws{"fills everything"});
  CHECK(broken(Flaw::reads_outside) == Laws{"fenced"});
  CHECK(broken(Flaw::writes_outside) == Laws{"fenced"});
  CHECK(broken(Flaw::overwrites_an_argument) == Laws{"fenced"});
  CHECK(broken(Flaw::ignores_strides) == Laws{"strided"});
  CHECK(broken(Flaw::wrong_sign) == Laws{"finite differences"});
  CHECK(broken(Flaw::is_not_linear) == Laws{"linear"});
  CHECK(broken(Flaw::makes_something_of_nothing) == Laws{"linear"});
  CHECK(broken(Flaw::moves_the_state) == Laws{"agrees in parts"});
  CHECK(broken(Flaw::keeps_memory) == Laws{"memory as announced"});
  CHECK(broken(Flaw::quadratic_memory) == Laws{"memory as announced"});
  CHECK(broken(Flaw::is_not_in_place) == Laws{"in place"});
  CHECK(broken<OverwritesASum, double>({7, {}, ha::Into::add}) == Laws{"finite differences"});
  Flawed::flaw = Flaw::rounds_coarsely;
  CHECK(broken<Flawed, float>({2, 3}) == Laws{"agrees with Cpu"});
}

TEST_CASE("two backends that sum in another order agree within the budget and not in their bits; a wrong one does not") {
  ha::testing::OperationOn<ha::Linear, ha::Cpu, float> const linear{{40, 33}};
  ha::testing::OperationOn<OtherOrder<false>, ha::Cpu, float> const other{{40, 33}};
  ha::testing::OperationOn<OtherOrder<true>, ha::Cpu, float> const wrong{{40, 33}};
  check_all({agree_within_budget(linear, other)});
  CHECK_FALSE(same_on_both(linear, other).holds);
  CHECK_FALSE(agree_within_budget(linear, wrong).holds);
}
