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
#include <utility>

#include "kvfold/detail/arena.hpp"
#include "kvfold/detail/few_rows.hpp"
#include "kvfold/detail/lanes.hpp"
#include "kvfold/detail/processor.hpp"
#include "kvfold/detail/wide_loads.hpp"
#include "kvfold/detail/wide_words.hpp"
#include "kvfold/storage/quantised.hpp"
#include "kvfold/types.hpp"

namespace kvfold::detail {

/// Whether rows of E are multiplied as the integers that they are stored as.
template <Stored E>
inline constexpr bool kAreIntegers = kHasWideLoads ? kInBlocks<E> : false;

/// Calls f with the fastest way of adding products that this processor has, as a constant.
template <class F>
void with_fastest_adding(F f) noexcept {
  if constexpr (kAddingIsAsked) {
    if (has_avx_vnni()) return f(std::integral_constant<Adding, Adding::kWithAvxVnni>{});
  }
  f(std::integral_constant<Adding, Adding::kAsCompiled>{});
}

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

/// A few rows rounded to 16 bits: element d of row i is `unit[i] * value[place(i, d)]`, to 2^-16 of the largest of the row.
struct RoundedRows {
  std::span<std::int16_t> value;  // [rows / kMostFewRows][k / kBlockSize][kMostFewRows][kSpreadBlock], of one row [k]
  std::span<float> unit;          // [rows]
  Index k = 0;                    // a multiple of kBlockSize where rows are set
  Index count = 0;

  /// Memory for up to so many, of which none is set.
  static RoundedRows take(Arena& arena, Index rows, Index k) noexcept {
    RoundedRows r;
    r.value = arena.take<std::int16_t>((rows + kMostFewRows - 1) / kMostFewRows * kMostFewRows, k, kRowsOfWords);
    r.unit = arena.take<float>(rows);
    r.k = k;
    return r;
  }

  /// Of several, a block's elements of those that are worked on together lie together, and each is there kRowsOfWords times,
  /// as `WordsOfBlocks` wants it.
  [[nodiscard]] constexpr Index place(Index i, Index d) const noexcept {
    if (count == 1) return d;
    const Index in_group = i % kMostFewRows;
    return kRowsOfWords * ((i - in_group) * k + (d / kBlockSize * kMostFewRows + in_group) * kBlockSize) +
           place_of_word(d % kBlockSize);
  }

  /// The n rows at `rows`, [n][k].
  [[nodiscard]] RoundedRows set(const float* rows, Index n) const noexcept {
    RoundedRows result = *this;
    result.count = n;
    for (Index i = 0; i < n; ++i) result.set_row(i, rows + i * k);
    return result;
  }

 private:
  void set_row(Index i, const float* row) const noexcept {
    const Largest largest(row, k);
    const float factor = kMostUnits * largest.inverse;
    for (Index d = 0; d < k; d += 2 * kLanes) {
      std::int16_t words[2 * kLanes];
      const auto scaled = [&](Index e) { return load_lanes(row + e) * factor; };
      store_rounded_lanes(scaled(d), scaled(d + kLanes), words);
      if (std::int16_t* to = value.data() + place(i, d); count == 1) {
        std::copy_n(words, 2 * kLanes, to);
      } else {
        spread_words(words, to);
      }
    }
    unit[static_cast<std::size_t>(i)] = largest.magnitude / kMostUnits;
  }
};

/// Rows of b that are worked on together: they stay in the first cache, and sums of their products below 2^31.
inline constexpr Index kRoundedDepth = 64;

/// What is asked for ahead after n elements of rows, in bytes: `sixteenths` of as many. `add_few` goes over rows three times,
/// and memory has something to do all the while.
template <Stored E>
[[nodiscard]] constexpr Index bytes_asked(Index n, Index sixteenths) noexcept {
  return (bytes_of<E>(n) * sixteenths + 15) / 16;
}
inline constexpr Index kAskedWithScales = 2, kAskedWithFactors = 1, kAskedWithSums = 13;

/// Scratch of the kernels below, for rows of k numbers.
struct BlockSpace {
  std::span<float> scales;          // [k / kBlockSize][kRoundedDepth]
  std::span<Largest> largest;       // [k / kBlockSize] of scales
  std::span<std::int16_t> factors;  // [k / kBlockSize][kMostFewRows][kRoundedDepth]

  static BlockSpace take(Arena& arena, Index k) noexcept {
    BlockSpace s;
    s.scales = arena.take<float>(k / kBlockSize, kRoundedDepth);
    s.largest = arena.take<Largest>(k / kBlockSize);
    s.factors = arena.take<std::int16_t>(k / kBlockSize, kMostFewRows * kRoundedDepth);
    return s;
  }
  [[nodiscard]] float* scales_of(Index block) const noexcept { return scales.data() + block * kRoundedDepth; }
  [[nodiscard]] std::int16_t* factors_of(Index block) const noexcept {
    return factors.data() + block * kMostFewRows * kRoundedDepth;
  }

  /// Scales of up to kRoundedDepth rows; the last one's again for what fills lanes, and zeros.
  template <class Rows>
  void read_scales(const Rows& b, Index blocks, typename Rows::Ahead& next) const noexcept {
    constexpr Index kBytes = bytes_asked<typename Rows::Unit>(kLanes * kBlockSize, kAskedWithScales);
    typename Rows::Ahead ahead = next;  // in registers
    for_columns<kLanes>(b, [&](const auto& rows, Index first, auto) {
      for (Index u = 0; u < blocks; ++u) {
        ahead.template fetch<kBytes>();
        store_lanes(gather_f16_lanes([&](Index i) { return &rows[i][u].scale; }), scales_of(u) + first);
      }
    });
    next = ahead;
    for (Index j = (b.count + kLanes - 1) / kLanes * kLanes; j < kRoundedDepth; j += kLanes) {
      for (Index u = 0; u < blocks; ++u) store_lanes(Lanes{}, scales_of(u) + j);
    }
  }
};

/// `few_dots` for kRows rows of a, from row `row` on, and up to kRoundedDepth rows of b.
template <Index kRows, Adding kAdding, class Rows>
void few_dots_of(const RoundedRows& a, Index row, const Rows& b, float* c, Index c_stride) noexcept {
  constexpr Index kBytes = bytes_of<typename Rows::Unit>(kRowsOfWords * kBlockSize);
  float unit[kMostFewRows * kRowsOfWords] = {};
  for (Index i = 0; i < kRows; ++i) {
    std::fill_n(unit + i * kRowsOfWords, kRowsOfWords, a.unit[static_cast<std::size_t>(row + i)]);
  }
  typename Rows::Ahead next(b, 0);
  for_columns<kRowsOfWords>(b, [&](const auto& rows, Index first, auto count) {
    const std::int16_t* value = a.value.data() + a.place(row, 0);
    Lanes sums[kMostFewRows];
    clear(sums);
    for (Index u = 0; u < a.k / kBlockSize; ++u, value += kMostFewRows * kSpreadBlock) {
      next.template fetch<kBytes>();
      const typename Rows::Unit* const blocks[] = {rows[0] + u, rows[1] + u, rows[2] + u, rows[3] + u};
      const WordsOfBlocks words(blocks);
      for (Index i = 0; i < kRows; ++i) sums[i] = words.template add_dots<kAdding>(value + i * kSpreadBlock, sums[i]);
    }
    float out[kMostFewRows * kRowsOfWords];
    for (Index i = 0; i < kMostFewRows; i += kLanes / kRowsOfWords) {
      store_lanes(sums_of_rows(sums + i) * load_lanes(unit + i * kRowsOfWords), out + i * kRowsOfWords);
    }
    for (Index i = 0; i < kRows; ++i) {
      for (Index j = 0; j < count; ++j) c[i * c_stride + first + j] = out[i * kRowsOfWords + j];
    }
  });
}

/// The same for one row of a, which stays in registers while one row of b after the other is multiplied with it.
template <Adding kAdding, class Rows>
void dots_of_one(const RoundedRows& a, const Rows& b, float* c) noexcept {
  using E = typename Rows::Unit;
  constexpr Index kColumns = 8;
  typename Rows::Ahead next(b, 0);
  for_columns<kColumns>(b, [&](const auto& rows, Index first, auto count) {
    Lanes sums[kLanes];
    clear(sums);
    for (Index u = 0; u < a.k / kBlockSize; ++u) {
      next.template fetch<bytes_of<E>(kColumns * kBlockSize)>();
      const BlockOfWords words(a.value.data() + u * kBlockSize);
      for (Index j = 0; j < kColumns; ++j) sums[j] = words.template add_dots<kAdding>(rows[j][u], sums[j]);
    }
    store_first_lanes(sums_of_each(sums) * a.unit[0], count, c + first);
  });
}

/// c = a * b^T for rows a and b of k numbers and c [rows of a][rows of b] with a row stride.
template <Adding kAdding, class Rows>
  requires kAreIntegers<typename Rows::Unit>
void few_dots(const RoundedRows& a, const Rows& b, float* c, Index c_stride) noexcept {
  if (a.count == 1) return dots_of_one<kAdding>(a, b, c);
  for (Index first = 0; first < b.count; first += kRoundedDepth) {
    const Rows some = b.part(first, kRoundedDepth);
    for_groups_of_rows<kMostFewRows>(a.count, [&](Index i, auto rows) {
      few_dots_of<rows(), kAdding>(a, i, some, c + i * c_stride + first, c_stride);
    });
  }
}
template <class Rows>
  requires kAreIntegers<typename Rows::Unit>
void few_dots(const RoundedRows& a, const Rows& b, float* c, Index c_stride) noexcept {
  with_fastest_adding([&](auto adding) { few_dots<adding()>(a, b, c, c_stride); });
}

/// to = from, kRoundedDepth numbers in units of which the largest has kMostUnits. \returns the unit
[[nodiscard]] inline float put_in_units(const float* from, float* to) noexcept {
  const Largest largest(from, kRoundedDepth);
  const float factor = kMostUnits * largest.inverse;
  for (Index j = 0; j < kRoundedDepth; j += kLanes) store_lanes(load_lanes(from + j) * factor, to + j);
  return largest.magnitude / kMostUnits;
}

/// `add_few` for one block of each of up to kRoundedDepth rows of b.
/// \param factors [kRows][kRoundedDepth], of which those of row i have units of `unit[i]`
template <Index kRows, Adding kAdding, class Rows>
void add_block(const std::int16_t* factors, const float* unit, const Rows& b, Index block, float* c, Index c_stride,
               typename Rows::Ahead& next) noexcept {
  using E = typename Rows::Unit;
  typename Rows::Ahead ahead = next;                                                                    // in registers
  constexpr Index kPart = 2 * kLanes, kParts = std::min<Index>(kRows > 2 ? 1 : 2, kBlockSize / kPart);  // in registers
  constexpr Index kBytes = bytes_asked<E>(2 * kParts * kPart, kAskedWithSums);  // of two rows, each time they are read
  // A sum waits for its last step, so eight take turns.
  constexpr Index kSets = kRows * kParts < 4 ? 4 / (kRows * kParts) : 1;
  for (Index d = 0; d < kBlockSize; d += kParts * kPart) {
    SumsOfRows sums[std::size_t{kSets}][kMostFewRows][2];
    typename Rows::Walk walk(b, block);
    const auto add = [&](const E& one, const E& other, Index j, Index set) {
      for (Index p = 0; p < kParts; ++p) {
        const PairsOfRows rows(one, other, d + p * kPart);
        for (Index i = 0; i < kRows; ++i) sums[set][i][p].template add<kAdding>(rows, factors + i * kRoundedDepth + j);
      }
    };
    Index j = 0;
    for (; j + 2 * kSets <= b.count; j += 2 * kSets) {
      for (Index set = 0; set < kSets; ++set) {
        ahead.template fetch<kBytes>();
        const E* one = walk.next();
        add(*one, *walk.next(), j + 2 * set, set);
      }
    }
    for (; j < b.count; j += 2) {
      const E* one = walk.next();
      add(*one, j + 1 < b.count ? *walk.next() : *one, j, 0);  // the last one again, times 0
    }
    for (Index i = 0; i < kRows; ++i) {
      for (Index p = 0; p < kParts; ++p) {
        for (Index set = 1; set < kSets; ++set) sums[0][i][p].add(sums[set][i][p]);
        sums[0][i][p].add_to(c + i * c_stride + d + p * kPart, unit[i]);
      }
    }
  }
  next = ahead;
}

/// `add_few` for kRows rows of a and up to kRoundedDepth rows of b, whose scales are read.
template <Index kRows, Adding kAdding, class Rows>
void add_few_of(const float* a, Index a_stride, const Rows& b, const BlockSpace& space, Index blocks, float* c,
                Index c_stride, typename Rows::Ahead& next) noexcept {
  float weights[kMostFewRows][kRoundedDepth], weight_unit[kMostFewRows];
  for (Index i = 0; i < kRows; ++i) {
    const float* row = a + i * a_stride;
    if (b.count < kRoundedDepth) {
      std::fill(std::copy_n(row, b.count, weights[i]), weights[i] + kRoundedDepth, 0.f);
      row = weights[i];
    }
    weight_unit[i] = put_in_units(row, weights[i]);
  }
  // All factors first: what the loops over rows wait for is there then.
  constexpr Index kBytes = bytes_asked<typename Rows::Unit>(2 * kLanes * kBlockSize, kAskedWithFactors);
  for (Index u = 0; u < blocks; ++u) {
    const float inverse = space.largest[static_cast<std::size_t>(u)].inverse;
    for (Index j = 0; j < kRoundedDepth; j += 2 * kLanes) {
      next.template fetch<kBytes>();
      const float* scales = space.scales_of(u) + j;
      const Lanes low = load_lanes(scales) * inverse, high = load_lanes(scales + kLanes) * inverse;
      for (Index i = 0; i < kRows; ++i) {
        const float* w = weights[i] + j;
        std::int16_t* to = space.factors_of(u) + i * kRoundedDepth + j;
        store_rounded_lanes(load_lanes(w) * low, load_lanes(w + kLanes) * high, to);
      }
    }
  }
  for (Index u = 0; u < blocks; ++u) {
    float unit[kMostFewRows];
    for (Index i = 0; i < kRows; ++i) unit[i] = weight_unit[i] * space.largest[static_cast<std::size_t>(u)].magnitude;
    add_block<kRows, kAdding>(space.factors_of(u), unit, b, u, c + u * kBlockSize, c_stride, next);
  }
}

/// c += a * b for a [m][rows of b], rows b of n numbers and c [m][n]; a and c have the given row strides. A row's factor for
/// a block, number times scale, is rounded: by at most 2^-16 of the largest number times the largest scale of up to
/// kRoundedDepth rows.
template <Adding kAdding, class Rows>
  requires kAreIntegers<typename Rows::Unit>
void add_few(const float* a, Index a_stride, Index m, const Rows& b, const BlockSpace& space, Index n, float* c,
             Index c_stride) noexcept {
  const Index blocks = n / kBlockSize;
  for (Index first = 0; first < b.count; first += kRoundedDepth) {
    const Rows some = b.part(first, kRoundedDepth);
    typename Rows::Ahead next(b, first);
    space.read_scales(some, blocks, next);
    for (Index u = 0; u < blocks; ++u) {
      space.largest[static_cast<std::size_t>(u)] = Largest(space.scales_of(u), kRoundedDepth);
    }
    const typename Rows::Ahead from = next;
    for_groups_of_rows<kMostFewRows>(m, [&](Index i, auto rows) {
      next = from;
      add_few_of<rows(), kAdding>(a + i * a_stride + first, a_stride, some, space, blocks, c + i * c_stride, c_stride,
                                  next);
    });
  }
}
template <class Rows>
  requires kAreIntegers<typename Rows::Unit>
void add_few(const float* a, Index a_stride, Index m, const Rows& b, const BlockSpace& space, Index n, float* c,
             Index c_stride) noexcept {
  with_fastest_adding([&](auto adding) { add_few<adding()>(a, a_stride, m, b, space, n, c, c_stride); });
}

}  // namespace kvfold::detail
