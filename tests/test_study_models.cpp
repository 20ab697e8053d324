#include "catch.hpp"

#include "../examples/study_models.hpp"

namespace ha = hybridattn;

namespace {

template <class Stack> ha::Index parameters1() { return ha::LanguageModel<Stack>{study::study1_config<Stack>(49152)}.parameter_count(); }
template <class Stack> ha::Index parameters2() { return ha::LanguageModel<Stack>{study::study2_config<Stack>(49152)}.parameter_count(); }
template <ha::Text text> using One = ha::Pattern<text, study::Study1>;
template <ha::Text text> using Two = ha::Pattern<text, study::Study2>;

}  // namespace

TEST_CASE("study 1's patterns have exactly the published numbers of parameters") {
  CHECK(parameters1<One<"LFFL">>() == 14'064'264);
  CHECK(parameters1<One<"FFLL">>() == 14'064'264);
  CHECK(parameters1<One<"LDDL">>() == 14'106'120);
  CHECK(parameters1<One<"DLDL">>() == 14'106'120);
  CHECK(parameters1<One<"LLLL">>() == 14'101'136);
  CHECK(parameters1<One<"FFFF">>() == 14'027'392);
  CHECK(parameters1<One<"DDDD">>() == 14'111'104);
}

TEST_CASE("study 2's two models have exactly the published numbers of parameters") {
  CHECK(parameters2<Two<"FFFF">>() == 17'832'192);
  CHECK(parameters2<Two<"DDDD">>() == 18'163'968);
}
