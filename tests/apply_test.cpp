#include <kvfold/apply.hpp>
#include <kvfold/reduce/evict_only.hpp>
#include <kvfold/storage/ragged_cache.hpp>

#include <cstring>
#include <string_view>
#include <vector>

#include <gtest/gtest.h>

#include "builders.hpp"
#include "counting_memory.hpp"
#include "merge_oracle.hpp"

namespace kvfold::test {
namespace {

// --- Plans by hand ---------------------------------------------------------------------------------------------

/// A plan that owns its tables. Merged values and keys are 1000, 1001, ...
struct HandPlan {
  CompressionPlan plan;
  std::vector<Index> source_rows, kept_offset{0}, merged_offset{0};
  std::vector<RowId> kept;
  std::vector<MergedRow> merged;
  std::vector<float> values, keys;

  HandPlan(LayerShape shape, std::vector<Index> rows) : source_rows(std::move(rows)) { plan.shape = shape; }

  HandPlan& head(const std::vector<RowId>& rows, const std::vector<MergedRow>& absorbing = {}) {
    kept.insert(kept.end(), rows.begin(), rows.end());
    merged.insert(merged.end(), absorbing.begin(), absorbing.end());
    kept_offset.push_back(static_cast<Index>(kept.size()));
    merged_offset.push_back(static_cast<Index>(merged.size()));
    return *this;
  }
  HandPlan& with_keys() {
    keys.resize(merged.size() * ix(plan.shape.key_dim));
    for (std::size_t i = 0; i < keys.size(); ++i) keys[i] = 1000.f + static_cast<float>(i);
    return *this;
  }
  HandPlan& with_masses() {
    plan.writes_log_mass = true;
    return *this;
  }
  [[nodiscard]] const CompressionPlan& get() {
    values.resize(merged.size() * ix(plan.shape.value_dim));
    for (std::size_t i = 0; i < values.size(); ++i) values[i] = 1000.f + static_cast<float>(i);
    plan.source_rows = source_rows;
    plan.kept_offset = kept_offset;
    plan.kept = kept;
    plan.merged_offset = merged_offset;
    plan.merged = merged;
    plan.merged_values = values;
    plan.merged_keys = keys;
    return plan;
  }
};

// --- Caches in plain memory, any bits ----------------------------------------------------------------------------

constexpr Index H = 2, T = 9, D = 5, E = 3, kCapacity = 11;

/// 16-bit elements of every pattern, NaNs with payload among them, in memory that the test can see all of.
struct HalfCache {
  std::vector<Float16> keys, values;
  std::vector<Index> rows{T, T - 2};
  std::vector<Position> positions;
  std::vector<float> masses;
  StridedView<Float16> view;

  HalfCache(Strides key_strides, Strides value_strides) {
    Random random(17);
    keys.resize(ix(H * kCapacity * D));
    values.resize(ix(H * kCapacity * E));
    for (auto* all : {&keys, &values}) {
      for (Float16& x : *all) x.bits = static_cast<std::uint16_t>(random.below(1 << 16));
    }
    keys[0].bits = 0x7e2a;
    values[ix(E)].bits = 0xfd01;  // signalling
    for (Index i = 0; i < H * kCapacity; ++i) {
      positions.push_back(i % kCapacity * 3 + i / kCapacity);
      masses.push_back(0.25f * static_cast<float>(i));
    }
    view = {.layer = {H, 2, D, E},
            .keys = keys.data(),
            .key_strides = key_strides,
            .values = values.data(),
            .value_strides = value_strides,
            .rows = rows,
            .positions = positions,
            .position_stride = kCapacity,
            .log_masses = masses,
            .log_mass_stride = kCapacity};
  }
  HalfCache(const HalfCache&) = delete;
  HalfCache& operator=(const HalfCache&) = delete;

  [[nodiscard]] std::uint16_t key(Index h, Index t, Index d) const { return bits(keys, view.key_strides, h, t, d); }
  [[nodiscard]] std::uint16_t value(Index h, Index t, Index d) const {
    return bits(values, view.value_strides, h, t, d);
  }

  static std::uint16_t bits(const std::vector<Float16>& all, const Strides& s, Index h, Index t, Index d) {
    return all[ix(h * s.head + t * s.token + d * s.dim)].bits;
  }
  friend bool operator==(const HalfCache& a, const HalfCache& b) {
    return a.keys == b.keys && a.values == b.values && a.rows == b.rows && a.positions == b.positions &&
           a.masses == b.masses;
  }
};

/// Row `to` of `now` is row `from` of `before`, bit for bit.
void expect_moved(const HalfCache& now, Index to, const HalfCache& before, Index from, Index h) {
  for (Index d = 0; d < D; ++d) EXPECT_EQ(now.key(h, to, d), before.key(h, from, d));
  for (Index d = 0; d < E; ++d) EXPECT_EQ(now.value(h, to, d), before.value(h, from, d));
  EXPECT_EQ(now.view.position(h, to), before.view.position(h, from));
  EXPECT_EQ(now.view.log_mass(h, to), before.view.log_mass(h, from));
}

class ApplyToLayout : public testing::TestWithParam<std::pair<Strides, Strides>> {
 protected:
  HalfCache before{GetParam().first, GetParam().second};
  HalfCache cache{GetParam().first, GetParam().second};
};

TEST_P(ApplyToLayout, KeptRowsMoveBitForBitInAscendingOrder) {
  HandPlan plan({H, 2, D, E}, {T, T - 2});
  plan.head({0, 2, 3, 8}).head({1, 6});
  ASSERT_TRUE(apply(plan.get(), cache.view).ok());
  EXPECT_EQ(cache.rows, (std::vector<Index>{4, 2}));
  for (Index h = 0; h < H; ++h) {
    Index to = 0;
    for (const RowId from : plan.plan.kept_rows(h)) expect_moved(cache, to++, before, from, h);
  }
}

TEST_P(ApplyToLayout, AMergedRowIsRewrittenAndTheOthersAreNot) {
  HandPlan plan({H, 2, D, E}, {T, T - 2});
  plan.head({1, 4, 5}, {{.slot = 1, .absorbed = 2, .log_mass = 0.5f}})
      .head({0, 3}, {{.slot = 0, .absorbed = 1, .log_mass = 0.75f}, {.slot = 1, .absorbed = 1, .log_mass = 1.f}});
  plan.with_keys().with_masses();
  ASSERT_TRUE(apply(plan.get(), cache.view).ok());
  expect_moved(cache, 0, before, 1, 0);
  expect_moved(cache, 2, before, 5, 0);
  const std::pair<Index, Index> rewritten[] = {{0, 1}, {1, 0}, {1, 1}};
  for (std::size_t m = 0; m < 3; ++m) {
    const auto [h, t] = rewritten[m];
    for (Index d = 0; d < D; ++d) {
      EXPECT_EQ(cache.key(h, t, d), from_float<Float16>(plan.keys[m * ix(D) + ix(d)]).bits);
    }
    for (Index d = 0; d < E; ++d) {
      EXPECT_EQ(cache.value(h, t, d), from_float<Float16>(plan.values[m * ix(E) + ix(d)]).bits);
    }
    EXPECT_EQ(cache.view.log_mass(h, t), plan.merged[m].log_mass);
    const Index centre = plan.plan.kept_rows(h)[ix(t)];
    EXPECT_EQ(cache.view.position(h, t), before.view.position(h, centre)) << "the position is the centre's";
  }
}

TEST_P(ApplyToLayout, WithoutMergedKeysAndMassesTheCentresStay) {
  HandPlan plan({H, 2, D, E}, {T, T - 2});
  plan.head({2, 7}, {{.slot = 1, .absorbed = 4, .log_mass = 9.f}}).head({6});
  ASSERT_TRUE(apply(plan.get(), cache.view).ok());
  for (Index d = 0; d < D; ++d) EXPECT_EQ(cache.key(0, 1, d), before.key(0, 7, d));
  EXPECT_EQ(cache.view.log_mass(0, 1), before.view.log_mass(0, 7));
  EXPECT_EQ(cache.value(0, 1, 0), from_float<Float16>(1000.f).bits);
}

TEST_P(ApplyToLayout, AnIdentityPlanChangesNoBit) {
  HandPlan plan({H, 2, D, E}, {T, T - 2});
  plan.head({0, 1, 2, 3, 4, 5, 6, 7, 8}).head({0, 1, 2, 3, 4, 5, 6}).with_masses();
  const CompressionReport report = apply(plan.get(), cache.view).value();
  EXPECT_TRUE(cache == before);
  EXPECT_EQ(report.rows_kept, report.rows_before);
  EXPECT_EQ(report.rows_evicted + report.rows_merged + report.rows_rewritten, 0);
  EXPECT_EQ(report.bytes_after, report.bytes_before);
}

TEST_P(ApplyToLayout, RowsBehindTheHeadAreNotTouched) {
  HandPlan plan({H, 2, D, E}, {T, T - 2});
  plan.head({8}).head({6});
  ASSERT_TRUE(apply(plan.get(), cache.view).ok());
  for (Index h = 0; h < H; ++h) {
    for (Index t = before.rows[ix(h)]; t < kCapacity; ++t) expect_moved(cache, t, before, t, h);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Layouts, ApplyToLayout,
    testing::Values(std::pair(Strides::head_major(kCapacity, D), Strides::head_major(kCapacity, E)),
                    std::pair(Strides::token_major(H, D), Strides::token_major(H, E)),
                    std::pair(Strides::head_major(kCapacity, D), Strides::transposed(kCapacity, E))));

// --- RaggedCache -----------------------------------------------------------------------------------------------

TEST(Apply, ARaggedCacheGivesMemoryBack) {
  auto cache = make_cache<Float16>({2, 1, 8, 4}, 100);
  ASSERT_TRUE(cache.reserve(300).ok());
  HandPlan plan({2, 1, 8, 4}, {100, 100});
  plan.head({5, 50, 99}).head({0});
  ASSERT_TRUE(apply(plan.get(), cache).ok());
  EXPECT_EQ(cache.size(0), 3);
  EXPECT_EQ(cache.size(1), 1);
  EXPECT_EQ(cache.live_bytes(), 4 * cache.row_bytes(0));
  EXPECT_EQ(cache.position(0, 1), 50);
}

struct ReportTag {};

TEST(Apply, TheReportTellsTheMemoryThatWentBack) {
  using Memory = CountingMemory<ReportTag>;
  Memory::reset();
  {
    constexpr LayerShape shape{2, 1, 8, 4};
    auto cache = RaggedCache<Float16, Float16, Memory>::create(shape).value();
    ASSERT_TRUE(cache.reserve(300).ok());
    const std::vector<float> rows(ix(2 * 100 * 8));
    ASSERT_TRUE(cache
                    .append(rows.data(), Strides::head_major(100, 8), rows.data(), Strides::head_major(100, 4),
                            positions_from(0, 100))
                    .ok());
    HandPlan plan(shape, {100, 100});
    plan.head({5, 50, 99}).head({0});
    const CompressionReport told = report_of(plan.get(), cache);
    EXPECT_EQ(told.live_bytes_before, 0) << "nothing has been freed";
    EXPECT_EQ(told.live_bytes_after, 0);
    const auto before = static_cast<Index>(Memory::live);
    const CompressionReport report = apply(plan.get(), cache).value();
    const auto after = static_cast<Index>(Memory::live);
    EXPECT_EQ(report.live_bytes_before, before);
    EXPECT_EQ(report.live_bytes_after, after);
    EXPECT_EQ(before, 600 * cache.row_bytes(0)) << "spare room counts";
    EXPECT_EQ(after, 4 * cache.row_bytes(0));
  }
  EXPECT_EQ(Memory::live, 0u);
}

TEST(Apply, StorageThatKeepsItsMemoryReportsNoLiveBytes) {
  HalfCache cache(Strides::token_major(H, D), Strides::token_major(H, E));
  HandPlan plan({H, 2, D, E}, {T, T - 2});
  plan.head({8}).head({6});
  const CompressionReport report = apply(plan.get(), cache.view).value();
  EXPECT_EQ(report.live_bytes_before, 0);
  EXPECT_EQ(report.live_bytes_after, 0);
  EXPECT_LT(report.bytes_after, report.bytes_before);
}

TEST(Apply, PositionsAreThoseOfTheRowsNotTheirNumbers) {
  auto cache = make_cache({1, 1, 4, 4}, 30);
  HandPlan plan({1, 1, 4, 4}, {30});
  plan.head({3, 17, 29});
  ASSERT_TRUE(apply(plan.get(), cache).ok());
  EXPECT_EQ(cache.position(0, 0), 3);
  EXPECT_EQ(cache.position(0, 1), 17);
  EXPECT_EQ(cache.position(0, 2), 29);
}

TEST(Apply, TheReportTellsWhatWasDone) {
  auto cache = make_cache({2, 1, 4, 4}, 30);
  HandPlan plan({2, 1, 4, 4}, {30, 30});
  plan.head({0, 1, 2, 3}, {{.slot = 0, .absorbed = 3}, {.slot = 3, .absorbed = 2}})
      .head({7, 8}, {{.slot = 1, .absorbed = 9}});
  plan.plan.kept_score_share = 0.5f;
  plan.plan.merged_score_share = 0.25f;
  plan.plan.equal_counts_cost = 0.125f;
  const Index row_bytes = cache.row_bytes(0);
  const CompressionReport report = apply(plan.get(), cache).value();
  EXPECT_EQ(report.rows_before, 60);
  EXPECT_EQ(report.rows_kept, 6);
  EXPECT_EQ(report.rows_merged, 14);
  EXPECT_EQ(report.rows_evicted, 40);
  EXPECT_EQ(report.rows_rewritten, 3);
  EXPECT_EQ(report.bytes_before, 60 * row_bytes);
  EXPECT_EQ(report.bytes_after, 6 * row_bytes);
  EXPECT_EQ(report.kept_score_share, 0.5f);
  EXPECT_EQ(report.merged_score_share, 0.25f);
  EXPECT_EQ(report.equal_counts_cost, 0.125f);
}

TEST(Apply, ReportOfTellsTheSameWithoutDoingIt) {
  auto cache = make_cache({1, 1, 4, 4}, 30);
  const OracleHead before = read_head(cache, 0);
  HandPlan plan({1, 1, 4, 4}, {30});
  plan.head({5, 6}, {{.slot = 1, .absorbed = 4}});
  const CompressionReport told = report_of(plan.get(), cache);
  EXPECT_EQ(cache.size(0), 30);
  EXPECT_EQ(read_head(cache, 0).values, before.values);
  const CompressionReport done = apply(plan.get(), cache).value();
  EXPECT_EQ(told.rows_before, done.rows_before);
  EXPECT_EQ(told.rows_kept, done.rows_kept);
  EXPECT_EQ(told.rows_merged, done.rows_merged);
  EXPECT_EQ(told.rows_evicted, done.rows_evicted);
  EXPECT_EQ(told.rows_rewritten, done.rows_rewritten);
  EXPECT_EQ(told.bytes_before, done.bytes_before);
  EXPECT_EQ(told.bytes_after, done.bytes_after);
}

TEST(Apply, APlanCannotBeAppliedTwice) {
  auto cache = make_cache({1, 1, 4, 4}, 10);
  HandPlan plan({1, 1, 4, 4}, {10});
  plan.head({2, 3});
  ASSERT_TRUE(apply(plan.get(), cache).ok());
  EXPECT_EQ(apply(plan.get(), cache).status().code(), StatusCode::size_mismatch);
  EXPECT_EQ(cache.size(0), 2);
}

// --- What is refused -------------------------------------------------------------------------------------------

/// A plan that fits, to be spoilt one table at a time.
HandPlan good_plan() {
  HandPlan plan({H, 2, D, E}, {T, T - 2});
  plan.head({1, 4, 5}, {{.slot = 1, .absorbed = 2, .log_mass = 0.5f}}).head({0, 3, 6}).with_keys().with_masses();
  return plan;
}

template <class Spoil>
void expect_refused(StatusCode code, std::string_view argument, Spoil spoil) {
  const Strides key_strides = Strides::token_major(H, D), value_strides = Strides::token_major(H, E);
  const HalfCache before(key_strides, value_strides);
  HalfCache cache(key_strides, value_strides);
  HandPlan owned = good_plan();
  static_cast<void>(owned.get());
  CompressionPlan plan = owned.plan;
  spoil(owned, plan, cache);
  const Status status = apply(plan, cache.view).status();
  EXPECT_EQ(status.code(), code) << status.detail();
  EXPECT_EQ(status.argument(), argument) << status.detail();
  EXPECT_TRUE(cache.keys == before.keys && cache.values == before.values) << "something has been written";
}

TEST(Apply, TakesThePlanThatTheTestsBelowSpoil) {
  HalfCache cache(Strides::token_major(H, D), Strides::token_major(H, E));
  EXPECT_TRUE(apply(good_plan().get(), cache.view).ok());
}

TEST(Apply, RefusesAPlanForAnotherCache) {
  using P = CompressionPlan;
  using enum StatusCode;
  expect_refused(size_mismatch, "plan", [](auto&, P& plan, auto&) { plan.shape.key_dim = 4; });
  expect_refused(size_mismatch, "plan", [](auto&, P& plan, auto&) { plan.shape.kv_heads = 1; });
  expect_refused(size_mismatch, "plan", [](auto&, P&, HalfCache& cache) { ++cache.rows[1]; });
  expect_refused(size_mismatch, "plan", [](auto&, P& plan, auto&) { plan.source_rows = plan.source_rows.first(1); });
  expect_refused(size_mismatch, "plan", [](auto&, P& plan, auto&) { plan = {}; });
}

TEST(Apply, RefusesRowsThatAreNotAscendingAndInside) {
  using P = CompressionPlan;
  using enum StatusCode;
  expect_refused(invalid_argument, "plan", [](HandPlan& own, P&, auto&) { own.kept[2] = 4; });
  expect_refused(invalid_argument, "plan", [](HandPlan& own, P&, auto&) { std::swap(own.kept[0], own.kept[1]); });
  expect_refused(invalid_argument, "plan", [](HandPlan& own, P&, auto&) { own.kept[0] = -1; });
  expect_refused(invalid_argument, "plan", [](HandPlan& own, P&, auto&) { own.kept[5] = T - 2; });
  expect_refused(invalid_argument, "plan", [](HandPlan& own, P&, auto&) { own.merged[0].slot = 3; });
  expect_refused(invalid_argument, "plan", [](HandPlan& own, P&, auto&) { own.merged[0].slot = -1; });
}

TEST(Apply, RefusesTablesThatDoNotFitTogether) {
  using P = CompressionPlan;
  using enum StatusCode;
  expect_refused(invalid_argument, "plan", [](auto&, P& plan, auto&) { plan.kept = plan.kept.first(5); });
  expect_refused(invalid_argument, "plan", [](auto&, P& plan, auto&) { plan.merged = {}; });
  expect_refused(invalid_argument, "plan",
                 [](auto&, P& plan, auto&) { plan.merged_values = plan.merged_values.first(2); });
  expect_refused(invalid_argument, "plan", [](auto&, P& plan, auto&) { plan.merged_keys = plan.merged_keys.first(4); });
  expect_refused(invalid_argument, "plan", [](HandPlan& own, P&, auto&) { own.kept_offset[0] = 1; });
  expect_refused(invalid_argument, "plan", [](HandPlan& own, P&, auto&) { own.kept_offset[1] = 7; });
  expect_refused(invalid_argument, "plan", [](HandPlan& own, P&, auto&) { own.kept_offset[1] = -1; });
  expect_refused(invalid_argument, "plan", [](HandPlan& own, P&, auto&) { own.merged_offset[1] = 2; });
}

TEST(Apply, RefusesWhatTheStorageCannotHold) {
  using P = CompressionPlan;
  using enum StatusCode;
  expect_refused(unsupported, "view", [](auto&, P&, HalfCache& cache) { cache.view.log_masses = {}; });
  for (const RowCounts counts : {RowCounts::per_layer, RowCounts::per_model}) {
    expect_refused(unsupported, "plan", [counts](HandPlan& own, P&, HalfCache& cache) {
      cache.view.counts = counts;
      own.kept_offset[1] = 2;  // 2 and 4 rows
      own.kept = {1, 4, 0, 3, 5, 6};
    });
  }
}

}  // namespace
}  // namespace kvfold::test
