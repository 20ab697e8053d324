#ifndef HYBRIDATTN_OPS_GDN_GATE_GPU_HPP
#define HYBRIDATTN_OPS_GDN_GATE_GPU_HPP

#include <hybridattn/ops/gdn_gate/kernels.hpp>
#include <hybridattn/tensor/in_float.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI {

template <GpuBackend B> struct On<GdnGate, B> : InFloat<GdnGate, B> {
  using InFloat<GdnGate, B>::forward, InFloat<GdnGate, B>::backward;
  template <std::floating_point T>
  static void forward(B& gpu, int range, View<T const, 2> a, View<T const, 2> b, Wide<In<T>, 1> a_log, Wide<In<T>, 1> dt_bias,
                      Wide<Out<T>, 2> g, Wide<Out<T>, 2> beta) {
    for_each(gpu, a.count(), gpu::GdnGateForward<T>{static_cast<T>(range), a, b, a_log, dt_bias, g, beta});
  }

  template <std::floating_point T>
  static void backward(B& gpu, int range, View<T const, 2> a, View<T const, 2> b, Wide<In<T>, 1> a_log, Wide<In<T>, 1> dt_bias,
                       Wide<In<T>, 2> d_g, Wide<In<T>, 2> d_beta, View<T, 2> d_a, View<T, 2> d_b, Wide<Out<T>, 1> d_a_log,
                       Wide<Out<T>, 1> d_dt_bias) {
    using Backward = gpu::GdnGateBackward<T>;
    Index const blocks = gpu::row_blocks(a.extent(0)), heads = a.extent(1);
    Tensor<T, 2, B> rate_parts{gpu, {blocks, heads}}, bias_parts{gpu, {blocks, heads}};
    launch<Backward>(gpu, {.x = blocks, .y = ceil_div(heads, Backward::threads)},
                     {static_cast<T>(range), a, b, a_log, dt_bias, d_g, d_beta, d_a, d_b, out(rate_parts), out(bias_parts)});
    for_each(gpu, heads, gpu::SumParts<T>{in(rate_parts), d_a_log});
    for_each(gpu, heads, gpu::SumParts<T>{in(bias_parts), d_dt_bias});
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
