// <hybridattn/testing.hpp> as one file, written by scripts/single_include: it and all that it needs of hybridattn, a library of
// language models with hybrid attention. The other files of single_include may stand beside it.
// SPDX-License-Identifier: MIT
// Copyright (c) 2026 the hybridattn authors

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <chrono>
#include <cmath>
#include <concepts>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <iterator>
#include <limits>
#include <list>
#include <memory>
#include <mutex>
#include <new>
#include <numbers>
#include <numeric>
#include <pthread.h>
#include <span>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <sys/mman.h>
#include <thread>
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

// ==== hybridattn/backend/hidden_memory.hpp
// Memory of the host that stands for a device's memory: code outside operations and copies that reads or writes it ends the program.
#ifndef HYBRIDATTN_BACKEND_HIDDEN_MEMORY_HPP
#define HYBRIDATTN_BACKEND_HIDDEN_MEMORY_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

// A range of addresses. Blocks come from its beginning. A released block returns its memory to the system, its addresses are never used
// again. Throws Error where the system refuses the range.
class HiddenMemory {
 public:
  explicit HiddenMemory(char const* backend) {
    void* const range = mmap(nullptr, capacity, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    check(range != MAP_FAILED, backend, ": the system refuses ", capacity, " bytes of address space");
    begin_ = static_cast<char*>(range);
  }
  HiddenMemory(HiddenMemory const&) = delete;
  HiddenMemory& operator=(HiddenMemory const&) = delete;
  ~HiddenMemory() { munmap(begin_, capacity); }

  // A block at a multiple of 256 bytes, or nullptr where it does not fit beside `held` bytes into the machine's memory.
  void* allocate(std::size_t bytes, std::size_t held) {
    if (bytes > machine_memory() - std::min(machine_memory(), held) || bytes > capacity - used_) return nullptr;
    return begin_ + std::exchange(used_, (used_ + bytes + alignment - 1) / alignment * alignment);
  }
  void release(void* block, std::size_t bytes) noexcept {
    auto const first = (reinterpret_cast<std::uintptr_t>(block) + page - 1) / page * page;
    auto const last = (reinterpret_cast<std::uintptr_t>(block) + bytes) / page * page;
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
  }
  bool owns(void const* memory) const { return begin_ <= memory && memory < begin_ + capacity; }

  // While an Open lives, the memory can be read and written.
  class Open {
   public:
    explicit Open(HiddenMemory& memory) : memory_(memory) {
      if (memory_.open_++ == 0) memory_.protect(PROT_READ | PROT_WRITE);
    }
    Open(Open const&) = delete;
    Open& operator=(Open const&) = delete;
    ~Open() {
      if (--memory_.open_ == 0) memory_.protect(PROT_NONE);
    }

   private:
    HiddenMemory& memory_;
  };

 private:
  static constexpr std::size_t capacity = std::size_t{1} << 40;   // of addresses; pages come when they are touched
  static constexpr std::size_t alignment = 256, page = 4096;

  void protect(int access) { mprotect(begin_, std::min(used_, capacity), access); }   // of whole pages

  char* begin_ = nullptr;
  std::size_t used_ = 0;
  int open_ = 0;
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
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

// ==== hybridattn/testing/fake.hpp
// A backend that stands in for a GPU. Its memory is memory of the host, but can be accessed only while an operation or a copy runs. Host
// code that accesses it at another time crashes, as it would on a GPU, so tests find such code on a machine without a GPU.
#ifndef HYBRIDATTN_TESTING_FAKE_HPP
#define HYBRIDATTN_TESTING_FAKE_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::testing {

// Operations run on an inner Cpu, which has scratch memory of its own.
class Fake {
 public:
  using Inner = Cpu;

  explicit Fake(int threads = 0) : cpu_(threads) {}

  void* take(std::size_t bytes) {
    return pool_.take(
        bytes, [this](std::size_t n) { return memory_.allocate(n, pool_.held()); },
        [this](void* block, std::size_t n) { memory_.release(block, n); }, machine_memory());
  }
  void give(void* block, std::size_t bytes) noexcept { pool_.give(block, bytes); }
  void trim() noexcept {
    pool_.trim([this](void* block, std::size_t n) { memory_.release(block, n); });
  }
  void upload(void* to, void const* from, std::size_t bytes) {
    HiddenMemory::Open const open{memory_};
    std::memcpy(to, from, bytes);
  }
  void download(void* to, void const* from, std::size_t bytes) {
    HiddenMemory::Open const open{memory_};
    std::memcpy(to, from, bytes);
  }
  void copy(void* to, void const* from, std::size_t bytes) {
    check(owns(to) && owns(from), "Fake: a copy on the device was given memory of the host");
    HiddenMemory::Open const open{memory_};
    std::memcpy(to, from, bytes);
  }
  void fill(void* to, std::byte value, std::size_t bytes) {
    check(owns(to), "Fake: a fill was given memory of the host");
    HiddenMemory::Open const open{memory_};
    std::memset(to, std::to_integer<int>(value), bytes);
  }
  void synchronise() {}
  Pool& pool() { return pool_; }

  bool owns(void const* memory) const { return memory_.owns(memory); }
  // Throws if an argument of an operation, a view or a group of views, is in memory of the host, because a device could not read it.
  template <class T, int Rank> void arrives(View<T, Rank> const& view) const {
    check(view.count() == 0 || owns(view.data), "Fake: an operation was given memory of the host");
  }
  template <class Argument> void arrives(Argument const& argument) const {
    if constexpr (FieldGroup<Argument>) zip([&](Path const&, auto const& view) { arrives(view); }, argument);
  }

  // Calls f(inner). Inside this call the memory can be accessed.
  template <class F> auto run(F&& f) {
    HiddenMemory::Open const open{memory_};
    return f(cpu_);
  }

 private:
  Cpu cpu_;
  HiddenMemory memory_{"Fake"};
  Pool pool_;
};
static_assert(Backend<Fake> && Wrapper<Fake>);

}  // namespace hybridattn::inline HYBRIDATTN_ABI::testing
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

// ==== hybridattn/core/type_name.hpp
// Names of types, for reports and errors.
#ifndef HYBRIDATTN_CORE_TYPE_NAME_HPP
#define HYBRIDATTN_CORE_TYPE_NAME_HPP

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

// ==== hybridattn/testing/host_tensor.hpp
// Tensors on the host, with names, shapes and values as doubles, whatever their type on the backend. A double holds every float, bf16 and
// int32 exactly, the sign of zero included, so equal bits here mean equal bits on the backend.
#ifndef HYBRIDATTN_TESTING_HOST_TENSOR_HPP
#define HYBRIDATTN_TESTING_HOST_TENSOR_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::testing {

inline constexpr double not_a_number = std::numeric_limits<double>::quiet_NaN();

// What the first axis of a tensor counts.
enum class RowsOf { tokens, sequences, other };

struct HostTensor {
  std::string name;
  RowsOf rows = RowsOf::other;
  bool whole = false;            // of whole numbers, such as the keys that a policy chooses
  std::vector<Index> shape;
  std::vector<double> values;    // empty if the tensor is absent
  double eps = 0;                // of the scalar that it has on the backend; 0 for whole numbers

  bool is_bf16() const { return eps == epsilon_of<bf16>; }
  Index row_count() const { return shape.empty() ? 0 : shape[0]; }
  Index row_size() const { return row_count() == 0 ? 0 : std::ssize(values) / row_count(); }
  double* row(Index i) { return values.data() + i * row_size(); }
  double const* row(Index i) const { return values.data() + i * row_size(); }

  // The indices of an element: "[3, 0, 7]".
  std::string place(Index element) const {
    std::string text = "]";
    for (std::size_t axis = shape.size(); axis-- > 0; element /= shape[axis])
      text.insert(0, (axis == 0 ? "[" : ", ") + std::to_string(element % shape[axis]));
    return text;
  }
};

// The tensors of a struct of tensors, in order.
struct HostGroup : std::vector<HostTensor> {
  using std::vector<HostTensor>::vector;

  HostTensor const* find(std::string_view name) const { return find_in(*this, name); }
  HostTensor* find(std::string_view name) { return find_in(*this, name); }
  HostTensor& at(std::string_view name) { return found(find(name), name); }
  HostTensor const& at(std::string_view name) const { return found(find(name), name); }

 private:
  template <class Group> static auto find_in(Group& group, std::string_view name) -> decltype(group.data()) {
    for (auto& tensor : group)
      if (tensor.name == name) return &tensor;
    return nullptr;
  }
  template <class Tensor> static Tensor& found(Tensor* tensor, std::string_view name) {
    check(tensor != nullptr, "no tensor is called ", name);
    return *tensor;
  }
};

// A number as verdicts quote it, with enough digits to tell any two numbers apart.
inline std::string number(double x) {
  std::ostringstream text;
  text.precision(17);
  text << x;
  return text.str();
}
// "1 2 3"
template <class Numbers> std::string listed(Numbers const& numbers) {
  std::ostringstream text;
  char const* between = "";
  for (auto number : numbers) text << std::exchange(between, " ") << number;
  return text.str();
}

inline bool same_bits(double a, double b) { return std::bit_cast<std::uint64_t>(a) == std::bit_cast<std::uint64_t>(b); }

// Names the first element with other bits in b than in a, among the rows for which wanted(tensor, row) holds, or returns "".
template <class Wanted> std::string first_difference(HostGroup const& a, HostGroup const& b, Wanted wanted) {
  for (std::size_t i = 0; i < a.size(); ++i) {
    HostTensor const &x = a[i], &y = b[i];
    if (x.values.size() != y.values.size()) return sentence(x.name, " has ", x.values.size(), " elements and ", y.values.size());
    for (Index e = 0; e < std::ssize(x.values); ++e) {
      auto const at = static_cast<std::size_t>(e);
      if (!same_bits(x.values[at], y.values[at]) && wanted(x, e / x.row_size()))
        return sentence(x.name, x.place(e), " is ", number(x.values[at]), " and ", number(y.values[at]));
    }
  }
  return {};
}
inline std::string first_difference(HostGroup const& a, HostGroup const& b) {
  return first_difference(a, b, [](HostTensor const&, Index) { return true; });
}

inline double max_abs(HostTensor const& x) {
  double largest = 0;
  for (double value : x.values) largest = std::max(largest, std::abs(value));
  return largest;
}
// The place and size of the largest difference. A NaN on either side counts as an infinite difference.
struct Difference {
  double size = 0;
  Index element = 0;
};
inline Difference max_difference(HostTensor const& x, HostTensor const& y) {
  Difference largest;
  for (Index e = 0; e < std::ssize(x.values); ++e) {
    double const a = x.values[static_cast<std::size_t>(e)], b = y.values[static_cast<std::size_t>(e)];
    double const distance = a == b ? 0 : std::abs(a - b), size = distance == distance ? distance : std::numeric_limits<double>::infinity();
    if (size > largest.size) largest = {size, e};
  }
  return largest;
}

template <class F> void set_each(HostTensor& tensor, F value) {
  for (double& x : tensor.values) x = value();
}
// A nearly normal number of mean 0 and deviation 1. It is the sum of four uniform numbers from one draw, which takes little time.
inline double bell(Random& random) {
  std::uint64_t const bits = random.bits();
  std::uint64_t const sum = (bits & 0xffff) + (bits >> 16 & 0xffff) + (bits >> 32 & 0xffff) + (bits >> 48);
  return (static_cast<double>(sum) - 2 * 65535) / (65536 / std::numbers::sqrt3);
}
inline void set_normal(HostTensor& tensor, Random& random, double deviation = 1) {
  set_each(tensor, [&] { return deviation * bell(random); });
}
// Rounds all values to floats, and those of tensors in bf16 to bf16, so that runs in that scalar and in double have the same inputs.
inline void round_inputs(HostGroup& group) {
  for (HostTensor& tensor : group)
    for (double& x : tensor.values) x = tensor.is_bf16() ? static_cast<double>(bf16(x)) : static_cast<double>(static_cast<float>(x));
}

inline Sequences packed(std::vector<Index> const& lengths) {
  std::vector<Index> offsets{0};
  for (Index length : lengths) offsets.push_back(offsets.back() + length);
  return Sequences::packed(offsets);
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::testing
#endif

// ==== hybridattn/testing/subject.hpp
// A Subject is a policy or an operation that the laws judge. It takes tensors on the host and returns tensors on the host. The laws are
// ordinary functions. Only the code that makes a Subject of a policy (adaptor.hpp) or of an operation (operation.hpp), on a backend and
// in a scalar, is a template.
#ifndef HYBRIDATTN_TESTING_SUBJECT_HPP
#define HYBRIDATTN_TESTING_SUBJECT_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::testing {

// What a forward and a backward read. Without d_outputs there is no backward.
struct Case {
  Sequences sequences;
  HostGroup inputs, d_outputs;
  bool carried = true;   // with the states that pass from one part of a sequence to the next
};

// The earlier run on the same backend, which leaves its numbers in scratch memory: none, one on the same inputs, or one on NaNs.
enum class Leftovers { none, numbers, nan };

// The circumstances of a run. The result must not depend on them.
struct Surroundings {
  int threads = 1;
  double unwritten = not_a_number;   // in all results before they are written
  double fence = not_a_number;       // in the memory beside all tensors
  bool spaced = false;               // rows of inputs, outputs and gradients with gaps between them
  Leftovers leftovers = Leftovers::none;
  bool in_place = false;             // a result stands in the memory of an argument, wherever an operation allows it
};

struct Result {
  HostGroup outputs, saved, gradients;   // gradients have the names of their inputs
  std::string trespass;                  // where a run wrote outside its results, or ""
  std::size_t scratch = 0;               // bytes of the backend's pool that the run took at most, on top of the tensors
  std::ptrdiff_t kept = 0;               // and those that it did not give back
};

struct Footprint {   // of a run on one thread
  std::size_t announced_saved, taken_saved;   // bytes
  std::size_t scratch;
  std::ptrdiff_t kept;
  std::size_t later_allocations;              // of a second run on the same backend
};

namespace detail {

// Lengths at which a kernel has no block, whole blocks, or a block that is not full.
inline Sequences all_lengths() { return packed({1, 0, 2, 63, 64, 65, 130}); }

}  // namespace detail

class Subject {
 public:
  virtual ~Subject() = default;

  virtual std::string name() const = 0;
  virtual double eps() const = 0;         // of the scalar
  virtual double tolerance() const = 0;   // of a result in double, relative to the largest element
  // Kinds of inputs. The first is ordinary and smooth, because finite differences are taken there.
  virtual std::vector<std::string> kinds() const = 0;
  // Batches on which the laws judge. No sequence may depend on another, so an operation on rows has sequences of one token.
  virtual Sequences batch() const { return detail::all_lengths(); }
  virtual Sequences small_batch() const { return packed({1, 2, 0, 19, 40}); }
  virtual bool has_tables() const { return false; }           // an input is a table of the whole batch
  virtual bool works_in_place() const { return false; }       // a result may stand in the memory of an argument
  virtual bool has_states() const { return false; }           // an input initial_x for an output final_x
  virtual bool saved_is_linear() const { return true; }       // in the number of tokens
  virtual bool detached(std::string_view) const { return false; }
  virtual bool by_head(std::string_view) const { return false; }   // the input's gradient is judged head by head

  // Two seeds differ in every value.
  virtual Case sample(std::string const& kind, Sequences const& sequences, std::uint64_t seed, bool carried) const = 0;
  virtual Result run(Case const& x, Surroundings const& around) const = 0;
  // The result of the reference loops in the subject's scalar or in double, with the choices in `chosen`.
  virtual Result loops(Case const& x, HostGroup const& chosen, bool in_double) const = 0;
  virtual Footprint footprint(Sequences const& sequences) const = 0;

  // Of the scalar that it computes in.
  double eps_of_sums() const { return eps() == epsilon_of<bf16> ? epsilon_of<float> : eps(); }
  bool in_double() const { return eps() == std::numeric_limits<double>::epsilon(); }
};

// Tokens first .. last of sequence `index`.
struct Part {
  Index index, first, last;
};

namespace detail {

// Returns the rows of tokens or of sequences that belong to the parts, one part after the other.
inline HostTensor rows_of(HostTensor const& from, Sequences const& sequences, std::vector<Part> const& parts) {
  if (from.rows == RowsOf::other || from.values.empty()) return from;
  HostTensor to = from;
  to.values.clear();
  to.shape[0] = 0;
  auto const append = [&](Index first, Index count) {
    to.values.insert(to.values.end(), from.row(first), from.row(first) + count * from.row_size());
    to.shape[0] += count;
  };
  for (Part const& part : parts) {
    if (from.rows == RowsOf::sequences) append(part.index, 1);
    else append(sequences[static_cast<std::size_t>(part.index)].start + part.first, part.last - part.first);
  }
  return to;
}
inline HostGroup rows_of(HostGroup const& from, Sequences const& sequences, std::vector<Part> const& parts) {
  HostGroup to;
  for (HostTensor const& tensor : from) to.push_back(rows_of(tensor, sequences, parts));
  return to;
}

}  // namespace detail

namespace detail {
// A run must not change its arguments. If it did, `trespass` names the first number that changed.
inline void note_overwritten(HostGroup const& before, HostGroup const& after, std::string& trespass) {
  if (std::string const changed = first_difference(before, after); trespass.empty() && !changed.empty())
    trespass = sentence("a run overwrites what it reads: ", changed);
}
}  // namespace detail

// A batch of parts of the sequences of another one.
inline Case cut(Case const& x, std::vector<Part> const& parts) {
  std::vector<Index> lengths;
  for (Part const& part : parts) lengths.push_back(part.last - part.first);
  return {packed(lengths), detail::rows_of(x.inputs, x.sequences, parts), detail::rows_of(x.d_outputs, x.sequences, parts), x.carried};
}
inline Case forward_only(Case x) {
  x.d_outputs.clear();
  return x;
}
// Replaces the rows of x for which wanted(tensor, row) holds by those of y.
template <class Wanted> void replace_rows(HostGroup& x, HostGroup const& y, Wanted wanted) {
  for (std::size_t i = 0; i < x.size(); ++i)
    for (Index row = 0; row < x[i].row_count(); ++row)
      if (wanted(x[i], row)) std::copy_n(y[i].row(row), y[i].row_size(), x[i].row(row));
}
// Sets all values to NaN. Whole numbers stay, because they are indices.
inline HostGroup all_nan(HostGroup x) {
  for (HostTensor& tensor : x)
    if (!tensor.whole) std::fill(tensor.values.begin(), tensor.values.end(), not_a_number);
  return x;
}

// The inputs of the earlier run that `leftovers` asks for.
inline Case earlier(Case const& x, Leftovers leftovers) {
  return leftovers == Leftovers::nan ? Case{x.sequences, all_nan(x.inputs), all_nan(x.d_outputs), x.carried} : x;
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::testing
#endif

// ==== hybridattn/testing/any_policy.hpp
// A policy as the laws use it.
#ifndef HYBRIDATTN_TESTING_ANY_POLICY_HPP
#define HYBRIDATTN_TESTING_ANY_POLICY_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::testing {

// The calls of a decoding. Call c reads calls[c][i] more tokens of sequence i.
using Calls = std::vector<std::vector<Index>>;
struct Decoded {
  HostGroup outputs;                   // of the tokens read, at their rows in the case; tensors without token rows are empty
  HostGroup cache;                     // at the end
  std::string trespass;
  std::ptrdiff_t kept = 0;             // bytes of the pool that are not given back, besides the cache
  std::size_t later_allocations = 0;   // of the calls after the second
};

class AnyPolicy : public Subject {
 public:
  virtual bool overflows_like_loops() const = 0;   // NaN and infinity, with its sign, are where the reference has them
  // What is wrong with the choices in `saved`, or "".
  virtual std::string wrong_choice(Case const& x, HostGroup const& saved) const = 0;
  virtual bool decodes() const = 0;
  // Decodes the tokens of x in these calls, with a cache that has just enough room.
  virtual Decoded decode(Case const& x, Calls const& calls, Surroundings const& around) const = 0;
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::testing
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

// ==== hybridattn/testing/fenced.hpp
// Tensors of a backend inside larger blocks. A kernel that writes beside a tensor, or reads there and uses what it reads, is found.
#ifndef HYBRIDATTN_TESTING_FENCED_HPP
#define HYBRIDATTN_TESTING_FENCED_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::testing {

// Where the elements of a tensor stand in its block, counted in elements.
struct Layout {
  std::vector<Index> shape, stride;
  Index first = 0, size = 0;

  // With `spaced` there is a gap behind every row of every axis, as in a packed q|k|v. Otherwise there are no gaps.
  Layout() = default;
  Layout(std::vector<Index> extents, bool spaced) : shape(std::move(extents)), stride(shape.size()) {
    Index step = 1;
    for (std::size_t axis = shape.size(); axis-- > 0;) {
      stride[axis] = step;
      step = step * shape[axis] + (spaced ? 1 : 0);
    }
    first = guard + (spaced ? 1 : 0);
    size = first + step + guard;
  }
  Index count() const {
    Index product = 1;
    for (Index extent : shape) product *= extent;
    return product;
  }
  // Calls f(element, place, length) for every row of `length` elements. `element` is the number of the first one, `place` is where it is
  // in the block.
  template <class F> void for_each_row(F f) const {
    std::vector<Index> index(shape.size());
    for (Index element = 0, place = first, all = count(), length = shape.back(); element < all; element += length) {
      f(element, place, length);
      for (std::size_t axis = shape.size() - 1; axis-- > 0;) {
        place += stride[axis];
        if (++index[axis] < shape[axis]) break;
        place -= stride[axis] * shape[axis];
        index[axis] = 0;
      }
    }
  }

 private:
  static constexpr Index guard = 64;   // elements before and behind: a whole number of cache lines
};

// The type of an element at run time: its size, how many numbers stand for it on the host, and functions that convert between the two.
struct Element {
  std::size_t bytes;
  Index numbers;   // of one element
  bool whole;
  double eps;
  void (*fill)(double number, Index count, std::byte* elements);   // with one number, all of an element's
  void (*write)(double const* numbers, Index count, std::byte* elements);
  void (*read)(std::byte const* elements, Index count, double* numbers);
};
namespace detail {

template <class E> E from_numbers(double const* x) {
  if constexpr (std::is_integral_v<E>) return *x == *x ? static_cast<E>(*x) : std::numeric_limits<E>::min();
  else if constexpr (std::is_enum_v<E>) return static_cast<E>(from_numbers<std::underlying_type_t<E>>(x));
  else return static_cast<E>(*x);
}
template <class E> void to_numbers(E const& element, double* x) { *x = static_cast<double>(element); }
template <> inline LossSum from_numbers<LossSum>(double const* x) { return {x[0], from_numbers<Index>(x + 1), from_numbers<Index>(x + 2)}; }
inline void to_numbers(LossSum const& sum, double* x) {
  x[0] = sum.loss, x[1] = static_cast<double>(sum.count), x[2] = static_cast<double>(sum.correct);
}
template <class E> inline constexpr Index numbers_of = std::is_same_v<E, LossSum> ? 3 : 1;

template <class E> void fill(double number, Index count, std::byte* to) {
  double const numbers[] = {number, number, number};
  E const element = from_numbers<E>(numbers);
  for (Index i = 0; i < count; ++i, to += sizeof(E)) std::memcpy(to, &element, sizeof(E));
}
template <class E> void write(double const* numbers, Index count, std::byte* to) {
  for (Index i = 0; i < count; ++i, numbers += numbers_of<E>, to += sizeof(E)) {
    E const element = from_numbers<E>(numbers);
    std::memcpy(to, &element, sizeof(E));
  }
}
template <class E> void read(std::byte const* from, Index count, double* numbers) {
  for (Index i = 0; i < count; ++i, numbers += numbers_of<E>, from += sizeof(E)) {
    E element;
    std::memcpy(&element, from, sizeof(E));
    to_numbers(element, numbers);
  }
}

}  // namespace detail
template <class E> inline constexpr Element element_of{sizeof(E),      detail::numbers_of<E>, std::is_integral_v<E> || std::is_enum_v<E>,
                                                       epsilon_of<E>,  detail::fill<E>,       detail::write<E>,
                                                       detail::read<E>};

// What a tensor's memory and the memory beside it hold before a run.
struct Unwritten {
  double inside = not_a_number, beside = not_a_number;
};

// A tensor of elements of any type in a block of a backend.
template <class B> class FencedBlock {
 public:
  void place(B& backend, Element const& element, std::vector<Index> extents, bool spaced, Unwritten unwritten) {
    element_ = &element;
    layout_ = Layout(std::move(extents), spaced);
    memory_ = {};
    if (layout_.count() == 0) return;
    host_.resize(static_cast<std::size_t>(layout_.size) * element.bytes);
    element.fill(unwritten.beside, layout_.size, host_.data());
    layout_.for_each_row([&](Index, Index place, Index length) { element.fill(unwritten.inside, length, at(host_, place)); });
    memory_ = {backend, {std::ssize(host_)}};
    upload(backend, host_, memory_);
  }
  void write(B& backend, std::vector<double> const& values) {
    Index const count = element_ == nullptr ? 0 : layout_.count() * element_->numbers;
    check(std::ssize(values) == count, "a tensor of ", count, " numbers cannot take ", values.size());
    if (!memory_) return;
    layout_.for_each_row(
        [&](Index e, Index place, Index length) { element_->write(values.data() + e * element_->numbers, length, at(host_, place)); });
    upload(backend, host_, memory_);
  }
  template <class E, int Rank> View<E, Rank> view(Shape<Rank> shape) {
    if (!memory_) return {nullptr, shape};
    Shape<Rank> stride;
    for (int axis = 0; axis < Rank; ++axis) stride.extent[axis] = layout_.stride[static_cast<std::size_t>(axis)];
    return {reinterpret_cast<E*>(out(memory_).data) + layout_.first, shape, stride};
  }
  template <class E, int Rank> View<E, Rank> view() {
    Shape<Rank> shape;
    for (int axis = 0; axis < Rank; ++axis) shape.extent[axis] = layout_.shape[static_cast<std::size_t>(axis)];
    return view<E>(shape);
  }
  // Reads the tensor's values. If memory beside it has changed, `trespass` names the first such place.
  void read(B& backend, HostTensor& to, std::string& trespass) const {
    if (!memory_) return;
    std::vector<std::byte> now = download(backend, memory_);
    to.values.resize(static_cast<std::size_t>(layout_.count() * element_->numbers));
    layout_.for_each_row([&](Index e, Index place, Index length) {
      element_->read(at(now, place), length, to.values.data() + e * element_->numbers);
      std::memcpy(at(now, place), at(host_, place), static_cast<std::size_t>(length) * element_->bytes);
    });
    if (!trespass.empty() || std::memcmp(now.data(), host_.data(), now.size()) == 0) return;
    Index place = 0;
    while (std::memcmp(at(now, place), at(host_, place), element_->bytes) == 0) ++place;
    trespass = sentence("memory beside ", to.name, " is overwritten, ", place - layout_.first, " elements from its start");
  }

 private:
  template <class Bytes> auto* at(Bytes& bytes, Index i) const { return bytes.data() + static_cast<std::size_t>(i) * element_->bytes; }

  Element const* element_ = nullptr;
  Layout layout_;
  std::vector<std::byte> host_;
  Tensor<std::byte, 1, B> memory_;
};

template <class E, int Rank, class B> class Fenced {
 public:
  // Memory for a tensor.
  void place(B& backend, Shape<Rank> shape, bool spaced, Unwritten unwritten) {
    shape_ = shape;
    block_.place(backend, element_of<E>, {shape.extent, shape.extent + Rank}, spaced, unwritten);
  }
  void write(B& backend, std::vector<double> const& values) { block_.write(backend, values); }
  View<E, Rank> view() { return block_.template view<E>(shape_); }
  void read(B& backend, HostTensor& to, std::string& trespass) const {
    to.shape.assign(shape_.extent, shape_.extent + Rank);
    block_.read(backend, to, trespass);
  }

 private:
  Shape<Rank> shape_;
  FencedBlock<B> block_;
};

// The role of a group of such tensors.
template <class T, class B> struct FencedRole {
  template <int Rank> using Held = Fenced<T, Rank, B>;
  template <int Rank> using Wide = Fenced<wide_t<T>, Rank, B>;
  template <int Rank> using Whole = Fenced<std::int32_t, Rank, B>;
  template <int Rank> using State = Fenced<wide_t<T>, Rank, B>;
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::testing
#endif

// ==== hybridattn/testing/machine.hpp
// Makes a backend for the laws.
#ifndef HYBRIDATTN_TESTING_MACHINE_HPP
#define HYBRIDATTN_TESTING_MACHINE_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::testing {

// make(schedule) makes a backend that works in another order for each schedule 1, 2, ..., because no result may depend on the order. A
// backend with several orders specialises this. A backend that an int constructs must specialise it, because the int may mean something
// else than a schedule.
template <class B> struct Machine {
  static_assert(!std::is_constructible_v<B, int>, "say what the schedules of this backend are: specialise testing::Machine");
  static B make(int) { return B(); }
};
// A backend whose own number is a schedule says so.
template <class B> requires B::takes_schedule struct Machine<B> {
  static B make(int schedule) { return B(schedule); }
};
// For Cpu and Fake the schedule is the number of threads.
template <> struct Machine<Cpu> {
  static Cpu make(int schedule) { return Cpu(schedule); }
};
template <> struct Machine<Fake> {
  static Fake make(int schedule) { return Fake(schedule); }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::testing
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

// ==== hybridattn/testing/traits.hpp
// What the laws need to know of a policy besides the policy. Every template here has a default that fits a plain policy;
// specialise what does not fit yours. policies.hpp does it for the library's own.
#ifndef HYBRIDATTN_TESTING_TRAITS_HPP
#define HYBRIDATTN_TESTING_TRAITS_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::testing {

// The sizes at which a policy is judged, and the inputs. Specialise as `struct Samples<Mine> : PlainSamples<Mine>`.
template <class P> struct PlainSamples {
  using Config = typename P::Config;

  static std::vector<Config> sizes() { return {Config{}}; }   // a 0 stands for the default at model_dim 32, num_heads 2
  // Inputs and outputs with all tensors, also those that a batch of training leaves out.
  static auto inputs(Config const& c, Sequences const& s) { return P::inputs(c, s); }
  static auto outputs(Config const& c, Sequences const& s) { return P::outputs(c, s); }
  // False if the policy's options make Saved grow faster than the number of tokens.
  static constexpr bool saved_is_linear = true;
  // True if a kernel sums large numbers in the order of the reference, so that it is NaN or infinite, sign included, where that is.
  static constexpr bool overflows_like_loops = false;

  // Kinds of inputs; the first one is ordinary and smooth.
  static std::vector<std::string> kinds() { return {"noise"}; }
  static void draw(std::string_view, Random& random, HostGroup& inputs) {
    for (HostTensor& tensor : inputs) set_normal(tensor, random);
  }
  // Whether the gradient of an input [N, H] is judged head by head, each against its own largest element.
  static bool by_head(std::string_view) { return false; }
};
template <class P> struct Samples : PlainSamples<P> {};

// The equations as loops, in any scalar: P::Reference if there is one, otherwise On<P, Cpu>. When forward begins, the whole numbers of
// `saved` hold the kernel's choices. A reference uses these choices and does not change them.
template <class P> struct PlainReference {
  static constexpr double tolerance = 1e-11;   // of a result in double

  template <class... Args> static void forward(Args const&... args) {
    if constexpr (requires { typename P::Reference; }) {
      P::Reference::forward(args...);
    } else {
      Cpu cpu{1};
      On<P, Cpu>::forward(cpu, args...);
    }
  }
  template <class... Args> static void backward(Args const&... args) {
    if constexpr (requires { typename P::Reference; }) {
      P::Reference::backward(args...);
    } else {
      Cpu cpu{1};
      On<P, Cpu>::backward(cpu, args...);
    }
  }
};
template <class P> struct Reference : PlainReference<P> {};

// A policy that makes choices specialises this with a static std::string wrong(config, sequences, inputs, saved, eps). It returns what is
// wrong with the choices in `saved`, made in a scalar with this eps, or "" if they are right. The tensors are in double.
template <class P> struct Choices {};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::testing
#endif

// ==== hybridattn/testing/adaptor.hpp
// Makes the Subject of the laws from a policy on a backend in a scalar. Only this template is compiled for each such triple.
#ifndef HYBRIDATTN_TESTING_ADAPTOR_HPP
#define HYBRIDATTN_TESTING_ADAPTOR_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::testing {

namespace detail {

template <int Rank> bool counts(Shape<Rank> const& shape, Index count) {
  if constexpr (Rank == 0) return false;
  else return shape[0] == count;
}

// Functions for zip. They are named types and not lambdas, so that equal groups share their instantiations.
template <class B> struct Place {
  B& backend;
  bool spaced;
  Unwritten unwritten;
  void operator()(Path const&, auto const& shape, auto& tensor) const { tensor.place(backend, shape, spaced, unwritten); }
};
template <class B> struct Write {
  B& backend;
  HostGroup const& values;
  void operator()(Path const& path, auto& tensor) const {
    if (HostTensor const* const found = values.find(path.str())) tensor.write(backend, found->values);
  }
};
template <class B> struct Read {
  B& backend;
  HostGroup& values;
  std::string& trespass;
  void operator()(Path const& path, auto& tensor) const { tensor.read(backend, values.at(path.str()), trespass); }
};
struct ToView {
  void operator()(Path const&, auto& tensor, auto& view) const { view = tensor.view(); }
};

}  // namespace detail

template <class P, class B, class T> class Adaptor : public AnyPolicy {
  static_assert(ImplementedOn<P, B, T>, "a policy is judged where it has both a forward and a backward");
  using Config = typename P::Config;
  template <class S> using Inputs = typename P::template Inputs<S>;
  template <class S> using Outputs = typename P::template Outputs<S>;
  template <class S> using Saved = typename P::template Saved<S>;

 public:
  explicit Adaptor(Config config, std::string name = type_name<P>()) : config_(P::complete(config, 32, 2)), name_(std::move(name)) {}

  std::string name() const override { return name_ + ", " + type_name<T>(); }
  double eps() const override { return epsilon_of<T>; }
  double tolerance() const override { return Reference<P>::tolerance; }
  std::vector<std::string> kinds() const override { return Samples<P>::kinds(); }
  bool saved_is_linear() const override { return Samples<P>::saved_is_linear; }
  bool overflows_like_loops() const override { return Samples<P>::overflows_like_loops; }
  bool detached(std::string_view input) const override { return P::detached(input); }
  bool by_head(std::string_view input) const override { return Samples<P>::by_head(input); }
  bool has_states() const override {
    HostGroup const group = empty_group(Samples<P>::inputs(config_, Sequences::equal(1, 1)), inputs_of);
    return std::any_of(group.begin(), group.end(), [](HostTensor const& x) { return x.name.starts_with("initial_"); });
  }

  Case sample(std::string const& kind, Sequences const& s, std::uint64_t seed, bool carried) const override {
    Case x{s, empty_group(input_shapes(s, carried), inputs_of), empty_group(output_shapes(s, carried), outputs_of), carried};
    Random random{Seed{seed}, kind}, upstream{Seed{seed}, "upstream"};
    Samples<P>::draw(kind, random, x.inputs);
    for (HostTensor& tensor : x.d_outputs) set_normal(tensor, upstream);
    round_inputs(x.inputs);
    round_inputs(x.d_outputs);
    return x;
  }

  Result run(Case const& x, Surroundings const& around) const override {
    B backend = Machine<B>::make(around.threads);
    if (around.leftovers != Leftovers::none) run_on<T>(backend, earlier(x, around.leftovers), around, {}, kernel());
    return run_on<T>(backend, x, around, {}, kernel());
  }
  Result loops(Case const& x, HostGroup const& chosen, bool in_double) const override {
    Cpu cpu{1};
    if (in_double) return run_on<double>(cpu, x, {}, chosen, Loops{});
    return run_on<T>(cpu, x, {}, chosen, Loops{});
  }

  std::string wrong_choice(Case const& x, HostGroup const& saved) const override {
    if constexpr (requires { &Choices<P>::wrong; }) {
      Cpu cpu{1};
      Inputs<FencedRole<double, Cpu>> inputs;
      Saved<FencedRole<double, Cpu>> choices;
      fill(cpu, input_shapes(x.sequences, x.carried), inputs, x.inputs);
      fill(cpu, P::saved(config_, x.sequences), choices, saved);
      return Choices<P>::wrong(config_, x.sequences, views<Inputs, In<double>>(inputs), views<Saved, In<double>>(choices),
                               epsilon_of<wide_t<T>>);
    }
    return {};
  }

  Footprint footprint(Sequences const& s) const override {
    B backend = Machine<B>::make(1);
    Case const x = sample(kinds().front(), s, 1, true);
    Result const first = run_on<T>(backend, x, {}, {}, kernel());
    auto const allocations = backend.pool().allocations();
    run_on<T>(backend, x, {}, {}, kernel());
    auto const later = backend.pool().allocations() - allocations, before = backend.pool().in_use();
    [[maybe_unused]] auto const saved = allocate<T>(backend, P::saved(config_, s));
    return {bytes<T>(P::saved(config_, s)), backend.pool().in_use() - before, first.scratch, first.kept, later};
  }

  bool decodes() const override { return Decodes<P, B, T>; }
  Decoded decode([[maybe_unused]] Case const& x, [[maybe_unused]] Calls const& calls,
                 [[maybe_unused]] Surroundings const& around) const override {
    if constexpr (Decodes<P, B, T>) {
      B backend = Machine<B>::make(around.threads);
      if (around.leftovers != Leftovers::none) decode_on(backend, earlier(x, around.leftovers), calls, around);
      return decode_on(backend, x, calls, around);
    } else {
      fail(name(), " does not decode");
    }
  }

 private:
  struct Kernel {
    template <class... Args> static void forward(B& backend, Args const&... args) { On<P, B>::forward(backend, args...); }
    template <class... Args> static void backward(B& backend, Args const&... args) { On<P, B>::backward(backend, args...); }
  };
  struct Loops {
    // Loops on tensors in bf16 compute in float too, and round what they write.
    template <class... Args> static void forward(Cpu& cpu, Args const&... args) {
      in_float(cpu, [](auto const&... floats) { Reference<P>::forward(floats...); }, args...);
    }
    template <class... Args> static void backward(Cpu& cpu, Args const&... args) {
      in_float(cpu, [](auto const&... floats) { Reference<P>::backward(floats...); }, args...);
    }
  };
  static Kernel kernel() { return {}; }

  auto input_shapes(Sequences const& s, bool carried) const { return carried ? Samples<P>::inputs(config_, s) : P::inputs(config_, s); }
  auto output_shapes(Sequences const& s, bool carried) const { return carried ? Samples<P>::outputs(config_, s) : P::outputs(config_, s); }

  static constexpr auto inputs_of = [](Config const& c, Sequences const& s) { return Samples<P>::inputs(c, s); };
  static constexpr auto outputs_of = [](Config const& c, Sequences const& s) { return Samples<P>::outputs(c, s); };
  static constexpr auto saved_of = [](Config const& c, Sequences const& s) { return P::saved(c, s); };

  // Tensors of the given shapes, all values 0. What a first axis counts follows from its extents in two batches of other sizes.
  template <class G, class ShapesOf> HostGroup empty_group(G const& shapes, ShapesOf shapes_of) const {
    HostGroup group;
    auto const few = shapes_of(config_, Sequences::equal(2, 5)), more = shapes_of(config_, Sequences::equal(3, 7));
    typename Whole32<G>::type const types{};
    zip(
        [&](Path const& path, auto const& shape, auto const& a, auto const& b, auto const& view) {
          HostTensor& tensor = group.emplace_back();
          tensor.name = path.str();
          tensor.rows = detail::counts(a, 10) && detail::counts(b, 21) ? RowsOf::tokens
                        : detail::counts(a, 2) && detail::counts(b, 3) ? RowsOf::sequences
                                                                       : RowsOf::other;
          tensor.whole = std::is_integral_v<std::remove_cvref_t<decltype(*view.data)>>;
          tensor.eps = epsilon_of<std::remove_cvref_t<decltype(*view.data)>>;
          tensor.values.resize(static_cast<std::size_t>(shape.count()));
          for (Index extent : shape.extent) tensor.shape.push_back(extent);
        },
        shapes, few, more, types);
    return group;
  }
  template <class G> struct Whole32;
  template <template <class> class G> struct Whole32<G<Shapes>> {
    using type = G<In<T>>;
  };

  template <template <class> class G, class S, class Tensors> static G<S> views(Tensors& tensors) {
    G<S> result;
    zip(detail::ToView{}, tensors, result);
    return result;
  }
  template <class M, class G, class Tensors>
  static void fill(M& backend, G const& shapes, Tensors& tensors, HostGroup const& values, Surroundings const& around = {}) {
    zip(detail::Place<M>{backend, around.spaced, {around.unwritten, around.fence}}, shapes, tensors);
    zip(detail::Write<M>{backend, values}, tensors);
  }
  template <class M, class Tensors> static HostGroup values(M& backend, Tensors& tensors, HostGroup group, std::string& trespass) {
    zip(detail::Read<M>{backend, group, trespass}, tensors);
    return group;
  }

  // Runs forward and backward of Which, the kernel or the loops, in the scalar U on the backend M.
  template <class U, class M, class Which>
  Result run_on(M& backend, Case const& x, Surroundings const& around, HostGroup const& chosen, Which) const {
    using Role = FencedRole<U, M>;
    SequencesOn<M> const s{backend, x.sequences};
    auto const in_shapes = input_shapes(s, x.carried);
    auto const out_shapes = output_shapes(s, x.carried);
    auto const saved_shapes = P::saved(config_, s);
    Inputs<Role> inputs, gradients;
    Outputs<Role> outputs, d_outputs;
    Saved<Role> saved;
    bool const has_backward = !x.d_outputs.empty();
    fill(backend, in_shapes, inputs, x.inputs, around);
    fill(backend, out_shapes, outputs, {}, around);
    if (has_backward) {
      fill(backend, in_shapes, gradients, {}, around);
      fill(backend, out_shapes, d_outputs, x.d_outputs, around);
    }
    fill(backend, saved_shapes, saved, chosen, {.unwritten = around.unwritten, .fence = around.fence});  // a layer keeps these in one piece

    Result result;
    auto const before = backend.pool().in_use();
    backend.pool().reset_peak();
    auto const read = views<Inputs, In<U>>(inputs);
    Which::forward(backend, config_, s, read, views<Outputs, Out<U>>(outputs), views<Saved, Out<U>>(saved));
    if (has_backward)
      Which::backward(backend, config_, s, read, views<Outputs, In<U>>(outputs), views<Saved, In<U>>(saved),
                      views<Outputs, In<U>>(d_outputs), views<Inputs, Out<U>>(gradients));
    result.scratch = backend.pool().peak() - before;
    result.kept = static_cast<std::ptrdiff_t>(backend.pool().in_use()) - static_cast<std::ptrdiff_t>(before);

    result.outputs = values(backend, outputs, empty_group(out_shapes, outputs_of), result.trespass);
    result.saved = values(backend, saved, empty_group(saved_shapes, saved_of), result.trespass);
    detail::note_overwritten(x.inputs, values(backend, inputs, empty_group(in_shapes, inputs_of), result.trespass), result.trespass);
    if (!has_backward) return result;
    result.gradients = values(backend, gradients, empty_group(in_shapes, inputs_of), result.trespass);
    detail::note_overwritten(x.d_outputs, values(backend, d_outputs, empty_group(out_shapes, outputs_of), result.trespass),
                             result.trespass);
    return result;
  }

  Decoded decode_on(B& backend, Case const& x, Calls const& calls, Surroundings const& around) const {
    auto const cache_of = [&](Config const& c, Sequences const& s) {
      return P::cache(c, s.count(), std::max<Index>(1, x.sequences.longest()));
    };
    typename P::template Cache<FencedRole<T, B>> cache;
    fill(backend, cache_of(config_, x.sequences), cache, {}, {.unwritten = around.unwritten, .fence = around.fence});
    Decoded result;
    result.outputs = empty_group(output_shapes(x.sequences, false), outputs_of);
    for (HostTensor& tensor : result.outputs)
      if (tensor.rows != RowsOf::tokens) tensor.values.clear();
    auto const before = backend.pool().in_use();
    std::size_t allocations = 0;
    std::vector<Index> past(x.sequences.size());
    for (std::size_t call = 0; call < calls.size(); ++call) {
      if (call <= 2) allocations = backend.pool().allocations();
      extend(backend, x, {backend, Sequences::continuing(past, calls[call])}, around, cache, result);
      for (std::size_t i = 0; i < past.size(); ++i) past[i] += calls[call][i];
    }
    result.later_allocations = backend.pool().allocations() - allocations;
    result.kept = static_cast<std::ptrdiff_t>(backend.pool().in_use()) - static_cast<std::ptrdiff_t>(before);
    result.cache = values(backend, cache, empty_group(cache_of(config_, x.sequences), cache_of), result.trespass);
    return result;
  }
  // Makes one call and copies its outputs to their places in result.outputs.
  template <class Cache>
  void extend(B& backend, Case const& x, SequencesOn<B> const& s, Surroundings const& around, Cache& cache, Decoded& result) const {
    std::vector<Part> parts;
    for (std::size_t i = 0; i < s.size(); ++i) parts.push_back({static_cast<Index>(i), s[i].past, s[i].past + s[i].length});
    Inputs<FencedRole<T, B>> inputs;
    Outputs<FencedRole<T, B>> outputs;
    fill(backend, input_shapes(s, false), inputs, detail::rows_of(x.inputs, x.sequences, parts), around);
    fill(backend, output_shapes(s, false), outputs, {}, around);
    On<P, B>::extend(backend, config_, s, views<Inputs, In<T>>(inputs), views<P::template Cache, Out<T>>(cache),
                     views<Outputs, Out<T>>(outputs));
    HostGroup const part = values(backend, outputs, empty_group(output_shapes(s, false), outputs_of), result.trespass);
    values(backend, inputs, empty_group(input_shapes(s, false), inputs_of), result.trespass);
    for (std::size_t tensor = 0; tensor < part.size(); ++tensor) {
      HostTensor& whole = result.outputs[tensor];
      if (whole.rows != RowsOf::tokens) continue;
      for (std::size_t i = 0; i < s.size(); ++i)
        std::copy_n(part[tensor].row(s[i].start), s[i].length * whole.row_size(), whole.row(x.sequences[i].start + s[i].past));
    }
  }

  Config config_;
  std::string name_;
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::testing
#endif

// ==== hybridattn/testing/bitwise_laws.hpp
// Laws that hold for every bit, in every scalar. Each returns a verdict on one policy or operation at one size.
#ifndef HYBRIDATTN_TESTING_BITWISE_LAWS_HPP
#define HYBRIDATTN_TESTING_BITWISE_LAWS_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::testing {

struct Verdict {
  std::string law;
  bool holds;
  std::string why;   // a broken law's first wrong element with its place and values, or the reason why a law has nothing to judge
};

namespace detail {

// For each sequence the position at which it is cut in two.
using Cut = std::vector<Index>;
// Returns cuts at edges of blocks, at the same place in all sequences, and two random cuts. Each kind of inputs gets only a part of the
// edges, to save time.
inline std::vector<Cut> cuts(Sequences const& s, std::size_t kind, std::size_t kinds) {
  std::vector<Cut> result;
  std::size_t const turns = std::min<std::size_t>(kinds, 4);
  std::size_t turn = kind;
  for (Index place : {1, 2, 31, 62, 63, 64, 65, 100, 129})
    if (turn++ % turns == 0) result.emplace_back(s.size(), place);
  Random random{Seed{kind}, "cuts"};
  for (int i = 0; i < 2; ++i)
    for (Cut& cut = result.emplace_back(); Sequence const sequence : s)
      cut.push_back(1 + random.below(std::max<Index>(1, sequence.length - 1)));
  return result;
}
inline bool is_early(Sequences const& s, Cut const& cut, Index token) {
  return s.positions()(token) < cut[static_cast<std::size_t>(s.owners()(token))];
}
// The sequence that a row of tokens or sequences belongs to.
inline Index owner(Sequences const& s, RowsOf rows, Index row) { return rows == RowsOf::tokens ? s.owners()(row) : row; }

// Makes the checks in order, until one returns an error. Returns this error, or "" if there is none.
template <class... Checks> std::string first_of(Checks... checks) {
  std::string why;
  auto const finds = [&](auto& check) {
    why = check();
    return !why.empty();
  };
  static_cast<void>((finds(checks) || ...));
  return why;
}
inline Verdict verdict(std::string law, std::string why) {
  bool const holds = why.empty();
  return {std::move(law), holds, std::move(why)};
}
inline std::string told(std::string const& why, std::string const& circumstances) {
  return why.empty() ? why : why + " (" + circumstances + ")";
}

// Calls check(x, result of x, case with changed inputs and d_outputs, cut) for many kinds, cuts and changes. Returns the first error.
template <class Check> std::string first_at_a_cut(Subject const& subject, Check check) {
  Sequences const s = subject.batch();
  auto const kinds = subject.kinds();
  for (std::size_t kind = 0; kind < kinds.size(); ++kind) {
    Case const x = subject.sample(kinds[kind], s, 1, true), other = subject.sample(kinds[kind], s, 2, true);
    Case const nan{s, all_nan(x.inputs), all_nan(x.d_outputs), true};
    Result const before = subject.run(x, {});
    for (Cut const& cut : cuts(s, kind, kinds.size()))
      for (bool const with_nan : {false, true}) {
        std::string const why = check(x, before, with_nan ? nan : other, cut);
        if (!why.empty())
          return sentence(why, " (before and after ", with_nan ? "NaN" : "other values", " beyond a cut; the sequences are cut at ",
                          listed(cut), "; kind ", kinds[kind], ")");
      }
  }
  return {};
}

}  // namespace detail

// When inputs at tokens >= t change, the outputs of tokens before t and what is saved of these tokens keep every bit.
inline Verdict causal_forward(Subject const& subject) {
  if (subject.batch().longest() < 2) return {"causal forward", true, "every row is a sequence of its own"};
  return detail::verdict(
      "causal forward", detail::first_at_a_cut(subject, [&](Case x, Result const& before, Case const& other, detail::Cut const& cut) {
        auto const is_early = [&](HostTensor const& tensor, Index row) {
          return tensor.rows == RowsOf::tokens && detail::is_early(x.sequences, cut, row);
        };
        replace_rows(x.inputs, other.inputs,
                     [&](HostTensor const& tensor, Index row) { return tensor.rows == RowsOf::tokens && !is_early(tensor, row); });
        x.d_outputs.clear();
        Result const after = subject.run(x, {});
        return detail::first_of([&] { return first_difference(before.outputs, after.outputs, is_early); },
                                [&] { return first_difference(before.saved, after.saved, is_early); });
      }));
}

// When d_outputs at tokens < t change, the gradients of tokens >= t keep every bit.
inline Verdict causal_backward(Subject const& subject) {
  if (subject.batch().longest() < 2) return {"causal backward", true, "every row is a sequence of its own"};
  return detail::verdict(
      "causal backward", detail::first_at_a_cut(subject, [&](Case x, Result const& before, Case const& other, detail::Cut const& cut) {
        auto const is_early = [&](HostTensor const& tensor, Index row) {
          return tensor.rows == RowsOf::tokens && detail::is_early(x.sequences, cut, row);
        };
        auto const is_late = [&](HostTensor const& tensor, Index row) { return tensor.rows == RowsOf::tokens && !is_early(tensor, row); };
        replace_rows(x.d_outputs, other.d_outputs, is_early);
        return first_difference(before.gradients, subject.run(x, {}).gradients, is_late);
      }));
}

namespace detail {
inline bool any_has_rows(HostGroup const& group) {
  return std::any_of(group.begin(), group.end(), [](HostTensor const& x) { return x.rows != RowsOf::other && !x.values.empty(); });
}
inline bool any_has_rows(Result const& result) { return any_has_rows(result.outputs) || any_has_rows(result.gradients); }
}  // namespace detail

// When inputs and d_outputs of every other sequence change, the results of the remaining sequences keep every bit.
inline Verdict independent_of_the_batch(Subject const& subject) {
  Sequences const s = subject.batch();
  std::string const kind = subject.kinds().front();
  Case const x = subject.sample(kind, s, 1, true), other = subject.sample(kind, s, 2, true);
  HostGroup const nan = all_nan(x.inputs), nan_upstream = all_nan(x.d_outputs);
  Result const before = subject.run(x, {});
  if (!detail::any_has_rows(before)) return {"independent of the batch", true, "no result has rows"};
  if (first_difference(x.inputs, other.inputs).empty()) return {"independent of the batch", true, "every batch has the same rows"};
  std::string why;
  for (Index parity : {0, 1})
    for (bool const with_nan : {false, true}) {
      if (!why.empty()) continue;
      auto const changes = [&](HostTensor const& tensor, Index row) {
        return tensor.rows != RowsOf::other && detail::owner(s, tensor.rows, row) % 2 == parity;
      };
      auto const stays = [&](HostTensor const& tensor, Index row) { return tensor.rows != RowsOf::other && !changes(tensor, row); };
      Case changed = x;
      replace_rows(changed.inputs, with_nan ? nan : other.inputs, changes);
      replace_rows(changed.d_outputs, with_nan ? nan_upstream : other.d_outputs, changes);
      Result const after = subject.run(changed, {});
      why = detail::told(detail::first_of([&] { return first_difference(before.outputs, after.outputs, stays); },
                                          [&] { return first_difference(before.saved, after.saved, stays); },
                                          [&] { return first_difference(before.gradients, after.gradients, stays); }),
                         sentence("before and after ", with_nan ? "NaN" : "other values", " in its neighbours in the batch"));
    }
  return detail::verdict("independent of the batch", why);
}

// A packed batch has the outputs, states and gradients that its sequences have when each runs alone.
inline Verdict packed_equals_its_sequences(Subject const& subject) {
  if (subject.has_tables()) return {"packed equals its sequences", true, "an input speaks of the batch as a whole"};
  Sequences const s = subject.batch();
  std::string why;
  for (std::string const& kind : {subject.kinds().front(), subject.kinds().back()}) {
    Case const x = subject.sample(kind, s, 1, true);
    Result const whole = subject.run(x, {});
    if (!detail::any_has_rows(whole)) return {"packed equals its sequences", true, "no result has rows"};
    for (Index i = 0; i < s.count() && why.empty(); ++i) {
      std::vector<Part> const own{{i, 0, s[static_cast<std::size_t>(i)].length}};
      Result const alone = subject.run(cut(x, own), {});
      auto const has_rows = [](HostTensor const& tensor, Index) { return tensor.rows != RowsOf::other; };
      why = detail::told(
          detail::first_of([&] { return first_difference(detail::rows_of(whole.outputs, s, own), alone.outputs, has_rows); },
                           [&] { return first_difference(detail::rows_of(whole.gradients, s, own), alone.gradients, has_rows); }),
          sentence("in the batch and alone, of sequence ", i, " with ", own[0].last, " tokens, kind ", kind));
    }
  }
  return detail::verdict("packed equals its sequences", why);
}

namespace detail {
// The first difference in outputs, saved tensors and gradients.
inline std::string first_difference_of_runs(Result const& a, Result const& b) {
  return first_of([&] { return first_difference(a.outputs, b.outputs); }, [&] { return first_difference(a.saved, b.saved); },
                  [&] { return first_difference(a.gradients, b.gradients); });
}
}  // namespace detail

// Two equal runs have the same bits, on any number of threads.
inline Verdict repeatable(Subject const& subject) {
  Case const x = subject.sample(subject.kinds().back(), subject.batch(), 1, true);
  Result const one = subject.run(x, {});
  std::string why;
  for (int threads : {1, 2, 3})
    if (why.empty())
      why = detail::told(detail::first_difference_of_runs(one, subject.run(x, {.threads = threads})),
                         threads == 1 ? std::string("in two equal runs") : sentence("on 1 and on ", threads, " threads"));
  return detail::verdict("repeatable", why);
}

namespace detail {
inline std::string first_not_finite(HostGroup const& group, bool infinity_too) {
  for (HostTensor const& tensor : group)
    for (Index e = 0; e < std::ssize(tensor.values); ++e) {
      double const x = tensor.values[static_cast<std::size_t>(e)];
      if (x != x || (infinity_too && std::isinf(x))) return sentence(tensor.name, tensor.place(e), " is ", number(x));
    }
  return {};
}
}  // namespace detail

namespace detail {
inline std::string first_unfilled(Result const& result) {
  return first_of([&] { return told(first_not_finite(result.outputs, true), "in outputs"); },
                  [&] { return told(first_not_finite(result.saved, false), "in what is saved"); },
                  [&] { return told(first_not_finite(result.gradients, true), "in gradients"); });
}
// The first element that other surroundings change.
inline std::string changed_by(Subject const& subject, Case const& x, Result const& plain, Surroundings const& around,
                              char const* circumstances) {
  return told(first_difference_of_runs(plain, subject.run(x, around)), circumstances);
}
}  // namespace detail

// A run writes every element of its results, also for a batch without tokens. Results are finite even if their memory held NaN before,
// and their bits do not depend on what their memory and scratch memory held before.
inline Verdict fills_everything(Subject const& subject) {
  std::string why;
  for (std::vector<Index> const& lengths : {std::vector<Index>{}, {0}, {0, 0}, {1}, {0, 2, 0}}) {
    Case const x = subject.sample(subject.kinds().front(), packed(lengths), 1, true);
    if (why.empty())
      why =
          detail::told(detail::first_unfilled(subject.run(x, {.leftovers = Leftovers::nan})), "of sequences of lengths " + listed(lengths));
  }
  Case const x = subject.sample(subject.kinds().front(), subject.batch(), 1, true);
  Result const plain = subject.run(x, {});
  auto const changed_by = [&](Surroundings const& around, char const* circumstances) {
    return detail::changed_by(subject, x, plain, around, circumstances);
  };
  return detail::verdict(
      "fills everything",
      detail::first_of([&] { return why; }, [&] { return detail::first_unfilled(plain); },
                       [&] { return changed_by({.unwritten = 3}, "among NaN and among 3, in results before they are written"); },
                       [&] { return changed_by({.leftovers = Leftovers::numbers}, "in fresh scratch memory, and in what a run left"); },
                       [&] { return changed_by({.leftovers = Leftovers::nan}, "in fresh scratch memory, and in what a run on NaN left"); },
                       [&] {
                         return changed_by({.threads = 2, .leftovers = Leftovers::nan},
                                           "in fresh scratch memory, and in what a run on NaN left, on 2 threads");
                       }));
}

// A run neither writes nor uses memory beside a tensor, also for a batch without tokens. This memory, the fence, holds NaN or another
// number.
inline Verdict fenced(Subject const& subject) {
  std::string const kind = subject.kinds().front();
  auto const trespass = [&](Sequences const& s, Surroundings const& around) {
    return subject.run(subject.sample(kind, s, 1, true), around).trespass;
  };
  Case const x = subject.sample(kind, subject.batch(), 1, true);
  Result const plain = subject.run(x, {});
  return detail::verdict(
      "fenced", detail::first_of(
                    [&] { return plain.trespass; }, [&] { return trespass(packed({0, 1}), {}); },
                    [&] { return trespass(subject.batch(), {.spaced = true}); },
                    [&] { return detail::changed_by(subject, x, plain, {.fence = -1e6}, "among NaN and among -1e6 beside all tensors"); }));
}

// Results have the same bits with and without gaps between the rows of every axis, so a run honours strides.
inline Verdict strided(Subject const& subject) {
  Case const x = subject.sample(subject.kinds().front(), subject.batch(), 1, true);
  return detail::verdict("strided",
                         detail::changed_by(subject, x, subject.run(x, {}), {.spaced = true}, "without and with gaps between the rows"));
}

// If an operation may work in place, it computes the same bits when a result is in the memory of its argument.
inline Verdict in_place(Subject const& subject) {
  if (!subject.works_in_place()) return {"in place", true, "nothing may stand in the memory of an argument"};
  Case const x = subject.sample(subject.kinds().front(), subject.batch(), 1, true);
  return detail::verdict("in place", detail::changed_by(subject, x, subject.run(x, {}), {.in_place = true}, "apart and in place"));
}

namespace detail {
inline std::string first_not_zero(HostGroup const& gradients, Subject const& subject, bool detached) {
  for (HostTensor const& tensor : gradients) {
    if (subject.detached(tensor.name) != detached) continue;
    for (Index e = 0; e < std::ssize(tensor.values); ++e)
      if (double const x = tensor.values[static_cast<std::size_t>(e)]; x != 0)
        return sentence("the gradient of ", tensor.name, tensor.place(e), " is ", number(x));
  }
  return {};
}
}  // namespace detail

// The main loss gives exactly zero to detached inputs, the auxiliary loss exactly zero to all others.
inline Verdict isolated(Subject const& subject) {
  Sequences const s = subject.batch();
  Case x = subject.sample(subject.kinds().front(), s, 1, true);
  bool const has_detached =
      std::any_of(x.inputs.begin(), x.inputs.end(), [&](HostTensor const& tensor) { return subject.detached(tensor.name); });
  HostTensor* const auxiliary = x.d_outputs.find("auxiliary_loss");
  if (!has_detached && auxiliary == nullptr) return {"isolated", true, "no input is detached"};
  if (auxiliary != nullptr) std::fill(auxiliary->values.begin(), auxiliary->values.end(), 0);
  std::string why = detail::told(detail::first_not_zero(subject.run(x, {}).gradients, subject, true), "of the main loss");
  if (auxiliary != nullptr && why.empty()) {
    for (HostTensor& tensor : x.d_outputs) std::fill(tensor.values.begin(), tensor.values.end(), tensor.name == "auxiliary_loss" ? 1 : 0);
    why = detail::told(detail::first_not_zero(subject.run(x, {}).gradients, subject, false), "of the auxiliary loss");
  }
  return detail::verdict("isolated", why);
}

// Two backends compute the same bits for one policy or operation.
inline Verdict same_on_both(Subject const& a, Subject const& b) {
  Case const x = a.sample(a.kinds().front(), a.batch(), 1, true);
  return detail::verdict(
      "same on both", detail::told(detail::first_difference_of_runs(a.run(x, {}), b.run(x, {})), "on the first backend and on the second"));
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::testing
#endif

// ==== hybridattn/testing/budget_laws.hpp
// Laws that hold within a stated budget of rounding, and the law about memory. Each returns a verdict on one policy or operation at
// one size.
#ifndef HYBRIDATTN_TESTING_BUDGET_LAWS_HPP
#define HYBRIDATTN_TESTING_BUDGET_LAWS_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::testing {

namespace detail {

// Results of the reference loops with the kernel's choices. `truth` is in double. `naive` is in the subject's scalar; its error sets the
// budget.
struct Judges {
  Result truth, naive;
};
inline HostGroup choices_in(HostGroup const& saved) {
  HostGroup choices;
  std::copy_if(saved.begin(), saved.end(), std::back_inserter(choices), [](HostTensor const& tensor) { return tensor.whole; });
  return choices;
}
inline Judges judges_of(Subject const& subject, Case const& x, Result const& result) {
  HostGroup const choices = choices_in(result.saved);
  Judges judges{subject.loops(x, choices, true), {}};
  if (!subject.in_double()) judges.naive = subject.loops(x, choices, false);
  return judges;
}

// The largest error allowed. In double it is a share of the largest element. In other scalars it is twice the error of the loops in that
// scalar, and 4 roundings of the largest element to the tensor's own scalar, because the loops may be right by luck. A largest element below 1e-3 counts as 1e-3,
// because a result that is zero on paper may be rounding.
inline double budget(Subject const& subject, HostTensor const& truth, HostTensor const* naive) {
  double const largest = std::max(max_abs(truth), 1e-3);
  return naive == nullptr ? subject.tolerance() * largest : 2 * max_difference(*naive, truth).size + 4 * naive->eps * largest;
}
// The loops do not write tensors that are not part of the equations. Such tensors are not judged.
inline bool is_unwritten(HostTensor const& truth) {
  return std::all_of(truth.values.begin(), truth.values.end(), [](double x) { return x != x; });
}
// Names the first tensor of x that differs from `expected` by more than `times` the budget, or returns "".
inline std::string beyond_budget(Subject const& subject, HostGroup const& x, HostGroup const& expected, HostGroup const& truth,
                                 HostGroup const& naive, double times) {
  for (std::size_t i = 0; i < x.size(); ++i) {
    if (x[i].whole || is_unwritten(truth[i])) continue;
    double const allowed = times * budget(subject, truth[i], naive.empty() ? nullptr : &naive[i]);
    Difference const worst = max_difference(x[i], expected[i]);
    auto const at = static_cast<std::size_t>(worst.element);
    if (!(worst.size <= allowed))
      return sentence(x[i].name, x[i].place(worst.element), " is ", number(x[i].values[at]), " instead of ", number(expected[i].values[at]),
                      ", off by ", worst.size, " where ", allowed, " is allowed");
  }
  return {};
}

struct Values {
  std::string kind;
  Sequences sequences;
  bool carried = true;
};
// Column h of a tensor [N, H].
inline HostTensor head_of(HostTensor const& x, Index h) {
  HostTensor head = x;
  head.values.clear();
  for (Index n = 0; n < x.row_count(); ++n) head.values.push_back(x.row(n)[h]);
  return head;
}
// The same budget without the 1e-3. An error below the smallest normal number of the scalar is always allowed.
inline double budget_of_head(Subject const& subject, HostTensor const& truth, HostTensor const* naive) {
  double const least = subject.in_double() ? std::numeric_limits<double>::min() : static_cast<double>(std::numeric_limits<float>::min());
  double const largest = max_abs(truth);
  return least + (naive == nullptr ? subject.tolerance() * largest : 2 * max_difference(*naive, truth).size + 4 * naive->eps * largest);
}
// Names the first head, of gradients that are judged head by head, that differs from the truth by more than `times` its budget.
inline std::string beyond_budget_of_head(Subject const& subject, HostGroup const& x, HostGroup const& truth, HostGroup const& naive,
                                         double times) {
  for (std::size_t i = 0; i < x.size(); ++i)
    for (Index h = 0; subject.by_head(x[i].name) && h < x[i].row_size(); ++h) {
      HostTensor const result = head_of(x[i], h), true_head = head_of(truth[i], h);
      HostTensor const by_loops = naive.empty() ? HostTensor{} : head_of(naive[i], h);
      double const allowed = times * budget_of_head(subject, true_head, naive.empty() ? nullptr : &by_loops);
      Difference const worst = max_difference(result, true_head);
      auto const at = static_cast<std::size_t>(worst.element);
      if (!(worst.size <= allowed))
        return sentence("head ", h, " of ", x[i].name, " is ", number(result.values[at]), " instead of ", number(true_head.values[at]),
                        " at token ", worst.element, ", off by ", worst.size, " where ", allowed, " is allowed in this head");
    }
  return {};
}
// Judges outputs, saved tensors and gradients by `times` the budget. Returns the first error, or "".
inline std::string wrong_values(Subject const& subject, Values const& of, std::uint64_t seed, double times) {
  Case const x = subject.sample(of.kind, of.sequences, seed, of.carried);
  Result const result = subject.run(x, {});
  Judges const judges = judges_of(subject, x, result);
  auto const say = [&](std::string const& why, char const* name) {
    return told(why,
                sentence(name, ", kind ", of.kind, ", longest sequence ", of.sequences.longest(), of.carried ? "" : ", without states"));
  };
  auto const group = [&](char const* name, HostGroup Result::* part) {
    return say(beyond_budget(subject, result.*part, judges.truth.*part, judges.truth.*part, judges.naive.*part, times), name);
  };
  auto const heads = [&] {
    return say(beyond_budget_of_head(subject, result.gradients, judges.truth.gradients, judges.naive.gradients, times), "gradient");
  };
  return first_of([&] { return group("output", &Result::outputs); }, [&] { return group("saved", &Result::saved); },
                  [&] { return group("gradient", &Result::gradients); }, heads);
}
// Where large scores meet, one rounding is the whole error, and the error of the loops is small by luck in 2 of 100 batches. If a result in
// another scalar than double is beyond the budget, but not beyond 4 times the budget, another sample is judged.
inline std::string wrong_values(Subject const& subject, Values const& of) {
  std::string why = wrong_values(subject, of, 1, 1);
  for (std::uint64_t seed : {2u, 3u})
    if (!why.empty() && !subject.in_double() && wrong_values(subject, of, seed - 1, 4).empty()) why = wrong_values(subject, of, seed, 1);
  return why;
}

}  // namespace detail

// Outputs and gradients are those of the reference. Gradients of gates are judged in every head by itself.
inline Verdict true_values(Subject const& subject) {
  std::vector<detail::Values> all;
  for (std::string const& kind : subject.kinds()) all.push_back({kind, subject.batch()});
  all.push_back({subject.kinds().front(), subject.batch(), false});
  for (Index length : {1, 2, 63, 64, 65, 130}) all.push_back({subject.kinds().front(), Sequences::equal(1, length)});
  std::string why;
  for (detail::Values const& values : all)
    if (why.empty()) why = detail::wrong_values(subject, values);
  return detail::verdict("true values", why);
}

// The kernel chooses the keys with the largest exact scores, as far as rounding can tell.
inline Verdict right_choices(AnyPolicy const& policy) {
  std::string why;
  for (std::string const& kind : policy.kinds())
    for (std::uint64_t seed : {1u, 2u, 3u}) {
      if (!why.empty()) continue;
      Case const x = policy.sample(kind, policy.batch(), seed, true);
      HostGroup const choices = detail::choices_in(policy.run(x, {}).saved);
      if (choices.empty()) return {"right choices", true, "nothing is chosen"};
      why = detail::told(policy.wrong_choice(x, choices), "kind " + kind);
    }
  return detail::verdict("right choices", why);
}

namespace detail {

inline double inner(HostGroup const& a, HostGroup const& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i)
    for (std::size_t e = 0; e < a[i].values.size(); ++e) sum += a[i].values[e] * b[i].values[e];
  return sum;
}
// The length of the elementwise product. A sum of this product with random signs has about this size.
inline double product_length(HostGroup const& a, HostGroup const& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i)
    for (std::size_t e = 0; e < a[i].values.size(); ++e) sum += std::pow(a[i].values[e] * b[i].values[e], 2);
  return std::sqrt(sum);
}
// The upstream gradients that reach `input`. The auxiliary loss alone reaches a detached input, and it does not reach the others.
inline HostGroup upstream_for(Subject const& subject, Case const& x, std::size_t input) {
  HostGroup upstream = x.d_outputs;
  for (HostTensor& tensor : upstream)
    if ((tensor.name == "auxiliary_loss") != subject.detached(x.inputs[input].name)) set_each(tensor, [] { return 0.0; });
  return upstream;
}
inline bool any_gradient(Result const& result) {
  return std::any_of(result.gradients.begin(), result.gradients.end(), [](HostTensor const& x) { return !x.values.empty(); });
}
// The outputs after one input has moved by a step. If the input is detached, the choices stay those of `result`.
inline HostGroup outputs_at(Subject const& subject, Case x, Result const& result, std::size_t input, HostTensor const& direction,
                            double step) {
  for (std::size_t e = 0; e < direction.values.size(); ++e) x.inputs[input].values[e] += step * direction.values[e];
  x.d_outputs.clear();
  bool const choices_fixed = subject.detached(direction.name);
  return (choices_fixed ? subject.loops(x, choices_in(result.saved), true) : subject.run(x, {})).outputs;
}
inline HostGroup difference(HostGroup x, HostGroup const& y) {
  for (std::size_t i = 0; i < x.size(); ++i)
    for (std::size_t e = 0; e < x[i].values.size(); ++e) x[i].values[e] -= y[i].values[e];
  return x;
}
// The central difference at a step h has two errors, its truncation and the rounding of each output. A second step shows their size. The
// step 2h adds three times the truncation where the function is smooth, and as much where it has a kink at x, as a rectified score has.
// This change may be small by chance, so a slope that seems wrong is judged by the changes at three more steps too.
inline std::string wrong_slope(Subject const& subject, Case const& x, Result const& result, std::size_t input, std::uint64_t seed) {
  constexpr double step = 0x1p-16;
  Random random{Seed{seed}, "direction"};
  HostTensor direction = x.inputs[input];
  set_normal(direction, random);
  HostTensor const& gradient = result.gradients[input];
  HostGroup const upstream = upstream_for(subject, x, input);
  auto const slope_at = [&](double h) {
    auto const outputs = [&](double by) { return outputs_at(subject, x, result, input, direction, by); };
    return inner(difference(outputs(h), outputs(-h)), upstream) / (2 * h);
  };
  double const along = inner({gradient}, {direction}), slope = slope_at(step),
               rounding = 8 * subject.eps() / step * product_length(result.outputs, upstream) + 1e-14;
  double allowed = 0;
  for (double const factor : {2.0, 4.0, 0.5, 0.25}) {
    allowed = std::max(allowed, 2 * std::abs(slope_at(factor * step) - slope) + rounding);
    if (std::abs(along - slope) <= allowed) return {};
  }
  return sentence("the gradient of ", gradient.name, " is ", number(along), " along a direction in which the loss rises by ", number(slope),
                  "; ", allowed, " is allowed");
}

}  // namespace detail

// In double, gradients are the slopes of a loss, in random directions of each input. Where detached inputs decide choices, the choices stay
// fixed, and the slope is that of the loops, which the law of true values compares with the kernel.
inline Verdict finite_differences(Subject const& subject) {
  if (!subject.in_double()) return {"finite differences", true, "taken in double"};
  Case const x = subject.sample(subject.kinds().front(), subject.small_batch(), 4, true);
  Result const result = subject.run(x, {});
  if (!detail::any_gradient(result)) return {"finite differences", true, "there is no backward"};
  std::string why;
  for (std::size_t input = 0; input < result.gradients.size(); ++input)
    for (std::uint64_t seed : {1u, 2u, 3u})
      if (why.empty() && !result.gradients[input].values.empty()) why = detail::wrong_slope(subject, x, result, input, seed);
  return detail::verdict("finite differences", why);
}

// Backward is linear in all d_outputs together: B(2a - 3b) = 2 B(a) - 3 B(b), and B(0) is exactly 0. a and b are multiples of 1/64, in
// bf16 of 1/4, so that the sum on the left has no rounding.
inline Verdict linear(Subject const& subject) {
  Case a = subject.sample(subject.kinds().front(), subject.batch(), 1, true), b = a;
  b.d_outputs = subject.sample(subject.kinds().front(), subject.batch(), 2, true).d_outputs;
  Case sum = a;
  for (std::size_t i = 0; i < a.d_outputs.size(); ++i) {
    double const parts = a.d_outputs[i].is_bf16() ? 4 : 64;
    for (std::size_t e = 0; e < a.d_outputs[i].values.size(); ++e) {
      double &x = a.d_outputs[i].values[e], &y = b.d_outputs[i].values[e];
      x = std::round(parts * x) / parts;
      y = std::round(parts * y) / parts;
      sum.d_outputs[i].values[e] = 2 * x - 3 * y;
    }
  }
  Result const first = subject.run(a, {});
  if (!detail::any_gradient(first)) return {"linear", true, "there is no backward"};
  HostGroup const at_a = first.gradients, at_b = subject.run(b, {}).gradients, at_sum = subject.run(sum, {}).gradients;
  for (std::size_t i = 0; i < at_sum.size(); ++i) {
    HostTensor expected = at_a[i];
    for (std::size_t e = 0; e < expected.values.size(); ++e) expected.values[e] = 2 * at_a[i].values[e] - 3 * at_b[i].values[e];
    // Gradients in bf16 are computed in float and rounded once.
    double const rounding = at_a[i].is_bf16() ? 2 * at_a[i].eps : 1024 * at_a[i].eps;
    double const allowed = rounding * (2 * max_abs(at_a[i]) + 3 * max_abs(at_b[i]));
    Difference const worst = max_difference(at_sum[i], expected);
    auto const at = static_cast<std::size_t>(worst.element);
    if (!(worst.size <= allowed))
      return {"linear", false,
              sentence("the gradient of ", expected.name, expected.place(worst.element), " is ", number(at_sum[i].values[at]),
                       " for 2a - 3b and ", number(expected.values[at]), " by its parts, off by ", worst.size, " where ", allowed,
                       " is allowed")};
  }
  for (HostTensor& tensor : a.d_outputs) set_each(tensor, [] { return 0.0; });
  for (HostTensor const& gradient : subject.run(a, {}).gradients)
    for (double const d : gradient.values)
      if (d != 0)
        return {"linear", false, sentence("a gradient of ", gradient.name, " is ", number(d), " where all gradients of outputs are 0")};
  return {"linear", true, ""};
}

namespace detail {

// Copies each final_x to the initial_x of the next part. For gradients it copies d_initial_x to the d_final_x of the part before.
inline void pass_states(HostGroup const& from, std::string_view from_prefix, HostGroup& to, std::string_view to_prefix) {
  for (HostTensor const& tensor : from)
    if (tensor.name.starts_with(from_prefix))
      if (HostTensor* const state = to.find(std::string(to_prefix) + tensor.name.substr(from_prefix.size()))) state->values = tensor.values;
}
// Cuts each sequence into its first half, one token, and the rest.
inline std::vector<Case> three_parts(Case const& x) {
  std::vector<Part> parts[3];
  for (Index i = 0; i < x.sequences.count(); ++i) {
    Index const length = x.sequences[static_cast<std::size_t>(i)].length, half = length / 2, next = std::min(half + 1, length);
    parts[0].push_back({i, 0, half});
    parts[1].push_back({i, half, next});
    parts[2].push_back({i, next, length});
  }
  return {cut(x, parts[0]), cut(x, parts[1]), cut(x, parts[2])};
}
// Joins the results of the parts to those of the whole: token rows in the order of the whole, states of part `states`, and sums of tensors
// without rows, because these are sums over tokens.
inline HostGroup join(HostGroup whole, std::vector<Case> const& parts, std::vector<HostGroup> const& groups, std::size_t states) {
  for (std::size_t i = 0; i < whole.size(); ++i) {
    if (whole[i].rows == RowsOf::sequences) whole[i].values = groups[states][i].values;
    if (whole[i].rows == RowsOf::other)
      for (std::size_t e = 0; e < whole[i].values.size(); ++e)
        whole[i].values[e] = groups[0][i].values[e] + groups[1][i].values[e] + groups[2][i].values[e];
    if (whole[i].rows != RowsOf::tokens) continue;
    Index const size = whole[i].row_size();
    auto to = whole[i].values.begin();
    for (std::size_t sequence = 0; sequence < parts[0].sequences.size(); ++sequence)
      for (std::size_t p = 0; p < parts.size(); ++p) {
        Sequence const own = parts[p].sequences[sequence];
        to = std::copy_n(groups[p][i].values.begin() + own.start * size, own.length * size, to);
      }
  }
  return whole;
}

}  // namespace detail

// Parts of a sequence, each starting from the final state of the part before, give the outputs, final state and gradients of the whole.
inline Verdict agrees_in_parts(Subject const& subject) {
  if (!subject.has_states()) return {"agrees in parts", true, "no state is carried"};
  Case const x = subject.sample(subject.kinds().front(), subject.batch(), 5, true);
  Result const whole = subject.run(x, {});
  std::vector<Case> parts = detail::three_parts(x);
  std::vector<HostGroup> outputs(3), gradients(3);
  for (std::size_t p = 0; p < 3; ++p) {
    if (p > 0) detail::pass_states(outputs[p - 1], "final_", parts[p].inputs, "initial_");
    outputs[p] = subject.run(parts[p], {}).outputs;
  }
  for (std::size_t p = 3; p-- > 0;) {
    if (p < 2) detail::pass_states(gradients[p + 1], "initial_", parts[p].d_outputs, "final_");
    gradients[p] = subject.run(parts[p], {}).gradients;
  }
  detail::Judges const judges = detail::judges_of(subject, x, whole);
  auto const compare = [&](HostGroup Result::* part, std::vector<HostGroup> const& groups, std::size_t states) {
    return detail::beyond_budget(subject, detail::join(whole.*part, parts, groups, states), whole.*part, judges.truth.*part,
                                 judges.naive.*part, 2);
  };
  return detail::verdict("agrees in parts", detail::told(detail::first_of([&] { return compare(&Result::outputs, outputs, 2); },
                                                                          [&] { return compare(&Result::gradients, gradients, 0); }),
                                                         "in three parts and whole"));
}

// Saved tensors take the announced number of bytes. A run keeps no other memory, and a second equal run allocates none. Neither saved
// tensors nor scratch memory grow faster than the number of tokens.
inline Verdict memory_as_announced(Subject const& subject) {
  std::vector<Footprint> prints;
  for (Index length : {128, 256, 512}) prints.push_back(subject.footprint(Sequences::equal(1, length)));
  for (Footprint const& print : prints) {
    if (print.announced_saved != print.taken_saved)
      return {"memory as announced", false, sentence(print.announced_saved, " bytes announced for Saved, ", print.taken_saved, " taken")};
    if (print.kept != 0) return {"memory as announced", false, sentence(print.kept, " bytes of the pool are kept after backward")};
    if (print.later_allocations != 0)
      return {"memory as announced", false, sentence(print.later_allocations, " allocations by a second, equal run")};
  }
  auto const growth = [&](char const* what, std::size_t Footprint::* bytes) -> std::string {
    auto const at = [&](std::size_t i) { return static_cast<double>(prints[i].*bytes); };
    if (at(2) - at(1) <= 2 * (at(1) - at(0))) return {};
    return sentence(what, " takes ", at(0), ", ", at(1), ", ", at(2), " bytes at 128, 256, 512 tokens: more than linear");
  };
  return detail::verdict(
      "memory as announced",
      detail::first_of([&] { return subject.saved_is_linear() ? growth("Saved", &Footprint::announced_saved) : std::string(); },
                       [&] { return growth("scratch memory", &Footprint::scratch); }));
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::testing
#endif

// ==== hybridattn/testing/decoding_laws.hpp
// The laws of policies that decode. A sequence that is read in parts, with a cache, must give what it gives when it is read whole.
#ifndef HYBRIDATTN_TESTING_DECODING_LAWS_HPP
#define HYBRIDATTN_TESTING_DECODING_LAWS_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::testing {
namespace detail {

// Calls that read each sequence to its end. next(call, length of a sequence, tokens left of it) says how many of its tokens a call reads.
template <class Next> Calls calls_of(Sequences const& s, Next next) {
  Calls calls;
  std::vector<Index> left;
  for (Sequence const sequence : s) left.push_back(sequence.length);
  while (std::any_of(left.begin(), left.end(), [](Index n) { return n > 0; })) {
    auto& lengths = calls.emplace_back();
    for (std::size_t i = 0; i < left.size(); ++i) {
      lengths.push_back(std::min(left[i], next(std::ssize(calls) - 1, s[i].length, left[i])));
      left[i] -= lengths.back();
    }
  }
  return calls;
}
struct Splitting {
  std::string name;
  Calls calls;
};
// Reads a prompt of any length, 0 included, then 0 to 9 tokens at a time.
inline Splitting in_pieces(Sequences const& s, std::uint64_t seed) {
  Random random{Seed{seed}, "pieces"};
  return {"in pieces", calls_of(s, [&](Index call, Index length, Index) { return random.below(call == 0 ? length + 1 : 10); })};
}
inline std::vector<Splitting> splittings(Sequences const& s, std::uint64_t seed) {
  return {{"half, then token by token", calls_of(s, [](Index call, Index length, Index) { return call == 0 ? length / 2 : Index{1}; })},
          in_pieces(s, seed),
          {"token by token", calls_of(s, [](Index, Index, Index) { return Index{1}; })},
          {"at once", calls_of(s, [](Index, Index length, Index) { return length; })}};
}

// A sample of sequences that begin here. Initial states are zero where a policy's inputs always have them.
inline Case sample_to_decode(AnyPolicy const& policy, std::string const& kind, Sequences const& s, std::uint64_t seed) {
  Case x = policy.sample(kind, s, seed, false);
  for (HostTensor& tensor : x.inputs)
    if (tensor.rows == RowsOf::sequences) std::fill(tensor.values.begin(), tensor.values.end(), 0);
  return x;
}

inline std::string wrong_decoding(AnyPolicy const& policy, std::string const& kind, Splitting const& splitting, std::uint64_t seed,
                                  double times) {
  Case const x = forward_only(sample_to_decode(policy, kind, all_lengths(), seed));
  Judges const judges = judges_of(policy, x, policy.run(x, {}));
  Decoded const decoded = policy.decode(x, splitting.calls, {});
  return told(beyond_budget(policy, decoded.outputs, judges.truth.outputs, judges.truth.outputs, judges.naive.outputs, times),
              sentence("decoded ", splitting.name, ", kind ", kind));
}
// If the error is little more than the budget, judges another sample, as the law of true values does.
inline std::string wrong_decoding(AnyPolicy const& policy, std::string const& kind, Splitting const& splitting) {
  std::string why = wrong_decoding(policy, kind, splitting, 1, 1);
  for (std::uint64_t seed : {2u, 3u})
    if (!why.empty() && !policy.in_double() && wrong_decoding(policy, kind, splitting, seed - 1, 4).empty())
      why = wrong_decoding(policy, kind, splitting, seed, 1);
  return why;
}

}  // namespace detail

// However a sequence is split, the outputs are those of the whole sequence, within the budget of true values.
inline Verdict decodes_the_whole(AnyPolicy const& policy) {
  if (!policy.decodes()) return {"decodes the whole", true, "it does not decode"};
  auto const splittings = detail::splittings(detail::all_lengths(), 1);
  auto const kinds = policy.kinds();
  std::string why;
  for (std::size_t kind = 0; kind < kinds.size(); ++kind)
    for (std::size_t i = 0; i < splittings.size(); ++i)   // the first kind all ways, the others one each in turn
      if (why.empty() && (kind == 0 || kind % splittings.size() == i)) why = detail::wrong_decoding(policy, kinds[kind], splittings[i]);
  return detail::verdict("decodes the whole", why);
}

namespace detail {

// Says where outputs of a token depend on a later token or on another sequence, or "".
inline std::string decoding_sees_too_much(AnyPolicy const& policy, Case const& x, Calls const& calls) {
  Decoded const before = policy.decode(x, calls, {});
  HostGroup const nan = all_nan(x.inputs);
  std::string why;
  for (Cut const& cut : cuts(x.sequences, 0, 2)) {
    if (!why.empty()) break;
    auto const is_early = [&](HostTensor const&, Index row) { return detail::is_early(x.sequences, cut, row); };
    Case changed = x;
    replace_rows(changed.inputs, nan, [&](HostTensor const& t, Index row) { return t.rows == RowsOf::tokens && !is_early(t, row); });
    why = told(first_difference(before.outputs, policy.decode(changed, calls, {}).outputs, is_early),
               sentence("before and after NaN beyond a cut, in decoding; the sequences are cut at ", listed(cut)));
  }
  for (Index parity : {0, 1}) {
    if (!why.empty()) break;
    auto const stays = [&](HostTensor const& t, Index row) { return owner(x.sequences, t.rows, row) % 2 != parity; };
    Case changed = x;
    replace_rows(changed.inputs, nan, [&](HostTensor const& t, Index row) { return t.rows == RowsOf::tokens && !stays(t, row); });
    Decoded const after = policy.decode(changed, calls, {});
    why = told(first_of([&] { return first_difference(before.outputs, after.outputs, stays); },
                        [&] { return first_difference(before.cache, after.cache, stays); }),
               "before and after NaN in its neighbours in the batch, in decoding");
  }
  return why;
}
inline std::string decoding_differs_alone(AnyPolicy const& policy, Case const& x, Calls const& calls) {
  Decoded const whole = policy.decode(x, calls, {});
  std::string why;
  for (Index i = 0; i < x.sequences.count() && why.empty(); ++i) {
    std::vector<Part> const own{{i, 0, x.sequences[static_cast<std::size_t>(i)].length}};
    Calls alone;
    for (auto const& lengths : calls) alone.push_back({lengths[static_cast<std::size_t>(i)]});
    why = told(first_difference(rows_of(whole.outputs, x.sequences, own), policy.decode(cut(x, own), alone, {}).outputs),
               sentence("decoded in the batch and alone, of sequence ", i, " with ", own[0].last, " tokens"));
  }
  return why;
}
// Says where a call changes the cache of a sequence that it gives no token, or "".
inline std::string decoding_disturbs(AnyPolicy const& policy, Case const& x) {
  Calls calls = calls_of(x.sequences, [](Index call, Index length, Index) { return call == 0 ? (length + 1) / 2 : length; });
  if (calls.size() > 2) calls.resize(2);
  Decoded const before = policy.decode(x, {calls[0]}, {});
  for (std::size_t i = 0; i < calls[1].size(); i += 2) calls[1][i] = 0;
  Decoded const after = policy.decode(x, calls, {});
  return told(first_difference(before.cache, after.cache, [](HostTensor const&, Index row) { return row % 2 == 0; }),
              "of a sequence that rests, before and after a call that gives tokens to others");
}
inline std::string decoding_depends(AnyPolicy const& policy, Case const& x, Calls const& calls) {
  Decoded const plain = policy.decode(x, calls, {});
  std::string why =
      first_of([&] { return plain.trespass; }, [&] { return told(first_not_finite(plain.outputs, true), "in decoded outputs"); });
  auto const compare = [&](Surroundings const& around, char const* circumstances) {
    if (!why.empty()) return;
    Decoded const other = policy.decode(x, calls, around);
    why = first_of([&] { return other.trespass; }, [&] { return told(first_difference(plain.outputs, other.outputs), circumstances); });
  };
  compare({}, "in two equal runs of decoding");
  compare({.threads = 2}, "decoded on 1 and on 2 threads");
  compare({.threads = 3}, "decoded on 1 and on 3 threads");
  compare({.unwritten = 3, .fence = 3}, "decoded among NaN and among 3, in the cache and in results before they are written");
  compare({.spaced = true}, "decoded without and with gaps between the rows");
  compare({.leftovers = Leftovers::nan}, "decoded in fresh scratch memory, and in what a run on NaN left");
  return why;
}
inline std::string decoding_keeps_memory(AnyPolicy const& policy, Case const& x, Calls const& calls) {
  Decoded const decoded = policy.decode(x, calls, {});
  if (decoded.kept != 0) return sentence(decoded.kept, " bytes of the pool are kept after decoding, besides the cache");
  if (decoded.later_allocations != 0) return sentence(decoded.later_allocations, " allocations by steps after the first, equal one");
  return {};
}

}  // namespace detail

// Decoding keeps the laws of bits, does not read elements of the cache before they are written, does not change the cache of sequences
// without new tokens, and allocates no memory from step to step.
inline Verdict decodes_cleanly(AnyPolicy const& policy) {
  if (!policy.decodes()) return {"decodes cleanly", true, "it does not decode"};
  Sequences const s = detail::all_lengths();
  Case const x = detail::sample_to_decode(policy, policy.kinds().front(), s, 1);
  Calls const calls = detail::in_pieces(s, 2).calls;
  Case const steps = detail::sample_to_decode(policy, policy.kinds().front(), Sequences::equal(2, 40), 1);
  return detail::verdict(
      "decodes cleanly",
      detail::first_of([&] { return detail::decoding_sees_too_much(policy, x, calls); },
                       [&] { return detail::decoding_differs_alone(policy, x, calls); },
                       [&] { return detail::decoding_disturbs(policy, x); }, [&] { return detail::decoding_depends(policy, x, calls); },
                       [&] {
                         return detail::decoding_keeps_memory(
                             policy, steps, detail::calls_of(steps.sequences, [](Index, Index, Index) { return Index{1}; }));
                       }));
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::testing
#endif

// ==== hybridattn/testing/watchdog.hpp
// A Watchdog makes an endless loop a failed test instead of tests that hang.
#ifndef HYBRIDATTN_TESTING_WATCHDOG_HPP
#define HYBRIDATTN_TESTING_WATCHDOG_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::testing {

// Watches the code that runs while it lives. After `patience` it calls `bark`. An endless loop cannot be stopped from outside, so by
// default `bark` ends the program and says why.
class Watchdog {
 public:
  static inline std::chrono::milliseconds patience =
      std::chrono::minutes(20);   // what it watches takes milliseconds, or seconds where much runs
  static inline std::function<void(std::string const&)> bark = [](std::string const& what) {
    std::fprintf(stderr, "%s does not end\n", what.c_str());
    std::fflush(nullptr);
    std::_Exit(1);
  };

  explicit Watchdog(std::string what) : what_(std::move(what)), thread_([this] { watch(); }) {}
  Watchdog(Watchdog const&) = delete;
  Watchdog& operator=(Watchdog const&) = delete;
  ~Watchdog() { stop(); }

  // Ends the watch. Returns whether the watched code ended in time.
  bool stop() {
    {
      std::lock_guard const lock{mutex_};
      over_ = true;
    }
    changed_.notify_one();
    if (thread_.joinable()) thread_.join();
    return !barked_;
  }

 private:
  void watch() {
    std::unique_lock lock{mutex_};
    if (changed_.wait_for(lock, patience, [this] { return over_; })) return;
    barked_ = true;
    bark(what_);
  }

  std::string what_;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool over_ = false, barked_ = false;
  std::thread thread_;
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::testing
#endif

// ==== hybridattn/testing/bad_value_laws.hpp
// The law of bad values: NaN, infinity, and numbers at the ends of the scalar's range. A training run that diverges has all of them.
#ifndef HYBRIDATTN_TESTING_BAD_VALUE_LAWS_HPP
#define HYBRIDATTN_TESTING_BAD_VALUE_LAWS_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::testing {
namespace detail {

struct BadValue {
  char const* name;
  double value;
};
inline std::vector<BadValue> bad_values(AnyPolicy const& policy) {
  constexpr double infinity = std::numeric_limits<double>::infinity();
  double const huge = policy.in_double() ? 1e308 : 1e38, tiny = policy.in_double() ? 0x1p-1074 : 0x1p-149;
  return {{"NaN", not_a_number},
          {"a NaN of all bits", std::bit_cast<double>(~std::uint64_t{0})},
          {"infinity", infinity},
          {"-infinity", -infinity},
          {"a number near the largest", huge},
          {"a number near the lowest", -huge},
          {"the smallest number", tiny}};
}

enum class Kind { finite, nan, infinity, minus_infinity };
inline Kind kind_of(double x) {
  return std::isfinite(x) ? Kind::finite : x != x ? Kind::nan : x > 0 ? Kind::infinity : Kind::minus_infinity;
}

// The first element that is finite in one group and not in the other. If kinds count, also the first of another Kind.
inline std::string first_other_kind(HostGroup const& kernel, HostGroup const& loops, bool kinds_count) {
  for (std::size_t i = 0; i < kernel.size(); ++i) {
    HostTensor const &x = kernel[i], &y = loops[i];
    for (Index e = 0; e < std::ssize(x.values) && !x.whole; ++e) {
      double const a = x.values[static_cast<std::size_t>(e)], b = y.values[static_cast<std::size_t>(e)];
      if (kinds_count ? kind_of(a) != kind_of(b) : std::isfinite(a) != std::isfinite(b))
        return sentence(x.name, x.place(e), " is ", number(a), "; the loops make it ", number(b));
    }
  }
  return {};
}
// Finds the first element that a NaN changes in the kernel's results while, in the loops, it changes nothing in the same row of a head.
// A gradient that is judged head by head may change by roundings, because it may be a difference of sums that held the NaN.
struct Effect {
  HostGroup const &without, &with;
};
inline std::string first_touched(Effect const& kernel, Effect const& loops, AnyPolicy const& policy) {
  for (std::size_t i = 0; i < kernel.with.size(); ++i) {
    Index const size = kernel.with[i].shape.back();
    double const rounding = policy.by_head(kernel.with[i].name) ? 128 * kernel.with[i].eps * max_abs(kernel.without[i]) : 0;
    auto const differ = [&](Effect const& effect, Index e, Index count) {
      double const *const a = effect.without[i].values.data() + e, *const b = effect.with[i].values.data() + e;
      return !std::equal(a, a + count, b, [&](double x, double y) { return same_bits(x, y) || std::abs(x - y) <= rounding; });
    };
    for (Index e = 0; e < std::ssize(kernel.with[i].values); ++e)
      if (differ(kernel, e, 1) && !differ(loops, e / size * size, size))
        return sentence(kernel.with[i].name, kernel.with[i].place(e), " changes from ",
                        number(kernel.without[i].values[static_cast<std::size_t>(e)]), " to ",
                        number(kernel.with[i].values[static_cast<std::size_t>(e)]));
  }
  return {};
}

// A policy and a batch of good values, in which the law spoils one tensor at a time.
class BadValues {
 public:
  BadValues(AnyPolicy const& policy, Sequences const& s)
      : policy_(policy), x_(policy.sample(policy.kinds().front(), s, 1, true)),
        decoded_(forward_only(sample_to_decode(policy, policy.kinds().front(), s, 1))), sound_(policy.run(x_, {})),
        sound_loops_(policy.loops(x_, choices_in(sound_.saved), false)) {}

  // Puts `bad` into one element or one row of each input and each output's gradient, one tensor after the other.
  std::string spoil(BadValue const& bad, std::size_t turn) const {
    std::string why;
    auto const each = [&](Case& x, HostGroup& group, bool decodes) {
      for (std::size_t i = 0; i < group.size() && why.empty(); ++i) {
        if (group[i].values.empty() || (decodes && group[i].rows != RowsOf::tokens)) continue;
        HostGroup const before = group;
        Index const row = row_to_spoil(group[i], turn++);
        if (turn % 3 == 0) std::fill_n(group[i].row(row), group[i].row_size(), bad.value);
        else group[i].row(row)[static_cast<Index>(turn) % group[i].row_size()] = bad.value;
        bool const judged = judges(group[i], bad.value);
        why = told(decodes ? wrong_decoding(x, judged) : wrong(x, bad.value, judged),
                   sentence(bad.name, " in row ", row, " of ", &group == &x.inputs ? "" : "the gradient of ", group[i].name));
        group = before;
      }
    };
    Case x = x_, decoded = decoded_;
    each(x, x.inputs, false);
    each(x, x.d_outputs, false);
    if (policy_.decodes()) each(decoded, decoded.inputs, true);
    return why;
  }
  // Multiplies all inputs with token rows by `times`, except detached ones, because the auxiliary loss sums those in its own way.
  std::string enlarge(double times) const {
    Case x = x_;
    for (HostTensor& tensor : x.inputs)
      if (tensor.rows == RowsOf::tokens && !policy_.detached(tensor.name))
        for (double& value : tensor.values) value *= times;
    return told(wrong(x, times, kinds_count()), sentence("all inputs times ", times));
  }

 private:
  // A token of the last sequence, at an edge of a block or between edges.
  Index row_to_spoil(HostTensor const& tensor, std::size_t turn) const {
    Index const last = tensor.row_count() - 1, length = x_.sequences.longest();
    if (tensor.rows != RowsOf::tokens) return last;
    Index const positions[] = {0, length / 2, 31, 32, length - 1, 3, 16};
    return last + 1 - length + positions[turn % std::size(positions)];
  }
  // kinds_count() says whether results must be NaN or infinite exactly as those of the loops. Otherwise a kernel may overflow where the
  // loops do not. A finite bad value is judged only if kinds count and the main loss reaches the spoiled tensor.
  bool kinds_count() const { return policy_.overflows_like_loops(); }
  bool judges(HostTensor const& spoiled, double bad) const {
    return !std::isfinite(bad) || (kinds_count() && !policy_.detached(spoiled.name) && spoiled.name != "auxiliary_loss");
  }

  std::string wrong(Case const& x, double bad, bool judged) const {
    Result const result = policy_.run(x, {});
    if (!judged) return {};
    Result const loops = policy_.loops(x, choices_in(result.saved), false);
    bool const same_choices = first_difference(choices_in(sound_.saved), choices_in(result.saved)).empty();
    auto const other_kind = [&](HostGroup Result::* part) { return first_other_kind(result.*part, loops.*part, kinds_count()); };
    auto const touched = [&](HostGroup Result::* part) {
      if (bad == bad || !same_choices) return std::string();
      return first_touched({sound_.*part, result.*part}, {sound_loops_.*part, loops.*part}, policy_);
    };
    return first_of([&] { return told(other_kind(&Result::outputs), "an output"); },
                    [&] { return told(other_kind(&Result::saved), "saved"); },
                    [&] { return told(other_kind(&Result::gradients), "a gradient"); }, [&] { return touched(&Result::outputs); },
                    [&] { return touched(&Result::gradients); });
  }
  std::string wrong_decoding(Case const& x, bool judged) const {
    HostGroup const outputs = policy_.decode(x, in_pieces(x.sequences, 2).calls, {}).outputs;
    if (!judged) return {};
    HostGroup loops = policy_.loops(x, choices_in(policy_.run(x, {}).saved), false).outputs;
    for (std::size_t i = 0; i < loops.size(); ++i)
      if (outputs[i].values.empty()) loops[i].values.clear();
    return told(first_other_kind(outputs, loops, kinds_count()), "decoded");
  }

  AnyPolicy const& policy_;
  Case x_, decoded_;
  Result sound_, sound_loops_;
};

}  // namespace detail

// A run ends, whatever the inputs hold. With a NaN or an infinity in an input, a result is finite exactly where the reference loops, in the
// policy's scalar and on the kernel's choices, make it finite. Results that do not read a NaN keep every bit, but a gradient that is judged
// head by head may differ by 128 roundings. With overflows_like_loops, results are NaN or infinite, with the sign, where those of the loops
// are, on large finite inputs too.
inline Verdict bears_bad_values(AnyPolicy const& policy) {
  Watchdog watchdog{sentence(policy.name(), ", on bad values,")};
  std::string why;
  std::size_t turn = 0;
  detail::BadValues const long_batch{policy, packed({5, 0, 70})}, short_batch{policy, packed({2, 0, 37})};
  for (detail::BadValue const& bad : detail::bad_values(policy))
    if (why.empty()) why = (std::exchange(turn, turn + 1) == 0 ? long_batch : short_batch).spoil(bad, turn);
  for (double const times : {3e4, 1e10, 1e18})
    if (why.empty()) why = long_batch.enlarge(times);
  if (!watchdog.stop()) why = "a run does not end";
  return detail::verdict("bears bad values", why);
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::testing
#endif

// ==== hybridattn/testing/operation.hpp
// Makes the Subject of the laws from an operation on a backend in a scalar. operations.hpp names the groups of the library's operations.
#ifndef HYBRIDATTN_TESTING_OPERATION_HPP
#define HYBRIDATTN_TESTING_OPERATION_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

namespace testing::detail {
// AnyScalar stands for a model's scalar, AnyWide for the scalar of Wide tensors, which is never narrower than float.
struct AnyScalar {};
struct AnyWide {};
}  // namespace testing::detail
template <> struct WideOf<testing::detail::AnyScalar> {
  using type = testing::detail::AnyWide;
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
namespace hybridattn::inline HYBRIDATTN_ABI::testing {

// A tensor whose elements have the type E, whatever the scalar is, such as sums in double or losses.
namespace detail {
template <class S, class E, int Rank> struct OfType;
template <class E, int Rank> struct OfType<Shapes, E, Rank> {
  using type = Shape<Rank>;
};
template <class T, class E, int Rank> struct OfType<In<T>, E, Rank> {
  using type = View<E const, Rank>;
};
template <class T, class E, int Rank> struct OfType<Out<T>, E, Rank> {
  using type = View<E, Rank>;
};
}  // namespace detail
template <class S, class E, int Rank> using OfType = typename detail::OfType<S, E, Rank>::type;

// Operation<Op> names an operation's groups, as a policy does, and says how to call the operation with them:
//
//   template <> struct Operation<Op> : PlainOperation {
//     Config, sizes()                                     its arguments on the host, and those that it is judged at
//     Inputs<S>,  inputs(config, sequences)               a shape whose extents are 0 makes an empty view
//     Outputs<S>, outputs(config, sequences)
//     forward<B, T>(backend, config, sequences, x, y)     calls On<Op, B>::forward
//     backward<B, T>(backend, config, sequences, x, y, d_y, d_x)
//   };
//
// A tensor whose first axis counts tokens has rows. With rows_stand_alone, no row depends on another one.
template <class Op> struct Operation;

struct PlainOperation {
  // Whether each row is a sequence of its own. Otherwise the operation works on sequences, as a policy does.
  static constexpr bool rows_stand_alone = true;
  // Whether an input is a table of the whole batch, so that no part of the batch can be judged by itself.
  template <class Config> static bool has_tables(Config const&) { return false; }
  // Results that may be in the memory of an argument. {"y", "x"} says that forward's y may be in x, {"d_x", "d_y"} that backward's d_x
  // may be in d_y, and {"d_x", "x"} that d_x may be in x.
  static std::vector<std::pair<std::string_view, std::string_view>> in_place() { return {}; }
  // Whether a result ("y" or "d_x") is computed from what its memory holds before, for example by adding to it.
  template <class Config> static bool starts_from(Config const&, std::string_view) { return false; }
  // Whether backward makes the gradient of an input, and whether it takes the gradient of an output. Whole numbers have no gradient.
  template <class Config> static bool has_gradient(Config const&, std::string_view) { return true; }
  template <class Config> static bool takes_gradient(Config const&, std::string_view) { return true; }
  // Sets the inputs that are not noise. Tables of the batch must not be drawn from `random`, so that they are the same for every seed.
  template <class Config> static void draw(Config const&, Sequences const&, Random&, HostGroup&) {}
  // Where backward takes a gradient of a result as a number of the host, returns the config with this number.
  template <class Config> static Config with_upstream(Config c, HostGroup const&) { return c; }
};

template <class Op>
concept HasOperation = requires { Operation<Op>::sizes(); };

namespace detail {

// A tensor of a group before it has memory.
struct Declared {
  std::string name;
  Element const* element;
  std::vector<Index> extents;
  RowsOf rows = RowsOf::other;
};
// Finds out what the first axis of each tensor counts, from its shapes for two sequences of five tokens and for three of seven.
inline std::vector<Declared> with_rows(std::vector<Declared> list, std::vector<Declared> const& few, std::vector<Declared> const& more) {
  for (std::size_t i = 0; i < list.size(); ++i) {
    auto const counts = [&](Index two, Index three) { return few[i].extents[0] == two && more[i].extents[0] == three; };
    list[i].rows = counts(10, 21) ? RowsOf::tokens : counts(2, 3) ? RowsOf::sequences : RowsOf::other;
  }
  return list;
}
// How a scalar and its wide type are in memory.
struct Elements {
  Element const *scalar, *wide;
};
template <class T> inline constexpr Elements elements_in{&element_of<T>, &element_of<wide_t<T>>};

struct Declare {
  std::vector<Declared>& list;
  Elements elements;
  template <class E, int Rank> void operator()(Path const& path, Shape<Rank> const& shape, View<E const, Rank> const&) const {
    Element const* element;
    if constexpr (std::is_same_v<E, AnyScalar>) element = elements.scalar;
    else if constexpr (std::is_same_v<E, AnyWide>) element = elements.wide;
    else element = &element_of<E>;
    list.push_back({path.str(), element, {shape.extent, shape.extent + Rank}});
  }
};
template <template <class> class G> std::vector<Declared> declared(G<Shapes> const& shapes, Elements elements) {
  std::vector<Declared> list;
  zip(Declare{list, elements}, shapes, G<In<AnyScalar>>{});
  return list;
}

template <class B> using Blocks = std::vector<FencedBlock<B>*>;
// Views of blocks, in the order of the group's fields.
template <class B> struct NextView {
  FencedBlock<B>* const* next;
  template <class E, int Rank> void operator()(Path const&, View<E, Rank>& view) { view = (*next++)->template view<E, Rank>(); }
};
template <class Group, class B> Group views(Blocks<B> const& blocks) {
  Group group;
  NextView<B> next{blocks.data()};
  zip(next, group);
  return group;
}

// Calls an operation with its config, in one scalar on one backend. The interface does not depend on the operation's type.
template <class B> struct Call {
  virtual ~Call() = default;
  virtual bool has_backward() const = 0;
  virtual void forward(B&, SequencesOn<B> const&, Blocks<B> const& x, Blocks<B> const& y) const = 0;
  virtual void backward(B&, SequencesOn<B> const&, HostGroup const& upstream, Blocks<B> const& x, Blocks<B> const& y, Blocks<B> const& d_y,
                        Blocks<B> const& d_x) const = 0;
};
template <class Op, class B, class T> struct CallOf final : Call<B> {
  using O = Operation<Op>;
  using Config = typename O::Config;
  template <class S> using Inputs = typename O::template Inputs<S>;
  template <class S> using Outputs = typename O::template Outputs<S>;
  static constexpr bool with_backward = requires(B& b, Config c, SequencesOn<B> s, Inputs<In<T>> x, Outputs<In<T>> y, Inputs<Out<T>> d_x) {
    O::template backward<B, T>(b, c, s, x, y, y, d_x);
  };
  Config config;

  explicit CallOf(Config c) : config(c) {}
  bool has_backward() const override { return with_backward; }
  void forward(B& backend, SequencesOn<B> const& s, Blocks<B> const& x, Blocks<B> const& y) const override {
    O::template forward<B, T>(backend, config, s, views<Inputs<In<T>>>(x), views<Outputs<Out<T>>>(y));
  }
  void backward([[maybe_unused]] B& backend, [[maybe_unused]] SequencesOn<B> const& s, [[maybe_unused]] HostGroup const& upstream,
                [[maybe_unused]] Blocks<B> const& x, [[maybe_unused]] Blocks<B> const& y, [[maybe_unused]] Blocks<B> const& d_y,
                [[maybe_unused]] Blocks<B> const& d_x) const override {
    if constexpr (with_backward)
      O::template backward<B, T>(backend, O::with_upstream(config, upstream), s, views<Inputs<In<T>>>(x), views<Outputs<In<T>>>(y),
                                 views<Outputs<In<T>>>(d_y), views<Inputs<Out<T>>>(d_x));
  }
};

// Some results are added to what their memory holds before. For a result of forward, the old values are one more input. For a gradient,
// they are the gradient of one more output, which is the input itself.
inline std::string before(std::string const& output) { return output + " before"; }
inline std::string passed_on(std::string const& input) { return input + " passed on"; }

// An operation as lists of tensors, without a type.
struct Description {
  std::vector<Declared> inputs, outputs;
  std::vector<std::pair<std::string_view, std::string_view>> in_place;
  std::function<bool(std::string const&)> starts_from, has_gradient;
};

// A tensor of zeros.
inline HostTensor host_tensor(Declared const& d, std::string name) {
  HostTensor tensor{std::move(name), d.rows, d.element->whole, d.extents, {}, d.element->eps};
  Index count = d.element->numbers;
  for (Index const extent : d.extents) count *= extent;
  if (d.element->numbers > 1) tensor.shape.push_back(d.element->numbers);
  tensor.values.resize(static_cast<std::size_t>(count));
  return tensor;
}

// Declared tensors in memory.
template <class B> struct Placed {
  std::vector<Declared> const& declared;
  std::vector<FencedBlock<B>> blocks;

  Placed(B& backend, std::vector<Declared> const& list, Surroundings const& around) : declared(list), blocks(list.size()) {
    for (std::size_t i = 0; i < blocks.size(); ++i)
      blocks[i].place(backend, *list[i].element, list[i].extents, around.spaced, {around.unwritten, around.fence});
  }
  void write(B& backend, HostGroup const& values) {
    for (std::size_t i = 0; i < blocks.size(); ++i) blocks[i].write(backend, values[i].values);
  }
  HostGroup read(B& backend, std::string& trespass) const {
    HostGroup group;
    for (std::size_t i = 0; i < blocks.size(); ++i) {
      HostTensor& tensor = group.emplace_back(host_tensor(declared[i], declared[i].name));
      blocks[i].read(backend, tensor, trespass);
    }
    return group;
  }
  Blocks<B> all() {
    Blocks<B> list;
    for (FencedBlock<B>& block : blocks) list.push_back(&block);
    return list;
  }
};

// One forward and backward.
template <class B> class OperationRun {
 public:
  OperationRun(B& backend, Description const& description, Call<B> const& call, Case const& x, Surroundings const& around)
      : backend_(backend), description_(description), call_(call), case_(x), around_(around), sequences_(backend, x.sequences),
        inputs_(backend, description.inputs, around), outputs_(backend, description.outputs, around) {}

  Result run() {
    inputs_.write(backend_, case_.inputs);
    start(outputs_, case_.inputs, "", before);
    forward();
    result_.outputs = outputs_.read(backend_, result_.trespass);
    pass_on();
    result_.gradients = no_gradients();
    if (call_.has_backward() && !case_.d_outputs.empty()) backward();
    note_overwritten(declared_part(case_.inputs, inputs_), inputs_.read(backend_, result_.trespass), result_.trespass);
    return std::move(result_);
  }

 private:
  void forward() {
    Blocks<B> arguments = inputs_.all();
    share(arguments, inputs_, case_.inputs, "", outputs_, "");
    measured([&] { call_.forward(backend_, sequences_, arguments, outputs_.all()); });
  }
  void backward() {
    Placed<B> d_outputs{backend_, description_.outputs, around_};
    d_outputs.write(backend_, case_.d_outputs);
    std::vector<Declared> const wanted = those_with_a_gradient();
    Placed<B> gradients{backend_, wanted, around_};
    start(gradients, case_.d_outputs, "d_", passed_on);
    Blocks<B> upstream = d_outputs.all(), arguments = inputs_.all();
    share(upstream, d_outputs, case_.d_outputs, "d_", gradients, "d_");
    share(arguments, inputs_, case_.inputs, "", gradients, "d_");
    measured([&] { call_.backward(backend_, sequences_, case_.d_outputs, arguments, outputs_.all(), upstream, gradients.all()); });
    result_.gradients = gradients.read(backend_, result_.trespass);
    note_overwritten(declared_part(case_.d_outputs, d_outputs), d_outputs.read(backend_, result_.trespass), result_.trespass);
  }

  // The inputs as gradients. An input without a gradient has extents of 0.
  std::vector<Declared> those_with_a_gradient() const {
    std::vector<Declared> list = description_.inputs;
    for (Declared& d : list)
      if (d.element->whole || !description_.has_gradient(d.name)) std::fill(d.extents.begin(), d.extents.end(), 0);
    return list;
  }
  HostGroup no_gradients() const {
    HostGroup group;
    for (Declared const& d : description_.inputs) group.emplace_back(host_tensor(d, d.name)).values.clear();
    return group;
  }
  // Writes old values to the results that start from them.
  void start(Placed<B>& results, HostGroup const& from, std::string const& prefix, std::string (*name)(std::string const&)) {
    for (std::size_t i = 0; i < results.blocks.size(); ++i)
      if (description_.starts_from(prefix + results.declared[i].name))
        if (HostTensor const* const values = from.find(name(results.declared[i].name))) results.blocks[i].write(backend_, values->values);
  }
  // For a run in place, writes an argument's values to the block of its result and passes this block as the argument too.
  void share(Blocks<B>& arguments, Placed<B> const& named, HostGroup const& values, std::string const& argument_prefix, Placed<B>& results,
             std::string const& result_prefix) {
    for (auto const& [result, argument] : description_.in_place)
      for (std::size_t r = 0; r < results.blocks.size(); ++r)
        for (std::size_t a = 0; a < arguments.size(); ++a)
          if (around_.in_place && !values[a].values.empty() && result == result_prefix + results.declared[r].name &&
              argument == argument_prefix + named.declared[a].name) {
            results.blocks[r].write(backend_, values[a].values);
            arguments[a] = &results.blocks[r];
          }
  }
  template <class F> void measured(F f) {
    auto const in_use = backend_.pool().in_use();
    backend_.pool().reset_peak();
    f();
    result_.scratch = std::max(result_.scratch, backend_.pool().peak() - in_use);
    result_.kept += static_cast<std::ptrdiff_t>(backend_.pool().in_use()) - static_cast<std::ptrdiff_t>(in_use);
  }
  void pass_on() {
    for (std::size_t i = 0; i < description_.inputs.size(); ++i)
      if (std::string const& name = description_.inputs[i].name; description_.starts_from("d_" + name))
        result_.outputs.emplace_back(case_.inputs[i]).name = passed_on(name);
  }
  static HostGroup declared_part(HostGroup const& group, Placed<B> const& placed) {
    return HostGroup(group.begin(), group.begin() + std::ssize(placed.blocks));
  }

  B& backend_;
  Description const& description_;
  Call<B> const& call_;
  Case const& case_;
  Surroundings const& around_;
  SequencesOn<B> sequences_;
  Placed<B> inputs_, outputs_;
  Result result_;
};

// The facts about an operation with its config that do not depend on the scalar.
struct Facts {
  virtual ~Facts() = default;
  virtual Description describe(Sequences const& s, Elements elements) const = 0;
  virtual void draw(Sequences const& s, Random& random, HostGroup& inputs) const = 0;
  virtual bool takes_gradient(std::string_view output) const = 0;
  virtual bool rows_stand_alone() const = 0;
  virtual bool has_tables() const = 0;
};
template <class Op> struct FactsOf final : Facts {
  using O = Operation<Op>;
  typename O::Config config;

  explicit FactsOf(typename O::Config c) : config(c) {}
  Description describe(Sequences const& s, Elements elements) const override {
    auto const declare = [&](auto const& shapes, auto const& few, auto const& more) {
      return with_rows(declared(shapes, elements), declared(few, elements), declared(more, elements));
    };
    Sequences const few = Sequences::equal(2, 5), more = Sequences::equal(3, 7);
    return {declare(O::inputs(config, s), O::inputs(config, few), O::inputs(config, more)),
            declare(O::outputs(config, s), O::outputs(config, few), O::outputs(config, more)), O::in_place(),
            [this](std::string const& result) { return O::starts_from(config, result); },
            [this](std::string const& input) { return O::has_gradient(config, input); }};
  }
  void draw(Sequences const& s, Random& random, HostGroup& inputs) const override { O::draw(config, s, random, inputs); }
  bool takes_gradient(std::string_view output) const override { return O::takes_gradient(config, output); }
  bool rows_stand_alone() const override { return O::rows_stand_alone; }
  bool has_tables() const override { return O::has_tables(config); }
};

class AnyOperation : public Subject {
 public:
  std::string name() const override { return name_; }
  double eps() const override { return eps_; }
  double tolerance() const override { return 1e-12; }
  std::vector<std::string> kinds() const override { return {"noise"}; }
  Sequences batch() const override { return facts_->rows_stand_alone() ? Sequences::equal(150, 1) : Subject::batch(); }
  Sequences small_batch() const override { return facts_->rows_stand_alone() ? Sequences::equal(40, 1) : Subject::small_batch(); }
  bool has_tables() const override { return facts_->has_tables(); }
  bool works_in_place() const override { return !describe(Sequences::equal(1, 1)).in_place.empty(); }
  bool has_states() const override {
    auto const inputs = describe(Sequences::equal(1, 1)).inputs;
    return std::any_of(inputs.begin(), inputs.end(), [](Declared const& d) { return d.name.starts_with("initial_") && d.extents[0] > 0; });
  }
  Case sample(std::string const&, Sequences const& s, std::uint64_t seed, bool carried) const override {
    Description const d = describe(s);
    Case x{s, tensors_of(d.inputs), tensors_of(d.outputs), carried};
    for (Declared const& output : d.outputs)
      if (d.starts_from(output.name)) x.inputs.push_back(host_tensor(output, before(output.name)));
    for (Declared const& input : d.inputs)
      if (d.starts_from("d_" + input.name)) x.d_outputs.push_back(host_tensor(input, passed_on(input.name)));
    Random random{Seed{seed}, "inputs"}, upstream{Seed{seed}, "upstream"};
    for (HostTensor& tensor : x.inputs)
      if (!tensor.whole) set_normal(tensor, random);
    facts_->draw(s, random, x.inputs);
    for (HostTensor& tensor : x.d_outputs)
      if (!tensor.whole && facts_->takes_gradient(tensor.name)) set_normal(tensor, upstream);
    for (std::size_t i = 0; i < d.outputs.size(); ++i)   // a loss has a gradient, its counts have none
      if (d.outputs[i].element->numbers > 1) std::fill(x.d_outputs[i].values.begin() + 1, x.d_outputs[i].values.end(), 0);
    round_inputs(x.inputs);
    round_inputs(x.d_outputs);
    return x;
  }

 protected:
  AnyOperation(std::string name, double eps, Elements elements, std::unique_ptr<Facts> facts)
      : facts_(std::move(facts)), elements_(elements), name_(std::move(name)), eps_(eps) {}
  Description describe(Sequences const& s) const { return facts_->describe(s, elements_); }
  template <class M> Result run_on(M& backend, Call<M> const& call, Elements elements, Case const& x, Surroundings const& around) const {
    Description const description = facts_->describe(x.sequences, elements);
    return OperationRun<M>{backend, description, call, x, around}.run();
  }

 private:
  static HostGroup tensors_of(std::vector<Declared> const& list) {
    HostGroup group;
    for (Declared const& d : list) group.push_back(host_tensor(d, d.name));
    return group;
  }

  std::unique_ptr<Facts> facts_;
  Elements elements_;
  std::string name_;
  double eps_;
};

// Any operation on one backend in one scalar.
template <class B, class T> class OperationIn : public AnyOperation {
 public:
  Result run(Case const& x, Surroundings const& around) const override {
    B backend = Machine<B>::make(around.threads);
    if (around.leftovers != Leftovers::none) run_here(backend, earlier(x, around.leftovers), around);
    return run_here(backend, x, around);
  }
  Result loops(Case const& x, HostGroup const&, bool in_double) const override {
    Cpu cpu{1};
    return in_double ? this->run_on(cpu, *in_double_, elements_in<double>, x, {}) : this->run_on(cpu, *on_cpu_, elements_in<T>, x, {});
  }
  Footprint footprint(Sequences const& s) const override {
    B backend = Machine<B>::make(1);
    Case const x = this->sample("noise", s, 1, true);
    Result const first = run_here(backend, x, {});
    auto const allocations = backend.pool().allocations();
    run_here(backend, x, {});
    return {0, 0, first.scratch, first.kept, backend.pool().allocations() - allocations};
  }

 protected:
  OperationIn(std::string const& name, std::unique_ptr<Facts> facts, std::unique_ptr<Call<B>> here, std::unique_ptr<Call<Cpu>> on_cpu,
              std::unique_ptr<Call<Cpu>> in_double)
      : AnyOperation(name + ", " + type_name<T>(), epsilon_of<T>, elements_in<T>, std::move(facts)), here_(std::move(here)),
        on_cpu_(std::move(on_cpu)), in_double_(std::move(in_double)) {}

 private:
  Result run_here(B& backend, Case const& x, Surroundings const& around) const {
    return this->run_on(backend, *here_, elements_in<T>, x, around);
  }

  std::unique_ptr<Call<B>> here_;
  std::unique_ptr<Call<Cpu>> on_cpu_, in_double_;
};

}  // namespace detail

// One operation on one backend in one scalar.
template <class Op, class B, class T> class OperationOn final : public detail::OperationIn<B, T> {
  template <class M, class U> using CallOf = detail::CallOf<Op, M, U>;
  using Config = typename Operation<Op>::Config;

 public:
  explicit OperationOn(Config const& c, std::string const& name = type_name<Op>())
      : detail::OperationIn<B, T>(
            name, std::unique_ptr<detail::Facts>(new detail::FactsOf<Op>(c)), std::unique_ptr<detail::Call<B>>(new CallOf<B, T>(c)),
            std::unique_ptr<detail::Call<Cpu>>(new CallOf<Cpu, T>(c)), std::unique_ptr<detail::Call<Cpu>>(new CallOf<Cpu, double>(c))) {}
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::testing
#endif

// ==== hybridattn/testing/operation_laws.hpp
// The law that judges an operation's values, and the comparison of two backends.
#ifndef HYBRIDATTN_TESTING_OPERATION_LAWS_HPP
#define HYBRIDATTN_TESTING_OPERATION_LAWS_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::testing {

namespace detail {

// Moves every number by up to a rounding of a scalar with this eps.
inline void move_by_rounding(HostGroup& group, double eps, Random& random) {
  for (HostTensor& tensor : group)
    if (!tensor.whole)
      for (double& x : tensor.values) x *= 1 + eps * random.uniform(-1, 1);
}
// How far each tensor of a group may be off.
using Budgets = std::vector<double>;
inline void widen(Budgets& budgets, HostGroup const& moved, HostGroup const& truth) {
  budgets.resize(truth.size());
  for (std::size_t i = 0; i < truth.size(); ++i) budgets[i] = std::max(budgets[i], 8 * max_difference(moved[i], truth[i]).size);
}

// The result in double, and how far an operation may be off that computes in a scalar with this eps. A sum of rounded terms is the exact
// sum of terms that moved by as much. So the budget of a tensor is 8 times the most that it moves by when every input moves by up to a
// rounding, and 4 roundings of its largest element to the scalar that stores it.
struct Truth {
  Result result;
  Budgets outputs, gradients;

  Truth(Subject const& subject, Case const& x, HostGroup const& choices, double eps) : result(subject.loops(x, choices, true)) {
    for (std::uint64_t seed : {1u, 2u, 3u}) {
      Random random{Seed{seed}, "roundings"};
      Case moved = x;
      move_by_rounding(moved.inputs, eps, random);
      move_by_rounding(moved.d_outputs, eps, random);
      Result const other = subject.loops(moved, choices, true);
      widen(outputs, other.outputs, result.outputs);
      widen(gradients, other.gradients, result.gradients);
    }
  }
};
// Names the first tensor that differs by more than `times` the budget, or returns "". Whole numbers must be equal.
inline std::string apart(HostGroup const& x, HostGroup const& y, HostGroup const& truth, Budgets const& budgets, double times) {
  for (std::size_t i = 0; i < x.size(); ++i) {
    double const allowed = x[i].whole ? 0 : times * (budgets[i] + 4 * std::max(x[i].eps, y[i].eps) * max_abs(truth[i]));
    Difference const worst = max_difference(x[i], y[i]);
    auto const at = static_cast<std::size_t>(worst.element);
    if (!(worst.size <= allowed) || !std::isfinite(allowed))   // a budget that is infinite judges nothing
      return sentence(x[i].name, x[i].place(worst.element), " is ", number(x[i].values[at]), " and ", number(y[i].values[at]),
                      ", apart by ", worst.size, " where ", allowed, " is allowed");
  }
  return {};
}
inline std::string apart(Result const& x, Result const& y, Truth const& truth, double times) {
  return first_of([&] { return apart(x.outputs, y.outputs, truth.result.outputs, truth.outputs, times); },
                  [&] { return apart(x.gradients, y.gradients, truth.result.gradients, truth.gradients, times); });
}

}  // namespace detail

// Two backends or two scalars agree. Each may be off by the budget, so they differ by twice the budget at most. The loops of `a`, with the
// choices of `a`, are the truth.
inline Verdict agree_within_budget(Subject const& a, Subject const& b) {
  Case const x = a.sample(a.kinds().front(), a.batch(), 1, true);
  Result const of_a = a.run(x, {});
  detail::Truth const truth{a, x, detail::choices_in(of_a.saved), std::max(a.eps_of_sums(), b.eps_of_sums())};
  return detail::verdict("agree within budget",
                         detail::told(detail::apart(of_a, b.run(x, {}), truth, 2), "on the first backend and on the second"));
}

// An operation's results are those of Cpu in double, within the budget of its scalar.
inline Verdict agrees_with_cpu(Subject const& operation) {
  std::string why;
  for (Sequences const& s : {operation.batch(), Sequences::equal(1, 1), Sequences::equal(1, 33)}) {
    Case const x = operation.sample(operation.kinds().front(), s, 1, true);
    detail::Truth const truth{operation, x, {}, operation.eps_of_sums()};
    if (why.empty()) why = detail::told(detail::apart(operation.run(x, {}), truth.result, truth, 1), "here and on Cpu in double");
  }
  return detail::verdict("agrees with Cpu", why);
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::testing
#endif

// ==== hybridattn/testing/judge.hpp
// Judges an attention policy or an operation, the library's or yours, by all laws. testing::judge<MyPolicy, Cpu, float>() returns a verdict
// for each law at each size; a broken law says why. It needs no test framework. traits.hpp says what a policy may add: sizes, typical
// inputs, a reference. operation.hpp says how an operation names its groups.
#ifndef HYBRIDATTN_TESTING_JUDGE_HPP
#define HYBRIDATTN_TESTING_JUDGE_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::testing {

template <class Of> struct Law {
  char const* name;
  Verdict (*judge)(Of const&);
};
// The laws of policies and of operations.
inline constexpr Law<Subject> common_laws[] = {
    {"causal forward", causal_forward},
    {"causal backward", causal_backward},
    {"independent of the batch", independent_of_the_batch},
    {"packed equals its sequences", packed_equals_its_sequences},
    {"repeatable", repeatable},
    {"fills everything", fills_everything},
    {"fenced", fenced},
    {"strided", strided},
    {"finite differences", finite_differences},
    {"linear", linear},
    {"agrees in parts", agrees_in_parts},
    {"memory as announced", memory_as_announced},
};
inline constexpr Law<AnyPolicy> policy_laws[] = {
    {"isolated", [](AnyPolicy const& policy) { return isolated(policy); }},
    {"true values", [](AnyPolicy const& policy) { return true_values(policy); }},
    {"right choices", right_choices},
    {"decodes the whole", decodes_the_whole},
    {"decodes cleanly", decodes_cleanly},
    {"bears bad values", bears_bad_values},
};
inline constexpr Law<Subject> operation_laws[] = {
    {"agrees with Cpu", agrees_with_cpu},
    {"in place", in_place},
};

namespace detail {

// Judges a subject by each law. A subject that throws breaks the law that called it.
template <class Of, std::size_t Count> void judge_by(Law<Of> const (&laws)[Count], Of const& subject, std::vector<Verdict>& verdicts) {
  for (Law<Of> const& law : laws) {
    try {
      verdicts.push_back(law.judge(subject));
    } catch (std::exception const& error) {
      verdicts.push_back({law.name, false, sentence("it throws: ", error.what())});
    }
  }
}
// Appends verdicts. A `why` that is not empty gets the subject's name and the number of the size in front.
inline void append(std::vector<Verdict>& all, std::vector<Verdict> verdicts, Subject const& subject, std::size_t size) {
  for (Verdict& verdict : verdicts) {
    if (!verdict.why.empty()) verdict.why = sentence(subject.name(), ", size ", size, ": ", verdict.why);
    all.push_back(std::move(verdict));
  }
}

}  // namespace detail

// Returns all verdicts at one size.
inline std::vector<Verdict> judge(AnyPolicy const& policy) {
  std::vector<Verdict> verdicts;
  detail::judge_by<Subject>(common_laws, policy, verdicts);
  detail::judge_by(policy_laws, policy, verdicts);
  return verdicts;
}
inline std::vector<Verdict> judge(detail::AnyOperation const& operation) {
  std::vector<Verdict> verdicts;
  detail::judge_by<Subject>(common_laws, operation, verdicts);
  detail::judge_by<Subject>(operation_laws, operation, verdicts);
  return verdicts;
}

// Returns all verdicts at all sizes of Samples<P>, or of Operation<P>.
template <class P, class B, class T> std::vector<Verdict> judge() {
  std::vector<Verdict> verdicts;
  auto const at = [&](auto const& sizes, auto make) {
    for (std::size_t size = 0; size < sizes.size(); ++size) {
      auto const subject = make(sizes[size]);
      detail::append(verdicts, judge(subject), subject, size);
    }
  };
  if constexpr (HasOperation<P>) at(Operation<P>::sizes(), [](auto const& config) { return OperationOn<P, B, T>{config}; });
  else at(Samples<P>::sizes(), [](auto const& config) { return Adaptor<P, B, T>{config}; });
  return verdicts;
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::testing
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

// ==== hybridattn/testing/operations.hpp
// The groups of the library's operations, and how the laws call each operation. They are not in the operations' own headers, because only
// the laws need them and every include of the library would pay for them.
#ifndef HYBRIDATTN_TESTING_OPERATIONS_HPP
#define HYBRIDATTN_TESTING_OPERATIONS_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::testing {

namespace detail {

// Draws whole numbers from first to last - 1. For tables of a batch, pass a Random of their own, so that they are the same for every seed.
inline void draw_whole(HostTensor& tensor, Random& random, Index first, Index last) {
  set_each(tensor, [&] { return static_cast<double>(first + random.below(last - first)); });
}
// Draws the row of each choice of the batch among the rows of all experts. The order is arbitrary, but the same for every seed.
inline void draw_places(HostTensor& places) {
  Random random{Seed{1}, "places"};
  for (std::size_t i = 0; i < places.values.size(); ++i) {
    places.values[i] = static_cast<double>(i);
    std::swap(places.values[i], places.values[static_cast<std::size_t>(random.below(static_cast<Index>(i) + 1))]);
  }
}
// The second of four experts has most rows and the third has the others. The first and the last have none.
inline constexpr Index experts = 4;
inline void draw_offsets(HostTensor& offsets, Index rows) {
  double const most = static_cast<double>(rows - rows / 3), all = static_cast<double>(rows);
  offsets.values = {0, 0, most, all, all};
}
template <class T> void copy_rows(auto& backend, View<T const, 1> from, View<T, 2> to) {
  for (Index n = 0; n < to.extent(0); ++n) backend.copy(to.row(n), from.data, static_cast<std::size_t>(from.count()) * sizeof(T));
}

}  // namespace detail

// ---- arithmetic

template <> struct Operation<Fill> : PlainOperation {
  struct Config {
    Index count = 0;   // elements of a token
    double value = 0;
  };
  static std::vector<Config> sizes() { return {{1, 0.25}, {120, -3}}; }
  static bool has_tables(Config const& c) { return c.count > 1; }
  template <class S> using Inputs = Nothing<S>;
  template <class S> struct Outputs {
    Held<S, 1> y;
    HYBRIDATTN_FIELDS(y)
  };
  static Inputs<Shapes> inputs(Config const&, Sequences const&) { return {}; }
  static Outputs<Shapes> outputs(Config const& c, Sequences const& s) { return {{s.tokens() * c.count}}; }
  template <class B, class T> static void forward(B& backend, Config const& c, SequencesOn<B> const&, Inputs<In<T>>, Outputs<Out<T>> y) {
    On<Fill, B>::forward(backend, static_cast<T>(c.value), y.y);
  }
};

// One element for each token, or more elements for each token than a task has.
struct ElementwiseOperation : PlainOperation {
  struct Config {
    Index count = 0;   // elements of a token
  };
  static std::vector<Config> sizes() { return {{1}, {120}}; }
  static bool has_tables(Config const& c) { return c.count > 1; }   // with more elements than tokens, no element belongs to a token
  static Shape<1> line(Config const& c, Sequences const& s) { return {s.tokens() * c.count}; }
};

template <> struct Operation<Add> : ElementwiseOperation {
  template <class S> struct Inputs {
    Held<S, 1> x;
    HYBRIDATTN_FIELDS(x)
  };
  template <class S> struct Outputs {
    Held<S, 1> y;
    HYBRIDATTN_FIELDS(y)
  };
  static Inputs<Shapes> inputs(Config const& c, Sequences const& s) { return {line(c, s)}; }
  static Outputs<Shapes> outputs(Config const& c, Sequences const& s) { return {line(c, s)}; }
  static bool starts_from(Config const&, std::string_view result) { return result == "y"; }
  template <class B, class T> static void forward(B& backend, Config const&, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<Out<T>> y) {
    On<Add, B>::forward(backend, x.x, y.y);
  }
};

template <> struct Operation<AddWeighted> : PlainOperation {
  struct Config {
    double weight = 0;
  };
  static std::vector<Config> sizes() { return {{0.3}, {0}}; }
  template <class S> struct Inputs {
    Held<S, 1> x;
    HYBRIDATTN_FIELDS(x)
  };
  template <class S> struct Outputs {
    OfType<S, double, 1> sum;
    HYBRIDATTN_FIELDS(sum)
  };
  static Inputs<Shapes> inputs(Config const&, Sequences const&) { return {{1}}; }
  static Outputs<Shapes> outputs(Config const&, Sequences const&) { return {{1}}; }
  static bool starts_from(Config const&, std::string_view result) { return result == "sum"; }
  template <class B, class T> static void forward(B& backend, Config const& c, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<Out<T>> y) {
    On<AddWeighted, B>::forward(backend, c.weight, x.x, y.sum);
  }
};

// ---- gates

template <> struct Operation<Swiglu> : PlainOperation {
  struct Config {
    Index count = 0;   // elements of a token
    bool up = true;
  };
  static std::vector<Config> sizes() { return {{120}, {1}, {1, false}}; }
  static bool has_tables(Config const& c) { return c.count > 1; }
  template <class S> struct Inputs {
    Held<S, 1> gate, up;
    HYBRIDATTN_FIELDS(gate, up)
  };
  template <class S> struct Outputs {
    Held<S, 1> y;
    HYBRIDATTN_FIELDS(y)
  };
  static Inputs<Shapes> inputs(Config const& c, Sequences const& s) { return {line(c, s), c.up ? line(c, s) : Shape<1>{}}; }
  static Outputs<Shapes> outputs(Config const& c, Sequences const& s) { return {line(c, s)}; }
  template <class B, class T> static void forward(B& backend, Config const&, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<Out<T>> y) {
    On<Swiglu, B>::forward(backend, x.gate, x.up, y.y);
  }
  template <class B, class T>
  static void backward(B& backend, Config const&, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<In<T>>, Outputs<In<T>> d_y,
                       Inputs<Out<T>> d_x) {
    On<Swiglu, B>::backward(backend, x.gate, x.up, d_y.y, d_x.gate, d_x.up);
  }

 private:
  static Shape<1> line(Config const& c, Sequences const& s) { return {s.tokens() * c.count}; }
};

template <> struct Operation<SigmoidGate> : ElementwiseOperation {
  template <class S> struct Inputs {
    Held<S, 1> x, z;
    HYBRIDATTN_FIELDS(x, z)
  };
  template <class S> struct Outputs {
    Held<S, 1> y;
    HYBRIDATTN_FIELDS(y)
  };
  static Inputs<Shapes> inputs(Config const& c, Sequences const& s) { return {line(c, s), line(c, s)}; }
  static Outputs<Shapes> outputs(Config const& c, Sequences const& s) { return {line(c, s)}; }
  template <class B, class T> static void forward(B& backend, Config const&, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<Out<T>> y) {
    On<SigmoidGate, B>::forward(backend, x.x, x.z, y.y);
  }
  template <class B, class T>
  static void backward(B& backend, Config const&, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<In<T>>, Outputs<In<T>> d_y,
                       Inputs<Out<T>> d_x) {
    On<SigmoidGate, B>::backward(backend, x.x, x.z, d_y.y, d_x.x, d_x.z);
  }
};

template <> struct Operation<GdnGate> : PlainOperation {
  struct Config {
    Index heads = 0;
    int range = 1;
  };
  static std::vector<Config> sizes() { return {{5, 1}, {3, 2}}; }
  template <class S> struct Inputs {
    Held<S, 2> a, b;             // [N, HV]
    Wide<S, 1> a_log, dt_bias;   // [HV]
    HYBRIDATTN_FIELDS(a, b, a_log, dt_bias)
  };
  template <class S> struct Outputs {
    Wide<S, 2> g, beta;
    HYBRIDATTN_FIELDS(g, beta)
  };
  static Inputs<Shapes> inputs(Config const& c, Sequences const& s) {
    return {{s.tokens(), c.heads}, {s.tokens(), c.heads}, {c.heads}, {c.heads}};
  }
  static Outputs<Shapes> outputs(Config const& c, Sequences const& s) { return {{s.tokens(), c.heads}, {s.tokens(), c.heads}}; }
  template <class B, class T> static void forward(B& backend, Config const& c, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<Out<T>> y) {
    On<GdnGate, B>::forward(backend, c.range, x.a, x.b, x.a_log, x.dt_bias, y.g, y.beta);
  }
  template <class B, class T>
  static void backward(B& backend, Config const& c, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<In<T>>, Outputs<In<T>> d_y,
                       Inputs<Out<T>> d_x) {
    On<GdnGate, B>::backward(backend, c.range, x.a, x.b, x.a_log, x.dt_bias, d_y.g, d_y.beta, d_x.a, d_x.b, d_x.a_log, d_x.dt_bias);
  }
};

// ---- norms

template <> struct Operation<RmsNorm> : PlainOperation {
  struct Config {
    Index columns = 0;
    RmsNorm::Options options = {};
    Into into = Into::overwrite;
  };
  static std::vector<Config> sizes() { return {{40}, {7, {NormWeight::plain, 1e-5}, Into::add}}; }
  template <class S> struct Inputs {
    Held<S, 2> x;   // [N, C]
    Wide<S, 1> w;   // [C]
    HYBRIDATTN_FIELDS(x, w)
  };
  template <class S> struct Outputs {
    Held<S, 2> y;
    HYBRIDATTN_FIELDS(y)
  };
  static Inputs<Shapes> inputs(Config const& c, Sequences const& s) { return {{s.tokens(), c.columns}, {c.columns}}; }
  static Outputs<Shapes> outputs(Config const& c, Sequences const& s) { return {{s.tokens(), c.columns}}; }
  static bool starts_from(Config const& c, std::string_view result) { return result == "d_x" && c.into == Into::add; }
  template <class B, class T> static void forward(B& backend, Config const& c, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<Out<T>> y) {
    On<RmsNorm, B>::forward(backend, c.options, x.x, x.w, y.y);
  }
  template <class B, class T>
  static void backward(B& backend, Config const& c, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<In<T>>, Outputs<In<T>> d_y,
                       Inputs<Out<T>> d_x) {
    On<RmsNorm, B>::backward(backend, c.options, x.x, x.w, d_y.y, d_x.x, d_x.w, c.into);
  }
};

template <> struct Operation<GatedRmsNorm> : PlainOperation {
  struct Config {
    Index columns = 0;
    bool gated = true;
  };
  static std::vector<Config> sizes() { return {{40}, {7, false}}; }
  template <class S> struct Inputs {
    Held<S, 2> x, z;   // [N, C]
    Wide<S, 1> w;      // [C]
    HYBRIDATTN_FIELDS(x, z, w)
  };
  template <class S> struct Outputs {
    Held<S, 2> y;
    HYBRIDATTN_FIELDS(y)
  };
  static Inputs<Shapes> inputs(Config const& c, Sequences const& s) {
    Shape<2> const rows{s.tokens(), c.columns};
    return {rows, c.gated ? rows : Shape<2>{}, {c.columns}};
  }
  static Outputs<Shapes> outputs(Config const& c, Sequences const& s) { return {{s.tokens(), c.columns}}; }
  template <class B, class T> static void forward(B& backend, Config const&, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<Out<T>> y) {
    On<GatedRmsNorm, B>::forward(backend, 1e-6, x.x, x.z, x.w, y.y);
  }
  template <class B, class T>
  static void backward(B& backend, Config const&, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<In<T>>, Outputs<In<T>> d_y,
                       Inputs<Out<T>> d_x) {
    On<GatedRmsNorm, B>::backward(backend, 1e-6, x.x, x.z, x.w, d_y.y, d_x.x, d_x.z, d_x.w);
  }
};

// An operation on rows.
struct RowOperation : PlainOperation {
  struct Config {
    Index columns = 0;
  };
  static std::vector<Config> sizes() { return {{40}, {7}}; }
  static Shape<2> rows(Config const& c, Sequences const& s) { return {s.tokens(), c.columns}; }
};

template <> struct Operation<LayerNorm> : RowOperation {
  template <class S> struct Inputs {
    Held<S, 2> x;      // [N, C]
    Wide<S, 1> w, b;   // [C]
    HYBRIDATTN_FIELDS(x, w, b)
  };
  template <class S> struct Outputs {
    Held<S, 2> y;
    HYBRIDATTN_FIELDS(y)
  };
  static Inputs<Shapes> inputs(Config const& c, Sequences const& s) { return {rows(c, s), {c.columns}, {c.columns}}; }
  static Outputs<Shapes> outputs(Config const& c, Sequences const& s) { return {rows(c, s)}; }
  template <class B, class T> static void forward(B& backend, Config const&, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<Out<T>> y) {
    On<LayerNorm, B>::forward(backend, 1e-6, x.x, x.w, x.b, y.y);
  }
  template <class B, class T>
  static void backward(B& backend, Config const&, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<In<T>>, Outputs<In<T>> d_y,
                       Inputs<Out<T>> d_x) {
    On<LayerNorm, B>::backward(backend, 1e-6, x.x, x.w, d_y.y, d_x.x, d_x.w, d_x.b);
  }
};

template <> struct Operation<L2Norm> : RowOperation {
  template <class S> struct Inputs {
    Held<S, 2> x;   // [N, C]
    HYBRIDATTN_FIELDS(x)
  };
  template <class S> struct Outputs {
    Held<S, 2> y;
    HYBRIDATTN_FIELDS(y)
  };
  static std::vector<std::pair<std::string_view, std::string_view>> in_place() { return {{"y", "x"}, {"d_x", "d_y"}}; }
  static Inputs<Shapes> inputs(Config const& c, Sequences const& s) { return {rows(c, s)}; }
  static Outputs<Shapes> outputs(Config const& c, Sequences const& s) { return {rows(c, s)}; }
  // A row of zeros stays zero.
  static void draw(Config const&, Sequences const& s, Random&, HostGroup& inputs) {
    if (HostTensor& x = inputs.at("x"); s.tokens() > 9) std::fill_n(x.row(9), x.row_size(), 0);
  }
  template <class B, class T> static void forward(B& backend, Config const&, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<Out<T>> y) {
    On<L2Norm, B>::forward(backend, x.x, y.y);
  }
  template <class B, class T>
  static void backward(B& backend, Config const&, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<In<T>>, Outputs<In<T>> d_y,
                       Inputs<Out<T>> d_x) {
    On<L2Norm, B>::backward(backend, x.x, d_y.y, d_x.x);
  }
};

// ---- rotary positions

template <> struct Operation<RopeAngles> : PlainOperation {
  struct Config {
    Rope::Options options;
    bool positions = true;
  };
  static std::vector<Config> sizes() { return {{{.rotary_dim = 6}}, {{.rotary_dim = 4, .theta = 100}, false}}; }
  template <class S> struct Inputs {
    Whole<S, 1> positions;   // [N], or nothing
    HYBRIDATTN_FIELDS(positions)
  };
  template <class S> struct Outputs {
    Wide<S, 3> angles;   // [N, 2, rotary_dim/2]
    HYBRIDATTN_FIELDS(angles)
  };
  // Without positions, a row's angles depend on its place in the batch.
  static bool has_tables(Config const& c) { return !c.positions; }
  static Inputs<Shapes> inputs(Config const& c, Sequences const& s) { return {c.positions ? Shape<1>{s.tokens()} : Shape<1>{}}; }
  static Outputs<Shapes> outputs(Config const& c, Sequences const& s) { return {{s.tokens(), 2, c.options.rotary_dim / 2}}; }
  static void draw(Config const&, Sequences const&, Random& random, HostGroup& inputs) {
    detail::draw_whole(inputs.at("positions"), random, 0, 1000);
  }
  template <class B, class T> static void forward(B& backend, Config const& c, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<Out<T>> y) {
    On<RopeAngles, B>::forward(backend, c.options, x.positions, y.angles);
  }
};

template <> struct Operation<Rope> : PlainOperation {
  struct Config {
    Rope::Options options;
  };
  static constexpr Index heads = 2, head_dim = 8, positions = 50;
  static std::vector<Config> sizes() { return {{{.rotary_dim = 8}}, {{.rotary_dim = 4, .interleaved = true}}, {{.rotary_dim = 0}}}; }
  template <class S> struct Inputs {
    Wide<S, 3> angles;   // [P, 2, rotary_dim/2]
    Held<S, 3> x;        // [N, H, D]
    Whole<S, 1> positions;   // [N]
    HYBRIDATTN_FIELDS(angles, x, positions)
  };
  template <class S> struct Outputs {
    Held<S, 3> y;
    HYBRIDATTN_FIELDS(y)
  };
  static std::vector<std::pair<std::string_view, std::string_view>> in_place() { return {{"y", "x"}, {"d_x", "d_y"}}; }
  static Inputs<Shapes> inputs(Config const& c, Sequences const& s) {
    return {{positions, 2, c.options.rotary_dim / 2}, {s.tokens(), heads, head_dim}, {s.tokens()}};
  }
  static Outputs<Shapes> outputs(Config const&, Sequences const& s) { return {{s.tokens(), heads, head_dim}}; }
  static bool has_gradient(Config const&, std::string_view input) { return input != "angles"; }
  static void draw(Config const&, Sequences const&, Random& random, HostGroup& inputs) {
    detail::draw_whole(inputs.at("positions"), random, 0, positions);
  }
  template <class B, class T> static void forward(B& backend, Config const& c, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<Out<T>> y) {
    On<Rope, B>::forward(backend, c.options, x.angles, x.positions, x.x, y.y);
  }
  template <class B, class T>
  static void backward(B& backend, Config const& c, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<In<T>>, Outputs<In<T>> d_y,
                       Inputs<Out<T>> d_x) {
    On<Rope, B>::backward(backend, c.options, x.angles, x.positions, d_y.y, d_x.x);
  }
};

// ---- products and tables

// Which of the gradients of x and w backward computes.
enum class Wanted { both, of_x, of_w };

template <> struct Operation<Linear> : PlainOperation {
  struct Config {
    Index columns = 0, features = 0;
    Into into = Into::overwrite;
    Wanted wanted = Wanted::both;
  };
  static std::vector<Config> sizes() {
    return {{40, 33}, {7, 5, Into::add}, {7, 5, Into::overwrite, Wanted::of_x}, {7, 5, Into::overwrite, Wanted::of_w}, {0, 2}, {2, 0}};
  }
  template <class S> struct Inputs {
    Held<S, 2> x, w;   // [N, C], [M, C]
    HYBRIDATTN_FIELDS(x, w)
  };
  template <class S> struct Outputs {
    Held<S, 2> y;   // [N, M]
    HYBRIDATTN_FIELDS(y)
  };
  static Inputs<Shapes> inputs(Config const& c, Sequences const& s) { return {{s.tokens(), c.columns}, {c.features, c.columns}}; }
  static Outputs<Shapes> outputs(Config const& c, Sequences const& s) { return {{s.tokens(), c.features}}; }
  static bool starts_from(Config const& c, std::string_view result) { return result == "d_x" && c.into == Into::add; }
  static bool has_gradient(Config const& c, std::string_view input) {
    return c.wanted == Wanted::both || (c.wanted == Wanted::of_x) == (input == "x");
  }
  template <class B, class T> static void forward(B& backend, Config const&, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<Out<T>> y) {
    On<Linear, B>::forward(backend, x.x, x.w, y.y);
  }
  template <class B, class T>
  static void backward(B& backend, Config const& c, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<In<T>>, Outputs<In<T>> d_y,
                       Inputs<Out<T>> d_x) {
    On<Linear, B>::backward(backend, x.x, x.w, d_y.y, d_x.x, d_x.w, c.into);
  }
};

template <> struct Operation<GroupedLinear> : PlainOperation {
  using Config = Operation<Linear>::Config;
  static std::vector<Config> sizes() { return Operation<Linear>::sizes(); }
  static bool has_tables(Config const&) { return true; }
  template <class S> struct Inputs {
    Whole<S, 1> offsets;   // [E + 1]
    Held<S, 2> x;          // [R, C]
    Held<S, 3> w;          // [E, M, C]
    HYBRIDATTN_FIELDS(offsets, x, w)
  };
  template <class S> struct Outputs {
    Held<S, 2> y;   // [R, M]
    HYBRIDATTN_FIELDS(y)
  };
  static Inputs<Shapes> inputs(Config const& c, Sequences const& s) {
    return {{detail::experts + 1}, {s.tokens(), c.columns}, {detail::experts, c.features, c.columns}};
  }
  static Outputs<Shapes> outputs(Config const& c, Sequences const& s) { return {{s.tokens(), c.features}}; }
  static bool starts_from(Config const& c, std::string_view result) { return Operation<Linear>::starts_from(c, result); }
  static bool has_gradient(Config const& c, std::string_view input) { return Operation<Linear>::has_gradient(c, input); }
  static void draw(Config const&, Sequences const& s, Random&, HostGroup& inputs) {
    detail::draw_offsets(inputs.at("offsets"), s.tokens());
  }
  template <class B, class T> static void forward(B& backend, Config const&, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<Out<T>> y) {
    On<GroupedLinear, B>::forward(backend, x.offsets, x.x, x.w, y.y);
  }
  template <class B, class T>
  static void backward(B& backend, Config const& c, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<In<T>>, Outputs<In<T>> d_y,
                       Inputs<Out<T>> d_x) {
    On<GroupedLinear, B>::backward(backend, x.offsets, x.x, x.w, d_y.y, d_x.x, d_x.w, c.into);
  }
};

template <> struct Operation<Embedding> : PlainOperation {
  struct Config {
    Index columns = 0;
    Into into = Into::overwrite;
  };
  static constexpr Index vocabulary = 9;
  static std::vector<Config> sizes() { return {{70}, {7, Into::add}}; }
  template <class S> struct Inputs {
    Whole<S, 1> tokens;   // [N]
    Held<S, 2> table;     // [V, C]
    HYBRIDATTN_FIELDS(tokens, table)
  };
  template <class S> struct Outputs {
    Held<S, 2> y;   // [N, C]
    HYBRIDATTN_FIELDS(y)
  };
  static Inputs<Shapes> inputs(Config const& c, Sequences const& s) { return {{s.tokens()}, {vocabulary, c.columns}}; }
  static Outputs<Shapes> outputs(Config const& c, Sequences const& s) { return {{s.tokens(), c.columns}}; }
  static bool starts_from(Config const& c, std::string_view result) { return result == "d_table" && c.into == Into::add; }
  // The last token of the vocabulary does not occur.
  static void draw(Config const&, Sequences const&, Random& random, HostGroup& inputs) {
    detail::draw_whole(inputs.at("tokens"), random, 0, vocabulary - 1);
  }
  template <class B, class T> static void forward(B& backend, Config const&, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<Out<T>> y) {
    On<Embedding, B>::forward(backend, x.tokens, x.table, y.y);
  }
  template <class B, class T>
  static void backward(B& backend, Config const& c, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<In<T>>, Outputs<In<T>> d_y,
                       Inputs<Out<T>> d_x) {
    On<Embedding, B>::backward(backend, x.tokens, d_y.y, d_x.table, c.into);
  }
};

template <> struct Operation<CausalConv1d> : PlainOperation {
  struct Config {
    Index columns = 0, width = 0;
    Activation activation = Activation::silu;
    bool begins = false;   // without an initial state
  };
  static constexpr bool rows_stand_alone = false;
  static std::vector<Config> sizes() { return {{17, 4}, {5, 3, Activation::none}, {5, 4, Activation::silu, true}, {5, 1}, {5, 0}}; }
  template <class S> struct Inputs {
    Held<S, 2> x, w;            // [N, C], [C, W]
    State<S, 3> initial_state;  // [number of sequences, W - 1, C]
    HYBRIDATTN_FIELDS(x, w, initial_state)
  };
  template <class S> struct Outputs {
    Held<S, 2> y;
    State<S, 3> final_state;
    HYBRIDATTN_FIELDS(y, final_state)
  };
  static std::vector<std::pair<std::string_view, std::string_view>> in_place() { return {{"final_state", "initial_state"}}; }
  static Shape<3> states(Config const& c, Sequences const& s) {
    return c.width < 2 ? Shape<3>{} : Shape<3>{s.count(), c.width - 1, c.columns};
  }
  static Inputs<Shapes> inputs(Config const& c, Sequences const& s) {
    return {{s.tokens(), c.columns}, {c.columns, c.width}, c.begins ? Shape<3>{} : states(c, s)};
  }
  static Outputs<Shapes> outputs(Config const& c, Sequences const& s) { return {{s.tokens(), c.columns}, states(c, s)}; }
  template <class B, class T>
  static void forward(B& backend, Config const& c, SequencesOn<B> const& s, Inputs<In<T>> x, Outputs<Out<T>> y) {
    On<CausalConv1d, B>::forward(backend, c.activation, s, x.x, x.w, x.initial_state, y.y, y.final_state);
  }
  template <class B, class T>
  static void backward(B& backend, Config const& c, SequencesOn<B> const& s, Inputs<In<T>> x, Outputs<In<T>>, Outputs<In<T>> d_y,
                       Inputs<Out<T>> d_x) {
    On<CausalConv1d, B>::backward(backend, c.activation, s, x.x, x.w, x.initial_state, d_y.y, d_y.final_state, d_x.x, d_x.w,
                                  d_x.initial_state);
  }
};

// ---- losses

// `scale` is the gradient of the loss, a number of the host.
struct LossOperation : PlainOperation {
  struct Config {
    Index columns = 0, vocabulary = 0;
    bool counts = true;   // any token
    double scale = 1;
  };
  static bool starts_from(Config const&, std::string_view result) { return result == "loss"; }
  static Config with_upstream(Config c, HostGroup const& d_outputs) {
    c.scale = d_outputs.at("loss").values[0];
    return c;
  }
  // Some tokens are not counted. Without c.counts, no token is counted.
  static void draw(Config const& c, Sequences const&, Random& random, HostGroup& inputs) {
    detail::draw_whole(inputs.at("targets"), random, -1, c.counts ? c.vocabulary : 0);
    inputs.at("loss before").values = {2.5, 3, 1};
  }
};

template <> struct Operation<SoftmaxLoss> : LossOperation {
  static std::vector<Config> sizes() { return {{0, 21}, {0, 5}, {0, 5, false}}; }
  template <class S> struct Inputs {
    Held<S, 2> logits;     // [N, V]
    Whole<S, 1> targets;   // [N]
    HYBRIDATTN_FIELDS(logits, targets)
  };
  template <class S> struct Outputs {
    OfType<S, LossSum, 1> loss;   // [1]
    HYBRIDATTN_FIELDS(loss)
  };
  static std::vector<std::pair<std::string_view, std::string_view>> in_place() { return {{"d_logits", "logits"}}; }
  static Inputs<Shapes> inputs(Config const& c, Sequences const& s) { return {{s.tokens(), c.vocabulary}, {s.tokens()}}; }
  static Outputs<Shapes> outputs(Config const&, Sequences const&) { return {{1}}; }
  template <class B, class T> static void forward(B& backend, Config const&, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<Out<T>> y) {
    On<SoftmaxLoss, B>::forward(backend, x.logits, x.targets, View<double const, 1>{}, View<T, 2>{}, y.loss);
  }
  template <class B, class T>
  static void backward(B& backend, Config const& c, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<In<T>>, Outputs<In<T>>,
                       Inputs<Out<T>> d_x) {
    Tensor<LossSum, 1, B> again{backend, {1}};
    On<Fill, B>::forward(backend, LossSum{}, out(again));
    Tensor<double, 1, B> scale{backend, {1}};
    On<Fill, B>::forward(backend, c.scale, out(scale));
    On<SoftmaxLoss, B>::forward(backend, x.logits, x.targets, in(scale), d_x.logits, out(again));
  }
};

template <> struct Operation<CrossEntropy> : LossOperation {
  static std::vector<Config> sizes() { return {{12, 21}, {7, 5}, {7, 5, false}}; }  // in a batch of more rows than CrossEntropy::block_rows
  template <class S> struct Inputs {
    Held<S, 2> x, w;  // [N, C], [V, C]
    Whole<S, 1> targets;  // [N]
    HYBRIDATTN_FIELDS(x, w, targets)
  };
  template <class S> struct Outputs {
    OfType<S, LossSum, 1> loss;  // [1]
    HYBRIDATTN_FIELDS(loss)
  };
  static Inputs<Shapes> inputs(Config const& c, Sequences const& s) {
    return {{s.tokens(), c.columns}, {c.vocabulary, c.columns}, {s.tokens()}};
  }
  static Outputs<Shapes> outputs(Config const&, Sequences const&) { return {{1}}; }
  template <class B, class T> static void forward(B& backend, Config const&, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<Out<T>> y) {
    On<CrossEntropy, B>::forward(backend, x.x, x.w, x.targets, y.loss);
  }
  template <class B, class T>
  static void backward(B& backend, Config const& c, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<In<T>>, Outputs<In<T>>,
                       Inputs<Out<T>> d_x) {
    Tensor<LossSum, 1, B> again{backend, {1}};
    On<Fill, B>::forward(backend, LossSum{}, out(again));
    Tensor<double, 1, B> scale{backend, {1}};
    On<Fill, B>::forward(backend, c.scale, out(scale));
    On<CrossEntropy, B>::backward(backend, x.x, x.w, x.targets, in(scale), d_x.x, d_x.w, out(again));
  }
};

// ---- mixtures of experts

template <> struct Operation<TopK> : PlainOperation {
  struct Config {
    Index scores = 0, k = 0;
  };
  static std::vector<Config> sizes() { return {{40, 7}, {5, 8}, {40, 0}, {0, 3}}; }
  template <class S> struct Inputs {
    Held<S, 2> scores;  // [R, n]
    HYBRIDATTN_FIELDS(scores)
  };
  template <class S> struct Outputs {
    Whole<S, 2> indices;  // [R, k]
    HYBRIDATTN_FIELDS(indices)
  };
  static Inputs<Shapes> inputs(Config const& c, Sequences const& s) { return {{s.tokens(), c.scores}}; }
  static Outputs<Shapes> outputs(Config const& c, Sequences const& s) { return {{s.tokens(), c.k}}; }
  template <class B, class T> static void forward(B& backend, Config const&, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<Out<T>> y) {
    On<TopK, B>::forward(backend, x.scores, y.indices);
  }
};

// `use` is the sum of all probabilities of an expert, whose gradient is the same for every token.
template <> struct Operation<Route> : PlainOperation {
  struct Config {
    Route::Options options;
    bool balanced = true;
  };
  static constexpr Index experts = 5, top_k = 2;
  static std::vector<Config> sizes() { return {{{.renormalise = true}}, {{.renormalise = false}}, {{.renormalise = true}, false}}; }
  template <class S> struct Inputs {
    Held<S, 2> logits;  // [N, E]
    HYBRIDATTN_FIELDS(logits)
  };
  template <class S> struct Outputs {
    Wide<S, 2> probabilities, weights;  // [N, E], [N, k]
    Whole<S, 2> experts;  // [N, k]
    Wide<S, 1> use;  // [E]
    HYBRIDATTN_FIELDS(probabilities, weights, experts, use)
  };
  static Inputs<Shapes> inputs(Config const&, Sequences const& s) { return {{s.tokens(), experts}}; }
  static Outputs<Shapes> outputs(Config const& c, Sequences const& s) {
    return {{s.tokens(), experts}, {s.tokens(), top_k}, {s.tokens(), top_k}, c.balanced ? Shape<1>{experts} : Shape<1>{}};
  }
  static bool takes_gradient(Config const&, std::string_view output) { return output != "probabilities"; }
  // Logits so far apart that rounding does not change a choice.
  static void draw(Config const&, Sequences const& s, Random& random, HostGroup& inputs) {
    HostTensor& logits = inputs.at("logits");
    for (Index n = 0; n < s.tokens(); ++n)
      for (Index e = 0; e < experts; ++e) logits.row(n)[e] = static_cast<double>((e * 2 + n) % experts) / 2 + random.uniform(0, 0.25);
  }
  template <class B, class T>
  static void forward(B& backend, Config const& c, SequencesOn<B> const& s, Inputs<In<T>> x, Outputs<Out<T>> y) {
    On<Route, B>::forward(backend, c.options, x.logits, y.probabilities, y.weights, y.experts);
    if (!c.balanced) return;
    On<Fill, B>::forward(backend, wide_t<T>(0), y.use);
    for (Index n = 0; n < s.tokens(); ++n) On<Add, B>::forward(backend, View<wide_t<T> const, 1>{y.probabilities.row(n), {experts}}, y.use);
  }
  template <class B, class T>
  static void backward(B& backend, Config const& c, SequencesOn<B> const&, Inputs<In<T>>, Outputs<In<T>> y, Outputs<In<T>> d_y,
                       Inputs<Out<T>> d_x) {
    On<Route, B>::backward(backend, c.options, y.probabilities, y.weights, y.experts, d_y.weights, d_y.use, d_x.logits);
  }
};

template <> struct Operation<Permute> : PlainOperation {
  struct Config {
    Index top_k = 0;
  };
  static std::vector<Config> sizes() { return {{2}, {1}}; }
  static bool has_tables(Config const&) { return true; }
  template <class S> struct Inputs {
    Whole<S, 2> experts;  // [N, k]
    HYBRIDATTN_FIELDS(experts)
  };
  template <class S> struct Outputs {
    Whole<S, 1> offsets;  // [E + 1]
    Whole<S, 2> places;  // [N, k]
    HYBRIDATTN_FIELDS(offsets, places)
  };
  static Inputs<Shapes> inputs(Config const& c, Sequences const& s) { return {{s.tokens(), c.top_k}}; }
  static Outputs<Shapes> outputs(Config const& c, Sequences const& s) { return {{detail::experts + 1}, {s.tokens(), c.top_k}}; }
  static void draw(Config const&, Sequences const&, Random&, HostGroup& inputs) {
    Random random{Seed{1}, "experts"};
    detail::draw_whole(inputs.at("experts"), random, 0, detail::experts - 1);  // the last one is idle
  }
  template <class B, class T> static void forward(B& backend, Config const&, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<Out<T>> y) {
    On<Permute, B>::forward(backend, x.experts, y.offsets, y.places);
  }
};

// An operation on the rows of two choices of each token.
struct PlacedOperation : PlainOperation {
  struct Config {
    Index columns = 0;
    Into into = Into::overwrite;
  };
  static constexpr Index top_k = 2;
  static bool has_tables(Config const&) { return true; }
  static Shape<2> tokens(Config const& c, Sequences const& s) { return {s.tokens(), c.columns}; }
  static Shape<2> rows(Config const& c, Sequences const& s) { return {s.tokens() * top_k, c.columns}; }
  static Shape<2> choices(Sequences const& s) { return {s.tokens(), top_k}; }
  static void draw(Config const&, Sequences const&, Random&, HostGroup& inputs) { detail::draw_places(inputs.at("places")); }
};

template <> struct Operation<Distribute> : PlacedOperation {
  static std::vector<Config> sizes() { return {{20}, {7, Into::add}}; }
  template <class S> struct Inputs {
    Held<S, 2> x;  // [N, C]
    Whole<S, 2> places;  // [N, k]
    HYBRIDATTN_FIELDS(x, places)
  };
  template <class S> struct Outputs {
    Held<S, 2> rows;  // [N k, C]
    HYBRIDATTN_FIELDS(rows)
  };
  static Inputs<Shapes> inputs(Config const& c, Sequences const& s) { return {tokens(c, s), choices(s)}; }
  static Outputs<Shapes> outputs(Config const& c, Sequences const& s) { return {rows(c, s)}; }
  static bool starts_from(Config const& c, std::string_view result) { return result == "d_x" && c.into == Into::add; }
  template <class B, class T> static void forward(B& backend, Config const&, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<Out<T>> y) {
    On<Distribute, B>::forward(backend, x.x, x.places, y.rows);
  }
  template <class B, class T>
  static void backward(B& backend, Config const& c, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<In<T>>, Outputs<In<T>> d_y,
                       Inputs<Out<T>> d_x) {
    On<Distribute, B>::backward(backend, x.places, d_y.rows, d_x.x, c.into);
  }
};

template <> struct Operation<Combine> : PlacedOperation {
  static std::vector<Config> sizes() { return {{20}, {7}}; }
  template <class S> struct Inputs {
    Held<S, 2> rows;  // [N k, C]
    Wide<S, 2> weights;  // [N, k]
    Whole<S, 2> places;  // [N, k]
    HYBRIDATTN_FIELDS(rows, weights, places)
  };
  template <class S> struct Outputs {
    Held<S, 2> y;  // [N, C]
    HYBRIDATTN_FIELDS(y)
  };
  static Inputs<Shapes> inputs(Config const& c, Sequences const& s) { return {rows(c, s), choices(s), choices(s)}; }
  static Outputs<Shapes> outputs(Config const& c, Sequences const& s) { return {tokens(c, s)}; }
  template <class B, class T> static void forward(B& backend, Config const&, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<Out<T>> y) {
    On<Combine, B>::forward(backend, x.rows, x.weights, x.places, y.y);
  }
  template <class B, class T>
  static void backward(B& backend, Config const&, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<In<T>>, Outputs<In<T>> d_y,
                       Inputs<Out<T>> d_x) {
    On<Combine, B>::backward(backend, x.rows, x.weights, x.places, d_y.y, d_x.rows, d_x.weights);
  }
};

template <> struct Operation<AddGated> : RowOperation {
  template <class S> struct Inputs {
    Held<S, 2> x, logit;  // [N, C], [N, 1]
    HYBRIDATTN_FIELDS(x, logit)
  };
  template <class S> struct Outputs {
    Held<S, 2> y;
    HYBRIDATTN_FIELDS(y)
  };
  static Inputs<Shapes> inputs(Config const& c, Sequences const& s) { return {rows(c, s), {s.tokens(), 1}}; }
  static Outputs<Shapes> outputs(Config const& c, Sequences const& s) { return {rows(c, s)}; }
  static bool starts_from(Config const&, std::string_view result) { return result == "y"; }
  template <class B, class T> static void forward(B& backend, Config const&, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<Out<T>> y) {
    On<AddGated, B>::forward(backend, x.x, x.logit, y.y);
  }
  template <class B, class T>
  static void backward(B& backend, Config const&, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<In<T>>, Outputs<In<T>> d_y,
                       Inputs<Out<T>> d_x) {
    On<AddGated, B>::backward(backend, x.x, x.logit, d_y.y, d_x.x, d_x.logit);
  }
};

template <> struct Operation<ExpertUse> : PlainOperation {
  struct Config {
    Index experts = 0;
  };
  static std::vector<Config> sizes() { return {{21}, {4}}; }  // more than one task has, and fewer
  static bool has_tables(Config const&) { return true; }
  template <class S> struct Inputs {
    Whole<S, 1> offsets;  // [E + 1]
    Wide<S, 2> probabilities;  // [N, E]
    HYBRIDATTN_FIELDS(offsets, probabilities)
  };
  template <class S> struct Outputs {
    OfType<S, double, 2> sums;  // [2, E]
    HYBRIDATTN_FIELDS(sums)
  };
  static Inputs<Shapes> inputs(Config const& c, Sequences const& s) { return {{c.experts + 1}, {s.tokens(), c.experts}}; }
  static Outputs<Shapes> outputs(Config const& c, Sequences const&) { return {{2, c.experts}}; }
  static bool starts_from(Config const&, std::string_view result) { return result == "sums"; }
  static void draw(Config const&, Sequences const&, Random&, HostGroup& inputs) {
    Random random{Seed{1}, "offsets"};
    double last = 0;
    set_each(inputs.at("offsets"), [&] { return std::exchange(last, last + static_cast<double>(random.below(9))); });
  }
  template <class B, class T> static void forward(B& backend, Config const&, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<Out<T>> y) {
    On<ExpertUse, B>::forward(backend, x.offsets, x.probabilities, y.sums);
  }
};

// The loss of one layer, from the sums of ExpertUse. The gradient of a probability is the same for every token.
template <> struct Operation<BalanceLoss> : PlainOperation {
  struct Config {
    Index experts = 0;
    double coefficient = 0, d_value = 0;
  };
  using Use = Operation<ExpertUse>;
  static std::vector<Config> sizes() { return {{21, 0.3}, {4, 1.5}}; }
  static bool has_tables(Config const&) { return true; }
  template <class S> using Inputs = Use::Inputs<S>;
  template <class S> struct Outputs {
    OfType<S, double, 1> value;  // [1]
    HYBRIDATTN_FIELDS(value)
  };
  static Inputs<Shapes> inputs(Config const& c, Sequences const& s) { return Use::inputs({c.experts}, s); }
  static Outputs<Shapes> outputs(Config const&, Sequences const&) { return {{1}}; }
  static bool starts_from(Config const&, std::string_view result) { return result == "value"; }
  static Config with_upstream(Config c, HostGroup const& d_outputs) {
    c.d_value = d_outputs.at("value").values[0];
    return c;
  }
  static void draw(Config const& c, Sequences const& s, Random& random, HostGroup& inputs) { Use::draw({c.experts}, s, random, inputs); }
  template <class B, class T>
  static void forward(B& backend, Config const& c, SequencesOn<B> const& s, Inputs<In<T>> x, Outputs<Out<T>> y) {
    auto const sums = sums_of<B, T>(backend, c, x);
    On<BalanceLoss, B>::forward(backend, c.coefficient, s.tokens(), in(sums), y.value);
  }
  template <class B, class T>
  static void backward(B& backend, Config const& c, SequencesOn<B> const& s, Inputs<In<T>> x, Outputs<In<T>>, Outputs<In<T>>,
                       Inputs<Out<T>> d_x) {
    auto const sums = sums_of<B, T>(backend, c, x);
    Tensor<wide_t<T>, 1, B> d_probability{backend, {c.experts}};
    On<BalanceLoss, B>::backward(backend, c.coefficient, s.tokens(), in(sums), c.d_value, out(d_probability));
    detail::copy_rows<wide_t<T>>(backend, in(d_probability), d_x.probabilities);
  }

 private:
  template <class B, class T> static Tensor<double, 2, B> sums_of(B& backend, Config const& c, Inputs<In<T>> x) {
    auto sums = zeros<double>(backend, Shape<2>{2, c.experts});
    On<ExpertUse, B>::forward(backend, x.offsets, x.probabilities, out(sums));
    return sums;
  }
};

// ---- the optimizer

// One tensor of parameters, in several blocks.
struct AdamWOperation : PlainOperation {
  struct Config {
    Index count = 0;
    double rate = 0;
  };
  static std::vector<Config> sizes() { return {{AdamWTensor<float>::block + 5, 0.01}, {7, 0}}; }
  template <class S> struct Inputs {
    Wide<S, 1> g;
    HYBRIDATTN_FIELDS(g)
  };
  static Inputs<Shapes> inputs(Config const& c, Sequences const&) { return {{c.count}}; }
  template <class E, class B> static Tensor<E, 1, B> on_machine(B& backend, E const& element) {
    Tensor<E, 1, B> tensor{backend, {1}};
    upload(backend, std::vector<E>{element}, tensor);
    return tensor;
  }
  static AdamWRates rates(Config const& c) { return {c.rate, 0.9, 0.95, 1e-8, 0.1, 0.1, 0.05, 0.7}; }
};

template <> struct Operation<AdamWSquares> : AdamWOperation {
  template <class S> struct Outputs {
    OfType<S, double, 1> squares;  // [1]
    HYBRIDATTN_FIELDS(squares)
  };
  static Outputs<Shapes> outputs(Config const&, Sequences const&) { return {{1}}; }
  template <class B, class T> static void forward(B& backend, Config const& c, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<Out<T>> y) {
    auto const table = on_machine(backend, AdamWTensor<wide_t<T>>{nullptr, x.g.data, nullptr, nullptr, c.count, 0});
    On<AdamWSquares, B>::forward(backend, in(table), y.squares);
  }
};

// A step, and the fault that its check finds.
template <> struct Operation<AdamWStep> : AdamWOperation {
  template <class S> struct Outputs {
    Wide<S, 1> p, m, v;
    OfType<S, StepFault, 1> found;  // [1]
    HYBRIDATTN_FIELDS(p, m, v, found)
  };
  static Outputs<Shapes> outputs(Config const& c, Sequences const&) { return {{c.count}, {c.count}, {c.count}, {1}}; }
  static bool starts_from(Config const&, std::string_view result) { return result != "found"; }
  static void draw(Config const&, Sequences const&, Random&, HostGroup& inputs) {
    for (double& v : inputs.at("v before").values) v = std::abs(v);
  }
  template <class B, class T> static void forward(B& backend, Config const& c, SequencesOn<B> const&, Inputs<In<T>> x, Outputs<Out<T>> y) {
    auto const table = on_machine(backend, AdamWTensor<wide_t<T>>{y.p.data, x.g.data, y.m.data, y.v.data, c.count, 0});
    auto const its_rates = on_machine(backend, rates(c));
    auto const numbers = on_machine(backend, StepNumbers{});
    On<AdamWCheck, B>::forward(backend, in(table), in(its_rates), in(numbers), y.found);
    On<AdamWStep, B>::forward(backend, in(table), in(its_rates), in(numbers));
  }
};

// The operations that the laws judge. AdamWCheck is judged with AdamWStep.
using AllOperations = std::tuple<Fill, Add, AddWeighted, Swiglu, SigmoidGate, GdnGate, RmsNorm, GatedRmsNorm, LayerNorm, L2Norm, RopeAngles,
                                 Rope, Linear, GroupedLinear, Embedding, CausalConv1d, SoftmaxLoss, CrossEntropy, TopK, Route, Permute,
                                 Distribute, Combine, AddGated, ExpertUse, BalanceLoss, AdamWSquares, AdamWStep>;

}  // namespace hybridattn::inline HYBRIDATTN_ABI::testing
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

// ==== hybridattn/attention/dsa/reference.hpp
// Equations (1) to (7) of dsa.hpp as loops, for any scalar. Slow and short: the laws judge the kernels by these loops. The choice
// is a function of its own, so a kernel can be judged on the keys that it chose itself.
#ifndef HYBRIDATTN_ATTENTION_DSA_REFERENCE_HPP
#define HYBRIDATTN_ATTENTION_DSA_REFERENCE_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::dsa::reference {

// I_ts of query n and key s, both counted from the start of the batch.
template <class T> T score(Config const& c, Inputs<In<T>> x, Index n, Index s) {
  T sum = 0;
  for (Index j = 0; j < c.index_heads; ++j) {
    T const product = static_cast<T>(c.index_scale) * dot(x.index_q.row(n, j), x.index_k.row(s), c.index_dim);
    sum += x.index_w(n, j) * (product < 0 ? T(0) : product);                                                        // (1)
  }
  return sum;
}
// I_ts of query t of a sequence, for s = 0 .. t.
template <class T> std::vector<T> index_scores(Config const& c, Sequence sequence, Inputs<In<T>> x, Index t) {
  std::vector<T> scores;
  for (Index s = 0; s <= t; ++s) scores.push_back(score(c, x, sequence.start + t, sequence.start + s));
  return scores;
}

// The places of the k largest scores, ascending, then -1. Of equal scores the smaller place is chosen. NaN of either sign ranks below
// all numbers, -infinity too; of NaNs the smaller place is chosen.
template <class T> void select(std::vector<T> const& scores, Index k, std::int32_t* indices) {
  std::vector<std::int32_t> order(scores.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](std::int32_t a, std::int32_t b) {                                       // (2)
    T const x = scores[static_cast<std::size_t>(a)], y = scores[static_cast<std::size_t>(b)];
    bool const x_first = x > y || (x == x && y != y), y_first = y > x || (y == y && x != x);
    return x_first || (!y_first && a < b);
  });
  Index const count = std::min(k, static_cast<Index>(order.size()));
  std::sort(order.begin(), order.begin() + count);
  std::fill_n(std::copy_n(order.begin(), count, indices), k - count, -1);
}
template <class T> void select(SparseOptions o, Config const& c, Sequences const& s, Inputs<In<T>> x, View<std::int32_t, 2> indices) {
  for (Sequence const sequence : s)
    for (Index t = 0; t < sequence.length; ++t) {
      Index const k = std::min(selection_size(o, sequence.length), indices.extent(1));
      std::fill_n(indices.row(sequence.start + t), indices.extent(1), -1);
      select(index_scores(c, sequence, x, t), k, indices.row(sequence.start + t));
    }
}

// Calls f(n, keys): query n attends to the tokens `keys`. These are the keys in indices, or without indices all keys that it sees.
template <class F> void for_each_query(Sequences const& s, View<std::int32_t const, 2> indices, F f) {
  for (Sequence const sequence : s)
    for (Index t = 0; t < sequence.length; ++t) {
      std::vector<Index> keys;
      if (indices.empty())
        for (Index key = 0; key <= t; ++key) keys.push_back(sequence.start + key);
      else
        for (Index i = 0, n = sequence.start + t; i < indices.extent(1) && indices(n, i) >= 0; ++i)
          keys.push_back(sequence.start + indices(n, i));
      f(sequence.start + t, keys);
    }
}
// Calls f(n, h, hk, keys): head h of query n reads the keys of head hk.
template <class F> void for_each_head(Config const& c, Sequences const& s, View<std::int32_t const, 2> indices, F f) {
  for_each_query(s, indices, [&](Index n, std::vector<Index> const& keys) {
    for (Index h = 0; h < c.num_heads; ++h) f(n, h, h / (c.num_heads / c.num_kv_heads), keys);
  });
}

template <class T>
void attend(Config const& c, Sequences const& s, Inputs<In<T>> x, View<std::int32_t const, 2> indices, Outputs<Out<T>> y,
            Wide<Out<T>, 2> lse) {
  Index const D = c.head_dim;
  T const scale = static_cast<T>(c.scale);
  for_each_head(c, s, indices, [&](Index n, Index h, Index hk, std::vector<Index> const& keys) {
    T largest = -std::numeric_limits<T>::infinity(), sum = 0;
    for (Index key : keys) largest = std::max(largest, scaled_dot(scale, x.q.row(n, h), x.k.row(key, hk), D));
    std::fill_n(y.o.row(n, h), D, T(0));
    for (Index key : keys) {
      T const p = std::exp(scaled_dot(scale, x.q.row(n, h), x.k.row(key, hk), D) - largest);
      sum += p;
      axpy(p, x.v.row(key, hk), y.o.row(n, h), D);
    }
    for (Index d = 0; d < D; ++d) y.o.row(n, h)[d] /= sum;
    lse(n, h) = largest + std::log(sum);                                                                            // (3)
  });
}

// The indexer's distribution over one query's keys, and its target.
template <class T> std::vector<T> scores_of(Config const& c, Inputs<In<T>> x, Index n, std::vector<Index> const& keys) {
  std::vector<T> scores;
  for (Index key : keys) scores.push_back(score(c, x, n, key));
  return scores;
}
template <class T>
std::vector<T> shares_of(Config const& c, Inputs<In<T>> x, Wide<In<T>, 2> lse, Index n, std::vector<Index> const& keys) {
  std::vector<T> p;
  for (Index key : keys) {
    T sum = 0;
    for (Index h = 0; h < c.num_heads; ++h) {
      T const *q = x.q.row(n, h), *k = x.k.row(key, h / (c.num_heads / c.num_kv_heads));
      sum += std::exp(scaled_dot(static_cast<T>(c.scale), q, k, c.head_dim) - lse(n, h));
    }
    p.push_back(sum / static_cast<T>(c.num_heads));                                                                 // (5)
  }
  return p;
}

// Takes the lse that attend computed.
template <class T>
void index_loss(Config const& c, Sequences const& s, Inputs<In<T>> x, View<std::int32_t const, 2> indices, Wide<In<T>, 2> lse,
                Wide<Out<T>, 1> index_lse, State<Out<T>, 1> loss) {
  loss(0) = 0;
  for_each_query(s, indices, [&](Index n, std::vector<Index> const& keys) {
    auto const scores = scores_of<T>(c, x, n, keys), p = shares_of<T>(c, x, lse, n, keys);
    T const largest = *std::max_element(scores.begin(), scores.end());
    T sum = 0;
    for (T score : scores) sum += std::exp(score - largest);
    index_lse(n) = largest + std::log(sum);                                                                         // (5)
    for (std::size_t i = 0; i < keys.size(); ++i) {
      T const log_r = scores[i] - index_lse(n);
      loss(0) += (p[i] > 0 ? p[i] * (std::log(p[i]) - log_r) : T(0)) + (std::exp(log_r) - p[i]);                    // (6)
    }
  });
}

template <class T>
void forward(SparseOptions o, Config const& c, Sequences const& s, Inputs<In<T>> x, Outputs<Out<T>> y, Saved<Out<T>> saved) {
  if (c.stage != Stage::dense_warm_up) select(o, c, s, x, saved.indices);
  attend<T>(c, s, x, saved.indices, y, saved.lse);
  if (!y.auxiliary_loss.empty()) y.auxiliary_loss(0) = 0;
  if (c.stage != Stage::language_model) index_loss<T>(c, s, x, saved.indices, saved.lse, saved.index_lse, y.auxiliary_loss);
}

// An empty view gets no gradient.
template <class T, int Rank> void set_zero(View<T, Rank> x) {
  for (Index n = 0; !x.empty() && n < x.extent(0); ++n) {
    if constexpr (Rank == 2) std::fill_n(x.row(n), x.extent(1), T(0));
    else
      for (Index h = 0; h < x.extent(1); ++h) std::fill_n(x.row(n, h), x.extent(2), T(0));
  }
}

// (4), added to d_x.
template <class T>
void attend_backward(Config const& c, Sequences const& s, Inputs<In<T>> x, Outputs<In<T>> y, Saved<In<T>> saved, View<T const, 3> d_o,
                     Inputs<Out<T>> d_x) {
  Index const D = c.head_dim;
  T const scale = static_cast<T>(c.scale);
  for_each_head(c, s, saved.indices, [&](Index n, Index h, Index hk, std::vector<Index> const& keys) {
    T const *q = x.q.row(n, h), delta = dot(d_o.row(n, h), y.o.row(n, h), D);
    for (Index key : keys) {
      T const p = std::exp(scaled_dot(scale, q, x.k.row(key, hk), D) - saved.lse(n, h));
      T const d_s = scale * p * (dot(d_o.row(n, h), x.v.row(key, hk), D) - delta);
      axpy(d_s, x.k.row(key, hk), d_x.q.row(n, h), D);
      axpy(d_s, q, d_x.k.row(key, hk), D);
      axpy(p, d_o.row(n, h), d_x.v.row(key, hk), D);
    }
  });
}
// (7), added to d_x.
template <class T>
void index_loss_backward(Config const& c, Sequences const& s, Inputs<In<T>> x, Saved<In<T>> saved, T d_loss, Inputs<Out<T>> d_x) {
  Index const DI = c.index_dim;
  T const scale = static_cast<T>(c.index_scale);
  for_each_query(s, saved.indices, [&](Index n, std::vector<Index> const& keys) {
    auto const scores = scores_of<T>(c, x, n, keys), p = shares_of<T>(c, x, saved.lse, n, keys);
    for (std::size_t i = 0; i < keys.size(); ++i) {
      T const d_score = d_loss * (std::exp(scores[i] - saved.index_lse(n)) - p[i]), *k = x.index_k.row(keys[i]);
      for (Index j = 0; j < c.index_heads; ++j) {
        T const *q = x.index_q.row(n, j), z = scale * dot(q, k, DI);
        T const d_z = z > 0 ? scale * x.index_w(n, j) * d_score : T(0);
        axpy(d_z, k, d_x.index_q.row(n, j), DI);
        axpy(d_z, q, d_x.index_k.row(keys[i]), DI);
        d_x.index_w(n, j) += d_score * (z < 0 ? T(0) : z);
      }
    }
  });
}

template <class T>
void backward(SparseOptions, Config const& c, Sequences const& s, Inputs<In<T>> x, Outputs<In<T>> y, Saved<In<T>> saved, Outputs<In<T>> d_y,
              Inputs<Out<T>> d_x) {
  zip([](Path const&, auto const& gradient) { set_zero(gradient); }, d_x);
  if (!d_y.o.empty()) attend_backward<T>(c, s, x, y, saved, d_y.o, d_x);
  if (c.stage != Stage::language_model && !d_y.auxiliary_loss.empty())
    index_loss_backward<T>(c, s, x, saved, static_cast<T>(d_y.auxiliary_loss(0)), d_x);
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::dsa::reference
#endif

// ==== hybridattn/attention/full/reference.hpp
// Equations (1) to (5) of full.hpp as loops, for any scalar. Slow and short: the laws judge the kernels by these loops.
#ifndef HYBRIDATTN_ATTENTION_FULL_REFERENCE_HPP
#define HYBRIDATTN_ATTENTION_FULL_REFERENCE_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::full::reference {

// Calls f(h, hk, i, first): query i of head h reads the keys first .. i of head hk; i and first count from the batch's first token.
template <class F> void for_each_query(FullOptions o, Config const& c, Sequences const& s, F f) {
  for (Sequence const sequence : s)
    for (Index h = 0; h < c.num_heads; ++h)
      for (Index i = 0; i < sequence.length; ++i)
        f(h, h / (c.num_heads / c.num_kv_heads), sequence.start + i,
          sequence.start + (o.window == 0 ? 0 : std::max<Index>(0, i + 1 - o.window)));
}

template <class T>
void forward(FullOptions o, Config const& c, Sequences const& s, Inputs<In<T>> x, Outputs<Out<T>> y, Saved<Out<T>> saved) {
  Index const D = c.head_dim;
  T const scale = static_cast<T>(c.scale);
  for_each_query(o, c, s, [&](Index h, Index hk, Index i, Index first) {
    T largest = -std::numeric_limits<T>::infinity(), sum = 0;
    for (Index j = first; j <= i; ++j) largest = std::max(largest, scaled_dot(scale, x.q.row(i, h), x.k.row(j, hk), D));
    std::fill_n(y.o.row(i, h), D, T(0));
    for (Index j = first; j <= i; ++j) {
      T const p = std::exp(scaled_dot(scale, x.q.row(i, h), x.k.row(j, hk), D) - largest);
      sum += p;
      axpy(p, x.v.row(j, hk), y.o.row(i, h), D);                                            // (3)
    }
    for (Index d = 0; d < D; ++d) y.o.row(i, h)[d] /= sum;
    saved.lse(i, h) = largest + std::log(sum);                                              // (2)
  });
}

template <class T>
void backward(FullOptions o, Config const& c, Sequences const& s, Inputs<In<T>> x, Outputs<In<T>> y, Saved<In<T>> saved, Outputs<In<T>> d_y,
              Inputs<Out<T>> d_x) {
  Index const D = c.head_dim;
  T const scale = static_cast<T>(c.scale);
  for (Index n = 0; n < s.tokens(); ++n)
    for (Index hk = 0; hk < c.num_kv_heads; ++hk) {
      std::fill_n(d_x.k.row(n, hk), D, T(0));
      std::fill_n(d_x.v.row(n, hk), D, T(0));
    }
  for_each_query(o, c, s, [&](Index h, Index hk, Index i, Index first) {
    T const *q = x.q.row(i, h), *d_o = d_y.o.row(i, h), delta = dot(d_o, y.o.row(i, h), D);
    std::fill_n(d_x.q.row(i, h), D, T(0));
    for (Index j = first; j <= i; ++j) {
      T const p = std::exp(scaled_dot(scale, q, x.k.row(j, hk), D) - saved.lse(i, h));
      T const d_s = scale * p * (dot(d_o, x.v.row(j, hk), D) - delta);                      // (4)
      axpy(d_s, x.k.row(j, hk), d_x.q.row(i, h), D);                                        // (5)
      axpy(d_s, q, d_x.k.row(j, hk), D);
      axpy(p, d_o, d_x.v.row(j, hk), D);
    }
  });
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::full::reference
#endif

// ==== hybridattn/attention/gdn/reference.hpp
// Equations (1) to (7) of gdn.hpp as loops, for any scalar. Slow and short: the laws judge the kernels by these loops.
#ifndef HYBRIDATTN_ATTENTION_GDN_REFERENCE_HPP
#define HYBRIDATTN_ATTENTION_GDN_REFERENCE_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::gdn::reference {

// Calls f(i, h, hk): value head h of sequence i, with the queries and keys of head hk.
template <class F> void for_each_head(Config const& c, Sequences const& s, F f) {
  for (Index i = 0; i < s.count(); ++i)
    for (Index h = 0; h < c.num_value_heads; ++h) f(s[static_cast<std::size_t>(i)], i, h, h / (c.num_value_heads / c.num_heads));
}
// The state [K, V] of one head; zeros for an empty view.
template <class T> void read_state(View<T const, 4> states, Index i, Index h, Index K, Index V, T* S) {
  std::fill_n(S, K * V, T(0));
  for (Index a = 0; !states.empty() && a < K; ++a) std::copy_n(states.row(i, h, a), V, S + a * V);
}
template <class T> void write_state(T const* S, Index i, Index h, Index K, Index V, View<T, 4> states) {
  for (Index a = 0; !states.empty() && a < K; ++a) std::copy_n(S + a * V, V, states.row(i, h, a));
}

template <class T> void forward(Config const& c, Sequences const& s, Inputs<In<T>> x, Outputs<Out<T>> y, Saved<Out<T>> saved) {
  Index const K = c.key_dim, V = c.value_dim;
  std::vector<T> state(static_cast<std::size_t>(K * V)), error(static_cast<std::size_t>(V));
  T *const S = state.data(), *const e = error.data();
  for_each_head(c, s, [&](Sequence sequence, Index i, Index h, Index hk) {
    read_state(x.initial_state, i, h, K, V, S);
    for (Index t = sequence.start; t < sequence.start + sequence.length; ++t) {
      T const *q = x.q.row(t, hk), *k = x.k.row(t, hk), decay = std::exp(x.g(t, h));
      for (Index j = 0; j < K * V; ++j) S[j] *= decay;                                        // (1)
      std::copy_n(x.v.row(t, h), V, e);
      for (Index a = 0; a < K; ++a) axpy(-k[a], S + a * V, e, V);                             // (2)
      for (Index a = 0; a < K; ++a) axpy(k[a] * x.beta(t, h), e, S + a * V, V);               // (3)
      std::fill_n(y.o.row(t, h), V, T(0));
      for (Index a = 0; a < K; ++a) axpy(static_cast<T>(c.scale) * q[a], S + a * V, y.o.row(t, h), V);  // (4)
      if (!saved.error.empty()) std::copy_n(e, V, saved.error.row(t, h));
    }
    write_state(S, i, h, K, V, y.final_state);
  });
}

// S_0, S_1, ..., S_T of one head, computed from the errors by (1) and (3).
template <class T>
std::vector<T> states(Config const& c, Sequence sequence, Index i, Index h, Index hk, Inputs<In<T>> x, Saved<In<T>> saved) {
  Index const K = c.key_dim, V = c.value_dim;
  std::vector<T> all(static_cast<std::size_t>((sequence.length + 1) * K * V));
  read_state(x.initial_state, i, h, K, V, all.data());
  for (Index n = 0; n < sequence.length; ++n) {
    Index const t = sequence.start + n;
    T const *before = all.data() + n * K * V, decay = std::exp(x.g(t, h));
    T* after = all.data() + (n + 1) * K * V;
    for (Index j = 0; j < K * V; ++j) after[j] = decay * before[j];
    for (Index a = 0; a < K; ++a) axpy(x.k(t, hk, a) * x.beta(t, h), saved.error.row(t, h), after + a * V, V);
  }
  return all;
}

template <class T>
void backward(Config const& c, Sequences const& s, Inputs<In<T>> x, Outputs<In<T>>, Saved<In<T>> saved, Outputs<In<T>> d_y,
              Inputs<Out<T>> d_x) {
  Index const K = c.key_dim, V = c.value_dim;
  T const scale = static_cast<T>(c.scale);
  std::vector<T> gradient(static_cast<std::size_t>(K * V)), projection(static_cast<std::size_t>(V)), zeros(static_cast<std::size_t>(V));
  T *const X = gradient.data(), *const u = projection.data();
  for (Index n = 0; n < s.tokens(); ++n)
    for (Index hk = 0; hk < c.num_heads; ++hk) {
      std::fill_n(d_x.q.row(n, hk), K, T(0));
      std::fill_n(d_x.k.row(n, hk), K, T(0));
    }
  for_each_head(c, s, [&](Sequence sequence, Index i, Index h, Index hk) {
    std::vector<T> const all = states(c, sequence, i, h, hk, x, saved);
    read_state(d_y.final_state, i, h, K, V, X);
    for (Index n = sequence.length; n-- > 0;) {
      Index const t = sequence.start + n;
      T const *before = all.data() + n * K * V, *after = before + K * V, decay = std::exp(x.g(t, h)), beta = x.beta(t, h);
      T const *q = x.q.row(t, hk), *k = x.k.row(t, hk), *e = saved.error.row(t, h);
      T const* const d_o = d_y.o.empty() ? zeros.data() : d_y.o.row(t, h);
      T* d_v = d_x.v.row(t, h);
      std::fill_n(u, V, T(0));
      for (Index a = 0; a < K; ++a) axpy(scale * q[a], d_o, X + a * V, V);                    // (5)
      for (Index a = 0; a < K; ++a) axpy(k[a], X + a * V, u, V);
      for (Index b = 0; b < V; ++b) d_v[b] = beta * u[b];
      d_x.beta(t, h) = dot(u, e, V);
      T through = 0;
      for (Index a = 0; a < K; ++a) {                                                         // (6)
        d_x.q(t, hk, a) += scale * dot(after + a * V, d_o, V);
        d_x.k(t, hk, a) += beta * dot(X + a * V, e, V) - decay * dot(before + a * V, d_v, V);
        axpy(-k[a], d_v, X + a * V, V);
        through += dot(X + a * V, before + a * V, V);
        for (Index b = 0; b < V; ++b) X[a * V + b] *= decay;
      }
      d_x.g(t, h) = decay * through;                                                          // (7)
    }
    write_state(X, i, h, K, V, d_x.initial_state);
  });
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::gdn::reference
#endif

// ==== hybridattn/testing/gates.hpp
// Inputs for policies whose state forgets by a gate. g is the logarithm of a decay, beta how much is written. As in practice, gates forget
// nothing or all and differ from head to head and from token to token, and keys repeat. A policy of your own with a g [N, H] uses them by
// `struct Samples<Mine> : GatedSamples<Mine>`.
#ifndef HYBRIDATTN_TESTING_GATES_HPP
#define HYBRIDATTN_TESTING_GATES_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::testing {

namespace detail {

// Every row of the last axis gets length 1.
inline void normalise(HostTensor& tensor) {
  Index const D = tensor.shape.back();
  for (auto row = tensor.values.begin(); row != tensor.values.end(); row += D) {
    double sum = 0;
    for (Index d = 0; d < D; ++d) sum += row[d] * row[d];
    for (Index d = 0; d < D; ++d) row[d] /= std::sqrt(sum);
  }
}
// Each row becomes `share` times the first row and 1 - share times itself.
inline void correlate(HostTensor& tensor, double share) {
  for (Index n = 0; n < tensor.row_count(); ++n)
    for (Index e = 0; e < tensor.row_size(); ++e) tensor.row(n)[e] = share * tensor.row(0)[e] + (1 - share) * tensor.row(n)[e];
}

enum class Decay { none, mild, strong, total, mixed, by_head, either, runs, single };
enum class Beta { zero, one, two, between, mixed };
struct GateKind {
  char const* name;
  Decay decay;
  Beta beta;
  double shared;   // the share of a key's direction that all keys have in common
};
inline constexpr GateKind gate_kinds[] = {
    {"mild", Decay::mild, Beta::between, 0},
    {"nothing forgotten, one key", Decay::none, Beta::one, 1},
    {"strong gates, correlated keys", Decay::strong, Beta::between, 0.8},
    {"all forgotten", Decay::total, Beta::mixed, 0},
    {"reflections", Decay::none, Beta::two, 0.3},
    {"nothing written", Decay::mild, Beta::zero, 0},
    {"everything mixed", Decay::mixed, Beta::mixed, 0.5},
    {"heads that forget by e^-10, e^-25, e^-60, e^-1", Decay::by_head, Beta::between, 0},
    {"each token e^-25 or e^-.05", Decay::either, Beta::between, 0},
    {"runs of 32 tokens of e^-25, then of e^-.05", Decay::runs, Beta::between, 0},
    {"one token in 64 of e^-80", Decay::single, Beta::between, 0},
};
// The logarithm for head h of token n; `strength` is exp(A_log) of the head.
inline double draw_decay(Decay decay, double strength, Index n, Index h, Random& random) {
  constexpr double weak = -0.05, of_head[] = {-10, -25, -60, -1};
  if (decay == Decay::mixed) decay = static_cast<Decay>(random.below(4));
  if (decay == Decay::none) return 0;
  if (decay == Decay::mild) return -0.1 * random.uniform();
  if (decay == Decay::total) return -120;
  if (decay == Decay::by_head) return of_head[h % std::ssize(of_head)];
  if (decay == Decay::either) return random.below(2) == 0 ? weak : -25;
  if (decay == Decay::runs) return n / 32 % 2 == 0 ? -25 : weak;
  if (decay == Decay::single) return n % 64 == 37 ? -80 : weak;
  return -strength * std::log1p(std::exp(random.normal()));
}
inline double draw_beta(Beta beta, Random& random) {
  if (beta == Beta::mixed) beta = static_cast<Beta>(random.below(4));
  return beta == Beta::zero ? 0 : beta == Beta::one ? 1 : beta == Beta::two ? 2 : random.uniform();
}

}  // namespace detail

template <class P> struct GatedSamples : PlainSamples<P> {
  static std::vector<std::string> kinds() {
    std::vector<std::string> names;
    for (detail::GateKind const& kind : detail::gate_kinds) names.push_back(kind.name);
    return names;
  }
  // Skips q, k and beta if the policy does not have them.
  static void draw(std::string_view name, Random& random, HostGroup& inputs) {
    auto const is_named = [&](detail::GateKind const& kind) { return kind.name == name; };
    detail::GateKind const& kind = *std::find_if(std::begin(detail::gate_kinds), std::end(detail::gate_kinds), is_named);
    for (HostTensor& tensor : inputs) set_normal(tensor, random);
    if (HostTensor* const k = inputs.find("k")) detail::correlate(*k, kind.shared);
    for (char const* of_length_one : {"q", "k"})
      if (HostTensor* const tensor = inputs.find(of_length_one)) detail::normalise(*tensor);
    HostTensor &g = inputs.at("g"), *const beta = inputs.find("beta");
    std::vector<double> strengths;
    for (Index h = 0; h < g.row_size(); ++h) strengths.push_back(random.uniform(0.01, 16));
    for (Index n = 0; n < g.row_count(); ++n)
      for (Index h = 0; h < g.row_size(); ++h) {
        g.row(n)[h] = detail::draw_decay(kind.decay, strengths[static_cast<std::size_t>(h)], n, h, random);
        if (beta != nullptr) beta->row(n)[h] = detail::draw_beta(kind.beta, random);
      }
  }
  // The gradient of a strong decay is as small as the decay. Among the gradients of heads that keep their state, its error would not show.
  static bool by_head(std::string_view input) { return input == "g"; }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::testing
#endif

// ==== hybridattn/testing/policies.hpp
// What the laws need to know of the library's policies: references, sizes and kinds of inputs. Plain noise would not show errors at the
// edges, so there are also inputs with gates that forget nothing or all, keys that repeat, a softmax near one-hot, and ties.
#ifndef HYBRIDATTN_TESTING_POLICIES_HPP
#define HYBRIDATTN_TESTING_POLICIES_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::testing {

namespace detail {

// q, k and v of a softmax.
inline std::vector<std::string> softmax_kinds() { return {"noise", "near one-hot", "one key for all", "early keys stand out"}; }
inline void draw_softmax(std::string_view kind, Random& random, HostGroup& x) {
  double const steepness = kind == "near one-hot" ? 3 : 1;
  set_normal(x.at("q"), random, steepness);
  set_normal(x.at("k"), random, steepness);
  set_normal(x.at("v"), random);
  HostTensor& k = x.at("k");
  if (kind == "one key for all") correlate(k, 1);
  if (kind == "early keys stand out")   // by more than e^40, so that the online softmax must scale its sums
    for (Index n = 0; n < k.row_count(); n += 5)
      for (Index e = 0; e < k.row_size(); ++e) k.row(n)[e] *= 30.0 / static_cast<double>(1 + n % 30);
}

// Draws the indexer's inputs. With whole numbers, scores are exact and many of them are equal.
inline void draw_index(std::string_view kind, Random& random, HostGroup& x) {
  for (char const* name : {"index_q", "index_k", "index_w"}) {
    HostTensor& tensor = x.at(name);
    if (kind == "ties") set_each(tensor, [&] { return static_cast<double>(random.below(5)) - 2; });
    else set_normal(tensor, random);
  }
  if (kind == "every score 0") set_each(x.at("index_w"), [] { return -0.0; });
  if (kind == "one index key") correlate(x.at("index_k"), 1);
}

// The largest error of a score that a scalar with this eps computes in any order.
inline double score_rounding(dsa::Config const& c, Sequence sequence, dsa::Inputs<In<double>> const& x, Index t, double eps) {
  double largest = 0;
  for (Index s = 0; s <= t; ++s) {
    double size = 0;
    for (Index j = 0; j < c.index_heads; ++j)
      for (Index d = 0; d < c.index_dim; ++d)
        size += std::abs(x.index_w(sequence.start + t, j) * x.index_q(sequence.start + t, j, d) * x.index_k(sequence.start + s, d));
    largest = std::max(largest, size);
  }
  return static_cast<double>(c.index_dim + c.index_heads + 4) * eps * std::abs(c.index_scale) * largest;
}
inline bool all_whole(View<double const, 2> rows) {
  return std::all_of(rows.data, rows.data + rows.count(), [](double x) { return x == std::round(x) && std::abs(x) < 8; });
}
// Whole numbers times a power of two are not rounded, in any scalar and in any order.
inline bool scores_are_exact(dsa::Config const& c, dsa::Inputs<In<double>> const& x) {
  int exponent;
  return std::frexp(std::abs(c.index_scale), &exponent) == 0.5 && all_whole(as_rows(x.index_q)) && all_whole(x.index_k) &&
         all_whole(x.index_w);
}
// Says what is wrong with the keys of a query, or "". They must be keys with the k largest scores among the visible ones, as far as
// rounding can tell, in ascending order, each only once. Ties must be as dsa.hpp (2) says.
inline std::string wrong_keys(std::vector<double> const& scores, std::int32_t const* keys, Index k, double rounding) {
  Index const seen = std::ssize(scores), count = std::min(k, seen);
  std::vector<std::int32_t> best(static_cast<std::size_t>(k));
  dsa::reference::select(scores, k, best.data());
  if (std::equal(best.begin(), best.end(), keys)) return {};
  std::string const found =
      sentence("chooses ", listed(std::span(keys, static_cast<std::size_t>(k))), "; the largest scores have ", listed(best));
  if (rounding == 0) return found;
  std::vector<bool> chosen(scores.size());
  double least = std::numeric_limits<double>::infinity(), most_left_out = -least;
  for (Index i = 0; i < k; ++i) {
    if (i < count ? keys[i] < 0 || keys[i] >= seen || (i > 0 && keys[i] <= keys[i - 1]) : keys[i] != -1) return found;
    if (i >= count) continue;
    chosen[static_cast<std::size_t>(keys[i])] = true;
    least = std::min(least, scores[static_cast<std::size_t>(keys[i])]);
  }
  for (std::size_t s = 0; s < scores.size(); ++s)
    if (!chosen[s]) most_left_out = std::max(most_left_out, scores[s]);
  return least >= most_left_out - 2 * rounding ? std::string() : found;
}
inline std::string wrong_keys(SparseOptions o, dsa::Config const& c, Sequences const& s, dsa::Inputs<In<double>> const& x,
                              dsa::Saved<In<double>> const& saved, double eps) {
  if (c.stage == Stage::dense_warm_up) return {};   // nothing is chosen
  bool const exact = scores_are_exact(c, x);
  for (Sequence const sequence : s)
    for (Index t = 0; t < sequence.length; ++t) {
      std::int32_t const* const keys = saved.indices.row(sequence.start + t);
      Index const k = dsa::selection_size(o, sequence.length), room = saved.indices.extent(1);
      std::string why =
          wrong_keys(dsa::reference::index_scores(c, sequence, x, t), keys, k, exact ? 0 : score_rounding(c, sequence, x, t, eps));
      if (why.empty() && std::any_of(keys + k, keys + room, [](std::int32_t key) { return key != -1; }))
        why = "chooses " + listed(std::span(keys, static_cast<std::size_t>(room))) + " where -1 ends the row";
      if (!why.empty()) return sentence("token ", t, " of ", sequence.length, " ", why);
    }
  return {};
}

}  // namespace detail

template <FullOptions O> struct Reference<FullAttention<O>> {
  static constexpr double tolerance = 1e-11;
  template <class... Args> static void forward(Args const&... args) { full::reference::forward(O, args...); }
  template <class... Args> static void backward(Args const&... args) { full::reference::backward(O, args...); }
};
template <FullOptions O> struct Samples<FullAttention<O>> : PlainSamples<FullAttention<O>> {
  static constexpr bool overflows_like_loops = true;
  // Options are values to the kernels, so windows are judged with fewer head dimensions. Heads of 12 do not fill a vector.
  static std::vector<full::Config> sizes() {
    std::vector<full::Config> list{
        {.num_heads = 2, .num_kv_heads = 1, .head_dim = 12}, {.num_heads = 2, .head_dim = 32}, {.num_heads = 1, .head_dim = 128}};
    if (O.window == 0) {
      list.push_back({.num_heads = 4, .num_kv_heads = 2, .head_dim = 16});
      list.push_back({.num_heads = 2, .num_kv_heads = 1, .head_dim = 64});
    }
    return list;
  }
  static std::vector<std::string> kinds() { return detail::softmax_kinds(); }
  static void draw(std::string_view kind, Random& random, HostGroup& inputs) { detail::draw_softmax(kind, random, inputs); }
};

template <GdnOptions O> struct Reference<GatedDeltaNet<O>> {
  static constexpr double tolerance = 1e-10;   // a recurrence
  template <class... Args> static void forward(Args const&... args) { gdn::reference::forward(args...); }
  template <class... Args> static void backward(Args const&... args) { gdn::reference::backward(args...); }
};
template <GdnOptions O> struct Samples<GatedDeltaNet<O>> : GatedSamples<GatedDeltaNet<O>> {
  using P = GatedDeltaNet<O>;
  static std::vector<gdn::Config> sizes() {
    return {{.num_heads = 1, .num_value_heads = 2, .key_dim = 12, .value_dim = 20},
            {.num_heads = 2, .num_value_heads = 4, .key_dim = 16, .value_dim = 8},
            {.num_heads = 2, .key_dim = 32},
            {.num_heads = 1, .num_value_heads = 2, .key_dim = 64},
            {.num_heads = 1, .key_dim = 128}};
  }
  static gdn::Inputs<Shapes> inputs(gdn::Config const& c, Sequences const& s) {
    auto shapes = P::inputs(c, s);
    shapes.initial_state = gdn::state_shape(c, s);
    return shapes;
  }
  static gdn::Outputs<Shapes> outputs(gdn::Config const& c, Sequences const& s) {
    auto shapes = P::outputs(c, s);
    shapes.final_state = gdn::state_shape(c, s);
    return shapes;
  }
};

template <SparseOptions O> struct Reference<SparseAttention<O>> {
  static constexpr double tolerance = 1e-11;
  template <class T>
  static void forward(dsa::Config const& c, Sequences const& s, dsa::Inputs<In<T>> x, dsa::Outputs<Out<T>> y, dsa::Saved<Out<T>> saved) {
    dsa::reference::attend<T>(c, s, x, saved.indices, y, saved.lse);
    fill(y.auxiliary_loss, wide_t<T>(0));
    if (c.stage != Stage::language_model)
      dsa::reference::index_loss<T>(c, s, x, saved.indices, saved.lse, saved.index_lse, y.auxiliary_loss);
  }
  template <class... Args> static void backward(Args const&... args) { dsa::reference::backward(O, args...); }
};
template <SparseOptions O> struct Samples<SparseAttention<O>> : PlainSamples<SparseAttention<O>> {
  using P = SparseAttention<O>;
  static std::vector<dsa::Config> sizes() {
    std::vector<dsa::Config> list{{.num_heads = 2, .num_kv_heads = 1, .head_dim = 12, .index_heads = 2, .index_dim = 4, .index_scale = 0.5},
                                  {.num_heads = 2, .head_dim = 32, .index_scale = 0.25},
                                  {.num_heads = 1, .head_dim = 128, .index_dim = 32}};
    if (O.top_k == SparseOptions{}.top_k) {   // the default; as for windows
      list.push_back({.num_heads = 4, .num_kv_heads = 2, .head_dim = 16, .index_heads = 3});
      list.push_back({.num_heads = 2, .num_kv_heads = 1, .head_dim = 64});
    }
    // The stages that train the indexer. The dense one does not depend on top_k.
    bool const is_default = O.top_k == SparseOptions{}.top_k;
    list.push_back(at(is_default ? list[1] : list[0], Stage::sparse));
    if (is_default) list.push_back(at(list[0], Stage::dense_warm_up));
    return list;
  }
  static dsa::Outputs<Shapes> outputs(dsa::Config const& c, Sequences const& s) {
    auto shapes = P::outputs(c, s);
    shapes.auxiliary_loss = {1};
    return shapes;
  }
  static dsa::Config at(dsa::Config c, Stage stage) {
    c.stage = stage;
    return c;
  }
  static constexpr bool saved_is_linear = O.top_k_percent == 0, overflows_like_loops = true;
  static std::vector<std::string> kinds() {
    return {"noise", "ties", "every score 0", "one index key", "near one-hot", "early keys stand out"};
  }
  static void draw(std::string_view kind, Random& random, HostGroup& inputs) {
    detail::draw_softmax(kind, random, inputs);
    detail::draw_index(kind, random, inputs);
  }
};

template <SparseOptions O> struct Choices<SparseAttention<O>> {
  static std::string wrong(dsa::Config const& c, Sequences const& s, dsa::Inputs<In<double>> x, dsa::Saved<In<double>> saved, double eps) {
    return detail::wrong_keys(O, c, s, x, saved, eps);
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::testing
#endif

// ==== hybridattn/testing.hpp
// The door to the laws: for the policies and operations of the library and for yours, on any backend. It needs no test framework.
#ifndef HYBRIDATTN_TESTING_HPP
#define HYBRIDATTN_TESTING_HPP

#endif
