// Times of the policies' kernels on a GPU beside the copy rate and the FMA peak of the same device, a line of JSON for each. Under nvcc they
// are times of the device, by its events. Otherwise the emulator runs the same program, which only checks it.
//   gpu_kernels [LONGEST]    rows of 128, 256, ... LONGEST tokens (8192)
#include "../tests/gpu.hpp"
#include "work.hpp"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>

namespace ha = hybridattn;
using ha::Index;

namespace {

// How many milliseconds f takes on the device.
#if defined(__CUDACC__)
double milliseconds(Gpu& gpu, std::function<void()> const& f) {
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
constexpr bool is_device = true;
#else
double milliseconds(Gpu&, std::function<void()> const& f) {
  auto const begin = std::chrono::steady_clock::now();
  f();
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin).count();
}
constexpr bool is_device = false;
#endif

// f(0), f(1), ... are the same work on other memory, so that no run finds its inputs in the cache.
struct Times {
  double least, median;
};
constexpr int sets = 3;
Times times(Gpu& gpu, std::function<void(int)> const& f) {
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
double peak_gflops(Gpu& gpu) {
  Index const blocks = is_device ? 132 * 16 : 2;
  int const rounds = is_device ? 4096 : 4;
  ha::Tensor<float, 1, Gpu> out_{gpu, {blocks * MultiplyAdds::threads}};
  auto const time = times(gpu, [&](int) { launch<MultiplyAdds>(gpu, {.x = blocks}, {out(out_), rounds}); });
  return 2.0 * static_cast<double>(blocks) * MultiplyAdds::threads * MultiplyAdds::sums * rounds / time.least / 1e6;
}
double copied_gigabytes(Gpu& gpu) {
  Index const count = is_device ? Index{1} << 26 : 1024;
  std::vector<ha::Tensor<float, 1, Gpu>> from, to;
  for (int i = 0; i < sets; ++i) {
    from.emplace_back(gpu, ha::Shape<1>{count});
    to.emplace_back(gpu, ha::Shape<1>{count});
  }
  auto const set = [](int i) { return static_cast<std::size_t>(i); };
  auto const time =
      times(gpu, [&](int i) { gpu.copy(out(to[set(i)]).data, in(from[set(i)]).data, static_cast<std::size_t>(count) * sizeof(float)); });
  return 2.0 * static_cast<double>(count) * sizeof(float) / time.least / 1e6;
}

// Eight heads of one sequence.
template <class Policy> struct Case {
  Gpu& gpu;
  ha::SequencesOn<Gpu> sequences;
  typename Policy::Config config;
  typename Policy::template Inputs<ha::Owned<float, Gpu>> x = ha::allocate<float>(gpu, Policy::inputs(config, sequences));
  typename Policy::template Inputs<ha::Owned<float, Gpu>> d_x = ha::allocate<float>(gpu, Policy::inputs(config, sequences));
  typename Policy::template Outputs<ha::Owned<float, Gpu>> y = ha::allocate<float>(gpu, Policy::outputs(config, sequences));
  typename Policy::template Outputs<ha::Owned<float, Gpu>> d_y = ha::allocate<float>(gpu, Policy::outputs(config, sequences));
  typename Policy::template Saved<ha::Owned<float, Gpu>> saved = ha::allocate<float>(gpu, Policy::saved(config, sequences));

  Case(Gpu& on, Index T, Index H, Index D) : gpu(on), sequences(on, ha::Sequences::equal(1, T)), config(Policy::complete({}, H * D, H)) {
    bench::fill_like_a_layer(gpu, x);
    bench::fill_like_a_layer(gpu, d_y);
  }
  void forward() { ha::On<Policy, Gpu>::forward(gpu, config, sequences, in(x), out(y), out(saved)); }
  void backward() { ha::On<Policy, Gpu>::backward(gpu, config, sequences, in(x), in(y), in(saved), in(d_y), out(d_x)); }
};
void report(std::string_view policy, char const* pass, Index T, Index H, Index D, Times time, double flops, double peak) {
  std::printf(
      "{\"policy\": \"%s\", \"pass\": \"%s\", \"T\": %td, \"heads\": %td, \"D\": %td, \"least_ms\": %.4f, \"median_ms\": %.4f, "
      "\"gflops\": %.1f, \"share\": %.4f}\n",
      std::string(policy).c_str(), pass, T, H, D, time.least, time.median, flops / time.median / 1e6, flops / time.median / 1e6 / peak);
  std::fflush(stdout);
}
template <class Config> void leave_out_indexer(Config& c) {
  if constexpr (requires { c.index_heads; }) c.index_heads = 0;
}
template <class Policy> void time_policy(Gpu& gpu, Index T, double peak) {
  constexpr Index H = is_device ? 8 : 1, D = is_device ? 64 : 16;
  std::vector<std::unique_ptr<Case<Policy>>> cases;
  for (int i = 0; i < sets; ++i) cases.push_back(std::make_unique<Case<Policy>>(gpu, T, H, D));
  auto const of = [&](int i) -> Case<Policy>& { return *cases[static_cast<std::size_t>(i)]; };
  auto const needed = [&](auto const& flops) {  // the equations count one head, and the indexer is there once
    auto config = of(0).config;
    double const of_head = flops(config, T);
    leave_out_indexer(config);
    double const without_indexer = flops(config, T);
    return static_cast<double>(H) * without_indexer + (of_head - without_indexer);
  };
  auto const forward = times(gpu, [&](int i) { of(i).forward(); });
  report(Policy::name, "forward", T, H, D, forward, needed([](auto const& c, Index n) { return bench::forward_flops(c, n); }), peak);
  for (int i = 0; i < sets; ++i) of(i).forward();  // what backward reads
  auto const backward = times(gpu, [&](int i) { of(i).backward(); });
  report(Policy::name, "backward", T, H, D, backward, needed([](auto const& c, Index n) { return bench::backward_flops(c, n); }), peak);
}

}  // namespace

int main(int argc, char** argv) try {
  Index const longest = argc > 1 ? std::atoll(argv[1]) : 8192;
  Gpu gpu;
  double const peak = peak_gflops(gpu);
  std::printf("{\"backend\": \"%s\", \"fma_peak_gflops\": %.1f, \"copy_gigabytes_per_second\": %.1f}\n", std::string(Gpu::name).c_str(),
              peak, copied_gigabytes(gpu));
  for (Index T = std::min<Index>(128, longest); T <= longest; T *= 2) {
    time_policy<ha::Full>(gpu, T, peak);
    time_policy<ha::GDN>(gpu, T, peak);
    time_policy<ha::DSA>(gpu, T, peak);
  }
  return 0;
} catch (ha::Error const& error) {
  std::fprintf(stderr, "gpu_kernels: %s\n", error.what());
  return 2;
}
