// The law of bad values: NaN, infinity, and numbers at the ends of the scalar's range. A training run that diverges has all of them.
#ifndef HYBRIDATTN_TESTING_BAD_VALUE_LAWS_HPP
#define HYBRIDATTN_TESTING_BAD_VALUE_LAWS_HPP

#include <hybridattn/testing/decoding_laws.hpp>
#include <hybridattn/testing/watchdog.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI::testing {
namespace detail {

struct BadValue {
  char const* name;
  double value;
};
inline std::vector<BadValue> bad_values(AnyPolicy const& policy) {
  constexpr double infinity = std::numeric_limits<double>::infinity();
  double const huge = policy.in_double() ? 1e308 : 1e38, tiny = policy.in_double() ? 0x1p-1074 : 0x1p-149;
  return {{"NaN", not_a_number},
          {"a NaN of all bits", std::bit_cast<double>(~std::uint64_t{0})},
          {"infinity", infinity},
          {"-infinity", -infinity},
          {"a number near the largest", huge},
          {"a number near the lowest", -huge},
          {"the smallest number", tiny}};
}

enum class Kind { finite, nan, infinity, minus_infinity };
inline Kind kind_of(double x) {
  return std::isfinite(x) ? Kind::finite : x != x ? Kind::nan : x > 0 ? Kind::infinity : Kind::minus_infinity;
}

// The first element that is finite in one group and not in the other. If kinds count, also the first of another Kind.
inline std::string first_other_kind(HostGroup const& kernel, HostGroup const& loops, bool kinds_count) {
  for (std::size_t i = 0; i < kernel.size(); ++i) {
    HostTensor const &x = kernel[i], &y = loops[i];
    for (Index e = 0; e < std::ssize(x.values) && !x.whole; ++e) {
      double const a = x.values[static_cast<std::size_t>(e)], b = y.values[static_cast<std::size_t>(e)];
      if (kinds_count ? kind_of(a) != kind_of(b) : std::isfinite(a) != std::isfinite(b))
        return sentence(x.name, x.place(e), " is ", number(a), "; the loops make it ", number(b));
    }
  }
  return {};
}
// Finds the first element that a NaN changes in the kernel's results while, in the loops, it changes nothing in the same row of a head.
// A gradient that is judged head by head may change by roundings, because it may be a difference of sums that held the NaN.
struct Effect {
  HostGroup const &without, &with;
};
inline std::string first_touched(Effect const& kernel, Effect const& loops, AnyPolicy const& policy) {
  for (std::size_t i = 0; i < kernel.with.size(); ++i) {
    Index const size = kernel.with[i].shape.back();
    double const rounding = policy.by_head(kernel.with[i].name) ? 128 * kernel.with[i].eps * max_abs(kernel.without[i]) : 0;
    auto const differ = [&](Effect const& effect, Index e, Index count) {
      double const *const a = effect.without[i].values.data() + e, *const b = effect.with[i].values.data() + e;
      return !std::equal(a, a + count, b, [&](double x, double y) { return same_bits(x, y) || std::abs(x - y) <= rounding; });
    };
    for (Index e = 0; e < std::ssize(kernel.with[i].values); ++e)
      if (differ(kernel, e, 1) && !differ(loops, e / size * size, size))
        return sentence(kernel.with[i].name, kernel.with[i].place(e), " changes from ",
                        number(kernel.without[i].values[static_cast<std::size_t>(e)]), " to ",
                        number(kernel.with[i].values[static_cast<std::size_t>(e)]));
  }
  return {};
}

// A policy and a batch of good values, in which the law spoils one tensor at a time.
class BadValues {
 public:
  BadValues(AnyPolicy const& policy, Sequences const& s)
      : policy_(policy), x_(policy.sample(policy.kinds().front(), s, 1, true)),
        decoded_(forward_only(sample_to_decode(policy, policy.kinds().front(), s, 1))), sound_(policy.run(x_, {})),
        sound_loops_(policy.loops(x_, choices_in(sound_.saved), false)) {}

  // Puts `bad` into one element or one row of each input and each output's gradient, one tensor after the other.
  std::string spoil(BadValue const& bad, std::size_t turn) const {
    std::string why;
    auto const each = [&](Case& x, HostGroup& group, bool decodes) {
      for (std::size_t i = 0; i < group.size() && why.empty(); ++i) {
        if (group[i].values.empty() || (decodes && group[i].rows != RowsOf::tokens)) continue;
        HostGroup const before = group;
        Index const row = row_to_spoil(group[i], turn++);
        if (turn % 3 == 0) std::fill_n(group[i].row(row), group[i].row_size(), bad.value);
        else group[i].row(row)[static_cast<Index>(turn) % group[i].row_size()] = bad.value;
        bool const judged = judges(group[i], bad.value);
        why = told(decodes ? wrong_decoding(x, judged) : wrong(x, bad.value, judged),
                   sentence(bad.name, " in row ", row, " of ", &group == &x.inputs ? "" : "the gradient of ", group[i].name));
        group = before;
      }
    };
    Case x = x_, decoded = decoded_;
    each(x, x.inputs, false);
    each(x, x.d_outputs, false);
    if (policy_.decodes()) each(decoded, decoded.inputs, true);
    return why;
  }
  // Multiplies all inputs with token rows by `times`, except detached ones, because the auxiliary loss sums those in its own way.
  std::string enlarge(double times) const {
    Case x = x_;
    for (HostTensor& tensor : x.inputs)
      if (tensor.rows == RowsOf::tokens && !policy_.detached(tensor.name))
        for (double& value : tensor.values) value *= times;
    return told(wrong(x, times, kinds_count()), sentence("all inputs times ", times));
  }

 private:
  // A token of the last sequence, at an edge of a block or between edges.
  Index row_to_spoil(HostTensor const& tensor, std::size_t turn) const {
    Index const last = tensor.row_count() - 1, length = x_.sequences.longest();
    if (tensor.rows != RowsOf::tokens) return last;
    Index const positions[] = {0, length / 2, 31, 32, length - 1, 3, 16};
    return last + 1 - length + positions[turn % std::size(positions)];
  }
  // kinds_count() says whether results must be NaN or infinite exactly as those of the loops. Otherwise a kernel may overflow where the
  // loops do not. A finite bad value is judged only if kinds count and the main loss reaches the spoiled tensor.
  bool kinds_count() const { return policy_.overflows_like_loops(); }
  bool judges(HostTensor const& spoiled, double bad) const {
    return !std::isfinite(bad) || (kinds_count() && !policy_.detached(spoiled.name) && spoiled.name != "auxiliary_loss");
  }

  std::string wrong(Case const& x, double bad, bool judged) const {
    Result const result = policy_.run(x, {});
    if (!judged) return {};
    Result const loops = policy_.loops(x, choices_in(result.saved), false);
    bool const same_choices = first_difference(choices_in(sound_.saved), choices_in(result.saved)).empty();
    auto const other_kind = [&](HostGroup Result::* part) { return first_other_kind(result.*part, loops.*part, kinds_count()); };
    auto const touched = [&](HostGroup Result::* part) {
      if (bad == bad || !same_choices) return std::string();
      return first_touched({sound_.*part, result.*part}, {sound_loops_.*part, loops.*part}, policy_);
    };
    return first_of([&] { return told(other_kind(&Result::outputs), "an output"); },
                    [&] { return told(other_kind(&Result::saved), "saved"); },
                    [&] { return told(other_kind(&Result::gradients), "a gradient"); }, [&] { return touched(&Result::outputs); },
                    [&] { return touched(&Result::gradients); });
  }
  std::string wrong_decoding(Case const& x, bool judged) const {
    HostGroup const outputs = policy_.decode(x, in_pieces(x.sequences, 2).calls, {}).outputs;
    if (!judged) return {};
    HostGroup loops = policy_.loops(x, choices_in(policy_.run(x, {}).saved), false).outputs;
    for (std::size_t i = 0; i < loops.size(); ++i)
      if (outputs[i].values.empty()) loops[i].values.clear();
    return told(first_other_kind(outputs, loops, kinds_count()), "decoded");
  }

  AnyPolicy const& policy_;
  Case x_, decoded_;
  Result sound_, sound_loops_;
};

}  // namespace detail

// A run ends, whatever the inputs hold. With a NaN or an infinity in an input, a result is finite exactly where the reference loops, in the
// policy's scalar and on the kernel's choices, make it finite. Results that do not read a NaN keep every bit, but a gradient that is judged
// head by head may differ by 128 roundings. With overflows_like_loops, results are NaN or infinite, with the sign, where those of the loops
// are, on large finite inputs too.
inline Verdict bears_bad_values(AnyPolicy const& policy) {
  Watchdog watchdog{sentence(policy.name(), ", on bad values,")};
  std::string why;
  std::size_t turn = 0;
  detail::BadValues const long_batch{policy, packed({5, 0, 70})}, short_batch{policy, packed({2, 0, 37})};
  for (detail::BadValue const& bad : detail::bad_values(policy))
    if (why.empty()) why = (std::exchange(turn, turn + 1) == 0 ? long_batch : short_batch).spoil(bad, turn);
  for (double const times : {3e4, 1e10, 1e18})
    if (why.empty()) why = long_batch.enlarge(times);
  if (!watchdog.stop()) why = "a run does not end";
  return detail::verdict("bears bad values", why);
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::testing
#endif
