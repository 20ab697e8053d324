// Tensors on the host, with names, shapes and values as doubles, whatever they are elsewhere. A double holds every float,
// bf16 and int32 exactly, the sign of zero included, so that equal bits here are equal bits there.
#ifndef HYBRIDATTN_TESTING_HOST_TENSOR_HPP
#define HYBRIDATTN_TESTING_HOST_TENSOR_HPP

#include <hybridattn/core/random.hpp>
#include <hybridattn/core/sequences.hpp>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numbers>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

namespace hybridattn::inline HYBRIDATTN_ABI::testing {

inline constexpr double not_a_number = std::numeric_limits<double>::quiet_NaN();

// What the first axis of a tensor counts.
enum class RowsOf { tokens, sequences, other };

struct HostTensor {
  std::string name;
  RowsOf rows = RowsOf::other;
  bool whole = false;            // of whole numbers: a choice
  std::vector<Index> shape;
  std::vector<double> values;    // none: the tensor is not there

  Index row_count() const { return shape.empty() ? 0 : shape[0]; }
  Index row_size() const { return row_count() == 0 ? 0 : std::ssize(values) / row_count(); }
  double* row(Index i) { return values.data() + i * row_size(); }
  double const* row(Index i) const { return values.data() + i * row_size(); }

  // "[3, 0, 7]": where an element stands.
  std::string place(Index element) const {
    std::string text = "]";
    for (std::size_t axis = shape.size(); axis-- > 0; element /= shape[axis])
      text.insert(0, (axis == 0 ? "[" : ", ") + std::to_string(element % shape[axis]));
    return text;
  }
};

// The tensors of a struct of tensors, in order.
struct HostGroup : std::vector<HostTensor> {
  using std::vector<HostTensor>::vector;

  HostTensor const* find(std::string_view name) const { return find_in(*this, name); }
  HostTensor* find(std::string_view name) { return find_in(*this, name); }
  HostTensor& at(std::string_view name) { return found(find(name), name); }
  HostTensor const& at(std::string_view name) const { return found(find(name), name); }

 private:
  template <class Group> static auto find_in(Group& group, std::string_view name) -> decltype(group.data()) {
    for (auto& tensor : group)
      if (tensor.name == name) return &tensor;
    return nullptr;
  }
  template <class Tensor> static Tensor& found(Tensor* tensor, std::string_view name) {
    check(tensor != nullptr, "no tensor is called ", name);
    return *tensor;
  }
};

// What a verdict quotes: enough digits to tell two numbers apart.
inline std::string number(double x) {
  std::ostringstream text;
  text.precision(17);
  text << x;
  return text.str();
}
// "1 2 3"
template <class Numbers> std::string listed(Numbers const& numbers) {
  std::ostringstream text;
  char const* between = "";
  for (auto number : numbers) text << std::exchange(between, " ") << number;
  return text.str();
}

inline bool same_bits(double a, double b) { return std::bit_cast<std::uint64_t>(a) == std::bit_cast<std::uint64_t>(b); }

// The first element, of the rows that `wanted(tensor, row)` names, that has not the same bits in both; "" if there is none.
template <class Wanted> std::string first_difference(HostGroup const& a, HostGroup const& b, Wanted wanted) {
  for (std::size_t i = 0; i < a.size(); ++i) {
    HostTensor const &x = a[i], &y = b[i];
    if (x.values.size() != y.values.size()) return sentence(x.name, " has ", x.values.size(), " elements and ", y.values.size());
    for (Index e = 0; e < std::ssize(x.values); ++e) {
      auto const at = static_cast<std::size_t>(e);
      if (!same_bits(x.values[at], y.values[at]) && wanted(x, e / x.row_size()))
        return sentence(x.name, x.place(e), " is ", number(x.values[at]), " and ", number(y.values[at]));
    }
  }
  return {};
}
inline std::string first_difference(HostGroup const& a, HostGroup const& b) {
  return first_difference(a, b, [](HostTensor const&, Index) { return true; });
}

inline double max_abs(HostTensor const& x) {
  double largest = 0;
  for (double value : x.values) largest = std::max(largest, std::abs(value));
  return largest;
}
// The place and size of the largest difference; a NaN on either side is infinitely far.
struct Difference {
  double size = 0;
  Index element = 0;
};
inline Difference max_difference(HostTensor const& x, HostTensor const& y) {
  Difference largest;
  for (Index e = 0; e < std::ssize(x.values); ++e) {
    double const a = x.values[static_cast<std::size_t>(e)], b = y.values[static_cast<std::size_t>(e)];
    double const distance = a == b ? 0 : std::abs(a - b), size = distance == distance ? distance : std::numeric_limits<double>::infinity();
    if (size > largest.size) largest = {size, e};
  }
  return largest;
}

template <class F> void set_each(HostTensor& tensor, F value) {
  for (double& x : tensor.values) x = value();
}
// Mean 0, deviation 1 and nearly normal: the sum of four uniform numbers from one draw. The laws spend their time elsewhere.
inline double bell(Random& random) {
  std::uint64_t const bits = random.bits();
  std::uint64_t const sum = (bits & 0xffff) + (bits >> 16 & 0xffff) + (bits >> 32 & 0xffff) + (bits >> 48);
  return (static_cast<double>(sum) - 2 * 65535) / (65536 / std::numbers::sqrt3);
}
inline void set_normal(HostTensor& tensor, Random& random, double deviation = 1) {
  set_each(tensor, [&] { return deviation * bell(random); });
}
// Floats in every scalar, so that runs in float and double mean the same.
inline void round_to_float(HostGroup& group) {
  for (HostTensor& tensor : group)
    for (double& x : tensor.values) x = static_cast<double>(static_cast<float>(x));
}

inline Sequences packed(std::vector<Index> const& lengths) {
  std::vector<Index> offsets{0};
  for (Index length : lengths) offsets.push_back(offsets.back() + length);
  return Sequences::packed(offsets);
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::testing
#endif
