// A backend that records the operations of a step, with copies of the arguments, and runs them again, as a machine with captured graphs
// does.
#ifndef HYBRIDATTN_TESTS_RECORDER_HPP
#define HYBRIDATTN_TESTS_RECORDER_HPP

#include <hybridattn/hybridattn.hpp>

#include <functional>
#include <tuple>
#include <vector>

class Recorder {
 public:
  explicit Recorder(int threads = 1) : cpu_(threads), scratch_(threads) {}
  void* take(std::size_t bytes) { return cpu_.take(bytes); }
  void give(void* block, std::size_t bytes) noexcept { cpu_.give(block, bytes); }
  void trim() noexcept { cpu_.trim(); }
  void upload(void* to, void const* from, std::size_t bytes) {
    refuse("an upload");
    cpu_.upload(to, from, bytes);
  }
  void download(void* to, void const* from, std::size_t bytes) {
    refuse("a download");
    cpu_.download(to, from, bytes);
  }
  void synchronise() { refuse("a wait"); }
  void copy(void* to, void const* from, std::size_t bytes) {
    run([=](hybridattn::Cpu& cpu) { cpu.copy(to, from, bytes); });
  }
  void fill(void* to, std::byte value, std::size_t bytes) {
    run([=](hybridattn::Cpu& cpu) { cpu.fill(to, value, bytes); });
  }
  bool owns(void const* memory) const { return cpu_.owns(memory); }
  hybridattn::Pool& pool() { return cpu_.pool(); }

  // work(cpu) owns all that it needs. Scratch memory of an operation comes from scratch_, not from the blocks of this backend, so a replay
  // takes it anew.
  template <class Work> void run(Work work) {
    work(scratch_);
    if (recording_) recorded_.push_back(std::move(work));
  }
  // As a captured graph does, a replay uses the same blocks as the recorded work. A caller that wants to keep memory must not take it
  // between recording and replay.
  template <class Work> void record(Work work) {
    recorded_.clear();
    recording_ = true;
    work();
    recording_ = false;
  }
  void replay() {
    for (auto const& work : recorded_) work(scratch_);
  }
  std::size_t recorded() const { return recorded_.size(); }

 private:
  void refuse(char const* what) const { hybridattn::check(!recording_, "Recorder: ", what, " cannot be replayed"); }

  hybridattn::Cpu cpu_, scratch_;
  std::vector<std::function<void(hybridattn::Cpu&)>> recorded_;
  bool recording_ = false;
};
static_assert(hybridattn::Backend<Recorder>);

namespace recorder_detail {

// How a recording keeps an argument: sequences of a batch by address, because their table is on the machine, all others by value.
template <class Argument> auto kept(Argument const& argument) {
  if constexpr (std::is_base_of_v<hybridattn::Sequences, Argument>) return std::cref(argument);
  else return argument;
}

}  // namespace recorder_detail

// Operations that one template computes on every backend need this specialisation instead of one of On. See On.
template <class Op> struct hybridattn::detail::OnInner<Op, Recorder> {
  template <class C = Cpu, class... Args>
  static auto forward(Recorder& recorder, Args const&... args) -> decltype(On<Op, C>::forward(std::declval<C&>(), args...)) {
    recorder.run([kept = std::make_tuple(recorder_detail::kept(args)...)](Cpu& cpu) {
      std::apply([&](auto const&... again) { On<Op, Cpu>::forward(cpu, again...); }, kept);
    });
  }
  template <class C = Cpu, class... Args>
  static auto backward(Recorder& recorder, Args const&... args) -> decltype(On<Op, C>::backward(std::declval<C&>(), args...)) {
    recorder.run([kept = std::make_tuple(recorder_detail::kept(args)...)](Cpu& cpu) {
      std::apply([&](auto const&... again) { On<Op, Cpu>::backward(cpu, again...); }, kept);
    });
  }
};

#endif
