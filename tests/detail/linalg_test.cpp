#include <kvfold/detail/linalg.hpp>

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
      places.resize(static_cast<std::size_t>(n + kPlacesBeyond), RowId{-7});
      places.push_back(RowId{-8});
      places_above(x.data(), n, least, places.data());
      EXPECT_EQ(places.back(), RowId{-8});
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

}  // namespace
}  // namespace kvfold::detail
