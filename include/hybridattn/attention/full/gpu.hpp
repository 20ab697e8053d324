#ifndef HYBRIDATTN_ATTENTION_FULL_GPU_HPP
#define HYBRIDATTN_ATTENTION_FULL_GPU_HPP

#include <hybridattn/attention/room.hpp>
#include <hybridattn/attention/full/full.hpp>
#include <hybridattn/attention/full/kernels.hpp>
#include <hybridattn/tensor/in_float.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI {
namespace full {

template <class F> void with_room(Config const& c, F f) { attention::with_room("FullAttention", "head_dim", c.head_dim, f); }

template <class T, class M> KernelParams<T> kernel_params(FullOptions o, Config const& c, SequencesOn<M> const& s, Inputs<In<T>> x) {
  KernelParams<T> p{};
  p.x = x;
  p.sequences = s.table().list;
  p.window = o.window;
  p.group = c.num_heads / c.num_kv_heads;
  p.scale = static_cast<T>(c.scale);
  return p;
}
// A block for each tile of each sequence and head.
template <class Kernel, class B> void launch_tiles(B& gpu, Sequences const& s, Index heads, typename Kernel::Params p) {
  p.tiles = ceil_div(s.longest(), Kernel::rows);
  launch<Kernel>(gpu, {.x = p.tiles * s.count(), .y = heads}, p);
}

template <class T, class B> void forward(B& gpu, Config const& c, Sequences const& s, KernelParams<T> const& p) {
  with_room(c, [&](auto D) { launch_tiles<Forward<T, D()>>(gpu, s, c.num_heads, p); });
}
template <class T, class B> void backward(B& gpu, Config const& c, Sequences const& s, KernelParams<T> p) {
  Tensor<wide_t<T>, 2, B> delta{gpu, p.y_lse.shape};
  p.delta = out(delta);
  with_room(c, [&](auto D) {
    launch_tiles<QueryGradients<T, D()>>(gpu, s, c.num_heads, p);
    launch_tiles<KeyGradients<T, D()>>(gpu, s, c.num_kv_heads, p);
  });
}

}  // namespace full

template <FullOptions O, GpuBackend B> struct On<FullAttention<O>, B> : InFloat<FullAttention<O>, B> {
  using InFloat<FullAttention<O>, B>::forward, InFloat<FullAttention<O>, B>::backward, InFloat<FullAttention<O>, B>::extend;
  template <std::floating_point T, class M>
  static void forward(B& gpu, full::Config const& c, SequencesOn<M> const& s, full::Inputs<In<T>> x, full::Outputs<Out<T>> y,
                      full::Saved<Out<T>> saved) {
    auto p = full::kernel_params<T>(O, c, s, x);
    p.o = y.o;
    p.lse = saved.lse;
    full::forward(gpu, c, s, p);
  }

  template <std::floating_point T, class M>
  static void backward(B& gpu, full::Config const& c, SequencesOn<M> const& s, full::Inputs<In<T>> x, full::Outputs<In<T>> y,
                       full::Saved<In<T>> saved, full::Outputs<In<T>> d_y, full::Inputs<Out<T>> d_x) {
    auto p = full::kernel_params<T>(O, c, s, x);
    p.y = y.o;
    p.d_o = d_y.o;
    p.y_lse = saved.lse;
    p.d_x = d_x;
    full::backward(gpu, c, s, p);
  }

  // Sequences without past tokens are computed by the tiles of forward, other sequences token by token over the rows of the cache.
  template <std::floating_point T, class M>
  static void extend(B& gpu, full::Config const& c, SequencesOn<M> const& s, full::Inputs<In<T>> x, full::Cache<Out<T>> cache,
                     full::Outputs<Out<T>> y) {
    Index const ring = cache.keys.extent(1);
    check_fits(s, cache.keys.extent(0), ring == O.window ? std::numeric_limits<Index>::max() : ring);
    if (s.any_begin()) {
      Tensor<wide_t<T>, 2, B> lse{gpu, {s.tokens(), c.num_heads}};
      auto p = full::kernel_params<T>(O, c, s, x);
      p.o = y.o;
      p.lse = out(lse);
      p.skips_continued = true;
      full::forward(gpu, c, s, p);
    }
    full::ExtendParams<T> const p{x, cache, y.o, s.table(), O.window, c.num_heads / c.num_kv_heads, static_cast<T>(c.scale)};
    if (s.any_continue()) full::with_room(c, [&](auto D) { launch<full::Decode<T, D()>>(gpu, {.x = s.tokens(), .y = c.num_heads}, p); });
    for_each(gpu, x.k.count(), full::Remember<T>{x, cache, s.table()});
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
