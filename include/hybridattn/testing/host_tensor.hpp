// Tensors on the host, with names, shapes and values as doubles, whatever their type on the backend. A double holds every float, bf16 and
// int32 exactly, the sign of zero included, so equal bits here mean equal bits on the backend.
#ifndef HYBRIDATTN_TESTING_HOST_TENSOR_HPP
#define HYBRIDATTN_TESTING_HOST_TENSOR_HPP

#include <hybridattn/core/bf16.hpp>
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
  bool whole = false;            // of whole numbers, such as the keys that a policy chooses
  std::vector<Index> shape;
  std::vector<double> values;    // empty if the tensor is absent
  double eps = 0;                // of the scalar that it has on the backend; 0 for whole numbers

  bool is_bf16() const { return eps == epsilon_of<bf16>; }
  Index row_count() const { return shape.empty() ? 0 : shape[0]; }
  Index row_size() const { return row_count() == 0 ? 0 : std::ssize(values) / row_count(); }
  double* row(Index i) { return values.data() + i * row_size(); }
  double const* row(Index i) const { return values.data() + i * row_size(); }

  // The indices of an element: "[3, 0, 7]".
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

// A number as verdicts quote it, with enough digits to tell any two numbers apart.
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

// Names the first element with other bits in b than in a, among the rows for which wanted(tensor, row) holds, or returns "".
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
// The place and size of the largest difference. A NaN on either side counts as an infinite difference.
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
// A nearly normal number of mean 0 and deviation 1. It is the sum of four uniform numbers from one draw, which takes little time.
inline double bell(Random& random) {
  std::uint64_t const bits = random.bits();
  std::uint64_t const sum = (bits & 0xffff) + (bits >> 16 & 0xffff) + (bits >> 32 & 0xffff) + (bits >> 48);
  return (static_cast<double>(sum) - 2 * 65535) / (65536 / std::numbers::sqrt3);
}
inline void set_normal(HostTensor& tensor, Random& random, double deviation = 1) {
  set_each(tensor, [&] { return deviation * bell(random); });
}
// Rounds all values to floats, and those of tensors in bf16 to bf16, so that runs in that scalar and in double have the same inputs.
inline void round_inputs(HostGroup& group) {
  for (HostTensor& tensor : group)
    for (double& x : tensor.values) x = tensor.is_bf16() ? static_cast<double>(bf16(x)) : static_cast<double>(static_cast<float>(x));
}

inline Sequences packed(std::vector<Index> const& lengths) {
  std::vector<Index> offsets{0};
  for (Index length : lengths) offsets.push_back(offsets.back() + length);
  return Sequences::packed(offsets);
}

}  // namespace hybridattn::inline HYBRIDATTN_ABI::testing
#endif
