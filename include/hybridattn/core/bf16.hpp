// bfloat16: the upper half of a float, with 8 bits of significand.
#ifndef HYBRIDATTN_CORE_BF16_HPP
#define HYBRIDATTN_CORE_BF16_HPP

#include <hybridattn/core/config.hpp>

#include <cstdint>
#include <limits>
#include <type_traits>

namespace hybridattn::inline HYBRIDATTN_ABI {

// A scalar that tensors are stored in. It computes nothing: it converts to float, and numbers are rounded to it explicitly.
struct bf16 {
  std::uint16_t bits;

  bf16() = default;
  // Rounds to the nearest bf16, ties to the even one. Numbers beyond the largest bf16 become infinity, NaN stays NaN. A double is rounded
  // to a float first.
  template <class Number> requires std::is_arithmetic_v<Number>
  HYBRIDATTN_HD explicit constexpr bf16(Number number) : bits(rounded(__builtin_bit_cast(std::uint32_t, static_cast<float>(number)))) {}
  HYBRIDATTN_HD static constexpr bf16 from_bits(std::uint16_t bits) {
    bf16 x{};
    x.bits = bits;
    return x;
  }

  HYBRIDATTN_HD constexpr operator float() const { return __builtin_bit_cast(float, std::uint32_t{bits} << 16); }

 private:
  HYBRIDATTN_HD static constexpr std::uint16_t rounded(std::uint32_t x) {
    constexpr std::uint32_t infinity = 0x7f800000, quiet = 0x00400000;
    if ((x & 0x7fffffff) > infinity) return static_cast<std::uint16_t>((x | quiet) >> 16);
    return static_cast<std::uint16_t>((x + 0x7fff + (x >> 16 & 1)) >> 16);
  }
};

// Sums, statistics and gates of a model in T are in WideOf<T>::type.
template <class T> struct WideOf {
  using type = T;
};
template <> struct WideOf<bf16> {
  using type = float;
};
template <class T> using wide_t = typename WideOf<std::remove_const_t<T>>::type;

// The distance from 1 to the next number; 0 for what is no scalar.
template <class T> inline constexpr double epsilon_of = 0;
template <> inline constexpr double epsilon_of<double> = std::numeric_limits<double>::epsilon();
template <> inline constexpr double epsilon_of<float> = static_cast<double>(std::numeric_limits<float>::epsilon());
template <> inline constexpr double epsilon_of<bf16> = 0x1p-7;

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
