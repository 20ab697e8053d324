// One step of training: each line consumes what the line above produced.
#ifndef HYBRIDATTN_TRAIN_TRAIN_STEP_HPP
#define HYBRIDATTN_TRAIN_TRAIN_STEP_HPP

#include <hybridattn/nn/language_model.hpp>
#include <hybridattn/train/adamw.hpp>
#include <hybridattn/train/data.hpp>

#include <cmath>
#include <span>
#include <string>

namespace hybridattn::inline HYBRIDATTN_ABI {

// Windows of a data source (train/data.hpp) on a machine.
template <class B> TokenBatch<B> make_batch(B& backend, Batch const& host) {
  return make_batch(backend, Sequences::equal(host.batch, host.seq_len), host.tokens, host.targets);
}

// What a step did.
struct StepResult {
  LossSum loss;               // over the batch's counted tokens, before the step
  double auxiliary_loss = 0;  // load balancing and policies, weighted
  double policy_loss = 0;     // the policies' part of it: of DSA's indexers, in stages that train them
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
    if constexpr (std::is_floating_point_v<T>)
      if (found.empty() && !On<AllFinite, B>::forward(backend, flat(in(tensor)))) found = path.str();
  }
};
template <class B, class Group> [[gnu::cold]] std::string first_not_finite(B& backend, Group const& group) {
  FindNotFinite<B> find{backend};
  zip(find, group);
  return find.found;
}
// Where a loss that is not finite comes from, found by another forward.
template <class B, class Model, class Params>
[[gnu::cold]] std::string origin(B& backend, Model const& model, Params const& params, std::span<TokenBatch<B> const> batches) {
  std::string const first = "; the first tensor that is not finite is the ";
  if (auto const path = first_not_finite(backend, params); !path.empty()) return first + "parameter " + path;
  for (auto const& batch : batches)
    if (auto const path = first_not_finite(backend, model.forward(backend, params, batch)); !path.empty())
      return first + "activation " + path;
  return "; parameters and activations are finite";
}

}  // namespace detail

// Gradients of the mean loss over all counted tokens of several batches, one after the other in memory.
template <class B, class Model, class Params>
StepResult accumulated_step(B& backend, Model const& model, Params& params, AdamW<Params>& optimizer,
                            std::span<TokenBatch<B> const> batches, StepOptions options = {}) {
  check(!batches.empty(), "a training step needs at least one batch");
  check_not_negative("StepOptions", "rate", options.rate);
  if (options.stage != model.stage()) return accumulated_step(backend, model.at(options.stage), params, optimizer, batches, options);
  Index count = 0;
  for (auto const& batch : batches) count += batch.counted;
  double const scale = count == 0 ? 0 : 1 / static_cast<double>(count), share = 1 / static_cast<double>(batches.size());

  StepResult result;
  Params gradients;
  for (std::size_t i = 0; i < batches.size(); ++i) {
    auto saved = model.forward(backend, params, batches[i]);
    auto more = model.backward(backend, params, batches[i], std::move(saved), scale, share);
    result.loss += more.loss;
    result.auxiliary_loss += share * more.auxiliary_loss;
    result.policy_loss += share * more.policy_loss;
    if (i == 0) gradients = std::move(more.params);
    else
      zip([&](Path const&, auto& sum, auto const& g) { On<Add, B>::forward(backend, flat(in(g)), flat(out(sum))); }, gradients,
          more.params);
  }
  auto const check_loss = [&](char const* name, double loss) {
    if (!std::isfinite(loss))
      fail("step ", optimizer.steps() + 1, ": the ", name, " is ", std::isnan(loss) ? std::abs(loss) : loss,
           detail::origin(backend, model, params, batches));
  };
  check_loss("loss", result.loss.mean());
  check_loss("auxiliary loss", result.auxiliary_loss);
  try {
    auto const apart = options.stage == Stage::sparse ? model.detached() : std::vector<bool>{};
    result.gradient_norm = optimizer.step(backend, params, gradients, options.rate, apart);
  } catch (Error const& error) {
    fail("step ", optimizer.steps() + 1, ": ", error.what());
  }
  return result;
}
// The same for one batch. Throws, before it touches a parameter or a moment, when a loss or a gradient is not finite, or would
// make a parameter or a moment so, naming step and tensor.
template <class B, class Model, class Params>
StepResult train_step(B& backend, Model const& model, Params& params, AdamW<Params>& optimizer, TokenBatch<B> const& batch,
                      StepOptions options = {}) {
  return accumulated_step(backend, model, params, optimizer, std::span<TokenBatch<B> const>(&batch, 1), options);
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
