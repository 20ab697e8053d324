// What the kernels are compared with, measured where they are: the FMA peak of one core, and a tile that also loads.
#ifndef HYBRIDATTN_BENCHMARKS_PEAK_HPP
#define HYBRIDATTN_BENCHMARKS_PEAK_HPP

#include <hybridattn/backend/cpu/pack.hpp>
#include <hybridattn/backend/cpu/tile.hpp>

#include <algorithm>
#include <chrono>
#include <vector>

namespace bench {

// GFLOP/s of float FMAs on 12 independent vectors in registers: the median of 15 runs of about 5 ms.
inline double measure_peak() {
  using namespace hybridattn::cpu;
  constexpr int chains = 12;
  constexpr long rounds = 400000;
  std::vector<double> rates;
  for (int run = 0; run < 15; ++run) {
    Vec<float> sums[chains];
    for (auto& sum : sums) {
      sum = broadcast(1.0f);
      asm volatile("" : "+x"(sum));  // else the compiler sees twelve equal chains and computes one
    }
    Vec<float> a = broadcast(0.999999f), b = broadcast(1e-7f);
    auto const start = std::chrono::steady_clock::now();
    for (long round = 0; round < rounds; ++round) {
      HYBRIDATTN_UNROLL
      for (int i = 0; i < chains; ++i) sums[i] = sums[i] * a + b;
      asm volatile("" : "+x"(a), "+x"(b));
    }
    double const seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    for (auto& sum : sums) asm volatile("" : "+x"(sum));
    rates.push_back(static_cast<double>(rounds) * chains * lanes<float> * 2 / seconds / 1e9);
  }
  std::sort(rates.begin(), rates.end());
  return rates[rates.size() / 2];
}
inline double peak() {
  static double const gflops = measure_peak();
  return gflops;
}

// GFLOP/s of the tile of a matrix product on packed operands in the first-level cache, over about a tenth of a millisecond. On a shared
// machine neighbours slow loads and not FMAs, so this is what a kernel could reach at that moment.
inline double probe() {
  using namespace hybridattn::cpu;
  constexpr int depth = 128, rounds = 100, rows = tuning.product.rows, vectors = tuning.product.vectors;
  alignas(64) static float sliver[depth * rows], panel[depth * vectors * lanes<float>];
  auto const start = std::chrono::steady_clock::now();
  for (int round = 0; round < rounds; ++round)
    tile<rows, vectors, float>(
        depth, {sliver, 1, rows}, {panel, vectors * lanes<float>}, [](int, int) { return Vec<float>{}; },
        [](int, int, Vec<float> sum) { asm volatile("" : : "x"(sum)); });
  double const seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return 2.0 * rounds * depth * rows * vectors * lanes<float> / seconds / 1e9;
}

}  // namespace bench

#endif
