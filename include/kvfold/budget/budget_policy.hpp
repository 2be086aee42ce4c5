/// \file
/// What a budget policy is, and how rows of a head are ranked.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <functional>

#include "kvfold/detail/arena.hpp"
#include "kvfold/detail/rows.hpp"
#include "kvfold/exec/executor.hpp"
#include "kvfold/exec/workspace.hpp"
#include "kvfold/types.hpp"

namespace kvfold {

/// How many rows a policy may give out: for sizing a workspace before any score is known.
struct RowLimits {
  Index total = 0;     ///< over all heads of the layer
  Index per_head = 0;  ///< in one head
};

/// A policy that says how many rows each head keeps.
///
/// - `limits(heads)`: the most it may give to one layer of H heads, and to one head.
/// - `workspace_bytes(rows)`: bytes that `allocate` needs for tables of `rows` rows in all.
/// - `allocate(tables, budgets, workspace)`: budgets for all heads of all tables, table after table; 1 <= B_h <= T_h.
/// - `allocate(tables, budgets, workspace, executor)`, where it has it: the same with several threads.
// clang-format off
template <class B>
concept BudgetPolicy = requires(const B& b, std::span<const ScoreTable> tables, std::span<Index> budgets,
                                Workspace workspace, Index n) {
  { b.validate() } noexcept -> std::same_as<Status>;
  { b.limits(n) } noexcept -> std::same_as<RowLimits>;
  { b.workspace_bytes(n) } noexcept -> std::same_as<std::size_t>;
  { b.allocate(tables, budgets, workspace) } noexcept -> std::same_as<Status>;
};
// clang-format on

namespace detail {

template <BudgetPolicy B, Executor X>
Status allocate_budgets(const B& policy, std::span<const ScoreTable> tables, std::span<Index> budgets,
                        Workspace workspace, X& executor) noexcept {
  if constexpr (requires {
                  { policy.allocate(tables, budgets, workspace, executor) }
                  noexcept->std::same_as<Status>;
                }) {
    return policy.allocate(tables, budgets, workspace, executor);
  } else {
    return policy.allocate(tables, budgets, workspace);
  }
}

[[nodiscard]] inline Status check_budget_call(std::span<const ScoreTable> tables,
                                              std::span<const Index> budgets) noexcept {
  Index heads = 0;
  for (const ScoreTable& table : tables) {
    const bool fits =
        table.heads() >= 1 && table.offset.front() == 0 && std::is_sorted(table.offset.begin(), table.offset.end()) &&
        table.offset.back() == static_cast<Index>(table.score.size()) && table.protection.size() == table.score.size();
    if (!fits) return {StatusCode::size_mismatch, "tables", "offsets, scores and protections do not fit together"};
    heads += table.heads();
  }
  if (heads < 1) return {StatusCode::invalid_argument, "tables", "there are no heads"};
  if (static_cast<Index>(budgets.size()) != heads) {
    return {StatusCode::size_mismatch, "budgets", "must have one entry per head of all tables"};
  }
  return {};
}

[[nodiscard]] inline Status check_scores(std::span<const ScoreTable> tables) noexcept {
  for (const ScoreTable& table : tables) {
    if (!std::all_of(table.score.begin(), table.score.end(), [](float s) { return std::isfinite(s); })) {
      return {StatusCode::not_finite, "tables", "scores have a NaN or an infinity"};
    }
  }
  return {};
}

/// A row's place among those of its head as one number, larger = stays longer: sinks first (the first before all), then
/// the latest of the recent rows, then by score. A total order: ties go to the lower index. Numbers that are compared
/// by themselves are selected faster than row numbers that stand for them.
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

[[nodiscard]] inline RowId row_of(Rank rank) noexcept {
  const Rank row = rank & kRowMask;
  return static_cast<RowId>(rank >> 62 == 2 ? row : kRowMask - row);
}

/// The ranks of all rows of a head, in the order of rows.
inline void rank_rows(std::span<const float> scores, std::span<const Protection> protections,
                      std::span<Rank> ranks) noexcept {
  for (std::size_t i = 0; i < ranks.size(); ++i) ranks[i] = rank_of(scores[i], protections[i], static_cast<RowId>(i));
}

/// Brings the `count` best to the front, in no particular order. O(n).
inline void select_best(std::span<Rank> ranks, Index count) noexcept {
  if (count > 0 && count < static_cast<Index>(ranks.size())) {
    std::nth_element(ranks.begin(), ranks.begin() + (count - 1), ranks.end(), std::greater<>{});
  }
}

}  // namespace detail
}  // namespace kvfold
