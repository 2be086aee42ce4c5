// Rows of weights are checked and added in one pass.
#include <kvfold/detail/collect_columns.hpp>

#include <cmath>
#include <vector>

#include <gtest/gtest.h>

#include "builders.hpp"

namespace kvfold::detail {
namespace {

TEST(AddCheckedRows, IsTheSumOfScaledRows) {
  test::Random random(4);
  constexpr Index kMost = 8, kStride = 40;
  constexpr float kFactor = 0.75f;
  std::vector<float> rows = test::normals(kMost * kStride, random);
  for (float& x : rows) x = std::abs(x);
  for (const Index width : {1, 3, 4, 8, 16, 21, 37}) {
    for (Index count = 1; count <= kMost; ++count) {
      std::vector<float> sum(kStride, 0.5f);
      with_constant<kMost>(count, [&](auto constant) {
        EXPECT_TRUE(add_checked_rows<constant()>(rows.data(), kStride, kFactor, width, sum.data()));
      });
      for (Index j = 0; j < kStride; ++j) {
        double wanted = 0.5;
        for (Index r = 0; j < width && r < count; ++r) {
          wanted += static_cast<double>(kFactor) * static_cast<double>(rows[static_cast<std::size_t>(r * kStride + j)]);
        }
        EXPECT_NEAR(static_cast<double>(sum[static_cast<std::size_t>(j)]), wanted, 1e-5) << count << " " << width;
      }
    }
  }
}

}  // namespace
}  // namespace kvfold::detail
