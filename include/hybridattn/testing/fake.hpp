// A backend that stands in for a GPU. Its memory is memory of the host, but can be accessed only while an operation or a copy runs. Host
// code that accesses it at another time crashes, as it would on a GPU, so tests find such code on a machine without a GPU.
#ifndef HYBRIDATTN_TESTING_FAKE_HPP
#define HYBRIDATTN_TESTING_FAKE_HPP

#include <hybridattn/backend/cpu/cpu.hpp>
#include <hybridattn/backend/hidden_memory.hpp>
#include <hybridattn/tensor/roles.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI::testing {

// Operations run on an inner Cpu, which has scratch memory of its own.
class Fake {
 public:
  using Inner = Cpu;

  explicit Fake(int threads = 0) : cpu_(threads) {}

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
    check(owns(to) && owns(from), "Fake: a copy on the device was given memory of the host");
    HiddenMemory::Open const open{memory_};
    std::memcpy(to, from, bytes);
  }
  void fill(void* to, std::byte value, std::size_t bytes) {
    check(owns(to), "Fake: a fill was given memory of the host");
    HiddenMemory::Open const open{memory_};
    std::memset(to, std::to_integer<int>(value), bytes);
  }
  void synchronise() {}
  Pool& pool() { return pool_; }

  bool owns(void const* memory) const { return memory_.owns(memory); }
  // Throws if an argument of an operation, a view or a group of views, is in memory of the host, because a device could not read it.
  template <class T, int Rank> void arrives(View<T, Rank> const& view) const {
    check(view.count() == 0 || owns(view.data), "Fake: an operation was given memory of the host");
  }
  template <class Argument> void arrives(Argument const& argument) const {
    if constexpr (FieldGroup<Argument>) zip([&](Path const&, auto const& view) { arrives(view); }, argument);
  }

  // Calls f(inner). Inside this call the memory can be accessed.
  template <class F> auto run(F&& f) {
    HiddenMemory::Open const open{memory_};
    return f(cpu_);
  }

 private:
  Cpu cpu_;
  HiddenMemory memory_{"Fake"};
  Pool pool_;
};
static_assert(Backend<Fake> && Wrapper<Fake>);

}  // namespace hybridattn::inline HYBRIDATTN_ABI::testing
#endif
