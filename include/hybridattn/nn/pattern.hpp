// Stacks written as text: Pattern<"LFFL">, Pattern<"G*G*">, Pattern<"LDDL", MyAlphabet>.
#ifndef HYBRIDATTN_NN_PATTERN_HPP
#define HYBRIDATTN_NN_PATTERN_HPP

#include <hybridattn/attention/attention.hpp>
#include <hybridattn/nn/stack.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI {

template <std::size_t size> struct Text {
  char letters[size] = {};
  consteval Text(char const (&text)[size]) {
    for (std::size_t i = 0; i < size; ++i) letters[i] = text[i];
  }
};

// A letter of an alphabet, and its policy.
template <char letter, AttentionPolicy P> struct Letter {
  static constexpr char name = letter;
  using Policy = P;
};

template <class... Letters> struct Alphabet {
  template <char letter> static constexpr std::size_t position() {
    std::size_t n = 0;
    (void)((Letters::name == letter || (++n, false)) || ...);
    return n;
  }
  template <char letter> struct Find {
    static constexpr bool known = position<letter>() < sizeof...(Letters);
    static_assert(known, "Pattern: a letter that is not in the alphabet. The library's own: G or L = GDN, * or F = Full, D = DSA");
    // An unknown letter gives the first policy, so that the sentence above is the only error.
    using Policy = typename std::tuple_element_t<known ? position<letter>() : 0, std::tuple<Letters...>>::Policy;
  };
};

// The letters that are common elsewhere (G, *, D) and those of the studies (L, F, D).
using FieldLetters = Alphabet<Letter<'G', GDN>, Letter<'L', GDN>, Letter<'*', Full>, Letter<'F', Full>, Letter<'D', DSA>>;

namespace detail {
// Classes only: nvcc 13 rejects a partial specialization on `text` and cannot name the result of a function of `text`.
template <Text text, class Letters> struct Parsed {
  template <class Positions> struct At;
  template <std::size_t... i> struct At<std::index_sequence<i...>> {
    using type = Stack<typename Letters::template Find<text.letters[i]>::Policy...>;
  };
  using type = typename At<std::make_index_sequence<sizeof(text.letters) - 1>>::type;
};
}  // namespace detail

template <Text text, class Letters = FieldLetters> using Pattern = typename detail::Parsed<text, Letters>::type;

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
