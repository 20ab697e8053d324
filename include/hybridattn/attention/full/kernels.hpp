// Full attention as kernels, in exact arithmetic. Numbers in brackets are equations of full.hpp.
//
// A block of threads has a tile of rows: queries in forward and for d_q, keys for d_k and d_v. It goes through the tiles of the other
// side (arXiv 2307.08691). A row of the tile has a few neighbouring lanes of one warp. Lane c of them has the columns c, c + lanes, ... of
// the tile of scores, and the entries c, c + lanes, ... of the head.
// A mask is the bounds of a loop, not a weight of zero: 0 times a NaN behind the mask would be NaN.
#ifndef HYBRIDATTN_ATTENTION_FULL_KERNELS_HPP
#define HYBRIDATTN_ATTENTION_FULL_KERNELS_HPP

#include <hybridattn/attention/full/types.hpp>
#include <hybridattn/backend/gpu/gpu.hpp>
#include <hybridattn/tensor/sequences_on.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI::full {

// Tiles for heads with room for D entries. Four of them and two of scores fit into 99 KB of shared memory.
template <class T, int D> struct Tiling {
  static constexpr int bytes = static_cast<int>(sizeof(T)) * D;   // of a row
  static constexpr int rows = bytes < 1024 ? 32 : bytes < 2048 ? 16 : 8;
  static constexpr int lanes = rows == 32 ? 4 : 8;
  static constexpr int threads = rows * lanes;
  static constexpr int columns = rows / lanes, entries = D / lanes;   // of a lane
};

// Rows of a head in shared memory. Entries that the head does not have are zeros.
template <class T, int D> struct Tile {
  using Of = Tiling<T, D>;
  simt::Table<T, Of::rows, D + 1> row;   // one more, so that the rows begin in different banks

  // Rows first, first + 1, ... of head h of a sequence. Rows behind its end are zeros.
  HYBRIDATTN_DEVICE void load(View<T const, 3> from, Sequence s, Index h, Index first) {
    Index const dim = from.extent(2);
    for (int i = simt::thread_id(); i < Of::rows * D; i += Of::threads) {
      int const r = i / D, d = i % D;
      row[r][d] = first + r < s.length && d < dim ? from(s.start + first + r, h, d) : T(0);
    }
  }
};
template <class T, std::size_t columns> HYBRIDATTN_DEVICE T dot_rows(T const (&a)[columns], T const (&b)[columns]) {
  T sum = 0;
  HYBRIDATTN_UNROLL_8_IN_KERNEL
  for (int d = 0; d < static_cast<int>(columns) - 1; ++d) sum += a[d] * b[d];
  return sum;
}

template <class T> struct KernelParams {
  Inputs<In<T>> x;
  View<T, 3> o;
  View<wide_t<T>, 2> lse;
  // Only in backward.
  View<T const, 3> y, d_o;
  View<wide_t<T> const, 2> y_lse;
  View<wide_t<T>, 2> delta;
  Inputs<Out<T>> d_x;

  View<Sequence const, 1> sequences;
  Index tiles;    // of the longest sequence
  Index window;   // 0: none
  Index group;    // query heads of a key/value head
  T scale;
  bool skips_continued;   // sequences with past tokens
};

// The rows of a block: a tile of one head of one sequence.
template <class T> struct Place {
  Sequence sequence;
  Index first, head, reach;

  // The last tiles of a sequence start first, because their queries have the most keys.
  HYBRIDATTN_DEVICE Place(KernelParams<T> const& p, int rows)
      : sequence(p.sequences(simt::block_x() / p.tiles)), first((p.tiles - 1 - simt::block_x() % p.tiles) * rows), head(simt::block_y()),
        reach(p.window == 0 ? sequence.length : p.window) {}
  HYBRIDATTN_DEVICE bool is_empty(KernelParams<T> const& p) const {
    return first >= sequence.length || (p.skips_continued && sequence.past > 0);
  }
  // The first row of the first tile of keys that a query of this tile sees.
  HYBRIDATTN_DEVICE Index first_key(int rows) const { return simt::larger<Index>(first - reach + 1, 0) / rows * rows; }
};
// Rows begin .. end - 1 of a tile.
struct Range {
  int begin, end;
  HYBRIDATTN_DEVICE bool holds(int row) const { return begin <= row && row < end; }
};
// Those of the rows from .. to - 1 of a sequence that are in the tile from row `first` on.
HYBRIDATTN_DEVICE Range within(Index from, Index to, Index first, int rows) {
  return {static_cast<int>(simt::larger<Index>(from - first, 0)), static_cast<int>(simt::smaller<Index>(to - first, rows))};
}
// The softmax of the scores that a row has seen so far: attention::OnlineSoftmax for a kernel. nvcc takes no function for both machines
// that on the CPU may have vectors.
template <class T> struct SeenScores {
  T largest = -simt::infinity<T>(), total = 0;   // sum of e^(score - largest)

  // Returns the factor for all sums that were weighted by e^(score - largest).
  HYBRIDATTN_DEVICE T raise(T next) {
    T const factor = std::exp(largest - next);
    largest = next;
    total *= factor;
    return factor;
  }
  HYBRIDATTN_DEVICE T lse() const { return largest + std::log(total); }
};

// o and lse of a tile of queries.
template <class T, int D> struct Forward {
  using Of = Tiling<T, D>;
  static constexpr int threads = Of::threads, rows = Of::rows, lanes = Of::lanes;
  using Params = KernelParams<T>;
  struct Shared {
    Tile<T, D> q, kv;
    simt::Table<T, rows, rows + 1> weights;
  };

  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    Place<T> const at{p, rows};
    if (at.is_empty(p)) return;
    int const r = simt::thread_id() / lanes, c = simt::thread_id() % lanes;
    Index const i = at.first + r, hk = at.head / p.group;
    T o[Of::entries] = {};
    SeenScores<T> softmax;
    shared.q.load(p.x.q, at.sequence, at.head, at.first);
    for (Index key = at.first_key(rows); key <= at.first; key += rows) {
      shared.kv.load(p.x.k, at.sequence, hk, key);
      simt::sync_block();
      Range const seen = within(i - at.reach + 1, i + 1, key, rows);
      T const shrink = weigh(shared, p.scale, seen, r, c, softmax);
      simt::sync_block();   // all keys are read, all weights are written
      shared.kv.load(p.x.v, at.sequence, hk, key);
      simt::sync_block();
      HYBRIDATTN_UNROLL_IN_KERNEL
      for (int n = 0; n < Of::entries; ++n) o[n] *= shrink;
      for (int j = seen.begin; j < seen.end; ++j) {
        HYBRIDATTN_UNROLL_IN_KERNEL
        for (int n = 0; n < Of::entries; ++n) o[n] += shared.weights[r][j] * shared.kv.row[j][c + n * lanes];   // (3)
      }
      simt::sync_block();
    }
    if (i >= at.sequence.length) return;
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int n = 0; n < Of::entries; ++n)
      if (c + n * lanes < p.o.extent(2)) p.o(at.sequence.start + i, at.head, c + n * lanes) = o[n] / softmax.total;
    if (c == 0) p.lse(at.sequence.start + i, at.head) = softmax.lse();                                          // (2)
  }

 private:
  // Writes the weights of row r for the keys of the tile. Returns the factor for what was summed before.
  static HYBRIDATTN_DEVICE T weigh(Shared& shared, T scale, Range seen, int r, int c, SeenScores<T>& softmax) {
    T scores[Of::columns], largest = softmax.largest;
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int n = 0; n < Of::columns; ++n) {
      int const j = c + n * lanes;
      scores[n] = -simt::infinity<T>();
      if (seen.holds(j)) scores[n] = simt::rounded_product(scale, dot_rows(shared.q.row[r], shared.kv.row[j]));  // (1)
      largest = simt::larger(largest, scores[n]);
    }
    largest = simt::largest_of_lanes<lanes>(largest);
    bool const sees_none = seen.begin >= rows;   // of the keys up to here
    T const shrink = sees_none ? T(1) : softmax.raise(largest);
    T added = 0;
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int n = 0; n < Of::columns; ++n) {
      T const weight = sees_none ? T(0) : std::exp(scores[n] - largest);
      added += weight;
      shared.weights[r][c + n * lanes] = weight;
    }
    softmax.total += simt::sum_lanes<lanes>(added);
    return shrink;
  }
};

// delta and d_q of a tile of queries.
template <class T, int D> struct QueryGradients {
  using Of = Tiling<T, D>;
  static constexpr int threads = Of::threads, rows = Of::rows, lanes = Of::lanes;
  using Params = KernelParams<T>;
  struct Shared {
    Tile<T, D> q, d_o, k, v;
    simt::Table<T, rows, rows + 1> d_s;
  };

  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    Place<T> const at{p, rows};
    if (at.is_empty(p)) return;
    int const r = simt::thread_id() / lanes, c = simt::thread_id() % lanes;
    Index const i = at.first + r, hk = at.head / p.group, n_i = at.sequence.start + i;
    bool const is_query = i < at.sequence.length;
    shared.q.load(p.x.q, at.sequence, at.head, at.first);
    shared.d_o.load(p.d_o, at.sequence, at.head, at.first);
    shared.v.load(p.y, at.sequence, at.head, at.first);
    simt::sync_block();
    // The order of dot_rows: where one key has all the weight, o is its v, and the two terms of (4) cancel.
    T const delta = dot_rows(shared.d_o.row[r], shared.v.row[r]), lse = is_query ? p.y_lse(n_i, at.head) : T(0);
    if (is_query && c == 0) p.delta(n_i, at.head) = delta;
    simt::sync_block();
    T d_q[Of::entries] = {};
    for (Index key = at.first_key(rows); key <= at.first; key += rows) {
      shared.k.load(p.x.k, at.sequence, hk, key);
      shared.v.load(p.x.v, at.sequence, hk, key);
      simt::sync_block();
      Range const seen = within(i - at.reach + 1, is_query ? i + 1 : 0, key, rows);
      HYBRIDATTN_UNROLL_IN_KERNEL
      for (int n = 0; n < Of::columns; ++n) {
        int const j = c + n * lanes;
        if (!seen.holds(j)) continue;
        T const weight = std::exp(simt::rounded_product(p.scale, dot_rows(shared.q.row[r], shared.k.row[j])) - lse);   // (2)
        shared.d_s[r][j] = p.scale * weight * (dot_rows(shared.d_o.row[r], shared.v.row[j]) - delta);                  // (4)
      }
      simt::sync_warp();
      for (int j = seen.begin; j < seen.end; ++j) {
        HYBRIDATTN_UNROLL_IN_KERNEL
        for (int n = 0; n < Of::entries; ++n) d_q[n] += shared.d_s[r][j] * shared.k.row[j][c + n * lanes];             // (5)
      }
      simt::sync_block();
    }
    if (!is_query) return;
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int n = 0; n < Of::entries; ++n)
      if (c + n * lanes < p.d_x.q.extent(2)) p.d_x.q(n_i, at.head, c + n * lanes) = d_q[n];
  }
};

// d_k and d_v of a tile of keys: the sums go through the query heads of the group and their queries in order, without atomics.
template <class T, int D> struct KeyGradients {
  using Of = Tiling<T, D>;
  static constexpr int threads = Of::threads, rows = Of::rows, lanes = Of::lanes;
  using Params = KernelParams<T>;
  struct Shared {
    Tile<T, D> k, v, q, d_o;
    simt::Table<T, rows, rows + 1> weights, d_s;
  };

  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    Place<T> const at{p, rows};
    if (at.is_empty(p)) return;
    int const r = simt::thread_id() / lanes, c = simt::thread_id() % lanes;
    Index const j = at.first + r, last_query = simt::smaller(at.first + rows - 1 + at.reach, at.sequence.length);
    T d_k[Of::entries] = {}, d_v[Of::entries] = {};
    shared.k.load(p.x.k, at.sequence, at.head, at.first);
    shared.v.load(p.x.v, at.sequence, at.head, at.first);
    for (Index h = at.head * p.group; h < (at.head + 1) * p.group; ++h)
      for (Index query = at.first; query < last_query; query += rows) {
        shared.q.load(p.x.q, at.sequence, h, query);
        shared.d_o.load(p.d_o, at.sequence, h, query);
        simt::sync_block();
        Range const seen = within(j, simt::smaller(j + at.reach, at.sequence.length), query, rows);
        HYBRIDATTN_UNROLL_IN_KERNEL
        for (int n = 0; n < Of::columns; ++n) {
          int const i = c + n * lanes;
          if (!seen.holds(i)) continue;
          Index const n_i = at.sequence.start + query + i;
          T const weight = std::exp(simt::rounded_product(p.scale, dot_rows(shared.q.row[i], shared.k.row[r])) - p.y_lse(n_i, h));
          shared.weights[r][i] = weight;
          shared.d_s[r][i] = p.scale * weight * (dot_rows(shared.d_o.row[i], shared.v.row[r]) - p.delta(n_i, h));
        }
        simt::sync_warp();
        for (int i = seen.begin; i < seen.end; ++i) {
          HYBRIDATTN_UNROLL_IN_KERNEL
          for (int n = 0; n < Of::entries; ++n) {
            d_k[n] += shared.d_s[r][i] * shared.q.row[i][c + n * lanes];                                               // (5)
            d_v[n] += shared.weights[r][i] * shared.d_o.row[i][c + n * lanes];
          }
        }
        simt::sync_block();
      }
    if (j >= at.sequence.length) return;
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int n = 0; n < Of::entries; ++n)
      if (c + n * lanes < p.d_x.k.extent(2)) {
        p.d_x.k(at.sequence.start + j, at.head, c + n * lanes) = d_k[n];
        p.d_x.v(at.sequence.start + j, at.head, c + n * lanes) = d_v[n];
      }
  }
};

// ---- decoding

template <class T> struct ExtendParams {
  Inputs<In<T>> x;
  Cache<Out<T>> cache;
  View<T, 3> o;
  SequenceTable sequences;
  Index window, group;   // window 0: none
  T scale;
};

// Keys and values by their positions in a sequence, cached or new.
template <class T> struct KeysAt {
  ExtendParams<T> const& p;
  Sequence sequence;
  Index number, head;   // of the sequence, of the key/value head

  HYBRIDATTN_DEVICE T key(Index position, Index d) const { return entry(p.cache.keys, p.x.k, position, d); }
  HYBRIDATTN_DEVICE T value(Index position, Index d) const { return entry(p.cache.values, p.x.v, position, d); }

 private:
  HYBRIDATTN_DEVICE T entry(View<T const, 4> cached, View<T const, 3> fresh, Index position, Index d) const {
    return position < sequence.past ? cached(number, position % cached.extent(1), head, d)
                                    : fresh(sequence.start + position - sequence.past, head, d);
  }
};

// o of one new token of a sequence with past tokens, in one head. A lane of the first warp has a key of a tile, a thread entries of o.
template <class T, int D> struct Decode {
  static constexpr int threads = 128, keys = 32, entries = (D + threads - 1) / threads;
  using Params = ExtendParams<T>;
  struct Shared {
    simt::Array<T, D + 1> q;
    simt::Table<T, keys, D + 1> kv;
    simt::Array<T, keys> scores, weights;
  };

  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    Index const n = simt::block_x(), h = simt::block_y(), number = p.sequences.owners(n), dim = p.o.extent(2);
    KeysAt<T> const at{p, p.sequences.list(number), number, h / p.group};
    if (at.sequence.past == 0) return;
    Index const end = Index{p.sequences.positions(n)} + 1, first = p.window == 0 ? 0 : simt::larger<Index>(end - p.window, 0);
    simt::Array<T, entries> o = {};
    SeenScores<T> softmax;
    for (int d = simt::thread_id(); d < D; d += threads) shared.q[d] = d < dim ? p.x.q(n, h, d) : T(0);
    for (Index key = first; key < end; key += keys) {
      int const count = static_cast<int>(simt::smaller<Index>(end - key, keys));
      for (int i = simt::thread_id(); i < count * D; i += threads)
        shared.kv[i / D][i % D] = i % D < dim ? at.key(key + i / D, i % D) : T(0);
      simt::sync_block();
      T const shrink = weigh(shared, p.scale, count, softmax);
      for (int i = simt::thread_id(); i < count * D; i += threads)
        shared.kv[i / D][i % D] = i % D < dim ? at.value(key + i / D, i % D) : T(0);
      simt::sync_block();
      HYBRIDATTN_UNROLL_IN_KERNEL
      for (int e = 0; e < entries; ++e) {
        int const d = simt::thread_id() + e * threads;
        o[e] *= shrink;
        for (int j = 0; j < count && d < D; ++j) o[e] += shared.weights[j] * shared.kv[j][d];   // (3)
      }
      simt::sync_block();
    }
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int e = 0; e < entries; ++e)
      if (simt::thread_id() + e * threads < dim) p.o(n, h, simt::thread_id() + e * threads) = o[e] / softmax.total;
  }

 private:
  // Writes the weights of the tile's keys. Returns the factor for what was summed before.
  static HYBRIDATTN_DEVICE T weigh(Shared& shared, T scale, int count, SeenScores<T>& softmax) {
    int const j = simt::thread_id();
    if (j < count) shared.scores[j] = simt::rounded_product(scale, dot_rows(shared.q, shared.kv[j]));   // (1)
    simt::sync_block();
    T largest = softmax.largest;
    for (int i = 0; i < count; ++i) largest = simt::larger(largest, shared.scores[i]);
    T const shrink = softmax.raise(largest);
    if (j < count) shared.weights[j] = std::exp(shared.scores[j] - largest);
    simt::sync_block();   // all keys are read, all weights are written
    for (int i = 0; i < count; ++i) softmax.total += shared.weights[i];
    return shrink;
  }
};

// Copies keys and values of new tokens into the cache; with a window those of the last `window` tokens.
template <class T> struct Remember {
  Inputs<In<T>> x;
  Cache<Out<T>> cache;
  SequenceTable sequences;

  HYBRIDATTN_HD void operator()(Index i) const {
    Index const D = x.k.extent(2), HK = x.k.extent(1), ring = cache.keys.extent(1), n = i / (HK * D), h = i / D % HK, d = i % D;
    Index const number = sequences.owners(n), row = sequences.positions(n) % ring;
    Sequence const sequence = sequences.list(number);
    if (n + ring < sequence.start + sequence.length) return;
    cache.keys(number, row, h, d) = x.k(n, h, d);
    cache.values(number, row, h, d) = x.v(n, h, d);
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::full
#endif
