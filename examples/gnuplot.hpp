// Pictures by gnuplot: scripts and their data stay beside the PNG and SVG files they make, so that `gnuplot NAME.gp` draws
// them again.
#ifndef HYBRIDATTN_EXAMPLES_GNUPLOT_HPP
#define HYBRIDATTN_EXAMPLES_GNUPLOT_HPP

#include "sweep/process.hpp"

#include <hybridattn/io/atomic_file.hpp>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <string_view>

namespace gnuplot {

// One column of a data file.
struct Column {
  std::string name;
  std::vector<double> values;
};

// Tab-separated, a line for each of `keys` or, without keys, for 1, 2, 3, ...; '?' where a column ends early or is not a number.
inline std::string data_file(std::vector<Column> const& columns, std::vector<double> const& keys = {}) {
  auto const written = [](char const* format, double value) {
    char buffer[32];
    return std::string(buffer, static_cast<std::size_t>(std::snprintf(buffer, sizeof(buffer), format, value)));
  };
  std::size_t lines = 0;
  std::string text = "step";
  for (auto const& column : columns) {
    text += "\t" + column.name;
    lines = std::max(lines, column.values.size());
  }
  text += "\n";
  for (std::size_t i = 0; i < lines; ++i) {
    text += written("%.9g", i < keys.size() ? keys[i] : static_cast<double>(i + 1));
    for (auto const& [name, values] : columns) text += i < values.size() && std::isfinite(values[i]) ? written("\t%.6g", values[i]) : "\t?";
    text += "\n";
  }
  return text;
}

// In gnuplot's single quotes, where only the quote itself is special.
inline std::string quoted(std::string_view text) {
  std::string result = "'";
  for (char c : text) result += c == '\'' ? "''" : std::string(1, c);
  return result + "'";
}
// Every `word` of a script becomes `value`.
inline void put(std::string& script, std::string_view word, std::string const& value) {
  for (auto at = script.find(word); at != script.npos; at = script.find(word, at + value.size())) script.replace(at, word.size(), value);
}

// Whether what must stand at a picture's end stands there.
inline bool is_complete(std::filesystem::path const& path, std::string_view mark) {
  std::ifstream file{path, std::ios::binary};
  std::string const content{std::istreambuf_iterator<char>{file}, {}};
  return content.find(mark, content.size() - std::min<std::size_t>(content.size(), 16)) != content.npos;
}

// Deletes the folders in which a process that was killed drew NAME. Only one process at a time works in `folder`.
inline void remove_abandoned(std::filesystem::path const& folder, std::string const& name) {
  namespace fs = std::filesystem;
  std::error_code error;
  std::vector<fs::path> abandoned;
  for (fs::directory_iterator it{folder, error}, end; !error && it != end; it.increment(error)) {
    std::string const file = it->path().filename().string();
    if (file.starts_with(".") && hybridattn::is_partial_of(file.substr(1), name)) abandoned.push_back(it->path());
  }
  for (auto const& path : abandoned) fs::remove_all(path, error);
}

// NAME.tsv and NAME.gp, and the NAME.png and NAME.svg that the script makes. Draws in a folder of its own and moves what is
// complete: no picture is ever half-written, or older than the data beside it. Returns what went wrong, in a line; nothing
// when all went well.
inline std::string draw(std::filesystem::path const& folder, std::string const& name, std::string const& data, std::string const& script) {
  namespace fs = std::filesystem;
  hybridattn::write_file_atomically(folder / (name + ".tsv"), data);
  hybridattn::write_file_atomically(folder / (name + ".gp"), script);
  std::error_code error;
  for (auto const* extension : {".png", ".svg"}) fs::remove(folder / (name + extension), error);
  remove_abandoned(folder, name);
  fs::path const partial = folder / ("." + name + "." + std::to_string(::getpid()) + ".partial");
  fs::create_directory(partial, error);
  for (auto const* extension : {".tsv", ".gp"}) fs::copy_file(folder / (name + extension), partial / (name + extension), error);
  int const status = sweep::run_program({"gnuplot", name + ".gp"}, partial);
  fs::path const png = partial / (name + ".png"), svg = partial / (name + ".svg");
  bool const complete = status == 0 && is_complete(png, "IEND\xae\x42\x60\x82") && is_complete(svg, "</svg>");
  std::error_code moved;
  for (auto const& picture : {png, svg})
    if (complete && !moved) fs::rename(picture, folder / picture.filename(), moved);
  fs::remove_all(partial, error);
  if (status == sweep::no_such_program)
    return "no pictures: gnuplot is not installed (Debian: gnuplot-nox); once it is, `gnuplot " + name + ".gp` draws them";
  if (moved) return "no picture " + name + ": " + moved.message();
  return complete ? "" : "no picture " + name + ": gnuplot failed with status " + std::to_string(status);
}

}  // namespace gnuplot
#endif
