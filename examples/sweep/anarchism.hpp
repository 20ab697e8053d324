// The sweep's own text: "An Anarchist FAQ", which Debian packages as `anarchism`, 11 MB of English prose.
#ifndef HYBRIDATTN_EXAMPLES_SWEEP_ANARCHISM_HPP
#define HYBRIDATTN_EXAMPLES_SWEEP_ANARCHISM_HPP

#include <hybridattn/io/text.hpp>

#include "process.hpp"

#include <algorithm>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

namespace sweep {

// The package unpacked into build_folder/anarchism, from an earlier run or from Debian's archive; nothing where it cannot
// be had. It gets its name only once it is complete.
inline std::optional<std::filesystem::path> unpacked_anarchism(std::filesystem::path const& build_folder) {
  namespace fs = std::filesystem;
  std::error_code error;
  auto const unpacked = fs::absolute(build_folder, error) / "anarchism";
  if (fs::is_directory(unpacked, error)) return unpacked;
  fs::path const partial = unpacked.string() + "." + std::to_string(::getpid()) + ".partial";
  auto const fetch = [&] {
    if (!fs::create_directories(partial, error)) return false;
    std::string const timeout = "Acquire::http::Timeout=20";
    if (run_program({"apt-get", "-qq", "-o", timeout, "-o", "Acquire::Retries=1", "download", "anarchism"}, partial) != 0) return false;
    fs::directory_iterator const package{partial, error};
    if (error || package == fs::directory_iterator{}) return false;
    if (run_program({"dpkg-deb", "-x", package->path().filename().string(), "files"}, partial) != 0) return false;
    fs::rename(partial / "files", unpacked, error);
    return !error;
  };
  bool const fetched = fetch();
  fs::remove_all(partial, error);
  return fetched || fs::is_directory(unpacked, error) ? std::optional{unpacked} : std::nullopt;
}

// Every HTML file below `folder`, in the order of the bytes of its name.
inline std::vector<std::filesystem::path> html_files(std::filesystem::path const& folder) {
  namespace fs = std::filesystem;
  std::vector<fs::path> files;
  std::error_code error;
  for (fs::recursive_directory_iterator it{folder, error}, end; !error && it != end; it.increment(error))
    if (it->path().extension() == ".html" && it->is_regular_file(error)) files.push_back(it->path());
  std::ranges::sort(files, {}, [](fs::path const& path) { return path.string(); });
  return files;
}

// Its first `bytes` bytes as text, pages parted by an empty line; nothing where the package cannot be had.
inline std::optional<std::string> anarchism_text(std::filesystem::path const& build_folder, std::size_t bytes = 1'500'000) {
  auto const folder = unpacked_anarchism(build_folder);
  if (!folder) return std::nullopt;
  std::string text;
  for (auto const& file : html_files(*folder)) {
    if (text.size() >= bytes) break;
    if (!text.empty()) text += '\n';
    text += hybridattn::html_to_text(hybridattn::read_text(file));
  }
  if (text.empty()) return std::nullopt;
  text.resize(std::min(text.size(), bytes));
  return text;
}

}  // namespace sweep
#endif
