// How the rows of a layer are split for few queries, and which views have heads that lie together.
#include <kvfold/detail/attend_parts.hpp>
#include <kvfold/storage/ragged_cache.hpp>
#include <kvfold/view/paged.hpp>
#include <kvfold/view/strided.hpp>

#include <algorithm>
#include <cstddef>
#include <limits>
#include <vector>

#include <gtest/gtest.h>

#include "builders.hpp"

namespace kvfold::test {
namespace {

using detail::AttendParts;
using detail::AttendSplit;

TEST(AttendSplit, GivesLongRowsSixteenTasksOrMoreWhereverTheyLie) {
  for (Index heads = 1; heads < 300; ++heads) {
    for (const bool together : {false, true}) {
      EXPECT_GE((AttendSplit{heads, 100000, together}.tasks()), 16) << heads;
    }
  }
}

TEST(AttendSplit, HasTheSamePartsWhereverRowsLie) {
  for (const Index heads : {1, 8, 9, 40}) {
    for (const Index rows : {1, 512, 513, 5000, 100000}) {
      const AttendSplit apart{heads, rows, false}, together{heads, rows, true};
      EXPECT_EQ(apart.parts(), together.parts());
      EXPECT_EQ(apart.tasks(), heads * apart.parts());
      EXPECT_EQ(together.tasks(), (heads + 7) / 8 * together.parts());
    }
  }
}

TEST(AttendSplit, BeginsEachTaskOnce) {
  for (const bool together : {false, true}) {
    const AttendSplit split{12, 5000, together};
    for (const Index workers : {1, 2, 3, 7, 64, 100000}) {
      std::vector<bool> begun(static_cast<std::size_t>(split.tasks()), false);
      for (Index i = 0; i < split.tasks(); ++i) {
        const Index task = split.place(i, workers);
        ASSERT_TRUE(task >= 0 && task < split.tasks()) << i << " of " << split.tasks() << ", " << workers;
        EXPECT_FALSE(begun[static_cast<std::size_t>(task)]) << task;
        begun[static_cast<std::size_t>(task)] = true;
      }
    }
  }
}

TEST(AttendSplit, GivesWorkersThatTakeTurnsOneTaskAfterTheOther) {
  const AttendSplit split{8, 32768, false};
  for (const Index workers : {1, 2, 3, 5}) {
    for (Index i = workers; i < split.tasks(); ++i) {
      EXPECT_EQ(split.place(i, workers), split.place(i - workers, workers) + 1) << i << " of " << workers;
    }
  }
}

TEST(AttendSplit, HasPartsThatCoverAllRowsAndAreNotShort) {
  for (const Index rows : {1, 2, 511, 512, 513, 1025, 8191, 8193, 100001}) {
    const AttendSplit split{2, rows, false};
    EXPECT_GE(split.parts() * split.rows_per_part(), rows);
    EXPECT_LT((split.parts() - 1) * split.rows_per_part(), rows) << "a part is empty";
    EXPECT_GE(split.rows_per_part(), std::min(rows, AttendSplit::kPartRows / 2));
  }
}

TEST(AttendParts, TakeNoMoreThanTheyNeedAndNothingForWhatIsNoLayer) {
  const auto bytes = [](const LayerShape& shape) {
    detail::Arena arena;
    static_cast<void>(AttendParts::take(arena, shape));
    return arena.required_bytes();
  };
  EXPECT_LE(bytes({8, 4, 128, 128}), 128u * (16 * (128 + 2) * sizeof(float) + 1) + 5 * 64);
  EXPECT_LE(bytes({0, 1, 4, 4}), 64u);
  EXPECT_LE(bytes({-5, 1, 4, 4}), 64u);
  constexpr Index kHostile = std::numeric_limits<Index>::max();  // answered at once, with what nobody has
  EXPECT_EQ(bytes({kHostile, 1, 4, 4}), std::numeric_limits<std::size_t>::max());
  EXPECT_EQ(bytes({8, 1, 4, kHostile}), std::numeric_limits<std::size_t>::max());
}

/// Four rows of three heads, each 8 floats, in a tensor of some strides.
bool lie_together(const Strides& strides, Index rows = 4) {
  const std::vector<float> keys(3 * 64 * 8);
  std::vector<Index> counts(3, rows);
  return detail::heads_lie_together(StridedView<const float>{.layer = {3, 1, 8, 8},
                                                             .keys = keys.data(),
                                                             .key_strides = strides,
                                                             .values = keys.data(),
                                                             .value_strides = strides,
                                                             .rows = counts});
}

TEST(HeadsLieTogether, InTensorsByToken) {
  EXPECT_TRUE(lie_together(Strides::token_major(3, 8)));
  EXPECT_TRUE(lie_together({.head = 10, .token = 40, .dim = 1}));
  EXPECT_FALSE(lie_together(Strides::head_major(64, 8)));
  EXPECT_FALSE(lie_together(Strides::token_major(3, 8), 1)) << "one row is no distance";
  EXPECT_FALSE(lie_together(Strides::transposed(64, 8))) << "no rows of numbers that lie together";
}

TEST(HeadsLieTogether, InPagesOfSuchTensorsButNotInPagesOfHeads) {
  const std::vector<float> keys(4 * 16 * 3 * 8);
  const std::vector<PageId> table{2, 0, 1, 3};
  std::vector<Index> rows(3, 60);
  PagedView<const float> view{};
  view.layer = {3, 1, 8, 8};
  view.page_size = 16;
  view.pages = 4;
  view.keys = view.values = keys.data();
  view.tables = table;
  view.rows = rows;
  view.key_strides = view.value_strides = {.page = 16 * 3 * 8, .head = 8, .token = 3 * 8};
  EXPECT_TRUE(detail::heads_lie_together(view));
  view.key_strides = view.value_strides = {.page = 16 * 3 * 8, .head = 16 * 8, .token = 8};
  EXPECT_FALSE(detail::heads_lie_together(view));
}

TEST(HeadsLieTogether, NotInCachesWithMemoryForEachHeadNorInOneHead) {
  EXPECT_FALSE(detail::heads_lie_together(make_cache({3, 1, 8, 8}, 20)));
  EXPECT_FALSE(detail::heads_lie_together(make_cache({1, 1, 8, 8}, 20)));
}

}  // namespace
}  // namespace kvfold::test
