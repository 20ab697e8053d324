// Backward on the CPU. One task owns a key/value head of a sequence, so no two tasks write the same row and every sum has
// one order: query heads of the group, blocks of keys, blocks of queries. Score tiles of keys x queries become P (2), tiles of
// v x d_o become dS (4), both in their epilogues. The products (5) read only entries inside the mask's band, so entries outside
// the band need no mask.
#ifndef HYBRIDATTN_ATTENTION_FULL_CPU_BACKWARD_HPP
#define HYBRIDATTN_ATTENTION_FULL_CPU_BACKWARD_HPP

#include <hybridattn/attention/full/cpu_tiles.hpp>
#include <hybridattn/tensor/roles.hpp>

#include <limits>

namespace hybridattn::inline HYBRIDATTN_ABI::full {

// One query head: inputs, outputs and saved tensors of forward, and the gradients that backward writes.
template <class T> struct BackwardRows {
  Rows<T const> q, k, v, o, d_o;
  Rows<wide_t<T> const> lse;
  Rows<T> d_q, d_k, d_v;
};

template <class T, class Dim> class BackwardHead {
 public:
  static constexpr Index block = 64;   // queries and keys of a block
  static_assert(block % tile_columns<T> == 0 && block % tile_rows == 0);
  static Index scratch(Index D, Index longest) { return 2 * round_up(longest, block) * (D + 1) + 2 * block * block + tile_rows * D; }

  BackwardHead(Dim D, Sequence s, Index window, T scale, T* memory)
      : D_(D), length_(s.length), reach_(window), padded_(round_up(length_, block)), scale_(scale), q_t_(memory),
        d_o_t_(q_t_ + padded_ * D), lse_(d_o_t_ + padded_ * D), delta_(lse_ + padded_), p_(delta_ + padded_), d_s_(p_ + block * block),
        pad_(d_s_ + block * block) {}

  // Overwrites d_q; adds to d_k and d_v.
  void run(BackwardRows<T> const& x) {
    prepare(x);
    for (Index key = 0; key < length_; key += block)
      for (Index query = key; query < std::min(length_, key + block - 1 + reach_); query += block) {
        weights(x, key, query);
        key_gradients(x, key, query);
        query_gradients(x, key, query);
      }
  }

 private:
  static constexpr int MR = tile_rows, NV = tile_vectors;
  using Vec = cpu::Vec<T>;

  Index rows_from(Index first) const { return std::min(block, length_ - first); }   // of a block

  // Fills the tensors that the tiles read. Sets d_q to 0.
  void prepare(BackwardRows<T> const& x) {
    for (Index i = 0; i < padded_; i += block) {
      transpose_rows(D_, x.q, i, length_, block, q_t_ + i * D_);
      transpose_rows(D_, x.d_o, i, length_, block, d_o_t_ + i * D_);
      for (Index lane = 0; lane < block; lane += cpu::lanes<T>) set_delta(x.o, i + lane, d_o_t_ + i * D_ + lane);
    }
    for (Index i = 0; i < padded_; ++i) lse_[i] = i < length_ ? *x.lse[i] : T(0);
    for (Index i = 0; i < length_; ++i) std::fill_n(x.d_q[i], D_, T(0));
  }

  // delta of one vector of queries, summed in the order of a tile's d_o . v: where one key has weight 1, their difference is 0.
  void set_delta(Rows<T const> o, Index first, T const* d_o_t) {
    constexpr int n = cpu::lanes<T>;
    alignas(cpu::vector_bytes) T o_t[std::size_t{n * n}];
    Vec delta{};
    for (Index d = 0; d < D_; d += n) {
      transpose_square(o, first, length_, d, o_t, n);
      for (int r = 0; r < n; ++r) delta += cpu::load(o_t + r * n) * cpu::load(d_o_t + (d + r) * block);
    }
    cpu::store<T>(delta_ + first, delta);
  }

  // P and dS, [keys, queries], of the tiles in which a query sees a key.
  void weights(BackwardRows<T> const& x, Index key, Index query) {
    for (Index j = 0; j < rows_from(key); j += MR)
      for (Index i = 0; i < rows_from(query); i += tile_columns<T>) {
        Index const distance = query + i - (key + j);   // i - j of the tile's first row and column
        if (distance <= -tile_columns<T> || distance >= reach_ + MR - 1) continue;
        if (distance > -cpu::lanes<T>) tile_weights<0>(x, key, query, j, i);
        else tile_weights<1>(x, key, query, j, i);
      }
  }
  // All but the first `skipped` vectors of queries, which are older than every key of the tile.
  template <int skipped> HYBRIDATTN_INLINE void tile_weights(BackwardRows<T> const& x, Index key, Index query, Index j, Index i) {
    Index const column = i + skipped * cpu::lanes<T>;
    T *const p = p_ + j * block + column, *const d_s = d_s_ + j * block + column;
    T const *const lse = lse_ + query + column, *const delta = delta_ + query + column;
    auto const zero = [](int, int) HYBRIDATTN_INLINE_LAMBDA { return Vec{}; };
    auto const at = [](int r, int v) HYBRIDATTN_INLINE_LAMBDA { return r * block + v * cpu::lanes<T>; };
    cpu::tile<MR, NV - skipped, T>(
        D_, whole_tile(D_, x.k, key + j, length_, pad_), {q_t_ + query * D_ + column, block}, zero,
        [&](int r, int v, Vec s) HYBRIDATTN_INLINE_LAMBDA { cpu::store<T>(p + at(r, v), weight(s, cpu::load(lse + v * cpu::lanes<T>))); });
    cpu::tile<MR, NV - skipped, T>(D_, whole_tile(D_, x.v, key + j, length_, pad_), {d_o_t_ + query * D_ + column, block}, zero,
                                   [&](int r, int v, Vec s) HYBRIDATTN_INLINE_LAMBDA {
                                     cpu::store<T>(d_s + at(r, v),
                                                   scale_ * cpu::load(p + at(r, v)) * (s - cpu::load(delta + v * cpu::lanes<T>)));
                                   });
  }
  // exp(scale s - lse). lse has a rounded score, so this score is rounded as well: where one key has weight 1, P is exactly 1.
  HYBRIDATTN_INLINE Vec weight(Vec s, Vec lse) const { return cpu::exp<T>(cpu::in_register<T>(scale_ * s) - lse); }

  // to += a b over the band, for up to `tile_rows` rows.
  HYBRIDATTN_INLINE void add_product(Band band, cpu::Scalars<T> a, Rows<T const> b, Rows<T> to, Index rows) {
    for_each_tile_column<T>(D_, [&](Index d, auto vectors) HYBRIDATTN_INLINE_LAMBDA {
      band_tile<MR, vectors, T>(
          band, a, {b.data + d, b.stride},
          [&](int r, int v) HYBRIDATTN_INLINE_LAMBDA { return r < rows ? cpu::load(to[r] + d + v * cpu::lanes<T>) : Vec{}; },
          [&](int r, int v, Vec sum) HYBRIDATTN_INLINE_LAMBDA {
            if (r < rows) cpu::store<T>(to[r] + d + v * cpu::lanes<T>, sum);
          });
    });
  }

  // (5) d_v += P^T d_o, d_k += dS^T q
  void key_gradients(BackwardRows<T> const& x, Index key, Index query) {
    for (Index j = 0; j < rows_from(key); j += MR) {
      Band const band{key + j - query, key + j - query + reach_, rows_from(query)};
      Index const rows = std::min<Index>(MR, rows_from(key) - j);
      add_product(band, {p_ + j * block, block, 1}, {x.d_o[query], x.d_o.stride}, {x.d_v[key + j], x.d_v.stride}, rows);
      add_product(band, {d_s_ + j * block, block, 1}, {x.q[query], x.q.stride}, {x.d_k[key + j], x.d_k.stride}, rows);
    }
  }
  // (5) d_q += dS k
  void query_gradients(BackwardRows<T> const& x, Index key, Index query) {
    for (Index i = 0; i < rows_from(query); i += MR) {
      Index const newest = query + i - key;
      add_product({newest - reach_ + 1, newest + 1, rows_from(key)}, {d_s_ + i, 1, block}, {x.k[key], x.k.stride},
                  {x.d_q[query + i], x.d_q.stride}, std::min<Index>(MR, rows_from(query) - i));
    }
  }

  Dim D_;
  Index length_, reach_, padded_;
  T scale_;
  T *q_t_, *d_o_t_;                   // [padded_ / block, D, block]
  T *lse_, *delta_;                   // [padded_]
  T *p_, *d_s_, *pad_;                // [block, block], keys x queries; [tile_rows, D]
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::full
#endif
