// The CPU: aligned memory from a pool, and the one seam through which the library uses threads.
#ifndef HYBRIDATTN_BACKEND_CPU_CPU_HPP
#define HYBRIDATTN_BACKEND_CPU_CPU_HPP

#include <hybridattn/backend/backend.hpp>
#include <hybridattn/core/check.hpp>
#include <hybridattn/core/view.hpp>

#include <cstring>
#include <new>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace hybridattn::inline HYBRIDATTN_ABI {

class Cpu {
 public:
  // 0 threads: as many as OpenMP offers, one without OpenMP.
  explicit Cpu(int threads = 0) : threads_(threads == 0 ? available_threads() : threads) {
    check(threads >= 0, "Cpu: ", threads, " threads; allowed: 0 (as many as there are) and more");
  }
  Cpu(Cpu const&) = delete;
  Cpu& operator=(Cpu const&) = delete;
  ~Cpu() {
    pool_.clear([](void* block) { ::operator delete(block, alignment); });
  }

  void* take(std::size_t bytes) {
    return pool_.take(bytes, [](std::size_t n) { return ::operator new(n, alignment); });
  }
  void give(void* block, std::size_t bytes) noexcept { pool_.give(block, bytes); }
  void upload(void* to, void const* from, std::size_t bytes) { std::memcpy(to, from, bytes); }
  void download(void* to, void const* from, std::size_t bytes) { std::memcpy(to, from, bytes); }
  Pool& pool() { return pool_; }
  int threads() const { return threads_; }

 private:
  static constexpr std::align_val_t alignment{64};
  static int available_threads() {
#if defined(_OPENMP)
    return omp_get_max_threads();
#else
    return 1;
#endif
  }
  int threads_;
  Pool pool_;
};
static_assert(Backend<Cpu>);

namespace cpu {

// Memory that a kernel needs while it runs, from the pool. Taken before threads start: the pool serves one at a time.
template <class T> class Scratch {
 public:
  Scratch(Cpu& cpu, Index count) : cpu_(cpu), bytes_(static_cast<std::size_t>(count) * sizeof(T)) {
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

// f(task, thread) for tasks 0 .. count - 1, each run whole by one thread 0 .. cpu.threads() - 1. Which thread gets which
// task is open, so a result must depend on the task alone. f must not throw.
template <class F> void parallel_for([[maybe_unused]] Cpu& cpu, Index count, F f) {
#if defined(_OPENMP)
  if (cpu.threads() > 1 && count > 1 && !omp_in_parallel()) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(cpu.threads())
    for (Index task = 0; task < count; ++task) f(task, omp_get_thread_num());
    return;
  }
#endif
  for (Index task = 0; task < count; ++task) f(task, 0);
}

// f(first, last) over 0 .. count in blocks of `grain` elements: for loops over elements.
template <class F> void parallel_blocks(Cpu& cpu, Index count, Index grain, F f) {
  parallel_for(cpu, (count + grain - 1) / grain, [&](Index block, int) {
    Index const first = block * grain;
    f(first, first + grain < count ? first + grain : count);
  });
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
