// The FMA peak of one core, measured where the kernels are: the denominator of every share.
#ifndef HYBRIDATTN_BENCHMARKS_PEAK_HPP
#define HYBRIDATTN_BENCHMARKS_PEAK_HPP

#include <hybridattn/backend/cpu/simd.hpp>

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

}  // namespace bench

#endif
