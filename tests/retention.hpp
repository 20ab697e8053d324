// A policy from outside the library: retention (arXiv 2307.08621), linear attention with a fixed decay per head.
//   (1) S_t = w S_{t-1} + k_t v_t^T    o_t = S_t^T q_t = sum_{s <= t} w^(t-s) (q_t . k_s) v_s    w = 1 - 2^-(2+h)
//   (2) X_t = w X_{t+1} + q_t d_o_t^T    d_q_t = S_t d_o_t    d_k_t = X_t v_t    d_v_t = X_t^T k_t
// S_0 = initial_state, final_state = S_T, X is the gradient of S.
#ifndef HYBRIDATTN_TESTS_RETENTION_HPP
#define HYBRIDATTN_TESTS_RETENTION_HPP

#include <hybridattn/attention/policy.hpp>
#include <hybridattn/backend/cpu/cpu.hpp>
#include <hybridattn/core/math.hpp>

namespace ha = hybridattn;

struct Retention : ha::PolicyDefaults {
  struct Config {
    ha::Index num_heads = 0, head_dim = 0;
  };
  template <class S> struct Inputs {
    ha::Held<S, 3> q, k, v;         // [N, H, D]
    ha::State<S, 4> initial_state;  // [number of sequences, H, D, D]
    HYBRIDATTN_FIELDS(q, k, v, initial_state)
  };
  template <class S> struct Outputs {
    ha::Held<S, 3> o;
    ha::State<S, 4> final_state;
    HYBRIDATTN_FIELDS(o, final_state)
  };
  template <class S> using Saved = ha::Nothing<S>;
  template <class S> struct Cache {
    ha::State<S, 4> state;  // [batch, H, D, D]
    HYBRIDATTN_FIELDS(state)
  };

  static Config complete(Config c, ha::Index model_dim, ha::Index num_heads) {
    if (c.num_heads == 0) c.num_heads = num_heads;
    return {c.num_heads, ha::default_head_dim(c.head_dim, model_dim, c.num_heads)};
  }
  static ha::Shape<3> heads(Config const& c, ha::Sequences const& s) { return {s.tokens(), c.num_heads, c.head_dim}; }
  static ha::Shape<4> states(Config const& c, ha::Sequences const& s) { return {s.count(), c.num_heads, c.head_dim, c.head_dim}; }
  static Inputs<ha::Shapes> inputs(Config const& c, ha::Sequences const& s) {
    return {heads(c, s), heads(c, s), heads(c, s), states(c, s)};
  }
  static Outputs<ha::Shapes> outputs(Config const& c, ha::Sequences const& s) { return {heads(c, s), states(c, s)}; }
  static Saved<ha::Shapes> saved(Config const&, ha::Sequences const&) { return {}; }
  static Cache<ha::Shapes> cache(Config const& c, ha::Index batch, ha::Index) { return {{batch, c.num_heads, c.head_dim, c.head_dim}}; }
};

template <> struct ha::On<Retention, ha::Cpu> : ha::InFloat<Retention, ha::Cpu> {
  using InFloat::forward, InFloat::backward, InFloat::extend;
  template <class T, class F>   // f(sequence, its number, head, w, state) for each head of each sequence
  static void for_each_head(Cpu& cpu, Retention::Config const& c, Sequences const& s, F f) {
    Tensor<T, 2, Cpu> states{cpu, {Index{cpu.threads()}, c.head_dim * c.head_dim}};
    parallel_for(cpu, s.count() * c.num_heads, [&](Index task, int thread) {
      Index const h = task % c.num_heads, i = task / c.num_heads;
      f(s[static_cast<std::size_t>(i)], i, h, static_cast<T>(1 - std::exp2(-2.0 - static_cast<double>(h))), out(states).row(thread));
    });
  }
  template <std::floating_point T>
  static void forward(Cpu& cpu, Retention::Config const& c, Sequences const& s, Retention::Inputs<In<T>> x, Retention::Outputs<Out<T>> y,
                      Nothing<Out<T>>) {
    for_each_head<T>(cpu, c, s, [&](Sequence sequence, Index i, Index h, T w, T* S) {
      Index const D = c.head_dim;
      for (Index a = 0; a < D; ++a) std::copy_n(x.initial_state.row(i, h, a), D, S + a * D);
      for (Index t = sequence.start; t < sequence.start + sequence.length; ++t) {                     // (1)
        std::fill_n(y.o.row(t, h), D, T(0));
        for (Index a = 0; a < D; ++a) {
          for (Index b = 0; b < D; ++b) S[a * D + b] = w * S[a * D + b] + x.k(t, h, a) * x.v(t, h, b);
          axpy(x.q(t, h, a), S + a * D, y.o.row(t, h), D);
        }
      }
      for (Index a = 0; a < D; ++a) std::copy_n(S + a * D, D, y.final_state.row(i, h, a));
    });
  }
  template <std::floating_point T>
  static void backward(Cpu& cpu, Retention::Config const& c, Sequences const& s, Retention::Inputs<In<T>> x, Retention::Outputs<In<T>>,
                       Nothing<In<T>>, Retention::Outputs<In<T>> d_y, Retention::Inputs<Out<T>> d_x) {
    for_each_head<T>(cpu, c, s, [&](Sequence sequence, Index i, Index h, T w, T* S) {
      Index const D = c.head_dim;
      for (Index a = 0; a < D; ++a) std::copy_n(x.initial_state.row(i, h, a), D, S + a * D);
      for (Index t = sequence.start; t < sequence.start + sequence.length; ++t)                       // (2)
        for (Index a = 0; a < D; ++a) {
          for (Index b = 0; b < D; ++b) S[a * D + b] = w * S[a * D + b] + x.k(t, h, a) * x.v(t, h, b);
          d_x.q(t, h, a) = dot(S + a * D, d_y.o.row(t, h), D);
        }
      T* const X = S;   // from here on, decayed at the end of each token
      for (Index a = 0; a < D; ++a) std::copy_n(d_y.final_state.row(i, h, a), D, X + a * D);
      for (Index t = sequence.start + sequence.length; t-- > sequence.start;) {
        std::fill_n(d_x.v.row(t, h), D, T(0));
        for (Index a = 0; a < D; ++a) {
          axpy(x.q(t, h, a), d_y.o.row(t, h), X + a * D, D);
          d_x.k(t, h, a) = dot(X + a * D, x.v.row(t, h), D);
          axpy(x.k(t, h, a), X + a * D, d_x.v.row(t, h), D);
          for (Index b = 0; b < D; ++b) X[a * D + b] *= w;
        }
      }
      for (Index a = 0; a < D; ++a) std::copy_n(X + a * D, D, d_x.initial_state.row(i, h, a));
    });
  }
  template <std::floating_point T>
  static void extend(Cpu& cpu, Retention::Config const& c, Sequences const& s, Retention::Inputs<In<T>> x, Retention::Cache<Out<T>> cache,
                     Retention::Outputs<Out<T>> y) {
    for (Index i = 0; i < s.count(); ++i)
      if (s[static_cast<std::size_t>(i)].past == 0) std::fill_n(cache.state.row(i, 0, 0), c.num_heads * c.head_dim * c.head_dim, T(0));
    x.initial_state = cache.state;
    y.final_state = cache.state;
    forward<T>(cpu, c, s, x, y, {});
  }
};

#endif
