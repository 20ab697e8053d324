#ifndef HYBRIDATTN_ATTENTION_DSA_GPU_HPP
#define HYBRIDATTN_ATTENTION_DSA_GPU_HPP

#include <hybridattn/attention/dsa/dsa.hpp>
#include <hybridattn/attention/dsa/kernels.hpp>
#include <hybridattn/tensor/in_float.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI {
namespace dsa {

template <class T, class M>
Batch<T> batch_of(SparseOptions o, Config const& c, SequencesOn<M> const& s, Inputs<In<T>> x, View<std::int32_t const, 2> indices) {
  return {.options = o,
          .x = x,
          .sequences = s.table(),
          .indices = indices,
          .group = static_cast<int>(c.num_heads / c.num_kv_heads),
          .scale = static_cast<T>(c.scale),
          .index_scale = static_cast<T>(c.index_scale),
          .cache = {}};
}

// (1) and (2). Scores are stored for a slice of queries at a time. `room` is the number of keys that a row of scores has room for,
// `longest` of those that a query may see.
template <class T, class B>
void choose_keys(B& gpu, Batch<T> const& batch, Index tokens, Index longest, Index room, View<std::int32_t, 2> indices) {
  constexpr Index slice = 256;
  Tensor<T, 2, B> scores{gpu, {std::min(tokens, slice), room}};
  for (Index first = 0; first < tokens; first += slice) {
    ChoiceParams<T> const p{batch, out(scores), indices, first, std::min(first + slice, tokens)};
    if (selection_size(batch.options, longest) < longest)
      launch<ScoreKeys<T>>(gpu, {.x = ceil_div(longest, ScoreKeys<T>::threads), .y = ceil_div(p.last - first, ScoreKeys<T>::queries)}, p);
    launch<SelectKeys<T>>(gpu, {.x = p.last - first}, p);
  }
}

// (3). An empty lse is not computed.
template <class T, class B> void attend(B& gpu, Batch<T> const& batch, View<T, 3> o, Wide<Out<T>, 2> lse) {
  AttentionParams<T> p{};
  p.batch = batch;
  p.o = o;
  p.lse = lse;
  launch<Attend<T>>(gpu, {.x = o.extent(0), .y = o.extent(1)}, p);
}
// (4)
template <class T, class B>
void attend_backward(B& gpu, Sequences const& s, Batch<T> const& batch, Outputs<In<T>> y, Saved<In<T>> saved, Outputs<In<T>> d_y,
                     Inputs<Out<T>> d_x) {
  Tensor<wide_t<T>, 2, B> delta{gpu, saved.lse.shape};
  AttentionParams<T> p{};
  p.batch = batch;
  p.y = y.o;
  p.d_o = d_y.o;
  p.y_lse = saved.lse;
  p.delta = out(delta);
  p.d_x = d_x;
  p.tiles = ceil_div(s.longest(), Pairs::keys);
  launch<AttendQueryGradients<T>>(gpu, {.x = y.o.extent(0), .y = y.o.extent(1)}, p);
  launch<AttendKeyGradients<T>>(gpu, {.x = s.count() * p.tiles, .y = batch.x.k.extent(1)}, p);
}

// (5) and (6) of every query, and their sum unless `loss` is an empty view.
template <class T, class B> void index_loss(B& gpu, Batch<T> const& batch, Saved<Out<T>> saved, State<Out<T>, 1> loss) {
  Tensor<T, 1, B> losses{gpu, {batch.x.q.extent(0)}};
  KlParams<T> p{};
  p.batch = batch;
  p.lse = saved.lse;
  p.index_lse = saved.index_lse;
  p.losses = out(losses);
  launch<IndexLoss<T>>(gpu, {.x = batch.x.q.extent(0)}, p);
  if (!loss.empty()) launch<SumLosses<T>>(gpu, {}, {in(losses), loss});
}
// (7). d_I has a row of selected keys for each token, or rows of all keys for a block of queries of each sequence.
template <class T, class B>
void index_loss_backward(B& gpu, Sequences const& s, Batch<T> const& batch, Saved<In<T>> saved, State<In<T>, 1> d_loss,
                         Inputs<Out<T>> d_x) {
  bool const is_dense = batch.indices.empty();
  Index const queries = is_dense ? Index{256} : s.longest(), columns = is_dense ? queries : batch.indices.extent(1);
  Tensor<T, 1, B> d_scores{gpu, {size_product(s.tokens(), columns)}};
  KlParams<T> p{};
  p.batch = batch;
  p.lse = saved.lse;
  p.y_index_lse = saved.index_lse;
  p.d_loss = d_loss;
  p.d_x = d_x;
  p.d_scores = out(d_scores);
  p.queries = queries;
  p.tiles = ceil_div(s.longest(), Pairs::keys);
  for (; p.first < s.longest(); p.first += queries) {
    launch<IndexQueryGradients<T>>(gpu, {.x = s.count() * queries}, p);
    if (!d_x.index_k.empty()) launch<IndexKeyGradients<T>>(gpu, {.x = s.count() * p.tiles}, p);
  }
}

template <class B, class T, int... Ranks> void set_gradients_zero(B& gpu, View<T, Ranks>... x) {
  (for_each(gpu, x.count(), SetElementZero<T, Ranks>{x}), ...);
}

}  // namespace dsa

template <SparseOptions O, GpuBackend B> struct On<SparseAttention<O>, B> : InFloat<SparseAttention<O>, B> {
  using InFloat<SparseAttention<O>, B>::forward, InFloat<SparseAttention<O>, B>::backward, InFloat<SparseAttention<O>, B>::extend;
  template <std::floating_point T, class M>
  static void forward(B& gpu, dsa::Config const& c, SequencesOn<M> const& s, dsa::Inputs<In<T>> x, dsa::Outputs<Out<T>> y,
                      dsa::Saved<Out<T>> saved) {
    auto const batch = dsa::batch_of<T>(O, c, s, x, saved.indices);
    if (c.stage != Stage::dense_warm_up) dsa::choose_keys(gpu, batch, s.tokens(), s.longest(), s.longest(), saved.indices);
    dsa::attend(gpu, batch, y.o, saved.lse);
    if (c.stage != Stage::language_model) dsa::index_loss<T>(gpu, batch, saved, y.auxiliary_loss);
    else if (!y.auxiliary_loss.empty()) launch<dsa::SumLosses<T>>(gpu, {}, {{}, y.auxiliary_loss});
  }

  template <std::floating_point T, class M>
  static void backward(B& gpu, dsa::Config const& c, SequencesOn<M> const& s, dsa::Inputs<In<T>> x, dsa::Outputs<In<T>> y,
                       dsa::Saved<In<T>> saved, dsa::Outputs<In<T>> d_y, dsa::Inputs<Out<T>> d_x) {
    auto const batch = dsa::batch_of<T>(O, c, s, x, saved.indices);
    if (d_y.o.empty()) dsa::set_gradients_zero(gpu, d_x.q, d_x.k, d_x.v);
    else dsa::attend_backward<T>(gpu, s, batch, y, saved, d_y, d_x);
    bool const trains_indexer = c.stage != Stage::language_model && !d_y.auxiliary_loss.empty();
    if (trains_indexer) dsa::index_loss_backward<T>(gpu, s, batch, saved, d_y.auxiliary_loss, d_x);
    else dsa::set_gradients_zero(gpu, d_x.index_q, d_x.index_k, d_x.index_w);
  }

  // Decoding computes no auxiliary loss in any stage.
  template <std::floating_point T, class M>
  static void extend(B& gpu, dsa::Config const& c, SequencesOn<M> const& s, dsa::Inputs<In<T>> x, dsa::Cache<Out<T>> cache,
                     dsa::Outputs<Out<T>> y) requires(O.top_k_percent == 0) {
    Index const capacity = cache.keys.extent(1);
    check_fits(s, cache.keys.extent(0), capacity);
    bool const is_dense = c.stage == Stage::dense_warm_up;
    Tensor<std::int32_t, 2, B> indices{gpu, {s.tokens(), Index{is_dense ? 0 : O.top_k}}};
    auto batch = dsa::batch_of<T>(O, c, s, x, in(indices));
    batch.cache = {cache.keys, cache.values, cache.index_keys};
    Index longest = 0;
    for (Sequence const sequence : s) longest = std::max(longest, sequence.past + sequence.length);
    if (!is_dense) dsa::choose_keys(gpu, batch, s.tokens(), longest, capacity, out(indices));
    dsa::attend(gpu, batch, y.o, {});
    for_each(gpu, x.k.count(), dsa::RememberKeys<T>{x, cache, s.table()});
    for_each(gpu, x.index_k.count(), dsa::RememberIndexKeys<T>{x.index_k, cache.index_keys, s.table()});
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
