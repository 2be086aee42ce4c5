/// \file
/// Streams attention evidence through chunked prefill and decoding, in memory O(H * T).
#pragma once

#include <memory>
#include <new>

#include "kvfold/detail/collect_columns.hpp"

namespace kvfold {

/// Collects the global and local sums of EMS while a prompt is read, chunk by chunk.
///
/// After the rows of a chunk are in the cache, `observe` takes the chunk's queries. The last W queries are kept as they
/// are; older ones have been added to the global sums and are forgotten. `summarize` gives the sums over everything
/// observed so far, and observing may go on. For any chunking, the result equals one-shot scoring to rounding.
///
/// Memory: H * C * T + H * T floats of state and three times that for results, and W * H * G * (D + 1) floats of queries. The
/// workspace holds 64 * T floats for each worker and max(H, 16 to 16 + H) * C * T of sums.
class GlobalLocalAccumulator {
 public:
  struct Options {
    Index window = 32;       ///< W: queries of the local term, at least 1
    Index query_stride = 1;  ///< s: 1 = exact; else every s-th query stands for s of them, at least 1
    GroupReduction group = GroupReduction::max;  ///< mean keeps one column set per KV head, max one per query head

    [[nodiscard]] Status validate() const noexcept {
      if (window < 1 || window > kMaxRows) return {StatusCode::invalid_argument, "window", "must be in [1, kMaxRows]"};
      if (query_stride < 1 || query_stride > kMaxRows) {
        return {StatusCode::invalid_argument, "query_stride", "must be in [1, kMaxRows]"};
      }
      return {};
    }
  };

  /// \param max_rows the most rows that a head will ever have; allocated now, so that observing allocates nothing.
  [[nodiscard]] static Result<GlobalLocalAccumulator> create(LayerShape shape, Index max_rows,
                                                             Options options) noexcept {
    if (Status bad = options.validate(); !bad.ok()) return bad;
    if (shape.kv_heads < 1 || shape.group_size < 1 || shape.key_dim < 1 || shape.kv_heads > kMaxHeads ||
        shape.group_size > kMaxHeads || shape.query_heads() > kMaxHeads || shape.key_dim > kMaxWidth) {
      return Status{StatusCode::invalid_argument, "shape", "a size is out of range"};
    }
    if (max_rows < 1 || max_rows > kMaxRows) {
      return Status{StatusCode::invalid_argument, "max_rows", "must be in [1, kMaxRows]"};
    }
    GlobalLocalAccumulator made(shape, max_rows, options);
    detail::Arena measuring;
    static_cast<void>(made.layout(measuring));
    if (Status bad = made.memory_.reserve(measuring.required_bytes()); !bad.ok()) return bad;
    detail::Arena arena(made.memory_.get());
    made.state_ = made.layout(arena);
    made.reset();
    return made;
  }

  /// Forgets everything, for the next sequence.
  void reset() noexcept {
    std::fill(state_.global.begin(), state_.global.end(), 0.f);
    std::fill(state_.marks.begin(), state_.marks.end(), 0.f);
    std::fill(state_.rows.begin(), state_.rows.end(), Index{0});
    observed_ = 0;
    log_sum_exp_since_ = 0;
  }

  [[nodiscard]] Index observed_queries() const noexcept { return observed_; }
  [[nodiscard]] const Options& options() const noexcept { return options_; }
  /// Bytes of state that the accumulator owns.
  [[nodiscard]] std::size_t memory_bytes() const noexcept { return memory_.size_bytes(); }

  /// Bytes of workspace that `observe` and `summarize` need while no head has more than `rows` rows.
  [[nodiscard]] std::size_t workspace_bytes(Index rows, Index workers) const noexcept {
    detail::Arena arena;
    static_cast<void>(Scratch::take(arena, shape_, columns(), rows, workers));
    return arena.required_bytes();
  }

  /// Takes the queries of the next positions. Their rows must be in the cache already. Nothing changes when it fails.
  /// Log-sum-exps that do not fit are found when their queries leave the window. Queries of the chunk that are neither
  /// sampled nor in the window after it are not read.
  /// Cost: 2 * n / s * G * T * D FLOPs per head for n queries, half of it under the causal mask.
  template <KVCacheView V, Executor X>
  Status observe(const V& view, const QueryRows& queries, Workspace workspace, X& executor) noexcept {
    if (Status bad = check_call(view, executor); !bad.ok()) return bad;
    if (Status bad = detail::check_queries(queries, shape_); !bad.ok()) return bad;
    if (observed_ > 0 && queries.positions.front() < newest_position_) {
      return {StatusCode::invalid_argument, "queries", "positions lie before queries that were observed"};
    }
    if (observed_ > 0 && queries.logit_scale() != scale_) {
      return {StatusCode::invalid_argument, "queries", "scale differs from that of earlier queries"};
    }
    detail::Arena arena(workspace);
    const Scratch scratch = Scratch::take(arena, shape_, columns(), detail::max_rows(view), workers_of(executor));
    if (Status bad = detail::check(arena); !bad.ok()) return bad;
    std::fill(scratch.status.begin(), scratch.status.end(), Status{});

    const Index n = queries.rows();
    const Index held = std::min(observed_, options_.window);
    const Index leaving = std::max<Index>(held + n - options_.window, 0);
    const Index from_ring = std::min(leaving, held);
    const Index from_chunk = leaving - from_ring;
    const Index oldest = observed_ - held;
    const auto weight = static_cast<float>(options_.query_stride);
    detail::QuerySegment all[kMostPieces + 1];  // queries that leave the window: every s-th of them
    std::size_t count = 0;
    for_ring(oldest, from_ring, [&](detail::QuerySegment ring, Index sequence) {
      ring.range = detail::sampled(0, ring.range.count, sequence, options_.query_stride);
      all[count++] = ring;
    });
    all[count++] = detail::QuerySegment::of(queries, detail::sampled(0, from_chunk, observed_, options_.query_stride));
    const std::span<const detail::QuerySegment> segments(all, count);
    Index taken = 0;
    for (const detail::QuerySegment& segment : segments) taken += segment.range.count;
    // All in one go, unless the engine has begun or ended to give log-sum-exps.
    const std::size_t step = have_alike_sums(segments) ? count : 1;

    const detail::LaneSums others = scratch.lanes_for(shape_, taken);
    const auto add_taken = [&](Index h, detail::Lane lane, Index worker) noexcept -> Status {
      std::span<float> sums = scratch.sums_of(h, columns() * static_cast<Index>(view.size(h)));
      if (lane.index == 0) std::fill(sums.begin(), sums.end(), 0.f);
      sums = others.begin(h, lane.index, sums);
      Status status;
      for (std::size_t k = 0; k < count && status.ok(); k += step) {
        status = detail::ColumnAccumulator(view, h, segments.subspan(k, step), weight,
                                           scratch.columns[detail::at(worker)], sums, columns(), lane)
                     .run();
      }
      return status;
    };
    auto task = [&](Index i, Index worker) noexcept {
      const Index h = i / others.lanes;
      const detail::Lane lane{i % others.lanes, others.lanes};
      Status& status = scratch.status[detail::at(i)];
      if (taken > 0) status = add_taken(h, lane, worker);
      // Queries that stay in the ring are looked at later; a NaN in them must not get in.
      for (Index g = 0; lane.index == 0 && status.ok() && g < shape_.group_size; ++g) {
        for (Index q = from_chunk; q < n; ++q) {
          if (!detail::all_finite(queries.row(h * shape_.group_size + g, q), shape_.key_dim)) {
            status = {StatusCode::not_finite, "queries", "has a NaN or an infinity", h, q};
            break;
          }
        }
      }
    };
    executor.run(shape_.kv_heads * others.lanes, task);
    if (Status bad = detail::first_error(scratch.status); !bad.ok()) return bad;

    auto commit = [&](Index h, Index) noexcept {
      const auto rows = static_cast<Index>(view.size(h));
      const std::span<float> sums = scratch.sums_of(h, columns() * rows);
      if (taken > 0) others.join(h, sums);
      for (Index c = 0; taken > 0 && c < columns(); ++c) detail::add(global(h, c), sums.data() + c * rows, rows);
      for (const detail::QuerySegment& segment : segments) {
        detail::mark_last_seen(view, h, segment.queries, segment.range, weight, marks(h));
      }
      state_.rows[detail::at(h)] = rows;
    };
    executor.run(shape_.kv_heads, commit);
    remember(queries, from_chunk);
    return {};
  }

  /// The sums over all queries observed. The result points into the accumulator and lives until its next change.
  template <KVCacheView V, Executor X>
  [[nodiscard]] Result<ColumnSums> summarize(const V& view, Workspace workspace, X& executor) noexcept {
    if (Status bad = check_call(view, executor); !bad.ok()) return bad;
    if (observed_ == 0) return Status{StatusCode::invalid_argument, "evidence", "no queries have been observed"};
    detail::Arena arena(workspace);
    const Scratch scratch = Scratch::take(arena, shape_, columns(), detail::max_rows(view), workers_of(executor));
    if (Status bad = detail::check(arena); !bad.ok()) return bad;
    std::fill(scratch.status.begin(), scratch.status.end(), Status{});

    state_.offset[0] = 0;
    for (Index h = 0; h < shape_.kv_heads; ++h) {
      state_.offset[detail::at(h + 1)] = state_.offset[detail::at(h)] + static_cast<Index>(view.size(h));
    }
    const auto total = static_cast<std::size_t>(state_.offset[detail::at(shape_.kv_heads)]);
    const Index held = std::min(observed_, options_.window);
    const auto local = [&](Index h) {
      return state_.local.subspan(detail::at(columns() * state_.offset[detail::at(h)]),
                                  detail::at(columns() * static_cast<Index>(view.size(h))));
    };
    const detail::LaneSums others = scratch.lanes_for(shape_, held);
    auto sum = [&](Index i, Index worker) noexcept {
      const Index h = i / others.lanes;
      const detail::Lane lane{i % others.lanes, others.lanes};
      std::span<float> loc = local(h);
      if (lane.index == 0) std::fill(loc.begin(), loc.end(), 0.f);
      loc = others.begin(h, lane.index, loc);
      detail::QuerySegment segments[kMostPieces];
      std::size_t count = 0;
      for_ring(observed_ - held, held, [&](detail::QuerySegment ring, Index) {
        ring.log_sum_exp = nullptr;  // sums over the window are the same bits, whether there are any or not
        segments[count++] = ring;
      });
      scratch.status[detail::at(i)] =
          detail::ColumnAccumulator(view, h, std::span(segments, count), 1.f, scratch.columns[detail::at(worker)], loc,
                                    columns(), lane)
              .run();
    };
    executor.run(shape_.kv_heads * others.lanes, sum);
    if (Status bad = detail::first_error(scratch.status); !bad.ok()) return bad;

    auto join = [&](Index h, Index) noexcept {
      const auto rows = static_cast<Index>(view.size(h));
      const Index first = state_.offset[detail::at(h)];
      const std::span<float> loc = local(h), seen = state_.seen.subspan(detail::at(first), detail::at(rows));
      others.join(h, loc);
      std::copy_n(marks(h).begin(), rows, seen.begin());
      for_ring(observed_ - held, held, [&](const detail::QuerySegment& ring, Index) {
        detail::mark_last_seen(view, h, ring.queries, ring.range, 1.f, seen);
      });
      detail::suffix_sum(seen);
      float* out = state_.total.data() + columns() * first;
      for (Index c = 0; c < columns(); ++c) {
        for (Index j = 0; j < rows; ++j) out[c * rows + j] = global(h, c)[j] + loc[detail::at(c * rows + j)];
      }
    };
    executor.run(shape_.kv_heads, join);
    const std::size_t size = static_cast<std::size_t>(columns()) * total;
    return ColumnSums{
        .detail = options_.group == GroupReduction::max ? ColumnDetail::query_head : ColumnDetail::kv_head,
        .offset = state_.offset,
        .global = state_.total.first(size),
        .local = state_.local.first(size),
        .seen = state_.seen.first(total),
        .window = options_.window};
  }

 private:
  struct State {
    std::span<float> global;        // [H][C][max_rows] queries that left the window
    std::span<float> marks;         // [H][max_rows] their weight at the last row each could see
    std::span<Index> rows;          // [H] rows at the last observation
    std::span<float> ring;          // [W][H * G][D], query number i in slot i % W
    std::span<Position> positions;  // [W]
    std::span<float> log_sum_exp;   // [H * G][W] of the queries in the ring, from number `log_sum_exp_since_` on
    std::span<Index> offset;        // [H + 1] results from here on
    std::span<float> total, local;  // [C * sum of T_h]
    std::span<float> seen;          // [sum of T_h]
  };

  struct Scratch {
    std::span<detail::ColumnScratch> columns;  // [workers]
    std::span<float> sums;                     // [H][C][rows]
    detail::LaneSums others;                   // the most there may be
    std::span<Status> status;                  // [H][lanes]
    Index head_size = 0;                       // C * rows

    static Scratch take(detail::Arena& arena, const LayerShape& shape, Index columns, Index rows,
                        Index workers) noexcept {
      Scratch s;
      const Index lanes = detail::lane_count(shape, kMaxRows);
      s.head_size = columns * rows;
      s.columns = arena.take<detail::ColumnScratch>(workers);
      s.sums = arena.take<float>(shape.kv_heads * columns, rows);
      s.others = detail::LaneSums::take(arena, shape, lanes, columns, rows);
      s.status = arena.take<Status>(shape.kv_heads, lanes);
      for (Index w = 0; w < workers; ++w) {
        const auto scratch = detail::ColumnScratch::take(arena, shape.key_dim, rows, false);
        if (!s.columns.empty()) s.columns[detail::at(w)] = scratch;
      }
      return s;
    }
    [[nodiscard]] std::span<float> sums_of(Index h, Index size) const noexcept {
      return sums.subspan(detail::at(h * head_size), detail::at(size));
    }
    /// The lanes that so many queries are split into.
    [[nodiscard]] detail::LaneSums lanes_for(const LayerShape& shape, Index queries) const noexcept {
      detail::LaneSums used = others;
      used.lanes = detail::lane_count(shape, queries);
      return used;
    }
  };

  GlobalLocalAccumulator(LayerShape shape, Index max_rows, Options options) noexcept
      : shape_(shape), max_rows_(max_rows), options_(options) {}

  State layout(detail::Arena& arena) const noexcept {
    const Index per_head = shape_.kv_heads * columns();
    State s;
    s.global = arena.take<float>(per_head, max_rows_);
    s.marks = arena.take<float>(shape_.kv_heads, max_rows_);
    s.rows = arena.take<Index>(shape_.kv_heads);
    s.ring = arena.take<float>(options_.window, shape_.query_heads(), shape_.key_dim);
    s.positions = arena.take<Position>(options_.window);
    s.log_sum_exp = arena.take<float>(shape_.query_heads(), options_.window);
    s.offset = arena.take<Index>(shape_.kv_heads + 1);
    s.total = arena.take<float>(per_head, max_rows_);
    s.local = arena.take<float>(per_head, max_rows_);
    s.seen = arena.take<float>(shape_.kv_heads, max_rows_);
    return s;
  }

  [[nodiscard]] Index columns() const noexcept { return options_.group == GroupReduction::max ? shape_.group_size : 1; }
  [[nodiscard]] float* global(Index h, Index c) const noexcept {
    return state_.global.data() + (h * columns() + c) * max_rows_;
  }
  [[nodiscard]] std::span<float> marks(Index h) const noexcept {
    return state_.marks.subspan(detail::at(h * max_rows_), detail::at(max_rows_));
  }
  template <Executor X>
  [[nodiscard]] static Index workers_of(const X& executor) noexcept {
    return static_cast<Index>(executor.concurrency());
  }

  template <KVCacheView V>
  [[nodiscard]] Status check_call(const V& view, Executor auto& executor) const noexcept {
    if (workers_of(executor) < 1) {
      return {StatusCode::invalid_argument, "executor", "concurrency() must be at least 1"};
    }
    if (Status bad = detail::check_view(view, executor); !bad.ok()) return bad;
    const LayerShape shape = view.shape();
    if (shape.kv_heads != shape_.kv_heads || shape.group_size != shape_.group_size || shape.key_dim != shape_.key_dim) {
      return {StatusCode::size_mismatch, "view", "has not the shape that the accumulator was made for"};
    }
    for (Index h = 0; h < shape.kv_heads; ++h) {
      const auto rows = static_cast<Index>(view.size(h));
      if (rows > max_rows_)
        return {StatusCode::size_mismatch, "view", "has more rows than the accumulator's max_rows", h};
      if (rows < state_.rows[detail::at(h)]) {
        return {StatusCode::size_mismatch, "view", "has lost rows since the last observation: reset() first", h};
      }
    }
    return {};
  }

  static constexpr std::size_t kMostPieces = 2;  ///< of the ring, whose end is followed by its beginning

  /// Calls f(segment of all, number of the first) for the consecutive pieces of queries [first, first + n) in the ring.
  template <class F>
  void for_ring(Index first, Index n, F f) const noexcept {
    while (n > 0) {
      const Index slot = first % options_.window;
      const Index piece = std::min(n, options_.window - slot);
      detail::QuerySegment segment{
          .queries = token_major_queries(state_.ring.data() + slot * shape_.query_heads() * shape_.key_dim,
                                         shape_.query_heads(), shape_.key_dim,
                                         state_.positions.subspan(detail::at(slot), detail::at(piece))),
          .range = {0, piece, 1},
          .log_sum_exp = first >= log_sum_exp_since_ ? state_.log_sum_exp.data() + slot : nullptr,
          .log_sum_exp_stride = options_.window};
      segment.queries.scale = scale_;
      f(segment, first);
      first += piece;
      n -= piece;
    }
  }

  [[nodiscard]] static bool have_alike_sums(std::span<const detail::QuerySegment> segments) noexcept {
    return std::all_of(segments.begin(), segments.end(), [&](const detail::QuerySegment& s) {
      return (s.log_sum_exp == nullptr) == (segments[0].log_sum_exp == nullptr);
    });
  }

  /// Puts the queries from number `skip` of the chunk on into the ring.
  void remember(const QueryRows& queries, Index skip) noexcept {
    const bool has_sums = !queries.log_sum_exp.empty();
    for (Index i = skip; i < queries.rows(); ++i) {
      const Index slot = (observed_ + i) % options_.window;
      for (Index q = 0; q < shape_.query_heads(); ++q) {
        std::copy_n(queries.row(q, i), shape_.key_dim,
                    state_.ring.data() + (slot * shape_.query_heads() + q) * shape_.key_dim);
        if (has_sums) {
          state_.log_sum_exp[detail::at(q * options_.window + slot)] =
              queries.log_sum_exp[detail::at(q * queries.rows() + i)];
        }
      }
      state_.positions[detail::at(slot)] = queries.positions[detail::at(i)];
    }
    observed_ += queries.rows();
    if (!has_sums) log_sum_exp_since_ = observed_;
    newest_position_ = queries.positions.back();
    scale_ = queries.logit_scale();
  }

  LayerShape shape_;
  Index max_rows_;
  Options options_;
  WorkspaceBuffer memory_;
  State state_;
  Index observed_ = 0;
  Index log_sum_exp_since_ = 0;  ///< number of the first query since when all had one
  Position newest_position_ = 0;
  float scale_ = 0.f;
};

}  // namespace kvfold
