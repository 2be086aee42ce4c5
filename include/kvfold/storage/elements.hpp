/// \file
/// Element types of stored rows and the one place where they are converted to and from fp32.
#pragma once

#include <array>
#include <bit>
#include <concepts>
#include <cstdint>
#include <cstring>

#include "kvfold/detail/wide_loads.hpp"
#include "kvfold/types.hpp"

namespace kvfold {

/// IEEE binary16 as it lies in memory.
struct Float16 {
  std::uint16_t bits = 0;
  friend constexpr bool operator==(Float16, Float16) = default;
};

/// bfloat16 as it lies in memory: the upper half of an fp32.
struct BFloat16 {
  std::uint16_t bits = 0;
  friend constexpr bool operator==(BFloat16, BFloat16) = default;
};

/// fp8 e4m3 as it lies in memory: 4 exponent bits of bias 7, 3 mantissa bits, no infinities, NaN 0x7f and 0xff, largest
/// number 448 (OCP 8-bit floating point, "E4M3"; float8_e4m3fn in PyTorch and ml_dtypes).
struct Float8E4M3 {
  std::uint8_t bits = 0;
  friend constexpr bool operator==(Float8E4M3, Float8E4M3) = default;
};

namespace detail {
/// `yes` or `no`, chosen by masks: compilers turn `?:` into branches here, and loops of branches are not vectorised.
[[nodiscard]] constexpr std::uint32_t select(bool condition, std::uint32_t yes, std::uint32_t no) noexcept {
  const std::uint32_t mask = 0u - static_cast<std::uint32_t>(condition);
  return (yes & mask) | (no & ~mask);
}
/// The bits of a small number times a power of two.
[[nodiscard]] constexpr std::uint32_t scaled_bits(std::uint32_t number, float power) noexcept {
  return std::bit_cast<std::uint32_t>(static_cast<float>(static_cast<std::int32_t>(number)) * power);
}
}  // namespace detail

/// Exact for every input, NaN payloads included. Independent of the FTZ and DAZ modes of the thread.
[[nodiscard]] constexpr float to_float(Float16 x) noexcept {
  const std::uint32_t sign = std::uint32_t{x.bits & 0x8000u} << 16;
  const std::uint32_t magnitude = x.bits & 0x7fffu;
  // The exponent's bias changes by 112, that of infinity and NaN by twice as much.
  const std::uint32_t number = (magnitude << 13) + detail::select(magnitude >= 0x7c00u, 224u << 23, 112u << 23);
  const std::uint32_t small = detail::scaled_bits(magnitude, 0x1p-24f);  // zero and subnormals
  return std::bit_cast<float>(sign | detail::select(magnitude < 0x400u, small, number));
}

[[nodiscard]] constexpr float to_float(BFloat16 x) noexcept {
  return std::bit_cast<float>(std::uint32_t{x.bits} << 16);
}

/// Exact for every input. Independent of the FTZ and DAZ modes of the thread.
[[nodiscard]] constexpr float to_float(Float8E4M3 x) noexcept {
  const std::uint32_t sign = std::uint32_t{x.bits & 0x80u} << 24;
  const std::uint32_t magnitude = x.bits & 0x7fu;
  if (magnitude == 0x7fu) return std::bit_cast<float>(sign | 0x7fc00000u);
  if (magnitude < 0x08u) {  // zero and subnormals: an integer multiple of 2^-9
    const float value = static_cast<float>(magnitude) * 0x1p-9f;
    return std::bit_cast<float>(std::bit_cast<std::uint32_t>(value) | sign);
  }
  return std::bit_cast<float>(sign | ((magnitude << 20) + (120u << 23)));
}

[[nodiscard]] constexpr float to_float(float x) noexcept { return x; }

namespace detail {
/// x / 2^shift to the nearest integer, ties to even; shift is in [1, 31], and x + 2^(shift - 1) fits.
[[nodiscard]] constexpr std::uint32_t shift_to_nearest_even(std::uint32_t x, std::uint32_t shift) noexcept {
  const std::uint32_t below_half = (1u << (shift - 1u)) - 1u;
  return (x + below_half + (x >> shift & 1u)) >> shift;
}
}  // namespace detail

template <class Element>
Element from_float(float x) noexcept = delete;

template <>
[[nodiscard]] constexpr float from_float<float>(float x) noexcept {
  return x;
}

/// Rounds to nearest, ties to even; overflow gives infinity; NaN stays NaN.
template <>
[[nodiscard]] constexpr Float16 from_float<Float16>(float x) noexcept {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  const auto sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000u);
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  const auto half = [sign](std::uint32_t m) { return Float16{static_cast<std::uint16_t>(sign | m)}; };
  if (magnitude > 0x7f800000u) return half(0x7e00u | (magnitude >> 13 & 0x3ffu));
  if (magnitude >= 0x477ff000u) return half(0x7c00u);  // from 65520 on
  if (magnitude < 0x38800000u) {                       // below 2^-14: subnormal or zero
    if (magnitude < 0x33000000u) return half(0);       // below 2^-25
    const std::uint32_t exponent = magnitude >> 23;
    const std::uint32_t mantissa = (magnitude & 0x7fffffu) | 0x800000u;
    return half(detail::shift_to_nearest_even(mantissa, 126u - exponent));  // by 14 .. 24
  }
  return half(detail::shift_to_nearest_even(magnitude - (112u << 23), 13));
}

/// Rounds to nearest, ties to even; NaN stays NaN.
template <>
[[nodiscard]] constexpr BFloat16 from_float<BFloat16>(float x) noexcept {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<std::uint16_t>(bits >> 16 | 0x40u)};
  return {static_cast<std::uint16_t>(detail::shift_to_nearest_even(bits, 16))};
}

/// Rounds to nearest, ties to even; what is too large, infinities included, becomes +-448; NaN stays NaN.
template <>
[[nodiscard]] constexpr Float8E4M3 from_float<Float8E4M3>(float x) noexcept {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  const auto sign = static_cast<std::uint8_t>(bits >> 24 & 0x80u);
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  const auto eighth = [sign](std::uint32_t m) { return Float8E4M3{static_cast<std::uint8_t>(sign | m)}; };
  if (magnitude > 0x7f800000u) return eighth(0x7fu);
  if (magnitude >= 0x43e00000u) return eighth(0x7eu);  // from 448 on
  if (magnitude < 0x3c800000u) {                       // below 2^-6: subnormal or zero
    if (magnitude < 0x3a800000u) return eighth(0);     // below 2^-10
    const std::uint32_t mantissa = (magnitude & 0x7fffffu) | 0x800000u;
    return eighth(detail::shift_to_nearest_even(mantissa, 141u - (magnitude >> 23)));  // by 21 .. 24
  }
  return eighth(detail::shift_to_nearest_even(magnitude - (120u << 23), 20));
}

/// A type of number that converts to and from fp32 by itself.
template <class T>
concept Element =
    std::same_as<T, float> || std::same_as<T, Float16> || std::same_as<T, BFloat16> || std::same_as<T, Float8E4M3>;

namespace detail {
/// What each of the 256 codes means.
inline constexpr std::array<float, 256> kFloat8E4M3Values = [] {
  std::array<float, 256> values{};
  for (unsigned code = 0; code < 256; ++code) values[code] = to_float(Float8E4M3{static_cast<std::uint8_t>(code)});
  return values;
}();
}  // namespace detail

/// Converts n consecutive elements. `from` and `to` must not overlap.
template <Element T>
void load_floats(const T* from, Index n, float* to) noexcept {
  if constexpr (std::same_as<T, float>) {
    if (n > 0) std::memcpy(to, from, static_cast<std::size_t>(n) * sizeof(float));
  } else if constexpr (std::same_as<T, Float8E4M3>) {
    for (Index i = detail::load_wide_f8(from, n, to); i < n; ++i) to[i] = detail::kFloat8E4M3Values[from[i].bits];
  } else if constexpr (std::same_as<T, Float16>) {
    for (Index i = detail::load_wide_f16(from, n, to); i < n; ++i) to[i] = to_float(from[i]);
  } else {
    for (Index i = 0; i < n; ++i) to[i] = to_float(from[i]);
  }
}

/// Converts n floats, rounding to nearest even. `from` and `to` must not overlap.
template <Element T>
void store_floats(const float* from, Index n, T* to) noexcept {
  Index i = 0;
  if constexpr (std::same_as<T, Float16>) i = detail::store_wide_f16(from, n, to);
  for (; i < n; ++i) to[i] = from_float<T>(from[i]);
}

}  // namespace kvfold
