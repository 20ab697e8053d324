// Decoding on the CPU: a query of each head over the keys and values of a cache. The heads of a group take turns on a block
// of keys or values while the block is in the first-level cache, so each row is read from memory once.
#ifndef HYBRIDATTN_ATTENTION_FULL_CPU_EXTEND_HPP
#define HYBRIDATTN_ATTENTION_FULL_CPU_EXTEND_HPP

#include <hybridattn/attention/cpu_rows.hpp>
#include <hybridattn/attention/full/types.hpp>
#include <hybridattn/backend/cpu/cpu.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI::full {

// Cached and new keys and values of one head of one sequence.
template <class T> class SequenceKeys {
 public:
  using Rows = attention::Rows<T const>;

  SequenceKeys(int window, Sequence s, Index i, Index hk, Inputs<In<T>> const& x, Cache<Out<T>> const& cache)
      : past_(s.past), window_(window), ring_(cache.keys.extent(1)), cached_k_{cache.keys.row(i, 0, hk), cache.keys.stride[1]},
        cached_v_{cache.values.row(i, 0, hk), cache.values.stride[1]}, k_(attention::head_of(x.k, s, hk)),
        v_(attention::head_of(x.v, s, hk)) {}

  // Calls f(k, v, count) for each run of consecutive rows that query t sees, the oldest first.
  template <class F> HYBRIDATTN_INLINE void for_each_run(Index t, F f) const {
    Index const first = window_ == 0 ? 0 : std::max<Index>(0, past_ + t + 1 - window_);
    for (Index position = first, count = 0; position < past_; position += count) {
      Index const row = position % ring_;
      count = std::min(past_ - position, ring_ - row);
      f(from(cached_k_, row), from(cached_v_, row), count);
    }
    Index const first_new = std::max<Index>(0, first - past_);
    f(from(k_, first_new), from(v_, first_new), t + 1 - first_new);
  }
  // The same in blocks: f(number of the block's first row, k, v, number of the block's rows)
  template <class F> HYBRIDATTN_INLINE void for_each_block(Index t, F f) const {
    constexpr Index block = 32;
    Index seen = 0;
    for_each_run(t, [&](Rows k, Rows v, Index count) HYBRIDATTN_INLINE_LAMBDA {
      for (Index j = 0; j < count; j += block) f(seen + j, from(k, j), from(v, j), attention::AllRows{std::min(block, count - j)});
      seen += count;
    });
  }
  // Row j of the rows that query t sees.
  attention::KeyRows<T> at(Index t, Index j) const {
    Index const position = past_ + t + 1 - count(t) + j, row = position < past_ ? position % ring_ : position - past_;
    return position < past_ ? attention::KeyRows<T>{cached_k_[row], cached_v_[row]} : attention::KeyRows<T>{k_[row], v_[row]};
  }
  Index count(Index t) const { return window_ == 0 ? past_ + t + 1 : std::min<Index>(past_ + t + 1, window_); }

 private:
  static Rows from(Rows rows, Index first) { return {rows[first], rows.stride}; }

  Index past_, window_, ring_;
  Rows cached_k_, cached_v_, k_, v_;
};

// Query t of the heads of a group, whose rows are those of q and o. p [group, room] is scratch.
template <class T>
void attend(Index D, T scale, SequenceKeys<T> const& keys, Index t, Index group, attention::Rows<T const> q, attention::Rows<T> o, T* p,
            Index room) {
  using Rows = attention::Rows<T const>;
  attention::Rows<T> const weights{p, room};
  keys.for_each_block(t, [&](Index first, Rows k, Rows, attention::AllRows all) {
    attention::for_each_heads(group, [&](auto R, Index g) HYBRIDATTN_INLINE_LAMBDA {
      attention::dot_rows<R, T>(D, q.from(g), k, all, {weights[g] + first, room});                                    // (1)
    });
  });
  for (Index g = 0; g < group; ++g) {
    std::fill_n(o[g], D, T(0));
    T const total = attention::exponentials(scale, keys.count(t), weights[g]).total;                                  // (2)
    for (Index j = 0, count = keys.count(t); j < count; ++j) weights[g][j] *= T(1) / total;
  }
  keys.for_each_block(t, [&](Index first, Rows, Rows v, attention::AllRows all) {
    attention::for_each_heads(group, [&](auto R, Index g) HYBRIDATTN_INLINE_LAMBDA {
      attention::add_weighted_rows<R, T>(D, {weights[g] + first, room}, v, all, o.from(g));                           // (3)
    });
  });
  for (Index g = 0; g < group; ++g)
    if (!attention::is_moderate<T>(D, o[g]))
      attention::attend_in_order<T>(D, scale, q[g], keys.count(t), [&](Index j) { return keys.at(t, j); }, o[g]);
}

// Attention for the sequences with past tokens. Tasks are some queries of a group of heads.
template <class T>
void attend_cached(Cpu& cpu, int window, Config const& c, Sequences const& s, Inputs<In<T>> x, Cache<Out<T>> cache, View<T, 3> o) {
  constexpr Index piece = 8;
  Index const HK = c.num_kv_heads, group = c.num_heads / HK, pieces = ceil_div(s.longest(), piece);
  Index const room = attention::key_room<T>(cache.keys.extent(1)) + cpu::lanes<T>;   // a block's last vector may end after the last key
  Tensor<T, 2, Cpu> scratch{cpu, {Index{cpu.threads()}, group * room}};
  auto const memory = out(scratch);
  parallel_for(cpu, s.count() * HK * pieces, [&](Index task, int thread) {
    Index const i = task / pieces / HK, hk = task / pieces % HK, begin = task % pieces * piece;
    Sequence const sequence = s[static_cast<std::size_t>(i)];
    if (sequence.past == 0 || begin >= sequence.length) return;
    SequenceKeys<T> const keys{window, sequence, i, hk, x, cache};
    for (Index t = begin; t < std::min(begin + piece, sequence.length); ++t) {
      Index const n = sequence.start + t;
      attend<T>(c.head_dim, static_cast<T>(c.scale), keys, t, group, {x.q.row(n, hk * group), x.q.stride[1]},
                {o.row(n, hk * group), o.stride[1]}, memory.row(thread), room);
    }
  });
}

// Copies keys and values of new tokens into the cache; with a window, those of the last `window` tokens.
template <class T> void remember(Cpu& cpu, Sequences const& s, Inputs<In<T>> x, Cache<Out<T>> cache) {
  Index const ring = cache.keys.extent(1), HK = cache.keys.extent(2), D = cache.keys.extent(3);
  parallel_blocks(cpu, s.tokens(), 16, [&](Index first, Index last) {
    for (Index n = first; n < last; ++n) {
      Index const i = s.owners()(n);
      Sequence const sequence = s[static_cast<std::size_t>(i)];
      if (n + ring < sequence.start + sequence.length) continue;
      for (Index hk = 0; hk < HK; ++hk) {
        std::copy_n(x.k.row(n, hk), D, cache.keys.row(i, s.positions()(n) % ring, hk));
        std::copy_n(x.v.row(n, hk), D, cache.values.row(i, s.positions()(n) % ring, hk));
      }
    }
  });
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::full
#endif
