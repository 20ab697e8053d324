// Memory of the host that stands for a device's memory: code outside operations and copies that reads or writes it ends the program.
#ifndef HYBRIDATTN_BACKEND_HIDDEN_MEMORY_HPP
#define HYBRIDATTN_BACKEND_HIDDEN_MEMORY_HPP

#include <hybridattn/core/memory.hpp>

#include <sys/mman.h>

#include <utility>

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
