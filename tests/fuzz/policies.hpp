// Policies of random options, scalars and sizes, as the laws see them. Each family is compiled in a file of its own.
#ifndef HYBRIDATTN_TESTS_FUZZ_POLICIES_HPP
#define HYBRIDATTN_TESTS_FUZZ_POLICIES_HPP

#include "fuzz.hpp"

#include <hybridattn/testing/adaptor.hpp>
#include <hybridattn/testing/policies.hpp>

#include <memory>

namespace fuzz {

using SomePolicy = std::unique_ptr<ha::testing::AnyPolicy>;

// They throw Error where the sizes do not fit together.
SomePolicy some_full(FuzzedDataProvider& data);
SomePolicy some_gdn(FuzzedDataProvider& data);
SomePolicy some_dsa(FuzzedDataProvider& data);

// One of the policies, in float or double.
template <class... Policies, class Config> SomePolicy one_of(FuzzedDataProvider& data, Config const& config) {
  auto const chosen = data.ConsumeIntegralInRange<std::size_t>(0, sizeof...(Policies) - 1);
  bool const in_double = data.ConsumeBool();
  SomePolicy policy;
  std::size_t number = 0;
  auto const make = [&]<class P>(std::type_identity<P>) {
    if (number++ != chosen) return;
    if (in_double) policy = std::make_unique<ha::testing::Adaptor<P, ha::Cpu, double>>(config);
    else policy = std::make_unique<ha::testing::Adaptor<P, ha::Cpu, float>>(config);
  };
  (make(std::type_identity<Policies>{}), ...);
  return policy;
}

// Any small dimension, and those that have a kernel of their own.
inline Index some_dim(FuzzedDataProvider& data) {
  static constexpr Index usual[] = {8, 16, 32, 64, 128};
  return data.ConsumeBool() ? data.ConsumeIntegralInRange<Index>(1, 40) : data.PickValueInArray(usual);
}
// Heads that share, and seldom numbers that do not divide one another.
inline Index some_heads(FuzzedDataProvider& data, Index groups) {
  return data.ConsumeIntegralInRange<int>(0, 15) == 0 ? data.ConsumeIntegralInRange<Index>(1, 4)
                                                      : groups * data.ConsumeIntegralInRange<Index>(1, 3);
}
inline double some_scale(FuzzedDataProvider& data) {
  static constexpr double scales[] = {0, 0, 0.25, 1, -0.5};   // 0: the default
  return data.PickValueInArray(scales);
}

}  // namespace fuzz

#endif
