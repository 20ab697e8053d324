#ifndef HYBRIDATTN_OPS_L2_NORM_CPU_HPP
#define HYBRIDATTN_OPS_L2_NORM_CPU_HPP

#include <hybridattn/backend/cpu/cpu.hpp>
#include <hybridattn/backend/cpu/vectors.hpp>
#include <hybridattn/ops/l2_norm/l2_norm.hpp>
#include <hybridattn/tensor/in_float.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI {

template <> struct On<L2Norm, Cpu> : InFloat<L2Norm, Cpu> {
  using InFloat::forward, InFloat::backward;
  template <std::floating_point T> static void forward(Cpu& cpu, View<T const, 2> x, View<T, 2> y) {
    Index const C = x.extent(1);
    parallel_blocks(cpu, x.extent(0), cpu::sum_rows, [&](Index first, Index last) {
      for (Index n = first; n < last; ++n) {
        T const *row = x.row(n), rnorm = inverse_norm(row, C);
        cpu::for_each_vector<T>(0, C, [&](cpu::Slot<T> s) HYBRIDATTN_INLINE_LAMBDA { s.put(y.row(n), s.get(row) * rnorm); });
      }
    });
  }

  template <std::floating_point T> static void backward(Cpu& cpu, View<T const, 2> x, View<T const, 2> d_y, View<T, 2> d_x) {
    Index const C = x.extent(1);
    parallel_blocks(cpu, x.extent(0), cpu::sum_rows, [&](Index first, Index last) {
      for (Index n = first; n < last; ++n) {
        T const *xn = x.row(n), *d_yn = d_y.row(n), rnorm = inverse_norm(xn, C);
        T const along = cpu::sum_vectors<T>(C, [&](cpu::Slot<T> s) HYBRIDATTN_INLINE_LAMBDA { return s.get(xn) * s.get(d_yn); }) * rnorm;
        cpu::for_each_vector<T>(
            0, C, [&](cpu::Slot<T> s) HYBRIDATTN_INLINE_LAMBDA { s.put(d_x.row(n), rnorm * (s.get(d_yn) - s.get(xn) * rnorm * along)); });
      }
    });
  }

 private:
  template <class T> static T inverse_norm(T const* x, Index C) {
    T const squares = cpu::sum_vectors<T>(C, [&](cpu::Slot<T> s) HYBRIDATTN_INLINE_LAMBDA {
      cpu::Vec<T> const v = s.get(x);
      return v * v;
    });
    return cpu::inverse_root(squares + static_cast<T>(L2Norm::eps));
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
