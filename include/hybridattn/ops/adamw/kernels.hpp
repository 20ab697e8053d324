// AdamW as kernels. One launch works on all tensors of a table. The host cannot read how many blocks of elements the table has, so a
// fixed number of blocks of threads take the table's blocks in turns: block x takes the blocks x, x + adamw_turns, ...
#ifndef HYBRIDATTN_OPS_ADAMW_KERNELS_HPP
#define HYBRIDATTN_OPS_ADAMW_KERNELS_HPP

#include <hybridattn/backend/gpu/reduce.hpp>
#include <hybridattn/ops/adamw/adamw.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI::gpu {

inline constexpr Index adamw_turns = 264;
inline constexpr int adamw_threads = 512;

template <class T> using AdamWTable = View<AdamWTensor<T> const, 1>;

template <class T> HYBRIDATTN_DEVICE Index blocks_of_all(AdamWTable<T> tensors) {
  Index const n = tensors.extent(0);
  return n == 0 ? 0 : tensors(n - 1).first_block + tensors(n - 1).blocks();
}
// The tensor that a block of the table belongs to.
template <class T> HYBRIDATTN_DEVICE Index tensor_of(AdamWTable<T> tensors, Index block) {
  Index first = 0, last = tensors.extent(0);
  while (last - first > 1) {
    Index const middle = (first + last) / 2;
    if (tensors(middle).first_block <= block) first = middle;
    else last = middle;
  }
  return first;
}
// The elements of a tensor's block.
struct AdamWRange {
  Index first, last;
};
template <class T> HYBRIDATTN_DEVICE AdamWRange elements_of(AdamWTensor<T> const& t, Index block) {
  Index const first = (block - t.first_block) * AdamWTensor<T>::block;
  return {first, simt::smaller(first + AdamWTensor<T>::block, t.count)};
}

// parts [tensors, adamw_turns]: part s of a tensor is the sum over its blocks s, s + adamw_turns, ... So the order of a tensor's sum does
// not depend on the other tensors. A tensor has as many parts as blocks, at most adamw_turns.
template <class T> struct AdamWPartialSquares {
  static constexpr int threads = adamw_threads;
  struct Params {
    AdamWTable<T> tensors;
    View<double, 2> parts;
  };
  struct Shared {
    double of_warps[threads / 32];
  };
  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    Index const blocks = blocks_of_all<T>(p.tensors);
    for (Index block = simt::block_x(); block < blocks;) {
      Index const i = tensor_of<T>(p.tensors, block);
      AdamWTensor<T> const t = p.tensors(i);
      Index const part = block - t.first_block;   // below adamw_turns: the block before this one in turn is another tensor's
      double sum = 0;
      for (; block < t.first_block + t.blocks(); block += adamw_turns) sum += sum_of_squares(t, elements_of(t, block));
      sum = sum_block(shared.of_warps, sum);
      if (simt::thread_id() == 0) p.parts(i, part) = sum;
    }
  }

 private:
  // x - x is 0, or NaN where x is not finite. Squares of floats do not overflow in double.
  static HYBRIDATTN_DEVICE double sum_of_squares(AdamWTensor<T> const& t, AdamWRange elements) {
    double sum = 0;
    for (Index e = elements.first + simt::thread_id(); e < elements.last; e += threads) {
      double const x = static_cast<double>(t.g[e]);
      sum += x * x + (x - x);
    }
    return sum;
  }
};
// A warp has a tensor.
template <class T> struct AdamWAddSquares {
  static constexpr int threads = 128;
  struct Params {
    AdamWTable<T> tensors;
    View<double const, 2> parts;
    View<double, 1> squares;
  };
  struct Shared {};
  static HYBRIDATTN_DEVICE void run(Shared&, Params const& p) {
    Index const i = simt::block_x() * (threads / 32) + simt::warp();
    if (i >= p.tensors.extent(0)) return;
    Index const parts = simt::smaller(p.tensors(i).blocks(), adamw_turns);
    double sum = 0;
    for (Index part = simt::lane(); part < parts; part += 32) sum += p.parts(i, part);
    sum = simt::sum_lanes(sum);
    if (simt::lane() == 0) p.squares(i) = sum;
  }
};

// The rule for an element.
template <class T> struct AdamWElement {
  T keep, clip, b1, b2, eps, add1, add2, step, root;

  struct Result {
    T mean, square, parameter;
  };
  explicit HYBRIDATTN_DEVICE AdamWElement(AdamWRates const& r)
      : keep(static_cast<T>(1 - r.learning_rate * r.weight_decay)), clip(static_cast<T>(r.gradient_scale)), b1(static_cast<T>(r.beta_1)),
        b2(static_cast<T>(r.beta_2)), eps(static_cast<T>(r.epsilon)), add1(static_cast<T>(1 - r.beta_1)),
        add2(static_cast<T>(1 - r.beta_2)), step(static_cast<T>(r.learning_rate / r.correction_1)),
        root(static_cast<T>(1 / std::sqrt(r.correction_2))) {}
  HYBRIDATTN_DEVICE Result operator()(AdamWTensor<T> const& t, Index e) const {
    T const gradient = t.g[e] * clip, mean = b1 * t.m[e] + add1 * gradient, square = b2 * t.v[e] + add2 * gradient * gradient;
    return {mean, square, keep * t.p[e] - step * mean / (std::sqrt(square) * root + eps)};
  }
};

template <class T> struct AdamWMove {
  static constexpr int threads = adamw_threads;
  struct Params {
    AdamWTable<T> tensors;
    View<AdamWRates const, 1> rates;
    View<StepNumbers const, 1> numbers;
  };
  struct Shared {};
  static HYBRIDATTN_DEVICE void run(Shared&, Params const& p) {
    if (p.numbers(0).fault != StepFault::none) return;
    Index const blocks = blocks_of_all<T>(p.tensors);
    for (Index block = simt::block_x(); block < blocks; block += adamw_turns) {
      Index const i = tensor_of<T>(p.tensors, block);
      AdamWTensor<T> const t = p.tensors(i);
      AdamWRange const elements = elements_of(t, block);
      AdamWElement<T> const rule{p.rates(i)};
      for (Index e = elements.first + simt::thread_id(); e < elements.last; e += threads) {
        auto const next = rule(t, e);
        t.m[e] = next.mean;
        t.v[e] = next.square;
        t.p[e] = next.parameter;
      }
    }
  }
};

// A fault in block `number` of a tensor, as an integer above 0. The earlier block has the larger one, and in a block the mean before the
// square before the parameter. So the largest one is the fault that a tensor is said to have.
inline constexpr Index first_fault_rank = Index{1} << 60;
HYBRIDATTN_HD inline Index rank_of(Index number, StepFault fault) {
  return first_fault_rank - (number * 4 + static_cast<Index>(fault) - static_cast<Index>(StepFault::mean));
}
HYBRIDATTN_HD inline StepFault fault_of(Index rank) {
  return rank == 0 ? StepFault::none : static_cast<StepFault>((first_fault_rank - rank) % 4 + static_cast<Index>(StepFault::mean));
}

// ranks [tensors]: the largest rank of each tensor's faults; 0 before.
template <class T> struct AdamWRankFaults {
  static constexpr int threads = adamw_threads;
  struct Params {
    AdamWTable<T> tensors;
    View<AdamWRates const, 1> rates;
    View<StepNumbers const, 1> numbers;
    View<Index, 1> ranks;
  };
  struct Shared {};
  static HYBRIDATTN_DEVICE void run(Shared&, Params const& p) {
    if (p.numbers(0).fault != StepFault::none) return;
    Index const blocks = blocks_of_all<T>(p.tensors);
    for (Index block = simt::block_x(); block < blocks; block += adamw_turns) {
      Index const i = tensor_of<T>(p.tensors, block);
      AdamWTensor<T> const t = p.tensors(i);
      StepFault const fault = fault_in(t, elements_of(t, block), AdamWElement<T>{p.rates(i)});
      if (fault != StepFault::none) simt::atomic_max(&p.ranks(i), rank_of(block - t.first_block, fault));
    }
  }

 private:
  // Of the elements that this thread has.
  static HYBRIDATTN_DEVICE StepFault fault_in(AdamWTensor<T> const& t, AdamWRange elements, AdamWElement<T> const& rule) {
    T mean = 0, square = 0, parameter = 0;   // NaN as soon as one number is not finite: x - x is 0 of a finite one only
    for (Index e = elements.first + simt::thread_id(); e < elements.last; e += threads) {
      auto const next = rule(t, e);
      mean += next.mean - next.mean;
      square += next.square - next.square;
      parameter += next.parameter - next.parameter;
    }
    return mean != 0 ? StepFault::mean : square != 0 ? StepFault::square : parameter != 0 ? StepFault::parameter : StepFault::none;
  }
};
struct AdamWNameFaults {
  View<Index const, 1> ranks;
  View<StepFault, 1> found;
  HYBRIDATTN_HD void operator()(Index i) const { found(i) = fault_of(ranks(i)); }
};

struct StepOpening {
  View<StepNumbers, 1> numbers;
  HYBRIDATTN_HD void operator()(Index) const {
    StepNumbers const& last = numbers(0);
    StepNumbers next;
    next.rate = last.rate;
    next.steps = last.steps;
    next.first_bad = last.first_bad;
    numbers(0) = next;
  }
};
struct StepLosses {
  double share;
  View<BatchLosses const, 1> losses;
  View<StepNumbers, 1> numbers;
  HYBRIDATTN_HD void operator()(Index) const {
    numbers(0).loss += losses(0).loss;
    numbers(0).auxiliary_loss += share * losses(0).auxiliary();
    numbers(0).policy_loss += share * losses(0).policy;
  }
};

// One warp: lane l has the tensors l, l + 32, ...
struct StepDecision {
  static constexpr int threads = 32;
  struct Params {
    DecideStep::Options options;
    View<std::int32_t const, 1> roles;
    View<double const, 1> squares;
    View<Index const, 1> updates;
    View<AdamWRates, 1> rates;
    View<StepNumbers, 1> numbers;
  };
  struct Shared {};
  static HYBRIDATTN_DEVICE void run(Shared&, Params const& p) {
    Index const tensors = p.roles.extent(0);
    double others = 0, detached = 0;   // norms
    Index bad = tensors;               // the first tensor whose sum is not finite
    for (Index i = simt::lane(); i < tensors; i += 32) {
      bool const is_detached = p.roles(i) & StepRole::detached;
      others += is_detached ? 0 : p.squares(i);
      detached += is_detached ? p.squares(i) : 0;
      if (!std::isfinite(p.squares(i))) bad = simt::smaller(bad, i);
    }
    others = std::sqrt(simt::sum_lanes(others));
    detached = std::sqrt(simt::sum_lanes(detached));
    bad = -simt::largest_of_lanes(-bad);
    StepFault const fault = fault_before_clipping(p, bad);
    double const rate = p.numbers(0).rate, norm = std::hypot(others, detached);
    for (Index i = simt::lane(); i < tensors && fault == StepFault::none; i += 32)
      p.rates(i) = DecideStep::rates(p.options, p.roles(i), static_cast<double>(p.updates(i) + 1), rate,
                                     p.roles(i) & StepRole::detached ? detached : others);
    simt::sync_warp();   // every lane has read the numbers
    if (simt::lane() > 0) return;
    p.numbers(0).gradient_norm = norm;
    p.numbers(0).fault = fault == StepFault::none && !std::isfinite(norm) ? StepFault::global_norm : fault;
    if (bad < tensors && p.numbers(0).tensor < 0) p.numbers(0).tensor = static_cast<std::int32_t>(bad);
  }

 private:
  static HYBRIDATTN_DEVICE StepFault fault_before_clipping(Params const& p, Index bad) {
    StepNumbers const& step = p.numbers(0);
    if (!std::isfinite(step.loss.loss)) return StepFault::loss;
    if (!std::isfinite(step.auxiliary_loss)) return StepFault::auxiliary_loss;
    if (step.fault != StepFault::none || bad == p.roles.extent(0)) return step.fault;
    return std::isnan(p.squares(bad)) ? StepFault::gradient : StepFault::tensor_norm;
  }
};

// One warp: lane l has the tensors l, l + 32, ...
struct StepClosing {
  static constexpr int threads = 32;
  struct Params {
    View<std::int32_t const, 1> roles;
    View<StepFault const, 1> found;
    View<Index, 1> updates;
    View<StepNumbers, 1> numbers;
  };
  struct Shared {};
  static HYBRIDATTN_DEVICE void run(Shared&, Params const& p) {
    Index const tensors = p.found.extent(0);
    Index bad = tensors;   // the first tensor with a fault
    for (Index i = simt::lane(); i < tensors; i += 32)
      if (p.found(i) != StepFault::none) bad = simt::smaller(bad, i);
    bad = -simt::largest_of_lanes(-bad);
    bool const was_sound = p.numbers(0).fault == StepFault::none;
    for (Index i = simt::lane(); i < p.roles.extent(0) && was_sound && bad == tensors; i += 32)
      p.updates(i) += p.roles(i) & StepRole::has_gradient ? 1 : 0;
    simt::sync_warp();   // every lane has read the fault
    if (simt::lane() > 0) return;
    StepNumbers& step = p.numbers(0);
    if (was_sound && bad < tensors) {
      step.fault = p.found(bad);
      step.tensor = static_cast<std::int32_t>(bad);
    }
    if (step.fault == StepFault::none) ++step.steps;
    else if (step.first_bad.step == 0) step.first_bad = {step.steps + 1, step.loss, step.auxiliary_loss, step.fault, step.tensor};
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::gpu
#endif
