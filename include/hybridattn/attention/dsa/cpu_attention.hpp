// Attention over chosen keys on the CPU, one query after the other. Heads that share keys go together.
#ifndef HYBRIDATTN_ATTENTION_DSA_CPU_ATTENTION_HPP
#define HYBRIDATTN_ATTENTION_DSA_CPU_ATTENTION_HPP

#include <hybridattn/attention/dsa/cpu_panels.hpp>
#include <hybridattn/attention/dsa/cpu_rows.hpp>
#include <hybridattn/attention/dsa/types.hpp>

#include <limits>
#include <numeric>

namespace hybridattn::inline HYBRIDATTN_ABI::dsa {

// The keys that each query attends to: its chosen keys, or in the dense warm-up all keys that it sees.
class KeySets {
 public:
  KeySets(Cpu& cpu, SparseOptions o, Config const& c, Sequences const& s, View<std::int32_t const, 2> chosen)
      : options_(o), dense_(c.stage == Stage::dense_warm_up), chosen_(chosen), most_(dense_ ? s.longest() : chosen.extent(1)),
        all_(cpu, dense_ ? most_ : 0) {
    if (dense_) std::iota(all_.data(), all_.data() + most_, 0);
  }
  Index most() const { return most_; }
  // The keys of query t of a sequence.
  Keys of(Sequence s, Index t) const {
    if (dense_) return {all_.data(), t + 1};
    return {chosen_.row(s.start + t), std::min(selection_size(options_, s.length), t + 1)};
  }

 private:
  SparseOptions options_;
  bool dense_;
  View<std::int32_t const, 2> chosen_;
  Index most_;
  cpu::Scratch<std::int32_t> all_;   // 0, 1, 2, ...
};

// x, with zeros in the lanes after the last of `count` keys. x starts with key j.
template <class T> HYBRIDATTN_INLINE cpu::Vec<T> real_keys(Index j, Index count, cpu::Vec<T> x) {
  using Bits = typename cpu::BitsOf<T>::type;
  if (j + cpu::lanes<T> <= count) return x;
  return cpu::select<T>(cpu::lane_numbers<T>() < static_cast<Bits>(count - j), x, cpu::Vec<T>{});
}

// Scratch for heads that share a key/value head: numbers of each head for its keys, numbers of the heads, and two panels for tiles.
template <class T> struct HeadScratch {
  static Index size(Index D, Index heads, Index keys) { return 2 * heads * row(keys) + row(heads) + panels_size(D, heads); }

  HeadScratch(Index heads, Index keys, T* memory)
      : p{memory, row(keys)}, d_s(p.from(heads)), deltas(d_s[heads]), panels(deltas + row(heads)) {}

  Rows<T> p, d_s;   // [heads, keys]
  T *deltas, *panels;

 private:
  static Index row(Index count) { return round_up(count, tile_keys<T>); }
  static Index panels_size(Index D, Index heads) { return go_by_tiles(heads) ? 2 * panel_room<T>(D) : 0; }
};

// products[h][j] = x[h] . rows[key j] for all heads.
template <class T, class Dim>
HYBRIDATTN_INLINE void dot_heads(Dim D, Rows<T const> x, Index heads, Rows<T const> rows, Keys keys, T* panel, Rows<T> products) {
  if (go_by_tiles(heads)) return dot_rows_by_tiles<T>(D, x, heads, rows, keys, panel, products);
  attention::for_each_heads(heads,
                            [&](auto R, Index h) HYBRIDATTN_INLINE_LAMBDA { dot_rows<R, T>(D, x.from(h), rows, keys, products.from(h)); });
}

// Heads of one query that share a key/value head, in forward: rows [heads, D], lse [heads].
template <class T> struct QueryHeads {
  Rows<T const> q;
  Rows<T> o;
  wide_t<T>* lse;
};
// (3)
template <class T, class Dim>
void attend(Dim D, T scale, Index heads, QueryHeads<T> x, Rows<T const> k, Rows<T const> v, Keys keys, HeadScratch<T> const& scratch) {
  Rows<T> const p = scratch.p;
  dot_heads<T>(D, x.q, heads, k, keys, scratch.panels, p);
  attention::for_each_heads(heads, [&](auto R, Index h) HYBRIDATTN_INLINE_LAMBDA {
    T factors[std::size_t{R}];
    for (int r = 0; r < R; ++r) {
      auto const softmax = attention::exponentials(scale, keys.count, p[h + r]);
      factors[r] = T(1) / softmax.total;
      x.lse[h + r] = static_cast<wide_t<T>>(softmax.lse());
    }
    attention::for_each_sum<R, T>(D, p.from(h), v, keys, [&](auto piece, int r, int i, cpu::Vec<T> sum) HYBRIDATTN_INLINE_LAMBDA {
      piece.put(x.o[h + r], i, factors[r] * sum);
    });
  });
  auto const key_at = [&](Index j) { return attention::KeyRows<T>{k[keys[j]], v[keys[j]]}; };
  for (Index h = 0; h < heads; ++h) {
    if (attention::is_moderate<T>(D, x.o[h])) continue;
    T const exact = attention::attend_in_order<T>(D, scale, x.q[h], keys.count, key_at, x.o[h]);
    if (!attention::Range<T>::holds(static_cast<T>(x.lse[h]))) x.lse[h] = static_cast<wide_t<T>>(exact);  // otherwise only values are large
  }
}

// The same heads in backward.
template <class T> struct HeadGradients {
  Rows<T const> q, o, d_o;
  wide_t<T> const* lse;
  Rows<T> d_q;
};
template <class T, class Dim> void set_deltas(Dim D, Index heads, HeadGradients<T> const& x, T* panels, T* deltas) {
  if (go_by_tiles(heads)) return deltas_by_tiles<T>(D, x.o, x.d_o, heads, panels, deltas);
  for (Index h = 0; h < heads; ++h) deltas[h] = dot_row<T>(D, x.d_o[h], x.o[h]);
}
// (4): overwrites d_q, adds to d_k and d_v.
template <class T, class Dim>
void attend_backward(Dim D, T scale, Index heads, HeadGradients<T> const& x, Rows<T const> k, Rows<T const> v, Keys keys,
                     HeadScratch<T> const& scratch, Rows<T> d_k, Rows<T> d_v) {
  Rows<T> const p = scratch.p, d_s = scratch.d_s;
  dot_heads<T>(D, x.q, heads, k, keys, scratch.panels, p);
  dot_heads<T>(D, x.d_o, heads, v, keys, scratch.panels, d_s);
  set_deltas<T>(D, heads, x, scratch.panels, scratch.deltas);
  for (Index h = 0; h < heads; ++h) {
    T const delta = scratch.deltas[h], lse = static_cast<T>(x.lse[h]);
    for (Index j = 0; j < keys.count; j += cpu::lanes<T>) {
      cpu::Vec<T> const e = cpu::exp<T>(cpu::in_register<T>(scale * cpu::load(p[h] + j)) - lse);  // a score rounded like lse
      cpu::store<T>(p[h] + j, e);
      cpu::store<T>(d_s[h] + j, scale * e * (cpu::load(d_s[h] + j) - delta));
    }
  }
  attention::for_each_heads(heads,
                            [&](auto R, Index h) HYBRIDATTN_INLINE_LAMBDA { weighted_rows<R, T>(D, d_s.from(h), k, keys, x.d_q.from(h)); });
  attention::add_to_rows<T>(D, d_s, x.q, heads, keys, d_k);
  attention::add_to_rows<T>(D, p, x.d_o, heads, keys, d_v);
}

// A task is a key/value head and some of its queries, whose keys and values stay in the second-level cache.
template <class T, class Dim>
void attend_all(Cpu& cpu, Dim D, KeySets const& sets, Config const& c, Sequences const& s, Inputs<In<T>> x, Outputs<Out<T>> y,
                Saved<Out<T>> saved) {
  constexpr Index piece = 64;
  Index const HK = c.num_kv_heads, group = c.num_heads / HK, pieces = ceil_div(s.longest(), piece), most = sets.most();
  Tensor<T, 2, Cpu> scratch{cpu, {Index{cpu.threads()}, HeadScratch<T>::size(c.head_dim, group, most)}};
  auto const memory = out(scratch);
  parallel_for(cpu, s.count() * HK * pieces, [&](Index task, int thread) {
    Sequence const sequence = s[static_cast<std::size_t>(task / pieces / HK)];
    Index const hk = task / pieces % HK, first = task % pieces * piece, last = std::min(first + piece, sequence.length);
    if (first >= last) return;
    Rows<T const> const k = head_of(x.k, sequence, hk), v = head_of(x.v, sequence, hk);
    for (Index t = first; t < last; ++t) {
      Index const n = sequence.start + t, h = hk * group;
      attend<T>(D, static_cast<T>(c.scale), group, {heads_of(x.q, n, h), heads_of(y.o, n, h), saved.lse.row(n) + h}, k, v,
                sets.of(sequence, t), {group, most, memory.row(thread)});
    }
  });
}

// One task owns a key/value head of a sequence. So no two tasks write the same row, and a task's sums run over the queries in order.
template <class T, class Dim>
void attend_all_backward(Cpu& cpu, Dim D, KeySets const& sets, Config const& c, Sequences const& s, Inputs<In<T>> x, Outputs<In<T>> y,
                         Saved<In<T>> saved, Outputs<In<T>> d_y, Inputs<Out<T>> d_x) {
  Index const HK = c.num_kv_heads, group = c.num_heads / HK, most = sets.most();
  Tensor<T, 2, Cpu> scratch{cpu, {Index{cpu.threads()}, HeadScratch<T>::size(c.head_dim, group, most)}};
  auto const memory = out(scratch);
  parallel_for(cpu, s.count() * HK, [&](Index task, int thread) {
    Sequence const sequence = s[static_cast<std::size_t>(task / HK)];
    if (sequence.length == 0) return;
    Index const hk = task % HK, h = hk * group;
    Rows<T const> const k = head_of(x.k, sequence, hk), v = head_of(x.v, sequence, hk);
    Rows<T> const d_k = head_of(d_x.k, sequence, hk), d_v = head_of(d_x.v, sequence, hk);
    HeadScratch<T> const numbers{group, most, memory.row(thread)};
    for (Index j = 0; j < sequence.length; ++j) {
      std::fill_n(d_k[j], D, T(0));
      std::fill_n(d_v[j], D, T(0));
    }
    for (Index t = 0; t < sequence.length; ++t) {
      Index const n = sequence.start + t;
      HeadGradients<T> const heads{heads_of(x.q, n, h), heads_of(y.o, n, h), heads_of(d_y.o, n, h), saved.lse.row(n) + h,
                                   heads_of(d_x.q, n, h)};
      attend_backward<T>(D, static_cast<T>(c.scale), group, heads, k, v, sets.of(sequence, t), numbers, d_k, d_v);
    }
  });
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::dsa
#endif
