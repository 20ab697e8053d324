// Attention of one query on the CPU: products with rows that are read in place. The lanes are entries of a head.
#ifndef HYBRIDATTN_ATTENTION_CPU_ROWS_HPP
#define HYBRIDATTN_ATTENTION_CPU_ROWS_HPP

#include <hybridattn/attention/online_softmax.hpp>
#include <hybridattn/backend/cpu/vectors.hpp>
#include <hybridattn/core/math.hpp>
#include <hybridattn/core/sequences.hpp>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

namespace hybridattn::inline HYBRIDATTN_ABI::attention {

// Rows of one head, [T, D].
template <class T> struct Rows {
  T* data;
  Index stride;

  HYBRIDATTN_INLINE T* operator[](Index i) const { return data + i * stride; }
  HYBRIDATTN_INLINE Rows from(Index first) const { return {data + first * stride, stride}; }
  HYBRIDATTN_INLINE operator Rows<T const>() const requires(!std::is_const_v<T>) { return {data, stride}; }
};
template <class T> Rows<T> head_of(View<T, 3> x, Sequence s, Index head) { return {x.row(s.start, head), x.stride[0]}; }
// Rows of one token, [H, D], from a head on.
template <class T> Rows<T> heads_of(View<T, 3> x, Index n, Index head) { return {x.row(n, head), x.stride[1]}; }

// The rows 0 .. count - 1. Other sets of rows have the same members.
struct AllRows {
  Index count;
  HYBRIDATTN_INLINE Index operator[](Index j) const { return j; }
};
// The size of an array with a number for each key, in whole vectors.
template <class T> Index key_room(Index keys) { return round_up(keys, cpu::lanes<T>); }

// V vectors of a row, from entry d on, that are computed together. The last vector of a row may be short: ShortPiece.
template <class T, int V> struct Piece {
  static constexpr int vectors = V;
  Index d;
  HYBRIDATTN_INLINE cpu::Vec<T> get(T const* row, int v) const { return cpu::load(row + d + v * cpu::lanes<T>); }
  HYBRIDATTN_INLINE void put(T* row, int v, cpu::Vec<T> x) const { cpu::store<T>(row + d + v * cpu::lanes<T>, x); }
};
template <class T> struct ShortPiece {
  static constexpr int vectors = 1;
  cpu::Slot<T> slot;
  HYBRIDATTN_INLINE cpu::Vec<T> get(T const* row, int) const { return slot.get(row); }
  HYBRIDATTN_INLINE void put(T* row, int, cpu::Vec<T> x) const { slot.put(row, x); }
};
// Pieces of at most `most` vectors: 1, 2 or 4.
template <class T, int most = 4, class Dim, class F> HYBRIDATTN_INLINE void for_each_piece(Dim D, F f) {
  constexpr int n = cpu::lanes<T>;
  Index d = 0;
  for (; d + most * n <= D; d += most * n) f(Piece<T, most>{d});
  if constexpr (most > 2)
    if (d + 2 * n <= D) {
      f(Piece<T, 2>{d});
      d += 2 * n;
    }
  if constexpr (most > 1)
    if (d + n <= D) {
      f(Piece<T, 1>{d});
      d += n;
    }
  if (d < D) f(ShortPiece<T>{{d, D - d}});
}

// Calls f(R, first) for `count` heads that share keys: R heads from `first` on are computed together, so that a row of their keys or
// values is read once for all of them.
template <class F> HYBRIDATTN_INLINE void for_each_heads(Index count, F f) {
  constexpr int together = cpu::tuning.shared.rows;
  Index h = 0;
  for (; h + together <= count; h += together) f(std::integral_constant<int, together>{}, h);
  for (; h < count; ++h) f(std::integral_constant<int, 1>{}, h);
}

// Whether results are so far below T's largest number that their sums could not overflow in any order. Other results, NaN included,
// are computed again by the reference's loops, so they are infinite or NaN exactly where those loops are.
template <class T> class Range {
 public:
  HYBRIDATTN_INLINE void add(cpu::Vec<T> x) {
    Mask const size = reinterpret_cast<Mask>(x) & std::numeric_limits<Bits>::max();   // ordered as absolute values, NaN above all
    largest_ = size > largest_ ? size : largest_;
  }
  HYBRIDATTN_INLINE static bool holds(T x) { return std::abs(x) <= moderate; }
  HYBRIDATTN_INLINE bool is_moderate() const { return !cpu::any<T>(largest_ > std::bit_cast<Bits>(moderate)); }

 private:
  static constexpr T moderate = std::numeric_limits<T>::max() * T(0x1p-20);
  using Mask = cpu::Mask<T>;
  using Bits = typename cpu::BitsOf<T>::type;
  Mask largest_{};
};
template <class T, class Dim> HYBRIDATTN_INLINE bool is_moderate(Dim D, T const* x) {
  Range<T> range;
  cpu::for_each_vector<T>(0, D, [&](cpu::Slot<T> s) HYBRIDATTN_INLINE_LAMBDA { range.add(s.get(x)); });
  return range.is_moderate();
}

template <class T, class Keys> [[gnu::noinline]] void dot_rows_in_order(Index D, T const* x, Rows<T const> rows, Keys keys, T* products) {
  for (Index j = 0; j < round_up(keys.count, cpu::lanes<T>); ++j) products[j] = dot(x, rows[keys[std::min(j, keys.count - 1)]], D);
}

// Computes rows of products again where a product is not moderate.
template <class T, class Keys>
HYBRIDATTN_INLINE void keep_moderate(Index D, Rows<T const> x, Index count, Rows<T const> rows, Keys keys, Rows<T> products) {
  for (Index r = 0; r < count; ++r) {
    Range<T> range;
    for (Index j = 0; j < keys.count; j += cpu::lanes<T>) range.add(cpu::load(products[r] + j));
    if (!range.is_moderate()) dot_rows_in_order<T>(D, x[r], rows, keys, products[r]);
  }
}

// products[r][j] = x[r] . rows[key j] for R rows x and every key. The last vector of each row of products is padded with the last key's.
template <int R, class T, class Dim, class Keys>
HYBRIDATTN_INLINE void dot_rows(Dim D, Rows<T const> x, Rows<T const> rows, Keys keys, Rows<T> products) {
  constexpr int n = cpu::lanes<T>, K = R == 1 ? n : std::max(n / R, 2);   // keys together
  for (Index j = 0; j < round_up(keys.count, n); j += K) {
    T const* row[std::size_t{K}];
    HYBRIDATTN_UNROLL
    for (int k = 0; k < K; ++k) row[k] = rows[keys[std::min(j + k, keys.count - 1)]];
    cpu::Vec<T> sums[std::size_t{R * K}] = {};
    for_each_piece<T>(D, [&](auto piece) HYBRIDATTN_INLINE_LAMBDA {
      HYBRIDATTN_UNROLL
      for (int v = 0; v < piece.vectors; ++v) {
        cpu::Vec<T> of_x[std::size_t{R}];
        HYBRIDATTN_UNROLL
        for (int r = 0; r < R; ++r) of_x[r] = cpu::in_register<T>(piece.get(x[r], v));
        HYBRIDATTN_UNROLL
        for (int k = 0; k < K; ++k) {
          cpu::Vec<T> const of_key = R == 1 ? piece.get(row[k], v) : cpu::in_register<T>(piece.get(row[k], v));
          HYBRIDATTN_UNROLL
          for (int r = 0; r < R; ++r) sums[r * K + k] += of_x[r] * of_key;
        }
      }
    });
    T sum[std::size_t{R * K}];
    cpu::sum_each<R * K, T>(sums, sum);
    HYBRIDATTN_UNROLL
    for (int r = 0; r < R; ++r) std::memcpy(products[r] + j, sum + r * K, sizeof(T) * std::size_t{K});
  }
  keep_moderate<T>(D, x, R, rows, keys, products);
}
// x . y, summed in the order of dot_rows: where one key has weight 1, d_o . v - delta is then exactly 0.
template <class T, class Dim> HYBRIDATTN_INLINE T dot_row(Dim D, T const* x, T const* y) {
  cpu::Vec<T> sum{};
  for_each_piece<T>(D, [&](auto piece) HYBRIDATTN_INLINE_LAMBDA {
    HYBRIDATTN_UNROLL
    for (int v = 0; v < piece.vectors; ++v) sum += piece.get(x, v) * piece.get(y, v);
  });
  T result;
  cpu::sum_each<1, T>(&sum, &result);
  return Range<T>::holds(result) ? result : scaled_dot(T(1), x, y, D);
}

// One row of attention, computed by the reference's loops. Returns its lse. key_at(j) has the rows k and v of key j.
template <class T, class KeyAt> [[gnu::noinline]] T attend_in_order(Index D, T scale, T const* q, Index count, KeyAt key_at, T* o) {
  constexpr T infinity = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
  T largest = -infinity, sum = 0;
  for (Index j = 0; j < count; ++j) {
    T const score = scaled_dot(scale, q, key_at(j).k, D);
    if (!(score < infinity)) {   // all results would be NaN
      std::fill_n(o, D, nan);
      return nan;
    }
    largest = std::max(largest, score);
  }
  std::fill_n(o, D, T(0));
  for (Index j = 0; j < count; ++j) {
    T const p = std::exp(scaled_dot(scale, q, key_at(j).k, D) - largest);
    sum += p;
    axpy(p, key_at(j).v, o, D);
  }
  for (Index d = 0; d < D; ++d) o[d] /= sum;
  return largest + std::log(sum);
}
template <class T> struct KeyRows {
  T const *k, *v;
};

// p = exp(scale p - reference), where the reference is the largest of scale p. Also writes the elements after the last of `count`
// numbers, up to a whole vector. Products are compared before they are scaled, so the largest product less itself is exactly 0.
template <class T> HYBRIDATTN_INLINE OnlineSoftmax<T> exponentials(T scale, Index count, T* p) {
  using cpu::lanes;
  constexpr T infinity = std::numeric_limits<T>::infinity();
  T const sign = scale < 0 ? T(-1) : T(1), size = std::abs(scale), slope = size * cpu::log2_e<T>;
  std::fill(p + count, p + round_up(count, lanes<T>), -sign * infinity);   // whose exponential is 0
  cpu::Vec<T> most = cpu::broadcast<T>(-infinity), sum{};
  for (Index j = 0; j < count; j += lanes<T>) most = cpu::max<T>(most, sign * cpu::load(p + j));
  T const largest = cpu::largest<T>(most);
  for (Index j = 0; j < count; j += lanes<T>) {
    cpu::Vec<T> const e = cpu::exp2_below_most<T>((sign * cpu::load(p + j) - largest) * slope);
    sum += e;
    cpu::store<T>(p + j, e);
  }
  return {cpu::in_register<T>(size * cpu::broadcast<T>(largest))[0], cpu::sum<T>(sum)};   // a rounded score
}

// total[r][v] = sum_j p[r][j] rows[key j] for R heads and a piece of the rows, in several sums where one would keep the CPU waiting.
template <int R, class T, class Piece, class Keys>
HYBRIDATTN_INLINE void sum_piece(Piece piece, Rows<T const> p, Rows<T const> rows, Keys keys, cpu::Vec<T>* total) {
  constexpr int V = Piece::vectors, chains = std::clamp(8 / (R * V), 1, 4);
  cpu::Vec<T> sum[std::size_t{chains}][std::size_t{R}][std::size_t{V}] = {};
  auto const add = [&](Index j, int chain) HYBRIDATTN_INLINE_LAMBDA {
    T const* const row = rows[keys[j]];
    HYBRIDATTN_UNROLL
    for (int v = 0; v < V; ++v) {
      cpu::Vec<T> const of_key = R == 1 ? piece.get(row, v) : cpu::in_register<T>(piece.get(row, v));
      HYBRIDATTN_UNROLL
      for (int r = 0; r < R; ++r) sum[chain][r][v] += p[r][j] * of_key;
    }
  };
  Index j = 0;
  for (; j + chains <= keys.count; j += chains) {
    HYBRIDATTN_UNROLL
    for (int chain = 0; chain < chains; ++chain) add(j + chain, chain);
  }
  for (; j < keys.count; ++j) add(j, 0);
  HYBRIDATTN_UNROLL
  for (int i = 0; i < R * V; ++i) {
    total[i] = sum[0][i / V][i % V];
    HYBRIDATTN_UNROLL
    for (int chain = 1; chain < chains; ++chain) total[i] += sum[chain][i / V][i % V];
  }
}
// Calls store(piece, r, v, sum_j p[r][j] rows[key j]) for R heads and every vector of a row.
template <int R, class T, class Dim, class Keys, class Store>
HYBRIDATTN_INLINE void for_each_sum(Dim D, Rows<T const> p, Rows<T const> rows, Keys keys, Store store) {
  for_each_piece<T, (R == 1 ? 4 : cpu::tuning.shared.vectors)>(D, [&](auto piece) HYBRIDATTN_INLINE_LAMBDA {
    constexpr int V = piece.vectors;
    cpu::Vec<T> total[std::size_t{R * V}];
    sum_piece<R, T>(piece, p, rows, keys, total);
    HYBRIDATTN_UNROLL
    for (int i = 0; i < R * V; ++i) store(piece, i / V, i % V, total[i]);
  });
}
// o[r] = sum_j p[r][j] rows[key j]
template <int R, class T, class Dim, class Keys>
HYBRIDATTN_INLINE void weighted_rows(Dim D, Rows<T const> p, Rows<T const> rows, Keys keys, Rows<T> o) {
  for_each_sum<R, T>(D, p, rows, keys,
                     [&](auto piece, int r, int v, cpu::Vec<T> sum) HYBRIDATTN_INLINE_LAMBDA { piece.put(o[r], v, sum); });
}
// o[r] += sum_j p[r][j] rows[key j]
template <int R, class T, class Dim, class Keys>
HYBRIDATTN_INLINE void add_weighted_rows(Dim D, Rows<T const> p, Rows<T const> rows, Keys keys, Rows<T> o) {
  for_each_sum<R, T>(D, p, rows, keys, [&](auto piece, int r, int v, cpu::Vec<T> sum) HYBRIDATTN_INLINE_LAMBDA {
    piece.put(o[r], v, piece.get(o[r], v) + sum);
  });
}

// rows[key j + i] += sum_h weights[h][j + i] x[h] for `count` heads and K keys.
template <int K, class T, class Dim, class Keys>
HYBRIDATTN_INLINE void add_to_keys(Dim D, Rows<T const> weights, Rows<T const> x, Index count, Keys keys, Index j, Rows<T> rows) {
  for_each_piece<T, cpu::tuning.shared.vectors>(D, [&](auto piece) HYBRIDATTN_INLINE_LAMBDA {
    constexpr int V = piece.vectors;
    cpu::Vec<T> sum[std::size_t{K}][std::size_t{V}];
    HYBRIDATTN_UNROLL
    for (int i = 0; i < K * V; ++i) sum[i / V][i % V] = piece.get(rows[keys[j + i / V]], i % V);
    for (Index h = 0; h < count; ++h) {
      T const *const row = x[h], *const weight = weights[h] + j;
      HYBRIDATTN_UNROLL
      for (int v = 0; v < V; ++v) {
        cpu::Vec<T> const of_x = cpu::in_register<T>(piece.get(row, v));
        HYBRIDATTN_UNROLL
        for (int i = 0; i < K; ++i) sum[i][v] += weight[i] * of_x;
      }
    }
    HYBRIDATTN_UNROLL
    for (int i = 0; i < K * V; ++i) piece.put(rows[keys[j + i / V]], i % V, sum[i / V][i % V]);
  });
}
// rows[key j] += sum_h weights[h][j] x[h] for `count` heads and every key: each row is read and written once. No key comes twice.
template <class T, class Dim, class Keys>
HYBRIDATTN_INLINE void add_to_rows(Dim D, Rows<T const> weights, Rows<T const> x, Index count, Keys keys, Rows<T> rows) {
  constexpr int K = cpu::tuning.shared.rows;
  Index j = 0;
  for (; j + K <= keys.count; j += K) add_to_keys<K, T>(D, weights, x, count, keys, j, rows);
  for (; j < keys.count; ++j) add_to_keys<1, T>(D, weights, x, count, keys, j, rows);
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::attention
#endif
