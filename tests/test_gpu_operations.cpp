// Every operation on the emulator of a GPU keeps the laws, and agrees with the CPU.
#include "barriers.hpp"
#include "catch.hpp"

#include <hybridattn/emulator.hpp>
#include <hybridattn/testing/judge.hpp>
#include <hybridattn/testing/operations.hpp>

namespace ha = hybridattn;

namespace {

template <class Op, class T> void check_all() {
  auto const verdicts = ha::testing::judge<Op, ha::Emulator, T>();
  CHECK_FALSE(verdicts.empty());
  for (auto const& verdict : verdicts) {
    INFO(verdict.law << ": " << verdict.why);
    CHECK(verdict.holds);
  }
}

template <class... Ops> void judge_all(barriers::Barriers& all, std::tuple<Ops...> const*) {
  auto const judge = [&]<class Op>(std::type_identity<Op>) {
    for (auto const& size : ha::testing::Operation<Op>::sizes()) all.judge(ha::testing::OperationOn<Op, ha::Emulator, float>{size});
  };
  (judge(std::type_identity<Ops>{}), ...);
}

}  // namespace

TEMPLATE_LIST_TEST_CASE("an operation keeps every law on the emulator in float", "[float]", ha::testing::AllOperations) {
  check_all<TestType, float>();
}
TEMPLATE_LIST_TEST_CASE("an operation keeps every law on the emulator in double", "[double]", ha::testing::AllOperations) {
  check_all<TestType, double>();
}
TEST_CASE("every barrier of an operation is noticed when it is left out", "[barriers]") {
  barriers::Barriers all;
  judge_all(all, static_cast<ha::testing::AllOperations const*>(nullptr));
  CHECK(all.count() > 10);
  all.check_all();
}
