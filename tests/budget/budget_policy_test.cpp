#include <kvfold/budget/budget_policy.hpp>

#include <algorithm>
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
  std::vector<RowId> rows(scores.size());
  detail::fill_row_ids(rows);
  std::sort(rows.begin(), rows.end(), detail::Ranking(scores, protections));
  return rows;
}
using Rows = std::vector<RowId>;

TEST(Ranking, PutsHigherScoresFirstAndTiesToTheLowerIndex) {
  const std::vector<Protection> none(5, kNone);
  EXPECT_EQ(ranked({1, 3, 2, 3, 1}, none), (Rows{1, 3, 2, 0, 4}));
  EXPECT_EQ(ranked({0, 0, 0, 0, 0}, none), (Rows{0, 1, 2, 3, 4}));
  EXPECT_EQ(ranked({-1, -3, 0, -0.f, -2}, none), (Rows{2, 3, 0, 4, 1}));
}

TEST(Ranking, PutsSinksFirstThenTheLatestRecentRowsWhateverTheirScores) {
  EXPECT_EQ(ranked({0, 0, 9, 7, 5, 0}, {kSink, kSink, kNone, kNone, kRecent, kRecent}), (Rows{0, 1, 5, 4, 2, 3}));
  EXPECT_EQ(ranked({1, 2, 1e30f, 3}, {kSink, kSink, kNone, kRecent}), (Rows{0, 1, 3, 2}));
}

TEST(Ranking, SelectsTheSameRowsHoweverTheyAreShuffled) {
  Random random(7);
  std::vector<float> scores(200);
  for (float& s : scores) s = static_cast<float>(random.below(12));  // many ties
  std::vector<Protection> protections(200, kNone);
  std::fill_n(protections.begin(), 4, kSink);
  std::fill_n(protections.end() - 9, 9, kRecent);
  const Rows order = ranked(scores, protections);
  Rows shuffled(200);
  detail::fill_row_ids(shuffled);
  for (const Index count : {0, 1, 4, 7, 13, 14, 100, 199, 200}) {
    for (Index i = 199; i > 0; --i) {
      std::swap(shuffled[static_cast<std::size_t>(i)], shuffled[static_cast<std::size_t>(random.below(i + 1))]);
    }
    detail::select_best(shuffled, count, detail::Ranking(scores, protections));
    Rows got(shuffled.begin(), shuffled.begin() + count), wanted(order.begin(), order.begin() + count);
    std::sort(got.begin(), got.end());
    std::sort(wanted.begin(), wanted.end());
    EXPECT_EQ(got, wanted) << count;
  }
}

}  // namespace
}  // namespace kvfold::test
