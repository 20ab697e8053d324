// Short depthwise causal convolution, one filter a channel, silu after it:
//   s_t = sum_w weight[c, w] x_{t - W + 1 + w}      y_t = silu(s_t), or s_t
//   d_s = d_y silu'(s)    d_x_t = sum_w weight[c, w] d_s_{t + W - 1 - w}    d_weight[c, w] = sum_t d_s_t x_{t - W + 1 + w}
// The inputs before a sequence are its initial state [W - 1, C], oldest first, or zeros; its last W - 1 inputs are the
// final state. A sequence never sees its neighbour.
#ifndef HYBRIDATTN_OPS_CAUSAL_CONV1D_CAUSAL_CONV1D_HPP
#define HYBRIDATTN_OPS_CAUSAL_CONV1D_CAUSAL_CONV1D_HPP

#include <hybridattn/core/sequences.hpp>
#include <hybridattn/tensor/tensor.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI {

enum class Activation { none, silu };

//   forward (backend, activation, sequences, x, w, initial_state, y, final_state)     x, y [N, C], w [C, W]
//   backward(backend, activation, sequences, x, w, initial_state, d_y, d_final_state, d_x, d_w, d_initial_state)
// States are [number of sequences, W - 1, C] or empty; forward's final_state may be its initial_state. W = 0 is no
// convolution: y = silu(x). Backward overwrites everything.
struct CausalConv1d {};

}  // namespace hybridattn::inline HYBRIDATTN_ABI

#include <hybridattn/ops/causal_conv1d/cpu.hpp>

#endif
