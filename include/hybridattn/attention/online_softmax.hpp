// Softmax over scores that come in parts (Milakov and Gimelshein, arXiv 1805.02867).
#ifndef HYBRIDATTN_ATTENTION_ONLINE_SOFTMAX_HPP
#define HYBRIDATTN_ATTENTION_ONLINE_SOFTMAX_HPP

#include <hybridattn/core/config.hpp>

#include <cmath>

namespace hybridattn::inline HYBRIDATTN_ABI::attention {

// total = sum_j e^(s_j - reference) over the scores of a part. Any reference gives the same softmax. One near the largest score keeps
// every e^(s_j - reference) in range. V is a number, or a vector of numbers for as many queries.
template <class V> struct OnlineSoftmax {
  V reference, total;

  // Changes the reference. Returns the factor e^(old - next) for all sums that were weighted by e^(s_j - old).
  // exponential(x, y) is e^(x - y).
  template <class Exponential> V rebase(V next, Exponential exponential) {
    V const factor = exponential(reference, next);
    reference = next;
    total *= factor;
    return factor;
  }
  // Adds the scores of another part. A part without scores has reference -inf and total 0. Returns one factor for each part's weighted sums.
  struct Factors {
    V own, other;
  };
  template <class Exponential> Factors merge(OnlineSoftmax other, Exponential exponential) {
    V const next = reference > other.reference ? reference : other.reference;
    auto const factor = [&](OnlineSoftmax& part) { return part.reference == next ? V(1) : part.rebase(next, exponential); };
    Factors const factors{factor(*this), factor(other)};  // of two parts without scores, -inf - -inf would be NaN
    total += other.total;
    return factors;
  }
  V lse() const { return reference + std::log(total); }  // log sum_j e^s_j
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::attention
#endif
