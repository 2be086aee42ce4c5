// Promises of the whole library: bad input gets a status that names the argument and changes nothing; workspaces of the size
// that was asked for are enough, and nothing around them is touched. (That nothing is allocated: allocation/.)
#include <kvfold/attend.hpp>
#include <kvfold/compressor.hpp>
#include <kvfold/evidence/global_local_accumulator.hpp>
#include <kvfold/view/strided.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <ostream>
#include <string>
#include <string_view>
#include <vector>

#include <gtest/gtest.h>

#include "builders.hpp"

namespace kvfold {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

std::size_t at(Index i) { return static_cast<std::size_t>(i); }

template <class T>
bool same_bytes(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

void expect_status(const Status& status, StatusCode code, std::string_view argument, std::string_view what = "") {
  EXPECT_EQ(to_string(status.code()), to_string(code)) << what << ": " << status.argument() << ": " << status.detail();
  EXPECT_EQ(status.argument(), argument) << what << ": " << status.detail();
}

/// An engine's cache: plain memory that can be spoilt, and compared byte by byte.
struct Engine {
  LayerShape shape;
  Index capacity;
  Rope rope = {};
  RowCounts counts = RowCounts::per_head;
  Strides key_strides, value_strides;
  std::vector<float> keys, values, log_masses;
  std::vector<Index> rows;
  std::vector<Position> positions;

  Engine() : Engine({.kv_heads = 2, .group_size = 2, .key_dim = 8, .value_dim = 6}, 200) {}
  Engine(LayerShape layer, Index row_count, std::uint64_t seed = 1)
      : shape(layer),
        capacity(row_count),
        key_strides(Strides::head_major(row_count, layer.key_dim)),
        value_strides(Strides::head_major(row_count, layer.value_dim)) {
    test::Random random(seed);
    keys = test::clustered_rows(shape.kv_heads * capacity, shape.key_dim, 5, 0.3f, random);
    values = test::clustered_rows(shape.kv_heads * capacity, shape.value_dim, 3, 0.3f, random);
    log_masses.resize(at(shape.kv_heads * capacity));
    rows.assign(at(shape.kv_heads), capacity);
    for (Index h = 0; h < shape.kv_heads; ++h) {
      for (Index t = 0; t < capacity; ++t) positions.push_back(t);
    }
  }
  float& key(Index h, Index t, Index d = 0) { return keys[at((h * capacity + t) * shape.key_dim + d)]; }
  float& value(Index h, Index t, Index d = 0) { return values[at((h * capacity + t) * shape.value_dim + d)]; }

  StridedView<float> view() {
    return {.layer = shape,
            .keys = keys.data(),
            .key_strides = key_strides,
            .values = values.data(),
            .value_strides = value_strides,
            .rows = rows,
            .positions = positions,
            .position_stride = capacity,
            .log_masses = log_masses,
            .log_mass_stride = capacity,
            .rotation = rope,
            .counts = counts};
  }
  [[nodiscard]] bool same_as(const Engine& other) const {
    return same_bytes(keys, other.keys) && same_bytes(values, other.values) &&
           same_bytes(log_masses, other.log_masses) && rows == other.rows && positions == other.positions;
  }
};

/// An executor that says what it is told to.
struct Boasting {
  Index workers = 1;
  [[nodiscard]] Index concurrency() const noexcept { return workers; }
  void run(Index n, TaskRef task) const noexcept {
    for (Index i = 0; i < n && workers > 0; ++i) task(i, 0);
  }
};

/// Everything that goes into a call of Ems, all of it right.
struct Call {
  Engine engine;
  test::OwnedQueries owned = test::make_queries(engine.shape, 40, engine.capacity);
  QueryRows queries = owned.view();
  Ems::Options options{.score = {.window = 16}, .budget = {.rows = 50}, .reduce = {}};
  std::vector<float> log_sum_exp = std::vector<float>(4 * 40, 100.f);  // a bound of all logits
  Boasting executor;

  Call() = default;
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;
};

/// One way to spoil a call, and the complaint that is due.
struct BadInput {
  const char* name;
  StatusCode code;
  const char* argument;
  std::function<void(Call&)> spoil;

  friend std::ostream& operator<<(std::ostream& os, const BadInput& bad) { return os << bad.name; }
};

std::string name_of(const testing::TestParamInfo<BadInput>& info) { return info.param.name; }

class BadInputTest : public testing::TestWithParam<BadInput> {};

TEST_P(BadInputTest, IsRefusedByNameAndNothingIsWritten) {
  Call call;
  GetParam().spoil(call);
  const Engine before = call.engine;
  std::vector<std::byte> workspace(4u << 20);
  const Ems method(call.options);
  auto view = call.engine.view();
  const Status planned = method.plan(view, call.queries, workspace, call.executor).status();
  expect_status(planned, GetParam().code, GetParam().argument);
  const Status compressed = method.compress(view, call.queries, workspace, call.executor).status();
  expect_status(compressed, GetParam().code, GetParam().argument);
  EXPECT_TRUE(call.engine.same_as(before));
}

TEST(GoodInput, IsCompressed) {
  Call call;
  auto view = call.engine.view();
  const auto report = Ems(call.options).compress(view, call.queries);
  ASSERT_TRUE(report.ok()) << report.status().detail();
  EXPECT_EQ(report->rows_before, 400);
  EXPECT_EQ(report->rows_kept, 100);
  EXPECT_GT(report->rows_merged, 0);
}

constexpr auto kInvalid = StatusCode::invalid_argument;
constexpr auto kMismatch = StatusCode::size_mismatch;
constexpr auto kNotFinite = StatusCode::not_finite;
constexpr auto kUnsupported = StatusCode::unsupported;

INSTANTIATE_TEST_SUITE_P(
    Shape, BadInputTest,
    testing::Values(
        BadInput{"NoHeads", kInvalid, "view", [](Call& c) { c.engine.shape.kv_heads = 0; }},
        BadInput{"NegativeHeads", kInvalid, "view", [](Call& c) { c.engine.shape.kv_heads = -1; }},
        BadInput{"TooManyHeads", kInvalid, "view", [](Call& c) { c.engine.shape.kv_heads = kMaxHeads + 1; }},
        BadInput{"EmptyGroup", kInvalid, "view", [](Call& c) { c.engine.shape.group_size = 0; }},
        BadInput{"GroupTooLarge", kInvalid, "view", [](Call& c) { c.engine.shape.group_size = INT64_MAX; }},
        BadInput{"TooManyQueryHeads", kInvalid, "view", [](Call& c) { c.engine.shape.group_size = kMaxHeads; }},
        BadInput{"KeysWithoutWidth", kInvalid, "view", [](Call& c) { c.engine.shape.key_dim = 0; }},
        BadInput{"ValuesWithoutWidth", kInvalid, "view", [](Call& c) { c.engine.shape.value_dim = 0; }},
        BadInput{"KeysTooWide", kInvalid, "view", [](Call& c) { c.engine.shape.key_dim = kMaxWidth + 1; }},
        BadInput{"ValuesTooWide", kInvalid, "view", [](Call& c) { c.engine.shape.value_dim = INT64_MAX; }},
        BadInput{"EmptyHead", kInvalid, "view", [](Call& c) { c.engine.rows[1] = 0; }},
        BadInput{"NegativeRows", kInvalid, "view", [](Call& c) { c.engine.rows[1] = -5; }},
        BadInput{"TooManyRows", kInvalid, "view", [](Call& c) { c.engine.rows[1] = kMaxRows + 1; }},
        BadInput{"UnsortedPositions", kInvalid, "view", [](Call& c) { c.engine.positions[250] = 3; }},
        BadInput{"UnequalHeadsInOneCount", kMismatch, "view",
                 [](Call& c) {
                   c.engine.counts = RowCounts::per_layer;
                   c.engine.rows[1] = 199;
                 }},
        BadInput{"UnequalHeadsInOneCountForAllLayers", kMismatch, "view",
                 [](Call& c) {
                   c.engine.counts = RowCounts::per_model;
                   c.engine.rows[0] = 10;
                 }}),
    name_of);

INSTANTIATE_TEST_SUITE_P(
    Options, BadInputTest,
    testing::Values(
        BadInput{"BudgetZero", kInvalid, "budget", [](Call& c) { c.options.budget.rows = 0; }},
        BadInput{"BudgetNegative", kInvalid, "budget", [](Call& c) { c.options.budget.rows = -7; }},
        BadInput{"BudgetTooLarge", kInvalid, "budget", [](Call& c) { c.options.budget.rows = kMaxRows + 1; }},
        BadInput{"FloorAboveOne", kInvalid, "floor_share", [](Call& c) { c.options.budget.floor_share = 1.5f; }},
        BadInput{"FloorNan", kInvalid, "floor_share", [](Call& c) { c.options.budget.floor_share = kNan; }},
        BadInput{"WindowZero", kInvalid, "window", [](Call& c) { c.options.score.window = 0; }},
        BadInput{"WindowTooLarge", kInvalid, "window", [](Call& c) { c.options.score.window = kMaxRows + 1; }},
        BadInput{"StrideZero", kInvalid, "query_stride", [](Call& c) { c.options.score.query_stride = 0; }},
        BadInput{"SinksNegative", kInvalid, "sinks", [](Call& c) { c.options.score.protect.sinks = -1; }},
        BadInput{"RecentTooMany", kInvalid, "recent", [](Call& c) { c.options.score.protect.recent = INT64_MAX; }},
        BadInput{"SpanWeightNegative", kInvalid, "span_weight", [](Call& c) { c.options.score.span_weight = -1.f; }},
        BadInput{"SpanWeightInfinite", kInvalid, "span_weight",
                 [](Call& c) { c.options.score.span_weight = kInfinity; }},
        BadInput{"SpanWidthZero", kInvalid, "span_width", [](Call& c) { c.options.score.span_width = 0; }},
        BadInput{"PoolEven", kInvalid, "pool",
                 [](Call& c) {
                   c.options.score.score_pool = {PoolKind::max, 2};
                 }},
        BadInput{"GammaNegative", kInvalid, "gamma", [](Call& c) { c.options.reduce.gamma = -1.f; }},
        BadInput{"GammaNan", kInvalid, "gamma", [](Call& c) { c.options.reduce.gamma = kNan; }},
        BadInput{"GammaInfinite", kInvalid, "gamma", [](Call& c) { c.options.reduce.gamma = kInfinity; }},
        BadInput{"MassShareAboveOne", kInvalid, "candidate_mass_share",
                 [](Call& c) { c.options.reduce.candidate_mass_share = 1.01f; }},
        BadInput{"TauNegative", kInvalid, "tau", [](Call& c) { c.options.reduce.assigner.tau = -0.1f; }},
        BadInput{"TauNan", kInvalid, "tau", [](Call& c) { c.options.reduce.assigner.tau = kNan; }},
        BadInput{"ExecutorWithoutWorkers", kInvalid, "executor", [](Call& c) { c.executor.workers = 0; }}),
    name_of);

// The rows that are spoilt are near the end of head 1: kept, since recent rows are.
INSTANTIATE_TEST_SUITE_P(
    Contents, BadInputTest,
    testing::Values(
        BadInput{"KeyNan", kNotFinite, "keys", [](Call& c) { c.engine.key(1, 197, 3) = kNan; }},
        BadInput{"KeyInfinite", kNotFinite, "keys", [](Call& c) { c.engine.key(1, 197, 3) = -kInfinity; }},
        BadInput{"KeyNanInTheFirstRow", kNotFinite, "keys", [](Call& c) { c.engine.key(0, 0) = kNan; }},
        BadInput{"KeyNanInALaterTile", kNotFinite, "keys", [](Call& c) { c.engine.key(1, 130) = kNan; }},
        BadInput{"ValueNan", kNotFinite, "values", [](Call& c) { c.engine.value(1, 197, 5) = kNan; }},
        BadInput{"ValueInfinite", kNotFinite, "values", [](Call& c) { c.engine.value(1, 197, 5) = kInfinity; }},
        BadInput{"QueryNan", kNotFinite, "queries", [](Call& c) { c.owned.data[500] = kNan; }},
        BadInput{"QueryInfinite", kNotFinite, "queries", [](Call& c) { c.owned.data[500] = kInfinity; }},
        BadInput{"LastQueryNan", kNotFinite, "queries", [](Call& c) { c.owned.data.back() = kNan; }},
        BadInput{"LogitsOverflow", kNotFinite, "keys",
                 [](Call& c) {
                   c.engine.key(1, 60, 0) = 1e30f;
                   for (float& x : c.owned.data) x *= 1e20f;
                 }},
        BadInput{"LogMassNan", kNotFinite, "log_mass", [](Call& c) { c.engine.log_masses[300] = kNan; }},
        BadInput{"LogMassInfinite", kNotFinite, "log_mass", [](Call& c) { c.engine.log_masses[300] = kInfinity; }}),
    name_of);

INSTANTIATE_TEST_SUITE_P(
    Queries, BadInputTest,
    testing::Values(BadInput{"NullData", kInvalid, "queries", [](Call& c) { c.queries.data = nullptr; }},
                    BadInput{"NoRows", kInvalid, "queries", [](Call& c) { c.queries.positions = {}; }},
                    BadInput{"OtherHeads", kMismatch, "queries", [](Call& c) { c.queries.query_heads = 2; }},
                    BadInput{"OtherWidth", kMismatch, "queries", [](Call& c) { c.queries.dim = 6; }},
                    BadInput{"UnsortedQueryPositions", kInvalid, "queries", [](Call& c) { c.owned.positions[5] = 0; }},
                    BadInput{"ScaleNan", kInvalid, "queries", [](Call& c) { c.queries.scale = kNan; }},
                    BadInput{"ScaleNegative", kInvalid, "queries", [](Call& c) { c.queries.scale = -1.f; }},
                    BadInput{"OverlappingRows", kInvalid, "queries", [](Call& c) { c.queries.row_stride = 7; }},
                    BadInput{"NegativeHeadStride", kInvalid, "queries", [](Call& c) { c.queries.head_stride = -1; }},
                    BadInput{"LogSumExpOfOtherSize", kMismatch, "queries",
                             [](Call& c) { c.queries.log_sum_exp = std::span(c.log_sum_exp).first(10); }},
                    BadInput{"LogSumExpNan", kNotFinite, "queries",
                             [](Call& c) {
                               c.log_sum_exp[7] = kNan;
                               c.queries.log_sum_exp = c.log_sum_exp;
                             }},
                    BadInput{"LogSumExpOfSomethingElse", kInvalid, "queries",
                             [](Call& c) {
                               c.log_sum_exp[7] = -100.f;
                               c.queries.log_sum_exp = c.log_sum_exp;
                             }}),
    name_of);

INSTANTIATE_TEST_SUITE_P(
    Capabilities, BadInputTest,
    testing::Values(
        BadInput{"NoPlaceForLogMasses", kUnsupported, "view", [](Call& c) { c.engine.log_masses.clear(); }},
        BadInput{"RotationUnknownForRotatedKeys", kUnsupported, "view",
                 [](Call& c) { c.options.reduce.key_mode = KeyMode::rotated; }},
        BadInput{"RotationUnknownForUnrotatedComparison", kUnsupported, "view",
                 [](Call& c) { c.options.reduce.assigner.key_space = ZeroClassBatcher::KeySpace::unrotated; }},
        BadInput{"RotationOfOddWidth", kInvalid, "view",
                 [](Call& c) {
                   c.options.reduce.key_mode = KeyMode::rotated;
                   c.engine.rope = {.kind = RopeKind::half_split, .rotary_dim = 5};
                 }},
        BadInput{"RotationWiderThanKeys", kInvalid, "view",
                 [](Call& c) {
                   c.options.reduce.key_mode = KeyMode::rotated;
                   c.engine.rope = {.kind = RopeKind::adjacent, .rotary_dim = 10};
                 }},
        BadInput{"RotationWithoutBase", kInvalid, "view",
                 [](Call& c) {
                   c.options.reduce.key_mode = KeyMode::rotated;
                   c.engine.rope = {.kind = RopeKind::half_split, .theta = 0.0};
                 }},
        BadInput{"FrequenciesOfOtherSize", kMismatch, "view",
                 [](Call& c) {
                   c.options.reduce.key_mode = KeyMode::rotated;
                   c.engine.rope = {.kind = RopeKind::half_split, .inv_freq = std::span(c.log_sum_exp).first(3)};
                 }},
        BadInput{"FrequenciesNan", kNotFinite, "view",
                 [](Call& c) {
                   c.options.reduce.key_mode = KeyMode::rotated;
                   c.log_sum_exp[2] = kNan;
                   c.engine.rope = {.kind = RopeKind::half_split, .inv_freq = std::span(c.log_sum_exp).first(4)};
                 }}),
    name_of);

TEST(BadRows, AreNamedByHeadAndRow) {
  Call call;
  call.engine.positions[250] = 3;
  std::vector<std::byte> workspace(1u << 20);
  const Status status = Ems(call.options).plan(call.engine.view(), call.queries, workspace, call.executor).status();
  EXPECT_EQ(status.head(), 1);
  EXPECT_EQ(status.row(), 50);
}

TEST(BadRows, OverflowWithinALogitIsNoticedInAnyQueryHead) {
  for (Index query_head = 0; query_head < 4; ++query_head) {
    Call call;  // logits of infinity minus infinity, for one query head and one row
    call.engine.key(query_head / 2, 60, 0) = 1e30f;
    call.engine.key(query_head / 2, 60, 1) = 1e30f;
    float* query = call.owned.data.data() + query_head * 40 * 8 + 35 * 8;
    query[0] = 1e30f;
    query[1] = -1e30f;
    std::vector<std::byte> workspace(4u << 20);
    const Status status = Ems(call.options).plan(call.engine.view(), call.queries, workspace, call.executor).status();
    expect_status(status, kNotFinite, "keys", std::to_string(query_head));
  }
}

TEST(BadRows, MethodsThatLookAtNoContentsMoveThemAsTheyAre) {
  Call call;
  call.engine.key(1, 197, 3) = kNan;
  call.engine.value(0, 0, 2) = kInfinity;
  const Engine before = call.engine;
  auto view = call.engine.view();
  ASSERT_TRUE(StreamingLlm({.score = {.sinks = 4}, .budget = {.rows = 20}}).compress(view, NoEvidence{}).ok());
  ASSERT_EQ(call.engine.rows, (std::vector<Index>{20, 20}));
  Engine expected = before;
  for (Index h = 0; h < 2; ++h) {
    for (Index t = 4; t < 20; ++t) {
      std::copy_n(&expected.key(h, t + 180), 8, &expected.key(h, t));
      std::copy_n(&expected.value(h, t + 180), 6, &expected.value(h, t));
    }
  }
  EXPECT_TRUE(same_bytes(call.engine.keys, expected.keys));
  EXPECT_TRUE(same_bytes(call.engine.values, expected.values));
}

// --- Other evidence ---------------------------------------------------------------------------------------------------

/// Column sums of two heads with 200 rows each.
struct Columns {
  std::vector<Index> offset{0, 200, 400};
  std::vector<float> global = std::vector<float>(800, 1.f), local = std::vector<float>(800, 0.5f);
  ColumnSums sums{
      .detail = ColumnDetail::query_head, .offset = offset, .global = global, .local = local, .seen = {}, .window = 16};
};

template <class Evidence>
Status status_with(Call& call, const Evidence& evidence) {
  const Engine before = call.engine;
  auto view = call.engine.view();
  const Status status = Ems(call.options).compress(view, evidence).status();
  EXPECT_TRUE(status.ok() || call.engine.same_as(before));
  return status;
}

TEST(BadColumnSums, AreRefusedByNameAndNothingIsWritten) {
  struct Case {
    const char* what;
    StatusCode code;
    std::function<void(Columns&)> spoil;
  };
  const Case cases[] = {
      {"layer", kUnsupported, [](Columns& c) { c.sums.detail = ColumnDetail::layer; }},
      {"averaged over the group", kUnsupported, [](Columns& c) { c.sums.detail = ColumnDetail::kv_head; }},
      {"other heads", kMismatch, [](Columns& c) { c.sums.offset = c.sums.offset.first(2); }},
      {"other rows", kMismatch, [](Columns& c) { c.offset[1] = 199; }},
      {"too few", kMismatch, [](Columns& c) { c.sums.global = c.sums.global.first(799); }},
      {"local too few", kMismatch, [](Columns& c) { c.sums.local = c.sums.local.first(400); }},
      {"no local", kUnsupported, [](Columns& c) { c.sums.local = {}; }},
      {"another window", kUnsupported, [](Columns& c) { c.sums.window = 17; }},
      {"global NaN", kNotFinite, [](Columns& c) { c.global[799] = kNan; }},
      {"local infinite", kNotFinite, [](Columns& c) { c.local[0] = kInfinity; }},
  };
  Call good;
  EXPECT_TRUE(status_with(good, Columns().sums).ok());
  for (const Case& bad : cases) {
    Call call;
    Columns columns;
    bad.spoil(columns);
    const Status status = status_with(call, columns.sums);
    expect_status(status, bad.code, "evidence", bad.what);
  }
}

// Column sums need no look at the keys, but log masses of merged rows add up.
TEST(BadColumnSums, LogMassesThatAreNotFiniteAreRefusedThereToo) {
  for (const float bad : {kNan, kInfinity}) {
    Call call;
    std::fill(call.engine.log_masses.begin(), call.engine.log_masses.end(), bad);
    expect_status(status_with(call, Columns().sums), kNotFinite, "log_mass");
  }
}

TEST(BadAttentionWeights, AreRefusedByNameAndNothingIsWritten) {
  struct Case {
    const char* what;
    StatusCode code;
    std::function<void(AttentionWeights&, std::vector<float>&)> spoil;
  };
  const Case cases[] = {
      {"null", kInvalid, [](AttentionWeights& w, std::vector<float>&) { w.data = nullptr; }},
      {"other heads", kMismatch, [](AttentionWeights& w, std::vector<float>&) { w.query_heads = 2; }},
      {"no rows", kInvalid, [](AttentionWeights& w, std::vector<float>&) { w.rows = 0; }},
      {"short rows", kMismatch, [](AttentionWeights& w, std::vector<float>&) { w.row_stride = 199; }},
      {"NaN", kNotFinite, [](AttentionWeights&, std::vector<float>& data) { data.back() = kNan; }},
  };
  for (const Case& bad : cases) {
    Call call;
    std::vector<float> data(4 * 20 * 200, 1.f / 200.f);
    AttentionWeights weights{
        .data = data.data(), .query_heads = 4, .rows = 20, .head_stride = 20 * 200, .row_stride = 200};
    EXPECT_TRUE(status_with(call, weights).ok());
    Call again;
    bad.spoil(weights, data);
    const Status status = status_with(again, weights);
    expect_status(status, bad.code, "weights", bad.what);
  }
}

TEST(Window, LongerThanTheSequenceIsClippedToIt) {
  const auto kept_with = [](Index window) {
    Engine engine({.kv_heads = 2, .group_size = 2, .key_dim = 8, .value_dim = 6}, 60);
    const auto owned = test::make_queries(engine.shape, 60, 60);
    auto view = engine.view();
    const auto report =
        Ems({.score = {.window = window}, .budget = {.rows = 20}, .reduce = {}}).compress(view, owned.view());
    EXPECT_TRUE(report.ok()) << window;
    return engine;
  };
  EXPECT_TRUE(kept_with(61).same_as(kept_with(60)));
  EXPECT_TRUE(kept_with(kMaxRows).same_as(kept_with(60)));
}

TEST(Window, OfSnapKvThatCoversTheSequenceKeepsTheLatestRows) {
  Engine engine({.kv_heads = 1, .group_size = 1, .key_dim = 8, .value_dim = 6}, 60);
  const auto owned = test::make_queries(engine.shape, 60, 60);
  auto view = engine.view();
  ASSERT_TRUE(SnapKv({.score = {.window = 1000}, .budget = {.rows = 20}}).compress(view, owned.view()).ok());
  EXPECT_EQ(engine.rows[0], 20);
  EXPECT_EQ(engine.positions[0], 40);
  EXPECT_EQ(engine.positions[19], 59);
}

TEST(Budget, LargerThanTheCacheKeepsEverythingAsItIs) {
  Call call;
  call.options.budget.rows = kMaxRows;
  const Engine before = call.engine;
  auto view = call.engine.view();
  ASSERT_TRUE(Ems(call.options).compress(view, call.queries).ok());
  EXPECT_TRUE(call.engine.same_as(before));
}

// --- Plans ------------------------------------------------------------------------------------------------------------

/// A plan with tables of its own, each just as long as it has to be.
struct OwnPlan {
  CompressionPlan plan;
  std::vector<Index> source_rows, kept_offset, merged_offset;
  std::vector<RowId> kept;
  std::vector<MergedRow> merged;
  std::vector<float> merged_values, merged_keys;

  explicit OwnPlan(const CompressionPlan& from)
      : plan(from),
        source_rows(from.source_rows.begin(), from.source_rows.end()),
        kept_offset(from.kept_offset.begin(), from.kept_offset.end()),
        merged_offset(from.merged_offset.begin(), from.merged_offset.end()),
        kept(from.kept.begin(), from.kept.end()),
        merged(from.merged.begin(), from.merged.end()),
        merged_values(from.merged_values.begin(), from.merged_values.end()),
        merged_keys(from.merged_keys.begin(), from.merged_keys.end()) {}

  [[nodiscard]] CompressionPlan get() const {
    CompressionPlan p = plan;
    p.source_rows = source_rows;
    p.kept_offset = kept_offset;
    p.kept = kept;
    p.merged_offset = merged_offset;
    p.merged = merged;
    p.merged_values = merged_values;
    p.merged_keys = merged_keys;
    return p;
  }
};

class PlanTest : public testing::Test {
 protected:
  PlanTest() : workspace_(4u << 20) { call_.options.reduce.key_mode = KeyMode::direction; }

  OwnPlan good_plan() {
    const auto made = Ems(call_.options).plan(call_.engine.view(), call_.queries, workspace_, call_.executor);
    EXPECT_TRUE(made.ok());
    OwnPlan own(made.value());
    EXPECT_GE(own.merged_offset[1], 2) << "the cases need merged rows in head 0";
    return own;
  }
  void expect_refused(const OwnPlan& plan, StatusCode code, const char* argument, const char* what) {
    const Engine before = call_.engine;
    auto view = call_.engine.view();
    const Status status = apply(plan.get(), view).status();
    expect_status(status, code, argument, what);
    EXPECT_TRUE(call_.engine.same_as(before)) << what;
  }

  Call call_;
  std::vector<std::byte> workspace_;
};

TEST_F(PlanTest, AppliesOnce) {
  const OwnPlan plan = good_plan();
  auto view = call_.engine.view();
  ASSERT_TRUE(apply(plan.get(), view).ok());
  expect_refused(plan, kMismatch, "plan", "the cache has other rows now");
}

TEST_F(PlanTest, IsRefusedByACacheThatHasChanged) {
  const OwnPlan plan = good_plan();
  call_.engine.rows[1] -= 1;
  expect_refused(plan, kMismatch, "plan", "one row less");
}

TEST_F(PlanTest, IsRefusedByACacheOfAnotherShape) {
  const OwnPlan plan = good_plan();
  const LayerShape shape = call_.engine.shape;
  call_.engine.shape = {.kv_heads = 1, .group_size = 4, .key_dim = 8, .value_dim = 6};
  expect_refused(plan, kMismatch, "plan", "other heads");
  call_.engine.shape = shape;
  call_.engine.shape.group_size = 1;
  expect_refused(plan, kMismatch, "plan", "other groups");
  call_.engine.shape = {.kv_heads = 2, .group_size = 2, .key_dim = 6, .value_dim = 8};
  expect_refused(plan, kMismatch, "plan", "other widths");
  call_.engine.shape = {};
  expect_refused(plan, kMismatch, "plan", "no shape");
}

TEST_F(PlanTest, OfUnequalHeadsIsRefusedByStorageWithOneCount) {
  const OwnPlan plan = good_plan();
  ASSERT_NE(plan.kept_offset[1] * 2, plan.kept_offset[2]) << "adaptive budgets differ";
  call_.engine.counts = RowCounts::per_layer;
  expect_refused(plan, kUnsupported, "plan", "unequal counts");
}

TEST_F(PlanTest, WithLogMassesIsRefusedWhereThereIsNoPlaceForThem) {
  const OwnPlan plan = good_plan();
  call_.engine.log_masses.clear();
  expect_refused(plan, kUnsupported, "view", "no place");
}

TEST_F(PlanTest, ThatWasTamperedWithIsRefused) {
  struct Case {
    const char* what;
    std::function<void(OwnPlan&)> tamper;
  };
  const auto last = [](OwnPlan& p) -> RowId& { return p.kept.back(); };
  const Case cases[] = {
      {"kept rows descend", [](OwnPlan& p) { std::swap(p.kept[3], p.kept[4]); }},
      {"a kept row twice", [](OwnPlan& p) { p.kept[4] = p.kept[3]; }},
      {"a kept row beyond the head", [&](OwnPlan& p) { last(p) = 200; }},
      {"a kept row far beyond", [&](OwnPlan& p) { last(p) = std::numeric_limits<RowId>::max(); }},
      {"a negative kept row", [](OwnPlan& p) { p.kept[0] = -1; }},
      {"slots descend", [](OwnPlan& p) { std::swap(p.merged[0], p.merged[1]); }},
      {"a slot twice", [](OwnPlan& p) { p.merged[1].slot = p.merged[0].slot; }},
      {"a slot beyond the kept rows", [](OwnPlan& p) { p.merged.back().slot = 400; }},
      {"a negative slot", [](OwnPlan& p) { p.merged[0].slot = -1; }},
      {"kept offsets do not start at 0", [](OwnPlan& p) { p.kept_offset[0] = 1; }},
      {"kept offsets descend", [](OwnPlan& p) { p.kept_offset[1] = p.kept_offset[2] + 1; }},
      {"kept offsets far outside", [](OwnPlan& p) { p.kept_offset[1] = Index{1} << 40; }},
      {"kept offsets end beyond rows that ascend",
       [](OwnPlan& p) {
         std::iota(p.kept.begin(), p.kept.end(), 0);
         p.kept_offset[1] = p.kept_offset[2] + 50;
       }},
      {"kept offsets negative", [](OwnPlan& p) { p.kept_offset[1] = -1; }},
      {"kept offsets end early", [](OwnPlan& p) { --p.kept_offset[2]; }},
      {"merged offsets do not start at 0", [](OwnPlan& p) { p.merged_offset[0] = -1; }},
      {"merged offsets descend", [](OwnPlan& p) { p.merged_offset[1] = p.merged_offset[2] + 1; }},
      {"merged offsets far outside", [](OwnPlan& p) { p.merged_offset[1] = Index{1} << 40; }},
      {"merged offsets end late", [](OwnPlan& p) { ++p.merged_offset[2]; }},
      {"values too few", [](OwnPlan& p) { p.merged_values.pop_back(); }},
      {"keys too few", [](OwnPlan& p) { p.merged_keys.pop_back(); }},
  };
  for (const Case& bad : cases) {
    OwnPlan plan = good_plan();
    bad.tamper(plan);
    expect_refused(plan, kInvalid, "plan", bad.what);
  }
}

TEST_F(PlanTest, WithTablesOfOtherHeadsIsRefused) {
  OwnPlan plan = good_plan();
  plan.source_rows.pop_back();
  expect_refused(plan, kMismatch, "plan", "source rows");
  plan = good_plan();
  plan.kept_offset.pop_back();
  expect_refused(plan, kMismatch, "plan", "kept offsets");
  plan = good_plan();
  plan.merged_offset.push_back(0);
  expect_refused(plan, kMismatch, "plan", "merged offsets");
}

// --- attend and the accumulator ---------------------------------------------------------------------------------------

TEST(BadAttendCalls, AreRefusedByNameAndNothingIsWritten) {
  struct Attend {
    Call call;
    std::vector<float> data = std::vector<float>(4 * 40 * 6, 7.f), sums = std::vector<float>(4 * 40, 7.f);
    AttentionOutput out{data.data(), 40 * 6, 6, sums};
    std::vector<std::byte> workspace = std::vector<std::byte>(1u << 20);
  };
  struct Case {
    const char* what;
    StatusCode code;
    const char* argument;
    std::function<void(Attend&)> spoil;
  };
  const Case cases[] = {
      {"no heads", kInvalid, "view", [](Attend& a) { a.call.engine.shape.kv_heads = 0; }},
      {"an empty head", kInvalid, "view", [](Attend& a) { a.call.engine.rows[1] = 0; }},
      {"null queries", kInvalid, "queries", [](Attend& a) { a.call.queries.data = nullptr; }},
      {"queries of other heads", kMismatch, "queries", [](Attend& a) { a.call.queries.query_heads = 3; }},
      {"a query that sees nothing", kInvalid, "queries", [](Attend& a) { a.call.owned.positions[0] = -1; }},
      {"null output", kInvalid, "out", [](Attend& a) { a.out.data = nullptr; }},
      {"output rows that overlap", kInvalid, "out", [](Attend& a) { a.out.row_stride = 5; }},
      {"log-sum-exps of other size", kMismatch, "out",
       [](Attend& a) { a.out.log_sum_exp = a.out.log_sum_exp.first(3); }},
      {"no workers", kInvalid, "executor", [](Attend& a) { a.call.executor.workers = 0; }},
      {"no workspace", StatusCode::workspace_too_small, "workspace", [](Attend& a) { a.workspace.clear(); }},
  };
  for (const Case& bad : cases) {
    Attend a;
    bad.spoil(a);
    const Status status = attend(a.call.engine.view(), a.call.queries, a.out, a.workspace, a.call.executor);
    expect_status(status, bad.code, bad.argument, bad.what);
    EXPECT_EQ(std::count(a.data.begin(), a.data.end(), 7.f), 4 * 40 * 6) << bad.what;
    EXPECT_EQ(std::count(a.sums.begin(), a.sums.end(), 7.f), 4 * 40) << bad.what;
  }
}

TEST(BadAccumulators, AreNotMade) {
  const LayerShape good{.kv_heads = 2, .group_size = 2, .key_dim = 8, .value_dim = 6};
  struct Case {
    const char* argument;
    LayerShape shape;
    Index max_rows;
    GlobalLocalAccumulator::Options options;
  };
  const Case cases[] = {
      {"shape", {0, 2, 8, 6}, 100, {}},
      {"shape", {-1, 2, 8, 6}, 100, {}},
      {"shape", {2, 0, 8, 6}, 100, {}},
      {"shape", {2, 2, 0, 6}, 100, {}},
      {"shape", {kMaxHeads + 1, 1, 8, 6}, 100, {}},
      {"shape", {2, kMaxHeads, 8, 6}, 100, {}},
      {"shape", {4, Index{1} << 62, 8, 6}, 100, {}},
      {"shape", {2, 2, kMaxWidth + 1, 6}, 100, {}},
      {"max_rows", good, 0, {}},
      {"max_rows", good, kMaxRows + 1, {}},
      {"window", good, 100, {.window = 0}},
      {"query_stride", good, 100, {.query_stride = -1}},
  };
  for (const Case& bad : cases) {
    const Status status = GlobalLocalAccumulator::create(bad.shape, bad.max_rows, bad.options).status();
    expect_status(status, kInvalid, bad.argument);
  }
}

class AccumulatorTest : public testing::Test {
 protected:
  AccumulatorTest()
      : accumulator_(GlobalLocalAccumulator::create(call_.engine.shape, call_.engine.capacity, {.window = 16}).value()),
        workspace_(4u << 20) {}

  Status observe(const QueryRows& queries) {
    return accumulator_.observe(call_.engine.view(), queries, workspace_, call_.executor);
  }
  std::vector<float> sums() {
    const auto made = accumulator_.summarize(call_.engine.view(), workspace_, call_.executor);
    EXPECT_TRUE(made.ok());
    return {made->global.begin(), made->global.end()};
  }
  Call call_;
  GlobalLocalAccumulator accumulator_;
  std::vector<std::byte> workspace_;
};

TEST_F(AccumulatorTest, WhatItRefusesLeavesItAsItWas) {
  ASSERT_TRUE(observe(call_.queries).ok());
  const std::vector<float> before = sums();
  const auto more = test::make_queries(call_.engine.shape, 3, call_.engine.capacity + 3, 9);
  const auto expect_unchanged = [&] {
    EXPECT_EQ(accumulator_.observed_queries(), 40);
    EXPECT_TRUE(same_bytes(sums(), before));
  };

  auto earlier = more;
  earlier.positions = {5, 6, 7};
  expect_status(observe(earlier.view()), kInvalid, "queries");
  expect_unchanged();

  QueryRows scaled = more.view();
  scaled.scale = 0.5f;
  expect_status(observe(scaled), kInvalid, "queries");
  expect_unchanged();

  for (std::size_t place = 0; place < more.data.size(); ++place) {
    auto bad = more;
    bad.data[place] = place % 2 == 0 ? kNan : kInfinity;
    expect_status(observe(bad.view()), kNotFinite, "queries");
  }
  expect_unchanged();

  const Engine healthy = call_.engine;
  call_.engine.key(1, 7) = kNan;
  expect_status(observe(more.view()), kNotFinite, "keys");
  call_.engine = healthy;
  expect_unchanged();

  call_.engine.rows[1] -= 1;
  expect_status(observe(more.view()), kMismatch, "view");
  call_.engine = healthy;
  expect_unchanged();

  call_.engine.shape.group_size = 1;
  expect_status(observe(more.view()), kMismatch, "view");
  call_.engine = healthy;
  expect_unchanged();

  expect_status(accumulator_.observe(call_.engine.view(), more.view(), Workspace{}, call_.executor),
                StatusCode::workspace_too_small, "workspace");
  expect_unchanged();
}

TEST_F(AccumulatorTest, RefusesExecutorsWithoutWorkers) {
  ASSERT_TRUE(observe(call_.queries).ok());
  const auto more = test::make_queries(call_.engine.shape, 3, call_.engine.capacity + 3, 9);
  call_.executor.workers = 0;
  expect_status(observe(more.view()), kInvalid, "executor");
  expect_status(accumulator_.summarize(call_.engine.view(), workspace_, call_.executor).status(), kInvalid, "executor");
}

TEST_F(AccumulatorTest, RefusesCachesWithMoreRowsThanItWasMadeFor) {
  accumulator_ = GlobalLocalAccumulator::create(call_.engine.shape, call_.engine.capacity - 1, {.window = 16}).value();
  expect_status(observe(call_.queries), kMismatch, "view");
}

TEST_F(AccumulatorTest, HasNothingToSummarizeBeforeItHasObserved) {
  expect_status(accumulator_.summarize(call_.engine.view(), workspace_, call_.executor).status(), kInvalid, "evidence");
}

// --- Workspaces -------------------------------------------------------------------------------------------------------

/// `bytes` bytes at some misalignment, between guards, filled with what would be NaNs and huge numbers.
class GuardedWorkspace {
 public:
  GuardedWorkspace(std::size_t bytes, std::size_t misalignment, int fill)
      : memory_(bytes + 4 * kGuard, kGuardByte), bytes_(bytes) {
    const auto address = reinterpret_cast<std::uintptr_t>(memory_.data());
    start_ = kGuard + (64 - (address + kGuard) % 64) % 64 + misalignment;
    std::fill_n(memory_.begin() + static_cast<std::ptrdiff_t>(start_), bytes_, std::byte(fill));
  }
  [[nodiscard]] Workspace get() { return Workspace(memory_).subspan(start_, bytes_); }
  [[nodiscard]] bool guards_untouched() const {
    const auto is_guard = [](std::byte b) { return b == kGuardByte; };
    return std::all_of(memory_.begin(), memory_.begin() + static_cast<std::ptrdiff_t>(start_), is_guard) &&
           std::all_of(memory_.begin() + static_cast<std::ptrdiff_t>(start_ + bytes_), memory_.end(), is_guard);
  }

 private:
  static constexpr std::size_t kGuard = 64;
  static constexpr std::byte kGuardByte{0xa5};
  std::vector<std::byte> memory_;
  std::size_t bytes_, start_ = 0;
};

/// The plan as data, to compare.
struct PlanCopy {
  std::vector<RowId> kept;
  std::vector<float> values, keys, masses;
  explicit PlanCopy(const CompressionPlan& plan)
      : kept(plan.kept.begin(), plan.kept.end()),
        values(plan.merged_values.begin(), plan.merged_values.end()),
        keys(plan.merged_keys.begin(), plan.merged_keys.end()) {
    for (const MergedRow& row : plan.merged) masses.push_back(row.log_mass);
  }
  [[nodiscard]] bool same_as(const PlanCopy& other) const {
    return kept == other.kept && same_bytes(values, other.values) && same_bytes(keys, other.keys) &&
           same_bytes(masses, other.masses);
  }
};

/// Plans in exactly the bytes that were asked for: enough wherever they start, whatever is in them, and no fewer will do.
template <class Method>
void expect_workspace_is_exact(const Method& method, Engine& engine, const QueryRows& queries, Index workers,
                               std::size_t misalignment) {
  const Boasting executor{workers};
  const auto asked = method.workspace_bytes(engine.view(), queries, workers);
  ASSERT_TRUE(asked.ok()) << asked.status().detail();
  GuardedWorkspace ones(asked.value(), misalignment, 0xff), zeros(asked.value(), 0, 0);
  const auto plan = method.plan(engine.view(), queries, ones.get(), executor);
  ASSERT_TRUE(plan.ok()) << plan.status().detail();
  const PlanCopy copy(plan.value());
  EXPECT_TRUE(ones.guards_untouched());
  const auto again = method.plan(engine.view(), queries, zeros.get(), executor);
  ASSERT_TRUE(again.ok());
  EXPECT_TRUE(copy.same_as(PlanCopy(again.value()))) << "the plan depends on what was in the workspace";
  EXPECT_TRUE(zeros.guards_untouched());

  // All but the bytes that align the start are needed.
  GuardedWorkspace least(asked.value() - 64, 0, 0xff), too_small(asked.value() - 65, 0, 0xff);
  EXPECT_TRUE(method.plan(engine.view(), queries, least.get(), executor).ok());
  EXPECT_TRUE(least.guards_untouched());
  const Status refused = method.plan(engine.view(), queries, too_small.get(), executor).status();
  expect_status(refused, StatusCode::workspace_too_small, "workspace");
  EXPECT_TRUE(too_small.guards_untouched());
}

TEST(WorkspaceTest, OfTheSizeAskedForIsEnoughForAnyShapeAndOptions) {
  test::Random random(5);
  for (int round = 0; round < 60; ++round) {
    SCOPED_TRACE(round);
    const LayerShape shape{.kv_heads = 1 + random.below(4),
                           .group_size = 1 + random.below(4),
                           .key_dim = 2 * (1 + random.below(20)),
                           .value_dim = 1 + random.below(40)};
    Engine engine(shape, 1 + random.below(300), static_cast<std::uint64_t>(round));
    for (Index& rows : engine.rows) rows = 1 + random.below(engine.capacity);
    engine.rope.kind = RopeKind::half_split;
    if (random.below(4) == 0) {
      engine.counts = random.below(2) == 0 ? RowCounts::per_layer : RowCounts::per_model;
      std::fill(engine.rows.begin(), engine.rows.end(), engine.capacity);
    }
    const auto owned = test::make_queries(shape, 1 + random.below(50), engine.capacity + 50);
    const Index workers = 1 + random.below(4);
    const auto misalignment = static_cast<std::size_t>(random.below(64));
    const Index budget = 1 + random.below(engine.capacity + 10);
    const GlobalLocalScorer::Options score{
        .window = 1 + random.below(60),
        .group = random.below(2) == 0 ? GroupReduction::max : GroupReduction::mean,
        .query_stride = 1 + random.below(3),
        .local_pool = {random.below(2) == 0 ? PoolKind::none : PoolKind::average, 3}};
    expect_workspace_is_exact(Ems({.score = score,
                                   .budget = {.rows = budget, .floor_share = static_cast<float>(random.uniform())},
                                   .reduce = {.gamma = static_cast<float>(4.0 * random.uniform()),
                                              .candidate_mass_share = random.below(2) == 0 ? 0.f : 0.9f,
                                              .key_mode = static_cast<KeyMode>(random.below(3)),
                                              .mass_mode = static_cast<MassMode>(random.below(3)),
                                              .sinks_absorb = random.below(2) == 0,
                                              .recent_absorb = random.below(2) == 0,
                                              .assigner = {.tau = static_cast<float>(random.uniform())}}}),
                              engine, owned.view(), workers, misalignment);
    expect_workspace_is_exact(EmsEvict({.score = score, .budget = {.rows = budget}, .reduce = {}}), engine,
                              owned.view(), workers, misalignment);
    expect_workspace_is_exact(H2o({.score = {.recent = 3}, .budget = {.rows = budget}, .reduce = {}}), engine,
                              owned.view(), workers, misalignment);
  }
}

TEST(WorkspaceTest, NullIsRefusedAndNothingIsWritten) {
  Call call;
  const Engine before = call.engine;
  auto view = call.engine.view();
  const Status status = Ems(call.options).compress(view, call.queries, Workspace{}, call.executor).status();
  expect_status(status, StatusCode::workspace_too_small, "workspace");
  EXPECT_TRUE(call.engine.same_as(before));
}

TEST(WorkspaceTest, SizesAreRefusedForWhatPlanRefuses) {
  Call call;
  const auto bytes = [&](Index workers) {
    return Ems(call.options).workspace_bytes(call.engine.view(), call.queries, workers);
  };
  EXPECT_TRUE(bytes(1).ok());
  EXPECT_EQ(bytes(0).status().argument(), "executor");
  call.engine.rows[0] = 0;
  EXPECT_EQ(bytes(1).status().argument(), "view");
  call.options.budget.rows = 0;
  EXPECT_EQ(bytes(1).status().argument(), "budget");
}

TEST(WorkspaceTest, OfAttendIsExactToo) {
  Call call;
  std::vector<float> out(4 * 40 * 6);
  for (const Index workers : {1, 3}) {
    const std::size_t bytes = attend_workspace_bytes(call.engine.shape, workers);
    const Boasting executor{workers};
    for (const std::size_t misalignment : {0u, 1u, 63u}) {
      GuardedWorkspace enough(bytes, misalignment, 0xff);
      EXPECT_TRUE(attend(call.engine.view(), call.queries, {out.data(), 240, 6}, enough.get(), executor).ok());
      EXPECT_TRUE(enough.guards_untouched());
      EXPECT_TRUE(std::all_of(out.begin(), out.end(), [](float x) { return std::isfinite(x); }));
    }
    GuardedWorkspace too_small(bytes - 65, 0, 0xff);
    EXPECT_EQ(attend(call.engine.view(), call.queries, {out.data(), 240, 6}, too_small.get(), executor).code(),
              StatusCode::workspace_too_small);
  }
}

TEST(WorkspaceTest, OfTheAccumulatorIsExactToo) {
  Call call;
  auto accumulator = GlobalLocalAccumulator::create(call.engine.shape, 200, {.window = 16}).value();
  for (const Index workers : {1, 3}) {
    const std::size_t bytes = accumulator.workspace_bytes(200, workers);
    const Boasting executor{workers};
    accumulator.reset();
    GuardedWorkspace enough(bytes, 13, 0xff), too_small(bytes - 65, 0, 0xff);
    ASSERT_TRUE(accumulator.observe(call.engine.view(), call.queries, enough.get(), executor).ok());
    ASSERT_TRUE(accumulator.summarize(call.engine.view(), enough.get(), executor).ok());
    EXPECT_TRUE(enough.guards_untouched());
    EXPECT_EQ(accumulator.summarize(call.engine.view(), too_small.get(), executor).status().code(),
              StatusCode::workspace_too_small);
  }
}

}  // namespace
}  // namespace kvfold
