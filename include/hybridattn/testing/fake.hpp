// A device without a device: its memory is the host's, but unreadable except while an operation or a copy runs. Host code
// that touches what only a kernel may touch dies here, on any machine, rather than on somebody's GPU.
#ifndef HYBRIDATTN_TESTING_FAKE_HPP
#define HYBRIDATTN_TESTING_FAKE_HPP

#include <hybridattn/backend/cpu/cpu.hpp>
#include <hybridattn/tensor/roles.hpp>

#include <sys/mman.h>

#include <utility>

namespace hybridattn::inline HYBRIDATTN_ABI::testing {

// Operations run on the Cpu inside, whose scratch memory is its own.
class Fake {
 public:
  using Inner = Cpu;

  explicit Fake(int threads = 0) : cpu_(threads) {
    void* const memory = mmap(nullptr, capacity, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    check(memory != MAP_FAILED, "Fake: the system refuses ", capacity, " bytes of address space");
    memory_ = static_cast<char*>(memory);
  }
  Fake(Fake const&) = delete;
  Fake& operator=(Fake const&) = delete;
  ~Fake() { munmap(memory_, capacity); }

  void* take(std::size_t bytes) {
    return pool_.take(
        bytes, [this](std::size_t n) { return n <= capacity - used_ ? memory_ + std::exchange(used_, used_ + n) : nullptr; }, forget,
        capacity);
  }
  void give(void* block, std::size_t bytes) noexcept { pool_.give(block, bytes); }
  void trim() noexcept { pool_.trim(forget); }
  void upload(void* to, void const* from, std::size_t bytes) {
    Unlocked const unlocked{*this};
    std::memcpy(to, from, bytes);
  }
  void download(void* to, void const* from, std::size_t bytes) {
    Unlocked const unlocked{*this};
    std::memcpy(to, from, bytes);
  }
  void copy(void* to, void const* from, std::size_t bytes) {
    check(owns(to) && owns(from), "Fake: a copy on the device was given memory of the host");
    Unlocked const unlocked{*this};
    std::memcpy(to, from, bytes);
  }
  void fill(void* to, std::byte value, std::size_t bytes) {
    check(owns(to), "Fake: a fill was given memory of the host");
    Unlocked const unlocked{*this};
    std::memset(to, std::to_integer<int>(value), bytes);
  }
  void synchronise() {}
  Pool& pool() { return pool_; }

  bool owns(void const* memory) const { return memory_ <= memory && memory < memory_ + capacity; }
  // What an operation is given, alone or in a group: memory of the host is none that a device could read.
  template <class T, int Rank> void arrives(View<T, Rank> const& view) const {
    check(view.count() == 0 || owns(view.data), "Fake: an operation was given memory of the host");
  }
  template <class Argument> void arrives(Argument const& argument) const {
    if constexpr (FieldGroup<Argument>) zip([&](Path const&, auto const& view) { arrives(view); }, argument);
  }

  // f(inner): the only place where the memory is there.
  template <class F> auto run(F&& f) {
    Unlocked const unlocked{*this};
    return f(cpu_);
  }

 private:
  static constexpr std::size_t capacity = std::size_t{1} << 30;   // of addresses; pages come when they are touched

  struct Unlocked {
    Fake& fake;
    explicit Unlocked(Fake& f) : fake(f) {
      if (fake.open_++ == 0) fake.protect(PROT_READ | PROT_WRITE);
    }
    ~Unlocked() {
      if (--fake.open_ == 0) fake.protect(PROT_NONE);
    }
  };
  static void forget(void*) noexcept {}   // its addresses stay used until the end
  void protect(int access) { mprotect(memory_, capacity, access); }

  Cpu cpu_;
  Pool pool_;
  char* memory_ = nullptr;
  std::size_t used_ = 0;
  int open_ = 0;
};
static_assert(Backend<Fake> && Wrapper<Fake>);

}  // namespace hybridattn::inline HYBRIDATTN_ABI::testing
#endif
