// config.json of a released model, read and written.
#ifndef HYBRIDATTN_TRAIN_HUGGING_FACE_CONFIG_FILE_HPP
#define HYBRIDATTN_TRAIN_HUGGING_FACE_CONFIG_FILE_HPP

#include <hybridattn/attention/full/full.hpp>
#include <hybridattn/attention/gdn/gdn.hpp>
#include <hybridattn/nn/feed_forward.hpp>
#include <hybridattn/train/hugging_face/fields.hpp>
#include <hybridattn/train/hugging_face/table.hpp>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <filesystem>

namespace hybridattn::inline HYBRIDATTN_ABI::hugging_face {

// What a config.json says, in the library's words.
struct Settings {
  std::string where;   // how an error begins
  Family family = Family::qwen3_next;
  std::string pattern;   // a letter a layer: L linear_attention, F full_attention
  Index vocab_size = 0, model_dim = 0;
  bool tie_embedding = false;
  double norm_eps = 1e-6, initializer_range = 0.02;
  FeedForwardConfig feed_forward;
  gdn::Config gdn;
  Index conv_width = 4;
  full::Config full;
  double rotary_share = 0.25;   // of a head
};

// The dimensions of a head that turn, as the family counts them.
inline Index rotary_dim(Settings const& s) { return static_cast<Index>(static_cast<double>(s.full.head_dim) * s.rotary_share); }

inline constexpr std::string_view model_type(Family family) { return family == Family::qwen3_next ? "qwen3_next" : "qwen3_5_text"; }

namespace detail {

inline constexpr std::size_t max_config_bytes = 4 << 20;
inline constexpr Index max_layers = 10'000;

inline std::string pattern_of(Fields& fields) {
  static constexpr std::string_view linear = "linear_attention", full = "full_attention";
  Index const depth = fields.size("num_hidden_layers", 1, max_layers), interval = fields.size_or("full_attention_interval", 4);
  std::string letters;
  if (!fields.has("layer_types")) {
    for (Index i = 1; i <= depth; ++i) letters += i % interval == 0 ? 'F' : 'L';
    return letters;
  }
  auto const& types = fields.at("layer_types");
  check(types.is_array() && static_cast<Index>(types.size()) == depth, fields.where(), "layer_types is ", shown(types),
        "; it must name num_hidden_layers = ", depth, " layers");
  for (auto const& type : types) {
    check(type == linear || type == full, fields.where(), "layer_types has ", shown(type), "; supported are ", linear, " and ", full);
    letters += type == full ? 'F' : 'L';
  }
  return letters;
}

// Beside other fields as in the first releases, or an object of their own; where they stand twice they must agree.
inline void read_rotary(Fields& fields, Settings& s) {
  struct Rotary {
    char const* name;
    double& value;
    double smallest, largest;
    bool is_given = false;
  };
  Rotary values[] = {{"rope_theta", s.full.rope_theta, 1e-6, 1e30}, {"partial_rotary_factor", s.rotary_share, 0, 1}};
  auto const read = [&](Fields& from) {
    for (auto& [name, value, smallest, largest, is_given] : values) {
      double const here = from.real_or(name, value, smallest, largest);
      check(!is_given || here == value, from.where(), name, " is ", here, ", but ", value, " outside");
      value = here;
      is_given = is_given || from.has(name);
    }
  };
  read(fields);
  for (auto const* object : {"rope_scaling", "rope_parameters"}) {
    if (!fields.has(object)) continue;
    Fields inner = fields.inside(object);
    read(inner);
    inner.check_all_known();
  }
}

inline FeedForwardConfig read_mixture(Fields& fields, FeedForwardConfig c) {
  c.num_experts = fields.size("num_experts", 0);
  if (c.num_experts == 0) {
    fields.pass_over(of_experts);
    return c;
  }
  c.top_k = fields.size("num_experts_per_tok");
  c.expert_dim = fields.size("moe_intermediate_size");
  c.shared_dim = fields.size("shared_expert_intermediate_size", 0);
  c.renormalise = fields.flag_or("norm_topk_prob", true);
  c.decoder_sparse_step = fields.size_or("decoder_sparse_step", 1);
  c.mlp_only_layers = fields.sizes_or_none("mlp_only_layers", max_layers);
  double const coefficient = fields.real_or("router_aux_loss_coef", 0.001, 0, 1e6);
  c.balance = Balance::pooled;
  c.balance_coefficient = fields.flag_or("output_router_logits", false) ? coefficient : 0;
  return c;
}

inline void read_layers(Fields& fields, Settings& s) {
  s.gdn = {.num_heads = fields.size("linear_num_key_heads"),
           .num_value_heads = fields.size("linear_num_value_heads"),
           .key_dim = fields.size("linear_key_head_dim"),
           .value_dim = fields.size("linear_value_head_dim"),
           .norm_eps = s.norm_eps};
  s.conv_width = fields.size_or("linear_conv_kernel_dim", 4);
  s.full = {.num_heads = fields.size("num_attention_heads"),
            .num_kv_heads = fields.size("num_key_value_heads"),
            .head_dim = fields.size("head_dim"),
            .norm_eps = s.norm_eps};
  s.full.rope_theta = 10000;
  read_rotary(fields, s);
  if (fields.says("use_sliding_window", false)) fields.pass_over("sliding_window");
  s.feed_forward.hidden_dim = fields.size("intermediate_size");
  if (s.family == Family::qwen3_next) s.feed_forward = read_mixture(fields, s.feed_forward);
  else fields.pass_over(of_experts);
}

}  // namespace detail

// The folder's config.json; throws, naming it, at a field that is unknown, missing, or has a value that is not supported.
inline Settings read_settings(std::filesystem::path const& folder, ReadOptions const& options = {}) {
  auto const path = folder / "config.json";
  std::string const where = one_line(path.string()) + ": ";
  auto const json = parse_json(detail::read_json_text(path, detail::max_config_bytes), where);
  detail::Fields outer{json, where, options};
  auto const& type = outer.at("model_type");
  bool const multimodal = type == "qwen3_5";   // its text model alone
  detail::Fields fields = multimodal ? outer.inside("text_config") : outer;
  auto const& text_type = fields.at("model_type");
  check(text_type == "qwen3_next" || text_type == "qwen3_5_text", where, "model_type is ", detail::shown(text_type),
        "; supported are qwen3_next, qwen3_5_text, and qwen3_5 for its text model");
  Settings s;
  s.where = fields.where();
  s.family = text_type == "qwen3_next" ? Family::qwen3_next : Family::qwen3_5_text;
  s.pattern = detail::pattern_of(fields);
  s.vocab_size = fields.size("vocab_size");
  s.model_dim = fields.size("hidden_size");
  s.norm_eps = fields.real_or("rms_norm_eps", 1e-6, 0, 1);
  s.initializer_range = fields.real_or("initializer_range", 0.02, 0, 1e6);
  s.tie_embedding = fields.flag_or("tie_word_embeddings", false);
  if (multimodal) s.tie_embedding = outer.flag_or("tie_word_embeddings", s.tie_embedding);
  detail::read_layers(fields, s);
  fields.check_all_known();
  if (multimodal) outer.check_all_known(&json["text_config"]);
  return s;
}

namespace detail {

inline Json layer_types(std::string const& pattern) {
  Json types = Json::array();
  for (char letter : pattern) types.push_back(letter == 'F' ? "full_attention" : "linear_attention");
  return types;
}
inline void write_mixture(FeedForwardConfig const& c, Json& json) {
  json["num_experts"] = c.num_experts;
  json["num_experts_per_tok"] = c.top_k;
  json["moe_intermediate_size"] = c.expert_dim;
  json["shared_expert_intermediate_size"] = std::max<Index>(c.shared_dim, 0);
  json["norm_topk_prob"] = c.renormalise;
  json["decoder_sparse_step"] = c.decoder_sparse_step;
  json["mlp_only_layers"] = c.mlp_only_layers;
  json["output_router_logits"] = c.balance_coefficient != 0;
  if (c.balance_coefficient != 0) json["router_aux_loss_coef"] = c.balance_coefficient;
}

}  // namespace detail

// The text of a config.json that read_settings reads as these settings.
inline std::string config_text(Settings const& s) {
  bool const next = s.family == Family::qwen3_next;
  detail::Json json = {{"architectures", detail::Json::array({next ? "Qwen3NextForCausalLM" : "Qwen3_5ForCausalLM"})},
                       {"model_type", model_type(s.family)},
                       {"dtype", "float32"},
                       {"attention_bias", false},
                       {"attention_dropout", 0.0},
                       {"hidden_act", "silu"},
                       {"num_hidden_layers", s.pattern.size()},
                       {"layer_types", detail::layer_types(s.pattern)},
                       {"vocab_size", s.vocab_size},
                       {"hidden_size", s.model_dim},
                       {"intermediate_size", s.feed_forward.hidden_dim},
                       {"tie_word_embeddings", s.tie_embedding},
                       {"rms_norm_eps", s.norm_eps},
                       {"initializer_range", s.initializer_range},
                       {"num_attention_heads", s.full.num_heads},
                       {"num_key_value_heads", s.full.num_kv_heads},
                       {"head_dim", s.full.head_dim},
                       {"linear_num_key_heads", s.gdn.num_heads},
                       {"linear_num_value_heads", s.gdn.num_value_heads},
                       {"linear_key_head_dim", s.gdn.key_dim},
                       {"linear_value_head_dim", s.gdn.value_dim},
                       {"linear_conv_kernel_dim", s.conv_width}};
  json["rope_parameters"] = {{"rope_type", "default"}, {"rope_theta", s.full.rope_theta}, {"partial_rotary_factor", s.rotary_share}};
  if (next) {   // where readers of its first releases look
    json["rope_theta"] = s.full.rope_theta;
    json["partial_rotary_factor"] = s.rotary_share;
    detail::write_mixture(s.feed_forward, json);
  }
  return json.dump(2) + "\n";
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::hugging_face
#endif
