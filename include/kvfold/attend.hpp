/// \file
/// Attention over a compressed cache: heads of unequal length, log masses, fp32 softmax.
#pragma once

#include <algorithm>
#include <functional>

#include "kvfold/detail/arena.hpp"
#include "kvfold/detail/attend_block.hpp"
#include "kvfold/detail/rows.hpp"
#include "kvfold/evidence/query_rows.hpp"
#include "kvfold/exec/executor.hpp"

namespace kvfold {

namespace detail {

/// Whether no two rows of an output overlap, whichever of its strides is the larger.
[[nodiscard]] constexpr bool rows_lie_apart(const AttentionOutput& out, Index heads, Index rows, Index width) noexcept {
  const auto holds = [width](Index outer, Index inner, Index count) {  // `count` inner rows fit between two outer ones
    return outer >= width && (outer - width) / inner >= count - 1;
  };
  if ((heads > 1 && out.head_stride < width) || (rows > 1 && out.row_stride < width)) return false;
  return heads == 1 || rows == 1 || holds(out.row_stride, out.head_stride, heads) ||
         holds(out.head_stride, out.row_stride, rows);
}

}  // namespace detail

/// Bytes of workspace that `attend` needs.
[[nodiscard]] inline std::size_t attend_workspace_bytes(const LayerShape& shape, Index workers) noexcept {
  detail::Arena arena;
  static_cast<void>(detail::AttendSpace::take(arena, shape, workers));
  return arena.required_bytes();
}

/// out[q, i] = sum over visible j of softmax_j(scale * q_i . k_j + log_mass_j) * v_j, for one or several query rows.
///
/// A query sees the rows of its KV head whose position is at most its own: causal among new rows whose keys are in the cache
/// already. This is what an engine without ragged heads needs to use a compressed cache; the tests hold plans against it.
/// Where rows are q8_0 or q4_0 and a head has up to 16 query rows, products are of integers where the target has AVX2: an element
/// of a query is rounded by at most 2^-16 of the largest, a weight times a value's scale by at most 2^-16 of the largest weight
/// times the largest scale of 64 rows.
/// `out` must not overlap the queries. Keys and values are not searched for NaN, and one in a row that a query cannot see
/// may still reach it when another query of the same call sees that row. That positions ascend is the view's promise: only
/// O(log T) of them are looked at; log masses are all checked. Cost: 2 * rows * G * T * (D + E) FLOPs per head; memory
/// O(tile) for each worker and each of up to 8 heads that it goes over side by side, and 16 * (E + 2) floats for each of up
/// to max(H, 240) parts of heads' rows, which work side by side where queries are few.
template <KVCacheView V, Executor X>
Status attend(const V& view, const QueryRows& queries, const AttentionOutput& out, Workspace workspace,
              X& executor) noexcept {
  if (Status bad = detail::check_sizes(view); !bad.ok()) return bad;
  const LayerShape shape = view.shape();
  if (Status bad = detail::check_queries(queries, shape); !bad.ok()) return bad;
  if (out.data == nullptr) return {StatusCode::invalid_argument, "out", "data is null"};
  if (!detail::rows_lie_apart(out, queries.query_heads, queries.rows(), shape.value_dim)) {
    return {StatusCode::invalid_argument, "out", "strides let rows of value_dim floats overlap"};
  }
  if (!out.log_sum_exp.empty() &&
      out.log_sum_exp.size() != static_cast<std::size_t>(queries.query_heads) * queries.positions.size()) {
    return {StatusCode::size_mismatch, "out", "log_sum_exp must have query_heads * rows entries"};
  }
  for (Index h = 0; h < shape.kv_heads; ++h) {
    if (queries.positions.front() < static_cast<Position>(view.position(h, 0))) {
      return {StatusCode::invalid_argument, "queries", "the first one lies before every row of a head", h};
    }
  }
  const auto workers = static_cast<Index>(executor.concurrency());
  if (workers < 1) return {StatusCode::invalid_argument, "executor", "concurrency() must be at least 1"};
  detail::Arena arena(workspace);
  const detail::AttendSpace space = detail::AttendSpace::take(arena, shape, workers);
  if (Status bad = detail::check(arena); !bad.ok()) return bad;
  const auto block = [&](Index h, Index worker) {
    return detail::AttendBlock<V>(view, h, queries, space.of(worker)[0]);
  };

  const Index rows = queries.rows() * shape.group_size;
  if (rows <= detail::kFewQueries) {
    const detail::AttendSplit split{shape.kv_heads, detail::max_rows(view), detail::heads_lie_together(view)};
    auto task = [&](Index i, Index worker) noexcept {
      detail::run_task(view, queries, split, split.place(i, workers), space.of(worker), space.parts);
    };
    executor.run(split.tasks(), task);
    // They have looked at their log masses while these were in the cache; nothing is written yet.
    const Index parts = split.parts();
    const auto finite = space.parts.masses_are_finite.first(detail::at(shape.kv_heads * parts));
    if (!std::ranges::all_of(finite, std::identity{})) return detail::check_log_masses(view, executor);
    for (Index h = 0; h < shape.kv_heads; ++h) block(h, 0).join(space.parts, h * parts, parts, out);
    return {};
  }
  if (Status bad = detail::check_log_masses(view, executor); !bad.ok()) return bad;
  const Index blocks = (rows + detail::kQueryTile - 1) / detail::kQueryTile;
  auto task = [&](Index i, Index worker) noexcept {
    const Index first = i % blocks * detail::kQueryTile;
    block(i / blocks, worker).run(first, std::min(detail::kQueryTile, rows - first), out);
  };
  executor.run(shape.kv_heads * blocks, task);
  return {};
}

}  // namespace kvfold
