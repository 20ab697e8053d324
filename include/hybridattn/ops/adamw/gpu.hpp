#ifndef HYBRIDATTN_OPS_ADAMW_GPU_HPP
#define HYBRIDATTN_OPS_ADAMW_GPU_HPP

#include <hybridattn/ops/adamw/kernels.hpp>
#include <hybridattn/tensor/tensor.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI {

template <GpuBackend B> struct On<AdamWSquares, B> {
  template <class T> static void forward(B& gpu, View<AdamWTensor<T> const, 1> tensors, View<double, 1> squares) {
    using AddParts = gpu::AdamWAddSquares<T>;
    Tensor<double, 2, B> parts{gpu, {tensors.extent(0), gpu::adamw_turns}};
    launch<gpu::AdamWPartialSquares<T>>(gpu, {.x = gpu::adamw_turns}, {tensors, out(parts)});
    launch<AddParts>(gpu, {.x = ceil_div(tensors.extent(0), AddParts::threads / 32)}, {tensors, in(parts), squares});
  }
};

template <GpuBackend B> struct On<AdamWCheck, B> {
  template <class T>
  static void forward(B& gpu, View<AdamWTensor<T> const, 1> tensors, View<AdamWRates const, 1> rates, View<StepNumbers const, 1> numbers,
                      View<StepFault, 1> found) {
    if (tensors.extent(0) == 0) return;
    Tensor<Index, 1, B> ranks{gpu, {tensors.extent(0)}};
    gpu.fill(out(ranks).data, std::byte{0}, ranks.byte_count());
    launch<gpu::AdamWRankFaults<T>>(gpu, {.x = gpu::adamw_turns}, {tensors, rates, numbers, out(ranks)});
    for_each(gpu, found.count(), gpu::AdamWNameFaults{in(ranks), found});
  }
};

template <GpuBackend B> struct On<AdamWStep, B> {
  template <class T>
  static void forward(B& gpu, View<AdamWTensor<T> const, 1> tensors, View<AdamWRates const, 1> rates, View<StepNumbers const, 1> numbers) {
    launch<gpu::AdamWMove<T>>(gpu, {.x = gpu::adamw_turns}, {tensors, rates, numbers});
  }
};

template <GpuBackend B> struct On<OpenStep, B> {
  static void forward(B& gpu, View<StepNumbers, 1> numbers) { for_each(gpu, 1, gpu::StepOpening{numbers}); }
};

template <GpuBackend B> struct On<AddBatchLosses, B> {
  static void forward(B& gpu, double share, View<BatchLosses const, 1> losses, View<StepNumbers, 1> numbers) {
    for_each(gpu, 1, gpu::StepLosses{share, losses, numbers});
  }
};

template <GpuBackend B> struct On<DecideStep, B> {
  static void forward(B& gpu, DecideStep::Options const& o, View<std::int32_t const, 1> roles, View<double const, 1> squares,
                      View<Index const, 1> updates, View<AdamWRates, 1> rates, View<StepNumbers, 1> numbers) {
    launch<gpu::StepDecision>(gpu, {}, {o, roles, squares, updates, rates, numbers});
  }
};

template <GpuBackend B> struct On<CloseStep, B> {
  static void forward(B& gpu, View<std::int32_t const, 1> roles, View<StepFault const, 1> found, View<Index, 1> updates,
                      View<StepNumbers, 1> numbers) {
    launch<gpu::StepClosing>(gpu, {}, {roles, found, updates, numbers});
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
