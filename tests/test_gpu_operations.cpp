// Every operation on the emulator of a GPU keeps the laws, and agrees with the CPU.
#include "catch.hpp"
#include "gpu.hpp"
#include "verdicts.hpp"

#include <hybridattn/testing/judge.hpp>
#include <hybridattn/testing/operations.hpp>

namespace ha = hybridattn;

TEMPLATE_LIST_TEST_CASE("an operation keeps every law on the emulator in float", "[float]", ha::testing::AllOperations) {
  check_all(ha::testing::judge<TestType, Gpu, float>());
}
TEMPLATE_LIST_TEST_CASE("an operation keeps every law on the emulator in double", "[double]", ha::testing::AllOperations) {
  check_all(ha::testing::judge<TestType, Gpu, double>());
}
