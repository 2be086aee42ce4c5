/// \file
/// Dense kernels on plain pointers: the only place, with view/eigen_map.hpp, that knows Eigen.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include <Eigen/Core>

#include "kvfold/detail/lanes.hpp"
#include "kvfold/types.hpp"

namespace kvfold::detail {

using RowMatrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using ConstRows = Eigen::Map<const RowMatrix, Eigen::Unaligned, Eigen::OuterStride<>>;
using Rows = Eigen::Map<RowMatrix, Eigen::Unaligned, Eigen::OuterStride<>>;
using ConstFloats = Eigen::Map<const Eigen::ArrayXf>;
using Floats = Eigen::Map<Eigen::ArrayXf>;

/// Rows of a tile along the token axis, and along the axis of queries or candidates.
inline constexpr Index kKeyTile = 128;
inline constexpr Index kQueryTile = 64;

/// A loop that compilers vectorise, as they do not with one that may stop.
[[nodiscard]] inline bool all_finite(const float* x, Index n) noexcept {
  std::uint32_t bad = 0;
  for (Index i = 0; i < n; ++i) {
    bad |= static_cast<std::uint32_t>((std::bit_cast<std::uint32_t>(x[i]) & 0x7fffffffu) >= 0x7f800000u);
  }
  return bad == 0;
}
[[nodiscard]] inline float max_of(const float* x, Index n) noexcept { return ConstFloats(x, n).maxCoeff(); }
[[nodiscard]] inline float min_of(const float* x, Index n) noexcept { return ConstFloats(x, n).minCoeff(); }

/// Whether all of x are finite and at least 0: the bits of such numbers are below those of all others but -0.
[[nodiscard]] inline bool all_weights(const float* x, Index n) noexcept {
  std::uint32_t bad = 0;
  for (Index i = 0; i < n; ++i) {
    const auto bits = std::bit_cast<std::uint32_t>(x[i]);
    bad |= static_cast<std::uint32_t>(bits >= 0x7f800000u) & static_cast<std::uint32_t>(bits != 0x80000000u);
  }
  return bad == 0;
}
/// How many of x are above a number. A loop that compilers vectorise.
[[nodiscard]] inline Index count_above(const float* x, Index n, float least) noexcept {
  std::int32_t count = 0;
  for (Index i = 0; i < n; ++i) count += x[i] > least ? 1 : 0;
  return count;
}
/// Of each set of four places, as bits: those in it, in order, and how many there are.
struct PlacesOfFour {
  RowId places[16][4] = {};
  RowId count[16] = {};
  constexpr PlacesOfFour() noexcept {
    for (int set = 0; set < 16; ++set) {
      for (RowId place = 0; place < 4; ++place) {
        if ((set >> place & 1) != 0) places[set][count[set]++] = place;
      }
    }
  }
};
inline constexpr PlacesOfFour kPlacesOfFour;
/// How many places `places_above` may write beyond those that it finds.
inline constexpr Index kPlacesBeyond = 4;
/// Where they are. Four places are written at a time, found or not, since nobody can foresee how many there are.
/// \param places has room for n + kPlacesBeyond
inline void places_above(const float* x, Index n, float least, RowId* places) noexcept {
  for (Index i = 0; i < n; i += kLanes) {
    const Lanes some = load_first_lanes(x + i, std::min(kLanes, n - i), least);
    const std::uint32_t above = lanes_above(some, Lanes{} + least);
    for (Index j = 0; j < kLanes; j += 4) {
      const std::uint32_t set = above >> j & 15u;
      for (Index k = 0; k < 4; ++k) places[k] = static_cast<RowId>(i + j) + kPlacesOfFour.places[set][k];
      places += kPlacesOfFour.count[set];
    }
  }
}

/// Several numbers at a time.
[[nodiscard]] inline double sum_in_fp64(const float* x, Index n) noexcept {
  constexpr Index kSums = 8;
  const Index whole = n / kSums * kSums;
  double sums[kSums] = {}, sum = 0.0;
  for (Index i = 0; i < whole; i += kSums) {
    for (Index k = 0; k < kSums; ++k) sums[k] += static_cast<double>(x[i + k]);
  }
  for (const double part : sums) sum += part;
  for (Index i = whole; i < n; ++i) sum += static_cast<double>(x[i]);
  return sum;
}

inline void scale(float* x, Index n, float factor) noexcept { Floats(x, n) *= factor; }
inline void multiply(float* x, const float* factors, Index n) noexcept { Floats(x, n) *= ConstFloats(factors, n); }
inline void add(float* to, const float* x, Index n) noexcept { Floats(to, n) += ConstFloats(x, n); }
/// to = max(to, x)
inline void raise(float* to, const float* x, Index n) noexcept { Floats(to, n) = Floats(to, n).max(ConstFloats(x, n)); }
inline void divide(float* x, Index n, float divisor) noexcept { Floats(x, n) /= divisor; }
inline void add_number(float* x, Index n, float number) noexcept { Floats(x, n) += number; }
inline void add_scaled(float* to, const float* x, Index n, float factor) noexcept {
  Floats(to, n) += factor * ConstFloats(x, n);
}

/// x = max(x, 0) * max(y, 0).
inline void multiply_clamped(float* x, const float* y, Index n) noexcept {
  Floats v(x, n);
  v = v.max(0.f) * ConstFloats(y, n).max(0.f);
}

/// 1 / ||row|| for each of n rows, 0 for a zero row, NaN for a row with a NaN or an infinity in it. Tiny and huge rows are
/// summed in fp64; the result is at most 3.4e38, so a row with a norm below 3e-39 stays shorter than 1.
inline void inverse_norms(const float* rows, Index n, Index width, float* out) noexcept {
  for (Index i = 0; i < n; ++i) {
    const ConstFloats row(rows + i * width, width);
    const float squared = row.square().sum();
    if (squared > 1e-30f && squared < 1e30f) {
      out[i] = 1.f / std::sqrt(squared);
      continue;
    }
    if (!row.allFinite()) {
      out[i] = std::numeric_limits<float>::quiet_NaN();
      continue;
    }
    double exact = 0.0;
    for (Index d = 0; d < width; ++d) exact += static_cast<double>(row[d]) * static_cast<double>(row[d]);
    out[i] = exact > 0.0 ? static_cast<float>(std::min(1.0 / std::sqrt(exact), 3.4e38)) : 0.f;
  }
}

}  // namespace kvfold::detail
