// Forward on the CPU. Each lane is a query: scores are tiles of keys x queries, and the product with v reads their weights
// transposed.
//
// The block on the diagonal comes first. Its largest score is the query's reference for all other blocks, so weights are
// computed in the score tile's epilogue and no sum is rescaled. Any reference gives the same o. Where a weight would exceed e^10, a
// larger reference replaces it, for that query alone, so values up to 1e30 do not overflow. Products q . k are compared before they are
// scaled. So the largest product is exactly its own reference, for any size, and one replacement is enough.
#ifndef HYBRIDATTN_ATTENTION_FULL_CPU_FORWARD_HPP
#define HYBRIDATTN_ATTENTION_FULL_CPU_FORWARD_HPP

#include <hybridattn/attention/full/cpu_tiles.hpp>
#include <hybridattn/tensor/roles.hpp>

#include <limits>
#include <numbers>

namespace hybridattn::inline HYBRIDATTN_ABI::full {

inline constexpr Index forward_keys = 128;   // keys of a block; 64 to 256 are equally fast

template <class T, class Dim> class ForwardBlock {
 public:
  static constexpr Index queries = tile_columns<T>;
  static Index scratch(Index D) { return 2 * queries * D + forward_keys * queries + tile_rows * D; }

  ForwardBlock(Dim D, Sequence s, Index window, T scale, Rows<T const> k, Rows<T const> v, T* memory)
      : D_(D), length_(s.length), reach_(window), scale_(scale), size_(std::abs(scale)), slope_(size_ * cpu::log2_e<T>), k_(k), v_(v),
        q_t_(memory), o_(q_t_ + queries * D), p_(o_ + queries * D), pad_(p_ + forward_keys * queries) {}

  // Computes o and lse of the queries first .. first + queries - 1, up to the last query.
  void run(Index first, Rows<T const> q, Rows<T> o, Rows<wide_t<T>> lse) {
    first_ = first;
    transpose_rows(D_, q, first, length_, queries, q_t_);
    if (scale_ < 0)   // so that the largest product has the largest score
      for (Index i = 0; i < D_ * queries; ++i) q_t_[i] = -q_t_[i];
    diagonal();
    for (Index key = std::max<Index>(0, first - reach_ + 1) / MR * MR; key < first; key += forward_keys) {
      Index const count = std::min(forward_keys, first - key);
      if (key > first + queries - 1 - reach_) earlier<false>(key, count);
      else earlier<true>(key, count);
    }
    finish(q, o, lse);
  }

 private:
  static constexpr int MR = tile_rows, NV = tile_vectors;
  static constexpr T limit = 10, far = 80;   // largest exponents: of a weight, and of a weight that can still be scaled afterwards
  using Vec = cpu::Vec<T>;
  using Mask = cpu::Mask<T>;

  // Which queries of vector v see the key.
  HYBRIDATTN_INLINE Mask sees(Index key, int v) const {
    using Bits = typename cpu::BitsOf<T>::type;
    Mask const newer = cpu::lane_numbers<T>() + static_cast<Bits>(first_ + v * cpu::lanes<T> - key);   // i - j
    return (newer >= Bits(0)) & (newer < static_cast<Bits>(reach_));
  }
  // Vectors of queries that are older than every key of the tile. The tile skips them.
  static int first_vector(Index key_in_block) { return key_in_block >= cpu::lanes<T> ? 1 : 0; }

  // p = q . k of `tile_rows` keys and all vectors of queries but the first `from`, masked or not.
  template <int from> HYBRIDATTN_INLINE void diagonal_scores(Index key, Vec (&largest)[NV]) {
    T* const p = p_ + (key - first_) * queries + from * cpu::lanes<T>;
    cpu::tile<MR, NV - from, T>(
        D_, whole_tile(D_, k_, key, length_, pad_), {q_t_ + from * cpu::lanes<T>, queries},
        [](int, int) HYBRIDATTN_INLINE_LAMBDA { return Vec{}; },
        [&](int r, int v, Vec s) HYBRIDATTN_INLINE_LAMBDA {
          Vec const seen = cpu::select<T>(sees(key + r, from + v), s, cpu::broadcast<T>(-std::numeric_limits<T>::infinity()));
          largest[from + v] = cpu::max<T>(largest[from + v], seen);
          cpu::store<T>(p + r * queries + v * cpu::lanes<T>, s);
        });
  }

  // e^(score - reference), from products; above e^88 any number.
  HYBRIDATTN_INLINE Vec exponential(Vec s, Vec reference) const { return cpu::exp2_below_most<T>((s - reference) * slope_); }

  // The largest product that a query sees becomes its reference. If a query sees one key only, this key's weight is exactly 1.
  void diagonal() {
    Index const count = std::min(queries, length_ - first_);
    Vec largest[NV], sum[NV] = {};
    for (Vec& m : largest) m = cpu::broadcast<T>(-std::numeric_limits<T>::infinity());
    for (Index j = 0; j < count; j += MR) {
      if (first_vector(j) == 0) diagonal_scores<0>(first_ + j, largest);
      else diagonal_scores<1>(first_ + j, largest);
    }
    for (Index j = 0; j < count; ++j)
      for (int v = first_vector(j / MR * MR); v < NV; ++v) {
        T* const p = p_ + j * queries + v * cpu::lanes<T>;
        Vec const e = exponential(cpu::load(p), largest[v]);
        sum[v] += cpu::select<T>(sees(first_ + j, v), e, Vec{});
        cpu::store<T>(p, e);
      }
    for (int v = 0; v < NV; ++v) softmax_[v] = {largest[v], sum[v]};
    add_values<true>(first_, count);
  }

  // p = exp(score - reference) of keys before the block.
  template <bool masked> HYBRIDATTN_INLINE void weights(Index key, Index count, Vec (&largest)[NV], Vec (&sum)[NV]) {
    Vec reference[NV];
    for (int v = 0; v < NV; ++v) {
      reference[v] = softmax_[v].reference;
      largest[v] = cpu::broadcast<T>(-std::numeric_limits<T>::infinity());
      sum[v] = Vec{};
    }
    for (Index j = 0; j < count; j += MR) {
      T* const p = p_ + j * queries;
      cpu::tile<MR, NV, T>(
          D_, {k_[key + j], k_.stride, 1}, {q_t_, queries}, [](int, int) HYBRIDATTN_INLINE_LAMBDA { return Vec{}; },
          [&](int r, int v, Vec s) HYBRIDATTN_INLINE_LAMBDA {
            if constexpr (masked) s = cpu::select<T>(sees(key + j + r, v), s, cpu::broadcast<T>(-std::numeric_limits<T>::infinity()));
            largest[v] = cpu::max<T>(largest[v], s);
            Vec e = exponential(s, reference[v]);
            if constexpr (masked) e = cpu::select<T>(sees(key + j + r, v), e, Vec{});
            sum[v] += e;
            cpu::store<T>(p + r * queries + v * cpu::lanes<T>, e);
          });
    }
  }

  template <bool masked> void earlier(Index key, Index count) {
    Vec largest[NV], sum[NV];
    weights<masked>(key, count, largest, sum);
    if (is_beaten(largest, far)) {   // their exponentials may be infinite
      for (int v = 0; v < NV; ++v) raise_reference(v, largest[v], far);
      weights<masked>(key, count, largest, sum);
    }
    if (is_beaten(largest, limit))
      for (int v = 0; v < NV; ++v) {
        Vec const shrink = raise_reference(v, largest[v], limit);
        sum[v] *= shrink;
        for (T* p = p_ + v * cpu::lanes<T>; p < p_ + count * queries; p += queries) cpu::store<T>(p, shrink * cpu::load(p));
      }
    for (int v = 0; v < NV; ++v) softmax_[v].total += sum[v];
    add_values<false>(key, count);
  }

  bool is_beaten(Vec const (&largest)[NV], T by) const { return cpu::any<T>(beaten(0, largest[0], by) | beaten(1, largest[1], by)); }
  Mask beaten(int v, Vec largest, T by) const { return (largest - softmax_[v].reference) * size_ > by; }
  // Makes `largest` the reference where its weight is above e^by. Returns the factor for earlier sums: 1, and no bit changes, where
  // the reference stays.
  Vec raise_reference(int v, Vec largest, T by) {
    Vec const raised = cpu::select<T>(beaten(v, largest, by), largest, softmax_[v].reference);
    Vec const shrink = softmax_[v].rebase(raised, [&](Vec x, Vec y) HYBRIDATTN_INLINE_LAMBDA { return exponential(x, y); });
    for (int lane = 0; lane < cpu::lanes<T>; ++lane)
      for (Index d = 0; d < D_; ++d) o_[(v * cpu::lanes<T> + lane) * D_ + d] *= shrink[lane];
    return shrink;
  }

  // (3) o (+)= P v
  template <bool overwrite> HYBRIDATTN_INLINE void add_values(Index key, Index count) {
    for_each_tile_column<T>(D_, [&](Index d, auto vectors) HYBRIDATTN_INLINE_LAMBDA {
      for (Index i = 0; i < queries; i += MR) {
        T* const o = o_ + i * D_ + d;
        Index const newest = first_ + i - key;
        band_tile<MR, vectors, T>(
            {newest - reach_ + 1, newest + 1, count}, {p_ + i, 1, queries}, {v_[key] + d, v_.stride},
            [&](int r, int v) HYBRIDATTN_INLINE_LAMBDA { return overwrite ? Vec{} : cpu::load(o + r * D_ + v * cpu::lanes<T>); },
            [&](int r, int v, Vec x) HYBRIDATTN_INLINE_LAMBDA { cpu::store<T>(o + r * D_ + v * cpu::lanes<T>, x); });
      }
    });
  }

  // (2), (3)
  void finish(Rows<T const> q, Rows<T> o, Rows<wide_t<T>> lse) {
    alignas(cpu::vector_bytes) T inverse[std::size_t{queries}], logarithm[std::size_t{queries}];
    attention::Range<T> range;
    for (int v = 0; v < NV; ++v) {
      Vec const score = cpu::in_register<T>(size_ * softmax_[v].reference);   // rounded, as in backward
      range.add(score);
      cpu::store<T>(inverse + v * cpu::lanes<T>, T(1) / softmax_[v].total);
      cpu::store<T>(logarithm + v * cpu::lanes<T>, score + std::numbers::ln2_v<T> * cpu::log2<T>(softmax_[v].total));
    }
    Index const count = std::min(queries, length_ - first_);
    for (Index i = 0; i < count; ++i) {
      *lse[first_ + i] = logarithm[i];
      for (Index d = 0; d < D_; d += cpu::lanes<T>) {
        Vec const x = cpu::load(o_ + i * D_ + d);
        range.add(x);
        cpu::store<T>(o[first_ + i] + d, inverse[i] * x);
      }
    }
    if (range.is_moderate()) return;
    for (Index i = 0; i < count; ++i) {
      bool const keeps_lse = attention::Range<T>::holds(logarithm[i]);   // then only values are large
      if (keeps_lse && attention::is_moderate<T>(D_, o_ + i * D_)) continue;
      T const exact = in_order(first_ + i, q, o);
      if (!keeps_lse) *lse[first_ + i] = exact;
    }
  }
  T in_order(Index query, Rows<T const> q, Rows<T> o) const {
    Index const oldest = std::max<Index>(0, query - reach_ + 1);
    auto const key_at = [&](Index j) { return attention::KeyRows<T>{k_[oldest + j], v_[oldest + j]}; };
    return attention::attend_in_order<T>(D_, scale_, q[query], query - oldest + 1, key_at, o[query]);
  }

  Dim D_;
  Index length_, reach_, first_ = 0;
  T scale_, size_, slope_;           // size: its absolute value, slope: for powers of 2
  Rows<T const> k_, v_;
  T *q_t_, *o_, *p_, *pad_;          // [D, queries], [queries, D], [forward_keys, queries], [tile_rows, D]
  attention::OnlineSoftmax<Vec> softmax_[NV];   // of products before they are scaled
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::full
#endif
