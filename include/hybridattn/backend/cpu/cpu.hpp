// The CPU: aligned memory from a pool, and parallel_for, the only place where the library uses threads.
#ifndef HYBRIDATTN_BACKEND_CPU_CPU_HPP
#define HYBRIDATTN_BACKEND_CPU_CPU_HPP

#include <hybridattn/backend/backend.hpp>
#include <hybridattn/core/math.hpp>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <exception>
#include <new>
#include <string_view>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace hybridattn::inline HYBRIDATTN_ABI {

class Cpu {
 public:
  static constexpr std::string_view name = "Cpu";

  // 0 threads: as many as OpenMP offers, one without OpenMP. Throws Error for more than thread_limit() threads.
  // Cpu{1} runs on the caller's thread and starts no threads of OpenMP, so it works in a child after fork() too.
  explicit Cpu(int threads = 0) : threads_(threads == 0 ? available_threads() : threads) {
    check(threads >= 0, "Cpu: ", threads, " threads; allowed: 0 (as many as there are) and more");
    check(threads_ <= thread_limit(), "Cpu: ", threads_, " threads", threads == 0 ? ", which OMP_NUM_THREADS asks for" : "",
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
  int threads() const { return threads_; }
  // Four for each processor, at least 256. Each thread has a stack, and OpenMP ends the process where it cannot start a thread.
  static int thread_limit() {
#if defined(_OPENMP)
    return std::max(256, 4 * omp_get_num_procs());
#else
    return 256;
#endif
  }

  // While parallel_for runs.
  class Loop {
   public:
    explicit Loop(Cpu& cpu) : cpu_(cpu.in_loop_ ? nullptr : &cpu) {
      if (cpu_ != nullptr) cpu_->in_loop_ = true;
    }
    Loop(Loop const&) = delete;
    Loop& operator=(Loop const&) = delete;
    ~Loop() {
      if (cpu_ != nullptr) cpu_->in_loop_ = false;
    }

   private:
    Cpu* cpu_;   // nullptr for a loop inside a loop
  };

 private:
  static constexpr std::align_val_t alignment{64};

  void* allocate(std::size_t bytes) const {
    if (bytes > machine_memory() - std::min(machine_memory(), pool_.held())) return nullptr;
    return ::operator new(bytes, alignment, std::nothrow);
  }
  static void release(void* block, std::size_t) noexcept { ::operator delete(block, alignment); }
  static int available_threads() {
#if defined(_OPENMP)
    int const offered = omp_get_max_threads();
    return offered > 0 ? offered : omp_get_num_procs();   // LLVM's OpenMP reads a word in OMP_NUM_THREADS as any number
#else
    return 1;
#endif
  }

  int threads_;
  bool in_loop_ = false;
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

namespace detail {

#if defined(_OPENMP)
// The error of a task. Of several it keeps that of the task with the smallest number, for any number of threads.
class Failure {
 public:
  void keep(Index task) noexcept {
#pragma omp critical(hybridattn_failure)
    if (error_ == nullptr || task < task_) {
      error_ = std::current_exception();
      task_ = task;
    }
  }
  void rethrow() const {
    if (error_ != nullptr) std::rethrow_exception(error_);
  }

 private:
  std::exception_ptr error_;
  Index task_ = 0;
};
#endif

// The loop of parallel_for, compiled once: run(f, task, thread) for every task.
inline void run_tasks(Cpu& cpu, Index count, void (*run)(void* f, Index task, int thread), void* f) {
  Cpu::Loop const loop{cpu};
#if defined(_OPENMP)
  if (cpu.threads() > 1 && count > 1 && !omp_in_parallel()) {
    Failure failure;
#pragma omp parallel for schedule(dynamic, 1) num_threads(cpu.threads())
    for (Index task = 0; task < count; ++task) {
      try {
        run(f, task, omp_get_thread_num());
      } catch (...) {
        failure.keep(task);
      }
    }
    failure.rethrow();
    return;
  }
#endif
  for (Index task = 0; task < count; ++task) run(f, task, 0);
}

}  // namespace detail

// Calls f(task, thread) for tasks 0 .. count - 1, each on one thread 0 .. cpu.threads() - 1. Any thread may run any task, so a
// result must depend on the task alone. When f throws, parallel_for throws the error after the loop, and other tasks have run too:
// check arguments and take memory before the loop.
template <class F> void parallel_for(Cpu& cpu, Index count, F f) {
  detail::run_tasks(cpu, count, [](void* body, Index task, int thread) { (*static_cast<F*>(body))(task, thread); }, &f);
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
