/// \file
/// What a budget policy is, and what policies check.
#pragma once

#include <algorithm>
#include <concepts>

#include "kvfold/detail/arena.hpp"
#include "kvfold/detail/linalg.hpp"
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
    if (!all_finite(table.score.data(), static_cast<Index>(table.score.size()))) {
      return {StatusCode::not_finite, "tables", "scores have a NaN or an infinity"};
    }
  }
  return {};
}

}  // namespace detail
}  // namespace kvfold
