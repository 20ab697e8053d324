#include "catch.hpp"

#include <hybridattn/infer/sampling.hpp>

#include <cmath>
#include <limits>
#include <vector>

namespace ha = hybridattn;
using Catch::Contains;

namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();

std::int32_t one(ha::Sampler& sampler, std::vector<double> const& logits) { return sampler(std::span<double const>(logits)); }

// The share of each token in `draws` draws.
std::vector<double> shares(ha::SamplingOptions options, std::vector<double> const& logits, int draws = 40000) {
  ha::Sampler sampler{options, ha::Seed{3}};
  std::vector<double> result(logits.size());
  for (int i = 0; i < draws; ++i) result[static_cast<std::size_t>(one(sampler, logits))] += 1.0 / draws;
  return result;
}
std::vector<double> logarithms(std::vector<double> const& probabilities) {
  std::vector<double> result;
  for (double p : probabilities) result.push_back(std::log(p));
  return result;
}
// Five standard deviations of a share.
double margin(double p, int draws = 40000) { return 5 * std::sqrt(p * (1 - p) / draws) + 1e-9; }

void check_shares(std::vector<double> const& found, std::vector<double> const& expected) {
  for (std::size_t i = 0; i < expected.size(); ++i) {
    CAPTURE(i, found[i], expected[i]);
    CHECK(std::abs(found[i] - expected[i]) <= margin(expected[i]));
  }
}

}  // namespace

TEST_CASE("temperature 0 takes the likeliest token, the smallest of equals") {
  ha::Sampler sampler{{.temperature = 0}};
  CHECK(one(sampler, {1, 5, 5, 2}) == 1);
  CHECK(one(sampler, {-infinity, -3, -7}) == 1);
}

TEST_CASE("tokens come as often as their probabilities say") {
  std::vector<double> const p{0.5, 0.125, 0.25, 0.125};
  check_shares(shares({}, logarithms(p)), p);
}

TEST_CASE("half the temperature squares the probabilities") {
  check_shares(shares({.temperature = 0.5}, logarithms({0.5, 0.25, 0.25})), {4.0 / 6, 1.0 / 6, 1.0 / 6});
}

TEST_CASE("top_k keeps the k likeliest tokens, the smaller of equals") {
  check_shares(shares({.top_k = 2}, logarithms({0.2, 0.4, 0.2, 0.2})), {1.0 / 3, 2.0 / 3, 0, 0});
}

TEST_CASE("top_p keeps the fewest tokens that reach it") {
  auto const logits = logarithms({0.1, 0.5, 0.1, 0.3});
  check_shares(shares({.top_p = 0.75}, logits), {0, 5.0 / 8, 0, 3.0 / 8});
  check_shares(shares({.top_p = 0.85}, logits), {1.0 / 9, 5.0 / 9, 0, 3.0 / 9});
  check_shares(shares({.top_p = 1e-9}, logits), {0, 1, 0, 0});
}

TEST_CASE("top_p counts among what top_k left") {
  check_shares(shares({.top_k = 2, .top_p = 0.6}, logarithms({0.1, 0.5, 0.1, 0.3})), {0, 1, 0, 0});
}

TEST_CASE("a seed gives the same tokens again, another seed others") {
  std::vector<double> const logits(50, 0.0);
  std::vector<std::int32_t> drawn[3];
  for (int run = 0; run < 3; ++run) {
    ha::Sampler sampler{{}, ha::Seed{run == 2 ? 8u : 7u}};
    for (int i = 0; i < 20; ++i) drawn[run].push_back(one(sampler, logits));
  }
  CHECK(drawn[0] == drawn[1]);
  CHECK(drawn[0] != drawn[2]);
}

TEST_CASE("options and logits that make no sense are refused by name") {
  CHECK_THROWS_WITH(ha::Sampler({.temperature = -1}), Contains("temperature -1") && Contains(">= 0"));
  CHECK_THROWS_WITH(ha::Sampler({.top_k = -2}), Contains("top_k -2"));
  CHECK_THROWS_WITH(ha::Sampler({.top_p = 0}), Contains("top_p 0") && Contains("(0, 1]"));
  CHECK_THROWS_WITH(ha::Sampler({.top_p = 1.5}), Contains("top_p 1.5"));
  ha::Sampler sampler;
  CHECK_THROWS_WITH(one(sampler, {0, std::nan(""), 0}), Contains("token 1") && Contains("nan"));
  CHECK_THROWS_WITH(one(sampler, {-infinity, -infinity}), Contains("-inf"));
  CHECK_THROWS_WITH(one(sampler, {}), Contains("no logits"));
}
