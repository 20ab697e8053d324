// Matrices of Eigen go through a projection and an attention of the library where they stand, and come back; the same computed
// by Eigen alone gives the same numbers.
#include "program.hpp"

#include <hybridattn/attention/full/full.hpp>
#include <hybridattn/eigen.hpp>
#include <hybridattn/ops/linear/linear.hpp>

#include <cstdio>

namespace ha = hybridattn;
using ha::Index, ha::In, ha::Out;
using Matrix = ha::RowMajorMatrix<float>;   // views want rows; Eigen's own default is columns

// One head by Eigen: rows of weights P, zero above the diagonal.
Matrix causal_softmax(Matrix const& q, Matrix const& k) {
  Matrix P = q * k.transpose() / std::sqrt(static_cast<float>(q.cols()));
  for (Index i = 0; i < P.rows(); ++i) {
    auto const seen = P.row(i).head(i + 1);
    P.row(i).head(i + 1) = (seen.array() - seen.maxCoeff()).exp().eval();
    P.row(i) /= P.row(i).head(i + 1).sum();
    P.row(i).tail(P.cols() - i - 1).setZero();
  }
  return P;
}

int run() {
  Index const N = 50, C = 64, H = 4, D = 16;
  Eigen::MatrixXf const yours = Eigen::MatrixXf::Random(N, C);   // column-major: a copy makes rows of it
  Matrix const x = yours, w_qkv = Matrix::Random(3 * H * D, C) / 8, d_o = Matrix::Random(N, H * D);
  Matrix qkv(N, 3 * H * D), o(N, H * D), d_qkv(N, 3 * H * D), lse(N, H);

  ha::Cpu cpu;
  ha::On<ha::Linear, ha::Cpu>::forward(cpu, ha::view_of(x), ha::view_of(w_qkv), ha::view_of(qkv));   // x w^T

  // q, k and v are blocks of columns of one matrix: views of blocks, no copies.
  auto const part = [&](Matrix& of, Index i) { return ha::heads_of(of.middleCols(i * H * D, H * D), H); };   // [N, H, D]
  auto const sequences = ha::Sequences::equal(1, N);
  auto const config = ha::Full::complete({.num_heads = H, .head_dim = D}, 0, 0);
  ha::Full::Inputs<In<float>> const inputs{.q = part(qkv, 0), .k = part(qkv, 1), .v = part(qkv, 2)};
  ha::Full::Inputs<Out<float>> const gradients{.q = part(d_qkv, 0), .k = part(d_qkv, 1), .v = part(d_qkv, 2)};
  ha::Full::Outputs<Out<float>> const outputs{.o = ha::heads_of(o, H)};
  ha::Full::Saved<Out<float>> const saved{.lse = ha::view_of(lse)};
  ha::On<ha::Full, ha::Cpu>::forward(cpu, config, sequences, inputs, outputs, saved);
  ha::On<ha::Full, ha::Cpu>::backward(cpu, config, sequences, inputs, in(outputs), in(saved), {.o = ha::heads_of(d_o, H)}, gradients);

  float worst = (qkv - x * w_qkv.transpose()).cwiseAbs().maxCoeff();
  for (Index h = 0; h < H; ++h) {
    auto const head = [&](auto view) { return ha::as_eigen(view, h); };   // a map [N, D]
    Matrix const P = causal_softmax(head(inputs.q), head(inputs.k));
    worst = std::max(worst, (head(outputs.o) - P * head(inputs.v)).cwiseAbs().maxCoeff());
    worst = std::max(worst, (head(gradients.v) - P.transpose() * d_o.middleCols(h * D, D)).cwiseAbs().maxCoeff());
  }
  std::printf("largest difference between hybridattn and Eigen, in qkv, o and d_v: %.1e\n", static_cast<double>(worst));
  return worst < 1e-5f ? 0 : 1;
}

int main(int argc, char** argv) { return program::run_without_options("eigen_matrices", argc, argv, run); }
