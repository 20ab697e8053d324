// Checkpoints. A run goes on from a checkpoint bit for bit, whenever its process was killed, and refuses a checkpoint that does not fit.
#include "catch.hpp"
#include "error_of.hpp"
#include "failing_read.hpp"
#include "scratch_folder.hpp"

#include "../examples/sweep/memory.hpp"

#include <hybridattn/hybridattn.hpp>
#include <hybridattn/train/checkpoint.hpp>

#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <poll.h>

#include <cstdio>
#include <optional>
#include <thread>

namespace ha = hybridattn;
using Catch::Matchers::Contains;
using ha::Index;
using Json = nlohmann::json;

namespace {

using Sparse = ha::SparseAttention<ha::SparseOptions{.top_k = 5, .index_norm = true}>;
using Model = ha::LanguageModel<ha::Stack<ha::GDN, ha::Full, Sparse>>;
using Params = Model::Params<ha::Owned<float, ha::Cpu>>;

// Dense layers first and last, a mixture of experts between them; the last layer has its norms after its branches.
Model::Config small() {
  Model::Config config{
      .vocab_size = 64,
      .model_dim = 16,
      .num_heads = 2,
      .feed_forward = {
          .hidden_dim = 24, .num_experts = 3, .expert_dim = 8, .shared_dim = 8, .decoder_sparse_step = 2, .balance_coefficient = 0.01}};
  config.norm_placement<Sparse>() = ha::NormPlacement::after;
  return config;
}
// Norms do not decay.
ha::AdamWOptions adamw() {
  return {.learning_rate = 3e-3, .decays = [](std::string_view path) { return !path.ends_with("norm"); }};
}

// A training run with its model, parameters, optimizer and data.
struct Run {
  ha::Cpu cpu;
  Model model;
  Params params;
  ha::AdamW<Params> optimizer;
  ha::RecallTask task{ha::Seed{7}, {.vocab_size = 64, .pairs = 2}};
  ha::Progress progress;

  explicit Run(std::uint64_t seed = 42, int threads = 1, Model::Config const& config = small(), ha::AdamWOptions options = adamw())
      : cpu(threads), model(config), params(model.initialize<float>(cpu, ha::Seed{seed})), optimizer(cpu, params, std::move(options)) {}

  // Every third step trains the indexers too.
  void train(Index steps) {
    for (Index i = 0; i < steps; ++i) {
      auto const batch = make_batch(cpu, task.next_batch(2, 16));
      auto const stage = progress.step % 3 == 0 ? ha::Stage::sparse : ha::Stage::language_model;
      auto const result = train_step(cpu, model, params, optimizer, batch, {.rate = 0.5, .stage = stage});
      progress.history["loss"].push_back(result.loss.mean());
      ++progress.step;
    }
    progress.data = task.state();
  }
  void save(std::filesystem::path const& path) { save_checkpoint(cpu, path, model, params, optimizer, progress); }
  void load(std::filesystem::path const& path) {
    progress = load_checkpoint(cpu, path, model, params, optimizer);
    task.restore(progress.data);
  }
};

// Appends every bit of a group.
template <class Group> void append_bits(ha::Cpu& cpu, Group const& group, std::string& bits) {
  ha::zip(
      [&](ha::Path const&, auto const& tensor) {
        auto const host = download(cpu, tensor);
        bits.append(reinterpret_cast<char const*>(host.data()), tensor.byte_count());
      },
      group);
}
std::string bits_of(Run& run) {
  std::string bits;
  append_bits(run.cpu, run.params, bits);
  append_bits(run.cpu, run.optimizer.moments().mean, bits);
  append_bits(run.cpu, run.optimizer.moments().square, bits);
  for (Index updates : run.optimizer.updates(run.cpu)) bits += std::to_string(updates) + " ";
  return bits + std::to_string(run.optimizer.steps());
}
bool same_bits(std::vector<double> const& a, std::vector<double> const& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0;
}

std::string saved_run(ScratchFolder const& folder) {
  Run run;
  run.train(3);
  run.save(folder / "run.safetensors");
  return content_of(folder / "run.safetensors");
}

// Functions that change a file's header, or the JSON in it.
Json header_of(std::string const& file) {
  std::uint64_t length = 0;
  std::memcpy(&length, file.data(), sizeof length);
  return Json::parse(file.substr(8, length));
}
std::string with_header(std::string const& file, Json const& header) {
  std::uint64_t length = 0;
  std::memcpy(&length, file.data(), sizeof length);
  std::string const text = header.dump();
  std::uint64_t const now = text.size();
  return std::string(reinterpret_cast<char const*>(&now), sizeof now) + text + file.substr(8 + length);
}
// with_tensors applies a JSON merge patch (RFC 7396: null removes) to the header, with_json to the checkpoint's JSON in the header.
std::string with_tensors(std::string const& file, Json const& patch) {
  Json header = header_of(file);
  header.merge_patch(patch);
  return with_header(file, header);
}
std::string with_json(std::string const& file, Json const& patch) {
  Json json = Json::parse(header_of(file)["__metadata__"]["hybridattn"].get<std::string>());
  json.merge_patch(patch);
  Json inner;
  inner["__metadata__"]["hybridattn"] = json.dump();
  return with_tensors(file, inner);
}

// Returns the error of loading a file. After an error the run must have every bit that it had before.
std::string refusal(Run& run, std::filesystem::path const& path) {
  std::string const before = bits_of(run);
  std::string const said = error_of([&] { load_checkpoint(run.cpu, path, run.model, run.params, run.optimizer); });
  if (said != no_error) CHECK((bits_of(run) == before));
  return said;
}

}  // namespace

TEST_CASE("a run that is saved and loaded goes on bit for bit") {
  ScratchFolder const folder;
  auto const path = folder / "run.safetensors";
  Run whole;
  whole.train(8);
  {
    Run first;
    first.train(4);
    first.progress.note = "note \"quoted\"\n";
    first.save(path);
  }
  Run second{1, 2};   // other parameters, another number of threads: all of it comes from the file
  second.load(path);
  CHECK(second.progress.step == 4);
  CHECK(second.progress.note == "note \"quoted\"\n");
  CHECK(second.optimizer.steps() == 4);
  second.train(4);
  CHECK((bits_of(second) == bits_of(whole)));
  CHECK(same_bits(second.progress.history["loss"], whole.progress.history["loss"]));
  CHECK(second.progress.data == whole.progress.data);
  CHECK(second.progress.data.drawn > 0);
}

TEST_CASE("a file that is loaded and saved is the same file") {
  ScratchFolder const folder;
  auto const file = saved_run(folder);
  Run other{5};
  other.progress.history["never saved"] = {std::nan(""), 1};
  other.load(folder / "run.safetensors");
  other.save(folder / "again.safetensors");
  CHECK((content_of(folder / "again.safetensors") == file));
  other.progress.history["not a number"] = {std::nan(""), -0.0, 1e-310};
  other.save(folder / "again.safetensors");
  auto const back = load_checkpoint(other.cpu, folder / "again.safetensors", other.model, other.params, other.optimizer);
  CHECK(same_bits(back.history.at("not a number"), other.progress.history["not a number"]));
}

TEST_CASE("a header says what a file holds") {
  ScratchFolder const folder;
  saved_run(folder);
  auto const header = ha::read_checkpoint_header(folder / "run.safetensors");
  CHECK(header.version == 1);
  CHECK(header.pattern == std::vector<std::string>{"GDN", "Full", "DSA"});
  CHECK(header.dtype == "F32");
  CHECK(header.step == 3);
  auto const& json = header.json;
  CHECK(json["model"]["model_dim"] == 16);
  CHECK(json["model"]["feed_forward"]["expert_dim"] == 8);
  CHECK(json["layers"][2]["options"]["top_k"] == 5);
  CHECK(json["layers"][1]["options"]["qk_norm"] == "zero_centred");
  CHECK(json["layers"][0]["sizes"]["key_dim"] == 8);   // no longer the 0 that stands for a default
  CHECK(!json["layers"][2]["sizes"].contains("stage"));
  CHECK(json["layers"][2]["norm_placement"] == "after");
  CHECK(!json["layers"][0].contains("norm_placement"));
  CHECK(json["optimizer"]["learning_rate"] == 3e-3);
  CHECK(json["optimizer"]["steps"] == 3);
  CHECK(json["optimizer"]["without_decay"].size() == 12);
  CHECK(json["optimizer"]["updates"]["blocks.2.attention.w.index_q"] == 1);   // in the one sparse step of the three
  CHECK(json["optimizer"]["updates"].size() == 5);
  CHECK(json["data"]["seed"] == 7);
  ha::Safetensors const file{folder / "run.safetensors"};
  CHECK(file.contains("blocks.1.attention.w.q"));
  CHECK(file.contains("optimizer.mean.embedding"));
  CHECK(file.contains("optimizer.square.blocks.2.attention.prepare.index_norm_bias"));
  CHECK(file.info("history.loss").shape == std::vector<Index>{3});
}

TEST_CASE("parameters alone come out of a checkpoint, whatever only training reads") {
  ScratchFolder const folder;
  Run run;
  run.train(2);
  run.save(folder / "run.safetensors");
  auto config = small();
  config.initialization.linear_deviation = 0;
  config.feed_forward.balance_coefficient = 0;
  config.policy<Sparse>().index_loss = 7;
  Model const model{config};
  auto const params = ha::load_parameters<float>(run.cpu, folder / "run.safetensors", model);
  std::string loaded, trained;
  append_bits(run.cpu, params, loaded);
  append_bits(run.cpu, run.params, trained);
  CHECK((loaded == trained));
  config.norm.eps = 1e-5;
  CHECK_THROWS_WITH(ha::load_parameters<float>(run.cpu, folder / "run.safetensors", Model{config}),
                    Contains("norm.eps: 1e-06 in the file, 1e-05 in the model"));
}

TEST_CASE("a model's configuration comes back out of its checkpoint") {
  ScratchFolder const folder;
  Run run;
  run.save(folder / "run.safetensors");
  auto const header = ha::read_checkpoint_header(folder / "run.safetensors");
  Model const again{ha::checkpoint_config<Model>(header)};
  CHECK(ha::checkpoint::describe(again) == ha::checkpoint::describe(run.model));
  CHECK_NOTHROW(ha::load_parameters<float>(run.cpu, folder / "run.safetensors", again));
}

TEST_CASE("an optimizer of one's own is kept as named groups and numbers") {
  ScratchFolder const folder;
  Run run{42};
  Params speed = run.model.initialize<float>(run.cpu, ha::Seed{5});
  ha::NamedGroups groups;
  groups.add("speed", speed);
  groups.numbers = {{"friction", 0.5}};
  save_checkpoint(run.cpu, folder / "own.safetensors", run.model, run.params, groups, {.step = 3});
  CHECK(ha::Safetensors{folder / "own.safetensors"}.contains("optimizer.speed.blocks.0.attention.w.q"));

  std::string params, speeds, loaded_params, loaded_speeds;
  append_bits(run.cpu, run.params, params);
  append_bits(run.cpu, speed, speeds);
  Run other{43};
  Params other_speed = other.model.initialize<float>(other.cpu, ha::Seed{6});
  ha::NamedGroups other_groups;
  other_groups.add("speed", other_speed);
  auto const load = [&](double friction) {
    return load_checkpoint(
        other.cpu, folder / "own.safetensors", other.model, other.params, other_groups,
        [&](Json const& numbers, std::string const& where) { ha::check(numbers.at("friction") == friction, where, "another friction"); });
  };
  CHECK_THROWS_WITH(load(0.25), Contains("own.safetensors: another friction"));
  CHECK(load(0.5).step == 3);
  append_bits(other.cpu, other.params, loaded_params);
  append_bits(other.cpu, other_speed, loaded_speeds);
  CHECK(loaded_params == params);
  CHECK(loaded_speeds == speeds);
  CHECK_THROWS_WITH(other.load(folder / "own.safetensors"), Contains("own.safetensors"));   // it is not AdamW's
}

TEST_CASE("a configuration that makes no sense is refused by the member's name") {
  ha::CheckpointHeader header;
  header.json = ha::checkpoint::describe(Model{small()});
  auto const refused = [&](char const* pointer, Json const& value, char const* said) {
    auto changed = header;
    changed.json[Json::json_pointer(pointer)] = value;
    CHECK_THROWS_WITH(ha::checkpoint_config<Model>(changed), Contains(said));
  };
  refused("/model/model_dim", "wide", "'model_dim' is of another kind; it must be an integer");
  refused("/model/vocab_size", 1'000'000'000'000'000, "'vocab_size' is 1000000000000000; allowed are sizes up to 1048576");
  refused("/model/vocab_size", 18446744073709551615u, "'vocab_size' is 18446744073709551615; allowed are sizes up to");
  for (Json const& value : {Json(64.0), Json(1e15), Json(true), Json("64"), Json(nullptr), Json::array({64})})
    refused("/model/vocab_size", value, "; it must be an integer");
  refused("/model/vocab_size", -2, "'vocab_size' is -2; allowed are");
  refused("/layers/1/sizes/head_dim", 8.0, "'head_dim' is 8.0; it must be an integer");
  refused("/model/feed_forward/mlp_only_layers", Json::array({1.0}), "'mlp_only_layers' is 1.0; it must be an integer");
  refused("/model/feed_forward/mlp_only_layers", 1, "'mlp_only_layers' is of another kind; it must be a list of integers");
  refused("/model/tie_embedding", 1, "'tie_embedding' is of another kind; it must be true or false");
  refused("/model/norm/eps", "small", "'eps' is of another kind; it must be a number");
  refused("/model/norm/weight", 1, "'weight' is of another kind; it must be a word");
  refused("/model/norm/weight", "\x1b[2J", "unknown word '\\x1b[2J'");
  refused("/model/norm/weight", "heavy", "unknown word 'heavy'");
  refused("/layers", Json::array(), "'layers' does not fit the pattern");
  refused("/layers/0/norm_placement", "beside", "unknown word 'beside'");
  refused("/layers/0/sizes", Json::object(), "no 'num_heads'");
}

TEST_CASE("another pattern or type is refused, and both are named") {
  ScratchFolder const folder;
  saved_run(folder);
  auto const path = folder / "run.safetensors";
  ha::Cpu cpu{1};
  using Turned = ha::LanguageModel<ha::Stack<ha::GDN, Sparse, ha::Full>>;
  CHECK_THROWS_WITH(ha::load_parameters<float>(cpu, path, Turned{{.vocab_size = 4, .model_dim = 16, .num_heads = 2}}),
                    Contains(path.string()) && Contains("the file holds GDN Full DSA, the model is GDN DSA Full"));
  CHECK_THROWS_WITH(ha::load_parameters<double>(cpu, path, Model{small()}), Contains("dtype: 'F32' in the file, 'F64' in the model"));
}

TEST_CASE("another configuration is refused, and both values are named") {
  ScratchFolder const folder;
  saved_run(folder);
  struct Change {
    void (*make)(Model::Config&);
    char const* said;
  };
  for (auto const& [make, said] : {
           Change{[](Model::Config&) {}, no_error},
           {[](Model::Config& c) { c.model_dim = 32; }, "model_dim: 16 in the file, 32 in the model"},
           {[](Model::Config& c) { c.vocab_size = 65; }, "vocab_size: 64 in the file, 65 in the model"},
           {[](Model::Config& c) { c.tie_embedding = true; }, "tie_embedding: false in the file, true in the model"},
           {[](Model::Config& c) { c.feed_forward.top_k = 1; }, "feed_forward.top_k: 2 in the file, 1 in the model"},
           {[](Model::Config& c) { c.feed_forward.mlp_only_layers = {1}; }, "mlp_only_layers: a list of 0 in the file, a list of 1"},
           {[](Model::Config& c) { c.feed_forward.balance = ha::Balance::pooled; }, "balance: 'per_layer' in the file, 'pooled'"},
           {[](Model::Config& c) { c.policy<ha::GDN>().norm_eps = 1e-5; }, "layer 0 (GDN).sizes.norm_eps: 1e-06 in the file"},
           {[](Model::Config& c) { c.policy<Sparse>().index_loss = 2; }, "index_loss: 1.0 in the file, 2.0 in the model"},
           {[](Model::Config& c) { c.norm_placement<ha::Full>() = ha::NormPlacement::after; },
            "norm_placement: nothing in the file, 'after'"},
       }) {
    auto config = small();
    make(config);
    Run run{1, 1, config};
    CHECK_THAT(refusal(run, folder / "run.safetensors"), Contains(said));
  }
}

TEST_CASE("another optimizer is refused, unless it is wanted") {
  ScratchFolder const folder;
  saved_run(folder);
  auto const path = folder / "run.safetensors";
  Run slower{1, 1, small(), {.learning_rate = 1e-3, .decays = adamw().decays}};
  CHECK_THAT(refusal(slower, path), Contains("optimizer.learning_rate: 0.003 in the file, 0.001 in the optimizer"));
  Run decaying{1, 1, small(), {.learning_rate = 3e-3}};
  CHECK_THAT(refusal(decaying, path), Contains("optimizer.without_decay: a list of 12 in the file, a list of 0 in the optimizer"));
  load_checkpoint(slower.cpu, path, slower.model, slower.params, slower.optimizer, {.other_optimizer_options = true});
  CHECK(slower.optimizer.steps() == 3);
  CHECK(slower.optimizer.options().learning_rate == 1e-3);
}

TEST_CASE("a file that is damaged, of another version or no checkpoint is refused, and nothing is touched") {
  ScratchFolder const folder;
  auto const file = saved_run(folder);
  Run run;
  auto const said = [&](std::string const& content) { return refusal(run, folder.file("bad.safetensors", content)); };
  struct Patch {
    char const *patch, *said;
  };
  for (auto const& [patch, words] : {
           Patch{R"({"format_version": 2})", "bad.safetensors: its format is version 2; this library reads version 1"},
           {R"({"format_version": null})", "no 'format_version'"},
           {R"({"format_version": "one"})", "format_version must hold integers"},
           {R"({"pattern": ["GDN", 7]})", "'pattern' must be a list of names"},
           {R"({"pattern": 7})", "'pattern' must be a list of names"},
           {R"({"pattern": ["GDN", "\n\u007f"]})", "the file holds GDN \\x0a\\x7f, the model is"},
           {R"({"dtype": "F64"})", "dtype: 'F64' in the file, 'F32' in the model"},
           {R"({"layers": [1, 2]})", "'layers' does not fit the pattern"},
           {R"({"layers": 3})", "'layers' does not fit the pattern"},
           {R"({"layers": [1, 2, 3]})", "layer 0 (GDN): 1 in the file, a group in the model"},
           {R"({"model": 3})", "3 in the file, a group in the model"},
           {R"({"model": {"norm": null}})", "norm: nothing in the file, a group in the model"},
           {R"({"model": {"norm": {"eps": "small"}}})", "norm.eps: 'small' in the file, 1e-06 in the model"},
           {R"({"model": {"more": true}})", "more: true in the file, nothing in the model"},
           {R"({"model": {"more\u001b[2J\n": true}})", R"(more\x1b[2J\x0a: true in the file, nothing in the model)"},
           {R"({"model": {"model_dim": 16.0}})", "model_dim: 16.0 in the file, 16 in the model"},
           {R"({"layers": [{}, {}, {}]})", "layer 0 (GDN).options: nothing in the file"},
           {R"({"step": 3.0})", "step must hold integers from 0"},
           {R"({"step": 9223372036854775808})", "step must hold integers from 0 to 2^63 - 1"},
           {R"({"data": {"seed": 7.0}})", "seed must be an integer from 0"},
           {R"({"format_version": 1.0})", "format_version must hold integers"},
           {R"({"dtype": "F\u001b32"})", R"(dtype: 'F\x1b32' in the file)"},
           {R"({"step": -1})", "step must hold integers from 0"},
           {R"({"data": {"seed": "x"}})", "seed must be an integer from 0"},
           {R"({"data": null})", "no 'data'"},
           {R"({"optimizer": {"steps": 1.5}})", "steps must hold integers from 0"},
           {R"({"optimizer": {"updates": 3}})", "'updates' must be a group of numbers"},
           {R"({"optimizer": {"updates": {"embedding": -1}}})", "embedding must hold integers from 0"},
           {R"({"optimizer": {"updates": {"embedding": 4}}})", "updates of embedding: 4 in 3 steps"},
           {R"({"note": null})", "no 'note'"},
       })
    CHECK_THAT(said(with_json(file, Json::parse(patch))), Contains(words));
  for (auto const& [patch, words] : {
           Patch{"{}", no_error},
           {R"({"embedding": {"shape": [16, 64]}})", "tensor 'embedding': shape [16, 64] in the file, [64, 16] in the model"},
           {R"({"embedding": {"dtype": "I32"}})", "tensor 'embedding': dtype I32 in the file, F32 in the model"},
           {R"({"more": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}})", "tensor 'more' is in the file, but not in the model"},
           {R"({"__metadata__": null})", "no checkpoint: it has no metadata 'hybridattn'"},
           {R"({"__metadata__": {"hybridattn": "{"}})", "its description: line 1, column 2: not JSON: it ends too early"},
           {R"({"__metadata__": {"hybridattn": "{\"a\": 1,\n\"a\": 2}"}})", "its description: line 2, column 3: the key 'a' occurs twice"},
           {R"({"__metadata__": {"hybridattn": "{\"a\": NaN}"}})",
            "its description: line 1, column 7: not JSON: NaN and Infinity are not allowed"},
           {R"({"__metadata__": {"hybridattn": "{}\u0000"}})", "its description: line 1, column 3: a NUL byte"},
           {R"({"e\u001b[2J": {"dtype": "F99", "shape": [0], "data_offsets": [0, 0]}})", R"(tensor 'e\x1b[2J' is in the file, but not in)"},
           {R"({"history.loss": {"dtype": "F99"}})", "tensor 'history.loss' of dtype F99 cannot be read as F64"},
           {R"({"__metadata__": {"hybridattn": "[]"}})", "its description: line 1, column 1: not a JSON object"},
       })
    CHECK_THAT(said(with_tensors(file, Json::parse(patch))), Contains(words));
  Json moved;
  moved["other"] = header_of(file)["embedding"];
  moved["embedding"] = nullptr;
  CHECK_THAT(said(with_tensors(file, moved)), Contains("tensor 'embedding' is in the model, but not in the file"));
}

TEST_CASE("a file that ends early, or is nested deeper than the stack is, is refused") {
  ScratchFolder const folder;
  auto const file = saved_run(folder);
  Run run;
  for (std::size_t const kept : {std::size_t{0}, std::size_t{7}, std::size_t{100}, file.size() / 2, file.size() - 1})
    CHECK(refusal(run, folder.file("bad.safetensors", file.substr(0, kept))) != no_error);
  Json patch;
  patch["__metadata__"]["hybridattn"] =
      R"({"format_version": 1, "pattern": ["GDN", "Full", "DSA"], "dtype": "F32", "step": 1, "note": "", "model": {"model_dim": )" +
      std::string(200'000, '[') + std::string(200'000, ']') + "}}";
  auto const deep = folder.file("deep.safetensors", with_tensors(file, patch));
  CHECK_THAT(refusal(run, deep),
             Contains("deep.safetensors: its description: line 1, column ") && Contains("nested deeper than 64 levels"));
  CHECK_THROWS_WITH(ha::read_checkpoint_header(deep), Contains("nested deeper than 64 levels"));
  CHECK_THAT(refusal(run, folder / "nowhere"), Contains("nowhere: there is no such file"));
}

TEST_CASE("what is no checkpoint, or no file, is called what it is") {
  ScratchFolder const folder;
  Run run;
  auto const said = [&](std::string const& content) { return refusal(run, folder.file("bad.safetensors", content)); };
  CHECK_THAT(said("version https://git-lfs.github.com/spec/v1\n"), Contains("it is no safetensors file, but a git-lfs pointer"));
  CHECK_THAT(said(std::string("PK\x03\x04\0\0\0\0\0\0", 10)), Contains("but a zip archive"));
  CHECK_THAT(said("Once upon a time"), Contains("but a text that begins 'Once upon a time'"));
  REQUIRE(::mkfifo((folder / "pipe").c_str(), 0600) == 0);
  CHECK_THAT(refusal(run, folder / "pipe"), Contains("it is a pipe, not a regular file"));
  CHECK_THAT(refusal(run, "/dev/zero"), Contains("it is a device, not a regular file"));
  std::filesystem::create_symlink("loop", folder / "loop");
  CHECK_THAT(refusal(run, folder / "loop"), Contains("it is a loop of symbolic links"));
}

TEST_CASE("a file that cannot be read to its end leaves the run as it was, wherever it fails") {
  ScratchFolder const folder;
  saved_run(folder);
  auto const path = folder / "run.safetensors";
  Run run{5}, other{5};
  int const reads = failing_read::count([&] { CHECK(refusal(run, path) == no_error); });
  CHECK(reads > 100);
  for (int read = 0; read < reads; ++read)
    failing_read::at(read, [&] { CHECK_THAT(refusal(other, path), Contains("run.safetensors: ") && Contains("Input/output error")); });
  CHECK(refusal(other, path) == no_error);
  CHECK((bits_of(other) == bits_of(run)));
}

TEST_CASE("a checkpoint that cannot be written leaves the one before") {
  ha::ignore_file_size_signal();
  ScratchFolder const folder;
  auto const file = saved_run(folder);
  Run run;
  {
    FullDisk const full{4096};
    CHECK_THROWS_WITH(run.save(folder / "run.safetensors"), Contains("run.safetensors") && Contains("too large"));
  }
  CHECK((content_of(folder / "run.safetensors") == file));
  run.progress.step = -1;
  CHECK_THROWS_WITH(run.save(folder / "run.safetensors"), Contains("step -1 is not allowed"));
  run.progress.step = 0;
  run.progress.note = "\xff";
  CHECK_THROWS_WITH(run.save(folder / "run.safetensors"), Contains("not UTF-8"));
  CHECK((content_of(folder / "run.safetensors") == file));
  CHECK(std::distance(std::filesystem::directory_iterator{folder.path()}, {}) == 1);
}

namespace own {
struct Bare {
  static constexpr std::string_view name = "Bare";
  struct Config {
    int size = 3;
  };
};
struct Options {
  int taps = 2;
};
struct Described : Bare {
  static constexpr std::string_view name = "Described";
  static constexpr Options options{};
  struct Config {
    int size = 3;
  };
};
void members(Options const& o, auto f) { f("taps", o.taps); }
void members(Described::Config const& c, auto f) { f("size", c.size); }
}  // namespace own

TEST_CASE("a policy of one's own is described as far as it says how") {
  CHECK(ha::checkpoint::describe_policy<own::Bare>({}) == Json{{"policy", "Bare"}});
  CHECK(ha::checkpoint::describe_policy<own::Described>({}) ==
        Json{{"policy", "Described"}, {"options", {{"taps", 2}}}, {"sizes", {{"size", 3}}}});
}

namespace {

// Runs a hidden test of this program in a child process, in a given folder. `report` reads what the child writes to descriptor 3.
class Child {
 public:
  Child(char const* test, std::filesystem::path const& folder) {
    int ends[2];
    if (::pipe2(ends, O_CLOEXEC) != 0) std::abort();
    ::setenv("HYBRIDATTN_TEST_FOLDER", folder.c_str(), 1);
    process_ = ::fork();
    if (process_ == 0) {   // only calls that are safe between fork and exec
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);
      ::dup2(ends[1], 3);
      ::execl("/proc/self/exe", "test_checkpoint", test, static_cast<char*>(nullptr));
      ::_exit(127);
    }
    ::close(ends[1]);
    reports_ = ha::FileDescriptor{ends[0]};
  }
  void kill() {
    ::kill(process_, SIGKILL);
    ::waitpid(process_, nullptr, 0);
  }
  // Returns the next number that the child reports. Returns nothing if the child has ended, or has not reported yet and `wait` is false.
  std::optional<Index> report(bool wait) {
    pollfd wanted{reports_.number(), POLLIN, 0};
    Index number = 0;
    bool const there = ::poll(&wanted, 1, wait ? -1 : 0) == 1 && ::read(reports_.number(), &number, sizeof number) == sizeof number;
    return there ? std::optional(number) : std::nullopt;
  }

 private:
  pid_t process_ = -1;
  ha::FileDescriptor reports_;
};

std::filesystem::path folder_of_child() {
  char const* const folder = std::getenv("HYBRIDATTN_TEST_FOLDER");
  REQUIRE(folder != nullptr);
  return folder;
}

}  // namespace

// The process that the next test kills. Every step ends with a checkpoint and then a report.
TEST_CASE("trains until it is killed", "[.trains]") {
  auto const path = folder_of_child() / "run.safetensors";
  Run run;
  if (std::filesystem::exists(path)) run.load(path);
  for (;;) {
    run.train(1);
    run.save(path);
    if (::write(3, &run.progress.step, sizeof run.progress.step) < 0) return;
  }
}

TEST_CASE("killed at any moment, the last finished checkpoint opens, and the run goes on from it bit for bit") {
  ScratchFolder const folder;
  auto const path = folder / "run.safetensors";
  ha::Random random{ha::Seed{3}};
  Index finished = 0;
  int in_the_middle = 0;
  for (int round = 0; round < 20; ++round) {
    Child child{"[.trains]", folder.path()};
    // Every second process may be killed before it has done anything, the others are killed while they train.
    if (round % 2 == 0) finished = child.report(true).value_or(finished);
    std::this_thread::sleep_for(std::chrono::microseconds(random.below(round % 2 == 0 ? 50'000 : 100'000)));
    child.kill();
    while (auto const step = child.report(false)) finished = *step;
    in_the_middle += std::distance(std::filesystem::directory_iterator{folder.path()}, {}) > 1;
    if (finished == 0 && !std::filesystem::exists(path)) continue;
    auto const header = ha::read_checkpoint_header(path);
    REQUIRE(header.step >= finished);   // it may have died between checkpoint and report
    finished = header.step;
  }
  std::printf("20 processes killed, %d of them while they wrote, after %td steps\n", in_the_middle, finished);
  REQUIRE(finished > 0);
  Run last{1};
  last.load(path);
  Run whole;
  whole.train(last.progress.step);
  CHECK((bits_of(last) == bits_of(whole)));
  CHECK(same_bits(last.progress.history["loss"], whole.progress.history["loss"]));
  last.save(path);   // removes the temporary files that killed processes left
  CHECK(std::distance(std::filesystem::directory_iterator{folder.path()}, {}) == 1);
}

// Writes a checkpoint for tests/open_checkpoint.py, and what that script must find in it.
TEST_CASE("writes a checkpoint and what is in it", "[.writes]") {
  auto const folder = folder_of_child();
  Run run;
  run.train(4);
  run.save(folder / "run.safetensors");
  Json expected;
  expected["history.loss"] = run.progress.history["loss"];
  auto const add = [&](std::string const& prefix, auto const& group) {
    ha::zip(
        [&](ha::Path const& tensor_path, auto const& tensor) {
          auto const host = download(run.cpu, tensor);
          if (host.empty()) return;
          std::uint64_t sum = 0;   // of each element's bits times its number
          for (std::size_t i = 0; i < host.size(); ++i) sum += std::uint64_t{std::bit_cast<std::uint32_t>(host[i])} * (i + 1);
          auto const extents = tensor.shape();
          std::vector<Index> const shape(std::begin(extents.extent), std::end(extents.extent));
          expected["tensors"][prefix + tensor_path.str()] = {{"shape", shape}, {"sum", sum}, {"first", host[0]}};
        },
        group);
  };
  add("", run.params);
  add("optimizer.mean.", run.optimizer.moments().mean);
  add("optimizer.square.", run.optimizer.moments().square);
  std::ofstream(folder / "expected.json") << expected.dump();
}

TEST_CASE("a sweep refuses what another one put into its folder after it looked") {
  ScratchFolder const folder;
  sweep::Settings ours{.steps = 2, .seq_len = 16, .batch = 2, .data = {}, .out = folder.path()}, other = ours;
  other.steps = 3;
  auto const state = ha::RecallTask{}.state();
  sweep::Memory const memory{ours, {"linear_only"}, state}, theirs{other, {"linear_only"}, state};
  memory.check();

  // A checkpoint of another sweep, or one that does not fit.
  Run run;
  run.train(1);
  for (auto const* series : {"training", "elapsed"}) run.progress.history[series] = {1};
  auto const load = [&](auto const& path) { return load_checkpoint(run.cpu, path, run.model, run.params, run.optimizer); };
  run.progress.note = theirs.note();
  run.save(memory.checkpoint("linear_only"));
  CHECK_THROWS_WITH(memory.steps_of("linear_only"), Contains("--steps 3") && Contains("--steps 2") && Contains("another --out"));
  CHECK_THROWS_WITH(memory.resumed("linear_only", load), Contains("--steps 3") && Contains("--steps 2") && Contains("another --out"));
  CHECK(theirs.resumed("linear_only", load).step == 1);
  run.progress.note = memory.note();
  run.progress.history["elapsed"] = {};
  run.save(memory.checkpoint("linear_only"));
  CHECK_THROWS_WITH(memory.resumed("linear_only", load), Contains("history.elapsed has 0 numbers for 1 steps"));
  run.progress.history = {};
  run.progress.step = 3;
  run.save(memory.checkpoint("linear_only"));
  CHECK_THROWS_WITH(memory.resumed("linear_only", load), Contains("3 of 2 steps"));

  // A checkpoint of another backend.
  other = ours;
  other.backend = "emulator";
  sweep::Memory const emulated{other, {"linear_only"}, state};
  run.progress.note = emulated.note();
  run.save(memory.checkpoint("linear_only"));
  CHECK_THROWS_WITH(memory.check(), Contains("--backend emulator") && Contains("--backend cpu") && Contains("another --out"));
  CHECK(emulated.steps_of("linear_only") == 3);

  // Results of other arguments, of another pattern, and of too few steps.
  theirs.finish({.name = "linear_only", .letters = "LLLL", .losses = {1, 2, 3}});
  CHECK_THROWS_WITH(memory.finished("linear_only"), Contains("--steps 3") && Contains("--steps 2") && Contains("another --out"));
  memory.finish({.name = "linear_only", .letters = "FFFF", .losses = {1, 2}});
  CHECK_THROWS_WITH(memory.finished("linear_only"), Contains("is not of this program"));
  emulated.finish({.name = "linear_only", .letters = "LLLL", .losses = {1, 2}});
  CHECK(emulated.finished("linear_only")->backend == "emulator");
  CHECK_THROWS_WITH(memory.finished("linear_only"), Contains("--backend emulator") && Contains("--backend cpu"));
  memory.finish({.name = "linear_only", .letters = "LLLL", .losses = {1}});
  CHECK_THROWS_WITH(memory.finished("linear_only"), Contains("the losses of 1 steps, not of 2"));
}
