// Rotary positions as kernels. A warp has a row of angles, or a head of a token: lane l has the pairs l, l + 32, ...
#ifndef HYBRIDATTN_OPS_ROPE_KERNELS_HPP
#define HYBRIDATTN_OPS_ROPE_KERNELS_HPP

#include <hybridattn/backend/gpu/gpu.hpp>
#include <hybridattn/ops/rope/rope.hpp>

#include <cmath>
#include <cstdint>

namespace hybridattn::inline HYBRIDATTN_ABI::gpu {

HYBRIDATTN_DEVICE Index angles_row(View<std::int32_t const, 1> positions, Index n) { return positions.empty() ? n : positions(n); }

// angle / pi without whole turns, in -1 .. 1. 1/pi is inverse + rest, with twice the digits of a double. So a large angle is turned as
// exactly as a small one.
HYBRIDATTN_DEVICE double half_turns(double angle) {
  constexpr double inverse = 0.3183098861837907, rest = -1.9678676675182486e-17;
  double const turns = angle * inverse, error = std::fma(angle, inverse, -turns) + angle * rest;
  return turns - 2 * std::rint(turns / 2) + error;
}

template <class T> struct RopeAnglesForward {
  static constexpr int threads = 128;
  static constexpr Index most_pairs = 128;
  struct Params {
    View<std::int32_t const, 1> positions;
    View<T, 3> angles;
    double frequencies[most_pairs];   // radians a position
  };
  struct Shared {};
  static HYBRIDATTN_DEVICE void run(Shared&, Params const& p) {
    Index const row = simt::block_x() * (threads / 32) + simt::warp();
    if (row >= p.angles.extent(0)) return;
    double const position = static_cast<double>(angles_row(p.positions, row));
    for (Index i = simt::lane(); i < p.angles.extent(2); i += 32) {
      double const turns = half_turns(position * p.frequencies[i]);
      p.angles(row, 0, i) = static_cast<T>(simt::cos_pi(turns));
      p.angles(row, 1, i) = static_cast<T>(simt::sin_pi(turns));
    }
  }
};

// y is x turned forward (direction 1) or back (-1).
template <class T> struct Turn {
  static constexpr int threads = 128;
  struct Params {
    View<T const, 3> angles;
    View<std::int32_t const, 1> positions;
    View<T const, 3> x;
    View<T, 3> y;
    Index pairs;
    bool interleaved;
    T direction;
  };
  struct Shared {};
  static HYBRIDATTN_DEVICE void run(Shared&, Params const& p) {
    Index const row = simt::block_x() * (threads / 32) + simt::warp(), heads = p.x.extent(1);
    if (row >= p.x.extent(0) * heads) return;
    Index const n = row / heads, h = row % heads, angle = angles_row(p.positions, n);
    for (Index i = simt::lane(); i < p.pairs; i += 32) {
      Index const first = p.interleaved ? 2 * i : i, second = p.interleaved ? first + 1 : i + p.pairs;
      T const a = p.x(n, h, first), b = p.x(n, h, second);
      T const cosine = p.angles(angle, 0, i), sine = p.direction * p.angles(angle, 1, i);
      p.y(n, h, first) = a * cosine - b * sine;
      p.y(n, h, second) = b * cosine + a * sine;
    }
    for (Index d = 2 * p.pairs + simt::lane(); d < p.x.extent(2); d += 32) p.y(n, h, d) = p.x(n, h, d);
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::gpu
#endif
