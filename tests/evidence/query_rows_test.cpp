#include <kvfold/evidence/query_rows.hpp>

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
constexpr float kInfinity = std::numeric_limits<float>::infinity();

/// Every scorer that takes queries, on the same call.
template <KVCacheView V, class Check>
void for_all_scorers(const V& view, const QueryRows& queries, Check check) {
  check("GlobalLocal", run_score(GlobalLocalScorer{{.window = 8}}, view, queries));
  check("H2o", run_score(H2oScorer{}, view, queries));
  check("SnapKv", run_score(SnapKvScorer{{.window = 8, .recent = 8}}, view, queries));
  check("Tova", run_score(TovaScorer{}, view, queries));
}

// --- How queries are laid out ----------------------------------------------------------------------------------

TEST(QueryRows, MayLieInAnyOrderOfHeadAndToken) {
  const LayerShape shape{2, 3, 8, 4};
  const auto cache = make_cache(shape, 90);
  const OwnedQueries owned = make_queries(shape, 90, 90);
  const QueryRows head_major = owned.view();
  std::vector<float> other(owned.data.size());
  const QueryRows token_major = token_major_queries(other.data(), 6, 8, owned.positions);
  for (Index q = 0; q < 6; ++q) {
    for (Index i = 0; i < 90; ++i) {
      std::copy_n(head_major.row(q, i), 8, other.data() + (token_major.row(q, i) - other.data()));
    }
  }
  const Scored wanted = run_score(GlobalLocalScorer{}, cache, head_major);
  ASSERT_TRUE(wanted.status.ok());
  EXPECT_EQ(run_score(GlobalLocalScorer{}, cache, token_major).score, wanted.score);
}

TEST(QueryRows, WithoutAScaleAreScaledByTheRootOfTheirWidth) {
  const LayerShape shape{1, 2, 16, 4};
  const auto cache = make_cache(shape, 50);
  const OwnedQueries owned = make_queries(shape, 20, 50);
  QueryRows scaled = owned.view();
  scaled.scale = 0.25f;
  EXPECT_EQ(run_score(H2oScorer{}, cache, scaled).score, run_score(H2oScorer{}, cache, owned.view()).score);
  scaled.scale = 0.5f;
  EXPECT_TRUE(close_to(run_score(H2oScorer{}, cache, scaled), h2o_oracle(cache, scaled, {})));
}

TEST(QueryRows, SeeTheRowsUpToTheirOwnPosition) {
  const LayerShape shape{1, 1, 8, 4};
  const auto cache = make_cache(shape, 50);
  OwnedQueries owned = make_queries(shape, 3, 50);
  owned.positions = {-1, 10, 10};  // before every row; amid them; again
  const Scored scored = run_score(H2oScorer{}, cache, owned.view());
  ASSERT_TRUE(scored.status.ok());
  const float sum = std::accumulate(scored.score.begin(), scored.score.end(), 0.f);
  EXPECT_NEAR(sum, 2.f, 1e-5f);  // each of two softmax rows sums to 1
  EXPECT_GT(scored.score[10], 0.f);
  for (std::size_t t = 11; t < 50; ++t) EXPECT_EQ(scored.score[t], 0.f);
}

TEST(QueryRows, WithTheirLogSumExpsAreReadInOnePass) {
  const LayerShape shape{2, 3, 16, 8};
  auto cache = make_cache(shape, 300);
  cache.write_log_mass(1, 17, 2.f);
  const OwnedQueries owned = make_queries(shape, 300, 300);
  QueryRows queries = owned.view();
  const auto lse = log_sum_exps(cache, queries);
  queries.log_sum_exp = lse;
  for_all_scorers(cache, owned.view(),
                  [&](const char*, const Scored& two_passes) { ASSERT_TRUE(two_passes.status.ok()); });
  const GlobalLocalScorer::Options options{.window = 16, .query_stride = 3};
  EXPECT_TRUE(
      close_to(run_score(GlobalLocalScorer{options}, cache, queries), global_local_oracle(cache, queries, options)));
  EXPECT_TRUE(close_to(run_score(H2oScorer{}, cache, queries), h2o_oracle(cache, queries, {})));
  EXPECT_TRUE(close_to(run_score(SnapKvScorer{}, cache, queries), snap_kv_oracle(cache, queries, {})));
  EXPECT_TRUE(close_to(run_score(TovaScorer{}, cache, queries), tova_oracle(cache, queries)));
}

TEST(QueryRows, MayHaveLogitsThatGrowOrFallByMuch) {
  const LayerShape shape{2, 2, 16, 4};
  const OwnedQueries owned = make_queries(shape, 500, 500);
  for (const float step : {-50.f, -5.f, 5.f, 30.f, 50.f}) {
    auto slope = make_cache(shape, 500), spike = make_cache(shape, 500);
    for (Index t = 0; t < 500; ++t) slope.write_log_mass(1, t, step * static_cast<float>(t / 90));
    spike.write_log_mass(1, 321, 4.f * step);
    spike.write_log_mass(1, 322, 4.f * step - 3.f);
    for (const auto* cache : {&slope, &spike}) {
      const auto wanted = h2o_oracle(*cache, owned.view(), {});
      EXPECT_TRUE(close_to(run_score(H2oScorer{}, *cache, owned.view()), wanted, 3e-5)) << step;
    }
  }
}

// --- What is refused -------------------------------------------------------------------------------------------

struct Call {
  RaggedCache<> cache;
  OwnedQueries owned;
  std::vector<float> log_sum_exp;  // right ones
  QueryRows queries;

  void shift_log_sum_exps(float by) {
    for (float& x : log_sum_exp) x += by;
    queries.log_sum_exp = log_sum_exp;
  }
};

struct Refusal {
  const char* name;
  StatusCode code;
  const char* argument;
  std::function<void(Call&)> spoil;
  friend std::ostream& operator<<(std::ostream& out, const Refusal& r) { return out << r.name; }
};

class QueryRowsAreRefused : public testing::TestWithParam<Refusal> {
 protected:
  static Call good_call() {
    const LayerShape shape{2, 2, 8, 4};
    Call call{make_cache(shape, 300), make_queries(shape, 40, 300), {}, {}};
    call.queries = call.owned.view();
    call.log_sum_exp = log_sum_exps(call.cache, call.queries);
    return call;
  }
};

TEST_P(QueryRowsAreRefused, ByEveryScorer) {
  Call call = good_call();
  for_all_scorers(call.cache, call.queries,
                  [](const char* name, const Scored& s) { ASSERT_TRUE(s.status.ok()) << name; });
  GetParam().spoil(call);
  for_all_scorers(call.cache, call.queries, [](const char* name, const Scored& s) {
    EXPECT_TRUE(says(s.status, GetParam().code, GetParam().argument)) << name;
  });
}

constexpr auto kInvalid = StatusCode::invalid_argument;
constexpr auto kMismatch = StatusCode::size_mismatch;
constexpr auto kNotFinite = StatusCode::not_finite;

const Refusal kRefusals[] = {
    {"NullData", kInvalid, "queries", [](Call& c) { c.queries.data = nullptr; }},
    {"NoRows", kInvalid, "queries", [](Call& c) { c.queries.positions = {}; }},
    {"TooFewHeads", kMismatch, "queries", [](Call& c) { c.queries.query_heads = 2; }},
    {"TooManyHeads", kMismatch, "queries", [](Call& c) { c.queries.query_heads = 8; }},
    {"AnotherWidth", kMismatch, "queries", [](Call& c) { c.queries.dim = 16; }},
    {"RowsThatOverlap", kInvalid, "queries", [](Call& c) { c.queries.row_stride = 7; }},
    {"NegativeHeadStride", kInvalid, "queries", [](Call& c) { c.queries.head_stride = -1; }},
    {"ScaleThatIsNoNumber", kInvalid, "queries", [](Call& c) { c.queries.scale = kNaN; }},
    {"InfiniteScale", kInvalid, "queries", [](Call& c) { c.queries.scale = kInfinity; }},
    {"NegativeScale", kInvalid, "queries", [](Call& c) { c.queries.scale = -0.125f; }},
    {"PositionsOutOfOrder", kInvalid, "queries",
     [](Call& c) { std::swap(c.owned.positions[3], c.owned.positions[30]); }},
    {"NaNInTheLastQuery", kNotFinite, "queries", [](Call& c) { c.owned.data.back() = kNaN; }},
    {"InfinityInTheLastQueryOfTheFirstHead", kNotFinite, "queries", [](Call& c) { c.owned.data[39 * 8] = -kInfinity; }},
    {"NaNInAKey", kNotFinite, "keys",
     [](Call& c) {
       c.cache.write_key(1, 299, std::vector<float>{0, 0, 0, kNaN, 0, 0, 0, 0});
     }},
    {"InfinityInAKey", kNotFinite, "keys",
     [](Call& c) {
       c.cache.write_key(0, 129, std::vector<float>{0, 0, 0, -kInfinity, 0, 0, 0, 0});
     }},
    {"NaNInALogMass", kNotFinite, "log_mass", [](Call& c) { c.cache.write_log_mass(1, 200, kNaN); }},
    {"TooFewLogSumExps", kMismatch, "queries",
     [](Call& c) { c.queries.log_sum_exp = std::span<const float>(c.log_sum_exp).first(39); }},
    {"LogSumExpThatIsNoNumber", kNotFinite, "queries", [](Call& c) { c.shift_log_sum_exps(kNaN); }},
    {"LogSumExpsMuchTooSmall", kInvalid, "queries", [](Call& c) { c.shift_log_sum_exps(-20.f); }},
    // A query's weights over all rows sum to 1, so that these show too, though not in every tile of the keys.
    {"LogSumExpsTooSmall", kInvalid, "queries", [](Call& c) { c.shift_log_sum_exps(-0.1f); }},
    {"LogSumExpsTooLarge", kInvalid, "queries", [](Call& c) { c.shift_log_sum_exps(0.1f); }},
    {"LogSumExpsMuchTooLarge", kInvalid, "queries", [](Call& c) { c.shift_log_sum_exps(20.f); }},
};
INSTANTIATE_TEST_SUITE_P(With, QueryRowsAreRefused, testing::ValuesIn(kRefusals), testing::PrintToStringParamName());

TEST(QueryRows, WhoseLogitsOverflowAreRefused) {
  for (const Index rows : {3, 300}) {
    auto cache = make_cache({1, 2, 2, 2}, rows);
    const OwnedQueries owned{{0.f, 0.f, 3e38f, 3e38f}, {rows - 1}, 2, 2};  // the first query head gives logits of 0
    for (const float second : {3e38f, -3e38f}) {                           // infinity, and infinity - infinity
      cache.write_key(0, rows - 2, std::vector<float>{3e38f, second});
      for_all_scorers(cache, owned.view(), [&](const char* name, const Scored& s) {
        EXPECT_TRUE(says(s.status, StatusCode::not_finite, "keys")) << name << ", " << rows << " rows, " << second;
      });
    }
  }
}

TEST(QueryRows, AreRefusedForTheFirstBadHeadWhateverTheExecutor) {
  const LayerShape shape{4, 1, 8, 4};
  auto cache = make_cache(shape, 50);
  const OwnedQueries owned = make_queries(shape, 50, 50);
  cache.write_key(3, 0, std::vector<float>(8, kNaN));
  cache.write_key(2, 0, std::vector<float>(8, kNaN));
  EXPECT_EQ(run_score(H2oScorer{}, cache, owned.view()).status.head(), 2);
}

}  // namespace
}  // namespace kvfold::test
