// Matrix products on the CPU, by the register tile. A row of a result depends only on that row of `a` and on `b`. It is
// summed over the depth in one fixed order, for any number of rows and threads.
#ifndef HYBRIDATTN_BACKEND_CPU_GEMM_HPP
#define HYBRIDATTN_BACKEND_CPU_GEMM_HPP

#include <hybridattn/backend/cpu/cpu.hpp>
#include <hybridattn/backend/cpu/tile.hpp>
#include <hybridattn/backend/operand.hpp>
#include <hybridattn/core/math.hpp>

#include <algorithm>

namespace hybridattn::inline HYBRIDATTN_ABI::cpu {

namespace detail {

inline constexpr int panel_vectors = 2;
template <class T> inline constexpr Index panel_columns = panel_vectors * lanes<T>;
inline constexpr Index depth_block = 256, row_block = 64;

// Columns first .. first + panel_columns of rows k0 .. k1 of b, as consecutive rows; zero where b has no more columns.
template <class T> void pack_panel(Operand<T> b, Index first, Index k0, Index k1, T* panel) {
  constexpr Index width = panel_columns<T>;
  Index const here = std::min(width, b.columns - first);
  if (here < width) std::memset(panel, 0, static_cast<std::size_t>((k1 - k0) * width) * sizeof(T));
  if (b.column == 1) {
    for (Index k = k0; k < k1; ++k)
      std::memcpy(panel + (k - k0) * width, b.data + k * b.row + first, static_cast<std::size_t>(here) * sizeof(T));
    return;
  }
  Index j = 0;
  for (; j + lanes<T> <= here; j += lanes<T>) {
    T const* from = b.data + (first + j) * b.column;
    Index k = k0;
    for (; k + lanes<T> <= k1; k += lanes<T>) transpose(from + k, b.column, panel + (k - k0) * width + j, width);
    for (; k < k1; ++k)
      for (Index i = 0; i < lanes<T>; ++i) panel[(k - k0) * width + j + i] = from[i * b.column + k];
  }
  for (; j < here; ++j)
    for (Index k = k0; k < k1; ++k) panel[(k - k0) * width + j] = b.data[(first + j) * b.column + k * b.row];
}

// One tile of c from `rows` rows of a; `add` continues the sum that c already holds.
template <class T> void write_tile(Index depth, Scalars<T> a, T const* panel, T* c, Index c_row, Index rows, Index columns, bool add) {
  constexpr int MR = tile_rows, NV = panel_vectors;
  if (rows == MR && columns == panel_columns<T>) {
    auto const at = [&](int r, int v) HYBRIDATTN_INLINE_LAMBDA { return c + r * c_row + v * lanes<T>; };
    auto const keep = [&](int r, int v, Vec<T> sum) HYBRIDATTN_INLINE_LAMBDA { store(at(r, v), sum); };
    Columns<T> const b{panel, panel_columns<T>};
    if (add) tile<MR, NV, T>(depth, a, b, [&](int r, int v) HYBRIDATTN_INLINE_LAMBDA { return load(at(r, v)); }, keep);
    else tile<MR, NV, T>(depth, a, b, [](int, int) HYBRIDATTN_INLINE_LAMBDA { return Vec<T>{}; }, keep);
    return;
  }
  // At an edge the same whole tile runs on copies, padded with rows of zeros and with columns that are never read.
  alignas(vector_bytes) T padded_a[MR * depth_block] = {}, padded_c[MR * panel_columns<T>] = {};
  for (Index r = 0; r < rows; ++r) {
    for (Index k = 0; k < depth; ++k) padded_a[r * depth + k] = a.data[r * a.row + k * a.depth];
    if (add) std::memcpy(padded_c + r * panel_columns<T>, c + r * c_row, static_cast<std::size_t>(columns) * sizeof(T));
  }
  write_tile<T>(depth, {padded_a, depth, 1}, panel, padded_c, panel_columns<T>, MR, panel_columns<T>, add);
  for (Index r = 0; r < rows; ++r)
    std::memcpy(c + r * c_row, padded_c + r * panel_columns<T>, static_cast<std::size_t>(columns) * sizeof(T));
}

// Rows r0 .. r1 of one panel of columns of c (+)= a b.
template <class T>
void multiply_panel(Operand<T> a, Operand<T> b, T* c, Index c_row, Index r0, Index r1, Index first, T* panel, Into into) {
  Index const columns = std::min(panel_columns<T>, b.columns - first);
  for (Index k0 = 0; k0 < a.columns; k0 += depth_block) {
    Index const k1 = std::min(a.columns, k0 + depth_block);
    pack_panel(b, first, k0, k1, panel);
    for (Index r = r0; r < r1; r += tile_rows)
      write_tile<T>(k1 - k0, {a.data + r * a.row + k0 * a.column, a.row, a.column}, panel, c + r * c_row + first, c_row,
                    std::min<Index>(tile_rows, r1 - r), columns, into == Into::add || k0 > 0);
  }
}

// A product without depth.
template <class T> void sum_nothing(View<T, 2> c, Into into) {
  for (Index r = 0; r < c.extent(0) && into == Into::overwrite; ++r) std::fill_n(c.row(r), c.extent(1), T(0));
}

}  // namespace detail

// c = a b or c += a b, for a [M, K], b [K, N], c [M, N]. Transposed operands are read in place.
template <class T> void gemm(Cpu& cpu, Operand<T> a, Operand<T> b, View<T, 2> c, Into into = Into::overwrite) {
  check(a.columns == b.rows && c.extent(0) == a.rows && c.extent(1) == b.columns, "gemm: [", a.rows, ", ", a.columns, "] times [", b.rows,
        ", ", b.columns, "] does not give [", c.extent(0), ", ", c.extent(1), "]");
  if (c.count() == 0) return;
  if (a.columns == 0) return detail::sum_nothing(c, into);
  using detail::panel_columns;
  Index const panels = ceil_div(b.columns, panel_columns<T>);
  // With few panels and many rows, threads also share out the rows. Each thread packs its own copy of the panel.
  Index const shares = panels >= 2 * cpu.threads() ? 1 : std::clamp<Index>(a.rows / detail::row_block, 1, cpu.threads());
  Index const share = round_up(ceil_div(a.rows, shares), tile_rows);
  constexpr Index panel = detail::depth_block * panel_columns<T>;
  Scratch<T> const packed{cpu, cpu.threads() * panel};
  parallel_for(cpu, panels * shares, [&](Index task, int thread) {
    Index const r0 = task % shares * share, r1 = std::min(a.rows, r0 + share);
    if (r0 < r1)
      detail::multiply_panel(a, b, c.data, c.stride[0], r0, r1, task / shares * panel_columns<T>, packed.data() + thread * panel, into);
  });
}

// One product of several.
template <class T> struct Product {
  Operand<T> a, b;
  View<T, 2> c;
};

// Computes the products first .. last in one parallel loop. All have the same number of columns, and a depth above 0 in all or in none.
template <class T> void gemm_each(Cpu& cpu, Product<T> const* first, Product<T> const* last, Into into) {
  if (first == last) return;
  if (first->a.columns == 0) {
    for (; first != last; ++first) detail::sum_nothing(first->c, into);
    return;
  }
  using detail::panel_columns;
  Index const panels = ceil_div(first->b.columns, panel_columns<T>);
  constexpr Index panel = detail::depth_block * panel_columns<T>;
  Scratch<T> const packed{cpu, cpu.threads() * panel};
  parallel_for(cpu, (last - first) * panels, [&](Index task, int thread) {
    Product<T> const& p = first[task / panels];
    detail::multiply_panel(p.a, p.b, p.c.data, p.c.stride[0], 0, p.a.rows, task % panels * panel_columns<T>, packed.data() + thread * panel,
                           into);
  });
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::cpu
#endif
