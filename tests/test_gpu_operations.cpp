// Every operation on the emulator of a GPU keeps the laws, and agrees with the CPU.
#include "catch.hpp"
#include "gpu.hpp"

#include <hybridattn/testing/judge.hpp>
#include <hybridattn/testing/operations.hpp>

namespace ha = hybridattn;

namespace {

template <class Op, class T> void check_all() {
  auto const verdicts = ha::testing::judge<Op, Gpu, T>();
  CHECK_FALSE(verdicts.empty());
  for (auto const& verdict : verdicts) {
    INFO(verdict.law << ": " << verdict.why);
    CHECK(verdict.holds);
  }
}

}  // namespace

TEMPLATE_LIST_TEST_CASE("an operation keeps every law on the emulator in float", "[float]", ha::testing::AllOperations) {
  check_all<TestType, float>();
}
TEMPLATE_LIST_TEST_CASE("an operation keeps every law on the emulator in double", "[double]", ha::testing::AllOperations) {
  check_all<TestType, double>();
}
