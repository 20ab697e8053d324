// AdamW over all tensors of a model, with clipping by their global norm.
#ifndef HYBRIDATTN_TRAIN_ADAMW_HPP
#define HYBRIDATTN_TRAIN_ADAMW_HPP

#include <hybridattn/core/allowed.hpp>
#include <hybridattn/ops/adamw/adamw.hpp>
#include <hybridattn/ops/arithmetic/arithmetic.hpp>
#include <hybridattn/tensor/in_float.hpp>

#include <cmath>
#include <functional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

namespace hybridattn::inline HYBRIDATTN_ABI {

struct AdamWOptions {
  double learning_rate = 1e-3, beta_1 = 0.9, beta_2 = 0.95, epsilon = 1e-8, weight_decay = 0.1;
  double max_norm = 1;           // of all gradients together; larger gradients are scaled down to this norm; 0: no clipping
  bool bias_correction = true;
  // Which tensors decay, by path (`blocks.0.attention.prepare.a_log`). An empty function: all tensors decay.
  std::function<bool(std::string_view path)> decays = {};

  // Throws on numbers that no optimizer can have.
  void check_numbers() const {
    check_not_negative("AdamW", "learning_rate", learning_rate);
    check_below_one("AdamW", "beta_1", beta_1);
    check_below_one("AdamW", "beta_2", beta_2);
    check_positive("AdamW", "epsilon", epsilon);
    check_not_negative("AdamW", "weight_decay", weight_decay);
    check_not_negative("AdamW", "max_norm", max_norm);
  }
};

namespace detail {
// The sentence about a bad step, without the step's number.
inline std::string sentence(BadStep const& bad, std::string const& tensor) {
  auto const loss = [](char const* name, double value) {
    std::ostringstream text;
    text << "the " << name << " is " << (std::isnan(value) ? std::abs(value) : value);
    return text.str();
  };
  auto const update = [&](char const* what) { return "the update of " + tensor + " would make " + what + " a NaN or an infinity"; };
  switch (bad.fault) {
    case StepFault::none:
      break;
    case StepFault::loss:
      return loss("loss", bad.loss.mean());
    case StepFault::auxiliary_loss:
      return loss("auxiliary loss", bad.auxiliary_loss);
    case StepFault::gradient:
      return "the gradient of " + tensor + " holds a NaN or an infinity";
    case StepFault::tensor_norm:
      return "the gradient of " + tensor + " is too large for its norm";
    case StepFault::global_norm:
      return "the gradients together are too large for their norm";
    case StepFault::mean:
      return update("the mean of the gradients");
    case StepFault::square:
      return update("the mean of the squared gradients");
    case StepFault::parameter:
      return update("the parameter itself");
  }
  return {};
}
// What an error adds about a bad step after later steps have started.
inline std::string seen_late(BadStep const& bad, std::string const& tensor) {
  if (bad.fault == StepFault::loss || bad.fault == StepFault::auxiliary_loss)
    return tensor.empty() ? "" : "; the first gradient that is not finite is that of " + tensor;
  std::ostringstream text;
  if (bad.loss.count > 0) text << "; its loss was " << bad.loss.mean();
  return text.str();
}

// What an optimizer knows of the tensors of a model, in their order. Compiled once for a scalar, for all models.
template <class T> struct StepTensors {
  std::vector<std::string> names;
  std::vector<bool> decays;
  std::vector<std::int32_t> roles;        // in the current step
  std::vector<AdamWTensor<T>> tensors;

  [[gnu::noinline, gnu::cold]] void name(Path const& path, AdamWOptions const& options) {
    names.push_back(path.str());
    decays.push_back(!options.decays || options.decays(names.back()));
  }
  // A tensor without a gradient has p = nullptr.
  [[gnu::noinline]] void add(AdamWTensor<T> tensor, std::vector<bool> const& detached) {
    std::size_t const i = roles.size();
    tensor.first_block = i == 0 ? 0 : tensors.back().first_block + tensors.back().blocks();
    tensors.push_back(tensor);
    roles.push_back((tensor.p != nullptr ? StepRole::has_gradient : 0) | (decays[i] ? StepRole::decays : 0) |
                    (!detached.empty() && detached[i] ? StepRole::detached : 0));
  }
};

}  // namespace detail

// Moments are groups of the same structure as the parameters. A step does not change a tensor that has no gradient.
//
// Parameters in bf16 are too coarse for small steps. For them the optimizer keeps masters in float, which start from the parameters. A
// step moves the masters, and the parameters become the masters rounded: other values that a caller wrote to the parameters are lost.
// Gradients and moments are in float.
//
// A step counts and decides on the machine (StepNumbers), and the host reads the result later. The order of the calls of a step:
//   open(backend, rate)  ->  losses of the batches are added to numbers()  ->  start(backend, params, gradients)  ->  read(backend)
template <class Params> class AdamW {
 public:
  using Scalar = wide_t<scalar_of<Params>>;
  using Backend = backend_of<Params>;
  using Masters = widened<Params>;   // Params, except in bf16
  static constexpr bool has_masters = !std::is_same_v<Masters, Params>;

  // The running means of the gradients and of their squares. Together with the options and the counts of steps they are all that an
  // optimizer keeps.
  struct Moments {
    Masters mean, square;
  };

  AdamW(Backend& backend, Params const& like, AdamWOptions options = {}) : options_(std::move(options)), numbers_{backend, {1}} {
    options_.check_numbers();
    On<Fill, Backend>::forward(backend, StepNumbers{}, out(numbers_));
    typename detail::OwnedGroup<Params>::Sizes sizes;
    zip(
        [&](Path const& path, auto const& p, auto& size) {
          size = p.shape();
          list_.name(path, options_);
        },
        like, sizes);
    for (Masters* moments : {&moments_.mean, &moments_.square}) {
      View<Scalar, 1> all;
      *moments = allocate_together<Scalar>(backend, sizes, &all);
      On<Fill, Backend>::forward(backend, Scalar(0), all);
    }
    if constexpr (has_masters) masters_ = widen(backend, like);
    auto const tensors = static_cast<Index>(list_.names.size());
    squares_ = {backend, {tensors}};
    rates_ = {backend, {tensors}};
    found_ = {backend, {tensors}};
    roles_ = {backend, {tensors}};
    updates_ = zeros<Index>(backend, Shape<1>{tensors});
    tensors_ = {backend, {tensors}};
    reserve(list_.roles, tensors, "the roles of tensors in a step");
    reserve(list_.tensors, tensors, "the tensors of a step");
  }

  // Begins a step with learning_rate * rate.
  void open(Backend& backend, double rate) {
    set_rate(backend, rate);
    ++started_;   // the numbers of the step before are lost
    On<OpenStep, Backend>::forward(backend, out(numbers_));
  }
  // The factor for the learning rate of the steps that follow.
  void set_rate(Backend& backend, double rate) {
    check_not_negative("AdamW", "rate", rate);
    if (rate != rate_) On<Fill, Backend>::forward(backend, rate, View<double, 1>{&out(numbers_).data->rate, {1}});
    rate_ = rate;
  }
  // Counts a step that the machine replayed. A machine can record a step, from open to start, and replay it: on other tokens after
  // refill(), at another rate after set_rate(). Record the second step or a later one, because the first step uploads tables. Record
  // it at the rate of the step before: a step at a new rate writes this rate, and every replay would write it again. start() counts the
  // recorded step. If recording does not run it, the first replay is that step, and only later replays are counted here.
  void replayed() {
    ++started_;
    ++unread_;
  }
  View<StepNumbers, 1> numbers() { return out(numbers_); }
  // One step down the gradients. A loss or a gradient that is not finite, or that would make a parameter or a moment infinite or NaN,
  // stops the step: then nothing moves and nothing counts. Waits for nothing. `detached` has one mark for each tensor, in the order of
  // the parameters, or none at all. Detached tensors have a loss of their own, and are clipped by a norm of their own. Neither loss
  // then changes what the other one trains.
  void start(Backend& backend, Params& params, Masters const& gradients, std::vector<bool> const& detached = {}) {
    check(detached.empty() || detached.size() == decays().size(), "AdamW: ", detached.size(), " marks, but ", decays().size(),
          " tensors; detached has one mark for each, or none");
    if constexpr (has_masters) list_tensors(masters_, gradients, detached);
    else list_tensors(params, gradients, detached);
    bring_up_to_date(backend, list_.roles, known_roles_, roles_);
    bring_up_to_date(backend, list_.tensors, known_tensors_, tensors_);
    On<AdamWSquares, Backend>::forward(backend, in(tensors_), out(squares_));
    On<DecideStep, Backend>::forward(backend, decide_options(), in(roles_), in(squares_), in(updates_), out(rates_), out(numbers_));
    On<AdamWCheck, Backend>::forward(backend, in(tensors_), in(rates_), in(numbers_), out(found_));
    On<CloseStep, Backend>::forward(backend, in(roles_), in(found_), out(updates_), out(numbers_));
    On<AdamWStep, Backend>::forward(backend, in(tensors_), in(rates_), in(numbers_));
    round_masters(backend, params);
    ++unread_;
  }
  // Waits for the last step and returns its numbers. Throws Error where a step since the last read was bad. The error names the first
  // bad step, its fault, its tensor and its loss. If only one step was started since the last read, origin() adds where the fault began.
  template <class Origin> StepNumbers read(Backend& backend, Origin origin) {
    StepNumbers numbers;
    backend.download(&numbers, in(numbers_).data, sizeof numbers);
    bool const is_only = std::exchange(unread_, 0) == 1;
    steps_ = numbers.steps;
    if (BadStep const& bad = numbers.first_bad; bad.step != 0) {
      On<Fill, Backend>::forward(backend, BadStep{}, View<BadStep, 1>{&out(numbers_).data->first_bad, {1}});
      bool const of_loss = bad.fault == StepFault::loss || bad.fault == StepFault::auxiliary_loss;
      auto const tensor = bad.tensor < 0 ? std::string{} : list_.names[static_cast<std::size_t>(bad.tensor)];
      fail("step ", bad.step, ": ", detail::sentence(bad, tensor), !is_only ? detail::seen_late(bad, tensor) : of_loss ? origin() : "");
    }
    return numbers;
  }
  StepNumbers read(Backend& backend) {
    return read(backend, [] { return std::string{}; });
  }
  // open, start and read in one call. Returns the global norm of the gradients before clipping.
  double step(Backend& backend, Params& params, Masters const& gradients, double rate = 1, std::vector<bool> const& detached = {}) {
    open(backend, rate);
    start(backend, params, gradients, detached);
    return read(backend).gradient_norm;
  }
  // The same with gradients in bf16, as backward returns them.
  double step(Backend& backend, Params& params, Params const& gradients, double rate = 1, std::vector<bool> const& detached = {})
      requires has_masters {
    return step(backend, params, widen(backend, gradients), rate, detached);
  }

  // Steps that changed parameters, as of the last read, and all steps that were started.
  Index steps() const { return steps_; }
  Index started() const { return started_; }
  // Steps since the last read.
  Index unread() const { return unread_; }
  // One for each tensor, in the order of the parameters: the steps that had a gradient for it.
  std::vector<Index> updates(Backend& backend) const { return download(backend, updates_); }
  // Continues after this number of steps. Steps that nobody read are forgotten.
  void restore(Backend& backend, Index steps, std::vector<Index> const& updates) {
    StepNumbers numbers;
    numbers.rate = rate_;
    numbers.steps = steps;
    On<Fill, Backend>::forward(backend, numbers, out(numbers_));
    upload(backend, updates, updates_);
    steps_ = steps;
    unread_ = 0;
    ++started_;
  }
  AdamWOptions const& options() const { return options_; }
  // One for each tensor, in the order of the parameters: whether it decays.
  std::vector<bool> const& decays() const { return list_.decays; }
  // The masters in float of parameters in bf16. Who changes them calls round_masters().
  Masters const& masters() const requires has_masters { return masters_; }
  void round_masters(Backend& backend, Params& params) const {
    if constexpr (has_masters) convert(backend, masters_, params);
  }
  Moments const& moments() const { return moments_; }
  Moments& moments() { return moments_; }

 private:
  // The addresses and roles of the current step. They rarely change.
  void list_tensors(Masters& params, Masters const& gradients, std::vector<bool> const& detached) {
    list_.roles.clear();
    list_.tensors.clear();
    zip(
        [&](Path const&, auto& p, auto const& g, auto& mean, auto& square) {
          if (g) list_.add({out(p).data, in(g).data, out(mean).data, out(square).data, in(g).count()}, detached);
          else list_.add({}, detached);
        },
        params, gradients, moments_.mean, moments_.square);
  }
  template <class T> static void bring_up_to_date(Backend& backend, std::vector<T> const& next, std::vector<T>& known,
                                                  Tensor<T, 1, Backend>& there) {
    if (next == known) return;
    upload(backend, next, there);
    known = next;
  }
  DecideStep::Options decide_options() const {
    return {.learning_rate = options_.learning_rate,
            .beta_1 = options_.beta_1,
            .beta_2 = options_.beta_2,
            .epsilon = options_.epsilon,
            .weight_decay = options_.weight_decay,
            .max_norm = options_.max_norm,
            .bias_correction = options_.bias_correction};
  }

  AdamWOptions options_;
  Moments moments_;
  std::conditional_t<has_masters, Masters, Absent> masters_;
  detail::StepTensors<Scalar> list_;
  // The last uploaded values.
  std::vector<std::int32_t> known_roles_;
  std::vector<AdamWTensor<Scalar>> known_tensors_;
  double rate_ = 1;
  Index steps_ = 0, started_ = 0, unread_ = 0;
  Tensor<StepNumbers, 1, Backend> numbers_;   // [1]
  // For each tensor:
  Tensor<std::int32_t, 1, Backend> roles_;
  Tensor<AdamWTensor<Scalar>, 1, Backend> tensors_;
  Tensor<double, 1, Backend> squares_;
  Tensor<Index, 1, Backend> updates_;
  Tensor<AdamWRates, 1, Backend> rates_;
  Tensor<StepFault, 1, Backend> found_;
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
