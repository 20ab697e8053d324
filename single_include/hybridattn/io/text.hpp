// <hybridattn/io/text.hpp> as one file, written by scripts/single_include: it and all that it needs of hybridattn, a library of
// language models with hybrid attention. The other files of single_include may stand beside it.
// SPDX-License-Identifier: MIT
// Copyright (c) 2026 the hybridattn authors

#include <algorithm>
#include <array>
#include <cerrno>
#include <concepts>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fcntl.h>
#include <filesystem>
#include <limits>
#include <new>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>
#include <utility>
#include <vector>
#include <version>

// ==== hybridattn/core/config.hpp
// Macros that say which compiler this is and what it can do. Only this header asks the compiler.
#ifndef HYBRIDATTN_CORE_CONFIG_HPP
#define HYBRIDATTN_CORE_CONFIG_HPP

#if defined(__FAST_MATH__)
#error "hybridattn needs IEEE arithmetic: its causality is bitwise and its masks are infinities. Build without -ffast-math."
#endif

// HD stands in front of a function of the host and of kernels, DEVICE in front of a function of kernels alone.
// UNROLL_IN_KERNEL stands in front of a loop with few, constant turns in a kernel, UNROLL_8_IN_KERNEL in front of one with many,
// UNROLL_4_IN_KERNEL and UNROLL_2_IN_KERNEL in front of one with many that each fill many registers.
#if defined(__CUDACC__)
#define HYBRIDATTN_CUDA 1
#define HYBRIDATTN_HD __host__ __device__
#define HYBRIDATTN_DEVICE __device__ __forceinline__
#define HYBRIDATTN_UNROLL_IN_KERNEL _Pragma("unroll")
#define HYBRIDATTN_UNROLL_8_IN_KERNEL _Pragma("unroll 8")
#define HYBRIDATTN_UNROLL_4_IN_KERNEL _Pragma("unroll 4")
#define HYBRIDATTN_UNROLL_2_IN_KERNEL _Pragma("unroll 2")
#else
#define HYBRIDATTN_CUDA 0
#define HYBRIDATTN_HD
#define HYBRIDATTN_DEVICE inline
#define HYBRIDATTN_UNROLL_IN_KERNEL
#define HYBRIDATTN_UNROLL_8_IN_KERNEL
#define HYBRIDATTN_UNROLL_4_IN_KERNEL
#define HYBRIDATTN_UNROLL_2_IN_KERNEL
#endif

// Whether the program links cuBLAS: the CMake target hybridattn::cuda_cublas says so.
#if !defined(HYBRIDATTN_CUBLAS)
#define HYBRIDATTN_CUBLAS 0
#endif

// Ends the program or the kernel, where an index is out of bounds.
#if defined(__CUDA_ARCH__)
#define HYBRIDATTN_ABORT() __trap()
#else
#define HYBRIDATTN_ABORT() std::abort()
#endif

// Sanitizers of addresses and of threads: the emulator tells them when it changes stacks.
#if defined(__has_feature)
#define HYBRIDATTN_HAS_FEATURE(feature) __has_feature(feature)
#else
#define HYBRIDATTN_HAS_FEATURE(feature) 0
#endif
#if defined(__SANITIZE_ADDRESS__) || HYBRIDATTN_HAS_FEATURE(address_sanitizer)
#define HYBRIDATTN_ASAN 1
#else
#define HYBRIDATTN_ASAN 0
#endif
#if defined(__SANITIZE_THREAD__) || HYBRIDATTN_HAS_FEATURE(thread_sanitizer)
#define HYBRIDATTN_TSAN 1
#define HYBRIDATTN_UNWATCHED __attribute__((no_sanitize_thread))   // a function whose own reads and writes the sanitizer ignores
#else
#define HYBRIDATTN_TSAN 0
#define HYBRIDATTN_UNWATCHED
#endif

#define HYBRIDATTN_INLINE inline __attribute__((always_inline))
// On a lambda: [&](int i) HYBRIDATTN_INLINE_LAMBDA { ... }
#define HYBRIDATTN_INLINE_LAMBDA __attribute__((always_inline))

#define HYBRIDATTN_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define HYBRIDATTN_UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__) && !defined(__CUDACC__)
#define HYBRIDATTN_UNROLL _Pragma("GCC unroll 16")
#else
#define HYBRIDATTN_UNROLL
#endif

// Indices are checked in debug builds only, because the innermost loops use views.
#if defined(NDEBUG) && !defined(HYBRIDATTN_BOUNDS_CHECKS)
#define HYBRIDATTN_BOUNDS_CHECKS 0
#elif !defined(HYBRIDATTN_BOUNDS_CHECKS)
#define HYBRIDATTN_BOUNDS_CHECKS 1
#endif

// The library's code depends on some compiler flags. The name of everything that it defines, except Error, has these flags in it:
//   namespace hybridattn::inline HYBRIDATTN_ABI { ... }
// So object files that were compiled with different flags have different functions, and the linker merges none of them.
// A function that takes or returns a type of the library links only between equal flags. docs/conventions.md says more.
#if defined(__AVX512F__)
#define HYBRIDATTN_ABI_VECTORS v64
#elif defined(__AVX2__)
#define HYBRIDATTN_ABI_VECTORS v32i
#elif defined(__AVX__)
#define HYBRIDATTN_ABI_VECTORS v32
#else
#define HYBRIDATTN_ABI_VECTORS v16
#endif
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
#define HYBRIDATTN_ABI_FMA _fma
#else
#define HYBRIDATTN_ABI_FMA
#endif
#if defined(__AVX512BF16__)
#define HYBRIDATTN_ABI_BF16 _bf16
#else
#define HYBRIDATTN_ABI_BF16
#endif
#if HYBRIDATTN_BOUNDS_CHECKS
#define HYBRIDATTN_ABI_CHECKS _checked
#else
#define HYBRIDATTN_ABI_CHECKS
#endif
#if defined(__OPTIMIZE__)   // compilers form FMAs, and round less, only when they optimise
#define HYBRIDATTN_ABI_OPTIMIZED
#else
#define HYBRIDATTN_ABI_OPTIMIZED _O0
#endif
#if HYBRIDATTN_CUDA && HYBRIDATTN_CUBLAS
#define HYBRIDATTN_ABI_COMPILER _nvcc_cublas
#elif HYBRIDATTN_CUDA
#define HYBRIDATTN_ABI_COMPILER _nvcc
#elif defined(__clang__)
#define HYBRIDATTN_ABI_COMPILER _clang
#else
#define HYBRIDATTN_ABI_COMPILER
#endif
#if defined(_LIBCPP_VERSION)   // the library's types have members of the standard library's types
#define HYBRIDATTN_ABI_STD _libcxx
#elif defined(_GLIBCXX_DEBUG)
#define HYBRIDATTN_ABI_STD _std_debug
#else
#define HYBRIDATTN_ABI_STD
#endif
#if HYBRIDATTN_ASAN
#define HYBRIDATTN_ABI_SANITIZER _asan
#elif HYBRIDATTN_TSAN
#define HYBRIDATTN_ABI_SANITIZER _tsan
#else
#define HYBRIDATTN_ABI_SANITIZER
#endif
#define HYBRIDATTN_JOIN(a, b, c, d, e, f, g, h) a##b##c##d##e##f##g##h
#define HYBRIDATTN_JOIN_VALUES(a, b, c, d, e, f, g, h) HYBRIDATTN_JOIN(a, b, c, d, e, f, g, h)
#define HYBRIDATTN_ABI                                                                                              \
  HYBRIDATTN_JOIN_VALUES(HYBRIDATTN_ABI_VECTORS, HYBRIDATTN_ABI_FMA, HYBRIDATTN_ABI_BF16, HYBRIDATTN_ABI_CHECKS, \
                         HYBRIDATTN_ABI_OPTIMIZED, HYBRIDATTN_ABI_COMPILER, HYBRIDATTN_ABI_STD, HYBRIDATTN_ABI_SANITIZER)

// A function's mangled name has the types of its arguments only. With this attribute it also has the type of its result, and a
// variable's name has the variable's type.
namespace hybridattn {
inline namespace HYBRIDATTN_ABI __attribute__((__abi_tag__)) {}
}  // namespace hybridattn

#endif

// ==== hybridattn/core/check.hpp
// Errors: one clear sentence that names the wrong value and the allowed values.
#ifndef HYBRIDATTN_CORE_CHECK_HPP
#define HYBRIDATTN_CORE_CHECK_HPP

namespace hybridattn {

// The only type that the library throws. Its name has no flags (HYBRIDATTN_ABI) in it, so every object file of a program can catch it.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace hybridattn

namespace hybridattn::inline HYBRIDATTN_ABI {

// The parts written one after the other.
template <class... Parts> [[gnu::cold, gnu::noinline]] std::string sentence(Parts const&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}
// Throws Error with the parts written one after the other. The sentence is built only when the check fails.
template <class... Parts> [[noreturn, gnu::cold, gnu::noinline]] void fail(Parts const&... parts) { throw Error(sentence(parts...)); }
template <class... Parts> void check(bool holds, Parts const&... parts) {
  if (!holds) fail(parts...);
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/core/sizes.hpp
// Sizes that a caller or a file chooses. Their products and sums are exact, or throw an Error that names the sizes.
#ifndef HYBRIDATTN_CORE_SIZES_HPP
#define HYBRIDATTN_CORE_SIZES_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

using Index = std::ptrdiff_t;

// The limit of tokens, positions, sequences and experts, whose tables hold int32.
inline constexpr Index largest_int32 = std::numeric_limits<std::int32_t>::max();

namespace detail {

[[noreturn]] inline void fail_sizes(Index const* sizes, int number) {
  std::ostringstream list;
  bool negative = false;
  for (int i = 0; i < number; ++i) {
    list << (i == 0 ? "" : ", ") << sizes[i];
    negative = negative || sizes[i] < 0;
  }
  if (negative) fail("sizes [", list.str(), "]: none may be below 0");
  fail("sizes [", list.str(), "]: their product is too large; the largest number is ", std::numeric_limits<Index>::max());
}
// A 0 makes the product 0, but the other sizes are still checked.
constexpr Index product(Index const* sizes, int number) {
  Index all = 1;
  bool empty = false, counts = true;
  for (int i = 0; i < number; ++i) {
    counts = counts && sizes[i] >= 0 && !__builtin_mul_overflow(all, sizes[i] == 0 ? 1 : sizes[i], &all);
    empty = empty || sizes[i] == 0;
  }
  if (!counts) fail_sizes(sizes, number);
  return empty ? 0 : all;
}

}  // namespace detail

// The product of sizes. Throws Error where a size is below 0, or where the product of the sizes that are not 0 is too large.
template <std::integral... Sizes> constexpr Index size_product(Sizes... sizes) {
  Index const list[] = {static_cast<Index>(sizes)...};
  return detail::product(list, sizeof...(Sizes));
}
// The sum of two sizes. Throws Error as size_product does.
inline Index size_sum(Index a, Index b) {
  Index total = 0;
  bool const counts = a >= 0 && b >= 0 && !__builtin_add_overflow(a, b, &total);
  check(counts, "sizes ", a, " and ", b, ": none may be below 0, and their sum at most ", std::numeric_limits<Index>::max());
  return total;
}
// The bytes of `count` elements. Throws Error as size_product does.
inline std::size_t byte_count(Index count, std::size_t element) {
  Index bytes = 0;
  bool const counts = count >= 0 && !__builtin_mul_overflow(count, static_cast<Index>(element), &bytes);
  check(counts, count, " elements of ", element, " bytes: their number must be 0 or more, and their bytes at most ",
        std::numeric_limits<Index>::max());
  return static_cast<std::size_t>(bytes);
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/core/memory.hpp
// The machine's memory, and allocations of host memory whose size a caller or a file chooses: an Error says what did not fit.
#ifndef HYBRIDATTN_CORE_MEMORY_HPP
#define HYBRIDATTN_CORE_MEMORY_HPP

#if defined(__linux__)
#include <sys/sysinfo.h>
#endif

namespace hybridattn::inline HYBRIDATTN_ABI {

namespace detail {

// The limit in a file of the system. Without such a file or number there is no limit.
inline std::size_t limit_in(char const* path) {
  unsigned long long limit = 0;
  std::FILE* const file = std::fopen(path, "r");
  if (file == nullptr) return std::numeric_limits<std::size_t>::max();
  bool const read = std::fscanf(file, "%llu", &limit) == 1;
  std::fclose(file);
  return read ? static_cast<std::size_t>(limit) : std::numeric_limits<std::size_t>::max();
}
inline std::size_t memory_of_system() {
#if defined(__linux__)
  struct sysinfo info = {};
  if (sysinfo(&info) != 0) return std::numeric_limits<std::size_t>::max();
  std::size_t const all = (info.totalram + info.totalswap) * info.mem_unit;
  return std::min({all, limit_in("/sys/fs/cgroup/memory.max"), limit_in("/sys/fs/cgroup/memory/memory.limit_in_bytes")});
#else
  return std::numeric_limits<std::size_t>::max();
#endif
}

}  // namespace detail

// Bytes of memory and swap of this machine, or the limit of this container if that is less; read once. A system that
// promises more memory than it has (Linux does) ends the process later, when this memory is used.
inline std::size_t machine_memory() {
  static std::size_t const bytes = detail::memory_of_system();
  return bytes;
}

// Runs f, which takes host memory for `what`. Throws Error where memory is short; the error's sentence begins with `where`.
template <class F> decltype(auto) within_memory(std::size_t bytes, char const* what, F f, std::string_view where = {}) {
  try {
    if (bytes <= machine_memory()) return f();
  } catch (std::bad_alloc const&) {
  } catch (std::length_error const&) {
  }
  fail(where, "out of memory: ", bytes, " bytes for ", what, " did not fit");
}
// Throws Error if `bytes` do not fit. For a check before many small allocations.
inline void check_memory(std::size_t bytes, char const* what) {
  within_memory(bytes, what, [] {});
}
// resize and reserve of a vector, for a count that a caller or a file chooses. Both throw Error where memory is short.
template <class T> void resize(std::vector<T>& list, Index count, char const* what, std::string_view where = {}) {
  within_memory(byte_count(count, sizeof(T)), what, [&] { list.resize(static_cast<std::size_t>(count)); }, where);
}
template <class T> void reserve(std::vector<T>& list, Index count, char const* what) {
  within_memory(byte_count(count, sizeof(T)), what, [&] { list.reserve(static_cast<std::size_t>(count)); });
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/io/atomic_file.hpp
// Files that are never half-written: they are written under a temporary name in the same folder, synced, then renamed.
#ifndef HYBRIDATTN_IO_ATOMIC_FILE_HPP
#define HYBRIDATTN_IO_ATOMIC_FILE_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

// SIGXFSZ kills a process that writes beyond its file size limit. After this call the process gets an Error instead, as on a full
// disk. The call changes the whole process, so only main() should make it.
inline void ignore_file_size_signal() { std::signal(SIGXFSZ, SIG_IGN); }

// Calls f(), a system call, again each time that a signal interrupted it.
template <class F> auto uninterrupted(F f) {
  auto result = f();
  while (result < 0 && errno == EINTR) result = f();
  return result;
}

// An open file of the system. The destructor closes it.
class FileDescriptor {
 public:
  FileDescriptor() = default;
  explicit FileDescriptor(int number) : number_(number) {}
  FileDescriptor(FileDescriptor&& other) noexcept : number_(std::exchange(other.number_, -1)) {}
  FileDescriptor& operator=(FileDescriptor&& other) noexcept {
    std::swap(number_, other.number_);
    return *this;
  }
  ~FileDescriptor() {
    if (number_ >= 0) ::close(number_);
  }
  int number() const { return number_; }
  explicit operator bool() const { return number_ >= 0; }

  // Closes the file now. Returns false when the system reports only here that written bytes are lost. A signal does not keep it open.
  bool close() { return ::close(std::exchange(number_, -1)) == 0 || errno == EINTR; }

 private:
  int number_ = -1;
};

// The temporary name under which process `process` writes the file `name`.
inline std::string partial_name(std::string const& name, int process, int attempt) {
  return name + "." + std::to_string(process) + "-" + std::to_string(attempt) + ".partial";
}
inline bool is_partial_of(std::string_view file, std::string_view name) {
  constexpr std::string_view end = ".partial";
  if (!file.starts_with(name) || !file.ends_with(end) || file.size() <= name.size() + end.size()) return false;
  auto const number = file.substr(name.size(), file.size() - name.size() - end.size());
  return number.front() == '.' && number.find_first_not_of("0123456789-", 1) == number.npos;
}

// Deletes the temporary files of `path` whose process was killed. A process locks its temporary file, and the system unlocks the
// file when the process ends in any way.
inline void remove_abandoned(std::filesystem::path const& path) {
  namespace fs = std::filesystem;
  std::string const name = path.filename().string();
  std::error_code error;
  for (fs::directory_iterator it{path.has_parent_path() ? path.parent_path() : ".", error}, end; !error && it != end; it.increment(error)) {
    if (!is_partial_of(it->path().filename().string(), name)) continue;
    FileDescriptor const file{::open(it->path().c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC)};
    if (file && ::flock(file.number(), LOCK_EX | LOCK_NB) == 0) ::unlink(it->path().c_str());
  }
}

// The file that a write to `path` reaches: for a symbolic link its target, which need not exist.
inline std::filesystem::path target_of(std::filesystem::path path) {
  std::error_code error;
  for (int links = 0; std::filesystem::is_symlink(std::filesystem::symlink_status(path, error)); ++links) {
    check(links < 40, "cannot write ", path, ": too many symbolic links, one behind the other");
    auto const next = std::filesystem::read_symlink(path, error);
    check(!error, "cannot write ", path, ": ", error.message());
    path = path.parent_path() / next;   // relative to the link's folder, unless the target is absolute
  }
  return path;
}

// Writes a file: call `write` in order, then `commit`. Before `commit` the file does not exist, or is the old file. Without `commit` the
// temporary file is deleted; the next AtomicFile of this name deletes one that a killed process left. The new file gets the mode of the
// file that it replaces and, where that is allowed, its owner. A symbolic link stays, and its target is replaced. Every failure is
// an Error that names the file.
class AtomicFile {
 public:
  explicit AtomicFile(std::filesystem::path const& path) : path_(target_of(path)) {
    check(path_.has_filename(), "cannot write ", path, ": it is not the name of a file");
    struct stat old;
    bool const replaces = ::stat(path_.c_str(), &old) == 0;
    check(!replaces || S_ISREG(old.st_mode), "cannot write ", path_, ": it exists and is not a file");
    remove_abandoned(path_);
    for (int attempt = 0; !file_; ++attempt) {
      temporary_ = partial_name(path_.string(), ::getpid(), attempt);
      file_ = FileDescriptor{uninterrupted([&] { return ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666); })};
      if (!file_ && (errno != EEXIST || attempt == 1000)) fail_with(errno);
      if (file_ && !lock()) file_ = FileDescriptor{};
    }
    if (replaces && !inherit(old)) discard_and_fail(errno);
  }
  AtomicFile(AtomicFile const&) = delete;
  AtomicFile& operator=(AtomicFile const&) = delete;
  ~AtomicFile() { discard(); }

  void write(std::string_view contents) {
    check(static_cast<bool>(file_), "cannot write ", path_, ": it is closed");
    while (!contents.empty()) {
      auto const written = uninterrupted([&] { return ::write(file_.number(), contents.data(), contents.size()); });
      if (written <= 0) discard_and_fail(written < 0 ? errno : EIO);
      contents.remove_prefix(static_cast<std::size_t>(written));
    }
  }
  void commit() {
    check(static_cast<bool>(file_), "cannot write ", path_, ": it is closed");
    if (uninterrupted([&] { return ::fsync(file_.number()); }) != 0 && errno != EINVAL) discard_and_fail(errno);
    FileDescriptor const still_locked{::dup(file_.number())};   // until the rename
    if (!file_.close()) discard_and_fail(errno);
    if (uninterrupted([&] { return ::rename(temporary_.c_str(), path_.c_str()); }) != 0) discard_and_fail(errno);
    temporary_.clear();
    sync_folder();
  }
  // The given path, with symbolic links followed.
  std::filesystem::path const& path() const { return path_; }

 private:
  [[noreturn]] void fail_with(int error) const { fail("cannot write ", path_, ": ", std::strerror(error)); }
  [[noreturn]] void discard_and_fail(int error) {
    discard();
    fail_with(error);
  }
  // Returns false where another process took the new file for an abandoned one and deleted it. On a file system without locks no
  // process does so.
  bool lock() const {
    struct stat status;
    if (::flock(file_.number(), LOCK_EX | LOCK_NB) != 0) return errno != EWOULDBLOCK;
    return ::fstat(file_.number(), &status) != 0 || status.st_nlink > 0;
  }
  // Sets the owner first, because a change of the owner clears bits of the mode. Where the process may not change the owner, it stays.
  bool inherit(struct stat const& old) const {
    [[maybe_unused]] bool const given = ::fchown(file_.number(), old.st_uid, old.st_gid) == 0;
    return ::fchmod(file_.number(), old.st_mode & 0777) == 0;
  }
  void discard() noexcept {
    file_ = FileDescriptor{};
    if (!temporary_.empty()) ::unlink(temporary_.c_str());
    temporary_.clear();
  }
  // Syncs the folder, so that the new name survives a power cut where the file system can promise that. Throws where the sync fails.
  void sync_folder() const {
    auto const folder = path_.has_parent_path() ? path_.parent_path() : std::filesystem::path{"."};
    FileDescriptor const opened{uninterrupted([&] { return ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC); })};
    if (!opened || uninterrupted([&] { return ::fsync(opened.number()); }) == 0) return;
    if (errno == EIO || errno == ENOSPC || errno == EDQUOT) fail_with(errno);
  }

  std::filesystem::path path_, temporary_;
  FileDescriptor file_;
};

inline void write_file_atomically(std::filesystem::path const& path, std::string_view contents) {
  AtomicFile file{path};
  file.write(contents);
  file.commit();
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif

// ==== hybridattn/io/text.hpp
// Reads texts from files, and the text of an HTML page.
#ifndef HYBRIDATTN_IO_TEXT_HPP
#define HYBRIDATTN_IO_TEXT_HPP

namespace hybridattn::inline HYBRIDATTN_ABI {

// The largest number of bytes of a text: as tokens each byte takes four bytes.
inline std::uint64_t longest_text() { return machine_memory() / 4; }

// All bytes of a file, or of a pipe up to its end. Throws Error where reading fails, and on empty or too long texts.
inline std::string read_text(std::filesystem::path const& path) {
  FileDescriptor const file{uninterrupted([&] { return ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOCTTY); })};
  bool const missing = !file && (errno == ENOENT || errno == ENOTDIR);
  check(static_cast<bool>(file), "cannot read ", path, ": ",
        missing           ? "there is no such file"
        : errno == EACCES ? "no permission"
                          : std::strerror(errno));
  struct stat status;
  check(::fstat(file.number(), &status) == 0, "cannot read ", path, ": ", std::strerror(errno));
  check(!S_ISDIR(status.st_mode), "cannot read ", path, ": it is a folder; name the files in it");
  auto const check_length = [&](std::uint64_t length) {
    check(length <= longest_text(), "cannot use ", path, ": it has more than ", longest_text(),
          " bytes; as tokens they would not fit into this machine's memory");
  };
  std::string text;
  try {
    if (S_ISREG(status.st_mode)) {
      check_length(static_cast<std::uint64_t>(status.st_size));
      text.reserve(static_cast<std::size_t>(status.st_size));
    }
    std::vector<char> part(std::size_t{1} << 16);
    while (true) {
      auto const got = uninterrupted([&] { return ::read(file.number(), part.data(), part.size()); });
      check(got >= 0, "cannot read ", path, ": ", std::strerror(errno));
      if (got == 0) break;
      text.append(part.data(), static_cast<std::size_t>(got));
      check_length(text.size());
    }
  } catch (std::bad_alloc const&) {
    fail("cannot use ", path, ": there is no memory for more than ", text.size(), " bytes of it");
  }
  check(!text.empty(), "cannot use ", path, ": it is empty");
  return text;
}
// The bytes of several files, one after the other.
inline std::string read_text(std::vector<std::filesystem::path> const& paths) {
  check(!paths.empty(), "cannot read a text: no file is named");
  std::string text;
  for (auto const& path : paths) {
    std::string const next = read_text(path);
    within_memory(text.size() + next.size(), "texts", [&] { text += next; });
  }
  return text;
}

namespace html {

inline bool is_space(char c) { return c == ' ' || c == '\t' || c == '\n' || c == '\r' || c == '\f'; }
inline bool is_letter(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); }
inline bool is_digit(char c) { return c >= '0' && c <= '9'; }
inline std::string lower(std::string_view word) {
  std::string result{word};
  for (char& c : result) c = c >= 'A' && c <= 'Z' ? static_cast<char>(c + ('a' - 'A')) : c;
  return result;
}

// Appends a code point as UTF-8. 0, surrogates and too large numbers become the replacement character.
inline void append_utf8(std::string& text, std::uint32_t point) {
  if (point == 0 || point > 0x10ffff || (point >= 0xd800 && point < 0xe000)) point = 0xfffd;
  auto const byte = [&](std::uint32_t value) { text += static_cast<char>(value); };
  auto const tail = [&](int shift) { byte(0x80 | (point >> shift & 0x3f)); };
  if (point < 0x80) return byte(point);
  if (point < 0x800) return byte(0xc0 | point >> 6), tail(0);
  if (point < 0x10000) return byte(0xe0 | point >> 12), tail(6), tail(0);
  byte(0xf0 | point >> 18), tail(12), tail(6), tail(0);
}

// Code points 160 to 255, in order.
inline constexpr std::array<std::string_view, 96> latin1 = {
    "nbsp",   "iexcl",  "cent",   "pound",  "curren", "yen",    "brvbar", "sect",   "uml",    "copy",   "ordf",   "laquo",
    "not",    "shy",    "reg",    "macr",   "deg",    "plusmn", "sup2",   "sup3",   "acute",  "micro",  "para",   "middot",
    "cedil",  "sup1",   "ordm",   "raquo",  "frac14", "frac12", "frac34", "iquest", "Agrave", "Aacute", "Acirc",  "Atilde",
    "Auml",   "Aring",  "AElig",  "Ccedil", "Egrave", "Eacute", "Ecirc",  "Euml",   "Igrave", "Iacute", "Icirc",  "Iuml",
    "ETH",    "Ntilde", "Ograve", "Oacute", "Ocirc",  "Otilde", "Ouml",   "times",  "Oslash", "Ugrave", "Uacute", "Ucirc",
    "Uuml",   "Yacute", "THORN",  "szlig",  "agrave", "aacute", "acirc",  "atilde", "auml",   "aring",  "aelig",  "ccedil",
    "egrave", "eacute", "ecirc",  "euml",   "igrave", "iacute", "icirc",  "iuml",   "eth",    "ntilde", "ograve", "oacute",
    "ocirc",  "otilde", "ouml",   "divide", "oslash", "ugrave", "uacute", "ucirc",  "uuml",   "yacute", "thorn",  "yuml"};

struct Named {
  std::string_view name;
  std::uint32_t point;
};
inline constexpr std::array punctuation = {
    Named{"amp", '&'},       Named{"lt", '<'},       Named{"gt", '>'},        Named{"quot", '"'},      Named{"apos", '\''},
    Named{"ndash", 0x2013},  Named{"mdash", 0x2014}, Named{"lsquo", 0x2018},  Named{"rsquo", 0x2019},  Named{"sbquo", 0x201a},
    Named{"ldquo", 0x201c},  Named{"rdquo", 0x201d}, Named{"bdquo", 0x201e},  Named{"dagger", 0x2020}, Named{"bull", 0x2022},
    Named{"hellip", 0x2026}, Named{"prime", 0x2032}, Named{"lsaquo", 0x2039}, Named{"rsaquo", 0x203a}, Named{"euro", 0x20ac},
    Named{"trade", 0x2122},  Named{"larr", 0x2190},  Named{"rarr", 0x2192},   Named{"minus", 0x2212},  Named{"OElig", 0x152},
    Named{"oelig", 0x153},   Named{"Scaron", 0x160}, Named{"scaron", 0x161},  Named{"ensp", 0x2002},   Named{"emsp", 0x2003},
    Named{"thinsp", 0x2009}};

// The code point of `name` in &name; -1 for an unknown name.
inline std::int64_t code_point(std::string_view name) {
  if (name.starts_with('#')) {
    bool const hex = name.size() > 1 && (name[1] == 'x' || name[1] == 'X');
    auto const digits = name.substr(hex ? 2 : 1);
    std::int64_t point = 0;
    for (char c : digits) {
      int const digit = is_digit(c) ? c - '0' : hex && is_letter(c) && (c | 32) <= 'f' ? (c | 32) - 'a' + 10 : -1;
      if (digit < 0) return -1;
      point = std::min<std::int64_t>(point * (hex ? 16 : 10) + digit, 0x110000);
    }
    return digits.empty() ? -1 : point;
  }
  if (auto const found = std::ranges::find(punctuation, name, &Named::name); found != punctuation.end()) return found->point;
  if (auto const found = std::ranges::find(latin1, name); found != latin1.end()) return 160 + (found - latin1.begin());
  return -1;
}

// The gap that a tag makes between the text before it and the text after it.
enum class Gap { none, space, line, paragraph };

inline Gap gap_of(std::string_view tag) {
  static constexpr std::array<std::string_view, 9> lines = {"br", "dd", "dt", "hr", "li", "option", "tr", "caption", "legend"};
  static constexpr std::array<std::string_view, 27> paragraphs = {
      "address", "article", "aside", "blockquote", "body", "center", "div", "dl", "fieldset", "figure", "footer",  "form",  "h1", "h2",
      "h3",      "h4",      "h5",    "h6",         "head", "header", "nav", "ol", "p",        "pre",    "section", "table", "ul"};
  if (std::ranges::find(paragraphs, tag) != paragraphs.end()) return Gap::paragraph;
  if (std::ranges::find(lines, tag) != lines.end()) return Gap::line;
  return tag == "td" || tag == "th" ? Gap::space : Gap::none;
}

class Reader {
 public:
  explicit Reader(std::string_view page) : page_(page) {}

  std::string text() {
    while (at_ < page_.size()) {
      if (page_[at_] == '<' && markup()) continue;
      if (page_[at_] == '&' && entity()) continue;
      if (is_space(page_[at_])) widen(Gap::space);
      else put(page_.substr(at_, 1));
      ++at_;
    }
    if (!text_.empty()) text_ += '\n';
    return std::move(text_);
  }

 private:
  void widen(Gap gap) { gap_ = std::max(gap_, gap); }
  // Writes the gap only before visible text, so that the text ends without one.
  void put(std::string_view visible) {
    static constexpr std::string_view gaps[] = {"", " ", "\n", "\n\n"};
    if (!text_.empty()) text_ += gaps[static_cast<int>(gap_)];
    gap_ = Gap::none;
    text_ += visible;
  }

  // entity() and markup() skip the entity or tag at at_ and return true. Otherwise they return false: at at_ is text.
  bool entity() {
    auto const end = page_.substr(0, at_ + 32).find(';', at_);   // no entity is longer
    if (end == page_.npos) return false;
    auto const point = code_point(page_.substr(at_ + 1, end - at_ - 1));
    if (point < 0) return false;
    std::string letter;
    append_utf8(letter, static_cast<std::uint32_t>(point));
    if (is_space(letter.front())) widen(Gap::space);
    else put(letter);
    at_ = end + 1;
    return true;
  }
  bool markup() {
    auto const rest = page_.substr(at_);
    if (rest.starts_with("<!--")) return skip_past("-->", 4);
    if (rest.starts_with("<!") || rest.starts_with("<?")) return skip_past(">", 2);
    bool const closing = rest.starts_with("</");
    auto const start = at_ + (closing ? 2 : 1);
    if (start >= page_.size() || !is_letter(page_[start])) return false;
    auto end = start;
    while (end < page_.size() && (is_letter(page_[end]) || is_digit(page_[end]))) ++end;
    auto const tag = lower(page_.substr(start, end - start));
    at_ = end_of_tag(end);
    widen(gap_of(tag));
    if (!closing && (tag == "script" || tag == "style" || tag == "title")) skip_element(tag);
    return true;
  }
  bool skip_past(std::string_view mark, std::size_t from) {
    auto const found = page_.find(mark, at_ + from);
    at_ = found == page_.npos ? page_.size() : found + mark.size();
    return true;
  }
  // The place after the first '>' outside quoted attributes, or after the first '>' when a quote is never closed.
  std::size_t end_of_tag(std::size_t from) const {
    char quote = 0;
    for (auto i = from; i < page_.size(); ++i) {
      char const c = page_[i];
      if (quote == 0 && c == '>') return i + 1;
      if (quote == 0 && (c == '"' || c == '\'')) quote = c;
      else if (c == quote) quote = 0;
    }
    auto const first = page_.find('>', from);
    return first == page_.npos ? page_.size() : first + 1;
  }
  // Skips the contents of an element that is not text, up to its own end tag.
  void skip_element(std::string const& tag) {
    for (; at_ < page_.size(); ++at_)
      if (page_[at_] == '<' && lower(page_.substr(at_, tag.size() + 2)) == "</" + tag) return;
  }

  std::string_view page_;
  std::size_t at_ = 0;
  std::string text_;
  Gap gap_ = Gap::none;
};

}  // namespace html

// The visible text of a page, without tags, comments, scripts, styles and the title. Entities become UTF-8, white space becomes
// a single space, and blocks become paragraphs with an empty line between them.
inline std::string html_to_text(std::string_view page) { return html::Reader{page}.text(); }

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
