#include <kvfold/detail/page_tables.hpp>

#include <limits>
#include <set>
#include <vector>

#include <gtest/gtest.h>

#include "builders.hpp"

namespace kvfold::detail {
namespace {

PageEntry repeated_in(const std::vector<std::vector<PageId>>& tables) {
  return find_repeated_page([&](auto f) {
    for (std::size_t h = 0; h < tables.size(); ++h) {
      for (std::size_t i = 0; i < tables[h].size(); ++i) {
        f(PageEntry{static_cast<Index>(h), static_cast<Index>(i)}, Index{tables[h][i]});
      }
    }
  });
}

TEST(PagesFor, RoundsUp) {
  EXPECT_EQ(pages_for(0, 16), 0);
  EXPECT_EQ(pages_for(1, 16), 1);
  EXPECT_EQ(pages_for(16, 16), 1);
  EXPECT_EQ(pages_for(17, 16), 2);
  EXPECT_EQ(pages_for(kMaxRows, 1), kMaxRows);
}

TEST(ForPages, CutsARunOfRowsAtTheEndsOfPages) {
  for (const Index page_size : {1, 3, 16}) {
    for (Index t = 0; t < 40; ++t) {
      for (Index n = 0; n < 50; ++n) {
        Index next = t;
        for_pages(t, n, page_size, [&](Index place, Index token, Index done, Index count) {
          ASSERT_EQ(place * page_size + token, next);
          ASSERT_EQ(done, next - t);
          ASSERT_GE(count, 1);
          ASSERT_LE(token + count, page_size);
          ASSERT_TRUE(token + count == page_size || next + count == t + n) << "pieces are as long as can be";
          next += count;
        });
        ASSERT_EQ(next, t + n);
      }
    }
  }
}

TEST(FindRepeatedPage, FindsNoneWhereThereIsNone) {
  EXPECT_EQ(repeated_in({}).head, -1);
  EXPECT_EQ(repeated_in({{}, {}}).head, -1);
  EXPECT_EQ(repeated_in({{5}}).head, -1);
  EXPECT_EQ(repeated_in({{0, 1, 2}, {3, 5, 4}}).head, -1);
  EXPECT_EQ(repeated_in({{0, 1 << 15, 1 << 16, INT32_MAX, INT32_MAX - 1}}).head, -1);
  EXPECT_EQ(repeated_in({{INT32_MAX, 1, 1 + (1 << 15), 0, (1 << 15) - 1}}).head, -1)
      << "the same bits of other windows";
}

TEST(FindRepeatedPage, NamesTheSecondEntry) {
  const auto expect = [](const std::vector<std::vector<PageId>>& tables, Index head, Index place) {
    EXPECT_EQ(repeated_in(tables).head, head);
    EXPECT_EQ(repeated_in(tables).place, place);
  };
  expect({{7, 7}}, 0, 1);
  expect({{7, 1, 2}, {3, 7}}, 1, 1);
  expect({{INT32_MAX, 1, 2}, {3, INT32_MAX}}, 1, 1);
  expect({{40000, 5, 90000, 6}, {7, 90000, 40000}}, 1, 2);
}

TEST(FindRepeatedPage, AgreesWithASetWhereverPagesLie) {
  test::Random random(8);
  int repeats = 0;
  for (int round = 0; round < 300; ++round) {
    const Index span = Index{1} << (4 + random.below(27));
    std::vector<std::vector<PageId>> tables(1 + static_cast<std::size_t>(random.below(4)));
    std::set<PageId> seen;
    bool repeated = false;
    for (auto& table : tables) {
      for (Index i = random.below(60); i > 0; --i) {
        table.push_back(static_cast<PageId>(random.below(span)));
        repeated |= !seen.insert(table.back()).second;
      }
    }
    repeats += repeated ? 1 : 0;
    EXPECT_EQ(repeated_in(tables).head >= 0, repeated) << round;
  }
  EXPECT_GT(repeats, 50);
  EXPECT_LT(repeats, 250);
}

}  // namespace
}  // namespace kvfold::detail
