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

// c = a b or c += a b, for a [M, K], b [K, N], c [M, N].
template <class T> struct Product {
  Operand<T> a, b;
  View<T, 2> c;
};

namespace detail {

inline constexpr Index few_rows = 4;

// `V` vectors of columns of few rows, from column j on.
template <int V, class T> HYBRIDATTN_INLINE void multiply_columns(Product<T> const& p, Index j, Into into) {
  constexpr int n = lanes<T>;
  Vec<T> sum[std::size_t{few_rows}][std::size_t{V}] = {};
  for (Index r = 0; r < p.a.rows && into == Into::add; ++r)
    for (int v = 0; v < V; ++v) sum[r][v] = load(p.c.row(r) + j + v * n);
  Index k = 0;
  for (; k + n <= p.a.columns; k += n)
    HYBRIDATTN_UNROLL
    for (int v = 0; v < V; ++v) {
      Vec<T> square[std::size_t{n}];   // of columns, then of rows of b
      HYBRIDATTN_UNROLL
      for (int i = 0; i < n; ++i) square[i] = load(p.b.data + (j + v * n + i) * p.b.column + k);
      transpose<T>(square);
      for (Index r = 0; r < p.a.rows; ++r) {
        Vec<T> of_row = sum[r][v];
        HYBRIDATTN_UNROLL
        for (int i = 0; i < n; ++i) of_row += p.a(r, k + i) * square[i];
        sum[r][v] = of_row;
      }
    }
  for (; k < p.a.columns; ++k)
    for (int v = 0; v < V; ++v) {
      Vec<T> row;
      for (int i = 0; i < n; ++i) row[i] = p.b(k, j + v * n + i);
      for (Index r = 0; r < p.a.rows; ++r) sum[r][v] += p.a(r, k) * row;
    }
  for (Index r = 0; r < p.a.rows; ++r)
    for (int v = 0; v < V; ++v) store(p.c.row(r) + j + v * n, sum[r][v]);
}
template <class T> void multiply_column(Product<T> const& p, Index j, Into into) {
  for (Index r = 0; r < p.a.rows; ++r) {
    T sum = into == Into::add ? p.c(r, j) : T(0);
    for (Index k = 0; k < p.a.columns; ++k) sum += p.a(r, k) * p.b(k, j);
    p.c(r, j) = sum;
  }
}

// Products of at most few_rows rows, as gemm_each has them; `depth` is the largest depth.
template <class T> void multiply_few_rows(Cpu& cpu, Product<T> const* first, Product<T> const* last, Index depth, Into into) {
  constexpr Index n = lanes<T>, together = 2 * n;   // a line of the cache or two, and two sums that do not wait for each other
  Index const columns = first->b.columns, grain = round_up(ceil_div(4 * element_grain, depth), together), parts = ceil_div(columns, grain);
  parallel_for(cpu, (last - first) * parts, [&](Index task, int) {
    Product<T> const& p = first[task / parts];
    Index j = task % parts * grain;
    Index const end = std::min(columns, j + grain);
    for (; j + together <= end; j += together) multiply_columns<2>(p, j, into);
    for (; j + n <= end; j += n) multiply_columns<1>(p, j, into);
    for (; j < end; ++j) multiply_column(p, j, into);
  });
}

}  // namespace detail
}  // namespace hybridattn::inline HYBRIDATTN_ABI::cpu
#endif
