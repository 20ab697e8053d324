// Learning rates over the steps of a run.
#ifndef HYBRIDATTN_TRAIN_SCHEDULE_HPP
#define HYBRIDATTN_TRAIN_SCHEDULE_HPP

#include <hybridattn/core/check.hpp>
#include <hybridattn/core/view.hpp>

#include <algorithm>
#include <cmath>
#include <numbers>

namespace hybridattn::inline HYBRIDATTN_ABI {

// A factor for the learning rate of step 0, 1, 2, ...: constant, or linear from 0 over warmup_steps and then half a cosine
// down to min_rate at total_steps, where it stays.
struct Schedule {
  Index warmup_steps = 0;
  Index total_steps = 0;    // 0: constant after the warm-up
  double min_rate = 0;      // share of the learning rate that is left at the end

  double operator()(Index step) const {
    check(total_steps == 0 || total_steps > warmup_steps, "Schedule: total_steps ", total_steps, " must exceed warmup_steps ",
          warmup_steps);
    if (step < warmup_steps) return static_cast<double>(step) / static_cast<double>(warmup_steps);
    if (total_steps == 0) return 1;
    double const progress = std::min(1.0, static_cast<double>(step - warmup_steps) / static_cast<double>(total_steps - warmup_steps));
    return min_rate + (1 - min_rate) * 0.5 * (1 + std::cos(std::numbers::pi * progress));
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
