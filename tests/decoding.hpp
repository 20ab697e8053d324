// Logits of a model, of all tokens at once and of calls that go on from a cache.
#ifndef HYBRIDATTN_TESTS_DECODING_HPP
#define HYBRIDATTN_TESTS_DECODING_HPP

#include "catch.hpp"
#include "compare.hpp"

#include <hybridattn/hybridattn.hpp>
#include <hybridattn/infer/generate.hpp>

namespace decoding {

namespace ha = hybridattn;
using ha::Index;
using ha::TokenLists;

// Random tokens in 0 .. 18.
inline constexpr Index V = 19;
inline TokenLists some_tokens(std::vector<Index> const& lengths, std::uint64_t seed = 1) {
  ha::Random random{ha::Seed{seed}, "tokens"};
  TokenLists lists;
  for (Index length : lengths) {
    auto& list = lists.emplace_back();
    for (Index t = 0; t < length; ++t) list.push_back(static_cast<std::int32_t>(random.below(V)));
  }
  return lists;
}
inline std::vector<Index> const lengths{1, 33, 0, 40, 2};

template <class T> using Rows = std::vector<std::vector<T>>;   // of each sequence: [T, vocabulary]

// A model with its parameters.
template <class Stack, class T> struct WithParams {
  using Logit = ha::wide_t<T>;
  ha::Cpu cpu;
  ha::LanguageModel<Stack> model;
  typename ha::LanguageModel<Stack>::template Params<ha::Owned<T, ha::Cpu>> params = model.template initialize<T>(cpu, ha::Seed{3});

  explicit WithParams(typename ha::LanguageModel<Stack>::Config const& config, int threads = 2) : cpu(threads), model(config) {}

  auto cache(Index batch, Index capacity) { return ha::make_cache<T>(cpu, model, {.batch = batch, .capacity = capacity}); }
  // Logits of one forward over all tokens.
  Rows<Logit> whole(TokenLists const& tokens) {
    std::vector<std::int32_t> flat;
    std::vector<Index> lengths;
    for (auto const& list : tokens) {
      flat.insert(flat.end(), list.begin(), list.end());
      lengths.push_back(std::ssize(list));
    }
    auto const saved = model.forward(cpu, params, make_batch(cpu, packed(lengths), flat, flat));
    return split(download(cpu, model.logits(cpu, params, saved)), tokens);
  }
  // Logits of calls of extend. next(call, length of a sequence) says how many tokens of a sequence a call reads.
  template <class Next> Rows<Logit> decoded(TokenLists const& tokens, Next next, auto& cache) {
    Rows<Logit> rows(tokens.size());
    std::vector<std::size_t> done(tokens.size());
    auto const is_left = [&](std::size_t i) { return done[i] < tokens[i].size(); };
    for (Index call = 0; [&] {
           for (std::size_t i = 0; i < tokens.size(); ++i)
             if (is_left(i)) return true;
           return false;
         }();
         ++call) {
      TokenLists part(tokens.size());
      for (std::size_t i = 0; i < tokens.size(); ++i) {
        auto const left = tokens[i].begin() + static_cast<Index>(done[i]);
        part[i].assign(left, left + std::min<Index>(next(call, std::ssize(tokens[i])), tokens[i].end() - left));
        done[i] += part[i].size();
      }
      auto const logits = split(download(cpu, extend(cpu, model, params, part, cache)), part);
      for (std::size_t i = 0; i < rows.size(); ++i) rows[i].insert(rows[i].end(), logits[i].begin(), logits[i].end());
    }
    return rows;
  }
  template <class Next> Rows<Logit> decoded(TokenLists const& tokens, Next next) {
    auto own = cache(std::ssize(tokens), 50);
    return decoded(tokens, next, own);
  }
  Rows<Logit> split(std::vector<Logit> const& logits, TokenLists const& tokens) const {
    Rows<Logit> rows;
    auto from = logits.begin();
    for (auto const& list : tokens) {
      auto const to = from + std::ssize(list) * model.config().vocab_size;
      rows.emplace_back(from, to);
      from = to;
    }
    return rows;
  }
};

// Functions for `next`.
inline Index one_by_one(Index, Index) { return 1; }
inline Index half_then_one(Index call, Index length) { return call == 0 ? length / 2 : 1; }
inline Index at_once(Index, Index length) { return length; }
inline auto in_pieces() {
  return [random = ha::Random{ha::Seed{8}, "pieces"}](Index, Index) mutable { return random.below(6); };
}

template <class T> double max_difference(Rows<T> const& a, Rows<double> const& b) {
  double worst = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    REQUIRE(a[i].size() == b[i].size());
    worst = std::max(worst, max_error(a[i], b[i]));
  }
  return worst;
}
inline double max_abs(Rows<double> const& rows) {
  double largest = 0;
  for (auto const& row : rows) largest = std::max(largest, ::max_abs(row));
  return largest;
}

}  // namespace decoding
#endif
