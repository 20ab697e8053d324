// Equations (1) to (5) of full.hpp as loops, for any scalar. Slow and short: the laws judge the kernels by these loops.
#ifndef HYBRIDATTN_ATTENTION_FULL_REFERENCE_HPP
#define HYBRIDATTN_ATTENTION_FULL_REFERENCE_HPP

#include <hybridattn/attention/full/full.hpp>
#include <hybridattn/core/math.hpp>

#include <algorithm>
#include <limits>

namespace hybridattn::inline HYBRIDATTN_ABI::full::reference {

// Calls f(h, hk, i, first): query i of head h reads the keys first .. i of head hk; i and first count from the batch's first token.
template <class F> void for_each_query(FullOptions o, Config const& c, Sequences const& s, F f) {
  for (Sequence const sequence : s)
    for (Index h = 0; h < c.num_heads; ++h)
      for (Index i = 0; i < sequence.length; ++i)
        f(h, h / (c.num_heads / c.num_kv_heads), sequence.start + i,
          sequence.start + (o.window == 0 ? 0 : std::max<Index>(0, i + 1 - o.window)));
}

template <class T>
void forward(FullOptions o, Config const& c, Sequences const& s, Inputs<In<T>> x, Outputs<Out<T>> y, Saved<Out<T>> saved) {
  Index const D = c.head_dim;
  T const scale = static_cast<T>(c.scale);
  for_each_query(o, c, s, [&](Index h, Index hk, Index i, Index first) {
    T largest = -std::numeric_limits<T>::infinity(), sum = 0;
    for (Index j = first; j <= i; ++j) largest = std::max(largest, scaled_dot(scale, x.q.row(i, h), x.k.row(j, hk), D));
    std::fill_n(y.o.row(i, h), D, T(0));
    for (Index j = first; j <= i; ++j) {
      T const p = std::exp(scaled_dot(scale, x.q.row(i, h), x.k.row(j, hk), D) - largest);
      sum += p;
      axpy(p, x.v.row(j, hk), y.o.row(i, h), D);                                            // (3)
    }
    for (Index d = 0; d < D; ++d) y.o.row(i, h)[d] /= sum;
    saved.lse(i, h) = largest + std::log(sum);                                              // (2)
  });
}

template <class T>
void backward(FullOptions o, Config const& c, Sequences const& s, Inputs<In<T>> x, Outputs<In<T>> y, Saved<In<T>> saved, Outputs<In<T>> d_y,
              Inputs<Out<T>> d_x) {
  Index const D = c.head_dim;
  T const scale = static_cast<T>(c.scale);
  for (Index n = 0; n < s.tokens(); ++n)
    for (Index hk = 0; hk < c.num_kv_heads; ++hk) {
      std::fill_n(d_x.k.row(n, hk), D, T(0));
      std::fill_n(d_x.v.row(n, hk), D, T(0));
    }
  for_each_query(o, c, s, [&](Index h, Index hk, Index i, Index first) {
    T const *q = x.q.row(i, h), *d_o = d_y.o.row(i, h), delta = dot(d_o, y.o.row(i, h), D);
    std::fill_n(d_x.q.row(i, h), D, T(0));
    for (Index j = first; j <= i; ++j) {
      T const p = std::exp(scaled_dot(scale, q, x.k.row(j, hk), D) - saved.lse(i, h));
      T const d_s = scale * p * (dot(d_o, x.v.row(j, hk), D) - delta);                      // (4)
      axpy(d_s, x.k.row(j, hk), d_x.q.row(i, h), D);                                        // (5)
      axpy(d_s, q, d_x.k.row(j, hk), D);
      axpy(p, d_o, d_x.v.row(j, hk), D);
    }
  });
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::full::reference
#endif
