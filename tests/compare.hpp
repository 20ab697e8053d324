// The tests of the kernels compare results with these functions.
#ifndef HYBRIDATTN_TESTS_COMPARE_HPP
#define HYBRIDATTN_TESTS_COMPARE_HPP

#include <hybridattn/core/sequences.hpp>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

template <class T> bool same_bits(std::vector<std::vector<T>> const& a, std::vector<std::vector<T>> const& b) {
  auto const same = [](std::vector<T> const& x, std::vector<T> const& y) {
    return x.size() == y.size() && (x.empty() || std::memcmp(x.data(), y.data(), x.size() * sizeof(T)) == 0);
  };
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), same);
}

template <class T> double max_error(std::vector<T> const& x, std::vector<double> const& truth) {
  double error = 0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    double const difference = std::abs(static_cast<double>(x[i]) - truth[i]);
    error = std::isnan(error) || difference <= error ? error : difference;   // a NaN stays
  }
  return error;
}
inline double max_abs(std::vector<double> const& x) { return max_error(std::vector<double>(x.size()), x); }

// Sequences of these lengths, one after the other.
inline hybridattn::Sequences packed(std::vector<hybridattn::Index> const& lengths) {
  std::vector<hybridattn::Index> offsets{0};
  for (hybridattn::Index length : lengths) offsets.push_back(offsets.back() + length);
  return hybridattn::Sequences::packed(offsets);
}

#endif
