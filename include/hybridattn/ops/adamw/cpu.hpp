#ifndef HYBRIDATTN_OPS_ADAMW_CPU_HPP
#define HYBRIDATTN_OPS_ADAMW_CPU_HPP

#include <hybridattn/backend/cpu/cpu.hpp>
#include <hybridattn/backend/cpu/vectors.hpp>
#include <hybridattn/core/math.hpp>
#include <hybridattn/ops/adamw/adamw.hpp>

#include <algorithm>
#include <cmath>

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

}  // namespace cpu::detail

template <> struct On<AdamWStep, Cpu> {
  template <class T>
  static void forward(Cpu& cpu, View<AdamWRates const, 1> rates, View<StepNumbers const, 1> numbers, View<T const, 1> g, View<T, 1> m,
                      View<T, 1> v, View<T, 1> p) {
    if (numbers(0).fault != StepFault::none) return;
    cpu::detail::AdamWRule<T> const rule{rates(0)};
    parallel_blocks(cpu, p.count(), cpu::element_grain, [&](Index first, Index last) {
      cpu::for_each_vector<T>(first, last, [&](cpu::Slot<T> s) HYBRIDATTN_INLINE_LAMBDA {
        auto const next = rule(s.get(g.data), s.get(m.data), s.get(v.data), s.get(p.data));
        s.put(m.data, next.mean);
        s.put(v.data, next.square);
        s.put(p.data, next.parameter);
      });
    });
  }
};

template <> struct On<AdamWCheck, Cpu> {
  template <class T>
  static void forward(Cpu& cpu, View<AdamWRates const, 1> rates, View<StepNumbers const, 1> numbers, View<T const, 1> g, View<T const, 1> m,
                      View<T const, 1> v, View<T const, 1> p, View<StepFault, 1> result) {
    result(0) = StepFault::none;
    if (p.count() == 0 || numbers(0).fault != StepFault::none) return;
    cpu::detail::AdamWRule<T> const rule{rates(0)};
    Tensor<StepFault, 1, Cpu> storage{cpu, {ceil_div(p.count(), cpu::element_grain)}};
    auto const found = out(storage);
    parallel_blocks(cpu, p.count(), cpu::element_grain, [&](Index first, Index last) {
      cpu::Vec<T> mean{}, square{}, parameter{};   // NaN as soon as one number is not finite: x - x is 0 of a finite one only
      cpu::for_each_vector<T>(first, last, [&](cpu::Slot<T> s) HYBRIDATTN_INLINE_LAMBDA {
        auto const next = rule(s.get(g.data), s.get(m.data), s.get(v.data), s.get(p.data));
        mean += next.mean - next.mean;
        square += next.square - next.square;
        parameter += next.parameter - next.parameter;
      });
      found(first / cpu::element_grain) = cpu::sum<T>(mean) != 0        ? StepFault::mean
                                          : cpu::sum<T>(square) != 0    ? StepFault::square
                                          : cpu::sum<T>(parameter) != 0 ? StepFault::parameter
                                                                        : StepFault::none;
    });
    for (Index block = 0; block < found.count() && result(0) == StepFault::none; ++block) result(0) = found(block);
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
    double others = 0, apart = 0;   // norms
    for (Index i = 0; i < roles.count(); ++i) {
      (roles(i) & StepRole::apart ? apart : others) += squares(i);
      if (std::isfinite(squares(i)) || step.tensor >= 0) continue;
      step.tensor = static_cast<std::int32_t>(i);
      if (step.fault == StepFault::none) step.fault = std::isnan(squares(i)) ? StepFault::gradient : StepFault::tensor_norm;
    }
    others = std::sqrt(others);
    apart = std::sqrt(apart);
    step.gradient_norm = std::hypot(others, apart);
    if (step.fault != StepFault::none) return;
    if (!std::isfinite(step.gradient_norm)) step.fault = StepFault::global_norm;
    for (Index i = 0; i < roles.count(); ++i)
      rates(i) = rates_of(o, roles(i), static_cast<double>(updates(i) + 1), step.rate, roles(i) & StepRole::apart ? apart : others);
  }

 private:
  static AdamWRates rates_of(DecideStep::Options const& o, std::int32_t role, double step, double rate, double norm) {
    return {.learning_rate = o.learning_rate * rate,
            .beta_1 = o.beta_1,
            .beta_2 = o.beta_2,
            .epsilon = o.epsilon,
            .weight_decay = role & StepRole::decays ? o.weight_decay : 0,
            .correction_1 = o.bias_correction ? 1 - std::pow(o.beta_1, step) : 1,
            .correction_2 = o.bias_correction ? 1 - std::pow(o.beta_2, step) : 1,
            .gradient_scale = o.max_norm == 0 ? 1 : std::min(1.0, o.max_norm / (norm + 1e-6))};
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
