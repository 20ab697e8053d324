// The layers and models of the two published studies (exp1: eight layer patterns; exp4: sparse against classic attention),
// as option types of the library's policies and configurations of its language model; both repaired to be causal.
#ifndef HYBRIDATTN_EXAMPLES_STUDY_MODELS_HPP
#define HYBRIDATTN_EXAMPLES_STUDY_MODELS_HPP

#include <hybridattn/hybridattn.hpp>

namespace study {

namespace ha = hybridattn;

// Study 1. Its F normalises queries and keys plainly and rotates whole heads; its D has no norm, no gate, and rotates
// neighbouring pairs.
using Linear1 = ha::GatedDeltaNet<ha::GdnOptions{.conv_width = 4, .output_gate = true}>;
using Full1 = ha::FullAttention<ha::FullOptions{.qk_norm = ha::QkNorm::plain, .output_gate = true, .rotary_percent = 100}>;
template <int top_k>
using Sparse1Of = ha::SparseAttention<ha::SparseOptions{
    .top_k = top_k, .qk_norm = ha::QkNorm::none, .output_gate = false, .rotary_percent = 100, .rotary = ha::Rotary::interleaved}>;
using Sparse1 = Sparse1Of<64>;
using Study1 = ha::Alphabet<ha::Letter<'L', Linear1>, ha::Letter<'G', Linear1>, ha::Letter<'F', Full1>, ha::Letter<'*', Full1>,
                            ha::Letter<'D', Sparse1>>;

// Study 2: plain attention with a rotation, and the same over half of the keys.
using Classic2 = ha::FullAttention<ha::FullOptions{
    .qk_norm = ha::QkNorm::none, .output_gate = false, .rotary_percent = 100, .rotary = ha::Rotary::interleaved}>;
using Sparse2 = ha::SparseAttention<ha::SparseOptions{.top_k = 0,
                                                      .top_k_percent = 50,
                                                      .qk_norm = ha::QkNorm::none,
                                                      .output_gate = false,
                                                      .rotary_percent = 100,
                                                      .rotary = ha::Rotary::interleaved}>;
using Study2 = ha::Alphabet<ha::Letter<'F', Classic2>, ha::Letter<'*', Classic2>, ha::Letter<'D', Sparse2>>;

// PyTorch's defaults, which the studies did not change.
inline constexpr ha::Initialization torch_start{.linear_deviation = 0, .embedding_deviation = 1};

namespace detail {

inline void set1(ha::gdn::Config& c) {
  c = {.num_heads = 2, .key_dim = 64, .value_dim = 64, .gate_start = ha::gdn::GateStart::transformers};
}
inline void set1(ha::full::Config& c) { c = {.num_heads = 4, .num_kv_heads = 2, .head_dim = 32}; }
inline void set1(ha::dsa::Config& c) { c = {.num_heads = 4, .head_dim = 32, .index_heads = 4, .index_dim = 32, .index_scale = 1}; }
inline void set2(ha::full::Config& c) { c = {.num_heads = 8, .head_dim = 32}; }
inline void set2(ha::dsa::Config& c) { c = {.num_heads = 8, .head_dim = 32, .index_heads = 4, .index_dim = 64, .index_scale = 1}; }

template <class... Policies, class Layers> void set_all1(ha::Types<Policies...>, Layers& layers) {
  (set1(layers.template get<Policies>().policy), ...);
}
template <class... Policies, class Layers> void set_all2(ha::Types<Policies...>, Layers& layers) {
  (set2(layers.template get<Policies>().policy), ...);
}

}  // namespace detail

// Study 1: 4 layers of width 128, every second one a mixture of 4 experts (its shared expert has width 0).
template <class Stack> typename ha::LanguageModel<Stack>::Config study1_config(ha::Index vocab_size) {
  typename ha::LanguageModel<Stack>::Config c{
      .vocab_size = vocab_size,
      .model_dim = 128,
      .num_heads = 4,
      .feed_forward = {.hidden_dim = 512, .num_experts = 4, .top_k = 2, .expert_dim = 256, .shared_dim = 0, .decoder_sparse_step = 2},
      .norm = {ha::NormWeight::zero_centred, 1e-6},
      .initialization = torch_start};
  detail::set_all1(typename Stack::Kinds{}, c.layers);
  return c;
}

// Study 2: 4 layers of width 256, each a mixture of 4 ungated experts; the head is the embedding.
template <class Stack> typename ha::LanguageModel<Stack>::Config study2_config(ha::Index vocab_size) {
  typename ha::LanguageModel<Stack>::Config c{
      .vocab_size = vocab_size,
      .model_dim = 256,
      .num_heads = 8,
      .feed_forward = {.hidden_dim = 512,
                       .gated = false,
                       .num_experts = 4,
                       .top_k = 2,
                       .expert_dim = 512,
                       .balance_coefficient = 1e-4 / 2},   // over the top_k of 2: the study's shares sum to one, the library's to top_k
      .norm = {ha::NormWeight::plain, 1.1920928955078125e-07},
      .tie_embedding = true,
      .initialization = torch_start};
  detail::set_all2(typename Stack::Kinds{}, c.layers);
  return c;
}

}  // namespace study

#endif
