/// \file
/// From any kind of evidence to column sums.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "kvfold/detail/attention_columns.hpp"
#include "kvfold/detail/lanes.hpp"
#include "kvfold/detail/linalg.hpp"
#include "kvfold/evidence/column_sums.hpp"
#include "kvfold/exec/executor.hpp"

namespace kvfold::detail {

/// What a scorer wants to know.
struct ColumnRequest {
  Index window = 32;       ///< W: rows of the local term
  Index query_stride = 1;  ///< s: the global term takes every s-th query before the window, s times
  bool per_query_head = false;
  bool global = true;
  bool local = true;
};

[[nodiscard]] constexpr Index column_count(ColumnDetail detail, Index group) noexcept {
  return detail == ColumnDetail::query_head ? group : 1;
}

/// Queries [first, last) of a sequence of which number `seen_before` came first: every s-th of them.
[[nodiscard]] constexpr QueryRange sampled(Index first, Index last, Index seen_before, Index step) noexcept {
  const Index phase = step / 2;
  const Index ahead = ((phase - (seen_before + first)) % step + step) % step;
  const Index start = first + ahead;
  return {start, start < last ? (last - start + step - 1) / step : 0, step};
}

/// The queries of each term, of so many.
struct TermQueries {
  QueryRange local, global;

  TermQueries(const ColumnRequest& want, Index queries) noexcept
      : local{queries - std::min(want.window, queries), std::min(want.window, queries), 1},
        global(want.global ? sampled(0, local.first, 0, want.query_stride) : QueryRange{}) {}

  /// The term with more queries is split into lanes; the other one is the first lane's.
  [[nodiscard]] bool global_is_more() const noexcept { return global.count > local.count; }
  [[nodiscard]] Index lanes(const LayerShape& shape) const noexcept {
    return lane_count(shape, std::max(global.count, local.count));
  }
};

/// Adds the weight of each query of a range to the last row it sees. Suffix sums of this are `ColumnSums::seen`.
template <KVCacheView V>
void mark_last_seen(const V& view, Index h, const QueryRows& queries, QueryRange range, float weight,
                    std::span<float> marks) noexcept {
  for (Index k = 0; k < range.count; ++k) {
    const Index visible = visible_rows(view, h, queries.positions[at(range.first + k * range.step)]);
    if (visible > 0) marks[at(visible - 1)] += weight;
  }
}

inline void suffix_sum(std::span<float> x) noexcept {
  for (std::size_t i = x.size(); i > 1; --i) x[i - 2] += x[i - 1];
}

template <KVCacheView V>
[[nodiscard]] std::span<Index> take_offsets(const V& view, Arena& arena) noexcept {
  const Index heads = view.shape().kv_heads;
  const std::span<Index> offset = arena.take<Index>(heads + 1);
  if (offset.empty()) return offset;
  offset[0] = 0;
  for (Index h = 0; h < heads; ++h) offset[at(h + 1)] = offset[at(h)] + static_cast<Index>(view.size(h));
  return offset;
}

/// Memory for column sums of a view, and what fills it. One overload of `collect` and `measure` per kind of evidence.
struct ColumnStorage {
  std::span<Index> offset;
  std::span<float> global, local, seen;
  std::span<Status> status;  // [H][lanes]

  template <KVCacheView V>
  static ColumnStorage take(const V& view, Index columns, Arena& arena, Index lanes = 1) noexcept {
    const Index total = total_rows(view);
    ColumnStorage s;
    s.offset = take_offsets(view, arena);
    s.global = arena.take<float>(columns, total);
    s.local = arena.take<float>(columns, total);
    s.seen = arena.take<float>(total);
    s.status = arena.take<Status>(view.shape().kv_heads, lanes);
    return s;
  }

  /// The sums of a head.
  void clear(Index columns, Index h) const noexcept {
    for (const std::span<float> sums : {block(global, columns, h), block(local, columns, h), block(seen, 1, h)}) {
      std::fill(sums.begin(), sums.end(), 0.f);
    }
  }

  [[nodiscard]] std::span<float> block(std::span<float> all, Index columns, Index h) const noexcept {
    return all.subspan(at(columns * offset[at(h)]), at(columns * (offset[at(h + 1)] - offset[at(h)])));
  }

  [[nodiscard]] ColumnSums result(ColumnDetail detail, Index window) const noexcept {
    return {.detail = detail, .offset = offset, .global = global, .local = local, .seen = seen, .window = window};
  }
};

template <KVCacheView V>
[[nodiscard]] Result<ColumnSums> collect(const V& view, const QueryRows& queries, const ColumnRequest& want,
                                         Arena& arena, Executor auto& executor) noexcept {
  const LayerShape shape = view.shape();
  if (Status bad = check_queries(queries, shape); !bad.ok()) return bad;
  const ColumnDetail detail = want.per_query_head ? ColumnDetail::query_head : ColumnDetail::kv_head;
  const Index columns = column_count(detail, shape.group_size);
  const TermQueries terms(want, queries.rows());
  const Index lanes = terms.lanes(shape);
  const ColumnStorage store = ColumnStorage::take(view, columns, arena, lanes);
  const std::size_t mark = arena.mark();
  const LaneSums others = LaneSums::take(arena, shape, lanes, columns, max_rows(view));
  const auto workers = static_cast<Index>(executor.concurrency());
  const std::span<ColumnScratch> scratch = arena.take<ColumnScratch>(workers);
  for (Index w = 0; w < workers; ++w) {
    const auto s = ColumnScratch::take(arena, shape.key_dim, max_rows(view), !queries.log_sum_exp.empty());
    if (!scratch.empty()) scratch[at(w)] = s;
  }
  if (Status bad = check(arena); !bad.ok()) return bad;
  std::fill(store.status.begin(), store.status.end(), Status{});

  const auto stride_weight = static_cast<float>(want.query_stride);
  const bool global_is_more = terms.global_is_more();
  auto sum = [&](Index i, Index worker) noexcept {
    const Lane lane{i % lanes, lanes};
    const Index h = i / lanes;
    if (lane.index == 0) store.clear(columns, h);
    Status& status = store.status[at(i)];
    const auto run = [&](const QueryRange& range, float weight, bool split, std::span<float> all) {
      if (!status.ok() || (!split && lane.index > 0)) return;
      const std::span<float> sums =
          split ? others.begin(h, lane.index, store.block(all, columns, h)) : store.block(all, columns, h);
      const QuerySegment segment = QuerySegment::of(queries, range);
      status = ColumnAccumulator(view, h, std::span(&segment, 1), weight, scratch[at(worker)], sums, columns,
                                 split ? lane : Lane{})
                   .run();
    };
    run(terms.local, 1.f, !global_is_more, store.local);
    run(terms.global, stride_weight, global_is_more, store.global);
  };
  executor.run(shape.kv_heads * lanes, sum);
  if (Status bad = first_error(store.status); !bad.ok()) return bad;

  auto join = [&](Index h, Index) noexcept {
    const std::span<float> loc = store.block(store.local, columns, h);
    const std::span<float> glo = store.block(store.global, columns, h);
    const std::span<float> seen = store.block(store.seen, 1, h);
    others.join(h, global_is_more ? glo : loc);
    add(glo.data(), loc.data(), static_cast<Index>(glo.size()));
    mark_last_seen(view, h, queries, terms.local, 1.f, seen);
    mark_last_seen(view, h, queries, terms.global, stride_weight, seen);
    suffix_sum(seen);
  };
  executor.run(shape.kv_heads, join);
  arena.rewind(mark);
  return store.result(detail, want.window);
}

template <KVCacheView V>
void measure(const V& view, const QueryRows& queries, const ColumnRequest& want, Arena& arena, Index workers) noexcept {
  const LayerShape shape = view.shape();
  const Index columns = want.per_query_head ? shape.group_size : 1;
  const Index lanes = TermQueries(want, queries.rows()).lanes(shape);
  static_cast<void>(ColumnStorage::take(view, columns, arena, lanes));
  const std::size_t mark = arena.mark();
  static_cast<void>(LaneSums::take(arena, shape, lanes, columns, max_rows(view)));
  static_cast<void>(arena.take<ColumnScratch>(workers));
  for (Index w = 0; w < workers; ++w) {
    static_cast<void>(ColumnScratch::take(arena, shape.key_dim, max_rows(view), !queries.log_sum_exp.empty()));
  }
  arena.rewind(mark);
}

/// Columns of weights that are added up by one task: as many as memory is read well in, so few that long heads have several.
inline constexpr Index kColumnPiece = 4096;

template <KVCacheView V>
[[nodiscard]] Index piece_count(const V& view) noexcept {
  return (max_rows(view) - 1) / kColumnPiece + 1;
}

/// to[j] += factor * the sum over kRows rows of weights: each is read once, to be checked and added.
/// \returns whether all of them are finite and at least 0
template <Index kRows>
[[nodiscard]] bool add_checked_rows(const float* rows, Index stride, float factor, Index n, float* to) noexcept {
  IntLanes bad{};
  Index j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    Lanes sum{};
    for (Index r = 0; r < kRows; ++r) {
      const Lanes x = load_lanes(rows + r * stride + j);
      const IntLanes bits = reinterpret_cast<IntLanes>(x);
      bad |= (bits > 0x7f7fffff) | ((bits < 0) & (bits != std::numeric_limits<std::int32_t>::min()));
      sum += x;
    }
    store_lanes(load_lanes(to + j) + factor * sum, to + j);
  }
  bool ok = true;
  for (Index i = 0; i < kLanes; ++i) ok = ok && bad[i] == 0;
  for (Index r = 0; r < kRows; ++r) ok = ok && all_weights(rows + r * stride + j, n - j);
  for (; j < n; ++j) {
    float sum = 0.f;
    for (Index r = 0; r < kRows; ++r) sum += rows[r * stride + j];
    to[j] += factor * sum;
  }
  return ok;
}

/// to[j] += factor * the sum over a range of rows of weights, n columns of them.
inline Status add_weights(const float* weights, Index row_stride, QueryRange range, float factor, Index h, Index n,
                          float* to) noexcept {
  constexpr Index kRows = 8;  // at a time: they are on their way from memory together
  for (Index k = 0; k < range.count; k += kRows) {
    const float* rows = weights + (range.first + k * range.step) * row_stride;
    const Index count = std::min(kRows, range.count - k), stride = range.step * row_stride;
    bool ok = true;
    with_constant<kRows>(count, [&](auto constant) { ok = add_checked_rows<constant()>(rows, stride, factor, n, to); });
    for (Index r = 0; !ok && r < count; ++r) {
      const float* row = rows + r * stride;
      if (all_weights(row, n)) continue;
      const Index i = range.first + (k + r) * range.step;
      if (!all_finite(row, n)) return {StatusCode::not_finite, "weights", "has a NaN or an infinity", h, i};
      return {StatusCode::invalid_argument, "weights", "has a weight below 0", h, i};
    }
  }
  return {};
}

template <KVCacheView V>
[[nodiscard]] Result<ColumnSums> collect(const V& view, const AttentionWeights& weights, const ColumnRequest& want,
                                         Arena& arena, Executor auto& executor) noexcept {
  const LayerShape shape = view.shape();
  if (weights.data == nullptr) return Status{StatusCode::invalid_argument, "weights", "data is null"};
  if (weights.query_heads != shape.query_heads()) {
    return Status{StatusCode::size_mismatch, "weights", "query_heads is not kv_heads * group_size of the view"};
  }
  if (weights.rows < 1) return Status{StatusCode::invalid_argument, "weights", "there are no rows"};
  if (weights.row_stride < max_rows(view) || weights.head_stride < 0) {
    return Status{StatusCode::size_mismatch, "weights", "row_stride is less than the rows of the largest head"};
  }
  const ColumnDetail detail = want.per_query_head ? ColumnDetail::query_head : ColumnDetail::kv_head;
  const Index columns = column_count(detail, shape.group_size), pieces = piece_count(view);
  const ColumnStorage store = ColumnStorage::take(view, columns, arena, pieces);
  if (Status bad = check(arena); !bad.ok()) return bad;
  std::fill(store.status.begin(), store.status.end(), Status{});
  for (Index h = 0; h < shape.kv_heads; ++h) store.clear(columns, h);

  const TermQueries terms(want, weights.rows);
  const float share = columns == 1 ? 1.f / static_cast<float>(shape.group_size) : 1.f;
  auto task = [&](Index i, Index) noexcept {
    const Index h = i / pieces, first = i % pieces * kColumnPiece;
    const Index n = std::min(kColumnPiece, static_cast<Index>(view.size(h)) - first);
    Status& status = store.status[at(i)];
    for (Index g = 0; n > 0 && status.ok() && g < shape.group_size; ++g) {
      const Index place = (columns == 1 ? 0 : g) * static_cast<Index>(view.size(h)) + first;
      float* glo = store.block(store.global, columns, h).data() + place;
      float* loc = store.block(store.local, columns, h).data() + place;
      const float* from = weights.data + (h * shape.group_size + g) * weights.head_stride + first;
      status =
          add_weights(from, weights.row_stride, terms.global, share * static_cast<float>(want.query_stride), h, n, glo);
      if (status.ok()) status = add_weights(from, weights.row_stride, terms.local, share, h, n, loc);
      if (g + 1 == shape.group_size || columns > 1) add(glo, loc, n);
    }
  };
  executor.run(shape.kv_heads * pieces, task);
  if (Status bad = first_error(store.status); !bad.ok()) return bad;
  ColumnSums sums = store.result(detail, want.window);
  sums.seen = {};  // softmax rows do not say what was masked
  return sums;
}

template <KVCacheView V>
void measure(const V& view, const AttentionWeights&, const ColumnRequest& want, Arena& arena, Index) noexcept {
  static_cast<void>(
      ColumnStorage::take(view, want.per_query_head ? view.shape().group_size : 1, arena, piece_count(view)));
}

template <KVCacheView V>
[[nodiscard]] Result<ColumnSums> collect(const V& view, const ColumnSums& sums, const ColumnRequest& want, Arena&,
                                         Executor auto&) noexcept {
  const LayerShape shape = view.shape();
  if (sums.detail == ColumnDetail::layer) {
    return Status{StatusCode::unsupported, "evidence", "columns are reduced over the heads, the policy works per head"};
  }
  if (want.per_query_head && shape.group_size > 1 && sums.detail != ColumnDetail::query_head) {
    return Status{StatusCode::unsupported, "evidence",
                  "columns are averaged over the group, the policy needs query heads"};
  }
  const auto columns = static_cast<std::size_t>(column_count(sums.detail, shape.group_size));
  const auto total = static_cast<std::size_t>(total_rows(view));
  if (sums.offset.size() != at(shape.kv_heads) + 1 || sums.global.size() != columns * total ||
      (!sums.local.empty() && sums.local.size() != columns * total) ||
      (!sums.seen.empty() && sums.seen.size() != total)) {
    return Status{StatusCode::size_mismatch, "evidence", "column sums are not of this view's heads and rows"};
  }
  for (Index h = 0, first = 0; h <= shape.kv_heads; ++h) {
    if (sums.offset[at(h)] != first) {
      return Status{StatusCode::size_mismatch, "evidence", "offset does not agree with the view's rows", h};
    }
    if (h < shape.kv_heads) first += static_cast<Index>(view.size(h));
  }
  if (want.local && (sums.local.empty() || sums.window != want.window)) {
    return Status{StatusCode::unsupported, "evidence", "has no local sums over the window that the policy asks for"};
  }
  for (const std::span<const float> all : {sums.global, sums.local, sums.seen}) {
    if (!all_finite(all.data(), static_cast<Index>(all.size()))) {
      return Status{StatusCode::not_finite, "evidence", "column sums have a NaN or an infinity"};
    }
    if (!all.empty() && min_of(all.data(), static_cast<Index>(all.size())) < 0.f) {
      return Status{StatusCode::invalid_argument, "evidence", "column sums have a value below 0"};
    }
  }
  return sums;
}

template <KVCacheView V>
void measure(const V&, const ColumnSums&, const ColumnRequest&, Arena&, Index) noexcept {}

/// Evidence that column policies understand.
// clang-format off
template <class Evidence, class V>
concept ColumnEvidence = requires(const V& view, const Evidence& evidence, const ColumnRequest& want, Arena& arena,
                                  SerialExecutor& executor) {
  { collect(view, evidence, want, arena, executor) } noexcept -> std::same_as<Result<ColumnSums>>;
  { measure(view, evidence, want, arena, Index{1}) } noexcept;
};
// clang-format on

}  // namespace kvfold::detail
