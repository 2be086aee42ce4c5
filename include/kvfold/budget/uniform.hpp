/// \file
/// The reference budget: the same number of rows for every head.
#pragma once

#include "kvfold/budget/budget_policy.hpp"

namespace kvfold {

/// B_h = min(B, T_h).
class UniformBudget {
 public:
  struct Options {
    Index rows = 256;  ///< B, rows per head, at least 1
    [[nodiscard]] Status validate() const noexcept {
      if (rows < 1 || rows > kMaxRows) return {StatusCode::invalid_argument, "budget", "rows must be in [1, kMaxRows]"};
      return {};
    }
  };

  UniformBudget() noexcept = default;
  explicit UniformBudget(Options options) noexcept : options_(options) {}

  [[nodiscard]] const Options& options() const noexcept { return options_; }
  [[nodiscard]] Status validate() const noexcept { return options_.validate(); }
  [[nodiscard]] RowLimits limits(Index heads) const noexcept { return {options_.rows * heads, options_.rows}; }
  [[nodiscard]] static std::size_t workspace_bytes(Index /*rows*/) noexcept { return 0; }

  Status allocate(std::span<const ScoreTable> tables, std::span<Index> budgets, Workspace) const noexcept {
    if (Status bad = detail::check_budget_call(tables, budgets); !bad.ok()) return bad;
    std::size_t i = 0;
    for (const ScoreTable& table : tables) {
      for (Index h = 0; h < table.heads(); ++h) budgets[i++] = std::min(options_.rows, table.rows(h));
    }
    return {};
  }

 private:
  Options options_;
};

static_assert(BudgetPolicy<UniformBudget>);

}  // namespace kvfold
