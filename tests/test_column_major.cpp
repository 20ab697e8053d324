// The order of operands for a library of column-major matrix products (cuBLAS), against a stand-in that computes as BLAS says.
#include "catch.hpp"

#include <hybridattn/backend/cpu/gemm.hpp>
#include <hybridattn/backend/gpu/product.hpp>
#include <hybridattn/core/random.hpp>

#include <vector>

namespace ha = hybridattn;
using ha::Index;

namespace {

// C = op(A) op(B) + old C, every matrix by columns.
void column_major_gemm(ha::gpu::ColumnMajorProduct<double> const& p) {
  auto const at = [](auto const& factor, Index row, Index column) {
    return factor.transposed ? factor.data[column + row * factor.step] : factor.data[row + column * factor.step];
  };
  for (Index row = 0; row < p.m; ++row)
    for (Index column = 0; column < p.n; ++column) {
      double sum = 0;
      for (Index k = 0; k < p.k; ++k) sum += at(p.first, row, k) * at(p.second, k, column);
      double& c = p.c[row + column * p.c_step];
      c = sum + (p.old == 0 ? 0 : p.old * c);
    }
}
std::vector<double> numbers(Index count, ha::Random& random) {
  std::vector<double> list(static_cast<std::size_t>(count));
  for (double& x : list) x = random.uniform();
  return list;
}

}  // namespace

TEST_CASE("a column-major library computes the row-major product, transposed or not, with gaps between rows, added or not") {
  ha::Random random{ha::Seed{1}, "matrices"};
  Index const M = 3, N = 4, K = 5, gap = 2;
  for (bool const a_transposed : {false, true})
    for (bool const b_transposed : {false, true})
      for (ha::Into const into : {ha::Into::overwrite, ha::Into::add}) {
        auto const operand = [&](std::vector<double> const& memory, Index rows, Index columns, bool transposed) {
          if (!transposed) return ha::Operand<double>{memory.data(), rows, columns, columns + gap, 1};
          return ha::Operand<double>{memory.data(), rows, columns, 1, rows + gap};
        };
        auto const a = numbers(64, random), b = numbers(64, random), before = numbers(M * (N + gap), random);
        auto expected = before, got = before;
        auto const product = [&](std::vector<double>& c) {
          return ha::gpu::Product<double>{
              operand(a, M, K, a_transposed), operand(b, K, N, b_transposed), {c.data(), {M, N}, {N + gap, 1}}, into};
        };
        ha::Cpu cpu{1};
        auto const p = product(expected);
        ha::cpu::gemm(cpu, p.a, p.b, p.c, p.into);
        column_major_gemm(ha::gpu::column_major(product(got)));
        for (std::size_t i = 0; i < got.size(); ++i) CHECK(got[i] == Approx(expected[i]).margin(1e-14));
      }
}
