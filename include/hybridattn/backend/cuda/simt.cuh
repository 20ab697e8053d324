// The words of kernels on a GPU; backend/gpu/simt.hpp lists and explains them.
#ifndef HYBRIDATTN_BACKEND_CUDA_SIMT_CUH
#define HYBRIDATTN_BACKEND_CUDA_SIMT_CUH

#include <hybridattn/backend/gpu/call_site.hpp>
#include <hybridattn/core/sizes.hpp>

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
