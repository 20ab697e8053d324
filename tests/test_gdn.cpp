#include "catch.hpp"
#include "compare.hpp"

#include <hybridattn/attention/gdn/gdn.hpp>
#include <hybridattn/attention/gdn/reference.hpp>
#include <hybridattn/core/random.hpp>
#include <hybridattn/nn/attention.hpp>

#include <cstring>
#include <functional>
#include <limits>
#include <vector>

namespace ha = hybridattn;
namespace gdn = ha::gdn;
using ha::Index;

static_assert(ha::ImplementedOn<ha::GDN, ha::Cpu, float>);
static_assert(ha::ImplementedOn<ha::GatedDeltaNet<ha::GdnOptions{.negative_eigenvalues = true}>, ha::Cpu, double>);

namespace {

template <class T> constexpr T not_a_number = std::numeric_limits<T>::quiet_NaN();

// A tensor with NaNs around it: a row before, a row behind, and a number or a head between the rows. No kernel may write there.
template <class T, int Rank> class Guarded {
 public:
  explicit Guarded(ha::Shape<Rank> shape) : shape_(shape), stride_(ha::View<T, Rank>(nullptr, shape).stride) {
    stride_.extent[0] += Rank > 2 ? stride_[1] : 1;
    elements_.assign(static_cast<std::size_t>((shape[0] + 2) * stride_[0]), not_a_number<T>);
  }
  ha::View<T, Rank> view() { return {elements_.data() + stride_[0], shape_, stride_}; }
  T* row(Index n) { return elements_.data() + (n + 1) * stride_[0]; }
  Index row_size() const { return shape_.count() / std::max<Index>(shape_[0], 1); }
  std::vector<T> rows(Index first, Index last) {
    std::vector<T> result;
    for (Index n = first; n < last; ++n) result.insert(result.end(), row(n), row(n) + row_size());
    return result;
  }
  std::vector<T> rows() { return rows(0, shape_[0]); }
  void fill_rows(Index first, Index last, T value) {
    for (Index n = first; n < last; ++n) std::fill_n(row(n), row_size(), value);
  }
  template <class F> void set(F value) {  // floats in every scalar, so that runs in float and in double have the same inputs
    for (Index n = 0; n < shape_[0]; ++n)
      for (Index e = 0; e < row_size(); ++e) row(n)[e] = static_cast<T>(static_cast<float>(value(n, e)));
  }
  // Whether every element was written with a number, and nothing else was written.
  bool is_filled_and_no_more() {
    auto const is_number = [](T x) { return x - x == T(0); };
    auto const written = std::count_if(elements_.begin(), elements_.end(), is_number);
    auto const inside = rows();
    return std::all_of(inside.begin(), inside.end(), is_number) && written == static_cast<std::ptrdiff_t>(inside.size());
  }

 private:
  ha::Shape<Rank> shape_, stride_;
  std::vector<T> elements_;
};

enum class Decay { none, mild, strong, total, mixed };
enum class Beta { zero, one, two, between, mixed };
enum class Keys { random, correlated, identical };
struct Problem {
  gdn::Config sizes = {};
  Decay decay = Decay::mixed;
  Beta beta = Beta::between;
  Keys keys = Keys::random;
  bool initial_state = true, final_state = true;  // d_final_state too
  bool d_o = true;
};

double log_decay(Decay kind, double strength, ha::Random& random) {
  if (kind == Decay::mixed) kind = static_cast<Decay>(random.below(4));
  if (kind == Decay::none) return 0;
  if (kind == Decay::total) return -120;
  return kind == Decay::mild ? -0.1 * random.uniform() : -strength * std::log1p(std::exp(random.normal()));
}
double draw_beta(Beta kind, ha::Random& random) {
  if (kind == Beta::mixed) kind = static_cast<Beta>(random.below(4));
  return kind == Beta::zero ? 0 : kind == Beta::one ? 1 : kind == Beta::two ? 2 : random.uniform(0, 2);
}
template <class T> void draw_heads(Guarded<T, 3>& x, char const* name, double common, bool one_direction, Index dim) {
  ha::Random random{ha::Seed{5}, name}, shared{ha::Seed{5}, "shared"};
  std::vector<double> direction(static_cast<std::size_t>(x.row_size()));
  for (double& entry : direction) entry = shared.normal();
  x.set([&](Index, Index e) { return (one_direction ? 0 : random.normal()) + common * direction[static_cast<std::size_t>(e)]; });
  for (Index n = 0; n < x.view().extent(0); ++n)
    for (Index h = 0; h < x.view().extent(1); ++h) {
      T* const head = x.row(n) + h * dim;
      T const length = std::sqrt(ha::dot(head, head, dim));
      for (Index d = 0; d < dim; ++d) head[d] = static_cast<T>(static_cast<float>(head[d]) / static_cast<float>(length));
    }
}

// One forward and backward.
template <class T> struct Run {
  Problem p;
  gdn::Config c;
  ha::Sequences s;
  Guarded<T, 3> q, k, v, o, error, d_o, d_q, d_k, d_v;
  Guarded<T, 2> g, beta, d_g, d_beta;
  Guarded<T, 4> initial, last, d_last, d_initial;

  Run(Problem problem, ha::Sequences sequences)
      : p(problem), c(ha::GDN::complete(problem.sizes, 0, 1)), s(std::move(sequences)), q(keys()), k(keys()), v(values()), o(values()),
        error(values()), d_o(values()), d_q(keys()), d_k(keys()), d_v(values()), g(gates()), beta(gates()), d_g(gates()), d_beta(gates()),
        initial(states()), last(states()), d_last(states()), d_initial(states()) {
    double const common = p.keys == Keys::correlated ? 2 : p.keys == Keys::identical ? 1 : 0;
    draw_heads(q, "q", 0, false, c.key_dim);
    draw_heads(k, "k", common, p.keys == Keys::identical, c.key_dim);
    ha::Random random{ha::Seed{3}, "rest"};
    auto const noise = [&](Index, Index) { return random.normal(); };
    v.set(noise), d_o.set(noise), initial.set(noise), d_last.set(noise);
    auto const strength = [&](Index h) { return 0.01 + 16 * static_cast<double>(h) / static_cast<double>(c.num_value_heads); };
    g.set([&](Index, Index h) { return log_decay(p.decay, strength(h), random); });
    beta.set([&](Index, Index) { return draw_beta(p.beta, random); });
  }
  ha::Shape<3> keys() const { return {s.tokens(), c.num_heads, c.key_dim}; }
  ha::Shape<3> values() const { return {s.tokens(), c.num_value_heads, c.value_dim}; }
  ha::Shape<2> gates() const { return {s.tokens(), c.num_value_heads}; }
  ha::Shape<4> states() const { return gdn::state_shape(c, s); }

  gdn::Inputs<ha::In<T>> x() {
    gdn::Inputs<ha::In<T>> views{.q = q.view(), .k = k.view(), .v = v.view(), .g = g.view(), .beta = beta.view(), .initial_state = {}};
    if (p.initial_state) views.initial_state = initial.view();
    return views;
  }
  gdn::Outputs<ha::Out<T>> y() {
    gdn::Outputs<ha::Out<T>> views{.o = o.view(), .final_state = {}};
    if (p.final_state) views.final_state = last.view();
    return views;
  }
  gdn::Outputs<ha::In<T>> d_y() {
    gdn::Outputs<ha::In<T>> views;
    if (p.d_o) views.o = d_o.view();
    if (p.final_state) views.final_state = d_last.view();
    return views;
  }
  gdn::Inputs<ha::Out<T>> d_x() {
    gdn::Inputs<ha::Out<T>> views{
        .q = d_q.view(), .k = d_k.view(), .v = d_v.view(), .g = d_g.view(), .beta = d_beta.view(), .initial_state = {}};
    if (p.initial_state) views.initial_state = d_initial.view();
    return views;
  }
  void forward(ha::Cpu& cpu) { ha::On<ha::GDN, ha::Cpu>::forward<T>(cpu, c, s, x(), y(), {.error = error.view()}); }
  void backward(ha::Cpu& cpu) { ha::On<ha::GDN, ha::Cpu>::backward<T>(cpu, c, s, x(), ha::in(y()), {.error = error.view()}, d_y(), d_x()); }
  void by_reference() {
    gdn::reference::forward<T>(c, s, x(), y(), {.error = error.view()});
    gdn::reference::backward<T>(c, s, x(), ha::in(y()), {.error = error.view()}, d_y(), d_x());
  }
  // The outputs and gradients of tokens first .. end.
  std::vector<std::vector<T>> outputs(Index first, Index end) { return {o.rows(first, end), error.rows(first, end)}; }
  std::vector<std::vector<T>> gradients(Index first, Index end) {
    return {d_q.rows(first, end), d_k.rows(first, end), d_v.rows(first, end), d_g.rows(first, end), d_beta.rows(first, end)};
  }
  std::vector<std::vector<T>> everything() {
    auto all = outputs(0, s.tokens());
    for (auto& gradient : gradients(0, s.tokens())) all.push_back(gradient);
    if (p.final_state) all.push_back(last.rows());
    if (p.initial_state) all.push_back(d_initial.rows());
    return all;
  }
  bool is_filled_and_no_more() {
    bool filled = d_g.is_filled_and_no_more() && d_beta.is_filled_and_no_more();
    for (auto* x : {&o, &error, &d_q, &d_k, &d_v}) filled &= x->is_filled_and_no_more();
    if (p.final_state) filled &= last.is_filled_and_no_more();
    if (p.initial_state) filled &= d_initial.is_filled_and_no_more();
    return filled;
  }
};
template <class T> Run<T> computed(ha::Cpu& cpu, Run<T> run) {
  run.forward(cpu);
  run.backward(cpu);
  return run;
}

std::vector<Index> const all_lengths{1, 0, 2, 3, 63, 64, 65, 130, 0};

// Compares a run with the loops in double. In float the error may be twice that of the loops in float. With like keys, tokens reflect the
// state again and again: what a token rounds reaches all later ones, and adds up as a random walk does, or by an eps for each token where
// beta is 2 and all keys are one.
template <class T> void check_values(ha::Cpu& cpu, Problem const& problem, ha::Sequences const& s) {
  auto result = computed(cpu, Run<T>(problem, s));
  Run<T> naive(problem, s);
  Run<double> truth(problem, s);
  naive.by_reference();
  truth.by_reference();
  CHECK(result.is_filled_and_no_more());
  char const* const names[] = {"o", "error", "d_q", "d_k", "d_v", "d_g", "d_beta", "final_state or d_initial_state", "d_initial_state"};
  auto const results = result.everything(), loops = naive.everything();
  auto const truths = truth.everything();
  double const longest = static_cast<double>(s.longest());
  bool const reflects_all = problem.beta == Beta::two && problem.keys == Keys::identical;
  double const drift = reflects_all ? longest : problem.keys == Keys::random ? 0 : std::sqrt(longest);
  for (std::size_t i = 0; i < truths.size(); ++i) {
    INFO(names[i] << ", K " << problem.sizes.key_dim << ", V " << problem.sizes.value_dim << ", heads " << problem.sizes.num_value_heads
                  << ", decay " << static_cast<int>(problem.decay) << ", beta " << static_cast<int>(problem.beta) << ", keys "
                  << static_cast<int>(problem.keys));
    double const error = max_error(results[i], truths[i]), size = max_abs(truths[i]), eps = std::numeric_limits<T>::epsilon();
    if (sizeof(T) == sizeof(double)) CHECK(error <= 1e-10 * std::max(size, 1e-3));
    else CHECK(error <= 2 * max_error(loops[i], truths[i]) + (4 + drift) * eps * size);
  }
}

template <class T> std::vector<double> doubles(std::vector<T> const& x) { return {x.begin(), x.end()}; }
gdn::Config sizes(Index K, Index V, Index heads = 1, Index value_heads = 1) {
  return {.num_heads = heads, .num_value_heads = value_heads, .key_dim = K, .value_dim = V};
}

}  // namespace

TEMPLATE_TEST_CASE("gated delta rule: every size gives the values of the loops and fills its outputs, no more", "", float, double) {
  ha::Cpu cpu{2};
  struct Dims {
    Index K, V;
  };
  for (Dims d : {Dims{64, 32}, {16, 16}, {8, 16}, {12, 24}, {1, 3}, {40, 96}})   // the laws judge other sizes
    check_values<TestType>(cpu, {.sizes = sizes(d.K, d.V, 2, 4)}, packed(all_lengths));
  check_values<TestType>(cpu, {.sizes = sizes(160, 48, 1, 3)}, packed({65}));
  check_values<TestType>(cpu, {.sizes = sizes(256, 256)}, packed({65, 3}));
}

TEMPLATE_TEST_CASE("gated delta rule: any decay, any beta and any keys", "", float, double) {
  ha::Cpu cpu{2};
  for (Decay decay : {Decay::none, Decay::mild, Decay::strong, Decay::total, Decay::mixed})
    for (Beta beta : {Beta::zero, Beta::one, Beta::two, Beta::between, Beta::mixed})
      for (Keys keys : {Keys::random, Keys::correlated, Keys::identical})
        check_values<TestType>(cpu, {.sizes = sizes(32, 24, 1, 2), .decay = decay, .beta = beta, .keys = keys}, packed({130, 2}));
}

TEMPLATE_TEST_CASE("gated delta rule: states may be there or not, in any combination", "", float, double) {
  ha::Cpu cpu{2};
  for (bool initial : {false, true})
    for (bool last : {false, true})
      check_values<TestType>(cpu, {.sizes = sizes(32, 32, 1, 2), .initial_state = initial, .final_state = last}, packed(all_lengths));

  Run<TestType> zeros({.sizes = sizes(32, 32)}, packed({70, 0}));
  zeros.initial.fill_rows(0, 2, 0);
  zeros.d_last.fill_rows(0, 2, 0);
  Problem const stateless{.sizes = sizes(32, 32), .initial_state = false, .final_state = false};
  auto with = computed(cpu, zeros), without = computed(cpu, Run<TestType>(stateless, packed({70, 0})));
  with.p.initial_state = with.p.final_state = false;
  CHECK(without.last.rows()[0] != without.last.rows()[0]);
  for (std::size_t i = 0; i < with.everything().size(); ++i) CHECK(with.everything()[i] == without.everything()[i]);
}

TEMPLATE_TEST_CASE("gated delta rule: where no gradient of o is given it is zero, bitwise", "", float, double) {
  ha::Cpu cpu{2};
  for (gdn::Config const& c : {sizes(32, 32, 1, 2), sizes(12, 20, 2, 4), sizes(64, 96)})
    for (bool last : {false, true}) {
      auto const s = packed(all_lengths);
      Problem const problem{.sizes = c, .final_state = last, .d_o = false};
      Run<TestType> zeros(problem, s);
      zeros.p.d_o = true;
      zeros.d_o.fill_rows(0, s.tokens(), 0);
      auto with = computed(cpu, zeros), without = computed(cpu, Run<TestType>(problem, s));
      CHECK(same_bits(with.everything(), without.everything()));
      CHECK((max_abs(doubles(without.d_k.rows())) > 0) == last);
      check_values<TestType>(cpu, problem, s);
      for (auto const& lengths : {std::vector<Index>{}, {0}, {0, 0}, {1}}) check_values<TestType>(cpu, problem, packed(lengths));
    }
}

TEMPLATE_TEST_CASE("gated delta rule: an empty sequence passes its states on", "", float, double) {
  ha::Cpu cpu{1};
  auto run = computed(cpu, Run<TestType>({.sizes = sizes(12, 24, 1, 2)}, packed({0, 5})));
  CHECK(run.last.rows(0, 1) == run.initial.rows(0, 1));
  CHECK(run.d_initial.rows(0, 1) == run.d_last.rows(0, 1));
  Run<TestType> none({.sizes = sizes(12, 24), .initial_state = false}, packed({0}));
  none.forward(cpu);
  CHECK(none.last.rows() == std::vector<TestType>(12 * 24));
}

TEMPLATE_TEST_CASE("gated delta rule: inference without a place for the error gives the same outputs, bitwise", "", float, double) {
  ha::Cpu cpu{1};
  Run<TestType> run({.sizes = sizes(32, 40)}, packed({67, 4}));
  run.forward(cpu);
  auto const o = run.o.rows(), last = run.last.rows();
  ha::On<ha::GDN, ha::Cpu>::forward<TestType>(cpu, run.c, run.s, run.x(), run.y(), gdn::Saved<ha::Out<TestType>>{});
  CHECK(same_bits<TestType>({o, last}, {run.o.rows(), run.last.rows()}));
}

namespace {

// The errors of the gradients of one head's decays. `length` is the relative L2 error. `sum` is |sum g (d_g - truth)| / sum |g truth|,
// the error that reaches a_log.
struct DecayErrors {
  double length, sum;
};
DecayErrors decay_errors(std::vector<double> const& g, std::vector<double> const& d_g, std::vector<double> const& truth, Index heads,
                         Index h) {
  double error = 0, size = 0, sum = 0, sizes = 0;
  for (auto t = static_cast<std::size_t>(h); t < g.size(); t += static_cast<std::size_t>(heads)) {
    error += std::pow(d_g[t] - truth[t], 2), size += truth[t] * truth[t];
    sum += g[t] * (d_g[t] - truth[t]), sizes += std::abs(g[t] * truth[t]);
  }
  return {std::sqrt(error / size), sizes == 0 ? 0 : std::abs(sum) / sizes};
}
struct Gate {
  char const* name;
  std::function<double(Index t, ha::Random&)> draw;
};
std::vector<Gate> strong_gates() {
  std::vector<Gate> gates;
  auto const alike = [&](char const* name, double g) { gates.push_back({name, [g](Index, ha::Random&) { return g; }}); };
  alike("0", 0), alike("-.05", -0.05), alike("-1", -1), alike("-4", -4), alike("-10", -10), alike("-25", -25), alike("-60", -60);
  gates.push_back({"-25 or -.05", [](Index, ha::Random& random) { return random.below(2) == 0 ? -25 : -0.05; }});
  gates.push_back({"runs of 32", [](Index t, ha::Random&) { return t / 32 % 2 == 0 ? -25 : -0.05; }});
  gates.push_back({"one -80 in 64, else -.05", [](Index t, ha::Random&) { return t % 64 == 37 ? -80 : -0.05; }});
  gates.push_back({"one -80 in 64, else 0", [](Index t, ha::Random&) { return t % 64 == 37 ? -80 : 0; }});
  return gates;
}
template <class T> Run<T> with_gate(Problem const& problem, Index length, Gate const& gate) {
  Run<T> run(problem, packed({length}));
  ha::Random random{ha::Seed{9}, gate.name};
  run.g.set([&](Index t, Index) { return gate.draw(t, random); });
  return run;
}
template <class T> void check_decays(ha::Cpu& cpu, Problem const& problem, Index length, Gate const& gate, double allowed) {
  auto result = computed(cpu, with_gate<T>(problem, length, gate));
  auto truth = with_gate<double>(problem, length, gate);
  truth.by_reference();
  for (Index h = 0; h < result.c.num_value_heads; ++h) {
    auto const errors = decay_errors(doubles(result.g.rows()), doubles(result.d_g.rows()), truth.d_g.rows(), result.c.num_value_heads, h);
    INFO("g " << gate.name << ", " << length << " tokens, head " << h << ", states " << problem.initial_state);
    CHECK(errors.length <= allowed);
    CHECK(errors.sum <= allowed);
  }
}

}  // namespace

// With Euler's relation instead of equation (7), the error would be 2e-3 at g = -5, and 1e20 at g = -60.
TEST_CASE("gated delta rule: the gradient of a decay is right in every head, however strong the decay") {
  ha::Cpu cpu{2};
  for (Gate const& gate : strong_gates())
    for (Index length : {130, 2048})
      for (bool states : {false, true}) {
        if (length == 2048 && !states) continue;
        Problem const problem{.sizes = sizes(32, 32, 1, 2), .initial_state = states, .final_state = states};
        check_decays<float>(cpu, problem, length, gate, 1e-5);
        if (length == 130) check_decays<double>(cpu, problem, length, gate, 1e-13);
      }
}

namespace {

// d_a_log and d_dt_bias of a layer, for an upstream gradient of size 1.
template <class T> std::vector<double> gate_gradients(gdn::GateStart start) {
  using Layer = ha::Attention<ha::GDN>;
  ha::Cpu cpu{2};
  gdn::Config const c = ha::GDN::complete({.gate_start = start}, 64, 8);
  auto const s = ha::Sequences::equal(2, 256);
  auto p = ha::allocate<T>(cpu, Layer::params(c, 64)), d_p = ha::allocate<T>(cpu, Layer::params(c, 64));
  ha::zip(
      [](ha::Path const& path, ha::Initial const& start_of, auto& tensor) {
        ha::Random random{ha::Seed{1}, path.str()};
        for (Index i = 0; i < out(tensor).count(); ++i) out(tensor).data[i] = static_cast<T>(static_cast<float>(start_of.draw(random)));
      },
      Layer::starts(c, 64, {}), p);
  auto const noise = [&](char const* name) {
    ha::Tensor<T, 2, ha::Cpu> tensor{cpu, {s.tokens(), 64}};
    ha::Random random{ha::Seed{1}, name};
    for (Index i = 0; i < out(tensor).count(); ++i) out(tensor).data[i] = static_cast<T>(static_cast<float>(random.normal()));
    return tensor;
  };
  auto const x = noise("x"), d_y = noise("d_y");
  Layer::Saved<ha::Owned<T, ha::Cpu>> saved;
  ha::SequencesOn<ha::Cpu> const on_cpu{cpu, s};
  Layer::forward(cpu, c, on_cpu, in(p), in(x), saved);
  Layer::backward(cpu, c, on_cpu, in(p), in(x), std::move(saved), in(d_y), out(d_p));
  auto result = doubles(ha::download(cpu, d_p.prepare.a_log));
  for (T d : ha::download(cpu, d_p.prepare.dt_bias)) result.push_back(static_cast<double>(d));
  return result;
}

}  // namespace

TEST_CASE("gated delta rule: the gates' parameters in a layer have in float the gradients they have in double") {
  for (auto start : {gdn::GateStart::fla, gdn::GateStart::transformers}) {
    auto const exact = gate_gradients<double>(start), rounded = gate_gradients<float>(start);
    REQUIRE(exact.size() == 16);
    for (std::size_t i = 0; i < exact.size(); ++i) {
      INFO((i < 8 ? "a_log" : "dt_bias") << " of head " << i % 8 << ", start " << static_cast<int>(start));
      CHECK(std::abs(rounded[i] - exact[i]) <= 1e-4 * std::abs(exact[i]));
    }
  }
}

TEMPLATE_TEST_CASE("gated delta rule: steps give what the whole sequence gives, with every size", "", float, double) {
  ha::Cpu cpu{2};
  Index const T = 20, B = 3;
  struct Dims {
    Index K, V;
  };
  for (Dims d : {Dims{32, 32}, {64, 128}, {12, 24}, {5, 3}, {16, 77}}) {
    Run<TestType> whole({.sizes = sizes(d.K, d.V, 2, 4), .beta = Beta::mixed}, ha::Sequences::equal(B, T));
    whole.forward(cpu);
    Run<double> truth(whole.p, whole.s);
    truth.by_reference();
    Guarded<TestType, 4> state = whole.initial;
    Guarded<TestType, 3> o(whole.values());
    for (Index t = 0; t < T; ++t) {
      auto const tokens_at = [&](auto view) {   // token t of every sequence
        view.data += t * view.stride[0];
        view.shape.extent[0] = B, view.stride.extent[0] *= T;
        return view;
      };
      auto const x = whole.x();
      gdn::step<TestType>(cpu, whole.c, {tokens_at(x.q), tokens_at(x.k), tokens_at(x.v), tokens_at(x.g), tokens_at(x.beta), {}},
                          state.view(), tokens_at(o.view()));
    }
    double const eps = std::numeric_limits<TestType>::epsilon();
    auto const check_near = [&](std::vector<TestType> const& x, std::vector<TestType> const& y, std::vector<double> const& true_values) {
      CHECK(max_error(x, true_values) <= 2 * max_error(y, true_values) + 4 * eps * max_abs(true_values));
    };
    check_near(o.rows(), whole.o.rows(), truth.o.rows());
    check_near(state.rows(), whole.last.rows(), truth.last.rows());
    CHECK(o.is_filled_and_no_more());
    CHECK(state.is_filled_and_no_more());
  }
}

namespace {

// A place for a bad value: one number of head 3 (of head 1 in q and k) at token t of the second sequence, or of its states.
enum class Place { q, k, v, g, beta, initial, d_o, d_last };
constexpr Place all_places[] = {Place::q, Place::k, Place::v, Place::g, Place::beta, Place::initial, Place::d_o, Place::d_last};
template <class T> Run<T> with_bad_value(Run<T> run, Place place, Index t, T value) {
  Index const K = run.c.key_dim, V = run.c.value_dim;
  if (place == Place::q) run.q.row(t)[K + K / 2] = value;
  if (place == Place::k) run.k.row(t)[K + K / 2] = value;
  if (place == Place::v) run.v.row(t)[3 * V + V / 2] = value;
  if (place == Place::g) run.g.row(t)[3] = value;
  if (place == Place::beta) run.beta.row(t)[3] = value;
  if (place == Place::initial) run.initial.row(1)[3 * K * V + V / 2] = value;
  if (place == Place::d_o) run.d_o.row(t)[3 * V + V / 2] = value;
  if (place == Place::d_last) run.d_last.row(1)[3 * K * V + V / 2] = value;
  return run;
}
template <class T> bool same_number(T a, T b) { return std::memcmp(&a, &b, sizeof(T)) == 0; }
// Results of a run without and with the bad value. The kernel must be NaN or infinite exactly where the loops are. In tensors for which
// keeps_bits(tensor) holds, elements that the value does not change in the loops must keep their bits in the kernel.
template <class T> struct WithAndWithout {
  std::vector<std::vector<T>> without, with;
};
template <class T, class Keeps>
void check_spread(WithAndWithout<T> const& kernel, WithAndWithout<T> const& loops, bool same_places, Keeps keeps_bits) {
  for (std::size_t i = 0; i < kernel.with.size(); ++i) {
    Index other_place = 0, changed = 0;
    for (std::size_t e = 0; e < kernel.with[i].size(); ++e) {
      other_place += std::isfinite(kernel.with[i][e]) != std::isfinite(loops.with[i][e]);
      changed += same_number(loops.with[i][e], loops.without[i][e]) && !same_number(kernel.with[i][e], kernel.without[i][e]);
    }
    INFO("result " << i);
    if (same_places) CHECK(other_place == 0);
    if (keeps_bits(i)) CHECK(changed == 0);
  }
}
template <class T> struct BadValue {
  T value;
  bool same_places = true;   // false if a result may overflow in one order of its sums and not in another
  bool keeps_bits = true;    // false if the value is so small that it may change nothing in the loops by luck
};
template <class T> std::vector<BadValue<T>> bad_values(Place place) {
  using Limits = std::numeric_limits<T>;
  bool const meets_itself = place == Place::k || place == Place::beta;
  return {{Limits::quiet_NaN()},
          {Limits::infinity()},
          {-Limits::infinity()},
          {Limits::max() / 64, !meets_itself},
          {-Limits::max() / 64, !meets_itself},
          {Limits::max() / 3, false},
          {Limits::denorm_min(), true, false}};
}

}  // namespace

// d_g of a token is a difference of sums over later tokens, in which a bad v changes the last bits. So for v its bits are not compared.
TEMPLATE_TEST_CASE("gated delta rule: NaN, infinite and huge numbers reach what they reach in the loops, and nothing else", "", float,
                   double) {
  ha::Cpu cpu{1};
  constexpr std::size_t d_g = 5;
  Run<TestType> const clean({.sizes = sizes(12, 20, 2, 4), .decay = Decay::mild}, packed({5, 70, 3}));
  auto const by_loops = [](Run<TestType> run) { return run.by_reference(), run.everything(); };
  auto const kernel = computed(cpu, clean).everything(), loops = by_loops(clean);
  for (Place place : all_places)
    for (BadValue<TestType> const& bad : bad_values<TestType>(place))
      for (Index t : {5, 7, 40, 71, 74}) {
        INFO("place " << static_cast<int>(place) << ", value " << bad.value << ", token " << t);
        auto const run = with_bad_value(clean, place, t, bad.value);
        check_spread<TestType>({kernel, computed(cpu, run).everything()}, {loops, by_loops(run)}, bad.same_places,
                               [&](std::size_t result) { return bad.keeps_bits && (result != d_g || place != Place::v); });
      }
}

TEMPLATE_TEST_CASE("gated delta rule: decoding spreads NaN, infinite and huge numbers as the loops do", "", float, double) {
  ha::Cpu cpu{1};
  for (Index length : {1, 7}) {   // one token takes the kernel for a step, more tokens take that of forward
    Run<TestType> const clean({.sizes = sizes(12, 20, 2, 4), .decay = Decay::mild}, packed(std::vector<Index>(3, length)));
    std::vector<Index> const past(3, 1), lengths(3, length);
    auto const s = ha::Sequences::continuing(past, lengths);
    auto const extended = [&](Run<TestType> run) {
      gdn::extend<TestType>(cpu, run.c, s, run.x(), run.initial.view(), run.o.view());
      return std::vector{run.o.rows(), run.initial.rows()};
    };
    auto const by_loops = [](Run<TestType> run) {
      gdn::reference::forward<TestType>(run.c, run.s, run.x(), run.y(), {.error = run.error.view()});
      return std::vector{run.o.rows(), run.last.rows()};
    };
    for (Place place : {Place::q, Place::k, Place::v, Place::g, Place::beta, Place::initial})
      for (BadValue<TestType> const& bad : bad_values<TestType>(place)) {
        INFO("place " << static_cast<int>(place) << ", value " << bad.value << ", tokens " << length);
        auto const run = with_bad_value(clean, place, length + length / 2, bad.value);
        check_spread<TestType>({extended(clean), extended(run)}, {by_loops(clean), by_loops(run)}, bad.same_places,
                               [&](std::size_t) { return bad.keeps_bits; });
      }
  }
}
