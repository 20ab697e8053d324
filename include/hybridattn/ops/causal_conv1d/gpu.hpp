#ifndef HYBRIDATTN_OPS_CAUSAL_CONV1D_GPU_HPP
#define HYBRIDATTN_OPS_CAUSAL_CONV1D_GPU_HPP

#include <hybridattn/ops/causal_conv1d/kernels.hpp>
#include <hybridattn/tensor/in_float.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI {

// M is B, or a backend that wraps it.
template <GpuBackend B> struct On<CausalConv1d, B> : InFloat<CausalConv1d, B> {
  using InFloat<CausalConv1d, B>::forward, InFloat<CausalConv1d, B>::backward;
  template <std::floating_point T, class M>
  static void forward(B& gpu, Activation activation, SequencesOn<M> const& s, View<T const, 2> x, View<T const, 2> w,
                      State<In<T>, 3> initial_state, View<T, 2> y, State<Out<T>, 3> final_state) {
    gpu::ConvInputs<T> const inputs{s.table(), x, w, initial_state};
    launch<gpu::ConvForward<T>>(gpu, gpu::conv_grid(x.extent(0), x.extent(1)), {inputs, activation, y});
    if (!final_state.empty()) for_each(gpu, s.count() * x.extent(1), gpu::KeepLastInputs<T>{inputs, final_state});
  }

  template <std::floating_point T, class M>
  static void backward(B& gpu, Activation activation, SequencesOn<M> const& s, View<T const, 2> x, View<T const, 2> w,
                       State<In<T>, 3> initial_state, View<T const, 2> d_y, State<In<T>, 3> d_final_state, View<T, 2> d_x, View<T, 2> d_w,
                       State<Out<T>, 3> d_initial_state) {
    Index const N = x.extent(0), C = x.extent(1), W = w.extent(1), blocks = gpu::row_blocks(N);
    Tensor<T, 2, B> d_s{gpu, {N, C}};
    Tensor<T, 3, B> parts{gpu, {blocks, W, C}};
    gpu::ConvInputs<T> const inputs{s.table(), x, w, initial_state};
    launch<gpu::ConvThroughActivation<T>>(gpu, gpu::conv_grid(N, C), {inputs, activation, d_y, out(d_s)});
    gpu::ConvOutputGradients<T> const gradients{s.table(), w, in(d_s), d_final_state};
    launch<gpu::ConvInputGradient<T>>(gpu, gpu::conv_grid(N, C), {gradients, d_x});
    if (W > 0) {
      launch<gpu::ConvTapGradients<T>>(gpu, gpu::conv_grid(blocks, C), {inputs, in(d_s), out(parts)});
      for_each(gpu, W * C, gpu::SumTapGradients<T>{in(parts), d_w});
    }
    if (!d_initial_state.empty()) for_each(gpu, d_initial_state.count(), gpu::ConvStateGradient<T>{gradients, d_initial_state});
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
