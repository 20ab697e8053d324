// Attention over chosen keys on the CPU, one query and one head after the other.
#ifndef HYBRIDATTN_ATTENTION_DSA_CPU_ATTENTION_HPP
#define HYBRIDATTN_ATTENTION_DSA_CPU_ATTENTION_HPP

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

// (3) for one query and one head. p is scratch with a number for each key.
template <class T, class Dim>
HYBRIDATTN_INLINE void attend(Dim D, T scale, T const* q, Rows<T const> k, Rows<T const> v, Keys keys, T* p, T* o, wide_t<T>& lse) {
  dot_rows<T>(D, q, k, keys, p);
  auto const softmax = attention::exponentials(scale, keys.count, p);
  weighted_rows<T>(D, p, v, keys, T(1) / softmax.total, o);
  lse = static_cast<wide_t<T>>(softmax.lse());
  if (attention::is_moderate<T>(D, o)) return;
  auto const key_at = [&](Index j) { return attention::KeyRows<T>{k[keys[j]], v[keys[j]]}; };
  T const exact = attention::attend_in_order<T>(D, scale, q, keys.count, key_at, o);
  if (!attention::Range<T>::holds(static_cast<T>(lse))) lse = static_cast<wide_t<T>>(exact);   // otherwise only values are large
}

// The tensors of one query and one head in backward.
template <class T> struct QueryGradient {
  T const *q, *o, *d_o;
  wide_t<T> lse;
  T* d_q;
};
// (4): overwrites d_q, adds to d_k and d_v. p and d_s are scratch with a number for each key.
template <class T, class Dim>
HYBRIDATTN_INLINE void attend_backward(Dim D, T scale, QueryGradient<T> x, Rows<T const> k, Rows<T const> v, Keys keys, T* p, T* d_s,
                                       Rows<T> d_k, Rows<T> d_v) {
  dot_rows<T>(D, x.q, k, keys, p);
  dot_rows<T>(D, x.d_o, v, keys, d_s);
  T const delta = dot_row<T>(D, x.d_o, x.o), lse = static_cast<T>(x.lse);
  for (Index j = 0; j < keys.count; j += cpu::lanes<T>) {
    cpu::Vec<T> const e = cpu::exp<T>(cpu::in_register<T>(scale * cpu::load(p + j)) - lse);   // a score rounded like lse
    cpu::store<T>(p + j, e);
    cpu::store<T>(d_s + j, scale * e * (cpu::load(d_s + j) - delta));
  }
  for_each_piece<T>(D, [&](auto piece) HYBRIDATTN_INLINE_LAMBDA {
    constexpr int V = piece.vectors;
    cpu::Vec<T> d_q[std::size_t{V}] = {}, q[std::size_t{V}], d_o[std::size_t{V}];
    HYBRIDATTN_UNROLL
    for (int i = 0; i < V; ++i) {
      q[i] = piece.get(x.q, i);
      d_o[i] = piece.get(x.d_o, i);
    }
    for (Index j = 0; j < keys.count; ++j) {
      Index const key = keys.indices[j];
      T const* const k_row = k[key];
      T *const d_k_row = d_k[key], *const d_v_row = d_v[key], p_j = p[j], d_s_j = d_s[j];
      HYBRIDATTN_UNROLL
      for (int i = 0; i < V; ++i) {
        d_q[i] += d_s_j * piece.get(k_row, i);
        piece.put(d_k_row, i, piece.get(d_k_row, i) + d_s_j * q[i]);
        piece.put(d_v_row, i, piece.get(d_v_row, i) + p_j * d_o[i]);
      }
    }
    HYBRIDATTN_UNROLL
    for (int i = 0; i < V; ++i) piece.put(x.d_q, i, d_q[i]);
  });
}

// A task is a head and some of its queries, whose keys and values stay in the second-level cache.
template <class T, class Dim>
void attend_all(Cpu& cpu, Dim D, KeySets const& sets, Config const& c, Sequences const& s, Inputs<In<T>> x, Outputs<Out<T>> y,
                Saved<Out<T>> saved) {
  constexpr Index piece = 64;
  Index const H = c.num_heads, group = H / c.num_kv_heads, pieces = ceil_div(s.longest(), piece);
  Tensor<T, 2, Cpu> scratch{cpu, {Index{cpu.threads()}, key_room<T>(sets.most())}};
  auto const memory = out(scratch);
  parallel_for(cpu, s.count() * H * pieces, [&](Index task, int thread) {
    Sequence const sequence = s[static_cast<std::size_t>(task / pieces / H)];
    Index const h = task / pieces % H, first = task % pieces * piece, last = std::min(first + piece, sequence.length);
    if (first >= last) return;
    Rows<T const> const q = head_of(x.q, sequence, h), k = head_of(x.k, sequence, h / group), v = head_of(x.v, sequence, h / group);
    Rows<T> const output = head_of(y.o, sequence, h);
    for (Index t = first; t < last; ++t)
      attend<T>(D, static_cast<T>(c.scale), q[t], k, v, sets.of(sequence, t), memory.row(thread), output[t],
                saved.lse(sequence.start + t, h));
  });
}

// One task owns a key/value head of a sequence. So no two tasks write the same row, and a task's sums run over the queries in order.
template <class T, class Dim>
void attend_all_backward(Cpu& cpu, Dim D, KeySets const& sets, Config const& c, Sequences const& s, Inputs<In<T>> x, Outputs<In<T>> y,
                         Saved<In<T>> saved, Outputs<In<T>> d_y, Inputs<Out<T>> d_x) {
  Index const HK = c.num_kv_heads, group = c.num_heads / HK, room = key_room<T>(sets.most());
  Tensor<T, 2, Cpu> scratch{cpu, {Index{cpu.threads()}, 2 * room}};
  auto const memory = out(scratch);
  parallel_for(cpu, s.count() * HK, [&](Index task, int thread) {
    Sequence const sequence = s[static_cast<std::size_t>(task / HK)];
    if (sequence.length == 0) return;
    Index const hk = task % HK;
    Rows<T const> const k = head_of(x.k, sequence, hk), v = head_of(x.v, sequence, hk);
    Rows<T> const d_k = head_of(d_x.k, sequence, hk), d_v = head_of(d_x.v, sequence, hk);
    T* const p = memory.row(thread);
    for (Index j = 0; j < sequence.length; ++j) {
      std::fill_n(d_k[j], D, T(0));
      std::fill_n(d_v[j], D, T(0));
    }
    for (Index t = 0; t < sequence.length; ++t) {
      Index const n = sequence.start + t;
      Keys const keys = sets.of(sequence, t);
      for (Index h = hk * group; h < (hk + 1) * group; ++h)
        attend_backward<T>(D, static_cast<T>(c.scale), {x.q.row(n, h), y.o.row(n, h), d_y.o.row(n, h), saved.lse(n, h), d_x.q.row(n, h)}, k,
                           v, keys, p, p + room, d_k, d_v);
    }
  });
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::dsa
#endif
