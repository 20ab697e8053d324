// The patterns this program is compiled for, and one run of any of them behind one interface.
#ifndef HYBRIDATTN_EXAMPLES_SWEEP_PATTERNS_HPP
#define HYBRIDATTN_EXAMPLES_SWEEP_PATTERNS_HPP

#include "../study_models.hpp"

#include <hybridattn/train/checkpoint.hpp>

#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace sweep {

namespace ha = hybridattn;

// A model being trained: what the sweep needs of it, whatever its pattern.
class Run {
 public:
  virtual ~Run() = default;
  virtual ha::Index parameter_count() const = 0;
  virtual ha::StepResult step(ha::TokenBatch<ha::Cpu> const& batch) = 0;
  virtual ha::LossSum loss(ha::TokenBatch<ha::Cpu> const& batch) = 0;
  virtual void save(std::filesystem::path const& path, ha::Progress const& progress) = 0;
  virtual ha::Progress load(std::filesystem::path const& path) = 0;
};

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

struct CompiledPattern {
  std::string_view letters;
  std::unique_ptr<Run> (*start)(ha::Cpu&, ha::Index vocab_size, ha::Seed);
};

template <ha::Text... patterns> std::vector<CompiledPattern> compile() {
  return {{std::string_view(patterns.letters, sizeof(patterns.letters) - 1),
           [](ha::Cpu& cpu, ha::Index vocab_size, ha::Seed seed) -> std::unique_ptr<Run> {
             return std::make_unique<RunOf<ha::Pattern<patterns, study::Study1>>>(cpu, vocab_size, seed);
           }}...};
}

// The study's eight, and the three pure ones. Another pattern is one more word here, or -DHYBRIDATTN_SWEEP_PATTERNS='"LFFL","LLLF"'.
#ifndef HYBRIDATTN_SWEEP_PATTERNS
#define HYBRIDATTN_SWEEP_PATTERNS "LFFL", "FLFL", "LLFF", "FFLL", "LDDL", "DLDL", "LLDD", "DDLL", "LLLL", "FFFF", "DDDD"
#endif
inline std::vector<CompiledPattern> compiled_patterns() { return compile<HYBRIDATTN_SWEEP_PATTERNS>(); }
inline constexpr std::string_view studied = "LFFL,FLFL,LLFF,FFLL,LDDL,DLDL,LLDD,DDLL";

// "LFFL, G**G" -> the compiled patterns, in that order; throws on one that is not there.
inline std::vector<CompiledPattern> chosen_patterns(std::string const& list) {
  auto const compiled = compiled_patterns();
  std::vector<CompiledPattern> chosen;
  for (std::size_t start = 0; start <= list.size();) {
    auto const end = std::min(list.find(',', start), list.size());
    std::string word, letters;
    for (char c : list.substr(start, end - start))
      if (c != ' ') word += c;
    for (std::size_t i = 0; i < word.size(); ++i) {
      char const letter = word[i];
      ha::check(std::string_view("LGF*D").find(letter) != std::string_view::npos, "pattern '", word, "': unknown letter '", letter,
                "' at position ", i + 1, "; allowed are L or G (Gated DeltaNet), F or * (full attention) and D (sparse attention)");
      letters += letter == 'G' ? 'L' : letter == '*' ? 'F' : letter;
    }
    auto const found = std::find_if(compiled.begin(), compiled.end(), [&](auto const& p) { return p.letters == letters; });
    if (found == compiled.end()) {
      std::string known;
      for (auto const& pattern : compiled) known += (known.empty() ? "" : ", ") + std::string(pattern.letters);
      ha::fail("pattern '", word, "' is not compiled in; there are ", known, ". To add it, write \"", letters.empty() ? "LFLF" : letters,
               "\" into compile<...>() in examples/sweep/patterns.hpp");
    }
    chosen.push_back(*found);
    start = end + 1;
  }
  return chosen;
}

}  // namespace sweep
#endif
