/// \file
/// Queries as evidence: the universal source, since every engine has them.
#pragma once

#include <cmath>
#include <span>

#include "kvfold/status.hpp"
#include "kvfold/types.hpp"

namespace kvfold {

/// Queries of some positions (a window, a sample, or all), rotated as the stored keys are.
///
/// Query head q = h * G + g, row i is D floats at `data + q * head_stride + i * row_stride`. Non-owning.
/// A query at position p attends to the rows whose position is at most p.
struct QueryRows {
  const float* data = nullptr;
  Index query_heads = 0;                     ///< H * G
  Index dim = 0;                             ///< D
  Index head_stride = 0;                     ///< floats from one query head to the next
  Index row_stride = 0;                      ///< floats from one row to the next
  std::span<const Position> positions = {};  ///< [rows], ascending
  float scale = 0.f;                         ///< factor of q.k in the logit; 0 means 1 / sqrt(D)
  std::span<const float> log_sum_exp = {};  ///< [H * G][rows], of the scaled logits over all visible rows; may be empty

  [[nodiscard]] Index rows() const noexcept { return static_cast<Index>(positions.size()); }
  [[nodiscard]] const float* row(Index query_head, Index i) const noexcept {
    return data + query_head * head_stride + i * row_stride;
  }
  [[nodiscard]] float logit_scale() const noexcept {
    return scale != 0.f ? scale : 1.f / std::sqrt(static_cast<float>(dim));
  }
};

/// Queries stored as [H * G][rows][D], the layout of most engines after RoPE.
[[nodiscard]] inline QueryRows head_major_queries(const float* data, Index query_heads, Index dim,
                                                  std::span<const Position> positions) noexcept {
  return {.data = data,
          .query_heads = query_heads,
          .dim = dim,
          .head_stride = static_cast<Index>(positions.size()) * dim,
          .row_stride = dim,
          .positions = positions};
}

/// Queries stored as [rows][H * G][D].
[[nodiscard]] inline QueryRows token_major_queries(const float* data, Index query_heads, Index dim,
                                                   std::span<const Position> positions) noexcept {
  return {.data = data,
          .query_heads = query_heads,
          .dim = dim,
          .head_stride = dim,
          .row_stride = query_heads * dim,
          .positions = positions};
}

namespace detail {

/// Everything about queries that can be checked without the cache's contents.
[[nodiscard]] inline Status check_queries(const QueryRows& queries, const LayerShape& shape) noexcept {
  if (queries.data == nullptr) return {StatusCode::invalid_argument, "queries", "data is null"};
  if (queries.rows() < 1) return {StatusCode::invalid_argument, "queries", "there are no rows"};
  if (queries.rows() > kMaxRows) return {StatusCode::invalid_argument, "queries", "more than kMaxRows rows"};
  if (queries.query_heads != shape.query_heads()) {
    return {StatusCode::size_mismatch, "queries", "query_heads is not kv_heads * group_size of the view"};
  }
  if (queries.dim != shape.key_dim) return {StatusCode::size_mismatch, "queries", "dim is not the view's key_dim"};
  if (!std::isfinite(queries.scale) || queries.scale < 0.f) {
    return {StatusCode::invalid_argument, "queries", "scale must be a positive number, or 0 for 1 / sqrt(D)"};
  }
  if (queries.row_stride < queries.dim || queries.head_stride < 0) {
    return {StatusCode::invalid_argument, "queries", "row_stride must be at least dim, head_stride at least 0"};
  }
  if (!queries.log_sum_exp.empty() &&
      queries.log_sum_exp.size() != static_cast<std::size_t>(queries.query_heads) * queries.positions.size()) {
    return {StatusCode::size_mismatch, "queries", "log_sum_exp must have query_heads * rows entries"};
  }
  for (std::size_t i = 1; i < queries.positions.size(); ++i) {
    if (queries.positions[i] < queries.positions[i - 1]) {
      return {StatusCode::invalid_argument, "queries", "positions must be in ascending order", -1,
              static_cast<Index>(i)};
    }
  }
  for (const float lse : queries.log_sum_exp) {
    if (!std::isfinite(lse)) return {StatusCode::not_finite, "queries", "log_sum_exp has a NaN or an infinity"};
  }
  return {};
}

}  // namespace detail
}  // namespace kvfold
