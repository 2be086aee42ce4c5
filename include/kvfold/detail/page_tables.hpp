/// \file
/// Rows that lie in pages: walking them, and finding pages that a table names twice.
#pragma once

#include <algorithm>
#include <array>
#include <limits>
#include <span>
#include <utility>

#include "kvfold/detail/rows.hpp"
#include "kvfold/status.hpp"

namespace kvfold::detail {

/// Pages that rows [0, rows) reach into.
[[nodiscard]] constexpr Index pages_for(Index rows, Index page_size) noexcept {
  return rows / page_size + (rows % page_size != 0 ? 1 : 0);
}

/// Of rows [t, t + n), those in the page of the first.
[[nodiscard]] constexpr Index rows_in_page(Index t, Index n, Index page_size) noexcept {
  return std::min(n, page_size - t % page_size);
}

/// Calls f(place in the page table, first token in the page, rows done before, rows) for each piece of rows [t, t + n)
/// that lies in one page.
template <class F>
void for_pages(Index t, Index n, Index page_size, F f) noexcept {
  for (Index done = 0; done < n;) {
    const Index token = (t + done) % page_size;
    const Index count = rows_in_page(t + done, n - done, page_size);
    f((t + done) / page_size, token, done, count);
    done += count;
  }
}

/// An entry of a page table: the `place`-th page of `head`.
struct PageEntry {
  Index head = -1;
  Index place = -1;
};

/// The first entry, if any, whose page one before it has named as well.
///
/// `each(f)` calls f(entry, id) for every entry, always in the same order; ids are at least 0. Ids are looked at through a
/// bit set of 4 KiB on the stack, which is moved over them: no memory of its own, and
/// O(entries * min(entries, 1 + (largest - smallest id) / 2^15)).
template <class Each>
[[nodiscard]] PageEntry find_repeated_page(Each each) noexcept {
  constexpr Index window = Index{1} << 15;
  std::array<std::uint64_t, at(window / 64)> seen;
  constexpr Index none = std::numeric_limits<Index>::max();
  PageEntry repeated;
  Index begin = none;  // first id of the window
  each([&](PageEntry, Index id) { begin = std::min(begin, id); });
  while (begin != none && repeated.head < 0) {
    seen.fill(0);
    Index next = none;
    each([&](PageEntry entry, Index id) {
      if (id < begin) return;
      if (id - begin >= window) {
        next = std::min(next, id);
        return;
      }
      std::uint64_t& word = seen[at((id - begin) / 64)];
      const std::uint64_t bit = std::uint64_t{1} << static_cast<unsigned>((id - begin) % 64);
      if ((word & bit) != 0 && repeated.head < 0) repeated = entry;
      word |= bit;
    });
    begin = next;
  }
  return repeated;
}

}  // namespace kvfold::detail
