// The shared memory of a block. It begins as NaN in every type of number, and red zones stand before and behind it.
#ifndef HYBRIDATTN_BACKEND_EMULATOR_SHARED_MEMORY_HPP
#define HYBRIDATTN_BACKEND_EMULATOR_SHARED_MEMORY_HPP

#include <hybridattn/core/config.hpp>
#include <hybridattn/core/sizes.hpp>

#include <algorithm>
#include <cstddef>
#include <memory>
#include <new>
#include <vector>

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
