// Machines: where memory lives, and how an operation is computed there.
#ifndef HYBRIDATTN_BACKEND_BACKEND_HPP
#define HYBRIDATTN_BACKEND_BACKEND_HPP

#include <hybridattn/core/config.hpp>

#include <concepts>
#include <cstddef>
#include <map>
#include <vector>

namespace hybridattn::inline HYBRIDATTN_ABI {

// Freed blocks wait here for the next request of their size, so a training step after the first one allocates nothing.
class Pool {
 public:
  template <class Allocate> void* take(std::size_t bytes, Allocate allocate) {
    auto& blocks = free_[bytes];
    void* block = nullptr;
    if (blocks.empty()) {
      block = allocate(bytes);
      ++allocations_;
      blocks.reserve(++taken_[bytes]);   // so that giving back never allocates, nor throws
    } else {
      block = blocks.back();
      blocks.pop_back();
    }
    in_use_ += bytes;
    peak_ = in_use_ > peak_ ? in_use_ : peak_;
    return block;
  }
  void give(void* block, std::size_t bytes) noexcept {
    in_use_ -= bytes;
    free_.find(bytes)->second.push_back(block);
  }
  template <class Release> void clear(Release release) {
    for (auto& [bytes, blocks] : free_)
      for (void* block : blocks) release(block);
    free_.clear();
    taken_.clear();
  }
  std::size_t in_use() const { return in_use_; }
  std::size_t peak() const { return peak_; }
  std::size_t allocations() const { return allocations_; }
  // From now on peak() counts afresh.
  void reset_peak() { peak_ = in_use_; }

 private:
  std::map<std::size_t, std::vector<void*>> free_;
  std::map<std::size_t, std::size_t> taken_;
  std::size_t in_use_ = 0, peak_ = 0, allocations_ = 0;
};

// What a machine offers to the layers above: memory, and copies from and to the host.
template <class B>
concept Backend = requires(B b, void* to, void const* from, std::size_t bytes) {
  { b.take(bytes) } -> std::same_as<void*>;
  b.give(to, bytes);
  b.upload(to, from, bytes);
  b.download(to, from, bytes);
  { b.pool() } -> std::same_as<Pool&>;
};

// A backend that wraps another one names it (`using Inner = Cpu;`) and has run(f), which calls f(inner).
template <class B>
concept Wrapper = requires { typename B::Inner; };

// How one machine computes one operation: `forward` and `backward`, always both, always in this argument order:
//   On<Op, B>::forward (backend, config, sequences, inputs, outputs, saved)
//   On<Op, B>::backward(backend, config, sequences, inputs, outputs, saved, d_outputs, d_inputs)
// with whatever an operation has no use for left out. A policy that decodes has `extend` besides, see attention/policy.hpp.
// A pair without a specialisation has none of them, unless the backend wraps one that does.
template <class Op, class B> struct On {};
template <class Op, Wrapper B> struct On<Op, B> {
  template <class Inner = typename B::Inner, class... Args>
  static auto forward(B& backend, Args&&... args) -> decltype(On<Op, Inner>::forward(std::declval<Inner&>(), args...)) {
    return backend.run([&](Inner& inner) { return On<Op, Inner>::forward(inner, args...); });
  }
  template <class Inner = typename B::Inner, class... Args>
  static auto backward(B& backend, Args&&... args) -> decltype(On<Op, Inner>::backward(std::declval<Inner&>(), args...)) {
    return backend.run([&](Inner& inner) { return On<Op, Inner>::backward(inner, args...); });
  }
  template <class Inner = typename B::Inner, class... Args>
  static auto extend(B& backend, Args&&... args) -> decltype(On<Op, Inner>::extend(std::declval<Inner&>(), args...)) {
    return backend.run([&](Inner& inner) { return On<Op, Inner>::extend(inner, args...); });
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
