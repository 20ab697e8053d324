#ifndef HYBRIDATTN_OPS_ADAMW_CPU_HPP
#define HYBRIDATTN_OPS_ADAMW_CPU_HPP

#include <hybridattn/backend/cpu/cpu.hpp>
#include <hybridattn/backend/cpu/vectors.hpp>
#include <hybridattn/ops/adamw/adamw.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI {

template <> struct On<AdamWStep, Cpu> {
  template <class T> static void forward(Cpu& cpu, AdamWStep::Rates r, View<T const, 1> g, View<T, 1> m, View<T, 1> v, View<T, 1> p) {
    T const keep = static_cast<T>(1 - r.learning_rate * r.weight_decay), clip = static_cast<T>(r.gradient_scale);
    T const b1 = static_cast<T>(r.beta_1), b2 = static_cast<T>(r.beta_2), eps = static_cast<T>(r.epsilon);
    T const add1 = static_cast<T>(1 - r.beta_1), add2 = static_cast<T>(1 - r.beta_2);
    T const step = static_cast<T>(r.learning_rate / r.correction_1), root = static_cast<T>(1 / std::sqrt(r.correction_2));
    parallel_blocks(cpu, p.count(), cpu::element_grain, [&](Index first, Index last) {
      cpu::for_each_vector<T>(first, last, [&](cpu::Slot<T> s) HYBRIDATTN_INLINE_LAMBDA {
        cpu::Vec<T> const gradient = s.get(g.data) * clip;
        cpu::Vec<T> const mean = b1 * s.get(m.data) + add1 * gradient, square = b2 * s.get(v.data) + add2 * gradient * gradient;
        s.put(m.data, mean);
        s.put(v.data, square);
        s.put(p.data, keep * s.get(p.data) - step * mean / (cpu::sqrt<T>(square) * root + eps));
      });
    });
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
