/// \file
/// Stored rows of a head wherever they lie, one after the other, at a distance or in pages: their addresses, and how those
/// that follow are asked for while they are worked on.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "kvfold/detail/lanes.hpp"
#include "kvfold/detail/processor.hpp"
#include "kvfold/detail/row_codec.hpp"
#include "kvfold/view/concepts.hpp"

namespace kvfold::detail {

/// How far ahead rows are asked for, in bytes: they come from memory to the second cache while those before them are worked
/// on. Processors fetch too little by themselves while they compute, and nothing where rows lie anywhere.
template <Stored E>
inline constexpr Index kFarAhead = kInBlocks<E> ? 16384 : 8192;
/// The same for the first cache, of rows in blocks: the scales of many rows are read before the rest, which would wait.
inline constexpr Index kNearAhead = 8192;
/// The bytes after those that are looked up together, one line of each page: page tables are walked side by side then, and
/// arithmetic waits for them once instead of at each page.
inline constexpr Index kPageBytes = 4096, kLookedUp = 8 * kPageBytes;
/// Of how many rows at most, where each has an address of its own.
inline constexpr Index kMostAhead = 128;

/// Asks for lines of the kBytes that lie kFarAhead after `offset` bytes from an address, and once in kLookedUp bytes for one of
/// each page after those. What follows is asked for from `offset + kBytes` on. Harmless where nothing is.
template <Cache kTo, Index kBytes, Stored E>
void fetch_far(const E* from, Index offset) noexcept {
  if (place_after(from, offset) % kLookedUp < kBytes) {
    // Of each page another line: caches have the same places for lines 4096 bytes apart.
    for (Index i = 0; i < kLookedUp; i += kPageBytes + kCacheLine) {
      fetch_line<Cache::kSecond>(from, offset + kLookedUp + i);
    }
  }
  for (Index i = 0; i < kBytes; i += kCacheLine) fetch_line<kTo>(from, offset + i + kFarAhead<E>);
}

/// Rows one after the other, without gaps. What is asked for ahead, in the cache kFar, is what follows in memory.
template <Stored E, Cache kFar = Cache::kSecond>
struct RowsTogether {
  using Unit = E;

  const E* data = nullptr;
  Index units = 0, count = 0;

  [[nodiscard]] const E* row(Index i) const noexcept { return data + i * units; }
  /// At most n rows from `first` on.
  [[nodiscard]] RowsTogether part(Index first, Index n) const noexcept {
    return {row(first), units, std::min(n, count - first)};
  }
  /// Row after row, from some unit of the first on: addresses are added up, which is faster than `row`.
  class Walk {
   public:
    Walk(const RowsTogether& rows, Index unit) noexcept : next_(rows.data + unit), units_(rows.units) {}
    [[nodiscard]] const E* next() noexcept { return std::exchange(next_, next_ + units_); }

   private:
    const E* next_;
    Index units_;
  };
  /// Asks for kBytes ahead of those from unit `first` of row i on.
  template <Index kBytes>
  void fetch_after(Index i, Index first) const noexcept {
    if constexpr (kBytes < kCacheLine) {
      // Many pieces, and much to do in each. A line is asked for with each of its own: first from memory, then from there.
      const Index in_line = first * static_cast<Index>(sizeof(E)) % kCacheLine;
      if (in_line == 0 || in_line + kBytes > kCacheLine) {
        fetch_line<kFar>(row(i) + first, kFarAhead<E> + kBytes - 1);
      } else {
        fetch_line<Cache::kFirst>(row(i) + first, kFarAhead<E>);
      }
    } else {
      fetch_far<kFar, kBytes>(row(i) + first, 0);
    }
  }

  /// Asks for rows, a little at a time: what is asked for all at once is waited for.
  class Ahead {
   public:
    /// Those ahead of row `first` and of what follows it.
    Ahead(const RowsTogether& rows, Index first) noexcept : from_(rows.row(first)) {}

    template <Index kBytes>
    void fetch() noexcept {
      fetch_far<kFar, kBytes>(from_, next_);
      if constexpr (kInBlocks<E>) {
        for (Index i = 0; i < kBytes; i += kCacheLine) fetch_line<Cache::kFirst>(from_, next_ + i + kNearAhead);
      }
      next_ += kBytes;
    }

   private:
    const E* from_;
    Index next_ = 0;  // bytes after that
  };
};

/// Rows anywhere: the addresses of `count` and of `ahead` after them, and of what is asked for with each.
template <Stored E>
struct RowsAnywhere {
  using Unit = E;

  const void* const* to = nullptr;  // [count + ahead]
  Index units = 0, count = 0, ahead = 0;
  const void* const* ask = nullptr;  // [count] of as many bytes as a row has

  [[nodiscard]] const E* row(Index i) const noexcept { return static_cast<const E*>(to[i]); }
  [[nodiscard]] RowsAnywhere part(Index first, Index n) const noexcept {
    return {to + first, units, std::min(n, count - first), ahead, ask + first};
  }
  class Walk {
   public:
    Walk(const RowsAnywhere& rows, Index unit) noexcept : next_(rows.to), unit_(unit) {}
    [[nodiscard]] const E* next() noexcept { return static_cast<const E*>(*next_++) + unit_; }

   private:
    const void* const* next_;
    Index unit_;
  };
  /// The ends of pieces of a line, and the row's beginning: rows may begin anywhere in a line.
  template <Index kBytes>
  void fetch_after(Index i, Index first) const noexcept {
    if (first == 0) fetch_line<Cache::kSecond>(ask[i], 0);
    const Index begin = first * static_cast<Index>(sizeof(E));
    for (Index end = kCacheLine; end < kBytes; end += kCacheLine) fetch_line<Cache::kSecond>(ask[i], begin + end - 1);
    fetch_line<Cache::kSecond>(ask[i], begin + kBytes - 1);
  }
  [[nodiscard]] Index bytes() const noexcept { return units * static_cast<Index>(sizeof(E)); }

  class Ahead {
   public:
    Ahead(const RowsAnywhere& rows, Index first) noexcept
        : row_(rows.to + first),
          ask_(rows.ask + first),
          last_(rows.to + rows.count - 1),
          near_(std::min(rows.ahead / 2, kNearAhead / rows.bytes())),
          bytes_(rows.bytes()) {}

    template <Index kBytes>
    void fetch() noexcept {
      for (due_ += kBytes; due_ > 0;) {
        fetch_at(offset_);
        const Index part = std::min(kCacheLine, bytes_ - offset_);
        due_ -= part;
        offset_ += part;
        if (offset_ < bytes_) continue;
        fetch_at(bytes_ - 1);  // another line, where rows do not begin with one
        offset_ = 0;
        if (row_ < last_) ++row_, ++ask_;
      }
    }

   private:
    void fetch_at(Index offset) const noexcept {
      fetch_line<Cache::kSecond>(*ask_, offset);
      if constexpr (kInBlocks<E>) fetch_line<Cache::kFirst>(row_[near_], offset);
    }

    const void* const* row_;
    const void* const* ask_;
    const void* const* last_;
    Index near_, bytes_, offset_ = 0, due_ = 0;
  };
};

/// Calls f(addresses of kColumns rows of b, number of the first, how many there are) for all rows in turn; where there are
/// fewer, which is a variable then, the last one again.
template <Index kColumns, class Rows, class F>
[[gnu::always_inline]] inline void for_columns(const Rows& b, F f) noexcept {
  static_assert(kColumns <= kLanes);
  const typename Rows::Unit* row[kLanes];
  typename Rows::Walk walk(b, 0);
  Index first = 0;
  for (; first + kColumns <= b.count; first += kColumns) {
    for (Index j = 0; j < kColumns; ++j) row[j] = walk.next();
    f(row, first, std::integral_constant<Index, kColumns>{});
  }
  if (const Index count = b.count - first; count > 0) {
    for (Index j = 0; j < kColumns; ++j) row[j] = j < count ? walk.next() : row[j - 1];
    f(row, first, count);
  }
}

/// The addresses of rows [t, t + n) of a head of `size` rows, and of `ahead` after them: the last one's again where there are
/// none.
/// \param rows what `stored(t, n)` has given: `StoredRows` of the view, as it gives those of all rows
/// \param to room for n + ahead addresses
/// \param scales room for those of n rows
/// \param scaled set to whether there are any
/// \returns whether the view told of all of them. O(n + ahead)
template <Stored E, class F>
[[nodiscard]] bool locate_rows(StoredRows<E> rows, const F& stored, Index t, Index n, Index size, Index ahead,
                               const void** to, float* scales, bool& scaled) noexcept {
  scaled = false;
  const Index all = std::min(n + ahead, size - t);
  for (Index done = 0; done < all;) {
    if (done > 0) rows = stored(t + done, all - done);
    if (rows.data == nullptr || rows.count < 1) return false;
    const Index count = std::min(rows.count, all - done);
    for (Index i = 0; i < count; ++i) to[done + i] = rows.data + i * rows.stride;
    if (rows.scales != nullptr && !scaled) std::fill_n(scales, std::min(done, n), 1.f);
    scaled = scaled || rows.scales != nullptr;
    for (Index i = done; scaled && i < std::min(done + count, n); ++i) {
      scales[i] = rows.scales != nullptr ? rows.scales[(i - done) * rows.scale_stride] : 1.f;
    }
    done += count;
  }
  std::fill(to + all, to + n + ahead, to[all - 1]);
  return true;
}

/// Calls f with rows [t, t + n) of a head of `size` rows: RowsTogether where they are that, else RowsAnywhere.
/// \param stored stored(t, n): `StoredRows` of the view, in units of which a row has `units`
/// \param to room for n + kMostAhead addresses
/// \param scales room for those of n rows
/// \param f f(rows, whether there are scales)
/// \returns whether the view told of all of them; else nothing was called. O(n)
template <Stored E, class F, class G>
[[nodiscard]] bool with_stored_rows(const F& stored, Index units, Index t, Index n, Index size, const void** to,
                                    float* scales, G f) noexcept {
  const StoredRows<E> rows = stored(t, n);
  if (rows.data != nullptr && rows.count >= n && rows.stride == units) {
    const bool scaled = rows.scales != nullptr;
    for (Index i = 0; scaled && i < n; ++i) scales[i] = rows.scales[i * rows.scale_stride];
    if constexpr (!kInBlocks<E>) {
      // On AMD's processors floats come sooner to the first cache; on others what is on its way there holds up other reads.
      if (is_amd()) return f(RowsTogether<E, Cache::kFirst>{rows.data, units, n}, scaled), true;
    }
    return f(RowsTogether<E>{rows.data, units, n}, scaled), true;
  }
  const Index ahead = std::clamp<Index>(kFarAhead<E> / (units * static_cast<Index>(sizeof(E))), 1, kMostAhead);
  bool scaled = false;
  if (!locate_rows<E>(rows, stored, t, n, size, ahead, to, scales, scaled)) return false;
  f(RowsAnywhere<E>{to, units, n, ahead, to + ahead}, scaled);
  return true;
}

}  // namespace kvfold::detail
