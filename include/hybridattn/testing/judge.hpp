// The laws that every attention policy keeps, for the library's policies and for yours: testing::judge<MyPolicy, Cpu, float>()
// returns a verdict for each law at each size, and a broken one says why. It needs no test framework. traits.hpp says what a
// policy may add: sizes, inputs as they occur, a reference.
#ifndef HYBRIDATTN_TESTING_JUDGE_HPP
#define HYBRIDATTN_TESTING_JUDGE_HPP

#include <hybridattn/testing/adaptor.hpp>
#include <hybridattn/testing/bad_value_laws.hpp>
#include <hybridattn/testing/bitwise_laws.hpp>
#include <hybridattn/testing/budget_laws.hpp>
#include <hybridattn/testing/decoding_laws.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI::testing {

struct Law {
  char const* name;
  Verdict (*judge)(AnyPolicy const&);
};
inline constexpr Law all_laws[] = {
    {"causal forward", causal_forward},
    {"causal backward", causal_backward},
    {"independent of the batch", independent_of_the_batch},
    {"packed equals its sequences", packed_equals_its_sequences},
    {"repeatable", repeatable},
    {"fills everything", fills_everything},
    {"isolated", isolated},
    {"true values", true_values},
    {"right choices", right_choices},
    {"finite differences", finite_differences},
    {"linear", linear},
    {"agrees in parts", agrees_in_parts},
    {"decodes the whole", decodes_the_whole},
    {"decodes cleanly", decodes_cleanly},
    {"memory as announced", memory_as_announced},
    {"bears bad values", bears_bad_values},
};

// All verdicts on one policy at one size. A policy that throws breaks the law under which it did.
inline std::vector<Verdict> judge(AnyPolicy const& policy) {
  std::vector<Verdict> verdicts;
  for (Law const& law : all_laws) {
    try {
      verdicts.push_back(law.judge(policy));
    } catch (std::exception const& error) {
      verdicts.push_back({law.name, false, sentence("it throws: ", error.what())});
    }
  }
  return verdicts;
}

// At all the sizes of Samples<P>; `why`, if there is one, starts with the policy's name and the number of the size.
template <class P, class B, class T> std::vector<Verdict> judge() {
  std::vector<Verdict> verdicts;
  auto const sizes = Samples<P>::sizes();
  for (std::size_t size = 0; size < sizes.size(); ++size) {
    Adaptor<P, B, T> const policy{sizes[size]};
    for (Verdict& verdict : judge(policy)) {
      if (!verdict.why.empty()) verdict.why = sentence(policy.name(), ", size ", size, ": ", verdict.why);
      verdicts.push_back(std::move(verdict));
    }
  }
  return verdicts;
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::testing
#endif
