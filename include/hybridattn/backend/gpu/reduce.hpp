// Sums in a fixed order: in a warp by one tree, of the warps of a block and of blocks one after the other.
#ifndef HYBRIDATTN_BACKEND_GPU_REDUCE_HPP
#define HYBRIDATTN_BACKEND_GPU_REDUCE_HPP

#include <hybridattn/backend/gpu/gpu.hpp>
#include <hybridattn/core/view.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI::gpu {

// The sum of one number of each thread of a block, for all threads. `of_warps` is shared memory, one number for each warp.
template <class T, std::size_t warps> HYBRIDATTN_DEVICE T sum_block(T (&of_warps)[warps], T x) {
  x = simt::sum_lanes(x);
  if (simt::lane() == 0) of_warps[simt::warp()] = x;
  simt::sync_block();
  T sum = 0;
  for (T part : of_warps) sum += part;
  simt::sync_block();   // of_warps may be used again
  return sum;
}

// sum [C] = the rows of parts [n, C], added in order. A thread has a column.
template <class T> struct SumParts {
  View<T const, 2> parts;
  View<T, 1> sum;
  HYBRIDATTN_HD void operator()(Index c) const {
    T total = 0;
    for (Index n = 0; n < parts.extent(0); ++n) total += parts(n, c);
    sum(c) = total;
  }
};

// A backward whose rows add to one gradient [C]: each block of `sum_rows` rows makes a part [C], and the parts are added in order.
inline constexpr Index sum_rows = 32;
inline Index row_blocks(Index rows) { return ceil_div(rows, sum_rows); }

}  // namespace hybridattn::inline HYBRIDATTN_ABI::gpu
#endif
