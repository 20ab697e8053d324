// A backend that counts what goes to and fro between it and the host.
#ifndef HYBRIDATTN_TESTS_COUNTING_HPP
#define HYBRIDATTN_TESTS_COUNTING_HPP

#include <hybridattn/hybridattn.hpp>

class Counting {
 public:
  using Inner = hybridattn::Cpu;

  explicit Counting(int threads = 1) : cpu_(threads) {}
  void* take(std::size_t bytes) { return cpu_.take(bytes); }
  void give(void* block, std::size_t bytes) noexcept { cpu_.give(block, bytes); }
  void trim() noexcept { cpu_.trim(); }
  void upload(void* to, void const* from, std::size_t bytes) {
    ++uploads;
    cpu_.upload(to, from, bytes);
  }
  void download(void* to, void const* from, std::size_t bytes) {
    ++downloads;
    cpu_.download(to, from, bytes);
  }
  void copy(void* to, void const* from, std::size_t bytes) { cpu_.copy(to, from, bytes); }
  void fill(void* to, std::byte value, std::size_t bytes) { cpu_.fill(to, value, bytes); }
  void synchronise() { ++waits; }
  bool owns(void const* memory) const { return cpu_.owns(memory); }
  hybridattn::Pool& pool() { return cpu_.pool(); }
  void arrives(auto const&) const {}
  template <class F> auto run(F&& f) {
    ++operations;
    return f(cpu_);
  }
  void reset() { uploads = downloads = waits = operations = angles = 0; }

  int uploads = 0, downloads = 0, waits = 0, operations = 0;
  int angles = 0;   // of the operations, those that make rotary angles

 private:
  hybridattn::Cpu cpu_;
};
static_assert(hybridattn::Backend<Counting> && hybridattn::Wrapper<Counting>);

template <> struct hybridattn::On<hybridattn::RopeAngles, Counting> {
  template <class... Args> static void forward(Counting& counting, Args const&... args) {
    ++counting.angles;
    counting.run([&](Cpu& cpu) { On<RopeAngles, Cpu>::forward(cpu, args...); });
  }
};

#endif
