// One step of AdamW (arXiv 1711.05101) on one tensor, decay first:
//   p *= 1 - lr wd;  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;  p -= lr (m / c1) / (sqrt(v / c2) + eps)
#ifndef HYBRIDATTN_OPS_ADAMW_ADAMW_HPP
#define HYBRIDATTN_OPS_ADAMW_ADAMW_HPP

#include <hybridattn/tensor/tensor.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI {

//   forward(backend, rates, g, m, v, p): all [count]
struct AdamWStep {
  struct Rates {
    double learning_rate, beta_1, beta_2, epsilon, weight_decay;
    double correction_1, correction_2;   // c1, c2 = 1 - beta^step, or 1
    double gradient_scale;               // g is multiplied by it first: clipping by the global norm
  };
};
// What a step would turn into a NaN or an infinity. Nothing is written.
//   forward(backend, rates, g, m, v, p) -> Overflow
struct AdamWCheck {
  enum class Overflow { none, mean, square, parameter };
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI

#include <hybridattn/ops/adamw/cpu.hpp>

#endif
