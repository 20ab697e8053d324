// A token is drawn from logits, by any options: it must be one that the options allow.
#include "fuzz.hpp"

#include <hybridattn/infer/sampling.hpp>

#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

namespace {

using namespace fuzz;

// An ordinary number, a special one, or any bits.
double some_number(FuzzedDataProvider& data) {
  static constexpr double special[] = {0,
                                       -0.0,
                                       1,
                                       -1,
                                       2,
                                       0.5,
                                       1e-300,
                                       5e-324,
                                       1e38,
                                       1e300,
                                       -1e300,
                                       std::numeric_limits<double>::infinity(),
                                       -std::numeric_limits<double>::infinity(),
                                       std::numeric_limits<double>::quiet_NaN()};
  auto const kind = data.ConsumeIntegralInRange<int>(0, 3);
  if (kind == 0) return data.PickValueInArray(special);
  if (kind == 1) return std::bit_cast<double>(data.ConsumeIntegral<std::uint64_t>());
  return data.ConsumeFloatingPointInRange<double>(-8, 8);
}

struct Draw {
  ha::SamplingOptions options;
  std::vector<float> logits;
  std::uint64_t seed;
};
Draw some_draw(FuzzedDataProvider& data) {
  Draw draw{.options = {}, .logits = {}, .seed = data.ConsumeIntegral<std::uint64_t>()};
  if (data.ConsumeBool()) draw.options.temperature = some_number(data);
  if (data.ConsumeBool())
    draw.options.top_k = data.ConsumeBool() ? data.ConsumeIntegralInRange<Index>(0, 8) : data.ConsumeIntegral<Index>();
  if (data.ConsumeBool()) draw.options.top_p = data.ConsumeBool() ? data.ConsumeProbability<double>() : some_number(data);
  draw.logits.resize(data.ConsumeIntegralInRange<std::size_t>(0, 40));
  bool const few = data.ConsumeBool();   // many equal ones
  for (float& logit : draw.logits) {
    double const number = few ? data.ConsumeIntegralInRange<int>(-2, 2) : some_number(data);
    if (std::abs(number) <= static_cast<double>(std::numeric_limits<float>::max()) || !std::isfinite(number))
      logit = static_cast<float>(number);
  }
  return draw;
}

bool is_legal(ha::SamplingOptions const& o) {
  return std::isfinite(o.temperature) && o.temperature >= 0 && o.top_k >= 0 && o.top_p > 0 && o.top_p <= 1;
}
bool are_legal(std::vector<float> const& logits) {
  bool const bounded = std::ranges::all_of(logits, [](float x) { return x < std::numeric_limits<float>::infinity(); });
  return bounded && std::ranges::any_of(logits, [](float x) { return std::isfinite(x); });
}

// Tokens by falling logit, equal ones by number.
std::vector<std::size_t> by_likelihood(std::vector<float> const& logits) {
  std::vector<std::size_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::ranges::sort(order, [&](std::size_t a, std::size_t b) { return logits[a] != logits[b] ? logits[a] > logits[b] : a < b; });
  return order;
}
// How many of the likeliest tokens the options allow, with a little more for rounding.
std::size_t most_allowed(Draw const& draw, std::vector<std::size_t> const& order) {
  auto const& o = draw.options;
  if (o.temperature == 0) return 1;
  std::size_t kept = o.top_k == 0 ? order.size() : std::min(order.size(), static_cast<std::size_t>(o.top_k));
  auto const weight = [&](std::size_t i) {
    double const largest = static_cast<double>(draw.logits[order[0]]), logit = static_cast<double>(draw.logits[order[i]]);
    return std::exp((logit - largest) / o.temperature);
  };
  double total = 0, sum = 0;
  for (std::size_t i = 0; i < kept; ++i) total += weight(i);
  for (std::size_t i = 0; i < kept; ++i)
    if ((sum += weight(i)) >= total * o.top_p * (1 + 1e-9)) return i + 1;
  return kept;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(std::uint8_t const* bytes, std::size_t size) {
  FuzzedDataProvider data{bytes, size};
  Draw const draw = some_draw(data);
  std::vector<std::int32_t> tokens, again;
  auto const sample = [&](std::vector<std::int32_t>& into) {
    return accepts([&] {
      ha::Sampler sampler{draw.options, ha::Seed{draw.seed}};
      for (int i = 0; i < 4; ++i) into.push_back(sampler(std::span<float const>(draw.logits)));
    });
  };
  bool const drawn = sample(tokens);
  demand(drawn == (is_legal(draw.options) && are_legal(draw.logits)), "options and logits are ", drawn ? "accepted" : "refused");
  demand(drawn == sample(again) && tokens == again, "the same seed gives other tokens");
  if (!drawn) return 0;
  auto const order = by_likelihood(draw.logits);
  std::size_t const allowed = most_allowed(draw, order);
  for (std::int32_t const token : tokens) {
    demand(token >= 0 && static_cast<std::size_t>(token) < draw.logits.size(), "token ", token, " of ", draw.logits.size());
    demand(std::isfinite(draw.logits[static_cast<std::size_t>(token)]), "token ", token, " is excluded");
    auto const place = std::ranges::find(order, static_cast<std::size_t>(token)) - order.begin();
    demand(place < static_cast<std::ptrdiff_t>(allowed), "token ", token, " is number ", place, " by likelihood; allowed are ", allowed);
  }
  return 0;
}
