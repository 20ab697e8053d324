// Reads and writes the config.json of a released model.
#ifndef HYBRIDATTN_STORE_HUGGING_FACE_CONFIG_FILE_HPP
#define HYBRIDATTN_STORE_HUGGING_FACE_CONFIG_FILE_HPP

#include <hybridattn/store/hugging_face/families.hpp>
#include <hybridattn/store/hugging_face/fields.hpp>

#include <algorithm>
#include <filesystem>

namespace hybridattn::inline HYBRIDATTN_ABI::hugging_face {

namespace detail {

inline constexpr std::size_t max_config_bytes = 4 << 20;

// The library's families, and those of the caller.
inline std::vector<Family const*> known_families(ReadOptions const& options) {
  std::vector<Family const*> known{std::begin(families), std::end(families)};
  known.insert(known.end(), options.families.begin(), options.families.end());
  return known;
}
// "qwen3_next, qwen3_5_text, and qwen3_5 for its text model"
inline std::string names_of(std::vector<Family const*> const& known) {
  std::string names, wrappers;
  for (auto const* family : known) {
    names.append(names.empty() ? "" : ", ").append(family->model_type);
    if (!family->wrapper.empty()) wrappers.append(", and ").append(family->wrapper).append(" for its text model");
  }
  return names + wrappers;
}

}  // namespace detail

// Reads the folder's config.json. Throws if a field is unknown, missing or has a value that is not supported, and names the field.
inline Settings read_settings(std::filesystem::path const& folder, ReadOptions const& options = {}) {
  auto const path = folder / "config.json";
  std::string const where = one_line(path.string()) + ": ";
  auto const json = parse_json(detail::read_json_text(path, detail::max_config_bytes), where);
  auto const known = detail::known_families(options);
  Fields outer{json, where, options};
  auto const& type = outer.at("model_type");
  bool const wrapped = std::ranges::any_of(known, [&](auto const* family) { return !family->wrapper.empty() && type == family->wrapper; });
  Fields fields = wrapped ? outer.inside("text_config") : outer;
  auto const& text_type = fields.at("model_type");
  auto const found = std::ranges::find_if(known, [&](auto const* family) { return text_type == family->model_type; });
  check(found != known.end(), where, "model_type is ", detail::shown(text_type), "; supported are ", detail::names_of(known));
  Settings s;
  s.where = fields.where();
  s.family = *found;
  s.family->read(fields, s);
  if (wrapped) s.model["tie_embedding"] = outer.flag_or("tie_word_embeddings", s.model["tie_embedding"].get<bool>());
  fields.check_all_known();
  if (wrapped) outer.check_all_known(&json["text_config"]);
  return s;
}

// The text of a config.json that read_settings reads as these settings. `dtype` is the scalar of the weights beside it.
inline std::string config_text(Settings const& s, std::string_view dtype = "float32") {
  Json json = s.family->write(s);
  json["dtype"] = dtype;
  json["architectures"] = Json::array({s.family->architecture});
  json["model_type"] = s.family->model_type;
  return json.dump(2) + "\n";
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::hugging_face
#endif
