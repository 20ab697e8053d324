// Gated DeltaNet on the emulator of a GPU agrees with the CPU, and with the kernels that go token by token.
#include "catch.hpp"
#include "gpu.hpp"
#include "verdicts.hpp"

#include <hybridattn/testing/judge.hpp>
#include <hybridattn/testing/policies.hpp>

namespace ha = hybridattn;

namespace {

// Gated DeltaNet token by token.
struct Stepwise : ha::GDN {};

}  // namespace

template <> struct ha::On<Stepwise, Gpu> {
  template <class T, class M>
  static void forward(Gpu& gpu, gdn::Config const& c, SequencesOn<M> const& s, gdn::Inputs<In<T>> x, gdn::Outputs<Out<T>> y,
                      gdn::Saved<Out<T>> saved) {
    gdn::forward_steps<T>(gpu, c, s, x, y, saved, false);
  }
  template <class T, class M>
  static void backward(Gpu& gpu, gdn::Config const& c, SequencesOn<M> const& s, gdn::Inputs<In<T>> x, gdn::Outputs<In<T>>,
                       gdn::Saved<In<T>> saved, gdn::Outputs<In<T>> d_y, gdn::Inputs<Out<T>> d_x) {
    gdn::backward_steps<T>(gpu, c, s, x, saved, d_y, d_x);
  }
};
template <> struct ha::testing::Samples<Stepwise> : ha::testing::Samples<ha::GDN> {};
template <> struct ha::testing::Reference<Stepwise> : ha::testing::Reference<ha::GDN> {};

namespace {

// Keys that fill, or nearly fill, each room that kernels are compiled for.
template <class T> void agree_in_all_rooms() {
  for (ha::Index const dim : {32, 33, 64, 100, 128, 130, 256}) {
    ha::gdn::Config const size{.num_heads = 1, .num_value_heads = 2, .key_dim = dim, .value_dim = 40};
    ha::testing::Adaptor<ha::GDN, Gpu, T> const here{size};
    check_all({agree_within_budget(ha::testing::Adaptor<ha::GDN, ha::Cpu, T>{size}, here),
               agree_within_budget(ha::testing::Adaptor<Stepwise, Gpu, T>{size}, here), fills_everything(here)});
  }
}

}  // namespace

TEST_CASE("chunks of gated DeltaNet agree with the CPU and with single tokens for every room of a key", "[rooms]") {
  agree_in_all_rooms<float>();
  agree_in_all_rooms<double>();
}
