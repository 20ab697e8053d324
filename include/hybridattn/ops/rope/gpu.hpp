#ifndef HYBRIDATTN_OPS_ROPE_GPU_HPP
#define HYBRIDATTN_OPS_ROPE_GPU_HPP

#include <hybridattn/core/allowed.hpp>
#include <hybridattn/ops/rope/kernels.hpp>
#include <hybridattn/tensor/in_float.hpp>

#include <cmath>

namespace hybridattn::inline HYBRIDATTN_ABI {

template <GpuBackend B> struct On<RopeAngles, B> {
  // The frequencies are computed on the host and travel with the kernel's parameters: no upload. Throws Error for a rotary_dim above 256.
  template <class T> static void forward(B& gpu, Rope::Options o, View<std::int32_t const, 1> positions, View<T, 3> angles) {
    using Angles = gpu::RopeAnglesForward<T>;
    check_positive("Rope", "theta", o.theta);
    Index const pairs = angles.extent(2);
    check(pairs <= Angles::most_pairs, "Rope: rotary_dim ", 2 * pairs, " is not allowed on a GPU; it must be at most ",
          2 * Angles::most_pairs);
    typename Angles::Params p{positions, angles, {}};
    for (Index i = 0; i < pairs; ++i)
      p.frequencies[i] = std::pow(o.theta, -2.0 * static_cast<double>(i) / static_cast<double>(o.rotary_dim));
    launch<Angles>(gpu, {.x = ceil_div(angles.extent(0), Angles::threads / 32)}, p);
  }
};

template <GpuBackend B> struct On<Rope, B> : InFloat<Rope, B> {
  using InFloat<Rope, B>::forward, InFloat<Rope, B>::backward;
  template <std::floating_point T>
  static void forward(B& gpu, Rope::Options o, Wide<In<T>, 3> angles, View<std::int32_t const, 1> positions, View<T const, 3> x,
                      View<T, 3> y) {
    turn<T>(gpu, o, {angles, positions, x, y, o.rotary_dim / 2, o.interleaved, T(1)});
  }
  template <std::floating_point T>
  static void backward(B& gpu, Rope::Options o, Wide<In<T>, 3> angles, View<std::int32_t const, 1> positions, View<T const, 3> d_y,
                       View<T, 3> d_x) {
    turn<T>(gpu, o, {angles, positions, d_y, d_x, o.rotary_dim / 2, o.interleaved, T(-1)});
  }

 private:
  template <class T> static void turn(B& gpu, Rope::Options const& o, typename gpu::Turn<T>::Params const& p) {
    check_rotary_dim(o, p.x.extent(2));
    launch<gpu::Turn<T>>(gpu, {.x = ceil_div(p.x.extent(0) * p.x.extent(1), gpu::Turn<T>::threads / 32)}, p);
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
