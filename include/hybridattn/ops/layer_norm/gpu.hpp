#ifndef HYBRIDATTN_OPS_LAYER_NORM_GPU_HPP
#define HYBRIDATTN_OPS_LAYER_NORM_GPU_HPP

#include <hybridattn/ops/layer_norm/kernels.hpp>
#include <hybridattn/tensor/in_float.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI {

template <GpuBackend B> struct On<LayerNorm, B> : InFloat<LayerNorm, B> {
  using InFloat<LayerNorm, B>::forward, InFloat<LayerNorm, B>::backward;
  template <std::floating_point T> static void forward(B& gpu, double eps, View<T const, 2> x, Wide<In<T>, 1> w, Wide<In<T>, 1> b,
                                                       View<T, 2> y) {
    using Forward = gpu::LayerNormForward<T>;
    launch<Forward>(gpu, {.x = ceil_div(x.extent(0), Forward::threads / 32)}, {x, w, b, y, static_cast<T>(eps)});
  }
  template <std::floating_point T>
  static void backward(B& gpu, double eps, View<T const, 2> x, Wide<In<T>, 1> w, View<T const, 2> d_y, View<T, 2> d_x, Wide<Out<T>, 1> d_w,
                       Wide<Out<T>, 1> d_b) {
    Index const blocks = gpu::row_blocks(x.extent(0)), C = x.extent(1);
    Tensor<T, 2, B> w_parts{gpu, {blocks, C}}, b_parts{gpu, {blocks, C}};
    launch<gpu::LayerNormBackward<T>>(gpu, {.x = blocks}, {x, w, d_y, d_x, out(w_parts), out(b_parts), static_cast<T>(eps)});
    for_each(gpu, C, gpu::SumParts<T>{in(w_parts), d_w});
    for_each(gpu, C, gpu::SumParts<T>{in(b_parts), d_b});
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
