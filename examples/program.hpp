// What every program here does, whatever it is for: errors and exit codes, signals, and words that cannot be written.
//
//   int main(int argc, char** argv) {
//     return program::run("train", argc, argv, [&] { ...; return 0; });
//   }
//
// Exit codes: 2 after an error, 128 + the signal's number after an interrupt, 141 when nobody reads stdout any more.
#ifndef HYBRIDATTN_EXAMPLES_PROGRAM_HPP
#define HYBRIDATTN_EXAMPLES_PROGRAM_HPP

#include <hybridattn/core/memory.hpp>
#include <hybridattn/io/atomic_file.hpp>
#include <hybridattn/io/escaped.hpp>

#include <fcntl.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <filesystem>
#include <new>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#ifndef HYBRIDATTN_VERSION   // by CMake, from the project's
#define HYBRIDATTN_VERSION "unknown"
#endif

namespace program {

namespace ha = hybridattn;

inline constexpr int error_code = 2, closed_pipe_code = 128 + SIGPIPE;

// Thrown when nobody reads what is written any more: the program ends without a word.
struct ClosedPipe {};
// Thrown when the command line asks for a text, not for work: --help, --version.
struct Answer {
  std::string text;
};

inline std::string command;   // the command line, once `run` has begun

// One line, whatever stands in a name: control characters become \x0a and the like.
inline std::string one_line(std::string_view text) {
  static constexpr std::string_view digits = "0123456789abcdef";
  std::string line;
  for (char const c : text) {
    auto const byte = static_cast<unsigned char>(c);
    if (byte >= 32 && byte != 127) line += c;
    else line += {'\\', 'x', digits[byte >> 4], digits[byte & 15]};
  }
  return line;
}

// A text's name in one line, as results and checkpoints have it. Throws where JSON cannot hold it.
inline std::string text_name(std::string const& name) {
  for (std::string_view rest = name; !rest.empty();) {
    std::size_t const bytes = ha::utf8::first_character(rest).bytes;
    ha::check(bytes > 0, "the text's name '", name, "' is not UTF-8 and cannot be written into the results; give it another name");
    rest.remove_prefix(bytes);
  }
  return one_line(name);
}

// Throws unless all that was said so far could be written.
inline void check_stdout(bool written) {
  if (!written && errno == EPIPE) throw ClosedPipe{};
  ha::check(written, "cannot write to stdout: ", std::strerror(errno));
}
// To stdout: at once on a terminal, else with the next flush. A result that nobody gets is none: throws ha::Error.
inline void say_text(std::string_view text) { check_stdout(std::fwrite(text.data(), 1, text.size(), stdout) == text.size()); }
inline void flush_stdout() { check_stdout(std::fflush(stdout) == 0 && std::ferror(stdout) == 0); }
[[gnu::format(printf, 1, 2)]] inline std::string formatted(char const* format, ...) {
  std::va_list values, again;
  va_start(values, format);
  va_copy(again, values);
  std::string text(static_cast<std::size_t>(std::max(0, std::vsnprintf(nullptr, 0, format, values))), '\0');
  std::vsnprintf(text.data(), text.size() + 1, format, again);
  va_end(again);
  va_end(values);
  return text;
}
template <class... Values> void say(char const* format, Values... values) { say_text(formatted(format, values...)); }
// To stderr: how it goes. Only a reader who went away ends the program.
inline void note(std::string_view text) {
  if (std::fwrite(text.data(), 1, text.size(), stderr) != text.size() && errno == EPIPE) throw ClosedPipe{};
}

// What went wrong, in one line with the program's name before it, once.
inline void complain(std::string_view name, std::string_view sentence) {
  std::string const prefix = std::string(name) + ": ";
  std::string const line = one_line(sentence);
  std::fflush(stdout);
  std::fputs(((line.starts_with(prefix) ? "" : prefix) + line + "\n").c_str(), stderr);
}

// A file that is opened gets the lowest number that is free. Were one of 0 to 2 free, what is meant for the terminal would
// land in it.
inline void open_standard_streams() {
  for (int const stream : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO})
    if (::fcntl(stream, F_GETFD) < 0 && ::open("/dev/null", O_RDWR) != stream) ::_exit(error_code);
}

// The signal that asked this program to stop, or 0.
inline std::atomic<int> stop_signal = 0;
inline std::atomic<std::int64_t> stopped_at = 0;
static_assert(std::atomic<int>::is_always_lock_free && std::atomic<std::int64_t>::is_always_lock_free, "used by a signal handler");

inline std::int64_t milliseconds() {
  std::timespec now{};
  ::clock_gettime(CLOCK_MONOTONIC, &now);
  return std::int64_t{now.tv_sec} * 1000 + now.tv_nsec / 1'000'000;
}
// The first one asks, a second one ends. Some programs pass a signal on twice, at once: that is one wish.
inline void on_stop_signal(int signal) {
  int const error = errno;
  if (stop_signal == 0) {
    stopped_at = milliseconds();
    stop_signal = signal;
  } else if (milliseconds() - stopped_at > 200) {
    ::_exit(128 + signal);
  }
  errno = error;
}
inline bool interrupted() { return stop_signal != 0; }
inline int interrupted_code() { return 128 + stop_signal; }

inline void set_stop_handler(void (*handler)(int)) {
  struct sigaction action{};
  action.sa_handler = handler;
  action.sa_flags = SA_RESTART;
  for (int const signal : {SIGINT, SIGTERM}) ::sigaction(signal, &action, nullptr);
}
// From here on Ctrl-C and SIGTERM only set interrupted(). Before, they end the program wherever it is, also while it waits
// for its text.
inline void watch_for_interrupt() { set_stop_handler(on_stop_signal); }

template <class F> int exit_code_of(char const* name, F body) {
  try {
    return body();
  } catch (ClosedPipe const&) {
    return closed_pipe_code;
  } catch (std::bad_alloc const&) {
    complain(name, "there is not enough memory");
  } catch (std::length_error const&) {   // more than memory has addresses
    complain(name, "there is not enough memory");
  } catch (std::exception const& error) {
    complain(name, error.what());
  }
  return error_code;
}
// main() of every program: body() returns the exit code. It may use say() or std::printf.
template <class F> int run(char const* name, int argc, char const* const* argv, F body) {
  open_standard_streams();
  set_stop_handler(SIG_DFL);
  std::signal(SIGPIPE, SIG_IGN);    // a closed pipe becomes ClosedPipe
  ha::ignore_file_size_signal();    // a full disk becomes an error with a name
  for (int i = 0; i < argc; ++i) command.append(i > 0 ? " " : "").append(argv[i]);
  return exit_code_of(name, [&] {
    try {
      int const code = body();
      flush_stdout();
      return code;
    } catch (Answer const& answer) {
      say_text(answer.text);
      flush_stdout();
      return 0;
    }
  });
}
// For programs without arguments.
template <class F> int run_without_options(char const* name, int argc, char const* const* argv, F body) {
  return run(name, argc, argv, [&] {
    std::string const word = argc > 1 ? argv[1] : "";
    if (word == "--version") throw Answer{std::string(name) + " (hybridattn) " HYBRIDATTN_VERSION "\n"};
    ha::check(argc <= 1, "'", word, "' is not allowed; there are no options but --version");
    return body();
  });
}

// What a program may take of the host's memory: all of it, or what this process is allowed to. In bytes.
inline double memory_limit() {
  auto const bytes = static_cast<double>(ha::machine_memory());
  rlimit limit{};
  bool const limited = ::getrlimit(RLIMIT_AS, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY;
  return limited ? std::min(bytes, static_cast<double>(limit.rlim_cur)) : bytes;
}
inline std::string size_text(double bytes) {
  return bytes < 1e6 ? formatted("%.0f bytes", bytes) : bytes < 1e9 ? formatted("%.1f MB", bytes / 1e6) : formatted("%.4g GB", bytes / 1e9);
}
// Throws when there is no memory for `bytes` bytes of `what`, the least that the work needs: "a cache of 5 tokens".
inline void check_memory(double bytes, std::string const& what, double limit = memory_limit()) {
  ha::check(bytes <= limit, what, " takes ", size_text(bytes), "; there is memory for ", size_text(limit));
}

// Throws unless `path` can be written now, with `bytes` bytes.
inline void check_writable(std::filesystem::path const& path, double bytes = 0) {
  auto const target = ha::AtomicFile{path}.path();
  rlimit limit{};
  if (::getrlimit(RLIMIT_FSIZE, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY)
    ha::check(bytes <= static_cast<double>(limit.rlim_cur), "cannot write ", path, ": ", size_text(bytes), " are too large for a limit of ",
              size_text(static_cast<double>(limit.rlim_cur)), " a file (ulimit -f)");
  std::error_code error;
  auto const space = std::filesystem::space(target.has_parent_path() ? target.parent_path() : ".", error);
  if (!error && space.capacity > 0)
    ha::check(bytes <= static_cast<double>(space.available), "cannot write ", path, ": ", size_text(bytes),
              " are needed, and the disk has space for ", size_text(static_cast<double>(space.available)));
}
// Holds a file or a folder for this process: while it lives, a second one of the same name is refused and told by whom. The
// system releases it whatever way the process ends; the small file that says so may then stay, and is taken over.
class InUse {
 public:
  // The file of a file NAME is NAME.lock, that of a folder is .lock inside it.
  explicit InUse(std::filesystem::path const& what) {
    std::error_code ignored;
    auto const target = ha::target_of(what);
    path_ = std::filesystem::is_directory(target, ignored) ? target / ".lock" : std::filesystem::path{target.string() + ".lock"};
    while (!take(what)) lock_ = ha::FileDescriptor{};
    sign();
  }
  InUse(InUse const&) = delete;
  InUse& operator=(InUse const&) = delete;
  ~InUse() { ::unlink(path_.c_str()); }

 private:
  // False where the file was deleted by its last user in between.
  bool take(std::filesystem::path const& what) {
    lock_ = ha::FileDescriptor{ha::uninterrupted([&] { return ::open(path_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0666); })};
    ha::check(static_cast<bool>(lock_), "cannot write ", path_, ": ", std::strerror(errno));
    if (ha::uninterrupted([&] { return ::flock(lock_.number(), LOCK_EX | LOCK_NB); }) != 0)
      ha::check(errno != EWOULDBLOCK, what, " is in use by ", user(), "; wait until that ends, or take another --out");
    struct stat held, named;
    return ::fstat(lock_.number(), &held) == 0 && ::stat(path_.c_str(), &named) == 0 && held.st_ino == named.st_ino &&
           held.st_dev == named.st_dev;
  }
  std::string user() const {
    char text[1000];
    ssize_t length = 0;
    for (int attempt = 0; attempt < 50 && length <= 0; ++attempt) {   // it may be about to sign
      length = ::pread(lock_.number(), text, sizeof text, 0);
      if (length <= 0) ::usleep(10'000);
    }
    return length > 0 ? one_line({text, static_cast<std::size_t>(length)}) : "another process";
  }
  void sign() {
    char host[256] = "?", start[32] = "?";
    ::gethostname(host, sizeof host - 1);
    std::time_t const now = std::time(nullptr);
    std::tm utc{};
    if (::gmtime_r(&now, &utc) != nullptr) std::strftime(start, sizeof start, "%Y-%m-%d %H:%M:%S UTC", &utc);
    std::string const text = "process " + std::to_string(::getpid()) + " on " + host + " since " + start + " (" + one_line(command) + ")";
    int error = ::ftruncate(lock_.number(), 0) == 0 ? 0 : errno;
    for (std::string_view left = text; error == 0 && !left.empty();) {
      auto const written = ha::uninterrupted([&] { return ::write(lock_.number(), left.data(), left.size()); });
      if (written < 0) error = errno;
      else left.remove_prefix(static_cast<std::size_t>(written));
    }
    if (error == 0) return;
    ::unlink(path_.c_str());
    ha::fail("cannot write ", path_, ": ", std::strerror(error));
  }

  std::filesystem::path path_;
  ha::FileDescriptor lock_;
};

}  // namespace program
#endif
