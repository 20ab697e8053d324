// Options, sizes and tensors of full attention. The equations are those of full.hpp.
#ifndef HYBRIDATTN_ATTENTION_FULL_TYPES_HPP
#define HYBRIDATTN_ATTENTION_FULL_TYPES_HPP

#include <hybridattn/attention/heads.hpp>
#include <hybridattn/attention/policy.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI {

struct FullOptions {
  int window = 0;                        // a query sees its last `window` keys, itself included; 0: all
  QkNorm qk_norm = QkNorm::zero_centred;
  bool output_gate = true;               // o * sigmoid(x w_gate)
  int rotary_percent = 25;               // share of a head that rotates; 0: none
  Rotary rotary = Rotary::half_split;
};

namespace full {

struct Config {
  Index num_heads = 0;      // H;  0: the model's
  Index num_kv_heads = 0;   // HK; 0: num_heads
  Index head_dim = 0;       // D;  0: model_dim / num_heads
  double scale = 0;         // 0: head_dim^-1/2
  double rope_theta = 10000;
  double norm_eps = 1e-6;   // of the q/k norm
};

template <class S> struct Inputs {
  Held<S, 3> q;     // [N, H, D]
  Held<S, 3> k, v;  // [N, HK, D]
  HYBRIDATTN_FIELDS(q, k, v)
};
template <class S> struct Outputs {
  Held<S, 3> o;  // [N, H, D]
  HYBRIDATTN_FIELDS(o)
};
template <class S> struct Saved {
  Wide<S, 2> lse;  // [N, H], natural logarithm
  HYBRIDATTN_FIELDS(lse)
};
// Keys and values of earlier tokens, after norm and rotary. Position p is in row p, or with a window in row p % window.
template <class S> struct Cache {
  Held<S, 4> keys, values;  // [batch, capacity or window, HK, D]
  HYBRIDATTN_FIELDS(keys, values)
};

}  // namespace full

template <FullOptions O> struct FullAttention;

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
