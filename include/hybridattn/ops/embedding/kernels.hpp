// Embedding as kernels.
#ifndef HYBRIDATTN_OPS_EMBEDDING_KERNELS_HPP
#define HYBRIDATTN_OPS_EMBEDDING_KERNELS_HPP

#include <hybridattn/backend/gpu/gpu.hpp>
#include <hybridattn/ops/embedding/embedding.hpp>

#include <cstdint>

namespace hybridattn::inline HYBRIDATTN_ABI::gpu {

// A thread has a column of a token.
template <class T> struct EmbeddingForward {
  static constexpr int threads = 128;
  struct Params {
    View<std::int32_t const, 1> tokens;
    View<T const, 2> table;
    View<T, 2> y;
  };
  struct Shared {};
  static HYBRIDATTN_DEVICE void run(Shared&, Params const& p) {
    Index const n = simt::block_x(), c = simt::block_y() * threads + simt::thread_id();
    if (c < p.y.extent(1)) p.y(n, c) = p.table(p.tokens(n), c);
  }
};

// A block has up to 512 columns of a row v of the table, a thread every 128th of them. The warps look for the tokens that are v, 1024
// tokens at a time. Then each thread adds the rows of these tokens, in their order, to its sums. All blocks together take
// V ceil(C / 512) N / 32 ballots.
template <class T> struct EmbeddingBackward {
  static constexpr int threads = 128, own_columns = 4, columns = threads * own_columns;
  struct Params {
    View<std::int32_t const, 1> tokens;
    View<T const, 2> d_y;
    View<T, 2> d_table;
    Into into;
  };
  struct Shared {
    std::uint32_t found[32];   // bit l of word i: token 32 i + l of the 1024 tokens is v
  };
  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    T sums[own_columns];
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int k = 0; k < own_columns; ++k) sums[k] = p.into == Into::add && has(p, k) ? p.d_table(simt::block_x(), column(k)) : T(0);
    for (Index first = 0; first < p.tokens.extent(0); first += 1024) {
      find(shared, p, first);
      simt::sync_block();
      if (simt::any(shared.found[simt::lane()] != 0)) add_rows(shared, p, first, sums);
      simt::sync_block();
    }
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int k = 0; k < own_columns; ++k)
      if (has(p, k)) p.d_table(simt::block_x(), column(k)) = sums[k];
  }

 private:
  static HYBRIDATTN_DEVICE Index column(int k) { return simt::block_y() * columns + k * threads + simt::thread_id(); }
  static HYBRIDATTN_DEVICE bool has(Params const& p, int k) { return column(k) < p.d_table.extent(1); }
  static HYBRIDATTN_DEVICE void find(Shared& shared, Params const& p, Index first) {
    for (int word = simt::warp(); word < 32; word += threads / 32) {
      Index const n = first + 32 * word + simt::lane();
      std::uint32_t const found = simt::ballot(n < p.tokens.extent(0) && p.tokens(n) == simt::block_x());
      if (simt::lane() == 0) shared.found[word] = found;
    }
  }
  static HYBRIDATTN_DEVICE void add_rows(Shared const& shared, Params const& p, Index first, T (&sums)[own_columns]) {
    for (int word = 0; word < 32; ++word)
      for (std::uint32_t left = shared.found[word]; left != 0; left &= left - 1) {
        Index const n = first + 32 * word + simt::first_bit(left);
        HYBRIDATTN_UNROLL_IN_KERNEL
        for (int k = 0; k < own_columns; ++k)
          if (has(p, k)) sums[k] += p.d_y(n, column(k));
      }
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::gpu
#endif
