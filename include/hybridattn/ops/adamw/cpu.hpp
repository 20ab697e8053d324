#ifndef HYBRIDATTN_OPS_ADAMW_CPU_HPP
#define HYBRIDATTN_OPS_ADAMW_CPU_HPP

#include <hybridattn/backend/cpu/cpu.hpp>
#include <hybridattn/backend/cpu/vectors.hpp>
#include <hybridattn/core/math.hpp>
#include <hybridattn/ops/adamw/adamw.hpp>

#include <algorithm>
#include <cmath>
#include <limits>

namespace hybridattn::inline HYBRIDATTN_ABI {

namespace cpu::detail {

// The rule for a vector of elements.
template <class T> struct AdamWRule {
  T keep, clip, b1, b2, eps, add1, add2, step, root;

  explicit AdamWRule(AdamWRates const& r)
      : keep(static_cast<T>(1 - r.learning_rate * r.weight_decay)), clip(static_cast<T>(r.gradient_scale)), b1(static_cast<T>(r.beta_1)),
        b2(static_cast<T>(r.beta_2)), eps(static_cast<T>(r.epsilon)), add1(static_cast<T>(1 - r.beta_1)),
        add2(static_cast<T>(1 - r.beta_2)), step(static_cast<T>(r.learning_rate / r.correction_1)),
        root(static_cast<T>(1 / std::sqrt(r.correction_2))) {}

  struct Result {
    Vec<T> mean, square, parameter;
  };
  HYBRIDATTN_INLINE Result operator()(Vec<T> g, Vec<T> m, Vec<T> v, Vec<T> p) const {
    Vec<T> const gradient = g * clip, mean = b1 * m + add1 * gradient, square = b2 * v + add2 * gradient * gradient;
    return {mean, square, keep * p - step * mean / (cpu::sqrt<T>(square) * root + eps)};
  }
};

// f(number of the tensor, number of the block, first, last) for the blocks of all tensors.
template <class T, class F> void for_each_block(Cpu& cpu, View<AdamWTensor<T> const, 1> tensors, F f) {
  using Tensor = AdamWTensor<T>;
  static_assert(Tensor::block == element_grain);
  if (tensors.count() == 0) return;
  Tensor const *const begin = tensors.data, *const end = begin + tensors.count();
  parallel_for(cpu, end[-1].first_block + end[-1].blocks(), [&](Index block, int) {
    auto const* tensor = std::upper_bound(begin, end, block, [](Index b, Tensor const& t) { return b < t.first_block; }) - 1;
    Index const first = (block - tensor->first_block) * Tensor::block;
    f(tensor - begin, block, first, std::min(first + Tensor::block, tensor->count));
  });
}
template <class T> Index blocks_of_all(View<AdamWTensor<T> const, 1> tensors) {
  Index const n = tensors.count();
  return n == 0 ? 0 : tensors(n - 1).first_block + tensors(n - 1).blocks();
}
// A vector of doubles at a time: squares of floats do not overflow.
template <class T> double sum_of_squares(T const* x, Index count) {
  double lane[8] = {};
  Index i = 0;
  for (; i + 8 <= count; i += 8)
    for (Index j = 0; j < 8; ++j) lane[j] += static_cast<double>(x[i + j]) * static_cast<double>(x[i + j]);
  for (; i < count; ++i) lane[i % 8] += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  double sum = 0;
  for (double value : lane) sum += value;
  return sum;
}

}  // namespace cpu::detail

template <> struct On<AdamWSquares, Cpu> {
  template <class T> static void forward(Cpu& cpu, View<AdamWTensor<T> const, 1> tensors, View<double, 1> squares) {
    cpu::Scratch<double> const partial{cpu, cpu::detail::blocks_of_all(tensors)};
    cpu::detail::for_each_block(cpu, tensors, [&](Index i, Index block, Index first, Index last) {
      partial.data()[block] = cpu::detail::sum_of_squares(tensors(i).g + first, last - first);
    });
    for (Index i = 0; i < tensors.count(); ++i) {
      auto const& t = tensors(i);
      squares(i) = 0;
      for (Index block = 0; block < t.blocks(); ++block) squares(i) += partial.data()[t.first_block + block];
      if (!std::isfinite(squares(i)) && !std::all_of(t.g, t.g + t.count, [](T value) { return std::isfinite(value); }))
        squares(i) = std::numeric_limits<double>::quiet_NaN();
    }
  }
};

template <> struct On<AdamWStep, Cpu> {
  template <class T>
  static void forward(Cpu& cpu, View<AdamWTensor<T> const, 1> tensors, View<AdamWRates const, 1> rates,
                      View<StepNumbers const, 1> numbers) {
    if (numbers(0).fault != StepFault::none) return;
    cpu::detail::for_each_block(cpu, tensors, [&](Index i, Index, Index first, Index last) {
      auto const t = tensors(i);
      cpu::detail::AdamWRule<T> const rule{rates(i)};
      cpu::for_each_vector<T>(first, last, [&](cpu::Slot<T> s) HYBRIDATTN_INLINE_LAMBDA {
        auto const next = rule(s.get(t.g), s.get(t.m), s.get(t.v), s.get(t.p));
        s.put(t.m, next.mean);
        s.put(t.v, next.square);
        s.put(t.p, next.parameter);
      });
    });
  }
};

template <> struct On<AdamWCheck, Cpu> {
  template <class T>
  static void forward(Cpu& cpu, View<AdamWTensor<T> const, 1> tensors, View<AdamWRates const, 1> rates, View<StepNumbers const, 1> numbers,
                      View<StepFault, 1> found) {
    std::fill_n(found.data, found.count(), StepFault::none);
    if (numbers(0).fault != StepFault::none) return;
    cpu::Scratch<StepFault> const partial{cpu, cpu::detail::blocks_of_all(tensors)};
    cpu::detail::for_each_block(cpu, tensors, [&](Index i, Index block, Index first, Index last) {
      partial.data()[block] = in_block(tensors(i), cpu::detail::AdamWRule<T>{rates(i)}, first, last);
    });
    for (Index i = 0; i < tensors.count(); ++i)
      for (Index block = 0; block < tensors(i).blocks() && found(i) == StepFault::none; ++block)
        found(i) = partial.data()[tensors(i).first_block + block];
  }

 private:
  template <class T> static StepFault in_block(AdamWTensor<T> const& t, cpu::detail::AdamWRule<T> const& rule, Index first, Index last) {
    cpu::Vec<T> mean{}, square{}, parameter{};   // NaN as soon as one number is not finite: x - x is 0 of a finite one only
    cpu::for_each_vector<T>(first, last, [&](cpu::Slot<T> s) HYBRIDATTN_INLINE_LAMBDA {
      auto const next = rule(s.get(t.g), s.get(t.m), s.get(t.v), s.get(t.p));
      mean += next.mean - next.mean;
      square += next.square - next.square;
      parameter += next.parameter - next.parameter;
    });
    return cpu::sum<T>(mean) != 0        ? StepFault::mean
           : cpu::sum<T>(square) != 0    ? StepFault::square
           : cpu::sum<T>(parameter) != 0 ? StepFault::parameter
                                         : StepFault::none;
  }
};

template <> struct On<OpenStep, Cpu> {
  static void forward(Cpu&, View<StepNumbers, 1> numbers) {
    StepNumbers const last = numbers(0);
    numbers(0) = {};
    numbers(0).rate = last.rate;
    numbers(0).steps = last.steps;
    numbers(0).first_bad = last.first_bad;
  }
};

template <> struct On<AddBatchLosses, Cpu> {
  static void forward(Cpu&, double share, View<BatchLosses const, 1> losses, View<StepNumbers, 1> numbers) {
    numbers(0).loss += losses(0).loss;
    numbers(0).auxiliary_loss += share * losses(0).auxiliary();
    numbers(0).policy_loss += share * losses(0).policy;
  }
};

template <> struct On<DecideStep, Cpu> {
  static void forward(Cpu&, DecideStep::Options const& o, View<std::int32_t const, 1> roles, View<double const, 1> squares,
                      View<Index const, 1> updates, View<AdamWRates, 1> rates, View<StepNumbers, 1> numbers) {
    StepNumbers& step = numbers(0);
    if (!std::isfinite(step.loss.loss)) step.fault = StepFault::loss;
    else if (!std::isfinite(step.auxiliary_loss)) step.fault = StepFault::auxiliary_loss;
    double others = 0, detached = 0;   // norms
    for (Index i = 0; i < roles.count(); ++i) {
      (roles(i) & StepRole::detached ? detached : others) += squares(i);
      if (std::isfinite(squares(i)) || step.tensor >= 0) continue;
      step.tensor = static_cast<std::int32_t>(i);
      if (step.fault == StepFault::none) step.fault = std::isnan(squares(i)) ? StepFault::gradient : StepFault::tensor_norm;
    }
    others = std::sqrt(others);
    detached = std::sqrt(detached);
    step.gradient_norm = std::hypot(others, detached);
    if (step.fault != StepFault::none) return;
    if (!std::isfinite(step.gradient_norm)) step.fault = StepFault::global_norm;
    for (Index i = 0; i < roles.count(); ++i)
      rates(i) =
          DecideStep::rates(o, roles(i), static_cast<double>(updates(i) + 1), step.rate, roles(i) & StepRole::detached ? detached : others);
  }
};

template <> struct On<CloseStep, Cpu> {
  static void forward(Cpu&, View<std::int32_t const, 1> roles, View<StepFault const, 1> found, View<Index, 1> updates,
                      View<StepNumbers, 1> numbers) {
    StepNumbers& step = numbers(0);
    for (Index i = 0; i < found.count() && step.fault == StepFault::none; ++i) {
      step.fault = found(i);
      if (found(i) != StepFault::none) step.tensor = static_cast<std::int32_t>(i);
    }
    if (step.fault != StepFault::none) {
      if (step.first_bad.step == 0) step.first_bad = {step.steps + 1, step.loss, step.auxiliary_loss, step.fault, step.tensor};
      return;
    }
    ++step.steps;
    for (Index i = 0; i < roles.count(); ++i) updates(i) += roles(i) & StepRole::has_gradient ? 1 : 0;
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
