/// \file
/// For engines that store K and V turned by a Hadamard matrix: turns queries alike, and rows back.
#pragma once

#include <cmath>
#include <span>

#include "kvfold/detail/rows.hpp"
#include "kvfold/status.hpp"

namespace kvfold {

/// Multiplies each `block` consecutive floats of each row by the normalised Hadamard matrix of that size (H(1) = 1,
/// H(2n) = [H(n) H(n); H(n) -H(n)] / sqrt(2)), in place. The matrix is its own inverse: the same call turns rows back.
///
/// \param rows  n * `width` floats, n >= 0: queries of any layout whose rows are dense, or rows of a cache
/// \param width floats in a row, at least 1
/// \param block a power of two that divides `width`; 0 and 1 leave the rows as they are
/// \returns a status, with the rows unchanged, when `width` does not divide the size of `rows` or `block` is not as
/// above. Cost O(rows.size() * log(block)).
[[nodiscard]] inline Status rotate_channels(std::span<float> rows, Index width, Index block) noexcept {
  if (width < 1 || width > kMaxWidth) return {StatusCode::invalid_argument, "width", "must be in [1, kMaxWidth]"};
  if (static_cast<Index>(rows.size()) % width != 0) {
    return {StatusCode::size_mismatch, "rows", "must be a whole number of rows of `width` floats"};
  }
  if (!detail::is_channel_block(block, width)) {
    return {StatusCode::invalid_argument, "block", "must be a power of two that divides width, or 0"};
  }
  if (block < 2) return {};
  const float factor = 1.f / std::sqrt(static_cast<float>(block));
  for (std::size_t first = 0; first < rows.size(); first += detail::at(block)) {
    float* x = rows.data() + first;
    for (Index half = 1; half < block; half *= 2) {
      for (Index i = 0; i < block; i += 2 * half) {
        for (Index j = i; j < i + half; ++j) {
          const float a = x[j], b = x[j + half];
          x[j] = a + b;
          x[j + half] = a - b;
        }
      }
    }
    for (Index j = 0; j < block; ++j) x[j] *= factor;
  }
  return {};
}

}  // namespace kvfold
