// The indexer as kernels: scores of a slice of queries, then each query's choice. Numbers in brackets are equations of dsa.hpp.
#ifndef HYBRIDATTN_ATTENTION_DSA_KERNEL_INDEXER_HPP
#define HYBRIDATTN_ATTENTION_DSA_KERNEL_INDEXER_HPP

#include <hybridattn/attention/dsa/kernel_rows.hpp>
#include <hybridattn/ops/top_k/kernels.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI::dsa {

template <class T> struct ChoiceParams {
  Batch<T> batch;
  View<T, 2> scores;                // of the slice, [queries of the slice, keys]
  View<std::int32_t, 2> indices;
  Index first, last;                // queries of the slice
};

// Scores of a few queries with a tile of keys. A thread has a key.
template <class T> struct ScoreKeys {
  static constexpr int threads = 128, queries = 4;
  using Params = ChoiceParams<T>;
  using Tile = GatheredRows<T, threads>;
  struct Shared {
    Tile keys;
    T q[Tile::piece][queries];
  };

  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    auto const& owners = p.batch.sequences.owners;
    Index const first = p.first + simt::block_y() * queries, last = simt::smaller(first + queries, p.last);
    for (Index n = first; n < last;) {   // the queries of one sequence at a time
      Index end = n + 1;
      while (end < last && owners(end) == owners(n)) ++end;
      score(shared, p, n, static_cast<int>(end - n));
      n = end;
    }
  }

 private:
  static HYBRIDATTN_DEVICE void score(Shared& shared, Params const& p, Index n, int count) {
    Query<T> const query{p.batch, n + count - 1};   // it sees all keys that the other ones see
    Index const first_key = simt::block_x() * threads, key = first_key + simt::thread_id(), HI = p.batch.x.index_w.extent(1);
    if (query.seen() <= first_key || query.selected() == query.seen()) return;
    int const keys = static_cast<int>(simt::smaller<Index>(query.seen() - first_key, threads));
    shared.keys.begin[simt::thread_id()] = simt::thread_id() < keys ? query.index_row(key) : nullptr;
    T scores[queries] = {};
    for (Index j = 0; j < HI; ++j) {
      T products[queries] = {};
      multiply(shared, p, n, count, j, keys, products);
      HYBRIDATTN_UNROLL_IN_KERNEL
      for (int u = 0; u < queries; ++u) {
        T const product = simt::rounded_product(p.batch.index_scale, products[u]);
        if (u < count) scores[u] += p.batch.x.index_w(n + u, j) * (product < 0 ? T(0) : product);   // (1)
      }
    }
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int u = 0; u < queries; ++u)
      if (u < count && key < Query<T>{p.batch, n + u}.seen()) p.scores(n + u - p.first, key) = scores[u];
  }
  // products[u] = iq_j . ik of query n + u and the key of this thread, summed in the order of entries.
  static HYBRIDATTN_DEVICE void multiply(Shared& shared, Params const& p, Index n, int count, Index j, int keys, T (&products)[queries]) {
    Index const DI = p.batch.x.index_k.extent(1);
    for (Index first = 0; first < DI; first += Tile::piece) {
      int const entries = entries_from(first, DI, Tile::piece);
      simt::sync_block();
      shared.keys.load(first, DI, keys);
      for (int i = simt::thread_id(); i < entries * queries; i += threads) {
        int const e = i / queries, u = i % queries;
        shared.q[e][u] = u < count ? p.batch.x.index_q(n + u, j, first + e) : T(0);
      }
      simt::sync_block();
      if (simt::thread_id() >= keys) continue;
      for (int e = 0; e < entries; ++e) {
        T const k = shared.keys.entries[simt::thread_id()][e];
        HYBRIDATTN_UNROLL_IN_KERNEL
        for (int u = 0; u < queries; ++u) products[u] += shared.q[e][u] * k;
      }
    }
  }
};

// (2) of a query, from its scores. A block has a query. A query that selects all keys that it sees needs no scores.
template <class T> struct SelectKeys {
  static constexpr int threads = 128;
  using Params = ChoiceParams<T>;
  using Row = gpu::RowTopK<T, threads>;
  using Shared = typename Row::Shared;

  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    Index const n = p.first + simt::block_x();
    Query<T> const query{p.batch, n};
    int const k = static_cast<int>(query.selected());
    std::int32_t* const indices = p.indices.row(n);
    if (k < query.seen()) Row{shared, p.scores.row(n - p.first), query.seen()}.select(k, indices);
    else
      for (int i = simt::thread_id(); i < k; i += threads) indices[i] = i;
    for (Index i = k + simt::thread_id(); i < p.indices.extent(1); i += threads) indices[i] = -1;
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::dsa
#endif
