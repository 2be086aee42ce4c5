/// \file
/// Sizes and strides that come from outside: products and offsets that do not overflow.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <initializer_list>
#include <limits>
#include <span>

#include "kvfold/types.hpp"

namespace kvfold::detail {

/// The product of numbers of at least 0; -1 when one is negative or the product does not fit.
[[nodiscard]] constexpr Index product(std::initializer_list<Index> factors) noexcept {
  Index result = 1;
  bool zero = false;
  for (const Index f : factors) {
    if (f < 0) return -1;
    zero = zero || f == 0;
  }
  if (zero) return 0;
  for (const Index f : factors) {
    if (result > std::numeric_limits<Index>::max() / f) return -1;
    result *= f;
  }
  return result;
}

/// One axis of a tensor.
struct Extent {
  Index size = 0;    ///< entries, at least 1
  Index stride = 0;  ///< elements from one entry to the next
};

/// Elements from a tensor's first to one past its last; -1 when a size is below 1, a stride is negative, or the bytes do
/// not fit into a pointer difference.
[[nodiscard]] constexpr Index spanned_elements(std::span<const Extent> axes, std::size_t element_bytes) noexcept {
  const Index most = std::numeric_limits<std::ptrdiff_t>::max() / static_cast<Index>(element_bytes);
  Index last = 0;
  for (const Extent& axis : axes) {
    if (axis.size < 1 || axis.stride < 0) return -1;
    const Index reach = product({axis.size - 1, axis.stride});
    if (reach < 0 || reach > most - 1 - last) return -1;
    last += reach;
  }
  return last + 1;
}
[[nodiscard]] constexpr Index spanned_elements(std::initializer_list<Extent> axes, std::size_t element_bytes) noexcept {
  return spanned_elements(std::span(axes.begin(), axes.size()), element_bytes);
}

/// Whether axes that `spanned_elements` counts lie inside of one another, in any order and with gaps between them or
/// without, so that no two places share an element.
template <std::size_t N>
[[nodiscard]] constexpr bool extents_nest(std::array<Extent, N> axes) noexcept {
  std::sort(axes.begin(), axes.end(), [](const Extent& a, const Extent& b) { return a.stride < b.stride; });
  Index spanned = 1;  // elements, by the axes so far
  for (const Extent& axis : axes) {
    if (axis.size <= 1) continue;
    if (axis.stride < spanned) return false;
    spanned += axis.stride * (axis.size - 1);
  }
  return true;
}

}  // namespace kvfold::detail
