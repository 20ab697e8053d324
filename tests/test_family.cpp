// A family of released models that this file defines and the library does not know. It has kinds of layers that the library's families
// do not have.
#include "catch.hpp"
#include "error_of.hpp"
#include "scratch_folder.hpp"

#include <hybridattn/hybridattn.hpp>
#include <hybridattn/store.hpp>

namespace ha = hybridattn;
namespace hf = ha::hugging_face;
using Catch::Matchers::Contains;
using ha::Index;

namespace {

// Layers of sparse and of full attention, named by letters, with tied embeddings and names of tensors that no other family has.
namespace made_up {

using Classic = ha::FullAttention<ha::FullOptions{.qk_norm = ha::QkNorm::none, .output_gate = false, .rotary_percent = 100}>;
using Picky = ha::SparseAttention<ha::SparseOptions{.top_k = 8, .qk_norm = ha::QkNorm::none, .output_gate = false, .rotary_percent = 100}>;

constexpr hf::LayerKind kinds[] = {{"classic", 'C', Classic::name}, {"picky", 'P', Picky::name}};

constexpr hf::Row whole[] = {{"tokens", "embedding"}, {"last_norm", "norm"}};
constexpr hf::Row layer[] = {{"norm_1", "attention_norm"},
                             {"norm_2", "feed_forward_norm"},
                             {"up", "feed_forward.dense.up"},
                             {"gate", "feed_forward.dense.gate"},
                             {"down", "feed_forward.dense.down"}};
constexpr hf::Row attention[] = {{"qkv", "w.q w.k w.v"}, {"out", "w_o"}};
constexpr hf::Row indexer[] = {{"index_q", "w.index_q"}, {"index_k", "w.index_k"}, {"index_w", "w.index_w"}};
constexpr hf::Row apart[] = {{"{}.gate", "experts.gate", hf::Layout::each_expert},
                             {"{}.up", "experts.up", hf::Layout::each_expert},
                             {"{}.down", "experts.down", hf::Layout::each_expert}};
constexpr hf::Row fused[] = {{"gate_and_up", "experts.gate experts.up", hf::Layout::by_expert},
                             {"all_down", "experts.down", hf::Layout::by_expert}};
constexpr hf::RowGroup tensors[] = {{hf::RowGroup::Place::model, whole},
                                    {hf::RowGroup::Place::each_layer, layer},
                                    {hf::RowGroup::Place::each_layer, attention, "mix.", "attention."},
                                    {hf::RowGroup::Place::kind, indexer, "mix.", "attention.", 'P'},
                                    {hf::RowGroup::Place::each_layer, apart, "bank.", "feed_forward.", 0, hf::RowGroup::Experts::apart},
                                    {hf::RowGroup::Place::each_layer, fused, "bank.", "feed_forward.", 0, hf::RowGroup::Experts::fused}};

void read(hf::Fields& fields, hf::Settings& s) {
  s.pattern = fields.at("mix").get<std::string>();
  for (char const letter : s.pattern)
    ha::check(s.family->kind_of_letter(letter) != nullptr, fields.where(), "mix has ", letter, "; supported are ", s.family->words());
  Index const heads = fields.size("heads"), width = fields.size("width");
  s.model["vocab_size"] = fields.size("words");
  s.model["model_dim"] = width;
  s.model["num_heads"] = heads;
  s.model["tie_embedding"] = true;
  ha::checkpoint::to_json(s.model["norm"], ha::RmsNorm::Options{ha::NormWeight::plain, 1e-5});
  ha::checkpoint::to_json(s.model["initialization"], ha::Initialization{});
  ha::checkpoint::to_json(s.model["feed_forward"], ha::FeedForwardConfig{.hidden_dim = fields.size("hidden")});
  s.set_layer('C', Classic::options, ha::full::Config{.num_heads = heads, .num_kv_heads = heads, .head_dim = width / heads});
  s.layers['P']["norm_placement"] = "after";
  s.set_layer('P', Picky::options,
              ha::dsa::Config{.num_heads = heads, .num_kv_heads = heads, .head_dim = width / heads, .index_heads = 2, .index_dim = 8});
}
void check_options(hf::Settings const& s, char letter, hf::Json const& options) {
  ha::check(options == s.layers.at(letter)["options"], s.where, "its layers of kind ", letter, " have other options than the model's");
}
void check_model(hf::Settings& s) { ha::check(s.model["tie_embedding"].get<bool>(), s.where, "its embedding is not tied"); }
hf::Json write(hf::Settings const& s) {
  return {{"mix", s.pattern},
          {"words", s.model["vocab_size"]},
          {"width", s.model["model_dim"]},
          {"heads", s.model["num_heads"]},
          {"hidden", s.model["feed_forward"]["hidden_dim"]}};
}

constexpr hf::Family family{.model_type = "made_up",
                            .architecture = "MadeUpForCausalLM",
                            .kinds = kinds,
                            .tensors = tensors,
                            .read = read,
                            .check_options = check_options,
                            .check_model = check_model,
                            .write = write};

using Model = ha::LanguageModel<ha::Stack<Classic, Picky, Picky>>;

}  // namespace made_up

constexpr char const* config = R"({"model_type": "made_up", "mix": "CPP",
  "words": 11, "width": 16, "heads": 2, "hidden": 24})";

// Writes the tensors of a small model. Each element is another number.
void write_weights(std::filesystem::path const& path) {
  ha::SafetensorsWriter writer;
  std::deque<std::vector<float>> kept;
  float next = 0;
  auto const add = [&](std::string const& name, std::vector<Index> const& shape) {
    auto& elements = kept.emplace_back(static_cast<std::size_t>(ha::TensorInfo{"", shape}.count()));
    for (float& element : elements) element = next += 1;
    writer.add(name, shape, elements);
  };
  add("model.tokens", {11, 16});
  add("model.last_norm", {16});
  for (int i = 0; i < 3; ++i) {
    std::string const layer = "model.layers." + std::to_string(i) + ".";
    for (char const* norm : {"norm_1", "norm_2"}) add(layer + norm, {16});
    for (char const* matrix : {"up", "gate"}) add(layer + matrix, {24, 16});
    add(layer + "down", {16, 24});
    add(layer + "mix.qkv", {48, 16});
    add(layer + "mix.out", {16, 16});
    if (i == 0) continue;
    add(layer + "mix.index_q", {16, 16});
    add(layer + "mix.index_k", {8, 16});
    add(layer + "mix.index_w", {2, 16});
  }
  writer.write(path);
}

}  // namespace

TEST_CASE("a family defined outside the library is read, saved and read again") {
  ScratchFolder const scratch;
  scratch.file("config.json", config);
  write_weights(scratch / "model.safetensors");
  hf::ReadOptions const reading{.families = {&made_up::family}};

  ha::Cpu cpu{1};
  CHECK(hf::pattern(scratch.path(), reading) == "CPP");
  made_up::Model const model{hf::config<made_up::Model>(scratch.path(), reading)};
  CHECK(model.config().policy<made_up::Picky>().index_dim == 8);
  CHECK(model.config().feed_forward.hidden_dim == 24);
  CHECK(model.config().norm_placement<made_up::Picky>() == ha::NormPlacement::after);
  CHECK(model.config().norm_placement<made_up::Classic>() == ha::NormPlacement::before);
  auto const params = hf::load<float>(cpu, model, scratch.path(), reading);

  auto elsewhere = model.config();
  elsewhere.norm_placement<made_up::Picky>() = ha::NormPlacement::before;
  CHECK_THAT(error_of([&] { hf::load<float>(cpu, made_up::Model{elsewhere}, scratch.path(), reading); }),
             Contains("the norms of layer 1 come after attention and feed-forward, but in the model before"));

  auto const format = hf::format(scratch.path(), reading);
  CHECK(format.family == &made_up::family);
  hf::save(cpu, model, params, scratch / "again", format);
  ha::Safetensors const first{scratch / "model.safetensors"}, again{scratch / "again/model.safetensors"};
  CHECK(first.tensors().size() == again.tensors().size());
  for (auto const& [name, info] : first.tensors()) {
    INFO(name);
    REQUIRE(again.contains(name));
    CHECK((again.info(name).shape == info.shape && again.read_floats(name) == first.read_floats(name)));
  }
  CHECK(hf::config_text(hf::read_settings(scratch / "again", reading)) == content_of(scratch / "again/config.json"));
}

TEST_CASE("what is not of that family is refused in its words") {
  ScratchFolder const scratch;
  scratch.file("config.json", config);
  hf::ReadOptions const reading{.families = {&made_up::family}};
  CHECK_THAT(error_of([&] { hf::read_settings(scratch.path()); }), Contains("model_type is \"made_up\"; supported are qwen3_next"));
  auto const settings = hf::read_settings(scratch.path(), reading);
  CHECK_THAT(error_of([&] { hf::check_types<ha::Stack<made_up::Picky, made_up::Picky, made_up::Classic>>(settings); }),
             Contains("layer_types are CPP, but the model's layers are PPC (C classic, P picky)"));
  CHECK_THAT(error_of([&] { hf::check_types<ha::Stack<ha::Full, made_up::Picky, made_up::Picky>>(settings); }),
             Contains("its layers of kind C have other options"));
  CHECK_THAT(error_of([&] { hf::check_types<ha::Stack<ha::GDN>>(settings); }), Contains("but the model's layers are ? (C classic"));
  CHECK_THAT(error_of([] { hf::settings_of(made_up::Model{}, hf::qwen3_next); }),
             Contains("cannot save the model as qwen3_next: it has a layer of DSA; supported are linear_attention and full_attention"));
  std::string const other_word = std::string(config).replace(std::string(config).find("CPP"), 3, "CXP");
  scratch.file("config.json", other_word);
  CHECK_THAT(error_of([&] { hf::read_settings(scratch.path(), reading); }), Contains("supported are classic and picky"));
}

TEST_CASE("fused experts are recognised by the names that the family's table gives them") {
  ScratchFolder const scratch;
  scratch.file("config.json", config);
  auto const is_fused = [&](std::string const& name) {
    ha::SafetensorsWriter writer;
    std::vector<float> const one{1};
    writer.add(name, {1}, one);
    writer.write(scratch / "model.safetensors");
    return hf::format(scratch.path(), {.families = {&made_up::family}}).fused_experts;
  };
  CHECK(is_fused("model.layers.0.bank.gate_and_up"));
  CHECK(is_fused("model.layers.0.bank.all_down"));
  CHECK_FALSE(is_fused("model.layers.0.bank.0.gate"));
  CHECK_FALSE(is_fused("model.layers.0.mlp.experts.gate_up_proj"));
}
