// Training one pattern, with a line that says how it goes.
#ifndef HYBRIDATTN_EXAMPLES_SWEEP_TRAIN_HPP
#define HYBRIDATTN_EXAMPLES_SWEEP_TRAIN_HPP

#include "patterns.hpp"
#include "report.hpp"

#include <hybridattn/train/data.hpp>

#include <unistd.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <optional>

namespace sweep {

struct Settings {
  ha::Index steps = 1000, seq_len = 128, batch = 2;
  std::uint64_t seed = 1;
  int threads = 0;
  std::filesystem::path out = "results";
};

// Set by Ctrl-C or a polite kill, read between steps.
inline std::atomic<bool> interrupted = false;
inline void watch_for_interrupt() {
  for (int signal : {SIGINT, SIGTERM}) std::signal(signal, [](int) { interrupted = true; });
}

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

  void show(std::string const& name, ha::Index step, double loss, double tokens_per_second) {
    ++done_;
    double const every = terminal_ ? 0.2 : 10;
    if (step != steps_ && clock_.seconds() - shown_ < every) return;
    shown_ = clock_.seconds();
    double const left = shown_ / done_ * (total_ - done_);
    std::fprintf(stderr, "%s%-19s step %5td/%td  loss %.4f  %7.0f tokens/s  %4.0f s left%s", terminal_ ? "\r" : "", name.c_str(), step,
                 steps_, loss, tokens_per_second, left, terminal_ && step != steps_ ? "" : "\n");
    std::fflush(stderr);
  }

 private:
  double total_, done_ = 0, shown_ = 0;
  ha::Index steps_;
  bool terminal_ = isatty(STDERR_FILENO) != 0;
  Clock clock_;
};

// Host batches on the machine, in memory that is taken once.
class Feeder {
 public:
  ha::TokenBatch<ha::Cpu> const& upload(ha::Cpu& cpu, ha::Batch const& host) {
    if (!batch_ || batch_->sequences.tokens() != std::ssize(host.tokens))
      batch_ = make_batch(cpu, ha::Sequences::equal(host.batch, host.seq_len), host.tokens, host.targets);
    ha::upload(cpu, host.tokens, batch_->tokens);
    ha::upload(cpu, host.targets, batch_->targets);
    return *batch_;
  }

 private:
  std::optional<ha::TokenBatch<ha::Cpu>> batch_;
};

inline ha::LossSum validate(ha::Cpu& cpu, Run& run, std::vector<ha::Batch> const& batches) {
  ha::LossSum total;
  Feeder feeder;
  for (auto const& batch : batches) total += run.loss(feeder.upload(cpu, batch));
  return total;
}

// Nothing when it was interrupted.
inline std::optional<RunResult> train(ha::Cpu& cpu, CompiledPattern const& pattern, Settings const& s, ha::DataSource& data,
                                      std::vector<ha::Batch> const& validation, Progress& progress) {
  RunResult result;
  result.name = pattern_name(pattern.letters);
  result.letters = pattern.letters;
  result.seq_len = s.seq_len;
  RunLog log{s.out, result.name};
  Clock const clock;
  auto const run = pattern.start(cpu, data.vocab_size(), ha::Seed{s.seed});
  result.num_parameters = run->parameter_count();
  data.restart();

  ha::Batch host;
  Feeder feeder;
  double sum = 0, training = 0;
  for (ha::Index step = 1; step <= s.steps; ++step) {
    if (interrupted) return std::nullopt;
    data.next_batch(s.batch, s.seq_len, host);
    double const before = clock.seconds();
    double const loss = run->step(feeder.upload(cpu, host)).loss.mean();
    training += clock.seconds() - before;
    sum += loss;
    result.losses.push_back(loss);
    double const speed = static_cast<double>(step * s.batch * s.seq_len) / training;
    log.add(step, loss, sum / static_cast<double>(step), speed, clock.seconds());
    progress.show(result.name, step, loss, speed);
  }
  auto const total = validate(cpu, *run, validation);
  result.val_loss = total.mean();
  result.val_accuracy = total.count == 0 ? 0 : static_cast<double>(total.correct) / static_cast<double>(total.count);
  result.tokens_per_second = static_cast<double>(s.steps * s.batch * s.seq_len) / training;
  result.milliseconds_per_step = 1000 * training / static_cast<double>(s.steps);
  result.training_time = clock.seconds();
  log.finish();
  return result;
}

}  // namespace sweep
#endif
