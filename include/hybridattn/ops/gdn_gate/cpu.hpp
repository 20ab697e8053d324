#ifndef HYBRIDATTN_OPS_GDN_GATE_CPU_HPP
#define HYBRIDATTN_OPS_GDN_GATE_CPU_HPP

#include <hybridattn/backend/cpu/sum_rows.hpp>
#include <hybridattn/core/math.hpp>
#include <hybridattn/ops/gdn_gate/gdn_gate.hpp>
#include <hybridattn/tensor/in_float.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI {

// Plain loops: one number a head and token.
template <> struct On<GdnGate, Cpu> : InFloat<GdnGate, Cpu> {
  using InFloat::forward, InFloat::backward;
  template <std::floating_point T>
  static void forward(Cpu& cpu, int range, View<T const, 2> a, View<T const, 2> b, Wide<In<T>, 1> a_log, Wide<In<T>, 1> dt_bias,
                      Wide<Out<T>, 2> g, Wide<Out<T>, 2> beta) {
    parallel_blocks(cpu, a.extent(0), cpu::sum_rows, [&](Index first, Index last) {
      for (Index n = first; n < last; ++n)
        for (Index h = 0; h < a.extent(1); ++h) {
          g(n, h) = -std::exp(a_log(h)) * softplus(a(n, h) + dt_bias(h));
          beta(n, h) = static_cast<T>(range) * sigmoid(b(n, h));
        }
    });
  }

  template <std::floating_point T>
  static void backward(Cpu& cpu, int range, View<T const, 2> a, View<T const, 2> b, Wide<In<T>, 1> a_log, Wide<In<T>, 1> dt_bias,
                       Wide<In<T>, 2> d_g, Wide<In<T>, 2> d_beta, View<T, 2> d_a, View<T, 2> d_b, Wide<Out<T>, 1> d_a_log,
                       Wide<Out<T>, 1> d_dt_bias) {
    cpu::sum_over_rows<T>(cpu, a.extent(0), d_a_log, [&](Index n, T* sum) {
      for (Index h = 0; h < a.extent(1); ++h) {
        T const rate = -std::exp(a_log(h)), shifted = a(n, h) + dt_bias(h), open = sigmoid(b(n, h));
        d_a(n, h) = rate * sigmoid(shifted) * d_g(n, h);
        d_b(n, h) = static_cast<T>(range) * open * (T(1) - open) * d_beta(n, h);
        sum[h] += rate * softplus(shifted) * d_g(n, h);
      }
    });
    cpu::sum_over_rows<T>(cpu, a.extent(0), d_dt_bias, [&](Index n, T* sum) {
      for (Index h = 0; h < a.extent(1); ++h) sum[h] += d_a(n, h);
    });
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
