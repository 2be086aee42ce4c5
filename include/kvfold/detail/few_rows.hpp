/// \file
/// Products of a few rows (the queries of one decode step) with many: Eigen's products pack their operands, which costs
/// more than the product where one of them has few rows. Written with the vector types of g++ and clang, which exist on
/// every target.
#pragma once

#include <algorithm>
#include <array>
#include <utility>

#include "kvfold/types.hpp"

namespace kvfold::detail {

#if defined(__AVX512F__)
inline constexpr Index kLanes = 16;
#elif defined(__AVX__)
inline constexpr Index kLanes = 8;
#else
inline constexpr Index kLanes = 4;
#endif

/// As many floats as the target's registers hold.
using Lanes [[gnu::vector_size(kLanes * sizeof(float))]] = float;

using LanesInMemory [[gnu::vector_size(kLanes * sizeof(float)), gnu::aligned(alignof(float)), gnu::may_alias]] = float;

/// Neither needs aligned memory.
[[nodiscard]] inline Lanes load_lanes(const float* from) noexcept {
  return *reinterpret_cast<const LanesInMemory*>(from);
}
inline void store_lanes(Lanes x, float* to) noexcept { *reinterpret_cast<LanesInMemory*>(to) = x; }

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
[[nodiscard]] Lanes sums_of_each(const std::array<Lanes, kCount>& x) noexcept {
  if constexpr (kCount == 1) {
    return x[0];
  } else {
    std::array<Lanes, kCount / 2> folded;
    for (std::size_t i = 0; i < folded.size(); ++i) {
      folded[i] = fold_segments<static_cast<Index>(kCount)>(x[2 * i], x[2 * i + 1], std::make_index_sequence<kLanes>{});
    }
    return sums_of_each(folded);
  }
}

/// `few_dots` for kRows rows of a, kLanes products at a time: kRows * kColumns sums of kLanes lanes are in registers.
template <Index kRows>
void few_dots_of(const float* a, Index a_stride, const float* b, Index n, Index k, float* c, Index c_stride) noexcept {
  constexpr Index kColumns = kLanes / (kRows == 3 ? 4 : kRows);
  for (Index first = 0; first < n; first += kColumns) {
    const Index count = std::min(kColumns, n - first);
    std::array<const float*, kColumns> row;  // of b; where there are fewer, the last one again
    for (Index j = 0; j < kColumns; ++j) row[static_cast<std::size_t>(j)] = b + (first + std::min(j, count - 1)) * k;
    std::array<Lanes, kLanes> sums{};
    Index d = 0;
    for (; d + kLanes <= k; d += kLanes) {
      std::array<Lanes, kRows> x;
      for (Index i = 0; i < kRows; ++i) x[static_cast<std::size_t>(i)] = load_lanes(a + i * a_stride + d);
      for (Index j = 0; j < kColumns; ++j) {
        const Lanes y = load_lanes(row[static_cast<std::size_t>(j)] + d);
        for (Index i = 0; i < kRows; ++i) {
          Lanes& sum = sums[static_cast<std::size_t>(i * kColumns + j)];
          sum = x[static_cast<std::size_t>(i)] * y + sum;
        }
      }
    }
    std::array<float, kLanes> out;
    store_lanes(sums_of_each(sums), out.data());
    for (; d < k; ++d) {
      for (Index i = 0; i < kRows; ++i) {
        for (Index j = 0; j < kColumns; ++j) {
          out[static_cast<std::size_t>(i * kColumns + j)] += a[i * a_stride + d] * row[static_cast<std::size_t>(j)][d];
        }
      }
    }
    for (Index i = 0; i < kRows; ++i) {
      const float* from = out.data() + i * kColumns;
      float* to = c + i * c_stride + first;
      if (count == kColumns) {
        std::copy_n(from, kColumns, to);
      } else {
        for (Index j = 0; j < count; ++j) to[j] = from[j];
      }
    }
  }
}

/// `add_few` for kRows rows of a, kWidth * kLanes columns of c at a time, from column `first` on.
/// \returns the first column that was not done.
template <Index kRows, Index kWidth>
Index add_few_of(const float* a, Index a_stride, const float* b, Index k, Index n, float* c, Index c_stride,
                 Index first) noexcept {
  for (; first + kWidth * kLanes <= n; first += kWidth * kLanes) {
    std::array<Lanes, kRows * kWidth> sums;
    for (Index i = 0; i < kRows; ++i) {
      for (Index x = 0; x < kWidth; ++x) {
        sums[static_cast<std::size_t>(i * kWidth + x)] = load_lanes(c + i * c_stride + first + x * kLanes);
      }
    }
    for (Index j = 0; j < k; ++j) {
      const float* row = b + j * n + first;
      for (Index x = 0; x < kWidth; ++x) {
        const Lanes y = load_lanes(row + x * kLanes);
        for (Index i = 0; i < kRows; ++i) {
          Lanes& sum = sums[static_cast<std::size_t>(i * kWidth + x)];
          sum = a[i * a_stride + j] * y + sum;
        }
      }
    }
    for (Index i = 0; i < kRows; ++i) {
      for (Index x = 0; x < kWidth; ++x) {
        store_lanes(sums[static_cast<std::size_t>(i * kWidth + x)], c + i * c_stride + first + x * kLanes);
      }
    }
  }
  return first;
}

template <Index kRows>
void add_few_of(const float* a, Index a_stride, const float* b, Index k, Index n, float* c, Index c_stride) noexcept {
  constexpr Index kWidth = std::min<Index>(8, (kLanes == 16 ? 16 : 8) / kRows);
  Index first = add_few_of<kRows, kWidth>(a, a_stride, b, k, n, c, c_stride, 0);
  first = add_few_of<kRows, 1>(a, a_stride, b, k, n, c, c_stride, first);
  for (; first < n; ++first) {
    for (Index i = 0; i < kRows; ++i) {
      for (Index j = 0; j < k; ++j) c[i * c_stride + first] += a[i * a_stride + j] * b[j * n + first];
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

/// c = a * b^T for a [m][k] and c [m][n] with the given row strides, b [n][k] without gaps.
inline void few_dots(const float* a, Index a_stride, Index m, const float* b, Index n, Index k, float* c,
                     Index c_stride) noexcept {
  for_few_rows(m, [&](Index i, auto rows) {
    few_dots_of<rows()>(a + i * a_stride, a_stride, b, n, k, c + i * c_stride, c_stride);
  });
}

/// c += a * b for a [m][k] and c [m][n] with the given row strides, b [k][n] without gaps.
inline void add_few(const float* a, Index a_stride, Index m, const float* b, Index k, Index n, float* c,
                    Index c_stride) noexcept {
  for_few_rows(m, [&](Index i, auto rows) {
    add_few_of<rows()>(a + i * a_stride, a_stride, b, k, n, c + i * c_stride, c_stride);
  });
}

}  // namespace kvfold::detail
