// Options, sizes and tensors of Gated DeltaNet. The equations are those of gdn.hpp.
#ifndef HYBRIDATTN_ATTENTION_GDN_TYPES_HPP
#define HYBRIDATTN_ATTENTION_GDN_TYPES_HPP

#include <hybridattn/attention/policy.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI {

struct GdnOptions {
  int conv_width = 4;                 // short causal convolution on q, k, v; 0: none, only silu
  bool output_gate = true;            // RMSNorm(o) silu(x w_gate); false: RMSNorm(o)
  bool negative_eigenvalues = false;  // beta in (0, 2) instead of (0, 1): arXiv 2411.12537
};

namespace gdn {

// Initial values of a_log and dt_bias: those of fla give decays near 1; with those of transformers an untrained layer forgets within a
// token.
enum class GateStart { fla, transformers };

struct Config {
  Index num_heads = 0;        // H, of q and k; 0: the model's
  Index num_value_heads = 0;  // HV, a multiple of H; 0: num_heads
  Index key_dim = 0;          // K; 0: model_dim / num_heads
  Index value_dim = 0;        // V; 0: key_dim
  double scale = 0;           // 0: key_dim^-1/2
  double norm_eps = 1e-6;     // of the norm on o
  GateStart gate_start = GateStart::fla;
};

template <class S> struct Inputs {
  Held<S, 3> q, k;            // [N, H, K], not normalised by the policy: the layer makes their length 1
  Held<S, 3> v;               // [N, HV, V]
  Wide<S, 2> g, beta;         // [N, HV]   g <= 0 is the log of the decay, beta in [0, 1] or [0, 2]
  State<S, 4> initial_state;  // [number of sequences, HV, K, V], empty for zeros
  HYBRIDATTN_FIELDS(q, k, v, g, beta, initial_state)
};
template <class S> struct Outputs {
  Held<S, 3> o;             // [N, HV, V]
  State<S, 4> final_state;  // [number of sequences, HV, K, V], empty if the caller does not need it
  HYBRIDATTN_FIELDS(o, final_state)
};
// The error e_t of (2). Backward computes S again from it, from the first token on, and needs no saved state.
template <class S> struct Saved {
  Wide<S, 3> error;  // [N, HV, V]
  HYBRIDATTN_FIELDS(error)
};

// The state S after earlier tokens, and the projections of the last earlier tokens for the short convolutions, the oldest first.
template <class S> struct Cache {
  Held<S, 3> conv_q, conv_k, conv_v;  // [batch, conv_width - 1, channels], empty without a convolution
  State<S, 4> state;                  // [batch, HV, K, V]
  HYBRIDATTN_FIELDS(conv_q, conv_k, conv_v, state)
};

inline Shape<4> state_shape(Config const& c, Sequences const& s) { return {s.count(), c.num_value_heads, c.key_dim, c.value_dim}; }

}  // namespace gdn

template <GdnOptions O> struct GatedDeltaNet;

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
