// The threads of a Cpu. They share the tasks of one loop at a time.
#ifndef HYBRIDATTN_BACKEND_CPU_THREADS_HPP
#define HYBRIDATTN_BACKEND_CPU_THREADS_HPP

#include <hybridattn/core/check.hpp>
#include <hybridattn/core/view.hpp>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <limits>
#include <string_view>
#include <vector>

#include <pthread.h>
#include <unistd.h>

namespace hybridattn::inline HYBRIDATTN_ABI::cpu {

// Processors that this process may use, at least one.
inline int processors() {
#if defined(__linux__)
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) return std::max(1, CPU_COUNT(&allowed));
#endif
  return std::max(1, static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN)));
}

// The number of threads that OMP_NUM_THREADS asks for, as in programs that use OpenMP: of a list its first number. 0 where it is not set.
// Throws Error for anything else.
inline int threads_of_environment() {
  char const* const text = std::getenv("OMP_NUM_THREADS");
  if (text == nullptr || *text == '\0') return 0;
  char* end = nullptr;
  long const number = std::strtol(text, &end, 10);
  check(end != text && (*end == '\0' || *end == ',') && number > 0 && number <= std::numeric_limits<int>::max(), "OMP_NUM_THREADS is '", text,
        "'; allowed: a number of threads above 0, or several with commas between them, of which the first counts");
  return static_cast<int>(number);
}

namespace detail {

// Tells the processor that a thread waits in a loop.
inline void pause() {
#if defined(__SSE2__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Calls done() until it is true, `looks` times at most. A look takes 10 to 50 ns.
template <class Done> bool spin(Done done, int looks = 2000) {
  for (; looks > 0; --looks, pause())
    if (done()) return true;
  return false;
}

// How often this process is a child of fork(): threads of the parent do not exist in the child.
inline std::atomic<int> forks = 0;
inline int const watches_forks = pthread_atfork(nullptr, nullptr, [] { ++forks; });

// The error of a task. Of several it keeps that of the task with the smallest number, for any number of threads.
class Failure {
 public:
  void keep(Index task) noexcept {
    while (busy_.exchange(true, std::memory_order_acquire)) pause();
    if (error_ == nullptr || task < task_) {
      error_ = std::current_exception();
      task_ = task;
    }
    busy_.store(false, std::memory_order_release);
  }
  void rethrow() const {
    if (error_ != nullptr) std::rethrow_exception(error_);
  }

 private:
  std::atomic<bool> busy_ = false;
  std::exception_ptr error_;
  Index task_ = 0;
};

}  // namespace detail

// A loop: run(body, task, thread) for tasks 0 .. count - 1.
struct TaskLoop {
  Index count = 0;
  void (*run)(void* body, Index task, int thread) = nullptr;
  void* body = nullptr;

  void run_here() const {
    for (Index task = 0; task < count; ++task) run(body, task, 0);
  }
};

// The threads of a Cpu. Every thread claims one task after the other, the caller too. The caller waits only for tasks that a thread has
// begun, so a thread that gets no processor delays nobody. A thread without tasks looks for the next loop for some microseconds, then sleeps.
//
// `unclaimed_` counts the tasks that no thread has claimed. A thread that comes late, after its loop has ended, claims a task of the next
// loop. That is right: it reads what the loop is after it has claimed, and a loop does not end before its claimed tasks have ended.
class Threads {
 public:
  // The caller and `count` - 1 others.
  explicit Threads(int count) : count_(count) {}
  Threads(Threads const&) = delete;
  Threads& operator=(Threads const&) = delete;
  ~Threads() { stop(); }

  int count() const { return count_; }

  // Runs the loop on the caller, which is thread 0, and on the others. One loop at a time. The first loop starts the others, and so does
  // the first loop in a child of fork(). Throws Error where the system refuses a thread. Throws the error of a task, of several that of the
  // task with the smallest number, after all tasks have ended.
  void run(TaskLoop const& loop) {
    start();
    detail::Failure failure;
    loop_ = loop, failure_ = &failure;
    unfinished_.store(loop.count, std::memory_order_relaxed);
    unclaimed_.store(loop.count, std::memory_order_release);
    call();
    work(0);
    wait_for_begun();
    failure.rethrow();
  }

 private:
  struct Other {
    Threads* threads;
    int number;
    pthread_t id;
  };

  void start() {
    if (forks_ != detail::forks) others_.clear(), forks_ = detail::forks;
    if (!others_.empty()) return;
    stops_ = false, unclaimed_ = 0;
    others_.reserve(static_cast<std::size_t>(count_));   // a thread knows the address of its own
    for (int number = 1; number < count_; ++number) {
      Other& other = others_.emplace_back(Other{this, number, {}});
      int const error = pthread_create(&other.id, nullptr, main, &other);
      if (error == 0) continue;
      others_.pop_back();
      stop();
      fail("Cpu: the system refuses thread ", number + 1, " of ", count_, ": ", std::strerror(error));
    }
  }
  void stop() {
    bool const are_here = forks_ == detail::forks;
    if (are_here && !others_.empty()) stops_ = true, call();
    for (Other const& other : others_)
      if (are_here) pthread_join(other.id, nullptr);
    others_.clear();
  }

  static void* main(void* other) {
    static_cast<Other*>(other)->threads->help(static_cast<Other*>(other)->number);
    return nullptr;
  }
  void help(int thread) {
    for (int calls = calls_ - 1; !stops_;) {
      auto const is_called = [&] { return calls_.load(std::memory_order_relaxed) != calls; };
      if (!detail::spin(is_called)) calls_.wait(calls);
      calls = calls_;
      work(thread);
    }
  }
  void call() {
    ++calls_;
    calls_.notify_all();
  }

  // Runs tasks until all are claimed.
  void work(int thread) {
    for (Index left = unclaimed_.load(std::memory_order_relaxed); left > 0;) {
      if (!unclaimed_.compare_exchange_weak(left, left - 1, std::memory_order_acquire, std::memory_order_relaxed)) continue;
      run_task(loop_.count - left, thread);
      left = unclaimed_.load(std::memory_order_relaxed);
    }
  }
  void run_task(Index task, int thread) {
    try {
      loop_.run(loop_.body, task, thread);
    } catch (...) {
      failure_->keep(task);
    }
    if (--unfinished_ == 0) unfinished_.notify_one();   // the caller
  }
  void wait_for_begun() {
    if (detail::spin([&] { return unfinished_ == 0; })) return;
    for (Index left = unfinished_; left > 0; left = unfinished_) unfinished_.wait(left);
  }

  int count_;
  int forks_ = detail::forks;
  std::vector<Other> others_;
  TaskLoop loop_;
  detail::Failure* failure_ = nullptr;
  std::atomic<bool> stops_ = false;
  std::atomic<int> calls_ = 0;   // changes whenever there is something to do
  // Each has a line of the cache of its own, because threads that look for a call would slow those that claim.
  alignas(64) std::atomic<Index> unclaimed_ = 0;
  alignas(64) std::atomic<Index> unfinished_ = 0;
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::cpu
#endif
