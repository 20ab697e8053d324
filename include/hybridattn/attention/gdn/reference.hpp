// Equations (1) to (7) of gdn.hpp as loops, for any scalar. Slow and short: the laws judge the kernels by these loops.
#ifndef HYBRIDATTN_ATTENTION_GDN_REFERENCE_HPP
#define HYBRIDATTN_ATTENTION_GDN_REFERENCE_HPP

#include <hybridattn/attention/gdn/gdn.hpp>
#include <hybridattn/core/math.hpp>

#include <algorithm>
#include <cmath>
#include <vector>

namespace hybridattn::inline HYBRIDATTN_ABI::gdn::reference {

// Calls f(i, h, hk): value head h of sequence i, with the queries and keys of head hk.
template <class F> void for_each_head(Config const& c, Sequences const& s, F f) {
  for (Index i = 0; i < s.count(); ++i)
    for (Index h = 0; h < c.num_value_heads; ++h) f(s[static_cast<std::size_t>(i)], i, h, h / (c.num_value_heads / c.num_heads));
}
// The state [K, V] of one head; zeros for an empty view.
template <class T> void read_state(View<T const, 4> states, Index i, Index h, Index K, Index V, T* S) {
  std::fill_n(S, K * V, T(0));
  for (Index a = 0; !states.empty() && a < K; ++a) std::copy_n(states.row(i, h, a), V, S + a * V);
}
template <class T> void write_state(T const* S, Index i, Index h, Index K, Index V, View<T, 4> states) {
  for (Index a = 0; !states.empty() && a < K; ++a) std::copy_n(S + a * V, V, states.row(i, h, a));
}

template <class T> void forward(Config const& c, Sequences const& s, Inputs<In<T>> x, Outputs<Out<T>> y, Saved<Out<T>> saved) {
  Index const K = c.key_dim, V = c.value_dim;
  std::vector<T> state(static_cast<std::size_t>(K * V)), error(static_cast<std::size_t>(V));
  T *const S = state.data(), *const e = error.data();
  for_each_head(c, s, [&](Sequence sequence, Index i, Index h, Index hk) {
    read_state(x.initial_state, i, h, K, V, S);
    for (Index t = sequence.start; t < sequence.start + sequence.length; ++t) {
      T const *q = x.q.row(t, hk), *k = x.k.row(t, hk), decay = std::exp(x.g(t, h));
      for (Index j = 0; j < K * V; ++j) S[j] *= decay;                                        // (1)
      std::copy_n(x.v.row(t, h), V, e);
      for (Index a = 0; a < K; ++a) axpy(-k[a], S + a * V, e, V);                             // (2)
      for (Index a = 0; a < K; ++a) axpy(k[a] * x.beta(t, h), e, S + a * V, V);               // (3)
      std::fill_n(y.o.row(t, h), V, T(0));
      for (Index a = 0; a < K; ++a) axpy(static_cast<T>(c.scale) * q[a], S + a * V, y.o.row(t, h), V);  // (4)
      if (!saved.error.empty()) std::copy_n(e, V, saved.error.row(t, h));
    }
    write_state(S, i, h, K, V, y.final_state);
  });
}

// S_0, S_1, ..., S_T of one head, computed from the errors by (1) and (3).
template <class T>
std::vector<T> states(Config const& c, Sequence sequence, Index i, Index h, Index hk, Inputs<In<T>> x, Saved<In<T>> saved) {
  Index const K = c.key_dim, V = c.value_dim;
  std::vector<T> all(static_cast<std::size_t>((sequence.length + 1) * K * V));
  read_state(x.initial_state, i, h, K, V, all.data());
  for (Index n = 0; n < sequence.length; ++n) {
    Index const t = sequence.start + n;
    T const *before = all.data() + n * K * V, decay = std::exp(x.g(t, h));
    T* after = all.data() + (n + 1) * K * V;
    for (Index j = 0; j < K * V; ++j) after[j] = decay * before[j];
    for (Index a = 0; a < K; ++a) axpy(x.k(t, hk, a) * x.beta(t, h), saved.error.row(t, h), after + a * V, V);
  }
  return all;
}

template <class T>
void backward(Config const& c, Sequences const& s, Inputs<In<T>> x, Outputs<In<T>>, Saved<In<T>> saved, Outputs<In<T>> d_y,
              Inputs<Out<T>> d_x) {
  Index const K = c.key_dim, V = c.value_dim;
  T const scale = static_cast<T>(c.scale);
  std::vector<T> gradient(static_cast<std::size_t>(K * V)), projection(static_cast<std::size_t>(V)), zeros(static_cast<std::size_t>(V));
  T *const X = gradient.data(), *const u = projection.data();
  for (Index n = 0; n < s.tokens(); ++n)
    for (Index hk = 0; hk < c.num_heads; ++hk) {
      std::fill_n(d_x.q.row(n, hk), K, T(0));
      std::fill_n(d_x.k.row(n, hk), K, T(0));
    }
  for_each_head(c, s, [&](Sequence sequence, Index i, Index h, Index hk) {
    std::vector<T> const all = states(c, sequence, i, h, hk, x, saved);
    read_state(d_y.final_state, i, h, K, V, X);
    for (Index n = sequence.length; n-- > 0;) {
      Index const t = sequence.start + n;
      T const *before = all.data() + n * K * V, *after = before + K * V, decay = std::exp(x.g(t, h)), beta = x.beta(t, h);
      T const *q = x.q.row(t, hk), *k = x.k.row(t, hk), *e = saved.error.row(t, h);
      T const* const d_o = d_y.o.empty() ? zeros.data() : d_y.o.row(t, h);
      T* d_v = d_x.v.row(t, h);
      std::fill_n(u, V, T(0));
      for (Index a = 0; a < K; ++a) axpy(scale * q[a], d_o, X + a * V, V);                    // (5)
      for (Index a = 0; a < K; ++a) axpy(k[a], X + a * V, u, V);
      for (Index b = 0; b < V; ++b) d_v[b] = beta * u[b];
      d_x.beta(t, h) = dot(u, e, V);
      T through = 0;
      for (Index a = 0; a < K; ++a) {                                                         // (6)
        d_x.q(t, hk, a) += scale * dot(after + a * V, d_o, V);
        d_x.k(t, hk, a) += beta * dot(X + a * V, e, V) - decay * dot(before + a * V, d_v, V);
        axpy(-k[a], d_v, X + a * V, V);
        through += dot(X + a * V, before + a * V, V);
        for (Index b = 0; b < V; ++b) X[a * V + b] *= decay;
      }
      d_x.g(t, h) = decay * through;                                                          // (7)
    }
    write_state(X, i, h, K, V, d_x.initial_state);
  });
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::gdn::reference
#endif
