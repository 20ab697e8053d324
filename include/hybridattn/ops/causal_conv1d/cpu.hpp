#ifndef HYBRIDATTN_OPS_CAUSAL_CONV1D_CPU_HPP
#define HYBRIDATTN_OPS_CAUSAL_CONV1D_CPU_HPP

#include <hybridattn/backend/cpu/sum_rows.hpp>
#include <hybridattn/ops/causal_conv1d/causal_conv1d.hpp>
#include <hybridattn/tensor/in_float.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI {
namespace cpu::detail {

// The inputs of a convolution as rows: of x, of the initial state, or nothing.
template <class T> struct ConvRows {
  View<T const, 2> x;
  View<T const, 3> initial_state;
  Index width;

  // The row `back` tokens before token n, which has `position` tokens of sequence `owner` before it in x; null for zeros.
  T const* at(Index n, Index position, Index owner, Index back) const {
    if (back <= position) return x.row(n - back);
    return initial_state.empty() ? nullptr : initial_state.row(owner, width - 1 - (back - position));
  }
};

}  // namespace cpu::detail

template <> struct On<CausalConv1d, Cpu> : InFloat<CausalConv1d, Cpu> {
  using InFloat::forward, InFloat::backward;
  template <std::floating_point T>
  static void forward(Cpu& cpu, Activation activation, Sequences const& s, View<T const, 2> x, View<T const, 2> w,
                      State<In<T>, 3> initial_state, View<T, 2> y, State<Out<T>, 3> final_state) {
    Tensor<T, 2, Cpu> taps_storage{cpu, {w.extent(1), w.extent(0)}};
    View<T const, 2> const taps = taps_of(w, out(taps_storage));
    cpu::detail::ConvRows<T> const rows{x, initial_state, w.extent(1)};
    parallel_blocks(cpu, x.extent(0), cpu::sum_rows, [&](Index first, Index last) {
      for (Index n = first; n < last; ++n) {
        convolve(rows, taps, s, n, y.row(n));
        if (activation == Activation::silu) silu_row(y.row(n), x.extent(1));
      }
    });
    if (!final_state.empty()) keep_last(s, rows, final_state);
  }

  template <std::floating_point T>
  static void backward(Cpu& cpu, Activation activation, Sequences const& s, View<T const, 2> x, View<T const, 2> w,
                       State<In<T>, 3> initial_state, View<T const, 2> d_y, State<In<T>, 3> d_final_state, View<T, 2> d_x, View<T, 2> d_w,
                       State<Out<T>, 3> d_initial_state) {
    Index const C = x.extent(1), W = w.extent(1);
    Tensor<T, 2, Cpu> taps_storage{cpu, {W, C}}, d_s_storage{cpu, {x.extent(0), C}}, d_taps_storage{cpu, {W, C}};
    View<T const, 2> const taps = taps_of(w, out(taps_storage));
    View<T, 2> const d_s = out(d_s_storage), d_taps = out(d_taps_storage);
    cpu::detail::ConvRows<T> const rows{x, initial_state, W};
    parallel_blocks(cpu, x.extent(0), cpu::sum_rows, [&](Index first, Index last) {
      for (Index n = first; n < last; ++n) {
        convolve(rows, taps, s, n, d_s.row(n));
        through_activation(activation, d_y.row(n), d_s.row(n), C);
      }
    });
    parallel_blocks(cpu, x.extent(0), cpu::sum_rows, [&](Index first, Index last) {
      for (Index n = first; n < last; ++n) gradient_row(s, taps, View<T const, 2>(d_s), d_final_state, n, d_x.row(n));
    });
    if (W > 0) {
      cpu::sum_over_rows<T>(cpu, x.extent(0), flat(d_taps), [&](Index n, T* sum) { add_taps(rows, s, n, d_s.row(n), sum); });
      for (Index c = 0; c < C; ++c)
        for (Index tap = 0; tap < W; ++tap) d_w(c, tap) = d_taps(tap, c);
    }
    if (!d_initial_state.empty()) initial_gradient(s, taps, View<T const, 2>(d_s), d_final_state, d_initial_state);
  }

 private:
  static Index position_of(Sequences const& s, Index n) { return n - s[static_cast<std::size_t>(s.owners()(n))].start; }
  // Filters by tap, so that channels are neighbours.
  template <class T> static View<T, 2> taps_of(View<T const, 2> w, View<T, 2> taps) {
    for (Index c = 0; c < w.extent(0); ++c)
      for (Index tap = 0; tap < w.extent(1); ++tap) taps(tap, c) = w(c, tap);
    return taps;
  }
  template <class T>
  static void convolve(cpu::detail::ConvRows<T> const& rows, View<T const, 2> taps, Sequences const& s, Index n, T* y) {
    Index const C = rows.x.extent(1), W = rows.width;
    if (W == 0) {
      std::copy_n(rows.x.row(n), C, y);
      return;
    }
    Index const owner = s.owners()(n), position = position_of(s, n);
    std::fill_n(y, C, T(0));
    for (Index tap = 0; tap < W; ++tap)
      if (T const* row = rows.at(n, position, owner, W - 1 - tap); row != nullptr) add_product(taps.row(tap), row, y, C);
  }
  template <class T> static void add_product(T const* a, T const* b, T* y, Index C) {
    cpu::for_each_vector<T>(0, C, [&](cpu::Slot<T> v) HYBRIDATTN_INLINE_LAMBDA { v.put(y, v.get(y) + v.get(a) * v.get(b)); });
  }
  template <class T> static void silu_row(T* y, Index C) {
    cpu::for_each_vector<T>(0, C, [&](cpu::Slot<T> v) HYBRIDATTN_INLINE_LAMBDA { v.put(y, v.get(y) * cpu::sigmoid<T>(v.get(y))); });
  }
  // d_s holds s and becomes d_y silu'(s).
  template <class T> static void through_activation(Activation activation, T const* d_y, T* d_s, Index C) {
    if (activation == Activation::none) {
      std::copy_n(d_y, C, d_s);
      return;
    }
    cpu::for_each_vector<T>(0, C, [&](cpu::Slot<T> v) HYBRIDATTN_INLINE_LAMBDA {
      cpu::Vec<T> const s = v.get(d_s), open = cpu::sigmoid<T>(s);
      v.put(d_s, v.get(d_y) * (open * (T(1) + s * (T(1) - open))));
    });
  }
  template <class T>
  static void gradient_row(Sequences const& s, View<T const, 2> taps, View<T const, 2> d_s, State<In<T>, 3> d_final_state, Index n,
                           T* d_x) {
    Index const C = d_s.extent(1), W = taps.extent(0);
    if (W == 0) {
      std::copy_n(d_s.row(n), C, d_x);
      return;
    }
    Index const owner = s.owners()(n), after = s[static_cast<std::size_t>(owner)].length - 1 - position_of(s, n);
    std::fill_n(d_x, C, T(0));
    for (Index ahead = 0; ahead < std::min(W, after + 1); ++ahead) add_product(taps.row(W - 1 - ahead), d_s.row(n + ahead), d_x, C);
    if (!d_final_state.empty() && after < W - 1) axpy(T(1), d_final_state.row(owner, W - 2 - after), d_x, C);
  }
  template <class T> static void add_taps(cpu::detail::ConvRows<T> const& rows, Sequences const& s, Index n, T const* d_s, T* sum) {
    Index const C = rows.x.extent(1), W = rows.width, position = position_of(s, n), owner = s.owners()(n);
    for (Index tap = 0; tap < W; ++tap)
      if (T const* row = rows.at(n, position, owner, W - 1 - tap); row != nullptr) add_product(d_s, row, sum + tap * C, C);
  }
  // Row j of a state is the input W - 1 - j tokens before the end.
  template <class T> static void keep_last(Sequences const& s, cpu::detail::ConvRows<T> const& rows, State<Out<T>, 3> final_state) {
    for (Index i = 0; i < s.count(); ++i)
      for (Index j = 0; j < rows.width - 1; ++j) {
        Sequence const q = s[static_cast<std::size_t>(i)];
        T const* row = rows.at(q.start + q.length, q.length, i, rows.width - 1 - j);
        T* const to = final_state.row(i, j);   // in place, where an empty sequence keeps its rows
        if (row == nullptr) std::fill_n(to, rows.x.extent(1), T(0));
        else if (row != to) std::copy_n(row, rows.x.extent(1), to);
      }
  }
  // The state's row j stands W - 1 - j tokens before the sequence; it reaches the first tokens, and what is left of it at the end.
  template <class T>
  static void initial_gradient(Sequences const& s, View<T const, 2> taps, View<T const, 2> d_s, State<In<T>, 3> d_final_state,
                               State<Out<T>, 3> d_initial_state) {
    Index const C = d_s.extent(1), W = taps.extent(0);
    for (Index i = 0; i < s.count(); ++i)
      for (Index j = 0; j < W - 1; ++j) {
        Sequence const q = s[static_cast<std::size_t>(i)];
        T* const d = d_initial_state.row(i, j);
        std::fill_n(d, C, T(0));
        for (Index t = 0; t < std::min(j + 1, q.length); ++t) add_product(taps.row(j - t), d_s.row(q.start + t), d, C);
        if (!d_final_state.empty() && j >= q.length) axpy(T(1), d_final_state.row(i, j - q.length), d, C);
      }
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
