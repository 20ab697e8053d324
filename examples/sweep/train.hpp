// Training one pattern, with a line that says how it goes.
#ifndef HYBRIDATTN_EXAMPLES_SWEEP_TRAIN_HPP
#define HYBRIDATTN_EXAMPLES_SWEEP_TRAIN_HPP

#include "memory.hpp"
#include "patterns.hpp"
#include "report.hpp"

#include <hybridattn/train/data.hpp>

#include <unistd.h>

#include <chrono>
#include <optional>

namespace sweep {

class Clock {
 public:
  double seconds() const { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count(); }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

// One line on stderr: rewritten in place on a terminal, now and then a new one elsewhere.
class Progress {
 public:
  Progress(std::size_t patterns, ha::Index steps) : total_(static_cast<double>(patterns) * static_cast<double>(steps)), steps_(steps) {}

  // Steps of an earlier run.
  void skip(ha::Index steps) { total_ -= static_cast<double>(steps); }

  void show(std::string const& name, ha::Index step, double loss, double tokens_per_second) {
    ++done_;
    double const every = terminal_ ? 0.2 : 10;
    if (step != steps_ && clock_.seconds() - shown_ < every) return;
    shown_ = clock_.seconds();
    double const left = shown_ / done_ * (total_ - done_);
    program::note(program::formatted("%s%-19s step %5td/%td  loss %.4f  %7.0f tokens/s  %4.0f s left%s", terminal_ ? "\r" : "",
                                     name.c_str(), step, steps_, loss, tokens_per_second, left, terminal_ && step != steps_ ? "" : "\n"));
  }

 private:
  double total_, done_ = 0, shown_ = 0;
  ha::Index steps_;
  bool terminal_ = isatty(STDERR_FILENO) != 0;
  Clock clock_;
};

// Every pattern this program can train, by the name of its files.
inline std::vector<std::string> compiled_names(Settings const& s) {
  std::vector<std::string> names;
  for (auto const& pattern : compiled_patterns(s.dtype)) names.push_back(pattern_name(pattern.letters));
  return names;
}

inline ha::LossSum validate(Run& run, std::vector<ha::Batch> const& batches) {
  ha::LossSum total;
  for (auto const& batch : batches) total += run.loss(batch);
  return total;
}

// The training of one pattern, from its start or from where an earlier process stopped.
class Training {
 public:
  Training(Machine& machine, CompiledPattern const& pattern, Settings const& s, ha::DataSource& data, Memory const& memory)
      : s_(s), data_(data), memory_(memory), name_(pattern_name(pattern.letters)), log_(s.out, name_),
        run_(pattern.start(machine, data.vocab_size(), ha::Seed{s.seed})) {
    data.restart();
    std::error_code ignored;
    if (std::filesystem::exists(memory.checkpoint(name_), ignored)) resume();
    kept_.note = memory.note();
    saved_step_ = kept_.step;
    saved_at_ = clock_.seconds();
  }

  Run& run() { return *run_; }
  ha::Index steps() const { return kept_.step; }
  double loss() const { return losses().back(); }
  std::vector<double> const& losses() const { return kept_.history.at("loss"); }
  double tokens_per_second() const { return tokens_per_second(kept_.step); }
  double milliseconds_per_step() const { return 1000 * kept_.history.at("training").back() / static_cast<double>(kept_.step); }
  // Of all processes that worked on it.
  double seconds() const { return earlier_ + clock_.seconds(); }

  void step() {
    data_.next_batch(s_.batch, s_.seq_len, host_);
    Clock const clock;
    double const loss = run_->step(host_).loss.mean();
    auto& training = kept_.history["training"];
    training.push_back((training.empty() ? 0 : training.back()) + clock.seconds());
    kept_.history["loss"].push_back(loss);
    kept_.history["elapsed"].push_back(seconds());
    log(++kept_.step);
    if (kept_.step < s_.steps && clock_.seconds() - saved_at_ >= s_.checkpoint_every) save();
  }
  void save() {
    if (saved_step_ == kept_.step) return;
    kept_.data = data_.state();
    run_->save(memory_.checkpoint(name_), kept_);
    saved_step_ = kept_.step;
    saved_at_ = clock_.seconds();
  }
  void finish_log() { log_.finish(); }

 private:
  void resume() {
    kept_ = memory_.resumed(name_, [&](auto const& path) { return run_->load(path); });
    with_way_out([&] { data_.restore(kept_.data); });
    if (kept_.step > 0) earlier_ = kept_.history["elapsed"].back();
    for (ha::Index step = 1; step <= kept_.step; ++step) log(step);
  }
  double tokens_per_second(ha::Index step) const {
    return static_cast<double>(step * s_.batch * s_.seq_len) / kept_.history.at("training")[static_cast<std::size_t>(step - 1)];
  }
  void log(ha::Index step) {
    auto const i = static_cast<std::size_t>(step - 1);
    sum_ += losses()[i];
    log_.add(step, losses()[i], sum_ / static_cast<double>(step), tokens_per_second(step), kept_.history.at("elapsed")[i]);
  }

  Settings const& s_;
  ha::DataSource& data_;
  Memory const& memory_;
  std::string name_;
  RunLog log_;
  Clock clock_;
  std::unique_ptr<Run> run_;
  ha::Progress kept_;   // history: the loss, and seconds in steps and in all, of each step
  double earlier_ = 0, sum_ = 0, saved_at_ = 0;
  ha::Index saved_step_ = 0;
  ha::Batch host_;
};

// Nothing when it was interrupted: then a checkpoint stands in the folder.
inline std::optional<RunResult> train(Machine& machine, CompiledPattern const& pattern, Settings const& s, ha::DataSource& data,
                                      std::vector<ha::Batch> const& validation, Memory const& memory, Progress& progress) {
  RunResult result;
  result.name = pattern_name(pattern.letters);
  result.letters = pattern.letters;
  result.backend = s.backend;
  result.dtype = s.dtype;
  result.seq_len = s.seq_len;
  Training training{machine, pattern, s, data, memory};
  result.num_parameters = training.run().parameter_count();
  progress.skip(training.steps());
  while (training.steps() < s.steps) {
    if (program::interrupted()) {
      training.save();
      return std::nullopt;
    }
    training.step();
    progress.show(result.name, training.steps(), training.loss(), training.tokens_per_second());
  }
  auto const total = validate(training.run(), validation);
  result.losses = training.losses();
  result.val_loss = total.mean();
  result.val_accuracy = total.count == 0 ? 0 : static_cast<double>(total.correct) / static_cast<double>(total.count);
  result.tokens_per_second = training.tokens_per_second();
  result.milliseconds_per_step = training.milliseconds_per_step();
  result.training_time = training.seconds();
  training.finish_log();
  return result;
}

}  // namespace sweep
#endif
