// Times of the policies' kernels on a GPU beside the copy rate and the FMA peak of the same device, a line of JSON for each. Under nvcc they
// are times of the device, by its events. Otherwise the emulator runs the same program, which only checks it.
//   gpu_kernels [LONGEST]    rows of 128, 256, ... LONGEST tokens (8192)
#include "gpu_times.hpp"
#include "work.hpp"

#include <cstdio>
#include <cstdlib>
#include <memory>

namespace {

using namespace bench;

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
