/// \file
/// Many views at once: the sequences and layers of a batch.
#pragma once

#include <algorithm>
#include <limits>
#include <ranges>
#include <span>
#include <utility>

#include "kvfold/compressor.hpp"

namespace kvfold {

namespace detail {

/// Views, or evidence, that lie one after the other: a vector, an array, a span.
template <class R>
concept Consecutive = std::ranges::contiguous_range<R> && std::ranges::sized_range<R>;

/// A view of a batch, and its rows: asked once, because views may look themselves over before they tell.
struct RankedView {
  Index rows = std::numeric_limits<Index>::max();
  Index view = -1;  // as it is made, comes before all views

  /// Longest first, ties by index.
  friend bool operator<(const RankedView& a, const RankedView& b) noexcept {
    return a.rows != b.rows ? a.rows > b.rows : a.view < b.view;
  }
};

/// Which views of a batch are worked on together and which alone. See `compress_batch`.
template <KVCacheView V>
class BatchOrder {
 public:
  BatchOrder(std::span<const V> views, Index workers) noexcept
      : views_(views), workers_(std::min(workers, kMaxHeads)), together_(find_together()) {}

  /// How many of the longest views have their heads spread over all workers, one view after the other.
  [[nodiscard]] Index together() const noexcept { return together_; }

  /// What a view costs: its rows, and 0 where it has no valid sizes (then it costs a status).
  [[nodiscard]] Index rows(Index i) const noexcept {
    return check_sizes(views_[at(i)]).ok() ? total_rows(views_[at(i)]) : 0;
  }
  [[nodiscard]] RankedView ranked(Index i) const noexcept { return {rows(i), i}; }
  /// The view that comes after `last`; no view (-1, of -1 rows) when there is none. O(views * H).
  [[nodiscard]] RankedView next(RankedView last) const noexcept {
    RankedView best{-1, -1};
    for (Index i = 0; i < count(); ++i) {
      const RankedView here = ranked(i);
      if (last < here && here < best) best = here;
    }
    return best;
  }

 private:
  /// The part of a view's work that no executor spreads: checks, budgets, applying, waiting between stages. Measured:
  /// 1 to 12 % of a serial compression, H = 8, D = 128, 1k to 16k rows, EMS and SnapKV.
  static constexpr double kSerialShare = 1.0 / 16;

  [[nodiscard]] Index count() const noexcept { return static_cast<Index>(views_.size()); }

  /// How long a view takes when its heads are spread: as many rounds as it takes to hand out all heads.
  [[nodiscard]] double spread_cost(Index i) const noexcept {
    const V& view = views_[at(i)];
    if (!check_sizes(view).ok()) return 0.0;
    const Index rounds = (view.shape().kv_heads + workers_ - 1) / workers_;
    return static_cast<double>(rounds) * static_cast<double>(max_rows(view)) +
           kSerialShare * static_cast<double>(total_rows(view));
  }

  /// How long views take when each is one task: rounds of the mean view, and never less than the longest.
  [[nodiscard]] double alone_cost(double longest, double sum, Index views) const noexcept {
    const Index rounds = (views + workers_ - 1) / workers_;
    return std::max(longest, static_cast<double>(rounds) * sum / static_cast<double>(views));
  }

  [[nodiscard]] Index find_together() const noexcept {
    if (workers_ <= 1) return 0;
    double left = 0.0, spread = 0.0, best_finish = 0.0;
    for (Index i = 0; i < count(); ++i) left += static_cast<double>(rows(i));
    Index best = 0;
    RankedView view = next({});
    for (Index k = 0; k <= std::min(count(), workers_); ++k) {
      const Index rest = count() - k;
      const double finish = spread + (rest > 0 ? alone_cost(static_cast<double>(view.rows), left, rest) : 0.0);
      if (k == 0 || finish < best_finish) {
        best = k;
        best_finish = finish;
      }
      if (rest == 0 || spread >= best_finish) break;
      spread += spread_cost(view.view);
      left -= static_cast<double>(view.rows);
      view = next(view);
    }
    return best;
  }

  std::span<const V> views_;
  Index workers_;
  Index together_;
};

/// Places the memory of a batch: one region that the views worked on together use one after the other, and that is
/// then cut into one slice per worker. `slice` is 0 where no view is worked on alone.
struct BatchMemory {
  std::span<RankedView> order;  // [views]
  Workspace region;
  std::size_t slice = 0;  // bytes

  template <class Method, KVCacheView V, class E>
  static BatchMemory take(Arena& arena, const Method& method, const BatchOrder<V>& order, std::span<const V> views,
                          std::span<const E> evidence, Index workers) noexcept {
    const auto count = static_cast<Index>(views.size());
    const auto bytes_of = [&](Index i, Index concurrency) -> std::size_t {
      const Result<std::size_t> bytes = method.workspace_bytes(views[at(i)], evidence[at(i)], concurrency);
      return bytes.ok() ? bytes.value() : 0;
    };
    RankedView last;  // of the views that are worked on together
    std::size_t together = 0, alone = 0;
    for (Index k = 0; k < order.together(); ++k) {
      last = order.next(last);
      together = std::max(together, bytes_of(last.view, workers));
    }
    for (Index i = 0; i < count; ++i) {
      if (last < order.ranked(i)) alone = std::max(alone, bytes_of(i, 1));
    }
    const Index slices = std::min(workers, count - order.together());
    BatchMemory memory;
    memory.order = arena.take<RankedView>(count);
    memory.slice = alone;
    memory.region = arena.take_bytes(std::max(together, Arena::multiply(alone, static_cast<std::size_t>(slices))));
    return memory;
  }
};

/// What can be said of a batch without looking at its views.
template <class Method>
[[nodiscard]] Status check_batch(const Method& method, std::size_t views, std::size_t evidence,
                                 Index workers) noexcept {
  if (workers < 1) return {StatusCode::invalid_argument, "executor", "concurrency() must be at least 1"};
  if (evidence != views) return {StatusCode::size_mismatch, "evidence", "must have one entry per view"};
  return method.validate();
}

}  // namespace detail

/// Bytes of workspace that `compress_batch` needs for these views with an executor of that concurrency, or a status
/// that concerns all of them. A view that `compress` would refuse needs none. O(views * min(views, workers) * H).
template <class Scorer, class Budget, class Reducer, detail::Consecutive Views, detail::Consecutive Evidence>
[[nodiscard]] Result<std::size_t> batch_workspace_bytes(const Compressor<Scorer, Budget, Reducer>& compressor,
                                                        const Views& views, const Evidence& evidence,
                                                        Index workers) noexcept {
  using V = std::ranges::range_value_t<Views>;
  using E = std::ranges::range_value_t<Evidence>;
  const std::span<const V> all(std::ranges::data(views), std::ranges::size(views));
  const std::span<const E> seen(std::ranges::data(evidence), std::ranges::size(evidence));
  if (Status bad = detail::check_batch(compressor, all.size(), seen.size(), workers); !bad.ok()) return bad;
  detail::Arena arena;
  const detail::BatchOrder<V> order(all, workers);
  static_cast<void>(detail::BatchMemory::take(arena, compressor, order, all, seen, workers));
  return arena.required_bytes();
}

/// Compresses each view with its evidence. Views may be of any shapes and lengths and must not share rows.
///
/// Each view fails or succeeds alone: `results[i]` is the report of view i, or the status that says why it was left
/// untouched. Caches and reports are those of `compressor.compress(views[i], evidence[i], ...)` to the bit, whatever
/// the executor.
///
/// How work is handed out: most views are one task each, worked on by one worker from end to end, longest first (most
/// rows; ties by index), so that short ones fill the gaps. Before that, the k longest views are worked on one after the
/// other, with their heads spread over all workers, as `Compressor::compress` does. k, at most the number of workers,
/// is the one with the earliest expected finish, counted in rows: ceil(H / workers) heads for a view that is spread, and a
/// sixteenth of its rows, which no executor spreads; for the others, ceil(views / workers) rounds of the mean view, and
/// at least the longest. So one very long view, or fewer views than workers, do not leave workers idle, and a batch of
/// many alike is never split. Executors that give the next task to the next free worker balance best.
///
/// \param views     mutable, contiguous; each models `MutableKVCacheView`
/// \param evidence  one entry per view
/// \param results   one entry per view; not looked at
/// \param workspace at least `batch_workspace_bytes` for the same views
/// \returns a status that concerns all views (options out of range, sizes that disagree, too small a workspace), with
/// nothing done and `results` unchanged; else ok, whatever `results` say. Nothing is allocated.
template <class Scorer, class Budget, class Reducer, detail::Consecutive Views, detail::Consecutive Evidence,
          Executor X>
  requires MutableKVCacheView<std::remove_reference_t<std::ranges::range_reference_t<Views>>>
[[nodiscard]] Status compress_batch(const Compressor<Scorer, Budget, Reducer>& compressor, Views&& views,
                                    const Evidence& evidence, std::span<Result<CompressionReport>> results,
                                    Workspace workspace, X& executor) noexcept {
  using V = std::ranges::range_value_t<Views>;
  using E = std::ranges::range_value_t<Evidence>;
  const std::span<V> all(std::ranges::data(views), std::ranges::size(views));
  const std::span<const E> seen(std::ranges::data(evidence), std::ranges::size(evidence));
  const auto workers = static_cast<Index>(executor.concurrency());
  if (Status bad = detail::check_batch(compressor, all.size(), seen.size(), workers); !bad.ok()) return bad;
  if (results.size() != all.size()) return {StatusCode::size_mismatch, "results", "must have one entry per view"};
  if (all.empty()) return {};

  detail::Arena arena(workspace);
  const detail::BatchOrder<V> batch(all, workers);
  const auto memory = detail::BatchMemory::take(arena, compressor, batch, std::span<const V>(all), seen, workers);
  if (Status bad = detail::check(arena); !bad.ok()) return bad;
  const std::span<detail::RankedView> order = memory.order;
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = batch.ranked(static_cast<Index>(i));
  std::sort(order.begin(), order.end());

  const auto compress = [&](Index place, Workspace space, auto& with) noexcept {
    const auto i = detail::at(order[detail::at(place)].view);
    results[i] = compressor.compress(all[i], seen[i], space, with);
  };
  for (Index place = 0; place < batch.together(); ++place) compress(place, memory.region, executor);
  const Index alone = static_cast<Index>(all.size()) - batch.together();
  auto task = [&](Index i, Index worker) noexcept {
    SerialExecutor serial;
    const auto slice = detail::at(alone < workers ? i : worker);
    compress(batch.together() + i, memory.region.subspan(slice * memory.slice, memory.slice), serial);
  };
  if (alone > 0) executor.run(alone, task);
  return {};
}

}  // namespace kvfold
