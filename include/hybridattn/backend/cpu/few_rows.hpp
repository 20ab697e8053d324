// Products of few rows with a transposed b, as in decoding. Nothing is packed, because b is read once. The sums have the order and the
// bits of those of a product of many rows.
#ifndef HYBRIDATTN_BACKEND_CPU_FEW_ROWS_HPP
#define HYBRIDATTN_BACKEND_CPU_FEW_ROWS_HPP

#include <hybridattn/backend/cpu/cpu.hpp>
#include <hybridattn/backend/cpu/vectors.hpp>
#include <hybridattn/backend/operand.hpp>
#include <hybridattn/core/math.hpp>

#include <algorithm>

namespace hybridattn::inline HYBRIDATTN_ABI::cpu {

// c = a b or c += a b, for a [M, K], b [K, N], c [M, N]. Numbers are multiplied and summed in the wide scalar, which is the same for all
// three, and rounded once where c is stored in bf16.
template <class A, class B, class C> struct Product {
  Operand<A> a;
  Operand<B> b;
  View<C, 2> c;
};

namespace detail {

inline constexpr Index few_rows = 4;

// `V` vectors of columns of few rows, from column j on. Where b ends before them, its last column stands in, and nothing of it is written:
// the same arithmetic makes the same bits, whatever the number of columns.
template <int V, bool is_whole, class A, class B, class C>
HYBRIDATTN_INLINE void multiply_columns(Product<A, B, C> const& p, Index j, Into into) {
  using T = wide_t<C>;
  constexpr int n = lanes<T>;
  auto const column = [&](int v, int i) HYBRIDATTN_INLINE_LAMBDA {
    Index const number = j + v * n + i;
    return p.b.data + (is_whole ? number : std::min(number, p.b.columns - 1)) * p.b.column;
  };
  auto const count = [&](int v) HYBRIDATTN_INLINE_LAMBDA { return is_whole ? n : std::min<Index>(n, p.b.columns - j - v * n); };
  Vec<T> sum[std::size_t{few_rows}][std::size_t{V}] = {};
  for (Index r = 0; r < p.a.rows && into == Into::add; ++r)
    for (int v = 0; v < V; ++v) sum[r][v] = load_wide_first(p.c.row(r) + j + v * n, count(v));
  Index k = 0;
  for (; k + n <= p.a.columns; k += n) HYBRIDATTN_UNROLL
  for (int v = 0; v < V; ++v) {
    Vec<T> square[std::size_t{n}];   // of columns, then of rows of b
    HYBRIDATTN_UNROLL
    for (int i = 0; i < n; ++i) square[i] = load_wide(column(v, i) + k);
    transpose<T>(square);
    for (Index r = 0; r < p.a.rows; ++r) {
      Vec<T> of_row = sum[r][v];
      HYBRIDATTN_UNROLL
      for (int i = 0; i < n; ++i) of_row += T(p.a(r, k + i)) * square[i];
      sum[r][v] = of_row;
    }
  }
  for (; k < p.a.columns; ++k)
    for (int v = 0; v < V; ++v) {
      Vec<T> row{};
      for (int i = 0; i < n; ++i) row[i] = column(v, i)[k];
      for (Index r = 0; r < p.a.rows; ++r) sum[r][v] += T(p.a(r, k)) * row;
    }
  for (Index r = 0; r < p.a.rows; ++r)
    for (int v = 0; v < V; ++v) store_rounded(p.c.row(r) + j + v * n, sum[r][v], count(v));
}

// Products of at most few_rows rows, as gemm_each has them; `depth` is the largest depth.
template <class A, class B, class C>
void multiply_few_rows(Cpu& cpu, Product<A, B, C> const* first, Product<A, B, C> const* last, Index depth, Into into) {
  constexpr Index n = lanes<wide_t<C>>, together = 2 * n;   // a line of the cache or two, and two sums that do not wait for each other
  Index const columns = first->b.columns, grain = round_up(ceil_div(4 * element_grain, depth), together), parts = ceil_div(columns, grain);
  parallel_for(cpu, (last - first) * parts, [&](Index task, int) {
    Product<A, B, C> const& p = first[task / parts];
    Index j = task % parts * grain;
    Index const end = std::min(columns, j + grain);
    for (; j + together <= end; j += together) multiply_columns<2, true>(p, j, into);
    for (; j < end; j += n) multiply_columns<1, false>(p, j, into);
  });
}

}  // namespace detail
}  // namespace hybridattn::inline HYBRIDATTN_ABI::cpu
#endif
