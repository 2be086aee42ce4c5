#include <kvfold/detail/softmax.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

#include <gtest/gtest.h>

#include "builders.hpp"

namespace kvfold::detail {
namespace {

float exp_of(float x) { return exp_lanes(Lanes{} + x)[kLanes - 1]; }

TEST(ExpLanes, AreOffByNoMoreThanTwoRoundings) {
  for (float x = -87.3f; x < 88.f; x += 0.00137f) {
    const double wanted = std::exp(static_cast<double>(x));
    ASSERT_LE(std::abs(static_cast<double>(exp_of(x)) - wanted), 1e-7 * wanted) << x;
  }
}

TEST(ExpLanes, AreExactAtZero) {
  EXPECT_EQ(exp_of(0.f), 1.f);
  EXPECT_EQ(exp_of(-0.f), 1.f);
}

TEST(ExpLanes, GoToZeroWhereFp32Ends) {
  float last = exp_of(-87.f);
  for (float x = -87.f; x > -89.f; x -= 0.01f) {
    const float next = exp_of(x);
    EXPECT_LE(next, last) << x;
    EXPECT_GE(next, 0.f) << x;
    last = next;
  }
  for (const float x :
       {-87.8f, -88.f, -1e4f, std::numeric_limits<float>::lowest(), -std::numeric_limits<float>::infinity()}) {
    EXPECT_EQ(exp_of(x), 0.f) << x;
  }
}

TEST(ExpLanes, StayFiniteAboveTheLargestOnes) {
  const Lanes most = exp_lanes(Lanes{} + 88.f);
  for (const float x : {88.5f, 1e4f, std::numeric_limits<float>::max(), std::numeric_limits<float>::infinity()}) {
    EXPECT_EQ(exp_lanes(Lanes{} + x)[0], most[0]) << x;
  }
  EXPECT_TRUE(std::isfinite(most[0]));
}

TEST(ExpLanes, OfNanAreNan) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  EXPECT_TRUE(std::isnan(exp_lanes(Lanes{} + nan)[0]));
  EXPECT_TRUE(std::isnan(exp_lanes(Lanes{} - nan)[0]));
}

TEST(ExpShifted, ReplacesNumbersByTheirExpsAndAddsThemUp) {
  test::Random random(2);
  for (Index n = 0; n <= 70; ++n) {
    const std::vector<float> x = test::normals(n, random, 5.f);
    std::vector<float> y = x;
    y.push_back(77.f);
    const float sum = exp_shifted(y.data(), n, 1.5f);
    double wanted = 0.0;
    for (std::size_t i = 0; i < x.size(); ++i) {
      const double e = std::exp(static_cast<double>(x[i] - 1.5f));
      EXPECT_NEAR(static_cast<double>(y[i]), e, 1.5e-7 * e);
      wanted += e;
    }
    EXPECT_NEAR(static_cast<double>(sum), wanted, 1e-6 * wanted) << n;
    EXPECT_EQ(y.back(), 77.f) << n;
  }
}

TEST(ExpShifted, DoesNotDependOnWhereANumberLies) {
  std::vector<float> x(100, -1.2345f);
  exp_shifted(x.data() + 1, 99, 0.f);
  for (std::size_t i = 2; i < x.size(); ++i) ASSERT_EQ(x[i], x[1]) << i;
}

/// A tile of logits with a gap after kLanes columns.
struct Tile {
  static constexpr Index kStride = kLanes + 5;
  Index n;
  std::vector<float> x;

  explicit Tile(Index n_) : n(n_) {
    test::Random random(static_cast<std::uint64_t>(n));
    x = test::normals(n * kStride, random, 5.f);
  }
  [[nodiscard]] float& at(Index j, Index i) { return x[static_cast<std::size_t>(j * kStride + i)]; }
};

TEST(HideColumns, LeavesEachQueryTheRowsThatItSees) {
  Tile tile(11);
  const Tile before = tile;
  std::int32_t seen[kLanes];
  for (Index i = 0; i < kLanes; ++i) seen[i] = static_cast<std::int32_t>(i * 5 % 12);  // from none to all
  hide_columns(tile.x.data(), Tile::kStride, tile.n, seen);
  for (Index j = 0; j < tile.n; ++j) {
    for (Index i = 0; i < Tile::kStride; ++i) {
      const bool hidden = i < kLanes && j >= seen[i];
      EXPECT_EQ(tile.at(j, i), hidden ? -std::numeric_limits<float>::infinity() : Tile(before).at(j, i)) << j << i;
    }
  }
}

TEST(MaxOfColumns, IsTheLargestOfEachAndNoneForHiddenOnes) {
  for (const Index n : {1, 2, 3, 4, 5, 7, 8, 96}) {
    Tile tile(n);
    for (Index j = 0; j < n; ++j) tile.at(j, kLanes - 1) = -std::numeric_limits<float>::infinity();
    const Lanes got = max_of_columns(tile.x.data(), Tile::kStride, n);
    for (Index i = 0; i < kLanes; ++i) {
      float most = kNoMax;
      for (Index j = 0; j < n; ++j) most = std::max(most, tile.at(j, i));
      EXPECT_EQ(got[i], most) << n << " " << i;
    }
  }
}

TEST(ExpColumns, ReplaceNumbersByTheirExpsAndAddEachColumnUp) {
  Tile tile(9);
  tile.at(3, 1) = -std::numeric_limits<float>::infinity();
  Tile before = tile;
  Lanes shift;
  for (Index i = 0; i < kLanes; ++i) shift[i] = static_cast<float>(i) - 2.f;
  const Lanes sums = exp_columns(tile.x.data(), Tile::kStride, tile.n, shift);
  for (Index i = 0; i < Tile::kStride; ++i) {
    double sum = 0.0;
    for (Index j = 0; j < tile.n; ++j) {
      if (i >= kLanes) {
        EXPECT_EQ(tile.at(j, i), before.at(j, i));
        continue;
      }
      const double wanted = std::exp(static_cast<double>(before.at(j, i) - shift[i]));
      EXPECT_NEAR(static_cast<double>(tile.at(j, i)), wanted, 1.5e-7 * wanted);
      sum += wanted;
    }
    if (i < kLanes) {
      EXPECT_NEAR(static_cast<double>(sums[i]), sum, 1e-6 * sum) << i;
    }
  }
  EXPECT_EQ(tile.at(3, 1), 0.f);
}

TEST(AddRowSums, AddWhatEachRowOfATileSumsUpTo) {
  for (const Index width : {kLanes, 3 * kLanes}) {
    const Index stride = width + 5;
    for (Index n = 1; n <= 2 * kLanes + 3; ++n) {
      test::Random random(static_cast<std::uint64_t>(n));
      const std::vector<float> x = test::normals(n * stride, random), factor = test::normals(width, random);
      std::vector<float> to(static_cast<std::size_t>(n + 1), 2.f);
      add_row_sums(x.data(), stride, n, factor.data(), width, to.data());
      for (Index j = 0; j < n; ++j) {
        double sum = 2.0, magnitude = 2.0;
        for (Index i = 0; i < width; ++i) {
          const double term = static_cast<double>(x[static_cast<std::size_t>(j * stride + i)]) *
                              static_cast<double>(factor[static_cast<std::size_t>(i)]);
          sum += term;
          magnitude += std::abs(term);
        }
        EXPECT_NEAR(static_cast<double>(to[static_cast<std::size_t>(j)]), sum, 1e-6 * magnitude) << n << " " << j;
      }
      EXPECT_EQ(to.back(), 2.f) << n;
    }
  }
}

TEST(JoinSoftmax, IsTheSoftmaxOfAllTiles) {
  constexpr Index kRows = 3, kTiles = 4;
  // The second row sees nothing until the third tile, the last nothing at all.
  const float maxima[kTiles][kRows] = {
      {1.f, kNoMax, kNoMax}, {200.f, kNoMax, kNoMax}, {-3.f, 5.f, kNoMax}, {199.f, 4.f, kNoMax}};
  const float sums[kTiles][kRows] = {{2.f, 0.f, 0.f}, {1.5f, 0.f, 0.f}, {9.f, 1.f, 0.f}, {1.f, 3.f, 0.f}};
  float max[kRows] = {kNoMax, kNoMax, kNoMax}, sum[kRows] = {}, factor[kRows] = {};
  for (Index t = 0; t < kTiles; ++t) join_softmax(maxima[t], sums[t], kRows, max, sum);
  EXPECT_EQ(max[0], 200.f);
  EXPECT_NEAR(sum[0], 1.5f + std::exp(-1.f), 1e-6f);
  EXPECT_EQ(max[1], 5.f);
  EXPECT_NEAR(sum[1], 1.f + 3.f * std::exp(-1.f), 1e-6f);
  EXPECT_EQ(sum[2], 0.f);
  const float scale[kRows] = {2.f, 1.f, 0.f};
  exp_factors(maxima[3], max, scale, kRows, factor);
  EXPECT_NEAR(factor[0], 2.f * std::exp(-1.f), 1e-6f);
  EXPECT_NEAR(factor[1], std::exp(-1.f), 1e-6f);
  EXPECT_EQ(factor[2], 0.f);
}

}  // namespace
}  // namespace kvfold::detail
