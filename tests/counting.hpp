// A backend that counts copies between it and the host, and the operations that it runs.
#ifndef HYBRIDATTN_TESTS_COUNTING_HPP
#define HYBRIDATTN_TESTS_COUNTING_HPP

#include <hybridattn/hybridattn.hpp>
#include <hybridattn/testing/machine.hpp>

template <class B> class CountingOn {
 public:
  using Inner = B;

  explicit CountingOn(int schedule = 1) : inner_(hybridattn::testing::Machine<B>::make(schedule)) {}
  void* take(std::size_t bytes) { return inner_.take(bytes); }
  void give(void* block, std::size_t bytes) noexcept { inner_.give(block, bytes); }
  void trim() noexcept { inner_.trim(); }
  void upload(void* to, void const* from, std::size_t bytes) {
    ++uploads;
    inner_.upload(to, from, bytes);
  }
  void download(void* to, void const* from, std::size_t bytes) {
    ++downloads;
    inner_.download(to, from, bytes);
  }
  void copy(void* to, void const* from, std::size_t bytes) { inner_.copy(to, from, bytes); }
  void fill(void* to, std::byte value, std::size_t bytes) { inner_.fill(to, value, bytes); }
  void synchronise() { ++waits; }
  bool owns(void const* memory) const { return inner_.owns(memory); }
  hybridattn::Pool& pool() { return inner_.pool(); }
  void arrives(auto const&) const {}
  template <class F> auto run(F&& f) {
    ++operations;
    return f(inner_);
  }
  void reset() { uploads = downloads = waits = operations = angles = 0; }

  int uploads = 0, downloads = 0, waits = 0, operations = 0;
  int angles = 0;   // of the operations, those that make rotary angles

 private:
  B inner_;
};
template <class B> struct hybridattn::testing::Machine<CountingOn<B>> {
  static CountingOn<B> make(int schedule) { return CountingOn<B>(schedule); }
};
using Counting = CountingOn<hybridattn::Cpu>;
static_assert(hybridattn::Backend<Counting> && hybridattn::Wrapper<Counting>);

template <class B> struct hybridattn::On<hybridattn::RopeAngles, CountingOn<B>> {
  template <class... Args> static void forward(CountingOn<B>& counting, Args const&... args) {
    ++counting.angles;
    counting.run([&](B& inner) { On<RopeAngles, B>::forward(inner, args...); });
  }
};

#endif
