// What the kernels of sparse attention share: the keys of a query, and rows that a block gathers from anywhere in memory.
#ifndef HYBRIDATTN_ATTENTION_DSA_KERNEL_ROWS_HPP
#define HYBRIDATTN_ATTENTION_DSA_KERNEL_ROWS_HPP

#include <hybridattn/attention/dsa/types.hpp>
#include <hybridattn/backend/gpu/reduce.hpp>
#include <hybridattn/tensor/sequences_on.hpp>

// g++ takes the int sizes of arrays in templates for conversions.
#if defined(__GNUC__) && !defined(__clang__) && !HYBRIDATTN_CUDA
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wsign-conversion"
#endif

namespace hybridattn::inline HYBRIDATTN_ABI::dsa {

// What every kernel knows of a batch.
template <class T> struct Batch {
  SparseOptions options;
  Inputs<In<T>> x;
  SequenceTable sequences;
  View<std::int32_t const, 2> indices;   // empty: a query attends to every key that it sees
  int group;                             // query heads of a key/value head
  T scale, index_scale;
  Cache<In<T>> cache;                    // of past tokens; empty views where no sequence has any

  HYBRIDATTN_DEVICE int kv_head(Index h) const { return static_cast<int>(h) / group; }
};

// The blocks of a grid are `parts` of each sequence. Numbers of blocks and tokens fit into an int, and a division of 64 bits would need
// a function.
struct PartOfSequence {
  int sequence, part;
  explicit HYBRIDATTN_DEVICE PartOfSequence(Index parts)
      : sequence(static_cast<int>(simt::block_x()) / static_cast<int>(parts)),
        part(static_cast<int>(simt::block_x()) % static_cast<int>(parts)) {}
};

// Query n of the batch, and its keys by their positions in its sequence, cached or new.
template <class T> class Query {
 public:
  HYBRIDATTN_DEVICE Query(Batch<T> const& batch, Index n)
      : b_(batch), n_(n), number_(batch.sequences.owners(n)), sequence_(batch.sequences.list(number_)) {}

  HYBRIDATTN_DEVICE Index seen() const { return Index{b_.sequences.positions(n_)} + 1; }
  HYBRIDATTN_DEVICE Index selected() const { return simt::smaller(selection_size(b_.options, sequence_.length), seen()); }
  // The number of keys that it attends to, and key j of them.
  HYBRIDATTN_DEVICE Index count() const { return b_.indices.empty() ? seen() : selected(); }
  HYBRIDATTN_DEVICE Index key(Index j) const { return b_.indices.empty() ? j : Index{b_.indices(n_, j)}; }

  HYBRIDATTN_DEVICE T const* key_row(Index position, Index hk) const {
    return is_cached(position) ? b_.cache.keys.row(number_, position, hk) : b_.x.k.row(token(position), hk);
  }
  HYBRIDATTN_DEVICE T const* value_row(Index position, Index hk) const {
    return is_cached(position) ? b_.cache.values.row(number_, position, hk) : b_.x.v.row(token(position), hk);
  }
  HYBRIDATTN_DEVICE T const* index_row(Index position) const {
    return is_cached(position) ? b_.cache.index_keys.row(number_, position) : b_.x.index_k.row(token(position));
  }

 private:
  HYBRIDATTN_DEVICE bool is_cached(Index position) const { return position < sequence_.past; }
  HYBRIDATTN_DEVICE Index token(Index position) const { return sequence_.start + position - sequence_.past; }

  Batch<T> const& b_;
  Index n_, number_;
  Sequence sequence_;
};

// A row of each thread of a block, anywhere in memory. The block reads a piece of all rows at a time. Neighbouring
// lanes read neighbouring entries.
template <class T, int threads> struct GatheredRows {
  static constexpr int piece = 32;
  T const* begin[threads];
  T entries[threads][piece + 1];  // one more, so that the rows begin in different banks

  // Entries first .. first + piece - 1 of the rows of the first `count` threads.
  HYBRIDATTN_DEVICE void load(Index first, Index size, int count) {
    Index const entry = first + simt::lane();
    for (int r = simt::warp(); r < count && entry < size; r += threads / 32) entries[r][simt::lane()] = begin[r][entry];
  }
};
HYBRIDATTN_DEVICE int entries_from(Index first, Index size, int piece) {
  return static_cast<int>(simt::smaller<Index>(size - first, piece));
}

// x . row of this thread, for the first `count` threads of the block, 0 for the others. Entries are summed in their order. All threads
// of the block call this, with the same x.
template <class T, int threads> HYBRIDATTN_DEVICE T gather_dot(GatheredRows<T, threads>& rows, T const* x, T const* row, Index size,
                                                               int count) {
  int const thread = simt::thread_id();
  T sum = 0;
  rows.begin[thread] = row;
  for (Index first = 0; first < size; first += rows.piece) {
    simt::sync_block();
    rows.load(first, size, count);
    simt::sync_block();
    HYBRIDATTN_UNROLL_8_IN_KERNEL
    for (int e = 0, end = entries_from(first, size, thread < count ? rows.piece : 0); e < end; ++e)
      sum += x[first + e] * rows.entries[thread][e];
  }
  return sum;
}
// The same of two rows of each thread.
template <class T, int threads>
HYBRIDATTN_DEVICE T gather_dot(GatheredRows<T, threads>& a, T const* a_row, GatheredRows<T, threads>& b, T const* b_row, Index size,
                               int count) {
  int const thread = simt::thread_id();
  T sum = 0;
  a.begin[thread] = a_row;
  b.begin[thread] = b_row;
  for (Index first = 0; first < size; first += a.piece) {
    simt::sync_block();
    a.load(first, size, count);
    b.load(first, size, count);
    simt::sync_block();
    HYBRIDATTN_UNROLL_8_IN_KERNEL
    for (int e = 0, end = entries_from(first, size, thread < count ? a.piece : 0); e < end; ++e)
      sum += a.entries[thread][e] * b.entries[thread][e];
  }
  return sum;
}

// y [size] (+)= the sum of weights[j] times row j, in the order of j. A thread has every `threads`-th entry of y.
template <class T, int threads>
HYBRIDATTN_DEVICE void add_rows(T const (&weights)[threads], T const* const (&rows)[threads], int count, bool overwrites, T* y,
                                Index size) {
  for (Index d = simt::thread_id(); d < size; d += threads) {
    T sum = overwrites ? T(0) : y[d];
    HYBRIDATTN_UNROLL_8_IN_KERNEL
    for (int j = 0; j < count; ++j) sum += weights[j] * rows[j][d];
    y[d] = sum;
  }
}

// The largest of one number of each thread of a block, for all threads. None is NaN.
template <class T, int warps> HYBRIDATTN_DEVICE T largest_of_block(T (&of_warps)[warps], T x) {
  x = simt::largest_of_lanes(x);
  if (simt::lane() == 0) of_warps[simt::warp()] = x;
  simt::sync_block();
  T largest = -simt::infinity<T>();
  for (T of_warp : of_warps) largest = simt::larger(largest, of_warp);
  simt::sync_block();  // of_warps may be used again
  return largest;
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::dsa

#if defined(__GNUC__) && !defined(__clang__) && !HYBRIDATTN_CUDA
#pragma GCC diagnostic pop
#endif
#endif
