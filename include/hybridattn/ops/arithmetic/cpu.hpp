#ifndef HYBRIDATTN_OPS_ARITHMETIC_CPU_HPP
#define HYBRIDATTN_OPS_ARITHMETIC_CPU_HPP

#include <hybridattn/backend/cpu/cpu.hpp>
#include <hybridattn/backend/cpu/vectors.hpp>
#include <hybridattn/core/math.hpp>
#include <hybridattn/ops/arithmetic/arithmetic.hpp>

#include <algorithm>
#include <cmath>
#include <limits>

namespace hybridattn::inline HYBRIDATTN_ABI {

template <> struct On<Fill, Cpu> {
  template <class T> static void forward(Cpu& cpu, T value, View<T, 1> y) {
    parallel_blocks(cpu, y.count(), cpu::element_grain, [&](Index first, Index last) { std::fill(y.data + first, y.data + last, value); });
  }
};

template <> struct On<Add, Cpu> {
  template <class T> static void forward(Cpu& cpu, View<T const, 1> x, View<T, 1> y) {
    parallel_blocks(cpu, y.count(), cpu::element_grain, [&](Index first, Index last) {
      for (Index i = first; i < last; ++i) y.data[i] += x.data[i];
    });
  }
};

template <> struct On<Scale, Cpu> {
  template <class T> static void forward(Cpu& cpu, T factor, View<T, 1> y) {
    parallel_blocks(cpu, y.count(), cpu::element_grain, [&](Index first, Index last) {
      for (Index i = first; i < last; ++i) y.data[i] *= factor;
    });
  }
};

template <> struct On<AddWeighted, Cpu> {
  template <class T> static void forward(Cpu&, double weight, View<T const, 1> loss, View<double, 1> sum) {
    sum(0) += weight * static_cast<double>(loss(0));
  }
};

template <> struct On<AllFinite, Cpu> {
  template <class T> static bool forward(Cpu&, View<T const, 1> x) {
    return std::all_of(x.data, x.data + x.count(), [](T value) { return std::isfinite(value); });
  }
};

template <> struct On<SumOfSquares, Cpu> {
  template <class T> static void forward(Cpu& cpu, View<T const, 1> x, View<double, 1> result) {
    result(0) = 0;
    Index const blocks = ceil_div(x.count(), cpu::element_grain);
    if (blocks == 0) return;
    Tensor<double, 1, Cpu> partial{cpu, {blocks}};
    auto const sums = out(partial);
    parallel_blocks(cpu, x.count(), cpu::element_grain, [&](Index first, Index last) {
      double lane[8] = {};   // a vector of doubles: squares of floats do not overflow
      Index i = first;
      for (; i + 8 <= last; i += 8)
        for (Index j = 0; j < 8; ++j) lane[j] += static_cast<double>(x.data[i + j]) * static_cast<double>(x.data[i + j]);
      for (; i < last; ++i) lane[i % 8] += static_cast<double>(x.data[i]) * static_cast<double>(x.data[i]);
      double sum = 0;
      for (double value : lane) sum += value;
      sums(first / cpu::element_grain) = sum;
    });
    for (Index i = 0; i < blocks; ++i) result(0) += sums(i);
    if (!std::isfinite(result(0)) && !On<AllFinite, Cpu>::forward(cpu, x)) result(0) = std::numeric_limits<double>::quiet_NaN();
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
