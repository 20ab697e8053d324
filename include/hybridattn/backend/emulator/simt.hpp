// The words of kernels on the emulator; backend/gpu/simt.hpp lists and explains them.
#ifndef HYBRIDATTN_BACKEND_EMULATOR_SIMT_HPP
#define HYBRIDATTN_BACKEND_EMULATOR_SIMT_HPP

#include <hybridattn/backend/emulator/engine.hpp>

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
