// One step of AdamW (arXiv 1711.05101), decay first:
//   p *= 1 - lr wd;  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;  p -= lr (m / c1) / (sqrt(v / c2) + eps)
// An operation takes all tensors of a model at once, from a table of their addresses.
#ifndef HYBRIDATTN_OPS_ADAMW_ADAMW_HPP
#define HYBRIDATTN_OPS_ADAMW_ADAMW_HPP

#include <hybridattn/ops/adamw/step_numbers.hpp>
#include <hybridattn/core/math.hpp>
#include <hybridattn/tensor/tensor.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI {

// One tensor of the parameters, with its gradient and moments.
template <class T> struct AdamWTensor {
  T* p = nullptr;
  T const* g = nullptr;
  T *m = nullptr, *v = nullptr;
  Index count = 0;         // of elements; 0 without a gradient
  Index first_block = 0;   // blocks of all tensors before it

  static constexpr Index block = 16384;   // elements that one task works on
  HYBRIDATTN_HD Index blocks() const { return ceil_div(count, block); }
  friend bool operator==(AdamWTensor const&, AdamWTensor const&) = default;
};

// In all of them tensors [n], numbers [1]; the other lists have an element for each tensor.
//   forward(backend, tensors, squares)                 sums of squares of the gradients, in blocks of fixed size, combined in order;
//                                                      NaN where an element is not finite, infinite where only the sum is not
struct AdamWSquares {};
// What a step would turn into a NaN or an infinity: a moment or the parameter itself.
//   forward(backend, tensors, rates, numbers, found)   found: of StepFault
struct AdamWCheck {};
// Moves nothing where the numbers of the step hold a fault.
//   forward(backend, tensors, rates, numbers)
struct AdamWStep {};

}  // namespace hybridattn::inline HYBRIDATTN_ABI

#include <hybridattn/ops/adamw/cpu.hpp>

#endif
