// The k largest scores of a row, exactly: an order on (score, index) and no approximation.
//   Equal scores go to the smaller index; -0 equals +0; NaN of either sign ranks below every number, -infinity included, and NaNs
//   go to the smaller index. So a row always gives min(k, n) indices, however many of its scores are finite.
//   The chosen indices come in ascending order, followed by -1 where a row has fewer than k scores.
#ifndef HYBRIDATTN_OPS_TOP_K_TOP_K_HPP
#define HYBRIDATTN_OPS_TOP_K_TOP_K_HPP

#include <hybridattn/tensor/tensor.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI {

//   forward(backend, scores, indices)   scores [R, n], indices [R, k] int32
struct TopK {};

}  // namespace hybridattn::inline HYBRIDATTN_ABI

#include <hybridattn/ops/top_k/cpu.hpp>

#endif
