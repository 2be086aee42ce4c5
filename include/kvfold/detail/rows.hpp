/// \file
/// Reading tiles of a view, and checks that every stage makes of it.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdint>

#include "kvfold/exec/executor.hpp"
#include "kvfold/status.hpp"
#include "kvfold/view/concepts.hpp"

namespace kvfold::detail {

[[nodiscard]] constexpr std::size_t at(Index i) noexcept { return static_cast<std::size_t>(i); }

/// How many tasks a head's work is split into, so that a layer with few heads has some for several workers: what is left
/// of 16 for a head. Not a matter of how many workers there are, so that results are the same bits for each number of them.
[[nodiscard]] constexpr Index tasks_per_head(const LayerShape& shape) noexcept {
  constexpr Index kTasks = 16;
  return shape.kv_heads < 1 ? 1 : (kTasks - 1) / shape.kv_heads + 1;
}

/// Rows [t, t + n) of head h as n * D consecutive floats: in place where the view can, else converted into `scratch`.
template <KVCacheView V>
[[nodiscard]] const float* key_tile(const V& view, Index h, Index t, Index n, std::span<float> scratch) noexcept {
  if constexpr (HasContiguousRows<V>) {
    if (const float* rows = view.key_rows(h, t, n)) return rows;
  }
  view.read_keys(h, t, n, scratch);
  return scratch.data();
}

/// The same for values: n * E floats.
template <KVCacheView V>
[[nodiscard]] const float* value_tile(const V& view, Index h, Index t, Index n, std::span<float> scratch) noexcept {
  if constexpr (HasContiguousRows<V>) {
    if (const float* rows = view.value_rows(h, t, n)) return rows;
  }
  view.read_values(h, t, n, scratch);
  return scratch.data();
}

/// Calls f(first place in ids, first row, count) for each run of consecutive rows.
template <class F>
void for_runs(std::span<const RowId> ids, F f) noexcept {
  for (std::size_t i = 0; i < ids.size();) {
    std::size_t end = i + 1;
    while (end < ids.size() && ids[end] == ids[end - 1] + 1) ++end;
    f(static_cast<Index>(i), static_cast<Index>(ids[i]), static_cast<Index>(end - i));
    i = end;
  }
}

/// The keys of some rows, one after the other.
template <KVCacheView V>
void gather_keys(const V& view, Index h, std::span<const RowId> ids, std::span<float> out) noexcept {
  const Index width = view.shape().key_dim;
  for_runs(ids, [&](Index place, Index row, Index count) {
    view.read_keys(h, row, count, out.subspan(at(place * width), at(count * width)));
  });
}

template <KVCacheView V>
void gather_values(const V& view, Index h, std::span<const RowId> ids, std::span<float> out) noexcept {
  const Index width = view.shape().value_dim;
  for_runs(ids, [&](Index place, Index row, Index count) {
    view.read_values(h, row, count, out.subspan(at(place * width), at(count * width)));
  });
}

/// How many rows of head h a query at `position` may see. O(log T).
template <KVCacheView V>
[[nodiscard]] Index visible_rows(const V& view, Index h, Position position) noexcept {
  Index low = 0, high = static_cast<Index>(view.size(h));
  while (low < high) {
    const Index middle = low + (high - low) / 2;
    if (static_cast<Position>(view.position(h, middle)) <= position) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

/// Whether the storage has one count for all heads of a layer.
template <KVCacheView V>
[[nodiscard]] bool has_equal_counts(const V& view) noexcept {
  return row_counts_of(view) != RowCounts::per_head;
}

/// Whether a block of channels can be turned by a Hadamard matrix; 0 stands for "not turned".
[[nodiscard]] constexpr bool is_channel_block(Index block, Index width) noexcept {
  return block == 0 || (block > 0 && (block & (block - 1)) == 0 && width % block == 0);
}

/// Sizes in range, every head with rows, and what the view itself checks. O(H), and the view's own.
template <KVCacheView V>
[[nodiscard]] Status check_sizes(const V& view) noexcept {
  const LayerShape shape = view.shape();
  if (shape == LayerShape{}) {
    return {StatusCode::invalid_argument, "view", "has no shape: widths, strides or scales do not fit its storage"};
  }
  if (shape.kv_heads < 1 || shape.group_size < 1 || shape.kv_heads > kMaxHeads || shape.group_size > kMaxHeads ||
      shape.query_heads() > kMaxHeads) {
    return {StatusCode::invalid_argument, "view",
            "shape().kv_heads, group_size and their product must be in [1, kMaxHeads]"};
  }
  if (shape.key_dim < 1 || shape.value_dim < 1 || shape.key_dim > kMaxWidth || shape.value_dim > kMaxWidth) {
    return {StatusCode::invalid_argument, "view", "shape().key_dim and value_dim must be in [1, kMaxWidth]"};
  }
  const ChannelRotation turned = channel_rotation_of(view);
  if (!is_channel_block(turned.key_block, shape.key_dim) || !is_channel_block(turned.value_block, shape.value_dim)) {
    return {StatusCode::invalid_argument, "view",
            "channel_rotation() must have powers of two that divide key_dim and value_dim, or 0"};
  }
  if (Status bad = own_check_of(view); !bad.ok()) return bad;
  for (Index h = 0; h < shape.kv_heads; ++h) {
    const auto rows = static_cast<Index>(view.size(h));
    if (rows < 1 || rows > kMaxRows)
      return {StatusCode::invalid_argument, "view", "size(h) must be in [1, kMaxRows]", h};
    if (has_equal_counts(view) && rows != static_cast<Index>(view.size(0))) {
      return {StatusCode::size_mismatch, "view", "heads of unequal size in storage that has one count for them", h};
    }
  }
  return {};
}

/// Positions of a head in order. O(T).
template <KVCacheView V>
[[nodiscard]] Status check_positions(const V& view, Index h) noexcept {
  const auto rows = static_cast<Index>(view.size(h));
  const auto descends = [&](Index t) {
    return static_cast<Position>(view.position(h, t)) < static_cast<Position>(view.position(h, t - 1));
  };
  int any = 0;  // over all rows, since a loop that may stop is not vectorised
  for (Index t = 1; t < rows; ++t) any |= static_cast<int>(descends(t));
  if (any == 0) return {};
  Index t = 1;
  while (!descends(t)) ++t;
  return {StatusCode::invalid_argument, "view", "positions must be in ascending order", h, t};
}

/// Log masses of a head without NaN and infinities. O(T).
template <KVCacheView V>
[[nodiscard]] Status check_log_masses(const V& view, Index h) noexcept {
  if constexpr (HasLogMass<V>) {
    const auto rows = static_cast<Index>(view.size(h));
    // As above. The bits of a NaN or an infinity are above those of all numbers, for compilers that know of neither, too.
    const auto bits_of = [&](Index t) { return std::bit_cast<std::uint32_t>(log_mass_of(view, h, t)) & 0x7fffffffu; };
    std::uint32_t most = 0;
    for (Index t = 0; t < rows; ++t) most = std::max(most, bits_of(t));
    if (most < 0x7f800000u) return {};
    Index t = 0;
    while (bits_of(t) < 0x7f800000u) ++t;
    return {StatusCode::not_finite, "log_mass", "has a NaN or an infinity", h, t};
  }
  return {};
}

/// Rows of a layer up to which an executor takes longer to begin than to look at all of them.
inline constexpr Index kFewToCheck = 32768;

/// The first of f(h) that is not ok. Heads with many of the `rows` are looked at side by side, and once more in their order
/// when one is not ok, so that the status is the same for every executor.
template <class F>
[[nodiscard]] Status check_heads(Index heads, Index rows, Executor auto& executor, F f) noexcept {
  if (rows > kFewToCheck) {
    std::atomic<bool> all_ok{true};
    auto task = [&](Index h, Index) noexcept {
      if (!f(h).ok()) all_ok.store(false, std::memory_order_relaxed);
    };
    executor.run(heads, task);
    if (all_ok.load(std::memory_order_relaxed)) return {};
  }
  for (Index h = 0; h < heads; ++h) {
    if (Status bad = f(h); !bad.ok()) return bad;
  }
  return {};
}

template <KVCacheView V>
[[nodiscard]] Index max_rows(const V& view) noexcept {
  Index most = 0;
  for (Index h = 0; h < view.shape().kv_heads; ++h) most = std::max(most, static_cast<Index>(view.size(h)));
  return most;
}

template <KVCacheView V>
[[nodiscard]] Index total_rows(const V& view) noexcept {
  Index sum = 0;
  for (Index h = 0; h < view.shape().kv_heads; ++h) sum += static_cast<Index>(view.size(h));
  return sum;
}

/// Log masses of all heads. O(H * T).
template <KVCacheView V>
[[nodiscard]] Status check_log_masses(const V& view, Executor auto& executor) noexcept {
  return check_heads(view.shape().kv_heads, total_rows(view), executor,
                     [&](Index h) { return check_log_masses(view, h); });
}

/// Sizes in range, every head with rows, positions in order, log masses that are numbers. O(H * T).
template <KVCacheView V>
[[nodiscard]] Status check_view(const V& view, Executor auto& executor) noexcept {
  if (Status bad = check_sizes(view); !bad.ok()) return bad;
  return check_heads(view.shape().kv_heads, total_rows(view), executor, [&](Index h) {
    const Status bad = check_positions(view, h);
    return bad.ok() ? check_log_masses(view, h) : bad;
  });
}

}  // namespace kvfold::detail
