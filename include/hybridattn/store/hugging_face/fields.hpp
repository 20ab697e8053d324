// Reads the fields of a config.json. A field that is not read and not known to be harmless is an error.
#ifndef HYBRIDATTN_STORE_HUGGING_FACE_FIELDS_HPP
#define HYBRIDATTN_STORE_HUGGING_FACE_FIELDS_HPP

#include <hybridattn/core/view.hpp>
#include <hybridattn/io/json.hpp>
#include <hybridattn/io/regular_file.hpp>
#include <hybridattn/nn/feed_forward.hpp>
#include <hybridattn/store/hugging_face/family.hpp>

#include <cstdint>
#include <filesystem>
#include <set>
#include <string>
#include <string_view>
#include <vector>

namespace hybridattn::inline HYBRIDATTN_ABI::hugging_face {

struct ReadOptions {
  // Fields of config.json that are read as if they were absent, such as "conv_window" or "rope_parameters.factor".
  std::vector<std::string> ignore = {};
  // Families that the folder may be of, besides those that the library knows.
  std::vector<Family const*> families = {};
};

namespace detail {

// Fields that do not change what a text model computes. A * stands for any letters.
struct Harmless {
  std::string_view names;
  std::string_view values = "any";   // the harmless values, as JSON. If empty, only null is harmless
  std::string_view same_as = "";     // a field whose value is harmless here too
};

inline constexpr Harmless harmless[] = {
    // Who made the file, from what, and with which library.
    {"_* architectures auto_map name_or_path model_name base_model* finetuning_task library_name license* author* tags datasets "
     "pipeline_tag language version *_version transformers* unsloth* commit_hash *_commit_hash push_to_hub hub_* run_name wandb_*"},
    // How numbers are stored and computed with.
    {"dtype *_dtype use_bfloat16 bf16 fp16 attn_implementation experts_implementation use_flash_attn use_flash_attention* flash_attn* "
     "use_kernels device_map trust_remote_code low_cpu_mem_usage torchscript *_tp_plan *_pp_plan *_ep_plan tensor_parallel_size fuse_norm "
     "fuse_swiglu fuse_cross_entropy use_cache cache_implementation chunk_size_feed_forward tf_legacy_loss"},
    // Tokens, and the length of the texts that a model was trained with.
    {"tokenizer* processor_class *_token_id *_token_ids *_token_index bos_token eos_token pad_token unk_token sep_token cls_token "
     "mask_token "
     "special_tokens* added_tokens* additional_special_tokens add_bos_token add_eos_token add_prefix_space padding_side truncation_side "
     "chat_template* vocab_file merges_file model_max_length max_position_embeddings original_max_position_embeddings max_window_layers "
     "max_seq_len max_seq_length max_sequence_length seq_length n_positions n_ctx context_length"},
    // What a model is asked to return, and how texts are generated.
    {"output_attentions output_hidden_states output_scores return_dict return_dict_in_generate use_return_dict id2label label2id "
     "num_labels "
     "problem_type task_specific_params keys_to_ignore_at_inference remove_invalid_values is_decoder generation_config do_sample "
     "temperature top_k top_p min_p typical_p num_beams num_beam_groups num_return_sequences max_length min_length max_new_tokens "
     "min_new_tokens repetition_penalty length_penalty diversity_penalty early_stopping no_repeat_ngram_size encoder_no_repeat_ngram_size "
     "bad_words_ids suppress_tokens begin_suppress_tokens exponential_decay_length_penalty prefix"},
    // How it was started and trained.
    {"initializer_* init_std init_method embedding_initializer_range train_* trained_* training_* trainer_* gradient_checkpointing* "
     "use_reentrant neftune_noise_alpha seed *_seed"},
    // Draft heads, and encoders of images and sound, which are skipped. Positions on several axes, which are equal for a text.
    {"mtp_* num_nextn_predict_layers mrope_* vision_config audio_config vision_* image_* video_* audio_* language_model_only"},
    // The values that the library computes with in any case.
    {"hidden_act hidden_activation activation_function", R"("silu", "swish")"},
    {"output_gate_type", R"("swish", "silu")"},
    {"attn_output_gate qk_norm use_qk_norm qk_layernorm use_qk_layernorm is_causal causal use_rope", "true"},
    {"bias *_bias is_encoder_decoder add_cross_attention tie_encoder_decoder use_sliding_window rope_interleave* load_in_*bit", "false"},
    {"*dropout* *_pdrop router_jitter_noise router_z_loss_coef z_loss* label_smoothing*", "0"},
    {"pretraining_tp factor attention_factor *_multiplier logit_scale logits_scaling", "1"},
    {"rope_type type", R"("default")"},
    {"pruned_heads", "{}"},
    {"num_experts num_local_experts n_routed_experts", "0"},
    // Other libraries' names for a field. They must have that field's value.
    {"num_local_experts n_routed_experts", "", "num_experts"},
    {"moe_topk num_experts_per_token", "", "num_experts_per_tok"},
    {"d_model n_embd dim", "", "hidden_size"},
    {"n_layer n_layers num_layers", "", "num_hidden_layers"},
    {"n_head n_heads num_heads", "", "num_attention_heads"},
    {"num_kv_heads n_kv_heads", "", "num_key_value_heads"},
    {"ffn_dim n_inner ffn_hidden_size", "", "intermediate_size"},
    {"layer_norm_eps layer_norm_epsilon norm_eps norm_epsilon", "", "rms_norm_eps"},
    {"padded_vocab_size", "", "vocab_size"},
    // Fields that are not supported.
    {"quantization* compression_config sliding_window", ""}};

// Fields that only a model with experts reads.
inline constexpr std::string_view of_experts =
    "output_router_logits router_* num_experts_per_tok moe_* shared_expert_intermediate_size norm_topk_prob decoder_sparse_step "
    "mlp_only_layers";

inline bool matches(std::string_view pattern, std::string_view name) {
  std::size_t p = 0, n = 0, star = pattern.npos, from = 0;   // the last star, and where its letters end
  while (n < name.size()) {
    if (p < pattern.size() && pattern[p] == '*') star = p++, from = n;
    else if (p < pattern.size() && pattern[p] == name[n]) ++p, ++n;
    else if (star != pattern.npos) p = star + 1, n = ++from;
    else return false;
  }
  return pattern.find_first_not_of('*', p) == pattern.npos;
}
inline bool matches_any(std::string_view patterns, std::string_view name) {
  while (!patterns.empty()) {
    auto const end = std::min(patterns.find(' '), patterns.size());
    if (matches(patterns.substr(0, end), name)) return true;
    patterns.remove_prefix(std::min(end + 1, patterns.size()));
  }
  return false;
}

inline std::string shown(Json const& value) {   // in letters of ASCII
  std::string const text = value.dump(-1, ' ', true, Json::error_handler_t::replace);
  return text.size() > 80 ? text.substr(0, 80) + "..." : text;
}

// Larger than any size of a real model. The product of three such sizes does not overflow.
inline constexpr Index largest_size = 1 << 20, max_layers = 10'000;

inline bool is_mixed(FeedForwardConfig const& c, Index layers) {
  for (Index layer = 0; layer < layers; ++layer)
    if (c.is_mixture(layer)) return true;
  return false;
}

}  // namespace detail

// An object of a config.json; each field that is asked for counts as known.
class Fields {
 public:
  Fields(Json const& object, std::string where, ReadOptions const& options, std::string path = "")
      : object_(object), where_(std::move(where)), path_(std::move(path)), options_(options) {
    check(object.is_object(), where_, "not a JSON object");
  }
  // Returns an object inside this one.
  Fields inside(std::string const& name) { return {at(name), where_ + name + ": ", options_, path_ + name + "."}; }

  // A field that is null counts as absent.
  bool has(std::string const& name) {
    known_.insert(name);
    return object_.contains(name) && !object_[name].is_null() && !is_ignored(name);
  }
  Json const& at(std::string const& name) {
    check(has(name), where_, "the field ", name, " is missing");
    return object_[name];
  }
  Index size(std::string const& name, Index smallest = 1, Index largest = detail::largest_size) {
    return integer(name, at(name), smallest, largest);
  }
  Index size_or(std::string const& name, Index otherwise) { return has(name) ? size(name) : otherwise; }
  std::vector<Index> sizes_or_none(std::string const& name, std::size_t most) {
    std::vector<Index> result;
    if (!has(name)) return result;
    check(at(name).is_array() && at(name).size() <= most, where_, name, " is ", detail::shown(at(name)), "; it must be a list of at most ",
          most, " integers");
    for (auto const& element : at(name)) result.push_back(integer("an element of " + name, element, 0, detail::largest_size));
    return result;
  }
  double real_or(std::string const& name, double otherwise, double smallest, double largest) {
    if (!has(name)) return otherwise;
    bool const fits = at(name).is_number() && smallest <= at(name).get<double>() && at(name).get<double>() <= largest;
    check(fits, where_, name, " is ", detail::shown(at(name)), "; it must be a number from ", smallest, " to ", largest);
    return at(name).get<double>();
  }
  bool flag_or(std::string const& name, bool otherwise) {
    if (!has(name)) return otherwise;
    check(at(name).is_boolean(), where_, name, " is ", detail::shown(at(name)), "; it must be true or false");
    return at(name).get<bool>();
  }
  // Whether the field has this value. This does not count as reading it.
  bool says(std::string const& name, Json const& value) const { return object_.contains(name) && object_[name] == value; }
  // Declares fields of these names harmless.
  void pass_over(std::string_view patterns) { passed_over_ += std::string(patterns) + " "; }

  // Throws at a field that was not read and is not harmless. This object may repeat fields of `inner`.
  void check_all_known(Json const* inner = nullptr) const {
    for (auto const& [name, value] : object_.items()) {
      bool const repeated = inner != nullptr && inner->contains(name) && (*inner)[name] == value;
      if (known_.contains(name) || value.is_null() || is_ignored(name) || repeated || detail::matches_any(passed_over_, name)) continue;
      check_harmless(name, value);
    }
  }
  std::string const& where() const { return where_; }

 private:
  bool is_ignored(std::string const& name) const { return std::ranges::find(options_.ignore, path_ + name) != options_.ignore.end(); }
  Index integer(std::string const& name, Json const& value, Index smallest, Index largest) const {
    bool const fits = value.is_number_unsigned() ? value.get<std::uint64_t>() <= static_cast<std::uint64_t>(largest)
                                                 : value.is_number_integer() && value.get<std::int64_t>() <= largest;
    check(fits && value.get<Index>() >= smallest, where_, name, " is ", detail::shown(value), "; it must be an integer from ", smallest,
          " to ", largest);
    return value.get<Index>();
  }

  void check_harmless(std::string const& name, Json const& value) const {
    std::string supported;
    bool is_named = false;
    for (detail::Harmless const& row : detail::harmless) {
      if (!detail::matches_any(row.names, name)) continue;
      if (row.values == "any" || has_value(row, value)) return;
      is_named = is_named || row.same_as.empty();
      if (supported.empty()) supported = row.values;
    }
    std::string const field = one_line(name, 80), hint = to_ignore(one_line(path_ + name, 200));
    check(is_named, where_, "the field ", field, " (", detail::shown(value),
          ") is unknown; it may change what the model computes, which would not be the model that was released. ", hint);
    fail(where_, field, " is ", detail::shown(value), supported.empty() ? "; it is not supported. " : "; supported is " + supported + ". ",
         hint);
  }
  bool has_value(detail::Harmless const& row, Json const& value) const {
    std::string const other{row.same_as};
    if (!other.empty()) return object_.contains(other) && object_[other] == value;
    auto const values = Json::parse("[" + std::string(row.values) + "]");
    return std::ranges::find(values, value) != values.end();
  }
  static std::string to_ignore(std::string const& field) {
    return "To read the folder as if the field were not there: ReadOptions{.ignore = {\"" + field + "\"}}, or generate --ignore-field " +
           field;
  }

  Json const& object_;
  std::string where_, path_;   // how an error begins, and what stands before a field's name in ReadOptions::ignore
  ReadOptions const& options_;
  std::set<std::string> known_;
  std::string passed_over_;
};

// Reads the layers as most config.json files have them, a word for each layer in layer_types. Without layer_types, every interval-th
// layer is of the family's last kind and the others are of its first kind.
inline std::string read_layer_types(Fields& fields, Family const& family, Index interval) {
  Index const depth = fields.size("num_hidden_layers", 1, detail::max_layers);
  std::string letters;
  if (!fields.has("layer_types")) {
    for (Index i = 1; i <= depth; ++i) letters += (i % interval == 0 ? family.kinds.back() : family.kinds.front()).letter;
    return letters;
  }
  auto const& types = fields.at("layer_types");
  check(types.is_array() && static_cast<Index>(types.size()) == depth, fields.where(), "layer_types is ", detail::shown(types),
        "; it must name num_hidden_layers = ", depth, " layers");
  for (auto const& type : types) {
    auto const* const kind = type.is_string() ? family.kind_of_word(type.get_ref<std::string const&>()) : nullptr;
    check(kind != nullptr, fields.where(), "layer_types has ", detail::shown(type), "; supported are ", family.words());
    letters += kind->letter;
  }
  return letters;
}
inline void write_layer_types(Settings const& s, Json& json) {
  json["num_hidden_layers"] = s.pattern.size();
  json["layer_types"] = Json::array();
  for (char const letter : s.pattern) json["layer_types"].push_back(s.family->kind_of_letter(letter)->word);
}

namespace detail {

// Reads a JSON file of at most `largest` bytes.
inline std::string read_json_text(std::filesystem::path const& path, std::size_t largest) {
  std::string const where = one_line(path.string()) + ": ";
  std::string text = read_regular_file(path, largest, where);
  if (auto const kind = kind_of_file(std::string_view(text).substr(0, 512)); !kind.empty()) fail(where, "it is no JSON, but ", kind);
  return text;
}

}  // namespace detail
}  // namespace hybridattn::inline HYBRIDATTN_ABI::hugging_face
#endif
