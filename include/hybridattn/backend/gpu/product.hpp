// A matrix product for a GPU, and how a library for column-major matrices computes it.
#ifndef HYBRIDATTN_BACKEND_GPU_PRODUCT_HPP
#define HYBRIDATTN_BACKEND_GPU_PRODUCT_HPP

#include <hybridattn/backend/backend.hpp>
#include <hybridattn/backend/operand.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI::gpu {

// c = a b, or c += a b, for a [M, K], b [K, N], c [M, N].
template <class T> struct Product {
  Operand<T> a, b;
  View<T, 2> c;
  Into into;
};

// The arguments of a BLAS gemm: columns are contiguous, and steps are between columns.
template <class T> struct ColumnMajorProduct {
  struct Factor {
    T const* data;
    bool transposed;
    Index step;
  };
  Factor first, second;   // op(first) [m, k], op(second) [k, n]
  T* c;                   // [m, n]
  Index m, n, k, c_step;
  T old;                  // the factor of what c holds
};
// Read by columns, row-major matrices are their transposes. So c^T = b^T a^T is computed.
template <class T> ColumnMajorProduct<T> column_major(Product<T> const& p) {
  auto const factor = [](Operand<T> const& x) -> typename ColumnMajorProduct<T>::Factor {
    bool const by_rows = x.column == 1;
    return {x.data, !by_rows, std::max<Index>(1, by_rows ? x.row : x.column)};
  };
  return {factor(p.b),
          factor(p.a),
          p.c.data,
          p.c.extent(1),
          p.c.extent(0),
          p.a.columns,
          std::max<Index>(1, p.c.stride[0]),
          p.into == Into::add ? T(1) : T(0)};
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::gpu
#endif
