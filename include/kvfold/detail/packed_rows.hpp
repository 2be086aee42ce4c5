/// \file
/// Rows in packed bytes: objects of a storage type at addresses that need not be aligned for it.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>
#include <type_traits>

#include "kvfold/detail/row_codec.hpp"
#include "kvfold/types.hpp"

namespace kvfold::detail {

/// A storage type whose units mean the same wherever they lie: rows without scales of their own.
template <class E>
concept Packable = Stored<E> && !kRowScaled<E>;

/// Units that are copied to an aligned place and converted there.
inline constexpr Index kPackedUnits = 64;

/// Units one after the other to floats.
template <Packable E>
void load_packed(const std::byte* from, Index units, float* to) noexcept {
  std::array<E, kPackedUnits> aligned;
  for (Index first = 0; first < units; first += kPackedUnits) {
    const Index count = std::min(kPackedUnits, units - first);
    std::memcpy(aligned.data(), from + first * static_cast<Index>(sizeof(E)),
                static_cast<std::size_t>(count) * sizeof(E));
    load_units(aligned.data(), count, to + first * kUnit<E>);
  }
}

/// n rows of `width` floats whose channels are columns, `column_bytes` apart; `from` is the first row's first channel.
template <Packable E>
  requires Element<E>
void load_packed_columns(const std::byte* from, Index column_bytes, Index n, Index width, float* to) noexcept {
  std::array<E, kTransposeTile> aligned;
  for (Index first = 0; first < n; first += kTransposeTile) {
    const Index count = std::min(kTransposeTile, n - first);
    for (Index d = 0; d < width; ++d) {
      std::memcpy(aligned.data(), from + d * column_bytes + first * static_cast<Index>(sizeof(E)),
                  static_cast<std::size_t>(count) * sizeof(E));
      for (Index i = 0; i < count; ++i) {
        to[(first + i) * width + d] = to_float(aligned[static_cast<std::size_t>(i)]);
      }
    }
  }
}

/// Floats to units that are `stride_bytes` apart, as `write_row` makes them.
template <Packable E>
void store_packed(const float* from, Index units, std::byte* to, Index stride_bytes) noexcept {
  std::array<E, kPackedUnits> aligned;
  for (Index first = 0; first < units; first += kPackedUnits) {
    const Index count = std::min(kPackedUnits, units - first);
    write_row<E>(from + first * kUnit<E>, count * kUnit<E>, aligned.data(), 1, nullptr);
    for (Index i = 0; i < count; ++i) {
      std::memcpy(to + (first + i) * stride_bytes, &aligned[static_cast<std::size_t>(i)], sizeof(E));
    }
  }
}

}  // namespace kvfold::detail
