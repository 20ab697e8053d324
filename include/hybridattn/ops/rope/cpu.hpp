#ifndef HYBRIDATTN_OPS_ROPE_CPU_HPP
#define HYBRIDATTN_OPS_ROPE_CPU_HPP

#include <hybridattn/backend/cpu/cpu.hpp>
#include <hybridattn/backend/cpu/vectors.hpp>
#include <hybridattn/core/allowed.hpp>
#include <hybridattn/ops/rope/rope.hpp>
#include <hybridattn/tensor/in_float.hpp>

#include <cmath>

namespace hybridattn::inline HYBRIDATTN_ABI {

namespace cpu::detail {
inline Index row_of(View<std::int32_t const, 1> positions, Index n) { return positions.empty() ? n : positions(n); }
}  // namespace cpu::detail

template <> struct On<RopeAngles, Cpu> {
  template <class T> static void forward(Cpu& cpu, Rope::Options o, View<std::int32_t const, 1> positions, View<T, 3> angles) {
    check_positive("Rope", "theta", o.theta);
    Index const half = angles.extent(2);
    cpu::Scratch<double> const frequencies{cpu, half};
    for (Index i = 0; i < half; ++i)
      frequencies.data()[i] = std::pow(o.theta, -2.0 * static_cast<double>(i) / static_cast<double>(o.rotary_dim));
    parallel_blocks(cpu, angles.extent(0), cpu::sum_rows, [&](Index first, Index last) {
      for (Index row = first; row < last; ++row)
        for (Index i = 0; i < half; ++i) {
          double const angle = static_cast<double>(cpu::detail::row_of(positions, row)) * frequencies.data()[i];
          angles(row, 0, i) = static_cast<T>(std::cos(angle));
          angles(row, 1, i) = static_cast<T>(std::sin(angle));
        }
    });
  }
};

template <> struct On<Rope, Cpu> : InFloat<Rope, Cpu> {
  using InFloat::forward, InFloat::backward;
  template <std::floating_point T>
  static void forward(Cpu& cpu, Rope::Options o, Wide<In<T>, 3> angles, View<std::int32_t const, 1> positions, View<T const, 3> x,
                      View<T, 3> y) {
    turn(cpu, o, angles, positions, x, y, T(1));
  }
  template <std::floating_point T>
  static void backward(Cpu& cpu, Rope::Options o, Wide<In<T>, 3> angles, View<std::int32_t const, 1> positions, View<T const, 3> d_y,
                       View<T, 3> d_x) {
    turn(cpu, o, angles, positions, d_y, d_x, T(-1));
  }

 private:
  template <class T>
  static void turn(Cpu& cpu, Rope::Options o, Wide<In<T>, 3> angles, View<std::int32_t const, 1> positions, View<T const, 3> x,
                   View<T, 3> y, T direction) {
    check_rotary_dim(o, x.extent(2));
    Index const half = o.rotary_dim / 2, step = o.interleaved ? 2 : 1, partner = o.interleaved ? 1 : half;
    parallel_blocks(cpu, x.extent(0), cpu::sum_rows, [&](Index first, Index last) {
      for (Index n = first; n < last; ++n) {
        Index const row = cpu::detail::row_of(positions, n);
        T const *cosine = half == 0 ? nullptr : angles.row(row, 0), *sine = half == 0 ? nullptr : angles.row(row, 1);
        for (Index h = 0; h < x.extent(1); ++h) {
          T const* from = x.row(n, h);
          T* to = y.row(n, h);
          for (Index i = 0; i < half; ++i) {
            T const a = from[i * step], b = from[i * step + partner], s = direction * sine[i];
            to[i * step] = a * cosine[i] - b * s;
            to[i * step + partner] = b * cosine[i] + a * s;
          }
          for (Index d = o.rotary_dim; d < x.extent(2); ++d) to[d] = from[d];
        }
      }
    });
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
