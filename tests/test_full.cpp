#include "catch.hpp"
#include "compare.hpp"

#include <hybridattn/attention/full/full.hpp>
#include <hybridattn/attention/full/reference.hpp>
#include <hybridattn/core/random.hpp>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

namespace ha = hybridattn;
namespace full = ha::full;
using ha::Index;

static_assert(ha::ImplementedOn<ha::Full, ha::Cpu, float>);
static_assert(ha::ImplementedOn<ha::FullAttention<ha::FullOptions{.window = 16}>, ha::Cpu, double>);

namespace {

template <class T> constexpr T not_a_number = std::numeric_limits<T>::quiet_NaN();

// A tensor with NaNs before it, behind it and between its tokens. No kernel may write there.
template <class T, int Rank> class Guarded {
 public:
  explicit Guarded(ha::Shape<Rank> shape) : shape_(shape), stride_(ha::View<T, Rank>(nullptr, shape).stride) {
    stride_.extent[0] += Rank == 3 ? stride_[1] : 1;
    elements_.assign(static_cast<std::size_t>((shape[0] + 2) * stride_[0]), not_a_number<T>);
  }
  ha::View<T, Rank> view() { return {elements_.data() + stride_[0], shape_, stride_}; }
  // Elements of the given tokens, one token after the other.
  std::vector<T> tokens(Index first, Index last) {
    std::vector<T> result;
    for (Index n = first; n < last; ++n) result.insert(result.end(), token(n), token(n) + token_size());
    return result;
  }
  std::vector<T> tokens() { return tokens(0, shape_[0]); }
  T* token(Index n) { return elements_.data() + (n + 1) * stride_[0]; }
  Index token_size() const { return shape_.count() / std::max<Index>(shape_[0], 1); }
  void fill_token(Index n, T value) { std::fill_n(token(n), token_size(), value); }
  // Whether every element was written with a number, and nothing else was written.
  bool is_filled_and_no_more() {
    auto const is_number = [](T x) { return x - x == T(0); };
    auto const written = std::count_if(elements_.begin(), elements_.end(), is_number);
    auto const inside = tokens();
    return std::all_of(inside.begin(), inside.end(), is_number) && written == static_cast<std::ptrdiff_t>(inside.size());
  }

 private:
  ha::Shape<Rank> shape_, stride_;
  std::vector<T> elements_;
};

// One forward and backward. The values are floats in every scalar, so that runs in float and in double have the same inputs.
template <class T> struct Run {
  ha::FullOptions o;
  full::Config c;
  ha::Sequences s;
  Guarded<T, 3> q, k, v, y, d_y, d_q, d_k, d_v;
  Guarded<T, 2> lse;

  Run(int window, full::Config config, ha::Sequences sequences, double steepness = 1)
      : o{.window = window}, c(ha::Full::complete(config, 0, 1)), s(std::move(sequences)), q(queries()), k(keys()), v(keys()), y(queries()),
        d_y(queries()), d_q(queries()), d_k(keys()), d_v(keys()), lse({s.tokens(), c.num_heads}) {
    set(q, "q", steepness);
    set(k, "k", steepness);
    set(v, "v", 1);
    set(d_y, "d_y", 1);
  }
  ha::Shape<3> queries() const { return {s.tokens(), c.num_heads, c.head_dim}; }
  ha::Shape<3> keys() const { return {s.tokens(), c.num_kv_heads, c.head_dim}; }
  static void set(Guarded<T, 3>& x, char const* name, double size) {
    ha::Random random{ha::Seed{3}, name};
    auto const view = x.view();
    for (Index n = 0; n < view.extent(0); ++n)
      for (Index e = 0; e < x.token_size(); ++e) x.token(n)[e] = static_cast<T>(static_cast<float>(size * random.normal()));
  }

  full::Inputs<ha::In<T>> x() { return {.q = q.view(), .k = k.view(), .v = v.view()}; }
  void forward(ha::Cpu& cpu) { full::forward<T>(cpu, o, c, s, x(), {.o = y.view()}, {.lse = lse.view()}); }
  void backward(ha::Cpu& cpu) {
    full::backward<T>(cpu, o, c, s, x(), {.o = y.view()}, {.lse = lse.view()}, {.o = d_y.view()},
                      {.q = d_q.view(), .k = d_k.view(), .v = d_v.view()});
  }
  void by_reference() {
    full::reference::forward<T>(o, c, s, x(), {.o = y.view()}, {.lse = lse.view()});
    full::reference::backward<T>(o, c, s, x(), {.o = y.view()}, {.lse = lse.view()}, {.o = d_y.view()},
                                 {.q = d_q.view(), .k = d_k.view(), .v = d_v.view()});
  }
  std::vector<Guarded<T, 3>*> results() { return {&y, &d_q, &d_k, &d_v}; }
  // The outputs and gradients of tokens first .. last.
  std::vector<std::vector<T>> outputs(Index first, Index last) { return {y.tokens(first, last), lse.tokens(first, last)}; }
  std::vector<std::vector<T>> gradients(Index first, Index last) {
    return {d_q.tokens(first, last), d_k.tokens(first, last), d_v.tokens(first, last)};
  }
  std::vector<std::vector<T>> everything() {
    auto all = outputs(0, s.tokens());
    for (auto& gradient : gradients(0, s.tokens())) all.push_back(gradient);
    return all;
  }
};
template <class T> Run<T> computed(ha::Cpu& cpu, Run<T> run) {
  run.forward(cpu);
  run.backward(cpu);
  return run;
}

std::vector<Index> const all_lengths{1, 0, 2, 31, 32, 33, 63, 64, 65, 0, 130, 257, 0};

// Compares a run with the loops in double. In float the error may be twice that of the loops in float. A score of size S has a rounding
// of eps S, which changes the weights, and all results made of them, by as much. So steep scores have one more term. Without it 1 to 7 %
// of seeds fail, in the loops of another compiler too.
template <class T> void check_values(ha::Cpu& cpu, int window, full::Config const& config, ha::Sequences const& s, double steepness = 1) {
  auto result = computed(cpu, Run<T>(window, config, s, steepness));
  Run<T> naive(window, config, s, steepness);
  Run<double> truth(window, config, s, steepness);
  naive.by_reference();
  truth.by_reference();
  CHECK(result.lse.is_filled_and_no_more());
  for (std::size_t i = 0; i < result.results().size(); ++i) CHECK(result.results()[i]->is_filled_and_no_more());
  char const* const names[] = {"o", "lse", "d_q", "d_k", "d_v"};
  auto const results = result.everything(), loops = naive.everything();
  auto const truths = truth.everything();
  for (std::size_t i = 0; i < truths.size(); ++i) {
    INFO(names[i] << ", head_dim " << config.head_dim << ", window " << window);
    double const error = max_error(results[i], truths[i]), size = max_abs(truths[i]), eps = std::numeric_limits<T>::epsilon();
    double const steep = steepness > 1 ? max_abs(truths[1]) : 0;   // where one key has all the weight, lse is its score
    if constexpr (sizeof(T) == 8) CHECK(error <= 1e-11 * std::max(size, 1e-3));
    else CHECK(error <= 2 * max_error(loops[i], truths[i]) + (4 + steep) * eps * size);
  }
}

}  // namespace

TEMPLATE_TEST_CASE("full attention equals its equations for every head dim, length and window", "", float, double) {
  ha::Cpu cpu{2};
  for (Index D : {8, 20, 64})   // the laws judge other head dimensions
    for (int window : {0, 1, 16, 64})
      check_values<TestType>(cpu, window, {.num_heads = 2, .num_kv_heads = 1, .head_dim = D}, packed(all_lengths));
  for (int window : {0, 16})
    check_values<TestType>(cpu, window, {.num_heads = 2, .num_kv_heads = 1, .head_dim = 256}, packed({65, 0, 2, 33}));
}

TEMPLATE_TEST_CASE("full attention equals its equations for groups of heads and a scale", "", float, double) {
  ha::Cpu cpu{2};
  check_values<TestType>(cpu, 0, {.num_heads = 6, .num_kv_heads = 2, .head_dim = 32, .scale = 0.5}, packed({70, 3}));
  check_values<TestType>(cpu, 3, {.num_heads = 3, .num_kv_heads = 3, .head_dim = 48}, packed({70, 3}));
}

TEMPLATE_TEST_CASE("full attention is right where one key takes all", "", float, double) {
  ha::Cpu cpu{1};
  for (double steepness : {4, 12})   // scores of tens and of hundreds, which exceed the softmax's reference by more than 2^60
    for (Index D : {32, 64})
      for (int window : {0, 40}) check_values<TestType>(cpu, window, {.num_heads = 1, .head_dim = D}, packed({257, 33}), steepness);
}

TEMPLATE_TEST_CASE("a query depends on no other query, even when its scores jump", "", float, double) {
  ha::Cpu cpu{1};
  Run<TestType> before(0, {.num_heads = 1, .head_dim = 32}, ha::Sequences::equal(1, 130)), after = before;
  for (Index d = 0; d < 32; ++d) after.q.token(70)[d] *= 200;
  before.forward(cpu);
  after.forward(cpu);
  CHECK(same_bits(before.outputs(0, 70), after.outputs(0, 70)));
  CHECK(same_bits(before.outputs(71, 130), after.outputs(71, 130)));
  CHECK_FALSE(same_bits(before.outputs(70, 71), after.outputs(70, 71)));
}
