// Trains layer patterns of the hybrid-patterns study on one text, causally, and compares them: a table, a JSON file, plots.
#include "anarchism.hpp"
#include "options.hpp"
#include "plots.hpp"
#include "train.hpp"

namespace {

namespace ha = hybridattn;

struct Data {
  std::unique_ptr<ha::DataSource> source;
  bool tokens_are_bytes = true;
};

// Debian's text by default, any text, or the synthetic task.
Data open_data(std::vector<std::string> const& names, ha::Seed seed) {
  auto const windows = [&](std::string_view text, std::string title) {
    return Data{std::make_unique<ha::Windows>(ha::ByteText(text), seed, std::move(title))};
  };
  if (names == std::vector<std::string>{"synthetic"}) return {std::make_unique<ha::RecallTask>(seed), false};
  if (!names.empty()) {
    std::string const title = names.size() == 1 ? program::text_name(names.front()) : std::to_string(names.size()) + " files";
    return windows(ha::read_text(std::vector<std::filesystem::path>(names.begin(), names.end())), title);
  }
  if (auto const text = sweep::anarchism_text(HYBRIDATTN_TEXT_DIR)) return windows(*text, "anarchism");
  program::say_text(
      "Debian's package `anarchism` cannot be had here: training on the synthetic recall task instead (--data FILE takes any text)\n");
  return {std::make_unique<ha::RecallTask>(seed), false};
}

// Throws unless every file of the results can be written, the largest checkpoint too.
void check_outputs(sweep::Settings const& s, sweep::Memory const& memory, std::vector<sweep::CompiledPattern> const& chosen,
                   ha::Index vocab_size) {
  for (auto const* file :
       {"comprehensive_comparison.json", "loss_comparison.tsv", "loss_comparison.gp", "loss_comparison.png", "loss_comparison.svg",
        "loss_comparison_average.tsv", "loss_comparison_average.gp", "loss_comparison_average.png", "loss_comparison_average.svg"})
    program::check_writable(s.out / file);
  for (auto const& pattern : chosen) {
    auto const name = sweep::pattern_name(pattern.letters);
    double const numbers = 8.0 * static_cast<double>(s.steps);
    program::check_writable(s.out / (name + ".jsonl"), numbers);
    program::check_writable(memory.result(name), numbers);
    program::check_writable(memory.checkpoint(name), 14.0 * static_cast<double>(pattern.parameter_count(vocab_size)) + 3 * numbers);
  }
}

// Leaves the table, the JSON file and the plots of what is finished.
void report(sweep::Settings const& s, std::vector<sweep::RunResult> const& results) {
  sweep::write_comparison(s.out, results);
  program::say_text("\n" + sweep::ranking_table(results) + "\n" + sweep::category_averages(results) + "\n");
  auto const trouble = sweep::draw_plots(s.out, results);
  program::say_text((trouble.empty() ? "" : trouble + "\n") + "results are in " + program::one_line(s.out.string()) + "\n");
}

// Of each chosen pattern what an earlier run has finished; says so.
std::vector<std::optional<sweep::RunResult>> remembered(sweep::Memory const& memory, std::vector<sweep::CompiledPattern> const& chosen) {
  std::vector<std::optional<sweep::RunResult>> results;
  std::size_t finished = 0;
  std::string begun;
  for (auto const& pattern : chosen) {
    auto const name = sweep::pattern_name(pattern.letters);
    results.push_back(memory.finished(name));
    finished += results.back().has_value();
    ha::Index const steps = results.back() ? 0 : memory.steps_of(name);
    if (steps > 0) begun += ", " + name + " goes on after step " + std::to_string(steps);
  }
  if (finished == chosen.size()) program::say_text("all of them are finished already; --fresh trains them again\n");
  else if (finished > 0 || !begun.empty())
    program::say("resuming: %zu of %zu patterns are finished%s; --fresh starts anew\n", finished, chosen.size(), begun.c_str());
  if (finished < chosen.size()) program::flush_stdout();   // before work that would be lost where nobody can be told
  return results;
}

int run(sweep::Settings const& s) {
  auto const chosen = sweep::chosen_patterns(s.patterns, s.dtype);
  auto machine = program::make_machine(s.threads);   // complains at once where there is none
  sweep::prepare_folder(s.out);
  program::check_writable(s.out / "comprehensive_comparison.json");
  auto const [data, tokens_are_bytes] = open_data(s.data, ha::Seed{s.seed});
  // A token has at least an activation of each layer.
  program::check_memory(4.0 * 4 * 128 * static_cast<double>(s.batch) * static_cast<double>(s.seq_len),
                        "a step of " + std::to_string(s.batch) + " windows of " + std::to_string(s.seq_len) + " tokens",
                        program::memory_limit(machine));
  ha::Batch first;
  data->next_batch(s.batch, s.seq_len, first);   // complains of a text that is too short before any work is done
  auto const validation = data->validation_batches(s.batch, s.seq_len, s.validation);

  program::watch_for_interrupt();
  program::InUse const lock{s.out};
  sweep::Memory const memory{s, sweep::compiled_names(s), data->state()};
  if (!s.fresh) memory.check();
  check_outputs(s, memory, chosen, data->vocab_size());
  if (s.fresh) memory.forget();
  program::say("%s\n%zu patterns, %td steps of %td windows of %td tokens, %s, seed %llu\n", data->description().c_str(), chosen.size(),
               s.steps, s.batch, s.seq_len, program::place_of(machine).c_str(), static_cast<unsigned long long>(s.seed));
  if (!sweep::is_installed("gnuplot")) program::say_text("gnuplot is not installed (Debian: gnuplot-nox): there will be no pictures\n");
  auto earlier = remembered(memory, chosen);

  sweep::Progress progress{chosen.size(), s.steps};
  std::vector<sweep::RunResult> results;
  for (std::size_t i = 0; i < chosen.size(); ++i) {
    auto& result = earlier[i];
    if (result) {
      progress.skip(s.steps);
    } else if (!program::interrupted() && (result = sweep::train(machine, chosen[i], s, *data, validation, memory, progress))) {
      result->tokens_are_bytes = tokens_are_bytes;
      memory.finish(*result);
    }
    if (result) results.push_back(std::move(*result));
  }
  bool const stopped = results.size() < chosen.size();
  if (stopped)
    program::say("\ninterrupted: %zu of %zu patterns are finished and kept; the same command goes on from here\n", results.size(),
                 chosen.size());
  if (!results.empty()) report(s, results);
  return stopped ? program::interrupted_code() : 0;
}

}  // namespace

int main(int argc, char** argv) {
  return program::run("sweep", argc, argv, [&] { return run(sweep::parse(argc, argv)); });
}
