#ifndef HYBRIDATTN_OPS_LINEAR_CPU_HPP
#define HYBRIDATTN_OPS_LINEAR_CPU_HPP

#include <hybridattn/backend/cpu/gemm.hpp>
#include <hybridattn/ops/linear/linear.hpp>
#include <hybridattn/tensor/roles.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI {

template <> struct On<Linear, Cpu> {
  template <class T> static void forward(Cpu& cpu, View<T const, 2> x, View<T const, 2> w, View<T, 2> y) {
    cpu::gemm(cpu, operand(x), operand(w).transposed(), y);
  }
  template <class T>
  static void backward(Cpu& cpu, View<T const, 2> x, View<T const, 2> w, View<T const, 2> d_y, View<T, 2> d_x, Wide<Out<T>, 2> d_w,
                       Into into) {
    if (!d_x.empty()) cpu::gemm(cpu, operand(d_y), operand(w), d_x, into);
    if (!d_w.empty()) cpu::gemm(cpu, operand(d_y).transposed(), operand(x), d_w);
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
