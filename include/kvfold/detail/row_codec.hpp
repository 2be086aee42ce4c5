/// \file
/// Stored rows to floats, floats to stored rows, and rows from one place to another: the one place where that is done.
///
/// Strides count objects of the storage type (blocks, for the block types). Blocks are made of neighbouring numbers, so
/// their dim stride is 1: views check that, and that widths fit, before they say that they have a shape.
#pragma once

#include <algorithm>
#include <array>
#include <concepts>
#include <cstring>
#include <type_traits>

#include "kvfold/detail/assert.hpp"
#include "kvfold/storage/elements.hpp"
#include "kvfold/storage/quantised.hpp"
#include "kvfold/types.hpp"

namespace kvfold::detail {

/// What `write_row` makes of the scale: writes it where it belongs to the row, else only reads it.
template <Stored E>
using RowScale = std::conditional_t<kRowScaled<E>, float, const float>;

template <Stored E>
[[nodiscard]] constexpr Index row_units(Index width) noexcept {
  return width / kUnit<E>;
}

template <Stored E>
[[nodiscard]] constexpr bool width_fits(Index width) noexcept {
  return width % kUnit<E> == 0;
}

/// Bytes that a row takes, its scale included where it has one of its own.
template <Stored E>
[[nodiscard]] constexpr Index row_bytes(Index width) noexcept {
  return row_units<E>(width) * static_cast<Index>(sizeof(E)) +
         (kRowScaled<E> ? static_cast<Index>(sizeof(float)) : Index{0});
}

/// Tokens of a transposed tensor that are converted together: one cache line of f32 per dim.
inline constexpr Index kTransposeTile = 16;

/// Units one after the other to floats, before any scale.
template <Stored E>
void load_units(const E* from, Index units, float* to) noexcept {
  if constexpr (Element<E>) {
    load_floats(from, units, to);
  } else if constexpr (kUnit<E> == 1) {
    load_scaled(from, units, 1.f, to);
  } else {
    for (Index i = 0; i < units; ++i) load_block(from[i], to + i * kUnit<E>);
  }
}

template <Stored E>
  requires(kUnit<E> == 1)
[[nodiscard]] float load_unit(E x) noexcept {
  if constexpr (Element<E>)
    return to_float(x);
  else
    return static_cast<float>(x.value);
}

/// n rows to n * width floats. Row i begins at rows + i * token_stride, its units are dim_stride apart; its scale,
/// where there is one, is scales[i * scale_stride]. `rows` and `out` must not overlap.
template <Stored E>
void read_rows(const E* rows, Index token_stride, Index dim_stride, Index n, Index width, const float* scales,
               Index scale_stride, float* out) noexcept {
  const bool scaled = kMayBeScaled<E> && scales != nullptr;
  const auto scale_row = [&](Index i) {
    const float scale = scales[i * scale_stride];
    for (Index d = 0; d < width; ++d) out[i * width + d] *= scale;
  };
  if (kInBlocks<E> || dim_stride == 1) {
    const Index units = row_units<E>(width);
    if (token_stride == units && !scaled) return load_units(rows, n * units, out);
    for (Index i = 0; i < n; ++i) {
      if constexpr (kRowScaled<E>) {
        load_scaled(rows + i * token_stride, units, scaled ? scales[i * scale_stride] : 1.f, out + i * width);
      } else {
        load_units(rows + i * token_stride, units, out + i * width);
        if (scaled) scale_row(i);
      }
    }
    return;
  }
  if constexpr (kUnit<E> == 1) {
    for (Index first = 0; first < n; first += kTransposeTile) {
      const Index count = std::min(kTransposeTile, n - first);
      for (Index d = 0; d < width; ++d) {
        const E* column = rows + first * token_stride + d * dim_stride;
        for (Index i = 0; i < count; ++i) out[(first + i) * width + d] = load_unit(column[i * token_stride]);
      }
      for (Index i = 0; i < count && scaled; ++i) scale_row(first + i);
    }
  }
}

/// Writes a row whose numbers are `in_stride` apart. A scale of the row's own is made and stored at `scale`; one that
/// is the engine's divides; null is 1. NaN and infinities become what the storage type makes of them.
template <Stored E>
void write_strided_row(const float* in, Index in_stride, Index width, E* row, Index dim_stride,
                       RowScale<E>* scale) noexcept {
  if constexpr (kInBlocks<E>) {
    for (Index b = 0; b < row_units<E>(width); ++b) {
      const float* from = in + b * kUnit<E> * in_stride;
      if (in_stride == 1) {
        store_block(from, row[b]);
        continue;
      }
      std::array<float, static_cast<std::size_t>(kUnit<E>)> gathered{};
      for (std::size_t i = 0; i < gathered.size(); ++i) gathered[i] = from[static_cast<Index>(i) * in_stride];
      store_block(gathered.data(), row[b]);
    }
  } else if constexpr (kRowScaled<E>) {
    KVFOLD_ASSERT(scale != nullptr);
    *scale = int8_scale(largest_magnitude(in, in_stride, width));
    const float made = *scale;
    for (Index d = 0; d < width; ++d) row[d * dim_stride] = int8_of(in[d * in_stride], made);
  } else {
    if (kMayBeScaled<E> && scale != nullptr) {
      const float divisor = *scale;
      for (Index d = 0; d < width; ++d) row[d * dim_stride] = from_float<E>(in[d * in_stride] / divisor);
      return;
    }
    if (in_stride == 1 && dim_stride == 1) return store_floats(in, width, row);
    for (Index d = 0; d < width; ++d) row[d * dim_stride] = from_float<E>(in[d * in_stride]);
  }
}

/// Writes a row from consecutive floats; see `write_strided_row`.
template <Stored E>
void write_row(const float* in, Index width, E* row, Index dim_stride, RowScale<E>* scale) noexcept {
  write_strided_row(in, 1, width, row, dim_stride, scale);
}

/// Copies the units of a row bit for bit; its scale is the caller's to move.
template <Stored E>
void copy_row(const E* from, E* to, Index dim_stride, Index width) noexcept {
  const Index units = row_units<E>(width);
  if (dim_stride == 1) {
    if (units > 0) std::memmove(to, from, static_cast<std::size_t>(units) * sizeof(E));
    return;
  }
  for (Index u = 0; u < units; ++u) std::memcpy(to + u * dim_stride, from + u * dim_stride, sizeof(E));
}

/// `rows` itself where rows of fp32 lie one after the other, else nullptr.
template <Stored E>
[[nodiscard]] const float* rows_in_place(const E* rows, Index token_stride, Index dim_stride, Index width) noexcept {
  if constexpr (std::same_as<E, float>) {
    if (dim_stride == 1 && token_stride == width) return rows;
  }
  return nullptr;
}

}  // namespace kvfold::detail
