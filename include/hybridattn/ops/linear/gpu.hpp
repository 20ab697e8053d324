#ifndef HYBRIDATTN_OPS_LINEAR_GPU_HPP
#define HYBRIDATTN_OPS_LINEAR_GPU_HPP

#include <hybridattn/backend/gpu/gemm.hpp>
#include <hybridattn/ops/linear/linear.hpp>
#include <hybridattn/tensor/in_float.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI {

template <GpuBackend B> struct On<Linear, B> : InFloat<Linear, B> {
  using InFloat<Linear, B>::forward, InFloat<Linear, B>::backward;
  template <std::floating_point T> static void forward(B& gpu, View<T const, 2> x, View<T const, 2> w, View<T, 2> y) {
    gpu::gemm<T>(gpu, operand(x), operand(w).transposed(), y);
  }
  template <std::floating_point T>
  static void backward(B& gpu, View<T const, 2> x, View<T const, 2> w, View<T const, 2> d_y, View<T, 2> d_x, View<T, 2> d_w, Into into) {
    if (!d_x.empty()) gpu::gemm<T>(gpu, operand(d_y), operand(w), d_x, into);
    if (!d_w.empty()) gpu::gemm<T>(gpu, operand(d_y).transposed(), operand(x), d_w);
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
