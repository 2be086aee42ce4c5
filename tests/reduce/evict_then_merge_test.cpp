#include <kvfold/apply.hpp>
#include <kvfold/exec/thread_pool.hpp>
#include <kvfold/reduce/evict_only.hpp>
#include <kvfold/reduce/evict_then_merge.hpp>

#include <cmath>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include <gtest/gtest.h>

#include "attend_oracle.hpp"
#include "builders.hpp"
#include "merge_oracle.hpp"

namespace kvfold::test {
namespace {

using Reducer = EvictThenMerge<>;
using Options = Reducer::Options;
using KeySpace = ZeroClassBatcher::KeySpace;

// --- A layer with heads of unequal size, scores with zeros among them, and log masses here and there -------------

struct Layer {
  RaggedCache<> cache;
  OwnedScores scores;
  std::vector<Index> budgets;
};

Layer make_layer(LayerShape shape, const std::vector<Index>& rows, const std::vector<Index>& budgets, Rope rope = {},
                 Index sinks = 3, Index recent = 5) {
  Layer layer{make_cache(shape, *std::max_element(rows.begin(), rows.end()), 21, rope), {}, budgets};
  Random random(22);
  for (Index h = 0; h < shape.kv_heads; ++h) {
    layer.cache.resize(h, rows[ix(h)]);
    std::vector<float> scores(ix(rows[ix(h)]));
    for (Index t = 0; t < rows[ix(h)]; ++t) {
      scores[ix(t)] = random.below(8) == 0 ? 0.f : static_cast<float>(random.uniform());
      if (random.below(4) == 0) layer.cache.write_log_mass(h, t, static_cast<float>(random.uniform()));
    }
    layer.scores.add_head(scores, protections(rows[ix(h)], sinks, recent));
  }
  return layer;
}

Layer ragged_layer(Rope rope = {}) { return make_layer({3, 2, 12, 7}, {48, 20, 60}, {12, 4, 30}, rope); }

OwnedPlan run(const Options& options, Layer& layer) {
  return run_reduce(Reducer(options), layer.cache, layer.scores, layer.budgets);
}

/// The largest difference between fp32 and double rows of entries about 1.
double difference(std::span<const float> got, const Doubles& wanted) {
  double most = 0.0;
  for (std::size_t d = 0; d < wanted.size(); ++d)
    most = std::max(most, std::abs(static_cast<double>(got[d]) - wanted[d]));
  return most;
}

/// Classes are the oracle's, except where two similarities are closer than fp32 can tell.
void expect_oracle_classes(const OraclePlan& oracle, std::span<const RowFate> fate, std::span<const RowId> row_class,
                           double tau) {
  const auto similarity_of = [&](std::size_t j, RowId row) {
    if (fate[ix(row)] != RowFate::merged) return tau;
    const RowId centre = oracle.tiers.kept[ix(row_class[ix(row)])];
    const auto c = std::find(oracle.centres.begin(), oracle.centres.end(), centre) - oracle.centres.begin();
    return oracle.similarity[j].at(ix(c));
  };
  for (std::size_t j = 0; j < oracle.tiers.candidates.size(); ++j) {
    const RowId row = oracle.tiers.candidates[j];
    if (fate[ix(row)] == oracle.fate[ix(row)] && row_class[ix(row)] == oracle.row_class[ix(row)]) continue;
    const double best = std::max(tau, *std::max_element(oracle.similarity[j].begin(), oracle.similarity[j].end()));
    EXPECT_NEAR(similarity_of(j, row), best, 3e-6) << "row " << row;
  }
  for (std::size_t t = 0; t < oracle.fate.size(); ++t) {
    const auto& candidates = oracle.tiers.candidates;
    if (std::binary_search(candidates.begin(), candidates.end(), static_cast<RowId>(t))) continue;
    EXPECT_EQ(fate[t], oracle.fate[t]) << "row " << t;
    EXPECT_EQ(row_class[t], oracle.row_class[t]) << "row " << t;
  }
}

void expect_oracle_plan(Layer& layer, const Options& options, const CompressionPlan& plan) {
  const ScoreTable table = layer.scores.table();
  const LayerShape shape = layer.cache.shape();
  EXPECT_EQ(plan.writes_log_mass, options.mass_mode != MassMode::none);
  EXPECT_EQ(plan.merged_keys.empty(), options.key_mode == KeyMode::centre || plan.merged.empty());
  for (Index h = 0; h < shape.kv_heads; ++h) {
    SCOPED_TRACE(testing::Message() << "head " << h);
    const OracleHead head = read_head(layer.cache, h);
    const auto oracle = plan_head(head, table.scores(h), table.protections(h), layer.budgets[ix(h)], options);
    const auto kept = plan.kept_rows(h);
    ASSERT_EQ(std::vector<RowId>(kept.begin(), kept.end()), oracle.tiers.kept);
    expect_oracle_classes(oracle, plan.fates(h), plan.row_classes(h), static_cast<double>(options.assigner.tau));
    const auto wanted = merge_rows(head, table.scores(h), kept, plan.fates(h), plan.row_classes(h), options.key_mode,
                                   options.mass_mode);
    const auto merged = plan.merged_rows(h);
    ASSERT_EQ(merged.size(), wanted.size());
    for (std::size_t m = 0; m < merged.size(); ++m) {
      EXPECT_EQ(merged[m].slot, wanted[m].slot);
      EXPECT_EQ(merged[m].absorbed, wanted[m].absorbed);
      EXPECT_NEAR(static_cast<double>(merged[m].log_mass), wanted[m].log_mass, 2e-6);
      const std::size_t at = ix(plan.merged_offset[ix(h)]) + m;
      EXPECT_LT(difference(plan.merged_values.subspan(at * ix(shape.value_dim)), wanted[m].value), 4e-6);
      if (plan.merged_keys.empty()) continue;
      EXPECT_LT(difference(plan.merged_keys.subspan(at * ix(shape.key_dim)), wanted[m].key), 8e-6);
    }
  }
}

// --- Against the oracle ----------------------------------------------------------------------------------------

constexpr float kFrequencies[] = {1.f, 0.3f, 0.05f, 0.002f};

class EvictThenMergeSweep : public testing::TestWithParam<std::tuple<KeyMode, MassMode>> {};

TEST_P(EvictThenMergeSweep, PlansAsThePlainLoopsDoForEveryOption) {
  Options options;
  std::tie(options.key_mode, options.mass_mode) = GetParam();
  for (const Rope& rope : {Rope{.kind = RopeKind::half_split}, Rope{.kind = RopeKind::adjacent, .rotary_dim = 8},
                           Rope{.kind = RopeKind::half_split, .rotary_dim = 8, .inv_freq = kFrequencies},
                           Rope{.kind = RopeKind::pre_rope}}) {
    Layer layer = ragged_layer(rope);
    for (const float gamma : {0.f, 0.5f, 1.f, 4.f}) {
      for (const float mass_share : {0.f, 0.5f, 0.8f, 0.95f}) {
        for (const int absorb : {0, 1, 2, 3}) {
          options.gamma = gamma;
          options.candidate_mass_share = mass_share;
          options.sinks_absorb = (absorb & 1) != 0;
          options.recent_absorb = (absorb & 2) != 0;
          options.assigner.key_space = absorb == 3 ? KeySpace::unrotated : KeySpace::stored;
          SCOPED_TRACE(testing::Message() << "gamma " << gamma << ", share " << mass_share << ", absorb " << absorb);
          const auto owned = run(options, layer);
          ASSERT_TRUE(owned.plan.ok());
          expect_oracle_plan(layer, options, owned.plan.value());
          if (HasFailure()) return;
        }
      }
    }
  }
}

using Modes = std::tuple<KeyMode, MassMode>;

std::string mode_name(const testing::TestParamInfo<Modes>& modes) {
  const char* keys[] = {"CentreKey", "DirectionKey", "RotatedKey"};
  const char* masses[] = {"NoMass", "LogCount", "ScoreRatio"};
  return std::string(keys[static_cast<int>(std::get<0>(modes.param))]) +
         masses[static_cast<int>(std::get<1>(modes.param))];
}

INSTANTIATE_TEST_SUITE_P(Modes, EvictThenMergeSweep,
                         testing::Combine(testing::Values(KeyMode::centre, KeyMode::direction, KeyMode::rotated),
                                          testing::Values(MassMode::none, MassMode::log_count, MassMode::score_ratio)),
                         mode_name);

TEST(EvictThenMerge, PlansAsThePlainLoopsDoAcrossTheTiles) {
  for (const Index budget : {63, 129, 200}) {
    Layer layer = make_layer({2, 1, 16, 24}, {420, 300}, {budget, budget}, {.kind = RopeKind::adjacent});
    const Options options{.gamma = 1.2f, .key_mode = KeyMode::rotated};
    const auto owned = run(options, layer);
    ASSERT_TRUE(owned.plan.ok());
    expect_oracle_plan(layer, options, owned.plan.value());
  }
}

TEST(EvictThenMerge, GivesTheSameBitsForEveryExecutor) {
  Layer layer = make_layer({5, 1, 16, 8}, {300, 64, 129, 7, 200}, {100, 30, 70, 3, 64});
  const Reducer reducer(Options{.gamma = 2.f, .key_mode = KeyMode::direction});
  const auto serial = plan_bits(run_reduce(reducer, layer.cache, layer.scores, layer.budgets).plan.value());
  for (const Index threads : {1, 2, 3, 4}) {
    const auto pooled = run_reduce(reducer, layer.cache, layer.scores, layer.budgets, ThreadPool(threads));
    EXPECT_EQ(plan_bits(pooled.plan.value()), serial) << threads;
  }
}

// --- Tiers -----------------------------------------------------------------------------------------------------

TEST(EvictThenMerge, EveryRowIsKeptMergedOrEvictedAndTheTablesAgree) {
  for (const float gamma : {0.5f, 1.f, 4.f}) {
    Layer layer = ragged_layer();
    const auto owned = run({.gamma = gamma, .assigner = {.tau = 0.5f}}, layer);
    const CompressionPlan& plan = owned.plan.value();
    for (Index h = 0; h < 3; ++h) {
      const auto kept = plan.kept_rows(h);
      const auto fate = plan.fates(h);
      const auto row_class = plan.row_classes(h);
      ASSERT_EQ(fate.size(), ix(layer.cache.size(h)));
      std::vector<RowId> absorbed(kept.size(), 0);
      std::size_t kept_rows = 0;
      for (std::size_t t = 0; t < fate.size(); ++t) {
        switch (fate[t]) {
          case RowFate::evicted: EXPECT_EQ(row_class[t], -1); break;
          case RowFate::kept:
            EXPECT_EQ(kept[ix(row_class[t])], static_cast<RowId>(t));
            ++kept_rows;
            break;
          case RowFate::merged: ++absorbed[ix(row_class[t])]; break;
        }
      }
      EXPECT_EQ(kept_rows, kept.size());
      EXPECT_EQ(kept_rows, ix(layer.budgets[ix(h)]));
      for (const MergedRow& row : plan.merged_rows(h)) {
        EXPECT_GT(row.absorbed, 0);
        EXPECT_EQ(row.absorbed, absorbed[ix(row.slot)]);
        absorbed[ix(row.slot)] = 0;
      }
      EXPECT_EQ(absorbed, std::vector<RowId>(kept.size(), 0)) << "a class without a merged row";
    }
  }
}

TEST(EvictThenMerge, WithoutCandidatesIsEvictOnly) {
  Layer layer = ragged_layer();
  const auto owned = run({.gamma = 0.f}, layer);
  const auto reference = run_reduce(EvictOnly(), layer.cache, layer.scores, layer.budgets);
  CompressionPlan merging = owned.plan.value();
  merging.writes_log_mass = false;  // of no row
  EXPECT_EQ(plan_bits(merging), plan_bits(reference.plan.value()));
}

TEST(EvictThenMerge, ABudgetOfAllRowsKeepsAllAndMergesNone) {
  Layer layer = ragged_layer();
  layer.budgets = {48, 20, 60};
  const auto owned = run({.gamma = 4.f, .sinks_absorb = true}, layer);
  const CompressionPlan& plan = owned.plan.value();
  EXPECT_TRUE(plan.merged.empty());
  EXPECT_TRUE(std::all_of(plan.fate.begin(), plan.fate.end(), [](RowFate f) { return f == RowFate::kept; }));
  EXPECT_EQ(plan.kept_score_share, 1.f);
  EXPECT_EQ(plan.merged_score_share, 0.f);
}

TEST(EvictThenMerge, ABudgetOfOneRowMayAbsorbAllOthers) {
  auto cache = make_cache({1, 1, 4, 4}, 9);
  for (Index t = 0; t < 9; ++t) {
    cache.write_key(0, t, std::vector<float>{1, 2, 3, 4});
    cache.write_value(0, t, std::vector<float>{static_cast<float>(t), 8, 8, 8});
  }
  OwnedScores scores;
  scores.add_head({1, 1, 1, 1, 2, 1, 1, 1, 1});
  const auto owned = run_reduce(Reducer({.gamma = 100.f}), cache, scores, {1});
  const CompressionPlan& plan = owned.plan.value();
  ASSERT_EQ(plan.merged.size(), 1u);
  EXPECT_EQ(plan.kept[0], 4);
  EXPECT_EQ(plan.merged[0].absorbed, 8);
  EXPECT_FLOAT_EQ(plan.merged[0].log_mass, std::log(9.f));
  EXPECT_FLOAT_EQ(plan.merged_values[0], 4.f);
}

TEST(EvictThenMerge, CandidatesAreTheNextBestGammaTimesB) {
  auto cache = make_cache({1, 1, 2, 2}, 8);
  for (Index t = 0; t < 8; ++t) {
    cache.write_key(0, t, std::vector<float>{1, 1});
    cache.write_value(0, t, std::vector<float>{1, 1});
  }
  OwnedScores scores;
  scores.add_head({1, 2, 3, 4, 5, 6, 7, 8});
  const auto fates = [&](float gamma) {
    const auto owned = run_reduce(Reducer({.gamma = gamma}), cache, scores, {3});
    return std::vector(owned.plan->fate.begin(), owned.plan->fate.end());
  };
  using enum RowFate;
  EXPECT_EQ(fates(0.5f), (std::vector{evicted, evicted, evicted, evicted, merged, kept, kept, kept}));
  EXPECT_EQ(fates(1.f), (std::vector{evicted, evicted, merged, merged, merged, kept, kept, kept}));
}

TEST(EvictThenMerge, AHeadWhoseScoreIsConcentratedMergesFewerRows) {
  auto cache = make_cache({2, 1, 8, 8}, 40);
  OwnedScores scores;
  std::vector<float> peaked(40, 0.01f), flat(40, 1.f);
  peaked[3] = peaked[9] = 100.f;
  scores.add_head(peaked);
  scores.add_head(flat);
  const auto owned = run_reduce(Reducer({.gamma = 1.f, .candidate_mass_share = 0.5f, .assigner = {.tau = 0.f}}), cache,
                                scores, {10, 10});
  EXPECT_TRUE(owned.plan->merged_rows(0).empty());
  EXPECT_FALSE(owned.plan->merged_rows(1).empty());
}

TEST(EvictThenMerge, SinksAndRecentRowsAbsorbOnlyWhereTheyMay) {
  auto cache = make_cache({1, 1, 2, 3}, 6);
  const std::vector<float> sink_like{1, 0, 0}, recent_like{0, 1, 0}, other{0, 0, 1};
  const std::vector<float>* values[] = {&sink_like, &other, &sink_like, &recent_like, &other, &recent_like};
  for (Index t = 0; t < 6; ++t) {
    cache.write_key(0, t, std::vector<float>{1, 1});
    cache.write_value(0, t, *values[t]);
  }
  OwnedScores scores;
  scores.add_head({1, 9, 2, 2, 2, 1}, protections(6, 1, 1));
  const auto fates = [&](bool sinks, bool recent) {
    const Reducer reducer({.sinks_absorb = sinks, .recent_absorb = recent});
    const auto owned = run_reduce(reducer, cache, scores, {3});
    return std::vector(owned.plan->fate.begin(), owned.plan->fate.end());
  };
  using enum RowFate;
  EXPECT_EQ(fates(false, false), (std::vector{kept, kept, evicted, evicted, merged, kept}));
  EXPECT_EQ(fates(true, false), (std::vector{kept, kept, merged, evicted, merged, kept}));
  EXPECT_EQ(fates(false, true), (std::vector{kept, kept, evicted, merged, merged, kept}));
  EXPECT_EQ(fates(true, true), (std::vector{kept, kept, merged, merged, merged, kept}));
}

TEST(EvictThenMerge, SharesOfTheScoreAddUp) {
  auto cache = make_cache({1, 1, 2, 2}, 4);
  const std::vector<std::vector<float>> keys{{1, 0}, {0, 1}, {1, 0}, {1, 0}};
  for (Index t = 0; t < 4; ++t) cache.write_key(0, t, keys[ix(t)]), cache.write_value(0, t, keys[ix(t)]);
  OwnedScores scores;
  scores.add_head({4, 3, 2, 1});
  const auto owned = run_reduce(Reducer({.gamma = 0.5f}), cache, scores, {2});
  EXPECT_FLOAT_EQ(owned.plan->kept_score_share, 0.7f);
  EXPECT_FLOAT_EQ(owned.plan->merged_score_share, 0.2f);
}

TEST(EvictThenMerge, PermutingHeadsPermutesThePlan) {
  Layer layer = ragged_layer();
  const std::vector<Index> order{2, 0, 1};
  Layer permuted{make_cache({3, 2, 12, 7}, 60), {}, {}};
  const ScoreTable table = layer.scores.table();
  for (Index h = 0; h < 3; ++h) {
    const Index from = order[ix(h)], rows = layer.cache.size(from);
    permuted.cache.resize(h, rows);
    for (Index t = 0; t < rows; ++t) {
      permuted.cache.write_key(h, t, {layer.cache.key_rows(from, t, 1), 12});
      permuted.cache.write_value(h, t, {layer.cache.value_rows(from, t, 1), 7});
      permuted.cache.write_log_mass(h, t, layer.cache.log_mass(from, t));
    }
    const auto scores = table.scores(from);
    const auto marks = table.protections(from);
    permuted.scores.add_head({scores.begin(), scores.end()}, {marks.begin(), marks.end()});
    permuted.budgets.push_back(layer.budgets[ix(from)]);
  }
  const Options options{.gamma = 2.f, .key_mode = KeyMode::direction};
  const auto original = run(options, layer), moved = run(options, permuted);
  const CompressionPlan &a = original.plan.value(), &b = moved.plan.value();
  for (Index h = 0; h < 3; ++h) {
    const Index from = order[ix(h)];
    EXPECT_TRUE(std::ranges::equal(a.kept_rows(from), b.kept_rows(h)));
    EXPECT_TRUE(std::ranges::equal(a.fates(from), b.fates(h)));
    EXPECT_TRUE(std::ranges::equal(a.row_classes(from), b.row_classes(h)));
    const auto rows = a.merged_rows(from).size();
    ASSERT_EQ(rows, b.merged_rows(h).size());
    const auto block = [&](std::span<const float> all, const CompressionPlan& plan, Index head, Index width) {
      return all.subspan(ix(plan.merged_offset[ix(head)] * width), rows * ix(width));
    };
    EXPECT_TRUE(std::ranges::equal(block(a.merged_values, a, from, 7), block(b.merged_values, b, h, 7)));
    EXPECT_TRUE(std::ranges::equal(block(a.merged_keys, a, from, 12), block(b.merged_keys, b, h, 12)));
  }
}

// --- Merged rows -----------------------------------------------------------------------------------------------

TEST(EvictThenMerge, ScoresThatAreAllZeroWeighEqually) {
  for (const MassMode mass : {MassMode::log_count, MassMode::score_ratio}) {
    auto cache = make_cache({1, 1, 2, 2}, 3);
    for (Index t = 0; t < 3; ++t) {
      cache.write_key(0, t, std::vector<float>{3, 4});
      cache.write_value(0, t, std::vector<float>{static_cast<float>(3 * t + 3), 6});
    }
    OwnedScores scores;
    scores.add_head({0, 0, 0});
    const auto owned = run_reduce(Reducer({.gamma = 2.f, .mass_mode = mass}), cache, scores, {1});
    ASSERT_EQ(owned.plan->merged.size(), 1u);
    EXPECT_FLOAT_EQ(owned.plan->merged_values[0], 6.f);
    EXPECT_FLOAT_EQ(owned.plan->merged_values[1], 6.f);
    EXPECT_FLOAT_EQ(owned.plan->merged[0].log_mass, std::log(3.f));
  }
}

TEST(EvictThenMerge, ADirectionKeyHasTheCentresLength) {
  auto cache = make_cache({1, 1, 2, 1}, 2);
  cache.write_key(0, 0, std::vector<float>{10, 0});
  cache.write_key(0, 1, std::vector<float>{1, 1});
  for (Index t = 0; t < 2; ++t) cache.write_value(0, t, std::vector<float>{1});
  OwnedScores scores;
  scores.add_head({2, 1});
  const auto owned = run_reduce(Reducer({.key_mode = KeyMode::direction}), cache, scores, {1});
  ASSERT_EQ(owned.plan->merged_keys.size(), 2u);
  const float x = 2.f + std::sqrt(0.5f), y = std::sqrt(0.5f);
  EXPECT_FLOAT_EQ(owned.plan->merged_keys[0], 10.f * x / std::hypot(x, y));
  EXPECT_FLOAT_EQ(owned.plan->merged_keys[1], 10.f * y / std::hypot(x, y));
}

TEST(EvictThenMerge, RotatedKeysOfOneContentMergeIntoTheCentresKey) {
  const Rope rope{.kind = RopeKind::half_split};
  auto cache = make_cache({1, 1, 8, 4}, 30, 1, rope);
  Random random(3);
  const auto content = normals(8, random);
  for (const Index t : {2, 25}) {
    const Doubles key = rotated(Doubles(content.begin(), content.end()), rope, static_cast<double>(t));
    cache.write_key(0, t, std::vector<float>(key.begin(), key.end()));
    cache.write_value(0, t, std::vector<float>{1, 2, 3, 4});
  }
  std::vector<float> scores(30, 0.f);
  scores[25] = 2.f;
  scores[2] = 1.f;
  OwnedScores table;
  table.add_head(scores);
  const Options options{.key_mode = KeyMode::rotated, .assigner = {.tau = 0.99f, .key_space = KeySpace::unrotated}};
  const auto owned = run_reduce(Reducer(options), cache, table, {1});
  ASSERT_EQ(owned.plan->merged.size(), 1u);
  for (std::size_t d = 0; d < 8; ++d) EXPECT_NEAR(owned.plan->merged_keys[d], cache.key_rows(0, 25, 1)[d], 2e-6);
}

TEST(EvictThenMerge, LogCountMassesStandForEveryRowThatLivesOn) {
  for (const float gamma : {0.5f, 1.f, 4.f}) {
    Layer layer = ragged_layer();
    for (Index h = 0; h < 3; ++h) {
      for (Index t = 0; t < layer.cache.size(h); ++t) layer.cache.write_log_mass(h, t, 0.f);
    }
    const auto owned = run({.gamma = gamma}, layer);
    const CompressionPlan& plan = owned.plan.value();
    const CompressionReport report = apply(plan, layer.cache).value();
    double rows = 0.0;
    for (Index h = 0; h < 3; ++h) {
      for (Index t = 0; t < layer.cache.size(h); ++t) rows += std::exp(static_cast<double>(layer.cache.log_mass(h, t)));
    }
    EXPECT_NEAR(rows, static_cast<double>(report.rows_kept + report.rows_merged), 1e-4);
  }
}

TEST(EvictThenMerge, MassesAddUpWhenMergedRowsMergeAgain) {
  auto cache = make_cache({1, 1, 2, 2}, 4);
  for (Index t = 0; t < 4; ++t) {
    cache.write_key(0, t, std::vector<float>{1, 1});
    cache.write_value(0, t, std::vector<float>{1, 1});
    cache.write_log_mass(0, t, std::log(static_cast<float>(t + 1)));
  }
  OwnedScores scores;
  scores.add_head({1, 2, 3, 4});
  const auto mass = [&](MassMode mode) {
    return run_reduce(Reducer({.gamma = 3.f, .mass_mode = mode}), cache, scores, {1}).plan->merged[0].log_mass;
  };
  EXPECT_FLOAT_EQ(mass(MassMode::log_count), std::log(1.f + 2.f + 3.f + 4.f));
  EXPECT_FLOAT_EQ(mass(MassMode::score_ratio), std::log(4.f) + std::log(10.f / 4.f));
}

TEST(EvictThenMerge, WithoutAMassModeTheMassesOfKeptRowsStay) {
  Layer layer = ragged_layer();
  const auto before = read_head(layer.cache, 2);
  const auto owned = run({.mass_mode = MassMode::none}, layer);
  const auto kept = owned.plan->kept_rows(2);
  ASSERT_TRUE(apply(owned.plan.value(), layer.cache).ok());
  for (Index t = 0; t < layer.cache.size(2); ++t) {
    EXPECT_EQ(static_cast<double>(layer.cache.log_mass(2, t)), before.log_masses[ix(kept[ix(t)])]);
  }
}

// --- What attention sees of a merged cache ---------------------------------------------------------------------

/// Eight different rows, then 40 copies of one or the other. The first eight score best; scores of copies are alike.
Layer layer_of_duplicates() {
  Layer layer{make_cache({2, 3, 16, 12}, 48), {}, {8, 8}};
  Random random(31);
  for (Index h = 0; h < 2; ++h) {
    std::vector<float> scores(48);
    for (Index t = 0; t < 48; ++t) {
      const Index original = t < 8 ? t : random.below(8);
      if (t < 8) {
        layer.cache.write_key(h, t, normals(16, random));
        layer.cache.write_value(h, t, normals(12, random));
      } else {
        layer.cache.write_key(h, t, {layer.cache.key_rows(h, original, 1), 16});
        layer.cache.write_value(h, t, {layer.cache.value_rows(h, original, 1), 12});
      }
      scores[ix(t)] = static_cast<float>(original + 1);
    }
    layer.scores.add_head(scores, protections(48, 8, 0));
  }
  return layer;
}

class MergedDuplicates : public testing::TestWithParam<std::tuple<KeyMode, MassMode>> {};

TEST_P(MergedDuplicates, LeaveTheOutputOfFullAttentionUnchanged) {
  Layer layer = layer_of_duplicates();
  const auto queries = make_queries(layer.cache.shape(), 5, 60);
  const auto before = attend_oracle(layer.cache, queries.view());
  Options options{.gamma = 5.f, .sinks_absorb = true, .assigner = {.tau = 0.99f}};
  std::tie(options.key_mode, options.mass_mode) = GetParam();
  const auto owned = run(options, layer);
  const CompressionReport report = apply(owned.plan.value(), layer.cache).value();
  ASSERT_EQ(report.rows_kept, 16);
  ASSERT_EQ(report.rows_merged, 80);
  const auto after = run_attend(layer.cache, queries.view());
  EXPECT_LT(relative_error(after.out, before.out), 3e-6);
  EXPECT_LT(relative_error(after.log_sum_exp, before.log_sum_exp), 1e-6);
}

INSTANTIATE_TEST_SUITE_P(Modes, MergedDuplicates,
                         testing::Combine(testing::Values(KeyMode::centre, KeyMode::direction),
                                          testing::Values(MassMode::log_count, MassMode::score_ratio)),
                         mode_name);

TEST(EvictThenMerge, DuplicatesWithoutMassLoseTheirWeight) {
  Layer layer = layer_of_duplicates();
  const auto queries = make_queries(layer.cache.shape(), 5, 60);
  const auto before = attend_oracle(layer.cache, queries.view());
  const auto owned =
      run({.gamma = 5.f, .mass_mode = MassMode::none, .sinks_absorb = true, .assigner = {.tau = 0.99f}}, layer);
  ASSERT_TRUE(apply(owned.plan.value(), layer.cache).ok());
  EXPECT_GT(relative_error(run_attend(layer.cache, queries.view()).out, before.out), 0.02);
}

TEST(EvictThenMerge, ScoreRatioReproducesTheQueryThatTheScoresComeFrom) {
  // With a row's attention as its score, exp(m_c) * exp(l_c) is the sum of exp(l_i) over the class, whatever the keys are.
  Layer layer{make_cache({2, 1, 16, 12}, 80), {}, {16, 24}};
  const auto queries = make_queries(layer.cache.shape(), 1, 80);
  for (Index h = 0; h < 2; ++h) {
    std::vector<float> scores;
    const auto all = attend_oracle(layer.cache, queries.view());
    for (Index t = 0; t < 80; ++t) {
      const auto one = attend_oracle(layer.cache, queries.view(), [&](Index, Index row) { return row == t; });
      scores.push_back(static_cast<float>(std::exp(one.log_sum_exp[ix(h)] - all.log_sum_exp[ix(h)])));
    }
    layer.scores.add_head(scores);
  }
  const auto owned = run({.gamma = 2.f, .mass_mode = MassMode::score_ratio, .assigner = {.tau = 0.1f}}, layer);
  const CompressionPlan& plan = owned.plan.value();
  const auto wanted = attend_oracle(layer.cache, queries.view(),
                                    [&](Index h, Index t) { return plan.fates(h)[ix(t)] != RowFate::evicted; });
  const CompressionReport report = apply(plan, layer.cache).value();
  ASSERT_GT(report.rows_merged, 30);
  ASSERT_GT(report.rows_evicted, 0);
  const auto after = run_attend(layer.cache, queries.view());
  EXPECT_LT(relative_error(after.out, wanted.out), 3e-6);
  EXPECT_LT(relative_error(after.log_sum_exp, wanted.log_sum_exp), 1e-6);
}

// --- What is refused -------------------------------------------------------------------------------------------

TEST(EvictThenMerge, NamesARowThatIsNotFiniteWhereItHasToLookAtIt) {
  Layer layer = make_layer({1, 1, 8, 8}, {12}, {4}, {}, 1, 0);
  for (Index t = 0; t < 12; ++t) layer.scores.score[ix(t)] = static_cast<float>(12 - t);
  const std::vector<float> bad(8, std::numeric_limits<float>::quiet_NaN());
  const auto status = [&](Index row) {
    auto broken = layer.cache.clone();
    broken->write_value(0, row, bad);
    return run_reduce(Reducer(), broken.value(), layer.scores, layer.budgets).plan.status();
  };
  for (const Index row : {1, 3, 4, 7}) {  // centres and candidates
    EXPECT_EQ(status(row).code(), StatusCode::not_finite);
    EXPECT_EQ(status(row).argument(), "values");
    EXPECT_EQ(status(row).row(), row);
  }
  EXPECT_TRUE(status(0).ok()) << "a sink that absorbs nothing moves as it is";
  EXPECT_TRUE(status(11).ok()) << "a row below the candidates goes unseen";
}

TEST(EvictThenMerge, RefusesMassesThatTheViewCannotStore) {
  std::vector<float> memory(2 * 10 * 4, 1.f);
  std::vector<Index> rows{10};
  const StridedView<float> view{.layer = {1, 1, 4, 4},
                                .keys = memory.data(),
                                .key_strides = Strides::head_major(10, 4),
                                .values = memory.data() + 40,
                                .value_strides = Strides::head_major(10, 4),
                                .rows = rows};
  OwnedScores scores;
  scores.add_head(std::vector<float>(10, 1.f));
  const auto status = [&](MassMode mode) {
    return run_reduce(Reducer({.mass_mode = mode}), view, scores, {5}).plan.status();
  };
  EXPECT_EQ(status(MassMode::log_count).code(), StatusCode::unsupported);
  EXPECT_EQ(status(MassMode::score_ratio).argument(), "view");
  EXPECT_TRUE(status(MassMode::none).ok());
}

TEST(EvictThenMerge, RefusesToTurnKeysOfUnknownRotation) {
  Layer layer = ragged_layer();
  const auto owned = run({.key_mode = KeyMode::rotated}, layer);
  EXPECT_EQ(owned.plan.status().code(), StatusCode::unsupported);
  EXPECT_EQ(owned.plan.status().argument(), "view");
}

TEST(EvictThenMerge, NamesAWorkspaceThatIsTooSmall) {
  Layer layer = ragged_layer();
  const Reducer reducer;
  const std::size_t bytes = reducer.workspace_bytes(layer.cache, {46, 30}, 1);
  std::vector<std::byte> memory(bytes);
  SerialExecutor executor;
  for (const std::size_t part : {std::size_t{0}, std::size_t{64}, bytes / 4, bytes / 2}) {
    const Workspace little = std::span(memory).first(part);
    const auto plan = reducer.reduce(layer.cache, layer.scores.table(), layer.budgets, little, executor);
    EXPECT_EQ(plan.status().code(), StatusCode::workspace_too_small) << part;
  }
}

TEST(EvictThenMerge, NamesAnOptionThatIsOutOfRange) {
  EXPECT_TRUE(Reducer().validate().ok());
  for (const float bad : {-1.f, std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    EXPECT_EQ(Reducer({.gamma = bad}).validate().argument(), "gamma");
    EXPECT_EQ(Reducer({.candidate_mass_share = bad}).validate().argument(), "candidate_mass_share");
    EXPECT_EQ(Reducer({.assigner = {.tau = bad}}).validate().argument(), "tau");
  }
}

}  // namespace
}  // namespace kvfold::test
