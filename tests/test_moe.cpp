// Experts as one operation, and their balancing loss. The host waits for no number of them.
#include "catch.hpp"
#include "compare.hpp"

#include <hybridattn/attention/gdn/gdn.hpp>
#include <hybridattn/core/random.hpp>
#include <hybridattn/nn/language_model.hpp>
#include <hybridattn/testing/fake.hpp>

#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

namespace ha = hybridattn;
using ha::Index;
using ha::View;

namespace {

template <class Op> using On = ha::On<Op, ha::Cpu>;

template <class T> std::vector<T> noise(Index count, char const* name) {
  ha::Random random{ha::Seed{13}, name};
  std::vector<T> x(static_cast<std::size_t>(count));
  for (T& element : x) element = static_cast<T>(random.normal());
  return x;
}
template <class T> std::vector<T> unwritten(std::size_t count) { return std::vector<T>(count, std::numeric_limits<T>::quiet_NaN()); }
template <class T> View<T, 2> rows(std::vector<T>& x, Index columns, Index first, Index last) {
  return {x.data() + first * columns, {last - first, columns}};
}
template <class T> View<T const, 2> rows(std::vector<T> const& x, Index columns, Index first, Index last) {
  return {x.data() + first * columns, {last - first, columns}};
}

// Experts, each with its own number of rows.
template <class T> struct Experts {
  Index C, F, E, R;
  std::vector<std::int32_t> offsets{0};
  std::vector<T> x, w, d_y, d_x_before;

  Experts(std::vector<Index> const& counts, Index columns, Index features) : C(columns), F(features), E(std::ssize(counts)) {
    for (Index count : counts) offsets.push_back(offsets.back() + static_cast<std::int32_t>(count));
    R = offsets.back();
    x = noise<T>(R * C, "x"), w = noise<T>(E * F * C, "w"), d_y = noise<T>(R * F, "d_y"), d_x_before = noise<T>(R * C, "d_x");
  }
  View<std::int32_t const, 1> starts() const { return {offsets.data(), {E + 1}}; }
  View<T const, 3> matrices() const { return {w.data(), {E, F, C}}; }

  std::vector<T> forward(ha::Cpu& cpu) const {
    auto y = unwritten<T>(d_y.size());
    On<ha::GroupedLinear>::forward(cpu, starts(), rows(x, C, 0, R), matrices(), rows(y, F, 0, R));
    return y;
  }
  // y, d_x, d_w
  std::vector<std::vector<T>> results(ha::Cpu& cpu) const {
    auto d_x = d_x_before, d_w = unwritten<T>(w.size());
    On<ha::GroupedLinear>::backward(cpu, starts(), rows(x, C, 0, R), matrices(), rows(d_y, F, 0, R), rows(d_x, C, 0, R),
                                    View<T, 3>{d_w.data(), {E, F, C}}, ha::Into::add);
    return {forward(cpu), d_x, d_w};
  }
  std::vector<std::vector<T>> one_by_one(ha::Cpu& cpu) const {
    auto y = unwritten<T>(d_y.size()), d_x = d_x_before, d_w = unwritten<T>(w.size());
    for (Index e = 0; e < E; ++e) {
      Index const first = offsets[static_cast<std::size_t>(e)], last = offsets[static_cast<std::size_t>(e) + 1];
      auto const matrix = rows(w, C, e * F, (e + 1) * F);
      On<ha::Linear>::forward(cpu, rows(x, C, first, last), matrix, rows(y, F, first, last));
      On<ha::Linear>::backward(cpu, rows(x, C, first, last), matrix, rows(d_y, F, first, last), rows(d_x, C, first, last),
                               rows(d_w, C, e * F, (e + 1) * F), ha::Into::add);
    }
    return {y, d_x, d_w};
  }
};

std::vector<std::vector<Index>> const row_counts = {{0, 3, 5}, {3, 0, 5},         {5, 3, 0},       {0, 0, 140, 0},
                                                    {9},       {0, 1, 300, 0, 2}, {256, 257, 255}, {0, 0, 0}};

}  // namespace

TEMPLATE_TEST_CASE("experts as one operation have the bits of a Linear for each, on any number of threads", "", float, double) {
  ha::Cpu one{1}, two{2}, three{3};
  for (auto const& counts : row_counts)
    for (auto const& [C, F] : {std::pair<Index, Index>{1, 1}, {7, 33}, {40, 270}, {270, 5}}) {
      INFO("experts " << counts.size() << ", the first has " << counts[0] << " rows; C " << C << ", F " << F);
      Experts<TestType> const experts{counts, C, F};
      auto const expected = experts.one_by_one(one);
      for (ha::Cpu* cpu : {&one, &two, &three}) CHECK(same_bits(experts.results(*cpu), expected));
    }
}

namespace {

// The choices of experts in one or several layers, and their balancing loss by loops.
struct Choices {
  static constexpr Index E = 21, N = 37;   // more experts than a task has
  std::vector<double> probabilities;
  std::vector<std::int32_t> offsets;

  explicit Choices(char const* name) : probabilities(noise<double>(N * E, name)), offsets(static_cast<std::size_t>(E + 1)) {
    for (double& p : probabilities) p = std::abs(p);
    for (Index e = 0; e <= E; ++e) offsets[static_cast<std::size_t>(e)] = static_cast<std::int32_t>(e * e % 7 + 4 * e);
    offsets[0] = 0;
  }
  void count(ha::Cpu& cpu, std::vector<double>& sums) const {
    On<ha::ExpertUse>::forward(cpu, View<std::int32_t const, 1>{offsets.data(), {E + 1}}, rows(probabilities, E, 0, N),
                               rows(sums, E, 0, 2));
  }
};
double balance_by_loops(double coefficient, std::vector<Choices> const& layers) {
  double const tokens = static_cast<double>(layers.size()) * Choices::N, E = Choices::E;
  double loss = 0;
  for (std::size_t e = 0; e < std::size_t{Choices::E}; ++e) {
    double chosen = 0, probability = 0;
    for (Choices const& layer : layers) {
      chosen += layer.offsets[e + 1] - layer.offsets[e];
      for (std::size_t n = 0; n < std::size_t{Choices::N}; ++n) probability += layer.probabilities[n * std::size_t{Choices::E} + e];
    }
    loss += chosen / tokens * probability / tokens;
  }
  return coefficient * E * loss;
}

}  // namespace

TEST_CASE("a balancing loss over one layer or several is that of loops, and is added") {
  ha::Cpu cpu{2};
  std::vector<Choices> layers;
  for (char const* name : {"first", "second", "third"}) {
    layers.push_back(Choices{name});
    std::vector<double> sums(2 * Choices::E);
    for (Choices const& layer : layers) layer.count(cpu, sums);
    Index const tokens = std::ssize(layers) * Choices::N;
    double value = 100;
    View<double const, 2> const read = rows(std::as_const(sums), Choices::E, 0, 2);
    On<ha::BalanceLoss>::forward(cpu, 0.3, tokens, read, View<double, 1>{&value, {1}});
    CHECK(value == Approx(100 + balance_by_loops(0.3, layers)).epsilon(1e-14));
  }
}

TEST_CASE("without tokens a balancing loss and its gradient are 0") {
  ha::Cpu cpu{1};
  double const sums[] = {0, 0, 0, 0};
  double value = 7;
  auto slopes = unwritten<double>(2);
  On<ha::BalanceLoss>::forward(cpu, 0.3, 0, View<double const, 2>{sums, {2, 2}}, View<double, 1>{&value, {1}});
  On<ha::BalanceLoss>::backward(cpu, 0.3, 0, View<double const, 2>{sums, {2, 2}}, 1.0, View<double, 1>{slopes.data(), {2}});
  CHECK(value == 7);
  CHECK(slopes == std::vector<double>(2));
}

namespace {

// The paths of tensors that hold a NaN or an infinity.
template <class Group> std::string not_finite(ha::Cpu& cpu, Group const& group) {
  std::string paths;
  ha::zip(
      [&]<class T, int Rank>(ha::Path const& path, ha::Tensor<T, Rank, ha::Cpu> const& tensor) {
        if constexpr (std::is_same_v<T, float>)
          if (!ha::On<ha::AllFinite, ha::Cpu>::forward(cpu, flat(in(tensor)))) paths += path.str() + " ";
      },
      group);
  return paths;
}
template <class T, int Rank> void set(ha::Tensor<T, Rank, ha::Cpu>& tensor, float scale, ha::Random& random) {
  for (T& x : std::span(out(tensor).data, static_cast<std::size_t>(out(tensor).count())))
    x = static_cast<T>(std::is_same_v<T, float> ? scale * static_cast<float>(random.normal()) : -1);
}
// A group of tensors of small numbers, or of NaN.
template <template <class> class G> G<ha::Owned<float, ha::Cpu>> filled(ha::Cpu& cpu, G<ha::Shapes> const& shapes, float scale) {
  auto group = ha::allocate<float>(cpu, shapes);
  ha::Random random{ha::Seed{3}, "group"};
  ha::zip([&](ha::Path const&, auto& tensor) { set(tensor, scale, random); }, group);
  return group;
}
constexpr float not_a_number = std::numeric_limits<float>::quiet_NaN();

}  // namespace

TEST_CASE("a mixture whose experts have no tokens has gradients for all of them, and a shared expert may be nothing but its gate") {
  for (Index shared_dim : {-1, 0, 5})
    for (bool gated : {false, true})
      for (Index N : {1, 9}) {
        INFO(shared_dim << " " << gated << " " << N);
        ha::Cpu cpu{2};
        ha::FeedForwardConfig const c =
            ha::FeedForwardConfig{.hidden_dim = 6, .gated = gated, .num_experts = 4, .top_k = 1, .shared_dim = shared_dim}.completed(8);
        auto const shapes = ha::FeedForward::params(c, 0, 8);
        for (float scale : {not_a_number, 1.0f}) {   // the first run leaves NaN in memory
          auto params = filled(cpu, shapes, scale), gradients = filled(cpu, shapes, not_a_number);
          ha::On<ha::Fill, ha::Cpu>::forward(cpu, 0.0f, flat(out(params.router)));   // every token goes to expert 0
          ha::Tensor<float, 2, ha::Cpu> x{cpu, {N, 8}}, d_y{cpu, {N, 8}};
          ha::Random random{ha::Seed{5}, "x"};
          set(x, scale, random);
          set(d_y, scale, random);
          ha::FeedForward::Saved<ha::Owned<float, ha::Cpu>> saved;
          auto const y = ha::FeedForward::forward<ha::Cpu, float>(cpu, c, 0, in(params), in(x), saved);
          auto const finite = not_finite(cpu, saved);
          auto const d_x =
              ha::FeedForward::backward<ha::Cpu, float>(cpu, c, 0, in(params), in(x), std::move(saved), in(d_y), out(gradients));
          if (std::isnan(scale)) continue;
          CHECK(finite == "");
          CHECK(not_finite(cpu, gradients) == "");
          for (auto const* tensor : {&y, &d_x}) CHECK(ha::On<ha::AllFinite, ha::Cpu>::forward(cpu, flat(in(*tensor))));
          auto const d_down = download(cpu, gradients.experts.down);
          CHECK(std::any_of(d_down.begin(), d_down.begin() + 48, [](float v) { return v != 0; }));
          CHECK(std::all_of(d_down.begin() + 48, d_down.end(), [](float v) { return v == 0; }));
        }
      }
}
