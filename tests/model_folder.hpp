// Small folders of the Hugging Face layout for tests, functions that change them, and functions that return the errors of reading them.
#ifndef HYBRIDATTN_TESTS_MODEL_FOLDER_HPP
#define HYBRIDATTN_TESTS_MODEL_FOLDER_HPP

#include "catch.hpp"

#include "error_of.hpp"
#include "released.hpp"
#include "scratch_folder.hpp"

#include <hybridattn/hybridattn.hpp>
#include <hybridattn/io.hpp>

#include <cstring>
#include <map>

namespace model_folder {

namespace ha = hybridattn;
namespace hf = ha::hugging_face;
namespace fs = std::filesystem;
using ha::Index;
using Json = nlohmann::json;

inline fs::path const tiny = fs::path(HYBRIDATTN_GOLDEN_DIR) / "models/qwen3_next_tiny";
inline fs::path const tiny_split = fs::path(HYBRIDATTN_GOLDEN_DIR) / "models/qwen3_5_text_tiny";
using Tiny = ModelOf<50, "LFFL">;
using TinySplit = ModelOf<50, "LF">;

inline void check_says(std::string const& message, std::initializer_list<std::string> words) {
  for (auto const& word : words) {
    INFO("'" << message << "' should say '" << word << "'");
    CHECK(message.find(word) != message.npos);
  }
}

inline Json config_of(fs::path const& folder) { return Json::parse(content_of(folder / "config.json")); }
// Returns a folder's config.json with some fields changed. A null removes a field.
inline std::string config_with(char const* changes, fs::path const& folder = tiny) {
  auto json = config_of(folder);
  json.merge_patch(Json::parse(changes));
  return json.dump();
}
// Returns the error of reading this config.json.
template <class Model> std::string config_message(std::string const& config) {
  ScratchFolder const scratch;
  scratch.file("config.json", config);
  return error_of([&] { hf::config<Model>(scratch.path()); });
}

// A tensor of a Checkpoint, which tests change and write again.
struct Stored {
  std::string dtype;
  std::vector<Index> shape;
  std::string bytes;
};
using Checkpoint = std::map<std::string, Stored>;

template <class T> std::string bytes_of(std::vector<T> const& elements) {
  return {reinterpret_cast<char const*>(elements.data()), elements.size() * sizeof(T)};
}
inline std::vector<float> floats_of(Stored const& tensor) {
  std::vector<float> elements(tensor.bytes.size() / sizeof(float));
  std::memcpy(elements.data(), tensor.bytes.data(), tensor.bytes.size());
  return elements;
}
inline Checkpoint checkpoint_of(fs::path const& folder) {
  ha::Safetensors const file{folder / "model.safetensors"};
  Checkpoint result;
  for (auto const& [name, info] : file.tensors()) result[name] = {info.dtype, info.shape, bytes_of(file.read_floats(name))};
  return result;
}
inline void write(ScratchFolder const& scratch, std::string_view name, Checkpoint const& checkpoint) {
  Json header = Json::object();
  std::string data;
  for (auto const& [tensor, stored] : checkpoint) {
    header[tensor] = {{"dtype", stored.dtype}, {"shape", stored.shape}, {"data_offsets", {data.size(), data.size() + stored.bytes.size()}}};
    data += stored.bytes;
  }
  auto const text = header.dump();
  scratch.file(name, bytes_of(std::vector{std::uint64_t{text.size()}}) + text + data);
}

// Loads a folder and saves its model in the default Format of the family.
template <class Model> void load_and_save(fs::path const& from, fs::path const& to, hf::Family const& family) {
  ha::Cpu cpu{1};
  Model const model{hf::config<Model>(from)};
  hf::save(cpu, model, hf::load<double>(cpu, model, from), to, {.family = &family});
}
// Returns the error of loading a folder.
template <class Model> std::string load_message(fs::path const& folder) {
  ha::Cpu cpu{1};
  return error_of([&] { hf::load<double>(cpu, Model{hf::config<Model>(folder)}, folder); });
}
// Returns the error of loading the small model with these tensors.
inline std::string load_message(Checkpoint const& checkpoint) {
  ScratchFolder const scratch;
  scratch.file("config.json", content_of(tiny / "config.json"));
  write(scratch, "model.safetensors", checkpoint);
  return load_message<Tiny>(scratch.path());
}

}  // namespace model_folder

#endif
