// Reads and writes a checkpoint's file. The code here works on lists of tensors and on JSON, and knows no type of model.
//
// A checkpoint is one safetensors file. All that is not a tensor is JSON under one key of its __metadata__. One rename makes the whole
// file visible, so no reader sees the tensors without the JSON, the JSON without the tensors, or a part of either.
//
//   embedding, blocks.3.attention.w.q, ...           parameters, by their paths
//   optimizer.<name>.<path>                          what the optimizer keeps of each: AdamW's moments are mean and square, and master is
//                                                    the parameter in float where the model is in bf16
//   history.<name>                                   F64 [steps], what the program counts
#ifndef HYBRIDATTN_STORE_CHECKPOINT_FILE_HPP
#define HYBRIDATTN_STORE_CHECKPOINT_FILE_HPP

#include <hybridattn/io/safetensors.hpp>
#include <hybridattn/store/progress.hpp>
#include <hybridattn/tensor/roles.hpp>

#include <set>
#include <string>
#include <string_view>
#include <vector>

namespace hybridattn::inline HYBRIDATTN_ABI {

// A checkpoint's description of itself.
struct CheckpointHeader {
  Index version = 0;                 // of the format
  std::vector<std::string> pattern;  // names of the layers' policies
  std::string dtype;                 // "F32", "F64" or "BF16"
  Index step = 0;
  std::string note;
  nlohmann::json json;  // all of it: "model", "layers", "optimizer", "data", ...
};

namespace checkpoint {

using Json = nlohmann::json;

inline constexpr Index version = 1;
inline constexpr char const* metadata_key = "hybridattn";
inline constexpr std::string_view optimizer_prefix = "optimizer.", history_prefix = "history.";

// A tensor of a run and its address in the backend's memory. An absent tensor has no bytes.
struct StoredTensor {
  std::string name;
  TensorInfo info;
  void const* data = nullptr;
  std::size_t bytes = 0;
};

// A function for zip. It appends each tensor of a group to a list.
struct Collect {
  std::string_view prefix;
  std::vector<StoredTensor>& list;

  template <class T, int Rank, class B> void operator()(Path const& path, Tensor<T, Rank, B> const& tensor) const {
    auto const view = in(tensor);
    std::span<Index const> const shape(view.shape.extent, Rank);
    add(path, safetensors::dtype_of<T>(), shape, view.data, tensor.byte_count());
  }

 private:
  void add(Path const& path, std::string_view dtype, std::span<Index const> shape, void const* data, std::size_t bytes) const {
    list.push_back({std::string(prefix) + path.str(), {std::string(dtype), std::vector<Index>(shape.begin(), shape.end())}, data, bytes});
  }
};
template <class Group> void collect(std::string_view prefix, Group const& group, std::vector<StoredTensor>& list) {
  zip(Collect{prefix, list}, group);
}

}  // namespace checkpoint

// An optimizer's state: numbers, and named groups of tensors with the structure of the parameters.
struct NamedGroups {
  std::vector<checkpoint::StoredTensor> tensors;   // optimizer.<name>.<path>
  nlohmann::json numbers;

  // Adds a group's tensors under this name. They must live until they are written or read.
  template <class Group> void add(std::string_view name, Group const& group) {
    checkpoint::collect(std::string(checkpoint::optimizer_prefix) + std::string(name) + ".", group, tensors);
  }
};

namespace checkpoint {

// Joins the words with spaces. The result is one line, even where a word has line breaks.
inline std::string words(std::vector<std::string> const& list) {
  std::string text;
  for (auto const& word : list) text += (text.empty() ? "" : " ") + word;
  return one_line(text, 1000);
}
inline std::vector<std::string> names_in(Json const& list, std::string const& where) {
  check(list.is_array(), where, "'pattern' must be a list of names");
  std::vector<std::string> names;
  for (Json const& name : list) {
    check(name.is_string(), where, "'pattern' must be a list of names");
    names.push_back(name.get_ref<std::string const&>());
  }
  return names;
}
inline std::string shape_text(std::vector<Index> const& shape) {
  std::string text;
  for (Index const extent : shape) text += (text.empty() ? "" : ", ") + std::to_string(extent);
  return "[" + text + "]";
}

// How an error message shows a value of a file.
inline std::string shown(Json const& value) {
  if (value.is_string()) return escaped(value.get_ref<std::string const&>());
  if (value.is_null()) return "nothing";
  if (value.is_array()) return "a list of " + std::to_string(value.size());
  return value.is_object() ? "a group" : value.dump();
}

// Throws at the first difference, with "model_dim: 128 in the file, 64 in the model". Skips the keys in `ignored`.
struct Comparison {
  std::string const& where;
  char const* ours;   // "model"
  std::span<std::string_view const> ignored;

  void operator()(Json const& file, Json const& model, std::string const& name) const {
    if (file.is_object() && model.is_object()) {
      for (auto it = model.begin(); it != model.end(); ++it) inner(found(file, it.key()), *it, name, it.key());
      for (auto it = file.begin(); it != file.end(); ++it)
        if (!model.contains(it.key())) inner(*it, nothing, name, it.key());
    } else if (file.is_array() && model.is_array() && file.size() == model.size()) {
      for (std::size_t i = 0; i < model.size(); ++i) inner(file[i], model[i], name, std::to_string(i));
    } else {
      check(is_same(file, model), where, one_line(name, 200), ": ", shown(file), " in the file, ", shown(model), " in the ", ours);
    }
  }

 private:
  inline static Json const nothing = {};
  // Where the model has an integer, 2.0 in the file does not equal 2.
  static bool is_same(Json const& file, Json const& model) { return file == model && (file.is_number_float() <= model.is_number_float()); }
  static Json const& found(Json const& json, std::string const& key) { return json.contains(key) ? json[key] : nothing; }
  void inner(Json const& file, Json const& model, std::string const& name, std::string const& key) const {
    if (std::ranges::find(ignored, key) == ignored.end()) (*this)(file, model, name.empty() ? key : name + "." + key);
  }
};

inline Json to_json(DataState const& data) {
  Json json;
  json["description"] = data.description;
  json["seed"] = data.seed;
  json["content"] = data.content;
  json["drawn"] = data.drawn;
  return json;
}

// Writes the tensors, the progress and `json`, which describes the model and the optimizer. Skips absent tensors.
template <class B>
void write(B& backend, std::filesystem::path const& path, Json json, std::vector<StoredTensor> const& tensors, Progress const& progress) {
  check(progress.step >= 0, "checkpoint ", path.string(), ": step ", progress.step, " is not allowed; it must be >= 0");
  SafetensorsWriter writer;
  for (auto const& tensor : tensors)
    if (tensor.bytes > 0) writer.add_elsewhere(tensor.name, tensor.info, {static_cast<char const*>(tensor.data), tensor.bytes});
  for (auto const& [name, numbers] : progress.history)
    writer.add(std::string(history_prefix) + name, {std::ssize(numbers)}, std::span<double const>(numbers));
  json["format_version"] = version;
  json["dtype"] = tensors.front().info.dtype;
  json["step"] = progress.step;
  json["data"] = to_json(progress.data);
  json["note"] = progress.note;
  std::string text;
  try {
    text = json.dump();
  } catch (Json::type_error const&) {
    fail("checkpoint ", path.string(), ": the note, the data's description or a policy's name is not UTF-8");
  }
  writer.add_metadata(metadata_key, std::move(text));
  std::vector<char> host;
  writer.write(path, [&](std::string_view bytes) {
    resize(host, std::ssize(bytes), "a copy of a tensor");
    backend.download(host.data(), bytes.data(), bytes.size());
    return std::string_view(host.data(), host.size());
  });
}

// A checkpoint being read. The constructor throws if the file is not a checkpoint of this version. The checks throw if it does not fit
// the model or the optimizer. Callers check first and then `read`, so a checkpoint that does not fit changes no tensor.
class File {
 public:
  explicit File(std::filesystem::path const& path) : where_("checkpoint " + one_line(path.string()) + ": "), file_(path) {
    check(file_.metadata().contains(metadata_key), where_, "a safetensors file, but no checkpoint: it has no metadata '", metadata_key,
          "'");
    json_ = parse_json(file_.metadata(metadata_key), where_ + "its description: ");
    Index const theirs = count(json_, "format_version");
    check(theirs == version, where_, "its format is version ", theirs, "; this library reads version ", version);
  }

  CheckpointHeader header() && {
    return {.version = count(json_, "format_version"),
            .pattern = pattern(),
            .dtype = text(json_, "dtype"),
            .step = step(),
            .note = text(json_, "note"),
            .json = std::move(json_)};
  }
  Index step() const { return count(json_, "step"); }
  // optimizer() returns the optimizer's numbers, where() how an error about this file begins.
  Json const& optimizer() const { return member("optimizer"); }
  std::string const& where() const { return where_; }

  // `model` is the result of describe(model). `forward_alone` says that the model will not be trained.
  void check_model(Json const& model, std::string const& dtype, bool forward_alone) const {
    auto const theirs = pattern(), ours = names_in(model["pattern"], where_);
    if (theirs != ours) fail(where_, "the file holds ", words(theirs), ", the model is ", words(ours));
    check(text(json_, "dtype") == dtype, where_, "dtype: ", escaped(text(json_, "dtype")), " in the file, '", dtype, "' in the model");
    // Two keys about the initial parameters, and three that only training reads.
    static constexpr std::string_view ignored[] = {"initialization", "gate_start", "balance", "balance_coefficient", "index_loss"};
    Comparison const compare{where_, "model", std::span(ignored).first(forward_alone ? 5 : 2)};
    compare(member("model"), model["model"], "");
    Json const& layers = member("layers");
    check(layers.is_array() && layers.size() == model["layers"].size(), where_, "'layers' does not fit the pattern: it has ", layers.size(),
          " layers, the pattern ", model["layers"].size());
    for (std::size_t i = 0; i < layers.size(); ++i) {
      Json const& layer = model["layers"][i];
      compare(layers[i], layer, "layer " + std::to_string(i) + " (" + layer["policy"].get_ref<std::string const&>() + ")");
    }
  }
  // Throws unless `tensors` are exactly the file's tensors of the model and, with `training`, of the optimizer.
  void check_tensors(std::vector<StoredTensor> const& tensors, bool training) const {
    std::set<std::string> ours;
    for (auto const& tensor : tensors)
      if (tensor.bytes > 0) check_tensor(tensor), ours.insert(tensor.name);
    for (auto const& [name, info] : file_.tensors()) {
      if (name.starts_with(history_prefix) || (!training && name.starts_with(optimizer_prefix))) continue;
      check(ours.contains(name), where_, "tensor ", escaped(name), " is in the file, but not in the model");
    }
  }
  // Reads into the tensors, which must be writable. If the file cannot be read to its end, throws after some tensors have changed.
  template <class B> void read(B& backend, std::vector<StoredTensor> const& tensors) const {
    for (auto const& tensor : tensors)
      if (tensor.bytes > 0) upload(backend, file_.read_bytes(tensor.name), tensor);
  }
  // The same for tensors that already hold a run. Changes all of them or, if it throws, none. Takes memory for a copy of all tensors.
  template <class B> void read_all_or_none(B& backend, std::vector<StoredTensor> const& tensors) const {
    std::vector<std::vector<char>> host;
    for (auto const& tensor : tensors) host.push_back(tensor.bytes > 0 ? file_.read_bytes(tensor.name) : std::vector<char>{});
    for (std::size_t i = 0; i < tensors.size(); ++i)
      if (tensors[i].bytes > 0) upload(backend, host[i], tensors[i]);
  }

  Progress progress() const {
    Json const& data = member("data");
    Progress result{.step = step(),
                    .data = {text(data, "description"), number(data, "seed"), number(data, "content"), number(data, "drawn")},
                    .history = {},
                    .note = text(json_, "note")};
    for (auto const& [name, info] : file_.tensors())
      if (name.starts_with(history_prefix)) result.history[name.substr(history_prefix.size())] = file_.read_doubles(name);
    return result;
  }

 private:
  template <class B> static void upload(B& backend, std::vector<char> const& bytes, StoredTensor const& tensor) {
    backend.upload(const_cast<void*>(tensor.data), bytes.data(), tensor.bytes);
  }
  Json const& member(char const* key) const { return safetensors::member(json_, key, where_); }
  Index count(Json const& json, char const* key) const {
    return safetensors::to_count(safetensors::member(json, key, where_), where_, key);
  }
  std::uint64_t number(Json const& json, char const* key) const {
    Json const& value = safetensors::member(json, key, where_);
    check(value.is_number_unsigned(), where_, key, " must be an integer from 0 to 2^64 - 1");
    return value.get<std::uint64_t>();
  }
  std::string text(Json const& json, char const* key) const {
    Json const& value = safetensors::member(json, key, where_);
    check(value.is_string(), where_, key, " must be text");
    return value.get_ref<std::string const&>();
  }
  std::vector<std::string> pattern() const { return names_in(member("pattern"), where_); }
  void check_tensor(StoredTensor const& tensor) const {
    check(file_.contains(tensor.name), where_, "tensor ", escaped(tensor.name), " is in the model, but not in the file");
    auto const& theirs = file_.info(tensor.name);
    check(theirs.dtype == tensor.info.dtype, where_, "tensor ", escaped(tensor.name), ": dtype ", theirs.dtype, " in the file, ",
          tensor.info.dtype, " in the model");
    check(theirs.shape == tensor.info.shape, where_, "tensor ", escaped(tensor.name), ": shape ", shape_text(theirs.shape),
          " in the file, ", shape_text(tensor.info.shape), " in the model");
  }

  std::string where_;   // how an error begins
  Safetensors file_;
  Json json_;
};

}  // namespace checkpoint
}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
