// Equations (1) to (4) of dsa.hpp as loops, for any scalar. Slow and short: what the kernels are judged by. Choosing and
// attending stand apart, so that a kernel can be judged on the keys it chose itself.
#ifndef HYBRIDATTN_ATTENTION_DSA_REFERENCE_HPP
#define HYBRIDATTN_ATTENTION_DSA_REFERENCE_HPP

#include <hybridattn/attention/dsa/dsa.hpp>
#include <hybridattn/core/math.hpp>

#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

namespace hybridattn::dsa::reference {

// Of query t of a sequence: I_ts for s = 0 .. t.
template <class T> std::vector<T> index_scores(Config const& c, Sequence sequence, Inputs<In<T>> x, Index t) {
  std::vector<T> scores(static_cast<std::size_t>(t + 1));
  Index const n = sequence.start + t;
  for (Index s = 0; s <= t; ++s)
    for (Index j = 0; j < c.index_heads; ++j) {
      T const product = static_cast<T>(c.index_scale) * dot(x.index_q.row(n, j), x.index_k.row(sequence.start + s), c.index_dim);
      scores[static_cast<std::size_t>(s)] += x.index_w(n, j) * (product < 0 ? T(0) : product);                      // (1)
    }
  return scores;
}

// The places of the k largest scores, ascending, then -1. Equal scores go to the smaller place; NaN ranks below all numbers.
template <class T> void select(std::vector<T> const& scores, Index k, std::int32_t* indices) {
  std::vector<std::int32_t> order(scores.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](std::int32_t a, std::int32_t b) {                                       // (2)
    T const x = scores[static_cast<std::size_t>(a)], y = scores[static_cast<std::size_t>(b)];
    bool const x_first = x > y || (x == x && y != y), y_first = y > x || (y == y && x != x);
    return x_first || (!y_first && a < b);
  });
  Index const count = std::min(k, static_cast<Index>(order.size()));
  std::sort(order.begin(), order.begin() + count);
  std::fill_n(std::copy_n(order.begin(), count, indices), k - count, -1);
}
template <class T> void select(SparseOptions o, Config const& c, Sequences const& s, Inputs<In<T>> x, View<std::int32_t, 2> indices) {
  for (Sequence const sequence : s)
    for (Index t = 0; t < sequence.length; ++t) {
      Index const k = std::min(selection_size(o, sequence.length), indices.extent(1));
      std::fill_n(indices.row(sequence.start + t), indices.extent(1), -1);
      select(index_scores(c, sequence, x, t), k, indices.row(sequence.start + t));
    }
}

// f(n, h, hk, keys, count): query n, head h reads the keys start + keys[0 .. count) of head hk.
template <class F> void for_each_query(Config const& c, Sequences const& s, View<std::int32_t const, 2> indices, F f) {
  for (Sequence const sequence : s)
    for (Index n = sequence.start; n < sequence.start + sequence.length; ++n) {
      std::vector<Index> keys;
      for (Index i = 0; i < indices.extent(1) && indices(n, i) >= 0; ++i) keys.push_back(sequence.start + indices(n, i));
      for (Index h = 0; h < c.num_heads; ++h) f(n, h, h / (c.num_heads / c.num_kv_heads), keys);
    }
}

template <class T>
void attend(Config const& c, Sequences const& s, Inputs<In<T>> x, View<std::int32_t const, 2> indices, Outputs<Out<T>> y,
            Wide<Out<T>, 2> lse) {
  Index const D = c.head_dim;
  T const scale = static_cast<T>(c.scale);
  for_each_query(c, s, indices, [&](Index n, Index h, Index hk, std::vector<Index> const& keys) {
    T largest = -std::numeric_limits<T>::infinity(), sum = 0;
    for (Index key : keys) largest = std::max(largest, scale * dot(x.q.row(n, h), x.k.row(key, hk), D));
    std::fill_n(y.o.row(n, h), D, T(0));
    for (Index key : keys) {
      T const p = std::exp(scale * dot(x.q.row(n, h), x.k.row(key, hk), D) - largest);
      sum += p;
      axpy(p, x.v.row(key, hk), y.o.row(n, h), D);
    }
    for (Index d = 0; d < D; ++d) y.o.row(n, h)[d] /= sum;
    lse(n, h) = largest + std::log(sum);                                                                            // (3)
  });
}

template <class T>
void forward(SparseOptions o, Config const& c, Sequences const& s, Inputs<In<T>> x, Outputs<Out<T>> y, Saved<Out<T>> saved) {
  select(o, c, s, x, saved.indices);
  attend<T>(c, s, x, saved.indices, y, saved.lse);
  if (!y.auxiliary_loss.empty()) y.auxiliary_loss(0) = 0;
}

// Choosing has no gradient; a view that is not there wants none.
template <class T> void no_gradient(Config const& c, Sequences const& s, Inputs<Out<T>> d_x) {
  for (Index n = 0; n < s.tokens(); ++n) {
    if (!d_x.index_k.empty()) std::fill_n(d_x.index_k.row(n), c.index_dim, T(0));
    if (!d_x.index_w.empty()) std::fill_n(d_x.index_w.row(n), c.index_heads, T(0));
    for (Index j = 0; !d_x.index_q.empty() && j < c.index_heads; ++j) std::fill_n(d_x.index_q.row(n, j), c.index_dim, T(0));
  }
}

template <class T>
void backward(SparseOptions, Config const& c, Sequences const& s, Inputs<In<T>> x, Outputs<In<T>> y, Saved<In<T>> saved, Outputs<In<T>> d_y,
              Inputs<Out<T>> d_x) {
  Index const D = c.head_dim;
  T const scale = static_cast<T>(c.scale);
  for (Index n = 0; n < s.tokens(); ++n)
    for (Index hk = 0; hk < c.num_kv_heads; ++hk) {
      std::fill_n(d_x.k.row(n, hk), D, T(0));
      std::fill_n(d_x.v.row(n, hk), D, T(0));
    }
  for_each_query(c, s, saved.indices, [&](Index n, Index h, Index hk, std::vector<Index> const& keys) {
    T const *q = x.q.row(n, h), *d_o = d_y.o.row(n, h), delta = dot(d_o, y.o.row(n, h), D);
    std::fill_n(d_x.q.row(n, h), D, T(0));
    for (Index key : keys) {
      T const p = std::exp(scale * dot(q, x.k.row(key, hk), D) - saved.lse(n, h));
      T const d_s = scale * p * (dot(d_o, x.v.row(key, hk), D) - delta);                                            // (4)
      axpy(d_s, x.k.row(key, hk), d_x.q.row(n, h), D);
      axpy(d_s, q, d_x.k.row(key, hk), D);
      axpy(p, d_o, d_x.v.row(key, hk), D);
    }
  });
  no_gradient<T>(c, s, d_x);
}

}  // namespace hybridattn::dsa::reference
#endif
