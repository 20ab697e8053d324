// The models of the sweep: the one file of it that knows their types, and nearly all it costs to compile.
#include "patterns.hpp"

#include "../study_models.hpp"

#include <hybridattn/train/checkpoint.hpp>

// Another pattern is one more word here, or -DHYBRIDATTN_SWEEP_PATTERNS='"LFFL","LLLF"'.
#ifndef HYBRIDATTN_SWEEP_PATTERNS
#define HYBRIDATTN_SWEEP_PATTERNS "LFFL", "FLFL", "LLFF", "FFLL", "LDDL", "DLDL", "LLDD", "DDLL", "LLLL", "FFFF", "DDDD"
#endif

namespace sweep {
namespace {

template <class Stack> class RunOf final : public Run {
 public:
  RunOf(ha::Cpu& cpu, ha::Index vocab_size, ha::Seed seed)
      : cpu_(cpu), model_(study::study1_config<Stack>(vocab_size)), params_(model_.template initialize<float>(cpu, seed)),
        optimizer_(cpu, params_, {.learning_rate = 3e-4}) {}

  ha::Index parameter_count() const override { return model_.parameter_count(); }
  ha::StepResult step(ha::TokenBatch<ha::Cpu> const& batch) override { return train_step(cpu_, model_, params_, optimizer_, batch); }
  ha::LossSum loss(ha::TokenBatch<ha::Cpu> const& batch) override { return model_.loss(cpu_, params_, batch); }
  void save(std::filesystem::path const& path, ha::Progress const& progress) override {
    save_checkpoint(cpu_, path, model_, params_, optimizer_, progress);
  }
  ha::Progress load(std::filesystem::path const& path) override { return load_checkpoint(cpu_, path, model_, params_, optimizer_); }

 private:
  using Model = ha::LanguageModel<Stack>;
  using Params = typename Model::template Params<ha::Owned<float, ha::Cpu>>;

  ha::Cpu& cpu_;
  Model model_;
  Params params_;
  ha::AdamW<Params> optimizer_;
};

template <ha::Text... patterns> std::vector<CompiledPattern> compile() {
  return {{std::string_view(patterns.letters, sizeof(patterns.letters) - 1),
           [](ha::Index vocab_size) {
             using Stack = ha::Pattern<patterns, study::Study1>;
             return ha::LanguageModel<Stack>{study::study1_config<Stack>(vocab_size)}.parameter_count();
           },
           [](ha::Cpu& cpu, ha::Index vocab_size, ha::Seed seed) -> std::unique_ptr<Run> {
             return std::make_unique<RunOf<ha::Pattern<patterns, study::Study1>>>(cpu, vocab_size, seed);
           }}...};
}

}  // namespace

std::vector<CompiledPattern> compiled_patterns() { return compile<HYBRIDATTN_SWEEP_PATTERNS>(); }

}  // namespace sweep
