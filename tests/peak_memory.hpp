// Counts in operator new how much memory a piece of a program takes at once. Include it in one source file of a program.
#ifndef HYBRIDATTN_TESTS_PEAK_MEMORY_HPP
#define HYBRIDATTN_TESTS_PEAK_MEMORY_HPP

#include <malloc.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <new>

namespace memory {

inline std::atomic<std::ptrdiff_t> in_use = 0, peak = 0, takes = 0;
inline std::size_t largest = ~std::size_t{0};   // the largest block that operator new gives

inline void* take(std::size_t bytes, std::size_t alignment) {
  if (bytes > largest) throw std::bad_alloc();
  void* const block = std::aligned_alloc(alignment, (std::max<std::size_t>(bytes, 1) + alignment - 1) / alignment * alignment);
  if (block == nullptr) throw std::bad_alloc();
  ++takes;
  auto const now = in_use += static_cast<std::ptrdiff_t>(::malloc_usable_size(block));
  for (auto before = peak.load(); before < now && !peak.compare_exchange_weak(before, now);) {
  }
  return block;
}
[[gnu::noinline]] inline void give(void* block) {
  if (block != nullptr) in_use -= static_cast<std::ptrdiff_t>(::malloc_usable_size(block));
  std::free(block);
}

struct Use {
  std::ptrdiff_t bytes = 0, takes = 0;   // the most bytes at once, beyond those before; the number of allocations
};
template <class F> Use of(F f) {
  auto const bytes_before = in_use.load(), takes_before = takes.load();
  peak = bytes_before;
  f();
  return {peak - bytes_before, takes - takes_before};
}

}  // namespace memory

void* operator new(std::size_t bytes) { return memory::take(bytes, alignof(std::max_align_t)); }
void* operator new(std::size_t bytes, std::align_val_t alignment) { return memory::take(bytes, static_cast<std::size_t>(alignment)); }
void* operator new(std::size_t bytes, std::nothrow_t const&) noexcept {
  try {
    return memory::take(bytes, alignof(std::max_align_t));
  } catch (std::bad_alloc const&) {
    return nullptr;
  }
}
void operator delete(void* block) noexcept { memory::give(block); }
void operator delete(void* block, std::nothrow_t const&) noexcept { memory::give(block); }
void operator delete(void* block, std::size_t) noexcept { memory::give(block); }
void operator delete(void* block, std::align_val_t) noexcept { memory::give(block); }
void operator delete(void* block, std::size_t, std::align_val_t) noexcept { memory::give(block); }

#endif
