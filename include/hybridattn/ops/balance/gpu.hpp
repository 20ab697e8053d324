#ifndef HYBRIDATTN_OPS_BALANCE_GPU_HPP
#define HYBRIDATTN_OPS_BALANCE_GPU_HPP

#include <hybridattn/ops/balance/kernels.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI {

template <GpuBackend B> struct On<ExpertUse, B> {
  template <class T>
  static void forward(B& gpu, View<std::int32_t const, 1> offsets, View<T const, 2> probabilities, View<double, 2> sums) {
    using Sum = gpu::SumProbabilities<T>;
    Index const blocks = gpu::row_blocks(probabilities.extent(0)), experts = sums.extent(1);
    Tensor<double, 2, B> parts{gpu, {blocks, experts}};
    launch<Sum>(gpu, {.x = blocks, .y = ceil_div(experts, Sum::threads)}, {probabilities, out(parts)});
    for_each(gpu, experts, gpu::AddExpertUse{offsets, in(parts), sums});
  }
};

template <GpuBackend B> struct On<BalanceLoss, B> {
  static void forward(B& gpu, double coefficient, Index count, View<double const, 2> sums, View<double, 1> value) {
    if (count > 0) launch<gpu::AddBalanceLoss>(gpu, {.x = 1}, {coefficient, count, sums, value});
  }
  template <class T>
  static void backward(B& gpu, double coefficient, Index count, View<double const, 2> sums, double d_value, View<T, 1> d_probability) {
    for_each(gpu, sums.extent(1), gpu::BalanceLossBackward<T>{coefficient, count, sums, d_value, d_probability});
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
