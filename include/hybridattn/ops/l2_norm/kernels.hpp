// L2Norm as kernels. A warp has a row: lane l has the elements l, l + 32, ...
#ifndef HYBRIDATTN_OPS_L2_NORM_KERNELS_HPP
#define HYBRIDATTN_OPS_L2_NORM_KERNELS_HPP

#include <hybridattn/backend/gpu/gpu.hpp>
#include <hybridattn/ops/l2_norm/l2_norm.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI::gpu {

template <class T> HYBRIDATTN_DEVICE T inverse_norm(View<T const, 2> x, Index n) {
  T squares = 0;
  for (Index c = simt::lane(); c < x.extent(1); c += 32) squares += x(n, c) * x(n, c);
  return T(1) / std::sqrt(simt::sum_lanes(squares) + static_cast<T>(L2Norm::eps));
}

template <class T> struct L2NormForward {
  static constexpr int threads = 128;
  struct Params {
    View<T const, 2> x;
    View<T, 2> y;
  };
  struct Shared {};
  static HYBRIDATTN_DEVICE void run(Shared&, Params const& p) {
    Index const n = simt::block_x() * (threads / 32) + simt::warp();
    if (n >= p.x.extent(0)) return;
    T const rnorm = inverse_norm(p.x, n);
    for (Index c = simt::lane(); c < p.x.extent(1); c += 32) p.y(n, c) = p.x(n, c) * rnorm;
  }
};

template <class T> struct L2NormBackward {
  static constexpr int threads = 128;
  struct Params {
    View<T const, 2> x, d_y;
    View<T, 2> d_x;
  };
  struct Shared {};
  static HYBRIDATTN_DEVICE void run(Shared&, Params const& p) {
    Index const n = simt::block_x() * (threads / 32) + simt::warp(), C = p.x.extent(1);
    if (n >= p.x.extent(0)) return;
    T const rnorm = inverse_norm(p.x, n);
    T along = 0;
    for (Index c = simt::lane(); c < C; c += 32) along += p.x(n, c) * p.d_y(n, c);
    along = simt::sum_lanes(along) * rnorm;
    for (Index c = simt::lane(); c < C; c += 32) p.d_x(n, c) = rnorm * (p.d_y(n, c) - p.x(n, c) * rnorm * along);
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::gpu
#endif
