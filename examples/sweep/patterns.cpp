// The models of the sweep: the one file of it that knows their types, and nearly all it costs to compile.
#include "patterns.hpp"

#include "../study_models.hpp"

#include <hybridattn/train/checkpoint.hpp>

#include <optional>

#ifdef HYBRIDATTN_EXAMPLES_ON_EMULATOR
#include <hybridattn/emulator.hpp>
#endif

// Another pattern is one more word here, or -DHYBRIDATTN_SWEEP_PATTERNS='"LFFL","LLLF"'.
#ifndef HYBRIDATTN_SWEEP_PATTERNS
#define HYBRIDATTN_SWEEP_PATTERNS "LFFL", "FLFL", "LLFF", "FFLL", "LDDL", "DLDL", "LLDD", "DDLL", "LLLL", "FFFF", "DDDD"
#endif

namespace sweep {
namespace {

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

template <class Stack> class RunOf final : public Run {
 public:
  RunOf(Machine& machine, ha::Index vocab_size, ha::Seed seed)
      : machine_(machine), model_(study::study1_config<Stack>(vocab_size)), params_(model_.template initialize<float>(machine, seed)),
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
  using Params = typename Model::template Params<ha::Owned<float, Machine>>;

  Machine& machine_;
  Model model_;
  Params params_;
  ha::AdamW<Params> optimizer_;
  Feeder training_, validation_;
};

template <ha::Text... patterns> std::vector<CompiledPattern> compile() {
  return {{std::string_view(patterns.letters, sizeof(patterns.letters) - 1),
           [](ha::Index vocab_size) {
             using Stack = ha::Pattern<patterns, study::Study1>;
             return ha::LanguageModel<Stack>{study::study1_config<Stack>(vocab_size)}.parameter_count();
           },
           [](Machine& machine, ha::Index vocab_size, ha::Seed seed) -> std::unique_ptr<Run> {
             return std::make_unique<RunOf<ha::Pattern<patterns, study::Study1>>>(machine, vocab_size, seed);
           }}...};
}

}  // namespace

std::vector<CompiledPattern> compiled_patterns() { return compile<HYBRIDATTN_SWEEP_PATTERNS>(); }

}  // namespace sweep
