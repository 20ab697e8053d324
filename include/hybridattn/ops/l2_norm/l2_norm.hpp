// Rows of length one: y = x rnorm,  rnorm = (sum x^2 + eps)^-1/2;   d_x = rnorm (d_y - y (y . d_y)).  A row of zeros stays zero.
#ifndef HYBRIDATTN_OPS_L2_NORM_L2_NORM_HPP
#define HYBRIDATTN_OPS_L2_NORM_L2_NORM_HPP

#include <hybridattn/tensor/tensor.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI {

//   forward (backend, x, y)            x, y [N, C]; y may be x
//   backward(backend, x, d_y, d_x)     overwrites d_x; d_x may be d_y
struct L2Norm {
  static constexpr double eps = 1e-6;   // inside the root, as in flash-linear-attention and transformers
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI

#include <hybridattn/ops/l2_norm/cpu.hpp>

#endif
