// Macros that say which compiler this is and what it can do. Only this header asks the compiler.
#ifndef HYBRIDATTN_CORE_CONFIG_HPP
#define HYBRIDATTN_CORE_CONFIG_HPP

#include <version>   // which standard library it is

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
