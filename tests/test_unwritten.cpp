// What the laws do not say of results that are written: a mixture whose experts have no tokens, and policies of which not every
// gradient is given. Results start as NaN, and scratch memory holds what a run on NaN left.
#include "catch.hpp"
#include "compare.hpp"

#include <hybridattn/attention/dsa/dsa.hpp>
#include <hybridattn/attention/gdn/gdn.hpp>
#include <hybridattn/nn/feed_forward.hpp>

#include <cmath>
#include <string>

namespace ha = hybridattn;
using ha::Index;

namespace {

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

// Which gradients of outputs are there.
struct Upstream {
  bool of_o, others;
};
template <class P> auto shapes_with_states(typename P::Config const& c, ha::Sequences const& s) {
  auto shapes = std::pair{P::inputs(c, s), P::outputs(c, s)};
  if constexpr (requires { shapes.first.initial_state; })
    shapes.first.initial_state = shapes.second.final_state = ha::gdn::state_shape(c, s);
  else shapes.second.auxiliary_loss = {1};
  return shapes;
}
template <class Group> Group without(Group d_y, Upstream up) {
  if (!up.of_o) d_y.o = {};
  if constexpr (requires { d_y.auxiliary_loss; }) {
    if (!up.others) d_y.auxiliary_loss = {};
  } else if (!up.others) {
    d_y.final_state = {};
  }
  return d_y;
}
// One forward and backward; returns what is not finite. With no gradient of an output all gradients are 0.
template <class P> std::string unwritten(ha::Cpu& cpu, typename P::Config const& c, ha::Sequences const& s, Upstream up, float scale) {
  auto const [inputs, outputs] = shapes_with_states<P>(c, s);
  auto x = filled(cpu, inputs, scale), d_x = filled(cpu, inputs, not_a_number);
  if constexpr (requires { x.g; })
    for (float& g : std::span(out(x.g).data, static_cast<std::size_t>(out(x.g).count()))) g = -std::abs(g);
  auto y = filled(cpu, outputs, not_a_number), d_y = filled(cpu, outputs, scale);
  auto saved = filled(cpu, P::saved(c, s), not_a_number);
  ha::On<P, ha::Cpu>::forward(cpu, c, s, in(x), out(y), out(saved));
  ha::On<P, ha::Cpu>::backward(cpu, c, s, in(x), in(y), in(saved), without(in(d_y), up), out(d_x));
  std::string const found = not_finite(cpu, y) + not_finite(cpu, saved) + not_finite(cpu, d_x);
  return up.of_o || up.others ? found : found + not_zero(cpu, d_x);
}

template <class P> void judge_policy(typename P::Config config) {
  auto const c = P::complete(config, 32, 2);
  for (auto const& lengths : std::vector<std::vector<Index>>{{}, {0}, {0, 0}, {1}, {0, 1, 0, 2, 70, 0}})
    for (Upstream const& up : {Upstream{true, false}, {false, true}, {false, false}}) {
      INFO(P::name << ", sequences " << lengths.size() << ", of o " << up.of_o << ", others " << up.others);
      ha::Cpu cpu{2};
      unwritten<P>(cpu, c, packed(lengths), up, not_a_number);   // what it leaves in memory
      CHECK(unwritten<P>(cpu, c, packed(lengths), up, 1) == "");
    }
}

}  // namespace

TEST_CASE("attention writes all of its gradients, whichever output has one, of sequences without tokens too") {
  judge_policy<ha::GDN>({.key_dim = 5, .value_dim = 3});
  for (ha::Stage stage : {ha::Stage::language_model, ha::Stage::dense_warm_up, ha::Stage::sparse})
    for (double scale : {0.0, -0.5})
      judge_policy<ha::SparseAttention<ha::SparseOptions{.top_k = 1}>>({.index_scale = scale, .stage = stage});
}
