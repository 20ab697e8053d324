// Laws that hold for every bit, in every scalar. Each returns a verdict on one policy or operation at one size.
#ifndef HYBRIDATTN_TESTING_BITWISE_LAWS_HPP
#define HYBRIDATTN_TESTING_BITWISE_LAWS_HPP

#include <hybridattn/testing/subject.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI::testing {

struct Verdict {
  std::string law;
  bool holds;
  std::string why;   // a broken law's first wrong element with its place and values, or the reason why a law has nothing to judge
};

namespace detail {

// For each sequence the position at which it is cut in two.
using Cut = std::vector<Index>;
// Returns cuts at edges of blocks, at the same place in all sequences, and two random cuts. Each kind of inputs gets only a part of the
// edges, to save time.
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
inline Index owner(Sequences const& s, RowsOf rows, Index row) { return rows == RowsOf::tokens ? s.owners()(row) : row; }

// Makes the checks in order, until one returns an error. Returns this error, or "" if there is none.
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

// Calls check(x, result of x, case with changed inputs and d_outputs, cut) for many kinds, cuts and changes. Returns the first error.
template <class Check> std::string first_at_a_cut(Subject const& subject, Check check) {
  Sequences const s = subject.batch();
  auto const kinds = subject.kinds();
  for (std::size_t kind = 0; kind < kinds.size(); ++kind) {
    Case const x = subject.sample(kinds[kind], s, 1, true), other = subject.sample(kinds[kind], s, 2, true);
    Case const nan{s, all_nan(x.inputs), all_nan(x.d_outputs), true};
    Result const before = subject.run(x, {});
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

// When inputs at tokens >= t change, the outputs of tokens before t and what is saved of these tokens keep every bit.
inline Verdict causal_forward(Subject const& subject) {
  if (subject.batch().longest() < 2) return {"causal forward", true, "every row is a sequence of its own"};
  return detail::verdict(
      "causal forward", detail::first_at_a_cut(subject, [&](Case x, Result const& before, Case const& other, detail::Cut const& cut) {
        auto const is_early = [&](HostTensor const& tensor, Index row) {
          return tensor.rows == RowsOf::tokens && detail::is_early(x.sequences, cut, row);
        };
        replace_rows(x.inputs, other.inputs,
                     [&](HostTensor const& tensor, Index row) { return tensor.rows == RowsOf::tokens && !is_early(tensor, row); });
        x.d_outputs.clear();
        Result const after = subject.run(x, {});
        return detail::first_of([&] { return first_difference(before.outputs, after.outputs, is_early); },
                                [&] { return first_difference(before.saved, after.saved, is_early); });
      }));
}

// When d_outputs at tokens < t change, the gradients of tokens >= t keep every bit.
inline Verdict causal_backward(Subject const& subject) {
  if (subject.batch().longest() < 2) return {"causal backward", true, "every row is a sequence of its own"};
  return detail::verdict(
      "causal backward", detail::first_at_a_cut(subject, [&](Case x, Result const& before, Case const& other, detail::Cut const& cut) {
        auto const is_early = [&](HostTensor const& tensor, Index row) {
          return tensor.rows == RowsOf::tokens && detail::is_early(x.sequences, cut, row);
        };
        auto const is_late = [&](HostTensor const& tensor, Index row) { return tensor.rows == RowsOf::tokens && !is_early(tensor, row); };
        replace_rows(x.d_outputs, other.d_outputs, is_early);
        return first_difference(before.gradients, subject.run(x, {}).gradients, is_late);
      }));
}

namespace detail {
inline bool any_has_rows(HostGroup const& group) {
  return std::any_of(group.begin(), group.end(), [](HostTensor const& x) { return x.rows != RowsOf::other && !x.values.empty(); });
}
inline bool any_has_rows(Result const& result) { return any_has_rows(result.outputs) || any_has_rows(result.gradients); }
}  // namespace detail

// When inputs and d_outputs of every other sequence change, the results of the remaining sequences keep every bit.
inline Verdict independent_of_the_batch(Subject const& subject) {
  Sequences const s = subject.batch();
  std::string const kind = subject.kinds().front();
  Case const x = subject.sample(kind, s, 1, true), other = subject.sample(kind, s, 2, true);
  HostGroup const nan = all_nan(x.inputs), nan_upstream = all_nan(x.d_outputs);
  Result const before = subject.run(x, {});
  if (!detail::any_has_rows(before)) return {"independent of the batch", true, "no result has rows"};
  if (first_difference(x.inputs, other.inputs).empty()) return {"independent of the batch", true, "every batch has the same rows"};
  std::string why;
  for (Index parity : {0, 1})
    for (bool const with_nan : {false, true}) {
      if (!why.empty()) continue;
      auto const changes = [&](HostTensor const& tensor, Index row) {
        return tensor.rows != RowsOf::other && detail::owner(s, tensor.rows, row) % 2 == parity;
      };
      auto const stays = [&](HostTensor const& tensor, Index row) { return tensor.rows != RowsOf::other && !changes(tensor, row); };
      Case changed = x;
      replace_rows(changed.inputs, with_nan ? nan : other.inputs, changes);
      replace_rows(changed.d_outputs, with_nan ? nan_upstream : other.d_outputs, changes);
      Result const after = subject.run(changed, {});
      why = detail::told(detail::first_of([&] { return first_difference(before.outputs, after.outputs, stays); },
                                          [&] { return first_difference(before.saved, after.saved, stays); },
                                          [&] { return first_difference(before.gradients, after.gradients, stays); }),
                         sentence("before and after ", with_nan ? "NaN" : "other values", " in its neighbours in the batch"));
    }
  return detail::verdict("independent of the batch", why);
}

// A packed batch has the outputs, states and gradients that its sequences have when each runs alone.
inline Verdict packed_equals_its_sequences(Subject const& subject) {
  if (subject.has_tables()) return {"packed equals its sequences", true, "an input speaks of the batch as a whole"};
  Sequences const s = subject.batch();
  std::string why;
  for (std::string const& kind : {subject.kinds().front(), subject.kinds().back()}) {
    Case const x = subject.sample(kind, s, 1, true);
    Result const whole = subject.run(x, {});
    if (!detail::any_has_rows(whole)) return {"packed equals its sequences", true, "no result has rows"};
    for (Index i = 0; i < s.count() && why.empty(); ++i) {
      std::vector<Part> const own{{i, 0, s[static_cast<std::size_t>(i)].length}};
      Result const alone = subject.run(cut(x, own), {});
      auto const has_rows = [](HostTensor const& tensor, Index) { return tensor.rows != RowsOf::other; };
      why = detail::told(
          detail::first_of([&] { return first_difference(detail::rows_of(whole.outputs, s, own), alone.outputs, has_rows); },
                           [&] { return first_difference(detail::rows_of(whole.gradients, s, own), alone.gradients, has_rows); }),
          sentence("in the batch and alone, of sequence ", i, " with ", own[0].last, " tokens, kind ", kind));
    }
  }
  return detail::verdict("packed equals its sequences", why);
}

namespace detail {
// The first difference in outputs, saved tensors and gradients.
inline std::string first_difference_of_runs(Result const& a, Result const& b) {
  return first_of([&] { return first_difference(a.outputs, b.outputs); }, [&] { return first_difference(a.saved, b.saved); },
                  [&] { return first_difference(a.gradients, b.gradients); });
}
}  // namespace detail

// Two equal runs have the same bits, on any number of threads.
inline Verdict repeatable(Subject const& subject) {
  Case const x = subject.sample(subject.kinds().back(), subject.batch(), 1, true);
  Result const one = subject.run(x, {});
  std::string why;
  for (int threads : {1, 2, 3})
    if (why.empty())
      why = detail::told(detail::first_difference_of_runs(one, subject.run(x, {.threads = threads})),
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

namespace detail {
inline std::string first_unfilled(Result const& result) {
  return first_of([&] { return told(first_not_finite(result.outputs, true), "in outputs"); },
                  [&] { return told(first_not_finite(result.saved, false), "in what is saved"); },
                  [&] { return told(first_not_finite(result.gradients, true), "in gradients"); });
}
// The first element that other surroundings change.
inline std::string changed_by(Subject const& subject, Case const& x, Result const& plain, Surroundings const& around,
                              char const* circumstances) {
  return told(first_difference_of_runs(plain, subject.run(x, around)), circumstances);
}
}  // namespace detail

// A run writes every element of its results, also for a batch without tokens. Results are finite even if their memory held NaN before,
// and their bits do not depend on what their memory and scratch memory held before.
inline Verdict fills_everything(Subject const& subject) {
  std::string why;
  for (std::vector<Index> const& lengths : {std::vector<Index>{}, {0}, {0, 0}, {1}, {0, 2, 0}}) {
    Case const x = subject.sample(subject.kinds().front(), packed(lengths), 1, true);
    if (why.empty())
      why =
          detail::told(detail::first_unfilled(subject.run(x, {.leftovers = Leftovers::nan})), "of sequences of lengths " + listed(lengths));
  }
  Case const x = subject.sample(subject.kinds().front(), subject.batch(), 1, true);
  Result const plain = subject.run(x, {});
  auto const changed_by = [&](Surroundings const& around, char const* circumstances) {
    return detail::changed_by(subject, x, plain, around, circumstances);
  };
  return detail::verdict(
      "fills everything",
      detail::first_of([&] { return why; }, [&] { return detail::first_unfilled(plain); },
                       [&] { return changed_by({.unwritten = 3}, "among NaN and among 3, in results before they are written"); },
                       [&] { return changed_by({.leftovers = Leftovers::numbers}, "in fresh scratch memory, and in what a run left"); },
                       [&] { return changed_by({.leftovers = Leftovers::nan}, "in fresh scratch memory, and in what a run on NaN left"); },
                       [&] {
                         return changed_by({.threads = 2, .leftovers = Leftovers::nan},
                                           "in fresh scratch memory, and in what a run on NaN left, on 2 threads");
                       }));
}

// A run neither writes nor uses memory beside a tensor, also for a batch without tokens. This memory, the fence, holds NaN or another
// number.
inline Verdict fenced(Subject const& subject) {
  std::string const kind = subject.kinds().front();
  auto const trespass = [&](Sequences const& s, Surroundings const& around) {
    return subject.run(subject.sample(kind, s, 1, true), around).trespass;
  };
  Case const x = subject.sample(kind, subject.batch(), 1, true);
  Result const plain = subject.run(x, {});
  return detail::verdict(
      "fenced", detail::first_of(
                    [&] { return plain.trespass; }, [&] { return trespass(packed({0, 1}), {}); },
                    [&] { return trespass(subject.batch(), {.spaced = true}); },
                    [&] { return detail::changed_by(subject, x, plain, {.fence = -1e6}, "among NaN and among -1e6 beside all tensors"); }));
}

// Results have the same bits with and without gaps between the rows of every axis, so a run honours strides.
inline Verdict strided(Subject const& subject) {
  Case const x = subject.sample(subject.kinds().front(), subject.batch(), 1, true);
  return detail::verdict("strided",
                         detail::changed_by(subject, x, subject.run(x, {}), {.spaced = true}, "without and with gaps between the rows"));
}

// If an operation may work in place, it computes the same bits when a result is in the memory of its argument.
inline Verdict in_place(Subject const& subject) {
  if (!subject.works_in_place()) return {"in place", true, "nothing may stand in the memory of an argument"};
  Case const x = subject.sample(subject.kinds().front(), subject.batch(), 1, true);
  return detail::verdict("in place", detail::changed_by(subject, x, subject.run(x, {}), {.in_place = true}, "apart and in place"));
}

namespace detail {
inline std::string first_not_zero(HostGroup const& gradients, Subject const& subject, bool detached) {
  for (HostTensor const& tensor : gradients) {
    if (subject.detached(tensor.name) != detached) continue;
    for (Index e = 0; e < std::ssize(tensor.values); ++e)
      if (double const x = tensor.values[static_cast<std::size_t>(e)]; x != 0)
        return sentence("the gradient of ", tensor.name, tensor.place(e), " is ", number(x));
  }
  return {};
}
}  // namespace detail

// The main loss gives exactly zero to detached inputs, the auxiliary loss exactly zero to all others.
inline Verdict isolated(Subject const& subject) {
  Sequences const s = subject.batch();
  Case x = subject.sample(subject.kinds().front(), s, 1, true);
  bool const has_detached =
      std::any_of(x.inputs.begin(), x.inputs.end(), [&](HostTensor const& tensor) { return subject.detached(tensor.name); });
  HostTensor* const auxiliary = x.d_outputs.find("auxiliary_loss");
  if (!has_detached && auxiliary == nullptr) return {"isolated", true, "no input is detached"};
  if (auxiliary != nullptr) std::fill(auxiliary->values.begin(), auxiliary->values.end(), 0);
  std::string why = detail::told(detail::first_not_zero(subject.run(x, {}).gradients, subject, true), "of the main loss");
  if (auxiliary != nullptr && why.empty()) {
    for (HostTensor& tensor : x.d_outputs) std::fill(tensor.values.begin(), tensor.values.end(), tensor.name == "auxiliary_loss" ? 1 : 0);
    why = detail::told(detail::first_not_zero(subject.run(x, {}).gradients, subject, false), "of the auxiliary loss");
  }
  return detail::verdict("isolated", why);
}

// Two backends compute the same bits for one policy or operation.
inline Verdict same_on_both(Subject const& a, Subject const& b) {
  Case const x = a.sample(a.kinds().front(), a.batch(), 1, true);
  return detail::verdict(
      "same on both", detail::told(detail::first_difference_of_runs(a.run(x, {}), b.run(x, {})), "on the first backend and on the second"));
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::testing
#endif
