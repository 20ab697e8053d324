// <hybridattn/eigen.hpp> as one file, written by scripts/single_include: it and all that it needs of hybridattn, a library of
// language models with hybrid attention. The other files of single_include may stand beside it.
// SPDX-License-Identifier: MIT
// Copyright (c) 2026 the hybridattn authors

#include <Eigen/Core>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <version>

// ==== hybridattn/core/config.hpp
// Macros that say which compiler this is and what it can do. Only this header asks the compiler.
#ifndef HYBRIDATTN_CORE_CONFIG_HPP
#define HYBRIDATTN_CORE_CONFIG_HPP

#if defined(__FAST_MATH__)
#error "hybridattn needs IEEE arithmetic: its causality is bitwise and its masks are infinities. Build without -ffast-math."
#endif

// HD stands in front of a function of the host and of kernels, DEVICE in front of a function of kernels alone.
// UNROLL_IN_KERNEL stands in front of a loop with few, constant turns in a kernel, UNROLL_8_IN_KERNEL in front of one with many,
// UNROLL_4_IN_KERNEL and UNROLL_2_IN_KERNEL in front of one with many that each fill many registers.
#if defined(__CUDACC__)
#define HYBRIDATTN_CUDA 1
#define HYBRIDATTN_HD __host__ __device__
#define HYBRIDATTN_DEVICE __device__ __forceinline__
#define HYBRIDATTN_UNROLL_IN_KERNEL _Pragma("unroll")
#define HYBRIDATTN_UNROLL_8_IN_KERNEL _Pragma("unroll 8")
#define HYBRIDATTN_UNROLL_4_IN_KERNEL _Pragma("unroll 4")
#define HYBRIDATTN_UNROLL_2_IN_KERNEL _Pragma("unroll 2")
#else
#define HYBRIDATTN_CUDA 0
#define HYBRIDATTN_HD
#define HYBRIDATTN_DEVICE inline
#define HYBRIDATTN_UNROLL_IN_KERNEL
#define HYBRIDATTN_UNROLL_8_IN_KERNEL
#define HYBRIDATTN_UNROLL_4_IN_KERNEL
#define HYBRIDATTN_UNROLL_2_IN_KERNEL
#endif

// Whether the program links cuBLAS: the CMake target hybridattn::cuda_cublas says so.
#if !defined(HYBRIDATTN_CUBLAS)
#define HYBRIDATTN_CUBLAS 0
#endif

// Ends the program or the kernel, where an index is out of bounds.
#if defined(__CUDA_ARCH__)
#define HYBRIDATTN_ABORT() __trap()
#else
#define HYBRIDATTN_ABORT() std::abort()
#endif

// Sanitizers of addresses and of threads: the emulator tells them when it changes stacks.
#if defined(__has_feature)
#define HYBRIDATTN_HAS_FEATURE(feature) __has_feature(feature)
#else
#define HYBRIDATTN_HAS_FEATURE(feature) 0
#endif
#if defined(__SANITIZE_ADDRESS__) || HYBRIDATTN_HAS_FEATURE(address_sanitizer)
#define HYBRIDATTN_ASAN 1
#else
#define HYBRIDATTN_ASAN 0
#endif
#if defined(__SANITIZE_THREAD__) || HYBRIDATTN_HAS_FEATURE(thread_sanitizer)
#define HYBRIDATTN_TSAN 1
#define HYBRIDATTN_UNWATCHED __attribute__((no_sanitize_thread))   // a function whose own reads and writes the sanitizer ignores
#else
#define HYBRIDATTN_TSAN 0
#define HYBRIDATTN_UNWATCHED
#endif

#define HYBRIDATTN_INLINE inline __attribute__((always_inline))
// On a lambda: [&](int i) HYBRIDATTN_INLINE_LAMBDA { ... }
#define HYBRIDATTN_INLINE_LAMBDA __attribute__((always_inline))

#define HYBRIDATTN_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define HYBRIDATTN_UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__) && !defined(__CUDACC__)
#define HYBRIDATTN_UNROLL _Pragma("GCC unroll 16")
#else
#define HYBRIDATTN_UNROLL
#endif

// Indices are checked in debug builds only, because the innermost loops use views.
#if defined(NDEBUG) && !defined(HYBRIDATTN_BOUNDS_CHECKS)
#define HYBRIDATTN_BOUNDS_CHECKS 0
#elif !defined(HYBRIDATTN_BOUNDS_CHECKS)
#define HYBRIDATTN_BOUNDS_CHECKS 1
#endif

// The library's code depends on some compiler flags. The name of everything that it defines, except Error, has these flags in it:
//   namespace hybridattn::inline HYBRIDATTN_ABI { ... }
// So object files that were compiled with different flags have different functions, and the linker merges none of them.
// A function that takes or returns a type of the library links only between equal flags. docs/conventions.md says more.
#if defined(__AVX512F__)
#define HYBRIDATTN_ABI_VECTORS v64
#elif defined(__AVX2__)
#define HYBRIDATTN_ABI_VECTORS v32i
#elif defined(__AVX__)
#define HYBRIDATTN_ABI_VECTORS v32
#else
#define HYBRIDATTN_ABI_VECTORS v16
#endif
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
#define HYBRIDATTN_ABI_FMA _fma
#else
#define HYBRIDATTN_ABI_FMA
#endif
#if defined(__AVX512BF16__)
#define HYBRIDATTN_ABI_BF16 _bf16
#else
#define HYBRIDATTN_ABI_BF16
#endif
#if HYBRIDATTN_BOUNDS_CHECKS
#define HYBRIDATTN_ABI_CHECKS _checked
#else
#define HYBRIDATTN_ABI_CHECKS
#endif
#if defined(__OPTIMIZE__)   // compilers form FMAs, and round less, only when they optimise
#define HYBRIDATTN_ABI_OPTIMIZED
#else
#define HYBRIDATTN_ABI_OPTIMIZED _O0
#endif
#if HYBRIDATTN_CUDA && HYBRIDATTN_CUBLAS
#define HYBRIDATTN_ABI_COMPILER _nvcc_cublas
#elif HYBRIDATTN_CUDA
#define HYBRIDATTN_ABI_COMPILER _nvcc
#elif defined(__clang__)
#define HYBRIDATTN_ABI_COMPILER _clang
#else
#define HYBRIDATTN_ABI_COMPILER
#endif
#if defined(_LIBCPP_VERSION)   // the library's types have members of the standard library's types
#define HYBRIDATTN_ABI_STD _libcxx
#elif defined(_GLIBCXX_DEBUG)
#define HYBRIDATTN_ABI_STD _std_debug
#else
#define HYBRIDATTN_ABI_STD
#endif
#if HYBRIDATTN_ASAN
#define HYBRIDATTN_ABI_SANITIZER _asan
#elif HYBRIDATTN_TSAN
#define HYBRIDATTN_ABI_SANITIZER _tsan
#else
#define HYBRIDATTN_ABI_SANITIZER
#endif
#define HYBRIDATTN_JOIN(a, b, c, d, e, f, g, h) a##b##c##d##e##f##g##h
#define HYBRIDATTN_JOIN_VALUES(a, b, c, d, e, f, g, h) HYBRIDATTN_JOIN(a, b, c, d, e, f, g, h)
#define HYBRIDATTN_ABI                                                                                              \
  HYBRIDATTN_JOIN_VALUES(HYBRIDATTN_ABI_VECTORS, HYBRIDATTN_ABI_FMA, HYBRIDATTN_ABI_BF16, HYBRIDATTN_ABI_CHECKS, \
                         HYBRIDATTN_ABI_OPTIMIZED, HYBRIDATTN_ABI_COMPILER, HYBRIDATTN_ABI_STD, HYBRIDATTN_ABI_SANITIZER)

// A function's mangled name has the types of its arguments only. With this attribute it also has the type of its result, and a
// variable's name has the variable's type.
namespace hybridattn {
inline namespace HYBRIDATTN_ABI __attribute__((__abi_tag__)) {}
}  // namespace hybridattn

#endif

// ==== hybridattn/core/check.hpp
// Errors: one clear sentence that names the wrong value and the allowed values.
#ifndef HYBRIDATTN_CORE_CHECK_HPP
#define HYBRIDATTN_CORE_CHECK_HPP

namespace hybridattn {

// The only type that the library throws. Its name has no flags (HYBRIDATTN_ABI) in it, so every object file of a program can catch it.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace hybridattn

namespace hybridattn::inline HYBRIDATTN_ABI {

// The parts written one after the other.
template <class... Parts> [[gnu::cold, gnu::noinline]] std::string sentence(Parts const&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}
// Throws Error with the parts written one after the other. The sentence is built only when the check fails.
template <class... Parts> [[noreturn, gnu::cold, gnu::noinline]] void fail(Parts const&... parts) { throw Error(sentence(parts...)); }
template <class... Parts> void check(bool holds, Parts const&... parts) {
  if (!holds) fail(parts...);
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/core/sizes.hpp
// Sizes that a caller or a file chooses. Their products and sums are exact, or throw an Error that names the sizes.
#ifndef HYBRIDATTN_CORE_SIZES_HPP
#define HYBRIDATTN_CORE_SIZES_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

using Index = std::ptrdiff_t;

// The limit of tokens, positions, sequences and experts, whose tables hold int32.
inline constexpr Index largest_int32 = std::numeric_limits<std::int32_t>::max();

namespace detail {

[[noreturn]] inline void fail_sizes(Index const* sizes, int number) {
  std::ostringstream list;
  bool negative = false;
  for (int i = 0; i < number; ++i) {
    list << (i == 0 ? "" : ", ") << sizes[i];
    negative = negative || sizes[i] < 0;
  }
  if (negative) fail("sizes [", list.str(), "]: none may be below 0");
  fail("sizes [", list.str(), "]: their product is too large; the largest number is ", std::numeric_limits<Index>::max());
}
// A 0 makes the product 0, but the other sizes are still checked.
constexpr Index product(Index const* sizes, int number) {
  Index all = 1;
  bool empty = false, counts = true;
  for (int i = 0; i < number; ++i) {
    counts = counts && sizes[i] >= 0 && !__builtin_mul_overflow(all, sizes[i] == 0 ? 1 : sizes[i], &all);
    empty = empty || sizes[i] == 0;
  }
  if (!counts) fail_sizes(sizes, number);
  return empty ? 0 : all;
}

}  // namespace detail

// The product of sizes. Throws Error where a size is below 0, or where the product of the sizes that are not 0 is too large.
template <std::integral... Sizes> constexpr Index size_product(Sizes... sizes) {
  Index const list[] = {static_cast<Index>(sizes)...};
  return detail::product(list, sizeof...(Sizes));
}
// The sum of two sizes. Throws Error as size_product does.
inline Index size_sum(Index a, Index b) {
  Index total = 0;
  bool const counts = a >= 0 && b >= 0 && !__builtin_add_overflow(a, b, &total);
  check(counts, "sizes ", a, " and ", b, ": none may be below 0, and their sum at most ", std::numeric_limits<Index>::max());
  return total;
}
// The bytes of `count` elements. Throws Error as size_product does.
inline std::size_t byte_count(Index count, std::size_t element) {
  Index bytes = 0;
  bool const counts = count >= 0 && !__builtin_mul_overflow(count, static_cast<Index>(element), &bytes);
  check(counts, count, " elements of ", element, " bytes: their number must be 0 or more, and their bytes at most ",
        std::numeric_limits<Index>::max());
  return static_cast<std::size_t>(bytes);
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/core/view.hpp
// Shapes and views. A view does not own its elements and is small enough to pass by value into a kernel.
#ifndef HYBRIDATTN_CORE_VIEW_HPP
#define HYBRIDATTN_CORE_VIEW_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

// Extents, last one fastest. A wrong number of extents does not compile.
template <int Rank> struct Shape {
  Index extent[std::size_t{Rank > 0 ? Rank : 1}] = {};

  Shape() = default;
  template <std::integral... Extents> requires(sizeof...(Extents) == Rank && Rank > 0)
  HYBRIDATTN_HD constexpr Shape(Extents... extents) : extent{static_cast<Index>(extents)...} {}

  HYBRIDATTN_HD constexpr Index operator[](int axis) const { return extent[axis]; }
  // The number of elements. Throws Error where an extent is below 0 or the number is too large. For the host, where sizes are made.
  constexpr Index count() const { return detail::product(extent, Rank); }
  // The same without checks, for tensors that exist already.
  HYBRIDATTN_HD constexpr Index counted() const {
    Index product = 1;
    for (int axis = 0; axis < Rank; ++axis) product *= extent[axis];
    return product;
  }
  friend bool operator==(Shape const&, Shape const&) = default;
};

// Row-major elements. Rows (the last axis) are contiguous; the other axes may have any stride, so a view can be a
// part of a packed q|k|v. An empty view has no data: its tensor is not computed or not given, because an option is off or the
// caller does not need it.
template <class T, int Rank> struct View {
  using Element = T;
  T* data = nullptr;
  Shape<Rank> shape;
  Shape<Rank> stride;

  View() = default;
  HYBRIDATTN_HD View(T* elements, Shape<Rank> extents) : data(elements), shape(extents) {
    Index step = 1;
    for (int axis = Rank; axis-- > 0; step *= shape[axis]) stride.extent[axis] = step;
  }
  HYBRIDATTN_HD View(T* elements, Shape<Rank> extents, Shape<Rank> strides) : data(elements), shape(extents), stride(strides) {}
  // A view for writing converts to a view for reading.
  template <class U> requires std::is_same_v<U const, T>
  HYBRIDATTN_HD View(View<U, Rank> const& writable) : View(writable.data, writable.shape, writable.stride) {}

  HYBRIDATTN_HD Index extent(int axis) const { return shape[axis]; }
  HYBRIDATTN_HD bool empty() const { return data == nullptr; }
  HYBRIDATTN_HD Index count() const { return empty() ? 0 : shape.counted(); }
  HYBRIDATTN_HD bool is_contiguous() const {
    Index step = 1;
    for (int axis = Rank; axis-- > 0; step *= shape[axis])
      if (shape[axis] > 1 && stride[axis] != step) return false;
    return true;
  }

  template <std::integral... Indices> requires(sizeof...(Indices) == Rank) HYBRIDATTN_HD T& operator()(Indices... indices) const {
    return data[offset(indices...)];
  }

  // The last axis at the given leading indices.
  template <std::integral... Indices> requires(sizeof...(Indices) + 1 == Rank) HYBRIDATTN_HD T* row(Indices... indices) const {
    return data + offset(indices...);
  }

 private:
  template <class... Indices> HYBRIDATTN_HD Index offset(Indices... indices) const {
    Index result = 0;
    int axis = 0;
    (add(result, axis, static_cast<Index>(indices)), ...);
    return result;
  }
  HYBRIDATTN_HD void add(Index& offset, int& axis, Index index) const {
#if HYBRIDATTN_BOUNDS_CHECKS
    if (index < 0 || index >= shape[axis]) HYBRIDATTN_ABORT();
#endif
    offset += index * stride[axis++];
  }
};

// [N, ...] as the matrix [N, rest] that a linear projection reads. Contiguous views only.
template <class T, int Rank> requires(Rank >= 1) HYBRIDATTN_HD View<T, 2> as_rows(View<T, Rank> x) {
  if (x.empty()) return {};
  Index const rows = Rank == 1 ? 1 : x.extent(0);
  return {x.data, {rows, rows == 0 ? 0 : x.shape.counted() / rows}};
}
// [N, H, D] as one row for each token and head: [N*H, D].
template <class T> HYBRIDATTN_HD View<T, 2> head_rows(View<T, 3> x) { return {x.data, {x.extent(0) * x.extent(1), x.extent(2)}}; }
// Where row n begins, in elements from the first: rows are counted over all axes but the last.
template <class T, int Rank> HYBRIDATTN_HD Index row_offset(View<T, Rank> const& x, Index n) {
  Index offset = 0;
  for (int axis = Rank - 1; axis-- > 0; n /= x.shape[axis]) offset += n % x.shape[axis] * x.stride[axis];
  return offset;
}
// All elements as one axis. Contiguous views only.
template <class T, int Rank> HYBRIDATTN_HD View<T, 1> flat(View<T, Rank> x) { return {x.data, {x.count()}}; }

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/eigen.hpp
// Interchange with Eigen, without copies: the library's views as Eigen's maps, Eigen's matrices as the library's views.
//   as_eigen(view)         of [M, N] a row-major Eigen::Map with the view's strides, of [N] a column vector
//   as_eigen(view, h)      of [N, H, D] head h of all tokens, [N, D]
//   view_of(matrix)        View<T, 2> [M, N], of a vector View<T, 1>
//   heads_of(matrix, H)    View<T, 3> [N, H, D] of a matrix [N, H*D]
// Each looks at elements that somebody else owns, and ends with them. They may be written through it unless they are const.
// Include this header by itself: it is the one with Eigen's types in its signatures.
#ifndef HYBRIDATTN_EIGEN_HPP
#define HYBRIDATTN_EIGEN_HPP

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
