#ifndef HYBRIDATTN_OPS_CROSS_ENTROPY_GPU_HPP
#define HYBRIDATTN_OPS_CROSS_ENTROPY_GPU_HPP

#include <hybridattn/backend/gpu/gemm.hpp>
#include <hybridattn/ops/cross_entropy/kernels.hpp>
#include <hybridattn/tensor/in_float.hpp>

#include <algorithm>

namespace hybridattn::inline HYBRIDATTN_ABI {

template <GpuBackend B> struct On<CountTargets, B> {
  static void forward(B& gpu, View<std::int32_t const, 1> targets, View<Index, 1> count, View<double, 1> scale) {
    launch<gpu::CountTargetsOnce>(gpu, {}, {targets, count, scale});
  }
};

template <GpuBackend B> struct On<SoftmaxLoss, B> : InFloat<SoftmaxLoss, B> {
  using InFloat<SoftmaxLoss, B>::forward;
  template <std::floating_point T>
  static void forward(B& gpu, View<T const, 2> logits, View<std::int32_t const, 1> targets, View<double const, 1> scale,
                      View<T, 2> d_logits, View<LossSum, 1> loss) {
    Tensor<LossSum, 1, B> rows{gpu, {logits.extent(0)}};
    launch<gpu::SoftmaxLossRow<T>>(gpu, {.x = logits.extent(0)}, {logits, targets, scale, d_logits, out(rows)});
    launch<gpu::AddRowLosses>(gpu, {}, {in(rows), loss});
  }
};

template <GpuBackend B> struct On<CrossEntropy, B> : InFloat<CrossEntropy, B> {
  using InFloat<CrossEntropy, B>::forward, InFloat<CrossEntropy, B>::backward;
  template <std::floating_point T>
  static void forward(B& gpu, View<T const, 2> x, View<T const, 2> w, View<std::int32_t const, 1> targets, View<LossSum, 1> loss) {
    in_blocks<T>(gpu, x, w, targets, {}, loss, [](View<T, 2>, View<T const, 2>, Index) {});
  }
  template <std::floating_point T>
  static void backward(B& gpu, View<T const, 2> x, View<T const, 2> w, View<std::int32_t const, 1> targets, View<double const, 1> scale,
                       View<T, 2> d_x, View<T, 2> d_w, View<LossSum, 1> loss) {
    if (x.extent(0) == 0) gpu::gemm<T>(gpu, Operand<T>{nullptr, w.extent(0), 0}, Operand<T>{nullptr, 0, w.extent(1)}, d_w);   // d_w = 0
    in_blocks<T>(gpu, x, w, targets, scale, loss, [&](View<T, 2> d_logits, View<T const, 2> rows, Index first) {
      gpu::gemm<T>(gpu, operand(d_logits), operand(w), View<T, 2>{d_x.row(first), rows.shape, d_x.stride});
      gpu::gemm<T>(gpu, operand(d_logits).transposed(), operand(rows), d_w, first == 0 ? Into::overwrite : Into::add);
    });
  }

 private:
  // f(d_logits, rows of x, first row) for blocks of rows, one after the other. Without a scale there are no gradients: then f receives the
  // logits.
  template <class T, class F>
  static void in_blocks(B& gpu, View<T const, 2> x, View<T const, 2> w, View<std::int32_t const, 1> targets, View<double const, 1> scale,
                        View<LossSum, 1> loss, F f) {
    Index const N = x.extent(0), V = w.extent(0);
    Tensor<T, 2, B> storage{gpu, {std::min(N, CrossEntropy::block_rows), V}};
    Tensor<LossSum, 1, B> losses{gpu, {N}};
    for (Index first = 0; first < N; first += CrossEntropy::block_rows) {
      Index const count = std::min(N - first, CrossEntropy::block_rows);
      View<T, 2> const logits{out(storage).data, {count, V}};
      View<T const, 2> const rows{x.row(first), {count, x.extent(1)}, x.stride};
      gpu::gemm<T>(gpu, operand(rows), operand(w).transposed(), logits);
      launch<gpu::SoftmaxLossRow<T>>(
          gpu, {.x = count},
          {logits, {targets.data + first, {count}}, scale, scale.empty() ? View<T, 2>{} : logits, {out(losses).data + first, {count}}});
      f(logits, rows, first);
    }
    launch<gpu::AddRowLosses>(gpu, {}, {in(losses), loss});
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
