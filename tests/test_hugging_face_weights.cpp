// Which weights a folder of the Hugging Face layout may have, in one file or in several.
#include "failing_read.hpp"
#include "model_folder.hpp"

#include <sys/stat.h>

namespace ha = hybridattn;
namespace hf = ha::hugging_face;
namespace fs = std::filesystem;
using ha::Index;
using namespace model_folder;

TEST_CASE("a tensor that is missing, superfluous, of another shape or not of real numbers is refused by name") {
  auto const good = checkpoint_of(tiny);
  std::string const router = "model.layers.1.mlp.gate.weight", expert = "model.layers.2.mlp.experts.3.down_proj.weight";
  CHECK(load_message(good) == no_error);
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

TEST_CASE("a tied model may hold its head too, when it is the embedding") {
  ScratchFolder const scratch, written;
  scratch.file("config.json", content_of(tiny_split / "config.json"));
  auto tied = checkpoint_of(tiny_split);
  auto const message = [&] {
    write(scratch, "model.safetensors", tied);
    return load_message<TinySplit>(scratch.path());
  };
  std::string const head = "lm_head.weight", embedding = "model.embed_tokens.weight";
  tied[head] = tied.at(embedding);
  CHECK(message() == no_error);
  load_and_save<TinySplit>(scratch.path(), written.path(), hf::qwen3_5_text);
  CHECK(differing_tensor(written.path(), tiny_split) == "");

  auto doubles = floats_of(tied[head]);
  tied[head] = {"F64", tied[head].shape, bytes_of(std::vector<double>(doubles.begin(), doubles.end()))};
  CHECK(message() == no_error);   // equal as numbers
  tied[head] = tied.at(embedding);
  tied[head].bytes[4 * 77 + 3] ^= 1;
  check_says(message(), {"tie_word_embeddings", "lm_head.weight is not model.embed_tokens.weight: they differ at element 77"});
  tied[head].shape = {32, 64};
  check_says(message(), {"the tensor lm_head.weight has the shape [32, 64]; the model's is [64, 32]"});
  tied[head] = {"F8_E4M3", {64, 32}, std::string(64 * 32, '\0')};
  check_says(message(), {"the tensor lm_head.weight is of dtype F8_E4M3"});
  tied.erase(head);
  tied["lm_head.bias"] = tied.at("model.norm.weight");
  check_says(message(), {"the tensor lm_head.bias of shape [32] belongs to nothing"});
}

TEST_CASE("a tensor of a dtype that is not read is an error only where it is needed") {
  auto changed = checkpoint_of(tiny);
  changed["mtp.scale"] = {"F8_E8M0", {4}, std::string(4, '\0')};
  changed["mtp.more"] = {"F4_OF_2031", {4, 2}, std::string(4, '\0')};
  changed["model.visual.mask"] = {"BOOL", {3}, std::string(3, '\0')};
  changed["model.rotary_emb.inv_freq"] = {"F32", {1}, std::string(4, '\0')};
  CHECK(load_message(changed) == no_error);
  for (char const* dtype : {"F8_E4M3", "F8_E5M2", "BOOL", "U8", "I8"}) {
    auto& norm = changed["model.norm.weight"];
    norm = {dtype, {32}, std::string(32, '\0')};
    check_says(load_message(changed), {"the tensor model.norm.weight is of dtype " + std::string(dtype) + "; supported are F32"});
  }
  changed["e\x1b[2J"] = changed["mtp.scale"];
  changed["model.norm.weight"] = checkpoint_of(tiny).at("model.norm.weight");
  check_says(load_message(changed), {R"(the tensor e\x1b[2J of shape [4] belongs to nothing)"});
}

TEST_CASE("a folder that cannot be read to its end is an error wherever it fails, and keeps no memory") {
  ha::Cpu cpu{1};
  Tiny const model{hf::config<Tiny>(tiny)};
  int const reads = failing_read::count([&] { hf::load<float>(cpu, model, tiny); });
  CHECK(reads > 50);
  for (int read = 0; read < reads; ++read)
    failing_read::at(read, [&] {
      check_says(error_of([&] { hf::load<float>(cpu, model, tiny); }), {"Input/output error"});
      CHECK(cpu.pool().in_use() == 0);
    });
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
  load_and_save<Tiny>(scratch.path(), written.path(), hf::qwen3_next);
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
  load_and_save<TinySplit>(scratch.path(), written.path(), hf::qwen3_5_text);
  CHECK(differing_tensor(written.path(), tiny_split) == "");
  CHECK(hf::format(scratch.path()).prefix == "model.language_model.");

  config["projector"] = "wide";
  scratch.file("config.json", config.dump());
  check_says(load_message<TinySplit>(scratch.path()), {"the field projector (\"wide\") is unknown", "--ignore-field projector"});

  // As Qwen3.5 is released. A field of text_config may also stand beside text_config, with the same value.
  config.erase("projector");
  config.update({{"architectures", {"Qwen3_5ForConditionalGeneration"}},
                 {"image_token_id", 1},
                 {"video_token_id", 2},
                 {"vision_start_token_id", 3},
                 {"vision_end_token_id", 4},
                 {"language_model_only", false},
                 {"transformers_version", "4.57.1"},
                 {"hidden_size", 32}});
  config["text_config"].update({{"output_gate_type", "swish"},
                                {"mtp_num_hidden_layers", 1},
                                {"mtp_use_dedicated_embeddings", false},
                                {"attn_output_gate", true},
                                {"full_attention_interval", 2},
                                {"mamba_ssm_dtype", "float32"}});
  scratch.file("config.json", config.dump());
  CHECK(load_message<TinySplit>(scratch.path()) == no_error);
  config["hidden_size"] = 33;
  scratch.file("config.json", config.dump());
  check_says(load_message<TinySplit>(scratch.path()), {"the field hidden_size (33) is unknown"});
  config["hidden_size"] = 32;
  config["text_config"]["conv_window"] = 3;
  scratch.file("config.json", config.dump());
  check_says(load_message<TinySplit>(scratch.path()), {"text_config: the field conv_window (3)", "--ignore-field text_config.conv_window"});
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
  CHECK(hf::config_text(hf::settings_of(again, hf::qwen3_next)) == content_of(scratch / "new/config.json"));

  SECTION("but not into a folder with the shards of another one") {
    scratch.file("model.safetensors.index.json", "{}");
    check_says(error_of([&] { hf::save(cpu, model, params, scratch.path()); }), {"it holds the shards of another one"});
    CHECK(!fs::exists(scratch / "model.safetensors"));
    CHECK(!fs::exists(scratch / "config.json"));
  }
  SECTION("a disk that is full leaves what was there") {
    ha::ignore_file_size_signal();
    auto const before = content_of(scratch / "new/model.safetensors");
    {
      FullDisk const full{1000};
      check_says(error_of([&] { hf::save(cpu, model, params, scratch / "new"); }), {"model.safetensors"});
    }
    CHECK(content_of(scratch / "new/model.safetensors") == before);
  }
}

namespace {

// Numbers that bfloat16, float16 and float hold, so that nothing is rounded.
struct Numbers {
  std::vector<std::uint16_t> narrow;
  std::vector<float> wide;

  Numbers(std::size_t count, bool bf16) {
    for (std::size_t i = 0; i < count; ++i) {
      auto const eighths = static_cast<std::uint16_t>(i % 8);
      narrow.push_back(static_cast<std::uint16_t>(bf16 ? 0x3f80 + (eighths << 4) : 0xbc00 + (eighths << 7)));
      wide.push_back((bf16 ? 1.0f : -1.0f) * (1 + static_cast<float>(eighths) / 8));
    }
  }
};

// A released model in two files with an index. Every second tensor is in the first file, in bfloat16; the others are in float16.
struct TwoFiles {
  std::string const one = "model-00001-of-00002.safetensors", two = "model-00002-of-00002.safetensors";
  ScratchFolder const scratch, written;
  Checkpoint whole = checkpoint_of(tiny), first, second;   // all tensors in float, and the tensors of each file
  Json weight_map = Json::object();
  std::string in_one, in_two;   // a tensor of each file

  TwoFiles() {
    for (auto& [name, tensor] : whole) share(name, tensor);
    in_one = first.begin()->first;
    in_two = second.begin()->first;
    scratch.file("config.json", content_of(tiny / "config.json"));
    write(scratch, one, first);
    write(scratch, two, second);
    write_index();
  }
  void write_index(std::string const& text) const { scratch.file("model.safetensors.index.json", text); }
  void write_index(Json const& map) const { write_index(Json{{"weight_map", map}}.dump()); }
  void write_index() const { write_index(weight_map); }
  std::string message() const { return load_message<Tiny>(scratch.path()); }
  // The tensors after loading and saving.
  Checkpoint loaded() const {
    load_and_save<Tiny>(scratch.path(), written.path(), hf::qwen3_next);
    return checkpoint_of(written.path());
  }
  // Whether the tensor in_one is loaded with the numbers of the first file.
  bool loads_first() const { return floats_of(loaded().at(in_one)) == floats_of(whole.at(in_one)); }

 private:
  void share(std::string const& name, Stored& tensor) {
    bool const bf16 = weight_map.size() % 2 == 0;
    Numbers const numbers{floats_of(tensor).size(), bf16};
    (bf16 ? first : second)[name] = {bf16 ? "BF16" : "F16", tensor.shape, bytes_of(numbers.narrow)};
    weight_map[name] = bf16 ? one : two;
    tensor.bytes = bytes_of(numbers.wide);
  }
};

}  // namespace

TEST_CASE("a released model may lie in several files, in bfloat16 or float16") {
  TwoFiles const files;
  auto const loaded = files.loaded();
  CHECK(loaded.size() == files.whole.size());
  for (auto const& [name, tensor] : loaded) CHECK(floats_of(tensor) == floats_of(files.whole.at(name)));
}

TEST_CASE("of several files none may be missing") {
  TwoFiles const files;
  fs::remove(files.scratch / files.two);
  check_says(files.message(), {"index.json: it names the file '" + files.two + "', which is not there"});
  write(files.scratch, "model.safetensors", files.whole);
  check_says(files.message(), {"which is not there; it does not name model.safetensors, which is there"});
  fs::create_symlink(files.two, files.scratch / files.two);
  check_says(files.message(), {files.two + ": it is a loop of symbolic links"});
}

TEST_CASE("a file has each tensor that the index says it has") {
  TwoFiles files;
  files.weight_map["model.norm.weights"] = files.one;
  files.write_index();
  check_says(files.message(), {"the tensor model.norm.weights is not in '" + files.one + "' as it says; no file has it"});
}

TEST_CASE("a tensor is not in another file than the index says") {
  TwoFiles files;
  files.weight_map[files.in_one] = files.two;
  files.write_index();
  check_says(files.message(), {"the tensor " + files.in_one + " is not in '" + files.two + "' as it says; it is in '" + files.one + "'"});
}

TEST_CASE("the index names every tensor of its files") {
  TwoFiles files;
  files.weight_map.erase(files.in_two);
  files.write_index();
  check_says(files.message(), {"it does not name the tensor " + files.in_two + ", which is in '" + files.two + "'"});
  files.second["mtp.norm.weight"] = files.second.at(files.in_two);
  files.second.erase(files.in_two);
  write(files.scratch, files.two, files.second);
  check_says(files.message(), {"the tensor " + files.in_two + " is missing"});
}

TEST_CASE("of a tensor that is in two files, the index says which is read") {
  TwoFiles files;
  Stored& twin = files.second[files.in_one] = files.first.at(files.in_one);
  twin.bytes.assign(twin.bytes.size(), '\0');
  write(files.scratch, files.two, files.second);
  CHECK(files.loads_first());
  files.weight_map[files.in_one] = files.two;
  files.write_index();
  CHECK(!files.loads_first());
}

TEST_CASE("model.safetensors beside an index is not read, unless the index names it") {
  TwoFiles const files;
  auto other = files.whole;
  for (auto& [name, tensor] : other) tensor.bytes.assign(tensor.bytes.size(), '\0');
  write(files.scratch, "model.safetensors", other);
  CHECK(files.loads_first());
  Json all = Json::object();
  for (auto const& [name, tensor] : other) all[name] = "model.safetensors";
  files.write_index(all);
  CHECK(!files.loads_first());
}

TEST_CASE("the index names files beside it, and none elsewhere") {
  TwoFiles files;
  struct Place {
    Json file;
    char const* shown;
  };
  for (auto const& [file, shown] : {Place{"../model.safetensors", R"("../model.safetensors")"},
                                    {"/etc/passwd", R"("/etc/passwd")"},
                                    {"a/../" + files.one, R"("a/../model)"},
                                    {"..\\model.safetensors", R"("..\\model.safetensors")"},
                                    {"..", R"("..")"},
                                    {"", R"("")"},
                                    {std::string("x\0y", 3), R"("x\u0000y")"},
                                    {7, "7"},
                                    {nullptr, "null"},
                                    {Json::array({files.one}), R"(["model)"},
                                    {"\x1b[2J/", R"("\u001b[2J/")"}}) {
    files.weight_map[files.in_one] = file;
    files.write_index();
    check_says(files.message(), {files.in_one + " is said to be in " + shown, "which is not the name of a file beside it"});
  }
  files.weight_map[files.in_one] = "e\x1b[2J";
  files.write_index();
  check_says(files.message(), {R"(it names the file 'e\x1b[2J', which is not there)"});
}

TEST_CASE("files may be links to anywhere, as the hub's cache has them") {
  TwoFiles const files;
  ScratchFolder const blobs;
  for (auto const& name : {files.one, files.two}) {
    fs::rename(files.scratch / name, blobs / name);
    fs::create_symlink(blobs / name, files.scratch / name);
  }
  CHECK(files.message() == no_error);
}

TEST_CASE("one of several files, and the index, must be what its name says") {
  TwoFiles const files;
  auto const one = files.scratch / files.one, index = files.scratch / "model.safetensors.index.json";
  fs::remove(one);
  REQUIRE(::mkfifo(one.c_str(), 0600) == 0);
  check_says(files.message(), {files.one + ": it is a pipe, not a regular file"});
  fs::remove(one);
  files.scratch.file(files.one, "version https://git-lfs.github.com/spec/v1\n");
  check_says(files.message(), {files.one + ": it is no safetensors file, but a git-lfs pointer"});
  fs::remove(index);
  REQUIRE(::mkfifo(index.c_str(), 0600) == 0);
  check_says(files.message(), {"index.json: it is a pipe, not a regular file"});
}

TEST_CASE("what else an index says is passed over") {
  TwoFiles const files;
  Json const index = {
      {"metadata", {{"total_size", "nonsense"}, {"total_parameters", -1e300}}}, {"weight_map", files.weight_map}, {"more", {1}}};
  files.write_index(index.dump());
  CHECK(files.message() == no_error);
}

TEST_CASE("an index is JSON, or the error says what it is") {
  TwoFiles const files;
  auto const says = [&](std::string const& index, char const* words) {
    files.write_index(index);
    check_says(files.message(), {"index.json: ", words});
  };
  says("{", "line 1, column 2: not JSON: it ends too early");
  says("{}", "there is no weight_map");
  says(R"({"weight_map": []})", "weight_map is not a JSON object");
  says(R"({"weight_map": {"a": "x", "a": "y"}})", "the key 'a' occurs twice");
  says(R"({"weight_map": {}, "weight_map": {}})", "the key 'weight_map' occurs twice");
  says("{\"metadata\": " + std::string(100'000, '['), "nested deeper than 64 levels");
  says("version https://git-lfs.github.com/spec/v1\n", "it is no JSON, but a git-lfs pointer");
  says("<html>", "it is no JSON, but an HTML page");
}

TEST_CASE("several files without an index are refused, and one of them named") {
  TwoFiles const files;
  fs::remove(files.scratch / "model.safetensors.index.json");
  check_says(files.message(), {"neither model.safetensors nor model.safetensors.index.json; there is ", "'" + files.one + "'"});
}
