// Makes one of the program's reads fail, as a broken disk does. Include it in one source file of a program.
#ifndef HYBRIDATTN_TESTS_FAILING_READ_HPP
#define HYBRIDATTN_TESTS_FAILING_READ_HPP

#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>

namespace failing_read {

inline int done = 0, which = -1;   // calls of pread so far, and the call that fails or -1

// Returns how many reads f does when none fails.
template <class F> int count(F f) {
  which = -1;
  done = 0;
  f();
  return done;
}
template <class F> void at(int read, F f) {
  which = read;
  done = 0;
  f();
  which = -1;
}

}  // namespace failing_read

// Replaces the system's pread. It has pread's name only for the linker, because headers of a hardened libc define pread already.
extern "C" ssize_t hybridattn_failing_pread(int file, void* into, size_t count, off_t offset) __asm__("pread");
extern "C" ssize_t hybridattn_failing_pread(int file, void* into, size_t count, off_t offset) {
  if (failing_read::done++ != failing_read::which) return ::syscall(SYS_pread64, file, into, count, offset);
  errno = EIO;
  return -1;
}

#endif
