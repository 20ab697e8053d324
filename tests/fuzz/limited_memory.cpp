// A machine with little memory: one block of more than 64 MB cannot be had. So sizes out of hostile inputs meet std::bad_alloc at
// once, which the library must turn into an Error; under the address sanitizer's own `new` the process would end instead.
#include <cstdlib>
#include <new>

namespace {

constexpr std::size_t largest = std::size_t{64} << 20;

void* take_or_null(std::size_t size, std::size_t alignment) noexcept {
  void* memory = nullptr;
  bool const taken =
      size <= largest && ::posix_memalign(&memory, alignment < sizeof(void*) ? sizeof(void*) : alignment, size == 0 ? 1 : size) == 0;
  return taken ? memory : nullptr;
}
void* take(std::size_t size, std::size_t alignment) {
  if (void* const memory = take_or_null(size, alignment)) return memory;
  throw std::bad_alloc();
}

constexpr std::size_t usual = __STDCPP_DEFAULT_NEW_ALIGNMENT__;

}  // namespace

void* operator new(std::size_t size) { return take(size, usual); }
void* operator new[](std::size_t size) { return take(size, usual); }
void* operator new(std::size_t size, std::nothrow_t const&) noexcept { return take_or_null(size, usual); }
void* operator new[](std::size_t size, std::nothrow_t const&) noexcept { return take_or_null(size, usual); }
void* operator new(std::size_t size, std::align_val_t alignment) { return take(size, static_cast<std::size_t>(alignment)); }
void* operator new[](std::size_t size, std::align_val_t alignment) { return take(size, static_cast<std::size_t>(alignment)); }
void* operator new(std::size_t size, std::align_val_t alignment, std::nothrow_t const&) noexcept {
  return take_or_null(size, static_cast<std::size_t>(alignment));
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::nothrow_t const&) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t, std::nothrow_t const&) noexcept { std::free(memory); }
