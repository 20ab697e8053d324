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

  explicit AdamWRule(AdamWStep::Rates r)
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
  template <class T> static void forward(Cpu& cpu, AdamWStep::Rates r, View<T const, 1> g, View<T, 1> m, View<T, 1> v, View<T, 1> p) {
    cpu::detail::AdamWRule<T> const rule{r};
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
  using Overflow = AdamWCheck::Overflow;

  template <class T>
  static Overflow forward(Cpu& cpu, AdamWStep::Rates r, View<T const, 1> g, View<T const, 1> m, View<T const, 1> v, View<T const, 1> p) {
    if (p.count() == 0) return Overflow::none;
    cpu::detail::AdamWRule<T> const rule{r};
    Tensor<Overflow, 1, Cpu> storage{cpu, {ceil_div(p.count(), cpu::element_grain)}};
    auto const found = out(storage);
    parallel_blocks(cpu, p.count(), cpu::element_grain, [&](Index first, Index last) {
      cpu::Vec<T> mean{}, square{}, parameter{};   // NaN as soon as one number is not finite: x - x is 0 of a finite one only
      cpu::for_each_vector<T>(first, last, [&](cpu::Slot<T> s) HYBRIDATTN_INLINE_LAMBDA {
        auto const next = rule(s.get(g.data), s.get(m.data), s.get(v.data), s.get(p.data));
        mean += next.mean - next.mean;
        square += next.square - next.square;
        parameter += next.parameter - next.parameter;
      });
      found(first / cpu::element_grain) = cpu::sum<T>(mean) != 0        ? Overflow::mean
                                          : cpu::sum<T>(square) != 0    ? Overflow::square
                                          : cpu::sum<T>(parameter) != 0 ? Overflow::parameter
                                                                        : Overflow::none;
    });
    auto const* const first = std::find_if(found.data, found.data + found.count(), [](Overflow x) { return x != Overflow::none; });
    return first == found.data + found.count() ? Overflow::none : *first;
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
