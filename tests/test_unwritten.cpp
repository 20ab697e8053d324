// Every result is written, whatever the arguments: a scale of 0, nothing to count, no rows, an expert without tokens, sequences
// without tokens. Results start as NaN, and scratch memory holds what a run on NaN left.
#include "catch.hpp"
#include "compare.hpp"

#include <hybridattn/attention/attention.hpp>
#include <hybridattn/nn/feed_forward.hpp>
#include <hybridattn/ops/adamw/adamw.hpp>
#include <hybridattn/ops/cross_entropy/cross_entropy.hpp>
#include <hybridattn/ops/embedding/embedding.hpp>
#include <hybridattn/ops/layer_norm/layer_norm.hpp>

#include <cmath>
#include <deque>
#include <functional>
#include <string>

namespace ha = hybridattn;
using ha::Index;
using ha::Into;
using ha::Shape;
using ha::View;

namespace {

template <class Op> using On = ha::On<Op, ha::Cpu>;
using Whole = std::vector<std::int32_t>;

// Operands of one run: inputs are small numbers, or all NaN; results start as NaN, or as 0 where an operation adds to them.
class Run {
 public:
  Run(ha::Cpu& cpu, bool on_nan) : cpu_(cpu), on_nan_(on_nan) {}

  ha::Cpu& cpu() { return cpu_; }
  template <int Rank> View<float const, Rank> input(Shape<Rank> shape, float scale = 1) {
    float* const data = block(shape.count(), 0);
    for (Index i = 0; i < shape.count(); ++i) data[i] = on_nan_ ? std::nanf("") : scale * static_cast<float>(random_.normal());
    return {data, shape};
  }
  template <class... Extents> View<float const, sizeof...(Extents)> in(Extents... extents) {
    return input(Shape<sizeof...(Extents)>{Index{extents}...});
  }
  template <class... Extents> View<float, sizeof...(Extents)> out(Extents... extents) {
    return result(Shape<sizeof...(Extents)>{Index{extents}...}, std::nanf(""));
  }
  template <class... Extents> View<float, sizeof...(Extents)> sum(Extents... extents) {
    return result(Shape<sizeof...(Extents)>{Index{extents}...}, 0);
  }
  View<std::int32_t const, 1> whole(Whole const& values) {
    wholes_.push_back(values);
    return {wholes_.back().data(), {std::ssize(values)}};
  }
  template <int Rank> View<std::int32_t, Rank> whole_out(Shape<Rank> shape) {
    wholes_.emplace_back(static_cast<std::size_t>(shape.count()), unwritten);
    written_.push_back(wholes_.size() - 1);
    return {wholes_.back().data(), shape};
  }
  // The number of the first result that is not finite; -1 if there is none. Whether all are 0.
  int first_unwritten() const {
    int number = 0;
    for (auto const& [data, count] : results_) {
      for (Index i = 0; i < count; ++i)
        if (!std::isfinite(data[i])) return number;
      ++number;
    }
    for (std::size_t i : written_) {
      if (std::ranges::count(wholes_[i], unwritten) > 0) return number;
      ++number;
    }
    return -1;
  }
  bool all_zero() const {
    return std::ranges::all_of(results_,
                               [](auto const& x) { return std::all_of(x.data, x.data + x.count, [](float v) { return v == 0; }); });
  }

 private:
  static constexpr std::int32_t unwritten = -77;
  struct Result {
    float* data;
    Index count;
  };
  // As a tensor: nothing is no memory.
  float* block(Index count, float value) {
    blocks_.emplace_back(static_cast<std::size_t>(count), value);
    return count == 0 ? nullptr : blocks_.back().data();
  }
  template <int Rank> View<float, Rank> result(Shape<Rank> shape, float value) {
    float* const data = block(shape.count(), value);
    results_.push_back({data, shape.count()});
    return {data, shape};
  }

  ha::Cpu& cpu_;
  bool on_nan_;
  ha::Random random_{ha::Seed{1}, "operands"};
  std::deque<std::vector<float>> blocks_;
  std::deque<Whole> wholes_;
  std::vector<Result> results_;
  std::vector<std::size_t> written_;
};

// An operation with arguments at some edge; whether its results must be all 0.
struct Case {
  std::string name;
  std::function<void(Run&)> run;
  bool zero = false;
};

void judge(std::vector<Case> const& cases) {
  for (Case const& c : cases) {
    INFO(c.name);
    ha::Cpu cpu{2};
    Run poisoned{cpu, true}, real{cpu, false};
    c.run(poisoned);
    c.run(real);
    CHECK(real.first_unwritten() == -1);
    if (c.zero) CHECK(real.all_zero());
  }
}
template <class... Parts> std::string named(Parts const&... parts) {
  std::ostringstream text;
  ((text << parts << ' '), ...);
  return text.str();
}

template <class T> View<T, 1> one(T& element) { return {&element, {1}}; }

std::vector<Case> loss_cases() {
  std::vector<Case> cases;
  for (Index N : {0, 1, 3, 200})   // more than a block of rows
    for (double scale : {0.0, 1.0})
      for (int counted : {0, 1, 2}) {   // none, every other token, all
        Whole targets(static_cast<std::size_t>(N), -100);
        for (std::size_t n = 0; n < targets.size(); ++n)
          if (counted == 2 || (counted == 1 && n % 2 == 1)) targets[n] = static_cast<std::int32_t>(n % 5);
        bool const zero = scale == 0 || counted == 0 || N == 0;
        cases.push_back({named("SoftmaxLoss", N, scale, counted),
                         [=](Run& r) {
                           ha::LossSum loss;
                           On<ha::SoftmaxLoss>::forward(r.cpu(), r.in(N, 5), r.whole(targets), one(scale), r.out(N, 5), one(loss));
                         },
                         zero});
        cases.push_back({named("CrossEntropy", N, scale, counted),
                         [=](Run& r) {
                           ha::LossSum loss;
                           On<ha::CrossEntropy>::backward(r.cpu(), r.in(N, 4), r.in(5, 4), r.whole(targets), one(scale), r.out(N, 4),
                                                          r.out(5, 4), one(loss));
                         },
                         zero});
      }
  return cases;
}

// Operations on N rows of C numbers.
void linear(Run& r, Index N, Index C) {
  On<ha::Linear>::forward(r.cpu(), r.in(N, C), r.in(3, C), r.out(N, 3));
  On<ha::Linear>::backward(r.cpu(), r.in(N, C), r.in(3, C), r.in(N, 3), r.sum(N, C), r.out(3, C), Into::add);
  On<ha::Linear>::backward(r.cpu(), r.in(N, C), r.in(3, C), r.in(N, 3), r.out(N, C), r.out(3, C), Into::overwrite);
}
void rms_norm(Run& r, Index N, Index C) {
  ha::RmsNorm::Options const plain{ha::NormWeight::plain, 1e-6};
  On<ha::RmsNorm>::forward(r.cpu(), plain, r.in(N, C), r.in(C), r.out(N, C));
  On<ha::RmsNorm>::backward(r.cpu(), plain, r.in(N, C), r.in(C), r.in(N, C), r.sum(N, C), r.out(C), Into::add);
  On<ha::RmsNorm>::backward(r.cpu(), plain, r.in(N, C), r.in(C), r.in(N, C), r.out(N, C), r.out(C), Into::overwrite);
}
void gated_rms_norm(Run& r, Index N, Index C) {
  On<ha::GatedRmsNorm>::forward(r.cpu(), 1e-6, r.in(N, C), r.in(N, C), r.in(C), r.out(N, C));
  On<ha::GatedRmsNorm>::backward(r.cpu(), 1e-6, r.in(N, C), r.in(N, C), r.in(C), r.in(N, C), r.out(N, C), r.out(N, C), r.out(C));
}
void ungated_rms_norm(Run& r, Index N, Index C) {
  On<ha::GatedRmsNorm>::forward(r.cpu(), 1e-6, r.in(N, C), {}, r.in(C), r.out(N, C));
  On<ha::GatedRmsNorm>::backward(r.cpu(), 1e-6, r.in(N, C), {}, r.in(C), r.in(N, C), r.out(N, C), {}, r.out(C));
}
void layer_norm(Run& r, Index N, Index C) {
  On<ha::LayerNorm>::forward(r.cpu(), 1e-6, r.in(N, C), r.in(C), r.in(C), r.out(N, C));
  On<ha::LayerNorm>::backward(r.cpu(), 1e-6, r.in(N, C), r.in(C), r.in(N, C), r.out(N, C), r.out(C), r.out(C));
}
void l2_norm(Run& r, Index N, Index C) {
  On<ha::L2Norm>::forward(r.cpu(), r.in(N, C), r.out(N, C));
  On<ha::L2Norm>::backward(r.cpu(), r.in(N, C), r.in(N, C), r.out(N, C));
}
void l2_norm_of_zeros(Run& r, Index N, Index C) {
  On<ha::L2Norm>::forward(r.cpu(), r.input<2>({N, C}, 0), r.out(N, C));
  On<ha::L2Norm>::backward(r.cpu(), r.input<2>({N, C}, 0), r.in(N, C), r.out(N, C));
}
void gates(Run& r, Index N, Index C) {
  On<ha::Swiglu>::forward(r.cpu(), r.in(N * C), r.in(N * C), r.out(N * C));
  On<ha::Swiglu>::backward(r.cpu(), r.in(N * C), r.in(N * C), r.in(N * C), r.out(N * C), r.out(N * C));
  On<ha::Swiglu>::forward(r.cpu(), r.in(N * C), {}, r.out(N * C));
  On<ha::Swiglu>::backward(r.cpu(), r.in(N * C), {}, r.in(N * C), r.out(N * C), {});
  On<ha::SigmoidGate>::forward(r.cpu(), r.in(N * C), r.in(N * C), r.out(N * C));
  On<ha::SigmoidGate>::backward(r.cpu(), r.in(N * C), r.in(N * C), r.in(N * C), r.out(N * C), r.out(N * C));
}
void gdn_gate(Run& r, Index N, Index C) {
  On<ha::GdnGate>::forward(r.cpu(), 2.0f, r.in(N, C), r.in(N, C), r.in(C), r.in(C), r.out(N, C), r.out(N, C));
  On<ha::GdnGate>::backward(r.cpu(), 2.0f, r.in(N, C), r.in(N, C), r.in(C), r.in(C), r.in(N, C), r.in(N, C), r.out(N, C), r.out(N, C),
                            r.out(C), r.out(C));
}
void embedding(Run& r, Index N, Index C) {
  auto const tokens = r.whole(Whole(static_cast<std::size_t>(N), 1));
  On<ha::Embedding>::forward(r.cpu(), tokens, r.in(3, C), r.out(N, C));
  On<ha::Embedding>::backward(r.cpu(), tokens, r.in(N, C), r.sum(3, C), Into::add);
  On<ha::Embedding>::backward(r.cpu(), tokens, r.in(N, C), r.out(3, C), Into::overwrite);
}
void adamw(Run& r, Index N, Index C) {
  for (double rate : {0.0, 1.0}) {
    ha::AdamWRates const rates{rate, 0.9, 0.95, 1e-8, 0.1, 1, 1, rate};
    ha::StepNumbers const numbers;
    ha::StepFault fault;
    ha::AdamWTensor<float> const tensor{r.sum(N * C).data, r.in(N * C).data, r.sum(N * C).data, r.sum(N * C).data, N * C, 0};
    On<ha::AdamWCheck>::forward(r.cpu(), one(tensor), one(rates), one(numbers), one(fault));
    On<ha::AdamWStep>::forward(r.cpu(), one(tensor), one(rates), one(numbers));
  }
}
void linear_of_no_columns(Run& r) {
  On<ha::Linear>::forward(r.cpu(), r.in(3, 0), r.in(2, 0), r.out(3, 2));
  On<ha::Linear>::backward(r.cpu(), r.in(3, 2), r.in(0, 2), r.in(3, 0), r.sum(3, 2), r.out(0, 2), Into::add);
  On<ha::Linear>::backward(r.cpu(), r.in(3, 2), r.in(0, 2), r.in(3, 0), r.out(3, 2), r.out(0, 2), Into::overwrite);
}

struct RowOperation {
  char const* name;
  void (*run)(Run& r, Index N, Index C);
};
constexpr RowOperation row_operations[] = {{"Linear", linear},
                                           {"RmsNorm", rms_norm},
                                           {"GatedRmsNorm", gated_rms_norm},
                                           {"GatedRmsNorm without a gate", ungated_rms_norm},
                                           {"LayerNorm", layer_norm},
                                           {"L2Norm", l2_norm},
                                           {"L2Norm of zeros", l2_norm_of_zeros},
                                           {"Swiglu, SigmoidGate", gates},
                                           {"GdnGate", gdn_gate},
                                           {"Embedding", embedding},
                                           {"AdamW", adamw}};

std::vector<Case> row_cases() {
  std::vector<Case> cases{{"Linear of no columns", linear_of_no_columns, true}};
  for (Index N : {0, 1, 70})
    for (Index C : {1, 7, 16})
      for (RowOperation const& operation : row_operations)
        cases.push_back({named(operation.name, N, C), [=](Run& r) { operation.run(r, N, C); }, N == 0});
  return cases;
}

std::vector<Case> rope_cases() {
  std::vector<Case> cases;
  for (Index N : {0, 3})
    for (Index rotary_dim : {0, 4, 8})
      for (bool interleaved : {false, true})
        cases.push_back({named("Rope", N, rotary_dim, interleaved), [=](Run& r) {
                           ha::Rope::Options const o{rotary_dim, 10000, interleaved};
                           auto const angles = r.out(N, 2, rotary_dim / 2);
                           if (!angles.empty()) On<ha::RopeAngles>::forward(r.cpu(), o, {}, angles);
                           for (auto const& positions : {View<std::int32_t const, 1>{}, r.whole(Whole(static_cast<std::size_t>(N), 1))}) {
                             On<ha::Rope>::forward(r.cpu(), o, View<float const, 3>(angles), positions, r.in(N, 2, 8), r.out(N, 2, 8));
                             On<ha::Rope>::backward(r.cpu(), o, View<float const, 3>(angles), positions, r.in(N, 2, 8), r.out(N, 2, 8));
                           }
                         }});
  return cases;
}

std::vector<Case> convolution_cases() {
  std::vector<Case> cases;
  for (std::vector<Index> const& lengths : {std::vector<Index>{}, {0}, {0, 0, 3, 1, 0}, {70}})
    for (Index W : {0, 1, 4})
      for (bool states : {false, true})
        for (auto activation : {ha::Activation::none, ha::Activation::silu})
          cases.push_back({named("CausalConv1d of", lengths.size(), W, states), [=](Run& r) {
                             auto const s = packed(lengths);
                             Index const N = s.tokens(), rows = std::max<Index>(W - 1, 0), C = 5;
                             Shape<3> const state = states ? Shape<3>{s.count(), rows, C} : Shape<3>{};
                             auto const initial = r.input(state), d_final = r.input(state);
                             auto const in_memory = [&] { return r.out(state[0], state[1], state[2]); };
                             On<ha::CausalConv1d>::forward(r.cpu(), activation, s, r.in(N, C), r.in(C, W), initial, r.out(N, C),
                                                           in_memory());
                             On<ha::CausalConv1d>::backward(r.cpu(), activation, s, r.in(N, C), r.in(C, W), initial, r.in(N, C), d_final,
                                                            r.out(N, C), r.out(C, W), in_memory());
                           }});
  return cases;
}

std::vector<Case> mixture_cases() {
  std::vector<Case> cases;
  for (Index N : {0, 1, 70})
    for (Index E : {1, 4})
      for (Index k = 1; k <= E; ++k)
        for (bool renormalise : {false, true})
          for (bool balance : {false, true})
            cases.push_back({named("mixture", N, E, k, renormalise, balance), [=](Run& r) {
                               ha::Route::Options const o{renormalise};
                               Index const C = 3;
                               auto const probabilities = r.out(N, E), weights = r.out(N, k);
                               auto const experts = r.whole_out(Shape<2>{N, k}), places = r.whole_out(Shape<2>{N, k});
                               // Every token chooses the first ones: the others have none.
                               On<ha::Route>::forward(r.cpu(), o, r.input<2>({N, E}, 0), probabilities, weights, experts);
                               auto const starts = r.whole_out(Shape<1>{E + 1});
                               On<ha::Permute>::forward(r.cpu(), View<std::int32_t const, 2>(experts), starts, places);
                               View<std::int32_t const, 1> const offsets = starts;
                               On<ha::GroupedLinear>::forward(r.cpu(), offsets, r.in(N * k, C), r.in(E, 5, C), r.out(N * k, 5));
                               On<ha::GroupedLinear>::backward(r.cpu(), offsets, r.in(N * k, C), r.in(E, 5, C), r.in(N * k, 5),
                                                               r.sum(N * k, C), r.out(E, 5, C), Into::add);
                               On<ha::GroupedLinear>::backward(r.cpu(), offsets, r.in(N * k, C), r.in(E, 5, C), r.in(N * k, 5),
                                                               r.out(N * k, C), r.out(E, 5, C), Into::overwrite);
                               View<std::int32_t const, 2> const at = places, chosen = experts;
                               On<ha::Route>::backward(r.cpu(), o, View<float const, 2>(probabilities), View<float const, 2>(weights),
                                                       chosen, r.in(N, k), balance ? r.in(E) : View<float const, 1>{}, r.out(N, E));
                               On<ha::Distribute>::forward(r.cpu(), r.in(N, C), at, r.out(N * k, C));
                               On<ha::Distribute>::backward(r.cpu(), at, r.in(N * k, C), r.sum(N, C), Into::add);
                               On<ha::Distribute>::backward(r.cpu(), at, r.in(N * k, C), r.out(N, C), Into::overwrite);
                               On<ha::Combine>::forward(r.cpu(), r.in(N * k, C), r.in(N, k), at, r.out(N, C));
                               On<ha::Combine>::backward(r.cpu(), r.in(N * k, C), r.in(N, k), at, r.in(N, C), r.out(N * k, C), r.out(N, k));
                               On<ha::AddGated>::forward(r.cpu(), r.in(N, C), r.in(N, 1), r.sum(N, C));
                               On<ha::AddGated>::backward(r.cpu(), r.in(N, C), r.in(N, 1), r.in(N, C), r.out(N, C), r.out(N, 1));
                             }});
  for (Index rows : {0, 3})
    for (Index n : {0, 1, 40})
      for (Index k : {0, 1, 40, 50})
        cases.push_back(
            {named("TopK", rows, n, k), [=](Run& r) { On<ha::TopK>::forward(r.cpu(), r.in(rows, n), r.whole_out(Shape<2>{rows, k})); }});
  return cases;
}

// Tensors of a group that hold anything but finite numbers, and those that hold anything but 0.
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
template <class Group> std::string not_zero(ha::Cpu& cpu, Group const& group) {
  std::string paths;
  ha::zip(
      [&](ha::Path const& path, auto const& tensor) {
        auto const values = download(cpu, tensor);
        if (std::ranges::any_of(values, [](auto x) { return x != 0; })) paths += path.str() + " ";
      },
      group);
  return paths;
}
template <class T, int Rank> void set(ha::Tensor<T, Rank, ha::Cpu>& tensor, float scale, ha::Random& random) {
  for (T& x : std::span(out(tensor).data, static_cast<std::size_t>(out(tensor).count())))
    x = static_cast<T>(std::is_same_v<T, float> ? scale * static_cast<float>(random.normal()) : -1);
}
// A group of tensors of small numbers, of 0, or of NaN.
template <template <class> class G> G<ha::Owned<float, ha::Cpu>> filled(ha::Cpu& cpu, G<ha::Shapes> const& shapes, float scale) {
  auto group = ha::allocate<float>(cpu, shapes);
  ha::Random random{ha::Seed{3}, "group"};
  ha::zip([&](ha::Path const&, auto& tensor) { set(tensor, scale, random); }, group);
  return group;
}
constexpr float not_a_number = std::numeric_limits<float>::quiet_NaN();

}  // namespace

TEST_CASE("every operation writes all of its results, whatever its arguments") {
  for (auto const& cases : {loss_cases(), row_cases(), rope_cases(), convolution_cases(), mixture_cases()}) judge(cases);
}

TEST_CASE("a mixture whose experts have no tokens has gradients for all of them, and a shared expert may be nothing but its gate") {
  for (Index shared_dim : {-1, 0, 5})
    for (bool gated : {false, true})
      for (Index N : {1, 9}) {
        INFO(shared_dim << " " << gated << " " << N);
        ha::Cpu cpu{2};
        ha::FeedForwardConfig const c =
            ha::FeedForwardConfig{.hidden_dim = 6, .gated = gated, .num_experts = 4, .top_k = 1, .shared_dim = shared_dim}.completed(8);
        auto const shapes = ha::FeedForward::params(c, 0, 8);
        for (float scale : {not_a_number, 1.0f}) {   // first a run on NaN
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

namespace {

// Which gradients of outputs are there, and what they are.
struct Upstream {
  bool of_o = true, others = true;
  float scale = 1;
};
// One forward and one backward; returns what is not finite. Without upstream gradients other than 0 all gradients are 0.
template <class P> std::string unwritten(ha::Cpu& cpu, typename P::Config const& c, ha::Sequences const& s, bool extras, Upstream up,
                                         float scale) {
  auto input_shapes = P::inputs(c, s);
  auto output_shapes = P::outputs(c, s);
  if constexpr (requires { input_shapes.initial_state; })
    if (extras) input_shapes.initial_state = output_shapes.final_state = ha::gdn::state_shape(c, s);
  if constexpr (requires { output_shapes.auxiliary_loss; }) output_shapes.auxiliary_loss = {1};
  auto x = filled<P::template Inputs>(cpu, input_shapes, scale), d_x = filled<P::template Inputs>(cpu, input_shapes, not_a_number);
  if constexpr (requires { x.g; })
    for (float& g : std::span(out(x.g).data, static_cast<std::size_t>(out(x.g).count()))) g = -std::abs(g);
  auto y = filled<P::template Outputs>(cpu, output_shapes, not_a_number),
       d_y = filled<P::template Outputs>(cpu, output_shapes, up.scale * scale);
  auto saved = filled<P::template Saved>(cpu, P::saved(c, s), not_a_number);
  ha::On<P, ha::Cpu>::forward(cpu, c, s, in(x), out(y), out(saved));
  auto upstream = in(d_y);
  if (!up.of_o) upstream.o = {};
  if constexpr (requires { upstream.auxiliary_loss; })
    if (!up.others) upstream.auxiliary_loss = {};
  if constexpr (requires { upstream.final_state; })
    if (!up.others) upstream.final_state = {};
  ha::On<P, ha::Cpu>::backward(cpu, c, s, in(x), in(y), in(saved), upstream, out(d_x));
  std::string found = not_finite(cpu, y) + not_finite(cpu, saved) + not_finite(cpu, d_x);
  if (up.scale == 0 || (!up.of_o && !up.others)) found += not_zero(cpu, d_x);
  return found;
}

std::vector<std::vector<Index>> const edges{{}, {0}, {0, 0}, {1}, {0, 1, 0, 2, 70, 0}};

template <class P> void judge_policy(typename P::Config config, std::vector<Upstream> const& upstreams) {
  auto const c = P::complete(config, 32, 2);
  for (auto const& lengths : edges)
    for (bool extras : {false, true})
      for (Upstream const& up : upstreams) {
        INFO(P::name << ", sequences " << lengths.size() << ", extras " << extras << ", of o " << up.of_o << ", others " << up.others
                     << ", scale " << up.scale);
        ha::Cpu cpu{2};
        unwritten<P>(cpu, c, packed(lengths), extras, up, not_a_number);   // what it leaves in memory
        CHECK(unwritten<P>(cpu, c, packed(lengths), extras, up, 1) == "");
      }
}
std::vector<Upstream> const usual{{}, {.others = false}, {.scale = 0}, {.others = false, .scale = 0}};

}  // namespace

TEMPLATE_TEST_CASE("attention writes all of its results, of sequences without tokens and for gradients of 0", "", ha::Full,
                   ha::FullAttention<ha::FullOptions{.window = 1}>, ha::GDN) {
  judge_policy<TestType>({}, usual);
  if constexpr (requires(typename TestType::Config c) { c.head_dim; }) judge_policy<TestType>({.head_dim = 5}, usual);  // no whole vectors
  else judge_policy<TestType>({.key_dim = 5, .value_dim = 3}, usual);
}

TEMPLATE_TEST_CASE("sparse attention writes all of its results in every stage, whichever loss is wanted", "",
                   ha::SparseAttention<ha::SparseOptions{.top_k = 1}>,
                   (ha::SparseAttention<ha::SparseOptions{.top_k = 0, .top_k_percent = 1}>)) {
  auto upstreams = usual;
  for (bool others : {false, true}) upstreams.push_back({.of_o = false, .others = others});
  for (ha::Stage stage : {ha::Stage::language_model, ha::Stage::dense_warm_up, ha::Stage::sparse})
    for (double scale : {0.0, -0.5}) judge_policy<TestType>({.index_scale = scale, .stage = stage}, upstreams);
}
