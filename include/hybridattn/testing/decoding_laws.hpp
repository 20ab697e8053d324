// The laws of policies that decode. A sequence that is read in parts, with a cache, must give what it gives when it is read whole.
#ifndef HYBRIDATTN_TESTING_DECODING_LAWS_HPP
#define HYBRIDATTN_TESTING_DECODING_LAWS_HPP

#include <hybridattn/testing/budget_laws.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI::testing {
namespace detail {

// Calls that read each sequence to its end. next(call, length of a sequence, tokens left of it) says how many of its tokens a call reads.
template <class Next> Calls calls_of(Sequences const& s, Next next) {
  Calls calls;
  std::vector<Index> left;
  for (Sequence const sequence : s) left.push_back(sequence.length);
  while (std::any_of(left.begin(), left.end(), [](Index n) { return n > 0; })) {
    auto& lengths = calls.emplace_back();
    for (std::size_t i = 0; i < left.size(); ++i) {
      lengths.push_back(std::min(left[i], next(std::ssize(calls) - 1, s[i].length, left[i])));
      left[i] -= lengths.back();
    }
  }
  return calls;
}
struct Splitting {
  std::string name;
  Calls calls;
};
// Reads a prompt of any length, 0 included, then 0 to 9 tokens at a time.
inline Splitting in_pieces(Sequences const& s, std::uint64_t seed) {
  Random random{Seed{seed}, "pieces"};
  return {"in pieces", calls_of(s, [&](Index call, Index length, Index) { return random.below(call == 0 ? length + 1 : 10); })};
}
inline std::vector<Splitting> splittings(Sequences const& s, std::uint64_t seed) {
  return {{"half, then token by token", calls_of(s, [](Index call, Index length, Index) { return call == 0 ? length / 2 : Index{1}; })},
          in_pieces(s, seed),
          {"token by token", calls_of(s, [](Index, Index, Index) { return Index{1}; })},
          {"at once", calls_of(s, [](Index, Index length, Index) { return length; })}};
}

// A sample of sequences that begin here. Initial states are zero where a policy's inputs always have them.
inline Case sample_to_decode(AnyPolicy const& policy, std::string const& kind, Sequences const& s, std::uint64_t seed) {
  Case x = policy.sample(kind, s, seed, false);
  for (HostTensor& tensor : x.inputs)
    if (tensor.rows == RowsOf::sequences) std::fill(tensor.values.begin(), tensor.values.end(), 0);
  return x;
}

inline std::string wrong_decoding(AnyPolicy const& policy, std::string const& kind, Splitting const& splitting, std::uint64_t seed,
                                  double times) {
  Case const x = forward_only(sample_to_decode(policy, kind, all_lengths(), seed));
  Judges const judges = judges_of(policy, x, policy.run(x, {}));
  Decoded const decoded = policy.decode(x, splitting.calls, {});
  return told(beyond_budget(policy, decoded.outputs, judges.truth.outputs, judges.truth.outputs, judges.naive.outputs, times),
              sentence("decoded ", splitting.name, ", kind ", kind));
}
// If the error is little more than the budget, judges another sample, as the law of true values does.
inline std::string wrong_decoding(AnyPolicy const& policy, std::string const& kind, Splitting const& splitting) {
  std::string why = wrong_decoding(policy, kind, splitting, 1, 1);
  for (std::uint64_t seed : {2u, 3u})
    if (!why.empty() && !policy.in_double() && wrong_decoding(policy, kind, splitting, seed - 1, 4).empty())
      why = wrong_decoding(policy, kind, splitting, seed, 1);
  return why;
}

}  // namespace detail

// However a sequence is split, the outputs are those of the whole sequence, within the budget of true values.
inline Verdict decodes_the_whole(AnyPolicy const& policy) {
  if (!policy.decodes()) return {"decodes the whole", true, "it does not decode"};
  auto const splittings = detail::splittings(detail::all_lengths(), 1);
  auto const kinds = policy.kinds();
  std::string why;
  for (std::size_t kind = 0; kind < kinds.size(); ++kind)
    for (std::size_t i = 0; i < splittings.size(); ++i)   // the first kind all ways, the others one each in turn
      if (why.empty() && (kind == 0 || kind % splittings.size() == i)) why = detail::wrong_decoding(policy, kinds[kind], splittings[i]);
  return detail::verdict("decodes the whole", why);
}

namespace detail {

// Says where outputs of a token depend on a later token or on another sequence, or "".
inline std::string decoding_sees_too_much(AnyPolicy const& policy, Case const& x, Calls const& calls) {
  Decoded const before = policy.decode(x, calls, {});
  HostGroup const nan = all_nan(x.inputs);
  std::string why;
  for (Cut const& cut : cuts(x.sequences, 0, 2)) {
    if (!why.empty()) break;
    auto const is_early = [&](HostTensor const&, Index row) { return detail::is_early(x.sequences, cut, row); };
    Case changed = x;
    replace_rows(changed.inputs, nan, [&](HostTensor const& t, Index row) { return t.rows == RowsOf::tokens && !is_early(t, row); });
    why = told(first_difference(before.outputs, policy.decode(changed, calls, {}).outputs, is_early),
               sentence("before and after NaN beyond a cut, in decoding; the sequences are cut at ", listed(cut)));
  }
  for (Index parity : {0, 1}) {
    if (!why.empty()) break;
    auto const stays = [&](HostTensor const& t, Index row) { return owner(x.sequences, t.rows, row) % 2 != parity; };
    Case changed = x;
    replace_rows(changed.inputs, nan, [&](HostTensor const& t, Index row) { return t.rows == RowsOf::tokens && !stays(t, row); });
    Decoded const after = policy.decode(changed, calls, {});
    why = told(first_of([&] { return first_difference(before.outputs, after.outputs, stays); },
                        [&] { return first_difference(before.cache, after.cache, stays); }),
               "before and after NaN in its neighbours in the batch, in decoding");
  }
  return why;
}
inline std::string decoding_differs_alone(AnyPolicy const& policy, Case const& x, Calls const& calls) {
  Decoded const whole = policy.decode(x, calls, {});
  std::string why;
  for (Index i = 0; i < x.sequences.count() && why.empty(); ++i) {
    std::vector<Part> const own{{i, 0, x.sequences[static_cast<std::size_t>(i)].length}};
    Calls alone;
    for (auto const& lengths : calls) alone.push_back({lengths[static_cast<std::size_t>(i)]});
    why = told(first_difference(rows_of(whole.outputs, x.sequences, own), policy.decode(cut(x, own), alone, {}).outputs),
               sentence("decoded in the batch and alone, of sequence ", i, " with ", own[0].last, " tokens"));
  }
  return why;
}
// Says where a call changes the cache of a sequence that it gives no token, or "".
inline std::string decoding_disturbs(AnyPolicy const& policy, Case const& x) {
  Calls calls = calls_of(x.sequences, [](Index call, Index length, Index) { return call == 0 ? (length + 1) / 2 : length; });
  if (calls.size() > 2) calls.resize(2);
  Decoded const before = policy.decode(x, {calls[0]}, {});
  for (std::size_t i = 0; i < calls[1].size(); i += 2) calls[1][i] = 0;
  Decoded const after = policy.decode(x, calls, {});
  return told(first_difference(before.cache, after.cache, [](HostTensor const&, Index row) { return row % 2 == 0; }),
              "of a sequence that rests, before and after a call that gives tokens to others");
}
inline std::string decoding_depends(AnyPolicy const& policy, Case const& x, Calls const& calls) {
  Decoded const plain = policy.decode(x, calls, {});
  std::string why =
      first_of([&] { return plain.trespass; }, [&] { return told(first_not_finite(plain.outputs, true), "in decoded outputs"); });
  auto const compare = [&](Surroundings const& around, char const* circumstances) {
    if (!why.empty()) return;
    Decoded const other = policy.decode(x, calls, around);
    why = first_of([&] { return other.trespass; }, [&] { return told(first_difference(plain.outputs, other.outputs), circumstances); });
  };
  compare({}, "in two equal runs of decoding");
  compare({.threads = 2}, "decoded on 1 and on 2 threads");
  compare({.threads = 3}, "decoded on 1 and on 3 threads");
  compare({.unwritten = 3, .fence = 3}, "decoded among NaN and among 3, in the cache and in results before they are written");
  compare({.spaced = true}, "decoded without and with gaps between the rows");
  compare({.leftovers = Leftovers::nan}, "decoded in fresh scratch memory, and in what a run on NaN left");
  return why;
}
inline std::string decoding_keeps_memory(AnyPolicy const& policy, Case const& x, Calls const& calls) {
  Decoded const decoded = policy.decode(x, calls, {});
  if (decoded.kept != 0) return sentence(decoded.kept, " bytes of the pool are kept after decoding, besides the cache");
  if (decoded.later_allocations != 0) return sentence(decoded.later_allocations, " allocations by steps after the first, equal one");
  return {};
}

}  // namespace detail

// Decoding keeps the laws of bits, does not read elements of the cache before they are written, does not change the cache of sequences
// without new tokens, and allocates no memory from step to step.
inline Verdict decodes_cleanly(AnyPolicy const& policy) {
  if (!policy.decodes()) return {"decodes cleanly", true, "it does not decode"};
  Sequences const s = detail::all_lengths();
  Case const x = detail::sample_to_decode(policy, policy.kinds().front(), s, 1);
  Calls const calls = detail::in_pieces(s, 2).calls;
  Case const steps = detail::sample_to_decode(policy, policy.kinds().front(), Sequences::equal(2, 40), 1);
  return detail::verdict(
      "decodes cleanly",
      detail::first_of([&] { return detail::decoding_sees_too_much(policy, x, calls); },
                       [&] { return detail::decoding_differs_alone(policy, x, calls); },
                       [&] { return detail::decoding_disturbs(policy, x); }, [&] { return detail::decoding_depends(policy, x, calls); },
                       [&] {
                         return detail::decoding_keeps_memory(
                             policy, steps, detail::calls_of(steps.sequences, [](Index, Index, Index) { return Index{1}; }));
                       }));
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::testing
#endif
