#include <kvfold/evidence/column_sums.hpp>

#include <functional>
#include <limits>
#include <ostream>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "attention_oracle.hpp"
#include "builders.hpp"

namespace kvfold::test {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

/// Column sums that own their memory: of 2 heads with 2 query heads and 30 rows each.
struct OwnedColumns {
  std::vector<Index> offset{0, 30, 60};
  std::vector<float> global, local, seen;
  ColumnDetail detail;
  Index window = 8;

  explicit OwnedColumns(ColumnDetail of = ColumnDetail::query_head) : seen(60, 1.f), detail(of) {
    Random random(3);
    for (int i = 0; i < (of == ColumnDetail::query_head ? 120 : 60); ++i) {
      global.push_back(static_cast<float>(random.uniform()));
      local.push_back(static_cast<float>(random.uniform()));
    }
  }
  [[nodiscard]] ColumnSums view() const { return {detail, offset, global, local, seen, window}; }
};

class ColumnSumsEvidence : public testing::Test {
 protected:
  RaggedCache<> cache_ = make_cache({2, 2, 8, 4}, 30);
  GlobalLocalScorer by_max_{{.window = 8, .group = GroupReduction::max}};
  GlobalLocalScorer by_mean_{{.window = 8, .group = GroupReduction::mean}};
};

TEST_F(ColumnSumsEvidence, IsJoinedOverTheGroupAsThePolicyAsks) {
  const OwnedColumns columns;
  const auto split = [](const std::vector<float>& all) {
    std::vector<Numbers> rows;
    for (auto at = all.begin(); at != all.end(); at += 30) rows.emplace_back(at, at + 30);
    return rows;
  };
  const OracleColumns wanted{split(columns.global), split(columns.local), std::vector<Numbers>(2, Numbers(30, 1.0))};
  for (const auto& scorer : {by_max_, by_mean_}) {
    EXPECT_TRUE(close_to(run_score(scorer, cache_, columns.view()), global_local_oracle(wanted, 2, scorer.options())));
  }
}

TEST_F(ColumnSumsEvidence, OfTheWholeLayerIsRefusedByPoliciesThatWorkPerHead) {
  std::vector<Index> offset{0, 30};
  const std::vector<float> sums(30, 1.f);
  const ColumnSums layer{ColumnDetail::layer, offset, sums, sums, {}, 8};
  EXPECT_TRUE(says(run_score(by_max_, cache_, layer).status, StatusCode::unsupported, "evidence"));
  EXPECT_TRUE(says(run_score(by_mean_, cache_, layer).status, StatusCode::unsupported, "evidence"));
  EXPECT_TRUE(says(run_score(H2oScorer{}, cache_, layer).status, StatusCode::unsupported, "evidence"));
}

TEST_F(ColumnSumsEvidence, AveragedOverTheGroupIsRefusedWhereQueryHeadsAreNeeded) {
  const OwnedColumns averaged(ColumnDetail::kv_head);
  EXPECT_TRUE(says(run_score(by_max_, cache_, averaged.view()).status, StatusCode::unsupported, "evidence"));
  EXPECT_TRUE(run_score(by_mean_, cache_, averaged.view()).status.ok());
  const auto one_query_head_each = make_cache({2, 1, 8, 4}, 30);
  EXPECT_TRUE(run_score(by_max_, one_query_head_each, averaged.view()).status.ok());
}

TEST_F(ColumnSumsEvidence, WithoutLocalSumsServesGlobalPoliciesOnly) {
  OwnedColumns columns;
  columns.local.clear();
  EXPECT_TRUE(run_score(H2oScorer{}, cache_, columns.view()).status.ok());
  EXPECT_TRUE(says(run_score(by_max_, cache_, columns.view()).status, StatusCode::unsupported, "evidence"));
  EXPECT_TRUE(says(run_score(TovaScorer{}, cache_, columns.view()).status, StatusCode::unsupported, "evidence"));
}

TEST_F(ColumnSumsEvidence, WithoutSeenCountsCannotBeNormalisedByLifetime) {
  OwnedColumns columns;
  columns.seen.clear();
  EXPECT_TRUE(run_score(by_max_, cache_, columns.view()).status.ok());
  const GlobalLocalScorer lifetime({.window = 8, .normalise = GlobalLocalScorer::Normalise::lifetime});
  EXPECT_TRUE(says(run_score(lifetime, cache_, columns.view()).status, StatusCode::unsupported, "evidence"));
}

struct Spoiled {
  const char* name;
  StatusCode code;
  std::function<void(OwnedColumns&)> spoil;
  friend std::ostream& operator<<(std::ostream& out, const Spoiled& r) { return out << r.name; }
};

class ColumnSumsAreRefused : public testing::TestWithParam<Spoiled> {};

TEST_P(ColumnSumsAreRefused, WithAStatusThatNamesTheEvidence) {
  const auto cache = make_cache({2, 2, 8, 4}, 30);
  const GlobalLocalScorer scorer({.window = 8});
  OwnedColumns columns;
  ASSERT_TRUE(run_score(scorer, cache, columns.view()).status.ok());
  GetParam().spoil(columns);
  EXPECT_TRUE(says(run_score(scorer, cache, columns.view()).status, GetParam().code, "evidence"));
}

const Spoiled kSpoiled[] = {
    {"AnotherWindow", StatusCode::unsupported, [](OwnedColumns& c) { c.window = 16; }},
    {"TooFewGlobalSums", StatusCode::size_mismatch, [](OwnedColumns& c) { c.global.pop_back(); }},
    {"NoGlobalSums", StatusCode::size_mismatch, [](OwnedColumns& c) { c.global.clear(); }},
    {"TooManyLocalSums", StatusCode::size_mismatch, [](OwnedColumns& c) { c.local.push_back(0.f); }},
    {"TooFewSeenCounts", StatusCode::size_mismatch, [](OwnedColumns& c) { c.seen.pop_back(); }},
    {"OffsetsOfTooFewHeads", StatusCode::size_mismatch,
     [](OwnedColumns& c) {
       c.offset = {0, 60};
     }},
    {"OffsetsOfOtherHeads", StatusCode::size_mismatch,
     [](OwnedColumns& c) {
       c.offset = {0, 29, 60};
     }},
    {"OffsetsThatDoNotStartAtZero", StatusCode::size_mismatch,
     [](OwnedColumns& c) {
       c.offset = {1, 30, 60};
     }},
    {"NoOffsets", StatusCode::size_mismatch, [](OwnedColumns& c) { c.offset.clear(); }},
    {"NaNInGlobalSums", StatusCode::not_finite, [](OwnedColumns& c) { c.global[119] = kNaN; }},
    {"InfinityInLocalSums", StatusCode::not_finite,
     [](OwnedColumns& c) { c.local[0] = std::numeric_limits<float>::infinity(); }},
    {"NaNInSeenCounts", StatusCode::not_finite, [](OwnedColumns& c) { c.seen[59] = kNaN; }},
};
INSTANTIATE_TEST_SUITE_P(With, ColumnSumsAreRefused, testing::ValuesIn(kSpoiled), testing::PrintToStringParamName());

// --- Softmax rows ----------------------------------------------------------------------------------------------

/// The softmax rows of queries, as an engine has them.
struct OwnedWeights {
  std::vector<float> data;
  AttentionWeights view;

  template <KVCacheView V>
  OwnedWeights(const V& cache, const QueryRows& queries) {
    const Index columns = detail::max_rows(cache) + 3;  // rows may be padded
    view = {nullptr, queries.query_heads, queries.rows(), queries.rows() * columns, columns};
    data.assign(static_cast<std::size_t>(queries.query_heads * view.head_stride), 0.f);
    const AttentionTable table = attention_oracle(cache, queries);
    for (Index q = 0; q < queries.query_heads; ++q) {
      for (Index i = 0; i < queries.rows(); ++i) {
        const Numbers& row = nth(nth(table, q), i);
        std::transform(row.begin(), row.end(), data.begin() + q * view.head_stride + i * columns,
                       [](double x) { return static_cast<float>(x); });
      }
    }
    view.data = data.data();
  }
};

TEST(AttentionWeightsEvidence, GivesTheScoresOfTheQueriesThatMadeIt) {
  const LayerShape shape{2, 3, 8, 4};
  auto cache = make_cache(shape, 70);
  cache.resize(1, 50);
  const OwnedQueries owned = make_queries(shape, 70, 70);
  const OwnedWeights weights(cache, owned.view());
  for (const auto reduction : {GroupReduction::mean, GroupReduction::max}) {
    for (const Index window : {1, 8, 100}) {
      for (const Index stride : {1, 4, 90}) {
        const GlobalLocalScorer scorer({.window = window, .group = reduction, .query_stride = stride});
        const Scored wanted = run_score(scorer, cache, owned.view()), got = run_score(scorer, cache, weights.view);
        ASSERT_TRUE(wanted.status.ok() && got.status.ok());
        EXPECT_TRUE(close_to(got.score, wanted.score)) << "W = " << window << ", s = " << stride;
      }
    }
  }
  const H2oScorer h2o({.recent = 5, .query_stride = 3});
  EXPECT_TRUE(close_to(run_score(h2o, cache, weights.view).score, run_score(h2o, cache, owned.view()).score));
  const SnapKvScorer snap_kv({.window = 16});
  EXPECT_TRUE(close_to(run_score(snap_kv, cache, weights.view).score, run_score(snap_kv, cache, owned.view()).score));
}

TEST(AttentionWeightsEvidence, IsRefusedWhereItDoesNotFitTheView) {
  const LayerShape shape{2, 2, 8, 4};
  const auto cache = make_cache(shape, 40);
  OwnedWeights weights(cache, make_queries(shape, 10, 40).view());
  const GlobalLocalScorer scorer;
  const auto status = [&](auto spoil) {
    AttentionWeights bad = weights.view;
    spoil(bad);
    return run_score(scorer, cache, bad).status;
  };
  EXPECT_TRUE(status([](AttentionWeights&) {}).ok());
  using W = AttentionWeights;
  EXPECT_TRUE(says(status([](W& w) { w.data = nullptr; }), StatusCode::invalid_argument, "weights"));
  EXPECT_TRUE(says(status([](W& w) { w.rows = 0; }), StatusCode::invalid_argument, "weights"));
  EXPECT_TRUE(says(status([](W& w) { w.query_heads = 2; }), StatusCode::size_mismatch, "weights"));
  EXPECT_TRUE(says(status([](W& w) { w.row_stride = 39; }), StatusCode::size_mismatch, "weights"));
  EXPECT_TRUE(says(status([](W& w) { w.head_stride = -1; }), StatusCode::size_mismatch, "weights"));
  for (const float bad : {kNaN, std::numeric_limits<float>::infinity()}) {
    weights.data[0] = bad;
    EXPECT_TRUE(says(status([](W&) {}), StatusCode::not_finite, "weights"));
  }
  weights.data[0] = -1e-9f;
  EXPECT_TRUE(says(status([](W&) {}), StatusCode::invalid_argument, "weights"));
  weights.data[0] = -0.f;
  EXPECT_TRUE(status([](W&) {}).ok());
}

TEST(AttentionWeightsEvidence, IsLookedAtInEveryPlace) {
  constexpr Index kQueries = 11, kRows = 21;  // neither fills groups of rows, nor lanes
  const auto cache = make_cache({1, 1, 8, 4}, kRows);
  OwnedWeights weights(cache, make_queries({1, 1, 8, 4}, kQueries, kRows).view());
  const GlobalLocalScorer scorer({.window = 2});
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (Index i = 0; i < kQueries; ++i) {
    for (Index t = 0; t < kRows; ++t) {
      float& weight = nth(weights.data, i * weights.view.row_stride + t);
      const float before = weight;
      for (const float bad : {kNaN, kInfinity, -kInfinity, -1e-45f, -1.f}) {
        weight = bad;
        const Status status = run_score(scorer, cache, weights.view).status;
        EXPECT_EQ(status.code(), std::isfinite(bad) ? StatusCode::invalid_argument : StatusCode::not_finite);
        EXPECT_EQ(status.row(), i) << bad << " for row " << t;
      }
      for (const float good : {-0.f, 0.f, 1e-45f, before}) {
        weight = good;
        EXPECT_TRUE(run_score(scorer, cache, weights.view).status.ok()) << good;
      }
    }
  }
}

TEST(AttentionWeightsEvidence, OfManyRowsIsAddedUpInPieces) {
  const LayerShape shape{2, 2, 4, 4};
  auto cache = make_cache(shape, 8500);
  cache.resize(1, 4100);  // of the three pieces of a head, this one has four rows in the second and none in the last
  const OwnedQueries owned = make_queries(shape, 21, 8500);
  OwnedWeights weights(cache, owned.view());
  const GlobalLocalScorer scorer({.window = 4});
  const Scored wanted = run_score(scorer, cache, owned.view()), got = run_score(scorer, cache, weights.view);
  ASSERT_TRUE(wanted.status.ok() && got.status.ok());
  EXPECT_TRUE(close_to(got.score, wanted.score));

  const auto weight = [&](Index q, Index i, Index t) -> float& {
    return nth(weights.data, q * weights.view.head_stride + i * weights.view.row_stride + t);
  };
  weight(3, 17, 4200) = kNaN;  // beyond the rows of its head
  EXPECT_TRUE(run_score(scorer, cache, weights.view).status.ok());
  weight(3, 5, 4099) = -1.f;
  weight(1, 20, 8499) = kNaN;
  const Status first = run_score(scorer, cache, weights.view).status;
  EXPECT_TRUE(says(first, StatusCode::not_finite, "weights"));
  EXPECT_EQ(first.head(), 0);
}

TEST(AttentionWeightsEvidence, DoesNotTellHowManyQueriesSawARow) {
  const LayerShape shape{1, 1, 8, 4};
  const auto cache = make_cache(shape, 40);
  const OwnedWeights weights(cache, make_queries(shape, 10, 40).view());
  const GlobalLocalScorer lifetime({.normalise = GlobalLocalScorer::Normalise::lifetime});
  EXPECT_TRUE(says(run_score(lifetime, cache, weights.view).status, StatusCode::unsupported, "evidence"));
}

}  // namespace
}  // namespace kvfold::test
