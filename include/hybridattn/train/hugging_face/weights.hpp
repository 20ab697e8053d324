// The tensors of a released model by name: model.safetensors, or the files that model.safetensors.index.json names.
#ifndef HYBRIDATTN_TRAIN_HUGGING_FACE_WEIGHTS_HPP
#define HYBRIDATTN_TRAIN_HUGGING_FACE_WEIGHTS_HPP

#include <hybridattn/io/safetensors.hpp>
#include <hybridattn/train/hugging_face/config_file.hpp>
#include <hybridattn/train/hugging_face/table.hpp>

#include <array>
#include <map>
#include <set>

namespace hybridattn::inline HYBRIDATTN_ABI::hugging_face {

class Weights {
 public:
  explicit Weights(std::filesystem::path const& folder) : where_(folder.string() + ": ") {
    auto const single = folder / "model.safetensors", index = folder / "model.safetensors.index.json";
    bool const whole = std::filesystem::exists(single);
    check(whole || std::filesystem::exists(index), where_, "there is neither model.safetensors nor model.safetensors.index.json");
    if (whole) open(single);
    else open_all(folder, index);
  }

  bool contains(std::string const& name) const { return places_.contains(name); }
  bool contains_part(std::string_view part) const {
    for (auto const& [name, file] : places_)
      if (name.find(part) != name.npos) return true;
    return false;
  }
  // The elements of an entry, one released tensor after the other.
  template <class T> std::vector<T> read(Entry const& entry) const {
    std::vector<T> elements;
    for (auto const& name : entry.names) {
      auto const& file = files_[places_.at(name)];
      auto const part = [&] {
        if constexpr (sizeof(T) == 8) return file.read_doubles(name);
        else return file.read_floats(name);
      }();
      if (entry.names.size() == 1) return part;
      elements.insert(elements.end(), part.begin(), part.end());
    }
    return elements;
  }

  // Throws at the first tensor that is missing, has another shape or is not of real numbers, or belongs to nothing.
  void check_against(std::vector<Entry> const& table) const {
    std::set<std::string_view> expected;
    for (Entry const& entry : table)
      for (auto const& name : entry.names) {
        check_tensor(name, entry.shape);
        expected.insert(name);
      }
    for (auto const& [name, file] : places_)
      check(expected.contains(name) || is_ignored(name), where_, "the tensor ", name, " of shape ", text(files_[file].info(name).shape),
            " belongs to nothing in the model");
  }

 private:
  // Draft heads and image encoders: no logit of the text model depends on them.
  static bool is_ignored(std::string_view name) { return name.starts_with("mtp.") || name.starts_with("model.visual."); }

  static std::string text(Extents const& shape) {
    std::string result = "[";
    for (Index extent : shape) result += (result.size() > 1 ? ", " : "") + std::to_string(extent);
    return result + "]";
  }
  void check_tensor(std::string const& name, Extents const& shape) const {
    static constexpr std::array<std::string_view, 4> reals = {"F32", "BF16", "F16", "F64"};
    check(contains(name), where_, "the tensor ", name, " is missing; its shape would be ", text(shape));
    auto const& info = files_[places_.at(name)].info(name);
    check(info.shape == shape, where_, "the tensor ", name, " has the shape ", text(info.shape), "; the model's is ", text(shape));
    check(std::ranges::find(reals, info.dtype) != reals.end(), where_, "the tensor ", name, " is of dtype ", info.dtype,
          "; supported are F32, BF16, F16 and F64");
  }

  void open(std::filesystem::path const& path) {
    files_.emplace_back(path);
    for (auto const& [name, info] : files_.back().tensors())
      check(places_.emplace(name, files_.size() - 1).second, where_, "the tensor ", name, " stands in two files");
  }
  void open_all(std::filesystem::path const& folder, std::filesystem::path const& index) {
    auto const json = detail::parse_json(index);
    check(json.contains("weight_map") && json["weight_map"].is_object(), index.string(), ": there is no weight_map");
    std::set<std::string> names;
    for (auto const& [tensor, file] : json["weight_map"].items()) {
      bool const plain = file.is_string() && file.get<std::string>().find('/') == std::string::npos;
      check(plain, index.string(), ": ", tensor, " is said to be in ", detail::shown(file), ", which is not the name of a file beside it");
      names.insert(file.get<std::string>());
    }
    for (auto const& name : names) open(folder / name);
    for (auto const& [tensor, file] : json["weight_map"].items())
      check(contains(tensor), index.string(), ": the tensor ", tensor, " is not in ", detail::shown(file));
  }

  std::string where_;   // how an error begins
  std::vector<Safetensors> files_;
  std::map<std::string, std::size_t> places_;   // which file
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::hugging_face
#endif
