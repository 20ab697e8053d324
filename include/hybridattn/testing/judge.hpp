// Judges an attention policy or an operation, the library's or yours, by all laws. testing::judge<MyPolicy, Cpu, float>() returns a verdict
// for each law at each size; a broken law says why. It needs no test framework. traits.hpp says what a policy may add: sizes, typical
// inputs, a reference. operation.hpp says how an operation names its groups.
#ifndef HYBRIDATTN_TESTING_JUDGE_HPP
#define HYBRIDATTN_TESTING_JUDGE_HPP

#include <hybridattn/testing/adaptor.hpp>
#include <hybridattn/testing/bad_value_laws.hpp>
#include <hybridattn/testing/bitwise_laws.hpp>
#include <hybridattn/testing/budget_laws.hpp>
#include <hybridattn/testing/decoding_laws.hpp>
#include <hybridattn/testing/operation.hpp>
#include <hybridattn/testing/operation_laws.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI::testing {

template <class Of> struct Law {
  char const* name;
  Verdict (*judge)(Of const&);
};
// The laws of policies and of operations.
inline constexpr Law<Subject> common_laws[] = {
    {"causal forward", causal_forward},
    {"causal backward", causal_backward},
    {"independent of the batch", independent_of_the_batch},
    {"packed equals its sequences", packed_equals_its_sequences},
    {"repeatable", repeatable},
    {"fills everything", fills_everything},
    {"fenced", fenced},
    {"strided", strided},
    {"finite differences", finite_differences},
    {"linear", linear},
    {"agrees in parts", agrees_in_parts},
    {"memory as announced", memory_as_announced},
};
inline constexpr Law<AnyPolicy> policy_laws[] = {
    {"isolated", [](AnyPolicy const& policy) { return isolated(policy); }},
    {"true values", [](AnyPolicy const& policy) { return true_values(policy); }},
    {"right choices", right_choices},
    {"decodes the whole", decodes_the_whole},
    {"decodes cleanly", decodes_cleanly},
    {"bears bad values", bears_bad_values},
};
inline constexpr Law<Subject> operation_laws[] = {
    {"agrees with Cpu", agrees_with_cpu},
    {"in place", in_place},
};

namespace detail {

// Judges a subject by each law. A subject that throws breaks the law that called it.
template <class Of, std::size_t Count> void judge_by(Law<Of> const (&laws)[Count], Of const& subject, std::vector<Verdict>& verdicts) {
  for (Law<Of> const& law : laws) {
    try {
      verdicts.push_back(law.judge(subject));
    } catch (std::exception const& error) {
      verdicts.push_back({law.name, false, sentence("it throws: ", error.what())});
    }
  }
}
// Appends verdicts. A `why` that is not empty gets the subject's name and the number of the size in front.
inline void append(std::vector<Verdict>& all, std::vector<Verdict> verdicts, Subject const& subject, std::size_t size) {
  for (Verdict& verdict : verdicts) {
    if (!verdict.why.empty()) verdict.why = sentence(subject.name(), ", size ", size, ": ", verdict.why);
    all.push_back(std::move(verdict));
  }
}

}  // namespace detail

// Returns all verdicts at one size.
inline std::vector<Verdict> judge(AnyPolicy const& policy) {
  std::vector<Verdict> verdicts;
  detail::judge_by<Subject>(common_laws, policy, verdicts);
  detail::judge_by(policy_laws, policy, verdicts);
  return verdicts;
}
inline std::vector<Verdict> judge(detail::AnyOperation const& operation) {
  std::vector<Verdict> verdicts;
  detail::judge_by<Subject>(common_laws, operation, verdicts);
  detail::judge_by<Subject>(operation_laws, operation, verdicts);
  return verdicts;
}

// Returns all verdicts at all sizes of Samples<P>, or of Operation<P>.
template <class P, class B, class T> std::vector<Verdict> judge() {
  std::vector<Verdict> verdicts;
  auto const at = [&](auto const& sizes, auto make) {
    for (std::size_t size = 0; size < sizes.size(); ++size) {
      auto const subject = make(sizes[size]);
      detail::append(verdicts, judge(subject), subject, size);
    }
  };
  if constexpr (HasOperation<P>) at(Operation<P>::sizes(), [](auto const& config) { return OperationOn<P, B, T>{config}; });
  else at(Samples<P>::sizes(), [](auto const& config) { return Adaptor<P, B, T>{config}; });
  return verdicts;
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::testing
#endif
