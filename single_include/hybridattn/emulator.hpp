// <hybridattn/emulator.hpp> as one file, written by scripts/single_include: it and all that it needs of hybridattn, a library of
// language models with hybrid attention. The other files of single_include may stand beside it.
// SPDX-License-Identifier: MIT
// Copyright (c) 2026 the hybridattn authors

#include <algorithm>
#include <array>
#include <bit>
#include <boost/context/detail/fcontext.hpp>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <iterator>
#include <limits>
#include <list>
#include <memory>
#include <mutex>
#include <new>
#include <numbers>
#include <numeric>
#include <span>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <sys/mman.h>
#include <tuple>
#include <type_traits>
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
// UNROLL_IN_KERNEL stands in front of a loop with few, constant turns in a kernel, UNROLL_8_IN_KERNEL in front of one with many.
#if defined(__CUDACC__)
#define HYBRIDATTN_CUDA 1
#define HYBRIDATTN_HD __host__ __device__
#define HYBRIDATTN_DEVICE __device__ __forceinline__
#define HYBRIDATTN_UNROLL_IN_KERNEL _Pragma("unroll")
#define HYBRIDATTN_UNROLL_8_IN_KERNEL _Pragma("unroll 8")
#else
#define HYBRIDATTN_CUDA 0
#define HYBRIDATTN_HD
#define HYBRIDATTN_DEVICE inline
#define HYBRIDATTN_UNROLL_IN_KERNEL
#define HYBRIDATTN_UNROLL_8_IN_KERNEL
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
#if defined(_OPENMP)
#define HYBRIDATTN_ABI_THREADS _openmp
#else
#define HYBRIDATTN_ABI_THREADS
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
#define HYBRIDATTN_JOIN(a, b, c, d, e, f, g, h, i) a##b##c##d##e##f##g##h##i
#define HYBRIDATTN_JOIN_VALUES(a, b, c, d, e, f, g, h, i) HYBRIDATTN_JOIN(a, b, c, d, e, f, g, h, i)
#define HYBRIDATTN_ABI                                                                                                                   \
  HYBRIDATTN_JOIN_VALUES(HYBRIDATTN_ABI_VECTORS, HYBRIDATTN_ABI_FMA, HYBRIDATTN_ABI_BF16, HYBRIDATTN_ABI_THREADS, HYBRIDATTN_ABI_CHECKS, \
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
    blocks_[size.number].waiting.push_back({block, period_});  // there is room for every block of this size
  }
  // Takes a record for a block that tensors share; end_sharing frees it. Records are used again, like blocks.
  SharedBlock* begin_sharing() {
    if (free_records_.empty()) {
      reserve(free_records_, static_cast<Index>(records_.size()) + 1, "a list of blocks");  // so that end_sharing never allocates
      free_records_.push_back(&records_.emplace_back());
    }
    SharedBlock* const record = free_records_.back();
    free_records_.pop_back();
    return record;
  }
  void end_sharing(SharedBlock* record) noexcept { free_records_.push_back(record); }
  // Returns all waiting blocks to the system.
  template <class Release> void trim(Release release) { release_until(0, period_ + 1, release); }
  std::size_t in_use() const { return in_use_; }  // bytes asked for, before rounding up to a block's size
  std::size_t peak() const { return peak_; }  // the largest in_use()
  std::size_t held() const { return held_; }  // bytes of all blocks, in use and waiting
  std::size_t allocations() const { return allocations_; }
  // Sets peak() to in_use().
  void reset_peak() { peak_ = in_use_; }

 private:
  struct Waiting {
    void* block;
    std::size_t period;  // in which it was freed
  };
  struct Blocks {
    std::vector<Waiting> waiting;  // in the order in which they were freed
    std::size_t bytes = 0, count = 0;  // bytes of one block; number of blocks, in use or waiting
  };
  static constexpr std::size_t period_takes = 25, periods = 4;

  template <class Allocate, class Release>
  void* allocate_block(std::size_t bytes, BlockSize size, Allocate allocate, Release release, std::size_t limit) {
    last_allocation_ = takes_;
    if (allocations_ - allocations_before_ >= period_takes) next_period(release);
    else release_unused(size.bytes, release);
    Blocks& blocks = blocks_[size.number];
    if (blocks.waiting.capacity() == blocks.count)  // so that give never allocates
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
  std::array<std::size_t, periods + 1> peaks_ = {};  // the most bytes in use in this period and in each of the last ones
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
// All elements as one axis. Contiguous views only.
template <class T, int Rank> HYBRIDATTN_HD View<T, 1> flat(View<T, Rank> x) { return {x.data, {x.count()}}; }

}  // namespace hybridattn::inline HYBRIDATTN_ABI
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
// The CPU: aligned memory from a pool, and parallel_for, the only place where the library uses threads.
#ifndef HYBRIDATTN_BACKEND_CPU_CPU_HPP
#define HYBRIDATTN_BACKEND_CPU_CPU_HPP

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace hybridattn::inline HYBRIDATTN_ABI {

class Cpu {
 public:
  // 0 threads: as many as OpenMP offers, one without OpenMP. Throws Error for more than thread_limit() threads.
  // Cpu{1} runs on the caller's thread and starts no threads of OpenMP, so it works in a child after fork() too.
  explicit Cpu(int threads = 0) : threads_(threads == 0 ? available_threads() : threads) {
    check(threads >= 0, "Cpu: ", threads, " threads; allowed: 0 (as many as there are) and more");
    check(threads_ <= thread_limit(), "Cpu: ", threads_, " threads", threads == 0 ? ", which OMP_NUM_THREADS asks for" : "",
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
  int threads() const { return threads_; }
  // Four for each processor, at least 256. Each thread has a stack, and OpenMP ends the process where it cannot start a thread.
  static int thread_limit() {
#if defined(_OPENMP)
    return std::max(256, 4 * omp_get_num_procs());
#else
    return 256;
#endif
  }

  // While parallel_for runs.
  class Loop {
   public:
    explicit Loop(Cpu& cpu) : cpu_(cpu.in_loop_ ? nullptr : &cpu) {
      if (cpu_ != nullptr) cpu_->in_loop_ = true;
    }
    Loop(Loop const&) = delete;
    Loop& operator=(Loop const&) = delete;
    ~Loop() {
      if (cpu_ != nullptr) cpu_->in_loop_ = false;
    }

   private:
    Cpu* cpu_;   // nullptr for a loop inside a loop
  };

 private:
  static constexpr std::align_val_t alignment{64};

  void* allocate(std::size_t bytes) const {
    if (bytes > machine_memory() - std::min(machine_memory(), pool_.held())) return nullptr;
    return ::operator new(bytes, alignment, std::nothrow);
  }
  static void release(void* block, std::size_t) noexcept { ::operator delete(block, alignment); }
  static int available_threads() {
#if defined(_OPENMP)
    int const offered = omp_get_max_threads();
    return offered > 0 ? offered : omp_get_num_procs();   // LLVM's OpenMP reads a word in OMP_NUM_THREADS as any number
#else
    return 1;
#endif
  }

  int threads_;
  bool in_loop_ = false;
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

namespace detail {

#if defined(_OPENMP)
// The error of a task. Of several it keeps that of the task with the smallest number, for any number of threads.
class Failure {
 public:
  void keep(Index task) noexcept {
#pragma omp critical(hybridattn_failure)
    if (error_ == nullptr || task < task_) {
      error_ = std::current_exception();
      task_ = task;
    }
  }
  void rethrow() const {
    if (error_ != nullptr) std::rethrow_exception(error_);
  }

 private:
  std::exception_ptr error_;
  Index task_ = 0;
};
#endif

// The loop of parallel_for, compiled once: run(f, task, thread) for every task.
inline void run_tasks(Cpu& cpu, Index count, void (*run)(void* f, Index task, int thread), void* f) {
  Cpu::Loop const loop{cpu};
#if defined(_OPENMP)
  if (cpu.threads() > 1 && count > 1 && !omp_in_parallel()) {
    Failure failure;
#pragma omp parallel for schedule(dynamic, 1) num_threads(cpu.threads())
    for (Index task = 0; task < count; ++task) {
      try {
        run(f, task, omp_get_thread_num());
      } catch (...) {
        failure.keep(task);
      }
    }
    failure.rethrow();
    return;
  }
#endif
  for (Index task = 0; task < count; ++task) run(f, task, 0);
}

}  // namespace detail

// Calls f(task, thread) for tasks 0 .. count - 1, each on one thread 0 .. cpu.threads() - 1. Any thread may run any task, so a
// result must depend on the task alone. When f throws, parallel_for throws the error after the loop, and other tasks have run too:
// check arguments and take memory before the loop.
template <class F> void parallel_for(Cpu& cpu, Index count, F f) {
  detail::run_tasks(cpu, count, [](void* body, Index task, int thread) { (*static_cast<F*>(body))(task, thread); }, &f);
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

// ==== hybridattn/backend/emulator/fiber.hpp
// Functions that stop in the middle and go on later, each on a stack of its own (Boost.Context).
#ifndef HYBRIDATTN_BACKEND_EMULATOR_FIBER_HPP
#define HYBRIDATTN_BACKEND_EMULATOR_FIBER_HPP

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

// ==== hybridattn/backend/emulator/mutation.hpp
// Leaves out one barrier of a kernel at run time, so that a test can show that the laws notice it.
#ifndef HYBRIDATTN_BACKEND_EMULATOR_MUTATION_HPP
#define HYBRIDATTN_BACKEND_EMULATOR_MUTATION_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::emulator {

inline bool same(simt::CallSite a, simt::CallSite b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }

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
  // The calling thread made a mistake. Nothing of the block runs any more.
  void stop(std::string const& mistake) {
    mistake_ = report(mistake);
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

// ==== hybridattn/backend/gpu/simt.hpp
// The words that kernels are written in. Under nvcc they are the GPU's own, under any other compiler the emulator's.
//   thread_id, block_x, block_y, block_z   the number of a thread in its block, and of the block in the grid
//   sync_block, sync_warp                  every thread of the block, or lane of the warp, waits for all others and sees what they wrote
//   shuffle, shuffle_xor, shuffle_up, shuffle_down   the value that another lane gives: lane `n`, own ^ mask, own - distance, own + distance
//   ballot                                 the set of lanes that vote true
//   match_any                              the set of lanes with the same value
//   atomic_add, atomic_max                 on integers alone, return the old value. Sums of floats in any order are not repeatable
//   rounded_product                        a b, rounded: never fused with a sum, so that it has the same bits wherever it is computed
//   exp2, log2, cos_pi, sin_pi             cos and sin of pi x. Those of x itself need local memory for large x
// All lanes of a warp take part in a word of the warp, and all threads of a block in sync_block, at the same line of the source.
#ifndef HYBRIDATTN_BACKEND_GPU_SIMT_HPP
#define HYBRIDATTN_BACKEND_GPU_SIMT_HPP

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
HYBRIDATTN_HD std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
HYBRIDATTN_HD std::uint64_t bits_of(double x) {
  std::uint64_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
HYBRIDATTN_HD float number_of(std::uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
HYBRIDATTN_HD double number_of(std::uint64_t bits) {
  double x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// The number of bits that are set, and the place of the first of them, in bits != 0.
HYBRIDATTN_HD int count_bits(std::uint32_t bits) { return __builtin_popcount(bits); }
HYBRIDATTN_HD int first_bit(std::uint32_t bits) { return __builtin_popcount((bits & -bits) - 1); }

// Arrays of shared memory and of a thread, whose sizes are ints as all numbers of a kernel are.
template <class T, int n> using Array = T[static_cast<std::size_t>(n)];
template <class T, int rows, int columns> using Table = T[static_cast<std::size_t>(rows)][static_cast<std::size_t>(columns)];

// n numbers that are read or written at once, from a multiple of their size.
template <class T, int n> struct alignas(sizeof(T) * static_cast<std::size_t>(n)) Vector {
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

// ==== hybridattn/backend/emulator/emulator.hpp
// A GPU on the host: kernels run with every thread a fiber, slowly, and their mistakes become errors. docs/emulator.md shows which.
#ifndef HYBRIDATTN_BACKEND_EMULATOR_EMULATOR_HPP
#define HYBRIDATTN_BACKEND_EMULATOR_EMULATOR_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

class Emulator {
 public:
  // testing::Machine: the number is a schedule.
  static constexpr bool takes_schedule = true;

  // The order in which threads, warps and blocks run: 1 to 6 are forward, backward and random orders, in which a warp runs until it must
  // wait, or warps take turns. Larger numbers are other random orders. The result of a correct kernel does not depend on it. Throws Error
  // for a schedule below 1.
  explicit Emulator(int schedule = 1) : schedule_(schedule) {
    check(schedule >= 1, "Emulator: schedule ", schedule, "; schedules are numbers from 1 on");
    for (int thread = 0; thread < cpu_.threads(); ++thread)
      engines_.push_back(std::make_unique<emulator::Engine>(emulator::Schedule{schedule}));
  }

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
    check(owns(to) && owns(from), "Emulator: a copy on the device was given memory of the host");
    HiddenMemory::Open const open{memory_};
    std::memcpy(to, from, bytes);
  }
  void fill(void* to, std::byte value, std::size_t bytes) {
    check(owns(to), "Emulator: a fill was given memory of the host");
    HiddenMemory::Open const open{memory_};
    std::memset(to, std::to_integer<int>(value), bytes);
  }
  void synchronise() {}
  bool owns(void const* memory) const { return memory_.owns(memory); }
  Pool& pool() { return pool_; }
  // Kernels that were started.
  std::size_t launches() const { return launches_; }

  // Runs a kernel to its end, its blocks on all cores. Throws Error where it makes a mistake, or is given memory of the host.
  template <class K> void start(Grid grid, typename K::Params const& params) {
    check_addresses<K>(params);
    ++launches_;
    constexpr std::size_t shared = std::is_empty_v<typename K::Shared> ? 0 : sizeof(typename K::Shared);
    run({type_name<K>,
         [](void* memory, void const* p) { K::run(*static_cast<typename K::Shared*>(memory), *static_cast<typename K::Params const*>(p)); },
         &params, K::threads, shared, grid});
  }

 private:
  void run(emulator::Launch const& launch) {
    HiddenMemory::Open const open{memory_};
    Grid const grid = launch.grid;
    Index const blocks = grid.x * grid.y * grid.z;
    parallel_for(cpu_, blocks, [&](Index task, int thread) {
      Index const block = schedule_ % 3 == 2 ? blocks - 1 - task : task;
      engines_[static_cast<std::size_t>(thread)]->run_block(launch, {block % grid.x, block / grid.x % grid.y, block / grid.x / grid.y});
    });
    for (auto& engine : engines_) engine->end_launch();
  }
  // Throws Error where a word of the parameters is an address of the host's memory: a GPU cannot read it. Numbers are smaller than
  // addresses or larger. Two small numbers side by side may look like an address, but there is no memory.
  template <class K> void check_addresses([[maybe_unused]] typename K::Params params) const {
#if defined(__GNUC__) && !defined(__clang__)
    __builtin_clear_padding(&params);  // which may hold anything, half an address too
    auto const* const bytes = reinterpret_cast<std::byte const*>(&params);
    for (std::size_t at = 0; at + sizeof(void*) <= sizeof params; at += sizeof(void*)) {
      void* address;
      std::memcpy(&address, bytes + at, sizeof address);
      auto const number = reinterpret_cast<std::uintptr_t>(address);
      if (number < std::uintptr_t{1} << 32 || number >= std::uintptr_t{1} << 47 || memory_.owns(address)) continue;
      bool const is_memory = msync(reinterpret_cast<void*>(number / 4096 * 4096), 1, MS_ASYNC) == 0;
      check(!is_memory, "Emulator: kernel ", type_name<K>(), ": the parameters hold an address of the host's memory, at byte ", at,
            "; a GPU cannot read it");
    }
#endif
  }

  int schedule_;
  Cpu cpu_;
  HiddenMemory memory_{"Emulator"};
  Pool pool_;
  std::vector<std::unique_ptr<emulator::Engine>> engines_;  // one for each thread of the host
  std::size_t launches_ = 0;
};
static_assert(GpuBackend<Emulator>);

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

template <class T> struct WideOf {
  using type = T;
};
// The scalar of sums over Ts.
template <class T> using wide_t = typename WideOf<std::remove_const_t<T>>::type;

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
  using Backend = B;
  using Sizes = G<Shapes>;
};
}  // namespace detail
template <class G> using scalar_of = typename detail::OwnedGroup<G>::Scalar;
template <class G> using backend_of = typename detail::OwnedGroup<G>::Backend;

// The same group in another role.
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
// `all` becomes a view of the whole block, gaps included. It is unchanged where no tensor has elements.
template <class T, class B, template <class> class G> G<Owned<T, B>> allocate_together(B& backend, G<Shapes> const& shapes,
                                                                                       View<T, 1>* all = nullptr) {
  G<Owned<T, B>> owned;
  detail::AllocateTogether<B> place{backend};
  zip(place, shapes, owned);
  std::size_t const bytes = std::max<std::size_t>(std::exchange(place.bytes, 0), sizeof(T));
  place.block = detail::take_shared(backend, bytes);
  zip(place, shapes, owned);
  static_assert(std::is_same_v<wide_t<T>, T>, "the block is one list of elements, all of one type");
  if (all != nullptr && place.block->tensors > 1) *all = {static_cast<T*>(place.block->data), {static_cast<Index>(bytes / sizeof(T))}};
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
// where `sequences` is a View<Sequence const, 1> and `scratch` a View<T, 1>. The Config is copied to the machine, so it holds numbers alone.
template <class P, class B> struct FromLoops {
  template <class T, class M>
  static void forward(B& gpu, typename P::Config const& c, SequencesOn<M> const& s, typename P::template Inputs<In<T>> x,
                      typename P::template Outputs<Out<T>> y, typename P::template Saved<Out<T>> saved) {
    Tensor<T, 1, B> scratch{gpu, {P::Loops::template scratch<T>(c, s)}};
    launch<gpu::LoopsForward<P, T>>(gpu, {}, {c, s.table().list, x, y, saved, out(scratch)});
  }
  template <class T, class M>
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
  template <class Exponential> HYBRIDATTN_HD V rebase(V next, Exponential exponential) {
    V const factor = exponential(reference, next);
    reference = next;
    total *= factor;
    return factor;
  }
  // Adds the scores of another part. A part without scores has reference -inf and total 0. Returns one factor for each part's weighted sums.
  struct Factors {
    V own, other;
  };
  template <class Exponential> HYBRIDATTN_HD Factors merge(OnlineSoftmax other, Exponential exponential) {
    V const next = reference > other.reference ? reference : other.reference;
    auto const factor = [&](OnlineSoftmax& part) { return part.reference == next ? V(1) : part.rebase(next, exponential); };
    Factors const factors{factor(*this), factor(other)};  // of two parts without scores, -inf - -inf would be NaN
    total += other.total;
    return factors;
  }
  HYBRIDATTN_HD V lse() const { return reference + std::log(total); }  // log sum_j e^s_j
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::attention
#endif

// ==== hybridattn/backend/cpu/simd.hpp
// Vectors of the CPU, on the vector extensions of GCC and Clang: no intrinsics, so any target compiles.
#ifndef HYBRIDATTN_BACKEND_CPU_SIMD_HPP
#define HYBRIDATTN_BACKEND_CPU_SIMD_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::cpu {

// Bytes of a vector register, and the rows of a tile whose accumulators fit beside two loaded vectors.
#if defined(__AVX512F__)
inline constexpr int vector_bytes = 64;
inline constexpr int tile_rows = 8;
#elif defined(__AVX__)
inline constexpr int vector_bytes = 32;
inline constexpr int tile_rows = 4;
#else
inline constexpr int vector_bytes = 16;
inline constexpr int tile_rows = 4;
#endif

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

// to[c][r] = from[r][c] for the square of one vector's lanes.
template <class T> HYBRIDATTN_INLINE void transpose(T const* from, Index from_stride, T* to, Index to_stride);

namespace detail {
template <class V, std::size_t... i>
HYBRIDATTN_INLINE V low_halves(V a, V b, std::index_sequence<i...>) {  // pairs (a0, b0, a1, b1, ...) of the lower half
  constexpr std::size_t n = sizeof...(i);
  return shuffled(a, b, std::index_sequence<(i % 2 == 0 ? i / 2 : n + i / 2)...>{});
}
template <class V, std::size_t... i>
HYBRIDATTN_INLINE V high_halves(V a, V b, std::index_sequence<i...>) {
  constexpr std::size_t n = sizeof...(i);
  return shuffled(a, b, std::index_sequence<(i % 2 == 0 ? (n + i) / 2 : n + (n + i) / 2)...>{});
}
}  // namespace detail

template <class T> HYBRIDATTN_INLINE void transpose(T const* from, Index from_stride, T* to, Index to_stride) {
  constexpr int n = lanes<T>;
  using Lanes = std::make_index_sequence<static_cast<std::size_t>(n)>;
  Vec<T> rows[std::size_t{n}];
  HYBRIDATTN_UNROLL
  for (int i = 0; i < n; ++i) rows[i] = load(from + i * from_stride);
  // Interleaving row i with row i + n/2, log2(n) times, is the transposition (a perfect shuffle of the index bits).
  for (int round = 1; round < n; round *= 2) {
    Vec<T> next[std::size_t{n}];
    HYBRIDATTN_UNROLL
    for (int i = 0; i < n / 2; ++i) {
      next[2 * i] = detail::low_halves(rows[i], rows[i + n / 2], Lanes{});
      next[2 * i + 1] = detail::high_halves(rows[i], rows[i + n / 2], Lanes{});
    }
    HYBRIDATTN_UNROLL
    for (int i = 0; i < n; ++i) rows[i] = next[i];
  }
  HYBRIDATTN_UNROLL
  for (int i = 0; i < n; ++i) store(to + i * to_stride, rows[i]);
}

namespace detail {
// A register has parts of 16 bytes. A shuffle inside parts is cheap, a shuffle across parts is slow, so sums go across last.
template <class T> inline constexpr int part = 16 / static_cast<int>(sizeof(T));
// Groups of `size` elements from the lower or the upper half of each part of m elements, of a and of b in turn.
template <std::size_t size, bool upper, std::size_t m, class V, std::size_t... i>
HYBRIDATTN_INLINE V half_parts(V a, V b, std::index_sequence<i...>) {
  constexpr std::size_t n = sizeof...(i);
  return shuffled(a, b, std::index_sequence<(i % m / size % 2 * n + i / m * m + (upper ? m / 2 : 0) + i % m / size / 2 * size + i % size)...>{});
}
// Every second part of m elements, of a, then of b.
template <std::size_t offset, std::size_t m, class V, std::size_t... i> HYBRIDATTN_INLINE V every_second_part(V a, V b, std::index_sequence<i...>) {
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
};
template <class T> Rows<T> head_of(View<T, 3> x, Sequence s, Index head) { return {x.row(s.start, head), x.stride[0]}; }

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
template <class T, class Dim, class F> HYBRIDATTN_INLINE void for_each_piece(Dim D, F f) {
  constexpr int n = cpu::lanes<T>;
  Index d = 0;
  for (; d + 4 * n <= D; d += 4 * n) f(Piece<T, 4>{d});
  if (d + 2 * n <= D) {
    f(Piece<T, 2>{d});
    d += 2 * n;
  }
  if (d + n <= D) {
    f(Piece<T, 1>{d});
    d += n;
  }
  if (d < D) f(ShortPiece<T>{{d, D - d}});
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

// products[j] = x . rows[key j] for every key. The last vector of products is padded with the last key's product.
template <class T, class Dim, class Keys> HYBRIDATTN_INLINE void dot_rows(Dim D, T const* x, Rows<T const> rows, Keys keys, T* products) {
  constexpr int n = cpu::lanes<T>;
  Range<T> range;
  for (Index j = 0; j < keys.count; j += n) {
    T const* row[std::size_t{n}];
    HYBRIDATTN_UNROLL
    for (int i = 0; i < n; ++i) row[i] = rows[keys[std::min(j + i, keys.count - 1)]];
    cpu::Vec<T> sums[std::size_t{n}] = {};
    for_each_piece<T>(D, [&](auto piece) HYBRIDATTN_INLINE_LAMBDA {
      HYBRIDATTN_UNROLL
      for (int i = 0; i < n; ++i) {
        HYBRIDATTN_UNROLL
        for (int v = 0; v < piece.vectors; ++v) sums[i] += piece.get(x, v) * piece.get(row[i], v);
      }
    });
    cpu::sum_each<n, T>(sums, products + j);
    range.add(cpu::load(products + j));
  }
  if (!range.is_moderate()) dot_rows_in_order<T>(D, x, rows, keys, products);
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

// total = sum_j p[j] rows[key j] for a piece of the rows, in several sums, which keep the CPU's pipelines busy.
template <class T, class Piece, class Keys>
HYBRIDATTN_INLINE void sum_piece(Piece piece, T const* p, Rows<T const> rows, Keys keys, cpu::Vec<T>* total) {
  constexpr int V = Piece::vectors;
  constexpr int chains = V == 4 ? 2 : 4;
  cpu::Vec<T> sum[std::size_t{chains}][std::size_t{V}] = {};
  auto const add = [&](Index j, int chain) HYBRIDATTN_INLINE_LAMBDA {
    T const* const row = rows[keys[j]];
    HYBRIDATTN_UNROLL
    for (int v = 0; v < V; ++v) sum[chain][v] += p[j] * piece.get(row, v);
  };
  Index j = 0;
  for (; j + chains <= keys.count; j += chains) {
    HYBRIDATTN_UNROLL
    for (int chain = 0; chain < chains; ++chain) add(j + chain, chain);
  }
  for (; j < keys.count; ++j) add(j, 0);
  HYBRIDATTN_UNROLL
  for (int v = 0; v < V; ++v) {
    total[v] = sum[0][v];
    HYBRIDATTN_UNROLL
    for (int chain = 1; chain < chains; ++chain) total[v] += sum[chain][v];
  }
}
// o = factor * sum_j p[j] rows[key j]
template <class T, class Dim, class Keys>
HYBRIDATTN_INLINE void weighted_rows(Dim D, T const* p, Rows<T const> rows, Keys keys, T factor, T* o) {
  for_each_piece<T>(D, [&](auto piece) HYBRIDATTN_INLINE_LAMBDA {
    constexpr int V = piece.vectors;
    cpu::Vec<T> total[std::size_t{V}];
    sum_piece<T>(piece, p, rows, keys, total);
    HYBRIDATTN_UNROLL
    for (int v = 0; v < V; ++v) piece.put(o, v, factor * total[v]);
  });
}
// o += sum_j p[j] rows[key j]
template <class T, class Dim, class Keys>
HYBRIDATTN_INLINE void add_weighted_rows(Dim D, T const* p, Rows<T const> rows, Keys keys, T* o) {
  for_each_piece<T>(D, [&](auto piece) HYBRIDATTN_INLINE_LAMBDA {
    constexpr int V = piece.vectors;
    cpu::Vec<T> total[std::size_t{V}];
    sum_piece<T>(piece, p, rows, keys, total);
    HYBRIDATTN_UNROLL
    for (int v = 0; v < V; ++v) piece.put(o, v, piece.get(o, v) + total[v]);
  });
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::attention
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

// ==== hybridattn/attention/full/cpu_tiles.hpp
// Used by the forward and the backward kernel: rows of one head, their transposes, and products over the mask's band.
#ifndef HYBRIDATTN_ATTENTION_FULL_CPU_TILES_HPP
#define HYBRIDATTN_ATTENTION_FULL_CPU_TILES_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::full {

inline constexpr int tile_vectors = 2;
template <class T> inline constexpr Index tile_columns = tile_vectors * cpu::lanes<T>;

using attention::Rows, attention::head_of;

// Keys j that query i sees: i - reach < j <= i.
inline Index reach(int window, Sequence s) { return window == 0 ? s.length : std::min<Index>(window, s.length); }

// Rows first .. first + tile_rows - 1 for a tile. If rows are past the end, the tile is a copy in pad [tile_rows, D] with zeros there.
template <class T, class Dim> HYBRIDATTN_INLINE cpu::Scalars<T> whole_tile(Dim D, Rows<T const> x, Index first, Index length, T* pad) {
  if (first + cpu::tile_rows <= length) return {x[first], x.stride, 1};
  std::fill_n(pad, cpu::tile_rows * D, T(0));
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
  static_assert(block % tile_columns<T> == 0 && block % cpu::tile_rows == 0);
  static Index scratch(Index D, Index longest) { return 2 * round_up(longest, block) * (D + 1) + 2 * block * block + cpu::tile_rows * D; }

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
  static constexpr int MR = cpu::tile_rows, NV = tile_vectors;
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

template <> struct On<Add, Cpu> {
  template <class T> static void forward(Cpu& cpu, View<T const, 1> x, View<T, 1> y) {
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
    return std::all_of(x.data, x.data + x.count(), [](T value) { return std::isfinite(value); });
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

template <> struct On<Swiglu, Cpu> {
  template <class T> static void forward(Cpu& cpu, View<T const, 1> gate, View<T const, 1> up, View<T, 1> y) {
    parallel_blocks(cpu, y.count(), cpu::element_grain, [&](Index first, Index last) {
      cpu::for_each_vector<T>(first, last, [&](cpu::Slot<T> s) HYBRIDATTN_INLINE_LAMBDA {
        cpu::Vec<T> const x = s.get(gate.data), silu = x * cpu::sigmoid<T>(x);
        s.put(y.data, up.empty() ? silu : silu * s.get(up.data));
      });
    });
  }
  template <class T>
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

template <> struct On<SigmoidGate, Cpu> {
  template <class T> static void forward(Cpu& cpu, View<T const, 1> x, View<T const, 1> z, View<T, 1> y) {
    parallel_blocks(cpu, y.count(), cpu::element_grain, [&](Index first, Index last) {
      cpu::for_each_vector<T>(
          first, last, [&](cpu::Slot<T> s) HYBRIDATTN_INLINE_LAMBDA { s.put(y.data, s.get(x.data) * cpu::sigmoid<T>(s.get(z.data))); });
    });
  }
  template <class T>
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

template <> struct On<RmsNorm, Cpu> {
  template <class T> static void forward(Cpu& cpu, RmsNorm::Options o, View<T const, 2> x, View<T const, 1> w, View<T, 2> y) {
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

  template <class T>
  static void backward(Cpu& cpu, RmsNorm::Options o, View<T const, 2> x, View<T const, 1> w, View<T const, 2> d_y, View<T, 2> d_x,
                       View<T, 1> d_w, Into into) {
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

template <> struct On<GatedRmsNorm, Cpu> {
  template <class T> static void forward(Cpu& cpu, double eps, View<T const, 2> x, View<T const, 2> z, View<T const, 1> w, View<T, 2> y) {
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

  template <class T>
  static void backward(Cpu& cpu, double eps, View<T const, 2> x, View<T const, 2> z, View<T const, 1> w, View<T const, 2> d_y,
                       View<T, 2> d_x, View<T, 2> d_z, View<T, 1> d_w) {
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

template <> struct On<Rope, Cpu> {
  template <class T>
  static void forward(Cpu& cpu, Rope::Options o, View<T const, 3> angles, View<std::int32_t const, 1> positions, View<T const, 3> x,
                      View<T, 3> y) {
    turn(cpu, o, angles, positions, x, y, T(1));
  }
  template <class T>
  static void backward(Cpu& cpu, Rope::Options o, View<T const, 3> angles, View<std::int32_t const, 1> positions, View<T const, 3> d_y,
                       View<T, 3> d_x) {
    turn(cpu, o, angles, positions, d_y, d_x, T(-1));
  }

 private:
  template <class T>
  static void turn(Cpu& cpu, Rope::Options o, View<T const, 3> angles, View<std::int32_t const, 1> positions, View<T const, 3> x,
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
    angles_ = s.template angles<T>(backend, options_.rotary_dim, theta, [&](View<T, 3> angles) {
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
  View<T const, 3> angles_;
};

// One of q and k: raw [N, H, D] -> norm with weight [D] -> rotation -> x.
struct HeadNorm {
  QkNorm kind;
  double eps;

  RmsNorm::Options options() const { return {kind == QkNorm::plain ? NormWeight::plain : NormWeight::zero_centred, eps}; }
  // The initial weight: the norm then multiplies by 1.
  Initial start() const { return Initial::constant(kind == QkNorm::plain ? 1 : 0); }

  template <class B, class T>
  void forward(B& backend, Rotation<T, B> const& rotation, View<T const, 3> raw, View<T const, 1> weight, View<T, 3> x) const {
    if (kind == QkNorm::none) {
      rotation.forward(backend, raw, x);
      return;
    }
    On<RmsNorm, B>::forward(backend, options(), head_rows(raw), weight, head_rows(x));
    if (rotation.turns()) rotation.forward(backend, View<T const, 3>(x), x);
  }
  // Overwrites d_raw and d_weight.
  template <class B, class T>
  void backward(B& backend, Rotation<T, B> const& rotation, View<T const, 3> raw, View<T const, 1> weight, View<T const, 3> d_x,
                View<T, 3> d_raw, View<T, 1> d_weight) const {
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
  keys.for_each_block(t, [&](Index first, Rows k, Rows, attention::AllRows all) {
    for (Index g = 0; g < group; ++g) attention::dot_rows<T>(D, q[g], k, all, p + g * room + first);                  // (1)
  });
  for (Index g = 0; g < group; ++g) {
    std::fill_n(o[g], D, T(0));
    T* const weights = p + g * room;
    T const total = attention::exponentials(scale, keys.count(t), weights).total;                                     // (2)
    for (Index j = 0, count = keys.count(t); j < count; ++j) weights[j] *= T(1) / total;
  }
  keys.for_each_block(t, [&](Index first, Rows, Rows v, attention::AllRows all) {
    for (Index g = 0; g < group; ++g) attention::add_weighted_rows<T>(D, p + g * room + first, v, all, o[g]);        // (3)
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
  static Index scratch(Index D) { return 2 * queries * D + forward_keys * queries + cpu::tile_rows * D; }

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
  static constexpr int MR = cpu::tile_rows, NV = tile_vectors;
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

template <FullOptions O> struct On<FullAttention<O>, Cpu> {
  template <class T>
  static void forward(Cpu& cpu, full::Config const& c, Sequences const& s, full::Inputs<In<T>> x, full::Outputs<Out<T>> y,
                      full::Saved<Out<T>> saved) {
    full::forward(cpu, O, c, s, x, y, saved);
  }
  template <class T>
  static void backward(Cpu& cpu, full::Config const& c, Sequences const& s, full::Inputs<In<T>> x, full::Outputs<In<T>> y,
                       full::Saved<In<T>> saved, full::Outputs<In<T>> d_y, full::Inputs<Out<T>> d_x) {
    full::backward(cpu, O, c, s, x, y, saved, d_y, d_x);
  }
  template <class T>
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
template <class T> struct ExpOfDifference {
  HYBRIDATTN_DEVICE T operator()(T x, T y) const { return std::exp(x - y); }
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
    attention::OnlineSoftmax<T> softmax{-simt::infinity<T>(), 0};
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
  static HYBRIDATTN_DEVICE T weigh(Shared& shared, T scale, Range seen, int r, int c, attention::OnlineSoftmax<T>& softmax) {
    T scores[Of::columns], largest = softmax.reference;
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int n = 0; n < Of::columns; ++n) {
      int const j = c + n * lanes;
      scores[n] = -simt::infinity<T>();
      if (seen.holds(j)) scores[n] = simt::rounded_product(scale, dot_rows(shared.q.row[r], shared.kv.row[j]));  // (1)
      largest = simt::larger(largest, scores[n]);
    }
    largest = simt::largest_of_lanes<lanes>(largest);
    bool const sees_none = seen.begin >= rows;   // of the keys up to here
    T const shrink = sees_none ? T(1) : softmax.rebase(largest, ExpOfDifference<T>{});
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
    attention::OnlineSoftmax<T> softmax{-simt::infinity<T>(), 0};
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
  static HYBRIDATTN_DEVICE T weigh(Shared& shared, T scale, int count, attention::OnlineSoftmax<T>& softmax) {
    int const j = simt::thread_id();
    if (j < count) shared.scores[j] = simt::rounded_product(scale, dot_rows(shared.q, shared.kv[j]));   // (1)
    simt::sync_block();
    T largest = softmax.reference;
    for (int i = 0; i < count; ++i) largest = simt::larger(largest, shared.scores[i]);
    T const shrink = softmax.rebase(largest, ExpOfDifference<T>{});
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

// f(room) with the smallest room for D entries that kernels are compiled for. Throws Error where none is large enough.
template <class F> void with_room(Index D, F f) {
  check(D <= 256, "FullAttention: head_dim ", D, "; a GPU's kernels have room for 256");
  if (D <= 32) f(std::integral_constant<int, 32>{});
  else if (D <= 64) f(std::integral_constant<int, 64>{});
  else if (D <= 128) f(std::integral_constant<int, 128>{});
  else f(std::integral_constant<int, 256>{});
}

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
  with_room(c.head_dim, [&](auto D) { launch_tiles<Forward<T, D()>>(gpu, s, c.num_heads, p); });
}
template <class T, class B> void backward(B& gpu, Config const& c, Sequences const& s, KernelParams<T> p) {
  Tensor<wide_t<T>, 2, B> delta{gpu, p.y_lse.shape};
  p.delta = out(delta);
  with_room(c.head_dim, [&](auto D) {
    launch_tiles<QueryGradients<T, D()>>(gpu, s, c.num_heads, p);
    launch_tiles<KeyGradients<T, D()>>(gpu, s, c.num_kv_heads, p);
  });
}

}  // namespace full

template <FullOptions O, GpuBackend B> struct On<FullAttention<O>, B> {
  template <class T, class M>
  static void forward(B& gpu, full::Config const& c, SequencesOn<M> const& s, full::Inputs<In<T>> x, full::Outputs<Out<T>> y,
                      full::Saved<Out<T>> saved) {
    auto p = full::kernel_params<T>(O, c, s, x);
    p.o = y.o;
    p.lse = saved.lse;
    full::forward(gpu, c, s, p);
  }

  template <class T, class M>
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
  template <class T, class M>
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
    if (s.any_continue())
      full::with_room(c.head_dim, [&](auto D) { launch<full::Decode<T, D()>>(gpu, {.x = s.tokens(), .y = c.num_heads}, p); });
    for_each(gpu, x.k.count(), full::Remember<T>{x, cache, s.table()});
  }
};

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
HYBRIDATTN_HD Index rank_of(Index number, StepFault fault) {
  return first_fault_rank - (number * 4 + static_cast<Index>(fault) - static_cast<Index>(StepFault::mean));
}
HYBRIDATTN_HD StepFault fault_of(Index rank) {
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
    bool const bad = i < p.x.extent(0) && !(-simt::infinity<T>() < p.x(i) && p.x(i) < simt::infinity<T>());
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

template <GpuBackend B> struct On<Add, B> {
  template <class T> static void forward(B& gpu, View<T const, 1> x, View<T, 1> y) { for_each(gpu, y.count(), gpu::AddElement<T>{x, y}); }
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

// ==== hybridattn/ops/balance/kernels.hpp
// Load balancing as kernels.
#ifndef HYBRIDATTN_OPS_BALANCE_KERNELS_HPP
#define HYBRIDATTN_OPS_BALANCE_KERNELS_HPP

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

template <> struct On<CausalConv1d, Cpu> {
  template <class T>
  static void forward(Cpu& cpu, Activation activation, Sequences const& s, View<T const, 2> x, View<T const, 2> w,
                      View<T const, 3> initial_state, View<T, 2> y, View<T, 3> final_state) {
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

  template <class T>
  static void backward(Cpu& cpu, Activation activation, Sequences const& s, View<T const, 2> x, View<T const, 2> w,
                       View<T const, 3> initial_state, View<T const, 2> d_y, View<T const, 3> d_final_state, View<T, 2> d_x, View<T, 2> d_w,
                       View<T, 3> d_initial_state) {
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
  static void gradient_row(Sequences const& s, View<T const, 2> taps, View<T const, 2> d_s, View<T const, 3> d_final_state, Index n,
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
  template <class T> static void keep_last(Sequences const& s, cpu::detail::ConvRows<T> const& rows, View<T, 3> final_state) {
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
  static void initial_gradient(Sequences const& s, View<T const, 2> taps, View<T const, 2> d_s, View<T const, 3> d_final_state,
                               View<T, 3> d_initial_state) {
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
template <GpuBackend B> struct On<CausalConv1d, B> {
  template <class T, class M>
  static void forward(B& gpu, Activation activation, SequencesOn<M> const& s, View<T const, 2> x, View<T const, 2> w,
                      View<T const, 3> initial_state, View<T, 2> y, View<T, 3> final_state) {
    gpu::ConvInputs<T> const inputs{s.table(), x, w, initial_state};
    launch<gpu::ConvForward<T>>(gpu, gpu::conv_grid(x.extent(0), x.extent(1)), {inputs, activation, y});
    if (!final_state.empty()) for_each(gpu, s.count() * x.extent(1), gpu::KeepLastInputs<T>{inputs, final_state});
  }

  template <class T, class M>
  static void backward(B& gpu, Activation activation, SequencesOn<M> const& s, View<T const, 2> x, View<T const, 2> w,
                       View<T const, 3> initial_state, View<T const, 2> d_y, View<T const, 3> d_final_state, View<T, 2> d_x, View<T, 2> d_w,
                       View<T, 3> d_initial_state) {
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

// ==== hybridattn/backend/cpu/gemm.hpp
// Matrix products on the CPU, by the register tile. A row of a result depends only on that row of `a` and on `b`. It is
// summed over the depth in one fixed order, for any number of rows and threads.
#ifndef HYBRIDATTN_BACKEND_CPU_GEMM_HPP
#define HYBRIDATTN_BACKEND_CPU_GEMM_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::cpu {

namespace detail {

inline constexpr int panel_vectors = 2;
template <class T> inline constexpr Index panel_columns = panel_vectors * lanes<T>;
inline constexpr Index depth_block = 256, row_block = 64;

// Columns first .. first + panel_columns of rows k0 .. k1 of b, as consecutive rows; zero where b has no more columns.
template <class T> void pack_panel(Operand<T> b, Index first, Index k0, Index k1, T* panel) {
  constexpr Index width = panel_columns<T>;
  Index const here = std::min(width, b.columns - first);
  if (here < width) std::memset(panel, 0, static_cast<std::size_t>((k1 - k0) * width) * sizeof(T));
  if (b.column == 1) {
    for (Index k = k0; k < k1; ++k)
      std::memcpy(panel + (k - k0) * width, b.data + k * b.row + first, static_cast<std::size_t>(here) * sizeof(T));
    return;
  }
  Index j = 0;
  for (; j + lanes<T> <= here; j += lanes<T>) {
    T const* from = b.data + (first + j) * b.column;
    Index k = k0;
    for (; k + lanes<T> <= k1; k += lanes<T>) transpose(from + k, b.column, panel + (k - k0) * width + j, width);
    for (; k < k1; ++k)
      for (Index i = 0; i < lanes<T>; ++i) panel[(k - k0) * width + j + i] = from[i * b.column + k];
  }
  for (; j < here; ++j)
    for (Index k = k0; k < k1; ++k) panel[(k - k0) * width + j] = b.data[(first + j) * b.column + k * b.row];
}

// One tile of c from `rows` rows of a; `add` continues the sum that c already holds.
template <class T> void write_tile(Index depth, Scalars<T> a, T const* panel, T* c, Index c_row, Index rows, Index columns, bool add) {
  constexpr int MR = tile_rows, NV = panel_vectors;
  if (rows == MR && columns == panel_columns<T>) {
    auto const at = [&](int r, int v) HYBRIDATTN_INLINE_LAMBDA { return c + r * c_row + v * lanes<T>; };
    auto const keep = [&](int r, int v, Vec<T> sum) HYBRIDATTN_INLINE_LAMBDA { store(at(r, v), sum); };
    Columns<T> const b{panel, panel_columns<T>};
    if (add) tile<MR, NV, T>(depth, a, b, [&](int r, int v) HYBRIDATTN_INLINE_LAMBDA { return load(at(r, v)); }, keep);
    else tile<MR, NV, T>(depth, a, b, [](int, int) HYBRIDATTN_INLINE_LAMBDA { return Vec<T>{}; }, keep);
    return;
  }
  // At an edge the same whole tile runs on copies, padded with rows of zeros and with columns that are never read.
  alignas(vector_bytes) T padded_a[MR * depth_block] = {}, padded_c[MR * panel_columns<T>] = {};
  for (Index r = 0; r < rows; ++r) {
    for (Index k = 0; k < depth; ++k) padded_a[r * depth + k] = a.data[r * a.row + k * a.depth];
    if (add) std::memcpy(padded_c + r * panel_columns<T>, c + r * c_row, static_cast<std::size_t>(columns) * sizeof(T));
  }
  write_tile<T>(depth, {padded_a, depth, 1}, panel, padded_c, panel_columns<T>, MR, panel_columns<T>, add);
  for (Index r = 0; r < rows; ++r)
    std::memcpy(c + r * c_row, padded_c + r * panel_columns<T>, static_cast<std::size_t>(columns) * sizeof(T));
}

// Rows r0 .. r1 of one panel of columns of c (+)= a b.
template <class T>
void multiply_panel(Operand<T> a, Operand<T> b, T* c, Index c_row, Index r0, Index r1, Index first, T* panel, Into into) {
  Index const columns = std::min(panel_columns<T>, b.columns - first);
  for (Index k0 = 0; k0 < a.columns; k0 += depth_block) {
    Index const k1 = std::min(a.columns, k0 + depth_block);
    pack_panel(b, first, k0, k1, panel);
    for (Index r = r0; r < r1; r += tile_rows)
      write_tile<T>(k1 - k0, {a.data + r * a.row + k0 * a.column, a.row, a.column}, panel, c + r * c_row + first, c_row,
                    std::min<Index>(tile_rows, r1 - r), columns, into == Into::add || k0 > 0);
  }
}

// A product without depth.
template <class T> void sum_nothing(View<T, 2> c, Into into) {
  for (Index r = 0; r < c.extent(0) && into == Into::overwrite; ++r) std::fill_n(c.row(r), c.extent(1), T(0));
}

}  // namespace detail

// c = a b or c += a b, for a [M, K], b [K, N], c [M, N]. Transposed operands are read in place.
template <class T> void gemm(Cpu& cpu, Operand<T> a, Operand<T> b, View<T, 2> c, Into into = Into::overwrite) {
  check(a.columns == b.rows && c.extent(0) == a.rows && c.extent(1) == b.columns, "gemm: [", a.rows, ", ", a.columns, "] times [", b.rows,
        ", ", b.columns, "] does not give [", c.extent(0), ", ", c.extent(1), "]");
  if (c.count() == 0) return;
  if (a.columns == 0) return detail::sum_nothing(c, into);
  using detail::panel_columns;
  Index const panels = ceil_div(b.columns, panel_columns<T>);
  // With few panels and many rows, threads also share out the rows. Each thread packs its own copy of the panel.
  Index const shares = panels >= 2 * cpu.threads() ? 1 : std::clamp<Index>(a.rows / detail::row_block, 1, cpu.threads());
  Index const share = round_up(ceil_div(a.rows, shares), tile_rows);
  constexpr Index panel = detail::depth_block * panel_columns<T>;
  Scratch<T> const packed{cpu, cpu.threads() * panel};
  parallel_for(cpu, panels * shares, [&](Index task, int thread) {
    Index const r0 = task % shares * share, r1 = std::min(a.rows, r0 + share);
    if (r0 < r1)
      detail::multiply_panel(a, b, c.data, c.stride[0], r0, r1, task / shares * panel_columns<T>, packed.data() + thread * panel, into);
  });
}

// One product of several.
template <class T> struct Product {
  Operand<T> a, b;
  View<T, 2> c;
};

// Computes the products first .. last in one parallel loop. All have the same number of columns, and a depth above 0 in all or in none.
template <class T> void gemm_each(Cpu& cpu, Product<T> const* first, Product<T> const* last, Into into) {
  if (first == last) return;
  if (first->a.columns == 0) {
    for (; first != last; ++first) detail::sum_nothing(first->c, into);
    return;
  }
  using detail::panel_columns;
  Index const panels = ceil_div(first->b.columns, panel_columns<T>);
  constexpr Index panel = detail::depth_block * panel_columns<T>;
  Scratch<T> const packed{cpu, cpu.threads() * panel};
  parallel_for(cpu, (last - first) * panels, [&](Index task, int thread) {
    Product<T> const& p = first[task / panels];
    detail::multiply_panel(p.a, p.b, p.c.data, p.c.stride[0], 0, p.a.rows, task % panels * panel_columns<T>, packed.data() + thread * panel,
                           into);
  });
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

template <> struct On<SoftmaxLoss, Cpu> {
  template <class T>
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
    Index best = 0;
    for (Index v = 1; v < V; ++v) best = logits[v] > logits[best] ? v : best;
    T const peak = logits[best], own = logits[target];
    cpu::Vec<T> sums{};
    cpu::for_each_vector<T>(0, V, [&](cpu::Slot<T> s) HYBRIDATTN_INLINE_LAMBDA {
      cpu::Vec<T> e = cpu::exp<T>(s.get(logits) - peak);
      if (s.count < cpu::lanes<T>)
        e = cpu::select<T>(cpu::lane_numbers<T>() < static_cast<typename cpu::BitsOf<T>::type>(s.count), e, cpu::Vec<T>{});
      sums += e;
      if (d_logits != nullptr) s.put(d_logits, e);
    });
    T const sum = cpu::sum<T>(sums);
    if (d_logits != nullptr) {
      for (Index v = 0; v < V; ++v) d_logits[v] *= scale / sum;
      d_logits[target] -= scale;
    }
    return {static_cast<double>(peak) + std::log(static_cast<double>(sum)) - static_cast<double>(own), best == target};
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
    in_blocks(cpu, x, w, targets, loss, [&](View<T, 2> logits, View<std::int32_t const, 1> of_block, Index, View<LossSum, 1> sum) {
      On<SoftmaxLoss, Cpu>::forward<T>(cpu, logits, of_block, {}, {}, sum);
    });
  }

  template <class T>
  static void backward(Cpu& cpu, View<T const, 2> x, View<T const, 2> w, View<std::int32_t const, 1> targets, View<double const, 1> scale,
                       View<T, 2> d_x, View<T, 2> d_w, View<LossSum, 1> loss) {
    for (Index v = 0; v < d_w.extent(0) && x.extent(0) == 0; ++v) std::fill_n(d_w.row(v), d_w.extent(1), T(0));
    in_blocks(cpu, x, w, targets, loss, [&](View<T, 2> d_logits, View<std::int32_t const, 1> of_block, Index first, View<LossSum, 1> sum) {
      On<SoftmaxLoss, Cpu>::forward<T>(cpu, d_logits, of_block, scale, d_logits, sum);
      View<T, 2> const d_rows{d_x.row(first), {d_logits.extent(0), d_x.extent(1)}, d_x.stride};
      View<T const, 2> const rows{x.row(first), {d_logits.extent(0), x.extent(1)}, x.stride};
      cpu::gemm<T>(cpu, operand(d_logits), operand(w), d_rows);
      cpu::gemm<T>(cpu, operand(d_logits).transposed(), operand(rows), d_w, first == 0 ? Into::overwrite : Into::add);
    });
  }

 private:
  // f(logits, targets, first row, sum) adds the loss of a block of rows to a sum; one block after the other.
  template <class T, class F>
  static void in_blocks(Cpu& cpu, View<T const, 2> x, View<T const, 2> w, View<std::int32_t const, 1> targets, View<LossSum, 1> loss, F f) {
    Index const N = x.extent(0), V = w.extent(0);
    Tensor<T, 2, Cpu> storage{cpu, {std::min(N, CrossEntropy::block_rows), V}};
    LossSum total;
    for (Index first = 0; first < N; first += CrossEntropy::block_rows) {
      Index const rows = std::min(N - first, CrossEntropy::block_rows);
      View<T, 2> const logits{out(storage).data, {rows, V}};
      cpu::gemm<T>(cpu, operand(View<T const, 2>{x.row(first), {rows, x.extent(1)}, x.stride}), operand(w).transposed(), logits);
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

namespace hybridattn::inline HYBRIDATTN_ABI {

template <GpuBackend B> struct On<CountTargets, B> {
  static void forward(B& gpu, View<std::int32_t const, 1> targets, View<Index, 1> count, View<double, 1> scale) {
    launch<gpu::CountTargetsOnce>(gpu, {}, {targets, count, scale});
  }
};

template <GpuBackend B> struct On<SoftmaxLoss, B> {
  template <class T>
  static void forward(B& gpu, View<T const, 2> logits, View<std::int32_t const, 1> targets, View<double const, 1> scale,
                      View<T, 2> d_logits, View<LossSum, 1> loss) {
    Tensor<LossSum, 1, B> rows{gpu, {logits.extent(0)}};
    launch<gpu::SoftmaxLossRow<T>>(gpu, {.x = logits.extent(0)}, {logits, targets, scale, d_logits, out(rows)});
    launch<gpu::AddRowLosses>(gpu, {}, {in(rows), loss});
  }
};

template <GpuBackend B> struct On<CrossEntropy, B> {
  template <class T>
  static void forward(B& gpu, View<T const, 2> x, View<T const, 2> w, View<std::int32_t const, 1> targets, View<LossSum, 1> loss) {
    in_blocks<T>(gpu, x, w, targets, {}, loss, [](View<T, 2>, View<T const, 2>, Index) {});
  }
  template <class T>
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

template <> struct On<Embedding, Cpu> {
  template <class T> static void forward(Cpu& cpu, View<std::int32_t const, 1> tokens, View<T const, 2> table, View<T, 2> y) {
    parallel_blocks(cpu, tokens.extent(0), cpu::sum_rows, [&](Index first, Index last) {
      for (Index n = first; n < last; ++n) std::copy_n(table.row(tokens(n)), table.extent(1), y.row(n));
    });
  }
  // Threads share out the columns, so that each sum runs over the tokens in order.
  template <class T> static void backward(Cpu& cpu, View<std::int32_t const, 1> tokens, View<T const, 2> d_y, View<T, 2> d_table,
                                          Into into) {
    parallel_blocks(cpu, d_table.extent(1), 64, [&](Index first, Index last) {
      for (Index v = 0; v < d_table.extent(0) && into == Into::overwrite; ++v) std::fill_n(d_table.row(v) + first, last - first, T(0));
      for (Index n = 0; n < tokens.extent(0); ++n) axpy(T(1), d_y.row(n) + first, d_table.row(tokens(n)) + first, last - first);
    });
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
#endif

// ==== hybridattn/ops/embedding/kernels.hpp
// Embedding as kernels.
#ifndef HYBRIDATTN_OPS_EMBEDDING_KERNELS_HPP
#define HYBRIDATTN_OPS_EMBEDDING_KERNELS_HPP

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

template <GpuBackend B> struct On<Embedding, B> {
  template <class T> static void forward(B& gpu, View<std::int32_t const, 1> tokens, View<T const, 2> table, View<T, 2> y) {
    using Forward = gpu::EmbeddingForward<T>;
    launch<Forward>(gpu, {.x = y.extent(0), .y = ceil_div(y.extent(1), Forward::threads)}, {tokens, table, y});
  }
  template <class T>
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

template <GpuBackend B> struct On<Swiglu, B> {
  template <class T> static void forward(B& gpu, View<T const, 1> gate, View<T const, 1> up, View<T, 1> y) {
    for_each(gpu, y.count(), gpu::SwigluForward<T>{gate, up, y});
  }
  template <class T>
  static void backward(B& gpu, View<T const, 1> gate, View<T const, 1> up, View<T const, 1> d_y, View<T, 1> d_gate, View<T, 1> d_up) {
    for_each(gpu, d_y.count(), gpu::SwigluBackward<T>{gate, up, d_y, d_gate, d_up});
  }
};

template <GpuBackend B> struct On<SigmoidGate, B> {
  template <class T> static void forward(B& gpu, View<T const, 1> x, View<T const, 1> z, View<T, 1> y) {
    for_each(gpu, y.count(), gpu::SigmoidGateForward<T>{x, z, y});
  }
  template <class T>
  static void backward(B& gpu, View<T const, 1> x, View<T const, 1> z, View<T const, 1> d_y, View<T, 1> d_x, View<T, 1> d_z) {
    for_each(gpu, d_y.count(), gpu::SigmoidGateBackward<T>{x, z, d_y, d_x, d_z});
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
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
template <> struct On<GdnGate, Cpu> {
  template <class T>
  static void forward(Cpu& cpu, T range, View<T const, 2> a, View<T const, 2> b, View<T const, 1> a_log, View<T const, 1> dt_bias,
                      View<T, 2> g, View<T, 2> beta) {
    parallel_blocks(cpu, a.extent(0), cpu::sum_rows, [&](Index first, Index last) {
      for (Index n = first; n < last; ++n)
        for (Index h = 0; h < a.extent(1); ++h) {
          g(n, h) = -std::exp(a_log(h)) * softplus(a(n, h) + dt_bias(h));
          beta(n, h) = range * sigmoid(b(n, h));
        }
    });
  }

  template <class T>
  static void backward(Cpu& cpu, T range, View<T const, 2> a, View<T const, 2> b, View<T const, 1> a_log, View<T const, 1> dt_bias,
                       View<T const, 2> d_g, View<T const, 2> d_beta, View<T, 2> d_a, View<T, 2> d_b, View<T, 1> d_a_log,
                       View<T, 1> d_dt_bias) {
    cpu::sum_over_rows<T>(cpu, a.extent(0), d_a_log, [&](Index n, T* sum) {
      for (Index h = 0; h < a.extent(1); ++h) {
        T const rate = -std::exp(a_log(h)), shifted = a(n, h) + dt_bias(h), open = sigmoid(b(n, h));
        d_a(n, h) = rate * sigmoid(shifted) * d_g(n, h);
        d_b(n, h) = range * open * (T(1) - open) * d_beta(n, h);
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

template <GpuBackend B> struct On<GdnGate, B> {
  template <class T>
  static void forward(B& gpu, T range, View<T const, 2> a, View<T const, 2> b, View<T const, 1> a_log, View<T const, 1> dt_bias,
                      View<T, 2> g, View<T, 2> beta) {
    for_each(gpu, a.count(), gpu::GdnGateForward<T>{range, a, b, a_log, dt_bias, g, beta});
  }

  template <class T>
  static void backward(B& gpu, T range, View<T const, 2> a, View<T const, 2> b, View<T const, 1> a_log, View<T const, 1> dt_bias,
                       View<T const, 2> d_g, View<T const, 2> d_beta, View<T, 2> d_a, View<T, 2> d_b, View<T, 1> d_a_log,
                       View<T, 1> d_dt_bias) {
    using Backward = gpu::GdnGateBackward<T>;
    Index const blocks = gpu::row_blocks(a.extent(0)), heads = a.extent(1);
    Tensor<T, 2, B> rate_parts{gpu, {blocks, heads}}, bias_parts{gpu, {blocks, heads}};
    launch<Backward>(gpu, {.x = blocks, .y = ceil_div(heads, Backward::threads)},
                     {range, a, b, a_log, dt_bias, d_g, d_beta, d_a, d_b, out(rate_parts), out(bias_parts)});
    for_each(gpu, heads, gpu::SumParts<T>{in(rate_parts), d_a_log});
    for_each(gpu, heads, gpu::SumParts<T>{in(bias_parts), d_dt_bias});
  }
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

// ==== hybridattn/ops/grouped_linear/cpu.hpp
#ifndef HYBRIDATTN_OPS_GROUPED_LINEAR_CPU_HPP
#define HYBRIDATTN_OPS_GROUPED_LINEAR_CPU_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

template <> struct On<GroupedLinear, Cpu> {
  using Offsets = View<std::int32_t const, 1>;

  template <class T> static void forward(Cpu& cpu, Offsets offsets, View<T const, 2> x, View<T const, 3> w, View<T, 2> y) {
    cpu::Scratch<cpu::Product<T>> const products{cpu, most_blocks(w.extent(0), y.extent(0))};
    cpu::Product<T>* next = products.data();
    for_each_block(offsets, [&](Index e, Index first, Index last) {
      *next++ = {operand(rows(x, first, last)), operand(of_expert(w, e)).transposed(), rows(y, first, last)};
    });
    cpu::gemm_each(cpu, products.data(), next, Into::overwrite);
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
    cpu::Scratch<cpu::Product<T>> const products{cpu, most_blocks(w.extent(0), d_y.extent(0))};
    cpu::Product<T>* next = products.data();
    for_each_block(offsets, [&](Index e, Index first, Index last) {
      *next++ = {operand(rows(d_y, first, last)), operand(of_expert(w, e)), rows(d_x, first, last)};
    });
    cpu::gemm_each(cpu, products.data(), next, into);
  }
  template <class T>
  static void write_d_w(Cpu& cpu, Offsets offsets, View<T const, 2> x, View<T const, 2> d_y, View<T, 3> d_w) {
    Index const E = d_w.extent(0), F = d_w.extent(1);
    cpu::Scratch<cpu::Product<T>> const products{cpu, std::min(E, x.extent(0)) * ceil_div(F, block_rows)};
    cpu::Product<T>* next = products.data();
    for (Index e = 0; e < E; ++e) {
      if (is_idle(offsets, e)) continue;
      auto const its_x = operand(rows(x, offsets(e), offsets(e + 1))), its_d_y = operand(rows(d_y, offsets(e), offsets(e + 1)));
      for (Index first = 0; first < F; first += block_rows) {
        Index const last = std::min(F, first + block_rows);
        *next++ = {its_d_y.transposed().row_range(first, last), its_x, rows(of_expert(d_w, e), first, last)};
      }
    }
    cpu::gemm_each(cpu, products.data(), next, Into::overwrite);
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
HYBRIDATTN_HD Index first_tile(ExpertOffsets offsets, Index expert, int size) { return offsets(expert) / size + expert; }
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

template <GpuBackend B> struct On<GroupedLinear, B> {
  using Offsets = View<std::int32_t const, 1>;

  template <class T> static void forward(B& gpu, Offsets offsets, View<T const, 2> x, View<T const, 3> w, View<T, 2> y) {
    multiply_rows<T>(gpu, offsets, x, w, y, true, Into::overwrite);
  }
  template <class T>
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

template <> struct On<L2Norm, Cpu> {
  template <class T> static void forward(Cpu& cpu, View<T const, 2> x, View<T, 2> y) {
    Index const C = x.extent(1);
    parallel_blocks(cpu, x.extent(0), cpu::sum_rows, [&](Index first, Index last) {
      for (Index n = first; n < last; ++n) {
        T const *row = x.row(n), rnorm = inverse_norm(row, C);
        cpu::for_each_vector<T>(0, C, [&](cpu::Slot<T> s) HYBRIDATTN_INLINE_LAMBDA { s.put(y.row(n), s.get(row) * rnorm); });
      }
    });
  }

  template <class T> static void backward(Cpu& cpu, View<T const, 2> x, View<T const, 2> d_y, View<T, 2> d_x) {
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

template <GpuBackend B> struct On<L2Norm, B> {
  template <class T> static void forward(B& gpu, View<T const, 2> x, View<T, 2> y) {
    launch<gpu::L2NormForward<T>>(gpu, {.x = ceil_div(x.extent(0), gpu::L2NormForward<T>::threads / 32)}, {x, y});
  }
  template <class T> static void backward(B& gpu, View<T const, 2> x, View<T const, 2> d_y, View<T, 2> d_x) {
    launch<gpu::L2NormBackward<T>>(gpu, {.x = ceil_div(x.extent(0), gpu::L2NormBackward<T>::threads / 32)}, {x, d_y, d_x});
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
template <> struct On<LayerNorm, Cpu> {
  template <class T> static void forward(Cpu& cpu, double eps, View<T const, 2> x, View<T const, 1> w, View<T const, 1> b, View<T, 2> y) {
    parallel_blocks(cpu, x.extent(0), cpu::sum_rows, [&](Index first, Index last) {
      for (Index n = first; n < last; ++n) {
        auto const [mean, rstd] = moments(x.row(n), x.extent(1), eps);
        for (Index c = 0; c < x.extent(1); ++c) y(n, c) = (x(n, c) - mean) * rstd * w(c) + b(c);
      }
    });
  }

  template <class T>
  static void backward(Cpu& cpu, double eps, View<T const, 2> x, View<T const, 1> w, View<T const, 2> d_y, View<T, 2> d_x, View<T, 1> d_w,
                       View<T, 1> d_b) {
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

template <GpuBackend B> struct On<LayerNorm, B> {
  template <class T> static void forward(B& gpu, double eps, View<T const, 2> x, View<T const, 1> w, View<T const, 1> b, View<T, 2> y) {
    using Forward = gpu::LayerNormForward<T>;
    launch<Forward>(gpu, {.x = ceil_div(x.extent(0), Forward::threads / 32)}, {x, w, b, y, static_cast<T>(eps)});
  }
  template <class T>
  static void backward(B& gpu, double eps, View<T const, 2> x, View<T const, 1> w, View<T const, 2> d_y, View<T, 2> d_x, View<T, 1> d_w,
                       View<T, 1> d_b) {
    Index const blocks = gpu::row_blocks(x.extent(0)), C = x.extent(1);
    Tensor<T, 2, B> w_parts{gpu, {blocks, C}}, b_parts{gpu, {blocks, C}};
    launch<gpu::LayerNormBackward<T>>(gpu, {.x = blocks}, {x, w, d_y, d_x, out(w_parts), out(b_parts), static_cast<T>(eps)});
    for_each(gpu, C, gpu::SumParts<T>{in(w_parts), d_w});
    for_each(gpu, C, gpu::SumParts<T>{in(b_parts), d_b});
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
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

template <> struct On<Linear, Cpu> {
  template <class T> static void forward(Cpu& cpu, View<T const, 2> x, View<T const, 2> w, View<T, 2> y) {
    cpu::gemm<T>(cpu, operand(x), operand(w).transposed(), y);
  }
  template <class T>
  static void backward(Cpu& cpu, View<T const, 2> x, View<T const, 2> w, View<T const, 2> d_y, View<T, 2> d_x, View<T, 2> d_w, Into into) {
    if (!d_x.empty()) cpu::gemm<T>(cpu, operand(d_y), operand(w), d_x, into);
    if (!d_w.empty()) cpu::gemm<T>(cpu, operand(d_y).transposed(), operand(x), d_w);
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
#endif

// ==== hybridattn/ops/linear/gpu.hpp
#ifndef HYBRIDATTN_OPS_LINEAR_GPU_HPP
#define HYBRIDATTN_OPS_LINEAR_GPU_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

template <GpuBackend B> struct On<Linear, B> {
  template <class T> static void forward(B& gpu, View<T const, 2> x, View<T const, 2> w, View<T, 2> y) {
    gpu::gemm<T>(gpu, operand(x), operand(w).transposed(), y);
  }
  template <class T>
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

template <> struct On<Route, Cpu> {
  template <class T>
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

  template <class T>
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

template <> struct On<Distribute, Cpu> {
  template <class T> static void forward(Cpu& cpu, View<T const, 2> x, View<std::int32_t const, 2> places, View<T, 2> rows) {
    parallel_blocks(cpu, x.extent(0), cpu::sum_rows, [&](Index first, Index last) {
      for (Index n = first; n < last; ++n)
        for (Index j = 0; j < places.extent(1); ++j) std::copy_n(x.row(n), x.extent(1), rows.row(places(n, j)));
    });
  }
  template <class T> static void backward(Cpu& cpu, View<std::int32_t const, 2> places, View<T const, 2> d_rows, View<T, 2> d_x,
                                          Into into) {
    parallel_blocks(cpu, d_x.extent(0), cpu::sum_rows, [&](Index first, Index last) {
      for (Index n = first; n < last; ++n) {
        if (into == Into::overwrite) std::fill_n(d_x.row(n), d_x.extent(1), T(0));
        for (Index j = 0; j < places.extent(1); ++j) axpy(T(1), d_rows.row(places(n, j)), d_x.row(n), d_x.extent(1));
      }
    });
  }
};

template <> struct On<Combine, Cpu> {
  template <class T>
  static void forward(Cpu& cpu, View<T const, 2> rows, View<T const, 2> weights, View<std::int32_t const, 2> places, View<T, 2> y) {
    parallel_blocks(cpu, y.extent(0), cpu::sum_rows, [&](Index first, Index last) {
      for (Index n = first; n < last; ++n) {
        std::fill_n(y.row(n), y.extent(1), T(0));
        for (Index j = 0; j < places.extent(1); ++j) axpy(weights(n, j), rows.row(places(n, j)), y.row(n), y.extent(1));
      }
    });
  }
  template <class T>
  static void backward(Cpu& cpu, View<T const, 2> rows, View<T const, 2> weights, View<std::int32_t const, 2> places, View<T const, 2> d_y,
                       View<T, 2> d_rows, View<T, 2> d_weights) {
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

template <> struct On<AddGated, Cpu> {
  template <class T> static void forward(Cpu& cpu, View<T const, 2> x, View<T const, 2> logit, View<T, 2> y) {
    parallel_blocks(cpu, y.extent(0), cpu::sum_rows, [&](Index first, Index last) {
      for (Index n = first; n < last; ++n) axpy(sigmoid(logit(n, 0)), x.row(n), y.row(n), y.extent(1));
    });
  }
  template <class T>
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

template <GpuBackend B> struct On<Route, B> {
  template <class T>
  static void forward(B& gpu, Route::Options o, View<T const, 2> logits, View<T, 2> probabilities, View<T, 2> weights,
                      View<std::int32_t, 2> experts) {
    for_each_row(gpu, logits.extent(0), gpu::RouteRow<T>{o, logits, probabilities, weights, experts});
  }
  template <class T>
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

template <GpuBackend B> struct On<Distribute, B> {
  template <class T> static void forward(B& gpu, View<T const, 2> x, View<std::int32_t const, 2> places, View<T, 2> rows) {
    for_each_row(gpu, x.extent(0), gpu::DistributeRow<T>{x, places, rows});
  }
  template <class T> static void backward(B& gpu, View<std::int32_t const, 2> places, View<T const, 2> d_rows, View<T, 2> d_x, Into into) {
    for_each_row(gpu, d_x.extent(0), gpu::CollectRow<T>{places, d_rows, d_x, into});
  }
};

template <GpuBackend B> struct On<Combine, B> {
  template <class T>
  static void forward(B& gpu, View<T const, 2> rows, View<T const, 2> weights, View<std::int32_t const, 2> places, View<T, 2> y) {
    for_each_row(gpu, y.extent(0), gpu::CombineRow<T>{rows, weights, places, y});
  }
  template <class T>
  static void backward(B& gpu, View<T const, 2> rows, View<T const, 2> weights, View<std::int32_t const, 2> places, View<T const, 2> d_y,
                       View<T, 2> d_rows, View<T, 2> d_weights) {
    for_each_row(gpu, places.count(), gpu::CombineChoiceGradients<T>{rows, weights, places, d_y, d_rows, d_weights});
  }
};

template <GpuBackend B> struct On<AddGated, B> {
  template <class T> static void forward(B& gpu, View<T const, 2> x, View<T const, 2> logit, View<T, 2> y) {
    for_each_row(gpu, y.extent(0), gpu::AddGatedRow<T>{x, logit, y});
  }
  template <class T>
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
template <class T, GpuBackend B> void rms_norm_gradients(B& gpu, RmsNormGradients<T> p, View<T, 1> d_w) {
  Tensor<T, 2, B> parts{gpu, {row_blocks(p.forward.x.extent(0)), d_w.extent(0)}};
  p.d_w = out(parts);
  launch<RmsNormBackward<T>>(gpu, {.x = parts.shape()[0]}, p);
  for_each(gpu, d_w.extent(0), SumParts<T>{in(parts), d_w});
}
template <class T> T shift_of(RmsNorm::Options const& o) { return o.weight == NormWeight::zero_centred ? T(1) : T(0); }

}  // namespace gpu

template <GpuBackend B> struct On<RmsNorm, B> {
  template <class T> static void forward(B& gpu, RmsNorm::Options o, View<T const, 2> x, View<T const, 1> w, View<T, 2> y) {
    gpu::rms_norm<T>(gpu, {x, {}, w, y, gpu::shift_of<T>(o), static_cast<T>(o.eps)});
  }
  template <class T>
  static void backward(B& gpu, RmsNorm::Options o, View<T const, 2> x, View<T const, 1> w, View<T const, 2> d_y, View<T, 2> d_x,
                       View<T, 1> d_w, Into into) {
    gpu::rms_norm_gradients<T>(gpu, {{x, {}, w, {}, gpu::shift_of<T>(o), static_cast<T>(o.eps)}, d_y, d_x, {}, {}, into}, d_w);
  }
};

template <GpuBackend B> struct On<GatedRmsNorm, B> {
  template <class T> static void forward(B& gpu, double eps, View<T const, 2> x, View<T const, 2> z, View<T const, 1> w, View<T, 2> y) {
    gpu::rms_norm<T>(gpu, {x, z, w, y, T(0), static_cast<T>(eps)});
  }
  template <class T>
  static void backward(B& gpu, double eps, View<T const, 2> x, View<T const, 2> z, View<T const, 1> w, View<T const, 2> d_y, View<T, 2> d_x,
                       View<T, 2> d_z, View<T, 1> d_w) {
    gpu::rms_norm_gradients<T>(gpu, {{x, z, w, {}, T(0), static_cast<T>(eps)}, d_y, d_x, d_z, {}, Into::overwrite}, d_w);
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/ops/rope/kernels.hpp
// Rotary positions as kernels. A warp has a row of angles, or a head of a token: lane l has the pairs l, l + 32, ...
#ifndef HYBRIDATTN_OPS_ROPE_KERNELS_HPP
#define HYBRIDATTN_OPS_ROPE_KERNELS_HPP

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

template <GpuBackend B> struct On<Rope, B> {
  template <class T>
  static void forward(B& gpu, Rope::Options o, View<T const, 3> angles, View<std::int32_t const, 1> positions, View<T const, 3> x,
                      View<T, 3> y) {
    turn<T>(gpu, o, {angles, positions, x, y, o.rotary_dim / 2, o.interleaved, T(1)});
  }
  template <class T>
  static void backward(B& gpu, Rope::Options o, View<T const, 3> angles, View<std::int32_t const, 1> positions, View<T const, 3> d_y,
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

template <> struct On<TopK, Cpu> {
  template <class T> static void forward(Cpu& cpu, View<T const, 2> scores, View<std::int32_t, 2> indices) {
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

// ==== hybridattn/ops/top_k/kernels.hpp
// TopK as a kernel. A block has a row. Scores become unsigned integers in the same order, their keys. The block finds the k-th largest key
// bit by bit, from the highest bit on: a bit is set where at least k keys are as large as the bits so far. Each bit counts the row once.
#ifndef HYBRIDATTN_OPS_TOP_K_KERNELS_HPP
#define HYBRIDATTN_OPS_TOP_K_KERNELS_HPP

namespace hybridattn::inline HYBRIDATTN_ABI::gpu {

// Positive numbers are in the order of their bits, negative ones in the reversed order. Adding 0 makes +0 of -0. The key of a NaN is 0.
template <class T> HYBRIDATTN_DEVICE auto ordered_key(T x) {
  auto const bits = simt::bits_of(x + T(0));
  using Key = std::remove_const_t<decltype(bits)>;
  constexpr Key sign = Key{1} << (8 * sizeof(Key) - 1);
  if (x != x) return Key{0};
  return (bits & sign) != 0 ? static_cast<Key>(~bits) : static_cast<Key>(bits | sign);
}

template <class T> struct SelectTopK {
  static constexpr int threads = 128, warps = threads / 32;
  struct Params {
    View<T const, 2> scores;
    View<std::int32_t, 2> indices;
  };
  struct Shared {
    int of_warps[warps];
  };
  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    Index const row = simt::block_x(), k = p.indices.extent(1);
    int const chosen = static_cast<int>(simt::smaller(k, p.scores.extent(1)));
    if (chosen > 0) write_chosen(shared, p, chosen, kth_largest(shared, p, chosen));
    for (Index i = chosen + simt::thread_id(); i < k; i += threads) p.indices(row, i) = -1;
  }

 private:
  using Key = decltype(simt::bits_of(T()));

  static HYBRIDATTN_DEVICE Key key_of(Params const& p, Index i) { return ordered_key(p.scores(simt::block_x(), i)); }
  // How many keys of the row are at least `least`.
  static HYBRIDATTN_DEVICE int count_from(Shared& shared, Params const& p, Key least) {
    int count = 0;
    for (Index i = simt::thread_id(); i < p.scores.extent(1); i += threads) count += key_of(p, i) >= least;
    return sum_block(shared.of_warps, count);
  }
  // The k-th largest key, or a smaller number that exactly k keys reach.
  static HYBRIDATTN_DEVICE Key kth_largest(Shared& shared, Params const& p, int k) {
    Key found = 0;
    for (Key bit = Key{1} << (8 * sizeof(Key) - 1); bit != 0; bit >>= 1) {
      int const count = count_from(shared, p, found | bit);
      if (count >= k) found |= bit;
      if (count == k) break;
    }
    return found;
  }
  // The indices of the keys above `least`, and of the first ones equal to it, k in all. Each turn looks at a key for each thread.
  static HYBRIDATTN_DEVICE void write_chosen(Shared& shared, Params const& p, int k, Key least) {
    int const most_ties = k - count_from(shared, p, least + 1);   // the largest key is infinity's, so least + 1 does not overflow
    int above = 0, ties = 0;   // in earlier turns
    for (Index first = 0; first < p.scores.extent(1); first += threads) {
      Index const i = first + simt::thread_id();
      bool const inside = i < p.scores.extent(1), is_above = inside && key_of(p, i) > least, is_tie = inside && key_of(p, i) == least;
      Earlier const a = count_earlier(shared.of_warps, is_above), t = count_earlier(shared.of_warps, is_tie);
      int const place = above + a.before + simt::smaller(ties + t.before, most_ties);
      if (is_above || (is_tie && ties + t.before < most_ties)) p.indices(simt::block_x(), place) = static_cast<std::int32_t>(i);
      above += a.all;
      ties += t.all;
    }
  }
  // How many threads of the block vote true: those before this thread, and all.
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
    simt::sync_block();   // of_warps may be used again
    return result;
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::gpu
#endif

// ==== hybridattn/ops/top_k/gpu.hpp
#ifndef HYBRIDATTN_OPS_TOP_K_GPU_HPP
#define HYBRIDATTN_OPS_TOP_K_GPU_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

template <GpuBackend B> struct On<TopK, B> {
  template <class T> static void forward(B& gpu, View<T const, 2> scores, View<std::int32_t, 2> indices) {
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

// ==== hybridattn/emulator.hpp
// The emulator of a GPU, and every operation and policy on it.
#ifndef HYBRIDATTN_EMULATOR_HPP
#define HYBRIDATTN_EMULATOR_HPP

#endif
