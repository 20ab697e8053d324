// What a run leaves behind: a table, a JSON file in the published study's schema, and a log of every step. The pictures
// are made by plots.hpp.
#ifndef HYBRIDATTN_EXAMPLES_SWEEP_REPORT_HPP
#define HYBRIDATTN_EXAMPLES_SWEEP_REPORT_HPP

#include <hybridattn/core/check.hpp>
#include <hybridattn/core/view.hpp>
#include <hybridattn/io/atomic_file.hpp>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <limits>
#include <numbers>
#include <numeric>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

namespace sweep {

using hybridattn::Index;

// The study's eight patterns and the three pure ones, under the names of its results.
struct NamedPattern {
  std::string_view letters, name;
};
inline constexpr std::array named_patterns = {
    NamedPattern{"LFFL", "1_sandwich"},         NamedPattern{"FLFL", "2_alternating"},    NamedPattern{"LLFF", "3_linear_first"},
    NamedPattern{"FFLL", "4_full_first"},       NamedPattern{"LDDL", "5_dsa_sandwich"},   NamedPattern{"DLDL", "6_dsa_alternating"},
    NamedPattern{"LLDD", "7_dsa_linear_first"}, NamedPattern{"DDLL", "8_dsa_full_first"}, NamedPattern{"LLLL", "linear_only"},
    NamedPattern{"FFFF", "full_only"},          NamedPattern{"DDDD", "dsa_only"}};
inline constexpr int studied_patterns = 8;

inline std::string pattern_name(std::string_view letters) {
  auto const found = std::ranges::find(named_patterns, letters, &NamedPattern::letters);
  return std::string(found == named_patterns.end() ? letters : found->name);
}

struct RunResult {
  std::string name;      // "1_sandwich"
  std::string letters;   // "LFFL"
  std::string backend;   // "cpu"
  std::string dtype;     // "float"
  Index num_parameters = 0;
  double training_time = 0;   // seconds, validation included
  double tokens_per_second = 0, milliseconds_per_step = 0;
  double val_loss = std::numeric_limits<double>::quiet_NaN();   // mean over all predictions, in nats
  double val_accuracy = 0;                                      // 0 .. 1
  Index seq_len = 0;
  bool tokens_are_bytes = true;
  std::vector<double> losses;   // [steps]

  bool uses_dsa() const { return letters.find('D') != letters.npos; }
  bool is_studied() const {
    auto const found = std::ranges::find(named_patterns, std::string_view(letters), &NamedPattern::letters);
    return found - named_patterns.begin() < studied_patterns;
  }
  double val_perplexity() const { return std::exp(val_loss); }
  std::optional<double> bits_per_byte() const { return tokens_are_bytes ? std::optional(val_loss / std::numbers::ln2) : std::nullopt; }
  // As the study computed it: the sum over T - 1 predictions a window, counted as if over T.
  double val_loss_published() const { return val_loss * static_cast<double>(seq_len) / static_cast<double>(seq_len - 1); }
  // Mean of all losses so far, after each step: what the study calls its training loss.
  std::vector<double> running_mean() const {
    std::vector<double> means(losses.size());
    double sum = 0;
    for (std::size_t i = 0; i < losses.size(); ++i) means[i] = (sum += losses[i]) / static_cast<double>(i + 1);
    return means;
  }
};

// "L -> F -> F -> L"
inline std::string arrows(std::string_view letters) {
  std::string text;
  for (char letter : letters) text += (text.empty() ? "" : " -> ") + std::string(1, letter);
  return text;
}

inline std::string layer_type(char letter) {
  switch (letter) {
    case 'L':
    case 'G':
      return "linear_attention";
    case 'F':
    case '*':
      return "full_attention";
    case 'D':
      return "dsa_attention";
    default:
      hybridattn::fail("no layer type for the letter '", letter, "'; there are L or G, F or *, and D");
  }
}

template <class... Values> std::string formatted(char const* format, Values... values) {
  std::array<char, 256> line{};
  int const length = std::snprintf(line.data(), line.size(), format, values...);
  return {line.data(), static_cast<std::size_t>(std::clamp(length, 0, static_cast<int>(line.size()) - 1))};
}

// 1234567 -> "1,234,567"
inline std::string with_commas(Index number) {
  std::string digits = std::to_string(number);
  for (auto at = std::ssize(digits) - 3; at > 0; at -= 3) digits.insert(static_cast<std::size_t>(at), 1, ',');
  return digits;
}

// From the lowest validation loss to the highest; runs without one come last.
inline std::vector<RunResult const*> ranked(std::vector<RunResult> const& results) {
  std::vector<RunResult const*> order;
  for (auto const& result : results) order.push_back(&result);
  std::ranges::sort(order, {}, [](RunResult const* r) {
    bool const failed = std::isnan(r->val_loss);
    return std::tuple{failed, failed ? 0 : r->val_loss, r};
  });
  return order;
}

inline std::string ranking_table(std::vector<RunResult> const& results) {
  std::string table = formatted("%4s  %-19s %-8s %9s %10s %9s %11s %11s %9s %8s\n", "rank", "pattern", "layers", "val loss", "bits/byte",
                                "accuracy", "perplexity", "parameters", "tokens/s", "time");
  int rank = 0;
  for (RunResult const* r : ranked(results)) {
    std::string const bits = r->bits_per_byte() ? formatted("%.4f", *r->bits_per_byte()) : "-";
    std::string const parameters = with_commas(r->num_parameters), speed = with_commas(std::llround(r->tokens_per_second));
    table +=
        formatted("%4d  %-19s %-8s %9.4f %10s %7.2f %% %11.3f %11s %9s %6.1f s\n", ++rank, r->name.c_str(), r->letters.c_str(), r->val_loss,
                  bits.c_str(), 100 * r->val_accuracy, r->val_perplexity(), parameters.c_str(), speed.c_str(), r->training_time);
  }
  return table;
}

// Arithmetic means over the studied patterns with or without DSA, of the perplexities too, as the study took them.
struct Category {
  int count = 0;
  double val_loss = 0, val_accuracy = 0, val_perplexity = 0, training_time = 0;
};
inline Category category(std::vector<RunResult> const& results, bool uses_dsa) {
  Category mean;
  for (auto const& r : results) {
    if (!r.is_studied() || r.uses_dsa() != uses_dsa) continue;
    ++mean.count;
    mean.val_loss += r.val_loss;
    mean.val_accuracy += r.val_accuracy;
    mean.val_perplexity += r.val_perplexity();
    mean.training_time += r.training_time;
  }
  for (double* sum : {&mean.val_loss, &mean.val_accuracy, &mean.val_perplexity, &mean.training_time}) *sum /= std::max(mean.count, 1);
  return mean;
}

inline std::string category_averages(std::vector<RunResult> const& results) {
  auto const original = category(results, false), dsa = category(results, true);
  std::string text = formatted("Category averages, over %d of the study's 8 patterns\n", original.count + dsa.count);
  auto const line = [&](char const* name, Category const& mean) {
    text += mean.count == 0 ? formatted("  %-10s  none of 4\n", name)
                            : formatted("  %-10s  %d of 4   val loss %7.4f   accuracy %6.2f %%    perplexity %9.3f   time %6.1f s\n", name,
                                        mean.count, mean.val_loss, 100 * mean.val_accuracy, mean.val_perplexity, mean.training_time);
  };
  line("Original", original);
  line("DSA", dsa);
  if (original.count > 0 && dsa.count > 0)
    text += formatted("  %-10s           val loss %+7.4f   accuracy %+6.2f pp   perplexity %+9.3f   time %+6.1f s\n", "difference",
                      dsa.val_loss - original.val_loss, 100 * (dsa.val_accuracy - original.val_accuracy),
                      dsa.val_perplexity - original.val_perplexity, dsa.training_time - original.training_time);
  return text;
}

// The study's fields first and in its order, ours behind them. What is not a number becomes null.
inline nlohmann::ordered_json to_json(RunResult const& r) {
  using Json = nlohmann::ordered_json;
  auto const history = [](std::vector<double> const& losses) {
    Json list = Json::array();
    for (std::size_t i = 0; i < losses.size(); ++i) list.push_back({{"step", i + 1}, {"loss", losses[i]}});
    return list;
  };
  Json layer_types = Json::array();
  for (char letter : r.letters) layer_types.push_back(layer_type(letter));
  auto const means = r.running_mean();
  return {{"pattern", arrows(r.letters)},
          {"layer_types", layer_types},
          {"uses_dsa", r.uses_dsa()},
          {"num_parameters", r.num_parameters},
          {"training_time", r.training_time},
          {"train_loss", means.empty() ? Json() : Json(means.back())},
          {"val_loss", r.val_loss},
          {"val_accuracy", r.val_accuracy},
          {"val_perplexity", r.val_perplexity()},
          {"loss_history", history(means)},
          {"instantaneous_loss_history", history(r.losses)},
          {"letters", r.letters},
          {"backend", r.backend},
          {"dtype", r.dtype},
          {"val_loss_published", r.val_loss_published()},
          {"val_perplexity_published", std::exp(r.val_loss_published())},
          {"bits_per_byte", r.bits_per_byte() ? Json(*r.bits_per_byte()) : Json()},
          {"tokens_per_second", r.tokens_per_second},
          {"milliseconds_per_step", r.milliseconds_per_step}};
}

inline void write_comparison(std::filesystem::path const& folder, std::vector<RunResult> const& results) {
  nlohmann::ordered_json comparison = nlohmann::ordered_json::object();
  for (auto const& result : results) comparison[result.name] = to_json(result);
  hybridattn::write_file_atomically(folder / "comprehensive_comparison.json", comparison.dump(2) + "\n");
}

// Makes the folder, if it is not there.
inline void prepare_folder(std::filesystem::path const& folder) {
  std::error_code error, ignored;
  std::filesystem::create_directories(folder, error);
  hybridattn::check(std::filesystem::is_directory(folder, ignored), "cannot write into the folder ", folder, ": ",
                    error ? error.message() : "it is a file");
}

// One line of JSON a step. The file is opened before any work is done, and has its name once `finish` is called; a run
// that ends before leaves none.
class RunLog {
 public:
  RunLog(std::filesystem::path const& folder, std::string const& name) : file_(folder / (name + ".jsonl")) {}

  void add(Index step, double loss, double running_mean, double tokens_per_second, double elapsed) {
    auto const number = [](double value) { return std::isfinite(value) ? formatted("%.9g", value) : std::string("null"); };
    file_.write(formatted("{\"step\":%td,\"loss\":%s,\"running_mean\":%s,\"tokens_per_second\":%s,\"elapsed\":%s}\n", step,
                          number(loss).c_str(), number(running_mean).c_str(), number(tokens_per_second).c_str(), number(elapsed).c_str()));
  }
  void finish() { file_.commit(); }

 private:
  hybridattn::AtomicFile file_;
};

}  // namespace sweep
#endif
