// Gated DeltaNet as kernels that take the tokens of a sequence in chunks (arXiv 2412.06464), in exact arithmetic. Chunks are counted from
// the first token of the sequence. With S the state before a chunk, i, j, m tokens of the chunk, decay(i, j) = exp(g_{j+1} + ... + g_i):
//   (a) A_ij = decay(i, j) k_i . k_j for j < i ;  Q_ij = decay(i, j) scale q_i . k_j for j <= i
//   (b) R_ij = A_ij - sum_{j < m < i} A_im beta_m R_mj                      so that (I + A beta)^-1 = I - R beta
//   (c) r_i = v_i - until_i S^T k_i ;  e_i = r_i - sum_{j < i} R_ij beta_j r_j               until_i = exp(g_1 + ... + g_i)
//   (d) o_i = until_i S^T (scale q_i) + sum_{j <= i} Q_ij beta_j e_j
//   (e) S after the chunk = until_C S + sum_i after_i k_i (beta_i e_i)^T                     after_i = decay(C, i)
// A mask is the bounds of a loop: a NaN of a later token would pass through a product with zero. Tokens behind the end of the sequence are
// zeros in the last chunk. No exponent is a difference of sums, which would be NaN where two of them are infinite.
#ifndef HYBRIDATTN_ATTENTION_GDN_KERNEL_CHUNKS_HPP
#define HYBRIDATTN_ATTENTION_GDN_KERNEL_CHUNKS_HPP

#include <hybridattn/attention/gdn/kernel_place.hpp>

// g++ takes the int sizes of arrays in templates for conversions.
#if defined(__GNUC__) && !defined(__clang__) && !HYBRIDATTN_CUDA
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wsign-conversion"
#endif

namespace hybridattn::inline HYBRIDATTN_ABI::gdn {

// Sizes for keys with room for K entries, so that the shared memory of a block stays below 99 KB.
template <class T, int K> struct Tiling {
  static constexpr int each = 4;  // numbers that a thread reads and writes at once
  static constexpr int chunk = static_cast<int>(sizeof(T)) * K < 2048 ? 16 : 8;  // tokens
  static constexpr int columns = 128 / static_cast<int>(sizeof(T));  // of a state, in a scan
  static constexpr int panel = K < 256 ? columns : columns / 2;  // columns at a time, where all columns are summed
  static constexpr int scan_threads = chunk * columns / each;

  // A sequence's first chunk among those of the batch. Sequences may have any lengths, so a few places stay unused.
  static HYBRIDATTN_HD Index first_chunk(Index start, Index number) { return start / chunk + number; }
  static Index count_chunks(Sequences const& s) { return s.tokens() / chunk + s.count(); }
};

// Rows of keys or queries in shared memory. Four more entries, so that the rows begin in different banks.
template <class T, int K, int rows> using KeyTable = simt::Table<T, rows, K + Tiling<T, K>::each>;

// What all chunk kernels get. Views that a kernel does not need are empty.
template <class T> struct ChunkParams {
  Inputs<In<T>> x;
  View<T, 3> o;  // forward's results
  View<wide_t<T>, 3> error;
  View<wide_t<T>, 4> final_state;
  View<wide_t<T> const, 3> saved_error;  // backward's arguments and results
  View<T const, 3> d_o;
  View<wide_t<T> const, 4> d_final_state;
  Inputs<Out<T>> d_x;
  View<T, 4> key_pairs, query_pairs, solved;  // [chunks, HV, chunk, chunk]: A, Q and R of (a) and (b)
  View<T, 4> states, gradients;  // [chunks, HV, K, V]: the state before each chunk, the gradient of the state after it
  View<T, 3> projected;  // [N, HV, V]: Y of backward
  View<Sequence const, 1> sequences;
  Index tiles;  // of columns
  Index group;  // value heads of a key head
  T scale;
};

// Rows of a tensor, from one of its columns on: those of a head at the tokens of a chunk, or those of a state. Empty views have no columns.
template <class T> struct Rows {
  T* data;
  Index stride, rows, columns;

  // Of head h, for `count` tokens from n on.
  HYBRIDATTN_DEVICE Rows(View<T, 3> x, Index n, int count, Index h, Index column)
      : data(x.empty() ? nullptr : x.row(n, h) + column), stride(x.stride[0]), rows(count), columns(x.empty() ? 0 : x.extent(2) - column) {}
  // Of the state of head h at `number`, a sequence or a chunk.
  HYBRIDATTN_DEVICE Rows(View<T, 4> x, Index number, Index h, Index column)
      : data(x.empty() ? nullptr : x.row(number, h, 0) + column), stride(x.stride[2]), rows(x.extent(2)),
        columns(x.empty() ? 0 : x.extent(3) - column) {}
  HYBRIDATTN_DEVICE bool has(int row, int column) const { return row < rows && column < columns; }
};
// f(row, column) for all of rows x width elements. Neighbouring threads have neighbouring columns, and a thread stays in its columns.
template <int threads, int rows, int width, class F> HYBRIDATTN_DEVICE void for_each_place(F f) {
  constexpr int lanes = width < threads ? width : threads;
  for (int column = simt::thread_id() % lanes; column < width; column += lanes) {
    HYBRIDATTN_UNROLL_4_IN_KERNEL
    for (int row = simt::thread_id() / lanes; row < rows; row += threads / lanes) f(row, column);
  }
}
// rows x width elements into shared memory, times `factor`, and zeros where there is no row or column.
template <int threads, int rows, int width, class T, std::size_t room, class From>
HYBRIDATTN_DEVICE void load_rows(T (*to)[room], Rows<From const> from, T factor = 1) {
  for_each_place<threads, rows, width>(
      [&](int row, int column) { to[row][column] = from.has(row, column) ? factor * from.data[row * from.stride + column] : T(0); });
}

// beta of the tokens of a chunk, their decays from the chunk's begin and to its end, and the decay of the whole chunk. Tokens behind
// `count` read and write nothing.
template <class T, int chunk> struct ChunkGates {
  T beta[chunk], until[chunk], after[chunk], whole;

  HYBRIDATTN_DEVICE void load(Inputs<In<T>> const& x, Index n, int count, Index h) {
    int const t = simt::thread_id();
    if (t >= chunk) return;
    double before = 0, behind = 0;
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int i = 0; i < chunk; ++i) {
      double const g = i < count ? static_cast<double>(x.g(n + i, h)) : 0.0;
      if (i <= t) before += g;
      else behind += g;
    }
    beta[t] = t < count ? x.beta(n + t, h) : T(0);
    until[t] = t < count ? static_cast<T>(std::exp(before)) : T(0);
    after[t] = static_cast<T>(std::exp(behind));
    if (t == chunk - 1) whole = static_cast<T>(std::exp(before));
  }
};
// decay(i, j) by the logarithms of a chunk's decays.
template <class T, std::size_t chunk> HYBRIDATTN_DEVICE T decay_between(double const (&g)[chunk], int i, int j) {
  double sum = 0;
  for (int m = j + 1; m <= i; ++m) sum += g[m];
  return static_cast<T>(std::exp(sum));
}

// sums[n] += the rows x[n] [K] times columns column .. column + 3 of a matrix [K, width].
template <int K, class T, int count, std::size_t width>
HYBRIDATTN_DEVICE void add_products(T const* const (&x)[count], T const (&matrix)[K][width], int column, T (&sums)[count][4]) {
  HYBRIDATTN_UNROLL_4_IN_KERNEL
  for (int a = 0; a < K; a += 4) {
    simt::Vector<T, 4> of_x[count];
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int n = 0; n < count; ++n) of_x[n] = simt::load_vector<4>(x[n] + a);
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int d = 0; d < 4; ++d) {
      simt::Vector<T, 4> const row = simt::load_vector<4>(&matrix[a + d][column]);
      HYBRIDATTN_UNROLL_IN_KERNEL
      for (int n = 0; n < count; ++n) {
        HYBRIDATTN_UNROLL_IN_KERNEL
        for (int c = 0; c < 4; ++c) sums[n][c] += of_x[n].x[d] * row.x[c];
      }
    }
  }
}
// sum += factor row, four entries of it.
template <class T> HYBRIDATTN_DEVICE void add_row(T factor, T const* row, T (&sum)[4]) {
  simt::Vector<T, 4> const x = simt::load_vector<4>(row);
  HYBRIDATTN_UNROLL_IN_KERNEL
  for (int c = 0; c < 4; ++c) sum[c] += factor * x.x[c];
}

// sum += x . y, four entries of them.
template <class T> HYBRIDATTN_DEVICE void add_dot(T const* x, T const* y, T& sum) {
  simt::Vector<T, 4> const of_x = simt::load_vector<4>(x), of_y = simt::load_vector<4>(y);
  HYBRIDATTN_UNROLL_IN_KERNEL
  for (int d = 0; d < 4; ++d) sum += of_x.x[d] * of_y.x[d];
}

// A tile of the columns of a state, or of its gradient, in the shared memory of a scan's block. A thread reads and writes the same
// elements.
template <class T, int K> struct StateTile {
  using Of = Tiling<T, K>;
  using Four = simt::Vector<T, Of::each>;
  static constexpr int columns = Of::columns, threads = Of::scan_threads;
  alignas(Four) simt::Table<T, K, columns> row;

  HYBRIDATTN_DEVICE void read(View<wide_t<T> const, 4> from, Index number, Index h, Index column) {
    load_rows<threads, K, columns>(row, Rows{from, number, h, column});
  }
  HYBRIDATTN_DEVICE void write(View<wide_t<T>, 4> to, Index number, Index h, Index column) const {
    Rows const rows{to, number, h, column};
    for_each_place<threads, K, columns>([&](int a, int c) {
      if (rows.has(a, c)) rows.data[a * rows.stride + c] = row[a][c];
    });
  }
  // The tile times `factor`, plus the sum over the rows of x [rows, K]^T y [rows, columns]. A thread has squares of 4 x 4 elements.
  template <std::size_t rows, std::size_t width> HYBRIDATTN_DEVICE void add(T factor, T const (&x)[rows][width],
                                                                            T const (&y)[rows][columns]) {
    for (int i = simt::thread_id(); i < K * columns / 16; i += threads) {
      int const a = i / (columns / 4) * 4, c = i % (columns / 4) * 4;
      T sum[4][4];
      HYBRIDATTN_UNROLL_IN_KERNEL
      for (int d = 0; d < 4; ++d) {
        Four const old = simt::load_vector<4>(&row[a + d][c]);
        HYBRIDATTN_UNROLL_IN_KERNEL
        for (int e = 0; e < 4; ++e) sum[d][e] = factor * old.x[e];
      }
      HYBRIDATTN_UNROLL_4_IN_KERNEL
      for (int n = 0; n < static_cast<int>(rows); ++n) {
        Four const key = simt::load_vector<4>(&x[n][a]);
        HYBRIDATTN_UNROLL_IN_KERNEL
        for (int d = 0; d < 4; ++d) add_row(key.x[d], &y[n][c], sum[d]);
      }
      HYBRIDATTN_UNROLL_IN_KERNEL
      for (int d = 0; d < 4; ++d) simt::store_vector(&row[a + d][c], Four{{sum[d][0], sum[d][1], sum[d][2], sum[d][3]}});
    }
  }
};

// The chunk of a block of a kernel that takes all chunks at once. Blocks for unused places have no tokens.
struct ChunkPlace {
  Index chunk;  // among those of the batch
  Index sequence;
  Index first;  // token of the batch
  int count = 0;  // of tokens

  template <class Of> static HYBRIDATTN_DEVICE ChunkPlace find(View<Sequence const, 1> sequences) {
    ChunkPlace place{simt::block_x(), 0, 0};
    Index end = sequences.extent(0);
    while (end - place.sequence > 1) {
      Index const middle = (place.sequence + end) / 2;
      (Of::first_chunk(sequences(middle).start, middle) <= place.chunk ? place.sequence : end) = middle;
    }
    Sequence const s = sequences(place.sequence);
    Index const begin = (place.chunk - Of::first_chunk(s.start, place.sequence)) * Of::chunk;
    place.first = s.start + begin;
    if (begin < s.length) place.count = static_cast<int>(simt::smaller<Index>(s.length - begin, Of::chunk));
    return place;
  }
};

// A, Q and R of a chunk, for the value heads of a key head one after the other. A thread has a pair of tokens.
template <class T, int K> struct PrepareChunks {
  using Of = Tiling<T, K>;
  static constexpr int chunk = Of::chunk, threads = chunk * chunk;
  using Params = ChunkParams<T>;
  struct Shared {
    alignas(simt::Vector<T, 4>) KeyTable<T, K, chunk> q, k;  // q times scale
    double g[chunk];
    T beta[chunk];
    T keys[chunk][chunk + 1];  // A
  };

  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    auto const at = ChunkPlace::find<Of>(p.sequences);
    if (at.count == 0) return;
    Index const key_head = simt::block_y();
    load_rows<threads, chunk, K>(shared.q, Rows{p.x.q, at.first, at.count, key_head, 0}, p.scale);
    load_rows<threads, chunk, K>(shared.k, Rows{p.x.k, at.first, at.count, key_head, 0});
    simt::sync_block();
    int const i = simt::thread_id() / chunk, j = simt::thread_id() % chunk;
    T with_key = 0, with_query = 0;
    HYBRIDATTN_UNROLL_4_IN_KERNEL
    for (int a = 0; a < K; a += 4) {
      if (j > i) continue;
      add_dot(&shared.k[i][a], &shared.k[j][a], with_key);
      add_dot(&shared.q[i][a], &shared.k[j][a], with_query);
    }
    for (Index h = key_head * p.group; h < (key_head + 1) * p.group; ++h) {
      load_gates(shared, p, at, h);
      simt::sync_block();
      T const decay = j <= i ? decay_between<T>(shared.g, i, j) : T(0);
      if (j <= i) p.query_pairs(at.chunk, h, i, j) = decay * with_query;  // (a)
      if (j < i) p.key_pairs(at.chunk, h, i, j) = shared.keys[i][j] = decay * with_key;
      simt::sync_block();
      if (simt::thread_id() < chunk) solve(shared, simt::thread_id(), p.solved.row(at.chunk, h, 0));
      simt::sync_block();  // all have read the gates and A
    }
  }

 private:
  static HYBRIDATTN_DEVICE void load_gates(Shared& shared, Params const& p, ChunkPlace const& at, Index h) {
    int const t = simt::thread_id();
    if (t >= chunk) return;
    shared.g[t] = t < at.count ? static_cast<double>(p.x.g(at.first + t, h)) : 0.0;
    shared.beta[t] = t < at.count ? p.x.beta(at.first + t, h) : T(0);
  }
  // Column j of R [chunk, chunk], which stays in registers.  (b)
  static HYBRIDATTN_DEVICE void solve(Shared const& shared, int j, T* to) {
    T column[chunk];
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int i = 0; i < chunk; ++i) column[i] = j < i ? shared.keys[i][j] : T(0);
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int m = 0; m < chunk; ++m) {
      T const known = shared.beta[m] * column[m];
      HYBRIDATTN_UNROLL_IN_KERNEL
      for (int i = m + 1; i < chunk; ++i)
        if (j < m) column[i] -= shared.keys[i][m] * known;
    }
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int i = 0; i < chunk; ++i)
      if (j < i) to[i * chunk + j] = column[i];
  }
};

// The pairs of a chunk in shared memory; above the diagonal they hold anything.
template <int threads, class T, std::size_t chunk, std::size_t width>
HYBRIDATTN_DEVICE void load_pairs(T (&to)[chunk][width], View<T, 4> from, Index number, Index h) {
  for (int i = simt::thread_id(); i < static_cast<int>(chunk * chunk); i += threads) {
    int const row = i / static_cast<int>(chunk), column = i % static_cast<int>(chunk);
    if (column <= row) to[row][column] = from(number, h, row, column);
  }
}

// What a thread of a scan has: four columns of a token of the chunk.
template <class T, int K> struct TokenColumns {
  using Of = Tiling<T, K>;
  int token = simt::thread_id() / (Of::columns / Of::each), column = simt::thread_id() % (Of::columns / Of::each) * Of::each;

  // To x [N, HV, V], where the token and the columns exist.
  template <class X> HYBRIDATTN_DEVICE void write(View<X, 3> to, Place const& at, Index n, int count, T const (&from)[4]) const {
    if (to.empty() || token >= count) return;
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int c = 0; c < 4; ++c)
      if (at.column + column + c < to.extent(2)) to(n + token, at.head, at.column + column + c) = from[c];
  }
  // factor x to a row in shared memory.
  template <std::size_t rows> HYBRIDATTN_DEVICE void store(T (&to)[rows][Of::columns], int row, T factor, T const (&x)[4]) const {
    simt::store_vector(&to[row][column], simt::Vector<T, 4>{{factor * x[0], factor * x[1], factor * x[2], factor * x[3]}});
  }
};

// o, the errors and the final state. A block has a tile of the columns of a value head's state of a sequence, and goes from chunk to chunk.
template <class T, int K> struct ForwardChunks {
  using Of = Tiling<T, K>;
  static constexpr int chunk = Of::chunk, columns = Of::columns, threads = Of::scan_threads;
  using Params = ChunkParams<T>;
  struct Shared {
    StateTile<T, K> state;
    alignas(simt::Vector<T, 4>) KeyTable<T, K, chunk> q, k;  // q times scale
    // v, then beta r; beta e; beta e times its decay to the end of the chunk.
    alignas(simt::Vector<T, 4>) simt::Table<T, chunk, columns> rest, write, kept;
    T query_pairs[chunk][chunk], solved[chunk][chunk];
    ChunkGates<T, chunk> gates;
  };

  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    Place const at{p.sequences, p.tiles, columns};
    shared.state.read(p.x.initial_state, at.number, at.head, at.column);
    for (Index t = 0; t < at.sequence.length; t += chunk) {
      load(shared, p, at, t);
      simt::sync_block();
      take(shared, p, at, at.sequence.start + t, at.count(t, chunk));
    }
    shared.state.write(p.final_state, at.number, at.head, at.column);
  }

 private:
  static HYBRIDATTN_DEVICE void load(Shared& shared, Params const& p, Place const& at, Index t) {
    Index const n = at.sequence.start + t, key_head = at.head / p.group;
    Index const number = Of::first_chunk(at.sequence.start, at.number) + t / chunk;
    int const count = at.count(t, chunk);
    load_rows<threads, chunk, K>(shared.q, Rows{p.x.q, n, count, key_head, 0}, p.scale);
    load_rows<threads, chunk, K>(shared.k, Rows{p.x.k, n, count, key_head, 0});
    load_rows<threads, chunk, columns>(shared.rest, Rows{p.x.v, n, count, at.head, at.column});
    load_pairs<threads>(shared.query_pairs, p.query_pairs, number, at.head);
    load_pairs<threads>(shared.solved, p.solved, number, at.head);
    shared.gates.load(p.x, n, count, at.head);
  }
  // The chunk of `count` tokens from token n on.
  static HYBRIDATTN_DEVICE void take(Shared& shared, Params const& p, Place const& at, Index n, int count) {
    TokenColumns<T, K> const own;
    int const i = own.token;
    T const until = shared.gates.until[i], beta = shared.gates.beta[i];
    T const* const rows[] = {shared.k[i], shared.q[i]};
    T of_state[2][4] = {}, error[4] = {}, o[4] = {};
    add_products(rows, shared.state.row, own.column, of_state);
    add_row(T(1), &shared.rest[i][own.column], error);
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int c = 0; c < 4; ++c) {
      error[c] -= until * of_state[0][c];
      o[c] = until * of_state[1][c];
    }
    own.store(shared.rest, i, beta, error);
    simt::sync_block();
    for (int j = 0; j < i; ++j) add_row(-shared.solved[i][j], &shared.rest[j][own.column], error);  // (c)
    own.store(shared.write, i, beta, error);
    own.store(shared.kept, i, beta * shared.gates.after[i], error);
    own.write(p.error, at, n, count, error);
    simt::sync_block();
    for (int j = 0; j <= i; ++j) add_row(shared.query_pairs[i][j], &shared.write[j][own.column], o);  // (d)
    own.write(p.o, at, n, count, o);
    shared.state.add(shared.gates.whole, shared.k, shared.kept);  // (e)
    simt::sync_block();  // the state is complete, and all have read the chunk
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::gdn

#if defined(__GNUC__) && !defined(__clang__) && !HYBRIDATTN_CUDA
#pragma GCC diagnostic pop
#endif
#endif
