// <hybridattn/store.hpp> as one file, written by scripts/single_include: it and all that it needs of hybridattn, a library of
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
#include <cerrno>
#include <cmath>
#include <concepts>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <fcntl.h>
#include <filesystem>
#include <functional>
#include <iterator>
#include <limits>
#include <list>
#include <map>
#include <new>
#include <nlohmann/json.hpp>
#include <numbers>
#include <numeric>
#include <optional>
#include <pthread.h>
#include <set>
#include <span>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <sys/file.h>
#include <sys/stat.h>
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

// ==== hybridattn/io/atomic_file.hpp
// Files that are never half-written: they are written under a temporary name in the same folder, synced, then renamed.
#ifndef HYBRIDATTN_IO_ATOMIC_FILE_HPP
#define HYBRIDATTN_IO_ATOMIC_FILE_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

// SIGXFSZ kills a process that writes beyond its file size limit. After this call the process gets an Error instead, as on a full
// disk. The call changes the whole process, so only main() should make it.
inline void ignore_file_size_signal() { std::signal(SIGXFSZ, SIG_IGN); }

// Calls f(), a system call, again each time that a signal interrupted it.
template <class F> auto uninterrupted(F f) {
  auto result = f();
  while (result < 0 && errno == EINTR) result = f();
  return result;
}

// An open file of the system. The destructor closes it.
class FileDescriptor {
 public:
  FileDescriptor() = default;
  explicit FileDescriptor(int number) : number_(number) {}
  FileDescriptor(FileDescriptor&& other) noexcept : number_(std::exchange(other.number_, -1)) {}
  FileDescriptor& operator=(FileDescriptor&& other) noexcept {
    std::swap(number_, other.number_);
    return *this;
  }
  ~FileDescriptor() {
    if (number_ >= 0) ::close(number_);
  }
  int number() const { return number_; }
  explicit operator bool() const { return number_ >= 0; }

  // Closes the file now. Returns false when the system reports only here that written bytes are lost. A signal does not keep it open.
  bool close() { return ::close(std::exchange(number_, -1)) == 0 || errno == EINTR; }

 private:
  int number_ = -1;
};

// The temporary name under which process `process` writes the file `name`.
inline std::string partial_name(std::string const& name, int process, int attempt) {
  return name + "." + std::to_string(process) + "-" + std::to_string(attempt) + ".partial";
}
inline bool is_partial_of(std::string_view file, std::string_view name) {
  constexpr std::string_view end = ".partial";
  if (!file.starts_with(name) || !file.ends_with(end) || file.size() <= name.size() + end.size()) return false;
  auto const number = file.substr(name.size(), file.size() - name.size() - end.size());
  return number.front() == '.' && number.find_first_not_of("0123456789-", 1) == number.npos;
}

// Deletes the temporary files of `path` whose process was killed. A process locks its temporary file, and the system unlocks the
// file when the process ends in any way.
inline void remove_abandoned(std::filesystem::path const& path) {
  namespace fs = std::filesystem;
  std::string const name = path.filename().string();
  std::error_code error;
  for (fs::directory_iterator it{path.has_parent_path() ? path.parent_path() : ".", error}, end; !error && it != end; it.increment(error)) {
    if (!is_partial_of(it->path().filename().string(), name)) continue;
    FileDescriptor const file{::open(it->path().c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC)};
    if (file && ::flock(file.number(), LOCK_EX | LOCK_NB) == 0) ::unlink(it->path().c_str());
  }
}

// The file that a write to `path` reaches: for a symbolic link its target, which need not exist.
inline std::filesystem::path target_of(std::filesystem::path path) {
  std::error_code error;
  for (int links = 0; std::filesystem::is_symlink(std::filesystem::symlink_status(path, error)); ++links) {
    check(links < 40, "cannot write ", path, ": too many symbolic links, one behind the other");
    auto const next = std::filesystem::read_symlink(path, error);
    check(!error, "cannot write ", path, ": ", error.message());
    path = path.parent_path() / next;   // relative to the link's folder, unless the target is absolute
  }
  return path;
}

// Writes a file: call `write` in order, then `commit`. Before `commit` the file does not exist, or is the old file. Without `commit` the
// temporary file is deleted; the next AtomicFile of this name deletes one that a killed process left. The new file gets the mode of the
// file that it replaces and, where that is allowed, its owner. A symbolic link stays, and its target is replaced. Every failure is
// an Error that names the file.
class AtomicFile {
 public:
  explicit AtomicFile(std::filesystem::path const& path) : path_(target_of(path)) {
    check(path_.has_filename(), "cannot write ", path, ": it is not the name of a file");
    struct stat old;
    bool const replaces = ::stat(path_.c_str(), &old) == 0;
    check(!replaces || S_ISREG(old.st_mode), "cannot write ", path_, ": it exists and is not a file");
    remove_abandoned(path_);
    for (int attempt = 0; !file_; ++attempt) {
      temporary_ = partial_name(path_.string(), ::getpid(), attempt);
      file_ = FileDescriptor{uninterrupted([&] { return ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666); })};
      if (!file_ && (errno != EEXIST || attempt == 1000)) fail_with(errno);
      if (file_ && !lock()) file_ = FileDescriptor{};
    }
    if (replaces && !inherit(old)) discard_and_fail(errno);
  }
  AtomicFile(AtomicFile const&) = delete;
  AtomicFile& operator=(AtomicFile const&) = delete;
  ~AtomicFile() { discard(); }

  void write(std::string_view contents) {
    check(static_cast<bool>(file_), "cannot write ", path_, ": it is closed");
    while (!contents.empty()) {
      auto const written = uninterrupted([&] { return ::write(file_.number(), contents.data(), contents.size()); });
      if (written <= 0) discard_and_fail(written < 0 ? errno : EIO);
      contents.remove_prefix(static_cast<std::size_t>(written));
    }
  }
  void commit() {
    check(static_cast<bool>(file_), "cannot write ", path_, ": it is closed");
    if (uninterrupted([&] { return ::fsync(file_.number()); }) != 0 && errno != EINVAL) discard_and_fail(errno);
    FileDescriptor const still_locked{::dup(file_.number())};   // until the rename
    if (!file_.close()) discard_and_fail(errno);
    if (uninterrupted([&] { return ::rename(temporary_.c_str(), path_.c_str()); }) != 0) discard_and_fail(errno);
    temporary_.clear();
    sync_folder();
  }
  // The given path, with symbolic links followed.
  std::filesystem::path const& path() const { return path_; }

 private:
  [[noreturn]] void fail_with(int error) const { fail("cannot write ", path_, ": ", std::strerror(error)); }
  [[noreturn]] void discard_and_fail(int error) {
    discard();
    fail_with(error);
  }
  // Returns false where another process took the new file for an abandoned one and deleted it. On a file system without locks no
  // process does so.
  bool lock() const {
    struct stat status;
    if (::flock(file_.number(), LOCK_EX | LOCK_NB) != 0) return errno != EWOULDBLOCK;
    return ::fstat(file_.number(), &status) != 0 || status.st_nlink > 0;
  }
  // Sets the owner first, because a change of the owner clears bits of the mode. Where the process may not change the owner, it stays.
  bool inherit(struct stat const& old) const {
    [[maybe_unused]] bool const given = ::fchown(file_.number(), old.st_uid, old.st_gid) == 0;
    return ::fchmod(file_.number(), old.st_mode & 0777) == 0;
  }
  void discard() noexcept {
    file_ = FileDescriptor{};
    if (!temporary_.empty()) ::unlink(temporary_.c_str());
    temporary_.clear();
  }
  // Syncs the folder, so that the new name survives a power cut where the file system can promise that. Throws where the sync fails.
  void sync_folder() const {
    auto const folder = path_.has_parent_path() ? path_.parent_path() : std::filesystem::path{"."};
    FileDescriptor const opened{uninterrupted([&] { return ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC); })};
    if (!opened || uninterrupted([&] { return ::fsync(opened.number()); }) == 0) return;
    if (errno == EIO || errno == ENOSPC || errno == EDQUOT) fail_with(errno);
  }

  std::filesystem::path path_, temporary_;
  FileDescriptor file_;
};

inline void write_file_atomically(std::filesystem::path const& path, std::string_view contents) {
  AtomicFile file{path};
  file.write(contents);
  file.commit();
}

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

// ==== hybridattn/io/json.hpp
// JSON of untrusted files. Parsing takes bounded memory and stack, and every error names its line and column.
#ifndef HYBRIDATTN_IO_JSON_HPP
#define HYBRIDATTN_IO_JSON_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

namespace strict_json {

using Json = nlohmann::json;

// Real files stay far below both limits. A value takes some 50 bytes besides its text.
inline constexpr std::size_t max_depth = 64, max_values = 1'000'000;

enum class Bound { whole, members };   // max_values limits the whole object, or each of its members

// An iterator that the parser reads through. It stores the furthest place that the parser has read.
struct Characters {
  using iterator_category = std::forward_iterator_tag;
  using value_type = char;
  using difference_type = std::ptrdiff_t;
  using pointer = char const*;
  using reference = char const&;

  char const* here = nullptr;
  char const** furthest = nullptr;

  reference operator*() const { return *here; }
  Characters& operator++() {
    *furthest = ++here;
    return *this;
  }
  Characters operator++(int) {
    auto before = *this;
    ++*this;
    return before;
  }
  friend bool operator==(Characters const& a, Characters const& b) { return a.here == b.here; }
};

// Calls take with the members of the outermost object, one at a time. Throws Error on text that is not JSON, on a key that an object
// has twice (readers differ in which of the two they use), and on more depth or values than any real file has.
class Reader final : public nlohmann::json_sax<Json> {
 public:
  using Take = std::function<void(std::string const& key, Json&& value)>;

  Reader(std::string_view text, std::string const& where, Bound bound, Take take)
      : text_(text), where_(where), bound_(bound), take_(std::move(take)) {}

  void read() {
    constexpr std::string_view mark = "\xef\xbb\xbf";
    if (text_.starts_with(mark)) fail_at(0, "it begins with a byte order mark");
    if (auto const nul = text_.find('\0'); nul != text_.npos) fail_at(nul, "a NUL byte");
    auto const start = text_.find_first_not_of(" \t\r\n");
    if (start == text_.npos || text_[start] != '{') fail_at(start == text_.npos ? text_.size() : start, "not a JSON object");
    furthest_ = text_.data();
    // Json::sax_parse would do the same, but also compile its readers of five binary formats: seconds for each including file.
    auto characters =
        nlohmann::detail::input_adapter(Characters{text_.data(), &furthest_}, Characters{text_.data() + text_.size(), &furthest_});
    nlohmann::detail::parser<Json, decltype(characters)>(std::move(characters)).sax_parse(this);
  }

  bool null() override { return add(Json{}); }
  bool boolean(bool value) override { return add(Json(value)); }
  bool number_integer(Json::number_integer_t value) override { return add(Json(value)); }
  bool number_unsigned(Json::number_unsigned_t value) override { return add(Json(value)); }
  bool number_float(Json::number_float_t value, Json::string_t const&) override { return add(Json(value)); }
  bool string(Json::string_t& value) override { return add(Json(std::move(value))); }
  bool binary(Json::binary_t&) override { fail_here("binary data"); }
  bool start_object(std::size_t) override { return open(Json::object()); }
  bool start_array(std::size_t) override { return open(Json::array()); }
  bool key(Json::string_t& value) override {
    bool const is_new = open_.empty() ? keys_.insert(value).second : !open_.back()->contains(value);
    if (!is_new) fail_here("the key ", escaped(value), " occurs twice in one object");
    (open_.empty() ? member_key_ : key_) = std::move(value);
    return true;
  }
  bool end_object() override { return close(); }
  bool end_array() override { return close(); }
  bool parse_error(std::size_t read, std::string const&, Json::exception const& error) override {
    constexpr int number_overflow = 406;
    if (error.id == number_overflow) fail_here("a number that is too large");
    fail_at(read - 1, "not JSON: ", what_is_wrong(read - 1));
  }

 private:
  template <class... Parts> [[noreturn]] void fail_at(std::size_t place, Parts const&... parts) const {
    auto const before = text_.substr(0, place);
    auto const line = std::ranges::count(before, '\n') + 1;
    auto const column = place - (before.find_last_of('\n') + 1) + 1;   // npos + 1 is 0
    fail(where_, "line ", line, ", column ", column, ": ", parts...);
  }
  // Fails at the last character that the parser has read.
  template <class... Parts> [[noreturn]] void fail_here(Parts const&... parts) const {
    fail_at(static_cast<std::size_t>(std::max<std::ptrdiff_t>(furthest_ - text_.data(), 1)) - 1, parts...);
  }

  std::string what_is_wrong(std::size_t place) const {
    if (place >= text_.size()) return "it ends too early";
    char const found = text_[place];
    auto const before = text_.substr(0, place).find_last_not_of(" \t\r\n");
    if (found == '/' || found == '#') return "comments are not allowed";
    if ((found == '}' || found == ']') && before != text_.npos && text_[before] == ',') return "a comma before " + escaped({&found, 1});
    if (found == 'N' || found == 'I') return "NaN and Infinity are not allowed";
    return "unexpected " + escaped({&found, 1});
  }

  bool add(Json value) {
    place_value(std::move(value));
    if (open_.empty()) hand_out();
    return true;
  }
  bool open(Json value) {
    if (!started_) return started_ = true;   // the outermost object
    if (open_.size() + 2 > max_depth) fail_here("nested deeper than ", max_depth, " levels");
    open_.push_back(&place_value(std::move(value)));
    return true;
  }
  bool close() {
    if (open_.empty()) return true;
    open_.pop_back();
    if (open_.empty()) hand_out();
    return true;
  }
  Json& place_value(Json value) {
    if (++values_ > max_values) fail_here("more than ", max_values, " values");
    if (open_.empty()) return member_ = std::move(value);
    Json& parent = *open_.back();
    if (!parent.is_array()) return parent[key_] = std::move(value);
    parent.push_back(std::move(value));
    return parent.back();
  }
  void hand_out() {
    take_(member_key_, std::move(member_));
    member_ = Json{};
    if (bound_ == Bound::members) values_ = 0;
  }

  std::string_view text_;
  std::string const& where_;
  Bound bound_;
  Take take_;
  char const* furthest_ = nullptr;
  bool started_ = false;
  std::size_t values_ = 0;
  std::set<std::string> keys_;   // of the outermost object
  std::string member_key_, key_;
  Json member_;
  std::vector<Json*> open_;   // inside the member
};

}  // namespace strict_json

// Calls take(key, value) for the members of the object in a text, in order, and keeps no member. Throws Error as Reader does; the
// error's sentence begins with `where`.
inline void for_each_json_member(std::string_view text, std::string const& where, strict_json::Reader::Take const& take) {
  within_memory(text.size(), "the JSON", [&] { strict_json::Reader(text, where, strict_json::Bound::members, take).read(); }, where);
}
// The JSON object in a text. Throws Error as Reader does.
inline nlohmann::json parse_json(std::string_view text, std::string const& where) {
  auto object = nlohmann::json::object();
  auto const keep = [&](std::string const& key, nlohmann::json&& value) { object[key] = std::move(value); };
  within_memory(text.size(), "the JSON", [&] { strict_json::Reader(text, where, strict_json::Bound::whole, keep).read(); }, where);
  return object;
}
}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/io/regular_file.hpp
// Configurations and weights, which must be regular files. Opening never waits: for a pipe or a device the error says what it is.
// An error also names the format of a file that has the wrong contents.
#ifndef HYBRIDATTN_IO_REGULAR_FILE_HPP
#define HYBRIDATTN_IO_REGULAR_FILE_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

namespace regular_file {

inline std::string reason(int error) {
  if (error == ENOENT || error == ENOTDIR) return "there is no such file";
  if (error == ELOOP) return "it is a loop of symbolic links";
  return error == EACCES ? "no permission" : std::strerror(error);
}
inline char const* kind(mode_t mode) {
  if (S_ISDIR(mode)) return "a folder";
  if (S_ISFIFO(mode)) return "a pipe";
  if (S_ISSOCK(mode)) return "a socket";
  return S_ISCHR(mode) || S_ISBLK(mode) ? "a device" : "something else";
}

}  // namespace regular_file

// Opens a file for reading and follows symbolic links. Throws Error, which begins with `where`. A pipe is refused before it is opened,
// because opening it may wait for ever.
inline FileDescriptor open_regular_file(std::filesystem::path const& path, std::string const& where) {
  struct stat status = {};
  auto const check_regular = [&](bool known) {
    check(known, where, regular_file::reason(errno));
    check(S_ISREG(status.st_mode), where, "it is ", regular_file::kind(status.st_mode), ", not a regular file");
  };
  check_regular(::stat(path.c_str(), &status) == 0);
  FileDescriptor file{::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY)};
  check_regular(static_cast<bool>(file) && ::fstat(file.number(), &status) == 0);
  return file;
}

inline std::size_t size_of_file(FileDescriptor const& file, std::string const& where) {
  struct stat status;
  check(::fstat(file.number(), &status) == 0, where, std::strerror(errno));
  return static_cast<std::size_t>(status.st_size);
}

// Up to `count` bytes from `offset` on; fewer only at the end of the file.
inline std::size_t read_some(FileDescriptor const& file, std::size_t offset, char* into, std::size_t count, std::string const& where) {
  std::size_t done = 0;
  while (done < count) {
    auto const got = ::pread(file.number(), into + done, count - done, static_cast<off_t>(offset + done));
    if (got < 0 && errno == EINTR) continue;
    check(got >= 0, where, std::strerror(errno));
    if (got == 0) break;
    done += static_cast<std::size_t>(got);
  }
  return done;
}

// All bytes of a file. Throws Error if it is empty or has more than `largest` bytes.
inline std::string read_regular_file(std::filesystem::path const& path, std::size_t largest, std::string const& where) {
  auto const file = open_regular_file(path, where);
  auto const check_size = [&](std::size_t size) {
    check(size <= largest, where, "it has ", size, " bytes or more; at most ", largest, " are allowed");
  };
  std::size_t const size = size_of_file(file, where);
  check_size(size);
  std::string text;
  std::size_t read = 0;
  do {   // the file may grow while it is read, and the system's own files do not report their size
    std::size_t const room = std::max(size + 1, read + (1 << 16));
    within_memory(room, "the file", [&] { text.resize(room); }, where);
    read += read_some(file, read, text.data() + read, room - read, where);
    check_size(read);
  } while (read == text.size());
  check(read > 0, where, "it is empty");
  text.resize(read);
  return text;
}

namespace regular_file {

struct Beginning {
  std::string_view bytes, kind;
};
inline constexpr std::array beginnings = {Beginning{"version https://git-lfs.github.com/spec/",
                                                    "a git-lfs pointer: the file itself was not downloaded (git lfs pull fetches it)"},
                                          Beginning{"PK\x03\x04", "a zip archive, as PyTorch's .bin and .pt files are"},
                                          Beginning{"\x80\x02", "a Python pickle, as PyTorch's older files are"},
                                          Beginning{"\x80\x03", "a Python pickle"},
                                          Beginning{"\x80\x04", "a Python pickle"},
                                          Beginning{"\x80\x05", "a Python pickle"},
                                          Beginning{"GGUF", "a GGUF file"},
                                          Beginning{"\x93NUMPY", "a NumPy file"},
                                          Beginning{"\x89HDF\r\n", "an HDF5 file"},
                                          Beginning{"\x1f\x8b", "a gzip file"},
                                          Beginning{"\xfd"
                                                    "7zXZ",
                                                    "an xz file"},
                                          Beginning{"\x28\xb5\x2f\xfd", "a zstd file"},
                                          Beginning{"BZh", "a bzip2 file"},
                                          Beginning{"%PDF-", "a PDF file"},
                                          Beginning{"\x89PNG", "an image"},
                                          Beginning{"\x7f"
                                                    "ELF",
                                                    "a program"}};

inline std::string_view without_space(std::string_view text) {
  if (text.starts_with("\xef\xbb\xbf")) text.remove_prefix(3);
  return text.substr(std::min(text.find_first_not_of(" \t\r\n"), text.size()));
}
inline bool starts_like(std::string_view text, std::string_view lower) {
  return text.size() >= lower.size() && std::ranges::equal(text.substr(0, lower.size()), lower, [](char a, char b) {
           return (a >= 'A' && a <= 'Z' ? static_cast<char>(a + ('a' - 'A')) : a) == b;
         });
}

}  // namespace regular_file

// The format of a file that begins with these bytes (512 are enough), or "" for an unknown format.
inline std::string kind_of_file(std::string_view head) {
  for (auto const& [bytes, kind] : regular_file::beginnings)
    if (head.starts_with(bytes)) return std::string(kind);
  auto const text = regular_file::without_space(head);
  for (std::string_view const tag : {"<!doctype html", "<html", "<head", "<body"})
    if (regular_file::starts_like(text, tag)) return "an HTML page";
  if (text.starts_with("<?xml")) return "an XML file";
  if (head.size() > 262 && head.substr(257, 5) == "ustar") return "a tar archive";
  if (head.size() > 8 && head.find_first_not_of('\0') == head.npos)
    return "a file that begins with zeros only, as an unfinished download does";
  return "";
}
// The same, and for a text its beginning.
inline std::string kind_of_file_or_text(std::string_view head) {
  if (auto kind = kind_of_file(head); !kind.empty()) return kind;
  auto const begins = " that begins " + escaped(head);
  if (auto const text = regular_file::without_space(head); text.starts_with('{') || text.starts_with('[')) return "a JSON text" + begins;
  for (auto rest = head; !rest.empty();) {
    auto const [bytes, point] = utf8::first_character(rest);
    bool const cut = rest.size() < 4 && head.size() > 500;   // head may end inside a character
    if (!cut && (bytes == 0 || (point < 32 && point != '\t' && point != '\n' && point != '\r'))) return "";
    rest.remove_prefix(std::max<std::size_t>(bytes, 1));
  }
  return head.empty() ? "" : "a text" + begins;
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/io/safetensors.hpp
// The safetensors format: 8 bytes of header length (little-endian), a JSON header, then the tensors' bytes.
//
//   {"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, "__metadata__": {"policy": "gdn"}}
//
// The reader trusts no file. The tensors must cover the data exactly, without overlap or gap, and every size is checked before
// memory is allocated for it. A file may have tensors of an unknown dtype; only reading such a tensor is an error.
#ifndef HYBRIDATTN_IO_SAFETENSORS_HPP
#define HYBRIDATTN_IO_SAFETENSORS_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

static_assert(std::endian::native == std::endian::little, "safetensors files are read and written as they lie in memory");

struct TensorInfo {
  std::string dtype;            // its name in the format: F64 F32 BF16 F16 I64 I32 ...
  std::vector<Index> shape;     // [] is one number
  std::size_t begin = 0, end = 0;   // bytes of the data

  // The number of elements. Throws Error where it is too large.
  Index count() const { return detail::product(shape.data(), static_cast<int>(shape.size())); }
};

namespace safetensors {

inline constexpr std::size_t max_header_bytes = 100'000'000;   // the format's own limit
inline constexpr std::string_view metadata_key = "__metadata__";

struct DType {
  std::string_view name;
  std::size_t size;
};
inline constexpr std::array dtypes = {DType{"F64", 8},     DType{"F32", 4}, DType{"F16", 2},  DType{"BF16", 2},    DType{"I64", 8},
                                      DType{"I32", 4},     DType{"I16", 2}, DType{"I8", 1},   DType{"U64", 8},     DType{"U32", 4},
                                      DType{"U16", 2},     DType{"U8", 1},  DType{"BOOL", 1}, DType{"F8_E4M3", 1}, DType{"F8_E5M2", 1},
                                      DType{"F8_E8M0", 1}, DType{"C64", 8}};

template <class T> constexpr std::string_view dtype_of() {
  constexpr bool is_int32 = std::is_same_v<T, std::int32_t>, is_int64 = std::is_same_v<T, std::int64_t>;
  constexpr bool is_double = std::is_same_v<T, double>, is_bf16 = std::is_same_v<T, bf16>;
  static_assert(is_int32 || is_int64 || is_double || is_bf16 || std::is_same_v<T, float>, "double, float, bf16, int64 or int32");
  return is_int32 ? "I32" : is_int64 ? "I64" : is_double ? "F64" : is_bf16 ? "BF16" : "F32";
}

// Bits of IEEE half precision: 1 sign, 5 exponent, 10 fraction.
inline float from_f16(std::uint16_t bits) {
  std::uint32_t const sign = static_cast<std::uint32_t>(bits >> 15) << 31;
  std::uint32_t const exponent = (bits >> 10) & 31, fraction = bits & 1023;
  if (exponent == 0) {   // zero and subnormal: fraction * 2^-24
    float const size = static_cast<float>(fraction) * 0x1p-24f;
    return sign != 0 ? -size : size;
  }
  std::uint32_t const wide = exponent == 31 ? 255 : exponent + (127 - 15);
  return std::bit_cast<float>(sign | wide << 23 | fraction << 13);
}

// Bytes of an element; nullopt for an unknown dtype.
inline std::optional<std::size_t> size_of(std::string_view dtype) {
  auto const found = std::ranges::find(dtypes, dtype, &DType::name);
  return found == dtypes.end() ? std::nullopt : std::optional(found->size);
}

// A count in the header. Throws Error unless it is an integer in 0 .. 2^63 - 1.
inline Index to_count(nlohmann::json const& value, std::string const& where, char const* what) {
  bool const fits = value.is_number_unsigned() && value.get<std::uint64_t>() <= static_cast<std::uint64_t>(PTRDIFF_MAX);
  check(fits, where, what, " must hold integers from 0 to 2^63 - 1");
  return value.get<Index>();
}

inline nlohmann::json const& member(nlohmann::json const& entry, char const* key, std::string const& where) {
  check(entry.is_object() && entry.contains(key), where, "no '", key, "'");
  return entry[key];
}

// A dtype's name: F32, F8_E4M3, or a name of the future.
inline std::string parse_dtype(nlohmann::json const& value, std::string const& where) {
  auto const is_word = [](std::string_view text) {
    return !text.empty() && text.size() <= 32 && std::ranges::all_of(text, [](char c) {
      return (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '_';
    });
  };
  check(value.is_string() && is_word(value.get_ref<std::string const&>()), where, "dtype must be a word of at most 32 letters and digits");
  return value.get<std::string>();
}

inline Index size_product_of(std::vector<Index> const& sizes, std::string const& where) {
  try {
    return detail::product(sizes.data(), static_cast<int>(sizes.size()));
  } catch (Error const& error) {
    fail(where, "shape has more bytes than can be counted: ", error.what());
  }
}

inline TensorInfo parse_tensor(nlohmann::json const& entry, std::string const& where) {
  constexpr std::size_t max_rank = 32;
  TensorInfo info;
  info.dtype = parse_dtype(member(entry, "dtype", where), where);
  auto const size = size_of(info.dtype);
  std::vector<Index> factors{static_cast<Index>(size.value_or(1))};
  auto const& shape = member(entry, "shape", where);
  check(shape.is_array() && shape.size() <= max_rank, where, "shape must be a list of at most ", max_rank, " extents");
  for (auto const& extent : shape) {
    info.shape.push_back(to_count(extent, where, "shape"));
    factors.push_back(info.shape.back());
  }
  Index const bytes = size_product_of(factors, where);
  auto const& offsets = member(entry, "data_offsets", where);
  check(offsets.is_array() && offsets.size() == 2, where, "data_offsets must be a list of two");
  Index const begin = to_count(offsets[0], where, "data_offsets"), end = to_count(offsets[1], where, "data_offsets");
  check(begin <= end, where, "data_offsets [", begin, ", ", end, "] end before they begin");
  check(!size || end - begin == bytes, where, "data_offsets [", begin, ", ", end, "] do not hold the ", bytes, " bytes of dtype and shape");
  info.begin = static_cast<std::size_t>(begin);
  info.end = static_cast<std::size_t>(end);
  return info;
}

// Throws Error unless the tensors follow each other from the first byte of data to the last, without overlap or gap.
inline void check_coverage(std::map<std::string, TensorInfo> const& tensors, std::size_t data_bytes, std::string const& where) {
  std::vector<std::pair<std::string const, TensorInfo> const*> order;
  for (auto const& tensor : tensors) order.push_back(&tensor);
  std::ranges::sort(order, {}, [](auto const* tensor) { return std::pair{tensor->second.begin, tensor->second.end}; });
  std::size_t covered = 0;
  for (auto const* tensor : order) {
    auto const& [name, info] = *tensor;
    check(info.end <= data_bytes, where, "tensor ", escaped(name), " ends at byte ", info.end, " of the data, which has ", data_bytes);
    check(info.begin >= covered, where, "tensor ", escaped(name), " starts at byte ", info.begin, " inside another one");
    check(info.begin == covered, where, "bytes ", covered, " to ", info.begin, " of the data belong to no tensor");
    covered = info.end;
  }
  check(covered == data_bytes, where, "the tensors end at byte ", covered, " of the data, which has ", data_bytes);
}

}  // namespace safetensors

// A file's names, shapes and metadata. The read functions read tensors from the file when they are called. All throw Error.
class Safetensors {
 public:
  explicit Safetensors(std::filesystem::path const& path) : where_("safetensors file " + one_line(path.string()) + ": ") { open(path); }

  std::map<std::string, TensorInfo> const& tensors() const { return tensors_; }
  std::map<std::string, std::string> const& metadata() const { return metadata_; }
  bool contains(std::string const& name) const { return tensors_.contains(name); }
  TensorInfo const& info(std::string const& name) const {
    auto const found = tensors_.find(name);
    check(found != tensors_.end(), where_, "no tensor ", escaped(name));
    return found->second;
  }
  std::string const& metadata(std::string const& key) const {
    auto const found = metadata_.find(key);
    check(found != metadata_.end(), where_, "no metadata ", escaped(key));
    return found->second;
  }

  // The elements in the file's order, last axis fastest. From F64 F32 F16 BF16 I64 I32, rounded where the result is narrower.
  std::vector<double> read_doubles(std::string const& name) const { return read<double>(name); }
  // The `count` elements from element `first` on.
  std::vector<double> read_doubles(std::string const& name, Index first, Index count) const {
    Index const all = info(name).count();
    check(0 <= first && 0 <= count && first <= all && count <= all - first, where_, "tensor ", escaped(name), ": elements ", first, " to ",
          first, " + ", count, " of ", all);
    return read<double>(name, first, count);
  }
  std::vector<float> read_floats(std::string const& name) const { return read<float>(name); }
  std::vector<bf16> read_bf16s(std::string const& name) const { return read<bf16>(name); }
  // From I64 and I32 only.
  std::vector<std::int64_t> read_int64s(std::string const& name) const { return read<std::int64_t>(name); }
  // The tensor's bytes in the file, of any dtype.
  std::vector<char> read_bytes(std::string const& name) const {
    auto const& tensor = info(name);
    return stored<char>(tensor, 0, static_cast<Index>(tensor.end - tensor.begin));
  }

 private:
  void open(std::filesystem::path const& path) {
    file_ = open_regular_file(path, where_);
    auto const size = size_of_file(file_, where_);
    check(size > 0, where_, "it is empty");
    check_beginning(size);
    check(size >= 8, where_, "only ", size, " bytes, too short for the header's length");
    std::uint64_t length = 0;
    read_at(0, &length, sizeof length);
    check(length <= safetensors::max_header_bytes, where_, "a header of ", length, " bytes; at most ", safetensors::max_header_bytes,
          " are allowed");
    check(length <= size - 8, where_, "a header of ", length, " bytes, but only ", size - 8, " follow");
    std::string text;
    within_memory(length, "the header", [&] { text.resize(length); }, where_);
    read_at(8, text.data(), text.size());
    data_start_ = 8 + static_cast<std::size_t>(length);
    parse(text);
    safetensors::check_coverage(tensors_, size - data_start_, where_);
  }
  // Throws Error, which names the format, for a file of another format. In a safetensors file the header's length ends with zero bytes,
  // and '{' follows.
  void check_beginning(std::size_t size) const {
    std::string head(std::min<std::size_t>(size, 512), '\0');
    read_at(0, head.data(), head.size());
    if (head.size() > 8 && head.substr(4, 5) == std::string_view("\0\0\0\0{", 5)) return;
    if (auto const kind = kind_of_file_or_text(head); !kind.empty()) fail(where_, "it is no safetensors file, but ", kind);
  }
  void parse(std::string const& header) {
    std::string const where = where_ + "the header: ";
    check(header.starts_with('{'), where, "not a JSON object");
    for_each_json_member(header, where, [&](std::string const& name, nlohmann::json&& entry) {
      if (name == safetensors::metadata_key) parse_metadata(entry);
      else tensors_[name] = safetensors::parse_tensor(entry, where_ + "tensor " + escaped(name) + ": ");
    });
  }
  void parse_metadata(nlohmann::json const& entries) {
    check(entries.is_object(), where_, "__metadata__ must map text to text");
    for (auto const& [key, value] : entries.items()) {
      check(value.is_string(), where_, "__metadata__ ", escaped(key), " is not text");
      metadata_[key] = value.get<std::string>();
    }
  }

  void read_at(std::size_t offset, void* into, std::size_t count) const {
    check(read_some(file_, offset, static_cast<char*>(into), count, where_) == count, where_, "it became shorter while being read");
  }
  // Throws Error where memory is short: a sparse file may claim any size.
  template <class T> std::vector<T> make(Index count) const {
    std::vector<T> elements;
    resize(elements, count, "a tensor", where_);
    return elements;
  }
  template <class Stored> std::vector<Stored> stored(TensorInfo const& info, Index first, Index count) const {
    auto elements = make<Stored>(count);
    read_at(data_start_ + info.begin + static_cast<std::size_t>(first) * sizeof(Stored), elements.data(), elements.size() * sizeof(Stored));
    return elements;
  }
  template <class T> std::vector<T> read(std::string const& name) const { return read<T>(name, 0, info(name).count()); }
  template <class T> std::vector<T> read(std::string const& name, Index first, Index count) const {
    auto const& tensor = info(name);
    auto const converted = [&]<class Stored>(Stored, auto convert) {
      auto const elements = stored<Stored>(tensor, first, count);
      auto result = make<T>(count);
      std::ranges::transform(elements, result.begin(), [&](Stored element) { return static_cast<T>(convert(element)); });
      return result;
    };
    auto const same = [](auto element) { return element; };
    if (tensor.dtype == safetensors::dtype_of<T>()) return stored<T>(tensor, first, count);
    if (tensor.dtype == "I64") return converted(std::int64_t{}, same);
    if (tensor.dtype == "I32") return converted(std::int32_t{}, same);
    if constexpr (std::is_floating_point_v<wide_t<T>>) {
      if (tensor.dtype == "F64") return converted(double{}, same);
      if (tensor.dtype == "F32") return converted(float{}, same);
      if (tensor.dtype == "F16") return converted(std::uint16_t{}, safetensors::from_f16);
      if (tensor.dtype == "BF16") return converted(bf16{}, same);
    }
    fail(where_, "tensor ", escaped(name), " of dtype ", tensor.dtype, " cannot be read as ", safetensors::dtype_of<T>());
  }

  std::string where_;   // the beginning of an error's sentence
  FileDescriptor file_;
  std::size_t data_start_ = 0;
  std::map<std::string, TensorInfo> tensors_;
  std::map<std::string, std::string> metadata_;
};

// Collects tensors, then writes them at once. It does not copy elements: they must stay in place until `write` returns.
class SafetensorsWriter {
 public:
  template <class T> void add(std::string const& name, std::vector<Index> shape, std::span<T const> elements) {
    TensorInfo info{std::string(safetensors::dtype_of<T>()), std::move(shape)};
    check(info.count() == static_cast<Index>(elements.size()), "safetensors: ", elements.size(), " elements for ", escaped(name),
          ", whose shape has ", info.count());
    auto const bytes = std::as_bytes(elements);
    insert(name, {std::move(info), {reinterpret_cast<char const*>(bytes.data()), bytes.size()}});
  }
  // Adds a tensor in another machine's memory, with dtype and shape of `info`. `write` gets its bytes by to_host.
  void add_elsewhere(std::string const& name, TensorInfo info, std::string_view bytes) { insert(name, {std::move(info), bytes, true}); }
  template <class T> void add(std::string const& name, std::vector<Index> shape, std::vector<T> const& elements) {
    add(name, std::move(shape), std::span<T const>(elements));
  }
  template <class T> void add(std::string const& name, std::vector<Index> shape, std::vector<T> const&& temporary) = delete;

  void add_metadata(std::string const& key, std::string value) { metadata_[key] = std::move(value); }

  void write(std::filesystem::path const& path) {
    write(path, [](std::string_view bytes) { return bytes; });
  }
  // to_host(bytes) returns the bytes of a tensor from add_elsewhere on the host. It is called for one tensor at a time.
  template <class ToHost> void write(std::filesystem::path const& path, ToHost to_host) {
    auto const order = lay_out();
    std::string const header = header_text();
    AtomicFile file{path};
    auto const length = std::bit_cast<std::array<char, 8>>(static_cast<std::uint64_t>(header.size()));
    file.write({length.data(), length.size()});
    file.write(header);
    for (auto const* entry : order) file.write(entry->elsewhere ? to_host(entry->bytes) : entry->bytes);
    file.commit();
  }

 private:
  struct Entry {
    TensorInfo info;
    std::string_view bytes;
    bool elsewhere = false;
  };
  void insert(std::string const& name, Entry entry) {
    check(name != safetensors::metadata_key && !entries_.contains(name), "safetensors: the name ", escaped(name), " is taken");
    check(safetensors::size_of(entry.info.dtype).has_value(), "safetensors: ", escaped(name), " is of the unknown dtype ",
          escaped(entry.info.dtype));
    entries_[name] = std::move(entry);
  }
  // Tensors with wide elements first, so that every tensor is aligned to its elements.
  std::vector<Entry const*> lay_out() {
    std::vector<Entry const*> order;
    std::size_t offset = 0;
    for (std::size_t const size : {8u, 4u, 2u, 1u})
      for (auto& [name, entry] : entries_) {
        if (safetensors::size_of(entry.info.dtype) != size) continue;
        entry.info.begin = offset;
        entry.info.end = offset += entry.bytes.size();
        order.push_back(&entry);
      }
    return order;
  }
  // Padded with spaces, so that the data starts at a multiple of 8.
  std::string header_text() const {
    nlohmann::json header = nlohmann::json::object();
    for (auto const& [name, entry] : entries_)
      header[name] = {{"dtype", entry.info.dtype}, {"shape", entry.info.shape}, {"data_offsets", {entry.info.begin, entry.info.end}}};
    if (!metadata_.empty()) header[std::string(safetensors::metadata_key)] = metadata_;
    try {
      std::string text = header.dump();
      text.resize((text.size() + 7) / 8 * 8, ' ');
      return text;
    } catch (nlohmann::json::type_error const&) {
      fail("safetensors: a name or metadata is not UTF-8");
    }
  }

  std::map<std::string, Entry> entries_;
  std::map<std::string, std::string> metadata_;
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
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

// ==== hybridattn/store/checkpoint/describe.hpp
// Describes a model as JSON. A checkpoint holds this description, and loading compares it with the description of the caller's model.
//
// A policy of your own is described by its name alone. To have its config and its options described too, define members(config, f) and
// members(options, f), as here for the library's policies, in the namespaces of these types.
#ifndef HYBRIDATTN_STORE_CHECKPOINT_DESCRIBE_HPP
#define HYBRIDATTN_STORE_CHECKPOINT_DESCRIBE_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

namespace checkpoint {

using Json = nlohmann::json;

template <class C, class T>
concept Either = std::is_same_v<std::remove_const_t<C>, T>;   // a T, or a T const

// Files have a word for each enumerator. The words are in the order of the enumerators' values.
template <class E> inline constexpr std::array<char const*, 0> words_of{};
template <> inline constexpr std::array words_of<QkNorm>{"none", "plain", "zero_centred"};
template <> inline constexpr std::array words_of<Rotary>{"half_split", "interleaved"};
template <> inline constexpr std::array words_of<NormWeight>{"plain", "zero_centred"};
template <> inline constexpr std::array words_of<NormPlacement>{"before", "after"};
template <> inline constexpr std::array words_of<Balance>{"per_layer", "pooled"};
template <> inline constexpr std::array words_of<gdn::GateStart>{"fla", "transformers"};

}  // namespace checkpoint

// members(c, f) calls f(name, member) for every member that a checkpoint keeps, to write it or to read it.
namespace full {
template <checkpoint::Either<Config> C> void members(C& c, auto f) {
  f("num_heads", c.num_heads);
  f("num_kv_heads", c.num_kv_heads);
  f("head_dim", c.head_dim);
  f("scale", c.scale);
  f("rope_theta", c.rope_theta);
  f("norm_eps", c.norm_eps);
}
}  // namespace full
namespace gdn {
template <checkpoint::Either<Config> C> void members(C& c, auto f) {
  f("num_heads", c.num_heads);
  f("num_value_heads", c.num_value_heads);
  f("key_dim", c.key_dim);
  f("value_dim", c.value_dim);
  f("scale", c.scale);
  f("norm_eps", c.norm_eps);
  f("gate_start", c.gate_start);
}
}  // namespace gdn
namespace dsa {
// The stage is left out, because it belongs to a training step and not to the model.
template <checkpoint::Either<Config> C> void members(C& c, auto f) {
  f("num_heads", c.num_heads);
  f("num_kv_heads", c.num_kv_heads);
  f("head_dim", c.head_dim);
  f("scale", c.scale);
  f("index_heads", c.index_heads);
  f("index_dim", c.index_dim);
  f("index_scale", c.index_scale);
  f("rope_theta", c.rope_theta);
  f("norm_eps", c.norm_eps);
  f("index_loss", c.index_loss);
}
}  // namespace dsa
template <checkpoint::Either<FullOptions> C> void members(C& o, auto f) {
  f("window", o.window);
  f("qk_norm", o.qk_norm);
  f("output_gate", o.output_gate);
  f("rotary_percent", o.rotary_percent);
  f("rotary", o.rotary);
}
template <checkpoint::Either<GdnOptions> C> void members(C& o, auto f) {
  f("conv_width", o.conv_width);
  f("output_gate", o.output_gate);
  f("negative_eigenvalues", o.negative_eigenvalues);
}
template <checkpoint::Either<SparseOptions> C> void members(C& o, auto f) {
  f("top_k", o.top_k);
  f("top_k_percent", o.top_k_percent);
  f("qk_norm", o.qk_norm);
  f("output_gate", o.output_gate);
  f("rotary_percent", o.rotary_percent);
  f("rotary", o.rotary);
  f("index_rotary_percent", o.index_rotary_percent);
  f("index_norm", o.index_norm);
}
template <checkpoint::Either<RmsNorm::Options> C> void members(C& o, auto f) {
  f("weight", o.weight);
  f("eps", o.eps);
}
template <checkpoint::Either<Initialization> C> void members(C& init, auto f) {
  f("linear_deviation", init.linear_deviation);
  f("embedding_deviation", init.embedding_deviation);
}
template <checkpoint::Either<FeedForwardConfig> C> void members(C& c, auto f) {
  f("hidden_dim", c.hidden_dim);
  f("gated", c.gated);
  f("num_experts", c.num_experts);
  f("top_k", c.top_k);
  f("expert_dim", c.expert_dim);
  f("shared_dim", c.shared_dim);
  f("renormalise", c.renormalise);
  f("decoder_sparse_step", c.decoder_sparse_step);
  f("mlp_only_layers", c.mlp_only_layers);
  f("balance_coefficient", c.balance_coefficient);
  f("balance", c.balance);
}

namespace checkpoint {

struct Write {
  Json& json;

  void operator()(char const* name, auto const& member) const {
    using Member = std::remove_cvref_t<decltype(member)>;
    if constexpr (std::is_enum_v<Member>) json[name] = words_of<Member>[static_cast<std::size_t>(member)];
    else json[name] = member;
  }
};
// Larger than any size of a real model. The product of three such sizes does not overflow.
inline constexpr Index largest_size = 1 << 20;

// Throws if a member is missing, is of another kind, or is larger than largest_size.
struct Read {
  Json const& json;
  std::string const& where;

  template <class Member> void operator()(char const* name, Member& member) const {
    Json const& value = safetensors::member(json, name, where);
    if constexpr (std::is_enum_v<Member>) {
      member = enumerator<Member>(name, value);
    } else if constexpr (std::is_same_v<Member, bool>) {
      check(value.is_boolean(), where, "'", name, "' is of another kind; it must be true or false");
      member = value.get<bool>();
    } else if constexpr (std::is_integral_v<Member>) {
      member = static_cast<Member>(size(name, value));
    } else if constexpr (std::is_floating_point_v<Member>) {
      check(value.is_number(), where, "'", name, "' is of another kind; it must be a number");
      member = value.get<Member>();
    } else {   // a list of layers
      check(value.is_array(), where, "'", name, "' is of another kind; it must be a list of integers");
      member.clear();
      for (Json const& element : value) member.push_back(size(name, element));
    }
  }

 private:
  Index size(char const* name, Json const& value) const {
    check(value.is_number_integer(), where, "'", name, "' is ", value.is_number() ? value.dump() : "of another kind",
          "; it must be an integer");
    bool const fits = value.is_number_unsigned() ? value.get<std::uint64_t>() <= largest_size
                                                 : -1 <= value.get<std::int64_t>() && value.get<std::int64_t>() <= largest_size;
    check(fits, where, "'", name, "' is ", value.dump(), "; allowed are sizes up to ", largest_size);
    return value.get<Index>();
  }
  template <class E> E enumerator(char const* name, Json const& value) const {
    check(value.is_string(), where, "'", name, "' is of another kind; it must be a word");
    auto const& words = words_of<E>;
    auto const found = std::ranges::find(words, std::string_view(value.get_ref<std::string const&>()));
    std::string allowed;
    for (std::string_view const word : words) allowed.append(allowed.empty() ? "" : ", ").append(word);
    check(found != words.end(), where, "'", name, "': unknown word ", escaped(value.get_ref<std::string const&>()), "; allowed are ",
          allowed);
    return static_cast<E>(found - words.begin());
  }
};
template <class C>
concept HasMembers = requires(C& c, Write write) { members(c, write); };
template <HasMembers C> void to_json(Json& json, C const& c) { members(c, Write{json}); }

template <class P> Json describe_policy(typename P::Config const& config) {
  Json json;
  json["policy"] = std::string(P::name);
  if constexpr (requires {
                  P::options;
                  requires HasMembers<decltype(P::options)>;
                })
    to_json(json["options"], P::options);
  if constexpr (HasMembers<typename P::Config const>) to_json(json["sizes"], config);
  return json;
}

// norm_placement is left out where the norms come before their branches, because older files do not have it.
template <class P> Json describe_layer(LayerConfig<P> const& layer) {
  Json json = describe_policy<P>(layer.policy);
  if (layer.norm_placement != NormPlacement::before) Write{json}("norm_placement", layer.norm_placement);
  return json;
}

// layers[i] = kinds[kind_of_layer[i]]
inline Json describe_stack(BlockConfig const& block, std::vector<Json> const& kinds, std::vector<std::size_t> const& kind_of_layer) {
  Json json;
  for (std::size_t const kind : kind_of_layer) {
    json["pattern"].push_back(kinds[kind]["policy"]);
    json["layers"].push_back(kinds[kind]);
  }
  Json& model = json["model"];
  model["model_dim"] = block.model_dim;
  to_json(model["feed_forward"], block.feed_forward);
  to_json(model["norm"], block.norm);
  to_json(model["initialization"], block.initialization);
  return json;
}

// {"pattern": ["GDN", "Full", ...], "layers": [{"policy", "options", "sizes", "norm_placement"}, ...], "model": {"vocab_size", ...}}.
// Sizes that the user left to a default have the value that the default stands for.
template <class Model> Json describe(Model const& model) {
  using Stack = typename Model::Stack;
  auto const& stack = model.stack_config();
  std::vector<Json> kinds;
  auto const add_all = [&]<class... Ps>(Types<Ps...>) { (kinds.push_back(describe_layer(stack.layers.template get<Ps>())), ...); };
  add_all(typename Stack::Kinds{});
  std::vector<std::size_t> kind_of_layer;
  for (auto const slot : Stack::Blocks::places) kind_of_layer.push_back(slot.type);
  Json json = describe_stack(stack.block, kinds, kind_of_layer);
  json["model"]["vocab_size"] = model.config().vocab_size;
  json["model"]["num_heads"] = model.config().num_heads;
  json["model"]["tie_embedding"] = model.config().tie_embedding;
  return json;
}

// The inverse of describe: returns the configuration of a model of the same pattern. Throws an Error that begins with `where`.
template <class Model> typename Model::Config configuration(Json const& json, std::string const& where) {
  using Stack = typename Model::Stack;
  typename Model::Config config{};
  Json const& model = safetensors::member(json, "model", where);
  Read const read{model, where};
  read("vocab_size", config.vocab_size);
  read("model_dim", config.model_dim);
  read("num_heads", config.num_heads);
  read("tie_embedding", config.tie_embedding);
  members(config.feed_forward, Read{safetensors::member(model, "feed_forward", where), where});
  members(config.norm, Read{safetensors::member(model, "norm", where), where});
  members(config.initialization, Read{safetensors::member(model, "initialization", where), where});
  Json const& layers = safetensors::member(json, "layers", where);
  check(layers.is_array() && layers.size() == Stack::depth, where, "'layers' does not fit the pattern: it has ", layers.size(),
        " layers, the pattern ", Stack::depth);
  auto const read_layer = [&]<class P>(std::size_t kind, LayerConfig<P>& layer) {
    for (std::size_t i = 0; i < Stack::depth; ++i) {
      if (Stack::Blocks::places[i].type != kind) continue;
      members(layer.policy, Read{safetensors::member(layers[i], "sizes", where), where});
      if (layers[i].contains("norm_placement")) Read{layers[i], where}("norm_placement", layer.norm_placement);
    }
  };
  [&]<class... Ps>(Types<Ps...>) {
    std::size_t kind = 0;
    (read_layer(kind++, config.layers.template get<Ps>()), ...);
  }(typename Stack::Kinds{});
  return config;
}

}  // namespace checkpoint
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

// ==== hybridattn/store/progress.hpp
// How far a training run is, as a checkpoint keeps it.
#ifndef HYBRIDATTN_STORE_PROGRESS_HPP
#define HYBRIDATTN_STORE_PROGRESS_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

// What a run needs to go on, besides parameters and optimizer.
struct Progress {
  Index step = 0;         // training steps that are done
  DataState data = {};    // DataSource::state()
  std::map<std::string, std::vector<double>> history = {};  // what the program counts, a number a step: losses, for instance
  std::string note = {};  // the program's own words, kept as they are
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/store/checkpoint/file.hpp
// Reads and writes a checkpoint's file. The code here works on lists of tensors and on JSON, and knows no type of model.
//
// A checkpoint is one safetensors file. All that is not a tensor is JSON under one key of its __metadata__. One rename makes the whole
// file visible, so no reader sees the tensors without the JSON, the JSON without the tensors, or a part of either.
//
//   embedding, blocks.3.attention.w.q, ...           parameters, by their paths
//   optimizer.<name>.<path>                          what the optimizer keeps of each: AdamW's moments are mean and square, and master is
//                                                    the parameter in float where the model is in bf16
//   history.<name>                                   F64 [steps], what the program counts
#ifndef HYBRIDATTN_STORE_CHECKPOINT_FILE_HPP
#define HYBRIDATTN_STORE_CHECKPOINT_FILE_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

// A checkpoint's description of itself.
struct CheckpointHeader {
  Index version = 0;                 // of the format
  std::vector<std::string> pattern;  // names of the layers' policies
  std::string dtype;                 // "F32", "F64" or "BF16"
  Index step = 0;
  std::string note;
  nlohmann::json json;  // all of it: "model", "layers", "optimizer", "data", ...
};

namespace checkpoint {

using Json = nlohmann::json;

inline constexpr Index version = 1;
inline constexpr char const* metadata_key = "hybridattn";
inline constexpr std::string_view optimizer_prefix = "optimizer.", history_prefix = "history.";

// A tensor of a run and its address in the backend's memory. An absent tensor has no bytes.
struct StoredTensor {
  std::string name;
  TensorInfo info;
  void const* data = nullptr;
  std::size_t bytes = 0;
};

// A function for zip. It appends each tensor of a group to a list.
struct Collect {
  std::string_view prefix;
  std::vector<StoredTensor>& list;

  template <class T, int Rank, class B> void operator()(Path const& path, Tensor<T, Rank, B> const& tensor) const {
    auto const view = in(tensor);
    std::span<Index const> const shape(view.shape.extent, Rank);
    add(path, safetensors::dtype_of<T>(), shape, view.data, tensor.byte_count());
  }

 private:
  void add(Path const& path, std::string_view dtype, std::span<Index const> shape, void const* data, std::size_t bytes) const {
    list.push_back({std::string(prefix) + path.str(), {std::string(dtype), std::vector<Index>(shape.begin(), shape.end())}, data, bytes});
  }
};
template <class Group> void collect(std::string_view prefix, Group const& group, std::vector<StoredTensor>& list) {
  zip(Collect{prefix, list}, group);
}

}  // namespace checkpoint

// An optimizer's state: numbers, and named groups of tensors with the structure of the parameters.
struct NamedGroups {
  std::vector<checkpoint::StoredTensor> tensors;   // optimizer.<name>.<path>
  nlohmann::json numbers;

  // Adds a group's tensors under this name. They must live until they are written or read.
  template <class Group> void add(std::string_view name, Group const& group) {
    checkpoint::collect(std::string(checkpoint::optimizer_prefix) + std::string(name) + ".", group, tensors);
  }
};

namespace checkpoint {

// Joins the words with spaces. The result is one line, even where a word has line breaks.
inline std::string words(std::vector<std::string> const& list) {
  std::string text;
  for (auto const& word : list) text += (text.empty() ? "" : " ") + word;
  return one_line(text, 1000);
}
inline std::vector<std::string> names_in(Json const& list, std::string const& where) {
  check(list.is_array(), where, "'pattern' must be a list of names");
  std::vector<std::string> names;
  for (Json const& name : list) {
    check(name.is_string(), where, "'pattern' must be a list of names");
    names.push_back(name.get_ref<std::string const&>());
  }
  return names;
}
inline std::string shape_text(std::vector<Index> const& shape) {
  std::string text;
  for (Index const extent : shape) text += (text.empty() ? "" : ", ") + std::to_string(extent);
  return "[" + text + "]";
}

// How an error message shows a value of a file.
inline std::string shown(Json const& value) {
  if (value.is_string()) return escaped(value.get_ref<std::string const&>());
  if (value.is_null()) return "nothing";
  if (value.is_array()) return "a list of " + std::to_string(value.size());
  return value.is_object() ? "a group" : value.dump();
}

// Throws at the first difference, with "model_dim: 128 in the file, 64 in the model". Skips the keys in `ignored`.
struct Comparison {
  std::string const& where;
  char const* ours;   // "model"
  std::span<std::string_view const> ignored;

  void operator()(Json const& file, Json const& model, std::string const& name) const {
    if (file.is_object() && model.is_object()) {
      for (auto it = model.begin(); it != model.end(); ++it) inner(found(file, it.key()), *it, name, it.key());
      for (auto it = file.begin(); it != file.end(); ++it)
        if (!model.contains(it.key())) inner(*it, nothing, name, it.key());
    } else if (file.is_array() && model.is_array() && file.size() == model.size()) {
      for (std::size_t i = 0; i < model.size(); ++i) inner(file[i], model[i], name, std::to_string(i));
    } else {
      check(is_same(file, model), where, one_line(name, 200), ": ", shown(file), " in the file, ", shown(model), " in the ", ours);
    }
  }

 private:
  inline static Json const nothing = {};
  // Where the model has an integer, 2.0 in the file does not equal 2.
  static bool is_same(Json const& file, Json const& model) { return file == model && (file.is_number_float() <= model.is_number_float()); }
  static Json const& found(Json const& json, std::string const& key) { return json.contains(key) ? json[key] : nothing; }
  void inner(Json const& file, Json const& model, std::string const& name, std::string const& key) const {
    if (std::ranges::find(ignored, key) == ignored.end()) (*this)(file, model, name.empty() ? key : name + "." + key);
  }
};

inline Json to_json(DataState const& data) {
  Json json;
  json["description"] = data.description;
  json["seed"] = data.seed;
  json["content"] = data.content;
  json["drawn"] = data.drawn;
  return json;
}

// Writes the tensors, the progress and `json`, which describes the model and the optimizer. Skips absent tensors.
template <class B>
void write(B& backend, std::filesystem::path const& path, Json json, std::vector<StoredTensor> const& tensors, Progress const& progress) {
  check(progress.step >= 0, "checkpoint ", path.string(), ": step ", progress.step, " is not allowed; it must be >= 0");
  SafetensorsWriter writer;
  for (auto const& tensor : tensors)
    if (tensor.bytes > 0) writer.add_elsewhere(tensor.name, tensor.info, {static_cast<char const*>(tensor.data), tensor.bytes});
  for (auto const& [name, numbers] : progress.history)
    writer.add(std::string(history_prefix) + name, {std::ssize(numbers)}, std::span<double const>(numbers));
  json["format_version"] = version;
  json["dtype"] = tensors.front().info.dtype;
  json["step"] = progress.step;
  json["data"] = to_json(progress.data);
  json["note"] = progress.note;
  std::string text;
  try {
    text = json.dump();
  } catch (Json::type_error const&) {
    fail("checkpoint ", path.string(), ": the note, the data's description or a policy's name is not UTF-8");
  }
  writer.add_metadata(metadata_key, std::move(text));
  std::vector<char> host;
  writer.write(path, [&](std::string_view bytes) {
    resize(host, std::ssize(bytes), "a copy of a tensor");
    backend.download(host.data(), bytes.data(), bytes.size());
    return std::string_view(host.data(), host.size());
  });
}

// A checkpoint being read. The constructor throws if the file is not a checkpoint of this version. The checks throw if it does not fit
// the model or the optimizer. Callers check first and then `read`, so a checkpoint that does not fit changes no tensor.
class File {
 public:
  explicit File(std::filesystem::path const& path) : where_("checkpoint " + one_line(path.string()) + ": "), file_(path) {
    check(file_.metadata().contains(metadata_key), where_, "a safetensors file, but no checkpoint: it has no metadata '", metadata_key,
          "'");
    json_ = parse_json(file_.metadata(metadata_key), where_ + "its description: ");
    Index const theirs = count(json_, "format_version");
    check(theirs == version, where_, "its format is version ", theirs, "; this library reads version ", version);
  }

  CheckpointHeader header() && {
    return {.version = count(json_, "format_version"),
            .pattern = pattern(),
            .dtype = text(json_, "dtype"),
            .step = step(),
            .note = text(json_, "note"),
            .json = std::move(json_)};
  }
  Index step() const { return count(json_, "step"); }
  // optimizer() returns the optimizer's numbers, where() how an error about this file begins.
  Json const& optimizer() const { return member("optimizer"); }
  std::string const& where() const { return where_; }

  // `model` is the result of describe(model). `forward_alone` says that the model will not be trained.
  void check_model(Json const& model, std::string const& dtype, bool forward_alone) const {
    auto const theirs = pattern(), ours = names_in(model["pattern"], where_);
    if (theirs != ours) fail(where_, "the file holds ", words(theirs), ", the model is ", words(ours));
    check(text(json_, "dtype") == dtype, where_, "dtype: ", escaped(text(json_, "dtype")), " in the file, '", dtype, "' in the model");
    // Two keys about the initial parameters, and three that only training reads.
    static constexpr std::string_view ignored[] = {"initialization", "gate_start", "balance", "balance_coefficient", "index_loss"};
    Comparison const compare{where_, "model", std::span(ignored).first(forward_alone ? 5 : 2)};
    compare(member("model"), model["model"], "");
    Json const& layers = member("layers");
    check(layers.is_array() && layers.size() == model["layers"].size(), where_, "'layers' does not fit the pattern: it has ", layers.size(),
          " layers, the pattern ", model["layers"].size());
    for (std::size_t i = 0; i < layers.size(); ++i) {
      Json const& layer = model["layers"][i];
      compare(layers[i], layer, "layer " + std::to_string(i) + " (" + layer["policy"].get_ref<std::string const&>() + ")");
    }
  }
  // Throws unless `tensors` are exactly the file's tensors of the model and, with `training`, of the optimizer.
  void check_tensors(std::vector<StoredTensor> const& tensors, bool training) const {
    std::set<std::string> ours;
    for (auto const& tensor : tensors)
      if (tensor.bytes > 0) check_tensor(tensor), ours.insert(tensor.name);
    for (auto const& [name, info] : file_.tensors()) {
      if (name.starts_with(history_prefix) || (!training && name.starts_with(optimizer_prefix))) continue;
      check(ours.contains(name), where_, "tensor ", escaped(name), " is in the file, but not in the model");
    }
  }
  // Reads into the tensors, which must be writable. If the file cannot be read to its end, throws after some tensors have changed.
  template <class B> void read(B& backend, std::vector<StoredTensor> const& tensors) const {
    for (auto const& tensor : tensors)
      if (tensor.bytes > 0) upload(backend, file_.read_bytes(tensor.name), tensor);
  }
  // The same for tensors that already hold a run. Changes all of them or, if it throws, none. Takes memory for a copy of all tensors.
  template <class B> void read_all_or_none(B& backend, std::vector<StoredTensor> const& tensors) const {
    std::vector<std::vector<char>> host;
    for (auto const& tensor : tensors) host.push_back(tensor.bytes > 0 ? file_.read_bytes(tensor.name) : std::vector<char>{});
    for (std::size_t i = 0; i < tensors.size(); ++i)
      if (tensors[i].bytes > 0) upload(backend, host[i], tensors[i]);
  }

  Progress progress() const {
    Json const& data = member("data");
    Progress result{.step = step(),
                    .data = {text(data, "description"), number(data, "seed"), number(data, "content"), number(data, "drawn")},
                    .history = {},
                    .note = text(json_, "note")};
    for (auto const& [name, info] : file_.tensors())
      if (name.starts_with(history_prefix)) result.history[name.substr(history_prefix.size())] = file_.read_doubles(name);
    return result;
  }

 private:
  template <class B> static void upload(B& backend, std::vector<char> const& bytes, StoredTensor const& tensor) {
    backend.upload(const_cast<void*>(tensor.data), bytes.data(), tensor.bytes);
  }
  Json const& member(char const* key) const { return safetensors::member(json_, key, where_); }
  Index count(Json const& json, char const* key) const {
    return safetensors::to_count(safetensors::member(json, key, where_), where_, key);
  }
  std::uint64_t number(Json const& json, char const* key) const {
    Json const& value = safetensors::member(json, key, where_);
    check(value.is_number_unsigned(), where_, key, " must be an integer from 0 to 2^64 - 1");
    return value.get<std::uint64_t>();
  }
  std::string text(Json const& json, char const* key) const {
    Json const& value = safetensors::member(json, key, where_);
    check(value.is_string(), where_, key, " must be text");
    return value.get_ref<std::string const&>();
  }
  std::vector<std::string> pattern() const { return names_in(member("pattern"), where_); }
  void check_tensor(StoredTensor const& tensor) const {
    check(file_.contains(tensor.name), where_, "tensor ", escaped(tensor.name), " is in the model, but not in the file");
    auto const& theirs = file_.info(tensor.name);
    check(theirs.dtype == tensor.info.dtype, where_, "tensor ", escaped(tensor.name), ": dtype ", theirs.dtype, " in the file, ",
          tensor.info.dtype, " in the model");
    check(theirs.shape == tensor.info.shape, where_, "tensor ", escaped(tensor.name), ": shape ", shape_text(theirs.shape),
          " in the file, ", shape_text(tensor.info.shape), " in the model");
  }

  std::string where_;   // how an error begins
  Safetensors file_;
  Json json_;
};

}  // namespace checkpoint
}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/store/checkpoint.hpp
// A checkpoint is a file with a model and all that a training run needs to go on. It is a safetensors file, which other programs
// read too; checkpoint/file.hpp says what is in it.
//
//   auto const header = read_checkpoint_header("run.safetensors");
//   Model const model{checkpoint_config<Model>(header)};
//   auto const params = load_parameters<float>(cpu, "run.safetensors", model);
//
// The functions here know no optimizer. The caller passes an optimizer's state as NamedGroups; train/checkpoint.hpp does so for AdamW.
#ifndef HYBRIDATTN_STORE_CHECKPOINT_HPP
#define HYBRIDATTN_STORE_CHECKPOINT_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

namespace checkpoint {

template <class Params> std::vector<StoredTensor> tensors_of(Params const& params) {
  std::vector<StoredTensor> list;
  collect("", params, list);
  return list;
}
template <class Params> std::vector<StoredTensor> tensors_of(Params const& params, NamedGroups const& optimizer) {
  auto list = tensors_of(params);
  list.insert(list.end(), optimizer.tensors.begin(), optimizer.tensors.end());
  return list;
}

}  // namespace checkpoint

// Writes a run to a file. If this fails, throws Error with the file's name and leaves an older file of that name as it was.
template <class B, class Model, class Params>
void save_checkpoint(B& backend, std::filesystem::path const& path, Model const& model, Params const& params, NamedGroups const& optimizer,
                     Progress const& progress = {}) {
  auto json = checkpoint::describe(model);
  json["optimizer"] = optimizer.numbers;
  checkpoint::write(backend, path, std::move(json), checkpoint::tensors_of(params, optimizer), progress);
}

// Reads parameters and the optimizer's groups from a file. check_numbers(numbers, where) gets the optimizer's numbers from the file and
// must throw an Error that begins with `where` if they do not fit. Throws Error if the file is damaged, cannot be read to its end, or
// has another pattern, size, dtype or version than the model; it names both. Parameters and groups then have their old values.
template <class B, class Model, class Params, class CheckNumbers>
Progress load_checkpoint(B& backend, std::filesystem::path const& path, Model const& model, Params& params, NamedGroups const& optimizer,
                         CheckNumbers check_numbers) {
  checkpoint::File const file{path};
  auto const tensors = checkpoint::tensors_of(params, optimizer);
  file.check_model(checkpoint::describe(model), tensors.front().info.dtype, false);
  check_numbers(file.optimizer(), file.where());
  file.check_tensors(tensors, true);
  auto progress = file.progress();
  file.read_all_or_none(backend, tensors);
  return progress;
}

// Reads the parameters alone, for a model that is not trained any more. Settings that only training reads may differ from the file's.
//   auto const params = load_parameters<float>(cpu, "run.safetensors", model);
template <class T, class B, class Model> auto load_parameters(B& backend, std::filesystem::path const& path, Model const& model) {
  checkpoint::File const file{path};
  std::error_code ignored;   // an unreadable file is an error of File::read
  auto const needed = bytes<T>(model.params()), there = static_cast<std::size_t>(std::filesystem::file_size(path, ignored));
  check(needed <= there, "checkpoint ", one_line(path.string()), ": the model's parameters take ", needed, " bytes, the whole file has ",
        there);
  auto params = allocate_together<T>(backend, model.params());
  auto const tensors = checkpoint::tensors_of(params);
  file.check_model(checkpoint::describe(model), tensors.front().info.dtype, true);
  file.check_tensors(tensors, false);
  file.read(backend, tensors);
  return params;
}

// Returns the configuration of a checkpoint's model. Model must have the checkpoint's pattern. read_checkpoint_header makes the header.
template <class Model> typename Model::Config checkpoint_config(CheckpointHeader const& header) {
  return checkpoint::configuration<Model>(header.json, "checkpoint: ");
}

// Reads a file's pattern, configuration and step, but no tensor.
inline CheckpointHeader read_checkpoint_header(std::filesystem::path const& path) { return checkpoint::File{path}.header(); }

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/store/hugging_face/family.hpp
// What the library must know of a family of released models. A family is one constant of type Family in a header of its own, such as
// qwen3_next.hpp, and one word in the list of families.hpp. A program adds families of its own by ReadOptions::families.
#ifndef HYBRIDATTN_STORE_HUGGING_FACE_FAMILY_HPP
#define HYBRIDATTN_STORE_HUGGING_FACE_FAMILY_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::hugging_face {

using Json = nlohmann::json;

// How a released tensor holds fields of the model. Each field is [rows, ...].
enum class Layout {
  stacked,      // all rows of the first field, then those of the next; a single field as it is
  convolution,  // stacked, with an axis between: [channels, 1, width]
  by_head,      // for each of the layer's num_heads its rows of each field
  by_expert,    // [E, rows, C]: for each expert its rows of each field
  each_expert   // a tensor of its own for each expert; {} in the name is its number
};

// One released tensor: its name and, in order, the paths of the model's fields that it holds.
struct Row {
  std::string_view name, fields;
  Layout layout = Layout::stacked;
};

// Rows that stand in one place of a model.
struct RowGroup {
  enum class Place {
    model,       // names after Format::prefix, paths as they are
    outside,     // names and paths as they are
    each_layer,  // names after prefix and layers.3., paths after blocks.3.
    kind         // the same, in layers of one kind alone
  };
  // A folder has the experts of a layer together in common tensors (fused), or each one in tensors of its own (apart).
  enum class Experts { either, apart, fused };

  Place place;
  std::span<Row const> rows;
  std::string_view name = "", field = "";   // before the names and the paths of the rows
  char letter = 0;                          // of Place::kind
  Experts experts = Experts::either;        // the folders that have these rows
};

// A kind of layer: the word for it in layer_types, its letter in pattern(), and the name of the policy that computes it.
struct LayerKind {
  std::string_view word;
  char letter;
  std::string_view policy;
};

struct Family;

// The contents of a config.json in the library's terms.
struct Settings {
  std::string where;   // how an error begins
  Family const* family = nullptr;
  std::string pattern;                     // a letter for each layer
  Json model = Json::object();             // "model" of a checkpoint's description: vocab_size, model_dim, feed_forward, ...
  std::map<char, Json> layers;             // of each letter {"options", "sizes", "norm_placement"}, as a checkpoint describes a layer
  Json of_family = Json::object();         // what only the family's own functions read

  // Sets the options and the sizes of a kind of layer. Both are structs of its policy.
  template <class Options, class Config> void set_layer(char letter, Options const& options, Config const& config) {
    checkpoint::to_json(layers[letter]["options"], options);
    checkpoint::to_json(layers[letter]["sizes"], config);
  }
  // Reads a struct that has members(config, f), as in settings.read<full::Config>(settings.layers.at('F')["sizes"]).
  template <class Members> Members read(Json const& json) const {
    Members result{};
    members(result, checkpoint::Read{json, where});
    return result;
  }
};

class Fields;

struct Family {
  std::string_view model_type;     // of config.json
  std::string_view architecture;   // the class name that `save` writes
  // The model_type of folders whose text_config is such a config.json. Empty if there are no such folders.
  std::string_view wrapper = "";
  std::span<LayerKind const> kinds;
  std::span<RowGroup const> tensors;

  // Reads the fields into all settings but where and family. Throws, naming the field, at a value that is not supported.
  void (*read)(Fields& fields, Settings& settings);
  // Throws if a model's options of a kind of layer compute something else than the folder asks for.
  void (*check_options)(Settings const& settings, char letter, Json const& options);
  // Completes the settings that were made from a model. Throws if no released model of the family has such settings.
  void (*check_model)(Settings& settings);
  // Returns the fields of a config.json that `read` reads as these settings, except model_type and architectures.
  Json (*write)(Settings const& settings);

  LayerKind const* kind_of_word(std::string_view word) const {
    return find([&](LayerKind const& kind) { return kind.word == word; });
  }
  LayerKind const* kind_of_letter(char letter) const {
    return find([&](LayerKind const& kind) { return kind.letter == letter; });
  }
  LayerKind const* kind_of_policy(std::string_view policy) const {
    return find([&](LayerKind const& kind) { return kind.policy == policy; });
  }
  // "linear_attention and full_attention"
  std::string words() const {
    std::string list;
    for (std::size_t i = 0; i < kinds.size(); ++i) list.append(i == 0 ? "" : i + 1 < kinds.size() ? ", " : " and ").append(kinds[i].word);
    return list;
  }

 private:
  template <class Is> LayerKind const* find(Is is) const {
    auto const found = std::ranges::find_if(kinds, is);
    return found == kinds.end() ? nullptr : &*found;
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::hugging_face
#endif

// ==== hybridattn/store/hugging_face/fields.hpp
// Reads the fields of a config.json. A field that is not read and not known to be harmless is an error.
#ifndef HYBRIDATTN_STORE_HUGGING_FACE_FIELDS_HPP
#define HYBRIDATTN_STORE_HUGGING_FACE_FIELDS_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::hugging_face {

struct ReadOptions {
  // Fields of config.json that are read as if they were absent, such as "conv_window" or "rope_parameters.factor".
  std::vector<std::string> ignore = {};
  // Families that the folder may be of, besides those that the library knows.
  std::vector<Family const*> families = {};
};

namespace detail {

// Fields that do not change what a text model computes. A * stands for any letters.
struct Harmless {
  std::string_view names;
  std::string_view values = "any";   // the harmless values, as JSON. If empty, only null is harmless
  std::string_view same_as = "";     // a field whose value is harmless here too
};

inline constexpr Harmless harmless[] = {
    // Who made the file, from what, and with which library.
    {"_* architectures auto_map name_or_path model_name base_model* finetuning_task library_name license* author* tags datasets "
     "pipeline_tag language version *_version transformers* unsloth* commit_hash *_commit_hash push_to_hub hub_* run_name wandb_*"},
    // How numbers are stored and computed with.
    {"dtype *_dtype use_bfloat16 bf16 fp16 attn_implementation experts_implementation use_flash_attn use_flash_attention* flash_attn* "
     "use_kernels device_map trust_remote_code low_cpu_mem_usage torchscript *_tp_plan *_pp_plan *_ep_plan tensor_parallel_size fuse_norm "
     "fuse_swiglu fuse_cross_entropy use_cache cache_implementation chunk_size_feed_forward tf_legacy_loss"},
    // Tokens, and the length of the texts that a model was trained with.
    {"tokenizer* processor_class *_token_id *_token_ids *_token_index bos_token eos_token pad_token unk_token sep_token cls_token "
     "mask_token "
     "special_tokens* added_tokens* additional_special_tokens add_bos_token add_eos_token add_prefix_space padding_side truncation_side "
     "chat_template* vocab_file merges_file model_max_length max_position_embeddings original_max_position_embeddings max_window_layers "
     "max_seq_len max_seq_length max_sequence_length seq_length n_positions n_ctx context_length"},
    // What a model is asked to return, and how texts are generated.
    {"output_attentions output_hidden_states output_scores return_dict return_dict_in_generate use_return_dict id2label label2id "
     "num_labels "
     "problem_type task_specific_params keys_to_ignore_at_inference remove_invalid_values is_decoder generation_config do_sample "
     "temperature top_k top_p min_p typical_p num_beams num_beam_groups num_return_sequences max_length min_length max_new_tokens "
     "min_new_tokens repetition_penalty length_penalty diversity_penalty early_stopping no_repeat_ngram_size encoder_no_repeat_ngram_size "
     "bad_words_ids suppress_tokens begin_suppress_tokens exponential_decay_length_penalty prefix"},
    // How it was started and trained.
    {"initializer_* init_std init_method embedding_initializer_range train_* trained_* training_* trainer_* gradient_checkpointing* "
     "use_reentrant neftune_noise_alpha seed *_seed"},
    // Draft heads, and encoders of images and sound, which are skipped. Positions on several axes, which are equal for a text.
    {"mtp_* num_nextn_predict_layers mrope_* vision_config audio_config vision_* image_* video_* audio_* language_model_only"},
    // The values that the library computes with in any case.
    {"hidden_act hidden_activation activation_function", R"("silu", "swish")"},
    {"output_gate_type", R"("swish", "silu")"},
    {"attn_output_gate qk_norm use_qk_norm qk_layernorm use_qk_layernorm is_causal causal use_rope", "true"},
    {"bias *_bias is_encoder_decoder add_cross_attention tie_encoder_decoder use_sliding_window rope_interleave* load_in_*bit", "false"},
    {"*dropout* *_pdrop router_jitter_noise router_z_loss_coef z_loss* label_smoothing*", "0"},
    {"pretraining_tp factor attention_factor *_multiplier logit_scale logits_scaling", "1"},
    {"rope_type type", R"("default")"},
    {"pruned_heads", "{}"},
    {"num_experts num_local_experts n_routed_experts", "0"},
    // Other libraries' names for a field. They must have that field's value.
    {"num_local_experts n_routed_experts", "", "num_experts"},
    {"moe_topk num_experts_per_token", "", "num_experts_per_tok"},
    {"d_model n_embd dim", "", "hidden_size"},
    {"n_layer n_layers num_layers", "", "num_hidden_layers"},
    {"n_head n_heads num_heads", "", "num_attention_heads"},
    {"num_kv_heads n_kv_heads", "", "num_key_value_heads"},
    {"ffn_dim n_inner ffn_hidden_size", "", "intermediate_size"},
    {"layer_norm_eps layer_norm_epsilon norm_eps norm_epsilon", "", "rms_norm_eps"},
    {"padded_vocab_size", "", "vocab_size"},
    // Fields that are not supported.
    {"quantization* compression_config sliding_window", ""}};

// Fields that only a model with experts reads.
inline constexpr std::string_view of_experts =
    "output_router_logits router_* num_experts_per_tok moe_* shared_expert_intermediate_size norm_topk_prob decoder_sparse_step "
    "mlp_only_layers";

inline bool matches(std::string_view pattern, std::string_view name) {
  std::size_t p = 0, n = 0, star = pattern.npos, from = 0;   // the last star, and where its letters end
  while (n < name.size()) {
    if (p < pattern.size() && pattern[p] == '*') star = p++, from = n;
    else if (p < pattern.size() && pattern[p] == name[n]) ++p, ++n;
    else if (star != pattern.npos) p = star + 1, n = ++from;
    else return false;
  }
  return pattern.find_first_not_of('*', p) == pattern.npos;
}
inline bool matches_any(std::string_view patterns, std::string_view name) {
  while (!patterns.empty()) {
    auto const end = std::min(patterns.find(' '), patterns.size());
    if (matches(patterns.substr(0, end), name)) return true;
    patterns.remove_prefix(std::min(end + 1, patterns.size()));
  }
  return false;
}

inline std::string shown(Json const& value) {   // in letters of ASCII
  std::string const text = value.dump(-1, ' ', true, Json::error_handler_t::replace);
  return text.size() > 80 ? text.substr(0, 80) + "..." : text;
}

// Larger than any size of a real model. The product of three such sizes does not overflow.
inline constexpr Index largest_size = 1 << 20, max_layers = 10'000;

inline bool is_mixed(FeedForwardConfig const& c, Index layers) {
  for (Index layer = 0; layer < layers; ++layer)
    if (c.is_mixture(layer)) return true;
  return false;
}

}  // namespace detail

// An object of a config.json; each field that is asked for counts as known.
class Fields {
 public:
  Fields(Json const& object, std::string where, ReadOptions const& options, std::string path = "")
      : object_(object), where_(std::move(where)), path_(std::move(path)), options_(options) {
    check(object.is_object(), where_, "not a JSON object");
  }
  // Returns an object inside this one.
  Fields inside(std::string const& name) { return {at(name), where_ + name + ": ", options_, path_ + name + "."}; }

  // A field that is null counts as absent.
  bool has(std::string const& name) {
    known_.insert(name);
    return object_.contains(name) && !object_[name].is_null() && !is_ignored(name);
  }
  Json const& at(std::string const& name) {
    check(has(name), where_, "the field ", name, " is missing");
    return object_[name];
  }
  Index size(std::string const& name, Index smallest = 1, Index largest = detail::largest_size) {
    return integer(name, at(name), smallest, largest);
  }
  Index size_or(std::string const& name, Index otherwise) { return has(name) ? size(name) : otherwise; }
  std::vector<Index> sizes_or_none(std::string const& name, std::size_t most) {
    std::vector<Index> result;
    if (!has(name)) return result;
    check(at(name).is_array() && at(name).size() <= most, where_, name, " is ", detail::shown(at(name)), "; it must be a list of at most ",
          most, " integers");
    for (auto const& element : at(name)) result.push_back(integer("an element of " + name, element, 0, detail::largest_size));
    return result;
  }
  double real_or(std::string const& name, double otherwise, double smallest, double largest) {
    if (!has(name)) return otherwise;
    bool const fits = at(name).is_number() && smallest <= at(name).get<double>() && at(name).get<double>() <= largest;
    check(fits, where_, name, " is ", detail::shown(at(name)), "; it must be a number from ", smallest, " to ", largest);
    return at(name).get<double>();
  }
  bool flag_or(std::string const& name, bool otherwise) {
    if (!has(name)) return otherwise;
    check(at(name).is_boolean(), where_, name, " is ", detail::shown(at(name)), "; it must be true or false");
    return at(name).get<bool>();
  }
  // Whether the field has this value. This does not count as reading it.
  bool says(std::string const& name, Json const& value) const { return object_.contains(name) && object_[name] == value; }
  // Declares fields of these names harmless.
  void pass_over(std::string_view patterns) { passed_over_ += std::string(patterns) + " "; }

  // Throws at a field that was not read and is not harmless. This object may repeat fields of `inner`.
  void check_all_known(Json const* inner = nullptr) const {
    for (auto const& [name, value] : object_.items()) {
      bool const repeated = inner != nullptr && inner->contains(name) && (*inner)[name] == value;
      if (known_.contains(name) || value.is_null() || is_ignored(name) || repeated || detail::matches_any(passed_over_, name)) continue;
      check_harmless(name, value);
    }
  }
  std::string const& where() const { return where_; }

 private:
  bool is_ignored(std::string const& name) const { return std::ranges::find(options_.ignore, path_ + name) != options_.ignore.end(); }
  Index integer(std::string const& name, Json const& value, Index smallest, Index largest) const {
    bool const fits = value.is_number_unsigned() ? value.get<std::uint64_t>() <= static_cast<std::uint64_t>(largest)
                                                 : value.is_number_integer() && value.get<std::int64_t>() <= largest;
    check(fits && value.get<Index>() >= smallest, where_, name, " is ", detail::shown(value), "; it must be an integer from ", smallest,
          " to ", largest);
    return value.get<Index>();
  }

  void check_harmless(std::string const& name, Json const& value) const {
    std::string supported;
    bool is_named = false;
    for (detail::Harmless const& row : detail::harmless) {
      if (!detail::matches_any(row.names, name)) continue;
      if (row.values == "any" || has_value(row, value)) return;
      is_named = is_named || row.same_as.empty();
      if (supported.empty()) supported = row.values;
    }
    std::string const field = one_line(name, 80), hint = to_ignore(one_line(path_ + name, 200));
    check(is_named, where_, "the field ", field, " (", detail::shown(value),
          ") is unknown; it may change what the model computes, which would not be the model that was released. ", hint);
    fail(where_, field, " is ", detail::shown(value), supported.empty() ? "; it is not supported. " : "; supported is " + supported + ". ",
         hint);
  }
  bool has_value(detail::Harmless const& row, Json const& value) const {
    std::string const other{row.same_as};
    if (!other.empty()) return object_.contains(other) && object_[other] == value;
    auto const values = Json::parse("[" + std::string(row.values) + "]");
    return std::ranges::find(values, value) != values.end();
  }
  static std::string to_ignore(std::string const& field) {
    return "To read the folder as if the field were not there: ReadOptions{.ignore = {\"" + field + "\"}}, or generate --ignore-field " +
           field;
  }

  Json const& object_;
  std::string where_, path_;   // how an error begins, and what stands before a field's name in ReadOptions::ignore
  ReadOptions const& options_;
  std::set<std::string> known_;
  std::string passed_over_;
};

// Reads the layers as most config.json files have them, a word for each layer in layer_types. Without layer_types, every interval-th
// layer is of the family's last kind and the others are of its first kind.
inline std::string read_layer_types(Fields& fields, Family const& family, Index interval) {
  Index const depth = fields.size("num_hidden_layers", 1, detail::max_layers);
  std::string letters;
  if (!fields.has("layer_types")) {
    for (Index i = 1; i <= depth; ++i) letters += (i % interval == 0 ? family.kinds.back() : family.kinds.front()).letter;
    return letters;
  }
  auto const& types = fields.at("layer_types");
  check(types.is_array() && static_cast<Index>(types.size()) == depth, fields.where(), "layer_types is ", detail::shown(types),
        "; it must name num_hidden_layers = ", depth, " layers");
  for (auto const& type : types) {
    auto const* const kind = type.is_string() ? family.kind_of_word(type.get_ref<std::string const&>()) : nullptr;
    check(kind != nullptr, fields.where(), "layer_types has ", detail::shown(type), "; supported are ", family.words());
    letters += kind->letter;
  }
  return letters;
}
inline void write_layer_types(Settings const& s, Json& json) {
  json["num_hidden_layers"] = s.pattern.size();
  json["layer_types"] = Json::array();
  for (char const letter : s.pattern) json["layer_types"].push_back(s.family->kind_of_letter(letter)->word);
}

namespace detail {

// Reads a JSON file of at most `largest` bytes.
inline std::string read_json_text(std::filesystem::path const& path, std::size_t largest) {
  std::string const where = one_line(path.string()) + ": ";
  std::string text = read_regular_file(path, largest, where);
  if (auto const kind = kind_of_file(std::string_view(text).substr(0, 512)); !kind.empty()) fail(where, "it is no JSON, but ", kind);
  return text;
}

}  // namespace detail
}  // namespace hybridattn::inline HYBRIDATTN_ABI::hugging_face
#endif

// ==== hybridattn/store/hugging_face/qwen.hpp
// The common part of Qwen's families: layers of Gated DeltaNet and of full attention, and most fields of config.json.
#ifndef HYBRIDATTN_STORE_HUGGING_FACE_QWEN_HPP
#define HYBRIDATTN_STORE_HUGGING_FACE_QWEN_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::hugging_face::qwen {

inline constexpr LayerKind kinds[] = {{"linear_attention", 'L', GDN::name}, {"full_attention", 'F', Full::name}};

inline constexpr Row whole_model_rows[] = {{"embed_tokens.weight", "embedding"}, {"norm.weight", "norm"}};
inline constexpr Row head_rows[] = {{"lm_head.weight", "head"}};
inline constexpr Row block_rows[] = {{"input_layernorm.weight", "attention_norm"},
                                     {"post_attention_layernorm.weight", "feed_forward_norm"}};
inline constexpr Row gdn_rows[] = {{"conv1d.weight", "prepare.conv_q prepare.conv_k prepare.conv_v", Layout::convolution},
                                   {"A_log", "prepare.a_log"},
                                   {"dt_bias", "prepare.dt_bias"},
                                   {"norm.weight", "finish.norm"},
                                   {"out_proj.weight", "w_o"}};
inline constexpr Row full_rows[] = {{"q_proj.weight", "w.q w_gate", Layout::by_head},
                                    {"k_proj.weight", "w.k"},
                                    {"v_proj.weight", "w.v"},
                                    {"o_proj.weight", "w_o"},
                                    {"q_norm.weight", "prepare.q_norm"},
                                    {"k_norm.weight", "prepare.k_norm"}};
inline constexpr Row dense_rows[] = {
    {"gate_proj.weight", "dense.gate"}, {"up_proj.weight", "dense.up"}, {"down_proj.weight", "dense.down"}};

// The key in Settings::of_family for the share of a head that rotary positions turn.
inline constexpr char const* rotary_share = "rotary_share";

// How many dimensions of a head turn, rounded as in the released models.
inline Index rotary_dim(double share, Index head_dim) { return static_cast<Index>(static_cast<double>(head_dim) * share); }

inline full::Config full_sizes(Settings const& s) { return s.read<full::Config>(s.layers.at('F')["sizes"]); }
inline gdn::Config gdn_sizes(Settings const& s) { return s.read<gdn::Config>(s.layers.at('L')["sizes"]); }
inline FeedForwardConfig feed_forward(Settings const& s) { return s.read<FeedForwardConfig>(s.model["feed_forward"]); }
inline RmsNorm::Options norm(Settings const& s) { return s.read<RmsNorm::Options>(s.model["norm"]); }

// Rotary fields stand among the other fields, as in the first releases, or in an object of their own. Throws if the two differ.
inline void read_rotary(Fields& fields, double& theta, double& share) {
  struct Rotary {
    char const* name;
    double& value;
    double smallest, largest;
    bool is_given = false;
  };
  Rotary values[] = {{"rope_theta", theta, 1e-6, 1e30}, {"partial_rotary_factor", share, 0, 1}};
  auto const read = [&](Fields& from) {
    for (auto& [name, value, smallest, largest, is_given] : values) {
      double const here = from.real_or(name, value, smallest, largest);
      check(!is_given || here == value, from.where(), name, " is ", here, ", but ", value, " outside");
      value = here;
      is_given = is_given || from.has(name);
    }
  };
  read(fields);
  for (auto const* object : {"rope_scaling", "rope_parameters"}) {
    if (!fields.has(object)) continue;
    Fields inner = fields.inside(object);
    read(inner);
    inner.check_all_known();
  }
}

// Reads all fields but those of the feed-forward layers.
inline void read_common(Fields& fields, Settings& s) {
  s.pattern = read_layer_types(fields, *s.family, fields.size_or("full_attention_interval", 4));
  Json& model = s.model;
  model["vocab_size"] = fields.size("vocab_size");
  model["model_dim"] = fields.size("hidden_size");
  double const eps = fields.real_or("rms_norm_eps", 1e-6, 0, 1), range = fields.real_or("initializer_range", 0.02, 0, 1e6);
  checkpoint::to_json(model["norm"], RmsNorm::Options{NormWeight::zero_centred, eps});
  checkpoint::to_json(model["initialization"], Initialization{range, range});
  model["tie_embedding"] = fields.flag_or("tie_word_embeddings", false);
  gdn::Config const linear{.num_heads = fields.size("linear_num_key_heads"),
                           .num_value_heads = fields.size("linear_num_value_heads"),
                           .key_dim = fields.size("linear_key_head_dim"),
                           .value_dim = fields.size("linear_value_head_dim"),
                           .norm_eps = eps};
  s.set_layer('L', GdnOptions{.conv_width = static_cast<int>(fields.size_or("linear_conv_kernel_dim", 4))}, linear);
  full::Config full{.num_heads = fields.size("num_attention_heads"),
                    .num_kv_heads = fields.size("num_key_value_heads"),
                    .head_dim = fields.size("head_dim"),
                    .norm_eps = eps};
  full.rope_theta = 10000;
  double share = 0.25;
  read_rotary(fields, full.rope_theta, share);
  s.set_layer('F', FullOptions{}, full);
  s.of_family[rotary_share] = share;
  model["num_heads"] = full.num_heads;
  if (fields.says("use_sliding_window", false)) fields.pass_over("sliding_window");
}
inline FeedForwardConfig read_dense(Fields& fields) { return {.hidden_dim = fields.size("intermediate_size")}; }

inline void check_gdn(Settings const& s, GdnOptions const& o) {
  auto const width = s.layers.at('L')["options"]["conv_width"].get<int>();
  check(o.conv_width == width, s.where, "linear_conv_kernel_dim is ", width,
        ", but the model's GdnOptions have conv_width = ", o.conv_width);
  check(o.output_gate, s.where, "model_type ", s.family->model_type, " gates linear attention's output, but the model's GdnOptions have ",
        "output_gate = false");
  check(!o.negative_eigenvalues, s.where, "model_type ", s.family->model_type, " has beta in (0, 1), but the model's GdnOptions have ",
        "negative_eigenvalues = true");
}
inline void check_full(Settings const& s, FullOptions const& o) {
  auto const share = s.of_family[rotary_share].get<double>();
  Index const head_dim = full_sizes(s).head_dim, dim = rotary_dim(share, head_dim), ours = rotary_size(head_dim, o.rotary_percent);
  check(dim == ours, s.where, "partial_rotary_factor ", share, " turns ", dim, " of head_dim ", head_dim,
        ", but the model's FullOptions have rotary_percent = ", o.rotary_percent, ", which turns ", ours);
  check(o.window == 0, s.where, "no sliding_window is in use, but the model's FullOptions have window = ", o.window);
  check(o.output_gate, s.where, "attn_output_gate is true, but the model's FullOptions have output_gate = false");
  check(o.qk_norm == QkNorm::zero_centred, s.where, "model_type ", s.family->model_type,
        " has zero-centred q_norm and k_norm, but the model's FullOptions have another qk_norm");
  check(o.rotary == Rotary::half_split, s.where, "model_type ", s.family->model_type,
        " turns halves of a head, but the model's FullOptions have Rotary::interleaved");
}
inline void check_options(Settings const& s, char letter, Json const& options) {
  if (letter == 'L') check_gdn(s, s.read<GdnOptions>(options));
  else check_full(s, s.read<FullOptions>(options));
}

// Throws if a size that config.json has no field for is not the one that follows from the others.
template <class Policy> void check_derived(Settings const& s, typename Policy::Config const& c) {
  auto derived = c;
  derived.scale = 0;
  derived = Policy::complete(derived, s.model["model_dim"].get<Index>(), c.num_heads);
  check(c.scale == derived.scale, s.where, "the scale of ", Policy::name, " is ", c.scale, ", not ", derived.scale);
  check(c.norm_eps == norm(s).eps, s.where, "the norm_eps of ", Policy::name, " is ", c.norm_eps, ", that of the blocks ", norm(s).eps);
}
// Sets the sizes of a kind of layer that the model does not have, because config.json has fields for both kinds.
inline void set_absent_layers(Settings& s) {
  Index const heads = s.model["num_heads"].get<Index>(), dim = std::max<Index>(s.model["model_dim"].get<Index>() / heads, 1);
  if (!s.layers.contains('F')) s.set_layer('F', FullOptions{}, full::Config{.num_heads = heads, .num_kv_heads = heads, .head_dim = dim});
  if (!s.layers.contains('L'))
    s.set_layer('L', GdnOptions{}, gdn::Config{.num_heads = heads, .num_value_heads = heads, .key_dim = dim, .value_dim = dim});
}
inline void check_model(Settings& s) {
  for (auto const& [letter, layer] : s.layers)
    check(!layer.contains("norm_placement"), s.where, "a layer's norms come after attention and feed-forward; they must come before");
  if (s.layers.contains('L')) check_derived<GDN>(s, gdn_sizes(s));
  if (s.layers.contains('F')) check_derived<Full>(s, full_sizes(s));
  s.of_family[rotary_share] = 0.25;
  if (s.layers.contains('F')) {
    auto const percent = s.layers['F']["options"]["rotary_percent"].get<int>();
    Index const head_dim = full_sizes(s).head_dim, dim = rotary_size(head_dim, percent);
    double const share = percent / 100.0;
    s.of_family[rotary_share] = rotary_dim(share, head_dim) == dim ? share : static_cast<double>(dim) / static_cast<double>(head_dim);
  }
  set_absent_layers(s);
  check(norm(s).weight == NormWeight::zero_centred, s.where, "its norms are plain, not zero-centred");
  check(feed_forward(s).gated, s.where, "its feed-forward layers have no gate");
}

inline Json write_common(Settings const& s) {
  auto const full = full_sizes(s);
  auto const gdn = gdn_sizes(s);
  double const deviation = s.read<Initialization>(s.model["initialization"]).linear_deviation;
  Json json = {{"attention_bias", false},
               {"attention_dropout", 0.0},
               {"hidden_act", "silu"},
               {"vocab_size", s.model["vocab_size"]},
               {"hidden_size", s.model["model_dim"]},
               {"intermediate_size", feed_forward(s).hidden_dim},
               {"tie_word_embeddings", s.model["tie_embedding"]},
               {"rms_norm_eps", norm(s).eps},
               {"initializer_range", deviation != 0 ? deviation : 0.02},
               {"num_attention_heads", full.num_heads},
               {"num_key_value_heads", full.num_kv_heads},
               {"head_dim", full.head_dim},
               {"linear_num_key_heads", gdn.num_heads},
               {"linear_num_value_heads", gdn.num_value_heads},
               {"linear_key_head_dim", gdn.key_dim},
               {"linear_value_head_dim", gdn.value_dim},
               {"linear_conv_kernel_dim", s.layers.at('L')["options"]["conv_width"]},
               {"rope_parameters",
                {{"rope_type", "default"}, {"rope_theta", full.rope_theta}, {"partial_rotary_factor", s.of_family[rotary_share]}}}};
  write_layer_types(s, json);
  return json;
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::hugging_face::qwen
#endif

// ==== hybridattn/store/hugging_face/qwen3_5.hpp
// The text models of Qwen3.5. Gated DeltaNet's projections are stacked one after the other, and all feed-forward layers are dense.
#ifndef HYBRIDATTN_STORE_HUGGING_FACE_QWEN3_5_HPP
#define HYBRIDATTN_STORE_HUGGING_FACE_QWEN3_5_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::hugging_face {

namespace qwen {

inline constexpr Row gdn_split_rows[] = {
    {"in_proj_qkv.weight", "w.q w.k w.v"}, {"in_proj_z.weight", "w_gate"}, {"in_proj_b.weight", "w.beta"}, {"in_proj_a.weight", "w.g"}};
inline constexpr RowGroup qwen3_5_tensors[] = {{RowGroup::Place::model, whole_model_rows},
                                               {RowGroup::Place::outside, head_rows},
                                               {RowGroup::Place::each_layer, block_rows},
                                               {RowGroup::Place::kind, gdn_rows, "linear_attn.", "attention.", 'L'},
                                               {RowGroup::Place::kind, gdn_split_rows, "linear_attn.", "attention.", 'L'},
                                               {RowGroup::Place::kind, full_rows, "self_attn.", "attention.", 'F'},
                                               {RowGroup::Place::each_layer, dense_rows, "mlp.", "feed_forward."}};

inline void read_qwen3_5(Fields& fields, Settings& s) {
  read_common(fields, s);
  checkpoint::to_json(s.model["feed_forward"], read_dense(fields));
  fields.pass_over(detail::of_experts);
}
inline void check_qwen3_5(Settings& s) {
  check_model(s);
  check(!detail::is_mixed(feed_forward(s), std::ssize(s.pattern)), s.where, "it has mixtures of experts; only qwen3_next has them");
}

}  // namespace qwen

inline constexpr Family qwen3_5_text{.model_type = "qwen3_5_text",
                                     .architecture = "Qwen3_5ForCausalLM",
                                     .wrapper = "qwen3_5",
                                     .kinds = qwen::kinds,
                                     .tensors = qwen::qwen3_5_tensors,
                                     .read = qwen::read_qwen3_5,
                                     .check_options = qwen::check_options,
                                     .check_model = qwen::check_qwen3_5,
                                     .write = qwen::write_common};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::hugging_face
#endif

// ==== hybridattn/store/hugging_face/qwen3_next.hpp
// Qwen3-Next. Gated DeltaNet's projections are fused head by head, and feed-forward layers are dense or mixtures of experts.
#ifndef HYBRIDATTN_STORE_HUGGING_FACE_QWEN3_NEXT_HPP
#define HYBRIDATTN_STORE_HUGGING_FACE_QWEN3_NEXT_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::hugging_face {

namespace qwen {

inline constexpr Row gdn_fused_rows[] = {{"in_proj_qkvz.weight", "w.q w.k w.v w_gate", Layout::by_head},
                                         {"in_proj_ba.weight", "w.beta w.g", Layout::by_head}};
inline constexpr Row mixture_rows[] = {{"gate.weight", "router"},
                                       {"shared_expert.gate_proj.weight", "shared.gate"},
                                       {"shared_expert.up_proj.weight", "shared.up"},
                                       {"shared_expert.down_proj.weight", "shared.down"},
                                       {"shared_expert_gate.weight", "shared_gate"}};
inline constexpr Row experts_apart_rows[] = {{"experts.{}.gate_proj.weight", "experts.gate", Layout::each_expert},
                                             {"experts.{}.up_proj.weight", "experts.up", Layout::each_expert},
                                             {"experts.{}.down_proj.weight", "experts.down", Layout::each_expert}};
inline constexpr Row experts_fused_rows[] = {{"experts.gate_up_proj", "experts.gate experts.up", Layout::by_expert},
                                             {"experts.down_proj", "experts.down", Layout::by_expert}};
inline constexpr RowGroup qwen3_next_tensors[] = {
    {RowGroup::Place::model, whole_model_rows},
    {RowGroup::Place::outside, head_rows},
    {RowGroup::Place::each_layer, block_rows},
    {RowGroup::Place::kind, gdn_rows, "linear_attn.", "attention.", 'L'},
    {RowGroup::Place::kind, gdn_fused_rows, "linear_attn.", "attention.", 'L'},
    {RowGroup::Place::kind, full_rows, "self_attn.", "attention.", 'F'},
    {RowGroup::Place::each_layer, dense_rows, "mlp.", "feed_forward."},
    {RowGroup::Place::each_layer, mixture_rows, "mlp.", "feed_forward."},
    {RowGroup::Place::each_layer, experts_apart_rows, "mlp.", "feed_forward.", 0, RowGroup::Experts::apart},
    {RowGroup::Place::each_layer, experts_fused_rows, "mlp.", "feed_forward.", 0, RowGroup::Experts::fused}};

inline FeedForwardConfig read_mixture(Fields& fields, FeedForwardConfig c) {
  c.num_experts = fields.size("num_experts", 0);
  if (c.num_experts == 0) {
    fields.pass_over(detail::of_experts);
    return c;
  }
  c.top_k = fields.size("num_experts_per_tok");
  c.expert_dim = fields.size("moe_intermediate_size");
  c.shared_dim = fields.size("shared_expert_intermediate_size", 0);
  c.renormalise = fields.flag_or("norm_topk_prob", true);
  c.decoder_sparse_step = fields.size_or("decoder_sparse_step", 1);
  c.mlp_only_layers = fields.sizes_or_none("mlp_only_layers", detail::max_layers);
  double const coefficient = fields.real_or("router_aux_loss_coef", 0.001, 0, 1e6);
  c.balance = Balance::pooled;
  c.balance_coefficient = fields.flag_or("output_router_logits", false) ? coefficient : 0;
  return c;
}
inline void read_qwen3_next(Fields& fields, Settings& s) {
  read_common(fields, s);
  checkpoint::to_json(s.model["feed_forward"], read_mixture(fields, read_dense(fields)));
}

inline void check_qwen3_next(Settings& s) {
  check_model(s);
  auto const c = feed_forward(s);
  check(!detail::is_mixed(c, std::ssize(s.pattern)) || c.shared_dim >= 0, s.where,
        "its mixtures have no shared expert; shared_dim = 0 computes the same and can be saved");
  check(c.balance_coefficient == 0 || c.balance == Balance::pooled, s.where, "its load balancing is not Balance::pooled");
}

inline Json write_qwen3_next(Settings const& s) {
  Json json = write_common(s);
  auto const& rotary = json["rope_parameters"];   // readers for the first releases look for its fields outside
  json["rope_theta"] = rotary["rope_theta"];
  json["partial_rotary_factor"] = rotary["partial_rotary_factor"];
  auto const c = feed_forward(s);
  json["num_experts"] = c.num_experts;
  json["num_experts_per_tok"] = c.top_k;
  json["moe_intermediate_size"] = c.expert_dim;
  json["shared_expert_intermediate_size"] = std::max<Index>(c.shared_dim, 0);
  json["norm_topk_prob"] = c.renormalise;
  json["decoder_sparse_step"] = c.decoder_sparse_step;
  json["mlp_only_layers"] = c.mlp_only_layers;
  json["output_router_logits"] = c.balance_coefficient != 0;
  if (c.balance_coefficient != 0) json["router_aux_loss_coef"] = c.balance_coefficient;
  return json;
}

}  // namespace qwen

inline constexpr Family qwen3_next{.model_type = "qwen3_next",
                                   .architecture = "Qwen3NextForCausalLM",
                                   .kinds = qwen::kinds,
                                   .tensors = qwen::qwen3_next_tensors,
                                   .read = qwen::read_qwen3_next,
                                   .check_options = qwen::check_options,
                                   .check_model = qwen::check_qwen3_next,
                                   .write = qwen::write_qwen3_next};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::hugging_face
#endif

// ==== hybridattn/store/hugging_face/families.hpp
// The families that the library knows.
#ifndef HYBRIDATTN_STORE_HUGGING_FACE_FAMILIES_HPP
#define HYBRIDATTN_STORE_HUGGING_FACE_FAMILIES_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::hugging_face {

inline constexpr Family const* families[] = {&qwen3_next, &qwen3_5_text};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::hugging_face
#endif

// ==== hybridattn/store/hugging_face/config_file.hpp
// Reads and writes the config.json of a released model.
#ifndef HYBRIDATTN_STORE_HUGGING_FACE_CONFIG_FILE_HPP
#define HYBRIDATTN_STORE_HUGGING_FACE_CONFIG_FILE_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::hugging_face {

namespace detail {

inline constexpr std::size_t max_config_bytes = 4 << 20;

// The library's families, and those of the caller.
inline std::vector<Family const*> known_families(ReadOptions const& options) {
  std::vector<Family const*> known{std::begin(families), std::end(families)};
  known.insert(known.end(), options.families.begin(), options.families.end());
  return known;
}
// "qwen3_next, qwen3_5_text, and qwen3_5 for its text model"
inline std::string names_of(std::vector<Family const*> const& known) {
  std::string names, wrappers;
  for (auto const* family : known) {
    names.append(names.empty() ? "" : ", ").append(family->model_type);
    if (!family->wrapper.empty()) wrappers.append(", and ").append(family->wrapper).append(" for its text model");
  }
  return names + wrappers;
}

}  // namespace detail

// Reads the folder's config.json. Throws if a field is unknown, missing or has a value that is not supported, and names the field.
inline Settings read_settings(std::filesystem::path const& folder, ReadOptions const& options = {}) {
  auto const path = folder / "config.json";
  std::string const where = one_line(path.string()) + ": ";
  auto const json = parse_json(detail::read_json_text(path, detail::max_config_bytes), where);
  auto const known = detail::known_families(options);
  Fields outer{json, where, options};
  auto const& type = outer.at("model_type");
  bool const wrapped = std::ranges::any_of(known, [&](auto const* family) { return !family->wrapper.empty() && type == family->wrapper; });
  Fields fields = wrapped ? outer.inside("text_config") : outer;
  auto const& text_type = fields.at("model_type");
  auto const found = std::ranges::find_if(known, [&](auto const* family) { return text_type == family->model_type; });
  check(found != known.end(), where, "model_type is ", detail::shown(text_type), "; supported are ", detail::names_of(known));
  Settings s;
  s.where = fields.where();
  s.family = *found;
  s.family->read(fields, s);
  if (wrapped) s.model["tie_embedding"] = outer.flag_or("tie_word_embeddings", s.model["tie_embedding"].get<bool>());
  fields.check_all_known();
  if (wrapped) outer.check_all_known(&json["text_config"]);
  return s;
}

// The text of a config.json that read_settings reads as these settings. `dtype` is the scalar of the weights beside it.
inline std::string config_text(Settings const& s, std::string_view dtype = "float32") {
  Json json = s.family->write(s);
  json["dtype"] = dtype;
  json["architectures"] = Json::array({s.family->architecture});
  json["model_type"] = s.family->model_type;
  return json.dump(2) + "\n";
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::hugging_face
#endif

// ==== hybridattn/store/hugging_face/table.hpp
// Lists a model's tensors under their released names. The rows of the family's table say which released name holds which fields.
#ifndef HYBRIDATTN_STORE_HUGGING_FACE_TABLE_HPP
#define HYBRIDATTN_STORE_HUGGING_FACE_TABLE_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::hugging_face {

// How a folder's parameters are named and laid out, beyond what its config.json says.
struct Format {
  Family const* family = &qwen3_next;
  bool fused_experts = false;      // all experts of a layer in one tensor, gate and up together; otherwise one matrix for each expert
  std::string prefix = "model.";   // of all names but the head's; model.language_model. in multimodal files
};

// What table() must know of a model.
using Extents = std::vector<Index>;
struct Layer {
  char letter = 0;   // of the family's kinds
  Index heads = 0;   // of Layout::by_head
};
struct Outline {
  std::vector<Layer> layers;
  Index experts = 0;
  std::map<std::string, Extents> fields;   // every tensor of the model, by path
};

// Released tensors and the model's fields that they hold. The numbers of the tensors, in order, are `groups` groups. Each group has an
// equal share of every field, one field after the other.
struct Entry {
  std::vector<std::string> names;
  Extents shape;                     // of each of them
  std::vector<std::string> fields;   // paths
  Index groups = 1;
};

namespace detail {

inline std::vector<std::string> words(std::string_view list) {
  std::vector<std::string> result;
  while (!list.empty()) {
    auto const end = std::min(list.find(' '), list.size());
    result.emplace_back(list.substr(0, end));
    list.remove_prefix(std::min(end + 1, list.size()));
  }
  return result;
}

inline Extents released_shape(Layout layout, std::vector<Extents> const& fields) {
  Extents shape = fields[0];
  std::size_t const rows = layout == Layout::by_expert ? 1 : 0;
  for (std::size_t i = 1; i < fields.size(); ++i) shape[rows] += fields[i][rows];
  if (layout == Layout::each_expert) shape.erase(shape.begin());
  if (layout == Layout::convolution) shape.insert(shape.begin() + 1, 1);
  return shape;
}

inline std::vector<std::string> released_names(Layout layout, std::string const& name, Index experts) {
  if (layout != Layout::each_expert) return {name};
  std::vector<std::string> names;
  auto const number = name.find("{}");
  for (Index e = 0; e < experts; ++e) names.push_back(std::string(name).replace(number, 2, std::to_string(e)));
  return names;
}

// Makes the entries of one model, row by row. Each tensor of the model must be in exactly one entry.
class Builder {
 public:
  explicit Builder(Outline const& outline) : outline_(outline) {}

  void add(std::string const& name, std::string const& field, std::span<Row const> rows, Layer const& layer = {}) {
    for (Row const& row : rows) add(name + std::string(row.name), field, row, layer);
  }
  std::vector<Entry> take() {
    for (auto const& [path, extents] : outline_.fields)
      check(uses_[path] == 1 || is_absent(extents), "Hugging Face: the model's tensor ", path, " has no released name");
    return std::move(entries_);
  }

 private:
  static bool is_absent(Extents const& extents) {
    for (Index extent : extents)
      if (extent != 0) return false;
    return true;
  }
  // Skips rows whose tensors the model does not have, such as the head of a tied model or a shared expert.
  void add(std::string const& name, std::string const& field, Row const& row, Layer const& layer) {
    Entry entry;
    std::vector<Extents> extents;
    for (auto const& word : words(row.fields)) {
      auto const found = outline_.fields.find(field + word);
      if (found == outline_.fields.end() || is_absent(found->second)) continue;
      entry.fields.push_back(found->first);
      extents.push_back(found->second);
      ++uses_[found->first];
    }
    if (extents.empty()) return;
    check(extents.size() == words(row.fields).size(), "Hugging Face: ", name, " holds ", row.fields,
          ", of which the model lacks a part in ", field);
    entry.names = released_names(row.layout, name, outline_.experts);
    entry.shape = released_shape(row.layout, extents);
    entry.groups = row.layout == Layout::by_head ? layer.heads : row.layout == Layout::by_expert ? outline_.experts : 1;
    entries_.push_back(std::move(entry));
  }

  Outline const& outline_;
  std::map<std::string, int> uses_;
  std::vector<Entry> entries_;
};

}  // namespace detail

// Returns every tensor of a model under its released name. Throws if a tensor has none, and names the tensor.
inline std::vector<Entry> table(Outline const& outline, Format const& format) {
  using Place = RowGroup::Place;
  using Experts = RowGroup::Experts;
  detail::Builder builder{outline};
  std::vector<RowGroup const*> groups;
  for (RowGroup const& group : format.family->tensors)
    if (group.experts == Experts::either || (group.experts == Experts::fused) == format.fused_experts) groups.push_back(&group);
  auto const add = [&](RowGroup const& group, std::string const& name, std::string const& field, Layer const& layer) {
    builder.add(name + std::string(group.name), field + std::string(group.field), group.rows, layer);
  };
  for (auto const* group : groups) {
    if (group->place == Place::model) add(*group, format.prefix, "", {});
    if (group->place == Place::outside) add(*group, "", "", {});
  }
  std::size_t number = 0;
  for (Layer const& layer : outline.layers) {
    std::string const i = std::to_string(number++) + ".", name = format.prefix + "layers." + i, field = "blocks." + i;
    for (auto const* group : groups)
      if (group->place == Place::each_layer || (group->place == Place::kind && group->letter == layer.letter))
        add(*group, name, field, layer);
  }
  return builder.take();
}

// Calls f(share) for the shares of an entry's fields, in the order of the released elements.
template <class T, class F> void for_each_share(Index groups, std::vector<std::vector<T>>& fields, F f) {
  for (Index group = 0; group < groups; ++group)
    for (auto& field : fields) {
      std::size_t const share = field.size() / static_cast<std::size_t>(groups);
      f(std::span<T>(field).subspan(static_cast<std::size_t>(group) * share, share));
    }
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::hugging_face
#endif

// ==== hybridattn/store/hugging_face/types.hpp
// Compares a model's type with a config.json, and describes a model as the settings of a config.json.
#ifndef HYBRIDATTN_STORE_HUGGING_FACE_TYPES_HPP
#define HYBRIDATTN_STORE_HUGGING_FACE_TYPES_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::hugging_face {

namespace detail {

// {"policy", "options", "sizes"} of each layer. The sizes are defaults.
template <class Stack> struct TypesOf;
template <class... Policies> struct TypesOf<hybridattn::Stack<Policies...>> {
  static std::vector<Json> layers() { return {checkpoint::describe_policy<Policies>(typename Policies::Config{})...}; }
};

// The letter of a model's layer, or '?' if the family has no such layer.
inline char letter_of(Family const& family, Json const& layer) {
  auto const* const kind = family.kind_of_policy(layer["policy"].get_ref<std::string const&>());
  return kind == nullptr ? '?' : kind->letter;
}
inline std::string legend(Family const& family) {
  std::string text;
  for (auto const& kind : family.kinds) text.append(text.empty() ? "" : ", ").append({kind.letter, ' '}).append(kind.word);
  return text;
}
inline void check_layers(Settings const& s, std::vector<Json> const& layers) {
  std::string ours;
  for (auto const& layer : layers) ours += letter_of(*s.family, layer);
  check(s.pattern == ours, s.where, "layer_types are ", one_line(s.pattern, 200), ", but the model's layers are ", ours, " (",
        legend(*s.family), ")");
  for (std::size_t i = 0; i < layers.size(); ++i) s.family->check_options(s, ours[i], layers[i]["options"]);
}

}  // namespace detail

// Throws if the norms of a layer have another placement in the settings than in a model's description.
inline void check_norm_placement(Settings const& s, Json const& description) {
  auto const placement = [](Json const& layer) { return layer.value("norm_placement", "before"); };
  for (std::size_t i = 0; i < s.pattern.size(); ++i) {
    std::string const theirs = placement(s.layers.at(s.pattern[i])), ours = placement(description["layers"][i]);
    check(theirs == ours, s.where, "the norms of layer ", i, " come ", theirs, " attention and feed-forward, but in the model ", ours);
  }
}
// Throws if a config.json asks for layers of other types than the stack has.
template <class Stack> void check_types(Settings const& s) { detail::check_layers(s, detail::TypesOf<Stack>::layers()); }

namespace detail {

// Returns what checkpoint::describe returns for a model of these settings.
inline Json description(Settings const& s) {
  Json json;
  json["model"] = s.model;
  json["layers"] = Json::array();
  for (char letter : s.pattern) json["layers"].push_back(s.layers.at(letter));
  return json;
}

struct CollectShapes {
  std::map<std::string, Extents>& fields;

  template <int Rank> [[gnu::noinline]] void operator()(Path const& path, Shape<Rank> const& shape) const {
    fields[path.str()] = Extents(shape.extent, shape.extent + Rank);
  }
};
inline Outline outline(Json const& description, Family const& family) {
  Outline result;
  result.experts = description["model"]["feed_forward"]["num_experts"].get<Index>();
  for (Json const& layer : description["layers"]) {
    char const letter = letter_of(family, layer);
    check(letter != '?', "Hugging Face: models of ", family.model_type, " have no layer of ",
          layer["policy"].get_ref<std::string const&>());
    bool const has_heads = layer.contains("sizes") && layer["sizes"].contains("num_heads");
    result.layers.push_back({letter, has_heads ? layer["sizes"]["num_heads"].get<Index>() : 1});
  }
  return result;
}

// Throws if a layer differs from an earlier one of its kind, because a config.json has one set of options and sizes for both.
inline void check_same(Settings const& s, Json const& earlier, Json const& layer) {
  for (char const* group : {"options", "sizes"}) {
    Json const ours = layer.value(group, Json::object()), theirs = earlier.value(group, Json::object());
    for (auto const& [name, value] : ours.items())
      check(value == theirs[name], s.where, "layer ", s.pattern.size(), " has ", name, " = ", checkpoint::shown(value),
            ", but an earlier layer of its kind has ", checkpoint::shown(theirs[name]));
  }
  check(layer.value("norm_placement", "before") == earlier.value("norm_placement", "before"), s.where, "layer ", s.pattern.size(),
        " has its norms elsewhere than an earlier layer of its kind");
}
inline Settings settings_of(Json const& description, Family const& family) {
  Settings s;
  s.where = "cannot save the model as " + std::string(family.model_type) + ": ";
  s.family = &family;
  s.model = description["model"];
  for (Json const& layer : description["layers"]) {
    char const letter = letter_of(family, layer);
    check(letter != '?', s.where, "it has a layer of ", layer["policy"].get_ref<std::string const&>(), "; supported are ", family.words());
    if (s.pattern.find(letter) != s.pattern.npos) check_same(s, s.layers[letter], layer);
    s.pattern += letter;
    s.layers[letter] = layer;
  }
  family.check_model(s);
  for (auto const& [letter, layer] : s.layers)
    if (s.pattern.find(letter) != s.pattern.npos) family.check_options(s, letter, layer["options"]);
  return s;
}

}  // namespace detail

// Returns what table() must know of a model.
template <class Stack> Outline outline(LanguageModel<Stack> const& model, Family const& family) {
  Outline result = detail::outline(checkpoint::describe(model), family);
  zip(detail::CollectShapes{result.fields}, model.params());
  return result;
}

// Returns the settings of a family's config.json for a model. Throws if no released model of the family has such settings.
template <class Stack> Settings settings_of(LanguageModel<Stack> const& model, Family const& family) {
  return detail::settings_of(checkpoint::describe(model), family);
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::hugging_face
#endif

// ==== hybridattn/store/hugging_face/weights.hpp
// The tensors of a released model by name: model.safetensors, or the files that model.safetensors.index.json names.
#ifndef HYBRIDATTN_STORE_HUGGING_FACE_WEIGHTS_HPP
#define HYBRIDATTN_STORE_HUGGING_FACE_WEIGHTS_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::hugging_face {

// Where a folder has an index, the index names the file of every tensor, and the tensor must be in that file. A copy of a tensor in
// another file is not read, nor is a model.safetensors that the index does not name.
class Weights {
 public:
  explicit Weights(std::filesystem::path const& folder) : where_(one_line(folder.string()) + ": ") {
    auto const single = folder / "model.safetensors", index = folder / "model.safetensors.index.json";
    if (is_there(index)) {
      open_all(folder, index);
    } else {
      check(is_there(single), where_, "there is neither model.safetensors nor model.safetensors.index.json", other_weights(folder));
      files_.emplace_back(single);
      for (auto const& [name, info] : files_.back().tensors()) places_[name] = 0;
    }
  }

  Index count() const { return std::ssize(places_); }
  bool contains(std::string const& name) const { return places_.contains(name); }
  bool contains_part(std::string_view part) const {
    for (auto const& [name, file] : places_)
      if (name.find(part) != name.npos) return true;
    return false;
  }
  // The elements of an entry, one released tensor after the other.
  template <class T> std::vector<T> read(Entry const& entry) const {
    std::vector<T> elements;
    for (auto const& name : entry.names) {
      auto const& file = file_of(name);
      auto const part = [&] {
        if constexpr (std::is_same_v<T, double>) return file.read_doubles(name);
        else if constexpr (std::is_same_v<T, bf16>) return file.read_bf16s(name);
        else return file.read_floats(name);
      }();
      if (entry.names.size() == 1) return part;
      elements.insert(elements.end(), part.begin(), part.end());
    }
    return elements;
  }

  // Throws at the first tensor that is missing, has another shape, is not of real numbers, or is not in the table. `embedding` is the
  // name of the embedding if the model ties its head to it, and empty otherwise.
  void check_against(std::vector<Entry> const& table, std::string const& embedding) const {
    std::set<std::string_view> expected;
    for (Entry const& entry : table)
      for (auto const& name : entry.names) {
        check_tensor(name, entry.shape);
        expected.insert(name);
      }
    for (auto const& [name, file] : places_)
      if (!expected.contains(name) && !is_ignored(name)) check_other(name, embedding);
  }

 private:
  static constexpr char const* head = "lm_head.weight";
  // No logit of the text model depends on draft heads and image encoders. inv_freq follows from config.json.
  static bool is_ignored(std::string_view name) {
    return name.starts_with("mtp.") || name.starts_with("model.visual.") || name.ends_with(".rotary_emb.inv_freq");
  }
  static bool is_there(std::filesystem::path const& path) {   // true for a broken link too
    std::error_code ignored;
    return std::filesystem::exists(std::filesystem::symlink_status(path, ignored));
  }
  // Names up to three files that hold weights under other names, for an error message.
  static std::string other_weights(std::filesystem::path const& folder) {
    static constexpr std::array<std::string_view, 7> kinds = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack"};
    std::string found;
    int count = 0;
    std::error_code error;
    for (std::filesystem::directory_iterator it{folder, error}, end; !error && it != end && count < 3; it.increment(error)) {
      if (std::ranges::find(kinds, it->path().extension().string()) == kinds.end()) continue;
      found += (count++ == 0 ? "; there is " : ", ") + escaped(it->path().filename().string());
    }
    return found;
  }

  static std::string text(Extents const& shape) {
    std::string result = "[";
    for (Index extent : shape) result += (result.size() > 1 ? ", " : "") + std::to_string(extent);
    return result + "]";
  }
  Safetensors const& file_of(std::string const& name) const { return files_[places_.at(name)]; }

  void check_tensor(std::string const& name, Extents const& shape) const {
    static constexpr std::array<std::string_view, 4> reals = {"F32", "BF16", "F16", "F64"};
    check(contains(name), where_, "the tensor ", name, " is missing; its shape would be ", text(shape));
    auto const& info = file_of(name).info(name);
    check(info.shape == shape, where_, "the tensor ", name, " has the shape ", text(info.shape), "; the model's is ", text(shape));
    check(std::ranges::find(reals, info.dtype) != reals.end(), where_, "the tensor ", name, " is of dtype ", info.dtype,
          "; supported are F32, BF16, F16 and F64");
  }
  void check_other(std::string const& name, std::string const& embedding) const {
    auto const& info = file_of(name).info(name);
    bool const is_head = name == head && !embedding.empty();
    check(is_head, where_, "the tensor ", one_line(name, 200), " of shape ", text(info.shape), " belongs to nothing in the model");
    check_tensor(head, file_of(embedding).info(embedding).shape);
    for (Index first = 0, all = info.count(), piece; first < all; first += piece) {
      piece = std::min<Index>(all - first, 1 << 20);
      auto const a = file_of(head).read_doubles(head, first, piece), b = file_of(embedding).read_doubles(embedding, first, piece);
      auto const differs = std::ranges::mismatch(a, b, [](double x, double y) { return x == y || (x != x && y != y); }).in1;
      check(differs == a.end(), where_, "the head is tied to the embedding (tie_word_embeddings), but ", head, " is not ", embedding,
            ": they differ at element ", first + (differs - a.begin()));
    }
  }

  // Keeps nothing but weight_map, so the size of the index limits the memory that this takes.
  void open_all(std::filesystem::path const& folder, std::filesystem::path const& index) {
    constexpr std::size_t max_index_bytes = 100'000'000;
    std::string const where = one_line(index.string()) + ": ";
    std::map<std::string, std::size_t> numbers;   // of the files
    bool has_map = false;
    for_each_json_member(detail::read_json_text(index, max_index_bytes), where, [&](std::string const& key, nlohmann::json&& map) {
      if (key != "weight_map") return;
      check(map.is_object(), where, "weight_map is not a JSON object");
      has_map = true;
      for (auto const& [tensor, file] : map.items())
        places_[tensor] = numbers.emplace(file_name(tensor, file, where), numbers.size()).first->second;
    });
    check(has_map, where, "there is no weight_map");
    std::vector<std::string> names(numbers.size());
    for (auto const& [name, number] : numbers) names[number] = name;
    for (auto const& name : names) {
      check(is_there(folder / name), where, "it names the file ", escaped(name), ", which is not there",
            is_there(folder / "model.safetensors") ? "; it does not name model.safetensors, which is there" : "");
      files_.emplace_back(folder / name);
    }
    check_index(names, where);
  }
  static std::string file_name(std::string const& tensor, nlohmann::json const& file, std::string const& where) {
    auto const is_plain = [](std::string const& name) {
      return !name.empty() && name != "." && name != ".." && name.find_first_of(std::string_view("/\\\0", 3)) == name.npos;
    };
    check(file.is_string() && is_plain(file.get_ref<std::string const&>()), where, one_line(tensor, 200), " is said to be in ",
          detail::shown(file), ", which is not the name of a file beside it");
    return file.get<std::string>();
  }
  void check_index(std::vector<std::string> const& names, std::string const& where) const {
    auto const also_in = [&](std::string const& tensor) {
      for (std::size_t i = 0; i < files_.size(); ++i)
        if (files_[i].contains(tensor)) return "it is in " + escaped(names[i]);
      return std::string("no file has it");
    };
    for (auto const& [tensor, number] : places_)
      if (!files_[number].contains(tensor))
        fail(where, "the tensor ", one_line(tensor, 200), " is not in ", escaped(names[number]), " as it says; ", also_in(tensor));
    for (std::size_t i = 0; i < files_.size(); ++i)
      for (auto const& [tensor, info] : files_[i].tensors())
        check(contains(tensor) || is_ignored(tensor), where, "it does not name the tensor ", one_line(tensor, 200), ", which is in ",
              escaped(names[i]));
  }

  std::string where_;   // how an error begins
  std::vector<Safetensors> files_;
  std::map<std::string, std::size_t> places_;   // which file
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::hugging_face
#endif

// ==== hybridattn/store/hugging_face.hpp
// Reads and writes released models in folders of the Hugging Face layout: config.json, and safetensors files with the parameters under
// their released names. The library knows Qwen3-Next and the text models of Qwen3.5, Stacks of Gated DeltaNet and full attention:
//
//   using Letters = Alphabet<Letter<'L', GDN>, Letter<'F', Full>>;
//   using Model = LanguageModel<Pattern<"LLLF", Letters>>;
//   Model const model{hugging_face::config<Model>(folder)};
//   auto params = hugging_face::load<float>(cpu, model, folder);
//   hugging_face::save(cpu, model, params, another_folder);
//
// The tables in hugging_face/qwen.hpp, qwen3_next.hpp and qwen3_5.hpp say which name is which field.
#ifndef HYBRIDATTN_STORE_HUGGING_FACE_HPP
#define HYBRIDATTN_STORE_HUGGING_FACE_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::hugging_face {

// Returns one letter for each layer of the folder: L for linear_attention (Gated DeltaNet), F for full_attention. The default is
// "LLLF...". Like all functions here it throws if it does not fully understand config.json, and names the field and its value. Fields
// in options.ignore are read as if they were absent.
inline std::string pattern(std::filesystem::path const& folder, ReadOptions const& options = {}) {
  return read_settings(folder, options).pattern;
}

namespace detail {
inline Format format_of(Settings const& settings, Weights const& weights) {
  Format result{.family = settings.family};
  for (RowGroup const& group : settings.family->tensors)
    for (Row const& row : group.rows)
      if (group.experts == RowGroup::Experts::fused)
        result.fused_experts |= weights.contains_part("." + std::string(group.name) + std::string(row.name));
  if (weights.contains_part("model.language_model.")) result.prefix = "model.language_model.";
  return result;
}
}  // namespace detail

// Returns how the folder's parameters are named. `save` with this Format names others in the same way.
inline Format format(std::filesystem::path const& folder, ReadOptions const& options = {}) {
  return detail::format_of(read_settings(folder, options), Weights{folder});
}

// Returns the folder's sizes for a model of this type. Throws if the type has other layers, another convolution width or rotary share,
// or other norms or gates than the folder; the error names field, value and what is supported.
// If output_router_logits is true in the folder, the loss includes the load-balancing loss, pooled over the layers. Otherwise set
// feed_forward.balance_coefficient to train with it.
template <class Model> typename Model::Config config(std::filesystem::path const& folder, ReadOptions const& options = {}) {
  Settings const s = read_settings(folder, options);
  check_types<typename Model::Stack>(s);
  return checkpoint::configuration<Model>(detail::description(s), s.where);
}

namespace detail {

// The tensors of a group of parameters, by path. An absent tensor has no bytes.
using Memory = std::map<std::string, checkpoint::StoredTensor>;
inline Memory memory_of(std::vector<checkpoint::StoredTensor> const& tensors) {
  Memory result;
  for (auto const& tensor : tensors) result[tensor.name] = tensor;
  return result;
}
template <class T> Index elements_at(Memory const& memory, std::string const& path) {
  return static_cast<Index>(memory.at(path).bytes / sizeof(T));
}
// Calls f(T{}) with the scalar of an entry's tensors, in a group of parameters in T: T or the wide scalar. All of them have the same.
template <class T, class F> void with_scalar(Entry const& entry, Memory const& memory, F f) {
  if (memory.at(entry.fields.front()).info.dtype == safetensors::dtype_of<T>()) f(T{});
  else f(wide_t<T>{});
}

template <class T, class B> std::vector<std::vector<T>> download_fields(B& backend, Entry const& entry, Memory const& memory) {
  std::vector<std::vector<T>> fields;
  for (auto const& path : entry.fields) {
    auto& field = fields.emplace_back();
    resize(field, elements_at<T>(memory, path), "a copy of a tensor");
    if (!field.empty()) backend.download(field.data(), memory.at(path).data, memory.at(path).bytes);
  }
  return fields;
}
template <class T, class B> void load_entry(B& backend, Entry const& entry, Weights const& weights, Memory const& memory) {
  auto const released = weights.read<T>(entry);
  std::vector<std::vector<T>> fields;
  for (auto const& path : entry.fields) resize(fields.emplace_back(), elements_at<T>(memory, path), "a copy of a tensor");
  auto next = released.begin();
  for_each_share(entry.groups, fields, [&](std::span<T> share) {
    std::copy_n(next, share.size(), share.begin());
    next += static_cast<Index>(share.size());
  });
  for (std::size_t i = 0; i < fields.size(); ++i)
    if (!fields[i].empty())
      backend.upload(const_cast<void*>(memory.at(entry.fields[i]).data), fields[i].data(), fields[i].size() * sizeof(T));
}

}  // namespace detail

// Returns the folder's parameters for this model, in float, double or bf16. Its tensors may be F32, BF16, F16 or F64, in one file or several.
// Throws, before it takes memory, if a tensor is missing, superfluous or of another shape, and names the tensor and both shapes. Skips
// draft heads (mtp.*) and image encoders (model.visual.*). If the model ties its head to the embedding, a head in the folder must equal
// the embedding.
template <class T, class B, class Model>
auto load(B& backend, Model const& model, std::filesystem::path const& folder, ReadOptions const& options = {}) {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double> || std::is_same_v<T, bf16>,
                "parameters are loaded as float, double or bf16");
  Settings const settings = read_settings(folder, options);
  check_types<typename Model::Stack>(settings);
  check_norm_placement(settings, checkpoint::describe(model));
  Weights const weights{folder};
  Format const format = detail::format_of(settings, weights);
  Outline const wanted = outline(model, *settings.family);
  bool const is_apart =
      detail::is_mixed(model.config().feed_forward, std::ssize(settings.pattern)) && !format.fused_experts;  // a name for each expert
  check(!is_apart || wanted.experts <= weights.count(), settings.where, "num_experts is ", wanted.experts, ", but the folder has ",
        weights.count(), " tensors");
  auto const entries = table(wanted, format);
  weights.check_against(entries, model.config().tie_embedding ? format.prefix + "embed_tokens.weight" : "");
  auto params = allocate_together<T>(backend, model.params());
  auto const memory = detail::memory_of(checkpoint::tensors_of(params));
  for (Entry const& entry : entries)
    detail::with_scalar<T>(entry, memory, [&]<class Own>(Own) { detail::load_entry<Own>(backend, entry, weights, memory); });
  return params;
}

// Calls f(released name, shape, elements) for every tensor of a group of parameters or of their gradients. Skips tensors that the group
// does not have, such as gradients of parameters that are not trained.
template <class B, class Model, class Params, class F>
void for_each_tensor(B& backend, Model const& model, Params const& params, F f, Format const& format = {}) {
  using T = std::remove_cvref_t<decltype(*in(params.embedding).data)>;
  auto const memory = detail::memory_of(checkpoint::tensors_of(params));
  for (Entry const& entry : table(outline(model, *format.family), format))
    detail::with_scalar<T>(entry, memory, [&]<class Own>(Own) {
      auto fields = detail::download_fields<Own>(backend, entry, memory);
      std::vector<Own> released;
      for_each_share(entry.groups, fields, [&](std::span<Own> share) { released.insert(released.end(), share.begin(), share.end()); });
      Index const each = TensorInfo{"", entry.shape}.count();
      if (static_cast<Index>(released.size()) != each * std::ssize(entry.names)) return;
      for (std::size_t i = 0; i < entry.names.size(); ++i) {
        auto const first = released.begin() + static_cast<Index>(i) * each;
        f(entry.names[i], entry.shape, std::vector<Own>(first, first + each));
      }
    });
}

// Writes config.json and model.safetensors as released models have them, each under a temporary name first. Tensors in bf16 are written
// as BF16, all others as F32. Throws if an
// option of the model is in no released model of the family, or if the folder has shards, and names the option or the folder.
template <class B, class Model, class Params>
void save(B& backend, Model const& model, Params const& params, std::filesystem::path const& folder, Format const& format = {}) {
  using Scalar = scalar_of<Params>;
  std::string const config = config_text(settings_of(model, *format.family), std::is_same_v<Scalar, bf16> ? "bfloat16" : "float32");
  std::error_code ignored;
  check(!std::filesystem::exists(folder / "model.safetensors.index.json", ignored), "cannot save the model in ", one_line(folder.string()),
        ": it holds the shards of another one, and their model.safetensors.index.json. Choose another folder");
  SafetensorsWriter writer;
  std::tuple<std::deque<std::vector<float>>, std::deque<std::vector<bf16>>> kept;  // the writer only refers to the elements
  for_each_tensor(
      backend, model, params,
      [&]<class T>(std::string const& name, Extents const& shape, std::vector<T> const& elements) {
        using Written = std::conditional_t<std::is_same_v<T, bf16>, bf16, float>;
        auto& copy = std::get<std::deque<std::vector<Written>>>(kept).emplace_back();
        resize(copy, std::ssize(elements), "a copy of a tensor");
        std::ranges::transform(elements, copy.begin(), [](T element) { return static_cast<Written>(element); });
        writer.add(name, shape, copy);
      },
      format);
  writer.add_metadata("format", "pt");  // the layout's readers expect this
  std::filesystem::create_directories(folder);
  writer.write(folder / "model.safetensors");
  write_file_atomically(folder / "config.json", config);
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::hugging_face
#endif

// ==== hybridattn/store.hpp
// The door to models in files, for programs that do not train: parameters of checkpoints, released models. Needs nlohmann-json.
#ifndef HYBRIDATTN_STORE_HPP
#define HYBRIDATTN_STORE_HPP

#endif
