// Losses of tokens, as sums.
#ifndef HYBRIDATTN_CORE_LOSSES_HPP
#define HYBRIDATTN_CORE_LOSSES_HPP

#include <hybridattn/core/view.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI {

// Sums over the counted tokens of one or several batches. A token with a target is counted.
struct LossSum {
  double loss = 0;     // nats
  Index count = 0, correct = 0;   // correct: the target has the largest logit (the first of equal ones)

  double mean() const { return count == 0 ? 0 : loss / static_cast<double>(count); }
  HYBRIDATTN_HD LossSum& operator+=(LossSum const& other) {
    loss += other.loss;
    count += other.count;
    correct += other.correct;
    return *this;
  }
};

// All losses of a batch. The auxiliary losses are weighted.
struct BatchLosses {
  LossSum loss;         // over the counted tokens
  double balance = 0;   // load balancing
  double policy = 0;    // of the policies

  HYBRIDATTN_HD double auxiliary() const { return policy + balance; }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
