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

TEST(SumInFp64, KeepsWhatFp32WouldDrop) {
  std::vector<float> x;
  double wanted = 0.0;
  for (Index n = 0; n <= 40; ++n) {
    EXPECT_EQ(sum_in_fp64(x.data(), n), wanted) << n;
    x.push_back(n % 3 == 0 ? 0x1p40f : static_cast<float>(n));
    wanted += static_cast<double>(x.back());
  }
}

}  // namespace
}  // namespace kvfold::detail
