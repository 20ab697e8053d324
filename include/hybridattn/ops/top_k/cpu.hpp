#ifndef HYBRIDATTN_OPS_TOP_K_CPU_HPP
#define HYBRIDATTN_OPS_TOP_K_CPU_HPP

#include <hybridattn/backend/cpu/cpu.hpp>
#include <hybridattn/backend/cpu/vectors.hpp>
#include <hybridattn/core/math.hpp>
#include <hybridattn/ops/top_k/top_k.hpp>
#include <hybridattn/tensor/in_float.hpp>

#include <algorithm>
#include <limits>
#include <numeric>

namespace hybridattn::inline HYBRIDATTN_ABI {
namespace cpu {

// One row: scores become integers in the same order, and the k-th largest is found by halving the interval it lies in. A step
// counts the larger keys, a vector at a time; it ends as soon as a bound has exactly k keys above it, after about 16 steps
// of 32 when scores are random.
template <class T> class RowTopK {
 public:
  using Key = typename BitsOf<T>::type;
  // Keys that a row of n scores needs room for.
  static Index scratch(Index n) { return round_up(n, lanes<T>); }

  RowTopK(T const* scores, Index n, Key* keys) : keys_(keys), n_(n) {
    Mask<T> largest = broadcast_key(lowest);
    for_each_vector<T>(0, n, [&](Slot<T> s) HYBRIDATTN_INLINE_LAMBDA {
      Mask<T> key = ordered(s.get(scores));
      if (s.count < lanes<T>) key = lane_numbers<T>() < static_cast<Key>(s.count) ? key : broadcast_key(lowest);
      largest = key > largest ? key : largest;
      store<Key>(keys_ + s.i, key);
    });
    for (int lane = 0; lane < lanes<T>; ++lane) largest_ = std::max(largest_, static_cast<Key>(largest[lane]));
  }

  // k <= n of them, ascending.
  void select(Index k, std::int32_t* indices) const {
    Bound const bound = find(k);
    Index const tied = end_of_ties(bound);
    Index chosen = 0, i = 0;
    for (; i < tied; ++i) chosen = take(i, bound.key - 1, indices, chosen);
    for (; i < n_ && chosen < k; ++i) chosen = take(i, bound.key, indices, chosen);
  }

 private:
  // The chosen keys: those above `key`, and the first `ties` of those equal to it.
  struct Bound {
    Key key;
    Index ties;
  };
  static constexpr Key lowest = std::numeric_limits<Key>::min();   // no score: padding

  static Mask<T> broadcast_key(Key key) { return Mask<T>{} + key; }
  // Bits of floating point numbers are in order of size, those of negative ones reversed. Adding 0 makes +0 of -0.
  static Mask<T> ordered(Vec<T> x) {
    constexpr int sign = 8 * sizeof(Key) - 1;
    Mask<T> const bits = reinterpret_cast<Mask<T>>(x + T(0)), key = bits ^ ((bits >> sign) & std::numeric_limits<Key>::max());
    return x == x ? key : broadcast_key(lowest + 1);
  }

  // Without a branch: what is not chosen is overwritten by the next.
  HYBRIDATTN_INLINE Index take(Index i, Key above, std::int32_t* indices, Index chosen) const {
    indices[chosen] = static_cast<std::int32_t>(i);
    return chosen + (keys_[i] > above);
  }
  // Behind the last tie that is chosen.
  Index end_of_ties(Bound bound) const {
    Index i = 0;
    for (Index left = bound.ties; i < n_ && left > 0; ++i) left -= keys_[i] == bound.key;
    return i;
  }
  Index count_above(Key bound) const {
    Mask<T> count{};
    for (Index i = 0; i < n_; i += lanes<T>) count -= load<Key>(keys_ + i) > bound;
    return static_cast<Index>(sum<Key>(count));
  }
  Bound find(Index k) const {
    Key low = lowest, high = largest_;   // more than k keys are above low, or all; fewer than k above high
    Index above = 0;                     // high
    while (high > low + 1) {
      Key const middle = std::midpoint(low, high);
      Index const count = count_above(middle);
      if (count == k) return {middle, 0};
      low = count > k ? middle : low;
      high = count > k ? high : middle;
      above = count > k ? above : count;
    }
    return {high, k - above};
  }

  Key* keys_;
  Index n_;
  Key largest_ = lowest;
};

}  // namespace cpu

template <> struct On<TopK, Cpu> : InFloat<TopK, Cpu> {
  using InFloat::forward;
  template <std::floating_point T> static void forward(Cpu& cpu, View<T const, 2> scores, View<std::int32_t, 2> indices) {
    using Row = cpu::RowTopK<T>;
    Index const n = scores.extent(1), k = indices.extent(1), chosen = std::min(n, k);
    Tensor<typename Row::Key, 2, Cpu> scratch{cpu, {Index{cpu.threads()}, Row::scratch(n)}};
    auto const keys = out(scratch);
    parallel_for(cpu, scores.extent(0), [&](Index r, int thread) {
      if (chosen > 0) Row{scores.row(r), n, keys.row(thread)}.select(chosen, indices.row(r));
      std::fill(indices.row(r) + chosen, indices.row(r) + k, -1);
    });
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
