/// \file
/// The Global-Local score of EMS (arXiv 2412.08521), and the span term that keeps what follows a found row.
#pragma once

#include <cmath>

#include "kvfold/detail/collect_columns.hpp"
#include "kvfold/score/scorer.hpp"

namespace kvfold {

/// s_j = max(omega * alpha * glo_j, loc_j, beta * max(loc_{j-w} .. loc_{j-1})).
///
/// `glo_j` is the attention that row j got from all queries of the evidence, `loc_j` from the last W of them;
/// alpha = mean(loc) / mean(glo) over evictable rows aligns the two, so that neither early rows (many queries saw them)
/// nor late ones (the window is near) win by position. The third, the span term, is kvfold's extension: what a model has
/// found it reads on from, so the w rows after an attended one are needed next, though no query has looked at them yet.
///
/// Evidence: `QueryRows` (all queries; with those of the window only, glo is loc), `ColumnSums` (from
/// `GlobalLocalAccumulator` or the engine), `AttentionWeights`. Cost: that of the column sums, and O(G * T) per head.
class GlobalLocalScorer {
 public:
  enum class Combine : unsigned char { max, sum };
  enum class Normalise : unsigned char {
    none,
    lifetime,  ///< glo_j is divided by the number of queries that could see row j
  };

  struct Options {
    Index window = 32;                           ///< W, queries of the local term, at least 1
    Protect protect{.sinks = 4, .recent = 8};    ///< rows that stay
    GroupReduction group = GroupReduction::max;  ///< over the G query heads, before anything else
    Combine combine = Combine::max;              ///< of the aligned terms
    Normalise normalise = Normalise::none;       ///< of the global term
    Index query_stride = 1;     ///< s: the global term takes every s-th query (QueryRows evidence only)
    float global_weight = 1.f;  ///< omega, of the aligned global term, at least 0; 1 in EMS
    float span_weight = 0.35f;  ///< beta, at least 0; 0 leaves the span term out
    Index span_width = 5;       ///< w, rows, at least 1: as long as an answer (some 5 tokens, or 13 bytes)
    Pool local_pool{};          ///< of loc, before alignment
    Pool score_pool{};          ///< of s

    [[nodiscard]] Status validate() const noexcept {
      if (window < 1 || window > kMaxRows) return {StatusCode::invalid_argument, "window", "must be in [1, kMaxRows]"};
      if (query_stride < 1 || query_stride > kMaxRows) {
        return {StatusCode::invalid_argument, "query_stride", "must be in [1, kMaxRows]"};
      }
      if (!(global_weight >= 0.f) || !std::isfinite(global_weight)) {
        return {StatusCode::invalid_argument, "global_weight", "must be a number of at least 0"};
      }
      if (!(span_weight >= 0.f) || !std::isfinite(span_weight)) {
        return {StatusCode::invalid_argument, "span_weight", "must be a number of at least 0"};
      }
      if (Status bad = protect.validate(); !bad.ok()) return bad;
      if (span_width < 1 || span_width > kMaxRows) {
        return {StatusCode::invalid_argument, "span_width", "must be in [1, kMaxRows]"};
      }
      if (Status bad = local_pool.validate(); !bad.ok()) return bad;
      return score_pool.validate();
    }
  };

  template <class V, class E>
  static constexpr bool kUnderstands = detail::ColumnEvidence<E, V>;

  GlobalLocalScorer() noexcept = default;
  explicit GlobalLocalScorer(Options options) noexcept : options_(options) {}

  [[nodiscard]] const Options& options() const noexcept { return options_; }
  [[nodiscard]] Status validate() const noexcept { return options_.validate(); }

  template <KVCacheView V, detail::ColumnEvidence<V> E>
  [[nodiscard]] std::size_t workspace_bytes(const V& view, const E& evidence, Index workers) const noexcept {
    detail::Arena arena;
    detail::measure(view, evidence, request(), arena, workers);
    static_cast<void>(arena.take<float>(workers, kRows, detail::max_rows(view)));
    return arena.required_bytes();
  }

  template <KVCacheView V, detail::ColumnEvidence<V> E, Executor X>
  Status score(const V& view, const E& evidence, ScoreTable table, Workspace workspace, X& executor) const noexcept {
    const LayerShape shape = view.shape();
    if (Status bad = detail::check_score_call(*this, view, table, executor); !bad.ok()) return bad;
    detail::Arena arena(workspace);
    const Result<ColumnSums> sums = detail::collect(view, evidence, request(), arena, executor);
    if (!sums.ok()) return sums.status();
    if (options_.normalise == Normalise::lifetime && sums->seen.empty()) {
      return {StatusCode::unsupported, "evidence", "does not tell how many queries saw each row (lifetime needs it)"};
    }
    const Index most = detail::max_rows(view);
    const std::span<float> scratch = arena.take<float>(static_cast<Index>(executor.concurrency()), kRows, most);
    if (Status bad = detail::check(arena); !bad.ok()) return bad;

    const Index columns = detail::column_count(sums->detail, shape.group_size);
    auto task = [&](Index h, Index worker) noexcept {
      const Index rows = table.rows(h), first = table.offset[detail::at(h)];
      const auto row = [&](Index i) {
        return scratch.subspan(detail::at((worker * kRows + i) * most), detail::at(rows));
      };
      const std::span<float> glo = row(0), loc = row(1), pooled = row(2);
      const bool by_max = options_.group == GroupReduction::max;
      const auto block = [&](std::span<const float> all) {
        return all.subspan(detail::at(columns * first), detail::at(columns * rows));
      };
      detail::reduce_columns(block(sums->global), rows, by_max, glo);
      detail::reduce_columns(block(sums->local), rows, by_max, loc);
      if (options_.normalise == Normalise::lifetime) {
        for (Index j = 0; j < rows; ++j) glo[detail::at(j)] /= std::max(sums->seen[detail::at(first + j)], 1.f);
      }
      options_.protect.mark(table.protections(h));
      combine(glo, loc, pooled, table.scores(h));
    };
    executor.run(shape.kv_heads, task);
    return {};
  }

 private:
  static constexpr Index kRows = 3;  // scratch rows of one worker

  [[nodiscard]] detail::ColumnRequest request() const noexcept {
    return {.window = options_.window,
            .query_stride = options_.query_stride,
            .per_query_head = options_.group == GroupReduction::max,
            .global = true};
  }

  /// a such that mean(a * x) = mean(reference); 1 where either mean is 0 and nothing can be aligned.
  static double alignment(std::span<const float> reference, std::span<const float> x) noexcept {
    const double sum_reference = detail::sum_in_fp64(reference.data(), static_cast<Index>(reference.size()));
    const double sum_x = detail::sum_in_fp64(x.data(), static_cast<Index>(x.size()));
    return sum_reference > 0.0 && sum_x > 0.0 ? sum_reference / sum_x : 1.0;
  }

  void combine(std::span<const float> glo, std::span<float> loc, std::span<float> pooled,
               std::span<float> out) const noexcept {
    const auto rows = static_cast<Index>(out.size());
    const Index first = options_.protect.first_evictable(rows), end = options_.protect.end_evictable(rows);
    const auto evictable = [&](auto row) { return row.subspan(detail::at(first), detail::at(end - first)); };
    if (options_.local_pool.kind != PoolKind::none) {
      detail::pool_row(evictable(loc), options_.local_pool, evictable(pooled));
      std::copy_n(pooled.begin() + first, end - first, loc.begin() + first);
    }
    const double alpha = static_cast<double>(options_.global_weight) * alignment(evictable(loc), evictable(glo));
    for (std::size_t j = 0; j < out.size(); ++j) {
      const auto aligned = static_cast<float>(alpha * static_cast<double>(glo[j]));
      out[j] = options_.combine == Combine::max ? std::max(aligned, loc[j]) : aligned + loc[j];
    }
    if (options_.span_weight > 0.f) {
      detail::trailing_max(evictable(loc), options_.span_width, evictable(pooled));
      for (Index t = first; t < end; ++t) {
        const auto j = detail::at(t);
        const float span = options_.span_weight * pooled[j];
        out[j] = options_.combine == Combine::max ? std::max(out[j], span) : out[j] + span;
      }
    }
    if (options_.score_pool.kind != PoolKind::none) {
      detail::pool_row(evictable(out), options_.score_pool, evictable(pooled));
      std::copy_n(pooled.begin() + first, end - first, out.begin() + first);
    }
  }

  Options options_;
};

}  // namespace kvfold
