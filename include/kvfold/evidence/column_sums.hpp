/// \file
/// Column sums of attention as evidence: how much each row was looked at, over the whole prompt and by the last queries.
#pragma once

#include <span>

#include "kvfold/types.hpp"

namespace kvfold {

/// How the G query heads of a KV head are joined into one score per row.
enum class GroupReduction : unsigned char {
  mean,  ///< average of the query heads' attention
  max,   ///< the query head that looks at the row the most
};

/// How finely column sums are kept.
enum class ColumnDetail : unsigned char {
  layer,       ///< one column set for all heads (some engines only have this): refused by policies that work per head
  kv_head,     ///< C = 1: the mean over each group
  query_head,  ///< C = G: each query head apart
};

/// Accumulated attention, per head and row. Non-owning.
///
/// Head h has its columns at `C * offset[h]`, as [C][T_h], in `global` and in `local`. With `ColumnDetail::layer` there
/// is one block of T rows and `offset` is {0, T}.
struct ColumnSums {
  ColumnDetail detail = ColumnDetail::kv_head;
  std::span<const Index> offset;  ///< [H + 1] rows before head h
  std::span<const float> global;  ///< [C * sum of T_h] sum of attention over all observed queries
  std::span<const float> local;   ///< the same over the last `window` queries; may be empty
  std::span<const float> seen;  ///< [sum of T_h] weight of the queries in `global` that could see the row; may be empty
  Index window = 0;             ///< W of `local`
};

/// Softmax rows, where the engine has them: query head q, row i, key j at `data[q * head_stride + i * row_stride + j]`.
/// Rows of heads with fewer keys end early; masked entries are 0. The local term is the sum of the last W rows.
struct AttentionWeights {
  const float* data = nullptr;
  Index query_heads = 0;  ///< H * G
  Index rows = 0;         ///< queries
  Index head_stride = 0;  ///< floats from one query head to the next
  Index row_stride = 0;   ///< floats from one query to the next, at least max T_h
};

}  // namespace kvfold
