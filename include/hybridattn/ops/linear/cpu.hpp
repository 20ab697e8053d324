#ifndef HYBRIDATTN_OPS_LINEAR_CPU_HPP
#define HYBRIDATTN_OPS_LINEAR_CPU_HPP

#include <hybridattn/backend/cpu/gemm.hpp>
#include <hybridattn/ops/linear/linear.hpp>
#include <hybridattn/tensor/in_float.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI {

template <> struct On<Linear, Cpu> : InFloat<Linear, Cpu> {
  using InFloat::forward, InFloat::backward;
  template <std::floating_point T> static void forward(Cpu& cpu, View<T const, 2> x, View<T const, 2> w, View<T, 2> y) {
    cpu::gemm<T>(cpu, operand(x), operand(w).transposed(), y);
  }
  template <std::floating_point T>
  static void backward(Cpu& cpu, View<T const, 2> x, View<T const, 2> w, View<T const, 2> d_y, View<T, 2> d_x, View<T, 2> d_w, Into into) {
    if (!d_x.empty()) cpu::gemm<T>(cpu, operand(d_y), operand(w), d_x, into);
    if (!d_w.empty()) cpu::gemm<T>(cpu, operand(d_y).transposed(), operand(x), d_w);
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
