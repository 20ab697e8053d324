// Interchange with Eigen, without copies: the library's views as Eigen's maps, Eigen's matrices as the library's views.
//   as_eigen(view)         of [M, N] a row-major Eigen::Map with the view's strides, of [N] a column vector
//   as_eigen(view, h)      of [N, H, D] head h of all tokens, [N, D]
//   view_of(matrix)        View<T, 2> [M, N], of a vector View<T, 1>
//   heads_of(matrix, H)    View<T, 3> [N, H, D] of a matrix [N, H*D]
// Each looks at elements that somebody else owns, and ends with them. They may be written through it unless they are const.
// Include this header by itself: it is the one with Eigen's types in its signatures.
#ifndef HYBRIDATTN_EIGEN_HPP
#define HYBRIDATTN_EIGEN_HPP

#include <hybridattn/core/check.hpp>
#include <hybridattn/core/view.hpp>

#include <Eigen/Core>

#include <type_traits>
#include <utility>

namespace hybridattn::inline HYBRIDATTN_ABI {

// What view_of takes, and what an expression is evaluated into.
template <class T> using RowMajorMatrix = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

namespace detail {

template <class T, class M> using ConstLike = std::conditional_t<std::is_const_v<T>, M const, M>;
template <class T> using EigenRows =
    Eigen::Map<ConstLike<T, RowMajorMatrix<std::remove_const_t<T>>>, Eigen::Unaligned, Eigen::OuterStride<>>;
template <class T> using EigenVector = Eigen::Map<ConstLike<T, Eigen::VectorX<std::remove_const_t<T>>>>;

template <class M> void check_neighbours(M const& matrix) {
  check(matrix.innerStride() == 1 || matrix.size() == 0, "view_of: elements of a row must be neighbours, but are ", matrix.innerStride(),
        " apart; copy them into a RowMajorMatrix, or a vector");
}

}  // namespace detail

// A view without data is a map of nothing.
template <class T> detail::EigenRows<T> as_eigen(View<T, 2> x) {
  if (x.empty()) return {nullptr, 0, 0, Eigen::OuterStride<>(0)};
  return {x.data, x.extent(0), x.extent(1), Eigen::OuterStride<>(x.stride[0])};
}
template <class T> detail::EigenVector<T> as_eigen(View<T, 1> x) { return {x.data, x.count()}; }
// Throws Error for a head that is not there.
template <class T> detail::EigenRows<T> as_eigen(View<T, 3> x, Index head) {
  check(0 <= head && head < x.extent(1), "as_eigen: head ", head, " of ", x.extent(1));
  if (x.empty()) return as_eigen(View<T, 2>{});
  return as_eigen(View<T, 2>{x.data + head * x.stride[1], {x.extent(0), x.extent(2)}, {x.stride[0], Index{1}}});
}

// Of a matrix, a map, a block, a Ref: anything that has elements, row by row. Throws Error where the elements of a row, known
// at run time only, are no neighbours; column-major matrices and expressions do not compile.
template <class Matrix> auto view_of(Matrix&& matrix) {
  using M = std::remove_cvref_t<Matrix>;
  static_assert((M::Flags & Eigen::DirectAccessBit) != 0, "view_of: an expression has no elements yet; evaluate it into a RowMajorMatrix");
  static_assert(std::is_lvalue_reference_v<Matrix> || !std::is_base_of_v<Eigen::PlainObjectBase<M>, M>,
                "view_of: a temporary matrix ends before its view does; give it a name");
  static_assert(M::IsRowMajor || M::IsVectorAtCompileTime,
                "view_of: the matrix is column-major, Eigen's default; declare it as RowMajorMatrix<T>, or copy it into one");
  using T = std::remove_pointer_t<decltype(matrix.data())>;
  detail::check_neighbours(matrix);
  if constexpr (M::IsVectorAtCompileTime) return View<T, 1>{matrix.data(), {matrix.size()}};
  else return View<T, 2>{matrix.data(), {matrix.rows(), matrix.cols()}, {matrix.outerStride(), Index{1}}};
}
// Throws Error as view_of does, and where the columns are not `heads` equal parts.
template <class Matrix> auto heads_of(Matrix&& matrix, Index heads) {
  static_assert(!std::remove_cvref_t<Matrix>::IsVectorAtCompileTime, "heads_of: a vector has no tokens; make it a matrix of one row");
  auto const rows = view_of(std::forward<Matrix>(matrix));
  check(heads > 0 && rows.extent(1) % heads == 0, "heads_of: ", rows.extent(1), " columns are not ", heads, " heads of equal size");
  Index const D = rows.extent(1) / heads;
  return View<typename decltype(rows)::Element, 3>{rows.data, {rows.extent(0), heads, D}, {rows.stride[0], D, Index{1}}};
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
