// Mixtures of experts as kernels. A warp has a row, lane l its elements l, l + 32, ...
#ifndef HYBRIDATTN_OPS_MOE_KERNELS_HPP
#define HYBRIDATTN_OPS_MOE_KERNELS_HPP

#include <hybridattn/backend/gpu/rows.hpp>
#include <hybridattn/ops/moe/moe.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI::gpu {

// An expert with its logit. Higher logits come first, the smaller index of equal ones first, and a NaN is as low as -infinity.
template <class T> struct RankedExpert {
  T logit;
  std::int32_t expert;

  HYBRIDATTN_DEVICE bool comes_before(RankedExpert const& other) const {
    return logit > other.logit || (logit == other.logit && expert < other.expert);
  }
};

template <class T> struct RouteRow {
  Route::Options options;
  View<T const, 2> logits;
  View<T, 2> probabilities, weights;
  View<std::int32_t, 2> experts;

  HYBRIDATTN_DEVICE void operator()(Index n) const {
    choose(n);
    simt::sync_warp();   // every lane sees the choices
    write_softmax(n, logits(n, experts(n, 0)));
    simt::sync_warp();   // and the probabilities
    Index const k = experts.extent(1);
    T sum = 0;
    for (Index j = simt::lane(); j < k; j += 32) sum += probabilities(n, experts(n, j));
    sum = options.renormalise ? simt::sum_lanes(sum) : T(1);
    for (Index j = simt::lane(); j < k; j += 32) weights(n, j) = probabilities(n, experts(n, j)) / sum;
  }

 private:
  // Each choice is the first expert that comes after the choice before it.
  HYBRIDATTN_DEVICE void choose(Index n) const {
    RankedExpert<T> last{simt::infinity<T>(), -1};
    for (Index j = 0; j < experts.extent(1); ++j) {
      last = first_after(n, last);
      if (simt::lane() == 0) experts(n, j) = last.expert;
    }
  }
  HYBRIDATTN_DEVICE RankedExpert<T> first_after(Index n, RankedExpert<T> last) const {
    auto const E = static_cast<std::int32_t>(logits.extent(1));
    RankedExpert<T> best{-simt::infinity<T>(), E};
    for (std::int32_t e = simt::lane(); e < E; e += 32) {
      T const logit = logits(n, e);
      RankedExpert<T> const next{logit == logit ? logit : -simt::infinity<T>(), e};
      if (last.comes_before(next) && next.comes_before(best)) best = next;
    }
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int step = 1; step < 32; step *= 2) {
      RankedExpert<T> const other{simt::shuffle_xor(best.logit, step), simt::shuffle_xor(best.expert, step)};
      if (other.comes_before(best)) best = other;
    }
    return best;
  }
  HYBRIDATTN_DEVICE void write_softmax(Index n, T peak) const {
    T sum = 0;
    for (Index e = simt::lane(); e < logits.extent(1); e += 32) sum += probabilities(n, e) = std::exp(logits(n, e) - peak);
    sum = simt::sum_lanes(sum);
    for (Index e = simt::lane(); e < logits.extent(1); e += 32) probabilities(n, e) /= sum;
  }
};

template <class T> struct RouteRowGradients {
  Route::Options options;
  View<T const, 2> probabilities, weights;
  View<std::int32_t const, 2> experts;
  View<T const, 2> d_weights;
  View<T const, 1> d_probability;
  View<T, 2> d_logits;

  HYBRIDATTN_DEVICE void operator()(Index n) const {
    Index const E = probabilities.extent(1), k = experts.extent(1);
    T along = 0, along_chosen = 0;   // of the softmax over all, over the chosen
    for (Index e = simt::lane(); e < E && !d_probability.empty(); e += 32) along += probabilities(n, e) * d_probability(e);
    for (Index j = simt::lane(); j < k; j += 32) along_chosen += weights(n, j) * d_weights(n, j);
    along = simt::sum_lanes(options.renormalise ? along : along + along_chosen);
    along_chosen = options.renormalise ? simt::sum_lanes(along_chosen) : T(0);
    for (Index e = simt::lane(); e < E; e += 32)
      d_logits(n, e) = probabilities(n, e) * ((d_probability.empty() ? T(0) : d_probability(e)) - along);
    simt::sync_warp();   // another lane may have written a chosen expert's
    for (Index j = simt::lane(); j < k; j += 32) d_logits(n, experts(n, j)) += weights(n, j) * (d_weights(n, j) - along_chosen);
  }
};

// x[i] becomes the sum of the elements before it. Returns the sum of all.
HYBRIDATTN_DEVICE std::int32_t sum_before(std::int32_t* x, Index count) {
  std::int32_t total = 0;
  for (Index first = 0; first < count; first += 32) {
    Index const i = first + simt::lane();
    std::int32_t const own = i < count ? x[i] : 0;
    std::int32_t sum = own;
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int step = 1; step < 32; step *= 2) {
      std::int32_t const lower = simt::shuffle_up(sum, step);
      sum += simt::lane() >= step ? lower : 0;
    }
    if (i < count) x[i] = total + sum - own;
    total += simt::shuffle(sum, 31);
  }
  return total;
}

// Permute sorts by counting. The choices, in the order of tokens, are cut into parts of `part_size`, and counts [E, parts] says how many
// choices of a part are for an expert. From the counts follows where the rows of each part and expert begin.
inline constexpr Index part_size = 128;

struct CountChoices {
  View<std::int32_t const, 2> experts;
  View<std::int32_t, 2> counts;   // 0 before
  HYBRIDATTN_DEVICE void operator()(Index i) const {
    Index const k = experts.extent(1);
    simt::atomic_add(&counts(experts(i / k, i % k), i / part_size), 1);
  }
};
// counts of an expert become how many of its rows are before a part's; offsets[e] becomes how many rows it has.
struct StartParts {
  View<std::int32_t, 2> counts;
  View<std::int32_t, 1> offsets;
  HYBRIDATTN_DEVICE void operator()(Index e) const {
    std::int32_t const rows = sum_before(counts.row(e), counts.extent(1));
    if (simt::lane() == 0) offsets(e) = rows;
  }
};
struct StartExperts {
  View<std::int32_t, 1> offsets;
  HYBRIDATTN_DEVICE void operator()(Index) const {
    Index const E = offsets.extent(0) - 1;
    std::int32_t const rows = sum_before(offsets.data, E);
    if (simt::lane() == 0) offsets(E) = rows;
  }
};
// A warp has a part. 32 choices at a time take the next rows of their experts.
struct PlaceChoices {
  View<std::int32_t const, 2> experts;
  View<std::int32_t const, 1> offsets;
  View<std::int32_t, 2> counts, places;
  HYBRIDATTN_DEVICE void operator()(Index part) const {
    Index const k = experts.extent(1), end = simt::smaller((part + 1) * part_size, experts.extent(0) * k);
    for (Index first = part * part_size; first < end; first += 32) {
      Index const i = first + simt::lane();
      std::int32_t const expert = i < end ? experts(i / k, i % k) : -1;
      std::uint32_t const same = simt::match_any(expert), before = same & ((1u << simt::lane()) - 1);
      std::int32_t const taken = i < end ? counts(expert, part) : 0;
      simt::sync_warp();   // every lane has read the count
      if (i < end) places(i / k, i % k) = offsets(expert) + taken + ones(before);
      if (i < end && before == 0) counts(expert, part) = taken + ones(same);
      simt::sync_warp();
    }
  }

 private:
  static HYBRIDATTN_DEVICE std::int32_t ones(std::uint32_t bits) {
    std::int32_t count = 0;
    for (; bits != 0; bits &= bits - 1) ++count;
    return count;
  }
};

template <class T> struct DistributeRow {
  View<T const, 2> x;
  View<std::int32_t const, 2> places;
  View<T, 2> rows;
  HYBRIDATTN_DEVICE void operator()(Index n) const {
    for (Index c = simt::lane(); c < x.extent(1); c += 32) {
      T const own = x(n, c);
      for (Index j = 0; j < places.extent(1); ++j) rows(places(n, j), c) = own;
    }
  }
};
template <class T> struct CollectRow {
  View<std::int32_t const, 2> places;
  View<T const, 2> d_rows;
  View<T, 2> d_x;
  Into into;
  HYBRIDATTN_DEVICE void operator()(Index n) const {
    for (Index c = simt::lane(); c < d_x.extent(1); c += 32) {
      T sum = into == Into::add ? d_x(n, c) : T(0);
      for (Index j = 0; j < places.extent(1); ++j) sum += d_rows(places(n, j), c);
      d_x(n, c) = sum;
    }
  }
};

template <class T> struct CombineRow {
  View<T const, 2> rows, weights;
  View<std::int32_t const, 2> places;
  View<T, 2> y;
  HYBRIDATTN_DEVICE void operator()(Index n) const {
    for (Index c = simt::lane(); c < y.extent(1); c += 32) {
      T sum = 0;
      for (Index j = 0; j < places.extent(1); ++j) sum += weights(n, j) * rows(places(n, j), c);
      y(n, c) = sum;
    }
  }
};
// A warp has a choice.
template <class T> struct CombineChoiceGradients {
  View<T const, 2> rows, weights;
  View<std::int32_t const, 2> places;
  View<T const, 2> d_y;
  View<T, 2> d_rows, d_weights;
  HYBRIDATTN_DEVICE void operator()(Index choice) const {
    Index const n = choice / places.extent(1), j = choice % places.extent(1), row = places(n, j);
    T const weight = weights(n, j);
    T sum = 0;
    for (Index c = simt::lane(); c < d_y.extent(1); c += 32) {
      sum += d_y(n, c) * rows(row, c);
      d_rows(row, c) = weight * d_y(n, c);
    }
    sum = simt::sum_lanes(sum);
    if (simt::lane() == 0) d_weights(n, j) = sum;
  }
};

template <class T> struct AddGatedRow {
  View<T const, 2> x, logit;
  View<T, 2> y;
  HYBRIDATTN_DEVICE void operator()(Index n) const {
    T const open = sigmoid(logit(n, 0));
    for (Index c = simt::lane(); c < y.extent(1); c += 32) y(n, c) += open * x(n, c);
  }
};
template <class T> struct AddGatedRowGradients {
  View<T const, 2> x, logit, d_y;
  View<T, 2> d_x, d_logit;
  HYBRIDATTN_DEVICE void operator()(Index n) const {
    T const open = sigmoid(logit(n, 0));
    T along = 0;
    for (Index c = simt::lane(); c < d_y.extent(1); c += 32) {
      along += x(n, c) * d_y(n, c);
      d_x(n, c) = open * d_y(n, c);
    }
    along = simt::sum_lanes(along);
    if (simt::lane() == 0) d_logit(n, 0) = open * (T(1) - open) * along;
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::gpu
#endif
