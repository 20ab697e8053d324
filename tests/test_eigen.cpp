#include "catch.hpp"

#include <hybridattn/eigen.hpp>

#include <numeric>
#include <vector>

namespace ha = hybridattn;
using ha::Index;

namespace {

using Matrix = ha::RowMajorMatrix<float>;

// 0, 1, 2, ... in rows.
Matrix counted(Index rows, Index columns) {
  Matrix matrix(rows, columns);
  std::iota(matrix.data(), matrix.data() + matrix.size(), 0.0f);
  return matrix;
}

template <class M> constexpr bool read_only = std::is_same_v<decltype(ha::view_of(std::declval<M>())), ha::View<float const, 2>>;
static_assert(read_only<Matrix const&> && read_only<Eigen::Map<Matrix const>> && !read_only<Matrix&> && !read_only<Eigen::Map<Matrix>>);

}  // namespace

TEST_CASE("a matrix of Eigen is viewed and written where it stands") {
  Matrix matrix = counted(4, 6);
  auto const view = ha::view_of(matrix);
  CHECK(view.shape == ha::Shape<2>{4, 6});
  CHECK(view.is_contiguous());
  view(2, 3) = -1;
  CHECK(matrix(2, 3) == -1);

  auto const part = ha::view_of(matrix.block(1, 2, 3, 4));
  CHECK(part.shape == ha::Shape<2>{3, 4});
  CHECK(part.stride == ha::Shape<2>{6, 1});
  CHECK(&part(0, 0) == &matrix(1, 2));
  CHECK(part(1, 1) == -1);

  Eigen::MatrixXf by_columns = matrix.transpose();
  CHECK(ha::view_of(by_columns.transpose())(2, 3) == -1);

  Eigen::VectorXf vector = matrix.row(1);
  CHECK(&ha::view_of(vector)(5) == vector.data() + 5);
  CHECK(&ha::view_of(matrix.row(3))(5) == &matrix(3, 5));
}

TEST_CASE("a view is a map of Eigen with its strides") {
  std::vector<float> elements(40, 1.0f);
  ha::View<float, 2> const view{elements.data(), {3, 4}, {10, 1}};
  auto map = ha::as_eigen(view);
  map.setConstant(2);
  CHECK(map.rows() == 3);
  CHECK(map.sum() == 24);
  CHECK(std::accumulate(elements.begin(), elements.end(), 0.0f) == 40 + 12);
  CHECK(ha::view_of(map).stride == view.stride);

  ha::View<float const, 2> const constant = view;
  static_assert(std::is_const_v<std::remove_pointer_t<decltype(ha::as_eigen(constant).data())>>);
  CHECK(ha::as_eigen(constant) == map);
  CHECK(ha::as_eigen(ha::View<float, 2>{}).size() == 0);
  CHECK(ha::as_eigen(ha::View<float, 1>{elements.data(), {5}}).sum() == 4 * 2 + 1);
}

TEST_CASE("heads of a matrix and a head of a view are each other's inverse") {
  Matrix matrix = counted(5, 12);
  auto const heads = ha::heads_of(matrix, 3);
  CHECK(heads.shape == ha::Shape<3>{5, 3, 4});
  for (Index h = 0; h < 3; ++h) CHECK(ha::as_eigen(heads, h) == matrix.middleCols(4 * h, 4));
  CHECK(ha::heads_of(matrix.middleCols(4, 8), 2)(3, 1, 2) == matrix(3, 4 + 4 + 2));
  Matrix none(0, 6);
  CHECK(ha::as_eigen(ha::heads_of(none, 2), 1).rows() == 0);
}

TEST_CASE("what cannot be viewed is refused with what to do") {
  Matrix matrix = counted(4, 6);
  CHECK_THROWS_WITH(ha::view_of(matrix.col(1)),
                    "view_of: elements of a row must be neighbours, but are 6 apart; copy them into a RowMajorMatrix, or a vector");
  CHECK_THROWS_WITH(ha::heads_of(matrix, 4), "heads_of: 6 columns are not 4 heads of equal size");
  CHECK_THROWS_WITH(ha::heads_of(matrix, 0), "heads_of: 6 columns are not 0 heads of equal size");
  CHECK_THROWS_WITH(ha::as_eigen(ha::heads_of(matrix, 2), 2), "as_eigen: head 2 of 2");
}
