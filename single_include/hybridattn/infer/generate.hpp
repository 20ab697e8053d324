// <hybridattn/infer/generate.hpp> as one file, written by scripts/single_include: it and all that it needs of hybridattn, a library of
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
#include <iterator>
#include <limits>
#include <list>
#include <new>
#include <numbers>
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
