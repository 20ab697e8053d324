// The tensors of a released model by name: model.safetensors, or the files that model.safetensors.index.json names.
#ifndef HYBRIDATTN_STORE_HUGGING_FACE_WEIGHTS_HPP
#define HYBRIDATTN_STORE_HUGGING_FACE_WEIGHTS_HPP

#include <hybridattn/io/safetensors.hpp>
#include <hybridattn/store/hugging_face/fields.hpp>
#include <hybridattn/store/hugging_face/table.hpp>

#include <algorithm>
#include <array>
#include <filesystem>
#include <map>
#include <set>

namespace hybridattn::inline HYBRIDATTN_ABI::hugging_face {

// Where a folder has an index, the index names the file of every tensor, and the tensor must be in that file. A copy of a tensor in
// another file is not read, nor is a model.safetensors that the index does not name.
class Weights {
 public:
  explicit Weights(std::filesystem::path const& folder) : where_(one_line(folder.string()) + ": ") {
    auto const single = folder / "model.safetensors", index = folder / "model.safetensors.index.json";
    if (is_there(index)) {
      open_all(folder, index);
    } else {
      check(is_there(single), where_, "there is neither model.safetensors nor model.safetensors.index.json", other_weights(folder));
      files_.emplace_back(single);
      for (auto const& [name, info] : files_.back().tensors()) places_[name] = 0;
    }
  }

  Index count() const { return std::ssize(places_); }
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
      auto const& file = file_of(name);
      auto const part = [&] {
        if constexpr (std::is_same_v<T, double>) return file.read_doubles(name);
        else if constexpr (std::is_same_v<T, bf16>) return file.read_bf16s(name);
        else return file.read_floats(name);
      }();
      if (entry.names.size() == 1) return part;
      elements.insert(elements.end(), part.begin(), part.end());
    }
    return elements;
  }

  // Throws at the first tensor that is missing, has another shape, is not of real numbers, or is not in the table. `embedding` is the
  // name of the embedding if the model ties its head to it, and empty otherwise.
  void check_against(std::vector<Entry> const& table, std::string const& embedding) const {
    std::set<std::string_view> expected;
    for (Entry const& entry : table)
      for (auto const& name : entry.names) {
        check_tensor(name, entry.shape);
        expected.insert(name);
      }
    for (auto const& [name, file] : places_)
      if (!expected.contains(name) && !is_ignored(name)) check_other(name, embedding);
  }

 private:
  static constexpr char const* head = "lm_head.weight";
  // No logit of the text model depends on draft heads and image encoders. inv_freq follows from config.json.
  static bool is_ignored(std::string_view name) {
    return name.starts_with("mtp.") || name.starts_with("model.visual.") || name.ends_with(".rotary_emb.inv_freq");
  }
  static bool is_there(std::filesystem::path const& path) {   // true for a broken link too
    std::error_code ignored;
    return std::filesystem::exists(std::filesystem::symlink_status(path, ignored));
  }
  // Names up to three files that hold weights under other names, for an error message.
  static std::string other_weights(std::filesystem::path const& folder) {
    static constexpr std::array<std::string_view, 7> kinds = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack"};
    std::string found;
    int count = 0;
    std::error_code error;
    for (std::filesystem::directory_iterator it{folder, error}, end; !error && it != end && count < 3; it.increment(error)) {
      if (std::ranges::find(kinds, it->path().extension().string()) == kinds.end()) continue;
      found += (count++ == 0 ? "; there is " : ", ") + escaped(it->path().filename().string());
    }
    return found;
  }

  static std::string text(Extents const& shape) {
    std::string result = "[";
    for (Index extent : shape) result += (result.size() > 1 ? ", " : "") + std::to_string(extent);
    return result + "]";
  }
  Safetensors const& file_of(std::string const& name) const { return files_[places_.at(name)]; }

  void check_tensor(std::string const& name, Extents const& shape) const {
    static constexpr std::array<std::string_view, 4> reals = {"F32", "BF16", "F16", "F64"};
    check(contains(name), where_, "the tensor ", name, " is missing; its shape would be ", text(shape));
    auto const& info = file_of(name).info(name);
    check(info.shape == shape, where_, "the tensor ", name, " has the shape ", text(info.shape), "; the model's is ", text(shape));
    check(std::ranges::find(reals, info.dtype) != reals.end(), where_, "the tensor ", name, " is of dtype ", info.dtype,
          "; supported are F32, BF16, F16 and F64");
  }
  void check_other(std::string const& name, std::string const& embedding) const {
    auto const& info = file_of(name).info(name);
    bool const is_head = name == head && !embedding.empty();
    check(is_head, where_, "the tensor ", one_line(name, 200), " of shape ", text(info.shape), " belongs to nothing in the model");
    check_tensor(head, file_of(embedding).info(embedding).shape);
    for (Index first = 0, all = info.count(), piece; first < all; first += piece) {
      piece = std::min<Index>(all - first, 1 << 20);
      auto const a = file_of(head).read_doubles(head, first, piece), b = file_of(embedding).read_doubles(embedding, first, piece);
      auto const differs = std::ranges::mismatch(a, b, [](double x, double y) { return x == y || (x != x && y != y); }).in1;
      check(differs == a.end(), where_, "the head is tied to the embedding (tie_word_embeddings), but ", head, " is not ", embedding,
            ": they differ at element ", first + (differs - a.begin()));
    }
  }

  // Keeps nothing but weight_map, so the size of the index limits the memory that this takes.
  void open_all(std::filesystem::path const& folder, std::filesystem::path const& index) {
    constexpr std::size_t max_index_bytes = 100'000'000;
    std::string const where = one_line(index.string()) + ": ";
    std::map<std::string, std::size_t> numbers;   // of the files
    bool has_map = false;
    for_each_json_member(detail::read_json_text(index, max_index_bytes), where, [&](std::string const& key, nlohmann::json&& map) {
      if (key != "weight_map") return;
      check(map.is_object(), where, "weight_map is not a JSON object");
      has_map = true;
      for (auto const& [tensor, file] : map.items())
        places_[tensor] = numbers.emplace(file_name(tensor, file, where), numbers.size()).first->second;
    });
    check(has_map, where, "there is no weight_map");
    std::vector<std::string> names(numbers.size());
    for (auto const& [name, number] : numbers) names[number] = name;
    for (auto const& name : names) {
      check(is_there(folder / name), where, "it names the file ", escaped(name), ", which is not there",
            is_there(folder / "model.safetensors") ? "; it does not name model.safetensors, which is there" : "");
      files_.emplace_back(folder / name);
    }
    check_index(names, where);
  }
  static std::string file_name(std::string const& tensor, nlohmann::json const& file, std::string const& where) {
    auto const is_plain = [](std::string const& name) {
      return !name.empty() && name != "." && name != ".." && name.find_first_of(std::string_view("/\\\0", 3)) == name.npos;
    };
    check(file.is_string() && is_plain(file.get_ref<std::string const&>()), where, one_line(tensor, 200), " is said to be in ",
          detail::shown(file), ", which is not the name of a file beside it");
    return file.get<std::string>();
  }
  void check_index(std::vector<std::string> const& names, std::string const& where) const {
    auto const also_in = [&](std::string const& tensor) {
      for (std::size_t i = 0; i < files_.size(); ++i)
        if (files_[i].contains(tensor)) return "it is in " + escaped(names[i]);
      return std::string("no file has it");
    };
    for (auto const& [tensor, number] : places_)
      if (!files_[number].contains(tensor))
        fail(where, "the tensor ", one_line(tensor, 200), " is not in ", escaped(names[number]), " as it says; ", also_in(tensor));
    for (std::size_t i = 0; i < files_.size(); ++i)
      for (auto const& [tensor, info] : files_[i].tensors())
        check(contains(tensor) || is_ignored(tensor), where, "it does not name the tensor ", one_line(tensor, 200), ", which is in ",
              escaped(names[i]));
  }

  std::string where_;   // how an error begins
  std::vector<Safetensors> files_;
  std::map<std::string, std::size_t> places_;   // which file
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::hugging_face
#endif
