// The steps around the gated delta rule in a layer: short convolutions, L2 norms and gates before it, a gated norm after it.
//   q, k = l2_norm(silu(conv(raw)))      v = silu(conv(raw))      g, beta from their projections (ops/gdn_gate)
//   y = RMSNorm(o) w silu(z), one weight [V] for all heads
#ifndef HYBRIDATTN_ATTENTION_GDN_STEPS_HPP
#define HYBRIDATTN_ATTENTION_GDN_STEPS_HPP

#include <hybridattn/attention/gdn/types.hpp>
#include <hybridattn/attention/policy.hpp>
#include <hybridattn/ops/arithmetic/arithmetic.hpp>
#include <hybridattn/ops/causal_conv1d/causal_conv1d.hpp>
#include <hybridattn/ops/gdn_gate/gdn_gate.hpp>
#include <hybridattn/ops/l2_norm/l2_norm.hpp>
#include <hybridattn/ops/rms_norm/rms_norm.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI::gdn {

template <class S> struct PrepareParams {
  Held<S, 2> conv_q, conv_k, conv_v;  // [channels, conv_width]; the last tap multiplies the token itself
  Wide<S, 1> a_log, dt_bias;          // [HV]
  HYBRIDATTN_FIELDS(conv_q, conv_k, conv_v, a_log, dt_bias)
};

template <GdnOptions O> struct Prepare {
  template <class S> using Params = PrepareParams<S>;

  static constexpr bool makes(std::string_view) { return true; }

  static Params<Shapes> params(Config const& c) {
    Shape<2> const keys{size_product(c.num_heads, c.key_dim), O.conv_width};
    return {.conv_q = keys,
            .conv_k = keys,
            .conv_v = {size_product(c.num_value_heads, c.value_dim), O.conv_width},
            .a_log = {c.num_value_heads},
            .dt_bias = {c.num_value_heads}};
  }
  static Params<Starts> starts(Config const& c) {
    double const bound = O.conv_width == 0 ? 0 : 1 / std::sqrt(static_cast<double>(O.conv_width));
    Initial const conv = Initial::uniform(-bound, bound), rate{Initial::Kind::log_uniform_value, 0.01, 16};
    Initial const step =
        c.gate_start == GateStart::fla ? Initial{Initial::Kind::inverse_softplus_of_log_uniform, 1e-3, 0.1} : Initial::constant(1);
    return {.conv_q = conv, .conv_k = conv, .conv_v = conv, .a_log = rate, .dt_bias = step};
  }

  template <class B, class T>
  static void forward(B& backend, Config const&, SequencesOn<B> const& s, Inputs<Narrow<In<T>>> raw, Params<In<T>> p, Inputs<Out<T>> x) {
    convolve(backend, s, raw.q, p.conv_q, x.q);
    convolve(backend, s, raw.k, p.conv_k, x.k);
    convolve(backend, s, raw.v, p.conv_v, x.v);
    normalise_and_gate(backend, raw, p, x);
  }
  // The convolutions start from the earlier tokens in the cache.
  template <class B, class T>
  static void extend(B& backend, Config const&, SequencesOn<B> const& s, Inputs<Narrow<In<T>>> raw, Params<In<T>> p, Cache<Out<T>> cache,
                     Inputs<Out<T>> x) {
    convolve_on(backend, s, raw.q, p.conv_q, cache.conv_q, x.q);
    convolve_on(backend, s, raw.k, p.conv_k, cache.conv_k, x.k);
    convolve_on(backend, s, raw.v, p.conv_v, cache.conv_v, x.v);
    normalise_and_gate(backend, raw, p, x);
  }
  template <class B, class T>
  static void backward(B& backend, Config const&, SequencesOn<B> const& s, Inputs<Narrow<In<T>>> raw, Params<In<T>> p, Inputs<In<T>>,
                       Inputs<In<T>> d_x, Inputs<Narrow<Out<T>>> d_raw, Params<Out<T>> d_p) {
    unit_backward(backend, s, raw.q, p.conv_q, d_x.q, d_raw.q, d_p.conv_q);
    unit_backward(backend, s, raw.k, p.conv_k, d_x.k, d_raw.k, d_p.conv_k);
    convolve_backward(backend, s, raw.v, p.conv_v, d_x.v, d_raw.v, d_p.conv_v);
    On<GdnGate, B>::backward(backend, range, raw.g, raw.beta, p.a_log, p.dt_bias, d_x.g, d_x.beta, d_raw.g, d_raw.beta, d_p.a_log,
                             d_p.dt_bias);
  }

 private:
  static constexpr int range = O.negative_eigenvalues ? 2 : 1;

  template <class B, class T>
  static void normalise_and_gate(B& backend, Inputs<Narrow<In<T>>> const& raw, Params<In<T>> const& p, Inputs<Out<T>> const& x) {
    On<L2Norm, B>::forward(backend, head_rows(View<T const, 3>(x.q)), head_rows(x.q));
    On<L2Norm, B>::forward(backend, head_rows(View<T const, 3>(x.k)), head_rows(x.k));
    On<GdnGate, B>::forward(backend, range, raw.g, raw.beta, p.a_log, p.dt_bias, x.g, x.beta);
  }
  // A sequence without past tokens starts from zeros.
  template <class B, class T>
  static void convolve_on(B& backend, SequencesOn<B> const& s, View<T const, 3> raw, View<T const, 2> w, View<T, 3> state, View<T, 3> y) {
    for (Index i = 0; i < s.count() && !state.empty(); ++i)
      if (Sequence const sequence = s[static_cast<std::size_t>(i)]; sequence.past == 0 && sequence.length > 0)
        On<Fill, B>::forward(backend, T(0), View<T, 1>{state.row(i, 0), {state.extent(1) * state.extent(2)}});
    On<CausalConv1d, B>::forward(backend, Activation::silu, s, as_rows(raw), w, View<T const, 3>(state), as_rows(y), state);
  }
  template <class B, class T> static void convolve(B& backend, SequencesOn<B> const& s, View<T const, 3> raw, View<T const, 2> w,
                                                   View<T, 3> y) {
    On<CausalConv1d, B>::forward(backend, Activation::silu, s, as_rows(raw), w, View<T const, 3>{}, as_rows(y), View<T, 3>{});
  }
  template <class B, class T>
  static void convolve_backward(B& backend, SequencesOn<B> const& s, View<T const, 3> raw, View<T const, 2> w, View<T const, 3> d_y,
                                View<T, 3> d_raw, View<T, 2> d_w) {
    On<CausalConv1d, B>::backward(backend, Activation::silu, s, as_rows(raw), w, View<T const, 3>{}, as_rows(d_y), View<T const, 3>{},
                                  as_rows(d_raw), d_w, View<T, 3>{});
  }
  // Backward of the L2 norm and the convolution. Computes the convolution's output again.
  template <class B, class T>
  static void unit_backward(B& backend, SequencesOn<B> const& s, View<T const, 3> raw, View<T const, 2> w, View<T const, 3> d_y,
                            View<T, 3> d_raw, View<T, 2> d_w) {
    Tensor<T, 3, B> convolved{backend, raw.shape}, d_convolved{backend, raw.shape};
    convolve(backend, s, raw, w, out(convolved));
    On<L2Norm, B>::backward(backend, head_rows(in(convolved)), head_rows(d_y), head_rows(out(d_convolved)));
    convolve_backward(backend, s, raw, w, in(d_convolved), d_raw, d_w);
  }
};

template <class S> struct FinishParams {
  Wide<S, 1> norm;  // [V]
  HYBRIDATTN_FIELDS(norm)
};

template <GdnOptions O> struct Finish {
  static constexpr bool gated = O.output_gate;
  template <class S> using Params = FinishParams<S>;

  static Params<Shapes> params(Config const& c) { return {.norm = {c.value_dim}}; }
  static Params<Starts> starts(Config const&) { return {.norm = Initial::constant(1)}; }

  template <class B, class T>
  static void forward(B& backend, Config const& c, View<T const, 3> o, View<T const, 3> z, Params<In<T>> p, View<T, 3> y) {
    On<GatedRmsNorm, B>::forward(backend, c.norm_eps, head_rows(o), rows_or_none(z), p.norm, head_rows(y));
  }
  template <class B, class T>
  static void backward(B& backend, Config const& c, View<T const, 3> o, View<T const, 3> z, Params<In<T>> p, View<T const, 3> d_y,
                       View<T, 3> d_o, View<T, 3> d_z, Params<Out<T>> d_p) {
    On<GatedRmsNorm, B>::backward(backend, c.norm_eps, head_rows(o), rows_or_none(z), p.norm, head_rows(d_y), head_rows(d_o),
                                  rows_or_none(d_z), d_p.norm);
  }

 private:
  template <class T> static View<T, 2> rows_or_none(View<T, 3> z) { return z.empty() ? View<T, 2>{} : head_rows(z); }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::gdn
#endif
