/// \file
/// Budgets for storage that cannot give each head a count of its own, and what that costs.
#pragma once

#include "kvfold/budget/budget_policy.hpp"
#include "kvfold/detail/linalg.hpp"
#include "kvfold/detail/row_ranks.hpp"
#include "kvfold/exec/executor.hpp"

namespace kvfold::detail {

/// The count that every head gets, at least 1. Storage with one count per layer: the mean of the budgets, rounded down.
/// Storage with one count for all layers: min(B, T), where H * B and `limits` are the most that the policy gives out, so that
/// no score, and so no layer, has a say in it. `limits` must not exceed the layer's rows.
[[nodiscard]] inline Index equal_count(RowCounts counts, std::span<const Index> budgets,
                                       const RowLimits& limits) noexcept {
  const auto heads = static_cast<Index>(budgets.size());
  if (counts == RowCounts::per_model) return std::max<Index>(std::min(limits.total / heads, limits.per_head), 1);
  Index sum = 0;
  for (const Index b : budgets) sum += b;
  return std::max<Index>(sum / heads, 1);
}

/// Scratch for `equal_counts_cost`.
struct EqualCountsScratch {
  std::span<Rank> ranks;     // [sum of T_h]
  std::span<double> shares;  // [H]

  static EqualCountsScratch take(Arena& arena, Index heads, Index rows) noexcept {
    EqualCountsScratch s;
    s.ranks = arena.take<Rank>(rows);
    s.shares = arena.take<double>(heads);
    return s;
  }
};

/// The mean over heads of share_h(B_h) - share_h(count), where share_h(n) is what the n best rows of head h, in the order
/// of `Rank`, hold of the sum of its scores (1 where that is 0). Only the rows between the two counts are summed.
/// O(T_h) per head.
[[nodiscard]] inline float equal_counts_cost(const ScoreTable& table, std::span<const Index> budgets, Index count,
                                             const EqualCountsScratch& scratch, Executor auto& executor) noexcept {
  auto task = [&](Index h, Index) noexcept {
    scratch.shares[at(h)] = 0.0;
    if (budgets[at(h)] == count) return;
    const auto scores = table.scores(h);
    const RowRanks rank(scores, table.protections(h), scratch.ranks.subspan(at(table.offset[at(h)]), scores.size()));
    const Rank lowest_of_fewer = rank.lowest_of_best(std::min(budgets[at(h)], count));
    const Rank lowest_of_more = rank.lowest_of_best(std::max(budgets[at(h)], count));
    const double all = sum_in_fp64(scores.data(), rank.rows());
    double between = 0.0;
    rank.for_best(lowest_of_more, [&](Index t, Rank of_row) {
      if (of_row < lowest_of_fewer) between += static_cast<double>(scores[at(t)]);
    });
    if (all > 0.0) scratch.shares[at(h)] = (budgets[at(h)] > count ? between : -between) / all;
  };
  executor.run(table.heads(), task);
  double sum = 0.0;
  for (const double share : scratch.shares) sum += share;
  return static_cast<float>(sum / static_cast<double>(table.heads()));
}

}  // namespace kvfold::detail
