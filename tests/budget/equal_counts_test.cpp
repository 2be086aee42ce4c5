// Storage with one count for all heads: which count, and what it costs, against whole sorts and sums in double.
#include <kvfold/budget/adaptive_heads.hpp>
#include <kvfold/budget/equal_counts.hpp>
#include <kvfold/exec/thread_pool.hpp>

#include <algorithm>
#include <numeric>
#include <vector>

#include <gtest/gtest.h>

#include "builders.hpp"
#include "merge_oracle.hpp"

namespace kvfold::test {
namespace {

using Budgets = std::vector<Index>;

/// The share of a head's score that its `count` best rows hold.
double share_of(const ScoreTable& table, Index h, Index count) {
  const auto scores = table.scores(h);
  const double all = std::accumulate(scores.begin(), scores.end(), 0.0);
  if (all == 0.0) return 1.0;
  const auto rows = ranked(scores, table.protections(h));
  double held = 0.0;
  for (Index i = 0; i < count; ++i) held += static_cast<double>(scores[ix(rows[ix(i)])]);
  return held / all;
}

double oracle_cost(const ScoreTable& table, const Budgets& budgets, Index count) {
  double cost = 0.0;
  for (Index h = 0; h < table.heads(); ++h) cost += share_of(table, h, budgets[ix(h)]) - share_of(table, h, count);
  return cost / static_cast<double>(table.heads());
}

template <class X = SerialExecutor>
float cost_of(OwnedScores& scores, const Budgets& budgets, Index count, X&& executor = {}) {
  std::vector<std::byte> memory(1u << 16);
  detail::Arena arena{Workspace(memory)};
  const ScoreTable table = scores.table();
  const auto scratch = detail::EqualCountsScratch::take(arena, table.heads(), static_cast<Index>(scores.score.size()));
  return detail::equal_counts_cost(table, budgets, count, scratch, executor);
}

TEST(EqualCount, OfALayerIsTheMeanRoundedDown) {
  constexpr RowLimits limits{.total = 100, .per_head = 100};
  EXPECT_EQ(detail::equal_count(RowCounts::per_layer, Budgets{3, 4, 4}, limits), 3);
  EXPECT_EQ(detail::equal_count(RowCounts::per_layer, Budgets{1, 1, 4}, limits), 2);
  EXPECT_EQ(detail::equal_count(RowCounts::per_layer, Budgets{7}, limits), 7);
}

TEST(EqualCount, OfAModelDoesNotDependOnWhatALayersScoresAskFor) {
  for (const Budgets& budgets : {Budgets{3, 4, 5}, Budgets{1, 1, 4}, Budgets{12, 1, 2}}) {
    EXPECT_EQ(detail::equal_count(RowCounts::per_model, budgets, {.total = 15, .per_head = 15}), 5);
    EXPECT_EQ(detail::equal_count(RowCounts::per_model, budgets, {.total = 15, .per_head = 4}), 4);
    EXPECT_EQ(detail::equal_count(RowCounts::per_model, budgets, {.total = 2, .per_head = 4}), 1);
  }
}

TEST(EqualCountsCost, IsWhatHeadsThatNeedMoreLoseMinusWhatTheOthersGain) {
  OwnedScores scores;
  scores.add_head({4.f, 3.f, 2.f, 1.f});    // asks for 3: .9
  scores.add_head({10.f, 0.f, 0.f, 10.f});  // asks for 1: .5
  EXPECT_FLOAT_EQ(cost_of(scores, {3, 1}, 2), ((0.9f - 0.7f) + (0.5f - 1.f)) / 2);
  EXPECT_FLOAT_EQ(cost_of(scores, {3, 2}, 2), (0.9f - 0.7f) / 2);
  EXPECT_EQ(cost_of(scores, {2, 2}, 2), 0.f);
}

TEST(EqualCountsCost, CountsProtectedRowsFirstWhateverTheirScore) {
  OwnedScores scores;
  scores.add_head({1.f, 8.f, 4.f, 2.f, 0.f, 1.f}, protections(6, 1, 2));  // in order: 0, 5, 4, 1, 2, 3
  EXPECT_FLOAT_EQ(cost_of(scores, {4}, 3), 8.f / 16.f);
  EXPECT_FLOAT_EQ(cost_of(scores, {4}, 1), 9.f / 16.f);
  EXPECT_FLOAT_EQ(cost_of(scores, {2}, 1), 1.f / 16.f);
  EXPECT_EQ(cost_of(scores, {3}, 2), 0.f) << "the protected row in between has no score";
  EXPECT_FLOAT_EQ(cost_of(scores, {1}, 6), -15.f / 16.f);
}

TEST(EqualCountsCost, OfAHeadWithoutAnyScoreIsNothing) {
  OwnedScores scores;
  scores.add_head({0.f, 0.f, 0.f});
  scores.add_head({1.f, 1.f, 2.f});
  EXPECT_FLOAT_EQ(cost_of(scores, {3, 1}, 2), -0.125f);
}

TEST(EqualCountsCost, AgreesWithWholeSortsForAnyScoresAndBudgets) {
  Random random(12);
  ThreadPool pool(3);
  for (int round = 0; round < 400; ++round) {
    OwnedScores scores;
    Budgets budgets;
    const Index heads = 1 + random.below(5), rows = 1 + random.below(60);
    for (Index h = 0; h < heads; ++h) {
      std::vector<float> score(ix(rows));  // few values, so that there are ties
      for (float& s : score)
        s = round % 2 == 0 ? static_cast<float>(random.below(4)) : static_cast<float>(random.uniform());
      scores.add_head(score, protections(rows, random.below(5), random.below(20)));
      budgets.push_back(1 + random.below(rows));
    }
    const Index count = 1 + random.below(rows);
    const double wanted = oracle_cost(scores.table(), budgets, count);
    const float cost = cost_of(scores, budgets, count);
    EXPECT_NEAR(cost, wanted, 1e-6) << round;
    EXPECT_EQ(cost_of(scores, budgets, count, pool), cost) << "the same bits for every executor";
  }
}

TEST(EqualCountsCost, IsNotBelowZeroWhereBudgetsFollowTheScores) {
  Random random(13);
  for (int round = 0; round < 100; ++round) {
    OwnedScores scores;
    const Index heads = 2 + random.below(4), rows = 40;
    for (Index h = 0; h < heads; ++h) {
      std::vector<float> score(ix(rows));
      const double power = 1.0 + 8.0 * random.uniform();
      for (float& s : score) s = static_cast<float>(std::pow(random.uniform(), power));
      scores.add_head(score);
    }
    Budgets budgets(ix(heads));
    std::vector<std::byte> memory(AdaptiveHeadBudget::workspace_bytes(heads * rows));
    const ScoreTable table = scores.table();
    ASSERT_TRUE(AdaptiveHeadBudget({.rows = 10, .floor_share = 0.2f}).allocate({&table, 1}, budgets, memory).ok());
    EXPECT_GE(cost_of(scores, budgets, 10), -1e-6f);
  }
}

}  // namespace
}  // namespace kvfold::test
