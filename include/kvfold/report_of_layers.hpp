/// \file
/// What compressing the layers of a model did, in one report.
#pragma once

#include "kvfold/types.hpp"

namespace kvfold {

/// Adds up the reports of layers. Counts and bytes become sums, shares and costs means in which every layer weighs the same.
class ReportOfLayers {
 public:
  /// Takes one layer in. O(1).
  void add(const CompressionReport& layer) noexcept {
    ++layers_;
    sum_.rows_before += layer.rows_before;
    sum_.rows_kept += layer.rows_kept;
    sum_.rows_merged += layer.rows_merged;
    sum_.rows_evicted += layer.rows_evicted;
    sum_.rows_rewritten += layer.rows_rewritten;
    sum_.bytes_before += layer.bytes_before;
    sum_.bytes_after += layer.bytes_after;
    sum_.live_bytes_before += layer.live_bytes_before;
    sum_.live_bytes_after += layer.live_bytes_after;
    sum_.kept_score_share += layer.kept_score_share;
    sum_.merged_score_share += layer.merged_score_share;
    sum_.equal_counts_cost += layer.equal_counts_cost;
  }

  /// \returns the report of all layers that were added; of none, that of an empty cache. O(1)
  [[nodiscard]] CompressionReport total() const noexcept {
    if (layers_ == 0) return {};
    CompressionReport total = sum_;
    const auto layers = static_cast<float>(layers_);
    total.kept_score_share /= layers;
    total.merged_score_share /= layers;
    total.equal_counts_cost /= layers;
    return total;
  }

 private:
  Index layers_ = 0;
  CompressionReport sum_{.kept_score_share = 0.f};
};

}  // namespace kvfold
