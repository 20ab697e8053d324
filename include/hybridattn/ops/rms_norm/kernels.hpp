// RMSNorm as kernels. A warp has a row: lane l has the elements l, l + 32, ...
#ifndef HYBRIDATTN_OPS_RMS_NORM_KERNELS_HPP
#define HYBRIDATTN_OPS_RMS_NORM_KERNELS_HPP

#include <hybridattn/backend/gpu/reduce.hpp>
#include <hybridattn/ops/rms_norm/rms_norm.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI::gpu {

// The gate z of GatedRmsNorm is empty in RmsNorm.
template <class T> struct RmsNormParams {
  View<T const, 2> x, z;
  View<T const, 1> w;
  View<T, 2> y;
  T shift, eps;   // shift: 1 + w is the weight
};
template <class T> struct RmsNormGradients {
  RmsNormParams<T> forward;
  View<T const, 2> d_y;
  View<T, 2> d_x, d_z;
  View<T, 2> d_w;   // [blocks of rows, C]
  Into into;        // d_x
};

template <class T> HYBRIDATTN_DEVICE T row_rstd(RmsNormParams<T> const& p, Index n) {
  T squares = 0;
  for (Index c = simt::lane(); c < p.x.extent(1); c += 32) squares += p.x(n, c) * p.x(n, c);
  return T(1) / std::sqrt(simt::sum_lanes(squares) / static_cast<T>(p.x.extent(1)) + p.eps);
}

template <class T> struct RmsNormForward {
  static constexpr int threads = 128;
  using Params = RmsNormParams<T>;
  struct Shared {};
  static HYBRIDATTN_DEVICE void run(Shared&, Params const& p) {
    Index const n = simt::block_x() * (threads / 32) + simt::warp();
    if (n >= p.x.extent(0)) return;
    T const rstd = row_rstd(p, n);
    for (Index c = simt::lane(); c < p.x.extent(1); c += 32) {
      T const normed = p.x(n, c) * rstd * (p.shift + p.w(c));
      p.y(n, c) = p.z.empty() ? normed : normed * silu(p.z(n, c));
    }
  }
};

// A block has sum_rows rows: first each warp some of them, for d_x and d_z; then each thread its columns of all, for d_w.
template <class T> struct RmsNormBackward {
  static constexpr int threads = 128;
  using Params = RmsNormGradients<T>;
  struct Shared {
    T rstd[sum_rows];
  };
  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    Index const first = simt::block_x() * sum_rows, rows = simt::smaller(sum_rows, p.forward.x.extent(0) - first);
    for (Index r = simt::warp(); r < rows; r += threads / 32) {
      T const rstd = row_rstd(p.forward, first + r);
      if (simt::lane() == 0) shared.rstd[r] = rstd;
    }
    simt::sync_block();
    for (Index c = simt::thread_id(); c < p.forward.x.extent(1); c += threads) {
      T sum = 0;
      for (Index r = 0; r < rows; ++r) sum += d_normed(p, first + r, c) * p.forward.x(first + r, c) * shared.rstd[r];
      p.d_w(simt::block_x(), c) = sum;
    }
    for (Index r = simt::warp(); r < rows; r += threads / 32) write_row(p, first + r, shared.rstd[r]);
  }

 private:
  // The gradient of x rstd w, before the gate.
  static HYBRIDATTN_DEVICE T d_normed(Params const& p, Index n, Index c) {
    return p.forward.z.empty() ? p.d_y(n, c) : p.d_y(n, c) * silu(p.forward.z(n, c));
  }
  static HYBRIDATTN_DEVICE void write_row(Params const& p, Index n, T rstd) {
    auto const& [x, z, w, y, shift, eps] = p.forward;
    T along = 0;
    for (Index c = simt::lane(); c < x.extent(1); c += 32) along += d_normed(p, n, c) * (shift + w(c)) * x(n, c);
    along = simt::sum_lanes(along) * rstd / static_cast<T>(x.extent(1));
    for (Index c = simt::lane(); c < x.extent(1); c += 32) {
      T const xh = x(n, c) * rstd, weight = shift + w(c), dy = p.d_y(n, c), before = p.into == Into::add ? p.d_x(n, c) : T(0);
      T const d_x = before + rstd * (d_normed(p, n, c) * weight - xh * along);
      if (!z.empty()) p.d_z(n, c) = dy * xh * weight * silu_slope(z(n, c));
      p.d_x(n, c) = d_x;
    }
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::gpu
#endif
