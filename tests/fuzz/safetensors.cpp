// A safetensors file is read, written and read again. An input is a file, or the text of a header.
#include "fuzz.hpp"

#include <hybridattn/io/safetensors.hpp>

#include <deque>

namespace {

using namespace fuzz;

// What a tensor's elements are as T, whether they can be read as that or not.
template <class Read> bool can_read(ha::TensorInfo const& info, Read read) {
  return accepts([&] { demand(std::ssize(read()) == info.count(), "a tensor has another number of elements than its shape"); });
}

// As much of the file as the library can write.
void check_round_trip(ha::Safetensors const& file) {
  static constexpr std::string_view written[] = {"F64", "F32", "I64", "I32"};
  ha::SafetensorsWriter writer;
  std::deque<std::vector<char>> kept;   // the writer holds no elements
  std::vector<std::string> names;
  for (auto const& [name, info] : file.tensors()) {
    if (std::ranges::find(written, info.dtype) == std::end(written)) continue;
    auto const& bytes = kept.emplace_back(file.read_bytes(name));
    writer.add_elsewhere(name, info, {bytes.data(), bytes.size()});
    names.push_back(name);
  }
  for (auto const& [key, value] : file.metadata()) writer.add_metadata(key, value);
  auto const path = folder() / "again.safetensors";
  must("writing what was read", [&] { writer.write(path); });
  check_files(folder().path(), 2);
  must("reading what was written", [&] {
    ha::Safetensors const again{path};
    demand(again.metadata() == file.metadata() && again.tensors().size() == names.size(), "other names or metadata come back");
    for (auto const& name : names)
      demand(again.info(name).shape == file.info(name).shape && again.info(name).dtype == file.info(name).dtype &&
                 again.read_bytes(name) == file.read_bytes(name),
             "another tensor comes back");
  });
  std::filesystem::remove(path);
}

void read_all(std::filesystem::path const& path) {
  ha::Safetensors const file{path};
  for (auto const& [name, info] : file.tensors()) {
    auto const size = ha::safetensors::size_of(info.dtype);   // none: a dtype that only others know
    demand(file.contains(name) && file.read_bytes(name).size() == info.end - info.begin, "a tensor is not as long as its offsets say");
    demand(!size || info.end - info.begin == static_cast<std::size_t>(info.count()) * *size, "a tensor's offsets do not fit its shape");
    bool const real = can_read(info, [&] { return file.read_floats(name); });
    demand(real == can_read(info, [&] { return file.read_doubles(name); }), "floats and doubles differ in what they read");
    can_read(info, [&] { return file.read_int64s(name); });
  }
  accepts([&] { file.info("missing"); });
  accepts([&] { file.metadata("missing"); });
  check_round_trip(file);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(std::uint8_t const* data, std::size_t size) {
  bool const header = size > 0 && data[0] == '{';
  std::string const file = header ? as_safetensors(text_of(data, size)) : std::string(data, data + size);
  auto const path = folder().file("input.safetensors", file);
  accepts([&] { read_all(path); });
  return 0;
}
