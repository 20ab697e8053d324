// Gated DeltaNet (arXiv 2412.06464): a linear attention whose state forgets, then corrects itself.
// For each value head, S is [K, V] and S_0 = initial_state, or zero:
//   (1) S~_t = exp(g_t) S_{t-1}                        forget before error
//   (2) e_t = v_t - S~_t^T k_t                         delta_t = beta_t e_t
//   (3) S_t = S~_t + k_t delta_t^T
//   (4) o_t = scale S_t^T q_t                          the updated state; final_state = S_T
// Backward, with X_t the gradient of S_t, from the last token to the first:
//   (5) X_t += scale q_t d_o_t^T ;  d_v_t = beta_t X_t^T k_t ;  d_beta_t = (X_t^T k_t) . e_t
//   (6) d_k_t = X_t delta_t - S~_t d_v_t ;  d_q_t = scale S_t d_o_t ;  X_{t-1} = exp(g_t) (X_t - k_t d_v_t^T)
//   (7) d_g_t = exp(g_t) <X_t - k_t d_v_t^T, S_{t-1}>    a sum over pairs of a write before and a read after this decay
//       (Euler's relation, sum_{j >= t} (q_j . d_q_j - v_j . d_v_j) + <S_T, d_final_state>, is mathematically equal, but
//       inexact in floating point: the sum fades with the decay, its terms do not)
// Value head h reads q/k head h / (HV / H); d_q and d_k sum over the group. g <= 0 is a logarithm: its sums never
// underflow before the exp. No equation divides by beta, so beta = 0 needs no special case.
#ifndef HYBRIDATTN_ATTENTION_GDN_GDN_HPP
#define HYBRIDATTN_ATTENTION_GDN_GDN_HPP

#include <hybridattn/attention/gdn/cpu.hpp>
#include <hybridattn/attention/gdn/steps.hpp>
#include <hybridattn/attention/gdn/types.hpp>

#include <cmath>

namespace hybridattn::inline HYBRIDATTN_ABI {

template <GdnOptions O = GdnOptions{}> struct GatedDeltaNet : PolicyDefaults {
  static_assert(O.conv_width >= 0, "GdnOptions: conv_width is a number of tokens, or 0 for no convolution");

  static constexpr std::string_view name = "GDN";
  static constexpr GdnOptions options = O;
  using Config = gdn::Config;
  template <class S> using Inputs = gdn::Inputs<S>;
  template <class S> using Outputs = gdn::Outputs<S>;
  template <class S> using Saved = gdn::Saved<S>;
  template <class S> using Cache = gdn::Cache<S>;
  using Prepare = gdn::Prepare<O>;
  using Finish = gdn::Finish<O>;

  static Config complete(Config c, Index model_dim, Index num_heads) {
    check_numbers(c);
    if (c.num_heads == 0) c.num_heads = num_heads;
    if (c.num_value_heads == 0) c.num_value_heads = c.num_heads;
    c.key_dim = default_head_dim(c.key_dim, model_dim, c.num_heads);
    if (c.value_dim == 0) c.value_dim = c.key_dim;
    if (c.scale == 0) c.scale = 1 / std::sqrt(static_cast<double>(c.key_dim));
    check_groups("GatedDeltaNet", c.num_value_heads, c.num_heads);
    return c;
  }
  // Training batches have no states: inputs() and outputs() give them empty shapes. gdn::state_shape is their shape.
  static Inputs<Shapes> inputs(Config const& c, Sequences const& s) {
    Shape<3> const keys{s.tokens(), c.num_heads, c.key_dim};
    Shape<2> const gates{s.tokens(), c.num_value_heads};
    return {.q = keys, .k = keys, .v = {s.tokens(), c.num_value_heads, c.value_dim}, .g = gates, .beta = gates, .initial_state = {}};
  }
  static Outputs<Shapes> outputs(Config const& c, Sequences const& s) {
    return {.o = {s.tokens(), c.num_value_heads, c.value_dim}, .final_state = {}};
  }
  static Saved<Shapes> saved(Config const& c, Sequences const& s) { return {.error = {s.tokens(), c.num_value_heads, c.value_dim}}; }
  static Cache<Shapes> cache(Config const& c, Index batch, Index) {
    Index const rows = O.conv_width > 0 ? O.conv_width - 1 : 0;
    Shape<3> const keys{batch, rows, size_product(c.num_heads, c.key_dim)};
    return {.conv_q = keys,
            .conv_k = keys,
            .conv_v = {batch, rows, size_product(c.num_value_heads, c.value_dim)},
            .state = {batch, c.num_value_heads, c.key_dim, c.value_dim}};
  }

 private:
  static void check_numbers(Config const& c) {
    check_size("GatedDeltaNet", "num_heads", c.num_heads);
    check_size("GatedDeltaNet", "num_value_heads", c.num_value_heads);
    check_size("GatedDeltaNet", "key_dim", c.key_dim);
    check_size("GatedDeltaNet", "value_dim", c.value_dim);
    check_number("GatedDeltaNet", "scale", c.scale);
    check_positive("GatedDeltaNet", "norm_eps", c.norm_eps);
  }
};
using GDN = GatedDeltaNet<>;

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
