// Released parameter names and our fields: a table, and what one row of it becomes in one layer of a model.
#ifndef HYBRIDATTN_TRAIN_HUGGING_FACE_TABLE_HPP
#define HYBRIDATTN_TRAIN_HUGGING_FACE_TABLE_HPP

#include <hybridattn/core/check.hpp>
#include <hybridattn/core/view.hpp>

#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace hybridattn::inline HYBRIDATTN_ABI::hugging_face {

enum class Family {
  qwen3_next,    // model_type qwen3_next: projections of Gated DeltaNet fused head by head; dense layers and mixtures
  qwen3_5_text   // model_type qwen3_5_text: projections side by side; dense layers only
};

// How a folder's parameters are named and laid out, beyond what its config.json says.
struct Format {
  Family family = Family::qwen3_next;
  bool fused_experts = false;      // all experts of a layer in one tensor, gate and up together, or one matrix each
  std::string prefix = "model.";   // of all names but the head's; model.language_model. in multimodal files
};

// How fields, which are [rows, ...] each, lie in a released tensor.
enum class Layout {
  stacked,      // all rows of the first field, then those of the next; a single field as it is
  convolution,  // stacked, with an axis between: [channels, 1, width]
  by_head,      // for each head (key head of GDN, query head of full attention) its rows of each field
  by_expert,    // [E, rows, C]: for each expert its rows of each field
  each_expert   // a tensor of its own for each expert; {} in the name is its number
};

// `fields` are the paths of ours that make one released tensor, in order.
struct Row {
  std::string_view name, fields;
  Layout layout = Layout::stacked;
};

namespace rows {

inline constexpr Row whole_model[] = {{"embed_tokens.weight", "embedding"}, {"norm.weight", "norm"}};
inline constexpr Row head[] = {{"lm_head.weight", "head"}};   // without the prefix
inline constexpr Row block[] = {{"input_layernorm.weight", "attention_norm"}, {"post_attention_layernorm.weight", "feed_forward_norm"}};
inline constexpr Row gdn[] = {{"conv1d.weight", "prepare.conv_q prepare.conv_k prepare.conv_v", Layout::convolution},
                              {"A_log", "prepare.a_log"},
                              {"dt_bias", "prepare.dt_bias"},
                              {"norm.weight", "finish.norm"},
                              {"out_proj.weight", "w_o"}};
inline constexpr Row gdn_fused[] = {{"in_proj_qkvz.weight", "w.q w.k w.v w_gate", Layout::by_head},
                                    {"in_proj_ba.weight", "w.beta w.g", Layout::by_head}};
inline constexpr Row gdn_split[] = {
    {"in_proj_qkv.weight", "w.q w.k w.v"}, {"in_proj_z.weight", "w_gate"}, {"in_proj_b.weight", "w.beta"}, {"in_proj_a.weight", "w.g"}};
inline constexpr Row full[] = {{"q_proj.weight", "w.q w_gate", Layout::by_head},
                               {"k_proj.weight", "w.k"},
                               {"v_proj.weight", "w.v"},
                               {"o_proj.weight", "w_o"},
                               {"q_norm.weight", "prepare.q_norm"},
                               {"k_norm.weight", "prepare.k_norm"}};
inline constexpr Row dense[] = {{"gate_proj.weight", "dense.gate"}, {"up_proj.weight", "dense.up"}, {"down_proj.weight", "dense.down"}};
inline constexpr Row mixture[] = {{"gate.weight", "router"},
                                  {"shared_expert.gate_proj.weight", "shared.gate"},
                                  {"shared_expert.up_proj.weight", "shared.up"},
                                  {"shared_expert.down_proj.weight", "shared.down"},
                                  {"shared_expert_gate.weight", "shared_gate"}};
inline constexpr Row experts[] = {{"experts.{}.gate_proj.weight", "experts.gate", Layout::each_expert},
                                  {"experts.{}.up_proj.weight", "experts.up", Layout::each_expert},
                                  {"experts.{}.down_proj.weight", "experts.down", Layout::each_expert}};
inline constexpr Row experts_fused[] = {{"experts.gate_up_proj", "experts.gate experts.up", Layout::by_expert},
                                        {"experts.down_proj", "experts.down", Layout::by_expert}};

}  // namespace rows

// What the table must know of a model.
using Extents = std::vector<Index>;
struct Layer {
  char letter = 0;   // L linear_attention, F full_attention
  Index heads = 0;   // of Layout::by_head
};
struct Outline {
  std::vector<Layer> layers;
  Index experts = 0;
  std::map<std::string, Extents> fields;   // every tensor of the model, by path

  std::string pattern() const {
    std::string letters;
    for (Layer const& layer : layers) letters += layer.letter;
    return letters;
  }
};

// A row in a layer: the released tensors of these names, one after the other, hold `groups` times a share of each field.
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

// Makes the entries of one model, row by row; each of the model's tensors stands in one of them.
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
  // Rows of tensors that the model has not (a head that is the embedding, a shared expert) are left out.
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

// Every tensor of a model under its released name; throws, naming it, when one has none.
inline std::vector<Entry> table(Outline const& outline, Format const& format) {
  detail::Builder builder{outline};
  builder.add(format.prefix, "", rows::whole_model);
  builder.add("", "", rows::head);
  std::size_t number = 0;
  for (Layer const& layer : outline.layers) {
    std::string const i = std::to_string(number++) + ".", name = format.prefix + "layers." + i, field = "blocks." + i;
    builder.add(name, field, rows::block);
    if (layer.letter == 'L') {
      bool const fused = format.family == Family::qwen3_next;
      builder.add(name + "linear_attn.", field + "attention.", rows::gdn, layer);
      builder.add(name + "linear_attn.", field + "attention.",
                  fused ? std::span<Row const>(rows::gdn_fused) : std::span<Row const>(rows::gdn_split), layer);
    } else {
      builder.add(name + "self_attn.", field + "attention.", rows::full, layer);
    }
    std::string const mlp = name + "mlp.", feed_forward = field + "feed_forward.";
    builder.add(mlp, feed_forward, rows::dense);
    builder.add(mlp, feed_forward, rows::mixture);
    builder.add(mlp, feed_forward, format.fused_experts ? std::span<Row const>(rows::experts_fused) : std::span<Row const>(rows::experts));
  }
  return builder.take();
}

// f(share) for the shares of an entry's fields, in the order of the released elements.
template <class T, class F> void for_each_share(Index groups, std::vector<std::vector<T>>& fields, F f) {
  for (Index group = 0; group < groups; ++group)
    for (auto& field : fields) {
      std::size_t const share = field.size() / static_cast<std::size_t>(groups);
      f(std::span<T>(field).subspan(static_cast<std::size_t>(group) * share, share));
    }
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::hugging_face
#endif
