// Times on a GPU, and the FMA peak of the same device. Under nvcc they are times of the device, by its events. Otherwise the
// emulator runs the same work once, which only checks the program.
#ifndef HYBRIDATTN_BENCHMARKS_GPU_TIMES_HPP
#define HYBRIDATTN_BENCHMARKS_GPU_TIMES_HPP

#include "../tests/gpu.hpp"

#include <hybridattn/tensor/tensor.hpp>

#include <algorithm>
#include <chrono>
#include <functional>
#include <vector>

namespace bench {

namespace ha = hybridattn;
using ha::Index;

// How many milliseconds f takes on the device.
#if defined(__CUDACC__)
inline double milliseconds(Gpu& gpu, std::function<void()> const& f) {
  cudaEvent_t begin, end;
  cudaEventCreate(&begin);
  cudaEventCreate(&end);
  cudaEventRecord(begin, gpu.stream());
  f();
  cudaEventRecord(end, gpu.stream());
  gpu.synchronise();
  float time = 0;
  cudaEventElapsedTime(&time, begin, end);
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  return time;
}
inline constexpr bool is_device = true;
#else
inline double milliseconds(Gpu&, std::function<void()> const& f) {
  auto const begin = std::chrono::steady_clock::now();
  f();
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin).count();
}
inline constexpr bool is_device = false;
#endif

// f(0), f(1), ... are the same work on other memory, so that no run finds its inputs in the cache.
struct Times {
  double least, median;
};
inline constexpr int sets = 3;
inline Times times(Gpu& gpu, std::function<void(int)> const& f) {
  constexpr int warm = is_device ? 3 : 0, runs = is_device ? 15 : 1;
  std::vector<double> all;
  for (int run = 0; run < warm + runs; ++run) {
    double const time = milliseconds(gpu, [&] { f(run % sets); });
    if (run >= warm) all.push_back(time);
  }
  std::ranges::sort(all);
  return {all.front(), all[all.size() / 2]};
}

// A thread has eight sums, each a chain of multiply-adds.
struct MultiplyAdds {
  static constexpr int threads = 256, sums = 8;
  struct Params {
    ha::View<float, 1> out;
    int rounds;
  };
  struct Shared {};
  static HYBRIDATTN_DEVICE void run(Shared&, Params const& p) {
    float sum[sums];
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int i = 0; i < sums; ++i) sum[i] = static_cast<float>(ha::simt::thread_id() + i);
    for (int round = 0; round < p.rounds; ++round) {
      HYBRIDATTN_UNROLL_IN_KERNEL
      for (int i = 0; i < sums; ++i) sum[i] = sum[i] * 0.999f + 0.001f;
    }
    float total = 0;
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int i = 0; i < sums; ++i) total += sum[i];
    p.out(ha::simt::block_x() * threads + ha::simt::thread_id()) = total;
  }
};
inline double peak_gflops(Gpu& gpu) {
  Index const blocks = is_device ? 132 * 16 : 2;
  int const rounds = is_device ? 4096 : 4;
  ha::Tensor<float, 1, Gpu> out_{gpu, {blocks * MultiplyAdds::threads}};
  auto const time = times(gpu, [&](int) { launch<MultiplyAdds>(gpu, {.x = blocks}, {out(out_), rounds}); });
  return 2.0 * static_cast<double>(blocks) * MultiplyAdds::threads * MultiplyAdds::sums * rounds / time.least / 1e6;
}

}  // namespace bench
#endif
