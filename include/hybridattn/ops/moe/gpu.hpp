#ifndef HYBRIDATTN_OPS_MOE_GPU_HPP
#define HYBRIDATTN_OPS_MOE_GPU_HPP

#include <hybridattn/ops/moe/kernels.hpp>
#include <hybridattn/tensor/in_float.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI {

template <GpuBackend B> struct On<Route, B> : InFloat<Route, B> {
  using InFloat<Route, B>::forward, InFloat<Route, B>::backward;
  template <std::floating_point T>
  static void forward(B& gpu, Route::Options o, View<T const, 2> logits, View<T, 2> probabilities, View<T, 2> weights,
                      View<std::int32_t, 2> experts) {
    for_each_row(gpu, logits.extent(0), gpu::RouteRow<T>{o, logits, probabilities, weights, experts});
  }
  template <std::floating_point T>
  static void backward(B& gpu, Route::Options o, View<T const, 2> probabilities, View<T const, 2> weights,
                       View<std::int32_t const, 2> experts, View<T const, 2> d_weights, View<T const, 1> d_probability,
                       View<T, 2> d_logits) {
    for_each_row(gpu, probabilities.extent(0),
                 gpu::RouteRowGradients<T>{o, probabilities, weights, experts, d_weights, d_probability, d_logits});
  }
};

template <GpuBackend B> struct On<Permute, B> {
  static void forward(B& gpu, View<std::int32_t const, 2> experts, View<std::int32_t, 1> offsets, View<std::int32_t, 2> places) {
    Index const E = offsets.extent(0) - 1, choices = experts.count(), parts = ceil_div(choices, gpu::part_size);
    Tensor<std::int32_t, 2, B> counts{gpu, {E, parts}};
    if (counts.byte_count() > 0) gpu.fill(out(counts).data, std::byte{0}, counts.byte_count());
    for_each(gpu, choices, gpu::CountChoices{experts, out(counts)});
    for_each_row(gpu, E, gpu::StartParts{out(counts), offsets});
    for_each_row(gpu, 1, gpu::StartExperts{offsets});
    for_each_row(gpu, parts, gpu::PlaceChoices{experts, offsets, out(counts), places});
  }
};

template <GpuBackend B> struct On<Distribute, B> : InFloat<Distribute, B> {
  using InFloat<Distribute, B>::forward, InFloat<Distribute, B>::backward;
  template <std::floating_point T> static void forward(B& gpu, View<T const, 2> x, View<std::int32_t const, 2> places, View<T, 2> rows) {
    for_each_row(gpu, x.extent(0), gpu::DistributeRow<T>{x, places, rows});
  }
  template <std::floating_point T> static void backward(B& gpu, View<std::int32_t const, 2> places, View<T const, 2> d_rows, View<T, 2> d_x,
                                                        Into into) {
    for_each_row(gpu, d_x.extent(0), gpu::CollectRow<T>{places, d_rows, d_x, into});
  }
};

template <GpuBackend B> struct On<Combine, B> : InFloat<Combine, B> {
  using InFloat<Combine, B>::forward, InFloat<Combine, B>::backward;
  template <std::floating_point T>
  static void forward(B& gpu, View<T const, 2> rows, Wide<In<T>, 2> weights, View<std::int32_t const, 2> places, View<T, 2> y) {
    for_each_row(gpu, y.extent(0), gpu::CombineRow<T>{rows, weights, places, y});
  }
  template <std::floating_point T>
  static void backward(B& gpu, View<T const, 2> rows, Wide<In<T>, 2> weights, View<std::int32_t const, 2> places, View<T const, 2> d_y,
                       View<T, 2> d_rows, Wide<Out<T>, 2> d_weights) {
    for_each_row(gpu, places.count(), gpu::CombineChoiceGradients<T>{rows, weights, places, d_y, d_rows, d_weights});
  }
};

template <GpuBackend B> struct On<AddGated, B> : InFloat<AddGated, B> {
  using InFloat<AddGated, B>::forward, InFloat<AddGated, B>::backward;
  template <std::floating_point T> static void forward(B& gpu, View<T const, 2> x, View<T const, 2> logit, View<T, 2> y) {
    for_each_row(gpu, y.extent(0), gpu::AddGatedRow<T>{x, logit, y});
  }
  template <std::floating_point T>
  static void backward(B& gpu, View<T const, 2> x, View<T const, 2> logit, View<T const, 2> d_y, View<T, 2> d_x, View<T, 2> d_logit) {
    for_each_row(gpu, d_y.extent(0), gpu::AddGatedRowGradients<T>{x, logit, d_y, d_x, d_logit});
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
