#include "catch.hpp"
#include "scratch_folder.hpp"

#include "../examples/program.hpp"
#include "../examples/sweep/anarchism.hpp"
#include "../examples/sweep/plots.hpp"

using Catch::Matchers::Contains;
using sweep::Index;
using sweep::RunResult;

namespace {

RunResult run(std::string letters, double val_loss, double accuracy = 0.3, double seconds = 80) {
  RunResult result;
  result.name = sweep::pattern_name(letters);
  result.letters = std::move(letters);
  result.backend = "emulator";
  result.num_parameters = 1'489'160;
  result.training_time = seconds;
  result.tokens_per_second = 12'345.4;
  result.val_loss = val_loss;
  result.val_accuracy = accuracy;
  result.seq_len = 128;
  result.losses = {4, 2, 3};
  return result;
}
std::vector<RunResult> study() {
  return {run("LFFL", 1.72), run("FLFL", 1.74), run("LLFF", 1.71), run("FFLL", 1.75),
          run("LDDL", 1.73), run("DLDL", 1.77), run("LLDD", 1.76), run("DDLL", 1.78)};
}
std::size_t files_in(std::filesystem::path const& folder) {
  return static_cast<std::size_t>(std::distance(std::filesystem::directory_iterator{folder}, {}));
}

}  // namespace

TEST_CASE("a pattern has the study's name, arrows and layer types") {
  CHECK(sweep::pattern_name("LFFL") == "1_sandwich");
  CHECK(sweep::pattern_name("DDLL") == "8_dsa_full_first");
  CHECK(sweep::pattern_name("LLFD") == "LLFD");
  CHECK(sweep::arrows("LDDL") == "L -> D -> D -> L");
  CHECK(sweep::layer_type('G') == sweep::layer_type('L'));
  CHECK(sweep::layer_type('*') == "full_attention");
  CHECK_THROWS_WITH(sweep::layer_type('Q'), Contains("'Q'"));
}

TEST_CASE("a result's derived numbers are the study's") {
  auto const r = run("LDDL", 1.75);
  CHECK(r.val_loss_published() == Approx(1.75 * 128 / 127));
  CHECK(r.val_perplexity() == Approx(std::exp(1.75)));
  CHECK(*r.bits_per_byte() == Approx(1.75 / std::log(2.0)));
  CHECK(r.running_mean() == std::vector<double>{4, 3, 3});
  CHECK(r.uses_dsa());
  CHECK(r.is_studied());
  CHECK(!run("DDDD", 1).is_studied());
}

TEST_CASE("the table ranks by validation loss, failed runs last") {
  auto results = study();
  results[0].val_loss = std::numeric_limits<double>::quiet_NaN();
  results[1].tokens_are_bytes = false;
  auto const order = sweep::ranked(results);
  CHECK(order.front()->letters == "LLFF");
  CHECK(order[6]->letters == "DDLL");
  CHECK(order.back()->letters == "LFFL");
  auto const table = sweep::ranking_table(results);
  CHECK_THAT(table, Contains("   1  3_linear_first      LLFF        1.7100     2.4670   30.00 %       5.529   1,489,160    12,345"));
  CHECK_THAT(table, Contains("2_alternating       FLFL        1.7400          -"));
  CHECK(std::ranges::count(table, '\n') == 9);
}

TEST_CASE("category averages are arithmetic and say how many of the eight are in") {
  auto results = study();
  CHECK_THAT(sweep::category_averages(results), Contains("over 8 of the study's 8") && Contains("val loss +0.0300"));
  auto const original = sweep::category(results, false);
  CHECK(original.count == 4);
  CHECK(original.val_loss == Approx(1.73));
  CHECK(original.val_perplexity == Approx((std::exp(1.72) + std::exp(1.74) + std::exp(1.71) + std::exp(1.75)) / 4));
  results.erase(results.begin(), results.begin() + 4);
  results.push_back(run("FFFF", 9));   // is not one of the study's eight
  auto const text = sweep::category_averages(results);
  CHECK_THAT(text, Contains("over 4 of the study's 8") && Contains("Original    none of 4") && Contains("DSA         4 of 4"));
  CHECK_THAT(text, !Contains("difference"));
}

TEST_CASE("the comparison has the study's fields in its order, and ours behind") {
  ScratchFolder const folder;
  auto results = study();
  results[1].val_loss = std::numeric_limits<double>::quiet_NaN();
  sweep::write_comparison(folder.path(), results);
  auto const text = content_of(folder / "comprehensive_comparison.json");
  CHECK_THAT(text, Catch::Matchers::StartsWith("{\n  \"1_sandwich\": {\n    \"pattern\": \"L -> F -> F -> L\",\n"));
  auto const json = nlohmann::ordered_json::parse(text);
  CHECK(json.size() == 8);
  auto const& sandwich = json["1_sandwich"];
  std::vector<std::string> keys;
  for (auto const& [key, value] : sandwich.items()) keys.push_back(key);
  std::vector<std::string> const published = {"pattern",    "layer_types", "uses_dsa",     "num_parameters", "training_time",
                                              "train_loss", "val_loss",    "val_accuracy", "val_perplexity", "loss_history"};
  CHECK(std::vector(keys.begin(), keys.begin() + 10) == published);
  CHECK(sandwich["layer_types"] == std::vector<std::string>{"linear_attention", "full_attention", "full_attention", "linear_attention"});
  CHECK(sandwich["train_loss"] == 3.0);
  CHECK(sandwich["loss_history"][1] == nlohmann::ordered_json{{"step", 2}, {"loss", 3.0}});
  CHECK(sandwich["instantaneous_loss_history"][1] == nlohmann::ordered_json{{"step", 2}, {"loss", 2.0}});
  CHECK(sandwich["val_loss_published"].get<double>() == Approx(1.72 * 128 / 127));
  CHECK(json["2_alternating"]["val_loss"].is_null());
  CHECK(json["5_dsa_sandwich"]["uses_dsa"] == true);
  CHECK(sandwich["backend"] == "emulator");
}

TEST_CASE("a run's log has a line a step, and its name once it is finished") {
  ScratchFolder const folder;
  {
    sweep::RunLog log{folder.path(), "1_sandwich"};
    log.add(1, 5.5, 5.5, 12000, 0.25);
    log.add(2, std::numeric_limits<double>::quiet_NaN(), 5.25, 12000, 0.5);
    CHECK(!std::filesystem::exists(folder / "1_sandwich.jsonl"));
    log.finish();
  }
  CHECK(content_of(folder / "1_sandwich.jsonl") ==
        "{\"step\":1,\"loss\":5.5,\"running_mean\":5.5,\"tokens_per_second\":12000,\"elapsed\":0.25}\n"
        "{\"step\":2,\"loss\":null,\"running_mean\":5.25,\"tokens_per_second\":12000,\"elapsed\":0.5}\n");
  {
    sweep::RunLog unfinished{folder.path(), "2_alternating"};
  }
  CHECK(files_in(folder.path()) == 1);
}

TEST_CASE("a results folder that cannot be is refused before any work") {
  ScratchFolder const folder;
  auto const file = folder.file("file", "content");
  CHECK_THROWS_WITH(sweep::prepare_folder(file), Contains("cannot write into the folder") && Contains("file"));
  CHECK_THROWS_WITH(sweep::prepare_folder(file / "below"), Contains("below") && Contains("Not a directory"));
  CHECK_THROWS_AS(sweep::prepare_folder("/proc/results"), hybridattn::Error);
  CHECK_THROWS_AS((sweep::RunLog{file, "log"}), hybridattn::Error);
  sweep::prepare_folder(folder / "deep/results");
  sweep::prepare_folder(folder / "deep/results");
  CHECK(std::filesystem::is_directory(folder / "deep/results"));
}

TEST_CASE("a file that is replaced keeps its mode, a link its target") {
  namespace fs = std::filesystem;
  ScratchFolder const folder;
  auto const mode = [](fs::path const& path) { return static_cast<int>(fs::status(path).permissions()); };
  mode_t const before = ::umask(027);
  hybridattn::write_file_atomically(folder / "new", "1");
  ::umask(before);
  CHECK(mode(folder / "new") == 0640);   // a new file has the permissions that the umask leaves
  for (int const bits : {0600, 0444, 0777, 0604}) {
    fs::permissions(folder / "new", static_cast<fs::perms>(bits));
    hybridattn::write_file_atomically(folder / "new", "2");
    CHECK(mode(folder / "new") == bits);
  }

  // Links that are relative, absolute and to other links. A target that does not exist yet is made.
  fs::create_directory(folder / "far");
  fs::create_symlink("far/target", folder / "link");
  fs::create_symlink(folder / "link", folder / "outer");
  for (auto const* name : {"link", "outer"}) {
    hybridattn::write_file_atomically(folder / name, name);
    CHECK(fs::is_symlink(folder / name));
    CHECK(content_of(folder / "far/target") == name);
  }
  CHECK(files_in(folder / "far") == 1);
  fs::create_symlink("round", folder / "about");
  fs::create_symlink("about", folder / "round");
  CHECK_THROWS_WITH(hybridattn::write_file_atomically(folder / "round", "x"), Contains("too many symbolic links"));
  for (auto const* name : {"", "far", "far/", "far/.", ".."})
    CHECK_THROWS_WITH(hybridattn::write_file_atomically(*name == 0 ? fs::path{} : folder / name, "x"), Contains("cannot write"));
  CHECK(files_in(folder.path()) == 6);
}

TEST_CASE("what is in use is refused, by whom, until it is not") {
  namespace fs = std::filesystem;
  ScratchFolder const folder;
  program::command = "sweep --out a\nb";
  fs::create_directory(folder / "results");
  fs::create_symlink("model", folder / "alias");
  std::string const user = "in use by process " + std::to_string(::getpid()) + " on ";
  for (auto const& [one, other] : {std::pair{"results", "results/"}, std::pair{"model", "alias"}, std::pair{"alias", "model"}}) {
    {
      program::InUse const lock{folder / one};
      CHECK_THROWS_WITH((program::InUse{folder / other}),
                        Contains(user) && Contains(" since 2") && Contains("(sweep --out a\\x0ab)") && Contains("another --out"));
      CHECK_NOTHROW(program::InUse{folder / "unrelated"});
    }
    CHECK_NOTHROW(program::InUse{folder / other});
  }
  folder.file("model.lock", "process 1 on another, which died");
  CHECK_NOTHROW(program::InUse{folder / "model"});
  CHECK(files_in(folder.path()) == 2);
  CHECK(files_in(folder / "results") == 0);
  CHECK_THROWS_WITH((program::InUse{folder / "missing/model"}), Contains("cannot write"));
}

TEST_CASE("a name is shown in one line") {
  CHECK(program::one_line("a\nb\x1b[2J\x7f\xc3\xa4") == "a\\x0ab\\x1b[2J\\x7f\xc3\xa4");
  CHECK(program::formatted("%s %d", std::string(1000, 'x').c_str(), 7) == std::string(1000, 'x') + " 7");
}

TEST_CASE("a full disk leaves no comparison, no log and no half of either") {
  hybridattn::ignore_file_size_signal();
  ScratchFolder const folder;
  FullDisk const full{1000};
  CHECK_THROWS_WITH(sweep::write_comparison(folder.path(), study()), Contains("comprehensive_comparison.json") && Contains("too large"));
  CHECK(folder.is_empty());
  sweep::RunLog log{folder.path(), "1_sandwich"};
  CHECK_THROWS_WITH(
      [&] {
        for (Index step = 1; step < 100; ++step) log.add(step, 5.5, 5.5, 12000, 0.25);
      }(),
      Contains("1_sandwich.jsonl"));
  CHECK(folder.is_empty());
}

TEST_CASE("a data file has a line a step and marks what is not there") {
  std::vector<sweep::Column> const columns = {{"a", {1, 2.5}}, {"b", {std::numeric_limits<double>::quiet_NaN()}}};
  CHECK(sweep::data_file(columns) == "step\ta\tb\n1\t1\t?\n2\t2.5\t?\n");
}

TEST_CASE("average curves are pointwise over a category, as far as all its runs go") {
  auto results = study();
  results[0].losses = {1, 1, 1};
  results[1].losses = {8, 8};
  auto const [mean, lowest, highest] = sweep::category_curves(results, false, "Original");
  CHECK(mean.values == std::vector<double>{4.25, 3.75});
  CHECK(lowest.values == std::vector<double>{1, 1});
  CHECK(highest.values == std::vector<double>{8, 8});
}

TEST_CASE("both plots are drawn, or one line says why not") {
  ScratchFolder const folder;
  auto results = study();
  results[2].name = "it's";   // a quote in a legend
  auto const trouble = sweep::draw_plots(folder.path(), results);
  for (std::string const name : {"loss_comparison", "loss_comparison_average"}) {
    bool const drawn = trouble.empty();
    if (drawn || name == "loss_comparison") CHECK(std::filesystem::exists(folder / (name + ".gp")));
    CHECK(std::filesystem::exists(folder / (name + ".png")) == drawn);
    CHECK(std::filesystem::exists(folder / (name + ".svg")) == drawn);
  }
  CHECK((trouble.empty() || trouble.starts_with("no pictures: gnuplot is not installed")));
  CHECK(files_in(folder.path()) == (trouble.empty() ? 8u : 2u));
  auto const script = content_of(folder / "loss_comparison.gp");
  CHECK_THAT(script, Contains("title '5_dsa_sandwich: L -> D -> D -> L'") && Contains("dt (8,5)") && Contains("'it''s: L -> L -> F -> F'"));
}

TEST_CASE("another program's exit status comes back, and one that is not there is told apart") {
  ScratchFolder const folder;
  CHECK(sweep::run_program({"sh", "-c", "touch \"$0\"; exit 3", "a; file"}, folder.path()) == 3);
  CHECK(std::filesystem::exists(folder / "a; file"));
  CHECK(sweep::run_program({"no-such-program-anywhere"}, folder.path()) == sweep::no_such_program);
}

TEST_CASE("the package's pages are read in the order of their bytes, as one text") {
  ScratchFolder const folder;
  auto const pages = folder / "anarchism/usr/share/doc";
  std::filesystem::create_directories(pages);
  for (auto const& [name, content] : {std::pair{"b.html", "<p>two</p>"}, {"B.html", "<p>one &amp; a half</p>"}, {"c.txt", "no"}})
    std::ofstream(pages / name) << content;
  CHECK(sweep::anarchism_text(folder.path()) == "one & a half\n\ntwo\n");
  CHECK(sweep::anarchism_text(folder.path(), 5) == "one &");
}
