/// \file
/// How few queries go over the rows of a layer: in parts, which work side by side.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

#include "kvfold/detail/arena.hpp"
#include "kvfold/types.hpp"
#include "kvfold/view/concepts.hpp"

namespace kvfold::detail {

/// Query rows up to which `few_dots` and `add_few` are as fast as products of blocks.
inline constexpr Index kFewQueries = 16;

/// The rows of heads in parts, and the tasks that go over them. Parts do not depend on the number of workers, nor on where
/// rows lie, so that results do not.
///
/// Where rows of several heads lie beside each other, a task goes over a part of all of these, some rows at a time: they
/// share pages of memory, and what processors fetch by themselves.
struct AttendSplit {
  /// The heads of a task that lie together; the tasks that there should be at least, then, and rows of a part.
  static constexpr Index kHeadsTogether = 8, kTasks = 16, kPartRows = 512;

  Index heads = 1, rows = 1;  ///< H, and the most rows of a head
  bool together = false;      ///< see `heads_lie_together`

  /// Of a head with as many rows as there may be.
  [[nodiscard]] static constexpr Index most_parts(Index heads) noexcept { return (kTasks - 1) / groups_of(heads) + 1; }

  [[nodiscard]] constexpr Index parts() const noexcept {
    return std::min(most_parts(heads), (rows - 1) / kPartRows + 1);
  }
  [[nodiscard]] constexpr Index rows_per_part() const noexcept { return (rows - 1) / parts() + 1; }
  [[nodiscard]] constexpr Index heads_per_task() const noexcept { return together ? kHeadsTogether : 1; }
  [[nodiscard]] constexpr Index tasks() const noexcept { return (together ? groups_of(heads) : heads) * parts(); }
  /// The task that is to be begun as number i: each of so many workers, as long as they take turns, goes over rows one after
  /// the other, and has use for what it has asked for beyond the end of a part.
  [[nodiscard]] constexpr Index place(Index i, Index workers) const noexcept {
    const Index worker = i % workers;
    return worker * (tasks() / workers) + std::min(worker, tasks() % workers) + i / workers;
  }

 private:
  [[nodiscard]] static constexpr Index groups_of(Index heads) noexcept { return (heads - 1) / kHeadsTogether + 1; }
};

/// Whether rows of two heads lie within the distance of two rows of one head, as in a tensor [token][head][dim].
template <KVCacheView V>
[[nodiscard]] bool heads_lie_together(const V& view) noexcept {
  if constexpr (HasStoredRows<V>) {
    if (view.shape().kv_heads < 2 || static_cast<Index>(view.size(0)) < 2) return false;
    const auto two_rows = view.stored_keys(0, 0, 2), other = view.stored_keys(1, 0, 1);
    if (two_rows.data == nullptr || two_rows.count < 2 || other.data == nullptr) return false;
    const auto a = reinterpret_cast<std::uintptr_t>(two_rows.data), b = reinterpret_cast<std::uintptr_t>(other.data);
    return std::max(a, b) - std::min(a, b) < static_cast<std::uintptr_t>(two_rows.stride) * sizeof *two_rows.data;
  }
  return false;
}

/// What few queries have seen of a part of a head's rows: softmax sums, and sums of values not yet divided by them.
struct AttendPart {
  float* max;               // [kFewQueries]
  float* sum;               // [kFewQueries]
  float* out;               // [kFewQueries][E]
  bool* masses_are_finite;  // of its rows
};

/// As many parts as a layer may have.
struct AttendParts {
  std::span<float> max, sum;          // [H * most_parts(H)][kFewQueries]
  std::span<float> out;               // [H * most_parts(H)][kFewQueries][E]
  std::span<bool> masses_are_finite;  // [H * most_parts(H)]
  Index width = 0;                    // E

  static AttendParts take(Arena& arena, const LayerShape& shape) noexcept {
    AttendParts p;
    const Index count = shape.kv_heads < 1 ? 0 : shape.kv_heads * AttendSplit::most_parts(shape.kv_heads);
    p.max = arena.take<float>(count, kFewQueries);
    p.sum = arena.take<float>(count, kFewQueries);
    p.out = arena.take<float>(count, kFewQueries, shape.value_dim);
    p.masses_are_finite = arena.take<bool>(count);
    p.width = shape.value_dim;
    return p;
  }
  [[nodiscard]] AttendPart operator[](Index i) const noexcept {
    const Index queries = i * kFewQueries;
    return {max.data() + queries, sum.data() + queries, out.data() + queries * width, masses_are_finite.data() + i};
  }
};

}  // namespace kvfold::detail
