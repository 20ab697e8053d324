// LayerNorm as kernels. A warp has a row: lane l has the elements l, l + 32, ...
#ifndef HYBRIDATTN_OPS_LAYER_NORM_KERNELS_HPP
#define HYBRIDATTN_OPS_LAYER_NORM_KERNELS_HPP

#include <hybridattn/backend/gpu/reduce.hpp>
#include <hybridattn/ops/layer_norm/layer_norm.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI::gpu {

template <class T> struct LayerNormMoments {
  T mean, rstd;
};
// Of row n, for all lanes.
template <class T> HYBRIDATTN_DEVICE LayerNormMoments<T> layer_norm_moments(View<T const, 2> x, Index n, T eps) {
  T const C = static_cast<T>(x.extent(1));
  T sum = 0, squares = 0;
  for (Index c = simt::lane(); c < x.extent(1); c += 32) sum += x(n, c);
  T const mean = simt::sum_lanes(sum) / C;
  for (Index c = simt::lane(); c < x.extent(1); c += 32) squares += (x(n, c) - mean) * (x(n, c) - mean);
  return {mean, T(1) / std::sqrt(simt::sum_lanes(squares) / C + eps)};
}

template <class T> struct LayerNormForward {
  static constexpr int threads = 128;
  struct Params {
    View<T const, 2> x;
    View<T const, 1> w, b;
    View<T, 2> y;
    T eps;
  };
  struct Shared {};
  static HYBRIDATTN_DEVICE void run(Shared&, Params const& p) {
    Index const n = simt::block_x() * (threads / 32) + simt::warp();
    if (n >= p.x.extent(0)) return;
    auto const [mean, rstd] = layer_norm_moments(p.x, n, p.eps);
    for (Index c = simt::lane(); c < p.x.extent(1); c += 32) p.y(n, c) = (p.x(n, c) - mean) * rstd * p.w(c) + p.b(c);
  }
};

// A block has sum_rows rows: first each warp some of them, for d_x; then each thread its columns of all, for d_w and d_b.
template <class T> struct LayerNormBackward {
  static constexpr int threads = 128;
  struct Params {
    View<T const, 2> x;
    View<T const, 1> w;
    View<T const, 2> d_y;
    View<T, 2> d_x;
    View<T, 2> d_w, d_b;   // [blocks of rows, C]
    T eps;
  };
  struct Shared {
    LayerNormMoments<T> of_rows[sum_rows];
  };
  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    Index const first = simt::block_x() * sum_rows, rows = simt::smaller(sum_rows, p.x.extent(0) - first);
    for (Index r = simt::warp(); r < rows; r += threads / 32) {
      LayerNormMoments<T> const moments = layer_norm_moments(p.x, first + r, p.eps);
      if (simt::lane() == 0) shared.of_rows[r] = moments;
      write_row(p, first + r, moments);
    }
    simt::sync_block();
    for (Index c = simt::thread_id(); c < p.x.extent(1); c += threads) {
      T d_w = 0, d_b = 0;
      for (Index r = 0; r < rows; ++r) {
        auto const [mean, rstd] = shared.of_rows[r];
        d_w += p.d_y(first + r, c) * (p.x(first + r, c) - mean) * rstd;
        d_b += p.d_y(first + r, c);
      }
      p.d_w(simt::block_x(), c) = d_w;
      p.d_b(simt::block_x(), c) = d_b;
    }
  }

 private:
  static HYBRIDATTN_DEVICE void write_row(Params const& p, Index n, LayerNormMoments<T> moments) {
    auto const [mean, rstd] = moments;
    T const C = static_cast<T>(p.x.extent(1));
    T g_sum = 0, along = 0;
    for (Index c = simt::lane(); c < p.x.extent(1); c += 32) {
      T const g = p.d_y(n, c) * p.w(c);
      g_sum += g;
      along += g * (p.x(n, c) - mean) * rstd;
    }
    T const g_mean = simt::sum_lanes(g_sum) / C;
    along = simt::sum_lanes(along) / C;
    for (Index c = simt::lane(); c < p.x.extent(1); c += 32)
      p.d_x(n, c) = rstd * (p.d_y(n, c) * p.w(c) - g_mean - (p.x(n, c) - mean) * rstd * along);
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::gpu
#endif
