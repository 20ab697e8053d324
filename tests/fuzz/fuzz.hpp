// What the fuzz targets share. A target is a file with LLVMFuzzerTestOneInput: libFuzzer calls it with inputs that it makes,
// and replay.cpp with the inputs that are kept in seeds/.
//
// The contract: whatever the input is, the library returns a result or throws ha::Error. Everything else is a finding: another
// exception, a sanitizer's report, a hang, memory without bound, and a broken `demand`.
#ifndef HYBRIDATTN_TESTS_FUZZ_FUZZ_HPP
#define HYBRIDATTN_TESTS_FUZZ_FUZZ_HPP

#include "../scratch_folder.hpp"

#include <hybridattn/core/check.hpp>
#include <hybridattn/core/view.hpp>

#include <fuzzer/FuzzedDataProvider.h>

#include <algorithm>
#include <bit>
#include <cctype>
#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <string>
#include <string_view>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(std::uint8_t const* data, std::size_t size);

namespace fuzz {

namespace ha = hybridattn;
using ha::Index;

// Ends the process when it does not hold: that is how libFuzzer learns of a finding.
template <class... Parts> void demand(bool holds, Parts const&... parts) {
  if (holds) return;
  std::cerr << "finding: ";
  (std::cerr << ... << parts) << std::endl;
  std::abort();
}

// An error is shown on a terminal or stands in a log: one line, not too long, without control characters.
inline void check_sentence(std::string_view sentence) {
  demand(!sentence.empty() && sentence.size() <= 4096, "an error of ", sentence.size(), " bytes");
  for (char letter : sentence)
    demand(static_cast<unsigned char>(letter) >= 32 && letter != 127, "an error has the control character ", int{letter}, ": ", sentence);
}

// Whether f returns; false if it throws Error. Any other exception is not caught.
template <class F, class Check> bool accepts(F f, Check check) {
  try {
    f();
    return true;
  } catch (ha::Error const& error) {
    check(error.what());
    return false;
  }
}
template <class F> bool accepts(F f) { return accepts(f, check_sentence); }
// The same for work that must succeed because the library itself prepared it.
template <class F> void must(char const* what, F f) {
  try {
    f();
  } catch (ha::Error const& error) {
    demand(false, what, " throws: ", error.what());
  }
}

// An input as text. A byte 1 stands for repetition: 1, times / 64, length, and that many bytes to repeat. So a short input
// becomes a deep or a long text, up to 60 000 bytes.
inline std::string text_of(std::uint8_t const* data, std::size_t size) {
  std::string_view input{reinterpret_cast<char const*>(data), size};
  std::string text;
  while (!input.empty()) {
    auto const plain = std::min(input.find('\1'), input.size());
    text += input.substr(0, plain);
    input.remove_prefix(plain);
    if (input.size() < 4) break;
    auto const times = 64u * static_cast<unsigned char>(input[1]), length = static_cast<unsigned>(static_cast<unsigned char>(input[2]));
    auto const repeated = input.substr(3, length);
    for (unsigned i = 0; i < times && text.size() < 60'000; ++i) text += repeated;
    input.remove_prefix(3 + repeated.size());
  }
  return text;
}

// The parts of an input between lines that say %%%; `count` of them, empty ones at the end.
inline std::vector<std::string_view> parts_of(std::string_view input, std::size_t count) {
  static constexpr std::string_view line = "\n%%%\n";
  std::vector<std::string_view> parts;
  while (parts.size() + 1 < count) {
    auto const end = std::min(input.find(line), input.size());
    parts.push_back(input.substr(0, end));
    input.remove_prefix(std::min(end + line.size(), input.size()));
  }
  parts.push_back(input);
  return parts;
}

// A header's text as a safetensors file: with the header's length, and as much data as the largest number below 2^17 in it.
// Inputs that are bytes of files seldom get past these two numbers.
inline std::string as_safetensors(std::string_view header) {
  static constexpr std::string_view digits = "0123456789";
  std::size_t data_bytes = 0;
  for (std::size_t at = header.find_first_of(digits); at < header.size(); at = header.find_first_of(digits, at)) {
    bool const word = at > 0 && std::isalpha(static_cast<unsigned char>(header[at - 1])) != 0;   // F32
    std::size_t number = 0;
    for (; at < header.size() && digits.find(header[at]) != digits.npos; ++at)
      number = std::min<std::size_t>(10 * number + static_cast<std::size_t>(header[at] - '0'), 1 << 20);
    if (!word && number < 1 << 17) data_bytes = std::max(data_bytes, number);
  }
  auto const length = std::bit_cast<std::array<char, 8>>(static_cast<std::uint64_t>(header.size()));
  std::string file(length.data(), length.size());
  file += header;
  for (std::size_t i = 0; i < data_bytes; ++i) file += static_cast<char>(i % 61);   // no two tensors are alike
  return file;
}

// A folder for the files of one input.
inline ScratchFolder& folder() {
  static ScratchFolder folder;
  return folder;
}
// Nothing but these files may be left in it: no temporary ones.
inline void check_files(std::filesystem::path const& folder, std::size_t count) {
  std::size_t found = 0;
  for (auto const& entry : std::filesystem::directory_iterator(folder)) {
    ++found;
    demand(entry.path().extension() != ".partial", "a temporary file is left: ", entry.path().filename());
  }
  demand(found == count, found, " files are left where there should be ", count);
}

}  // namespace fuzz

#endif
