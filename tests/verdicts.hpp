// What Catch2 makes of the laws' verdicts.
#ifndef HYBRIDATTN_TESTS_VERDICTS_HPP
#define HYBRIDATTN_TESTS_VERDICTS_HPP

#include "catch.hpp"

#include <hybridattn/testing/judge.hpp>

#include <vector>

// Every law of the list holds, and there is one.
inline void check_all(std::vector<hybridattn::testing::Verdict> const& verdicts) {
  CHECK_FALSE(verdicts.empty());
  for (auto const& verdict : verdicts) {
    INFO(verdict.law << ": " << verdict.why);
    CHECK(verdict.holds);
  }
}

#endif
