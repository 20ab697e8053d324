// Files that are never half-written: they are written under a temporary name in the same folder, synced, then renamed.
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
