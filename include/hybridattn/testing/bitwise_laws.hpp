// Laws that hold to the last bit, in every scalar. Each returns a verdict on one policy at one size.
#ifndef HYBRIDATTN_TESTING_BITWISE_LAWS_HPP
#define HYBRIDATTN_TESTING_BITWISE_LAWS_HPP

#include <hybridattn/testing/any_policy.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI::testing {

struct Verdict {
  std::string law;
  bool holds;
  std::string why;   // of a broken law: the first offender with its place and values; of one without a subject: the reason
};

namespace detail {

// Every length at which a kernel's blocks begin, end or are missing.
inline Sequences all_lengths() { return packed({1, 0, 2, 63, 64, 65, 130}); }
// For each sequence the position at which it is cut in two.
using Cut = std::vector<Index>;
// At the edges of blocks, the same in all sequences: of many kinds, each has its turn with some. And anywhere.
inline std::vector<Cut> cuts(Sequences const& s, std::size_t kind, std::size_t kinds) {
  std::vector<Cut> result;
  std::size_t const turns = std::min<std::size_t>(kinds, 4);
  std::size_t turn = kind;
  for (Index place : {1, 2, 31, 62, 63, 64, 65, 100, 129})
    if (turn++ % turns == 0) result.emplace_back(s.size(), place);
  Random random{Seed{kind}, "cuts"};
  for (int i = 0; i < 2; ++i)
    for (Cut& cut = result.emplace_back(); Sequence const sequence : s)
      cut.push_back(1 + random.below(std::max<Index>(1, sequence.length - 1)));
  return result;
}
inline bool is_early(Sequences const& s, Cut const& cut, Index token) {
  return s.positions()(token) < cut[static_cast<std::size_t>(s.owners()(token))];
}
// The sequence that a row of tokens or sequences belongs to.
inline Index owner(Sequences const& s, Rows rows, Index row) { return rows == Rows::tokens ? s.owners()(row) : row; }

// The first of the checks that names an offender: "" if none does.
template <class... Checks> std::string first_of(Checks... checks) {
  std::string why;
  auto const finds = [&](auto& check) {
    why = check();
    return !why.empty();
  };
  static_cast<void>((finds(checks) || ...));
  return why;
}
inline Verdict verdict(std::string law, std::string why) {
  bool const holds = why.empty();
  return {std::move(law), holds, std::move(why)};
}
inline std::string told(std::string const& why, std::string const& circumstances) {
  return why.empty() ? why : why + " (" + circumstances + ")";
}

// The first offender that check(x, what x computes, changed inputs and d_outputs, cut) finds, for many kinds, cuts and changes.
template <class Check> std::string first_at_a_cut(AnyPolicy const& policy, Check check) {
  Sequences const s = all_lengths();
  auto const kinds = policy.kinds();
  for (std::size_t kind = 0; kind < kinds.size(); ++kind) {
    Case const x = policy.sample(kinds[kind], s, 1, true), other = policy.sample(kinds[kind], s, 2, true);
    Case const nan{s, all_nan(x.inputs), all_nan(x.d_outputs), true};
    Result const before = policy.run(x, {});
    for (Cut const& cut : cuts(s, kind, kinds.size()))
      for (bool const with_nan : {false, true}) {
        std::string const why = check(x, before, with_nan ? nan : other, cut);
        if (!why.empty())
          return sentence(why, " (before and after ", with_nan ? "NaN" : "other values", " beyond a cut; the sequences are cut at ",
                          listed(cut), "; kind ", kinds[kind], ")");
      }
  }
  return {};
}

}  // namespace detail

// 1. Inputs at tokens >= t change: all outputs before t, and what is saved of those tokens, keep every bit.
inline Verdict causal_forward(AnyPolicy const& policy) {
  return detail::verdict(
      "causal forward", detail::first_at_a_cut(policy, [&](Case x, Result const& before, Case const& other, detail::Cut const& cut) {
        auto const is_early = [&](HostTensor const& tensor, Index row) {
          return tensor.rows == Rows::tokens && detail::is_early(x.sequences, cut, row);
        };
        replace_rows(x.inputs, other.inputs,
                     [&](HostTensor const& tensor, Index row) { return tensor.rows == Rows::tokens && !is_early(tensor, row); });
        Result const after = policy.run(x, {});
        return detail::first_of([&] { return first_difference(before.outputs, after.outputs, is_early); },
                                [&] { return first_difference(before.saved, after.saved, is_early); });
      }));
}

// 2. d_outputs at tokens < t change: the gradients of tokens >= t keep every bit.
inline Verdict causal_backward(AnyPolicy const& policy) {
  return detail::verdict(
      "causal backward", detail::first_at_a_cut(policy, [&](Case x, Result const& before, Case const& other, detail::Cut const& cut) {
        auto const is_early = [&](HostTensor const& tensor, Index row) {
          return tensor.rows == Rows::tokens && detail::is_early(x.sequences, cut, row);
        };
        auto const is_late = [&](HostTensor const& tensor, Index row) { return tensor.rows == Rows::tokens && !is_early(tensor, row); };
        replace_rows(x.d_outputs, other.d_outputs, is_early);
        return first_difference(before.gradients, policy.run(x, {}).gradients, is_late);
      }));
}

// 3. Every other sequence changes, inputs and d_outputs: the rest keeps every bit.
inline Verdict independent_of_the_batch(AnyPolicy const& policy) {
  Sequences const s = detail::all_lengths();
  std::string const kind = policy.kinds().front();
  Case const x = policy.sample(kind, s, 1, true), other = policy.sample(kind, s, 2, true);
  HostGroup const nan = all_nan(x.inputs), nan_upstream = all_nan(x.d_outputs);
  Result const before = policy.run(x, {});
  std::string why;
  for (Index parity : {0, 1})
    for (bool const with_nan : {false, true}) {
      if (!why.empty()) continue;
      auto const changes = [&](HostTensor const& tensor, Index row) {
        return tensor.rows != Rows::other && detail::owner(s, tensor.rows, row) % 2 == parity;
      };
      auto const stays = [&](HostTensor const& tensor, Index row) { return tensor.rows != Rows::other && !changes(tensor, row); };
      Case changed = x;
      replace_rows(changed.inputs, with_nan ? nan : other.inputs, changes);
      replace_rows(changed.d_outputs, with_nan ? nan_upstream : other.d_outputs, changes);
      Result const after = policy.run(changed, {});
      why = detail::told(detail::first_of([&] { return first_difference(before.outputs, after.outputs, stays); },
                                          [&] { return first_difference(before.saved, after.saved, stays); },
                                          [&] { return first_difference(before.gradients, after.gradients, stays); }),
                         sentence("before and after ", with_nan ? "NaN" : "other values", " in its neighbours in the batch"));
    }
  return detail::verdict("independent of the batch", why);
}

// 4. A packed batch is its sequences, one by one: outputs, states and gradients.
inline Verdict packed_equals_its_sequences(AnyPolicy const& policy) {
  Sequences const s = detail::all_lengths();
  std::string why;
  for (std::string const& kind : {policy.kinds().front(), policy.kinds().back()}) {
    Case const x = policy.sample(kind, s, 1, true);
    Result const whole = policy.run(x, {});
    for (Index i = 0; i < s.count() && why.empty(); ++i) {
      std::vector<Part> const own{{i, 0, s[static_cast<std::size_t>(i)].length}};
      Result const alone = policy.run(cut(x, own), {});
      auto const has_rows = [](HostTensor const& tensor, Index) { return tensor.rows != Rows::other; };
      why = detail::told(
          detail::first_of([&] { return first_difference(detail::rows_of(whole.outputs, s, own), alone.outputs, has_rows); },
                           [&] { return first_difference(detail::rows_of(whole.gradients, s, own), alone.gradients, has_rows); }),
          sentence("in the batch and alone, of sequence ", i, " with ", own[0].last, " tokens, kind ", kind));
    }
  }
  return detail::verdict("packed equals its sequences", why);
}

namespace detail {
// All of a run.
inline std::string first_difference_of_runs(Result const& a, Result const& b) {
  return first_of([&] { return first_difference(a.outputs, b.outputs); }, [&] { return first_difference(a.saved, b.saved); },
                  [&] { return first_difference(a.gradients, b.gradients); });
}
}  // namespace detail

// 5. Two runs agree, and so do runs on any number of threads.
inline Verdict repeatable(AnyPolicy const& policy) {
  Case const x = policy.sample(policy.kinds().back(), detail::all_lengths(), 1, true);
  Result const one = policy.run(x, {});
  std::string why;
  for (int threads : {1, 2, 3})
    if (why.empty())
      why = detail::told(detail::first_difference_of_runs(one, policy.run(x, {.threads = threads})),
                         threads == 1 ? std::string("in two equal runs") : sentence("on 1 and on ", threads, " threads"));
  return detail::verdict("repeatable", why);
}

namespace detail {
inline std::string first_not_finite(HostGroup const& group, bool infinity_too) {
  for (HostTensor const& tensor : group)
    for (Index e = 0; e < std::ssize(tensor.values); ++e) {
      double const x = tensor.values[static_cast<std::size_t>(e)];
      if (x != x || (infinity_too && std::isinf(x))) return sentence(tensor.name, tensor.place(e), " is ", number(x));
    }
  return {};
}
}  // namespace detail

// 6. Results come back finite and complete whatever stood in their place, beside them and in scratch memory, and however
// their rows are spaced; nothing beside them is written.
inline Verdict fills_everything(AnyPolicy const& policy) {
  Case const x = policy.sample(policy.kinds().front(), detail::all_lengths(), 1, true);
  Result const plain = policy.run(x, {});
  std::string why = detail::first_of([&] { return plain.trespass; },
                                     [&] { return detail::told(detail::first_not_finite(plain.outputs, true), "in outputs"); },
                                     [&] { return detail::told(detail::first_not_finite(plain.saved, false), "in what is saved"); },
                                     [&] { return detail::told(detail::first_not_finite(plain.gradients, true), "in gradients"); });
  auto const compare = [&](Surroundings const& around, char const* circumstances) {
    if (!why.empty()) return;
    Result const other = policy.run(x, around);
    why = detail::first_of([&] { return other.trespass; },
                           [&] { return detail::told(detail::first_difference_of_runs(plain, other), circumstances); });
  };
  compare({.unwritten = 3}, "among NaN and among 3, in results before they are written and beside all tensors");
  compare({.spaced = true}, "without and with gaps between the rows");
  compare({.unwritten = -1e6, .spaced = true}, "without gaps, and with gaps among -1e6");
  compare({.leftovers = true}, "in fresh scratch memory, and in what a run on NaN left");
  compare({.threads = 2, .leftovers = true}, "in fresh scratch memory, and in what a run on NaN left, on 2 threads");
  return detail::verdict("fills everything", why);
}

namespace detail {
inline std::string first_not_zero(HostGroup const& gradients, AnyPolicy const& policy, bool detached) {
  for (HostTensor const& tensor : gradients) {
    if (policy.detached(tensor.name) != detached) continue;
    for (Index e = 0; e < std::ssize(tensor.values); ++e)
      if (double const x = tensor.values[static_cast<std::size_t>(e)]; x != 0)
        return sentence("the gradient of ", tensor.name, tensor.place(e), " is ", number(x));
  }
  return {};
}
}  // namespace detail

// 7. The main loss gives exactly zero to detached inputs, the auxiliary loss exactly zero to all others.
inline Verdict isolated(AnyPolicy const& policy) {
  Sequences const s = detail::all_lengths();
  Case x = policy.sample(policy.kinds().front(), s, 1, true);
  bool const has_detached =
      std::any_of(x.inputs.begin(), x.inputs.end(), [&](HostTensor const& tensor) { return policy.detached(tensor.name); });
  HostTensor* const auxiliary = x.d_outputs.find("auxiliary_loss");
  if (!has_detached && auxiliary == nullptr) return {"isolated", true, "no input is detached"};
  if (auxiliary != nullptr) std::fill(auxiliary->values.begin(), auxiliary->values.end(), 0);
  std::string why = detail::told(detail::first_not_zero(policy.run(x, {}).gradients, policy, true), "of the main loss");
  if (auxiliary != nullptr && why.empty()) {
    for (HostTensor& tensor : x.d_outputs) std::fill(tensor.values.begin(), tensor.values.end(), tensor.name == "auxiliary_loss" ? 1 : 0);
    why = detail::told(detail::first_not_zero(policy.run(x, {}).gradients, policy, false), "of the auxiliary loss");
  }
  return detail::verdict("isolated", why);
}

// Of one policy on two machines that shall compute the same bits.
inline Verdict same_on_both(AnyPolicy const& a, AnyPolicy const& b) {
  Case const x = a.sample(a.kinds().front(), detail::all_lengths(), 1, true);
  return detail::verdict(
      "same on both", detail::told(detail::first_difference_of_runs(a.run(x, {}), b.run(x, {})), "on the first backend and on the second"));
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::testing
#endif
