// The common part of Qwen's families: layers of Gated DeltaNet and of full attention, and most fields of config.json.
#ifndef HYBRIDATTN_STORE_HUGGING_FACE_QWEN_HPP
#define HYBRIDATTN_STORE_HUGGING_FACE_QWEN_HPP

#include <hybridattn/attention/full/full.hpp>
#include <hybridattn/attention/gdn/gdn.hpp>
#include <hybridattn/nn/feed_forward.hpp>
#include <hybridattn/store/hugging_face/fields.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI::hugging_face::qwen {

inline constexpr LayerKind kinds[] = {{"linear_attention", 'L', GDN::name}, {"full_attention", 'F', Full::name}};

inline constexpr Row whole_model_rows[] = {{"embed_tokens.weight", "embedding"}, {"norm.weight", "norm"}};
inline constexpr Row head_rows[] = {{"lm_head.weight", "head"}};
inline constexpr Row block_rows[] = {{"input_layernorm.weight", "attention_norm"},
                                     {"post_attention_layernorm.weight", "feed_forward_norm"}};
inline constexpr Row gdn_rows[] = {{"conv1d.weight", "prepare.conv_q prepare.conv_k prepare.conv_v", Layout::convolution},
                                   {"A_log", "prepare.a_log"},
                                   {"dt_bias", "prepare.dt_bias"},
                                   {"norm.weight", "finish.norm"},
                                   {"out_proj.weight", "w_o"}};
inline constexpr Row full_rows[] = {{"q_proj.weight", "w.q w_gate", Layout::by_head},
                                    {"k_proj.weight", "w.k"},
                                    {"v_proj.weight", "w.v"},
                                    {"o_proj.weight", "w_o"},
                                    {"q_norm.weight", "prepare.q_norm"},
                                    {"k_norm.weight", "prepare.k_norm"}};
inline constexpr Row dense_rows[] = {
    {"gate_proj.weight", "dense.gate"}, {"up_proj.weight", "dense.up"}, {"down_proj.weight", "dense.down"}};

// The key in Settings::of_family for the share of a head that rotary positions turn.
inline constexpr char const* rotary_share = "rotary_share";

// How many dimensions of a head turn, rounded as in the released models.
inline Index rotary_dim(double share, Index head_dim) { return static_cast<Index>(static_cast<double>(head_dim) * share); }

inline full::Config full_sizes(Settings const& s) { return s.read<full::Config>(s.layers.at('F')["sizes"]); }
inline gdn::Config gdn_sizes(Settings const& s) { return s.read<gdn::Config>(s.layers.at('L')["sizes"]); }
inline FeedForwardConfig feed_forward(Settings const& s) { return s.read<FeedForwardConfig>(s.model["feed_forward"]); }
inline RmsNorm::Options norm(Settings const& s) { return s.read<RmsNorm::Options>(s.model["norm"]); }

// Rotary fields stand among the other fields, as in the first releases, or in an object of their own. Throws if the two differ.
inline void read_rotary(Fields& fields, double& theta, double& share) {
  struct Rotary {
    char const* name;
    double& value;
    double smallest, largest;
    bool is_given = false;
  };
  Rotary values[] = {{"rope_theta", theta, 1e-6, 1e30}, {"partial_rotary_factor", share, 0, 1}};
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

// Reads all fields but those of the feed-forward layers.
inline void read_common(Fields& fields, Settings& s) {
  s.pattern = read_layer_types(fields, *s.family, fields.size_or("full_attention_interval", 4));
  Json& model = s.model;
  model["vocab_size"] = fields.size("vocab_size");
  model["model_dim"] = fields.size("hidden_size");
  double const eps = fields.real_or("rms_norm_eps", 1e-6, 0, 1), range = fields.real_or("initializer_range", 0.02, 0, 1e6);
  checkpoint::to_json(model["norm"], RmsNorm::Options{NormWeight::zero_centred, eps});
  checkpoint::to_json(model["initialization"], Initialization{range, range});
  model["tie_embedding"] = fields.flag_or("tie_word_embeddings", false);
  gdn::Config const linear{.num_heads = fields.size("linear_num_key_heads"),
                           .num_value_heads = fields.size("linear_num_value_heads"),
                           .key_dim = fields.size("linear_key_head_dim"),
                           .value_dim = fields.size("linear_value_head_dim"),
                           .norm_eps = eps};
  s.set_layer('L', GdnOptions{.conv_width = static_cast<int>(fields.size_or("linear_conv_kernel_dim", 4))}, linear);
  full::Config full{.num_heads = fields.size("num_attention_heads"),
                    .num_kv_heads = fields.size("num_key_value_heads"),
                    .head_dim = fields.size("head_dim"),
                    .norm_eps = eps};
  full.rope_theta = 10000;
  double share = 0.25;
  read_rotary(fields, full.rope_theta, share);
  s.set_layer('F', FullOptions{}, full);
  s.of_family[rotary_share] = share;
  model["num_heads"] = full.num_heads;
  if (fields.says("use_sliding_window", false)) fields.pass_over("sliding_window");
}
inline FeedForwardConfig read_dense(Fields& fields) { return {.hidden_dim = fields.size("intermediate_size")}; }

inline void check_gdn(Settings const& s, GdnOptions const& o) {
  auto const width = s.layers.at('L')["options"]["conv_width"].get<int>();
  check(o.conv_width == width, s.where, "linear_conv_kernel_dim is ", width,
        ", but the model's GdnOptions have conv_width = ", o.conv_width);
  check(o.output_gate, s.where, "model_type ", s.family->model_type, " gates linear attention's output, but the model's GdnOptions have ",
        "output_gate = false");
  check(!o.negative_eigenvalues, s.where, "model_type ", s.family->model_type, " has beta in (0, 1), but the model's GdnOptions have ",
        "negative_eigenvalues = true");
}
inline void check_full(Settings const& s, FullOptions const& o) {
  auto const share = s.of_family[rotary_share].get<double>();
  Index const head_dim = full_sizes(s).head_dim, dim = rotary_dim(share, head_dim), ours = rotary_size(head_dim, o.rotary_percent);
  check(dim == ours, s.where, "partial_rotary_factor ", share, " turns ", dim, " of head_dim ", head_dim,
        ", but the model's FullOptions have rotary_percent = ", o.rotary_percent, ", which turns ", ours);
  check(o.window == 0, s.where, "no sliding_window is in use, but the model's FullOptions have window = ", o.window);
  check(o.output_gate, s.where, "attn_output_gate is true, but the model's FullOptions have output_gate = false");
  check(o.qk_norm == QkNorm::zero_centred, s.where, "model_type ", s.family->model_type,
        " has zero-centred q_norm and k_norm, but the model's FullOptions have another qk_norm");
  check(o.rotary == Rotary::half_split, s.where, "model_type ", s.family->model_type,
        " turns halves of a head, but the model's FullOptions have Rotary::interleaved");
}
inline void check_options(Settings const& s, char letter, Json const& options) {
  if (letter == 'L') check_gdn(s, s.read<GdnOptions>(options));
  else check_full(s, s.read<FullOptions>(options));
}

// Throws if a size that config.json has no field for is not the one that follows from the others.
template <class Policy> void check_derived(Settings const& s, typename Policy::Config const& c) {
  auto derived = c;
  derived.scale = 0;
  derived = Policy::complete(derived, s.model["model_dim"].get<Index>(), c.num_heads);
  check(c.scale == derived.scale, s.where, "the scale of ", Policy::name, " is ", c.scale, ", not ", derived.scale);
  check(c.norm_eps == norm(s).eps, s.where, "the norm_eps of ", Policy::name, " is ", c.norm_eps, ", that of the blocks ", norm(s).eps);
}
// Sets the sizes of a kind of layer that the model does not have, because config.json has fields for both kinds.
inline void set_absent_layers(Settings& s) {
  Index const heads = s.model["num_heads"].get<Index>(), dim = std::max<Index>(s.model["model_dim"].get<Index>() / heads, 1);
  if (!s.layers.contains('F')) s.set_layer('F', FullOptions{}, full::Config{.num_heads = heads, .num_kv_heads = heads, .head_dim = dim});
  if (!s.layers.contains('L'))
    s.set_layer('L', GdnOptions{}, gdn::Config{.num_heads = heads, .num_value_heads = heads, .key_dim = dim, .value_dim = dim});
}
inline void check_model(Settings& s) {
  for (auto const& [letter, layer] : s.layers)
    check(!layer.contains("norm_placement"), s.where, "a layer's norms come after attention and feed-forward; they must come before");
  if (s.layers.contains('L')) check_derived<GDN>(s, gdn_sizes(s));
  if (s.layers.contains('F')) check_derived<Full>(s, full_sizes(s));
  s.of_family[rotary_share] = 0.25;
  if (s.layers.contains('F')) {
    auto const percent = s.layers['F']["options"]["rotary_percent"].get<int>();
    Index const head_dim = full_sizes(s).head_dim, dim = rotary_size(head_dim, percent);
    double const share = percent / 100.0;
    s.of_family[rotary_share] = rotary_dim(share, head_dim) == dim ? share : static_cast<double>(dim) / static_cast<double>(head_dim);
  }
  set_absent_layers(s);
  check(norm(s).weight == NormWeight::zero_centred, s.where, "its norms are plain, not zero-centred");
  check(feed_forward(s).gated, s.where, "its feed-forward layers have no gate");
}

inline Json write_common(Settings const& s) {
  auto const full = full_sizes(s);
  auto const gdn = gdn_sizes(s);
  double const deviation = s.read<Initialization>(s.model["initialization"]).linear_deviation;
  Json json = {{"attention_bias", false},
               {"attention_dropout", 0.0},
               {"hidden_act", "silu"},
               {"vocab_size", s.model["vocab_size"]},
               {"hidden_size", s.model["model_dim"]},
               {"intermediate_size", feed_forward(s).hidden_dim},
               {"tie_word_embeddings", s.model["tie_embedding"]},
               {"rms_norm_eps", norm(s).eps},
               {"initializer_range", deviation != 0 ? deviation : 0.02},
               {"num_attention_heads", full.num_heads},
               {"num_key_value_heads", full.num_kv_heads},
               {"head_dim", full.head_dim},
               {"linear_num_key_heads", gdn.num_heads},
               {"linear_num_value_heads", gdn.num_value_heads},
               {"linear_key_head_dim", gdn.key_dim},
               {"linear_value_head_dim", gdn.value_dim},
               {"linear_conv_kernel_dim", s.layers.at('L')["options"]["conv_width"]},
               {"rope_parameters",
                {{"rope_type", "default"}, {"rope_theta", full.rope_theta}, {"partial_rotary_factor", s.of_family[rotary_share]}}}};
  write_layer_types(s, json);
  return json;
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::hugging_face::qwen
#endif
