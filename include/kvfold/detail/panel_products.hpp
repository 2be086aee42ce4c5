/// \file
/// Products of a block of rows (queries, candidates) with stored ones, for blocks too small to pay for what general matrix
/// products do first: Eigen's copies and rearranges both operands, which took a quarter of the time of sampled sums.
#pragma once

#include <algorithm>
#include <span>
#include <type_traits>
#include <utility>

#include "kvfold/detail/lanes.hpp"
#include "kvfold/detail/row_codec.hpp"
#include "kvfold/detail/rows.hpp"
#include "kvfold/view/concepts.hpp"

namespace kvfold::detail {

/// Rows of b in a panel: so many products at a time for each of `kPanelHeight` rows of a, in registers.
inline constexpr Index kPanelWidth = 2 * kLanes, kPanelHeight = 6;
inline constexpr Index kPanelDepth = 256;  ///< columns of a panel, which stays in the first cache
/// Rows of keys that are converted and multiplied with all panels at a time: whole groups, which stay in the first cache.
inline constexpr Index kPanelKeys = 4 * kPanelHeight;
/// Rows of the cache whose weights are made together, which stay in the first cache.
inline constexpr Index kPanelTile = 96;
static_assert(kPanelTile % kPanelKeys == 0 && kPanelTile % kLanes == 0);

/// `rows` rounded up to whole panels, and the columns of their products: rounded up to whole lanes.
[[nodiscard]] constexpr Index panel_rows(Index rows) noexcept {
  return (rows + kPanelWidth - 1) / kPanelWidth * kPanelWidth;
}
[[nodiscard]] constexpr Index panel_columns(Index rows) noexcept { return (rows + kLanes - 1) / kLanes * kLanes; }

/// Lanes of x and y in turn, within each group of four: of the lower two lanes, or of the upper ones.
template <bool kUpper, std::size_t... i>
[[nodiscard, gnu::always_inline]] inline Lanes interleave(Lanes x, Lanes y, std::index_sequence<i...>) noexcept {
  constexpr auto source = [](Index lane) { return lane % 2 * kLanes + lane / 4 * 4 + lane % 4 / 2 + 2 * kUpper; };
  return __builtin_shufflevector(x, y, static_cast<int>(source(i))...);
}

/// Two lanes of x and two of y, within each group of four.
template <bool kUpper, std::size_t... i>
[[nodiscard, gnu::always_inline]] inline Lanes join_pairs(Lanes x, Lanes y, std::index_sequence<i...>) noexcept {
  constexpr auto source = [](Index lane) { return lane % 4 / 2 * kLanes + lane / 4 * 4 + lane % 2 + 2 * kUpper; };
  return __builtin_shufflevector(x, y, static_cast<int>(source(i))...);
}

/// Four floats of every fourth of kLanes rows.
template <std::size_t kCount = kLanes>
[[nodiscard, gnu::always_inline]] inline auto load_fours(const float* from, Index stride) noexcept {
  if constexpr (kCount == 4) {
    using Four [[gnu::vector_size(16), gnu::aligned(alignof(float)), gnu::may_alias]] = float;
    return *reinterpret_cast<const Four*>(from);
  } else {
    constexpr std::size_t kHalf = kCount / 2;
    const auto low = load_fours<kHalf>(from, stride);
    const auto high = load_fours<kHalf>(from + static_cast<Index>(kHalf) * stride, stride);
    return [&]<std::size_t... i>(std::index_sequence<i...>) {
      return __builtin_shufflevector(low, high, static_cast<int>(i)...);
    }
    (std::make_index_sequence<kCount>{});
  }
}

/// Elements d to d + 3 of kLanes rows: to[0] is element d of all, to + kPanelWidth element d + 1.
[[gnu::always_inline]] inline void transpose_four(const float* rows, Index stride, float* to) noexcept {
  constexpr auto kIndices = std::make_index_sequence<kLanes>{};
  const Lanes r0 = load_fours(rows, stride), r1 = load_fours(rows + stride, stride),
              r2 = load_fours(rows + 2 * stride, stride), r3 = load_fours(rows + 3 * stride, stride);
  const Lanes low01 = interleave<false>(r0, r1, kIndices), high01 = interleave<true>(r0, r1, kIndices);
  const Lanes low23 = interleave<false>(r2, r3, kIndices), high23 = interleave<true>(r2, r3, kIndices);
  store_lanes(join_pairs<false>(low01, low23, kIndices), to);
  store_lanes(join_pairs<true>(low01, low23, kIndices), to + kPanelWidth);
  store_lanes(join_pairs<false>(high01, high23, kIndices), to + 2 * kPanelWidth);
  store_lanes(join_pairs<true>(high01, high23, kIndices), to + 3 * kPanelWidth);
}

/// Columns [0, depth) of `count` rows as a panel, [depth][kPanelWidth]; rows that there are not are 0.
inline void make_panel(const float* rows, Index stride, Index count, Index depth, float* panel) noexcept {
  Index d = 0;
  if (count == kPanelWidth) {
    for (; d + 4 <= depth; d += 4) {
      for (Index j = 0; j < kPanelWidth; j += kLanes) {
        transpose_four(rows + j * stride + d, stride, panel + d * kPanelWidth + j);
      }
    }
  }
  for (; d < depth; ++d) {
    float* to = panel + d * kPanelWidth;
    for (Index j = 0; j < count; ++j) to[j] = rows[j * stride + d];
    std::fill(to + count, to + kPanelWidth, 0.f);
  }
}

/// `count` rows as panels, one after the other.
/// \param panels [panel_rows(count) / kPanelWidth][depth][kPanelWidth]
inline void make_panels(const float* rows, Index stride, Index count, Index depth, float* panels) noexcept {
  for (Index i = 0; i < count; i += kPanelWidth) {
    make_panel(rows + i * stride, stride, std::min(kPanelWidth, count - i), depth, panels + i * depth);
  }
}

/// Where element (i, d) of an operand lies: at i * row + d * depth.
struct BlockStrides {
  Index row = 0, depth = 0;
};

/// c[i] = the sum over d of a[i][d] * b[d], for kRows rows and kWidth * kLanes columns, or that added to c.
template <Index kRows, Index kWidth>
void multiply_block(const float* a, BlockStrides of_a, const float* b, Index b_stride, Index depth, bool add, float* c,
                    Index c_stride) noexcept {
  Lanes left[kPanelHeight], right[kPanelHeight];
  clear(left);
  clear(right);
  for (Index d = 0; d < depth; ++d) {
    const float *from = a + d * of_a.depth, *panel = b + d * b_stride;
    const Lanes x = load_lanes(panel), y = kWidth > 1 ? load_lanes(panel + kLanes) : x;
    for (Index i = 0; i < kRows; ++i) {
      left[i] = from[i * of_a.row] * x + left[i];
      if constexpr (kWidth > 1) right[i] = from[i * of_a.row] * y + right[i];
    }
  }
  for (Index i = 0; i < kRows; ++i) {
    float* to = c + i * c_stride;
    store_lanes(add ? load_lanes(to) + left[i] : left[i], to);
    if constexpr (kWidth > 1) store_lanes(add ? load_lanes(to + kLanes) + right[i] : right[i], to + kLanes);
  }
}

/// What is read after the operands of a product, to be asked for meanwhile: rows of so many bytes, and from one to the next.
/// Harmless where nothing is.
struct Ahead {
  const void* address = nullptr;
  Index row_bytes = 0, stride = 0, rows = 0;  ///< rows that are left
  Index row = 0, in_row = 0;                  ///< bytes to the row, and in it

  /// As many as there may be: rows may begin anywhere in a line.
  [[nodiscard]] Index lines() const noexcept { return ((row_bytes - 2) / kCacheLine + 2) * rows; }
  /// The next few lines: what is asked for all at once is waited for.
  void fetch(Index count) noexcept {
    for (; count > 0 && rows > 0; --count) {
      fetch_line(address, row + in_row);
      in_row += rest_of_line(address, row + in_row);
      if (in_row < row_bytes) continue;
      in_row = 0;
      row += stride;
      --rows;
    }
  }
};

/// c[j][i] = row j times row i of panels, for n rows and `panel_columns(m)` of the panels.
///
/// A few rows at a time, which stay in the first cache with one of the panels.
inline void multiply_panels(const float* rows, Index row_stride, Index n, const float* panels, Index m, Index depth,
                            float* c, Index c_stride, Ahead ahead = {}) noexcept {
  const Index groups = panel_rows(m) / kPanelWidth * ((n + kPanelHeight - 1) / kPanelHeight);
  const Index lines = (ahead.lines() + groups - 1) / std::max<Index>(groups, 1);
  for (Index j = 0; j < m; j += kPanelWidth) {
    for (Index first = 0; first < depth; first += kPanelDepth) {
      const float* panel = panels + j * depth + first * kPanelWidth;
      const Index part = std::min(kPanelDepth, depth - first);
      for_groups_of_rows<kPanelHeight>(n, [&](Index i, auto height) {
        if (first == 0) ahead.fetch(lines);
        const float* from = rows + i * row_stride + first;
        float* to = c + i * c_stride + j;
        if (m - j > kLanes) {
          multiply_block<height(), 2>(from, {row_stride, 1}, panel, kPanelWidth, part, first > 0, to, c_stride);
        } else {
          multiply_block<height(), 1>(from, {row_stride, 1}, panel, kPanelWidth, part, first > 0, to, c_stride);
        }
      });
    }
  }
}

/// c[i] += the sum over j of weights[j][i] * rows[j], for m columns of weights [n][..] and n rows of `width`.
inline void add_weighted_rows(const float* weights, Index weight_stride, Index m, const float* rows, Index n,
                              Index width, float* c, Index c_stride) noexcept {
  const auto add = [&]<Index kWidth>(Index x, std::integral_constant<Index, kWidth>) {
    for_groups_of_rows<kPanelHeight>(m, [&](Index i, auto height) {
      multiply_block<height(), kWidth>(weights + i, {1, weight_stride}, rows + x, width, n, true, c + i * c_stride + x,
                                       c_stride);
    });
  };
  Index x = 0;
  for (; x + kPanelWidth <= width; x += kPanelWidth) add(x, std::integral_constant<Index, 2>{});
  for (; x + kLanes <= width; x += kLanes) add(x, std::integral_constant<Index, 1>{});
  for (; x < width; ++x) {
    for (Index j = 0; j < n; ++j) {
      for (Index i = 0; i < m; ++i) c[i * c_stride + x] += weights[j * weight_stride + i] * rows[j * width + x];
    }
  }
}

/// The keys after rows [t, t + n), as many as they are, where the view tells.
template <KVCacheView V>
[[nodiscard]] Ahead keys_after(const V& view, Index h, Index t, Index n) noexcept {
  if constexpr (HasStoredRows<V>) {
    const Index left = static_cast<Index>(view.size(h)) - t - n;
    if (left < 1) return {};
    const auto rows = view.stored_keys(h, t + n, std::min(n, left));
    if (rows.data == nullptr) return {};
    using E = std::remove_cvref_t<decltype(*rows.data)>;
    const auto size = static_cast<Index>(sizeof(E));
    const Index units = row_units<E>(view.shape().key_dim);
    if (rows.stride == units) return {rows.data, rows.count * units * size, 0, 1};
    return {rows.data, units * size, rows.stride * size, rows.count};
  }
  return {};
}

/// c[j][i] = key t + j of head h times row i of panels, for n keys and m rows. \param scratch [kPanelKeys][D]
template <KVCacheView V>
void multiply_keys(const V& view, Index h, Index t, Index n, const float* panels, Index m, std::span<float> scratch,
                   float* c, Index c_stride) noexcept {
  const Index width = view.shape().key_dim;
  for (Index j = 0; j < n; j += kPanelKeys) {
    const Index count = std::min(kPanelKeys, n - j);
    const float* keys = key_tile(view, h, t + j, count, scratch);
    multiply_panels(keys, width, count, panels, m, width, c + j * c_stride, c_stride,
                    keys_after(view, h, t + j, count));
  }
}

}  // namespace kvfold::detail
