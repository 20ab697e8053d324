// The queries that attend to a tile of keys: found by search in their ascending rows of indices, in the order of the queries.
#ifndef HYBRIDATTN_ATTENTION_DSA_KERNEL_PAIRS_HPP
#define HYBRIDATTN_ATTENTION_DSA_KERNEL_PAIRS_HPP

#include <hybridattn/attention/dsa/kernel_rows.hpp>

// g++ takes the int sizes of arrays in templates for conversions.
#if defined(__GNUC__) && !defined(__clang__) && !HYBRIDATTN_CUDA
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wsign-conversion"
#endif

namespace hybridattn::inline HYBRIDATTN_ABI::dsa {

// A query that attends to a key of a tile.
struct Pair {
  int query, key;   // counted from the first query and the first key
  Index place;      // of the key in the query's row of indices
};

// All pairs of up to 64 queries with a tile of 32 keys, key by key. A block finds them together. A thread searches for the keys of a query,
// then lists the pairs of a key with half of the queries.
class Pairs {
 public:
  static constexpr int threads = 64, queries = 64, keys = 32;
  struct Shared {
    std::uint32_t keys_of[queries], queries_of[2 * keys];  // bits. queries_of has two words for each key
    Index place[queries];  // of a query's first key in the tile
    std::uint16_t list[queries * keys];  // key * queries + query
  };

  // Of the queries first_query .. last_query - 1 of a sequence, at most 64.
  template <class T>
  HYBRIDATTN_DEVICE Pairs(Shared& shared, Batch<T> const& batch, Sequence s, Index first_key, Index first_query, Index last_query)
      : shared_(shared) {
    Index const query = first_query + simt::thread_id();
    find(query < last_query, Query<T>{batch, s.start + simt::smaller(query, s.length - 1)}, first_key);
    simt::sync_block();
    write_list();
    simt::sync_block();
  }

  HYBRIDATTN_DEVICE int count() const { return count_; }
  HYBRIDATTN_DEVICE Pair operator[](int i) const {
    int const query = shared_.list[i] % queries, key = shared_.list[i] / queries;
    std::uint32_t const before = shared_.keys_of[query] & ((std::uint32_t{1} << key) - 1);
    return {query, key, shared_.place[query] + simt::count_bits(before)};
  }

 private:
  template <class T> HYBRIDATTN_DEVICE void find(bool is_query, Query<T> const& query, Index first_key) {
    Index const count = is_query ? query.count() : 0;
    Index place = 0;
    for (Index end = count; place < end;) {  // key place - 1 is before the tile, key end is not
      Index const middle = (place + end) / 2;
      if (query.key(middle) < first_key) place = middle + 1;
      else end = middle;
    }
    std::uint32_t bits = 0;
    for (Index j = place; j < count && query.key(j) < first_key + keys; ++j) bits |= std::uint32_t{1} << (query.key(j) - first_key);
    shared_.place[simt::thread_id()] = place;
    shared_.keys_of[simt::thread_id()] = bits;
    for (int key = 0; key < keys; ++key) {
      std::uint32_t const votes = simt::ballot((bits >> key & 1) != 0);
      if (simt::lane() == 0) shared_.queries_of[2 * key + simt::warp()] = votes;
    }
  }
  HYBRIDATTN_DEVICE void write_list() {
    int const own = simt::thread_id();
    int place = 0;
    count_ = 0;
    for (int i = 0; i < 2 * keys; ++i) {
      if (i == own) place = count_;
      count_ += simt::count_bits(shared_.queries_of[i]);
    }
    for (std::uint32_t bits = shared_.queries_of[own]; bits != 0; bits &= bits - 1)
      shared_.list[place++] = static_cast<std::uint16_t>(own / 2 * queries + own % 2 * 32 + simt::first_bit(bits));
  }

  Shared& shared_;
  int count_;
};

// Gradients of a tile of keys, set to zero or added to by a block of threads. A thread has every 64th entry of each key.
template <class T> HYBRIDATTN_DEVICE void set_tile_zero(View<T, 2> d_keys) {
  for (Index key = 0; key < d_keys.extent(0); ++key)
    for (Index d = simt::thread_id(); d < d_keys.extent(1); d += Pairs::threads) d_keys.row(key)[d] = 0;
}
// Row keys[i] += weights[i] times row i, in the order of i. Equal keys follow each other.
template <class T, int threads>
HYBRIDATTN_DEVICE void add_terms(T const (&weights)[threads], T const* const (&rows)[threads], int const (&keys)[threads], int count,
                                 View<T, 2> d_keys) {
  for (Index d = simt::thread_id(); d < d_keys.extent(1); d += threads)
    for (int i = 0; i < count;) {
      int const key = keys[i];
      T* const d_key = d_keys.row(key);
      T sum = d_key[d];
      for (; i < count && keys[i] == key; ++i) sum += weights[i] * rows[i][d];
      d_key[d] = sum;
    }
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::dsa

#if defined(__GNUC__) && !defined(__clang__) && !HYBRIDATTN_CUDA
#pragma GCC diagnostic pop
#endif
#endif
