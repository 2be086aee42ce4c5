/// \file
/// The pipeline: score, budget, reduce, apply. Read this first.
///
/// ```
/// engine's K,V --view--> score --ScoreTable--> budget --rows per head--> reduce --CompressionPlan--> apply
/// ```
#pragma once

#include "kvfold/apply.hpp"
#include "kvfold/budget/adaptive_heads.hpp"
#include "kvfold/budget/equal_counts.hpp"
#include "kvfold/budget/uniform.hpp"
#include "kvfold/exec/executor.hpp"
#include "kvfold/exec/workspace.hpp"
#include "kvfold/reduce/evict_only.hpp"
#include "kvfold/reduce/evict_then_merge.hpp"
#include "kvfold/score/column_scorers.hpp"
#include "kvfold/score/global_local_scorer.hpp"
#include "kvfold/score/streaming_llm_scorer.hpp"

namespace kvfold {

/// A compression method, made of three policies. Immutable; one object serves any number of layers and threads.
///
/// \tparam Scorer models `ScorerFor` the views and evidence it is called with
/// \tparam Budget models `BudgetPolicy`
/// \tparam Reducer models `ReducerFor` the views it is called with
template <class Scorer, BudgetPolicy Budget, class Reducer>
class Compressor {
 public:
  struct Options {
    typename Scorer::Options score{};
    typename Budget::Options budget{};
    typename Reducer::Options reduce{};
  };

  Compressor() noexcept = default;
  explicit Compressor(const Options& options) noexcept
      : scorer_(options.score), budget_(options.budget), reducer_(options.reduce) {}
  Compressor(Scorer scorer, Budget budget, Reducer reducer) noexcept
      : scorer_(std::move(scorer)), budget_(std::move(budget)), reducer_(std::move(reducer)) {}

  [[nodiscard]] const Scorer& scorer() const noexcept { return scorer_; }
  [[nodiscard]] const Budget& budget() const noexcept { return budget_; }
  [[nodiscard]] const Reducer& reducer() const noexcept { return reducer_; }

  /// Whether all options are in range. `plan` asks too; ask early to fail early.
  [[nodiscard]] Status validate() const noexcept {
    if (Status bad = scorer_.validate(); !bad.ok()) return bad;
    if (Status bad = budget_.validate(); !bad.ok()) return bad;
    return reducer_.validate();
  }

  /// Bytes of workspace that `plan` and `compress` need for this view and evidence with an executor of that concurrency,
  /// or the status that `plan` would give to the options, or to the view's sizes. O(H): no row is looked at.
  template <KVCacheView V, class E>
    requires ScorerFor<Scorer, V, E> && ReducerFor<Reducer, V>
  [[nodiscard]] Result<std::size_t> workspace_bytes(const V& view, const E& evidence, Index workers) const noexcept {
    if (Status bad = check_call(workers); !bad.ok()) return bad;
    if (Status bad = detail::check_sizes(view); !bad.ok()) return bad;
    detail::Arena arena;
    static_cast<void>(Tables::take(arena, view));
    const std::size_t mark = arena.mark();
    static_cast<void>(arena.take_bytes(scorer_.workspace_bytes(view, evidence, workers)));
    arena.rewind(mark);
    static_cast<void>(arena.take_bytes(budget_.workspace_bytes(detail::total_rows(view))));
    arena.rewind(mark);
    if (detail::has_equal_counts(view)) static_cast<void>(take_equal_counts(arena, view));
    arena.rewind(mark);
    static_cast<void>(arena.take_bytes(reducer_.workspace_bytes(view, limits(view), workers)));
    return arena.required_bytes();
  }

  /// Decides what to keep, merge and evict. The view is only read; the plan lives in `workspace` until that is used again.
  /// \returns the plan, or a status that names the argument. The same bits for every executor.
  template <KVCacheView V, class E, Executor X>
    requires ScorerFor<Scorer, V, E> && ReducerFor<Reducer, V>
  [[nodiscard]] Result<CompressionPlan> plan(const V& view, const E& evidence, Workspace workspace,
                                             X& executor) const noexcept {
    const auto workers = static_cast<Index>(executor.concurrency());
    if (Status bad = check_call(workers); !bad.ok()) return bad;
    if (Status bad = detail::check_view(view, executor); !bad.ok()) return bad;
    detail::Arena arena(workspace);
    const Tables tables = Tables::take(arena, view);
    const std::size_t mark = arena.mark();
    const Workspace score_space = arena.take_bytes(scorer_.workspace_bytes(view, evidence, workers));
    if (Status bad = detail::check(arena); !bad.ok()) return bad;
    const ScoreTable table{.offset = tables.offset, .score = tables.score, .protection = tables.protection};
    if (Status bad = scorer_.score(view, evidence, table, score_space, executor); !bad.ok()) return bad;
    if (!detail::all_finite(table.score.data(), static_cast<Index>(table.score.size()))) {
      return Status{StatusCode::not_finite, "scores", "has a NaN or an infinity"};
    }

    arena.rewind(mark);
    const Workspace budget_space = arena.take_bytes(budget_.workspace_bytes(detail::total_rows(view)));
    if (Status bad = detail::check(arena); !bad.ok()) return bad;
    if (Status bad = detail::allocate_budgets(budget_, {&table, 1}, tables.budgets, budget_space, executor);
        !bad.ok()) {
      return bad;
    }

    arena.rewind(mark);
    float equal_counts_cost = 0.f;
    if (detail::has_equal_counts(view)) {
      const detail::EqualCountsScratch scratch = take_equal_counts(arena, view);
      if (Status bad = detail::check(arena); !bad.ok()) return bad;
      const Index count = detail::equal_count(row_counts_of(view), tables.budgets, limits(view));
      equal_counts_cost = detail::equal_counts_cost(table, tables.budgets, count, scratch, executor);
      std::fill(tables.budgets.begin(), tables.budgets.end(), count);
    }

    arena.rewind(mark);
    const Workspace reduce_space = arena.take_bytes(reducer_.workspace_bytes(view, limits(view), workers));
    if (Status bad = detail::check(arena); !bad.ok()) return bad;
    Result<CompressionPlan> plan = reducer_.reduce(view, table, tables.budgets, reduce_space, executor);
    if (plan.ok()) plan->equal_counts_cost = equal_counts_cost;
    return plan;
  }

  /// Plans and applies. When it fails, nothing has been written.
  template <MutableKVCacheView V, class E, Executor X>
    requires ScorerFor<Scorer, V, E> && ReducerFor<Reducer, V>
  [[nodiscard]] Result<CompressionReport> compress(V& view, const E& evidence, Workspace workspace,
                                                   X& executor) const noexcept {
    const Result<CompressionPlan> made = plan(std::as_const(view), evidence, workspace, executor);
    if (!made.ok()) return made.status();
    return apply(made.value(), view);
  }

  /// Convenience: the same on the calling thread, with a workspace that is allocated and released again.
  template <MutableKVCacheView V, class E>
    requires ScorerFor<Scorer, V, E> && ReducerFor<Reducer, V>
  [[nodiscard]] Result<CompressionReport> compress(V& view, const E& evidence) const noexcept {
    SerialExecutor executor;
    const Result<std::size_t> bytes = workspace_bytes(std::as_const(view), evidence, executor.concurrency());
    if (!bytes.ok()) return bytes.status();
    WorkspaceBuffer buffer;
    if (Status bad = buffer.reserve(bytes.value()); !bad.ok()) return bad;
    return compress(view, evidence, buffer.get(), executor);
  }

 private:
  struct Tables {
    std::span<Index> offset;
    std::span<float> score;
    std::span<Protection> protection;
    std::span<Index> budgets;

    template <KVCacheView V>
    static Tables take(detail::Arena& arena, const V& view) noexcept {
      const Index rows = detail::total_rows(view);
      Tables t;
      t.offset = detail::take_offsets(view, arena);
      t.score = arena.take<float>(rows);
      t.protection = arena.take<Protection>(rows);
      t.budgets = arena.take<Index>(view.shape().kv_heads);
      return t;
    }
  };

  [[nodiscard]] Status check_call(Index workers) const noexcept {
    if (workers < 1) return {StatusCode::invalid_argument, "executor", "concurrency() must be at least 1"};
    return validate();
  }

  template <KVCacheView V>
  [[nodiscard]] RowLimits limits(const V& view) const noexcept {
    const RowLimits most = budget_.limits(view.shape().kv_heads);
    return {std::min(most.total, detail::total_rows(view)), std::min(most.per_head, detail::max_rows(view))};
  }

  template <KVCacheView V>
  [[nodiscard]] static detail::EqualCountsScratch take_equal_counts(detail::Arena& arena, const V& view) noexcept {
    return detail::EqualCountsScratch::take(arena, view.shape().kv_heads, detail::total_rows(view));
  }

  Scorer scorer_{};
  Budget budget_{};
  Reducer reducer_{};
};

/// EMS: Global-Local score, budgets that follow the heads, evict-then-merge with a zero class.
using Ems = Compressor<GlobalLocalScorer, AdaptiveHeadBudget, EvictThenMerge<ZeroClassBatcher>>;
/// EMS's score and budgets, eviction only: for storage that has no place for log masses.
using EmsEvict = Compressor<GlobalLocalScorer, AdaptiveHeadBudget, EvictOnly>;

using StreamingLlm = Compressor<StreamingLlmScorer, UniformBudget, EvictOnly>;
using H2o = Compressor<H2oScorer, UniformBudget, EvictOnly>;
using SnapKv = Compressor<SnapKvScorer, UniformBudget, EvictOnly>;
using Tova = Compressor<TovaScorer, UniformBudget, EvictOnly>;

}  // namespace kvfold
