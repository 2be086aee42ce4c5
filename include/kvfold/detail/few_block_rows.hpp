/// \file
/// Products of a few rows with many that are stored in blocks of integers of 8 or 4 bits. The few are rounded to 16 bits:
/// products are then of integers, and there are instructions for 16 of them at a time.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>

#include "kvfold/detail/arena.hpp"
#include "kvfold/detail/few_rows.hpp"
#include "kvfold/detail/lanes.hpp"
#include "kvfold/detail/wide_loads.hpp"
#include "kvfold/detail/wide_words.hpp"
#include "kvfold/storage/quantised.hpp"
#include "kvfold/types.hpp"

namespace kvfold::detail {

/// Whether rows of E are multiplied as the integers that they are stored as.
template <Stored E>
inline constexpr bool kAreIntegers = kHasWideLoads ? kInBlocks<E> : false;

/// Units that the largest of the numbers that are rounded together has.
inline constexpr float kMostUnits = 32767.f;

/// What divides n numbers by the largest of them: 0 for a largest of at most 1e-30, whose inverse may overflow. Where a
/// number is not finite, the largest is NaN.
struct Largest {
  float magnitude, inverse = 0.f;

  Largest(const float* x, Index n) noexcept : magnitude(largest_magnitude(x, 1, n)) {
    if (!std::isfinite(magnitude)) magnitude = std::numeric_limits<float>::quiet_NaN();
    if (magnitude > 1e-30f) inverse = 1.f / magnitude;
  }
};

/// Rows rounded to 16 bits: element d of row i is `unit[i] * value[i][d]`, to 2^-16 of the largest of the row.
struct RoundedRows {
  std::span<std::int16_t> value;  // [rows][k]
  std::span<float> unit;          // [rows]

  static RoundedRows take(Arena& arena, Index rows, Index k) noexcept {
    RoundedRows r;
    r.value = arena.take<std::int16_t>(rows, k);
    r.unit = arena.take<float>(rows);
    return r;
  }

  /// k is a multiple of kBlockSize.
  void set(Index i, const float* row, Index k) const noexcept {
    const Largest largest(row, k);
    const float factor = kMostUnits * largest.inverse;
    for (Index d = 0; d < k; d += 2 * kLanes) {
      const auto scaled = [&](Index e) { return load_lanes(row + e) * factor; };
      store_rounded_lanes(scaled(d), scaled(d + kLanes), value.data() + i * k + d);
    }
    unit[static_cast<std::size_t>(i)] = largest.magnitude / kMostUnits;
  }
};

/// `few_dots` for kRows rows of a, from row `row` on.
template <Index kRows, class Rows>
void few_dots_of(const RoundedRows& a, Index row, const Rows& b, Index k, float* c, Index c_stride) noexcept {
  using E = typename Rows::Unit;
  constexpr Index kColumns = kFewColumns<kRows>, kBytes = bytes_of<E>(kColumns * kBlockSize);
  const Index units = k / kBlockSize;
  const std::int16_t* value = a.value.data() + row * k;
  float unit[kLanes] = {};
  for (Index i = 0; i < kRows; ++i) {
    std::fill_n(unit + i * kColumns, kColumns, a.unit[static_cast<std::size_t>(row + i)]);
  }
  for (Index first = 0; first < b.count; first += kColumns) {
    const FewColumns<kColumns, E> of(b, first);
    typename Rows::Ahead next(b, first, kAhead);
    Lanes total{};
    for (Index u = 0; u < units; ++u) {
      next.template fetch<kBytes>();
      IntLanes sums[kLanes];
      clear(sums);
      for (Index i = 0; i < kRows; ++i) {
        WideWords x(value + i * k + u * kBlockSize);
        x.keep_in_registers();
        for (Index j = 0; j < kColumns; ++j) sums[i * kColumns + j] = dots(x, WideWords(of.row[j][u]));
      }
      const Lanes scale = f16_lanes([&](Index i) { return of.row[i % kColumns][u].scale.bits; });
      total = __builtin_convertvector(sums_of_each(sums), Lanes) * scale + total;
    }
    float out[kLanes];
    store_lanes(total * load_lanes(unit), out);
    for (Index i = 0; i < kRows; ++i) of.store(out + i * kColumns, c + i * c_stride + first);
  }
}

/// c = a * b^T for a [m][k], rows b of k numbers and c [m][rows of b] with a row stride.
template <class Rows>
  requires kAreIntegers<typename Rows::Unit>
void few_dots(const RoundedRows& a, Index m, const Rows& b, Index k, float* c, Index c_stride) noexcept {
  for_groups_of_rows<kMostFewRows>(
      m, [&](Index i, auto rows) { few_dots_of<rows()>(a, i, b, k, c + i * c_stride, c_stride); });
}

/// Rows whose factors `add_few` rounds together: they stay in the first cache, and sums of their products below 2^31.
inline constexpr Index kRoundedDepth = 64;
inline constexpr Index kBlocksAtATime = 4;  ///< whose scales are read, of one row after the other

/// kRoundedDepth numbers in units of the largest.
struct InUnits {
  float x[kRoundedDepth];
  float unit;

  /// The largest has `most` units.
  void set(const float* from, float most) noexcept {
    const Largest largest(from, kRoundedDepth);
    unit = largest.magnitude / most;
    const float factor = most * largest.inverse;
    for (Index j = 0; j < kRoundedDepth; j += kLanes) store_lanes(load_lanes(from + j) * factor, x + j);
  }
};

/// Numbers of kRows rows of a for up to kRoundedDepth rows of b, and zeros.
template <Index kRows>
struct WeightsInUnits {
  InUnits of[kMostFewRows];

  WeightsInUnits(const float* a, Index a_stride, Index count) noexcept {
    for (Index i = 0; i < kRows; ++i) {
      const float* row = a + i * a_stride;
      float all[kRoundedDepth];
      if (count < kRoundedDepth) {
        std::fill(std::copy_n(row, count, all), all + kRoundedDepth, 0.f);
        row = all;
      }
      of[i].set(row, kMostUnits);
    }
  }
};

/// Scales of up to kBlocksAtATime blocks of each of up to kRoundedDepth rows; of the last row again where there are fewer.
struct ScalesInUnits {
  InUnits of[kBlocksAtATime];

  /// \param first block
  template <class Rows>
  ScalesInUnits(const Rows& b, Index first, Index blocks) noexcept {
    with_constant<kBlocksAtATime>(blocks, [&](auto constant) {
      float x[kBlocksAtATime][kRoundedDepth];
      for (Index j = 0; j < kRoundedDepth; j += kLanes) {
        const FewColumns<kLanes, typename Rows::Unit> rows(b, std::min(j, b.count - 1));
        for (Index u = 0; u < constant(); ++u) {
          store_lanes(f16_lanes([&](Index l) { return rows.row[l][first + u].scale.bits; }), x[u] + j);
        }
      }
      for (Index u = 0; u < constant(); ++u) of[u].set(x[u], 1.f);
    });
  }
};

/// `add_few` for one block of each of up to kRoundedDepth rows of b.
template <Index kRows, class Rows>
void add_block(const WeightsInUnits<kRows>& weights, const InUnits& scales, const Rows& b, Index block, float* c,
               Index c_stride, typename Rows::Ahead& next) noexcept {
  using E = typename Rows::Unit;
  typename Rows::Ahead ahead = next;  // in registers
  std::int16_t factors[kMostFewRows][kRoundedDepth];
  for (Index i = 0; i < kRows; ++i) {
    for (Index j = 0; j < kRoundedDepth; j += 2 * kLanes) {
      const auto factor = [&](Index e) { return load_lanes(weights.of[i].x + e) * load_lanes(scales.x + e); };
      store_rounded_lanes(factor(j), factor(j + kLanes), factors[i] + j);
    }
  }
  constexpr Index kPart = 2 * kLanes, kParts = std::min<Index>(kRows > 2 ? 1 : 2, kBlockSize / kPart);  // in registers
  constexpr Index kBytes = bytes_of<E>(2 * kParts * kPart);                                             // of two rows
  for (Index d = 0; d < kBlockSize; d += kParts * kPart) {
    SumsOfRows sums[kMostFewRows][2];
    const auto add = [&](const E& one, const E& other, Index j) {
      for (Index p = 0; p < kParts; ++p) {
        const PairsOfRows rows(one, other, d + p * kPart);
        for (Index i = 0; i < kRows; ++i) sums[i][p].add(rows, factors[i] + j);
      }
    };
    for (Index j = 0; j + 1 < b.count; j += 2) {
      ahead.template fetch<kBytes>();
      add(b.row(j)[block], b.row(j + 1)[block], j);
    }
    if (const E& last = b.row(b.count - 1)[block]; b.count % 2 != 0) add(last, last, b.count - 1);  // once times 0
    for (Index i = 0; i < kRows; ++i) {
      const float unit = weights.of[i].unit * scales.unit;
      for (Index p = 0; p < kParts; ++p) sums[i][p].add_to(c + i * c_stride + d + p * kPart, unit);
    }
  }
  next = ahead;
}

/// c += a * b for a [m][rows of b], rows b of n numbers and c [m][n]; a and c have the given row strides. A row's factor for
/// a block, number times scale, is rounded: by at most 2^-16 of the largest number times the largest scale of up to
/// kRoundedDepth rows.
template <class Rows>
  requires kAreIntegers<typename Rows::Unit>
void add_few(const float* a, Index a_stride, Index m, const Rows& b, Index n, float* c, Index c_stride) noexcept {
  const Index units = n / kBlockSize;
  for (Index first = 0; first < b.count; first += kRoundedDepth) {
    const Rows some = b.part(first, kRoundedDepth);
    typename Rows::Ahead next(b, first + some.count - 1, kAhead / 2);  // all of these are read several times
    for (Index v = 0; v < units; v += kBlocksAtATime) {
      const Index blocks = std::min(kBlocksAtATime, units - v);
      const ScalesInUnits scales(some, v, blocks);
      const typename Rows::Ahead from = next;
      for_groups_of_rows<kMostFewRows>(m, [&](Index i, auto rows) {
        const WeightsInUnits<rows()> weights(a + i * a_stride + first, a_stride, some.count);
        next = from;
        for (Index u = v; u < v + blocks; ++u) {
          add_block<rows()>(weights, scales.of[u - v], some, u, c + i * c_stride + u * kBlockSize, c_stride, next);
        }
      });
    }
  }
}

}  // namespace kvfold::detail
