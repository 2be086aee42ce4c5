/// \file
/// Column sums of attention: how much each row is looked at by a set of queries. The hot loop of scoring.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "kvfold/detail/arena.hpp"
#include "kvfold/detail/extent.hpp"
#include "kvfold/detail/linalg.hpp"
#include "kvfold/detail/panel_products.hpp"
#include "kvfold/detail/rows.hpp"
#include "kvfold/detail/softmax.hpp"
#include "kvfold/evidence/query_rows.hpp"
#include "kvfold/storage/quantised.hpp"

namespace kvfold::detail {

/// Rows first, first + step, ... of a QueryRows, `count` of them.
struct QueryRange {
  Index first = 0;
  Index count = 0;
  Index step = 1;
};

/// Queries that are looked at one after the other with those of other segments, as if they were of one QueryRows.
struct QuerySegment {
  QueryRows queries;
  QueryRange range;
  const float* log_sum_exp = nullptr;  ///< of query head q and row i at [q * log_sum_exp_stride + i], or null
  Index log_sum_exp_stride = 0;

  static QuerySegment of(const QueryRows& queries, QueryRange range) noexcept {
    return {queries, range, queries.log_sum_exp.empty() ? nullptr : queries.log_sum_exp.data(), queries.rows()};
  }
};

/// One of the `count` shares that the queries of a head are split into: every count-th block of them, from `index` on.
/// Each share has column sums of its own, which are added up in the order of shares.
struct Lane {
  Index index = 0;
  Index count = 1;
};

/// How many lanes a head's queries are split into: as many tasks as a head should have, but no more than there are
/// blocks.
[[nodiscard]] constexpr Index lane_count(const LayerShape& shape, Index queries) noexcept {
  const Index all = product({queries, shape.group_size});
  if (all < 1) return 1;
  return std::min(tasks_per_head(shape), (all - 1) / kQueryTile + 1);
}

/// Column sums of all lanes but the first, [H][lanes - 1][C][rows].
struct LaneSums {
  std::span<float> sums;
  Index lanes = 1, size = 0;

  static LaneSums take(Arena& arena, const LayerShape& shape, Index lanes, Index columns, Index rows) noexcept {
    LaneSums s;
    s.lanes = lanes;
    s.size = columns * rows;
    s.sums = arena.take<float>(lanes > 1 ? shape.kv_heads * (lanes - 1) : 0, columns, rows);
    return s;
  }

  /// Where lane `lane` of head h adds up: the first in `first`, the others in memory of their own, which is cleared.
  [[nodiscard]] std::span<float> begin(Index h, Index lane, std::span<float> first) const noexcept {
    if (lane == 0) return first;
    const std::span<float> mine = place(h, lane).first(first.size());
    std::fill(mine.begin(), mine.end(), 0.f);
    return mine;
  }
  /// Adds the sums of the other lanes to `first`.
  void join(Index h, std::span<float> first) const noexcept {
    for (Index lane = 1; lane < lanes; ++lane) {
      add(first.data(), place(h, lane).data(), static_cast<Index>(first.size()));
    }
  }

 private:
  [[nodiscard]] std::span<float> place(Index h, Index lane) const noexcept {
    return sums.subspan(at((h * (lanes - 1) + lane - 1) * size), at(size));
  }
};

/// Scratch of one worker for a `ColumnAccumulator`.
struct ColumnScratch {
  std::span<float> queries;  // [kQueryTile][D]
  std::span<float> panels;   // [kQueryTile / kPanelWidth][D][kPanelWidth] the same
  std::span<float> keys;     // [kPanelKeys][D]
  std::span<float> weights;  // [tiles, or 1 where log-sum-exps are given][kPanelTile][kQueryTile]
  std::span<float> shifts;   // [tiles][kQueryTile]

  static ColumnScratch take(Arena& arena, Index dim, Index rows, bool one_pass) noexcept {
    const Index tiles = (rows + kPanelTile - 1) / kPanelTile;
    ColumnScratch s;
    s.queries = arena.take<float>(kQueryTile, dim);
    s.panels = arena.take<float>(kQueryTile, dim);
    s.keys = arena.take<float>(kPanelKeys, dim);
    s.weights = arena.take<float>(one_pass ? 1 : tiles, kPanelTile, kQueryTile);
    s.shifts = arena.take<float>(one_pass ? 0 : tiles, kQueryTile);
    return s;
  }
};

/// Adds the attention of some queries to column sums of KV head h.
///
/// For a query row, the softmax over its visible rows is accumulated tile by tile, exp(logit - a shift of the tile), and
/// corrected by one factor per tile when the row's log-sum-exp is known: one product and one exp per weight.
///
/// Where each of them has its log-sum-exp, it is one pass, else two over weights that are kept meanwhile.
///
/// \param columns [C][T]: C = 1 accumulates the mean over the group, C = G keeps query heads apart.
/// \returns not_finite when queries, keys or log masses hold NaN or infinity.
/// Cost: 2 * count * G * T * D FLOPs and count * G * T exps.
template <KVCacheView V>
class ColumnAccumulator {
 public:
  ColumnAccumulator(const V& view, Index h, std::span<const QuerySegment> segments, float weight, ColumnScratch scratch,
                    std::span<float> columns, Index column_count, Lane lane = {}) noexcept
      : view_(view),
        h_(h),
        segments_(segments),
        weight_(weight),
        s_(scratch),
        columns_(columns),
        column_count_(column_count),
        lane_(lane),
        group_(view.shape().group_size),
        dim_(view.shape().key_dim),
        rows_(static_cast<Index>(view.size(h))) {}

  Status run() noexcept {
    Index total = 0;
    for (const QuerySegment& segment : segments_) {
      total += segment.range.count * group_;
      one_pass_ = one_pass_ && (segment.range.count == 0 || segment.log_sum_exp != nullptr);
    }
    if (total == 0) return {};
    // Blocks of whole panels, but the last one, and as many in each lane; few queries take no more lanes than they fill
    // blocks.
    const Index lanes = std::min(lane_.count, (total - 1) / kQueryTile + 1);
    if (lane_.index >= lanes) return {};
    const Index rounds = (total - 1) / (kQueryTile * lanes) + 1;
    const Index block = panel_rows((total - 1) / (rounds * lanes) + 1);
    for (Index first = lane_.index * block; first < total; first += lanes * block) {
      if (Status bad = load_block(first, std::min(block, total - first)); !bad.ok()) return bad;
      if (Status bad = one_pass_ ? one_step() : two_step(); !bad.ok()) return bad;
    }
    return {};
  }

 private:
  // A block is `count_` (query, query head of the group) in this order, of which those of one head lie together. The
  // columns after them, up to whole lanes, have finite weights and a factor of 0.
  Status load_block(Index first, Index count) noexcept {
    count_ = count;
    columns_of_tile_ = panel_columns(count);
    first_ = first;
    const QuerySegment* segment = segments_.data();
    Index before = 0, visible = 0;  // before: queries of the segments before this one
    for (Index r = 0; r < count; ++r) {
      const Index k = (first + r) / group_, g = (first + r) % group_, q = h_ * group_ + g;
      for (; k >= before + segment->range.count; ++segment) before += segment->range.count;
      const QueryRows& queries = segment->queries;
      const Index i = segment->range.first + (k - before) * segment->range.step;
      if (r == 0 || g == 0) visible = visible_rows(view_, h_, queries.positions[at(i)]);
      const Index column = column_of(r % group_) + r / group_;
      query_[column] = i;
      visible_[column] = visible;
      std::copy_n(queries.row(q, i), dim_, s_.queries.data() + column * dim_);
      if (one_pass_) log_sum_exp_[column] = segment->log_sum_exp[q * segment->log_sum_exp_stride + i];
    }
    if (!all_finite(s_.queries.data(), count * dim_)) {
      return {StatusCode::not_finite, "queries", "has a NaN or an infinity", h_, query_[0]};
    }
    scale(s_.queries.data(), count * dim_, segment->queries.logit_scale());
    make_panels(s_.queries.data(), dim_, count, dim_, s_.panels.data());
    most_visible_ = *std::max_element(visible_, visible_ + count);
    least_visible_ = *std::min_element(visible_, visible_ + count);
    std::fill(visible_ + count, visible_ + columns_of_tile_, most_visible_);
    return {};
  }

  /// The first column of the query head that comes up as number d in the block.
  [[nodiscard]] Index column_of(Index d) const noexcept { return d * (count_ / group_) + std::min(d, count_ % group_); }
  [[nodiscard]] float row_weight() const noexcept {
    return column_count_ == 1 ? weight_ / static_cast<float>(group_) : weight_;
  }

  /// Rows of the tile that begins with row t, those that some query of the block sees.
  [[nodiscard]] Index rows_of_tile(Index t) const noexcept { return std::min(kPanelTile, most_visible_ - t); }

  /// Logits of the block for rows [t, t + n) into a tile of weights, [n][columns_of_tile_]: -infinity for what a query
  /// does not see. Tiles lie one after the other in memory: rows of a whole head's length would put a tile's rows a
  /// power of two apart, in the same few lines of the caches.
  Status logits(Index t, Index n, float* out) noexcept {
    multiply_keys(view_, h_, t, n, s_.panels.data(), count_, s_.keys, out, columns_of_tile_);
    if constexpr (HasLogMass<V>) add_log_masses(t, n, out);
    // A key that is not finite makes every logit in its row so: one column shows it.
    const float largest = largest_magnitude(out, columns_of_tile_, n);
    if (!all_finite(&largest, 1)) return {StatusCode::not_finite, "keys", "has a NaN or an infinity", h_, t};
    if (t + n > least_visible_) hide_unseen(out, columns_of_tile_, n, visible_, t);
    return {};
  }

  void add_log_masses(Index t, Index n, float* out) const noexcept {
    for (Index j = 0; j < n; ++j) {
      const float mass = log_mass_of(view_, h_, t + j);
      if (mass != 0.f) add_number(out + j * columns_of_tile_, columns_of_tile_, mass);
    }
  }

  [[nodiscard]] float* weight_tile(Index t) const noexcept { return s_.weights.data() + t * columns_of_tile_; }
  [[nodiscard]] float* shifts(Index t) const noexcept { return s_.shifts.data() + t / kPanelTile * kQueryTile; }

  /// Logits of a tile to weights, exp(logit - shift of the column), and their sums.
  /// \returns whether the sums are numbers far from where fp32 ends
  [[nodiscard]] bool weigh(Index n, const float* shift, float* tile, float* sums) const noexcept {
    constexpr auto kMost = std::bit_cast<std::uint32_t>(1e18f);  // NaN and infinity have more, as bits
    for (Index c = 0; c < columns_of_tile_; c += kLanes) {
      store_lanes(exp_columns(tile + c, columns_of_tile_, n, load_lanes(shift + c)), sums + c);
    }
    std::uint32_t most = 0;
    for (Index r = 0; r < count_; ++r) most = std::max(most, std::bit_cast<std::uint32_t>(sums[r]));
    return most < kMost;
  }

  /// Any shift serves that keeps weights in the range of fp32: that of the tile before, mostly, and where it does not, the
  /// largest logits. That spares looking for them in all tiles.
  Status two_step() noexcept {
    float tile_sum[kQueryTile] = {}, row_shift[kQueryTile] = {};
    std::fill_n(row_shift, count_, kNoMax);
    std::fill_n(row_sum_, count_, 0.f);
    for (Index t = 0; t < most_visible_; t += kPanelTile) {
      const Index n = rows_of_tile(t);
      float *tile = weight_tile(t), *shift = shifts(t);
      if (Status bad = logits(t, n, tile); !bad.ok()) return bad;
      if (t > 0) std::copy_n(shifts(t - kPanelTile), columns_of_tile_, shift);
      if (t == 0 || !weigh(n, shift, tile, tile_sum)) {
        if (t > 0) static_cast<void>(logits(t, n, tile));  // again
        for (Index c = 0; c < columns_of_tile_; c += kLanes) {
          store_lanes(max_of_columns(tile + c, columns_of_tile_, n), shift + c);
        }
        if (!all_finite(shift, count_) || !weigh(n, shift, tile, tile_sum)) {
          return {StatusCode::not_finite, "keys", "a logit overflows", h_, t};
        }
      }
      join_softmax(shift, tile_sum, count_, row_shift, row_sum_);
    }
    float row_scale[kQueryTile] = {};
    for (Index r = 0; r < count_; ++r) row_scale[r] = row_sum_[r] > 0.f ? row_weight() / row_sum_[r] : 0.f;
    const Index tiles = (most_visible_ + kPanelTile - 1) / kPanelTile;
    for (Index t = (tiles - 1) * kPanelTile; t >= 0; t -= kPanelTile) {  // the last ones are still in the caches
      exp_factors(shifts(t), row_shift, row_scale, count_, factor_);
      add_tile(t, rows_of_tile(t), weight_tile(t));
    }
    return {};
  }

  Status one_step() noexcept {
    std::fill_n(row_sum_, columns_of_tile_, 0.f);
    std::fill_n(factor_, count_, row_weight());
    for (Index t = 0; t < most_visible_; t += kPanelTile) {
      const Index n = rows_of_tile(t);
      float* tile = s_.weights.data();
      if (Status bad = logits(t, n, tile); !bad.ok()) return bad;
      for (Index c = 0; c < columns_of_tile_; c += kLanes) {
        const Lanes sums = exp_columns(tile + c, columns_of_tile_, n, load_lanes(log_sum_exp_ + c));
        store_lanes(load_lanes(row_sum_ + c) + sums, row_sum_ + c);
      }
      add_tile(t, n, tile);
    }
    // A softmax sums to 1: anything else means that the log-sum-exp is of other queries or keys.
    for (Index r = 0; r < count_; ++r) {
      if (visible_[r] > 0 && !(std::abs(row_sum_[r] - 1.f) <= 0.01f)) {
        return {StatusCode::invalid_argument, "queries", "log_sum_exp does not fit these queries and keys", h_,
                query_[r]};
      }
    }
    return {};
  }

  /// columns[t, t + n) += factor of column r * weights of column r. Summed over the block first: small numbers meet
  /// small ones.
  void add_tile(Index t, Index n, const float* weights) noexcept {
    const Index heads = column_count_ == 1 ? 1 : std::min(group_, count_);
    for (Index d = 0; d < heads; ++d) {
      const Index begin = column_of(d), end = heads == 1 ? count_ : column_of(d + 1);
      const Index from = begin / kLanes * kLanes;  // whole lanes, of which those of other heads have a factor of 0
      const Index width = (end - from + kLanes - 1) / kLanes * kLanes;
      float factor[kQueryTile];
      std::fill_n(factor, width, 0.f);
      std::copy(factor_ + begin, factor_ + end, factor + (begin - from));
      const Index c = column_count_ == 1 ? 0 : (first_ + d) % group_;
      add_row_sums(weights + from, columns_of_tile_, n, factor, width, columns_.data() + c * rows_ + t);
    }
  }

  const V& view_;
  Index h_;
  std::span<const QuerySegment> segments_;
  float weight_;
  ColumnScratch s_;
  std::span<float> columns_;
  Index column_count_;
  Lane lane_;
  Index group_, dim_, rows_;
  Index first_ = 0, count_ = 0, columns_of_tile_ = 0;
  Index most_visible_ = 0, least_visible_ = 0;
  bool one_pass_ = true;
  Index query_[kQueryTile] = {}, visible_[kQueryTile] = {};
  float log_sum_exp_[kQueryTile] = {};
  float row_sum_[kQueryTile] = {};
  float factor_[kQueryTile] = {};
};

/// The earliest head's complaint, so that the status is the same for every executor.
[[nodiscard]] inline Status first_error(std::span<const Status> statuses) noexcept {
  for (const Status& s : statuses) {
    if (!s.ok()) return s;
  }
  return {};
}

}  // namespace kvfold::detail
