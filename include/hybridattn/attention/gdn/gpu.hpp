#ifndef HYBRIDATTN_ATTENTION_GDN_GPU_HPP
#define HYBRIDATTN_ATTENTION_GDN_GPU_HPP

#include <hybridattn/attention/room.hpp>
#include <hybridattn/attention/gdn/gdn.hpp>
#include <hybridattn/attention/gdn/kernel_chunks.hpp>
#include <hybridattn/attention/gdn/kernel_chunks_backward.hpp>
#include <hybridattn/attention/gdn/kernel_steps.hpp>
#include <hybridattn/tensor/in_float.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI {
namespace gdn {

template <class F> void with_room(Config const& c, F f) { attention::with_room("GatedDeltaNet", "key_dim", c.key_dim, f); }

// A, Q and R of all chunks of a batch.
template <class T, class B> struct ChunkPairs {
  Tensor<T, 4, B> keys, queries, solved;

  ChunkPairs(B& gpu, Shape<4> shape) : keys{gpu, shape}, queries{gpu, shape}, solved{gpu, shape} {}
  void give(ChunkParams<T>& p) {
    p.key_pairs = out(keys);
    p.query_pairs = out(queries);
    p.solved = out(solved);
  }
};
template <class T, class M> ChunkParams<T> chunk_params(Config const& c, SequencesOn<M> const& s, Inputs<In<T>> x) {
  ChunkParams<T> p{};
  p.x = x;
  p.sequences = s.table().list;
  p.group = c.num_value_heads / c.num_heads;
  p.scale = static_cast<T>(c.scale);
  return p;
}
template <class T, class B, class M>
void forward_chunks(B& gpu, Config const& c, SequencesOn<M> const& s, Inputs<In<T>> x, Outputs<Out<T>> y, Saved<Out<T>> saved) {
  auto p = chunk_params<T>(c, s, x);
  p.o = y.o;
  p.error = saved.error;
  p.final_state = y.final_state;
  with_room(c, [&](auto K) {
    using Of = Tiling<T, K()>;
    Index const HV = c.num_value_heads, chunks = Of::count_chunks(s);
    ChunkPairs<T, B> pairs{gpu, {chunks, HV, Of::chunk, Of::chunk}};
    pairs.give(p);
    p.tiles = ceil_div(c.value_dim, Index{Of::columns});
    launch<PrepareChunks<T, K()>>(gpu, {.x = chunks, .y = c.num_heads}, p);
    launch<ForwardChunks<T, K()>>(gpu, {.x = p.tiles * s.count(), .y = HV}, p);
  });
}
template <class T, class B, class M>
void backward_chunks(B& gpu, Config const& c, SequencesOn<M> const& s, Inputs<In<T>> x, Saved<In<T>> saved, Outputs<In<T>> d_y,
                     Inputs<Out<T>> d_x) {
  auto p = chunk_params<T>(c, s, x);
  p.saved_error = saved.error;
  p.d_o = d_y.o;
  p.d_final_state = d_y.final_state;
  p.d_x = d_x;
  with_room(c, [&](auto K) {
    using Of = Tiling<T, K()>;
    Index const HV = c.num_value_heads, chunks = Of::count_chunks(s);
    Shape<4> const of_states{chunks, HV, c.key_dim, c.value_dim};
    ChunkPairs<T, B> pairs{gpu, {chunks, HV, Of::chunk, Of::chunk}};
    Tensor<T, 4, B> states{gpu, of_states}, gradients{gpu, of_states};
    Tensor<T, 3, B> projected{gpu, {s.tokens(), HV, c.value_dim}};
    pairs.give(p);
    p.states = out(states);
    p.gradients = out(gradients);
    p.projected = out(projected);
    p.tiles = ceil_div(c.value_dim, Index{Of::columns});
    Grid const scan{.x = p.tiles * s.count(), .y = HV}, all_chunks{.x = chunks, .y = c.num_heads};
    launch<PrepareChunks<T, K()>>(gpu, all_chunks, p);
    launch<StatesOfChunks<T, K()>>(gpu, scan, p);
    launch<GradientsOfStates<T, K()>>(gpu, scan, p);
    launch<GradientsOfTokens<T, K()>>(gpu, all_chunks, p);
  });
}

// Token by token: decoding, where `extends`, and the judge of the chunks.
template <class T, class B, class M>
void forward_steps(B& gpu, Config const& c, SequencesOn<M> const& s, Inputs<In<T>> x, Outputs<Out<T>> y, Saved<Out<T>> saved,
                   bool extends) {
  ForwardStepsParams<T> p{};
  p.x = x;
  p.o = y.o;
  p.error = saved.error;
  p.final_state = y.final_state;
  p.sequences = s.table().list;
  p.group = c.num_value_heads / c.num_heads;
  p.scale = static_cast<T>(c.scale);
  p.extends = extends;
  with_room(c, [&](auto K) {
    using Kernel = ForwardSteps<T, K()>;
    p.tiles = ceil_div(c.value_dim, Index{Kernel::columns});
    launch<Kernel>(gpu, {.x = p.tiles * s.count(), .y = c.num_value_heads}, p);
  });
}
template <class T, class B, class M>
void backward_steps(B& gpu, Config const& c, SequencesOn<M> const& s, Inputs<In<T>> x, Saved<In<T>> saved, Outputs<In<T>> d_y,
                    Inputs<Out<T>> d_x) {
  BackwardStepsParams<T> p{};
  p.x = x;
  p.error = saved.error;
  p.d_o = d_y.o;
  p.d_final_state = d_y.final_state;
  p.d_v = d_x.v;
  p.d_initial_state = d_x.initial_state;
  p.sequences = s.table().list;
  p.group = c.num_value_heads / c.num_heads;
  p.scale = static_cast<T>(c.scale);
  with_room(c, [&](auto K) {
    using Kernel = BackwardSteps<T, K()>;
    Index const HV = c.num_value_heads, tiles = ceil_div(c.value_dim, Index{Kernel::columns});
    Tensor<T, 5, B> states{gpu, {Kernel::count_pieces(s), HV, tiles, Kernel::elements, Kernel::threads}};
    Tensor<T, 4, B> parts{gpu, {tiles, s.tokens(), HV, Kernel::sums}};
    Tensor<double, 4, B> paths{gpu, {tiles, s.tokens(), HV, Kernel::paths}};
    p.states = out(states);
    p.parts = out(parts);
    p.paths = out(paths);
    p.tiles = tiles;
    launch<Kernel>(gpu, {.x = tiles * s.count(), .y = HV}, p);
    for_each(gpu, d_x.q.count(), SumKeyGradients<T>{in(parts), d_x.q, d_x.k, K(), p.group, p.scale});
    for_each(gpu, d_x.g.count(), SumGateGradients<T>{in(parts), in(paths), p.x.g, d_x.g, d_x.beta, K()});
  });
}

}  // namespace gdn

template <GdnOptions O, GpuBackend B> struct On<GatedDeltaNet<O>, B> : InFloat<GatedDeltaNet<O>, B> {
  using InFloat<GatedDeltaNet<O>, B>::forward, InFloat<GatedDeltaNet<O>, B>::backward, InFloat<GatedDeltaNet<O>, B>::extend;
  template <std::floating_point T, class M>
  static void forward(B& gpu, gdn::Config const& c, SequencesOn<M> const& s, gdn::Inputs<In<T>> x, gdn::Outputs<Out<T>> y,
                      gdn::Saved<Out<T>> saved) {
    gdn::forward_chunks<T>(gpu, c, s, x, y, saved);
  }

  template <std::floating_point T, class M>
  static void backward(B& gpu, gdn::Config const& c, SequencesOn<M> const& s, gdn::Inputs<In<T>> x, gdn::Outputs<In<T>>,
                       gdn::Saved<In<T>> saved, gdn::Outputs<In<T>> d_y, gdn::Inputs<Out<T>> d_x) {
    gdn::backward_chunks<T>(gpu, c, s, x, saved, d_y, d_x);
  }

  // Forward from the states in the cache to these states, token by token: a step of decoding has one token of each sequence.
  template <std::floating_point T, class M>
  static void extend(B& gpu, gdn::Config const& c, SequencesOn<M> const& s, gdn::Inputs<In<T>> x, gdn::Cache<Out<T>> cache,
                     gdn::Outputs<Out<T>> y) {
    check_fits(s, cache.state.extent(0), std::numeric_limits<Index>::max());
    x.initial_state = cache.state;
    gdn::forward_steps<T>(gpu, c, s, x, {.o = y.o, .final_state = cache.state}, {}, true);
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
