// Which config.json files of the Hugging Face layout are accepted, and the errors for the others.
#include "model_folder.hpp"
#include "peak_memory.hpp"

#include <sys/stat.h>

namespace ha = hybridattn;
namespace hf = ha::hugging_face;
namespace fs = std::filesystem;
using ha::Index;
using namespace model_folder;

TEST_CASE("a config.json that says what the library cannot compute is refused, field and value named") {
  struct Case {
    char const *changes, *named;
  };
  Case const cases[] = {
      {R"({"conv_window": 3})", "the field conv_window (3) is unknown"},
      {R"({"attention_bias": true})", "attention_bias is true; supported is false"},
      {R"({"mlp_bias": true})", "mlp_bias is true; supported is false"},
      {R"({"attention_dropout": 0.1})", "attention_dropout is 0.1; supported is 0"},
      {R"({"hidden_dropout_prob": 0.1})", "hidden_dropout_prob is 0.1; supported is 0"},
      {R"({"attn_output_gate": false})", "attn_output_gate is false; supported is true"},
      {R"({"output_gate_type": "sigmoid"})", R"(output_gate_type is "sigmoid"; supported is "swish", "silu")"},
      {R"({"hidden_act": "gelu"})", R"(hidden_act is "gelu"; supported is "silu", "swish")"},
      {R"({"is_encoder_decoder": true})", "is_encoder_decoder is true; supported is false"},
      {R"({"use_sliding_window": true})", "use_sliding_window is true; supported is false"},
      {R"({"use_sliding_window": true, "sliding_window": 128})", "sliding_window is 128; it is not supported"},
      {R"({"sliding_window": 128})", "sliding_window is 128; it is not supported"},
      {R"({"quantization_config": {"bits": 8}})", R"(quantization_config is {"bits":8}; it is not supported)"},
      {R"({"quantization": {"bits": 4, "group_size": 64}})", R"(quantization is {"bits":4,"group_size":64}; it is not supported)"},
      {R"({"compression_config": {"format": "pack"}})", "compression_config is"},
      {R"({"load_in_4bit": true})", "load_in_4bit is true; supported is false"},
      {R"({"pretraining_tp": 2})", "pretraining_tp is 2; supported is 1"},
      {R"({"residual_multiplier": 0.5})", "residual_multiplier is 0.5; supported is 1"},
      {R"({"pruned_heads": {"1": [0]}})", "pruned_heads is {\"1\":[0]}; supported is {}"},
      {R"({"final_logit_softcapping": 30})", "the field final_logit_softcapping (30) is unknown"},
      {R"({"num_local_experts": 5})", "num_local_experts is 5"},
      {R"({"d_model": 31})", "the field d_model (31) is unknown"},
      {R"({"rope_parameters": {"rope_type": "yarn"}})", R"(rope_parameters: rope_type is "yarn"; supported is "default")"},
      {R"({"rope_parameters": {"factor": 2}})", "rope_parameters: factor is 2; supported is 1"},
      {R"({"rope_parameters": {"beta_fast": 32}})", "rope_parameters: the field beta_fast (32) is unknown"},
      {R"({"rope_scaling": {"type": "linear", "factor": 2}})", R"(rope_scaling: factor is 2)"},
      {R"({"rope_scaling": {"type": "linear"}})", R"(rope_scaling: type is "linear")"},
      {R"({"rope_scaling": "linear"})", "rope_scaling: not a JSON object"},
      {R"({"rope_scaling": {"rope_theta": 500}})", "rope_parameters: rope_theta is 10000, but 500 outside"},
      {R"({"rope_theta": 500})", "rope_parameters: rope_theta is 10000, but 500 outside"},
      {R"({"hidden_size": null})", "the field hidden_size is missing"},
      {R"({"model_type": null})", "the field model_type is missing"},
      {R"({"mlp_only_layers": [0.5]})", "an element of mlp_only_layers is 0.5; it must be an integer from 0"},
      {R"({"mlp_only_layers": {}})", "mlp_only_layers is {}; it must be a list"},
      {R"({"mlp_only_layers": "0"})", R"(mlp_only_layers is "0"; it must be a list)"},
      {R"({"layer_types": ["sliding_attention", "full_attention", "full_attention", "linear_attention"]})",
       R"(layer_types has "sliding_attention"; supported are linear_attention and full_attention)"},
      {R"({"layer_types": "LFFL"})", "it must name num_hidden_layers = 4 layers"},
      {R"({"num_hidden_layers": 5})", "it must name num_hidden_layers = 5 layers"},
      {R"({"model_type": "llama"})", R"(model_type is "llama"; supported are qwen3_next)"},
      {R"({"model_type": "qwen3_5"})", "the field text_config is missing"},
      {R"({"text_config": {"hidden_size": 7}})", "the field text_config ({\"hidden_size\":7}) is unknown"},
  };
  for (Case const& c : cases) check_says(config_message<Tiny>(config_with(c.changes)), {c.named, "config.json: "});
  check_says(config_message<TinySplit>(config_with(R"({"num_experts": 4})", tiny_split)), {"num_experts is 4; supported is 0"});
}

TEST_CASE("a number of a config.json that no model has is refused, whatever it is written as") {
  // Sizes are integers from 1, or 0, up to a limit that no model comes near.
  for (char const* size : {"vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
                           "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim",
                           "linear_conv_kernel_dim", "intermediate_size", "num_experts", "num_experts_per_tok", "moe_intermediate_size",
                           "shared_expert_intermediate_size", "decoder_sparse_step", "full_attention_interval"})
    for (char const* value : {"2.0", "2.5", "1e9", "-1", "\"32\"", "true", "[2]", "{}", "1000000000", "2305843009213693951",
                              "9223372036854775807", "9223372036854775808", "18446744073709551615", "99999999999999999999"})
      check_says(config_message<Tiny>(config_with(("{\"" + std::string(size) + "\": " + value + "}").c_str())),
                 {std::string("config.json: ") + size + " is ", "; it must be an integer from "});
  check_says(config_message<Tiny>(config_with(R"({"vocab_size": 0})")), {"vocab_size is 0; it must be an integer from 1 to 1048576"});
  check_says(config_message<Tiny>(config_with(R"({"mlp_only_layers": [18446744073709551615]})")), {"an element of mlp_only_layers is"});
  struct Real {
    char const *name, *range;
  };
  for (auto const& [name, range] : {Real{"rms_norm_eps", "from 0 to 1"},
                                    {"initializer_range", "from 0 to 1e+06"},
                                    {"rope_theta", "from 1e-06 to 1e+30"},
                                    {"partial_rotary_factor", "from 0 to 1"},
                                    {"router_aux_loss_coef", "from 0 to 1e+06"}})
    for (char const* value : {"-1", "1e300", "\"small\"", "true", "[]"})
      check_says(config_message<Tiny>(config_with(("{\"rope_parameters\": null, \"" + std::string(name) + "\": " + value + "}").c_str())),
                 {std::string(name) + " is ", std::string("it must be a number ") + range});
  for (char const* flag : {"tie_word_embeddings", "norm_topk_prob", "output_router_logits"})
    for (char const* value : {"1", "0", "\"true\"", "[]"})
      check_says(config_message<Tiny>(config_with(("{\"" + std::string(flag) + "\": " + value + "}").c_str())),
                 {std::string(flag) + " is ", "; it must be true or false"});
}

TEST_CASE("a config.json that is no JSON is refused with the place") {
  auto const says = [](std::string_view config, char const* words) {
    check_says(config_message<Tiny>(std::string(config)), {words, "config.json: "});
  };
  says("", "it is empty");
  says("[1]", "line 1, column 1: not a JSON object");
  says("\"text\"", "line 1, column 1: not a JSON object");
  says("  \n ", "line 2, column 2: not a JSON object");
  says("{", "line 1, column 2: not JSON: it ends too early");
  says("{\n  \"a\": 1,\n}", "line 3, column 1: not JSON: a comma before '}'");
  says("{\n  \"a\": 1, // why\n}", "line 2, column 11: not JSON: comments are not allowed");
  says("{\"a\": NaN}", "NaN and Infinity are not allowed");
  says("{\"a\": -Infinity}", "NaN and Infinity are not allowed");
  says("{\"a\": 1e999}", "a number that is too large");
  says("{\"a\": 01}", "not JSON");
  says("{\"a\": .5}", "unexpected '.'");
  says("{'a': 1}", "line 1, column 2: not JSON");
  says("{\"a\": 1, \"b\": {\"c\": 2,\n \"c\": 3}}", "line 2, column 4: the key 'c' occurs twice in one object");
  says("{\"model_type\": 1, \"model_type\": 2}", "the key 'model_type' occurs twice");
  says("{\"a\": \"\xff\"}", "unexpected '\\xff'");
  says("\xef\xbb\xbf{}", "line 1, column 1: it begins with a byte order mark");
  says(std::string_view("{\"a\": 1}\0{}", 11), "line 1, column 9: a NUL byte");
  says("{\"a\": " + std::string(100'000, '['), "line 1, column 70: nested deeper than 64 levels");
  says("{\"a\": 1} {}", "line 1, column 10: not JSON: unexpected '{'");
  says("version https://git-lfs.github.com/spec/v1\noid", "it is no JSON, but a git-lfs pointer");
  says("<!doctype html><p>Not found", "it is no JSON, but an HTML page");
  says(std::string(5'000'000, ' '), "it has 5000000 bytes or more; at most 4194304 are allowed");
}

TEST_CASE("names out of a config.json reach no terminal") {
  auto message = config_message<Tiny>(config_with(R"({"a\u001b[2J\n\u009b1m\u202e": "\u001b]0;"})"));
  check_says(message, {R"(the field a\x1b[2J\x0a\u{9b}1m\u{202e} ("\u001b]0;") is unknown)"});
  CHECK(std::ranges::none_of(message, [](char c) { return c < 32; }));
  message = config_message<Tiny>(config_with(("{\"" + std::string(100'000, 'x') + "\": \"" + std::string(100'000, 'y') + "\"}").c_str()));
  CHECK(message.size() < 1000);
  message = config_message<Tiny>(config_with(R"({"model_type": "\u001b[2J"})"));
  CHECK(message.find('\x1b') == message.npos);
}

TEST_CASE("a config.json must be a regular file, if behind a link") {
  ScratchFolder const scratch;
  auto const path = scratch / "config.json";
  auto const message = [&] { return error_of([&] { hf::pattern(scratch.path()); }); };
  check_says(message(), {"config.json: there is no such file"});
  REQUIRE(::mkfifo(path.c_str(), 0600) == 0);
  check_says(message(), {"config.json: it is a pipe, not a regular file"});
  fs::remove(path);
  fs::create_directory(path);
  check_says(message(), {"config.json: it is a folder, not a regular file"});
  fs::remove(path);
  fs::create_symlink("/dev/zero", path);
  check_says(message(), {"config.json: it is a device, not a regular file"});
  fs::remove(path);
  fs::create_symlink("other.json", path);
  fs::create_symlink("config.json", scratch / "other.json");
  check_says(message(), {"config.json: it is a loop of symbolic links"});
  fs::remove(path);
  fs::create_symlink(tiny / "config.json", path);
  CHECK(message() == no_error);
}

TEST_CASE("fields that change nothing are passed over") {
  auto const accepts = [](char const* changes) {
    INFO(changes);
    CHECK(config_message<Tiny>(config_with(changes)) == no_error);
    CHECK(config_message<TinySplit>(config_with(changes, tiny_split)) == no_error);
  };
  // As fine-tuning, quantising and publishing programs write them.
  accepts(R"({"_name_or_path": "x", "_attn_implementation": "sdpa", "_attn_implementation_autoset": true, "_commit_hash": "0",
    "_experts_implementation": "grouped_mm", "_from_model_config": true, "_pre_quantization_dtype": "bfloat16", "_anything": {"a": [1]}})");
  accepts(R"({"unsloth_version": "2026.1", "unsloth_fixed": true, "unsloth_tiled_mlp": true, "model_name": "unsloth/x", "dtype": "bfloat16",
    "torch_dtype": "bfloat16", "mamba_ssm_dtype": "float32", "transformers_version": "4.57.1", "trl_version": "0.20", "peft_version": "0.17",
    "axolotl_version": "0.9", "transformers.js_config": {"dtype": "q4"}, "auto_map": {"AutoModel": "x.Y"}, "library_name": "transformers"})");
  accepts(
      R"({"tokenizer_class": "Qwen2Tokenizer", "tokenizer_config": {}, "processor_class": null, "bos_token_id": 1, "eos_token_id": [2, 3],
    "pad_token_id": 0, "decoder_start_token_id": null, "forced_eos_token_id": 1, "image_token_id": 5, "model_max_length": 1000000000000000019884624838656,
    "max_position_embeddings": 262144, "padding_side": "left", "chat_template": "{{x}}", "add_bos_token": false})");
  accepts(R"({"use_cache": false, "output_attentions": true, "output_hidden_states": false, "return_dict": true, "id2label": {"0": "A"},
    "label2id": {"A": 0}, "problem_type": null, "torchscript": false, "use_bfloat16": false, "chunk_size_feed_forward": 0, "is_decoder": true,
    "do_sample": true, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "max_length": 20, "num_beams": 1, "repetition_penalty": 1.0,
    "task_specific_params": {}, "gradient_checkpointing": true, "attn_implementation": "flash_attention_2", "cache_implementation": null,
    "base_model_tp_plan": {"layers.*": "colwise"}, "keys_to_ignore_at_inference": ["past_key_values"]})");
  // A field with any name may be null.
  accepts(
      R"({"rope_scaling": null, "sliding_window": null, "quantization_config": null, "conv_window": null, "final_logit_softcapping": null})");
  // merge_patch removes a field for a null, so this text is made by hand.
  auto text = config_with("{}");
  text.insert(1, R"("quantization_config": null, "conv_window": null, "sliding_window": null, "rope_scaling": null, )");
  CHECK(config_message<Tiny>(text) == no_error);
  // Values that the library computes with in any case.
  accepts(
      R"({"attention_bias": false, "mlp_bias": false, "qkv_bias": false, "attention_dropout": 0.0, "hidden_dropout": 0, "embd_pdrop": 0.0,
    "hidden_act": "silu", "hidden_activation": "swish", "attn_output_gate": true, "output_gate_type": "swish", "is_encoder_decoder": false,
    "add_cross_attention": false, "tie_encoder_decoder": false, "pruned_heads": {}, "pretraining_tp": 1, "use_sliding_window": false,
    "sliding_window": 4096, "max_window_layers": 28, "use_qk_norm": true, "rope_interleaved": false, "router_jitter_noise": 0.0,
    "embedding_multiplier": 1.0, "load_in_8bit": false})");
  accepts(
      R"({"d_model": 32, "num_layers": null, "vision_config": {"depth": 3}, "mtp_num_hidden_layers": 1, "num_nextn_predict_layers": 1})");
  accepts(R"({"rope_parameters": {"mrope_section": [2, 1, 1], "factor": 1.0, "original_max_position_embeddings": 4096}})");
  CHECK(config_message<Tiny>(config_with(R"({"num_local_experts": 4, "n_layers": 4})")) == no_error);
  // Fields that only a model with experts reads.
  CHECK(config_message<TinySplit>(config_with(R"({"num_experts": 0, "num_experts_per_tok": 2, "output_router_logits": true,
    "router_aux_loss_coef": 0.001, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "norm_topk_prob": true,
    "decoder_sparse_step": 1, "mlp_only_layers": [0], "num_local_experts": 0})",
                                              tiny_split)) == no_error);
}

TEST_CASE("no pattern of a harmless name takes in one that changes what is computed") {
  for (char const* name : {"layer_types",
                           "hidden_size",
                           "num_experts_per_tok",
                           "rope_theta",
                           "partial_rotary_factor",
                           "rope_scaling",
                           "logit_softcapping",
                           "use_rope_scaling",
                           "norm_topk_prob",
                           "scoring_func",
                           "n_group",
                           "topk_group",
                           "routed_scaling_factor",
                           "attention_sink",
                           "use_mla",
                           "kv_lora_rank",
                           "embedding_scale",
                           "normalize_before",
                           "post_norm",
                           "conv_kernel",
                           "state_size",
                           "a_log",
                           "attn_scale",
                           "query_pre_attn_scalar",
                           "layer_scale",
                           "alibi",
                           "no_rope_layers",
                           "attention_chunk_size",
                           "parallel_attn"}) {
    INFO(name);
    for (auto const& row : hf::detail::harmless) CHECK((row.values != "any" || !hf::detail::matches_any(row.names, name)));
  }
  CHECK(hf::detail::matches("*_token_id", "bos_token_id"));
  CHECK(!hf::detail::matches("*_token_id", "bos_token_ids"));
  CHECK(hf::detail::matches("a*b*c", "a1b2b3c"));
  CHECK(!hf::detail::matches("a*b*c", "a1b2b3"));
  CHECK(hf::detail::matches("_*", "_"));
  CHECK(!hf::detail::matches("", "a"));
}

TEST_CASE("a field may be ignored by name, and the error says how") {
  auto const message = [](char const* changes, std::vector<std::string> ignore) {
    ScratchFolder const scratch;
    scratch.file("config.json", config_with(changes));
    return error_of([&] { hf::config<Tiny>(scratch.path(), {.ignore = std::move(ignore)}); });
  };
  char const* const unknown = R"({"conv_window": 3})";
  check_says(message(unknown, {}), {R"(ReadOptions{.ignore = {"conv_window"}}, or generate --ignore-field conv_window)"});
  CHECK(message(unknown, {"conv_window"}) == no_error);
  check_says(message(unknown, {"window"}), {"conv_window (3) is unknown"});
  char const* const nested = R"({"rope_parameters": {"beta_fast": 32}})";
  check_says(message(nested, {}), {"generate --ignore-field rope_parameters.beta_fast"});
  check_says(message(nested, {"beta_fast"}), {"beta_fast (32) is unknown"});
  CHECK(message(nested, {"rope_parameters.beta_fast"}) == no_error);
  char const* const unsupported = R"({"attention_bias": true})";
  check_says(message(unsupported, {}), {"generate --ignore-field attention_bias"});
  CHECK(message(unsupported, {"attention_bias"}) == no_error);
  check_says(message("{}", {"hidden_size"}), {"the field hidden_size is missing"});
}

TEST_CASE("a folder of other types than the model's is refused, both named") {
  auto const config = config_with("{}");
  CHECK(config_message<Tiny>(config) == no_error);
  check_says(config_message<TinySplit>(config), {"layer_types are LFFL, but the model's layers are LF "});
  check_says(config_message<Tiny>(config_with(R"({"layer_types": null})")), {"layer_types are LLLF, but the model's layers are LFFL"});
  check_says(config_message<ModelOf<25, "LFFL">>(config),
             {"partial_rotary_factor 0.5 turns 4 of head_dim 8", "rotary_percent = 25, which turns 2"});
  check_says(config_message<Tiny>(config_with(R"({"linear_conv_kernel_dim": 3})")), {"linear_conv_kernel_dim is 3", "conv_width = 4"});
  auto const linear_message = [&]<ha::GdnOptions O> {
    return config_message<ha::LanguageModel<ha::Stack<ha::GatedDeltaNet<O>>>>(
        config_with(R"({"layer_types": ["linear_attention"], "num_hidden_layers": 1})"));
  };
  check_says(linear_message.operator()<ha::GdnOptions{.conv_width = 3}>(), {"linear_conv_kernel_dim is 4"});
  check_says(linear_message.operator()<ha::GdnOptions{.output_gate = false}>(), {"output_gate = false"});
  check_says(linear_message.operator()<ha::GdnOptions{.negative_eigenvalues = true}>(), {"negative_eigenvalues = true"});
  auto const full_message = [&]<ha::FullOptions O> {
    return config_message<ha::LanguageModel<ha::Stack<ha::FullAttention<O>>>>(
        config_with(R"({"layer_types": ["full_attention"], "num_hidden_layers": 1})"));
  };
  check_says(full_message.operator()<ha::FullOptions{.window = 8, .rotary_percent = 50}>(), {"window = 8"});
  check_says(full_message.operator()<ha::FullOptions{.output_gate = false, .rotary_percent = 50}>(),
             {"attn_output_gate is true, but", "output_gate = false"});
  check_says(full_message.operator()<ha::FullOptions{.qk_norm = ha::QkNorm::plain, .rotary_percent = 50}>(), {"q_norm"});
  check_says(full_message.operator()<ha::FullOptions{.rotary_percent = 50, .rotary = ha::Rotary::interleaved}>(), {"Rotary::interleaved"});
}

// The bounds are on allocations and on bytes at once, because they hold on every machine. They limit memory, and time with it.
TEST_CASE("numbers in the billions cost nothing before they are refused") {
  auto const repeated = [](std::string const& part, std::size_t count) {
    std::string text;
    for (std::size_t i = 0; i < count; ++i) text += part;
    return text;
  };
  std::string fields, maps;
  for (int i = 0; i < 100'000; ++i) fields += "\"_" + std::to_string(i) + "\": [], ";
  auto with_fields = config_with(R"({"num_hidden_layers": 1000000000})");
  with_fields.insert(1, fields);
  std::string const configs[] = {config_with(R"({"num_hidden_layers": 1000000000, "layer_types": null})"),
                                 config_with(R"({"num_hidden_layers": 1048576, "layer_types": null})"),
                                 config_with(R"({"num_hidden_layers": 10000, "layer_types": null})"),
                                 config_with(R"({"full_attention_interval": 1000000000})"),
                                 config_with(R"({"num_experts": 1000000000000})"),
                                 config_with(R"({"vocab_size": 1000000000000000000})"),
                                 "{\"a\": [" + repeated("[],", 1'300'000) + "0]}",
                                 "{\"a\": [" + repeated("0,", 2'000'000) + "0]}",
                                 "{\"mlp_only_layers\": [" + repeated("0,", 20'000) + "0], " + config_with("{}").substr(1),
                                 with_fields};
  for (auto const& config : configs) {
    INFO(config.substr(0, 100));
    std::string error;
    auto const use = memory::of([&] { error = config_message<Tiny>(config); });
    INFO(error);
    CHECK(error != no_error);
    CHECK(error.size() < 1000);
    auto const size = static_cast<std::ptrdiff_t>(config.size());
    CHECK(use.bytes < 40 * size + 1'000'000);
    CHECK(use.takes < 10 * size + 10'000);
  }
  // A config.json that is right, but has other sizes than the weights.
  for (char const* changes : {R"({"num_experts": 1048576})", R"({"vocab_size": 1048576, "hidden_size": 1048576})",
                              R"({"moe_intermediate_size": 1048576, "intermediate_size": 1048576})"}) {
    ScratchFolder const scratch;
    scratch.file("config.json", config_with(changes));
    fs::copy(tiny / "model.safetensors", scratch / "model.safetensors");
    std::string error;
    auto const use = memory::of([&] { error = load_message<Tiny>(scratch.path()); });
    INFO(changes << ": " << error);
    CHECK(error != no_error);
    CHECK(use.bytes < 10'000'000);
    CHECK(use.takes < 100'000);
  }
}

TEST_CASE("a config.json names its layers, or every how many are full attention") {
  auto const pattern = [](char const* changes) {
    ScratchFolder const scratch;
    scratch.file("config.json", config_with(changes));
    return hf::pattern(scratch.path());
  };
  CHECK(pattern("{}") == "LFFL");
  CHECK(pattern(R"({"layer_types": null})") == "LLLF");
  CHECK(pattern(R"({"layer_types": null, "full_attention_interval": 2, "num_hidden_layers": 6})") == "LFLFLF");
}

TEST_CASE("values of a config.json arrive at every layer's configuration") {
  auto const read = []<class Model>(char const* changes) {
    ScratchFolder const scratch;
    scratch.file("config.json", config_with(changes));
    return hf::config<Model>(scratch.path());
  };
  using Half = ha::FullAttention<ha::FullOptions{.rotary_percent = 50}>;
  auto first = read.operator()<ModelOf<25, "LFLF">>(R"({"rope_parameters": null, "rope_scaling": null, "rope_theta": 10000000,
    "partial_rotary_factor": 0.25, "layer_types": null, "full_attention_interval": 2, "use_sliding_window": false})");
  CHECK(first.policy<ha::Full>().rope_theta == 1e7);
  CHECK(first.feed_forward.balance_coefficient == 0);
  auto later = read.operator()<Tiny>(R"({"rope_parameters": {"rope_theta": 500}, "rms_norm_eps": 0.001, "output_router_logits": true})");
  CHECK(later.policy<Half>().rope_theta == 500);
  CHECK(std::array{later.norm.eps, later.policy<Half>().norm_eps, later.policy<ha::GDN>().norm_eps} == std::array{1e-3, 1e-3, 1e-3});
  CHECK(later.feed_forward.balance_coefficient == 0.05);
  CHECK(later.feed_forward.balance == ha::Balance::pooled);
}

TEST_CASE("what no released model has is not saved, and named") {
  auto const message = [](auto change, hf::Family const& family = hf::qwen3_next) {
    auto config = hf::config<Tiny>(tiny);
    change(config);
    return error_of([&] { hf::settings_of(Tiny{config}, family); });
  };
  CHECK(message([](auto&) {}) == no_error);
  check_says(message([](auto& c) { c.feed_forward.gated = false; }), {"no gate"});
  check_says(message([](auto& c) { c.feed_forward.shared_dim = -1; }), {"no shared expert"});
  check_says(message([](auto& c) { c.norm.weight = ha::NormWeight::plain; }), {"norms are plain"});
  check_says(message([](auto& c) { c.norm.eps = 1e-5; }), {"norm_eps of GDN is 1e-06, that of the blocks 1e-05"});
  check_says(message([](auto& c) { c.template norm_placement<ha::GDN>() = ha::NormPlacement::after; }), {"they must come before"});
  check_says(message([](auto& c) { c.template policy<ha::GDN>().scale = 1; }), {"the scale of GDN is 1, not 0.25"});
  check_says(message([](auto& c) { c.feed_forward.balance = ha::Balance::per_layer, c.feed_forward.balance_coefficient = 1; }),
             {"not Balance::pooled"});
  check_says(message([](auto&) {}, hf::qwen3_5_text), {"cannot save the model as qwen3_5_text", "mixtures"});
  using Two = ha::LanguageModel<ha::Stack<ha::FullAttention<ha::FullOptions{.window = 8}>, ha::Full>>;
  auto const two = [](auto change) {
    Two::Config config{.model_dim = 16, .num_heads = 2};
    change(config);
    return error_of([&] { hf::settings_of(Two{config}, hf::qwen3_next); });
  };
  check_says(two([](auto&) {}), {"layer 1 has window = 0, but an earlier layer of its kind has 8"});
}
