/// \file
/// The nouns that pass between stages.
///
/// Index letters used in every comment, document and test of kvfold:
/// `L` layer, `H` KV heads, `G` query heads per KV head, `T` rows (tokens) in a head, `B` budget (rows kept),
/// `D` key width, `E` value width, `W` local window, `R` candidates to merge, `N` logical length of the sequence.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace kvfold {

/// Counts, sizes and row numbers in the interface: signed, 64 bits.
using Index = std::int64_t;

/// The RoPE position a stored key was rotated to, and a query's position in the sequence.
using Position = std::int64_t;

/// A row number as plans store it: half the memory of an `Index`. Heads are limited to `kMaxRows` rows.
using RowId = std::int32_t;

/// The number of a page in its pool, as page tables name it.
using PageId = std::int32_t;

inline constexpr Index kMaxRows = INT32_MAX;  ///< largest T of one head
inline constexpr Index kMaxHeads = 1 << 16;   ///< largest H, G and H * G
inline constexpr Index kMaxWidth = 1 << 16;   ///< largest D and E

/// The sizes of one sequence in one layer that are the same for all of its heads.
struct LayerShape {
  Index kv_heads = 0;    ///< H, at least 1
  Index group_size = 1;  ///< G, query heads that share one KV head; query head q belongs to KV head q / G
  Index key_dim = 0;     ///< D, floats in a key
  Index value_dim = 0;   ///< E, floats in a value

  [[nodiscard]] constexpr Index query_heads() const noexcept { return kv_heads * group_size; }
  friend constexpr bool operator==(const LayerShape&, const LayerShape&) = default;
};

/// Which row counts a storage can hold after compression.
enum class RowCounts : std::uint8_t {
  per_head,   ///< every head may have its own count (ragged)
  per_layer,  ///< all heads of a layer have the same count
  per_model,  ///< all heads of all layers have the same count: min(B, T), whatever the scores
};

/// Rows that a rule keeps whatever their score. Never expressed as a large score: that fails on ties and in 16 bits.
enum class Protection : std::uint8_t {
  none = 0,
  recent = 1,  ///< one of the last rows; the latest come first where a budget cannot hold all of them
  sink = 2,    ///< one of the first rows; before every recent row where a budget cannot hold all
};

/// What a scorer says of every row of a layer. Non-owning; rows of head h are `[offset[h], offset[h + 1])`.
struct ScoreTable {
  std::span<const Index> offset;  ///< [H + 1]
  std::span<float> score;         ///< [sum of T_h], higher = keep, finite and at least 0 unless a scorer says otherwise
  std::span<Protection> protection;  ///< [sum of T_h]

  [[nodiscard]] Index heads() const noexcept { return static_cast<Index>(offset.size()) - 1; }
  [[nodiscard]] Index rows(Index h) const noexcept { return offset[at(h) + 1] - offset[at(h)]; }
  [[nodiscard]] std::span<float> scores(Index h) const noexcept {
    return score.subspan(at(offset[at(h)]), at(rows(h)));
  }
  [[nodiscard]] std::span<Protection> protections(Index h) const noexcept {
    return protection.subspan(at(offset[at(h)]), at(rows(h)));
  }

 private:
  static constexpr std::size_t at(Index i) noexcept { return static_cast<std::size_t>(i); }
};

/// What becomes of a source row.
enum class RowFate : std::uint8_t { evicted = 0, kept = 1, merged = 2 };

/// One kept row that has absorbed others.
struct MergedRow {
  RowId slot = 0;        ///< which of the head's kept rows, as an index into `CompressionPlan::kept_rows(h)`
  RowId absorbed = 0;    ///< |M|, rows merged into it, at least 1
  float log_mass = 0.f;  ///< m_c, what attention adds to the row's logit from now on
};

/// Everything `apply` needs to know, as data: it can be printed, compared, copied or thrown away.
///
/// Non-owning: the spans point into the workspace that was given to `plan()` and live until it is used again.
struct CompressionPlan {
  LayerShape shape;
  std::span<const Index> source_rows;    ///< [H] T_h when the plan was made; `apply` refuses a cache that has changed
  std::span<const Index> kept_offset;    ///< [H + 1]
  std::span<const RowId> kept;           ///< source rows that stay, ascending within each head
  std::span<const Index> merged_offset;  ///< [H + 1]
  std::span<const MergedRow> merged;     ///< ascending slots within each head
  std::span<const float> merged_values;  ///< [merged.size()][E]
  std::span<const float> merged_keys;    ///< [merged.size()][D], or empty: keys of the centres stay as they are
  bool writes_log_mass = false;          ///< whether `log_mass` of the merged rows is to be written
  std::span<const Index> row_offset;     ///< [H + 1] offsets of the two tables below
  std::span<const RowFate> fate;         ///< [sum of T_h]
  std::span<const RowId> row_class;      ///< [sum of T_h] slot that a kept or merged row lives on in; -1: evicted
  float kept_score_share = 1.f;          ///< mean over heads of the kept rows' share of the head's score, in [0, 1]
  float merged_score_share = 0.f;        ///< likewise of the rows merged into kept ones
  float equal_counts_cost = 0.f;         ///< see CompressionReport

  [[nodiscard]] std::span<const RowId> kept_rows(Index h) const noexcept { return slice(kept, kept_offset, h); }
  [[nodiscard]] std::span<const MergedRow> merged_rows(Index h) const noexcept {
    return slice(merged, merged_offset, h);
  }
  [[nodiscard]] std::span<const RowFate> fates(Index h) const noexcept { return slice(fate, row_offset, h); }
  [[nodiscard]] std::span<const RowId> row_classes(Index h) const noexcept { return slice(row_class, row_offset, h); }

 private:
  template <class T>
  static std::span<const T> slice(std::span<const T> all, std::span<const Index> offset, Index h) noexcept {
    const auto i = static_cast<std::size_t>(h);
    return all.subspan(static_cast<std::size_t>(offset[i]), static_cast<std::size_t>(offset[i + 1] - offset[i]));
  }
};

/// What a compression did. Counts are sums over the heads of the layer; `ReportOfLayers` adds up those of several layers.
struct CompressionReport {
  Index rows_before = 0;
  Index rows_kept = 0;    ///< rows in the cache afterwards
  Index rows_merged = 0;  ///< rows that live on inside a kept one
  Index rows_evicted = 0;
  Index rows_rewritten = 0;  ///< kept rows whose value (and key) changed; all others are unchanged to the bit
  Index bytes_before = 0;    ///< K and V of the rows, 0 where the view does not tell its row size
  Index bytes_after = 0;
  Index live_bytes_before = 0;  ///< memory that the storage held, 0 where the view does not tell; filled by `apply`
  Index live_bytes_after = 0;
  float kept_score_share = 1.f;  ///< see CompressionPlan
  float merged_score_share = 0.f;
  /// What it costs that the storage has one count for all heads: `kept_score_share` with the counts that the budget policy
  /// asked for, minus that with equal ones. 0 where heads may be ragged; below 0 where the policy asked for less.
  float equal_counts_cost = 0.f;
};

/// Where `attend` puts its results: query head q, row i is E floats at `data + q * head_stride + i * row_stride`.
struct AttentionOutput {
  float* data = nullptr;
  Index head_stride = 0;
  Index row_stride = 0;
  std::span<float> log_sum_exp = {};  ///< [H * G][rows] of the logits, or empty: what one-pass evidence needs
};

}  // namespace kvfold
