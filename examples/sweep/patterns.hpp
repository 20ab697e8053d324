// One run of any pattern behind one interface, and the patterns that can be chosen.
#ifndef HYBRIDATTN_EXAMPLES_SWEEP_PATTERNS_HPP
#define HYBRIDATTN_EXAMPLES_SWEEP_PATTERNS_HPP

#include "../machine.hpp"

#include <hybridattn/store/progress.hpp>
#include <hybridattn/train/train_step.hpp>

#include <algorithm>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace sweep {

namespace ha = hybridattn;
using program::Machine;

// A model being trained: what the sweep needs of it, whatever its pattern.
class Run {
 public:
  virtual ~Run() = default;
  virtual ha::Index parameter_count() const = 0;
  virtual ha::StepResult step(ha::Batch const& batch) = 0;
  virtual ha::LossSum loss(ha::Batch const& batch) = 0;
  virtual void save(std::filesystem::path const& path, ha::Progress const& progress) = 0;
  virtual ha::Progress load(std::filesystem::path const& path) = 0;
};

struct CompiledPattern {
  std::string_view letters;
  ha::Index (*parameter_count)(ha::Index vocab_size);
  std::unique_ptr<Run> (*start)(Machine&, ha::Index vocab_size, ha::Seed);
};

// All that is compiled, in each scalar.
std::vector<CompiledPattern> patterns_in_float();
std::vector<CompiledPattern> patterns_in_bf16();
inline std::vector<CompiledPattern> compiled_patterns(std::string const& dtype) {
  if (dtype != "bf16") return patterns_in_float();
#ifdef HYBRIDATTN_EXAMPLES_IN_BF16
  return patterns_in_bf16();
#else
  ha::fail("--dtype bf16 is not compiled in; configure with -DHYBRIDATTN_EXAMPLES_IN_BF16=ON");
#endif
}

// "LFFL, G**G" -> the compiled patterns, in that order; throws on one that is not there.
inline std::vector<CompiledPattern> chosen_patterns(std::string const& list, std::string const& dtype) {
  auto const compiled = compiled_patterns(dtype);
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
               "\" into HYBRIDATTN_SWEEP_PATTERNS in examples/sweep/run_of.hpp");
    }
    chosen.push_back(*found);
    start = end + 1;
  }
  return chosen;
}

}  // namespace sweep
#endif
