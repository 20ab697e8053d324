// Gated DeltaNet on the emulator of a GPU: the laws.
#include "catch.hpp"

#include <hybridattn/emulator.hpp>
#include <hybridattn/testing/judge.hpp>
#include <hybridattn/testing/policies.hpp>

namespace ha = hybridattn;
using ha::Emulator;

namespace {

void check_all(std::vector<ha::testing::Verdict> const& verdicts) {
  CHECK_FALSE(verdicts.empty());
  for (auto const& verdict : verdicts) {
    INFO(verdict.law << ": " << verdict.why);
    CHECK(verdict.holds);
  }
}

}  // namespace

TEST_CASE("gated DeltaNet keeps every law on the emulator in float", "[float]") {
  check_all(ha::testing::judge<ha::GDN, Emulator, float>());
}
TEST_CASE("gated DeltaNet keeps every law on the emulator in double", "[double]") {
  check_all(ha::testing::judge<ha::GDN, Emulator, double>());
}
