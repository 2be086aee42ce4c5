/// \file
/// What a scorer is, and what scorers share: protection of rows, pooling along the sequence.
#pragma once

#include <algorithm>
#include <concepts>

#include "kvfold/detail/arena.hpp"
#include "kvfold/detail/linalg.hpp"
#include "kvfold/detail/rows.hpp"
#include "kvfold/exec/executor.hpp"
#include "kvfold/exec/workspace.hpp"
#include "kvfold/types.hpp"

namespace kvfold {

namespace detail {

template <class S, class V, class E>
[[nodiscard]] consteval bool understands() noexcept {
  if constexpr (requires { S::template kUnderstands<V, E>; }) return S::template kUnderstands<V, E>;
  return true;
}

}  // namespace detail

/// Evidence that scorer S takes for views V. A scorer that takes some kinds only says so in a
/// `template <class V, class E> static constexpr bool kUnderstands`, and the compiler's message names this concept.
template <class E, class S, class V>
concept EvidenceFor = detail::understands<S, V, E>();

/// A policy that says how much each row matters, for views V and evidence E.
///
/// - `validate()`: whether its options are in range.
/// - `workspace_bytes(view, evidence, workers)`: bytes that `score` will need.
/// - `score(view, evidence, table, workspace, executor)`: fills `table.score` and `table.protection` for all rows.
// clang-format off
template <class S, class V, class E>
concept ScorerFor = KVCacheView<V> && EvidenceFor<E, S, V> &&
                    requires(const S& s, const V& view, const E& evidence, ScoreTable table, Workspace workspace,
                             SerialExecutor& executor, Index workers) {
  { s.validate() } noexcept -> std::same_as<Status>;
  { s.workspace_bytes(view, evidence, workers) } noexcept -> std::same_as<std::size_t>;
  { s.score(view, evidence, table, workspace, executor) } noexcept -> std::same_as<Status>;
};
// clang-format on

/// For policies that look at nothing but positions.
struct NoEvidence {};

/// Rows that stay whatever their score: the first `sinks` and the last `recent` of each head.
struct Protect {
  Index sinks = 0;   ///< rows, at least 0
  Index recent = 0;  ///< rows, at least 0

  [[nodiscard]] Status validate() const noexcept {
    if (sinks < 0 || sinks > kMaxRows) return {StatusCode::invalid_argument, "sinks", "must be in [0, kMaxRows]"};
    if (recent < 0 || recent > kMaxRows) return {StatusCode::invalid_argument, "recent", "must be in [0, kMaxRows]"};
    return {};
  }
  /// First and one past the last row of a head with T rows that may be evicted.
  [[nodiscard]] Index first_evictable(Index rows) const noexcept { return std::min(sinks, rows); }
  [[nodiscard]] Index end_evictable(Index rows) const noexcept {
    return std::max(first_evictable(rows), rows - recent);
  }

  void mark(std::span<Protection> rows) const noexcept {
    const auto count = static_cast<Index>(rows.size());
    for (Index t = 0; t < count; ++t) {
      rows[static_cast<std::size_t>(t)] = t < first_evictable(count)  ? Protection::sink
                                          : t >= end_evictable(count) ? Protection::recent
                                                                      : Protection::none;
    }
  }
};

enum class PoolKind : unsigned char { none, average, max };

/// Pooling along the sequence, among the rows that may be evicted: sinks, whose attention is of another order, and
/// recent rows do not spill over. The border averages only what exists.
struct Pool {
  PoolKind kind = PoolKind::none;
  Index width = 1;  ///< rows, odd, at least 1

  [[nodiscard]] Status validate() const noexcept {
    if (width < 1 || width % 2 == 0 || width > kMaxRows) {
      return {StatusCode::invalid_argument, "pool", "width must be odd and in [1, kMaxRows]"};
    }
    return {};
  }
};

namespace detail {

/// out[j] = pool of x around j; `out` and `x` must not overlap. O(n) for the average, O(n * width) for the maximum.
inline void pool_row(std::span<const float> x, Pool pool, std::span<float> out) noexcept {
  const auto n = static_cast<Index>(x.size());
  const Index reach = pool.width / 2;
  if (pool.kind == PoolKind::none || reach == 0) {
    std::copy_n(x.begin(), n, out.begin());
    return;
  }
  if (pool.kind == PoolKind::max) {
    for (Index j = 0; j < n; ++j) {
      const Index first = std::max<Index>(j - reach, 0), last = std::min(n, j + reach + 1);
      out[at(j)] = *std::max_element(x.begin() + first, x.begin() + last);
    }
    return;
  }
  double sum = 0.0;  // a running sum in fp32 would drift
  for (Index j = 0; j < std::min(reach, n); ++j) sum += static_cast<double>(x[at(j)]);
  for (Index j = 0; j < n; ++j) {
    if (j + reach < n) sum += static_cast<double>(x[at(j + reach)]);
    if (j - reach > 0) sum -= static_cast<double>(x[at(j - reach - 1)]);
    const Index count = std::min(n, j + reach + 1) - std::max<Index>(j - reach, 0);
    out[at(j)] = static_cast<float>(std::max(sum, 0.0) / static_cast<double>(count));
  }
}

/// out[j] = max(x[j - width] .. x[j - 1]), as far as these exist, and 0 for the first; x is at least 0. O(n log width).
inline void trailing_max(std::span<const float> x, Index width, std::span<float> out) noexcept {
  const auto n = static_cast<Index>(x.size());
  if (n == 0) return;
  out[0] = 0.f;
  std::copy(x.begin(), x.end() - 1, out.begin() + 1);
  // out[j] covers `covered` rows: two such windows, one behind the other, cover more.
  for (Index covered = 1; covered < std::min(width, n);) {
    const Index step = std::min(covered, width - covered);
    Index j = n;  // the last ones first: each is made from those before it, as they were
    for (; j - kLanes >= step; j -= kLanes) {
      float* to = out.data() + j - kLanes;
      store_lanes(larger(load_lanes(to), load_lanes(to - step)), to);
    }
    for (--j; j >= step; --j) out[at(j)] = std::max(out[at(j)], out[at(j - step)]);
    covered += step;
  }
}

/// Joins [C][rows] columns into one row.
inline void reduce_columns(std::span<const float> columns, Index rows, bool by_max, std::span<float> out) noexcept {
  const auto count = static_cast<Index>(columns.size()) / rows;
  std::copy_n(columns.begin(), rows, out.begin());
  for (Index c = 1; c < count; ++c) {
    const float* column = columns.data() + c * rows;
    if (by_max) {
      raise(out.data(), column, rows);
    } else {
      add(out.data(), column, rows);
    }
  }
  if (!by_max && count > 1) divide(out.data(), rows, static_cast<float>(count));
}

/// Whether a table is of the heads and rows of a view.
template <KVCacheView V>
[[nodiscard]] Status check_table(const V& view, const ScoreTable& table) noexcept {
  const Index heads = view.shape().kv_heads;
  bool fits = table.heads() == heads && table.offset.front() == 0 && table.protection.size() == table.score.size() &&
              static_cast<Index>(table.score.size()) == total_rows(view);
  for (Index h = 0; fits && h < heads; ++h) fits = table.rows(h) == static_cast<Index>(view.size(h));
  return fits ? Status{} : Status{StatusCode::size_mismatch, "table", "is not of the view's heads and rows"};
}

/// What every scorer checks before it looks at its evidence.
template <class S, KVCacheView V, Executor X>
[[nodiscard]] Status check_score_call(const S& scorer, const V& view, const ScoreTable& table, X& executor) noexcept {
  if (Status bad = scorer.validate(); !bad.ok()) return bad;
  if (static_cast<Index>(executor.concurrency()) < 1) {
    return {StatusCode::invalid_argument, "executor", "concurrency() must be at least 1"};
  }
  if (Status bad = check_view(view, executor); !bad.ok()) return bad;
  return check_table(view, table);
}

}  // namespace detail
}  // namespace kvfold
