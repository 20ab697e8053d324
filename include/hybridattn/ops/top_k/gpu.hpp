#ifndef HYBRIDATTN_OPS_TOP_K_GPU_HPP
#define HYBRIDATTN_OPS_TOP_K_GPU_HPP

#include <hybridattn/ops/top_k/kernels.hpp>
#include <hybridattn/tensor/in_float.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI {

template <GpuBackend B> struct On<TopK, B> : InFloat<TopK, B> {
  using InFloat<TopK, B>::forward;
  template <std::floating_point T> static void forward(B& gpu, View<T const, 2> scores, View<std::int32_t, 2> indices) {
    if (!indices.empty()) launch<gpu::SelectTopK<T>>(gpu, {.x = indices.extent(0)}, {scores, indices});
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
