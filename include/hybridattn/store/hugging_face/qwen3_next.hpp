// Qwen3-Next. Gated DeltaNet's projections are fused head by head, and feed-forward layers are dense or mixtures of experts.
#ifndef HYBRIDATTN_STORE_HUGGING_FACE_QWEN3_NEXT_HPP
#define HYBRIDATTN_STORE_HUGGING_FACE_QWEN3_NEXT_HPP

#include <hybridattn/store/hugging_face/qwen.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI::hugging_face {

namespace qwen {

inline constexpr Row gdn_fused_rows[] = {{"in_proj_qkvz.weight", "w.q w.k w.v w_gate", Layout::by_head},
                                         {"in_proj_ba.weight", "w.beta w.g", Layout::by_head}};
inline constexpr Row mixture_rows[] = {{"gate.weight", "router"},
                                       {"shared_expert.gate_proj.weight", "shared.gate"},
                                       {"shared_expert.up_proj.weight", "shared.up"},
                                       {"shared_expert.down_proj.weight", "shared.down"},
                                       {"shared_expert_gate.weight", "shared_gate"}};
inline constexpr Row experts_apart_rows[] = {{"experts.{}.gate_proj.weight", "experts.gate", Layout::each_expert},
                                             {"experts.{}.up_proj.weight", "experts.up", Layout::each_expert},
                                             {"experts.{}.down_proj.weight", "experts.down", Layout::each_expert}};
inline constexpr Row experts_fused_rows[] = {{"experts.gate_up_proj", "experts.gate experts.up", Layout::by_expert},
                                             {"experts.down_proj", "experts.down", Layout::by_expert}};
inline constexpr RowGroup qwen3_next_tensors[] = {
    {RowGroup::Place::model, whole_model_rows},
    {RowGroup::Place::outside, head_rows},
    {RowGroup::Place::each_layer, block_rows},
    {RowGroup::Place::kind, gdn_rows, "linear_attn.", "attention.", 'L'},
    {RowGroup::Place::kind, gdn_fused_rows, "linear_attn.", "attention.", 'L'},
    {RowGroup::Place::kind, full_rows, "self_attn.", "attention.", 'F'},
    {RowGroup::Place::each_layer, dense_rows, "mlp.", "feed_forward."},
    {RowGroup::Place::each_layer, mixture_rows, "mlp.", "feed_forward."},
    {RowGroup::Place::each_layer, experts_apart_rows, "mlp.", "feed_forward.", 0, RowGroup::Experts::apart},
    {RowGroup::Place::each_layer, experts_fused_rows, "mlp.", "feed_forward.", 0, RowGroup::Experts::fused}};

inline FeedForwardConfig read_mixture(Fields& fields, FeedForwardConfig c) {
  c.num_experts = fields.size("num_experts", 0);
  if (c.num_experts == 0) {
    fields.pass_over(detail::of_experts);
    return c;
  }
  c.top_k = fields.size("num_experts_per_tok");
  c.expert_dim = fields.size("moe_intermediate_size");
  c.shared_dim = fields.size("shared_expert_intermediate_size", 0);
  c.renormalise = fields.flag_or("norm_topk_prob", true);
  c.decoder_sparse_step = fields.size_or("decoder_sparse_step", 1);
  c.mlp_only_layers = fields.sizes_or_none("mlp_only_layers", detail::max_layers);
  double const coefficient = fields.real_or("router_aux_loss_coef", 0.001, 0, 1e6);
  c.balance = Balance::pooled;
  c.balance_coefficient = fields.flag_or("output_router_logits", false) ? coefficient : 0;
  return c;
}
inline void read_qwen3_next(Fields& fields, Settings& s) {
  read_common(fields, s);
  checkpoint::to_json(s.model["feed_forward"], read_mixture(fields, read_dense(fields)));
}

inline void check_qwen3_next(Settings& s) {
  check_model(s);
  auto const c = feed_forward(s);
  check(!detail::is_mixed(c, std::ssize(s.pattern)) || c.shared_dim >= 0, s.where,
        "its mixtures have no shared expert; shared_dim = 0 computes the same and can be saved");
  check(c.balance_coefficient == 0 || c.balance == Balance::pooled, s.where, "its load balancing is not Balance::pooled");
}

inline Json write_qwen3_next(Settings const& s) {
  Json json = write_common(s);
  auto const& rotary = json["rope_parameters"];   // readers for the first releases look for its fields outside
  json["rope_theta"] = rotary["rope_theta"];
  json["partial_rotary_factor"] = rotary["partial_rotary_factor"];
  auto const c = feed_forward(s);
  json["num_experts"] = c.num_experts;
  json["num_experts_per_tok"] = c.top_k;
  json["moe_intermediate_size"] = c.expert_dim;
  json["shared_expert_intermediate_size"] = std::max<Index>(c.shared_dim, 0);
  json["norm_topk_prob"] = c.renormalise;
  json["decoder_sparse_step"] = c.decoder_sparse_step;
  json["mlp_only_layers"] = c.mlp_only_layers;
  json["output_router_logits"] = c.balance_coefficient != 0;
  if (c.balance_coefficient != 0) json["router_aux_loss_coef"] = c.balance_coefficient;
  return json;
}

}  // namespace qwen

inline constexpr Family qwen3_next{.model_type = "qwen3_next",
                                   .architecture = "Qwen3NextForCausalLM",
                                   .kinds = qwen::kinds,
                                   .tensors = qwen::qwen3_next_tensors,
                                   .read = qwen::read_qwen3_next,
                                   .check_options = qwen::check_options,
                                   .check_model = qwen::check_qwen3_next,
                                   .write = qwen::write_qwen3_next};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::hugging_face
#endif
