// What the library must know of a family of released models. A family is one constant of type Family in a header of its own, such as
// qwen3_next.hpp, and one word in the list of families.hpp. A program adds families of its own by ReadOptions::families.
#ifndef HYBRIDATTN_STORE_HUGGING_FACE_FAMILY_HPP
#define HYBRIDATTN_STORE_HUGGING_FACE_FAMILY_HPP

#include <hybridattn/store/checkpoint/describe.hpp>

#include <map>
#include <span>
#include <string>
#include <string_view>

namespace hybridattn::inline HYBRIDATTN_ABI::hugging_face {

using Json = nlohmann::json;

// How a released tensor holds fields of the model. Each field is [rows, ...].
enum class Layout {
  stacked,      // all rows of the first field, then those of the next; a single field as it is
  convolution,  // stacked, with an axis between: [channels, 1, width]
  by_head,      // for each of the layer's num_heads its rows of each field
  by_expert,    // [E, rows, C]: for each expert its rows of each field
  each_expert   // a tensor of its own for each expert; {} in the name is its number
};

// One released tensor: its name and, in order, the paths of the model's fields that it holds.
struct Row {
  std::string_view name, fields;
  Layout layout = Layout::stacked;
};

// Rows that stand in one place of a model.
struct RowGroup {
  enum class Place {
    model,       // names after Format::prefix, paths as they are
    outside,     // names and paths as they are
    each_layer,  // names after prefix and layers.3., paths after blocks.3.
    kind         // the same, in layers of one kind alone
  };
  // A folder has the experts of a layer together in common tensors (fused), or each one in tensors of its own (apart).
  enum class Experts { either, apart, fused };

  Place place;
  std::span<Row const> rows;
  std::string_view name = "", field = "";   // before the names and the paths of the rows
  char letter = 0;                          // of Place::kind
  Experts experts = Experts::either;        // the folders that have these rows
};

// A kind of layer: the word for it in layer_types, its letter in pattern(), and the name of the policy that computes it.
struct LayerKind {
  std::string_view word;
  char letter;
  std::string_view policy;
};

struct Family;

// The contents of a config.json in the library's terms.
struct Settings {
  std::string where;   // how an error begins
  Family const* family = nullptr;
  std::string pattern;                     // a letter for each layer
  Json model = Json::object();             // "model" of a checkpoint's description: vocab_size, model_dim, feed_forward, ...
  std::map<char, Json> layers;             // of each letter {"options", "sizes", "norm_placement"}, as a checkpoint describes a layer
  Json of_family = Json::object();         // what only the family's own functions read

  // Sets the options and the sizes of a kind of layer. Both are structs of its policy.
  template <class Options, class Config> void set_layer(char letter, Options const& options, Config const& config) {
    checkpoint::to_json(layers[letter]["options"], options);
    checkpoint::to_json(layers[letter]["sizes"], config);
  }
  // Reads a struct that has members(config, f), as in settings.read<full::Config>(settings.layers.at('F')["sizes"]).
  template <class Members> Members read(Json const& json) const {
    Members result{};
    members(result, checkpoint::Read{json, where});
    return result;
  }
};

class Fields;

struct Family {
  std::string_view model_type;     // of config.json
  std::string_view architecture;   // the class name that `save` writes
  // The model_type of folders whose text_config is such a config.json. Empty if there are no such folders.
  std::string_view wrapper = "";
  std::span<LayerKind const> kinds;
  std::span<RowGroup const> tensors;

  // Reads the fields into all settings but where and family. Throws, naming the field, at a value that is not supported.
  void (*read)(Fields& fields, Settings& settings);
  // Throws if a model's options of a kind of layer compute something else than the folder asks for.
  void (*check_options)(Settings const& settings, char letter, Json const& options);
  // Completes the settings that were made from a model. Throws if no released model of the family has such settings.
  void (*check_model)(Settings& settings);
  // Returns the fields of a config.json that `read` reads as these settings, except model_type and architectures.
  Json (*write)(Settings const& settings);

  LayerKind const* kind_of_word(std::string_view word) const {
    return find([&](LayerKind const& kind) { return kind.word == word; });
  }
  LayerKind const* kind_of_letter(char letter) const {
    return find([&](LayerKind const& kind) { return kind.letter == letter; });
  }
  LayerKind const* kind_of_policy(std::string_view policy) const {
    return find([&](LayerKind const& kind) { return kind.policy == policy; });
  }
  // "linear_attention and full_attention"
  std::string words() const {
    std::string list;
    for (std::size_t i = 0; i < kinds.size(); ++i) list.append(i == 0 ? "" : i + 1 < kinds.size() ? ", " : " and ").append(kinds[i].word);
    return list;
  }

 private:
  template <class Is> LayerKind const* find(Is is) const {
    auto const found = std::ranges::find_if(kinds, is);
    return found == kinds.end() ? nullptr : &*found;
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::hugging_face
#endif
