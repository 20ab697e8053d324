// TopK as a kernel. A block has a row. Scores become unsigned integers in the same order, their keys. The block finds the k-th largest key
// bit by bit, from the highest bit on: a bit is set where at least k keys are as large as the bits so far. Each bit counts the row once.
#ifndef HYBRIDATTN_OPS_TOP_K_KERNELS_HPP
#define HYBRIDATTN_OPS_TOP_K_KERNELS_HPP

#include <hybridattn/backend/gpu/reduce.hpp>
#include <hybridattn/ops/top_k/top_k.hpp>

#include <cstdint>

namespace hybridattn::inline HYBRIDATTN_ABI::gpu {

// Positive numbers are in the order of their bits, negative ones in the reversed order. Adding 0 makes +0 of -0. The key of a NaN is 0.
template <class T> HYBRIDATTN_DEVICE auto ordered_key(T x) {
  auto const bits = simt::bits_of(x + T(0));
  using Key = std::remove_const_t<decltype(bits)>;
  constexpr Key sign = Key{1} << (8 * sizeof(Key) - 1);
  if (x != x) return Key{0};
  return (bits & sign) != 0 ? static_cast<Key>(~bits) : static_cast<Key>(bits | sign);
}

template <class T> struct SelectTopK {
  static constexpr int threads = 128, warps = threads / 32;
  struct Params {
    View<T const, 2> scores;
    View<std::int32_t, 2> indices;
  };
  struct Shared {
    int of_warps[warps];
  };
  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    Index const row = simt::block_x(), k = p.indices.extent(1);
    int const chosen = static_cast<int>(simt::smaller(k, p.scores.extent(1)));
    if (chosen > 0) write_chosen(shared, p, chosen, kth_largest(shared, p, chosen));
    for (Index i = chosen + simt::thread_id(); i < k; i += threads) p.indices(row, i) = -1;
  }

 private:
  using Key = decltype(simt::bits_of(T()));

  static HYBRIDATTN_DEVICE Key key_of(Params const& p, Index i) { return ordered_key(p.scores(simt::block_x(), i)); }
  // How many keys of the row are at least `least`.
  static HYBRIDATTN_DEVICE int count_from(Shared& shared, Params const& p, Key least) {
    int count = 0;
    for (Index i = simt::thread_id(); i < p.scores.extent(1); i += threads) count += key_of(p, i) >= least;
    return sum_block(shared.of_warps, count);
  }
  // The k-th largest key, or a smaller number that exactly k keys reach.
  static HYBRIDATTN_DEVICE Key kth_largest(Shared& shared, Params const& p, int k) {
    Key found = 0;
    for (Key bit = Key{1} << (8 * sizeof(Key) - 1); bit != 0; bit >>= 1) {
      int const count = count_from(shared, p, found | bit);
      if (count >= k) found |= bit;
      if (count == k) break;
    }
    return found;
  }
  // The indices of the keys above `least`, and of the first ones equal to it, k in all. Each turn looks at a key for each thread.
  static HYBRIDATTN_DEVICE void write_chosen(Shared& shared, Params const& p, int k, Key least) {
    int const most_ties = k - count_from(shared, p, least + 1);   // the largest key is infinity's, so least + 1 does not overflow
    int above = 0, ties = 0;   // in earlier turns
    for (Index first = 0; first < p.scores.extent(1); first += threads) {
      Index const i = first + simt::thread_id();
      bool const inside = i < p.scores.extent(1), is_above = inside && key_of(p, i) > least, is_tie = inside && key_of(p, i) == least;
      Earlier const a = count_earlier(shared.of_warps, is_above), t = count_earlier(shared.of_warps, is_tie);
      int const place = above + a.before + simt::smaller(ties + t.before, most_ties);
      if (is_above || (is_tie && ties + t.before < most_ties)) p.indices(simt::block_x(), place) = static_cast<std::int32_t>(i);
      above += a.all;
      ties += t.all;
    }
  }
  // How many threads of the block vote true: those before this thread, and all.
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
    simt::sync_block();   // of_warps may be used again
    return result;
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::gpu
#endif
