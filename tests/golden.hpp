// Golden values are inputs, outputs and gradients of implementations that share no code with this library. Each case is a safetensors
// file. A family is a function that runs one case. This header has what all families need.
#ifndef HYBRIDATTN_TESTS_GOLDEN_HPP
#define HYBRIDATTN_TESTS_GOLDEN_HPP

#include "catch.hpp"

#include <hybridattn/core/math.hpp>
#include <hybridattn/core/sequences.hpp>
#include <hybridattn/io/safetensors.hpp>
#include <hybridattn/tensor/roles.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <limits>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace golden {

namespace ha = hybridattn;
using ha::In;
using ha::Index;
using ha::Out;
using ha::Owned;
using ha::Sequences;
using ha::Shape;
using ha::Shapes;
using ha::Tensor;
using ha::View;

// The families that the tests know. A file of another family is a failure, so that no file is skipped in silence.
inline constexpr std::array<std::string_view, 11> operator_families{
    "adamw", "causal_conv1d", "cross_entropy", "gated_rms_norm", "gdn_gate", "l2_norm", "moe", "rms_norm", "rope", "schedule", "swiglu"};
inline constexpr std::array<std::string_view, 4> policy_families{"dsa", "dsa_kl", "full", "gdn"};
inline constexpr std::array<std::string_view, 2> layer_families{"full_layer", "gdn_layer"};

// The environment can name another folder of the same layout.
inline bool elsewhere() { return std::getenv("HYBRIDATTN_GOLDEN_DIR") != nullptr; }
inline std::filesystem::path folder() {
  return std::filesystem::path(elsewhere() ? std::getenv("HYBRIDATTN_GOLDEN_DIR") : HYBRIDATTN_GOLDEN_DIR) / "policies";
}
inline std::vector<std::filesystem::path> files() {
  std::vector<std::filesystem::path> result;
  for (auto const& entry : std::filesystem::directory_iterator(folder()))
    if (entry.path().extension() == ".safetensors") result.push_back(entry.path());
  std::ranges::sort(result);
  return result;
}

// A file with its options and tensors. It notes which tensors have been used.
class Case {
 public:
  explicit Case(std::filesystem::path const& path) : file_(path) {}

  std::string const& name() const { return file_.metadata("case"); }
  std::string const& family() const { return file_.metadata("policy"); }

  // Metadata is JSON, except that plain words are not quoted.
  nlohmann::json option(std::string const& key) const {
    auto const& text = file_.metadata(key);
    auto value = nlohmann::json::parse(text, nullptr, false);
    return value.is_discarded() ? nlohmann::json(text) : value;
  }
  template <class Value> Value option_or(std::string const& key, Value otherwise) const {
    auto const value = option(key);
    return value.is_null() ? otherwise : value.get<Value>();
  }
  Index size(std::string const& key) const { return option(key).get<Index>(); }
  double real(std::string const& key) const { return option(key).get<double>(); }
  bool is(std::string const& key) const { return option(key).get<bool>(); }
  std::string word(std::string const& key) const { return option(key).get<std::string>(); }

  // Largest accepted error in double.
  double tolerance() const {
    std::string const name = word("tolerance");
    if (name == "tight") return 1e-11;
    if (name == "recurrence") return 1e-10;
    ha::check(name == "softplus_threshold", "golden: unknown tolerance ", name);
    return 1e-8;
  }

  Index tokens() const { return size("B") * size("T"); }
  Sequences sequences() const {
    if (!contains("cu_seqlens")) return Sequences::equal(size("B"), size("T"));
    auto const offsets = integers("cu_seqlens");
    return Sequences::packed(std::vector<Index>(offsets.begin(), offsets.end()));
  }

  bool contains(std::string const& tensor) const { return file_.contains(tensor); }
  std::vector<double> doubles(std::string const& tensor) const { return used_.insert(tensor), file_.read_doubles(tensor); }
  std::vector<std::int64_t> integers(std::string const& tensor) const { return used_.insert(tensor), file_.read_int64s(tensor); }
  // Counts a tensor as used that the library has no tensor for.
  void pass_over(std::string const& tensor) const { used_.insert(tensor); }
  std::string unused() const {
    std::string names;
    for (auto const& [name, info] : file_.tensors())
      if (!used_.contains(name)) names += " " + name;
    return names;
  }

 private:
  ha::Safetensors file_;
  mutable std::set<std::string> used_;
};

// A tensor of a file that holds several tensors of the library. It has `groups` groups; each has an equal share of every part.
template <class T> struct Fused {
  std::string name;
  Index groups;
  std::vector<View<T, 1>> parts;
};
template <class T, int... Ranks> Fused<T> fused(std::string name, Index groups, View<T, Ranks>... parts) {
  return {.name = std::move(name), .groups = groups, .parts = {ha::flat(parts)...}};
}
template <class T, int Rank> Fused<T> one(std::string name, View<T, Rank> part) { return fused(std::move(name), 1, part); }
// The elements of the parts on the host.
template <class T> using Parts = std::vector<std::vector<T>>;
// Calls f(number of an element in the file's tensor, the element in the part that holds it).
template <class T, class F> void for_each_element(Index groups, Parts<T>& parts, F f) {
  std::size_t next = 0;
  for (Index group = 0; group < groups; ++group)
    for (auto& part : parts) {
      Index const share = std::ssize(part) / groups;
      for (Index i = 0; i < share; ++i) f(next++, part[static_cast<std::size_t>(group * share + i)]);
    }
}

struct Worst {
  double error = 0;
  std::string where = "nothing";
};

// The error of a tensor is max|a - b| / max(max|b|, smallest), because a result that is zero on paper may be rounding, 1e-14 in double.
// All inputs are exact in float, so only rounding is left in float. Its tolerance is 170 eps, for sums of some hundred terms and some ten
// roundings in a row. There `smallest` is 0.1, because inputs are of size one.
template <class T> inline constexpr double smallest = sizeof(T) == 4 ? 0.1 : 1e-3;
inline constexpr double float_tolerance = 2e-5;

// Runs one case in one precision on one machine. It reads the inputs and judges the results.
template <class T, class B> class Run {
 public:
  Run(Case const& c, Worst& worst) : c_(c), worst_(worst) {}

  Case const& c() const { return c_; }
  B& backend() { return backend_; }
  // Widens the tolerance. The rounding of a score, eps times its size, is a relative error of the score's exponential.
  void expect_scores(double largest) { float_tolerance_ += largest * std::numeric_limits<float>::epsilon(); }

  // Reads a tensor of the file in this shape. read_if_there returns an empty tensor if the file does not have it.
  template <int Rank> Tensor<T, Rank, B> read(std::string const& name, Shape<Rank> shape) {
    auto const elements = c_.doubles(name);
    return make(std::vector<T>(elements.begin(), elements.end()), shape);
  }
  template <int Rank> Tensor<T, Rank, B> read_if_there(std::string const& name, Shape<Rank> shape) {
    return c_.contains(name) ? read(name, shape) : Tensor<T, Rank, B>{};
  }
  Tensor<std::int32_t, 1, B> read_integers(std::string const& name, Index count) {
    auto const elements = c_.integers(name);
    return make(std::vector<std::int32_t>(elements.begin(), elements.end()), Shape<1>{count});
  }
  void read(std::vector<Fused<T>> const& tensors) {
    for (auto const& tensor : tensors) {
      auto const elements = c_.doubles(tensor.name);
      Parts<T> parts;
      for (auto const& part : tensor.parts) parts.emplace_back(static_cast<std::size_t>(part.count()));
      for_each_element(tensor.groups, parts, [&](std::size_t i, T& element) { element = static_cast<T>(elements.at(i)); });
      for (std::size_t i = 0; i < parts.size(); ++i)
        if (!parts[i].empty()) backend_.upload(tensor.parts[i].data, parts[i].data(), parts[i].size() * sizeof(T));
    }
  }
  template <class Element, int Rank> Tensor<Element, Rank, B> make(std::vector<Element> const& elements, Shape<Rank> shape) {
    Tensor<Element, Rank, B> tensor{backend_, shape};
    ha::upload(backend_, elements, tensor);
    return tensor;
  }
  // A tensor that an operator must fill. It holds NaN before.
  template <int Rank> Tensor<T, Rank, B> unset(Shape<Rank> shape) {
    return make(std::vector<T>(static_cast<std::size_t>(shape.count()), std::numeric_limits<T>::quiet_NaN()), shape);
  }
  template <template <class> class G> G<Owned<T, B>> unset(G<Shapes> const& shapes) {
    auto group = ha::allocate<T>(backend_, shapes);
    ha::zip([this](ha::Path const&, auto& tensor) { poison(tensor); }, group);
    return group;
  }

  template <int Rank> void compare(std::string const& name, Tensor<T, Rank, B> const& result) {
    compare(name, ha::download(backend_, result));
  }
  void compare(std::string const& name, std::vector<T> const& result) { compare(name, result, c_.doubles(name)); }
  void compare(std::string const& name, std::vector<T> const& result, std::vector<double> const& truth) {
    double const tolerance = sizeof(T) == 4 ? float_tolerance_ : c_.tolerance();
    INFO(c_.name() << ": " << name << (sizeof(T) == 4 ? " in float" : " in double"));
    REQUIRE(result.size() == truth.size());
    double difference = 0, largest = 0;
    for (std::size_t i = 0; i < truth.size(); ++i) {
      double const d = std::abs(static_cast<double>(result[i]) - truth[i]);
      difference = std::isnan(difference) || d <= difference ? difference : d;   // a NaN stays
      largest = std::max(largest, std::abs(truth[i]));
    }
    double const error = difference / std::max(largest, smallest<T>);
    INFO("error " << error << ", largest " << largest << "; allowed " << tolerance);
    CHECK(error <= tolerance);
    if (!(error <= worst_.error)) worst_ = {error, c_.name() + " " + name};
  }
  void compare_integers(std::string const& name, std::vector<std::int64_t> const& result) {
    INFO(c_.name() << ": " << name);
    CHECK(result == c_.integers(name));
  }
  void compare_gradients(std::vector<Fused<T>> const& tensors) {
    for (auto const& tensor : tensors) {
      Parts<T> parts;
      for (auto const& part : tensor.parts) {
        parts.emplace_back(static_cast<std::size_t>(part.count()));
        if (!part.empty()) backend_.download(parts.back().data(), part.data, parts.back().size() * sizeof(T));
      }
      std::vector<T> gradient;
      for_each_element(tensor.groups, parts, [&](std::size_t, T element) { gradient.push_back(element); });
      compare("d_" + tensor.name, gradient, c_.doubles("d_" + tensor.name));
    }
  }

 private:
  template <class Element, int Rank> void poison(Tensor<Element, Rank, B>& x) {
    using Limits = std::numeric_limits<Element>;
    Element const bad = Limits::has_quiet_NaN ? Limits::quiet_NaN() : Limits::min();
    ha::upload(backend_, std::vector<Element>(static_cast<std::size_t>(x.shape().count()), bad), x);
  }

  Case const& c_;
  Worst& worst_;
  double float_tolerance_ = float_tolerance;
  B backend_;
};

template <class B> struct Family {
  std::string_view name;
  void (*in_double)(Run<double, B>&);
  void (*in_float)(Run<float, B>&) = nullptr;   // null: it has no float form
};

// Runs every case of a family, and prints how many there were and the largest error.
template <class B> void check(Family<B> const& family) {
  Index count = 0;
  Worst in_double, in_float;
  for (auto const& path : files()) {
    Case const c{path};
    if (c.family() != family.name) continue;
    ++count;
    INFO("golden case " << c.name());
    Run<double, B> run{c, in_double};
    family.in_double(run);
    CHECK(c.unused() == "");
    if (family.in_float == nullptr) continue;
    Run<float, B> again{c, in_float};
    family.in_float(again);
  }
  std::printf("%-15.*s %3td files   double %7.1e (%s)", static_cast<int>(family.name.size()), family.name.data(), count, in_double.error,
              in_double.where.c_str());
  if (family.in_float != nullptr) std::printf("   float %7.1e (%s)", in_float.error, in_float.where.c_str());
  std::printf("\n");
  CHECK((count > 0 || elsewhere()));
}

template <class B, std::size_t N>
constexpr bool are_named(std::array<Family<B>, N> const& families, std::array<std::string_view, N> const& names) {
  return std::ranges::equal(families, names, {}, &Family<B>::name);
}

}  // namespace golden
#endif
