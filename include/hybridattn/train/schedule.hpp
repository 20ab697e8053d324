// Learning rates over the steps of a run.
#ifndef HYBRIDATTN_TRAIN_SCHEDULE_HPP
#define HYBRIDATTN_TRAIN_SCHEDULE_HPP

#include <hybridattn/core/allowed.hpp>

#include <algorithm>
#include <cmath>
#include <numbers>

namespace hybridattn::inline HYBRIDATTN_ABI {

// The factor for the learning rate of step 0, 1, 2, ... It is linear from 0 over warmup_steps, then half a cosine from 1 down to
// min_rate at total_steps, where it stays. Where the warm-up takes all steps or more, the rate stays 1 after it.
struct Schedule {
  Index warmup_steps = 0;
  Index total_steps = 0;    // 0: constant after the warm-up
  double min_rate = 0;      // share of the learning rate that is left at the end, in [0, 1]

  // Throws on numbers that no schedule can have, and on a step below 0.
  double operator()(Index step) const {
    check_at_least("Schedule", "warmup_steps", warmup_steps, 0);
    check_at_least("Schedule", "total_steps", total_steps, 0, ", where 0 stands for no end");
    check_share("Schedule", "min_rate", min_rate);
    check_at_least("Schedule", "step", step, 0);
    if (step < warmup_steps) return static_cast<double>(step) / static_cast<double>(warmup_steps);
    if (total_steps <= warmup_steps) return 1;
    double const progress = std::min(1.0, static_cast<double>(step - warmup_steps) / static_cast<double>(total_steps - warmup_steps));
    return min_rate + (1 - min_rate) * 0.5 * (1 + std::cos(std::numbers::pi * progress));
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
