#ifndef HYBRIDATTN_OPS_ARITHMETIC_GPU_HPP
#define HYBRIDATTN_OPS_ARITHMETIC_GPU_HPP

#include <hybridattn/ops/arithmetic/kernels.hpp>
#include <hybridattn/tensor/in_float.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI {

template <GpuBackend B> struct On<Fill, B> {
  template <class T> static void forward(B& gpu, T value, View<T, 1> y) { for_each(gpu, y.count(), gpu::SetElement<T>{value, y}); }
};

template <GpuBackend B> struct On<Add, B> : InFloat<Add, B> {
  using InFloat<Add, B>::forward;
  template <std::floating_point T> static void forward(B& gpu, View<T const, 1> x, View<T, 1> y) {
    for_each(gpu, y.count(), gpu::AddElement<T>{x, y});
  }
};

template <GpuBackend B> struct On<AddWeighted, B> {
  template <class T> static void forward(B& gpu, double weight, View<T const, 1> loss, View<double, 1> sum) {
    for_each(gpu, 1, gpu::AddWeightedElement<T>{weight, loss, sum});
  }
};

template <GpuBackend B> struct On<AllFinite, B> {
  template <class T> static bool forward(B& gpu, View<T const, 1> x) {
    using Find = gpu::FindBadElement<T>;
    auto found = zeros<std::int32_t>(gpu, Shape<1>{1});
    launch<Find>(gpu, {.x = ceil_div(x.count(), Find::threads)}, {x, out(found)});
    return download(gpu, found)[0] == 0;
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
