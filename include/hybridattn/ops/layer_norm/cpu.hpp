#ifndef HYBRIDATTN_OPS_LAYER_NORM_CPU_HPP
#define HYBRIDATTN_OPS_LAYER_NORM_CPU_HPP

#include <hybridattn/backend/cpu/sum_rows.hpp>
#include <hybridattn/ops/layer_norm/layer_norm.hpp>
#include <hybridattn/tensor/in_float.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI {

// Plain loops: it normalises one small key a token, in a layer whose time goes elsewhere.
template <> struct On<LayerNorm, Cpu> : InFloat<LayerNorm, Cpu> {
  using InFloat::forward, InFloat::backward;
  template <std::floating_point T> static void forward(Cpu& cpu, double eps, View<T const, 2> x, Wide<In<T>, 1> w, Wide<In<T>, 1> b,
                                                       View<T, 2> y) {
    parallel_blocks(cpu, x.extent(0), cpu::sum_rows, [&](Index first, Index last) {
      for (Index n = first; n < last; ++n) {
        auto const [mean, rstd] = moments(x.row(n), x.extent(1), eps);
        for (Index c = 0; c < x.extent(1); ++c) y(n, c) = (x(n, c) - mean) * rstd * w(c) + b(c);
      }
    });
  }

  template <std::floating_point T>
  static void backward(Cpu& cpu, double eps, View<T const, 2> x, Wide<In<T>, 1> w, View<T const, 2> d_y, View<T, 2> d_x, Wide<Out<T>, 1> d_w,
                       Wide<Out<T>, 1> d_b) {
    Index const C = x.extent(1);
    cpu::sum_over_rows<T>(cpu, x.extent(0), d_w, [&](Index n, T* sum) {
      auto const [mean, rstd] = moments(x.row(n), C, eps);
      T g_mean = 0, along = 0;
      for (Index c = 0; c < C; ++c) {
        T const xh = (x(n, c) - mean) * rstd, g = d_y(n, c) * w(c);
        g_mean += g / static_cast<T>(C);
        along += g * xh / static_cast<T>(C);
        sum[c] += d_y(n, c) * xh;
      }
      for (Index c = 0; c < C; ++c) d_x(n, c) = rstd * (d_y(n, c) * w(c) - g_mean - (x(n, c) - mean) * rstd * along);
    });
    cpu::sum_over_rows<T>(cpu, x.extent(0), d_b, [&](Index n, T* sum) {
      for (Index c = 0; c < C; ++c) sum[c] += d_y(n, c);
    });
  }

 private:
  template <class T> struct Moments {
    T mean, rstd;
  };
  template <class T> static Moments<T> moments(T const* x, Index C, double eps) {
    T mean = 0, variance = 0;
    for (Index c = 0; c < C; ++c) mean += x[c] / static_cast<T>(C);
    for (Index c = 0; c < C; ++c) variance += (x[c] - mean) * (x[c] - mean) / static_cast<T>(C);
    return {mean, cpu::inverse_root(variance + static_cast<T>(eps))};
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
