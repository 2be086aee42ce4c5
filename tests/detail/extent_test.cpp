#include <kvfold/detail/extent.hpp>

#include <array>
#include <cstdint>
#include <limits>

#include <gtest/gtest.h>

namespace kvfold::detail {
namespace {

constexpr Index kHuge = std::numeric_limits<Index>::max();

TEST(Extents, ProductsThatDoNotFitAreMinusOne) {
  EXPECT_EQ(product({}), 1);
  EXPECT_EQ(product({3, 5, 7}), 105);
  EXPECT_EQ(product({INT64_MAX, 1}), INT64_MAX);
  EXPECT_EQ(product({INT64_MAX, INT64_MAX, 0}), 0);
  EXPECT_EQ(product({INT64_MAX / 2 + 1, 2}), -1);
  EXPECT_EQ(product({-1, 5}), -1);
  EXPECT_EQ(product({0, -1}), -1);
}

TEST(Extents, SpansReachFromTheFirstElementToTheLast) {
  EXPECT_EQ(spanned_elements({{3, 10}, {4, 2}}, 4), 2 * 10 + 3 * 2 + 1);
  EXPECT_EQ(spanned_elements({{1, INT64_MAX}}, 4), 1);
  EXPECT_EQ(spanned_elements({{5, 0}}, 4), 1);
  EXPECT_EQ(spanned_elements({{0, 1}}, 4), -1);
  EXPECT_EQ(spanned_elements({{2, -1}}, 4), -1);
  EXPECT_EQ(spanned_elements({{INT64_MAX / 4, 1}}, 4), INT64_MAX / 4);
  EXPECT_EQ(spanned_elements({{INT64_MAX / 4 + 1, 1}}, 4), -1);
  EXPECT_EQ(spanned_elements({{2, INT64_MAX}}, 1), -1);
  EXPECT_EQ(spanned_elements({{2, INT64_MAX / 2}, {2, INT64_MAX / 2}}, 1), INT64_MAX);
  EXPECT_EQ(spanned_elements({{2, INT64_MAX / 2}, {3, INT64_MAX / 2}}, 1), -1);
}

using Axes = std::array<Extent, 4>;

TEST(Extents, NestInAnyOrderAndWithGaps) {
  EXPECT_TRUE(extents_nest(Axes{{{10, 24}, {3, 8}, {8, 1}, {5, 240}}}));
  EXPECT_TRUE(extents_nest(Axes{{{10, 1}, {3, 100}, {8, 10}, {5, 1000}}}));
  EXPECT_TRUE(extents_nest(Axes{{{1, 0}, {1, 0}, {1, 0}, {1, 0}}})) << "a single place";
  EXPECT_TRUE(extents_nest(Axes{{{2, 5}, {1, 0}, {5, 1}, {1, 100}}}));
}

TEST(Extents, DoNotNestWherePlacesCoincide) {
  EXPECT_FALSE(extents_nest(Axes{{{2, 0}, {3, 8}, {8, 1}, {5, 240}}}));
  EXPECT_FALSE(extents_nest(Axes{{{3, 7}, {8, 1}, {1, 0}, {1, 0}}}));
  EXPECT_FALSE(extents_nest(Axes{{{3, 8}, {2, 8}, {8, 1}, {1, 0}}}));
}

TEST(Extents, ReachUpToTheLastByteThatCanBeCounted) {
  constexpr Index most = std::numeric_limits<std::ptrdiff_t>::max() / 4 - 1;
  EXPECT_GE(spanned_elements(Axes{{{2, most}, {9, 0}, {1, 0}, {1, 0}}}, 4), 0);
  EXPECT_LT(spanned_elements(Axes{{{2, most + 1}, {9, 0}, {1, 0}, {1, 0}}}, 4), 0);
  EXPECT_LT(spanned_elements(Axes{{{2, most}, {2, 1}, {1, 0}, {1, 0}}}, 4), 0);
  EXPECT_LT(spanned_elements(Axes{{{3, kHuge}, {kHuge, kHuge}, {1, 0}, {1, 0}}}, 1), 0);
  EXPECT_LT(spanned_elements(Axes{{{3, -1}, {1, 1}, {1, 0}, {1, 0}}}, 1), 0);
  EXPECT_LT(spanned_elements(Axes{{{1, -1}, {1, 1}, {1, 0}, {1, 0}}}, 1), 0);
}

}  // namespace
}  // namespace kvfold::detail
