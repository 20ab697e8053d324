// Operations and policies on the emulator of a GPU against golden values.
#include "golden_operations.hpp"
#include "golden_policies.hpp"
#include "gpu.hpp"


namespace ha = hybridattn;

TEST_CASE("operations on the emulator agree with golden values", "[operations]") {
  for (auto const& family : golden::operations_on<Gpu>) DYNAMIC_SECTION(family.name) {
      golden::check(family);
    }
}
TEST_CASE("policies on the emulator agree with golden values", "[policies]") {
  for (auto const& family : golden::policies_on<Gpu>) DYNAMIC_SECTION(family.name) {
      golden::check(family);
    }
}
