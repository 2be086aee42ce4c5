#include <kvfold/budget/budget_policy.hpp>

#include <algorithm>
#include <functional>
#include <iterator>
#include <vector>

#include <gtest/gtest.h>

#include "builders.hpp"

namespace kvfold::test {
namespace {

constexpr auto kNone = Protection::none;
constexpr auto kRecent = Protection::recent;
constexpr auto kSink = Protection::sink;

/// All rows, best first.
std::vector<RowId> ranked(const std::vector<float>& scores, const std::vector<Protection>& protections) {
  std::vector<detail::Rank> ranks(scores.size());
  detail::rank_rows(scores, protections, ranks);
  std::sort(ranks.begin(), ranks.end(), std::greater<>{});
  std::vector<RowId> rows;
  for (const detail::Rank r : ranks) rows.push_back(detail::row_of(r));
  return rows;
}
using Rows = std::vector<RowId>;

TEST(Ranking, PutsHigherScoresFirstAndTiesToTheLowerIndex) {
  const std::vector<Protection> none(5, kNone);
  EXPECT_EQ(ranked({1, 3, 2, 3, 1}, none), (Rows{1, 3, 2, 0, 4}));
  EXPECT_EQ(ranked({0, 0, 0, 0, 0}, none), (Rows{0, 1, 2, 3, 4}));
  EXPECT_EQ(ranked({-1, -3, 0, -0.f, -2}, none), (Rows{2, 3, 0, 4, 1}));
  EXPECT_EQ(ranked({1e-45f, 0, -1e-45f, 3e38f, -3e38f}, none), (Rows{3, 0, 1, 2, 4}));
}

TEST(Ranking, PutsSinksFirstThenTheLatestRecentRowsWhateverTheirScores) {
  EXPECT_EQ(ranked({0, 0, 9, 7, 5, 0}, {kSink, kSink, kNone, kNone, kRecent, kRecent}), (Rows{0, 1, 5, 4, 2, 3}));
  EXPECT_EQ(ranked({1, 2, 1e30f, 3}, {kSink, kSink, kNone, kRecent}), (Rows{0, 1, 3, 2}));
}

TEST(Ranking, KnowsTheLastRowThatAHeadCanHave) {
  for (const Protection protection : {kNone, kRecent, kSink}) {
    for (const RowId row : {RowId{0}, static_cast<RowId>(kMaxRows - 1)}) {
      EXPECT_EQ(detail::row_of(detail::rank_of(3e38f, protection, row)), row);
      EXPECT_EQ(detail::row_of(detail::rank_of(-3e38f, protection, row)), row);
    }
  }
  const auto last = static_cast<RowId>(kMaxRows - 1);
  EXPECT_GT(detail::rank_of(-3e38f, kSink, last), detail::rank_of(3e38f, kRecent, last));
  EXPECT_GT(detail::rank_of(-3e38f, kRecent, 0), detail::rank_of(3e38f, kNone, 0));
  EXPECT_GT(detail::rank_of(1.f, kNone, last), detail::rank_of(0.999f, kNone, 0));
}

TEST(Ranking, SelectsTheSameRowsHoweverTheyAreShuffled) {
  Random random(7);
  std::vector<float> scores(200);
  for (float& s : scores) s = static_cast<float>(random.below(12));  // many ties
  std::vector<Protection> protections(200, kNone);
  std::fill_n(protections.begin(), 4, kSink);
  std::fill_n(protections.end() - 9, 9, kRecent);
  const Rows order = ranked(scores, protections);
  std::vector<detail::Rank> shuffled(200);
  detail::rank_rows(scores, protections, shuffled);
  for (const Index count : {0, 1, 4, 7, 13, 14, 100, 199, 200}) {
    for (Index i = 199; i > 0; --i) {
      std::swap(shuffled[static_cast<std::size_t>(i)], shuffled[static_cast<std::size_t>(random.below(i + 1))]);
    }
    detail::select_best(shuffled, count);
    Rows got, wanted(order.begin(), order.begin() + count);
    std::transform(shuffled.begin(), shuffled.begin() + count, std::back_inserter(got), detail::row_of);
    std::sort(got.begin(), got.end());
    std::sort(wanted.begin(), wanted.end());
    EXPECT_EQ(got, wanted) << count;
  }
}

}  // namespace
}  // namespace kvfold::test
