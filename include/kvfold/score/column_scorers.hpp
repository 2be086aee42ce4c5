/// \file
/// The baselines that rank rows by plain column sums of attention: H2O, SnapKV, TOVA.
#pragma once

#include "kvfold/detail/collect_columns.hpp"
#include "kvfold/score/scorer.hpp"

namespace kvfold {

/// What the three have in common; `Rule` says which columns are ranked and how.
template <class Rule>
class ColumnScorer {
 public:
  using Options = typename Rule::Options;
  template <class V, class E>
  static constexpr bool kUnderstands = detail::ColumnEvidence<E, V>;

  ColumnScorer() noexcept = default;
  explicit ColumnScorer(Options options) noexcept : options_(options) {}

  [[nodiscard]] const Options& options() const noexcept { return options_; }
  [[nodiscard]] Status validate() const noexcept { return options_.validate(); }

  template <KVCacheView V, detail::ColumnEvidence<V> E>
  [[nodiscard]] std::size_t workspace_bytes(const V& view, const E& evidence, Index workers) const noexcept {
    detail::Arena arena;
    detail::measure(view, evidence, Rule::request(options_), arena, workers);
    static_cast<void>(arena.take<float>(workers, detail::max_rows(view)));
    return arena.required_bytes();
  }

  template <KVCacheView V, detail::ColumnEvidence<V> E, Executor X>
  Status score(const V& view, const E& evidence, ScoreTable table, Workspace workspace, X& executor) const noexcept {
    const LayerShape shape = view.shape();
    if (Status bad = detail::check_score_call(*this, view, table, executor); !bad.ok()) return bad;
    detail::Arena arena(workspace);
    const Result<ColumnSums> sums = detail::collect(view, evidence, Rule::request(options_), arena, executor);
    if (!sums.ok()) return sums.status();
    const Index most = detail::max_rows(view);
    const std::span<float> scratch = arena.take<float>(static_cast<Index>(executor.concurrency()), most);
    if (Status bad = detail::check(arena); !bad.ok()) return bad;

    const Index columns = detail::column_count(sums->detail, shape.group_size);
    auto task = [&](Index h, Index worker) noexcept {
      const Index rows = table.rows(h), first = table.offset[detail::at(h)];
      const std::span<const float> all = Rule::kGlobal ? sums->global : sums->local;
      detail::reduce_columns(all.subspan(detail::at(columns * first), detail::at(columns * rows)), rows, false,
                             table.scores(h));
      const Protect protect = Rule::protect(options_);
      protect.mark(table.protections(h));
      const Index from = protect.first_evictable(rows), end = protect.end_evictable(rows);
      const auto evictable = table.scores(h).subspan(detail::at(from), detail::at(end - from));
      const auto pooled = scratch.subspan(detail::at(worker * most), evictable.size());
      detail::pool_row(evictable, Rule::pool(options_), pooled);
      std::copy(pooled.begin(), pooled.end(), evictable.begin());
    };
    executor.run(shape.kv_heads, task);
    return Rule::kOverHeads ? average_over_heads(table) : Status{};
  }

 private:
  /// One score per row for the whole layer. Heads must have the same rows.
  static Status average_over_heads(ScoreTable table) noexcept {
    const Index rows = table.rows(0);
    for (Index h = 1; h < table.heads(); ++h) {
      if (table.rows(h) != rows) {
        return {StatusCode::unsupported, "view", "heads of unequal size: the policy scores all heads of a layer alike",
                h};
      }
    }
    for (Index t = 0; t < rows; ++t) {
      float sum = 0.f;
      for (Index h = 0; h < table.heads(); ++h) sum += table.scores(h)[detail::at(t)];
      for (Index h = 0; h < table.heads(); ++h)
        table.scores(h)[detail::at(t)] = sum / static_cast<float>(table.heads());
    }
    return {};
  }

  Options options_;
};

/// H2O (arXiv 2306.14048): attention from all queries; the recent half of the budget is protected.
struct H2oRule {
  struct Options {
    Index recent = 0;        ///< rows; the paper's choice is half the budget, see `for_budget`
    Index query_stride = 1;  ///< s, at least 1: every s-th query

    [[nodiscard]] static Options for_budget(Index rows) noexcept { return {.recent = rows / 2}; }
    [[nodiscard]] Status validate() const noexcept {
      if (query_stride < 1 || query_stride > kMaxRows) {
        return {StatusCode::invalid_argument, "query_stride", "must be in [1, kMaxRows]"};
      }
      return Protect{.recent = recent}.validate();
    }
  };
  static constexpr bool kGlobal = true, kOverHeads = false;
  static detail::ColumnRequest request(const Options& o) noexcept {
    return {.query_stride = o.query_stride, .local = false};
  }
  static Protect protect(const Options& o) noexcept { return {.recent = o.recent}; }
  static Pool pool(const Options&) noexcept { return {}; }
};

/// SnapKV (arXiv 2404.14469): attention from the last W queries, pooled; the window is protected.
struct SnapKvRule {
  struct Options {
    Index window = 32;                                 ///< W, queries of the score, at least 1
    Index recent = 32;                                 ///< protected rows; the paper's choice is the window
    Pool pool{.kind = PoolKind::average, .width = 5};  ///< the paper uses 7

    /// The paper's method needs a budget above its window: below twice the window, half of the budget is protected.
    [[nodiscard]] Options for_budget(Index rows) const noexcept {
      Options o = *this;
      o.recent = std::min(recent, rows / 2);
      return o;
    }
    [[nodiscard]] Status validate() const noexcept {
      if (window < 1 || window > kMaxRows) return {StatusCode::invalid_argument, "window", "must be in [1, kMaxRows]"};
      if (Status bad = Protect{.recent = recent}.validate(); !bad.ok()) return bad;
      return pool.validate();
    }
  };
  static constexpr bool kGlobal = false, kOverHeads = false;
  static detail::ColumnRequest request(const Options& o) noexcept { return {.window = o.window, .global = false}; }
  static Protect protect(const Options& o) noexcept { return {.recent = o.recent}; }
  static Pool pool(const Options& o) noexcept { return o.pool; }
};

/// TOVA (arXiv 2401.06104): attention from the last query, averaged over all heads of the layer.
struct TovaRule {
  struct Options {
    [[nodiscard]] static Status validate() noexcept { return {}; }
  };
  static constexpr bool kGlobal = false, kOverHeads = true;
  static detail::ColumnRequest request(const Options&) noexcept { return {.window = 1, .global = false}; }
  static Protect protect(const Options&) noexcept { return {}; }
  static Pool pool(const Options&) noexcept { return {}; }
};

using H2oScorer = ColumnScorer<H2oRule>;
using SnapKvScorer = ColumnScorer<SnapKvRule>;
using TovaScorer = ColumnScorer<TovaRule>;

}  // namespace kvfold
