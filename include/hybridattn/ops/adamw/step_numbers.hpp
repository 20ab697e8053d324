// The numbers of a training step, in one block of the machine's memory. Operations add to them and the optimizer reads them there. The
// host waits for a step only when it reads these numbers.
#ifndef HYBRIDATTN_OPS_ADAMW_STEP_NUMBERS_HPP
#define HYBRIDATTN_OPS_ADAMW_STEP_NUMBERS_HPP

#include <hybridattn/core/losses.hpp>
#include <hybridattn/tensor/tensor.hpp>

#include <cmath>

namespace hybridattn::inline HYBRIDATTN_ABI {

// Why a step changed no parameter.
enum class StepFault : std::int32_t {
  none,
  loss,             // the loss is not finite
  auxiliary_loss,   // the auxiliary losses are not finite
  gradient,         // the gradient of a tensor holds a NaN or an infinity
  tensor_norm,      // the gradient of a tensor is finite, its norm is not
  global_norm,      // the norms of all gradients are finite, their common norm is not
  mean,             // the mean of the gradients would become a NaN or an infinity
  square,           // the mean of the squared gradients would
  parameter         // a parameter would
};
struct BadStep {
  Index step = 0;   // counted from 1, as if it had changed parameters; 0: no step was bad
  LossSum loss;
  double auxiliary_loss = 0;
  StepFault fault = StepFault::none;
  std::int32_t tensor = -1;   // which, in the order of the parameters
};
struct StepNumbers {
  // Of the current step, or of the last one.
  Index counted = 0;   // tokens that have a target
  double scale = 0;    // of their losses in the mean: 1 / counted, or 0
  LossSum loss;
  double auxiliary_loss = 0, policy_loss = 0;   // weighted; the second is a part of the first
  double gradient_norm = 0;                     // before clipping
  StepFault fault = StepFault::none;
  std::int32_t tensor = -1;
  // Kept from step to step.
  double rate = 1;        // factor for the learning rate
  Index steps = 0;        // that changed parameters
  BadStep first_bad;      // since the host last read
};

// How a tensor of the parameters takes part in a step, as bits of a number.
struct StepRole {
  static constexpr std::int32_t has_gradient = 1, decays = 2, detached = 4;   // detached: clipped by a norm of their own
};

// The factors of one tensor's update by AdamW.
struct AdamWRates {
  double learning_rate, beta_1, beta_2, epsilon, weight_decay;
  double correction_1, correction_2;   // c1, c2 = 1 - beta^step, or 1
  double gradient_scale;               // g is multiplied by it first: clipping by the global norm
};

// In all of them numbers [1], and a list has an element for each tensor of the parameters, in order.
//   forward(backend, numbers)                  a step begins: nothing is lost yet
struct OpenStep {};
//   forward(backend, share, losses, numbers)   adds the share of a batch's auxiliary losses, and all of its loss; losses [1]
struct AddBatchLosses {};
// The norm of the gradients, and from it the factors of each tensor's update; or the fault that keeps the step from moving.
//   forward(backend, options, roles, squares, updates, rates, numbers)
//     squares: sums of squares, NaN where an element is not finite; updates: steps that had a gradient for the tensor
struct DecideStep {
  struct Options {
    double learning_rate, beta_1, beta_2, epsilon, weight_decay, max_norm;
    bool bias_correction;
  };
  // The factors of a tensor's update number `step`, counted from 1. `rate` is a factor for the learning rate, `norm` that of the gradients.
  static HYBRIDATTN_HD AdamWRates rates(Options const& o, std::int32_t role, double step, double rate, double norm) {
    double const clip = o.max_norm / (norm + 1e-6);
    return {.learning_rate = o.learning_rate * rate,
            .beta_1 = o.beta_1,
            .beta_2 = o.beta_2,
            .epsilon = o.epsilon,
            .weight_decay = role & StepRole::decays ? o.weight_decay : 0,
            .correction_1 = o.bias_correction ? 1 - std::pow(o.beta_1, step) : 1,
            .correction_2 = o.bias_correction ? 1 - std::pow(o.beta_2, step) : 1,
            .gradient_scale = o.max_norm != 0 && clip < 1 ? clip : 1};
  }
};
// A step counts when it has no fault and AdamWCheck found none. The first bad step since the last read is kept.
//   forward(backend, roles, found, updates, numbers)
struct CloseStep {};

}  // namespace hybridattn::inline HYBRIDATTN_ABI

#endif
