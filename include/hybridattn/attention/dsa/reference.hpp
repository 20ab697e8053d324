// Equations (1) to (7) of dsa.hpp as loops, for any scalar. Slow and short: the laws judge the kernels by these loops. The choice
// is a function of its own, so a kernel can be judged on the keys that it chose itself.
#ifndef HYBRIDATTN_ATTENTION_DSA_REFERENCE_HPP
#define HYBRIDATTN_ATTENTION_DSA_REFERENCE_HPP

#include <hybridattn/attention/dsa/dsa.hpp>
#include <hybridattn/core/math.hpp>

#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

namespace hybridattn::inline HYBRIDATTN_ABI::dsa::reference {

// I_ts of query n and key s, both counted from the start of the batch.
template <class T> T score(Config const& c, Inputs<In<T>> x, Index n, Index s) {
  T sum = 0;
  for (Index j = 0; j < c.index_heads; ++j) {
    T const product = static_cast<T>(c.index_scale) * dot(x.index_q.row(n, j), x.index_k.row(s), c.index_dim);
    sum += x.index_w(n, j) * (product < 0 ? T(0) : product);                                                        // (1)
  }
  return sum;
}
// I_ts of query t of a sequence, for s = 0 .. t.
template <class T> std::vector<T> index_scores(Config const& c, Sequence sequence, Inputs<In<T>> x, Index t) {
  std::vector<T> scores;
  for (Index s = 0; s <= t; ++s) scores.push_back(score(c, x, sequence.start + t, sequence.start + s));
  return scores;
}

// The places of the k largest scores, ascending, then -1. Of equal scores the smaller place is chosen. NaN of either sign ranks below
// all numbers, -infinity too; of NaNs the smaller place is chosen.
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

// Calls f(n, keys): query n attends to the tokens `keys`. These are the keys in indices, or without indices all keys that it sees.
template <class F> void for_each_query(Sequences const& s, View<std::int32_t const, 2> indices, F f) {
  for (Sequence const sequence : s)
    for (Index t = 0; t < sequence.length; ++t) {
      std::vector<Index> keys;
      if (indices.empty())
        for (Index key = 0; key <= t; ++key) keys.push_back(sequence.start + key);
      else
        for (Index i = 0, n = sequence.start + t; i < indices.extent(1) && indices(n, i) >= 0; ++i)
          keys.push_back(sequence.start + indices(n, i));
      f(sequence.start + t, keys);
    }
}
// Calls f(n, h, hk, keys): head h of query n reads the keys of head hk.
template <class F> void for_each_head(Config const& c, Sequences const& s, View<std::int32_t const, 2> indices, F f) {
  for_each_query(s, indices, [&](Index n, std::vector<Index> const& keys) {
    for (Index h = 0; h < c.num_heads; ++h) f(n, h, h / (c.num_heads / c.num_kv_heads), keys);
  });
}

template <class T>
void attend(Config const& c, Sequences const& s, Inputs<In<T>> x, View<std::int32_t const, 2> indices, Outputs<Out<T>> y,
            Wide<Out<T>, 2> lse) {
  Index const D = c.head_dim;
  T const scale = static_cast<T>(c.scale);
  for_each_head(c, s, indices, [&](Index n, Index h, Index hk, std::vector<Index> const& keys) {
    T largest = -std::numeric_limits<T>::infinity(), sum = 0;
    for (Index key : keys) largest = std::max(largest, scaled_dot(scale, x.q.row(n, h), x.k.row(key, hk), D));
    std::fill_n(y.o.row(n, h), D, T(0));
    for (Index key : keys) {
      T const p = std::exp(scaled_dot(scale, x.q.row(n, h), x.k.row(key, hk), D) - largest);
      sum += p;
      axpy(p, x.v.row(key, hk), y.o.row(n, h), D);
    }
    for (Index d = 0; d < D; ++d) y.o.row(n, h)[d] /= sum;
    lse(n, h) = largest + std::log(sum);                                                                            // (3)
  });
}

// The indexer's distribution over one query's keys, and its target.
template <class T> std::vector<T> scores_of(Config const& c, Inputs<In<T>> x, Index n, std::vector<Index> const& keys) {
  std::vector<T> scores;
  for (Index key : keys) scores.push_back(score(c, x, n, key));
  return scores;
}
template <class T>
std::vector<T> shares_of(Config const& c, Inputs<In<T>> x, Wide<In<T>, 2> lse, Index n, std::vector<Index> const& keys) {
  std::vector<T> p;
  for (Index key : keys) {
    T sum = 0;
    for (Index h = 0; h < c.num_heads; ++h) {
      T const *q = x.q.row(n, h), *k = x.k.row(key, h / (c.num_heads / c.num_kv_heads));
      sum += std::exp(scaled_dot(static_cast<T>(c.scale), q, k, c.head_dim) - lse(n, h));
    }
    p.push_back(sum / static_cast<T>(c.num_heads));                                                                 // (5)
  }
  return p;
}

// Takes the lse that attend computed.
template <class T>
void index_loss(Config const& c, Sequences const& s, Inputs<In<T>> x, View<std::int32_t const, 2> indices, Wide<In<T>, 2> lse,
                Wide<Out<T>, 1> index_lse, State<Out<T>, 1> loss) {
  loss(0) = 0;
  for_each_query(s, indices, [&](Index n, std::vector<Index> const& keys) {
    auto const scores = scores_of<T>(c, x, n, keys), p = shares_of<T>(c, x, lse, n, keys);
    T const largest = *std::max_element(scores.begin(), scores.end());
    T sum = 0;
    for (T score : scores) sum += std::exp(score - largest);
    index_lse(n) = largest + std::log(sum);                                                                         // (5)
    for (std::size_t i = 0; i < keys.size(); ++i) {
      T const log_r = scores[i] - index_lse(n);
      loss(0) += (p[i] > 0 ? p[i] * (std::log(p[i]) - log_r) : T(0)) + (std::exp(log_r) - p[i]);                    // (6)
    }
  });
}

template <class T>
void forward(SparseOptions o, Config const& c, Sequences const& s, Inputs<In<T>> x, Outputs<Out<T>> y, Saved<Out<T>> saved) {
  if (c.stage != Stage::dense_warm_up) select(o, c, s, x, saved.indices);
  attend<T>(c, s, x, saved.indices, y, saved.lse);
  if (!y.auxiliary_loss.empty()) y.auxiliary_loss(0) = 0;
  if (c.stage != Stage::language_model) index_loss<T>(c, s, x, saved.indices, saved.lse, saved.index_lse, y.auxiliary_loss);
}

// An empty view gets no gradient.
template <class T, int Rank> void set_zero(View<T, Rank> x) {
  for (Index n = 0; !x.empty() && n < x.extent(0); ++n) {
    if constexpr (Rank == 2) std::fill_n(x.row(n), x.extent(1), T(0));
    else
      for (Index h = 0; h < x.extent(1); ++h) std::fill_n(x.row(n, h), x.extent(2), T(0));
  }
}

// (4), added to d_x.
template <class T>
void attend_backward(Config const& c, Sequences const& s, Inputs<In<T>> x, Outputs<In<T>> y, Saved<In<T>> saved, View<T const, 3> d_o,
                     Inputs<Out<T>> d_x) {
  Index const D = c.head_dim;
  T const scale = static_cast<T>(c.scale);
  for_each_head(c, s, saved.indices, [&](Index n, Index h, Index hk, std::vector<Index> const& keys) {
    T const *q = x.q.row(n, h), delta = dot(d_o.row(n, h), y.o.row(n, h), D);
    for (Index key : keys) {
      T const p = std::exp(scaled_dot(scale, q, x.k.row(key, hk), D) - saved.lse(n, h));
      T const d_s = scale * p * (dot(d_o.row(n, h), x.v.row(key, hk), D) - delta);
      axpy(d_s, x.k.row(key, hk), d_x.q.row(n, h), D);
      axpy(d_s, q, d_x.k.row(key, hk), D);
      axpy(p, d_o.row(n, h), d_x.v.row(key, hk), D);
    }
  });
}
// (7), added to d_x.
template <class T>
void index_loss_backward(Config const& c, Sequences const& s, Inputs<In<T>> x, Saved<In<T>> saved, T d_loss, Inputs<Out<T>> d_x) {
  Index const DI = c.index_dim;
  T const scale = static_cast<T>(c.index_scale);
  for_each_query(s, saved.indices, [&](Index n, std::vector<Index> const& keys) {
    auto const scores = scores_of<T>(c, x, n, keys), p = shares_of<T>(c, x, saved.lse, n, keys);
    for (std::size_t i = 0; i < keys.size(); ++i) {
      T const d_score = d_loss * (std::exp(scores[i] - saved.index_lse(n)) - p[i]), *k = x.index_k.row(keys[i]);
      for (Index j = 0; j < c.index_heads; ++j) {
        T const *q = x.index_q.row(n, j), z = scale * dot(q, k, DI);
        T const d_z = z > 0 ? scale * x.index_w(n, j) * d_score : T(0);
        axpy(d_z, k, d_x.index_q.row(n, j), DI);
        axpy(d_z, q, d_x.index_k.row(keys[i]), DI);
        d_x.index_w(n, j) += d_score * (z < 0 ? T(0) : z);
      }
    }
  });
}

template <class T>
void backward(SparseOptions, Config const& c, Sequences const& s, Inputs<In<T>> x, Outputs<In<T>> y, Saved<In<T>> saved, Outputs<In<T>> d_y,
              Inputs<Out<T>> d_x) {
  zip([](Path const&, auto const& gradient) { set_zero(gradient); }, d_x);
  if (!d_y.o.empty()) attend_backward<T>(c, s, x, y, saved, d_y.o, d_x);
  if (c.stage != Stage::language_model && !d_y.auxiliary_loss.empty())
    index_loss_backward<T>(c, s, x, saved, static_cast<T>(d_y.auxiliary_loss(0)), d_x);
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::dsa::reference
#endif
