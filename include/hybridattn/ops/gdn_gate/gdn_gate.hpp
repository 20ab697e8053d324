// The gates of Gated DeltaNet, from their projections a and b:
//   g = -exp(a_log) softplus(a + dt_bias)      beta = range sigmoid(b), range 1 or 2
//   d_a = d_dt_bias = -exp(a_log) sigmoid(a + dt_bias) d_g      d_a_log = sum d_g g      d_b = beta (1 - beta / range) d_beta
#ifndef HYBRIDATTN_OPS_GDN_GATE_GDN_GATE_HPP
#define HYBRIDATTN_OPS_GDN_GATE_GDN_GATE_HPP

#include <hybridattn/tensor/tensor.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI {

//   forward (backend, range, a, b, a_log, dt_bias, g, beta)       a, b, g, beta [N, HV], a_log, dt_bias [HV]
//   backward(backend, range, a, b, a_log, dt_bias, d_g, d_beta, d_a, d_b, d_a_log, d_dt_bias)   overwrites all four
struct GdnGate {};

}  // namespace hybridattn::inline HYBRIDATTN_ABI

#include <hybridattn/ops/gdn_gate/cpu.hpp>

#endif
