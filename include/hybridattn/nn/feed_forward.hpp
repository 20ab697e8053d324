// Feed-forward layers: a dense SwiGLU, or a mixture of experts. Both are one type; the config says which layers are mixtures.
// Tensors that a layer does not need have extent 0.
#ifndef HYBRIDATTN_NN_FEED_FORWARD_HPP
#define HYBRIDATTN_NN_FEED_FORWARD_HPP

#include <hybridattn/nn/initialization.hpp>
#include <hybridattn/ops/arithmetic/arithmetic.hpp>
#include <hybridattn/ops/gate/gate.hpp>
#include <hybridattn/ops/grouped_linear/grouped_linear.hpp>
#include <hybridattn/ops/linear/linear.hpp>
#include <hybridattn/ops/moe/moe.hpp>
#include <hybridattn/tensor/roles.hpp>

#include <algorithm>
#include <vector>

namespace hybridattn::inline HYBRIDATTN_ABI {

// down(silu(gate x) * up x), or down(silu(gate x)) without up. The product is Linear, or GroupedLinear for all experts at once.
// GroupedLinear takes the weights of all experts, and the offsets of their rows as last argument.
struct Mlp {
  template <class S> struct Params {
    Held<S, 2> gate, up;  // [F, C]
    Held<S, 2> down;      // [C, F]
    HYBRIDATTN_FIELDS(gate, up, down)
  };
  template <class S> struct Saved {
    Held<S, 2> gate, up, hidden;  // [N, F]
    HYBRIDATTN_FIELDS(gate, up, hidden)
  };
  static Params<Shapes> params(Index C, Index F, bool gated) {
    return {.gate = {F, C}, .up = {gated ? F : 0, gated ? C : 0}, .down = {C, F}};
  }
  static Params<Starts> starts(Index C, Index F, Initialization const& init) {
    return {.gate = init.linear(C), .up = init.linear(C), .down = init.linear(F)};
  }
  static Saved<Shapes> saved(Index N, Index F, bool gated) {
    return {.gate = {N, F}, .up = {gated ? N : 0, gated ? F : 0}, .hidden = {N, F}};
  }

  template <class Product = Linear, class B, class Weights, class T, class... Offsets>
  static void forward(B& backend, Weights const& p, View<T const, 2> x, Saved<Out<T>> const& saved, View<T, 2> y, Offsets... offsets) {
    On<Product, B>::forward(backend, offsets..., x, p.gate, saved.gate);
    if (!p.up.empty()) On<Product, B>::forward(backend, offsets..., x, p.up, saved.up);
    On<Swiglu, B>::forward(backend, flat(View<T const, 2>(saved.gate)), flat(View<T const, 2>(saved.up)), flat(saved.hidden));
    On<Product, B>::forward(backend, offsets..., View<T const, 2>(saved.hidden), p.down, y);
  }
  // Adds to d_x or overwrites it, as `into` says. `d` is scratch of Saved's shapes.
  template <class Product = Linear, class B, class Weights, class T, class Gradients, class... Offsets>
  static void backward(B& backend, Weights const& p, View<T const, 2> x, Saved<In<T>> const& saved, View<T const, 2> d_y,
                       Saved<Out<T>> const& d, View<T, 2> d_x, Into into, Gradients const& d_p, Offsets... offsets) {
    On<Product, B>::backward(backend, offsets..., saved.hidden, p.down, d_y, d.hidden, d_p.down, Into::overwrite);
    On<Swiglu, B>::backward(backend, flat(saved.gate), flat(saved.up), flat(View<T const, 2>(d.hidden)), flat(d.gate), flat(d.up));
    if (!p.up.empty()) {
      On<Product, B>::backward(backend, offsets..., x, p.up, View<T const, 2>(d.up), d_x, d_p.up, into);
      into = Into::add;
    }
    On<Product, B>::backward(backend, offsets..., x, p.gate, View<T const, 2>(d.gate), d_x, d_p.gate, into);
  }
};

// The load-balancing loss: a sum of one loss for each layer, or one loss over the tokens of all layers together.
enum class Balance { per_layer, pooled };

struct FeedForwardConfig {
  Index hidden_dim = 0;              // F of a dense layer; 0: 4 model_dim
  bool gated = true;                 // SwiGLU; false: silu without a second branch
  Index num_experts = 0;             // E; 0: every layer is dense
  Index top_k = 2;                   // experts of a token
  Index expert_dim = 0;              // F of an expert; 0: hidden_dim
  Index shared_dim = -1;             // F of the shared expert; -1: no shared expert; 0: only its gate
  bool renormalise = true;           // weights of the chosen sum to 1
  Index decoder_sparse_step = 1;     // layer i is a mixture when (i + 1) % decoder_sparse_step == 0 ...
  std::vector<Index> mlp_only_layers = {};  // ... and i is not among these
  double balance_coefficient = 0;    // weight of the load-balancing loss
  Balance balance = Balance::per_layer;

  bool is_mixture(Index layer) const {
    return num_experts > 0 && (layer + 1) % decoder_sparse_step == 0 &&
           std::find(mlp_only_layers.begin(), mlp_only_layers.end(), layer) == mlp_only_layers.end();
  }
  // Fills in every 0. Throws Error on sizes that do not fit.
  FeedForwardConfig completed(Index model_dim) const {
    check_numbers();
    FeedForwardConfig c = *this;
    if (c.hidden_dim == 0) c.hidden_dim = size_product(4, model_dim);
    if (c.expert_dim == 0) c.expert_dim = c.hidden_dim;
    check(c.num_experts == 0 || (0 < c.top_k && c.top_k <= c.num_experts), "feed-forward: top_k ", c.top_k, " of ", c.num_experts,
          " experts; allowed: 1 .. ", c.num_experts);
    check(c.num_experts <= largest_int32, "feed-forward: num_experts ", c.num_experts, " is not allowed; it must be at most ",
          largest_int32);
    return c;
  }

 private:
  void check_numbers() const {
    constexpr char const* where = "feed-forward";
    check_at_least(where, "hidden_dim", hidden_dim, 0, ", where 0 stands for 4 model_dim");
    check_at_least(where, "num_experts", num_experts, 0, ", where 0 stands for no mixture");
    check_at_least(where, "top_k", top_k, 0);
    check_at_least(where, "expert_dim", expert_dim, 0, ", where 0 stands for hidden_dim");
    check_at_least(where, "shared_dim", shared_dim, -1, ", where -1 stands for no shared expert");
    check_at_least(where, "decoder_sparse_step", decoder_sparse_step, 1);
    for (Index layer : mlp_only_layers) check_at_least(where, "mlp_only_layers: layer", layer, 0);
    check_not_negative(where, "balance_coefficient", balance_coefficient);
  }
};

struct FeedForward {
  template <class S> struct Experts {
    Held<S, 3> gate, up;  // [E, F, C]
    Held<S, 3> down;      // [E, C, F]
    HYBRIDATTN_FIELDS(gate, up, down)
  };
  template <class S> struct Params {
    Mlp::Params<S> dense;
    Held<S, 2> router;       // [E, C]
    Experts<S> experts;
    Mlp::Params<S> shared;
    Held<S, 2> shared_gate;  // [1, C]
    HYBRIDATTN_FIELDS(dense, router, experts, shared, shared_gate)
  };
  template <class S> struct Saved {
    Mlp::Saved<S> dense;
    Wide<S, 2> probabilities;  // [N, E]
    Wide<S, 2> weights;        // [N, k]
    Whole<S, 2> chosen;        // [N, k], highest first
    Whole<S, 1> offsets;       // [E + 1]
    Whole<S, 2> places;        // [N, k]
    Held<S, 2> rows, made;     // [N k, C]: inputs and outputs of the experts
    Mlp::Saved<S> experts;     // [N k, F]
    Mlp::Saved<S> shared;
    Held<S, 2> shared_made;    // [N, C]
    Held<S, 2> shared_logit;   // [N, 1]
    Wide<S, 1> d_probability;  // [E]: the load-balancing loss's gradient for every token's probabilities, written between the passes
    HYBRIDATTN_FIELDS(dense, probabilities, weights, chosen, offsets, places, rows, made, experts, shared, shared_made, shared_logit,
                      d_probability)
  };

  static Params<Shapes> params(FeedForwardConfig const& c, Index layer, Index C) {
    Params<Shapes> shapes{};
    if (!c.is_mixture(layer)) {
      shapes.dense = Mlp::params(C, c.hidden_dim, c.gated);
      return shapes;
    }
    Shape<3> const branch{c.num_experts, c.expert_dim, C};
    shapes.router = {c.num_experts, C};
    shapes.experts = {.gate = branch, .up = c.gated ? branch : Shape<3>{}, .down = {c.num_experts, C, c.expert_dim}};
    if (c.shared_dim >= 0) {
      shapes.shared = Mlp::params(C, c.shared_dim, c.gated);
      shapes.shared_gate = {1, C};
    }
    return shapes;
  }
  static Params<Starts> starts(FeedForwardConfig const& c, Index C, Initialization const& init) {
    auto const wide = init.linear(C);
    return {.dense = Mlp::starts(C, c.hidden_dim, init),
            .router = wide,
            .experts = {.gate = wide, .up = wide, .down = init.linear(c.expert_dim)},
            .shared = Mlp::starts(C, std::max<Index>(c.shared_dim, 1), init),
            .shared_gate = wide};
  }
  static Saved<Shapes> saved(FeedForwardConfig const& c, Index layer, Index C, Index N) {
    Saved<Shapes> shapes{};
    if (!c.is_mixture(layer)) {
      shapes.dense = Mlp::saved(N, c.hidden_dim, c.gated);
      return shapes;
    }
    Index const chosen = size_product(N, c.top_k);
    check(chosen <= largest_int32, "feed-forward: ", N, " tokens to ", c.top_k, " experts each; a batch has at most ", largest_int32,
          " choices");
    Shape<2> const choices{N, c.top_k}, rows{chosen, C};
    shapes.probabilities = {N, c.num_experts};
    shapes.weights = shapes.chosen = shapes.places = choices;
    shapes.offsets = {c.num_experts + 1};
    shapes.rows = shapes.made = rows;
    shapes.experts = Mlp::saved(chosen, c.expert_dim, c.gated);
    shapes.d_probability = {c.num_experts};
    if (c.shared_dim >= 0) {
      shapes.shared = Mlp::saved(N, c.shared_dim, c.gated);
      shapes.shared_made = {N, C};
      shapes.shared_logit = {N, 1};
    }
    return shapes;
  }

  template <class B, class T>
  static Tensor<T, 2, B> forward(B& backend, FeedForwardConfig const& c, Index layer, Params<In<T>> const& p, View<T const, 2> x,
                                 Saved<Owned<T, B>>& saved) {
    saved = allocate<T>(backend, FeedForward::saved(c, layer, x.extent(1), x.extent(0)));
    Tensor<T, 2, B> y{backend, x.shape};
    if (c.is_mixture(layer)) mix(backend, c, p, x, saved, out(y));
    else Mlp::forward(backend, p.dense, x, out(saved.dense), out(y));
    return y;
  }

  template <class B, class T>
  static Tensor<T, 2, B> backward(B& backend, FeedForwardConfig const& c, Index layer, Params<In<T>> const& p, View<T const, 2> x,
                                  Saved<Owned<T, B>> saved, View<T const, 2> d_y, Params<Out<T>> const& d_p) {
    Tensor<T, 2, B> d_x{backend, x.shape};
    if (c.is_mixture(layer)) mix_backward(backend, c, p, x, saved, d_y, out(d_x), d_p);
    else
      mlp_backward(backend, p.dense, x, saved.dense, Mlp::saved(x.extent(0), c.hidden_dim, c.gated), d_y, out(d_x), Into::overwrite,
                   d_p.dense);
    return d_x;
  }

 private:
  template <class B, class T>
  static void mix(B& backend, FeedForwardConfig const& c, Params<In<T>> const& p, View<T const, 2> x, Saved<Owned<T, B>>& saved,
                  View<T, 2> y) {
    Tensor<wide_t<T>, 2, B> logits{backend, saved.probabilities.shape()};
    On<Linear, B>::forward(backend, x, p.router, out(logits));
    On<Route, B>::forward(backend, Route::Options{c.renormalise}, in(logits), out(saved.probabilities), out(saved.weights),
                          out(saved.chosen));
    On<Permute, B>::forward(backend, in(saved.chosen), out(saved.offsets), out(saved.places));
    On<Distribute, B>::forward(backend, x, in(saved.places), out(saved.rows));
    Mlp::forward<GroupedLinear>(backend, p.experts, in(saved.rows), out(saved.experts), out(saved.made), in(saved.offsets));
    On<Combine, B>::forward(backend, in(saved.made), in(saved.weights), in(saved.places), y);
    On<Fill, B>::forward(backend, wide_t<T>(0), out(saved.d_probability));
    if (c.shared_dim < 0) return;
    Mlp::forward(backend, p.shared, x, out(saved.shared), out(saved.shared_made));
    On<Linear, B>::forward(backend, x, p.shared_gate, out(saved.shared_logit));
    On<AddGated, B>::forward(backend, in(saved.shared_made), in(saved.shared_logit), y);
  }

  template <class Product = Linear, class B, class Weights, class T, class Gradients, class... Offsets>
  static void mlp_backward(B& backend, Weights const& p, View<T const, 2> x, Mlp::Saved<Owned<T, B>> const& saved,
                           Mlp::Saved<Shapes> const& shapes, View<T const, 2> d_y, View<T, 2> d_x, Into into, Gradients const& d_p,
                           Offsets... offsets) {
    auto d = allocate<T>(backend, shapes);
    Mlp::backward<Product>(backend, p, x, in(saved), d_y, out(d), d_x, into, d_p, offsets...);
  }

  template <class B, class T>
  static void mix_backward(B& backend, FeedForwardConfig const& c, Params<In<T>> const& p, View<T const, 2> x, Saved<Owned<T, B>>& saved,
                           View<T const, 2> d_y, View<T, 2> d_x, Params<Out<T>> const& d_p) {
    Tensor<T, 2, B> d_made{backend, saved.made.shape()};
    Tensor<wide_t<T>, 2, B> d_weights{backend, saved.weights.shape()}, d_logits{backend, saved.probabilities.shape()};
    On<Combine, B>::backward(backend, in(saved.made), in(saved.weights), in(saved.places), d_y, out(d_made), out(d_weights));
    Tensor<T, 2, B> d_rows{backend, saved.rows.shape()};
    mlp_backward<GroupedLinear>(backend, p.experts, in(saved.rows), saved.experts, Mlp::saved(d_rows.shape()[0], c.expert_dim, c.gated),
                                in(d_made), out(d_rows), Into::overwrite, d_p.experts, in(saved.offsets));
    On<Distribute, B>::backward(backend, in(saved.places), in(d_rows), d_x, Into::overwrite);
    On<Route, B>::backward(backend, Route::Options{c.renormalise}, in(saved.probabilities), in(saved.weights), in(saved.chosen),
                           in(d_weights), in(saved.d_probability), out(d_logits));
    On<Linear, B>::backward(backend, x, p.router, in(d_logits), d_x, d_p.router, Into::add);
    if (c.shared_dim < 0) return;
    Tensor<T, 2, B> d_shared{backend, saved.shared_made.shape()}, d_logit{backend, saved.shared_logit.shape()};
    On<AddGated, B>::backward(backend, in(saved.shared_made), in(saved.shared_logit), d_y, out(d_shared), out(d_logit));
    mlp_backward(backend, p.shared, x, saved.shared, Mlp::saved(x.extent(0), c.shared_dim, c.gated), in(d_shared), d_x, Into::add,
                 d_p.shared);
    On<Linear, B>::backward(backend, x, p.shared_gate, in(d_logit), d_x, d_p.shared_gate, Into::add);
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
