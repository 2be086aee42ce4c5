#include <kvfold/exec/thread_pool.hpp>
#include <kvfold/score/global_local_scorer.hpp>
#include <kvfold/view/strided.hpp>

#include <array>
#include <limits>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "attention_oracle.hpp"
#include "builders.hpp"

namespace kvfold::test {
namespace {

using Options = GlobalLocalScorer::Options;
using Combine = GlobalLocalScorer::Combine;
using Normalise = GlobalLocalScorer::Normalise;

/// Options with a name for the test's output.
struct Variant {
  const char* name;
  Options options;
};

const std::array<Variant, 16> kVariants{{
    {"default", {}},
    {"group mean", {.group = GroupReduction::mean}},
    {"sum", {.combine = Combine::sum}},
    {"lifetime", {.normalise = Normalise::lifetime}},
    {"sampled lifetime", {.normalise = Normalise::lifetime, .query_stride = 7}},
    {"sampled", {.query_stride = 8}},
    {"light global", {.global_weight = 0.25f}},
    {"no global", {.global_weight = 0.f}},
    {"no span", {.span_weight = 0.f}},
    {"heavy span", {.combine = Combine::sum, .span_weight = 3.f, .span_width = 1}},
    {"wide span", {.span_weight = 1.f, .span_width = 999}},
    {"local average", {.local_pool = {PoolKind::average, 5}}},
    {"local max", {.local_pool = {PoolKind::max, 3}}},
    {"score average", {.group = GroupReduction::mean, .score_pool = {PoolKind::average, 3}}},
    {"score max", {.local_pool = {PoolKind::average, 7}, .score_pool = {PoolKind::max, 5}}},
    {"nothing protected", {.window = 16, .protect = {}}},
}};

// --- Against the oracle ----------------------------------------------------------------------------------------

struct Sizes {
  Index heads, group_size, rows, dim;

  friend std::ostream& operator<<(std::ostream& out, const Sizes& s) {
    return out << 'H' << s.heads << 'G' << s.group_size << 'T' << s.rows << 'D' << s.dim;
  }
};

std::vector<Sizes> all_sizes() {
  std::vector<Sizes> all;
  for (const Index heads : {1, 3}) {
    for (const Index group_size : {1, 2, 7}) {
      for (const Index rows : {1, 5, 40, 300}) {  // 300: several tiles of keys and of queries
        for (const Index dim : {4, 64, 80}) all.push_back({heads, group_size, rows, dim});
      }
    }
  }
  return all;
}

class GlobalLocalScorerSweep : public testing::TestWithParam<Sizes> {};

TEST_P(GlobalLocalScorerSweep, ScoresAsThePlainLoopsDoForEveryWindow) {
  const Sizes s = GetParam();
  const LayerShape shape{s.heads, s.group_size, s.dim, 4};
  const auto cache = make_cache(shape, s.rows);
  const OwnedQueries owned = make_queries(shape, s.rows, s.rows);
  const AttentionTable attention = attention_oracle(cache, owned.view());
  for (const Index window : {Index{1}, Index{8}, Index{32}, s.rows + 10}) {
    SCOPED_TRACE(window);
    const Options options{.window = window};
    const auto columns = columns_oracle(cache, owned.view(), attention, window);
    const Scored scored = run_score(GlobalLocalScorer(options), cache, owned.view());
    EXPECT_TRUE(close_to(scored, global_local_oracle(columns, s.group_size, options)));
  }
}

INSTANTIATE_TEST_SUITE_P(Sizes, GlobalLocalScorerSweep, testing::ValuesIn(all_sizes()),
                         testing::PrintToStringParamName());

TEST(GlobalLocalScorer, ScoresAsThePlainLoopsDoForAllOptions) {
  const LayerShape shape{2, 3, 16, 4};
  auto cache = make_cache(shape, 140);
  cache.resize(1, 37);
  const OwnedQueries owned = make_queries(shape, 140, 140);
  for (const auto& [name, options] : kVariants) {
    SCOPED_TRACE(name);
    const Scored scored = run_score(GlobalLocalScorer(options), cache, owned.view());
    EXPECT_TRUE(close_to(scored, global_local_oracle(cache, owned.view(), options)));
  }
}

TEST(GlobalLocalScorer, TakesQueriesOfTheWindowOnlyOrOfLaterPositions) {
  const LayerShape shape{2, 2, 16, 4};
  const auto cache = make_cache(shape, 140);
  for (const Index rows : {1, 20, 32, 50}) {
    const OwnedQueries owned = make_queries(shape, rows, 160);  // decoding went on: all rows are visible
    EXPECT_TRUE(
        close_to(run_score(GlobalLocalScorer{}, cache, owned.view()), global_local_oracle(cache, owned.view(), {})));
  }
}

// --- Storage ---------------------------------------------------------------------------------------------------

template <class Element>
class GlobalLocalScorerStorage : public testing::Test {};
using Elements = testing::Types<float, Float16, BFloat16>;
TYPED_TEST_SUITE(GlobalLocalScorerStorage, Elements);

TYPED_TEST(GlobalLocalScorerStorage, IsReadWithFp32Sums) {
  const LayerShape shape{2, 2, 64, 4};
  const auto cache = make_cache<TypeParam>(shape, 300);
  const OwnedQueries owned = make_queries(shape, 300, 300);
  EXPECT_TRUE(
      close_to(run_score(GlobalLocalScorer{}, cache, owned.view()), global_local_oracle(cache, owned.view(), {})));
}

TYPED_TEST(GlobalLocalScorerStorage, InAnyLayoutGivesTheSameBits) {
  const LayerShape shape{3, 2, 20, 4};
  const Index T = 150, D = shape.key_dim;
  const auto cache = make_cache<TypeParam>(shape, T);
  const OwnedQueries owned = make_queries(shape, T, T);
  const Scored wanted = run_score(GlobalLocalScorer{}, cache, owned.view());
  ASSERT_TRUE(wanted.status.ok());
  const Strides padded{(T + 3) * (D + 5), D + 5, 1};
  for (const Strides strides :
       {Strides::head_major(T, D), Strides::token_major(3, D), Strides::transposed(T, D), padded}) {
    std::vector<TypeParam> keys(static_cast<std::size_t>(3 * (T + 3) * (D + 5)));
    std::vector<float> row(static_cast<std::size_t>(D));
    for (Index h = 0; h < 3; ++h) {
      for (Index t = 0; t < T; ++t) {
        cache.read_keys(h, t, 1, row);
        for (Index d = 0; d < D; ++d) {
          nth(keys, h * strides.head + t * strides.token + d * strides.dim) = from_float<TypeParam>(nth(row, d));
        }
      }
    }
    std::vector<Index> rows(3, T);
    // Values play no part in the score.
    const StridedView<const TypeParam> view{shape, keys.data(), strides, keys.data(), strides, rows};
    EXPECT_EQ(run_score(GlobalLocalScorer{}, view, owned.view()).score, wanted.score);
  }
}

// --- Properties ------------------------------------------------------------------------------------------------

TEST(GlobalLocalScorer, GivesTheSameBitsForEveryExecutor) {
  const LayerShape shape{5, 3, 16, 4};
  const auto cache = make_cache(shape, 200);
  const OwnedQueries owned = make_queries(shape, 200, 200);
  for (const auto& [name, options] : kVariants) {
    const GlobalLocalScorer scorer(options);
    const Scored serial = run_score(scorer, cache, owned.view());
    ASSERT_TRUE(serial.status.ok()) << name;
    for (Index threads = 1; threads <= 4; ++threads) {
      ThreadPool pool(threads);
      const Scored parallel = run_score(scorer, cache, owned.view(), pool);
      EXPECT_EQ(parallel.score, serial.score) << name << ", " << threads << " threads";
      EXPECT_EQ(parallel.protection, serial.protection);
    }
  }
}

TEST(GlobalLocalScorer, ScoresEveryHeadByItself) {
  const LayerShape shape{3, 2, 8, 4};
  const Index T = 60, D = 8;
  const auto cache = make_cache(shape, T);
  const OwnedQueries owned = make_queries(shape, T, T);
  const Scored scored = run_score(GlobalLocalScorer{}, cache, owned.view());
  const std::array<Index, 3> order{2, 0, 1};
  auto permuted_cache = cache.clone();
  OwnedQueries permuted = owned;
  std::vector<float> key(static_cast<std::size_t>(D));
  for (Index h = 0; h < 3; ++h) {
    for (Index t = 0; t < T; ++t) {
      cache.read_keys(nth(order, h), t, 1, key);
      permuted_cache->write_key(h, t, key);
    }
    const Index block = 2 * T * D;  // the queries of a group
    std::copy_n(owned.data.begin() + nth(order, h) * block, block, permuted.data.begin() + h * block);
  }
  const Scored got = run_score(GlobalLocalScorer{}, permuted_cache.value(), permuted.view());
  for (Index h = 0; h < 3; ++h) {
    const auto at = [&](const Scored& s, Index head) {
      return std::vector<float>(s.score.begin() + head * T, s.score.begin() + (head + 1) * T);
    };
    EXPECT_EQ(at(got, h), at(scored, nth(order, h)));
  }
}

TEST(GlobalLocalScorer, AlignsTheGlobalTermToTheMeanOfTheLocalOneOverEvictableRows) {
  const LayerShape shape{2, 2, 16, 4};
  const auto cache = make_cache(shape, 200);
  const OwnedQueries owned = make_queries(shape, 200, 200);
  const Options options{.combine = Combine::sum, .span_weight = 0.f};
  const Scored scored = run_score(GlobalLocalScorer(options), cache, owned.view());
  const auto columns = columns_oracle(cache, owned.view(), options.window);
  const auto local = over_group(columns.local, 2, options.group);
  const Evictable rows(200, options.protect.sinks, options.protect.recent);
  for (Index h = 0; h < 2; ++h) {
    const Numbers score(scored.score.begin() + h * 200, scored.score.begin() + (h + 1) * 200);
    EXPECT_NEAR(sum_over(score, rows) / sum_over(nth(local, h), rows), 2.0, 1e-4);  // alpha * glo, and loc
  }
}

TEST(GlobalLocalScorer, ProtectsTheFirstAndTheLastRowsByMarksAlone) {
  const LayerShape shape{1, 1, 8, 4};
  const auto cache = make_cache(shape, 20);
  const Scored scored =
      run_score(GlobalLocalScorer({.protect = {.sinks = 3, .recent = 5}}), cache, make_queries(shape, 20, 20).view());
  for (std::size_t t = 0; t < 20; ++t) {
    EXPECT_EQ(scored.protection[t], t < 3 ? Protection::sink : t < 15 ? Protection::none : Protection::recent) << t;
  }
  EXPECT_LT(*std::max_element(scored.score.begin(), scored.score.end()), 20.f * 20.f);
}

// --- By hand ---------------------------------------------------------------------------------------------------

/// Scores one head with 1 query head from column sums that are given.
std::vector<float> score_columns(std::vector<float> global, std::vector<float> local, Options options) {
  const auto rows = count_of(global);
  const auto cache = make_cache({1, 1, 4, 4}, rows);
  const std::vector<Index> offset{0, rows};
  const ColumnSums sums{ColumnDetail::kv_head, offset, global, local, {}, options.window};
  const Scored scored = run_score(GlobalLocalScorer(options), cache, sums);
  EXPECT_TRUE(scored.status.ok()) << scored.status.detail();
  return scored.score;
}
using Scores = std::vector<float>;

TEST(GlobalLocalScorer, TakesTheLargerOfTheAlignedTerms) {
  // mean(loc) = 2, mean(glo) = 4: alpha = 1/2.
  EXPECT_EQ(score_columns({8, 6, 2, 0}, {1, 1, 2, 4}, {.protect = {}, .span_weight = 0.f}), (Scores{4, 3, 2, 4}));
  EXPECT_EQ(score_columns({8, 6, 2, 0}, {1, 1, 2, 4}, {.protect = {}, .combine = Combine::sum, .span_weight = 0.f}),
            (Scores{5, 4, 3, 4}));
}

TEST(GlobalLocalScorer, SpansKeepWhatFollowsAFoundRow) {
  const Scores none(8, 0.f), local{0, 0, 2, 9, 0, 0, 0, 0};
  const auto scores = [&](Index width) {
    return score_columns(none, local, {.protect = {}, .span_weight = 0.5f, .span_width = width});
  };
  EXPECT_EQ(scores(1), (Scores{0, 0, 2, 9, 4.5f, 0, 0, 0}));
  EXPECT_EQ(scores(2), (Scores{0, 0, 2, 9, 4.5f, 4.5f, 0, 0}));
  EXPECT_EQ(scores(3), (Scores{0, 0, 2, 9, 4.5f, 4.5f, 4.5f, 0}));
  EXPECT_EQ(scores(kMaxRows), (Scores{0, 0, 2, 9, 4.5f, 4.5f, 4.5f, 4.5f}));
  EXPECT_EQ(score_columns(none, local, {.protect = {}, .combine = Combine::sum, .span_weight = 0.5f, .span_width = 1}),
            (Scores{0, 0, 2, 10, 4.5f, 0, 0, 0}));
}

TEST(GlobalLocalScorer, SinksAndRecentRowsTakeNoPartInAlignment) {
  const Options options{.protect = {.sinks = 1, .recent = 1}, .span_weight = 0.f};
  EXPECT_EQ(score_columns({1000, 8, 4, 500}, {10, 1, 5, 700}, options), (Scores{500, 4, 5, 700}));
}

TEST(GlobalLocalScorer, SinksAndRecentRowsDoNotSpillIntoPools) {
  const Protect protect{.sinks = 2, .recent = 1};
  const Scores local{100, 50, 3, 0, 3, 80}, none(6, 0.f);
  EXPECT_EQ(score_columns(none, local, {.protect = protect, .span_weight = 0.f, .local_pool = {PoolKind::average, 3}}),
            (Scores{100, 50, 1.5f, 2, 1.5f, 80}));
  EXPECT_EQ(score_columns(none, local, {.protect = protect, .span_weight = 0.f, .score_pool = {PoolKind::max, 3}}),
            (Scores{100, 50, 3, 3, 3, 80}));
  EXPECT_EQ(score_columns(none, local, {.protect = protect, .span_weight = 1.f, .span_width = 5}),
            (Scores{100, 50, 3, 3, 3, 80}));
}

TEST(GlobalLocalScorer, ScoresZeroWhereNothingWasLookedAt) {
  const Scores zeros(20, 0.f);
  for (const auto& [name, options] : kVariants) {
    if (options.normalise == Normalise::lifetime) continue;  // needs to be told how many queries there were
    EXPECT_EQ(score_columns(zeros, zeros, options), zeros) << name;
  }
  const LayerShape shape{1, 1, 8, 4};
  OwnedQueries owned = make_queries(shape, 3, 20);
  owned.positions = {-3, -2, -1};  // before all rows
  EXPECT_EQ(run_score(GlobalLocalScorer({.normalise = Normalise::lifetime}), make_cache(shape, 20), owned.view()).score,
            zeros);
}

TEST(GlobalLocalScorer, LeavesTermsAsTheyAreWhereNothingCanBeAligned) {
  EXPECT_EQ(score_columns({3, 1, 2}, {0, 0, 0}, {.protect = {}}), (Scores{3, 1, 2}));
  EXPECT_EQ(score_columns({0, 0, 0}, {3, 1, 2}, {.protect = {}, .span_weight = 0.f}), (Scores{3, 1, 2}));
  EXPECT_EQ(score_columns({4, 1, 2}, {3, 1, 3}, {.protect = {.sinks = 2, .recent = 2}}), (Scores{4, 1, 3}));
}

TEST(GlobalLocalScorer, AlignsSumsThatAreNextToNothing) {
  EXPECT_TRUE(close_to(score_columns({0, 1e-42f, 0}, {1, 1, 1}, {.protect = {}, .span_weight = 0.f}), Scores{1, 3, 1}));
}

// --- What is refused -------------------------------------------------------------------------------------------

TEST(GlobalLocalScorer, RefusesOptionsThatAreOutOfRange) {
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const auto refused = [](Options options, const char* argument) {
    return says(GlobalLocalScorer(options).validate(), StatusCode::invalid_argument, argument);
  };
  for (const Index window : {Index{0}, Index{-1}, kMaxRows + 1}) {
    EXPECT_TRUE(refused({.window = window}, "window"));
    EXPECT_TRUE(refused({.query_stride = window}, "query_stride"));
    EXPECT_TRUE(refused({.local_pool = {PoolKind::average, window}}, "pool"));
    EXPECT_TRUE(refused({.score_pool = {PoolKind::max, window}}, "pool"));
    EXPECT_TRUE(refused({.span_width = window}, "span_width"));
  }
  for (const Index rows : {Index{-1}, kMaxRows + 1}) {
    EXPECT_TRUE(refused({.protect = {.sinks = rows}}, "sinks"));
    EXPECT_TRUE(refused({.protect = {.recent = rows}}, "recent"));
  }
  for (const float weight : {-0.1f, kNaN, kInfinity}) {
    EXPECT_TRUE(refused({.span_weight = weight}, "span_weight"));
    EXPECT_TRUE(refused({.global_weight = weight}, "global_weight"));
  }
  EXPECT_TRUE(refused({.local_pool = {PoolKind::none, 2}}, "pool"));
  EXPECT_TRUE(refused({.score_pool = {PoolKind::average, 4}}, "pool"));
  for (const auto& [name, options] : kVariants) EXPECT_TRUE(GlobalLocalScorer(options).validate().ok()) << name;
}

/// A call whose workspace and table can be spoiled.
class GlobalLocalScorerCall : public testing::Test {
 protected:
  static constexpr LayerShape kShape{2, 2, 8, 4};
  RaggedCache<> cache_ = make_cache(kShape, 30);
  OwnedQueries owned_ = make_queries(kShape, 30, 30);
  GlobalLocalScorer scorer_;
  std::vector<std::byte> memory_{scorer_.workspace_bytes(cache_, owned_.view(), 1)};
  std::vector<Index> offset_{0, 30, 60};
  std::vector<float> score_ = std::vector<float>(60, -1.f);
  std::vector<Protection> protection_ = std::vector<Protection>(60);

  Status make(std::size_t missing_bytes = 0) {
    SerialExecutor serial;
    const ScoreTable table{offset_, score_, protection_};
    return scorer_.score(cache_, owned_.view(), table, std::span(memory_).first(memory_.size() - missing_bytes),
                         serial);
  }
};

TEST_F(GlobalLocalScorerCall, NeedsTheWorkspaceThatItAsksFor) {
  EXPECT_TRUE(make().ok());
  for (const std::size_t missing : {std::size_t{65}, memory_.size() / 2, memory_.size()}) {
    EXPECT_TRUE(says(make(missing), StatusCode::workspace_too_small, "workspace"));
  }
}

TEST_F(GlobalLocalScorerCall, RefusesATableOfFewerHeads) {
  offset_ = {0, 60};
  EXPECT_TRUE(says(make(), StatusCode::size_mismatch, "table"));
  offset_.clear();
  EXPECT_TRUE(says(make(), StatusCode::size_mismatch, "table"));
}

TEST_F(GlobalLocalScorerCall, RefusesATableOfFewerRows) {
  protection_.resize(30);
  EXPECT_TRUE(says(make(), StatusCode::size_mismatch, "table"));
  score_.resize(30);
  EXPECT_TRUE(says(make(), StatusCode::size_mismatch, "table"));
}

TEST_F(GlobalLocalScorerCall, RefusesATableWhoseHeadsHaveOtherRowsThanTheView) {
  cache_.resize(1, 20);
  offset_ = {0, 20, 50};  // as many in all
  score_.resize(50);
  protection_.resize(50);
  EXPECT_TRUE(says(make(), StatusCode::size_mismatch, "table"));
}

}  // namespace
}  // namespace kvfold::test
