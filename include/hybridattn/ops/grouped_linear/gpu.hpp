#ifndef HYBRIDATTN_OPS_GROUPED_LINEAR_GPU_HPP
#define HYBRIDATTN_OPS_GROUPED_LINEAR_GPU_HPP

#include <hybridattn/ops/grouped_linear/kernels.hpp>
#include <hybridattn/tensor/in_float.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI {

template <GpuBackend B> struct On<GroupedLinear, B> : InFloat<GroupedLinear, B> {
  using InFloat<GroupedLinear, B>::forward, InFloat<GroupedLinear, B>::backward;
  using Offsets = View<std::int32_t const, 1>;

  template <std::floating_point T> static void forward(B& gpu, Offsets offsets, View<T const, 2> x, View<T const, 3> w, View<T, 2> y) {
    multiply_rows<T>(gpu, offsets, x, w, y, true, Into::overwrite);
  }
  template <std::floating_point T>
  static void backward(B& gpu, Offsets offsets, View<T const, 2> x, View<T const, 3> w, View<T const, 2> d_y, View<T, 2> d_x,
                       View<T, 3> d_w, Into into) {
    if (!d_x.empty()) multiply_rows<T>(gpu, offsets, d_y, w, d_x, false, into);
    if (!d_w.empty()) multiply_over_rows<T>(gpu, offsets, x, d_y, d_w);
  }

 private:
  // The host cannot read how the rows are shared out, so the grid has the most tiles that they can make. Blocks without a tile return.
  template <class T>
  static void multiply_rows(B& gpu, Offsets offsets, View<T const, 2> x, View<T const, 3> w, View<T, 2> y, bool transposes, Into into) {
    if (y.empty()) return;
    gpu::with_tile(1, y.extent(0), y.extent(1), [&](auto size) {
      Grid const grid{.x = gpu::most_tiles(w.extent(0), y.extent(0), size()), .y = ceil_div(y.extent(1), size())};
      launch<gpu::MultiplyRows<T, size()>>(gpu, grid, {offsets, x, w, y, transposes, into});
    });
  }
  template <class T> static void multiply_over_rows(B& gpu, Offsets offsets, View<T const, 2> x, View<T const, 2> d_y, View<T, 3> d_w) {
    Index const E = d_w.extent(0), F = d_w.extent(1), C = d_w.extent(2);
    gpu::with_tile(E, F, C, [&](auto size) {
      Grid const grid{.x = ceil_div(F, size()), .y = ceil_div(C, size()), .z = E};
      launch<gpu::MultiplyOverRows<T, size()>>(gpu, grid, {offsets, x, d_y, d_w});
    });
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
