/// \file
/// Exponentials, the larger part of softmax: with vectors of 64 to 128 numbers they take a quarter to a half as long as
/// the dot products before them. Eigen's exp has twice as many instructions.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>

#include "kvfold/detail/lanes.hpp"
#include "kvfold/types.hpp"

namespace kvfold::detail {

/// exp(x), to 1.5e-7 of it. Below -87.7 it is 0, above 88 exp(88), which is finite; NaN is NaN. The same lane by lane: a
/// number's exp does not depend on where it lies, as Eigen's does, whose loops end with another exp.
///
/// exp(x) = 2^n * exp(r) with |r| <= ln(2) / 2, and exp(r) = 1 + r + r^2 * q(r) for the q of degree 4 with the smallest
/// largest relative error, 3e-9 (found by Remez's exchange).
[[nodiscard, gnu::always_inline]] inline Lanes exp_lanes(Lanes x) noexcept {
  using Integers [[gnu::vector_size(sizeof(Lanes))]] = std::uint32_t;
  constexpr float kLog2E = 0x1.715476p+0f;
  constexpr float kLn2High = 0x1.63p-1f, kLn2Low = -0x1.bd0106p-13f;  // n * kLn2High has no rounding
  constexpr int kMantissaBits = 23;
  constexpr float kToInteger = 0x1.8p23f + 127;  // what is added to it is rounded to an integer, in its lowest bits
  const Lanes y = smaller(larger(x, Lanes{} - 88.f), Lanes{} + 88.f);
  const Lanes biased = in_register(y * kLog2E + kToInteger);  // n and the bias of exponents, 0 to 254
  const Lanes n = biased - kToInteger;
  const Lanes r = (y - n * kLn2High) - n * kLn2Low;
  Lanes q = 0x1.6a23dp-10f * r + 0x1.123a2p-7f;
  q = q * r + 0x1.5558f2p-5f;
  q = q * r + 0x1.555492p-3f;
  q = q * r + 0x1.fffffcp-2f;
  const Lanes exp_r = q * (r * r) + (r + 1.f);
  return exp_r * std::bit_cast<Lanes>(std::bit_cast<Integers>(biased) << kMantissaBits);
}

/// x = exp(x - shift); \returns the sum.
inline float exp_shifted(float* x, Index n, float shift) noexcept {
  Lanes sums = {};
  const Index whole = n - n % kLanes;
  for (Index i = 0; i < whole; i += kLanes) {
    const Lanes e = exp_lanes(load_lanes(x + i) - shift);
    store_lanes(e, x + i);
    sums += e;
  }
  if (whole < n) {
    const Lanes e = exp_lanes(load_first_lanes(x + whole, n - whole, std::numeric_limits<float>::lowest()) - shift);
    store_first_lanes(e, n - whole, x + whole);
    sums += e;
  }
  return sum_of_lanes(sums);
}

/// What is known of n softmax rows: maxima so far, and sums of exp(logit - maximum). Rows of which nothing is known
/// have a maximum of `kNoMax` and a sum of 0.
inline constexpr float kNoMax = std::numeric_limits<float>::lowest();

/// Takes the maxima and sums of one more tile in.
inline void join_softmax(const float* tile_max, const float* tile_sum, Index n, float* max, float* sum) noexcept {
  for (Index i = 0; i < n; i += kLanes) {
    const Index count = std::min(kLanes, n - i);
    const auto load = [&](const float* from) { return load_first_lanes(from + i, count, 0.f); };
    const Lanes old_max = load(max), new_max = load(tile_max), joined = larger(old_max, new_max);
    const Lanes joined_sum = load(sum) * exp_lanes(old_max - joined) + load(tile_sum) * exp_lanes(new_max - joined);
    store_first_lanes(joined_sum, count, sum + i);
    store_first_lanes(joined, count, max + i);
  }
}

/// factor = scale * exp(x - max), for n rows.
inline void exp_factors(const float* x, const float* max, const float* scale, Index n, float* factor) noexcept {
  for (Index i = 0; i < n; i += kLanes) {
    const Index count = std::min(kLanes, n - i);
    const auto load = [&](const float* from) { return load_first_lanes(from + i, count, 0.f); };
    store_first_lanes(load(scale) * exp_lanes(load(x) - load(max)), count, factor + i);
  }
}

}  // namespace kvfold::detail
