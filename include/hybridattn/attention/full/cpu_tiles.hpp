// Used by the forward and the backward kernel: rows of one head, their transposes, and products over the mask's band.
#ifndef HYBRIDATTN_ATTENTION_FULL_CPU_TILES_HPP
#define HYBRIDATTN_ATTENTION_FULL_CPU_TILES_HPP

#include <hybridattn/attention/cpu_rows.hpp>
#include <hybridattn/backend/cpu/cpu.hpp>
#include <hybridattn/backend/cpu/tile.hpp>
#include <hybridattn/core/math.hpp>
#include <hybridattn/core/sequences.hpp>

#include <algorithm>

namespace hybridattn::inline HYBRIDATTN_ABI::full {

inline constexpr int tile_rows = cpu::tuning.attention.rows, tile_vectors = cpu::tuning.attention.vectors;
template <class T> inline constexpr Index tile_columns = tile_vectors * cpu::lanes<T>;

using attention::Rows, attention::head_of;

// Keys j that query i sees: i - reach < j <= i.
inline Index reach(int window, Sequence s) { return window == 0 ? s.length : std::min<Index>(window, s.length); }

// Rows first .. first + tile_rows - 1 for a tile. If rows are past the end, the tile is a copy in pad [tile_rows, D] with zeros there.
template <class T, class Dim> HYBRIDATTN_INLINE cpu::Scalars<T> whole_tile(Dim D, Rows<T const> x, Index first, Index length, T* pad) {
  if (first + tile_rows <= length) return {x[first], x.stride, 1};
  std::fill_n(pad, tile_rows * D, T(0));
  for (Index i = first; i < length; ++i) std::copy_n(x[i], D, pad + (i - first) * D);
  return {pad, D, 1};
}

// to = the transpose of columns d .. d + lanes - 1 of rows first .. first + lanes - 1; zero for rows past the end.
template <class T> HYBRIDATTN_INLINE void transpose_square(Rows<T const> x, Index first, Index length, Index d, T* to, Index to_stride) {
  constexpr int n = cpu::lanes<T>;
  if (first + n <= length) {
    cpu::transpose<T>(x[first] + d, x.stride, to, to_stride);
    return;
  }
  alignas(cpu::vector_bytes) T rows[std::size_t{n * n}] = {};
  for (Index i = first; i < length; ++i) std::copy_n(x[i] + d, n, rows + (i - first) * n);
  cpu::transpose<T>(rows, n, to, to_stride);
}
// to [D, width] = the transpose of rows first .. first + width - 1.
template <class T, class Dim> void transpose_rows(Dim D, Rows<T const> x, Index first, Index length, Index width, T* to) {
  for (Index i = 0; i < width; i += cpu::lanes<T>)
    for (Index d = 0; d < D; d += cpu::lanes<T>) transpose_square(x, first + i, length, d, to + d * width + i, width);
}

// In row r of a tile the sum runs over begin + r <= k < end + r, limited to 0 <= k < depth. The mask of causal attention and
// of its window has this shape. Entries outside the band are never read, so they need no mask, and a NaN there has no effect.
struct Band {
  Index begin, end, depth;
};

// cpu::tile over a band. Every sum runs over k in order.
template <int MR, int NV, class T, class Start, class Epilogue>
HYBRIDATTN_INLINE void band_tile(Band band, cpu::Scalars<T> a, cpu::Columns<T> b, Start start, Epilogue epilogue) {
  cpu::Vec<T> sum[std::size_t{MR}][std::size_t{NV}];
  HYBRIDATTN_UNROLL
  for (int r = 0; r < MR; ++r) {
    HYBRIDATTN_UNROLL
    for (int v = 0; v < NV; ++v) sum[r][v] = start(r, v);
  }
  auto const add = [&](Index k, auto takes_part) HYBRIDATTN_INLINE_LAMBDA {
    if (k < 0 || k >= band.depth) return;
    cpu::Vec<T> column[std::size_t{NV}];
    HYBRIDATTN_UNROLL
    for (int v = 0; v < NV; ++v) column[v] = cpu::in_register<T>(cpu::load(b.data + k * b.depth + v * cpu::lanes<T>));
    HYBRIDATTN_UNROLL
    for (int r = 0; r < MR; ++r) {
      if (!takes_part(r)) continue;
      T const x = a.data[r * a.row + k * a.depth];
      HYBRIDATTN_UNROLL
      for (int v = 0; v < NV; ++v) sum[r][v] += x * column[v];
    }
  };
  Index const all = band.begin + MR - 1;   // from here to band.end every row takes part
  if (all <= band.end) {
    HYBRIDATTN_UNROLL
    for (int s = 0; s < MR - 1; ++s) add(band.begin + s, [s](int r) HYBRIDATTN_INLINE_LAMBDA { return r <= s; });
    for (Index k = std::max<Index>(all, 0), last = std::min(band.end, band.depth); k < last; ++k)
      add(k, [](int) HYBRIDATTN_INLINE_LAMBDA { return true; });
    HYBRIDATTN_UNROLL
    for (int s = 0; s < MR - 1; ++s) add(band.end + s, [s](int r) HYBRIDATTN_INLINE_LAMBDA { return r > s; });
  } else {
    for (Index k = band.begin; k < band.end + MR - 1; ++k)
      add(k, [&](int r) HYBRIDATTN_INLINE_LAMBDA { return band.begin + r <= k && k < band.end + r; });
  }
  HYBRIDATTN_UNROLL
  for (int r = 0; r < MR; ++r) {
    HYBRIDATTN_UNROLL
    for (int v = 0; v < NV; ++v) epilogue(r, v, sum[r][v]);
  }
}

// Calls f(column, vectors) over the columns 0 .. D - 1 of a row: tiles of two vectors, and one vector at the end where D needs it.
template <class T, class Dim, class F> HYBRIDATTN_INLINE void for_each_tile_column(Dim D, F f) {
  Index d = 0;
  for (; d + tile_columns<T> <= D; d += tile_columns<T>) f(d, std::integral_constant<int, tile_vectors>{});
  if (d < D) f(d, std::integral_constant<int, 1>{});
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::full
#endif
