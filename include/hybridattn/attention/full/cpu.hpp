#ifndef HYBRIDATTN_ATTENTION_FULL_CPU_HPP
#define HYBRIDATTN_ATTENTION_FULL_CPU_HPP

#include <hybridattn/attention/full/cpu_backward.hpp>
#include <hybridattn/attention/full/cpu_extend.hpp>
#include <hybridattn/attention/full/cpu_forward.hpp>
#include <hybridattn/attention/full/types.hpp>
#include <hybridattn/core/with_constant.hpp>
#include <hybridattn/tensor/in_float.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI {
namespace full {

// Tasks are pieces of a head's queries, those with the most keys first. On one thread, or with many heads, a task is a whole head.
template <class T, class Dim>
void forward_tiled(Cpu& cpu, Dim D, int window, Config const& c, Sequences const& s, Inputs<In<T>> x, Outputs<Out<T>> y,
                   Saved<Out<T>> saved) {
  using Queries = ForwardBlock<T, Dim>;
  if (s.tokens() == 0) return;
  Index const H = c.num_heads, group = H / c.num_kv_heads, heads = s.count() * H, tasks = cpu.threads() == 1 ? 1 : 8 * cpu.threads();
  Index const piece = round_up(ceil_div(s.longest() * heads, tasks), Queries::queries), pieces = ceil_div(s.longest(), piece);
  Tensor<T, 2, Cpu> scratch{cpu, {Index{cpu.threads()}, Queries::scratch(D)}};
  auto const memory = out(scratch);
  parallel_for(cpu, pieces * heads, [&](Index task, int thread) {
    Sequence const sequence = s[static_cast<std::size_t>(task % heads / H)];
    Index const begin = (pieces - 1 - task / heads) * piece, end = std::min(begin + piece, sequence.length);
    if (begin >= end) return;
    Index const h = task % H, hk = h / group;
    Queries block{D,
                  sequence,
                  reach(window, sequence),
                  static_cast<T>(c.scale),
                  head_of(x.k, sequence, hk),
                  head_of(x.v, sequence, hk),
                  memory.row(thread)};
    for (Index first = begin; first < end; first += Queries::queries)
      block.run(first, head_of(x.q, sequence, h), head_of(y.o, sequence, h), {&saved.lse(sequence.start, h), saved.lse.stride[0]});
  });
}

template <class T, class Dim>
void backward_tiled(Cpu& cpu, Dim D, int window, Config const& c, Sequences const& s, Inputs<In<T>> x, Outputs<In<T>> y, Saved<In<T>> saved,
                    Outputs<In<T>> d_y, Inputs<Out<T>> d_x) {
  using Head = BackwardHead<T, Dim>;
  if (s.tokens() == 0) return;
  Index const HK = c.num_kv_heads, group = c.num_heads / HK;
  Tensor<T, 2, Cpu> scratch{cpu, {Index{cpu.threads()}, Head::scratch(D, s.longest())}};
  auto const memory = out(scratch);
  parallel_for(cpu, s.count() * HK, [&](Index task, int thread) {
    Sequence const sequence = s[static_cast<std::size_t>(task / HK)];
    if (sequence.length == 0) return;
    Index const hk = task % HK;
    Rows<T> const d_k = head_of(d_x.k, sequence, hk), d_v = head_of(d_x.v, sequence, hk);
    for (Index j = 0; j < sequence.length; ++j) {
      std::fill_n(d_k[j], D, T(0));
      std::fill_n(d_v[j], D, T(0));
    }
    Head head{D, sequence, reach(window, sequence), static_cast<T>(c.scale), memory.row(thread)};
    for (Index h = hk * group; h < (hk + 1) * group; ++h)
      head.run({.q = head_of(x.q, sequence, h),
                .k = head_of(x.k, sequence, hk),
                .v = head_of(x.v, sequence, hk),
                .o = head_of(y.o, sequence, h),
                .d_o = head_of(d_y.o, sequence, h),
                .lse = {&saved.lse(sequence.start, h), saved.lse.stride[0]},
                .d_q = head_of(d_x.q, sequence, h),
                .d_k = d_k,
                .d_v = d_v});
  });
}

// A compile-time D = 32 makes backward 5 % faster; 16 gains 1 to 4 %, 64, 128 and 256 less than 1 %, too little to compile the
// kernels again.
template <class F> void with_head_dim(Index D, F f) {
  with_constant<32>(D, f, [&] { f(D); });
}

// The kernels need heads of whole vectors. Other heads are copied and padded with zeros, which change no product.
template <class T> Tensor<T, 3, Cpu> widened(Cpu& cpu, View<T const, 3> x) {
  Index const H = x.extent(1), D = x.extent(2);
  Tensor<T, 3, Cpu> tensor{cpu, {x.extent(0), H, round_up(D, cpu::lanes<T>)}};
  auto const wide = out(tensor);
  parallel_blocks(cpu, x.extent(0) * H, 256, [&](Index first, Index last) {
    for (Index row = first; row < last; ++row) {
      T* const to = std::copy_n(x.row(row / H, row % H), D, wide.row(row / H, row % H));
      std::fill_n(to, wide.extent(2) - D, T(0));
    }
  });
  return tensor;
}
template <class T> void narrow(Cpu& cpu, View<T const, 3> wide, View<T, 3> x) {
  Index const H = x.extent(1);
  parallel_blocks(cpu, x.extent(0) * H, 256, [&](Index first, Index last) {
    for (Index row = first; row < last; ++row) std::copy_n(wide.row(row / H, row % H), x.extent(2), x.row(row / H, row % H));
  });
}

template <class T>
void forward(Cpu& cpu, FullOptions o, Config const& c, Sequences const& s, Inputs<In<T>> x, Outputs<Out<T>> y, Saved<Out<T>> saved) {
  if (c.head_dim % cpu::lanes<T> == 0)
    return with_head_dim(c.head_dim, [&](auto D) { forward_tiled<T>(cpu, D, o.window, c, s, x, y, saved); });
  auto const q = widened(cpu, x.q), k = widened(cpu, x.k), v = widened(cpu, x.v);
  Tensor<T, 3, Cpu> wide_o{cpu, q.shape()};
  Config wide = c;
  wide.head_dim = q.shape()[2];
  forward<T>(cpu, o, wide, s, {.q = in(q), .k = in(k), .v = in(v)}, {.o = out(wide_o)}, saved);
  narrow(cpu, in(wide_o), y.o);
}
template <class T>
void backward(Cpu& cpu, FullOptions o, Config const& c, Sequences const& s, Inputs<In<T>> x, Outputs<In<T>> y, Saved<In<T>> saved,
              Outputs<In<T>> d_y, Inputs<Out<T>> d_x) {
  if (c.head_dim % cpu::lanes<T> == 0)
    return with_head_dim(c.head_dim, [&](auto D) { backward_tiled<T>(cpu, D, o.window, c, s, x, y, saved, d_y, d_x); });
  auto const q = widened(cpu, x.q), k = widened(cpu, x.k), v = widened(cpu, x.v), wide_o = widened(cpu, y.o), d_o = widened(cpu, d_y.o);
  Tensor<T, 3, Cpu> d_q{cpu, q.shape()}, d_k{cpu, k.shape()}, d_v{cpu, v.shape()};
  Config wide = c;
  wide.head_dim = q.shape()[2];
  backward<T>(cpu, o, wide, s, {.q = in(q), .k = in(k), .v = in(v)}, {.o = in(wide_o)}, saved, {.o = in(d_o)},
              {.q = out(d_q), .k = out(d_k), .v = out(d_v)});
  narrow(cpu, in(d_q), d_x.q);
  narrow(cpu, in(d_k), d_x.k);
  narrow(cpu, in(d_v), d_x.v);
}

// Sequences without past tokens are computed by the tiles of forward, other sequences over rows of the cache.
template <class T>
void extend(Cpu& cpu, FullOptions o, Config const& c, Sequences const& s, Inputs<In<T>> x, Cache<Out<T>> cache, Outputs<Out<T>> y) {
  Index const ring = cache.keys.extent(1);
  check_fits(s, cache.keys.extent(0), ring == o.window ? std::numeric_limits<Index>::max() : ring);
  if (s.any_begin()) {   // first, because it may overwrite the rows of the other sequences
    Tensor<wide_t<T>, 2, Cpu> lse{cpu, {s.tokens(), c.num_heads}};
    forward<T>(cpu, o, c, s.beginnings(), x, y, {.lse = out(lse)});
  }
  if (s.any_continue()) attend_cached<T>(cpu, o.window, c, s, x, cache, y.o);
  remember<T>(cpu, s, x, cache);
}

}  // namespace full

template <FullOptions O> struct On<FullAttention<O>, Cpu> : InFloat<FullAttention<O>, Cpu> {
  using InFloat<FullAttention<O>, Cpu>::forward, InFloat<FullAttention<O>, Cpu>::backward, InFloat<FullAttention<O>, Cpu>::extend;
  template <std::floating_point T>
  static void forward(Cpu& cpu, full::Config const& c, Sequences const& s, full::Inputs<In<T>> x, full::Outputs<Out<T>> y,
                      full::Saved<Out<T>> saved) {
    full::forward(cpu, O, c, s, x, y, saved);
  }
  template <std::floating_point T>
  static void backward(Cpu& cpu, full::Config const& c, Sequences const& s, full::Inputs<In<T>> x, full::Outputs<In<T>> y,
                       full::Saved<In<T>> saved, full::Outputs<In<T>> d_y, full::Inputs<Out<T>> d_x) {
    full::backward(cpu, O, c, s, x, y, saved, d_y, d_x);
  }
  template <std::floating_point T>
  static void extend(Cpu& cpu, full::Config const& c, Sequences const& s, full::Inputs<In<T>> x, full::Cache<Out<T>> cache,
                     full::Outputs<Out<T>> y) {
    full::extend(cpu, O, c, s, x, cache, y);
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
