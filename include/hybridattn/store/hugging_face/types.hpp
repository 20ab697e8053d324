// Compares a model's type with a config.json, and describes a model as the settings of a config.json.
#ifndef HYBRIDATTN_STORE_HUGGING_FACE_TYPES_HPP
#define HYBRIDATTN_STORE_HUGGING_FACE_TYPES_HPP

#include <hybridattn/nn/language_model.hpp>
#include <hybridattn/store/checkpoint/file.hpp>
#include <hybridattn/store/hugging_face/config_file.hpp>
#include <hybridattn/store/hugging_face/table.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI::hugging_face {

namespace detail {

// {"policy", "options", "sizes"} of each layer. The sizes are defaults.
template <class Stack> struct TypesOf;
template <class... Policies> struct TypesOf<hybridattn::Stack<Policies...>> {
  static std::vector<Json> layers() { return {checkpoint::describe_policy<Policies>(typename Policies::Config{})...}; }
};

// The letter of a model's layer, or '?' if the family has no such layer.
inline char letter_of(Family const& family, Json const& layer) {
  auto const* const kind = family.kind_of_policy(layer["policy"].get_ref<std::string const&>());
  return kind == nullptr ? '?' : kind->letter;
}
inline std::string legend(Family const& family) {
  std::string text;
  for (auto const& kind : family.kinds) text.append(text.empty() ? "" : ", ").append({kind.letter, ' '}).append(kind.word);
  return text;
}
inline void check_layers(Settings const& s, std::vector<Json> const& layers) {
  std::string ours;
  for (auto const& layer : layers) ours += letter_of(*s.family, layer);
  check(s.pattern == ours, s.where, "layer_types are ", one_line(s.pattern, 200), ", but the model's layers are ", ours, " (",
        legend(*s.family), ")");
  for (std::size_t i = 0; i < layers.size(); ++i) s.family->check_options(s, ours[i], layers[i]["options"]);
}

}  // namespace detail

// Throws if the norms of a layer have another placement in the settings than in a model's description.
inline void check_norm_placement(Settings const& s, Json const& description) {
  auto const placement = [](Json const& layer) { return layer.value("norm_placement", "before"); };
  for (std::size_t i = 0; i < s.pattern.size(); ++i) {
    std::string const theirs = placement(s.layers.at(s.pattern[i])), ours = placement(description["layers"][i]);
    check(theirs == ours, s.where, "the norms of layer ", i, " come ", theirs, " attention and feed-forward, but in the model ", ours);
  }
}
// Throws if a config.json asks for layers of other types than the stack has.
template <class Stack> void check_types(Settings const& s) { detail::check_layers(s, detail::TypesOf<Stack>::layers()); }

namespace detail {

// Returns what checkpoint::describe returns for a model of these settings.
inline Json description(Settings const& s) {
  Json json;
  json["model"] = s.model;
  json["layers"] = Json::array();
  for (char letter : s.pattern) json["layers"].push_back(s.layers.at(letter));
  return json;
}

struct CollectShapes {
  std::map<std::string, Extents>& fields;

  template <int Rank> [[gnu::noinline]] void operator()(Path const& path, Shape<Rank> const& shape) const {
    fields[path.str()] = Extents(shape.extent, shape.extent + Rank);
  }
};
inline Outline outline(Json const& description, Family const& family) {
  Outline result;
  result.experts = description["model"]["feed_forward"]["num_experts"].get<Index>();
  for (Json const& layer : description["layers"]) {
    char const letter = letter_of(family, layer);
    check(letter != '?', "Hugging Face: models of ", family.model_type, " have no layer of ",
          layer["policy"].get_ref<std::string const&>());
    bool const has_heads = layer.contains("sizes") && layer["sizes"].contains("num_heads");
    result.layers.push_back({letter, has_heads ? layer["sizes"]["num_heads"].get<Index>() : 1});
  }
  return result;
}

// Throws if a layer differs from an earlier one of its kind, because a config.json has one set of options and sizes for both.
inline void check_same(Settings const& s, Json const& earlier, Json const& layer) {
  for (char const* group : {"options", "sizes"}) {
    Json const ours = layer.value(group, Json::object()), theirs = earlier.value(group, Json::object());
    for (auto const& [name, value] : ours.items())
      check(value == theirs[name], s.where, "layer ", s.pattern.size(), " has ", name, " = ", checkpoint::shown(value),
            ", but an earlier layer of its kind has ", checkpoint::shown(theirs[name]));
  }
  check(layer.value("norm_placement", "before") == earlier.value("norm_placement", "before"), s.where, "layer ", s.pattern.size(),
        " has its norms elsewhere than an earlier layer of its kind");
}
inline Settings settings_of(Json const& description, Family const& family) {
  Settings s;
  s.where = "cannot save the model as " + std::string(family.model_type) + ": ";
  s.family = &family;
  s.model = description["model"];
  for (Json const& layer : description["layers"]) {
    char const letter = letter_of(family, layer);
    check(letter != '?', s.where, "it has a layer of ", layer["policy"].get_ref<std::string const&>(), "; supported are ", family.words());
    if (s.pattern.find(letter) != s.pattern.npos) check_same(s, s.layers[letter], layer);
    s.pattern += letter;
    s.layers[letter] = layer;
  }
  family.check_model(s);
  for (auto const& [letter, layer] : s.layers)
    if (s.pattern.find(letter) != s.pattern.npos) family.check_options(s, letter, layer["options"]);
  return s;
}

}  // namespace detail

// Returns what table() must know of a model.
template <class Stack> Outline outline(LanguageModel<Stack> const& model, Family const& family) {
  Outline result = detail::outline(checkpoint::describe(model), family);
  zip(detail::CollectShapes{result.fields}, model.params());
  return result;
}

// Returns the settings of a family's config.json for a model. Throws if no released model of the family has such settings.
template <class Stack> Settings settings_of(LanguageModel<Stack> const& model, Family const& family) {
  return detail::settings_of(checkpoint::describe(model), family);
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::hugging_face
#endif
