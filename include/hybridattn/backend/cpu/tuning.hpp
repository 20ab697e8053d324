// The shapes of the CPU's kernels for each instruction set. What limits a shape is the number of vector registers: a tile of R rows and
// V vectors needs R V sums, V loaded vectors and one broadcast number.
#ifndef HYBRIDATTN_BACKEND_CPU_TUNING_HPP
#define HYBRIDATTN_BACKEND_CPU_TUNING_HPP

#include <hybridattn/core/config.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI::cpu {

struct TileShape {
  int rows, vectors;
};
struct Tuning {
  int vector_bytes;
  TileShape product;     // of a matrix product, from packed operands
  TileShape attention;   // of Full: keys x queries, and queries x entries of v
  TileShape delta;       // of GDN: tokens of a group x vectors of a state's row in one pass
  int index_sums;        // of DSA's indexer: sums of a tile whose rows are the heads of a query
  TileShape shared;      // of heads that share keys which are read in place: heads x vectors of a row
};

// `share` is the share of the peak of fused multiply-adds that a tile reached alone, from the first-level cache.
#if defined(__AVX512F__)   // 32 registers of 64 bytes
inline constexpr Tuning tuning{
    .vector_bytes = 64,
    .product = {8, 2},     // share .97; 6x4 is as fast, 16x1 loads too often
    .attention = {8, 2},
    .delta = {4, 1},       // 12 sums and updates, 4 updates: one load and store for 12 multiply-adds
    .index_sums = 16,
    .shared = {4, 4},
};
#elif defined(__AVX__)   // 16 registers of 32 bytes
inline constexpr Tuning tuning{
    .vector_bytes = 32,
    .product = {6, 2},     // share .97; 4x3 .96, 4x2 .95, 3x4 and 12x1 do not fit
    .attention = {4, 2},   // share .95; 4x3 wants 24 queries and loses more at the diagonal
    .delta = {2, 2},       // 4x1 needs 13 loads for the 12 multiply-adds of a row, 2x2 needs 8
    .index_sums = 8,
    .shared = {4, 2},
};
#elif defined(__aarch64__)   // 32 registers of 16 bytes
inline constexpr Tuning tuning{.vector_bytes = 16, .product = {8, 2}, .attention = {8, 2}, .delta = {4, 2}, .index_sums = 16, .shared = {4, 4}};
#else   // 16 registers of 16 bytes
inline constexpr Tuning tuning{.vector_bytes = 16, .product = {6, 2}, .attention = {4, 2}, .delta = {2, 2}, .index_sums = 8, .shared = {4, 2}};
#endif

}  // namespace hybridattn::inline HYBRIDATTN_ABI::cpu
#endif
