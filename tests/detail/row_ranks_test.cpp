#include <kvfold/detail/row_ranks.hpp>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include <gtest/gtest.h>

#include "builders.hpp"
#include "flushing_subnormals.hpp"

namespace kvfold::test {
namespace {

constexpr auto kNone = Protection::none;
constexpr auto kRecent = Protection::recent;
constexpr auto kSink = Protection::sink;

/// All rows, best first.
std::vector<RowId> ranked(const std::vector<float>& scores, const std::vector<Protection>& protections) {
  std::vector<RowId> rows(scores.size());
  std::iota(rows.begin(), rows.end(), RowId{0});
  const auto rank = [&](RowId row) {
    const auto t = static_cast<std::size_t>(row);
    return detail::rank_of(scores[t], protections[t], row);
  };
  std::sort(rows.begin(), rows.end(), [&](RowId a, RowId b) { return rank(a) > rank(b); });
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

TEST(Ranking, HasRoomForTheLastRowThatAHeadCanHave) {
  const auto last = static_cast<RowId>(kMaxRows - 1);
  EXPECT_GT(detail::rank_of(-3e38f, kSink, last), detail::rank_of(3e38f, kRecent, last));
  EXPECT_GT(detail::rank_of(-3e38f, kRecent, 0), detail::rank_of(3e38f, kNone, 0));
  EXPECT_GT(detail::rank_of(1.f, kNone, last), detail::rank_of(0.999f, kNone, 0));
  EXPECT_GT(detail::rank_of(1.f, kNone, last - 1), detail::rank_of(1.f, kNone, last));
  EXPECT_GT(detail::rank_of(1.f, kRecent, last), detail::rank_of(1.f, kRecent, last - 1));
  EXPECT_GT(detail::rank_of(1.f, kSink, last - 1), detail::rank_of(1.f, kSink, last));
}

/// Scores that are like attention, or that make one of the digits of ranks the one that matters.
std::vector<float> scores_of(const std::string& kind, Index n) {
  Random random(7);
  std::vector<float> scores = normals(n, random);
  for (std::size_t t = 0; t < scores.size(); ++t) {
    float& s = scores[t];
    if (kind == "attention") s = std::exp(3.f * s - 8.f);
    if (kind == "equal") s = 0.25f;
    if (kind == "ties") s = static_cast<float>(random.below(12));
    if (kind == "close") s = 1.f + 1e-6f * static_cast<float>(random.below(20));
    if (kind == "ascending") s = static_cast<float>(t);
    if (kind == "descending") s = -static_cast<float>(t);
    if (kind == "sampled are best") s += t % 32 == 16 ? 100.f : 0.f;   // an odd sample
    if (kind == "sampled are worst") s -= t % 32 == 16 ? 100.f : 0.f;  // and another one
    if (kind == "any") s *= std::pow(10.f, static_cast<float>(random.below(77)) - 38.f);
  }
  return scores;
}

class LowestOfBest : public testing::TestWithParam<std::tuple<const char*, Index>> {};

TEST_P(LowestOfBest, IsTheRankThatSoManyReach) {
  const auto [kind, n] = GetParam();
  const std::vector<float> scores = scores_of(kind, n);
  for (const Index is_protected : {Index{0}, std::min<Index>(n, 9)}) {
    std::vector<Protection> protections(scores.size(), kNone);
    std::fill_n(protections.begin(), is_protected / 2, kSink);
    std::fill_n(protections.rbegin(), is_protected - is_protected / 2, kRecent);
    const Rows order = ranked(scores, protections);
    std::vector<detail::Rank> scratch(scores.size());
    const detail::RowRanks rank(scores, protections, scratch);
    ASSERT_EQ(rank.rows(), n);
    for (const Index count : {Index{0}, Index{1}, Index{4}, Index{7}, n / 3, n / 2, n - 1, n}) {
      if (count > n) continue;
      const detail::Rank lowest = rank.lowest_of_best(count);
      Rows got, wanted(order.begin(), order.begin() + count);
      for (Index t = 0; t < n; ++t) {
        if (rank[t] >= lowest) got.push_back(static_cast<RowId>(t));
      }
      std::sort(wanted.begin(), wanted.end());
      EXPECT_EQ(got, wanted) << count << " of " << n << ", " << is_protected << " protected";
      Rows visited;
      rank.for_best(lowest, [&](Index t, detail::Rank of_row) {
        EXPECT_EQ(of_row, rank[t]);
        visited.push_back(static_cast<RowId>(t));
      });
      EXPECT_EQ(visited, wanted) << count << " of " << n << ", " << is_protected << " protected";
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Scores, LowestOfBest,
                         testing::Combine(testing::Values("attention", "equal", "ties", "close", "ascending",
                                                          "descending", "sampled are best", "sampled are worst", "any"),
                                          testing::Values(1, 2, 63, 64, 65, 200, 2048, 5000)));

#if defined(__SSE2__)
TEST(Ranking, ThreadsThatFlushSubnormalsKeepAsManyRowsAsTheyAreTold) {
  const FlushingSubnormals mode;
  std::vector<float> scores(600);
  for (std::size_t t = 0; t < scores.size(); ++t) scores[t] = t % 3 == 0 ? 0.f : t % 3 == 1 ? 1e-41f : -1e-41f;
  scores[7] = 1.f;
  scores[8] = -1.f;
  const std::vector<Protection> protections(scores.size(), kNone);
  std::vector<detail::Rank> scratch(scores.size());
  const detail::RowRanks rank(scores, protections, scratch);
  for (const Index count : {1, 2, 300, 599}) {
    Index visited = 0;
    rank.for_best(rank.lowest_of_best(count), [&](Index, detail::Rank) { ++visited; });
    EXPECT_EQ(visited, count);
  }
}
#endif

TEST(Ranking, SumsTheScoresOfRowsThatAreNotProtected) {
  for (const Index n : {1, 5, 64, 200, 1000}) {
    std::vector<float> scores(static_cast<std::size_t>(n));
    std::vector<Protection> protections(scores.size(), kNone);
    double wanted = 0.0;
    for (std::size_t t = 0; t < scores.size(); ++t) {
      scores[t] = 1.f + 0x1p-20f * static_cast<float>(t % 7);  // sums of which have no error in fp64
      if (t % 100 < 3) protections[t] = t % 2 == 0 ? kSink : kRecent;
      if (protections[t] == kNone) wanted += static_cast<double>(scores[t]);
    }
    std::vector<detail::Rank> scratch(scores.size());
    EXPECT_EQ(detail::RowRanks(scores, protections, scratch).sum_of_unprotected(), wanted) << n;
  }
}

}  // namespace
}  // namespace kvfold::test
