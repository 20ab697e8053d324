// Operators, feed-forward layers, the optimiser and the schedule against golden values.
#include "golden_operations.hpp"

#include <hybridattn/backend/cpu/cpu.hpp>

static_assert(golden::are_named(golden::operations_on<hybridattn::Cpu>, golden::operator_families));

TEST_CASE("operators, feed-forward layers, AdamW and the schedule agree with golden values") {
  for (auto const& family : golden::operations_on<hybridattn::Cpu>) DYNAMIC_SECTION(family.name) {
      golden::check(family);
    }
}

TEST_CASE("every golden file is of a family that these tests know") {
  REQUIRE_FALSE(golden::files().empty());
  for (auto const& path : golden::files()) {
    std::string const family = golden::Case{path}.family();
    INFO(path.filename().string() << " is of the family " << family);
    auto const knows = [&](auto const& families) { return std::ranges::count(families, family); };
    CHECK(knows(golden::operator_families) + knows(golden::policy_families) + knows(golden::layer_families) == 1);
  }
}
