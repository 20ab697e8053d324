// Inputs for policies whose state forgets by a gate. g is the logarithm of a decay, beta how much is written. As in practice, gates forget
// nothing or all and differ from head to head and from token to token, and keys repeat. A policy of your own with a g [N, H] uses them by
// `struct Samples<Mine> : GatedSamples<Mine>`.
#ifndef HYBRIDATTN_TESTING_GATES_HPP
#define HYBRIDATTN_TESTING_GATES_HPP

#include <hybridattn/testing/traits.hpp>

#include <iterator>

namespace hybridattn::inline HYBRIDATTN_ABI::testing {

namespace detail {

// Every row of the last axis gets length 1.
inline void normalise(HostTensor& tensor) {
  Index const D = tensor.shape.back();
  for (auto row = tensor.values.begin(); row != tensor.values.end(); row += D) {
    double sum = 0;
    for (Index d = 0; d < D; ++d) sum += row[d] * row[d];
    for (Index d = 0; d < D; ++d) row[d] /= std::sqrt(sum);
  }
}
// Each row becomes `share` times the first row and 1 - share times itself.
inline void correlate(HostTensor& tensor, double share) {
  for (Index n = 0; n < tensor.row_count(); ++n)
    for (Index e = 0; e < tensor.row_size(); ++e) tensor.row(n)[e] = share * tensor.row(0)[e] + (1 - share) * tensor.row(n)[e];
}

enum class Decay { none, mild, strong, total, mixed, by_head, either, runs, single };
enum class Beta { zero, one, two, between, mixed };
struct GateKind {
  char const* name;
  Decay decay;
  Beta beta;
  double shared;   // the share of a key's direction that all keys have in common
};
inline constexpr GateKind gate_kinds[] = {
    {"mild", Decay::mild, Beta::between, 0},
    {"nothing forgotten, one key", Decay::none, Beta::one, 1},
    {"strong gates, correlated keys", Decay::strong, Beta::between, 0.8},
    {"all forgotten", Decay::total, Beta::mixed, 0},
    {"reflections", Decay::none, Beta::two, 0.3},
    {"nothing written", Decay::mild, Beta::zero, 0},
    {"everything mixed", Decay::mixed, Beta::mixed, 0.5},
    {"heads that forget by e^-10, e^-25, e^-60, e^-1", Decay::by_head, Beta::between, 0},
    {"each token e^-25 or e^-.05", Decay::either, Beta::between, 0},
    {"runs of 32 tokens of e^-25, then of e^-.05", Decay::runs, Beta::between, 0},
    {"one token in 64 of e^-80", Decay::single, Beta::between, 0},
};
// The logarithm for head h of token n; `strength` is exp(A_log) of the head.
inline double draw_decay(Decay decay, double strength, Index n, Index h, Random& random) {
  constexpr double weak = -0.05, of_head[] = {-10, -25, -60, -1};
  if (decay == Decay::mixed) decay = static_cast<Decay>(random.below(4));
  if (decay == Decay::none) return 0;
  if (decay == Decay::mild) return -0.1 * random.uniform();
  if (decay == Decay::total) return -120;
  if (decay == Decay::by_head) return of_head[h % std::ssize(of_head)];
  if (decay == Decay::either) return random.below(2) == 0 ? weak : -25;
  if (decay == Decay::runs) return n / 32 % 2 == 0 ? -25 : weak;
  if (decay == Decay::single) return n % 64 == 37 ? -80 : weak;
  return -strength * std::log1p(std::exp(random.normal()));
}
inline double draw_beta(Beta beta, Random& random) {
  if (beta == Beta::mixed) beta = static_cast<Beta>(random.below(4));
  return beta == Beta::zero ? 0 : beta == Beta::one ? 1 : beta == Beta::two ? 2 : random.uniform();
}

}  // namespace detail

template <class P> struct GatedSamples : PlainSamples<P> {
  static std::vector<std::string> kinds() {
    std::vector<std::string> names;
    for (detail::GateKind const& kind : detail::gate_kinds) names.push_back(kind.name);
    return names;
  }
  // Skips q, k and beta if the policy does not have them.
  static void draw(std::string_view name, Random& random, HostGroup& inputs) {
    auto const is_named = [&](detail::GateKind const& kind) { return kind.name == name; };
    detail::GateKind const& kind = *std::find_if(std::begin(detail::gate_kinds), std::end(detail::gate_kinds), is_named);
    for (HostTensor& tensor : inputs) set_normal(tensor, random);
    if (HostTensor* const k = inputs.find("k")) detail::correlate(*k, kind.shared);
    for (char const* of_length_one : {"q", "k"})
      if (HostTensor* const tensor = inputs.find(of_length_one)) detail::normalise(*tensor);
    HostTensor &g = inputs.at("g"), *const beta = inputs.find("beta");
    std::vector<double> strengths;
    for (Index h = 0; h < g.row_size(); ++h) strengths.push_back(random.uniform(0.01, 16));
    for (Index n = 0; n < g.row_count(); ++n)
      for (Index h = 0; h < g.row_size(); ++h) {
        g.row(n)[h] = detail::draw_decay(kind.decay, strengths[static_cast<std::size_t>(h)], n, h, random);
        if (beta != nullptr) beta->row(n)[h] = detail::draw_beta(kind.beta, random);
      }
  }
  // The gradient of a strong decay is as small as the decay. Among the gradients of heads that keep their state, its error would not show.
  static bool by_head(std::string_view input) { return input == "g"; }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::testing
#endif
