// Initial values of a model's matrices. Norms, gates and convolutions have initial values of their own.
#ifndef HYBRIDATTN_NN_INITIALIZATION_HPP
#define HYBRIDATTN_NN_INITIALIZATION_HPP

#include <hybridattn/core/allowed.hpp>
#include <hybridattn/tensor/initial.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI {

struct Initialization {
  double linear_deviation = 0.02;     // N(0, linear_deviation^2); 0: uniform in +-fan_in^-1/2, PyTorch's Linear
  double embedding_deviation = 0.02;  // N(0, embedding_deviation^2)

  // Throws Error unless both deviations are numbers >= 0.
  void check_numbers() const {
    check_not_negative("Initialization", "linear_deviation", linear_deviation);
    check_not_negative("Initialization", "embedding_deviation", embedding_deviation);
  }
  Initial linear(Index fan_in) const {
    if (linear_deviation != 0) return Initial::normal(linear_deviation);
    double const bound = fan_in == 0 ? 0 : 1 / std::sqrt(static_cast<double>(fan_in));
    return Initial::uniform(-bound, bound);
  }
  Initial embedding() const { return Initial::normal(embedding_deviation); }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
