/// \file
/// Quantised storage of rows: 8-bit integers with a scale per row, and the blocks q8_0 and q4_0 of ggml.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <concepts>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "kvfold/detail/wide_loads.hpp"
#include "kvfold/storage/elements.hpp"
#include "kvfold/types.hpp"

namespace kvfold {

/// An element of a row of 8-bit integers: it means `value * scale`, with one fp32 scale per row that lies elsewhere.
struct Int8 {
  std::int8_t value = 0;
  friend constexpr bool operator==(Int8, Int8) = default;
};

/// Elements in one block of ggml's q8_0 and q4_0.
inline constexpr Index kBlockSize = 32;

/// 32 elements of a row as ggml's q8_0: element i is `scale * values[i]`.
struct BlockQ8_0 {
  Float16 scale;
  std::array<std::int8_t, kBlockSize> values{};
  friend constexpr bool operator==(const BlockQ8_0&, const BlockQ8_0&) = default;
};

/// 32 elements of a row as ggml's q4_0: element i is `scale * (q_i - 8)`, where q_i is the lower half of `pairs[i]` for
/// i < 16 and the upper half of `pairs[i - 16]` from there on.
struct BlockQ4_0 {
  Float16 scale;
  std::array<std::uint8_t, kBlockSize / 2> pairs{};
  friend constexpr bool operator==(const BlockQ4_0&, const BlockQ4_0&) = default;
};

static_assert(sizeof(Int8) == 1 && sizeof(BlockQ8_0) == 34 && sizeof(BlockQ4_0) == 18);
static_assert(std::is_trivially_copyable_v<BlockQ8_0> && std::is_standard_layout_v<BlockQ8_0>);
static_assert(std::is_trivially_copyable_v<BlockQ4_0> && std::is_standard_layout_v<BlockQ4_0>);

/// What rows may be stored in. A row of `width` numbers is `width / kUnit<E>` objects of type E.
template <class E>
concept Stored = Element<E> || std::same_as<E, Int8> || std::same_as<E, BlockQ8_0> || std::same_as<E, BlockQ4_0>;

/// Numbers in one E. Strides and offsets of tensors count objects of type E.
template <Stored E>
inline constexpr Index kUnit = std::same_as<E, BlockQ8_0> || std::same_as<E, BlockQ4_0> ? kBlockSize : 1;

/// Whether numbers are stored in blocks of `kUnit`, which are made of neighbours in a row.
template <Stored E>
inline constexpr bool kInBlocks = kUnit<E> != 1;

/// Each row has an fp32 scale of its own, which is made when the row is written and moves with it.
template <Stored E>
inline constexpr bool kRowScaled = std::same_as<E, Int8>;

/// Rows may have a scale. For fp8 it is the engine's, often one for a whole tensor: reading multiplies by it, writing
/// divides by it, it is never changed, and without one it is 1.
template <Stored E>
inline constexpr bool kMayBeScaled = kRowScaled<E> || std::same_as<E, Float8E4M3>;

namespace detail {

/// |x| of the largest of n numbers `stride` apart; NaN where there is one. Independent of the DAZ mode of the thread.
[[nodiscard]] inline float largest_magnitude(const float* x, Index stride, Index n) noexcept {
  std::uint32_t most = 0;  // magnitudes order as their bits do, and NaN comes above all
  for (Index i = 0; i < n; ++i) most = std::max(most, std::bit_cast<std::uint32_t>(x[i * stride]) & 0x7fffffffu);
  return std::bit_cast<float>(most);
}

/// The nearest integer, ties away from zero, for |x| < 2^30. x comes from fp32 or is far from a tie, so that the sum
/// here cannot round across one. In double: a product of floats must not be contracted with this sum.
[[nodiscard]] constexpr std::int32_t nearest_integer(double x) noexcept {
  return static_cast<std::int32_t>(x < 0.0 ? x - 0.5 : x + 0.5);
}

/// A positive normal double at the precision of fp32, ties to even. Written in integers, because compilers may contract
/// fp32 arithmetic (fused multiply-add), and then blocks would depend on the processor that was compiled for.
[[nodiscard]] constexpr double at_fp32_precision(double x) noexcept {
  auto bits = std::bit_cast<std::uint64_t>(x);
  bits += 0x0fffffffu + (bits >> 29 & 1u);
  return std::bit_cast<double>(bits & ~std::uint64_t{0x1fffffffu});
}

/// A block's scale, to be multiplied with.
[[nodiscard]] inline float factor_of(Float16 scale) noexcept {
  if constexpr (kHasWideLoads) return wide_f16(scale.bits);
  return to_float(scale);
}

/// 1 / scale, or 0 where that is not finite.
[[nodiscard]] constexpr float reciprocal(float scale) noexcept {
  const float inverse = scale != 0.f ? 1.f / scale : 0.f;
  return inverse >= -std::numeric_limits<float>::max() && inverse <= std::numeric_limits<float>::max() ? inverse : 0.f;
}

}  // namespace detail

/// n numbers times their row's scale.
inline void load_scaled(const Int8* from, Index n, float scale, float* to) noexcept {
  for (Index i = detail::load_wide_i8(from, n, scale, to); i < n; ++i)
    to[i] = static_cast<float>(from[i].value) * scale;
}

/// Writes the 32 numbers of a block to `out`. Exact.
inline void load_block(const BlockQ8_0& block, float* out) noexcept {
  const float scale = detail::factor_of(block.scale);
  if (detail::load_wide_i8(block.values.data(), kBlockSize, scale, out) != 0) return;
  const auto values = block.values;  // bytes may alias `out`: a copy lets compilers vectorise
  for (std::size_t i = 0; i < values.size(); ++i) out[i] = scale * static_cast<float>(values[i]);
}

/// Writes the 32 numbers of a block to `out`. Exact.
inline void load_block(const BlockQ4_0& block, float* out) noexcept {
  const float scale = detail::factor_of(block.scale);
  if (detail::load_wide_i4(block.pairs.data(), kBlockSize, scale, out) != 0) return;
  const auto pairs = block.pairs;  // as above
  constexpr std::size_t half = kBlockSize / 2;
  for (std::size_t i = 0; i < half; ++i) {
    out[i] = scale * static_cast<float>((pairs[i] & 0xf) - 8);
    out[i + half] = scale * static_cast<float>((pairs[i] >> 4) - 8);
  }
}

/// A block of the 32 numbers at `in`, bit for bit as ggml's reference quantisation makes it (`quantize_row_q8_0_ref`):
/// scale max|x| / 127, rounded to fp16 only when it is stored, values rounded to nearest, ties away from zero.
///
/// The scale overflows to infinity from 8.3e6 on, as in ggml. Where ggml's result is undefined, ours is this: a block
/// with a NaN or an infinity reads as NaN throughout, and one whose scale has no finite reciprocal holds zeros.
inline void store_block(const float* in, BlockQ8_0& block) noexcept {
  const float scale = detail::largest_magnitude(in, 1, kBlockSize) / 127.f;
  block = {.scale = from_float<Float16>(scale)};
  if (!(scale <= std::numeric_limits<float>::max())) return;
  const float inverse = detail::reciprocal(scale);
  for (std::size_t i = 0; i < block.values.size(); ++i) {
    const float scaled = in[i] * inverse;
    block.values[i] = static_cast<std::int8_t>(detail::nearest_integer(static_cast<double>(scaled)));
  }
}

/// A block of the 32 numbers at `in`, bit for bit as ggml's reference quantisation makes it (`quantize_row_q4_0_ref`,
/// compiled without contraction): with x the first number of largest magnitude, the scale is x / -8, rounded to fp16
/// only when it is stored; q is the quotient + 8.5, cut off, at most 15.
///
/// The scale overflows to infinity from 5.2e5 on, as in ggml. Where ggml's result is undefined, ours is as for q8_0.
inline void store_block(const float* in, BlockQ4_0& block) noexcept {
  float largest = 0.f;  // the first of largest magnitude, with its sign
  std::uint32_t most = 0;
  for (Index i = 0; i < kBlockSize; ++i) {
    const std::uint32_t magnitude = std::bit_cast<std::uint32_t>(in[i]) & 0x7fffffffu;
    if (magnitude > most) largest = in[i];
    most = std::max(most, magnitude);
  }
  const float scale = largest / -8.f;
  const bool finite = most < 0x7f800000u;
  const float inverse = detail::reciprocal(scale);
  block = {.scale = from_float<Float16>(scale)};
  const auto four_bits = [inverse, finite](float x) -> unsigned {
    const float scaled = finite ? x * inverse : 0.f;
    return std::min(15u, static_cast<unsigned>(detail::at_fp32_precision(static_cast<double>(scaled) + 8.5)));
  };
  constexpr std::size_t half = kBlockSize / 2;
  for (std::size_t i = 0; i < half; ++i) {
    block.pairs[i] = static_cast<std::uint8_t>(four_bits(in[i]) | four_bits(in[i + half]) << 4);
  }
}

/// The scale of a row of `Int8` whose largest magnitude is `most`: most / 127, rounded to 17 significant bits, so that
/// every number of the row is exact in fp32 and quantising a row that was read gives the same bytes again. 0 (a row of
/// zeros) where it would be below 2^-100; `most` itself where that is not finite (the row then reads as NaN).
[[nodiscard]] constexpr float int8_scale(float most) noexcept {
  if (!(most <= std::numeric_limits<float>::max())) return most;
  const float scale = most / 127.f;
  if (scale < 0x1p-100f) return 0.f;
  return std::bit_cast<float>(detail::shift_to_nearest_even(std::bit_cast<std::uint32_t>(scale), 7) << 7);
}

/// x / scale to the nearest integer, ties away from zero, in [-127, 127]; 0 where the scale is 0 or not finite.
[[nodiscard]] constexpr Int8 int8_of(float x, float scale) noexcept {
  if (!(scale > 0.f && scale <= std::numeric_limits<float>::max())) return {};
  const double scaled = static_cast<double>(x) / static_cast<double>(scale);
  return {static_cast<std::int8_t>(detail::nearest_integer(std::clamp(scaled, -127.0, 127.0)))};
}

}  // namespace kvfold
