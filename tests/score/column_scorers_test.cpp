#include <kvfold/exec/thread_pool.hpp>
#include <kvfold/score/column_scorers.hpp>

#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "attention_oracle.hpp"
#include "builders.hpp"

namespace kvfold::test {
namespace {

using Scores = std::vector<float>;

struct Sizes {
  Index heads, group_size, rows, queries;

  friend std::ostream& operator<<(std::ostream& out, const Sizes& s) {
    return out << 'H' << s.heads << 'G' << s.group_size << 'T' << s.rows << 'Q' << s.queries;
  }
};

class BaselineSweep : public testing::TestWithParam<Sizes> {
 protected:
  Sizes s_ = GetParam();
  LayerShape shape_{s_.heads, s_.group_size, 16, 4};
  RaggedCache<> cache_ = make_cache(shape_, s_.rows);
  OwnedQueries owned_ = make_queries(shape_, s_.queries, s_.rows);
};

TEST_P(BaselineSweep, H2oSumsTheAttentionOfAllQueries) {
  for (const Index stride : {1, 5}) {
    const H2oScorer::Options options{.recent = s_.rows / 4, .query_stride = stride};
    EXPECT_TRUE(
        close_to(run_score(H2oScorer(options), cache_, owned_.view()), h2o_oracle(cache_, owned_.view(), options)));
  }
}

TEST_P(BaselineSweep, SnapKvPoolsTheAttentionOfTheWindow) {
  for (const Index window : {1, 8, 400}) {
    for (const Pool pool : {Pool{}, Pool{PoolKind::average, 5}, Pool{PoolKind::max, 7}}) {
      const SnapKvScorer::Options options{.window = window, .recent = 8, .pool = pool};
      EXPECT_TRUE(close_to(run_score(SnapKvScorer(options), cache_, owned_.view()),
                           snap_kv_oracle(cache_, owned_.view(), options)));
    }
  }
}

TEST_P(BaselineSweep, TovaAveragesTheLastQueryOverAllHeads) {
  const Scored scored = run_score(TovaScorer{}, cache_, owned_.view());
  EXPECT_TRUE(close_to(scored, tova_oracle(cache_, owned_.view())));
  for (Index h = 1; h < s_.heads; ++h) {
    EXPECT_TRUE(std::equal(scored.score.begin(), scored.score.begin() + s_.rows, scored.score.begin() + h * s_.rows));
  }
}

TEST_P(BaselineSweep, GivesTheSameBitsForEveryExecutor) {
  const auto check = [&](const auto& scorer) {
    const Scored serial = run_score(scorer, cache_, owned_.view());
    for (Index threads = 1; threads <= 4; ++threads) {
      ThreadPool pool(threads);
      EXPECT_EQ(run_score(scorer, cache_, owned_.view(), pool).score, serial.score) << threads;
    }
  };
  check(H2oScorer{});
  check(SnapKvScorer{});
  check(TovaScorer{});
}

INSTANTIATE_TEST_SUITE_P(Sizes, BaselineSweep,
                         testing::Values(Sizes{1, 1, 1, 1}, Sizes{3, 2, 5, 5}, Sizes{2, 7, 40, 40},
                                         Sizes{3, 1, 300, 50}, Sizes{1, 3, 300, 300}, Sizes{5, 2, 129, 65}),
                         testing::PrintToStringParamName());

// --- What each protects ----------------------------------------------------------------------------------------

Index protected_rows(const Scored& scored) {
  return std::count(scored.protection.begin(), scored.protection.end(), Protection::recent);
}

TEST(Baselines, ProtectRecentRowsByMarksAlone) {
  const LayerShape shape{1, 1, 8, 4};
  const auto cache = make_cache(shape, 50);
  const OwnedQueries owned = make_queries(shape, 50, 50);
  EXPECT_EQ(protected_rows(run_score(H2oScorer(H2oScorer::Options::for_budget(21)), cache, owned.view())), 10);
  EXPECT_EQ(protected_rows(run_score(SnapKvScorer{}, cache, owned.view())), 32);
  EXPECT_EQ(protected_rows(run_score(TovaScorer{}, cache, owned.view())), 0);
  EXPECT_EQ(protected_rows(run_score(H2oScorer({.recent = 1000}), cache, owned.view())), 50);
}

TEST(SnapKv, ProtectsAtMostHalfOfTheBudgetThatItIsMadeFor) {
  EXPECT_EQ(SnapKvScorer::Options{}.for_budget(256).recent, 32);
  EXPECT_EQ(SnapKvScorer::Options{}.for_budget(40).recent, 20);
  EXPECT_EQ(SnapKvScorer::Options{}.for_budget(40).window, 32);
}

TEST(Tova, RefusesHeadsOfUnequalSize) {
  const LayerShape shape{3, 1, 8, 4};
  auto cache = make_cache(shape, 50);
  cache.resize(2, 30);
  const Status status = run_score(TovaScorer{}, cache, make_queries(shape, 5, 50).view()).status;
  EXPECT_TRUE(says(status, StatusCode::unsupported, "view"));
  EXPECT_EQ(status.head(), 2);
}

TEST(Baselines, ScoreHeadsOfUnequalSizeApart) {
  const LayerShape shape{3, 2, 8, 4};
  auto cache = make_cache(shape, 50);
  cache.resize(1, 30);
  const OwnedQueries owned = make_queries(shape, 50, 50);
  EXPECT_TRUE(close_to(run_score(H2oScorer{}, cache, owned.view()), h2o_oracle(cache, owned.view(), {})));
  EXPECT_TRUE(close_to(run_score(SnapKvScorer{}, cache, owned.view()), snap_kv_oracle(cache, owned.view(), {})));
}

// --- Pools -----------------------------------------------------------------------------------------------------

/// SnapKV's score of one head from local sums that are given.
Scores pool(const Scores& local, Pool pool, Index recent = 0) {
  const auto rows = count_of(local);
  const auto cache = make_cache({1, 1, 4, 4}, rows);
  const std::vector<Index> offset{0, rows};
  const ColumnSums sums{ColumnDetail::kv_head, offset, local, local, {}, 32};
  return run_score(SnapKvScorer({.recent = recent, .pool = pool}), cache, sums).score;
}

TEST(Pool, AtTheBorderAveragesOnlyWhatExists) {
  EXPECT_EQ(pool({6, 0, 3, 9}, {PoolKind::average, 3}), (Scores{3, 3, 4, 6}));
  EXPECT_EQ(pool({6, 0, 3, 7}, {PoolKind::average, 99}), (Scores{4, 4, 4, 4}));
  EXPECT_EQ(pool({5}, {PoolKind::average, 5}), (Scores{5}));
}

TEST(Pool, TakesTheLargestNeighbour) {
  EXPECT_EQ(pool({6, 0, 3, 0, 0, 9}, {PoolKind::max, 3}), (Scores{6, 6, 3, 3, 9, 9}));
}

TEST(Pool, OfOneRowOrOfNoKindChangesNothing) {
  EXPECT_EQ(pool({6, 0, 3}, {PoolKind::average, 1}), (Scores{6, 0, 3}));
  EXPECT_EQ(pool({6, 0, 3}, {PoolKind::none, 7}), (Scores{6, 0, 3}));
}

TEST(Pool, LeavesOutProtectedRows) {
  EXPECT_EQ(pool({6, 0, 90, 90}, {PoolKind::average, 3}, 2), (Scores{3, 3, 90, 90}));
}

TEST(Pool, ForgetsALargeNumberThatIsOutOfReach) {
  Random random(5);
  Scores local(20000);
  for (float& x : local) x = static_cast<float>(random.uniform());
  local[100] = 1e6f;  // in a running sum of fp32, what is left of it would be about 0.05
  const Pool kind{PoolKind::average, 13};
  const Scores got = pool(local, kind);
  const Numbers wanted = pooled(Numbers(local.begin(), local.end()), Evictable(20000, 0, 0), kind);
  EXPECT_TRUE(close_to(std::span(got).subspan(107), std::span(wanted).subspan(107), 1e-6));
}

// --- What is refused -------------------------------------------------------------------------------------------

TEST(Baselines, RefuseOptionsThatAreOutOfRange) {
  constexpr auto kInvalid = StatusCode::invalid_argument;
  for (const Index bad : {Index{0}, Index{-1}, kMaxRows + 1}) {
    EXPECT_TRUE(says(H2oScorer({.query_stride = bad}).validate(), kInvalid, "query_stride"));
    EXPECT_TRUE(says(SnapKvScorer({.window = bad}).validate(), kInvalid, "window"));
    EXPECT_TRUE(says(SnapKvScorer({.pool = {PoolKind::max, bad}}).validate(), kInvalid, "pool"));
  }
  EXPECT_TRUE(says(SnapKvScorer({.pool = {PoolKind::average, 4}}).validate(), kInvalid, "pool"));
  for (const Index bad : {Index{-1}, kMaxRows + 1}) {
    EXPECT_TRUE(says(H2oScorer({.recent = bad}).validate(), kInvalid, "recent"));
    EXPECT_TRUE(says(SnapKvScorer({.recent = bad}).validate(), kInvalid, "recent"));
  }
  EXPECT_TRUE(H2oScorer{}.validate().ok());
  EXPECT_TRUE(SnapKvScorer{}.validate().ok());
  EXPECT_TRUE(TovaScorer{}.validate().ok());
}

TEST(Baselines, RefuseTooSmallAWorkspace) {
  const LayerShape shape{2, 2, 8, 4};
  const auto cache = make_cache(shape, 30);
  const OwnedQueries owned = make_queries(shape, 30, 30);
  const auto check = [&](const auto& scorer) {
    Scored scored = run_score(scorer, cache, owned.view());
    SerialExecutor serial;
    std::vector<std::byte> memory(scorer.workspace_bytes(cache, owned.view(), 1) - 65);
    EXPECT_TRUE(says(scorer.score(cache, owned.view(), scored.table(), memory, serial), StatusCode::workspace_too_small,
                     "workspace"));
  };
  check(H2oScorer{});
  check(SnapKvScorer{});
  check(TovaScorer{});
}

}  // namespace
}  // namespace kvfold::test
