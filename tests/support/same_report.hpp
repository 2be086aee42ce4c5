/// \file
/// Compares two reports, field by field.
#pragma once

#include <gtest/gtest.h>

#include "kvfold/types.hpp"

namespace kvfold::test {

inline void expect_same_report(const CompressionReport& got, const CompressionReport& wanted) {
  EXPECT_EQ(got.rows_before, wanted.rows_before);
  EXPECT_EQ(got.rows_kept, wanted.rows_kept);
  EXPECT_EQ(got.rows_merged, wanted.rows_merged);
  EXPECT_EQ(got.rows_evicted, wanted.rows_evicted);
  EXPECT_EQ(got.rows_rewritten, wanted.rows_rewritten);
  EXPECT_EQ(got.bytes_before, wanted.bytes_before);
  EXPECT_EQ(got.bytes_after, wanted.bytes_after);
  EXPECT_EQ(got.live_bytes_before, wanted.live_bytes_before);
  EXPECT_EQ(got.live_bytes_after, wanted.live_bytes_after);
  EXPECT_EQ(got.kept_score_share, wanted.kept_score_share);
  EXPECT_EQ(got.merged_score_share, wanted.merged_score_share);
  EXPECT_EQ(got.equal_counts_cost, wanted.equal_counts_cost);
}

}  // namespace kvfold::test
