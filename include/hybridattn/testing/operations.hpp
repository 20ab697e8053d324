// The groups of the library's operations, and how the laws call each operation. They are not in the operations' own headers, because only
// the laws need them and every include of the library would pay for them.
#ifndef HYBRIDATTN_TESTING_OPERATIONS_HPP
#define HYBRIDATTN_TESTING_OPERATIONS_HPP

#include <hybridattn/ops/adamw/adamw.hpp>
#include <hybridattn/ops/arithmetic/arithmetic.hpp>
#include <hybridattn/ops/balance/balance.hpp>
#include <hybridattn/ops/causal_conv1d/causal_conv1d.hpp>
#include <hybridattn/ops/cross_entropy/cross_entropy.hpp>
#include <hybridattn/ops/embedding/embedding.hpp>
#include <hybridattn/ops/gate/gate.hpp>
#include <hybridattn/ops/gdn_gate/gdn_gate.hpp>
#include <hybridattn/ops/grouped_linear/grouped_linear.hpp>
#include <hybridattn/ops/l2_norm/l2_norm.hpp>
#include <hybridattn/ops/layer_norm/layer_norm.hpp>
#include <hybridattn/ops/linear/linear.hpp>
#include <hybridattn/ops/moe/moe.hpp>
#include <hybridattn/ops/rms_norm/rms_norm.hpp>
#include <hybridattn/ops/rope/rope.hpp>
#include <hybridattn/ops/top_k/top_k.hpp>
#include <hybridattn/testing/operation.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI::testing {

namespace detail {

// Draws whole numbers from first to last - 1. For tables of a batch, pass a Random of their own, so that they are the same for every seed.
inline void draw_whole(HostTensor& tensor, Random& random, Index first, Index last) {
  set_each(tensor, [&] { return static_cast<double>(first + random.below(last - first)); });
}
// Draws the row of each choice of the batch among the rows of all experts. The order is arbitrary, but the same for every seed.
inline void draw_places(HostTensor& places) {
  Random random{Seed{1}, "places"};
  for (std::size_t i = 0; i < places.values.size(); ++i) {
    places.values[i] = static_cast<double>(i);
    std::swap(places.values[i], places.values[static_cast<std::size_t>(random.below(static_cast<Index>(i) + 1))]);
  }
}
// The second of four experts has most rows and the third has the others. The first and the last have none.
inline constexpr Index experts = 4;
inline void draw_offsets(HostTensor& offsets, Index rows) {
  double const most = static_cast<double>(rows - rows / 3), all = static_cast<double>(rows);
  offsets.values = {0, 0, most, all, all};
}
template <class T> void copy_rows(auto& backend, View<T const, 1> from, View<T, 2> to) {
  for (Index n = 0; n < to.extent(0); ++n) backend.copy(to.row(n), from.data, static_cast<std::size_t>(from.count()) * sizeof(T));
}

}  // namespace detail

// ---- arithmetic

template <> struct Operation<Fill> : PlainOperation {
  struct Config {
    Index count = 0;   // elements of a token
    double value = 0;
  };
  static std::vector<Config> sizes() { return {{1, 0.25}, {120, -3}}; }
  static bool has_tables(Config const& c) { return c.count > 1; }
  template <class S> using Inputs = Nothing<S>;
  template <class S> struct Outputs {
    Held<S, 1> y;
    HYBRIDATTN_FIELDS(y)
  };
  static Inputs<Shapes> inputs(Config const&, Sequences const&) { return {}; }
  static Outputs<Shapes> outputs(Config const& c, Sequences const& s) { return {{s.tokens() * c.count}}; }
  template <class B, class T> static void forward(B& backend, Config const& c, SequencesOn<B> const&, Inputs<In<T>>, Outputs<Out<T>> y) {
    On<Fill, B>::forward(backend, static_cast<T>(c.value), y.y);
  }
};

// One element for each token, or more elements for each token than a task has.
struct ElementwiseOperation : PlainOperation {
  struct Config {
    Index count = 0;   // elements of a token
  };
  static std::vector<Config> sizes() { return {{1}, {120}}; }
  static bool has_tables(Config const& c) { return c.count > 1; }   // with more elements than tokens, no element belongs to a token
  static Shape<1> line(Config const& c, Sequences const& s) { return {s.tokens() * c.count}; }
};

template <> struct Operation<Add> : ElementwiseOperation {
  template <class S> struct Inputs {
    Held<S, 1> x;
    HYBRIDATTN_FIELDS(x)
  };
  template <class S> struct Outputs {
    Held<S, 1> y;
    HYBRIDATTN_FIELDS(y)
  };
  static Inputs<Shapes> inputs(Config const& c, Sequences const& s) { return {line(c, s)}; }
  static Outputs<Shapes> outputs(Config const& c, Sequences const& s) { return {line(c, s)}; }
  static bool starts_from(Config const&, std::string_view result) { return result == "y"; }
  template <class B, class T> static void forward(B& backend, Config const&, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<Out<T>> y) {
    On<Add, B>::forward(backend, x.x, y.y);
  }
};

template <> struct Operation<AddWeighted> : PlainOperation {
  struct Config {
    double weight = 0;
  };
  static std::vector<Config> sizes() { return {{0.3}, {0}}; }
  template <class S> struct Inputs {
    Held<S, 1> x;
    HYBRIDATTN_FIELDS(x)
  };
  template <class S> struct Outputs {
    OfType<S, double, 1> sum;
    HYBRIDATTN_FIELDS(sum)
  };
  static Inputs<Shapes> inputs(Config const&, Sequences const&) { return {{1}}; }
  static Outputs<Shapes> outputs(Config const&, Sequences const&) { return {{1}}; }
  static bool starts_from(Config const&, std::string_view result) { return result == "sum"; }
  template <class B, class T> static void forward(B& backend, Config const& c, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<Out<T>> y) {
    On<AddWeighted, B>::forward(backend, c.weight, x.x, y.sum);
  }
};

// ---- gates

template <> struct Operation<Swiglu> : PlainOperation {
  struct Config {
    Index count = 0;   // elements of a token
    bool up = true;
  };
  static std::vector<Config> sizes() { return {{120}, {1}, {1, false}}; }
  static bool has_tables(Config const& c) { return c.count > 1; }
  template <class S> struct Inputs {
    Held<S, 1> gate, up;
    HYBRIDATTN_FIELDS(gate, up)
  };
  template <class S> struct Outputs {
    Held<S, 1> y;
    HYBRIDATTN_FIELDS(y)
  };
  static Inputs<Shapes> inputs(Config const& c, Sequences const& s) { return {line(c, s), c.up ? line(c, s) : Shape<1>{}}; }
  static Outputs<Shapes> outputs(Config const& c, Sequences const& s) { return {line(c, s)}; }
  template <class B, class T> static void forward(B& backend, Config const&, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<Out<T>> y) {
    On<Swiglu, B>::forward(backend, x.gate, x.up, y.y);
  }
  template <class B, class T>
  static void backward(B& backend, Config const&, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<In<T>>, Outputs<In<T>> d_y,
                       Inputs<Out<T>> d_x) {
    On<Swiglu, B>::backward(backend, x.gate, x.up, d_y.y, d_x.gate, d_x.up);
  }

 private:
  static Shape<1> line(Config const& c, Sequences const& s) { return {s.tokens() * c.count}; }
};

template <> struct Operation<SigmoidGate> : ElementwiseOperation {
  template <class S> struct Inputs {
    Held<S, 1> x, z;
    HYBRIDATTN_FIELDS(x, z)
  };
  template <class S> struct Outputs {
    Held<S, 1> y;
    HYBRIDATTN_FIELDS(y)
  };
  static Inputs<Shapes> inputs(Config const& c, Sequences const& s) { return {line(c, s), line(c, s)}; }
  static Outputs<Shapes> outputs(Config const& c, Sequences const& s) { return {line(c, s)}; }
  template <class B, class T> static void forward(B& backend, Config const&, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<Out<T>> y) {
    On<SigmoidGate, B>::forward(backend, x.x, x.z, y.y);
  }
  template <class B, class T>
  static void backward(B& backend, Config const&, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<In<T>>, Outputs<In<T>> d_y,
                       Inputs<Out<T>> d_x) {
    On<SigmoidGate, B>::backward(backend, x.x, x.z, d_y.y, d_x.x, d_x.z);
  }
};

template <> struct Operation<GdnGate> : PlainOperation {
  struct Config {
    Index heads = 0;
    int range = 1;
  };
  static std::vector<Config> sizes() { return {{5, 1}, {3, 2}}; }
  template <class S> struct Inputs {
    Held<S, 2> a, b;             // [N, HV]
    Wide<S, 1> a_log, dt_bias;   // [HV]
    HYBRIDATTN_FIELDS(a, b, a_log, dt_bias)
  };
  template <class S> struct Outputs {
    Wide<S, 2> g, beta;
    HYBRIDATTN_FIELDS(g, beta)
  };
  static Inputs<Shapes> inputs(Config const& c, Sequences const& s) {
    return {{s.tokens(), c.heads}, {s.tokens(), c.heads}, {c.heads}, {c.heads}};
  }
  static Outputs<Shapes> outputs(Config const& c, Sequences const& s) { return {{s.tokens(), c.heads}, {s.tokens(), c.heads}}; }
  template <class B, class T> static void forward(B& backend, Config const& c, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<Out<T>> y) {
    On<GdnGate, B>::forward(backend, c.range, x.a, x.b, x.a_log, x.dt_bias, y.g, y.beta);
  }
  template <class B, class T>
  static void backward(B& backend, Config const& c, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<In<T>>, Outputs<In<T>> d_y,
                       Inputs<Out<T>> d_x) {
    On<GdnGate, B>::backward(backend, c.range, x.a, x.b, x.a_log, x.dt_bias, d_y.g, d_y.beta, d_x.a, d_x.b, d_x.a_log, d_x.dt_bias);
  }
};

// ---- norms

template <> struct Operation<RmsNorm> : PlainOperation {
  struct Config {
    Index columns = 0;
    RmsNorm::Options options = {};
    Into into = Into::overwrite;
  };
  static std::vector<Config> sizes() { return {{40}, {7, {NormWeight::plain, 1e-5}, Into::add}}; }
  template <class S> struct Inputs {
    Held<S, 2> x;   // [N, C]
    Wide<S, 1> w;   // [C]
    HYBRIDATTN_FIELDS(x, w)
  };
  template <class S> struct Outputs {
    Held<S, 2> y;
    HYBRIDATTN_FIELDS(y)
  };
  static Inputs<Shapes> inputs(Config const& c, Sequences const& s) { return {{s.tokens(), c.columns}, {c.columns}}; }
  static Outputs<Shapes> outputs(Config const& c, Sequences const& s) { return {{s.tokens(), c.columns}}; }
  static bool starts_from(Config const& c, std::string_view result) { return result == "d_x" && c.into == Into::add; }
  template <class B, class T> static void forward(B& backend, Config const& c, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<Out<T>> y) {
    On<RmsNorm, B>::forward(backend, c.options, x.x, x.w, y.y);
  }
  template <class B, class T>
  static void backward(B& backend, Config const& c, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<In<T>>, Outputs<In<T>> d_y,
                       Inputs<Out<T>> d_x) {
    On<RmsNorm, B>::backward(backend, c.options, x.x, x.w, d_y.y, d_x.x, d_x.w, c.into);
  }
};

template <> struct Operation<GatedRmsNorm> : PlainOperation {
  struct Config {
    Index columns = 0;
    bool gated = true;
  };
  static std::vector<Config> sizes() { return {{40}, {7, false}}; }
  template <class S> struct Inputs {
    Held<S, 2> x, z;   // [N, C]
    Wide<S, 1> w;      // [C]
    HYBRIDATTN_FIELDS(x, z, w)
  };
  template <class S> struct Outputs {
    Held<S, 2> y;
    HYBRIDATTN_FIELDS(y)
  };
  static Inputs<Shapes> inputs(Config const& c, Sequences const& s) {
    Shape<2> const rows{s.tokens(), c.columns};
    return {rows, c.gated ? rows : Shape<2>{}, {c.columns}};
  }
  static Outputs<Shapes> outputs(Config const& c, Sequences const& s) { return {{s.tokens(), c.columns}}; }
  template <class B, class T> static void forward(B& backend, Config const&, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<Out<T>> y) {
    On<GatedRmsNorm, B>::forward(backend, 1e-6, x.x, x.z, x.w, y.y);
  }
  template <class B, class T>
  static void backward(B& backend, Config const&, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<In<T>>, Outputs<In<T>> d_y,
                       Inputs<Out<T>> d_x) {
    On<GatedRmsNorm, B>::backward(backend, 1e-6, x.x, x.z, x.w, d_y.y, d_x.x, d_x.z, d_x.w);
  }
};

// An operation on rows.
struct RowOperation : PlainOperation {
  struct Config {
    Index columns = 0;
  };
  static std::vector<Config> sizes() { return {{40}, {7}}; }
  static Shape<2> rows(Config const& c, Sequences const& s) { return {s.tokens(), c.columns}; }
};

template <> struct Operation<LayerNorm> : RowOperation {
  template <class S> struct Inputs {
    Held<S, 2> x;      // [N, C]
    Wide<S, 1> w, b;   // [C]
    HYBRIDATTN_FIELDS(x, w, b)
  };
  template <class S> struct Outputs {
    Held<S, 2> y;
    HYBRIDATTN_FIELDS(y)
  };
  static Inputs<Shapes> inputs(Config const& c, Sequences const& s) { return {rows(c, s), {c.columns}, {c.columns}}; }
  static Outputs<Shapes> outputs(Config const& c, Sequences const& s) { return {rows(c, s)}; }
  template <class B, class T> static void forward(B& backend, Config const&, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<Out<T>> y) {
    On<LayerNorm, B>::forward(backend, 1e-6, x.x, x.w, x.b, y.y);
  }
  template <class B, class T>
  static void backward(B& backend, Config const&, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<In<T>>, Outputs<In<T>> d_y,
                       Inputs<Out<T>> d_x) {
    On<LayerNorm, B>::backward(backend, 1e-6, x.x, x.w, d_y.y, d_x.x, d_x.w, d_x.b);
  }
};

template <> struct Operation<L2Norm> : RowOperation {
  template <class S> struct Inputs {
    Held<S, 2> x;   // [N, C]
    HYBRIDATTN_FIELDS(x)
  };
  template <class S> struct Outputs {
    Held<S, 2> y;
    HYBRIDATTN_FIELDS(y)
  };
  static std::vector<std::pair<std::string_view, std::string_view>> in_place() { return {{"y", "x"}, {"d_x", "d_y"}}; }
  static Inputs<Shapes> inputs(Config const& c, Sequences const& s) { return {rows(c, s)}; }
  static Outputs<Shapes> outputs(Config const& c, Sequences const& s) { return {rows(c, s)}; }
  // A row of zeros stays zero.
  static void draw(Config const&, Sequences const& s, Random&, HostGroup& inputs) {
    if (HostTensor& x = inputs.at("x"); s.tokens() > 9) std::fill_n(x.row(9), x.row_size(), 0);
  }
  template <class B, class T> static void forward(B& backend, Config const&, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<Out<T>> y) {
    On<L2Norm, B>::forward(backend, x.x, y.y);
  }
  template <class B, class T>
  static void backward(B& backend, Config const&, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<In<T>>, Outputs<In<T>> d_y,
                       Inputs<Out<T>> d_x) {
    On<L2Norm, B>::backward(backend, x.x, d_y.y, d_x.x);
  }
};

// ---- rotary positions

template <> struct Operation<RopeAngles> : PlainOperation {
  struct Config {
    Rope::Options options;
    bool positions = true;
  };
  static std::vector<Config> sizes() { return {{{.rotary_dim = 6}}, {{.rotary_dim = 4, .theta = 100}, false}}; }
  template <class S> struct Inputs {
    Whole<S, 1> positions;   // [N], or nothing
    HYBRIDATTN_FIELDS(positions)
  };
  template <class S> struct Outputs {
    Wide<S, 3> angles;   // [N, 2, rotary_dim/2]
    HYBRIDATTN_FIELDS(angles)
  };
  // Without positions, a row's angles depend on its place in the batch.
  static bool has_tables(Config const& c) { return !c.positions; }
  static Inputs<Shapes> inputs(Config const& c, Sequences const& s) { return {c.positions ? Shape<1>{s.tokens()} : Shape<1>{}}; }
  static Outputs<Shapes> outputs(Config const& c, Sequences const& s) { return {{s.tokens(), 2, c.options.rotary_dim / 2}}; }
  static void draw(Config const&, Sequences const&, Random& random, HostGroup& inputs) {
    detail::draw_whole(inputs.at("positions"), random, 0, 1000);
  }
  template <class B, class T> static void forward(B& backend, Config const& c, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<Out<T>> y) {
    On<RopeAngles, B>::forward(backend, c.options, x.positions, y.angles);
  }
};

template <> struct Operation<Rope> : PlainOperation {
  struct Config {
    Rope::Options options;
  };
  static constexpr Index heads = 2, head_dim = 8, positions = 50;
  static std::vector<Config> sizes() { return {{{.rotary_dim = 8}}, {{.rotary_dim = 4, .interleaved = true}}, {{.rotary_dim = 0}}}; }
  template <class S> struct Inputs {
    Wide<S, 3> angles;   // [P, 2, rotary_dim/2]
    Held<S, 3> x;        // [N, H, D]
    Whole<S, 1> positions;   // [N]
    HYBRIDATTN_FIELDS(angles, x, positions)
  };
  template <class S> struct Outputs {
    Held<S, 3> y;
    HYBRIDATTN_FIELDS(y)
  };
  static std::vector<std::pair<std::string_view, std::string_view>> in_place() { return {{"y", "x"}, {"d_x", "d_y"}}; }
  static Inputs<Shapes> inputs(Config const& c, Sequences const& s) {
    return {{positions, 2, c.options.rotary_dim / 2}, {s.tokens(), heads, head_dim}, {s.tokens()}};
  }
  static Outputs<Shapes> outputs(Config const&, Sequences const& s) { return {{s.tokens(), heads, head_dim}}; }
  static bool has_gradient(Config const&, std::string_view input) { return input != "angles"; }
  static void draw(Config const&, Sequences const&, Random& random, HostGroup& inputs) {
    detail::draw_whole(inputs.at("positions"), random, 0, positions);
  }
  template <class B, class T> static void forward(B& backend, Config const& c, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<Out<T>> y) {
    On<Rope, B>::forward(backend, c.options, x.angles, x.positions, x.x, y.y);
  }
  template <class B, class T>
  static void backward(B& backend, Config const& c, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<In<T>>, Outputs<In<T>> d_y,
                       Inputs<Out<T>> d_x) {
    On<Rope, B>::backward(backend, c.options, x.angles, x.positions, d_y.y, d_x.x);
  }
};

// ---- products and tables

// Which of the gradients of x and w backward computes.
enum class Wanted { both, of_x, of_w };

template <> struct Operation<Linear> : PlainOperation {
  struct Config {
    Index columns = 0, features = 0;
    Into into = Into::overwrite;
    Wanted wanted = Wanted::both;
  };
  static std::vector<Config> sizes() {
    return {{40, 33}, {7, 5, Into::add}, {7, 5, Into::overwrite, Wanted::of_x}, {7, 5, Into::overwrite, Wanted::of_w}, {0, 2}, {2, 0}};
  }
  template <class S> struct Inputs {
    Held<S, 2> x, w;   // [N, C], [M, C]
    HYBRIDATTN_FIELDS(x, w)
  };
  template <class S> struct Outputs {
    Held<S, 2> y;   // [N, M]
    HYBRIDATTN_FIELDS(y)
  };
  static Inputs<Shapes> inputs(Config const& c, Sequences const& s) { return {{s.tokens(), c.columns}, {c.features, c.columns}}; }
  static Outputs<Shapes> outputs(Config const& c, Sequences const& s) { return {{s.tokens(), c.features}}; }
  static bool starts_from(Config const& c, std::string_view result) { return result == "d_x" && c.into == Into::add; }
  static bool has_gradient(Config const& c, std::string_view input) {
    return c.wanted == Wanted::both || (c.wanted == Wanted::of_x) == (input == "x");
  }
  template <class B, class T> static void forward(B& backend, Config const&, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<Out<T>> y) {
    On<Linear, B>::forward(backend, x.x, x.w, y.y);
  }
  template <class B, class T>
  static void backward(B& backend, Config const& c, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<In<T>>, Outputs<In<T>> d_y,
                       Inputs<Out<T>> d_x) {
    On<Linear, B>::backward(backend, x.x, x.w, d_y.y, d_x.x, d_x.w, c.into);
  }
};

template <> struct Operation<GroupedLinear> : PlainOperation {
  using Config = Operation<Linear>::Config;
  static std::vector<Config> sizes() { return Operation<Linear>::sizes(); }
  static bool has_tables(Config const&) { return true; }
  template <class S> struct Inputs {
    Whole<S, 1> offsets;   // [E + 1]
    Held<S, 2> x;          // [R, C]
    Held<S, 3> w;          // [E, M, C]
    HYBRIDATTN_FIELDS(offsets, x, w)
  };
  template <class S> struct Outputs {
    Held<S, 2> y;   // [R, M]
    HYBRIDATTN_FIELDS(y)
  };
  static Inputs<Shapes> inputs(Config const& c, Sequences const& s) {
    return {{detail::experts + 1}, {s.tokens(), c.columns}, {detail::experts, c.features, c.columns}};
  }
  static Outputs<Shapes> outputs(Config const& c, Sequences const& s) { return {{s.tokens(), c.features}}; }
  static bool starts_from(Config const& c, std::string_view result) { return Operation<Linear>::starts_from(c, result); }
  static bool has_gradient(Config const& c, std::string_view input) { return Operation<Linear>::has_gradient(c, input); }
  static void draw(Config const&, Sequences const& s, Random&, HostGroup& inputs) {
    detail::draw_offsets(inputs.at("offsets"), s.tokens());
  }
  template <class B, class T> static void forward(B& backend, Config const&, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<Out<T>> y) {
    On<GroupedLinear, B>::forward(backend, x.offsets, x.x, x.w, y.y);
  }
  template <class B, class T>
  static void backward(B& backend, Config const& c, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<In<T>>, Outputs<In<T>> d_y,
                       Inputs<Out<T>> d_x) {
    On<GroupedLinear, B>::backward(backend, x.offsets, x.x, x.w, d_y.y, d_x.x, d_x.w, c.into);
  }
};

template <> struct Operation<Embedding> : PlainOperation {
  struct Config {
    Index columns = 0;
    Into into = Into::overwrite;
  };
  static constexpr Index vocabulary = 9;
  static std::vector<Config> sizes() { return {{70}, {7, Into::add}}; }
  template <class S> struct Inputs {
    Whole<S, 1> tokens;   // [N]
    Held<S, 2> table;     // [V, C]
    HYBRIDATTN_FIELDS(tokens, table)
  };
  template <class S> struct Outputs {
    Held<S, 2> y;   // [N, C]
    HYBRIDATTN_FIELDS(y)
  };
  static Inputs<Shapes> inputs(Config const& c, Sequences const& s) { return {{s.tokens()}, {vocabulary, c.columns}}; }
  static Outputs<Shapes> outputs(Config const& c, Sequences const& s) { return {{s.tokens(), c.columns}}; }
  static bool starts_from(Config const& c, std::string_view result) { return result == "d_table" && c.into == Into::add; }
  // The last token of the vocabulary does not occur.
  static void draw(Config const&, Sequences const&, Random& random, HostGroup& inputs) {
    detail::draw_whole(inputs.at("tokens"), random, 0, vocabulary - 1);
  }
  template <class B, class T> static void forward(B& backend, Config const&, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<Out<T>> y) {
    On<Embedding, B>::forward(backend, x.tokens, x.table, y.y);
  }
  template <class B, class T>
  static void backward(B& backend, Config const& c, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<In<T>>, Outputs<In<T>> d_y,
                       Inputs<Out<T>> d_x) {
    On<Embedding, B>::backward(backend, x.tokens, d_y.y, d_x.table, c.into);
  }
};

template <> struct Operation<CausalConv1d> : PlainOperation {
  struct Config {
    Index columns = 0, width = 0;
    Activation activation = Activation::silu;
    bool begins = false;   // without an initial state
  };
  static constexpr bool rows_stand_alone = false;
  static std::vector<Config> sizes() { return {{17, 4}, {5, 3, Activation::none}, {5, 4, Activation::silu, true}, {5, 1}, {5, 0}}; }
  template <class S> struct Inputs {
    Held<S, 2> x, w;            // [N, C], [C, W]
    State<S, 3> initial_state;  // [number of sequences, W - 1, C]
    HYBRIDATTN_FIELDS(x, w, initial_state)
  };
  template <class S> struct Outputs {
    Held<S, 2> y;
    State<S, 3> final_state;
    HYBRIDATTN_FIELDS(y, final_state)
  };
  static std::vector<std::pair<std::string_view, std::string_view>> in_place() { return {{"final_state", "initial_state"}}; }
  static Shape<3> states(Config const& c, Sequences const& s) {
    return c.width < 2 ? Shape<3>{} : Shape<3>{s.count(), c.width - 1, c.columns};
  }
  static Inputs<Shapes> inputs(Config const& c, Sequences const& s) {
    return {{s.tokens(), c.columns}, {c.columns, c.width}, c.begins ? Shape<3>{} : states(c, s)};
  }
  static Outputs<Shapes> outputs(Config const& c, Sequences const& s) { return {{s.tokens(), c.columns}, states(c, s)}; }
  template <class B, class T>
  static void forward(B& backend, Config const& c, SequencesOn<B> const& s, Inputs<In<T>> x, Outputs<Out<T>> y) {
    On<CausalConv1d, B>::forward(backend, c.activation, s, x.x, x.w, x.initial_state, y.y, y.final_state);
  }
  template <class B, class T>
  static void backward(B& backend, Config const& c, SequencesOn<B> const& s, Inputs<In<T>> x, Outputs<In<T>>, Outputs<In<T>> d_y,
                       Inputs<Out<T>> d_x) {
    On<CausalConv1d, B>::backward(backend, c.activation, s, x.x, x.w, x.initial_state, d_y.y, d_y.final_state, d_x.x, d_x.w,
                                  d_x.initial_state);
  }
};

// ---- losses

// `scale` is the gradient of the loss, a number of the host.
struct LossOperation : PlainOperation {
  struct Config {
    Index columns = 0, vocabulary = 0;
    bool counts = true;   // any token
    double scale = 1;
  };
  static bool starts_from(Config const&, std::string_view result) { return result == "loss"; }
  static Config with_upstream(Config c, HostGroup const& d_outputs) {
    c.scale = d_outputs.at("loss").values[0];
    return c;
  }
  // Some tokens are not counted. Without c.counts, no token is counted.
  static void draw(Config const& c, Sequences const&, Random& random, HostGroup& inputs) {
    detail::draw_whole(inputs.at("targets"), random, -1, c.counts ? c.vocabulary : 0);
    inputs.at("loss before").values = {2.5, 3, 1};
  }
};

template <> struct Operation<SoftmaxLoss> : LossOperation {
  static std::vector<Config> sizes() { return {{0, 21}, {0, 5}, {0, 5, false}}; }
  template <class S> struct Inputs {
    Held<S, 2> logits;     // [N, V]
    Whole<S, 1> targets;   // [N]
    HYBRIDATTN_FIELDS(logits, targets)
  };
  template <class S> struct Outputs {
    OfType<S, LossSum, 1> loss;   // [1]
    HYBRIDATTN_FIELDS(loss)
  };
  static std::vector<std::pair<std::string_view, std::string_view>> in_place() { return {{"d_logits", "logits"}}; }
  static Inputs<Shapes> inputs(Config const& c, Sequences const& s) { return {{s.tokens(), c.vocabulary}, {s.tokens()}}; }
  static Outputs<Shapes> outputs(Config const&, Sequences const&) { return {{1}}; }
  template <class B, class T> static void forward(B& backend, Config const&, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<Out<T>> y) {
    On<SoftmaxLoss, B>::forward(backend, x.logits, x.targets, View<double const, 1>{}, View<T, 2>{}, y.loss);
  }
  template <class B, class T>
  static void backward(B& backend, Config const& c, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<In<T>>, Outputs<In<T>>,
                       Inputs<Out<T>> d_x) {
    Tensor<LossSum, 1, B> again{backend, {1}};
    On<Fill, B>::forward(backend, LossSum{}, out(again));
    Tensor<double, 1, B> scale{backend, {1}};
    On<Fill, B>::forward(backend, c.scale, out(scale));
    On<SoftmaxLoss, B>::forward(backend, x.logits, x.targets, in(scale), d_x.logits, out(again));
  }
};

template <> struct Operation<CrossEntropy> : LossOperation {
  static std::vector<Config> sizes() { return {{12, 21}, {7, 5}, {7, 5, false}}; }  // in a batch of more rows than CrossEntropy::block_rows
  template <class S> struct Inputs {
    Held<S, 2> x, w;  // [N, C], [V, C]
    Whole<S, 1> targets;  // [N]
    HYBRIDATTN_FIELDS(x, w, targets)
  };
  template <class S> struct Outputs {
    OfType<S, LossSum, 1> loss;  // [1]
    HYBRIDATTN_FIELDS(loss)
  };
  static Inputs<Shapes> inputs(Config const& c, Sequences const& s) {
    return {{s.tokens(), c.columns}, {c.vocabulary, c.columns}, {s.tokens()}};
  }
  static Outputs<Shapes> outputs(Config const&, Sequences const&) { return {{1}}; }
  template <class B, class T> static void forward(B& backend, Config const&, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<Out<T>> y) {
    On<CrossEntropy, B>::forward(backend, x.x, x.w, x.targets, y.loss);
  }
  template <class B, class T>
  static void backward(B& backend, Config const& c, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<In<T>>, Outputs<In<T>>,
                       Inputs<Out<T>> d_x) {
    Tensor<LossSum, 1, B> again{backend, {1}};
    On<Fill, B>::forward(backend, LossSum{}, out(again));
    Tensor<double, 1, B> scale{backend, {1}};
    On<Fill, B>::forward(backend, c.scale, out(scale));
    On<CrossEntropy, B>::backward(backend, x.x, x.w, x.targets, in(scale), d_x.x, d_x.w, out(again));
  }
};

// ---- mixtures of experts

template <> struct Operation<TopK> : PlainOperation {
  struct Config {
    Index scores = 0, k = 0;
  };
  static std::vector<Config> sizes() { return {{40, 7}, {5, 8}, {40, 0}, {0, 3}}; }
  template <class S> struct Inputs {
    Held<S, 2> scores;  // [R, n]
    HYBRIDATTN_FIELDS(scores)
  };
  template <class S> struct Outputs {
    Whole<S, 2> indices;  // [R, k]
    HYBRIDATTN_FIELDS(indices)
  };
  static Inputs<Shapes> inputs(Config const& c, Sequences const& s) { return {{s.tokens(), c.scores}}; }
  static Outputs<Shapes> outputs(Config const& c, Sequences const& s) { return {{s.tokens(), c.k}}; }
  template <class B, class T> static void forward(B& backend, Config const&, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<Out<T>> y) {
    On<TopK, B>::forward(backend, x.scores, y.indices);
  }
};

// `use` is the sum of all probabilities of an expert, whose gradient is the same for every token.
template <> struct Operation<Route> : PlainOperation {
  struct Config {
    Route::Options options;
    bool balanced = true;
  };
  static constexpr Index experts = 5, top_k = 2;
  static std::vector<Config> sizes() { return {{{.renormalise = true}}, {{.renormalise = false}}, {{.renormalise = true}, false}}; }
  template <class S> struct Inputs {
    Held<S, 2> logits;  // [N, E]
    HYBRIDATTN_FIELDS(logits)
  };
  template <class S> struct Outputs {
    Wide<S, 2> probabilities, weights;  // [N, E], [N, k]
    Whole<S, 2> experts;  // [N, k]
    Wide<S, 1> use;  // [E]
    HYBRIDATTN_FIELDS(probabilities, weights, experts, use)
  };
  static Inputs<Shapes> inputs(Config const&, Sequences const& s) { return {{s.tokens(), experts}}; }
  static Outputs<Shapes> outputs(Config const& c, Sequences const& s) {
    return {{s.tokens(), experts}, {s.tokens(), top_k}, {s.tokens(), top_k}, c.balanced ? Shape<1>{experts} : Shape<1>{}};
  }
  static bool takes_gradient(Config const&, std::string_view output) { return output != "probabilities"; }
  // Logits so far apart that rounding does not change a choice.
  static void draw(Config const&, Sequences const& s, Random& random, HostGroup& inputs) {
    HostTensor& logits = inputs.at("logits");
    for (Index n = 0; n < s.tokens(); ++n)
      for (Index e = 0; e < experts; ++e) logits.row(n)[e] = static_cast<double>((e * 2 + n) % experts) / 2 + random.uniform(0, 0.25);
  }
  template <class B, class T>
  static void forward(B& backend, Config const& c, SequencesOn<B> const& s, Inputs<In<T>> x, Outputs<Out<T>> y) {
    On<Route, B>::forward(backend, c.options, x.logits, y.probabilities, y.weights, y.experts);
    if (!c.balanced) return;
    On<Fill, B>::forward(backend, wide_t<T>(0), y.use);
    for (Index n = 0; n < s.tokens(); ++n) On<Add, B>::forward(backend, View<wide_t<T> const, 1>{y.probabilities.row(n), {experts}}, y.use);
  }
  template <class B, class T>
  static void backward(B& backend, Config const& c, SequencesOn<B> const&, Inputs<In<T>>, Outputs<In<T>> y, Outputs<In<T>> d_y,
                       Inputs<Out<T>> d_x) {
    On<Route, B>::backward(backend, c.options, y.probabilities, y.weights, y.experts, d_y.weights, d_y.use, d_x.logits);
  }
};

template <> struct Operation<Permute> : PlainOperation {
  struct Config {
    Index top_k = 0;
  };
  static std::vector<Config> sizes() { return {{2}, {1}}; }
  static bool has_tables(Config const&) { return true; }
  template <class S> struct Inputs {
    Whole<S, 2> experts;  // [N, k]
    HYBRIDATTN_FIELDS(experts)
  };
  template <class S> struct Outputs {
    Whole<S, 1> offsets;  // [E + 1]
    Whole<S, 2> places;  // [N, k]
    HYBRIDATTN_FIELDS(offsets, places)
  };
  static Inputs<Shapes> inputs(Config const& c, Sequences const& s) { return {{s.tokens(), c.top_k}}; }
  static Outputs<Shapes> outputs(Config const& c, Sequences const& s) { return {{detail::experts + 1}, {s.tokens(), c.top_k}}; }
  static void draw(Config const&, Sequences const&, Random&, HostGroup& inputs) {
    Random random{Seed{1}, "experts"};
    detail::draw_whole(inputs.at("experts"), random, 0, detail::experts - 1);  // the last one is idle
  }
  template <class B, class T> static void forward(B& backend, Config const&, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<Out<T>> y) {
    On<Permute, B>::forward(backend, x.experts, y.offsets, y.places);
  }
};

// An operation on the rows of two choices of each token.
struct PlacedOperation : PlainOperation {
  struct Config {
    Index columns = 0;
    Into into = Into::overwrite;
  };
  static constexpr Index top_k = 2;
  static bool has_tables(Config const&) { return true; }
  static Shape<2> tokens(Config const& c, Sequences const& s) { return {s.tokens(), c.columns}; }
  static Shape<2> rows(Config const& c, Sequences const& s) { return {s.tokens() * top_k, c.columns}; }
  static Shape<2> choices(Sequences const& s) { return {s.tokens(), top_k}; }
  static void draw(Config const&, Sequences const&, Random&, HostGroup& inputs) { detail::draw_places(inputs.at("places")); }
};

template <> struct Operation<Distribute> : PlacedOperation {
  static std::vector<Config> sizes() { return {{20}, {7, Into::add}}; }
  template <class S> struct Inputs {
    Held<S, 2> x;  // [N, C]
    Whole<S, 2> places;  // [N, k]
    HYBRIDATTN_FIELDS(x, places)
  };
  template <class S> struct Outputs {
    Held<S, 2> rows;  // [N k, C]
    HYBRIDATTN_FIELDS(rows)
  };
  static Inputs<Shapes> inputs(Config const& c, Sequences const& s) { return {tokens(c, s), choices(s)}; }
  static Outputs<Shapes> outputs(Config const& c, Sequences const& s) { return {rows(c, s)}; }
  static bool starts_from(Config const& c, std::string_view result) { return result == "d_x" && c.into == Into::add; }
  template <class B, class T> static void forward(B& backend, Config const&, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<Out<T>> y) {
    On<Distribute, B>::forward(backend, x.x, x.places, y.rows);
  }
  template <class B, class T>
  static void backward(B& backend, Config const& c, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<In<T>>, Outputs<In<T>> d_y,
                       Inputs<Out<T>> d_x) {
    On<Distribute, B>::backward(backend, x.places, d_y.rows, d_x.x, c.into);
  }
};

template <> struct Operation<Combine> : PlacedOperation {
  static std::vector<Config> sizes() { return {{20}, {7}}; }
  template <class S> struct Inputs {
    Held<S, 2> rows;  // [N k, C]
    Wide<S, 2> weights;  // [N, k]
    Whole<S, 2> places;  // [N, k]
    HYBRIDATTN_FIELDS(rows, weights, places)
  };
  template <class S> struct Outputs {
    Held<S, 2> y;  // [N, C]
    HYBRIDATTN_FIELDS(y)
  };
  static Inputs<Shapes> inputs(Config const& c, Sequences const& s) { return {rows(c, s), choices(s), choices(s)}; }
  static Outputs<Shapes> outputs(Config const& c, Sequences const& s) { return {tokens(c, s)}; }
  template <class B, class T> static void forward(B& backend, Config const&, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<Out<T>> y) {
    On<Combine, B>::forward(backend, x.rows, x.weights, x.places, y.y);
  }
  template <class B, class T>
  static void backward(B& backend, Config const&, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<In<T>>, Outputs<In<T>> d_y,
                       Inputs<Out<T>> d_x) {
    On<Combine, B>::backward(backend, x.rows, x.weights, x.places, d_y.y, d_x.rows, d_x.weights);
  }
};

template <> struct Operation<AddGated> : RowOperation {
  template <class S> struct Inputs {
    Held<S, 2> x, logit;  // [N, C], [N, 1]
    HYBRIDATTN_FIELDS(x, logit)
  };
  template <class S> struct Outputs {
    Held<S, 2> y;
    HYBRIDATTN_FIELDS(y)
  };
  static Inputs<Shapes> inputs(Config const& c, Sequences const& s) { return {rows(c, s), {s.tokens(), 1}}; }
  static Outputs<Shapes> outputs(Config const& c, Sequences const& s) { return {rows(c, s)}; }
  static bool starts_from(Config const&, std::string_view result) { return result == "y"; }
  template <class B, class T> static void forward(B& backend, Config const&, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<Out<T>> y) {
    On<AddGated, B>::forward(backend, x.x, x.logit, y.y);
  }
  template <class B, class T>
  static void backward(B& backend, Config const&, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<In<T>>, Outputs<In<T>> d_y,
                       Inputs<Out<T>> d_x) {
    On<AddGated, B>::backward(backend, x.x, x.logit, d_y.y, d_x.x, d_x.logit);
  }
};

template <> struct Operation<ExpertUse> : PlainOperation {
  struct Config {
    Index experts = 0;
  };
  static std::vector<Config> sizes() { return {{21}, {4}}; }  // more than one task has, and fewer
  static bool has_tables(Config const&) { return true; }
  template <class S> struct Inputs {
    Whole<S, 1> offsets;  // [E + 1]
    Wide<S, 2> probabilities;  // [N, E]
    HYBRIDATTN_FIELDS(offsets, probabilities)
  };
  template <class S> struct Outputs {
    OfType<S, double, 2> sums;  // [2, E]
    HYBRIDATTN_FIELDS(sums)
  };
  static Inputs<Shapes> inputs(Config const& c, Sequences const& s) { return {{c.experts + 1}, {s.tokens(), c.experts}}; }
  static Outputs<Shapes> outputs(Config const& c, Sequences const&) { return {{2, c.experts}}; }
  static bool starts_from(Config const&, std::string_view result) { return result == "sums"; }
  static void draw(Config const&, Sequences const&, Random&, HostGroup& inputs) {
    Random random{Seed{1}, "offsets"};
    double last = 0;
    set_each(inputs.at("offsets"), [&] { return std::exchange(last, last + static_cast<double>(random.below(9))); });
  }
  template <class B, class T> static void forward(B& backend, Config const&, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<Out<T>> y) {
    On<ExpertUse, B>::forward(backend, x.offsets, x.probabilities, y.sums);
  }
};

// The loss of one layer, from the sums of ExpertUse. The gradient of a probability is the same for every token.
template <> struct Operation<BalanceLoss> : PlainOperation {
  struct Config {
    Index experts = 0;
    double coefficient = 0, d_value = 0;
  };
  using Use = Operation<ExpertUse>;
  static std::vector<Config> sizes() { return {{21, 0.3}, {4, 1.5}}; }
  static bool has_tables(Config const&) { return true; }
  template <class S> using Inputs = Use::Inputs<S>;
  template <class S> struct Outputs {
    OfType<S, double, 1> value;  // [1]
    HYBRIDATTN_FIELDS(value)
  };
  static Inputs<Shapes> inputs(Config const& c, Sequences const& s) { return Use::inputs({c.experts}, s); }
  static Outputs<Shapes> outputs(Config const&, Sequences const&) { return {{1}}; }
  static bool starts_from(Config const&, std::string_view result) { return result == "value"; }
  static Config with_upstream(Config c, HostGroup const& d_outputs) {
    c.d_value = d_outputs.at("value").values[0];
    return c;
  }
  static void draw(Config const& c, Sequences const& s, Random& random, HostGroup& inputs) { Use::draw({c.experts}, s, random, inputs); }
  template <class B, class T>
  static void forward(B& backend, Config const& c, SequencesOn<B> const& s, Inputs<In<T>> x, Outputs<Out<T>> y) {
    auto const sums = sums_of<B, T>(backend, c, x);
    On<BalanceLoss, B>::forward(backend, c.coefficient, s.tokens(), in(sums), y.value);
  }
  template <class B, class T>
  static void backward(B& backend, Config const& c, SequencesOn<B> const& s, Inputs<In<T>> x, Outputs<In<T>>, Outputs<In<T>>,
                       Inputs<Out<T>> d_x) {
    auto const sums = sums_of<B, T>(backend, c, x);
    Tensor<wide_t<T>, 1, B> d_probability{backend, {c.experts}};
    On<BalanceLoss, B>::backward(backend, c.coefficient, s.tokens(), in(sums), c.d_value, out(d_probability));
    detail::copy_rows<wide_t<T>>(backend, in(d_probability), d_x.probabilities);
  }

 private:
  template <class B, class T> static Tensor<double, 2, B> sums_of(B& backend, Config const& c, Inputs<In<T>> x) {
    auto sums = zeros<double>(backend, Shape<2>{2, c.experts});
    On<ExpertUse, B>::forward(backend, x.offsets, x.probabilities, out(sums));
    return sums;
  }
};

// ---- the optimizer

// One tensor of parameters, in several blocks.
struct AdamWOperation : PlainOperation {
  struct Config {
    Index count = 0;
    double rate = 0;
  };
  static std::vector<Config> sizes() { return {{AdamWTensor<float>::block + 5, 0.01}, {7, 0}}; }
  template <class S> struct Inputs {
    Wide<S, 1> g;
    HYBRIDATTN_FIELDS(g)
  };
  static Inputs<Shapes> inputs(Config const& c, Sequences const&) { return {{c.count}}; }
  template <class E, class B> static Tensor<E, 1, B> on_machine(B& backend, E const& element) {
    Tensor<E, 1, B> tensor{backend, {1}};
    upload(backend, std::vector<E>{element}, tensor);
    return tensor;
  }
  static AdamWRates rates(Config const& c) { return {c.rate, 0.9, 0.95, 1e-8, 0.1, 0.1, 0.05, 0.7}; }
};

template <> struct Operation<AdamWSquares> : AdamWOperation {
  template <class S> struct Outputs {
    OfType<S, double, 1> squares;  // [1]
    HYBRIDATTN_FIELDS(squares)
  };
  static Outputs<Shapes> outputs(Config const&, Sequences const&) { return {{1}}; }
  template <class B, class T> static void forward(B& backend, Config const& c, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<Out<T>> y) {
    auto const table = on_machine(backend, AdamWTensor<wide_t<T>>{nullptr, x.g.data, nullptr, nullptr, c.count, 0});
    On<AdamWSquares, B>::forward(backend, in(table), y.squares);
  }
};

// A step, and the fault that its check finds.
template <> struct Operation<AdamWStep> : AdamWOperation {
  template <class S> struct Outputs {
    Wide<S, 1> p, m, v;
    OfType<S, StepFault, 1> found;  // [1]
    HYBRIDATTN_FIELDS(p, m, v, found)
  };
  static Outputs<Shapes> outputs(Config const& c, Sequences const&) { return {{c.count}, {c.count}, {c.count}, {1}}; }
  static bool starts_from(Config const&, std::string_view result) { return result != "found"; }
  static void draw(Config const&, Sequences const&, Random&, HostGroup& inputs) {
    for (double& v : inputs.at("v before").values) v = std::abs(v);
  }
  template <class B, class T> static void forward(B& backend, Config const& c, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<Out<T>> y) {
    auto const table = on_machine(backend, AdamWTensor<wide_t<T>>{y.p.data, x.g.data, y.m.data, y.v.data, c.count, 0});
    auto const its_rates = on_machine(backend, rates(c));
    auto const numbers = on_machine(backend, StepNumbers{});
    On<AdamWCheck, B>::forward(backend, in(table), in(its_rates), in(numbers), y.found);
    On<AdamWStep, B>::forward(backend, in(table), in(its_rates), in(numbers));
  }
};

// The operations that the laws judge. AdamWCheck is judged with AdamWStep.
using AllOperations = std::tuple<Fill, Add, AddWeighted, Swiglu, SigmoidGate, GdnGate, RmsNorm, GatedRmsNorm, LayerNorm, L2Norm, RopeAngles,
                                 Rope, Linear, GroupedLinear, Embedding, CausalConv1d, SoftmaxLoss, CrossEntropy, TopK, Route, Permute,
                                 Distribute, Combine, AddGated, ExpertUse, BalanceLoss, AdamWSquares, AdamWStep>;

}  // namespace hybridattn::inline HYBRIDATTN_ABI::testing
#endif
