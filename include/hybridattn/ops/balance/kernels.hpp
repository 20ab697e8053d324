// Load balancing as kernels.
#ifndef HYBRIDATTN_OPS_BALANCE_KERNELS_HPP
#define HYBRIDATTN_OPS_BALANCE_KERNELS_HPP

#include <hybridattn/backend/gpu/reduce.hpp>
#include <hybridattn/ops/balance/balance.hpp>

#include <cstdint>

namespace hybridattn::inline HYBRIDATTN_ABI::gpu {

// The sum of an expert's probabilities over sum_rows tokens. A thread has an expert.
template <class T> struct SumProbabilities {
  static constexpr int threads = 128;
  struct Params {
    View<T const, 2> probabilities;
    View<double, 2> parts;   // [blocks of tokens, E]
  };
  struct Shared {};
  static HYBRIDATTN_DEVICE void run(Shared&, Params const& p) {
    Index const first = simt::block_x() * sum_rows, last = simt::smaller(first + sum_rows, p.probabilities.extent(0));
    Index const e = simt::block_y() * threads + simt::thread_id();
    if (e >= p.probabilities.extent(1)) return;
    double sum = 0;
    for (Index n = first; n < last; ++n) sum += static_cast<double>(p.probabilities(n, e));
    p.parts(simt::block_x(), e) = sum;
  }
};

// Adds an expert's tokens, and the parts of its probabilities in order. A thread has an expert.
struct AddExpertUse {
  View<std::int32_t const, 1> offsets;
  View<double const, 2> parts;
  View<double, 2> sums;
  HYBRIDATTN_HD void operator()(Index e) const {
    double sum = 0;
    for (Index n = 0; n < parts.extent(0); ++n) sum += parts(n, e);
    sums(0, e) += offsets(e + 1) - offsets(e);
    sums(1, e) += sum;
  }
};

// One warp adds up the experts.
struct AddBalanceLoss {
  static constexpr int threads = 32;
  struct Params {
    double coefficient;
    Index tokens;   // not 0
    View<double const, 2> sums;
    View<double, 1> value;
  };
  struct Shared {};
  static HYBRIDATTN_DEVICE void run(Shared&, Params const& p) {
    double const tokens = static_cast<double>(p.tokens), experts = static_cast<double>(p.sums.extent(1));
    double sum = 0;
    for (Index e = simt::lane(); e < p.sums.extent(1); e += 32) sum += p.sums(0, e) / tokens * (p.sums(1, e) / tokens);
    sum = simt::sum_lanes(sum);
    if (simt::lane() == 0) p.value(0) += p.coefficient * experts * sum;
  }
};

template <class T> struct BalanceLossBackward {
  double coefficient;
  Index tokens;
  View<double const, 2> sums;
  double d_value;
  View<T, 1> d_probability;
  HYBRIDATTN_HD void operator()(Index e) const {
    double const count = static_cast<double>(tokens), experts = static_cast<double>(sums.extent(1));
    d_probability(e) = tokens == 0 ? T(0) : static_cast<T>(d_value * coefficient * experts * sums(0, e) / count / count);
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::gpu
#endif
