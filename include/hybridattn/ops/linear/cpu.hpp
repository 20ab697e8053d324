#ifndef HYBRIDATTN_OPS_LINEAR_CPU_HPP
#define HYBRIDATTN_OPS_LINEAR_CPU_HPP

#include <hybridattn/backend/cpu/gemm.hpp>
#include <hybridattn/ops/linear/linear.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI {

// Each matrix is stored in a scalar of its own: logits are in float where x and w are in bf16.
template <> struct On<Linear, Cpu> {
  template <class X, class W, class Y> static void forward(Cpu& cpu, View<X const, 2> x, View<W const, 2> w, View<Y, 2> y) {
    cpu::gemm(cpu, operand(x), operand(w).transposed(), y);
  }
  template <class X, class W, class Y, class DX, class DW>
  static void backward(Cpu& cpu, View<X const, 2> x, View<W const, 2> w, View<Y const, 2> d_y, View<DX, 2> d_x, View<DW, 2> d_w,
                       Into into) {
    if (!d_x.empty()) cpu::gemm(cpu, operand(d_y), operand(w), d_x, into);
    if (!d_w.empty()) cpu::gemm(cpu, operand(d_y).transposed(), operand(x), d_w);
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
