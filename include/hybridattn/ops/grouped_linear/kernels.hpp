// Linear projections of experts as kernels. A block has a tile of one expert's product.
#ifndef HYBRIDATTN_OPS_GROUPED_LINEAR_KERNELS_HPP
#define HYBRIDATTN_OPS_GROUPED_LINEAR_KERNELS_HPP

#include <hybridattn/backend/gpu/gemm.hpp>
#include <hybridattn/ops/grouped_linear/grouped_linear.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI::gpu {

using ExpertOffsets = View<std::int32_t const, 1>;

template <class T> HYBRIDATTN_DEVICE View<T, 2> matrix_of(View<T, 3> all, Index expert) {
  return {all.data + expert * all.stride[0], {all.extent(1), all.extent(2)}, {all.stride[1], 1}};
}
template <class T> HYBRIDATTN_DEVICE View<T, 2> rows_of(View<T, 2> all, ExpertOffsets offsets, Index expert) {
  return {all.data + offsets(expert) * all.stride[0], {offsets(expert + 1) - offsets(expert), all.extent(1)}, all.stride};
}

// Tiles of rows, numbered for all experts: those of expert e begin at offsets[e] / size + e. So an expert has as many numbers as tiles or
// one more, and its first number needs no sum over the experts before it.
HYBRIDATTN_HD inline Index first_tile(ExpertOffsets offsets, Index expert, int size) { return offsets(expert) / size + expert; }
inline Index most_tiles(Index experts, Index rows, int size) { return rows / size + experts; }
HYBRIDATTN_DEVICE Index expert_of(ExpertOffsets offsets, Index tile, int size) {
  Index first = 0, last = offsets.extent(0) - 1;
  while (last - first > 1) {
    Index const middle = (first + last) / 2;
    if (first_tile(offsets, middle, size) <= tile) first = middle;
    else last = middle;
  }
  return first;
}

// y = x m for each expert's rows and its m: w[e] transposed, or w[e].
template <class T, int size> struct MultiplyRows {
  using Tile = ProductTile<T, size>;
  static constexpr int threads = Tile::threads;
  struct Params {
    ExpertOffsets offsets;
    View<T const, 2> x;
    View<T const, 3> w;
    View<T, 2> y;
    bool transposes;
    Into into;
  };
  using Shared = typename Tile::Shared;
  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    Index const expert = expert_of(p.offsets, simt::block_x(), size);
    Index const row = (simt::block_x() - first_tile(p.offsets, expert, size)) * size;
    if (row >= p.offsets(expert + 1) - p.offsets(expert)) return;
    Operand<T> const w = operand(matrix_of(p.w, expert));
    Product<T> const product{operand(rows_of(p.x, p.offsets, expert)), p.transposes ? w.transposed() : w, rows_of(p.y, p.offsets, expert),
                             p.into};
    Tile::multiply(shared, product, row, simt::block_y() * size);
  }
};

// d_w[e] = d_y^T x over the rows of e; 0 without rows.
template <class T, int size> struct MultiplyOverRows {
  using Tile = ProductTile<T, size>;
  static constexpr int threads = Tile::threads;
  struct Params {
    ExpertOffsets offsets;
    View<T const, 2> x, d_y;
    View<T, 3> d_w;
  };
  using Shared = typename Tile::Shared;
  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    Index const expert = simt::block_z();
    Product<T> const product{operand(rows_of(p.d_y, p.offsets, expert)).transposed(), operand(rows_of(p.x, p.offsets, expert)),
                             matrix_of(p.d_w, expert), Into::overwrite};
    Tile::multiply(shared, product, simt::block_x() * size, simt::block_y() * size);
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::gpu
#endif
