// Machines that run kernels. A kernel is a type:
//   struct Mine {
//     static constexpr int threads = 128;                                // of a block, whole warps
//     struct Params { ... };                                             // views and numbers, passed by value
//     struct Shared { ... };                                             // shared memory of a block
//     static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p);  // what a thread does, in the words of simt.hpp
//   };
//   launch<Mine>(gpu, {.x = blocks}, params);
// An operation is written once, as On<Op, B> for every GpuBackend B. Cuda and Emulator run the same text.
#ifndef HYBRIDATTN_BACKEND_GPU_GPU_HPP
#define HYBRIDATTN_BACKEND_GPU_GPU_HPP

#include <hybridattn/backend/backend.hpp>
#include <hybridattn/backend/gpu/simt.hpp>

#include <type_traits>

namespace hybridattn::inline HYBRIDATTN_ABI {

template <class K>
concept Kernel = requires(typename K::Shared& shared, typename K::Params const& p) {
  { K::threads } -> std::convertible_to<int>;
  K::run(shared, p);
};
// Runs a kernel on a grid of blocks. A grid without blocks starts nothing. Throws Error for more blocks than a GPU takes.
template <Kernel K, GpuBackend B> void launch(B& gpu, Grid grid, typename K::Params const& params) {
  static_assert(std::is_trivially_copyable_v<typename K::Params> && sizeof(typename K::Params) <= 4096,
                "Params are views and numbers, at most 4096 bytes");
  static_assert(std::is_trivially_destructible_v<typename K::Shared>, "Shared is memory without constructors");
  static_assert(K::threads % 32 == 0 && K::threads <= 1024, "a block is whole warps of 32 threads, at most 32 warps");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  check(grid.x <= largest_int32 && grid.y <= 65535 && grid.z <= 65535, "launch: ", grid.x, " x ", grid.y, " x ", grid.z,
        " blocks; a GPU takes at most ", largest_int32, " x 65535 x 65535");
  gpu.template start<K>(grid, params);
}

namespace gpu {

// f(i) for i = 0 .. count - 1, a thread each.
template <class F> struct ForEach {
  static constexpr int threads = 128;
  struct Params {
    F f;
    Index count;
  };
  struct Shared {};
  static HYBRIDATTN_DEVICE void run(Shared&, Params const& p) {
    Index const i = simt::block_x() * threads + simt::thread_id();
    if (i < p.count) p.f(i);
  }
};

}  // namespace gpu

// Calls f(i) for i = 0 .. count - 1. F is a struct of views and numbers with operator()(Index) const, HYBRIDATTN_HD.
template <GpuBackend B, class F> void for_each(B& gpu, Index count, F f) {
  launch<gpu::ForEach<F>>(gpu, {.x = ceil_div(count, gpu::ForEach<F>::threads)}, {f, count});
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
