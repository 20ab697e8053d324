// Full attention on the emulator of a GPU: the laws, and agreement with the CPU.
#include "catch.hpp"
#include "gpu.hpp"
#include "verdicts.hpp"

#include <hybridattn/testing/judge.hpp>
#include <hybridattn/testing/policies.hpp>

namespace ha = hybridattn;
using ha::Full;
using ha::Index;

namespace {

template <int window> using Windowed = ha::FullAttention<ha::FullOptions{.window = window}>;

// Heads that fill, or nearly fill, each room that kernels are compiled for.
std::vector<ha::full::Config> all_rooms() {
  std::vector<ha::full::Config> sizes;
  for (Index const dim : {32, 33, 64, 100, 128, 130, 256}) sizes.push_back({.num_heads = 2, .num_kv_heads = 1, .head_dim = dim});
  return sizes;
}
template <class T> void agree_in_all_rooms() {
  for (auto const& size : all_rooms()) {
    ha::testing::Adaptor<Full, ha::Cpu, T> const cpu{size};
    ha::testing::Adaptor<Full, Gpu, T> const here{size};
    check_all({agree_within_budget(cpu, here), decodes_the_whole(here), fills_everything(here)});
  }
}

}  // namespace

TEST_CASE("full attention keeps every law on the emulator in float", "[float]") { check_all(ha::testing::judge<Full, Gpu, float>()); }
TEST_CASE("full attention keeps every law on the emulator in double", "[double]") {
  check_all(ha::testing::judge<Full, Gpu, double>());
}
TEST_CASE("full attention with a window keeps every law on the emulator", "[window]") {
  check_all(ha::testing::judge<Windowed<16>, Gpu, float>());
  check_all(judge(ha::testing::Adaptor<Windowed<1>, Gpu, double>{ha::testing::Samples<Windowed<1>>::sizes().front()}));
}
TEST_CASE("full attention agrees with the CPU for every room of a head", "[float]") { agree_in_all_rooms<float>(); }
TEST_CASE("full attention agrees with the CPU for every room of a head in double", "[double]") { agree_in_all_rooms<double>(); }
TEST_CASE("a head that no kernel has room for is an error", "[window]") {
  ha::testing::Adaptor<Full, Gpu, float> const wide{{.num_heads = 1, .num_kv_heads = 1, .head_dim = 257}};
  auto const x = wide.sample(wide.kinds().front(), ha::Sequences::equal(1, 2), 1, false);
  CHECK_THROWS_WITH(wide.run(x, {}), "FullAttention: head_dim 257; a GPU's kernels have room for 256");
}
