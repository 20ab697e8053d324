// LayerNorm over the last axis: y = xh w + b,  xh = (x - mean x) rstd,  rstd = (var x + eps)^-1/2
//   with g = d_y w:   d_x = rstd (g - mean g - xh mean(g xh))      d_w = sum d_y xh      d_b = sum d_y
#ifndef HYBRIDATTN_OPS_LAYER_NORM_LAYER_NORM_HPP
#define HYBRIDATTN_OPS_LAYER_NORM_LAYER_NORM_HPP

#include <hybridattn/tensor/tensor.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI {

//   forward (backend, eps, x, w, b, y)
//   backward(backend, eps, x, w, d_y, d_x, d_w, d_b)   overwrites all three
struct LayerNorm {};

}  // namespace hybridattn::inline HYBRIDATTN_ABI

#include <hybridattn/ops/layer_norm/cpu.hpp>

#endif
