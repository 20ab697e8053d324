// Attention policies and their layers against golden values.
#include "golden_policies.hpp"

#include <hybridattn/backend/cpu/cpu.hpp>

using hybridattn::Cpu;
static_assert(golden::are_named(golden::policies_on<Cpu>, golden::policy_families) &&
              golden::are_named(golden::layers_on<Cpu>, golden::layer_families));

TEST_CASE("attention policies agree with golden values") {
  for (auto const& family : golden::policies_on<Cpu>) DYNAMIC_SECTION(family.name) {
      golden::check(family);
    }
}
TEST_CASE("layers of attention policies agree with golden values") {
  for (auto const& family : golden::layers_on<Cpu>) DYNAMIC_SECTION(family.name) {
      golden::check(family);
    }
}
