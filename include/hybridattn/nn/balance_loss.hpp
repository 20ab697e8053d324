// Load balancing over mixture layers: coefficient * E sum_e f_e P_e, with f_e the share of tokens that chose expert e
// (sum f = top_k) and P_e its mean probability.
//   per layer: the sum of the layers' losses         pooled: f and P over the tokens of all layers, then one product
//   d loss / d p_ne = coefficient E f_e / tokens
#ifndef HYBRIDATTN_NN_BALANCE_LOSS_HPP
#define HYBRIDATTN_NN_BALANCE_LOSS_HPP

#include <hybridattn/nn/feed_forward.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI {

class BalanceLoss {
 public:
  explicit BalanceLoss(FeedForwardConfig const& c) : c_(c), pooled_(static_cast<std::size_t>(c.num_experts)) {}

  // First every layer is counted, in order; then each is told its part.
  template <class B, class T> void count(B& backend, FeedForward::Saved<Owned<T, B>> const& saved) {
    if (!saved.probabilities) return;
    auto const layer = use(backend, saved);
    for (std::size_t e = 0; e < layer.size(); ++e) {
      pooled_[e].chosen += layer[e].chosen;
      pooled_[e].probability += layer[e].probability;
    }
    Index const tokens = saved.probabilities.shape()[0];
    pooled_tokens_ += tokens;
    sum_of_layers_ += loss(layer, tokens);
  }
  template <class T, class B> void write(B& backend, double scale, FeedForward::Saved<Owned<T, B>>& saved) const {
    if (!saved.probabilities) return;
    bool const pool = c_.balance == Balance::pooled;
    auto const layer = pool ? pooled_ : use(backend, saved);
    double const tokens = static_cast<double>(pool ? pooled_tokens_ : saved.probabilities.shape()[0]);
    std::vector<T> d_probability;
    for (Use const& expert : layer)
      d_probability.push_back(
          static_cast<T>(scale * c_.balance_coefficient * static_cast<double>(c_.num_experts) * expert.chosen / tokens / tokens));
    upload(backend, d_probability, saved.d_probability);
  }
  double value() const { return c_.balance == Balance::pooled ? loss(pooled_, pooled_tokens_) : sum_of_layers_; }

 private:
  struct Use {
    double chosen = 0, probability = 0;   // sums over tokens
  };

  template <class B, class T> std::vector<Use> use(B& backend, FeedForward::Saved<Owned<T, B>> const& saved) const {
    auto const offsets = download(backend, saved.offsets);
    auto const probabilities = download(backend, saved.probabilities);
    std::vector<Use> result(pooled_.size());
    for (std::size_t e = 0; e < result.size(); ++e) result[e].chosen = offsets[e + 1] - offsets[e];
    for (std::size_t i = 0; i < probabilities.size(); ++i) result[i % result.size()].probability += static_cast<double>(probabilities[i]);
    return result;
  }
  double loss(std::vector<Use> const& layer, Index count) const {
    double const tokens = static_cast<double>(count);
    double sum = 0;
    for (Use const& expert : layer) sum += expert.chosen / tokens * (expert.probability / tokens);
    return count == 0 ? 0 : c_.balance_coefficient * static_cast<double>(c_.num_experts) * sum;
  }

  FeedForwardConfig const& c_;
  std::vector<Use> pooled_;
  Index pooled_tokens_ = 0;
  double sum_of_layers_ = 0;
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
