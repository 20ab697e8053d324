// The CPU: aligned memory from a pool, and parallel_for, the only loop that uses threads.
#ifndef HYBRIDATTN_BACKEND_CPU_CPU_HPP
#define HYBRIDATTN_BACKEND_CPU_CPU_HPP

#include <hybridattn/backend/backend.hpp>
#include <hybridattn/backend/cpu/threads.hpp>
#include <hybridattn/core/math.hpp>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <new>
#include <string_view>

namespace hybridattn::inline HYBRIDATTN_ABI {

class Cpu {
 public:
  static constexpr std::string_view name = "Cpu";

  // 0 threads: as many as OMP_NUM_THREADS says, or one for each processor. Throws Error for more than thread_limit() threads, and for
  // an OMP_NUM_THREADS that is no number. Cpu{1} runs on the caller's thread and starts no other.
  explicit Cpu(int threads = 0) : threads_(threads == 0 ? available_threads() : threads) {
    check(threads >= 0, "Cpu: ", threads, " threads; allowed: 0 (as many as there are) and more");
    check(threads_.count() <= thread_limit(), "Cpu: ", threads_.count(), " threads", threads == 0 ? ", which OMP_NUM_THREADS asks for" : "",
          "; this machine allows at most ", thread_limit());
  }
  Cpu(Cpu const&) = delete;
  Cpu& operator=(Cpu const&) = delete;
  ~Cpu() { trim(); }

  // Throws Error where memory is short, and inside parallel_for, because threads cannot share the pool.
  void* take(std::size_t bytes) {
    check(!in_loop_, "Cpu: ", bytes, " bytes are taken inside parallel_for; take them before it");
    return pool_.take(bytes, [this](std::size_t n) { return allocate(n); }, release, machine_memory());
  }
  void give(void* block, std::size_t bytes) noexcept { pool_.give(block, bytes); }
  // Returns the pool's free blocks to the system.
  void trim() noexcept { pool_.trim(release); }
  void upload(void* to, void const* from, std::size_t bytes) { std::memcpy(to, from, bytes); }
  void download(void* to, void const* from, std::size_t bytes) { std::memcpy(to, from, bytes); }
  void copy(void* to, void const* from, std::size_t bytes) { std::memcpy(to, from, bytes); }
  void fill(void* to, std::byte value, std::size_t bytes) { std::memset(to, std::to_integer<int>(value), bytes); }
  void synchronise() {}
  // Operations of Cpu work on any memory of the process.
  bool owns(void const*) const { return true; }
  Pool& pool() { return pool_; }
  int threads() const { return threads_.count(); }
  // Four for each processor, at least 256: each thread has a stack.
  static int thread_limit() { return std::max(256, 4 * cpu::processors()); }

  // The loop of parallel_for. A loop inside a loop runs on the thread that it is in.
  void run(cpu::TaskLoop const& loop) {
    if (in_loop_) return loop.run_here();
    InLoop const here{in_loop_};
    if (threads() > 1 && loop.count > 1) threads_.run(loop);
    else loop.run_here();
  }

 private:
  static constexpr std::align_val_t alignment{64};

  void* allocate(std::size_t bytes) const {
    if (bytes > machine_memory() - std::min(machine_memory(), pool_.held())) return nullptr;
    return ::operator new(bytes, alignment, std::nothrow);
  }
  static void release(void* block, std::size_t) noexcept { ::operator delete(block, alignment); }
  static int available_threads() {
    int const wanted = cpu::threads_of_environment();
    return wanted > 0 ? wanted : cpu::processors();
  }
  struct InLoop {
    explicit InLoop(bool& flag) : flag_(flag) { flag_ = true; }
    InLoop(InLoop const&) = delete;
    InLoop& operator=(InLoop const&) = delete;
    ~InLoop() { flag_ = false; }

    bool& flag_;
  };

  cpu::Threads threads_;
  bool in_loop_ = false;   // while parallel_for runs
  Pool pool_;
};
static_assert(Backend<Cpu>);

namespace cpu {

// `count` elements of scratch memory for a kernel, from the pool. Make it before threads start: the pool serves one thread at a time.
template <class T> class Scratch {
 public:
  Scratch(Cpu& cpu, Index count) : cpu_(cpu), bytes_(byte_count(count, sizeof(T))) {
    if (count > 0) data_ = static_cast<T*>(cpu.take(bytes_));
  }
  Scratch(Scratch const&) = delete;
  Scratch& operator=(Scratch const&) = delete;
  ~Scratch() {
    if (data_ != nullptr) cpu_.give(data_, bytes_);
  }
  T* data() const { return data_; }

 private:
  Cpu& cpu_;
  std::size_t bytes_;
  T* data_ = nullptr;
};

}  // namespace cpu

// Calls f(task, thread) for tasks 0 .. count - 1, each on one thread 0 .. cpu.threads() - 1. Any thread may run any task, so a
// result must depend on the task alone. When f throws, parallel_for throws the error after the loop, and other tasks have run too:
// check arguments and take memory before the loop.
template <class F> void parallel_for(Cpu& cpu, Index count, F f) {
  cpu.run({count, [](void* body, Index task, int thread) { (*static_cast<F*>(body))(task, thread); }, &f});
}

// Calls f(first, last) for blocks of `grain` elements that make up 0 .. count: for loops over elements.
template <class F> void parallel_blocks(Cpu& cpu, Index count, Index grain, F f) {
  parallel_for(cpu, ceil_div(count, grain), [&](Index block, int) {
    Index const first = block * grain;
    f(first, std::min(first + grain, count));
  });
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
