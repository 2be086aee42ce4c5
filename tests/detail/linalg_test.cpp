#include <kvfold/detail/linalg.hpp>

#include <cmath>
#include <vector>

#include <gtest/gtest.h>

#include "builders.hpp"

namespace kvfold::detail {
namespace {

TEST(CountAbove, AndPlacesAreOfTheSameNumbers) {
  test::Random random(3);
  for (Index n = 0; n <= 40; ++n) {
    const std::vector<float> x = test::normals(n, random);
    for (const float least : {-10.f, -0.5f, 0.f, 0.5f, 10.f}) {
      std::vector<RowId> wanted, places(static_cast<std::size_t>(n));
      for (Index i = 0; i < n; ++i) {
        if (x[static_cast<std::size_t>(i)] > least) wanted.push_back(static_cast<RowId>(i));
      }
      const Index count = count_above(x.data(), n, least);
      ASSERT_EQ(count, static_cast<Index>(wanted.size()));
      places_above(x.data(), n, least, places.data());
      places.resize(wanted.size());
      EXPECT_EQ(places, wanted);
    }
  }
}

TEST(AddRows, IsTheSumOfScaledRows) {
  test::Random random(4);
  constexpr Index kWidth = 21, kStride = 24, kMost = 19, kStep = 2;
  const std::vector<float> rows = test::normals(kMost * kStride, random);
  const std::vector<float> factors = test::normals(kMost * kStep, random);
  for (Index count = 0; count <= kMost; ++count) {
    std::vector<float> sum(kWidth, 0.5f);
    add_rows(rows.data(), kStride, factors.data(), kStep, count, kWidth, sum.data());
    for (Index j = 0; j < kWidth; ++j) {
      double wanted = 0.5;
      for (Index r = 0; r < count; ++r) {
        wanted += static_cast<double>(factors[static_cast<std::size_t>(r * kStep)]) *
                  static_cast<double>(rows[static_cast<std::size_t>(r * kStride + j)]);
      }
      EXPECT_NEAR(static_cast<double>(sum[static_cast<std::size_t>(j)]), wanted, 1e-5) << count;
    }
  }
}

TEST(JoinSoftmax, IsTheSoftmaxOfAllTiles) {
  constexpr Index kRows = 3, kTiles = 4;
  // The second row sees nothing until the third tile, the last nothing at all.
  const float maxima[kTiles][kRows] = {
      {1.f, kNoMax, kNoMax}, {200.f, kNoMax, kNoMax}, {-3.f, 5.f, kNoMax}, {199.f, 4.f, kNoMax}};
  const float sums[kTiles][kRows] = {{2.f, 0.f, 0.f}, {1.5f, 0.f, 0.f}, {9.f, 1.f, 0.f}, {1.f, 3.f, 0.f}};
  alignas(64) float max[kRows] = {kNoMax, kNoMax, kNoMax}, sum[kRows] = {}, factor[kRows] = {};
  for (Index t = 0; t < kTiles; ++t) join_softmax(maxima[t], sums[t], kRows, max, sum);
  EXPECT_EQ(max[0], 200.f);
  EXPECT_NEAR(sum[0], 1.5f + std::exp(-1.f), 1e-6f);
  EXPECT_EQ(max[1], 5.f);
  EXPECT_NEAR(sum[1], 1.f + 3.f * std::exp(-1.f), 1e-6f);
  EXPECT_EQ(sum[2], 0.f);
  alignas(64) const float scale[kRows] = {2.f, 1.f, 0.f};
  exp_factors(maxima[3], max, scale, kRows, factor);
  EXPECT_NEAR(factor[0], 2.f * std::exp(-1.f), 1e-6f);
  EXPECT_NEAR(factor[1], std::exp(-1.f), 1e-6f);
  EXPECT_EQ(factor[2], 0.f);
}

}  // namespace
}  // namespace kvfold::detail
