// Functions that stop in the middle and go on later, each on a stack of its own (Boost.Context).
#ifndef HYBRIDATTN_BACKEND_EMULATOR_FIBER_HPP
#define HYBRIDATTN_BACKEND_EMULATOR_FIBER_HPP

#include <hybridattn/core/check.hpp>
#include <hybridattn/core/config.hpp>

#include <boost/context/detail/fcontext.hpp>
#include <sys/mman.h>

#include <cstddef>
#include <mutex>
#include <vector>

#if HYBRIDATTN_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if HYBRIDATTN_TSAN
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(char const* file, int line);
void AnnotateIgnoreReadsEnd(char const* file, int line);
void AnnotateIgnoreWritesBegin(char const* file, int line);
void AnnotateIgnoreWritesEnd(char const* file, int line);
}
#endif

namespace hybridattn::inline HYBRIDATTN_ABI::emulator {

// The thread sanitizer sees each fiber as a thread. Unwatched hides the engine's own memory from it, Watched shows the kernel's again.
#if HYBRIDATTN_TSAN
struct Unwatched {
  Unwatched() { begin(); }
  Unwatched(Unwatched const&) = delete;
  Unwatched& operator=(Unwatched const&) = delete;
  ~Unwatched() { end(); }
  static void begin() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  static void end() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
};
struct Watched {
  Watched() { Unwatched::end(); }
  Watched(Watched const&) = delete;
  Watched& operator=(Watched const&) = delete;
  ~Watched() { Unwatched::begin(); }
};
// What a thread did before release(meeting) is seen by the threads that acquire(meeting) later.
inline void release(void* meeting) { __tsan_release(meeting); }
inline void acquire(void* meeting) { __tsan_acquire(meeting); }
#else
struct Unwatched {
  Unwatched() {}
};
struct Watched {
  Watched() {}
};
inline void release(void*) {}
inline void acquire(void*) {}
#endif

// Stacks for fibers. A stack that a fiber gives back serves a later one, so that an emulator starts quickly.
class Stacks {
 public:
  static constexpr std::size_t bytes = std::size_t{256} << 10;   // of addresses; pages come when they are touched

  // The lowest address of a stack. Throws Error where the system refuses it.
  static char* take() {
    std::lock_guard const lock(mutex());
    if (!free().empty()) {
      char* const stack = free().back();
      free().pop_back();
      return stack;
    }
    void* const memory = mmap(nullptr, bytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    check(memory != MAP_FAILED, "Emulator: the system refuses ", bytes, " bytes for the stack of a thread");
    mprotect(memory, page, PROT_NONE);   // a stack that is too small ends the program here
    return static_cast<char*>(memory) + page;
  }
  static void give(char* stack) {
    std::lock_guard const lock(mutex());
    free().push_back(stack);
  }

 private:
  static constexpr std::size_t page = 4096;
  // Both live as long as the program, because an emulator may live that long.
  static std::vector<char*>& free() {
    static auto* const list = new std::vector<char*>;
    return *list;
  }
  static std::mutex& mutex() {
    static auto* const only = new std::mutex;
    return *only;
  }
};

class Fiber {
 public:
  Fiber() = default;
  Fiber(Fiber const&) = delete;
  Fiber& operator=(Fiber const&) = delete;
  ~Fiber() {
#if HYBRIDATTN_TSAN
    if (stack_ != nullptr && as_thread_ != nullptr) __tsan_destroy_fiber(as_thread_);
#endif
    if (stack_ == nullptr) return;
    clear_stack();
    Stacks::give(stack_);
  }

  // The next switch to this fiber calls entry(argument), which may not return. What the fiber did before is forgotten.
  void start(void (*entry)(void*), void* argument) {
    if (stack_ == nullptr) take_stack();
    clear_stack();
    entry_ = entry;
    argument_ = argument;
    context_ = boost::context::detail::make_fcontext(stack_ + Stacks::bytes, Stacks::bytes, enter);
#if HYBRIDATTN_TSAN
    if (as_thread_ != nullptr) __tsan_destroy_fiber(as_thread_);
    as_thread_ = __tsan_create_fiber(0);
#endif
  }
  // The calling thread's own stack becomes this fiber.
  void adopt_thread() {
#if HYBRIDATTN_TSAN
    as_thread_ = __tsan_get_current_fiber();
#endif
#if HYBRIDATTN_ASAN
    sanitizer_bottom_ = nullptr;   // learned when the first fiber begins
#endif
  }

  // Goes on in `to`, until something switches back to this fiber.
#if HYBRIDATTN_TSAN
  __attribute__((no_sanitize_thread))
#endif
  void
  switch_to(Fiber& to) {
    Leaving leaving{this, &to};
#if HYBRIDATTN_ASAN
    __sanitizer_start_switch_fiber(&fake_stack_, to.sanitizer_bottom_, to.sanitizer_size_);
#endif
#if HYBRIDATTN_TSAN
    __tsan_switch_to_fiber(to.as_thread_, __tsan_switch_to_fiber_no_sync);
#endif
    arrived(boost::context::detail::jump_fcontext(to.context_, &leaving));
  }

 private:
  struct Leaving {
    Fiber *from, *to;
  };

  void take_stack() {
    stack_ = Stacks::take();
#if HYBRIDATTN_ASAN
    sanitizer_bottom_ = stack_;
    sanitizer_size_ = Stacks::bytes;
#endif
  }
  void clear_stack() {
#if HYBRIDATTN_ASAN
    __asan_unpoison_memory_region(stack_, Stacks::bytes);   // of a function that was stopped for ever
    fake_stack_ = nullptr;
#endif
#if HYBRIDATTN_TSAN   // new memory, where the sanitizer knows of no earlier thread
    mmap(stack_, Stacks::bytes, PROT_READ | PROT_WRITE, MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
#endif
  }
  HYBRIDATTN_UNWATCHED static void arrived(boost::context::detail::transfer_t transfer) {
    auto const [from, to] = *static_cast<Leaving*>(transfer.data);
    from->context_ = transfer.fctx;
#if HYBRIDATTN_ASAN
    void const* bottom;
    std::size_t size;
    __sanitizer_finish_switch_fiber(to->fake_stack_, &bottom, &size);
    if (from->stack_ == nullptr) {
      from->sanitizer_bottom_ = bottom;
      from->sanitizer_size_ = size;
    }
#else
    (void)to;
#endif
  }
  HYBRIDATTN_UNWATCHED static void enter(boost::context::detail::transfer_t transfer) {
    Fiber& self = *static_cast<Leaving*>(transfer.data)->to;
    arrived(transfer);
    self.entry_(self.argument_);
  }

  char* stack_ = nullptr;   // nullptr: the stack of a thread
  boost::context::detail::fcontext_t context_ = nullptr;
  void (*entry_)(void*) = nullptr;
  void* argument_ = nullptr;
#if HYBRIDATTN_ASAN
  void* fake_stack_ = nullptr;
  void const* sanitizer_bottom_ = nullptr;
  std::size_t sanitizer_size_ = 0;
#endif
#if HYBRIDATTN_TSAN
  void* as_thread_ = nullptr;
#endif
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::emulator
#endif
