/// \file
/// How rows of a head are ranked, and where among them the best so many end.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <span>

#include "kvfold/detail/lanes.hpp"
#include "kvfold/detail/linalg.hpp"
#include "kvfold/detail/rows.hpp"
#include "kvfold/types.hpp"

namespace kvfold::detail {

/// A row's place among those of its head as one number, larger = stays longer: sinks first (the first before all), then
/// the latest of the recent rows, then by score. A total order: ties go to the lower index.
using Rank = std::uint64_t;

inline constexpr Rank kRowMask = 0x7fffffff;

[[nodiscard]] inline Rank rank_of(float score, Protection protection, RowId row) noexcept {
  const Rank latest_first = static_cast<Rank>(row), earliest_first = kRowMask - latest_first;
  if (protection == Protection::sink) return Rank{3} << 62 | earliest_first;
  if (protection == Protection::recent) return Rank{2} << 62 | latest_first;
  const auto bits = std::bit_cast<std::uint32_t>(score + 0.f);  // -0 and 0 are equal
  const std::uint32_t ordered = bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
  return static_cast<Rank>(ordered) << 31 | earliest_first;
}

/// The ranks of a head's rows, made from their scores when they are asked for.
///
/// Most rows are told apart by their merit alone, which is the score, or infinity where a row is protected: a row with more
/// merit has a higher rank. Merits of several rows are compared at a time.
class RowRanks {
 public:
  /// \param scratch as many as there are rows
  RowRanks(std::span<const float> scores, std::span<const Protection> protections, std::span<Rank> scratch) noexcept
      : scores_(scores), protections_(protections), scratch_(scratch) {
    sampled_ = rows() < kLeastRows ? 0 : std::min(rows() / kRowsOfSampled, kMostSampled);
    for (Index i = 0; i < sampled_; ++i) {
      const Index t = (2 * i + 1) * rows() / (2 * sampled_);
      sample_[i] = protections_[at(t)] == Protection::none ? scores_[at(t)] : kInfinity;
    }
    std::sort(sample_, sample_ + sampled_, std::greater<>{});
  }

  [[nodiscard]] Index rows() const noexcept { return static_cast<Index>(scores_.size()); }
  [[nodiscard]] Rank operator[](Index t) const noexcept {
    return rank_of(scores_[at(t)], protections_[at(t)], static_cast<RowId>(t));
  }

  /// Scores of rows that are not protected, in fp64.
  [[nodiscard]] double sum_of_unprotected() const noexcept {
    constexpr Index kPiece = 64;
    double sum = 0.0;
    for (Index t = 0; t < rows(); t += kPiece) {
      const Index count = std::min(kPiece, rows() - t);
      if (!any_protected<kPiece>(t, count)) {
        sum += sum_in_fp64(scores_.data() + t, count);
        continue;
      }
      for (Index i = t; i < t + count; ++i) {
        if (protections_[at(i)] == Protection::none) sum += static_cast<double>(scores_[at(i)]);
      }
    }
    return sum;
  }

  /// The lowest rank of the `count` best rows, for count in [0, rows()]; of none, one above all.
  ///
  /// A sample tells between which merits it probably lies; rows with more are counted, and only those between are compared
  /// with each other. O(T), mostly.
  [[nodiscard]] Rank lowest_of_best(Index count) const noexcept {
    if (count <= 0) return ~Rank{0};
    if (count >= rows()) return 0;
    for (Merits merits = likely_merits(count);;) {
      const Found found = find(merits);
      if (count <= found.above) {
        merits = {merits.most, kInfinity};
      } else if (count > found.above + found.between) {
        merits = {kLeast, kInfinity};
      } else {
        const auto ranks = scratch_.first(at(found.between));
        const auto place = ranks.begin() + (count - found.above - 1);
        std::nth_element(ranks.begin(), place, ranks.end(), std::greater<>{});
        return *place;
      }
    }
  }

  /// Calls f(row, rank) for all rows of at least that rank, in the order of rows.
  template <class F>
  void for_best(Rank lowest, F f) const noexcept {
    const float least = merit_of(lowest);
    for_merits([&](Index t, Lanes merits) {
      for_bits(at_least(merits, least), [&](Index i) {
        if (const Rank rank = (*this)[t + i]; rank >= lowest) f(t + i, rank);
      });
    });
  }

 private:
  static constexpr float kInfinity = std::numeric_limits<float>::infinity(),
                         kLeast = std::numeric_limits<float>::lowest();
  /// Rows from which on a sample is taken, of one in so many of them.
  static constexpr Index kLeastRows = 512, kRowsOfSampled = 32, kMostSampled = 512;

  /// Those from one to the other, both included. That a number is next to another is not used: what is next to 0 is 0 for
  /// processors that are told to take small numbers for it.
  struct Merits {
    float least, most;
  };
  struct Found {
    Index above, between;  // rows with more merit, and with merits between
  };

  /// The merit of a row of that rank, and no more than that of rows of higher ones.
  [[nodiscard]] static float merit_of(Rank rank) noexcept {
    if (rank == 0) return kLeast;  // which no row has
    if (rank >> 63 != 0) return kInfinity;
    const auto ordered = static_cast<std::uint32_t>(rank >> 31);
    return std::bit_cast<float>(ordered >> 31 != 0 ? ordered & 0x7fffffffu : ~ordered);
  }

  /// What the `count`-th best row's merit lies between, unless the sample is an odd one.
  [[nodiscard]] Merits likely_merits(Index count) const noexcept {
    if (sampled_ == 0) return {kLeast, kInfinity};
    const auto size = static_cast<double>(sampled_);
    const double place = size * static_cast<double>(count) / static_cast<double>(rows());
    const double reach = 2.5 * std::sqrt(place * (1.0 - place / size)) + 1.0;  // of the standard deviation
    const auto first = static_cast<Index>(place - reach) - 1, last = static_cast<Index>(place + reach) + 1;
    return {last < sampled_ ? sample_[last] : kLeast, first >= 0 ? sample_[first] : kInfinity};
  }

  /// Puts the ranks of those between into the scratch.
  [[nodiscard]] Found find(const Merits& wanted) const noexcept {
    Found found{0, 0};
    for_merits([&](Index t, Lanes merits) {
      const std::uint32_t above = lanes_above(merits, Lanes{} + wanted.most);
      found.above += std::popcount(above);
      for_bits(at_least(merits, wanted.least) & ~above,
               [&](Index i) { scratch_[at(found.between++)] = (*this)[t + i]; });
    });
    return found;
  }

  /// Bit i tells whether merit i is no less.
  [[nodiscard]] static std::uint32_t at_least(Lanes merits, float least) noexcept {
    constexpr std::uint32_t kAll = (1u << kLanes) - 1;
    return ~lanes_above(Lanes{} + least, merits) & kAll;
  }
  template <class F>
  static void for_bits(std::uint32_t bits, F f) noexcept {
    for (; bits != 0; bits &= bits - 1) f(std::countr_zero(bits));
  }

  /// Calls f(first row, merits) for kLanes rows at a time; the last ones are filled up with less than kLeast.
  template <class F>
  void for_merits(F f) const noexcept {
    for (Index t = 0; t < rows(); t += kLanes) {
      const Index count = std::min(kLanes, rows() - t);
      Lanes merits = load_first_lanes(scores_.data() + t, count, -kInfinity);
      if (any_protected<kLanes>(t, count)) {
        float each[kLanes];
        store_lanes(merits, each);
        for (Index i = 0; i < count; ++i) each[i] = protections_[at(t + i)] == Protection::none ? each[i] : kInfinity;
        merits = load_lanes(each);
      }
      f(t, merits);
    }
  }
  /// Among up to kMost rows.
  template <Index kMost>
  [[nodiscard]] bool any_protected(Index t, Index count) const noexcept {
    std::uint64_t marks[at((kMost + 7) / 8)] = {}, any = 0;
    std::memcpy(marks, protections_.data() + t, at(count));
    for (const std::uint64_t m : marks) any |= m;
    return any != 0;
  }

  std::span<const float> scores_;
  std::span<const Protection> protections_;
  std::span<Rank> scratch_;
  Index sampled_ = 0;
  float sample_[kMostSampled];  // of merits, the largest first
};

}  // namespace kvfold::detail
