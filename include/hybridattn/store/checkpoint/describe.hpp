// Describes a model as JSON. A checkpoint holds this description, and loading compares it with the description of the caller's model.
//
// A policy of your own is described by its name alone. To have its config and its options described too, define members(config, f) and
// members(options, f), as here for the library's policies, in the namespaces of these types.
#ifndef HYBRIDATTN_STORE_CHECKPOINT_DESCRIBE_HPP
#define HYBRIDATTN_STORE_CHECKPOINT_DESCRIBE_HPP

#include <hybridattn/attention/attention.hpp>
#include <hybridattn/io/safetensors.hpp>
#include <hybridattn/nn/language_model.hpp>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <array>
#include <string>
#include <vector>

namespace hybridattn::inline HYBRIDATTN_ABI {

namespace checkpoint {

using Json = nlohmann::json;

template <class C, class T>
concept Either = std::is_same_v<std::remove_const_t<C>, T>;   // a T, or a T const

// Files have a word for each enumerator. The words are in the order of the enumerators' values.
template <class E> inline constexpr std::array<char const*, 0> words_of{};
template <> inline constexpr std::array words_of<QkNorm>{"none", "plain", "zero_centred"};
template <> inline constexpr std::array words_of<Rotary>{"half_split", "interleaved"};
template <> inline constexpr std::array words_of<NormWeight>{"plain", "zero_centred"};
template <> inline constexpr std::array words_of<NormPlacement>{"before", "after"};
template <> inline constexpr std::array words_of<Balance>{"per_layer", "pooled"};
template <> inline constexpr std::array words_of<gdn::GateStart>{"fla", "transformers"};

}  // namespace checkpoint

// members(c, f) calls f(name, member) for every member that a checkpoint keeps, to write it or to read it.
namespace full {
template <checkpoint::Either<Config> C> void members(C& c, auto f) {
  f("num_heads", c.num_heads);
  f("num_kv_heads", c.num_kv_heads);
  f("head_dim", c.head_dim);
  f("scale", c.scale);
  f("rope_theta", c.rope_theta);
  f("norm_eps", c.norm_eps);
}
}  // namespace full
namespace gdn {
template <checkpoint::Either<Config> C> void members(C& c, auto f) {
  f("num_heads", c.num_heads);
  f("num_value_heads", c.num_value_heads);
  f("key_dim", c.key_dim);
  f("value_dim", c.value_dim);
  f("scale", c.scale);
  f("norm_eps", c.norm_eps);
  f("gate_start", c.gate_start);
}
}  // namespace gdn
namespace dsa {
// The stage is left out, because it belongs to a training step and not to the model.
template <checkpoint::Either<Config> C> void members(C& c, auto f) {
  f("num_heads", c.num_heads);
  f("num_kv_heads", c.num_kv_heads);
  f("head_dim", c.head_dim);
  f("scale", c.scale);
  f("index_heads", c.index_heads);
  f("index_dim", c.index_dim);
  f("index_scale", c.index_scale);
  f("rope_theta", c.rope_theta);
  f("norm_eps", c.norm_eps);
  f("index_loss", c.index_loss);
}
}  // namespace dsa
template <checkpoint::Either<FullOptions> C> void members(C& o, auto f) {
  f("window", o.window);
  f("qk_norm", o.qk_norm);
  f("output_gate", o.output_gate);
  f("rotary_percent", o.rotary_percent);
  f("rotary", o.rotary);
}
template <checkpoint::Either<GdnOptions> C> void members(C& o, auto f) {
  f("conv_width", o.conv_width);
  f("output_gate", o.output_gate);
  f("negative_eigenvalues", o.negative_eigenvalues);
}
template <checkpoint::Either<SparseOptions> C> void members(C& o, auto f) {
  f("top_k", o.top_k);
  f("top_k_percent", o.top_k_percent);
  f("qk_norm", o.qk_norm);
  f("output_gate", o.output_gate);
  f("rotary_percent", o.rotary_percent);
  f("rotary", o.rotary);
  f("index_rotary_percent", o.index_rotary_percent);
  f("index_norm", o.index_norm);
}
template <checkpoint::Either<RmsNorm::Options> C> void members(C& o, auto f) {
  f("weight", o.weight);
  f("eps", o.eps);
}
template <checkpoint::Either<Initialization> C> void members(C& init, auto f) {
  f("linear_deviation", init.linear_deviation);
  f("embedding_deviation", init.embedding_deviation);
}
template <checkpoint::Either<FeedForwardConfig> C> void members(C& c, auto f) {
  f("hidden_dim", c.hidden_dim);
  f("gated", c.gated);
  f("num_experts", c.num_experts);
  f("top_k", c.top_k);
  f("expert_dim", c.expert_dim);
  f("shared_dim", c.shared_dim);
  f("renormalise", c.renormalise);
  f("decoder_sparse_step", c.decoder_sparse_step);
  f("mlp_only_layers", c.mlp_only_layers);
  f("balance_coefficient", c.balance_coefficient);
  f("balance", c.balance);
}

namespace checkpoint {

struct Write {
  Json& json;

  void operator()(char const* name, auto const& member) const {
    using Member = std::remove_cvref_t<decltype(member)>;
    if constexpr (std::is_enum_v<Member>) json[name] = words_of<Member>[static_cast<std::size_t>(member)];
    else json[name] = member;
  }
};
// Larger than any size of a real model. The product of three such sizes does not overflow.
inline constexpr Index largest_size = 1 << 20;

// Throws if a member is missing, is of another kind, or is larger than largest_size.
struct Read {
  Json const& json;
  std::string const& where;

  template <class Member> void operator()(char const* name, Member& member) const {
    Json const& value = safetensors::member(json, name, where);
    if constexpr (std::is_enum_v<Member>) {
      member = enumerator<Member>(name, value);
    } else if constexpr (std::is_same_v<Member, bool>) {
      check(value.is_boolean(), where, "'", name, "' is of another kind; it must be true or false");
      member = value.get<bool>();
    } else if constexpr (std::is_integral_v<Member>) {
      member = static_cast<Member>(size(name, value));
    } else if constexpr (std::is_floating_point_v<Member>) {
      check(value.is_number(), where, "'", name, "' is of another kind; it must be a number");
      member = value.get<Member>();
    } else {   // a list of layers
      check(value.is_array(), where, "'", name, "' is of another kind; it must be a list of integers");
      member.clear();
      for (Json const& element : value) member.push_back(size(name, element));
    }
  }

 private:
  Index size(char const* name, Json const& value) const {
    check(value.is_number_integer(), where, "'", name, "' is ", value.is_number() ? value.dump() : "of another kind",
          "; it must be an integer");
    bool const fits = value.is_number_unsigned() ? value.get<std::uint64_t>() <= largest_size
                                                 : -1 <= value.get<std::int64_t>() && value.get<std::int64_t>() <= largest_size;
    check(fits, where, "'", name, "' is ", value.dump(), "; allowed are sizes up to ", largest_size);
    return value.get<Index>();
  }
  template <class E> E enumerator(char const* name, Json const& value) const {
    check(value.is_string(), where, "'", name, "' is of another kind; it must be a word");
    auto const& words = words_of<E>;
    auto const found = std::ranges::find(words, std::string_view(value.get_ref<std::string const&>()));
    std::string allowed;
    for (std::string_view const word : words) allowed.append(allowed.empty() ? "" : ", ").append(word);
    check(found != words.end(), where, "'", name, "': unknown word ", escaped(value.get_ref<std::string const&>()), "; allowed are ",
          allowed);
    return static_cast<E>(found - words.begin());
  }
};
template <class C>
concept HasMembers = requires(C& c, Write write) { members(c, write); };
template <HasMembers C> void to_json(Json& json, C const& c) { members(c, Write{json}); }

template <class P> Json describe_policy(typename P::Config const& config) {
  Json json;
  json["policy"] = std::string(P::name);
  if constexpr (requires {
                  P::options;
                  requires HasMembers<decltype(P::options)>;
                })
    to_json(json["options"], P::options);
  if constexpr (HasMembers<typename P::Config const>) to_json(json["sizes"], config);
  return json;
}

// norm_placement is left out where the norms come before their branches, because older files do not have it.
template <class P> Json describe_layer(LayerConfig<P> const& layer) {
  Json json = describe_policy<P>(layer.policy);
  if (layer.norm_placement != NormPlacement::before) Write{json}("norm_placement", layer.norm_placement);
  return json;
}

// layers[i] = kinds[kind_of_layer[i]]
inline Json describe_stack(BlockConfig const& block, std::vector<Json> const& kinds, std::vector<std::size_t> const& kind_of_layer) {
  Json json;
  for (std::size_t const kind : kind_of_layer) {
    json["pattern"].push_back(kinds[kind]["policy"]);
    json["layers"].push_back(kinds[kind]);
  }
  Json& model = json["model"];
  model["model_dim"] = block.model_dim;
  to_json(model["feed_forward"], block.feed_forward);
  to_json(model["norm"], block.norm);
  to_json(model["initialization"], block.initialization);
  return json;
}

// {"pattern": ["GDN", "Full", ...], "layers": [{"policy", "options", "sizes", "norm_placement"}, ...], "model": {"vocab_size", ...}}.
// Sizes that the user left to a default have the value that the default stands for.
template <class Model> Json describe(Model const& model) {
  using Stack = typename Model::Stack;
  auto const& stack = model.stack_config();
  std::vector<Json> kinds;
  auto const add_all = [&]<class... Ps>(Types<Ps...>) { (kinds.push_back(describe_layer(stack.layers.template get<Ps>())), ...); };
  add_all(typename Stack::Kinds{});
  std::vector<std::size_t> kind_of_layer;
  for (auto const slot : Stack::Blocks::places) kind_of_layer.push_back(slot.type);
  Json json = describe_stack(stack.block, kinds, kind_of_layer);
  json["model"]["vocab_size"] = model.config().vocab_size;
  json["model"]["num_heads"] = model.config().num_heads;
  json["model"]["tie_embedding"] = model.config().tie_embedding;
  return json;
}

// The inverse of describe: returns the configuration of a model of the same pattern. Throws an Error that begins with `where`.
template <class Model> typename Model::Config configuration(Json const& json, std::string const& where) {
  using Stack = typename Model::Stack;
  typename Model::Config config{};
  Json const& model = safetensors::member(json, "model", where);
  Read const read{model, where};
  read("vocab_size", config.vocab_size);
  read("model_dim", config.model_dim);
  read("num_heads", config.num_heads);
  read("tie_embedding", config.tie_embedding);
  members(config.feed_forward, Read{safetensors::member(model, "feed_forward", where), where});
  members(config.norm, Read{safetensors::member(model, "norm", where), where});
  members(config.initialization, Read{safetensors::member(model, "initialization", where), where});
  Json const& layers = safetensors::member(json, "layers", where);
  check(layers.is_array() && layers.size() == Stack::depth, where, "'layers' does not fit the pattern: it has ", layers.size(),
        " layers, the pattern ", Stack::depth);
  auto const read_layer = [&]<class P>(std::size_t kind, LayerConfig<P>& layer) {
    for (std::size_t i = 0; i < Stack::depth; ++i) {
      if (Stack::Blocks::places[i].type != kind) continue;
      members(layer.policy, Read{safetensors::member(layers[i], "sizes", where), where});
      if (layers[i].contains("norm_placement")) Read{layers[i], where}("norm_placement", layer.norm_placement);
    }
  };
  [&]<class... Ps>(Types<Ps...>) {
    std::size_t kind = 0;
    (read_layer(kind++, config.layers.template get<Ps>()), ...);
  }(typename Stack::Kinds{});
  return config;
}

}  // namespace checkpoint
}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
