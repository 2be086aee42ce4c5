/// \file
/// Products of a few rows (the queries of one decode step) with many stored ones: Eigen's products pack their operands,
/// which costs more than the product where one of them has few rows. Stored rows are converted in registers where the
/// target has instructions for that. Written with the vector types of g++ and clang, which exist on every target.
#pragma once

#include <algorithm>
#include <bit>
#include <concepts>
#include <cstdint>
#include <cstring>
#include <utility>

#include "kvfold/detail/row_codec.hpp"
#include "kvfold/detail/wide_loads.hpp"
#include "kvfold/types.hpp"

namespace kvfold::detail {

using LanesInMemory [[gnu::vector_size(kLanes * sizeof(float)), gnu::aligned(alignof(float)), gnu::may_alias]] = float;

/// Neither needs aligned memory.
[[nodiscard]] inline Lanes load_lanes(const float* from) noexcept {
  return *reinterpret_cast<const LanesInMemory*>(from);
}
inline void store_lanes(Lanes x, float* to) noexcept { *reinterpret_cast<LanesInMemory*>(to) = x; }

/// Whether rows of E can be read by `load_lanes_of`.
template <Stored E>
inline constexpr bool kHasLanes = std::same_as<E, float> || std::same_as<E, BFloat16> ||
                                  ((std::same_as<E, Float16> || std::same_as<E, BlockQ8_0>)&&kHasWideLoads);

/// Elements [d, d + kLanes) of a row; d is a multiple of kLanes where they come in blocks.
template <Stored E>
[[nodiscard]] Lanes load_lanes_of(const E* row, Index d) noexcept {
  if constexpr (std::same_as<E, float>) {
    return load_lanes(row + d);
  } else if constexpr (std::same_as<E, BFloat16>) {
    using Halves [[gnu::vector_size(kLanes * sizeof(std::uint16_t))]] = std::uint16_t;
    using Words [[gnu::vector_size(kLanes * sizeof(std::uint32_t))]] = std::uint32_t;
    Halves halves;
    std::memcpy(&halves, row + d, sizeof halves);
    return std::bit_cast<Lanes>(__builtin_convertvector(halves, Words) << 16);
  } else if constexpr (std::same_as<E, Float16>) {
    return load_f16_lanes(row + d);
  } else {
    const BlockQ8_0& block = row[d / kBlockSize];
    return load_i8_lanes(block.values.data() + d % kBlockSize, block.scale.bits);
  }
}

/// Element d of a row.
template <Stored E>
[[nodiscard]] float load_element(const E* row, Index d) noexcept {
  if constexpr (kInBlocks<E>) {
    return factor_of(row[d / kUnit<E>].scale) *
           static_cast<float>(row[d / kUnit<E>].values[static_cast<std::size_t>(d % kUnit<E>)]);
  } else {
    return to_float(row[d]);
  }
}

/// Asks for what will be read `kAhead` bytes further on; harmless where nothing is. Rows of the next tile are the next
/// in memory, and processors fetch too little ahead while they compute.
template <class E>
void fetch_ahead(const E* from, Index bytes) noexcept {
  constexpr Index kAhead = 4096, kLine = 64;
  const auto address = reinterpret_cast<std::uintptr_t>(from) + static_cast<std::uintptr_t>(kAhead);
  for (Index i = 0; i < bytes; i += kLine) {
    __builtin_prefetch(reinterpret_cast<const void*>(address + static_cast<std::uintptr_t>(i)));
  }
}

/// Adds the lower half of every segment to its upper half: the segments of x, then those of y, half as wide as before.
template <Index kSegment, std::size_t... i>
[[nodiscard]] Lanes fold_segments(Lanes x, Lanes y, std::index_sequence<i...>) noexcept {
  constexpr auto source = [](Index lane, Index upper) {
    constexpr Index kHalf = kSegment / 2, kInEach = kLanes / kSegment;
    const Index segment = lane / kHalf;
    return static_cast<int>(segment / kInEach * kLanes + segment % kInEach * kSegment + upper * kHalf + lane % kHalf);
  };
  return __builtin_shufflevector(x, y, source(i, 0)...) + __builtin_shufflevector(x, y, source(i, 1)...);
}

/// Lane i of the result is the sum of the lanes of x[i].
template <std::size_t kCount>
[[nodiscard]] Lanes sums_of_each(const Lanes (&x)[kCount]) noexcept {
  if constexpr (kCount == 1) {
    return x[0];
  } else {
    Lanes folded[kCount / 2];
    for (std::size_t i = 0; i < kCount / 2; ++i) {
      folded[i] = fold_segments<static_cast<Index>(kCount)>(x[2 * i], x[2 * i + 1], std::make_index_sequence<kLanes>{});
    }
    return sums_of_each(folded);
  }
}

inline constexpr Index kMostFewRows = 4, kMostWidth = 8;  ///< of one pass of the kernels below

/// `few_dots` for kRows rows of a, kLanes products at a time: kRows * kColumns sums of kLanes lanes are in registers.
template <Index kRows, Stored E>
void few_dots_of(const float* a, Index a_stride, const E* b, Index n, Index k, float* c, Index c_stride) noexcept {
  constexpr Index kColumns = kLanes / (kRows == 3 ? 4 : kRows);
  const Index units = row_units<E>(k);
  for (Index first = 0; first < n; first += kColumns) {
    const Index count = std::min(kColumns, n - first);
    const E* row[kLanes];  // of b; where there are fewer, the last one again
    for (Index j = 0; j < kColumns; ++j) row[j] = b + (first + std::min(j, count - 1)) * units;
    fetch_ahead(row[0], kColumns * units * static_cast<Index>(sizeof(E)));
    Lanes sums[kLanes] = {};
    Index d = 0;
    for (; d + kLanes <= k; d += kLanes) {
      Lanes x[kMostFewRows];
      for (Index i = 0; i < kRows; ++i) x[i] = load_lanes(a + i * a_stride + d);
      for (Index j = 0; j < kColumns; ++j) {
        const Lanes y = load_lanes_of(row[j], d);
        for (Index i = 0; i < kRows; ++i) sums[i * kColumns + j] = x[i] * y + sums[i * kColumns + j];
      }
    }
    float out[kLanes];
    store_lanes(sums_of_each(sums), out);
    for (; d < k; ++d) {
      for (Index j = 0; j < kColumns; ++j) {
        const float y = load_element(row[j], d);
        for (Index i = 0; i < kRows; ++i) out[i * kColumns + j] += a[i * a_stride + d] * y;
      }
    }
    for (Index i = 0; i < kRows; ++i) {
      const float* from = out + i * kColumns;
      float* to = c + i * c_stride + first;
      if (count == kColumns) {  // a constant count is no call
        std::copy_n(from, kColumns, to);
      } else {
        for (Index j = 0; j < count; ++j) to[j] = from[j];
      }
    }
  }
}

/// `add_few` for kRows rows of a, kWidth * kLanes columns of c at a time, from column `first` on.
/// \returns the first column that was not done.
template <Index kRows, Index kWidth, Stored E>
Index add_few_of(const float* a, Index a_stride, const E* b, Index k, Index n, float* c, Index c_stride,
                 Index first) noexcept {
  const Index units = row_units<E>(n);
  for (; first + kWidth * kLanes <= n; first += kWidth * kLanes) {
    Lanes sums[kMostFewRows][kMostWidth];
    for (Index i = 0; i < kRows; ++i) {
      for (Index x = 0; x < kWidth; ++x) sums[i][x] = load_lanes(c + i * c_stride + first + x * kLanes);
    }
    for (Index j = 0; j < k; ++j) {
      const E* row = b + j * units;
      if (first == 0) fetch_ahead(row, units * static_cast<Index>(sizeof(E)));
      for (Index x = 0; x < kWidth; ++x) {
        const Lanes y = load_lanes_of(row, first + x * kLanes);
        for (Index i = 0; i < kRows; ++i) sums[i][x] = a[i * a_stride + j] * y + sums[i][x];
      }
    }
    for (Index i = 0; i < kRows; ++i) {
      for (Index x = 0; x < kWidth; ++x) store_lanes(sums[i][x], c + i * c_stride + first + x * kLanes);
    }
  }
  return first;
}

template <Index kRows, Stored E>
void add_few_of(const float* a, Index a_stride, const E* b, Index k, Index n, float* c, Index c_stride) noexcept {
  constexpr Index kWidth = std::min(kMostWidth, (kLanes == 16 ? 16 : 8) / kRows);
  Index first = add_few_of<kRows, kWidth>(a, a_stride, b, k, n, c, c_stride, 0);
  first = add_few_of<kRows, 1>(a, a_stride, b, k, n, c, c_stride, first);
  for (; first < n; ++first) {
    for (Index j = 0; j < k; ++j) {
      const float y = load_element(b + j * row_units<E>(n), first);
      for (Index i = 0; i < kRows; ++i) c[i * c_stride + first] += a[i * a_stride + j] * y;
    }
  }
}

/// Calls f(first row, constant number of rows) for up to 4 rows at a time.
template <class F>
void for_few_rows(Index m, F f) noexcept {
  Index i = 0;
  for (; i + 4 <= m; i += 4) f(i, std::integral_constant<Index, 4>{});
  if (m - i == 3) f(i, std::integral_constant<Index, 3>{});
  if (m - i == 2) f(i, std::integral_constant<Index, 2>{});
  if (m - i == 1) f(i, std::integral_constant<Index, 1>{});
}

/// c = a * b^T for a [m][k] and c [m][n] with the given row strides, b [n][k] stored without gaps.
template <Stored E>
void few_dots(const float* a, Index a_stride, Index m, const E* b, Index n, Index k, float* c,
              Index c_stride) noexcept {
  for_few_rows(m, [&](Index i, auto rows) {
    few_dots_of<rows()>(a + i * a_stride, a_stride, b, n, k, c + i * c_stride, c_stride);
  });
}

/// c += a * b for a [m][k] and c [m][n] with the given row strides, b [k][n] stored without gaps.
template <Stored E>
void add_few(const float* a, Index a_stride, Index m, const E* b, Index k, Index n, float* c, Index c_stride) noexcept {
  for_few_rows(m, [&](Index i, auto rows) {
    add_few_of<rows()>(a + i * a_stride, a_stride, b, k, n, c + i * c_stride, c_stride);
  });
}

}  // namespace kvfold::detail
