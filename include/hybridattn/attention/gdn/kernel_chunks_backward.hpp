// Backward of Gated DeltaNet in chunks, from the saved errors alone. Letters are those of kernel_chunks.hpp. With X the gradient of the
// state after a chunk and S the state before it:
//   (f) y_i = after_i X^T k_i + sum_{l >= i} Q_li d_o_l ;  Y_i = y_i - sum_{l > i} R_li beta_l y_l           d_v_i = beta_i Y_i
//   (g) X before the chunk = until_C X + sum_i until_i (scale q_i d_o_i^T - k_i d_v_i^T)
//   (h) D_ij = decay(i, j) beta_j d_o_i . e_j for j <= i ;  E_ij = decay(i, j) beta_i beta_j Y_i . e_j for j < i ;  d_beta_i = Y_i . e_i
//   (i) d_q_i = scale (until_i S d_o_i + sum_{j <= i} D_ij k_j)
//       d_k_i = after_i beta_i X e_i - until_i beta_i S Y_i + sum_{l >= i} D_li scale q_l - sum_{l > i} E_li k_l - sum_{j < i} E_ij k_j
//   (j) d_g_i = the sum over pairs of a write before and a read after the decay of token i:
//         until_C <S, X>                                                   across the chunk
//         until_l (scale q_l . S d_o_l - beta_l k_l . S Y_l), l >= i       reads of S
//         after_j beta_j k_j . X e_j, j < i                                writes for X
//         D_lj scale q_l . k_j - E_lj k_l . k_j, j < i <= l                inside the chunk
// The sum (j) has these pairs and no others: no pair is added and taken away again. Nothing divides by beta or by a decay.
#ifndef HYBRIDATTN_ATTENTION_GDN_KERNEL_CHUNKS_BACKWARD_HPP
#define HYBRIDATTN_ATTENTION_GDN_KERNEL_CHUNKS_BACKWARD_HPP

#include <hybridattn/attention/gdn/kernel_chunks.hpp>

// g++ takes the int sizes of arrays in templates for conversions.
#if defined(__GNUC__) && !defined(__clang__) && !HYBRIDATTN_CUDA
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wsign-conversion"
#endif

namespace hybridattn::inline HYBRIDATTN_ABI::gdn {

// The state before each chunk, from the errors alone. Blocks as in ForwardChunks.
template <class T, int K> struct StatesOfChunks {
  using Of = Tiling<T, K>;
  static constexpr int chunk = Of::chunk, columns = Of::columns, threads = Of::scan_threads;
  using Params = ChunkParams<T>;
  struct Shared {
    StateTile<T, K> state;
    alignas(simt::Vector<T, 4>) KeyTable<T, K, chunk> k;
    alignas(simt::Vector<T, 4>) simt::Table<T, chunk, columns> error, kept;  // e, and beta e times its decay to the end of the chunk
    ChunkGates<T, chunk> gates;
  };

  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    Place const at{p.sequences, p.tiles, columns};
    TokenColumns<T, K> const own;
    Index number = Of::first_chunk(at.sequence.start, at.number);
    shared.state.read(p.x.initial_state, at.number, at.head, at.column);
    for (Index t = 0; t < at.sequence.length; t += chunk, ++number) {
      int const count = at.count(t, chunk);
      load_rows<threads, chunk, K>(shared.k, Rows{p.x.k, at.sequence.start + t, count, at.head / p.group, 0});
      load_rows<threads, chunk, columns>(shared.error, Rows{p.saved_error, at.sequence.start + t, count, at.head, at.column});
      shared.gates.load(p.x, at.sequence.start + t, count, at.head);
      simt::sync_block();
      shared.state.write(p.states, number, at.head, at.column);
      T kept[4] = {};
      add_row(shared.gates.beta[own.token] * shared.gates.after[own.token], &shared.error[own.token][own.column], kept);
      own.store(shared.kept, own.token, T(1), kept);
      simt::sync_block();
      shared.state.add(shared.gates.whole, shared.k, shared.kept);  // (e)
      simt::sync_block();  // the state is complete, and all have read the chunk
    }
  }
};

// Y, d_v, the gradient of the state after each chunk, and d_initial_state. Blocks as in ForwardChunks, from the last chunk to the first.
template <class T, int K> struct GradientsOfStates {
  using Of = Tiling<T, K>;
  static constexpr int chunk = Of::chunk, columns = Of::columns, threads = Of::scan_threads;
  using Params = ChunkParams<T>;
  struct Shared {
    StateTile<T, K> gradient;
    // Keys, then queries times scale. The updates are what (g) multiplies with them.
    alignas(simt::Vector<T, 4>) KeyTable<T, K, 2 * chunk> keys;
    alignas(simt::Vector<T, 4>) simt::Table<T, 2 * chunk, columns> updates;
    alignas(simt::Vector<T, 4>) simt::Table<T, chunk, columns> d_o, rest;  // rest: beta y
    T query_pairs[chunk][chunk], solved[chunk][chunk];
    ChunkGates<T, chunk> gates;
  };

  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    Place const at{p.sequences, p.tiles, columns};
    shared.gradient.read(p.d_final_state, at.number, at.head, at.column);
    Index const chunks = ceil_div(at.sequence.length, Index{chunk}), first = Of::first_chunk(at.sequence.start, at.number);
    for (Index i = chunks; i-- > 0;) {
      int const count = at.count(i * chunk, chunk);
      load(shared, p, at, first + i, at.sequence.start + i * chunk, count);
      simt::sync_block();
      shared.gradient.write(p.gradients, first + i, at.head, at.column);
      take(shared, p, at, at.sequence.start + i * chunk, count);
    }
    shared.gradient.write(p.d_x.initial_state, at.number, at.head, at.column);
  }

 private:
  static HYBRIDATTN_DEVICE void load(Shared& shared, Params const& p, Place const& at, Index number, Index n, int count) {
    load_rows<threads, chunk, K>(shared.keys, Rows{p.x.k, n, count, at.head / p.group, 0});
    load_rows<threads, chunk, K>(shared.keys + chunk, Rows{p.x.q, n, count, at.head / p.group, 0}, p.scale);
    load_rows<threads, chunk, columns>(shared.d_o, Rows{p.d_o, n, count, at.head, at.column});
    load_pairs<threads>(shared.query_pairs, p.query_pairs, number, at.head);
    load_pairs<threads>(shared.solved, p.solved, number, at.head);
    shared.gates.load(p.x, n, count, at.head);
  }
  // The chunk of `count` tokens from token n on.
  static HYBRIDATTN_DEVICE void take(Shared& shared, Params const& p, Place const& at, Index n, int count) {
    TokenColumns<T, K> const own;
    int const i = own.token;
    T const until = shared.gates.until[i], beta = shared.gates.beta[i];
    T const* const rows[] = {shared.keys[i]};
    T of_gradient[1][4] = {}, y[4] = {}, d_v[4] = {}, read[4] = {};
    add_products(rows, shared.gradient.row, own.column, of_gradient);
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int c = 0; c < 4; ++c) y[c] = shared.gates.after[i] * of_gradient[0][c];
    for (int l = i; l < count; ++l) add_row(shared.query_pairs[l][i], &shared.d_o[l][own.column], y);
    own.store(shared.rest, i, beta, y);
    simt::sync_block();
    for (int l = i + 1; l < count; ++l) add_row(-shared.solved[l][i], &shared.rest[l][own.column], y);  // (f)
    own.write(p.projected, at, n, count, y);
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int c = 0; c < 4; ++c) d_v[c] = beta * y[c];
    own.write(p.d_x.v, at, n, count, d_v);
    add_row(until, &shared.d_o[i][own.column], read);
    own.store(shared.updates, i, -until, d_v);
    own.store(shared.updates, chunk + i, T(1), read);
    simt::sync_block();
    shared.gradient.add(shared.gates.whole, shared.keys, shared.updates);  // (g)
    simt::sync_block();  // the gradient is complete, and all have read the chunk
  }
};

// d_q, d_k, d_beta and d_g of a chunk, for the value heads of a key head one after the other: the first one overwrites d_q and d_k, the
// others add to them. Columns go through shared memory in panels. A thread has two entries of four tokens, and a few pairs of tokens.
// No barrier stands between two value heads: the second one's panels wait before it writes what the last steps of the first one read.
template <class T, int K> struct GradientsOfTokens {
  using Of = Tiling<T, K>;
  static constexpr int chunk = Of::chunk, panel = Of::panel, tokens = 4, entries = 2;  // of a thread
  static constexpr int threads = chunk * K / (tokens * entries), warps = threads / 32;
  static constexpr int pairs = (chunk * chunk + threads - 1) / threads;  // of a thread
  using Params = ChunkParams<T>;
  template <int rows> using Panel = simt::Table<T, rows, panel + 4>;  // four more, so that the rows begin in different banks
  struct Shared {
    alignas(simt::Vector<T, 4>) KeyTable<T, K, chunk> q, k;  // q times scale
    alignas(simt::Vector<T, 4>) Panel<K> state, gradient;
    alignas(simt::Vector<T, 4>) Panel<chunk> d_o, projected, error;
    simt::Table<T, chunk, chunk + 1> reads, erased;  // D and E, E on both sides of the diagonal
    double crossing[chunk][chunk + 1];  // what a pair adds to d_g
    double reads_of[warps][chunk], writes_of[warps][chunk], across_of[warps];  // the warps' parts of sums over K
    double g[chunk];
    ChunkGates<T, chunk> gates;
  };
  // Sums over the columns, of a value head.
  struct Sums {
    T state_d_o[tokens][entries] = {}, state_y[tokens][entries] = {}, gradient_error[tokens][entries] = {};  // S d_o, S Y, X e
    T d_o_error[pairs] = {}, y_error[pairs] = {};  // d_o_i . e_j, Y_i . e_j
    T across = 0;  // <S, X>
  };

  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    auto const at = ChunkPlace::find<Of>(p.sequences);
    if (at.count == 0) return;
    Index const key_head = simt::block_y();
    load_rows<threads, chunk, K>(shared.q, Rows{p.x.q, at.first, at.count, key_head, 0}, p.scale);
    load_rows<threads, chunk, K>(shared.k, Rows{p.x.k, at.first, at.count, key_head, 0});
    for (Index h = key_head * p.group; h < (key_head + 1) * p.group; ++h) {
      Sums sums;
      load_gates(shared, p, at, h);
      for (Index column = 0; column < p.d_x.v.extent(2); column += panel) {
        load_panels(shared, p, at, h, column);
        simt::sync_block();
        add_panels(shared, sums);
        add_pairs(shared, sums);
        simt::sync_block();  // all have read the panels
      }
      scale(shared, sums);
      sum_over_keys(shared, sums);
      finish_pairs(shared, p, at, h, sums);
      simt::sync_block();
      write_d_g(shared, p, at, h);
      write_d_q_and_d_k(shared, p, at, key_head, h == key_head * p.group, sums);
    }
  }

 private:
  // Four neighbouring lanes, or as many as there are fours of tokens, have the same entries.
  static constexpr int fours = chunk / tokens;
  static HYBRIDATTN_DEVICE int token(int t) { return simt::thread_id() % fours * tokens + t; }
  static HYBRIDATTN_DEVICE int entry(int a) { return simt::thread_id() / fours * entries + a; }
  static HYBRIDATTN_DEVICE int pair(int n) { return simt::thread_id() + n * threads; }
  template <class F> static HYBRIDATTN_DEVICE void for_each_element(F f) {
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int t = 0; t < tokens; ++t) {
      HYBRIDATTN_UNROLL_IN_KERNEL
      for (int a = 0; a < entries; ++a) f(t, a);
    }
  }
  // f(n, i, j) for the thread's pairs j <= i.
  template <class F> static HYBRIDATTN_DEVICE void for_each_pair(F f) {
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int n = 0; n < pairs; ++n) {
      int const i = pair(n) / chunk, j = pair(n) % chunk;
      if (i < chunk && j <= i) f(n, i, j);
    }
  }

  static HYBRIDATTN_DEVICE void load_gates(Shared& shared, Params const& p, ChunkPlace const& at, Index h) {
    shared.gates.load(p.x, at.first, at.count, h);
    int const t = simt::thread_id();
    if (t < chunk) shared.g[t] = t < at.count ? static_cast<double>(p.x.g(at.first + t, h)) : 0.0;
  }
  static HYBRIDATTN_DEVICE void load_panels(Shared& shared, Params const& p, ChunkPlace const& at, Index h, Index column) {
    load_rows<threads, chunk, panel>(shared.d_o, Rows{p.d_o, at.first, at.count, h, column});
    load_rows<threads, chunk, panel>(shared.projected, Rows{View<T const, 3>(p.projected), at.first, at.count, h, column});
    load_rows<threads, chunk, panel>(shared.error, Rows{p.saved_error, at.first, at.count, h, column});
    load_rows<threads, K, panel>(shared.state, Rows{View<T const, 4>(p.states), at.chunk, h, column});
    load_rows<threads, K, panel>(shared.gradient, Rows{View<T const, 4>(p.gradients), at.chunk, h, column});
  }
  static HYBRIDATTN_DEVICE void add_panels(Shared const& shared, Sums& sums) {
    HYBRIDATTN_UNROLL_2_IN_KERNEL
    for (int c = 0; c < panel; c += 4) {
      simt::Vector<T, 4> state[entries], gradient[entries];
      HYBRIDATTN_UNROLL_IN_KERNEL
      for (int a = 0; a < entries; ++a) {
        state[a] = simt::load_vector<4>(&shared.state[entry(a)][c]);
        gradient[a] = simt::load_vector<4>(&shared.gradient[entry(a)][c]);
        if (c / 4 % fours != simt::thread_id() % fours) continue;  // a lane of those with the same entries
        HYBRIDATTN_UNROLL_IN_KERNEL
        for (int d = 0; d < 4; ++d) sums.across += state[a].x[d] * gradient[a].x[d];
      }
      HYBRIDATTN_UNROLL_IN_KERNEL
      for (int t = 0; t < tokens; ++t) {
        auto const d_o = simt::load_vector<4>(&shared.d_o[token(t)][c]), y = simt::load_vector<4>(&shared.projected[token(t)][c]),
                   error = simt::load_vector<4>(&shared.error[token(t)][c]);
        HYBRIDATTN_UNROLL_IN_KERNEL
        for (int a = 0; a < entries; ++a) {
          HYBRIDATTN_UNROLL_IN_KERNEL
          for (int d = 0; d < 4; ++d) {
            sums.state_d_o[t][a] += state[a].x[d] * d_o.x[d];
            sums.state_y[t][a] += state[a].x[d] * y.x[d];
            sums.gradient_error[t][a] += gradient[a].x[d] * error.x[d];
          }
        }
      }
    }
  }
  static HYBRIDATTN_DEVICE void add_pairs(Shared const& shared, Sums& sums) {
    for_each_pair([&](int n, int i, int j) {
      HYBRIDATTN_UNROLL_2_IN_KERNEL
      for (int c = 0; c < panel; c += 4) {
        add_dot(&shared.d_o[i][c], &shared.error[j][c], sums.d_o_error[n]);
        add_dot(&shared.projected[i][c], &shared.error[j][c], sums.y_error[n]);
      }
    });
  }
  // The first terms of (i).
  static HYBRIDATTN_DEVICE void scale(Shared const& shared, Sums& sums) {
    for_each_element([&](int t, int a) {
      T const until = shared.gates.until[token(t)], after = shared.gates.after[token(t)], beta = shared.gates.beta[token(t)];
      sums.state_d_o[t][a] *= until;
      sums.state_y[t][a] *= until * beta;
      sums.gradient_error[t][a] *= after * beta;
    });
  }
  // The warps' parts of what S and X add to d_g.
  static HYBRIDATTN_DEVICE void sum_over_keys(Shared& shared, Sums const& sums) {
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int t = 0; t < tokens; ++t) {
      T read = 0, written = 0;
      HYBRIDATTN_UNROLL_IN_KERNEL
      for (int a = 0; a < entries; ++a) {
        T const key = shared.k[token(t)][entry(a)];
        read += shared.q[token(t)][entry(a)] * sums.state_d_o[t][a] - key * sums.state_y[t][a];
        written += key * sums.gradient_error[t][a];
      }
      double const reads = sum_entries(static_cast<double>(read)), writes = sum_entries(static_cast<double>(written));
      if (simt::lane() < fours) {
        shared.reads_of[simt::warp()][token(t)] = reads;
        shared.writes_of[simt::warp()][token(t)] = writes;
      }
    }
    double const across = simt::sum_lanes(static_cast<double>(sums.across));
    if (simt::lane() == 0) shared.across_of[simt::warp()] = static_cast<double>(shared.gates.whole) * across;
  }
  // Over the lanes with the same tokens.
  static HYBRIDATTN_DEVICE double sum_entries(double x) {
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int step = fours; step < 32; step *= 2) x += simt::shuffle_xor(x, step);
    return x;
  }
  static HYBRIDATTN_DEVICE void finish_pairs(Shared& shared, Params const& p, ChunkPlace const& at, Index h, Sums const& sums) {
    for_each_pair([&](int n, int i, int j) {
      T const decay = decay_between<T>(shared.g, i, j), beta = shared.gates.beta[j], both = shared.gates.beta[i] * beta;
      shared.reads[i][j] = decay * beta * sums.d_o_error[n];  // (h)
      if (i == j && i < at.count) p.d_x.beta(at.first + i, h) = sums.y_error[n];
      if (i == j) return;
      shared.erased[i][j] = shared.erased[j][i] = decay * both * sums.y_error[n];
      shared.crossing[i][j] = static_cast<double>(p.query_pairs(at.chunk, h, i, j) * (beta * sums.d_o_error[n])) -
                              static_cast<double>(p.key_pairs(at.chunk, h, i, j) * (both * sums.y_error[n]));
    });
  }
  // A warp has a token i at a time, and each lane the reads of another token l >= i, or the writes of a token l < i.
  static HYBRIDATTN_DEVICE void write_d_g(Shared const& shared, Params const& p, ChunkPlace const& at, Index h) {
    int const l = simt::lane();
    for (int i = simt::warp(); i < at.count; i += warps) {
      double sum = l < warps ? shared.across_of[l] : 0.0;
      for (int warp = 0; l < at.count && warp < warps; ++warp) sum += l < i ? shared.writes_of[warp][l] : shared.reads_of[warp][l];
      for (int j = 0; i <= l && l < at.count && j < i; ++j) sum += shared.crossing[l][j];
      sum = simt::sum_lanes(sum);
      if (l == 0) p.d_x.g(at.first + i, h) = static_cast<T>(sum);  // (j)
    }
  }
  static HYBRIDATTN_DEVICE void write_d_q_and_d_k(Shared const& shared, Params const& p, ChunkPlace const& at, Index key_head,
                                                  bool is_first, Sums& sums) {
    T d_q[tokens][entries], d_k[tokens][entries];
    for_each_element([&](int t, int a) {
      d_q[t][a] = sums.state_d_o[t][a];
      d_k[t][a] = sums.gradient_error[t][a] - sums.state_y[t][a];
    });
    HYBRIDATTN_UNROLL_2_IN_KERNEL
    for (int m = 0; m < at.count; ++m)
      for_each_element([&](int t, int a) {
        int const i = token(t);
        T const key = shared.k[m][entry(a)];
        if (m <= i) d_q[t][a] += shared.reads[i][m] * key;
        if (m >= i) d_k[t][a] += shared.reads[m][i] * shared.q[m][entry(a)];
        if (m != i) d_k[t][a] -= shared.erased[m][i] * key;
      });
    for_each_element([&](int t, int a) {  // (i)
      if (token(t) >= at.count || entry(a) >= p.d_x.q.extent(2)) return;
      T &to_q = p.d_x.q(at.first + token(t), key_head, entry(a)), &to_k = p.d_x.k(at.first + token(t), key_head, entry(a));
      to_q = is_first ? p.scale * d_q[t][a] : to_q + p.scale * d_q[t][a];
      to_k = is_first ? d_k[t][a] : to_k + d_k[t][a];
    });
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::gdn

#if defined(__GNUC__) && !defined(__clang__) && !HYBRIDATTN_CUDA
#pragma GCC diagnostic pop
#endif
#endif
