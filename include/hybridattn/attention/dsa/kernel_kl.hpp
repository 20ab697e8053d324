// The indexer's loss as kernels. Numbers in brackets are equations of dsa.hpp. Scores and attention's weights are computed again where they
// are needed. Only their gradients d_I are stored, for a block of queries of each sequence at a time where rows of d_I are as long as the
// sequence.
#ifndef HYBRIDATTN_ATTENTION_DSA_KERNEL_KL_HPP
#define HYBRIDATTN_ATTENTION_DSA_KERNEL_KL_HPP

#include <hybridattn/attention/dsa/kernel_attention.hpp>
#include <hybridattn/attention/dsa/kernel_pairs.hpp>
#include <hybridattn/attention/dsa/kernel_rows.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI::dsa {

template <class T> struct KlParams {
  Batch<T> batch;
  View<wide_t<T> const, 2> lse;
  View<wide_t<T>, 1> index_lse;
  View<T, 1> losses;  // [N], each query's part of (6)
  // Only in backward.
  View<wide_t<T> const, 1> y_index_lse, d_loss;
  Inputs<Out<T>> d_x;
  View<T, 1> d_scores;  // d_I
  Index first, queries;  // the block of queries of each sequence
  Index tiles;  // of keys, in the longest sequence

  // Where d_I of query t of a sequence begins.
  HYBRIDATTN_DEVICE T* d_scores_of(Sequence s, Index t) const {
    View<std::int32_t const, 2> const& indices = batch.indices;
    return d_scores.data + (indices.empty() ? queries * s.start + (t - first) * s.length : (s.start + t) * indices.extent(1));
  }
};

// index_scale iq_j . ik, of query n and a key of each thread.
template <class T, int threads>
HYBRIDATTN_DEVICE T index_product(GatheredRows<T, threads>& rows, Batch<T> const& b, Index n, Index j, T const* key_row, int count) {
  return simt::rounded_product(b.index_scale, gather_dot(rows, b.x.index_q.row(n, j), key_row, b.x.index_k.extent(1), count));
}
// (1) of query n and a key of each thread.
template <class T, int threads>
HYBRIDATTN_DEVICE T index_score(GatheredRows<T, threads>& rows, Batch<T> const& b, Index n, T const* key_row, int count) {
  T score = 0;
  for (Index j = 0; j < b.x.index_w.extent(1); ++j) {
    T const product = index_product(rows, b, n, j, key_row, count);
    score += b.x.index_w(n, j) * (product < 0 ? T(0) : product);
  }
  return score;
}
// p of (5), of query n and a key of each thread.
template <class T, int threads>
HYBRIDATTN_DEVICE T target_share(GatheredRows<T, threads>& rows, Batch<T> const& b, View<wide_t<T> const, 2> lse, Index n,
                                 Query<T> const& query, Index key, int count) {
  T sum = 0;
  for (Index h = 0, H = b.x.q.extent(1); h < H; ++h)
    sum += std::exp(attention_score(rows, b, n, h, query.key_row(key, b.kv_head(h)), count) - lse(n, h));
  return sum / static_cast<T>(b.x.q.extent(1));
}

// (5) and a query's part of (6). A thread has a key of a tile of keys.
template <class T> struct IndexLoss {
  static constexpr int threads = 64;
  using Params = KlParams<T>;
  struct Shared {
    GatheredRows<T, threads> rows;
    T of_warps[threads / 32];
  };

  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    Index const n = simt::block_x();
    Query<T> const query{p.batch, n};
    Index const count = query.count();
    T score = 0, largest = -simt::infinity<T>(), total = 0, loss = 0;
    for (Index first = 0; first < count; first += threads) {
      score = score_from(shared, p, query, first);
      if (first + simt::thread_id() < count) largest = simt::larger(score, largest);
    }
    largest = largest_of_block(shared.of_warps, largest);
    for (Index first = 0; first < count; first += threads) {
      if (count > threads) score = score_from(shared, p, query, first);
      if (first + simt::thread_id() < count) total += std::exp(score - largest);
    }
    T const index_lse = largest + std::log(gpu::sum_block(shared.of_warps, total));
    for (Index first = 0; first < count; first += threads) {
      if (count > threads) score = score_from(shared, p, query, first);
      Index const j = first + simt::thread_id();
      T const share =
          target_share(shared.rows, p.batch, p.lse, n, query, j < count ? query.key(j) : 0, entries_from(first, count, threads));
      if (j < count) loss += divergence(share, score - index_lse);
    }
    loss = gpu::sum_block(shared.of_warps, loss);
    if (simt::thread_id() > 0) return;
    p.index_lse(n) = index_lse;
    p.losses(n) = loss;
  }

 private:
  static HYBRIDATTN_DEVICE T score_from(Shared& shared, Params const& p, Query<T> const& query, Index first) {
    Index const j = first + simt::thread_id();
    return index_score(shared.rows, p.batch, simt::block_x(), query.index_row(j < query.count() ? query.key(j) : 0),
                       entries_from(first, query.count(), threads));
  }
  static HYBRIDATTN_DEVICE T divergence(T share, T log_r) {
    return (share > 0 ? share * (std::log(share) - log_r) : T(0)) + (std::exp(log_r) - share);  // (6)
  }
};

// The sum of all queries' losses, 0 for none. One block, a thread has every 256th query.
template <class T> struct SumLosses {
  static constexpr int threads = 256;
  struct Params {
    View<T const, 1> losses;
    View<wide_t<T>, 1> sum;
  };
  struct Shared {
    T of_warps[threads / 32];
  };
  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    T sum = 0;
    for (Index n = simt::thread_id(); n < p.losses.count(); n += threads) sum += p.losses(n);
    sum = gpu::sum_block(shared.of_warps, sum);
    if (simt::thread_id() == 0) p.sum(0) = sum;
  }
};

// (7) of a query's index_q and index_w, and its d_I. A thread has a key of a tile of keys, then entries of d_iq.
template <class T> struct IndexQueryGradients {
  static constexpr int threads = 64;
  using Params = KlParams<T>;
  struct Shared {
    GatheredRows<T, threads> rows;
    T const* keys[threads];
    T d_z[threads], of_warps[threads / 32];
  };

  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    PartOfSequence const at{p.queries};
    Sequence const sequence = p.batch.sequences.list(at.sequence);
    Index const t = p.first + at.part, n = sequence.start + t;
    if (t >= sequence.length) return;
    Query<T> const query{p.batch, n};
    T const d_loss = p.d_loss(0);
    for (Index first = 0, count = query.count(); first < count; first += threads) {
      Index const j = first + simt::thread_id(), key = j < count ? query.key(j) : 0;
      int const keys = entries_from(first, count, threads);
      T const* const row = query.index_row(key);
      T const score = index_score(shared.rows, p.batch, n, row, keys);
      T const share = target_share(shared.rows, p.batch, p.lse, n, query, key, keys);
      T const d_score = d_loss == 0 ? T(0) : d_loss * (std::exp(score - p.y_index_lse(n)) - share);
      if (j < count) p.d_scores_of(sequence, t)[j] = d_score;
      add_heads(shared, p, n, row, keys, d_score, first == 0);
    }
  }

 private:
  // Adds a tile of keys to the gradients of every head. They are 0 where the loss has no gradient, whatever the inputs are.
  static HYBRIDATTN_DEVICE void add_heads(Shared& shared, Params const& p, Index n, T const* row, int keys, T d_score, bool overwrites) {
    bool const is_key = simt::thread_id() < keys, trains = p.d_loss(0) != 0;
    for (Index j = 0; j < p.batch.x.index_w.extent(1); ++j) {
      T const z = index_product(shared.rows, p.batch, n, j, row, keys);
      shared.keys[simt::thread_id()] = row;
      shared.d_z[simt::thread_id()] = z > 0 ? p.batch.index_scale * p.batch.x.index_w(n, j) * d_score : T(0);
      T const d_w = gpu::sum_block(shared.of_warps, is_key && trains ? d_score * (z < 0 ? T(0) : z) : T(0));  // waits for d_z too
      if (simt::thread_id() == 0 && !p.d_x.index_w.empty()) p.d_x.index_w(n, j) = overwrites ? d_w : p.d_x.index_w(n, j) + d_w;
      if (p.d_x.index_q.empty()) continue;
      add_rows(shared.d_z, shared.keys, trains ? keys : 0, overwrites, p.d_x.index_q.row(n, j), p.batch.x.index_k.extent(1));
    }
  }
};

// (7) of a tile of index keys. The sums go through the queries in order, and for each through the indexer's heads. A thread has a pair of
// a query and a key, then entries of d_ik.
template <class T> struct IndexKeyGradients {
  static constexpr int threads = Pairs::threads;
  using Params = KlParams<T>;
  struct Shared {
    Pairs::Shared pairs;
    GatheredRows<T, threads> of_query, of_key;
    T const* q[threads];
    T d_z[threads];
    int keys[threads];
  };

  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    PartOfSequence const at{p.tiles};
    Sequence const sequence = p.batch.sequences.list(at.sequence);
    Index const first = Index{at.part} * Pairs::keys, end = simt::smaller(p.first + p.queries, sequence.length);
    if (first >= sequence.length) return;
    View<T, 2> const d_keys{p.d_x.index_k.row(sequence.start + first),
                            {entries_from(first, sequence.length, Pairs::keys), p.d_x.index_k.extent(1)},
                            p.d_x.index_k.stride};
    if (p.first == 0) set_tile_zero(d_keys);
    if (p.d_loss(0) == 0) return;
    for (Index query = simt::larger(p.first, first); query < end; query += Pairs::queries) {
      Pairs const pairs{shared.pairs, p.batch, sequence, first, query, end};
      int const terms = pairs.count() * static_cast<int>(p.batch.x.index_w.extent(1));
      for (int term = 0; term < terms; term += threads) {
        int const count = entries_from(term, terms, threads);
        weigh(shared, p, pairs, sequence, first, query, term, count);
        simt::sync_block();
        add_terms(shared.d_z, shared.q, shared.keys, count, d_keys);
      }
    }
  }

 private:
  // d_z of `count` terms: pairs, and for each the heads of the indexer. Queries and keys are counted from positions t and key.
  static HYBRIDATTN_DEVICE void weigh(Shared& shared, Params const& p, Pairs const& pairs, Sequence s, Index key, Index t, int term,
                                      int count) {
    int const thread = simt::thread_id(), own = term + (thread < count ? thread : 0), HI = static_cast<int>(p.batch.x.index_w.extent(1));
    Pair const pair = pairs[own / HI];
    Index const n = s.start + t + pair.query, j = own % HI;
    T const *const q = p.batch.x.index_q.row(n, j), *const k = p.batch.x.index_k.row(s.start + key + pair.key);
    T const d_score = p.d_scores_of(s, t + pair.query)[pair.place], weight = p.batch.index_scale * p.batch.x.index_w(n, j);
    T const product = gather_dot(shared.of_query, q, shared.of_key, k, p.batch.x.index_k.extent(1), count);
    shared.q[thread] = q;
    shared.keys[thread] = pair.key;
    shared.d_z[thread] = simt::rounded_product(p.batch.index_scale, product) > 0 ? weight * d_score : T(0);
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::dsa
#endif
