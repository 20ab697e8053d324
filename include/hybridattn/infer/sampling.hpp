// The next token from one row of logits: the likeliest token, or a random one of the likelier tokens. Host memory only.
#ifndef HYBRIDATTN_INFER_SAMPLING_HPP
#define HYBRIDATTN_INFER_SAMPLING_HPP

#include <hybridattn/core/check.hpp>
#include <hybridattn/core/random.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

namespace hybridattn::inline HYBRIDATTN_ABI {

struct SamplingOptions {
  double temperature = 1;   // logits are divided by it; 0: always the likeliest token
  Index top_k = 0;          // only the top_k likeliest tokens; 0: all
  double top_p = 1;         // then only the fewest likeliest tokens whose probabilities sum to top_p; 1: all

  // Throws Error on numbers that are not allowed.
  void check_numbers() const {
    check(std::isfinite(temperature) && temperature >= 0, "sampling: temperature ", temperature,
          " is not allowed; it must be >= 0, and 0 takes the likeliest token");
    check(top_k >= 0, "sampling: top_k ", top_k, " is not allowed; it must be >= 0, and 0 keeps all tokens");
    check(top_p > 0 && top_p <= 1, "sampling: top_p ", top_p, " is not allowed; it must be in (0, 1]");
  }
};

// Draws tokens. The same seed and the same logits give the same tokens. Of equally likely tokens the smaller number comes first.
class Sampler {
 public:
  explicit Sampler(SamplingOptions options = {}, Seed seed = {}) : options_(options), random_(seed, "sampling") {
    options_.check_numbers();
  }

  // Draws a token from logits [V] of one position. -inf excludes a token. Throws Error on NaN, on +inf, and where all logits are -inf.
  template <class T> std::int32_t operator()(std::span<T const> logits) {
    fill_candidates(logits);
    if (options_.temperature == 0) return best_->token;
    keep_top_k();
    double total = weigh();
    if (options_.top_p < 1) total = keep_top_p(total);
    return draw(total);
  }

 private:
  struct Candidate {
    double logit, weight;
    std::int32_t token;
  };
  static bool likelier(Candidate const& a, Candidate const& b) { return a.logit > b.logit || (a.logit == b.logit && a.token < b.token); }

  template <class T> void fill_candidates(std::span<T const> logits) {
    check(!logits.empty(), "sampling: there are no logits");
    candidates_.clear();
    for (std::size_t i = 0; i < logits.size(); ++i) {
      double const logit = static_cast<double>(logits[i]);
      check(logit < std::numeric_limits<double>::infinity(), "sampling: the logit of token ", i, " is ", logit);
      if (std::isfinite(logit)) candidates_.push_back({logit, 0, static_cast<std::int32_t>(i)});
    }
    check(!candidates_.empty(), "sampling: all ", logits.size(), " logits are -inf");
    best_ = std::min_element(candidates_.begin(), candidates_.end(), likelier);
    largest_ = best_->logit;
  }
  void keep_top_k() {
    if (options_.top_k == 0 || options_.top_k >= std::ssize(candidates_)) return;
    std::nth_element(candidates_.begin(), candidates_.begin() + options_.top_k, candidates_.end(), likelier);
    candidates_.resize(static_cast<std::size_t>(options_.top_k));
    std::sort(candidates_.begin(), candidates_.end(), [](auto const& a, auto const& b) { return a.token < b.token; });
  }
  double weigh() {
    double total = 0;
    for (Candidate& c : candidates_) total += c.weight = std::exp((c.logit - largest_) / options_.temperature);
    return total;
  }
  // Returns the weight of the tokens that it keeps.
  double keep_top_p(double total) {
    std::sort(candidates_.begin(), candidates_.end(), likelier);
    double kept = 0;
    std::size_t count = 0;
    while (count < candidates_.size() && kept < options_.top_p * total) kept += candidates_[count++].weight;
    candidates_.resize(count);
    return kept;
  }
  std::int32_t draw(double total) {
    double left = random_.uniform() * total;
    for (Candidate const& c : candidates_)
      if ((left -= c.weight) < 0) return c.token;
    return candidates_.back().token;   // only rounding leaves `left` at 0 or above
  }

  SamplingOptions options_;
  Random random_;
  std::vector<Candidate> candidates_;
  std::vector<Candidate>::iterator best_;
  double largest_ = 0;
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
