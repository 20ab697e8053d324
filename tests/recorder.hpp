// A backend that records what a step asks of it, with copies of the arguments, and does it again: what a machine with captured
// graphs does.
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

  // work(cpu) owns all that it needs. An operation's own memory is not among the blocks of this backend: a replay takes it anew.
  template <class Work> void run(Work work) {
    work(scratch_);
    if (recording_) recorded_.push_back(std::move(work));
  }
  // Both record and replay leave the blocks of the recorded work where they are, as a graph does: whoever replays must not have
  // taken memory in between that he wants to keep.
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

// An argument as a recording keeps it: the sequences of a batch, whose table stands on the machine, by address; all else by value.
template <class Argument> auto kept(Argument const& argument) {
  if constexpr (std::is_base_of_v<hybridattn::Sequences, Argument>) return std::cref(argument);
  else return argument;
}

}  // namespace recorder_detail

// Where operations that one text computes on every backend leave room for others, see On.
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
