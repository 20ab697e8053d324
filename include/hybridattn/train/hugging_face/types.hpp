// What a model's types say, held against a config.json, and what a model says, as one.
#ifndef HYBRIDATTN_TRAIN_HUGGING_FACE_TYPES_HPP
#define HYBRIDATTN_TRAIN_HUGGING_FACE_TYPES_HPP

#include <hybridattn/nn/language_model.hpp>
#include <hybridattn/train/hugging_face/config_file.hpp>
#include <hybridattn/train/hugging_face/table.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI::hugging_face {

// A policy that released models have: its letter, and its sizes among the settings.
template <class Policy> struct Released {
  static_assert(sizeof(Policy) == 0, "released models are known with GatedDeltaNet and FullAttention layers only");
};

inline void check_options(GdnOptions const& o, Settings const& s) {
  check(o.conv_width == s.conv_width, s.where, "linear_conv_kernel_dim is ", s.conv_width,
        ", but the model's GdnOptions have conv_width = ", o.conv_width);
  check(o.output_gate, s.where, "model_type ", model_type(s.family), " gates linear attention's output, but the model's GdnOptions have ",
        "output_gate = false");
  check(!o.negative_eigenvalues, s.where, "model_type ", model_type(s.family), " has beta in (0, 1), but the model's GdnOptions have ",
        "negative_eigenvalues = true");
}
inline void check_options(FullOptions const& o, Settings const& s) {
  Index const dim = rotary_dim(s), ours = rotary_size(s.full.head_dim, o.rotary_percent);
  check(dim == ours, s.where, "partial_rotary_factor ", s.rotary_share, " turns ", dim, " of head_dim ", s.full.head_dim,
        ", but the model's FullOptions have rotary_percent = ", o.rotary_percent, ", which turns ", ours);
  check(o.window == 0, s.where, "no sliding_window is in use, but the model's FullOptions have window = ", o.window);
  check(o.output_gate, s.where, "attn_output_gate is true, but the model's FullOptions have output_gate = false");
  check(o.qk_norm == QkNorm::zero_centred, s.where, "model_type ", model_type(s.family),
        " has zero-centred q_norm and k_norm, but the model's FullOptions have another qk_norm");
  check(o.rotary == Rotary::half_split, s.where, "model_type ", model_type(s.family),
        " turns halves of a head, but the model's FullOptions have Rotary::interleaved");
}

template <GdnOptions O> struct Released<GatedDeltaNet<O>> {
  static constexpr char letter = 'L';
  static auto& config(auto& settings) { return settings.gdn; }
  static void set_options(Settings& s) { s.conv_width = O.conv_width; }
};
template <FullOptions O> struct Released<FullAttention<O>> {
  static constexpr char letter = 'F';
  static auto& config(auto& settings) { return settings.full; }
  static void set_options(Settings& s) {
    Index const dim = rotary_size(s.full.head_dim, O.rotary_percent);
    s.rotary_share = O.rotary_percent / 100.0;
    if (rotary_dim(s) != dim) s.rotary_share = static_cast<double>(dim) / static_cast<double>(s.full.head_dim);
  }
};

template <class Stack> struct TypesOf;
template <class... Policies> struct TypesOf<hybridattn::Stack<Policies...>> {
  static std::string pattern() { return {Released<Policies>::letter...}; }
  static void check_options(Settings const& s) { (hugging_face::check_options(Policies::options, s), ...); }
};
// Throws when a config.json is that of other types than the stack's.
template <class Stack> void check_types(Settings const& s) {
  std::string const ours = TypesOf<Stack>::pattern();
  check(s.pattern == ours, s.where, "layer_types are ", one_line(s.pattern, 200), ", but the model's layers are ", ours,
        " (L linear_attention, F full_attention)");
  TypesOf<Stack>::check_options(s);
}

template <class... Policies, class Layers> void set_policies(Types<Policies...>, Settings const& s, Layers& layers) {
  ((layers.template get<Policies>().policy = Released<Policies>::config(s)), ...);
}

// What the table must know of a model.
template <class Stack> Outline outline(LanguageModel<Stack> const& model) {
  Outline result;
  result.experts = model.stack_config().block.feed_forward.num_experts;
  auto const shapes = model.params();
  shapes.blocks.for_each(
      [&](auto block, std::size_t, auto&) {
        using Policy = typename decltype(block)::type::Policy;
        Index const heads = Stack::template layer_config<typename decltype(block)::type>(model.stack_config()).policy.num_heads;
        result.layers.push_back({Released<Policy>::letter, heads});
      },
      shapes.blocks);
  zip([&]<int Rank>(Path const& path, Shape<Rank> const& shape) { result.fields[path.str()] = Extents(shape.extent, shape.extent + Rank); },
      shapes);
  return result;
}

namespace detail {

inline bool is_mixed(FeedForwardConfig const& c, Index layers) {
  for (Index layer = 0; layer < layers; ++layer)
    if (c.is_mixture(layer)) return true;
  return false;
}

// Throws at what no released model of the family has, besides the types.
inline void check_feed_forward(Settings const& s) {
  auto const& c = s.feed_forward;
  bool const mixes = is_mixed(c, std::ssize(s.pattern));
  check(c.gated, s.where, "its feed-forward layers have no gate");
  check(!mixes || s.family == Family::qwen3_next, s.where, "it has mixtures of experts; only qwen3_next has them");
  check(!mixes || c.shared_dim >= 0, s.where, "its mixtures have no shared expert; shared_dim = 0 computes the same and can be saved");
  check(c.balance_coefficient == 0 || c.balance == Balance::pooled, s.where, "its load balancing is not Balance::pooled");
}

template <class Policy, class Layers> void take_policy(Layers const& layers, Settings& s) {
  auto const& c = layers.template get<Policy>().policy;
  auto with_default_scale = c;
  with_default_scale.scale = 0;
  with_default_scale = Policy::complete(with_default_scale, s.model_dim, c.num_heads);
  check(c.scale == with_default_scale.scale, s.where, "the scale of ", Policy::name, " is ", c.scale, ", not ", with_default_scale.scale);
  check(c.norm_eps == s.norm_eps, s.where, "the norm_eps of ", Policy::name, " is ", c.norm_eps, ", that of the blocks ", s.norm_eps);
  Released<Policy>::config(s) = c;
  Released<Policy>::set_options(s);
}
template <class... Policies, class Layers> void take_policies(Types<Policies...>, Layers const& layers, Settings& s) {
  (take_policy<Policies>(layers, s), ...);
}

}  // namespace detail

// A model as the config.json of a family; throws at what no released model of it has.
template <class Stack> Settings settings_of(LanguageModel<Stack> const& model, Family family) {
  auto const& c = model.config();
  auto const& stack = model.stack_config();
  Settings s;
  s.where = "cannot save the model as " + std::string(model_type(family)) + ": ";
  s.family = family;
  s.pattern = TypesOf<Stack>::pattern();
  s.vocab_size = c.vocab_size;
  s.model_dim = c.model_dim;
  s.tie_embedding = c.tie_embedding;
  s.norm_eps = c.norm.eps;
  if (c.initialization.linear_deviation != 0) s.initializer_range = c.initialization.linear_deviation;
  s.feed_forward = stack.block.feed_forward;
  s.full = {.num_heads = c.num_heads, .num_kv_heads = c.num_heads, .head_dim = std::max<Index>(c.model_dim / c.num_heads, 1)};
  s.gdn = {.num_heads = c.num_heads, .num_value_heads = c.num_heads, .key_dim = s.full.head_dim, .value_dim = s.full.head_dim};
  detail::take_policies(typename Stack::Kinds{}, stack.layers, s);
  check(c.norm.weight == NormWeight::zero_centred, s.where, "its norms are plain, not zero-centred");
  check_types<Stack>(s);
  detail::check_feed_forward(s);
  return s;
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::hugging_face
#endif
