// The text models of Qwen3.5. Gated DeltaNet's projections are stacked one after the other, and all feed-forward layers are dense.
#ifndef HYBRIDATTN_STORE_HUGGING_FACE_QWEN3_5_HPP
#define HYBRIDATTN_STORE_HUGGING_FACE_QWEN3_5_HPP

#include <hybridattn/store/hugging_face/qwen.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI::hugging_face {

namespace qwen {

inline constexpr Row gdn_split_rows[] = {
    {"in_proj_qkv.weight", "w.q w.k w.v"}, {"in_proj_z.weight", "w_gate"}, {"in_proj_b.weight", "w.beta"}, {"in_proj_a.weight", "w.g"}};
inline constexpr RowGroup qwen3_5_tensors[] = {{RowGroup::Place::model, whole_model_rows},
                                               {RowGroup::Place::outside, head_rows},
                                               {RowGroup::Place::each_layer, block_rows},
                                               {RowGroup::Place::kind, gdn_rows, "linear_attn.", "attention.", 'L'},
                                               {RowGroup::Place::kind, gdn_split_rows, "linear_attn.", "attention.", 'L'},
                                               {RowGroup::Place::kind, full_rows, "self_attn.", "attention.", 'F'},
                                               {RowGroup::Place::each_layer, dense_rows, "mlp.", "feed_forward."}};

inline void read_qwen3_5(Fields& fields, Settings& s) {
  read_common(fields, s);
  checkpoint::to_json(s.model["feed_forward"], read_dense(fields));
  fields.pass_over(detail::of_experts);
}
inline void check_qwen3_5(Settings& s) {
  check_model(s);
  check(!detail::is_mixed(feed_forward(s), std::ssize(s.pattern)), s.where, "it has mixtures of experts; only qwen3_next has them");
}

}  // namespace qwen

inline constexpr Family qwen3_5_text{.model_type = "qwen3_5_text",
                                     .architecture = "Qwen3_5ForCausalLM",
                                     .wrapper = "qwen3_5",
                                     .kinds = qwen::kinds,
                                     .tensors = qwen::qwen3_5_tensors,
                                     .read = qwen::read_qwen3_5,
                                     .check_options = qwen::check_options,
                                     .check_model = qwen::check_qwen3_5,
                                     .write = qwen::write_common};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::hugging_face
#endif
