#include "catch.hpp"

#include <hybridattn/backend/cpu/gemm.hpp>
#include <hybridattn/backend/cpu/vectors.hpp>
#include <hybridattn/core/random.hpp>

#include <Eigen/Core>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

namespace ha = hybridattn;
using ha::Index;

namespace {

template <class T> using Rows = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

template <class T> Rows<T> noise(Index rows, Index columns, char const* name) {
  ha::Random random{ha::Seed{7}, name};
  return Rows<T>::NullaryExpr(rows, columns, [&] { return static_cast<T>(random.uniform(-1, 1)); });
}

template <class T> Rows<T> product(ha::Cpu& cpu, Rows<T> const& a, Rows<T> const& b, bool a_transposed, bool b_transposed) {
  Rows<T> const a_stored = a_transposed ? Rows<T>(a.transpose()) : a, b_stored = b_transposed ? Rows<T>(b.transpose()) : b;
  auto const stored = [](Rows<T> const& x, bool transposed) {
    ha::Operand<T> const operand{x.data(), x.rows(), x.cols(), x.cols(), 1};
    return transposed ? operand.transposed() : operand;
  };
  Rows<T> c = Rows<T>::Constant(a.rows(), b.cols(), std::numeric_limits<T>::quiet_NaN());
  ha::cpu::gemm(cpu, stored(a_stored, a_transposed), stored(b_stored, b_transposed), ha::View<T, 2>{c.data(), {c.rows(), c.cols()}});
  return c;
}

struct Size {
  Index rows, columns, depth;
};
constexpr Size sizes[] = {{1, 1, 1}, {7, 5, 3}, {8, 32, 16}, {9, 33, 17}, {64, 64, 64}, {130, 70, 300}, {3, 100, 513}};

}  // namespace

TEMPLATE_TEST_CASE("a product equals Eigen's in double, transposed or not", "", float, double) {
  ha::Cpu cpu{2};
  for (Size const size : sizes)
    for (bool const a_transposed : {false, true})
      for (bool const b_transposed : {false, true}) {
        auto const a = noise<TestType>(size.rows, size.depth, "a"), b = noise<TestType>(size.depth, size.columns, "b");
        Rows<double> const truth = a.template cast<double>() * b.template cast<double>();
        auto const c = product<TestType>(cpu, a, b, a_transposed, b_transposed);
        double const error = (c.template cast<double>() - truth).cwiseAbs().maxCoeff();
        CHECK(error <= static_cast<double>(size.depth) * std::numeric_limits<TestType>::epsilon());
      }
}

TEMPLATE_TEST_CASE("a row of a product does not depend on the other rows or on the threads, bitwise", "", float, double) {
  ha::Cpu one{1}, three{3};
  for (Index columns : {1, 7, 40, 45})
    for (bool const b_transposed : {false, true}) {
      auto const a = noise<TestType>(140, 300, "a"), b = noise<TestType>(300, columns, "b");
      auto const whole = product<TestType>(one, a, b, false, b_transposed);
      CHECK(whole == product<TestType>(three, a, b, false, b_transposed));
      for (Index rows : {1, 2, 4, 5, 8, 11, 67})
        for (Index first : {0, 5, 70}) {
          Rows<TestType> const part = a.middleRows(first, rows);
          CHECK(product<TestType>(one, part, b, false, b_transposed) == whole.middleRows(first, rows));
        }
    }
}

namespace {

using Bf16 = std::vector<ha::bf16>;
Bf16 rounded(Rows<float> const& x) {
  Bf16 y(static_cast<std::size_t>(x.size()));
  std::transform(x.data(), x.data() + x.size(), y.begin(), [](float number) { return ha::bf16(number); });
  return y;
}
Rows<float> widened(Bf16 const& x, Index rows, Index columns) {
  Rows<float> y(rows, columns);
  std::copy(x.begin(), x.end(), y.data());
  return y;
}
std::vector<std::uint16_t> bits_of(Bf16 const& x) {
  std::vector<std::uint16_t> bits;
  for (ha::bf16 const number : x) bits.push_back(number.bits);
  return bits;
}

}  // namespace

TEST_CASE("a product of numbers in bf16 is that of the same floats, rounded once") {
  ha::Cpu cpu{2};
  for (Size const size : sizes)
    for (int const layout : {0, 1, 2, 3})
      for (ha::Into const into : {ha::Into::overwrite, ha::Into::add}) {
        auto const [M, N, K] = size;
        auto const stored = [](auto const& x, Index rows, Index columns, bool transposed) {
          using T = std::remove_cvref_t<decltype(*x.data())>;
          ha::Operand<T> const as_stored{x.data(), transposed ? columns : rows, transposed ? rows : columns, transposed ? rows : columns, 1};
          return transposed ? as_stored.transposed() : as_stored;
        };
        Bf16 const a = rounded(noise<float>(M, K, "a")), b = rounded(noise<float>(K, N, "b")), old = rounded(noise<float>(M, N, "c"));
        Rows<float> const wide_a = widened(a, M, K), wide_b = widened(b, K, N);
        Rows<float> truth = widened(old, M, N), sum = truth;
        Bf16 c = old;
        auto const both = [&](auto const& x, auto const& y, auto to) {
          ha::cpu::gemm(cpu, stored(x, M, K, (layout & 1) != 0), stored(y, K, N, (layout & 2) != 0), to, into);
        };
        both(wide_a, wide_b, ha::View<float, 2>{truth.data(), {M, N}});
        both(a, b, ha::View<ha::bf16, 2>{c.data(), {M, N}});
        CHECK(bits_of(c) == bits_of(rounded(truth)));
        both(a, b, ha::View<float, 2>{sum.data(), {M, N}});
        CHECK(sum == truth);
      }
}

TEST_CASE("a product can be added to what is there") {
  ha::Cpu cpu{1};
  auto const a = noise<double>(10, 20, "a"), b = noise<double>(20, 30, "b");
  Rows<double> c = noise<double>(10, 30, "c");
  Rows<double> const truth = c + a * b;
  ha::cpu::gemm(cpu, ha::Operand<double>{a.data(), 10, 20, 20, 1}, ha::Operand<double>{b.data(), 20, 30, 30, 1},
                ha::View<double, 2>{c.data(), {10, 30}}, ha::Into::add);
  CHECK((c - truth).cwiseAbs().maxCoeff() < 1e-14);
}

TEST_CASE("operands that do not fit are refused with their sizes") {
  ha::Cpu cpu{1};
  std::vector<float> x(100);
  CHECK_THROWS_WITH(ha::cpu::gemm(cpu, ha::Operand<float>{x.data(), 2, 3, 3, 1}, ha::Operand<float>{x.data(), 4, 5, 5, 1},
                                  ha::View<float, 2>{x.data(), {2, 5}}),
                    Catch::Matchers::Contains("[2, 3] times [4, 5]"));
}

namespace {

template <class T> T of_vector(ha::cpu::Vec<T> (*f)(ha::cpu::Vec<T>), T x) { return f(ha::cpu::broadcast<T>(x))[0]; }

}  // namespace

TEMPLATE_TEST_CASE("exp, sigmoid and log2 of a vector are right for every number, and NaN for every NaN", "", float, double) {
  using T = TestType;
  using Bits = std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>;
  using Limits = std::numeric_limits<T>;
  T const least = std::log(Limits::min()), most = std::log(Limits::max());
  for (T x = least; x < most - T(0.4); x += T(0.37)) {
    INFO(x);
    CHECK(std::abs(of_vector(ha::cpu::exp<T>, x) / std::exp(x) - 1) <= 4 * std::max(T(1), std::abs(x)) * Limits::epsilon());
  }
  for (T const x : {least - T(2), T(-1000), T(-1e9), Limits::lowest(), -Limits::infinity()}) {
    INFO(x);
    CHECK(of_vector(ha::cpu::exp<T>, x) == 0);
    CHECK(of_vector(ha::cpu::sigmoid<T>, x) <= Limits::min());
    CHECK(of_vector(ha::cpu::exp<T>, -x) == Limits::infinity());
    CHECK(of_vector(ha::cpu::sigmoid<T>, -x) == 1);
  }
  for (T x = 0; x < 4 * most; x += T(0.01)) {   // 2^256 once wrapped to -1, and 1 / (1 - 1) is infinite
    T const closed = of_vector(ha::cpu::sigmoid<T>, -x);
    if (!(closed >= 0 && closed <= T(0.5))) FAIL("sigmoid(-" << x << ") is " << closed);
  }
  for (Bits const bits : {Bits(-1), static_cast<Bits>(std::bit_cast<Bits>(Limits::infinity()) + 1),
                          std::bit_cast<Bits>(Limits::quiet_NaN()), static_cast<Bits>(std::bit_cast<Bits>(Limits::quiet_NaN()) + 5)}) {
    T const nan = std::bit_cast<T>(bits);
    CHECK(std::isnan(of_vector(ha::cpu::exp<T>, nan)));
    CHECK(std::isnan(of_vector(ha::cpu::sigmoid<T>, nan)));
    CHECK(std::isnan(of_vector(ha::cpu::log2<T>, nan)));
  }
  CHECK(of_vector(ha::cpu::log2<T>, Limits::infinity()) == Limits::infinity());
  CHECK(of_vector(ha::cpu::log2<T>, T(0x1p-30)) == -30);
}

TEMPLATE_TEST_CASE("sums across lanes are the sums of the lanes", "", float, double) {
  using T = TestType;
  constexpr int n = ha::cpu::lanes<T>;
  ha::cpu::Vec<T> x[n];
  T expected[n] = {}, sums[n];
  for (int i = 0; i < n; ++i)
    for (int lane = 0; lane < n; ++lane) expected[i] += x[i][lane] = static_cast<T>(100 * i + lane * lane);
  CHECK(ha::cpu::sum<T>(x[1]) == expected[1]);
  CHECK(ha::cpu::largest<T>(x[1]) == x[1][n - 1]);
  ha::cpu::Vec<T> one[] = {x[1]};
  ha::cpu::sum_each<1, T>(one, sums);
  CHECK(sums[0] == expected[1]);
  ha::cpu::sum_each<n, T>(x, sums);
  CHECK(std::equal(sums, sums + n, expected));
}
