/// \file
/// What a budget policy is, and how rows of a head are ranked.
#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>

#include "kvfold/detail/arena.hpp"
#include "kvfold/detail/rows.hpp"
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

/// Whether row a of a head stays rather than row b: sinks first, then the latest of the recent rows, then by score.
/// A total order: ties go to the lower index.
class Ranking {
 public:
  Ranking(std::span<const float> scores, std::span<const Protection> protections) noexcept
      : scores_(scores.data()), protections_(protections.data()) {}

  [[nodiscard]] bool operator()(RowId a, RowId b) const noexcept {
    if (protections_[a] != protections_[b]) return protections_[a] > protections_[b];
    if (protections_[a] == Protection::recent) return a > b;
    if (protections_[a] == Protection::none && scores_[a] != scores_[b]) return scores_[a] > scores_[b];
    return a < b;
  }

 private:
  const float* scores_;
  const Protection* protections_;
};

inline void fill_row_ids(std::span<RowId> ids) noexcept {
  for (std::size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<RowId>(i);
}

/// Brings the `count` best ids to the front, in no particular order. O(n).
inline void select_best(std::span<RowId> ids, Index count, const Ranking& better) noexcept {
  if (count > 0 && count < static_cast<Index>(ids.size())) {
    std::nth_element(ids.begin(), ids.begin() + (count - 1), ids.end(), better);
  }
}

}  // namespace detail
}  // namespace kvfold
