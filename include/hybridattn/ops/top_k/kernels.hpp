// TopK as a kernel, and its row for kernels that compute scores. A block has a row. Scores become keys: unsigned integers in the same
// order. The block finds the k-th largest key by its digits of 8 bits, from the highest digit on. For each digit it counts the keys that
// have the digits found so far.
#ifndef HYBRIDATTN_OPS_TOP_K_KERNELS_HPP
#define HYBRIDATTN_OPS_TOP_K_KERNELS_HPP

#include <hybridattn/backend/gpu/reduce.hpp>
#include <hybridattn/ops/top_k/top_k.hpp>

#include <cstdint>

// g++ takes the int sizes of arrays in templates for conversions.
#if defined(__GNUC__) && !defined(__clang__) && !HYBRIDATTN_CUDA
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wsign-conversion"
#endif

namespace hybridattn::inline HYBRIDATTN_ABI::gpu {

// Positive numbers are in the order of their bits, negative ones in the reversed order. Adding 0 makes +0 of -0. The key of a NaN is 0.
template <class T> HYBRIDATTN_DEVICE auto ordered_key(T x) {
  auto const bits = simt::bits_of(x + T(0));
  using Key = std::remove_const_t<decltype(bits)>;
  constexpr Key sign = Key{1} << (8 * sizeof(Key) - 1);
  if (x != x) return Key{0};
  return (bits & sign) != 0 ? static_cast<Key>(~bits) : static_cast<Key>(bits | sign);
}

// A row of n scores. All threads of the block work on it.
template <class T, int threads> class RowTopK {
 public:
  static constexpr int warps = threads / 32, digits = 256;
  struct Shared {
    int counts[warps], ties[warps], histogram[digits], digit, rank;
  };

  HYBRIDATTN_DEVICE RowTopK(Shared& shared, T const* scores, Index n) : shared_(shared), scores_(scores), n_(n) {}

  // The indices of the k largest scores, ascending, for 1 <= k <= n.
  HYBRIDATTN_DEVICE void select(int k, std::int32_t* indices) const { write_chosen(kth_largest(k), indices); }

 private:
  using Key = decltype(simt::bits_of(T()));
  // The k-th largest key, and how many of the keys equal to it are among the k largest.
  struct Bound {
    Key key;
    int ties;
  };

  HYBRIDATTN_DEVICE Key key_of(Index i) const { return ordered_key(scores_[i]); }
  HYBRIDATTN_DEVICE Bound kth_largest(int k) const {
    Bound bound{0, k};
    Key known = 0;  // the bits of the digits that are found
    for (int shift = 8 * sizeof(Key) - 8; shift >= 0; shift -= 8) {
      for (int digit = simt::thread_id(); digit < digits; digit += threads) shared_.histogram[digit] = 0;
      simt::sync_block();
      for (Index i = simt::thread_id(); i < n_; i += threads)
        if (Key const key = key_of(i); (key & known) == bound.key) simt::atomic_add(&shared_.histogram[key >> shift & (digits - 1)], 1);
      simt::sync_block();
      if (simt::warp() == 0) find_digit(bound.ties);
      simt::sync_block();
      bound = {bound.key | static_cast<Key>(shared_.digit) << shift, shared_.rank};
      known |= static_cast<Key>(digits - 1) << shift;
    }
    return bound;
  }
  // The digit of the key that has this rank among the keys of the histogram, and its rank among those with this digit. A lane has 8
  // digits, lane 0 the largest ones.
  HYBRIDATTN_DEVICE void find_digit(int rank) const {
    int const largest = digits - 1 - 8 * simt::lane();
    int own = 0;
    for (int digit = largest; digit > largest - 8; --digit) own += shared_.histogram[digit];
    int sum = own;  // of this lane and those before it
    for (int step = 1; step < 32; step *= 2) {
      int const before = simt::shuffle_up(sum, step);
      if (simt::lane() >= step) sum += before;
    }
    rank -= sum - own;
    if (rank <= 0 || rank > own) return;
    int digit = largest;
    for (; rank > shared_.histogram[digit] && digit > largest - 7; --digit) rank -= shared_.histogram[digit];
    shared_.digit = digit;
    shared_.rank = rank;
  }
  // The indices of the keys above the bound, and of the first ones equal to it. Each turn looks at a key for each thread.
  HYBRIDATTN_DEVICE void write_chosen(Bound bound, std::int32_t* indices) const {
    int above = 0, ties = 0;  // in earlier turns
    for (Index first = 0; first < n_; first += threads) {
      Index const i = first + simt::thread_id();
      bool const inside = i < n_, is_above = inside && key_of(i) > bound.key, is_tie = inside && key_of(i) == bound.key;
      Earlier const a = count_earlier(shared_.counts, is_above), t = count_earlier(shared_.ties, is_tie);
      int const place = above + a.before + simt::smaller(ties + t.before, bound.ties);
      if (is_above || (is_tie && ties + t.before < bound.ties)) indices[place] = static_cast<std::int32_t>(i);
      above += a.all;
      ties += t.all;
    }
  }
  // How many threads of the block vote true: those before this thread, and all. Two calls in a row have other of_warps, so that the barrier
  // of one call is between the reads and the next writes of the other.
  struct Earlier {
    int before, all;
  };
  static HYBRIDATTN_DEVICE Earlier count_earlier(int (&of_warps)[warps], bool vote) {
    std::uint32_t const votes = simt::ballot(vote);
    if (simt::lane() == 0) of_warps[simt::warp()] = simt::count_bits(votes);
    simt::sync_block();
    Earlier result{simt::count_bits(votes & ((std::uint32_t{1} << simt::lane()) - 1)), 0};
    for (int w = 0; w < warps; ++w) {
      if (w < simt::warp()) result.before += of_warps[w];
      result.all += of_warps[w];
    }
    return result;
  }

  Shared& shared_;
  T const* scores_;
  Index n_;
};

template <class T> struct SelectTopK {
  static constexpr int threads = 128;
  using Row = RowTopK<T, threads>;
  struct Params {
    View<T const, 2> scores;
    View<std::int32_t, 2> indices;
  };
  using Shared = typename Row::Shared;
  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    Index const row = simt::block_x(), k = p.indices.extent(1), n = p.scores.extent(1);
    int const chosen = static_cast<int>(simt::smaller(k, n));
    if (chosen > 0) Row{shared, p.scores.row(row), n}.select(chosen, p.indices.row(row));
    for (Index i = chosen + simt::thread_id(); i < k; i += threads) p.indices(row, i) = -1;
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::gpu

#if defined(__GNUC__) && !defined(__clang__) && !HYBRIDATTN_CUDA
#pragma GCC diagnostic pop
#endif
#endif
