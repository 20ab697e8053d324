// The model over tokens that follow those of a cache: the forward of nn/, layer by layer, with nothing kept but the cache.
#ifndef HYBRIDATTN_INFER_EXTEND_HPP
#define HYBRIDATTN_INFER_EXTEND_HPP

#include <hybridattn/infer/cache.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI {
namespace infer {

// x [N, C] -> project -> prepare -> the policy -> finish -> w_o, as in nn/attention.hpp.
template <AttentionPolicy P, class B, class T>
Tensor<T, 2, B> attention_layer(B& backend, typename P::Config const& c, SequencesOn<B> const& s,
                                typename Attention<P>::template Params<In<T>> const& p, View<T const, 2> x,
                                typename P::template Cache<Out<T>> const& cache) {
  using Prepare = typename P::Prepare;
  using Finish = typename P::Finish;
  auto shapes = Attention<P>::saved(c, s);
  shapes.policy = {};   // what only backward reads
  auto kept = allocate<T>(backend, shapes);
  zip([&](Path const& path, auto const& w, auto& raw,
          auto& input) { On<Linear, B>::forward(backend, x, w, Prepare::makes(path.name) ? as_rows(out(raw)) : as_rows(out(input))); },
      p.w, kept.raw, kept.inputs);
  typename P::template Inputs<Narrow<In<T>>> raw;
  zip(detail::ToIn{}, kept.raw, raw);
  if constexpr (requires { Prepare::extend(backend, c, s, raw, p.prepare, cache, out(kept.inputs)); }) {
    Prepare::extend(backend, c, s, raw, p.prepare, cache, out(kept.inputs));
  } else {
    static_assert(!NamesExtend<Prepare>,
                  "Prepare::extend takes (Backend&, Config const&, Sequences const&, Inputs<Narrow<In<T>>>, "
                  "Params<In<T>>, Cache<Out<T>>, Inputs<Out<T>>)");
    if constexpr (!std::is_same_v<Prepare, NoStep>) Prepare::forward(backend, c, s, raw, p.prepare, out(kept.inputs));
  }
  On<P, B>::extend(backend, c, s, in(kept.inputs), cache, out(kept.outputs));
  if constexpr (Finish::gated) On<Linear, B>::forward(backend, x, p.w_gate, as_rows(out(kept.z)));
  if constexpr (Attention<P>::finishes) Finish::forward(backend, c, in(kept.outputs.o), in(kept.z), p.finish, out(kept.finished));
  Tensor<T, 2, B> y{backend, x.shape};
  On<Linear, B>::forward(backend, as_rows(in(Attention<P>::finishes ? kept.finished : kept.outputs.o)), p.w_o, out(y));
  return y;
}

// As in nn/block.hpp.
template <AttentionPolicy P, class B, class T>
Tensor<T, 2, B> block(B& backend, BlockConfig const& c, typename P::Config const& mixer, Index layer, SequencesOn<B> const& s,
                      typename Block<P>::template Params<In<T>> const& p, Tensor<T, 2, B> x,
                      typename P::template Cache<Out<T>> const& cache) {
  Tensor<T, 2, B> normed{backend, x.shape()};
  On<RmsNorm, B>::forward(backend, c.norm, in(x), p.attention_norm, out(normed));
  auto h = attention_layer<P>(backend, mixer, s, p.attention, in(normed), cache);
  On<Add, B>::forward(backend, flat(in(x)), flat(out(h)));
  On<RmsNorm, B>::forward(backend, c.norm, in(h), p.feed_forward_norm, out(normed));
  FeedForward::Saved<Owned<T, B>> kept;
  auto y = FeedForward::forward(backend, c.feed_forward, layer, p.feed_forward, in(normed), kept);
  On<Add, B>::forward(backend, flat(in(h)), flat(out(y)));
  return y;
}

// As in nn/stack.hpp.
template <class Stack, class B, class T>
Tensor<T, 2, B> stack(B& backend, typename Stack::Config const& c, SequencesOn<B> const& s,
                      typename Stack::template Params<In<T>> const& params, Tensor<T, 2, B> x,
                      typename LayerCaches<Stack>::template Group<Out<T>> const& caches) {
  params.for_each(
      [&](auto type, std::size_t layer, auto& p, auto& cache) {
        using Block = typename decltype(type)::type;
        x = block<typename Block::Policy>(backend, c.block, Stack::template mixer<Block>(c), static_cast<Index>(layer), s, p, std::move(x),
                                          cache);
      },
      params, caches);
  return x;
}

// Which rows of logits are wanted.
enum class Rows { all, last };

// [N, V], or a row for the last token of each sequence that has new ones.
template <class Stack, class T, class B>
Tensor<T, 2, B> logits(B& backend, LanguageModel<Stack> const& model, typename LanguageModel<Stack>::template Params<In<T>> const& p,
                       SequencesOn<B> const& s, Rows rows, Tensor<T, 2, B> x) {
  if (rows == Rows::last && s.longest() > 1) {
    std::vector<std::int32_t> ends;
    for (Sequence const sequence : s)
      if (sequence.length > 0) ends.push_back(static_cast<std::int32_t>(sequence.start + sequence.length - 1));
    Tensor<std::int32_t, 1, B> places{backend, {std::ssize(ends)}};
    upload(backend, ends, places);
    Tensor<T, 2, B> picked{backend, {std::ssize(ends), x.shape()[1]}};
    On<Embedding, B>::forward(backend, in(places), in(x), out(picked));   // rows of a table, by number
    x = std::move(picked);
  }
  Tensor<T, 2, B> normed{backend, x.shape()}, result{backend, {x.shape()[0], model.config().vocab_size}};
  On<RmsNorm, B>::forward(backend, model.config().norm, in(x), p.norm, out(normed));
  On<Linear, B>::forward(backend, in(normed), model.config().tie_embedding ? p.embedding : p.head, out(result));
  return result;
}

// A cache of another model's sizes would be read past its end.
template <class Stack, class T, class B> void check_sizes(LanguageModel<Stack> const& model, Cache<Stack, T, B> const& cache) {
  zip(
      [](Path const& path, auto const& expected, auto const& layer) {
        check(layer.shape() == expected, "cache: it was made for a model of other sizes, as ", path.str(), " shows");
      },
      cache_shapes(model, {cache.batch(), cache.capacity()}), cache.layers());
}

template <class Stack, class T, class B>
Tensor<T, 2, B> extend(B& backend, LanguageModel<Stack> const& model,
                       typename LanguageModel<Stack>::template Params<Owned<T, B>> const& params, TokenLists const& tokens,
                       Cache<Stack, T, B>& cache, Rows rows) {
  check_sizes(model, cache);
  auto const& call = cache.next(backend, tokens);
  if (call.tokens.empty()) return {};
  TokenRange::of(call.tokens).check_tokens(model.config().vocab_size);
  auto const p = in(params);
  Tensor<std::int32_t, 1, B> numbers{backend, {std::ssize(call.tokens)}};
  upload(backend, call.tokens, numbers);
  Tensor<T, 2, B> x{backend, {std::ssize(call.tokens), model.config().model_dim}};
  On<Embedding, B>::forward(backend, in(numbers), p.embedding, out(x));
  x = stack<Stack>(backend, model.stack_config(), call.sequences, p.blocks, std::move(x), out(cache.layers()));
  cache.commit();
  return logits(backend, model, p, call.sequences, rows, std::move(x));
}

}  // namespace infer

// The logits [N, V] of new tokens, tokens[i] of sequence i of the cache, none of some if so wished; N are all of them, one
// sequence after the other. The cache then holds them. Throws, before the cache is touched, if a sequence would outgrow the
// cache's capacity or a token is not in the vocabulary.
template <class Stack, class T, class B>
Tensor<T, 2, B> extend(B& backend, LanguageModel<Stack> const& model,
                       typename LanguageModel<Stack>::template Params<Owned<T, B>> const& params, TokenLists const& tokens,
                       Cache<Stack, T, B>& cache) {
  return infer::extend(backend, model, params, tokens, cache, infer::Rows::all);
}
// The same, with the logits of the last token of each sequence only: one row for each that has new tokens, in order.
template <class Stack, class T, class B>
Tensor<T, 2, B> extend_to_last(B& backend, LanguageModel<Stack> const& model,
                               typename LanguageModel<Stack>::template Params<Owned<T, B>> const& params, TokenLists const& tokens,
                               Cache<Stack, T, B>& cache) {
  return infer::extend(backend, model, params, tokens, cache, infer::Rows::last);
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
