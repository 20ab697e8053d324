// DeepSeek Sparse Attention (arXiv 2512.02556): each query attends to the top_k keys that a small indexer picks.
//   (1) I_ts = sum_j w_tj relu(index_scale iq_tj . ik_s)       s <= t in the same sequence; j over the indexer's heads
//   (2) S_t = the min(k, t + 1) keys with the largest I_ts; ties go to the smaller index, -0 ties with +0
//   (3) lse_th = log sum_{s in S_t} exp(scale q_th . k_s)       o_th = sum_{s in S_t} P_ths v_s, P = exp(score - lse)
//   (4) d_q, d_k, d_v as in full attention, over S_t alone
// One selection serves all heads. Choosing has no gradient: d_index_q, d_index_k and d_index_w are zero here.
#ifndef HYBRIDATTN_ATTENTION_DSA_DSA_HPP
#define HYBRIDATTN_ATTENTION_DSA_DSA_HPP

#include <hybridattn/attention/heads.hpp>
#include <hybridattn/attention/policy.hpp>

#include <algorithm>
#include <cmath>

namespace hybridattn {

struct SparseOptions {
  int top_k = 64;                        // keys a query attends to; 0: top_k_percent says it
  int top_k_percent = 0;                 // of the sequence's length, at least one key; 0: top_k says it
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
  State<S, 1> auxiliary_loss;  // [1], or nothing: no loss trains the indexer
  HYBRIDATTN_FIELDS(o, auxiliary_loss)
};
template <class S> struct Saved {
  Wide<S, 2> lse;       // [N, H], over the selected keys
  Whole<S, 2> indices;  // [N, k] ascending, relative to the start of the sequence, then -1
  HYBRIDATTN_FIELDS(lse, indices)
};

// How many keys a query of a sequence of `length` tokens may select.
inline Index selection_size(SparseOptions o, Index length) {
  return o.top_k_percent > 0 ? std::max<Index>(1, length * o.top_k_percent / 100) : o.top_k;
}

// The steps around it in a layer: steps.hpp.
template <SparseOptions O> struct Prepare;

}  // namespace dsa

template <SparseOptions O = SparseOptions{}> struct SparseAttention : PolicyDefaults {
  static_assert((O.top_k > 0) != (O.top_k_percent > 0),
                "SparseOptions: set top_k (a count of keys, >= 1), or top_k = 0 and top_k_percent (1 .. 100)");
  static_assert(O.top_k >= 0 && 0 <= O.top_k_percent && O.top_k_percent <= 100, "SparseOptions: top_k >= 1, or top_k_percent in 1 .. 100");
  static_assert(0 <= O.rotary_percent && O.rotary_percent <= 100 && 0 <= O.index_rotary_percent && O.index_rotary_percent <= 100,
                "SparseOptions: a rotary percentage is a share of the head, 0 .. 100");

  static constexpr std::string_view name = "DSA";
  static constexpr SparseOptions options = O;
  using Config = dsa::Config;
  template <class S> using Inputs = dsa::Inputs<S>;
  template <class S> using Outputs = dsa::Outputs<S>;
  template <class S> using Saved = dsa::Saved<S>;
  using Prepare = dsa::Prepare<O>;
  using Finish = std::conditional_t<O.output_gate, SigmoidFinish, NoStep>;

  static constexpr bool detached(std::string_view input) { return input.starts_with("index_"); }
  static double auxiliary_weight(Config const& c, Index tokens) { return tokens == 0 ? 0 : c.index_loss / static_cast<double>(tokens); }

  static Config complete(Config c, Index model_dim, Index num_heads) {
    if (c.num_heads == 0) c.num_heads = num_heads;
    if (c.num_kv_heads == 0) c.num_kv_heads = c.num_heads;
    c.head_dim = default_head_dim(c.head_dim, model_dim, c.num_heads);
    if (c.scale == 0) c.scale = 1 / std::sqrt(static_cast<double>(c.head_dim));
    if (c.index_dim == 0) c.index_dim = c.head_dim;
    if (c.index_scale == 0) c.index_scale = 1 / std::sqrt(static_cast<double>(c.index_dim));
    check_groups("SparseAttention", c.num_heads, c.num_kv_heads);
    check(c.index_heads > 0 && c.index_dim > 0, "SparseAttention: ", c.index_heads, " indexer heads of dimension ", c.index_dim,
          "; both must be positive");
    check(c.index_scale > 0, "SparseAttention: index_scale ", c.index_scale, " must be positive, or 0 for index_dim^-1/2");
    return c;
  }
  static Inputs<Shapes> inputs(Config const& c, Sequences const& s) {
    Shape<3> const keys{s.tokens(), c.num_kv_heads, c.head_dim};
    return {.q = {s.tokens(), c.num_heads, c.head_dim},
            .k = keys,
            .v = keys,
            .index_q = {s.tokens(), c.index_heads, c.index_dim},
            .index_k = {s.tokens(), c.index_dim},
            .index_w = {s.tokens(), c.index_heads}};
  }
  static Outputs<Shapes> outputs(Config const& c, Sequences const& s) {
    return {.o = {s.tokens(), c.num_heads, c.head_dim}, .auxiliary_loss = {}};
  }
  static Saved<Shapes> saved(Config const& c, Sequences const& s) {
    return {.lse = {s.tokens(), c.num_heads}, .indices = {s.tokens(), dsa::selection_size(O, s.longest())}};
  }
};
using DSA = SparseAttention<>;

}  // namespace hybridattn

#include <hybridattn/attention/dsa/steps.hpp>

#include <hybridattn/attention/dsa/cpu.hpp>

#endif
