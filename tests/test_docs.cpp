// The pages are right. Errors that they quote are thrown, options that they list exist, and links lead to files.
#include "catch.hpp"
#include "error_of.hpp"
#include "scratch_folder.hpp"

#include <hybridattn/hybridattn.hpp>
#include <hybridattn/infer/generate.hpp>
#include <hybridattn/io/safetensors.hpp>
#include <hybridattn/io/text.hpp>
#include <hybridattn/store/hugging_face.hpp>
#include <hybridattn/testing/judge.hpp>

#include <regex>
#include <set>
#include <sstream>

namespace ha = hybridattn;
namespace fs = std::filesystem;

namespace {

fs::path const root = HYBRIDATTN_SOURCE_DIR;

std::vector<std::string> lines_of(std::string const& text) {
  std::vector<std::string> lines;
  std::istringstream stream(text);
  for (std::string line; std::getline(stream, line);) lines.push_back(line);
  return lines;
}
std::vector<fs::path> pages() {
  std::vector<fs::path> found{root / "README.md"};
  for (auto const& entry : fs::directory_iterator(root / "docs"))
    if (entry.path().extension() == ".md") found.push_back(entry.path());
  return found;
}
// The lines of a page's blocks that begin with this fence.
std::set<std::string> quoted(fs::path const& page, std::string const& begin = "```") {
  std::set<std::string> lines;
  std::string block;
  for (std::string const& line : lines_of(content_of(page))) {
    bool const fence = line.starts_with("```");
    if (!fence && block == begin) lines.insert(line);
    if (fence) block = block.empty() ? line : "";
  }
  return lines;
}

using Model = ha::LanguageModel<ha::Stack<ha::Full>>;

std::set<std::string> errors_of_sizes() {
  Model::Config groups, below_zero;
  groups.policy<ha::Full>().num_kv_heads = 3;
  below_zero.policy<ha::Full>().head_dim = -64;
  return {error_of([&] { Model{below_zero}; }), error_of([] { Model{{.model_dim = 100, .num_heads = 3}}; }),
          error_of([&] { Model{groups}; }), error_of([] { Model{{.feed_forward = {.num_experts = 2, .top_k = 3}}}; }),
          error_of([] { ha::Cpu{-1}; })};
}
std::set<std::string> errors_of_memory() {
  ha::Cpu cpu{1};
  Model const model{{.vocab_size = 2, .model_dim = 64, .num_heads = 1}};
  Model::Config wide{.vocab_size = 2, .model_dim = 8, .num_heads = 1};
  wide.policy<ha::Full>().head_dim = ha::Index{1} << 62;
  ha::Index const terabytes = ha::Index{1} << 43;
  return {error_of([&] { ha::Tensor<float, 1, ha::Cpu>{cpu, {terabytes}}; }),
          error_of([&] { ha::make_cache<float>(cpu, model, {.batch = 1 << 16, .capacity = 1 << 20}); }),
          error_of([&] { ha::Batch{}.resize(2, terabytes / 2); }),
          error_of([] { ha::GenerateOptions{.max_new_tokens = 1'000'000'000'000}.check_numbers(); }),
          error_of([&] { Model{wide}; }),
          error_of([] { ha::Sequences::equal(1 << 20, 1 << 11); }),
          error_of([&] { ha::parallel_for(cpu, 2, [&](ha::Index, int) { ha::Tensor<float, 1, ha::Cpu>{cpu, {1000}}; }); })};
}
std::set<std::string> errors_of_files() {
  ScratchFolder const folder;
  fs::path const before = fs::current_path();
  folder.file("model.safetensors", "version https://git-lfs.github.com/spec/v1\n");
  fs::current_path(folder.path());
  std::set<std::string> const errors{error_of([] { ha::read_text("missing.txt"); }),
                                     error_of([] { ha::Windows{ha::ByteText(std::string(1000, 'a')), {}, "book.txt"}.next_batch(8, 128); }),
                                     error_of([] { ha::Safetensors{"model.safetensors"}; })};
  fs::current_path(before);
  return errors;
}
std::set<std::string> errors_of_numbers() {
  ha::Cpu cpu{1};
  Model const model{{.model_dim = 8, .num_heads = 1}};
  auto const params = model.initialize<float>(cpu, {});
  double const nan = std::numeric_limits<double>::quiet_NaN();
  return {error_of([&] { ha::AdamW{cpu, params, {.beta_2 = 1}}; }), error_of([&] { ha::DSA::complete({.index_loss = nan}, 8, 1); }),
          error_of([] { Model{{.norm = {.eps = 0}}}; }), error_of([] { ha::Sampler{{.top_p = 0}}; })};
}
std::set<std::string> errors_of_folders() {
  namespace hf = ha::hugging_face;
  ScratchFolder const folder;
  fs::path const before = fs::current_path();
  auto const right = nlohmann::json::parse(content_of(root / "tests/golden/models/qwen3_5_text_tiny/config.json"));
  fs::current_path(folder.path());
  auto const error_with = [&](char const* field, nlohmann::json const& value) {
    auto config = right;
    config[field] = value;
    folder.file("config.json", config.dump());
    return error_of([] { hf::read_settings(""); });
  };
  std::set<std::string> errors{error_with("hidden_size", 32.0), error_with("conv_window", 3), error_with("attention_bias", true)};
  folder.file("config.json", "{\n  \"tokenizer_class\": \"X\", }");
  errors.insert(error_of([] { hf::read_settings(""); }));
  folder.file("model.safetensors", "");
  folder.file("model.safetensors.index.json", R"({"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}})");
  errors.insert(error_of([] { hf::Weights{""}; }));
  fs::current_path(before);
  return errors;
}
std::set<std::string> errors_of_steps() {
  ha::Cpu cpu{1};
  Model const model{{.model_dim = 8, .num_heads = 1}};
  auto params = model.initialize<float>(cpu, {});
  ha::AdamW optimizer{cpu, params};
  auto const step = [&](std::vector<std::int32_t> const& tokens, std::vector<std::int32_t> const& targets, ha::Index length) {
    return error_of([&] { train_step(cpu, model, params, optimizer, make_batch(cpu, ha::Sequences::equal(1, length), tokens, targets)); });
  };
  std::set<std::string> errors{step({1, 2, 300}, {2, 3, 4}, 3), step({1}, {256}, 1), step({1, 2, 3}, {2, 3, 4}, 4), step({}, {}, 0)};
  auto const nan = std::numeric_limits<float>::quiet_NaN();
  auto gradients = ha::allocate<float>(cpu, model.params());
  ha::AdamW unclipped{cpu, params, {.max_norm = 0}};
  for (float const value : {nan, std::numeric_limits<float>::max()}) {
    ha::zip([&](ha::Path const&, auto& g) { ha::On<ha::Fill, ha::Cpu>::forward(cpu, value, flat(out(g))); }, gradients);
    errors.insert(error_of([&] { unclipped.step(cpu, params, gradients); }));
  }
  ha::On<ha::Fill, ha::Cpu>::forward(cpu, nan, flat(out(params.embedding)));
  errors.insert(step({1}, {2}, 1));
  auto const moved = std::move(gradients.embedding);
  errors.insert(error_of([&] { in(gradients.embedding); }));
  return errors;
}

// The members of a struct in a header, with their default values.
std::vector<std::pair<std::string, std::string>> members(std::string const& header, std::string const& name) {
  std::string const text = content_of(root / "include/hybridattn" / header);
  auto const start = text.find("struct " + name + " {");
  std::string const body = text.substr(start, text.find("\n};", start) - start);
  std::regex const member(R"(\n  [\w:]+ (\w+) = ([^;]+);)");
  std::vector<std::pair<std::string, std::string>> found;
  for (std::sregex_iterator match(body.begin(), body.end(), member), end; match != end; ++match)
    found.emplace_back((*match)[1], (*match)[2]);
  return found;
}
std::vector<std::string> unlisted(std::string const& page, std::string const& header, std::string const& name) {
  std::string const text = content_of(root / "docs" / page);
  std::vector<std::string> missing;
  for (auto const& [member, start] : members(header, name))
    if (std::string const row = "\n| `" + member + "` | `" + start + "`"; text.find(row) == text.npos) missing.push_back(row.substr(1));
  return missing;
}

// How many numbers an attention layer saves of a token for backward.
template <class Policy> ha::Index remembered(typename Policy::Config const& c) {
  ha::Index count = 0;
  ha::zip([&](ha::Path const&, auto const& shape) { count += shape.count(); },
          ha::Attention<Policy>::saved(c, ha::Sequences::equal(1, 100)));
  return count / 100;
}

// How many numbers its cache holds for one sequence of up to `capacity` tokens.
template <class Policy> ha::Index cached(typename Policy::Config const& c, ha::Index capacity) {
  ha::Index count = 0;
  ha::zip([&](ha::Path const&, auto const& shape) { count += shape.count(); }, Policy::cache(c, 1, capacity));
  return count;
}

bool says(std::string const& page, std::string const& words) { return content_of(root / "docs" / page).find(words) != std::string::npos; }

std::vector<std::string> const none;

}  // namespace

TEST_CASE("errors.md quotes the sentences that are thrown, and no other") {
  std::set<std::string> thrown = errors_of_sizes();
  thrown.merge(errors_of_numbers());
  for (std::string sentence : errors_of_memory()) {   // each machine has its own limit
    auto const limit = std::to_string(ha::machine_memory());
    if (auto const at = sentence.find("the limit is " + limit); at != sentence.npos) sentence.replace(at + 13, limit.size(), "25200000000");
    thrown.insert(sentence);
  }
  thrown.merge(errors_of_files());
  thrown.merge(errors_of_folders());
  thrown.merge(errors_of_steps());
  CHECK(thrown == quoted(root / "docs/errors.md"));
}

TEST_CASE("errors.md has the first line of every mistake that does not compile") {
  std::string const page = content_of(root / "docs/errors.md");
  int mistakes = 0;
  for (std::string const& line : lines_of(content_of(root / "tests/mistakes.sh")))
    if (std::smatch match; std::regex_match(line, match, std::regex(R"(\d+\|(.*))"))) {
      ++mistakes;
      INFO(line);
      CHECK(page.find(match[1].str()) != page.npos);
    }
  CHECK(mistakes > 0);
}

TEST_CASE("the pages of the policies list every option and size, with its default") {
  CHECK(members("attention/full/types.hpp", "FullOptions").size() == 5);
  CHECK(unlisted("full.md", "attention/full/types.hpp", "FullOptions") == none);
  CHECK(unlisted("full.md", "attention/full/types.hpp", "Config") == none);
  CHECK(unlisted("gdn.md", "attention/gdn/types.hpp", "GdnOptions") == none);
  CHECK(unlisted("gdn.md", "attention/gdn/types.hpp", "Config") == none);
  CHECK(unlisted("dsa.md", "attention/dsa/types.hpp", "SparseOptions") == none);
  CHECK(unlisted("dsa.md", "attention/dsa/types.hpp", "Config") == none);
}

TEST_CASE("the pages of the policies say what a layer remembers for backward, and for decoding") {
  ha::Index const H = 4, HK = 2, D = 16, HV = 8, K = 24, V = 40, W = ha::GDN::options.conv_width, HI = 3, DI = 12;
  ha::full::Config const full{.num_heads = H, .num_kv_heads = HK, .head_dim = D};
  CHECK(remembered<ha::Full>(full) == (5 * H + 3 * HK) * D + H);
  CHECK(cached<ha::Full>(full, 100) == 100 * 2 * HK * D);
  CHECK(cached<ha::FullAttention<ha::FullOptions{.window = 7}>>(full, 100) == 7 * 2 * HK * D);
  CHECK((says("full.md", "(5 H + 3 HK) D + H numbers") && says("full.md", "2 HK D numbers a token")));
  ha::gdn::Config const gdn{.num_heads = H, .num_value_heads = HV, .key_dim = K, .value_dim = V};
  CHECK(remembered<ha::GDN>(gdn) == 4 * H * K + 6 * HV * V + 4 * HV);
  CHECK(cached<ha::GDN>(gdn, 100) == HV * K * V + (W - 1) * (2 * H * K + HV * V));
  CHECK((says("gdn.md", "4 H K + 6 HV V + 4 HV numbers") && says("gdn.md", "HV K V numbers and (W - 1) (2 H K + HV V)")));
  ha::dsa::Config const dsa{.num_heads = H, .num_kv_heads = HK, .head_dim = D, .index_heads = HI, .index_dim = DI};
  CHECK(remembered<ha::DSA>(dsa) == (5 * H + 3 * HK) * D + H + (HI + 1) * DI + HI + ha::DSA::options.top_k);
  CHECK(cached<ha::DSA>(dsa, 100) == 100 * (2 * HK * D + DI));
  CHECK((says("dsa.md", "(5 H + 3 HK) D + H + (HI + 1) DI + HI numbers, and k integers") && says("dsa.md", "2 HK D + DI numbers a token")));
}

TEST_CASE("add_a_policy.md quotes the example as it stands, and laws.md states every law") {
  std::string const example = content_of(root / "examples/write_a_policy.cpp"), page = content_of(root / "docs/laws.md");
  auto const lines = quoted(root / "docs/add_a_policy.md", "```c++");
  CHECK(lines.size() > 3);
  for (std::string const& line : lines) {
    INFO(line);
    CHECK(example.find(line) != example.npos);
  }
  auto const states = [&](auto const& laws) {
    for (auto const& law : laws) {
      INFO(law.name);
      CHECK(page.find("\n**" + std::string(law.name) + "**") != page.npos);
    }
  };
  states(ha::testing::common_laws), states(ha::testing::policy_laws), states(ha::testing::operation_laws);
}

TEST_CASE("programs on the pages include doors only, and every door is there, as header and as one file") {
  std::set<std::string> doors;
  std::string const conventions = content_of(root / "docs/conventions.md");
  std::regex const row(R"(\n\| `(hybridattn[a-z_/]*\.hpp)` \|)"), include("#include <(hybridattn/[^>]*)>");
  for (std::sregex_iterator match(conventions.begin(), conventions.end(), row), end; match != end; ++match) doors.insert((*match)[1]);
  CHECK(doors.size() > 5);
  for (std::string const& door : doors) {
    INFO(door);
    CHECK((fs::exists(root / "include" / door) && fs::exists(root / "single_include" / door)));
  }
  int includes = 0;
  for (fs::path const& page : pages())
    for (std::string const& line : quoted(page, "```cpp"))
      if (std::smatch match; std::regex_search(line, match, include)) {
        ++includes;
        INFO(page.filename().string() << ": " << line);
        CHECK(doors.contains(match[1].str()));
      }
  CHECK(includes > 5);
}

TEST_CASE("links of the pages lead to files that are there") {
  std::regex const link(R"(\]\(([^)#:]+)[#)])");
  std::vector<std::string> broken;
  for (fs::path const& page : pages()) {
    std::string const text = content_of(page);
    for (std::sregex_iterator match(text.begin(), text.end(), link), end; match != end; ++match)
      if (!fs::exists(page.parent_path() / (*match)[1].str())) broken.push_back(page.filename().string() + ": " + (*match)[1].str());
  }
  CHECK(pages().size() > 3);
  CHECK(broken == none);
}
