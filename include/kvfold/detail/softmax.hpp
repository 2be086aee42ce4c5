/// \file
/// Exponentials, the larger part of softmax: with vectors of 64 to 128 numbers they take a quarter to a half as long as
/// the dot products before them. Eigen's exp has twice as many instructions.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>

#include "kvfold/detail/lanes.hpp"
#include "kvfold/types.hpp"

namespace kvfold::detail {

/// exp(x), to 1e-7 of it. Below -87.7 it is 0, above 88 exp(88), which is finite; NaN is NaN. The same lane by lane: a
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
  const Lanes exp_r = (q * r + 1.f) * r + 1.f;
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

/// What is known of n softmax rows: maxima so far, or what is as near to them as fp32 needs, and sums of exp(logit -
/// maximum). Rows of which nothing is known have a maximum of `kNoMax` and a sum of 0.
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

// Tiles of logits [n rows of the cache][stride], with a column for each query row: what follows is of kLanes of these
// columns, so that nothing has to be taken from one lane to another.

/// Makes -infinity of what queries do not see: of column i all but the first seen[i] rows.
inline void hide_columns(float* x, Index stride, Index n, const std::int32_t* seen) noexcept {
  using Integers [[gnu::vector_size(sizeof(Lanes))]] = std::int32_t;
  Integers left;
  for (Index i = 0; i < kLanes; ++i) left[i] = seen[i];
  for (Index j = *std::min_element(seen, seen + kLanes); j < n; ++j) {
    const Integers visible = left > static_cast<std::int32_t>(j);
    const Lanes hidden = Lanes{} - std::numeric_limits<float>::infinity();
    store_lanes(visible ? load_lanes(x + j * stride) : hidden, x + j * stride);
  }
}

/// The same for all columns, [n][columns], of a tile that begins with row t: column i sees the rows below visible[i].
inline void hide_unseen(float* x, Index columns, Index n, const Index* visible, Index t) noexcept {
  for (Index c = 0; c < columns; c += kLanes) {
    std::int32_t seen[kLanes];
    for (Index i = 0; i < kLanes; ++i) seen[i] = static_cast<std::int32_t>(std::clamp<Index>(visible[c + i] - t, 0, n));
    hide_columns(x + c, columns, n, seen);
  }
}

/// The largest of each column, at least `kNoMax`.
[[nodiscard]] inline Lanes max_of_columns(const float* x, Index stride, Index n) noexcept {
  constexpr Index kAtATime = 4;  // since one has to wait for the one before
  Lanes most[kAtATime];
  std::fill_n(most, kAtATime, Lanes{} + kNoMax);
  Index j = 0;
  for (; j + kAtATime <= n; j += kAtATime) {
    for (Index i = 0; i < kAtATime; ++i) most[i] = larger(most[i], load_lanes(x + (j + i) * stride));
  }
  for (; j < n; ++j) most[0] = larger(most[0], load_lanes(x + j * stride));
  return larger(larger(most[0], most[1]), larger(most[2], most[3]));
}

/// x = exp(x - shift); \returns the columns' sums.
inline Lanes exp_columns(float* x, Index stride, Index n, Lanes shift) noexcept {
  Lanes sums = {};
  for (Index j = 0; j < n; ++j) {
    const Lanes e = exp_lanes(load_lanes(x + j * stride) - shift);
    store_lanes(e, x + j * stride);
    sums += e;
  }
  return sums;
}

/// to[j] += the sum of factor[i] * x[j][i], for n rows of x and `width` columns, whole lanes of them.
inline void add_row_sums(const float* x, Index stride, Index n, const float* factor, Index width, float* to) noexcept {
  for_groups_of_rows<kLanes>(n, [&](Index j, auto rows) {
    Lanes sums[kLanes];
    clear(sums);
    for (Index i = 0; i < width; i += kLanes) {
      const Lanes f = load_lanes(factor + i);
      for (Index r = 0; r < rows(); ++r) sums[r] = load_lanes(x + (j + r) * stride + i) * f + sums[r];
    }
    store_first_lanes(load_first_lanes(to + j, rows(), 0.f) + sums_of_each(sums), rows(), to + j);
  });
}

}  // namespace kvfold::detail
