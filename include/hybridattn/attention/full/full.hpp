// Full causal attention (Vaswani et al., arXiv 1706.03762), computed tile by tile (arXiv 2205.14135).
//   (1) s_ij = scale q_i . k_j                 j <= i in the same sequence, and i - j < window when a window is set
//   (2) lse_i = log sum_j exp(s_ij)            P_ij = exp(s_ij - lse_i)
//   (3) o_i = sum_j P_ij v_j                   a row that sees no key: o_i = 0, lse_i = -inf
//   (4) dS_ij = scale P_ij (d_o_i . v_j - delta_i)      delta_i = d_o_i . o_i
//   (5) d_q_i = sum_j dS_ij k_j    d_k_j = sum_i dS_ij q_i    d_v_j = sum_i P_ij d_o_i
// Query head h reads key/value head h / (H / HK); d_k and d_v sum over the group. Backward computes P again.
#ifndef HYBRIDATTN_ATTENTION_FULL_FULL_HPP
#define HYBRIDATTN_ATTENTION_FULL_FULL_HPP

#include <hybridattn/attention/full/cpu.hpp>
#include <hybridattn/attention/full/steps.hpp>
#include <hybridattn/attention/full/types.hpp>
#include <hybridattn/attention/heads.hpp>

#include <algorithm>
#include <cmath>

namespace hybridattn::inline HYBRIDATTN_ABI {

template <FullOptions O = FullOptions{}> struct FullAttention : PolicyDefaults {
  static_assert(O.window >= 0, "FullOptions: window is a number of keys, or 0 for all");
  static_assert(0 <= O.rotary_percent && O.rotary_percent <= 100, "FullOptions: rotary_percent is a share of the head, 0 .. 100");

  static constexpr std::string_view name = "Full";
  static constexpr FullOptions options = O;
  using Config = full::Config;
  template <class S> using Inputs = full::Inputs<S>;
  template <class S> using Outputs = full::Outputs<S>;
  template <class S> using Saved = full::Saved<S>;
  template <class S> using Cache = full::Cache<S>;
  using Prepare = full::Prepare<O>;
  using Finish = std::conditional_t<O.output_gate, SigmoidFinish, NoStep>;

  static Config complete(Config c, Index model_dim, Index num_heads) {
    check_numbers(c);
    if (c.num_heads == 0) c.num_heads = num_heads;
    if (c.num_kv_heads == 0) c.num_kv_heads = c.num_heads;
    c.head_dim = default_head_dim(c.head_dim, model_dim, c.num_heads);
    if (c.scale == 0) c.scale = 1 / std::sqrt(static_cast<double>(c.head_dim));
    check_groups("FullAttention", c.num_heads, c.num_kv_heads);
    return c;
  }
  static Inputs<Shapes> inputs(Config const& c, Sequences const& s) {
    Shape<3> const keys{s.tokens(), c.num_kv_heads, c.head_dim};
    return {.q = {s.tokens(), c.num_heads, c.head_dim}, .k = keys, .v = keys};
  }
  static Outputs<Shapes> outputs(Config const& c, Sequences const& s) { return {.o = {s.tokens(), c.num_heads, c.head_dim}}; }
  static Saved<Shapes> saved(Config const& c, Sequences const& s) { return {.lse = {s.tokens(), c.num_heads}}; }
  static Cache<Shapes> cache(Config const& c, Index batch, Index capacity) {
    Shape<4> const rows{batch, O.window == 0 ? capacity : std::min<Index>(O.window, capacity), c.num_kv_heads, c.head_dim};
    return {.keys = rows, .values = rows};
  }

 private:
  static void check_numbers(Config const& c) {
    check_size("FullAttention", "num_heads", c.num_heads);
    check_size("FullAttention", "num_kv_heads", c.num_kv_heads);
    check_size("FullAttention", "head_dim", c.head_dim);
    check_number("FullAttention", "scale", c.scale);
    check_positive("FullAttention", "rope_theta", c.rope_theta);
    check_positive("FullAttention", "norm_eps", c.norm_eps);
  }
};
using Full = FullAttention<>;

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
