// Conversion between scalars on a GPU.
#ifndef HYBRIDATTN_BACKEND_GPU_CONVERT_HPP
#define HYBRIDATTN_BACKEND_GPU_CONVERT_HPP

#include <hybridattn/backend/gpu/gpu.hpp>
#include <hybridattn/core/bf16.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI {
namespace gpu {

template <class From, class To, int Rank> struct ConvertElement {
  View<From const, Rank> x;
  View<To, Rank> y;

  HYBRIDATTN_HD void operator()(Index i) const {
    Index const C = y.extent(Rank - 1);
    y.data[row_offset(y, i / C) + i % C] = static_cast<To>(x.data[row_offset(x, i / C) + i % C]);
  }
};

}  // namespace gpu

// y = x, each element rounded to the scalar of y. Rows may be spaced.
template <class From, class To, int Rank, GpuBackend B> void convert(B& gpu, View<From const, Rank> x, View<To, Rank> y) {
  for_each(gpu, y.count(), gpu::ConvertElement<From, To, Rank>{x, y});
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
