/// \file
/// How rows of a head are ranked, and where among them the best so many end.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <functional>
#include <span>

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
class RowRanks {
 public:
  /// \param scratch as many as there are rows
  RowRanks(std::span<const float> scores, std::span<const Protection> protections, std::span<Rank> scratch) noexcept
      : scores_(scores), protections_(protections), scratch_(scratch) {
    for (Index t = 0; t < rows(); ++t) ++count_of_[at(digit_of((*this)[t], kTopShift))];
  }

  [[nodiscard]] Index rows() const noexcept { return static_cast<Index>(scores_.size()); }
  [[nodiscard]] Rank operator[](Index t) const noexcept {
    return rank_of(scores_[at(t)], protections_[at(t)], static_cast<RowId>(t));
  }

  /// The lowest rank of the `count` best rows, for count in [0, rows()]; of none, one above all.
  ///
  /// Ranks are sorted out by their digits, the highest first: how many there are of each tells which of them to look at
  /// further. That takes a few steps for each rank, none of which a processor has to guess, as it has when ranks are
  /// compared. O(T).
  [[nodiscard]] Rank lowest_of_best(Index count) const noexcept {
    if (count <= 0) return ~Rank{0};
    if (count >= rows()) return 0;
    const Index digit = take_digit(count_of_, count);
    return lowest_of_best(with_digit(*this, rows(), kTopShift, digit, scratch_), count);
  }

 private:
  static constexpr int kDigitBits = 11, kTopShift = 64 - kDigitBits;
  static constexpr Index kDigits = Index{1} << kDigitBits;
  static constexpr Index kFew = 64;  // ranks that are compared: counting digits takes longer

  using Counts = std::uint32_t[kDigits];

  [[nodiscard]] static constexpr Index digit_of(Rank rank, int shift) noexcept {
    return static_cast<Index>(rank >> shift & (kDigits - 1));
  }

  /// The digit of the `count`-th best, and in `count` its place among those that have this digit.
  [[nodiscard]] static Index take_digit(const Counts& count_of, Index& count) noexcept {
    Index digit = kDigits - 1;
    for (; count > static_cast<Index>(count_of[digit]); --digit) count -= static_cast<Index>(count_of[digit]);
    return digit;
  }

  /// Those of n ranks that have a digit, at the front of `to`, which may be where the ranks are.
  template <class Ranks>
  [[nodiscard]] static std::span<Rank> with_digit(const Ranks& ranks, Index n, int shift, Index digit,
                                                  std::span<Rank> to) noexcept {
    Index left = 0;
    for (Index i = 0; i < n; ++i) {
      const Rank rank = ranks[i];
      to[at(left)] = rank;
      left += digit_of(rank, shift) == digit ? 1 : 0;
    }
    return to.first(at(left));
  }

  /// `lowest_of_best` of ranks that agree in their top digit and are moved.
  [[nodiscard]] static Rank lowest_of_best(std::span<Rank> ranks, Index count) noexcept {
    for (int shift = kTopShift; shift > 0 && static_cast<Index>(ranks.size()) > kFew;) {
      shift = std::max(shift - kDigitBits, 0);
      Counts count_of = {};
      for (const Rank rank : ranks) ++count_of[digit_of(rank, shift)];
      const Index digit = take_digit(count_of, count);
      ranks = with_digit(ranks.data(), static_cast<Index>(ranks.size()), shift, digit, ranks);
    }
    const auto place = ranks.begin() + (count - 1);
    std::nth_element(ranks.begin(), place, ranks.end(), std::greater<>{});
    return *place;
  }

  std::span<const float> scores_;
  std::span<const Protection> protections_;
  std::span<Rank> scratch_;
  Counts count_of_ = {};  // rows by the top digit of their ranks
};

}  // namespace kvfold::detail
