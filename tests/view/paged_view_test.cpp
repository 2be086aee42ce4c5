// Rows in the pages of a pool: every layout reads, moves and compresses as contiguous rows do; bad tables are refused before
// anything is read.
#include <kvfold/attend.hpp>
#include <kvfold/compressor.hpp>
#include <kvfold/view/paged.hpp>

#include <algorithm>
#include <bit>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <ostream>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include <gtest/gtest.h>

#include "builders.hpp"
#include "merge_oracle.hpp"
#include "paged_engine.hpp"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace kvfold::test {
namespace {

constexpr LayerShape kShape{.kv_heads = 3, .group_size = 2, .key_dim = 8, .value_dim = 8};
constexpr Index kRows = 100;
constexpr Index kPageSize = 16;

// --- Strides -----------------------------------------------------------------------------------------------------------

/// The places of a page, listed by the order of axes that an engine's documentation gives, first one slowest.
bool is_row_major(const PageStrides& s, std::vector<std::pair<Index, Index>> stride_and_count) {
  Index next = 1;
  for (auto axis = stride_and_count.rbegin(); axis != stride_and_count.rend(); ++axis) {
    if (axis->first != next) return false;
    next *= axis->second;
  }
  return s.page == next;
}

TEST(PageStrides, AreThoseOfTheLayoutsThatEnginesHave) {
  constexpr Index P = 16, H = 3, D = 8;
  const auto both = PageHolds::keys_and_values;
  PageStrides s = PageStrides::token_major(P, H, D);
  EXPECT_TRUE(is_row_major(s, {{s.token, P}, {s.head, H}, {s.dim, D}}));
  s = PageStrides::head_major(P, H, D);
  EXPECT_TRUE(is_row_major(s, {{s.head, H}, {s.token, P}, {s.dim, D}}));
  s = PageStrides::transposed(P, H, D);
  EXPECT_TRUE(is_row_major(s, {{s.head, H}, {s.dim, D}, {s.token, P}}));
  s = PageStrides::one_head(P, D);
  EXPECT_TRUE(is_row_major(s, {{s.token, P}, {s.dim, D}}));
  EXPECT_EQ(s.head, 0);
  s = PageStrides::token_major(P, H, D, both);
  EXPECT_TRUE(is_row_major(s, {{s.second_half(), 2}, {s.token, P}, {s.head, H}, {s.dim, D}}));
  s = PageStrides::head_major(P, H, D, both);
  EXPECT_TRUE(is_row_major(s, {{s.second_half(), 2}, {s.head, H}, {s.token, P}, {s.dim, D}}));
  s = PageStrides::transposed(P, H, D, both);
  EXPECT_TRUE(is_row_major(s, {{s.second_half(), 2}, {s.head, H}, {s.dim, D}, {s.token, P}}));
  s = PageStrides::one_head(P, D, both);
  EXPECT_TRUE(is_row_major(s, {{s.second_half(), 2}, {s.token, P}, {s.dim, D}}));
}

// --- Every layout --------------------------------------------------------------------------------------------------

template <class E, class L>
struct Case {
  using Element = E;
  using Layout = L;
};

struct CaseName {
  template <class C>
  static std::string GetName(int i) {  // NOLINT(readability-identifier-naming): GoogleTest's
    constexpr const char* layouts[] = {"FlashInferNhd",  "FlashInferHnd",   "OnnxRuntimeGenAi",
                                       "OpenVinoCpu",    "OpenVinoGpu",     "TensorRtLlm",
                                       "VllmKvCompress", "OneHeadCombined", "TablesOverWholePages"};
    return std::string(layouts[i % 9]) + (std::same_as<typename C::Element, float> ? "F32" : "F16");
  }
};
using Cases =
    testing::Types<Case<float, FlashInferNhd>, Case<float, FlashInferHnd>, Case<float, OnnxRuntimeGenAi>,
                   Case<float, OpenVinoCpu>, Case<float, OpenVinoGpu>, Case<float, TensorRtLlm>,
                   Case<float, VllmKvCompress>, Case<float, OneHeadCombined>, Case<float, TablesOverWholePages>,
                   Case<Float16, FlashInferNhd>, Case<Float16, FlashInferHnd>, Case<Float16, OnnxRuntimeGenAi>,
                   Case<Float16, OpenVinoCpu>, Case<Float16, OpenVinoGpu>, Case<Float16, TensorRtLlm>,
                   Case<Float16, VllmKvCompress>, Case<Float16, OneHeadCombined>, Case<Float16, TablesOverWholePages>>;

template <class C>
class EveryPageLayout : public testing::Test {
 protected:
  using E = typename C::Element;
  using Engine = PagedEngine<E, typename C::Layout>;

  RaggedCache<E> cache = make_cache<E>(kShape, kRows);
  OwnedQueries queries = make_queries(kShape, 40, kRows);

  /// Heads of 100, 83 and 64 rows, which ends a page; some rows stand for several already.
  EveryPageLayout() {
    cache.resize(1, 83);
    cache.resize(2, 64);
    for (Index h = 0; h < kShape.kv_heads; ++h) {
      for (Index t = 0; t < cache.size(h); t += 3) cache.write_log_mass(h, t, 0.01f * static_cast<float>(t + h));
    }
  }

  template <class View>
  static void expect_same_rows(const View& view, const RaggedCache<E>& wanted) {
    for (Index h = 0; h < kShape.kv_heads; ++h) {
      const OracleHead got = read_head(view, h), ragged = read_head(wanted, h);
      ASSERT_EQ(got.positions, ragged.positions) << h;
      EXPECT_EQ(got.keys, ragged.keys) << h;
      EXPECT_EQ(got.values, ragged.values) << h;
      EXPECT_EQ(got.log_masses, ragged.log_masses) << h;
    }
  }
};
TYPED_TEST_SUITE(EveryPageLayout, Cases, CaseName);

TYPED_TEST(EveryPageLayout, ModelsTheWholeContract) {
  using View = PagedView<typename TypeParam::Element>;
  static_assert(MutableKVCacheView<View> && HasWritableLogMass<View> && MayLackLogMass<View> && HasRope<View>);
  static_assert(HasRowBytes<View> && HasRowCounts<View> && HasContiguousRows<View> && HasOwnCheck<View>);
  static_assert(!HasLiveBytes<View>, "the pool is the engine's");
  using Const = PagedView<const typename TypeParam::Element>;
  static_assert(KVCacheView<Const> && !MutableKVCacheView<Const>);
  typename TestFixture::Engine engine(this->cache, kPageSize);
  const auto view = engine.view();
  EXPECT_TRUE(view.check().ok()) << view.check().argument() << ": " << view.check().detail();
  EXPECT_EQ(view.shape(), kShape);
  EXPECT_EQ(view.row_bytes(0), 16 * static_cast<Index>(sizeof(typename TypeParam::Element)));
  EXPECT_EQ(view.pages_used(0), 7);
  EXPECT_EQ(view.pages_used(2), 4);
}

TYPED_TEST(EveryPageLayout, ReadsAnyRunOfRows) {
  for (const Index page_size : {1, 3, 16, 32, 128}) {
    if (page_size == 1) {  // a page for each row: fewer rows, so that the pool has pages for all
      for (Index h = 0; h < kShape.kv_heads; ++h) this->cache.resize(h, 20 - h);
    } else {
      this->cache = make_cache<typename TypeParam::Element>(kShape, page_size == 3 ? 60 : 100);
    }
    typename TestFixture::Engine engine(this->cache, page_size);
    const auto view = engine.view();
    ASSERT_TRUE(view.check().ok()) << page_size << " " << view.check().argument() << ": " << view.check().detail();
    Random random(static_cast<std::uint64_t>(page_size));
    for (int i = 0; i < 60; ++i) {
      const Index h = random.below(kShape.kv_heads), t = random.below(this->cache.size(h));
      const Index n = 1 + random.below(this->cache.size(h) - t);
      std::vector<float> got(ix(n * 8)), wanted(ix(n * 8));
      view.read_keys(h, t, n, got);
      this->cache.read_keys(h, t, n, wanted);
      ASSERT_EQ(got, wanted) << page_size << " " << h << " " << t << " " << n;
      view.read_values(h, t, n, got);
      this->cache.read_values(h, t, n, wanted);
      ASSERT_EQ(got, wanted) << page_size << " " << h << " " << t << " " << n;
    }
  }
}

TYPED_TEST(EveryPageLayout, GivesFloatsInPlaceInsideOfAPageOnly) {
  using Stored = typename TypeParam::Element;
  typename TestFixture::Engine engine(this->cache, kPageSize);
  const auto view = engine.view();
  const auto expect_in_place = [](const float* rows, const Stored* first, const PageStrides& s) {
    if (std::same_as<Stored, float> && s.dim == 1 && s.token == 8) {
      EXPECT_EQ(static_cast<const void*>(rows), static_cast<const void*>(first));
    } else {
      EXPECT_EQ(rows, nullptr);
    }
  };
  expect_in_place(view.key_rows(1, 18, 14), &engine.key(1, 18, 0), view.key_strides);
  expect_in_place(view.value_rows(1, 18, 14), &engine.value(1, 18, 0), view.value_strides);
  EXPECT_EQ(view.key_rows(1, 18, 15), nullptr) << "runs into the next page";
  EXPECT_EQ(view.value_rows(1, 15, 2), nullptr);
}

TYPED_TEST(EveryPageLayout, GivesRowsAsTheyAreStoredUpToTheEndOfAPage) {
  typename TestFixture::Engine engine(this->cache, kPageSize);
  const auto view = engine.view();
  const auto expect_stored = [](const auto& rows, const auto* first, const PageStrides& s, Index count) {
    if (s.dim != 1) {
      EXPECT_EQ(rows.data, nullptr);
      return;
    }
    EXPECT_EQ(rows.data, first);
    EXPECT_EQ(rows.stride, s.token);
    EXPECT_EQ(rows.count, count);
    EXPECT_EQ(rows.scales, nullptr);
  };
  expect_stored(view.stored_keys(1, 18, 10), &engine.key(1, 18, 0), view.key_strides, 10);
  expect_stored(view.stored_keys(1, 18, 60), &engine.key(1, 18, 0), view.key_strides, 14);
  expect_stored(view.stored_values(1, 15, 2), &engine.value(1, 15, 0), view.value_strides, 1);
}

TYPED_TEST(EveryPageLayout, CompressesAsContiguousRowsDo) {
  const Ems::Options options{.score = {.window = 16, .protect = {.sinks = 2, .recent = 6}},
                             .budget = {.rows = 25},
                             .reduce = {.key_mode = KeyMode::direction}};
  const EmsEvict::Options evict{.score = options.score, .budget = options.budget, .reduce = {}};
  const auto expect_alike = [&](const auto& method) {
    auto wanted = this->cache.clone().value();
    typename TestFixture::Engine engine(this->cache, kPageSize);
    auto view = engine.view();
    const auto report = method.compress(view, this->queries.view());
    const auto ragged = method.compress(wanted, this->queries.view());
    ASSERT_TRUE(report.ok()) << report.status().argument() << ": " << report.status().detail();
    EXPECT_EQ(report->rows_before, 247);
    EXPECT_EQ(report->rows_kept, 75);
    EXPECT_EQ(report->rows_merged, ragged->rows_merged);
    EXPECT_EQ(report->rows_rewritten, ragged->rows_rewritten);
    EXPECT_EQ(report->kept_score_share, ragged->kept_score_share);
    EXPECT_EQ(report->bytes_after, 75 * view.row_bytes(0));
    TestFixture::expect_same_rows(view, wanted);
    EXPECT_TRUE(view.check().ok());
  };
  expect_alike(Ems(options));
  expect_alike(EmsEvict(evict));
  typename TestFixture::Engine merged(this->cache, kPageSize);
  auto view = merged.view();
  EXPECT_GT(Ems(options).compress(view, this->queries.view())->rows_rewritten, 0) << "rows are merged and written";
}

TYPED_TEST(EveryPageLayout, CompressesAgainAfterRowsHaveGone) {
  const EmsEvict first({.score = {.window = 16}, .budget = {.rows = 60}, .reduce = {}});
  const EmsEvict second({.score = {.window = 16}, .budget = {.rows = 40}, .reduce = {}});
  typename TestFixture::Engine engine(this->cache, kPageSize);
  auto view = engine.view();
  for (const EmsEvict* method : {&first, &second}) {
    ASSERT_TRUE(method->compress(view, this->queries.view()).ok());
    ASSERT_TRUE(method->compress(this->cache, this->queries.view()).ok());
  }
  TestFixture::expect_same_rows(view, this->cache);
}

TYPED_TEST(EveryPageLayout, AttendsAsContiguousRowsDo) {
  typename TestFixture::Engine engine(this->cache, kPageSize);
  const auto run = [&](const auto& view) {
    WorkspaceBuffer memory;
    SerialExecutor executor;
    std::vector<float> out(ix(kShape.query_heads() * 40 * kShape.value_dim));
    EXPECT_TRUE(memory.reserve(1u << 20).ok());
    EXPECT_TRUE(attend(view, this->queries.view(), AttentionOutput{out.data(), 40 * kShape.value_dim, kShape.value_dim},
                       memory.get(), executor)
                    .ok());
    return out;
  };
  EXPECT_EQ(run(engine.view()), run(this->cache));
}

/// A method that looks at no contents: sinks and the last rows stay.
const StreamingLlm kStreaming({.score = {.sinks = 4}, .budget = {.rows = 30}, .reduce = {}});

template <class E>
E any_bits(Random& random) {
  if constexpr (std::same_as<E, float>)
    return std::bit_cast<float>(static_cast<std::uint32_t>(random.below(Index{1} << 32)));
  else
    return E{static_cast<std::uint16_t>(random.below(1 << 16))};
}

TYPED_TEST(EveryPageLayout, KeptRowsKeepTheirBytesAndNothingElseIsWritten) {
  using Stored = typename TypeParam::Element;
  typename TestFixture::Engine engine(this->cache, kPageSize);
  Random random(9);
  for (Index h = 0; h < kShape.kv_heads; ++h) {
    for (Index t = 0; t < this->cache.size(h); ++t) {
      for (Index d = 0; d < 8; ++d) {  // bits of any kind, NaNs with a payload among them
        engine.key(h, t, d) = any_bits<Stored>(random);
        engine.value(h, t, d) = any_bits<Stored>(random);
      }
    }
  }
  auto before = engine;
  auto view = engine.view();
  ASSERT_TRUE(kStreaming.compress(view, NoEvidence{}).ok());
  ASSERT_EQ(engine.rows, (std::vector<Index>{30, 30, 30}));
  auto expected = before;  // what may have changed is put in by hand, and all else must be as it was
  for (Index h = 0; h < kShape.kv_heads; ++h) {
    for (Index t = 4; t < 30; ++t) {
      const Index from = before.rows[ix(h)] - 30 + t;
      for (Index d = 0; d < 8; ++d) {
        std::memcpy(&expected.key(h, t, d), &before.key(h, from, d), sizeof(Stored));
        std::memcpy(&expected.value(h, t, d), &before.value(h, from, d), sizeof(Stored));
      }
      EXPECT_EQ(view.position(h, t), from);
      EXPECT_EQ(view.log_mass(h, t), before.view().log_mass(h, from));
      EXPECT_EQ(view.stored_log_masses(h, 4, 26)[ix(t - 4)], view.log_mass(h, t));
    }
  }
  EXPECT_TRUE(engine.same_pools(expected));
  EXPECT_EQ(engine.tables, before.tables);
}

TYPED_TEST(EveryPageLayout, WritesRowsThatRunOverPages) {
  typename TestFixture::Engine engine(this->cache, kPageSize);
  auto expected = engine;
  auto view = engine.view();
  std::vector<float> row(8);
  for (Index d = 0; d < 8; ++d) row[ix(d)] = static_cast<float>(d) - 3.f;
  for (const Index t : {15, 16, 47}) {
    for (Index d = 0; d < 8; ++d) {
      expected.key(1, t, d) = from_float<typename TypeParam::Element>(row[ix(d)]);
      expected.value(1, t, d) = from_float<typename TypeParam::Element>(2.f * row[ix(d)]);
    }
    view.write_key(1, t, row);
    std::vector<float> twice = row;
    for (float& x : twice) x *= 2.f;
    view.write_value(1, t, twice);
  }
  EXPECT_TRUE(engine.same_pools(expected));
}

// --- Bad tables, and bad sizes -----------------------------------------------------------------------------------------

using SharedEngine = PagedEngine<float, FlashInferNhd>;
using PerHeadEngine = PagedEngine<float, VllmKvCompress>;

/// One way to spoil a view, and the complaint that is due.
template <class Engine>
struct BadView {
  const char* name;
  StatusCode code;
  const char* argument;
  std::function<void(Engine&, PagedView<float>&)> spoil;
  Index head = -1;
  Index row = -1;

  friend std::ostream& operator<<(std::ostream& os, const BadView& bad) { return os << bad.name; }
};

/// Refused by whatever reads or writes, with nothing written.
template <class Engine>
void expect_refused(const BadView<Engine>& bad) {
  const auto cache = make_cache(kShape, kRows);
  const auto queries = make_queries(kShape, 40, kRows);
  Engine engine(cache, kPageSize);
  SerialExecutor executor;
  std::vector<std::byte> workspace(4u << 20), plan_space(4u << 20);
  const EmsEvict method({.score = {.window = 16}, .budget = {.rows = 25}, .reduce = {}});
  auto view = engine.view();
  const auto plan = method.plan(view, queries.view(), plan_space, executor);
  ASSERT_TRUE(plan.ok());
  bad.spoil(engine, view);
  const Engine before = engine;

  const auto expect = [&](const Status& status, const char* call) {
    EXPECT_EQ(to_string(status.code()), to_string(bad.code)) << call << ": " << status.argument();
    EXPECT_EQ(status.argument(), bad.argument) << call << ": " << status.detail();
    if (bad.head >= 0) {
      EXPECT_EQ(status.head(), bad.head) << call;
    }
    if (bad.row >= 0) {
      EXPECT_EQ(status.row(), bad.row) << call;
    }
  };
  expect(view.check(), "check");
  expect(method.plan(view, queries.view(), workspace, executor).status(), "plan");
  expect(method.compress(view, queries.view(), workspace, executor).status(), "compress");
  expect(apply(plan.value(), view).status(), "apply");
  std::vector<float> out(ix(kShape.query_heads() * 40 * kShape.value_dim));
  expect(attend(view, queries.view(), AttentionOutput{out.data(), 40 * kShape.value_dim, kShape.value_dim}, workspace,
                executor),
         "attend");
  EXPECT_TRUE(engine.same_pools(before));
  EXPECT_EQ(engine.rows, before.rows);
}

class BadSharedView : public testing::TestWithParam<BadView<SharedEngine>> {};
TEST_P(BadSharedView, IsRefusedByNameBeforeAnythingIsRead) { expect_refused(GetParam()); }

class BadPerHeadView : public testing::TestWithParam<BadView<PerHeadEngine>> {};
TEST_P(BadPerHeadView, IsRefusedByNameBeforeAnythingIsRead) { expect_refused(GetParam()); }

constexpr auto kInvalid = StatusCode::invalid_argument;
constexpr auto kMismatch = StatusCode::size_mismatch;
constexpr Index kHuge = std::numeric_limits<Index>::max();
using View = PagedView<float>;
using Shared = BadView<SharedEngine>;
using PerHead = BadView<PerHeadEngine>;

template <class Param>
std::string name_of(const testing::TestParamInfo<Param>& info) {
  return info.param.name;
}

INSTANTIATE_TEST_SUITE_P(
    Tables, BadSharedView,
    testing::Values(
        Shared{"NegativePage", kInvalid, "tables", [](SharedEngine& e, View&) { e.tables[3] = -1; }, 0, 48},
        Shared{"PageBehindThePool", kInvalid, "tables", [](SharedEngine& e, View&) { e.tables[6] = 97; }, 0, 96},
        Shared{"PageFarBehindThePool", kInvalid, "tables", [](SharedEngine& e, View&) { e.tables[0] = INT32_MAX; }},
        Shared{"PageTwice", kInvalid, "tables", [](SharedEngine& e, View&) { e.tables[5] = e.tables[1]; }, -1, 80},
        Shared{"PageTwiceAtTheEnds", kInvalid, "tables", [](SharedEngine& e, View&) { e.tables[6] = e.tables[0]; }, -1,
               96},
        Shared{"ShortTable", kMismatch, "tables",
               [](SharedEngine& e, View& v) { v.tables = std::span(e.tables).first(6); }},
        Shared{"NoTable", kMismatch, "tables", [](SharedEngine&, View& v) { v.tables = {}; }},
        Shared{"NegativeStride", kInvalid, "table_stride", [](SharedEngine&, View& v) { v.table_stride = -1; }}),
    name_of<Shared>);

INSTANTIATE_TEST_SUITE_P(
    Sizes, BadSharedView,
    testing::Values(
        Shared{"NoTokensInAPage", kInvalid, "page_size", [](SharedEngine&, View& v) { v.page_size = 0; }},
        Shared{"NegativePageSize", kInvalid, "page_size", [](SharedEngine&, View& v) { v.page_size = -16; }},
        Shared{"HugePageSize", kInvalid, "page_size", [](SharedEngine&, View& v) { v.page_size = kHuge; }},
        Shared{"NoPages", kInvalid, "pages", [](SharedEngine&, View& v) { v.pages = 0; }},
        Shared{"NegativePages", kInvalid, "pages", [](SharedEngine&, View& v) { v.pages = -1; }},
        Shared{"HugePool", kInvalid, "pages", [](SharedEngine&, View& v) { v.pages = kHuge; }},
        Shared{"NullKeys", kInvalid, "keys", [](SharedEngine&, View& v) { v.keys = nullptr; }},
        Shared{"NullValues", kInvalid, "values", [](SharedEngine&, View& v) { v.values = nullptr; }},
        Shared{"NoRowCounts", kMismatch, "rows", [](SharedEngine&, View& v) { v.rows = {}; }},
        Shared{"RowCountsOfOtherHeads", kMismatch, "rows", [](SharedEngine&, View& v) { v.rows = v.rows.first(2); }},
        Shared{"FewPositions", kMismatch, "positions",
               [](SharedEngine&, View& v) { v.positions = v.positions.first(200); }},
        Shared{"PositionsOfFewRows", kMismatch, "positions", [](SharedEngine&, View& v) { v.position_stride = 99; }},
        Shared{"NegativePositionStride", kMismatch, "positions",
               [](SharedEngine&, View& v) { v.position_stride = -1; }},
        Shared{"HugePositionStride", kMismatch, "positions", [](SharedEngine&, View& v) { v.position_stride = kHuge; }},
        Shared{"FewLogMasses", kMismatch, "log_masses",
               [](SharedEngine&, View& v) { v.log_masses = v.log_masses.first(30); }},
        Shared{"HugeLogMassStride", kMismatch, "log_masses",
               [](SharedEngine&, View& v) { v.log_mass_stride = kHuge; }}),
    name_of<Shared>);

// apply() asks rows of the plan first, so these are of the view alone.
TEST(PagedView, RefusesRowCountsThatAreOutOfRange) {
  const auto cache = make_cache(kShape, kRows);
  SharedEngine engine(cache, kPageSize);
  for (const Index rows : {Index{-1}, kMaxRows + 1, kHuge}) {
    engine.rows[1] = rows;
    EXPECT_EQ(engine.view().check().code(), kInvalid);
    EXPECT_EQ(engine.view().check().argument(), "rows");
  }
  engine.rows[1] = kMaxRows;
  EXPECT_EQ(engine.view().check().code(), kMismatch) << "in range, but there are neither positions nor pages for them";
  auto bare = engine.view();
  bare.positions = {};
  bare.log_masses = {};
  EXPECT_EQ(bare.check().argument(), "tables");
  EXPECT_EQ(bare.check().head(), 1);
}

INSTANTIATE_TEST_SUITE_P(
    Strides, BadSharedView,
    testing::Values(
        Shared{"NegativePage", kInvalid, "key_strides", [](SharedEngine&, View& v) { v.key_strides.page *= -1; }},
        Shared{"NegativeDim", kInvalid, "value_strides", [](SharedEngine&, View& v) { v.value_strides.dim = -1; }},
        Shared{"PagesOverlap", kInvalid, "key_strides",
               [](SharedEngine&, View& v) { v.key_strides.page = 16 * 24 - 1; }},
        Shared{"HeadsOverlap", kInvalid, "value_strides", [](SharedEngine&, View& v) { v.value_strides.head = 7; }},
        Shared{"HeadsInOnePlace", kInvalid, "key_strides", [](SharedEngine&, View& v) { v.key_strides.head = 0; }},
        Shared{"TokensInOnePlace", kInvalid, "key_strides", [](SharedEngine&, View& v) { v.key_strides.token = 0; }},
        Shared{"DimsOverlapTokens", kInvalid, "key_strides", [](SharedEngine&, View& v) { v.key_strides.dim = 3; }},
        Shared{"LargerThanMemory", kInvalid, "key_strides", [](SharedEngine&, View& v) { v.key_strides.page = kHuge; }},
        Shared{"LargerThanMemoryInBytes", kInvalid, "value_strides",
               [](SharedEngine&, View& v) { v.value_strides.page = kHuge / 96 / 2; }}),
    name_of<Shared>);

INSTANTIATE_TEST_SUITE_P(
    Tables, BadPerHeadView,
    testing::Values(
        PerHead{"NegativePage", kInvalid, "tables",
                [](PerHeadEngine& e, View&) { e.tables[ix(2 * e.table_stride + 1)] = -7; }, 2, 16},
        PerHead{"PageBehindThePool", kInvalid, "tables",
                [](PerHeadEngine& e, View&) { e.tables[ix(e.table_stride)] = 97; }, 1, 0},
        PerHead{"PageTwiceInAHead", kInvalid, "tables",
                [](PerHeadEngine& e, View&) { e.tables[ix(e.table_stride + 4)] = e.tables[ix(e.table_stride)]; }, 1,
                64},
        PerHead{"PageOfAnotherHead", kInvalid, "tables",
                [](PerHeadEngine& e, View&) { e.tables[ix(2 * e.table_stride)] = e.tables[6]; }, 2, 0},
        PerHead{"StrideOfFewPages", kMismatch, "tables", [](PerHeadEngine&, View& v) { v.table_stride = 6; }, 0},
        PerHead{"ShortTable", kMismatch, "tables",
                [](PerHeadEngine& e, View& v) { v.tables = v.tables.first(ix(2 * e.table_stride + 6)); }, 2},
        PerHead{"HugeStride", kMismatch, "tables", [](PerHeadEngine&, View& v) { v.table_stride = kHuge; }}),
    name_of<PerHead>);

TEST(PagedView, TakesTablesThatEndWithTheRows) {
  const auto cache = make_cache(kShape, kRows);
  PerHeadEngine per_head(cache, kPageSize);
  auto view = per_head.view();
  view.tables = view.tables.first(ix(2 * per_head.table_stride + 7));
  EXPECT_TRUE(view.check().ok());
  SharedEngine shared(cache, kPageSize);
  view = shared.view();
  view.tables = view.tables.first(7);
  EXPECT_TRUE(view.check().ok());
}

TEST(PagedView, EntriesBehindTheRowsMayBeAnything) {
  const auto cache = make_cache(kShape, kRows);
  PerHeadEngine engine(cache, kPageSize);
  engine.tables[7] = -1;
  engine.tables[8] = engine.tables[0];
  EXPECT_TRUE(engine.view().check().ok());
}

TEST(PagedView, HeadsMayShareAPageInWhichEachHasItsPart) {
  const auto cache = make_cache(kShape, kRows);
  PagedEngine<float, TablesOverWholePages> engine(cache, kPageSize);
  ASSERT_EQ(engine.tables[1], engine.tables[ix(engine.table_stride)]) << "heads 0 and 1 share a page";
  EXPECT_TRUE(engine.view().check().ok());
  engine.tables[3] = engine.tables[1];
  EXPECT_EQ(engine.view().check().argument(), "tables");
}

TEST(PagedView, RefusesAShapeThatIsOutOfRangeBeforeItLooksAtTables) {
  const auto cache = make_cache(kShape, kRows);
  SharedEngine engine(cache, kPageSize);
  auto view = engine.view();
  view.layer.kv_heads = -3;
  EXPECT_EQ(kStreaming.compress(view, NoEvidence{}).status().argument(), "view");
  EXPECT_FALSE(view.check().ok());
  view = engine.view();
  view.layer.key_dim = 0;
  EXPECT_EQ(kStreaming.compress(view, NoEvidence{}).status().argument(), "view");
  EXPECT_EQ(view.check().argument(), "layer");
  view.layer.key_dim = kHuge;
  EXPECT_EQ(view.check().argument(), "layer");
}

TEST(PagedView, WithoutPositionsRowsAreNumberedFromTheFirst) {
  const auto cache = make_cache(kShape, kRows);
  SharedEngine engine(cache, kPageSize);
  auto view = engine.view();
  view.positions = {};
  view.first_position = 70;
  EXPECT_EQ(view.position(2, 5), 75);
  view.positions = std::span(engine.positions).first(ix(kRows));
  view.position_stride = 0;
  EXPECT_EQ(view.position(2, 5), 5) << "one list for all heads";
  EXPECT_TRUE(view.check().ok());
  view.move_row(2, 9, 5);
  EXPECT_EQ(view.position(2, 5), 5) << "which no head may change";
}

TEST(PagedView, WithoutAPlaceForLogMassesMergingIsRefused) {
  const auto cache = make_cache(kShape, kRows);
  const auto queries = make_queries(kShape, 40, kRows);
  SharedEngine engine(cache, kPageSize);
  auto view = engine.view();
  view.log_masses = {};
  EXPECT_FALSE(can_store_log_mass(view));
  EXPECT_EQ(view.log_mass(0, 0), 0.f);
  EXPECT_TRUE(view.stored_log_masses(0, 0, 5).empty());
  view.write_log_mass(0, 0, 1.f);  // goes nowhere
  EXPECT_EQ(Ems({.score = {.window = 16}, .budget = {.rows = 25}, .reduce = {}})
                .compress(view, queries.view())
                .status()
                .code(),
            StatusCode::unsupported);
}

TEST(PagedView, StorageWithOneCountKeepsEqualRows) {
  const auto cache = make_cache(kShape, kRows);
  const auto queries = make_queries(kShape, 40, kRows);
  const EmsEvict method({.score = {.window = 16}, .budget = {.rows = 25}, .reduce = {}});
  for (const RowCounts counts : {RowCounts::per_layer, RowCounts::per_model}) {
    SharedEngine engine(cache, kPageSize);
    engine.counts = counts;
    auto view = engine.view();
    ASSERT_TRUE(method.compress(view, queries.view()).ok());
    EXPECT_EQ(engine.rows, (std::vector<Index>{25, 25, 25}));
    EXPECT_EQ(view.pages_used(0), 2);
  }
}

// --- Scales and blocks -------------------------------------------------------------------------------------------------

TEST(PagedViewOfInt8, ScalesMoveAndAreWrittenWithTheirRows) {
  constexpr Index P = 4, H = 2, D = 8, pages = 6;
  std::vector<Int8> keys(ix(pages * P * H * D)), values(keys.size());
  std::vector<float> key_scales(ix(pages * P * H), -1.f), value_scales(key_scales);
  std::vector<PageId> table{4, 1, 3};
  std::vector<Index> rows{10, 10};
  PagedView<Int8> view{.layer = {H, 1, D, D},
                       .page_size = P,
                       .pages = pages,
                       .keys = keys.data(),
                       .key_strides = PageStrides::token_major(P, H, D),
                       .values = values.data(),
                       .value_strides = PageStrides::head_major(P, H, D),
                       .tables = table,
                       .rows = rows,
                       .key_scales = key_scales.data(),
                       .key_scale_strides = PageStrides::token_major(P, H, 1),
                       .value_scales = value_scales.data(),
                       .value_scale_strides = PageStrides::head_major(P, H, 1)};
  ASSERT_TRUE(view.check().ok()) << view.check().argument() << view.check().detail();
  auto reference = RaggedCache<>::create({H, 1, D, D}).value();
  Random random(4);
  const std::vector<float> data = normals(H * 10 * D, random);
  ASSERT_TRUE(reference
                  .append(data.data(), Strides::head_major(10, D), data.data(), Strides::head_major(10, D),
                          positions_from(0, 10))
                  .ok());
  for (Index h = 0; h < H; ++h) {
    for (Index t = 0; t < 10; ++t) {
      const std::span<const float> row(data.data() + (h * 10 + t) * D, ix(D));
      view.write_key(h, t, row);
      view.write_value(h, t, row);
    }
  }
  EXPECT_EQ(std::count(key_scales.begin(), key_scales.end(), -1.f), 4 * pages * H - 20) << "a scale per row";
  EXPECT_GT(key_scales[ix((4 * P + 2) * H + 1)], 0.f) << "of row 2 of head 1, in page 4";
  EXPECT_GT(value_scales[ix((1 * H + 1) * P + 1)], 0.f) << "of row 5 of head 1, in page 1";
  const auto expect_near = [&](Index row, Index source) {
    std::vector<float> key(ix(D)), value(ix(D));
    view.read_keys(1, row, 1, key);
    view.read_values(1, row, 1, value);
    EXPECT_EQ(key, value);
    for (Index d = 0; d < D; ++d) EXPECT_NEAR(key[ix(d)], data[ix((10 + source) * D + d)], 0.02f);
  };
  for (Index t = 0; t < 10; ++t) expect_near(t, t);
  std::vector<float> all(ix(10 * D)), one(ix(D));
  view.read_keys(1, 0, 10, all);
  for (Index t = 0; t < 10; ++t) {
    view.read_keys(1, t, 1, one);
    EXPECT_TRUE(std::equal(one.begin(), one.end(), all.begin() + t * D)) << t;
  }
  view.move_row(1, 9, 2);
  expect_near(2, 9);
  EXPECT_EQ(key_scales[ix((4 * P + 2) * H + 1)], key_scales[ix((3 * P + 1) * H + 1)]);
  EXPECT_EQ(view.row_bytes(0), 2 * (8 + 4));

  auto spoilt = view;
  spoilt.key_scales = nullptr;
  EXPECT_EQ(spoilt.check().argument(), "key_scales");
  spoilt = view;
  spoilt.value_scales = nullptr;
  EXPECT_EQ(spoilt.check().argument(), "value_scales");
  spoilt = view;
  spoilt.key_scale_strides.token = 0;
  EXPECT_EQ(spoilt.check().argument(), "key_scales") << "rows that share a scale";
  spoilt = view;
  spoilt.key_scale_strides.page = kHuge;
  EXPECT_EQ(spoilt.check().argument(), "key_scales");
  std::vector<BFloat16> plain(ix(pages * P * H * D));
  const float scale = 2.f;
  const PagedView<BFloat16> unscaled{.layer = view.layer,
                                     .page_size = P,
                                     .pages = pages,
                                     .keys = plain.data(),
                                     .key_strides = view.key_strides,
                                     .values = plain.data(),
                                     .value_strides = view.value_strides,
                                     .tables = table,
                                     .rows = rows,
                                     .value_scales = &scale};
  EXPECT_EQ(unscaled.check().argument(), "value_scales") << "bf16 has none";
}

TEST(PagedViewOfFp8, OneScaleOfTheEngineServesAllRows) {
  constexpr Index P = 4, D = 4;
  std::vector<Float8E4M3> data(ix(3 * P * D));
  const float scale = 0.5f;
  std::vector<PageId> table{2, 0};
  std::vector<Index> rows{7};
  const std::vector<float> row{1.f, -2.f, 3.f, 0.f};
  PagedView<Float8E4M3> view{.layer = {1, 1, D, D},
                             .page_size = P,
                             .pages = 3,
                             .keys = data.data(),
                             .key_strides = PageStrides::token_major(P, 1, D),
                             .values = data.data(),
                             .value_strides = PageStrides::token_major(P, 1, D),
                             .tables = table,
                             .rows = rows,
                             .key_scales = &scale,
                             .key_scale_strides = {0, 0, 0, 0}};
  ASSERT_TRUE(view.check().ok()) << view.check().argument();
  view.write_key(0, 5, row);
  std::vector<float> out(4);
  view.read_keys(0, 5, 1, out);
  EXPECT_EQ(out, row);
  view.read_values(0, 5, 1, out);
  EXPECT_EQ(out, (std::vector<float>{2.f, -4.f, 6.f, 0.f})) << "without a scale it is 1";
  for (const PageStrides& strides : {PageStrides{0, 0, 1}, PageStrides{1, 0, 0}, PageStrides{0, -1, 0}}) {
    view.key_scale_strides = strides;
    EXPECT_EQ(view.check().argument(), "key_scales") << "a scale that rows would be parted from";
  }
  PagedView<const Float8E4M3> read_only{.layer = view.layer,
                                        .page_size = P,
                                        .pages = 3,
                                        .keys = data.data(),
                                        .key_strides = view.key_strides,
                                        .values = data.data(),
                                        .value_strides = view.value_strides,
                                        .tables = table,
                                        .rows = rows,
                                        .key_scales = &scale,
                                        .key_scale_strides = {1, 0, 0}};
  EXPECT_TRUE(read_only.check().ok()) << "rows that do not move may have a scale per page";
}

TEST(PagedViewOfBlocks, ReadsAndMovesWholeBlocksAndRefusesWidthsThatAreNone) {
  constexpr Index P = 4, H = 2, D = 64;
  std::vector<BlockQ8_0> keys(ix(3 * P * H * D / 32));
  std::vector<BlockQ4_0> values(keys.size());
  std::vector<PageId> table{2, 0};
  std::vector<Index> rows{7, 7};
  PagedView<BlockQ8_0, BlockQ4_0> view{.layer = {H, 1, D, D},
                                       .page_size = P,
                                       .pages = 3,
                                       .keys = keys.data(),
                                       .key_strides = PageStrides::token_major(P, H, D / 32),
                                       .values = values.data(),
                                       .value_strides = PageStrides::head_major(P, H, D / 32),
                                       .tables = table,
                                       .rows = rows};
  ASSERT_TRUE(view.check().ok()) << view.check().argument();
  EXPECT_EQ(view.row_bytes(0), 2 * 34 + 2 * 18);
  Random random(5);
  const std::vector<float> row = normals(D, random);
  view.write_key(1, 5, row);
  view.write_value(1, 5, row);
  view.move_row(1, 5, 2);
  EXPECT_EQ(keys[ix((2 * P + 2) * H * 2 + 2)], keys[ix((0 * P + 1) * H * 2 + 2)]);
  EXPECT_EQ(values[ix((2 * H + 1) * P * 2 + 2 * 2)], values[ix((0 * H + 1) * P * 2 + 1 * 2)]);
  std::vector<float> out(ix(D));
  view.read_keys(1, 2, 1, out);
  for (Index d = 0; d < D; ++d) EXPECT_NEAR(out[ix(d)], row[ix(d)], 0.02f);
  EXPECT_EQ(view.key_rows(1, 2, 1), nullptr);

  auto narrow = view;
  narrow.layer.key_dim = 40;
  EXPECT_EQ(narrow.shape(), LayerShape{});
  EXPECT_EQ(kStreaming.compress(narrow, NoEvidence{}).status().argument(), "view");
  auto transposed = view;
  transposed.value_strides.dim = 2;
  EXPECT_EQ(transposed.shape(), LayerShape{});
  EXPECT_EQ(kStreaming.compress(transposed, NoEvidence{}).status().argument(), "view");
}

// --- Pages of others ---------------------------------------------------------------------------------------------------

#if defined(__linux__)
/// A pool whose pages are pages of the machine: those of other sequences can be neither read nor written.
struct GuardedPool {
  static constexpr Index kPages = 40, kTokens = 32, kHeads = 2, kWidth = 32;  // 8 KiB of floats
  static constexpr std::size_t kBytes = kTokens * kHeads * kWidth * sizeof(float);
  void* memory = mmap(nullptr, 2 * kPages * kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

  GuardedPool() = default;
  GuardedPool(const GuardedPool&) = delete;
  GuardedPool& operator=(const GuardedPool&) = delete;
  ~GuardedPool() { munmap(memory, 2 * kPages * kBytes); }

  [[nodiscard]] float* keys() const { return static_cast<float*>(memory); }
  [[nodiscard]] float* values() const { return keys() + kPages * kTokens * kHeads * kWidth; }
  void forbid(PageId page) const {
    for (float* tensor : {keys(), values()}) {
      ASSERT_EQ(mprotect(tensor + page * kTokens * kHeads * kWidth, kBytes, PROT_NONE), 0);
    }
  }
};

TEST(PagedView, PagesOfOtherSequencesAreNeitherReadNorWritten) {
  constexpr Index H = GuardedPool::kHeads, P = GuardedPool::kTokens, D = GuardedPool::kWidth, T = 150;
  const LayerShape shape{H, 2, D, D};
  const auto cache = make_cache(shape, T);
  const auto queries = make_queries(shape, 64, T);
  for (const auto& strides :
       {PageStrides::head_major(P, H, D), PageStrides::token_major(P, H, D), PageStrides::transposed(P, H, D)}) {
    const GuardedPool pool;
    ASSERT_NE(pool.memory, MAP_FAILED);
    std::vector<PageId> table{17, 3, 38, 4, 39, 5};  // the last has no row
    for (Index h = 0; h < H; ++h) {
      for (Index t = 0; t < T; ++t) {
        for (Index d = 0; d < D; ++d) {
          const Index place =
              table[ix(t / P)] * strides.page + h * strides.head + t % P * strides.token + d * strides.dim;
          pool.keys()[place] = cache.key_rows(h, t, 1)[d];
          pool.values()[place] = cache.value_rows(h, t, 1)[d];
        }
      }
    }
    for (PageId page = 0; page < GuardedPool::kPages; ++page) {
      if (std::find(table.begin(), table.begin() + 5, page) == table.begin() + 5) pool.forbid(page);
    }
    std::vector<Index> rows(ix(H), T);
    std::vector<Position> positions;
    for (Index h = 0; h < H; ++h) {
      for (Index t = 0; t < T; ++t) positions.push_back(t);
    }
    std::vector<float> masses(ix(H * T));
    PagedView<float> view{.layer = shape,
                          .page_size = P,
                          .pages = GuardedPool::kPages,
                          .keys = pool.keys(),
                          .key_strides = strides,
                          .values = pool.values(),
                          .value_strides = strides,
                          .tables = table,
                          .rows = rows,
                          .positions = positions,
                          .position_stride = T,
                          .log_masses = masses,
                          .log_mass_stride = T};
    auto wanted = cache.clone().value();
    const Ems method({.score = {.window = 32}, .budget = {.rows = 40}, .reduce = {}});
    ASSERT_TRUE(method.compress(view, queries.view()).ok());
    ASSERT_TRUE(method.compress(wanted, queries.view()).ok());
    for (Index h = 0; h < H; ++h) EXPECT_EQ(read_head(view, h).values, read_head(wanted, h).values);
    EXPECT_EQ(std::max(view.pages_used(0), view.pages_used(1)), 2);
  }
}
#endif

}  // namespace
}  // namespace kvfold::test
