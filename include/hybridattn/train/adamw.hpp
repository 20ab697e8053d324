// AdamW over all tensors of a model, with clipping by their global norm.
#ifndef HYBRIDATTN_TRAIN_ADAMW_HPP
#define HYBRIDATTN_TRAIN_ADAMW_HPP

#include <hybridattn/core/allowed.hpp>
#include <hybridattn/ops/adamw/adamw.hpp>
#include <hybridattn/ops/arithmetic/arithmetic.hpp>
#include <hybridattn/tensor/roles.hpp>

#include <cmath>
#include <functional>
#include <vector>

namespace hybridattn::inline HYBRIDATTN_ABI {

struct AdamWOptions {
  double learning_rate = 1e-3, beta_1 = 0.9, beta_2 = 0.95, epsilon = 1e-8, weight_decay = 0.1;
  double max_norm = 1;           // of all gradients together, larger ones are scaled down to it; 0: no clipping
  bool bias_correction = true;
  // Which tensors decay, by path (`blocks.0.attention.prepare.a_log`); all of them without it.
  std::function<bool(std::string_view path)> decays = {};

  // Throws on numbers that no optimizer can have.
  void check_numbers() const {
    check_not_negative("AdamW", "learning_rate", learning_rate);
    check_below_one("AdamW", "beta_1", beta_1);
    check_below_one("AdamW", "beta_2", beta_2);
    check_positive("AdamW", "epsilon", epsilon);
    check_not_negative("AdamW", "weight_decay", weight_decay);
    check_not_negative("AdamW", "max_norm", max_norm);
  }
};

// Norms of the gradients: of the tensors that are apart, and of the others.
struct GradientNorms {
  double others = 0, apart = 0;
  double global() const { return std::hypot(others, apart); }
};
// `apart` has one word for each tensor, or is empty. Throws and names the first tensor that holds a NaN or an infinity, or whose
// norm is too large for a double.
template <class B, class Gradients> GradientNorms gradient_norms(B& backend, Gradients const& gradients, std::vector<bool> const& apart) {
  GradientNorms sums;
  std::size_t tensor = 0;
  zip(
      [&](Path const& path, auto const& gradient) {
        double const squares = On<SumOfSquares, B>::forward(backend, flat(in(gradient)));
        if (!std::isfinite(squares))
          fail("the gradient of ", path.str(),
               On<AllFinite, B>::forward(backend, flat(in(gradient))) ? " is too large for its norm" : " holds a NaN or an infinity");
        (!apart.empty() && apart[tensor] ? sums.apart : sums.others) += squares;
        ++tensor;
      },
      gradients);
  GradientNorms const norms{std::sqrt(sums.others), std::sqrt(sums.apart)};
  check(std::isfinite(norms.global()), "the gradients together are too large for their norm");
  return norms;
}

// Moments are groups of the same structure as the parameters. A tensor without a gradient is not touched at all.
template <class Params> class AdamW {
 public:
  // What steps change, besides the parameters: with the options all there is to know of an optimizer.
  struct State {
    Params mean, square;         // moments of the gradients
    std::vector<Index> updates;  // one for each tensor, in the order of the parameters: the steps that had a gradient for it
    Index steps = 0;
  };

  template <class B> AdamW(B& backend, Params const& like, AdamWOptions options = {}) : options_(std::move(options)) {
    options_.check_numbers();
    zip(
        [&]<class T, int Rank>(Path const& path, Tensor<T, Rank, B> const& p, Tensor<T, Rank, B>& mean, Tensor<T, Rank, B>& square) {
          mean = zeros<T>(backend, p.shape());
          square = zeros<T>(backend, p.shape());
          decays_.push_back(!options_.decays || options_.decays(path.str()));
        },
        like, state_.mean, state_.square);
    state_.updates.resize(decays_.size());
  }

  // One step down the gradients with learning_rate * rate; returns their global norm before clipping. Throws, before it changes
  // anything, and names the tensor whose gradient is not finite, or would make a parameter or a moment so. Tensors that are `apart`
  // (one word for each, in the order of the parameters) are clipped by a norm of their own: where two losses train two parts
  // of a model, neither part moves otherwise because of the other's gradients.
  template <class B>
  double step(B& backend, Params& params, Params const& gradients, double rate = 1, std::vector<bool> const& apart = {}) {
    check(apart.empty() || apart.size() == decays_.size(), "AdamW: ", apart.size(), " words say which of ", decays_.size(),
          " tensors are apart");
    check_not_negative("AdamW", "rate", rate);
    GradientNorms const norms = gradient_norms(backend, gradients, apart);
    auto const rates_of = [&](std::size_t tensor) {
      return rates(tensor, rate, !apart.empty() && apart[tensor] ? norms.apart : norms.others);
    };
    for (bool const writes : {false, true}) {   // all of it is checked before any of it is written
      std::size_t next = 0;
      zip(
          [&](Path const& path, auto& p, auto const& g, auto& mean, auto& square) {
            std::size_t const tensor = next++;
            if (!g) return;
            AdamWStep::Rates const r = rates_of(tensor);
            if (!writes)
              return refuse(path, On<AdamWCheck, B>::forward(backend, r, flat(in(g)), flat(in(mean)), flat(in(square)), flat(in(p))));
            On<AdamWStep, B>::forward(backend, r, flat(in(g)), flat(out(mean)), flat(out(square)), flat(out(p)));
            ++state_.updates[tensor];
          },
          params, gradients, state_.mean, state_.square);
    }
    ++state_.steps;
    return norms.global();
  }
  Index steps() const { return state_.steps; }
  AdamWOptions const& options() const { return options_; }
  // One for each tensor, in the order of the parameters: whether it decays.
  std::vector<bool> const& decays() const { return decays_; }
  State const& state() const { return state_; }
  State& state() { return state_; }

 private:
  static void refuse(Path const& path, AdamWCheck::Overflow overflow) {
    constexpr char const* what[] = {"", "the mean of the gradients", "the mean of the squared gradients", "the parameter itself"};
    if (overflow != AdamWCheck::Overflow::none)
      fail("the update of ", path.str(), " would make ", what[static_cast<int>(overflow)], " a NaN or an infinity");
  }
  // Of the next step.
  AdamWStep::Rates rates(std::size_t tensor, double rate, double norm) const {
    double const step = static_cast<double>(state_.updates[tensor] + 1);
    return {.learning_rate = options_.learning_rate * rate,
            .beta_1 = options_.beta_1,
            .beta_2 = options_.beta_2,
            .epsilon = options_.epsilon,
            .weight_decay = decays_[tensor] ? options_.weight_decay : 0,
            .correction_1 = options_.bias_correction ? 1 - std::pow(options_.beta_1, step) : 1,
            .correction_2 = options_.bias_correction ? 1 - std::pow(options_.beta_2, step) : 1,
            .gradient_scale = options_.max_norm == 0 ? 1 : std::min(1.0, options_.max_norm / (norm + 1e-6))};
  }

  AdamWOptions options_;
  State state_;
  std::vector<bool> decays_;
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
