#include "policies.hpp"

namespace fuzz {
namespace {

template <int top_k> using Sparse = ha::SparseAttention<ha::SparseOptions{.top_k = top_k}>;
template <int percent> using SparseShare = ha::SparseAttention<ha::SparseOptions{.top_k = 0, .top_k_percent = percent}>;

}  // namespace

SomePolicy some_dsa(FuzzedDataProvider& data) {
  static constexpr ha::Stage stages[] = {ha::Stage::language_model, ha::Stage::language_model, ha::Stage::sparse, ha::Stage::dense_warm_up};
  ha::dsa::Config c;
  c.num_kv_heads = data.ConsumeIntegralInRange<Index>(1, 2);
  c.num_heads = some_heads(data, c.num_kv_heads);
  c.head_dim = some_dim(data);
  c.scale = some_scale(data);
  c.index_heads = data.ConsumeIntegralInRange<Index>(1, 4);
  c.index_dim = data.ConsumeIntegralInRange<Index>(1, 40);
  c.index_scale = data.ConsumeBool() ? 0.25 : 0;
  c.stage = data.PickValueInArray(stages);
  return one_of<Sparse<1>, Sparse<8>, Sparse<64>, SparseShare<30>>(data, c);
}

}  // namespace fuzz
