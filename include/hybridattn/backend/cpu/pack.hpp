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
// with zeros to whole tiles, and with a gap that keeps slivers out of each other's sets of the cache.
template <class T> struct Packed {
  static constexpr int rows = tuning.product.rows, columns = tuning.product.vectors * lanes<T>;

  static constexpr Index sliver(Index depth) { return rows * depth + std::max<Index>(lanes<T>, rows); }
  static constexpr Index panel(Index depth) { return columns * depth + columns; }
};

namespace detail {

// to[k * to_stride + i] = x[i][k] for k = 0 .. depth - 1 and `count` rows x[i] that stand `stride` apart; 0 for i >= count. depth and count
// are at most lanes. Writes whole vectors, in the order of k: each overwrites what stands behind the rows of the one before it.
template <class T> HYBRIDATTN_INLINE void turn(T const* x, Index stride, Index count, Index depth, T* to, Index to_stride) {
  constexpr Index n = lanes<T>;
  if (count >= n && depth == n) return transpose(x, stride, to, to_stride);
  alignas(vector_bytes) T square[std::size_t{n * n}] = {}, turned[std::size_t{n * n}];
  for (Index i = 0; i < std::min(n, count); ++i) std::copy_n(x + i * stride, depth, square + i * n);
  transpose(square, n, turned, n);
  for (Index k = 0; k < depth; ++k) store(to + k * to_stride, load(turned + k * n));
}

}  // namespace detail

// Packs rows first .. last - 1 of columns k0 .. k1 - 1 of a.
template <class T> void pack_slivers(Operand<T> a, Index first, Index last, Index k0, Index k1, T* to) {
  constexpr Index rows = Packed<T>::rows, n = lanes<T>, few = 4;
  Index const depth = k1 - k0, sliver = Packed<T>::sliver(depth);
  if (a.column == 1) {
    for (Index r = first; r < last; r += rows, to += sliver)
      for (Index k = k0; k < k1; k += n)   // the last vector of rows first, because it overwrites what stands behind its rows
        for (Index i = (rows - 1) / n * n; i >= 0; i -= n)
          detail::turn(a.data + (r + i) * a.row + k, a.row, a.rows - r - i, std::min(n, k1 - k), to + (k - k0) * rows + i, rows);
    return;
  }
  for (Index k = k0; k < k1; k += few)   // a few columns at a time, because they may stand in the same set of the cache
    for (Index r = first; r < last; r += rows) {
      T* const sliver_of_r = to + (r - first) / rows * sliver;
      Index const here = std::min(rows, last - r);
      for (Index j = k; j < std::min(k1, k + few); ++j) {
        T const* const from = a.data + r + j * a.column;
        T* const column = sliver_of_r + (j - k0) * rows;
        if (here == rows) std::memcpy(column, from, sizeof(T) * std::size_t{Packed<T>::rows});
        else
          for (Index i = 0; i < rows; ++i) column[i] = i < here ? from[i] : T(0);
      }
    }
}

// Packs columns first .. last - 1 of rows k0 .. k1 - 1 of b.
template <class T> void pack_panels(Operand<T> b, Index first, Index last, Index k0, Index k1, T* to) {
  constexpr Index columns = Packed<T>::columns, n = lanes<T>;
  Index const depth = k1 - k0, panel = Packed<T>::panel(depth);
  if (b.column == 1) {
    for (Index k = k0; k < k1; ++k)
      for (Index j = first; j < last; j += columns) {
        T const* const from = b.data + k * b.row + j;
        T* const row = to + (j - first) / columns * panel + (k - k0) * columns;
        if (j + columns <= last) std::memcpy(row, from, sizeof(T) * std::size_t{Packed<T>::columns});
        else
          for (Index i = 0; i < columns; ++i) row[i] = j + i < last ? from[i] : T(0);
      }
    return;
  }
  for (Index j = first; j < last; j += columns, to += panel)
    for (Index k = k0; k < k1; k += n)
      for (Index i = 0; i < columns; i += n)
        detail::turn(b.data + (j + i) * b.column + k, b.column, last - j - i, std::min(n, k1 - k), to + (k - k0) * columns + i, columns);
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::cpu
#endif
