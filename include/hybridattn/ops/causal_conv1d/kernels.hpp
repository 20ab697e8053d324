// The short causal convolution as kernels.
#ifndef HYBRIDATTN_OPS_CAUSAL_CONV1D_KERNELS_HPP
#define HYBRIDATTN_OPS_CAUSAL_CONV1D_KERNELS_HPP

#include <hybridattn/backend/gpu/reduce.hpp>
#include <hybridattn/core/math.hpp>
#include <hybridattn/ops/causal_conv1d/causal_conv1d.hpp>
#include <hybridattn/tensor/sequences_on.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI::gpu {

inline constexpr int conv_threads = 128;
// A block has conv_threads channels of a token, or of a block of tokens.
inline Grid conv_grid(Index rows, Index channels) { return {.x = rows, .y = ceil_div(channels, conv_threads)}; }

// The inputs of a convolution. Those before a sequence are its initial state, or zeros where there are no states.
template <class T> struct ConvInputs {
  SequenceTable sequences;
  View<T const, 2> x, w;
  View<T const, 3> initial_state;

  HYBRIDATTN_HD Index width() const { return w.extent(1); }
  HYBRIDATTN_HD Index channels() const { return x.extent(1); }
  // A token's number in its sequence. The token after the last one has the sequence's length as its number.
  HYBRIDATTN_HD Index position_of(Index n) const { return n - sequences.list(sequences.owners(n)).start; }
  // Whether the input `back` tokens before a token is a number of x or of a state.
  HYBRIDATTN_HD bool has(Index position, Index back) const { return back <= position || !initial_state.empty(); }
  // The input of channel c, `back` tokens before token `position` of a sequence.
  HYBRIDATTN_HD T at(Index sequence, Index position, Index back, Index c) const {
    if (back <= position) return x(sequences.list(sequence).start + position - back, c);
    return initial_state(sequence, width() - 1 - (back - position), c);
  }
  // The sum over the taps for channel c of token n. Without taps it is x.
  HYBRIDATTN_HD T convolved(Index n, Index c) const {
    if (width() == 0) return x(n, c);
    Index const sequence = sequences.owners(n), position = position_of(n);
    T sum = 0;
    for (Index tap = 0; tap < width(); ++tap)
      if (Index const back = width() - 1 - tap; has(position, back)) sum += w(c, tap) * at(sequence, position, back, c);
    return sum;
  }
};

// y. A thread has a channel of a token.
template <class T> struct ConvForward {
  static constexpr int threads = conv_threads;
  struct Params {
    ConvInputs<T> inputs;
    Activation activation;
    View<T, 2> y;
  };
  struct Shared {};
  static HYBRIDATTN_DEVICE void run(Shared&, Params const& p) {
    Index const n = simt::block_x(), c = simt::block_y() * threads + simt::thread_id();
    if (c >= p.inputs.channels()) return;
    T const s = p.inputs.convolved(n, c);
    p.y(n, c) = p.activation == Activation::silu ? silu(s) : s;
  }
};

// Row j of a final state is the input W - 1 - j tokens before the end. A thread has a channel of a sequence. It makes row j of x, or of
// row j or a later one of the initial state. So the final state may be the initial state.
template <class T> struct KeepLastInputs {
  ConvInputs<T> inputs;
  View<T, 3> final_state;
  HYBRIDATTN_HD void operator()(Index i) const {
    Index const sequence = i / inputs.channels(), c = i % inputs.channels(), length = inputs.sequences.list(sequence).length;
    for (Index j = 0; j < final_state.extent(1); ++j) {
      Index const back = inputs.width() - 1 - j;
      final_state(sequence, j, c) = inputs.has(length, back) ? inputs.at(sequence, length, back, c) : T(0);
    }
  }
};

// d_s = d_y silu'(s), or d_y. A thread has a channel of a token.
template <class T> struct ConvThroughActivation {
  static constexpr int threads = conv_threads;
  struct Params {
    ConvInputs<T> inputs;
    Activation activation;
    View<T const, 2> d_y;
    View<T, 2> d_s;
  };
  struct Shared {};
  static HYBRIDATTN_DEVICE void run(Shared&, Params const& p) {
    Index const n = simt::block_x(), c = simt::block_y() * threads + simt::thread_id();
    if (c >= p.inputs.channels()) return;
    p.d_s(n, c) = p.activation == Activation::silu ? p.d_y(n, c) * silu_slope(p.inputs.convolved(n, c)) : p.d_y(n, c);
  }
};

// What the gradients of x and of the initial states are made of.
template <class T> struct ConvOutputGradients {
  SequenceTable sequences;
  View<T const, 2> w, d_s;
  View<T const, 3> d_final_state;   // may be empty

  // The gradient of the input of channel c that stands `before` tokens before the start of a sequence, or -before tokens after it.
  // It reaches the W tokens from its own place on, and the final state where it is one of the last W - 1 inputs.
  HYBRIDATTN_HD T of_input(Index sequence, Index before, Index c) const {
    Index const W = w.extent(1), start = sequences.list(sequence).start, length = sequences.list(sequence).length;
    T sum = 0;
    for (Index ahead = simt::larger(before, Index{0}); ahead < simt::smaller(W, before + length); ++ahead)
      sum += w(c, W - 1 - ahead) * d_s(start - before + ahead, c);
    Index const row = W - 1 - before - length;   // of the final state
    if (!d_final_state.empty() && row >= 0) sum += d_final_state(sequence, row, c);
    return sum;
  }
};

// d_x. A thread has a channel of a token.
template <class T> struct ConvInputGradient {
  static constexpr int threads = conv_threads;
  struct Params {
    ConvOutputGradients<T> gradients;
    View<T, 2> d_x;
  };
  struct Shared {};
  static HYBRIDATTN_DEVICE void run(Shared&, Params const& p) {
    ConvOutputGradients<T> const& from = p.gradients;
    Index const n = simt::block_x(), c = simt::block_y() * threads + simt::thread_id();
    if (c >= p.d_x.extent(1)) return;
    Index const sequence = from.sequences.owners(n), position = n - from.sequences.list(sequence).start;
    p.d_x(n, c) = from.w.extent(1) == 0 ? from.d_s(n, c) : from.of_input(sequence, -position, c);
  }
};

// Row j of an initial state stands W - 1 - j tokens before its sequence. A thread has an element.
template <class T> struct ConvStateGradient {
  ConvOutputGradients<T> gradients;
  View<T, 3> d_initial_state;
  HYBRIDATTN_HD void operator()(Index i) const {
    Index const rows = d_initial_state.extent(1), C = d_initial_state.extent(2), sequence = i / (rows * C), j = i / C % rows, c = i % C;
    d_initial_state(sequence, j, c) = gradients.of_input(sequence, rows - j, c);
  }
};

// The part of d_w that sum_rows tokens make. A thread has a channel.
template <class T> struct ConvTapGradients {
  static constexpr int threads = conv_threads;
  struct Params {
    ConvInputs<T> inputs;
    View<T const, 2> d_s;
    View<T, 3> parts;   // [blocks of tokens, W, C]
  };
  struct Shared {};
  static HYBRIDATTN_DEVICE void run(Shared&, Params const& p) {
    Index const first = simt::block_x() * sum_rows, last = simt::smaller(first + sum_rows, p.d_s.extent(0));
    Index const c = simt::block_y() * threads + simt::thread_id();
    if (c >= p.d_s.extent(1)) return;
    for (Index tap = 0; tap < p.parts.extent(1); ++tap) p.parts(simt::block_x(), tap, c) = sum_tokens(p, first, last, tap, c);
  }

 private:
  static HYBRIDATTN_DEVICE T sum_tokens(Params const& p, Index first, Index last, Index tap, Index c) {
    Index const back = p.inputs.width() - 1 - tap;
    T sum = 0;
    for (Index n = first; n < last; ++n) {
      Index const position = p.inputs.position_of(n);
      if (p.inputs.has(position, back)) sum += p.d_s(n, c) * p.inputs.at(p.inputs.sequences.owners(n), position, back, c);
    }
    return sum;
  }
};

// d_w [C, W] = the parts [n, W, C], added in order. A thread has an element.
template <class T> struct SumTapGradients {
  View<T const, 3> parts;
  View<T, 2> d_w;
  HYBRIDATTN_HD void operator()(Index i) const {
    Index const C = d_w.extent(0), tap = i / C, c = i % C;
    T sum = 0;
    for (Index n = 0; n < parts.extent(0); ++n) sum += parts(n, tap, c);
    d_w(c, tap) = sum;
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::gpu
#endif
