// Packing: a matrix product reads its operands from copies that lie in the order in which the register tile reads them. So a column of
// an operand is never read across rows that stand a page apart, and a row of b is read once for many rows of a.
#ifndef HYBRIDATTN_BACKEND_CPU_PACK_HPP
#define HYBRIDATTN_BACKEND_CPU_PACK_HPP

#include <hybridattn/backend/cpu/simd.hpp>
#include <hybridattn/backend/operand.hpp>
#include <hybridattn/core/math.hpp>

#include <algorithm>

namespace hybridattn::inline HYBRIDATTN_ABI::cpu {

// Slivers of a: [depth, rows] for each `rows` rows of a. Panels of b: [depth, columns] for each `columns` columns of b. Both are padded
// with zeros to whole tiles, and with a gap that keeps slivers out of each other's sets of the cache. Copies of bf16 are in float.
template <class T> struct Packed {
  static constexpr int rows = tuning.product.rows, columns = tuning.product.vectors * lanes<T>;

  static constexpr Index sliver(Index depth) { return rows * depth + std::max<Index>(lanes<T>, rows); }
  static constexpr Index panel(Index depth) { return columns * depth + columns; }
};

namespace detail {

// to[k * to_stride + i] = x[i][k] for k = 0 .. depth - 1 and `count` rows x[i] that stand `stride` apart; 0 for i >= count. depth and count
// are at most lanes. Writes whole vectors, in the order of k: each overwrites what stands behind the rows of the one before it.
template <class S> HYBRIDATTN_INLINE void turn(S const* x, Index stride, Index count, Index depth, wide_t<S>* to, Index to_stride) {
  using T = wide_t<S>;
  constexpr int n = lanes<T>;
  Vec<T> rows[std::size_t{n}];
  if (count >= n && depth == n) {
    HYBRIDATTN_UNROLL
    for (int i = 0; i < n; ++i) rows[i] = load_wide(x + i * stride);
  } else {
    for (int i = 0; i < n; ++i) rows[i] = i < count ? load_wide_first(x + i * stride, depth) : Vec<T>{};
  }
  transpose<T>(rows);
  if (depth == n) {
    HYBRIDATTN_UNROLL
    for (int i = 0; i < n; ++i) store(to + i * to_stride, rows[i]);
  } else {
    for (int i = 0; i < depth; ++i) store(to + i * to_stride, rows[i]);
  }
}
// to = `columns` numbers, of which `count` are there, the others 0.
template <int columns, class S> HYBRIDATTN_INLINE void widen_row(S const* from, Index count, wide_t<S>* to) {
  if (count < columns) {
    for (Index i = 0; i < columns; ++i) to[i] = i < count ? wide_t<S>(from[i]) : wide_t<S>(0);
  } else if constexpr (std::is_same_v<S, wide_t<S>>) {
    std::memcpy(to, from, sizeof(S) * std::size_t{columns});
  } else {
    HYBRIDATTN_UNROLL
    for (int i = 0; i < columns; ++i) to[i] = from[i];
  }
}

}  // namespace detail

// Packs rows first .. last - 1 of columns k0 .. k1 - 1 of a.
template <class S> void pack_slivers(Operand<S> a, Index first, Index last, Index k0, Index k1, wide_t<S>* to) {
  using T = wide_t<S>;
  constexpr Index rows = Packed<T>::rows, n = lanes<T>, few = 4;
  Index const depth = k1 - k0, sliver = Packed<T>::sliver(depth);
  if (a.column == 1) {
    for (Index r = first; r < last; r += rows, to += sliver)
      for (Index k = k0; k < k1; k += n)  // the last vector of rows first, because it overwrites what stands behind its rows
        for (Index i = (rows - 1) / n * n; i >= 0; i -= n)
          detail::turn(a.data + (r + i) * a.row + k, a.row, a.rows - r - i, std::min(n, k1 - k), to + (k - k0) * rows + i, rows);
    return;
  }
  for (Index k = k0; k < k1; k += few)  // a few columns at a time, because they may stand in the same set of the cache
    for (Index r = first; r < last; r += rows) {
      T* const sliver_of_r = to + (r - first) / rows * sliver;
      for (Index j = k; j < std::min(k1, k + few); ++j)
        detail::widen_row<Packed<T>::rows>(a.data + r + j * a.column, last - r, sliver_of_r + (j - k0) * rows);
    }
}

// Packs columns first .. last - 1 of rows k0 .. k1 - 1 of b.
template <class S> void pack_panels(Operand<S> b, Index first, Index last, Index k0, Index k1, wide_t<S>* to) {
  using T = wide_t<S>;
  constexpr Index columns = Packed<T>::columns, n = lanes<T>;
  Index const depth = k1 - k0, panel = Packed<T>::panel(depth);
  if (b.column == 1) {
    for (Index k = k0; k < k1; ++k)
      for (Index j = first; j < last; j += columns)
        detail::widen_row<Packed<T>::columns>(b.data + k * b.row + j, last - j, to + (j - first) / columns * panel + (k - k0) * columns);
    return;
  }
  for (Index j = first; j < last; j += columns, to += panel)
    for (Index k = k0; k < k1; k += n)
      for (Index i = 0; i < columns; i += n)
        detail::turn(b.data + (j + i) * b.column + k, b.column, last - j - i, std::min(n, k1 - k), to + (k - k0) * columns + i, columns);
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::cpu
#endif
