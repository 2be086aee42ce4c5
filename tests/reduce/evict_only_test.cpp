#include <kvfold/exec/thread_pool.hpp>
#include <kvfold/reduce/evict_only.hpp>

#include <limits>
#include <vector>

#include <gtest/gtest.h>

#include "builders.hpp"
#include "merge_oracle.hpp"

namespace kvfold::test {
namespace {

std::vector<RowId> kept_of(const CompressionPlan& plan, Index h) {
  const auto rows = plan.kept_rows(h);
  return {rows.begin(), rows.end()};
}

std::vector<float> uniform_scores(Index rows, std::uint64_t seed) {
  Random random(seed);
  std::vector<float> scores(ix(rows));
  for (float& s : scores) s = static_cast<float>(random.uniform());
  return scores;
}

TEST(EvictOnly, KeepsExactlyTheTopRowsInAscendingOrder) {
  const auto cache = make_cache({3, 1, 4, 4}, 70);
  for (const Index budget : {1, 2, 35, 69, 70}) {
    SCOPED_TRACE(budget);
    OwnedScores scores;
    for (std::uint64_t h = 0; h < 3; ++h) scores.add_head(uniform_scores(70, h));
    const auto owned = run_reduce(EvictOnly(), cache, scores, {budget, budget, budget});
    ASSERT_TRUE(owned.plan.ok());
    for (Index h = 0; h < 3; ++h) {
      const auto all = scores.table().scores(h);
      std::vector<float> best(all.begin(), all.end());
      std::sort(best.rbegin(), best.rend());
      const float threshold = best[ix(budget - 1)];
      std::vector<RowId> wanted;
      for (RowId t = 0; t < 70; ++t) {
        if (all[ix(t)] >= threshold) wanted.push_back(t);
      }
      EXPECT_EQ(kept_of(owned.plan.value(), h), wanted);
    }
  }
}

TEST(EvictOnly, TiesGoToTheLowerIndex) {
  const auto cache = make_cache({1, 1, 4, 4}, 6);
  OwnedScores scores;
  scores.add_head({1, 2, 1, 2, 1, 2});
  EXPECT_EQ(kept_of(run_reduce(EvictOnly(), cache, scores, {2}).plan.value(), 0), (std::vector<RowId>{1, 3}));
  EXPECT_EQ(kept_of(run_reduce(EvictOnly(), cache, scores, {4}).plan.value(), 0), (std::vector<RowId>{0, 1, 3, 5}));
}

TEST(EvictOnly, ProtectedRowsStayHoweverSmallTheirScore) {
  const auto cache = make_cache({1, 1, 4, 4}, 8);
  OwnedScores scores;
  scores.add_head({0, 0, 9, 8, 7, 6, 0, 0}, protections(8, 2, 2));
  EXPECT_EQ(kept_of(run_reduce(EvictOnly(), cache, scores, {5}).plan.value(), 0), (std::vector<RowId>{0, 1, 2, 6, 7}));
}

TEST(EvictOnly, ATightBudgetGoesToSinksThenToTheLatestRows) {
  const auto cache = make_cache({1, 1, 4, 4}, 8);
  OwnedScores scores;
  scores.add_head({0, 0, 9, 8, 7, 6, 5, 4}, protections(8, 2, 4));
  const auto kept = [&](Index budget) {
    return kept_of(run_reduce(EvictOnly(), cache, scores, {budget}).plan.value(), 0);
  };
  EXPECT_EQ(kept(1), (std::vector<RowId>{0}));
  EXPECT_EQ(kept(2), (std::vector<RowId>{0, 1}));
  EXPECT_EQ(kept(3), (std::vector<RowId>{0, 1, 7}));
  EXPECT_EQ(kept(5), (std::vector<RowId>{0, 1, 5, 6, 7}));
}

TEST(EvictOnly, HeadsHaveBudgetsOfTheirOwn) {
  auto cache = make_cache({3, 1, 4, 4}, 40);
  cache.resize(1, 25);
  OwnedScores scores;
  scores.add_head(uniform_scores(40, 1));
  scores.add_head(uniform_scores(25, 2));
  scores.add_head(uniform_scores(40, 3));
  const std::vector<Index> budgets{3, 25, 39};
  const auto owned = run_reduce(EvictOnly(), cache, scores, budgets);
  const CompressionPlan& plan = owned.plan.value();
  for (Index h = 0; h < 3; ++h) {
    const auto table = scores.table();
    EXPECT_EQ(kept_of(plan, h), split_tiers(table.scores(h), table.protections(h), budgets[ix(h)], 0, 0).kept);
    EXPECT_EQ(plan.source_rows[ix(h)], cache.size(h));
  }
  EXPECT_TRUE(plan.merged.empty());
  EXPECT_FALSE(plan.writes_log_mass);
}

TEST(EvictOnly, TellsTheFateOfEveryRowAndTheShareOfTheScoreItKept) {
  const auto cache = make_cache({2, 1, 4, 4}, 4);
  OwnedScores scores;
  scores.add_head({1, 4, 3, 2});
  scores.add_head({0, 0, 0, 0});  // nothing to lose: counts as 1
  const auto owned = run_reduce(EvictOnly(), cache, scores, {2, 1});
  const CompressionPlan& plan = owned.plan.value();
  using enum RowFate;
  EXPECT_EQ(std::vector(plan.fate.begin(), plan.fate.end()),
            (std::vector{evicted, kept, kept, evicted, kept, evicted, evicted, evicted}));
  EXPECT_EQ(std::vector(plan.row_class.begin(), plan.row_class.end()),
            (std::vector<RowId>{-1, 0, 1, -1, 0, -1, -1, -1}));
  EXPECT_FLOAT_EQ(plan.kept_score_share, (0.7f + 1.f) / 2);
  EXPECT_EQ(plan.merged_score_share, 0.f);
}

TEST(EvictOnly, GivesTheSameBitsForEveryExecutor) {
  const auto cache = make_cache({5, 1, 4, 4}, 200);
  OwnedScores scores;
  for (std::uint64_t h = 0; h < 5; ++h) scores.add_head(uniform_scores(200, h), protections(200, 4, 8));
  const std::vector<Index> budgets{20, 200, 7, 64, 199};
  const auto serial = plan_bits(run_reduce(EvictOnly(), cache, scores, budgets).plan.value());
  for (const Index threads : {1, 2, 4}) {
    const auto pooled = run_reduce(EvictOnly(), cache, scores, budgets, ThreadPool(threads));
    EXPECT_EQ(plan_bits(pooled.plan.value()), serial);
  }
}

TEST(EvictOnly, NamesWhatIsWrong) {
  const auto cache = make_cache({2, 1, 4, 4}, 6);
  OwnedScores good;
  for (int h = 0; h < 2; ++h) good.add_head({1, 2, 3, 4, 5, 6});
  const auto status = [&](OwnedScores scores, const std::vector<Index>& budgets) {
    return run_reduce(EvictOnly(), cache, scores, budgets).plan.status();
  };
  EXPECT_TRUE(status(good, {1, 6}).ok());
  EXPECT_EQ(status(good, {1, 0}).argument(), "budgets");
  EXPECT_EQ(status(good, {1, 0}).head(), 1);
  EXPECT_EQ(status(good, {7, 1}).code(), StatusCode::invalid_argument);
  EXPECT_EQ(status(good, {1}).code(), StatusCode::size_mismatch);
  OwnedScores one_head;
  one_head.add_head({1, 2, 3, 4, 5, 6});
  EXPECT_EQ(status(one_head, {1, 1}).argument(), "table");
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    OwnedScores scores = good;
    scores.score[7] = bad;
    EXPECT_EQ(status(scores, {1, 1}).code(), StatusCode::not_finite);
    EXPECT_EQ(status(scores, {1, 1}).argument(), "scores");
  }
  std::byte little[16];
  SerialExecutor executor;
  const std::vector<Index> budgets{1, 1};
  EXPECT_EQ(EvictOnly().reduce(cache, good.table(), budgets, little, executor).status().code(),
            StatusCode::workspace_too_small);
}

}  // namespace
}  // namespace kvfold::test
