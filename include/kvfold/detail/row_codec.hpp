/// \file
/// The one place where rows are converted or moved.
#pragma once

#include <algorithm>

#include "kvfold/storage/quantised.hpp"

namespace kvfold::detail {

template <Stored E>
constexpr Index row_units(Index width) noexcept {
  return width / kUnit<E>;
}
template <Stored E>
constexpr bool width_fits(Index width) noexcept {
  return width % kUnit<E> == 0;
}
template <Stored E>
constexpr Index row_bytes(Index width) noexcept {
  return row_units<E>(width) * static_cast<Index>(sizeof(E)) + (kRowScaled<E> ? 4 : 0);
}

template <Stored E>
void read_rows(const E* rows, Index token_stride, Index dim_stride, Index n, Index width, const float* /*scales*/,
               Index /*scale_stride*/, float* out) noexcept {
  constexpr Index tile = 16;
  if (dim_stride == 1 && token_stride == width) return load_floats(rows, n * width, out);
  if (dim_stride == 1) {
    for (Index i = 0; i < n; ++i) load_floats(rows + i * token_stride, width, out + i * width);
    return;
  }
  for (Index first = 0; first < n; first += tile) {
    const Index count = std::min(tile, n - first);
    for (Index d = 0; d < width; ++d) {
      const E* column = rows + first * token_stride + d * dim_stride;
      for (Index i = 0; i < count; ++i) out[(first + i) * width + d] = to_float(column[i * token_stride]);
    }
  }
}

template <Stored E>
void write_row(const float* in, Index width, E* row, Index dim_stride, float* /*scale*/) noexcept {
  for (Index d = 0; d < width; ++d) row[d * dim_stride] = from_float<E>(in[d]);
}

template <Stored E>
void copy_row(const E* from, E* to, Index dim_stride, Index width) noexcept {
  for (Index d = 0; d < row_units<E>(width); ++d) to[d * dim_stride] = from[d * dim_stride];
}

template <Stored E>
const float* rows_in_place(const E* rows, Index token_stride, Index dim_stride, Index width) noexcept {
  if constexpr (std::same_as<E, float>) {
    if (dim_stride == 1 && token_stride == width) return rows;
  }
  return nullptr;
}

}  // namespace kvfold::detail
