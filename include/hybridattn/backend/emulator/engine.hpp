// Runs the blocks of a kernel on one thread of the host. Every thread of a block is a fiber.
#ifndef HYBRIDATTN_BACKEND_EMULATOR_ENGINE_HPP
#define HYBRIDATTN_BACKEND_EMULATOR_ENGINE_HPP

#include <hybridattn/backend/emulator/fiber.hpp>
#include <hybridattn/backend/emulator/mutation.hpp>
#include <hybridattn/backend/emulator/schedule.hpp>
#include <hybridattn/backend/emulator/shared_memory.hpp>
#include <hybridattn/backend/gpu/grid.hpp>

#include <array>
#include <exception>
#include <memory>
#include <string>
#include <utility>

namespace hybridattn::inline HYBRIDATTN_ABI::emulator {

// A launch, without the kernel's type.
struct Launch {
  std::string (*kernel)();   // its name
  void (*run)(void* shared, void const* params);
  void const* params;
  int threads;   // of a block
  std::size_t shared_bytes;
  Grid grid;
};

// A thread of the current block.
struct Thread {
  enum class State : char { ready, in_warp, in_block, ended };
  Fiber fiber;
  int number = 0;
  State state = State::ready;
  char const* word = "";      // where it waits: a word of simt.hpp
  simt::CallSite at;          // and the line that calls the word
  alignas(16) std::byte given[16] = {}, received[16] = {};   // what lanes exchange
};

class Engine {
 public:
  explicit Engine(Schedule schedule) : schedule_(schedule) {}

  // Throws Error where the block makes a mistake: barriers that not all threads reach, an end while others wait, a deadlock, writes
  // beside shared memory. The error names the kernel, the block, and where its threads wait.
  void run_block(Launch const& launch, Grid block) {
    Unwatched const unwatched;
    launch_ = &launch;
    block_ = block;
    schedule_.start_block((block.z * launch.grid.y + block.y) * launch.grid.x + block.x);
    shared_.start_block(launch.shared_bytes);
    shared_data_ = shared_.data();
    start_threads();
    Engine* const outer = std::exchange(current(), this);
    host_.adopt_thread();
    release(&start_);
    go_on(host_);
    current() = outer;
    if (failure_ != nullptr) std::rethrow_exception(std::exchange(failure_, nullptr));
    if (!mistake_.empty()) fail(std::exchange(mistake_, {}));
    if (Index const place = shared_.overwritten(); place != SharedMemory::intact)
      fail(sentence("Emulator: ", where(), " writes beside its shared memory, ", place, " bytes from its start"));
  }
  // After the last block of a launch.
  void end_launch() {
    acquire(&end_);
    shared_.end_launch();
  }

  // The engine whose kernel runs on this thread of the host.
  HYBRIDATTN_UNWATCHED static Engine*& current() {
    static constinit thread_local Engine* engine = nullptr;
    return engine;
  }
  HYBRIDATTN_UNWATCHED Thread& self() { return *self_; }
  HYBRIDATTN_UNWATCHED Grid const& block() const { return block_; }

  // Waits for all threads of the block.
  void sync_block(simt::CallSite at) {
    Unwatched const unwatched;
    if (mutation().passes(at)) return;
    Thread& me = *self_;
    me.word = "sync_block";
    me.at = at;
    if (ended_ > 0) stop("waits for threads that have ended");
    if (in_block_ > 0 && !same(at, block_site_)) stop("waits at another sync_block than other threads of its block");
    block_site_ = at;
    void* const meeting = &block_meetings_[block_phase_ % 2];
    release(meeting);
    if (++in_block_ == launch_->threads) {
      in_block_ = 0;
      ++block_phase_;
      for (int i = 0; i < launch_->threads; ++i) wake(threads_[static_cast<std::size_t>(i)]);
    } else {
      me.state = Thread::State::in_block;
    }
    go_on(me.fiber);
    acquire(meeting);
  }

  // Waits for all lanes of the warp. The last one to arrive calls exchange(lanes), which reads what they gave and sets what they receive.
  enum class Memory : char { as_it_is, ordered };  // ordered: every lane sees what the others wrote before
  template <class Exchange> void meet(char const* word, simt::CallSite at, Memory memory, Exchange exchange) {
    Thread& me = *self_;
    Warp& warp = warps_[static_cast<std::size_t>(me.number / 32)];
    me.word = word;
    me.at = at;
    if (warp.ended != 0) stop("needs all lanes of its warp, but some have ended");
    if (warp.arrived != 0 && (!same(at, warp.site) || std::strcmp(word, warp.word) != 0))
      stop(sentence("waits at ", word, " while other lanes of its warp wait at ", warp.word));
    warp.site = at;
    warp.word = word;
    warp.arrived |= 1u << me.number % 32;
    void* const meeting = &warp.meetings[warp.phase % 2];
    if (memory == Memory::ordered) release(meeting);
    if (warp.arrived == ~0u) {
      Thread* const lanes = &threads_[static_cast<std::size_t>(me.number / 32 * 32)];
      exchange(lanes);
      warp.arrived = 0;
      ++warp.phase;
      for (int lane = 0; lane < 32; ++lane) wake(lanes[lane]);
    } else {
      me.state = Thread::State::in_warp;
    }
    go_on(me.fiber);
    if (memory == Memory::ordered) acquire(meeting);
  }

 private:
  struct Warp {
    std::uint32_t ready = 0, arrived = 0, ended = 0;  // sets of lanes
    char const* word = "";
    simt::CallSite site;
    unsigned phase = 0;
    std::array<char, 16> meetings[2] = {};
  };
  static constexpr int most_threads = 1024;

  void start_threads() {
    if (threads_ == nullptr) threads_ = std::make_unique<Thread[]>(most_threads);
    ended_ = in_block_ = 0;
    last_warp_ = 0;
    warps_ready_ = 0;
    for (int i = 0; i < launch_->threads / 32; ++i) {
      Warp& warp = warps_[static_cast<std::size_t>(i)];
      warp.ready = warp.arrived = warp.ended = 0;
    }
    for (int i = 0; i < launch_->threads; ++i) {
      Thread& thread = threads_[static_cast<std::size_t>(i)];
      thread.number = i;
      thread.fiber.start(run_thread, &thread);
      wake(thread);
    }
  }
  HYBRIDATTN_UNWATCHED static void run_thread(void* thread) {
    Engine& engine = *current();
    acquire(&engine.start_);
    try {
      engine.launch_->run(engine.shared_data_, engine.launch_->params);
    } catch (...) {
      engine.failure_ = std::current_exception();
    }
    engine.end_thread(*static_cast<Thread*>(thread));
  }
  void end_thread(Thread& me) {
    Fiber* next = &host_;
    release(&end_);
    {
      Unwatched const unwatched;
      me.state = Thread::State::ended;
      me.word = "its end";
      Warp& warp = warps_[static_cast<std::size_t>(me.number / 32)];
      warp.ended |= 1u << me.number % 32;
      ++ended_;
      if (warp.arrived != 0) mistake_ = report("ends while other lanes of its warp wait for it");
      else if (in_block_ > 0) mistake_ = report("ends while other threads of its block wait for it");
      next = &choose();
    }
    me.fiber.switch_to(*next);
  }

  void wake(Thread& thread) {
    thread.state = Thread::State::ready;
    warps_[static_cast<std::size_t>(thread.number / 32)].ready |= 1u << thread.number % 32;
    warps_ready_ |= 1u << thread.number / 32;
  }
  // The fiber that runs next: the host's after a mistake, and where no thread can run.
  Fiber& choose() {
    if (failure_ == nullptr && mistake_.empty() && warps_ready_ == 0 && ended_ < launch_->threads)
      mistake_ = report("waits, and so do all others: no thread can go on");
    if (failure_ != nullptr || !mistake_.empty() || warps_ready_ == 0) return host_;
    last_warp_ = schedule_.next_warp(warps_ready_, last_warp_);
    Warp& warp = warps_[static_cast<std::size_t>(last_warp_)];
    int const lane = schedule_.next_lane(warp.ready);
    warp.ready &= ~(1u << lane);
    if (warp.ready == 0) warps_ready_ &= ~(1u << last_warp_);
    self_ = &threads_[static_cast<std::size_t>(last_warp_ * 32 + lane)];
    return self_->fiber;
  }
  void go_on(Fiber& from) {
    Fiber& next = choose();
    if (&next != &from) from.switch_to(next);
  }
  // The calling thread made a mistake. Nothing of the block runs any more, so nothing on its stack may own memory.
  void stop(std::string mistake) {
    mistake_ = report(std::exchange(mistake, {}));
    self_->fiber.switch_to(host_);
  }

  std::string where() const { return sentence("kernel ", launch_->kernel(), ", block (", block_.x, ", ", block_.y, ", ", block_.z, ")"); }
  // The mistake of the current thread, and below it where all threads of the block wait.
  std::string report(std::string const& mistake) const {
    std::string text = sentence("Emulator: ", where(), ": thread ", self_->number, " ", mistake);
    for (int first = 0, last; first < launch_->threads; first = last) {
      Thread const& thread = threads_[static_cast<std::size_t>(first)];
      std::string const place = place_of(thread);
      for (last = first + 1; last < launch_->threads && place_of(threads_[static_cast<std::size_t>(last)]) == place;) ++last;
      text += sentence("\n  ", last == first + 1 ? "thread " : "threads ", first);
      if (last > first + 1) text += sentence(" to ", last - 1);
      text += sentence(": ", place);
    }
    return text;
  }
  std::string place_of(Thread const& thread) const {
    if (thread.state == Thread::State::ended) return "ended";
    if (thread.state == Thread::State::ready && &thread != self_) return "could go on";
    char const* const name = std::strrchr(thread.at.file, '/');
    return sentence("at ", thread.word, ", ", name == nullptr ? thread.at.file : name + 1, ":", thread.at.line);
  }

  Schedule schedule_;
  SharedMemory shared_;
  void* shared_data_ = nullptr;
  std::unique_ptr<Thread[]> threads_;  // made with the first block
  std::array<Warp, most_threads / 32> warps_;
  Fiber host_;
  Launch const* launch_ = nullptr;
  Grid block_;
  Thread* self_ = nullptr;
  std::uint32_t warps_ready_ = 0;
  int last_warp_ = 0, ended_ = 0, in_block_ = 0;
  simt::CallSite block_site_;
  unsigned block_phase_ = 0;
  std::array<char, 16> block_meetings_[2] = {};
  std::exception_ptr failure_;
  std::string mistake_;
  char start_ = 0, end_ = 0;  // meetings of the threads with the host
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::emulator
#endif
