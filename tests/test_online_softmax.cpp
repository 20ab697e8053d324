#include "catch.hpp"

#include <hybridattn/attention/online_softmax.hpp>

#include <algorithm>
#include <vector>

using Softmax = hybridattn::attention::OnlineSoftmax<double>;

namespace {

double exponential(double x, double y) { return std::exp(x - y); }

// The softmax of a part of a list of scores, with the weighted sum of their numbers.
struct Part {
  Softmax softmax{-std::numeric_limits<double>::infinity(), 0};
  double weighted = 0;

  Part(std::vector<double> const& scores, std::size_t first, std::size_t last) {
    softmax.reference =
        *std::max_element(scores.begin() + static_cast<std::ptrdiff_t>(first), scores.begin() + static_cast<std::ptrdiff_t>(last));
    for (std::size_t j = first; j < last; ++j) {
      double const weight = exponential(scores[j], softmax.reference);
      softmax.total += weight;
      weighted += weight * static_cast<double>(j);
    }
  }
  void merge(Part const& other) {
    auto const factors = softmax.merge(other.softmax, exponential);
    weighted = factors.own * weighted + factors.other * other.weighted;
  }
};

}  // namespace

TEST_CASE("the softmax of parts, in whichever order they are merged, is that of the whole") {
  std::vector<double> const scores{3, -700, 2.5, 700, 699, -2, 0, 698.5, 41};
  Part const whole(scores, 0, scores.size());
  for (std::size_t cut = 1; cut < scores.size(); ++cut)
    for (bool const later_first : {false, true}) {
      Part a(scores, 0, cut), b(scores, cut, scores.size());
      Part& merged = later_first ? b : a;
      merged.merge(later_first ? a : b);
      CHECK(merged.softmax.lse() == Approx(whole.softmax.lse()).epsilon(1e-15));
      CHECK(merged.softmax.total == Approx(whole.softmax.total).epsilon(1e-15));
      CHECK(merged.weighted == Approx(whole.weighted).epsilon(1e-15));
    }
  CHECK(whole.softmax.lse() == Approx(700 + std::log(1 + std::exp(-1) + std::exp(-1.5))).epsilon(1e-15));
}
TEST_CASE("a part without scores changes nothing") {
  Softmax const none{-std::numeric_limits<double>::infinity(), 0};
  Softmax softmax{2, 1.75}, empty = none, other = none;
  softmax.merge(none, exponential);
  CHECK(softmax.reference == 2);
  CHECK(softmax.total == 1.75);
  empty.merge({2, 1.75}, exponential);
  CHECK(empty.lse() == softmax.lse());
  auto const factors = other.merge(none, exponential);
  CHECK(factors.own == 1);
  CHECK(other.total == 0);
  CHECK(other.lse() == -std::numeric_limits<double>::infinity());
}
TEST_CASE("another reference changes no softmax, and the same one changes no bit") {
  Softmax softmax{2, 1.75};
  double const lse = softmax.lse();
  CHECK(softmax.rebase(2, exponential) == 1);
  CHECK(softmax.total == 1.75);
  CHECK(softmax.rebase(5, exponential) == Approx(std::exp(-3)));
  CHECK(softmax.lse() == Approx(lse).epsilon(1e-15));
}
