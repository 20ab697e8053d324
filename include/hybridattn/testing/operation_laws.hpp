// The law that judges an operation's values, and the comparison of two backends.
#ifndef HYBRIDATTN_TESTING_OPERATION_LAWS_HPP
#define HYBRIDATTN_TESTING_OPERATION_LAWS_HPP

#include <hybridattn/testing/budget_laws.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI::testing {

namespace detail {

// Moves every number by up to a rounding of a scalar with this eps.
inline void move_by_rounding(HostGroup& group, double eps, Random& random) {
  for (HostTensor& tensor : group)
    if (!tensor.whole)
      for (double& x : tensor.values) x *= 1 + eps * random.uniform(-1, 1);
}
// How far each tensor of a group may be off.
using Budgets = std::vector<double>;
inline void widen(Budgets& budgets, HostGroup const& moved, HostGroup const& truth) {
  budgets.resize(truth.size());
  for (std::size_t i = 0; i < truth.size(); ++i) budgets[i] = std::max(budgets[i], 8 * max_difference(moved[i], truth[i]).size);
}

// The result in double, and how far an operation may be off that computes in a scalar with this eps. A sum of rounded terms is the exact
// sum of terms that moved by as much. So the budget of a tensor is 8 times the most that it moves by when every input moves by up to a
// rounding, and 4 roundings of its largest element to the scalar that stores it.
struct Truth {
  Result result;
  Budgets outputs, gradients;

  Truth(Subject const& subject, Case const& x, HostGroup const& choices, double eps) : result(subject.loops(x, choices, true)) {
    for (std::uint64_t seed : {1u, 2u, 3u}) {
      Random random{Seed{seed}, "roundings"};
      Case moved = x;
      move_by_rounding(moved.inputs, eps, random);
      move_by_rounding(moved.d_outputs, eps, random);
      Result const other = subject.loops(moved, choices, true);
      widen(outputs, other.outputs, result.outputs);
      widen(gradients, other.gradients, result.gradients);
    }
  }
};
// Names the first tensor that differs by more than `times` the budget, or returns "". Whole numbers must be equal.
inline std::string apart(HostGroup const& x, HostGroup const& y, HostGroup const& truth, Budgets const& budgets, double times) {
  for (std::size_t i = 0; i < x.size(); ++i) {
    double const allowed = x[i].whole ? 0 : times * (budgets[i] + 4 * std::max(x[i].eps, y[i].eps) * max_abs(truth[i]));
    Difference const worst = max_difference(x[i], y[i]);
    auto const at = static_cast<std::size_t>(worst.element);
    if (!(worst.size <= allowed) || !std::isfinite(allowed))   // a budget that is infinite judges nothing
      return sentence(x[i].name, x[i].place(worst.element), " is ", number(x[i].values[at]), " and ", number(y[i].values[at]),
                      ", apart by ", worst.size, " where ", allowed, " is allowed");
  }
  return {};
}
inline std::string apart(Result const& x, Result const& y, Truth const& truth, double times) {
  return first_of([&] { return apart(x.outputs, y.outputs, truth.result.outputs, truth.outputs, times); },
                  [&] { return apart(x.gradients, y.gradients, truth.result.gradients, truth.gradients, times); });
}

}  // namespace detail

// Two backends or two scalars agree. Each may be off by the budget, so they differ by twice the budget at most. The loops of `a`, with the
// choices of `a`, are the truth.
inline Verdict agree_within_budget(Subject const& a, Subject const& b) {
  Case const x = a.sample(a.kinds().front(), a.batch(), 1, true);
  Result const of_a = a.run(x, {});
  detail::Truth const truth{a, x, detail::choices_in(of_a.saved), std::max(a.eps_of_sums(), b.eps_of_sums())};
  return detail::verdict("agree within budget",
                         detail::told(detail::apart(of_a, b.run(x, {}), truth, 2), "on the first backend and on the second"));
}

// An operation's results are those of Cpu in double, within the budget of its scalar.
inline Verdict agrees_with_cpu(Subject const& operation) {
  std::string why;
  for (Sequences const& s : {operation.batch(), Sequences::equal(1, 1), Sequences::equal(1, 33)}) {
    Case const x = operation.sample(operation.kinds().front(), s, 1, true);
    detail::Truth const truth{operation, x, {}, operation.eps_of_sums()};
    if (why.empty()) why = detail::told(detail::apart(operation.run(x, {}), truth.result, truth, 1), "here and on Cpu in double");
  }
  return detail::verdict("agrees with Cpu", why);
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::testing
#endif
