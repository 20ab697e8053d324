// Work on rows, a warp for each.
#ifndef HYBRIDATTN_BACKEND_GPU_ROWS_HPP
#define HYBRIDATTN_BACKEND_GPU_ROWS_HPP

#include <hybridattn/backend/gpu/gpu.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI {
namespace gpu {

template <class F> struct ForEachRow {
  static constexpr int threads = 128;
  struct Params {
    F f;
    Index rows;
  };
  struct Shared {};
  static HYBRIDATTN_DEVICE void run(Shared&, Params const& p) {
    Index const n = simt::block_x() * (threads / 32) + simt::warp();
    if (n < p.rows) p.f(n);
  }
};

}  // namespace gpu

// Calls f(n) for n = 0 .. rows - 1, each by all lanes of a warp. F is a struct of views and numbers with operator()(Index) const,
// HYBRIDATTN_DEVICE.
template <GpuBackend B, class F> void for_each_row(B& gpu, Index rows, F f) {
  launch<gpu::ForEachRow<F>>(gpu, {.x = ceil_div(rows, gpu::ForEachRow<F>::threads / 32)}, {f, rows});
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
