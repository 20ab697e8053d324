#ifndef HYBRIDATTN_OPS_L2_NORM_GPU_HPP
#define HYBRIDATTN_OPS_L2_NORM_GPU_HPP

#include <hybridattn/ops/l2_norm/kernels.hpp>
#include <hybridattn/tensor/in_float.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI {

template <GpuBackend B> struct On<L2Norm, B> : InFloat<L2Norm, B> {
  using InFloat<L2Norm, B>::forward, InFloat<L2Norm, B>::backward;
  template <std::floating_point T> static void forward(B& gpu, View<T const, 2> x, View<T, 2> y) {
    launch<gpu::L2NormForward<T>>(gpu, {.x = ceil_div(x.extent(0), gpu::L2NormForward<T>::threads / 32)}, {x, y});
  }
  template <std::floating_point T> static void backward(B& gpu, View<T const, 2> x, View<T const, 2> d_y, View<T, 2> d_x) {
    launch<gpu::L2NormBackward<T>>(gpu, {.x = ceil_div(x.extent(0), gpu::L2NormBackward<T>::threads / 32)}, {x, d_y, d_x});
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
