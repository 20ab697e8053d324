// DeepSeek Sparse Attention (arXiv 2512.02556): each query attends to the top_k keys that a small indexer picks.
//   (1) I_ts = sum_j w_tj relu(index_scale iq_tj . ik_s)       s <= t in the same sequence; j over the indexer's heads
//   (2) S_t = the min(k, t + 1) keys with the largest I_ts; ties go to the smaller index, -0 ties with +0,
//       NaN ranks last
//   (3) lse_th = log sum_{s in S_t} exp(scale q_th . k_s)       o_th = sum_{s in S_t} P_ths v_s, P = exp(score - lse)
//   (4) d_q, d_k, d_v as in full attention, over S_t alone
// All heads use one selection. The choice has no gradient. A loss of its own trains the indexer to score keys as attention weights them:
//   (5) p_ts = mean_h P_ths        r_ts = exp(I_ts - index_lse_t)        index_lse_t = log sum_{s in S_t} exp(I_ts)
//   (6) auxiliary_loss = sum_t sum_{s in S_t} p_ts log(p_ts / r_ts), the divergence KL(p_t || r_t) of every query; computed with
//       + r_ts - p_ts, which sums to 0, so that a rounding of p_t or r_t counts in second order
//   (7) d_I_ts = (r_ts - p_ts) d_auxiliary_loss         p counts as constant: q and k get no gradient
//       d_z_tjs = index_scale w_tj d_I_ts where index_scale iq_tj . ik_s > 0, else 0
//       d_iq_tj = sum_s d_z_tjs ik_s    d_ik_s = sum_tj d_z_tjs iq_tj    d_w_tj = sum_s d_I_ts relu(index_scale iq_tj . ik_s)
// In the dense warm-up S_t is every key that t sees, without a choice. No tensor ever has T x T elements.
#ifndef HYBRIDATTN_ATTENTION_DSA_DSA_HPP
#define HYBRIDATTN_ATTENTION_DSA_DSA_HPP

#include <hybridattn/attention/dsa/cpu.hpp>
#include <hybridattn/attention/dsa/steps.hpp>
#include <hybridattn/attention/dsa/types.hpp>
#include <hybridattn/attention/heads.hpp>

#include <cmath>

namespace hybridattn::inline HYBRIDATTN_ABI {

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
  template <class S> using Cache = dsa::Cache<S>;
  using Prepare = dsa::Prepare<O>;
  using Finish = std::conditional_t<O.output_gate, SigmoidFinish, NoStep>;

  static constexpr bool detached(std::string_view input) { return input.starts_with("index_"); }
  static double auxiliary_weight(Config const& c, Index tokens) { return tokens == 0 ? 0 : c.index_loss / static_cast<double>(tokens); }

  static Config complete(Config c, Index model_dim, Index num_heads) {
    check_numbers(c);
    if (c.num_heads == 0) c.num_heads = num_heads;
    if (c.num_kv_heads == 0) c.num_kv_heads = c.num_heads;
    c.head_dim = default_head_dim(c.head_dim, model_dim, c.num_heads);
    if (c.scale == 0) c.scale = 1 / std::sqrt(static_cast<double>(c.head_dim));
    if (c.index_dim == 0) c.index_dim = c.head_dim;
    if (c.index_scale == 0) c.index_scale = 1 / std::sqrt(static_cast<double>(c.index_dim));
    check_groups("SparseAttention", c.num_heads, c.num_kv_heads);
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
    Shape<1> const loss{c.stage == Stage::language_model ? 0 : 1};
    return {.o = {s.tokens(), c.num_heads, c.head_dim}, .auxiliary_loss = loss};
  }
  static Saved<Shapes> saved(Config const& c, Sequences const& s) {
    Shape<2> const chosen{s.tokens(), c.stage == Stage::dense_warm_up ? 0 : dsa::selection_size(O, s.longest())};
    Shape<1> const index_lse{c.stage == Stage::language_model ? 0 : s.tokens()};
    return {.lse = {s.tokens(), c.num_heads}, .indices = chosen, .index_lse = index_lse};
  }
  // Decoding needs a fixed top_k: top_k_percent is relative to the final length, which is unknown while tokens are generated. To decode,
  // use the same parameters in a policy with top_k.
  static Cache<Shapes> cache(Config const& c, Index batch, Index capacity) requires(O.top_k_percent == 0) {
    Shape<4> const rows{batch, capacity, c.num_kv_heads, c.head_dim};
    return {.keys = rows, .values = rows, .index_keys = {batch, capacity, c.index_dim}};
  }

 private:
  static void check_numbers(Config const& c) {
    check_size("SparseAttention", "num_heads", c.num_heads);
    check_size("SparseAttention", "num_kv_heads", c.num_kv_heads);
    check_size("SparseAttention", "head_dim", c.head_dim);
    check_number("SparseAttention", "scale", c.scale);
    check_at_least("SparseAttention", "index_heads", c.index_heads, 1);
    check_size("SparseAttention", "index_dim", c.index_dim);
    check_number("SparseAttention", "index_scale", c.index_scale);
    check_positive("SparseAttention", "rope_theta", c.rope_theta);
    check_positive("SparseAttention", "norm_eps", c.norm_eps);
    check_not_negative("SparseAttention", "index_loss", c.index_loss);
  }
};
using DSA = SparseAttention<>;

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
