#ifndef HYBRIDATTN_OPS_EMBEDDING_GPU_HPP
#define HYBRIDATTN_OPS_EMBEDDING_GPU_HPP

#include <hybridattn/ops/embedding/kernels.hpp>
#include <hybridattn/tensor/in_float.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI {

template <GpuBackend B> struct On<Embedding, B> : InFloat<Embedding, B> {
  using InFloat<Embedding, B>::forward, InFloat<Embedding, B>::backward;
  template <std::floating_point T> static void forward(B& gpu, View<std::int32_t const, 1> tokens, View<T const, 2> table, View<T, 2> y) {
    using Forward = gpu::EmbeddingForward<T>;
    launch<Forward>(gpu, {.x = y.extent(0), .y = ceil_div(y.extent(1), Forward::threads)}, {tokens, table, y});
  }
  template <std::floating_point T>
  static void backward(B& gpu, View<std::int32_t const, 1> tokens, View<T const, 2> d_y, View<T, 2> d_table, Into into) {
    using Backward = gpu::EmbeddingBackward<T>;
    launch<Backward>(gpu, {.x = d_table.extent(0), .y = ceil_div(d_table.extent(1), Backward::columns)}, {tokens, d_y, d_table, into});
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
