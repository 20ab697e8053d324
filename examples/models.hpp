// The patterns that train and generate are compiled for, and how a running program finds one of them.
#ifndef HYBRIDATTN_EXAMPLES_MODELS_HPP
#define HYBRIDATTN_EXAMPLES_MODELS_HPP

#include <hybridattn/hybridattn.hpp>

#include <string>
#include <string_view>

namespace models {

namespace ha = hybridattn;

// A pattern, the letters that a user writes for it, and how much of a head its full attention turns.
template <ha::Text text, int percent = 25> struct Choice {
  static constexpr std::string_view letters{text.letters, sizeof(text.letters) - 1};
  static constexpr int rotary_percent = percent;
  using Stack = ha::Pattern<text, ha::Alphabet<ha::Letter<'L', ha::GDN>, ha::Letter<'D', ha::DSA>,
                                               ha::Letter<'F', ha::FullAttention<ha::FullOptions{.rotary_percent = percent}>>>>;
};
template <class... Choices> struct List {};

#ifdef HYBRIDATTN_EXAMPLES_ONE_PATTERN   // of each list, with the same layers: for tests, which compile sooner
using Trained = List<Choice<"LFFL", 50>>;
using Released = List<Choice<"LF", 50>>;
#else
// Another pattern is one more line.
using Trained = List<Choice<"LFFL">, Choice<"LLLF">, Choice<"LDDL">, Choice<"FFFF">>;

// Released models turn a quarter of a head.
using Released = List<Choice<"LLLF">, Choice<"LLLFLLLF">, Choice<"LFFL", 50>, Choice<"LF", 50>>;
#endif

// f(choice) for those whose letters are wanted, until one returns true; throws, naming all patterns, when none did. `differs`
// says why those with these letters were not taken.
template <class... Choices, class F>
void with_pattern(List<Choices...>, std::string_view wanted, F f, std::string const& differs = "") {
  if (((Choices::letters == wanted && f(Choices{})) || ...)) return;
  auto const shown = wanted.substr(0, 100);
  ha::check(differs.empty(), "pattern '", shown, "' is compiled in with other options. ", differs,
            ". To add it, write one more line in examples/models.hpp");
  std::string known;
  ((known += (known.empty() ? "" : ", ") + std::string(Choices::letters)), ...);
  ha::fail("pattern '", shown, "' is not compiled in; there are ", known,
           " (L Gated DeltaNet, F full, D sparse attention). To add it, write one more line in examples/models.hpp");
}

}  // namespace models
#endif
