#ifndef HYBRIDATTN_OPS_CROSS_ENTROPY_CPU_HPP
#define HYBRIDATTN_OPS_CROSS_ENTROPY_CPU_HPP

#include <hybridattn/backend/cpu/gemm.hpp>
#include <hybridattn/backend/cpu/vectors.hpp>
#include <hybridattn/ops/cross_entropy/cross_entropy.hpp>
#include <hybridattn/tensor/in_float.hpp>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>

namespace hybridattn::inline HYBRIDATTN_ABI {

template <> struct On<CountTargets, Cpu> {
  static void forward(Cpu&, View<std::int32_t const, 1> targets, View<Index, 1> count, View<double, 1> scale) {
    count(0) += std::count_if(targets.data, targets.data + targets.count(), [](std::int32_t target) { return target >= 0; });
    scale(0) = count(0) == 0 ? 0 : 1 / static_cast<double>(count(0));
  }
};

template <> struct On<SoftmaxLoss, Cpu> : InFloat<SoftmaxLoss, Cpu> {
  using InFloat::forward;
  template <std::floating_point T>
  static void forward(Cpu& cpu, View<T const, 2> logits, View<std::int32_t const, 1> targets, View<double const, 1> scale,
                      View<T, 2> d_logits, View<LossSum, 1> loss) {
    Index const N = logits.extent(0);
    T const factor = d_logits.empty() ? T(0) : static_cast<T>(scale(0));
    Tensor<double, 1, Cpu> losses_storage{cpu, {N}};
    Tensor<std::int32_t, 1, Cpu> hits_storage{cpu, {N}};
    auto const losses = out(losses_storage);
    auto const hits = out(hits_storage);
    parallel_blocks(cpu, N, 8, [&](Index first, Index last) {
      for (Index n = first; n < last; ++n) {
        Row const row = one_row(logits.row(n), logits.extent(1), targets(n), factor, d_logits.empty() ? nullptr : d_logits.row(n));
        losses(n) = row.loss;
        hits(n) = row.correct;
      }
    });
    LossSum total;
    for (Index n = 0; n < N; ++n) total += {losses(n), targets(n) >= 0, hits(n)};
    loss(0) += total;
  }

 private:
  struct Row {
    double loss;
    bool correct;
  };
  template <class T> static Row one_row(T const* logits, Index V, std::int32_t target, T scale, T* d_logits) {
    check_target(target, V);
    if (target < 0) {
      if (d_logits != nullptr) std::fill_n(d_logits, V, T(0));
      return {0, false};
    }
    T const own = logits[target], peak = largest(logits, V);
    bool const correct = own == peak && std::find(logits, logits + target, peak) == logits + target;  // of equal logits the first counts
    cpu::Vec<T> sums{};
    cpu::for_each_vector<T>(0, V, [&](cpu::Slot<T> s) HYBRIDATTN_INLINE_LAMBDA {
      cpu::Vec<T> const e = of_row(s, cpu::exp<T>(s.get(logits) - peak), T(0));
      sums += e;
      if (d_logits != nullptr) s.put(d_logits, e);
    });
    T const sum = cpu::sum<T>(sums);
    if (d_logits != nullptr) {
      for (Index v = 0; v < V; ++v) d_logits[v] *= scale / sum;
      d_logits[target] -= scale;
    }
    return {static_cast<double>(peak) + std::log(static_cast<double>(sum)) - static_cast<double>(own), correct};
  }
  // x, with `rest` in the lanes after the end of a row.
  template <class T> HYBRIDATTN_INLINE static cpu::Vec<T> of_row(cpu::Slot<T> s, cpu::Vec<T> x, T rest) {
    if (s.count == cpu::lanes<T>) return x;
    return cpu::select<T>(cpu::lane_numbers<T>() < static_cast<typename cpu::BitsOf<T>::type>(s.count), x, cpu::broadcast(rest));
  }
  // The largest number of a row, NaN left out.
  template <class T> static T largest(T const* row, Index V) {
    T const least = -std::numeric_limits<T>::infinity();
    cpu::Vec<T> most = cpu::broadcast(least);
    cpu::for_each_vector<T>(0, V, [&](cpu::Slot<T> s) HYBRIDATTN_INLINE_LAMBDA { most = cpu::max<T>(of_row(s, s.get(row), least), most); });
    return cpu::largest<T>(most);
  }
  // The model checks targets before it calls this. Who calls the operation checks them himself.
  static void check_target(std::int32_t target, Index V) {
#if HYBRIDATTN_BOUNDS_CHECKS
    if (target >= V) std::abort();
#else
    (void)target, (void)V;
#endif
  }
};

template <> struct On<CrossEntropy, Cpu> {
  template <class T>
  static void forward(Cpu& cpu, View<T const, 2> x, View<T const, 2> w, View<std::int32_t const, 1> targets, View<LossSum, 1> loss) {
    in_blocks(cpu, x, w, targets, loss, [&](Wide<Out<T>, 2> logits, View<std::int32_t const, 1> of_block, Index, View<LossSum, 1> sum) {
      On<SoftmaxLoss, Cpu>::forward<wide_t<T>>(cpu, logits, of_block, {}, {}, sum);
    });
  }

  // d_w of several blocks of rows is summed in the wide scalar.
  template <class T, class DW>
  static void backward(Cpu& cpu, View<T const, 2> x, View<T const, 2> w, View<std::int32_t const, 1> targets, View<double const, 1> scale,
                       View<T, 2> d_x, View<DW, 2> d_w, View<LossSum, 1> loss) {
    if constexpr (!std::is_same_v<DW, wide_t<T>>) {
      Tensor<wide_t<T>, 2, Cpu> sums{cpu, d_w.shape};
      backward(cpu, x, w, targets, scale, d_x, out(sums), loss);
      convert(cpu, in(sums), d_w);
    } else {
      for (Index v = 0; v < d_w.extent(0) && x.extent(0) == 0; ++v) std::fill_n(d_w.row(v), d_w.extent(1), DW(0));
      in_blocks(cpu, x, w, targets, loss,
                [&](View<DW, 2> d_logits, View<std::int32_t const, 1> of_block, Index first, View<LossSum, 1> sum) {
                  On<SoftmaxLoss, Cpu>::forward<DW>(cpu, d_logits, of_block, scale, d_logits, sum);
                  View<T, 2> const d_rows{d_x.row(first), {d_logits.extent(0), d_x.extent(1)}, d_x.stride};
                  View<T const, 2> const rows{x.row(first), {d_logits.extent(0), x.extent(1)}, x.stride};
                  cpu::gemm(cpu, operand(d_logits), operand(w), d_rows);
                  cpu::gemm(cpu, operand(d_logits).transposed(), operand(rows), d_w, first == 0 ? Into::overwrite : Into::add);
                });
    }
  }

 private:
  // f(logits, targets, first row, sum) adds the loss of a block of rows to a sum; one block after the other.
  template <class T, class F>
  static void in_blocks(Cpu& cpu, View<T const, 2> x, View<T const, 2> w, View<std::int32_t const, 1> targets, View<LossSum, 1> loss, F f) {
    Index const N = x.extent(0), V = w.extent(0);
    Tensor<wide_t<T>, 2, Cpu> storage{cpu, {std::min(N, CrossEntropy::block_rows), V}};
    LossSum total;
    for (Index first = 0; first < N; first += CrossEntropy::block_rows) {
      Index const rows = std::min(N - first, CrossEntropy::block_rows);
      Wide<Out<T>, 2> const logits{out(storage).data, {rows, V}};
      cpu::gemm(cpu, operand(View<T const, 2>{x.row(first), {rows, x.extent(1)}, x.stride}), operand(w).transposed(), logits);
      LossSum of_block;
      f(logits, View<std::int32_t const, 1>{targets.data + first, {rows}}, first, View<LossSum, 1>{&of_block, {1}});
      total += of_block;
    }
    loss(0) += total;
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
