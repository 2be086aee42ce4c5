/// \file
/// The three tiers of a head's rows, and the skeleton of a plan.
#pragma once

#include <algorithm>
#include <concepts>

#include "kvfold/budget/budget_policy.hpp"
#include "kvfold/detail/linalg.hpp"
#include "kvfold/detail/row_ranks.hpp"
#include "kvfold/exec/executor.hpp"
#include "kvfold/types.hpp"

namespace kvfold {

/// A policy that turns scores and budgets into a plan for views V.
///
/// - `workspace_bytes(view, limits, workers)`: bytes that `reduce` needs while budgets stay within `limits`.
/// - `reduce(view, table, budgets, workspace, executor)`: the plan, which lives in the workspace.
// clang-format off
template <class R, class V>
concept ReducerFor = KVCacheView<V> && requires(const R& r, const V& view, const ScoreTable& table, RowLimits limits,
                                                std::span<const Index> budgets, Workspace workspace,
                                                SerialExecutor& executor, Index workers) {
  { r.validate() } noexcept -> std::same_as<Status>;
  { r.workspace_bytes(view, limits, workers) } noexcept -> std::same_as<std::size_t>;
  { r.reduce(view, table, budgets, workspace, executor) } noexcept -> std::same_as<Result<CompressionPlan>>;
};
// clang-format on

namespace detail {

/// How many rows below the kept ones are candidates to merge.
struct CandidateRule {
  float gamma = 0.f;       ///< R_h = gamma * B_h, rounded down
  float mass_share = 0.f;  ///< above 0: candidates end where this share of the head's score is held
};

/// Kept rows and candidates of every head, both ascending, and the tables of a plan that follow from them.
struct Tiers {
  std::span<Index> source_rows;       // [H]
  std::span<Index> row_offset;        // [H + 1]
  std::span<Index> kept_offset;       // [H + 1]
  std::span<Index> candidate_offset;  // [H + 1] room for gamma * B_h; `candidate_count` tells how much is used
  std::span<Index> candidate_count;   // [H]
  std::span<RowId> kept;
  std::span<RowId> candidates;
  std::span<RowFate> fate;     // [sum of T_h]
  std::span<RowId> row_class;  // [sum of T_h]
  std::span<Rank> ranks;       // [sum of T_h] scratch
  std::span<float> share;      // [2 * H] kept and candidate share of the head's score

  [[nodiscard]] std::span<const RowId> kept_of(Index h) const noexcept {
    return kept.subspan(at(kept_offset[at(h)]), at(kept_offset[at(h + 1)] - kept_offset[at(h)]));
  }
  [[nodiscard]] std::span<const RowId> candidates_of(Index h) const noexcept {
    return candidates.subspan(at(candidate_offset[at(h)]), at(candidate_count[at(h)]));
  }
  [[nodiscard]] std::span<RowFate> fate_of(Index h) const noexcept {
    return fate.subspan(at(row_offset[at(h)]), at(source_rows[at(h)]));
  }
  [[nodiscard]] std::span<RowId> class_of(Index h) const noexcept {
    return row_class.subspan(at(row_offset[at(h)]), at(source_rows[at(h)]));
  }
};

/// The most candidates that a layer can have, given what it may keep.
[[nodiscard]] inline Index candidate_limit(float gamma, Index kept, Index rows) noexcept {
  const double wanted = static_cast<double>(gamma) * static_cast<double>(kept);
  return wanted >= static_cast<double>(rows) ? rows : static_cast<Index>(wanted);
}

[[nodiscard]] inline Tiers take_tiers(Arena& arena, Index heads, Index rows, Index kept, Index candidates) noexcept {
  Tiers t;
  t.source_rows = arena.take<Index>(heads);
  t.row_offset = arena.take<Index>(heads + 1);
  t.kept_offset = arena.take<Index>(heads + 1);
  t.candidate_offset = arena.take<Index>(heads + 1);
  t.candidate_count = arena.take<Index>(heads);
  t.kept = arena.take<RowId>(kept);
  t.candidates = arena.take<RowId>(candidates);
  t.fate = arena.take<RowFate>(rows);
  t.row_class = arena.take<RowId>(rows);
  t.ranks = arena.take<Rank>(rows);
  t.share = arena.take<float>(2 * heads);
  return t;
}

/// Ranks one head and fills its part of the tiers.
inline void rank_head(const ScoreTable& table, Index h, const CandidateRule& rule, const Tiers& tiers) noexcept {
  const auto scores = table.scores(h);
  const auto scratch = tiers.ranks.subspan(at(tiers.row_offset[at(h)]), scores.size());
  const RowRanks rank(scores, table.protections(h), scratch);
  const Index budget = tiers.kept_offset[at(h + 1)] - tiers.kept_offset[at(h)];
  const Index room = tiers.candidate_offset[at(h + 1)] - tiers.candidate_offset[at(h)];
  const Rank lowest_kept = rank.lowest_of_best(budget), lowest_candidate = rank.lowest_of_best(budget + room);

  const auto kept_rows = tiers.kept.subspan(at(tiers.kept_offset[at(h)]), at(budget));
  const auto candidate_rows = tiers.candidates.subspan(at(tiers.candidate_offset[at(h)]), at(room));
  const auto fate = tiers.fate_of(h);
  const auto row_class = tiers.class_of(h);
  std::fill(fate.begin(), fate.end(), RowFate::evicted);
  std::fill(row_class.begin(), row_class.end(), RowId{-1});
  std::size_t kept_count = 0, candidate_count = 0;
  const double all = sum_in_fp64(scores.data(), rank.rows());
  double kept = 0.0, merged = 0.0;
  rank.for_best(lowest_candidate, [&](Index t, Rank of_row) {
    const auto score = static_cast<double>(scores[at(t)]);
    if (of_row >= lowest_kept) {
      kept += score;
      fate[at(t)] = RowFate::kept;
      row_class[at(t)] = static_cast<RowId>(kept_count);
      kept_rows[kept_count++] = static_cast<RowId>(t);
    } else {
      merged += score;
      candidate_rows[candidate_count++] = static_cast<RowId>(t);
    }
  });
  if (rule.mass_share > 0.f) {
    const auto more_important = [&](RowId a, RowId b) { return rank[a] > rank[b]; };
    std::sort(candidate_rows.begin(), candidate_rows.end(), more_important);
    merged = 0.0;
    candidate_count = 0;
    for (double held = kept; candidate_count < candidate_rows.size(); ++candidate_count) {
      if (held >= static_cast<double>(rule.mass_share) * all) break;
      const auto score = static_cast<double>(scores[at(candidate_rows[candidate_count])]);
      held += score;
      merged += score;
    }
    std::sort(candidate_rows.begin(), candidate_rows.begin() + static_cast<Index>(candidate_count));
  }
  tiers.candidate_count[at(h)] = static_cast<Index>(candidate_count);
  tiers.share[at(2 * h)] = static_cast<float>(all > 0.0 ? kept / all : 1.0);
  tiers.share[at(2 * h + 1)] = static_cast<float>(all > 0.0 ? merged / all : 0.0);
}

[[nodiscard]] inline Status check_reduce_call(Index heads, Index rows, const ScoreTable& table,
                                              std::span<const Index> budgets) noexcept {
  if (table.heads() != heads || static_cast<Index>(table.score.size()) != rows ||
      table.protection.size() != table.score.size()) {
    return {StatusCode::size_mismatch, "table", "is not of the view's heads and rows"};
  }
  if (static_cast<Index>(budgets.size()) != heads) {
    return {StatusCode::size_mismatch, "budgets", "must have one entry per head"};
  }
  for (Index h = 0; h < heads; ++h) {
    if (budgets[at(h)] < 1 || budgets[at(h)] > table.rows(h)) {
      return {StatusCode::invalid_argument, "budgets", "must be at least 1 and at most the rows of the head", h};
    }
  }
  if (!all_finite(table.score.data(), rows)) return {StatusCode::not_finite, "scores", "has a NaN or an infinity"};
  return {};
}

/// Splits every head into its tiers. The result lives in `arena`.
template <KVCacheView V>
[[nodiscard]] Result<Tiers> make_tiers(const V& view, const ScoreTable& table, std::span<const Index> budgets,
                                       const CandidateRule& rule, Arena& arena, Executor auto& executor) noexcept {
  const Index heads = view.shape().kv_heads, rows = total_rows(view);
  if (Status bad = check_reduce_call(heads, rows, table, budgets); !bad.ok()) return bad;
  Index kept = 0, candidates = 0;
  const auto room_of = [&](Index h) {
    return candidate_limit(rule.gamma, budgets[at(h)], table.rows(h) - budgets[at(h)]);
  };
  for (Index h = 0; h < heads; ++h) {
    kept += budgets[at(h)];
    candidates += room_of(h);
  }
  const Tiers tiers = take_tiers(arena, heads, rows, kept, candidates);
  if (Status bad = check(arena); !bad.ok()) return bad;
  tiers.row_offset[0] = tiers.kept_offset[0] = tiers.candidate_offset[0] = 0;
  for (Index h = 0; h < heads; ++h) {
    tiers.source_rows[at(h)] = table.rows(h);
    tiers.row_offset[at(h + 1)] = tiers.row_offset[at(h)] + table.rows(h);
    tiers.kept_offset[at(h + 1)] = tiers.kept_offset[at(h)] + budgets[at(h)];
    tiers.candidate_offset[at(h + 1)] = tiers.candidate_offset[at(h)] + room_of(h);
  }
  auto task = [&](Index h, Index) noexcept { rank_head(table, h, rule, tiers); };
  executor.run(heads, task);
  return tiers;
}

/// The part of a plan that follows from the tiers.
[[nodiscard]] inline CompressionPlan plan_of(const LayerShape& shape, const Tiers& tiers,
                                             std::span<const Index> merged_offset) noexcept {
  CompressionPlan plan;
  plan.shape = shape;
  plan.source_rows = tiers.source_rows;
  plan.kept_offset = tiers.kept_offset;
  plan.kept = tiers.kept;
  plan.merged_offset = merged_offset;
  plan.row_offset = tiers.row_offset;
  plan.fate = tiers.fate;
  plan.row_class = tiers.row_class;
  double kept = 0.0;
  for (Index h = 0; h < shape.kv_heads; ++h) kept += static_cast<double>(tiers.share[at(2 * h)]);
  plan.kept_score_share = static_cast<float>(kept / static_cast<double>(shape.kv_heads));
  return plan;
}

}  // namespace detail
}  // namespace kvfold
