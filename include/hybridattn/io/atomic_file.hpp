// Files that are there whole or not at all: written under a temporary name beside their own, synced, then renamed.
#ifndef HYBRIDATTN_IO_ATOMIC_FILE_HPP
#define HYBRIDATTN_IO_ATOMIC_FILE_HPP

#include <hybridattn/core/check.hpp>

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <string>
#include <string_view>
#include <utility>

namespace hybridattn::inline HYBRIDATTN_ABI {

// A process that writes beyond its file size limit is killed by SIGXFSZ. A program that calls this first gets an Error
// instead, as on a full disk. It changes the whole process, so it is for main() to call.
inline void ignore_file_size_signal() { std::signal(SIGXFSZ, SIG_IGN); }

// f(), a call of the system, once more each time that a signal cut it short.
template <class F> auto uninterrupted(F f) {
  auto result = f();
  while (result < 0 && errno == EINTR) result = f();
  return result;
}

// An open file of the system, closed at the brace.
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

  // Closes now; false when the system reports only here that what was written is lost. A signal does not keep it open.
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

// Deletes the temporary files of `path` that nobody writes any more, because their process was killed: a file in the making
// is locked, and the system unlocks it whatever way its process ends.
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

// The file that a write to `path` reaches: a symbolic link stands for its target, whether that is there or not.
inline std::filesystem::path target_of(std::filesystem::path path) {
  std::error_code error;
  for (int links = 0; std::filesystem::is_symlink(std::filesystem::symlink_status(path, error)); ++links) {
    check(links < 40, "cannot write ", path, ": too many symbolic links, one behind the other");
    auto const next = std::filesystem::read_symlink(path, error);
    check(!error, "cannot write ", path, ": ", error.message());
    path = path.parent_path() / next;   // where the link stands, unless it is absolute
  }
  return path;
}

// A file in the making: `write` in order, then `commit`. Until then nothing stands under its name (or what stood there
// before does), and without `commit` nothing is left behind; what a killed process left, the next one deletes. A file that is
// replaced hands on its mode and, where that is allowed, its owner; a symbolic link stays, and its target is replaced. Every
// failure is an Error that names the file.
class AtomicFile {
 public:
  explicit AtomicFile(std::filesystem::path const& path) : path_(target_of(path)) {
    check(path_.has_filename(), "cannot write ", path, ": it is not the name of a file");
    struct stat old;
    bool const replaces = ::stat(path_.c_str(), &old) == 0;
    check(!replaces || S_ISREG(old.st_mode), "cannot write ", path_, ": it is there and is not a file");
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
    FileDescriptor const still_locked{::dup(file_.number())};   // until it has its name
    if (!file_.close()) discard_and_fail(errno);
    if (uninterrupted([&] { return ::rename(temporary_.c_str(), path_.c_str()); }) != 0) discard_and_fail(errno);
    temporary_.clear();
    sync_folder();
  }
  // What the name that was given leads to.
  std::filesystem::path const& path() const { return path_; }

 private:
  [[noreturn]] void fail_with(int error) const { fail("cannot write ", path_, ": ", std::strerror(error)); }
  [[noreturn]] void discard_and_fail(int error) {
    discard();
    fail_with(error);
  }
  // False where another process took the new file for an abandoned one and deleted it. A file system without locks has no
  // such process either.
  bool lock() const {
    struct stat status;
    if (::flock(file_.number(), LOCK_EX | LOCK_NB) != 0) return errno != EWOULDBLOCK;
    return ::fstat(file_.number(), &status) != 0 || status.st_nlink > 0;
  }
  // Owner first: a new owner takes away some of the mode. Where files may not be given away, it stays ours.
  bool inherit(struct stat const& old) const {
    [[maybe_unused]] bool const given = ::fchown(file_.number(), old.st_uid, old.st_gid) == 0;
    return ::fchmod(file_.number(), old.st_mode & 0777) == 0;
  }
  void discard() noexcept {
    file_ = FileDescriptor{};
    if (!temporary_.empty()) ::unlink(temporary_.c_str());
    temporary_.clear();
  }
  // The new name survives a power cut too, where the file system can promise that; one that fails at it says so.
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
