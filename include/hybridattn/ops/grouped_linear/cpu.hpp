#ifndef HYBRIDATTN_OPS_GROUPED_LINEAR_CPU_HPP
#define HYBRIDATTN_OPS_GROUPED_LINEAR_CPU_HPP

#include <hybridattn/backend/cpu/gemm.hpp>
#include <hybridattn/core/math.hpp>
#include <hybridattn/ops/grouped_linear/grouped_linear.hpp>

#include <algorithm>

namespace hybridattn::inline HYBRIDATTN_ABI {

template <> struct On<GroupedLinear, Cpu> {
  using Offsets = View<std::int32_t const, 1>;
  template <class T> using Product = cpu::Product<T, T, T>;

  template <class T> static void forward(Cpu& cpu, Offsets offsets, View<T const, 2> x, View<T const, 3> w, View<T, 2> y) {
    cpu::Scratch<Product<T>> const products{cpu, most_blocks(w.extent(0), y.extent(0))};
    Product<T>* next = products.data();
    for_each_block(offsets, [&](Index e, Index first, Index last) {
      *next++ = {operand(rows(x, first, last)), operand(of_expert(w, e)).transposed(), rows(y, first, last)};
    });
    cpu::gemm_each<T, T>(cpu, products.data(), next, std::min(block_rows, x.extent(0)), x.extent(1), Into::overwrite);
  }

  template <class T>
  static void backward(Cpu& cpu, Offsets offsets, View<T const, 2> x, View<T const, 3> w, View<T const, 2> d_y, View<T, 2> d_x,
                       View<T, 3> d_w, Into into) {
    if (!d_x.empty()) form_d_x(cpu, offsets, w, d_y, d_x, into);
    if (!d_w.empty()) write_d_w(cpu, offsets, x, d_y, d_w);
  }

 private:
  // Rows of one task. A task packs its part of the matrix by itself, which many rows pay for.
  static constexpr Index block_rows = 256;

  template <class T>
  static void form_d_x(Cpu& cpu, Offsets offsets, View<T const, 3> w, View<T const, 2> d_y, View<T, 2> d_x, Into into) {
    cpu::Scratch<Product<T>> const products{cpu, most_blocks(w.extent(0), d_y.extent(0))};
    Product<T>* next = products.data();
    for_each_block(offsets, [&](Index e, Index first, Index last) {
      *next++ = {operand(rows(d_y, first, last)), operand(of_expert(w, e)), rows(d_x, first, last)};
    });
    cpu::gemm_each<T, T>(cpu, products.data(), next, std::min(block_rows, d_y.extent(0)), d_y.extent(1), into);
  }
  template <class T>
  static void write_d_w(Cpu& cpu, Offsets offsets, View<T const, 2> x, View<T const, 2> d_y, View<T, 3> d_w) {
    Index const E = d_w.extent(0), F = d_w.extent(1);
    cpu::Scratch<Product<T>> const products{cpu, std::min(E, x.extent(0)) * ceil_div(F, block_rows)};
    Product<T>* next = products.data();
    for (Index e = 0; e < E; ++e) {
      if (is_idle(offsets, e)) continue;
      auto const its_x = operand(rows(x, offsets(e), offsets(e + 1))), its_d_y = operand(rows(d_y, offsets(e), offsets(e + 1)));
      for (Index first = 0; first < F; first += block_rows) {
        Index const last = std::min(F, first + block_rows);
        *next++ = {its_d_y.transposed().row_range(first, last), its_x, rows(of_expert(d_w, e), first, last)};
      }
    }
    cpu::gemm_each<T, T>(cpu, products.data(), next, std::min(block_rows, F), x.extent(0), Into::overwrite);
    parallel_for(cpu, E, [&](Index e, int) {
      if (!is_idle(offsets, e)) return;
      for (Index f = 0; f < F; ++f) std::fill_n(d_w.row(e, f), d_w.extent(2), T(0));
    });
  }

  static bool is_idle(Offsets offsets, Index e) { return offsets(e) == offsets(e + 1); }
  // f(expert, first row, last row) for blocks of rows, each of one expert.
  template <class F> static void for_each_block(Offsets offsets, F f) {
    for (Index e = 0; e + 1 < offsets.extent(0); ++e)
      for (Index first = offsets(e); first < offsets(e + 1); first += block_rows)
        f(e, first, std::min<Index>(first + block_rows, offsets(e + 1)));
  }
  // However R rows are shared out among E experts: equal steps take equal memory.
  static Index most_blocks(Index E, Index R) { return std::min(E, R) + R / block_rows; }
  template <class T> static View<T, 2> of_expert(View<T, 3> all, Index e) {
    return {all.data + e * all.stride[0], {all.extent(1), all.extent(2)}, {all.stride[1], 1}};
  }
  template <class T> static View<T, 2> rows(View<T, 2> all, Index first, Index last) {
    return {all.data + first * all.stride[0], {last - first, all.extent(1)}, all.stride};
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
