// Options, sizes and tensors of sparse attention. The equations are those of dsa.hpp.
#ifndef HYBRIDATTN_ATTENTION_DSA_TYPES_HPP
#define HYBRIDATTN_ATTENTION_DSA_TYPES_HPP

#include <hybridattn/attention/heads.hpp>
#include <hybridattn/attention/policy.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI {

struct SparseOptions {
  int top_k = 64;                        // keys a query attends to; 0: top_k_percent sets their number
  int top_k_percent = 0;                 // of the sequence's length, at least one key; 0: top_k sets the number
  QkNorm qk_norm = QkNorm::zero_centred;
  bool output_gate = true;               // o * sigmoid(x w_gate)
  int rotary_percent = 25;
  Rotary rotary = Rotary::half_split;
  int index_rotary_percent = 0;          // half-split rotary on index_q and index_k
  bool index_norm = false;               // LayerNorm on index_k
};

namespace dsa {

struct Config {
  Index num_heads = 0;      // H;  0: the model's
  Index num_kv_heads = 0;   // HK; 0: num_heads
  Index head_dim = 0;       // D;  0: model_dim / num_heads
  double scale = 0;         // 0: head_dim^-1/2
  Index index_heads = 4;    // HI
  Index index_dim = 0;      // DI; 0: head_dim
  double index_scale = 0;   // 0: index_dim^-1/2
  double rope_theta = 10000;
  double norm_eps = 1e-6;   // of the q/k norm and of the indexer's LayerNorm
  double index_loss = 1;    // weight of the indexer's loss, a mean over tokens
  Stage stage = Stage::language_model;
};

template <class S> struct Inputs {
  Held<S, 3> q;        // [N, H, D]
  Held<S, 3> k, v;     // [N, HK, D]
  Held<S, 3> index_q;  // [N, HI, DI]
  Held<S, 2> index_k;  // [N, DI]     one key for all indexer heads
  Held<S, 2> index_w;  // [N, HI]
  HYBRIDATTN_FIELDS(q, k, v, index_q, index_k, index_w)
};
template <class S> struct Outputs {
  Held<S, 3> o;               // [N, H, D]
  Wide<S, 1> auxiliary_loss;  // [1], a sum over tokens; empty where no loss trains the indexer
  HYBRIDATTN_FIELDS(o, auxiliary_loss)
};
template <class S> struct Saved {
  Wide<S, 2> lse;        // [N, H], over the keys of S_t
  Whole<S, 2> indices;   // [N, k] ascending, relative to the start of the sequence, then -1; empty in the dense warm-up
  Wide<S, 1> index_lse;  // [N], over the same keys; empty where no loss trains the indexer
  HYBRIDATTN_FIELDS(lse, indices, index_lse)
};

// Keys and values of earlier tokens, after norms and rotary.
template <class S> struct Cache {
  Held<S, 4> keys, values;  // [batch, capacity, HK, D]
  Held<S, 3> index_keys;    // [batch, capacity, DI]
  HYBRIDATTN_FIELDS(keys, values, index_keys)
};

// The largest number of keys that a query selects, in a sequence of `length` tokens.
HYBRIDATTN_HD constexpr Index selection_size(SparseOptions o, Index length) {
  if (o.top_k_percent == 0) return o.top_k;
  Index const share = length * o.top_k_percent / 100;
  return share > 1 ? share : 1;
}

}  // namespace dsa

template <SparseOptions O> struct SparseAttention;

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
