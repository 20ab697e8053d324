// Trains layer patterns of the hybrid-patterns study on one text, causally, and compares them: a table, a JSON file, plots.
#include "anarchism.hpp"
#include "plots.hpp"
#include "train.hpp"

#include <CLI/CLI.hpp>

#include <cstdio>
#include <cstdlib>
#include <iostream>

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
    std::string const title = names.size() == 1 ? names.front() : std::to_string(names.size()) + " files";
    return windows(ha::read_text(std::vector<std::filesystem::path>(names.begin(), names.end())), title);
  }
  if (auto const text = sweep::anarchism_text(HYBRIDATTN_TEXT_DIR)) return windows(*text, "anarchism");
  std::puts("Debian's package `anarchism` cannot be had here: training on the synthetic recall task instead (--data FILE takes any text)");
  return {std::make_unique<ha::RecallTask>(seed), false};
}

void check_settings(sweep::Settings const& s) {
  ha::check(s.steps >= 1, "--steps ", s.steps, " is not allowed; it must be at least 1");
  ha::check(s.seq_len >= 2, "--seq-len ", s.seq_len, " is not allowed; it must be at least 2, a token and its target");
  ha::check(s.batch >= 1, "--batch ", s.batch, " is not allowed; it must be at least 1");
  ha::check(s.checkpoint_every >= 0, "--checkpoint-every ", s.checkpoint_every, " is not allowed; it must be at least 0");
  ha::check(s.threads >= 0, "--threads ", s.threads, " is not allowed; it must be at least 1, or 0 for all cores");
}

// Leaves the table, the JSON file and the plots of what is finished.
void report(sweep::Settings const& s, std::vector<sweep::RunResult> const& results) {
  std::printf("\n%s\n%s\n", sweep::ranking_table(results).c_str(), sweep::category_averages(results).c_str());
  sweep::write_comparison(s.out, results);
  auto const trouble = sweep::draw_plots(s.out, results);
  if (!trouble.empty()) std::puts(trouble.c_str());
  std::printf("results are in %s\n", s.out.string().c_str());
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
  if (finished == chosen.size()) std::puts("all of them are finished already; --fresh trains them again");
  else if (finished > 0 || !begun.empty())
    std::printf("resuming: %zu of %zu patterns are finished%s; --fresh starts anew\n", finished, chosen.size(), begun.c_str());
  std::fflush(stdout);
  return results;
}

int run(sweep::Settings const& s, std::string const& patterns, std::vector<std::string> const& files) {
  check_settings(s);
  auto const chosen = sweep::chosen_patterns(patterns);
  sweep::prepare_folder(s.out);
  auto const [data, tokens_are_bytes] = open_data(files, ha::Seed{s.seed});
  ha::Batch first;
  data->next_batch(s.batch, s.seq_len, first);   // complains of a text that is too short before any work is done
  auto const validation = data->validation_batches(s.batch, s.seq_len);
  sweep::Memory const memory{s, sweep::compiled_names(), data->state()};
  if (s.fresh) memory.forget();
  else memory.check();
  ha::Cpu cpu{s.threads};
  std::printf("%s\n%zu patterns, %td steps of %td windows of %td tokens, %d threads, seed %llu\n", data->description().c_str(),
              chosen.size(), s.steps, s.batch, s.seq_len, cpu.threads(), static_cast<unsigned long long>(s.seed));
  auto earlier = remembered(memory, chosen);

  sweep::watch_for_interrupt();
  sweep::Progress progress{chosen.size(), s.steps};
  std::vector<sweep::RunResult> results;
  for (std::size_t i = 0; i < chosen.size(); ++i) {
    auto& result = earlier[i];
    if (result) {
      progress.skip(s.steps);
    } else if (!sweep::interrupted && (result = sweep::train(cpu, chosen[i], s, *data, validation, memory, progress))) {
      result->tokens_are_bytes = tokens_are_bytes;
      memory.finish(*result);
    }
    if (result) results.push_back(std::move(*result));
  }
  if (sweep::interrupted)
    std::printf("\ninterrupted: %zu of %zu patterns are finished and kept; the same command goes on from here\n", results.size(),
                chosen.size());
  if (!results.empty()) report(s, results);
  return sweep::interrupted ? 130 : 0;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{"Trains layer patterns of Gated DeltaNet (L or G), full (F or *) and sparse (D) attention on one text and ranks them."};
  sweep::Settings s;
  std::string patterns{sweep::studied};
  std::vector<std::string> files;
  app.add_option("--steps", s.steps, "training steps of each pattern")->capture_default_str();
  app.add_option("--patterns", patterns, "which of the compiled patterns, e.g. 'LFFL,LDDL'")->capture_default_str();
  app.add_option("--data", files, "text files, or the word synthetic; Debian's `anarchism` without it");
  app.add_option("--seq-len", s.seq_len, "tokens of a window")->capture_default_str();
  app.add_option("--batch", s.batch, "windows of a step")->capture_default_str();
  app.add_option("--seed", s.seed, "of parameters and data")->capture_default_str();
  app.add_option("--threads", s.threads, "0: all cores")->capture_default_str();
  app.add_option("--out", s.out, "folder of the results; a run that stopped there goes on")->capture_default_str();
  app.add_option("--checkpoint-every", s.checkpoint_every, "seconds between checkpoints; 0: after every step")->capture_default_str();
  app.add_flag("--fresh", s.fresh, "forget what an earlier run left in the folder");
  try {
    app.parse(argc, argv);
  } catch (CLI::CallForHelp const& help) {
    return app.exit(help);
  } catch (CLI::ParseError const& error) {
    std::fprintf(stderr, "sweep: %s\n", error.what());
    return 2;
  }
  hybridattn::ignore_file_size_signal();   // a full disk becomes an error with a name
  try {
    return run(s, patterns, files);
  } catch (std::exception const& error) {
    std::fprintf(stderr, "sweep: %s\n", error.what());
    return 2;
  }
}
