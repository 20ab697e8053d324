// A released folder is loaded, saved and loaded again. An input has four parts: config.json, the index, and two weight files,
// each a file's text or, where it starts with '{', the header of a safetensors file. A part that is empty is no file.
#include "fuzz.hpp"

#include "../released.hpp"

#include <hybridattn/io.hpp>

namespace {

using namespace fuzz;
namespace hf = ha::hugging_face;

using Model = ModelOf<50, "LF">;

void write(std::filesystem::path const& path, std::string_view content) {
  if (!content.empty()) std::ofstream(path, std::ios::binary) << content;
}
std::string weights(std::string_view part) { return part.starts_with('{') ? as_safetensors(part) : std::string(part); }

// Without an index the weights are one file.
void write_folder(std::filesystem::path const& path, std::vector<std::string_view> const& parts) {
  std::filesystem::create_directories(path);
  write(path / "config.json", parts[0]);
  write(path / "model.safetensors.index.json", parts[1]);
  write(path / (parts[1].empty() ? "model.safetensors" : "model-00001-of-00002.safetensors"), weights(parts[2]));
  write(path / "model-00002-of-00002.safetensors", weights(parts[3]));
}

// All parameters, bit for bit.
template <class Params> std::string bits_of(Params const& params) {
  std::string bits;
  ha::zip([&](ha::Path const&, auto const& tensor) { bits.append(reinterpret_cast<char const*>(in(tensor).data), tensor.byte_count()); },
          params);
  return bits;
}

void load_and_save(std::filesystem::path const& path, std::filesystem::path const& again) {
  ha::Cpu cpu{1};
  Model const model{hf::config<Model>(path)};
  auto const params = hf::load<float>(cpu, model, path);
  must("saving what was loaded", [&] { hf::save(cpu, model, params, again, hf::format(path)); });
  check_files(again, 2);
  must("loading what was saved", [&] {
    Model const same{hf::config<Model>(again)};
    demand(hf::config_text(hf::settings_of(same, *hf::format(path).family)) ==
               hf::config_text(hf::settings_of(model, *hf::format(path).family)),
           "another configuration comes back");
    demand(bits_of(hf::load<float>(cpu, same, again)) == bits_of(params), "other parameters come back");
  });
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(std::uint8_t const* data, std::size_t size) {
  std::string const input = text_of(data, size);
  auto const path = folder() / "model", again = folder() / "again";
  write_folder(path, parts_of(input, 4));
  accepts([&] { hf::pattern(path); });
  accepts([&] { load_and_save(path, again); });
  std::filesystem::remove_all(path);
  std::filesystem::remove_all(again);
  return 0;
}
