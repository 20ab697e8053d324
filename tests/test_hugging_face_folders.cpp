// What may lie in a folder of the Hugging Face layout, and what a folder that is not quite one gets to hear.
#include "catch.hpp"

#include "released.hpp"
#include "scratch_folder.hpp"

#include <hybridattn/hybridattn.hpp>
#include <hybridattn/io.hpp>

#include <cstring>
#include <map>

namespace ha = hybridattn;
namespace hf = ha::hugging_face;
namespace fs = std::filesystem;
using ha::Index;

namespace {

using Json = nlohmann::json;

fs::path const tiny = fs::path(HYBRIDATTN_GOLDEN_DIR) / "models/qwen3_next_tiny";
fs::path const tiny_split = fs::path(HYBRIDATTN_GOLDEN_DIR) / "models/qwen3_5_text_tiny";
using Tiny = ModelOf<50, "LFFL">;
using TinySplit = ModelOf<50, "LF">;

template <class F> std::string message_of(F f) {
  try {
    f();
  } catch (ha::Error const& error) {
    return error.what();
  }
  return "no error";
}

void check_says(std::string const& message, std::initializer_list<std::string> words) {
  for (auto const& word : words) {
    INFO("'" << message << "' should say '" << word << "'");
    CHECK(message.find(word) != message.npos);
  }
}

Json config_of(fs::path const& folder) { return Json::parse(content_of(folder / "config.json")); }
// A config.json with some fields changed; null removes one.
std::string config_with(char const* changes, fs::path const& folder = tiny) {
  auto json = config_of(folder);
  json.merge_patch(Json::parse(changes));
  return json.dump();
}
template <class Model> std::string config_message(std::string const& config) {
  ScratchFolder const scratch;
  scratch.file("config.json", config);
  return message_of([&] { hf::config<Model>(scratch.path()); });
}

// A checkpoint's tensors, to be changed and written again.
struct Stored {
  std::string dtype;
  std::vector<Index> shape;
  std::string bytes;
};
using Checkpoint = std::map<std::string, Stored>;

template <class T> std::string bytes_of(std::vector<T> const& elements) {
  return {reinterpret_cast<char const*>(elements.data()), elements.size() * sizeof(T)};
}
std::vector<float> floats_of(Stored const& tensor) {
  std::vector<float> elements(tensor.bytes.size() / sizeof(float));
  std::memcpy(elements.data(), tensor.bytes.data(), tensor.bytes.size());
  return elements;
}
Checkpoint checkpoint_of(fs::path const& folder) {
  ha::Safetensors const file{folder / "model.safetensors"};
  Checkpoint result;
  for (auto const& [name, info] : file.tensors()) result[name] = {info.dtype, info.shape, bytes_of(file.read_floats(name))};
  return result;
}
void write(ScratchFolder const& scratch, std::string_view name, Checkpoint const& checkpoint) {
  Json header = Json::object();
  std::string data;
  for (auto const& [tensor, stored] : checkpoint) {
    header[tensor] = {{"dtype", stored.dtype}, {"shape", stored.shape}, {"data_offsets", {data.size(), data.size() + stored.bytes.size()}}};
    data += stored.bytes;
  }
  auto const text = header.dump();
  scratch.file(name, bytes_of(std::vector{std::uint64_t{text.size()}}) + text + data);
}

// Loads a folder and writes what came of it as the first releases are written.
template <class Model> void load_and_save(fs::path const& from, fs::path const& to, hf::Family family) {
  ha::Cpu cpu{1};
  Model const model{hf::config<Model>(from)};
  hf::save(cpu, model, hf::load<double>(cpu, model, from), to, {.family = family});
}
template <class Model> std::string load_message(fs::path const& folder) {
  ha::Cpu cpu{1};
  return message_of([&] { hf::load<double>(cpu, Model{hf::config<Model>(folder)}, folder); });
}
std::string load_message(Checkpoint const& checkpoint) {
  ScratchFolder const scratch;
  scratch.file("config.json", content_of(tiny / "config.json"));
  write(scratch, "model.safetensors", checkpoint);
  return load_message<Tiny>(scratch.path());
}

}  // namespace

TEST_CASE("a config.json that says what the library cannot compute is refused, field and value named") {
  struct Case {
    char const *changes, *named;
  };
  Case const cases[] = {
      {R"({"conv_window": 3})", "the field conv_window (3) is unknown"},
      {R"({"hidden_act": "gelu"})", R"(hidden_act is "gelu"; supported is "silu")"},
      {R"({"attention_bias": true})", "attention_bias is true; supported is false"},
      {R"({"attention_dropout": 0.1})", "attention_dropout is 0.1"},
      {R"({"attn_output_gate": false})", "attn_output_gate is false"},
      {R"({"use_sliding_window": true})", "use_sliding_window is true"},
      {R"({"sliding_window": 128})", "sliding_window is 128"},
      {R"({"quantization_config": {"bits": 8}})", R"(quantization_config is {"bits":8})"},
      {R"({"rope_parameters": {"rope_type": "yarn"}})", R"(rope_parameters: rope_type is "yarn"; supported is "default")"},
      {R"({"rope_parameters": {"factor": 2}})", "rope_parameters: the field factor (2) is unknown"},
      {R"({"rope_scaling": {"type": "linear", "factor": 2}})", R"(rope_scaling: type is "linear")"},
      {R"({"rope_theta": 500})", "rope_parameters: rope_theta is 10000, but 500 outside"},
      {R"({"hidden_size": null})", "the field hidden_size is missing"},
      {R"({"hidden_size": "32"})", R"(hidden_size is "32"; it must be an integer)"},
      {R"({"vocab_size": 0})", "vocab_size is 0; it must be an integer, at least 1"},
      {R"({"rms_norm_eps": "small"})", R"(rms_norm_eps is "small"; it must be a number)"},
      {R"({"norm_topk_prob": 1})", "norm_topk_prob is 1; it must be true or false"},
      {R"({"mlp_only_layers": [0.5]})", "mlp_only_layers is [0.5]"},
      {R"({"layer_types": ["sliding_attention", "full_attention", "full_attention", "linear_attention"]})",
       R"(layer_types has "sliding_attention"; supported are linear_attention and full_attention)"},
      {R"({"num_hidden_layers": 5})", "it must name num_hidden_layers = 5 layers"},
      {R"({"model_type": "llama"})", R"(model_type is "llama"; supported are qwen3_next)"},
  };
  for (Case const& c : cases) check_says(config_message<Tiny>(config_with(c.changes)), {c.named, "config.json"});
  check_says(config_message<Tiny>("[1]"), {"not a JSON object"});
  check_says(config_message<Tiny>("{"), {"not a JSON object"});
  check_says(config_message<TinySplit>(config_with(R"({"num_experts": 4})", tiny_split)), {"num_experts (4) is unknown"});
}

TEST_CASE("a folder of other types than the model's is refused, both named") {
  auto const config = config_with("{}");
  CHECK(config_message<Tiny>(config) == "no error");
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

TEST_CASE("a tensor that is missing, superfluous, of another shape or not of real numbers is refused by name") {
  auto const good = checkpoint_of(tiny);
  std::string const router = "model.layers.1.mlp.gate.weight", expert = "model.layers.2.mlp.experts.3.down_proj.weight";
  CHECK(load_message(good) == "no error");
  auto changed = good;
  changed.erase(expert);
  check_says(load_message(changed), {"the tensor " + expert + " is missing; its shape would be [32, 8]"});
  changed = good;
  changed["model.layers.4.input_layernorm.weight"] = good.at("model.norm.weight");
  check_says(load_message(changed), {"the tensor model.layers.4.input_layernorm.weight of shape [32] belongs to nothing"});
  changed = good;
  changed[router].shape = {32, 4};
  check_says(load_message(changed), {"the tensor " + router + " has the shape [32, 4]; the model's is [4, 32]"});
  changed = good;
  changed[router].dtype = "I32";
  check_says(load_message(changed), {"the tensor " + router + " is of dtype I32; supported are F32"});
}

TEST_CASE("a released model may lie in several files, in bfloat16 or float16") {
  ScratchFolder const scratch, written;
  scratch.file("config.json", content_of(tiny / "config.json"));
  // Numbers that all three formats hold, so that nothing is rounded.
  Checkpoint whole = checkpoint_of(tiny), first, second;
  Json weight_map = Json::object();
  for (auto& [name, tensor] : whole) {
    std::vector<std::uint16_t> narrow;
    auto elements = floats_of(tensor);
    bool const bf16 = weight_map.size() % 2 == 0;
    for (std::size_t i = 0; i < elements.size(); ++i) {
      auto const eighths = static_cast<std::uint16_t>(i % 8);
      narrow.push_back(static_cast<std::uint16_t>(bf16 ? 0x3f80 + (eighths << 4) : 0xbc00 + (eighths << 7)));
      elements[i] = (bf16 ? 1.0f : -1.0f) * (1 + static_cast<float>(eighths) / 8);
    }
    (bf16 ? first : second)[name] = {bf16 ? "BF16" : "F16", tensor.shape, bytes_of(narrow)};
    weight_map[name] = bf16 ? "model-00001-of-00002.safetensors" : "model-00002-of-00002.safetensors";
    tensor.bytes = bytes_of(elements);
  }
  write(scratch, "model-00001-of-00002.safetensors", first);
  write(scratch, "model-00002-of-00002.safetensors", second);
  scratch.file("model.safetensors.index.json", Json{{"weight_map", weight_map}}.dump());
  load_and_save<Tiny>(scratch.path(), written.path(), hf::Family::qwen3_next);
  CHECK(checkpoint_of(written.path()).size() == whole.size());
  for (auto const& [name, tensor] : checkpoint_of(written.path())) CHECK(floats_of(tensor) == floats_of(whole.at(name)));

  SECTION("of which none may be missing") {
    fs::remove(scratch / "model-00002-of-00002.safetensors");
    check_says(load_message<Tiny>(scratch.path()), {"model-00002-of-00002.safetensors"});
  }
  SECTION("each with what the index says it has") {
    weight_map["model.norm.weights"] = "model-00001-of-00002.safetensors";
    scratch.file("model.safetensors.index.json", Json{{"weight_map", weight_map}}.dump());
    check_says(load_message<Tiny>(scratch.path()), {"the tensor model.norm.weights is not in \"model-00001-of-00002.safetensors\""});
  }
  SECTION("all beside the index") {
    weight_map["lm_head.weight"] = "../model.safetensors";
    scratch.file("model.safetensors.index.json", Json{{"weight_map", weight_map}}.dump());
    check_says(load_message<Tiny>(scratch.path()), {"lm_head.weight is said to be in \"../model.safetensors\""});
  }
  SECTION("and there must be an index") {
    fs::remove(scratch / "model.safetensors.index.json");
    check_says(load_message<Tiny>(scratch.path()), {"neither model.safetensors nor model.safetensors.index.json"});
  }
}

TEST_CASE("all experts of a layer may lie in one tensor") {
  auto fused = checkpoint_of(tiny);
  for (std::string const layer : {"1", "2", "3"}) {
    std::string const experts = "model.layers." + layer + ".mlp.experts.";
    Stored gate_up{"F32", {4, 16, 32}, ""}, down{"F32", {4, 32, 8}, ""};
    for (std::string const e : {"0", "1", "2", "3"}) {
      for (std::string const part : {".gate_proj.weight", ".up_proj.weight"}) gate_up.bytes += fused.at(experts + e + part).bytes;
      down.bytes += fused.at(experts + e + ".down_proj.weight").bytes;
      for (std::string const part : {".gate_proj.weight", ".up_proj.weight", ".down_proj.weight"}) fused.erase(experts + e + part);
    }
    fused[experts + "gate_up_proj"] = gate_up;
    fused[experts + "down_proj"] = down;
  }
  ScratchFolder const scratch, written;
  scratch.file("config.json", content_of(tiny / "config.json"));
  write(scratch, "model.safetensors", fused);
  load_and_save<Tiny>(scratch.path(), written.path(), hf::Family::qwen3_next);
  CHECK(differing_tensor(written.path(), tiny) == "");
}

TEST_CASE("the text model is read out of a multimodal folder") {
  Checkpoint multimodal;
  for (auto const& [name, tensor] : checkpoint_of(tiny_split)) multimodal["model.language_model." + name.substr(6)] = tensor;
  multimodal["model.visual.blocks.0.norm1.weight"] = multimodal["mtp.norm.weight"] = multimodal.begin()->second;
  auto text = config_of(tiny_split);
  text.erase("tie_word_embeddings");
  ScratchFolder const scratch, written;
  Json config = {{"model_type", "qwen3_5"}, {"text_config", text}, {"vision_config", {{"depth", 1}}}, {"tie_word_embeddings", true}};
  scratch.file("config.json", config.dump());
  write(scratch, "model.safetensors", multimodal);
  load_and_save<TinySplit>(scratch.path(), written.path(), hf::Family::qwen3_5_text);
  CHECK(differing_tensor(written.path(), tiny_split) == "");
  CHECK(hf::format(scratch.path()).prefix == "model.language_model.");

  config["projector"] = "wide";
  scratch.file("config.json", config.dump());
  check_says(load_message<TinySplit>(scratch.path()), {"the field projector (\"wide\") is unknown"});
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
  CHECK(first.mixer<ha::Full>().rope_theta == 1e7);
  CHECK(first.feed_forward.balance_coefficient == 0);
  auto later = read.operator()<Tiny>(R"({"rope_parameters": {"rope_theta": 500}, "rms_norm_eps": 0.001, "output_router_logits": true})");
  CHECK(later.mixer<Half>().rope_theta == 500);
  CHECK(std::array{later.norm.eps, later.mixer<Half>().norm_eps, later.mixer<ha::GDN>().norm_eps} == std::array{1e-3, 1e-3, 1e-3});
  CHECK(later.feed_forward.balance_coefficient == 0.05);
  CHECK(later.feed_forward.balance == ha::Balance::pooled);
}

TEST_CASE("a model of one's own is saved as a released one, and comes back bit for bit") {
  Tiny::Config config{.vocab_size = 40,
                      .model_dim = 24,
                      .num_heads = 3,
                      .feed_forward = {.hidden_dim = 20,
                                       .num_experts = 3,
                                       .top_k = 2,
                                       .expert_dim = 5,
                                       .shared_dim = 0,
                                       .renormalise = false,
                                       .decoder_sparse_step = 2,
                                       .mlp_only_layers = {3}},
                      .tie_embedding = true};
  ha::Cpu cpu{1};
  ScratchFolder const scratch;
  Tiny const model{config};
  auto const params = model.initialize<float>(cpu, ha::Seed{3});
  hf::save(cpu, model, params, scratch / "new");
  Tiny const again{hf::config<Tiny>(scratch / "new")};
  auto const loaded = hf::load<float>(cpu, again, scratch / "new");
  ha::zip(
      [&](ha::Path const& path, auto const& a, auto const& b) {
        INFO(path.str());
        CHECK(a.shape() == b.shape());
        CHECK(same_bits<float>({download(cpu, a)}, {download(cpu, b)}));
      },
      params, loaded);
  CHECK(hf::config_text(hf::settings_of(again, hf::Family::qwen3_next)) == content_of(scratch / "new/config.json"));

  SECTION("a disk that is full leaves what was there") {
    ha::ignore_file_size_signal();
    auto const before = content_of(scratch / "new/model.safetensors");
    {
      FullDisk const full{1000};
      check_says(message_of([&] { hf::save(cpu, model, params, scratch / "new"); }), {"model.safetensors"});
    }
    CHECK(content_of(scratch / "new/model.safetensors") == before);
  }
}

TEST_CASE("what no released model has is not saved, and named") {
  auto const message = [](auto change, hf::Family family = hf::Family::qwen3_next) {
    auto config = hf::config<Tiny>(tiny);
    change(config);
    return message_of([&] { hf::settings_of(Tiny{config}, family); });
  };
  CHECK(message([](auto&) {}) == "no error");
  check_says(message([](auto& c) { c.feed_forward.gated = false; }), {"no gate"});
  check_says(message([](auto& c) { c.feed_forward.shared_dim = -1; }), {"no shared expert"});
  check_says(message([](auto& c) { c.norm.weight = ha::NormWeight::plain; }), {"norms are plain"});
  check_says(message([](auto& c) { c.norm.eps = 1e-5; }), {"norm_eps of GDN is 1e-06, that of the blocks 1e-05"});
  check_says(message([](auto& c) { c.template mixer<ha::GDN>().scale = 1; }), {"the scale of GDN is 1, not 0.25"});
  check_says(message([](auto& c) { c.feed_forward.balance = ha::Balance::per_layer, c.feed_forward.balance_coefficient = 1; }),
             {"not Balance::pooled"});
  check_says(message([](auto&) {}, hf::Family::qwen3_5_text), {"cannot save the model as qwen3_5_text", "mixtures"});
}
