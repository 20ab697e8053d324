// <hybridattn/hybridattn.hpp> as one file, written by scripts/single_include: it and all that it needs of hybridattn, a library of
// language models with hybrid attention. The other files of single_include may stand beside it.
// SPDX-License-Identifier: MIT
// Copyright (c) 2026 the hybridattn authors

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <boost/hana/fwd/type.hpp>
#include <boost/hana/integral_constant.hpp>
#include <boost/hana/tuple.hpp>
#include <boost/hana/type.hpp>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <exception>
#include <functional>
#include <iterator>
#include <limits>
#include <list>
#include <new>
#include <numbers>
#include <numeric>
#include <pthread.h>
#include <span>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <unistd.h>
#include <utility>
#include <vector>
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

// ==== hybridattn/attention/online_softmax.hpp
// Softmax over scores that come in parts (Milakov and Gimelshein, arXiv 1805.02867).
#ifndef HYBRIDATTN_ATTENTION_ONLINE_SOFTMAX_HPP
#define HYBRIDATTN_ATTENTION_ONLINE_SOFTMAX_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::attention {

// total = sum_j e^(s_j - reference) over the scores of a part. Any reference gives the same softmax. One near the largest score keeps
// every e^(s_j - reference) in range. V is a number, or a vector of numbers for as many queries.
template <class V> struct OnlineSoftmax {
  V reference, total;

  // Changes the reference. Returns the factor e^(old - next) for all sums that were weighted by e^(s_j - old).
  // exponential(x, y) is e^(x - y).
  template <class Exponential> V rebase(V next, Exponential exponential) {
    V const factor = exponential(reference, next);
    reference = next;
    total *= factor;
    return factor;
  }
  // Adds the scores of another part. A part without scores has reference -inf and total 0. Returns one factor for each part's weighted sums.
  struct Factors {
    V own, other;
  };
  template <class Exponential> Factors merge(OnlineSoftmax other, Exponential exponential) {
    V const next = reference > other.reference ? reference : other.reference;
    auto const factor = [&](OnlineSoftmax& part) { return part.reference == next ? V(1) : part.rebase(next, exponential); };
    Factors const factors{factor(*this), factor(other)};  // of two parts without scores, -inf - -inf would be NaN
    total += other.total;
    return factors;
  }
  V lse() const { return reference + std::log(total); }  // log sum_j e^s_j
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::attention
#endif

// ==== hybridattn/backend/cpu/tuning.hpp
// The shapes of the CPU's kernels for each instruction set. What limits a shape is the number of vector registers: a tile of R rows and
// V vectors needs R V sums, V loaded vectors and one broadcast number.
#ifndef HYBRIDATTN_BACKEND_CPU_TUNING_HPP
#define HYBRIDATTN_BACKEND_CPU_TUNING_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::cpu {

struct TileShape {
  int rows, vectors;
};
struct Tuning {
  int vector_bytes;
  TileShape product;     // of a matrix product, from packed operands
  TileShape attention;   // of Full: keys x queries, and queries x entries of v
  TileShape delta;       // of GDN: tokens of a group x vectors of a state's row in one pass
  int index_sums;        // of DSA's indexer: sums of a tile whose rows are the heads of a query
  TileShape shared;      // of heads that share keys which are read in place: heads x vectors of a row
};

// `share` is the share of the peak of fused multiply-adds that a tile reached alone, from the first-level cache.
#if defined(__AVX512F__)   // 32 registers of 64 bytes
inline constexpr Tuning tuning{
    .vector_bytes = 64,
    .product = {8, 2},     // share .97; 6x4 is as fast, 16x1 loads too often
    .attention = {8, 2},
    .delta = {4, 1},       // 12 sums and updates, 4 updates: one load and store for 12 multiply-adds
    .index_sums = 16,
    .shared = {4, 4},
};
#elif defined(__AVX__)   // 16 registers of 32 bytes
inline constexpr Tuning tuning{
    .vector_bytes = 32,
    .product = {6, 2},     // share .97; 4x3 .96, 4x2 .95, 3x4 and 12x1 do not fit
    .attention = {4, 2},   // share .95; 4x3 wants 24 queries and loses more at the diagonal
    .delta = {2, 2},       // 4x1 needs 13 loads for the 12 multiply-adds of a row, 2x2 needs 8
    .index_sums = 8,
    .shared = {4, 2},
};
#elif defined(__aarch64__)   // 32 registers of 16 bytes
inline constexpr Tuning tuning{.vector_bytes = 16, .product = {8, 2}, .attention = {8, 2}, .delta = {4, 2}, .index_sums = 16, .shared = {4, 4}};
#else   // 16 registers of 16 bytes
inline constexpr Tuning tuning{.vector_bytes = 16, .product = {6, 2}, .attention = {4, 2}, .delta = {2, 2}, .index_sums = 8, .shared = {4, 2}};
#endif

}  // namespace hybridattn::inline HYBRIDATTN_ABI::cpu
#endif

// ==== hybridattn/core/bf16.hpp
// bfloat16: the upper half of a float, with 8 bits of significand.
#ifndef HYBRIDATTN_CORE_BF16_HPP
#define HYBRIDATTN_CORE_BF16_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

// A scalar that tensors are stored in. It computes nothing: it converts to float, and numbers are rounded to it explicitly.
struct bf16 {
  std::uint16_t bits;

  bf16() = default;
  // Rounds to the nearest bf16, ties to the even one. Numbers beyond the largest bf16 become infinity, NaN stays NaN. A double is rounded
  // to a float first.
  template <class Number> requires std::is_arithmetic_v<Number>
  HYBRIDATTN_HD explicit constexpr bf16(Number number) : bits(rounded(__builtin_bit_cast(std::uint32_t, static_cast<float>(number)))) {}
  HYBRIDATTN_HD static constexpr bf16 from_bits(std::uint16_t bits) {
    bf16 x{};
    x.bits = bits;
    return x;
  }

  HYBRIDATTN_HD constexpr operator float() const { return __builtin_bit_cast(float, std::uint32_t{bits} << 16); }

 private:
  HYBRIDATTN_HD static constexpr std::uint16_t rounded(std::uint32_t x) {
    constexpr std::uint32_t infinity = 0x7f800000, quiet = 0x00400000;
    if ((x & 0x7fffffff) > infinity) return static_cast<std::uint16_t>((x | quiet) >> 16);
    return static_cast<std::uint16_t>((x + 0x7fff + (x >> 16 & 1)) >> 16);
  }
};

// Sums, statistics and gates of a model in T are in WideOf<T>::type.
template <class T> struct WideOf {
  using type = T;
};
template <> struct WideOf<bf16> {
  using type = float;
};
template <class T> using wide_t = typename WideOf<std::remove_const_t<T>>::type;

// The distance from 1 to the next number; 0 for what is no scalar.
template <class T> inline constexpr double epsilon_of = 0;
template <> inline constexpr double epsilon_of<double> = std::numeric_limits<double>::epsilon();
template <> inline constexpr double epsilon_of<float> = static_cast<double>(std::numeric_limits<float>::epsilon());
template <> inline constexpr double epsilon_of<bf16> = 0x1p-7;

}  // namespace hybridattn::inline HYBRIDATTN_ABI
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

// ==== hybridattn/backend/cpu/simd.hpp
// Vectors of the CPU, on the vector extensions of GCC and Clang: no intrinsics, so any target compiles.
#ifndef HYBRIDATTN_BACKEND_CPU_SIMD_HPP
#define HYBRIDATTN_BACKEND_CPU_SIMD_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::cpu {

inline constexpr int vector_bytes = tuning.vector_bytes;

template <class T> struct VectorOf {
  typedef T type __attribute__((vector_size(vector_bytes)));
  typedef T unaligned __attribute__((vector_size(vector_bytes), aligned(alignof(T)), may_alias));
};
template <class T> using Vec = typename VectorOf<T>::type;
template <class T> inline constexpr int lanes = vector_bytes / static_cast<int>(sizeof(T));

template <class T> struct BitsOf;
template <> struct BitsOf<float> {
  using type = std::int32_t;
};
template <> struct BitsOf<double> {
  using type = std::int64_t;
};
// The integers in which a vector of T is compared and masked.
template <class T> using Mask = Vec<typename BitsOf<T>::type>;

template <class T> HYBRIDATTN_INLINE Vec<T> load(T const* from) { return *reinterpret_cast<typename VectorOf<T>::unaligned const*>(from); }
template <class T> HYBRIDATTN_INLINE void store(T* to, Vec<T> x) { *reinterpret_cast<typename VectorOf<T>::unaligned*>(to) = x; }
template <class T> HYBRIDATTN_INLINE Vec<T> broadcast(T x) { return Vec<T>{} + x; }
// Returns x, rounded, in a register: no compiler then fuses a product x with a later sum. Without it GCC, tuned for Zen 2 and
// later, loads a vector again in every instruction that uses it, and loads limit the speed of a tile of FMAs. By value: in place, an
// element of an array would keep its array in memory.
template <class T> HYBRIDATTN_INLINE Vec<T> in_register(Vec<T> x) {
#if defined(__GNUC__) && !defined(__clang__) && defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__GNUC__) && !defined(__clang__) && defined(__SSE2__)
  asm("" : "+x"(x));
#elif defined(__GNUC__) && !defined(__clang__) && defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}
template <class T> HYBRIDATTN_INLINE Vec<T> load_first(T const* from, Index count) {  // the rest is zero
  alignas(vector_bytes) T buffer[lanes<T>] = {};
  std::memcpy(buffer, from, static_cast<std::size_t>(count) * sizeof(T));
  return load(buffer);
}
template <class T> HYBRIDATTN_INLINE void store_first(T* to, Vec<T> x, Index count) {
  alignas(vector_bytes) T buffer[lanes<T>];
  store(buffer, x);
  std::memcpy(to, buffer, static_cast<std::size_t>(count) * sizeof(T));
}

// A vector of the wide scalar, from as many stored numbers.
template <class S> HYBRIDATTN_INLINE Vec<wide_t<S>> load_wide(S const* from) {
  if constexpr (std::is_same_v<S, wide_t<S>>) {
    return load(from);
  } else {
    typedef std::uint16_t Stored __attribute__((vector_size(vector_bytes / 2), aligned(2), may_alias));
    typedef std::uint32_t Bits __attribute__((vector_size(vector_bytes)));
    return reinterpret_cast<Vec<float>>(__builtin_convertvector(*reinterpret_cast<Stored const*>(from), Bits) << 16);
  }
}
template <class S> HYBRIDATTN_INLINE Vec<wide_t<S>> load_wide_first(S const* from, Index count) {   // the rest is zero
  alignas(vector_bytes) S buffer[std::size_t{lanes<wide_t<S>>}] = {};
  std::memcpy(buffer, from, static_cast<std::size_t>(count) * sizeof(S));
  return load_wide(buffer);
}

// Stores the first `count` numbers of x, rounded to the scalar of `to`.
template <class S> HYBRIDATTN_INLINE void store_rounded(S* to, Vec<wide_t<S>> x, Index count) {
  if (std::is_same_v<S, wide_t<S>> && count == lanes<wide_t<S>>) {
    std::memcpy(to, &x, sizeof x);
    return;
  }
  alignas(vector_bytes) wide_t<S> buffer[std::size_t{lanes<wide_t<S>>}];
  store(buffer, x);
  for (Index i = 0; i < count; ++i) to[i] = static_cast<S>(buffer[i]);
}

template <class T> HYBRIDATTN_INLINE Vec<T> select(Mask<T> where, Vec<T> yes, Vec<T> no) { return where ? yes : no; }
template <class T> HYBRIDATTN_INLINE Vec<T> max(Vec<T> x, Vec<T> y) { return x > y ? x : y; }
// 0, 1, 2, ...
template <class T> HYBRIDATTN_INLINE Mask<T> lane_numbers() {
  Mask<T> numbers;
  for (int i = 0; i < lanes<T>; ++i) numbers[i] = i;
  return numbers;
}

namespace detail {
// Elements of a, and of b behind them, by their numbers.
template <class V, std::size_t... from> HYBRIDATTN_INLINE V shuffled(V a, V b, std::index_sequence<from...>) {
#if HYBRIDATTN_CUDA   // nvcc does not pass a parameter pack on to the builtin
  return V{(from < sizeof...(from) ? a : b)[from % sizeof...(from)]...};
#else
  return __builtin_shufflevector(a, b, static_cast<int>(from)...);
#endif
}
template <std::size_t distance, class V, std::size_t... i> HYBRIDATTN_INLINE V swapped(V x, std::index_sequence<i...>) {
  return shuffled(x, x, std::index_sequence<(i ^ distance)...>{});
}
// Lane 0 of the result is f over all lanes: f combines the two halves, then the halves of the result, and so on.
template <class V, class F, std::size_t half = sizeof(V) / sizeof(V{}[0]) / 2> HYBRIDATTN_INLINE V fold(V x, F f) {
  if constexpr (half == 0) return x;
  else return fold<V, F, half / 2>(f(x, swapped<half>(x, std::make_index_sequence<sizeof(V) / sizeof(V{}[0])>{})), f);
}
}  // namespace detail

template <class T> HYBRIDATTN_INLINE bool any(Mask<T> mask) {
  return detail::fold(mask, [](Mask<T> a, Mask<T> b) HYBRIDATTN_INLINE_LAMBDA { return a | b; })[0] != 0;
}

// Correctly rounded. (The library function would set errno, which keeps GCC from using the vector instruction.)
template <class T> HYBRIDATTN_INLINE Vec<T> sqrt(Vec<T> x) {
#if defined(__clang__)
  return __builtin_elementwise_sqrt(x);
#else
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return __builtin_ia32_sqrtps512_mask(x, Vec<T>{}, static_cast<short>(-1), 4);
  else return __builtin_ia32_sqrtpd512_mask(x, Vec<T>{}, static_cast<signed char>(-1), 4);
#elif defined(__AVX__)
  if constexpr (sizeof(T) == 4) return __builtin_ia32_sqrtps256(x);
  else return __builtin_ia32_sqrtpd256(x);
#else
  for (int i = 0; i < lanes<T>; ++i) x[i] = std::sqrt(x[i]);
  return x;
#endif
#endif
}

// Summed in one fixed tree, for any values of the lanes.
template <class T> HYBRIDATTN_INLINE T sum(Vec<T> x) {
  return detail::fold(x, [](Vec<T> a, Vec<T> b) HYBRIDATTN_INLINE_LAMBDA { return a + b; })[0];
}
template <class T> HYBRIDATTN_INLINE T largest(Vec<T> x) { return detail::fold(x, cpu::max<T>)[0]; }

namespace detail {
// 2^f on [-1/2, 1/2]: float by a minimax polynomial (relative error below 3e-9), double by the series (below 1e-17).
template <class T> struct Exp2;
template <> struct Exp2<float> {
  static constexpr float magic = 12582912.f, least = -127.f, most = 128.f;  // 1.5 * 2^23
  static constexpr int mantissa = 23;
  static constexpr float c[] = {1.559467818e-4f, 1.340664390e-3f, 9.617692973e-3f, 5.550310551e-2f, 2.402265278e-1f, 6.931472150e-1f, 1.f};
};
template <> struct Exp2<double> {
  static constexpr double magic = 6755399441055744.0, least = -1023.0, most = 1024.0;  // 1.5 * 2^52
  static constexpr int mantissa = 52;
  static constexpr double c[] = {1.3691488853904128881e-12, 2.5678435993488205142e-11,
                                 4.4455382718708114976e-10, 7.0549116208011233299e-9,
                                 1.0178086009239699728e-7,  1.3215486790144309488e-6,
                                 1.5252733804059840280e-5,  1.5403530393381609954e-4,
                                 1.3333558146428443423e-3,  9.6181291076284771620e-3,
                                 5.5504108664821579953e-2,  2.4022650695910071233e-1,
                                 6.9314718055994530942e-1,  1.0};
};
}  // namespace detail

template <class T> inline constexpr T log2_e = T(1.44269504088896340736);
// 2^x for x < 128 (double: < 1024), any number for larger x. 0 where 2^x is below 2^-126 (2^-1022). Every NaN gives NaN.
template <class T> HYBRIDATTN_INLINE Vec<T> exp2_below_most(Vec<T> x) {
  using E = detail::Exp2<T>;
  using Bits = Vec<std::make_unsigned_t<typename BitsOf<T>::type>>;  // they may wrap
  x = cpu::max<T>(broadcast<T>(E::least), x);  // with the arguments in this order a NaN stays NaN
  Vec<T> const shifted = x + E::magic, f = x - (shifted - E::magic);
  Vec<T> p = broadcast<T>(E::c[0]);
  for (std::size_t i = 1; i < std::size(E::c); ++i) p = p * f + E::c[i];
  // A product, because a sum of exponents would turn a NaN into a number.
  Bits const power = (reinterpret_cast<Bits>(shifted) << E::mantissa) + reinterpret_cast<Bits>(broadcast<T>(T(1)));
  return p * reinterpret_cast<Vec<T>>(power);
}
// 2^x and e^x of every x; infinity from 2^127.5 (2^1023.5) on.
template <class T> HYBRIDATTN_INLINE Vec<T> exp2(Vec<T> x) {
  Vec<T> const most = broadcast<T>(detail::Exp2<T>::most);
  return cpu::exp2_below_most<T>(x > most ? most : x);
}
template <class T> HYBRIDATTN_INLINE Vec<T> exp(Vec<T> x) { return cpu::exp2<T>(x * log2_e<T>); }

// log2 x of normal positive numbers, infinity and NaN: x = 2^e m with m around 1, and log m = 2 (z + z^3/3 + z^5/5 + ...) with
// z = (m - 1) / (m + 1).
template <class T> HYBRIDATTN_INLINE Vec<T> log2(Vec<T> x) {
  constexpr int mantissa = detail::Exp2<T>::mantissa, terms = sizeof(T) == 4 ? 6 : 12;  // |z| < 0.172: relative error below 1e-10, 1e-19
  Mask<T> const root_half = reinterpret_cast<Mask<T>>(broadcast<T>(T(0.70710678118654752440)));
  Mask<T> const e = (reinterpret_cast<Mask<T>>(x) - root_half) >> mantissa;
  Vec<T> const m = reinterpret_cast<Vec<T>>(reinterpret_cast<Mask<T>>(x) - (e << mantissa)), z = (m - T(1)) / (m + T(1)), zz = z * z;
  Vec<T> series = broadcast<T>(T(1) / T(2 * terms - 1));
  HYBRIDATTN_UNROLL
  for (int i = terms - 1; i > 0; --i) series = series * zz + T(1) / static_cast<T>(2 * i - 1);
  Vec<T> const result = __builtin_convertvector(e, Vec<T>) + T(2) * log2_e<T> * z * series;
  return x < std::numeric_limits<T>::infinity() ? result : x;
}

namespace detail {
// A register has parts of 16 bytes. A shuffle inside parts is cheap, a shuffle across parts is slow, so sums go across last.
template <class T> inline constexpr int part = 16 / static_cast<int>(sizeof(T));
// Groups of `size` elements from the lower or the upper half of each part of m elements, of a and of b in turn.
template <std::size_t size, bool upper, std::size_t m, class V, std::size_t... i>
HYBRIDATTN_INLINE V half_parts(V a, V b, std::index_sequence<i...>) {
  constexpr std::size_t n = sizeof...(i);
  constexpr std::size_t half = upper ? m / 2 : 0;
  return shuffled(a, b, std::index_sequence<(i % m / size % 2 * n + i / m * m + half + i % m / size / 2 * size + i % size)...>{});
}
// Exchanges rows and parts of registers: part p of a with part p - distance of b, for every second group of `distance` parts.
template <bool second, std::size_t distance, std::size_t m, class V, std::size_t... i>
HYBRIDATTN_INLINE V exchanged_parts(V a, V b, std::index_sequence<i...>) {
  constexpr std::size_t n = sizeof...(i), step = distance * m;
  return shuffled(a, b, std::index_sequence<(i / step % 2 == 0 ? i + (second ? step : 0) : n + i - (second ? 0 : step))...>{});
}
// Transposes the squares of parts: interleaving row i with row i + m/2, log2(m) times (a perfect shuffle of the index bits).
template <class T> HYBRIDATTN_INLINE void transpose_parts(Vec<T>* rows) {
  constexpr int m = part<T>;
  using Lanes = std::make_index_sequence<static_cast<std::size_t>(lanes<T>)>;
  for (int round = 1; round < m; round *= 2) {
    Vec<T> next[std::size_t{m}];
    HYBRIDATTN_UNROLL
    for (int i = 0; i < m / 2; ++i) {
      next[2 * i] = half_parts<1, false, m>(rows[i], rows[i + m / 2], Lanes{});
      next[2 * i + 1] = half_parts<1, true, m>(rows[i], rows[i + m / 2], Lanes{});
    }
    HYBRIDATTN_UNROLL
    for (int i = 0; i < m; ++i) rows[i] = next[i];
  }
}
template <int distance, class T> HYBRIDATTN_INLINE void exchange_parts(Vec<T>* rows) {
  constexpr int n = lanes<T>, m = part<T>;
  if constexpr (distance < n / m) {
    using Lanes = std::make_index_sequence<static_cast<std::size_t>(n)>;
    HYBRIDATTN_UNROLL
    for (int i = 0; i < n; ++i)
      if (i / m / distance % 2 == 0) {
        Vec<T> const a = rows[i], b = rows[i + distance * m];
        rows[i] = exchanged_parts<false, distance, m>(a, b, Lanes{});
        rows[i + distance * m] = exchanged_parts<true, distance, m>(a, b, Lanes{});
      }
    exchange_parts<2 * distance, T>(rows);
  }
}
}  // namespace detail

// rows[c][r] becomes rows[r][c] in the square of one vector's lanes: first inside 16-byte parts of registers, then whole parts.
template <class T> HYBRIDATTN_INLINE void transpose(Vec<T> (&rows)[std::size_t{lanes<T>}]) {
  HYBRIDATTN_UNROLL
  for (int i = 0; i < lanes<T>; i += detail::part<T>) detail::transpose_parts<T>(rows + i);
  detail::exchange_parts<1, T>(rows);
}
// to[c][r] = from[r][c] for such a square in memory.
template <class T> HYBRIDATTN_INLINE void transpose(T const* from, Index from_stride, T* to, Index to_stride) {
  constexpr int n = lanes<T>;
  Vec<T> rows[std::size_t{n}];
  HYBRIDATTN_UNROLL
  for (int i = 0; i < n; ++i) rows[i] = load(from + i * from_stride);
  transpose<T>(rows);
  HYBRIDATTN_UNROLL
  for (int i = 0; i < n; ++i) store(to + i * to_stride, rows[i]);
}

namespace detail {
// Every second part of m elements, of a, then of b.
template <std::size_t offset, std::size_t m, class V, std::size_t... i>
HYBRIDATTN_INLINE V every_second_part(V a, V b, std::index_sequence<i...>) {
  return shuffled(a, b, std::index_sequence<(i / m * 2 * m + offset * m + i % m)...>{});
}
// Adds up sums that are still spread over `left` lanes of each of Count vectors.
template <int Count, int left, class T> HYBRIDATTN_INLINE void halve(Vec<T>* x) {
  if constexpr (left > 1) {
    constexpr int m = part<T>, size = lanes<T> / left;  // size: the number of different sums in a vector
    using Lanes = std::make_index_sequence<static_cast<std::size_t>(lanes<T>)>;
    HYBRIDATTN_UNROLL
    for (int i = 0; i < (Count + 1) / 2; ++i) {
      Vec<T> const a = x[2 * i], b = x[Count == 1 ? 0 : 2 * i + 1];
      if constexpr (size < m) x[i] = half_parts<size, false, m>(a, b, Lanes{}) + half_parts<size, true, m>(a, b, Lanes{});
      else x[i] = every_second_part<0, m>(a, b, Lanes{}) + every_second_part<1, m>(a, b, Lanes{});
    }
    halve<(Count + 1) / 2, left / 2, T>(x);
  }
}
}  // namespace detail

// sums[i] = the sum of the lanes of x[i], for N vectors at once (N a power of 2), each in one fixed tree. Overwrites x.
template <int N, class T> HYBRIDATTN_INLINE void sum_each(Vec<T>* x, T* sums) {
  detail::halve<N, lanes<T>, T>(x);
  if constexpr (N < lanes<T>) store_first(sums, x[0], N);
  HYBRIDATTN_UNROLL
  for (int i = 0; i < N / lanes<T>; ++i) store(sums + i * lanes<T>, x[i]);
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::cpu
#endif

// ==== hybridattn/backend/cpu/vectors.hpp
// Loops over the elements of a row, a vector at a time. The last, shorter vector is padded with zeros and uses the same
// arithmetic, so an element's value does not depend on the length of its row.
#ifndef HYBRIDATTN_BACKEND_CPU_VECTORS_HPP
#define HYBRIDATTN_BACKEND_CPU_VECTORS_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::cpu {

// `count` elements from i on: all lanes, or the last ones of a row.
template <class T> struct Slot {
  Index i, count;

  HYBRIDATTN_INLINE Vec<T> get(T const* row) const { return count == lanes<T> ? load(row + i) : load_first(row + i, count); }
  HYBRIDATTN_INLINE void put(T* row, Vec<T> x) const {
    if (count == lanes<T>) store(row + i, x);
    else store_first(row + i, x, count);
  }
};

template <class T, class F> HYBRIDATTN_INLINE void for_each_vector(Index first, Index last, F f) {
  Index i = first;
  for (; i + lanes<T> <= last; i += lanes<T>) f(Slot<T>{i, lanes<T>});
  if (i < last) f(Slot<T>{i, last - i});
}
// sum over the row of f(slot), where f is zero for the padding.
template <class T, class F> HYBRIDATTN_INLINE T sum_vectors(Index count, F f) {
  Vec<T> total{};
  for_each_vector<T>(0, count, [&](Slot<T> s) HYBRIDATTN_INLINE_LAMBDA { total += f(s); });
  return sum<T>(total);
}

template <class T> HYBRIDATTN_INLINE Vec<T> sigmoid(Vec<T> x) { return T(1) / (T(1) + cpu::exp<T>(-x)); }

// One square root a row.
template <class T> HYBRIDATTN_INLINE T inverse_root(T x) { return T(1) / std::sqrt(x); }

// Elements that a thread computes at a time, and rows that one thread sums. Sums over tokens run over these blocks of rows
// and combine them in order, for any number of threads.
inline constexpr Index element_grain = 16384, sum_rows = 32;

}  // namespace hybridattn::inline HYBRIDATTN_ABI::cpu
#endif

// ==== hybridattn/core/math.hpp
// The scalar functions equations are written in.
#ifndef HYBRIDATTN_CORE_MATH_HPP
#define HYBRIDATTN_CORE_MATH_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

template <class T> HYBRIDATTN_HD T sigmoid(T x) { return T(1) / (T(1) + std::exp(-x)); }
template <class T> HYBRIDATTN_HD T silu(T x) { return x * sigmoid(x); }
// d silu / dx = s (1 + x (1 - s))
template <class T> HYBRIDATTN_HD T silu_slope(T x) {
  T const s = sigmoid(x);
  return s * (T(1) + x * (T(1) - s));
}
// log(1 + e^x), exact for large x too (PyTorch's returns x above 20).
template <class T> HYBRIDATTN_HD T softplus(T x) { return x > T(0) ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x)); }

template <class T> HYBRIDATTN_HD T dot(T const* x, T const* y, Index n) {
  T sum = 0;
  for (Index i = 0; i < n; ++i) sum += x[i] * y[i];
  return sum;
}
// scale x . y, rounded. If the compiler fused it with a subtraction, it would differ by its rounding from the same score
// elsewhere. For scores of 2^30 this is a factor e^64 in a weight.
template <class T> [[gnu::noinline]] T scaled_dot(T scale, T const* x, T const* y, Index n) { return scale * dot(x, y, n); }
// y += a x
template <class T> HYBRIDATTN_HD void axpy(T a, T const* x, T* y, Index n) {
  for (Index i = 0; i < n; ++i) y[i] += a * x[i];
}
template <class T, int Rank> HYBRIDATTN_HD void fill(View<T, Rank> x, T value) {
  for (Index i = 0, n = x.count(); i < n; ++i) x.data[i] = value;
}

// a / b, and a as a multiple of b, rounded up. For any a >= 0.
HYBRIDATTN_HD constexpr Index ceil_div(Index a, Index b) { return a / b + (a % b != 0); }
HYBRIDATTN_HD constexpr Index round_up(Index a, Index b) { return ceil_div(a, b) * b; }

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/core/memory.hpp
// The machine's memory, and allocations of host memory whose size a caller or a file chooses: an Error says what did not fit.
#ifndef HYBRIDATTN_CORE_MEMORY_HPP
#define HYBRIDATTN_CORE_MEMORY_HPP

#if defined(__linux__)
#include <sys/sysinfo.h>
#endif

namespace hybridattn::inline HYBRIDATTN_ABI {

namespace detail {

// The limit in a file of the system. Without such a file or number there is no limit.
inline std::size_t limit_in(char const* path) {
  unsigned long long limit = 0;
  std::FILE* const file = std::fopen(path, "r");
  if (file == nullptr) return std::numeric_limits<std::size_t>::max();
  bool const read = std::fscanf(file, "%llu", &limit) == 1;
  std::fclose(file);
  return read ? static_cast<std::size_t>(limit) : std::numeric_limits<std::size_t>::max();
}
inline std::size_t memory_of_system() {
#if defined(__linux__)
  struct sysinfo info = {};
  if (sysinfo(&info) != 0) return std::numeric_limits<std::size_t>::max();
  std::size_t const all = (info.totalram + info.totalswap) * info.mem_unit;
  return std::min({all, limit_in("/sys/fs/cgroup/memory.max"), limit_in("/sys/fs/cgroup/memory/memory.limit_in_bytes")});
#else
  return std::numeric_limits<std::size_t>::max();
#endif
}

}  // namespace detail

// Bytes of memory and swap of this machine, or the limit of this container if that is less; read once. A system that
// promises more memory than it has (Linux does) ends the process later, when this memory is used.
inline std::size_t machine_memory() {
  static std::size_t const bytes = detail::memory_of_system();
  return bytes;
}

// Runs f, which takes host memory for `what`. Throws Error where memory is short; the error's sentence begins with `where`.
template <class F> decltype(auto) within_memory(std::size_t bytes, char const* what, F f, std::string_view where = {}) {
  try {
    if (bytes <= machine_memory()) return f();
  } catch (std::bad_alloc const&) {
  } catch (std::length_error const&) {
  }
  fail(where, "out of memory: ", bytes, " bytes for ", what, " did not fit");
}
// Throws Error if `bytes` do not fit. For a check before many small allocations.
inline void check_memory(std::size_t bytes, char const* what) {
  within_memory(bytes, what, [] {});
}
// resize and reserve of a vector, for a count that a caller or a file chooses. Both throw Error where memory is short.
template <class T> void resize(std::vector<T>& list, Index count, char const* what, std::string_view where = {}) {
  within_memory(byte_count(count, sizeof(T)), what, [&] { list.resize(static_cast<std::size_t>(count)); }, where);
}
template <class T> void reserve(std::vector<T>& list, Index count, char const* what) {
  within_memory(byte_count(count, sizeof(T)), what, [&] { list.reserve(static_cast<std::size_t>(count)); });
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/core/sequences.hpp
// A batch is a list of sequences. The dense batch is a list of equally long sequences, and kernels know no other form.
#ifndef HYBRIDATTN_CORE_SEQUENCES_HPP
#define HYBRIDATTN_CORE_SEQUENCES_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

// Tokens start .. start + length - 1 of the N tokens of a batch. In decoding they follow `past` tokens in a cache.
// Sequences never influence each other.
struct Sequence {
  Index start = 0, length = 0, past = 0;
};

// Tables of tokens hold int32. The makers throw Error where a number of tokens, sequences or positions does not fit into an int32,
// where a length is below 0, or where memory is short.
class Sequences {
 public:
  // `count` sequences of `length` tokens, one after the other: a tensor [B, T, ...] with B and T as one axis N = B*T.
  static Sequences equal(Index count, Index length) {
    check(count >= 0 && length >= 0, "Sequences: ", count, " sequences of ", length, " tokens; both must be >= 0");
    Sequences result;
    result.make_room(count, size_product(count, length));
    for (Index i = 0; i < count; ++i) result.append(length);
    return result;
  }
  // The offsets, elsewhere called cu_seqlens [number + 1]: sequence i has the tokens offsets[i] .. offsets[i + 1] - 1, and may be empty.
  static Sequences packed(std::span<Index const> offsets) {
    check(!offsets.empty() && offsets.front() == 0, "Sequences: offsets must start with 0");
    for (std::size_t i = 0; i + 1 < offsets.size(); ++i)
      check(offsets[i + 1] >= offsets[i], "Sequences: offsets must not fall, but ", offsets[i + 1], " follows ", offsets[i]);
    Sequences result;
    result.make_room(std::ssize(offsets) - 1, offsets.back());
    for (std::size_t i = 0; i + 1 < offsets.size(); ++i) result.append(offsets[i + 1] - offsets[i]);
    return result;
  }
  // Decoding: lengths[i] new tokens of sequence i, which follow past[i] tokens in a cache.
  static Sequences continuing(std::span<Index const> past, std::span<Index const> lengths) {
    Sequences result;
    result.assign(past, lengths);
    return result;
  }
  // The same as continuing, in the memory of this object.
  void assign(std::span<Index const> past, std::span<Index const> lengths) {
    check(past.size() == lengths.size(), "Sequences: ", past.size(), " numbers of past tokens for ", lengths.size(), " sequences");
    Index tokens = 0;
    for (std::size_t i = 0; i < past.size(); ++i) {
      check(past[i] >= 0 && lengths[i] >= 0, "Sequences: ", lengths[i], " tokens after ", past[i], "; both must be >= 0");
      check(size_sum(past[i], lengths[i]) <= largest_int32, "Sequences: ", lengths[i], " tokens after ", past[i],
            "; a sequence has at most ", largest_int32);
      tokens = size_sum(tokens, lengths[i]);
    }
    list_.clear();
    positions_.clear();
    owners_.clear();
    make_room(std::ssize(past), tokens);
    for (std::size_t i = 0; i < past.size(); ++i) append(lengths[i], past[i]);
  }
  // A copy in which sequences with past tokens have length 0.
  Sequences beginnings() const {
    Sequences result = *this;
    for (Sequence& s : result.list_)
      if (s.past > 0) s.length = 0;
    return result;
  }

  std::size_t size() const { return list_.size(); }
  std::span<Sequence const> list() const { return list_; }
  Sequence operator[](std::size_t i) const { return list_[i]; }
  auto begin() const { return list_.begin(); }
  auto end() const { return list_.end(); }
  Index count() const { return static_cast<Index>(list_.size()); }
  Index tokens() const { return static_cast<Index>(positions_.size()); }
  Index longest() const {
    Index length = 0;
    for (Sequence s : list_) length = std::max(length, s.length);
    return length;
  }
  // Whether a sequence with tokens has past tokens (any_continue), or has none (any_begin).
  bool any_continue() const {
    return std::any_of(list_.begin(), list_.end(), [](Sequence s) { return s.length > 0 && s.past > 0; });
  }
  bool any_begin() const {
    return std::any_of(list_.begin(), list_.end(), [](Sequence s) { return s.length > 0 && s.past == 0; });
  }
  // [N]: each token's position in its sequence, past tokens included, and the number of this sequence.
  View<std::int32_t const, 1> positions() const { return {positions_.data(), {tokens()}}; }
  View<std::int32_t const, 1> owners() const { return {owners_.data(), {tokens()}}; }

 private:
  void make_room(Index sequences, Index tokens) {
    check(sequences <= largest_int32 && tokens <= largest_int32, "Sequences: ", sequences, " sequences of ", tokens,
          " tokens in all; a batch has at most ", largest_int32, " of both");
    reserve(list_, sequences, "a list of sequences");
    reserve(positions_, tokens, "the positions of tokens");
    reserve(owners_, tokens, "the sequences of tokens");
  }
  void append(Index length, Index past = 0) {
    for (Index position = past; position < past + length; ++position) {
      positions_.push_back(static_cast<std::int32_t>(position));
      owners_.push_back(static_cast<std::int32_t>(list_.size()));
    }
    list_.push_back({tokens() - length, length, past});
  }

  std::vector<Sequence> list_;
  std::vector<std::int32_t> positions_, owners_;
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/attention/cpu_rows.hpp
// Attention of one query on the CPU: products with rows that are read in place. The lanes are entries of a head.
#ifndef HYBRIDATTN_ATTENTION_CPU_ROWS_HPP
#define HYBRIDATTN_ATTENTION_CPU_ROWS_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::attention {

// Rows of one head, [T, D].
template <class T> struct Rows {
  T* data;
  Index stride;

  HYBRIDATTN_INLINE T* operator[](Index i) const { return data + i * stride; }
  HYBRIDATTN_INLINE Rows from(Index first) const { return {data + first * stride, stride}; }
  HYBRIDATTN_INLINE operator Rows<T const>() const requires(!std::is_const_v<T>) { return {data, stride}; }
};
template <class T> Rows<T> head_of(View<T, 3> x, Sequence s, Index head) { return {x.row(s.start, head), x.stride[0]}; }
// Rows of one token, [H, D], from a head on.
template <class T> Rows<T> heads_of(View<T, 3> x, Index n, Index head) { return {x.row(n, head), x.stride[1]}; }

// The rows 0 .. count - 1. Other sets of rows have the same members.
struct AllRows {
  Index count;
  HYBRIDATTN_INLINE Index operator[](Index j) const { return j; }
};
// The size of an array with a number for each key, in whole vectors.
template <class T> Index key_room(Index keys) { return round_up(keys, cpu::lanes<T>); }

// V vectors of a row, from entry d on, that are computed together. The last vector of a row may be short: ShortPiece.
template <class T, int V> struct Piece {
  static constexpr int vectors = V;
  Index d;
  HYBRIDATTN_INLINE cpu::Vec<T> get(T const* row, int v) const { return cpu::load(row + d + v * cpu::lanes<T>); }
  HYBRIDATTN_INLINE void put(T* row, int v, cpu::Vec<T> x) const { cpu::store<T>(row + d + v * cpu::lanes<T>, x); }
};
template <class T> struct ShortPiece {
  static constexpr int vectors = 1;
  cpu::Slot<T> slot;
  HYBRIDATTN_INLINE cpu::Vec<T> get(T const* row, int) const { return slot.get(row); }
  HYBRIDATTN_INLINE void put(T* row, int, cpu::Vec<T> x) const { slot.put(row, x); }
};
// Pieces of at most `most` vectors: 1, 2 or 4.
template <class T, int most = 4, class Dim, class F> HYBRIDATTN_INLINE void for_each_piece(Dim D, F f) {
  constexpr int n = cpu::lanes<T>;
  Index d = 0;
  for (; d + most * n <= D; d += most * n) f(Piece<T, most>{d});
  if constexpr (most > 2)
    if (d + 2 * n <= D) {
      f(Piece<T, 2>{d});
      d += 2 * n;
    }
  if constexpr (most > 1)
    if (d + n <= D) {
      f(Piece<T, 1>{d});
      d += n;
    }
  if (d < D) f(ShortPiece<T>{{d, D - d}});
}

// Calls f(R, first) for `count` heads that share keys: R heads from `first` on are computed together, so that a row of their keys or
// values is read once for all of them.
template <class F> HYBRIDATTN_INLINE void for_each_heads(Index count, F f) {
  constexpr int together = cpu::tuning.shared.rows;
  Index h = 0;
  for (; h + together <= count; h += together) f(std::integral_constant<int, together>{}, h);
  for (; h < count; ++h) f(std::integral_constant<int, 1>{}, h);
}

// Whether results are so far below T's largest number that their sums could not overflow in any order. Other results, NaN included,
// are computed again by the reference's loops, so they are infinite or NaN exactly where those loops are.
template <class T> class Range {
 public:
  HYBRIDATTN_INLINE void add(cpu::Vec<T> x) {
    Mask const size = reinterpret_cast<Mask>(x) & std::numeric_limits<Bits>::max();   // ordered as absolute values, NaN above all
    largest_ = size > largest_ ? size : largest_;
  }
  HYBRIDATTN_INLINE static bool holds(T x) { return std::abs(x) <= moderate; }
  HYBRIDATTN_INLINE bool is_moderate() const { return !cpu::any<T>(largest_ > std::bit_cast<Bits>(moderate)); }

 private:
  static constexpr T moderate = std::numeric_limits<T>::max() * T(0x1p-20);
  using Mask = cpu::Mask<T>;
  using Bits = typename cpu::BitsOf<T>::type;
  Mask largest_{};
};
template <class T, class Dim> HYBRIDATTN_INLINE bool is_moderate(Dim D, T const* x) {
  Range<T> range;
  cpu::for_each_vector<T>(0, D, [&](cpu::Slot<T> s) HYBRIDATTN_INLINE_LAMBDA { range.add(s.get(x)); });
  return range.is_moderate();
}

template <class T, class Keys> [[gnu::noinline]] void dot_rows_in_order(Index D, T const* x, Rows<T const> rows, Keys keys, T* products) {
  for (Index j = 0; j < round_up(keys.count, cpu::lanes<T>); ++j) products[j] = dot(x, rows[keys[std::min(j, keys.count - 1)]], D);
}

// Computes rows of products again where a product is not moderate.
template <class T, class Keys>
HYBRIDATTN_INLINE void keep_moderate(Index D, Rows<T const> x, Index count, Rows<T const> rows, Keys keys, Rows<T> products) {
  for (Index r = 0; r < count; ++r) {
    Range<T> range;
    for (Index j = 0; j < keys.count; j += cpu::lanes<T>) range.add(cpu::load(products[r] + j));
    if (!range.is_moderate()) dot_rows_in_order<T>(D, x[r], rows, keys, products[r]);
  }
}

// products[r][j] = x[r] . rows[key j] for R rows x and every key. The last vector of each row of products is padded with the last key's.
template <int R, class T, class Dim, class Keys>
HYBRIDATTN_INLINE void dot_rows(Dim D, Rows<T const> x, Rows<T const> rows, Keys keys, Rows<T> products) {
  constexpr int n = cpu::lanes<T>, K = R == 1 ? n : std::max(n / R, 2);   // keys together
  for (Index j = 0; j < round_up(keys.count, n); j += K) {
    T const* row[std::size_t{K}];
    HYBRIDATTN_UNROLL
    for (int k = 0; k < K; ++k) row[k] = rows[keys[std::min(j + k, keys.count - 1)]];
    cpu::Vec<T> sums[std::size_t{R * K}] = {};
    for_each_piece<T>(D, [&](auto piece) HYBRIDATTN_INLINE_LAMBDA {
      HYBRIDATTN_UNROLL
      for (int v = 0; v < piece.vectors; ++v) {
        cpu::Vec<T> of_x[std::size_t{R}];
        HYBRIDATTN_UNROLL
        for (int r = 0; r < R; ++r) of_x[r] = cpu::in_register<T>(piece.get(x[r], v));
        HYBRIDATTN_UNROLL
        for (int k = 0; k < K; ++k) {
          cpu::Vec<T> const of_key = R == 1 ? piece.get(row[k], v) : cpu::in_register<T>(piece.get(row[k], v));
          HYBRIDATTN_UNROLL
          for (int r = 0; r < R; ++r) sums[r * K + k] += of_x[r] * of_key;
        }
      }
    });
    T sum[std::size_t{R * K}];
    cpu::sum_each<R * K, T>(sums, sum);
    HYBRIDATTN_UNROLL
    for (int r = 0; r < R; ++r) std::memcpy(products[r] + j, sum + r * K, sizeof(T) * std::size_t{K});
  }
  keep_moderate<T>(D, x, R, rows, keys, products);
}
// x . y, summed in the order of dot_rows: where one key has weight 1, d_o . v - delta is then exactly 0.
template <class T, class Dim> HYBRIDATTN_INLINE T dot_row(Dim D, T const* x, T const* y) {
  cpu::Vec<T> sum{};
  for_each_piece<T>(D, [&](auto piece) HYBRIDATTN_INLINE_LAMBDA {
    HYBRIDATTN_UNROLL
    for (int v = 0; v < piece.vectors; ++v) sum += piece.get(x, v) * piece.get(y, v);
  });
  T result;
  cpu::sum_each<1, T>(&sum, &result);
  return Range<T>::holds(result) ? result : scaled_dot(T(1), x, y, D);
}

// One row of attention, computed by the reference's loops. Returns its lse. key_at(j) has the rows k and v of key j.
template <class T, class KeyAt> [[gnu::noinline]] T attend_in_order(Index D, T scale, T const* q, Index count, KeyAt key_at, T* o) {
  constexpr T infinity = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
  T largest = -infinity, sum = 0;
  for (Index j = 0; j < count; ++j) {
    T const score = scaled_dot(scale, q, key_at(j).k, D);
    if (!(score < infinity)) {   // all results would be NaN
      std::fill_n(o, D, nan);
      return nan;
    }
    largest = std::max(largest, score);
  }
  std::fill_n(o, D, T(0));
  for (Index j = 0; j < count; ++j) {
    T const p = std::exp(scaled_dot(scale, q, key_at(j).k, D) - largest);
    sum += p;
    axpy(p, key_at(j).v, o, D);
  }
  for (Index d = 0; d < D; ++d) o[d] /= sum;
  return largest + std::log(sum);
}
template <class T> struct KeyRows {
  T const *k, *v;
};

// p = exp(scale p - reference), where the reference is the largest of scale p. Also writes the elements after the last of `count`
// numbers, up to a whole vector. Products are compared before they are scaled, so the largest product less itself is exactly 0.
template <class T> HYBRIDATTN_INLINE OnlineSoftmax<T> exponentials(T scale, Index count, T* p) {
  using cpu::lanes;
  constexpr T infinity = std::numeric_limits<T>::infinity();
  T const sign = scale < 0 ? T(-1) : T(1), size = std::abs(scale), slope = size * cpu::log2_e<T>;
  std::fill(p + count, p + round_up(count, lanes<T>), -sign * infinity);   // whose exponential is 0
  cpu::Vec<T> most = cpu::broadcast<T>(-infinity), sum{};
  for (Index j = 0; j < count; j += lanes<T>) most = cpu::max<T>(most, sign * cpu::load(p + j));
  T const largest = cpu::largest<T>(most);
  for (Index j = 0; j < count; j += lanes<T>) {
    cpu::Vec<T> const e = cpu::exp2_below_most<T>((sign * cpu::load(p + j) - largest) * slope);
    sum += e;
    cpu::store<T>(p + j, e);
  }
  return {cpu::in_register<T>(size * cpu::broadcast<T>(largest))[0], cpu::sum<T>(sum)};   // a rounded score
}

// total[r][v] = sum_j p[r][j] rows[key j] for R heads and a piece of the rows, in several sums where one would keep the CPU waiting.
template <int R, class T, class Piece, class Keys>
HYBRIDATTN_INLINE void sum_piece(Piece piece, Rows<T const> p, Rows<T const> rows, Keys keys, cpu::Vec<T>* total) {
  constexpr int V = Piece::vectors, chains = std::clamp(8 / (R * V), 1, 4);
  cpu::Vec<T> sum[std::size_t{chains}][std::size_t{R}][std::size_t{V}] = {};
  auto const add = [&](Index j, int chain) HYBRIDATTN_INLINE_LAMBDA {
    T const* const row = rows[keys[j]];
    HYBRIDATTN_UNROLL
    for (int v = 0; v < V; ++v) {
      cpu::Vec<T> const of_key = R == 1 ? piece.get(row, v) : cpu::in_register<T>(piece.get(row, v));
      HYBRIDATTN_UNROLL
      for (int r = 0; r < R; ++r) sum[chain][r][v] += p[r][j] * of_key;
    }
  };
  Index j = 0;
  for (; j + chains <= keys.count; j += chains) {
    HYBRIDATTN_UNROLL
    for (int chain = 0; chain < chains; ++chain) add(j + chain, chain);
  }
  for (; j < keys.count; ++j) add(j, 0);
  HYBRIDATTN_UNROLL
  for (int i = 0; i < R * V; ++i) {
    total[i] = sum[0][i / V][i % V];
    HYBRIDATTN_UNROLL
    for (int chain = 1; chain < chains; ++chain) total[i] += sum[chain][i / V][i % V];
  }
}
// Calls store(piece, r, v, sum_j p[r][j] rows[key j]) for R heads and every vector of a row.
template <int R, class T, class Dim, class Keys, class Store>
HYBRIDATTN_INLINE void for_each_sum(Dim D, Rows<T const> p, Rows<T const> rows, Keys keys, Store store) {
  for_each_piece<T, (R == 1 ? 4 : cpu::tuning.shared.vectors)>(D, [&](auto piece) HYBRIDATTN_INLINE_LAMBDA {
    constexpr int V = piece.vectors;
    cpu::Vec<T> total[std::size_t{R * V}];
    sum_piece<R, T>(piece, p, rows, keys, total);
    HYBRIDATTN_UNROLL
    for (int i = 0; i < R * V; ++i) store(piece, i / V, i % V, total[i]);
  });
}
// o[r] = sum_j p[r][j] rows[key j]
template <int R, class T, class Dim, class Keys>
HYBRIDATTN_INLINE void weighted_rows(Dim D, Rows<T const> p, Rows<T const> rows, Keys keys, Rows<T> o) {
  for_each_sum<R, T>(D, p, rows, keys,
                     [&](auto piece, int r, int v, cpu::Vec<T> sum) HYBRIDATTN_INLINE_LAMBDA { piece.put(o[r], v, sum); });
}
// o[r] += sum_j p[r][j] rows[key j]
template <int R, class T, class Dim, class Keys>
HYBRIDATTN_INLINE void add_weighted_rows(Dim D, Rows<T const> p, Rows<T const> rows, Keys keys, Rows<T> o) {
  for_each_sum<R, T>(D, p, rows, keys, [&](auto piece, int r, int v, cpu::Vec<T> sum) HYBRIDATTN_INLINE_LAMBDA {
    piece.put(o[r], v, piece.get(o[r], v) + sum);
  });
}

// rows[key j + i] += sum_h weights[h][j + i] x[h] for `count` heads and K keys.
template <int K, class T, class Dim, class Keys>
HYBRIDATTN_INLINE void add_to_keys(Dim D, Rows<T const> weights, Rows<T const> x, Index count, Keys keys, Index j, Rows<T> rows) {
  for_each_piece<T, cpu::tuning.shared.vectors>(D, [&](auto piece) HYBRIDATTN_INLINE_LAMBDA {
    constexpr int V = piece.vectors;
    cpu::Vec<T> sum[std::size_t{K}][std::size_t{V}];
    HYBRIDATTN_UNROLL
    for (int i = 0; i < K * V; ++i) sum[i / V][i % V] = piece.get(rows[keys[j + i / V]], i % V);
    for (Index h = 0; h < count; ++h) {
      T const *const row = x[h], *const weight = weights[h] + j;
      HYBRIDATTN_UNROLL
      for (int v = 0; v < V; ++v) {
        cpu::Vec<T> const of_x = cpu::in_register<T>(piece.get(row, v));
        HYBRIDATTN_UNROLL
        for (int i = 0; i < K; ++i) sum[i][v] += weight[i] * of_x;
      }
    }
    HYBRIDATTN_UNROLL
    for (int i = 0; i < K * V; ++i) piece.put(rows[keys[j + i / V]], i % V, sum[i / V][i % V]);
  });
}
// rows[key j] += sum_h weights[h][j] x[h] for `count` heads and every key: each row is read and written once. No key comes twice.
template <class T, class Dim, class Keys>
HYBRIDATTN_INLINE void add_to_rows(Dim D, Rows<T const> weights, Rows<T const> x, Index count, Keys keys, Rows<T> rows) {
  constexpr int K = cpu::tuning.shared.rows;
  Index j = 0;
  for (; j + K <= keys.count; j += K) add_to_keys<K, T>(D, weights, x, count, keys, j, rows);
  for (; j < keys.count; ++j) add_to_keys<1, T>(D, weights, x, count, keys, j, rows);
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::attention
#endif

// ==== hybridattn/attention/dsa/cpu_rows.hpp
// Rows of chosen keys.
#ifndef HYBRIDATTN_ATTENTION_DSA_CPU_ROWS_HPP
#define HYBRIDATTN_ATTENTION_DSA_CPU_ROWS_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::dsa {

using attention::dot_row, attention::dot_rows, attention::head_of, attention::heads_of, attention::key_room, attention::Rows,
    attention::weighted_rows;

// The keys of one query, relative to the start of its sequence.
struct Keys {
  std::int32_t const* indices;
  Index count;

  HYBRIDATTN_INLINE Index operator[](Index j) const { return indices[j]; }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::dsa
#endif

// ==== hybridattn/backend/cpu/tile.hpp
// The register tile: the one loop in which the library multiplies matrices on the CPU.
#ifndef HYBRIDATTN_BACKEND_CPU_TILE_HPP
#define HYBRIDATTN_BACKEND_CPU_TILE_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::cpu {

// A matrix read one element at a time: element (r, k) is data[r * row + k * depth]. Exchanged strides transpose the matrix
// without a copy.
template <class T> struct Scalars {
  T const* data;
  Index row, depth;
};
// A matrix read by vectors: row k of the columns starts at data + k * depth.
template <class T> struct Columns {
  T const* data;
  Index depth;
};

// For MR rows and NV vectors of columns: epilogue(r, v, start(r, v) + sum_k a(r, k) b(k, v)), k from 0 to depth - 1 in
// order. The bits of a row's result depend only on that row of a and on b: every caller pads to whole tiles and uses no
// smaller tile.
template <int MR, int NV, class T, class Start, class Epilogue>
HYBRIDATTN_INLINE void tile(Index depth, Scalars<T> a, Columns<T> b, Start start, Epilogue epilogue) {
  Vec<T> sum[std::size_t{MR}][std::size_t{NV}];
  HYBRIDATTN_UNROLL
  for (int r = 0; r < MR; ++r) {
    HYBRIDATTN_UNROLL
    for (int v = 0; v < NV; ++v) sum[r][v] = start(r, v);
  }
  for (Index k = 0; k < depth; ++k) {
    Vec<T> column[std::size_t{NV}];
    HYBRIDATTN_UNROLL
    for (int v = 0; v < NV; ++v) column[v] = in_register<T>(load(b.data + k * b.depth + v * lanes<T>));
    HYBRIDATTN_UNROLL
    for (int r = 0; r < MR; ++r) {
      T const x = a.data[r * a.row + k * a.depth];
      HYBRIDATTN_UNROLL
      for (int v = 0; v < NV; ++v) sum[r][v] += x * column[v];
    }
  }
  HYBRIDATTN_UNROLL
  for (int r = 0; r < MR; ++r) {
    HYBRIDATTN_UNROLL
    for (int v = 0; v < NV; ++v) epilogue(r, v, sum[r][v]);
  }
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::cpu
#endif

// ==== hybridattn/attention/dsa/cpu_panels.hpp
// Products of many heads with the keys that they share. The lanes of a tile are keys, so no sum goes across lanes. For this the chosen rows
// are transposed, which is worth while from some number of heads on.
#ifndef HYBRIDATTN_ATTENTION_DSA_CPU_PANELS_HPP
#define HYBRIDATTN_ATTENTION_DSA_CPU_PANELS_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::dsa {

inline constexpr int head_rows = cpu::tuning.attention.rows, key_vectors = cpu::tuning.attention.vectors;
template <class T> inline constexpr Index tile_keys = key_vectors * cpu::lanes<T>;

// Whether this number of heads goes by tiles.
constexpr bool go_by_tiles(Index heads) { return heads >= 8 && heads % head_rows == 0; }
// The size of a panel.
template <class T> Index panel_room(Index D) { return round_up(D, cpu::lanes<T>) * tile_keys<T>; }

// panel [D, tile_keys] = the rows of keys j .. j + tile_keys - 1, transposed. The last key stands in for those after it.
template <class T, class Dim, class Keys> HYBRIDATTN_INLINE void gather_panel(Dim D, Rows<T const> rows, Keys keys, Index j, T* panel) {
  constexpr int n = cpu::lanes<T>;
  for (int v = 0; v < key_vectors; ++v) {
    T const* row[std::size_t{n}];
    for (int i = 0; i < n; ++i) row[i] = rows[keys[std::min(j + v * n + i, keys.count - 1)]];
    cpu::for_each_vector<T>(0, D, [&](cpu::Slot<T> slot) HYBRIDATTN_INLINE_LAMBDA {
      cpu::Vec<T> square[std::size_t{n}];
      HYBRIDATTN_UNROLL
      for (int i = 0; i < n; ++i) square[i] = slot.get(row[i]);
      cpu::transpose<T>(square);
      HYBRIDATTN_UNROLL
      for (int i = 0; i < n; ++i) cpu::store(panel + (slot.i + i) * tile_keys<T> + v * n, square[i]);
    });
  }
}

// products[h][j] = x[h] . rows[key j] for all heads and keys. panel is scratch.
template <class T, class Dim>
void dot_rows_by_tiles(Dim D, Rows<T const> x, Index heads, Rows<T const> rows, Keys keys, T* panel, Rows<T> products) {
  for (Index j = 0; j < keys.count; j += tile_keys<T>) {
    gather_panel<T>(D, rows, keys, j, panel);
    for (Index h = 0; h < heads; h += head_rows)
      cpu::tile<head_rows, key_vectors, T>(
          D, {x[h], x.stride, 1}, {panel, tile_keys<T>}, [](int, int) HYBRIDATTN_INLINE_LAMBDA { return cpu::Vec<T>{}; },
          [&](int r, int v, cpu::Vec<T> sum) HYBRIDATTN_INLINE_LAMBDA { cpu::store(products[h + r] + j + v * cpu::lanes<T>, sum); });
  }
  attention::keep_moderate<T>(D, x, heads, rows, keys, products);
}

// deltas[h] = d_o[h] . o[h] for all heads, summed in the order of a tile: where one key has weight 1, d_o . v - delta is then exactly 0.
// Writes numbers for whole tiles of heads. panels is scratch for two panels.
template <class T, class Dim>
void deltas_by_tiles(Dim D, Rows<T const> o, Rows<T const> d_o, Index heads, T* panels, T* deltas) {
  T* const other = panels + panel_room<T>(D);
  for (Index h = 0; h < heads; h += tile_keys<T>) {
    gather_panel<T>(D, o, attention::AllRows{heads}, h, panels);
    gather_panel<T>(D, d_o, attention::AllRows{heads}, h, other);
    for (Index i = 0; i < tile_keys<T>; i += cpu::lanes<T>) {
      cpu::Vec<T> sum{};
      for (Index d = 0; d < D; ++d) sum += cpu::load(panels + d * tile_keys<T> + i) * cpu::load(other + d * tile_keys<T> + i);
      cpu::store(deltas + h + i, sum);
    }
  }
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::dsa
#endif

// ==== hybridattn/core/allowed.hpp
// Checks of a configuration's numbers. Each check throws an Error that names the number, its value and the allowed values.
// "A number" means one that fits into a float: configurations are doubles, and models compute in their own scalar.
#ifndef HYBRIDATTN_CORE_ALLOWED_HPP
#define HYBRIDATTN_CORE_ALLOWED_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

namespace detail {
template <class Value> void check_allowed(bool holds, std::string_view owner, std::string_view name, Value value, auto const&... rule) {
  check(holds, owner, ": ", name, " ", value, " is not allowed; it must be ", rule...);
}
inline bool is_float(double value) { return std::abs(value) <= static_cast<double>(std::numeric_limits<float>::max()); }
}  // namespace detail

inline void check_number(std::string_view owner, std::string_view name, double value) {
  detail::check_allowed(detail::is_float(value), owner, name, value, "a number");
}
inline void check_not_negative(std::string_view owner, std::string_view name, double value) {
  detail::check_allowed(detail::is_float(value) && value >= 0, owner, name, value, "a number >= 0");
}
// At least the smallest normal float, because a smaller number may be 0 in the model's scalar.
inline void check_positive(std::string_view owner, std::string_view name, double value) {
  constexpr double least = static_cast<double>(std::numeric_limits<float>::min());
  detail::check_allowed(detail::is_float(value) && value >= least, owner, name, value, "a number > 0, ", least, " at least");
}
inline void check_share(std::string_view owner, std::string_view name, double value) {
  detail::check_allowed(value >= 0 && value <= 1, owner, name, value, "in [0, 1]");
}
// In [0, 1).
inline void check_below_one(std::string_view owner, std::string_view name, double value) {
  detail::check_allowed(value >= 0 && value < 1, owner, name, value, "in [0, 1)");
}
inline void check_at_least(std::string_view owner, std::string_view name, Index value, Index least, std::string_view meaning = {}) {
  detail::check_allowed(value >= least, owner, name, value, "at least ", least, meaning);
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/core/random.hpp
// Random numbers that depend only on a seed, a name and a counter, so that a tensor's values do not depend on earlier draws.
#ifndef HYBRIDATTN_CORE_RANDOM_HPP
#define HYBRIDATTN_CORE_RANDOM_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

struct Seed {
  std::uint64_t value = 0;
};

// SplitMix64's finaliser: every bit of the input reaches every bit of the result.
HYBRIDATTN_HD constexpr std::uint64_t mix(std::uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// Numbers 0, 1, 2, ... of the stream (seed, name). Two names are two independent streams.
class Random {
 public:
  explicit Random(Seed seed, std::string_view name = {}) : key_(mix(seed.value + 0x9e3779b97f4a7c15u)) {
    for (char letter : name) key_ = mix(key_ ^ static_cast<unsigned char>(letter)) + 0x9e3779b97f4a7c15u;
  }
  std::uint64_t bits() { return mix(key_ + 0x9e3779b97f4a7c15u * ++counter_); }
  // In [0, 1).
  double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }
  double uniform(double low, double high) { return low + (high - low) * uniform(); }
  // In 0 .. count - 1; the bias of the remainder is below count * 2^-64.
  Index below(Index count) { return static_cast<Index>(bits() % static_cast<std::uint64_t>(count)); }
  // Mean 0, variance 1 (Box-Muller).
  double normal() {
    double const radius = std::sqrt(-2.0 * std::log(1.0 - uniform()));
    return radius * std::cos(2.0 * std::numbers::pi * uniform());
  }

  // The count of numbers drawn. Seed, name and this count are the whole state of a stream. After jump_to(drawn) the next number is
  // number `drawn`.
  std::uint64_t drawn() const { return counter_; }
  void jump_to(std::uint64_t drawn) { counter_ = drawn; }

 private:
  std::uint64_t key_, counter_ = 0;
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/tensor/initial.hpp
// The initial values of a parameter.
#ifndef HYBRIDATTN_TENSOR_INITIAL_HPP
#define HYBRIDATTN_TENSOR_INITIAL_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

// A distribution with two numbers.
struct Initial {
  enum class Kind {
    constant,             // a
    normal,               // mean 0, standard deviation a
    uniform,              // in [a, b)
    log_uniform_value,    // log x with x uniform in [a, b): GDN's A_log
    inverse_softplus_of_log_uniform,  // y with softplus(y) = x, log x uniform, x in [a, b): GDN's dt_bias as fla draws it
  };
  Kind kind = Kind::constant;
  double a = 0, b = 0;

  static constexpr Initial constant(double value) { return {Kind::constant, value, 0}; }
  static constexpr Initial normal(double deviation) { return {Kind::normal, deviation, 0}; }
  static constexpr Initial uniform(double low, double high) { return {Kind::uniform, low, high}; }

  double draw(Random& random) const {
    switch (kind) {
      case Kind::constant:
        return a;
      case Kind::normal:
        return a * random.normal();
      case Kind::uniform:
        return random.uniform(a, b);
      case Kind::log_uniform_value:
        return std::log(random.uniform(a, b));
      case Kind::inverse_softplus_of_log_uniform: {
        double const x = std::exp(random.uniform(std::log(a), std::log(b)));
        return x + std::log(-std::expm1(-x));
      }
    }
    return 0;
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/backend/gpu/grid.hpp
// The blocks of a launch.
#ifndef HYBRIDATTN_BACKEND_GPU_GRID_HPP
#define HYBRIDATTN_BACKEND_GPU_GRID_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

// How many blocks of threads a kernel runs on each axis, or the number of one of these blocks.
struct Grid {
  Index x = 1, y = 1, z = 1;
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/backend/pool.hpp
// A pool of freed memory blocks, for later requests.
#ifndef HYBRIDATTN_BACKEND_POOL_HPP
#define HYBRIDATTN_BACKEND_POOL_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

// Blocks come in eight sizes for each doubling (below 512 bytes in steps of 64), so at most an eighth of a large one is unused.
struct BlockSize {
  static constexpr std::size_t largest = std::size_t{1} << 62, classes = 8 * 54;

  std::size_t bytes, number;

  explicit constexpr BlockSize(std::size_t wanted) {
    std::size_t const least = std::max<std::size_t>(wanted, 1);
    std::size_t const octave = std::max<std::size_t>(std::bit_width(least - 1), 9) - 1;   // 2^octave < least <= 2^(octave + 1), or 8
    std::size_t const step = octave == 8 ? 64 : (std::size_t{1} << octave) / 8, steps = (least + step - 1) / step;
    bytes = steps * step;
    number = steps - 1 + 8 * (std::max<std::size_t>(octave, 9) - 9);
  }
};

// A block of several tensors. The last tensor that ends frees it.
struct SharedBlock {
  void* data = nullptr;
  std::size_t bytes = 0;
  Index tensors = 0;
};

// A freed block waits for the next request of its size, so a training step after the first one allocates no memory.
//
// The pool returns waiting blocks to the system before an allocation fails, and in trim(). When it holds more than 1.5 times the
// largest recent in_use(), it also returns waiting blocks without recent use.
//
// "Recent" means the last hundred takes that no waiting block could serve, in four periods of 25. Equal steps have no such takes
// after the first one, so none of their blocks counts as unused, for any number of takes in a step. Where waiting blocks serve all
// takes, a period ends when it has three times as many takes as there were up to the last allocation, at least 25 and at most a
// million: no block of a step waits longer.
class Pool {
 public:
  // Returns a block. allocate(bytes) makes one, or returns nullptr where memory is short; release(block, bytes) returns it to the system.
  // Where memory is short after all waiting blocks were released too, throws Error with the bytes asked for, in use, held and allowed.
  template <class Allocate, class Release> void* take(std::size_t bytes, Allocate allocate, Release release, std::size_t limit) {
    check(bytes <= BlockSize::largest, "out of memory: ", bytes, " bytes are more than a block can have");
    BlockSize const size{bytes};
    Blocks& blocks = blocks_[size.number];
    if (++takes_ - takes_before_ >= std::clamp<std::size_t>(3 * last_allocation_, period_takes, 1'000'000)) next_period(release);
    void* block = nullptr;
    if (blocks.waiting.empty()) {
      block = allocate_block(bytes, size, allocate, release, limit);
    } else {
      block = blocks.waiting.back().block;
      blocks.waiting.pop_back();
    }
    in_use_ += bytes;
    used_ += size.bytes;
    peak_ = std::max(peak_, in_use_);
    peaks_[period_ % peaks_.size()] = std::max(peaks_[period_ % peaks_.size()], used_);
    return block;
  }
  void give(void* block, std::size_t bytes) noexcept {
    BlockSize const size{bytes};
    in_use_ -= bytes;
    used_ -= size.bytes;
    blocks_[size.number].waiting.push_back({block, period_});   // there is room for every block of this size
  }
  // Takes a record for a block that tensors share; end_sharing frees it. Records are used again, like blocks.
  SharedBlock* begin_sharing() {
    if (free_records_.empty()) {
      reserve(free_records_, static_cast<Index>(records_.size()) + 1, "a list of blocks");   // so that end_sharing never allocates
      free_records_.push_back(&records_.emplace_back());
    }
    SharedBlock* const record = free_records_.back();
    free_records_.pop_back();
    return record;
  }
  void end_sharing(SharedBlock* record) noexcept { free_records_.push_back(record); }
  // Returns all waiting blocks to the system.
  template <class Release> void trim(Release release) { release_until(0, period_ + 1, release); }
  std::size_t in_use() const { return in_use_; }   // bytes asked for, before rounding up to a block's size
  std::size_t peak() const { return peak_; }       // the largest in_use()
  std::size_t held() const { return held_; }       // bytes of all blocks, in use and waiting
  std::size_t allocations() const { return allocations_; }
  // Sets peak() to in_use().
  void reset_peak() { peak_ = in_use_; }

 private:
  struct Waiting {
    void* block;
    std::size_t period;   // in which it was freed
  };
  struct Blocks {
    std::vector<Waiting> waiting;   // in the order in which they were freed
    std::size_t bytes = 0, count = 0;   // bytes of one block; number of blocks, in use or waiting
  };
  static constexpr std::size_t period_takes = 25, periods = 4;

  template <class Allocate, class Release>
  void* allocate_block(std::size_t bytes, BlockSize size, Allocate allocate, Release release, std::size_t limit) {
    last_allocation_ = takes_;
    if (allocations_ - allocations_before_ >= period_takes) next_period(release);
    else release_unused(size.bytes, release);
    Blocks& blocks = blocks_[size.number];
    if (blocks.waiting.capacity() == blocks.count)   // so that give never allocates
      reserve(blocks.waiting, static_cast<Index>(2 * blocks.count + 1), "a list of blocks");
    void* block = allocate(size.bytes);
    if (block == nullptr) {
      trim(release);
      block = allocate(size.bytes);
    }
    check(block != nullptr, "out of memory: ", bytes, " bytes did not fit beside ", in_use_, " bytes in use, ", held_,
          " held; the limit is ", limit);
    blocks.bytes = size.bytes;
    ++blocks.count;
    ++allocations_;
    held_ += size.bytes;
    return block;
  }
  template <class Release> void next_period(Release release) {
    takes_before_ = takes_;
    allocations_before_ = allocations_;
    peaks_[++period_ % peaks_.size()] = used_;
    release_unused(0, release);
  }
  // Releases waiting blocks without recent use, to make room for `more` bytes.
  template <class Release> void release_unused(std::size_t more, Release release) {
    std::size_t const most = std::max(*std::ranges::max_element(peaks_), used_ + more);
    if (held_ + more > most + most / 2) release_until(most + most / 2 - more, period_ - periods, release);
  }
  // Releases blocks that were freed before a period, the largest blocks first, until no more than `enough` bytes are held.
  template <class Release> void release_until(std::size_t enough, std::size_t period, Release release) {
    for (auto blocks = blocks_.rbegin(); blocks != blocks_.rend() && held_ > enough; ++blocks) {
      auto const first = blocks->waiting.begin();
      auto last = first;
      for (; last != blocks->waiting.end() && last->period < period && held_ > enough; ++last) {
        release(last->block, blocks->bytes);
        held_ -= blocks->bytes;
        --blocks->count;
      }
      blocks->waiting.erase(first, last);
    }
  }

  std::array<Blocks, BlockSize::classes> blocks_;
  std::list<SharedBlock> records_;
  std::vector<SharedBlock*> free_records_;
  std::array<std::size_t, periods + 1> peaks_ = {};   // the most bytes in use in this period and in each of the last ones
  std::size_t period_ = periods, takes_before_ = 0, allocations_before_ = 0;
  std::size_t in_use_ = 0, peak_ = 0, used_ = 0, held_ = 0, allocations_ = 0, takes_ = 0, last_allocation_ = 0;
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/backend/backend.hpp
// Machines: where memory lives, and how an operation is computed there.
#ifndef HYBRIDATTN_BACKEND_BACKEND_HPP
#define HYBRIDATTN_BACKEND_BACKEND_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

template <class Op, class B> struct On;

// Whether an operation overwrites its result's old contents, or adds to them: several results may be added in one tensor.
enum class Into { overwrite, add };

// A machine with memory and copies, for the layers above. take(bytes) returns a block and throws Error where memory is short.
// give(block, bytes) frees a block and never throws. trim() returns the pool's free blocks to the system. fill sets every byte. copy
// copies on the machine.
//
// A backend has one stream of work: operations, copies, takes and gives run in the order of the calls. So a freed block may serve the
// next request although earlier work still uses it. upload may return before the copy is made, but the host may change its bytes at
// once. download and synchronise wait until all earlier work is done.
//
// owns(memory) says whether operations of this backend accept this memory.
template <class B>
concept Backend = requires(B b, void* to, void const* from, std::size_t bytes) {
  { b.take(bytes) } -> std::same_as<void*>;
  { b.give(to, bytes) } noexcept;
  b.trim();
  b.upload(to, from, bytes);
  b.download(to, from, bytes);
  b.copy(to, from, bytes);
  b.fill(to, std::byte{}, bytes);
  b.synchronise();
  { b.owns(from) } -> std::same_as<bool>;
  { b.pool() } -> std::same_as<Pool&>;
};

namespace detail {
struct AnyKernel {
  struct Params {};
};
}  // namespace detail
// A backend that runs kernels (backend/gpu/gpu.hpp): start<Kernel>(grid, params) runs one after all earlier work, and need not wait.
template <class B>
concept GpuBackend = Backend<B> && requires(B gpu, Grid grid, detail::AnyKernel::Params params) {
  gpu.template start<detail::AnyKernel>(grid, params);
};

// A backend that wraps another one names it (`using Inner = Cpu;`). It has run(f), which calls f(inner), and arrives(argument), which
// is called with each argument of an operation before the operation runs.
template <class B>
concept Wrapper = requires { typename B::Inner; };

namespace detail {

// The operations of the inner backend.
template <class Op, class B> struct OnInner {};
template <class Op, Wrapper B> struct OnInner<Op, B> {
  template <class Inner = typename B::Inner, class... Args>
  static auto forward(B& backend, Args&&... args) -> decltype(On<Op, Inner>::forward(std::declval<Inner&>(), args...)) {
    (backend.arrives(args), ...);
    return backend.run([&](Inner& inner) { return On<Op, Inner>::forward(inner, args...); });
  }
  template <class Inner = typename B::Inner, class... Args>
  static auto backward(B& backend, Args&&... args) -> decltype(On<Op, Inner>::backward(std::declval<Inner&>(), args...)) {
    (backend.arrives(args), ...);
    return backend.run([&](Inner& inner) { return On<Op, Inner>::backward(inner, args...); });
  }
  template <class Inner = typename B::Inner, class... Args>
  static auto extend(B& backend, Args&&... args) -> decltype(On<Op, Inner>::extend(std::declval<Inner&>(), args...)) {
    (backend.arrives(args), ...);
    return backend.run([&](Inner& inner) { return On<Op, Inner>::extend(inner, args...); });
  }
};

}  // namespace detail

// How one machine computes one operation: `forward` and `backward`, always both, always in this argument order:
//   On<Op, B>::forward (backend, config, sequences, inputs, outputs, saved)
//   On<Op, B>::backward(backend, config, sequences, inputs, outputs, saved, d_outputs, d_inputs)
// An operation leaves out arguments that it does not need. A policy that decodes also has `extend`, see attention/policy.hpp.
// Without a specialisation On<Op, B> has no members, unless B wraps a backend with one.
template <class Op, class B> struct On : detail::OnInner<Op, B> {};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/tensor/tensor.hpp
// Tensors: elements with an owner.
#ifndef HYBRIDATTN_TENSOR_TENSOR_HPP
#define HYBRIDATTN_TENSOR_TENSOR_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

namespace detail {
// Takes a block for several tensors. The caller counts as its first tensor, until it calls leave.
template <class B> SharedBlock* take_shared(B& backend, std::size_t bytes) {
  SharedBlock* const block = backend.pool().begin_sharing();
  try {
    *block = {backend.take(bytes), bytes, 1};
  } catch (...) {
    backend.pool().end_sharing(block);
    throw;
  }
  return block;
}
// Removes a tensor from its block. The last tensor frees the block.
template <class B> void leave(B& backend, SharedBlock* block) noexcept {
  if (--block->tensors > 0) return;
  backend.give(block->data, block->bytes);
  backend.pool().end_sharing(block);
}
}  // namespace detail

// A tensor in a backend's memory. It can be moved, but not copied. Its destructor returns the memory to the backend's pool. Elements
// are not initialised. A tensor with an extent of 0 has no memory and gives empty views: an option is off.
// The constructor throws Error where the number of elements is too large, or where memory is short.
template <class T, int Rank, class B> class Tensor {
 public:
  Tensor() = default;
  Tensor(B& backend, Shape<Rank> shape) : status_(Status::held) {
    std::size_t const bytes = hybridattn::byte_count(shape.count(), sizeof(T));
    view_ = {nullptr, shape};
    if (bytes == 0) return;
    view_.data = static_cast<T*>(backend.take(bytes));
    backend_ = &backend;
  }
  // A tensor in a block that several tensors share, `offset` bytes after the block's start.
  Tensor(B& backend, Shape<Rank> shape, SharedBlock& block, std::size_t offset) : status_(Status::held) {
    view_ = {nullptr, shape};
    if (shape.count() == 0) return;
    view_.data = reinterpret_cast<T*>(static_cast<char*>(block.data) + offset);
    backend_ = &backend;
    shared_ = &block;
    ++block.tensors;
  }
  Tensor(Tensor&& other) noexcept
      : backend_(std::exchange(other.backend_, nullptr)), shared_(std::exchange(other.shared_, nullptr)),
        status_(std::exchange(other.status_, other.status_ == Status::held ? Status::moved : other.status_)),
        view_(std::exchange(other.view_, {})) {}
  Tensor& operator=(Tensor&& other) noexcept {
    if (this == &other) return *this;
    release();
    backend_ = std::exchange(other.backend_, nullptr);
    shared_ = std::exchange(other.shared_, nullptr);
    status_ = std::exchange(other.status_, other.status_ == Status::held ? Status::moved : other.status_);
    view_ = std::exchange(other.view_, {});
    return *this;
  }
  ~Tensor() { release(); }

  Shape<Rank> shape() const { return view_.shape; }
  std::size_t byte_count() const { return static_cast<std::size_t>(view_.count()) * sizeof(T); }
  explicit operator bool() const { return view_.data != nullptr; }

  // The block that this tensor shares with others, or nullptr.
  SharedBlock const* shared() const { return shared_; }

  // Views for reading and for writing, used by `in` and `out`. Throw Error after the tensor was moved away.
  View<T const, Rank> readable() const { return used(); }
  View<T, Rank> writable() { return used(); }

 private:
  enum class Status : char { empty, held, moved };
  void release() noexcept {
    if (shared_ != nullptr) detail::leave(*backend_, shared_);
    else if (backend_ != nullptr) backend_->give(view_.data, byte_count());
    backend_ = nullptr;
    shared_ = nullptr;
    view_ = {};
  }
  View<T, Rank> const& used() const {
    check(status_ != Status::moved,
          "a tensor is used after it was moved away; backward consumes Saved, so every backward needs a forward of its own");
    return view_;
  }

  B* backend_ = nullptr;
  SharedBlock* shared_ = nullptr;   // nullptr: the tensor has a block of its own
  Status status_ = Status::empty;
  View<T, Rank> view_;
};

template <class T, int Rank, class B> View<T const, Rank> in(Tensor<T, Rank, B> const& tensor) { return tensor.readable(); }
template <class T, int Rank, class B> View<T, Rank> out(Tensor<T, Rank, B>& tensor) { return tensor.writable(); }

template <class B, class T, int Rank> std::vector<T> download(B& backend, Tensor<T, Rank, B> const& tensor) {
  std::vector<T> host;
  resize(host, in(tensor).count(), "a copy of a tensor");
  if (!host.empty()) backend.download(host.data(), in(tensor).data, tensor.byte_count());
  return host;
}
template <class B, class T, int Rank> void upload(B& backend, std::span<T const> host, Tensor<T, Rank, B>& tensor) {
  check(host.size_bytes() == tensor.byte_count(), "upload: ", host.size(), " elements for a tensor of ", tensor.shape().count());
  if (!host.empty()) backend.upload(out(tensor).data, host.data(), tensor.byte_count());
}
template <class B, class T, int Rank> void upload(B& backend, std::vector<T> const& host, Tensor<T, Rank, B>& tensor) {
  upload(backend, std::span<T const>(host), tensor);
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/tensor/roles.hpp
// Roles: a group of tensors is declared once and used as shapes, as memory, and as what a kernel reads or writes.
//
//   template <class S> struct Inputs {
//     Held<S, 3> q, k, v;                       // [N, H, D]
//     Wide<S, 2> g;                             // [N, H], never narrower than float
//     HYBRIDATTN_FIELDS(q, k, v, g)
//   };
//
//   Inputs<Shapes>              the shape of each tensor
//   Inputs<Owned<float, Cpu>>   memory; tensors can be moved, but not copied
//   Inputs<In<float>>           views that an operation reads
//   Inputs<Out<float>>          views that an operation writes; backward writes d_q, d_k, d_v, d_g there
//
// The gradients of a group are a group of the same type.
#ifndef HYBRIDATTN_TENSOR_ROLES_HPP
#define HYBRIDATTN_TENSOR_ROLES_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

// A field that a role leaves out. It accepts any initializer, has no data, and loops over fields skip it.
struct Absent {
  Absent() = default;
  template <class... Anything> constexpr Absent(Anything const&...) {}
};

struct Shapes {
  template <int Rank> using Held = Shape<Rank>;
  template <int Rank> using Wide = Shape<Rank>;
  template <int Rank> using Whole = Shape<Rank>;
  template <int Rank> using State = Shape<Rank>;
};
template <class T> struct In {
  template <int Rank> using Held = View<T const, Rank>;
  template <int Rank> using Wide = View<wide_t<T> const, Rank>;
  template <int Rank> using Whole = View<std::int32_t const, Rank>;
  template <int Rank> using State = View<wide_t<T> const, Rank>;
};
template <class T> struct Out {
  template <int Rank> using Held = View<T, Rank>;
  template <int Rank> using Wide = View<wide_t<T>, Rank>;
  template <int Rank> using Whole = View<std::int32_t, Rank>;
  template <int Rank> using State = View<wide_t<T>, Rank>;
};
template <class T, class B> struct Owned {
  template <int Rank> using Held = Tensor<T, Rank, B>;
  template <int Rank> using Wide = Tensor<wide_t<T>, Rank, B>;
  template <int Rank> using Whole = Tensor<std::int32_t, Rank, B>;
  template <int Rank> using State = Tensor<wide_t<T>, Rank, B>;
};
// The initial values of each tensor in a group of parameters.
struct Starts {
  template <int Rank> using Held = Initial;
  template <int Rank> using Wide = Initial;
};
// The projection matrix of every tensor in a group: Inputs<Matrix<S>> are the weights that project x to Inputs<S>.
template <class S> struct Matrix {
  template <int Rank> using Held = typename S::template Held<2>;
  template <int Rank> using Wide = typename S::template Held<2>;
  template <int Rank> using State = Absent;
};
// Every tensor of a group in the model's scalar, Wide ones too: Inputs<Narrow<S>> are projections before Prepare.
template <class S> struct Narrow {
  template <int Rank> using Held = typename S::template Held<Rank>;
  template <int Rank> using Wide = typename S::template Held<Rank>;
  template <int Rank> using State = Absent;
};

// The roles that `in` and `out` return for a group: views of its tensors.
namespace detail {
template <class S> struct ReadingOf;
template <class T, class B> struct ReadingOf<Owned<T, B>> {
  using type = In<T>;
};
template <class T> struct ReadingOf<Out<T>> {
  using type = In<T>;
};
template <class S> struct ReadingOf<Narrow<S>> {
  using type = Narrow<typename ReadingOf<S>::type>;
};
template <class S> struct WritingOf;
template <class T, class B> struct WritingOf<Owned<T, B>> {
  using type = Out<T>;
};
template <class S> struct WritingOf<Narrow<S>> {
  using type = Narrow<typename WritingOf<S>::type>;
};
}  // namespace detail
template <class S> using Reading = typename detail::ReadingOf<S>::type;
template <class S> using Writing = typename detail::WritingOf<S>::type;

template <class S, int Rank> using Held = typename S::template Held<Rank>;    // in the model's scalar
template <class S, int Rank> using Wide = typename S::template Wide<Rank>;    // never narrower than float
template <class S, int Rank> using Whole = typename S::template Whole<Rank>;  // int32
template <class S, int Rank> using State = typename S::template State<Rank>;  // wide: the state that a sequence passes to the next call

// Names the members of a group, in order. The library's one code-generating macro.
#define HYBRIDATTN_FIELDS(...)                          \
  auto fields() { return std::tie(__VA_ARGS__); }       \
  auto fields() const { return std::tie(__VA_ARGS__); } \
  static constexpr std::string_view field_list = #__VA_ARGS__;

// A group without tensors.
template <class S> struct Nothing {
  HYBRIDATTN_FIELDS()
};

namespace detail {

template <class G> using fields_t = decltype(std::declval<G&>().fields());
template <class G> inline constexpr std::size_t field_count = std::tuple_size_v<fields_t<G>>;

// "q, k, v" -> {"q", "k", "v"}
template <std::size_t N> constexpr auto split(std::string_view list) {
  std::array<std::string_view, N> names{};
  for (auto& name : names) {
    auto const length = list.find(',');
    name = list.substr(0, length);
    list.remove_prefix(length == list.npos ? list.size() : length + 2);
  }
  return names;
}
template <class G> inline constexpr auto field_names = split<field_count<G>>(G::field_list);

// The size of a struct with exactly these members. If HYBRIDATTN_FIELDS misses a member, the real struct is larger.
template <class... Fields> constexpr std::size_t laid_out(std::tuple<Fields&...> const*) {
  std::size_t end = 0, alignment = 1;
  [[maybe_unused]] auto const place = [&](std::size_t size, std::size_t align) {
    end = (end + align - 1) / align * align + size;
    alignment = align > alignment ? align : alignment;
  };
  (place(sizeof(Fields), alignof(Fields)), ...);
  end = (end + alignment - 1) / alignment * alignment;
  return end == 0 ? 1 : end;
}
template <class G> inline constexpr bool lists_every_field = laid_out(static_cast<fields_t<G>*>(nullptr)) == sizeof(G);

}  // namespace detail

template <class G>
concept FieldGroup = requires(G g) { g.fields(); };
template <class G>
concept LayerGroup = requires { G::depth; };  // a list of layers, see nn/layers.hpp

// The path of a tensor in a loop over fields, such as `blocks.3.attention.w_o`. A chain on the call stack: only str() makes a string.
struct Path {
  Path const* parent = nullptr;
  std::string_view name = {};
  int index = -1;

  std::string str() const {
    std::string const own = index < 0 ? std::string(name) : std::to_string(index);
    return parent == nullptr || parent->parent == nullptr ? own : parent->str() + "." + own;
  }
};

template <class F, class G, class... Gs> void zip_at(Path const& path, F& f, G&& first, Gs&&... rest);

template <std::size_t I, class F, class G, class... Gs> void zip_field(Path const& path, F& f, G&& first, Gs&&... rest) {
  constexpr auto name = detail::field_names<std::remove_cvref_t<G>>[I];
  zip_at(Path{&path, name}, f, std::get<I>(first.fields()), std::get<I>(rest.fields())...);
}

// Calls f(path, leaf, ...) for the corresponding leaves of groups of equal structure. Skips a leaf that is Absent in one of the groups.
template <class F, class G, class... Gs> void zip_at(Path const& path, F& f, G&& first, Gs&&... rest) {
  using Group = std::remove_cvref_t<G>;
  if constexpr (std::is_same_v<Group, Absent> || (std::is_same_v<std::remove_cvref_t<Gs>, Absent> || ...)) {
    return;
  } else if constexpr (LayerGroup<Group>) {
    Group::for_each_layer([&](int i, auto&... layers) { zip_at(Path{&path, {}, i}, f, layers...); }, first, rest...);
  } else if constexpr (FieldGroup<Group>) {
    static_assert(detail::lists_every_field<Group>, "HYBRIDATTN_FIELDS must list every member, in order");
    [&]<std::size_t... I>(std::index_sequence<I...>) {
      (zip_field<I>(path, f, first, rest...), ...);
    }(std::make_index_sequence<detail::field_count<Group>>{});
  } else {
    f(path, first, rest...);
  }
}
template <class F, class... Gs> void zip(F&& f, Gs&&... groups) { zip_at(Path{}, f, groups...); }

// Functors with a name, so a group inside many others is visited by one instantiation. A lambda would cost one for each outer group.
namespace detail {
struct ToIn {
  template <class T, int Rank, class B> void operator()(Path const&, Tensor<T, Rank, B> const& tensor, View<T const, Rank>& view) const {
    view = in(tensor);
  }
  template <class T, int Rank> void operator()(Path const&, View<T, Rank> const& written, View<T const, Rank>& view) const {
    view = written;
  }
};
struct ToOut {
  void operator()(Path const&, auto& tensor, auto& view) const { view = out(tensor); }
};
template <class B> struct Allocate {
  B& backend;
  void operator()(Path const&, auto const& shape, auto& tensor) const { tensor = {backend, shape}; }
};
// The first pass, without a block, adds up the bytes. The second one places each tensor in the block.
template <class B> struct AllocateTogether {
  B& backend;
  SharedBlock* block = nullptr;
  std::size_t bytes = 0;

  template <int Rank, class T> [[gnu::noinline]] void operator()(Path const&, Shape<Rank> const& shape, Tensor<T, Rank, B>& tensor) {
    if (block != nullptr) tensor = {backend, shape, *block, bytes};
    constexpr Index aligned = 128;   // bytes: a line of a cache, or two
    bytes += static_cast<std::size_t>(round_up(static_cast<Index>(byte_count(shape.count(), sizeof(T))), aligned));
  }
};
}  // namespace detail

// The scalar and the backend of a group of tensors.
namespace detail {
template <class G> struct OwnedGroup;
template <template <class> class G, class T, class B> struct OwnedGroup<G<Owned<T, B>>> {
  using Scalar = T;
  using Widened = G<Owned<wide_t<T>, B>>;
  using Backend = B;
  using Sizes = G<Shapes>;
};
}  // namespace detail
template <class G> using scalar_of = typename detail::OwnedGroup<G>::Scalar;
template <class G> using backend_of = typename detail::OwnedGroup<G>::Backend;
// The group with every tensor in the wide scalar: G itself, unless it is in bf16.
template <class G> using widened = typename detail::OwnedGroup<G>::Widened;

// The same group in another role.
template <template <class> class G, class T, class B> G<Shapes> shapes_of(G<Owned<T, B>> const& group) {
  G<Shapes> shapes{};
  zip([](Path const&, auto const& tensor, auto& shape) { shape = tensor.shape(); }, group, shapes);
  return shapes;
}
template <template <class> class G, class S> G<Reading<S>> in(G<S> const& group) {
  G<Reading<S>> views;
  zip(detail::ToIn{}, group, views);
  return views;
}
template <template <class> class G, class S> G<Writing<S>> out(G<S>& owned) {
  G<Writing<S>> views;
  zip(detail::ToOut{}, owned, views);
  return views;
}
template <class T, class B, template <class> class G> G<Owned<T, B>> allocate(B& backend, G<Shapes> const& shapes) {
  G<Owned<T, B>> owned;
  zip(detail::Allocate<B>{backend}, shapes, owned);
  return owned;
}

// Allocates all tensors in one block. Each tensor starts at a multiple of 128 bytes; the gaps between tensors are not initialised.
// `all` becomes a view of the whole block, gaps included. It is unchanged where no tensor has elements, and in bf16, where tensors have two
// scalars.
template <class T, class B, template <class> class G> G<Owned<T, B>> allocate_together(B& backend, G<Shapes> const& shapes,
                                                                                       View<T, 1>* all = nullptr) {
  G<Owned<T, B>> owned;
  detail::AllocateTogether<B> place{backend};
  zip(place, shapes, owned);
  std::size_t const bytes = std::max<std::size_t>(std::exchange(place.bytes, 0), sizeof(T));
  place.block = detail::take_shared(backend, bytes);
  zip(place, shapes, owned);
  if (all != nullptr && std::is_same_v<wide_t<T>, T> && place.block->tensors > 1)
    *all = {static_cast<T*>(place.block->data), {static_cast<Index>(bytes / sizeof(T))}};
  detail::leave(backend, place.block);
  return owned;
}

namespace detail {
struct CountBytes {
  Index total = 0;

  template <int Rank, class T> [[gnu::noinline]] void operator()(Path const& path, Shape<Rank> const& shape, View<T, Rank> const&) {
    try {
      total = size_sum(total, static_cast<Index>(byte_count(shape.count(), sizeof(T))));
    } catch (Error const& error) {
      fail(path.str(), ": ", error.what());
    }
  }
};
}  // namespace detail

// The bytes of a group in memory. Throws Error, with the tensor's path, where the number of bytes is too large.
template <class T, template <class> class G> std::size_t bytes(G<Shapes> const& shapes) {
  detail::CountBytes counted;
  zip(counted, shapes, G<In<T>>{});
  return static_cast<std::size_t>(counted.total);
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/backend/cpu/threads.hpp
// The threads of a Cpu. They share the tasks of one loop at a time.
#ifndef HYBRIDATTN_BACKEND_CPU_THREADS_HPP
#define HYBRIDATTN_BACKEND_CPU_THREADS_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::cpu {

// Processors that this process may use, at least one.
inline int processors() {
#if defined(__linux__)
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) return std::max(1, CPU_COUNT(&allowed));
#endif
  return std::max(1, static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN)));
}

// The number of threads that OMP_NUM_THREADS asks for, as in programs that use OpenMP: of a list its first number. 0 where it is not set.
// Throws Error for anything else.
inline int threads_of_environment() {
  char const* const text = std::getenv("OMP_NUM_THREADS");
  if (text == nullptr || *text == '\0') return 0;
  char* end = nullptr;
  long const number = std::strtol(text, &end, 10);
  check(end != text && (*end == '\0' || *end == ',') && number > 0 && number <= std::numeric_limits<int>::max(), "OMP_NUM_THREADS is '", text,
        "'; allowed: a number of threads above 0, or several with commas between them, of which the first counts");
  return static_cast<int>(number);
}

namespace detail {

// Tells the processor that a thread waits in a loop.
inline void pause() {
#if defined(__SSE2__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Calls done() until it is true, `looks` times at most. A look takes 10 to 50 ns.
template <class Done> bool spin(Done done, int looks = 2000) {
  for (; looks > 0; --looks, pause())
    if (done()) return true;
  return false;
}

// How often this process is a child of fork(): threads of the parent do not exist in the child.
inline std::atomic<int> forks = 0;
inline int const watches_forks = pthread_atfork(nullptr, nullptr, [] { ++forks; });

// The error of a task. Of several it keeps that of the task with the smallest number, for any number of threads.
class Failure {
 public:
  void keep(Index task) noexcept {
    while (busy_.exchange(true, std::memory_order_acquire)) pause();
    if (error_ == nullptr || task < task_) {
      error_ = std::current_exception();
      task_ = task;
    }
    busy_.store(false, std::memory_order_release);
  }
  void rethrow() const {
    if (error_ != nullptr) std::rethrow_exception(error_);
  }

 private:
  std::atomic<bool> busy_ = false;
  std::exception_ptr error_;
  Index task_ = 0;
};

}  // namespace detail

// A loop: run(body, task, thread) for tasks 0 .. count - 1.
struct TaskLoop {
  Index count = 0;
  void (*run)(void* body, Index task, int thread) = nullptr;
  void* body = nullptr;

  void run_here() const {
    for (Index task = 0; task < count; ++task) run(body, task, 0);
  }
};

// The threads of a Cpu. Every thread claims one task after the other, the caller too. The caller waits only for tasks that a thread has
// begun, so a thread that gets no processor delays nobody. A thread without tasks looks for the next loop for some microseconds, then sleeps.
//
// `unclaimed_` counts the tasks that no thread has claimed. A thread that comes late, after its loop has ended, claims a task of the next
// loop. That is right: it reads what the loop is after it has claimed, and a loop does not end before its claimed tasks have ended.
class Threads {
 public:
  // The caller and `count` - 1 others.
  explicit Threads(int count) : count_(count) {}
  Threads(Threads const&) = delete;
  Threads& operator=(Threads const&) = delete;
  ~Threads() { stop(); }

  int count() const { return count_; }

  // Runs the loop on the caller, which is thread 0, and on the others. One loop at a time. The first loop starts the others, and so does
  // the first loop in a child of fork(). Throws Error where the system refuses a thread. Throws the error of a task, of several that of the
  // task with the smallest number, after all tasks have ended.
  void run(TaskLoop const& loop) {
    start();
    detail::Failure failure;
    loop_ = loop, failure_ = &failure;
    unfinished_.store(loop.count, std::memory_order_relaxed);
    unclaimed_.store(loop.count, std::memory_order_release);
    call();
    work(0);
    wait_for_begun();
    failure.rethrow();
  }

 private:
  struct Other {
    Threads* threads;
    int number;
    pthread_t id;
  };

  void start() {
    if (forks_ != detail::forks) others_.clear(), forks_ = detail::forks;
    if (!others_.empty()) return;
    stops_ = false, unclaimed_ = 0;
    others_.reserve(static_cast<std::size_t>(count_));   // a thread knows the address of its own
    for (int number = 1; number < count_; ++number) {
      Other& other = others_.emplace_back(Other{this, number, {}});
      int const error = pthread_create(&other.id, nullptr, main, &other);
      if (error == 0) continue;
      others_.pop_back();
      stop();
      fail("Cpu: the system refuses thread ", number + 1, " of ", count_, ": ", std::strerror(error));
    }
  }
  void stop() {
    bool const are_here = forks_ == detail::forks;
    if (are_here && !others_.empty()) stops_ = true, call();
    for (Other const& other : others_)
      if (are_here) pthread_join(other.id, nullptr);
    others_.clear();
  }

  static void* main(void* other) {
    static_cast<Other*>(other)->threads->help(static_cast<Other*>(other)->number);
    return nullptr;
  }
  void help(int thread) {
    for (int calls = calls_ - 1; !stops_;) {
      auto const is_called = [&] { return calls_.load(std::memory_order_relaxed) != calls; };
      if (!detail::spin(is_called)) calls_.wait(calls);
      calls = calls_;
      work(thread);
    }
  }
  void call() {
    ++calls_;
    calls_.notify_all();
  }

  // Runs tasks until all are claimed.
  void work(int thread) {
    for (Index left = unclaimed_.load(std::memory_order_relaxed); left > 0;) {
      if (!unclaimed_.compare_exchange_weak(left, left - 1, std::memory_order_acquire, std::memory_order_relaxed)) continue;
      run_task(loop_.count - left, thread);
      left = unclaimed_.load(std::memory_order_relaxed);
    }
  }
  void run_task(Index task, int thread) {
    try {
      loop_.run(loop_.body, task, thread);
    } catch (...) {
      failure_->keep(task);
    }
    if (--unfinished_ == 0) unfinished_.notify_one();   // the caller
  }
  void wait_for_begun() {
    if (detail::spin([&] { return unfinished_ == 0; })) return;
    for (Index left = unfinished_; left > 0; left = unfinished_) unfinished_.wait(left);
  }

  int count_;
  int forks_ = detail::forks;
  std::vector<Other> others_;
  TaskLoop loop_;
  detail::Failure* failure_ = nullptr;
  std::atomic<bool> stops_ = false;
  std::atomic<int> calls_ = 0;   // changes whenever there is something to do
  // Each has a line of the cache of its own, because threads that look for a call would slow those that claim.
  alignas(64) std::atomic<Index> unclaimed_ = 0;
  alignas(64) std::atomic<Index> unfinished_ = 0;
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::cpu
#endif

// ==== hybridattn/backend/cpu/cpu.hpp
// The CPU: aligned memory from a pool, and parallel_for, the only loop that uses threads.
#ifndef HYBRIDATTN_BACKEND_CPU_CPU_HPP
#define HYBRIDATTN_BACKEND_CPU_CPU_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

class Cpu {
 public:
  static constexpr std::string_view name = "Cpu";

  // 0 threads: as many as OMP_NUM_THREADS says, or one for each processor. Throws Error for more than thread_limit() threads, and for
  // an OMP_NUM_THREADS that is no number. Cpu{1} runs on the caller's thread and starts no other.
  explicit Cpu(int threads = 0) : threads_(threads == 0 ? available_threads() : threads) {
    check(threads >= 0, "Cpu: ", threads, " threads; allowed: 0 (as many as there are) and more");
    check(threads_.count() <= thread_limit(), "Cpu: ", threads_.count(), " threads", threads == 0 ? ", which OMP_NUM_THREADS asks for" : "",
          "; this machine allows at most ", thread_limit());
  }
  Cpu(Cpu const&) = delete;
  Cpu& operator=(Cpu const&) = delete;
  ~Cpu() { trim(); }

  // Throws Error where memory is short, and inside parallel_for, because threads cannot share the pool.
  void* take(std::size_t bytes) {
    check(!in_loop_, "Cpu: ", bytes, " bytes are taken inside parallel_for; take them before it");
    return pool_.take(bytes, [this](std::size_t n) { return allocate(n); }, release, machine_memory());
  }
  void give(void* block, std::size_t bytes) noexcept { pool_.give(block, bytes); }
  // Returns the pool's free blocks to the system.
  void trim() noexcept { pool_.trim(release); }
  void upload(void* to, void const* from, std::size_t bytes) { std::memcpy(to, from, bytes); }
  void download(void* to, void const* from, std::size_t bytes) { std::memcpy(to, from, bytes); }
  void copy(void* to, void const* from, std::size_t bytes) { std::memcpy(to, from, bytes); }
  void fill(void* to, std::byte value, std::size_t bytes) { std::memset(to, std::to_integer<int>(value), bytes); }
  void synchronise() {}
  // Operations of Cpu work on any memory of the process.
  bool owns(void const*) const { return true; }
  Pool& pool() { return pool_; }
  int threads() const { return threads_.count(); }
  // Four for each processor, at least 256: each thread has a stack.
  static int thread_limit() { return std::max(256, 4 * cpu::processors()); }

  // The loop of parallel_for. A loop inside a loop runs on the thread that it is in.
  void run(cpu::TaskLoop const& loop) {
    if (in_loop_) return loop.run_here();
    InLoop const here{in_loop_};
    if (threads() > 1 && loop.count > 1) threads_.run(loop);
    else loop.run_here();
  }

 private:
  static constexpr std::align_val_t alignment{64};

  void* allocate(std::size_t bytes) const {
    if (bytes > machine_memory() - std::min(machine_memory(), pool_.held())) return nullptr;
    return ::operator new(bytes, alignment, std::nothrow);
  }
  static void release(void* block, std::size_t) noexcept { ::operator delete(block, alignment); }
  static int available_threads() {
    int const wanted = cpu::threads_of_environment();
    return wanted > 0 ? wanted : cpu::processors();
  }
  struct InLoop {
    explicit InLoop(bool& flag) : flag_(flag) { flag_ = true; }
    InLoop(InLoop const&) = delete;
    InLoop& operator=(InLoop const&) = delete;
    ~InLoop() { flag_ = false; }

    bool& flag_;
  };

  cpu::Threads threads_;
  bool in_loop_ = false;   // while parallel_for runs
  Pool pool_;
};
static_assert(Backend<Cpu>);

namespace cpu {

// `count` elements of scratch memory for a kernel, from the pool. Make it before threads start: the pool serves one thread at a time.
template <class T> class Scratch {
 public:
  Scratch(Cpu& cpu, Index count) : cpu_(cpu), bytes_(byte_count(count, sizeof(T))) {
    if (count > 0) data_ = static_cast<T*>(cpu.take(bytes_));
  }
  Scratch(Scratch const&) = delete;
  Scratch& operator=(Scratch const&) = delete;
  ~Scratch() {
    if (data_ != nullptr) cpu_.give(data_, bytes_);
  }
  T* data() const { return data_; }

 private:
  Cpu& cpu_;
  std::size_t bytes_;
  T* data_ = nullptr;
};

}  // namespace cpu

// Calls f(task, thread) for tasks 0 .. count - 1, each on one thread 0 .. cpu.threads() - 1. Any thread may run any task, so a
// result must depend on the task alone. When f throws, parallel_for throws the error after the loop, and other tasks have run too:
// check arguments and take memory before the loop.
template <class F> void parallel_for(Cpu& cpu, Index count, F f) {
  cpu.run({count, [](void* body, Index task, int thread) { (*static_cast<F*>(body))(task, thread); }, &f});
}

// Calls f(first, last) for blocks of `grain` elements that make up 0 .. count: for loops over elements.
template <class F> void parallel_blocks(Cpu& cpu, Index count, Index grain, F f) {
  parallel_for(cpu, ceil_div(count, grain), [&](Index block, int) {
    Index const first = block * grain;
    f(first, std::min(first + grain, count));
  });
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/backend/cpu/convert.hpp
// Conversion between scalars on the CPU.
#ifndef HYBRIDATTN_BACKEND_CPU_CONVERT_HPP
#define HYBRIDATTN_BACKEND_CPU_CONVERT_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

// y = x, each element rounded to the scalar of y. Rows may be spaced.
template <class From, class To, int Rank> void convert(Cpu& cpu, View<From const, Rank> x, View<To, Rank> y) {
  Index const C = y.count() == 0 ? 0 : y.extent(Rank - 1);
  if (C == 0) return;
  Index const rows = y.count() / C;
  parallel_blocks(cpu, rows, std::max<Index>(1, cpu::element_grain / C), [&](Index first, Index last) {
    for (Index n = first; n < last; ++n) {
      From const* const from = x.data + row_offset(x, n);
      To* const to = y.data + row_offset(y, n);
      for (Index i = 0; i < C; ++i) to[i] = static_cast<To>(from[i]);
    }
  });
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/tensor/in_float.hpp
// Operations on bf16 tensors. The tensors are stored in bf16; an operation computes in float, on copies, and rounds what it writes.
#ifndef HYBRIDATTN_TENSOR_IN_FLOAT_HPP
#define HYBRIDATTN_TENSOR_IN_FLOAT_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

namespace detail {

// Copies of bf16 tensors, as functions for zip. Tensors of other scalars are read and written where they are.
template <class B> struct ReadInFloat {
  B& backend;
  template <int Rank, class V> void operator()(Path const&, View<bf16 const, Rank> const& x, Tensor<float, Rank, B>& copy, V& view) const {
    view = {nullptr, x.shape};
    if (x.empty()) return;
    copy = {backend, x.shape};
    convert(backend, x, out(copy));
    view = in(copy);
  }
  template <class V, class T> void operator()(Path const&, V const& x, T&, V& view) const { view = x; }
};
template <class B> struct WriteInFloat {
  B& backend;
  template <int Rank> void operator()(Path const&, View<bf16, Rank> const& y, Tensor<float, Rank, B>& copy, View<float, Rank>& view) const {
    view = {nullptr, y.shape};
    if (y.empty()) return;
    copy = {backend, y.shape};
    convert(backend, View<bf16 const, Rank>(y), out(copy));   // an operation may add to what it writes
    view = out(copy);
  }
  template <class V, class T> void operator()(Path const&, V const& y, T&, V& view) const { view = y; }
};
template <class B> struct RoundBack {
  B& backend;
  template <int Rank> void operator()(Path const&, Tensor<float, Rank, B> const& copy, View<bf16, Rank> const& y) const {
    if (copy) convert(backend, in(copy), y);
  }
  template <class T, class V> void operator()(Path const&, T const&, V const&) const {}
};

// An argument of an operation on bf16 tensors, as the operation in float takes it.
template <class B, class Argument> struct InFloatArgument {
  Argument const& value;
  InFloatArgument(B&, Argument const& argument) : value(argument) {}
  void finish(B&) const {}
};
template <class B, int Rank> struct InFloatArgument<B, View<bf16 const, Rank>> {
  Tensor<float, Rank, B> copy;
  View<float const, Rank> value;
  InFloatArgument(B& backend, View<bf16 const, Rank> const& x) { ReadInFloat<B>{backend}(Path{}, x, copy, value); }
  void finish(B&) const {}
};
template <class B, int Rank> struct InFloatArgument<B, View<bf16, Rank>> {
  View<bf16, Rank> y;
  Tensor<float, Rank, B> copy;
  View<float, Rank> value;
  InFloatArgument(B& backend, View<bf16, Rank> const& written) : y(written) { WriteInFloat<B>{backend}(Path{}, y, copy, value); }
  void finish(B& backend) const { RoundBack<B>{backend}(Path{}, copy, y); }
};
template <class B, template <class> class G> struct InFloatArgument<B, G<In<bf16>>> {
  G<Owned<float, B>> copies;
  G<In<float>> value;
  InFloatArgument(B& backend, G<In<bf16>> const& group) { zip(ReadInFloat<B>{backend}, group, copies, value); }
  void finish(B&) const {}
};
template <class B, template <class> class G> struct InFloatArgument<B, G<Out<bf16>>> {
  G<Out<bf16>> const& group;
  G<Owned<float, B>> copies;
  G<Out<float>> value;
  InFloatArgument(B& backend, G<Out<bf16>> const& written) : group(written) { zip(WriteInFloat<B>{backend}, group, copies, value); }
  void finish(B& backend) const { zip(RoundBack<B>{backend}, copies, group); }
};

template <class Argument> inline constexpr bool holds_bf16 = false;
template <int Rank> inline constexpr bool holds_bf16<View<bf16 const, Rank>> = true;
template <int Rank> inline constexpr bool holds_bf16<View<bf16, Rank>> = true;
template <template <class> class G> inline constexpr bool holds_bf16<G<In<bf16>>> = true;
template <template <class> class G> inline constexpr bool holds_bf16<G<Out<bf16>>> = true;

}  // namespace detail

// y = x, tensor by tensor, each element rounded to the scalar of y. Skips tensors without elements.
template <class B, template <class> class G, class From, class To> void convert(B& backend, G<From> const& x, G<To>& y) {
  zip(
      [&](Path const&, auto const& from, auto& to) {
        if (from) convert(backend, in(from), out(to));
      },
      x, y);
}

// A copy of a group with every tensor in the wide scalar.
template <class B, template <class> class G, class T> G<Owned<wide_t<T>, B>> widen(B& backend, G<Owned<T, B>> const& group) {
  auto wide = allocate_together<wide_t<T>>(backend, shapes_of(group));
  convert(backend, group, wide);
  return wide;
}

// Calls f with the arguments, float copies in place of bf16 tensors. Then rounds the copies of those that f writes. Views and groups of
// views are tensors here.
template <class B, class F, class... Arguments> void in_float(B& backend, F f, Arguments const&... arguments) {
  std::tuple<detail::InFloatArgument<B, Arguments>...> floats{detail::InFloatArgument<B, Arguments>{backend, arguments}...};
  std::apply(
      [&](auto const&... argument) {
        f(argument.value...);
        (argument.finish(backend), ...);
      },
      floats);
}

// Arguments with bf16 tensors, of which an operation takes float copies.
namespace detail {
template <class Op, class B, class... Arguments>
concept ForwardInFloat =
    (holds_bf16<Arguments> || ...) && requires(B& b, InFloatArgument<B, Arguments>&... a) { On<Op, B>::forward(b, a.value...); };
template <class Op, class B, class... Arguments>
concept BackwardInFloat =
    (holds_bf16<Arguments> || ...) && requires(B& b, InFloatArgument<B, Arguments>&... a) { On<Op, B>::backward(b, a.value...); };
template <class Op, class B, class... Arguments>
concept ExtendInFloat =
    (holds_bf16<Arguments> || ...) && requires(B& b, InFloatArgument<B, Arguments>&... a) { On<Op, B>::extend(b, a.value...); };
}  // namespace detail

// The base of an operation on a backend that computes in float and double, and has bf16 from this:
//   template <> struct On<Mine, Cpu> : InFloat<Mine, Cpu> {
//     using InFloat::forward, InFloat::backward;
//     template <std::floating_point T> static void forward(...)
template <class Op, class B> struct InFloat {
  template <class... Arguments> requires detail::ForwardInFloat<Op, B, Arguments...>
  static void forward(B& backend, Arguments const&... arguments) {
    in_float(backend, [&](auto const&... floats) { On<Op, B>::forward(backend, floats...); }, arguments...);
  }
  template <class... Arguments> requires detail::BackwardInFloat<Op, B, Arguments...>
  static void backward(B& backend, Arguments const&... arguments) {
    in_float(backend, [&](auto const&... floats) { On<Op, B>::backward(backend, floats...); }, arguments...);
  }
  template <class... Arguments> requires detail::ExtendInFloat<Op, B, Arguments...>
  static void extend(B& backend, Arguments const&... arguments) {
    in_float(backend, [&](auto const&... floats) { On<Op, B>::extend(backend, floats...); }, arguments...);
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/tensor/sequences_on.hpp
// The sequences of a batch on a machine.
#ifndef HYBRIDATTN_TENSOR_SEQUENCES_ON_HPP
#define HYBRIDATTN_TENSOR_SEQUENCES_ON_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

// The sequences of a batch for kernels, in the machine's memory.
struct SequenceTable {
  View<Sequence const, 1> list;                    // [count]
  View<std::int32_t const, 1> positions, owners;   // [N]: as in Sequences
};

// The list of sequences on the host, for sizes and shapes, and a table on the machine, for kernels. The table is made once, where
// the batch's tokens are uploaded. An operation that does not need the table takes a Sequences const&.
template <class B> class SequencesOn : public Sequences {
 public:
  SequencesOn() = default;
  SequencesOn(B& backend, Sequences list) : Sequences(std::move(list)) { fill_table(backend); }

  // The same as Sequences::continuing, in the memory of this object.
  void assign(B& backend, std::span<Index const> past, std::span<Index const> lengths) {
    Sequences::assign(past, lengths);
    fill_table(backend);
  }
  SequenceTable table() const { return {in(list_), in(positions_), in(owners_)}; }

  // Rotary angles [P, 2, rotary_dim/2] of the batch. The first layer's call computes them by make(angles), later layers reuse them.
  // P is the length of the longest sequence, or the number of tokens where a sequence follows earlier tokens.
  // The list of angles grows although the batch is const, so only one thread at a time may use a batch.
  template <class T, class Make> View<T const, 3> angles(B& backend, Index rotary_dim, double theta, Make make) const {
    auto& known = std::get<std::vector<Angles<T>>>(angles_);
    auto found = std::ranges::find_if(known, [&](auto const& a) { return a.rotary_dim == rotary_dim && a.theta == theta; });
    if (found == known.end()) found = known.insert(known.end(), {rotary_dim, theta, false, {}});
    if (!found->made) {
      Shape<3> const shape{any_continue() ? tokens() : longest(), 2, rotary_dim / 2};
      if (found->values.shape() != shape) found->values = {backend, shape};
      make(out(found->values));
      found->made = true;
    }
    return in(found->values);
  }

 private:
  template <class T> struct Angles {
    Index rotary_dim;
    double theta;
    bool made;
    Tensor<T, 3, B> values;
  };

  void fill_table(B& backend) {
    fill(backend, list(), list_);
    fill(backend, std::span{positions().data, static_cast<std::size_t>(tokens())}, positions_);
    fill(backend, std::span{owners().data, static_cast<std::size_t>(tokens())}, owners_);
    forget(std::get<0>(angles_));
    forget(std::get<1>(angles_));
  }
  template <class T> static void fill(B& backend, std::span<T const> host, Tensor<T, 1, B>& tensor) {
    if (tensor.shape()[0] != std::ssize(host)) tensor = {backend, {std::ssize(host)}};
    upload(backend, host, tensor);
  }
  template <class T> static void forget(std::vector<Angles<T>>& known) {
    for (auto& angles : known) angles.made = false;
  }

  Tensor<Sequence, 1, B> list_;
  Tensor<std::int32_t, 1, B> positions_, owners_;
  mutable std::tuple<std::vector<Angles<float>>, std::vector<Angles<double>>> angles_;
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/attention/policy.hpp
// The declarations of every attention policy, and their defaults.
//
// A policy P declares
//   P::Config                                   its sizes, as values; 0 means the default
//   P::complete(config, model_dim, num_heads)   the config with every 0 filled in; throws Error on sizes that do not fit
//   P::Inputs<S>,  P::inputs(config, sequences)   the tensors that the equations read
//   P::Outputs<S>, P::outputs(config, sequences)  the tensors that the equations compute: o [N, H, D] first
//   P::Saved<S>,   P::saved(config, sequences)    the tensors that backward reads besides inputs and outputs
//   On<P, Backend>                              forward and backward, see backend.hpp
// A policy that decodes also declares
//   P::Cache<S>,  P::cache(config, batch, capacity)   the values of earlier tokens that the policy and Prepare need for later tokens, for
//                                               `batch` sequences of at most `capacity` tokens; the first axis counts sequences
//   On<P, Backend>::extend(backend, config, sequences, x, cache, y)
//                                               computes y.o of new tokens: any number in each sequence, 0 included. The new tokens
//                                               of sequence i follow sequence[i].past tokens in the cache, and are added to the
//                                               cache. extend never reads the cache of a sequence with past 0, and writes only
//                                               y.o and the cache.
// A layer projects x to each input (x w^T), and P::Prepare changes some inputs. A policy whose inputs are not projections of x declares
// its projections, and its Prepare computes the inputs from them:
//   P::Projections<S>, P::projections(config, sequences)   tensors of tokens, each with a matrix of its own
// A policy may have an auxiliary loss, Outputs::auxiliary_loss [1]. It trains only the inputs that P::detached names.
// An empty output view means that the caller does not need this output. If d_y.o is empty, backward computes the gradients of the other
// outputs only.
// `sequences` is a SequencesOn<Backend>. A policy whose kernels do not read its table on the machine takes a Sequences const&.
// N is the number of tokens of all sequences together. Tensors are [N, H, D], which is [B, T, H, D] with B and T as one axis.
#ifndef HYBRIDATTN_ATTENTION_POLICY_HPP
#define HYBRIDATTN_ATTENTION_POLICY_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

// A Prepare or Finish without parameters that leaves its tensors unchanged. Other steps have these members and more:
// A Prepare has forward(backend, config, sequences, raw, params, inputs) and
// backward(backend, config, sequences, raw, params, inputs, d_inputs, d_raw, d_params), where raw are the projections. A Finish has
// forward(backend, config, o, z, params, y) and backward(backend, config, o, z, params, d_y, d_o, d_z, d_params), where z is
// the gate's projection of x, if the step is gated. Both backwards overwrite. What a stage does not train has empty d_inputs, d_raw and
// d_params, which backward does not compute. To decode, a Prepare that reads earlier tokens also has
// extend(backend, config, sequences, raw, params, cache, inputs), which reads and then updates its part of the cache.
struct NoStep {
  static constexpr bool gated = false;
  template <class S> using Params = Nothing<S>;
  template <class Config> static Params<Shapes> params(Config const&) { return {}; }
  template <class Config> static Params<Starts> starts(Config const&) { return {}; }
  // Whether the step computes the input of this name from its projection; other inputs are their projections. Used where P has no
  // Projections.
  static constexpr bool makes(std::string_view) { return false; }
};

// The parameters that a training step changes. A policy whose computation depends on the stage has a `Stage stage` in its Config.
enum class Stage {
  language_model,  // parameters with a gradient of the model's loss; auxiliary losses are not computed, their parameters are frozen
  dense_warm_up,   // only parameters of the auxiliary losses, all others are frozen; a sparse policy attends to every key
  sparse           // both, each by its own loss
};
constexpr char const* name_of(Stage stage) {
  return stage == Stage::language_model ? "language_model" : stage == Stage::dense_warm_up ? "dense_warm_up" : "sparse";
}
inline constexpr bool trains(Stage stage, bool detached) {
  return detached ? stage != Stage::language_model : stage != Stage::dense_warm_up;
}

// Runs a policy's own loops on GPU backends, see attention/from_loops.hpp.
template <class P, class B> struct FromLoops;

struct PolicyDefaults {
  static constexpr std::string_view name = "a policy without a name";   // in tables and checkpoints
  using Prepare = NoStep;   // from the projections to Inputs: convolution, norms, rotary, gates
  using Finish = NoStep;    // from o and the gate's projection to what the output matrix reads
  // Whether only the auxiliary loss trains the input, projection or parameter of Prepare of this name. The gradient of such an input
  // or projection does not reach x.
  static constexpr bool detached(std::string_view) { return false; }
  // The weight of a batch's auxiliary loss in training.
  template <class Config> static double auxiliary_weight(Config const&, [[maybe_unused]] Index tokens) { return 1; }
};

template <class P>
concept NamesProjections = requires(typename P::Config c, Sequences const& s) { P::projections(c, s); };
// The projections of P's layer, as a group over roles, and their shapes.
template <class P> struct ProjectionsOf {
  template <class S> using Group = typename P::template Inputs<Narrow<S>>;
  static Group<Shapes> shapes(typename P::Config const& c, Sequences const& s) {
    Group<Shapes> narrow{};
    zip([](Path const&, auto const& input, auto& projection) { projection = input; }, P::inputs(c, s), narrow);
    return narrow;
  }
};
template <NamesProjections P> struct ProjectionsOf<P> {
  template <class S> using Group = typename P::template Projections<S>;
  static Group<Shapes> shapes(typename P::Config const& c, Sequences const& s) { return P::projections(c, s); }
};

template <class P>
concept HasAuxiliaryLoss = requires(typename P::template Outputs<Shapes> y) { y.auxiliary_loss; };
template <class P>
concept AttentionPolicy = requires(typename P::Config c, Sequences const& s, Index n) {
  { P::complete(c, n, n) } -> std::same_as<typename P::Config>;
  { P::inputs(c, s) } -> std::same_as<typename P::template Inputs<Shapes>>;
  { P::outputs(c, s) } -> std::same_as<typename P::template Outputs<Shapes>>;
  { P::saved(c, s) } -> std::same_as<typename P::template Saved<Shapes>>;
  typename P::Prepare;
  typename P::Finish;
};

template <class P, class B, class T>
concept HasForward =
    requires(B& b, typename P::Config c, SequencesOn<B> const& s, typename P::template Inputs<In<T>> x,
             typename P::template Outputs<Out<T>> y, typename P::template Saved<Out<T>> saved) { On<P, B>::forward(b, c, s, x, y, saved); };
template <class P, class B, class T>
concept HasBackward =
    requires(B& b, typename P::Config c, SequencesOn<B> const& s, typename P::template Inputs<In<T>> x,
             typename P::template Outputs<In<T>> y, typename P::template Saved<In<T>> saved, typename P::template Outputs<In<T>> d_y,
             typename P::template Inputs<Out<T>> d_x) { On<P, B>::backward(b, c, s, x, y, saved, d_y, d_x); };
template <class P>
concept HasCache = requires(typename P::Config c, Index n) {
  { P::cache(c, n, n) } -> std::same_as<typename P::template Cache<Shapes>>;
};
template <class P, class B, class T>
concept HasExtend = HasCache<P> && requires(B& b, typename P::Config c, SequencesOn<B> const& s, typename P::template Inputs<In<T>> x,
                                            typename P::template Cache<Out<T>> cache,
                                            typename P::template Outputs<Out<T>> y) { On<P, B>::extend(b, c, s, x, cache, y); };
// Whether a step has an extend, with any arguments: a second extend makes the name ambiguous. The step may not be a final class.
struct OtherExtend {
  void extend();
};
template <class Step> struct WithOtherExtend : Step, OtherExtend {};
template <class Step>
concept NamesExtend = !std::is_final_v<Step> && !requires { &WithOtherExtend<Step>::extend; };
template <class P, class B, class T>
concept Decodes = AttentionPolicy<P> && HasExtend<P, B, T>;
template <class P, class B, class T>
concept ImplementedOn = AttentionPolicy<P> && HasForward<P, B, T> && HasBackward<P, B, T>;

// head_dim and head counts of a config, from a model's defaults; shared by policies whose heads split the width.
inline Index default_head_dim(Index head_dim, Index model_dim, Index num_heads) {
  if (head_dim != 0) return head_dim;
  check(num_heads > 0 && model_dim > 0 && model_dim % num_heads == 0, "model_dim ", model_dim, " is not a multiple of num_heads ",
        num_heads, "; set head_dim, or a num_heads that divides it");
  return model_dim / num_heads;
}
// Throws Error where a size is below 0. 0 means the default.
inline void check_size(char const* policy, char const* name, Index size) {
  check_at_least(policy, name, size, 0, ", where 0 stands for the default");
}
inline void check_groups(char const* policy, Index heads, Index kv_heads) {
  check(heads > 0 && kv_heads > 0 && heads % kv_heads == 0, policy, ": ", heads, " heads in groups over ", kv_heads,
        " key/value heads; the first must be a positive multiple of the second");
}

// Throws Error where these tokens do not fit into a cache of `batch` sequences with room for `capacity` tokens each.
inline void check_fits(Sequences const& s, Index batch, Index capacity) {
  check(s.count() == batch, "cache: new tokens of ", s.count(), " sequences, but the cache was made for ", batch);
  for (Index i = 0; i < batch; ++i) {
    auto const [start, length, past] = s[static_cast<std::size_t>(i)];
    check(past + length <= capacity, "cache: sequence ", i, " would have ", past, " + ", length, " tokens, but its capacity is ", capacity);
  }
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/ops/arithmetic/arithmetic.hpp
// Element by element: what models need between the larger operations. No backward of their own.
#ifndef HYBRIDATTN_OPS_ARITHMETIC_ARITHMETIC_HPP
#define HYBRIDATTN_OPS_ARITHMETIC_ARITHMETIC_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

struct Fill {};          // forward(backend, value, y)      y = value
struct Add {};           // forward(backend, x, y)          y += x
struct AddWeighted {};   // forward(backend, weight, x, sum)   sum += weight x of one element: x [1], sum [1] of double
struct AllFinite {};     // forward(backend, x) -> bool     no NaN and no infinity. Waits: it is asked when a step went wrong

template <class T, int Rank, class B> Tensor<T, Rank, B> zeros(B& backend, Shape<Rank> shape) {
  Tensor<T, Rank, B> x{backend, shape};
  On<Fill, B>::forward(backend, T(0), flat(out(x)));
  return x;
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI

// ==== hybridattn/ops/arithmetic/cpu.hpp
#ifndef HYBRIDATTN_OPS_ARITHMETIC_CPU_HPP
#define HYBRIDATTN_OPS_ARITHMETIC_CPU_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

template <> struct On<Fill, Cpu> {
  template <class T> static void forward(Cpu& cpu, T value, View<T, 1> y) {
    parallel_blocks(cpu, y.count(), cpu::element_grain, [&](Index first, Index last) { std::fill(y.data + first, y.data + last, value); });
  }
};

template <> struct On<Add, Cpu> : InFloat<Add, Cpu> {
  using InFloat::forward;
  template <std::floating_point T> static void forward(Cpu& cpu, View<T const, 1> x, View<T, 1> y) {
    parallel_blocks(cpu, y.count(), cpu::element_grain, [&](Index first, Index last) {
      for (Index i = first; i < last; ++i) y.data[i] += x.data[i];
    });
  }
};

template <> struct On<AddWeighted, Cpu> {
  template <class T> static void forward(Cpu&, double weight, View<T const, 1> loss, View<double, 1> sum) {
    sum(0) += weight * static_cast<double>(loss(0));
  }
};

template <> struct On<AllFinite, Cpu> {
  template <class T> static bool forward(Cpu&, View<T const, 1> x) {
    return std::all_of(x.data, x.data + x.count(), [](T value) { return std::isfinite(static_cast<wide_t<T>>(value)); });
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
#endif

// ==== hybridattn/ops/gate/gate.hpp
// One tensor opens or closes another, element by element.
//   Swiglu (arXiv 2002.05202):  y = silu(gate) up, or silu(gate) without up
//       d_gate = d_y up silu'(gate)      d_up = d_y silu(gate)
//   SigmoidGate:  y = x sigmoid(z)
//       d_x = d_y sigmoid(z)             d_z = d_y x sigmoid(z) (1 - sigmoid(z))
#ifndef HYBRIDATTN_OPS_GATE_GATE_HPP
#define HYBRIDATTN_OPS_GATE_GATE_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

//   forward(backend, gate, up, y);   backward(backend, gate, up, d_y, d_gate, d_up)     up and d_up may be empty
struct Swiglu {};
//   forward(backend, x, z, y);       backward(backend, x, z, d_y, d_x, d_z)
struct SigmoidGate {};

}  // namespace hybridattn::inline HYBRIDATTN_ABI

// ==== hybridattn/ops/gate/cpu.hpp
#ifndef HYBRIDATTN_OPS_GATE_CPU_HPP
#define HYBRIDATTN_OPS_GATE_CPU_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

template <> struct On<Swiglu, Cpu> : InFloat<Swiglu, Cpu> {
  using InFloat::forward, InFloat::backward;
  template <std::floating_point T> static void forward(Cpu& cpu, View<T const, 1> gate, View<T const, 1> up, View<T, 1> y) {
    parallel_blocks(cpu, y.count(), cpu::element_grain, [&](Index first, Index last) {
      cpu::for_each_vector<T>(first, last, [&](cpu::Slot<T> s) HYBRIDATTN_INLINE_LAMBDA {
        cpu::Vec<T> const x = s.get(gate.data), silu = x * cpu::sigmoid<T>(x);
        s.put(y.data, up.empty() ? silu : silu * s.get(up.data));
      });
    });
  }
  template <std::floating_point T>
  static void backward(Cpu& cpu, View<T const, 1> gate, View<T const, 1> up, View<T const, 1> d_y, View<T, 1> d_gate, View<T, 1> d_up) {
    parallel_blocks(cpu, d_y.count(), cpu::element_grain, [&](Index first, Index last) {
      cpu::for_each_vector<T>(first, last, [&](cpu::Slot<T> s) HYBRIDATTN_INLINE_LAMBDA {
        cpu::Vec<T> const x = s.get(gate.data), dy = s.get(d_y.data), open = cpu::sigmoid<T>(x);
        cpu::Vec<T> const slope = open * (T(1) + x * (T(1) - open));
        if (up.empty()) {
          s.put(d_gate.data, dy * slope);
        } else {
          s.put(d_gate.data, dy * s.get(up.data) * slope);
          s.put(d_up.data, dy * x * open);
        }
      });
    });
  }
};

template <> struct On<SigmoidGate, Cpu> : InFloat<SigmoidGate, Cpu> {
  using InFloat::forward, InFloat::backward;
  template <std::floating_point T> static void forward(Cpu& cpu, View<T const, 1> x, View<T const, 1> z, View<T, 1> y) {
    parallel_blocks(cpu, y.count(), cpu::element_grain, [&](Index first, Index last) {
      cpu::for_each_vector<T>(
          first, last, [&](cpu::Slot<T> s) HYBRIDATTN_INLINE_LAMBDA { s.put(y.data, s.get(x.data) * cpu::sigmoid<T>(s.get(z.data))); });
    });
  }
  template <std::floating_point T>
  static void backward(Cpu& cpu, View<T const, 1> x, View<T const, 1> z, View<T const, 1> d_y, View<T, 1> d_x, View<T, 1> d_z) {
    parallel_blocks(cpu, d_y.count(), cpu::element_grain, [&](Index first, Index last) {
      cpu::for_each_vector<T>(first, last, [&](cpu::Slot<T> s) HYBRIDATTN_INLINE_LAMBDA {
        cpu::Vec<T> const open = cpu::sigmoid<T>(s.get(z.data)), dy = s.get(d_y.data);
        s.put(d_x.data, dy * open);
        s.put(d_z.data, dy * s.get(x.data) * open * (T(1) - open));
      });
    });
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
#endif

// ==== hybridattn/ops/rms_norm/rms_norm.hpp
// RMSNorm over the last axis (arXiv 1910.07467), one row at a time:
//   y = x rstd w (plain) or x rstd (1 + w) (zero-centred),   rstd = (mean x^2 + eps)^-1/2
//   with g = d_y w (or d_y (1 + w)) and xh = x rstd:   d_x = rstd (g - xh mean(g xh))      d_w = sum d_y xh
// and its gated form, norm before gate, as in Gated DeltaNet:   y = x rstd w silu(z)
#ifndef HYBRIDATTN_OPS_RMS_NORM_RMS_NORM_HPP
#define HYBRIDATTN_OPS_RMS_NORM_RMS_NORM_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

enum class NormWeight { plain, zero_centred };

//   forward (backend, options, x, w, y)              x, y [N, C], w [C]
//   backward(backend, options, x, w, d_y, d_x, d_w, into)   d_x is added or overwritten; overwrites d_w; rstd is formed again
struct RmsNorm {
  struct Options {
    NormWeight weight = NormWeight::zero_centred;
    double eps = 1e-6;
  };
};

//   forward (backend, eps, x, z, w, y)                     an empty z: no gate
//   backward(backend, eps, x, z, w, d_y, d_x, d_z, d_w)    overwrites all three
struct GatedRmsNorm {};

}  // namespace hybridattn::inline HYBRIDATTN_ABI

// ==== hybridattn/backend/cpu/sum_rows.hpp
// Sums over tokens in a fixed order: blocks of rows, combined in block order, for any number of threads.
#ifndef HYBRIDATTN_BACKEND_CPU_SUM_ROWS_HPP
#define HYBRIDATTN_BACKEND_CPU_SUM_ROWS_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::cpu {

// f(row, sum) adds the row's terms to sum [C]. total [C] is overwritten with the sum over all rows.
template <class T, class F> void sum_over_rows(Cpu& cpu, Index rows, View<T, 1> total, F f) {
  Index const C = total.extent(0), blocks = ceil_div(rows, sum_rows);
  Scratch<T> const partial{cpu, blocks * C};
  View<T, 2> const sums{partial.data(), {blocks, C}};
  parallel_for(cpu, blocks, [&](Index block, int) {
    std::fill_n(sums.row(block), C, T(0));
    for (Index row = block * sum_rows; row < std::min(rows, (block + 1) * sum_rows); ++row) f(row, sums.row(block));
  });
  std::fill_n(total.data, C, T(0));
  for (Index block = 0; block < blocks; ++block)
    for (Index c = 0; c < C; ++c) total(c) += sums(block, c);
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::cpu
#endif

// ==== hybridattn/ops/rms_norm/cpu.hpp
#ifndef HYBRIDATTN_OPS_RMS_NORM_CPU_HPP
#define HYBRIDATTN_OPS_RMS_NORM_CPU_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {
namespace cpu::detail {

template <class T> T row_rstd(T const* x, Index C, double eps) {
  T const squares = sum_vectors<T>(C, [&](Slot<T> s) HYBRIDATTN_INLINE_LAMBDA {
    Vec<T> const v = s.get(x);
    return v * v;
  });
  return inverse_root(squares / static_cast<T>(C) + static_cast<T>(eps));
}

}  // namespace cpu::detail

template <> struct On<RmsNorm, Cpu> : InFloat<RmsNorm, Cpu> {
  using InFloat::forward, InFloat::backward;
  template <std::floating_point T> static void forward(Cpu& cpu, RmsNorm::Options o, View<T const, 2> x, Wide<In<T>, 1> w, View<T, 2> y) {
    Index const C = x.extent(1);
    T const shift = o.weight == NormWeight::zero_centred ? T(1) : T(0);
    parallel_blocks(cpu, x.extent(0), cpu::sum_rows, [&](Index first, Index last) {
      for (Index n = first; n < last; ++n) {
        T const *row = x.row(n), rstd = cpu::detail::row_rstd(row, C, o.eps);
        cpu::for_each_vector<T>(
            0, C, [&](cpu::Slot<T> s) HYBRIDATTN_INLINE_LAMBDA { s.put(y.row(n), s.get(row) * rstd * (shift + s.get(w.data))); });
      }
    });
  }

  template <std::floating_point T>
  static void backward(Cpu& cpu, RmsNorm::Options o, View<T const, 2> x, Wide<In<T>, 1> w, View<T const, 2> d_y, View<T, 2> d_x,
                       Wide<Out<T>, 1> d_w, Into into) {
    Index const C = x.extent(1);
    T const shift = o.weight == NormWeight::zero_centred ? T(1) : T(0);
    cpu::sum_over_rows<T>(cpu, x.extent(0), d_w, [&](Index n, T* sum) {
      T const *xn = x.row(n), *d_yn = d_y.row(n), rstd = cpu::detail::row_rstd(xn, C, o.eps);
      T const along = cpu::sum_vectors<T>(
                          C, [&](cpu::Slot<T> s) HYBRIDATTN_INLINE_LAMBDA { return s.get(d_yn) * (shift + s.get(w.data)) * s.get(xn); }) *
                      rstd / static_cast<T>(C);
      cpu::for_each_vector<T>(0, C, [&](cpu::Slot<T> s) HYBRIDATTN_INLINE_LAMBDA {
        cpu::Vec<T> const xh = s.get(xn) * rstd, dy = s.get(d_yn);
        s.put(sum, s.get(sum) + dy * xh);
        cpu::Vec<T> const before = into == Into::add ? s.get(d_x.row(n)) : cpu::Vec<T>{};
        s.put(d_x.row(n), before + rstd * (dy * (shift + s.get(w.data)) - xh * along));
      });
    });
  }
};

template <> struct On<GatedRmsNorm, Cpu> : InFloat<GatedRmsNorm, Cpu> {
  using InFloat::forward, InFloat::backward;
  template <std::floating_point T> static void forward(Cpu& cpu, double eps, View<T const, 2> x, View<T const, 2> z, Wide<In<T>, 1> w,
                                                       View<T, 2> y) {
    Index const C = x.extent(1);
    parallel_blocks(cpu, x.extent(0), cpu::sum_rows, [&](Index first, Index last) {
      for (Index n = first; n < last; ++n) {
        T const *row = x.row(n), rstd = cpu::detail::row_rstd(row, C, eps);
        cpu::for_each_vector<T>(0, C, [&](cpu::Slot<T> s) HYBRIDATTN_INLINE_LAMBDA {
          cpu::Vec<T> normed = s.get(row) * rstd * s.get(w.data);
          if (!z.empty()) {
            cpu::Vec<T> const gate = s.get(z.row(n));
            normed *= gate * cpu::sigmoid<T>(gate);
          }
          s.put(y.row(n), normed);
        });
      }
    });
  }

  template <std::floating_point T>
  static void backward(Cpu& cpu, double eps, View<T const, 2> x, View<T const, 2> z, Wide<In<T>, 1> w, View<T const, 2> d_y,
                       View<T, 2> d_x, View<T, 2> d_z, Wide<Out<T>, 1> d_w) {
    Index const C = x.extent(1);
    cpu::sum_over_rows<T>(cpu, x.extent(0), d_w, [&](Index n, T* sum) {
      T const *xn = x.row(n), *d_yn = d_y.row(n), rstd = cpu::detail::row_rstd(xn, C, eps);
      T* const d_xn = d_x.row(n);
      // First d_xn holds d of the normed row: d_y w silu(z).
      cpu::for_each_vector<T>(0, C, [&](cpu::Slot<T> s) HYBRIDATTN_INLINE_LAMBDA {
        cpu::Vec<T> const xh = s.get(xn) * rstd, wide = s.get(w.data);
        cpu::Vec<T> dy = s.get(d_yn);
        if (!z.empty()) {
          cpu::Vec<T> const gate = s.get(z.row(n)), open = cpu::sigmoid<T>(gate);
          s.put(d_z.row(n), dy * xh * wide * (open * (T(1) + gate * (T(1) - open))));
          dy *= gate * open;
        }
        s.put(sum, s.get(sum) + dy * xh);
        s.put(d_xn, dy * wide);
      });
      T const along = cpu::sum_vectors<T>(C, [&](cpu::Slot<T> s) HYBRIDATTN_INLINE_LAMBDA { return s.get(d_xn) * s.get(xn); }) * rstd /
                      static_cast<T>(C);
      cpu::for_each_vector<T>(
          0, C, [&](cpu::Slot<T> s) HYBRIDATTN_INLINE_LAMBDA { s.put(d_xn, rstd * (s.get(d_xn) - s.get(xn) * rstd * along)); });
    });
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
#endif

// ==== hybridattn/ops/rope/rope.hpp
// Rotary positions (arXiv 2104.09864): pair number i of a head turns by position * theta^(-2i / rotary_dim).
// Pairs are (i, i + rotary_dim/2), or (2i, 2i + 1) when interleaved; entries from rotary_dim on stay as they are.
// Backward turns back.
#ifndef HYBRIDATTN_OPS_ROPE_ROPE_HPP
#define HYBRIDATTN_OPS_ROPE_ROPE_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

//   forward (backend, options, angles, positions, x, y)      x, y [N, H, D], positions [N]: the row of angles of each token, or
//                                                            nothing for row n of token n; y may be x
//   backward(backend, options, angles, positions, d_y, d_x)  d_x may be d_y
// They throw on a rotary_dim that is odd or does not fit the head.
struct Rope {
  struct Options {
    Index rotary_dim = 0;
    double theta = 10000;
    bool interleaved = false;
  };
};
//   forward(backend, options, positions, angles)   angles [P, 2, rotary_dim/2]: cosine and sine of these positions [P], or of
//                                                  0 .. P - 1 without positions; throws on a theta that is not positive, and on
//                                                  a GPU on a rotary_dim above 256
struct RopeAngles {};

// Throws Error where rotary_dim is odd or does not fit the head.
inline void check_rotary_dim(Rope::Options const& o, Index head_dim) {
  check(0 <= o.rotary_dim && o.rotary_dim <= head_dim && o.rotary_dim % 2 == 0, "Rope: rotary_dim ", o.rotary_dim,
        " is not allowed; it must be even, and in 0 .. ", head_dim, ", the size of a head");
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI

// ==== hybridattn/ops/rope/cpu.hpp
#ifndef HYBRIDATTN_OPS_ROPE_CPU_HPP
#define HYBRIDATTN_OPS_ROPE_CPU_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

namespace cpu::detail {
inline Index row_of(View<std::int32_t const, 1> positions, Index n) { return positions.empty() ? n : positions(n); }
}  // namespace cpu::detail

template <> struct On<RopeAngles, Cpu> {
  template <class T> static void forward(Cpu& cpu, Rope::Options o, View<std::int32_t const, 1> positions, View<T, 3> angles) {
    check_positive("Rope", "theta", o.theta);
    Index const half = angles.extent(2);
    cpu::Scratch<double> const frequencies{cpu, half};
    for (Index i = 0; i < half; ++i)
      frequencies.data()[i] = std::pow(o.theta, -2.0 * static_cast<double>(i) / static_cast<double>(o.rotary_dim));
    parallel_blocks(cpu, angles.extent(0), cpu::sum_rows, [&](Index first, Index last) {
      for (Index row = first; row < last; ++row)
        for (Index i = 0; i < half; ++i) {
          double const angle = static_cast<double>(cpu::detail::row_of(positions, row)) * frequencies.data()[i];
          angles(row, 0, i) = static_cast<T>(std::cos(angle));
          angles(row, 1, i) = static_cast<T>(std::sin(angle));
        }
    });
  }
};

template <> struct On<Rope, Cpu> : InFloat<Rope, Cpu> {
  using InFloat::forward, InFloat::backward;
  template <std::floating_point T>
  static void forward(Cpu& cpu, Rope::Options o, Wide<In<T>, 3> angles, View<std::int32_t const, 1> positions, View<T const, 3> x,
                      View<T, 3> y) {
    turn(cpu, o, angles, positions, x, y, T(1));
  }
  template <std::floating_point T>
  static void backward(Cpu& cpu, Rope::Options o, Wide<In<T>, 3> angles, View<std::int32_t const, 1> positions, View<T const, 3> d_y,
                       View<T, 3> d_x) {
    turn(cpu, o, angles, positions, d_y, d_x, T(-1));
  }

 private:
  template <class T>
  static void turn(Cpu& cpu, Rope::Options o, Wide<In<T>, 3> angles, View<std::int32_t const, 1> positions, View<T const, 3> x,
                   View<T, 3> y, T direction) {
    check_rotary_dim(o, x.extent(2));
    Index const half = o.rotary_dim / 2, step = o.interleaved ? 2 : 1, partner = o.interleaved ? 1 : half;
    parallel_blocks(cpu, x.extent(0), cpu::sum_rows, [&](Index first, Index last) {
      for (Index n = first; n < last; ++n) {
        Index const row = cpu::detail::row_of(positions, n);
        T const *cosine = half == 0 ? nullptr : angles.row(row, 0), *sine = half == 0 ? nullptr : angles.row(row, 1);
        for (Index h = 0; h < x.extent(1); ++h) {
          T const* from = x.row(n, h);
          T* to = y.row(n, h);
          for (Index i = 0; i < half; ++i) {
            T const a = from[i * step], b = from[i * step + partner], s = direction * sine[i];
            to[i * step] = a * cosine[i] - b * s;
            to[i * step + partner] = b * cosine[i] + a * s;
          }
          for (Index d = o.rotary_dim; d < x.extent(2); ++d) to[d] = from[d];
        }
      }
    });
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
#endif

// ==== hybridattn/attention/heads.hpp
// Common steps of layers with softmax heads, before and after the attention itself: norm and rotary on queries and
// keys, and the gate on the output.
#ifndef HYBRIDATTN_ATTENTION_HEADS_HPP
#define HYBRIDATTN_ATTENTION_HEADS_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

// RMSNorm over the entries of each query and key head: y = x rstd w (plain) or x rstd (1 + w) (zero-centred).
enum class QkNorm { none, plain, zero_centred };
// Which entries of a head turn together: (i, i + rotary_dim/2), or (2i, 2i + 1).
enum class Rotary { half_split, interleaved };

// Entries of a head that turn: an even number. head_dim * percent / 200 * 2, which a large head_dim does not overflow.
constexpr Index rotary_size(Index head_dim, int percent) { return (head_dim / 200 * percent + head_dim % 200 * percent / 200) * 2; }

// Rotary positions for all the heads of a layer, by the batch's angles.
template <class T, class B> class Rotation {
 public:
  Rotation(B& backend, SequencesOn<B> const& s, Index head_dim, int percent, Rotary pairs, double theta)
      : options_{rotary_size(head_dim, percent), theta, pairs == Rotary::interleaved} {
    if (!s.any_continue()) positions_ = s.table().positions;
    if (options_.rotary_dim == 0) return;
    angles_ = s.template angles<wide_t<T>>(backend, options_.rotary_dim, theta, [&](View<wide_t<T>, 3> angles) {
      On<RopeAngles, B>::forward(backend, options_, s.any_continue() ? s.table().positions : View<std::int32_t const, 1>{}, angles);
    });
  }
  bool turns() const { return !angles_.empty(); }
  // Both copy where rotary_percent is 0.
  void forward(B& backend, View<T const, 3> x, View<T, 3> y) const { On<Rope, B>::forward(backend, options_, angles_, positions_, x, y); }
  void backward(B& backend, View<T const, 3> d_y, View<T, 3> d_x) const {
    On<Rope, B>::backward(backend, options_, angles_, positions_, d_y, d_x);
  }

 private:
  Rope::Options options_;
  View<std::int32_t const, 1> positions_;   // [N]; empty: the angles have a row for each token
  View<wide_t<T> const, 3> angles_;
};

// One of q and k: raw [N, H, D] -> norm with weight [D] -> rotation -> x.
struct HeadNorm {
  QkNorm kind;
  double eps;

  RmsNorm::Options options() const { return {kind == QkNorm::plain ? NormWeight::plain : NormWeight::zero_centred, eps}; }
  // The initial weight: the norm then multiplies by 1.
  Initial start() const { return Initial::constant(kind == QkNorm::plain ? 1 : 0); }

  template <class B, class T>
  void forward(B& backend, Rotation<T, B> const& rotation, View<T const, 3> raw, Wide<In<T>, 1> weight, View<T, 3> x) const {
    if (kind == QkNorm::none) {
      rotation.forward(backend, raw, x);
      return;
    }
    On<RmsNorm, B>::forward(backend, options(), head_rows(raw), weight, head_rows(x));
    if (rotation.turns()) rotation.forward(backend, View<T const, 3>(x), x);
  }
  // Overwrites d_raw and d_weight.
  template <class B, class T>
  void backward(B& backend, Rotation<T, B> const& rotation, View<T const, 3> raw, Wide<In<T>, 1> weight, View<T const, 3> d_x,
                View<T, 3> d_raw, Wide<Out<T>, 1> d_weight) const {
    if (kind == QkNorm::none) {
      rotation.backward(backend, d_x, d_raw);
      return;
    }
    Tensor<T, 3, B> turned;
    if (rotation.turns()) {
      turned = {backend, d_x.shape};
      rotation.backward(backend, d_x, out(turned));
      d_x = in(turned);
    }
    On<RmsNorm, B>::backward(backend, options(), head_rows(raw), weight, head_rows(d_x), head_rows(d_raw), d_weight, Into::overwrite);
  }
};

// o * sigmoid(z), z the gate's projection of x.
struct SigmoidFinish {
  static constexpr bool gated = true;
  template <class S> using Params = Nothing<S>;

  template <class Config> static Params<Shapes> params(Config const&) { return {}; }
  template <class Config> static Params<Starts> starts(Config const&) { return {}; }

  template <class B, class Config, class T>
  static void forward(B& backend, Config const&, View<T const, 3> o, View<T const, 3> z, Params<In<T>>, View<T, 3> y) {
    On<SigmoidGate, B>::forward(backend, flat(o), flat(z), flat(y));
  }
  template <class B, class Config, class T>
  static void backward(B& backend, Config const&, View<T const, 3> o, View<T const, 3> z, Params<In<T>>, View<T const, 3> d_y,
                       View<T, 3> d_o, View<T, 3> d_z, Params<Out<T>>) {
    On<SigmoidGate, B>::backward(backend, flat(o), flat(z), flat(d_y), flat(d_o), flat(d_z));
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/attention/dsa/types.hpp
// Options, sizes and tensors of sparse attention. The equations are those of dsa.hpp.
#ifndef HYBRIDATTN_ATTENTION_DSA_TYPES_HPP
#define HYBRIDATTN_ATTENTION_DSA_TYPES_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

struct SparseOptions {
  int top_k = 64;                        // keys a query attends to; 0: top_k_percent sets their number
  int top_k_percent = 0;                 // of the sequence's length, at least one key; 0: top_k sets the number
  QkNorm qk_norm = QkNorm::zero_centred;
  bool output_gate = true;               // o * sigmoid(x w_gate)
  int rotary_percent = 25;
  Rotary rotary = Rotary::half_split;
  int index_rotary_percent = 0;          // half-split rotary on index_q and index_k
  bool index_norm = false;               // LayerNorm on index_k
};

namespace dsa {

struct Config {
  Index num_heads = 0;      // H;  0: the model's
  Index num_kv_heads = 0;   // HK; 0: num_heads
  Index head_dim = 0;       // D;  0: model_dim / num_heads
  double scale = 0;         // 0: head_dim^-1/2
  Index index_heads = 4;    // HI
  Index index_dim = 0;      // DI; 0: head_dim
  double index_scale = 0;   // 0: index_dim^-1/2
  double rope_theta = 10000;
  double norm_eps = 1e-6;   // of the q/k norm and of the indexer's LayerNorm
  double index_loss = 1;    // weight of the indexer's loss, a mean over tokens
  Stage stage = Stage::language_model;
};

template <class S> struct Inputs {
  Held<S, 3> q;        // [N, H, D]
  Held<S, 3> k, v;     // [N, HK, D]
  Held<S, 3> index_q;  // [N, HI, DI]
  Held<S, 2> index_k;  // [N, DI]     one key for all indexer heads
  Held<S, 2> index_w;  // [N, HI]
  HYBRIDATTN_FIELDS(q, k, v, index_q, index_k, index_w)
};
template <class S> struct Outputs {
  Held<S, 3> o;               // [N, H, D]
  Wide<S, 1> auxiliary_loss;  // [1], a sum over tokens; empty where no loss trains the indexer
  HYBRIDATTN_FIELDS(o, auxiliary_loss)
};
template <class S> struct Saved {
  Wide<S, 2> lse;        // [N, H], over the keys of S_t
  Whole<S, 2> indices;   // [N, k] ascending, relative to the start of the sequence, then -1; empty in the dense warm-up
  Wide<S, 1> index_lse;  // [N], over the same keys; empty where no loss trains the indexer
  HYBRIDATTN_FIELDS(lse, indices, index_lse)
};

// Keys and values of earlier tokens, after norms and rotary.
template <class S> struct Cache {
  Held<S, 4> keys, values;  // [batch, capacity, HK, D]
  Held<S, 3> index_keys;    // [batch, capacity, DI]
  HYBRIDATTN_FIELDS(keys, values, index_keys)
};

// The largest number of keys that a query selects, in a sequence of `length` tokens.
HYBRIDATTN_HD constexpr Index selection_size(SparseOptions o, Index length) {
  if (o.top_k_percent == 0) return o.top_k;
  Index const share = length * o.top_k_percent / 100;
  return share > 1 ? share : 1;
}

}  // namespace dsa

template <SparseOptions O> struct SparseAttention;

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/attention/dsa/cpu_attention.hpp
// Attention over chosen keys on the CPU, one query after the other. Heads that share keys go together.
#ifndef HYBRIDATTN_ATTENTION_DSA_CPU_ATTENTION_HPP
#define HYBRIDATTN_ATTENTION_DSA_CPU_ATTENTION_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::dsa {

// The keys that each query attends to: its chosen keys, or in the dense warm-up all keys that it sees.
class KeySets {
 public:
  KeySets(Cpu& cpu, SparseOptions o, Config const& c, Sequences const& s, View<std::int32_t const, 2> chosen)
      : options_(o), dense_(c.stage == Stage::dense_warm_up), chosen_(chosen), most_(dense_ ? s.longest() : chosen.extent(1)),
        all_(cpu, dense_ ? most_ : 0) {
    if (dense_) std::iota(all_.data(), all_.data() + most_, 0);
  }
  Index most() const { return most_; }
  // The keys of query t of a sequence.
  Keys of(Sequence s, Index t) const {
    if (dense_) return {all_.data(), t + 1};
    return {chosen_.row(s.start + t), std::min(selection_size(options_, s.length), t + 1)};
  }

 private:
  SparseOptions options_;
  bool dense_;
  View<std::int32_t const, 2> chosen_;
  Index most_;
  cpu::Scratch<std::int32_t> all_;   // 0, 1, 2, ...
};

// x, with zeros in the lanes after the last of `count` keys. x starts with key j.
template <class T> HYBRIDATTN_INLINE cpu::Vec<T> real_keys(Index j, Index count, cpu::Vec<T> x) {
  using Bits = typename cpu::BitsOf<T>::type;
  if (j + cpu::lanes<T> <= count) return x;
  return cpu::select<T>(cpu::lane_numbers<T>() < static_cast<Bits>(count - j), x, cpu::Vec<T>{});
}

// Scratch for heads that share a key/value head: numbers of each head for its keys, numbers of the heads, and two panels for tiles.
template <class T> struct HeadScratch {
  static Index size(Index D, Index heads, Index keys) { return 2 * heads * row(keys) + row(heads) + panels_size(D, heads); }

  HeadScratch(Index heads, Index keys, T* memory)
      : p{memory, row(keys)}, d_s(p.from(heads)), deltas(d_s[heads]), panels(deltas + row(heads)) {}

  Rows<T> p, d_s;   // [heads, keys]
  T *deltas, *panels;

 private:
  static Index row(Index count) { return round_up(count, tile_keys<T>); }
  static Index panels_size(Index D, Index heads) { return go_by_tiles(heads) ? 2 * panel_room<T>(D) : 0; }
};

// products[h][j] = x[h] . rows[key j] for all heads.
template <class T, class Dim>
HYBRIDATTN_INLINE void dot_heads(Dim D, Rows<T const> x, Index heads, Rows<T const> rows, Keys keys, T* panel, Rows<T> products) {
  if (go_by_tiles(heads)) return dot_rows_by_tiles<T>(D, x, heads, rows, keys, panel, products);
  attention::for_each_heads(heads,
                            [&](auto R, Index h) HYBRIDATTN_INLINE_LAMBDA { dot_rows<R, T>(D, x.from(h), rows, keys, products.from(h)); });
}

// Heads of one query that share a key/value head, in forward: rows [heads, D], lse [heads].
template <class T> struct QueryHeads {
  Rows<T const> q;
  Rows<T> o;
  wide_t<T>* lse;
};
// (3)
template <class T, class Dim>
void attend(Dim D, T scale, Index heads, QueryHeads<T> x, Rows<T const> k, Rows<T const> v, Keys keys, HeadScratch<T> const& scratch) {
  Rows<T> const p = scratch.p;
  dot_heads<T>(D, x.q, heads, k, keys, scratch.panels, p);
  attention::for_each_heads(heads, [&](auto R, Index h) HYBRIDATTN_INLINE_LAMBDA {
    T factors[std::size_t{R}];
    for (int r = 0; r < R; ++r) {
      auto const softmax = attention::exponentials(scale, keys.count, p[h + r]);
      factors[r] = T(1) / softmax.total;
      x.lse[h + r] = static_cast<wide_t<T>>(softmax.lse());
    }
    attention::for_each_sum<R, T>(D, p.from(h), v, keys, [&](auto piece, int r, int i, cpu::Vec<T> sum) HYBRIDATTN_INLINE_LAMBDA {
      piece.put(x.o[h + r], i, factors[r] * sum);
    });
  });
  auto const key_at = [&](Index j) { return attention::KeyRows<T>{k[keys[j]], v[keys[j]]}; };
  for (Index h = 0; h < heads; ++h) {
    if (attention::is_moderate<T>(D, x.o[h])) continue;
    T const exact = attention::attend_in_order<T>(D, scale, x.q[h], keys.count, key_at, x.o[h]);
    if (!attention::Range<T>::holds(static_cast<T>(x.lse[h]))) x.lse[h] = static_cast<wide_t<T>>(exact);  // otherwise only values are large
  }
}

// The same heads in backward.
template <class T> struct HeadGradients {
  Rows<T const> q, o, d_o;
  wide_t<T> const* lse;
  Rows<T> d_q;
};
template <class T, class Dim> void set_deltas(Dim D, Index heads, HeadGradients<T> const& x, T* panels, T* deltas) {
  if (go_by_tiles(heads)) return deltas_by_tiles<T>(D, x.o, x.d_o, heads, panels, deltas);
  for (Index h = 0; h < heads; ++h) deltas[h] = dot_row<T>(D, x.d_o[h], x.o[h]);
}
// (4): overwrites d_q, adds to d_k and d_v.
template <class T, class Dim>
void attend_backward(Dim D, T scale, Index heads, HeadGradients<T> const& x, Rows<T const> k, Rows<T const> v, Keys keys,
                     HeadScratch<T> const& scratch, Rows<T> d_k, Rows<T> d_v) {
  Rows<T> const p = scratch.p, d_s = scratch.d_s;
  dot_heads<T>(D, x.q, heads, k, keys, scratch.panels, p);
  dot_heads<T>(D, x.d_o, heads, v, keys, scratch.panels, d_s);
  set_deltas<T>(D, heads, x, scratch.panels, scratch.deltas);
  for (Index h = 0; h < heads; ++h) {
    T const delta = scratch.deltas[h], lse = static_cast<T>(x.lse[h]);
    for (Index j = 0; j < keys.count; j += cpu::lanes<T>) {
      cpu::Vec<T> const e = cpu::exp<T>(cpu::in_register<T>(scale * cpu::load(p[h] + j)) - lse);  // a score rounded like lse
      cpu::store<T>(p[h] + j, e);
      cpu::store<T>(d_s[h] + j, scale * e * (cpu::load(d_s[h] + j) - delta));
    }
  }
  attention::for_each_heads(heads,
                            [&](auto R, Index h) HYBRIDATTN_INLINE_LAMBDA { weighted_rows<R, T>(D, d_s.from(h), k, keys, x.d_q.from(h)); });
  attention::add_to_rows<T>(D, d_s, x.q, heads, keys, d_k);
  attention::add_to_rows<T>(D, p, x.d_o, heads, keys, d_v);
}

// A task is a key/value head and some of its queries, whose keys and values stay in the second-level cache.
template <class T, class Dim>
void attend_all(Cpu& cpu, Dim D, KeySets const& sets, Config const& c, Sequences const& s, Inputs<In<T>> x, Outputs<Out<T>> y,
                Saved<Out<T>> saved) {
  constexpr Index piece = 64;
  Index const HK = c.num_kv_heads, group = c.num_heads / HK, pieces = ceil_div(s.longest(), piece), most = sets.most();
  Tensor<T, 2, Cpu> scratch{cpu, {Index{cpu.threads()}, HeadScratch<T>::size(c.head_dim, group, most)}};
  auto const memory = out(scratch);
  parallel_for(cpu, s.count() * HK * pieces, [&](Index task, int thread) {
    Sequence const sequence = s[static_cast<std::size_t>(task / pieces / HK)];
    Index const hk = task / pieces % HK, first = task % pieces * piece, last = std::min(first + piece, sequence.length);
    if (first >= last) return;
    Rows<T const> const k = head_of(x.k, sequence, hk), v = head_of(x.v, sequence, hk);
    for (Index t = first; t < last; ++t) {
      Index const n = sequence.start + t, h = hk * group;
      attend<T>(D, static_cast<T>(c.scale), group, {heads_of(x.q, n, h), heads_of(y.o, n, h), saved.lse.row(n) + h}, k, v,
                sets.of(sequence, t), {group, most, memory.row(thread)});
    }
  });
}

// One task owns a key/value head of a sequence. So no two tasks write the same row, and a task's sums run over the queries in order.
template <class T, class Dim>
void attend_all_backward(Cpu& cpu, Dim D, KeySets const& sets, Config const& c, Sequences const& s, Inputs<In<T>> x, Outputs<In<T>> y,
                         Saved<In<T>> saved, Outputs<In<T>> d_y, Inputs<Out<T>> d_x) {
  Index const HK = c.num_kv_heads, group = c.num_heads / HK, most = sets.most();
  Tensor<T, 2, Cpu> scratch{cpu, {Index{cpu.threads()}, HeadScratch<T>::size(c.head_dim, group, most)}};
  auto const memory = out(scratch);
  parallel_for(cpu, s.count() * HK, [&](Index task, int thread) {
    Sequence const sequence = s[static_cast<std::size_t>(task / HK)];
    if (sequence.length == 0) return;
    Index const hk = task % HK, h = hk * group;
    Rows<T const> const k = head_of(x.k, sequence, hk), v = head_of(x.v, sequence, hk);
    Rows<T> const d_k = head_of(d_x.k, sequence, hk), d_v = head_of(d_x.v, sequence, hk);
    HeadScratch<T> const numbers{group, most, memory.row(thread)};
    for (Index j = 0; j < sequence.length; ++j) {
      std::fill_n(d_k[j], D, T(0));
      std::fill_n(d_v[j], D, T(0));
    }
    for (Index t = 0; t < sequence.length; ++t) {
      Index const n = sequence.start + t;
      HeadGradients<T> const heads{heads_of(x.q, n, h), heads_of(y.o, n, h), heads_of(d_y.o, n, h), saved.lse.row(n) + h,
                                   heads_of(d_x.q, n, h)};
      attend_backward<T>(D, static_cast<T>(c.scale), group, heads, k, v, sets.of(sequence, t), numbers, d_k, d_v);
    }
  });
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::dsa
#endif

// ==== hybridattn/ops/top_k/top_k.hpp
// The k largest scores of a row, exactly: an order on (score, index) and no approximation.
//   Equal scores go to the smaller index; -0 equals +0; NaN of either sign ranks below every number, -infinity included, and NaNs
//   go to the smaller index. So a row always gives min(k, n) indices, however many of its scores are finite.
//   The chosen indices come in ascending order, followed by -1 where a row has fewer than k scores.
#ifndef HYBRIDATTN_OPS_TOP_K_TOP_K_HPP
#define HYBRIDATTN_OPS_TOP_K_TOP_K_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

//   forward(backend, scores, indices)   scores [R, n], indices [R, k] int32
struct TopK {};

}  // namespace hybridattn::inline HYBRIDATTN_ABI

// ==== hybridattn/ops/top_k/cpu.hpp
#ifndef HYBRIDATTN_OPS_TOP_K_CPU_HPP
#define HYBRIDATTN_OPS_TOP_K_CPU_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {
namespace cpu {

// One row: scores become integers in the same order, and the k-th largest is found by halving the interval it lies in. A step
// counts the larger keys, a vector at a time; it ends as soon as a bound has exactly k keys above it, after about 16 steps
// of 32 when scores are random.
template <class T> class RowTopK {
 public:
  using Key = typename BitsOf<T>::type;
  // Keys that a row of n scores needs room for.
  static Index scratch(Index n) { return round_up(n, lanes<T>); }

  RowTopK(T const* scores, Index n, Key* keys) : keys_(keys), n_(n) {
    Mask<T> largest = broadcast_key(lowest);
    for_each_vector<T>(0, n, [&](Slot<T> s) HYBRIDATTN_INLINE_LAMBDA {
      Mask<T> key = ordered(s.get(scores));
      if (s.count < lanes<T>) key = lane_numbers<T>() < static_cast<Key>(s.count) ? key : broadcast_key(lowest);
      largest = key > largest ? key : largest;
      store<Key>(keys_ + s.i, key);
    });
    for (int lane = 0; lane < lanes<T>; ++lane) largest_ = std::max(largest_, static_cast<Key>(largest[lane]));
  }

  // k <= n of them, ascending.
  void select(Index k, std::int32_t* indices) const {
    Bound const bound = find(k);
    Index const tied = end_of_ties(bound);
    Index chosen = 0, i = 0;
    for (; i < tied; ++i) chosen = take(i, bound.key - 1, indices, chosen);
    for (; i < n_ && chosen < k; ++i) chosen = take(i, bound.key, indices, chosen);
  }

 private:
  // The chosen keys: those above `key`, and the first `ties` of those equal to it.
  struct Bound {
    Key key;
    Index ties;
  };
  static constexpr Key lowest = std::numeric_limits<Key>::min();   // no score: padding

  static Mask<T> broadcast_key(Key key) { return Mask<T>{} + key; }
  // Bits of floating point numbers are in order of size, those of negative ones reversed. Adding 0 makes +0 of -0.
  static Mask<T> ordered(Vec<T> x) {
    constexpr int sign = 8 * sizeof(Key) - 1;
    Mask<T> const bits = reinterpret_cast<Mask<T>>(x + T(0)), key = bits ^ ((bits >> sign) & std::numeric_limits<Key>::max());
    return x == x ? key : broadcast_key(lowest + 1);
  }

  // Without a branch: what is not chosen is overwritten by the next.
  HYBRIDATTN_INLINE Index take(Index i, Key above, std::int32_t* indices, Index chosen) const {
    indices[chosen] = static_cast<std::int32_t>(i);
    return chosen + (keys_[i] > above);
  }
  // Behind the last tie that is chosen.
  Index end_of_ties(Bound bound) const {
    Index i = 0;
    for (Index left = bound.ties; i < n_ && left > 0; ++i) left -= keys_[i] == bound.key;
    return i;
  }
  Index count_above(Key bound) const {
    Mask<T> count{};
    for (Index i = 0; i < n_; i += lanes<T>) count -= load<Key>(keys_ + i) > bound;
    return static_cast<Index>(sum<Key>(count));
  }
  Bound find(Index k) const {
    Key low = lowest, high = largest_;   // more than k keys are above low, or all; fewer than k above high
    Index above = 0;                     // high
    while (high > low + 1) {
      Key const middle = std::midpoint(low, high);
      Index const count = count_above(middle);
      if (count == k) return {middle, 0};
      low = count > k ? middle : low;
      high = count > k ? high : middle;
      above = count > k ? above : count;
    }
    return {high, k - above};
  }

  Key* keys_;
  Index n_;
  Key largest_ = lowest;
};

}  // namespace cpu

template <> struct On<TopK, Cpu> : InFloat<TopK, Cpu> {
  using InFloat::forward;
  template <std::floating_point T> static void forward(Cpu& cpu, View<T const, 2> scores, View<std::int32_t, 2> indices) {
    using Row = cpu::RowTopK<T>;
    Index const n = scores.extent(1), k = indices.extent(1), chosen = std::min(n, k);
    Tensor<typename Row::Key, 2, Cpu> scratch{cpu, {Index{cpu.threads()}, Row::scratch(n)}};
    auto const keys = out(scratch);
    parallel_for(cpu, scores.extent(0), [&](Index r, int thread) {
      if (chosen > 0) Row{scores.row(r), n, keys.row(thread)}.select(chosen, indices.row(r));
      std::fill(indices.row(r) + chosen, indices.row(r) + k, -1);
    });
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
#endif

// ==== hybridattn/attention/dsa/cpu_indexer.hpp
// The indexer on the CPU: scores a tile at a time, then each query's choice. There are T x T scores in all, but a thread stores
// only the rows of a few queries.
#ifndef HYBRIDATTN_ATTENTION_DSA_CPU_INDEXER_HPP
#define HYBRIDATTN_ATTENTION_DSA_CPU_INDEXER_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::dsa {

inline constexpr int panel_vectors = 4;
template <class T> inline constexpr Index panel_keys = panel_vectors * cpu::lanes<T>;
inline constexpr Index panel_queries = 8;   // queries that take turns on a panel while it is in the first-level cache

// Panel p of the index keys of a sequence: [DI, panel_keys] of consecutive keys, zero after the last key.
template <class T> void pack_panel(Index DI, View<T const, 2> keys, Sequence sequence, Index p, T* panel) {
  constexpr Index n = cpu::lanes<T>;
  for (Index j = 0; j < panel_keys<T>; j += n)
    for (Index d = 0; d < DI; d += n) {
      Index const first = p * panel_keys<T> + j;
      T* const to = panel + d * panel_keys<T> + j;
      if (first + n <= sequence.length && d + n <= DI) {
        cpu::transpose<T>(keys.row(sequence.start + first) + d, keys.stride[0], to, panel_keys<T>);
        continue;
      }
      alignas(cpu::vector_bytes) T square[std::size_t{n * n}] = {};
      for (Index i = first, row = 0; row < n && i < sequence.length; ++i, ++row)
        std::copy_n(keys.row(sequence.start + i) + d, std::min(n, DI - d), square + row * n);
      cpu::transpose<T>(square, n, to, panel_keys<T>);
    }
}

// The index keys of a batch in panels.
template <class T> class KeyPanels {
 public:
  KeyPanels(Cpu& cpu, Sequences const& s, Index DI)
      : depth_(DI), memory_{cpu, {s.tokens() / panel_keys<T> + s.count(), round_up(DI, cpu::lanes<T>) * panel_keys<T>}},
        panels_(out(memory_)) {}

  // Panel p of sequence i. A sequence of length T has room for ceil(T / panel_keys) or more panels before those of the next sequence.
  T* panel(Sequences const& s, Index i, Index p) const { return panels_.row(s[static_cast<std::size_t>(i)].start / panel_keys<T> + i + p); }

  void pack(View<T const, 2> keys, Sequence sequence, Index p, T* panel) const { pack_panel<T>(depth_, keys, sequence, p, panel); }

 private:
  Index depth_;
  Tensor<T, 2, Cpu> memory_;
  View<T, 2> panels_;
};

// scores [panel_keys] (+)= the share of MR heads in (1): the rows of a tile are the heads of one query.
template <int MR, class T>
HYBRIDATTN_INLINE void score_heads(Index DI, cpu::Scalars<T> q, T const* weights, T const* panel, bool first_heads, T* scores) {
  constexpr int NV = std::min(panel_vectors, cpu::tuning.index_sums / MR);
  for (Index column = 0; column < panel_keys<T>; column += NV * cpu::lanes<T>) {
    cpu::Vec<T> sum[std::size_t{NV}];
    HYBRIDATTN_UNROLL
    for (int v = 0; v < NV; ++v) sum[v] = first_heads ? cpu::Vec<T>{} : cpu::load(scores + column + v * cpu::lanes<T>);
    cpu::tile<MR, NV, T>(
        DI, q, {panel + column, panel_keys<T>}, [](int, int) HYBRIDATTN_INLINE_LAMBDA { return cpu::Vec<T>{}; },
        [&](int r, int v, cpu::Vec<T> x) HYBRIDATTN_INLINE_LAMBDA { sum[v] += weights[r] * cpu::max<T>(cpu::Vec<T>{}, x); });
    HYBRIDATTN_UNROLL
    for (int v = 0; v < NV; ++v) cpu::store<T>(scores + column + v * cpu::lanes<T>, sum[v]);
  }
}
// (1) for one query and the keys of a panel. The weights are multiplied by index_scale: it is positive, so relu does not change it.
template <class T> HYBRIDATTN_INLINE void score_panel(Config const& c, cpu::Scalars<T> q, T const* weights, T const* panel, T* scores) {
  Index const HI = c.index_heads, DI = c.index_dim;
  Index j = 0;
  auto const from = [&] { return cpu::Scalars<T>{q.data + j * q.row, q.row, 1}; };
  for (; j + 8 <= HI; j += 8) score_heads<8>(DI, from(), weights + j, panel, j == 0, scores);
  for (; j + 4 <= HI; j += 4) score_heads<4>(DI, from(), weights + j, panel, j == 0, scores);
  for (; j < HI; ++j) score_heads<1>(DI, from(), weights + j, panel, j == 0, scores);
}

// Computes a thread's rows of scores, and chooses keys from them.
template <class T> class Chooser {
 public:
  using Row = cpu::RowTopK<T>;
  static Index row_size(Index longest) { return round_up(longest, panel_keys<T>); }
  static Index scratch(Config const& c, Index longest) { return panel_queries * (row_size(longest) + c.index_heads); }

  Chooser(Config const& c, Inputs<In<T>> x, Index longest, T* memory, typename Row::Key* keys)
      : c_(c), x_(x), row_(row_size(longest)), scores_(memory), weights_(scores_ + panel_queries * row_), keys_(keys) {}

  // Chooses keys for the queries first .. last - 1 of sequence i.
  void run(SparseOptions o, Sequences const& s, Index i, Index first, Index last, KeyPanels<T> const& panels,
           View<std::int32_t, 2> indices) {
    Sequence const sequence = s[static_cast<std::size_t>(i)];
    Index const k = selection_size(o, sequence.length);
    for (Index t = first; t < last; t += panel_queries) {
      Index const end = std::min(last, t + panel_queries);
      if (k < end) score(s, i, t, end, panels);
      for (Index query = t; query < end; ++query)
        choose(std::min(k, query + 1), query, scores_ + (query - t) * row_, indices.row(sequence.start + query), indices.extent(1));
    }
  }

 private:
  void score(Sequences const& s, Index i, Index first, Index last, KeyPanels<T> const& panels) {
    Index const start = s[static_cast<std::size_t>(i)].start, HI = c_.index_heads;
    for (Index t = first; t < last; ++t)
      for (Index j = 0; j < HI; ++j) weights_[(t - first) * HI + j] = static_cast<T>(c_.index_scale) * x_.index_w(start + t, j);
    for (Index p = 0; p * panel_keys<T> < last; ++p) {
      T const* const panel = panels.panel(s, i, p);
      for (Index t = std::max(first, p * panel_keys<T>); t < last; ++t)
        score_panel<T>(c_, {x_.index_q.row(start + t, 0), x_.index_q.stride[1], 1}, weights_ + (t - first) * HI, panel,
                       scores_ + (t - first) * row_ + p * panel_keys<T>);
    }
  }
  // (2). A query that sees at most k keys chooses all of them.
  void choose(Index k, Index t, T const* scores, std::int32_t* indices, Index columns) {
    if (k == t + 1) std::iota(indices, indices + k, 0);
    else Row{scores, t + 1, keys_}.select(k, indices);
    std::fill(indices + k, indices + columns, -1);
  }

  Config const& c_;
  Inputs<In<T>> x_;
  Index row_;
  T *scores_, *weights_;          // [panel_queries, row_], [panel_queries, HI]
  typename Row::Key* keys_;
};

// Tasks are pieces of a sequence's queries, those with the most keys first.
template <class T>
void choose_keys(Cpu& cpu, SparseOptions o, Config const& c, Sequences const& s, Inputs<In<T>> x, View<std::int32_t, 2> indices) {
  Index const count = s.count(), longest = s.longest(), threads = cpu.threads();
  KeyPanels<T> const panels{cpu, s, c.index_dim};
  Tensor<T, 2, Cpu> scores{cpu, {threads, Chooser<T>::scratch(c, longest)}};
  Tensor<typename Chooser<T>::Row::Key, 2, Cpu> keys{cpu, {threads, Chooser<T>::Row::scratch(longest)}};
  auto const score_memory = out(scores);
  auto const key_memory = out(keys);
  parallel_for(cpu, count * ceil_div(longest, panel_keys<T>), [&](Index task, int) {
    Index const i = task % count, p = task / count;
    Sequence const sequence = s[static_cast<std::size_t>(i)];
    if (p * panel_keys<T> < sequence.length && selection_size(o, sequence.length) < sequence.length)
      panels.pack(x.index_k, sequence, p, panels.panel(s, i, p));
  });
  Index const piece = round_up(ceil_div(longest * count, 8 * threads), panel_queries), pieces = ceil_div(longest, piece);
  parallel_for(cpu, count * pieces, [&](Index task, int thread) {
    Index const i = task % count, first = (pieces - 1 - task / count) * piece;
    Index const last = std::min(first + piece, s[static_cast<std::size_t>(i)].length);
    if (first >= last) return;
    Chooser<T>{c, x, longest, score_memory.row(thread), key_memory.row(thread)}.run(o, s, i, first, last, panels, indices);
  });
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::dsa
#endif

// ==== hybridattn/attention/dsa/cpu_extend.hpp
// Decoding on the CPU: queries over the keys of a cache. Scores and attention use the sums of cpu_indexer.hpp and
// cpu_attention.hpp. So a query chooses the same keys and gives the same bits in a prompt and in a later step.
#ifndef HYBRIDATTN_ATTENTION_DSA_CPU_EXTEND_HPP
#define HYBRIDATTN_ATTENTION_DSA_CPU_EXTEND_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::dsa {

// Chooses keys for a few queries at a time: threads share out the panels of keys, then the queries.
template <class T> class CachedIndexer {
 public:
  CachedIndexer(Cpu& cpu, Config const& c, Sequences const& s, Inputs<In<T>> const& x, View<T const, 3> index_keys,
                View<std::int32_t, 2> indices)
      : cpu_(cpu), c_(c), s_(s), x_(x), index_keys_(index_keys), indices_(indices), depth_(round_up(c.index_dim, cpu::lanes<T>)),
        scores_(cpu, {queries, round_up(index_keys.extent(1), panel_keys<T>)}),
        panels_(cpu, {Index{cpu.threads()}, depth_ * panel_keys<T> + c.index_heads}),
        keys_(cpu, {Index{cpu.threads()}, Row::scratch(index_keys.extent(1))}), score_rows_(out(scores_)), panel_rows_(out(panels_)),
        key_rows_(out(keys_)) {}

  // (2) for every token of the sequences with past tokens.
  void run() {
    Index const parts = ceil_div(score_rows_.extent(1), part_keys);
    for (Index first = 0; first < s_.tokens(); first += queries) {
      Index const count = std::min(queries, s_.tokens() - first);
      parallel_for(cpu_, count * parts, [&](Index task, int thread) { score(first + task / parts, task / parts, task % parts, thread); });
      parallel_for(cpu_, count, [&](Index query, int thread) { choose(first + query, query, thread); });
    }
  }

 private:
  using Row = cpu::RowTopK<T>;
  static constexpr Index queries = 8, part_keys = 8 * panel_keys<T>;

  Sequence sequence_of(Index n) const { return s_[static_cast<std::size_t>(s_.owners()(n))]; }
  Index seen_by(Index n) const { return s_.positions()(n) + 1; }
  Index chosen_by(Index n) const { return std::min(indices_.extent(1), seen_by(n)); }

  // (1) for some keys. A query that chooses all keys that it sees needs no scores.
  void score(Index n, Index query, Index part, int thread) {
    if (sequence_of(n).past == 0 || chosen_by(n) == seen_by(n)) return;
    Index const owner = s_.owners()(n), last = std::min((part + 1) * part_keys, seen_by(n));
    View<T const, 2> const keys{index_keys_.row(owner, 0), {seen_by(n), c_.index_dim}, {index_keys_.stride[1], 1}};
    T *const panel = panel_rows_.row(thread), *const weights = panel + depth_ * panel_keys<T>;
    for (Index j = 0; j < c_.index_heads; ++j) weights[j] = static_cast<T>(c_.index_scale) * x_.index_w(n, j);
    for (Index p = part * part_keys / panel_keys<T>; p * panel_keys<T> < last; ++p) {
      pack_panel<T>(c_.index_dim, keys, {0, seen_by(n)}, p, panel);
      score_panel<T>(c_, {x_.index_q.row(n, 0), x_.index_q.stride[1], 1}, weights, panel, score_rows_.row(query) + p * panel_keys<T>);
    }
  }
  void choose(Index n, Index query, int thread) {
    if (sequence_of(n).past == 0) return;
    std::int32_t* const indices = indices_.row(n);
    if (chosen_by(n) == seen_by(n)) std::iota(indices, indices + chosen_by(n), 0);
    else Row{score_rows_.row(query), seen_by(n), key_rows_.row(thread)}.select(chosen_by(n), indices);
  }

  Cpu& cpu_;
  Config const& c_;
  Sequences const& s_;
  Inputs<In<T>> x_;
  View<T const, 3> index_keys_;
  View<std::int32_t, 2> indices_;
  Index depth_;
  Tensor<T, 2, Cpu> scores_, panels_;   // [queries, capacity], [threads, a panel and weights]
  Tensor<typename Row::Key, 2, Cpu> keys_;
  View<T, 2> score_rows_, panel_rows_;
  View<typename Row::Key, 2> key_rows_;
};

// (3) for every token of the sequences with past tokens, over all keys if indices are empty. Tasks are groups of heads.
template <class T>
void attend_cached(Cpu& cpu, Config const& c, Sequences const& s, Inputs<In<T>> x, Cache<Out<T>> cache, View<std::int32_t const, 2> indices,
                   View<T, 3> o) {
  Index const capacity = cache.keys.extent(1), HK = c.num_kv_heads, group = c.num_heads / HK;
  Index const most = indices.empty() ? capacity : std::min(capacity, indices.extent(1));
  Tensor<T, 2, Cpu> scratch{cpu, {Index{cpu.threads()}, HeadScratch<T>::size(c.head_dim, group, most)}};
  Tensor<wide_t<T>, 2, Cpu> lse{cpu, {s.tokens(), c.num_heads}};
  cpu::Scratch<std::int32_t> const all{cpu, indices.empty() ? capacity : 0};
  if (indices.empty()) std::iota(all.data(), all.data() + capacity, 0);
  auto const memory = out(scratch);
  auto const lse_rows = out(lse);   // which nobody reads
  parallel_for(cpu, s.tokens() * HK, [&](Index task, int thread) {
    Index const n = task / HK, hk = task % HK, h = hk * group, i = s.owners()(n);
    if (s[static_cast<std::size_t>(i)].past == 0) return;
    Keys const keys{indices.empty() ? all.data() : indices.row(n), std::min<Index>(most, s.positions()(n) + 1)};
    Rows<T const> const k{cache.keys.row(i, 0, hk), cache.keys.stride[1]}, v{cache.values.row(i, 0, hk), cache.values.stride[1]};
    attend<T>(c.head_dim, static_cast<T>(c.scale), group, {heads_of(x.q, n, h), heads_of(o, n, h), lse_rows.row(n) + h}, k, v, keys,
              {group, most, memory.row(thread)});
  });
}

template <class T> void remember(Cpu& cpu, Sequences const& s, Inputs<In<T>> x, Cache<Out<T>> cache) {
  Index const HK = cache.keys.extent(2), D = cache.keys.extent(3);
  parallel_blocks(cpu, s.tokens(), 16, [&](Index first, Index last) {
    for (Index n = first; n < last; ++n) {
      Index const i = s.owners()(n), position = s.positions()(n);
      for (Index hk = 0; hk < HK; ++hk) {
        std::copy_n(x.k.row(n, hk), D, cache.keys.row(i, position, hk));
        std::copy_n(x.v.row(n, hk), D, cache.values.row(i, position, hk));
      }
      std::copy_n(x.index_k.row(n), x.index_k.extent(1), cache.index_keys.row(i, position));
    }
  });
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::dsa
#endif

// ==== hybridattn/attention/dsa/cpu_kl.hpp
// The indexer's loss on the CPU. Scores and attention's weights are computed again where they are needed, a query at a time.
#ifndef HYBRIDATTN_ATTENTION_DSA_CPU_KL_HPP
#define HYBRIDATTN_ATTENTION_DSA_CPU_KL_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::dsa {

// A query's distribution by the indexer, and its target: a number for each of its keys, in memory of the caller.
template <class T> class KlQuery {
 public:
  KlQuery(Config const& c, Inputs<In<T>> const& x, Sequence s, Index t, Keys keys) : c_(c), x_(x), s_(s), n_(s.start + t), keys_(keys) {}

  // products [HI, room]: iq_j . ik_s. scores: (1)
  HYBRIDATTN_INLINE void score(T* products, Index room, T* scores) const {
    attention::for_each_heads(c_.index_heads, [&](auto R, Index j) HYBRIDATTN_INLINE_LAMBDA {
      dot_rows<R, T>(c_.index_dim, heads_of(x_.index_q, n_, j), index_keys(), keys_, {products + j * room, room});
    });
    for_each_vector([&](Index i) HYBRIDATTN_INLINE_LAMBDA {
      cpu::Vec<T> sum{};
      for (Index j = 0; j < c_.index_heads; ++j) sum += weight(j) * cpu::max<T>(cpu::Vec<T>{}, cpu::load(products + j * room + i));
      cpu::store<T>(scores + i, sum);
    });
  }
  // target: p of (5). The products have the order of attend, whose lse would not fit others.
  HYBRIDATTN_INLINE void share(Wide<In<T>, 2> lse, HeadScratch<T> const& heads, T* target) const {
    Index const group = c_.num_heads / c_.num_kv_heads;
    for_each_vector([&](Index i) HYBRIDATTN_INLINE_LAMBDA { cpu::store<T>(target + i, cpu::Vec<T>{}); });
    for (Index hk = 0; hk < c_.num_kv_heads; ++hk) {
      dot_heads<T>(c_.head_dim, heads_of(x_.q, n_, hk * group), group, head_of(x_.k, s_, hk), keys_, heads.panels, heads.p);
      for (Index g = 0; g < group; ++g) add_weights(heads.p[g], static_cast<T>(lse(n_, hk * group + g)), target);
    }
  }
  // index_lse of (5), and the query's part of (6).
  HYBRIDATTN_INLINE T log_sum(T const* scores) const {
    cpu::Vec<T> most = cpu::broadcast<T>(-std::numeric_limits<T>::infinity()), sum{};
    for_each_vector([&](Index i) HYBRIDATTN_INLINE_LAMBDA { most = cpu::max<T>(most, cpu::load(scores + i)); });
    T const largest = cpu::largest<T>(most);
    for_each_vector([&](Index i) HYBRIDATTN_INLINE_LAMBDA { sum += real(i, cpu::exp<T>(cpu::load(scores + i) - largest)); });
    return attention::OnlineSoftmax<T>{largest, cpu::sum<T>(sum)}.lse();
  }
  HYBRIDATTN_INLINE T divergence(T const* scores, T const* target, T index_lse) const {
    cpu::Vec<T> sum{};
    for_each_vector([&](Index i) HYBRIDATTN_INLINE_LAMBDA {
      cpu::Vec<T> const p = cpu::load(target + i), log_p = std::numbers::ln2_v<T> * cpu::log2<T>(cpu::max<T>(p, smallest()));
      cpu::Vec<T> const log_r = cpu::load(scores + i) - index_lse;
      sum += real(i, p * (log_p - log_r) + (cpu::exp<T>(log_r) - p));
    });
    return cpu::sum<T>(sum);
  }

  // (7) for the query's index_q and index_w. d_z overwrites products.
  HYBRIDATTN_INLINE void slopes(T d_loss, T index_lse, T const* target, T* scores, T* products, Index room,
                                Inputs<Out<T>> const& d_x) const {
    for_each_vector([&](Index i) HYBRIDATTN_INLINE_LAMBDA {
      cpu::Vec<T> const r = cpu::exp<T>(cpu::load(scores + i) - index_lse);
      cpu::store<T>(scores + i, d_loss * (r - cpu::load(target + i)));
    });
    T const scale = static_cast<T>(c_.index_scale);
    for (Index j = 0; j < c_.index_heads; ++j) {
      T* const product = products + j * room;
      cpu::Vec<T> sum{};
      for_each_vector([&](Index i) HYBRIDATTN_INLINE_LAMBDA {
        cpu::Vec<T> const d_score = cpu::load(scores + i), z = cpu::load(product + i);
        sum += real(i, d_score * cpu::max<T>(cpu::Vec<T>{}, scale * z));
        cpu::store<T>(product + i, cpu::select<T>(z > T(0), weight(j) * d_score, cpu::Vec<T>{}));
      });
      if (!d_x.index_w.empty()) d_x.index_w(n_, j) = cpu::sum<T>(sum);
    }
    if (d_x.index_q.empty()) return;
    attention::for_each_heads(c_.index_heads, [&](auto R, Index j) HYBRIDATTN_INLINE_LAMBDA {
      weighted_rows<R, T>(c_.index_dim, Rows<T const>{products + j * room, room}, index_keys(), keys_, heads_of(d_x.index_q, n_, j));
    });
  }

 private:
  // target += the weights of a head / H. The lse is that of rounded scores, so the scores are rounded here too.
  HYBRIDATTN_INLINE void add_weights(T* products, T lse, T* target) const {
    T const scale = static_cast<T>(c_.scale), each = T(1) / static_cast<T>(c_.num_heads);
    for_each_vector([&](Index i) HYBRIDATTN_INLINE_LAMBDA { cpu::store<T>(products + i, scale * cpu::load(products + i)); });
    for_each_vector([&](Index i) HYBRIDATTN_INLINE_LAMBDA {
      cpu::Vec<T> const p = cpu::exp<T>(cpu::load(products + i) - lse);
      cpu::store<T>(target + i, cpu::load(target + i) + each * p);
    });
  }
  static cpu::Vec<T> smallest() { return cpu::broadcast<T>(std::numeric_limits<T>::min()); }
  T weight(Index j) const { return static_cast<T>(c_.index_scale) * x_.index_w(n_, j); }
  Rows<T const> index_keys() const { return {x_.index_k.row(s_.start), x_.index_k.stride[0]}; }
  HYBRIDATTN_INLINE cpu::Vec<T> real(Index i, cpu::Vec<T> x) const { return real_keys<T>(i, keys_.count, x); }
  template <class F> HYBRIDATTN_INLINE void for_each_vector(F f) const {
    for (Index i = 0; i < keys_.count; i += cpu::lanes<T>) f(i);
  }

  Config const& c_;
  Inputs<In<T>> const& x_;
  Sequence s_;
  Index n_;
  Keys keys_;
};

// Calls f(sequence number, first, last, thread) for `queries` queries of a sequence at a time, those with the most keys first.
template <class F> void for_each_queries(Cpu& cpu, Sequences const& s, Index queries, F f) {
  Index const count = s.count(), pieces = ceil_div(s.longest(), queries);
  parallel_for(cpu, count * pieces, [&](Index task, int thread) {
    Index const i = task % count, first = (pieces - 1 - task / count) * queries;
    Index const last = std::min(first + queries, s[static_cast<std::size_t>(i)].length);
    if (first < last) f(i, first, last, thread);
  });
}

// (5) and each query's part of (6), [N].
template <class T>
void query_losses(Cpu& cpu, KeySets const& sets, Config const& c, Sequences const& s, Inputs<In<T>> x, Wide<In<T>, 2> lse,
                  Wide<Out<T>, 1> index_lse, T* losses) {
  Index const room = key_room<T>(sets.most()), HI = c.index_heads, group = c.num_heads / c.num_kv_heads;
  Tensor<T, 2, Cpu> scratch{cpu, {Index{cpu.threads()}, (HI + 2) * room + HeadScratch<T>::size(c.head_dim, group, sets.most())}};
  auto const memory = out(scratch);
  for_each_queries(cpu, s, 8, [&](Index i, Index first, Index last, int thread) {
    T *const products = memory.row(thread), *scores = products + HI * room, *target = scores + room;
    HeadScratch<T> const heads{group, sets.most(), target + room};
    Sequence const sequence = s[static_cast<std::size_t>(i)];
    for (Index t = first; t < last; ++t) {
      KlQuery<T> const query{c, x, sequence, t, sets.of(sequence, t)};
      query.score(products, room, scores);
      query.share(lse, heads, target);
      T const total = query.log_sum(scores);
      index_lse(sequence.start + t) = total;
      losses[sequence.start + t] = query.divergence(scores, target, total);
    }
  });
}
// (6), the sum of the queries' parts in order, unless loss is an empty view. Writes index_lse.
template <class T>
void index_loss(Cpu& cpu, KeySets const& sets, Config const& c, Sequences const& s, Inputs<In<T>> x, Saved<Out<T>> saved,
                State<Out<T>, 1> loss) {
  cpu::Scratch<T> const losses{cpu, s.tokens()};
  query_losses<T>(cpu, sets, c, s, x, saved.lse, saved.index_lse, losses.data());
  if (!loss.empty())
    loss(0) = cpu::sum_vectors<T>(s.tokens(), [&](cpu::Slot<T> n) HYBRIDATTN_INLINE_LAMBDA { return n.get(losses.data()); });
}

// (7) in blocks of queries. Threads share out a block's queries, which store d_z, and then the keys, which sum d_z over the
// queries in order.
template <class T> class KlBackward {
 public:
  KlBackward(Cpu& cpu, KeySets const& sets, Config const& c, Sequences const& s, Inputs<In<T>> const& x, Saved<In<T>> const& saved,
             T d_loss, Inputs<Out<T>> const& d_x)
      : cpu_(cpu), sets_(sets), c_(c), s_(s), x_(x), saved_(saved), d_loss_(d_loss), d_x_(d_x), room_(key_room<T>(sets.most())),
        scratch_(2 * room_ + HeadScratch<T>::size(c.head_dim, group(), sets.most())), rows_(cpu, cpu.threads() * scratch_),
        d_z_(cpu, block * c.index_heads * start(s.count(), s.tokens())) {}

  void run() {
    for (Index first = 0; first < s_.longest(); first += block) {
      queries(first);
      if (!d_x_.index_k.empty()) keys(first);
    }
  }

 private:
  static constexpr Index block = 32, task_queries = 4, task_keys = 64;

  Index group() const { return c_.num_heads / c_.num_kv_heads; }
  // d_z of a block: rows [HI, room] of each query of sequence i, after those of earlier sequences.
  Index room(Sequence s) const { return std::min(room_, key_room<T>(s.length)); }
  static Index start(Index i, Index tokens_before) { return tokens_before + i * cpu::lanes<T>; }
  T* d_z(Index i, Sequence s, Index query) const { return d_z_.data() + c_.index_heads * (block * start(i, s.start) + query * room(s)); }

  void queries(Index first) {
    parallel_for(cpu_, s_.count() * (block / task_queries), [&](Index task, int thread) {
      Index const i = task % s_.count(), begin = first + task / s_.count() * task_queries;
      Sequence const sequence = s_[static_cast<std::size_t>(i)];
      T *const scores = rows_.data() + thread * scratch_, *target = scores + room_;
      HeadScratch<T> const heads{group(), sets_.most(), target + room_};
      for (Index t = begin; t < std::min(begin + task_queries, sequence.length); ++t) {
        T* const products = d_z(i, sequence, t - first);
        KlQuery<T> const query{c_, x_, sequence, t, sets_.of(sequence, t)};
        query.score(products, room(sequence), scores);
        query.share(saved_.lse, heads, target);
        query.slopes(d_loss_, static_cast<T>(saved_.index_lse(sequence.start + t)), target, scores, products, room(sequence), d_x_);
      }
    });
  }

  // Adds a block's part of d_ik. The first block overwrites.
  void keys(Index first) {
    parallel_for(cpu_, s_.count() * ceil_div(s_.longest(), task_keys), [&](Index task, int) {
      Index const i = task % s_.count(), begin = task / s_.count() * task_keys;
      Sequence const sequence = s_[static_cast<std::size_t>(i)];
      Index const end = std::min(begin + task_keys, sequence.length);
      if (first == 0)
        for (Index key = begin; key < end; ++key) std::fill_n(d_x_.index_k.row(sequence.start + key), c_.index_dim, T(0));
      for (Index t = std::max(first, begin); t < std::min(first + block, sequence.length); ++t) {
        Keys const all = sets_.of(sequence, t);
        std::int32_t const* const from = std::lower_bound(all.indices, all.indices + all.count, begin);
        std::int32_t const* const to = std::lower_bound(from, all.indices + all.count, end);
        Rows<T const> const weights{d_z(i, sequence, t - first) + (from - all.indices), room(sequence)};
        attention::add_to_rows<T>(c_.index_dim, weights, heads_of(x_.index_q, sequence.start + t, 0), c_.index_heads, Keys{from, to - from},
                                  Rows<T>{d_x_.index_k.row(sequence.start), d_x_.index_k.stride[0]});
      }
    });
  }

  Cpu& cpu_;
  KeySets const& sets_;
  Config const& c_;
  Sequences const& s_;
  Inputs<In<T>> x_;
  Saved<In<T>> saved_;
  T d_loss_;
  Inputs<Out<T>> d_x_;
  Index room_, scratch_;   // of scratch for a thread
  cpu::Scratch<T> rows_, d_z_;
};
template <class T>
void index_loss_backward(Cpu& cpu, KeySets const& sets, Config const& c, Sequences const& s, Inputs<In<T>> x, Saved<In<T>> saved, T d_loss,
                         Inputs<Out<T>> d_x) {
  KlBackward<T>{cpu, sets, c, s, x, saved, d_loss, d_x}.run();
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::dsa
#endif

// ==== hybridattn/core/with_constant.hpp
// A run-time number as a compile-time one, for the few values that have a fast kernel.
#ifndef HYBRIDATTN_CORE_WITH_CONSTANT_HPP
#define HYBRIDATTN_CORE_WITH_CONSTANT_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

// fast(std::integral_constant<Index, n>{}) when n is one of the values, generic() otherwise.
template <Index... values, class Fast, class Generic> void with_constant(Index n, Fast&& fast, Generic&& generic) {
  bool const found = ((n == values && (fast(std::integral_constant<Index, values>{}), true)) || ...);
  if (!found) generic();
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/attention/dsa/cpu.hpp
#ifndef HYBRIDATTN_ATTENTION_DSA_CPU_HPP
#define HYBRIDATTN_ATTENTION_DSA_CPU_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {
namespace dsa {

// Leaves out empty views: their gradient is not computed.
template <class T, int Rank> void set_zero(View<T, Rank> x) {
  if (x.empty()) return;
  for (Index n = 0; n < x.extent(0); ++n) {
    if constexpr (Rank == 2) std::fill_n(x.row(n), x.extent(1), T(0));
    else
      for (Index j = 0; j < x.extent(1); ++j) std::fill_n(x.row(n, j), x.extent(2), T(0));
  }
}
template <class T, int... Ranks> void set_all_zero(View<T, Ranks>... x) { (set_zero(x), ...); }

// Common head dims are compile-time constants. That gains up to 20 % with GCC and 10 to 30 % with Clang; 256 would gain 1 %.
template <class Run> void with_head_dim(Index D, Run run) {
  with_constant<16, 32, 64, 128>(D, run, [&] { run(D); });
}

template <class T> void negate(View<T const, 3> x, View<T, 3> y) {
  for (Index n = 0; n < x.extent(0); ++n)
    for (Index j = 0; j < x.extent(1); ++j) std::transform(x.row(n, j), x.row(n, j) + x.extent(2), y.row(n, j), std::negate<T>());
}
// The kernels need an index_scale s above 0. relu(s q . k) = relu(-s (-q) . k), so this calls f(config, inputs) with -s and -q.
template <class T, class F> void with_positive_scale(Cpu& cpu, Config c, Inputs<In<T>> x, F f) {
  Tensor<T, 3, Cpu> opposite{cpu, x.index_q.shape};
  negate(x.index_q, out(opposite));
  c.index_scale = -c.index_scale;
  x.index_q = in(opposite);
  f(std::as_const(c), x);
}

template <class T>
void forward(Cpu& cpu, SparseOptions o, Config const& c, Sequences const& s, Inputs<In<T>> x, Outputs<Out<T>> y, Saved<Out<T>> saved) {
  if (c.index_scale < 0)
    return with_positive_scale<T>(cpu, c, x,
                                  [&](Config const& config, auto const& inputs) { dsa::forward<T>(cpu, o, config, s, inputs, y, saved); });
  if (!y.auxiliary_loss.empty()) y.auxiliary_loss(0) = 0;
  if (s.tokens() == 0) return;
  if (c.stage != Stage::dense_warm_up) choose_keys(cpu, o, c, s, x, saved.indices);
  KeySets const sets{cpu, o, c, s, saved.indices};
  with_head_dim(c.head_dim, [&](auto D) { attend_all<T>(cpu, D, sets, c, s, x, y, saved); });
  if (c.stage != Stage::language_model) index_loss<T>(cpu, sets, c, s, x, saved, y.auxiliary_loss);
}
template <class T>
void backward(Cpu& cpu, SparseOptions o, Config const& c, Sequences const& s, Inputs<In<T>> x, Outputs<In<T>> y, Saved<In<T>> saved,
              Outputs<In<T>> d_y, Inputs<Out<T>> d_x) {
  if (c.index_scale < 0)
    return with_positive_scale<T>(cpu, c, x, [&](Config const& config, auto const& inputs) {
      dsa::backward<T>(cpu, o, config, s, inputs, y, saved, d_y, d_x);
      if (!d_x.index_q.empty()) negate(View<T const, 3>(d_x.index_q), d_x.index_q);
    });
  KeySets const sets{cpu, o, c, s, saved.indices};
  if (d_y.o.empty()) set_all_zero(d_x.q, d_x.k, d_x.v);
  else with_head_dim(c.head_dim, [&](auto D) { attend_all_backward<T>(cpu, D, sets, c, s, x, y, saved, d_y, d_x); });
  bool const trains_indexer = c.stage != Stage::language_model && !d_y.auxiliary_loss.empty() && d_y.auxiliary_loss(0) != 0;
  if (trains_indexer) index_loss_backward<T>(cpu, sets, c, s, x, saved, static_cast<T>(d_y.auxiliary_loss(0)), d_x);
  else set_all_zero(d_x.index_q, d_x.index_k, d_x.index_w);
}

// Sequences without past tokens use the kernels of forward. Decoding computes no auxiliary loss in any stage.
template <class T>
void extend(Cpu& cpu, SparseOptions o, Config const& c, Sequences const& s, Inputs<In<T>> x, Cache<Out<T>> cache, Outputs<Out<T>> y) {
  if (c.index_scale < 0)
    return with_positive_scale<T>(cpu, c, x,
                                  [&](Config const& config, auto const& inputs) { dsa::extend<T>(cpu, o, config, s, inputs, cache, y); });
  check_fits(s, cache.keys.extent(0), cache.keys.extent(1));
  remember<T>(cpu, s, x, cache);
  bool const dense = c.stage == Stage::dense_warm_up;
  Tensor<std::int32_t, 2, Cpu> indices{cpu, {s.tokens(), Index{dense ? 0 : o.top_k}}};
  if (s.any_begin()) {
    Sequences const beginnings = s.beginnings();
    Tensor<wide_t<T>, 2, Cpu> lse{cpu, {s.tokens(), c.num_heads}};
    if (!dense) choose_keys<T>(cpu, o, c, beginnings, x, out(indices));
    KeySets const sets{cpu, o, c, beginnings, in(indices)};
    with_head_dim(c.head_dim,
                  [&](auto D) { attend_all<T>(cpu, D, sets, c, beginnings, x, y, {.lse = out(lse), .indices = {}, .index_lse = {}}); });
  }
  if (!s.any_continue()) return;
  if (!dense) CachedIndexer<T>{cpu, c, s, x, cache.index_keys, out(indices)}.run();
  attend_cached<T>(cpu, c, s, x, cache, in(indices), y.o);
}

}  // namespace dsa

template <SparseOptions O> struct On<SparseAttention<O>, Cpu> : InFloat<SparseAttention<O>, Cpu> {
  using InFloat<SparseAttention<O>, Cpu>::forward, InFloat<SparseAttention<O>, Cpu>::backward, InFloat<SparseAttention<O>, Cpu>::extend;
  template <std::floating_point T>
  static void forward(Cpu& cpu, dsa::Config const& c, Sequences const& s, dsa::Inputs<In<T>> x, dsa::Outputs<Out<T>> y,
                      dsa::Saved<Out<T>> saved) {
    dsa::forward(cpu, O, c, s, x, y, saved);
  }
  template <std::floating_point T>
  static void backward(Cpu& cpu, dsa::Config const& c, Sequences const& s, dsa::Inputs<In<T>> x, dsa::Outputs<In<T>> y,
                       dsa::Saved<In<T>> saved, dsa::Outputs<In<T>> d_y, dsa::Inputs<Out<T>> d_x) {
    dsa::backward(cpu, O, c, s, x, y, saved, d_y, d_x);
  }
  template <std::floating_point T>
  static void extend(Cpu& cpu, dsa::Config const& c, Sequences const& s, dsa::Inputs<In<T>> x, dsa::Cache<Out<T>> cache,
                     dsa::Outputs<Out<T>> y) requires(O.top_k_percent == 0) {
    dsa::extend(cpu, O, c, s, x, cache, y);
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/ops/layer_norm/layer_norm.hpp
// LayerNorm over the last axis: y = xh w + b,  xh = (x - mean x) rstd,  rstd = (var x + eps)^-1/2
//   with g = d_y w:   d_x = rstd (g - mean g - xh mean(g xh))      d_w = sum d_y xh      d_b = sum d_y
#ifndef HYBRIDATTN_OPS_LAYER_NORM_LAYER_NORM_HPP
#define HYBRIDATTN_OPS_LAYER_NORM_LAYER_NORM_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

//   forward (backend, eps, x, w, b, y)
//   backward(backend, eps, x, w, d_y, d_x, d_w, d_b)   overwrites all three
struct LayerNorm {};

}  // namespace hybridattn::inline HYBRIDATTN_ABI

// ==== hybridattn/ops/layer_norm/cpu.hpp
#ifndef HYBRIDATTN_OPS_LAYER_NORM_CPU_HPP
#define HYBRIDATTN_OPS_LAYER_NORM_CPU_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

// Plain loops: it normalises one small key a token, in a layer whose time goes elsewhere.
template <> struct On<LayerNorm, Cpu> : InFloat<LayerNorm, Cpu> {
  using InFloat::forward, InFloat::backward;
  template <std::floating_point T> static void forward(Cpu& cpu, double eps, View<T const, 2> x, Wide<In<T>, 1> w, Wide<In<T>, 1> b,
                                                       View<T, 2> y) {
    parallel_blocks(cpu, x.extent(0), cpu::sum_rows, [&](Index first, Index last) {
      for (Index n = first; n < last; ++n) {
        auto const [mean, rstd] = moments(x.row(n), x.extent(1), eps);
        for (Index c = 0; c < x.extent(1); ++c) y(n, c) = (x(n, c) - mean) * rstd * w(c) + b(c);
      }
    });
  }

  template <std::floating_point T>
  static void backward(Cpu& cpu, double eps, View<T const, 2> x, Wide<In<T>, 1> w, View<T const, 2> d_y, View<T, 2> d_x, Wide<Out<T>, 1> d_w,
                       Wide<Out<T>, 1> d_b) {
    Index const C = x.extent(1);
    cpu::sum_over_rows<T>(cpu, x.extent(0), d_w, [&](Index n, T* sum) {
      auto const [mean, rstd] = moments(x.row(n), C, eps);
      T g_mean = 0, along = 0;
      for (Index c = 0; c < C; ++c) {
        T const xh = (x(n, c) - mean) * rstd, g = d_y(n, c) * w(c);
        g_mean += g / static_cast<T>(C);
        along += g * xh / static_cast<T>(C);
        sum[c] += d_y(n, c) * xh;
      }
      for (Index c = 0; c < C; ++c) d_x(n, c) = rstd * (d_y(n, c) * w(c) - g_mean - (x(n, c) - mean) * rstd * along);
    });
    cpu::sum_over_rows<T>(cpu, x.extent(0), d_b, [&](Index n, T* sum) {
      for (Index c = 0; c < C; ++c) sum[c] += d_y(n, c);
    });
  }

 private:
  template <class T> struct Moments {
    T mean, rstd;
  };
  template <class T> static Moments<T> moments(T const* x, Index C, double eps) {
    T mean = 0, variance = 0;
    for (Index c = 0; c < C; ++c) mean += x[c] / static_cast<T>(C);
    for (Index c = 0; c < C; ++c) variance += (x[c] - mean) * (x[c] - mean) / static_cast<T>(C);
    return {mean, cpu::inverse_root(variance + static_cast<T>(eps))};
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
#endif

// ==== hybridattn/attention/dsa/steps.hpp
// The step before sparse attention in a layer: norm and rotary on queries and keys, and those of the indexer.
#ifndef HYBRIDATTN_ATTENTION_DSA_STEPS_HPP
#define HYBRIDATTN_ATTENTION_DSA_STEPS_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::dsa {

template <class S> struct PrepareParams {
  Wide<S, 1> q_norm, k_norm;                  // [D], empty without qk_norm
  Wide<S, 1> index_norm_weight, index_norm_bias;  // [DI], empty without index_norm
  HYBRIDATTN_FIELDS(q_norm, k_norm, index_norm_weight, index_norm_bias)
};

template <SparseOptions O> struct Prepare {
  template <class S> using Params = PrepareParams<S>;

  static constexpr bool changes = O.qk_norm != QkNorm::none || O.rotary_percent > 0;
  static constexpr bool makes(std::string_view input) {
    if (input == "q" || input == "k") return changes;
    if (input == "index_q") return O.index_rotary_percent > 0;
    return input == "index_k" && (O.index_rotary_percent > 0 || O.index_norm);
  }

  static Params<Shapes> params(Config const& c) {
    Shape<1> const weight{O.qk_norm == QkNorm::none ? 0 : c.head_dim}, index_weight{O.index_norm ? c.index_dim : 0};
    return {.q_norm = weight, .k_norm = weight, .index_norm_weight = index_weight, .index_norm_bias = index_weight};
  }
  static Params<Starts> starts(Config const& c) {
    return {.q_norm = norm(c).start(),
            .k_norm = norm(c).start(),
            .index_norm_weight = Initial::constant(1),
            .index_norm_bias = Initial::constant(0)};
  }

  template <class B, class T>
  static void forward(B& backend, Config const& c, SequencesOn<B> const& s, Inputs<Narrow<In<T>>> raw, Params<In<T>> p, Inputs<Out<T>> x) {
    if constexpr (changes) {
      Rotation<T, B> const turn{backend, s, c.head_dim, O.rotary_percent, O.rotary, c.rope_theta};
      norm(c).forward(backend, turn, raw.q, p.q_norm, x.q);
      norm(c).forward(backend, turn, raw.k, p.k_norm, x.k);
    }
    View<T const, 2> index_k = raw.index_k;
    if constexpr (O.index_norm) {
      On<LayerNorm, B>::forward(backend, c.norm_eps, raw.index_k, p.index_norm_weight, p.index_norm_bias, x.index_k);
      index_k = x.index_k;
    }
    if constexpr (O.index_rotary_percent > 0) {
      Rotation<T, B> const turn{backend, s, c.index_dim, O.index_rotary_percent, Rotary::half_split, c.rope_theta};
      turn.forward(backend, raw.index_q, x.index_q);
      turn.forward(backend, one_head(index_k), one_head(x.index_k));
    }
  }
  // Computes the gradients that are not empty views: d_raw.q and d_raw.k, those of the indexer, or both.
  template <class B, class T>
  static void backward(B& backend, Config const& c, SequencesOn<B> const& s, Inputs<Narrow<In<T>>> raw, Params<In<T>> p, Inputs<In<T>>,
                       Inputs<In<T>> d_x, Inputs<Narrow<Out<T>>> d_raw, Params<Out<T>> d_p) {
    if constexpr (changes) {
      if (!d_raw.q.empty()) {
        Rotation<T, B> const turn{backend, s, c.head_dim, O.rotary_percent, O.rotary, c.rope_theta};
        norm(c).backward(backend, turn, raw.q, p.q_norm, d_x.q, d_raw.q, d_p.q_norm);
        norm(c).backward(backend, turn, raw.k, p.k_norm, d_x.k, d_raw.k, d_p.k_norm);
      }
    }
    if constexpr (O.index_rotary_percent > 0 || O.index_norm) {
      if (!d_raw.index_k.empty()) index_backward(backend, c, s, raw, p, d_x, d_raw, d_p);
    }
  }

 private:
  // Backward of the rotary, then of the norm, as in HeadNorm.
  template <class B, class T>
  static void index_backward(B& backend, Config const& c, SequencesOn<B> const& s, Inputs<Narrow<In<T>>> raw, Params<In<T>> p,
                             Inputs<In<T>> d_x, Inputs<Narrow<Out<T>>> d_raw, Params<Out<T>> d_p) {
    [[maybe_unused]] Tensor<T, 2, B> turned;
    View<T const, 2> d_normed = d_x.index_k;
    if constexpr (O.index_rotary_percent > 0) {
      Rotation<T, B> const turn{backend, s, c.index_dim, O.index_rotary_percent, Rotary::half_split, c.rope_theta};
      if constexpr (O.index_norm) turned = {backend, d_x.index_k.shape};
      View<T, 2> const d_index_k = O.index_norm ? out(turned) : d_raw.index_k;
      turn.backward(backend, d_x.index_q, d_raw.index_q);
      turn.backward(backend, one_head(d_normed), one_head(d_index_k));
      d_normed = d_index_k;
    }
    if constexpr (O.index_norm)
      On<LayerNorm, B>::backward(backend, c.norm_eps, raw.index_k, p.index_norm_weight, d_normed, d_raw.index_k, d_p.index_norm_weight,
                                 d_p.index_norm_bias);
  }
  static HeadNorm norm(Config const& c) { return {O.qk_norm, c.norm_eps}; }
  template <class T> static View<T, 3> one_head(View<T, 2> x) { return {x.data, {x.extent(0), 1, x.extent(1)}}; }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::dsa
#endif

// ==== hybridattn/attention/dsa/dsa.hpp
// DeepSeek Sparse Attention (arXiv 2512.02556): each query attends to the top_k keys that a small indexer picks.
//   (1) I_ts = sum_j w_tj relu(index_scale iq_tj . ik_s)       s <= t in the same sequence; j over the indexer's heads
//   (2) S_t = the min(k, t + 1) keys with the largest I_ts; ties go to the smaller index, -0 ties with +0,
//       NaN ranks last
//   (3) lse_th = log sum_{s in S_t} exp(scale q_th . k_s)       o_th = sum_{s in S_t} P_ths v_s, P = exp(score - lse)
//   (4) d_q, d_k, d_v as in full attention, over S_t alone
// All heads use one selection. The choice has no gradient. A loss of its own trains the indexer to score keys as attention weights them:
//   (5) p_ts = mean_h P_ths        r_ts = exp(I_ts - index_lse_t)        index_lse_t = log sum_{s in S_t} exp(I_ts)
//   (6) auxiliary_loss = sum_t sum_{s in S_t} p_ts log(p_ts / r_ts), the divergence KL(p_t || r_t) of every query; computed with
//       + r_ts - p_ts, which sums to 0, so that a rounding of p_t or r_t counts in second order
//   (7) d_I_ts = (r_ts - p_ts) d_auxiliary_loss         p counts as constant: q and k get no gradient
//       d_z_tjs = index_scale w_tj d_I_ts where index_scale iq_tj . ik_s > 0, else 0
//       d_iq_tj = sum_s d_z_tjs ik_s    d_ik_s = sum_tj d_z_tjs iq_tj    d_w_tj = sum_s d_I_ts relu(index_scale iq_tj . ik_s)
// In the dense warm-up S_t is every key that t sees, without a choice. No tensor ever has T x T elements.
#ifndef HYBRIDATTN_ATTENTION_DSA_DSA_HPP
#define HYBRIDATTN_ATTENTION_DSA_DSA_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

template <SparseOptions O = SparseOptions{}> struct SparseAttention : PolicyDefaults {
  static_assert((O.top_k > 0) != (O.top_k_percent > 0),
                "SparseOptions: set top_k (a count of keys, >= 1), or top_k = 0 and top_k_percent (1 .. 100)");
  static_assert(O.top_k >= 0 && 0 <= O.top_k_percent && O.top_k_percent <= 100, "SparseOptions: top_k >= 1, or top_k_percent in 1 .. 100");
  static_assert(0 <= O.rotary_percent && O.rotary_percent <= 100 && 0 <= O.index_rotary_percent && O.index_rotary_percent <= 100,
                "SparseOptions: a rotary percentage is a share of the head, 0 .. 100");

  static constexpr std::string_view name = "DSA";
  static constexpr SparseOptions options = O;
  using Config = dsa::Config;
  template <class S> using Inputs = dsa::Inputs<S>;
  template <class S> using Outputs = dsa::Outputs<S>;
  template <class S> using Saved = dsa::Saved<S>;
  template <class S> using Cache = dsa::Cache<S>;
  using Prepare = dsa::Prepare<O>;
  using Finish = std::conditional_t<O.output_gate, SigmoidFinish, NoStep>;

  static constexpr bool detached(std::string_view input) { return input.starts_with("index_"); }
  static double auxiliary_weight(Config const& c, Index tokens) { return tokens == 0 ? 0 : c.index_loss / static_cast<double>(tokens); }

  static Config complete(Config c, Index model_dim, Index num_heads) {
    check_numbers(c);
    if (c.num_heads == 0) c.num_heads = num_heads;
    if (c.num_kv_heads == 0) c.num_kv_heads = c.num_heads;
    c.head_dim = default_head_dim(c.head_dim, model_dim, c.num_heads);
    if (c.scale == 0) c.scale = 1 / std::sqrt(static_cast<double>(c.head_dim));
    if (c.index_dim == 0) c.index_dim = c.head_dim;
    if (c.index_scale == 0) c.index_scale = 1 / std::sqrt(static_cast<double>(c.index_dim));
    check_groups("SparseAttention", c.num_heads, c.num_kv_heads);
    return c;
  }
  static Inputs<Shapes> inputs(Config const& c, Sequences const& s) {
    Shape<3> const keys{s.tokens(), c.num_kv_heads, c.head_dim};
    return {.q = {s.tokens(), c.num_heads, c.head_dim},
            .k = keys,
            .v = keys,
            .index_q = {s.tokens(), c.index_heads, c.index_dim},
            .index_k = {s.tokens(), c.index_dim},
            .index_w = {s.tokens(), c.index_heads}};
  }
  static Outputs<Shapes> outputs(Config const& c, Sequences const& s) {
    Shape<1> const loss{c.stage == Stage::language_model ? 0 : 1};
    return {.o = {s.tokens(), c.num_heads, c.head_dim}, .auxiliary_loss = loss};
  }
  static Saved<Shapes> saved(Config const& c, Sequences const& s) {
    Shape<2> const chosen{s.tokens(), c.stage == Stage::dense_warm_up ? 0 : dsa::selection_size(O, s.longest())};
    Shape<1> const index_lse{c.stage == Stage::language_model ? 0 : s.tokens()};
    return {.lse = {s.tokens(), c.num_heads}, .indices = chosen, .index_lse = index_lse};
  }
  // Decoding needs a fixed top_k: top_k_percent is relative to the final length, which is unknown while tokens are generated. To decode,
  // use the same parameters in a policy with top_k.
  static Cache<Shapes> cache(Config const& c, Index batch, Index capacity) requires(O.top_k_percent == 0) {
    Shape<4> const rows{batch, capacity, c.num_kv_heads, c.head_dim};
    return {.keys = rows, .values = rows, .index_keys = {batch, capacity, c.index_dim}};
  }

 private:
  static void check_numbers(Config const& c) {
    check_size("SparseAttention", "num_heads", c.num_heads);
    check_size("SparseAttention", "num_kv_heads", c.num_kv_heads);
    check_size("SparseAttention", "head_dim", c.head_dim);
    check_number("SparseAttention", "scale", c.scale);
    check_at_least("SparseAttention", "index_heads", c.index_heads, 1);
    check_size("SparseAttention", "index_dim", c.index_dim);
    check_number("SparseAttention", "index_scale", c.index_scale);
    check_positive("SparseAttention", "rope_theta", c.rope_theta);
    check_positive("SparseAttention", "norm_eps", c.norm_eps);
    check_not_negative("SparseAttention", "index_loss", c.index_loss);
  }
};
using DSA = SparseAttention<>;

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/attention/full/cpu_tiles.hpp
// Used by the forward and the backward kernel: rows of one head, their transposes, and products over the mask's band.
#ifndef HYBRIDATTN_ATTENTION_FULL_CPU_TILES_HPP
#define HYBRIDATTN_ATTENTION_FULL_CPU_TILES_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::full {

inline constexpr int tile_rows = cpu::tuning.attention.rows, tile_vectors = cpu::tuning.attention.vectors;
template <class T> inline constexpr Index tile_columns = tile_vectors * cpu::lanes<T>;

using attention::Rows, attention::head_of;

// Keys j that query i sees: i - reach < j <= i.
inline Index reach(int window, Sequence s) { return window == 0 ? s.length : std::min<Index>(window, s.length); }

// Rows first .. first + tile_rows - 1 for a tile. If rows are past the end, the tile is a copy in pad [tile_rows, D] with zeros there.
template <class T, class Dim> HYBRIDATTN_INLINE cpu::Scalars<T> whole_tile(Dim D, Rows<T const> x, Index first, Index length, T* pad) {
  if (first + tile_rows <= length) return {x[first], x.stride, 1};
  std::fill_n(pad, tile_rows * D, T(0));
  for (Index i = first; i < length; ++i) std::copy_n(x[i], D, pad + (i - first) * D);
  return {pad, D, 1};
}

// to = the transpose of columns d .. d + lanes - 1 of rows first .. first + lanes - 1; zero for rows past the end.
template <class T> HYBRIDATTN_INLINE void transpose_square(Rows<T const> x, Index first, Index length, Index d, T* to, Index to_stride) {
  constexpr int n = cpu::lanes<T>;
  if (first + n <= length) {
    cpu::transpose<T>(x[first] + d, x.stride, to, to_stride);
    return;
  }
  alignas(cpu::vector_bytes) T rows[std::size_t{n * n}] = {};
  for (Index i = first; i < length; ++i) std::copy_n(x[i] + d, n, rows + (i - first) * n);
  cpu::transpose<T>(rows, n, to, to_stride);
}
// to [D, width] = the transpose of rows first .. first + width - 1.
template <class T, class Dim> void transpose_rows(Dim D, Rows<T const> x, Index first, Index length, Index width, T* to) {
  for (Index i = 0; i < width; i += cpu::lanes<T>)
    for (Index d = 0; d < D; d += cpu::lanes<T>) transpose_square(x, first + i, length, d, to + d * width + i, width);
}

// In row r of a tile the sum runs over begin + r <= k < end + r, limited to 0 <= k < depth. The mask of causal attention and
// of its window has this shape. Entries outside the band are never read, so they need no mask, and a NaN there has no effect.
struct Band {
  Index begin, end, depth;
};

// cpu::tile over a band. Every sum runs over k in order.
template <int MR, int NV, class T, class Start, class Epilogue>
HYBRIDATTN_INLINE void band_tile(Band band, cpu::Scalars<T> a, cpu::Columns<T> b, Start start, Epilogue epilogue) {
  cpu::Vec<T> sum[std::size_t{MR}][std::size_t{NV}];
  HYBRIDATTN_UNROLL
  for (int r = 0; r < MR; ++r) {
    HYBRIDATTN_UNROLL
    for (int v = 0; v < NV; ++v) sum[r][v] = start(r, v);
  }
  auto const add = [&](Index k, auto takes_part) HYBRIDATTN_INLINE_LAMBDA {
    if (k < 0 || k >= band.depth) return;
    cpu::Vec<T> column[std::size_t{NV}];
    HYBRIDATTN_UNROLL
    for (int v = 0; v < NV; ++v) column[v] = cpu::in_register<T>(cpu::load(b.data + k * b.depth + v * cpu::lanes<T>));
    HYBRIDATTN_UNROLL
    for (int r = 0; r < MR; ++r) {
      if (!takes_part(r)) continue;
      T const x = a.data[r * a.row + k * a.depth];
      HYBRIDATTN_UNROLL
      for (int v = 0; v < NV; ++v) sum[r][v] += x * column[v];
    }
  };
  Index const all = band.begin + MR - 1;   // from here to band.end every row takes part
  if (all <= band.end) {
    HYBRIDATTN_UNROLL
    for (int s = 0; s < MR - 1; ++s) add(band.begin + s, [s](int r) HYBRIDATTN_INLINE_LAMBDA { return r <= s; });
    for (Index k = std::max<Index>(all, 0), last = std::min(band.end, band.depth); k < last; ++k)
      add(k, [](int) HYBRIDATTN_INLINE_LAMBDA { return true; });
    HYBRIDATTN_UNROLL
    for (int s = 0; s < MR - 1; ++s) add(band.end + s, [s](int r) HYBRIDATTN_INLINE_LAMBDA { return r > s; });
  } else {
    for (Index k = band.begin; k < band.end + MR - 1; ++k)
      add(k, [&](int r) HYBRIDATTN_INLINE_LAMBDA { return band.begin + r <= k && k < band.end + r; });
  }
  HYBRIDATTN_UNROLL
  for (int r = 0; r < MR; ++r) {
    HYBRIDATTN_UNROLL
    for (int v = 0; v < NV; ++v) epilogue(r, v, sum[r][v]);
  }
}

// Calls f(column, vectors) over the columns 0 .. D - 1 of a row: tiles of two vectors, and one vector at the end where D needs it.
template <class T, class Dim, class F> HYBRIDATTN_INLINE void for_each_tile_column(Dim D, F f) {
  Index d = 0;
  for (; d + tile_columns<T> <= D; d += tile_columns<T>) f(d, std::integral_constant<int, tile_vectors>{});
  if (d < D) f(d, std::integral_constant<int, 1>{});
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::full
#endif

// ==== hybridattn/attention/full/cpu_backward.hpp
// Backward on the CPU. One task owns a key/value head of a sequence, so no two tasks write the same row and every sum has
// one order: query heads of the group, blocks of keys, blocks of queries. Score tiles of keys x queries become P (2), tiles of
// v x d_o become dS (4), both in their epilogues. The products (5) read only entries inside the mask's band, so entries outside
// the band need no mask.
#ifndef HYBRIDATTN_ATTENTION_FULL_CPU_BACKWARD_HPP
#define HYBRIDATTN_ATTENTION_FULL_CPU_BACKWARD_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::full {

// One query head: inputs, outputs and saved tensors of forward, and the gradients that backward writes.
template <class T> struct BackwardRows {
  Rows<T const> q, k, v, o, d_o;
  Rows<wide_t<T> const> lse;
  Rows<T> d_q, d_k, d_v;
};

template <class T, class Dim> class BackwardHead {
 public:
  static constexpr Index block = 64;   // queries and keys of a block
  static_assert(block % tile_columns<T> == 0 && block % tile_rows == 0);
  static Index scratch(Index D, Index longest) { return 2 * round_up(longest, block) * (D + 1) + 2 * block * block + tile_rows * D; }

  BackwardHead(Dim D, Sequence s, Index window, T scale, T* memory)
      : D_(D), length_(s.length), reach_(window), padded_(round_up(length_, block)), scale_(scale), q_t_(memory),
        d_o_t_(q_t_ + padded_ * D), lse_(d_o_t_ + padded_ * D), delta_(lse_ + padded_), p_(delta_ + padded_), d_s_(p_ + block * block),
        pad_(d_s_ + block * block) {}

  // Overwrites d_q; adds to d_k and d_v.
  void run(BackwardRows<T> const& x) {
    prepare(x);
    for (Index key = 0; key < length_; key += block)
      for (Index query = key; query < std::min(length_, key + block - 1 + reach_); query += block) {
        weights(x, key, query);
        key_gradients(x, key, query);
        query_gradients(x, key, query);
      }
  }

 private:
  static constexpr int MR = tile_rows, NV = tile_vectors;
  using Vec = cpu::Vec<T>;

  Index rows_from(Index first) const { return std::min(block, length_ - first); }   // of a block

  // Fills the tensors that the tiles read. Sets d_q to 0.
  void prepare(BackwardRows<T> const& x) {
    for (Index i = 0; i < padded_; i += block) {
      transpose_rows(D_, x.q, i, length_, block, q_t_ + i * D_);
      transpose_rows(D_, x.d_o, i, length_, block, d_o_t_ + i * D_);
      for (Index lane = 0; lane < block; lane += cpu::lanes<T>) set_delta(x.o, i + lane, d_o_t_ + i * D_ + lane);
    }
    for (Index i = 0; i < padded_; ++i) lse_[i] = i < length_ ? *x.lse[i] : T(0);
    for (Index i = 0; i < length_; ++i) std::fill_n(x.d_q[i], D_, T(0));
  }

  // delta of one vector of queries, summed in the order of a tile's d_o . v: where one key has weight 1, their difference is 0.
  void set_delta(Rows<T const> o, Index first, T const* d_o_t) {
    constexpr int n = cpu::lanes<T>;
    alignas(cpu::vector_bytes) T o_t[std::size_t{n * n}];
    Vec delta{};
    for (Index d = 0; d < D_; d += n) {
      transpose_square(o, first, length_, d, o_t, n);
      for (int r = 0; r < n; ++r) delta += cpu::load(o_t + r * n) * cpu::load(d_o_t + (d + r) * block);
    }
    cpu::store<T>(delta_ + first, delta);
  }

  // P and dS, [keys, queries], of the tiles in which a query sees a key.
  void weights(BackwardRows<T> const& x, Index key, Index query) {
    for (Index j = 0; j < rows_from(key); j += MR)
      for (Index i = 0; i < rows_from(query); i += tile_columns<T>) {
        Index const distance = query + i - (key + j);   // i - j of the tile's first row and column
        if (distance <= -tile_columns<T> || distance >= reach_ + MR - 1) continue;
        if (distance > -cpu::lanes<T>) tile_weights<0>(x, key, query, j, i);
        else tile_weights<1>(x, key, query, j, i);
      }
  }
  // All but the first `skipped` vectors of queries, which are older than every key of the tile.
  template <int skipped> HYBRIDATTN_INLINE void tile_weights(BackwardRows<T> const& x, Index key, Index query, Index j, Index i) {
    Index const column = i + skipped * cpu::lanes<T>;
    T *const p = p_ + j * block + column, *const d_s = d_s_ + j * block + column;
    T const *const lse = lse_ + query + column, *const delta = delta_ + query + column;
    auto const zero = [](int, int) HYBRIDATTN_INLINE_LAMBDA { return Vec{}; };
    auto const at = [](int r, int v) HYBRIDATTN_INLINE_LAMBDA { return r * block + v * cpu::lanes<T>; };
    cpu::tile<MR, NV - skipped, T>(
        D_, whole_tile(D_, x.k, key + j, length_, pad_), {q_t_ + query * D_ + column, block}, zero,
        [&](int r, int v, Vec s) HYBRIDATTN_INLINE_LAMBDA { cpu::store<T>(p + at(r, v), weight(s, cpu::load(lse + v * cpu::lanes<T>))); });
    cpu::tile<MR, NV - skipped, T>(D_, whole_tile(D_, x.v, key + j, length_, pad_), {d_o_t_ + query * D_ + column, block}, zero,
                                   [&](int r, int v, Vec s) HYBRIDATTN_INLINE_LAMBDA {
                                     cpu::store<T>(d_s + at(r, v),
                                                   scale_ * cpu::load(p + at(r, v)) * (s - cpu::load(delta + v * cpu::lanes<T>)));
                                   });
  }
  // exp(scale s - lse). lse has a rounded score, so this score is rounded as well: where one key has weight 1, P is exactly 1.
  HYBRIDATTN_INLINE Vec weight(Vec s, Vec lse) const { return cpu::exp<T>(cpu::in_register<T>(scale_ * s) - lse); }

  // to += a b over the band, for up to `tile_rows` rows.
  HYBRIDATTN_INLINE void add_product(Band band, cpu::Scalars<T> a, Rows<T const> b, Rows<T> to, Index rows) {
    for_each_tile_column<T>(D_, [&](Index d, auto vectors) HYBRIDATTN_INLINE_LAMBDA {
      band_tile<MR, vectors, T>(
          band, a, {b.data + d, b.stride},
          [&](int r, int v) HYBRIDATTN_INLINE_LAMBDA { return r < rows ? cpu::load(to[r] + d + v * cpu::lanes<T>) : Vec{}; },
          [&](int r, int v, Vec sum) HYBRIDATTN_INLINE_LAMBDA {
            if (r < rows) cpu::store<T>(to[r] + d + v * cpu::lanes<T>, sum);
          });
    });
  }

  // (5) d_v += P^T d_o, d_k += dS^T q
  void key_gradients(BackwardRows<T> const& x, Index key, Index query) {
    for (Index j = 0; j < rows_from(key); j += MR) {
      Band const band{key + j - query, key + j - query + reach_, rows_from(query)};
      Index const rows = std::min<Index>(MR, rows_from(key) - j);
      add_product(band, {p_ + j * block, block, 1}, {x.d_o[query], x.d_o.stride}, {x.d_v[key + j], x.d_v.stride}, rows);
      add_product(band, {d_s_ + j * block, block, 1}, {x.q[query], x.q.stride}, {x.d_k[key + j], x.d_k.stride}, rows);
    }
  }
  // (5) d_q += dS k
  void query_gradients(BackwardRows<T> const& x, Index key, Index query) {
    for (Index i = 0; i < rows_from(query); i += MR) {
      Index const newest = query + i - key;
      add_product({newest - reach_ + 1, newest + 1, rows_from(key)}, {d_s_ + i, 1, block}, {x.k[key], x.k.stride},
                  {x.d_q[query + i], x.d_q.stride}, std::min<Index>(MR, rows_from(query) - i));
    }
  }

  Dim D_;
  Index length_, reach_, padded_;
  T scale_;
  T *q_t_, *d_o_t_;                   // [padded_ / block, D, block]
  T *lse_, *delta_;                   // [padded_]
  T *p_, *d_s_, *pad_;                // [block, block], keys x queries; [tile_rows, D]
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::full
#endif

// ==== hybridattn/attention/full/types.hpp
// Options, sizes and tensors of full attention. The equations are those of full.hpp.
#ifndef HYBRIDATTN_ATTENTION_FULL_TYPES_HPP
#define HYBRIDATTN_ATTENTION_FULL_TYPES_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

struct FullOptions {
  int window = 0;                        // a query sees its last `window` keys, itself included; 0: all
  QkNorm qk_norm = QkNorm::zero_centred;
  bool output_gate = true;               // o * sigmoid(x w_gate)
  int rotary_percent = 25;               // share of a head that rotates; 0: none
  Rotary rotary = Rotary::half_split;
};

namespace full {

struct Config {
  Index num_heads = 0;      // H;  0: the model's
  Index num_kv_heads = 0;   // HK; 0: num_heads
  Index head_dim = 0;       // D;  0: model_dim / num_heads
  double scale = 0;         // 0: head_dim^-1/2
  double rope_theta = 10000;
  double norm_eps = 1e-6;   // of the q/k norm
};

template <class S> struct Inputs {
  Held<S, 3> q;     // [N, H, D]
  Held<S, 3> k, v;  // [N, HK, D]
  HYBRIDATTN_FIELDS(q, k, v)
};
template <class S> struct Outputs {
  Held<S, 3> o;  // [N, H, D]
  HYBRIDATTN_FIELDS(o)
};
template <class S> struct Saved {
  Wide<S, 2> lse;  // [N, H], natural logarithm
  HYBRIDATTN_FIELDS(lse)
};
// Keys and values of earlier tokens, after norm and rotary. Position p is in row p, or with a window in row p % window.
template <class S> struct Cache {
  Held<S, 4> keys, values;  // [batch, capacity or window, HK, D]
  HYBRIDATTN_FIELDS(keys, values)
};

}  // namespace full

template <FullOptions O> struct FullAttention;

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/attention/full/cpu_extend.hpp
// Decoding on the CPU: a query of each head over the keys and values of a cache. The heads of a group take turns on a block
// of keys or values while the block is in the first-level cache, so each row is read from memory once.
#ifndef HYBRIDATTN_ATTENTION_FULL_CPU_EXTEND_HPP
#define HYBRIDATTN_ATTENTION_FULL_CPU_EXTEND_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::full {

// Cached and new keys and values of one head of one sequence.
template <class T> class SequenceKeys {
 public:
  using Rows = attention::Rows<T const>;

  SequenceKeys(int window, Sequence s, Index i, Index hk, Inputs<In<T>> const& x, Cache<Out<T>> const& cache)
      : past_(s.past), window_(window), ring_(cache.keys.extent(1)), cached_k_{cache.keys.row(i, 0, hk), cache.keys.stride[1]},
        cached_v_{cache.values.row(i, 0, hk), cache.values.stride[1]}, k_(attention::head_of(x.k, s, hk)),
        v_(attention::head_of(x.v, s, hk)) {}

  // Calls f(k, v, count) for each run of consecutive rows that query t sees, the oldest first.
  template <class F> HYBRIDATTN_INLINE void for_each_run(Index t, F f) const {
    Index const first = window_ == 0 ? 0 : std::max<Index>(0, past_ + t + 1 - window_);
    for (Index position = first, count = 0; position < past_; position += count) {
      Index const row = position % ring_;
      count = std::min(past_ - position, ring_ - row);
      f(from(cached_k_, row), from(cached_v_, row), count);
    }
    Index const first_new = std::max<Index>(0, first - past_);
    f(from(k_, first_new), from(v_, first_new), t + 1 - first_new);
  }
  // The same in blocks: f(number of the block's first row, k, v, number of the block's rows)
  template <class F> HYBRIDATTN_INLINE void for_each_block(Index t, F f) const {
    constexpr Index block = 32;
    Index seen = 0;
    for_each_run(t, [&](Rows k, Rows v, Index count) HYBRIDATTN_INLINE_LAMBDA {
      for (Index j = 0; j < count; j += block) f(seen + j, from(k, j), from(v, j), attention::AllRows{std::min(block, count - j)});
      seen += count;
    });
  }
  // Row j of the rows that query t sees.
  attention::KeyRows<T> at(Index t, Index j) const {
    Index const position = past_ + t + 1 - count(t) + j, row = position < past_ ? position % ring_ : position - past_;
    return position < past_ ? attention::KeyRows<T>{cached_k_[row], cached_v_[row]} : attention::KeyRows<T>{k_[row], v_[row]};
  }
  Index count(Index t) const { return window_ == 0 ? past_ + t + 1 : std::min<Index>(past_ + t + 1, window_); }

 private:
  static Rows from(Rows rows, Index first) { return {rows[first], rows.stride}; }

  Index past_, window_, ring_;
  Rows cached_k_, cached_v_, k_, v_;
};

// Query t of the heads of a group, whose rows are those of q and o. p [group, room] is scratch.
template <class T>
void attend(Index D, T scale, SequenceKeys<T> const& keys, Index t, Index group, attention::Rows<T const> q, attention::Rows<T> o, T* p,
            Index room) {
  using Rows = attention::Rows<T const>;
  attention::Rows<T> const weights{p, room};
  keys.for_each_block(t, [&](Index first, Rows k, Rows, attention::AllRows all) {
    attention::for_each_heads(group, [&](auto R, Index g) HYBRIDATTN_INLINE_LAMBDA {
      attention::dot_rows<R, T>(D, q.from(g), k, all, {weights[g] + first, room});                                    // (1)
    });
  });
  for (Index g = 0; g < group; ++g) {
    std::fill_n(o[g], D, T(0));
    T const total = attention::exponentials(scale, keys.count(t), weights[g]).total;                                  // (2)
    for (Index j = 0, count = keys.count(t); j < count; ++j) weights[g][j] *= T(1) / total;
  }
  keys.for_each_block(t, [&](Index first, Rows, Rows v, attention::AllRows all) {
    attention::for_each_heads(group, [&](auto R, Index g) HYBRIDATTN_INLINE_LAMBDA {
      attention::add_weighted_rows<R, T>(D, {weights[g] + first, room}, v, all, o.from(g));                           // (3)
    });
  });
  for (Index g = 0; g < group; ++g)
    if (!attention::is_moderate<T>(D, o[g]))
      attention::attend_in_order<T>(D, scale, q[g], keys.count(t), [&](Index j) { return keys.at(t, j); }, o[g]);
}

// Attention for the sequences with past tokens. Tasks are some queries of a group of heads.
template <class T>
void attend_cached(Cpu& cpu, int window, Config const& c, Sequences const& s, Inputs<In<T>> x, Cache<Out<T>> cache, View<T, 3> o) {
  constexpr Index piece = 8;
  Index const HK = c.num_kv_heads, group = c.num_heads / HK, pieces = ceil_div(s.longest(), piece);
  Index const room = attention::key_room<T>(cache.keys.extent(1)) + cpu::lanes<T>;   // a block's last vector may end after the last key
  Tensor<T, 2, Cpu> scratch{cpu, {Index{cpu.threads()}, group * room}};
  auto const memory = out(scratch);
  parallel_for(cpu, s.count() * HK * pieces, [&](Index task, int thread) {
    Index const i = task / pieces / HK, hk = task / pieces % HK, begin = task % pieces * piece;
    Sequence const sequence = s[static_cast<std::size_t>(i)];
    if (sequence.past == 0 || begin >= sequence.length) return;
    SequenceKeys<T> const keys{window, sequence, i, hk, x, cache};
    for (Index t = begin; t < std::min(begin + piece, sequence.length); ++t) {
      Index const n = sequence.start + t;
      attend<T>(c.head_dim, static_cast<T>(c.scale), keys, t, group, {x.q.row(n, hk * group), x.q.stride[1]},
                {o.row(n, hk * group), o.stride[1]}, memory.row(thread), room);
    }
  });
}

// Copies keys and values of new tokens into the cache; with a window, those of the last `window` tokens.
template <class T> void remember(Cpu& cpu, Sequences const& s, Inputs<In<T>> x, Cache<Out<T>> cache) {
  Index const ring = cache.keys.extent(1), HK = cache.keys.extent(2), D = cache.keys.extent(3);
  parallel_blocks(cpu, s.tokens(), 16, [&](Index first, Index last) {
    for (Index n = first; n < last; ++n) {
      Index const i = s.owners()(n);
      Sequence const sequence = s[static_cast<std::size_t>(i)];
      if (n + ring < sequence.start + sequence.length) continue;
      for (Index hk = 0; hk < HK; ++hk) {
        std::copy_n(x.k.row(n, hk), D, cache.keys.row(i, s.positions()(n) % ring, hk));
        std::copy_n(x.v.row(n, hk), D, cache.values.row(i, s.positions()(n) % ring, hk));
      }
    }
  });
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::full
#endif

// ==== hybridattn/attention/full/cpu_forward.hpp
// Forward on the CPU. Each lane is a query: scores are tiles of keys x queries, and the product with v reads their weights
// transposed.
//
// The block on the diagonal comes first. Its largest score is the query's reference for all other blocks, so weights are
// computed in the score tile's epilogue and no sum is rescaled. Any reference gives the same o. Where a weight would exceed e^10, a
// larger reference replaces it, for that query alone, so values up to 1e30 do not overflow. Products q . k are compared before they are
// scaled. So the largest product is exactly its own reference, for any size, and one replacement is enough.
#ifndef HYBRIDATTN_ATTENTION_FULL_CPU_FORWARD_HPP
#define HYBRIDATTN_ATTENTION_FULL_CPU_FORWARD_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::full {

inline constexpr Index forward_keys = 128;   // keys of a block; 64 to 256 are equally fast

template <class T, class Dim> class ForwardBlock {
 public:
  static constexpr Index queries = tile_columns<T>;
  static Index scratch(Index D) { return 2 * queries * D + forward_keys * queries + tile_rows * D; }

  ForwardBlock(Dim D, Sequence s, Index window, T scale, Rows<T const> k, Rows<T const> v, T* memory)
      : D_(D), length_(s.length), reach_(window), scale_(scale), size_(std::abs(scale)), slope_(size_ * cpu::log2_e<T>), k_(k), v_(v),
        q_t_(memory), o_(q_t_ + queries * D), p_(o_ + queries * D), pad_(p_ + forward_keys * queries) {}

  // Computes o and lse of the queries first .. first + queries - 1, up to the last query.
  void run(Index first, Rows<T const> q, Rows<T> o, Rows<wide_t<T>> lse) {
    first_ = first;
    transpose_rows(D_, q, first, length_, queries, q_t_);
    if (scale_ < 0)   // so that the largest product has the largest score
      for (Index i = 0; i < D_ * queries; ++i) q_t_[i] = -q_t_[i];
    diagonal();
    for (Index key = std::max<Index>(0, first - reach_ + 1) / MR * MR; key < first; key += forward_keys) {
      Index const count = std::min(forward_keys, first - key);
      if (key > first + queries - 1 - reach_) earlier<false>(key, count);
      else earlier<true>(key, count);
    }
    finish(q, o, lse);
  }

 private:
  static constexpr int MR = tile_rows, NV = tile_vectors;
  static constexpr T limit = 10, far = 80;   // largest exponents: of a weight, and of a weight that can still be scaled afterwards
  using Vec = cpu::Vec<T>;
  using Mask = cpu::Mask<T>;

  // Which queries of vector v see the key.
  HYBRIDATTN_INLINE Mask sees(Index key, int v) const {
    using Bits = typename cpu::BitsOf<T>::type;
    Mask const newer = cpu::lane_numbers<T>() + static_cast<Bits>(first_ + v * cpu::lanes<T> - key);   // i - j
    return (newer >= Bits(0)) & (newer < static_cast<Bits>(reach_));
  }
  // Vectors of queries that are older than every key of the tile. The tile skips them.
  static int first_vector(Index key_in_block) { return key_in_block >= cpu::lanes<T> ? 1 : 0; }

  // p = q . k of `tile_rows` keys and all vectors of queries but the first `from`, masked or not.
  template <int from> HYBRIDATTN_INLINE void diagonal_scores(Index key, Vec (&largest)[NV]) {
    T* const p = p_ + (key - first_) * queries + from * cpu::lanes<T>;
    cpu::tile<MR, NV - from, T>(
        D_, whole_tile(D_, k_, key, length_, pad_), {q_t_ + from * cpu::lanes<T>, queries},
        [](int, int) HYBRIDATTN_INLINE_LAMBDA { return Vec{}; },
        [&](int r, int v, Vec s) HYBRIDATTN_INLINE_LAMBDA {
          Vec const seen = cpu::select<T>(sees(key + r, from + v), s, cpu::broadcast<T>(-std::numeric_limits<T>::infinity()));
          largest[from + v] = cpu::max<T>(largest[from + v], seen);
          cpu::store<T>(p + r * queries + v * cpu::lanes<T>, s);
        });
  }

  // e^(score - reference), from products; above e^88 any number.
  HYBRIDATTN_INLINE Vec exponential(Vec s, Vec reference) const { return cpu::exp2_below_most<T>((s - reference) * slope_); }

  // The largest product that a query sees becomes its reference. If a query sees one key only, this key's weight is exactly 1.
  void diagonal() {
    Index const count = std::min(queries, length_ - first_);
    Vec largest[NV], sum[NV] = {};
    for (Vec& m : largest) m = cpu::broadcast<T>(-std::numeric_limits<T>::infinity());
    for (Index j = 0; j < count; j += MR) {
      if (first_vector(j) == 0) diagonal_scores<0>(first_ + j, largest);
      else diagonal_scores<1>(first_ + j, largest);
    }
    for (Index j = 0; j < count; ++j)
      for (int v = first_vector(j / MR * MR); v < NV; ++v) {
        T* const p = p_ + j * queries + v * cpu::lanes<T>;
        Vec const e = exponential(cpu::load(p), largest[v]);
        sum[v] += cpu::select<T>(sees(first_ + j, v), e, Vec{});
        cpu::store<T>(p, e);
      }
    for (int v = 0; v < NV; ++v) softmax_[v] = {largest[v], sum[v]};
    add_values<true>(first_, count);
  }

  // p = exp(score - reference) of keys before the block.
  template <bool masked> HYBRIDATTN_INLINE void weights(Index key, Index count, Vec (&largest)[NV], Vec (&sum)[NV]) {
    Vec reference[NV];
    for (int v = 0; v < NV; ++v) {
      reference[v] = softmax_[v].reference;
      largest[v] = cpu::broadcast<T>(-std::numeric_limits<T>::infinity());
      sum[v] = Vec{};
    }
    for (Index j = 0; j < count; j += MR) {
      T* const p = p_ + j * queries;
      cpu::tile<MR, NV, T>(
          D_, {k_[key + j], k_.stride, 1}, {q_t_, queries}, [](int, int) HYBRIDATTN_INLINE_LAMBDA { return Vec{}; },
          [&](int r, int v, Vec s) HYBRIDATTN_INLINE_LAMBDA {
            if constexpr (masked) s = cpu::select<T>(sees(key + j + r, v), s, cpu::broadcast<T>(-std::numeric_limits<T>::infinity()));
            largest[v] = cpu::max<T>(largest[v], s);
            Vec e = exponential(s, reference[v]);
            if constexpr (masked) e = cpu::select<T>(sees(key + j + r, v), e, Vec{});
            sum[v] += e;
            cpu::store<T>(p + r * queries + v * cpu::lanes<T>, e);
          });
    }
  }

  template <bool masked> void earlier(Index key, Index count) {
    Vec largest[NV], sum[NV];
    weights<masked>(key, count, largest, sum);
    if (is_beaten(largest, far)) {   // their exponentials may be infinite
      for (int v = 0; v < NV; ++v) raise_reference(v, largest[v], far);
      weights<masked>(key, count, largest, sum);
    }
    if (is_beaten(largest, limit))
      for (int v = 0; v < NV; ++v) {
        Vec const shrink = raise_reference(v, largest[v], limit);
        sum[v] *= shrink;
        for (T* p = p_ + v * cpu::lanes<T>; p < p_ + count * queries; p += queries) cpu::store<T>(p, shrink * cpu::load(p));
      }
    for (int v = 0; v < NV; ++v) softmax_[v].total += sum[v];
    add_values<false>(key, count);
  }

  bool is_beaten(Vec const (&largest)[NV], T by) const { return cpu::any<T>(beaten(0, largest[0], by) | beaten(1, largest[1], by)); }
  Mask beaten(int v, Vec largest, T by) const { return (largest - softmax_[v].reference) * size_ > by; }
  // Makes `largest` the reference where its weight is above e^by. Returns the factor for earlier sums: 1, and no bit changes, where
  // the reference stays.
  Vec raise_reference(int v, Vec largest, T by) {
    Vec const raised = cpu::select<T>(beaten(v, largest, by), largest, softmax_[v].reference);
    Vec const shrink = softmax_[v].rebase(raised, [&](Vec x, Vec y) HYBRIDATTN_INLINE_LAMBDA { return exponential(x, y); });
    for (int lane = 0; lane < cpu::lanes<T>; ++lane)
      for (Index d = 0; d < D_; ++d) o_[(v * cpu::lanes<T> + lane) * D_ + d] *= shrink[lane];
    return shrink;
  }

  // (3) o (+)= P v
  template <bool overwrite> HYBRIDATTN_INLINE void add_values(Index key, Index count) {
    for_each_tile_column<T>(D_, [&](Index d, auto vectors) HYBRIDATTN_INLINE_LAMBDA {
      for (Index i = 0; i < queries; i += MR) {
        T* const o = o_ + i * D_ + d;
        Index const newest = first_ + i - key;
        band_tile<MR, vectors, T>(
            {newest - reach_ + 1, newest + 1, count}, {p_ + i, 1, queries}, {v_[key] + d, v_.stride},
            [&](int r, int v) HYBRIDATTN_INLINE_LAMBDA { return overwrite ? Vec{} : cpu::load(o + r * D_ + v * cpu::lanes<T>); },
            [&](int r, int v, Vec x) HYBRIDATTN_INLINE_LAMBDA { cpu::store<T>(o + r * D_ + v * cpu::lanes<T>, x); });
      }
    });
  }

  // (2), (3)
  void finish(Rows<T const> q, Rows<T> o, Rows<wide_t<T>> lse) {
    alignas(cpu::vector_bytes) T inverse[std::size_t{queries}], logarithm[std::size_t{queries}];
    attention::Range<T> range;
    for (int v = 0; v < NV; ++v) {
      Vec const score = cpu::in_register<T>(size_ * softmax_[v].reference);   // rounded, as in backward
      range.add(score);
      cpu::store<T>(inverse + v * cpu::lanes<T>, T(1) / softmax_[v].total);
      cpu::store<T>(logarithm + v * cpu::lanes<T>, score + std::numbers::ln2_v<T> * cpu::log2<T>(softmax_[v].total));
    }
    Index const count = std::min(queries, length_ - first_);
    for (Index i = 0; i < count; ++i) {
      *lse[first_ + i] = logarithm[i];
      for (Index d = 0; d < D_; d += cpu::lanes<T>) {
        Vec const x = cpu::load(o_ + i * D_ + d);
        range.add(x);
        cpu::store<T>(o[first_ + i] + d, inverse[i] * x);
      }
    }
    if (range.is_moderate()) return;
    for (Index i = 0; i < count; ++i) {
      bool const keeps_lse = attention::Range<T>::holds(logarithm[i]);   // then only values are large
      if (keeps_lse && attention::is_moderate<T>(D_, o_ + i * D_)) continue;
      T const exact = in_order(first_ + i, q, o);
      if (!keeps_lse) *lse[first_ + i] = exact;
    }
  }
  T in_order(Index query, Rows<T const> q, Rows<T> o) const {
    Index const oldest = std::max<Index>(0, query - reach_ + 1);
    auto const key_at = [&](Index j) { return attention::KeyRows<T>{k_[oldest + j], v_[oldest + j]}; };
    return attention::attend_in_order<T>(D_, scale_, q[query], query - oldest + 1, key_at, o[query]);
  }

  Dim D_;
  Index length_, reach_, first_ = 0;
  T scale_, size_, slope_;           // size: its absolute value, slope: for powers of 2
  Rows<T const> k_, v_;
  T *q_t_, *o_, *p_, *pad_;          // [D, queries], [queries, D], [forward_keys, queries], [tile_rows, D]
  attention::OnlineSoftmax<Vec> softmax_[NV];   // of products before they are scaled
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::full
#endif

// ==== hybridattn/attention/full/cpu.hpp
#ifndef HYBRIDATTN_ATTENTION_FULL_CPU_HPP
#define HYBRIDATTN_ATTENTION_FULL_CPU_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {
namespace full {

// Tasks are pieces of a head's queries, those with the most keys first. On one thread, or with many heads, a task is a whole head.
template <class T, class Dim>
void forward_tiled(Cpu& cpu, Dim D, int window, Config const& c, Sequences const& s, Inputs<In<T>> x, Outputs<Out<T>> y,
                   Saved<Out<T>> saved) {
  using Queries = ForwardBlock<T, Dim>;
  if (s.tokens() == 0) return;
  Index const H = c.num_heads, group = H / c.num_kv_heads, heads = s.count() * H, tasks = cpu.threads() == 1 ? 1 : 8 * cpu.threads();
  Index const piece = round_up(ceil_div(s.longest() * heads, tasks), Queries::queries), pieces = ceil_div(s.longest(), piece);
  Tensor<T, 2, Cpu> scratch{cpu, {Index{cpu.threads()}, Queries::scratch(D)}};
  auto const memory = out(scratch);
  parallel_for(cpu, pieces * heads, [&](Index task, int thread) {
    Sequence const sequence = s[static_cast<std::size_t>(task % heads / H)];
    Index const begin = (pieces - 1 - task / heads) * piece, end = std::min(begin + piece, sequence.length);
    if (begin >= end) return;
    Index const h = task % H, hk = h / group;
    Queries block{D,
                  sequence,
                  reach(window, sequence),
                  static_cast<T>(c.scale),
                  head_of(x.k, sequence, hk),
                  head_of(x.v, sequence, hk),
                  memory.row(thread)};
    for (Index first = begin; first < end; first += Queries::queries)
      block.run(first, head_of(x.q, sequence, h), head_of(y.o, sequence, h), {&saved.lse(sequence.start, h), saved.lse.stride[0]});
  });
}

template <class T, class Dim>
void backward_tiled(Cpu& cpu, Dim D, int window, Config const& c, Sequences const& s, Inputs<In<T>> x, Outputs<In<T>> y, Saved<In<T>> saved,
                    Outputs<In<T>> d_y, Inputs<Out<T>> d_x) {
  using Head = BackwardHead<T, Dim>;
  if (s.tokens() == 0) return;
  Index const HK = c.num_kv_heads, group = c.num_heads / HK;
  Tensor<T, 2, Cpu> scratch{cpu, {Index{cpu.threads()}, Head::scratch(D, s.longest())}};
  auto const memory = out(scratch);
  parallel_for(cpu, s.count() * HK, [&](Index task, int thread) {
    Sequence const sequence = s[static_cast<std::size_t>(task / HK)];
    if (sequence.length == 0) return;
    Index const hk = task % HK;
    Rows<T> const d_k = head_of(d_x.k, sequence, hk), d_v = head_of(d_x.v, sequence, hk);
    for (Index j = 0; j < sequence.length; ++j) {
      std::fill_n(d_k[j], D, T(0));
      std::fill_n(d_v[j], D, T(0));
    }
    Head head{D, sequence, reach(window, sequence), static_cast<T>(c.scale), memory.row(thread)};
    for (Index h = hk * group; h < (hk + 1) * group; ++h)
      head.run({.q = head_of(x.q, sequence, h),
                .k = head_of(x.k, sequence, hk),
                .v = head_of(x.v, sequence, hk),
                .o = head_of(y.o, sequence, h),
                .d_o = head_of(d_y.o, sequence, h),
                .lse = {&saved.lse(sequence.start, h), saved.lse.stride[0]},
                .d_q = head_of(d_x.q, sequence, h),
                .d_k = d_k,
                .d_v = d_v});
  });
}

// A compile-time D = 32 makes backward 5 % faster; 16 gains 1 to 4 %, 64, 128 and 256 less than 1 %, too little to compile the
// kernels again.
template <class F> void with_head_dim(Index D, F f) {
  with_constant<32>(D, f, [&] { f(D); });
}

// The kernels need heads of whole vectors. Other heads are copied and padded with zeros, which change no product.
template <class T> Tensor<T, 3, Cpu> widened(Cpu& cpu, View<T const, 3> x) {
  Index const H = x.extent(1), D = x.extent(2);
  Tensor<T, 3, Cpu> tensor{cpu, {x.extent(0), H, round_up(D, cpu::lanes<T>)}};
  auto const wide = out(tensor);
  parallel_blocks(cpu, x.extent(0) * H, 256, [&](Index first, Index last) {
    for (Index row = first; row < last; ++row) {
      T* const to = std::copy_n(x.row(row / H, row % H), D, wide.row(row / H, row % H));
      std::fill_n(to, wide.extent(2) - D, T(0));
    }
  });
  return tensor;
}
template <class T> void narrow(Cpu& cpu, View<T const, 3> wide, View<T, 3> x) {
  Index const H = x.extent(1);
  parallel_blocks(cpu, x.extent(0) * H, 256, [&](Index first, Index last) {
    for (Index row = first; row < last; ++row) std::copy_n(wide.row(row / H, row % H), x.extent(2), x.row(row / H, row % H));
  });
}

template <class T>
void forward(Cpu& cpu, FullOptions o, Config const& c, Sequences const& s, Inputs<In<T>> x, Outputs<Out<T>> y, Saved<Out<T>> saved) {
  if (c.head_dim % cpu::lanes<T> == 0)
    return with_head_dim(c.head_dim, [&](auto D) { forward_tiled<T>(cpu, D, o.window, c, s, x, y, saved); });
  auto const q = widened(cpu, x.q), k = widened(cpu, x.k), v = widened(cpu, x.v);
  Tensor<T, 3, Cpu> wide_o{cpu, q.shape()};
  Config wide = c;
  wide.head_dim = q.shape()[2];
  forward<T>(cpu, o, wide, s, {.q = in(q), .k = in(k), .v = in(v)}, {.o = out(wide_o)}, saved);
  narrow(cpu, in(wide_o), y.o);
}
template <class T>
void backward(Cpu& cpu, FullOptions o, Config const& c, Sequences const& s, Inputs<In<T>> x, Outputs<In<T>> y, Saved<In<T>> saved,
              Outputs<In<T>> d_y, Inputs<Out<T>> d_x) {
  if (c.head_dim % cpu::lanes<T> == 0)
    return with_head_dim(c.head_dim, [&](auto D) { backward_tiled<T>(cpu, D, o.window, c, s, x, y, saved, d_y, d_x); });
  auto const q = widened(cpu, x.q), k = widened(cpu, x.k), v = widened(cpu, x.v), wide_o = widened(cpu, y.o), d_o = widened(cpu, d_y.o);
  Tensor<T, 3, Cpu> d_q{cpu, q.shape()}, d_k{cpu, k.shape()}, d_v{cpu, v.shape()};
  Config wide = c;
  wide.head_dim = q.shape()[2];
  backward<T>(cpu, o, wide, s, {.q = in(q), .k = in(k), .v = in(v)}, {.o = in(wide_o)}, saved, {.o = in(d_o)},
              {.q = out(d_q), .k = out(d_k), .v = out(d_v)});
  narrow(cpu, in(d_q), d_x.q);
  narrow(cpu, in(d_k), d_x.k);
  narrow(cpu, in(d_v), d_x.v);
}

// Sequences without past tokens are computed by the tiles of forward, other sequences over rows of the cache.
template <class T>
void extend(Cpu& cpu, FullOptions o, Config const& c, Sequences const& s, Inputs<In<T>> x, Cache<Out<T>> cache, Outputs<Out<T>> y) {
  Index const ring = cache.keys.extent(1);
  check_fits(s, cache.keys.extent(0), ring == o.window ? std::numeric_limits<Index>::max() : ring);
  if (s.any_begin()) {   // first, because it may overwrite the rows of the other sequences
    Tensor<wide_t<T>, 2, Cpu> lse{cpu, {s.tokens(), c.num_heads}};
    forward<T>(cpu, o, c, s.beginnings(), x, y, {.lse = out(lse)});
  }
  if (s.any_continue()) attend_cached<T>(cpu, o.window, c, s, x, cache, y.o);
  remember<T>(cpu, s, x, cache);
}

}  // namespace full

template <FullOptions O> struct On<FullAttention<O>, Cpu> : InFloat<FullAttention<O>, Cpu> {
  using InFloat<FullAttention<O>, Cpu>::forward, InFloat<FullAttention<O>, Cpu>::backward, InFloat<FullAttention<O>, Cpu>::extend;
  template <std::floating_point T>
  static void forward(Cpu& cpu, full::Config const& c, Sequences const& s, full::Inputs<In<T>> x, full::Outputs<Out<T>> y,
                      full::Saved<Out<T>> saved) {
    full::forward(cpu, O, c, s, x, y, saved);
  }
  template <std::floating_point T>
  static void backward(Cpu& cpu, full::Config const& c, Sequences const& s, full::Inputs<In<T>> x, full::Outputs<In<T>> y,
                       full::Saved<In<T>> saved, full::Outputs<In<T>> d_y, full::Inputs<Out<T>> d_x) {
    full::backward(cpu, O, c, s, x, y, saved, d_y, d_x);
  }
  template <std::floating_point T>
  static void extend(Cpu& cpu, full::Config const& c, Sequences const& s, full::Inputs<In<T>> x, full::Cache<Out<T>> cache,
                     full::Outputs<Out<T>> y) {
    full::extend(cpu, O, c, s, x, cache, y);
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/attention/full/steps.hpp
// The step before full attention in a layer: norm and rotary on queries and keys.
#ifndef HYBRIDATTN_ATTENTION_FULL_STEPS_HPP
#define HYBRIDATTN_ATTENTION_FULL_STEPS_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::full {

template <class S> struct PrepareParams {
  Wide<S, 1> q_norm, k_norm;  // [D], empty without qk_norm
  HYBRIDATTN_FIELDS(q_norm, k_norm)
};

template <FullOptions O> struct Prepare {
  template <class S> using Params = PrepareParams<S>;

  static constexpr bool changes = O.qk_norm != QkNorm::none || O.rotary_percent > 0;
  static constexpr bool makes(std::string_view input) { return changes && input != "v"; }

  static Params<Shapes> params(Config const& c) {
    Shape<1> const weight{O.qk_norm == QkNorm::none ? 0 : c.head_dim};
    return {.q_norm = weight, .k_norm = weight};
  }
  static Params<Starts> starts(Config const& c) { return {.q_norm = norm(c).start(), .k_norm = norm(c).start()}; }

  template <class B, class T>
  static void forward(B& backend, Config const& c, SequencesOn<B> const& s, Inputs<Narrow<In<T>>> raw, Params<In<T>> p, Inputs<Out<T>> x) {
    if constexpr (changes) {
      auto const turn = rotation<T>(backend, c, s);
      norm(c).forward(backend, turn, raw.q, p.q_norm, x.q);
      norm(c).forward(backend, turn, raw.k, p.k_norm, x.k);
    }
  }
  template <class B, class T>
  static void backward(B& backend, Config const& c, SequencesOn<B> const& s, Inputs<Narrow<In<T>>> raw, Params<In<T>> p, Inputs<In<T>>,
                       Inputs<In<T>> d_x, Inputs<Narrow<Out<T>>> d_raw, Params<Out<T>> d_p) {
    if constexpr (changes) {
      auto const turn = rotation<T>(backend, c, s);
      norm(c).backward(backend, turn, raw.q, p.q_norm, d_x.q, d_raw.q, d_p.q_norm);
      norm(c).backward(backend, turn, raw.k, p.k_norm, d_x.k, d_raw.k, d_p.k_norm);
    }
  }

 private:
  static HeadNorm norm(Config const& c) { return {O.qk_norm, c.norm_eps}; }
  template <class T, class B> static Rotation<T, B> rotation(B& backend, Config const& c, SequencesOn<B> const& s) {
    return {backend, s, c.head_dim, O.rotary_percent, O.rotary, c.rope_theta};
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::full
#endif

// ==== hybridattn/attention/full/full.hpp
// Full causal attention (Vaswani et al., arXiv 1706.03762), computed tile by tile (arXiv 2205.14135).
//   (1) s_ij = scale q_i . k_j                 j <= i in the same sequence, and i - j < window when a window is set
//   (2) lse_i = log sum_j exp(s_ij)            P_ij = exp(s_ij - lse_i)
//   (3) o_i = sum_j P_ij v_j                   a row that sees no key: o_i = 0, lse_i = -inf
//   (4) dS_ij = scale P_ij (d_o_i . v_j - delta_i)      delta_i = d_o_i . o_i
//   (5) d_q_i = sum_j dS_ij k_j    d_k_j = sum_i dS_ij q_i    d_v_j = sum_i P_ij d_o_i
// Query head h reads key/value head h / (H / HK); d_k and d_v sum over the group. Backward computes P again.
#ifndef HYBRIDATTN_ATTENTION_FULL_FULL_HPP
#define HYBRIDATTN_ATTENTION_FULL_FULL_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

template <FullOptions O = FullOptions{}> struct FullAttention : PolicyDefaults {
  static_assert(O.window >= 0, "FullOptions: window is a number of keys, or 0 for all");
  static_assert(0 <= O.rotary_percent && O.rotary_percent <= 100, "FullOptions: rotary_percent is a share of the head, 0 .. 100");

  static constexpr std::string_view name = "Full";
  static constexpr FullOptions options = O;
  using Config = full::Config;
  template <class S> using Inputs = full::Inputs<S>;
  template <class S> using Outputs = full::Outputs<S>;
  template <class S> using Saved = full::Saved<S>;
  template <class S> using Cache = full::Cache<S>;
  using Prepare = full::Prepare<O>;
  using Finish = std::conditional_t<O.output_gate, SigmoidFinish, NoStep>;

  static Config complete(Config c, Index model_dim, Index num_heads) {
    check_numbers(c);
    if (c.num_heads == 0) c.num_heads = num_heads;
    if (c.num_kv_heads == 0) c.num_kv_heads = c.num_heads;
    c.head_dim = default_head_dim(c.head_dim, model_dim, c.num_heads);
    if (c.scale == 0) c.scale = 1 / std::sqrt(static_cast<double>(c.head_dim));
    check_groups("FullAttention", c.num_heads, c.num_kv_heads);
    return c;
  }
  static Inputs<Shapes> inputs(Config const& c, Sequences const& s) {
    Shape<3> const keys{s.tokens(), c.num_kv_heads, c.head_dim};
    return {.q = {s.tokens(), c.num_heads, c.head_dim}, .k = keys, .v = keys};
  }
  static Outputs<Shapes> outputs(Config const& c, Sequences const& s) { return {.o = {s.tokens(), c.num_heads, c.head_dim}}; }
  static Saved<Shapes> saved(Config const& c, Sequences const& s) { return {.lse = {s.tokens(), c.num_heads}}; }
  static Cache<Shapes> cache(Config const& c, Index batch, Index capacity) {
    Shape<4> const rows{batch, O.window == 0 ? capacity : std::min<Index>(O.window, capacity), c.num_kv_heads, c.head_dim};
    return {.keys = rows, .values = rows};
  }

 private:
  static void check_numbers(Config const& c) {
    check_size("FullAttention", "num_heads", c.num_heads);
    check_size("FullAttention", "num_kv_heads", c.num_kv_heads);
    check_size("FullAttention", "head_dim", c.head_dim);
    check_number("FullAttention", "scale", c.scale);
    check_positive("FullAttention", "rope_theta", c.rope_theta);
    check_positive("FullAttention", "norm_eps", c.norm_eps);
  }
};
using Full = FullAttention<>;

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/attention/gdn/cpu_groups.hpp
// Shared by the sweeps over the tokens of a head. Tokens are computed in groups of two or four: one pass over a state has the arithmetic
// of a group, but loads and stores the state once. Groups are counted from the start of the sequence, and the last group is
// padded with zeros, so a token's result does not depend on the number of later tokens. Sixteen groups are a block: the
// small terms of its groups are computed together, one group in each lane.
#ifndef HYBRIDATTN_ATTENTION_GDN_CPU_GROUPS_HPP
#define HYBRIDATTN_ATTENTION_GDN_CPU_GROUPS_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::gdn::detail {

using cpu::lanes, cpu::load, cpu::store, cpu::Vec;

inline constexpr int group_tokens = cpu::tuning.delta.rows, block_groups = 16, block_tokens = group_tokens * block_groups;

// Columns of a state in one pass: so few vectors that the sums and factors of a group stay in registers.
inline constexpr int panel_vectors = cpu::tuning.delta.vectors;
template <class T> inline constexpr int panel_width = panel_vectors * lanes<T>;
// Panels that take turns: the short, serial work between two passes over one panel overlaps with the passes over the others. A panel
// has rows of its own: the products of one group with the state, and the updates of the state by one group.
inline constexpr Index panels_in_turn = 4, panel_rows = 3 * group_tokens;
// Rows of a state whose products with a group are summed across lanes together.
inline constexpr int error_rows = 4;
// K and V in whole panels and whole groups of rows.
template <class T> Index padded(Index dim) { return round_up(dim, std::max(panel_width<T>, error_rows)); }

// A row of a panel, in registers.
template <class T> struct PanelRow {
  Vec<T> vector[std::size_t{panel_vectors}] = {};

  PanelRow() = default;
  HYBRIDATTN_INLINE explicit PanelRow(T const* from) {
    HYBRIDATTN_UNROLL
    for (int v = 0; v < panel_vectors; ++v) vector[v] = cpu::in_register<T>(load(from + v * lanes<T>));
  }
  HYBRIDATTN_INLINE void store(T* to) const {
    HYBRIDATTN_UNROLL
    for (int v = 0; v < panel_vectors; ++v) cpu::store<T>(to + v * lanes<T>, vector[v]);
  }
  // *this += factor x
  HYBRIDATTN_INLINE void add(T factor, PanelRow const& x) {
    HYBRIDATTN_UNROLL
    for (int v = 0; v < panel_vectors; ++v) vector[v] += factor * x.vector[v];
  }
  HYBRIDATTN_INLINE void operator*=(T factor) {
    HYBRIDATTN_UNROLL
    for (int v = 0; v < panel_vectors; ++v) vector[v] *= factor;
  }
};
// Calls f(column) for every vector of a panel.
template <class T, class F> HYBRIDATTN_INLINE void for_panel_vectors(F f) {
  HYBRIDATTN_UNROLL
  for (int v = 0; v < panel_vectors; ++v) f(v * lanes<T>);
}

// Consecutive tokens of one sequence, at most block_tokens.
struct TokenBlock {
  Index first;   // in the batch
  Index tokens;

  Index groups() const { return ceil_div(tokens, group_tokens); }
};
inline Index count_blocks(Sequence s) { return ceil_div(s.length, block_tokens); }
inline TokenBlock block_of(Sequence s, Index b) {
  return {s.start + b * block_tokens, std::min<Index>(block_tokens, s.length - b * block_tokens)};
}

// TokenRows of one head, one for each token.
template <class T> struct TokenRows {
  T* data;
  Index stride;

  TokenRows() = default;
  HYBRIDATTN_INLINE TokenRows(T* first, Index step) : data(first), stride(step) {}
  template <class U> requires std::is_same_v<U const, T>
  HYBRIDATTN_INLINE TokenRows(TokenRows<U> const& writable) : TokenRows(writable.data, writable.stride) {}
  HYBRIDATTN_INLINE T* operator[](Index token) const { return data + token * stride; }
  HYBRIDATTN_INLINE TokenRows group(Index g) const { return {data + g * group_tokens * stride, stride}; }
  HYBRIDATTN_INLINE TokenRows columns(Index first) const { return {data + first, stride}; }
};

// Kernels need whole groups of rows and whole panels of columns. Such rows are used in place, other rows through a copy, padded
// with zeros.
template <class T> bool is_whole(View<T, 3> x, TokenBlock block, TokenRows<std::remove_const_t<T>> copy) {
  return block.tokens % group_tokens == 0 && x.extent(2) == copy.stride;
}
template <class T> TokenRows<T const> rows_to_read(View<T const, 3> x, TokenBlock block, Index head, TokenRows<T> copy) {
  if (is_whole(x, block, copy)) return {x.row(block.first, head), x.stride[0]};
  for (Index n = 0; n < block.groups() * group_tokens; ++n) {
    Index const columns = n < block.tokens ? x.extent(2) : 0;
    if (columns > 0) std::copy_n(x.row(block.first + n, head), columns, copy[n]);
    std::fill_n(copy[n] + columns, copy.stride - columns, T(0));
  }
  return {copy.data, copy.stride};
}
template <class T> TokenRows<T> rows_to_write(View<T, 3> y, TokenBlock block, Index head, TokenRows<T> copy) {
  if (y.empty() || !is_whole(y, block, copy)) return copy;
  return {y.row(block.first, head), y.stride[0]};
}
// Copies the results from the copy, if there is one, to y.
template <class T> void write_back(View<T, 3> y, TokenBlock block, Index head, TokenRows<T> copy) {
  if (y.empty() || is_whole(y, block, copy)) return;
  for (Index n = 0; n < block.tokens; ++n) std::copy_n(copy[n], y.extent(2), y.row(block.first + n, head));
}

// Numbers of the groups of a block, one in each lane.
template <class T> struct alignas(cpu::vector_bytes) PerGroup {
  T group[block_groups];

  HYBRIDATTN_INLINE T operator[](Index g) const { return group[g]; }
  HYBRIDATTN_INLINE Vec<T> get(int g) const { return load(group + g); }
  HYBRIDATTN_INLINE void put(int g, Vec<T> x) { store(group + g, x); }
};
// Calls f(g) for every vector of groups g .. g + lanes - 1.
template <class T, class F> HYBRIDATTN_INLINE void for_groups(F f) {
  for (int g = 0; g < block_groups; g += lanes<T>) f(g);
}

// Pairs of tokens i, j of a group: below(i, j) for j < i, then upto(i, j) for j <= i.
inline constexpr int pairs = group_tokens * group_tokens;
constexpr int below(int i, int j) { return i * (i - 1) / 2 + j; }
constexpr int upto(int i, int j) { return group_tokens * (group_tokens - 1) / 2 + i * (i + 1) / 2 + j; }

// The gates of a block. Padding does not change the state: decay 1, beta 0.
template <class T> struct Gates {
  PerGroup<T> beta[group_tokens];
  PerGroup<T> after[group_tokens + 1];  // [i] exp(g_i + ... + the last g); 1 after the last token
  PerGroup<T> until[group_tokens];      // [i] exp(g_0 + ... + g_i)
  PerGroup<T> between[pairs];           // [below(i, j)], [upto(i, j)] exp(g_{j+1} + ... + g_i)
};

// log 2 = high + low. The product of high with a whole number below 2^11 has no rounding.
template <class T> struct LogTwo;
template <> struct LogTwo<float> {
  static constexpr float high = 0x1.62ep-1f, low = 0x1.0bfbe8p-15f;
};
template <> struct LogTwo<double> {
  static constexpr double high = 0x1.62e42fefap-1, low = 0x1.cf79abc9e3b3ap-40;
};

// exp(g), or 0 below the smallest normal number. The rounding of g log2(e) alone would give an error |g| times that of the result.
template <class T> HYBRIDATTN_INLINE Vec<T> decay_of(Vec<T> g) {
  using E = cpu::detail::Exp2<T>;
  Vec<T> const exponent = g * cpu::log2_e<T>, whole = (exponent + E::magic) - E::magic;
  Vec<T> const rest = (g - whole * LogTwo<T>::high) - whole * LogTwo<T>::low;
  Vec<T> const decay = cpu::exp2<T>(whole) * cpu::exp2<T>(rest * cpu::log2_e<T>);
  Vec<T> const in_range = cpu::select<T>(exponent < E::least, Vec<T>{}, decay);
  Vec<T> const any = cpu::select<T>(exponent > -E::least, cpu::broadcast(std::numeric_limits<T>::infinity()), in_range);
  return cpu::select<T>(g == g, any, g);
}

template <class T> void multiply_decays(PerGroup<T> const (&decay)[group_tokens], Gates<T>& gates) {
  for_groups<T>([&](int g) HYBRIDATTN_INLINE_LAMBDA {
    Vec<T> until = cpu::broadcast<T>(1), after = until;
    gates.after[group_tokens].put(g, after);
    for (int i = 0; i < group_tokens; ++i) {
      gates.until[i].put(g, until *= decay[i].get(g));
      gates.after[group_tokens - 1 - i].put(g, after *= decay[group_tokens - 1 - i].get(g));
      Vec<T> between = cpu::broadcast<T>(1);
      for (int j = i; j >= 0; --j) {
        gates.between[upto(i, j)].put(g, between);
        if (j < i) gates.between[below(i, j)].put(g, between);
        between *= decay[j].get(g);
      }
    }
  });
}
template <class T> void read_gates(View<T const, 2> g, View<T const, 2> beta, TokenBlock block, Index h, Gates<T>& gates) {
  PerGroup<T> decay[group_tokens];
  for (Index n = 0; n < block_tokens; ++n) {
    bool const is_token = n < block.tokens;
    decay[n % group_tokens].group[n / group_tokens] = is_token ? g(block.first + n, h) : T(0);
    gates.beta[n % group_tokens].group[n / group_tokens] = is_token ? beta(block.first + n, h) : T(0);
  }
  for (auto& of_token : decay)
    for_groups<T>([&](int first) HYBRIDATTN_INLINE_LAMBDA { of_token.put(first, decay_of<T>(of_token.get(first))); });
  multiply_decays(decay, gates);
}

// A state is kept as carry * stored, so a decay costs a product of two numbers and no pass over memory. The carry stays well above 1,
// so the stored matrix, and its products before they are scaled, overflow only where the state does. When the carry leaves its range,
// it is multiplied into the stored matrix and starts again.
template <class T> struct Carry {
  static constexpr T start = T(0x1p24), least = T(0x1p4), most = T(0x1p44);

  PerGroup<T> before;   // the carry before the group
  PerGroup<T> inverse;  // 1 / the carry after the group
  PerGroup<T> fold;     // factor of the stored state before the group is added, 1 for most groups

  // Returns the carry after group g, from the carry before it and the decay of the whole group. Called in the order of the sweep.
  HYBRIDATTN_INLINE T pass(T carry, Index g, T decay) {
    before.group[g] = carry;
    carry *= decay;
    bool const in_range = carry >= least && carry <= most;   // false for a NaN, which then reaches all of the state
    fold.group[g] = in_range ? T(1) : carry / start;
    carry = in_range ? carry : start;
    inverse.group[g] = 1 / carry;
    return carry;
  }
};

// products[below(i, j)] = dot_share a_i . c_j, products[upto(i, j)] = dot_share b_i . c_j for the tokens of each group. There are
// no products with later tokens. dot_share keeps a dot in range that would overflow before it is scaled.
template <class T> inline constexpr T dot_share = T(0x1p-8);
template <class T> HYBRIDATTN_INLINE void group_dots(TokenRows<T const> a, TokenRows<T const> b, TokenRows<T const> c, Index width,
                                                     T* dots) {
  Vec<T> sum[pairs] = {};
  for (Index d = 0; d < width; d += lanes<T>) {
    Vec<T> x[group_tokens];
    HYBRIDATTN_UNROLL
    for (int j = 0; j < group_tokens; ++j) x[j] = dot_share<T> * load(c[j] + d);
    HYBRIDATTN_UNROLL
    for (int i = 0; i < group_tokens; ++i) {
      Vec<T> const y = load(a[i] + d), z = load(b[i] + d);
      HYBRIDATTN_UNROLL
      for (int j = 0; j < i; ++j) sum[below(i, j)] += y * x[j];
      HYBRIDATTN_UNROLL
      for (int j = 0; j <= i; ++j) sum[upto(i, j)] += z * x[j];
    }
  }
  cpu::sum_each<pairs>(sum, dots);
}
// `pairs` numbers of each group, one group in each lane.
template <class T> using GroupDots = T[block_groups][pairs];
template <class T> void to_lanes(GroupDots<T> const& dots, PerGroup<T> (&products)[pairs]) {
  if constexpr (pairs % lanes<T> == 0) {
    for (int p = 0; p < pairs; p += lanes<T>)
      for (int g = 0; g < block_groups; g += lanes<T>) cpu::transpose(&dots[g][p], pairs, products[p].group + g, block_groups);
  } else {
    for (int p = 0; p < pairs; ++p)
      for (int g = 0; g < block_groups; ++g) products[p].group[g] = dots[g][p];
  }
}
template <class T>
void pair_dots(TokenRows<T const> a, TokenRows<T const> b, TokenRows<T const> c, Index width, Index groups,
               PerGroup<T> (&products)[pairs]) {
  alignas(cpu::vector_bytes) GroupDots<T> dots = {};
  for (Index g = 0; g < groups; ++g) group_dots(a.group(g), b.group(g), c.group(g), width, dots[g]);
  to_lanes<T>(dots, products);
}

// k_i . k_j and scale q_i . k_j, times the decay from token j to token i.
template <class T>
void key_pairs(Gates<T> const& gates, TokenRows<T const> q, TokenRows<T const> k, Index K, Index groups, T scale,
               PerGroup<T> (&pair)[pairs]) {
  pair_dots(k, q, k, K, groups, pair);
  for_groups<T>([&](int g) HYBRIDATTN_INLINE_LAMBDA {
    for (int p = 0; p < pairs; ++p)
      pair[p].put(g, (p < upto(0, 0) ? T(1) : scale) / dot_share<T> * gates.between[p].get(g) * pair[p].get(g));
  });
}

// dots[i] = a_i . b_i
template <class T> HYBRIDATTN_INLINE void token_dots(TokenRows<T const> a, TokenRows<T const> b, Index width, T* dots) {
  Vec<T> sum[group_tokens] = {};
  for (Index d = 0; d < width; d += lanes<T>) {
    HYBRIDATTN_UNROLL
    for (int i = 0; i < group_tokens; ++i) sum[i] += load(a[i] + d) * load(b[i] + d);
  }
  cpu::sum_each<group_tokens>(sum, dots);
}

// A state [K, V] of one head as panels of columns: element (k, v) is at (v / panel) panel K + k panel + v % panel. Its value is
// Carry::start * stored.
template <class T> void read_state(View<T const, 4> states, Index i, Index h, Index rows, Index columns, T* state) {
  std::fill_n(state, rows * columns, T(0));
  if (states.empty()) return;
  for (Index k = 0; k < states.extent(2); ++k)
    for (Index v = 0; v < states.extent(3); v += panel_width<T>)
      std::transform(states.row(i, h, k) + v, states.row(i, h, k) + std::min<Index>(v + panel_width<T>, states.extent(3)),
                     state + v * rows + k * panel_width<T>, [](T x) { return x / Carry<T>::start; });
}
template <class T> void write_state(T const* state, T carry, Index i, Index h, Index rows, View<T, 4> states) {
  if (states.empty()) return;
  for (Index k = 0; k < states.extent(2); ++k) {
    T* const row = states.row(i, h, k);
    for (Index v = 0; v < states.extent(3); ++v)
      row[v] = carry * state[v / panel_width<T> * panel_width<T> * rows + k * panel_width<T> + v % panel_width<T>];
  }
}

// <states, carry * state>, summed in double.
template <class T> double dot_state(View<T const, 4> states, Index i, Index h, Index rows, T const* state, T carry) {
  double sum = 0;
  if (states.empty()) return sum;
  for (Index k = 0; k < states.extent(2); ++k)
    for (Index v = 0; v < states.extent(3); ++v)
      sum += static_cast<double>(states(i, h, k, v)) *
             static_cast<double>(carry * state[v / panel_width<T> * panel_width<T> * rows + k * panel_width<T> + v % panel_width<T>]);
  return sum;
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::gdn::detail
#endif

// ==== hybridattn/attention/gdn/cpu_decay.hpp
// d_g by (7). <S, X> is a sum over pairs of a token j that writes and a later token l that reads. A pair adds to d_g_t if it crosses
// the decay of token t: j < t <= l. For token i of a group these are
//   pairs inside the group, j < i <= l                         reads by tokens l >= i of the S before the group
//   writes of tokens j < i that the X after the group reads    pairs across the whole group, from S before to X after
// Pairs j = l are left out: they cross no decay, and at strong decays they would make most of the rounding error. The sum of the pairs
// across a group is <S, X> after the group less the group's writes, from the last group to the first, so no token's d_g depends on an
// earlier token's d_o. Where the group's decay is below rounding, this difference has no correct digit and counts as 0. Its rounding
// error does not fade as the products do, so once a block the sum across a group is computed afresh from S and X.
#ifndef HYBRIDATTN_ATTENTION_GDN_CPU_DECAY_HPP
#define HYBRIDATTN_ATTENTION_GDN_CPU_DECAY_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::gdn::detail {

// The sums of one block of one head.
template <class T> struct DecayPaths {
  PerGroup<T> through[group_tokens];   // the pairs across the decay of token i, except those across the whole group
  PerGroup<T> reads, writes;           // reads by the group of the S before it; writes of the group that the X after it reads
  PerGroup<T> decay;                   // of the whole group
  Index fresh;                         // the group whose pairs across it are computed afresh
  T* gradient;                         // X after that group is carry * gradient [K, V], in panels
  T carry;
  double passes;                       // decay <S before that group, X after it>
};

// The group to compute afresh, from the last group to the first: where the decay since the last such group is below 2^-10, or else
// the first group. `since` is carried from block to block.
template <class T> Index fresh_group(PerGroup<T> const& decay, Index groups, T& since) {
  Index fresh = groups - 1;
  while (fresh > 0 && (since *= decay[fresh]) >= T(0x1p-10)) --fresh;
  since = 1;
  for (Index g = 0; g < fresh; ++g) since *= decay[g];
  return fresh;
}

// The pairs inside groups. `keys` are k_l . k_j and scale q_l . k_j with the decay between, `values` are dot_share times w_l . e_j
// and d_o_l . e_j.
template <class T>
void paths_inside(PerGroup<T> const (&beta)[group_tokens], PerGroup<T> const (&keys)[pairs], PerGroup<T> const (&values)[pairs],
                  DecayPaths<T>& paths) {
  for_groups<T>([&](int g) HYBRIDATTN_INLINE_LAMBDA {
    Vec<T> through[group_tokens] = {};
    for (int l = 1; l < group_tokens; ++l)
      for (int j = 0; j < l; ++j) {
        Vec<T> const read = keys[upto(l, j)].get(g) * values[upto(l, j)].get(g);
        Vec<T> const erased = beta[l].get(g) * keys[below(l, j)].get(g) * values[below(l, j)].get(g);
        for (int i = j + 1; i <= l; ++i) through[i] += beta[j].get(g) / dot_share<T> * (read - erased);
      }
    for (int i = 0; i < group_tokens; ++i) paths.through[i].put(g, through[i]);
  });
}

// Reads and writes of all groups. `crossing` [groups, crossing_rows, panel] has, for each lane of the columns, the tokens' reads of the S
// before their group, then k . stored X e. `write` times the latter is the token's write.
inline constexpr int crossing_rows = 2 * group_tokens;
template <class T>
void paths_across(T const* crossing, Index groups, PerGroup<T> const (&write)[group_tokens], DecayPaths<T>& paths) {
  alignas(cpu::vector_bytes) GroupDots<T> dots = {};
  for (Index g = 0; g < groups; ++g) {
    Vec<T> sum[crossing_rows] = {};
    for (int i = 0; i < crossing_rows; ++i)
      for_panel_vectors<T>([&](int x) HYBRIDATTN_INLINE_LAMBDA { sum[i] += load(crossing + (g * crossing_rows + i) * panel_width<T> + x); });
    cpu::sum_each<crossing_rows>(sum, dots[g]);
  }
  PerGroup<T> sums[pairs];
  to_lanes<T>(dots, sums);
  for_groups<T>([&](int g) HYBRIDATTN_INLINE_LAMBDA {
    Vec<T> reads{}, writes{}, by_later[group_tokens];
    for (int i = group_tokens - 1; i >= 0; --i) by_later[i] = reads += sums[i].get(g);
    for (int i = 0; i < group_tokens; ++i) {
      paths.through[i].put(g, paths.through[i].get(g) + by_later[i] + writes);
      writes += write[i].get(g) * sums[group_tokens + i].get(g);
    }
    paths.reads.put(g, reads);
    paths.writes.put(g, writes);
  });
}

// <S, X> over one panel of S^T [V, panel], where X [K, V] is stored in panels of columns and `column` is the first of the rows. Squares
// are summed in T, their sum in double: it may be far larger than d_g.
template <class T> double panel_product(T const* state, T const* gradient, Index K, Index V, Index column) {
  double sums[std::size_t{lanes<T>}] = {};
  for (Index v = 0; v < V; v += panel_width<T>)
    for_panel_vectors<T>([&](int x) HYBRIDATTN_INLINE_LAMBDA {
      for_panel_vectors<T>([&](int y) HYBRIDATTN_INLINE_LAMBDA {
        alignas(cpu::vector_bytes) T turned[std::size_t{lanes<T> * lanes<T>}];
        cpu::transpose(gradient + v * K + (column + y) * panel_width<T> + x, panel_width<T>, turned, lanes<T>);
        Vec<T> square{};
        HYBRIDATTN_UNROLL
        for (Index r = 0; r < lanes<T>; ++r) square += load(turned + r * lanes<T>) * load(state + (v + x + r) * panel_width<T> + y);
        HYBRIDATTN_UNROLL
        for (int lane = 0; lane < lanes<T>; ++lane) sums[lane] += static_cast<double>(square[lane]);
      });
    });
  return std::accumulate(std::begin(sums), std::end(sums), 0.0);
}

// d_g of one head of one sequence.
template <class T> class DecayGradients {
 public:
  // `paths(b)` are the sums of block b. before() is <S_0, X_0>, a function because few cases need it; after is <S_T, X_T>.
  template <class Paths, class Before>
  static void write(Sequence sequence, Index h, Paths paths, Before before, double after, View<T, 2> d_g) {
    for (Index b = count_blocks(sequence); b-- > 0;) {
      TokenBlock const block = block_of(sequence, b);
      DecayPaths<T> const& own = paths(b);
      for (Index g = block.groups(); g-- > 0;) {
        double passes = g == own.fresh ? own.passes : passing(own, g, after - number(own.writes[g]));
        if (!std::isfinite(passes)) passes = from_the_front(paths, before, b, g);
        for (Index i = 0; i < group_tokens && g * group_tokens + i < block.tokens; ++i)
          d_g(block.first + g * group_tokens + i, h) = static_cast<T>(number(own.through[i][g]) + passes);
        after = passes + number(own.reads[g]);
      }
    }
  }

 private:
  static double number(T x) { return static_cast<double>(x); }
  static double passing(DecayPaths<T> const& paths, Index g, double difference) {
    return paths.decay[g] <= std::numeric_limits<T>::epsilon() / 2 ? 0 : difference;
  }
  // The pairs across group g of block b, from <S, X> before each group less its reads. So a NaN or infinite value of a token does not
  // reach the d_g of earlier tokens.
  template <class Paths, class Before> static double from_the_front(Paths paths, Before before, Index last_block, Index last) {
    Index b = last_block, g = last;
    auto const is_fresh = [&] { return g == paths(b).fresh; };
    while (!is_fresh() && (b > 0 || g > 0)) g > 0 ? --g : (g = block_groups - 1, --b);
    double passes = is_fresh() ? paths(b).passes : passing(paths(b), g, before() - number(paths(b).reads[g]));
    while (b < last_block || g < last) {
      double const after = passes + number(paths(b).writes[g]);
      if (++g == block_groups) g = 0, ++b;
      passes = passing(paths(b), g, after - number(paths(b).reads[g]));
    }
    return passes;
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::gdn::detail
#endif

// ==== hybridattn/attention/gdn/cpu_forward.hpp
// Equations (1) to (4) for a group of tokens at a time. With S the state before a group, and decays between tokens not written,
//   e_i = v_i - S^T k_i - sum_{j < i} (k_i . k_j) delta_j        o_i = scale (S^T q_i + sum_{j <= i} (q_i . k_j) delta_j)
// So a group needs two products with S a token, the solution of a triangle, and an update of S a token. One pass over S adds a group
// and computes the products of the next group: three multiply-adds a token for each element loaded and stored.
#ifndef HYBRIDATTN_ATTENTION_GDN_CPU_FORWARD_HPP
#define HYBRIDATTN_ATTENTION_GDN_CPU_FORWARD_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::gdn::detail {

// Factors between the tokens of a group, and between tokens and the state; S = carry * stored.
template <class T> struct ForwardTerms {
  PerGroup<T> beta[group_tokens];
  PerGroup<T> forget[group_tokens];  // from the stored state to token i
  PerGroup<T> read[group_tokens];    // scale forget
  PerGroup<T> keep[group_tokens];    // from token i to the stored state after the group
  PerGroup<T> pair[pairs];           // [below(i, j)] k_i . k_j and [upto(i, j)] scale q_i . k_j, with the decay between
  Carry<T> carry;
};
// The input rows and result rows of a block. `error` has no data when no backward follows.
template <class T> struct ForwardRows {
  Index groups, K, V;
  TokenRows<T const> q, k, v;
  TokenRows<T> o, error;
};
// The panel of a state and of all rows that one pass computes.
template <class T> struct ForwardPanel {
  T* state;     // [K, panel]
  T* products;  // [2 group_tokens, panel] stored^T k and stored^T q of the group to be solved
  T* updates;   // [group_tokens, panel] keep delta of the group to be added
};

// Returns the carry after the block.
template <class T>
T forward_terms(Gates<T> const& gates, T scale, ForwardRows<T> const& rows, T carry, ForwardTerms<T>& terms) {
  for (Index g = 0; g < block_groups; ++g) carry = terms.carry.pass(carry, g, gates.after[0][g]);
  key_pairs(gates, rows.q, rows.k, rows.K, rows.groups, scale, terms.pair);
  for_groups<T>([&](int g) HYBRIDATTN_INLINE_LAMBDA {
    for (int i = 0; i < group_tokens; ++i) {
      Vec<T> const forget = terms.carry.before.get(g) * gates.until[i].get(g);
      terms.beta[i].put(g, gates.beta[i].get(g));
      terms.forget[i].put(g, forget);
      terms.read[i].put(g, scale * forget);
      terms.keep[i].put(g, gates.after[i + 1].get(g) * terms.carry.inverse.get(g));
    }
  });
  return carry;
}

// The products of a block's first group.
template <class T> void multiply(ForwardPanel<T> panel, Index K, TokenRows<T const> k, TokenRows<T const> q) {
  PanelRow<T> products[std::size_t{2 * group_tokens}];
  for (Index r = 0; r < K; ++r) {
    PanelRow<T> const s{panel.state + r * panel_width<T>};
    HYBRIDATTN_UNROLL
    for (int i = 0; i < group_tokens; ++i) {
      products[i].add(k[i][r], s);
      products[group_tokens + i].add(q[i][r], s);
    }
  }
  HYBRIDATTN_UNROLL
  for (int i = 0; i < 2 * group_tokens; ++i) products[i].store(panel.products + i * panel_width<T>);
}

// (2) and (4) for one group.
template <class T>
HYBRIDATTN_INLINE void solve(ForwardTerms<T> const& terms, Index g, TokenRows<T const> v, TokenRows<T> error, TokenRows<T> o,
                             ForwardPanel<T> panel) {
  for_panel_vectors<T>([&](int x) HYBRIDATTN_INLINE_LAMBDA {
    Vec<T> delta[group_tokens];
    HYBRIDATTN_UNROLL
    for (int i = 0; i < group_tokens; ++i) {
      Vec<T> e = load(v[i] + x) - terms.forget[i][g] * load(panel.products + i * panel_width<T> + x);
      HYBRIDATTN_UNROLL
      for (int j = 0; j < i; ++j) e -= terms.pair[below(i, j)][g] * delta[j];
      if (error.data != nullptr) store(error[i] + x, e);
      delta[i] = terms.beta[i][g] * e;
      store(panel.updates + i * panel_width<T> + x, terms.keep[i][g] * delta[i]);
    }
    HYBRIDATTN_UNROLL
    for (int i = 0; i < group_tokens; ++i) {
      Vec<T> y = terms.read[i][g] * load(panel.products + (group_tokens + i) * panel_width<T> + x);
      HYBRIDATTN_UNROLL
      for (int j = 0; j <= i; ++j) y += terms.pair[upto(i, j)][g] * delta[j];
      store(o[i] + x, y);
    }
  });
}

// (3) for one group, and the products of the next when `multiplies`.
template <bool folds, bool multiplies, class T>
HYBRIDATTN_INLINE void pass(ForwardPanel<T> panel, Index K, [[maybe_unused]] T fold, TokenRows<T const> k,
                            [[maybe_unused]] TokenRows<T const> next_k, [[maybe_unused]] TokenRows<T const> next_q) {
  PanelRow<T> update[std::size_t{group_tokens}], products[std::size_t{2 * group_tokens}];
  HYBRIDATTN_UNROLL
  for (int i = 0; i < group_tokens; ++i) update[i] = PanelRow<T>{panel.updates + i * panel_width<T>};
  for (Index r = 0; r < K; ++r) {
    T* const row = panel.state + r * panel_width<T>;
    PanelRow<T> s{row};
    if constexpr (folds) s *= fold;
    HYBRIDATTN_UNROLL
    for (int i = 0; i < group_tokens; ++i) s.add(k[i][r], update[i]);
    s.store(row);
    if constexpr (multiplies) {
      HYBRIDATTN_UNROLL
      for (int i = 0; i < group_tokens; ++i) {
        products[i].add(next_k[i][r], s);
        products[group_tokens + i].add(next_q[i][r], s);
      }
    }
  }
  if constexpr (multiplies) {
    HYBRIDATTN_UNROLL
    for (int i = 0; i < 2 * group_tokens; ++i) products[i].store(panel.products + i * panel_width<T>);
  }
}
template <class T>
HYBRIDATTN_INLINE void add_group(ForwardPanel<T> panel, ForwardRows<T> const& rows, Index g, T fold) {
  TokenRows<T const> const k = rows.k.group(g), next_k = rows.k.group(g + 1), next_q = rows.q.group(g + 1);
  if (g + 1 == rows.groups) pass<true, false>(panel, rows.K, fold, k, next_k, next_q);
  else if (fold == 1) pass<false, true>(panel, rows.K, fold, k, next_k, next_q);
  else pass<true, true>(panel, rows.K, fold, k, next_k, next_q);
}

// One block of one head: `panels_in_turn` panels at a time, through all its groups.
template <class T>
void forward_block(ForwardTerms<T> const& terms, ForwardRows<T> const& rows, T* state, T* panel_memory) {
  for (Index first = 0; first < rows.V; first += panels_in_turn * panel_width<T>) {
    ForwardPanel<T> turn[panels_in_turn];
    Index const count = std::min<Index>(panels_in_turn, (rows.V - first) / panel_width<T>);
    for (Index p = 0; p < count; ++p) {
      T* const own = panel_memory + p * panel_rows * panel_width<T>;
      turn[p] = {state + (first + p * panel_width<T>)*rows.K, own, own + 2 * group_tokens * panel_width<T>};
      multiply(turn[p], rows.K, rows.k, rows.q);
    }
    for (Index g = 0; g < rows.groups; ++g)
      for (Index p = 0; p < count; ++p) {
        Index const column = first + p * panel_width<T>;
        TokenRows<T> const error = rows.error.data == nullptr ? rows.error : rows.error.group(g).columns(column);
        solve(terms, g, rows.v.group(g).columns(column), error, rows.o.group(g).columns(column), turn[p]);
        add_group(turn[p], rows, g, terms.carry.fold[g]);
      }
  }
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::gdn::detail
#endif

// ==== hybridattn/attention/gdn/cpu_reverse.hpp
// The reverse sweep of backward: X, the gradient of the state, from the last group of tokens to the first.
// With X the gradient of the state after a group and decays between tokens not written,
//   w_i = X_i^T k_i = X^T k_i + sum_{j >= i} scale (k_i . q_j) d_o_j - sum_{j > i} (k_i . k_j) d_v_j        d_v_i = beta_i w_i
// As in forward, one pass over X adds a group and computes the products of the next group: three multiply-adds a token for each element
// loaded and stored. The sweep writes d_v, d_beta, X e_i and the dots of each group.
#ifndef HYBRIDATTN_ATTENTION_GDN_CPU_REVERSE_HPP
#define HYBRIDATTN_ATTENTION_GDN_CPU_REVERSE_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::gdn::detail {

// The rows of a block. d_v has w until the block's reverse sweep is finished.
template <class T> struct BackwardRows {
  Index groups, K, V;
  TokenRows<T const> q, k, error, d_o;
  TokenRows<T> d_v;
};
// Factors for the reverse sweep over the groups of a block; X = carry * stored.
template <class T> struct ReverseTerms {
  PerGroup<T> beta[group_tokens];
  PerGroup<T> forget[group_tokens];      // from the stored X after the group to token i
  PerGroup<T> keep_query[group_tokens];  // scale * keep, keep: from token i to the stored X before the group
  PerGroup<T> keep_key[group_tokens];    // -beta keep
  PerGroup<T> pair[pairs];               // [below(i, j)] k_i . k_j and [upto(i, j)] scale q_i . k_j, with the decay between
  Carry<T> carry;
};
// The results of the reverse sweep for the forward sweep, besides X e, and those of both sweeps for d_g.
template <class T> struct Handover {
  PerGroup<T> gradient[group_tokens];  // from stored X e_i to X delta_i
  PerGroup<T> pair[pairs];             // [below(i, j)] d_v_i . delta_j and [upto(i, j)] scale d_o_i . delta_j, with the decay between
  DecayPaths<T> paths;
};
template <class T> struct ReversePanel {
  T* state;     // [K, panel] X
  T* products;  // [group_tokens, panel] stored^T k of the group to be solved
  T* updates;   // [2 group_tokens, panel] keep_query d_o, then keep_key w of the group to be added
};

// Returns the carry before the block.
template <class T>
T reverse_terms(Gates<T> const& gates, T scale, BackwardRows<T> const& rows, T carry, ReverseTerms<T>& terms) {
  for (Index g = block_groups; g-- > 0;) carry = terms.carry.pass(carry, g, gates.after[0][g]);
  key_pairs(gates, rows.q, rows.k, rows.K, rows.groups, scale, terms.pair);
  for_groups<T>([&](int g) HYBRIDATTN_INLINE_LAMBDA {
    for (int i = 0; i < group_tokens; ++i) {
      Vec<T> const keep = gates.until[i].get(g) * terms.carry.inverse.get(g), beta = gates.beta[i].get(g);
      terms.beta[i].put(g, beta);
      terms.forget[i].put(g, terms.carry.before.get(g) * gates.after[i + 1].get(g));
      terms.keep_query[i].put(g, scale * keep);
      terms.keep_key[i].put(g, -beta * keep);
    }
  });
  return carry;
}

// The products of a block's last group.
template <class T> void multiply(ReversePanel<T> panel, Index K, TokenRows<T const> k) {
  PanelRow<T> products[std::size_t{group_tokens}];
  for (Index r = 0; r < K; ++r) {
    PanelRow<T> const s{panel.state + r * panel_width<T>};
    HYBRIDATTN_UNROLL
    for (int i = 0; i < group_tokens; ++i) products[i].add(k[i][r], s);
  }
  HYBRIDATTN_UNROLL
  for (int i = 0; i < group_tokens; ++i) products[i].store(panel.products + i * panel_width<T>);
}

// w of one group, from its last token to its first.
template <class T>
HYBRIDATTN_INLINE void solve(ReverseTerms<T> const& terms, Index g, TokenRows<T const> d_o, TokenRows<T> w, ReversePanel<T> panel) {
  for_panel_vectors<T>([&](int x) HYBRIDATTN_INLINE_LAMBDA {
    Vec<T> d_v[group_tokens], up[group_tokens];
    HYBRIDATTN_UNROLL
    for (int i = 0; i < group_tokens; ++i) {
      up[i] = load(d_o[i] + x);
      store(panel.updates + i * panel_width<T> + x, terms.keep_query[i][g] * up[i]);
    }
    HYBRIDATTN_UNROLL
    for (int i = group_tokens - 1; i >= 0; --i) {
      Vec<T> y = terms.forget[i][g] * load(panel.products + i * panel_width<T> + x);
      HYBRIDATTN_UNROLL
      for (int j = i; j < group_tokens; ++j) y += terms.pair[upto(j, i)][g] * up[j];
      HYBRIDATTN_UNROLL
      for (int j = i + 1; j < group_tokens; ++j) y -= terms.pair[below(j, i)][g] * d_v[j];
      store(w[i] + x, y);
      d_v[i] = terms.beta[i][g] * y;
      store(panel.updates + (group_tokens + i) * panel_width<T> + x, terms.keep_key[i][g] * y);
    }
  });
}

// X before one group by (6), and the products of the group before it when `multiplies`. The updates of a row are two chains, of queries
// and of keys, where the row is one vector: a serial chain of eight would limit the speed of the pass.
template <bool folds, bool multiplies, class T>
HYBRIDATTN_INLINE void pass(ReversePanel<T> panel, Index K, [[maybe_unused]] T fold, TokenRows<T const> q, TokenRows<T const> k,
                            [[maybe_unused]] TokenRows<T const> next_k) {
  constexpr bool has_two_chains = panel_vectors == 1;
  PanelRow<T> update[std::size_t{2 * group_tokens}], products[std::size_t{group_tokens}];
  HYBRIDATTN_UNROLL
  for (int i = 0; i < 2 * group_tokens; ++i) update[i] = PanelRow<T>{panel.updates + i * panel_width<T>};
  for (Index r = 0; r < K; ++r) {
    T* const row = panel.state + r * panel_width<T>;
    PanelRow<T> s{row}, by_keys;
    if constexpr (folds) s *= fold;
    HYBRIDATTN_UNROLL
    for (int i = 0; i < group_tokens; ++i) {
      s.add(q[i][r], update[i]);
      (has_two_chains ? by_keys : s).add(k[i][r], update[group_tokens + i]);
    }
    if constexpr (has_two_chains) s.add(T(1), by_keys);
    s.store(row);
    if constexpr (multiplies) {
      HYBRIDATTN_UNROLL
      for (int i = 0; i < group_tokens; ++i) products[i].add(next_k[i][r], s);
    }
  }
  if constexpr (multiplies) {
    HYBRIDATTN_UNROLL
    for (int i = 0; i < group_tokens; ++i) products[i].store(panel.products + i * panel_width<T>);
  }
}
template <class T>
HYBRIDATTN_INLINE void add_group(ReversePanel<T> panel, BackwardRows<T> const& rows, Index g, T fold) {
  TokenRows<T const> const q = rows.q.group(g), k = rows.k.group(g), next_k = g == 0 ? k : rows.k.group(g - 1);
  if (g == 0) pass<true, false>(panel, rows.K, fold, q, k, next_k);
  else if (fold == 1) pass<false, true>(panel, rows.K, fold, q, k, next_k);
  else pass<true, true>(panel, rows.K, fold, q, k, next_k);
}

// X e sums over the lanes. error_rows rows of X and the tokens of a group make a tile of sums, over the columns of all panels in turn
// before they are added up across lanes. Stored as [K / error_rows][token][error_rows]; the first panels of a group overwrite, the others add.
template <class T>
HYBRIDATTN_INLINE void times_error(ReversePanel<T> const* panels, Index count, Index K, TokenRows<T const> error, bool first, T* to) {
  constexpr int tile_size = error_rows * group_tokens;
  for (Index r = 0; r < K; r += error_rows) {
    Vec<T> sum[std::size_t{tile_size}] = {};
    for (Index p = 0; p < count; ++p)
      for_panel_vectors<T>([&](int x) HYBRIDATTN_INLINE_LAMBDA {
        T const* const state = panels[p].state + r * panel_width<T> + x;
        Vec<T> s[std::size_t{error_rows}];
        HYBRIDATTN_UNROLL
        for (int row = 0; row < error_rows; ++row) s[row] = cpu::in_register<T>(load(state + row * panel_width<T>));
        HYBRIDATTN_UNROLL
        for (int i = 0; i < group_tokens; ++i) {
          Vec<T> const e = cpu::in_register<T>(load(error[i] + p * panel_width<T> + x));
          HYBRIDATTN_UNROLL
          for (int row = 0; row < error_rows; ++row) sum[i * error_rows + row] += s[row] * e;
        }
      });
    alignas(cpu::vector_bytes) T sums[std::size_t{tile_size}];
    cpu::sum_each<tile_size>(sum, sums);
    T* const tile = to + r * group_tokens;
    for (int p = 0; p < tile_size; p += lanes<T>) store(tile + p, first ? load(sums + p) : load(tile + p) + load(sums + p));
  }
}

// One block of one head, its groups from the last to the first. `state_error` is [groups][K / error_rows][group_tokens][error_rows].
template <class T>
void reverse_block(ReverseTerms<T> const& terms, BackwardRows<T> const& rows, T* state, T* panel_memory, T* state_error,
                   DecayPaths<T> const& paths) {
  for (Index first = 0; first < rows.V; first += panels_in_turn * panel_width<T>) {
    ReversePanel<T> turn[panels_in_turn];
    Index const count = std::min<Index>(panels_in_turn, (rows.V - first) / panel_width<T>);
    for (Index p = 0; p < count; ++p) {
      T* const own = panel_memory + p * panel_rows * panel_width<T>;
      turn[p] = {state + (first + p * panel_width<T>)*rows.K, own, own + group_tokens * panel_width<T>};
      multiply(turn[p], rows.K, rows.k.group(rows.groups - 1));
    }
    for (Index g = rows.groups; g-- > 0;) {
      times_error(turn, count, rows.K, rows.error.group(g).columns(first), first == 0, state_error + g * group_tokens * rows.K);
      for (Index p = 0; p < count; ++p) {
        Index const column = first + p * panel_width<T>;
        if (g == paths.fresh) std::copy_n(turn[p].state, rows.K * panel_width<T>, paths.gradient + column * rows.K);
        solve(terms, g, rows.d_o.group(g).columns(column), rows.d_v.group(g).columns(column), turn[p]);
        add_group(turn[p], rows, g, terms.carry.fold[g]);
      }
    }
  }
}

// With w complete: the dots of each group, d_beta by (5) and d_v.
template <class T>
void finish_reverse(Gates<T> const& gates, ReverseTerms<T> const& terms, T scale, BackwardRows<T> const& rows, TokenBlock block, Index h,
                    View<T, 2> d_beta, Handover<T>& handover) {
  TokenRows<T const> const w = rows.d_v;
  pair_dots(w, rows.d_o, rows.error, rows.V, rows.groups, handover.pair);
  paths_inside(terms.beta, terms.pair, handover.pair, handover.paths);
  for_groups<T>([&](int g) HYBRIDATTN_INLINE_LAMBDA {
    for (int i = 0; i < group_tokens; ++i) {
      handover.gradient[i].put(g, terms.forget[i].get(g) * terms.beta[i].get(g));
      for (int j = 0; j <= i; ++j) {
        Vec<T> const factor = gates.between[upto(i, j)].get(g) * terms.beta[j].get(g) / dot_share<T>;
        handover.pair[upto(i, j)].put(g, scale * factor * handover.pair[upto(i, j)].get(g));
        if (j < i) handover.pair[below(i, j)].put(g, factor * terms.beta[i].get(g) * handover.pair[below(i, j)].get(g));
      }
    }
  });
  for (Index g = 0; g < rows.groups; ++g) {
    T with_error[group_tokens];
    token_dots(w.group(g), rows.error.group(g), rows.V, with_error);
    for (Index i = 0; i < group_tokens && g * group_tokens + i < block.tokens; ++i)
      d_beta(block.first + g * group_tokens + i, h) = with_error[i];
    for (Index i = 0; i < group_tokens; ++i) {
      T* const row = rows.d_v.group(g)[i];
      for (Index d = 0; d < rows.V; d += lanes<T>) store(row + d, terms.beta[i][g] * load(row + d));
    }
  }
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::gdn::detail
#endif

// ==== hybridattn/attention/gdn/cpu_rebuild.hpp
// The forward sweep of backward. It computes S again from the errors e that forward saved, for
//   d_q_i = scale (S d_o_i + sum_{j <= i} (d_o_i . delta_j) k_j)
//   d_k_i = X delta_i + sum_{j >= i} scale (delta_i . d_o_j) q_j - sum_{j > i} (delta_i . d_v_j) k_j
//         - S d_v_i - sum_{j < i} (d_v_i . delta_j) k_j
// with S the state before a group, X the gradient of the state after it, and decays between tokens not written.
// There is no triangle to solve. S is stored as S^T [V, K], so that S d_o and S d_v sum over rows and not over lanes.
#ifndef HYBRIDATTN_ATTENTION_GDN_CPU_REBUILD_HPP
#define HYBRIDATTN_ATTENTION_GDN_CPU_REBUILD_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::gdn::detail {

// Factors for the forward sweep; S = carry * stored.
template <class T> struct RebuildTerms {
  PerGroup<T> forget[group_tokens];  // from the stored S before the group to token i
  PerGroup<T> read[group_tokens];    // scale forget
  PerGroup<T> keep[group_tokens];    // beta times the decay from token i to the stored S after the group
  Carry<T> carry;
};
// Returns the carry after the block.
template <class T> T rebuild_terms(Gates<T> const& gates, T scale, T carry, RebuildTerms<T>& terms) {
  for (Index g = 0; g < block_groups; ++g) carry = terms.carry.pass(carry, g, gates.after[0][g]);
  for_groups<T>([&](int g) HYBRIDATTN_INLINE_LAMBDA {
    for (int i = 0; i < group_tokens; ++i) {
      Vec<T> const forget = terms.carry.before.get(g) * gates.until[i].get(g);
      terms.forget[i].put(g, forget);
      terms.read[i].put(g, scale * forget);
      terms.keep[i].put(g, gates.beta[i].get(g) * gates.after[i + 1].get(g) * terms.carry.inverse.get(g));
    }
  });
  return carry;
}

// products = S d_o and S d_v of one group [2 group_tokens, panel], then (3). `state` is S^T [V, panel], k its columns of the keys.
template <bool folds, class T>
HYBRIDATTN_INLINE void rebuild(T* state, Index V, RebuildTerms<T> const& terms, Index g, TokenRows<T const> k, TokenRows<T const> d_o,
                               TokenRows<T const> d_v, TokenRows<T const> error, T* products) {
  PanelRow<T> key[std::size_t{group_tokens}], by_d_o[std::size_t{group_tokens}], by_d_v[std::size_t{group_tokens}];
  HYBRIDATTN_UNROLL
  for (int i = 0; i < group_tokens; ++i) {
    key[i] = PanelRow<T>{k[i]};
    key[i] *= terms.keep[i][g];
  }
  for (Index r = 0; r < V; ++r) {
    T* const row = state + r * panel_width<T>;
    PanelRow<T> s{row};
    HYBRIDATTN_UNROLL
    for (int i = 0; i < group_tokens; ++i) {
      by_d_o[i].add(d_o[i][r], s);
      by_d_v[i].add(d_v[i][r], s);
    }
    if constexpr (folds) s *= terms.carry.fold[g];
    HYBRIDATTN_UNROLL
    for (int i = 0; i < group_tokens; ++i) s.add(error[i][r], key[i]);
    s.store(row);
  }
  HYBRIDATTN_UNROLL
  for (int i = 0; i < group_tokens; ++i) {
    by_d_o[i].store(products + i * panel_width<T>);
    by_d_v[i].store(products + (group_tokens + i) * panel_width<T>);
  }
}

// d_q and d_k of one group and one panel of columns. d_k has stored X e on entry. `crossing` [crossing_rows, panel] is each token's read of S,
// then k . stored X e: the first panel overwrites, the other panels add.
template <class T>
HYBRIDATTN_INLINE void combine(RebuildTerms<T> const& terms, Handover<T> const& handover, Index g, TokenRows<T const> q,
                               TokenRows<T const> k, T const* products, TokenRows<T> d_q, TokenRows<T> d_k, bool first, T* crossing) {
  for_panel_vectors<T>([&](int x) HYBRIDATTN_INLINE_LAMBDA {
    Vec<T> key[group_tokens], query[group_tokens];
    HYBRIDATTN_UNROLL
    for (int i = 0; i < group_tokens; ++i) {
      key[i] = load(k[i] + x);
      query[i] = load(q[i] + x);
    }
    HYBRIDATTN_UNROLL
    for (int i = 0; i < group_tokens; ++i) {
      Vec<T> const state_error = load(d_k[i] + x), erased = terms.forget[i][g] * load(products + (group_tokens + i) * panel_width<T> + x);
      Vec<T> y = terms.read[i][g] * load(products + i * panel_width<T> + x), z = handover.gradient[i][g] * state_error - erased;
      T *const reads = crossing + i * panel_width<T> + x, *const writes = reads + group_tokens * panel_width<T>;
      Vec<T> const read = query[i] * y - key[i] * erased, written = key[i] * state_error;
      store(reads, first ? read : load(reads) + read);
      store(writes, first ? written : load(writes) + written);
      HYBRIDATTN_UNROLL
      for (int j = 0; j <= i; ++j) y += handover.pair[upto(i, j)][g] * key[j];
      HYBRIDATTN_UNROLL
      for (int j = i; j < group_tokens; ++j) z += handover.pair[upto(j, i)][g] * query[j];
      HYBRIDATTN_UNROLL
      for (int j = 0; j < group_tokens; ++j)
        if (j != i) z -= handover.pair[j > i ? below(j, i) : below(i, j)][g] * key[j];
      store(d_q[i] + x, y);
      store(d_k[i] + x, z);
    }
  });
}

// [K / error_rows][token][error_rows] to one row for each token.
template <class T> HYBRIDATTN_INLINE void by_token(T const* state_error, Index K, TokenRows<T> to) {
  for (Index r = 0; r < K; r += error_rows)
    for (int i = 0; i < group_tokens; ++i) std::copy_n(state_error + r * group_tokens + i * error_rows, error_rows, to[i] + r);
}

// One block of one head: d_q and d_k of this value head alone. `state` is S^T, `products` [2 group_tokens, panel], `crossing`
// [groups, crossing_rows, panel].
template <class T>
void rebuild_block(RebuildTerms<T> const& terms, Handover<T>& handover, BackwardRows<T> const& rows, T* state, T const* state_error,
                   T* products, TokenRows<T> d_q, TokenRows<T> d_k, T* crossing) {
  DecayPaths<T>& paths = handover.paths;
  double product = 0;
  for (Index g = 0; g < rows.groups; ++g) by_token(state_error + g * group_tokens * rows.K, rows.K, d_k.group(g));
  for (Index column = 0; column < rows.K; column += panel_width<T>)
    for (Index g = 0; g < rows.groups; ++g) {
      TokenRows<T const> const q = rows.q.group(g).columns(column), k = rows.k.group(g).columns(column), d_v = rows.d_v.group(g);
      T* const panel = state + column * rows.V;
      if (g == paths.fresh) product += panel_product(panel, paths.gradient, rows.K, rows.V, column);
      if (terms.carry.fold[g] == 1) rebuild<false>(panel, rows.V, terms, g, k, rows.d_o.group(g), d_v, rows.error.group(g), products);
      else rebuild<true>(panel, rows.V, terms, g, k, rows.d_o.group(g), d_v, rows.error.group(g), products);
      combine(terms, handover, g, q, k, products, d_q.group(g).columns(column), d_k.group(g).columns(column), column == 0,
              crossing + g * crossing_rows * panel_width<T>);
    }
  auto const factor = [](T x) { return static_cast<double>(x); };
  paths.passes = product * factor(paths.carry) * factor(terms.carry.before[paths.fresh]) * factor(paths.decay[paths.fresh]);
}

// Writes d_q and d_k of a query/key head: its first value head overwrites, the other value heads add.
template <class T>
void finish_rebuild(TokenRows<T const> own_q, TokenRows<T const> own_k, TokenBlock block, Index hk, bool first, View<T, 3> d_q,
                    View<T, 3> d_k) {
  for (Index n = 0; n < block.tokens; ++n) {
    T *const to_q = d_q.row(block.first + n, hk), *const to_k = d_k.row(block.first + n, hk);
    cpu::for_each_vector<T>(0, d_q.extent(2), [&](cpu::Slot<T> d) HYBRIDATTN_INLINE_LAMBDA {
      d.put(to_q, first ? d.get(own_q[n]) : d.get(to_q) + d.get(own_q[n]));
      d.put(to_k, first ? d.get(own_k[n]) : d.get(to_k) + d.get(own_k[n]));
    });
  }
}

// The state as S^T in panels of K: element (k, v) is at (k / panel) panel V + v panel + k % panel.
template <class T> Index transposed_place(Index k, Index v, Index V) {
  return k / panel_width<T> * panel_width<T> * V + v * panel_width<T> + k % panel_width<T>;
}
template <class T> void read_transposed(View<T const, 4> states, Index i, Index h, Index K, Index V, T* state) {
  std::fill_n(state, K * V, T(0));
  if (states.empty()) return;
  for (Index k = 0; k < states.extent(2); ++k)
    for (Index v = 0; v < states.extent(3); ++v) state[transposed_place<T>(k, v, V)] = states(i, h, k, v) / Carry<T>::start;
}
template <class T> double dot_transposed(View<T const, 4> states, Index i, Index h, Index V, T const* state, T carry) {
  double sum = 0;
  if (states.empty()) return sum;
  for (Index k = 0; k < states.extent(2); ++k)
    for (Index v = 0; v < states.extent(3); ++v)
      sum += static_cast<double>(states(i, h, k, v)) * static_cast<double>(carry * state[transposed_place<T>(k, v, V)]);
  return sum;
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::gdn::detail
#endif

// ==== hybridattn/attention/gdn/cpu_step.hpp
// Decoding: equations (1) to (4) for one token of each sequence, on states in place. The states are read
// twice and written once, a few columns at a time, so the second read comes from the first-level cache.
#ifndef HYBRIDATTN_ATTENTION_GDN_CPU_STEP_HPP
#define HYBRIDATTN_ATTENTION_GDN_CPU_STEP_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::gdn::detail {

// One token of one head.
template <class T> struct Token {
  T const *q, *k, *v;
  T decay, beta;
  T scale, scaled_qk;  // scaled_qk = scale q . k
  T *state, *o;
  Index K, row;        // row k of the state starts at state + k row
};

// `N` vectors of columns from `slot` on. Only where N is 1 may the vector have fewer columns than lanes.
template <int N, class T> HYBRIDATTN_INLINE void step_columns(Token<T> const& t, cpu::Slot<T> slot) {
  auto const column = [&](int n) HYBRIDATTN_INLINE_LAMBDA { return cpu::Slot<T>{slot.i + n * lanes<T>, slot.count}; };
  Vec<T> with_k[std::size_t{N}] = {}, with_q[std::size_t{N}] = {}, delta[std::size_t{N}];
  for (Index a = 0; a < t.K; ++a) {
    HYBRIDATTN_UNROLL
    for (int n = 0; n < N; ++n) {
      Vec<T> const s = column(n).get(t.state + a * t.row);
      with_k[n] += t.k[a] * s;
      with_q[n] += t.q[a] * s;
    }
  }
  HYBRIDATTN_UNROLL
  for (int n = 0; n < N; ++n) {
    delta[n] = t.beta * (column(n).get(t.v) - t.decay * with_k[n]);                          // (2)
    column(n).put(t.o, t.scale * t.decay * with_q[n] + t.scaled_qk * delta[n]);              // (4)
  }
  for (Index a = 0; a < t.K; ++a) {
    HYBRIDATTN_UNROLL
    for (int n = 0; n < N; ++n) {
      T* const row = t.state + a * t.row;
      column(n).put(row, t.decay * column(n).get(row) + t.k[a] * delta[n]);                  // (1), (3)
    }
  }
}
template <class T> void step_head(Token<T> const& t, Index V) {
  constexpr int wide = 4;
  Index v = 0;
  for (; v + wide * lanes<T> <= V; v += wide * lanes<T>) step_columns<wide>(t, cpu::Slot<T>{v, lanes<T>});
  cpu::for_each_vector<T>(v, V, [&](cpu::Slot<T> slot) { step_columns<1>(t, slot); });
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::gdn::detail
#endif

// ==== hybridattn/attention/gdn/types.hpp
// Options, sizes and tensors of Gated DeltaNet. The equations are those of gdn.hpp.
#ifndef HYBRIDATTN_ATTENTION_GDN_TYPES_HPP
#define HYBRIDATTN_ATTENTION_GDN_TYPES_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

struct GdnOptions {
  int conv_width = 4;                 // short causal convolution on q, k, v; 0: none, only silu
  bool output_gate = true;            // RMSNorm(o) silu(x w_gate); false: RMSNorm(o)
  bool negative_eigenvalues = false;  // beta in (0, 2) instead of (0, 1): arXiv 2411.12537
};

namespace gdn {

// Initial values of a_log and dt_bias: those of fla give decays near 1; with those of transformers an untrained layer forgets within a
// token.
enum class GateStart { fla, transformers };

struct Config {
  Index num_heads = 0;        // H, of q and k; 0: the model's
  Index num_value_heads = 0;  // HV, a multiple of H; 0: num_heads
  Index key_dim = 0;          // K; 0: model_dim / num_heads
  Index value_dim = 0;        // V; 0: key_dim
  double scale = 0;           // 0: key_dim^-1/2
  double norm_eps = 1e-6;     // of the norm on o
  GateStart gate_start = GateStart::fla;
};

template <class S> struct Inputs {
  Held<S, 3> q, k;            // [N, H, K], not normalised by the policy: the layer makes their length 1
  Held<S, 3> v;               // [N, HV, V]
  Wide<S, 2> g, beta;         // [N, HV]   g <= 0 is the log of the decay, beta in [0, 1] or [0, 2]
  State<S, 4> initial_state;  // [number of sequences, HV, K, V], empty for zeros
  HYBRIDATTN_FIELDS(q, k, v, g, beta, initial_state)
};
template <class S> struct Outputs {
  Held<S, 3> o;             // [N, HV, V]
  State<S, 4> final_state;  // [number of sequences, HV, K, V], empty if the caller does not need it
  HYBRIDATTN_FIELDS(o, final_state)
};
// The error e_t of (2). Backward computes S again from it, from the first token on, and needs no saved state.
template <class S> struct Saved {
  Wide<S, 3> error;  // [N, HV, V]
  HYBRIDATTN_FIELDS(error)
};

// The state S after earlier tokens, and the projections of the last earlier tokens for the short convolutions, the oldest first.
template <class S> struct Cache {
  Held<S, 3> conv_q, conv_k, conv_v;  // [batch, conv_width - 1, channels], empty without a convolution
  State<S, 4> state;                  // [batch, HV, K, V]
  HYBRIDATTN_FIELDS(conv_q, conv_k, conv_v, state)
};

inline Shape<4> state_shape(Config const& c, Sequences const& s) { return {s.count(), c.num_value_heads, c.key_dim, c.value_dim}; }

}  // namespace gdn

template <GdnOptions O> struct GatedDeltaNet;

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/attention/gdn/cpu.hpp
// The gated delta rule on the CPU: the tasks of forward, backward and decoding, and the memory of each thread.
#ifndef HYBRIDATTN_ATTENTION_GDN_CPU_HPP
#define HYBRIDATTN_ATTENTION_GDN_CPU_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {
namespace gdn {
namespace detail {

// Memory of one thread in forward. K and V are rounded up to whole panels.
template <class T> struct ForwardScratch {
  Index K, V;
  T *state, *panels;          // [K, V] in panels; the rows of the panels in turn
  TokenRows<T> q, k, v, o, error;  // one block each, for rows that are not used in place

  static Index size(Index K, Index V) {
    return size_sum(size_product(K, V), panels_in_turn * panel_rows * panel_width<T> + block_tokens * (2 * K + 3 * V));
  }
  ForwardScratch(T* memory, Index K_, Index V_) : K(K_), V(V_) {
    auto const take = [&](Index count) { return std::exchange(memory, memory + count); };
    auto const take_rows = [&](Index width) { return TokenRows<T>{take(block_tokens * width), width}; };
    state = take(K * V), panels = take(panels_in_turn * panel_rows * panel_width<T>);
    q = take_rows(K), k = take_rows(K), v = take_rows(V), o = take_rows(V), error = take_rows(V);
  }
};

template <class T>
void forward_head(Config const& c, Sequence sequence, Index i, Index h, Inputs<In<T>> const& x, Outputs<Out<T>> const& y,
                  Saved<Out<T>> const& saved, ForwardScratch<T> const& scratch) {
  Index const K = scratch.K, hk = h / (c.num_value_heads / c.num_heads);
  T carry = Carry<T>::start;
  Gates<T> gates;
  ForwardTerms<T> terms;
  read_state(x.initial_state, i, h, K, scratch.V, scratch.state);
  for (Index b = 0; b < count_blocks(sequence); ++b) {
    TokenBlock const block = block_of(sequence, b);
    ForwardRows<T> rows{.groups = block.groups(),
                        .K = K,
                        .V = scratch.V,
                        .q = rows_to_read(x.q, block, hk, scratch.q),
                        .k = rows_to_read(x.k, block, hk, scratch.k),
                        .v = rows_to_read(x.v, block, h, scratch.v),
                        .o = rows_to_write(y.o, block, h, scratch.o),
                        .error = {nullptr, 0}};
    if (!saved.error.empty()) rows.error = rows_to_write(saved.error, block, h, scratch.error);
    read_gates(x.g, x.beta, block, h, gates);
    carry = forward_terms(gates, static_cast<T>(c.scale), rows, carry, terms);
    forward_block(terms, rows, scratch.state, scratch.panels);
    write_back(y.o, block, h, scratch.o);
    write_back(saved.error, block, h, scratch.error);
  }
  write_state(scratch.state, carry, i, h, K, y.final_state);
}

// Memory of one thread in backward. K and V are rounded up to whole panels.
template <class T> struct BackwardScratch {
  Index K, V;
  T *gradient, *state;               // X [K, V] and S^T [V, K], in panels
  T* panels;                         // the rows of the panels in turn
  T* crossing;                       // of one block, for d_g
  TokenRows<T> q, k, error, d_o, d_v;     // one block each, for rows that are not used in place
  TokenRows<T> d_q, d_k;                  // one block of one value head
  T* state_error;                    // X e of all tokens of a head
  T* gradients;                      // an X of each block, for d_g
  Handover<T>* handover;             // one for each block

  static Index size(Index K, Index V, Index longest) {
    Index const states = size_product(2 + ceil_div(longest, block_tokens), K, V);   // and the states of the blocks
    return size_sum(states, (panels_in_turn * panel_rows + block_groups * crossing_rows) * panel_width<T> + block_tokens * (4 * K + 3 * V) +
                                round_up(longest, group_tokens) * K);
  }
  BackwardScratch(T* memory, Handover<T>* handover_, Index K_, Index V_, Index longest) : K(K_), V(V_), handover(handover_) {
    auto const take = [&](Index count) { return std::exchange(memory, memory + count); };
    auto const take_rows = [&](Index width) { return TokenRows<T>{take(block_tokens * width), width}; };
    gradient = take(K * V), state = take(K * V), panels = take(panels_in_turn * panel_rows * panel_width<T>);
    crossing = take(block_groups * crossing_rows * panel_width<T>);
    q = take_rows(K), k = take_rows(K), error = take_rows(V), d_o = take_rows(V), d_v = take_rows(V);
    d_q = take_rows(K), d_k = take_rows(K);
    state_error = take(round_up(longest, group_tokens) * K);
    gradients = memory;
  }
};

// The arguments of one call of backward.
template <class T> struct BackwardCall {
  Config const& c;
  Inputs<In<T>> x;
  Saved<In<T>> saved;
  Outputs<In<T>> d_y;
  Inputs<Out<T>> d_x;

  Index key_head(Index h) const { return h / (c.num_value_heads / c.num_heads); }
  BackwardRows<T> rows(TokenBlock block, Index h, BackwardScratch<T> const& scratch) const {
    Index const hk = key_head(h);
    return {.groups = block.groups(),
            .K = scratch.K,
            .V = scratch.V,
            .q = rows_to_read(x.q, block, hk, scratch.q),
            .k = rows_to_read(x.k, block, hk, scratch.k),
            .error = rows_to_read(saved.error, block, h, scratch.error),
            .d_o = rows_to_read(d_y.o, block, h, scratch.d_o),
            .d_v = rows_to_write(d_x.v, block, h, scratch.d_v)};
  }
};

// Writes d_v, d_beta, d_initial_state and the handover. Returns a function that computes <S_0, X_0>.
template <class T> auto reverse_sweep(BackwardCall<T> const& call, Sequence sequence, Index i, Index h, BackwardScratch<T> const& scratch) {
  T const scale = static_cast<T>(call.c.scale);
  T carry = Carry<T>::start, since_fresh = 1;
  Gates<T> gates;
  ReverseTerms<T> terms;
  read_state(call.d_y.final_state, i, h, scratch.K, scratch.V, scratch.gradient);
  for (Index b = count_blocks(sequence); b-- > 0;) {
    TokenBlock const block = block_of(sequence, b);
    BackwardRows<T> const rows = call.rows(block, h, scratch);
    read_gates(call.x.g, call.x.beta, block, h, gates);
    carry = reverse_terms(gates, scale, rows, carry, terms);
    DecayPaths<T>& paths = scratch.handover[b].paths;
    paths.decay = gates.after[0];
    paths.fresh = fresh_group(paths.decay, rows.groups, since_fresh);
    paths.gradient = scratch.gradients + b * scratch.K * scratch.V;
    paths.carry = terms.carry.before[paths.fresh];
    reverse_block(terms, rows, scratch.gradient, scratch.panels, scratch.state_error + b * block_tokens * rows.K, paths);
    finish_reverse(gates, terms, scale, rows, block, h, call.d_x.beta, scratch.handover[b]);
    write_back(call.d_x.v, block, h, scratch.d_v);
  }
  write_state(scratch.gradient, carry, i, h, scratch.K, call.d_x.initial_state);
  return [=] { return dot_state(call.x.initial_state, i, h, scratch.K, scratch.gradient, carry); };
}

// Writes d_q and d_k. Returns <S_T, d_final_state>.
template <class T>
double forward_sweep(BackwardCall<T> const& call, Sequence sequence, Index i, Index h, bool first, BackwardScratch<T> const& scratch) {
  T carry = Carry<T>::start;
  Gates<T> gates;
  RebuildTerms<T> terms;
  read_transposed(call.x.initial_state, i, h, scratch.K, scratch.V, scratch.state);
  for (Index b = 0; b < count_blocks(sequence); ++b) {
    TokenBlock const block = block_of(sequence, b);
    BackwardRows<T> const rows = call.rows(block, h, scratch);
    rows_to_read(View<T const, 3>(call.d_x.v), block, h, scratch.d_v);   // written by the reverse sweep
    read_gates(call.x.g, call.x.beta, block, h, gates);
    carry = rebuild_terms(gates, static_cast<T>(call.c.scale), carry, terms);
    rebuild_block(terms, scratch.handover[b], rows, scratch.state, scratch.state_error + b * block_tokens * rows.K, scratch.panels,
                  scratch.d_q, scratch.d_k, scratch.crossing);
    paths_across(scratch.crossing, rows.groups, scratch.handover[b].gradient, scratch.handover[b].paths);
    finish_rebuild<T>(scratch.d_q, scratch.d_k, block, call.key_head(h), first, call.d_x.q, call.d_x.k);
  }
  return dot_transposed(call.d_y.final_state, i, h, scratch.V, scratch.state, carry);
}

}  // namespace detail

// A task is a value head of a sequence: heads are independent of each other.
template <class T> void forward(Cpu& cpu, Config const& c, Sequences const& s, Inputs<In<T>> x, Outputs<Out<T>> y, Saved<Out<T>> saved) {
  Index const K = detail::padded<T>(c.key_dim), V = detail::padded<T>(c.value_dim);
  Tensor<T, 2, Cpu> memory{cpu, {Index{cpu.threads()}, detail::ForwardScratch<T>::size(K, V)}};
  View<T, 2> const scratch = out(memory);
  parallel_for(cpu, s.count() * c.num_value_heads, [&](Index task, int thread) {
    Index const i = task / c.num_value_heads, h = task % c.num_value_heads;
    detail::forward_head(c, s[static_cast<std::size_t>(i)], i, h, x, y, saved, detail::ForwardScratch<T>{scratch.row(thread), K, V});
  });
}

// A task is a key head of a sequence: key heads are independent of each other. The value heads of a key head add to its d_q and d_k
// one after the other.
template <class T>
void backward(Cpu& cpu, Config const& c, Sequences const& s, Inputs<In<T>> x, Outputs<In<T>>, Saved<In<T>> saved, Outputs<In<T>> d_y,
              Inputs<Out<T>> d_x) {
  Index const K = detail::padded<T>(c.key_dim), V = detail::padded<T>(c.value_dim);
  Index const longest = s.longest(), threads = cpu.threads(), group = c.num_value_heads / c.num_heads;
  Tensor<T, 2, Cpu> memory{cpu, {threads, detail::BackwardScratch<T>::size(K, V, longest)}};
  Tensor<detail::Handover<T>, 2, Cpu> handover{cpu, {threads, ceil_div(longest, detail::block_tokens)}};
  View<T, 2> const rows = out(memory);
  View<detail::Handover<T>, 2> const blocks = out(handover);
  detail::BackwardCall<T> const call{c, x, saved, d_y, d_x};
  parallel_for(cpu, s.count() * c.num_heads, [&](Index task, int thread) {
    Index const i = task / c.num_heads, hk = task % c.num_heads;
    Sequence const sequence = s[static_cast<std::size_t>(i)];
    detail::BackwardScratch<T> const scratch{rows.row(thread), blocks.row(thread), K, V, longest};
    for (Index h = hk * group; h < (hk + 1) * group; ++h) {
      auto const before = detail::reverse_sweep(call, sequence, i, h, scratch);
      double const after = detail::forward_sweep(call, sequence, i, h, h == hk * group, scratch);
      auto const paths = [&](Index b) -> detail::DecayPaths<T> const& { return scratch.handover[b].paths; };
      detail::DecayGradients<T>::write(sequence, h, paths, before, after, d_x.g);
    }
  });
}

namespace detail {

// Computes token n in head h, and updates the head's state [K, V].
template <class T> void step_token(Config const& c, Inputs<In<T>> const& x, Index n, Index h, View<T, 4> states, Index i, View<T, 3> o) {
  Index const hk = h / (c.num_value_heads / c.num_heads);
  T const *q = x.q.row(n, hk), *k = x.k.row(n, hk);
  T const scale = static_cast<T>(c.scale), decay = decay_of<T>(cpu::broadcast(x.g(n, h)))[0];
  T const qk = cpu::sum_vectors<T>(c.key_dim, [&](cpu::Slot<T> slot) HYBRIDATTN_INLINE_LAMBDA { return slot.get(q) * slot.get(k); });
  step_head<T>({q, k, x.v.row(n, h), decay, x.beta(n, h), scale, scale * qk, states.row(i, h, 0), o.row(n, h), c.key_dim, states.stride[2]},
               c.value_dim);
}

}  // namespace detail

// x holds one token for each of B sequences: q, k [B, H, K], v [B, HV, V], g, beta [B, HV]; x.initial_state is not used.
// state [B, HV, K, V] is updated in place, o is [B, HV, V].
template <class T> void step(Cpu& cpu, Config const& c, Inputs<In<T>> x, View<T, 4> state, View<T, 3> o) {
  parallel_for(cpu, o.extent(0) * c.num_value_heads, [&](Index task, int) {
    Index const b = task / c.num_value_heads, h = task % c.num_value_heads;
    detail::step_token(c, x, b, h, state, b, o);
  });
}

// Updates state and computes o [N, HV, V]. One new token of a sequence is a step in place; several new tokens are a forward from the
// state to the state.
template <class T> void extend(Cpu& cpu, Config const& c, Sequences const& s, Inputs<In<T>> x, View<T, 4> state, View<T, 3> o) {
  check_fits(s, state.extent(0), std::numeric_limits<Index>::max());
  Index const K = detail::padded<T>(c.key_dim), V = detail::padded<T>(c.value_dim);
  bool const only_steps = s.longest() <= 1;
  Tensor<T, 2, Cpu> memory{cpu, {Index{cpu.threads()}, only_steps ? 0 : detail::ForwardScratch<T>::size(K, V)}};
  View<T, 2> const scratch = out(memory);
  parallel_for(cpu, s.count() * c.num_value_heads, [&](Index task, int thread) {
    Index const i = task / c.num_value_heads, h = task % c.num_value_heads;
    Sequence const sequence = s[static_cast<std::size_t>(i)];
    if (sequence.length == 0) return;
    if (sequence.length == 1) {
      for (Index k = 0; sequence.past == 0 && k < c.key_dim; ++k) std::fill_n(state.row(i, h, k), c.value_dim, T(0));
      return detail::step_token(c, x, sequence.start, h, state, i, o);
    }
    Inputs<In<T>> from = x;
    from.initial_state = sequence.past == 0 ? View<T const, 4>{} : state;
    detail::forward_head<T>(c, sequence, i, h, from, {.o = o, .final_state = state}, {}, {scratch.row(thread), K, V});
  });
}

}  // namespace gdn

template <GdnOptions O> struct On<GatedDeltaNet<O>, Cpu> : InFloat<GatedDeltaNet<O>, Cpu> {
  using InFloat<GatedDeltaNet<O>, Cpu>::forward, InFloat<GatedDeltaNet<O>, Cpu>::backward, InFloat<GatedDeltaNet<O>, Cpu>::extend;
  template <std::floating_point T>
  static void forward(Cpu& cpu, gdn::Config const& c, Sequences const& s, gdn::Inputs<In<T>> x, gdn::Outputs<Out<T>> y,
                      gdn::Saved<Out<T>> saved) {
    gdn::forward(cpu, c, s, x, y, saved);
  }
  template <std::floating_point T>
  static void backward(Cpu& cpu, gdn::Config const& c, Sequences const& s, gdn::Inputs<In<T>> x, gdn::Outputs<In<T>> y,
                       gdn::Saved<In<T>> saved, gdn::Outputs<In<T>> d_y, gdn::Inputs<Out<T>> d_x) {
    gdn::backward(cpu, c, s, x, y, saved, d_y, d_x);
  }
  template <std::floating_point T>
  static void extend(Cpu& cpu, gdn::Config const& c, Sequences const& s, gdn::Inputs<In<T>> x, gdn::Cache<Out<T>> cache,
                     gdn::Outputs<Out<T>> y) {
    gdn::extend(cpu, c, s, x, cache.state, y.o);
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/ops/causal_conv1d/causal_conv1d.hpp
// Short depthwise causal convolution, one filter a channel, silu after it:
//   s_t = sum_w weight[c, w] x_{t - W + 1 + w}      y_t = silu(s_t), or s_t
//   d_s = d_y silu'(s)    d_x_t = sum_w weight[c, w] d_s_{t + W - 1 - w}    d_weight[c, w] = sum_t d_s_t x_{t - W + 1 + w}
// The inputs before a sequence are its initial state [W - 1, C], oldest first, or zeros; its last W - 1 inputs are the
// final state. A sequence never sees its neighbour.
#ifndef HYBRIDATTN_OPS_CAUSAL_CONV1D_CAUSAL_CONV1D_HPP
#define HYBRIDATTN_OPS_CAUSAL_CONV1D_CAUSAL_CONV1D_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

enum class Activation { none, silu };

//   forward (backend, activation, sequences, x, w, initial_state, y, final_state)     x, y [N, C], w [C, W]
//   backward(backend, activation, sequences, x, w, initial_state, d_y, d_final_state, d_x, d_w, d_initial_state)
// States are [number of sequences, W - 1, C] or empty; forward's final_state may be its initial_state. W = 0 is no
// convolution: y = silu(x). Backward overwrites everything.
struct CausalConv1d {};

}  // namespace hybridattn::inline HYBRIDATTN_ABI

// ==== hybridattn/ops/causal_conv1d/cpu.hpp
#ifndef HYBRIDATTN_OPS_CAUSAL_CONV1D_CPU_HPP
#define HYBRIDATTN_OPS_CAUSAL_CONV1D_CPU_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {
namespace cpu::detail {

// The inputs of a convolution as rows: of x, of the initial state, or nothing.
template <class T> struct ConvRows {
  View<T const, 2> x;
  View<T const, 3> initial_state;
  Index width;

  // The row `back` tokens before token n, which has `position` tokens of sequence `owner` before it in x; null for zeros.
  T const* at(Index n, Index position, Index owner, Index back) const {
    if (back <= position) return x.row(n - back);
    return initial_state.empty() ? nullptr : initial_state.row(owner, width - 1 - (back - position));
  }
};

}  // namespace cpu::detail

template <> struct On<CausalConv1d, Cpu> : InFloat<CausalConv1d, Cpu> {
  using InFloat::forward, InFloat::backward;
  template <std::floating_point T>
  static void forward(Cpu& cpu, Activation activation, Sequences const& s, View<T const, 2> x, View<T const, 2> w,
                      State<In<T>, 3> initial_state, View<T, 2> y, State<Out<T>, 3> final_state) {
    Tensor<T, 2, Cpu> taps_storage{cpu, {w.extent(1), w.extent(0)}};
    View<T const, 2> const taps = taps_of(w, out(taps_storage));
    cpu::detail::ConvRows<T> const rows{x, initial_state, w.extent(1)};
    parallel_blocks(cpu, x.extent(0), cpu::sum_rows, [&](Index first, Index last) {
      for (Index n = first; n < last; ++n) {
        convolve(rows, taps, s, n, y.row(n));
        if (activation == Activation::silu) silu_row(y.row(n), x.extent(1));
      }
    });
    if (!final_state.empty()) keep_last(s, rows, final_state);
  }

  template <std::floating_point T>
  static void backward(Cpu& cpu, Activation activation, Sequences const& s, View<T const, 2> x, View<T const, 2> w,
                       State<In<T>, 3> initial_state, View<T const, 2> d_y, State<In<T>, 3> d_final_state, View<T, 2> d_x, View<T, 2> d_w,
                       State<Out<T>, 3> d_initial_state) {
    Index const C = x.extent(1), W = w.extent(1);
    Tensor<T, 2, Cpu> taps_storage{cpu, {W, C}}, d_s_storage{cpu, {x.extent(0), C}}, d_taps_storage{cpu, {W, C}};
    View<T const, 2> const taps = taps_of(w, out(taps_storage));
    View<T, 2> const d_s = out(d_s_storage), d_taps = out(d_taps_storage);
    cpu::detail::ConvRows<T> const rows{x, initial_state, W};
    parallel_blocks(cpu, x.extent(0), cpu::sum_rows, [&](Index first, Index last) {
      for (Index n = first; n < last; ++n) {
        convolve(rows, taps, s, n, d_s.row(n));
        through_activation(activation, d_y.row(n), d_s.row(n), C);
      }
    });
    parallel_blocks(cpu, x.extent(0), cpu::sum_rows, [&](Index first, Index last) {
      for (Index n = first; n < last; ++n) gradient_row(s, taps, View<T const, 2>(d_s), d_final_state, n, d_x.row(n));
    });
    if (W > 0) {
      cpu::sum_over_rows<T>(cpu, x.extent(0), flat(d_taps), [&](Index n, T* sum) { add_taps(rows, s, n, d_s.row(n), sum); });
      for (Index c = 0; c < C; ++c)
        for (Index tap = 0; tap < W; ++tap) d_w(c, tap) = d_taps(tap, c);
    }
    if (!d_initial_state.empty()) initial_gradient(s, taps, View<T const, 2>(d_s), d_final_state, d_initial_state);
  }

 private:
  static Index position_of(Sequences const& s, Index n) { return n - s[static_cast<std::size_t>(s.owners()(n))].start; }
  // Filters by tap, so that channels are neighbours.
  template <class T> static View<T, 2> taps_of(View<T const, 2> w, View<T, 2> taps) {
    for (Index c = 0; c < w.extent(0); ++c)
      for (Index tap = 0; tap < w.extent(1); ++tap) taps(tap, c) = w(c, tap);
    return taps;
  }
  template <class T>
  static void convolve(cpu::detail::ConvRows<T> const& rows, View<T const, 2> taps, Sequences const& s, Index n, T* y) {
    Index const C = rows.x.extent(1), W = rows.width;
    if (W == 0) {
      std::copy_n(rows.x.row(n), C, y);
      return;
    }
    Index const owner = s.owners()(n), position = position_of(s, n);
    std::fill_n(y, C, T(0));
    for (Index tap = 0; tap < W; ++tap)
      if (T const* row = rows.at(n, position, owner, W - 1 - tap); row != nullptr) add_product(taps.row(tap), row, y, C);
  }
  template <class T> static void add_product(T const* a, T const* b, T* y, Index C) {
    cpu::for_each_vector<T>(0, C, [&](cpu::Slot<T> v) HYBRIDATTN_INLINE_LAMBDA { v.put(y, v.get(y) + v.get(a) * v.get(b)); });
  }
  template <class T> static void silu_row(T* y, Index C) {
    cpu::for_each_vector<T>(0, C, [&](cpu::Slot<T> v) HYBRIDATTN_INLINE_LAMBDA { v.put(y, v.get(y) * cpu::sigmoid<T>(v.get(y))); });
  }
  // d_s holds s and becomes d_y silu'(s).
  template <class T> static void through_activation(Activation activation, T const* d_y, T* d_s, Index C) {
    if (activation == Activation::none) {
      std::copy_n(d_y, C, d_s);
      return;
    }
    cpu::for_each_vector<T>(0, C, [&](cpu::Slot<T> v) HYBRIDATTN_INLINE_LAMBDA {
      cpu::Vec<T> const s = v.get(d_s), open = cpu::sigmoid<T>(s);
      v.put(d_s, v.get(d_y) * (open * (T(1) + s * (T(1) - open))));
    });
  }
  template <class T>
  static void gradient_row(Sequences const& s, View<T const, 2> taps, View<T const, 2> d_s, State<In<T>, 3> d_final_state, Index n,
                           T* d_x) {
    Index const C = d_s.extent(1), W = taps.extent(0);
    if (W == 0) {
      std::copy_n(d_s.row(n), C, d_x);
      return;
    }
    Index const owner = s.owners()(n), after = s[static_cast<std::size_t>(owner)].length - 1 - position_of(s, n);
    std::fill_n(d_x, C, T(0));
    for (Index ahead = 0; ahead < std::min(W, after + 1); ++ahead) add_product(taps.row(W - 1 - ahead), d_s.row(n + ahead), d_x, C);
    if (!d_final_state.empty() && after < W - 1) axpy(T(1), d_final_state.row(owner, W - 2 - after), d_x, C);
  }
  template <class T> static void add_taps(cpu::detail::ConvRows<T> const& rows, Sequences const& s, Index n, T const* d_s, T* sum) {
    Index const C = rows.x.extent(1), W = rows.width, position = position_of(s, n), owner = s.owners()(n);
    for (Index tap = 0; tap < W; ++tap)
      if (T const* row = rows.at(n, position, owner, W - 1 - tap); row != nullptr) add_product(d_s, row, sum + tap * C, C);
  }
  // Row j of a state is the input W - 1 - j tokens before the end.
  template <class T> static void keep_last(Sequences const& s, cpu::detail::ConvRows<T> const& rows, State<Out<T>, 3> final_state) {
    for (Index i = 0; i < s.count(); ++i)
      for (Index j = 0; j < rows.width - 1; ++j) {
        Sequence const q = s[static_cast<std::size_t>(i)];
        T const* row = rows.at(q.start + q.length, q.length, i, rows.width - 1 - j);
        T* const to = final_state.row(i, j);   // in place, where an empty sequence keeps its rows
        if (row == nullptr) std::fill_n(to, rows.x.extent(1), T(0));
        else if (row != to) std::copy_n(row, rows.x.extent(1), to);
      }
  }
  // The state's row j stands W - 1 - j tokens before the sequence; it reaches the first tokens, and what is left of it at the end.
  template <class T>
  static void initial_gradient(Sequences const& s, View<T const, 2> taps, View<T const, 2> d_s, State<In<T>, 3> d_final_state,
                               State<Out<T>, 3> d_initial_state) {
    Index const C = d_s.extent(1), W = taps.extent(0);
    for (Index i = 0; i < s.count(); ++i)
      for (Index j = 0; j < W - 1; ++j) {
        Sequence const q = s[static_cast<std::size_t>(i)];
        T* const d = d_initial_state.row(i, j);
        std::fill_n(d, C, T(0));
        for (Index t = 0; t < std::min(j + 1, q.length); ++t) add_product(taps.row(j - t), d_s.row(q.start + t), d, C);
        if (!d_final_state.empty() && j >= q.length) axpy(T(1), d_final_state.row(i, j - q.length), d, C);
      }
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
#endif

// ==== hybridattn/ops/gdn_gate/gdn_gate.hpp
// The gates of Gated DeltaNet, from their projections a and b:
//   g = -exp(a_log) softplus(a + dt_bias)      beta = range sigmoid(b), range 1 or 2
//   d_a = d_dt_bias = -exp(a_log) sigmoid(a + dt_bias) d_g      d_a_log = sum d_g g      d_b = beta (1 - beta / range) d_beta
#ifndef HYBRIDATTN_OPS_GDN_GATE_GDN_GATE_HPP
#define HYBRIDATTN_OPS_GDN_GATE_GDN_GATE_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

//   forward (backend, range, a, b, a_log, dt_bias, g, beta)       a, b, g, beta [N, HV], a_log, dt_bias [HV]
//   backward(backend, range, a, b, a_log, dt_bias, d_g, d_beta, d_a, d_b, d_a_log, d_dt_bias)   overwrites all four
struct GdnGate {};

}  // namespace hybridattn::inline HYBRIDATTN_ABI

// ==== hybridattn/ops/gdn_gate/cpu.hpp
#ifndef HYBRIDATTN_OPS_GDN_GATE_CPU_HPP
#define HYBRIDATTN_OPS_GDN_GATE_CPU_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

// Plain loops: one number a head and token.
template <> struct On<GdnGate, Cpu> : InFloat<GdnGate, Cpu> {
  using InFloat::forward, InFloat::backward;
  template <std::floating_point T>
  static void forward(Cpu& cpu, int range, View<T const, 2> a, View<T const, 2> b, Wide<In<T>, 1> a_log, Wide<In<T>, 1> dt_bias,
                      Wide<Out<T>, 2> g, Wide<Out<T>, 2> beta) {
    parallel_blocks(cpu, a.extent(0), cpu::sum_rows, [&](Index first, Index last) {
      for (Index n = first; n < last; ++n)
        for (Index h = 0; h < a.extent(1); ++h) {
          g(n, h) = -std::exp(a_log(h)) * softplus(a(n, h) + dt_bias(h));
          beta(n, h) = static_cast<T>(range) * sigmoid(b(n, h));
        }
    });
  }

  template <std::floating_point T>
  static void backward(Cpu& cpu, int range, View<T const, 2> a, View<T const, 2> b, Wide<In<T>, 1> a_log, Wide<In<T>, 1> dt_bias,
                       Wide<In<T>, 2> d_g, Wide<In<T>, 2> d_beta, View<T, 2> d_a, View<T, 2> d_b, Wide<Out<T>, 1> d_a_log,
                       Wide<Out<T>, 1> d_dt_bias) {
    cpu::sum_over_rows<T>(cpu, a.extent(0), d_a_log, [&](Index n, T* sum) {
      for (Index h = 0; h < a.extent(1); ++h) {
        T const rate = -std::exp(a_log(h)), shifted = a(n, h) + dt_bias(h), open = sigmoid(b(n, h));
        d_a(n, h) = rate * sigmoid(shifted) * d_g(n, h);
        d_b(n, h) = static_cast<T>(range) * open * (T(1) - open) * d_beta(n, h);
        sum[h] += rate * softplus(shifted) * d_g(n, h);
      }
    });
    cpu::sum_over_rows<T>(cpu, a.extent(0), d_dt_bias, [&](Index n, T* sum) {
      for (Index h = 0; h < a.extent(1); ++h) sum[h] += d_a(n, h);
    });
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
#endif

// ==== hybridattn/ops/l2_norm/l2_norm.hpp
// Rows of length one: y = x rnorm,  rnorm = (sum x^2 + eps)^-1/2;   d_x = rnorm (d_y - y (y . d_y)).  A row of zeros stays zero.
#ifndef HYBRIDATTN_OPS_L2_NORM_L2_NORM_HPP
#define HYBRIDATTN_OPS_L2_NORM_L2_NORM_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

//   forward (backend, x, y)            x, y [N, C]; y may be x
//   backward(backend, x, d_y, d_x)     overwrites d_x; d_x may be d_y
struct L2Norm {
  static constexpr double eps = 1e-6;   // inside the root, as in flash-linear-attention and transformers
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI

// ==== hybridattn/ops/l2_norm/cpu.hpp
#ifndef HYBRIDATTN_OPS_L2_NORM_CPU_HPP
#define HYBRIDATTN_OPS_L2_NORM_CPU_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

template <> struct On<L2Norm, Cpu> : InFloat<L2Norm, Cpu> {
  using InFloat::forward, InFloat::backward;
  template <std::floating_point T> static void forward(Cpu& cpu, View<T const, 2> x, View<T, 2> y) {
    Index const C = x.extent(1);
    parallel_blocks(cpu, x.extent(0), cpu::sum_rows, [&](Index first, Index last) {
      for (Index n = first; n < last; ++n) {
        T const *row = x.row(n), rnorm = inverse_norm(row, C);
        cpu::for_each_vector<T>(0, C, [&](cpu::Slot<T> s) HYBRIDATTN_INLINE_LAMBDA { s.put(y.row(n), s.get(row) * rnorm); });
      }
    });
  }

  template <std::floating_point T> static void backward(Cpu& cpu, View<T const, 2> x, View<T const, 2> d_y, View<T, 2> d_x) {
    Index const C = x.extent(1);
    parallel_blocks(cpu, x.extent(0), cpu::sum_rows, [&](Index first, Index last) {
      for (Index n = first; n < last; ++n) {
        T const *xn = x.row(n), *d_yn = d_y.row(n), rnorm = inverse_norm(xn, C);
        T const along = cpu::sum_vectors<T>(C, [&](cpu::Slot<T> s) HYBRIDATTN_INLINE_LAMBDA { return s.get(xn) * s.get(d_yn); }) * rnorm;
        cpu::for_each_vector<T>(
            0, C, [&](cpu::Slot<T> s) HYBRIDATTN_INLINE_LAMBDA { s.put(d_x.row(n), rnorm * (s.get(d_yn) - s.get(xn) * rnorm * along)); });
      }
    });
  }

 private:
  template <class T> static T inverse_norm(T const* x, Index C) {
    T const squares = cpu::sum_vectors<T>(C, [&](cpu::Slot<T> s) HYBRIDATTN_INLINE_LAMBDA {
      cpu::Vec<T> const v = s.get(x);
      return v * v;
    });
    return cpu::inverse_root(squares + static_cast<T>(L2Norm::eps));
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
#endif

// ==== hybridattn/attention/gdn/steps.hpp
// The steps around the gated delta rule in a layer: short convolutions, L2 norms and gates before it, a gated norm after it.
//   q, k = l2_norm(silu(conv(raw)))      v = silu(conv(raw))      g, beta from their projections (ops/gdn_gate)
//   y = RMSNorm(o) w silu(z), one weight [V] for all heads
#ifndef HYBRIDATTN_ATTENTION_GDN_STEPS_HPP
#define HYBRIDATTN_ATTENTION_GDN_STEPS_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::gdn {

template <class S> struct PrepareParams {
  Held<S, 2> conv_q, conv_k, conv_v;  // [channels, conv_width]; the last tap multiplies the token itself
  Wide<S, 1> a_log, dt_bias;          // [HV]
  HYBRIDATTN_FIELDS(conv_q, conv_k, conv_v, a_log, dt_bias)
};

template <GdnOptions O> struct Prepare {
  template <class S> using Params = PrepareParams<S>;

  static constexpr bool makes(std::string_view) { return true; }

  static Params<Shapes> params(Config const& c) {
    Shape<2> const keys{size_product(c.num_heads, c.key_dim), O.conv_width};
    return {.conv_q = keys,
            .conv_k = keys,
            .conv_v = {size_product(c.num_value_heads, c.value_dim), O.conv_width},
            .a_log = {c.num_value_heads},
            .dt_bias = {c.num_value_heads}};
  }
  static Params<Starts> starts(Config const& c) {
    double const bound = O.conv_width == 0 ? 0 : 1 / std::sqrt(static_cast<double>(O.conv_width));
    Initial const conv = Initial::uniform(-bound, bound), rate{Initial::Kind::log_uniform_value, 0.01, 16};
    Initial const step =
        c.gate_start == GateStart::fla ? Initial{Initial::Kind::inverse_softplus_of_log_uniform, 1e-3, 0.1} : Initial::constant(1);
    return {.conv_q = conv, .conv_k = conv, .conv_v = conv, .a_log = rate, .dt_bias = step};
  }

  template <class B, class T>
  static void forward(B& backend, Config const&, SequencesOn<B> const& s, Inputs<Narrow<In<T>>> raw, Params<In<T>> p, Inputs<Out<T>> x) {
    convolve(backend, s, raw.q, p.conv_q, x.q);
    convolve(backend, s, raw.k, p.conv_k, x.k);
    convolve(backend, s, raw.v, p.conv_v, x.v);
    normalise_and_gate(backend, raw, p, x);
  }
  // The convolutions start from the earlier tokens in the cache.
  template <class B, class T>
  static void extend(B& backend, Config const&, SequencesOn<B> const& s, Inputs<Narrow<In<T>>> raw, Params<In<T>> p, Cache<Out<T>> cache,
                     Inputs<Out<T>> x) {
    convolve_on(backend, s, raw.q, p.conv_q, cache.conv_q, x.q);
    convolve_on(backend, s, raw.k, p.conv_k, cache.conv_k, x.k);
    convolve_on(backend, s, raw.v, p.conv_v, cache.conv_v, x.v);
    normalise_and_gate(backend, raw, p, x);
  }
  template <class B, class T>
  static void backward(B& backend, Config const&, SequencesOn<B> const& s, Inputs<Narrow<In<T>>> raw, Params<In<T>> p, Inputs<In<T>>,
                       Inputs<In<T>> d_x, Inputs<Narrow<Out<T>>> d_raw, Params<Out<T>> d_p) {
    unit_backward(backend, s, raw.q, p.conv_q, d_x.q, d_raw.q, d_p.conv_q);
    unit_backward(backend, s, raw.k, p.conv_k, d_x.k, d_raw.k, d_p.conv_k);
    convolve_backward(backend, s, raw.v, p.conv_v, d_x.v, d_raw.v, d_p.conv_v);
    On<GdnGate, B>::backward(backend, range, raw.g, raw.beta, p.a_log, p.dt_bias, d_x.g, d_x.beta, d_raw.g, d_raw.beta, d_p.a_log,
                             d_p.dt_bias);
  }

 private:
  static constexpr int range = O.negative_eigenvalues ? 2 : 1;

  template <class B, class T>
  static void normalise_and_gate(B& backend, Inputs<Narrow<In<T>>> const& raw, Params<In<T>> const& p, Inputs<Out<T>> const& x) {
    On<L2Norm, B>::forward(backend, head_rows(View<T const, 3>(x.q)), head_rows(x.q));
    On<L2Norm, B>::forward(backend, head_rows(View<T const, 3>(x.k)), head_rows(x.k));
    On<GdnGate, B>::forward(backend, range, raw.g, raw.beta, p.a_log, p.dt_bias, x.g, x.beta);
  }
  // A sequence without past tokens starts from zeros.
  template <class B, class T>
  static void convolve_on(B& backend, SequencesOn<B> const& s, View<T const, 3> raw, View<T const, 2> w, View<T, 3> state, View<T, 3> y) {
    for (Index i = 0; i < s.count() && !state.empty(); ++i)
      if (Sequence const sequence = s[static_cast<std::size_t>(i)]; sequence.past == 0 && sequence.length > 0)
        On<Fill, B>::forward(backend, T(0), View<T, 1>{state.row(i, 0), {state.extent(1) * state.extent(2)}});
    On<CausalConv1d, B>::forward(backend, Activation::silu, s, as_rows(raw), w, View<T const, 3>(state), as_rows(y), state);
  }
  template <class B, class T> static void convolve(B& backend, SequencesOn<B> const& s, View<T const, 3> raw, View<T const, 2> w,
                                                   View<T, 3> y) {
    On<CausalConv1d, B>::forward(backend, Activation::silu, s, as_rows(raw), w, View<T const, 3>{}, as_rows(y), View<T, 3>{});
  }
  template <class B, class T>
  static void convolve_backward(B& backend, SequencesOn<B> const& s, View<T const, 3> raw, View<T const, 2> w, View<T const, 3> d_y,
                                View<T, 3> d_raw, View<T, 2> d_w) {
    On<CausalConv1d, B>::backward(backend, Activation::silu, s, as_rows(raw), w, View<T const, 3>{}, as_rows(d_y), View<T const, 3>{},
                                  as_rows(d_raw), d_w, View<T, 3>{});
  }
  // Backward of the L2 norm and the convolution. Computes the convolution's output again.
  template <class B, class T>
  static void unit_backward(B& backend, SequencesOn<B> const& s, View<T const, 3> raw, View<T const, 2> w, View<T const, 3> d_y,
                            View<T, 3> d_raw, View<T, 2> d_w) {
    Tensor<T, 3, B> convolved{backend, raw.shape}, d_convolved{backend, raw.shape};
    convolve(backend, s, raw, w, out(convolved));
    On<L2Norm, B>::backward(backend, head_rows(in(convolved)), head_rows(d_y), head_rows(out(d_convolved)));
    convolve_backward(backend, s, raw, w, in(d_convolved), d_raw, d_w);
  }
};

template <class S> struct FinishParams {
  Wide<S, 1> norm;  // [V]
  HYBRIDATTN_FIELDS(norm)
};

template <GdnOptions O> struct Finish {
  static constexpr bool gated = O.output_gate;
  template <class S> using Params = FinishParams<S>;

  static Params<Shapes> params(Config const& c) { return {.norm = {c.value_dim}}; }
  static Params<Starts> starts(Config const&) { return {.norm = Initial::constant(1)}; }

  template <class B, class T>
  static void forward(B& backend, Config const& c, View<T const, 3> o, View<T const, 3> z, Params<In<T>> p, View<T, 3> y) {
    On<GatedRmsNorm, B>::forward(backend, c.norm_eps, head_rows(o), rows_or_none(z), p.norm, head_rows(y));
  }
  template <class B, class T>
  static void backward(B& backend, Config const& c, View<T const, 3> o, View<T const, 3> z, Params<In<T>> p, View<T const, 3> d_y,
                       View<T, 3> d_o, View<T, 3> d_z, Params<Out<T>> d_p) {
    On<GatedRmsNorm, B>::backward(backend, c.norm_eps, head_rows(o), rows_or_none(z), p.norm, head_rows(d_y), head_rows(d_o),
                                  rows_or_none(d_z), d_p.norm);
  }

 private:
  template <class T> static View<T, 2> rows_or_none(View<T, 3> z) { return z.empty() ? View<T, 2>{} : head_rows(z); }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::gdn
#endif

// ==== hybridattn/attention/gdn/gdn.hpp
// Gated DeltaNet (arXiv 2412.06464): a linear attention whose state forgets, then corrects itself.
// For each value head, S is [K, V] and S_0 = initial_state, or zero:
//   (1) S~_t = exp(g_t) S_{t-1}                        forget before error
//   (2) e_t = v_t - S~_t^T k_t                         delta_t = beta_t e_t
//   (3) S_t = S~_t + k_t delta_t^T
//   (4) o_t = scale S_t^T q_t                          the updated state; final_state = S_T
// Backward, with X_t the gradient of S_t, from the last token to the first:
//   (5) X_t += scale q_t d_o_t^T ;  d_v_t = beta_t X_t^T k_t ;  d_beta_t = (X_t^T k_t) . e_t
//   (6) d_k_t = X_t delta_t - S~_t d_v_t ;  d_q_t = scale S_t d_o_t ;  X_{t-1} = exp(g_t) (X_t - k_t d_v_t^T)
//   (7) d_g_t = exp(g_t) <X_t - k_t d_v_t^T, S_{t-1}>    a sum over pairs of a write before and a read after this decay
//       (Euler's relation, sum_{j >= t} (q_j . d_q_j - v_j . d_v_j) + <S_T, d_final_state>, is mathematically equal, but
//       inexact in floating point: the sum fades with the decay, its terms do not)
// Value head h reads q/k head h / (HV / H); d_q and d_k sum over the group. g <= 0 is a logarithm: its sums never
// underflow before the exp. No equation divides by beta, so beta = 0 needs no special case.
#ifndef HYBRIDATTN_ATTENTION_GDN_GDN_HPP
#define HYBRIDATTN_ATTENTION_GDN_GDN_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

template <GdnOptions O = GdnOptions{}> struct GatedDeltaNet : PolicyDefaults {
  static_assert(O.conv_width >= 0, "GdnOptions: conv_width is a number of tokens, or 0 for no convolution");

  static constexpr std::string_view name = "GDN";
  static constexpr GdnOptions options = O;
  using Config = gdn::Config;
  template <class S> using Inputs = gdn::Inputs<S>;
  template <class S> using Outputs = gdn::Outputs<S>;
  template <class S> using Saved = gdn::Saved<S>;
  template <class S> using Cache = gdn::Cache<S>;
  using Prepare = gdn::Prepare<O>;
  using Finish = gdn::Finish<O>;

  static Config complete(Config c, Index model_dim, Index num_heads) {
    check_numbers(c);
    if (c.num_heads == 0) c.num_heads = num_heads;
    if (c.num_value_heads == 0) c.num_value_heads = c.num_heads;
    c.key_dim = default_head_dim(c.key_dim, model_dim, c.num_heads);
    if (c.value_dim == 0) c.value_dim = c.key_dim;
    if (c.scale == 0) c.scale = 1 / std::sqrt(static_cast<double>(c.key_dim));
    check_groups("GatedDeltaNet", c.num_value_heads, c.num_heads);
    return c;
  }
  // Training batches have no states: inputs() and outputs() give them empty shapes. gdn::state_shape is their shape.
  static Inputs<Shapes> inputs(Config const& c, Sequences const& s) {
    Shape<3> const keys{s.tokens(), c.num_heads, c.key_dim};
    Shape<2> const gates{s.tokens(), c.num_value_heads};
    return {.q = keys, .k = keys, .v = {s.tokens(), c.num_value_heads, c.value_dim}, .g = gates, .beta = gates, .initial_state = {}};
  }
  static Outputs<Shapes> outputs(Config const& c, Sequences const& s) {
    return {.o = {s.tokens(), c.num_value_heads, c.value_dim}, .final_state = {}};
  }
  static Saved<Shapes> saved(Config const& c, Sequences const& s) { return {.error = {s.tokens(), c.num_value_heads, c.value_dim}}; }
  static Cache<Shapes> cache(Config const& c, Index batch, Index) {
    Index const rows = O.conv_width > 0 ? O.conv_width - 1 : 0;
    Shape<3> const keys{batch, rows, size_product(c.num_heads, c.key_dim)};
    return {.conv_q = keys,
            .conv_k = keys,
            .conv_v = {batch, rows, size_product(c.num_value_heads, c.value_dim)},
            .state = {batch, c.num_value_heads, c.key_dim, c.value_dim}};
  }

 private:
  static void check_numbers(Config const& c) {
    check_size("GatedDeltaNet", "num_heads", c.num_heads);
    check_size("GatedDeltaNet", "num_value_heads", c.num_value_heads);
    check_size("GatedDeltaNet", "key_dim", c.key_dim);
    check_size("GatedDeltaNet", "value_dim", c.value_dim);
    check_number("GatedDeltaNet", "scale", c.scale);
    check_positive("GatedDeltaNet", "norm_eps", c.norm_eps);
  }
};
using GDN = GatedDeltaNet<>;

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/attention/attention.hpp
// All policies of the library.
#ifndef HYBRIDATTN_ATTENTION_ATTENTION_HPP
#define HYBRIDATTN_ATTENTION_ATTENTION_HPP

#endif

// ==== hybridattn/nn/initialization.hpp
// Initial values of a model's matrices. Norms, gates and convolutions have initial values of their own.
#ifndef HYBRIDATTN_NN_INITIALIZATION_HPP
#define HYBRIDATTN_NN_INITIALIZATION_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

struct Initialization {
  double linear_deviation = 0.02;     // N(0, linear_deviation^2); 0: uniform in +-fan_in^-1/2, PyTorch's Linear
  double embedding_deviation = 0.02;  // N(0, embedding_deviation^2)

  // Throws Error unless both deviations are numbers >= 0.
  void check_numbers() const {
    check_not_negative("Initialization", "linear_deviation", linear_deviation);
    check_not_negative("Initialization", "embedding_deviation", embedding_deviation);
  }
  Initial linear(Index fan_in) const {
    if (linear_deviation != 0) return Initial::normal(linear_deviation);
    double const bound = fan_in == 0 ? 0 : 1 / std::sqrt(static_cast<double>(fan_in));
    return Initial::uniform(-bound, bound);
  }
  Initial embedding() const { return Initial::normal(embedding_deviation); }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/ops/grouped_linear/grouped_linear.hpp
// Linear projections of many experts as one operation. Rows are sorted by expert: rows offsets[e] .. offsets[e + 1] belong to e.
//   y = x w[e]^T      d_x = d_y w[e]      d_w[e] = d_y^T x      over the rows of e
#ifndef HYBRIDATTN_OPS_GROUPED_LINEAR_GROUPED_LINEAR_HPP
#define HYBRIDATTN_OPS_GROUPED_LINEAR_GROUPED_LINEAR_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

//   forward (backend, offsets, x, w, y)                  offsets [E + 1], x [R, C], w [E, F, C], y [R, F]
//   backward(backend, offsets, x, w, d_y, d_x, d_w, into)   d_x is added or overwritten; overwrites d_w, with 0 for an expert without
//                                                           rows
// An empty d_x or d_w is not computed. The offsets stay on the machine. Row for row the bits are those of Linear.
struct GroupedLinear {};

}  // namespace hybridattn::inline HYBRIDATTN_ABI

// ==== hybridattn/backend/operand.hpp
// The factors of matrix products, for every backend.
#ifndef HYBRIDATTN_BACKEND_OPERAND_HPP
#define HYBRIDATTN_BACKEND_OPERAND_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

// A matrix of a product, transposed or not: element (i, j) is data[i * row + j * column]; one of the strides is 1.
template <class T> struct Operand {
  T const* data = nullptr;
  Index rows = 0, columns = 0, row = 0, column = 1;

  HYBRIDATTN_HD T operator()(Index i, Index j) const { return data[i * row + j * column]; }
  HYBRIDATTN_HD Operand transposed() const { return {data, columns, rows, column, row}; }
  HYBRIDATTN_HD Operand row_range(Index first, Index last) const { return {data + first * row, last - first, columns, row, column}; }
};
template <class T> HYBRIDATTN_HD Operand<std::remove_const_t<T>> operand(View<T, 2> x) {
  return {x.data, x.extent(0), x.extent(1), x.stride[0], 1};
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/backend/cpu/few_rows.hpp
// Products of few rows with a transposed b, as in decoding. Nothing is packed, because b is read once. The sums have the order and the
// bits of those of a product of many rows.
#ifndef HYBRIDATTN_BACKEND_CPU_FEW_ROWS_HPP
#define HYBRIDATTN_BACKEND_CPU_FEW_ROWS_HPP

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

// ==== hybridattn/backend/cpu/pack.hpp
// Packing: a matrix product reads its operands from copies that lie in the order in which the register tile reads them. So a column of
// an operand is never read across rows that stand a page apart, and a row of b is read once for many rows of a.
#ifndef HYBRIDATTN_BACKEND_CPU_PACK_HPP
#define HYBRIDATTN_BACKEND_CPU_PACK_HPP

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

// ==== hybridattn/backend/cpu/gemm.hpp
// Matrix products on the CPU, by the register tile. A row of a result depends only on that row of `a` and on `b`. It is
// summed over the depth in one fixed order, for any number of rows and threads.
#ifndef HYBRIDATTN_BACKEND_CPU_GEMM_HPP
#define HYBRIDATTN_BACKEND_CPU_GEMM_HPP

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

// ==== hybridattn/ops/grouped_linear/cpu.hpp
#ifndef HYBRIDATTN_OPS_GROUPED_LINEAR_CPU_HPP
#define HYBRIDATTN_OPS_GROUPED_LINEAR_CPU_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

template <> struct On<GroupedLinear, Cpu> {
  using Offsets = View<std::int32_t const, 1>;
  template <class T> using Product = cpu::Product<T, T, T>;

  template <class T> static void forward(Cpu& cpu, Offsets offsets, View<T const, 2> x, View<T const, 3> w, View<T, 2> y) {
    cpu::Scratch<Product<T>> const products{cpu, most_blocks(w.extent(0), y.extent(0))};
    Product<T>* next = products.data();
    for_each_block(offsets, [&](Index e, Index first, Index last) {
      *next++ = {operand(rows(x, first, last)), operand(of_expert(w, e)).transposed(), rows(y, first, last)};
    });
    cpu::gemm_each<T, T>(cpu, products.data(), next, std::min(block_rows, x.extent(0)), x.extent(1), Into::overwrite);
  }

  template <class T>
  static void backward(Cpu& cpu, Offsets offsets, View<T const, 2> x, View<T const, 3> w, View<T const, 2> d_y, View<T, 2> d_x,
                       View<T, 3> d_w, Into into) {
    if (!d_x.empty()) form_d_x(cpu, offsets, w, d_y, d_x, into);
    if (!d_w.empty()) write_d_w(cpu, offsets, x, d_y, d_w);
  }

 private:
  // Rows of one task. A task packs its part of the matrix by itself, which many rows pay for.
  static constexpr Index block_rows = 256;

  template <class T>
  static void form_d_x(Cpu& cpu, Offsets offsets, View<T const, 3> w, View<T const, 2> d_y, View<T, 2> d_x, Into into) {
    cpu::Scratch<Product<T>> const products{cpu, most_blocks(w.extent(0), d_y.extent(0))};
    Product<T>* next = products.data();
    for_each_block(offsets, [&](Index e, Index first, Index last) {
      *next++ = {operand(rows(d_y, first, last)), operand(of_expert(w, e)), rows(d_x, first, last)};
    });
    cpu::gemm_each<T, T>(cpu, products.data(), next, std::min(block_rows, d_y.extent(0)), d_y.extent(1), into);
  }
  template <class T>
  static void write_d_w(Cpu& cpu, Offsets offsets, View<T const, 2> x, View<T const, 2> d_y, View<T, 3> d_w) {
    Index const E = d_w.extent(0), F = d_w.extent(1);
    cpu::Scratch<Product<T>> const products{cpu, std::min(E, x.extent(0)) * ceil_div(F, block_rows)};
    Product<T>* next = products.data();
    for (Index e = 0; e < E; ++e) {
      if (is_idle(offsets, e)) continue;
      auto const its_x = operand(rows(x, offsets(e), offsets(e + 1))), its_d_y = operand(rows(d_y, offsets(e), offsets(e + 1)));
      for (Index first = 0; first < F; first += block_rows) {
        Index const last = std::min(F, first + block_rows);
        *next++ = {its_d_y.transposed().row_range(first, last), its_x, rows(of_expert(d_w, e), first, last)};
      }
    }
    cpu::gemm_each<T, T>(cpu, products.data(), next, std::min(block_rows, F), x.extent(0), Into::overwrite);
    parallel_for(cpu, E, [&](Index e, int) {
      if (!is_idle(offsets, e)) return;
      for (Index f = 0; f < F; ++f) std::fill_n(d_w.row(e, f), d_w.extent(2), T(0));
    });
  }

  static bool is_idle(Offsets offsets, Index e) { return offsets(e) == offsets(e + 1); }
  // f(expert, first row, last row) for blocks of rows, each of one expert.
  template <class F> static void for_each_block(Offsets offsets, F f) {
    for (Index e = 0; e + 1 < offsets.extent(0); ++e)
      for (Index first = offsets(e); first < offsets(e + 1); first += block_rows)
        f(e, first, std::min<Index>(first + block_rows, offsets(e + 1)));
  }
  // However R rows are shared out among E experts: equal steps take equal memory.
  static Index most_blocks(Index E, Index R) { return std::min(E, R) + R / block_rows; }
  template <class T> static View<T, 2> of_expert(View<T, 3> all, Index e) {
    return {all.data + e * all.stride[0], {all.extent(1), all.extent(2)}, {all.stride[1], 1}};
  }
  template <class T> static View<T, 2> rows(View<T, 2> all, Index first, Index last) {
    return {all.data + first * all.stride[0], {last - first, all.extent(1)}, all.stride};
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
#endif

// ==== hybridattn/ops/linear/linear.hpp
// Linear projection without bias: y[N, M] = x[N, C] w[M, C]^T, weights [out, in] as in the field's checkpoints.
//   d_x = d_y w      d_w = d_y^T x
#ifndef HYBRIDATTN_OPS_LINEAR_LINEAR_HPP
#define HYBRIDATTN_OPS_LINEAR_LINEAR_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

//   forward (backend, x, w, y)
//   backward(backend, x, w, d_y, d_x, d_w, into): d_x is added or overwritten, since several projections may read x; overwrites
//   d_w. An empty d_x or d_w is not computed.
struct Linear {};

}  // namespace hybridattn::inline HYBRIDATTN_ABI

// ==== hybridattn/ops/linear/cpu.hpp
#ifndef HYBRIDATTN_OPS_LINEAR_CPU_HPP
#define HYBRIDATTN_OPS_LINEAR_CPU_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

// Each matrix is stored in a scalar of its own: logits are in float where x and w are in bf16.
template <> struct On<Linear, Cpu> {
  template <class X, class W, class Y> static void forward(Cpu& cpu, View<X const, 2> x, View<W const, 2> w, View<Y, 2> y) {
    cpu::gemm(cpu, operand(x), operand(w).transposed(), y);
  }
  template <class X, class W, class Y, class DX, class DW>
  static void backward(Cpu& cpu, View<X const, 2> x, View<W const, 2> w, View<Y const, 2> d_y, View<DX, 2> d_x, View<DW, 2> d_w,
                       Into into) {
    if (!d_x.empty()) cpu::gemm(cpu, operand(d_y), operand(w), d_x, into);
    if (!d_w.empty()) cpu::gemm(cpu, operand(d_y).transposed(), operand(x), d_w);
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
#endif

// ==== hybridattn/ops/moe/moe.hpp
// Mixture of experts, dropless: every token goes to its top_k experts (arXiv 2101.03961, 2401.04088).
//   p = softmax(router logits)      the top_k largest, ties to the smaller index
//   weight of a chosen expert: p_e; or p_e / sum of the chosen (renormalised), which is the softmax over the chosen logits
//   y = sum over the chosen of weight * expert(x)
// Experts receive their tokens in token order, so a later token never changes an earlier one's place among the sums.
#ifndef HYBRIDATTN_OPS_MOE_MOE_HPP
#define HYBRIDATTN_OPS_MOE_MOE_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

//   forward (backend, options, logits, probabilities, weights, experts)      [N, E] [N, E] [N, k] [N, k]; highest first
//   backward(backend, options, probabilities, weights, experts, d_weights, d_probability, d_logits)
//     d_probability [E], the same for every token, is what a balancing loss adds; overwrites d_logits
struct Route {
  struct Options {
    bool renormalise = true;
  };
};
//   forward(backend, experts, offsets, places)     experts [N, k] -> rows offsets[e] .. offsets[e + 1] belong to expert e
//   offsets [E + 1], places [N, k]: the row of each choice
struct Permute {};
//   forward (backend, x, places, rows)             rows[places[n, j]] = x[n]
//   backward(backend, places, d_rows, d_x, into)   d_x is added or overwritten
struct Distribute {};
//   forward (backend, rows, weights, places, y)    y[n] = sum_j weights[n, j] rows[places[n, j]]
//   backward(backend, rows, weights, places, d_y, d_rows, d_weights)   overwrites both
struct Combine {};
//   y[n] += sigmoid(logit[n]) x[n]: how a shared expert joins
//   forward (backend, x, logit, y)                 x, y [N, C], logit [N, 1]
//   backward(backend, x, logit, d_y, d_x, d_logit) overwrites both
struct AddGated {};

}  // namespace hybridattn::inline HYBRIDATTN_ABI

// ==== hybridattn/ops/moe/cpu.hpp
#ifndef HYBRIDATTN_OPS_MOE_CPU_HPP
#define HYBRIDATTN_OPS_MOE_CPU_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

template <> struct On<Route, Cpu> : InFloat<Route, Cpu> {
  using InFloat::forward, InFloat::backward;
  template <std::floating_point T>
  static void forward(Cpu& cpu, Route::Options o, View<T const, 2> logits, View<T, 2> probabilities, View<T, 2> weights,
                      View<std::int32_t, 2> experts) {
    parallel_blocks(cpu, logits.extent(0), cpu::sum_rows, [&](Index first, Index last) {
      for (Index n = first; n < last; ++n) {
        choose(logits.row(n), logits.extent(1), experts.row(n), experts.extent(1));
        softmax(logits.row(n), logits.extent(1), logits(n, experts(n, 0)), probabilities.row(n));
        T sum = 0;
        for (Index j = 0; j < experts.extent(1); ++j) sum += weights(n, j) = probabilities(n, experts(n, j));
        if (o.renormalise)
          for (Index j = 0; j < experts.extent(1); ++j) weights(n, j) /= sum;
      }
    });
  }

  template <std::floating_point T>
  static void backward(Cpu& cpu, Route::Options o, View<T const, 2> probabilities, View<T const, 2> weights,
                       View<std::int32_t const, 2> experts, View<T const, 2> d_weights, View<T const, 1> d_probability,
                       View<T, 2> d_logits) {
    Index const E = probabilities.extent(1), k = experts.extent(1);
    parallel_blocks(cpu, probabilities.extent(0), cpu::sum_rows, [&](Index first, Index last) {
      for (Index n = first; n < last; ++n) {
        T const* p = probabilities.row(n);
        T along = 0, along_chosen = 0;   // of the softmax over all, over the chosen
        for (Index e = 0; e < E && !d_probability.empty(); ++e) along += p[e] * d_probability(e);
        for (Index j = 0; j < k; ++j) (o.renormalise ? along_chosen : along) += weights(n, j) * d_weights(n, j);
        for (Index e = 0; e < E; ++e) d_logits(n, e) = p[e] * ((d_probability.empty() ? T(0) : d_probability(e)) - along);
        for (Index j = 0; j < k; ++j) d_logits(n, experts(n, j)) += weights(n, j) * (d_weights(n, j) - along_chosen);
      }
    });
  }

 private:
  // Highest first, the smaller index of equal ones first.
  template <class T> static void choose(T const* logits, Index E, std::int32_t* chosen, Index k) {
    for (Index j = 0; j < k; ++j) {
      Index best = -1;
      for (Index e = 0; e < E; ++e)
        if (std::find(chosen, chosen + j, e) == chosen + j && (best < 0 || logits[e] > logits[best])) best = e;
      chosen[j] = static_cast<std::int32_t>(best);
    }
  }
  template <class T> static void softmax(T const* logits, Index E, T peak, T* probabilities) {
    T sum = 0;
    for (Index e = 0; e < E; ++e) sum += probabilities[e] = std::exp(logits[e] - peak);
    for (Index e = 0; e < E; ++e) probabilities[e] /= sum;
  }
};

template <> struct On<Permute, Cpu> {
  static void forward(Cpu&, View<std::int32_t const, 2> experts, View<std::int32_t, 1> offsets, View<std::int32_t, 2> places) {
    auto const for_each_choice = [&](auto f) {
      for (Index n = 0; n < experts.extent(0); ++n)
        for (Index j = 0; j < experts.extent(1); ++j) f(n, j, experts(n, j));
    };
    std::fill_n(offsets.data, offsets.count(), 0);
    for_each_choice([&](Index, Index, Index e) { ++offsets(e + 1); });
    for (Index e = 1; e < offsets.extent(0); ++e) offsets(e) += offsets(e - 1);
    for_each_choice([&](Index n, Index j, Index e) { places(n, j) = offsets(e)++; });
    for (Index e = offsets.extent(0) - 1; e > 0; --e) offsets(e) = offsets(e - 1);
    offsets(0) = 0;
  }
};

template <> struct On<Distribute, Cpu> : InFloat<Distribute, Cpu> {
  using InFloat::forward, InFloat::backward;
  template <std::floating_point T> static void forward(Cpu& cpu, View<T const, 2> x, View<std::int32_t const, 2> places, View<T, 2> rows) {
    parallel_blocks(cpu, x.extent(0), cpu::sum_rows, [&](Index first, Index last) {
      for (Index n = first; n < last; ++n)
        for (Index j = 0; j < places.extent(1); ++j) std::copy_n(x.row(n), x.extent(1), rows.row(places(n, j)));
    });
  }
  template <std::floating_point T> static void backward(Cpu& cpu, View<std::int32_t const, 2> places, View<T const, 2> d_rows,
                                                        View<T, 2> d_x, Into into) {
    parallel_blocks(cpu, d_x.extent(0), cpu::sum_rows, [&](Index first, Index last) {
      for (Index n = first; n < last; ++n) {
        if (into == Into::overwrite) std::fill_n(d_x.row(n), d_x.extent(1), T(0));
        for (Index j = 0; j < places.extent(1); ++j) axpy(T(1), d_rows.row(places(n, j)), d_x.row(n), d_x.extent(1));
      }
    });
  }
};

template <> struct On<Combine, Cpu> : InFloat<Combine, Cpu> {
  using InFloat::forward, InFloat::backward;
  template <std::floating_point T>
  static void forward(Cpu& cpu, View<T const, 2> rows, Wide<In<T>, 2> weights, View<std::int32_t const, 2> places, View<T, 2> y) {
    parallel_blocks(cpu, y.extent(0), cpu::sum_rows, [&](Index first, Index last) {
      for (Index n = first; n < last; ++n) {
        std::fill_n(y.row(n), y.extent(1), T(0));
        for (Index j = 0; j < places.extent(1); ++j) axpy(weights(n, j), rows.row(places(n, j)), y.row(n), y.extent(1));
      }
    });
  }
  template <std::floating_point T>
  static void backward(Cpu& cpu, View<T const, 2> rows, Wide<In<T>, 2> weights, View<std::int32_t const, 2> places, View<T const, 2> d_y,
                       View<T, 2> d_rows, Wide<Out<T>, 2> d_weights) {
    Index const C = d_y.extent(1);
    parallel_blocks(cpu, d_y.extent(0), cpu::sum_rows, [&](Index first, Index last) {
      for (Index n = first; n < last; ++n)
        for (Index j = 0; j < places.extent(1); ++j) {
          T const *d_yn = d_y.row(n), *row = rows.row(places(n, j));
          T* const d_row = d_rows.row(places(n, j));
          for (Index c = 0; c < C; ++c) d_row[c] = weights(n, j) * d_yn[c];
          d_weights(n, j) = cpu::sum_vectors<T>(C, [&](cpu::Slot<T> s) HYBRIDATTN_INLINE_LAMBDA { return s.get(d_yn) * s.get(row); });
        }
    });
  }
};

template <> struct On<AddGated, Cpu> : InFloat<AddGated, Cpu> {
  using InFloat::forward, InFloat::backward;
  template <std::floating_point T> static void forward(Cpu& cpu, View<T const, 2> x, View<T const, 2> logit, View<T, 2> y) {
    parallel_blocks(cpu, y.extent(0), cpu::sum_rows, [&](Index first, Index last) {
      for (Index n = first; n < last; ++n) axpy(sigmoid(logit(n, 0)), x.row(n), y.row(n), y.extent(1));
    });
  }
  template <std::floating_point T>
  static void backward(Cpu& cpu, View<T const, 2> x, View<T const, 2> logit, View<T const, 2> d_y, View<T, 2> d_x, View<T, 2> d_logit) {
    Index const C = d_y.extent(1);
    parallel_blocks(cpu, d_y.extent(0), cpu::sum_rows, [&](Index first, Index last) {
      for (Index n = first; n < last; ++n) {
        T const open = sigmoid(logit(n, 0)), *xn = x.row(n), *d_yn = d_y.row(n);
        for (Index c = 0; c < C; ++c) d_x(n, c) = open * d_yn[c];
        d_logit(n, 0) =
            open * (T(1) - open) * cpu::sum_vectors<T>(C, [&](cpu::Slot<T> s) HYBRIDATTN_INLINE_LAMBDA { return s.get(xn) * s.get(d_yn); });
      }
    });
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
#endif

// ==== hybridattn/nn/feed_forward.hpp
// Feed-forward layers: a dense SwiGLU, or a mixture of experts. Both are one type; the config says which layers are mixtures.
// Tensors that a layer does not need have extent 0.
#ifndef HYBRIDATTN_NN_FEED_FORWARD_HPP
#define HYBRIDATTN_NN_FEED_FORWARD_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

// down(silu(gate x) * up x), or down(silu(gate x)) without up. The product is Linear, or GroupedLinear for all experts at once.
// GroupedLinear takes the weights of all experts, and the offsets of their rows as last argument.
struct Mlp {
  template <class S> struct Params {
    Held<S, 2> gate, up;  // [F, C]
    Held<S, 2> down;      // [C, F]
    HYBRIDATTN_FIELDS(gate, up, down)
  };
  template <class S> struct Saved {
    Held<S, 2> gate, up, hidden;  // [N, F]
    HYBRIDATTN_FIELDS(gate, up, hidden)
  };
  static Params<Shapes> params(Index C, Index F, bool gated) {
    return {.gate = {F, C}, .up = {gated ? F : 0, gated ? C : 0}, .down = {C, F}};
  }
  static Params<Starts> starts(Index C, Index F, Initialization const& init) {
    return {.gate = init.linear(C), .up = init.linear(C), .down = init.linear(F)};
  }
  static Saved<Shapes> saved(Index N, Index F, bool gated) {
    return {.gate = {N, F}, .up = {gated ? N : 0, gated ? F : 0}, .hidden = {N, F}};
  }

  template <class Product = Linear, class B, class Weights, class T, class... Offsets>
  static void forward(B& backend, Weights const& p, View<T const, 2> x, Saved<Out<T>> const& saved, View<T, 2> y, Offsets... offsets) {
    On<Product, B>::forward(backend, offsets..., x, p.gate, saved.gate);
    if (!p.up.empty()) On<Product, B>::forward(backend, offsets..., x, p.up, saved.up);
    On<Swiglu, B>::forward(backend, flat(View<T const, 2>(saved.gate)), flat(View<T const, 2>(saved.up)), flat(saved.hidden));
    On<Product, B>::forward(backend, offsets..., View<T const, 2>(saved.hidden), p.down, y);
  }
  // Adds to d_x or overwrites it, as `into` says. `d` is scratch of Saved's shapes.
  template <class Product = Linear, class B, class Weights, class T, class Gradients, class... Offsets>
  static void backward(B& backend, Weights const& p, View<T const, 2> x, Saved<In<T>> const& saved, View<T const, 2> d_y,
                       Saved<Out<T>> const& d, View<T, 2> d_x, Into into, Gradients const& d_p, Offsets... offsets) {
    On<Product, B>::backward(backend, offsets..., saved.hidden, p.down, d_y, d.hidden, d_p.down, Into::overwrite);
    On<Swiglu, B>::backward(backend, flat(saved.gate), flat(saved.up), flat(View<T const, 2>(d.hidden)), flat(d.gate), flat(d.up));
    if (!p.up.empty()) {
      On<Product, B>::backward(backend, offsets..., x, p.up, View<T const, 2>(d.up), d_x, d_p.up, into);
      into = Into::add;
    }
    On<Product, B>::backward(backend, offsets..., x, p.gate, View<T const, 2>(d.gate), d_x, d_p.gate, into);
  }
};

// The load-balancing loss: a sum of one loss for each layer, or one loss over the tokens of all layers together.
enum class Balance { per_layer, pooled };

struct FeedForwardConfig {
  Index hidden_dim = 0;              // F of a dense layer; 0: 4 model_dim
  bool gated = true;                 // SwiGLU; false: silu without a second branch
  Index num_experts = 0;             // E; 0: every layer is dense
  Index top_k = 2;                   // experts of a token
  Index expert_dim = 0;              // F of an expert; 0: hidden_dim
  Index shared_dim = -1;             // F of the shared expert; -1: no shared expert; 0: only its gate
  bool renormalise = true;           // weights of the chosen sum to 1
  Index decoder_sparse_step = 1;     // layer i is a mixture when (i + 1) % decoder_sparse_step == 0 ...
  std::vector<Index> mlp_only_layers = {};  // ... and i is not among these
  double balance_coefficient = 0;    // weight of the load-balancing loss
  Balance balance = Balance::per_layer;

  bool is_mixture(Index layer) const {
    return num_experts > 0 && (layer + 1) % decoder_sparse_step == 0 &&
           std::find(mlp_only_layers.begin(), mlp_only_layers.end(), layer) == mlp_only_layers.end();
  }
  // Fills in every 0. Throws Error on sizes that do not fit.
  FeedForwardConfig completed(Index model_dim) const {
    check_numbers();
    FeedForwardConfig c = *this;
    if (c.hidden_dim == 0) c.hidden_dim = size_product(4, model_dim);
    if (c.expert_dim == 0) c.expert_dim = c.hidden_dim;
    check(c.num_experts == 0 || (0 < c.top_k && c.top_k <= c.num_experts), "feed-forward: top_k ", c.top_k, " of ", c.num_experts,
          " experts; allowed: 1 .. ", c.num_experts);
    check(c.num_experts <= largest_int32, "feed-forward: num_experts ", c.num_experts, " is not allowed; it must be at most ",
          largest_int32);
    return c;
  }

 private:
  void check_numbers() const {
    constexpr char const* where = "feed-forward";
    check_at_least(where, "hidden_dim", hidden_dim, 0, ", where 0 stands for 4 model_dim");
    check_at_least(where, "num_experts", num_experts, 0, ", where 0 stands for no mixture");
    check_at_least(where, "top_k", top_k, 0);
    check_at_least(where, "expert_dim", expert_dim, 0, ", where 0 stands for hidden_dim");
    check_at_least(where, "shared_dim", shared_dim, -1, ", where -1 stands for no shared expert");
    check_at_least(where, "decoder_sparse_step", decoder_sparse_step, 1);
    for (Index layer : mlp_only_layers) check_at_least(where, "mlp_only_layers: layer", layer, 0);
    check_not_negative(where, "balance_coefficient", balance_coefficient);
  }
};

struct FeedForward {
  template <class S> struct Experts {
    Held<S, 3> gate, up;  // [E, F, C]
    Held<S, 3> down;      // [E, C, F]
    HYBRIDATTN_FIELDS(gate, up, down)
  };
  template <class S> struct Params {
    Mlp::Params<S> dense;
    Held<S, 2> router;       // [E, C]
    Experts<S> experts;
    Mlp::Params<S> shared;
    Held<S, 2> shared_gate;  // [1, C]
    HYBRIDATTN_FIELDS(dense, router, experts, shared, shared_gate)
  };
  template <class S> struct Saved {
    Mlp::Saved<S> dense;
    Wide<S, 2> probabilities;  // [N, E]
    Wide<S, 2> weights;        // [N, k]
    Whole<S, 2> chosen;        // [N, k], highest first
    Whole<S, 1> offsets;       // [E + 1]
    Whole<S, 2> places;        // [N, k]
    Held<S, 2> rows, made;     // [N k, C]: inputs and outputs of the experts
    Mlp::Saved<S> experts;     // [N k, F]
    Mlp::Saved<S> shared;
    Held<S, 2> shared_made;    // [N, C]
    Held<S, 2> shared_logit;   // [N, 1]
    Wide<S, 1> d_probability;  // [E]: the load-balancing loss's gradient for every token's probabilities, written between the passes
    HYBRIDATTN_FIELDS(dense, probabilities, weights, chosen, offsets, places, rows, made, experts, shared, shared_made, shared_logit,
                      d_probability)
  };

  static Params<Shapes> params(FeedForwardConfig const& c, Index layer, Index C) {
    Params<Shapes> shapes{};
    if (!c.is_mixture(layer)) {
      shapes.dense = Mlp::params(C, c.hidden_dim, c.gated);
      return shapes;
    }
    Shape<3> const branch{c.num_experts, c.expert_dim, C};
    shapes.router = {c.num_experts, C};
    shapes.experts = {.gate = branch, .up = c.gated ? branch : Shape<3>{}, .down = {c.num_experts, C, c.expert_dim}};
    if (c.shared_dim >= 0) {
      shapes.shared = Mlp::params(C, c.shared_dim, c.gated);
      shapes.shared_gate = {1, C};
    }
    return shapes;
  }
  static Params<Starts> starts(FeedForwardConfig const& c, Index C, Initialization const& init) {
    auto const wide = init.linear(C);
    return {.dense = Mlp::starts(C, c.hidden_dim, init),
            .router = wide,
            .experts = {.gate = wide, .up = wide, .down = init.linear(c.expert_dim)},
            .shared = Mlp::starts(C, std::max<Index>(c.shared_dim, 1), init),
            .shared_gate = wide};
  }
  static Saved<Shapes> saved(FeedForwardConfig const& c, Index layer, Index C, Index N) {
    Saved<Shapes> shapes{};
    if (!c.is_mixture(layer)) {
      shapes.dense = Mlp::saved(N, c.hidden_dim, c.gated);
      return shapes;
    }
    Index const chosen = size_product(N, c.top_k);
    check(chosen <= largest_int32, "feed-forward: ", N, " tokens to ", c.top_k, " experts each; a batch has at most ", largest_int32,
          " choices");
    Shape<2> const choices{N, c.top_k}, rows{chosen, C};
    shapes.probabilities = {N, c.num_experts};
    shapes.weights = shapes.chosen = shapes.places = choices;
    shapes.offsets = {c.num_experts + 1};
    shapes.rows = shapes.made = rows;
    shapes.experts = Mlp::saved(chosen, c.expert_dim, c.gated);
    shapes.d_probability = {c.num_experts};
    if (c.shared_dim >= 0) {
      shapes.shared = Mlp::saved(N, c.shared_dim, c.gated);
      shapes.shared_made = {N, C};
      shapes.shared_logit = {N, 1};
    }
    return shapes;
  }

  template <class B, class T>
  static Tensor<T, 2, B> forward(B& backend, FeedForwardConfig const& c, Index layer, Params<In<T>> const& p, View<T const, 2> x,
                                 Saved<Owned<T, B>>& saved) {
    saved = allocate<T>(backend, FeedForward::saved(c, layer, x.extent(1), x.extent(0)));
    Tensor<T, 2, B> y{backend, x.shape};
    if (c.is_mixture(layer)) mix(backend, c, p, x, saved, out(y));
    else Mlp::forward(backend, p.dense, x, out(saved.dense), out(y));
    return y;
  }

  template <class B, class T>
  static Tensor<T, 2, B> backward(B& backend, FeedForwardConfig const& c, Index layer, Params<In<T>> const& p, View<T const, 2> x,
                                  Saved<Owned<T, B>> saved, View<T const, 2> d_y, Params<Out<T>> const& d_p) {
    Tensor<T, 2, B> d_x{backend, x.shape};
    if (c.is_mixture(layer)) mix_backward(backend, c, p, x, saved, d_y, out(d_x), d_p);
    else
      mlp_backward(backend, p.dense, x, saved.dense, Mlp::saved(x.extent(0), c.hidden_dim, c.gated), d_y, out(d_x), Into::overwrite,
                   d_p.dense);
    return d_x;
  }

 private:
  template <class B, class T>
  static void mix(B& backend, FeedForwardConfig const& c, Params<In<T>> const& p, View<T const, 2> x, Saved<Owned<T, B>>& saved,
                  View<T, 2> y) {
    Tensor<wide_t<T>, 2, B> logits{backend, saved.probabilities.shape()};
    On<Linear, B>::forward(backend, x, p.router, out(logits));
    On<Route, B>::forward(backend, Route::Options{c.renormalise}, in(logits), out(saved.probabilities), out(saved.weights),
                          out(saved.chosen));
    On<Permute, B>::forward(backend, in(saved.chosen), out(saved.offsets), out(saved.places));
    On<Distribute, B>::forward(backend, x, in(saved.places), out(saved.rows));
    Mlp::forward<GroupedLinear>(backend, p.experts, in(saved.rows), out(saved.experts), out(saved.made), in(saved.offsets));
    On<Combine, B>::forward(backend, in(saved.made), in(saved.weights), in(saved.places), y);
    On<Fill, B>::forward(backend, wide_t<T>(0), out(saved.d_probability));
    if (c.shared_dim < 0) return;
    Mlp::forward(backend, p.shared, x, out(saved.shared), out(saved.shared_made));
    On<Linear, B>::forward(backend, x, p.shared_gate, out(saved.shared_logit));
    On<AddGated, B>::forward(backend, in(saved.shared_made), in(saved.shared_logit), y);
  }

  template <class Product = Linear, class B, class Weights, class T, class Gradients, class... Offsets>
  static void mlp_backward(B& backend, Weights const& p, View<T const, 2> x, Mlp::Saved<Owned<T, B>> const& saved,
                           Mlp::Saved<Shapes> const& shapes, View<T const, 2> d_y, View<T, 2> d_x, Into into, Gradients const& d_p,
                           Offsets... offsets) {
    auto d = allocate<T>(backend, shapes);
    Mlp::backward<Product>(backend, p, x, in(saved), d_y, out(d), d_x, into, d_p, offsets...);
  }

  template <class B, class T>
  static void mix_backward(B& backend, FeedForwardConfig const& c, Params<In<T>> const& p, View<T const, 2> x, Saved<Owned<T, B>>& saved,
                           View<T const, 2> d_y, View<T, 2> d_x, Params<Out<T>> const& d_p) {
    Tensor<T, 2, B> d_made{backend, saved.made.shape()};
    Tensor<wide_t<T>, 2, B> d_weights{backend, saved.weights.shape()}, d_logits{backend, saved.probabilities.shape()};
    On<Combine, B>::backward(backend, in(saved.made), in(saved.weights), in(saved.places), d_y, out(d_made), out(d_weights));
    Tensor<T, 2, B> d_rows{backend, saved.rows.shape()};
    mlp_backward<GroupedLinear>(backend, p.experts, in(saved.rows), saved.experts, Mlp::saved(d_rows.shape()[0], c.expert_dim, c.gated),
                                in(d_made), out(d_rows), Into::overwrite, d_p.experts, in(saved.offsets));
    On<Distribute, B>::backward(backend, in(saved.places), in(d_rows), d_x, Into::overwrite);
    On<Route, B>::backward(backend, Route::Options{c.renormalise}, in(saved.probabilities), in(saved.weights), in(saved.chosen),
                           in(d_weights), in(saved.d_probability), out(d_logits));
    On<Linear, B>::backward(backend, x, p.router, in(d_logits), d_x, d_p.router, Into::add);
    if (c.shared_dim < 0) return;
    Tensor<T, 2, B> d_shared{backend, saved.shared_made.shape()}, d_logit{backend, saved.shared_logit.shape()};
    On<AddGated, B>::backward(backend, in(saved.shared_made), in(saved.shared_logit), d_y, out(d_shared), out(d_logit));
    mlp_backward(backend, p.shared, x, saved.shared, Mlp::saved(x.extent(0), c.shared_dim, c.gated), in(d_shared), d_x, Into::add,
                 d_p.shared);
    On<Linear, B>::backward(backend, x, p.shared_gate, in(d_logit), d_x, d_p.shared_gate, Into::add);
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/ops/balance/balance.hpp
// Load balancing over the experts of mixtures: coefficient * E sum_e f_e P_e, with f_e the share of tokens that chose expert e
// (sum f = top_k) and P_e its mean probability.
//   d loss / d p_ne = coefficient E f_e / tokens
#ifndef HYBRIDATTN_OPS_BALANCE_BALANCE_HPP
#define HYBRIDATTN_OPS_BALANCE_BALANCE_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

//   forward(backend, offsets, probabilities, sums)      offsets [E + 1], probabilities [N, E]; adds to sums [2, E], in double:
//     how many tokens chose each expert, and its probabilities' sum over the tokens. Layers that are pooled add to the same sums
struct ExpertUse {};
//   forward (backend, coefficient, tokens, sums, value)                      adds to value [1], in double
//   backward(backend, coefficient, tokens, sums, d_value, d_probability)     overwrites d_probability [E], the same for every token
// `tokens` are those of all layers that the sums are of. Without tokens both are 0.
struct BalanceLoss {};

}  // namespace hybridattn::inline HYBRIDATTN_ABI

// ==== hybridattn/ops/balance/cpu.hpp
#ifndef HYBRIDATTN_OPS_BALANCE_CPU_HPP
#define HYBRIDATTN_OPS_BALANCE_CPU_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

template <> struct On<ExpertUse, Cpu> {
  template <class T>
  static void forward(Cpu& cpu, View<std::int32_t const, 1> offsets, View<T const, 2> probabilities, View<double, 2> sums) {
    parallel_blocks(cpu, sums.extent(1), experts, [&](Index first, Index last) {
      double sum[experts] = {};
      for (Index n = 0; n < probabilities.extent(0); ++n)
        for (Index e = first; e < last; ++e) sum[e - first] += static_cast<double>(probabilities(n, e));
      for (Index e = first; e < last; ++e) {
        sums(0, e) += offsets(e + 1) - offsets(e);
        sums(1, e) += sum[e - first];
      }
    });
  }

 private:
  static constexpr Index experts = 16;   // of one task
};

template <> struct On<BalanceLoss, Cpu> {
  static void forward(Cpu&, double coefficient, Index count, View<double const, 2> sums, View<double, 1> value) {
    double const tokens = static_cast<double>(count), experts = static_cast<double>(sums.extent(1));
    double sum = 0;
    for (Index e = 0; e < sums.extent(1); ++e) sum += sums(0, e) / tokens * (sums(1, e) / tokens);
    value(0) += count == 0 ? 0 : coefficient * experts * sum;
  }
  template <class T>
  static void backward(Cpu&, double coefficient, Index count, View<double const, 2> sums, double d_value, View<T, 1> d_probability) {
    double const tokens = static_cast<double>(count), experts = static_cast<double>(sums.extent(1));
    for (Index e = 0; e < sums.extent(1); ++e)
      d_probability(e) = count == 0 ? T(0) : static_cast<T>(d_value * coefficient * experts * sums(0, e) / tokens / tokens);
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
#endif

// ==== hybridattn/nn/balance_loss.hpp
// The load-balancing loss of a model's mixture layers.
//   per layer: the sum of the layers' losses         pooled: f and P over the tokens of all layers, then one product
#ifndef HYBRIDATTN_NN_BALANCE_LOSS_HPP
#define HYBRIDATTN_NN_BALANCE_LOSS_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {
namespace detail {

// One loss over the tokens of these layers: adds it to value [1], and writes scale times its gradient into each layer's Saved.
template <class B, class T>
void balance_together(B& backend, double coefficient, double scale, std::span<FeedForward::Saved<Owned<T, B>>* const> layers,
                      View<double, 1> value) {
  Shape<2> const choices = layers[0]->probabilities.shape();
  auto sums = zeros<double>(backend, Shape<2>{2, choices[1]});
  for (auto const* layer : layers) On<ExpertUse, B>::forward(backend, in(layer->offsets), in(layer->probabilities), out(sums));
  Index const tokens = std::ssize(layers) * choices[0];
  On<BalanceLoss, B>::forward(backend, coefficient, tokens, in(sums), value);
  for (auto* layer : layers) On<BalanceLoss, B>::backward(backend, coefficient, tokens, in(sums), scale, out(layer->d_probability));
}

}  // namespace detail

// Adds the loss to value [1], on the machine. Writes scale times its gradient into the Saved of the mixture layers, given in order.
template <class B, class T>
void balance_loss(B& backend, FeedForwardConfig const& c, double scale, std::span<FeedForward::Saved<Owned<T, B>>* const> layers,
                  View<double, 1> value) {
  std::size_t const together = c.balance == Balance::pooled ? layers.size() : 1;
  for (std::size_t first = 0; first < layers.size(); first += together)
    detail::balance_together<B, T>(backend, c.balance_coefficient, scale, layers.subspan(first, together), value);
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/nn/attention.hpp
// An attention layer: x -> project -> prepare -> the policy -> finish -> w_o. Decoding is the same forward with a cache.
#ifndef HYBRIDATTN_NN_ATTENTION_HPP
#define HYBRIDATTN_NN_ATTENTION_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

// Takes the place of a policy's cache where sequences are whole.
struct NoCache {};

template <AttentionPolicy Policy> struct Attention {
  using Config = typename Policy::Config;
  using Prepare = typename Policy::Prepare;
  using Finish = typename Policy::Finish;
  static constexpr bool finishes = !std::is_same_v<Finish, NoStep>;

  template <class S> using Inputs = typename Policy::template Inputs<S>;
  template <class S> using Projections = typename ProjectionsOf<Policy>::template Group<S>;
  template <class S> struct Params {
    Projections<Matrix<S>> w;  // [H*D, C] or [H, C], one for each projection
    Held<S, 2> w_gate;    // [H*D, C], empty without an output gate
    Held<S, 2> w_o;       // [C, H*D]
    typename Prepare::template Params<S> prepare;
    typename Finish::template Params<S> finish;
    HYBRIDATTN_FIELDS(w, w_gate, w_o, prepare, finish)
  };
  template <class S> struct Saved {
    Projections<S> raw;  // the projections that Prepare changes; other projections are inputs and lie there
    Inputs<S> inputs;
    typename Policy::template Outputs<S> outputs;
    Held<S, 3> z, finished;  // [N, H, D]; z is empty without a gate, finished without a Finish
    typename Policy::template Saved<S> policy;
    Wide<S, 1> d_auxiliary_loss;  // [1], 0 or what the model writes between the passes; empty without an auxiliary loss
    HYBRIDATTN_FIELDS(raw, inputs, outputs, z, finished, policy, d_auxiliary_loss)
  };

  static Params<Shapes> params(Config const& c, Index model_dim) {
    auto const one_token = Sequences::equal(1, 1);
    Index const width = Policy::outputs(c, one_token).o.count();
    Params<Shapes> shapes{.w = {},
                          .w_gate = {Finish::gated ? width : 0, Finish::gated ? model_dim : 0},
                          .w_o = {model_dim, width},
                          .prepare = Prepare::params(c),
                          .finish = Finish::params(c)};
    zip([&](Path const&, auto const& projection, auto& w) { w = {projection.count(), model_dim}; },
        ProjectionsOf<Policy>::shapes(c, one_token), shapes.w);
    return shapes;
  }
  // The gradients' shapes. A parameter that the stage does not train has an empty shape: its gradient is not computed.
  static Params<Shapes> gradients(Config const& c, Index model_dim, Stage stage) {
    auto shapes = params(c, model_dim);
    zip(
        [&](Path const& path, auto& shape) {
          if (!trains(stage, Policy::detached(path.name))) shape = {};
        },
        shapes);
    return shapes;
  }
  static Params<Starts> starts(Config const& c, Index model_dim, Initialization const& init) {
    Index const width = Policy::outputs(c, Sequences::equal(1, 1)).o.count();
    Params<Starts> result{
        .w = {}, .w_gate = init.linear(model_dim), .w_o = init.linear(width), .prepare = Prepare::starts(c), .finish = Finish::starts(c)};
    zip([&](Path const&, Initial& start) { start = init.linear(model_dim); }, result.w);
    return result;
  }
  static Saved<Shapes> saved(Config const& c, Sequences const& s) {
    auto const outputs = Policy::outputs(c, s);
    Saved<Shapes> shapes{.raw = raw(c, s),
                         .inputs = Policy::inputs(c, s),
                         .outputs = outputs,
                         .z = {},
                         .finished = {},
                         .policy = Policy::saved(c, s),
                         .d_auxiliary_loss = {}};
    if constexpr (HasAuxiliaryLoss<Policy>) shapes.d_auxiliary_loss = outputs.auxiliary_loss;
    if constexpr (Finish::gated) shapes.z = outputs.o;
    if constexpr (finishes) shapes.finished = outputs.o;
    return shapes;
  }

  // x [N, C] -> y [N, C]. With a cache, the tokens follow those in the cache, and backward cannot be called.
  template <class B, class T, class Cache = NoCache>
  static Tensor<T, 2, B> forward(B& backend, Config const& c, SequencesOn<B> const& s, Params<In<T>> const& p, View<T const, 2> x,
                                 Saved<Owned<T, B>>& saved, Cache const& cache = {}) {
    constexpr bool decodes = !std::is_same_v<Cache, NoCache>;
    static_assert(decodes || HasForward<Policy, B, T>,
                  "this policy has no forward on this backend: write On<Policy, Backend>::forward(Backend&, Config const&, "
                  "Sequences const&, Inputs<In<T>>, Outputs<Out<T>>, Saved<Out<T>>)");
    static_assert(decodes || HasBackward<Policy, B, T>,
                  "this policy has no backward on this backend: write On<Policy, Backend>::backward(Backend&, Config const&, "
                  "Sequences const&, Inputs<In<T>>, Outputs<In<T>>, Saved<In<T>>, Outputs<In<T>> d_outputs, Inputs<Out<T>> d_inputs)");
    auto shapes = Attention::saved(c, s);
    if constexpr (decodes) shapes.policy = {};   // only backward reads these tensors
    saved = allocate<T>(backend, shapes);
    for_each_projection(
        [&](Path const&, auto const& projection, auto const& w) { On<Linear, B>::forward(backend, x, w, as_rows(projection)); },
        out(saved.raw), out(saved.inputs), p.w);
    prepare<T>(backend, c, s, in(saved.raw), p.prepare, cache, out(saved.inputs));
    if constexpr (decodes) {
      On<Policy, B>::extend(backend, c, s, in(saved.inputs), cache, out(saved.outputs));
    } else {
      if constexpr (HasAuxiliaryLoss<Policy>) On<Fill, B>::forward(backend, wide_t<T>(0), out(saved.d_auxiliary_loss));
      On<Policy, B>::forward(backend, c, s, in(saved.inputs), out(saved.outputs), out(saved.policy));
    }
    if constexpr (Finish::gated) On<Linear, B>::forward(backend, x, p.w_gate, as_rows(out(saved.z)));
    if constexpr (finishes) Finish::forward(backend, c, in(saved.outputs.o), in(saved.z), p.finish, out(saved.finished));
    Tensor<T, 2, B> y{backend, x.shape};
    On<Linear, B>::forward(backend, as_rows(in(finished(saved))), p.w_o, out(y));
    return y;
  }

  template <class B, class T>
  static Tensor<T, 2, B> backward(B& backend, Config const& c, SequencesOn<B> const& s, Params<In<T>> const& p, View<T const, 2> x,
                                  Saved<Owned<T, B>> saved, View<T const, 2> d_y, Params<Out<T>> const& d_p) {
    Tensor<T, 2, B> d_x{backend, x.shape};
    Tensor<T, 3, B> d_o{backend, saved.outputs.o.shape()};
    On<Linear, B>::backward(backend, as_rows(in(finished(saved))), p.w_o, d_y, as_rows(out(d_o)), d_p.w_o, Into::overwrite);
    if constexpr (finishes) {
      auto const d_finished = std::move(d_o);
      Tensor<T, 3, B> d_z{backend, saved.z.shape()};
      d_o = {backend, saved.outputs.o.shape()};
      Finish::backward(backend, c, in(saved.outputs.o), in(saved.z), p.finish, in(d_finished), out(d_o), out(d_z), d_p.finish);
      if constexpr (Finish::gated) On<Linear, B>::backward(backend, x, p.w_gate, as_rows(in(d_z)), out(d_x), d_p.w_gate, Into::overwrite);
    }
    project_backward<B, T>(backend, c, s, p, x, saved, &d_o, out(d_x), Finish::gated ? Into::add : Into::overwrite, d_p);
    return d_x;
  }
  // Backward of the auxiliary loss alone, for the parameters that it trains. x gets no gradient.
  template <class B, class T>
  static void auxiliary_backward(B& backend, Config const& c, SequencesOn<B> const& s, Params<In<T>> const& p, View<T const, 2> x,
                                 Saved<Owned<T, B>> saved, Params<Out<T>> const& d_p) {
    if constexpr (HasAuxiliaryLoss<Policy>) project_backward<B, T>(backend, c, s, p, x, saved, nullptr, View<T, 2>{}, Into::add, d_p);
  }

 private:
  static Projections<Shapes> raw(Config const& c, Sequences const& s) {
    auto shapes = ProjectionsOf<Policy>::shapes(c, s);
    if constexpr (!NamesProjections<Policy>)
      zip(
          [](Path const& path, auto& projection) {
            if (!Prepare::makes(path.name)) projection = {};
          },
          shapes);
    return shapes;
  }
  // Calls f(path, projection, ...) for each projection or its gradient, with its leaves in other groups. A projection that Prepare does
  // not change lies in the place of its input.
  template <class F, class Raw, class Places, class... Groups>
  static void for_each_projection(F f, Raw const& raw, Places const& inputs, Groups const&... groups) {
    if constexpr (NamesProjections<Policy>) {
      zip(f, raw, groups...);
    } else {
      zip(
          [&](Path const& path, auto const& projection, auto const& input, auto const&... leaves) {
            if (Prepare::makes(path.name)) f(path, projection, leaves...);
            else f(path, input, leaves...);
          },
          raw, inputs, groups...);
    }
  }
  template <class T, class B, class Cache>
  static void prepare(B& backend, Config const& c, SequencesOn<B> const& s, Projections<In<T>> const& raw,
                      typename Prepare::template Params<In<T>> const& p, [[maybe_unused]] Cache const& cache,
                      Inputs<Out<T>> const& inputs) {
    if constexpr (!std::is_same_v<Cache, NoCache> && requires { Prepare::extend(backend, c, s, raw, p, cache, inputs); }) {
      Prepare::extend(backend, c, s, raw, p, cache, inputs);
    } else {
      static_assert(std::is_same_v<Cache, NoCache> || !NamesExtend<Prepare>,
                    "Prepare::extend takes the arguments of Prepare::forward, with Cache<Out<T>> before the inputs");
      if constexpr (!std::is_same_v<Prepare, NoStep>) Prepare::forward(backend, c, s, raw, p, inputs);
    }
  }
  // Backward of the policy, Prepare and the projections. Without d_o it computes the gradients of the auxiliary loss only. A detached
  // projection has a gradient where the stage trains the projection's matrix.
  template <class B, class T>
  static void project_backward(B& backend, Config const& c, SequencesOn<B> const& s, Params<In<T>> const& p, View<T const, 2> x,
                               Saved<Owned<T, B>> const& saved, Tensor<T, 3, B> const* d_o, View<T, 2> d_x, Into into,
                               Params<Out<T>> const& d_p) {
    bool trains_detached = false;
    if constexpr (HasAuxiliaryLoss<Policy>) {
      auto const find = [&](Path const& path, auto const& d_w) { trains_detached |= Policy::detached(path.name) && !d_w.empty(); };
      zip(find, d_p.w);
      zip(find, d_p.prepare);
    }
    auto const has_gradient = [&](Path const& path) { return Policy::detached(path.name) ? trains_detached : d_o != nullptr; };
    auto const allocate_gradients = [&](Path const& path, auto const& tensor, auto& gradient) {
      if (has_gradient(path)) gradient = {backend, tensor.shape()};
    };
    Inputs<Owned<T, B>> d_inputs;
    Projections<Owned<T, B>> d_raw;
    zip(allocate_gradients, saved.raw, d_raw);
    zip(allocate_gradients, saved.inputs, d_inputs);
    typename Policy::template Outputs<In<T>> d_outputs{};
    if (d_o != nullptr) d_outputs.o = in(*d_o);
    if constexpr (HasAuxiliaryLoss<Policy>) d_outputs.auxiliary_loss = in(saved.d_auxiliary_loss);
    On<Policy, B>::backward(backend, c, s, in(saved.inputs), in(saved.outputs), in(saved.policy), d_outputs, out(d_inputs));
    if constexpr (!std::is_same_v<Prepare, NoStep>)
      Prepare::backward(backend, c, s, in(saved.raw), p.prepare, in(saved.inputs), in(d_inputs), out(d_raw), d_p.prepare);
    for_each_projection(
        [&](Path const& path, auto const& d_projection, auto const& w, auto const& d_w) {
          if (!has_gradient(path)) return;
          bool const detached = Policy::detached(path.name);
          On<Linear, B>::backward(backend, x, w, as_rows(d_projection), detached ? View<T, 2>{} : d_x, d_w, into);
          if (!detached) into = Into::add;
        },
        in(d_raw), in(d_inputs), p.w, d_p.w);
    if (into == Into::overwrite && !d_x.empty()) On<Fill, B>::forward(backend, T(0), flat(d_x));   // every projection is detached
  }
  static auto const& finished(auto const& saved) {
    if constexpr (finishes) return saved.finished;
    else return saved.outputs.o;
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/nn/block.hpp
// A block: two residual branches, each with a norm.
//   before:  h = x + Attention(norm(x))   y = h + FeedForward(norm(h))
//   after:   h = x + norm(Attention(x))   y = h + norm(FeedForward(h))
#ifndef HYBRIDATTN_NN_BLOCK_HPP
#define HYBRIDATTN_NN_BLOCK_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

// The config that all blocks of a model share.
struct BlockConfig {
  Index model_dim = 128;   // C
  RmsNorm::Options norm;
  FeedForwardConfig feed_forward;
  Initialization initialization;
  Stage stage = Stage::language_model;

  // Fills in every 0. Throws Error on numbers that are not allowed.
  BlockConfig completed() const {
    check_at_least("model", "model_dim", model_dim, 1);
    check_positive("model", "norm.eps", norm.eps);
    initialization.check_numbers();
    BlockConfig c = *this;
    c.feed_forward = feed_forward.completed(model_dim);
    return c;
  }
};

// The place of a residual branch's norm: before or after the branch's attention or feed-forward layer.
enum class NormPlacement { before, after };

// The config of one policy's layers.
template <AttentionPolicy P> struct LayerConfig {
  typename P::Config policy = {};
  NormPlacement norm_placement = NormPlacement::before;
};

template <AttentionPolicy P> struct Block {
  using Policy = P;
  using Layer = Attention<P>;
  using Config = LayerConfig<P>;

  template <class S> struct Params {
    Wide<S, 1> attention_norm;  // [C]
    typename Layer::template Params<S> attention;
    Wide<S, 1> feed_forward_norm;  // [C]
    FeedForward::Params<S> feed_forward;
    HYBRIDATTN_FIELDS(attention_norm, attention, feed_forward_norm, feed_forward)
  };
  // [N, C] each: inputs of the norms, and outputs of norms that the next layer reads.
  template <class S> struct Saved {
    Held<S, 2> x, x_normed;  // x_normed is empty where norms come after
    typename Layer::template Saved<S> attention;
    Held<S, 2> attended, h, h_normed;  // attended is empty where norms come before, h_normed where they come after
    FeedForward::Saved<S> feed_forward;
    Held<S, 2> fed;  // empty where norms come before
    HYBRIDATTN_FIELDS(x, x_normed, attention, attended, h, h_normed, feed_forward, fed)
  };

  static Params<Shapes> params(BlockConfig const& c, Config const& own, Index layer) {
    return {.attention_norm = {c.model_dim},
            .attention = Layer::params(own.policy, c.model_dim),
            .feed_forward_norm = {c.model_dim},
            .feed_forward = FeedForward::params(c.feed_forward, layer, c.model_dim)};
  }
  static Params<Shapes> gradients(BlockConfig const& c, Config const& own, Index layer) {
    auto shapes = c.stage == Stage::dense_warm_up ? Params<Shapes>{} : params(c, own, layer);
    shapes.attention = Layer::gradients(own.policy, c.model_dim, c.stage);
    return shapes;
  }
  static Params<Starts> starts(BlockConfig const& c, Config const& own) {
    auto const neutral = Initial::constant(c.norm.weight == NormWeight::plain ? 1 : 0);
    return {.attention_norm = neutral,
            .attention = Layer::starts(own.policy, c.model_dim, c.initialization),
            .feed_forward_norm = neutral,
            .feed_forward = FeedForward::starts(c.feed_forward, c.model_dim, c.initialization)};
  }
  static Saved<Shapes> saved(BlockConfig const& c, Config const& own, Index layer, Sequences const& s) {
    bool const before = own.norm_placement == NormPlacement::before;
    Shape<2> const x{s.tokens(), c.model_dim}, normed = before ? x : Shape<2>{}, made = before ? Shape<2>{} : x;
    return {.x = x,
            .x_normed = normed,
            .attention = Layer::saved(own.policy, s),
            .attended = made,
            .h = x,
            .h_normed = normed,
            .feed_forward = FeedForward::saved(c.feed_forward, layer, c.model_dim, s.tokens()),
            .fed = made};
  }

  // x [N, C] -> y [N, C]. x is moved into saved. With a cache, see Attention::forward.
  template <class B, class T, class Cache = NoCache>
  static Tensor<T, 2, B> forward(B& backend, BlockConfig const& c, Config const& own, Index layer, SequencesOn<B> const& s,
                                 Params<In<T>> const& p, Tensor<T, 2, B> x, Saved<Owned<T, B>>& saved, Cache const& cache = {}) {
    bool const before = own.norm_placement == NormPlacement::before;
    saved.x = std::move(x);
    if (before) saved.x_normed = normed(backend, c, saved.x, p.attention_norm);
    saved.h = Layer::forward(backend, own.policy, s, p.attention, in(before ? saved.x_normed : saved.x), saved.attention, cache);
    if (!before) {
      saved.attended = std::move(saved.h);
      saved.h = normed(backend, c, saved.attended, p.attention_norm);
    }
    On<Add, B>::forward(backend, flat(in(saved.x)), flat(out(saved.h)));
    if constexpr (!std::is_same_v<Cache, NoCache>)   // frees memory: long prompts need it below
      saved.x_normed = {}, saved.attention = {}, saved.attended = {};

    if (before) saved.h_normed = normed(backend, c, saved.h, p.feed_forward_norm);
    auto y =
        FeedForward::forward(backend, c.feed_forward, layer, p.feed_forward, in(before ? saved.h_normed : saved.h), saved.feed_forward);
    if (!before) {
      saved.fed = std::move(y);
      y = normed(backend, c, saved.fed, p.feed_forward_norm);
    }
    On<Add, B>::forward(backend, flat(in(saved.h)), flat(out(y)));
    return y;
  }

  // Returns d_x [N, C], in the memory of d_y: each residual branch adds its gradient.
  template <class B, class T>
  static Tensor<T, 2, B> backward(B& backend, BlockConfig const& c, Config const& own, Index layer, SequencesOn<B> const& s,
                                  Params<In<T>> const& p, Saved<Owned<T, B>> saved, Tensor<T, 2, B> d_y, Params<Out<T>> const& d_p) {
    bool const before = own.norm_placement == NormPlacement::before;
    auto const feed_forward = [&](View<T const, 2> d_fed) {
      return FeedForward::backward(backend, c.feed_forward, layer, p.feed_forward, in(before ? saved.h_normed : saved.h),
                                   std::move(saved.feed_forward), d_fed, d_p.feed_forward);
    };
    auto const attention = [&](View<T const, 2> d_attended) {
      return Layer::backward(backend, own.policy, s, p.attention, in(before ? saved.x_normed : saved.x), std::move(saved.attention),
                             d_attended, d_p.attention);
    };
    if (before) {
      On<RmsNorm, B>::backward(backend, c.norm, in(saved.h), p.feed_forward_norm, in(feed_forward(in(d_y))), out(d_y),
                               d_p.feed_forward_norm, Into::add);
      On<RmsNorm, B>::backward(backend, c.norm, in(saved.x), p.attention_norm, in(attention(in(d_y))), out(d_y), d_p.attention_norm,
                               Into::add);
      return d_y;
    }
    Tensor<T, 2, B> d_made{backend, d_y.shape()};
    On<RmsNorm, B>::backward(backend, c.norm, in(saved.fed), p.feed_forward_norm, in(d_y), out(d_made), d_p.feed_forward_norm,
                             Into::overwrite);
    On<Add, B>::forward(backend, flat(in(feed_forward(in(d_made)))), flat(out(d_y)));
    On<RmsNorm, B>::backward(backend, c.norm, in(saved.attended), p.attention_norm, in(d_y), out(d_made), d_p.attention_norm,
                             Into::overwrite);
    On<Add, B>::forward(backend, flat(in(attention(in(d_made)))), flat(out(d_y)));
    return d_y;
  }
  // Backward of the policy's auxiliary loss alone.
  template <class B, class T>
  static void auxiliary_backward(B& backend, Config const& own, SequencesOn<B> const& s, Params<In<T>> const& p, Saved<Owned<T, B>> saved,
                                 Params<Out<T>> const& d_p) {
    bool const before = own.norm_placement == NormPlacement::before;
    Layer::auxiliary_backward(backend, own.policy, s, p.attention, in(before ? saved.x_normed : saved.x), std::move(saved.attention),
                              d_p.attention);
  }

 private:
  template <class B, class T>
  static Tensor<T, 2, B> normed(B& backend, BlockConfig const& c, Tensor<T, 2, B> const& x, Wide<In<T>, 1> w) {
    Tensor<T, 2, B> y{backend, x.shape()};
    On<RmsNorm, B>::forward(backend, c.norm, in(x), w, out(y));
    return y;
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/nn/layers.hpp
// A list of layers of any depth, for which the compiler instantiates each type of layer once. The only header with Boost.Hana.
#ifndef HYBRIDATTN_NN_LAYERS_HPP
#define HYBRIDATTN_NN_LAYERS_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {
namespace hana = boost::hana;

template <class... Ts> struct Types {};

// Types<A, B> + type_c<A> = Types<A, B>;  Types<A, B> + type_c<C> = Types<A, B, C>
template <class... Ts, class T> constexpr auto operator+(Types<Ts...>, hana::basic_type<T>) {
  if constexpr ((std::is_same_v<Ts, T> || ...)) return Types<Ts...>{};
  else return Types<Ts..., T>{};
}
// Each type once, in order of first appearance.
template <class... Ts> using Distinct = decltype((Types<>{} + ... + hana::type_c<Ts>));

namespace detail {
template <class T, class... Ts> constexpr std::size_t position(Types<Ts...>) {
  std::size_t n = 0;
  (void)((std::is_same_v<Ts, T> || (++n, false)) || ...);
  return n;
}
}  // namespace detail

// The places of a list's layers: layer i is element places[i].index of the array of its type, number places[i].type.
template <class... Layers_> struct Plan {
  struct Place {
    std::size_t type, index;
  };
  static constexpr std::size_t depth = sizeof...(Layers_);
  using Kinds = Distinct<Layers_...>;

  static constexpr std::array<Place, depth> places = [] {
    std::array<Place, depth> result{};
    std::size_t layer = 0, used[depth] = {};
    auto const place = [&](std::size_t type) { result[layer++] = {type, used[type]++}; };
    (place(detail::position<Layers_>(Kinds{})), ...);
    return result;
  }();
  static constexpr std::size_t count(std::size_t type) {
    std::size_t n = 0;
    for (Place place : places) n += place.type == type;
    return n;
  }
};

// One element Of<Layer> per layer. Equal layers share an array; visiting a layer is one comparison per distinct type.
template <class Plan, template <class> class Of, class Kinds = typename Plan::Kinds> struct Layers;
template <class Plan, template <class> class Of, class... Kinds> struct Layers<Plan, Of, Types<Kinds...>> {
  static constexpr std::size_t depth = Plan::depth;

  template <class Numbers> struct Storage;
  template <std::size_t... types> struct Storage<std::index_sequence<types...>> {
    using type = hana::tuple<std::array<Of<Kinds>, Plan::count(types)>...>;
  };
  typename Storage<std::make_index_sequence<sizeof...(Kinds)>>::type arrays;

  // Calls f(type_c<Layer>, layer's number, its elements in several lists of this plan...) for layer i.
  template <class F, class... Lists> static void visit(std::size_t i, F&& f, Lists&... lists) { (visit_if<Kinds>(i, f, lists...), ...); }
  template <class F, class... Lists> static void for_each(F&& f, Lists&... lists) {
    for (std::size_t i = 0; i < depth; ++i) visit(i, f, lists...);
  }
  template <class F, class... Lists> static void for_each_reversed(F&& f, Lists&... lists) {
    for (std::size_t i = depth; i-- > 0;) visit(i, f, lists...);
  }
  // For loops over fields: f(layer's number, elements...).
  template <class F, class... Lists> static void for_each_layer(F&& f, Lists&... lists) {
    for_each([&](auto, std::size_t i, auto&... elements) { f(static_cast<int>(i), elements...); }, lists...);
  }

 private:
  template <class Kind, class F, class... Lists> static void visit_if(std::size_t i, F& f, Lists&... lists) {
    constexpr auto type = detail::position<Kind>(Types<Kinds...>{});
    auto const place = Plan::places[i];
    if (place.type == type) f(hana::type_c<Kind>, i, hana::at_c<type>(lists.arrays)[place.index]...);
  }
};

// One value for each of several types, found by type.
template <class Key, class Value> struct Keyed {
  Value value{};
};
template <template <class> class Of, class Kinds> struct ByType;
template <template <class> class Of, class... Kinds> struct ByType<Of, Types<Kinds...>> : Keyed<Kinds, Of<Kinds>>... {
  template <class Key> auto& get() { return of<Key>(*this); }
  template <class Key> auto const& get() const { return of<Key>(*this); }

 private:
  template <class Key, class Self> static auto& of(Self& self) {
    static_assert((std::is_same_v<Key, Kinds> || ...),
                  "the stack has no layer of this policy: ask for one of its policies, with exactly the same options");
    using Found = Keyed<Key, Of<Key>>;
    return static_cast<std::conditional_t<std::is_const_v<Self>, Found const, Found>&>(self).value;
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/nn/stack.hpp
// A Stack is a list of policies. Its parameters, saved tensors and gradients are lists with one element for each layer.
#ifndef HYBRIDATTN_NN_STACK_HPP
#define HYBRIDATTN_NN_STACK_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

template <AttentionPolicy... Policies> struct Stack {
  static_assert(sizeof...(Policies) > 0, "a Stack has at least one layer: Stack<GDN, Full>");
  using Blocks = Plan<Block<Policies>...>;
  static constexpr std::size_t depth = sizeof...(Policies);

  template <class S> struct OfRole {
    template <class Block> using Params = typename Block::template Params<S>;
    template <class Block> using Saved = typename Block::template Saved<S>;
  };
  template <class S> struct Params : Layers<Blocks, OfRole<S>::template Params> {};
  template <class S> struct Saved : Layers<Blocks, OfRole<S>::template Saved> {};

  // Each policy once.
  using Kinds = Distinct<Policies...>;
  // The config of each policy's layers, found by type: layers.get<GDN>().policy.
  using LayerConfigs = ByType<LayerConfig, Kinds>;
  struct Config {
    BlockConfig block;
    LayerConfigs layers;
  };
  // Fills in every 0 from the model's width and heads. Throws Error on sizes that do not fit.
  static Config completed(Config c, Index num_heads) {
    c.block = c.block.completed();
    complete(Kinds{}, c, num_heads);
    return at(c, c.block.stage);
  }

  // The config in another stage of training.
  static Config at(Config c, Stage stage) {
    c.block.stage = stage;
    set_stage(Kinds{}, c, stage);
    return c;
  }

  static Params<Shapes> params(Config const& c) {
    return filled<Params<Shapes>>(
        c, [&](auto block, auto const& own, Index layer) { return decltype(block)::type::params(c.block, own, layer); });
  }
  static Params<Shapes> gradients(Config const& c) {
    return filled<Params<Shapes>>(
        c, [&](auto block, auto const& own, Index layer) { return decltype(block)::type::gradients(c.block, own, layer); });
  }
  static Params<Starts> starts(Config const& c) {
    return filled<Params<Starts>>(c, [&](auto block, auto const& own, Index) { return decltype(block)::type::starts(c.block, own); });
  }
  static Saved<Shapes> saved(Config const& c, Sequences const& s) {
    return filled<Saved<Shapes>>(
        c, [&](auto block, auto const& own, Index layer) { return decltype(block)::type::saved(c.block, own, layer, s); });
  }

  template <class B, class T>
  static Tensor<T, 2, B> forward(B& backend, Config const& c, SequencesOn<B> const& s, Params<In<T>> const& params, Tensor<T, 2, B> x,
                                 Saved<Owned<T, B>>& saved) {
    params.for_each(
        [&](auto block, std::size_t layer, auto& p, auto& kept) {
          using Block = typename decltype(block)::type;
          x = Block::forward(backend, c.block, layer_config<Block>(c), static_cast<Index>(layer), s, p, std::move(x), kept);
        },
        params, saved);
    return x;
  }
  // Forward of tokens that follow those in the caches, one cache for each layer. Saves no tensors for backward.
  template <class B, class T, class Caches>
  static Tensor<T, 2, B> extend(B& backend, Config const& c, SequencesOn<B> const& s, Params<In<T>> const& params, Tensor<T, 2, B> x,
                                Caches const& caches) {
    params.for_each(
        [&](auto block, std::size_t layer, auto& p, auto& cache) {
          using Block = typename decltype(block)::type;
          typename Block::template Saved<Owned<T, B>> kept;
          x = Block::forward(backend, c.block, layer_config<Block>(c), static_cast<Index>(layer), s, p, std::move(x), kept, cache);
        },
        params, caches);
    return x;
  }
  template <class B, class T>
  static Tensor<T, 2, B> backward(B& backend, Config const& c, SequencesOn<B> const& s, Params<In<T>> const& params,
                                  Saved<Owned<T, B>> saved, Tensor<T, 2, B> d_y, Params<Out<T>> const& d_params) {
    params.for_each_reversed(
        [&](auto block, std::size_t layer, auto& p, auto& kept, auto& d_p) {
          using Block = typename decltype(block)::type;
          d_y = Block::backward(backend, c.block, layer_config<Block>(c), static_cast<Index>(layer), s, p, std::move(kept), std::move(d_y),
                                d_p);
        },
        params, saved, d_params);
    return d_y;
  }

  // Backward of the policies' auxiliary losses alone. No gradient passes from one layer to another.
  template <class B, class T>
  static void auxiliary_backward(B& backend, Config const& c, SequencesOn<B> const& s, Params<In<T>> const& params,
                                 Saved<Owned<T, B>> saved, Params<Out<T>> const& d_params) {
    params.for_each(
        [&](auto block, std::size_t, auto& p, auto& kept, auto& d_p) {
          using Block = typename decltype(block)::type;
          Block::auxiliary_backward(backend, layer_config<Block>(c), s, p, std::move(kept), d_p);
        },
        params, saved, d_params);
  }

  template <class Block> static auto const& layer_config(Config const& c) { return c.layers.template get<typename Block::Policy>(); }

 private:
  template <class... Ps> static void complete(Types<Ps...>, Config& c, Index num_heads) {
    auto const complete_one = [&]<class P>(LayerConfig<P>& own) {
      own.policy = P::complete(own.policy, c.block.model_dim, num_heads);
      check_stage(P::name, own.policy, c.block.stage);
    };
    (complete_one(c.layers.template get<Ps>()), ...);
  }
  // All layers must have the model's stage. Otherwise a policy would not compute the loss that the stage trains it by.
  static void check_stage(std::string_view policy, auto const& config, Stage stage) {
    if constexpr (requires { config.stage; })
      check(config.stage == Stage::language_model || config.stage == stage, policy, ": the stage in its config is ", name_of(config.stage),
            ", the stage of the model is ", name_of(stage), "; keep the default in the ",
            "config, and set the stage of a step by StepOptions::stage");
  }
  template <class... Ps> static void set_stage(Types<Ps...>, Config& c, Stage stage) {
    auto const set = [&](auto& policy) {
      if constexpr (requires { policy.stage; }) policy.stage = stage;
    };
    (set(c.layers.template get<Ps>().policy), ...);
  }
  // A list whose elements are f(block, config of the block's policy, layer's number).
  template <class List, class F> static List filled(Config const& c, F f) {
    List list;
    list.for_each([&](auto block, std::size_t layer,
                      auto& element) { element = f(block, layer_config<typename decltype(block)::type>(c), static_cast<Index>(layer)); },
                  list);
    return list;
  }
};

namespace detail {
template <class... Ps> struct PolicyList {
  template <int times> static constexpr std::size_t depth() {
    static_assert(times > 0, "Repeat: the number of repetitions must be at least 1: Repeat<3, GDN, Full>");
    return times > 0 ? static_cast<std::size_t>(times) * sizeof...(Ps) : 0;
  }
  template <std::size_t i> using At = std::tuple_element_t<i, std::tuple<Ps...>>;
  template <class Indices> struct Repeated;
  template <std::size_t... i> struct Repeated<std::index_sequence<i...>> {
    using type = Stack<At<i % sizeof...(Ps)>...>;
  };
};
}  // namespace detail

// Repeat<3, GDN, GDN, GDN, Full> has 12 layers.
template <int times, AttentionPolicy... Policies>
using Repeat = typename detail::PolicyList<Policies...>::template Repeated<
    std::make_index_sequence<detail::PolicyList<Policies...>::template depth<times>()>>::type;

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/nn/token_batch.hpp
// The input of a model: tokens in sequences, on a machine.
#ifndef HYBRIDATTN_NN_TOKEN_BATCH_HPP
#define HYBRIDATTN_NN_TOKEN_BATCH_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

// The smallest and the largest of a list of tokens or targets, and the first place of each. The host computes them before the
// upload, so a model checks its vocabulary without a download.
struct TokenRange {
  std::int32_t smallest = 0, largest = -1;
  Index place_of_smallest = 0, place_of_largest = 0;

  static TokenRange of(std::span<std::int32_t const> tokens) {
    if (tokens.empty()) return {};
    auto const smallest = std::ranges::min_element(tokens), largest = std::ranges::max_element(tokens);
    return {*smallest, *largest, smallest - tokens.begin(), largest - tokens.begin()};
  }
  void check_tokens(Index vocab_size) const {
    if (smallest < 0) refuse("token", smallest, place_of_smallest, vocab_size, "");
    if (largest >= vocab_size) refuse("token", largest, place_of_largest, vocab_size, "");
  }
  void check_targets(Index vocab_size) const {
    if (largest >= vocab_size) refuse("target", largest, place_of_largest, vocab_size, ", or < 0 for none");
  }

 private:
  [[gnu::cold, noreturn]] static void refuse(char const* what, std::int32_t number, Index place, Index vocab_size, char const* besides) {
    fail(what, " ", number, " at place ", place, " is not in the vocabulary; allowed: 0 .. ", vocab_size - 1, besides);
  }
};

// N tokens, and for each token its target: the token to predict, or a number below 0 for no target. make_batch makes a batch,
// refill fills it anew. The other members are computed on the host before the upload.
template <class B> struct TokenBatch {
  SequencesOn<B> sequences;
  Tensor<std::int32_t, 1, B> tokens, targets;  // [N]
  TokenRange token_range = {}, target_range = {};
  Index counted = 0;                           // tokens that have a target: their losses are scaled by 1 / counted for a mean
};

// Uploads other tokens [N] and targets [N] into the memory of a batch. Throws Error unless there are N > 0 of both.
template <class B>
void refill(B& backend, TokenBatch<B>& batch, std::span<std::int32_t const> tokens, std::span<std::int32_t const> targets) {
  check(std::ssize(tokens) == batch.sequences.tokens() && tokens.size() == targets.size(), "batch: ", tokens.size(), " tokens and ",
        targets.size(), " targets for sequences of ", batch.sequences.tokens(), " tokens");
  check(!tokens.empty(), "batch: it has no tokens; a batch holds at least 1");
  batch.token_range = TokenRange::of(tokens);
  batch.target_range = TokenRange::of(targets);
  batch.counted = std::ranges::count_if(targets, [](std::int32_t target) { return target >= 0; });
  upload(backend, tokens, batch.tokens);
  upload(backend, targets, batch.targets);
}
// Uploads a batch. targets[n] is the token that token n predicts, or a number below 0 for no target. Throws Error as refill does.
template <class B>
TokenBatch<B> make_batch(B& backend, Sequences sequences, std::span<std::int32_t const> tokens, std::span<std::int32_t const> targets) {
  Shape<1> const shape{sequences.tokens()};
  TokenBatch<B> batch{.sequences = {backend, std::move(sequences)}, .tokens = {backend, shape}, .targets = {backend, shape}};
  refill(backend, batch, tokens, targets);
  return batch;
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/core/losses.hpp
// Losses of tokens, as sums.
#ifndef HYBRIDATTN_CORE_LOSSES_HPP
#define HYBRIDATTN_CORE_LOSSES_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

// Sums over the counted tokens of one or several batches. A token with a target is counted.
struct LossSum {
  double loss = 0;     // nats
  Index count = 0, correct = 0;   // correct: the target has the largest logit (the first of equal ones)

  double mean() const { return count == 0 ? 0 : loss / static_cast<double>(count); }
  HYBRIDATTN_HD LossSum& operator+=(LossSum const& other) {
    loss += other.loss;
    count += other.count;
    correct += other.correct;
    return *this;
  }
};

// All losses of a batch. The auxiliary losses are weighted.
struct BatchLosses {
  LossSum loss;         // over the counted tokens
  double balance = 0;   // load balancing
  double policy = 0;    // of the policies

  HYBRIDATTN_HD double auxiliary() const { return policy + balance; }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/ops/cross_entropy/cross_entropy.hpp
// The language-model head fused with its loss, so that the logits [N, V] are never all in memory:
//   logits = x w^T      loss = sum over counted tokens of log sum_v exp(logits_v) - logits_target
//   d_logits = scale (softmax(logits) - one_hot(target))      d_x = d_logits w      d_w = d_logits^T x
// A target below 0 is not counted; the others are in 0 .. V - 1. With nothing to count, loss and gradients are 0.
#ifndef HYBRIDATTN_OPS_CROSS_ENTROPY_CROSS_ENTROPY_HPP
#define HYBRIDATTN_OPS_CROSS_ENTROPY_CROSS_ENTROPY_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

//   forward (backend, x, w, targets, loss)                    x [N, C], w [V, C], targets [N]; adds to loss [1] of LossSum
//   backward(backend, x, w, targets, scale, d_x, d_w, loss)   scale [1]; overwrites d_x and d_w, adds to loss
// Backward also computes the loss, so a training step calls backward alone. The scale may be 0. It is in the machine's memory, so that
// a recorded step can be replayed for a batch with another number of targets.
struct CrossEntropy {
  static constexpr Index block_rows = 128;   // tokens whose logits are in memory at the same time
};
//   forward(backend, logits, targets, scale, d_logits, loss): the part behind the logits; d_logits may be logits. Without gradients
//   scale and d_logits are empty.
struct SoftmaxLoss {};
//   forward(backend, targets, count, scale)   adds the number of counted tokens to count [1]; scale [1] = 1 / count, or 0
struct CountTargets {};

}  // namespace hybridattn::inline HYBRIDATTN_ABI

// ==== hybridattn/ops/cross_entropy/cpu.hpp
#ifndef HYBRIDATTN_OPS_CROSS_ENTROPY_CPU_HPP
#define HYBRIDATTN_OPS_CROSS_ENTROPY_CPU_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

template <> struct On<CountTargets, Cpu> {
  static void forward(Cpu&, View<std::int32_t const, 1> targets, View<Index, 1> count, View<double, 1> scale) {
    count(0) += std::count_if(targets.data, targets.data + targets.count(), [](std::int32_t target) { return target >= 0; });
    scale(0) = count(0) == 0 ? 0 : 1 / static_cast<double>(count(0));
  }
};

template <> struct On<SoftmaxLoss, Cpu> : InFloat<SoftmaxLoss, Cpu> {
  using InFloat::forward;
  template <std::floating_point T>
  static void forward(Cpu& cpu, View<T const, 2> logits, View<std::int32_t const, 1> targets, View<double const, 1> scale,
                      View<T, 2> d_logits, View<LossSum, 1> loss) {
    Index const N = logits.extent(0);
    T const factor = d_logits.empty() ? T(0) : static_cast<T>(scale(0));
    Tensor<double, 1, Cpu> losses_storage{cpu, {N}};
    Tensor<std::int32_t, 1, Cpu> hits_storage{cpu, {N}};
    auto const losses = out(losses_storage);
    auto const hits = out(hits_storage);
    parallel_blocks(cpu, N, 8, [&](Index first, Index last) {
      for (Index n = first; n < last; ++n) {
        Row const row = one_row(logits.row(n), logits.extent(1), targets(n), factor, d_logits.empty() ? nullptr : d_logits.row(n));
        losses(n) = row.loss;
        hits(n) = row.correct;
      }
    });
    LossSum total;
    for (Index n = 0; n < N; ++n) total += {losses(n), targets(n) >= 0, hits(n)};
    loss(0) += total;
  }

 private:
  struct Row {
    double loss;
    bool correct;
  };
  template <class T> static Row one_row(T const* logits, Index V, std::int32_t target, T scale, T* d_logits) {
    check_target(target, V);
    if (target < 0) {
      if (d_logits != nullptr) std::fill_n(d_logits, V, T(0));
      return {0, false};
    }
    T const own = logits[target], peak = largest(logits, V);
    bool const correct = own == peak && std::find(logits, logits + target, peak) == logits + target;  // of equal logits the first counts
    cpu::Vec<T> sums{};
    cpu::for_each_vector<T>(0, V, [&](cpu::Slot<T> s) HYBRIDATTN_INLINE_LAMBDA {
      cpu::Vec<T> const e = of_row(s, cpu::exp<T>(s.get(logits) - peak), T(0));
      sums += e;
      if (d_logits != nullptr) s.put(d_logits, e);
    });
    T const sum = cpu::sum<T>(sums);
    if (d_logits != nullptr) {
      for (Index v = 0; v < V; ++v) d_logits[v] *= scale / sum;
      d_logits[target] -= scale;
    }
    return {static_cast<double>(peak) + std::log(static_cast<double>(sum)) - static_cast<double>(own), correct};
  }
  // x, with `rest` in the lanes after the end of a row.
  template <class T> HYBRIDATTN_INLINE static cpu::Vec<T> of_row(cpu::Slot<T> s, cpu::Vec<T> x, T rest) {
    if (s.count == cpu::lanes<T>) return x;
    return cpu::select<T>(cpu::lane_numbers<T>() < static_cast<typename cpu::BitsOf<T>::type>(s.count), x, cpu::broadcast(rest));
  }
  // The largest number of a row, NaN left out.
  template <class T> static T largest(T const* row, Index V) {
    T const least = -std::numeric_limits<T>::infinity();
    cpu::Vec<T> most = cpu::broadcast(least);
    cpu::for_each_vector<T>(0, V, [&](cpu::Slot<T> s) HYBRIDATTN_INLINE_LAMBDA { most = cpu::max<T>(of_row(s, s.get(row), least), most); });
    return cpu::largest<T>(most);
  }
  // The model checks targets before it calls this. Who calls the operation checks them himself.
  static void check_target(std::int32_t target, Index V) {
#if HYBRIDATTN_BOUNDS_CHECKS
    if (target >= V) std::abort();
#else
    (void)target, (void)V;
#endif
  }
};

template <> struct On<CrossEntropy, Cpu> {
  template <class T>
  static void forward(Cpu& cpu, View<T const, 2> x, View<T const, 2> w, View<std::int32_t const, 1> targets, View<LossSum, 1> loss) {
    in_blocks(cpu, x, w, targets, loss, [&](Wide<Out<T>, 2> logits, View<std::int32_t const, 1> of_block, Index, View<LossSum, 1> sum) {
      On<SoftmaxLoss, Cpu>::forward<wide_t<T>>(cpu, logits, of_block, {}, {}, sum);
    });
  }

  // d_w of several blocks of rows is summed in the wide scalar.
  template <class T, class DW>
  static void backward(Cpu& cpu, View<T const, 2> x, View<T const, 2> w, View<std::int32_t const, 1> targets, View<double const, 1> scale,
                       View<T, 2> d_x, View<DW, 2> d_w, View<LossSum, 1> loss) {
    if constexpr (!std::is_same_v<DW, wide_t<T>>) {
      Tensor<wide_t<T>, 2, Cpu> sums{cpu, d_w.shape};
      backward(cpu, x, w, targets, scale, d_x, out(sums), loss);
      convert(cpu, in(sums), d_w);
    } else {
      for (Index v = 0; v < d_w.extent(0) && x.extent(0) == 0; ++v) std::fill_n(d_w.row(v), d_w.extent(1), DW(0));
      in_blocks(cpu, x, w, targets, loss,
                [&](View<DW, 2> d_logits, View<std::int32_t const, 1> of_block, Index first, View<LossSum, 1> sum) {
                  On<SoftmaxLoss, Cpu>::forward<DW>(cpu, d_logits, of_block, scale, d_logits, sum);
                  View<T, 2> const d_rows{d_x.row(first), {d_logits.extent(0), d_x.extent(1)}, d_x.stride};
                  View<T const, 2> const rows{x.row(first), {d_logits.extent(0), x.extent(1)}, x.stride};
                  cpu::gemm(cpu, operand(d_logits), operand(w), d_rows);
                  cpu::gemm(cpu, operand(d_logits).transposed(), operand(rows), d_w, first == 0 ? Into::overwrite : Into::add);
                });
    }
  }

 private:
  // f(logits, targets, first row, sum) adds the loss of a block of rows to a sum; one block after the other.
  template <class T, class F>
  static void in_blocks(Cpu& cpu, View<T const, 2> x, View<T const, 2> w, View<std::int32_t const, 1> targets, View<LossSum, 1> loss, F f) {
    Index const N = x.extent(0), V = w.extent(0);
    Tensor<wide_t<T>, 2, Cpu> storage{cpu, {std::min(N, CrossEntropy::block_rows), V}};
    LossSum total;
    for (Index first = 0; first < N; first += CrossEntropy::block_rows) {
      Index const rows = std::min(N - first, CrossEntropy::block_rows);
      Wide<Out<T>, 2> const logits{out(storage).data, {rows, V}};
      cpu::gemm(cpu, operand(View<T const, 2>{x.row(first), {rows, x.extent(1)}, x.stride}), operand(w).transposed(), logits);
      LossSum of_block;
      f(logits, View<std::int32_t const, 1>{targets.data + first, {rows}}, first, View<LossSum, 1>{&of_block, {1}});
      total += of_block;
    }
    loss(0) += total;
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
#endif

// ==== hybridattn/ops/embedding/embedding.hpp
// One row of a table for each token: y[n] = table[tokens[n]].   d_table[v] = sum of d_y[n] over the tokens that are v
#ifndef HYBRIDATTN_OPS_EMBEDDING_EMBEDDING_HPP
#define HYBRIDATTN_OPS_EMBEDDING_EMBEDDING_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

//   forward (backend, tokens, table, y)       tokens [N], table [V, C], y [N, C]; tokens are in 0 .. V - 1
//   backward(backend, tokens, d_y, d_table, into)   d_table is added, where a tied head has been there, or overwritten
struct Embedding {};

}  // namespace hybridattn::inline HYBRIDATTN_ABI

// ==== hybridattn/ops/embedding/cpu.hpp
#ifndef HYBRIDATTN_OPS_EMBEDDING_CPU_HPP
#define HYBRIDATTN_OPS_EMBEDDING_CPU_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

template <> struct On<Embedding, Cpu> : InFloat<Embedding, Cpu> {
  using InFloat::forward, InFloat::backward;
  template <std::floating_point T> static void forward(Cpu& cpu, View<std::int32_t const, 1> tokens, View<T const, 2> table, View<T, 2> y) {
    parallel_blocks(cpu, tokens.extent(0), cpu::sum_rows, [&](Index first, Index last) {
      for (Index n = first; n < last; ++n) std::copy_n(table.row(tokens(n)), table.extent(1), y.row(n));
    });
  }
  // Threads share out the columns, so that each sum runs over the tokens in order.
  template <std::floating_point T> static void backward(Cpu& cpu, View<std::int32_t const, 1> tokens, View<T const, 2> d_y,
                                                        View<T, 2> d_table, Into into) {
    parallel_blocks(cpu, d_table.extent(1), 64, [&](Index first, Index last) {
      for (Index v = 0; v < d_table.extent(0) && into == Into::overwrite; ++v) std::fill_n(d_table.row(v) + first, last - first, T(0));
      for (Index n = 0; n < tokens.extent(0); ++n) axpy(T(1), d_y.row(n) + first, d_table.row(tokens(n)) + first, last - first);
    });
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
#endif

// ==== hybridattn/nn/language_model.hpp
// tokens -> embedding -> Stack -> norm -> logits -> loss, and back. A model has only its configuration. The caller owns
// parameters, activations and gradients.
#ifndef HYBRIDATTN_NN_LANGUAGE_MODEL_HPP
#define HYBRIDATTN_NN_LANGUAGE_MODEL_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

// For loops over the tensors of a model. Named, so that a layer in several models is visited by one instantiation.
namespace detail {
struct CountElements {
  Index count = 0;

  template <int Rank> [[gnu::noinline]] void operator()(Path const& path, Shape<Rank> shape) {
    try {
      count = size_sum(count, shape.count());
    } catch (Error const& error) {
      fail(path.str(), ": ", error.what());
    }
  }
};
template <class B> struct DrawFirstValues {
  B& backend;
  Seed seed;

  template <class T, int Rank> [[gnu::noinline]] void operator()(Path const& path, Tensor<T, Rank, B>& tensor, Initial const& start) const {
    Random random{seed, path.str()};
    std::vector<T> host;
    resize(host, tensor.shape().count(), "a parameter's first values");
    for (T& element : host) element = static_cast<T>(start.draw(random));
    upload(backend, host, tensor);
  }
};
}  // namespace detail

template <class S_> class LanguageModel {
 public:
  using Stack = S_;

  struct Config {
    Index vocab_size = 256;   // V
    Index model_dim = 128;    // C
    Index num_heads = 4;      // the default of every policy's heads
    FeedForwardConfig feed_forward = {};
    RmsNorm::Options norm = {};
    bool tie_embedding = false;   // the head is the embedding
    Initialization initialization = {};
    typename Stack::LayerConfigs layers = {};

    // The sizes of one policy of the stack: config.policy<GDN>().num_value_heads = 8.
    template <class Policy> auto& policy() { return layers.template get<Policy>().policy; }
    template <class Policy> auto const& policy() const { return layers.template get<Policy>().policy; }
    // The place of the norms in this policy's layers: config.norm_placement<Full>() = NormPlacement::after.
    template <class Policy> NormPlacement& norm_placement() { return layers.template get<Policy>().norm_placement; }
    template <class Policy> NormPlacement norm_placement() const { return layers.template get<Policy>().norm_placement; }
  };

  template <class S> struct Params {
    Held<S, 2> embedding;  // [V, C]
    typename Stack::template Params<S> blocks;
    Wide<S, 1> norm;       // [C]
    Held<S, 2> head;       // [V, C], empty when the head is the embedding
    HYBRIDATTN_FIELDS(embedding, blocks, norm, head)
  };
  template <class S> struct Saved {
    typename Stack::template Saved<S> blocks;
    Held<S, 2> x, x_normed;  // [N, C]
    HYBRIDATTN_FIELDS(blocks, x, x_normed)
  };
  // The losses of a batch, and the gradients of their sum.
  template <class T, class B> struct Gradients {
    Tensor<BatchLosses, 1, B> losses;  // [1]
    Params<Owned<T, B>> params;
    View<T, 1> all;                    // the block of memory with all gradients; empty in bf16
  };

  explicit LanguageModel(Config config = {}) : config_(std::move(config)) {
    check_at_least("model", "vocab_size", config_.vocab_size, 1);
    check_at_least("model", "num_heads", config_.num_heads, 1);
    check(config_.vocab_size <= largest_int32, "model: vocab_size ", config_.vocab_size, " is not allowed; it must be at most ",
          largest_int32, ", since a token is an int32");
    stack_ = Stack::completed({{config_.model_dim, config_.norm, config_.feed_forward, config_.initialization}, config_.layers},
                              config_.num_heads);
    gradients_ = shapes(Stack::gradients(stack_));
    byte_count(parameter_count(), sizeof(double));   // throws where the bytes are too many for any scalar
  }
  // The same model in another stage of training: the same parameters, other gradients.
  LanguageModel at(Stage stage) const {
    LanguageModel model = *this;
    model.stack_ = Stack::at(stack_, stage);
    model.gradients_ = model.shapes(Stack::gradients(model.stack_));
    if (stage == Stage::dense_warm_up) model.gradients_.embedding = {}, model.gradients_.norm = {}, model.gradients_.head = {};
    return model;
  }
  Stage stage() const { return stack_.block.stage; }
  Config const& config() const { return config_; }
  typename Stack::Config const& stack_config() const { return stack_; }

  Params<Shapes> params() const { return shapes(Stack::params(stack_)); }
  // The shapes of the gradients. Empty for parameters that the stage does not train.
  Params<Shapes> const& gradients() const { return gradients_; }
  // For each parameter, in order: whether the policies' auxiliary losses train it.
  std::vector<bool> detached() const {
    std::vector<bool> list;
    zip([&](Path const&, auto const& shape) { list.push_back(shape.count() > 0); }, at(Stage::dense_warm_up).gradients());
    return list;
  }
  Saved<Shapes> saved(Sequences const& s) const {
    Shape<2> const x{s.tokens(), config_.model_dim};
    return {.blocks = Stack::saved(stack_, s), .x = x, .x_normed = x};
  }
  // Throws Error, with the tensor's path, where the number of elements is too large.
  Index parameter_count() const {
    detail::CountElements elements;
    zip(elements, params());
    return elements.count;
  }

  // Each tensor has a generator of its own, seeded by the seed and the tensor's path. So two models give equal initial values to
  // tensors of equal path and shape.
  template <class T, class B> Params<Owned<T, B>> initialize(B& backend, Seed seed) const {
    Params<Starts> const starts{.embedding = config_.initialization.embedding(),
                                .blocks = Stack::starts(stack_),
                                .norm = Initial::constant(config_.norm.weight == NormWeight::plain ? 1 : 0),
                                .head = config_.initialization.linear(config_.model_dim)};
    auto params = allocate_together<T>(backend, this->params());
    zip(detail::DrawFirstValues<B>{backend, seed}, params, starts);
    return params;
  }

  // Returns the tensors for backward. logits() reads the last normed activations in them. Throws Error where a token or a target is
  // not in the vocabulary.
  template <class B, class T> Saved<Owned<T, B>> forward(B& backend, Params<Owned<T, B>> const& params, TokenBatch<B> const& batch) const {
    check(batch.sequences.tokens() > 0, "batch: it has no tokens; a batch holds at least 1");
    check(!batch.sequences.any_continue(), "batch: a sequence follows tokens of a cache; call extend() to continue from a cache");
    batch.token_range.check_tokens(config_.vocab_size);
    batch.target_range.check_targets(config_.vocab_size);
    auto const p = in(params);
    Saved<Owned<T, B>> saved;
    Tensor<T, 2, B> x{backend, {batch.sequences.tokens(), config_.model_dim}};
    On<Embedding, B>::forward(backend, in(batch.tokens), p.embedding, out(x));
    saved.x = Stack::forward(backend, stack_, batch.sequences, p.blocks, std::move(x), saved.blocks);
    saved.x_normed = {backend, saved.x.shape()};
    On<RmsNorm, B>::forward(backend, config_.norm, in(saved.x), p.norm, out(saved.x_normed));
    return saved;
  }

  template <class B, class Other> auto forward(B&, Other const&, TokenBatch<B> const&) const {
    static_assert(sizeof(Other) == 0, "forward reads parameters that own their memory: pass what initialize() returned");
    return Saved<Owned<float, B>>{};
  }

  // All logits [N, V] in one tensor, never narrower than float. Training does not use this function and never stores them.
  template <class B, class T>
  Tensor<wide_t<T>, 2, B> logits(B& backend, Params<Owned<T, B>> const& params, Saved<Owned<T, B>> const& saved) const {
    Tensor<wide_t<T>, 2, B> result{backend, {saved.x_normed.shape()[0], config_.vocab_size}};
    On<Linear, B>::forward(backend, in(saved.x_normed), head(in(params)), out(result));
    return result;
  }
  template <class B, class T> LossSum loss(B& backend, Params<Owned<T, B>> const& params, TokenBatch<B> const& batch) const {
    auto const saved = forward(backend, params, batch);
    Tensor<LossSum, 1, B> sum{backend, {1}};
    On<Fill, B>::forward(backend, LossSum{}, out(sum));
    On<CrossEntropy, B>::forward(backend, in(saved.x_normed), head(in(params)), in(batch.targets), out(sum));
    return download(backend, sum)[0];
  }

  // Loss and gradients of scale * (sum of the loss over counted tokens) + auxiliary_scale * (load balancing and the policies'
  // auxiliary losses), for the losses that the stage trains. Consumes `saved`. The scale [1] is on the machine.
  template <class B, class T>
  Gradients<T, B> backward(B& backend, Params<Owned<T, B>> const& params, TokenBatch<B> const& batch, Saved<Owned<T, B>>&& saved,
                           View<double const, 1> scale, double auxiliary_scale = 1) const {
    auto const p = in(params);
    Gradients<T, B> result{{backend, {1}}, {}, {}};
    result.params = allocate_together<T>(backend, gradients(), &result.all);
    auto const d_p = out(result.params);
    BatchLosses* const losses = out(result.losses).data;   // on the machine
    View<LossSum, 1> const loss{&losses->loss, {1}};
    On<Fill, B>::forward(backend, BatchLosses{}, out(result.losses));
    add_policy_losses<T>(backend, batch.sequences.tokens(), auxiliary_scale, saved.blocks, View<double, 1>{&losses->policy, {1}});
    if (stage() == Stage::dense_warm_up) {
      On<CrossEntropy, B>::forward(backend, in(saved.x_normed), head(p), in(batch.targets), loss);
      Stack::auxiliary_backward(backend, stack_, batch.sequences, p.blocks, std::move(saved.blocks), d_p.blocks);
      return result;
    }
    add_balance_loss(backend, auxiliary_scale, saved.blocks, View<double, 1>{&losses->balance, {1}});
    View<T, 2> const d_head = config_.tie_embedding ? d_p.embedding : d_p.head;
    Tensor<T, 2, B> d_normed{backend, saved.x_normed.shape()};
    On<CrossEntropy, B>::backward(backend, in(saved.x_normed), head(p), in(batch.targets), scale, out(d_normed), d_head, loss);
    Tensor<T, 2, B> d_x{backend, saved.x.shape()};
    On<RmsNorm, B>::backward(backend, config_.norm, in(saved.x), p.norm, in(d_normed), out(d_x), d_p.norm, Into::overwrite);
    d_x = Stack::backward(backend, stack_, batch.sequences, p.blocks, std::move(saved.blocks), std::move(d_x), d_p.blocks);
    On<Embedding, B>::backward(backend, in(batch.tokens), in(d_x), d_p.embedding, config_.tie_embedding ? Into::add : Into::overwrite);
    return result;
  }

  // The same with a scale on the host.
  template <class B, class T>
  Gradients<T, B> backward(B& backend, Params<Owned<T, B>> const& params, TokenBatch<B> const& batch, Saved<Owned<T, B>>&& saved,
                           double scale, double auxiliary_scale = 1) const {
    Tensor<double, 1, B> there{backend, {1}};
    On<Fill, B>::forward(backend, scale, out(there));
    return backward(backend, params, batch, std::move(saved), in(there), auxiliary_scale);
  }

  template <class B, class T>
  auto backward(B&, Params<Owned<T, B>> const&, TokenBatch<B> const&, Saved<Owned<T, B>>&, double, double = 1) const {
    static_assert(sizeof(T) == 0, "backward consumes what forward saved: pass std::move(saved)");
    return Gradients<T, B>{};
  }

 private:
  Params<Shapes> shapes(typename Stack::template Params<Shapes> blocks) const {
    Shape<2> const table{config_.vocab_size, config_.model_dim};
    return {
        .embedding = table, .blocks = std::move(blocks), .norm = {config_.model_dim}, .head = config_.tie_embedding ? Shape<2>{} : table};
  }
  template <class T> View<T const, 2> head(Params<In<T>> const& p) const { return config_.tie_embedding ? p.embedding : p.head; }

  // Adds the load-balancing loss of all mixture layers to a sum; writes its part of each router's gradient into Saved.
  template <class B, class T>
  void add_balance_loss(B& backend, double scale, typename Stack::template Saved<Owned<T, B>>& blocks, View<double, 1> sum) const {
    auto const& c = stack_.block.feed_forward;
    if (c.balance_coefficient == 0) return;
    std::array<FeedForward::Saved<Owned<T, B>>*, Stack::depth> mixtures;
    std::size_t count = 0;
    blocks.for_each_layer(
        [&](int i, auto& block) {
          if (c.is_mixture(i)) mixtures[count++] = &block.feed_forward;
        },
        blocks);
    balance_loss<B, T>(backend, c, scale, std::span(mixtures).first(count), sum);
  }
  // Adds the weighted auxiliary losses of all policies to a sum; writes the gradient of each weighted loss into Saved.
  template <class T, class B>
  void add_policy_losses(B& backend, Index tokens, double scale, typename Stack::template Saved<Owned<T, B>>& blocks,
                         View<double, 1> sum) const {
    blocks.for_each(
        [&](auto block, std::size_t, auto& kept) {
          using Block = typename decltype(block)::type;
          if constexpr (HasAuxiliaryLoss<typename Block::Policy>) {
            if (!kept.attention.outputs.auxiliary_loss) return;
            double const weight = Block::Policy::auxiliary_weight(Stack::template layer_config<Block>(stack_).policy, tokens);
            On<Fill, B>::forward(backend, static_cast<wide_t<T>>(scale * weight), out(kept.attention.d_auxiliary_loss));
            On<AddWeighted, B>::forward(backend, weight, in(kept.attention.outputs.auxiliary_loss), sum);
          }
        },
        blocks);
  }

  Config config_;
  typename Stack::Config stack_;
  Params<Shapes> gradients_;
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/infer/cache.hpp
// A model's memory of earlier tokens, so that a new token costs the work of one token: each layer's cache, and the number of each
// sequence's tokens in it. The caller owns the cache; the model keeps no part of it.
#ifndef HYBRIDATTN_INFER_CACHE_HPP
#define HYBRIDATTN_INFER_CACHE_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

using TokenLists = std::vector<std::vector<std::int32_t>>;   // one list for each sequence

struct CacheSize {
  Index batch = 1;      // sequences
  Index capacity = 0;   // tokens of each
};

namespace infer {
template <class... Ps> constexpr bool all_have_caches(Types<Ps...>) { return (HasCache<Ps> && ...); }
template <class B, class T, class... Ps> constexpr bool all_decode(Types<Ps...>) { return (Decodes<Ps, B, T> && ...); }
}  // namespace infer

// The caches of a stack's layers.
template <class Stack> struct LayerCaches {
  static_assert(infer::all_have_caches(typename Stack::Kinds{}),
                "this policy cannot decode: give it Cache<S> and cache(config, batch, capacity), see attention/policy.hpp");
  template <class S> struct OfRole {
    template <class Block> using Type = typename Block::Policy::template Cache<S>;
  };
  template <class S> struct Group : Layers<typename Stack::Blocks, OfRole<S>::template Type> {};
};

// The shapes of a cache. bytes<float>(cache_shapes(model, size)) are the bytes of a cache of floats. Throws Error unless both sizes
// are in 1 .. 2^31 - 1.
template <class Stack> typename LayerCaches<Stack>::template Group<Shapes> cache_shapes(LanguageModel<Stack> const& model, CacheSize size) {
  check(1 <= size.batch && size.batch <= largest_int32, "cache: batch ", size.batch, " is not allowed; it must be in 1 .. ", largest_int32);
  check(1 <= size.capacity && size.capacity <= largest_int32, "cache: capacity ", size.capacity, " is not allowed; it must be in 1 .. ",
        largest_int32);
  typename LayerCaches<Stack>::template Group<Shapes> shapes;
  shapes.for_each(
      [&](auto block, std::size_t, auto& layer) {
        using Block = typename decltype(block)::type;
        layer = Block::Policy::cache(Stack::template layer_config<Block>(model.stack_config()).policy, size.batch, size.capacity);
      },
      shapes);
  return shapes;
}

template <class Stack, class T, class B> class Cache {
 public:
  using Group = typename LayerCaches<Stack>::template Group<Owned<T, B>>;
  static_assert(infer::all_decode<B, T>(typename Stack::Kinds{}),
                "this policy cannot decode on this backend: write On<Policy, Backend>::extend, see attention/policy.hpp");

  // Throws Error, with the number of bytes, where memory is short.
  Cache(B& backend, LanguageModel<Stack> const& model, CacheSize size)
      : layers_(allocated(backend, cache_shapes(model, size), size)), capacity_(size.capacity) {
    resize(lengths_, size.batch, "the lengths of sequences");
  }

  Group const& layers() const { return layers_; }
  Group& layers() { return layers_; }
  Index capacity() const { return capacity_; }
  Index batch() const { return std::ssize(lengths_); }
  // The number of each sequence's tokens in the cache.
  std::span<Index const> lengths() const { return lengths_; }

  // Discards the tokens of sequence i, or of all sequences.
  void forget(Index i) { lengths_.at(static_cast<std::size_t>(i)) = 0; }
  void forget() { std::fill(lengths_.begin(), lengths_.end(), 0); }

  // For extend: next() lists the new tokens of all sequences, one sequence after the other, and throws Error if they do not fit.
  // commit() counts them as tokens of the cache.
  struct Call {
    SequencesOn<B> sequences;
    std::vector<std::int32_t> tokens;
  };
  Call const& next(B& backend, TokenLists const& tokens) {
    check(std::ssize(tokens) == batch(), "cache: new tokens of ", tokens.size(), " sequences, but the cache was made for ", batch());
    new_lengths_.clear();
    call_.tokens.clear();
    for (auto const& of_sequence : tokens) {
      new_lengths_.push_back(std::ssize(of_sequence));
      call_.tokens.insert(call_.tokens.end(), of_sequence.begin(), of_sequence.end());
    }
    call_.sequences.assign(backend, lengths_, new_lengths_);
    check_fits(call_.sequences, batch(), capacity_);
    return call_;
  }
  void commit() {
    for (std::size_t i = 0; i < lengths_.size(); ++i) lengths_[i] += new_lengths_[i];
  }

 private:
  static Group allocated(B& backend, typename LayerCaches<Stack>::template Group<Shapes> const& shapes, CacheSize size) {
    try {
      return allocate<T>(backend, shapes);
    } catch (Error const& error) {
      fail("cache: capacity ", size.capacity, " for ", size.batch, " sequences is ", bytes<T>(shapes), " bytes: ", error.what());
    }
  }

  Group layers_;
  Index capacity_;
  std::vector<Index> lengths_, new_lengths_;
  Call call_;   // its memory is used again by each call
};

template <class T, class B, class Stack> Cache<Stack, T, B> make_cache(B& backend, LanguageModel<Stack> const& model, CacheSize size) {
  return {backend, model, size};
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/infer/extend.hpp
// The model over tokens that follow those of a cache: the forward of nn/ with a cache in place of what backward would need.
#ifndef HYBRIDATTN_INFER_EXTEND_HPP
#define HYBRIDATTN_INFER_EXTEND_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {
namespace infer {

// Rows of logits to compute: of all new tokens, or of the last new token of each sequence.
enum class LogitRows { all, last };

// Logits [N, V], never narrower than float, or one row for each sequence with new tokens: that of its last token.
template <class Stack, class T, class B>
Tensor<wide_t<T>, 2, B> logits(B& backend, LanguageModel<Stack> const& model,
                               typename LanguageModel<Stack>::template Params<In<T>> const& p, SequencesOn<B> const& s, LogitRows rows,
                               Tensor<T, 2, B> x) {
  if (rows == LogitRows::last && s.longest() > 1) {
    std::vector<std::int32_t> ends;
    for (Sequence const sequence : s)
      if (sequence.length > 0) ends.push_back(static_cast<std::int32_t>(sequence.start + sequence.length - 1));
    Tensor<std::int32_t, 1, B> places{backend, {std::ssize(ends)}};
    upload(backend, ends, places);
    Tensor<T, 2, B> picked{backend, {std::ssize(ends), x.shape()[1]}};
    On<Embedding, B>::forward(backend, in(places), in(x), out(picked));   // rows of a table, by number
    x = std::move(picked);
  }
  Tensor<T, 2, B> normed{backend, x.shape()};
  Tensor<wide_t<T>, 2, B> result{backend, {x.shape()[0], model.config().vocab_size}};
  On<RmsNorm, B>::forward(backend, model.config().norm, in(x), p.norm, out(normed));
  On<Linear, B>::forward(backend, in(normed), model.config().tie_embedding ? p.embedding : p.head, out(result));
  return result;
}

// Throws Error for a cache of another model's sizes, which would be read past its end.
template <class Stack, class T, class B> void check_sizes(LanguageModel<Stack> const& model, Cache<Stack, T, B> const& cache) {
  zip(
      [](Path const& path, auto const& expected, auto const& layer) {
        check(layer.shape() == expected, "cache: it was made for a model of other sizes; its ", path.str(), " has ", layer.shape().count(),
              " numbers, this model's has ", expected.count());
      },
      cache_shapes(model, {cache.batch(), cache.capacity()}), cache.layers());
}

template <class Stack, class T, class B>
Tensor<wide_t<T>, 2, B> extend(B& backend, LanguageModel<Stack> const& model,
                               typename LanguageModel<Stack>::template Params<Owned<T, B>> const& params, TokenLists const& tokens,
                               Cache<Stack, T, B>& cache, LogitRows rows) {
  check_sizes(model, cache);
  auto const& call = cache.next(backend, tokens);
  if (call.tokens.empty()) return {backend, {0, model.config().vocab_size}};
  TokenRange::of(call.tokens).check_tokens(model.config().vocab_size);
  auto const p = in(params);
  Tensor<std::int32_t, 1, B> numbers{backend, {std::ssize(call.tokens)}};
  upload(backend, call.tokens, numbers);
  Tensor<T, 2, B> x{backend, {std::ssize(call.tokens), model.config().model_dim}};
  On<Embedding, B>::forward(backend, in(numbers), p.embedding, out(x));
  x = Stack::extend(backend, model.stack_config(), call.sequences, p.blocks, std::move(x), out(cache.layers()));
  cache.commit();
  return logits(backend, model, p, call.sequences, rows, std::move(x));
}

}  // namespace infer

// Returns the logits [N, V] of N new tokens, one sequence after the other, and adds the tokens to the cache. tokens[i] are the new
// tokens of sequence i; the list may be empty. Throws Error if a sequence would exceed the cache's capacity or a token is not in the
// vocabulary. The cache is then unchanged.
template <class Stack, class T, class B>
Tensor<wide_t<T>, 2, B> extend(B& backend, LanguageModel<Stack> const& model,
                               typename LanguageModel<Stack>::template Params<Owned<T, B>> const& params, TokenLists const& tokens,
                               Cache<Stack, T, B>& cache) {
  return infer::extend(backend, model, params, tokens, cache, infer::LogitRows::all);
}
// The same, with one row of logits for each sequence with new tokens, in order: that of the sequence's last token.
template <class Stack, class T, class B>
Tensor<wide_t<T>, 2, B> extend_to_last(B& backend, LanguageModel<Stack> const& model,
                                       typename LanguageModel<Stack>::template Params<Owned<T, B>> const& params, TokenLists const& tokens,
                                       Cache<Stack, T, B>& cache) {
  return infer::extend(backend, model, params, tokens, cache, infer::LogitRows::last);
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/infer/sampling.hpp
// The next token from one row of logits: the likeliest token, or a random one of the likelier tokens. Host memory only.
#ifndef HYBRIDATTN_INFER_SAMPLING_HPP
#define HYBRIDATTN_INFER_SAMPLING_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

struct SamplingOptions {
  double temperature = 1;   // logits are divided by it; 0: always the likeliest token
  Index top_k = 0;          // only the top_k likeliest tokens; 0: all
  double top_p = 1;         // then only the fewest likeliest tokens whose probabilities sum to top_p; 1: all

  // Throws Error on numbers that are not allowed.
  void check_numbers() const {
    check(std::isfinite(temperature) && temperature >= 0, "sampling: temperature ", temperature,
          " is not allowed; it must be >= 0, and 0 takes the likeliest token");
    check(top_k >= 0, "sampling: top_k ", top_k, " is not allowed; it must be >= 0, and 0 keeps all tokens");
    check(top_p > 0 && top_p <= 1, "sampling: top_p ", top_p, " is not allowed; it must be in (0, 1]");
  }
};

// Draws tokens. The same seed and the same logits give the same tokens. Of equally likely tokens the smaller number comes first.
class Sampler {
 public:
  explicit Sampler(SamplingOptions options = {}, Seed seed = {}) : options_(options), random_(seed, "sampling") {
    options_.check_numbers();
  }

  // Draws a token from logits [V] of one position. -inf excludes a token. Throws Error on NaN, on +inf, and where all logits are -inf.
  template <class T> std::int32_t operator()(std::span<T const> logits) {
    fill_candidates(logits);
    if (options_.temperature == 0) return best_->token;
    keep_top_k();
    double total = weigh();
    if (options_.top_p < 1) total = keep_top_p(total);
    return draw(total);
  }

 private:
  struct Candidate {
    double logit, weight;
    std::int32_t token;
  };
  static bool likelier(Candidate const& a, Candidate const& b) { return a.logit > b.logit || (a.logit == b.logit && a.token < b.token); }

  template <class T> void fill_candidates(std::span<T const> logits) {
    check(!logits.empty(), "sampling: there are no logits");
    candidates_.clear();
    for (std::size_t i = 0; i < logits.size(); ++i) {
      double const logit = static_cast<double>(logits[i]);
      check(logit < std::numeric_limits<double>::infinity(), "sampling: the logit of token ", i, " is ", logit);
      if (std::isfinite(logit)) candidates_.push_back({logit, 0, static_cast<std::int32_t>(i)});
    }
    check(!candidates_.empty(), "sampling: all ", logits.size(), " logits are -inf");
    best_ = std::min_element(candidates_.begin(), candidates_.end(), likelier);
    largest_ = best_->logit;
  }
  void keep_top_k() {
    if (options_.top_k == 0 || options_.top_k >= std::ssize(candidates_)) return;
    std::nth_element(candidates_.begin(), candidates_.begin() + options_.top_k, candidates_.end(), likelier);
    candidates_.resize(static_cast<std::size_t>(options_.top_k));
    std::sort(candidates_.begin(), candidates_.end(), [](auto const& a, auto const& b) { return a.token < b.token; });
  }
  double weigh() {
    double total = 0;
    for (Candidate& c : candidates_) total += c.weight = std::exp((c.logit - largest_) / options_.temperature);
    return total;
  }
  // Returns the weight of the tokens that it keeps.
  double keep_top_p(double total) {
    std::sort(candidates_.begin(), candidates_.end(), likelier);
    double kept = 0;
    std::size_t count = 0;
    while (count < candidates_.size() && kept < options_.top_p * total) kept += candidates_[count++].weight;
    candidates_.resize(count);
    return kept;
  }
  std::int32_t draw(double total) {
    double left = random_.uniform() * total;
    for (Candidate const& c : candidates_)
      if ((left -= c.weight) < 0) return c.token;
    return candidates_.back().token;   // only rounding leaves `left` at 0 or above
  }

  SamplingOptions options_;
  Random random_;
  std::vector<Candidate> candidates_;
  std::vector<Candidate>::iterator best_;
  double largest_ = 0;
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/infer/generate.hpp
// Continues texts: first all tokens of the prompts in one step, then one token of each sequence a step.
#ifndef HYBRIDATTN_INFER_GENERATE_HPP
#define HYBRIDATTN_INFER_GENERATE_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

struct GenerateOptions {
  Index max_new_tokens = 128;                    // of each sequence
  SamplingOptions sampling = {};
  Seed seed = {};                                // sequence i draws the tokens that it draws alone with seed + i
  std::vector<std::int32_t> stop_tokens = {};    // such a token ends its sequence, as its last token

  // Throws Error on numbers that are not allowed.
  void check_numbers() const {
    constexpr Index most = std::numeric_limits<std::int32_t>::max();
    check(0 <= max_new_tokens && max_new_tokens <= most, "generate: max_new_tokens ", max_new_tokens,
          " is not allowed; it must be in 0 .. ", most);
    sampling.check_numbers();
  }
};

// The new tokens of each sequence, and the time for them.
struct Generated {
  TokenLists tokens;
  Index prefill_tokens = 0, decode_tokens = 0;   // tokens that the model computed in the first step, and in the later steps
  double prefill_seconds = 0, decode_seconds = 0;
};

// The default on_token: no sequence ends early.
struct KeepGoing {
  bool operator()(Index, std::int32_t) const { return true; }
};

namespace infer {

// Without <chrono>, whose include would take a tenth of this library's compile time.
class Stopwatch {
 public:
  double seconds() const { return now() - start_; }

 private:
  static double now() {
    std::timespec time = {};
#if defined(__linux__)
    clock_gettime(CLOCK_MONOTONIC, &time);
#else
    std::timespec_get(&time, TIME_UTC);
#endif
    return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
  }
  double start_ = now();
};

// The state of a generation: next() are each sequence's tokens for the model's next step. A sequence without such tokens has ended.
template <class OnToken> class Generation {
 public:
  // `capacity` is the number of tokens that a sequence has room for in the cache.
  Generation(TokenLists const& prompts, GenerateOptions const& options, Index capacity, OnToken& on_token)
      : options_(options), on_token_(on_token), next_(prompts), tokens_(prompts.size()) {
    options.check_numbers();
    for (std::size_t i = 0; i < prompts.size(); ++i) {
      reserve(tokens_[i], std::min(options.max_new_tokens, capacity + 1), "max_new_tokens");   // the last token is not in the cache
      samplers_.emplace_back(options.sampling, Seed{options.seed.value + i});
    }
  }
  TokenLists const& next() const { return next_; }
  TokenLists& tokens() { return tokens_; }
  Index count() const {
    Index sum = 0;
    for (auto const& of_sequence : next_) sum += std::ssize(of_sequence);
    return sum;
  }
  // Draws a token for each sequence that has not ended. logits has a row [V] for each of these sequences.
  template <class T> void draw(std::span<T const> logits, std::size_t vocab_size) {
    std::size_t row = 0;
    for (std::size_t i = 0; i < next_.size(); ++i) {
      if (next_[i].empty()) continue;
      std::int32_t const token = samplers_[i](logits.subspan(row++ * vocab_size, vocab_size));
      tokens_[i].push_back(token);
      bool const wanted = on_token_(static_cast<Index>(i), token), stops = std::ranges::count(options_.stop_tokens, token) > 0;
      next_[i].assign(std::size_t{wanted && !stops}, token);
    }
  }

 private:
  GenerateOptions const& options_;
  OnToken& on_token_;
  TokenLists next_, tokens_;
  std::vector<Sampler> samplers_;
};

}  // namespace infer

// Continues the sequences of a cache by prompts[i] and new tokens. A sequence with an empty prompt is not continued. generate calls
// on_token(sequence, token) for every drawn token; the sequence ends where on_token returns false. The last token of a sequence is
// not yet in the cache. Throws Error on options and logits that are not allowed, and where a sequence exceeds the cache's capacity.
template <class Stack, class T, class B, class OnToken = KeepGoing>
Generated generate(B& backend, LanguageModel<Stack> const& model, typename LanguageModel<Stack>::template Params<Owned<T, B>> const& params,
                   Cache<Stack, T, B>& cache, TokenLists const& prompts, GenerateOptions const& options = {}, OnToken on_token = {}) {
  infer::Generation<OnToken> generation{prompts, options, cache.capacity(), on_token};
  Generated result;
  std::vector<wide_t<T>> host;
  for (Index step = 0; step < options.max_new_tokens && generation.count() > 0; ++step) {
    infer::Stopwatch const watch;
    Index const count = generation.count();
    auto const logits = extend_to_last(backend, model, params, generation.next(), cache);
    resize(host, logits.shape().count(), "a copy of the logits");
    backend.download(host.data(), in(logits).data, logits.byte_count());
    generation.draw(std::span<wide_t<T> const>(host), static_cast<std::size_t>(logits.shape()[1]));
    (step == 0 ? result.prefill_tokens : result.decode_tokens) += count;
    (step == 0 ? result.prefill_seconds : result.decode_seconds) += watch.seconds();
  }
  result.tokens = std::move(generation.tokens());
  return result;
}

// The same for new sequences, with a cache of its own that is large enough. Throws Error also for an empty prompt.
template <class Stack, class B, class Params, class OnToken = KeepGoing>
Generated generate(B& backend, LanguageModel<Stack> const& model, Params const& params, TokenLists const& prompts,
                   GenerateOptions const& options = {}, OnToken on_token = {}) {
  using T = std::remove_const_t<typename decltype(in(params.embedding))::Element>;
  options.check_numbers();
  check(!prompts.empty(), "generate: there are no prompts");
  Index longest = 0;
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    check(!prompts[i].empty(), "generate: prompt ", i, " is empty; a prompt has at least one token");
    longest = std::max(longest, static_cast<Index>(std::ssize(prompts[i])));
  }
  auto cache = make_cache<T>(backend, model, {.batch = std::ssize(prompts), .capacity = longest + options.max_new_tokens});
  return generate(backend, model, params, cache, prompts, options, on_token);
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/nn/pattern.hpp
// Stacks written as text: Pattern<"LFFL">, Pattern<"G*G*">, Pattern<"LDDL", MyAlphabet>.
#ifndef HYBRIDATTN_NN_PATTERN_HPP
#define HYBRIDATTN_NN_PATTERN_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

template <std::size_t size> struct Text {
  char letters[size] = {};
  consteval Text(char const (&text)[size]) {
    for (std::size_t i = 0; i < size; ++i) letters[i] = text[i];
  }
};

// A letter of an alphabet, and its policy.
template <char letter, AttentionPolicy P> struct Letter {
  static constexpr char name = letter;
  using Policy = P;
};

template <class... Letters> struct Alphabet {
  template <char letter> static constexpr std::size_t position() {
    std::size_t n = 0;
    (void)((Letters::name == letter || (++n, false)) || ...);
    return n;
  }
  template <char letter> struct Find {
    static constexpr bool known = position<letter>() < sizeof...(Letters);
    static_assert(known, "Pattern: a letter that is not in the alphabet. The library's own: G or L = GDN, * or F = Full, D = DSA");
    // An unknown letter gives the first policy, so that the sentence above is the only error.
    using Policy = typename std::tuple_element_t<known ? position<letter>() : 0, std::tuple<Letters...>>::Policy;
  };
};

// The letters that are common elsewhere (G, *, D) and those of the studies (L, F, D).
using FieldLetters = Alphabet<Letter<'G', GDN>, Letter<'L', GDN>, Letter<'*', Full>, Letter<'F', Full>, Letter<'D', DSA>>;

namespace detail {
// Classes only: nvcc 13 rejects a partial specialization on `text` and cannot name the result of a function of `text`.
template <Text text, class Letters> struct Parsed {
  template <class Positions> struct At;
  template <std::size_t... i> struct At<std::index_sequence<i...>> {
    using type = Stack<typename Letters::template Find<text.letters[i]>::Policy...>;
  };
  using type = typename At<std::make_index_sequence<sizeof(text.letters) - 1>>::type;
};
}  // namespace detail

template <Text text, class Letters = FieldLetters> using Pattern = typename detail::Parsed<text, Letters>::type;

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/ops/adamw/step_numbers.hpp
// The numbers of a training step, in one block of the machine's memory. Operations add to them and the optimizer reads them there. The
// host waits for a step only when it reads these numbers.
#ifndef HYBRIDATTN_OPS_ADAMW_STEP_NUMBERS_HPP
#define HYBRIDATTN_OPS_ADAMW_STEP_NUMBERS_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

// Why a step changed no parameter.
enum class StepFault : std::int32_t {
  none,
  loss,             // the loss is not finite
  auxiliary_loss,   // the auxiliary losses are not finite
  gradient,         // the gradient of a tensor holds a NaN or an infinity
  tensor_norm,      // the gradient of a tensor is finite, its norm is not
  global_norm,      // the norms of all gradients are finite, their common norm is not
  mean,             // the mean of the gradients would become a NaN or an infinity
  square,           // the mean of the squared gradients would
  parameter         // a parameter would
};
struct BadStep {
  Index step = 0;   // counted from 1, as if it had changed parameters; 0: no step was bad
  LossSum loss;
  double auxiliary_loss = 0;
  StepFault fault = StepFault::none;
  std::int32_t tensor = -1;   // which, in the order of the parameters
};
struct StepNumbers {
  // Of the current step, or of the last one.
  Index counted = 0;   // tokens that have a target
  double scale = 0;    // of their losses in the mean: 1 / counted, or 0
  LossSum loss;
  double auxiliary_loss = 0, policy_loss = 0;   // weighted; the second is a part of the first
  double gradient_norm = 0;                     // before clipping
  StepFault fault = StepFault::none;
  std::int32_t tensor = -1;
  // Kept from step to step.
  double rate = 1;        // factor for the learning rate
  Index steps = 0;        // that changed parameters
  BadStep first_bad;      // since the host last read
};

// How a tensor of the parameters takes part in a step, as bits of a number.
struct StepRole {
  static constexpr std::int32_t has_gradient = 1, decays = 2, detached = 4;   // detached: clipped by a norm of their own
};

// The factors of one tensor's update by AdamW.
struct AdamWRates {
  double learning_rate, beta_1, beta_2, epsilon, weight_decay;
  double correction_1, correction_2;   // c1, c2 = 1 - beta^step, or 1
  double gradient_scale;               // g is multiplied by it first: clipping by the global norm
};

// In all of them numbers [1], and a list has an element for each tensor of the parameters, in order.
//   forward(backend, numbers)                  a step begins: nothing is lost yet
struct OpenStep {};
//   forward(backend, share, losses, numbers)   adds the share of a batch's auxiliary losses, and all of its loss; losses [1]
struct AddBatchLosses {};
// The norm of the gradients, and from it the factors of each tensor's update; or the fault that keeps the step from moving.
//   forward(backend, options, roles, squares, updates, rates, numbers)
//     squares: sums of squares, NaN where an element is not finite; updates: steps that had a gradient for the tensor
struct DecideStep {
  struct Options {
    double learning_rate, beta_1, beta_2, epsilon, weight_decay, max_norm;
    bool bias_correction;
  };
  // The factors of a tensor's update number `step`, counted from 1. `rate` is a factor for the learning rate, `norm` that of the gradients.
  static HYBRIDATTN_HD AdamWRates rates(Options const& o, std::int32_t role, double step, double rate, double norm) {
    double const clip = o.max_norm / (norm + 1e-6);
    return {.learning_rate = o.learning_rate * rate,
            .beta_1 = o.beta_1,
            .beta_2 = o.beta_2,
            .epsilon = o.epsilon,
            .weight_decay = role & StepRole::decays ? o.weight_decay : 0,
            .correction_1 = o.bias_correction ? 1 - std::pow(o.beta_1, step) : 1,
            .correction_2 = o.bias_correction ? 1 - std::pow(o.beta_2, step) : 1,
            .gradient_scale = o.max_norm != 0 && clip < 1 ? clip : 1};
  }
};
// A step counts when it has no fault and AdamWCheck found none. The first bad step since the last read is kept.
//   forward(backend, roles, found, updates, numbers)
struct CloseStep {};

}  // namespace hybridattn::inline HYBRIDATTN_ABI

#endif

// ==== hybridattn/ops/adamw/adamw.hpp
// One step of AdamW (arXiv 1711.05101), decay first:
//   p *= 1 - lr wd;  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;  p -= lr (m / c1) / (sqrt(v / c2) + eps)
// An operation takes all tensors of a model at once, from a table of their addresses.
#ifndef HYBRIDATTN_OPS_ADAMW_ADAMW_HPP
#define HYBRIDATTN_OPS_ADAMW_ADAMW_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

// One tensor of the parameters, with its gradient and moments.
template <class T> struct AdamWTensor {
  T* p = nullptr;
  T const* g = nullptr;
  T *m = nullptr, *v = nullptr;
  Index count = 0;         // of elements; 0 without a gradient
  Index first_block = 0;   // blocks of all tensors before it

  static constexpr Index block = 16384;   // elements that one task works on
  HYBRIDATTN_HD Index blocks() const { return ceil_div(count, block); }
  friend bool operator==(AdamWTensor const&, AdamWTensor const&) = default;
};

// In all of them tensors [n], numbers [1]; the other lists have an element for each tensor.
//   forward(backend, tensors, squares)                 sums of squares of the gradients, in blocks of fixed size, combined in order;
//                                                      NaN where an element is not finite, infinite where only the sum is not
struct AdamWSquares {};
// What a step would turn into a NaN or an infinity: a moment or the parameter itself.
//   forward(backend, tensors, rates, numbers, found)   found: of StepFault
struct AdamWCheck {};
// Moves nothing where the numbers of the step hold a fault.
//   forward(backend, tensors, rates, numbers)
struct AdamWStep {};

}  // namespace hybridattn::inline HYBRIDATTN_ABI

// ==== hybridattn/ops/adamw/cpu.hpp
#ifndef HYBRIDATTN_OPS_ADAMW_CPU_HPP
#define HYBRIDATTN_OPS_ADAMW_CPU_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

namespace cpu::detail {

// The rule for a vector of elements.
template <class T> struct AdamWRule {
  T keep, clip, b1, b2, eps, add1, add2, step, root;

  explicit AdamWRule(AdamWRates const& r)
      : keep(static_cast<T>(1 - r.learning_rate * r.weight_decay)), clip(static_cast<T>(r.gradient_scale)), b1(static_cast<T>(r.beta_1)),
        b2(static_cast<T>(r.beta_2)), eps(static_cast<T>(r.epsilon)), add1(static_cast<T>(1 - r.beta_1)),
        add2(static_cast<T>(1 - r.beta_2)), step(static_cast<T>(r.learning_rate / r.correction_1)),
        root(static_cast<T>(1 / std::sqrt(r.correction_2))) {}

  struct Result {
    Vec<T> mean, square, parameter;
  };
  HYBRIDATTN_INLINE Result operator()(Vec<T> g, Vec<T> m, Vec<T> v, Vec<T> p) const {
    Vec<T> const gradient = g * clip, mean = b1 * m + add1 * gradient, square = b2 * v + add2 * gradient * gradient;
    return {mean, square, keep * p - step * mean / (cpu::sqrt<T>(square) * root + eps)};
  }
};

// f(number of the tensor, number of the block, first, last) for the blocks of all tensors.
template <class T, class F> void for_each_block(Cpu& cpu, View<AdamWTensor<T> const, 1> tensors, F f) {
  using Tensor = AdamWTensor<T>;
  static_assert(Tensor::block == element_grain);
  if (tensors.count() == 0) return;
  Tensor const *const begin = tensors.data, *const end = begin + tensors.count();
  parallel_for(cpu, end[-1].first_block + end[-1].blocks(), [&](Index block, int) {
    auto const* tensor = std::upper_bound(begin, end, block, [](Index b, Tensor const& t) { return b < t.first_block; }) - 1;
    Index const first = (block - tensor->first_block) * Tensor::block;
    f(tensor - begin, block, first, std::min(first + Tensor::block, tensor->count));
  });
}
template <class T> Index blocks_of_all(View<AdamWTensor<T> const, 1> tensors) {
  Index const n = tensors.count();
  return n == 0 ? 0 : tensors(n - 1).first_block + tensors(n - 1).blocks();
}
// A vector of doubles at a time: squares of floats do not overflow.
template <class T> double sum_of_squares(T const* x, Index count) {
  double lane[8] = {};
  Index i = 0;
  for (; i + 8 <= count; i += 8)
    for (Index j = 0; j < 8; ++j) lane[j] += static_cast<double>(x[i + j]) * static_cast<double>(x[i + j]);
  for (; i < count; ++i) lane[i % 8] += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  double sum = 0;
  for (double value : lane) sum += value;
  return sum;
}

}  // namespace cpu::detail

template <> struct On<AdamWSquares, Cpu> {
  template <class T> static void forward(Cpu& cpu, View<AdamWTensor<T> const, 1> tensors, View<double, 1> squares) {
    cpu::Scratch<double> const partial{cpu, cpu::detail::blocks_of_all(tensors)};
    cpu::detail::for_each_block(cpu, tensors, [&](Index i, Index block, Index first, Index last) {
      partial.data()[block] = cpu::detail::sum_of_squares(tensors(i).g + first, last - first);
    });
    for (Index i = 0; i < tensors.count(); ++i) {
      auto const& t = tensors(i);
      squares(i) = 0;
      for (Index block = 0; block < t.blocks(); ++block) squares(i) += partial.data()[t.first_block + block];
      if (!std::isfinite(squares(i)) && !std::all_of(t.g, t.g + t.count, [](T value) { return std::isfinite(value); }))
        squares(i) = std::numeric_limits<double>::quiet_NaN();
    }
  }
};

template <> struct On<AdamWStep, Cpu> {
  template <class T>
  static void forward(Cpu& cpu, View<AdamWTensor<T> const, 1> tensors, View<AdamWRates const, 1> rates,
                      View<StepNumbers const, 1> numbers) {
    if (numbers(0).fault != StepFault::none) return;
    cpu::detail::for_each_block(cpu, tensors, [&](Index i, Index, Index first, Index last) {
      auto const t = tensors(i);
      cpu::detail::AdamWRule<T> const rule{rates(i)};
      cpu::for_each_vector<T>(first, last, [&](cpu::Slot<T> s) HYBRIDATTN_INLINE_LAMBDA {
        auto const next = rule(s.get(t.g), s.get(t.m), s.get(t.v), s.get(t.p));
        s.put(t.m, next.mean);
        s.put(t.v, next.square);
        s.put(t.p, next.parameter);
      });
    });
  }
};

template <> struct On<AdamWCheck, Cpu> {
  template <class T>
  static void forward(Cpu& cpu, View<AdamWTensor<T> const, 1> tensors, View<AdamWRates const, 1> rates, View<StepNumbers const, 1> numbers,
                      View<StepFault, 1> found) {
    std::fill_n(found.data, found.count(), StepFault::none);
    if (numbers(0).fault != StepFault::none) return;
    cpu::Scratch<StepFault> const partial{cpu, cpu::detail::blocks_of_all(tensors)};
    cpu::detail::for_each_block(cpu, tensors, [&](Index i, Index block, Index first, Index last) {
      partial.data()[block] = in_block(tensors(i), cpu::detail::AdamWRule<T>{rates(i)}, first, last);
    });
    for (Index i = 0; i < tensors.count(); ++i)
      for (Index block = 0; block < tensors(i).blocks() && found(i) == StepFault::none; ++block)
        found(i) = partial.data()[tensors(i).first_block + block];
  }

 private:
  template <class T> static StepFault in_block(AdamWTensor<T> const& t, cpu::detail::AdamWRule<T> const& rule, Index first, Index last) {
    cpu::Vec<T> mean{}, square{}, parameter{};   // NaN as soon as one number is not finite: x - x is 0 of a finite one only
    cpu::for_each_vector<T>(first, last, [&](cpu::Slot<T> s) HYBRIDATTN_INLINE_LAMBDA {
      auto const next = rule(s.get(t.g), s.get(t.m), s.get(t.v), s.get(t.p));
      mean += next.mean - next.mean;
      square += next.square - next.square;
      parameter += next.parameter - next.parameter;
    });
    return cpu::sum<T>(mean) != 0        ? StepFault::mean
           : cpu::sum<T>(square) != 0    ? StepFault::square
           : cpu::sum<T>(parameter) != 0 ? StepFault::parameter
                                         : StepFault::none;
  }
};

template <> struct On<OpenStep, Cpu> {
  static void forward(Cpu&, View<StepNumbers, 1> numbers) {
    StepNumbers const last = numbers(0);
    numbers(0) = {};
    numbers(0).rate = last.rate;
    numbers(0).steps = last.steps;
    numbers(0).first_bad = last.first_bad;
  }
};

template <> struct On<AddBatchLosses, Cpu> {
  static void forward(Cpu&, double share, View<BatchLosses const, 1> losses, View<StepNumbers, 1> numbers) {
    numbers(0).loss += losses(0).loss;
    numbers(0).auxiliary_loss += share * losses(0).auxiliary();
    numbers(0).policy_loss += share * losses(0).policy;
  }
};

template <> struct On<DecideStep, Cpu> {
  static void forward(Cpu&, DecideStep::Options const& o, View<std::int32_t const, 1> roles, View<double const, 1> squares,
                      View<Index const, 1> updates, View<AdamWRates, 1> rates, View<StepNumbers, 1> numbers) {
    StepNumbers& step = numbers(0);
    if (!std::isfinite(step.loss.loss)) step.fault = StepFault::loss;
    else if (!std::isfinite(step.auxiliary_loss)) step.fault = StepFault::auxiliary_loss;
    double others = 0, detached = 0;   // norms
    for (Index i = 0; i < roles.count(); ++i) {
      (roles(i) & StepRole::detached ? detached : others) += squares(i);
      if (std::isfinite(squares(i)) || step.tensor >= 0) continue;
      step.tensor = static_cast<std::int32_t>(i);
      if (step.fault == StepFault::none) step.fault = std::isnan(squares(i)) ? StepFault::gradient : StepFault::tensor_norm;
    }
    others = std::sqrt(others);
    detached = std::sqrt(detached);
    step.gradient_norm = std::hypot(others, detached);
    if (step.fault != StepFault::none) return;
    if (!std::isfinite(step.gradient_norm)) step.fault = StepFault::global_norm;
    for (Index i = 0; i < roles.count(); ++i)
      rates(i) =
          DecideStep::rates(o, roles(i), static_cast<double>(updates(i) + 1), step.rate, roles(i) & StepRole::detached ? detached : others);
  }
};

template <> struct On<CloseStep, Cpu> {
  static void forward(Cpu&, View<std::int32_t const, 1> roles, View<StepFault const, 1> found, View<Index, 1> updates,
                      View<StepNumbers, 1> numbers) {
    StepNumbers& step = numbers(0);
    for (Index i = 0; i < found.count() && step.fault == StepFault::none; ++i) {
      step.fault = found(i);
      if (found(i) != StepFault::none) step.tensor = static_cast<std::int32_t>(i);
    }
    if (step.fault != StepFault::none) {
      if (step.first_bad.step == 0) step.first_bad = {step.steps + 1, step.loss, step.auxiliary_loss, step.fault, step.tensor};
      return;
    }
    ++step.steps;
    for (Index i = 0; i < roles.count(); ++i) updates(i) += roles(i) & StepRole::has_gradient ? 1 : 0;
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
#endif

// ==== hybridattn/train/adamw.hpp
// AdamW over all tensors of a model, with clipping by their global norm.
#ifndef HYBRIDATTN_TRAIN_ADAMW_HPP
#define HYBRIDATTN_TRAIN_ADAMW_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

struct AdamWOptions {
  double learning_rate = 1e-3, beta_1 = 0.9, beta_2 = 0.95, epsilon = 1e-8, weight_decay = 0.1;
  double max_norm = 1;           // of all gradients together; larger gradients are scaled down to this norm; 0: no clipping
  bool bias_correction = true;
  // Which tensors decay, by path (`blocks.0.attention.prepare.a_log`). An empty function: all tensors decay.
  std::function<bool(std::string_view path)> decays = {};

  // Throws on numbers that no optimizer can have.
  void check_numbers() const {
    check_not_negative("AdamW", "learning_rate", learning_rate);
    check_below_one("AdamW", "beta_1", beta_1);
    check_below_one("AdamW", "beta_2", beta_2);
    check_positive("AdamW", "epsilon", epsilon);
    check_not_negative("AdamW", "weight_decay", weight_decay);
    check_not_negative("AdamW", "max_norm", max_norm);
  }
};

namespace detail {
// The sentence about a bad step, without the step's number.
inline std::string sentence(BadStep const& bad, std::string const& tensor) {
  auto const loss = [](char const* name, double value) {
    std::ostringstream text;
    text << "the " << name << " is " << (std::isnan(value) ? std::abs(value) : value);
    return text.str();
  };
  auto const update = [&](char const* what) { return "the update of " + tensor + " would make " + what + " a NaN or an infinity"; };
  switch (bad.fault) {
    case StepFault::none:
      break;
    case StepFault::loss:
      return loss("loss", bad.loss.mean());
    case StepFault::auxiliary_loss:
      return loss("auxiliary loss", bad.auxiliary_loss);
    case StepFault::gradient:
      return "the gradient of " + tensor + " holds a NaN or an infinity";
    case StepFault::tensor_norm:
      return "the gradient of " + tensor + " is too large for its norm";
    case StepFault::global_norm:
      return "the gradients together are too large for their norm";
    case StepFault::mean:
      return update("the mean of the gradients");
    case StepFault::square:
      return update("the mean of the squared gradients");
    case StepFault::parameter:
      return update("the parameter itself");
  }
  return {};
}
// What an error adds about a bad step after later steps have started.
inline std::string seen_late(BadStep const& bad, std::string const& tensor) {
  if (bad.fault == StepFault::loss || bad.fault == StepFault::auxiliary_loss)
    return tensor.empty() ? "" : "; the first gradient that is not finite is that of " + tensor;
  std::ostringstream text;
  if (bad.loss.count > 0) text << "; its loss was " << bad.loss.mean();
  return text.str();
}

// What an optimizer knows of the tensors of a model, in their order. Compiled once for a scalar, for all models.
template <class T> struct StepTensors {
  std::vector<std::string> names;
  std::vector<bool> decays;
  std::vector<std::int32_t> roles;        // in the current step
  std::vector<AdamWTensor<T>> tensors;

  [[gnu::noinline, gnu::cold]] void name(Path const& path, AdamWOptions const& options) {
    names.push_back(path.str());
    decays.push_back(!options.decays || options.decays(names.back()));
  }
  // A tensor without a gradient has p = nullptr.
  [[gnu::noinline]] void add(AdamWTensor<T> tensor, std::vector<bool> const& detached) {
    std::size_t const i = roles.size();
    tensor.first_block = i == 0 ? 0 : tensors.back().first_block + tensors.back().blocks();
    tensors.push_back(tensor);
    roles.push_back((tensor.p != nullptr ? StepRole::has_gradient : 0) | (decays[i] ? StepRole::decays : 0) |
                    (!detached.empty() && detached[i] ? StepRole::detached : 0));
  }
};

}  // namespace detail

// Moments are groups of the same structure as the parameters. A step does not change a tensor that has no gradient.
//
// Parameters in bf16 are too coarse for small steps. For them the optimizer keeps masters in float, which start from the parameters. A
// step moves the masters, and the parameters become the masters rounded: other values that a caller wrote to the parameters are lost.
// Gradients and moments are in float.
//
// A step counts and decides on the machine (StepNumbers), and the host reads the result later. The order of the calls of a step:
//   open(backend, rate)  ->  losses of the batches are added to numbers()  ->  start(backend, params, gradients)  ->  read(backend)
template <class Params> class AdamW {
 public:
  using Scalar = wide_t<scalar_of<Params>>;
  using Backend = backend_of<Params>;
  using Masters = widened<Params>;   // Params, except in bf16
  static constexpr bool has_masters = !std::is_same_v<Masters, Params>;

  // The running means of the gradients and of their squares. Together with the options and the counts of steps they are all that an
  // optimizer keeps.
  struct Moments {
    Masters mean, square;
  };

  AdamW(Backend& backend, Params const& like, AdamWOptions options = {}) : options_(std::move(options)), numbers_{backend, {1}} {
    options_.check_numbers();
    On<Fill, Backend>::forward(backend, StepNumbers{}, out(numbers_));
    typename detail::OwnedGroup<Params>::Sizes sizes;
    zip(
        [&](Path const& path, auto const& p, auto& size) {
          size = p.shape();
          list_.name(path, options_);
        },
        like, sizes);
    for (Masters* moments : {&moments_.mean, &moments_.square}) {
      View<Scalar, 1> all;
      *moments = allocate_together<Scalar>(backend, sizes, &all);
      On<Fill, Backend>::forward(backend, Scalar(0), all);
    }
    if constexpr (has_masters) masters_ = widen(backend, like);
    auto const tensors = static_cast<Index>(list_.names.size());
    squares_ = {backend, {tensors}};
    rates_ = {backend, {tensors}};
    found_ = {backend, {tensors}};
    roles_ = {backend, {tensors}};
    updates_ = zeros<Index>(backend, Shape<1>{tensors});
    tensors_ = {backend, {tensors}};
    reserve(list_.roles, tensors, "the roles of tensors in a step");
    reserve(list_.tensors, tensors, "the tensors of a step");
  }

  // Begins a step with learning_rate * rate.
  void open(Backend& backend, double rate) {
    set_rate(backend, rate);
    ++started_;   // the numbers of the step before are lost
    On<OpenStep, Backend>::forward(backend, out(numbers_));
  }
  // The factor for the learning rate of the steps that follow.
  void set_rate(Backend& backend, double rate) {
    check_not_negative("AdamW", "rate", rate);
    if (rate != rate_) On<Fill, Backend>::forward(backend, rate, View<double, 1>{&out(numbers_).data->rate, {1}});
    rate_ = rate;
  }
  // Counts a step that the machine replayed. A machine can record a step, from open to start, and replay it: on other tokens after
  // refill(), at another rate after set_rate(). Record the second step or a later one, because the first step uploads tables. Record
  // it at the rate of the step before: a step at a new rate writes this rate, and every replay would write it again. start() counts the
  // recorded step. If recording does not run it, the first replay is that step, and only later replays are counted here.
  void replayed() {
    ++started_;
    ++unread_;
  }
  View<StepNumbers, 1> numbers() { return out(numbers_); }
  // One step down the gradients. A loss or a gradient that is not finite, or that would make a parameter or a moment infinite or NaN,
  // stops the step: then nothing moves and nothing counts. Waits for nothing. `detached` has one mark for each tensor, in the order of
  // the parameters, or none at all. Detached tensors have a loss of their own, and are clipped by a norm of their own. Neither loss
  // then changes what the other one trains.
  void start(Backend& backend, Params& params, Masters const& gradients, std::vector<bool> const& detached = {}) {
    check(detached.empty() || detached.size() == decays().size(), "AdamW: ", detached.size(), " marks, but ", decays().size(),
          " tensors; detached has one mark for each, or none");
    if constexpr (has_masters) list_tensors(masters_, gradients, detached);
    else list_tensors(params, gradients, detached);
    bring_up_to_date(backend, list_.roles, known_roles_, roles_);
    bring_up_to_date(backend, list_.tensors, known_tensors_, tensors_);
    On<AdamWSquares, Backend>::forward(backend, in(tensors_), out(squares_));
    On<DecideStep, Backend>::forward(backend, decide_options(), in(roles_), in(squares_), in(updates_), out(rates_), out(numbers_));
    On<AdamWCheck, Backend>::forward(backend, in(tensors_), in(rates_), in(numbers_), out(found_));
    On<CloseStep, Backend>::forward(backend, in(roles_), in(found_), out(updates_), out(numbers_));
    On<AdamWStep, Backend>::forward(backend, in(tensors_), in(rates_), in(numbers_));
    round_masters(backend, params);
    ++unread_;
  }
  // Waits for the last step and returns its numbers. Throws Error where a step since the last read was bad. The error names the first
  // bad step, its fault, its tensor and its loss. If only one step was started since the last read, origin() adds where the fault began.
  template <class Origin> StepNumbers read(Backend& backend, Origin origin) {
    StepNumbers numbers;
    backend.download(&numbers, in(numbers_).data, sizeof numbers);
    bool const is_only = std::exchange(unread_, 0) == 1;
    steps_ = numbers.steps;
    if (BadStep const& bad = numbers.first_bad; bad.step != 0) {
      On<Fill, Backend>::forward(backend, BadStep{}, View<BadStep, 1>{&out(numbers_).data->first_bad, {1}});
      bool const of_loss = bad.fault == StepFault::loss || bad.fault == StepFault::auxiliary_loss;
      auto const tensor = bad.tensor < 0 ? std::string{} : list_.names[static_cast<std::size_t>(bad.tensor)];
      fail("step ", bad.step, ": ", detail::sentence(bad, tensor), !is_only ? detail::seen_late(bad, tensor) : of_loss ? origin() : "");
    }
    return numbers;
  }
  StepNumbers read(Backend& backend) {
    return read(backend, [] { return std::string{}; });
  }
  // open, start and read in one call. Returns the global norm of the gradients before clipping.
  double step(Backend& backend, Params& params, Masters const& gradients, double rate = 1, std::vector<bool> const& detached = {}) {
    open(backend, rate);
    start(backend, params, gradients, detached);
    return read(backend).gradient_norm;
  }
  // The same with gradients in bf16, as backward returns them.
  double step(Backend& backend, Params& params, Params const& gradients, double rate = 1, std::vector<bool> const& detached = {})
      requires has_masters {
    return step(backend, params, widen(backend, gradients), rate, detached);
  }

  // Steps that changed parameters, as of the last read, and all steps that were started.
  Index steps() const { return steps_; }
  Index started() const { return started_; }
  // Steps since the last read.
  Index unread() const { return unread_; }
  // One for each tensor, in the order of the parameters: the steps that had a gradient for it.
  std::vector<Index> updates(Backend& backend) const { return download(backend, updates_); }
  // Continues after this number of steps. Steps that nobody read are forgotten.
  void restore(Backend& backend, Index steps, std::vector<Index> const& updates) {
    StepNumbers numbers;
    numbers.rate = rate_;
    numbers.steps = steps;
    On<Fill, Backend>::forward(backend, numbers, out(numbers_));
    upload(backend, updates, updates_);
    steps_ = steps;
    unread_ = 0;
    ++started_;
  }
  AdamWOptions const& options() const { return options_; }
  // One for each tensor, in the order of the parameters: whether it decays.
  std::vector<bool> const& decays() const { return list_.decays; }
  // The masters in float of parameters in bf16. Who changes them calls round_masters().
  Masters const& masters() const requires has_masters { return masters_; }
  void round_masters(Backend& backend, Params& params) const {
    if constexpr (has_masters) convert(backend, masters_, params);
  }
  Moments const& moments() const { return moments_; }
  Moments& moments() { return moments_; }

 private:
  // The addresses and roles of the current step. They rarely change.
  void list_tensors(Masters& params, Masters const& gradients, std::vector<bool> const& detached) {
    list_.roles.clear();
    list_.tensors.clear();
    zip(
        [&](Path const&, auto& p, auto const& g, auto& mean, auto& square) {
          if (g) list_.add({out(p).data, in(g).data, out(mean).data, out(square).data, in(g).count()}, detached);
          else list_.add({}, detached);
        },
        params, gradients, moments_.mean, moments_.square);
  }
  template <class T> static void bring_up_to_date(Backend& backend, std::vector<T> const& next, std::vector<T>& known,
                                                  Tensor<T, 1, Backend>& there) {
    if (next == known) return;
    upload(backend, next, there);
    known = next;
  }
  DecideStep::Options decide_options() const {
    return {.learning_rate = options_.learning_rate,
            .beta_1 = options_.beta_1,
            .beta_2 = options_.beta_2,
            .epsilon = options_.epsilon,
            .weight_decay = options_.weight_decay,
            .max_norm = options_.max_norm,
            .bias_correction = options_.bias_correction};
  }

  AdamWOptions options_;
  Moments moments_;
  std::conditional_t<has_masters, Masters, Absent> masters_;
  detail::StepTensors<Scalar> list_;
  // The last uploaded values.
  std::vector<std::int32_t> known_roles_;
  std::vector<AdamWTensor<Scalar>> known_tensors_;
  double rate_ = 1;
  Index steps_ = 0, started_ = 0, unread_ = 0;
  Tensor<StepNumbers, 1, Backend> numbers_;   // [1]
  // For each tensor:
  Tensor<std::int32_t, 1, Backend> roles_;
  Tensor<AdamWTensor<Scalar>, 1, Backend> tensors_;
  Tensor<double, 1, Backend> squares_;
  Tensor<Index, 1, Backend> updates_;
  Tensor<AdamWRates, 1, Backend> rates_;
  Tensor<StepFault, 1, Backend> found_;
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/core/data_state.hpp
// Where a source of training data stands, as a checkpoint keeps it.
#ifndef HYBRIDATTN_CORE_DATA_STATE_HPP
#define HYBRIDATTN_CORE_DATA_STATE_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

// Where a source's training batches stand, and which source's they are.
struct DataState {
  std::string description;     // for whoever reads it
  std::uint64_t seed = 0;
  std::uint64_t content = 0;   // a hash of the text, or of the task's options
  std::uint64_t drawn = 0;     // random numbers, see Random

  friend bool operator==(DataState const&, DataState const&) = default;
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/io/escaped.hpp
// Text of untrusted files, escaped for error messages.
#ifndef HYBRIDATTN_IO_ESCAPED_HPP
#define HYBRIDATTN_IO_ESCAPED_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

namespace utf8 {

struct Character {
  std::size_t bytes = 0;   // 0: the text does not start with a character
  std::uint32_t point = 0;
};

// The first character of a text that is not empty. Overlong forms and surrogates are not characters.
inline Character first_character(std::string_view text) {
  auto const byte = [&](std::size_t i) { return static_cast<unsigned char>(text[i]); };
  std::uint32_t const lead = byte(0);
  if (lead < 0x80) return {1, lead};
  std::size_t const bytes = lead >= 0xf0 ? 4 : lead >= 0xe0 ? 3 : 2;
  static constexpr std::uint32_t smallest[] = {0, 0, 0x80, 0x800, 0x10000};
  if (lead < 0xc2 || lead > 0xf4 || text.size() < bytes) return {};
  std::uint32_t point = lead & (0x7fu >> bytes);
  for (std::size_t i = 1; i < bytes; ++i) {
    if ((byte(i) & 0xc0) != 0x80) return {};
    point = point << 6 | (byte(i) & 0x3fu);
  }
  bool const exists = point >= smallest[bytes] && point <= 0x10ffff && (point < 0xd800 || point > 0xdfff);
  return exists ? Character{bytes, point} : Character{};
}

// Whether a terminal shows the character as a letter. False for control characters, text directions and invisible marks.
inline bool is_plain(std::uint32_t point) {
  struct Range {
    std::uint32_t first, last;
  };
  static constexpr Range hidden[] = {{0, 0x1f},        {0x7f, 0x9f},     {0xad, 0xad},       {0x61c, 0x61c},
                                     {0x180e, 0x180e}, {0x200b, 0x200f}, {0x2028, 0x202e},   {0x2060, 0x206f},
                                     {0xfeff, 0xfeff}, {0xfff9, 0xfffb}, {0xe0000, 0xe0fff}, {0xf0000, 0x10ffff}};
  return std::ranges::none_of(hidden, [&](Range range) { return range.first <= point && point <= range.last; });
}

inline void append_hex(std::string& text, std::uint32_t number, int digits) {
  while (digits < 6 && number >> (4 * digits) != 0) ++digits;
  while (digits-- > 0) text += "0123456789abcdef"[number >> (4 * digits) & 15];
}

}  // namespace utf8

// A text on one line, cut after at most `longest` bytes. Other characters than plain ones are written \x1b, \u{202e}.
inline std::string one_line(std::string_view text, std::size_t longest = 4096) {
  std::string line;
  while (!text.empty()) {
    auto const [bytes, point] = utf8::first_character(text);
    std::string next{text.substr(0, std::max<std::size_t>(bytes, 1))};
    if (bytes == 0 || point < 0x20 || point == 0x7f) {
      std::uint32_t const byte = static_cast<unsigned char>(text[0]);
      next = "\\x";
      utf8::append_hex(next, byte, 2);
    } else if (!utf8::is_plain(point)) {
      next = "\\u{";
      utf8::append_hex(next, point, 2);
      next += '}';
    } else if (point == '\\') {
      next = "\\\\";
    }
    if (line.size() + next.size() > longest) return line + "...";
    line += next;
    text.remove_prefix(std::max<std::size_t>(bytes, 1));
  }
  return line;
}

// A name on one line, in quotes.
inline std::string escaped(std::string_view name) { return "'" + one_line(name, 80) + "'"; }

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/train/data.hpp
// Sources of tokens for training: the bytes of a text, or a synthetic task. They use the host's memory only.
#ifndef HYBRIDATTN_TRAIN_DATA_HPP
#define HYBRIDATTN_TRAIN_DATA_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

inline constexpr std::int32_t no_target = -100;   // the target of a position that is not counted

// `batch` windows of `seq_len` tokens, one after the other; targets[i] is the token after tokens[i].
struct Batch {
  Index batch = 0, seq_len = 0;
  std::vector<std::int32_t> tokens, targets;   // [batch * seq_len]

  // Throws Error where memory is short.
  void resize(Index windows, Index length) {
    Index const count = size_product(windows, length);
    hybridattn::resize(tokens, count, "a batch's tokens");
    hybridattn::resize(targets, count, "a batch's targets");
    batch = windows;
    seq_len = length;
  }
  std::span<std::int32_t> tokens_of(Index window) { return part(std::span(tokens), window); }
  std::span<std::int32_t> targets_of(Index window) { return part(std::span(targets), window); }
  std::span<std::int32_t const> tokens_of(Index window) const { return part(std::span(tokens), window); }
  std::span<std::int32_t const> targets_of(Index window) const { return part(std::span(targets), window); }

 private:
  template <class T> std::span<T> part(std::span<T> all, Index window) const {
    return all.subspan(static_cast<std::size_t>(window * seq_len), static_cast<std::size_t>(seq_len));
  }
};

inline void check_batch_size(Index batch, Index seq_len) {
  check(batch >= 1, "batch ", batch, " is not allowed; it must be at least 1");
  check(seq_len >= 2, "seq_len ", seq_len, " is not allowed; it must be at least 2, a token and its target");
}
inline void check_validation(Index batch, Index seq_len, Index windows) {
  check_batch_size(batch, seq_len);
  check(windows >= 1, "validation over ", windows, " windows is not allowed; there must be at least 1");
}

// Throws when batches of `from` are not batches of `to`, and names both.
inline void check_same_data(DataState const& from, DataState const& to) {
  if (from.content != to.content)
    fail("the data is not the same: the state is of '", one_line(from.description), "', this source is '", one_line(to.description), "'",
         from.description == to.description ? ", with another content" : "");
  check(from.seed == to.seed, "the data's seed is not the same: the state's is ", from.seed, ", this source's is ", to.seed);
}

// Training batches without end, and the same validation windows each time.
class DataSource {
 public:
  virtual ~DataSource() = default;
  virtual Index vocab_size() const = 0;
  virtual std::string description() const = 0;
  // Writes into the caller's batch. It allocates nothing while the size stays the same.
  virtual void next_batch(Index batch, Index seq_len, Batch& into) = 0;
  // Starts again: the next batch is the first one.
  virtual void restart() = 0;
  // The position among the batches. `restore` continues there, in this process or in another one. It throws Error when the state is of
  // other data or of another seed.
  virtual DataState state() const = 0;
  virtual void restore(DataState const& state) = 0;
  // At most `windows` windows, in batches; the last one may be smaller.
  virtual std::vector<Batch> validation_batches(Index batch, Index seq_len, Index windows = 200) const = 0;

  Batch next_batch(Index batch, Index seq_len) {
    Batch result;
    next_batch(batch, seq_len, result);
    return result;
  }
};

// The bytes of a text as tokens 0 .. 255; the last 10 % are held out.
class ByteText {
 public:
  static constexpr Index vocab_size = 256;

  explicit ByteText(std::string_view text) {
    reserve(tokens_, std::ssize(text), "a text's tokens");
    for (char c : text) {
      tokens_.push_back(static_cast<unsigned char>(c));
      hash_ = (hash_ ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
    }
  }
  // A hash of all bytes (FNV-1a).
  std::uint64_t hash() const { return hash_; }
  std::span<std::int32_t const> all() const { return tokens_; }
  std::span<std::int32_t const> train() const { return all().first(tokens_.size() - tokens_.size() / 10); }
  std::span<std::int32_t const> validation() const { return all().last(tokens_.size() / 10); }

 private:
  std::vector<std::int32_t> tokens_;
  std::uint64_t hash_ = 0xcbf29ce484222325u;
};

// A text's windows. Training windows start anywhere in the training part, uniformly; their last position has no target.
class Windows final : public DataSource {
 public:
  explicit Windows(ByteText text, Seed seed = {}, std::string name = "text")
      : text_(std::move(text)), seed_(seed), name_(std::move(name)) {}

  using DataSource::next_batch;
  Index vocab_size() const override { return ByteText::vocab_size; }
  std::string description() const override {
    auto const train = text_.train().size(), held_out = text_.validation().size();
    return name_ + ": " + std::to_string(train) + " bytes to train on, " + std::to_string(held_out) + " held out";
  }
  void next_batch(Index batch, Index seq_len, Batch& into) override {
    check_batch_size(batch, seq_len);
    auto const tokens = text_.train();
    auto const length = std::ssize(tokens);
    if (length / batch < seq_len)
      fail(one_line(name_), " has ", length, " bytes to train on (its first 90 %), too few for one batch of ", batch, " windows of ",
           seq_len);
    into.resize(batch, seq_len);
    for (Index window = 0; window < batch; ++window) copy(tokens, random_.below(length - seq_len + 1), into, window);
  }
  void restart() override { random_.jump_to(0); }
  DataState state() const override { return {description(), seed_.value, text_.hash(), random_.drawn()}; }
  void restore(DataState const& from) override {
    check_same_data(from, state());
    random_.jump_to(from.drawn);
  }
  // Evenly spaced over the held-out part, never overlapping.
  std::vector<Batch> validation_batches(Index batch, Index seq_len, Index windows = 200) const override {
    check_validation(batch, seq_len, windows);
    auto const tokens = text_.validation();
    auto const length = std::ssize(tokens);
    if (length < seq_len)
      fail(one_line(name_), " has ", length, " bytes to validate on (its last 10 %), too few for one window of ", seq_len);
    Index const count = std::min(windows, length / seq_len);
    check_memory(byte_count(size_product(count, seq_len), 2 * sizeof(std::int32_t)), "validation batches");
    std::vector<Batch> batches;
    for (Index first = 0; first < count; first += batch) {
      auto& into = batches.emplace_back();
      into.resize(std::min(batch, count - first), seq_len);
      for (Index i = 0; i < into.batch; ++i) copy(tokens, start(first + i, count, length - seq_len), into, i);
    }
    return batches;
  }

 private:
  // Window i of `count` between the first one at 0 and the last one at `last`.
  static Index start(Index i, Index count, Index last) {
    if (count == 1) return 0;
    Index const gaps = count - 1;
    return i * (last / gaps) + i * (last % gaps) / gaps;   // i * last / gaps, which a long text's last may overflow
  }
  static void copy(std::span<std::int32_t const> text, Index start, Batch& into, Index window) {
    auto const source = text.subspan(static_cast<std::size_t>(start), static_cast<std::size_t>(into.seq_len));
    auto const targets = into.targets_of(window);
    std::ranges::copy(source, into.tokens_of(window).begin());
    std::ranges::copy(source.subspan(1), targets.begin());
    targets.back() = no_target;
  }

  ByteText text_;
  Seed seed_;
  std::string name_;
  Random random_{seed_, "data"};
};

struct RecallOptions {
  Index vocab_size = 256;   // keys are 1 .. vocab_size/2 - 1, values the upper half
  Index pairs = 8;
};

// Multi-query associative recall (arXiv 2312.04927): key value key value ..., then each key once more, somewhere; there
// the model is to name its value. Only these positions have a target. Short distances are likelier, as in the paper; the
// tokens between are drawn from the values, so that no key stands anywhere else.
class RecallTask final : public DataSource {
 public:
  explicit RecallTask(Seed seed = {}, RecallOptions options = {}) : options_(options), seed_(seed) {
    check_at_least("recall", "pairs", options.pairs, 1);
    check_at_least("recall", "vocab_size", options.vocab_size, 4);
    check(options.vocab_size <= std::numeric_limits<std::int32_t>::max(), "recall: vocab_size ", options.vocab_size,
          " is not allowed; it must be at most ", std::numeric_limits<std::int32_t>::max(), ", since a token is a std::int32_t");
    check(options.pairs <= (options.vocab_size - 2) / 2, "recall: pairs ", options.pairs, " with vocab_size ", options.vocab_size,
          " is not allowed; a vocabulary has 2 tokens for each pair, and 2 more");
  }

  using DataSource::next_batch;
  Index vocab_size() const override { return options_.vocab_size; }
  std::string description() const override {
    return "synthetic recall of " + std::to_string(options_.pairs) + " pairs, vocabulary " + std::to_string(options_.vocab_size);
  }
  void next_batch(Index batch, Index seq_len, Batch& into) override { fill(train_, batch, seq_len, into); }
  void restart() override { train_.random.jump_to(0); }
  DataState state() const override {
    auto const options = mix(static_cast<std::uint64_t>(options_.vocab_size)) + static_cast<std::uint64_t>(options_.pairs);
    return {description(), seed_.value, mix(options), train_.random.drawn()};
  }
  void restore(DataState const& from) override {
    check_same_data(from, state());
    train_.random.jump_to(from.drawn);
  }
  std::vector<Batch> validation_batches(Index batch, Index seq_len, Index windows = 200) const override {
    check_validation(batch, seq_len, windows);
    check_memory(byte_count(size_product(windows, seq_len), 2 * sizeof(std::int32_t)), "validation batches");
    Stream stream{Random{seed_, "data.validation"}};
    std::vector<Batch> batches;
    for (Index left = windows; left > 0; left -= batch) fill(stream, std::min(batch, left), seq_len, batches.emplace_back());
    return batches;
  }

 private:
  struct QueryPlace {
    double order = 0;
    std::size_t number = 0;
  };
  // Random numbers, and memory for the parts of a window.
  struct Stream {
    Random random;
    std::vector<std::int32_t> keys = {}, values = {};   // [pairs]
    std::vector<QueryPlace> slots = {};                       // where queries can stand: every second position behind the pairs
  };

  void fill(Stream& stream, Index batch, Index seq_len, Batch& into) const {
    check_batch_size(batch, seq_len);
    check(seq_len >= 4 * options_.pairs, "seq_len ", seq_len, " is too short to ask for ", options_.pairs, " pairs; it must be at least ",
          4 * options_.pairs);
    into.resize(batch, seq_len);
    hybridattn::resize(stream.slots, (seq_len - 2 * options_.pairs) / 2, "the places of queries");
    Index const half = options_.vocab_size / 2;
    for (Index window = 0; window < batch; ++window) {
      draw_distinct(stream.random, 1, half, stream.keys);
      draw_distinct(stream.random, half, options_.vocab_size, stream.values);
      draw_slots(stream);
      write(stream, into.tokens_of(window), into.targets_of(window));
    }
  }
  // `pairs` different tokens from low .. high - 1.
  void draw_distinct(Random& random, Index low, Index high, std::vector<std::int32_t>& drawn) const {
    drawn.clear();
    while (std::ssize(drawn) < options_.pairs) {
      auto const token = static_cast<std::int32_t>(low + random.below(high - low));
      if (std::ranges::find(drawn, token) == drawn.end()) drawn.push_back(token);
    }
  }
  // The first `pairs` slots become those of the queries: drawn without replacement with weights i^-0.99, i = 1, 2, ...
  // (the paper's power law), which is taking the smallest of exponential variables with these rates.
  void draw_slots(Stream& stream) const {
    for (std::size_t i = 0; i < stream.slots.size(); ++i)
      stream.slots[i] = {-std::log(1.0 - stream.random.uniform()) * std::pow(static_cast<double>(i + 1), 0.99), i};
    std::ranges::partial_sort(stream.slots, stream.slots.begin() + options_.pairs, {}, &QueryPlace::order);
  }
  void write(Stream& stream, std::span<std::int32_t> tokens, std::span<std::int32_t> targets) const {
    Index const half = options_.vocab_size / 2;
    for (auto& token : tokens) token = static_cast<std::int32_t>(half + stream.random.below(options_.vocab_size - half));
    std::ranges::fill(targets, no_target);
    std::size_t const pairs = stream.keys.size();
    for (std::size_t pair = 0; pair < pairs; ++pair) {
      std::size_t const query = 2 * (pairs + stream.slots[pair].number);
      tokens[2 * pair] = tokens[query] = stream.keys[pair];
      tokens[2 * pair + 1] = targets[query] = stream.values[pair];
    }
  }

  RecallOptions options_;
  Seed seed_;
  Stream train_{Random{seed_, "data"}};
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/train/schedule.hpp
// Learning rates over the steps of a run.
#ifndef HYBRIDATTN_TRAIN_SCHEDULE_HPP
#define HYBRIDATTN_TRAIN_SCHEDULE_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

// The factor for the learning rate of step 0, 1, 2, ... It is linear from 0 over warmup_steps, then half a cosine from 1 down to
// min_rate at total_steps, where it stays. Where the warm-up takes all steps or more, the rate stays 1 after it.
struct Schedule {
  Index warmup_steps = 0;
  Index total_steps = 0;    // 0: constant after the warm-up
  double min_rate = 0;      // share of the learning rate that is left at the end, in [0, 1]

  // Throws on numbers that no schedule can have, and on a step below 0.
  double operator()(Index step) const {
    check_at_least("Schedule", "warmup_steps", warmup_steps, 0);
    check_at_least("Schedule", "total_steps", total_steps, 0, ", where 0 stands for no end");
    check_share("Schedule", "min_rate", min_rate);
    check_at_least("Schedule", "step", step, 0);
    if (step < warmup_steps) return static_cast<double>(step) / static_cast<double>(warmup_steps);
    if (total_steps <= warmup_steps) return 1;
    double const progress = std::min(1.0, static_cast<double>(step - warmup_steps) / static_cast<double>(total_steps - warmup_steps));
    return min_rate + (1 - min_rate) * 0.5 * (1 + std::cos(std::numbers::pi * progress));
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/train/train_step.hpp
// One step of training.
#ifndef HYBRIDATTN_TRAIN_TRAIN_STEP_HPP
#define HYBRIDATTN_TRAIN_TRAIN_STEP_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

// Windows of a data source (train/data.hpp) on a machine.
template <class B> TokenBatch<B> make_batch(B& backend, Batch const& host) {
  return make_batch(backend, Sequences::equal(host.batch, host.seq_len), host.tokens, host.targets);
}

// The numbers of a step.
struct StepResult {
  LossSum loss;               // over the batch's counted tokens, before the step
  double auxiliary_loss = 0;  // load balancing and policies, weighted
  double policy_loss = 0;     // the part of the policies, such as DSA's indexers, in stages that train it
  double gradient_norm = 0;   // before clipping
};

struct StepOptions {
  double rate = 1;                      // factor for the learning rate
  Stage stage = Stage::language_model;  // what is trained
};

namespace detail {

// Remembers the path of the first tensor that holds a NaN or an infinity.
template <class B> struct FindNotFinite {
  B& backend;
  std::string found = {};

  template <class T, int Rank> [[gnu::cold]] void operator()(Path const& path, Tensor<T, Rank, B> const& tensor) {
    if constexpr (std::is_floating_point_v<wide_t<T>>)
      if (found.empty() && !On<AllFinite, B>::forward(backend, flat(in(tensor)))) found = path.str();
  }
};
template <class B, class Group> [[gnu::cold]] std::string first_not_finite(B& backend, Group const& group) {
  FindNotFinite<B> find{backend};
  zip(find, group);
  return find.found;
}
// Finds the first tensor that is not finite, by another forward.
template <class B, class Model, class Params>
[[gnu::cold]] std::string origin(B& backend, Model const& model, Params const& params, std::span<TokenBatch<B> const> batches) {
  std::string const first = "; the first tensor that is not finite is the ";
  if (auto const path = first_not_finite(backend, params); !path.empty()) return first + "parameter " + path;
  for (auto const& batch : batches)
    if (auto const path = first_not_finite(backend, model.forward(backend, params, batch)); !path.empty())
      return first + "activation " + path;
  return "; parameters and activations are finite";
}

// The sum of the gradients of several batches, in float where the gradients are in bf16.
template <class Params> struct GradientSum {
  using Scalar = scalar_of<Params>;
  widened<Params> gradients;
  View<wide_t<Scalar>, 1> all;
  bool begun = false;

  template <class B, class Gradients> void add(B& backend, Gradients more) {
    if constexpr (std::is_same_v<widened<Params>, Params>) {
      if (begun) {
        On<Add, B>::forward(backend, View<Scalar const, 1>(more.all), all);
      } else {
        gradients = std::move(more.params);
        all = more.all;
      }
    } else if (begun) {
      zip(
          [&](Path const&, auto const& x, auto& y) {
            if (x) On<Add, B>::forward(backend, flat(in(x)), flat(out(y)));
          },
          more.params, gradients);
    } else {
      gradients = widen(backend, more.params);
    }
    begun = true;
  }
};

}  // namespace detail

// A step that was started.
template <class B, class Params> class PendingStep {
 public:
  PendingStep(B& backend, AdamW<Params>& optimizer) : backend_(backend), optimizer_(optimizer), number_(optimizer.started()) {}

  // Waits for the step. Throws Error where this step, or another one since the last read, was bad. A bad step changes nothing and is
  // not counted. The error names the first bad step, its fault and its tensor. Only the step that was started last can be read.
  StepResult read() const {
    return read([] { return std::string{}; });
  }
  template <class Origin> StepResult read(Origin origin) const {
    check(optimizer_.started() == number_, "the step is not the last one any more: only the numbers of the last one are kept");
    StepNumbers const numbers = optimizer_.read(backend_, origin);
    check(numbers.fault == StepFault::none, "step ", numbers.steps + 1, ": it was bad, as an earlier read of it said");
    return {numbers.loss, numbers.auxiliary_loss, numbers.policy_loss, numbers.gradient_norm};
  }

 private:
  B& backend_;
  AdamW<Params>& optimizer_;
  Index number_;
};

// The function between backward and update. Where several processes train one model, theirs adds up the gradients, which are in one
// block, and the losses among the numbers. Each process has the gradient of the mean over its own numbers(0).counted tokens. The mean
// over the tokens of all processes weights this gradient by that count. This default is for one process: it exchanges nothing.
struct NoExchange {
  template <class B, class Params> void operator()(B&, Params&, View<StepNumbers, 1>) const {}
};

// Starts one step down the gradients of the mean loss over all counted tokens of several batches. Only one batch has activations in
// memory at a time. It waits for nothing: a loop that prints every tenth step reads every tenth step. It calls
// exchange(backend, gradients, numbers) once.
template <class B, class Model, class Params, class Exchange = NoExchange>
PendingStep<B, Params> start_step(B& backend, Model const& model, Params& params, AdamW<Params>& optimizer,
                                  std::span<TokenBatch<B> const> batches, StepOptions options = {}, Exchange exchange = {}) {
  check(!batches.empty(), "a training step needs at least one batch");
  check_not_negative("StepOptions", "rate", options.rate);
  if (options.stage != model.stage()) return start_step(backend, model.at(options.stage), params, optimizer, batches, options, exchange);
  double const share = 1 / static_cast<double>(batches.size());

  optimizer.open(backend, options.rate);
  StepNumbers* const numbers = optimizer.numbers().data;   // on the machine
  View<double, 1> const scale{&numbers->scale, {1}};
  for (auto const& batch : batches) On<CountTargets, B>::forward(backend, in(batch.targets), View<Index, 1>{&numbers->counted, {1}}, scale);
  detail::GradientSum<Params> sum;
  for (std::size_t i = 0; i < batches.size(); ++i) {
    auto saved = model.forward(backend, params, batches[i]);
    auto more = model.backward(backend, params, batches[i], std::move(saved), View<double const, 1>(scale), share);
    On<AddBatchLosses, B>::forward(backend, share, in(more.losses), optimizer.numbers());
    sum.add(backend, std::move(more));
  }
  exchange(backend, sum.gradients, optimizer.numbers());
  optimizer.start(backend, params, sum.gradients, options.stage == Stage::sparse ? model.detached() : std::vector<bool>{});
  return {backend, optimizer};
}
template <class B, class Model, class Params>
PendingStep<B, Params> start_step(B& backend, Model const& model, Params& params, AdamW<Params>& optimizer, TokenBatch<B> const& batch,
                                  StepOptions options = {}) {
  return start_step(backend, model, params, optimizer, std::span<TokenBatch<B> const>(&batch, 1), options);
}

// Starts the same step and waits for it. It first reads steps that nobody read. Throws Error, with step and tensor, when a loss or a
// gradient is not finite, or would make a parameter or a moment infinite or NaN. Parameters and moments then stay as they were.
template <class B, class Model, class Params>
StepResult accumulated_step(B& backend, Model const& model, Params& params, AdamW<Params>& optimizer,
                            std::span<TokenBatch<B> const> batches, StepOptions options = {}) {
  if (optimizer.unread() > 0) optimizer.read(backend);   // throws for a bad one before this step moves anything
  auto const step = start_step(backend, model, params, optimizer, batches, options);
  return step.read([&] { return detail::origin(backend, model.at(options.stage), params, batches); });
}
template <class B, class Model, class Params>
StepResult train_step(B& backend, Model const& model, Params& params, AdamW<Params>& optimizer, TokenBatch<B> const& batch,
                      StepOptions options = {}) {
  return accumulated_step(backend, model, params, optimizer, std::span<TokenBatch<B> const>(&batch, 1), options);
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/hybridattn.hpp
// hybridattn: language models with hybrid attention, as C++ types. The one door: include this.
#ifndef HYBRIDATTN_HYBRIDATTN_HPP
#define HYBRIDATTN_HYBRIDATTN_HPP

#if HYBRIDATTN_CUDA

// ==== hybridattn/backend/gpu/call_site.hpp
// Where a kernel calls a word of simt.hpp.
#ifndef HYBRIDATTN_BACKEND_GPU_CALL_SITE_HPP
#define HYBRIDATTN_BACKEND_GPU_CALL_SITE_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::simt {

// A line of source. As a default argument, here() is the line that calls the function: void f(CallSite at = CallSite::here()).
struct CallSite {
  char const* file = "";
  int line = 0;

  static HYBRIDATTN_HD constexpr CallSite here(char const* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::simt
#endif

// ==== hybridattn/backend/gpu/simt.hpp
// The words that kernels are written in. Under nvcc they are the GPU's own, under any other compiler the emulator's.
//   thread_id, block_x, block_y, block_z   the number of a thread in its block, and of the block in the grid
//   sync_block, sync_warp                  every thread of the block, or lane of the warp, waits for all others and sees what they wrote
//   shuffle, shuffle_xor, shuffle_up, shuffle_down   the value that lane n, own ^ mask, own - distance or own + distance gives
//   ballot                                 the set of lanes that vote true
//   match_any                              the set of lanes with the same value
//   atomic_add, atomic_max                 on integers alone, return the old value. Sums of floats in any order are not repeatable
//   rounded_product                        a b, rounded: never fused with a sum, so that it has the same bits wherever it is computed
//   exp2, log2, cos_pi, sin_pi             cos and sin of pi x. Those of x itself need local memory for large x
// All lanes of a warp take part in a word of the warp, and all threads of a block in sync_block, at the same line of the source.
#ifndef HYBRIDATTN_BACKEND_GPU_SIMT_HPP
#define HYBRIDATTN_BACKEND_GPU_SIMT_HPP

#include <cstdint>
#include <cstring>

#if HYBRIDATTN_CUDA

// ==== hybridattn/backend/cuda/simt.cuh
// The words of kernels on a GPU; backend/gpu/simt.hpp lists and explains them.
#ifndef HYBRIDATTN_BACKEND_CUDA_SIMT_CUH
#define HYBRIDATTN_BACKEND_CUDA_SIMT_CUH

#include <concepts>
#include <cstdint>
#include <type_traits>

namespace hybridattn::inline HYBRIDATTN_ABI::simt {

HYBRIDATTN_DEVICE int thread_id() { return static_cast<int>(threadIdx.x); }
HYBRIDATTN_DEVICE Index block_x() { return blockIdx.x; }
HYBRIDATTN_DEVICE Index block_y() { return blockIdx.y; }
HYBRIDATTN_DEVICE Index block_z() { return blockIdx.z; }

HYBRIDATTN_DEVICE void sync_block(CallSite = CallSite::here()) { __syncthreads(); }
HYBRIDATTN_DEVICE void sync_warp(CallSite = CallSite::here()) { __syncwarp(); }

namespace detail {
// f(word) for the words of 4 bytes that x is made of.
template <class T, class F> HYBRIDATTN_DEVICE T by_words(T x, F f) {
  static_assert(sizeof(T) <= 8, "lanes exchange at most 8 bytes at a time");
  unsigned words[(sizeof(T) + 3) / 4] = {};
  memcpy(words, &x, sizeof x);
  HYBRIDATTN_UNROLL_IN_KERNEL
  for (unsigned& word : words) word = f(word);
  memcpy(&x, words, sizeof x);
  return x;
}
// Integers of the two sizes that the GPU's atomics have.
template <class T> using AtomicOf =
    std::conditional_t<sizeof(T) == 8, unsigned long long, std::conditional_t<std::is_signed_v<T>, int, unsigned>>;
}  // namespace detail
template <class T> HYBRIDATTN_DEVICE T shuffle(T x, int lane, CallSite = CallSite::here()) {
  return detail::by_words(x, [&](unsigned word) { return __shfl_sync(~0u, word, lane); });
}
template <class T> HYBRIDATTN_DEVICE T shuffle_xor(T x, int mask, CallSite = CallSite::here()) {
  return detail::by_words(x, [&](unsigned word) { return __shfl_xor_sync(~0u, word, mask); });
}
template <class T> HYBRIDATTN_DEVICE T shuffle_up(T x, int distance, CallSite = CallSite::here()) {
  return detail::by_words(x, [&](unsigned word) { return __shfl_up_sync(~0u, word, static_cast<unsigned>(distance)); });
}
template <class T> HYBRIDATTN_DEVICE T shuffle_down(T x, int distance, CallSite = CallSite::here()) {
  return detail::by_words(x, [&](unsigned word) { return __shfl_down_sync(~0u, word, static_cast<unsigned>(distance)); });
}
HYBRIDATTN_DEVICE std::uint32_t ballot(bool vote, CallSite = CallSite::here()) { return __ballot_sync(~0u, vote); }
template <std::integral T> HYBRIDATTN_DEVICE std::uint32_t match_any(T x, CallSite = CallSite::here()) {
  if constexpr (sizeof(T) == 8) return __match_any_sync(~0u, static_cast<unsigned long long>(x));
  else return __match_any_sync(~0u, static_cast<unsigned>(x));
}

template <std::integral T> HYBRIDATTN_DEVICE T atomic_add(T* at, T x) {
  using Atomic = detail::AtomicOf<T>;
  return static_cast<T>(atomicAdd(reinterpret_cast<Atomic*>(at), static_cast<Atomic>(x)));
}
template <std::integral T> HYBRIDATTN_DEVICE T atomic_max(T* at, T x) {
  using Atomic = std::conditional_t<sizeof(T) == 8 && std::is_signed_v<T>, long long, detail::AtomicOf<T>>;
  return static_cast<T>(atomicMax(reinterpret_cast<Atomic*>(at), static_cast<Atomic>(x)));
}

HYBRIDATTN_DEVICE float rounded_product(float a, float b) { return __fmul_rn(a, b); }
HYBRIDATTN_DEVICE double rounded_product(double a, double b) { return __dmul_rn(a, b); }
HYBRIDATTN_DEVICE float exp2(float x) { return exp2f(x); }
HYBRIDATTN_DEVICE double exp2(double x) { return ::exp2(x); }
HYBRIDATTN_DEVICE float log2(float x) { return log2f(x); }
HYBRIDATTN_DEVICE double log2(double x) { return ::log2(x); }
HYBRIDATTN_DEVICE double cos_pi(double x) { return cospi(x); }
HYBRIDATTN_DEVICE double sin_pi(double x) { return sinpi(x); }

}  // namespace hybridattn::inline HYBRIDATTN_ABI::simt
#endif

// ==== hybridattn/backend/gpu/simt.hpp
#else

// ==== hybridattn/backend/emulator/fiber.hpp
// Functions that stop in the middle and go on later, each on a stack of its own (Boost.Context).
#ifndef HYBRIDATTN_BACKEND_EMULATOR_FIBER_HPP
#define HYBRIDATTN_BACKEND_EMULATOR_FIBER_HPP

#include <boost/context/detail/fcontext.hpp>
#include <sys/mman.h>

#include <cstddef>
#include <mutex>
#include <vector>

#if HYBRIDATTN_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if HYBRIDATTN_TSAN
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(char const* file, int line);
void AnnotateIgnoreReadsEnd(char const* file, int line);
void AnnotateIgnoreWritesBegin(char const* file, int line);
void AnnotateIgnoreWritesEnd(char const* file, int line);
}
#endif

namespace hybridattn::inline HYBRIDATTN_ABI::emulator {

// The thread sanitizer sees each fiber as a thread. Unwatched hides the engine's own memory from it, Watched shows the kernel's again.
#if HYBRIDATTN_TSAN
struct Unwatched {
  Unwatched() { begin(); }
  Unwatched(Unwatched const&) = delete;
  Unwatched& operator=(Unwatched const&) = delete;
  ~Unwatched() { end(); }
  static void begin() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  static void end() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
};
struct Watched {
  Watched() { Unwatched::end(); }
  Watched(Watched const&) = delete;
  Watched& operator=(Watched const&) = delete;
  ~Watched() { Unwatched::begin(); }
};
// What a thread did before release(meeting) is seen by the threads that acquire(meeting) later.
inline void release(void* meeting) { __tsan_release(meeting); }
inline void acquire(void* meeting) { __tsan_acquire(meeting); }
#else
struct Unwatched {
  Unwatched() {}
};
struct Watched {
  Watched() {}
};
inline void release(void*) {}
inline void acquire(void*) {}
#endif

// Stacks for fibers. A stack that a fiber gives back serves a later one, so that an emulator starts quickly.
class Stacks {
 public:
  static constexpr std::size_t bytes = std::size_t{256} << 10;   // of addresses; pages come when they are touched

  // The lowest address of a stack. Throws Error where the system refuses it.
  static char* take() {
    std::lock_guard const lock(mutex());
    if (!free().empty()) {
      char* const stack = free().back();
      free().pop_back();
      return stack;
    }
    void* const memory = mmap(nullptr, bytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    check(memory != MAP_FAILED, "Emulator: the system refuses ", bytes, " bytes for the stack of a thread");
    mprotect(memory, page, PROT_NONE);   // a stack that is too small ends the program here
    return static_cast<char*>(memory) + page;
  }
  static void give(char* stack) {
    std::lock_guard const lock(mutex());
    free().push_back(stack);
  }

 private:
  static constexpr std::size_t page = 4096;
  // Both live as long as the program, because an emulator may live that long.
  static std::vector<char*>& free() {
    static auto* const list = new std::vector<char*>;
    return *list;
  }
  static std::mutex& mutex() {
    static auto* const only = new std::mutex;
    return *only;
  }
};

class Fiber {
 public:
  Fiber() = default;
  Fiber(Fiber const&) = delete;
  Fiber& operator=(Fiber const&) = delete;
  ~Fiber() {
#if HYBRIDATTN_TSAN
    if (stack_ != nullptr && as_thread_ != nullptr) __tsan_destroy_fiber(as_thread_);
#endif
    if (stack_ == nullptr) return;
    clear_stack();
    Stacks::give(stack_);
  }

  // The next switch to this fiber calls entry(argument), which may not return. What the fiber did before is forgotten.
  void start(void (*entry)(void*), void* argument) {
    if (stack_ == nullptr) take_stack();
    clear_stack();
    entry_ = entry;
    argument_ = argument;
    context_ = boost::context::detail::make_fcontext(stack_ + Stacks::bytes, Stacks::bytes, enter);
#if HYBRIDATTN_TSAN
    if (as_thread_ != nullptr) __tsan_destroy_fiber(as_thread_);
    as_thread_ = __tsan_create_fiber(0);
#endif
  }
  // The calling thread's own stack becomes this fiber.
  void adopt_thread() {
#if HYBRIDATTN_TSAN
    as_thread_ = __tsan_get_current_fiber();
#endif
#if HYBRIDATTN_ASAN
    sanitizer_bottom_ = nullptr;   // learned when the first fiber begins
#endif
  }

  // Goes on in `to`, until something switches back to this fiber.
#if HYBRIDATTN_TSAN
  __attribute__((no_sanitize_thread))
#endif
  void
  switch_to(Fiber& to) {
    Leaving leaving{this, &to};
#if HYBRIDATTN_ASAN
    __sanitizer_start_switch_fiber(&fake_stack_, to.sanitizer_bottom_, to.sanitizer_size_);
#endif
#if HYBRIDATTN_TSAN
    __tsan_switch_to_fiber(to.as_thread_, __tsan_switch_to_fiber_no_sync);
#endif
    arrived(boost::context::detail::jump_fcontext(to.context_, &leaving));
  }

 private:
  struct Leaving {
    Fiber *from, *to;
  };

  void take_stack() {
    stack_ = Stacks::take();
#if HYBRIDATTN_ASAN
    sanitizer_bottom_ = stack_;
    sanitizer_size_ = Stacks::bytes;
#endif
  }
  void clear_stack() {
#if HYBRIDATTN_ASAN
    __asan_unpoison_memory_region(stack_, Stacks::bytes);   // of a function that was stopped for ever
    fake_stack_ = nullptr;
#endif
#if HYBRIDATTN_TSAN   // new memory, where the sanitizer knows of no earlier thread
    mmap(stack_, Stacks::bytes, PROT_READ | PROT_WRITE, MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
#endif
  }
  HYBRIDATTN_UNWATCHED static void arrived(boost::context::detail::transfer_t transfer) {
    auto const [from, to] = *static_cast<Leaving*>(transfer.data);
    from->context_ = transfer.fctx;
#if HYBRIDATTN_ASAN
    void const* bottom;
    std::size_t size;
    __sanitizer_finish_switch_fiber(to->fake_stack_, &bottom, &size);
    if (from->stack_ == nullptr) {
      from->sanitizer_bottom_ = bottom;
      from->sanitizer_size_ = size;
    }
#else
    (void)to;
#endif
  }
  HYBRIDATTN_UNWATCHED static void enter(boost::context::detail::transfer_t transfer) {
    Fiber& self = *static_cast<Leaving*>(transfer.data)->to;
    arrived(transfer);
    self.entry_(self.argument_);
  }

  char* stack_ = nullptr;   // nullptr: the stack of a thread
  boost::context::detail::fcontext_t context_ = nullptr;
  void (*entry_)(void*) = nullptr;
  void* argument_ = nullptr;
#if HYBRIDATTN_ASAN
  void* fake_stack_ = nullptr;
  void const* sanitizer_bottom_ = nullptr;
  std::size_t sanitizer_size_ = 0;
#endif
#if HYBRIDATTN_TSAN
  void* as_thread_ = nullptr;
#endif
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::emulator
#endif

// ==== hybridattn/backend/emulator/mutation.hpp
// Leaves out one barrier of a kernel at run time, so that a test can show that the laws notice it.
#ifndef HYBRIDATTN_BACKEND_EMULATOR_MUTATION_HPP
#define HYBRIDATTN_BACKEND_EMULATOR_MUTATION_HPP

#include <cstring>
#include <mutex>
#include <vector>

namespace hybridattn::inline HYBRIDATTN_ABI::emulator {

inline bool same(simt::CallSite a, simt::CallSite b) { return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0); }

// Of all emulators of the program. Change it only while no kernel runs.
struct Mutation {
  bool records = false;
  std::vector<simt::CallSite> reached;   // the barriers that kernels reach while `records` is true
  simt::CallSite left_out;               // the barrier that kernels pass without waiting; line 0: none

  // Whether a kernel passes this barrier without waiting.
  bool passes(simt::CallSite at) {
    if (records) record(at);
    return left_out.line != 0 && same(left_out, at);
  }

 private:
  void record(simt::CallSite at) {
    std::lock_guard const lock(mutex_);
    for (simt::CallSite known : reached)
      if (same(known, at)) return;
    reached.push_back(at);
  }
  std::mutex mutex_;
};
inline Mutation& mutation() {
  static Mutation only;
  return only;
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::emulator
#endif

// ==== hybridattn/backend/emulator/schedule.hpp
// In which order the emulator runs the threads of a block.
#ifndef HYBRIDATTN_BACKEND_EMULATOR_SCHEDULE_HPP
#define HYBRIDATTN_BACKEND_EMULATOR_SCHEDULE_HPP

#include <bit>
#include <cstdint>

namespace hybridattn::inline HYBRIDATTN_ABI::emulator {

// Schedule `number`, from 1 on. Orders of warps and lanes are forward, backward and random. In the odd ones of 1 .. 6 a warp runs until
// it must wait, in the even ones the warps take turns. A block's random numbers depend on the schedule and the block alone.
class Schedule {
 public:
  explicit Schedule(int number) : order_(static_cast<Order>((number - 1) % 3)), takes_turns_(number % 2 == 0), number_(number) {}

  void start_block(Index block) {
    random_ = static_cast<std::uint64_t>(block + 1) * 0x9e3779b97f4a7c15u + static_cast<std::uint64_t>(number_);
  }
  // The warp that runs next, of those in the set, after `last`.
  int next_warp(std::uint32_t ready, int last) {
    std::uint32_t const others = ready & ~(1u << last);
    if (!takes_turns_ && others != ready) return last;
    return pick(takes_turns_ && others != 0 ? others : ready);
  }
  int next_lane(std::uint32_t ready) { return pick(ready); }

 private:
  enum class Order { forward, backward, random };

  int pick(std::uint32_t set) {
    if (order_ == Order::forward) return std::countr_zero(set);
    if (order_ == Order::backward) return 31 - std::countl_zero(set);
    random_ ^= random_ << 13, random_ ^= random_ >> 7, random_ ^= random_ << 17;
    for (auto skip = random_ % static_cast<std::uint64_t>(std::popcount(set)); skip > 0; --skip) set &= set - 1;
    return std::countr_zero(set);
  }

  Order order_;
  bool takes_turns_;
  int number_;
  std::uint64_t random_ = 0;
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::emulator
#endif

// ==== hybridattn/backend/emulator/shared_memory.hpp
// The shared memory of a block. It begins as NaN in every type of number, and red zones stand before and behind it.
#ifndef HYBRIDATTN_BACKEND_EMULATOR_SHARED_MEMORY_HPP
#define HYBRIDATTN_BACKEND_EMULATOR_SHARED_MEMORY_HPP

#include <algorithm>
#include <cstddef>
#include <memory>
#include <new>
#include <vector>

namespace hybridattn::inline HYBRIDATTN_ABI::emulator {

class SharedMemory {
 public:
  static constexpr Index intact = std::numeric_limits<Index>::min();

  void start_block(std::size_t bytes) {
    std::size_t const all = bytes + 2 * zone;
    if (HYBRIDATTN_TSAN || blocks_.empty() || size_ < all) {   // the thread sanitizer would see blocks meet in memory that they share
      if (!HYBRIDATTN_TSAN) blocks_.clear();
      blocks_.emplace_back(static_cast<std::byte*>(::operator new(all, alignment)));
      size_ = all;
    }
    bytes_ = bytes;
    std::fill_n(begin(), all, unwritten);
  }
  void end_launch() {
    if (HYBRIDATTN_TSAN) blocks_.clear();
  }
  void* data() const { return begin() + zone; }
  // Where a red zone was written, in bytes from the start of the shared memory, or `intact`.
  Index overwritten() const {
    for (std::size_t i = 0; i < zone; ++i) {
      if (begin()[zone - 1 - i] != unwritten) return -1 - static_cast<Index>(i);
      if (begin()[zone + bytes_ + i] != unwritten) return static_cast<Index>(bytes_ + i);
    }
    return intact;
  }

 private:
  static constexpr std::align_val_t alignment{128};
  static constexpr std::size_t zone = 256;
  static constexpr std::byte unwritten{0xff};
  struct Delete {
    void operator()(std::byte* memory) const { ::operator delete(memory, alignment); }
  };

  std::byte* begin() const { return blocks_.back().get(); }

  std::vector<std::unique_ptr<std::byte, Delete>> blocks_;   // one, and more only under the thread sanitizer
  std::size_t size_ = 0, bytes_ = 0;
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::emulator
#endif

// ==== hybridattn/backend/emulator/engine.hpp
// Runs the blocks of a kernel on one thread of the host. Every thread of a block is a fiber.
#ifndef HYBRIDATTN_BACKEND_EMULATOR_ENGINE_HPP
#define HYBRIDATTN_BACKEND_EMULATOR_ENGINE_HPP

#include <array>
#include <exception>
#include <memory>
#include <string>
#include <utility>

namespace hybridattn::inline HYBRIDATTN_ABI::emulator {

// A launch, without the kernel's type.
struct Launch {
  std::string (*kernel)();   // its name
  void (*run)(void* shared, void const* params);
  void const* params;
  int threads;   // of a block
  std::size_t shared_bytes;
  Grid grid;
};

// A thread of the current block.
struct Thread {
  enum class State : char { ready, in_warp, in_block, ended };
  Fiber fiber;
  int number = 0;
  State state = State::ready;
  char const* word = "";      // where it waits: a word of simt.hpp
  simt::CallSite at;          // and the line that calls the word
  alignas(16) std::byte given[16] = {}, received[16] = {};   // what lanes exchange
};

class Engine {
 public:
  explicit Engine(Schedule schedule) : schedule_(schedule) {}

  // Throws Error where the block makes a mistake: barriers that not all threads reach, an end while others wait, a deadlock, writes
  // beside shared memory. The error names the kernel, the block, and where its threads wait.
  void run_block(Launch const& launch, Grid block) {
    Unwatched const unwatched;
    launch_ = &launch;
    block_ = block;
    schedule_.start_block((block.z * launch.grid.y + block.y) * launch.grid.x + block.x);
    shared_.start_block(launch.shared_bytes);
    shared_data_ = shared_.data();
    start_threads();
    Engine* const outer = std::exchange(current(), this);
    host_.adopt_thread();
    release(&start_);
    go_on(host_);
    current() = outer;
    if (failure_ != nullptr) std::rethrow_exception(std::exchange(failure_, nullptr));
    if (!mistake_.empty()) fail(std::exchange(mistake_, {}));
    if (Index const place = shared_.overwritten(); place != SharedMemory::intact)
      fail(sentence("Emulator: ", where(), " writes beside its shared memory, ", place, " bytes from its start"));
  }
  // After the last block of a launch.
  void end_launch() {
    acquire(&end_);
    shared_.end_launch();
  }

  // The engine whose kernel runs on this thread of the host.
  HYBRIDATTN_UNWATCHED static Engine*& current() {
    static constinit thread_local Engine* engine = nullptr;
    return engine;
  }
  HYBRIDATTN_UNWATCHED Thread& self() { return *self_; }
  HYBRIDATTN_UNWATCHED Grid const& block() const { return block_; }

  // Waits for all threads of the block.
  void sync_block(simt::CallSite at) {
    Unwatched const unwatched;
    if (mutation().passes(at)) return;
    Thread& me = *self_;
    me.word = "sync_block";
    me.at = at;
    if (ended_ > 0) stop("waits for threads that have ended");
    if (in_block_ > 0 && !same(at, block_site_)) stop("waits at another sync_block than other threads of its block");
    block_site_ = at;
    void* const meeting = &block_meetings_[block_phase_ % 2];
    release(meeting);
    if (++in_block_ == launch_->threads) {
      in_block_ = 0;
      ++block_phase_;
      for (int i = 0; i < launch_->threads; ++i) wake(threads_[static_cast<std::size_t>(i)]);
    } else {
      me.state = Thread::State::in_block;
    }
    go_on(me.fiber);
    acquire(meeting);
  }

  // Waits for all lanes of the warp. The last one to arrive calls exchange(lanes), which reads what they gave and sets what they receive.
  enum class Memory : char { as_it_is, ordered };  // ordered: every lane sees what the others wrote before
  template <class Exchange> void meet(char const* word, simt::CallSite at, Memory memory, Exchange exchange) {
    Thread& me = *self_;
    Warp& warp = warps_[static_cast<std::size_t>(me.number / 32)];
    me.word = word;
    me.at = at;
    if (warp.ended != 0) stop("needs all lanes of its warp, but some have ended");
    if (warp.arrived != 0 && (!same(at, warp.site) || std::strcmp(word, warp.word) != 0))
      stop(sentence("waits at ", word, " while other lanes of its warp wait at ", warp.word));
    warp.site = at;
    warp.word = word;
    warp.arrived |= 1u << me.number % 32;
    void* const meeting = &warp.meetings[warp.phase % 2];
    if (memory == Memory::ordered) release(meeting);
    if (warp.arrived == ~0u) {
      Thread* const lanes = &threads_[static_cast<std::size_t>(me.number / 32 * 32)];
      exchange(lanes);
      warp.arrived = 0;
      ++warp.phase;
      for (int lane = 0; lane < 32; ++lane) wake(lanes[lane]);
    } else {
      me.state = Thread::State::in_warp;
    }
    go_on(me.fiber);
    if (memory == Memory::ordered) acquire(meeting);
  }

 private:
  struct Warp {
    std::uint32_t ready = 0, arrived = 0, ended = 0;  // sets of lanes
    char const* word = "";
    simt::CallSite site;
    unsigned phase = 0;
    std::array<char, 16> meetings[2] = {};
  };
  static constexpr int most_threads = 1024;

  void start_threads() {
    if (threads_ == nullptr) threads_ = std::make_unique<Thread[]>(most_threads);
    ended_ = in_block_ = 0;
    last_warp_ = 0;
    warps_ready_ = 0;
    for (int i = 0; i < launch_->threads / 32; ++i) {
      Warp& warp = warps_[static_cast<std::size_t>(i)];
      warp.ready = warp.arrived = warp.ended = 0;
    }
    for (int i = 0; i < launch_->threads; ++i) {
      Thread& thread = threads_[static_cast<std::size_t>(i)];
      thread.number = i;
      thread.fiber.start(run_thread, &thread);
      wake(thread);
    }
  }
  HYBRIDATTN_UNWATCHED static void run_thread(void* thread) {
    Engine& engine = *current();
    acquire(&engine.start_);
    try {
      engine.launch_->run(engine.shared_data_, engine.launch_->params);
    } catch (...) {
      engine.failure_ = std::current_exception();
    }
    engine.end_thread(*static_cast<Thread*>(thread));
  }
  void end_thread(Thread& me) {
    Fiber* next = &host_;
    release(&end_);
    {
      Unwatched const unwatched;
      me.state = Thread::State::ended;
      me.word = "its end";
      Warp& warp = warps_[static_cast<std::size_t>(me.number / 32)];
      warp.ended |= 1u << me.number % 32;
      ++ended_;
      if (warp.arrived != 0) mistake_ = report("ends while other lanes of its warp wait for it");
      else if (in_block_ > 0) mistake_ = report("ends while other threads of its block wait for it");
      next = &choose();
    }
    me.fiber.switch_to(*next);
  }

  void wake(Thread& thread) {
    thread.state = Thread::State::ready;
    warps_[static_cast<std::size_t>(thread.number / 32)].ready |= 1u << thread.number % 32;
    warps_ready_ |= 1u << thread.number / 32;
  }
  // The fiber that runs next: the host's after a mistake, and where no thread can run.
  Fiber& choose() {
    if (failure_ == nullptr && mistake_.empty() && warps_ready_ == 0 && ended_ < launch_->threads)
      mistake_ = report("waits, and so do all others: no thread can go on");
    if (failure_ != nullptr || !mistake_.empty() || warps_ready_ == 0) return host_;
    last_warp_ = schedule_.next_warp(warps_ready_, last_warp_);
    Warp& warp = warps_[static_cast<std::size_t>(last_warp_)];
    int const lane = schedule_.next_lane(warp.ready);
    warp.ready &= ~(1u << lane);
    if (warp.ready == 0) warps_ready_ &= ~(1u << last_warp_);
    self_ = &threads_[static_cast<std::size_t>(last_warp_ * 32 + lane)];
    return self_->fiber;
  }
  void go_on(Fiber& from) {
    Fiber& next = choose();
    if (&next != &from) from.switch_to(next);
  }
  // The calling thread made a mistake. Nothing of the block runs any more, so nothing on its stack may own memory.
  void stop(std::string mistake) {
    mistake_ = report(std::exchange(mistake, {}));
    self_->fiber.switch_to(host_);
  }

  std::string where() const { return sentence("kernel ", launch_->kernel(), ", block (", block_.x, ", ", block_.y, ", ", block_.z, ")"); }
  // The mistake of the current thread, and below it where all threads of the block wait.
  std::string report(std::string const& mistake) const {
    std::string text = sentence("Emulator: ", where(), ": thread ", self_->number, " ", mistake);
    for (int first = 0, last; first < launch_->threads; first = last) {
      Thread const& thread = threads_[static_cast<std::size_t>(first)];
      std::string const place = place_of(thread);
      for (last = first + 1; last < launch_->threads && place_of(threads_[static_cast<std::size_t>(last)]) == place;) ++last;
      text += sentence("\n  ", last == first + 1 ? "thread " : "threads ", first);
      if (last > first + 1) text += sentence(" to ", last - 1);
      text += sentence(": ", place);
    }
    return text;
  }
  std::string place_of(Thread const& thread) const {
    if (thread.state == Thread::State::ended) return "ended";
    if (thread.state == Thread::State::ready && &thread != self_) return "could go on";
    char const* const name = std::strrchr(thread.at.file, '/');
    return sentence("at ", thread.word, ", ", name == nullptr ? thread.at.file : name + 1, ":", thread.at.line);
  }

  Schedule schedule_;
  SharedMemory shared_;
  void* shared_data_ = nullptr;
  std::unique_ptr<Thread[]> threads_;  // made with the first block
  std::array<Warp, most_threads / 32> warps_;
  Fiber host_;
  Launch const* launch_ = nullptr;
  Grid block_;
  Thread* self_ = nullptr;
  std::uint32_t warps_ready_ = 0;
  int last_warp_ = 0, ended_ = 0, in_block_ = 0;
  simt::CallSite block_site_;
  unsigned block_phase_ = 0;
  std::array<char, 16> block_meetings_[2] = {};
  std::exception_ptr failure_;
  std::string mistake_;
  char start_ = 0, end_ = 0;  // meetings of the threads with the host
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::emulator
#endif

// ==== hybridattn/backend/emulator/simt.hpp
// The words of kernels on the emulator; backend/gpu/simt.hpp lists and explains them.
#ifndef HYBRIDATTN_BACKEND_EMULATOR_SIMT_HPP
#define HYBRIDATTN_BACKEND_EMULATOR_SIMT_HPP

#include <cmath>
#include <concepts>
#include <numbers>

namespace hybridattn::inline HYBRIDATTN_ABI::simt {

namespace detail {
HYBRIDATTN_UNWATCHED inline emulator::Engine& engine() { return *emulator::Engine::current(); }

// Each lane gives x, and receives choose(lanes, own number).
template <class T, class Choose> auto exchange(char const* word, CallSite at, T x, Choose choose) {
  using R = std::invoke_result_t<Choose, emulator::Thread const*, int>;
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 16 && sizeof(R) <= 16);
  emulator::Unwatched const unwatched;
  emulator::Thread& me = engine().self();
  std::memcpy(me.given, &x, sizeof x);
  engine().meet(word, at, emulator::Engine::Memory::as_it_is, [&](emulator::Thread* lanes) {
    for (int lane = 0; lane < 32; ++lane) {
      R const received = choose(lanes, lane);
      std::memcpy(lanes[lane].received, &received, sizeof received);
    }
  });
  R received;
  std::memcpy(&received, me.received, sizeof received);
  return received;
}
template <class T> T given(emulator::Thread const& lane) {
  T x;
  std::memcpy(&x, lane.given, sizeof x);
  return x;
}
}  // namespace detail

HYBRIDATTN_UNWATCHED inline int thread_id() { return detail::engine().self().number; }
HYBRIDATTN_UNWATCHED inline Index block_x() { return detail::engine().block().x; }
HYBRIDATTN_UNWATCHED inline Index block_y() { return detail::engine().block().y; }
HYBRIDATTN_UNWATCHED inline Index block_z() { return detail::engine().block().z; }

inline void sync_block(CallSite at = CallSite::here()) { detail::engine().sync_block(at); }
inline void sync_warp(CallSite at = CallSite::here()) {
  emulator::Unwatched const unwatched;
  if (emulator::mutation().passes(at)) return;
  detail::engine().meet("sync_warp", at, emulator::Engine::Memory::ordered, [](emulator::Thread*) {});
}

// The value of lane from(own number), and one's own where there is no such lane.
namespace detail {
template <class T, class From> T shuffled(char const* word, CallSite at, T x, From from) {
  struct Asked {
    T x;
    int lane;
  };
  static_assert(sizeof(Asked) <= 16, "lanes exchange at most 8 bytes at a time");
  int const lane = engine().self().number % 32, asked = from(lane);
  return exchange(word, at, Asked{x, 0 <= asked && asked < 32 ? asked : lane},
                  [](emulator::Thread const* lanes, int own) { return given<Asked>(lanes[given<Asked>(lanes[own]).lane]).x; });
}
}  // namespace detail
template <class T> T shuffle(T x, int lane, CallSite at = CallSite::here()) {
  return detail::shuffled("shuffle", at, x, [&](int) { return lane; });
}
template <class T> T shuffle_xor(T x, int mask, CallSite at = CallSite::here()) {
  return detail::shuffled("shuffle_xor", at, x, [&](int lane) { return lane ^ mask; });
}
template <class T> T shuffle_up(T x, int distance, CallSite at = CallSite::here()) {
  return detail::shuffled("shuffle_up", at, x, [&](int lane) { return lane - distance; });
}
template <class T> T shuffle_down(T x, int distance, CallSite at = CallSite::here()) {
  return detail::shuffled("shuffle_down", at, x, [&](int lane) { return lane + distance; });
}

inline std::uint32_t ballot(bool vote, CallSite at = CallSite::here()) {
  return detail::exchange("ballot", at, vote, [](emulator::Thread const* lanes, int) {
    std::uint32_t votes = 0;
    for (int lane = 0; lane < 32; ++lane) votes |= static_cast<std::uint32_t>(detail::given<bool>(lanes[lane])) << lane;
    return votes;
  });
}
template <std::integral T> std::uint32_t match_any(T x, CallSite at = CallSite::here()) {
  return detail::exchange("match_any", at, x, [](emulator::Thread const* lanes, int own) {
    std::uint32_t equal = 0;
    for (int lane = 0; lane < 32; ++lane)
      equal |= static_cast<std::uint32_t>(detail::given<T>(lanes[lane]) == detail::given<T>(lanes[own])) << lane;
    return equal;
  });
}

template <std::integral T> T atomic_add(T* at, T x) { return __atomic_fetch_add(at, x, __ATOMIC_RELAXED); }
template <std::integral T> T atomic_max(T* at, T x) {
  T old = __atomic_load_n(at, __ATOMIC_RELAXED);
  while (old < x && !__atomic_compare_exchange_n(at, &old, x, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}

template <std::floating_point T> T rounded_product(T a, T b) {
  T product = a * b;
  asm("" : "+m"(product));   // the compiler must not fuse it with a sum
  return product;
}
template <std::floating_point T> T exp2(T x) { return std::exp2(x); }
template <std::floating_point T> T log2(T x) { return std::log2(x); }
inline double cos_pi(double x) { return std::cos(std::numbers::pi * std::fmod(x, 2)); }
inline double sin_pi(double x) { return std::sin(std::numbers::pi * std::fmod(x, 2)); }

}  // namespace hybridattn::inline HYBRIDATTN_ABI::simt
#endif

// ==== hybridattn/backend/gpu/simt.hpp
#endif

namespace hybridattn::inline HYBRIDATTN_ABI::simt {

HYBRIDATTN_DEVICE int lane() { return thread_id() % 32; }
HYBRIDATTN_DEVICE int warp() { return thread_id() / 32; }

// std::numeric_limits, std::min and std::max are functions of the host.
template <class T> HYBRIDATTN_HD T infinity() { return T(HUGE_VALF); }
template <class T> HYBRIDATTN_HD T larger(T a, T b) { return a > b ? a : b; }
template <class T> HYBRIDATTN_HD T smaller(T a, T b) { return a < b ? a : b; }

// The bits of a number, and the number of bits.
HYBRIDATTN_HD inline std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
HYBRIDATTN_HD inline std::uint64_t bits_of(double x) {
  std::uint64_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
HYBRIDATTN_HD inline float number_of(std::uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
HYBRIDATTN_HD inline double number_of(std::uint64_t bits) {
  double x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// The number of bits that are set, and the place of the first of them, in bits != 0.
HYBRIDATTN_HD inline int count_bits(std::uint32_t bits) { return __builtin_popcount(bits); }
HYBRIDATTN_HD inline int first_bit(std::uint32_t bits) { return __builtin_popcount((bits & -bits) - 1); }

// Arrays of shared memory and of a thread, whose sizes are ints as all numbers of a kernel are.
template <class T, int n> using Array = T[static_cast<std::size_t>(n)];
template <class T, int rows, int columns> using Table = T[static_cast<std::size_t>(rows)][static_cast<std::size_t>(columns)];

// n numbers that are read or written at once, from a multiple of their size, or of 16 bytes, the most that a GPU moves at once.
template <class T, int n> struct alignas(sizeof(T) * static_cast<std::size_t>(n) < 16 ? sizeof(T) * static_cast<std::size_t>(n)
                                                                                      : 16) Vector {
  Array<T, n> x;
};
template <int n, class T> HYBRIDATTN_DEVICE Vector<std::remove_const_t<T>, n> load_vector(T* from) {
  return *reinterpret_cast<Vector<std::remove_const_t<T>, n> const*>(from);
}
template <class T, int n> HYBRIDATTN_DEVICE void store_vector(T* to, Vector<T, n> x) { *reinterpret_cast<Vector<T, n>*>(to) = x; }

HYBRIDATTN_DEVICE bool any(bool vote, CallSite at = CallSite::here()) { return ballot(vote, at) != 0; }
HYBRIDATTN_DEVICE bool all(bool vote, CallSite at = CallSite::here()) { return ballot(vote, at) == ~0u; }

// Over groups of `lanes` neighbouring lanes, a power of 2, in the order of one fixed tree. Every lane receives the result.
template <int lanes = 32, class T> HYBRIDATTN_DEVICE T sum_lanes(T x, CallSite at = CallSite::here()) {
  HYBRIDATTN_UNROLL_IN_KERNEL
  for (int step = 1; step < lanes; step *= 2) x += shuffle_xor(x, step, at);
  return x;
}
template <int lanes = 32, class T> HYBRIDATTN_DEVICE T largest_of_lanes(T x, CallSite at = CallSite::here()) {
  HYBRIDATTN_UNROLL_IN_KERNEL
  for (int step = 1; step < lanes; step *= 2) x = larger(x, shuffle_xor(x, step, at));
  return x;
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::simt
#endif

// ==== hybridattn/backend/gpu/gpu.hpp
// Machines that run kernels. A kernel is a type:
//   struct Mine {
//     static constexpr int threads = 128;                                // of a block, whole warps
//     struct Params { ... };                                             // views and numbers, passed by value
//     struct Shared { ... };                                             // shared memory of a block
//     static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p);  // what a thread does, in the words of simt.hpp
//   };
//   launch<Mine>(gpu, {.x = blocks}, params);
// An operation is written once, as On<Op, B> for every GpuBackend B. Cuda and Emulator run the same text.
#ifndef HYBRIDATTN_BACKEND_GPU_GPU_HPP
#define HYBRIDATTN_BACKEND_GPU_GPU_HPP

#include <type_traits>

namespace hybridattn::inline HYBRIDATTN_ABI {

template <class K>
concept Kernel = requires(typename K::Shared& shared, typename K::Params const& p) {
  { K::threads } -> std::convertible_to<int>;
  K::run(shared, p);
};
// Runs a kernel on a grid of blocks. A grid without blocks starts nothing. Throws Error for more blocks than a GPU takes.
template <Kernel K, GpuBackend B> void launch(B& gpu, Grid grid, typename K::Params const& params) {
  static_assert(std::is_trivially_copyable_v<typename K::Params> && sizeof(typename K::Params) <= 4096,
                "Params are views and numbers, at most 4096 bytes");
  static_assert(std::is_trivially_destructible_v<typename K::Shared>, "Shared is memory without constructors");
  static_assert(K::threads % 32 == 0 && K::threads <= 1024, "a block is whole warps of 32 threads, at most 32 warps");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  check(grid.x <= largest_int32 && grid.y <= 65535 && grid.z <= 65535, "launch: ", grid.x, " x ", grid.y, " x ", grid.z,
        " blocks; a GPU takes at most ", largest_int32, " x 65535 x 65535");
  gpu.template start<K>(grid, params);
}

namespace gpu {

// f(i) for i = 0 .. count - 1, a thread each.
template <class F> struct ForEach {
  static constexpr int threads = 128;
  struct Params {
    F f;
    Index count;
  };
  struct Shared {};
  static HYBRIDATTN_DEVICE void run(Shared&, Params const& p) {
    Index const i = simt::block_x() * threads + simt::thread_id();
    if (i < p.count) p.f(i);
  }
};

}  // namespace gpu

// Calls f(i) for i = 0 .. count - 1. F is a struct of views and numbers with operator()(Index) const, HYBRIDATTN_HD.
template <GpuBackend B, class F> void for_each(B& gpu, Index count, F f) {
  launch<gpu::ForEach<F>>(gpu, {.x = ceil_div(count, gpu::ForEach<F>::threads)}, {f, count});
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/backend/gpu/convert.hpp
// Conversion between scalars on a GPU.
#ifndef HYBRIDATTN_BACKEND_GPU_CONVERT_HPP
#define HYBRIDATTN_BACKEND_GPU_CONVERT_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {
namespace gpu {

template <class From, class To, int Rank> struct ConvertElement {
  View<From const, Rank> x;
  View<To, Rank> y;

  HYBRIDATTN_HD void operator()(Index i) const {
    Index const C = y.extent(Rank - 1);
    y.data[row_offset(y, i / C) + i % C] = static_cast<To>(x.data[row_offset(x, i / C) + i % C]);
  }
};

}  // namespace gpu

// y = x, each element rounded to the scalar of y. Rows may be spaced.
template <class From, class To, int Rank, GpuBackend B> void convert(B& gpu, View<From const, Rank> x, View<To, Rank> y) {
  for_each(gpu, y.count(), gpu::ConvertElement<From, To, Rank>{x, y});
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/backend/gpu/product.hpp
// A matrix product for a GPU, and how a library for column-major matrices computes it.
#ifndef HYBRIDATTN_BACKEND_GPU_PRODUCT_HPP
#define HYBRIDATTN_BACKEND_GPU_PRODUCT_HPP

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

// ==== hybridattn/backend/gpu/gemm.hpp
// Matrix products on GPU backends, tile by tile. A row of a result depends only on that row of `a` and on `b`, and is summed over the
// depth in one fixed order.
#ifndef HYBRIDATTN_BACKEND_GPU_GEMM_HPP
#define HYBRIDATTN_BACKEND_GPU_GEMM_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::gpu {

// A tile of a product, size x size elements. Each thread has `each` x `each` of them; a step in depth goes through shared memory.
template <class T, int size_> struct ProductTile {
  static constexpr int size = size_, depth = 16, each = 4, threads = size / each * (size / each);
  struct Shared {
    simt::Table<T, depth, size + 1> a, b;
  };

  // Elements (first .. first + size, k .. k + depth) of x, zero outside. Neighbouring threads read neighbouring addresses.
  static HYBRIDATTN_DEVICE void load(simt::Table<T, depth, size + 1>& to, Operand<T> const& x, Index first, Index k) {
    for (int i = simt::thread_id(); i < size * depth; i += threads) {
      int const row = x.column == 1 ? i / depth : i % size, step = x.column == 1 ? i % depth : i / size;
      to[step][row] = first + row < x.rows && k + step < x.columns ? x(first + row, k + step) : T(0);
    }
  }
  // The tile of p.c from element (row, column) on.
  static HYBRIDATTN_DEVICE void multiply(Shared& shared, Product<T> const& p, Index row, Index column) {
    int const r = simt::thread_id() / (size / each) * each, c = simt::thread_id() % (size / each) * each;
    Index const rows = p.c.extent(0) - row, columns = p.c.extent(1) - column;
    bool const has_elements = r < rows && c < columns;
    T sum[each][each] = {};
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int i = 0; i < each; ++i) {
      HYBRIDATTN_UNROLL_IN_KERNEL
      for (int j = 0; j < each; ++j)
        if (p.into == Into::add && r + i < rows && c + j < columns) sum[i][j] = p.c(row + r + i, column + c + j);
    }
    for (Index k = 0; k < p.a.columns; k += depth) {
      load(shared.a, p.a, row, k);
      load(shared.b, p.b.transposed(), column, k);
      simt::sync_block();
      if (has_elements) add_step(shared, r, c, sum);
      simt::sync_block();
    }
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int i = 0; i < each; ++i) {
      HYBRIDATTN_UNROLL_IN_KERNEL
      for (int j = 0; j < each; ++j)
        if (r + i < rows && c + j < columns) p.c(row + r + i, column + c + j) = sum[i][j];
    }
  }

 private:
  static HYBRIDATTN_DEVICE void add_step(Shared const& shared, int r, int c, T (&sum)[each][each]) {
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int k = 0; k < depth; ++k) {
      HYBRIDATTN_UNROLL_IN_KERNEL
      for (int i = 0; i < each; ++i) {
        HYBRIDATTN_UNROLL_IN_KERNEL
        for (int j = 0; j < each; ++j) sum[i][j] += shared.a[k][r + i] * shared.b[k][c + j];
      }
    }
  }
};

template <class T, int size> struct Multiply {
  using Tile = ProductTile<T, size>;
  static constexpr int threads = Tile::threads;
  using Params = Product<T>;
  using Shared = typename Tile::Shared;
  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    Tile::multiply(shared, p, simt::block_x() * size, simt::block_y() * size);
  }
};

// f(size) with the size of the tiles for `products` matrices [rows, columns]: large tiles where they are many enough for a whole GPU.
// The size changes no bit.
template <class F> void with_tile(Index products, Index rows, Index columns, F f) {
  constexpr Index enough = 128;
  if (products * ceil_div(rows, 64) * ceil_div(columns, 64) >= enough) f(std::integral_constant<int, 64>{});
  else f(std::integral_constant<int, 32>{});
}

// c = a b or c += a b, for a [M, K], b [K, N], c [M, N]. Transposed operands are read in place. The one place where a library of
// matrix products may compute instead: a backend with multiply(product) decides there.
template <class T, GpuBackend B> void gemm(B& gpu, Operand<T> a, Operand<T> b, View<T, 2> c, Into into = Into::overwrite) {
  check(a.columns == b.rows && c.extent(0) == a.rows && c.extent(1) == b.columns, "gemm: [", a.rows, ", ", a.columns, "] times [", b.rows,
        ", ", b.columns, "] does not give [", c.extent(0), ", ", c.extent(1), "]");
  Product<T> const product{a, b, c, into};
  if constexpr (requires { gpu.multiply(product); })
    if (gpu.multiply(product)) return;
  with_tile(1, c.extent(0), c.extent(1), [&](auto size) {
    launch<Multiply<T, size()>>(gpu, {.x = ceil_div(c.extent(0), size()), .y = ceil_div(c.extent(1), size())}, product);
  });
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::gpu
#endif

// ==== hybridattn/core/type_name.hpp
// Names of types, for reports and errors.
#ifndef HYBRIDATTN_CORE_TYPE_NAME_HPP
#define HYBRIDATTN_CORE_TYPE_NAME_HPP

#include <string>
#include <string_view>

namespace hybridattn::inline HYBRIDATTN_ABI {

// The type's name as the compiler spells it, without the library's namespace.
template <class P> std::string type_name() {
  std::string const text = __PRETTY_FUNCTION__;
  auto const library = text.find("hybridattn::"), flags = library + 12;
  std::string const namespace_of_flags = text.substr(flags, text.find("::", flags) + 2 - flags);
  auto const first = text.find("P = ") + 4;
  std::string name = text.substr(first, text.find_first_of(";]", first) - first);
  for (std::string_view const space : {std::string_view("hybridattn::"), std::string_view(namespace_of_flags),
                                       std::string_view("(anonymous namespace)::"), std::string_view("{anonymous}::")})
    while (name.find(space) != name.npos) name.erase(name.find(space), space.size());
  return name;
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/backend/cuda/cuda.cuh
// An NVIDIA GPU: one stream of work, memory from a pool, and the kernels of gpu.hpp.
#ifndef HYBRIDATTN_BACKEND_CUDA_CUDA_CUH
#define HYBRIDATTN_BACKEND_CUDA_CUDA_CUH

#include <cuda_runtime.h>

#if HYBRIDATTN_CUBLAS

// ==== hybridattn/backend/cuda/cublas.cuh
// Matrix products by cuBLAS. The CMake target hybridattn::cuda_cublas defines HYBRIDATTN_CUBLAS and links the library.
#ifndef HYBRIDATTN_BACKEND_CUDA_CUBLAS_CUH
#define HYBRIDATTN_BACKEND_CUDA_CUBLAS_CUH

#include <cublas_v2.h>

namespace hybridattn::inline HYBRIDATTN_ABI::cuda {

class Cublas {
 public:
  explicit Cublas(cudaStream_t stream) {
    succeed(cublasCreate(&handle_), "starting");
    succeed(cublasSetStream(handle_, stream), "starting");
    succeed(cublasSetMathMode(handle_, CUBLAS_PEDANTIC_MATH), "starting");   // exact float
  }
  Cublas(Cublas const&) = delete;
  Cublas& operator=(Cublas const&) = delete;
  ~Cublas() { cublasDestroy(handle_); }

  // Whether cuBLAS computes it: its sizes are 32-bit numbers, and a product without depth is none.
  template <class T> bool multiply(gpu::Product<T> const& product) {
    auto const p = gpu::column_major(product);
    Index const sizes[] = {p.m, p.n, p.k, p.first.step, p.second.step, p.c_step};
    for (Index size : sizes)
      if (size <= 0 || size > largest_int32) return false;
    auto const narrow = [](Index size) { return static_cast<int>(size); };
    auto const operation = [](bool transposed) { return transposed ? CUBLAS_OP_T : CUBLAS_OP_N; };
    T const one = 1;
    auto const compute = [&](auto gemm) {
      return gemm(handle_, operation(p.first.transposed), operation(p.second.transposed), narrow(p.m), narrow(p.n), narrow(p.k), &one,
                  p.first.data, narrow(p.first.step), p.second.data, narrow(p.second.step), &p.old, p.c, narrow(p.c_step));
    };
    if constexpr (std::is_same_v<T, float>) succeed(compute(cublasSgemm), "a product");
    else succeed(compute(cublasDgemm), "a product");
    return true;
  }

 private:
  static void succeed(cublasStatus_t status, char const* what) {
    check(status == CUBLAS_STATUS_SUCCESS, "cuBLAS: ", what, ": ", cublasGetStatusString(status));
  }
  cublasHandle_t handle_ = nullptr;
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::cuda
#endif

// ==== hybridattn/backend/cuda/cuda.cuh
#endif

#include <array>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

namespace hybridattn::inline HYBRIDATTN_ABI {

// Who computes matrix products. The library's own keep every bitwise law. cuBLAS is faster, and chooses its kernel by the number of rows:
// a row's bits then depend on the rest of the batch. It needs the CMake target hybridattn::cuda_cublas.
enum class Products { own, cublas };

struct CudaOptions {
  int device = 0;
  Products products = Products::own;
  bool wait_after_each_kernel = false;   // an error then names the kernel that made it, instead of the last kernels
};

namespace cuda {

template <class K> constexpr std::size_t shared_bytes = std::is_empty_v<typename K::Shared> ? 0 : sizeof(typename K::Shared);

// The library's only __global__ function, and its only extern __shared__ memory: two of different types would clash. Its name tells the
// compiler's reports how many threads and how much shared memory a block has.
template <class K, int threads, std::size_t shared_bytes> __global__ void __launch_bounds__(threads, 1)
    run(__grid_constant__ typename K::Params const params) {
  extern __shared__ __align__(128) unsigned char shared[];
  K::run(*reinterpret_cast<typename K::Shared*>(shared), params);
}

template <class K> inline constexpr auto* entry_of = run<K, K::threads, shared_bytes<K>>;

// A kernel that every program with a Cuda has.
struct Probe {
  HYBRIDATTN_HD void operator()(Index) const {}
};

// The last kernels that were started since the host last waited.
class Started {
 public:
  void add(std::string (*kernel)()) { kernels_[count_++ % kernels_.size()] = kernel; }
  void clear() { count_ = 0; }
  std::string names() const {
    std::string text = count_ == 0 ? "no kernel was started since the last wait" : "the last kernels, the latest first:";
    for (std::size_t i = 0; i < std::min(count_, kernels_.size()); ++i) text += " " + kernels_[(count_ - 1 - i) % kernels_.size()]();
    return text;
  }

 private:
  std::array<std::string (*)(), 8> kernels_ = {};
  std::size_t count_ = 0;
};

}  // namespace cuda

class Cuda {
 public:
  static constexpr std::string_view name = "Cuda";

  // Throws Error where there is no device of this number, where its driver is too old, where the program has no code for its
  // architecture, and where the products need a library that the program does not link.
  explicit Cuda(CudaOptions options = {}) : options_(options) {
    check_device(options);
    select();
    succeed(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "creating a stream");
#if HYBRIDATTN_CUBLAS
    if (options.products == Products::cublas) cublas_ = std::make_unique<cuda::Cublas>(stream_);
#endif
  }
  Cuda(Cuda const&) = delete;
  Cuda& operator=(Cuda const&) = delete;
  ~Cuda() {
    cudaSetDevice(options_.device);
    cudaStreamSynchronize(stream_);
    pool_.trim(release);
#if HYBRIDATTN_CUBLAS
    cublas_.reset();
#endif
    cudaStreamDestroy(stream_);
  }
  // Whether a Cuda of these options can be made here.
  static bool available(CudaOptions options = {}) { return why_not(options).empty(); }
  // Why not, or nothing.
  static std::string why_not(CudaOptions options = {}) {
    try {
      check_device(options);
      return {};
    } catch (Error const& error) {
      return error.what();
    }
  }

  void* take(std::size_t bytes) {
    return pool_.take(bytes, [this](std::size_t n) { return allocate(n); }, release, device_memory());
  }
  void give(void* block, std::size_t bytes) noexcept { pool_.give(block, bytes); }   // the stream orders who uses it next
  void trim() noexcept {
    cudaStreamSynchronize(stream_);
    pool_.trim(release);
  }
  // Waits for the copy: the host may change its bytes at once.
  void upload(void* to, void const* from, std::size_t bytes) {
    succeed(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream_), "an upload");
    synchronise();
  }
  void download(void* to, void const* from, std::size_t bytes) {
    succeed(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream_), "a download");
    synchronise();
  }
  void copy(void* to, void const* from, std::size_t bytes) {
    succeed(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream_), "a copy");
  }
  void fill(void* to, std::byte value, std::size_t bytes) {
    succeed(cudaMemsetAsync(to, std::to_integer<int>(value), bytes, stream_), "a fill");
  }
  void synchronise() {
    succeed(cudaStreamSynchronize(stream_), "waiting");
    started_.clear();
  }
  bool owns(void const* memory) const {
    cudaPointerAttributes attributes;
    bool const known = cudaPointerGetAttributes(&attributes, memory) == cudaSuccess;
    return known && attributes.type == cudaMemoryTypeDevice && attributes.device == options_.device;
  }
  Pool& pool() { return pool_; }
  CudaOptions const& options() const { return options_; }
  // "NVIDIA H100 PCIe".
  std::string device_name() const {
    cudaDeviceProp properties;
    succeed(cudaGetDeviceProperties(&properties, options_.device), "reading the properties of a device");
    return properties.name;
  }
  // All memory of the device, in bytes.
  static std::size_t device_memory() {
    std::size_t free = 0, all = 0;
    return cudaMemGetInfo(&free, &all) == cudaSuccess ? all : 0;
  }
  cudaStream_t stream() const { return stream_; }

  // Starts a kernel behind all earlier work.
  template <class K> void start(Grid grid, typename K::Params const& params) {
    constexpr std::size_t shared = cuda::shared_bytes<K>;
    if constexpr (shared > 48 * 1024) {
      cudaError_t const allowed =
          cudaFuncSetAttribute(cuda::entry_of<K>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
      check(allowed == cudaSuccess, "CUDA: kernel ", type_name<K>(), " needs ", shared,
            " bytes of shared memory: ", cudaGetErrorString(allowed));
    }
    started_.add(type_name<K>);
    auto const narrow = [](Index n) { return static_cast<unsigned>(n); };
    cuda::run<K, K::threads, shared><<<dim3(narrow(grid.x), narrow(grid.y), narrow(grid.z)), K::threads, shared, stream_>>>(params);
    succeed(cudaGetLastError(), "starting a kernel");
    if (options_.wait_after_each_kernel) synchronise();
  }
#if HYBRIDATTN_CUBLAS
  // Whether cuBLAS computes this product.
  template <class T> bool multiply(gpu::Product<T> const& product) { return cublas_ != nullptr && cublas_->multiply(product); }
#endif

 private:
  static void check_device(CudaOptions const& options) {
    int driver = 0, runtime = 0, devices = 0;
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    auto const version = [](int number) { return sentence(number / 1000, ".", number % 1000 / 10); };
    check(driver != 0, "Cuda: no NVIDIA driver is installed. This program needs one for CUDA ", version(runtime),
          "; the backends Cpu and Emulator need none");
    cudaError_t const counted = cudaGetDeviceCount(&devices);
    check(counted != cudaErrorInsufficientDriver, "Cuda: the driver is for CUDA ", version(driver), ", the program needs CUDA ",
          version(runtime), " or later");
    check(counted == cudaSuccess && devices > 0, "Cuda: no GPU was found (", cudaGetErrorString(counted),
          "); the backends Cpu and Emulator need none");
    check(0 <= options.device && options.device < devices, "Cuda: device ", options.device, "; allowed: 0 .. ", devices - 1);
    cudaDeviceProp properties;
    succeed_with(cudaGetDeviceProperties(&properties, options.device), "reading the properties of a device", {});
    cudaFuncAttributes attributes;
    int current = 0;
    cudaGetDevice(&current);
    cudaSetDevice(options.device);
    cudaError_t const has_code = cudaFuncGetAttributes(&attributes, cuda::entry_of<gpu::ForEach<cuda::Probe>>);
    cudaSetDevice(current);
    cudaGetLastError();
    check(has_code == cudaSuccess, "Cuda: the program has no code for device ", options.device, ", ", properties.name,
          " of architecture sm_", properties.major, properties.minor, "; compile it with nvcc -arch=sm_", properties.major,
          properties.minor);
    check(HYBRIDATTN_CUBLAS || options.products == Products::own, "Cuda: Products::cublas needs the CMake target hybridattn::cuda_cublas");
  }
  void select() { succeed(cudaSetDevice(options_.device), "selecting a device"); }
  void* allocate(std::size_t bytes) {
    void* block = nullptr;
    cudaError_t const status = cudaMalloc(&block, bytes);
    if (status == cudaErrorMemoryAllocation) {
      cudaGetLastError();
      return nullptr;
    }
    succeed(status, "taking memory");
    return block;
  }
  static void release(void* block, std::size_t) noexcept { cudaFree(block); }   // cudaFree waits for the device
  void succeed(cudaError_t status, char const* what) const { succeed_with(status, what, started_); }
  static void succeed_with(cudaError_t status, char const* what, cuda::Started const& started) {
    if (status != cudaSuccess) fail("CUDA: ", what, ": ", cudaGetErrorString(status), "; ", started.names());
  }

  CudaOptions options_;
  Pool pool_;
  cudaStream_t stream_ = nullptr;
  cuda::Started started_;
#if HYBRIDATTN_CUBLAS
  std::unique_ptr<cuda::Cublas> cublas_;   // of Products::cublas
#endif
};
static_assert(GpuBackend<Cuda>);

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/backend/gpu/reduce.hpp
// Sums in a fixed order: in a warp by one tree, of the warps of a block and of blocks one after the other.
#ifndef HYBRIDATTN_BACKEND_GPU_REDUCE_HPP
#define HYBRIDATTN_BACKEND_GPU_REDUCE_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::gpu {

// The sum of one number of each thread of a block, for all threads. `of_warps` is shared memory, one number for each warp.
template <class T, std::size_t warps> HYBRIDATTN_DEVICE T sum_block(T (&of_warps)[warps], T x) {
  x = simt::sum_lanes(x);
  if (simt::lane() == 0) of_warps[simt::warp()] = x;
  simt::sync_block();
  T sum = 0;
  for (T part : of_warps) sum += part;
  simt::sync_block();   // of_warps may be used again
  return sum;
}

// sum [C] = the rows of parts [n, C], added in order. A thread has a column.
template <class T> struct SumParts {
  View<T const, 2> parts;
  View<T, 1> sum;
  HYBRIDATTN_HD void operator()(Index c) const {
    T total = 0;
    for (Index n = 0; n < parts.extent(0); ++n) total += parts(n, c);
    sum(c) = total;
  }
};

// A backward whose rows add to one gradient [C]: each block of `sum_rows` rows makes a part [C], and the parts are added in order.
inline constexpr Index sum_rows = 32;
inline Index row_blocks(Index rows) { return ceil_div(rows, sum_rows); }

}  // namespace hybridattn::inline HYBRIDATTN_ABI::gpu
#endif

// ==== hybridattn/attention/dsa/kernel_rows.hpp
// What the kernels of sparse attention share: the keys of a query, and rows that a block gathers from anywhere in memory.
#ifndef HYBRIDATTN_ATTENTION_DSA_KERNEL_ROWS_HPP
#define HYBRIDATTN_ATTENTION_DSA_KERNEL_ROWS_HPP

// g++ takes the int sizes of arrays in templates for conversions.
#if defined(__GNUC__) && !defined(__clang__) && !HYBRIDATTN_CUDA
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wsign-conversion"
#endif

namespace hybridattn::inline HYBRIDATTN_ABI::dsa {

// What every kernel knows of a batch.
template <class T> struct Batch {
  SparseOptions options;
  Inputs<In<T>> x;
  SequenceTable sequences;
  View<std::int32_t const, 2> indices;   // empty: a query attends to every key that it sees
  int group;                             // query heads of a key/value head
  T scale, index_scale;
  Cache<In<T>> cache;                    // of past tokens; empty views where no sequence has any

  HYBRIDATTN_DEVICE int kv_head(Index h) const { return static_cast<int>(h) / group; }
};

// The blocks of a grid are `parts` of each sequence. Numbers of blocks and tokens fit into an int, and a division of 64 bits would need
// a function.
struct PartOfSequence {
  int sequence, part;
  explicit HYBRIDATTN_DEVICE PartOfSequence(Index parts)
      : sequence(static_cast<int>(simt::block_x()) / static_cast<int>(parts)),
        part(static_cast<int>(simt::block_x()) % static_cast<int>(parts)) {}
};

// Query n of the batch, and its keys by their positions in its sequence, cached or new.
template <class T> class Query {
 public:
  HYBRIDATTN_DEVICE Query(Batch<T> const& batch, Index n)
      : b_(batch), n_(n), number_(batch.sequences.owners(n)), sequence_(batch.sequences.list(number_)) {}

  HYBRIDATTN_DEVICE Index seen() const { return Index{b_.sequences.positions(n_)} + 1; }
  HYBRIDATTN_DEVICE Index selected() const { return simt::smaller(selection_size(b_.options, sequence_.length), seen()); }
  // The number of keys that it attends to, and key j of them.
  HYBRIDATTN_DEVICE Index count() const { return b_.indices.empty() ? seen() : selected(); }
  HYBRIDATTN_DEVICE Index key(Index j) const { return b_.indices.empty() ? j : Index{b_.indices(n_, j)}; }

  HYBRIDATTN_DEVICE T const* key_row(Index position, Index hk) const {
    return is_cached(position) ? b_.cache.keys.row(number_, position, hk) : b_.x.k.row(token(position), hk);
  }
  HYBRIDATTN_DEVICE T const* value_row(Index position, Index hk) const {
    return is_cached(position) ? b_.cache.values.row(number_, position, hk) : b_.x.v.row(token(position), hk);
  }
  HYBRIDATTN_DEVICE T const* index_row(Index position) const {
    return is_cached(position) ? b_.cache.index_keys.row(number_, position) : b_.x.index_k.row(token(position));
  }

 private:
  HYBRIDATTN_DEVICE bool is_cached(Index position) const { return position < sequence_.past; }
  HYBRIDATTN_DEVICE Index token(Index position) const { return sequence_.start + position - sequence_.past; }

  Batch<T> const& b_;
  Index n_, number_;
  Sequence sequence_;
};

// A row of each thread of a block, anywhere in memory. The block reads a piece of all rows at a time. Neighbouring
// lanes read neighbouring entries.
template <class T, int threads> struct GatheredRows {
  static constexpr int piece = 32;
  T const* begin[threads];
  T entries[threads][piece + 1];  // one more, so that the rows begin in different banks

  // Entries first .. first + piece - 1 of the rows of the first `count` threads.
  HYBRIDATTN_DEVICE void load(Index first, Index size, int count) {
    Index const entry = first + simt::lane();
    for (int r = simt::warp(); r < count && entry < size; r += threads / 32) entries[r][simt::lane()] = begin[r][entry];
  }
};
HYBRIDATTN_DEVICE int entries_from(Index first, Index size, int piece) {
  return static_cast<int>(simt::smaller<Index>(size - first, piece));
}

// x . row of this thread, for the first `count` threads of the block, 0 for the others. Entries are summed in their order. All threads
// of the block call this, with the same x.
template <class T, int threads> HYBRIDATTN_DEVICE T gather_dot(GatheredRows<T, threads>& rows, T const* x, T const* row, Index size,
                                                               int count) {
  int const thread = simt::thread_id();
  T sum = 0;
  rows.begin[thread] = row;
  for (Index first = 0; first < size; first += rows.piece) {
    simt::sync_block();
    rows.load(first, size, count);
    simt::sync_block();
    HYBRIDATTN_UNROLL_8_IN_KERNEL
    for (int e = 0, end = entries_from(first, size, thread < count ? rows.piece : 0); e < end; ++e)
      sum += x[first + e] * rows.entries[thread][e];
  }
  return sum;
}
// The same of two rows of each thread.
template <class T, int threads>
HYBRIDATTN_DEVICE T gather_dot(GatheredRows<T, threads>& a, T const* a_row, GatheredRows<T, threads>& b, T const* b_row, Index size,
                               int count) {
  int const thread = simt::thread_id();
  T sum = 0;
  a.begin[thread] = a_row;
  b.begin[thread] = b_row;
  for (Index first = 0; first < size; first += a.piece) {
    simt::sync_block();
    a.load(first, size, count);
    b.load(first, size, count);
    simt::sync_block();
    HYBRIDATTN_UNROLL_8_IN_KERNEL
    for (int e = 0, end = entries_from(first, size, thread < count ? a.piece : 0); e < end; ++e)
      sum += a.entries[thread][e] * b.entries[thread][e];
  }
  return sum;
}

// y [size] (+)= the sum of weights[j] times row j, in the order of j. A thread has every `threads`-th entry of y.
template <class T, int threads>
HYBRIDATTN_DEVICE void add_rows(T const (&weights)[threads], T const* const (&rows)[threads], int count, bool overwrites, T* y,
                                Index size) {
  for (Index d = simt::thread_id(); d < size; d += threads) {
    T sum = overwrites ? T(0) : y[d];
    HYBRIDATTN_UNROLL_8_IN_KERNEL
    for (int j = 0; j < count; ++j) sum += weights[j] * rows[j][d];
    y[d] = sum;
  }
}

// The largest of one number of each thread of a block, for all threads. None is NaN.
template <class T, int warps> HYBRIDATTN_DEVICE T largest_of_block(T (&of_warps)[warps], T x) {
  x = simt::largest_of_lanes(x);
  if (simt::lane() == 0) of_warps[simt::warp()] = x;
  simt::sync_block();
  T largest = -simt::infinity<T>();
  for (T of_warp : of_warps) largest = simt::larger(largest, of_warp);
  simt::sync_block();  // of_warps may be used again
  return largest;
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::dsa

#if defined(__GNUC__) && !defined(__clang__) && !HYBRIDATTN_CUDA
#pragma GCC diagnostic pop
#endif
#endif

// ==== hybridattn/attention/dsa/kernel_pairs.hpp
// The queries that attend to a tile of keys: found by search in their ascending rows of indices, in the order of the queries.
#ifndef HYBRIDATTN_ATTENTION_DSA_KERNEL_PAIRS_HPP
#define HYBRIDATTN_ATTENTION_DSA_KERNEL_PAIRS_HPP

// g++ takes the int sizes of arrays in templates for conversions.
#if defined(__GNUC__) && !defined(__clang__) && !HYBRIDATTN_CUDA
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wsign-conversion"
#endif

namespace hybridattn::inline HYBRIDATTN_ABI::dsa {

// A query that attends to a key of a tile.
struct Pair {
  int query, key;   // counted from the first query and the first key
  Index place;      // of the key in the query's row of indices
};

// All pairs of up to 64 queries with a tile of 32 keys, key by key. A block finds them together. A thread searches for the keys of a query,
// then lists the pairs of a key with half of the queries.
class Pairs {
 public:
  static constexpr int threads = 64, queries = 64, keys = 32;
  struct Shared {
    std::uint32_t keys_of[queries], queries_of[2 * keys];  // bits. queries_of has two words for each key
    Index place[queries];  // of a query's first key in the tile
    std::uint16_t list[queries * keys];  // key * queries + query
  };

  // Of the queries first_query .. last_query - 1 of a sequence, at most 64.
  template <class T>
  HYBRIDATTN_DEVICE Pairs(Shared& shared, Batch<T> const& batch, Sequence s, Index first_key, Index first_query, Index last_query)
      : shared_(shared) {
    Index const query = first_query + simt::thread_id();
    find(query < last_query, Query<T>{batch, s.start + simt::smaller(query, s.length - 1)}, first_key);
    simt::sync_block();
    write_list();
    simt::sync_block();
  }

  HYBRIDATTN_DEVICE int count() const { return count_; }
  HYBRIDATTN_DEVICE Pair operator[](int i) const {
    int const query = shared_.list[i] % queries, key = shared_.list[i] / queries;
    std::uint32_t const before = shared_.keys_of[query] & ((std::uint32_t{1} << key) - 1);
    return {query, key, shared_.place[query] + simt::count_bits(before)};
  }

 private:
  template <class T> HYBRIDATTN_DEVICE void find(bool is_query, Query<T> const& query, Index first_key) {
    Index const count = is_query ? query.count() : 0;
    Index place = 0;
    for (Index end = count; place < end;) {  // key place - 1 is before the tile, key end is not
      Index const middle = (place + end) / 2;
      if (query.key(middle) < first_key) place = middle + 1;
      else end = middle;
    }
    std::uint32_t bits = 0;
    for (Index j = place; j < count && query.key(j) < first_key + keys; ++j) bits |= std::uint32_t{1} << (query.key(j) - first_key);
    shared_.place[simt::thread_id()] = place;
    shared_.keys_of[simt::thread_id()] = bits;
    for (int key = 0; key < keys; ++key) {
      std::uint32_t const votes = simt::ballot((bits >> key & 1) != 0);
      if (simt::lane() == 0) shared_.queries_of[2 * key + simt::warp()] = votes;
    }
  }
  HYBRIDATTN_DEVICE void write_list() {
    int const own = simt::thread_id();
    int place = 0;
    count_ = 0;
    for (int i = 0; i < 2 * keys; ++i) {
      if (i == own) place = count_;
      count_ += simt::count_bits(shared_.queries_of[i]);
    }
    for (std::uint32_t bits = shared_.queries_of[own]; bits != 0; bits &= bits - 1)
      shared_.list[place++] = static_cast<std::uint16_t>(own / 2 * queries + own % 2 * 32 + simt::first_bit(bits));
  }

  Shared& shared_;
  int count_;
};

// Gradients of a tile of keys, set to zero or added to by a block of threads. A thread has every 64th entry of each key.
template <class T> HYBRIDATTN_DEVICE void set_tile_zero(View<T, 2> d_keys) {
  for (Index key = 0; key < d_keys.extent(0); ++key)
    for (Index d = simt::thread_id(); d < d_keys.extent(1); d += Pairs::threads) d_keys.row(key)[d] = 0;
}
// Row keys[i] += weights[i] times row i, in the order of i. Equal keys follow each other.
template <class T, int threads>
HYBRIDATTN_DEVICE void add_terms(T const (&weights)[threads], T const* const (&rows)[threads], int const (&keys)[threads], int count,
                                 View<T, 2> d_keys) {
  for (Index d = simt::thread_id(); d < d_keys.extent(1); d += threads)
    for (int i = 0; i < count;) {
      int const key = keys[i];
      T* const d_key = d_keys.row(key);
      T sum = d_key[d];
      for (; i < count && keys[i] == key; ++i) sum += weights[i] * rows[i][d];
      d_key[d] = sum;
    }
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::dsa

#if defined(__GNUC__) && !defined(__clang__) && !HYBRIDATTN_CUDA
#pragma GCC diagnostic pop
#endif
#endif

// ==== hybridattn/attention/dsa/kernel_attention.hpp
// Attention over the keys of each query as kernels, in exact arithmetic. Numbers in brackets are equations of dsa.hpp.
#ifndef HYBRIDATTN_ATTENTION_DSA_KERNEL_ATTENTION_HPP
#define HYBRIDATTN_ATTENTION_DSA_KERNEL_ATTENTION_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::dsa {

template <class T> struct AttentionParams {
  Batch<T> batch;
  View<T, 3> o;
  View<wide_t<T>, 2> lse;                // an empty view where nobody needs it
  // Only in backward.
  View<T const, 3> y, d_o;
  View<wide_t<T> const, 2> y_lse;
  View<wide_t<T>, 2> delta;
  Inputs<Out<T>> d_x;
  Index tiles;  // of keys, in the longest sequence
};

// scale q . k, of head h of query n and a key of each thread. Of the threads from `count` on it is 0.
template <class T, int threads>
HYBRIDATTN_DEVICE T attention_score(GatheredRows<T, threads>& rows, Batch<T> const& b, Index n, Index h, T const* key_row, int count) {
  return simt::rounded_product(b.scale, gather_dot(rows, b.x.q.row(n, h), key_row, b.x.q.extent(2), count));
}

// o and lse of one head of a query. A thread has a key of a tile of keys, then entries of o. The largest score is found before weights are
// computed. So o overflows only where it does in the order of the equations.
template <class T> struct Attend {
  static constexpr int threads = 64;
  using Params = AttentionParams<T>;
  struct Shared {
    GatheredRows<T, threads> keys;
    T const* values[threads];
    T weights[threads], of_warps[threads / 32];
  };

  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    Index const n = simt::block_x(), h = simt::block_y(), D = p.o.extent(2);
    Query<T> const query{p.batch, n};
    Index const count = query.count();
    T score = 0, largest = -simt::infinity<T>(), total = 0;
    for (Index first = 0; first < count; first += threads) {
      score = score_from(shared, p, query, first);
      if (first + simt::thread_id() < count) largest = simt::larger(score, largest);
    }
    largest = largest_of_block(shared.of_warps, largest);
    for (Index first = 0; first < count; first += threads) {
      if (count > threads) score = score_from(shared, p, query, first);
      Index const j = first + simt::thread_id();
      T const weight = j < count ? std::exp(score - largest) : T(0);
      total += weight;
      shared.weights[simt::thread_id()] = weight;
      shared.values[simt::thread_id()] = j < count ? query.value_row(query.key(j), p.batch.kv_head(h)) : nullptr;
      simt::sync_block();
      add_rows(shared.weights, shared.values, entries_from(first, count, threads), first == 0, p.o.row(n, h), D);
    }
    total = gpu::sum_block(shared.of_warps, total);
    for (Index d = simt::thread_id(); d < D; d += threads) p.o(n, h, d) /= total;
    if (simt::thread_id() == 0 && !p.lse.empty()) p.lse(n, h) = largest + std::log(total);   // (3)
  }

 private:
  static HYBRIDATTN_DEVICE T score_from(Shared& shared, Params const& p, Query<T> const& query, Index first) {
    Index const j = first + simt::thread_id(), n = simt::block_x(), h = simt::block_y();
    T const* const row = j < query.count() ? query.key_row(query.key(j), p.batch.kv_head(h)) : nullptr;
    return attention_score(shared.keys, p.batch, n, h, row, entries_from(first, query.count(), threads));
  }
};

// delta and d_q of one head of a query. A thread has a key of a tile of keys, then entries of d_q.
template <class T> struct AttendQueryGradients {
  static constexpr int threads = 64;
  using Params = AttentionParams<T>;
  struct Shared {
    GatheredRows<T, threads> rows;
    T const* keys[threads];
    T d_s[threads];
  };

  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    Index const n = simt::block_x(), h = simt::block_y(), hk = p.batch.kv_head(h), D = p.y.extent(2);
    Query<T> const query{p.batch, n};
    // The order of gather_dot: where one key has all the weight, o is its v, and the two terms of d_s cancel.
    T const delta = dot(p.d_o.row(n, h), p.y.row(n, h), D), lse = p.y_lse(n, h);
    if (simt::thread_id() == 0) p.delta(n, h) = delta;
    for (Index first = 0, count = query.count(); first < count; first += threads) {
      Index const j = first + simt::thread_id(), key = j < count ? query.key(j) : 0;
      int const keys = entries_from(first, count, threads);
      T const *const k = query.key_row(key, hk), *const v = query.value_row(key, hk);
      T const weight = std::exp(attention_score(shared.rows, p.batch, n, h, k, keys) - lse);
      T const d_weight = gather_dot(shared.rows, p.d_o.row(n, h), v, D, keys);
      shared.keys[simt::thread_id()] = k;
      shared.d_s[simt::thread_id()] = p.batch.scale * weight * (d_weight - delta);
      simt::sync_block();
      add_rows(shared.d_s, shared.keys, keys, first == 0, p.d_x.q.row(n, h), D);   // (4)
    }
  }
};

// d_k and d_v of a tile of keys in one key/value head. The sums go through the queries in order, and for each through the heads of the
// group. A thread has a pair of a query and a key, then entries of the gradients.
template <class T> struct AttendKeyGradients {
  static constexpr int threads = Pairs::threads;
  using Params = AttentionParams<T>;
  struct Shared {
    Pairs::Shared pairs;
    GatheredRows<T, threads> of_query, of_key;
    T const *q[threads], *d_o[threads];
    T weights[threads], d_s[threads];
    int keys[threads];
  };

  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    PartOfSequence const at{p.tiles};
    Sequence const sequence = p.batch.sequences.list(at.sequence);
    Index const first = Index{at.part} * Pairs::keys;
    if (first >= sequence.length) return;
    View<T, 2> const d_k = tile_of(p.d_x.k, sequence, first), d_v = tile_of(p.d_x.v, sequence, first);
    set_tile_zero(d_k);
    set_tile_zero(d_v);
    for (Index query = first; query < sequence.length; query += Pairs::queries) {
      Pairs const pairs{shared.pairs, p.batch, sequence, first, query, sequence.length};
      int const terms = pairs.count() * p.batch.group;
      for (int term = 0; term < terms; term += threads) {
        int const count = entries_from(term, terms, threads);
        weigh(shared, p, pairs, sequence.start + query, sequence.start + first, term, count);
        simt::sync_block();
        add_terms(shared.d_s, shared.q, shared.keys, count, d_k);   // (4)
        add_terms(shared.weights, shared.d_o, shared.keys, count, d_v);
      }
    }
  }

 private:
  // The rows of a tile of keys, in this block's head.
  static HYBRIDATTN_DEVICE View<T, 2> tile_of(View<T, 3> x, Sequence s, Index first) {
    return {x.row(s.start + first, simt::block_y()), {entries_from(first, s.length, Pairs::keys), x.extent(2)}, {x.stride[0], 1}};
  }
  // The weights of `count` terms: pairs, and for each the heads of the group. Queries and keys are counted from tokens n and key.
  static HYBRIDATTN_DEVICE void weigh(Shared& shared, Params const& p, Pairs const& pairs, Index n, Index key, int term, int count) {
    int const thread = simt::thread_id();
    int const group = p.batch.group, own = term + (thread < count ? thread : 0);
    Index const hk = simt::block_y(), h = hk * group + own % group;
    Pair const pair = pairs[own / group];
    n += pair.query;
    key += pair.key;
    T const *const q = p.batch.x.q.row(n, h), *const d_o = p.d_o.row(n, h);
    Index const D = p.y.extent(2);
    T const product = gather_dot(shared.of_query, q, shared.of_key, p.batch.x.k.row(key, hk), D, count);
    T const d_weight = gather_dot(shared.of_query, d_o, shared.of_key, p.batch.x.v.row(key, hk), D, count);
    T const weight = std::exp(simt::rounded_product(p.batch.scale, product) - p.y_lse(n, h));
    shared.q[thread] = q;
    shared.d_o[thread] = d_o;
    shared.weights[thread] = weight;
    shared.d_s[thread] = p.batch.scale * weight * (d_weight - p.delta(n, h));
    shared.keys[thread] = pair.key;
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::dsa
#endif

// ==== hybridattn/ops/top_k/kernels.hpp
// TopK as a kernel, and its row for kernels that compute scores. A block has a row. Scores become keys: unsigned integers in the same
// order. The block finds the k-th largest key by its digits of 8 bits, from the highest digit on. For each digit it counts the keys that
// have the digits found so far.
#ifndef HYBRIDATTN_OPS_TOP_K_KERNELS_HPP
#define HYBRIDATTN_OPS_TOP_K_KERNELS_HPP

#include <cstdint>

// g++ takes the int sizes of arrays in templates for conversions.
#if defined(__GNUC__) && !defined(__clang__) && !HYBRIDATTN_CUDA
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wsign-conversion"
#endif

namespace hybridattn::inline HYBRIDATTN_ABI::gpu {

// Positive numbers are in the order of their bits, negative ones in the reversed order. Adding 0 makes +0 of -0. The key of a NaN is 0.
template <class T> HYBRIDATTN_DEVICE auto ordered_key(T x) {
  auto const bits = simt::bits_of(x + T(0));
  using Key = std::remove_const_t<decltype(bits)>;
  constexpr Key sign = Key{1} << (8 * sizeof(Key) - 1);
  if (x != x) return Key{0};
  return (bits & sign) != 0 ? static_cast<Key>(~bits) : static_cast<Key>(bits | sign);
}

// A row of n scores. All threads of the block work on it.
template <class T, int threads> class RowTopK {
 public:
  static constexpr int warps = threads / 32, digits = 256;
  struct Shared {
    int counts[warps], ties[warps], histogram[digits], digit, rank;
  };

  HYBRIDATTN_DEVICE RowTopK(Shared& shared, T const* scores, Index n) : shared_(shared), scores_(scores), n_(n) {}

  // The indices of the k largest scores, ascending, for 1 <= k <= n.
  HYBRIDATTN_DEVICE void select(int k, std::int32_t* indices) const { write_chosen(kth_largest(k), indices); }

 private:
  using Key = decltype(simt::bits_of(T()));
  // The k-th largest key, and how many of the keys equal to it are among the k largest.
  struct Bound {
    Key key;
    int ties;
  };

  HYBRIDATTN_DEVICE Key key_of(Index i) const { return ordered_key(scores_[i]); }
  HYBRIDATTN_DEVICE Bound kth_largest(int k) const {
    Bound bound{0, k};
    Key known = 0;  // the bits of the digits that are found
    for (int shift = 8 * sizeof(Key) - 8; shift >= 0; shift -= 8) {
      for (int digit = simt::thread_id(); digit < digits; digit += threads) shared_.histogram[digit] = 0;
      simt::sync_block();
      for (Index i = simt::thread_id(); i < n_; i += threads)
        if (Key const key = key_of(i); (key & known) == bound.key) simt::atomic_add(&shared_.histogram[key >> shift & (digits - 1)], 1);
      simt::sync_block();
      if (simt::warp() == 0) find_digit(bound.ties);
      simt::sync_block();
      bound = {bound.key | static_cast<Key>(shared_.digit) << shift, shared_.rank};
      known |= static_cast<Key>(digits - 1) << shift;
    }
    return bound;
  }
  // The digit of the key that has this rank among the keys of the histogram, and its rank among those with this digit. A lane has 8
  // digits, lane 0 the largest ones.
  HYBRIDATTN_DEVICE void find_digit(int rank) const {
    int const largest = digits - 1 - 8 * simt::lane();
    int own = 0;
    for (int digit = largest; digit > largest - 8; --digit) own += shared_.histogram[digit];
    int sum = own;  // of this lane and those before it
    for (int step = 1; step < 32; step *= 2) {
      int const before = simt::shuffle_up(sum, step);
      if (simt::lane() >= step) sum += before;
    }
    rank -= sum - own;
    if (rank <= 0 || rank > own) return;
    int digit = largest;
    for (; rank > shared_.histogram[digit] && digit > largest - 7; --digit) rank -= shared_.histogram[digit];
    shared_.digit = digit;
    shared_.rank = rank;
  }
  // The indices of the keys above the bound, and of the first ones equal to it. Each turn looks at a key for each thread.
  HYBRIDATTN_DEVICE void write_chosen(Bound bound, std::int32_t* indices) const {
    int above = 0, ties = 0;  // in earlier turns
    for (Index first = 0; first < n_; first += threads) {
      Index const i = first + simt::thread_id();
      bool const inside = i < n_, is_above = inside && key_of(i) > bound.key, is_tie = inside && key_of(i) == bound.key;
      Earlier const a = count_earlier(shared_.counts, is_above), t = count_earlier(shared_.ties, is_tie);
      int const place = above + a.before + simt::smaller(ties + t.before, bound.ties);
      if (is_above || (is_tie && ties + t.before < bound.ties)) indices[place] = static_cast<std::int32_t>(i);
      above += a.all;
      ties += t.all;
    }
  }
  // How many threads of the block vote true: those before this thread, and all. Two calls in a row have other of_warps, so that the barrier
  // of one call is between the reads and the next writes of the other.
  struct Earlier {
    int before, all;
  };
  static HYBRIDATTN_DEVICE Earlier count_earlier(int (&of_warps)[warps], bool vote) {
    std::uint32_t const votes = simt::ballot(vote);
    if (simt::lane() == 0) of_warps[simt::warp()] = simt::count_bits(votes);
    simt::sync_block();
    Earlier result{simt::count_bits(votes & ((std::uint32_t{1} << simt::lane()) - 1)), 0};
    for (int w = 0; w < warps; ++w) {
      if (w < simt::warp()) result.before += of_warps[w];
      result.all += of_warps[w];
    }
    return result;
  }

  Shared& shared_;
  T const* scores_;
  Index n_;
};

template <class T> struct SelectTopK {
  static constexpr int threads = 128;
  using Row = RowTopK<T, threads>;
  struct Params {
    View<T const, 2> scores;
    View<std::int32_t, 2> indices;
  };
  using Shared = typename Row::Shared;
  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    Index const row = simt::block_x(), k = p.indices.extent(1), n = p.scores.extent(1);
    int const chosen = static_cast<int>(simt::smaller(k, n));
    if (chosen > 0) Row{shared, p.scores.row(row), n}.select(chosen, p.indices.row(row));
    for (Index i = chosen + simt::thread_id(); i < k; i += threads) p.indices(row, i) = -1;
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::gpu

#if defined(__GNUC__) && !defined(__clang__) && !HYBRIDATTN_CUDA
#pragma GCC diagnostic pop
#endif
#endif

// ==== hybridattn/attention/dsa/kernel_indexer.hpp
// The indexer as kernels: scores of a slice of queries, then each query's choice. Numbers in brackets are equations of dsa.hpp.
#ifndef HYBRIDATTN_ATTENTION_DSA_KERNEL_INDEXER_HPP
#define HYBRIDATTN_ATTENTION_DSA_KERNEL_INDEXER_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::dsa {

template <class T> struct ChoiceParams {
  Batch<T> batch;
  View<T, 2> scores;                // of the slice, [queries of the slice, keys]
  View<std::int32_t, 2> indices;
  Index first, last;                // queries of the slice
};

// Scores of a few queries with a tile of keys. A thread has a key.
template <class T> struct ScoreKeys {
  static constexpr int threads = 128, queries = 4;
  using Params = ChoiceParams<T>;
  using Tile = GatheredRows<T, threads>;
  struct Shared {
    Tile keys;
    T q[Tile::piece][queries];
  };

  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    auto const& owners = p.batch.sequences.owners;
    Index const first = p.first + simt::block_y() * queries, last = simt::smaller(first + queries, p.last);
    for (Index n = first; n < last;) {   // the queries of one sequence at a time
      Index end = n + 1;
      while (end < last && owners(end) == owners(n)) ++end;
      score(shared, p, n, static_cast<int>(end - n));
      n = end;
    }
  }

 private:
  static HYBRIDATTN_DEVICE void score(Shared& shared, Params const& p, Index n, int count) {
    Query<T> const query{p.batch, n + count - 1};   // it sees all keys that the other ones see
    Index const first_key = simt::block_x() * threads, key = first_key + simt::thread_id(), HI = p.batch.x.index_w.extent(1);
    if (query.seen() <= first_key || query.selected() == query.seen()) return;
    int const keys = static_cast<int>(simt::smaller<Index>(query.seen() - first_key, threads));
    shared.keys.begin[simt::thread_id()] = simt::thread_id() < keys ? query.index_row(key) : nullptr;
    T scores[queries] = {};
    for (Index j = 0; j < HI; ++j) {
      T products[queries] = {};
      multiply(shared, p, n, count, j, keys, products);
      HYBRIDATTN_UNROLL_IN_KERNEL
      for (int u = 0; u < queries; ++u) {
        T const product = simt::rounded_product(p.batch.index_scale, products[u]);
        if (u < count) scores[u] += p.batch.x.index_w(n + u, j) * (product < 0 ? T(0) : product);   // (1)
      }
    }
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int u = 0; u < queries; ++u)
      if (u < count && key < Query<T>{p.batch, n + u}.seen()) p.scores(n + u - p.first, key) = scores[u];
  }
  // products[u] = iq_j . ik of query n + u and the key of this thread, summed in the order of entries.
  static HYBRIDATTN_DEVICE void multiply(Shared& shared, Params const& p, Index n, int count, Index j, int keys, T (&products)[queries]) {
    Index const DI = p.batch.x.index_k.extent(1);
    for (Index first = 0; first < DI; first += Tile::piece) {
      int const entries = entries_from(first, DI, Tile::piece);
      simt::sync_block();
      shared.keys.load(first, DI, keys);
      for (int i = simt::thread_id(); i < entries * queries; i += threads) {
        int const e = i / queries, u = i % queries;
        shared.q[e][u] = u < count ? p.batch.x.index_q(n + u, j, first + e) : T(0);
      }
      simt::sync_block();
      if (simt::thread_id() >= keys) continue;
      for (int e = 0; e < entries; ++e) {
        T const k = shared.keys.entries[simt::thread_id()][e];
        HYBRIDATTN_UNROLL_IN_KERNEL
        for (int u = 0; u < queries; ++u) products[u] += shared.q[e][u] * k;
      }
    }
  }
};

// (2) of a query, from its scores. A block has a query. A query that selects all keys that it sees needs no scores.
template <class T> struct SelectKeys {
  static constexpr int threads = 128;
  using Params = ChoiceParams<T>;
  using Row = gpu::RowTopK<T, threads>;
  using Shared = typename Row::Shared;

  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    Index const n = p.first + simt::block_x();
    Query<T> const query{p.batch, n};
    int const k = static_cast<int>(query.selected());
    std::int32_t* const indices = p.indices.row(n);
    if (k < query.seen()) Row{shared, p.scores.row(n - p.first), query.seen()}.select(k, indices);
    else
      for (int i = simt::thread_id(); i < k; i += threads) indices[i] = i;
    for (Index i = k + simt::thread_id(); i < p.indices.extent(1); i += threads) indices[i] = -1;
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::dsa
#endif

// ==== hybridattn/attention/dsa/kernel_kl.hpp
// The indexer's loss as kernels. Numbers in brackets are equations of dsa.hpp. Scores and attention's weights are computed again where they
// are needed. Only their gradients d_I are stored, for a block of queries of each sequence at a time where rows of d_I are as long as the
// sequence.
#ifndef HYBRIDATTN_ATTENTION_DSA_KERNEL_KL_HPP
#define HYBRIDATTN_ATTENTION_DSA_KERNEL_KL_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::dsa {

template <class T> struct KlParams {
  Batch<T> batch;
  View<wide_t<T> const, 2> lse;
  View<wide_t<T>, 1> index_lse;
  View<T, 1> losses;  // [N], each query's part of (6)
  // Only in backward.
  View<wide_t<T> const, 1> y_index_lse, d_loss;
  Inputs<Out<T>> d_x;
  View<T, 1> d_scores;  // d_I
  Index first, queries;  // the block of queries of each sequence
  Index tiles;  // of keys, in the longest sequence

  // Where d_I of query t of a sequence begins.
  HYBRIDATTN_DEVICE T* d_scores_of(Sequence s, Index t) const {
    View<std::int32_t const, 2> const& indices = batch.indices;
    return d_scores.data + (indices.empty() ? queries * s.start + (t - first) * s.length : (s.start + t) * indices.extent(1));
  }
};

// index_scale iq_j . ik, of query n and a key of each thread.
template <class T, int threads>
HYBRIDATTN_DEVICE T index_product(GatheredRows<T, threads>& rows, Batch<T> const& b, Index n, Index j, T const* key_row, int count) {
  return simt::rounded_product(b.index_scale, gather_dot(rows, b.x.index_q.row(n, j), key_row, b.x.index_k.extent(1), count));
}
// (1) of query n and a key of each thread.
template <class T, int threads>
HYBRIDATTN_DEVICE T index_score(GatheredRows<T, threads>& rows, Batch<T> const& b, Index n, T const* key_row, int count) {
  T score = 0;
  for (Index j = 0; j < b.x.index_w.extent(1); ++j) {
    T const product = index_product(rows, b, n, j, key_row, count);
    score += b.x.index_w(n, j) * (product < 0 ? T(0) : product);
  }
  return score;
}
// p of (5), of query n and a key of each thread.
template <class T, int threads>
HYBRIDATTN_DEVICE T target_share(GatheredRows<T, threads>& rows, Batch<T> const& b, View<wide_t<T> const, 2> lse, Index n,
                                 Query<T> const& query, Index key, int count) {
  T sum = 0;
  for (Index h = 0, H = b.x.q.extent(1); h < H; ++h)
    sum += std::exp(attention_score(rows, b, n, h, query.key_row(key, b.kv_head(h)), count) - lse(n, h));
  return sum / static_cast<T>(b.x.q.extent(1));
}

// (5) and a query's part of (6). A thread has a key of a tile of keys.
template <class T> struct IndexLoss {
  static constexpr int threads = 64;
  using Params = KlParams<T>;
  struct Shared {
    GatheredRows<T, threads> rows;
    T of_warps[threads / 32];
  };

  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    Index const n = simt::block_x();
    Query<T> const query{p.batch, n};
    Index const count = query.count();
    T score = 0, largest = -simt::infinity<T>(), total = 0, loss = 0;
    for (Index first = 0; first < count; first += threads) {
      score = score_from(shared, p, query, first);
      if (first + simt::thread_id() < count) largest = simt::larger(score, largest);
    }
    largest = largest_of_block(shared.of_warps, largest);
    for (Index first = 0; first < count; first += threads) {
      if (count > threads) score = score_from(shared, p, query, first);
      if (first + simt::thread_id() < count) total += std::exp(score - largest);
    }
    T const index_lse = largest + std::log(gpu::sum_block(shared.of_warps, total));
    for (Index first = 0; first < count; first += threads) {
      if (count > threads) score = score_from(shared, p, query, first);
      Index const j = first + simt::thread_id();
      T const share =
          target_share(shared.rows, p.batch, p.lse, n, query, j < count ? query.key(j) : 0, entries_from(first, count, threads));
      if (j < count) loss += divergence(share, score - index_lse);
    }
    loss = gpu::sum_block(shared.of_warps, loss);
    if (simt::thread_id() > 0) return;
    p.index_lse(n) = index_lse;
    p.losses(n) = loss;
  }

 private:
  static HYBRIDATTN_DEVICE T score_from(Shared& shared, Params const& p, Query<T> const& query, Index first) {
    Index const j = first + simt::thread_id();
    return index_score(shared.rows, p.batch, simt::block_x(), query.index_row(j < query.count() ? query.key(j) : 0),
                       entries_from(first, query.count(), threads));
  }
  static HYBRIDATTN_DEVICE T divergence(T share, T log_r) {
    return (share > 0 ? share * (std::log(share) - log_r) : T(0)) + (std::exp(log_r) - share);  // (6)
  }
};

// The sum of all queries' losses, 0 for none. One block, a thread has every 256th query.
template <class T> struct SumLosses {
  static constexpr int threads = 256;
  struct Params {
    View<T const, 1> losses;
    View<wide_t<T>, 1> sum;
  };
  struct Shared {
    T of_warps[threads / 32];
  };
  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    T sum = 0;
    for (Index n = simt::thread_id(); n < p.losses.count(); n += threads) sum += p.losses(n);
    sum = gpu::sum_block(shared.of_warps, sum);
    if (simt::thread_id() == 0) p.sum(0) = sum;
  }
};

// (7) of a query's index_q and index_w, and its d_I. A thread has a key of a tile of keys, then entries of d_iq.
template <class T> struct IndexQueryGradients {
  static constexpr int threads = 64;
  using Params = KlParams<T>;
  struct Shared {
    GatheredRows<T, threads> rows;
    T const* keys[threads];
    T d_z[threads], of_warps[threads / 32];
  };

  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    PartOfSequence const at{p.queries};
    Sequence const sequence = p.batch.sequences.list(at.sequence);
    Index const t = p.first + at.part, n = sequence.start + t;
    if (t >= sequence.length) return;
    Query<T> const query{p.batch, n};
    T const d_loss = p.d_loss(0);
    for (Index first = 0, count = query.count(); first < count; first += threads) {
      Index const j = first + simt::thread_id(), key = j < count ? query.key(j) : 0;
      int const keys = entries_from(first, count, threads);
      T const* const row = query.index_row(key);
      T const score = index_score(shared.rows, p.batch, n, row, keys);
      T const share = target_share(shared.rows, p.batch, p.lse, n, query, key, keys);
      T const d_score = d_loss == 0 ? T(0) : d_loss * (std::exp(score - p.y_index_lse(n)) - share);
      if (j < count) p.d_scores_of(sequence, t)[j] = d_score;
      add_heads(shared, p, n, row, keys, d_score, first == 0);
    }
  }

 private:
  // Adds a tile of keys to the gradients of every head. They are 0 where the loss has no gradient, whatever the inputs are.
  static HYBRIDATTN_DEVICE void add_heads(Shared& shared, Params const& p, Index n, T const* row, int keys, T d_score, bool overwrites) {
    bool const is_key = simt::thread_id() < keys, trains = p.d_loss(0) != 0;
    for (Index j = 0; j < p.batch.x.index_w.extent(1); ++j) {
      T const z = index_product(shared.rows, p.batch, n, j, row, keys);
      shared.keys[simt::thread_id()] = row;
      shared.d_z[simt::thread_id()] = z > 0 ? p.batch.index_scale * p.batch.x.index_w(n, j) * d_score : T(0);
      T const d_w = gpu::sum_block(shared.of_warps, is_key && trains ? d_score * (z < 0 ? T(0) : z) : T(0));  // waits for d_z too
      if (simt::thread_id() == 0 && !p.d_x.index_w.empty()) p.d_x.index_w(n, j) = overwrites ? d_w : p.d_x.index_w(n, j) + d_w;
      if (p.d_x.index_q.empty()) continue;
      add_rows(shared.d_z, shared.keys, trains ? keys : 0, overwrites, p.d_x.index_q.row(n, j), p.batch.x.index_k.extent(1));
    }
  }
};

// (7) of a tile of index keys. The sums go through the queries in order, and for each through the indexer's heads. A thread has a pair of
// a query and a key, then entries of d_ik.
template <class T> struct IndexKeyGradients {
  static constexpr int threads = Pairs::threads;
  using Params = KlParams<T>;
  struct Shared {
    Pairs::Shared pairs;
    GatheredRows<T, threads> of_query, of_key;
    T const* q[threads];
    T d_z[threads];
    int keys[threads];
  };

  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    PartOfSequence const at{p.tiles};
    Sequence const sequence = p.batch.sequences.list(at.sequence);
    Index const first = Index{at.part} * Pairs::keys, end = simt::smaller(p.first + p.queries, sequence.length);
    if (first >= sequence.length) return;
    View<T, 2> const d_keys{p.d_x.index_k.row(sequence.start + first),
                            {entries_from(first, sequence.length, Pairs::keys), p.d_x.index_k.extent(1)},
                            p.d_x.index_k.stride};
    if (p.first == 0) set_tile_zero(d_keys);
    if (p.d_loss(0) == 0) return;
    for (Index query = simt::larger(p.first, first); query < end; query += Pairs::queries) {
      Pairs const pairs{shared.pairs, p.batch, sequence, first, query, end};
      int const terms = pairs.count() * static_cast<int>(p.batch.x.index_w.extent(1));
      for (int term = 0; term < terms; term += threads) {
        int const count = entries_from(term, terms, threads);
        weigh(shared, p, pairs, sequence, first, query, term, count);
        simt::sync_block();
        add_terms(shared.d_z, shared.q, shared.keys, count, d_keys);
      }
    }
  }

 private:
  // d_z of `count` terms: pairs, and for each the heads of the indexer. Queries and keys are counted from positions t and key.
  static HYBRIDATTN_DEVICE void weigh(Shared& shared, Params const& p, Pairs const& pairs, Sequence s, Index key, Index t, int term,
                                      int count) {
    int const thread = simt::thread_id(), own = term + (thread < count ? thread : 0), HI = static_cast<int>(p.batch.x.index_w.extent(1));
    Pair const pair = pairs[own / HI];
    Index const n = s.start + t + pair.query, j = own % HI;
    T const *const q = p.batch.x.index_q.row(n, j), *const k = p.batch.x.index_k.row(s.start + key + pair.key);
    T const d_score = p.d_scores_of(s, t + pair.query)[pair.place], weight = p.batch.index_scale * p.batch.x.index_w(n, j);
    T const product = gather_dot(shared.of_query, q, shared.of_key, k, p.batch.x.index_k.extent(1), count);
    shared.q[thread] = q;
    shared.keys[thread] = pair.key;
    shared.d_z[thread] = simt::rounded_product(p.batch.index_scale, product) > 0 ? weight * d_score : T(0);
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::dsa
#endif

// ==== hybridattn/attention/dsa/kernels.hpp
// Sparse attention as kernels.
#ifndef HYBRIDATTN_ATTENTION_DSA_KERNELS_HPP
#define HYBRIDATTN_ATTENTION_DSA_KERNELS_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::dsa {

// Copies keys, values and index keys of new tokens into the cache. A thread has an entry.
template <class T> struct RememberKeys {
  Inputs<In<T>> x;
  Cache<Out<T>> cache;
  SequenceTable sequences;

  HYBRIDATTN_HD void operator()(Index i) const {
    Index const D = x.k.extent(2), HK = x.k.extent(1), n = i / (HK * D), h = i / D % HK, d = i % D;
    cache.keys(sequences.owners(n), sequences.positions(n), h, d) = x.k(n, h, d);
    cache.values(sequences.owners(n), sequences.positions(n), h, d) = x.v(n, h, d);
  }
};
template <class T> struct RememberIndexKeys {
  View<T const, 2> index_k;
  View<T, 3> index_keys;
  SequenceTable sequences;

  HYBRIDATTN_HD void operator()(Index i) const {
    Index const n = i / index_k.extent(1), d = i % index_k.extent(1);
    index_keys(sequences.owners(n), sequences.positions(n), d) = index_k(n, d);
  }
};

// Sets an element of a gradient to 0. Its rows may have gaps between them.
template <class T, int Rank> struct SetElementZero {
  View<T, Rank> x;

  HYBRIDATTN_HD void operator()(Index i) const {
    if constexpr (Rank == 2) x(i / x.extent(1), i % x.extent(1)) = 0;
    else x(i / (x.extent(1) * x.extent(2)), i / x.extent(2) % x.extent(1), i % x.extent(2)) = 0;
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::dsa
#endif

// ==== hybridattn/attention/dsa/gpu.hpp
#ifndef HYBRIDATTN_ATTENTION_DSA_GPU_HPP
#define HYBRIDATTN_ATTENTION_DSA_GPU_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {
namespace dsa {

template <class T, class M>
Batch<T> batch_of(SparseOptions o, Config const& c, SequencesOn<M> const& s, Inputs<In<T>> x, View<std::int32_t const, 2> indices) {
  return {.options = o,
          .x = x,
          .sequences = s.table(),
          .indices = indices,
          .group = static_cast<int>(c.num_heads / c.num_kv_heads),
          .scale = static_cast<T>(c.scale),
          .index_scale = static_cast<T>(c.index_scale),
          .cache = {}};
}

// (1) and (2). Scores are stored for a slice of queries at a time. `room` is the number of keys that a row of scores has room for,
// `longest` of those that a query may see.
template <class T, class B>
void choose_keys(B& gpu, Batch<T> const& batch, Index tokens, Index longest, Index room, View<std::int32_t, 2> indices) {
  constexpr Index slice = 256;
  Tensor<T, 2, B> scores{gpu, {std::min(tokens, slice), room}};
  for (Index first = 0; first < tokens; first += slice) {
    ChoiceParams<T> const p{batch, out(scores), indices, first, std::min(first + slice, tokens)};
    if (selection_size(batch.options, longest) < longest)
      launch<ScoreKeys<T>>(gpu, {.x = ceil_div(longest, ScoreKeys<T>::threads), .y = ceil_div(p.last - first, ScoreKeys<T>::queries)}, p);
    launch<SelectKeys<T>>(gpu, {.x = p.last - first}, p);
  }
}

// (3). An empty lse is not computed.
template <class T, class B> void attend(B& gpu, Batch<T> const& batch, View<T, 3> o, Wide<Out<T>, 2> lse) {
  AttentionParams<T> p{};
  p.batch = batch;
  p.o = o;
  p.lse = lse;
  launch<Attend<T>>(gpu, {.x = o.extent(0), .y = o.extent(1)}, p);
}
// (4)
template <class T, class B>
void attend_backward(B& gpu, Sequences const& s, Batch<T> const& batch, Outputs<In<T>> y, Saved<In<T>> saved, Outputs<In<T>> d_y,
                     Inputs<Out<T>> d_x) {
  Tensor<wide_t<T>, 2, B> delta{gpu, saved.lse.shape};
  AttentionParams<T> p{};
  p.batch = batch;
  p.y = y.o;
  p.d_o = d_y.o;
  p.y_lse = saved.lse;
  p.delta = out(delta);
  p.d_x = d_x;
  p.tiles = ceil_div(s.longest(), Pairs::keys);
  launch<AttendQueryGradients<T>>(gpu, {.x = y.o.extent(0), .y = y.o.extent(1)}, p);
  launch<AttendKeyGradients<T>>(gpu, {.x = s.count() * p.tiles, .y = batch.x.k.extent(1)}, p);
}

// (5) and (6) of every query, and their sum unless `loss` is an empty view.
template <class T, class B> void index_loss(B& gpu, Batch<T> const& batch, Saved<Out<T>> saved, State<Out<T>, 1> loss) {
  Tensor<T, 1, B> losses{gpu, {batch.x.q.extent(0)}};
  KlParams<T> p{};
  p.batch = batch;
  p.lse = saved.lse;
  p.index_lse = saved.index_lse;
  p.losses = out(losses);
  launch<IndexLoss<T>>(gpu, {.x = batch.x.q.extent(0)}, p);
  if (!loss.empty()) launch<SumLosses<T>>(gpu, {}, {in(losses), loss});
}
// (7). d_I has a row of selected keys for each token, or rows of all keys for a block of queries of each sequence.
template <class T, class B>
void index_loss_backward(B& gpu, Sequences const& s, Batch<T> const& batch, Saved<In<T>> saved, State<In<T>, 1> d_loss,
                         Inputs<Out<T>> d_x) {
  bool const is_dense = batch.indices.empty();
  Index const queries = is_dense ? Index{256} : s.longest(), columns = is_dense ? queries : batch.indices.extent(1);
  Tensor<T, 1, B> d_scores{gpu, {size_product(s.tokens(), columns)}};
  KlParams<T> p{};
  p.batch = batch;
  p.lse = saved.lse;
  p.y_index_lse = saved.index_lse;
  p.d_loss = d_loss;
  p.d_x = d_x;
  p.d_scores = out(d_scores);
  p.queries = queries;
  p.tiles = ceil_div(s.longest(), Pairs::keys);
  for (; p.first < s.longest(); p.first += queries) {
    launch<IndexQueryGradients<T>>(gpu, {.x = s.count() * queries}, p);
    if (!d_x.index_k.empty()) launch<IndexKeyGradients<T>>(gpu, {.x = s.count() * p.tiles}, p);
  }
}

template <class B, class T, int... Ranks> void set_gradients_zero(B& gpu, View<T, Ranks>... x) {
  (for_each(gpu, x.count(), SetElementZero<T, Ranks>{x}), ...);
}

}  // namespace dsa

template <SparseOptions O, GpuBackend B> struct On<SparseAttention<O>, B> : InFloat<SparseAttention<O>, B> {
  using InFloat<SparseAttention<O>, B>::forward, InFloat<SparseAttention<O>, B>::backward, InFloat<SparseAttention<O>, B>::extend;
  template <std::floating_point T, class M>
  static void forward(B& gpu, dsa::Config const& c, SequencesOn<M> const& s, dsa::Inputs<In<T>> x, dsa::Outputs<Out<T>> y,
                      dsa::Saved<Out<T>> saved) {
    auto const batch = dsa::batch_of<T>(O, c, s, x, saved.indices);
    if (c.stage != Stage::dense_warm_up) dsa::choose_keys(gpu, batch, s.tokens(), s.longest(), s.longest(), saved.indices);
    dsa::attend(gpu, batch, y.o, saved.lse);
    if (c.stage != Stage::language_model) dsa::index_loss<T>(gpu, batch, saved, y.auxiliary_loss);
    else if (!y.auxiliary_loss.empty()) launch<dsa::SumLosses<T>>(gpu, {}, {{}, y.auxiliary_loss});
  }

  template <std::floating_point T, class M>
  static void backward(B& gpu, dsa::Config const& c, SequencesOn<M> const& s, dsa::Inputs<In<T>> x, dsa::Outputs<In<T>> y,
                       dsa::Saved<In<T>> saved, dsa::Outputs<In<T>> d_y, dsa::Inputs<Out<T>> d_x) {
    auto const batch = dsa::batch_of<T>(O, c, s, x, saved.indices);
    if (d_y.o.empty()) dsa::set_gradients_zero(gpu, d_x.q, d_x.k, d_x.v);
    else dsa::attend_backward<T>(gpu, s, batch, y, saved, d_y, d_x);
    bool const trains_indexer = c.stage != Stage::language_model && !d_y.auxiliary_loss.empty();
    if (trains_indexer) dsa::index_loss_backward<T>(gpu, s, batch, saved, d_y.auxiliary_loss, d_x);
    else dsa::set_gradients_zero(gpu, d_x.index_q, d_x.index_k, d_x.index_w);
  }

  // Decoding computes no auxiliary loss in any stage.
  template <std::floating_point T, class M>
  static void extend(B& gpu, dsa::Config const& c, SequencesOn<M> const& s, dsa::Inputs<In<T>> x, dsa::Cache<Out<T>> cache,
                     dsa::Outputs<Out<T>> y) requires(O.top_k_percent == 0) {
    Index const capacity = cache.keys.extent(1);
    check_fits(s, cache.keys.extent(0), capacity);
    bool const is_dense = c.stage == Stage::dense_warm_up;
    Tensor<std::int32_t, 2, B> indices{gpu, {s.tokens(), Index{is_dense ? 0 : O.top_k}}};
    auto batch = dsa::batch_of<T>(O, c, s, x, in(indices));
    batch.cache = {cache.keys, cache.values, cache.index_keys};
    Index longest = 0;
    for (Sequence const sequence : s) longest = std::max(longest, sequence.past + sequence.length);
    if (!is_dense) dsa::choose_keys(gpu, batch, s.tokens(), longest, capacity, out(indices));
    dsa::attend(gpu, batch, y.o, {});
    for_each(gpu, x.k.count(), dsa::RememberKeys<T>{x, cache, s.table()});
    for_each(gpu, x.index_k.count(), dsa::RememberIndexKeys<T>{x.index_k, cache.index_keys, s.table()});
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/attention/from_loops.hpp
// A policy's own loops as kernels of one thread: right and slow, for a policy that has no kernels yet.
#ifndef HYBRIDATTN_ATTENTION_FROM_LOOPS_HPP
#define HYBRIDATTN_ATTENTION_FROM_LOOPS_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {
namespace gpu {

// A pass of a policy: P::Loops::forward or backward with these arguments.
template <class P, class T> struct LoopsForward {
  static constexpr int threads = 32;
  struct Params {
    typename P::Config config;
    View<Sequence const, 1> sequences;
    typename P::template Inputs<In<T>> x;
    typename P::template Outputs<Out<T>> y;
    typename P::template Saved<Out<T>> saved;
    View<T, 1> scratch;
  };
  struct Shared {};
  static HYBRIDATTN_DEVICE void run(Shared&, Params const& p) {
    if (simt::thread_id() == 0) P::Loops::template forward<T>(p.config, p.sequences, p.x, p.y, p.saved, p.scratch);
  }
};
template <class P, class T> struct LoopsBackward {
  static constexpr int threads = 32;
  struct Params {
    typename P::Config config;
    View<Sequence const, 1> sequences;
    typename P::template Inputs<In<T>> x;
    typename P::template Outputs<In<T>> y;
    typename P::template Saved<In<T>> saved;
    typename P::template Outputs<In<T>> d_y;
    typename P::template Inputs<Out<T>> d_x;
    View<T, 1> scratch;
  };
  struct Shared {};
  static HYBRIDATTN_DEVICE void run(Shared&, Params const& p) {
    if (simt::thread_id() == 0) P::Loops::template backward<T>(p.config, p.sequences, p.x, p.y, p.saved, p.d_y, p.d_x, p.scratch);
  }
};

}  // namespace gpu

// template <ha::GpuBackend B> struct ha::On<Mine, B> : ha::FromLoops<Mine, B> {};
//
// Mine::Loops has, for a scalar T:
//   scratch<T>(config, sequences)   how many elements of T the loops need besides their arguments; on the host
//   forward<T> (config, sequences, x, y, saved, scratch)              HYBRIDATTN_HD
//   backward<T>(config, sequences, x, y, saved, d_y, d_x, scratch)    HYBRIDATTN_HD
// where `sequences` is a View<Sequence const, 1> and `scratch` a View<T, 1>. The Config is copied to the machine, so it holds only
// numbers.
template <class P, class B> struct FromLoops : InFloat<P, B> {
  using InFloat<P, B>::forward, InFloat<P, B>::backward;
  template <std::floating_point T, class M>
  static void forward(B& gpu, typename P::Config const& c, SequencesOn<M> const& s, typename P::template Inputs<In<T>> x,
                      typename P::template Outputs<Out<T>> y, typename P::template Saved<Out<T>> saved) {
    Tensor<T, 1, B> scratch{gpu, {P::Loops::template scratch<T>(c, s)}};
    launch<gpu::LoopsForward<P, T>>(gpu, {}, {c, s.table().list, x, y, saved, out(scratch)});
  }
  template <std::floating_point T, class M>
  static void backward(B& gpu, typename P::Config const& c, SequencesOn<M> const& s, typename P::template Inputs<In<T>> x,
                       typename P::template Outputs<In<T>> y, typename P::template Saved<In<T>> saved,
                       typename P::template Outputs<In<T>> d_y, typename P::template Inputs<Out<T>> d_x) {
    Tensor<T, 1, B> scratch{gpu, {P::Loops::template scratch<T>(c, s)}};
    launch<gpu::LoopsBackward<P, T>>(gpu, {}, {c, s.table().list, x, y, saved, d_y, d_x, out(scratch)});
  }
};
// Whether a policy runs from its loops on this backend.
template <class P, class B>
concept RunsFromLoops = std::is_base_of_v<FromLoops<P, B>, On<P, B>>;

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/attention/room.hpp
// Kernels for GPUs are compiled for a few sizes of a head. A smaller head leaves the rest of its room at zero.
#ifndef HYBRIDATTN_ATTENTION_ROOM_HPP
#define HYBRIDATTN_ATTENTION_ROOM_HPP

#include <type_traits>

namespace hybridattn::inline HYBRIDATTN_ABI::attention {

// f(room) with the smallest room for `entries` that kernels are compiled for. Throws Error where none is large enough; the error names
// the policy and the size.
template <class F> void with_room(char const* policy, char const* size, Index entries, F f) {
  check(entries <= 256, policy, ": ", size, " ", entries, "; a GPU's kernels have room for 256");
  if (entries <= 32) f(std::integral_constant<int, 32>{});
  else if (entries <= 64) f(std::integral_constant<int, 64>{});
  else if (entries <= 128) f(std::integral_constant<int, 128>{});
  else f(std::integral_constant<int, 256>{});
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::attention
#endif

// ==== hybridattn/attention/full/kernels.hpp
// Full attention as kernels, in exact arithmetic. Numbers in brackets are equations of full.hpp.
//
// A block of threads has a tile of rows: queries in forward and for d_q, keys for d_k and d_v. It goes through the tiles of the other
// side (arXiv 2307.08691). A row of the tile has a few neighbouring lanes of one warp. Lane c of them has the columns c, c + lanes, ... of
// the tile of scores, and the entries c, c + lanes, ... of the head.
// A mask is the bounds of a loop, not a weight of zero: 0 times a NaN behind the mask would be NaN.
#ifndef HYBRIDATTN_ATTENTION_FULL_KERNELS_HPP
#define HYBRIDATTN_ATTENTION_FULL_KERNELS_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::full {

// Tiles for heads with room for D entries. Four of them and two of scores fit into 99 KB of shared memory.
template <class T, int D> struct Tiling {
  static constexpr int bytes = static_cast<int>(sizeof(T)) * D;   // of a row
  static constexpr int rows = bytes < 1024 ? 32 : bytes < 2048 ? 16 : 8;
  static constexpr int lanes = rows == 32 ? 4 : 8;
  static constexpr int threads = rows * lanes;
  static constexpr int columns = rows / lanes, entries = D / lanes;   // of a lane
};

// Rows of a head in shared memory. Entries that the head does not have are zeros.
template <class T, int D> struct Tile {
  using Of = Tiling<T, D>;
  simt::Table<T, Of::rows, D + 1> row;   // one more, so that the rows begin in different banks

  // Rows first, first + 1, ... of head h of a sequence. Rows behind its end are zeros.
  HYBRIDATTN_DEVICE void load(View<T const, 3> from, Sequence s, Index h, Index first) {
    Index const dim = from.extent(2);
    for (int i = simt::thread_id(); i < Of::rows * D; i += Of::threads) {
      int const r = i / D, d = i % D;
      row[r][d] = first + r < s.length && d < dim ? from(s.start + first + r, h, d) : T(0);
    }
  }
};
template <class T, std::size_t columns> HYBRIDATTN_DEVICE T dot_rows(T const (&a)[columns], T const (&b)[columns]) {
  T sum = 0;
  HYBRIDATTN_UNROLL_8_IN_KERNEL
  for (int d = 0; d < static_cast<int>(columns) - 1; ++d) sum += a[d] * b[d];
  return sum;
}

template <class T> struct KernelParams {
  Inputs<In<T>> x;
  View<T, 3> o;
  View<wide_t<T>, 2> lse;
  // Only in backward.
  View<T const, 3> y, d_o;
  View<wide_t<T> const, 2> y_lse;
  View<wide_t<T>, 2> delta;
  Inputs<Out<T>> d_x;

  View<Sequence const, 1> sequences;
  Index tiles;    // of the longest sequence
  Index window;   // 0: none
  Index group;    // query heads of a key/value head
  T scale;
  bool skips_continued;   // sequences with past tokens
};

// The rows of a block: a tile of one head of one sequence.
template <class T> struct Place {
  Sequence sequence;
  Index first, head, reach;

  // The last tiles of a sequence start first, because their queries have the most keys.
  HYBRIDATTN_DEVICE Place(KernelParams<T> const& p, int rows)
      : sequence(p.sequences(simt::block_x() / p.tiles)), first((p.tiles - 1 - simt::block_x() % p.tiles) * rows), head(simt::block_y()),
        reach(p.window == 0 ? sequence.length : p.window) {}
  HYBRIDATTN_DEVICE bool is_empty(KernelParams<T> const& p) const {
    return first >= sequence.length || (p.skips_continued && sequence.past > 0);
  }
  // The first row of the first tile of keys that a query of this tile sees.
  HYBRIDATTN_DEVICE Index first_key(int rows) const { return simt::larger<Index>(first - reach + 1, 0) / rows * rows; }
};
// Rows begin .. end - 1 of a tile.
struct Range {
  int begin, end;
  HYBRIDATTN_DEVICE bool holds(int row) const { return begin <= row && row < end; }
};
// Those of the rows from .. to - 1 of a sequence that are in the tile from row `first` on.
HYBRIDATTN_DEVICE Range within(Index from, Index to, Index first, int rows) {
  return {static_cast<int>(simt::larger<Index>(from - first, 0)), static_cast<int>(simt::smaller<Index>(to - first, rows))};
}
// The softmax of the scores that a row has seen so far: attention::OnlineSoftmax for a kernel. nvcc takes no function for both machines
// that on the CPU may have vectors.
template <class T> struct SeenScores {
  T largest = -simt::infinity<T>(), total = 0;   // sum of e^(score - largest)

  // Returns the factor for all sums that were weighted by e^(score - largest).
  HYBRIDATTN_DEVICE T raise(T next) {
    T const factor = std::exp(largest - next);
    largest = next;
    total *= factor;
    return factor;
  }
  HYBRIDATTN_DEVICE T lse() const { return largest + std::log(total); }
};

// o and lse of a tile of queries.
template <class T, int D> struct Forward {
  using Of = Tiling<T, D>;
  static constexpr int threads = Of::threads, rows = Of::rows, lanes = Of::lanes;
  using Params = KernelParams<T>;
  struct Shared {
    Tile<T, D> q, kv;
    simt::Table<T, rows, rows + 1> weights;
  };

  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    Place<T> const at{p, rows};
    if (at.is_empty(p)) return;
    int const r = simt::thread_id() / lanes, c = simt::thread_id() % lanes;
    Index const i = at.first + r, hk = at.head / p.group;
    T o[Of::entries] = {};
    SeenScores<T> softmax;
    shared.q.load(p.x.q, at.sequence, at.head, at.first);
    for (Index key = at.first_key(rows); key <= at.first; key += rows) {
      shared.kv.load(p.x.k, at.sequence, hk, key);
      simt::sync_block();
      Range const seen = within(i - at.reach + 1, i + 1, key, rows);
      T const shrink = weigh(shared, p.scale, seen, r, c, softmax);
      simt::sync_block();   // all keys are read, all weights are written
      shared.kv.load(p.x.v, at.sequence, hk, key);
      simt::sync_block();
      HYBRIDATTN_UNROLL_IN_KERNEL
      for (int n = 0; n < Of::entries; ++n) o[n] *= shrink;
      for (int j = seen.begin; j < seen.end; ++j) {
        HYBRIDATTN_UNROLL_IN_KERNEL
        for (int n = 0; n < Of::entries; ++n) o[n] += shared.weights[r][j] * shared.kv.row[j][c + n * lanes];   // (3)
      }
      simt::sync_block();
    }
    if (i >= at.sequence.length) return;
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int n = 0; n < Of::entries; ++n)
      if (c + n * lanes < p.o.extent(2)) p.o(at.sequence.start + i, at.head, c + n * lanes) = o[n] / softmax.total;
    if (c == 0) p.lse(at.sequence.start + i, at.head) = softmax.lse();                                          // (2)
  }

 private:
  // Writes the weights of row r for the keys of the tile. Returns the factor for what was summed before.
  static HYBRIDATTN_DEVICE T weigh(Shared& shared, T scale, Range seen, int r, int c, SeenScores<T>& softmax) {
    T scores[Of::columns], largest = softmax.largest;
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int n = 0; n < Of::columns; ++n) {
      int const j = c + n * lanes;
      scores[n] = -simt::infinity<T>();
      if (seen.holds(j)) scores[n] = simt::rounded_product(scale, dot_rows(shared.q.row[r], shared.kv.row[j]));  // (1)
      largest = simt::larger(largest, scores[n]);
    }
    largest = simt::largest_of_lanes<lanes>(largest);
    bool const sees_none = seen.begin >= rows;   // of the keys up to here
    T const shrink = sees_none ? T(1) : softmax.raise(largest);
    T added = 0;
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int n = 0; n < Of::columns; ++n) {
      T const weight = sees_none ? T(0) : std::exp(scores[n] - largest);
      added += weight;
      shared.weights[r][c + n * lanes] = weight;
    }
    softmax.total += simt::sum_lanes<lanes>(added);
    return shrink;
  }
};

// delta and d_q of a tile of queries.
template <class T, int D> struct QueryGradients {
  using Of = Tiling<T, D>;
  static constexpr int threads = Of::threads, rows = Of::rows, lanes = Of::lanes;
  using Params = KernelParams<T>;
  struct Shared {
    Tile<T, D> q, d_o, k, v;
    simt::Table<T, rows, rows + 1> d_s;
  };

  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    Place<T> const at{p, rows};
    if (at.is_empty(p)) return;
    int const r = simt::thread_id() / lanes, c = simt::thread_id() % lanes;
    Index const i = at.first + r, hk = at.head / p.group, n_i = at.sequence.start + i;
    bool const is_query = i < at.sequence.length;
    shared.q.load(p.x.q, at.sequence, at.head, at.first);
    shared.d_o.load(p.d_o, at.sequence, at.head, at.first);
    shared.v.load(p.y, at.sequence, at.head, at.first);
    simt::sync_block();
    // The order of dot_rows: where one key has all the weight, o is its v, and the two terms of (4) cancel.
    T const delta = dot_rows(shared.d_o.row[r], shared.v.row[r]), lse = is_query ? p.y_lse(n_i, at.head) : T(0);
    if (is_query && c == 0) p.delta(n_i, at.head) = delta;
    simt::sync_block();
    T d_q[Of::entries] = {};
    for (Index key = at.first_key(rows); key <= at.first; key += rows) {
      shared.k.load(p.x.k, at.sequence, hk, key);
      shared.v.load(p.x.v, at.sequence, hk, key);
      simt::sync_block();
      Range const seen = within(i - at.reach + 1, is_query ? i + 1 : 0, key, rows);
      HYBRIDATTN_UNROLL_IN_KERNEL
      for (int n = 0; n < Of::columns; ++n) {
        int const j = c + n * lanes;
        if (!seen.holds(j)) continue;
        T const weight = std::exp(simt::rounded_product(p.scale, dot_rows(shared.q.row[r], shared.k.row[j])) - lse);   // (2)
        shared.d_s[r][j] = p.scale * weight * (dot_rows(shared.d_o.row[r], shared.v.row[j]) - delta);                  // (4)
      }
      simt::sync_warp();
      for (int j = seen.begin; j < seen.end; ++j) {
        HYBRIDATTN_UNROLL_IN_KERNEL
        for (int n = 0; n < Of::entries; ++n) d_q[n] += shared.d_s[r][j] * shared.k.row[j][c + n * lanes];             // (5)
      }
      simt::sync_block();
    }
    if (!is_query) return;
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int n = 0; n < Of::entries; ++n)
      if (c + n * lanes < p.d_x.q.extent(2)) p.d_x.q(n_i, at.head, c + n * lanes) = d_q[n];
  }
};

// d_k and d_v of a tile of keys: the sums go through the query heads of the group and their queries in order, without atomics.
template <class T, int D> struct KeyGradients {
  using Of = Tiling<T, D>;
  static constexpr int threads = Of::threads, rows = Of::rows, lanes = Of::lanes;
  using Params = KernelParams<T>;
  struct Shared {
    Tile<T, D> k, v, q, d_o;
    simt::Table<T, rows, rows + 1> weights, d_s;
  };

  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    Place<T> const at{p, rows};
    if (at.is_empty(p)) return;
    int const r = simt::thread_id() / lanes, c = simt::thread_id() % lanes;
    Index const j = at.first + r, last_query = simt::smaller(at.first + rows - 1 + at.reach, at.sequence.length);
    T d_k[Of::entries] = {}, d_v[Of::entries] = {};
    shared.k.load(p.x.k, at.sequence, at.head, at.first);
    shared.v.load(p.x.v, at.sequence, at.head, at.first);
    for (Index h = at.head * p.group; h < (at.head + 1) * p.group; ++h)
      for (Index query = at.first; query < last_query; query += rows) {
        shared.q.load(p.x.q, at.sequence, h, query);
        shared.d_o.load(p.d_o, at.sequence, h, query);
        simt::sync_block();
        Range const seen = within(j, simt::smaller(j + at.reach, at.sequence.length), query, rows);
        HYBRIDATTN_UNROLL_IN_KERNEL
        for (int n = 0; n < Of::columns; ++n) {
          int const i = c + n * lanes;
          if (!seen.holds(i)) continue;
          Index const n_i = at.sequence.start + query + i;
          T const weight = std::exp(simt::rounded_product(p.scale, dot_rows(shared.q.row[i], shared.k.row[r])) - p.y_lse(n_i, h));
          shared.weights[r][i] = weight;
          shared.d_s[r][i] = p.scale * weight * (dot_rows(shared.d_o.row[i], shared.v.row[r]) - p.delta(n_i, h));
        }
        simt::sync_warp();
        for (int i = seen.begin; i < seen.end; ++i) {
          HYBRIDATTN_UNROLL_IN_KERNEL
          for (int n = 0; n < Of::entries; ++n) {
            d_k[n] += shared.d_s[r][i] * shared.q.row[i][c + n * lanes];                                               // (5)
            d_v[n] += shared.weights[r][i] * shared.d_o.row[i][c + n * lanes];
          }
        }
        simt::sync_block();
      }
    if (j >= at.sequence.length) return;
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int n = 0; n < Of::entries; ++n)
      if (c + n * lanes < p.d_x.k.extent(2)) {
        p.d_x.k(at.sequence.start + j, at.head, c + n * lanes) = d_k[n];
        p.d_x.v(at.sequence.start + j, at.head, c + n * lanes) = d_v[n];
      }
  }
};

// ---- decoding

template <class T> struct ExtendParams {
  Inputs<In<T>> x;
  Cache<Out<T>> cache;
  View<T, 3> o;
  SequenceTable sequences;
  Index window, group;   // window 0: none
  T scale;
};

// Keys and values by their positions in a sequence, cached or new.
template <class T> struct KeysAt {
  ExtendParams<T> const& p;
  Sequence sequence;
  Index number, head;   // of the sequence, of the key/value head

  HYBRIDATTN_DEVICE T key(Index position, Index d) const { return entry(p.cache.keys, p.x.k, position, d); }
  HYBRIDATTN_DEVICE T value(Index position, Index d) const { return entry(p.cache.values, p.x.v, position, d); }

 private:
  HYBRIDATTN_DEVICE T entry(View<T const, 4> cached, View<T const, 3> fresh, Index position, Index d) const {
    return position < sequence.past ? cached(number, position % cached.extent(1), head, d)
                                    : fresh(sequence.start + position - sequence.past, head, d);
  }
};

// o of one new token of a sequence with past tokens, in one head. A lane of the first warp has a key of a tile, a thread entries of o.
template <class T, int D> struct Decode {
  static constexpr int threads = 128, keys = 32, entries = (D + threads - 1) / threads;
  using Params = ExtendParams<T>;
  struct Shared {
    simt::Array<T, D + 1> q;
    simt::Table<T, keys, D + 1> kv;
    simt::Array<T, keys> scores, weights;
  };

  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    Index const n = simt::block_x(), h = simt::block_y(), number = p.sequences.owners(n), dim = p.o.extent(2);
    KeysAt<T> const at{p, p.sequences.list(number), number, h / p.group};
    if (at.sequence.past == 0) return;
    Index const end = Index{p.sequences.positions(n)} + 1, first = p.window == 0 ? 0 : simt::larger<Index>(end - p.window, 0);
    simt::Array<T, entries> o = {};
    SeenScores<T> softmax;
    for (int d = simt::thread_id(); d < D; d += threads) shared.q[d] = d < dim ? p.x.q(n, h, d) : T(0);
    for (Index key = first; key < end; key += keys) {
      int const count = static_cast<int>(simt::smaller<Index>(end - key, keys));
      for (int i = simt::thread_id(); i < count * D; i += threads)
        shared.kv[i / D][i % D] = i % D < dim ? at.key(key + i / D, i % D) : T(0);
      simt::sync_block();
      T const shrink = weigh(shared, p.scale, count, softmax);
      for (int i = simt::thread_id(); i < count * D; i += threads)
        shared.kv[i / D][i % D] = i % D < dim ? at.value(key + i / D, i % D) : T(0);
      simt::sync_block();
      HYBRIDATTN_UNROLL_IN_KERNEL
      for (int e = 0; e < entries; ++e) {
        int const d = simt::thread_id() + e * threads;
        o[e] *= shrink;
        for (int j = 0; j < count && d < D; ++j) o[e] += shared.weights[j] * shared.kv[j][d];   // (3)
      }
      simt::sync_block();
    }
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int e = 0; e < entries; ++e)
      if (simt::thread_id() + e * threads < dim) p.o(n, h, simt::thread_id() + e * threads) = o[e] / softmax.total;
  }

 private:
  // Writes the weights of the tile's keys. Returns the factor for what was summed before.
  static HYBRIDATTN_DEVICE T weigh(Shared& shared, T scale, int count, SeenScores<T>& softmax) {
    int const j = simt::thread_id();
    if (j < count) shared.scores[j] = simt::rounded_product(scale, dot_rows(shared.q, shared.kv[j]));   // (1)
    simt::sync_block();
    T largest = softmax.largest;
    for (int i = 0; i < count; ++i) largest = simt::larger(largest, shared.scores[i]);
    T const shrink = softmax.raise(largest);
    if (j < count) shared.weights[j] = std::exp(shared.scores[j] - largest);
    simt::sync_block();   // all keys are read, all weights are written
    for (int i = 0; i < count; ++i) softmax.total += shared.weights[i];
    return shrink;
  }
};

// Copies keys and values of new tokens into the cache; with a window those of the last `window` tokens.
template <class T> struct Remember {
  Inputs<In<T>> x;
  Cache<Out<T>> cache;
  SequenceTable sequences;

  HYBRIDATTN_HD void operator()(Index i) const {
    Index const D = x.k.extent(2), HK = x.k.extent(1), ring = cache.keys.extent(1), n = i / (HK * D), h = i / D % HK, d = i % D;
    Index const number = sequences.owners(n), row = sequences.positions(n) % ring;
    Sequence const sequence = sequences.list(number);
    if (n + ring < sequence.start + sequence.length) return;
    cache.keys(number, row, h, d) = x.k(n, h, d);
    cache.values(number, row, h, d) = x.v(n, h, d);
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::full
#endif

// ==== hybridattn/attention/full/gpu.hpp
#ifndef HYBRIDATTN_ATTENTION_FULL_GPU_HPP
#define HYBRIDATTN_ATTENTION_FULL_GPU_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {
namespace full {

template <class F> void with_room(Config const& c, F f) { attention::with_room("FullAttention", "head_dim", c.head_dim, f); }

template <class T, class M> KernelParams<T> kernel_params(FullOptions o, Config const& c, SequencesOn<M> const& s, Inputs<In<T>> x) {
  KernelParams<T> p{};
  p.x = x;
  p.sequences = s.table().list;
  p.window = o.window;
  p.group = c.num_heads / c.num_kv_heads;
  p.scale = static_cast<T>(c.scale);
  return p;
}
// A block for each tile of each sequence and head.
template <class Kernel, class B> void launch_tiles(B& gpu, Sequences const& s, Index heads, typename Kernel::Params p) {
  p.tiles = ceil_div(s.longest(), Kernel::rows);
  launch<Kernel>(gpu, {.x = p.tiles * s.count(), .y = heads}, p);
}

template <class T, class B> void forward(B& gpu, Config const& c, Sequences const& s, KernelParams<T> const& p) {
  with_room(c, [&](auto D) { launch_tiles<Forward<T, D()>>(gpu, s, c.num_heads, p); });
}
template <class T, class B> void backward(B& gpu, Config const& c, Sequences const& s, KernelParams<T> p) {
  Tensor<wide_t<T>, 2, B> delta{gpu, p.y_lse.shape};
  p.delta = out(delta);
  with_room(c, [&](auto D) {
    launch_tiles<QueryGradients<T, D()>>(gpu, s, c.num_heads, p);
    launch_tiles<KeyGradients<T, D()>>(gpu, s, c.num_kv_heads, p);
  });
}

}  // namespace full

template <FullOptions O, GpuBackend B> struct On<FullAttention<O>, B> : InFloat<FullAttention<O>, B> {
  using InFloat<FullAttention<O>, B>::forward, InFloat<FullAttention<O>, B>::backward, InFloat<FullAttention<O>, B>::extend;
  template <std::floating_point T, class M>
  static void forward(B& gpu, full::Config const& c, SequencesOn<M> const& s, full::Inputs<In<T>> x, full::Outputs<Out<T>> y,
                      full::Saved<Out<T>> saved) {
    auto p = full::kernel_params<T>(O, c, s, x);
    p.o = y.o;
    p.lse = saved.lse;
    full::forward(gpu, c, s, p);
  }

  template <std::floating_point T, class M>
  static void backward(B& gpu, full::Config const& c, SequencesOn<M> const& s, full::Inputs<In<T>> x, full::Outputs<In<T>> y,
                       full::Saved<In<T>> saved, full::Outputs<In<T>> d_y, full::Inputs<Out<T>> d_x) {
    auto p = full::kernel_params<T>(O, c, s, x);
    p.y = y.o;
    p.d_o = d_y.o;
    p.y_lse = saved.lse;
    p.d_x = d_x;
    full::backward(gpu, c, s, p);
  }

  // Sequences without past tokens are computed by the tiles of forward, other sequences token by token over the rows of the cache.
  template <std::floating_point T, class M>
  static void extend(B& gpu, full::Config const& c, SequencesOn<M> const& s, full::Inputs<In<T>> x, full::Cache<Out<T>> cache,
                     full::Outputs<Out<T>> y) {
    Index const ring = cache.keys.extent(1);
    check_fits(s, cache.keys.extent(0), ring == O.window ? std::numeric_limits<Index>::max() : ring);
    if (s.any_begin()) {
      Tensor<wide_t<T>, 2, B> lse{gpu, {s.tokens(), c.num_heads}};
      auto p = full::kernel_params<T>(O, c, s, x);
      p.o = y.o;
      p.lse = out(lse);
      p.skips_continued = true;
      full::forward(gpu, c, s, p);
    }
    full::ExtendParams<T> const p{x, cache, y.o, s.table(), O.window, c.num_heads / c.num_kv_heads, static_cast<T>(c.scale)};
    if (s.any_continue()) full::with_room(c, [&](auto D) { launch<full::Decode<T, D()>>(gpu, {.x = s.tokens(), .y = c.num_heads}, p); });
    for_each(gpu, x.k.count(), full::Remember<T>{x, cache, s.table()});
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/attention/gdn/kernel_place.hpp
// Where a block of a scan over tokens works.
#ifndef HYBRIDATTN_ATTENTION_GDN_KERNEL_PLACE_HPP
#define HYBRIDATTN_ATTENTION_GDN_KERNEL_PLACE_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::gdn {

// What a block has: columns from `column` on of the state of a value head.
struct Place {
  Sequence sequence;
  Index number, tile, head, column;

  HYBRIDATTN_DEVICE Place(View<Sequence const, 1> sequences, Index tiles, int columns)
      : sequence(sequences(simt::block_x() / tiles)), number(simt::block_x() / tiles), tile(simt::block_x() % tiles), head(simt::block_y()),
        column(tile * columns) {}
  // How many tokens the piece from token t on has.
  HYBRIDATTN_DEVICE int count(Index t, int tokens) const { return static_cast<int>(simt::smaller<Index>(sequence.length - t, tokens)); }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::gdn
#endif

// ==== hybridattn/attention/gdn/kernel_chunks.hpp
// Gated DeltaNet as kernels that take the tokens of a sequence in chunks (arXiv 2412.06464), in exact arithmetic. Chunks are counted from
// the first token of the sequence. With S the state before a chunk, i, j, m tokens of the chunk, decay(i, j) = exp(g_{j+1} + ... + g_i):
//   (a) A_ij = decay(i, j) k_i . k_j for j < i ;  Q_ij = decay(i, j) scale q_i . k_j for j <= i
//   (b) R_ij = A_ij - sum_{j < m < i} A_im beta_m R_mj                      so that (I + A beta)^-1 = I - R beta
//   (c) r_i = v_i - until_i S^T k_i ;  e_i = r_i - sum_{j < i} R_ij beta_j r_j               until_i = exp(g_1 + ... + g_i)
//   (d) o_i = until_i S^T (scale q_i) + sum_{j <= i} Q_ij beta_j e_j
//   (e) S after the chunk = until_C S + sum_i after_i k_i (beta_i e_i)^T                     after_i = decay(C, i)
// A mask is the bounds of a loop: a NaN of a later token would pass through a product with zero. Tokens behind the end of the sequence are
// zeros in the last chunk. No exponent is a difference of sums, which would be NaN where two of them are infinite.
#ifndef HYBRIDATTN_ATTENTION_GDN_KERNEL_CHUNKS_HPP
#define HYBRIDATTN_ATTENTION_GDN_KERNEL_CHUNKS_HPP

// g++ takes the int sizes of arrays in templates for conversions.
#if defined(__GNUC__) && !defined(__clang__) && !HYBRIDATTN_CUDA
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wsign-conversion"
#endif

namespace hybridattn::inline HYBRIDATTN_ABI::gdn {

// Sizes for keys with room for K entries, so that the shared memory of a block stays below 99 KB.
template <class T, int K> struct Tiling {
  static constexpr int each = 4;  // numbers that a thread reads and writes at once
  static constexpr int chunk = static_cast<int>(sizeof(T)) * K < 2048 ? 16 : 8;  // tokens
  static constexpr int columns = 128 / static_cast<int>(sizeof(T));  // of a state, in a scan
  static constexpr int panel = K < 256 ? columns : columns / 2;  // columns at a time, where all columns are summed
  static constexpr int scan_threads = chunk * columns / each;

  // A sequence's first chunk among those of the batch. Sequences may have any lengths, so a few places stay unused.
  static HYBRIDATTN_HD Index first_chunk(Index start, Index number) { return start / chunk + number; }
  static Index count_chunks(Sequences const& s) { return s.tokens() / chunk + s.count(); }
};

// Rows of keys or queries in shared memory. Four more entries, so that the rows begin in different banks.
template <class T, int K, int rows> using KeyTable = simt::Table<T, rows, K + Tiling<T, K>::each>;

// What all chunk kernels get. Views that a kernel does not need are empty.
template <class T> struct ChunkParams {
  Inputs<In<T>> x;
  View<T, 3> o;  // forward's results
  View<wide_t<T>, 3> error;
  View<wide_t<T>, 4> final_state;
  View<wide_t<T> const, 3> saved_error;  // backward's arguments and results
  View<T const, 3> d_o;
  View<wide_t<T> const, 4> d_final_state;
  Inputs<Out<T>> d_x;
  View<T, 4> key_pairs, query_pairs, solved;  // [chunks, HV, chunk, chunk]: A, Q and R of (a) and (b)
  View<T, 4> states, gradients;  // [chunks, HV, K, V]: the state before each chunk, the gradient of the state after it
  View<T, 3> projected;  // [N, HV, V]: Y of backward
  View<Sequence const, 1> sequences;
  Index tiles;  // of columns
  Index group;  // value heads of a key head
  T scale;
};

// Rows of a tensor, from one of its columns on: those of a head at the tokens of a chunk, or those of a state. Empty views have no columns.
template <class T> struct Rows {
  T* data;
  Index stride, rows, columns;

  // Of head h, for `count` tokens from n on.
  HYBRIDATTN_DEVICE Rows(View<T, 3> x, Index n, int count, Index h, Index column)
      : data(x.empty() ? nullptr : x.row(n, h) + column), stride(x.stride[0]), rows(count), columns(x.empty() ? 0 : x.extent(2) - column) {}
  // Of the state of head h at `number`, a sequence or a chunk.
  HYBRIDATTN_DEVICE Rows(View<T, 4> x, Index number, Index h, Index column)
      : data(x.empty() ? nullptr : x.row(number, h, 0) + column), stride(x.stride[2]), rows(x.extent(2)),
        columns(x.empty() ? 0 : x.extent(3) - column) {}
  HYBRIDATTN_DEVICE bool has(int row, int column) const { return row < rows && column < columns; }
};
// f(row, column) for all of rows x width elements. Neighbouring threads have neighbouring columns, and a thread stays in its columns.
template <int threads, int rows, int width, class F> HYBRIDATTN_DEVICE void for_each_place(F f) {
  constexpr int lanes = width < threads ? width : threads;
  for (int column = simt::thread_id() % lanes; column < width; column += lanes) {
    HYBRIDATTN_UNROLL_4_IN_KERNEL
    for (int row = simt::thread_id() / lanes; row < rows; row += threads / lanes) f(row, column);
  }
}
// rows x width elements into shared memory, times `factor`, and zeros where there is no row or column.
template <int threads, int rows, int width, class T, std::size_t room, class From>
HYBRIDATTN_DEVICE void load_rows(T (*to)[room], Rows<From const> from, T factor = 1) {
  for_each_place<threads, rows, width>(
      [&](int row, int column) { to[row][column] = from.has(row, column) ? factor * from.data[row * from.stride + column] : T(0); });
}

// beta of the tokens of a chunk, their decays from the chunk's begin and to its end, and the decay of the whole chunk. Tokens behind
// `count` read and write nothing.
template <class T, int chunk> struct ChunkGates {
  T beta[chunk], until[chunk], after[chunk], whole;

  HYBRIDATTN_DEVICE void load(Inputs<In<T>> const& x, Index n, int count, Index h) {
    int const t = simt::thread_id();
    if (t >= chunk) return;
    double before = 0, behind = 0;
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int i = 0; i < chunk; ++i) {
      double const g = i < count ? static_cast<double>(x.g(n + i, h)) : 0.0;
      if (i <= t) before += g;
      else behind += g;
    }
    beta[t] = t < count ? x.beta(n + t, h) : T(0);
    until[t] = t < count ? static_cast<T>(std::exp(before)) : T(0);
    after[t] = static_cast<T>(std::exp(behind));
    if (t == chunk - 1) whole = static_cast<T>(std::exp(before));
  }
};
// decay(i, j) by the logarithms of a chunk's decays.
template <class T, std::size_t chunk> HYBRIDATTN_DEVICE T decay_between(double const (&g)[chunk], int i, int j) {
  double sum = 0;
  for (int m = j + 1; m <= i; ++m) sum += g[m];
  return static_cast<T>(std::exp(sum));
}

// sums[n] += the rows x[n] [K] times columns column .. column + 3 of a matrix [K, width].
template <int K, class T, int count, std::size_t width>
HYBRIDATTN_DEVICE void add_products(T const* const (&x)[count], T const (&matrix)[K][width], int column, T (&sums)[count][4]) {
  HYBRIDATTN_UNROLL_4_IN_KERNEL
  for (int a = 0; a < K; a += 4) {
    simt::Vector<T, 4> of_x[count];
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int n = 0; n < count; ++n) of_x[n] = simt::load_vector<4>(x[n] + a);
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int d = 0; d < 4; ++d) {
      simt::Vector<T, 4> const row = simt::load_vector<4>(&matrix[a + d][column]);
      HYBRIDATTN_UNROLL_IN_KERNEL
      for (int n = 0; n < count; ++n) {
        HYBRIDATTN_UNROLL_IN_KERNEL
        for (int c = 0; c < 4; ++c) sums[n][c] += of_x[n].x[d] * row.x[c];
      }
    }
  }
}
// sum += factor row, four entries of it.
template <class T> HYBRIDATTN_DEVICE void add_row(T factor, T const* row, T (&sum)[4]) {
  simt::Vector<T, 4> const x = simt::load_vector<4>(row);
  HYBRIDATTN_UNROLL_IN_KERNEL
  for (int c = 0; c < 4; ++c) sum[c] += factor * x.x[c];
}

// sum += x . y, four entries of them.
template <class T> HYBRIDATTN_DEVICE void add_dot(T const* x, T const* y, T& sum) {
  simt::Vector<T, 4> const of_x = simt::load_vector<4>(x), of_y = simt::load_vector<4>(y);
  HYBRIDATTN_UNROLL_IN_KERNEL
  for (int d = 0; d < 4; ++d) sum += of_x.x[d] * of_y.x[d];
}

// A tile of the columns of a state, or of its gradient, in the shared memory of a scan's block. A thread reads and writes the same
// elements.
template <class T, int K> struct StateTile {
  using Of = Tiling<T, K>;
  using Four = simt::Vector<T, Of::each>;
  static constexpr int columns = Of::columns, threads = Of::scan_threads;
  alignas(Four) simt::Table<T, K, columns> row;

  HYBRIDATTN_DEVICE void read(View<wide_t<T> const, 4> from, Index number, Index h, Index column) {
    load_rows<threads, K, columns>(row, Rows{from, number, h, column});
  }
  HYBRIDATTN_DEVICE void write(View<wide_t<T>, 4> to, Index number, Index h, Index column) const {
    Rows const rows{to, number, h, column};
    for_each_place<threads, K, columns>([&](int a, int c) {
      if (rows.has(a, c)) rows.data[a * rows.stride + c] = row[a][c];
    });
  }
  // The tile times `factor`, plus the sum over the rows of x [rows, K]^T y [rows, columns]. A thread has squares of 4 x 4 elements.
  template <std::size_t rows, std::size_t width> HYBRIDATTN_DEVICE void add(T factor, T const (&x)[rows][width],
                                                                            T const (&y)[rows][columns]) {
    for (int i = simt::thread_id(); i < K * columns / 16; i += threads) {
      int const a = i / (columns / 4) * 4, c = i % (columns / 4) * 4;
      T sum[4][4];
      HYBRIDATTN_UNROLL_IN_KERNEL
      for (int d = 0; d < 4; ++d) {
        Four const old = simt::load_vector<4>(&row[a + d][c]);
        HYBRIDATTN_UNROLL_IN_KERNEL
        for (int e = 0; e < 4; ++e) sum[d][e] = factor * old.x[e];
      }
      HYBRIDATTN_UNROLL_4_IN_KERNEL
      for (int n = 0; n < static_cast<int>(rows); ++n) {
        Four const key = simt::load_vector<4>(&x[n][a]);
        HYBRIDATTN_UNROLL_IN_KERNEL
        for (int d = 0; d < 4; ++d) add_row(key.x[d], &y[n][c], sum[d]);
      }
      HYBRIDATTN_UNROLL_IN_KERNEL
      for (int d = 0; d < 4; ++d) simt::store_vector(&row[a + d][c], Four{{sum[d][0], sum[d][1], sum[d][2], sum[d][3]}});
    }
  }
};

// The chunk of a block of a kernel that takes all chunks at once. Blocks for unused places have no tokens.
struct ChunkPlace {
  Index chunk;  // among those of the batch
  Index sequence;
  Index first;  // token of the batch
  int count = 0;  // of tokens

  template <class Of> static HYBRIDATTN_DEVICE ChunkPlace find(View<Sequence const, 1> sequences) {
    ChunkPlace place{simt::block_x(), 0, 0};
    Index end = sequences.extent(0);
    while (end - place.sequence > 1) {
      Index const middle = (place.sequence + end) / 2;
      (Of::first_chunk(sequences(middle).start, middle) <= place.chunk ? place.sequence : end) = middle;
    }
    Sequence const s = sequences(place.sequence);
    Index const begin = (place.chunk - Of::first_chunk(s.start, place.sequence)) * Of::chunk;
    place.first = s.start + begin;
    if (begin < s.length) place.count = static_cast<int>(simt::smaller<Index>(s.length - begin, Of::chunk));
    return place;
  }
};

// A, Q and R of a chunk, for the value heads of a key head one after the other. A thread has a pair of tokens.
template <class T, int K> struct PrepareChunks {
  using Of = Tiling<T, K>;
  static constexpr int chunk = Of::chunk, threads = chunk * chunk;
  using Params = ChunkParams<T>;
  struct Shared {
    alignas(simt::Vector<T, 4>) KeyTable<T, K, chunk> q, k;  // q times scale
    double g[chunk];
    T beta[chunk];
    T keys[chunk][chunk + 1];  // A
  };

  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    auto const at = ChunkPlace::find<Of>(p.sequences);
    if (at.count == 0) return;
    Index const key_head = simt::block_y();
    load_rows<threads, chunk, K>(shared.q, Rows{p.x.q, at.first, at.count, key_head, 0}, p.scale);
    load_rows<threads, chunk, K>(shared.k, Rows{p.x.k, at.first, at.count, key_head, 0});
    simt::sync_block();
    int const i = simt::thread_id() / chunk, j = simt::thread_id() % chunk;
    T with_key = 0, with_query = 0;
    HYBRIDATTN_UNROLL_4_IN_KERNEL
    for (int a = 0; a < K; a += 4) {
      if (j > i) continue;
      add_dot(&shared.k[i][a], &shared.k[j][a], with_key);
      add_dot(&shared.q[i][a], &shared.k[j][a], with_query);
    }
    for (Index h = key_head * p.group; h < (key_head + 1) * p.group; ++h) {
      load_gates(shared, p, at, h);
      simt::sync_block();
      T const decay = j <= i ? decay_between<T>(shared.g, i, j) : T(0);
      if (j <= i) p.query_pairs(at.chunk, h, i, j) = decay * with_query;  // (a)
      if (j < i) p.key_pairs(at.chunk, h, i, j) = shared.keys[i][j] = decay * with_key;
      simt::sync_block();
      if (simt::thread_id() < chunk) solve(shared, simt::thread_id(), p.solved.row(at.chunk, h, 0));
      simt::sync_block();  // all have read the gates and A
    }
  }

 private:
  static HYBRIDATTN_DEVICE void load_gates(Shared& shared, Params const& p, ChunkPlace const& at, Index h) {
    int const t = simt::thread_id();
    if (t >= chunk) return;
    shared.g[t] = t < at.count ? static_cast<double>(p.x.g(at.first + t, h)) : 0.0;
    shared.beta[t] = t < at.count ? p.x.beta(at.first + t, h) : T(0);
  }
  // Column j of R [chunk, chunk], which stays in registers.  (b)
  static HYBRIDATTN_DEVICE void solve(Shared const& shared, int j, T* to) {
    T column[chunk];
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int i = 0; i < chunk; ++i) column[i] = j < i ? shared.keys[i][j] : T(0);
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int m = 0; m < chunk; ++m) {
      T const known = shared.beta[m] * column[m];
      HYBRIDATTN_UNROLL_IN_KERNEL
      for (int i = m + 1; i < chunk; ++i)
        if (j < m) column[i] -= shared.keys[i][m] * known;
    }
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int i = 0; i < chunk; ++i)
      if (j < i) to[i * chunk + j] = column[i];
  }
};

// The pairs of a chunk in shared memory; above the diagonal they hold anything.
template <int threads, class T, std::size_t chunk, std::size_t width>
HYBRIDATTN_DEVICE void load_pairs(T (&to)[chunk][width], View<T, 4> from, Index number, Index h) {
  for (int i = simt::thread_id(); i < static_cast<int>(chunk * chunk); i += threads) {
    int const row = i / static_cast<int>(chunk), column = i % static_cast<int>(chunk);
    if (column <= row) to[row][column] = from(number, h, row, column);
  }
}

// What a thread of a scan has: four columns of a token of the chunk.
template <class T, int K> struct TokenColumns {
  using Of = Tiling<T, K>;
  int token = simt::thread_id() / (Of::columns / Of::each), column = simt::thread_id() % (Of::columns / Of::each) * Of::each;

  // To x [N, HV, V], where the token and the columns exist.
  template <class X> HYBRIDATTN_DEVICE void write(View<X, 3> to, Place const& at, Index n, int count, T const (&from)[4]) const {
    if (to.empty() || token >= count) return;
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int c = 0; c < 4; ++c)
      if (at.column + column + c < to.extent(2)) to(n + token, at.head, at.column + column + c) = from[c];
  }
  // factor x to a row in shared memory.
  template <std::size_t rows> HYBRIDATTN_DEVICE void store(T (&to)[rows][Of::columns], int row, T factor, T const (&x)[4]) const {
    simt::store_vector(&to[row][column], simt::Vector<T, 4>{{factor * x[0], factor * x[1], factor * x[2], factor * x[3]}});
  }
};

// o, the errors and the final state. A block has a tile of the columns of a value head's state of a sequence, and goes from chunk to chunk.
template <class T, int K> struct ForwardChunks {
  using Of = Tiling<T, K>;
  static constexpr int chunk = Of::chunk, columns = Of::columns, threads = Of::scan_threads;
  using Params = ChunkParams<T>;
  struct Shared {
    StateTile<T, K> state;
    alignas(simt::Vector<T, 4>) KeyTable<T, K, chunk> q, k;  // q times scale
    // v, then beta r; beta e; beta e times its decay to the end of the chunk.
    alignas(simt::Vector<T, 4>) simt::Table<T, chunk, columns> rest, write, kept;
    T query_pairs[chunk][chunk], solved[chunk][chunk];
    ChunkGates<T, chunk> gates;
  };

  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    Place const at{p.sequences, p.tiles, columns};
    shared.state.read(p.x.initial_state, at.number, at.head, at.column);
    for (Index t = 0; t < at.sequence.length; t += chunk) {
      load(shared, p, at, t);
      simt::sync_block();
      take(shared, p, at, at.sequence.start + t, at.count(t, chunk));
    }
    shared.state.write(p.final_state, at.number, at.head, at.column);
  }

 private:
  static HYBRIDATTN_DEVICE void load(Shared& shared, Params const& p, Place const& at, Index t) {
    Index const n = at.sequence.start + t, key_head = at.head / p.group;
    Index const number = Of::first_chunk(at.sequence.start, at.number) + t / chunk;
    int const count = at.count(t, chunk);
    load_rows<threads, chunk, K>(shared.q, Rows{p.x.q, n, count, key_head, 0}, p.scale);
    load_rows<threads, chunk, K>(shared.k, Rows{p.x.k, n, count, key_head, 0});
    load_rows<threads, chunk, columns>(shared.rest, Rows{p.x.v, n, count, at.head, at.column});
    load_pairs<threads>(shared.query_pairs, p.query_pairs, number, at.head);
    load_pairs<threads>(shared.solved, p.solved, number, at.head);
    shared.gates.load(p.x, n, count, at.head);
  }
  // The chunk of `count` tokens from token n on.
  static HYBRIDATTN_DEVICE void take(Shared& shared, Params const& p, Place const& at, Index n, int count) {
    TokenColumns<T, K> const own;
    int const i = own.token;
    T const until = shared.gates.until[i], beta = shared.gates.beta[i];
    T const* const rows[] = {shared.k[i], shared.q[i]};
    T of_state[2][4] = {}, error[4] = {}, o[4] = {};
    add_products(rows, shared.state.row, own.column, of_state);
    add_row(T(1), &shared.rest[i][own.column], error);
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int c = 0; c < 4; ++c) {
      error[c] -= until * of_state[0][c];
      o[c] = until * of_state[1][c];
    }
    own.store(shared.rest, i, beta, error);
    simt::sync_block();
    for (int j = 0; j < i; ++j) add_row(-shared.solved[i][j], &shared.rest[j][own.column], error);  // (c)
    own.store(shared.write, i, beta, error);
    own.store(shared.kept, i, beta * shared.gates.after[i], error);
    own.write(p.error, at, n, count, error);
    simt::sync_block();
    for (int j = 0; j <= i; ++j) add_row(shared.query_pairs[i][j], &shared.write[j][own.column], o);  // (d)
    own.write(p.o, at, n, count, o);
    shared.state.add(shared.gates.whole, shared.k, shared.kept);  // (e)
    simt::sync_block();  // the state is complete, and all have read the chunk
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::gdn

#if defined(__GNUC__) && !defined(__clang__) && !HYBRIDATTN_CUDA
#pragma GCC diagnostic pop
#endif
#endif

// ==== hybridattn/attention/gdn/kernel_chunks_backward.hpp
// Backward of Gated DeltaNet in chunks, from the saved errors alone. Letters are those of kernel_chunks.hpp. With X the gradient of the
// state after a chunk and S the state before it:
//   (f) y_i = after_i X^T k_i + sum_{l >= i} Q_li d_o_l ;  Y_i = y_i - sum_{l > i} R_li beta_l y_l           d_v_i = beta_i Y_i
//   (g) X before the chunk = until_C X + sum_i until_i (scale q_i d_o_i^T - k_i d_v_i^T)
//   (h) D_ij = decay(i, j) beta_j d_o_i . e_j for j <= i ;  E_ij = decay(i, j) beta_i beta_j Y_i . e_j for j < i ;  d_beta_i = Y_i . e_i
//   (i) d_q_i = scale (until_i S d_o_i + sum_{j <= i} D_ij k_j)
//       d_k_i = after_i beta_i X e_i - until_i beta_i S Y_i + sum_{l >= i} D_li scale q_l - sum_{l > i} E_li k_l - sum_{j < i} E_ij k_j
//   (j) d_g_i = the sum over pairs of a write before and a read after the decay of token i:
//         until_C <S, X>                                                   across the chunk
//         until_l (scale q_l . S d_o_l - beta_l k_l . S Y_l), l >= i       reads of S
//         after_j beta_j k_j . X e_j, j < i                                writes for X
//         D_lj scale q_l . k_j - E_lj k_l . k_j, j < i <= l                inside the chunk
// The sum (j) has these pairs and no others: no pair is added and taken away again. Nothing divides by beta or by a decay.
#ifndef HYBRIDATTN_ATTENTION_GDN_KERNEL_CHUNKS_BACKWARD_HPP
#define HYBRIDATTN_ATTENTION_GDN_KERNEL_CHUNKS_BACKWARD_HPP

// g++ takes the int sizes of arrays in templates for conversions.
#if defined(__GNUC__) && !defined(__clang__) && !HYBRIDATTN_CUDA
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wsign-conversion"
#endif

namespace hybridattn::inline HYBRIDATTN_ABI::gdn {

// The state before each chunk, from the errors alone. Blocks as in ForwardChunks.
template <class T, int K> struct StatesOfChunks {
  using Of = Tiling<T, K>;
  static constexpr int chunk = Of::chunk, columns = Of::columns, threads = Of::scan_threads;
  using Params = ChunkParams<T>;
  struct Shared {
    StateTile<T, K> state;
    alignas(simt::Vector<T, 4>) KeyTable<T, K, chunk> k;
    alignas(simt::Vector<T, 4>) simt::Table<T, chunk, columns> error, kept;  // e, and beta e times its decay to the end of the chunk
    ChunkGates<T, chunk> gates;
  };

  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    Place const at{p.sequences, p.tiles, columns};
    TokenColumns<T, K> const own;
    Index number = Of::first_chunk(at.sequence.start, at.number);
    shared.state.read(p.x.initial_state, at.number, at.head, at.column);
    for (Index t = 0; t < at.sequence.length; t += chunk, ++number) {
      int const count = at.count(t, chunk);
      load_rows<threads, chunk, K>(shared.k, Rows{p.x.k, at.sequence.start + t, count, at.head / p.group, 0});
      load_rows<threads, chunk, columns>(shared.error, Rows{p.saved_error, at.sequence.start + t, count, at.head, at.column});
      shared.gates.load(p.x, at.sequence.start + t, count, at.head);
      simt::sync_block();
      shared.state.write(p.states, number, at.head, at.column);
      T kept[4] = {};
      add_row(shared.gates.beta[own.token] * shared.gates.after[own.token], &shared.error[own.token][own.column], kept);
      own.store(shared.kept, own.token, T(1), kept);
      simt::sync_block();
      shared.state.add(shared.gates.whole, shared.k, shared.kept);  // (e)
      simt::sync_block();  // the state is complete, and all have read the chunk
    }
  }
};

// Y, d_v, the gradient of the state after each chunk, and d_initial_state. Blocks as in ForwardChunks, from the last chunk to the first.
template <class T, int K> struct GradientsOfStates {
  using Of = Tiling<T, K>;
  static constexpr int chunk = Of::chunk, columns = Of::columns, threads = Of::scan_threads;
  using Params = ChunkParams<T>;
  struct Shared {
    StateTile<T, K> gradient;
    // Keys, then queries times scale. The updates are what (g) multiplies with them.
    alignas(simt::Vector<T, 4>) KeyTable<T, K, 2 * chunk> keys;
    alignas(simt::Vector<T, 4>) simt::Table<T, 2 * chunk, columns> updates;
    alignas(simt::Vector<T, 4>) simt::Table<T, chunk, columns> d_o, rest;  // rest: beta y
    T query_pairs[chunk][chunk], solved[chunk][chunk];
    ChunkGates<T, chunk> gates;
  };

  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    Place const at{p.sequences, p.tiles, columns};
    shared.gradient.read(p.d_final_state, at.number, at.head, at.column);
    Index const chunks = ceil_div(at.sequence.length, Index{chunk}), first = Of::first_chunk(at.sequence.start, at.number);
    for (Index i = chunks; i-- > 0;) {
      int const count = at.count(i * chunk, chunk);
      load(shared, p, at, first + i, at.sequence.start + i * chunk, count);
      simt::sync_block();
      shared.gradient.write(p.gradients, first + i, at.head, at.column);
      take(shared, p, at, at.sequence.start + i * chunk, count);
    }
    shared.gradient.write(p.d_x.initial_state, at.number, at.head, at.column);
  }

 private:
  static HYBRIDATTN_DEVICE void load(Shared& shared, Params const& p, Place const& at, Index number, Index n, int count) {
    load_rows<threads, chunk, K>(shared.keys, Rows{p.x.k, n, count, at.head / p.group, 0});
    load_rows<threads, chunk, K>(shared.keys + chunk, Rows{p.x.q, n, count, at.head / p.group, 0}, p.scale);
    load_rows<threads, chunk, columns>(shared.d_o, Rows{p.d_o, n, count, at.head, at.column});
    load_pairs<threads>(shared.query_pairs, p.query_pairs, number, at.head);
    load_pairs<threads>(shared.solved, p.solved, number, at.head);
    shared.gates.load(p.x, n, count, at.head);
  }
  // The chunk of `count` tokens from token n on.
  static HYBRIDATTN_DEVICE void take(Shared& shared, Params const& p, Place const& at, Index n, int count) {
    TokenColumns<T, K> const own;
    int const i = own.token;
    T const until = shared.gates.until[i], beta = shared.gates.beta[i];
    T const* const rows[] = {shared.keys[i]};
    T of_gradient[1][4] = {}, y[4] = {}, d_v[4] = {}, read[4] = {};
    add_products(rows, shared.gradient.row, own.column, of_gradient);
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int c = 0; c < 4; ++c) y[c] = shared.gates.after[i] * of_gradient[0][c];
    for (int l = i; l < count; ++l) add_row(shared.query_pairs[l][i], &shared.d_o[l][own.column], y);
    own.store(shared.rest, i, beta, y);
    simt::sync_block();
    for (int l = i + 1; l < count; ++l) add_row(-shared.solved[l][i], &shared.rest[l][own.column], y);  // (f)
    own.write(p.projected, at, n, count, y);
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int c = 0; c < 4; ++c) d_v[c] = beta * y[c];
    own.write(p.d_x.v, at, n, count, d_v);
    add_row(until, &shared.d_o[i][own.column], read);
    own.store(shared.updates, i, -until, d_v);
    own.store(shared.updates, chunk + i, T(1), read);
    simt::sync_block();
    shared.gradient.add(shared.gates.whole, shared.keys, shared.updates);  // (g)
    simt::sync_block();  // the gradient is complete, and all have read the chunk
  }
};

// d_q, d_k, d_beta and d_g of a chunk, for the value heads of a key head one after the other: the first one overwrites d_q and d_k, the
// others add to them. Columns go through shared memory in panels. A thread has two entries of four tokens, and a few pairs of tokens.
// No barrier stands between two value heads: the second one's panels wait before it writes what the last steps of the first one read.
template <class T, int K> struct GradientsOfTokens {
  using Of = Tiling<T, K>;
  static constexpr int chunk = Of::chunk, panel = Of::panel, tokens = 4, entries = 2;  // of a thread
  static constexpr int threads = chunk * K / (tokens * entries), warps = threads / 32;
  static constexpr int pairs = (chunk * chunk + threads - 1) / threads;  // of a thread
  using Params = ChunkParams<T>;
  template <int rows> using Panel = simt::Table<T, rows, panel + 4>;  // four more, so that the rows begin in different banks
  struct Shared {
    alignas(simt::Vector<T, 4>) KeyTable<T, K, chunk> q, k;  // q times scale
    alignas(simt::Vector<T, 4>) Panel<K> state, gradient;
    alignas(simt::Vector<T, 4>) Panel<chunk> d_o, projected, error;
    simt::Table<T, chunk, chunk + 1> reads, erased;  // D and E, E on both sides of the diagonal
    double crossing[chunk][chunk + 1];  // what a pair adds to d_g
    double reads_of[warps][chunk], writes_of[warps][chunk], across_of[warps];  // the warps' parts of sums over K
    double g[chunk];
    ChunkGates<T, chunk> gates;
  };
  // Sums over the columns, of a value head.
  struct Sums {
    T state_d_o[tokens][entries] = {}, state_y[tokens][entries] = {}, gradient_error[tokens][entries] = {};  // S d_o, S Y, X e
    T d_o_error[pairs] = {}, y_error[pairs] = {};  // d_o_i . e_j, Y_i . e_j
    T across = 0;  // <S, X>
  };

  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    auto const at = ChunkPlace::find<Of>(p.sequences);
    if (at.count == 0) return;
    Index const key_head = simt::block_y();
    load_rows<threads, chunk, K>(shared.q, Rows{p.x.q, at.first, at.count, key_head, 0}, p.scale);
    load_rows<threads, chunk, K>(shared.k, Rows{p.x.k, at.first, at.count, key_head, 0});
    for (Index h = key_head * p.group; h < (key_head + 1) * p.group; ++h) {
      Sums sums;
      load_gates(shared, p, at, h);
      for (Index column = 0; column < p.d_x.v.extent(2); column += panel) {
        load_panels(shared, p, at, h, column);
        simt::sync_block();
        add_panels(shared, sums);
        add_pairs(shared, sums);
        simt::sync_block();  // all have read the panels
      }
      scale(shared, sums);
      sum_over_keys(shared, sums);
      finish_pairs(shared, p, at, h, sums);
      simt::sync_block();
      write_d_g(shared, p, at, h);
      write_d_q_and_d_k(shared, p, at, key_head, h == key_head * p.group, sums);
    }
  }

 private:
  // Four neighbouring lanes, or as many as there are fours of tokens, have the same entries.
  static constexpr int fours = chunk / tokens;
  static HYBRIDATTN_DEVICE int token(int t) { return simt::thread_id() % fours * tokens + t; }
  static HYBRIDATTN_DEVICE int entry(int a) { return simt::thread_id() / fours * entries + a; }
  static HYBRIDATTN_DEVICE int pair(int n) { return simt::thread_id() + n * threads; }
  template <class F> static HYBRIDATTN_DEVICE void for_each_element(F f) {
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int t = 0; t < tokens; ++t) {
      HYBRIDATTN_UNROLL_IN_KERNEL
      for (int a = 0; a < entries; ++a) f(t, a);
    }
  }
  // f(n, i, j) for the thread's pairs j <= i.
  template <class F> static HYBRIDATTN_DEVICE void for_each_pair(F f) {
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int n = 0; n < pairs; ++n) {
      int const i = pair(n) / chunk, j = pair(n) % chunk;
      if (i < chunk && j <= i) f(n, i, j);
    }
  }

  static HYBRIDATTN_DEVICE void load_gates(Shared& shared, Params const& p, ChunkPlace const& at, Index h) {
    shared.gates.load(p.x, at.first, at.count, h);
    int const t = simt::thread_id();
    if (t < chunk) shared.g[t] = t < at.count ? static_cast<double>(p.x.g(at.first + t, h)) : 0.0;
  }
  static HYBRIDATTN_DEVICE void load_panels(Shared& shared, Params const& p, ChunkPlace const& at, Index h, Index column) {
    load_rows<threads, chunk, panel>(shared.d_o, Rows{p.d_o, at.first, at.count, h, column});
    load_rows<threads, chunk, panel>(shared.projected, Rows{View<T const, 3>(p.projected), at.first, at.count, h, column});
    load_rows<threads, chunk, panel>(shared.error, Rows{p.saved_error, at.first, at.count, h, column});
    load_rows<threads, K, panel>(shared.state, Rows{View<T const, 4>(p.states), at.chunk, h, column});
    load_rows<threads, K, panel>(shared.gradient, Rows{View<T const, 4>(p.gradients), at.chunk, h, column});
  }
  static HYBRIDATTN_DEVICE void add_panels(Shared const& shared, Sums& sums) {
    HYBRIDATTN_UNROLL_2_IN_KERNEL
    for (int c = 0; c < panel; c += 4) {
      simt::Vector<T, 4> state[entries], gradient[entries];
      HYBRIDATTN_UNROLL_IN_KERNEL
      for (int a = 0; a < entries; ++a) {
        state[a] = simt::load_vector<4>(&shared.state[entry(a)][c]);
        gradient[a] = simt::load_vector<4>(&shared.gradient[entry(a)][c]);
        if (c / 4 % fours != simt::thread_id() % fours) continue;  // a lane of those with the same entries
        HYBRIDATTN_UNROLL_IN_KERNEL
        for (int d = 0; d < 4; ++d) sums.across += state[a].x[d] * gradient[a].x[d];
      }
      HYBRIDATTN_UNROLL_IN_KERNEL
      for (int t = 0; t < tokens; ++t) {
        auto const d_o = simt::load_vector<4>(&shared.d_o[token(t)][c]), y = simt::load_vector<4>(&shared.projected[token(t)][c]),
                   error = simt::load_vector<4>(&shared.error[token(t)][c]);
        HYBRIDATTN_UNROLL_IN_KERNEL
        for (int a = 0; a < entries; ++a) {
          HYBRIDATTN_UNROLL_IN_KERNEL
          for (int d = 0; d < 4; ++d) {
            sums.state_d_o[t][a] += state[a].x[d] * d_o.x[d];
            sums.state_y[t][a] += state[a].x[d] * y.x[d];
            sums.gradient_error[t][a] += gradient[a].x[d] * error.x[d];
          }
        }
      }
    }
  }
  static HYBRIDATTN_DEVICE void add_pairs(Shared const& shared, Sums& sums) {
    for_each_pair([&](int n, int i, int j) {
      HYBRIDATTN_UNROLL_2_IN_KERNEL
      for (int c = 0; c < panel; c += 4) {
        add_dot(&shared.d_o[i][c], &shared.error[j][c], sums.d_o_error[n]);
        add_dot(&shared.projected[i][c], &shared.error[j][c], sums.y_error[n]);
      }
    });
  }
  // The first terms of (i).
  static HYBRIDATTN_DEVICE void scale(Shared const& shared, Sums& sums) {
    for_each_element([&](int t, int a) {
      T const until = shared.gates.until[token(t)], after = shared.gates.after[token(t)], beta = shared.gates.beta[token(t)];
      sums.state_d_o[t][a] *= until;
      sums.state_y[t][a] *= until * beta;
      sums.gradient_error[t][a] *= after * beta;
    });
  }
  // The warps' parts of what S and X add to d_g.
  static HYBRIDATTN_DEVICE void sum_over_keys(Shared& shared, Sums const& sums) {
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int t = 0; t < tokens; ++t) {
      T read = 0, written = 0;
      HYBRIDATTN_UNROLL_IN_KERNEL
      for (int a = 0; a < entries; ++a) {
        T const key = shared.k[token(t)][entry(a)];
        read += shared.q[token(t)][entry(a)] * sums.state_d_o[t][a] - key * sums.state_y[t][a];
        written += key * sums.gradient_error[t][a];
      }
      double const reads = sum_entries(static_cast<double>(read)), writes = sum_entries(static_cast<double>(written));
      if (simt::lane() < fours) {
        shared.reads_of[simt::warp()][token(t)] = reads;
        shared.writes_of[simt::warp()][token(t)] = writes;
      }
    }
    double const across = simt::sum_lanes(static_cast<double>(sums.across));
    if (simt::lane() == 0) shared.across_of[simt::warp()] = static_cast<double>(shared.gates.whole) * across;
  }
  // Over the lanes with the same tokens.
  static HYBRIDATTN_DEVICE double sum_entries(double x) {
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int step = fours; step < 32; step *= 2) x += simt::shuffle_xor(x, step);
    return x;
  }
  static HYBRIDATTN_DEVICE void finish_pairs(Shared& shared, Params const& p, ChunkPlace const& at, Index h, Sums const& sums) {
    for_each_pair([&](int n, int i, int j) {
      T const decay = decay_between<T>(shared.g, i, j), beta = shared.gates.beta[j], both = shared.gates.beta[i] * beta;
      shared.reads[i][j] = decay * beta * sums.d_o_error[n];  // (h)
      if (i == j && i < at.count) p.d_x.beta(at.first + i, h) = sums.y_error[n];
      if (i == j) return;
      shared.erased[i][j] = shared.erased[j][i] = decay * both * sums.y_error[n];
      shared.crossing[i][j] = static_cast<double>(p.query_pairs(at.chunk, h, i, j) * (beta * sums.d_o_error[n])) -
                              static_cast<double>(p.key_pairs(at.chunk, h, i, j) * (both * sums.y_error[n]));
    });
  }
  // A warp has a token i at a time, and each lane the reads of another token l >= i, or the writes of a token l < i.
  static HYBRIDATTN_DEVICE void write_d_g(Shared const& shared, Params const& p, ChunkPlace const& at, Index h) {
    int const l = simt::lane();
    for (int i = simt::warp(); i < at.count; i += warps) {
      double sum = l < warps ? shared.across_of[l] : 0.0;
      for (int warp = 0; l < at.count && warp < warps; ++warp) sum += l < i ? shared.writes_of[warp][l] : shared.reads_of[warp][l];
      for (int j = 0; i <= l && l < at.count && j < i; ++j) sum += shared.crossing[l][j];
      sum = simt::sum_lanes(sum);
      if (l == 0) p.d_x.g(at.first + i, h) = static_cast<T>(sum);  // (j)
    }
  }
  static HYBRIDATTN_DEVICE void write_d_q_and_d_k(Shared const& shared, Params const& p, ChunkPlace const& at, Index key_head,
                                                  bool is_first, Sums& sums) {
    T d_q[tokens][entries], d_k[tokens][entries];
    for_each_element([&](int t, int a) {
      d_q[t][a] = sums.state_d_o[t][a];
      d_k[t][a] = sums.gradient_error[t][a] - sums.state_y[t][a];
    });
    HYBRIDATTN_UNROLL_2_IN_KERNEL
    for (int m = 0; m < at.count; ++m)
      for_each_element([&](int t, int a) {
        int const i = token(t);
        T const key = shared.k[m][entry(a)];
        if (m <= i) d_q[t][a] += shared.reads[i][m] * key;
        if (m >= i) d_k[t][a] += shared.reads[m][i] * shared.q[m][entry(a)];
        if (m != i) d_k[t][a] -= shared.erased[m][i] * key;
      });
    for_each_element([&](int t, int a) {  // (i)
      if (token(t) >= at.count || entry(a) >= p.d_x.q.extent(2)) return;
      T &to_q = p.d_x.q(at.first + token(t), key_head, entry(a)), &to_k = p.d_x.k(at.first + token(t), key_head, entry(a));
      to_q = is_first ? p.scale * d_q[t][a] : to_q + p.scale * d_q[t][a];
      to_k = is_first ? d_k[t][a] : to_k + d_k[t][a];
    });
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::gdn

#if defined(__GNUC__) && !defined(__clang__) && !HYBRIDATTN_CUDA
#pragma GCC diagnostic pop
#endif
#endif

// ==== hybridattn/attention/gdn/kernel_steps.hpp
// Gated DeltaNet as kernels, token by token in exact arithmetic. Numbers in brackets are equations of gdn.hpp.
//
// A block has a value head of a sequence and a tile of the columns of its state [K, V]. Columns of a state do not meet before they are
// summed, so every block goes through all tokens of its sequence alone. Tokens go through shared memory in pieces.
#ifndef HYBRIDATTN_ATTENTION_GDN_KERNEL_STEPS_HPP
#define HYBRIDATTN_ATTENTION_GDN_KERNEL_STEPS_HPP

// g++ takes the int sizes of arrays in templates for conversions.
#if defined(__GNUC__) && !defined(__clang__) && !HYBRIDATTN_CUDA
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wsign-conversion"
#endif

namespace hybridattn::inline HYBRIDATTN_ABI::gdn {

// Entries first .. first + width - 1 of head h of `count` tokens from n on, times `factor`. Entries that the head does not have, and those
// of an empty view, are zeros. Neighbouring threads read neighbouring addresses.
template <int threads, class T, int tokens, int width, class From>
HYBRIDATTN_DEVICE void load_entries(T (&to)[tokens][width], View<From const, 3> from, Index n, int count, Index h, Index first, T factor) {
  for (int i = simt::thread_id(); i < count * width; i += threads) {
    int const t = i / width, d = i % width;
    to[t][d] = !from.empty() && first + d < from.extent(2) ? factor * from(n + t, h, first + d) : T(0);
  }
}
// The gates of a piece.
template <class T, int tokens> struct PieceGates {
  T decay[tokens], beta[tokens];

  HYBRIDATTN_DEVICE void load(Inputs<In<T>> const& x, Index n, int count, Index h) {
    int const t = simt::thread_id();
    if (t >= count) return;
    decay[t] = std::exp(x.g(n + t, h));
    beta[t] = x.beta(n + t, h);
  }
};

// ---- forward

template <class T> struct ForwardStepsParams {
  Inputs<In<T>> x;   // initial_state may be empty
  View<T, 3> o;
  View<wide_t<T>, 3> error;         // may be empty
  View<wide_t<T>, 4> final_state;   // may be empty, may be the initial state
  View<Sequence const, 1> sequences;
  Index tiles;    // of columns
  Index group;    // value heads of a key head
  T scale;
  bool extends;   // sequences without past tokens start from zeros, those without new tokens keep their state
};

// o, the errors and the final state, for keys with room for K entries. A column of the state has a few neighbouring lanes of one warp.
// Lane c of them has the rows c, c + lanes, ... of the column in registers.
template <class T, int K> struct ForwardSteps {
  static constexpr int threads = 128, tokens = 64 / static_cast<int>(sizeof(T));
  static constexpr int lanes = K * sizeof(T) <= 1024 ? 4 : 8, columns = threads / lanes, entries = K / lanes;
  using Params = ForwardStepsParams<T>;
  struct Shared {
    T q[tokens][K], k[tokens][K], v[tokens][columns];   // q times scale
    PieceGates<T, tokens> gates;
  };

  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    Place const at{p.sequences, p.tiles, columns};
    if (p.extends && at.sequence.length == 0) return;
    T state[entries];
    read(p, at, state);
    for (Index t = 0; t < at.sequence.length; t += tokens) {
      int const count = at.count(t, tokens);
      load(shared, p, at, at.sequence.start + t, count);
      simt::sync_block();
      for (int i = 0; i < count; ++i) step(shared, p, at, at.sequence.start + t + i, i, state);
      simt::sync_block();   // all have read the piece
    }
    write(p.final_state, at, state);
  }

 private:
  static HYBRIDATTN_DEVICE int lane() { return simt::thread_id() % lanes; }
  static HYBRIDATTN_DEVICE int row(int j) { return lane() + j * lanes; }
  static HYBRIDATTN_DEVICE Index column(Place const& at) { return at.column + simt::thread_id() / lanes; }

  static HYBRIDATTN_DEVICE void read(Params const& p, Place const& at, T (&state)[entries]) {
    View<wide_t<T> const, 4> const from = p.x.initial_state;
    bool const is_given = !from.empty() && column(at) < from.extent(3) && !(p.extends && at.sequence.past == 0);
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int j = 0; j < entries; ++j) state[j] = is_given && row(j) < from.extent(2) ? from(at.number, at.head, row(j), column(at)) : T(0);
  }
  static HYBRIDATTN_DEVICE void write(View<wide_t<T>, 4> to, Place const& at, T const (&state)[entries]) {
    if (to.empty() || column(at) >= to.extent(3)) return;
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int j = 0; j < entries; ++j)
      if (row(j) < to.extent(2)) to(at.number, at.head, row(j), column(at)) = state[j];
  }
  static HYBRIDATTN_DEVICE void load(Shared& shared, Params const& p, Place const& at, Index n, int count) {
    load_entries<threads>(shared.q, p.x.q, n, count, at.head / p.group, 0, p.scale);
    load_entries<threads>(shared.k, p.x.k, n, count, at.head / p.group, 0, T(1));
    load_entries<threads>(shared.v, p.x.v, n, count, at.head, at.column, T(1));
    shared.gates.load(p.x, n, count, at.head);
  }
  // Token n, the i-th one of the piece.
  static HYBRIDATTN_DEVICE void step(Shared const& shared, Params const& p, Place const& at, Index n, int i, T (&state)[entries]) {
    T const decay = shared.gates.decay[i];
    T with_k = 0, with_q = 0;
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int j = 0; j < entries; ++j) {
      state[j] *= decay;                                                                        // (1)
      with_k += shared.k[i][row(j)] * state[j];
    }
    T const error = shared.v[i][simt::thread_id() / lanes] - simt::sum_lanes<lanes>(with_k);    // (2)
    T const delta = shared.gates.beta[i] * error;
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int j = 0; j < entries; ++j) {
      state[j] += shared.k[i][row(j)] * delta;                                      // (3)
      with_q += shared.q[i][row(j)] * state[j];
    }
    T const o = simt::sum_lanes<lanes>(with_q);                                                 // (4)
    if (lane() != 0 || column(at) >= p.o.extent(2)) return;
    p.o(n, at.head, column(at)) = o;
    if (!p.error.empty()) p.error(n, at.head, column(at)) = error;
  }
};

// ---- backward

template <class T> struct BackwardStepsParams {
  Inputs<In<T>> x;
  View<wide_t<T> const, 3> error;
  View<T const, 3> d_o;                       // may be empty
  View<wide_t<T> const, 4> d_final_state;     // may be empty
  View<T, 3> d_v;
  View<wide_t<T>, 4> d_initial_state;         // may be empty
  View<T, 5> states;   // [pieces, HV, tiles, elements of a thread, threads]: the state before every piece
  View<T, 4> parts;    // [tiles, N, HV, 2 K + 1]: what a tile adds to d_q, d_k and d_beta
  View<double, 4> paths;   // [tiles, N, HV, 8]: what 8 parts of a tile add to d_g / exp(g); terms of both signs that nearly cancel
  View<Sequence const, 1> sequences;
  Index tiles, group;   // as in forward
  T scale;
};

// d_v, d_initial_state, and the parts of all other gradients, for keys with room for K entries. A warp has all rows of a few columns of
// S and X. Lane l has the rows l, l + 32, ... of these columns in registers. The warps' sums over columns meet in shared memory.
// A first walk keeps S before every piece of tokens. The second walk goes through the pieces and their tokens in reverse, and forms S
// before each token from the piece's first S and from what the tokens between have written. Nothing divides by a decay, which may be 0.
template <class T, int K> struct BackwardSteps {
  static constexpr int warps = 8, threads = 32 * warps, tokens = 64 / static_cast<int>(sizeof(T));
  static constexpr int rows = K / 32, room = 64 / static_cast<int>(sizeof(T)) / rows, wide = room < 4 ? room : 4;   // of a thread
  static constexpr int columns = warps * wide, elements = rows * wide, sums = 2 * K + 1, paths = 8;
  using Params = BackwardStepsParams<T>;
  using Patch = T[rows][wide];
  struct Shared {
    T q[tokens][K], k[tokens][K];                         // q times scale
    T error[tokens][columns], d_o[tokens][columns];
    PieceGates<T, tokens> gates;
    T sums_of[2][warps][sums];                            // of one token, in turn; as in `parts`
    double paths_of[2][warps][paths];
  };

  // A sequence's first piece in `states`. Sequences may have any lengths, so a few places stay unused.
  static HYBRIDATTN_HD Index first_piece(Index start, Index number) { return start / tokens + number; }
  static Index count_pieces(Sequences const& s) { return s.tokens() / tokens + s.count(); }

  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    Place const at{p.sequences, p.tiles, columns};
    Index const pieces = ceil_div(at.sequence.length, Index{tokens});
    keep_states(shared, p, at, pieces);
    Patch X, first, S;
    read(p.d_final_state, at, X);
    for (Index piece = pieces; piece-- > 0;) {
      int const count = load(shared, p, at, piece);
      simt::sync_block();
      recall(p, at, piece, first);
      for (int i = count; i-- > 0;) {
        form_state(shared, first, i, S);
        step(shared, p, at, at.sequence.start + piece * tokens + i, i, S, X);
      }
    }
    write(p.d_initial_state, at, X);
  }

 private:
  static HYBRIDATTN_DEVICE int row(int r) { return simt::lane() + 32 * r; }
  static HYBRIDATTN_DEVICE int column(int c) { return simt::warp() * wide + c; }   // of the tile
  template <class F> static HYBRIDATTN_DEVICE void for_each_element(F f) {
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int r = 0; r < rows; ++r) {
      HYBRIDATTN_UNROLL_IN_KERNEL
      for (int c = 0; c < wide; ++c) f(r, c);
    }
  }

  // A state or its gradient; zeros where there is none.
  static HYBRIDATTN_DEVICE void read(View<wide_t<T> const, 4> from, Place const& at, Patch& x) {
    for_each_element([&](int r, int c) {
      bool const is_given = !from.empty() && row(r) < from.extent(2) && at.column + column(c) < from.extent(3);
      x[r][c] = is_given ? from(at.number, at.head, row(r), at.column + column(c)) : T(0);
    });
  }
  static HYBRIDATTN_DEVICE void write(View<wide_t<T>, 4> to, Place const& at, Patch const& x) {
    for_each_element([&](int r, int c) {
      bool const is_wanted = !to.empty() && row(r) < to.extent(2) && at.column + column(c) < to.extent(3);
      if (is_wanted) to(at.number, at.head, row(r), at.column + column(c)) = x[r][c];
    });
  }
  static HYBRIDATTN_DEVICE T& kept(Params const& p, Place const& at, Index piece, int r, int c) {
    return p.states(first_piece(at.sequence.start, at.number) + piece, at.head, at.tile, r * wide + c, simt::thread_id());
  }
  static HYBRIDATTN_DEVICE void recall(Params const& p, Place const& at, Index piece, Patch& S) {
    for_each_element([&](int r, int c) { S[r][c] = kept(p, at, piece, r, c); });
  }
  // Returns the number of the piece's tokens.
  static HYBRIDATTN_DEVICE int load(Shared& shared, Params const& p, Place const& at, Index piece) {
    int const count = at.count(piece * tokens, tokens);
    Index const n = at.sequence.start + piece * tokens, key_head = at.head / p.group;
    load_entries<threads>(shared.q, p.x.q, n, count, key_head, 0, p.scale);
    load_entries<threads>(shared.k, p.x.k, n, count, key_head, 0, T(1));
    load_entries<threads>(shared.error, p.error, n, count, at.head, at.column, T(1));
    load_entries<threads>(shared.d_o, p.d_o, n, count, at.head, at.column, T(1));
    shared.gates.load(p.x, n, count, at.head);
    return count;
  }

  static HYBRIDATTN_DEVICE void keep_states(Shared& shared, Params const& p, Place const& at, Index pieces) {
    Patch first, S;
    read(p.x.initial_state, at, S);
    for (Index piece = 0; piece < pieces; ++piece) {
      for_each_element([&](int r, int c) {
        kept(p, at, piece, r, c) = S[r][c];
        first[r][c] = S[r][c];
      });
      if (piece == pieces - 1) return;
      int const count = load(shared, p, at, piece);
      simt::sync_block();
      form_state(shared, first, count, S);
      simt::sync_block();   // all have read the piece
    }
  }
  // S after `count` tokens of a piece: what each token wrote, from the last one back, as often decayed as tokens follow it.   (1), (3)
  static HYBRIDATTN_DEVICE void form_state(Shared const& shared, Patch const& first, int count, Patch& S) {
    T left = 1;
    for_each_element([&](int r, int c) { S[r][c] = 0; });
    for (int i = count; i-- > 0;) {
      T const beta = left * shared.gates.beta[i];
      for_each_element([&](int r, int c) { S[r][c] += shared.k[i][row(r)] * (beta * shared.error[i][column(c)]); });
      left *= shared.gates.decay[i];
    }
    for_each_element([&](int r, int c) { S[r][c] += left * first[r][c]; });
  }

  // u[c] becomes its sum over the lanes of the warp. Lanes first exchange halves of what they have left, until each one has one column.
  static HYBRIDATTN_DEVICE void sum_lanes_of_each(T (&u)[wide]) {
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int half = wide / 2, bit = 1; half > 0; half /= 2, bit *= 2) {
      bool const has_upper = (simt::lane() & bit) != 0;
      HYBRIDATTN_UNROLL_IN_KERNEL
      for (int c = 0; c < half; ++c) {
        T const given = has_upper ? u[c] : u[c + half];
        u[c] = (has_upper ? u[c + half] : u[c]) + simt::shuffle_xor(given, bit);
      }
    }
    T sum = u[0];
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int step = wide; step < 32; step *= 2) sum += simt::shuffle_xor(sum, step);
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int c = 0; c < wide; ++c) u[c] = simt::shuffle(sum, wide == 4 ? c / 2 + c % 2 * 2 : c);
  }

  // Token n, the i-th one of the piece, with S before it and X after it. X becomes the gradient of S.
  static HYBRIDATTN_DEVICE void step(Shared& shared, Params const& p, Place const& at, Index n, int i, Patch const& S, Patch& X) {
    T const decay = shared.gates.decay[i], beta = shared.gates.beta[i];
    T u[wide] = {}, d_beta = 0, through = 0;
    for_each_element([&](int r, int c) {
      X[r][c] += shared.q[i][row(r)] * shared.d_o[i][column(c)];
      u[c] += shared.k[i][row(r)] * X[r][c];
    });
    sum_lanes_of_each(u);
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int c = 0; c < wide; ++c) {
      d_beta += u[c] * shared.error[i][column(c)];                                              // (5)
      u[c] *= beta;
      Index const v = at.column + column(c);
      if (simt::lane() == 0 && v < p.d_v.extent(2)) p.d_v(n, at.head, v) = u[c];
    }
    auto& to = shared.sums_of[i % 2];
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int r = 0; r < rows; ++r) {
      T const k = shared.k[i][row(r)];
      T d_q = 0, d_k = 0;
      HYBRIDATTN_UNROLL_IN_KERNEL
      for (int c = 0; c < wide; ++c) {
        T const error = shared.error[i][column(c)], decayed = decay * S[r][c];
        d_q += (decayed + k * (beta * error)) * shared.d_o[i][column(c)];                       // (6)
        d_k += beta * error * X[r][c] - decayed * u[c];
        X[r][c] -= k * u[c];
        through += X[r][c] * S[r][c];
        X[r][c] *= decay;
      }
      to[simt::warp()][row(r)] = d_q;
      to[simt::warp()][K + row(r)] = d_k;
    }
    double const path = simt::sum_lanes<32 / paths>(static_cast<double>(through));              // (7)
    auto& to_paths = shared.paths_of[i % 2][simt::warp()];
    if (simt::lane() % (32 / paths) == 0) to_paths[simt::lane() / (32 / paths)] = path;
    if (simt::lane() == 0) to[simt::warp()][2 * K] = d_beta;
    simt::sync_block();
    add_warps(to, p.parts.row(at.tile, n, at.head));
    add_warps(shared.paths_of[i % 2], p.paths.row(at.tile, n, at.head));
  }
  template <class S, int count> static HYBRIDATTN_DEVICE void add_warps(S const (&of_warps)[warps][count], S* to) {
    for (int i = simt::thread_id(); i < count; i += threads) {
      S sum = 0;
      for (int warp = 0; warp < warps; ++warp) sum += of_warps[warp][i];
      to[i] = sum;
    }
  }
};

// d_q and d_k [N, H, K]: the parts of the value heads of the group and of their tiles, added in order. A thread has an entry of both.
template <class T> struct SumKeyGradients {
  View<T const, 4> parts;
  View<T, 3> d_q, d_k;
  Index room, group;   // of the keys in `parts`; value heads of a key head
  T scale;

  HYBRIDATTN_HD void operator()(Index i) const {
    Index const H = d_q.extent(1), K = d_q.extent(2), n = i / (H * K), hk = i / K % H, a = i % K;
    T q = 0, k = 0;
    for (Index h = hk * group; h < (hk + 1) * group; ++h)
      for (Index tile = 0; tile < parts.extent(0); ++tile) {
        q += parts(tile, n, h, a);
        k += parts(tile, n, h, room + a);
      }
    d_q(n, hk, a) = scale * q;
    d_k(n, hk, a) = k;
  }
};
// d_beta and d_g [N, HV] from the parts of the tiles, added in order. A thread has a head of a token.
template <class T> struct SumGateGradients {
  View<T const, 4> parts;
  View<double const, 4> paths;
  View<wide_t<T> const, 2> g;
  View<wide_t<T>, 2> d_g, d_beta;
  Index room;

  HYBRIDATTN_HD void operator()(Index i) const {
    Index const n = i / g.extent(1), h = i % g.extent(1);
    T beta = 0;
    double through = 0;
    for (Index tile = 0; tile < parts.extent(0); ++tile) {
      beta += parts(tile, n, h, 2 * room);
      for (Index j = 0; j < paths.extent(3); ++j) through += paths(tile, n, h, j);
    }
    d_beta(n, h) = beta;
    d_g(n, h) = std::exp(g(n, h)) * static_cast<T>(through);
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::gdn

#if defined(__GNUC__) && !defined(__clang__) && !HYBRIDATTN_CUDA
#pragma GCC diagnostic pop
#endif
#endif

// ==== hybridattn/attention/gdn/gpu.hpp
#ifndef HYBRIDATTN_ATTENTION_GDN_GPU_HPP
#define HYBRIDATTN_ATTENTION_GDN_GPU_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {
namespace gdn {

template <class F> void with_room(Config const& c, F f) { attention::with_room("GatedDeltaNet", "key_dim", c.key_dim, f); }

// A, Q and R of all chunks of a batch.
template <class T, class B> struct ChunkPairs {
  Tensor<T, 4, B> keys, queries, solved;

  ChunkPairs(B& gpu, Shape<4> shape) : keys{gpu, shape}, queries{gpu, shape}, solved{gpu, shape} {}
  void give(ChunkParams<T>& p) {
    p.key_pairs = out(keys);
    p.query_pairs = out(queries);
    p.solved = out(solved);
  }
};
template <class T, class M> ChunkParams<T> chunk_params(Config const& c, SequencesOn<M> const& s, Inputs<In<T>> x) {
  ChunkParams<T> p{};
  p.x = x;
  p.sequences = s.table().list;
  p.group = c.num_value_heads / c.num_heads;
  p.scale = static_cast<T>(c.scale);
  return p;
}
template <class T, class B, class M>
void forward_chunks(B& gpu, Config const& c, SequencesOn<M> const& s, Inputs<In<T>> x, Outputs<Out<T>> y, Saved<Out<T>> saved) {
  auto p = chunk_params<T>(c, s, x);
  p.o = y.o;
  p.error = saved.error;
  p.final_state = y.final_state;
  with_room(c, [&](auto K) {
    using Of = Tiling<T, K()>;
    Index const HV = c.num_value_heads, chunks = Of::count_chunks(s);
    ChunkPairs<T, B> pairs{gpu, {chunks, HV, Of::chunk, Of::chunk}};
    pairs.give(p);
    p.tiles = ceil_div(c.value_dim, Index{Of::columns});
    launch<PrepareChunks<T, K()>>(gpu, {.x = chunks, .y = c.num_heads}, p);
    launch<ForwardChunks<T, K()>>(gpu, {.x = p.tiles * s.count(), .y = HV}, p);
  });
}
template <class T, class B, class M>
void backward_chunks(B& gpu, Config const& c, SequencesOn<M> const& s, Inputs<In<T>> x, Saved<In<T>> saved, Outputs<In<T>> d_y,
                     Inputs<Out<T>> d_x) {
  auto p = chunk_params<T>(c, s, x);
  p.saved_error = saved.error;
  p.d_o = d_y.o;
  p.d_final_state = d_y.final_state;
  p.d_x = d_x;
  with_room(c, [&](auto K) {
    using Of = Tiling<T, K()>;
    Index const HV = c.num_value_heads, chunks = Of::count_chunks(s);
    Shape<4> const of_states{chunks, HV, c.key_dim, c.value_dim};
    ChunkPairs<T, B> pairs{gpu, {chunks, HV, Of::chunk, Of::chunk}};
    Tensor<T, 4, B> states{gpu, of_states}, gradients{gpu, of_states};
    Tensor<T, 3, B> projected{gpu, {s.tokens(), HV, c.value_dim}};
    pairs.give(p);
    p.states = out(states);
    p.gradients = out(gradients);
    p.projected = out(projected);
    p.tiles = ceil_div(c.value_dim, Index{Of::columns});
    Grid const scan{.x = p.tiles * s.count(), .y = HV}, all_chunks{.x = chunks, .y = c.num_heads};
    launch<PrepareChunks<T, K()>>(gpu, all_chunks, p);
    launch<StatesOfChunks<T, K()>>(gpu, scan, p);
    launch<GradientsOfStates<T, K()>>(gpu, scan, p);
    launch<GradientsOfTokens<T, K()>>(gpu, all_chunks, p);
  });
}

// Token by token: decoding, where `extends`, and the judge of the chunks.
template <class T, class B, class M>
void forward_steps(B& gpu, Config const& c, SequencesOn<M> const& s, Inputs<In<T>> x, Outputs<Out<T>> y, Saved<Out<T>> saved,
                   bool extends) {
  ForwardStepsParams<T> p{};
  p.x = x;
  p.o = y.o;
  p.error = saved.error;
  p.final_state = y.final_state;
  p.sequences = s.table().list;
  p.group = c.num_value_heads / c.num_heads;
  p.scale = static_cast<T>(c.scale);
  p.extends = extends;
  with_room(c, [&](auto K) {
    using Kernel = ForwardSteps<T, K()>;
    p.tiles = ceil_div(c.value_dim, Index{Kernel::columns});
    launch<Kernel>(gpu, {.x = p.tiles * s.count(), .y = c.num_value_heads}, p);
  });
}
template <class T, class B, class M>
void backward_steps(B& gpu, Config const& c, SequencesOn<M> const& s, Inputs<In<T>> x, Saved<In<T>> saved, Outputs<In<T>> d_y,
                    Inputs<Out<T>> d_x) {
  BackwardStepsParams<T> p{};
  p.x = x;
  p.error = saved.error;
  p.d_o = d_y.o;
  p.d_final_state = d_y.final_state;
  p.d_v = d_x.v;
  p.d_initial_state = d_x.initial_state;
  p.sequences = s.table().list;
  p.group = c.num_value_heads / c.num_heads;
  p.scale = static_cast<T>(c.scale);
  with_room(c, [&](auto K) {
    using Kernel = BackwardSteps<T, K()>;
    Index const HV = c.num_value_heads, tiles = ceil_div(c.value_dim, Index{Kernel::columns});
    Tensor<T, 5, B> states{gpu, {Kernel::count_pieces(s), HV, tiles, Kernel::elements, Kernel::threads}};
    Tensor<T, 4, B> parts{gpu, {tiles, s.tokens(), HV, Kernel::sums}};
    Tensor<double, 4, B> paths{gpu, {tiles, s.tokens(), HV, Kernel::paths}};
    p.states = out(states);
    p.parts = out(parts);
    p.paths = out(paths);
    p.tiles = tiles;
    launch<Kernel>(gpu, {.x = tiles * s.count(), .y = HV}, p);
    for_each(gpu, d_x.q.count(), SumKeyGradients<T>{in(parts), d_x.q, d_x.k, K(), p.group, p.scale});
    for_each(gpu, d_x.g.count(), SumGateGradients<T>{in(parts), in(paths), p.x.g, d_x.g, d_x.beta, K()});
  });
}

}  // namespace gdn

template <GdnOptions O, GpuBackend B> struct On<GatedDeltaNet<O>, B> : InFloat<GatedDeltaNet<O>, B> {
  using InFloat<GatedDeltaNet<O>, B>::forward, InFloat<GatedDeltaNet<O>, B>::backward, InFloat<GatedDeltaNet<O>, B>::extend;
  template <std::floating_point T, class M>
  static void forward(B& gpu, gdn::Config const& c, SequencesOn<M> const& s, gdn::Inputs<In<T>> x, gdn::Outputs<Out<T>> y,
                      gdn::Saved<Out<T>> saved) {
    gdn::forward_chunks<T>(gpu, c, s, x, y, saved);
  }

  template <std::floating_point T, class M>
  static void backward(B& gpu, gdn::Config const& c, SequencesOn<M> const& s, gdn::Inputs<In<T>> x, gdn::Outputs<In<T>>,
                       gdn::Saved<In<T>> saved, gdn::Outputs<In<T>> d_y, gdn::Inputs<Out<T>> d_x) {
    gdn::backward_chunks<T>(gpu, c, s, x, saved, d_y, d_x);
  }

  // Forward from the states in the cache to these states, token by token: a step of decoding has one token of each sequence.
  template <std::floating_point T, class M>
  static void extend(B& gpu, gdn::Config const& c, SequencesOn<M> const& s, gdn::Inputs<In<T>> x, gdn::Cache<Out<T>> cache,
                     gdn::Outputs<Out<T>> y) {
    check_fits(s, cache.state.extent(0), std::numeric_limits<Index>::max());
    x.initial_state = cache.state;
    gdn::forward_steps<T>(gpu, c, s, x, {.o = y.o, .final_state = cache.state}, {}, true);
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/ops/adamw/kernels.hpp
// AdamW as kernels. One launch works on all tensors of a table. The host cannot read how many blocks of elements the table has, so a
// fixed number of blocks of threads take the table's blocks in turns: block x takes the blocks x, x + adamw_turns, ...
#ifndef HYBRIDATTN_OPS_ADAMW_KERNELS_HPP
#define HYBRIDATTN_OPS_ADAMW_KERNELS_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::gpu {

inline constexpr Index adamw_turns = 264;
inline constexpr int adamw_threads = 512;

template <class T> using AdamWTable = View<AdamWTensor<T> const, 1>;

template <class T> HYBRIDATTN_DEVICE Index blocks_of_all(AdamWTable<T> tensors) {
  Index const n = tensors.extent(0);
  return n == 0 ? 0 : tensors(n - 1).first_block + tensors(n - 1).blocks();
}
// The tensor that a block of the table belongs to.
template <class T> HYBRIDATTN_DEVICE Index tensor_of(AdamWTable<T> tensors, Index block) {
  Index first = 0, last = tensors.extent(0);
  while (last - first > 1) {
    Index const middle = (first + last) / 2;
    if (tensors(middle).first_block <= block) first = middle;
    else last = middle;
  }
  return first;
}
// The elements of a tensor's block.
struct AdamWRange {
  Index first, last;
};
template <class T> HYBRIDATTN_DEVICE AdamWRange elements_of(AdamWTensor<T> const& t, Index block) {
  Index const first = (block - t.first_block) * AdamWTensor<T>::block;
  return {first, simt::smaller(first + AdamWTensor<T>::block, t.count)};
}

// parts [tensors, adamw_turns]: part s of a tensor is the sum over its blocks s, s + adamw_turns, ... So the order of a tensor's sum does
// not depend on the other tensors. A tensor has as many parts as blocks, at most adamw_turns.
template <class T> struct AdamWPartialSquares {
  static constexpr int threads = adamw_threads;
  struct Params {
    AdamWTable<T> tensors;
    View<double, 2> parts;
  };
  struct Shared {
    double of_warps[threads / 32];
  };
  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    Index const blocks = blocks_of_all<T>(p.tensors);
    for (Index block = simt::block_x(); block < blocks;) {
      Index const i = tensor_of<T>(p.tensors, block);
      AdamWTensor<T> const t = p.tensors(i);
      Index const part = block - t.first_block;   // below adamw_turns: the block before this one in turn is another tensor's
      double sum = 0;
      for (; block < t.first_block + t.blocks(); block += adamw_turns) sum += sum_of_squares(t, elements_of(t, block));
      sum = sum_block(shared.of_warps, sum);
      if (simt::thread_id() == 0) p.parts(i, part) = sum;
    }
  }

 private:
  // x - x is 0, or NaN where x is not finite. Squares of floats do not overflow in double.
  static HYBRIDATTN_DEVICE double sum_of_squares(AdamWTensor<T> const& t, AdamWRange elements) {
    double sum = 0;
    for (Index e = elements.first + simt::thread_id(); e < elements.last; e += threads) {
      double const x = static_cast<double>(t.g[e]);
      sum += x * x + (x - x);
    }
    return sum;
  }
};
// A warp has a tensor.
template <class T> struct AdamWAddSquares {
  static constexpr int threads = 128;
  struct Params {
    AdamWTable<T> tensors;
    View<double const, 2> parts;
    View<double, 1> squares;
  };
  struct Shared {};
  static HYBRIDATTN_DEVICE void run(Shared&, Params const& p) {
    Index const i = simt::block_x() * (threads / 32) + simt::warp();
    if (i >= p.tensors.extent(0)) return;
    Index const parts = simt::smaller(p.tensors(i).blocks(), adamw_turns);
    double sum = 0;
    for (Index part = simt::lane(); part < parts; part += 32) sum += p.parts(i, part);
    sum = simt::sum_lanes(sum);
    if (simt::lane() == 0) p.squares(i) = sum;
  }
};

// The rule for an element.
template <class T> struct AdamWElement {
  T keep, clip, b1, b2, eps, add1, add2, step, root;

  struct Result {
    T mean, square, parameter;
  };
  explicit HYBRIDATTN_DEVICE AdamWElement(AdamWRates const& r)
      : keep(static_cast<T>(1 - r.learning_rate * r.weight_decay)), clip(static_cast<T>(r.gradient_scale)), b1(static_cast<T>(r.beta_1)),
        b2(static_cast<T>(r.beta_2)), eps(static_cast<T>(r.epsilon)), add1(static_cast<T>(1 - r.beta_1)),
        add2(static_cast<T>(1 - r.beta_2)), step(static_cast<T>(r.learning_rate / r.correction_1)),
        root(static_cast<T>(1 / std::sqrt(r.correction_2))) {}
  HYBRIDATTN_DEVICE Result operator()(AdamWTensor<T> const& t, Index e) const {
    T const gradient = t.g[e] * clip, mean = b1 * t.m[e] + add1 * gradient, square = b2 * t.v[e] + add2 * gradient * gradient;
    return {mean, square, keep * t.p[e] - step * mean / (std::sqrt(square) * root + eps)};
  }
};

template <class T> struct AdamWMove {
  static constexpr int threads = adamw_threads;
  struct Params {
    AdamWTable<T> tensors;
    View<AdamWRates const, 1> rates;
    View<StepNumbers const, 1> numbers;
  };
  struct Shared {};
  static HYBRIDATTN_DEVICE void run(Shared&, Params const& p) {
    if (p.numbers(0).fault != StepFault::none) return;
    Index const blocks = blocks_of_all<T>(p.tensors);
    for (Index block = simt::block_x(); block < blocks; block += adamw_turns) {
      Index const i = tensor_of<T>(p.tensors, block);
      AdamWTensor<T> const t = p.tensors(i);
      AdamWRange const elements = elements_of(t, block);
      AdamWElement<T> const rule{p.rates(i)};
      for (Index e = elements.first + simt::thread_id(); e < elements.last; e += threads) {
        auto const next = rule(t, e);
        t.m[e] = next.mean;
        t.v[e] = next.square;
        t.p[e] = next.parameter;
      }
    }
  }
};

// A fault in block `number` of a tensor, as an integer above 0. The earlier block has the larger one, and in a block the mean before the
// square before the parameter. So the largest one is the fault that a tensor is said to have.
inline constexpr Index first_fault_rank = Index{1} << 60;
HYBRIDATTN_HD inline Index rank_of(Index number, StepFault fault) {
  return first_fault_rank - (number * 4 + static_cast<Index>(fault) - static_cast<Index>(StepFault::mean));
}
HYBRIDATTN_HD inline StepFault fault_of(Index rank) {
  return rank == 0 ? StepFault::none : static_cast<StepFault>((first_fault_rank - rank) % 4 + static_cast<Index>(StepFault::mean));
}

// ranks [tensors]: the largest rank of each tensor's faults; 0 before.
template <class T> struct AdamWRankFaults {
  static constexpr int threads = adamw_threads;
  struct Params {
    AdamWTable<T> tensors;
    View<AdamWRates const, 1> rates;
    View<StepNumbers const, 1> numbers;
    View<Index, 1> ranks;
  };
  struct Shared {};
  static HYBRIDATTN_DEVICE void run(Shared&, Params const& p) {
    if (p.numbers(0).fault != StepFault::none) return;
    Index const blocks = blocks_of_all<T>(p.tensors);
    for (Index block = simt::block_x(); block < blocks; block += adamw_turns) {
      Index const i = tensor_of<T>(p.tensors, block);
      AdamWTensor<T> const t = p.tensors(i);
      StepFault const fault = fault_in(t, elements_of(t, block), AdamWElement<T>{p.rates(i)});
      if (fault != StepFault::none) simt::atomic_max(&p.ranks(i), rank_of(block - t.first_block, fault));
    }
  }

 private:
  // Of the elements that this thread has.
  static HYBRIDATTN_DEVICE StepFault fault_in(AdamWTensor<T> const& t, AdamWRange elements, AdamWElement<T> const& rule) {
    T mean = 0, square = 0, parameter = 0;   // NaN as soon as one number is not finite: x - x is 0 of a finite one only
    for (Index e = elements.first + simt::thread_id(); e < elements.last; e += threads) {
      auto const next = rule(t, e);
      mean += next.mean - next.mean;
      square += next.square - next.square;
      parameter += next.parameter - next.parameter;
    }
    return mean != 0 ? StepFault::mean : square != 0 ? StepFault::square : parameter != 0 ? StepFault::parameter : StepFault::none;
  }
};
struct AdamWNameFaults {
  View<Index const, 1> ranks;
  View<StepFault, 1> found;
  HYBRIDATTN_HD void operator()(Index i) const { found(i) = fault_of(ranks(i)); }
};

struct StepOpening {
  View<StepNumbers, 1> numbers;
  HYBRIDATTN_HD void operator()(Index) const {
    StepNumbers const& last = numbers(0);
    StepNumbers next;
    next.rate = last.rate;
    next.steps = last.steps;
    next.first_bad = last.first_bad;
    numbers(0) = next;
  }
};
struct StepLosses {
  double share;
  View<BatchLosses const, 1> losses;
  View<StepNumbers, 1> numbers;
  HYBRIDATTN_HD void operator()(Index) const {
    numbers(0).loss += losses(0).loss;
    numbers(0).auxiliary_loss += share * losses(0).auxiliary();
    numbers(0).policy_loss += share * losses(0).policy;
  }
};

// One warp: lane l has the tensors l, l + 32, ...
struct StepDecision {
  static constexpr int threads = 32;
  struct Params {
    DecideStep::Options options;
    View<std::int32_t const, 1> roles;
    View<double const, 1> squares;
    View<Index const, 1> updates;
    View<AdamWRates, 1> rates;
    View<StepNumbers, 1> numbers;
  };
  struct Shared {};
  static HYBRIDATTN_DEVICE void run(Shared&, Params const& p) {
    Index const tensors = p.roles.extent(0);
    double others = 0, detached = 0;   // norms
    Index bad = tensors;               // the first tensor whose sum is not finite
    for (Index i = simt::lane(); i < tensors; i += 32) {
      bool const is_detached = p.roles(i) & StepRole::detached;
      others += is_detached ? 0 : p.squares(i);
      detached += is_detached ? p.squares(i) : 0;
      if (!std::isfinite(p.squares(i))) bad = simt::smaller(bad, i);
    }
    others = std::sqrt(simt::sum_lanes(others));
    detached = std::sqrt(simt::sum_lanes(detached));
    bad = -simt::largest_of_lanes(-bad);
    StepFault const fault = fault_before_clipping(p, bad);
    double const rate = p.numbers(0).rate, norm = std::hypot(others, detached);
    for (Index i = simt::lane(); i < tensors && fault == StepFault::none; i += 32)
      p.rates(i) = DecideStep::rates(p.options, p.roles(i), static_cast<double>(p.updates(i) + 1), rate,
                                     p.roles(i) & StepRole::detached ? detached : others);
    simt::sync_warp();   // every lane has read the numbers
    if (simt::lane() > 0) return;
    p.numbers(0).gradient_norm = norm;
    p.numbers(0).fault = fault == StepFault::none && !std::isfinite(norm) ? StepFault::global_norm : fault;
    if (bad < tensors && p.numbers(0).tensor < 0) p.numbers(0).tensor = static_cast<std::int32_t>(bad);
  }

 private:
  static HYBRIDATTN_DEVICE StepFault fault_before_clipping(Params const& p, Index bad) {
    StepNumbers const& step = p.numbers(0);
    if (!std::isfinite(step.loss.loss)) return StepFault::loss;
    if (!std::isfinite(step.auxiliary_loss)) return StepFault::auxiliary_loss;
    if (step.fault != StepFault::none || bad == p.roles.extent(0)) return step.fault;
    return std::isnan(p.squares(bad)) ? StepFault::gradient : StepFault::tensor_norm;
  }
};

// One warp: lane l has the tensors l, l + 32, ...
struct StepClosing {
  static constexpr int threads = 32;
  struct Params {
    View<std::int32_t const, 1> roles;
    View<StepFault const, 1> found;
    View<Index, 1> updates;
    View<StepNumbers, 1> numbers;
  };
  struct Shared {};
  static HYBRIDATTN_DEVICE void run(Shared&, Params const& p) {
    Index const tensors = p.found.extent(0);
    Index bad = tensors;   // the first tensor with a fault
    for (Index i = simt::lane(); i < tensors; i += 32)
      if (p.found(i) != StepFault::none) bad = simt::smaller(bad, i);
    bad = -simt::largest_of_lanes(-bad);
    bool const was_sound = p.numbers(0).fault == StepFault::none;
    for (Index i = simt::lane(); i < p.roles.extent(0) && was_sound && bad == tensors; i += 32)
      p.updates(i) += p.roles(i) & StepRole::has_gradient ? 1 : 0;
    simt::sync_warp();   // every lane has read the fault
    if (simt::lane() > 0) return;
    StepNumbers& step = p.numbers(0);
    if (was_sound && bad < tensors) {
      step.fault = p.found(bad);
      step.tensor = static_cast<std::int32_t>(bad);
    }
    if (step.fault == StepFault::none) ++step.steps;
    else if (step.first_bad.step == 0) step.first_bad = {step.steps + 1, step.loss, step.auxiliary_loss, step.fault, step.tensor};
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::gpu
#endif

// ==== hybridattn/ops/adamw/gpu.hpp
#ifndef HYBRIDATTN_OPS_ADAMW_GPU_HPP
#define HYBRIDATTN_OPS_ADAMW_GPU_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

template <GpuBackend B> struct On<AdamWSquares, B> {
  template <class T> static void forward(B& gpu, View<AdamWTensor<T> const, 1> tensors, View<double, 1> squares) {
    using AddParts = gpu::AdamWAddSquares<T>;
    Tensor<double, 2, B> parts{gpu, {tensors.extent(0), gpu::adamw_turns}};
    launch<gpu::AdamWPartialSquares<T>>(gpu, {.x = gpu::adamw_turns}, {tensors, out(parts)});
    launch<AddParts>(gpu, {.x = ceil_div(tensors.extent(0), AddParts::threads / 32)}, {tensors, in(parts), squares});
  }
};

template <GpuBackend B> struct On<AdamWCheck, B> {
  template <class T>
  static void forward(B& gpu, View<AdamWTensor<T> const, 1> tensors, View<AdamWRates const, 1> rates, View<StepNumbers const, 1> numbers,
                      View<StepFault, 1> found) {
    if (tensors.extent(0) == 0) return;
    Tensor<Index, 1, B> ranks{gpu, {tensors.extent(0)}};
    gpu.fill(out(ranks).data, std::byte{0}, ranks.byte_count());
    launch<gpu::AdamWRankFaults<T>>(gpu, {.x = gpu::adamw_turns}, {tensors, rates, numbers, out(ranks)});
    for_each(gpu, found.count(), gpu::AdamWNameFaults{in(ranks), found});
  }
};

template <GpuBackend B> struct On<AdamWStep, B> {
  template <class T>
  static void forward(B& gpu, View<AdamWTensor<T> const, 1> tensors, View<AdamWRates const, 1> rates, View<StepNumbers const, 1> numbers) {
    launch<gpu::AdamWMove<T>>(gpu, {.x = gpu::adamw_turns}, {tensors, rates, numbers});
  }
};

template <GpuBackend B> struct On<OpenStep, B> {
  static void forward(B& gpu, View<StepNumbers, 1> numbers) { for_each(gpu, 1, gpu::StepOpening{numbers}); }
};

template <GpuBackend B> struct On<AddBatchLosses, B> {
  static void forward(B& gpu, double share, View<BatchLosses const, 1> losses, View<StepNumbers, 1> numbers) {
    for_each(gpu, 1, gpu::StepLosses{share, losses, numbers});
  }
};

template <GpuBackend B> struct On<DecideStep, B> {
  static void forward(B& gpu, DecideStep::Options const& o, View<std::int32_t const, 1> roles, View<double const, 1> squares,
                      View<Index const, 1> updates, View<AdamWRates, 1> rates, View<StepNumbers, 1> numbers) {
    launch<gpu::StepDecision>(gpu, {}, {o, roles, squares, updates, rates, numbers});
  }
};

template <GpuBackend B> struct On<CloseStep, B> {
  static void forward(B& gpu, View<std::int32_t const, 1> roles, View<StepFault const, 1> found, View<Index, 1> updates,
                      View<StepNumbers, 1> numbers) {
    launch<gpu::StepClosing>(gpu, {}, {roles, found, updates, numbers});
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/ops/arithmetic/kernels.hpp
// Arithmetic as kernels. A thread has an element.
#ifndef HYBRIDATTN_OPS_ARITHMETIC_KERNELS_HPP
#define HYBRIDATTN_OPS_ARITHMETIC_KERNELS_HPP

#include <cstdint>

namespace hybridattn::inline HYBRIDATTN_ABI::gpu {

template <class T> struct SetElement {
  T value;
  View<T, 1> y;
  HYBRIDATTN_HD void operator()(Index i) const { y(i) = value; }
};

template <class T> struct AddElement {
  View<T const, 1> x;
  View<T, 1> y;
  HYBRIDATTN_HD void operator()(Index i) const { y(i) += x(i); }
};

template <class T> struct AddWeightedElement {
  double weight;
  View<T const, 1> x;
  View<double, 1> sum;
  HYBRIDATTN_HD void operator()(Index i) const { sum(i) += weight * static_cast<double>(x(i)); }
};

// found becomes 1 where an element is NaN or infinite.
template <class T> struct FindBadElement {
  static constexpr int threads = 128;
  struct Params {
    View<T const, 1> x;
    View<std::int32_t, 1> found;   // [1]
  };
  struct Shared {};
  static HYBRIDATTN_DEVICE void run(Shared&, Params const& p) {
    Index const i = simt::block_x() * threads + simt::thread_id();
    auto const infinity = simt::infinity<wide_t<T>>();
    bool const bad = i < p.x.extent(0) && !(-infinity < p.x(i) && p.x(i) < infinity);
    if (simt::any(bad) && simt::lane() == 0) simt::atomic_max(&p.found(0), std::int32_t{1});
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::gpu
#endif

// ==== hybridattn/ops/arithmetic/gpu.hpp
#ifndef HYBRIDATTN_OPS_ARITHMETIC_GPU_HPP
#define HYBRIDATTN_OPS_ARITHMETIC_GPU_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

template <GpuBackend B> struct On<Fill, B> {
  template <class T> static void forward(B& gpu, T value, View<T, 1> y) { for_each(gpu, y.count(), gpu::SetElement<T>{value, y}); }
};

template <GpuBackend B> struct On<Add, B> : InFloat<Add, B> {
  using InFloat<Add, B>::forward;
  template <std::floating_point T> static void forward(B& gpu, View<T const, 1> x, View<T, 1> y) {
    for_each(gpu, y.count(), gpu::AddElement<T>{x, y});
  }
};

template <GpuBackend B> struct On<AddWeighted, B> {
  template <class T> static void forward(B& gpu, double weight, View<T const, 1> loss, View<double, 1> sum) {
    for_each(gpu, 1, gpu::AddWeightedElement<T>{weight, loss, sum});
  }
};

template <GpuBackend B> struct On<AllFinite, B> {
  template <class T> static bool forward(B& gpu, View<T const, 1> x) {
    using Find = gpu::FindBadElement<T>;
    auto found = zeros<std::int32_t>(gpu, Shape<1>{1});
    launch<Find>(gpu, {.x = ceil_div(x.count(), Find::threads)}, {x, out(found)});
    return download(gpu, found)[0] == 0;
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/ops/balance/kernels.hpp
// Load balancing as kernels.
#ifndef HYBRIDATTN_OPS_BALANCE_KERNELS_HPP
#define HYBRIDATTN_OPS_BALANCE_KERNELS_HPP

#include <cstdint>

namespace hybridattn::inline HYBRIDATTN_ABI::gpu {

// The sum of an expert's probabilities over sum_rows tokens. A thread has an expert.
template <class T> struct SumProbabilities {
  static constexpr int threads = 128;
  struct Params {
    View<T const, 2> probabilities;
    View<double, 2> parts;   // [blocks of tokens, E]
  };
  struct Shared {};
  static HYBRIDATTN_DEVICE void run(Shared&, Params const& p) {
    Index const first = simt::block_x() * sum_rows, last = simt::smaller(first + sum_rows, p.probabilities.extent(0));
    Index const e = simt::block_y() * threads + simt::thread_id();
    if (e >= p.probabilities.extent(1)) return;
    double sum = 0;
    for (Index n = first; n < last; ++n) sum += static_cast<double>(p.probabilities(n, e));
    p.parts(simt::block_x(), e) = sum;
  }
};

// Adds an expert's tokens, and the parts of its probabilities in order. A thread has an expert.
struct AddExpertUse {
  View<std::int32_t const, 1> offsets;
  View<double const, 2> parts;
  View<double, 2> sums;
  HYBRIDATTN_HD void operator()(Index e) const {
    double sum = 0;
    for (Index n = 0; n < parts.extent(0); ++n) sum += parts(n, e);
    sums(0, e) += offsets(e + 1) - offsets(e);
    sums(1, e) += sum;
  }
};

// One warp adds up the experts.
struct AddBalanceLoss {
  static constexpr int threads = 32;
  struct Params {
    double coefficient;
    Index tokens;   // not 0
    View<double const, 2> sums;
    View<double, 1> value;
  };
  struct Shared {};
  static HYBRIDATTN_DEVICE void run(Shared&, Params const& p) {
    double const tokens = static_cast<double>(p.tokens), experts = static_cast<double>(p.sums.extent(1));
    double sum = 0;
    for (Index e = simt::lane(); e < p.sums.extent(1); e += 32) sum += p.sums(0, e) / tokens * (p.sums(1, e) / tokens);
    sum = simt::sum_lanes(sum);
    if (simt::lane() == 0) p.value(0) += p.coefficient * experts * sum;
  }
};

template <class T> struct BalanceLossBackward {
  double coefficient;
  Index tokens;
  View<double const, 2> sums;
  double d_value;
  View<T, 1> d_probability;
  HYBRIDATTN_HD void operator()(Index e) const {
    double const count = static_cast<double>(tokens), experts = static_cast<double>(sums.extent(1));
    d_probability(e) = tokens == 0 ? T(0) : static_cast<T>(d_value * coefficient * experts * sums(0, e) / count / count);
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::gpu
#endif

// ==== hybridattn/ops/balance/gpu.hpp
#ifndef HYBRIDATTN_OPS_BALANCE_GPU_HPP
#define HYBRIDATTN_OPS_BALANCE_GPU_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

template <GpuBackend B> struct On<ExpertUse, B> {
  template <class T>
  static void forward(B& gpu, View<std::int32_t const, 1> offsets, View<T const, 2> probabilities, View<double, 2> sums) {
    using Sum = gpu::SumProbabilities<T>;
    Index const blocks = gpu::row_blocks(probabilities.extent(0)), experts = sums.extent(1);
    Tensor<double, 2, B> parts{gpu, {blocks, experts}};
    launch<Sum>(gpu, {.x = blocks, .y = ceil_div(experts, Sum::threads)}, {probabilities, out(parts)});
    for_each(gpu, experts, gpu::AddExpertUse{offsets, in(parts), sums});
  }
};

template <GpuBackend B> struct On<BalanceLoss, B> {
  static void forward(B& gpu, double coefficient, Index count, View<double const, 2> sums, View<double, 1> value) {
    if (count > 0) launch<gpu::AddBalanceLoss>(gpu, {.x = 1}, {coefficient, count, sums, value});
  }
  template <class T>
  static void backward(B& gpu, double coefficient, Index count, View<double const, 2> sums, double d_value, View<T, 1> d_probability) {
    for_each(gpu, sums.extent(1), gpu::BalanceLossBackward<T>{coefficient, count, sums, d_value, d_probability});
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/ops/causal_conv1d/kernels.hpp
// The short causal convolution as kernels.
#ifndef HYBRIDATTN_OPS_CAUSAL_CONV1D_KERNELS_HPP
#define HYBRIDATTN_OPS_CAUSAL_CONV1D_KERNELS_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::gpu {

inline constexpr int conv_threads = 128;
// A block has conv_threads channels of a token, or of a block of tokens.
inline Grid conv_grid(Index rows, Index channels) { return {.x = rows, .y = ceil_div(channels, conv_threads)}; }

// The inputs of a convolution. Those before a sequence are its initial state, or zeros where there are no states.
template <class T> struct ConvInputs {
  SequenceTable sequences;
  View<T const, 2> x, w;
  View<T const, 3> initial_state;

  HYBRIDATTN_HD Index width() const { return w.extent(1); }
  HYBRIDATTN_HD Index channels() const { return x.extent(1); }
  // A token's number in its sequence. The token after the last one has the sequence's length as its number.
  HYBRIDATTN_HD Index position_of(Index n) const { return n - sequences.list(sequences.owners(n)).start; }
  // Whether the input `back` tokens before a token is a number of x or of a state.
  HYBRIDATTN_HD bool has(Index position, Index back) const { return back <= position || !initial_state.empty(); }
  // The input of channel c, `back` tokens before token `position` of a sequence.
  HYBRIDATTN_HD T at(Index sequence, Index position, Index back, Index c) const {
    if (back <= position) return x(sequences.list(sequence).start + position - back, c);
    return initial_state(sequence, width() - 1 - (back - position), c);
  }
  // The sum over the taps for channel c of token n. Without taps it is x.
  HYBRIDATTN_HD T convolved(Index n, Index c) const {
    if (width() == 0) return x(n, c);
    Index const sequence = sequences.owners(n), position = position_of(n);
    T sum = 0;
    for (Index tap = 0; tap < width(); ++tap)
      if (Index const back = width() - 1 - tap; has(position, back)) sum += w(c, tap) * at(sequence, position, back, c);
    return sum;
  }
};

// y. A thread has a channel of a token.
template <class T> struct ConvForward {
  static constexpr int threads = conv_threads;
  struct Params {
    ConvInputs<T> inputs;
    Activation activation;
    View<T, 2> y;
  };
  struct Shared {};
  static HYBRIDATTN_DEVICE void run(Shared&, Params const& p) {
    Index const n = simt::block_x(), c = simt::block_y() * threads + simt::thread_id();
    if (c >= p.inputs.channels()) return;
    T const s = p.inputs.convolved(n, c);
    p.y(n, c) = p.activation == Activation::silu ? silu(s) : s;
  }
};

// Row j of a final state is the input W - 1 - j tokens before the end. A thread has a channel of a sequence. It makes row j of x, or of
// row j or a later one of the initial state. So the final state may be the initial state.
template <class T> struct KeepLastInputs {
  ConvInputs<T> inputs;
  View<T, 3> final_state;
  HYBRIDATTN_HD void operator()(Index i) const {
    Index const sequence = i / inputs.channels(), c = i % inputs.channels(), length = inputs.sequences.list(sequence).length;
    for (Index j = 0; j < final_state.extent(1); ++j) {
      Index const back = inputs.width() - 1 - j;
      final_state(sequence, j, c) = inputs.has(length, back) ? inputs.at(sequence, length, back, c) : T(0);
    }
  }
};

// d_s = d_y silu'(s), or d_y. A thread has a channel of a token.
template <class T> struct ConvThroughActivation {
  static constexpr int threads = conv_threads;
  struct Params {
    ConvInputs<T> inputs;
    Activation activation;
    View<T const, 2> d_y;
    View<T, 2> d_s;
  };
  struct Shared {};
  static HYBRIDATTN_DEVICE void run(Shared&, Params const& p) {
    Index const n = simt::block_x(), c = simt::block_y() * threads + simt::thread_id();
    if (c >= p.inputs.channels()) return;
    p.d_s(n, c) = p.activation == Activation::silu ? p.d_y(n, c) * silu_slope(p.inputs.convolved(n, c)) : p.d_y(n, c);
  }
};

// What the gradients of x and of the initial states are made of.
template <class T> struct ConvOutputGradients {
  SequenceTable sequences;
  View<T const, 2> w, d_s;
  View<T const, 3> d_final_state;   // may be empty

  // The gradient of the input of channel c that stands `before` tokens before the start of a sequence, or -before tokens after it.
  // It reaches the W tokens from its own place on, and the final state where it is one of the last W - 1 inputs.
  HYBRIDATTN_HD T of_input(Index sequence, Index before, Index c) const {
    Index const W = w.extent(1), start = sequences.list(sequence).start, length = sequences.list(sequence).length;
    T sum = 0;
    for (Index ahead = simt::larger(before, Index{0}); ahead < simt::smaller(W, before + length); ++ahead)
      sum += w(c, W - 1 - ahead) * d_s(start - before + ahead, c);
    Index const row = W - 1 - before - length;   // of the final state
    if (!d_final_state.empty() && row >= 0) sum += d_final_state(sequence, row, c);
    return sum;
  }
};

// d_x. A thread has a channel of a token.
template <class T> struct ConvInputGradient {
  static constexpr int threads = conv_threads;
  struct Params {
    ConvOutputGradients<T> gradients;
    View<T, 2> d_x;
  };
  struct Shared {};
  static HYBRIDATTN_DEVICE void run(Shared&, Params const& p) {
    ConvOutputGradients<T> const& from = p.gradients;
    Index const n = simt::block_x(), c = simt::block_y() * threads + simt::thread_id();
    if (c >= p.d_x.extent(1)) return;
    Index const sequence = from.sequences.owners(n), position = n - from.sequences.list(sequence).start;
    p.d_x(n, c) = from.w.extent(1) == 0 ? from.d_s(n, c) : from.of_input(sequence, -position, c);
  }
};

// Row j of an initial state stands W - 1 - j tokens before its sequence. A thread has an element.
template <class T> struct ConvStateGradient {
  ConvOutputGradients<T> gradients;
  View<T, 3> d_initial_state;
  HYBRIDATTN_HD void operator()(Index i) const {
    Index const rows = d_initial_state.extent(1), C = d_initial_state.extent(2), sequence = i / (rows * C), j = i / C % rows, c = i % C;
    d_initial_state(sequence, j, c) = gradients.of_input(sequence, rows - j, c);
  }
};

// The part of d_w that sum_rows tokens make. A thread has a channel.
template <class T> struct ConvTapGradients {
  static constexpr int threads = conv_threads;
  struct Params {
    ConvInputs<T> inputs;
    View<T const, 2> d_s;
    View<T, 3> parts;   // [blocks of tokens, W, C]
  };
  struct Shared {};
  static HYBRIDATTN_DEVICE void run(Shared&, Params const& p) {
    Index const first = simt::block_x() * sum_rows, last = simt::smaller(first + sum_rows, p.d_s.extent(0));
    Index const c = simt::block_y() * threads + simt::thread_id();
    if (c >= p.d_s.extent(1)) return;
    for (Index tap = 0; tap < p.parts.extent(1); ++tap) p.parts(simt::block_x(), tap, c) = sum_tokens(p, first, last, tap, c);
  }

 private:
  static HYBRIDATTN_DEVICE T sum_tokens(Params const& p, Index first, Index last, Index tap, Index c) {
    Index const back = p.inputs.width() - 1 - tap;
    T sum = 0;
    for (Index n = first; n < last; ++n) {
      Index const position = p.inputs.position_of(n);
      if (p.inputs.has(position, back)) sum += p.d_s(n, c) * p.inputs.at(p.inputs.sequences.owners(n), position, back, c);
    }
    return sum;
  }
};

// d_w [C, W] = the parts [n, W, C], added in order. A thread has an element.
template <class T> struct SumTapGradients {
  View<T const, 3> parts;
  View<T, 2> d_w;
  HYBRIDATTN_HD void operator()(Index i) const {
    Index const C = d_w.extent(0), tap = i / C, c = i % C;
    T sum = 0;
    for (Index n = 0; n < parts.extent(0); ++n) sum += parts(n, tap, c);
    d_w(c, tap) = sum;
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::gpu
#endif

// ==== hybridattn/ops/causal_conv1d/gpu.hpp
#ifndef HYBRIDATTN_OPS_CAUSAL_CONV1D_GPU_HPP
#define HYBRIDATTN_OPS_CAUSAL_CONV1D_GPU_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

// M is B, or a backend that wraps it.
template <GpuBackend B> struct On<CausalConv1d, B> : InFloat<CausalConv1d, B> {
  using InFloat<CausalConv1d, B>::forward, InFloat<CausalConv1d, B>::backward;
  template <std::floating_point T, class M>
  static void forward(B& gpu, Activation activation, SequencesOn<M> const& s, View<T const, 2> x, View<T const, 2> w,
                      State<In<T>, 3> initial_state, View<T, 2> y, State<Out<T>, 3> final_state) {
    gpu::ConvInputs<T> const inputs{s.table(), x, w, initial_state};
    launch<gpu::ConvForward<T>>(gpu, gpu::conv_grid(x.extent(0), x.extent(1)), {inputs, activation, y});
    if (!final_state.empty()) for_each(gpu, s.count() * x.extent(1), gpu::KeepLastInputs<T>{inputs, final_state});
  }

  template <std::floating_point T, class M>
  static void backward(B& gpu, Activation activation, SequencesOn<M> const& s, View<T const, 2> x, View<T const, 2> w,
                       State<In<T>, 3> initial_state, View<T const, 2> d_y, State<In<T>, 3> d_final_state, View<T, 2> d_x, View<T, 2> d_w,
                       State<Out<T>, 3> d_initial_state) {
    Index const N = x.extent(0), C = x.extent(1), W = w.extent(1), blocks = gpu::row_blocks(N);
    Tensor<T, 2, B> d_s{gpu, {N, C}};
    Tensor<T, 3, B> parts{gpu, {blocks, W, C}};
    gpu::ConvInputs<T> const inputs{s.table(), x, w, initial_state};
    launch<gpu::ConvThroughActivation<T>>(gpu, gpu::conv_grid(N, C), {inputs, activation, d_y, out(d_s)});
    gpu::ConvOutputGradients<T> const gradients{s.table(), w, in(d_s), d_final_state};
    launch<gpu::ConvInputGradient<T>>(gpu, gpu::conv_grid(N, C), {gradients, d_x});
    if (W > 0) {
      launch<gpu::ConvTapGradients<T>>(gpu, gpu::conv_grid(blocks, C), {inputs, in(d_s), out(parts)});
      for_each(gpu, W * C, gpu::SumTapGradients<T>{in(parts), d_w});
    }
    if (!d_initial_state.empty()) for_each(gpu, d_initial_state.count(), gpu::ConvStateGradient<T>{gradients, d_initial_state});
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/ops/cross_entropy/kernels.hpp
// The loss of logits as kernels. A block has a row of logits: thread i has the elements i, i + threads, ...
#ifndef HYBRIDATTN_OPS_CROSS_ENTROPY_KERNELS_HPP
#define HYBRIDATTN_OPS_CROSS_ENTROPY_KERNELS_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::gpu {

// The largest of some logits, the first of equal ones.
template <class T> struct LargestLogit {
  T value;
  int at;

  HYBRIDATTN_DEVICE bool comes_before(LargestLogit const& other) const {
    return value > other.value || (value == other.value && at < other.at);
  }
};

template <class T> struct SoftmaxLossRow {
  static constexpr int threads = 256, warps = threads / 32;
  struct Params {
    View<T const, 2> logits;
    View<std::int32_t const, 1> targets;
    View<double const, 1> scale;
    View<T, 2> d_logits;
    View<LossSum, 1> losses;   // of each row
  };
  struct Shared {
    LargestLogit<T> largest[warps];
    T sums[warps];
  };
  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    Index const n = simt::block_x();
    int const V = static_cast<int>(p.logits.extent(1)), target = p.targets(n);
    check_target(target, V);
    if (target < 0) {
      write_zeros(p, n);
      return;
    }
    int const best = largest_of_row(shared, p.logits.row(n), V);
    T const* const logits = p.logits.row(n);
    T const peak = logits[best], own = logits[target];
    T sum = 0;
    for (int v = simt::thread_id(); v < V; v += threads) sum += std::exp(logits[v] - peak);
    sum = sum_block(shared.sums, sum);   // every thread has read peak and own: d_logits may be logits
    if (simt::thread_id() == 0)
      p.losses(n) = {static_cast<double>(peak) + std::log(static_cast<double>(sum)) - static_cast<double>(own), 1, best == target};
    if (!p.d_logits.empty()) write_gradient(p, n, target, peak, sum);
  }

 private:
  static HYBRIDATTN_DEVICE void write_zeros(Params const& p, Index n) {
    for (int v = simt::thread_id(); v < static_cast<int>(p.logits.extent(1)) && !p.d_logits.empty(); v += threads) p.d_logits(n, v) = T(0);
    if (simt::thread_id() == 0) p.losses(n) = {};
  }
  static HYBRIDATTN_DEVICE void write_gradient(Params const& p, Index n, int target, T peak, T sum) {
    T const* const logits = p.logits.row(n);
    T* const d_logits = p.d_logits.row(n);
    T const scale = static_cast<T>(p.scale(0)), factor = scale / sum;
    for (int v = simt::thread_id(); v < static_cast<int>(p.logits.extent(1)); v += threads)
      d_logits[v] = std::exp(logits[v] - peak) * factor - (v == target ? scale : T(0));
  }
  // A NaN is never the largest, except in the first place: then the whole row is NaN.
  static HYBRIDATTN_DEVICE int largest_of_row(Shared& shared, T const* logits, int V) {
    LargestLogit<T> best{-simt::infinity<T>(), V};
    for (int v = simt::thread_id(); v < V; v += threads) {
      LargestLogit<T> const next{v == 0 && logits[0] != logits[0] ? simt::infinity<T>() : logits[v], v};
      if (next.comes_before(best)) best = next;
    }
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int step = 1; step < 32; step *= 2) {
      LargestLogit<T> const other{simt::shuffle_xor(best.value, step), simt::shuffle_xor(best.at, step)};
      if (other.comes_before(best)) best = other;
    }
    if (simt::lane() == 0) shared.largest[simt::warp()] = best;
    simt::sync_block();
    for (LargestLogit<T> const& other : shared.largest)
      if (other.comes_before(best)) best = other;
    return best.at;
  }
  // As on the CPU: who calls the operation checks the targets.
  static HYBRIDATTN_DEVICE void check_target([[maybe_unused]] int target, [[maybe_unused]] int V) {
#if HYBRIDATTN_BOUNDS_CHECKS
    if (target >= V) HYBRIDATTN_ABORT();
#endif
  }
};

// Adds the losses of all rows to loss [1]. One block.
struct AddRowLosses {
  static constexpr int threads = 256;
  struct Params {
    View<LossSum const, 1> rows;
    View<LossSum, 1> loss;
  };
  struct Shared {
    double losses[threads / 32];
    Index numbers[threads / 32];
  };
  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    LossSum sum;
    for (Index n = simt::thread_id(); n < p.rows.extent(0); n += threads) sum += p.rows(n);
    LossSum const all{sum_block(shared.losses, sum.loss), sum_block(shared.numbers, sum.count), sum_block(shared.numbers, sum.correct)};
    if (simt::thread_id() == 0) p.loss(0) += all;
  }
};

// One block.
struct CountTargetsOnce {
  static constexpr int threads = 256;
  struct Params {
    View<std::int32_t const, 1> targets;
    View<Index, 1> count;
    View<double, 1> scale;
  };
  struct Shared {
    Index of_warps[threads / 32];
  };
  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    Index counted = 0;
    for (Index n = simt::thread_id(); n < p.targets.extent(0); n += threads) counted += p.targets(n) >= 0;
    counted = sum_block(shared.of_warps, counted);
    if (simt::thread_id() > 0) return;
    p.count(0) += counted;
    p.scale(0) = p.count(0) == 0 ? 0 : 1 / static_cast<double>(p.count(0));
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::gpu
#endif

// ==== hybridattn/ops/cross_entropy/gpu.hpp
#ifndef HYBRIDATTN_OPS_CROSS_ENTROPY_GPU_HPP
#define HYBRIDATTN_OPS_CROSS_ENTROPY_GPU_HPP

#include <algorithm>

namespace hybridattn::inline HYBRIDATTN_ABI {

template <GpuBackend B> struct On<CountTargets, B> {
  static void forward(B& gpu, View<std::int32_t const, 1> targets, View<Index, 1> count, View<double, 1> scale) {
    launch<gpu::CountTargetsOnce>(gpu, {}, {targets, count, scale});
  }
};

template <GpuBackend B> struct On<SoftmaxLoss, B> : InFloat<SoftmaxLoss, B> {
  using InFloat<SoftmaxLoss, B>::forward;
  template <std::floating_point T>
  static void forward(B& gpu, View<T const, 2> logits, View<std::int32_t const, 1> targets, View<double const, 1> scale,
                      View<T, 2> d_logits, View<LossSum, 1> loss) {
    Tensor<LossSum, 1, B> rows{gpu, {logits.extent(0)}};
    launch<gpu::SoftmaxLossRow<T>>(gpu, {.x = logits.extent(0)}, {logits, targets, scale, d_logits, out(rows)});
    launch<gpu::AddRowLosses>(gpu, {}, {in(rows), loss});
  }
};

template <GpuBackend B> struct On<CrossEntropy, B> : InFloat<CrossEntropy, B> {
  using InFloat<CrossEntropy, B>::forward, InFloat<CrossEntropy, B>::backward;
  template <std::floating_point T>
  static void forward(B& gpu, View<T const, 2> x, View<T const, 2> w, View<std::int32_t const, 1> targets, View<LossSum, 1> loss) {
    in_blocks<T>(gpu, x, w, targets, {}, loss, [](View<T, 2>, View<T const, 2>, Index) {});
  }
  template <std::floating_point T>
  static void backward(B& gpu, View<T const, 2> x, View<T const, 2> w, View<std::int32_t const, 1> targets, View<double const, 1> scale,
                       View<T, 2> d_x, View<T, 2> d_w, View<LossSum, 1> loss) {
    if (x.extent(0) == 0) gpu::gemm<T>(gpu, Operand<T>{nullptr, w.extent(0), 0}, Operand<T>{nullptr, 0, w.extent(1)}, d_w);   // d_w = 0
    in_blocks<T>(gpu, x, w, targets, scale, loss, [&](View<T, 2> d_logits, View<T const, 2> rows, Index first) {
      gpu::gemm<T>(gpu, operand(d_logits), operand(w), View<T, 2>{d_x.row(first), rows.shape, d_x.stride});
      gpu::gemm<T>(gpu, operand(d_logits).transposed(), operand(rows), d_w, first == 0 ? Into::overwrite : Into::add);
    });
  }

 private:
  // f(d_logits, rows of x, first row) for blocks of rows, one after the other. Without a scale there are no gradients: then f receives the
  // logits.
  template <class T, class F>
  static void in_blocks(B& gpu, View<T const, 2> x, View<T const, 2> w, View<std::int32_t const, 1> targets, View<double const, 1> scale,
                        View<LossSum, 1> loss, F f) {
    Index const N = x.extent(0), V = w.extent(0);
    Tensor<T, 2, B> storage{gpu, {std::min(N, CrossEntropy::block_rows), V}};
    Tensor<LossSum, 1, B> losses{gpu, {N}};
    for (Index first = 0; first < N; first += CrossEntropy::block_rows) {
      Index const count = std::min(N - first, CrossEntropy::block_rows);
      View<T, 2> const logits{out(storage).data, {count, V}};
      View<T const, 2> const rows{x.row(first), {count, x.extent(1)}, x.stride};
      gpu::gemm<T>(gpu, operand(rows), operand(w).transposed(), logits);
      launch<gpu::SoftmaxLossRow<T>>(
          gpu, {.x = count},
          {logits, {targets.data + first, {count}}, scale, scale.empty() ? View<T, 2>{} : logits, {out(losses).data + first, {count}}});
      f(logits, rows, first);
    }
    launch<gpu::AddRowLosses>(gpu, {}, {in(losses), loss});
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/ops/embedding/kernels.hpp
// Embedding as kernels.
#ifndef HYBRIDATTN_OPS_EMBEDDING_KERNELS_HPP
#define HYBRIDATTN_OPS_EMBEDDING_KERNELS_HPP

#include <cstdint>

namespace hybridattn::inline HYBRIDATTN_ABI::gpu {

// A thread has a column of a token.
template <class T> struct EmbeddingForward {
  static constexpr int threads = 128;
  struct Params {
    View<std::int32_t const, 1> tokens;
    View<T const, 2> table;
    View<T, 2> y;
  };
  struct Shared {};
  static HYBRIDATTN_DEVICE void run(Shared&, Params const& p) {
    Index const n = simt::block_x(), c = simt::block_y() * threads + simt::thread_id();
    if (c < p.y.extent(1)) p.y(n, c) = p.table(p.tokens(n), c);
  }
};

// A block has up to 512 columns of a row v of the table, a thread every 128th of them. The warps look for the tokens that are v, 1024
// tokens at a time. Then each thread adds the rows of these tokens, in their order, to its sums. All blocks together take
// V ceil(C / 512) N / 32 ballots.
template <class T> struct EmbeddingBackward {
  static constexpr int threads = 128, own_columns = 4, columns = threads * own_columns;
  struct Params {
    View<std::int32_t const, 1> tokens;
    View<T const, 2> d_y;
    View<T, 2> d_table;
    Into into;
  };
  struct Shared {
    std::uint32_t found[32];   // bit l of word i: token 32 i + l of the 1024 tokens is v
  };
  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    T sums[own_columns];
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int k = 0; k < own_columns; ++k) sums[k] = p.into == Into::add && has(p, k) ? p.d_table(simt::block_x(), column(k)) : T(0);
    for (Index first = 0; first < p.tokens.extent(0); first += 1024) {
      find(shared, p, first);
      simt::sync_block();
      if (simt::any(shared.found[simt::lane()] != 0)) add_rows(shared, p, first, sums);
      simt::sync_block();
    }
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int k = 0; k < own_columns; ++k)
      if (has(p, k)) p.d_table(simt::block_x(), column(k)) = sums[k];
  }

 private:
  static HYBRIDATTN_DEVICE Index column(int k) { return simt::block_y() * columns + k * threads + simt::thread_id(); }
  static HYBRIDATTN_DEVICE bool has(Params const& p, int k) { return column(k) < p.d_table.extent(1); }
  static HYBRIDATTN_DEVICE void find(Shared& shared, Params const& p, Index first) {
    for (int word = simt::warp(); word < 32; word += threads / 32) {
      Index const n = first + 32 * word + simt::lane();
      std::uint32_t const found = simt::ballot(n < p.tokens.extent(0) && p.tokens(n) == simt::block_x());
      if (simt::lane() == 0) shared.found[word] = found;
    }
  }
  static HYBRIDATTN_DEVICE void add_rows(Shared const& shared, Params const& p, Index first, T (&sums)[own_columns]) {
    for (int word = 0; word < 32; ++word)
      for (std::uint32_t left = shared.found[word]; left != 0; left &= left - 1) {
        Index const n = first + 32 * word + simt::first_bit(left);
        HYBRIDATTN_UNROLL_IN_KERNEL
        for (int k = 0; k < own_columns; ++k)
          if (has(p, k)) sums[k] += p.d_y(n, column(k));
      }
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::gpu
#endif

// ==== hybridattn/ops/embedding/gpu.hpp
#ifndef HYBRIDATTN_OPS_EMBEDDING_GPU_HPP
#define HYBRIDATTN_OPS_EMBEDDING_GPU_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

template <GpuBackend B> struct On<Embedding, B> : InFloat<Embedding, B> {
  using InFloat<Embedding, B>::forward, InFloat<Embedding, B>::backward;
  template <std::floating_point T> static void forward(B& gpu, View<std::int32_t const, 1> tokens, View<T const, 2> table, View<T, 2> y) {
    using Forward = gpu::EmbeddingForward<T>;
    launch<Forward>(gpu, {.x = y.extent(0), .y = ceil_div(y.extent(1), Forward::threads)}, {tokens, table, y});
  }
  template <std::floating_point T>
  static void backward(B& gpu, View<std::int32_t const, 1> tokens, View<T const, 2> d_y, View<T, 2> d_table, Into into) {
    using Backward = gpu::EmbeddingBackward<T>;
    launch<Backward>(gpu, {.x = d_table.extent(0), .y = ceil_div(d_table.extent(1), Backward::columns)}, {tokens, d_y, d_table, into});
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/ops/gate/kernels.hpp
// Gates as kernels. A thread has an element.
#ifndef HYBRIDATTN_OPS_GATE_KERNELS_HPP
#define HYBRIDATTN_OPS_GATE_KERNELS_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::gpu {

template <class T> struct SwigluForward {
  View<T const, 1> gate, up;
  View<T, 1> y;
  HYBRIDATTN_HD void operator()(Index i) const { y(i) = up.empty() ? silu(gate(i)) : silu(gate(i)) * up(i); }
};

template <class T> struct SwigluBackward {
  View<T const, 1> gate, up, d_y;
  View<T, 1> d_gate, d_up;
  HYBRIDATTN_HD void operator()(Index i) const {
    T const x = gate(i), dy = d_y(i), wide = up.empty() ? T(1) : up(i);
    d_gate(i) = dy * wide * silu_slope(x);
    if (!up.empty()) d_up(i) = dy * silu(x);
  }
};

template <class T> struct SigmoidGateForward {
  View<T const, 1> x, z;
  View<T, 1> y;
  HYBRIDATTN_HD void operator()(Index i) const { y(i) = x(i) * sigmoid(z(i)); }
};

template <class T> struct SigmoidGateBackward {
  View<T const, 1> x, z, d_y;
  View<T, 1> d_x, d_z;
  HYBRIDATTN_HD void operator()(Index i) const {
    T const open = sigmoid(z(i)), dy = d_y(i), value = x(i);
    d_x(i) = dy * open;
    d_z(i) = dy * value * open * (T(1) - open);
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::gpu
#endif

// ==== hybridattn/ops/gate/gpu.hpp
#ifndef HYBRIDATTN_OPS_GATE_GPU_HPP
#define HYBRIDATTN_OPS_GATE_GPU_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

template <GpuBackend B> struct On<Swiglu, B> : InFloat<Swiglu, B> {
  using InFloat<Swiglu, B>::forward, InFloat<Swiglu, B>::backward;
  template <std::floating_point T> static void forward(B& gpu, View<T const, 1> gate, View<T const, 1> up, View<T, 1> y) {
    for_each(gpu, y.count(), gpu::SwigluForward<T>{gate, up, y});
  }
  template <std::floating_point T>
  static void backward(B& gpu, View<T const, 1> gate, View<T const, 1> up, View<T const, 1> d_y, View<T, 1> d_gate, View<T, 1> d_up) {
    for_each(gpu, d_y.count(), gpu::SwigluBackward<T>{gate, up, d_y, d_gate, d_up});
  }
};

template <GpuBackend B> struct On<SigmoidGate, B> : InFloat<SigmoidGate, B> {
  using InFloat<SigmoidGate, B>::forward, InFloat<SigmoidGate, B>::backward;
  template <std::floating_point T> static void forward(B& gpu, View<T const, 1> x, View<T const, 1> z, View<T, 1> y) {
    for_each(gpu, y.count(), gpu::SigmoidGateForward<T>{x, z, y});
  }
  template <std::floating_point T>
  static void backward(B& gpu, View<T const, 1> x, View<T const, 1> z, View<T const, 1> d_y, View<T, 1> d_x, View<T, 1> d_z) {
    for_each(gpu, d_y.count(), gpu::SigmoidGateBackward<T>{x, z, d_y, d_x, d_z});
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/ops/gdn_gate/kernels.hpp
// The gates of Gated DeltaNet as kernels.
#ifndef HYBRIDATTN_OPS_GDN_GATE_KERNELS_HPP
#define HYBRIDATTN_OPS_GDN_GATE_KERNELS_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::gpu {

// A thread has a head of a token.
template <class T> struct GdnGateForward {
  T range;
  View<T const, 2> a, b;
  View<T const, 1> a_log, dt_bias;
  View<T, 2> g, beta;
  HYBRIDATTN_HD void operator()(Index i) const {
    Index const n = i / a.extent(1), h = i % a.extent(1);
    g(n, h) = -std::exp(a_log(h)) * softplus(a(n, h) + dt_bias(h));
    beta(n, h) = range * sigmoid(b(n, h));
  }
};

// A block has sum_rows tokens and 32 heads, a thread one head of all these tokens.
template <class T> struct GdnGateBackward {
  static constexpr int threads = 32;
  struct Params {
    T range;
    View<T const, 2> a, b;
    View<T const, 1> a_log, dt_bias;
    View<T const, 2> d_g, d_beta;
    View<T, 2> d_a, d_b;
    View<T, 2> d_a_log, d_dt_bias;   // [blocks of tokens, HV]
  };
  struct Shared {};
  static HYBRIDATTN_DEVICE void run(Shared&, Params const& p) {
    Index const h = simt::block_y() * threads + simt::thread_id(), first = simt::block_x() * sum_rows;
    if (h >= p.a.extent(1)) return;
    T const rate = -std::exp(p.a_log(h)), bias = p.dt_bias(h);
    T d_rate = 0, d_bias = 0;
    for (Index n = first; n < simt::smaller(first + sum_rows, p.a.extent(0)); ++n) {
      T const shifted = p.a(n, h) + bias, open = sigmoid(p.b(n, h)), d_shifted = rate * sigmoid(shifted) * p.d_g(n, h);
      p.d_b(n, h) = p.range * open * (T(1) - open) * p.d_beta(n, h);
      d_rate += rate * softplus(shifted) * p.d_g(n, h);
      d_bias += d_shifted;
      p.d_a(n, h) = d_shifted;
    }
    p.d_a_log(simt::block_x(), h) = d_rate;
    p.d_dt_bias(simt::block_x(), h) = d_bias;
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::gpu
#endif

// ==== hybridattn/ops/gdn_gate/gpu.hpp
#ifndef HYBRIDATTN_OPS_GDN_GATE_GPU_HPP
#define HYBRIDATTN_OPS_GDN_GATE_GPU_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

template <GpuBackend B> struct On<GdnGate, B> : InFloat<GdnGate, B> {
  using InFloat<GdnGate, B>::forward, InFloat<GdnGate, B>::backward;
  template <std::floating_point T>
  static void forward(B& gpu, int range, View<T const, 2> a, View<T const, 2> b, Wide<In<T>, 1> a_log, Wide<In<T>, 1> dt_bias,
                      Wide<Out<T>, 2> g, Wide<Out<T>, 2> beta) {
    for_each(gpu, a.count(), gpu::GdnGateForward<T>{static_cast<T>(range), a, b, a_log, dt_bias, g, beta});
  }

  template <std::floating_point T>
  static void backward(B& gpu, int range, View<T const, 2> a, View<T const, 2> b, Wide<In<T>, 1> a_log, Wide<In<T>, 1> dt_bias,
                       Wide<In<T>, 2> d_g, Wide<In<T>, 2> d_beta, View<T, 2> d_a, View<T, 2> d_b, Wide<Out<T>, 1> d_a_log,
                       Wide<Out<T>, 1> d_dt_bias) {
    using Backward = gpu::GdnGateBackward<T>;
    Index const blocks = gpu::row_blocks(a.extent(0)), heads = a.extent(1);
    Tensor<T, 2, B> rate_parts{gpu, {blocks, heads}}, bias_parts{gpu, {blocks, heads}};
    launch<Backward>(gpu, {.x = blocks, .y = ceil_div(heads, Backward::threads)},
                     {static_cast<T>(range), a, b, a_log, dt_bias, d_g, d_beta, d_a, d_b, out(rate_parts), out(bias_parts)});
    for_each(gpu, heads, gpu::SumParts<T>{in(rate_parts), d_a_log});
    for_each(gpu, heads, gpu::SumParts<T>{in(bias_parts), d_dt_bias});
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/ops/grouped_linear/kernels.hpp
// Linear projections of experts as kernels. A block has a tile of one expert's product.
#ifndef HYBRIDATTN_OPS_GROUPED_LINEAR_KERNELS_HPP
#define HYBRIDATTN_OPS_GROUPED_LINEAR_KERNELS_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::gpu {

using ExpertOffsets = View<std::int32_t const, 1>;

template <class T> HYBRIDATTN_DEVICE View<T, 2> matrix_of(View<T, 3> all, Index expert) {
  return {all.data + expert * all.stride[0], {all.extent(1), all.extent(2)}, {all.stride[1], 1}};
}
template <class T> HYBRIDATTN_DEVICE View<T, 2> rows_of(View<T, 2> all, ExpertOffsets offsets, Index expert) {
  return {all.data + offsets(expert) * all.stride[0], {offsets(expert + 1) - offsets(expert), all.extent(1)}, all.stride};
}

// Tiles of rows, numbered for all experts: those of expert e begin at offsets[e] / size + e. So an expert has as many numbers as tiles or
// one more, and its first number needs no sum over the experts before it.
HYBRIDATTN_HD inline Index first_tile(ExpertOffsets offsets, Index expert, int size) { return offsets(expert) / size + expert; }
inline Index most_tiles(Index experts, Index rows, int size) { return rows / size + experts; }
HYBRIDATTN_DEVICE Index expert_of(ExpertOffsets offsets, Index tile, int size) {
  Index first = 0, last = offsets.extent(0) - 1;
  while (last - first > 1) {
    Index const middle = (first + last) / 2;
    if (first_tile(offsets, middle, size) <= tile) first = middle;
    else last = middle;
  }
  return first;
}

// y = x m for each expert's rows and its m: w[e] transposed, or w[e].
template <class T, int size> struct MultiplyRows {
  using Tile = ProductTile<T, size>;
  static constexpr int threads = Tile::threads;
  struct Params {
    ExpertOffsets offsets;
    View<T const, 2> x;
    View<T const, 3> w;
    View<T, 2> y;
    bool transposes;
    Into into;
  };
  using Shared = typename Tile::Shared;
  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    Index const expert = expert_of(p.offsets, simt::block_x(), size);
    Index const row = (simt::block_x() - first_tile(p.offsets, expert, size)) * size;
    if (row >= p.offsets(expert + 1) - p.offsets(expert)) return;
    Operand<T> const w = operand(matrix_of(p.w, expert));
    Product<T> const product{operand(rows_of(p.x, p.offsets, expert)), p.transposes ? w.transposed() : w, rows_of(p.y, p.offsets, expert),
                             p.into};
    Tile::multiply(shared, product, row, simt::block_y() * size);
  }
};

// d_w[e] = d_y^T x over the rows of e; 0 without rows.
template <class T, int size> struct MultiplyOverRows {
  using Tile = ProductTile<T, size>;
  static constexpr int threads = Tile::threads;
  struct Params {
    ExpertOffsets offsets;
    View<T const, 2> x, d_y;
    View<T, 3> d_w;
  };
  using Shared = typename Tile::Shared;
  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    Index const expert = simt::block_z();
    Product<T> const product{operand(rows_of(p.d_y, p.offsets, expert)).transposed(), operand(rows_of(p.x, p.offsets, expert)),
                             matrix_of(p.d_w, expert), Into::overwrite};
    Tile::multiply(shared, product, simt::block_x() * size, simt::block_y() * size);
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::gpu
#endif

// ==== hybridattn/ops/grouped_linear/gpu.hpp
#ifndef HYBRIDATTN_OPS_GROUPED_LINEAR_GPU_HPP
#define HYBRIDATTN_OPS_GROUPED_LINEAR_GPU_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

template <GpuBackend B> struct On<GroupedLinear, B> : InFloat<GroupedLinear, B> {
  using InFloat<GroupedLinear, B>::forward, InFloat<GroupedLinear, B>::backward;
  using Offsets = View<std::int32_t const, 1>;

  template <std::floating_point T> static void forward(B& gpu, Offsets offsets, View<T const, 2> x, View<T const, 3> w, View<T, 2> y) {
    multiply_rows<T>(gpu, offsets, x, w, y, true, Into::overwrite);
  }
  template <std::floating_point T>
  static void backward(B& gpu, Offsets offsets, View<T const, 2> x, View<T const, 3> w, View<T const, 2> d_y, View<T, 2> d_x,
                       View<T, 3> d_w, Into into) {
    if (!d_x.empty()) multiply_rows<T>(gpu, offsets, d_y, w, d_x, false, into);
    if (!d_w.empty()) multiply_over_rows<T>(gpu, offsets, x, d_y, d_w);
  }

 private:
  // The host cannot read how the rows are shared out, so the grid has the most tiles that they can make. Blocks without a tile return.
  template <class T>
  static void multiply_rows(B& gpu, Offsets offsets, View<T const, 2> x, View<T const, 3> w, View<T, 2> y, bool transposes, Into into) {
    if (y.empty()) return;
    gpu::with_tile(1, y.extent(0), y.extent(1), [&](auto size) {
      Grid const grid{.x = gpu::most_tiles(w.extent(0), y.extent(0), size()), .y = ceil_div(y.extent(1), size())};
      launch<gpu::MultiplyRows<T, size()>>(gpu, grid, {offsets, x, w, y, transposes, into});
    });
  }
  template <class T> static void multiply_over_rows(B& gpu, Offsets offsets, View<T const, 2> x, View<T const, 2> d_y, View<T, 3> d_w) {
    Index const E = d_w.extent(0), F = d_w.extent(1), C = d_w.extent(2);
    gpu::with_tile(E, F, C, [&](auto size) {
      Grid const grid{.x = ceil_div(F, size()), .y = ceil_div(C, size()), .z = E};
      launch<gpu::MultiplyOverRows<T, size()>>(gpu, grid, {offsets, x, d_y, d_w});
    });
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/ops/l2_norm/kernels.hpp
// L2Norm as kernels. A warp has a row: lane l has the elements l, l + 32, ...
#ifndef HYBRIDATTN_OPS_L2_NORM_KERNELS_HPP
#define HYBRIDATTN_OPS_L2_NORM_KERNELS_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::gpu {

template <class T> HYBRIDATTN_DEVICE T inverse_norm(View<T const, 2> x, Index n) {
  T squares = 0;
  for (Index c = simt::lane(); c < x.extent(1); c += 32) squares += x(n, c) * x(n, c);
  return T(1) / std::sqrt(simt::sum_lanes(squares) + static_cast<T>(L2Norm::eps));
}

template <class T> struct L2NormForward {
  static constexpr int threads = 128;
  struct Params {
    View<T const, 2> x;
    View<T, 2> y;
  };
  struct Shared {};
  static HYBRIDATTN_DEVICE void run(Shared&, Params const& p) {
    Index const n = simt::block_x() * (threads / 32) + simt::warp();
    if (n >= p.x.extent(0)) return;
    T const rnorm = inverse_norm(p.x, n);
    for (Index c = simt::lane(); c < p.x.extent(1); c += 32) p.y(n, c) = p.x(n, c) * rnorm;
  }
};

template <class T> struct L2NormBackward {
  static constexpr int threads = 128;
  struct Params {
    View<T const, 2> x, d_y;
    View<T, 2> d_x;
  };
  struct Shared {};
  static HYBRIDATTN_DEVICE void run(Shared&, Params const& p) {
    Index const n = simt::block_x() * (threads / 32) + simt::warp(), C = p.x.extent(1);
    if (n >= p.x.extent(0)) return;
    T const rnorm = inverse_norm(p.x, n);
    T along = 0;
    for (Index c = simt::lane(); c < C; c += 32) along += p.x(n, c) * p.d_y(n, c);
    along = simt::sum_lanes(along) * rnorm;
    for (Index c = simt::lane(); c < C; c += 32) p.d_x(n, c) = rnorm * (p.d_y(n, c) - p.x(n, c) * rnorm * along);
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::gpu
#endif

// ==== hybridattn/ops/l2_norm/gpu.hpp
#ifndef HYBRIDATTN_OPS_L2_NORM_GPU_HPP
#define HYBRIDATTN_OPS_L2_NORM_GPU_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

template <GpuBackend B> struct On<L2Norm, B> : InFloat<L2Norm, B> {
  using InFloat<L2Norm, B>::forward, InFloat<L2Norm, B>::backward;
  template <std::floating_point T> static void forward(B& gpu, View<T const, 2> x, View<T, 2> y) {
    launch<gpu::L2NormForward<T>>(gpu, {.x = ceil_div(x.extent(0), gpu::L2NormForward<T>::threads / 32)}, {x, y});
  }
  template <std::floating_point T> static void backward(B& gpu, View<T const, 2> x, View<T const, 2> d_y, View<T, 2> d_x) {
    launch<gpu::L2NormBackward<T>>(gpu, {.x = ceil_div(x.extent(0), gpu::L2NormBackward<T>::threads / 32)}, {x, d_y, d_x});
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/ops/layer_norm/kernels.hpp
// LayerNorm as kernels. A warp has a row: lane l has the elements l, l + 32, ...
#ifndef HYBRIDATTN_OPS_LAYER_NORM_KERNELS_HPP
#define HYBRIDATTN_OPS_LAYER_NORM_KERNELS_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::gpu {

template <class T> struct LayerNormMoments {
  T mean, rstd;
};
// Of row n, for all lanes.
template <class T> HYBRIDATTN_DEVICE LayerNormMoments<T> layer_norm_moments(View<T const, 2> x, Index n, T eps) {
  T const C = static_cast<T>(x.extent(1));
  T sum = 0, squares = 0;
  for (Index c = simt::lane(); c < x.extent(1); c += 32) sum += x(n, c);
  T const mean = simt::sum_lanes(sum) / C;
  for (Index c = simt::lane(); c < x.extent(1); c += 32) squares += (x(n, c) - mean) * (x(n, c) - mean);
  return {mean, T(1) / std::sqrt(simt::sum_lanes(squares) / C + eps)};
}

template <class T> struct LayerNormForward {
  static constexpr int threads = 128;
  struct Params {
    View<T const, 2> x;
    View<T const, 1> w, b;
    View<T, 2> y;
    T eps;
  };
  struct Shared {};
  static HYBRIDATTN_DEVICE void run(Shared&, Params const& p) {
    Index const n = simt::block_x() * (threads / 32) + simt::warp();
    if (n >= p.x.extent(0)) return;
    auto const [mean, rstd] = layer_norm_moments(p.x, n, p.eps);
    for (Index c = simt::lane(); c < p.x.extent(1); c += 32) p.y(n, c) = (p.x(n, c) - mean) * rstd * p.w(c) + p.b(c);
  }
};

// A block has sum_rows rows: first each warp some of them, for d_x; then each thread its columns of all, for d_w and d_b.
template <class T> struct LayerNormBackward {
  static constexpr int threads = 128;
  struct Params {
    View<T const, 2> x;
    View<T const, 1> w;
    View<T const, 2> d_y;
    View<T, 2> d_x;
    View<T, 2> d_w, d_b;   // [blocks of rows, C]
    T eps;
  };
  struct Shared {
    LayerNormMoments<T> of_rows[sum_rows];
  };
  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    Index const first = simt::block_x() * sum_rows, rows = simt::smaller(sum_rows, p.x.extent(0) - first);
    for (Index r = simt::warp(); r < rows; r += threads / 32) {
      LayerNormMoments<T> const moments = layer_norm_moments(p.x, first + r, p.eps);
      if (simt::lane() == 0) shared.of_rows[r] = moments;
      write_row(p, first + r, moments);
    }
    simt::sync_block();
    for (Index c = simt::thread_id(); c < p.x.extent(1); c += threads) {
      T d_w = 0, d_b = 0;
      for (Index r = 0; r < rows; ++r) {
        auto const [mean, rstd] = shared.of_rows[r];
        d_w += p.d_y(first + r, c) * (p.x(first + r, c) - mean) * rstd;
        d_b += p.d_y(first + r, c);
      }
      p.d_w(simt::block_x(), c) = d_w;
      p.d_b(simt::block_x(), c) = d_b;
    }
  }

 private:
  static HYBRIDATTN_DEVICE void write_row(Params const& p, Index n, LayerNormMoments<T> moments) {
    auto const [mean, rstd] = moments;
    T const C = static_cast<T>(p.x.extent(1));
    T g_sum = 0, along = 0;
    for (Index c = simt::lane(); c < p.x.extent(1); c += 32) {
      T const g = p.d_y(n, c) * p.w(c);
      g_sum += g;
      along += g * (p.x(n, c) - mean) * rstd;
    }
    T const g_mean = simt::sum_lanes(g_sum) / C;
    along = simt::sum_lanes(along) / C;
    for (Index c = simt::lane(); c < p.x.extent(1); c += 32)
      p.d_x(n, c) = rstd * (p.d_y(n, c) * p.w(c) - g_mean - (p.x(n, c) - mean) * rstd * along);
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::gpu
#endif

// ==== hybridattn/ops/layer_norm/gpu.hpp
#ifndef HYBRIDATTN_OPS_LAYER_NORM_GPU_HPP
#define HYBRIDATTN_OPS_LAYER_NORM_GPU_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

template <GpuBackend B> struct On<LayerNorm, B> : InFloat<LayerNorm, B> {
  using InFloat<LayerNorm, B>::forward, InFloat<LayerNorm, B>::backward;
  template <std::floating_point T> static void forward(B& gpu, double eps, View<T const, 2> x, Wide<In<T>, 1> w, Wide<In<T>, 1> b,
                                                       View<T, 2> y) {
    using Forward = gpu::LayerNormForward<T>;
    launch<Forward>(gpu, {.x = ceil_div(x.extent(0), Forward::threads / 32)}, {x, w, b, y, static_cast<T>(eps)});
  }
  template <std::floating_point T>
  static void backward(B& gpu, double eps, View<T const, 2> x, Wide<In<T>, 1> w, View<T const, 2> d_y, View<T, 2> d_x, Wide<Out<T>, 1> d_w,
                       Wide<Out<T>, 1> d_b) {
    Index const blocks = gpu::row_blocks(x.extent(0)), C = x.extent(1);
    Tensor<T, 2, B> w_parts{gpu, {blocks, C}}, b_parts{gpu, {blocks, C}};
    launch<gpu::LayerNormBackward<T>>(gpu, {.x = blocks}, {x, w, d_y, d_x, out(w_parts), out(b_parts), static_cast<T>(eps)});
    for_each(gpu, C, gpu::SumParts<T>{in(w_parts), d_w});
    for_each(gpu, C, gpu::SumParts<T>{in(b_parts), d_b});
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/ops/linear/gpu.hpp
#ifndef HYBRIDATTN_OPS_LINEAR_GPU_HPP
#define HYBRIDATTN_OPS_LINEAR_GPU_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

template <GpuBackend B> struct On<Linear, B> : InFloat<Linear, B> {
  using InFloat<Linear, B>::forward, InFloat<Linear, B>::backward;
  template <std::floating_point T> static void forward(B& gpu, View<T const, 2> x, View<T const, 2> w, View<T, 2> y) {
    gpu::gemm<T>(gpu, operand(x), operand(w).transposed(), y);
  }
  template <std::floating_point T>
  static void backward(B& gpu, View<T const, 2> x, View<T const, 2> w, View<T const, 2> d_y, View<T, 2> d_x, View<T, 2> d_w, Into into) {
    if (!d_x.empty()) gpu::gemm<T>(gpu, operand(d_y), operand(w), d_x, into);
    if (!d_w.empty()) gpu::gemm<T>(gpu, operand(d_y).transposed(), operand(x), d_w);
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/backend/gpu/rows.hpp
// Work on rows, a warp for each.
#ifndef HYBRIDATTN_BACKEND_GPU_ROWS_HPP
#define HYBRIDATTN_BACKEND_GPU_ROWS_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {
namespace gpu {

template <class F> struct ForEachRow {
  static constexpr int threads = 128;
  struct Params {
    F f;
    Index rows;
  };
  struct Shared {};
  static HYBRIDATTN_DEVICE void run(Shared&, Params const& p) {
    Index const n = simt::block_x() * (threads / 32) + simt::warp();
    if (n < p.rows) p.f(n);
  }
};

}  // namespace gpu

// Calls f(n) for n = 0 .. rows - 1, each by all lanes of a warp. F is a struct of views and numbers with operator()(Index) const,
// HYBRIDATTN_DEVICE.
template <GpuBackend B, class F> void for_each_row(B& gpu, Index rows, F f) {
  launch<gpu::ForEachRow<F>>(gpu, {.x = ceil_div(rows, gpu::ForEachRow<F>::threads / 32)}, {f, rows});
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/ops/moe/kernels.hpp
// Mixtures of experts as kernels. A warp has a row, lane l its elements l, l + 32, ...
#ifndef HYBRIDATTN_OPS_MOE_KERNELS_HPP
#define HYBRIDATTN_OPS_MOE_KERNELS_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::gpu {

// An expert with its logit. Higher logits come first, the smaller index of equal ones first, and a NaN is as low as -infinity.
template <class T> struct RankedExpert {
  T logit;
  std::int32_t expert;

  HYBRIDATTN_DEVICE bool comes_before(RankedExpert const& other) const {
    return logit > other.logit || (logit == other.logit && expert < other.expert);
  }
};

template <class T> struct RouteRow {
  Route::Options options;
  View<T const, 2> logits;
  View<T, 2> probabilities, weights;
  View<std::int32_t, 2> experts;

  HYBRIDATTN_DEVICE void operator()(Index n) const {
    choose(n);
    simt::sync_warp();   // every lane sees the choices
    write_softmax(n, logits(n, experts(n, 0)));
    simt::sync_warp();   // and the probabilities
    Index const k = experts.extent(1);
    T sum = 0;
    for (Index j = simt::lane(); j < k; j += 32) sum += probabilities(n, experts(n, j));
    sum = options.renormalise ? simt::sum_lanes(sum) : T(1);
    for (Index j = simt::lane(); j < k; j += 32) weights(n, j) = probabilities(n, experts(n, j)) / sum;
  }

 private:
  // Each choice is the first expert that comes after the choice before it.
  HYBRIDATTN_DEVICE void choose(Index n) const {
    RankedExpert<T> last{simt::infinity<T>(), -1};
    for (Index j = 0; j < experts.extent(1); ++j) {
      last = first_after(n, last);
      if (simt::lane() == 0) experts(n, j) = last.expert;
    }
  }
  HYBRIDATTN_DEVICE RankedExpert<T> first_after(Index n, RankedExpert<T> last) const {
    auto const E = static_cast<std::int32_t>(logits.extent(1));
    RankedExpert<T> best{-simt::infinity<T>(), E};
    for (std::int32_t e = simt::lane(); e < E; e += 32) {
      T const logit = logits(n, e);
      RankedExpert<T> const next{logit == logit ? logit : -simt::infinity<T>(), e};
      if (last.comes_before(next) && next.comes_before(best)) best = next;
    }
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int step = 1; step < 32; step *= 2) {
      RankedExpert<T> const other{simt::shuffle_xor(best.logit, step), simt::shuffle_xor(best.expert, step)};
      if (other.comes_before(best)) best = other;
    }
    return best;
  }
  HYBRIDATTN_DEVICE void write_softmax(Index n, T peak) const {
    T sum = 0;
    for (Index e = simt::lane(); e < logits.extent(1); e += 32) sum += probabilities(n, e) = std::exp(logits(n, e) - peak);
    sum = simt::sum_lanes(sum);
    for (Index e = simt::lane(); e < logits.extent(1); e += 32) probabilities(n, e) /= sum;
  }
};

template <class T> struct RouteRowGradients {
  Route::Options options;
  View<T const, 2> probabilities, weights;
  View<std::int32_t const, 2> experts;
  View<T const, 2> d_weights;
  View<T const, 1> d_probability;
  View<T, 2> d_logits;

  HYBRIDATTN_DEVICE void operator()(Index n) const {
    Index const E = probabilities.extent(1), k = experts.extent(1);
    T along = 0, along_chosen = 0;   // of the softmax over all, over the chosen
    for (Index e = simt::lane(); e < E && !d_probability.empty(); e += 32) along += probabilities(n, e) * d_probability(e);
    for (Index j = simt::lane(); j < k; j += 32) along_chosen += weights(n, j) * d_weights(n, j);
    along = simt::sum_lanes(options.renormalise ? along : along + along_chosen);
    along_chosen = options.renormalise ? simt::sum_lanes(along_chosen) : T(0);
    for (Index e = simt::lane(); e < E; e += 32)
      d_logits(n, e) = probabilities(n, e) * ((d_probability.empty() ? T(0) : d_probability(e)) - along);
    simt::sync_warp();   // another lane may have written a chosen expert's
    for (Index j = simt::lane(); j < k; j += 32) d_logits(n, experts(n, j)) += weights(n, j) * (d_weights(n, j) - along_chosen);
  }
};

// x[i] becomes the sum of the elements before it. Returns the sum of all.
HYBRIDATTN_DEVICE std::int32_t sum_before(std::int32_t* x, Index count) {
  std::int32_t total = 0;
  for (Index first = 0; first < count; first += 32) {
    Index const i = first + simt::lane();
    std::int32_t const own = i < count ? x[i] : 0;
    std::int32_t sum = own;
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int step = 1; step < 32; step *= 2) {
      std::int32_t const lower = simt::shuffle_up(sum, step);
      sum += simt::lane() >= step ? lower : 0;
    }
    if (i < count) x[i] = total + sum - own;
    total += simt::shuffle(sum, 31);
  }
  return total;
}

// Permute sorts by counting. The choices, in the order of tokens, are cut into parts of `part_size`, and counts [E, parts] says how many
// choices of a part are for an expert. From the counts follows where the rows of each part and expert begin.
inline constexpr Index part_size = 128;

struct CountChoices {
  View<std::int32_t const, 2> experts;
  View<std::int32_t, 2> counts;   // 0 before
  HYBRIDATTN_DEVICE void operator()(Index i) const {
    Index const k = experts.extent(1);
    simt::atomic_add(&counts(experts(i / k, i % k), i / part_size), 1);
  }
};
// counts of an expert become how many of its rows are before a part's; offsets[e] becomes how many rows it has.
struct StartParts {
  View<std::int32_t, 2> counts;
  View<std::int32_t, 1> offsets;
  HYBRIDATTN_DEVICE void operator()(Index e) const {
    std::int32_t const rows = sum_before(counts.row(e), counts.extent(1));
    if (simt::lane() == 0) offsets(e) = rows;
  }
};
struct StartExperts {
  View<std::int32_t, 1> offsets;
  HYBRIDATTN_DEVICE void operator()(Index) const {
    Index const E = offsets.extent(0) - 1;
    std::int32_t const rows = sum_before(offsets.data, E);
    if (simt::lane() == 0) offsets(E) = rows;
  }
};
// A warp has a part. 32 choices at a time take the next rows of their experts.
struct PlaceChoices {
  View<std::int32_t const, 2> experts;
  View<std::int32_t const, 1> offsets;
  View<std::int32_t, 2> counts, places;
  HYBRIDATTN_DEVICE void operator()(Index part) const {
    Index const k = experts.extent(1), end = simt::smaller((part + 1) * part_size, experts.extent(0) * k);
    for (Index first = part * part_size; first < end; first += 32) {
      Index const i = first + simt::lane();
      std::int32_t const expert = i < end ? experts(i / k, i % k) : -1;
      std::uint32_t const same = simt::match_any(expert), before = same & ((1u << simt::lane()) - 1);
      std::int32_t const taken = i < end ? counts(expert, part) : 0;
      simt::sync_warp();   // every lane has read the count
      if (i < end) places(i / k, i % k) = offsets(expert) + taken + ones(before);
      if (i < end && before == 0) counts(expert, part) = taken + ones(same);
      simt::sync_warp();
    }
  }

 private:
  static HYBRIDATTN_DEVICE std::int32_t ones(std::uint32_t bits) {
    std::int32_t count = 0;
    for (; bits != 0; bits &= bits - 1) ++count;
    return count;
  }
};

template <class T> struct DistributeRow {
  View<T const, 2> x;
  View<std::int32_t const, 2> places;
  View<T, 2> rows;
  HYBRIDATTN_DEVICE void operator()(Index n) const {
    for (Index c = simt::lane(); c < x.extent(1); c += 32) {
      T const own = x(n, c);
      for (Index j = 0; j < places.extent(1); ++j) rows(places(n, j), c) = own;
    }
  }
};
template <class T> struct CollectRow {
  View<std::int32_t const, 2> places;
  View<T const, 2> d_rows;
  View<T, 2> d_x;
  Into into;
  HYBRIDATTN_DEVICE void operator()(Index n) const {
    for (Index c = simt::lane(); c < d_x.extent(1); c += 32) {
      T sum = into == Into::add ? d_x(n, c) : T(0);
      for (Index j = 0; j < places.extent(1); ++j) sum += d_rows(places(n, j), c);
      d_x(n, c) = sum;
    }
  }
};

template <class T> struct CombineRow {
  View<T const, 2> rows, weights;
  View<std::int32_t const, 2> places;
  View<T, 2> y;
  HYBRIDATTN_DEVICE void operator()(Index n) const {
    for (Index c = simt::lane(); c < y.extent(1); c += 32) {
      T sum = 0;
      for (Index j = 0; j < places.extent(1); ++j) sum += weights(n, j) * rows(places(n, j), c);
      y(n, c) = sum;
    }
  }
};
// A warp has a choice.
template <class T> struct CombineChoiceGradients {
  View<T const, 2> rows, weights;
  View<std::int32_t const, 2> places;
  View<T const, 2> d_y;
  View<T, 2> d_rows, d_weights;
  HYBRIDATTN_DEVICE void operator()(Index choice) const {
    Index const n = choice / places.extent(1), j = choice % places.extent(1), row = places(n, j);
    T const weight = weights(n, j);
    T sum = 0;
    for (Index c = simt::lane(); c < d_y.extent(1); c += 32) {
      sum += d_y(n, c) * rows(row, c);
      d_rows(row, c) = weight * d_y(n, c);
    }
    sum = simt::sum_lanes(sum);
    if (simt::lane() == 0) d_weights(n, j) = sum;
  }
};

template <class T> struct AddGatedRow {
  View<T const, 2> x, logit;
  View<T, 2> y;
  HYBRIDATTN_DEVICE void operator()(Index n) const {
    T const open = sigmoid(logit(n, 0));
    for (Index c = simt::lane(); c < y.extent(1); c += 32) y(n, c) += open * x(n, c);
  }
};
template <class T> struct AddGatedRowGradients {
  View<T const, 2> x, logit, d_y;
  View<T, 2> d_x, d_logit;
  HYBRIDATTN_DEVICE void operator()(Index n) const {
    T const open = sigmoid(logit(n, 0));
    T along = 0;
    for (Index c = simt::lane(); c < d_y.extent(1); c += 32) {
      along += x(n, c) * d_y(n, c);
      d_x(n, c) = open * d_y(n, c);
    }
    along = simt::sum_lanes(along);
    if (simt::lane() == 0) d_logit(n, 0) = open * (T(1) - open) * along;
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::gpu
#endif

// ==== hybridattn/ops/moe/gpu.hpp
#ifndef HYBRIDATTN_OPS_MOE_GPU_HPP
#define HYBRIDATTN_OPS_MOE_GPU_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

template <GpuBackend B> struct On<Route, B> : InFloat<Route, B> {
  using InFloat<Route, B>::forward, InFloat<Route, B>::backward;
  template <std::floating_point T>
  static void forward(B& gpu, Route::Options o, View<T const, 2> logits, View<T, 2> probabilities, View<T, 2> weights,
                      View<std::int32_t, 2> experts) {
    for_each_row(gpu, logits.extent(0), gpu::RouteRow<T>{o, logits, probabilities, weights, experts});
  }
  template <std::floating_point T>
  static void backward(B& gpu, Route::Options o, View<T const, 2> probabilities, View<T const, 2> weights,
                       View<std::int32_t const, 2> experts, View<T const, 2> d_weights, View<T const, 1> d_probability,
                       View<T, 2> d_logits) {
    for_each_row(gpu, probabilities.extent(0),
                 gpu::RouteRowGradients<T>{o, probabilities, weights, experts, d_weights, d_probability, d_logits});
  }
};

template <GpuBackend B> struct On<Permute, B> {
  static void forward(B& gpu, View<std::int32_t const, 2> experts, View<std::int32_t, 1> offsets, View<std::int32_t, 2> places) {
    Index const E = offsets.extent(0) - 1, choices = experts.count(), parts = ceil_div(choices, gpu::part_size);
    Tensor<std::int32_t, 2, B> counts{gpu, {E, parts}};
    if (counts.byte_count() > 0) gpu.fill(out(counts).data, std::byte{0}, counts.byte_count());
    for_each(gpu, choices, gpu::CountChoices{experts, out(counts)});
    for_each_row(gpu, E, gpu::StartParts{out(counts), offsets});
    for_each_row(gpu, 1, gpu::StartExperts{offsets});
    for_each_row(gpu, parts, gpu::PlaceChoices{experts, offsets, out(counts), places});
  }
};

template <GpuBackend B> struct On<Distribute, B> : InFloat<Distribute, B> {
  using InFloat<Distribute, B>::forward, InFloat<Distribute, B>::backward;
  template <std::floating_point T> static void forward(B& gpu, View<T const, 2> x, View<std::int32_t const, 2> places, View<T, 2> rows) {
    for_each_row(gpu, x.extent(0), gpu::DistributeRow<T>{x, places, rows});
  }
  template <std::floating_point T> static void backward(B& gpu, View<std::int32_t const, 2> places, View<T const, 2> d_rows, View<T, 2> d_x,
                                                        Into into) {
    for_each_row(gpu, d_x.extent(0), gpu::CollectRow<T>{places, d_rows, d_x, into});
  }
};

template <GpuBackend B> struct On<Combine, B> : InFloat<Combine, B> {
  using InFloat<Combine, B>::forward, InFloat<Combine, B>::backward;
  template <std::floating_point T>
  static void forward(B& gpu, View<T const, 2> rows, Wide<In<T>, 2> weights, View<std::int32_t const, 2> places, View<T, 2> y) {
    for_each_row(gpu, y.extent(0), gpu::CombineRow<T>{rows, weights, places, y});
  }
  template <std::floating_point T>
  static void backward(B& gpu, View<T const, 2> rows, Wide<In<T>, 2> weights, View<std::int32_t const, 2> places, View<T const, 2> d_y,
                       View<T, 2> d_rows, Wide<Out<T>, 2> d_weights) {
    for_each_row(gpu, places.count(), gpu::CombineChoiceGradients<T>{rows, weights, places, d_y, d_rows, d_weights});
  }
};

template <GpuBackend B> struct On<AddGated, B> : InFloat<AddGated, B> {
  using InFloat<AddGated, B>::forward, InFloat<AddGated, B>::backward;
  template <std::floating_point T> static void forward(B& gpu, View<T const, 2> x, View<T const, 2> logit, View<T, 2> y) {
    for_each_row(gpu, y.extent(0), gpu::AddGatedRow<T>{x, logit, y});
  }
  template <std::floating_point T>
  static void backward(B& gpu, View<T const, 2> x, View<T const, 2> logit, View<T const, 2> d_y, View<T, 2> d_x, View<T, 2> d_logit) {
    for_each_row(gpu, d_y.extent(0), gpu::AddGatedRowGradients<T>{x, logit, d_y, d_x, d_logit});
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/ops/rms_norm/kernels.hpp
// RMSNorm as kernels. A warp has a row: lane l has the elements l, l + 32, ...
#ifndef HYBRIDATTN_OPS_RMS_NORM_KERNELS_HPP
#define HYBRIDATTN_OPS_RMS_NORM_KERNELS_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::gpu {

// The gate z of GatedRmsNorm is empty in RmsNorm.
template <class T> struct RmsNormParams {
  View<T const, 2> x, z;
  View<T const, 1> w;
  View<T, 2> y;
  T shift, eps;   // shift: 1 + w is the weight
};
template <class T> struct RmsNormGradients {
  RmsNormParams<T> forward;
  View<T const, 2> d_y;
  View<T, 2> d_x, d_z;
  View<T, 2> d_w;   // [blocks of rows, C]
  Into into;        // d_x
};

template <class T> HYBRIDATTN_DEVICE T row_rstd(RmsNormParams<T> const& p, Index n) {
  T squares = 0;
  for (Index c = simt::lane(); c < p.x.extent(1); c += 32) squares += p.x(n, c) * p.x(n, c);
  return T(1) / std::sqrt(simt::sum_lanes(squares) / static_cast<T>(p.x.extent(1)) + p.eps);
}

template <class T> struct RmsNormForward {
  static constexpr int threads = 128;
  using Params = RmsNormParams<T>;
  struct Shared {};
  static HYBRIDATTN_DEVICE void run(Shared&, Params const& p) {
    Index const n = simt::block_x() * (threads / 32) + simt::warp();
    if (n >= p.x.extent(0)) return;
    T const rstd = row_rstd(p, n);
    for (Index c = simt::lane(); c < p.x.extent(1); c += 32) {
      T const normed = p.x(n, c) * rstd * (p.shift + p.w(c));
      p.y(n, c) = p.z.empty() ? normed : normed * silu(p.z(n, c));
    }
  }
};

// A block has sum_rows rows: first each warp some of them, for d_x and d_z; then each thread its columns of all, for d_w.
template <class T> struct RmsNormBackward {
  static constexpr int threads = 128;
  using Params = RmsNormGradients<T>;
  struct Shared {
    T rstd[sum_rows];
  };
  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    Index const first = simt::block_x() * sum_rows, rows = simt::smaller(sum_rows, p.forward.x.extent(0) - first);
    for (Index r = simt::warp(); r < rows; r += threads / 32) {
      T const rstd = row_rstd(p.forward, first + r);
      if (simt::lane() == 0) shared.rstd[r] = rstd;
    }
    simt::sync_block();
    for (Index c = simt::thread_id(); c < p.forward.x.extent(1); c += threads) {
      T sum = 0;
      for (Index r = 0; r < rows; ++r) sum += d_normed(p, first + r, c) * p.forward.x(first + r, c) * shared.rstd[r];
      p.d_w(simt::block_x(), c) = sum;
    }
    for (Index r = simt::warp(); r < rows; r += threads / 32) write_row(p, first + r, shared.rstd[r]);
  }

 private:
  // The gradient of x rstd w, before the gate.
  static HYBRIDATTN_DEVICE T d_normed(Params const& p, Index n, Index c) {
    return p.forward.z.empty() ? p.d_y(n, c) : p.d_y(n, c) * silu(p.forward.z(n, c));
  }
  static HYBRIDATTN_DEVICE void write_row(Params const& p, Index n, T rstd) {
    auto const& [x, z, w, y, shift, eps] = p.forward;
    T along = 0;
    for (Index c = simt::lane(); c < x.extent(1); c += 32) along += d_normed(p, n, c) * (shift + w(c)) * x(n, c);
    along = simt::sum_lanes(along) * rstd / static_cast<T>(x.extent(1));
    for (Index c = simt::lane(); c < x.extent(1); c += 32) {
      T const xh = x(n, c) * rstd, weight = shift + w(c), dy = p.d_y(n, c), before = p.into == Into::add ? p.d_x(n, c) : T(0);
      T const d_x = before + rstd * (d_normed(p, n, c) * weight - xh * along);
      if (!z.empty()) p.d_z(n, c) = dy * xh * weight * silu_slope(z(n, c));
      p.d_x(n, c) = d_x;
    }
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::gpu
#endif

// ==== hybridattn/ops/rms_norm/gpu.hpp
#ifndef HYBRIDATTN_OPS_RMS_NORM_GPU_HPP
#define HYBRIDATTN_OPS_RMS_NORM_GPU_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {
namespace gpu {

template <class T, GpuBackend B> void rms_norm(B& gpu, RmsNormParams<T> const& p) {
  launch<RmsNormForward<T>>(gpu, {.x = ceil_div(p.x.extent(0), RmsNormForward<T>::threads / 32)}, p);
}
template <class T, GpuBackend B> void rms_norm_gradients(B& gpu, RmsNormGradients<T> p, Wide<Out<T>, 1> d_w) {
  Tensor<T, 2, B> parts{gpu, {row_blocks(p.forward.x.extent(0)), d_w.extent(0)}};
  p.d_w = out(parts);
  launch<RmsNormBackward<T>>(gpu, {.x = parts.shape()[0]}, p);
  for_each(gpu, d_w.extent(0), SumParts<T>{in(parts), d_w});
}
template <class T> T shift_of(RmsNorm::Options const& o) { return o.weight == NormWeight::zero_centred ? T(1) : T(0); }

}  // namespace gpu

template <GpuBackend B> struct On<RmsNorm, B> : InFloat<RmsNorm, B> {
  using InFloat<RmsNorm, B>::forward, InFloat<RmsNorm, B>::backward;
  template <std::floating_point T> static void forward(B& gpu, RmsNorm::Options o, View<T const, 2> x, Wide<In<T>, 1> w, View<T, 2> y) {
    gpu::rms_norm<T>(gpu, {x, {}, w, y, gpu::shift_of<T>(o), static_cast<T>(o.eps)});
  }
  template <std::floating_point T>
  static void backward(B& gpu, RmsNorm::Options o, View<T const, 2> x, Wide<In<T>, 1> w, View<T const, 2> d_y, View<T, 2> d_x,
                       Wide<Out<T>, 1> d_w, Into into) {
    gpu::rms_norm_gradients<T>(gpu, {{x, {}, w, {}, gpu::shift_of<T>(o), static_cast<T>(o.eps)}, d_y, d_x, {}, {}, into}, d_w);
  }
};

template <GpuBackend B> struct On<GatedRmsNorm, B> : InFloat<GatedRmsNorm, B> {
  using InFloat<GatedRmsNorm, B>::forward, InFloat<GatedRmsNorm, B>::backward;
  template <std::floating_point T> static void forward(B& gpu, double eps, View<T const, 2> x, View<T const, 2> z, Wide<In<T>, 1> w,
                                                       View<T, 2> y) {
    gpu::rms_norm<T>(gpu, {x, z, w, y, T(0), static_cast<T>(eps)});
  }
  template <std::floating_point T>
  static void backward(B& gpu, double eps, View<T const, 2> x, View<T const, 2> z, Wide<In<T>, 1> w, View<T const, 2> d_y, View<T, 2> d_x,
                       View<T, 2> d_z, Wide<Out<T>, 1> d_w) {
    gpu::rms_norm_gradients<T>(gpu, {{x, z, w, {}, T(0), static_cast<T>(eps)}, d_y, d_x, d_z, {}, Into::overwrite}, d_w);
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/ops/rope/kernels.hpp
// Rotary positions as kernels. A warp has a row of angles, or a head of a token: lane l has the pairs l, l + 32, ...
#ifndef HYBRIDATTN_OPS_ROPE_KERNELS_HPP
#define HYBRIDATTN_OPS_ROPE_KERNELS_HPP

#include <cmath>
#include <cstdint>

namespace hybridattn::inline HYBRIDATTN_ABI::gpu {

HYBRIDATTN_DEVICE Index angles_row(View<std::int32_t const, 1> positions, Index n) { return positions.empty() ? n : positions(n); }

// angle / pi without whole turns, in -1 .. 1. 1/pi is inverse + rest, with twice the digits of a double. So a large angle is turned as
// exactly as a small one.
HYBRIDATTN_DEVICE double half_turns(double angle) {
  constexpr double inverse = 0.3183098861837907, rest = -1.9678676675182486e-17;
  double const turns = angle * inverse, error = std::fma(angle, inverse, -turns) + angle * rest;
  return turns - 2 * std::rint(turns / 2) + error;
}

template <class T> struct RopeAnglesForward {
  static constexpr int threads = 128;
  static constexpr Index most_pairs = 128;
  struct Params {
    View<std::int32_t const, 1> positions;
    View<T, 3> angles;
    double frequencies[most_pairs];   // radians a position
  };
  struct Shared {};
  static HYBRIDATTN_DEVICE void run(Shared&, Params const& p) {
    Index const row = simt::block_x() * (threads / 32) + simt::warp();
    if (row >= p.angles.extent(0)) return;
    double const position = static_cast<double>(angles_row(p.positions, row));
    for (Index i = simt::lane(); i < p.angles.extent(2); i += 32) {
      double const turns = half_turns(position * p.frequencies[i]);
      p.angles(row, 0, i) = static_cast<T>(simt::cos_pi(turns));
      p.angles(row, 1, i) = static_cast<T>(simt::sin_pi(turns));
    }
  }
};

// y is x turned forward (direction 1) or back (-1).
template <class T> struct Turn {
  static constexpr int threads = 128;
  struct Params {
    View<T const, 3> angles;
    View<std::int32_t const, 1> positions;
    View<T const, 3> x;
    View<T, 3> y;
    Index pairs;
    bool interleaved;
    T direction;
  };
  struct Shared {};
  static HYBRIDATTN_DEVICE void run(Shared&, Params const& p) {
    Index const row = simt::block_x() * (threads / 32) + simt::warp(), heads = p.x.extent(1);
    if (row >= p.x.extent(0) * heads) return;
    Index const n = row / heads, h = row % heads, angle = angles_row(p.positions, n);
    for (Index i = simt::lane(); i < p.pairs; i += 32) {
      Index const first = p.interleaved ? 2 * i : i, second = p.interleaved ? first + 1 : i + p.pairs;
      T const a = p.x(n, h, first), b = p.x(n, h, second);
      T const cosine = p.angles(angle, 0, i), sine = p.direction * p.angles(angle, 1, i);
      p.y(n, h, first) = a * cosine - b * sine;
      p.y(n, h, second) = b * cosine + a * sine;
    }
    for (Index d = 2 * p.pairs + simt::lane(); d < p.x.extent(2); d += 32) p.y(n, h, d) = p.x(n, h, d);
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::gpu
#endif

// ==== hybridattn/ops/rope/gpu.hpp
#ifndef HYBRIDATTN_OPS_ROPE_GPU_HPP
#define HYBRIDATTN_OPS_ROPE_GPU_HPP

#include <cmath>

namespace hybridattn::inline HYBRIDATTN_ABI {

template <GpuBackend B> struct On<RopeAngles, B> {
  // The frequencies are computed on the host and travel with the kernel's parameters: no upload. Throws Error for a rotary_dim above 256.
  template <class T> static void forward(B& gpu, Rope::Options o, View<std::int32_t const, 1> positions, View<T, 3> angles) {
    using Angles = gpu::RopeAnglesForward<T>;
    check_positive("Rope", "theta", o.theta);
    Index const pairs = angles.extent(2);
    check(pairs <= Angles::most_pairs, "Rope: rotary_dim ", 2 * pairs, " is not allowed on a GPU; it must be at most ",
          2 * Angles::most_pairs);
    typename Angles::Params p{positions, angles, {}};
    for (Index i = 0; i < pairs; ++i)
      p.frequencies[i] = std::pow(o.theta, -2.0 * static_cast<double>(i) / static_cast<double>(o.rotary_dim));
    launch<Angles>(gpu, {.x = ceil_div(angles.extent(0), Angles::threads / 32)}, p);
  }
};

template <GpuBackend B> struct On<Rope, B> : InFloat<Rope, B> {
  using InFloat<Rope, B>::forward, InFloat<Rope, B>::backward;
  template <std::floating_point T>
  static void forward(B& gpu, Rope::Options o, Wide<In<T>, 3> angles, View<std::int32_t const, 1> positions, View<T const, 3> x,
                      View<T, 3> y) {
    turn<T>(gpu, o, {angles, positions, x, y, o.rotary_dim / 2, o.interleaved, T(1)});
  }
  template <std::floating_point T>
  static void backward(B& gpu, Rope::Options o, Wide<In<T>, 3> angles, View<std::int32_t const, 1> positions, View<T const, 3> d_y,
                       View<T, 3> d_x) {
    turn<T>(gpu, o, {angles, positions, d_y, d_x, o.rotary_dim / 2, o.interleaved, T(-1)});
  }

 private:
  template <class T> static void turn(B& gpu, Rope::Options const& o, typename gpu::Turn<T>::Params const& p) {
    check_rotary_dim(o, p.x.extent(2));
    launch<gpu::Turn<T>>(gpu, {.x = ceil_div(p.x.extent(0) * p.x.extent(1), gpu::Turn<T>::threads / 32)}, p);
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/ops/top_k/gpu.hpp
#ifndef HYBRIDATTN_OPS_TOP_K_GPU_HPP
#define HYBRIDATTN_OPS_TOP_K_GPU_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

template <GpuBackend B> struct On<TopK, B> : InFloat<TopK, B> {
  using InFloat<TopK, B>::forward;
  template <std::floating_point T> static void forward(B& gpu, View<T const, 2> scores, View<std::int32_t, 2> indices) {
    if (!indices.empty()) launch<gpu::SelectTopK<T>>(gpu, {.x = indices.extent(0)}, {scores, indices});
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/gpu_operations.hpp
// Every operation and policy on GPU backends.
#ifndef HYBRIDATTN_GPU_OPERATIONS_HPP
#define HYBRIDATTN_GPU_OPERATIONS_HPP

#endif

// ==== hybridattn/cuda.cuh
// NVIDIA GPUs, and every operation and policy on them. hybridattn/hybridattn.hpp includes this under nvcc.
#ifndef HYBRIDATTN_CUDA_CUH
#define HYBRIDATTN_CUDA_CUH

#endif

// ==== hybridattn/hybridattn.hpp
#endif

#endif
