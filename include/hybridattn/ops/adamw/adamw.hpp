// One step of AdamW (arXiv 1711.05101) on one tensor, decay first:
//   p *= 1 - lr wd;  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;  p -= lr (m / c1) / (sqrt(v / c2) + eps)
#ifndef HYBRIDATTN_OPS_ADAMW_ADAMW_HPP
#define HYBRIDATTN_OPS_ADAMW_ADAMW_HPP

#include <hybridattn/ops/adamw/step_numbers.hpp>
#include <hybridattn/tensor/tensor.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI {

// Moves nothing where the numbers of the step hold a fault.
//   forward(backend, rates, numbers, g, m, v, p): rates and numbers [1], the others [count]
struct AdamWStep {};
// What a step would turn into a NaN or an infinity: a moment or the parameter itself. Nothing is written but that.
//   forward(backend, rates, numbers, g, m, v, p, found): found [1] of StepFault
struct AdamWCheck {};

}  // namespace hybridattn::inline HYBRIDATTN_ABI

#include <hybridattn/ops/adamw/cpu.hpp>

#endif
