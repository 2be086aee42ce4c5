// What holds for every kind of storage in every layout: the same numbers are compressed the same way, and rows that
// need not change do not.
#include "storage_kinds.hpp"

#include <kvfold/attend.hpp>
#include <kvfold/compressor.hpp>
#include <kvfold/evidence/global_local_accumulator.hpp>

#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "attend_oracle.hpp"
#include "builders.hpp"

namespace kvfold::test {
namespace {

constexpr LayerShape kShape{.kv_heads = 2, .group_size = 2, .key_dim = 64, .value_dim = 32};
constexpr Index kRows = 90, kBudget = 24, kWindow = 16;

std::size_t at(Index i) { return static_cast<std::size_t>(i); }

std::vector<float> key_of(const AnyCache& cache, Index h, Index t) {
  std::vector<float> row(at(cache.shape().key_dim));
  cache.read_keys(h, t, 1, row);
  return row;
}
std::vector<float> value_of(const AnyCache& cache, Index h, Index t) {
  std::vector<float> row(at(cache.shape().value_dim));
  cache.read_values(h, t, 1, row);
  return row;
}

/// Stores the rows of a cache in another, as `write_key` and `write_value` do.
template <KVCacheView From>
void copy_rows(const From& from, AnyCache& to) {
  std::vector<float> key(at(kShape.key_dim)), value(at(kShape.value_dim));
  for (Index h = 0; h < kShape.kv_heads; ++h) {
    for (Index t = 0; t < from.size(h); ++t) {
      from.read_keys(h, t, 1, key);
      from.read_values(h, t, 1, value);
      to.write_key(h, t, key);
      to.write_value(h, t, value);
    }
  }
}

/// Every row as it is in memory: [h][t].
struct Snapshot {
  std::vector<std::vector<Bytes>> keys, values;

  explicit Snapshot(const AnyCache& cache) {
    for (Index h = 0; h < kShape.kv_heads; ++h) {
      auto& k = keys.emplace_back();
      auto& v = values.emplace_back();
      for (Index t = 0; t < cache.size(h); ++t) {
        k.push_back(cache.key_bytes(h, t));
        v.push_back(cache.value_bytes(h, t));
      }
    }
  }
  friend bool operator==(const Snapshot&, const Snapshot&) = default;
};

class StorageKinds : public testing::TestWithParam<StorageCase> {
 protected:
  StorageKinds() { copy_rows(written, *cache); }

  /// A float cache of what the cache reads as now. Only for caches whose rows are at positions 0, 1, ...
  static std::unique_ptr<AnyCache> dequantised(const AnyCache& from) {
    auto copy = std::make_unique<OwnedCache<FloatKind<float>, FloatKind<float>>>(kShape, kRows);
    copy_rows(from, *copy);
    return copy;
  }

  /// Calls f(cache, float cache of the same numbers) with fresh ones.
  template <class F>
  void with_fresh(F f) {
    const auto fresh = GetParam().make(kShape, kRows);
    copy_rows(written, *fresh);
    const auto floats = dequantised(*fresh);
    f(*fresh, *floats);
  }

  /// With magnitudes of many sizes, different in each head.
  static RaggedCache<> scaled_rows() {
    RaggedCache<> rows = make_cache(kShape, kRows);
    Random random(11);
    std::vector<float> key(at(kShape.key_dim)), value(at(kShape.value_dim));
    for (Index h = 0; h < kShape.kv_heads; ++h) {
      for (Index t = 0; t < kRows; ++t) {
        rows.read_keys(h, t, 1, key);
        rows.read_values(h, t, 1, value);
        for (float& x : value) x *= 0.2f + static_cast<float>(random.uniform());
        rows.write_key(h, t, key);
        rows.write_value(h, t, value);
      }
    }
    return rows;
  }

  RaggedCache<> written = scaled_rows();
  std::unique_ptr<AnyCache> cache = GetParam().make(kShape, kRows);
  OwnedQueries queries = make_queries(kShape, kWindow, kRows);
};

// --- Reading and writing -----------------------------------------------------------------------------------------

TEST_P(StorageKinds, ReadsWhatWasWrittenWithinTheErrorOfTheKind) {
  double worst = 0.0;
  for (Index h = 0; h < kShape.kv_heads; ++h) {
    for (Index t = 0; t < kRows; ++t) {
      const std::vector<float> key = key_of(*cache, h, t), value = value_of(*cache, h, t);
      const std::span<const float> key_in(written.key_rows(h, t, 1), key.size());
      const std::span<const float> value_in(written.value_rows(h, t, 1), value.size());
      for (std::size_t d = 0; d < key.size(); ++d) {
        ASSERT_LE(std::abs(static_cast<double>(key[d]) - static_cast<double>(key_in[d])),
                  cache->key_error(h, key_in, d))
            << h << " " << t << " " << d;
      }
      for (std::size_t d = 0; d < value.size(); ++d) {
        const double error = std::abs(static_cast<double>(value[d]) - static_cast<double>(value_in[d]));
        const double allowed = cache->value_error(h, value_in, d);
        ASSERT_LE(error, allowed) << h << " " << t << " " << d;
        if (allowed > 0.0) worst = std::max(worst, error / allowed);
      }
    }
  }
  EXPECT_TRUE(worst == 0.0 || worst > 0.8) << "the bound says nothing: " << worst;
}

TEST_P(StorageKinds, ReadsRunsOfRowsAsItReadsThemOneByOneAndNothingBeyond) {
  for (const auto& [first, n] : {std::pair<Index, Index>{0, kRows}, {15, 2}, {3, 37}, {kRows - 1, 1}, {5, 0}}) {
    for (Index h = 0; h < kShape.kv_heads; ++h) {
      std::vector<float> keys(at(n * kShape.key_dim) + 1, 777.f), values(at(n * kShape.value_dim) + 1, 777.f);
      cache->read_keys(h, first, n, keys);
      cache->read_values(h, first, n, values);
      for (Index i = 0; i < n; ++i) {
        const std::vector<float> key = key_of(*cache, h, first + i), value = value_of(*cache, h, first + i);
        ASSERT_TRUE(std::equal(key.begin(), key.end(), keys.begin() + i * kShape.key_dim)) << first << " " << i;
        ASSERT_TRUE(std::equal(value.begin(), value.end(), values.begin() + i * kShape.value_dim)) << first << " " << i;
      }
      EXPECT_EQ(keys.back(), 777.f);
      EXPECT_EQ(values.back(), 777.f);
    }
  }
}

TEST_P(StorageKinds, WritingOneRowLeavesTheOthersAlone) {
  Snapshot expected(*cache);
  const std::vector<float> key = key_of(*cache, 0, 7), value = value_of(*cache, 0, 7);
  cache->write_key(1, 40, key);
  cache->write_value(1, 41, value);
  EXPECT_NE(cache->key_bytes(1, 40), expected.keys[1][40]);
  EXPECT_NE(cache->value_bytes(1, 41), expected.values[1][41]);
  expected.keys[1][40] = cache->key_bytes(1, 40);
  expected.values[1][41] = cache->value_bytes(1, 41);
  EXPECT_TRUE(Snapshot(*cache) == expected);
}

TEST_P(StorageKinds, MovingARowCopiesItsBytesAndNothingElse) {
  Snapshot expected(*cache);
  expected.keys[1][3] = expected.keys[1][60];
  expected.values[1][3] = expected.values[1][60];
  cache->write_log_mass(1, 60, 1.25f);
  cache->move_row(1, 60, 3);
  EXPECT_TRUE(Snapshot(*cache) == expected);
  EXPECT_EQ(cache->position(1, 3), 60);
  EXPECT_EQ(cache->log_mass(1, 3), 1.25f);
}

TEST_P(StorageKinds, WritingARowThatWasReadIsStable) {
  const Snapshot before(*cache);
  for (Index h = 0; h < kShape.kv_heads; ++h) {
    for (Index t = 0; t < kRows; ++t) {
      cache->write_key(h, t, key_of(*cache, h, t));
      cache->write_value(h, t, value_of(*cache, h, t));
    }
  }
  EXPECT_TRUE(Snapshot(*cache) == before);
}

TEST_P(StorageKinds, TellsTheBytesOfARow) {
  EXPECT_EQ(cache->row_bytes(0), GetParam().row_bytes(kShape));
  EXPECT_EQ(cache->row_bytes(1), GetParam().row_bytes(kShape));
}

// --- Attention ---------------------------------------------------------------------------------------------------

TEST_P(StorageKinds, AttendsAsAFloatCacheOfTheSameNumbers) {
  const auto copy = dequantised(*cache);
  const auto got = run_attend(*cache, queries.view()), expected = run_attend(*copy, queries.view());
  EXPECT_LT(relative_error(got.out, expected.out), 1e-6);
  EXPECT_LT(relative_error(got.log_sum_exp, expected.log_sum_exp), 1e-6);
  EXPECT_LT(relative_error(got.out, attend_oracle(*cache, queries.view()).out), 1e-5);
}

std::vector<float> observed(const AnyCache& cache, const QueryRows& queries) {
  auto accumulator = GlobalLocalAccumulator::create(kShape, kRows, {.window = kWindow / 2}).value();
  SerialExecutor serial;
  WorkspaceBuffer memory;
  EXPECT_TRUE(memory.reserve(accumulator.workspace_bytes(kRows, 1)).ok());
  EXPECT_TRUE(accumulator.observe(cache, queries, memory.get(), serial).ok());
  const auto sums = accumulator.summarize(cache, memory.get(), serial);
  if (!sums.ok()) return {};
  std::vector<float> all(sums->global.begin(), sums->global.end());
  all.insert(all.end(), sums->local.begin(), sums->local.end());
  return all;
}

TEST_P(StorageKinds, AccumulatesAttentionAsAFloatCacheOfTheSameNumbers) {
  const auto sums = observed(*cache, queries.view());
  ASSERT_FALSE(sums.empty());
  EXPECT_LT(relative_error(sums, observed(*dequantised(*cache), queries.view())), 1e-6);
}

// --- Compression -------------------------------------------------------------------------------------------------

template <class Method>
class Planned {
 public:
  Planned(const Method& method, const AnyCache& cache, const QueryRows& queries) {
    const std::size_t bytes = method.workspace_bytes(cache, queries, 1).value();
    EXPECT_TRUE(memory_.reserve(bytes).ok());
    SerialExecutor serial;
    plan = method.plan(cache, queries, memory_.get().first(bytes), serial).value();
  }
  CompressionPlan plan;

 private:
  WorkspaceBuffer memory_;
};

/// Calls f with each method that differs in how it writes or what it reads.
template <class F>
void for_methods(F f) {
  const GlobalLocalScorer::Options score{.window = kWindow, .protect = {.sinks = 2, .recent = 4}};
  const AdaptiveHeadBudget::Options budget{.rows = kBudget};
  const auto named = [&f](const char* name, const auto& method) {
    SCOPED_TRACE(name);
    f(method);
  };
  named("Ems", Ems({.score = score, .budget = budget}));
  named("Ems with merged keys", Ems({.score = score, .budget = budget, .reduce = {.key_mode = KeyMode::direction}}));
  named("EmsEvict", EmsEvict({.score = score, .budget = budget}));
  named("StreamingLlm", StreamingLlm({.budget = {.rows = kBudget}}));
  named("SnapKv", SnapKv({.score = {.window = kWindow, .recent = 8}, .budget = {.rows = kBudget}}));
}

/// Whether both rows are the same to within what storing the second in `cache` may change.
void expect_stored(const std::vector<float>& got, const std::vector<float>& wanted, double most_off,
                   const std::function<double(std::size_t)>& error) {
  ASSERT_EQ(got.size(), wanted.size());
  for (std::size_t d = 0; d < got.size(); ++d) {
    ASSERT_LE(std::abs(static_cast<double>(got[d]) - static_cast<double>(wanted[d])), error(d) + most_off) << d;
  }
}

TEST_P(StorageKinds, CompressesAsAFloatCacheOfTheSameNumbers) {
  for_methods([this](const auto& method) {
    with_fresh([&](AnyCache& tested, AnyCache& floats) {
      const Planned made(method, tested, queries.view());
      const Planned reference(method, floats, queries.view());
      ASSERT_TRUE(std::equal(made.plan.kept.begin(), made.plan.kept.end(), reference.plan.kept.begin(),
                             reference.plan.kept.end()));
      ASSERT_EQ(made.plan.merged.size(), reference.plan.merged.size());
      const auto report = apply(made.plan, tested);
      const auto reference_report = apply(reference.plan, floats);
      ASSERT_TRUE(report.ok() && reference_report.ok());
      EXPECT_EQ(report->rows_kept, kBudget * kShape.kv_heads);
      EXPECT_EQ(report->rows_merged, reference_report->rows_merged);
      EXPECT_EQ(report->rows_rewritten, reference_report->rows_rewritten);
      for (Index h = 0; h < kShape.kv_heads; ++h) {
        ASSERT_EQ(tested.size(h), floats.size(h));
        for (Index t = 0; t < tested.size(h); ++t) {
          ASSERT_EQ(tested.position(h, t), floats.position(h, t));
          ASSERT_NEAR(tested.log_mass(h, t), floats.log_mass(h, t), 1e-6f);
          const auto key = key_of(floats, h, t), value = value_of(floats, h, t);
          const auto key_error = [&](std::size_t d) { return tested.key_error(h, key, d); };
          const auto value_error = [&](std::size_t d) { return tested.value_error(h, value, d); };
          expect_stored(key_of(tested, h, t), key, 1e-5, key_error);
          expect_stored(value_of(tested, h, t), value, 1e-5, value_error);
        }
      }
    });
  });
}

TEST_P(StorageKinds, RowsThatAbsorbNothingKeepTheirBytes) {
  for_methods([this](const auto& method) {
    with_fresh([&](AnyCache& tested, AnyCache&) {
      const Snapshot before(tested);
      const Planned made(method, tested, queries.view());
      const auto report = apply(made.plan, tested);
      ASSERT_TRUE(report.ok());
      Index may_change = 0, changed = 0;
      for (Index h = 0; h < kShape.kv_heads; ++h) {
        std::vector<bool> merged(made.plan.kept_rows(h).size(), false);
        for (const MergedRow& row : made.plan.merged_rows(h)) merged[at(row.slot)] = true;
        for (std::size_t slot = 0; slot < merged.size(); ++slot) {
          const RowId from = made.plan.kept_rows(h)[slot];
          const bool same_key = tested.key_bytes(h, static_cast<Index>(slot)) == before.keys[at(h)][at(from)];
          const bool same_value = tested.value_bytes(h, static_cast<Index>(slot)) == before.values[at(h)][at(from)];
          may_change += merged[slot] ? 1 : 0;
          changed += same_key && same_value ? 0 : 1;
          ASSERT_TRUE(same_value || merged[slot]) << h << " " << slot;
          ASSERT_TRUE(same_key || (merged[slot] && !made.plan.merged_keys.empty())) << h << " " << slot;
        }
      }
      EXPECT_EQ(report->rows_rewritten, may_change);
      EXPECT_GE(changed, may_change / 2) << "merging changes rows";
    });
  });
}

TEST_P(StorageKinds, ReportsTheBytesOfTheRows) {
  for_methods([this](const auto& method) {
    with_fresh([&](AnyCache& tested, AnyCache&) {
      const auto report = method.compress(tested, queries.view());
      ASSERT_TRUE(report.ok()) << report.status().detail();
      const Index row_bytes = GetParam().row_bytes(kShape);
      EXPECT_EQ(report->bytes_before, kRows * kShape.kv_heads * row_bytes);
      EXPECT_EQ(report->bytes_after, kBudget * kShape.kv_heads * row_bytes);
    });
  });
}

TEST_P(StorageKinds, AttendsOverTheCompressedCacheAsOverAFloatCopyOfIt) {
  for_methods([this](const auto& method) {
    with_fresh([&](AnyCache& tested, AnyCache& floats) {
      const Planned made(method, tested, queries.view());
      ASSERT_TRUE(apply(made.plan, tested).ok());
      ASSERT_TRUE(apply(made.plan, floats).ok());
      copy_rows(tested, floats);  // merged rows were rounded
      const auto got = run_attend(tested, queries.view()), expected = run_attend(floats, queries.view());
      ASSERT_FALSE(got.out.empty());
      EXPECT_LT(relative_error(got.out, expected.out), 1e-6);
      EXPECT_LT(relative_error(got.log_sum_exp, expected.log_sum_exp), 1e-6);
    });
  });
}

INSTANTIATE_TEST_SUITE_P(All, StorageKinds, testing::ValuesIn(storage_cases()),
                         [](const auto& made) { return made.param.name; });

}  // namespace
}  // namespace kvfold::test
