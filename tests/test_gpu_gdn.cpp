// Gated DeltaNet on the emulator of a GPU: the laws.
#include "catch.hpp"
#include "gpu.hpp"
#include "verdicts.hpp"

#include <hybridattn/testing/judge.hpp>
#include <hybridattn/testing/policies.hpp>

namespace ha = hybridattn;

namespace {

// The laws at one of their sizes.
template <class T> void check_size(std::size_t size) {
  check_all(judge(ha::testing::Adaptor<ha::GDN, Gpu, T>{ha::testing::Samples<ha::GDN>::sizes()[size]}));
}

}  // namespace

TEST_CASE("gated DeltaNet keeps every law on the emulator at one size", "[laws]") { check_size<float>(0); }
TEST_CASE("gated DeltaNet keeps every law on the emulator at every size", "[sizes]") {
  check_all(ha::testing::judge<ha::GDN, Gpu, float>());
  check_all(ha::testing::judge<ha::GDN, Gpu, double>());
}
