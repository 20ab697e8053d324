// The loss of logits as kernels. A block has a row of logits: thread i has the elements i, i + threads, ...
#ifndef HYBRIDATTN_OPS_CROSS_ENTROPY_KERNELS_HPP
#define HYBRIDATTN_OPS_CROSS_ENTROPY_KERNELS_HPP

#include <hybridattn/backend/gpu/reduce.hpp>
#include <hybridattn/ops/cross_entropy/cross_entropy.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI::gpu {

// The largest of some logits, the first of equal ones.
template <class T> struct LargestLogit {
  T value;
  int at;

  HYBRIDATTN_DEVICE bool comes_before(LargestLogit const& other) const {
    return value > other.value || (value == other.value && at < other.at);
  }
};

template <class T> struct SoftmaxLossRow {
  static constexpr int threads = 256, warps = threads / 32;
  struct Params {
    View<T const, 2> logits;
    View<std::int32_t const, 1> targets;
    View<double const, 1> scale;
    View<T, 2> d_logits;
    View<LossSum, 1> losses;   // of each row
  };
  struct Shared {
    LargestLogit<T> largest[warps];
    T sums[warps];
  };
  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    Index const n = simt::block_x();
    int const V = static_cast<int>(p.logits.extent(1)), target = p.targets(n);
    check_target(target, V);
    if (target < 0) {
      write_zeros(p, n);
      return;
    }
    int const best = largest_of_row(shared, p.logits.row(n), V);
    T const* const logits = p.logits.row(n);
    T const peak = logits[best], own = logits[target];
    T sum = 0;
    for (int v = simt::thread_id(); v < V; v += threads) sum += std::exp(logits[v] - peak);
    sum = sum_block(shared.sums, sum);   // every thread has read peak and own: d_logits may be logits
    if (simt::thread_id() == 0)
      p.losses(n) = {static_cast<double>(peak) + std::log(static_cast<double>(sum)) - static_cast<double>(own), 1, best == target};
    if (!p.d_logits.empty()) write_gradient(p, n, target, peak, sum);
  }

 private:
  static HYBRIDATTN_DEVICE void write_zeros(Params const& p, Index n) {
    for (int v = simt::thread_id(); v < static_cast<int>(p.logits.extent(1)) && !p.d_logits.empty(); v += threads) p.d_logits(n, v) = T(0);
    if (simt::thread_id() == 0) p.losses(n) = {};
  }
  static HYBRIDATTN_DEVICE void write_gradient(Params const& p, Index n, int target, T peak, T sum) {
    T const* const logits = p.logits.row(n);
    T* const d_logits = p.d_logits.row(n);
    T const scale = static_cast<T>(p.scale(0)), factor = scale / sum;
    for (int v = simt::thread_id(); v < static_cast<int>(p.logits.extent(1)); v += threads)
      d_logits[v] = std::exp(logits[v] - peak) * factor - (v == target ? scale : T(0));
  }
  // A NaN is never the largest, except in the first place: then the whole row is NaN.
  static HYBRIDATTN_DEVICE int largest_of_row(Shared& shared, T const* logits, int V) {
    LargestLogit<T> best{-simt::infinity<T>(), V};
    for (int v = simt::thread_id(); v < V; v += threads) {
      LargestLogit<T> const next{v == 0 && logits[0] != logits[0] ? simt::infinity<T>() : logits[v], v};
      if (next.comes_before(best)) best = next;
    }
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int step = 1; step < 32; step *= 2) {
      LargestLogit<T> const other{simt::shuffle_xor(best.value, step), simt::shuffle_xor(best.at, step)};
      if (other.comes_before(best)) best = other;
    }
    if (simt::lane() == 0) shared.largest[simt::warp()] = best;
    simt::sync_block();
    for (LargestLogit<T> const& other : shared.largest)
      if (other.comes_before(best)) best = other;
    return best.at;
  }
  // As on the CPU: who calls the operation checks the targets.
  static HYBRIDATTN_DEVICE void check_target([[maybe_unused]] int target, [[maybe_unused]] int V) {
#if HYBRIDATTN_BOUNDS_CHECKS
    if (target >= V) HYBRIDATTN_ABORT();
#endif
  }
};

// Adds the losses of all rows to loss [1]. One block.
struct AddRowLosses {
  static constexpr int threads = 256;
  struct Params {
    View<LossSum const, 1> rows;
    View<LossSum, 1> loss;
  };
  struct Shared {
    double losses[threads / 32];
    Index numbers[threads / 32];
  };
  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    LossSum sum;
    for (Index n = simt::thread_id(); n < p.rows.extent(0); n += threads) sum += p.rows(n);
    LossSum const all{sum_block(shared.losses, sum.loss), sum_block(shared.numbers, sum.count), sum_block(shared.numbers, sum.correct)};
    if (simt::thread_id() == 0) p.loss(0) += all;
  }
};

// One block.
struct CountTargetsOnce {
  static constexpr int threads = 256;
  struct Params {
    View<std::int32_t const, 1> targets;
    View<Index, 1> count;
    View<double, 1> scale;
  };
  struct Shared {
    Index of_warps[threads / 32];
  };
  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    Index counted = 0;
    for (Index n = simt::thread_id(); n < p.targets.extent(0); n += threads) counted += p.targets(n) >= 0;
    counted = sum_block(shared.of_warps, counted);
    if (simt::thread_id() > 0) return;
    p.count(0) += counted;
    p.scale(0) = p.count(0) == 0 ? 0 : 1 / static_cast<double>(p.count(0));
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::gpu
#endif
