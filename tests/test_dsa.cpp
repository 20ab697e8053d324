#include "catch.hpp"
#include "compare.hpp"

#include <hybridattn/attention/dsa/dsa.hpp>
#include <hybridattn/attention/dsa/reference.hpp>
#include <hybridattn/core/random.hpp>
#include <hybridattn/testing/judge.hpp>
#include <hybridattn/testing/policies.hpp>

#include <cstring>
#include <limits>
#include <vector>

namespace ha = hybridattn;
namespace dsa = ha::dsa;
using ha::Index;

static_assert(ha::ImplementedOn<ha::DSA, ha::Cpu, float>);
static_assert(ha::ImplementedOn<ha::SparseAttention<ha::SparseOptions{.top_k = 0, .top_k_percent = 50}>, ha::Cpu, double>);

namespace {

template <class T> constexpr T unwritten = std::numeric_limits<T>::quiet_NaN();
template <> constexpr std::int32_t unwritten<std::int32_t> = std::numeric_limits<std::int32_t>::min();

// A tensor with guards before it, behind it and between its tokens. No kernel may write a guard.
template <class T, int Rank> class Guarded {
 public:
  explicit Guarded(ha::Shape<Rank> shape) : shape_(shape), stride_(ha::View<T, Rank>(nullptr, shape).stride) {
    stride_.extent[0] += Rank == 3 ? stride_[1] : 1;
    elements_.assign(static_cast<std::size_t>((shape[0] + 2) * stride_[0]), unwritten<T>);
  }
  ha::View<T, Rank> view() { return {elements_.data() + stride_[0], shape_, stride_}; }
  T* token(Index n) { return elements_.data() + (n + 1) * stride_[0]; }
  Index token_size() const { return shape_.count() / std::max<Index>(shape_[0], 1); }
  void fill_token(Index n, T value) { std::fill_n(token(n), token_size(), value); }
  // Elements of the given tokens, one token after the other.
  std::vector<T> tokens(Index first, Index last) {
    std::vector<T> result;
    for (Index n = first; n < last; ++n) result.insert(result.end(), token(n), token(n) + token_size());
    return result;
  }
  std::vector<T> tokens() { return tokens(0, shape_[0]); }
  // Whether every element was written with a number, and no guard was written.
  bool is_filled_and_no_more() {
    auto const is_number = [](T x) { return x - x == T(0) && x != unwritten<T>; };
    auto const written = std::count_if(elements_.begin(), elements_.end(), is_number);
    auto const inside = tokens();
    return std::all_of(inside.begin(), inside.end(), is_number) && written == static_cast<std::ptrdiff_t>(inside.size());
  }

 private:
  ha::Shape<Rank> shape_, stride_;
  std::vector<T> elements_;
};

// The numbers of the indexer. With small integers, scores are exact and many are equal.
enum class Scores { random, integers };

// One forward and backward. The values are floats in every scalar, so that runs in float and in double have the same inputs.
template <class T> struct Run {
  ha::SparseOptions o;
  dsa::Config c;
  ha::Sequences s;
  Guarded<T, 3> q, k, v, index_q, y, d_y, d_q, d_k, d_v, d_index_q;
  Guarded<T, 2> index_k, index_w, lse, d_index_k, d_index_w;
  Guarded<std::int32_t, 2> indices;

  Run(ha::SparseOptions options, dsa::Config config, ha::Sequences sequences, Scores scores = Scores::random)
      : o(options), c(ha::DSA::complete(config, 0, 1)), s(std::move(sequences)), q(shapes().q), k(shapes().k), v(shapes().v),
        index_q(shapes().index_q), y(shapes().q), d_y(shapes().q), d_q(shapes().q), d_k(shapes().k), d_v(shapes().v),
        d_index_q(shapes().index_q), index_k(shapes().index_k), index_w(shapes().index_w), lse({s.tokens(), c.num_heads}),
        d_index_k(shapes().index_k), d_index_w(shapes().index_w), indices({s.tokens(), dsa::selection_size(o, s.longest())}) {
    auto const normal = [](ha::Random& random) { return random.normal(); };
    auto const integer = [](ha::Random& random) { return static_cast<double>(random.below(5) - 2); };
    set(q, "q", normal), set(k, "k", normal), set(v, "v", normal), set(d_y, "d_y", normal);
    if (scores == Scores::random) set(index_q, "index_q", normal), set(index_k, "index_k", normal), set(index_w, "index_w", normal);
    else set(index_q, "index_q", integer), set(index_k, "index_k", integer), set(index_w, "index_w", integer);
  }
  dsa::Inputs<ha::Shapes> shapes() const { return ha::DSA::inputs(c, s); }
  template <int Rank, class F> static void set(Guarded<T, Rank>& x, char const* name, F draw) {
    ha::Random random{ha::Seed{3}, name};
    for (Index n = 0; n < x.view().extent(0); ++n)
      for (Index e = 0; e < x.token_size(); ++e) x.token(n)[e] = static_cast<T>(static_cast<float>(draw(random)));
  }

  dsa::Inputs<ha::In<T>> x() {
    return {.q = q.view(), .k = k.view(), .v = v.view(), .index_q = index_q.view(), .index_k = index_k.view(), .index_w = index_w.view()};
  }
  dsa::Inputs<ha::Out<T>> d_x() {
    return {.q = d_q.view(),
            .k = d_k.view(),
            .v = d_v.view(),
            .index_q = d_index_q.view(),
            .index_k = d_index_k.view(),
            .index_w = d_index_w.view()};
  }
  dsa::Outputs<ha::Out<T>> outputs() { return {.o = y.view(), .auxiliary_loss = {}}; }
  dsa::Saved<ha::Out<T>> saved() { return {.lse = lse.view(), .indices = indices.view(), .index_lse = {}}; }
  dsa::Outputs<ha::In<T>> upstream() { return {.o = d_y.view(), .auxiliary_loss = {}}; }
  void forward(ha::Cpu& cpu) { dsa::forward<T>(cpu, o, c, s, x(), outputs(), saved()); }
  void backward(ha::Cpu& cpu) { dsa::backward<T>(cpu, o, c, s, x(), in(outputs()), in(saved()), upstream(), d_x()); }
  // Runs the reference on the keys that another run chose.
  template <class U> void by_reference(Run<U>& other) {
    for (Index n = 0; n < s.tokens(); ++n) std::copy_n(other.indices.token(n), indices.token_size(), indices.token(n));
    dsa::reference::attend<T>(c, s, x(), indices.view(), outputs(), lse.view());
    dsa::reference::backward<T>(o, c, s, x(), in(outputs()), in(saved()), upstream(), d_x());
  }

  std::vector<std::vector<T>> results(Index first, Index last) { return {y.tokens(first, last), lse.tokens(first, last)}; }
  std::vector<std::vector<T>> gradients(Index first, Index last) {
    return {d_q.tokens(first, last), d_k.tokens(first, last), d_v.tokens(first, last)};
  }
  bool is_filled_and_no_more() {
    auto const all = [](auto&... tensors) { return (tensors.is_filled_and_no_more() && ...); };
    return all(y, lse, indices, d_q, d_k, d_v, d_index_q, d_index_k, d_index_w);
  }
};
template <class T> Run<T> computed(ha::Cpu& cpu, Run<T> run) {
  run.forward(cpu);
  run.backward(cpu);
  return run;
}

// Whether tokens first .. last of a have the outputs and choices of as many tokens of b from `other` on.
template <class T> bool same_outputs(Run<T>& a, Run<T>& b, Index first, Index last, Index other) {
  Index const end = other + last - first;
  return same_bits(a.results(first, last), b.results(other, end)) && a.indices.tokens(first, last) == b.indices.tokens(other, end);
}

std::vector<Index> const all_lengths{1, 0, 2, 31, 33, 64, 65, 0, 130, 0};
std::vector<ha::SparseOptions> const some_options{{.top_k = 8}, {.top_k = 64}},
    all_options{{.top_k = 1}, {.top_k = 8}, {.top_k = 16}, {.top_k = 64}, {.top_k = 200}, {.top_k = 0, .top_k_percent = 50}};

// Compares a run with the loops in double on the kernel's choices. In float the error may be twice that of the loops in float.
template <class T> void check_values(ha::Cpu& cpu, ha::SparseOptions o, dsa::Config const& config, ha::Sequences const& s) {
  auto result = computed(cpu, Run<T>(o, config, s));
  Run<T> naive(o, config, s);
  Run<double> truth(o, config, s);
  naive.by_reference(result);
  truth.by_reference(result);
  INFO("head_dim " << config.head_dim << ", top_k " << o.top_k << ", percent " << o.top_k_percent);
  CHECK(result.is_filled_and_no_more());
  char const* const names[] = {"o", "lse", "d_q", "d_k", "d_v"};
  auto const all = [&](auto run) {
    auto values = run.results(0, s.tokens());
    for (auto& gradient : run.gradients(0, s.tokens())) values.push_back(gradient);
    return values;
  };
  auto const results = all(result), loops = all(naive);
  auto const truths = all(truth);
  for (std::size_t i = 0; i < truths.size(); ++i) {
    INFO(names[i]);
    double const error = max_error(results[i], truths[i]), size = max_abs(truths[i]), eps = std::numeric_limits<T>::epsilon();
    if constexpr (sizeof(T) == 8) CHECK(error <= 1e-11 * std::max(size, 1e-3));
    else CHECK(error <= 2 * max_error(loops[i], truths[i]) + 4 * eps * size);
  }
}

// The largest score that a query left out may exceed the smallest score that it chose only by the rounding of both.
template <class T> void check_choices(Run<T>& run) {
  Run<double> exact(run.o, run.c, run.s);
  for (ha::Sequence const sequence : run.s)
    for (Index t = 0; t < sequence.length; ++t) {
      auto const scores = dsa::reference::index_scores(run.c, sequence, exact.x(), t);
      std::int32_t const *const first = run.indices.token(sequence.start + t), *last = first + run.indices.token_size();
      last = std::find(first, last, -1);
      bool const right_form = last - first == std::min(dsa::selection_size(run.o, sequence.length), t + 1) && std::is_sorted(first, last) &&
                              std::adjacent_find(first, last) == last && *first >= 0 && last[-1] <= t;
      double chosen = std::numeric_limits<double>::infinity(), left = -chosen;
      for (Index s = 0; s <= t; ++s) {
        double const score = scores[static_cast<std::size_t>(s)];
        if (std::binary_search(first, last, s)) chosen = std::min(chosen, score);
        else left = std::max(left, score);
      }
      double const terms = static_cast<double>(run.c.index_dim + run.c.index_heads);
      double const rounding = 4 * terms * std::numeric_limits<T>::epsilon() * max_abs(scores);
      if (!right_form || left > chosen + rounding) FAIL_CHECK("query " << t << " of " << sequence.length << " with top_k " << run.o.top_k);
    }
}

}  // namespace

TEMPLATE_TEST_CASE("top_k is the first k of the scores sorted, whatever they are", "", float, double) {
  using T = TestType;
  ha::Cpu cpu{2};
  T const infinity = std::numeric_limits<T>::infinity();
  std::vector<T> const odd{T(0), -T(0), infinity, -infinity, unwritten<T>, -unwritten<T>, std::numeric_limits<T>::denorm_min(), T(1)};
  for (Index n : {1, 2, 7, 8, 15, 16, 17, 64, 130, 1000})
    for (Index k : {Index{1}, Index{3}, n / 2, n - 1, n, n + 5})
      for (int kind : {0, 1, 2, 3, 4}) {
        ha::Random random{ha::Seed{static_cast<std::uint64_t>(n)}};
        std::vector<T> scores(static_cast<std::size_t>(n), unwritten<T>);
        for (T& x : scores) {
          if (kind == 0) x = static_cast<T>(random.normal());
          if (kind == 1) x = static_cast<T>(random.below(4) - 2);
          if (kind == 2) x = odd[static_cast<std::size_t>(random.below(8))];
          if (kind == 3) x = odd[static_cast<std::size_t>(random.below(2))];   // +0 and -0
        }
        std::vector<std::int32_t> chosen(static_cast<std::size_t>(k), -7), truth = chosen;
        ha::On<ha::TopK, ha::Cpu>::forward<T>(cpu, {scores.data(), {1, n}}, {chosen.data(), {1, k}});
        dsa::reference::select(scores, k, truth.data());
        INFO("n " << n << ", k " << k << ", kind " << kind);
        CHECK(chosen == truth);
      }
}

TEMPLATE_TEST_CASE("where scores are exact the choice is the reference's, ties and all", "", float, double) {
  ha::Cpu cpu{2};
  auto options = all_options;
  options.push_back({.top_k = 0, .top_k_percent = 1});
  for (auto o : options)
    for (auto [HI, DI] : {std::pair<Index, Index>{1, 3}, {4, 8}, {5, 32}, {8, 20}, {13, 16}}) {
      Run<TestType> run(o, {.head_dim = 16, .index_heads = HI, .index_dim = DI, .index_scale = 0.5}, packed(all_lengths), Scores::integers);
      for (Index n = 0; n < run.s.tokens(); ++n) {
        if (n % 7 == 3) run.index_k.fill_token(n, 0);  // makes scores of 0 and -0
        if (n % 5 == 4) std::copy_n(run.index_k.token(n - 3), run.index_k.token_size(), run.index_k.token(n));  // twice the same key
      }
      Run<TestType> truth = run;
      run.forward(cpu);
      dsa::reference::select<TestType>(o, run.c, run.s, truth.x(), truth.indices.view());
      INFO("top_k " << o.top_k << ", percent " << o.top_k_percent << ", " << HI << " indexer heads of " << DI);
      CHECK(run.indices.tokens() == truth.indices.tokens());
    }
}

TEMPLATE_TEST_CASE("the choice is a top k within rounding", "", float, double) {
  ha::Cpu cpu{2};
  for (auto o : some_options)
    for (auto [HI, DI] : {std::pair<Index, Index>{1, 3}, {4, 32}, {6, 40}, {8, 64}, {12, 128}}) {
      Run<TestType> run(o, {.head_dim = 16, .index_heads = HI, .index_dim = DI}, packed(all_lengths));
      run.forward(cpu);
      check_choices(run);
    }
}

TEMPLATE_TEST_CASE("sparse attention equals its equations for every head dim, length and number of keys", "", float, double) {
  ha::Cpu cpu{2};
  for (Index D : {8, 20, 64, 112})   // the laws judge other head dimensions
    for (auto o : D == 20 || D == 64 ? all_options : some_options)
      check_values<TestType>(cpu, o, {.num_heads = 2, .num_kv_heads = 1, .head_dim = D}, packed(all_lengths));
  check_values<TestType>(cpu, {.top_k = 16}, {.num_heads = 2, .num_kv_heads = 1, .head_dim = 256}, packed({65, 0, 2, 33}));
}

TEMPLATE_TEST_CASE("sparse attention equals its equations for groups of heads and a scale", "", float, double) {
  ha::Cpu cpu{2};
  check_values<TestType>(cpu, {.top_k = 8}, {.num_heads = 6, .num_kv_heads = 2, .head_dim = 32, .scale = 0.5}, packed({70, 3}));
  check_values<TestType>(cpu, {.top_k = 20}, {.num_heads = 3, .num_kv_heads = 3, .head_dim = 48, .scale = 3}, packed({70, 3}));
}

TEMPLATE_TEST_CASE("choosing has no gradient, and none is written where none is wanted", "", float, double) {
  ha::Cpu cpu{2};
  auto run = computed(cpu, Run<TestType>({.top_k = 8}, {.num_heads = 2, .head_dim = 32}, packed({40, 3})));
  for (auto const& gradient : {run.d_index_q.tokens(), run.d_index_k.tokens(), run.d_index_w.tokens()})
    CHECK(std::all_of(gradient.begin(), gradient.end(), [](TestType x) { return x == 0; }));
  auto again = run;
  TestType loss = 7;
  auto outputs = again.outputs();
  outputs.auxiliary_loss = {&loss, {1}};
  dsa::forward<TestType>(cpu, run.o, run.c, run.s, again.x(), outputs, again.saved());
  CHECK(loss == 0);
  auto d_x = again.d_x();
  d_x.index_q = {}, d_x.index_k = {}, d_x.index_w = {};
  dsa::backward<TestType>(cpu, run.o, run.c, run.s, again.x(), in(again.outputs()), in(again.saved()), again.upstream(), d_x);
  CHECK(same_bits(run.gradients(0, 43), again.gradients(0, 43)));
}

namespace {

// A policy in a stage that trains its indexer, as a subject of the laws.
template <int top_k, class T> auto trained(dsa::Config config, ha::Stage stage) {
  config.stage = stage;
  return ha::testing::Adaptor<ha::SparseAttention<ha::SparseOptions{.top_k = top_k}>, ha::Cpu, T>{config};
}
// A case whose backward gets only some of the gradients of outputs, or computes only some gradients.
template <class T> struct Partly {
  ha::Cpu cpu{2};
  dsa::Config config;
  ha::Sequences s = packed({40, 0, 3});
  dsa::Inputs<ha::Owned<T, ha::Cpu>> x, d_x;
  dsa::Outputs<ha::Owned<T, ha::Cpu>> y, d_y;
  dsa::Saved<ha::Owned<T, ha::Cpu>> saved;

  explicit Partly(ha::Stage stage)
      : config(ha::DSA::complete({.num_heads = 2, .head_dim = 16, .index_heads = 3, .index_dim = 8, .stage = stage}, 0, 0)),
        x(ha::allocate<T>(cpu, ha::DSA::inputs(config, s))), d_x(ha::allocate<T>(cpu, ha::DSA::inputs(config, s))),
        y(ha::allocate<T>(cpu, ha::DSA::outputs(config, s))), d_y(ha::allocate<T>(cpu, ha::DSA::outputs(config, s))),
        saved(ha::allocate<T>(cpu, ha::DSA::saved(config, s))) {
    auto const draw = [](ha::Path const& path, auto& tensor) {
      ha::Random random{ha::Seed{4}, path.str()};
      auto const view = out(tensor);
      for (Index i = 0; i < view.count(); ++i) view.data[i] = static_cast<T>(random.normal());
    };
    ha::zip(draw, x);
    ha::zip(draw, d_y);
    ha::On<ha::DSA, ha::Cpu>::forward<T>(cpu, config, s, in(x), out(y), out(saved));
  }
  dsa::Inputs<ha::Out<T>> wanted() { return out(d_x); }
  dsa::Outputs<ha::In<T>> upstream() { return in(d_y); }
  // The gradients of q, k, v, index_q, index_k and index_w. Elements that backward did not write are 7.
  std::vector<std::vector<T>> backward(dsa::Outputs<ha::In<T>> d_outputs, dsa::Inputs<ha::Out<T>> d_inputs) {
    ha::zip([](ha::Path const&, auto& tensor) { ha::fill(out(tensor), T(7)); }, d_x);
    ha::On<ha::DSA, ha::Cpu>::backward<T>(cpu, config, s, in(x), in(y), in(saved), d_outputs, d_inputs);
    std::vector<std::vector<T>> result;
    ha::zip([&](ha::Path const&, auto& tensor) { result.push_back(download(cpu, tensor)); }, d_x);
    return result;
  }
};
template <class T> bool all_are(std::vector<T> const& values, T value) {
  return !values.empty() && std::all_of(values.begin(), values.end(), [&](T x) { return x == value; });
}

}  // namespace

TEMPLATE_TEST_CASE("the indexer's loss equals its equations for any number of heads of any size, its own and those it learns from", "",
                   float, double) {
  using ha::Stage;
  std::vector<dsa::Config> const configs{{.num_heads = 1, .head_dim = 5, .index_heads = 1, .index_dim = 3},
                                         {.num_heads = 6, .num_kv_heads = 2, .head_dim = 20, .index_heads = 5, .index_dim = 20},
                                         {.num_heads = 2, .head_dim = 64, .index_heads = 8, .index_dim = 64, .index_scale = 0.02},
                                         {.num_heads = 3, .head_dim = 16, .index_heads = 13, .index_dim = 112, .index_scale = 0.01}};
  ha::testing::detail::Values const noise{"noise", packed({70, 1, 0, 33})}, ties{"ties", packed({34, 2})};
  for (auto const& config : configs)
    for (auto const& values : {noise, ties})
      for (Stage stage : {Stage::dense_warm_up, Stage::sparse}) {
        INFO(config.index_heads << " indexer heads of " << config.index_dim << ", " << values.kind);
        CHECK(ha::testing::detail::wrong_values(trained<20, TestType>(config, stage), values) == "");
      }
}

TEST_CASE("each loss has its gradient alone where the other one has none") {
  for (ha::Stage stage : {ha::Stage::dense_warm_up, ha::Stage::sparse}) {
    Partly<float> f{stage};
    auto const both = f.backward(f.upstream(), f.wanted());
    auto only_main = f.wanted(), only_index = f.wanted();
    only_main.index_q = {}, only_main.index_k = {}, only_main.index_w = {};
    only_index.q = {}, only_index.k = {}, only_index.v = {};
    auto no_o = f.upstream(), no_loss = f.upstream();
    no_o.o = {}, no_loss.auxiliary_loss = {};
    auto const main = f.backward(no_loss, f.wanted()), index = f.backward(no_o, f.wanted());
    auto const main_alone = f.backward(no_loss, only_main), index_alone = f.backward(no_o, only_index);
    for (std::size_t i : {0u, 1u, 2u}) {
      CHECK(same_bits<float>({both[i]}, {main[i]}));
      CHECK(same_bits<float>({both[i]}, {main_alone[i]}));
      CHECK(all_are(index[i], 0.f));
      CHECK(all_are(index_alone[i], 7.f));
    }
    for (std::size_t i : {3u, 4u, 5u}) {
      CHECK(same_bits<float>({both[i]}, {index[i]}));
      CHECK(same_bits<float>({both[i]}, {index_alone[i]}));
      CHECK(all_are(main[i], 0.f));
      CHECK(all_are(main_alone[i], 7.f));
    }
    CHECK_FALSE(all_are(both[4], 0.f));
    for (auto const& gradient : f.backward({}, f.wanted())) CHECK(all_are(gradient, 0.f));
  }
}

TEST_CASE("the dense warm-up saves nothing for each pair of tokens, and no stage but those that train the indexer saves for it") {
  auto const s = ha::Sequences::equal(1, 1000);
  dsa::Config c = ha::DSA::complete({.num_heads = 2, .head_dim = 16}, 0, 0);
  auto const bytes_at = [&](ha::Stage stage) {
    c.stage = stage;
    return ha::bytes<float>(ha::DSA::saved(c, s));
  };
  CHECK(bytes_at(ha::Stage::language_model) == 1000 * 4 * (2 + 64));
  CHECK(bytes_at(ha::Stage::sparse) == 1000 * 4 * (2 + 64 + 1));
  CHECK(bytes_at(ha::Stage::dense_warm_up) == 1000 * 4 * (2 + 1));
}

TEST_CASE("a negative weight of the indexer's loss is refused") {
  CHECK_THROWS_WITH(ha::DSA::complete({.num_heads = 2, .head_dim = 16, .index_loss = -0.5}, 0, 0),
                    Catch::Matchers::Contains("index_loss -0.5") && Catch::Matchers::Contains(">= 0"));
}
