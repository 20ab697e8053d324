#ifndef HYBRIDATTN_OPS_RMS_NORM_GPU_HPP
#define HYBRIDATTN_OPS_RMS_NORM_GPU_HPP

#include <hybridattn/ops/rms_norm/kernels.hpp>
#include <hybridattn/tensor/tensor.hpp>
#include <hybridattn/tensor/in_float.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI {
namespace gpu {

template <class T, GpuBackend B> void rms_norm(B& gpu, RmsNormParams<T> const& p) {
  launch<RmsNormForward<T>>(gpu, {.x = ceil_div(p.x.extent(0), RmsNormForward<T>::threads / 32)}, p);
}
template <class T, GpuBackend B> void rms_norm_gradients(B& gpu, RmsNormGradients<T> p, Wide<Out<T>, 1> d_w) {
  Tensor<T, 2, B> parts{gpu, {row_blocks(p.forward.x.extent(0)), d_w.extent(0)}};
  p.d_w = out(parts);
  launch<RmsNormBackward<T>>(gpu, {.x = parts.shape()[0]}, p);
  for_each(gpu, d_w.extent(0), SumParts<T>{in(parts), d_w});
}
template <class T> T shift_of(RmsNorm::Options const& o) { return o.weight == NormWeight::zero_centred ? T(1) : T(0); }

}  // namespace gpu

template <GpuBackend B> struct On<RmsNorm, B> : InFloat<RmsNorm, B> {
  using InFloat<RmsNorm, B>::forward, InFloat<RmsNorm, B>::backward;
  template <std::floating_point T> static void forward(B& gpu, RmsNorm::Options o, View<T const, 2> x, Wide<In<T>, 1> w, View<T, 2> y) {
    gpu::rms_norm<T>(gpu, {x, {}, w, y, gpu::shift_of<T>(o), static_cast<T>(o.eps)});
  }
  template <std::floating_point T>
  static void backward(B& gpu, RmsNorm::Options o, View<T const, 2> x, Wide<In<T>, 1> w, View<T const, 2> d_y, View<T, 2> d_x,
                       Wide<Out<T>, 1> d_w, Into into) {
    gpu::rms_norm_gradients<T>(gpu, {{x, {}, w, {}, gpu::shift_of<T>(o), static_cast<T>(o.eps)}, d_y, d_x, {}, {}, into}, d_w);
  }
};

template <GpuBackend B> struct On<GatedRmsNorm, B> : InFloat<GatedRmsNorm, B> {
  using InFloat<GatedRmsNorm, B>::forward, InFloat<GatedRmsNorm, B>::backward;
  template <std::floating_point T> static void forward(B& gpu, double eps, View<T const, 2> x, View<T const, 2> z, Wide<In<T>, 1> w,
                                                       View<T, 2> y) {
    gpu::rms_norm<T>(gpu, {x, z, w, y, T(0), static_cast<T>(eps)});
  }
  template <std::floating_point T>
  static void backward(B& gpu, double eps, View<T const, 2> x, View<T const, 2> z, Wide<In<T>, 1> w, View<T const, 2> d_y, View<T, 2> d_x,
                       View<T, 2> d_z, Wide<Out<T>, 1> d_w) {
    gpu::rms_norm_gradients<T>(gpu, {{x, z, w, {}, T(0), static_cast<T>(eps)}, d_y, d_x, d_z, {}, Into::overwrite}, d_w);
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
