// Matrix products on the CPU, by the register tile. A row of a result depends only on that row of `a` and on `b`. It is
// summed over the depth in one fixed order, for any number of rows and threads.
#ifndef HYBRIDATTN_BACKEND_CPU_GEMM_HPP
#define HYBRIDATTN_BACKEND_CPU_GEMM_HPP

#include <hybridattn/backend/cpu/cpu.hpp>
#include <hybridattn/backend/cpu/few_rows.hpp>
#include <hybridattn/backend/cpu/pack.hpp>
#include <hybridattn/backend/cpu/tile.hpp>
#include <hybridattn/backend/operand.hpp>
#include <hybridattn/core/math.hpp>

#include <algorithm>

namespace hybridattn::inline HYBRIDATTN_ABI::cpu {

namespace detail {

// A block of b and a block of a stay in the second-level cache, a panel of b and a sliver of a in the first-level cache.
inline constexpr Index depth_block = 256, column_bytes = 1024, row_bytes = 576;   // for a block of full depth
template <class T> constexpr Index most_columns(Index depth) {
  return column_bytes / Index{sizeof(T)} * depth_block / depth / Packed<T>::columns * Packed<T>::columns;
}
template <class T> constexpr Index most_rows(Index depth) {
  return row_bytes / Index{sizeof(T)} * depth_block / depth / Packed<T>::rows * Packed<T>::rows;
}

// How a product of at most M rows, N columns and depth K is shared out: parts of equal size, in whole tiles. The memory for packing does
// not depend on M: a step whose experts get other numbers of tokens takes the same blocks of the pool.
template <class C> struct Shares {
  using T = wide_t<C>;
  Index depth, rows, columns;   // of a block: at most depth_block; of a part
  Index row_parts, column_parts, panel_columns;
  bool keeps_sums;   // of a product whose c is rounded, between blocks of its depth

  template <class Other> explicit Shares(Shares<Other> const& other)
      : depth(other.depth), rows(other.rows), columns(other.columns), row_parts(other.row_parts), column_parts(other.column_parts),
        panel_columns(other.panel_columns), keeps_sums(false) {}
  Shares(Index M, Index N, Index K, Index threads) : depth(std::min(K, depth_block)), keeps_sums(!std::is_same_v<C, T> && K > depth_block) {
    Index const whole = round_up(N, Index{Packed<T>::columns});
    Index const wanted = threads == 1 ? 1 : 4 * threads;   // parts, so that threads which start late find some left
    column_parts = ceil_div(N, most_columns<T>(depth));
    row_parts = std::clamp<Index>(ceil_div(wanted, column_parts), 1, ceil_div(M, 8 * Packed<T>::rows));
    column_parts = std::clamp<Index>(ceil_div(wanted, row_parts), column_parts, ceil_div(N, 4 * Packed<T>::columns));
    rows = round_up(ceil_div(M, row_parts), Index{Packed<T>::rows});
    columns = round_up(ceil_div(N, column_parts), Index{Packed<T>::columns});
    row_parts = ceil_div(M, rows), column_parts = ceil_div(N, columns), panel_columns = std::min(whole, most_columns<T>(depth));
  }
  Index parts() const { return row_parts * column_parts; }
  Index slivers() const { return most_rows<T>(depth) / Packed<T>::rows * Packed<T>::sliver(depth); }
  Index panels() const { return panel_columns / Packed<T>::columns * Packed<T>::panel(depth); }
  // Taken for any depth, so that the memory for packing has no step where a depth gets a second block.
  Index sums() const {
    return std::is_same_v<C, T> ? 0 : most_rows<T>(depth_block) * std::min(panel_columns, most_columns<T>(depth_block));
  }
  Index memory() const { return sums() + slivers() + panels(); }
};

// to = from, rounded where `to` is bf16.
template <class C> HYBRIDATTN_INLINE void round_row(wide_t<C> const* from, Index count, C* to) {
  for (Index i = 0; i < count; ++i) to[i] = static_cast<C>(from[i]);
}

// One tile of c; `add` continues the sum that c already holds.
template <class C>
HYBRIDATTN_INLINE void write_tile(Index depth, wide_t<C> const* sliver, wide_t<C> const* panel, C* c, Index c_row, Index rows,
                                  Index columns, bool add) {
  using T = wide_t<C>;
  constexpr int MR = tuning.product.rows, NV = tuning.product.vectors;
  alignas(vector_bytes) T apart[std::size_t{MR * Packed<T>::columns}];   // for a tile at an edge of c, and for one that is rounded
  T* to = apart;
  Index stride = Packed<T>::columns;
  if constexpr (std::is_same_v<C, T>)
    if (rows == MR && columns == Packed<T>::columns) to = c, stride = c_row;
  for (Index r = 0; r < rows && to == apart && add; ++r) std::copy_n(c + r * c_row, columns, to + r * stride);
  auto const at = [&](int r, int v) HYBRIDATTN_INLINE_LAMBDA { return to + r * stride + v * lanes<T>; };
  auto const keep = [&](int r, int v, Vec<T> sum) HYBRIDATTN_INLINE_LAMBDA { store(at(r, v), sum); };
  Scalars<T> const a{sliver, 1, MR};
  Columns<T> const b{panel, Packed<T>::columns};
  if (add) tile<MR, NV, T>(depth, a, b, [&](int r, int v) HYBRIDATTN_INLINE_LAMBDA { return load(at(r, v)); }, keep);
  else tile<MR, NV, T>(depth, a, b, [](int, int) HYBRIDATTN_INLINE_LAMBDA { return Vec<T>{}; }, keep);
  for (Index r = 0; r < rows && to == apart; ++r) round_row(to + r * stride, columns, c + r * c_row);
}

// Rows r0 .. r1 - 1 and columns c0 .. c1 - 1 of a product. `memory` is scratch of shares.memory().
template <class A, class B, class C>
void multiply_part(Product<A, B, C> const& p, Shares<C> const& shares, Index r0, Index r1, Index c0, Index c1, wide_t<C>* memory,
                   Into into) {
  using T = wide_t<C>;
  constexpr Index MR = Packed<T>::rows, NC = Packed<T>::columns;
  T *const slivers = memory, *const panels = slivers + shares.slivers();
  for (Index k0 = 0; k0 < p.a.columns; k0 += depth_block) {
    Index const k1 = std::min(p.a.columns, k0 + depth_block), depth = k1 - k0, most = most_rows<T>(shares.depth);
    pack_panels(p.b, c0, c1, k0, k1, panels);
    for (Index block = r0; block < r1; block += most) {
      Index const end = std::min(r1, block + most);
      pack_slivers(p.a, block, end, k0, k1, slivers);
      for (Index r = block; r < end; r += MR)   // so that whole rows of c are written one after the other
        for (Index j = c0; j < c1; j += NC)
          write_tile<C>(depth, slivers + (r - block) / MR * Packed<T>::sliver(depth), panels + (j - c0) / NC * Packed<T>::panel(depth),
                        p.c.row(r) + j, p.c.stride[0], std::min(MR, end - r), std::min(NC, c1 - j), into == Into::add || k0 > 0);
    }
  }
}
// The same for a c in bf16 and a depth of several blocks: between blocks the sums stay in float, for some rows at a time.
template <class A, class B>
void multiply_part_in_float(Product<A, B, bf16> const& p, Shares<bf16> const& shares, Index r0, Index r1, Index c0, Index c1, float* memory,
                            Into into) {
  Index const most = most_rows<float>(shares.depth), columns = c1 - c0;
  Operand<B> const b = p.b.transposed().row_range(c0, c1).transposed();
  for (Index block = r0; block < r1; block += most) {
    Index const end = std::min(r1, block + most);
    View<float, 2> const sums{memory, {end - block, columns}};
    for (Index r = block; r < end && into == Into::add; ++r) std::copy_n(p.c.row(r) + c0, columns, sums.row(r - block));
    multiply_part(Product<A, B, float>{p.a.row_range(block, end), b, sums}, Shares<float>{shares}, 0, end - block, 0, columns,
                  memory + shares.sums(), into);
    for (Index r = block; r < end; ++r) round_row(sums.row(r - block), columns, p.c.row(r) + c0);
  }
}

// A product without depth.
template <class C> void sum_nothing(View<C, 2> c, Into into) {
  for (Index r = 0; r < c.extent(0) && into == Into::overwrite; ++r) std::fill_n(c.row(r), c.extent(1), C(0));
}

}  // namespace detail

// Computes the products first .. last - 1 in one parallel loop: of at most `rows` rows and of a depth up to `depth`, above 0 in all or in
// none. All have the same number of columns. Transposed operands are read in place.
template <class A, class B, class C>
void gemm_each(Cpu& cpu, Product<A, B, C> const* first, Product<A, B, C> const* last, Index rows, Index depth, Into into) {
  static_assert(std::is_same_v<wide_t<A>, wide_t<C>> && std::is_same_v<wide_t<B>, wide_t<C>>, "gemm: a, b and c are of one wide scalar");
  if (first == last || rows == 0 || first->b.columns == 0) return;
  if (depth == 0) {
    for (; first != last; ++first) detail::sum_nothing(first->c, into);
    return;
  }
  if (rows <= detail::few_rows && first->b.column != 1) return detail::multiply_few_rows(cpu, first, last, depth, into);
  detail::Shares<C> const shares{rows, first->b.columns, depth, last - first > 1 ? 1 : cpu.threads()};
  Scratch<wide_t<C>> const packed{cpu, cpu.threads() * shares.memory()};
  parallel_for(cpu, (last - first) * shares.parts(), [&](Index task, int thread) {
    Product<A, B, C> const& p = first[task / shares.parts()];
    Index const part = task % shares.parts();
    Index const r0 = part % shares.row_parts * shares.rows, c0 = part / shares.row_parts * shares.columns;
    if (r0 >= p.a.rows) return;
    Index const r1 = std::min(r0 + shares.rows, p.a.rows), c1 = std::min(c0 + shares.columns, p.b.columns);
    auto* const memory = packed.data() + thread * shares.memory();
    if constexpr (std::is_same_v<C, bf16>)
      if (shares.keeps_sums) return detail::multiply_part_in_float(p, shares, r0, r1, c0, c1, memory, into);
    detail::multiply_part(p, shares, r0, r1, c0, c1, memory, into);
  });
}

// One product. Throws Error for operands that do not fit.
template <class A, class B, class C> void gemm(Cpu& cpu, Operand<A> a, Operand<B> b, View<C, 2> c, Into into = Into::overwrite) {
  check(a.columns == b.rows && c.extent(0) == a.rows && c.extent(1) == b.columns, "gemm: [", a.rows, ", ", a.columns, "] times [", b.rows,
        ", ", b.columns, "] does not give [", c.extent(0), ", ", c.extent(1), "]");
  Product<A, B, C> const product{a, b, c};
  gemm_each(cpu, &product, &product + 1, a.rows, a.columns, into);
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::cpu
#endif
