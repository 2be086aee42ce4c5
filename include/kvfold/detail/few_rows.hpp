/// \file
/// Products of a few rows (the queries of one decode step) with many stored ones: Eigen's products pack their operands,
/// which costs more than the product where one of them has few rows. Stored rows are converted in registers where the
/// target has instructions for that. Written with the vector types of g++ and clang, which exist on every target.
#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "kvfold/detail/lanes.hpp"
#include "kvfold/detail/row_codec.hpp"
#include "kvfold/detail/stored_rows.hpp"
#include "kvfold/detail/wide_loads.hpp"
#include "kvfold/types.hpp"

namespace kvfold::detail {

/// Whether rows of E can be read by `load_lanes_of`.
template <Stored E>
inline constexpr bool kHasLanes = std::same_as<E, float> || std::same_as<E, BFloat16> ||
                                  (kHasWideLoads &&
                                   (std::same_as<E, Float16> || std::same_as<E, Float8E4M3> || std::same_as<E, Int8>));

/// What numbers of E are to be multiplied with that `load_lanes_of` has read, and so the products below: a power of two.
template <Stored E>
inline constexpr float kLaneFactor = std::same_as<E, Float8E4M3> ? 0x1p8f : 1.f;

/// kLanes stored numbers by kLaneFactor, before any scale.
template <Stored E>
[[nodiscard]] Lanes load_lanes_of(const E* from) noexcept {
  if constexpr (std::same_as<E, float>) {
    return load_lanes(from);
  } else if constexpr (std::same_as<E, BFloat16>) {
    return load_bf16_lanes(from);
  } else if constexpr (std::same_as<E, Int8>) {
    return load_i8_lanes(from);
  } else if constexpr (std::same_as<E, Float8E4M3>) {
    return load_f8_lanes(from);
  } else {
    return load_f16_lanes(from);
  }
}
/// Registers that are best loaded at a time: fp8 is converted 16 numbers at a time.
template <Stored E>
inline constexpr Index kLoadedTogether = (std::same_as<E, Float8E4M3> && kLanes == 8) ? 2 : 1;
template <Stored E>
void load_lanes_of(const E* from, Lanes (&to)[1]) noexcept {
  to[0] = load_lanes_of(from);
}
inline void load_lanes_of(const Float8E4M3* from, Lanes (&to)[2]) noexcept { load_twice_f8_lanes(from, to); }
/// One of them.
template <Stored E>
[[nodiscard]] float load_lane_of(E x) noexcept {
  return load_unit(x) * (1.f / kLaneFactor<E>);
}

/// Bytes of so many elements of a row.
template <Stored E>
[[nodiscard]] constexpr Index bytes_of(Index elements) noexcept {
  return elements * static_cast<Index>(sizeof(E)) / kUnit<E>;
}

inline constexpr Index kMostFewRows = 4;  ///< of one pass of the kernels below
/// Rows that `add_few` goes over several times, for a part of their columns each time: they stay in the first cache.
inline constexpr Index kFewDepth = 16;

/// Products that `few_dots` has in registers at a time: those of kRows rows with so many others, kLanes in all.
template <Index kRows>
inline constexpr Index kFewColumns = kLanes / (kRows == 3 ? 4 : kRows);

/// What elements [first, last) add to the products of kRows rows of a and kColumns others: lane i * kColumns + j.
template <Index kRows, Index kColumns, Stored E>
[[nodiscard, gnu::noinline]] Lanes dots_of_rest(const float* a, Index a_stride, const E* const* rows, Index first,
                                                Index last) noexcept {
  float sums[kLanes] = {};
  for (Index d = first; d < last; ++d) {
    for (Index j = 0; j < kColumns; ++j) {
      const float y = load_lane_of(rows[j][d]);
      for (Index i = 0; i < kRows; ++i) sums[i * kColumns + j] += a[i * a_stride + d] * y;
    }
  }
  return load_lanes(sums);
}

/// `few_dots` for kRows rows of a.
template <Index kRows, class Rows>
void few_dots_of(const float* a, Index a_stride, const Rows& b, Index k, float* c, Index c_stride) noexcept {
  using E = typename Rows::Unit;
  constexpr Index kColumns = kFewColumns<kRows>, kStep = kLoadedTogether<E>;
  typename Rows::Ahead next(b, 0);
  // Where it is a call, g++ stores all sums before it adds up their lanes.
  const auto multiply = [&](const auto& rows, Index first, auto count) __attribute__((always_inline)) {
    typename Rows::Ahead ahead = next;  // in registers
    Lanes sums[kLanes];
    clear(sums);
    Index d = 0;
    for (; d + kStep * kLanes <= k; d += kStep * kLanes) {
      ahead.template fetch<bytes_of<E>(kColumns * kStep * kLanes)>();
      Lanes y[kLanes][std::size_t{kStep}];
      for_constants<kColumns>([&](auto j) {
        load_lanes_of(rows[j] + d, y[j]);
        for (Index s = 0; kRows > 1 && s < kStep; ++s) y[j][s] = in_register(y[j][s]);  // else it is used only once
      });
      for_constants<kRows * kStep>([&](auto n) {
        constexpr Index i = n / kStep, s = n % kStep;
        const Lanes x = in_register(load_lanes(a + i * a_stride + d + s * kLanes));
        for_constants<kColumns>([&](auto j) { sums[i * kColumns + j] = x * y[j][s] + sums[i * kColumns + j]; });
      });
    }
    next = ahead;
    Lanes dots = sums_of_each(sums);
    if (d < k) dots += dots_of_rest<kRows, kColumns>(a, a_stride, rows, d, k);
    float out[kLanes];
    store_lanes(dots, out);
    for (Index i = 0; i < kRows; ++i) std::copy_n(out + i * kColumns, count, c + i * c_stride + first);
  };
  for_columns<kColumns>(b, multiply);
}

/// to[i] = x times row places[i] of rows [..][width], for n places.
inline void dots_at(const float* x, const float* rows, Index width, const RowId* places, Index n, float* to) noexcept {
  for (Index first = 0; first < n; first += kLanes) {
    const Index count = std::min(kLanes, n - first);
    const float* row[kLanes];
    for (Index j = 0; j < kLanes; ++j) row[j] = rows + places[first + std::min(j, count - 1)] * width;
    Lanes sums[kLanes];
    clear(sums);
    Index d = 0;
    for (; d + kLanes <= width; d += kLanes) {
      const Lanes own = load_lanes(x + d);
      for (Index j = 0; j < kLanes; ++j) sums[j] = own * load_lanes(row[j] + d) + sums[j];
    }
    float out[kLanes];
    store_lanes(sums_of_each(sums), out);
    for (; d < width; ++d) {
      for (Index j = 0; j < kLanes; ++j) out[j] += x[d] * row[j][d];
    }
    store_first_lanes(load_lanes(out), count, to + first);
  }
}

/// Registers of columns whose sums `add_few` has at a time for each of kRows rows. Of eight sums each waits for its own last
/// step; 16 registers have room for twelve, if they are gone over in another order.
inline constexpr Index kMostWidth = 8, kOtherOrder = 3;
template <Stored E, Index kRows>
inline constexpr Index kSumsBeside = [] {
  if (kLanes < 16 && kRows > 2) return kLoadedTogether<E> == 1 ? kOtherOrder : 2;
  return std::min(kMostWidth, (kLanes == 16 ? 16 : 8) / (kRows == 3 ? 4 : kRows));
}();

/// `add_few` for kRows rows of a, kWidth * kLanes columns of c at a time, from column `first` on.
/// \returns the first column that was not done.
template <Index kRows, Index kWidth, class Rows>
Index add_few_of(const float* a, Index a_stride, const Rows& b, Index n, float* c, Index c_stride,
                 Index first) noexcept {
  using E = typename Rows::Unit;
  constexpr Index kStep = std::min(kLoadedTogether<E>, kWidth);
  for (; first + kWidth * kLanes <= n; first += kWidth * kLanes) {
    Lanes sums[kMostFewRows][kMostWidth];
    for (Index i = 0; i < kRows; ++i) {
      for (Index x = 0; x < kWidth; ++x) sums[i][x] = load_lanes(c + i * c_stride + first + x * kLanes);
    }
    for (Index j = 0; j < b.count; ++j) {
      const E* row = b.row(j) + first;
      b.template fetch_after<bytes_of<E>(kWidth * kLanes)>(j, first);
      if constexpr (kWidth == kOtherOrder) {
        Lanes y[std::size_t{kWidth}];
        for (Index x = 0; x < kWidth; ++x) y[x] = in_register(load_lanes_of(row + x * kLanes));
        for (Index i = 0; i < kRows; ++i) {
          const Lanes weight = in_register(a[i * a_stride + j] - Lanes{});  // else there are more in registers
          for (Index x = 0; x < kWidth; ++x) sums[i][x] = weight * y[x] + sums[i][x];
        }
      } else {
        const auto add = [&](Lanes loaded, Index x) {
          const Lanes y = kRows > 1 ? in_register(loaded) : loaded;  // else it is used only once
          for (Index i = 0; i < kRows; ++i) sums[i][x] = a[i * a_stride + j] * y + sums[i][x];
        };
        for (Index x = 0; x < kWidth; x += kStep) {
          if constexpr (kStep == 1) {  // an array of one takes g++ longer
            add(load_lanes_of(row + x * kLanes), x);
          } else {
            Lanes loaded[std::size_t{kStep}];
            load_lanes_of(row + x * kLanes, loaded);
            for (Index s = 0; s < kStep; ++s) add(loaded[s], x + s);
          }
        }
      }
    }
    for (Index i = 0; i < kRows; ++i) {
      for (Index x = 0; x < kWidth; ++x) store_lanes(sums[i][x], c + i * c_stride + first + x * kLanes);
    }
  }
  return first;
}

template <Index kRows, class Rows>
void add_few_of(const float* a, Index a_stride, const Rows& b, Index n, float* c, Index c_stride) noexcept {
  constexpr Index kWidth = kSumsBeside<typename Rows::Unit, kRows>;
  Index wide = n / kLanes / kWidth;
  if (kWidth == kOtherOrder && n / kLanes % kWidth == 1 && wide > 0) --wide;  // and then two and two
  Index first = add_few_of<kRows, kWidth>(a, a_stride, b, wide * kWidth * kLanes, c, c_stride, 0);
  if constexpr (kWidth == kOtherOrder) first = add_few_of<kRows, 2>(a, a_stride, b, n, c, c_stride, first);
  first = add_few_of<kRows, 1>(a, a_stride, b, n, c, c_stride, first);
  for (; first < n; ++first) {
    for (Index j = 0; j < b.count; ++j) {
      const float y = load_lane_of(b.row(j)[first]);
      for (Index i = 0; i < kRows; ++i) c[i * c_stride + first] += a[i * a_stride + j] * y;
    }
  }
}

/// c = a * b^T by kLaneFactor, for a [m][k], rows b of k numbers and c [m][rows of b]; a and c have the given row strides.
template <class Rows>
  requires kHasLanes<typename Rows::Unit>
void few_dots(const float* a, Index a_stride, Index m, const Rows& b, Index k, float* c, Index c_stride) noexcept {
  for_groups_of_rows<kMostFewRows>(m, [&](Index i, auto rows) {
    few_dots_of<rows()>(a + i * a_stride, a_stride, b, k, c + i * c_stride, c_stride);
  });
}

/// c += a * b by kLaneFactor, for a [m][rows of b], rows b of n numbers and c [m][n]; a and c have the given row strides.
template <class Rows>
  requires kHasLanes<typename Rows::Unit>
void add_few(const float* a, Index a_stride, Index m, const Rows& b, Index n, float* c, Index c_stride) noexcept {
  for (Index first = 0; first < b.count; first += kFewDepth) {
    const Rows some = b.part(first, kFewDepth);
    for_groups_of_rows<kMostFewRows>(m, [&](Index i, auto rows) {
      add_few_of<rows()>(a + i * a_stride + first, a_stride, some, n, c + i * c_stride, c_stride);
    });
  }
}

}  // namespace kvfold::detail
