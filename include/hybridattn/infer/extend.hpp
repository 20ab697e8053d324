// The model over tokens that follow those of a cache: the forward of nn/ with a cache in place of what backward would need.
#ifndef HYBRIDATTN_INFER_EXTEND_HPP
#define HYBRIDATTN_INFER_EXTEND_HPP

#include <hybridattn/infer/cache.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI {
namespace infer {

// Rows of logits to compute: of all new tokens, or of the last new token of each sequence.
enum class LogitRows { all, last };

// Logits [N, V], never narrower than float, or one row for each sequence with new tokens: that of its last token.
template <class Stack, class T, class B>
Tensor<wide_t<T>, 2, B> logits(B& backend, LanguageModel<Stack> const& model,
                               typename LanguageModel<Stack>::template Params<In<T>> const& p, SequencesOn<B> const& s, LogitRows rows,
                               Tensor<T, 2, B> x) {
  if (rows == LogitRows::last && s.longest() > 1) {
    std::vector<std::int32_t> ends;
    for (Sequence const sequence : s)
      if (sequence.length > 0) ends.push_back(static_cast<std::int32_t>(sequence.start + sequence.length - 1));
    Tensor<std::int32_t, 1, B> places{backend, {std::ssize(ends)}};
    upload(backend, ends, places);
    Tensor<T, 2, B> picked{backend, {std::ssize(ends), x.shape()[1]}};
    On<Embedding, B>::forward(backend, in(places), in(x), out(picked));   // rows of a table, by number
    x = std::move(picked);
  }
  Tensor<T, 2, B> normed{backend, x.shape()};
  Tensor<wide_t<T>, 2, B> result{backend, {x.shape()[0], model.config().vocab_size}};
  On<RmsNorm, B>::forward(backend, model.config().norm, in(x), p.norm, out(normed));
  On<Linear, B>::forward(backend, in(normed), model.config().tie_embedding ? p.embedding : p.head, out(result));
  return result;
}

// Throws Error for a cache of another model's sizes, which would be read past its end.
template <class Stack, class T, class B> void check_sizes(LanguageModel<Stack> const& model, Cache<Stack, T, B> const& cache) {
  zip(
      [](Path const& path, auto const& expected, auto const& layer) {
        check(layer.shape() == expected, "cache: it was made for a model of other sizes; its ", path.str(), " has ", layer.shape().count(),
              " numbers, this model's has ", expected.count());
      },
      cache_shapes(model, {cache.batch(), cache.capacity()}), cache.layers());
}

template <class Stack, class T, class B>
Tensor<wide_t<T>, 2, B> extend(B& backend, LanguageModel<Stack> const& model,
                               typename LanguageModel<Stack>::template Params<Owned<T, B>> const& params, TokenLists const& tokens,
                               Cache<Stack, T, B>& cache, LogitRows rows) {
  check_sizes(model, cache);
  auto const& call = cache.next(backend, tokens);
  if (call.tokens.empty()) return {backend, {0, model.config().vocab_size}};
  TokenRange::of(call.tokens).check_tokens(model.config().vocab_size);
  auto const p = in(params);
  Tensor<std::int32_t, 1, B> numbers{backend, {std::ssize(call.tokens)}};
  upload(backend, call.tokens, numbers);
  Tensor<T, 2, B> x{backend, {std::ssize(call.tokens), model.config().model_dim}};
  On<Embedding, B>::forward(backend, in(numbers), p.embedding, out(x));
  x = Stack::extend(backend, model.stack_config(), call.sequences, p.blocks, std::move(x), out(cache.layers()));
  cache.commit();
  return logits(backend, model, p, call.sequences, rows, std::move(x));
}

}  // namespace infer

// Returns the logits [N, V] of N new tokens, one sequence after the other, and adds the tokens to the cache. tokens[i] are the new
// tokens of sequence i; the list may be empty. Throws Error if a sequence would exceed the cache's capacity or a token is not in the
// vocabulary. The cache is then unchanged.
template <class Stack, class T, class B>
Tensor<wide_t<T>, 2, B> extend(B& backend, LanguageModel<Stack> const& model,
                               typename LanguageModel<Stack>::template Params<Owned<T, B>> const& params, TokenLists const& tokens,
                               Cache<Stack, T, B>& cache) {
  return infer::extend(backend, model, params, tokens, cache, infer::LogitRows::all);
}
// The same, with one row of logits for each sequence with new tokens, in order: that of the sequence's last token.
template <class Stack, class T, class B>
Tensor<wide_t<T>, 2, B> extend_to_last(B& backend, LanguageModel<Stack> const& model,
                                       typename LanguageModel<Stack>::template Params<Owned<T, B>> const& params, TokenLists const& tokens,
                                       Cache<Stack, T, B>& cache) {
  return infer::extend(backend, model, params, tokens, cache, infer::LogitRows::last);
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
