// Configurations and weights, which must be regular files. Opening never waits: for a pipe or a device the error says what it is.
// An error also names the format of a file that has the wrong contents.
#ifndef HYBRIDATTN_IO_REGULAR_FILE_HPP
#define HYBRIDATTN_IO_REGULAR_FILE_HPP

#include <hybridattn/core/memory.hpp>
#include <hybridattn/io/atomic_file.hpp>
#include <hybridattn/io/escaped.hpp>

#include <array>

namespace hybridattn::inline HYBRIDATTN_ABI {

namespace regular_file {

inline std::string reason(int error) {
  if (error == ENOENT || error == ENOTDIR) return "there is no such file";
  if (error == ELOOP) return "it is a loop of symbolic links";
  return error == EACCES ? "no permission" : std::strerror(error);
}
inline char const* kind(mode_t mode) {
  if (S_ISDIR(mode)) return "a folder";
  if (S_ISFIFO(mode)) return "a pipe";
  if (S_ISSOCK(mode)) return "a socket";
  return S_ISCHR(mode) || S_ISBLK(mode) ? "a device" : "something else";
}

}  // namespace regular_file

// Opens a file for reading and follows symbolic links. Throws Error, which begins with `where`. A pipe is refused before it is opened,
// because opening it may wait for ever.
inline FileDescriptor open_regular_file(std::filesystem::path const& path, std::string const& where) {
  struct stat status = {};
  auto const check_regular = [&](bool known) {
    check(known, where, regular_file::reason(errno));
    check(S_ISREG(status.st_mode), where, "it is ", regular_file::kind(status.st_mode), ", not a regular file");
  };
  check_regular(::stat(path.c_str(), &status) == 0);
  FileDescriptor file{::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY)};
  check_regular(static_cast<bool>(file) && ::fstat(file.number(), &status) == 0);
  return file;
}

inline std::size_t size_of_file(FileDescriptor const& file, std::string const& where) {
  struct stat status;
  check(::fstat(file.number(), &status) == 0, where, std::strerror(errno));
  return static_cast<std::size_t>(status.st_size);
}

// Up to `count` bytes from `offset` on; fewer only at the end of the file.
inline std::size_t read_some(FileDescriptor const& file, std::size_t offset, char* into, std::size_t count, std::string const& where) {
  std::size_t done = 0;
  while (done < count) {
    auto const got = ::pread(file.number(), into + done, count - done, static_cast<off_t>(offset + done));
    if (got < 0 && errno == EINTR) continue;
    check(got >= 0, where, std::strerror(errno));
    if (got == 0) break;
    done += static_cast<std::size_t>(got);
  }
  return done;
}

// All bytes of a file. Throws Error if it is empty or has more than `largest` bytes.
inline std::string read_regular_file(std::filesystem::path const& path, std::size_t largest, std::string const& where) {
  auto const file = open_regular_file(path, where);
  auto const check_size = [&](std::size_t size) {
    check(size <= largest, where, "it has ", size, " bytes or more; at most ", largest, " are allowed");
  };
  std::size_t const size = size_of_file(file, where);
  check_size(size);
  std::string text;
  std::size_t read = 0;
  do {   // the file may grow while it is read, and the system's own files do not report their size
    std::size_t const room = std::max(size + 1, read + (1 << 16));
    within_memory(room, "the file", [&] { text.resize(room); }, where);
    read += read_some(file, read, text.data() + read, room - read, where);
    check_size(read);
  } while (read == text.size());
  check(read > 0, where, "it is empty");
  text.resize(read);
  return text;
}

namespace regular_file {

struct Beginning {
  std::string_view bytes, kind;
};
inline constexpr std::array beginnings = {Beginning{"version https://git-lfs.github.com/spec/",
                                                    "a git-lfs pointer: the file itself was not downloaded (git lfs pull fetches it)"},
                                          Beginning{"PK\x03\x04", "a zip archive, as PyTorch's .bin and .pt files are"},
                                          Beginning{"\x80\x02", "a Python pickle, as PyTorch's older files are"},
                                          Beginning{"\x80\x03", "a Python pickle"},
                                          Beginning{"\x80\x04", "a Python pickle"},
                                          Beginning{"\x80\x05", "a Python pickle"},
                                          Beginning{"GGUF", "a GGUF file"},
                                          Beginning{"\x93NUMPY", "a NumPy file"},
                                          Beginning{"\x89HDF\r\n", "an HDF5 file"},
                                          Beginning{"\x1f\x8b", "a gzip file"},
                                          Beginning{"\xfd"
                                                    "7zXZ",
                                                    "an xz file"},
                                          Beginning{"\x28\xb5\x2f\xfd", "a zstd file"},
                                          Beginning{"BZh", "a bzip2 file"},
                                          Beginning{"%PDF-", "a PDF file"},
                                          Beginning{"\x89PNG", "an image"},
                                          Beginning{"\x7f"
                                                    "ELF",
                                                    "a program"}};

inline std::string_view without_space(std::string_view text) {
  if (text.starts_with("\xef\xbb\xbf")) text.remove_prefix(3);
  return text.substr(std::min(text.find_first_not_of(" \t\r\n"), text.size()));
}
inline bool starts_like(std::string_view text, std::string_view lower) {
  return text.size() >= lower.size() && std::ranges::equal(text.substr(0, lower.size()), lower, [](char a, char b) {
           return (a >= 'A' && a <= 'Z' ? static_cast<char>(a + ('a' - 'A')) : a) == b;
         });
}

}  // namespace regular_file

// The format of a file that begins with these bytes (512 are enough), or "" for an unknown format.
inline std::string kind_of_file(std::string_view head) {
  for (auto const& [bytes, kind] : regular_file::beginnings)
    if (head.starts_with(bytes)) return std::string(kind);
  auto const text = regular_file::without_space(head);
  for (std::string_view const tag : {"<!doctype html", "<html", "<head", "<body"})
    if (regular_file::starts_like(text, tag)) return "an HTML page";
  if (text.starts_with("<?xml")) return "an XML file";
  if (head.size() > 262 && head.substr(257, 5) == "ustar") return "a tar archive";
  if (head.size() > 8 && head.find_first_not_of('\0') == head.npos)
    return "a file that begins with zeros only, as an unfinished download does";
  return "";
}
// The same, and for a text its beginning.
inline std::string kind_of_file_or_text(std::string_view head) {
  if (auto kind = kind_of_file(head); !kind.empty()) return kind;
  auto const begins = " that begins " + escaped(head);
  if (auto const text = regular_file::without_space(head); text.starts_with('{') || text.starts_with('[')) return "a JSON text" + begins;
  for (auto rest = head; !rest.empty();) {
    auto const [bytes, point] = utf8::first_character(rest);
    bool const cut = rest.size() < 4 && head.size() > 500;   // head may end inside a character
    if (!cut && (bytes == 0 || (point < 32 && point != '\t' && point != '\n' && point != '\r'))) return "";
    rest.remove_prefix(std::max<std::size_t>(bytes, 1));
  }
  return head.empty() ? "" : "a text" + begins;
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
