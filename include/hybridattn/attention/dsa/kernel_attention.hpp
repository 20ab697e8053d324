// Attention over the keys of each query as kernels, in exact arithmetic. Numbers in brackets are equations of dsa.hpp.
#ifndef HYBRIDATTN_ATTENTION_DSA_KERNEL_ATTENTION_HPP
#define HYBRIDATTN_ATTENTION_DSA_KERNEL_ATTENTION_HPP

#include <hybridattn/attention/dsa/kernel_pairs.hpp>
#include <hybridattn/attention/dsa/kernel_rows.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI::dsa {

template <class T> struct AttentionParams {
  Batch<T> batch;
  View<T, 3> o;
  View<wide_t<T>, 2> lse;                // an empty view where nobody needs it
  // Only in backward.
  View<T const, 3> y, d_o;
  View<wide_t<T> const, 2> y_lse;
  View<wide_t<T>, 2> delta;
  Inputs<Out<T>> d_x;
  Index tiles;  // of keys, in the longest sequence
};

// scale q . k, of head h of query n and a key of each thread. Of the threads from `count` on it is 0.
template <class T, int threads>
HYBRIDATTN_DEVICE T attention_score(GatheredRows<T, threads>& rows, Batch<T> const& b, Index n, Index h, T const* key_row, int count) {
  return simt::rounded_product(b.scale, gather_dot(rows, b.x.q.row(n, h), key_row, b.x.q.extent(2), count));
}

// o and lse of one head of a query. A thread has a key of a tile of keys, then entries of o. The largest score is found before weights are
// computed. So o overflows only where it does in the order of the equations.
template <class T> struct Attend {
  static constexpr int threads = 64;
  using Params = AttentionParams<T>;
  struct Shared {
    GatheredRows<T, threads> keys;
    T const* values[threads];
    T weights[threads], of_warps[threads / 32];
  };

  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    Index const n = simt::block_x(), h = simt::block_y(), D = p.o.extent(2);
    Query<T> const query{p.batch, n};
    Index const count = query.count();
    T score = 0, largest = -simt::infinity<T>(), total = 0;
    for (Index first = 0; first < count; first += threads) {
      score = score_from(shared, p, query, first);
      if (first + simt::thread_id() < count) largest = simt::larger(score, largest);
    }
    largest = largest_of_block(shared.of_warps, largest);
    for (Index first = 0; first < count; first += threads) {
      if (count > threads) score = score_from(shared, p, query, first);
      Index const j = first + simt::thread_id();
      T const weight = j < count ? std::exp(score - largest) : T(0);
      total += weight;
      shared.weights[simt::thread_id()] = weight;
      shared.values[simt::thread_id()] = j < count ? query.value_row(query.key(j), p.batch.kv_head(h)) : nullptr;
      simt::sync_block();
      add_rows(shared.weights, shared.values, entries_from(first, count, threads), first == 0, p.o.row(n, h), D);
    }
    total = gpu::sum_block(shared.of_warps, total);
    for (Index d = simt::thread_id(); d < D; d += threads) p.o(n, h, d) /= total;
    if (simt::thread_id() == 0 && !p.lse.empty()) p.lse(n, h) = largest + std::log(total);   // (3)
  }

 private:
  static HYBRIDATTN_DEVICE T score_from(Shared& shared, Params const& p, Query<T> const& query, Index first) {
    Index const j = first + simt::thread_id(), n = simt::block_x(), h = simt::block_y();
    T const* const row = j < query.count() ? query.key_row(query.key(j), p.batch.kv_head(h)) : nullptr;
    return attention_score(shared.keys, p.batch, n, h, row, entries_from(first, query.count(), threads));
  }
};

// delta and d_q of one head of a query. A thread has a key of a tile of keys, then entries of d_q.
template <class T> struct AttendQueryGradients {
  static constexpr int threads = 64;
  using Params = AttentionParams<T>;
  struct Shared {
    GatheredRows<T, threads> rows;
    T const* keys[threads];
    T d_s[threads];
  };

  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    Index const n = simt::block_x(), h = simt::block_y(), hk = p.batch.kv_head(h), D = p.y.extent(2);
    Query<T> const query{p.batch, n};
    // The order of gather_dot: where one key has all the weight, o is its v, and the two terms of d_s cancel.
    T const delta = dot(p.d_o.row(n, h), p.y.row(n, h), D), lse = p.y_lse(n, h);
    if (simt::thread_id() == 0) p.delta(n, h) = delta;
    for (Index first = 0, count = query.count(); first < count; first += threads) {
      Index const j = first + simt::thread_id(), key = j < count ? query.key(j) : 0;
      int const keys = entries_from(first, count, threads);
      T const *const k = query.key_row(key, hk), *const v = query.value_row(key, hk);
      T const weight = std::exp(attention_score(shared.rows, p.batch, n, h, k, keys) - lse);
      T const d_weight = gather_dot(shared.rows, p.d_o.row(n, h), v, D, keys);
      shared.keys[simt::thread_id()] = k;
      shared.d_s[simt::thread_id()] = p.batch.scale * weight * (d_weight - delta);
      simt::sync_block();
      add_rows(shared.d_s, shared.keys, keys, first == 0, p.d_x.q.row(n, h), D);   // (4)
    }
  }
};

// d_k and d_v of a tile of keys in one key/value head. The sums go through the queries in order, and for each through the heads of the
// group. A thread has a pair of a query and a key, then entries of the gradients.
template <class T> struct AttendKeyGradients {
  static constexpr int threads = Pairs::threads;
  using Params = AttentionParams<T>;
  struct Shared {
    Pairs::Shared pairs;
    GatheredRows<T, threads> of_query, of_key;
    T const *q[threads], *d_o[threads];
    T weights[threads], d_s[threads];
    int keys[threads];
  };

  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    PartOfSequence const at{p.tiles};
    Sequence const sequence = p.batch.sequences.list(at.sequence);
    Index const first = Index{at.part} * Pairs::keys;
    if (first >= sequence.length) return;
    View<T, 2> const d_k = tile_of(p.d_x.k, sequence, first), d_v = tile_of(p.d_x.v, sequence, first);
    set_tile_zero(d_k);
    set_tile_zero(d_v);
    for (Index query = first; query < sequence.length; query += Pairs::queries) {
      Pairs const pairs{shared.pairs, p.batch, sequence, first, query, sequence.length};
      int const terms = pairs.count() * p.batch.group;
      for (int term = 0; term < terms; term += threads) {
        int const count = entries_from(term, terms, threads);
        weigh(shared, p, pairs, sequence.start + query, sequence.start + first, term, count);
        simt::sync_block();
        add_terms(shared.d_s, shared.q, shared.keys, count, d_k);   // (4)
        add_terms(shared.weights, shared.d_o, shared.keys, count, d_v);
      }
    }
  }

 private:
  // The rows of a tile of keys, in this block's head.
  static HYBRIDATTN_DEVICE View<T, 2> tile_of(View<T, 3> x, Sequence s, Index first) {
    return {x.row(s.start + first, simt::block_y()), {entries_from(first, s.length, Pairs::keys), x.extent(2)}, {x.stride[0], 1}};
  }
  // The weights of `count` terms: pairs, and for each the heads of the group. Queries and keys are counted from tokens n and key.
  static HYBRIDATTN_DEVICE void weigh(Shared& shared, Params const& p, Pairs const& pairs, Index n, Index key, int term, int count) {
    int const thread = simt::thread_id();
    int const group = p.batch.group, own = term + (thread < count ? thread : 0);
    Index const hk = simt::block_y(), h = hk * group + own % group;
    Pair const pair = pairs[own / group];
    n += pair.query;
    key += pair.key;
    T const *const q = p.batch.x.q.row(n, h), *const d_o = p.d_o.row(n, h);
    Index const D = p.y.extent(2);
    T const product = gather_dot(shared.of_query, q, shared.of_key, p.batch.x.k.row(key, hk), D, count);
    T const d_weight = gather_dot(shared.of_query, d_o, shared.of_key, p.batch.x.v.row(key, hk), D, count);
    T const weight = std::exp(simt::rounded_product(p.batch.scale, product) - p.y_lse(n, h));
    shared.q[thread] = q;
    shared.d_o[thread] = d_o;
    shared.weights[thread] = weight;
    shared.d_s[thread] = p.batch.scale * weight * (d_weight - p.delta(n, h));
    shared.keys[thread] = pair.key;
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::dsa
#endif
