// One run of a pattern in a scalar. Only patterns.cpp and patterns_bf16.cpp, which know the types of the models, include this header: they
// are nearly all that the sweep costs to compile.
#ifndef HYBRIDATTN_EXAMPLES_SWEEP_RUN_OF_HPP
#define HYBRIDATTN_EXAMPLES_SWEEP_RUN_OF_HPP

#include "patterns.hpp"

#include "../study_models.hpp"

#include <hybridattn/train/checkpoint.hpp>

#include <optional>

#ifdef HYBRIDATTN_EXAMPLES_ON_EMULATOR
#include <hybridattn/emulator.hpp>
#endif

// The study's eight patterns, and the three pure ones. Another one is one more word here, or -DHYBRIDATTN_SWEEP_PATTERNS='"LFFL","LLLF"'.
#ifndef HYBRIDATTN_SWEEP_PATTERNS
#define HYBRIDATTN_SWEEP_PATTERNS "LFFL", "FLFL", "LLFF", "FFLL", "LDDL", "DLDL", "LLDD", "DDLL", "LLLL", "FFFF", "DDDD"
#endif

namespace sweep {

// Host batches on the machine, in memory that is taken once.
class Feeder {
 public:
  ha::TokenBatch<Machine> const& upload(Machine& machine, ha::Batch const& host) {
    if (!batch_ || batch_->sequences.count() != host.batch || batch_->sequences.longest() != host.seq_len)
      batch_ = make_batch(machine, host);
    else refill(machine, *batch_, host.tokens, host.targets);
    return *batch_;
  }

 private:
  std::optional<ha::TokenBatch<Machine>> batch_;
};

template <class Stack, class T> class RunOf final : public Run {
 public:
  RunOf(Machine& machine, ha::Index vocab_size, ha::Seed seed)
      : machine_(machine), model_(study::study1_config<Stack>(vocab_size)), params_(model_.template initialize<T>(machine, seed)),
        optimizer_(machine, params_, {.learning_rate = 3e-4}) {}

  ha::Index parameter_count() const override { return model_.parameter_count(); }
  ha::StepResult step(ha::Batch const& batch) override {
    return train_step(machine_, model_, params_, optimizer_, training_.upload(machine_, batch));
  }
  ha::LossSum loss(ha::Batch const& batch) override { return model_.loss(machine_, params_, validation_.upload(machine_, batch)); }
  void save(std::filesystem::path const& path, ha::Progress const& progress) override {
    save_checkpoint(machine_, path, model_, params_, optimizer_, progress);
  }
  ha::Progress load(std::filesystem::path const& path) override { return load_checkpoint(machine_, path, model_, params_, optimizer_); }

 private:
  using Model = ha::LanguageModel<Stack>;
  using Params = typename Model::template Params<ha::Owned<T, Machine>>;

  Machine& machine_;
  Model model_;
  Params params_;
  ha::AdamW<Params> optimizer_;
  Feeder training_, validation_;
};

// The patterns in the scalar T.
template <class T, ha::Text... patterns> std::vector<CompiledPattern> compile() {
  return {{std::string_view(patterns.letters, sizeof(patterns.letters) - 1),
           [](ha::Index vocab_size) {
             using Stack = ha::Pattern<patterns, study::Study1>;
             return ha::LanguageModel<Stack>{study::study1_config<Stack>(vocab_size)}.parameter_count();
           },
           [](Machine& machine, ha::Index vocab_size, ha::Seed seed) -> std::unique_ptr<Run> {
             return std::make_unique<RunOf<ha::Pattern<patterns, study::Study1>, T>>(machine, vocab_size, seed);
           }}...};
}

}  // namespace sweep
#endif
