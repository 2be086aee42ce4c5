/// \file
/// The only code that writes to a cache.
#pragma once

#include "kvfold/detail/rows.hpp"
#include "kvfold/status.hpp"
#include "kvfold/types.hpp"
#include "kvfold/view/concepts.hpp"

namespace kvfold {

namespace detail {

/// Whether a plan is for the cache as it is now, and holds together.
template <KVCacheView V>
[[nodiscard]] Status check_plan(const CompressionPlan& plan, const V& view) noexcept {
  const LayerShape shape = view.shape();
  const auto heads = static_cast<std::size_t>(std::max<Index>(shape.kv_heads, 0));
  if (!(plan.shape == shape) || heads == 0 || plan.source_rows.size() != heads ||
      plan.kept_offset.size() != heads + 1 || plan.merged_offset.size() != heads + 1) {
    return {StatusCode::size_mismatch, "plan", "was made for a cache of another shape"};
  }
  const bool offsets_fit = plan.kept_offset[0] == 0 && plan.merged_offset[0] == 0 &&
                           plan.kept_offset[heads] == static_cast<Index>(plan.kept.size()) &&
                           plan.merged_offset[heads] == static_cast<Index>(plan.merged.size());
  const std::size_t merged = plan.merged.size();
  if (!offsets_fit || plan.merged_values.size() != merged * at(shape.value_dim) ||
      (!plan.merged_keys.empty() && plan.merged_keys.size() != merged * at(shape.key_dim))) {
    return {StatusCode::invalid_argument, "plan", "its tables do not fit together"};
  }
  if (plan.writes_log_mass && !can_store_log_mass(view)) {
    return {StatusCode::unsupported, "view", "has no place for the log masses of the plan"};
  }
  if (Status bad = own_check_of(view); !bad.ok()) return bad;
  for (std::size_t i = 0; i < heads; ++i) {
    if (plan.kept_offset[i + 1] < plan.kept_offset[i] || plan.merged_offset[i + 1] < plan.merged_offset[i]) {
      return {StatusCode::invalid_argument, "plan", "its offsets are not ascending", static_cast<Index>(i)};
    }
    if (plan.kept_offset[i + 1] == plan.kept_offset[i]) {
      return {StatusCode::invalid_argument, "plan", "keeps no row of a head", static_cast<Index>(i)};
    }
  }
  for (Index h = 0; h < shape.kv_heads; ++h) {
    const auto i = at(h);
    if (static_cast<Index>(view.size(h)) != plan.source_rows[i]) {
      return {StatusCode::size_mismatch, "plan", "was made when the cache had other rows", h};
    }
    if (has_equal_counts(view) && plan.kept_offset[i + 1] - plan.kept_offset[i] != plan.kept_offset[1]) {
      return {StatusCode::unsupported, "plan", "keeps unequal counts, but the storage has one count for all heads", h};
    }
    RowId previous = -1;
    for (const RowId row : plan.kept_rows(h)) {
      if (row <= previous || row >= plan.source_rows[i]) {
        return {StatusCode::invalid_argument, "plan", "kept rows must be ascending and inside the head", h};
      }
      previous = row;
    }
    RowId slot = -1;
    for (const MergedRow& row : plan.merged_rows(h)) {
      if (row.slot <= slot || row.slot >= static_cast<Index>(plan.kept_rows(h).size())) {
        return {StatusCode::invalid_argument, "plan", "slots of merged rows must be ascending and inside the kept ones",
                h};
      }
      slot = row.slot;
    }
  }
  return {};
}

}  // namespace detail

/// What a plan would do to a cache: counts, and bytes of rows where the view tells them; live bytes are 0, since memory is
/// only known to be freed when it has been.
template <KVCacheView V>
[[nodiscard]] CompressionReport report_of(const CompressionPlan& plan, const V& view) noexcept {
  CompressionReport report;
  report.kept_score_share = plan.kept_score_share;
  report.merged_score_share = plan.merged_score_share;
  report.equal_counts_cost = plan.equal_counts_cost;
  report.rows_rewritten = static_cast<Index>(plan.merged.size());
  for (const MergedRow& row : plan.merged) report.rows_merged += row.absorbed;
  for (Index h = 0; h < plan.shape.kv_heads; ++h) {
    const Index before = plan.source_rows[detail::at(h)];
    const auto kept = static_cast<Index>(plan.kept_rows(h).size());
    report.rows_before += before;
    report.rows_kept += kept;
    report.bytes_before += before * row_bytes_of(view, h);
    report.bytes_after += kept * row_bytes_of(view, h);
  }
  report.rows_evicted = report.rows_before - report.rows_kept - report.rows_merged;
  return report;
}

/// Carries a plan out: kept rows move to the front in their order, merged ones are rewritten, the rest is released.
///
/// All or nothing: when the plan does not fit the cache, a status says so and nothing is written. Kept rows that were not
/// merged are moved as they are stored, bit for bit. Positions stay those of the kept rows, so the next token's position is
/// still N, the logical length, and never the number of rows. Cost O(kept rows * row bytes).
template <MutableKVCacheView V>
[[nodiscard]] Result<CompressionReport> apply(const CompressionPlan& plan, V& view) noexcept {
  if (Status bad = detail::check_plan(plan, view); !bad.ok()) return bad;
  CompressionReport report = report_of(plan, view);
  report.live_bytes_before = live_bytes_of(view);
  const Index key_dim = plan.shape.key_dim, value_dim = plan.shape.value_dim;
  for (Index h = 0; h < plan.shape.kv_heads; ++h) {
    const std::span<const RowId> kept = plan.kept_rows(h);
    for (std::size_t slot = 0; slot < kept.size(); ++slot) {
      // Sources ascend and are never below their slot, so no row is overwritten before it has moved.
      if (static_cast<std::size_t>(kept[slot]) != slot) view.move_row(h, kept[slot], static_cast<Index>(slot));
    }
    Index m = plan.merged_offset[detail::at(h)];
    for (const MergedRow& row : plan.merged_rows(h)) {
      view.write_value(h, row.slot, plan.merged_values.subspan(detail::at(m * value_dim), detail::at(value_dim)));
      if (!plan.merged_keys.empty()) {
        view.write_key(h, row.slot, plan.merged_keys.subspan(detail::at(m * key_dim), detail::at(key_dim)));
      }
      if constexpr (HasWritableLogMass<V>) {
        if (plan.writes_log_mass) view.write_log_mass(h, row.slot, row.log_mass);
      }
      ++m;
    }
    view.resize(h, static_cast<Index>(kept.size()));
  }
  report.live_bytes_after = live_bytes_of(view);
  return report;
}

}  // namespace kvfold
