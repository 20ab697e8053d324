// Makes the n-th call of one function fail, in a program that is started with this library preloaded:
//   FILE_FAULT="write 3 ENOSPC" FILE_FAULT_MARK=fired LD_PRELOAD=./file_faults.so PROGRAM
// The functions are open (of a new file), write, fsync, close, rename and read. EIO, EINTR and SHORT (which writes or reads half) fail one
// call, ENOSPC fails this call and all later ones, and KILL ends the process before the call. Calls on standard streams never fail. The
// file FILE_FAULT_MARK is made when the call fails.
#include <cerrno>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include <dlfcn.h>
#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

enum class Fault { none, error, half };

struct Plan {
  char call[16] = "", kind[16] = "";
  long at = 0, seen = 0;

  Plan() {
    char const* const words = std::getenv("FILE_FAULT");
    if (words != nullptr && std::sscanf(words, "%15s %ld %15s", call, &at, kind) != 3) std::abort();
  }
  bool is(char const* word) const { return std::strcmp(kind, word) == 0; }

  // Returns what happens to this call, and sets errno.
  Fault next(char const* name) {
    if (std::strcmp(name, call) != 0) return Fault::none;
    ++seen;
    if (seen < at || (seen > at && !is("ENOSPC"))) return Fault::none;
    if (char const* const mark = std::getenv("FILE_FAULT_MARK"); mark != nullptr)
      ::syscall(SYS_close, ::syscall(SYS_openat, AT_FDCWD, mark, O_CREAT | O_WRONLY, 0600));
    if (is("KILL")) ::raise(SIGKILL);
    errno = is("ENOSPC") ? ENOSPC : is("EINTR") ? EINTR : EIO;
    return is("SHORT") ? Fault::half : Fault::error;
  }
};
Plan& plan() {
  static Plan one;
  return one;
}
template <class F> F* real(char const* name) { return reinterpret_cast<F*>(::dlsym(RTLD_NEXT, name)); }

int open_for_real(char const* name, char const* path, int flags, mode_t mode) {
  if ((flags & O_CREAT) != 0 && plan().next("open") != Fault::none) return -1;
  return real<int(char const*, int, ...)>(name)(path, flags, mode);
}

}  // namespace

extern "C" {

int open(char const* path, int flags, ...) {
  std::va_list arguments;
  va_start(arguments, flags);
  mode_t const mode = (flags & O_CREAT) != 0 ? va_arg(arguments, mode_t) : 0;
  va_end(arguments);
  return open_for_real("open", path, flags, mode);
}
int open64(char const* path, int flags, ...) {
  std::va_list arguments;
  va_start(arguments, flags);
  mode_t const mode = (flags & O_CREAT) != 0 ? va_arg(arguments, mode_t) : 0;
  va_end(arguments);
  return open_for_real("open64", path, flags, mode);
}
ssize_t write(int file, void const* bytes, size_t count) {
  Fault const fault = file > 2 ? plan().next("write") : Fault::none;
  if (fault == Fault::error) return -1;
  return real<ssize_t(int, void const*, size_t)>("write")(file, bytes, fault == Fault::half && count > 1 ? count / 2 : count);
}
ssize_t read(int file, void* bytes, size_t count) {
  Fault const fault = file > 2 ? plan().next("read") : Fault::none;
  if (fault == Fault::error) return -1;
  return real<ssize_t(int, void*, size_t)>("read")(file, bytes, fault == Fault::half && count > 1 ? count / 2 : count);
}
ssize_t pread(int file, void* bytes, size_t count, off_t offset) {
  Fault const fault = plan().next("read");
  if (fault == Fault::error) return -1;
  return real<ssize_t(int, void*, size_t, off_t)>("pread")(file, bytes, fault == Fault::half && count > 1 ? count / 2 : count, offset);
}
int fsync(int file) { return plan().next("fsync") != Fault::none ? -1 : real<int(int)>("fsync")(file); }
int rename(char const* from, char const* to) {
  return plan().next("rename") != Fault::none ? -1 : real<int(char const*, char const*)>("rename")(from, to);
}
// Linux closes a file even if close returns an error.
int close(int file) {
  Fault const fault = file > 2 ? plan().next("close") : Fault::none;
  int const error = errno, result = real<int(int)>("close")(file);
  if (fault == Fault::none) return result;
  errno = error;
  return -1;
}
}
