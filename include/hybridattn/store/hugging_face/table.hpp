// Lists a model's tensors under their released names. The rows of the family's table say which released name holds which fields.
#ifndef HYBRIDATTN_STORE_HUGGING_FACE_TABLE_HPP
#define HYBRIDATTN_STORE_HUGGING_FACE_TABLE_HPP

#include <hybridattn/core/check.hpp>
#include <hybridattn/core/view.hpp>
#include <hybridattn/store/hugging_face/families.hpp>

#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace hybridattn::inline HYBRIDATTN_ABI::hugging_face {

// How a folder's parameters are named and laid out, beyond what its config.json says.
struct Format {
  Family const* family = &qwen3_next;
  bool fused_experts = false;      // all experts of a layer in one tensor, gate and up together; otherwise one matrix for each expert
  std::string prefix = "model.";   // of all names but the head's; model.language_model. in multimodal files
};

// What table() must know of a model.
using Extents = std::vector<Index>;
struct Layer {
  char letter = 0;   // of the family's kinds
  Index heads = 0;   // of Layout::by_head
};
struct Outline {
  std::vector<Layer> layers;
  Index experts = 0;
  std::map<std::string, Extents> fields;   // every tensor of the model, by path
};

// Released tensors and the model's fields that they hold. The numbers of the tensors, in order, are `groups` groups. Each group has an
// equal share of every field, one field after the other.
struct Entry {
  std::vector<std::string> names;
  Extents shape;                     // of each of them
  std::vector<std::string> fields;   // paths
  Index groups = 1;
};

namespace detail {

inline std::vector<std::string> words(std::string_view list) {
  std::vector<std::string> result;
  while (!list.empty()) {
    auto const end = std::min(list.find(' '), list.size());
    result.emplace_back(list.substr(0, end));
    list.remove_prefix(std::min(end + 1, list.size()));
  }
  return result;
}

inline Extents released_shape(Layout layout, std::vector<Extents> const& fields) {
  Extents shape = fields[0];
  std::size_t const rows = layout == Layout::by_expert ? 1 : 0;
  for (std::size_t i = 1; i < fields.size(); ++i) shape[rows] += fields[i][rows];
  if (layout == Layout::each_expert) shape.erase(shape.begin());
  if (layout == Layout::convolution) shape.insert(shape.begin() + 1, 1);
  return shape;
}

inline std::vector<std::string> released_names(Layout layout, std::string const& name, Index experts) {
  if (layout != Layout::each_expert) return {name};
  std::vector<std::string> names;
  auto const number = name.find("{}");
  for (Index e = 0; e < experts; ++e) names.push_back(std::string(name).replace(number, 2, std::to_string(e)));
  return names;
}

// Makes the entries of one model, row by row. Each tensor of the model must be in exactly one entry.
class Builder {
 public:
  explicit Builder(Outline const& outline) : outline_(outline) {}

  void add(std::string const& name, std::string const& field, std::span<Row const> rows, Layer const& layer = {}) {
    for (Row const& row : rows) add(name + std::string(row.name), field, row, layer);
  }
  std::vector<Entry> take() {
    for (auto const& [path, extents] : outline_.fields)
      check(uses_[path] == 1 || is_absent(extents), "Hugging Face: the model's tensor ", path, " has no released name");
    return std::move(entries_);
  }

 private:
  static bool is_absent(Extents const& extents) {
    for (Index extent : extents)
      if (extent != 0) return false;
    return true;
  }
  // Skips rows whose tensors the model does not have, such as the head of a tied model or a shared expert.
  void add(std::string const& name, std::string const& field, Row const& row, Layer const& layer) {
    Entry entry;
    std::vector<Extents> extents;
    for (auto const& word : words(row.fields)) {
      auto const found = outline_.fields.find(field + word);
      if (found == outline_.fields.end() || is_absent(found->second)) continue;
      entry.fields.push_back(found->first);
      extents.push_back(found->second);
      ++uses_[found->first];
    }
    if (extents.empty()) return;
    check(extents.size() == words(row.fields).size(), "Hugging Face: ", name, " holds ", row.fields,
          ", of which the model lacks a part in ", field);
    entry.names = released_names(row.layout, name, outline_.experts);
    entry.shape = released_shape(row.layout, extents);
    entry.groups = row.layout == Layout::by_head ? layer.heads : row.layout == Layout::by_expert ? outline_.experts : 1;
    entries_.push_back(std::move(entry));
  }

  Outline const& outline_;
  std::map<std::string, int> uses_;
  std::vector<Entry> entries_;
};

}  // namespace detail

// Returns every tensor of a model under its released name. Throws if a tensor has none, and names the tensor.
inline std::vector<Entry> table(Outline const& outline, Format const& format) {
  using Place = RowGroup::Place;
  using Experts = RowGroup::Experts;
  detail::Builder builder{outline};
  std::vector<RowGroup const*> groups;
  for (RowGroup const& group : format.family->tensors)
    if (group.experts == Experts::either || (group.experts == Experts::fused) == format.fused_experts) groups.push_back(&group);
  auto const add = [&](RowGroup const& group, std::string const& name, std::string const& field, Layer const& layer) {
    builder.add(name + std::string(group.name), field + std::string(group.field), group.rows, layer);
  };
  for (auto const* group : groups) {
    if (group->place == Place::model) add(*group, format.prefix, "", {});
    if (group->place == Place::outside) add(*group, "", "", {});
  }
  std::size_t number = 0;
  for (Layer const& layer : outline.layers) {
    std::string const i = std::to_string(number++) + ".", name = format.prefix + "layers." + i, field = "blocks." + i;
    for (auto const* group : groups)
      if (group->place == Place::each_layer || (group->place == Place::kind && group->letter == layer.letter))
        add(*group, name, field, layer);
  }
  return builder.take();
}

// Calls f(share) for the shares of an entry's fields, in the order of the released elements.
template <class T, class F> void for_each_share(Index groups, std::vector<std::vector<T>>& fields, F f) {
  for (Index group = 0; group < groups; ++group)
    for (auto& field : fields) {
      std::size_t const share = field.size() / static_cast<std::size_t>(groups);
      f(std::span<T>(field).subspan(static_cast<std::size_t>(group) * share, share));
    }
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::hugging_face
#endif
