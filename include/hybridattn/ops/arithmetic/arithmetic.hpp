// Element by element: what models need between the larger operations. No backward of their own.
#ifndef HYBRIDATTN_OPS_ARITHMETIC_ARITHMETIC_HPP
#define HYBRIDATTN_OPS_ARITHMETIC_ARITHMETIC_HPP

#include <hybridattn/tensor/tensor.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI {

struct Fill {};          // forward(backend, value, y)      y = value
struct Add {};           // forward(backend, x, y)          y += x
struct AddWeighted {};   // forward(backend, weight, x, sum)   sum += weight x of one element: x [1], sum [1] of double
struct AllFinite {};     // forward(backend, x) -> bool     no NaN and no infinity. Waits: it is asked when a step went wrong

template <class T, int Rank, class B> Tensor<T, Rank, B> zeros(B& backend, Shape<Rank> shape) {
  Tensor<T, Rank, B> x{backend, shape};
  On<Fill, B>::forward(backend, T(0), flat(out(x)));
  return x;
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI

#include <hybridattn/ops/arithmetic/cpu.hpp>

#endif
