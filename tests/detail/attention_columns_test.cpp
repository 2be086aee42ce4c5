#include <kvfold/detail/attention_columns.hpp>

#include <cmath>
#include <limits>
#include <vector>

#include <gtest/gtest.h>

namespace kvfold::detail {
namespace {

TEST(LaneCount, IsWhatIsLeftOf16TasksForAHead) {
  EXPECT_EQ(lane_count({1, 1, 64, 64}, 8192), 16);
  EXPECT_EQ(lane_count({3, 3, 64, 64}, 8192), 6);
  EXPECT_EQ(lane_count({8, 4, 64, 64}, 8192), 2);
  EXPECT_EQ(lane_count({15, 1, 64, 64}, 8192), 2);
  EXPECT_EQ(lane_count({16, 1, 64, 64}, 8192), 1);
  EXPECT_EQ(lane_count({40, 1, 64, 64}, 8192), 1);
}

TEST(LaneCount, IsAtMostTheNumberOfBlocks) {
  EXPECT_EQ(lane_count({1, 1, 64, 64}, 1), 1);
  EXPECT_EQ(lane_count({1, 1, 64, 64}, 64), 1);
  EXPECT_EQ(lane_count({1, 1, 64, 64}, 65), 2);
  EXPECT_EQ(lane_count({3, 3, 64, 64}, 32), 2);
}

TEST(LaneCount, IsOneForSizesThatAreNone) {
  constexpr Index huge = std::numeric_limits<Index>::max();
  EXPECT_EQ(lane_count({0, 1, 64, 64}, 100), 1);
  EXPECT_EQ(lane_count({-3, 1, 64, 64}, 100), 1);
  EXPECT_EQ(lane_count({1, -1, 64, 64}, 100), 1);
  EXPECT_EQ(lane_count({1, huge, 64, 64}, huge), 1);
  EXPECT_EQ(lane_count({1, 1, 64, 64}, 0), 1);
}

TEST(LaneSums, AddUpWhatOtherLanesHave) {
  const LayerShape shape{2, 1, 4, 4};
  Arena measuring;
  static_cast<void>(LaneSums::take(measuring, shape, 3, 2, 5));
  std::vector<std::byte> memory(measuring.required_bytes(), std::byte{0xff});
  Arena arena(memory);
  const LaneSums lanes = LaneSums::take(arena, shape, 3, 2, 5);
  ASSERT_FALSE(arena.overflowed());
  for (const Index h : {0, 1}) {
    std::vector<float> first(8, 1.f);  // [2][4]: a head with fewer rows
    EXPECT_EQ(lanes.begin(h, 0, first).data(), first.data());
    for (const Index lane : {1, 2}) {
      for (float& x : lanes.begin(h, lane, first)) x += static_cast<float>(10 * lane);
    }
    lanes.join(h, first);
    EXPECT_EQ(first, std::vector<float>(8, 31.f)) << h;
  }
}

}  // namespace
}  // namespace kvfold::detail
