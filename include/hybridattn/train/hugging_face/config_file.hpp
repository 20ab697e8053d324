// config.json of a released model, read and written. Every field is read, or known to be harmless, or an error.
#ifndef HYBRIDATTN_TRAIN_HUGGING_FACE_CONFIG_FILE_HPP
#define HYBRIDATTN_TRAIN_HUGGING_FACE_CONFIG_FILE_HPP

#include <hybridattn/attention/full/full.hpp>
#include <hybridattn/attention/gdn/gdn.hpp>
#include <hybridattn/io/atomic_file.hpp>
#include <hybridattn/io/text.hpp>
#include <hybridattn/nn/feed_forward.hpp>
#include <hybridattn/train/hugging_face/table.hpp>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <filesystem>
#include <set>

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

using Json = nlohmann::json;

// Nothing a text model computes depends on these.
inline constexpr std::string_view harmless =
    "architectures model_type name_or_path _name_or_path transformers_version dtype torch_dtype mamba_ssm_dtype use_cache "
    "bos_token_id eos_token_id pad_token_id max_position_embeddings max_window_layers output_attentions output_hidden_states "
    "return_dict mtp_num_hidden_layers mtp_use_dedicated_embeddings mrope_interleaved mrope_section text_config vision_config "
    "image_token_id video_token_id vision_start_token_id vision_end_token_id id2label label2id problem_type "
    "chunk_size_feed_forward";

inline std::string shown(Json const& value) {
  std::string text = value.dump(-1, ' ', false, Json::error_handler_t::replace);
  return text.size() > 80 ? text.substr(0, 80) + "..." : text;
}

// The fields of a JSON object; each one that is asked for counts as known.
class Fields {
 public:
  Fields(Json const& object, std::string where) : object_(object), where_(std::move(where)) {
    check(object.is_object(), where_, "not a JSON object");
  }

  bool has(std::string const& name) {
    known_.insert(name);
    return object_.contains(name) && !object_[name].is_null();
  }
  Json const& at(std::string const& name) {
    check(has(name), where_, "the field ", name, " is missing");
    return object_[name];
  }
  Index size(std::string const& name, Index smallest = 1) {
    auto const& value = at(name);
    check(value.is_number_integer() && value.get<Index>() >= smallest, where_, name, " is ", shown(value),
          "; it must be an integer, at least ", smallest);
    return value.get<Index>();
  }
  Index size_or(std::string const& name, Index otherwise, Index smallest = 1) { return has(name) ? size(name, smallest) : otherwise; }
  double real_or(std::string const& name, double otherwise) {
    if (!has(name)) return otherwise;
    check(at(name).is_number(), where_, name, " is ", shown(at(name)), "; it must be a number");
    return at(name).get<double>();
  }
  bool flag_or(std::string const& name, bool otherwise) {
    if (!has(name)) return otherwise;
    check(at(name).is_boolean(), where_, name, " is ", shown(at(name)), "; it must be true or false");
    return at(name).get<bool>();
  }
  // A field that is not there, or has the one value that is supported.
  void expect(std::string const& name, Json const& supported) {
    if (has(name)) check(at(name) == supported, where_, name, " is ", shown(at(name)), "; supported is ", shown(supported));
  }
  void expect_none(std::string const& name) {
    if (has(name)) fail(where_, name, " is ", shown(at(name)), "; it is not supported");
  }
  // Every field was read, or is harmless.
  void check_all_known() const {
    auto const others = words(harmless);
    for (auto const& [name, value] : object_.items())
      check(known_.contains(name) || std::ranges::find(others, name) != others.end(), where_, "the field ", name, " (", shown(value),
            ") is unknown; it may change what the model computes, which would not be the model that was released");
  }
  std::string const& where() const { return where_; }

 private:
  Json const& object_;
  std::string where_;
  std::set<std::string> known_;
};

inline Json parse_json(std::filesystem::path const& path) {
  auto json = Json::parse(read_text(path), nullptr, false);
  check(json.is_object(), path.string(), " is not a JSON object");
  return json;
}

inline std::string pattern_of(Fields& fields) {
  static constexpr std::string_view linear = "linear_attention", full = "full_attention";
  Index const depth = fields.size("num_hidden_layers"), interval = fields.size_or("full_attention_interval", 4);
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

// Beside other fields as in the first releases, or an object of their own; where both stand they must agree.
inline void read_rotary(Fields& fields, Settings& s) {
  s.full.rope_theta = fields.real_or("rope_theta", 10000);
  s.rotary_share = fields.real_or("partial_rotary_factor", 0.25);
  for (auto const* name : {"rope_scaling", "rope_parameters"}) {
    if (!fields.has(name)) continue;
    Fields inner{fields.at(name), fields.where() + name + ": "};
    inner.expect("rope_type", "default");
    inner.expect("type", "default");
    for (auto [key, value] : {std::pair{"rope_theta", &s.full.rope_theta}, std::pair{"partial_rotary_factor", &s.rotary_share}}) {
      double const here = inner.real_or(key, *value);
      check(!fields.has(key) || here == *value, inner.where(), key, " is ", here, ", but ", *value, " outside");
      *value = here;
    }
    inner.check_all_known();
  }
}

inline FeedForwardConfig read_mixture(Fields& fields, FeedForwardConfig c) {
  c.num_experts = fields.size("num_experts", 0);
  c.top_k = fields.size("num_experts_per_tok");
  c.expert_dim = fields.size("moe_intermediate_size");
  c.shared_dim = fields.size("shared_expert_intermediate_size", 0);
  c.renormalise = fields.flag_or("norm_topk_prob", true);
  c.decoder_sparse_step = fields.size_or("decoder_sparse_step", 1);
  if (fields.has("mlp_only_layers")) {
    auto const& layers = fields.at("mlp_only_layers");
    for (auto const& layer : layers) {
      check(layers.is_array() && layer.is_number_integer(), fields.where(), "mlp_only_layers is ", shown(layers),
            "; it must be a list of layers' numbers");
      c.mlp_only_layers.push_back(layer.get<Index>());
    }
  }
  double const coefficient = fields.real_or("router_aux_loss_coef", 0.001);
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
  read_rotary(fields, s);
  s.feed_forward.hidden_dim = fields.size("intermediate_size");
  if (s.family == Family::qwen3_next) s.feed_forward = read_mixture(fields, s.feed_forward);
  else fields.expect("mlp_only_layers", Json::array());
}

inline void check_supported(Fields& fields) {
  fields.expect("hidden_act", "silu");
  fields.expect("attention_bias", false);
  fields.expect("attention_dropout", 0);
  fields.expect("attn_output_gate", true);
  fields.expect("is_encoder_decoder", false);
  fields.expect("use_sliding_window", false);
  if (fields.has("sliding_window") && !fields.has("use_sliding_window")) fields.expect_none("sliding_window");
  fields.expect_none("quantization_config");
  fields.check_all_known();
}

}  // namespace detail

// The folder's config.json; throws, naming it, at a field that is unknown, missing, or has a value that is not supported.
inline Settings read_settings(std::filesystem::path const& folder) {
  auto const path = folder / "config.json";
  auto const json = detail::parse_json(path);
  std::string const where = path.string() + ": ";
  detail::Fields outer{json, where};
  auto const& type = outer.at("model_type");
  bool const multimodal = type == "qwen3_5";   // its text model alone
  detail::Fields fields{multimodal ? outer.at("text_config") : json, multimodal ? where + "text_config: " : where};
  auto const& text_type = multimodal ? fields.at("model_type") : type;
  check(text_type == "qwen3_next" || text_type == "qwen3_5_text", where, "model_type is ", detail::shown(text_type),
        "; supported are qwen3_next, qwen3_5_text, and qwen3_5 for its text model");
  Settings s;
  s.where = fields.where();
  s.family = text_type == "qwen3_next" ? Family::qwen3_next : Family::qwen3_5_text;
  s.pattern = detail::pattern_of(fields);
  s.vocab_size = fields.size("vocab_size");
  s.model_dim = fields.size("hidden_size");
  s.norm_eps = fields.real_or("rms_norm_eps", 1e-6);
  s.initializer_range = fields.real_or("initializer_range", 0.02);
  s.tie_embedding = fields.flag_or("tie_word_embeddings", false);
  if (multimodal) s.tie_embedding = outer.flag_or("tie_word_embeddings", s.tie_embedding);
  detail::read_layers(fields, s);
  detail::check_supported(fields);
  if (multimodal) detail::check_supported(outer);
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
