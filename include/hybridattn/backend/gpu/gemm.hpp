// Matrix products on GPU backends, tile by tile. A row of a result depends only on that row of `a` and on `b`, and is summed over the
// depth in one fixed order.
#ifndef HYBRIDATTN_BACKEND_GPU_GEMM_HPP
#define HYBRIDATTN_BACKEND_GPU_GEMM_HPP

#include <hybridattn/backend/gpu/gpu.hpp>
#include <hybridattn/backend/gpu/product.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI::gpu {

// A tile of a product, size x size elements. Each thread has `each` x `each` of them; a step in depth goes through shared memory.
template <class T, int size_> struct ProductTile {
  static constexpr int size = size_, depth = 16, each = 4, threads = size / each * (size / each);
  struct Shared {
    simt::Table<T, depth, size + 1> a, b;
  };

  // Elements (first .. first + size, k .. k + depth) of x, zero outside. Neighbouring threads read neighbouring addresses.
  static HYBRIDATTN_DEVICE void load(simt::Table<T, depth, size + 1>& to, Operand<T> const& x, Index first, Index k) {
    for (int i = simt::thread_id(); i < size * depth; i += threads) {
      int const row = x.column == 1 ? i / depth : i % size, step = x.column == 1 ? i % depth : i / size;
      to[step][row] = first + row < x.rows && k + step < x.columns ? x(first + row, k + step) : T(0);
    }
  }
  // The tile of p.c from element (row, column) on.
  static HYBRIDATTN_DEVICE void multiply(Shared& shared, Product<T> const& p, Index row, Index column) {
    int const r = simt::thread_id() / (size / each) * each, c = simt::thread_id() % (size / each) * each;
    Index const rows = p.c.extent(0) - row, columns = p.c.extent(1) - column;
    bool const has_elements = r < rows && c < columns;
    T sum[each][each] = {};
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int i = 0; i < each; ++i) {
      HYBRIDATTN_UNROLL_IN_KERNEL
      for (int j = 0; j < each; ++j)
        if (p.into == Into::add && r + i < rows && c + j < columns) sum[i][j] = p.c(row + r + i, column + c + j);
    }
    for (Index k = 0; k < p.a.columns; k += depth) {
      load(shared.a, p.a, row, k);
      load(shared.b, p.b.transposed(), column, k);
      simt::sync_block();
      if (has_elements) add_step(shared, r, c, sum);
      simt::sync_block();
    }
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int i = 0; i < each; ++i) {
      HYBRIDATTN_UNROLL_IN_KERNEL
      for (int j = 0; j < each; ++j)
        if (r + i < rows && c + j < columns) p.c(row + r + i, column + c + j) = sum[i][j];
    }
  }

 private:
  static HYBRIDATTN_DEVICE void add_step(Shared const& shared, int r, int c, T (&sum)[each][each]) {
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int k = 0; k < depth; ++k) {
      HYBRIDATTN_UNROLL_IN_KERNEL
      for (int i = 0; i < each; ++i) {
        HYBRIDATTN_UNROLL_IN_KERNEL
        for (int j = 0; j < each; ++j) sum[i][j] += shared.a[k][r + i] * shared.b[k][c + j];
      }
    }
  }
};

template <class T, int size> struct Multiply {
  using Tile = ProductTile<T, size>;
  static constexpr int threads = Tile::threads;
  using Params = Product<T>;
  using Shared = typename Tile::Shared;
  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    Tile::multiply(shared, p, simt::block_x() * size, simt::block_y() * size);
  }
};

// f(size) with the size of the tiles for `products` matrices [rows, columns]: large tiles where they are many enough for a whole GPU.
// The size changes no bit.
template <class F> void with_tile(Index products, Index rows, Index columns, F f) {
  constexpr Index enough = 128;
  if (products * ceil_div(rows, 64) * ceil_div(columns, 64) >= enough) f(std::integral_constant<int, 64>{});
  else f(std::integral_constant<int, 32>{});
}

// c = a b or c += a b, for a [M, K], b [K, N], c [M, N]. Transposed operands are read in place. The one place where a library of
// matrix products may compute instead: a backend with multiply(product) decides there.
template <class T, GpuBackend B> void gemm(B& gpu, Operand<T> a, Operand<T> b, View<T, 2> c, Into into = Into::overwrite) {
  check(a.columns == b.rows && c.extent(0) == a.rows && c.extent(1) == b.columns, "gemm: [", a.rows, ", ", a.columns, "] times [", b.rows,
        ", ", b.columns, "] does not give [", c.extent(0), ", ", c.extent(1), "]");
  Product<T> const product{a, b, c, into};
  if constexpr (requires { gpu.multiply(product); })
    if (gpu.multiply(product)) return;
  with_tile(1, c.extent(0), c.extent(1), [&](auto size) {
    launch<Multiply<T, size()>>(gpu, {.x = ceil_div(c.extent(0), size()), .y = ceil_div(c.extent(1), size())}, product);
  });
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::gpu
#endif
