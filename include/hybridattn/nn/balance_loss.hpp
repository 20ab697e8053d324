// The load-balancing loss of a model's mixture layers.
//   per layer: the sum of the layers' losses         pooled: f and P over the tokens of all layers, then one product
#ifndef HYBRIDATTN_NN_BALANCE_LOSS_HPP
#define HYBRIDATTN_NN_BALANCE_LOSS_HPP

#include <hybridattn/nn/feed_forward.hpp>
#include <hybridattn/ops/balance/balance.hpp>

#include <span>

namespace hybridattn::inline HYBRIDATTN_ABI {
namespace detail {

// One loss over the tokens of these layers: adds it to value [1], and writes scale times its gradient into each layer's Saved.
template <class B, class T>
void balance_together(B& backend, double coefficient, double scale, std::span<FeedForward::Saved<Owned<T, B>>* const> layers,
                      View<double, 1> value) {
  Shape<2> const choices = layers[0]->probabilities.shape();
  auto sums = zeros<double>(backend, Shape<2>{2, choices[1]});
  for (auto const* layer : layers) On<ExpertUse, B>::forward(backend, in(layer->offsets), in(layer->probabilities), out(sums));
  Index const tokens = std::ssize(layers) * choices[0];
  On<BalanceLoss, B>::forward(backend, coefficient, tokens, in(sums), value);
  for (auto* layer : layers) On<BalanceLoss, B>::backward(backend, coefficient, tokens, in(sums), scale, out(layer->d_probability));
}

}  // namespace detail

// Adds the loss to value [1], on the machine. Writes scale times its gradient into the Saved of the mixture layers, given in order.
template <class B, class T>
void balance_loss(B& backend, FeedForwardConfig const& c, double scale, std::span<FeedForward::Saved<Owned<T, B>>* const> layers,
                  View<double, 1> value) {
  std::size_t const together = c.balance == Balance::pooled ? layers.size() : 1;
  for (std::size_t first = 0; first < layers.size(); first += together)
    detail::balance_together<B, T>(backend, c.balance_coefficient, scale, layers.subspan(first, together), value);
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
