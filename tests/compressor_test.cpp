#include <kvfold/compressor.hpp>
#include <kvfold/evidence/global_local_accumulator.hpp>
#include <kvfold/exec/thread_pool.hpp>
#include <kvfold/storage/ragged_cache.hpp>
#include <kvfold/view/eigen_map.hpp>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <string>
#include <type_traits>
#include <vector>

#include <gtest/gtest.h>

#include "attend_oracle.hpp"
#include "builders.hpp"
#include "merge_oracle.hpp"

namespace kvfold::test {
namespace {

constexpr LayerShape kShape{.kv_heads = 3, .group_size = 2, .key_dim = 16, .value_dim = 12};
constexpr Index kRows = 150;  // T = N
constexpr Index kWindow = 16;

// --- Methods with small windows ----------------------------------------------------------------------------------

constexpr GlobalLocalScorer::Options kGlobalLocal{.window = kWindow, .protect = {.sinks = 4, .recent = 8}};

template <class Method>
Method with_budget(Index rows) {
  typename Method::Options options;
  options.budget.rows = rows;
  if constexpr (std::is_same_v<Method, Ems> || std::is_same_v<Method, EmsEvict>) options.score = kGlobalLocal;
  if constexpr (std::is_same_v<Method, H2o>) options.score = H2oRule::Options::for_budget(rows);
  if constexpr (std::is_same_v<Method, SnapKv>) options.score.window = options.score.recent = kWindow;
  return Method(options);
}

/// Rows that the method keeps whatever happens, while the budget holds them.
template <class Method>
Protect always_kept(Index budget) {
  if constexpr (std::is_same_v<Method, Ems> || std::is_same_v<Method, EmsEvict>) return {.sinks = 4, .recent = 8};
  if constexpr (std::is_same_v<Method, StreamingLlm>) return {.sinks = 4, .recent = budget - 4};
  if constexpr (std::is_same_v<Method, H2o>) return {.recent = budget / 2};
  if constexpr (std::is_same_v<Method, SnapKv>) return {.recent = kWindow};
  return {};
}

/// A plan in exactly the workspace that the method asks for.
template <class Method, KVCacheView V, class E, Executor X = SerialExecutor>
OwnedPlan plan_of(const Method& method, const V& view, const E& evidence, X&& executor = {}) {
  const auto bytes = method.workspace_bytes(view, evidence, executor.concurrency());
  if (!bytes.ok()) return {WorkspaceBuffer{}, bytes.status()};
  WorkspaceBuffer memory;
  if (Status bad = memory.reserve(bytes.value()); !bad.ok()) return {WorkspaceBuffer{}, bad};
  Result<CompressionPlan> plan = method.plan(view, evidence, memory.get().first(bytes.value()), executor);
  return {std::move(memory), plan};
}

std::vector<RowId> kept_of(const CompressionPlan& plan, Index h) {
  const auto rows = plan.kept_rows(h);
  return {rows.begin(), rows.end()};
}

/// Keys, values, positions and log masses of all rows.
std::vector<float> contents(const RaggedCache<>& cache) {
  std::vector<float> all;
  const LayerShape shape = cache.shape();
  for (Index h = 0; h < shape.kv_heads; ++h) {
    all.push_back(static_cast<float>(cache.size(h)));
    for (Index t = 0; t < cache.size(h); ++t) {
      all.insert(all.end(), cache.key_rows(h, t, 1), cache.key_rows(h, t, 1) + shape.key_dim);
      all.insert(all.end(), cache.value_rows(h, t, 1), cache.value_rows(h, t, 1) + shape.value_dim);
      all.push_back(static_cast<float>(cache.position(h, t)));
      all.push_back(cache.log_mass(h, t));
    }
  }
  return all;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// --- What holds for every method -------------------------------------------------------------------------------

template <class Method>
class EveryMethod : public testing::Test {
 protected:
  RaggedCache<> cache = make_cache(kShape, kRows);
  OwnedQueries queries = make_queries(kShape, kRows, kRows);
};

struct MethodNames {
  template <class Method>
  static std::string GetName(int i) {
    return std::vector<std::string>{"Ems", "EmsEvict", "StreamingLlm", "H2o", "SnapKv", "Tova"}[ix(i)];
  }
};
using Methods = testing::Types<Ems, EmsEvict, StreamingLlm, H2o, SnapKv, Tova>;
TYPED_TEST_SUITE(EveryMethod, Methods, MethodNames);

TYPED_TEST(EveryMethod, SpendsItsBudgetExactly) {
  for (const Index budget : {1, 20, 75, 149}) {
    const auto method = with_budget<TypeParam>(budget);
    auto copy = this->cache.clone().value();
    const auto report = method.compress(copy, this->queries.view());
    ASSERT_TRUE(report.ok()) << report.status().detail();
    EXPECT_EQ(report.value().rows_kept, budget * kShape.kv_heads);
    EXPECT_EQ(report.value().rows_before, kRows * kShape.kv_heads);
    Index rows = 0;
    for (Index h = 0; h < kShape.kv_heads; ++h) rows += copy.size(h);
    EXPECT_EQ(rows, budget * kShape.kv_heads);
  }
}

TYPED_TEST(EveryMethod, KeepsItsSinksAndItsRecentRows) {
  constexpr Index budget = 40;
  const Protect protect = always_kept<TypeParam>(budget);
  const auto owned = plan_of(with_budget<TypeParam>(budget), this->cache, this->queries.view());
  for (Index h = 0; h < kShape.kv_heads; ++h) {
    const auto fate = owned.plan->fates(h);
    for (Index t = 0; t < protect.sinks; ++t) EXPECT_EQ(fate[ix(t)], RowFate::kept) << t;
    for (Index t = kRows - protect.recent; t < kRows; ++t) EXPECT_EQ(fate[ix(t)], RowFate::kept) << t;
  }
}

TYPED_TEST(EveryMethod, WithRoomForAllRowsChangesNoBit) {
  const auto before = contents(this->cache);
  for (const Index budget : {kRows, kRows + 1, Index{100000}}) {
    const auto report = with_budget<TypeParam>(budget).compress(this->cache, this->queries.view());
    ASSERT_TRUE(report.ok());
    EXPECT_EQ(report.value().rows_evicted + report.value().rows_merged + report.value().rows_rewritten, 0);
    EXPECT_TRUE(same_bits(contents(this->cache), before));
  }
}

TYPED_TEST(EveryMethod, PlansTheSameBitsForEveryExecutor) {
  const auto method = with_budget<TypeParam>(30);
  const auto serial = plan_bits(plan_of(method, this->cache, this->queries.view()).plan.value());
  for (const Index threads : {1, 2, 3, 4}) {
    const auto pooled = plan_of(method, this->cache, this->queries.view(), ThreadPool(threads));
    EXPECT_EQ(plan_bits(pooled.plan.value()), serial) << threads;
  }
}

TYPED_TEST(EveryMethod, PlansTheSameAgainInAUsedWorkspace) {
  const auto method = with_budget<TypeParam>(30);
  SerialExecutor executor;
  std::vector<std::byte> memory(method.workspace_bytes(this->cache, this->queries.view(), 1).value(), std::byte{0xff});
  const auto run = [&] { return plan_bits(method.plan(this->cache, this->queries.view(), memory, executor).value()); };
  const auto first = run();
  EXPECT_EQ(run(), first);
}

TYPED_TEST(EveryMethod, KeptRowsAreThoseOfTheSequenceAtTheirPositions) {
  const OracleHead before = read_head(this->cache, 1);
  const auto method = with_budget<TypeParam>(30);
  const auto owned = plan_of(method, this->cache, this->queries.view());
  const auto kept = kept_of(owned.plan.value(), 1);
  const auto merged = owned.plan->merged_rows(1);
  ASSERT_TRUE(apply(owned.plan.value(), this->cache).ok());
  const OracleHead after = read_head(this->cache, 1);
  for (std::size_t slot = 0; slot < kept.size(); ++slot) {
    EXPECT_EQ(after.positions[slot], kept[slot]);
    EXPECT_EQ(after.keys[slot], before.keys[ix(kept[slot])]);
    const bool rewritten =
        std::any_of(merged.begin(), merged.end(), [&](const MergedRow& m) { return ix(m.slot) == slot; });
    if (!rewritten) {
      EXPECT_EQ(after.values[slot], before.values[ix(kept[slot])]);
    }
  }
}

TYPED_TEST(EveryMethod, FailsWithoutWritingWhenTheWorkspaceIsTooSmall) {
  const auto before = contents(this->cache);
  const auto method = with_budget<TypeParam>(30);
  SerialExecutor executor;
  const std::size_t bytes = method.workspace_bytes(this->cache, this->queries.view(), 1).value();
  for (const std::size_t part : {std::size_t{0}, bytes / 8, bytes / 2}) {
    std::vector<std::byte> memory(part);
    const auto report = method.compress(this->cache, this->queries.view(), memory, executor);
    EXPECT_EQ(report.status().code(), StatusCode::workspace_too_small);
    EXPECT_TRUE(same_bits(contents(this->cache), before));
  }
}

TYPED_TEST(EveryMethod, FailsWithoutWritingWhenTheBudgetIsZero) {
  const auto before = contents(this->cache);
  const auto report = with_budget<TypeParam>(0).compress(this->cache, this->queries.view());
  EXPECT_EQ(report.status().code(), StatusCode::invalid_argument);
  EXPECT_EQ(report.status().argument(), "budget");
  EXPECT_TRUE(same_bits(contents(this->cache), before));
}

// --- Views of the same data ------------------------------------------------------------------------------------

/// The rows of a cache in plain memory of any layout.
struct Dense {
  std::vector<float> keys, values, masses;
  std::vector<Index> rows;
  std::vector<Position> positions;
  StridedView<float> view;

  Dense(const RaggedCache<>& cache, Strides key_strides, Strides value_strides) {
    const auto [H, G, D, E] = cache.shape();
    const Index T = cache.size(0);
    keys.resize(ix(H * T * D));
    values.resize(ix(H * T * E));
    masses.resize(ix(H * T), 0.f);
    for (Index h = 0; h < H; ++h) {
      rows.push_back(cache.size(h));
      for (Index t = 0; t < T; ++t) {
        positions.push_back(cache.position(h, t));
        const auto put = [&](std::vector<float>& all, const Strides& s, const float* row, Index width) {
          for (Index d = 0; d < width; ++d) all[ix(h * s.head + t * s.token + d * s.dim)] = row[d];
        };
        put(keys, key_strides, cache.key_rows(h, t, 1), D);
        put(values, value_strides, cache.value_rows(h, t, 1), E);
      }
    }
    view = {.layer = {H, G, D, E},
            .keys = keys.data(),
            .key_strides = key_strides,
            .values = values.data(),
            .value_strides = value_strides,
            .rows = rows,
            .positions = positions,
            .position_stride = T,
            .log_masses = masses,
            .log_mass_stride = T};
  }
  Dense(const Dense&) = delete;
  Dense& operator=(const Dense&) = delete;
};

const std::pair<Strides, Strides> kLayouts[] = {{Strides::head_major(kRows, 16), Strides::head_major(kRows, 12)},
                                                {Strides::token_major(3, 16), Strides::token_major(3, 12)},
                                                {Strides::head_major(kRows, 16), Strides::transposed(kRows, 12)},
                                                {Strides::transposed(kRows, 16), Strides::transposed(kRows, 12)}};

TYPED_TEST(EveryMethod, PlansTheSameBitsForEveryLayout) {
  const auto method = with_budget<TypeParam>(30);
  const auto wanted = plan_bits(plan_of(method, this->cache, this->queries.view()).plan.value());
  for (const auto& [key_strides, value_strides] : kLayouts) {
    const Dense dense(this->cache, key_strides, value_strides);
    EXPECT_EQ(plan_bits(plan_of(method, dense.view, this->queries.view()).plan.value()), wanted);
  }
}

TYPED_TEST(EveryMethod, CompressesEveryLayoutAlike) {
  const auto method = with_budget<TypeParam>(30);
  auto wanted = this->cache.clone().value();
  ASSERT_TRUE(method.compress(wanted, this->queries.view()).ok());
  for (const auto& [key_strides, value_strides] : kLayouts) {
    Dense dense(this->cache, key_strides, value_strides);
    ASSERT_TRUE(method.compress(dense.view, this->queries.view()).ok());
    for (Index h = 0; h < kShape.kv_heads; ++h) {
      const OracleHead got = read_head(dense.view, h), ragged = read_head(wanted, h);
      EXPECT_EQ(got.keys, ragged.keys);
      EXPECT_EQ(got.values, ragged.values);
      EXPECT_EQ(got.positions, ragged.positions);
      EXPECT_EQ(got.log_masses, ragged.log_masses);
    }
  }
}

TEST(Compressor, PlansTheSameBitsForEigenMatrices) {
  const auto cache = make_cache(kShape, kRows);
  const auto queries = make_queries(kShape, kRows, kRows);
  Dense head_major(cache, kLayouts[0].first, kLayouts[0].second),
      token_major(cache, kLayouts[1].first, kLayouts[1].second);
  for (Dense* dense : {&head_major, &token_major}) {
    std::vector<RowsMap> keys, values;
    for (Index h = 0; h < kShape.kv_heads; ++h) {
      const Strides &k = dense->view.key_strides, &v = dense->view.value_strides;
      keys.emplace_back(dense->keys.data() + h * k.head, kRows, 16, Eigen::OuterStride<>(k.token));
      values.emplace_back(dense->values.data() + h * v.head, kRows, 12, Eigen::OuterStride<>(v.token));
    }
    const EigenView view{.group_size = 2, .keys = keys, .values = values, .rows = dense->rows};
    const Ems merging({.score = kGlobalLocal, .budget = {.rows = 30}, .reduce = {.mass_mode = MassMode::none}});
    EXPECT_EQ(plan_bits(plan_of(merging, view, queries.view()).plan.value()),
              plan_bits(plan_of(merging, cache, queries.view()).plan.value()));
    const auto evicting = with_budget<EmsEvict>(30);
    EXPECT_EQ(plan_bits(plan_of(evicting, view, queries.view()).plan.value()),
              plan_bits(plan_of(evicting, cache, queries.view()).plan.value()));
  }
}

TEST(Compressor, GivesEqualCountsToStorageThatHasOneCountPerLayer) {
  const auto cache = make_cache(kShape, kRows);
  const auto queries = make_queries(kShape, kRows, kRows);
  Dense dense(cache, kLayouts[0].first, kLayouts[0].second);
  const auto method = with_budget<Ems>(30);
  const auto ragged = plan_of(method, dense.view, queries.view());
  ASSERT_NE(ragged.plan->kept_rows(0).size(), ragged.plan->kept_rows(1).size()) << "heads differ where they may";
  dense.view.counts = RowCounts::per_layer;
  ASSERT_TRUE(method.compress(dense.view, queries.view()).ok());
  EXPECT_EQ(dense.rows, std::vector<Index>(3, 30));
}

TEST(Compressor, TellsWhatEqualCountsCost) {
  auto cache = make_cache(kShape, kRows);
  for (Index t = 0; t < kRows; ++t) {  // head 0 looks at a few rows, the others at many
    const std::vector<float> weak(16, 0.f);
    if (t % 40 != 20) cache.write_key(0, t, weak);
  }
  const auto queries = make_queries(kShape, kRows, kRows);
  for (const Index budget : {15, 30, 75}) {
    Dense dense(cache, kLayouts[0].first, kLayouts[0].second);
    const auto method = with_budget<Ems>(budget);
    const auto ragged = plan_of(method, dense.view, queries.view());
    EXPECT_EQ(ragged.plan->equal_counts_cost, 0.f) << "ragged heads cost nothing";
    for (const RowCounts counts : {RowCounts::per_layer, RowCounts::per_model}) {
      dense.view.counts = counts;
      const auto equal = plan_of(method, dense.view, queries.view());
      for (Index h = 0; h < 3; ++h) EXPECT_EQ(equal.plan->kept_rows(h).size(), ix(budget));
      EXPECT_GT(equal.plan->equal_counts_cost, 0.f);
      EXPECT_NEAR(equal.plan->equal_counts_cost, ragged.plan->kept_score_share - equal.plan->kept_score_share, 1e-6f);
      EXPECT_EQ(report_of(equal.plan.value(), dense.view).equal_counts_cost, equal.plan->equal_counts_cost);
      const auto pooled = plan_of(method, dense.view, queries.view(), ThreadPool(3));
      EXPECT_EQ(plan_bits(pooled.plan.value()), plan_bits(equal.plan.value()));
    }
  }
}

TEST(Compressor, EqualCountsCostNothingWhereTheBudgetsAreEqualAnyway) {
  const auto cache = make_cache(kShape, kRows);
  Dense dense(cache, kLayouts[0].first, kLayouts[0].second);
  dense.view.counts = RowCounts::per_layer;
  const auto plan = plan_of(with_budget<SnapKv>(30), dense.view, make_queries(kShape, kRows, kRows).view());
  EXPECT_EQ(plan.plan->equal_counts_cost, 0.f);
}

/// Gives each head as many rows as its scores, which are whole numbers, say: layers ask for totals of their own.
struct ScoreCountBudget {
  struct Options {
    Index rows = 8;
    [[nodiscard]] static Status validate() noexcept { return {}; }
  } options;
  ScoreCountBudget() noexcept = default;
  explicit ScoreCountBudget(Options given) noexcept : options(given) {}
  [[nodiscard]] static Status validate() noexcept { return {}; }
  [[nodiscard]] RowLimits limits(Index heads) const noexcept { return {options.rows * heads, options.rows * heads}; }
  [[nodiscard]] static std::size_t workspace_bytes(Index) noexcept { return 0; }
  Status allocate(std::span<const ScoreTable> tables, std::span<Index> budgets, Workspace) const noexcept {
    for (Index h = 0; h < tables[0].heads(); ++h) {
      const auto above =
          std::count_if(tables[0].scores(h).begin(), tables[0].scores(h).end(), [](float s) { return s > 1.f; });
      budgets[ix(h)] = std::clamp<Index>(above, 1, options.rows);
    }
    return {};
  }
};

TEST(Compressor, OneCountForAllLayersIsTheBudgetWhateverAPolicyAsksFor) {
  using Method = Compressor<H2oScorer, ScoreCountBudget, EvictOnly>;
  const Method method({.score = {.recent = 2}, .budget = {.rows = 140}, .reduce = {}});
  const auto queries = make_queries(kShape, kRows, kRows);
  std::vector<std::size_t> per_layer, per_model;
  for (const std::uint64_t layer : {1u, 2u, 3u}) {
    const auto cache = make_cache(kShape, kRows, layer);
    Dense dense(cache, kLayouts[0].first, kLayouts[0].second);
    dense.view.counts = RowCounts::per_layer;
    per_layer.push_back(plan_of(method, dense.view, queries.view()).plan->kept_rows(0).size());
    dense.view.counts = RowCounts::per_model;
    per_model.push_back(plan_of(method, dense.view, queries.view()).plan->kept_rows(0).size());
  }
  EXPECT_EQ(per_model, std::vector<std::size_t>(3, 140));
  EXPECT_NE(per_layer, std::vector<std::size_t>(3, per_layer[0])) << "layers differ where they may";
}

TEST(Compressor, OneCountForAllLayersIsAllRowsWhereTheBudgetIsLarger) {
  const auto cache = make_cache(kShape, 20);
  std::vector<Index> rows;
  Dense dense(cache, Strides::head_major(20, 16), Strides::head_major(20, 12));
  dense.view.counts = RowCounts::per_model;
  const auto plan = plan_of(with_budget<EmsEvict>(30), dense.view, make_queries(kShape, 20, 20).view());
  for (Index h = 0; h < 3; ++h) EXPECT_EQ(plan.plan->kept_rows(h).size(), 20u);
  EXPECT_EQ(plan.plan->equal_counts_cost, 0.f);
}

// --- Single methods --------------------------------------------------------------------------------------------

TEST(Compressor, StreamingLlmKeepsTheFirstRowsAndTheLast) {
  const auto cache = make_cache(kShape, kRows);
  const StreamingLlm method({.score = {.sinks = 4}, .budget = {.rows = 20}});
  const auto owned = plan_of(method, cache, NoEvidence{});
  std::vector<RowId> wanted{0, 1, 2, 3};
  for (RowId t = kRows - 16; t < kRows; ++t) wanted.push_back(t);
  for (Index h = 0; h < kShape.kv_heads; ++h) EXPECT_EQ(kept_of(owned.plan.value(), h), wanted);
}

TEST(Compressor, TovaKeepsTheSameRowsInEveryHead) {
  const auto cache = make_cache(kShape, kRows);
  const auto owned = plan_of(with_budget<Tova>(20), cache, make_queries(kShape, 1, kRows).view());
  for (Index h = 1; h < kShape.kv_heads; ++h) EXPECT_EQ(kept_of(owned.plan.value(), h), kept_of(owned.plan.value(), 0));
}

TEST(Compressor, EmsGivesMoreRowsToHeadsWhoseAttentionIsSpread) {
  auto cache = make_cache({2, 1, 16, 8}, 200);
  const std::vector<float> weak(16, 0.f);
  for (Index t = 0; t < 200; ++t) {
    if (t % 40 != 20) cache.write_key(0, t, weak);  // head 0 looks at five rows
  }
  std::vector<float> query(16 * 2 * 16);
  for (Index i = 0; i < 2 * 16; ++i) {
    const float* key = cache.key_rows(0, 20, 1);
    for (Index d = 0; d < 16; ++d) query[ix(i * 16 + d)] = i < 16 ? 2.f * key[d] : 0.f;
  }
  for (Index t = 60; t < 200; t += 40) cache.write_key(0, t, {cache.key_rows(0, 20, 1), 16});
  const auto positions = positions_from(184, 16);
  auto scoring = kGlobalLocal;
  scoring.span_weight = 0.f;
  const EmsEvict method({.score = scoring, .budget = {.rows = 40, .floor_share = 0.2f}});
  const auto owned = plan_of(method, cache, head_major_queries(query.data(), 2, 16, positions));
  EXPECT_LT(owned.plan->kept_rows(0).size() + 20, owned.plan->kept_rows(1).size());
  EXPECT_EQ(owned.plan->kept.size(), 80u);
  for (const RowId t : {20, 60, 100, 140, 180}) EXPECT_EQ(owned.plan->fates(0)[ix(t)], RowFate::kept) << t;
}

// --- Evidence --------------------------------------------------------------------------------------------------

TEST(Compressor, PlansAlikeFromQueriesAndFromStreamedColumnSums) {
  const auto cache = make_cache(kShape, kRows);
  const auto queries = make_queries(kShape, kRows, kRows);
  auto sums_of = GlobalLocalAccumulator::create(kShape, kRows, {.window = kWindow}).value();
  SerialExecutor executor;
  std::vector<std::byte> memory(sums_of.workspace_bytes(kRows, 1));
  for (Index first = 0; first < kRows; first += 64) {
    const Index count = std::min<Index>(64, kRows - first);
    QueryRows chunk = queries.view();
    chunk.data += first * kShape.key_dim;
    chunk.positions = chunk.positions.subspan(ix(first), ix(count));
    ASSERT_TRUE(sums_of.observe(cache, chunk, memory, executor).ok());
  }
  const ColumnSums sums = sums_of.summarize(cache, memory, executor).value();
  const auto method = with_budget<Ems>(30);
  const auto from_queries = plan_of(method, cache, queries.view()), from_sums = plan_of(method, cache, sums);
  const CompressionPlan &a = from_queries.plan.value(), &b = from_sums.plan.value();
  EXPECT_TRUE(std::ranges::equal(a.kept, b.kept));
  EXPECT_TRUE(std::ranges::equal(a.fate, b.fate));
  EXPECT_TRUE(std::ranges::equal(a.row_class, b.row_class));
  const auto values = [](const CompressionPlan& p) {
    return std::vector(p.merged_values.begin(), p.merged_values.end());
  };
  EXPECT_LT(relative_error(values(b), values(a)), 1e-5);
}

TEST(Compressor, PermutingHeadsPermutesTheResult) {
  const auto cache = make_cache(kShape, kRows);
  const auto queries = make_queries(kShape, kRows, kRows);
  const std::vector<Index> order{2, 0, 1};
  auto permuted = cache.clone().value();
  OwnedQueries permuted_queries = queries;
  for (Index h = 0; h < 3; ++h) {
    const Index from = order[ix(h)];
    for (Index t = 0; t < kRows; ++t) {
      permuted.write_key(h, t, {cache.key_rows(from, t, 1), 16});
      permuted.write_value(h, t, {cache.value_rows(from, t, 1), 12});
    }
    const Index group = 2 * kRows * 16;
    std::copy_n(queries.data.begin() + from * group, group, permuted_queries.data.begin() + h * group);
  }
  auto compressed = cache.clone().value();
  const auto method = with_budget<Ems>(30);
  ASSERT_TRUE(method.compress(compressed, queries.view()).ok());
  ASSERT_TRUE(method.compress(permuted, permuted_queries.view()).ok());
  for (Index h = 0; h < 3; ++h) {
    const OracleHead got = read_head(permuted, h), wanted = read_head(compressed, order[ix(h)]);
    EXPECT_EQ(got.keys, wanted.keys);
    EXPECT_EQ(got.values, wanted.values);
    EXPECT_EQ(got.positions, wanted.positions);
    EXPECT_EQ(got.log_masses, wanted.log_masses);
  }
}

TEST(Compressor, AQueryThatIsNotFiniteIsNamedAndNothingIsWritten) {
  auto cache = make_cache(kShape, kRows);
  const auto before = contents(cache);
  auto queries = make_queries(kShape, kRows, kRows);
  queries.data[ix(3 * kRows * 16 + 77)] = std::numeric_limits<float>::quiet_NaN();
  const auto report = with_budget<Ems>(30).compress(cache, queries.view());
  EXPECT_EQ(report.status().code(), StatusCode::not_finite);
  EXPECT_EQ(report.status().argument(), "queries");
  EXPECT_EQ(report.status().head(), 1);
  EXPECT_TRUE(same_bits(contents(cache), before));
}

TEST(Compressor, AKeyOrValueThatIsNotFiniteIsNamedAndNothingIsWritten) {
  const auto queries = make_queries(kShape, kRows, kRows);
  const std::vector<float> bad(16, std::numeric_limits<float>::infinity());
  for (const bool in_key : {true, false}) {
    auto cache = make_cache(kShape, kRows);
    if (in_key) cache.write_key(2, kRows - 1, bad);
    if (!in_key) cache.write_value(2, kRows - 1, bad);  // a recent row, which absorbs
    const auto before = contents(cache);
    const auto report = with_budget<Ems>(30).compress(cache, queries.view());
    EXPECT_EQ(report.status().code(), StatusCode::not_finite);
    EXPECT_EQ(report.status().argument(), in_key ? "keys" : "values");
    EXPECT_EQ(report.status().head(), 2);
    EXPECT_TRUE(same_bits(contents(cache), before));
  }
}

// --- Policies of one's own -------------------------------------------------------------------------------------

/// Long values matter.
struct ValueNormScorer {
  struct Options {};
  static Status validate() noexcept { return {}; }
  template <KVCacheView V, class E>
  static std::size_t workspace_bytes(const V& view, const E&, Index) noexcept {
    return static_cast<std::size_t>(view.shape().value_dim) * sizeof(float) + alignof(float);
  }
  template <KVCacheView V, class E, Executor X>
  static Status score(const V& view, const E&, ScoreTable table, Workspace memory, X&) noexcept {
    void* at = memory.data();
    std::size_t space = memory.size();
    const std::size_t bytes = static_cast<std::size_t>(view.shape().value_dim) * sizeof(float);
    const std::span row(static_cast<float*>(std::align(alignof(float), bytes, at, space)), bytes / sizeof(float));
    for (Index h = 0; h < table.heads(); ++h) {
      for (Index t = 0; t < table.rows(h); ++t) {
        view.read_values(h, t, 1, row);
        table.scores(h)[ix(t)] = std::inner_product(row.begin(), row.end(), row.begin(), 0.f);
        table.protections(h)[ix(t)] = Protection::none;
      }
    }
    return {};
  }
};

/// Head h keeps h + 1 rows.
struct StaircaseBudget {
  struct Options {};
  static Status validate() noexcept { return {}; }
  static RowLimits limits(Index heads) noexcept { return {heads * (heads + 1) / 2, heads}; }
  static std::size_t workspace_bytes(Index) noexcept { return 0; }
  static Status allocate(std::span<const ScoreTable>, std::span<Index> budgets, Workspace) noexcept {
    std::iota(budgets.begin(), budgets.end(), Index{1});
    return {};
  }
};

TEST(Compressor, TakesAScorerAndABudgetOfOnesOwn) {
  const auto cache = make_cache(kShape, kRows);
  const Compressor<ValueNormScorer, StaircaseBudget, EvictOnly> method({}, {}, EvictOnly());
  const auto owned = plan_of(method, cache, NoEvidence{});
  ASSERT_TRUE(owned.plan.ok());
  for (Index h = 0; h < kShape.kv_heads; ++h) {
    const OracleHead head = read_head(cache, h);
    std::vector<RowId> rows(ix(kRows));
    std::iota(rows.begin(), rows.end(), RowId{0});
    std::sort(rows.begin(), rows.end(),
              [&](RowId a, RowId b) { return norm(head.values[ix(a)]) > norm(head.values[ix(b)]); });
    rows.resize(ix(h + 1));
    std::sort(rows.begin(), rows.end());
    EXPECT_EQ(kept_of(owned.plan.value(), h), rows);
  }
}

struct NanScorer : ValueNormScorer {
  template <KVCacheView V, class E, Executor X>
  static Status score(const V& view, const E& evidence, ScoreTable table, Workspace memory, X& executor) noexcept {
    const Status status = ValueNormScorer::score(view, evidence, table, memory, executor);
    table.score.back() = std::numeric_limits<float>::quiet_NaN();
    return status;
  }
};

TEST(Compressor, RefusesScoresThatAreNotNumbers) {
  const auto cache = make_cache(kShape, kRows);
  const Compressor<NanScorer, UniformBudget, EvictOnly> method;
  const auto owned = plan_of(method, cache, NoEvidence{});
  EXPECT_EQ(owned.plan.status().code(), StatusCode::not_finite);
  EXPECT_EQ(owned.plan.status().argument(), "scores");
}

// --- Again and again -------------------------------------------------------------------------------------------

TEST(Compressor, CompressingAgainAddsMassesAndKeepsThePositionsOfTheSequence) {
  constexpr Index more = 40, N = kRows + more;
  auto cache = make_cache(kShape, kRows);
  const auto method = with_budget<Ems>(30);
  ASSERT_TRUE(method.compress(cache, make_queries(kShape, kRows, kRows).view()).ok());
  Random random(77);
  const auto keys = normals(3 * more * 16, random), values = normals(3 * more * 12, random);
  const auto positions = positions_from(kRows, more);  // N goes on, whatever the cache holds
  ASSERT_TRUE(
      cache.append(keys.data(), Strides::head_major(more, 16), values.data(), Strides::head_major(more, 12), positions)
          .ok());

  const auto before = cache.clone().value();
  const auto queries = make_queries(kShape, more, N, 5);
  const auto owned = plan_of(method, cache, queries.view());
  const CompressionPlan& plan = owned.plan.value();
  const CompressionReport report = apply(plan, cache).value();
  EXPECT_EQ(report.rows_kept, 90);
  EXPECT_GT(report.rows_merged, 0);
  for (Index h = 0; h < kShape.kv_heads; ++h) {
    EXPECT_EQ(cache.position(h, cache.size(h) - 1), N - 1);
    std::vector<double> stands_for(plan.kept_rows(h).size(), 0.0);
    for (Index t = 0; t < before.size(h); ++t) {
      if (plan.fates(h)[ix(t)] == RowFate::evicted) continue;
      stands_for[ix(plan.row_classes(h)[ix(t)])] += std::exp(static_cast<double>(before.log_mass(h, t)));
    }
    for (Index slot = 0; slot < cache.size(h); ++slot) {
      EXPECT_EQ(cache.position(h, slot), before.position(h, plan.kept_rows(h)[ix(slot)]));
      EXPECT_NEAR(std::exp(static_cast<double>(cache.log_mass(h, slot))), stands_for[ix(slot)], 1e-4);
    }
  }
  EXPECT_LT(relative_error(run_attend(cache, queries.view()).out, attend_oracle(cache, queries.view()).out), 1e-5);
}

// --- What it is good for ---------------------------------------------------------------------------------------

/// A layer in which what is said once is said again and again: T rows around `different` ones.
RaggedCache<> repetitive_cache(Index rows, Index different, std::uint64_t seed) {
  auto cache = make_cache(kShape, rows, seed);
  Random random(seed);
  for (Index h = 0; h < kShape.kv_heads; ++h) {
    const auto keys = normals(different * 16, random), values = normals(different * 12, random);
    for (Index t = 0; t < rows; ++t) {
      const Index c = random.below(different);
      std::vector<float> key(keys.begin() + c * 16, keys.begin() + (c + 1) * 16);
      std::vector<float> value(values.begin() + c * 12, values.begin() + (c + 1) * 12);
      for (float& x : key) x += 0.1f * random.normal();
      for (float& x : value) x += 0.1f * random.normal();
      cache.write_key(h, t, key);
      cache.write_value(h, t, value);
    }
  }
  return cache;
}

double distance(const std::vector<float>& a, const std::vector<double>& b) {
  double squares = 0.0;
  for (std::size_t i = 0; i < b.size(); ++i) squares += std::pow(static_cast<double>(a[i]) - b[i], 2);
  return std::sqrt(squares);
}

struct Repetition {
  Index different, budget;
  float gamma;
};

class RepeatedRows : public testing::TestWithParam<Repetition> {};

TEST_P(RepeatedRows, MergedComeCloserToTheFullOutputThanEvicted) {
  const auto [different, budget, gamma] = GetParam();
  constexpr Index rows = 200;
  constexpr int cases = 8;
  int closer = 0;
  double merged_sum = 0.0, evicted_sum = 0.0;
  for (std::uint64_t seed = 1; seed <= cases; ++seed) {
    const auto full = repetitive_cache(rows, different, seed);
    const auto later = make_queries(kShape, 8, rows + 64, seed + 100);
    const auto wanted = attend_oracle(full, later.view()).out;
    const auto error_of = [&](const auto& method) {
      auto cache = full.clone().value();
      EXPECT_TRUE(method.compress(cache, make_queries(kShape, 64, rows, seed).view()).ok());
      return distance(run_attend(cache, later.view()).out, wanted);
    };
    const double merged =
        error_of(Ems({.score = kGlobalLocal, .budget = {.rows = budget}, .reduce = {.gamma = gamma}}));
    const double evicted = error_of(EmsEvict({.score = kGlobalLocal, .budget = {.rows = budget}}));
    closer += merged < evicted ? 1 : 0;
    merged_sum += merged;
    evicted_sum += evicted;
  }
  EXPECT_GE(closer, cases - 1);
  EXPECT_LT(merged_sum, 0.85 * evicted_sum);
}

// A candidate per kept row is enough where the budget is roomy; where it is tight, more rows must find a home.
INSTANTIATE_TEST_SUITE_P(Budgets, RepeatedRows,
                         testing::Values(Repetition{12, 80, 1.f}, Repetition{24, 80, 1.f}, Repetition{12, 40, 4.f},
                                         Repetition{24, 40, 4.f}));

}  // namespace
}  // namespace kvfold::test
