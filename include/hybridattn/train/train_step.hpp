// One step of training.
#ifndef HYBRIDATTN_TRAIN_TRAIN_STEP_HPP
#define HYBRIDATTN_TRAIN_TRAIN_STEP_HPP

#include <hybridattn/nn/language_model.hpp>
#include <hybridattn/train/adamw.hpp>
#include <hybridattn/train/data.hpp>

#include <span>
#include <string>

namespace hybridattn::inline HYBRIDATTN_ABI {

// Windows of a data source (train/data.hpp) on a machine.
template <class B> TokenBatch<B> make_batch(B& backend, Batch const& host) {
  return make_batch(backend, Sequences::equal(host.batch, host.seq_len), host.tokens, host.targets);
}

// The numbers of a step.
struct StepResult {
  LossSum loss;               // over the batch's counted tokens, before the step
  double auxiliary_loss = 0;  // load balancing and policies, weighted
  double policy_loss = 0;     // the part of the policies, such as DSA's indexers, in stages that train it
  double gradient_norm = 0;   // before clipping
};

struct StepOptions {
  double rate = 1;                      // factor for the learning rate
  Stage stage = Stage::language_model;  // what is trained
};

namespace detail {

// Remembers the path of the first tensor that holds a NaN or an infinity.
template <class B> struct FindNotFinite {
  B& backend;
  std::string found = {};

  template <class T, int Rank> [[gnu::cold]] void operator()(Path const& path, Tensor<T, Rank, B> const& tensor) {
    if constexpr (std::is_floating_point_v<wide_t<T>>)
      if (found.empty() && !On<AllFinite, B>::forward(backend, flat(in(tensor)))) found = path.str();
  }
};
template <class B, class Group> [[gnu::cold]] std::string first_not_finite(B& backend, Group const& group) {
  FindNotFinite<B> find{backend};
  zip(find, group);
  return find.found;
}
// Finds the first tensor that is not finite, by another forward.
template <class B, class Model, class Params>
[[gnu::cold]] std::string origin(B& backend, Model const& model, Params const& params, std::span<TokenBatch<B> const> batches) {
  std::string const first = "; the first tensor that is not finite is the ";
  if (auto const path = first_not_finite(backend, params); !path.empty()) return first + "parameter " + path;
  for (auto const& batch : batches)
    if (auto const path = first_not_finite(backend, model.forward(backend, params, batch)); !path.empty())
      return first + "activation " + path;
  return "; parameters and activations are finite";
}

// The sum of the gradients of several batches, in float where the gradients are in bf16.
template <class Params> struct GradientSum {
  using Scalar = scalar_of<Params>;
  widened<Params> gradients;
  View<wide_t<Scalar>, 1> all;
  bool begun = false;

  template <class B, class Gradients> void add(B& backend, Gradients more) {
    if constexpr (std::is_same_v<widened<Params>, Params>) {
      if (begun) {
        On<Add, B>::forward(backend, View<Scalar const, 1>(more.all), all);
      } else {
        gradients = std::move(more.params);
        all = more.all;
      }
    } else if (begun) {
      zip(
          [&](Path const&, auto const& x, auto& y) {
            if (x) On<Add, B>::forward(backend, flat(in(x)), flat(out(y)));
          },
          more.params, gradients);
    } else {
      gradients = widen(backend, more.params);
    }
    begun = true;
  }
};

}  // namespace detail

// A step that was started.
template <class B, class Params> class PendingStep {
 public:
  PendingStep(B& backend, AdamW<Params>& optimizer) : backend_(backend), optimizer_(optimizer), number_(optimizer.started()) {}

  // Waits for the step. Throws Error where this step, or another one since the last read, was bad. A bad step changes nothing and is
  // not counted. The error names the first bad step, its fault and its tensor. Only the step that was started last can be read.
  StepResult read() const {
    return read([] { return std::string{}; });
  }
  template <class Origin> StepResult read(Origin origin) const {
    check(optimizer_.started() == number_, "the step is not the last one any more: only the numbers of the last one are kept");
    StepNumbers const numbers = optimizer_.read(backend_, origin);
    check(numbers.fault == StepFault::none, "step ", numbers.steps + 1, ": it was bad, as an earlier read of it said");
    return {numbers.loss, numbers.auxiliary_loss, numbers.policy_loss, numbers.gradient_norm};
  }

 private:
  B& backend_;
  AdamW<Params>& optimizer_;
  Index number_;
};

// The function between backward and update. Where several processes train one model, theirs adds up the gradients, which are in one
// block, and the losses among the numbers. Each process has the gradient of the mean over its own numbers(0).counted tokens. The mean
// over the tokens of all processes weights this gradient by that count. This default is for one process: it exchanges nothing.
struct NoExchange {
  template <class B, class Params> void operator()(B&, Params&, View<StepNumbers, 1>) const {}
};

// Starts one step down the gradients of the mean loss over all counted tokens of several batches. Only one batch has activations in
// memory at a time. It waits for nothing: a loop that prints every tenth step reads every tenth step. It calls
// exchange(backend, gradients, numbers) once.
template <class B, class Model, class Params, class Exchange = NoExchange>
PendingStep<B, Params> start_step(B& backend, Model const& model, Params& params, AdamW<Params>& optimizer,
                                  std::span<TokenBatch<B> const> batches, StepOptions options = {}, Exchange exchange = {}) {
  check(!batches.empty(), "a training step needs at least one batch");
  check_not_negative("StepOptions", "rate", options.rate);
  if (options.stage != model.stage()) return start_step(backend, model.at(options.stage), params, optimizer, batches, options, exchange);
  double const share = 1 / static_cast<double>(batches.size());

  optimizer.open(backend, options.rate);
  StepNumbers* const numbers = optimizer.numbers().data;   // on the machine
  View<double, 1> const scale{&numbers->scale, {1}};
  for (auto const& batch : batches) On<CountTargets, B>::forward(backend, in(batch.targets), View<Index, 1>{&numbers->counted, {1}}, scale);
  detail::GradientSum<Params> sum;
  for (std::size_t i = 0; i < batches.size(); ++i) {
    auto saved = model.forward(backend, params, batches[i]);
    auto more = model.backward(backend, params, batches[i], std::move(saved), View<double const, 1>(scale), share);
    On<AddBatchLosses, B>::forward(backend, share, in(more.losses), optimizer.numbers());
    sum.add(backend, std::move(more));
  }
  exchange(backend, sum.gradients, optimizer.numbers());
  optimizer.start(backend, params, sum.gradients, options.stage == Stage::sparse ? model.detached() : std::vector<bool>{});
  return {backend, optimizer};
}
template <class B, class Model, class Params>
PendingStep<B, Params> start_step(B& backend, Model const& model, Params& params, AdamW<Params>& optimizer, TokenBatch<B> const& batch,
                                  StepOptions options = {}) {
  return start_step(backend, model, params, optimizer, std::span<TokenBatch<B> const>(&batch, 1), options);
}

// Starts the same step and waits for it. It first reads steps that nobody read. Throws Error, with step and tensor, when a loss or a
// gradient is not finite, or would make a parameter or a moment infinite or NaN. Parameters and moments then stay as they were.
template <class B, class Model, class Params>
StepResult accumulated_step(B& backend, Model const& model, Params& params, AdamW<Params>& optimizer,
                            std::span<TokenBatch<B> const> batches, StepOptions options = {}) {
  if (optimizer.unread() > 0) optimizer.read(backend);   // throws for a bad one before this step moves anything
  auto const step = start_step(backend, model, params, optimizer, batches, options);
  return step.read([&] { return detail::origin(backend, model.at(options.stage), params, batches); });
}
template <class B, class Model, class Params>
StepResult train_step(B& backend, Model const& model, Params& params, AdamW<Params>& optimizer, TokenBatch<B> const& batch,
                      StepOptions options = {}) {
  return accumulated_step(backend, model, params, optimizer, std::span<TokenBatch<B> const>(&batch, 1), options);
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
