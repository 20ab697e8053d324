#include "policies.hpp"

namespace fuzz {

SomePolicy some_gdn(FuzzedDataProvider& data) {
  ha::gdn::Config c;
  c.num_heads = data.ConsumeIntegralInRange<Index>(1, 2);
  c.num_value_heads = some_heads(data, c.num_heads);
  c.key_dim = some_dim(data);
  c.value_dim = some_dim(data);
  c.scale = some_scale(data);
  return one_of<ha::GDN, ha::GatedDeltaNet<ha::GdnOptions{.conv_width = 0}>>(data, c);
}

}  // namespace fuzz
