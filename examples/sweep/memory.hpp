// What a results folder remembers from one start of the program to the next:
//   1_sandwich.checkpoint.safetensors   a pattern that is not finished yet
//   1_sandwich.result.safetensors       one that is
// Each carries the arguments that it was trained with. They are compared with this run's whenever one is read: what stood there
// a moment before may be another's.
#ifndef HYBRIDATTN_EXAMPLES_SWEEP_MEMORY_HPP
#define HYBRIDATTN_EXAMPLES_SWEEP_MEMORY_HPP

#include "report.hpp"
#include "settings.hpp"

#include <hybridattn/store/checkpoint.hpp>

#include <filesystem>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace sweep {

namespace ha = hybridattn;

// The arguments on which a result depends, a line each. The backend is one of them, because each backend rounds in its own way. The
// number of threads is none of them.
inline std::vector<std::string> arguments(Settings const& s, ha::DataState const& data) {
  return {"--steps " + std::to_string(s.steps),
          "--seq-len " + std::to_string(s.seq_len),
          "--batch " + std::to_string(s.batch),
          "--validation " + std::to_string(s.validation),
          "--seed " + std::to_string(s.seed),
          "--backend " + s.backend,
          "--dtype " + s.dtype,
          "--data " + data.description + " [hash " + std::to_string(data.content) + "]"};
}
// A text may have got another name.
inline std::string without_name(std::string const& argument) { return argument.substr(argument.rfind('[') + 1); }
inline std::vector<std::string> lines(std::string const& text) {
  std::vector<std::string> result;
  for (std::size_t start = 0; start < text.size();) {
    auto const end = std::min(text.find('\n', start), text.size());
    result.push_back(text.substr(start, end - start));
    start = end + 1;
  }
  return result;
}

// f(); its error says how to get on.
template <class F> auto with_way_out(F f) {
  try {
    return f();
  } catch (ha::Error const& error) {
    ha::fail(error.what(), "; take another --out, or --fresh to train everything anew");
  }
}

class Memory {
 public:
  // Of runs of these patterns; `data` is the state of the source that they are trained on.
  Memory(Settings const& s, std::vector<std::string> patterns, ha::DataState const& data)
      : folder_(s.out), steps_(s.steps), seq_len_(s.seq_len), backend_(s.backend), dtype_(s.dtype), patterns_(std::move(patterns)),
        arguments_(arguments(s, data)) {}

  std::filesystem::path checkpoint(std::string const& name) const { return folder_ / (name + ".checkpoint.safetensors"); }
  std::filesystem::path result(std::string const& name) const { return folder_ / (name + ".result.safetensors"); }
  // What every file of ours carries.
  std::string note() const {
    std::string text;
    for (auto const& argument : arguments_) text += argument + "\n";
    return text;
  }

  // Deletes what earlier runs left.
  void forget() const {
    for (auto const& pattern : patterns_)
      for (auto const& path : {checkpoint(pattern), result(pattern)}) remove(path);
  }
  // Throws where the folder holds anything that was trained with other arguments, or is damaged.
  void check() const {
    with_way_out([&] {
      for (auto const& pattern : patterns_) {
        if (there(checkpoint(pattern))) check_note(ha::read_checkpoint_header(checkpoint(pattern)).note, checkpoint(pattern));
        if (there(result(pattern))) (void)read(pattern);
      }
    });
  }

  // Steps of a pattern that are done and kept, when it is not finished.
  ha::Index steps_of(std::string const& name) const {
    if (!there(checkpoint(name))) return 0;
    return with_way_out([&] {
      auto const header = ha::read_checkpoint_header(checkpoint(name));
      check_note(header.note, checkpoint(name));
      return header.step;
    });
  }
  // What was kept of a pattern: load(path) reads it. Throws where it is not of this run.
  template <class Load> ha::Progress resumed(std::string const& name, Load load) const {
    return with_way_out([&] {
      ha::Progress progress = load(checkpoint(name));
      check_note(progress.note, checkpoint(name));
      ha::check(progress.step <= steps_, checkpoint(name).string(), ": ", progress.step, " of ", steps_, " steps are done");
      for (char const* series : {"loss", "training", "elapsed"})
        ha::check(std::ssize(progress.history[series]) == progress.step, checkpoint(name).string(), ": history.", series, " has ",
                  progress.history[series].size(), " numbers for ", progress.step, " steps");
      return progress;
    });
  }
  // The result takes the checkpoint's place.
  void finish(RunResult const& run) const {
    ha::SafetensorsWriter writer;
    writer.add_metadata(note_key, note());
    writer.add_metadata("letters", run.letters);
    auto const numbers = numbers_of(run);
    writer.add("numbers", {std::ssize(numbers)}, numbers);
    writer.add("losses", {std::ssize(run.losses)}, run.losses);
    writer.write(result(run.name));
    remove(checkpoint(run.name));
  }
  std::optional<RunResult> finished(std::string const& name) const {
    if (!there(result(name))) return std::nullopt;
    auto run = with_way_out([&] { return read(name); });
    remove(checkpoint(name));   // the process died between writing the one and removing the other
    return run;
  }

 private:
  static constexpr char const* note_key = "arguments";

  static bool there(std::filesystem::path const& path) {
    std::error_code ignored;
    return std::filesystem::exists(path, ignored);
  }
  static void remove(std::filesystem::path const& path) {
    std::error_code ignored;
    ha::remove_abandoned(path);
    std::filesystem::remove(path, ignored);
  }

  void check_note(std::string const& note, std::filesystem::path const& path) const {
    auto const theirs = lines(note);
    ha::check(theirs.size() == arguments_.size(), path.string(), " is not of this program");
    for (std::size_t i = 0; i < theirs.size(); ++i)
      ha::check(without_name(theirs[i]) == without_name(arguments_[i]), "the folder ", folder_, " holds a run with ", theirs[i], " (",
                path.filename(), "), this one has ", arguments_[i]);
  }

  // What a result consists of besides its losses. Seconds and counts are doubles like the rest.
  static std::vector<double> numbers_of(RunResult const& run) {
    return {static_cast<double>(run.num_parameters),
            run.training_time,
            run.tokens_per_second,
            run.milliseconds_per_step,
            run.val_loss,
            run.val_accuracy,
            run.tokens_are_bytes ? 1.0 : 0.0};
  }
  RunResult read(std::string const& name) const {
    auto const path = result(name);
    ha::Safetensors const file{path};
    check_note(file.metadata(note_key), path);
    auto const numbers = file.read_doubles("numbers");
    std::string const& letters = file.metadata("letters");
    ha::check(numbers.size() == 7 && pattern_name(letters) == name, path.string(), " is not of this program");
    auto losses = file.read_doubles("losses");
    ha::check(std::ssize(losses) == steps_, path.string(), ": it has the losses of ", losses.size(), " steps, not of ", steps_);
    return {.name = pattern_name(letters),
            .letters = letters,
            .backend = backend_,
            .dtype = dtype_,
            .num_parameters = static_cast<ha::Index>(numbers[0]),
            .training_time = numbers[1],
            .tokens_per_second = numbers[2],
            .milliseconds_per_step = numbers[3],
            .val_loss = numbers[4],
            .val_accuracy = numbers[5],
            .seq_len = seq_len_,
            .tokens_are_bytes = numbers[6] != 0,
            .losses = std::move(losses)};
  }

  std::filesystem::path folder_;
  ha::Index steps_, seq_len_;
  std::string backend_, dtype_;
  std::vector<std::string> patterns_, arguments_;
};

}  // namespace sweep
#endif
