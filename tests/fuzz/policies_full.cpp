#include "policies.hpp"

namespace fuzz {
namespace {

template <int window> using Windowed = ha::FullAttention<ha::FullOptions{.window = window}>;

}  // namespace

SomePolicy some_full(FuzzedDataProvider& data) {
  ha::full::Config c;
  c.num_kv_heads = data.ConsumeIntegralInRange<Index>(1, 2);
  c.num_heads = some_heads(data, c.num_kv_heads);
  c.head_dim = some_dim(data);
  c.scale = some_scale(data);
  return one_of<Windowed<0>, Windowed<1>, Windowed<5>, Windowed<64>>(data, c);
}

}  // namespace fuzz
