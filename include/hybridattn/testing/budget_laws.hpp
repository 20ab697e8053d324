// Laws that hold within a stated budget of rounding, and the law about memory. Each returns a verdict on one policy or operation at
// one size.
#ifndef HYBRIDATTN_TESTING_BUDGET_LAWS_HPP
#define HYBRIDATTN_TESTING_BUDGET_LAWS_HPP

#include <hybridattn/testing/any_policy.hpp>
#include <hybridattn/testing/bitwise_laws.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI::testing {

namespace detail {

// Results of the reference loops with the kernel's choices. `truth` is in double. `naive` is in the subject's scalar; its error sets the
// budget.
struct Judges {
  Result truth, naive;
};
inline HostGroup choices_in(HostGroup const& saved) {
  HostGroup choices;
  std::copy_if(saved.begin(), saved.end(), std::back_inserter(choices), [](HostTensor const& tensor) { return tensor.whole; });
  return choices;
}
inline Judges judges_of(Subject const& subject, Case const& x, Result const& result) {
  HostGroup const choices = choices_in(result.saved);
  Judges judges{subject.loops(x, choices, true), {}};
  if (!subject.in_double()) judges.naive = subject.loops(x, choices, false);
  return judges;
}

// The largest error allowed. In double it is a share of the largest element. In other scalars it is twice the error of the loops in that
// scalar, and 4 roundings of the largest element to the tensor's own scalar, because the loops may be right by luck. A largest element below 1e-3 counts as 1e-3,
// because a result that is zero on paper may be rounding.
inline double budget(Subject const& subject, HostTensor const& truth, HostTensor const* naive) {
  double const largest = std::max(max_abs(truth), 1e-3);
  return naive == nullptr ? subject.tolerance() * largest : 2 * max_difference(*naive, truth).size + 4 * naive->eps * largest;
}
// The loops do not write tensors that are not part of the equations. Such tensors are not judged.
inline bool is_unwritten(HostTensor const& truth) {
  return std::all_of(truth.values.begin(), truth.values.end(), [](double x) { return x != x; });
}
// Names the first tensor of x that differs from `expected` by more than `times` the budget, or returns "".
inline std::string beyond_budget(Subject const& subject, HostGroup const& x, HostGroup const& expected, HostGroup const& truth,
                                 HostGroup const& naive, double times) {
  for (std::size_t i = 0; i < x.size(); ++i) {
    if (x[i].whole || is_unwritten(truth[i])) continue;
    double const allowed = times * budget(subject, truth[i], naive.empty() ? nullptr : &naive[i]);
    Difference const worst = max_difference(x[i], expected[i]);
    auto const at = static_cast<std::size_t>(worst.element);
    if (!(worst.size <= allowed))
      return sentence(x[i].name, x[i].place(worst.element), " is ", number(x[i].values[at]), " instead of ", number(expected[i].values[at]),
                      ", off by ", worst.size, " where ", allowed, " is allowed");
  }
  return {};
}

struct Values {
  std::string kind;
  Sequences sequences;
  bool carried = true;
};
// Column h of a tensor [N, H].
inline HostTensor head_of(HostTensor const& x, Index h) {
  HostTensor head = x;
  head.values.clear();
  for (Index n = 0; n < x.row_count(); ++n) head.values.push_back(x.row(n)[h]);
  return head;
}
// The same budget without the 1e-3. An error below the smallest normal number of the scalar is always allowed.
inline double budget_of_head(Subject const& subject, HostTensor const& truth, HostTensor const* naive) {
  double const least = subject.in_double() ? std::numeric_limits<double>::min() : static_cast<double>(std::numeric_limits<float>::min());
  double const largest = max_abs(truth);
  return least + (naive == nullptr ? subject.tolerance() * largest : 2 * max_difference(*naive, truth).size + 4 * naive->eps * largest);
}
// Names the first head, of gradients that are judged head by head, that differs from the truth by more than `times` its budget.
inline std::string beyond_budget_of_head(Subject const& subject, HostGroup const& x, HostGroup const& truth, HostGroup const& naive,
                                         double times) {
  for (std::size_t i = 0; i < x.size(); ++i)
    for (Index h = 0; subject.by_head(x[i].name) && h < x[i].row_size(); ++h) {
      HostTensor const result = head_of(x[i], h), true_head = head_of(truth[i], h);
      HostTensor const by_loops = naive.empty() ? HostTensor{} : head_of(naive[i], h);
      double const allowed = times * budget_of_head(subject, true_head, naive.empty() ? nullptr : &by_loops);
      Difference const worst = max_difference(result, true_head);
      auto const at = static_cast<std::size_t>(worst.element);
      if (!(worst.size <= allowed))
        return sentence("head ", h, " of ", x[i].name, " is ", number(result.values[at]), " instead of ", number(true_head.values[at]),
                        " at token ", worst.element, ", off by ", worst.size, " where ", allowed, " is allowed in this head");
    }
  return {};
}
// Judges outputs, saved tensors and gradients by `times` the budget. Returns the first error, or "".
inline std::string wrong_values(Subject const& subject, Values const& of, std::uint64_t seed, double times) {
  Case const x = subject.sample(of.kind, of.sequences, seed, of.carried);
  Result const result = subject.run(x, {});
  Judges const judges = judges_of(subject, x, result);
  auto const say = [&](std::string const& why, char const* name) {
    return told(why,
                sentence(name, ", kind ", of.kind, ", longest sequence ", of.sequences.longest(), of.carried ? "" : ", without states"));
  };
  auto const group = [&](char const* name, HostGroup Result::* part) {
    return say(beyond_budget(subject, result.*part, judges.truth.*part, judges.truth.*part, judges.naive.*part, times), name);
  };
  auto const heads = [&] {
    return say(beyond_budget_of_head(subject, result.gradients, judges.truth.gradients, judges.naive.gradients, times), "gradient");
  };
  return first_of([&] { return group("output", &Result::outputs); }, [&] { return group("saved", &Result::saved); },
                  [&] { return group("gradient", &Result::gradients); }, heads);
}
// Where large scores meet, one rounding is the whole error, and the error of the loops is small by luck in 2 of 100 batches. If a result in
// another scalar than double is beyond the budget, but not beyond 4 times the budget, another sample is judged.
inline std::string wrong_values(Subject const& subject, Values const& of) {
  std::string why = wrong_values(subject, of, 1, 1);
  for (std::uint64_t seed : {2u, 3u})
    if (!why.empty() && !subject.in_double() && wrong_values(subject, of, seed - 1, 4).empty()) why = wrong_values(subject, of, seed, 1);
  return why;
}

}  // namespace detail

// Outputs and gradients are those of the reference. Gradients of gates are judged in every head by itself.
inline Verdict true_values(Subject const& subject) {
  std::vector<detail::Values> all;
  for (std::string const& kind : subject.kinds()) all.push_back({kind, subject.batch()});
  all.push_back({subject.kinds().front(), subject.batch(), false});
  for (Index length : {1, 2, 63, 64, 65, 130}) all.push_back({subject.kinds().front(), Sequences::equal(1, length)});
  std::string why;
  for (detail::Values const& values : all)
    if (why.empty()) why = detail::wrong_values(subject, values);
  return detail::verdict("true values", why);
}

// The kernel chooses the keys with the largest exact scores, as far as rounding can tell.
inline Verdict right_choices(AnyPolicy const& policy) {
  std::string why;
  for (std::string const& kind : policy.kinds())
    for (std::uint64_t seed : {1u, 2u, 3u}) {
      if (!why.empty()) continue;
      Case const x = policy.sample(kind, policy.batch(), seed, true);
      HostGroup const choices = detail::choices_in(policy.run(x, {}).saved);
      if (choices.empty()) return {"right choices", true, "nothing is chosen"};
      why = detail::told(policy.wrong_choice(x, choices), "kind " + kind);
    }
  return detail::verdict("right choices", why);
}

namespace detail {

inline double inner(HostGroup const& a, HostGroup const& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i)
    for (std::size_t e = 0; e < a[i].values.size(); ++e) sum += a[i].values[e] * b[i].values[e];
  return sum;
}
// The length of the elementwise product. A sum of this product with random signs has about this size.
inline double product_length(HostGroup const& a, HostGroup const& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i)
    for (std::size_t e = 0; e < a[i].values.size(); ++e) sum += std::pow(a[i].values[e] * b[i].values[e], 2);
  return std::sqrt(sum);
}
// The upstream gradients that reach `input`. The auxiliary loss alone reaches a detached input, and it does not reach the others.
inline HostGroup upstream_for(Subject const& subject, Case const& x, std::size_t input) {
  HostGroup upstream = x.d_outputs;
  for (HostTensor& tensor : upstream)
    if ((tensor.name == "auxiliary_loss") != subject.detached(x.inputs[input].name)) set_each(tensor, [] { return 0.0; });
  return upstream;
}
inline bool any_gradient(Result const& result) {
  return std::any_of(result.gradients.begin(), result.gradients.end(), [](HostTensor const& x) { return !x.values.empty(); });
}
// The outputs after one input has moved by a step. If the input is detached, the choices stay those of `result`.
inline HostGroup outputs_at(Subject const& subject, Case x, Result const& result, std::size_t input, HostTensor const& direction,
                            double step) {
  for (std::size_t e = 0; e < direction.values.size(); ++e) x.inputs[input].values[e] += step * direction.values[e];
  x.d_outputs.clear();
  bool const choices_fixed = subject.detached(direction.name);
  return (choices_fixed ? subject.loops(x, choices_in(result.saved), true) : subject.run(x, {})).outputs;
}
inline HostGroup difference(HostGroup x, HostGroup const& y) {
  for (std::size_t i = 0; i < x.size(); ++i)
    for (std::size_t e = 0; e < x[i].values.size(); ++e) x[i].values[e] -= y[i].values[e];
  return x;
}
// The central difference at a step h has two errors, its truncation and the rounding of each output. A second step shows their size. The
// step 2h adds three times the truncation where the function is smooth, and as much where it has a kink at x, as a rectified score has.
// This change may be small by chance, so a slope that seems wrong is judged by the changes at three more steps too.
inline std::string wrong_slope(Subject const& subject, Case const& x, Result const& result, std::size_t input, std::uint64_t seed) {
  constexpr double step = 0x1p-16;
  Random random{Seed{seed}, "direction"};
  HostTensor direction = x.inputs[input];
  set_normal(direction, random);
  HostTensor const& gradient = result.gradients[input];
  HostGroup const upstream = upstream_for(subject, x, input);
  auto const slope_at = [&](double h) {
    auto const outputs = [&](double by) { return outputs_at(subject, x, result, input, direction, by); };
    return inner(difference(outputs(h), outputs(-h)), upstream) / (2 * h);
  };
  double const along = inner({gradient}, {direction}), slope = slope_at(step),
               rounding = 8 * subject.eps() / step * product_length(result.outputs, upstream) + 1e-14;
  double allowed = 0;
  for (double const factor : {2.0, 4.0, 0.5, 0.25}) {
    allowed = std::max(allowed, 2 * std::abs(slope_at(factor * step) - slope) + rounding);
    if (std::abs(along - slope) <= allowed) return {};
  }
  return sentence("the gradient of ", gradient.name, " is ", number(along), " along a direction in which the loss rises by ", number(slope),
                  "; ", allowed, " is allowed");
}

}  // namespace detail

// In double, gradients are the slopes of a loss, in random directions of each input. Where detached inputs decide choices, the choices stay
// fixed, and the slope is that of the loops, which the law of true values compares with the kernel.
inline Verdict finite_differences(Subject const& subject) {
  if (!subject.in_double()) return {"finite differences", true, "taken in double"};
  Case const x = subject.sample(subject.kinds().front(), subject.small_batch(), 4, true);
  Result const result = subject.run(x, {});
  if (!detail::any_gradient(result)) return {"finite differences", true, "there is no backward"};
  std::string why;
  for (std::size_t input = 0; input < result.gradients.size(); ++input)
    for (std::uint64_t seed : {1u, 2u, 3u})
      if (why.empty() && !result.gradients[input].values.empty()) why = detail::wrong_slope(subject, x, result, input, seed);
  return detail::verdict("finite differences", why);
}

// Backward is linear in all d_outputs together: B(2a - 3b) = 2 B(a) - 3 B(b), and B(0) is exactly 0. a and b are multiples of 1/64, in
// bf16 of 1/4, so that the sum on the left has no rounding.
inline Verdict linear(Subject const& subject) {
  Case a = subject.sample(subject.kinds().front(), subject.batch(), 1, true), b = a;
  b.d_outputs = subject.sample(subject.kinds().front(), subject.batch(), 2, true).d_outputs;
  Case sum = a;
  for (std::size_t i = 0; i < a.d_outputs.size(); ++i) {
    double const parts = a.d_outputs[i].is_bf16() ? 4 : 64;
    for (std::size_t e = 0; e < a.d_outputs[i].values.size(); ++e) {
      double &x = a.d_outputs[i].values[e], &y = b.d_outputs[i].values[e];
      x = std::round(parts * x) / parts;
      y = std::round(parts * y) / parts;
      sum.d_outputs[i].values[e] = 2 * x - 3 * y;
    }
  }
  Result const first = subject.run(a, {});
  if (!detail::any_gradient(first)) return {"linear", true, "there is no backward"};
  HostGroup const at_a = first.gradients, at_b = subject.run(b, {}).gradients, at_sum = subject.run(sum, {}).gradients;
  for (std::size_t i = 0; i < at_sum.size(); ++i) {
    HostTensor expected = at_a[i];
    for (std::size_t e = 0; e < expected.values.size(); ++e) expected.values[e] = 2 * at_a[i].values[e] - 3 * at_b[i].values[e];
    // Gradients in bf16 are computed in float and rounded once.
    double const rounding = at_a[i].is_bf16() ? 2 * at_a[i].eps : 1024 * at_a[i].eps;
    double const allowed = rounding * (2 * max_abs(at_a[i]) + 3 * max_abs(at_b[i]));
    Difference const worst = max_difference(at_sum[i], expected);
    auto const at = static_cast<std::size_t>(worst.element);
    if (!(worst.size <= allowed))
      return {"linear", false,
              sentence("the gradient of ", expected.name, expected.place(worst.element), " is ", number(at_sum[i].values[at]),
                       " for 2a - 3b and ", number(expected.values[at]), " by its parts, off by ", worst.size, " where ", allowed,
                       " is allowed")};
  }
  for (HostTensor& tensor : a.d_outputs) set_each(tensor, [] { return 0.0; });
  for (HostTensor const& gradient : subject.run(a, {}).gradients)
    for (double const d : gradient.values)
      if (d != 0)
        return {"linear", false, sentence("a gradient of ", gradient.name, " is ", number(d), " where all gradients of outputs are 0")};
  return {"linear", true, ""};
}

namespace detail {

// Copies each final_x to the initial_x of the next part. For gradients it copies d_initial_x to the d_final_x of the part before.
inline void pass_states(HostGroup const& from, std::string_view from_prefix, HostGroup& to, std::string_view to_prefix) {
  for (HostTensor const& tensor : from)
    if (tensor.name.starts_with(from_prefix))
      if (HostTensor* const state = to.find(std::string(to_prefix) + tensor.name.substr(from_prefix.size()))) state->values = tensor.values;
}
// Cuts each sequence into its first half, one token, and the rest.
inline std::vector<Case> three_parts(Case const& x) {
  std::vector<Part> parts[3];
  for (Index i = 0; i < x.sequences.count(); ++i) {
    Index const length = x.sequences[static_cast<std::size_t>(i)].length, half = length / 2, next = std::min(half + 1, length);
    parts[0].push_back({i, 0, half});
    parts[1].push_back({i, half, next});
    parts[2].push_back({i, next, length});
  }
  return {cut(x, parts[0]), cut(x, parts[1]), cut(x, parts[2])};
}
// Joins the results of the parts to those of the whole: token rows in the order of the whole, states of part `states`, and sums of tensors
// without rows, because these are sums over tokens.
inline HostGroup join(HostGroup whole, std::vector<Case> const& parts, std::vector<HostGroup> const& groups, std::size_t states) {
  for (std::size_t i = 0; i < whole.size(); ++i) {
    if (whole[i].rows == RowsOf::sequences) whole[i].values = groups[states][i].values;
    if (whole[i].rows == RowsOf::other)
      for (std::size_t e = 0; e < whole[i].values.size(); ++e)
        whole[i].values[e] = groups[0][i].values[e] + groups[1][i].values[e] + groups[2][i].values[e];
    if (whole[i].rows != RowsOf::tokens) continue;
    Index const size = whole[i].row_size();
    auto to = whole[i].values.begin();
    for (std::size_t sequence = 0; sequence < parts[0].sequences.size(); ++sequence)
      for (std::size_t p = 0; p < parts.size(); ++p) {
        Sequence const own = parts[p].sequences[sequence];
        to = std::copy_n(groups[p][i].values.begin() + own.start * size, own.length * size, to);
      }
  }
  return whole;
}

}  // namespace detail

// Parts of a sequence, each starting from the final state of the part before, give the outputs, final state and gradients of the whole.
inline Verdict agrees_in_parts(Subject const& subject) {
  if (!subject.has_states()) return {"agrees in parts", true, "no state is carried"};
  Case const x = subject.sample(subject.kinds().front(), subject.batch(), 5, true);
  Result const whole = subject.run(x, {});
  std::vector<Case> parts = detail::three_parts(x);
  std::vector<HostGroup> outputs(3), gradients(3);
  for (std::size_t p = 0; p < 3; ++p) {
    if (p > 0) detail::pass_states(outputs[p - 1], "final_", parts[p].inputs, "initial_");
    outputs[p] = subject.run(parts[p], {}).outputs;
  }
  for (std::size_t p = 3; p-- > 0;) {
    if (p < 2) detail::pass_states(gradients[p + 1], "initial_", parts[p].d_outputs, "final_");
    gradients[p] = subject.run(parts[p], {}).gradients;
  }
  detail::Judges const judges = detail::judges_of(subject, x, whole);
  auto const compare = [&](HostGroup Result::* part, std::vector<HostGroup> const& groups, std::size_t states) {
    return detail::beyond_budget(subject, detail::join(whole.*part, parts, groups, states), whole.*part, judges.truth.*part,
                                 judges.naive.*part, 2);
  };
  return detail::verdict("agrees in parts", detail::told(detail::first_of([&] { return compare(&Result::outputs, outputs, 2); },
                                                                          [&] { return compare(&Result::gradients, gradients, 0); }),
                                                         "in three parts and whole"));
}

// Saved tensors take the announced number of bytes. A run keeps no other memory, and a second equal run allocates none. Neither saved
// tensors nor scratch memory grow faster than the number of tokens.
inline Verdict memory_as_announced(Subject const& subject) {
  std::vector<Footprint> prints;
  for (Index length : {128, 256, 512}) prints.push_back(subject.footprint(Sequences::equal(1, length)));
  for (Footprint const& print : prints) {
    if (print.announced_saved != print.taken_saved)
      return {"memory as announced", false, sentence(print.announced_saved, " bytes announced for Saved, ", print.taken_saved, " taken")};
    if (print.kept != 0) return {"memory as announced", false, sentence(print.kept, " bytes of the pool are kept after backward")};
    if (print.later_allocations != 0)
      return {"memory as announced", false, sentence(print.later_allocations, " allocations by a second, equal run")};
  }
  auto const growth = [&](char const* what, std::size_t Footprint::* bytes) -> std::string {
    auto const at = [&](std::size_t i) { return static_cast<double>(prints[i].*bytes); };
    if (at(2) - at(1) <= 2 * (at(1) - at(0))) return {};
    return sentence(what, " takes ", at(0), ", ", at(1), ", ", at(2), " bytes at 128, 256, 512 tokens: more than linear");
  };
  return detail::verdict(
      "memory as announced",
      detail::first_of([&] { return subject.saved_is_linear() ? growth("Saved", &Footprint::announced_saved) : std::string(); },
                       [&] { return growth("scratch memory", &Footprint::scratch); }));
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::testing
#endif
