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

#include <hybridattn/backend/gpu/call_site.hpp>
#include <hybridattn/core/math.hpp>

#include <cstdint>
#include <cstring>

#if HYBRIDATTN_CUDA
#include <hybridattn/backend/cuda/simt.cuh>
#else
#include <hybridattn/backend/emulator/simt.hpp>
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
