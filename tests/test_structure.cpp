// Rules about the repository's files, such as which header may include which, and README's example.
#include "catch.hpp"

#include <algorithm>
#include <cctype>
#include <filesystem>
#include <fstream>
#include <map>
#include <regex>
#include <set>
#include <sstream>
#include <string>
#include <vector>

namespace fs = std::filesystem;

namespace {

std::string const root = HYBRIDATTN_SOURCE_DIR;

std::string contents(fs::path const& path) {
  std::ostringstream text;
  text << std::ifstream(path).rdbuf();
  return text.str();
}

struct Line {
  std::string file;   // below include/hybridattn
  int number;
  std::string text;
};
std::vector<Line> header_lines() {
  std::vector<Line> lines;
  fs::path const include = fs::path(root) / "include/hybridattn";
  for (auto const& entry : fs::recursive_directory_iterator(include)) {
    if (!entry.is_regular_file()) continue;
    std::istringstream text(contents(entry.path()));
    int number = 0;
    for (std::string line; std::getline(text, line);) lines.push_back({fs::relative(entry.path(), include).string(), ++number, line});
  }
  return lines;
}
std::map<std::string, std::string> headers() {
  std::map<std::string, std::string> texts;
  for (Line const& line : header_lines()) texts[line.file] += line.text + "\n";
  return texts;
}
std::string at(Line const& line) { return line.file + ":" + std::to_string(line.number) + ": " + line.text; }

// The lines that match in files for which `allowed` is false.
template <class Allowed> std::vector<std::string> offenders(char const* pattern, Allowed allowed) {
  std::regex const wanted(pattern);
  std::vector<std::string> found;
  for (Line const& line : header_lines())
    if (!allowed(line.file) && std::regex_search(line.text, wanted)) found.push_back(at(line));
  return found;
}

std::vector<std::string> const layers = {"core", "backend", "tensor", "io",    "ops",  "attention",
                                         "nn",   "store",   "train",  "infer", "dist", "testing"};
std::ptrdiff_t level(std::string const& layer) { return std::find(layers.begin(), layers.end(), layer) - layers.begin(); }
std::vector<std::string> parts(std::string const& path) {
  std::vector<std::string> result;
  std::istringstream text(path);
  for (std::string part; std::getline(text, part, '/');) result.push_back(part);
  return result;
}

// All headers of the library and of the examples that a file includes, directly or through others.
std::set<std::string> included(fs::path const& file) {
  std::set<std::string> found;
  std::regex const include("#include (<(hybridattn/[^>]*)>|\"([^\"]*)\")");
  std::vector<fs::path> todo{file};
  while (!todo.empty()) {
    fs::path const next = todo.back();
    todo.pop_back();
    std::string const text = contents(next);
    for (std::sregex_iterator match(text.begin(), text.end(), include), end; match != end; ++match) {
      fs::path const path =
          (*match)[2].matched ? fs::path("include") / (*match)[2].str() : fs::relative(next.parent_path(), root) / (*match)[3].str();
      if (found.insert(path.lexically_normal().string()).second) todo.push_back(fs::path(root) / path);
    }
  }
  return found;
}

}  // namespace

TEST_CASE("includes point down, or stay in their own folder") {
  std::regex const include("#include <hybridattn/([^>]*)>");
  std::vector<std::string> wrong;
  for (Line const& line : header_lines()) {
    std::smatch match;
    auto const from = parts(line.file);
    if (from.size() < 2 || !std::regex_search(line.text, match, include)) continue;
    auto const to = parts(match[1]);
    bool const up = level(to[0]) > level(from[0]);
    bool const across =
        (from[0] == "ops" || from[0] == "attention") && to[0] == from[0] && from.size() > 2 && to.size() > 2 && to[1] != from[1];
    if (up || across) wrong.push_back(at(line));
  }
  CHECK(wrong == std::vector<std::string>{});
}

TEST_CASE("whoever reads models and decodes includes no optimizer") {
  for (char const* file : {"include/hybridattn/store.hpp", "include/hybridattn/infer/generate.hpp", "examples/generate.cpp"}) {
    INFO(file);
    auto const all = included(fs::path(root) / file);
    CHECK(all.size() > 20);
    std::vector<std::string> of_training;
    for (auto const& header : all)
      if (header.starts_with("include/hybridattn/train/") || header.find("/adamw") != header.npos) of_training.push_back(header);
    CHECK(of_training == std::vector<std::string>{});
  }
}

// An error in a task of parallel_for is thrown after the loop, when the results of other tasks are lost. So checks stand before the loop.
TEST_CASE("nothing in a parallel loop of the library can throw: no check, no memory, no look at a tensor") {
  std::regex const call("\\b(parallel_(for|blocks)|for_each_queries|sum_over_rows(<\\w+>)?)\\("),
      throws("\\b(check|fail|out|in|resize|reserve|push_back|Tensor<|Scratch<|allocate|zeros|new)\\b");
  int loops = 0;
  std::vector<std::string> wrong;
  for (auto const& entry : fs::recursive_directory_iterator(fs::path(root) / "include/hybridattn")) {
    if (!entry.is_regular_file()) continue;
    std::string const text = std::regex_replace(contents(entry.path()), std::regex("//[^\n]*"), "");
    for (std::sregex_iterator match(text.begin(), text.end(), call), end; match != end; ++match) {
      auto last = match->position() + match->length();
      for (int depth = 1; depth > 0; ++last)
        depth += (text[static_cast<std::size_t>(last)] == '(') - (text[static_cast<std::size_t>(last)] == ')');
      std::string const loop = text.substr(static_cast<std::size_t>(match->position()), static_cast<std::size_t>(last - match->position()));
      ++loops;
      if (std::smatch found; std::regex_search(loop, found, throws))
        wrong.push_back(entry.path().filename().string() + ": " + found.str() + " in " + loop);
    }
  }
  CHECK(loops > 50);
  CHECK(wrong == std::vector<std::string>{});
}

TEST_CASE("libraries stay in their rooms") {
  auto const none = std::vector<std::string>{};
  CHECK(offenders("#include <boost/hana", [](std::string const& file) { return file == "nn/layers.hpp"; }) == none);
  CHECK(offenders("#include <Eigen/", [](std::string const& file) { return file == "backend/cpu/eigen.hpp" || file == "eigen.hpp"; }) ==
        none);
  CHECK(offenders("#include <nlohmann/", [](std::string const& file) { return file.starts_with("io/") || file.starts_with("store/"); }) ==
        none);
  CHECK(offenders("#include <catch2/", [](std::string const&) { return false; }) == none);
  CHECK(offenders("__global__|<<<|cuda_runtime", [](std::string const& file) { return file.starts_with("backend/cuda/"); }) == none);
  CHECK(offenders("cublas_v2", [](std::string const& file) { return file.starts_with("backend/cuda/"); }) == none);
  CHECK(offenders("#include <boost/context", [](std::string const& file) { return file.starts_with("backend/emulator/"); }) == none);
  CHECK(offenders("__CUDACC__|__CUDA_ARCH__", [](std::string const& file) { return file == "core/config.hpp"; }) == none);
  CHECK(offenders("pthread_|_OPENMP|<omp.h>", [](std::string const& file) { return file == "backend/cpu/threads.hpp"; }) == none);
}

TEST_CASE("headers open no namespace for others, and define no macro without the library's name") {
  auto const none = std::vector<std::string>{};
  CHECK(offenders("^using namespace", [](std::string const&) { return false; }) == none);
  CHECK(offenders("^\\s*#\\s*define\\s+(?!HYBRIDATTN_)", [](std::string const&) { return false; }) == none);
  CHECK(offenders("#pragma once", [](std::string const&) { return false; }) == none);
}

TEST_CASE("every header opens the namespace that carries the compiler's flags") {
  auto const none = std::vector<std::string>{};
  CHECK(offenders("^namespace hybridattn(?!::inline HYBRIDATTN_ABI\\b)",
                  [](std::string const& file) { return file == "core/check.hpp" || file == "core/config.hpp"; }) == none);
  std::vector<std::string> without;
  std::size_t with = 0;
  for (auto const& [file, text] : headers()) {
    bool const is_door = !std::regex_search(text, std::regex("(^|\n)(template|struct|class|inline|constexpr|namespace) "));
    bool const opens = text.find("\nnamespace hybridattn::inline HYBRIDATTN_ABI") != text.npos;
    if (file != "core/config.hpp" && !is_door && !opens) without.push_back(file);
    with += opens;
  }
  CHECK(without == none);
  CHECK(with > 80);
}

TEST_CASE("what headers ask the compiler stands in the name of that namespace") {
  std::string const config = headers().at("core/config.hpp");
  std::string const in_the_name = config.substr(config.find("// The library's code depends on some compiler flags"));
  std::regex const condition("^\\s*#\\s*(if|ifdef|ifndef|elif)\\b(.*)"), macro("\\b(?!defined\\b)[A-Z_][A-Z_0-9a-z]*");
  std::set<std::string> const of_every_part = {"__GNUC__", "__SSE2__", "__aarch64__",
                                               "__linux__"};   // equal in all files of a program, or implied by a part of the name
  std::set<std::string> asked;
  for (Line const& line : header_lines()) {
    std::smatch match;
    if (line.file == "core/config.hpp" || !std::regex_search(line.text, match, condition)) continue;
    std::string const rest = match[2].str().substr(0, match[2].str().find("//"));
    for (std::sregex_iterator name(rest.begin(), rest.end(), macro), end; name != end; ++name)
      if (!name->str().ends_with("_HPP") && !name->str().ends_with("_CUH") && !of_every_part.contains(name->str())) asked.insert(name->str());
  }
  CHECK(asked.size() > 3);
  for (std::string const& name : asked) {
    INFO(name);
    CHECK(in_the_name.find(name) != in_the_name.npos);
  }
}

TEST_CASE("README's first C++ block is the quickstart, in under 60 lines") {
  std::string const readme = contents(fs::path(root) / "README.md"), example = contents(fs::path(root) / "examples/quickstart.cpp");
  auto const start = readme.find("```cpp\n") + 7, end = readme.find("```", start);
  CHECK(readme.substr(start, end - start) == example);
  CHECK(std::count(example.begin(), example.end(), '\n') < 60);
}

TEST_CASE("the quickstart for a GPU differs from the other one in the backend's name") {
  std::string const on_gpu = contents(fs::path(root) / "examples/quickstart.cu");
  CHECK(std::regex_replace(on_gpu, std::regex("ha::Cuda"), "ha::Cpu") == contents(fs::path(root) / "examples/quickstart.cpp"));
  CHECK(on_gpu.find("ha::Cuda machine;") != on_gpu.npos);
}

TEST_CASE("the page about the emulator shows the example with a broken kernel") {
  std::string const example = contents(fs::path(root) / "examples/broken_kernel.cpp");
  CHECK(contents(fs::path(root) / "docs/emulator.md").find("```cpp\n" + example + "```") != std::string::npos);
}

TEST_CASE("README points to the example that compares one's own patterns, which is short") {
  std::string const example = contents(fs::path(root) / "examples/compare_patterns.cpp");
  CHECK(contents(fs::path(root) / "README.md").find("examples/compare_patterns.cpp") != std::string::npos);
  auto const lines = std::count(example.begin(), example.end(), '\n');
  CHECK((lines > 20 && lines <= 60));
}

TEST_CASE("an operation is forward, backward and extend, and nothing else") {
  CHECK(offenders(R"(\bOn<[\w:<>, ]+>::(?!forward\b|backward\b|extend\b)\w)", [](std::string const&) { return false; }) ==
        std::vector<std::string>{});
}

TEST_CASE("an operation has one text for all GPU backends") {
  CHECK(offenders("struct On<.*\\b(Cuda|Emulator)>", [](std::string const&) { return false; }) == std::vector<std::string>{});
  CHECK(!offenders("GpuBackend B> struct On<", [](std::string const&) { return false; }).empty());
}

TEST_CASE("a preset's build type says what it builds: Release is what CMake means by it, every other type has flags of its own") {
  std::string const presets = contents(fs::path(root) / "CMakePresets.json");
  CHECK(presets.find("FLAGS_RELEASE") == presets.npos);
  std::regex const build_type("\"CMAKE_BUILD_TYPE\": \"(\\w+)\"");
  std::set<std::string> types;
  for (std::sregex_iterator match(presets.begin(), presets.end(), build_type), end; match != end; ++match) types.insert((*match)[1]);
  CHECK(types.size() > 3);
  for (std::string type : types) {
    if (type == "Release") continue;
    std::transform(type.begin(), type.end(), type.begin(), [](unsigned char letter) { return static_cast<char>(std::toupper(letter)); });
    INFO(type);
    CHECK(presets.find("\"CMAKE_CXX_FLAGS_" + type + "\": ") != presets.npos);
  }
}

TEST_CASE("every operation is judged by the laws, or the page says why it is not") {
  std::string const page = contents(fs::path(root) / "docs/add_an_operation.md"), groups = headers().at("testing/operations.hpp"),
                    judged = groups.substr(groups.find("using AllOperations"));
  std::string const without_laws = page.substr(page.find("## Operations without laws"));
  std::regex const on_cpu("template <> struct On<(\\w+), Cpu>");
  std::set<std::string> folders;
  for (Line const& line : header_lines()) {
    std::smatch match;
    if (!line.file.starts_with("ops/") || !std::regex_search(line.text, match, on_cpu)) continue;
    folders.insert(parts(line.file)[1]);
    std::string const name = match[1];
    bool const has_laws =
        groups.find("struct Operation<" + name + "> ") != groups.npos && std::regex_search(judged, std::regex("\\b" + name + "[,>]"));
    bool const has_a_reason = std::regex_search(without_laws, std::regex("\\| `" + name + "` \\| \\w.* \\|"));
    INFO(name);
    CHECK(has_laws != has_a_reason);
  }
  for (auto const& folder : fs::directory_iterator(fs::path(root) / "include/hybridattn/ops"))
    CHECK(folders.contains(folder.path().filename().string()));
}
