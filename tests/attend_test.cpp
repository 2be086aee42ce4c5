#include <kvfold/attend.hpp>
#include <kvfold/exec/thread_pool.hpp>
#include <kvfold/view/paged.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include <gtest/gtest.h>

#include "attend_oracle.hpp"
#include "builders.hpp"

namespace kvfold::test {
namespace {

constexpr double kTolerance = 3e-6;  // of the largest output

/// Heads of T, T / 2 + 1 and 1 rows, some of which stand for several.
template <class K = float, class V = K>
RaggedCache<K, V> ragged_cache(LayerShape shape, Index rows) {
  auto cache = make_cache<K, V>(shape, rows, 5);
  Random random(6);
  for (Index h = 0; h < shape.kv_heads; ++h) {
    cache.resize(h, h % 3 == 0 ? rows : h % 3 == 1 ? rows / 2 + 1 : 1);
    for (Index t = 0; t < cache.size(h); t += 3) cache.write_log_mass(h, t, 2.f * random.normal());
  }
  return cache;
}

template <KVCacheView V>
void expect_oracle(const V& view, const QueryRows& queries) {
  const auto got = run_attend(view, queries);
  const auto wanted = attend_oracle(view, queries);
  EXPECT_LT(relative_error(got.out, wanted.out), kTolerance);
  EXPECT_LT(relative_error(got.log_sum_exp, wanted.log_sum_exp), kTolerance);
}

// --- Against the oracle ----------------------------------------------------------------------------------------

class AttendSweep : public testing::TestWithParam<Index> {};

TEST_P(AttendSweep, IsSoftmaxAttentionOverTheRowsOfEachHead) {
  const Index rows = GetParam();
  for (const Index group : {1, 3, 7}) {
    for (const auto& [key_dim, value_dim] : {std::pair<Index, Index>{16, 16}, {24, 10}, {5, 33}}) {
      const LayerShape shape{3, group, key_dim, value_dim};
      const auto cache = ragged_cache(shape, rows);
      for (const Index count : {Index{1}, std::min<Index>(rows, 5), std::min<Index>(rows, 70)}) {
        SCOPED_TRACE(testing::Message() << "G " << group << ", D " << key_dim << ", E " << value_dim << ", " << count
                                        << " queries");
        expect_oracle(cache, make_queries(shape, count, rows).view());
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Rows, AttendSweep, testing::Values(1, 2, 127, 128, 129, 400));

/// Few queries of long rows: parts of a head's rows work side by side.
TEST(Attend, LongRowsAreSplitIntoParts) {
  for (const auto& [heads, group] : {std::pair<Index, Index>{1, 1}, {1, 5}, {3, 4}, {9, 1}}) {
    const LayerShape shape{heads, group, 24, 10};
    const auto cache = ragged_cache(shape, 3000);  // heads of 3000, 1501 and 1 rows
    for (const Index count : {1, 3, 6}) {          // six queries of five heads are not few
      SCOPED_TRACE(testing::Message() << heads << " heads, G " << group << ", " << count << " queries");
      expect_oracle(cache, make_queries(shape, count, 3000).view());
    }
  }
}

TEST(Attend, PartsThatAQueryCannotSeeDoNotCount) {
  const LayerShape shape{2, 2, 8, 6};
  const auto cache = ragged_cache(shape, 4000);
  for (const Index length : {1, 500, 2001, 3999}) expect_oracle(cache, make_queries(shape, 1, length).view());
}

TEST(Attend, ReadsEveryStorageType) {
  const LayerShape shape{3, 2, 12, 20};
  const auto queries = make_queries(shape, 4, 150);
  expect_oracle(ragged_cache<Float16>(shape, 150), queries.view());
  expect_oracle(ragged_cache<BFloat16>(shape, 150), queries.view());
  expect_oracle(ragged_cache<BFloat16, float>(shape, 150), queries.view());
}

TEST(Attend, ReadsFp8WithAndWithoutScales) {
  constexpr LayerShape kShape{2, 3, 40, 24};
  auto cache = ragged_cache<Float8E4M3>(kShape, 700);
  for (const Index queries : {1, 2, 30}) expect_oracle(cache, make_queries(kShape, queries, 700).view());
  std::vector<Index> rows{700, 351};
  std::vector<Float8E4M3> keys, values;
  for (Index h = 0; h < 2; ++h) {
    for (Index t = 0; t < 700; ++t) {
      const Index row = std::min(t, rows[static_cast<std::size_t>(h)] - 1);
      keys.insert(keys.end(), cache.stored_keys(h, row, 1).data, cache.stored_keys(h, row, 1).data + 40);
      values.insert(values.end(), cache.stored_values(h, row, 1).data, cache.stored_values(h, row, 1).data + 24);
    }
  }
  const std::vector<float> scales{0.25f, 1.5f, 0.03f};
  const StridedView<const Float8E4M3> view{.layer = kShape,
                                           .keys = keys.data(),
                                           .key_strides = Strides::head_major(700, 40),
                                           .values = values.data(),
                                           .value_strides = Strides::head_major(700, 24),
                                           .rows = rows,
                                           .key_scales = scales.data(),
                                           .key_scale_strides = {1, 0},
                                           .value_scales = scales.data() + 1,
                                           .value_scale_strides = {1, 0}};
  for (const Index queries : {1, 2, 30}) expect_oracle(view, make_queries(kShape, queries, 700).view());
}

TEST(Attend, ReadsRowsWithScalesOfTheirOwn) {
  constexpr LayerShape kShape{3, 2, 40, 24};
  expect_oracle(ragged_cache<Int8>(kShape, 150), make_queries(kShape, 4, 150).view());
  expect_oracle(ragged_cache<Int8>(kShape, 3000), make_queries(kShape, 1, 3000).view());
  expect_oracle(ragged_cache<Int8, float>(kShape, 700), make_queries(kShape, 2, 700).view());
  expect_oracle(ragged_cache<BFloat16, Int8>(kShape, 700), make_queries(kShape, 2, 700).view());
}

TEST(Attend, FindsScalesWhereTheEngineHasThem) {
  constexpr Index H = 2, T = 600, D = 24, E = 40;
  constexpr LayerShape kShape{H, 3, D, E};
  Random random(6);
  std::vector<Int8> keys(H * T * D), values(H * T * E);
  for (std::vector<Int8>* all : {&keys, &values}) {
    for (Int8& x : *all) x.value = static_cast<std::int8_t>(random.below(255) - 127);
  }
  std::vector<float> scales(2 * H * T);
  for (float& s : scales) s = 0.01f + 1e-4f * static_cast<float>(random.below(100));
  std::vector<Index> rows{T, 411};
  const ScaleStrides by_head{T, 1}, by_token{1, H}, one_per_head{1, 0}, one{};
  for (const auto& [key_scales, value_scales] :
       {std::pair(by_head, by_head), std::pair(by_token, by_head), std::pair(by_head, by_token),
        std::pair(one_per_head, by_token), std::pair(by_token, one)}) {
    const StridedView<const Int8> view{.layer = kShape,
                                       .keys = keys.data(),
                                       .key_strides = Strides::head_major(T, D),
                                       .values = values.data(),
                                       .value_strides = Strides::head_major(T, E),
                                       .rows = rows,
                                       .key_scales = scales.data(),
                                       .key_scale_strides = key_scales,
                                       .value_scales = scales.data() + H * T,
                                       .value_scale_strides = value_scales};
    for (const Index queries : {1, 2, 30}) expect_oracle(view, make_queries(kShape, queries, T).view());
  }
}

TEST(Attend, ReadsEveryLayout) {
  constexpr Index H = 2, T = 140, D = 12, E = 20, capacity = 150;
  Random random(9);
  const auto keys = normals(H * capacity * D, random), values = normals(H * capacity * E, random);
  std::vector<Index> rows{T, 77};
  const LayerShape shape{H, 3, D, E};
  const auto queries = make_queries(shape, 6, T);
  const std::pair<Strides, Strides> layouts[] = {{Strides::head_major(capacity, D), Strides::head_major(capacity, E)},
                                                 {Strides::token_major(H, D), Strides::token_major(H, E)},
                                                 {Strides::head_major(capacity, D), Strides::transposed(capacity, E)},
                                                 {Strides::transposed(capacity, D), Strides::token_major(H, E)}};
  for (const auto& [key_strides, value_strides] : layouts) {
    expect_oracle(StridedView<const float>{.layer = shape,
                                           .keys = keys.data(),
                                           .key_strides = key_strides,
                                           .values = values.data(),
                                           .value_strides = value_strides,
                                           .rows = rows},
                  queries.view());
  }
}

/// The rows of a cache where they lie in a tensor [token][head][dim], and in pages of such tensors in any order.
template <class E>
struct OtherPlaces {
  static constexpr Index kPage = 16;

  LayerShape shape;
  Index tokens, pages = (tokens + kPage - 1) / kPage, units = shape.key_dim / kUnit<E>;
  std::vector<E> keys, values;
  std::vector<float> key_scales, value_scales, masses;
  std::vector<PageId> table;
  std::vector<Index> rows;

  OtherPlaces(const RaggedCache<E>& cache, Index longest)
      : shape(cache.shape()),
        tokens(longest),
        keys(at(pages * kPage * shape.kv_heads * units)),
        values(keys),
        key_scales(at(pages * kPage * shape.kv_heads)),
        value_scales(key_scales),
        masses(at(shape.kv_heads * longest)) {
    for (Index h = 0; h < shape.kv_heads; ++h) {
      rows.push_back(cache.size(h));
      for (Index t = 0; t < cache.size(h); ++t) masses[at(h * tokens + t)] = cache.log_mass(h, t);
    }
  }

  /// \param page_of the page of a token's page
  template <class F>
  void fill(const RaggedCache<E>& cache, F page_of) {
    table.clear();
    for (Index p = 0; p < pages; ++p) table.push_back(static_cast<PageId>(page_of(p)));
    for (Index h = 0; h < shape.kv_heads; ++h) {
      for (Index t = 0; t < cache.size(h); ++t) {
        const Index row = (page_of(t / kPage) * kPage + t % kPage) * shape.kv_heads + h;
        const StoredRows<E> key = cache.stored_keys(h, t, 1), value = cache.stored_values(h, t, 1);
        std::copy_n(key.data, units, keys.data() + row * units);
        std::copy_n(value.data, units, values.data() + row * units);
        if (key.scales != nullptr) key_scales[at(row)] = *key.scales;
        if (value.scales != nullptr) value_scales[at(row)] = *value.scales;
      }
    }
  }
  [[nodiscard]] StridedView<const E> by_token() {
    const Strides strides{.head = units, .token = units * shape.kv_heads, .dim = 1};
    const ScaleStrides of_scales{.head = 1, .token = shape.kv_heads};
    StridedView<const E> view{.layer = shape,
                              .keys = keys.data(),
                              .key_strides = strides,
                              .values = values.data(),
                              .value_strides = strides,
                              .rows = rows,
                              .log_masses = masses,
                              .log_mass_stride = tokens};
    if constexpr (kRowScaled<E>) {
      view.key_scales = key_scales.data();
      view.value_scales = value_scales.data();
      view.key_scale_strides = view.value_scale_strides = of_scales;
    }
    return view;
  }
  [[nodiscard]] PagedView<const E> in_pages() {
    const PageStrides strides{.page = kPage * shape.kv_heads * units, .head = units, .token = shape.kv_heads * units};
    PagedView<const E> view{.layer = shape,
                            .page_size = kPage,
                            .pages = pages,
                            .keys = keys.data(),
                            .key_strides = strides,
                            .values = values.data(),
                            .value_strides = strides};
    view.tables = table;
    view.rows = rows;
    view.log_masses = masses;
    view.log_mass_stride = tokens;
    if constexpr (kRowScaled<E>) {
      view.key_scales = key_scales.data();
      view.value_scales = value_scales.data();
      view.key_scale_strides =
          view.value_scale_strides = {.page = kPage * shape.kv_heads, .head = 1, .token = shape.kv_heads};
    }
    return view;
  }

 private:
  static std::size_t at(Index i) { return static_cast<std::size_t>(i); }
};

template <class E>
class RowsInOtherPlaces : public testing::Test {};
using StoredTypes = testing::Types<float, Float16, BFloat16, Float8E4M3, Int8, BlockQ8_0, BlockQ4_0>;
TYPED_TEST_SUITE(RowsInOtherPlaces, StoredTypes);

/// Where heads lie beside each other, tasks go over several of them: of 3 heads over all, of 9 over 8 and 1.
TYPED_TEST(RowsInOtherPlaces, GiveTheSameBits) {
  constexpr Index kLongest = 1300;
  for (const auto& [heads, count, end] :
       {std::array<Index, 3>{3, 1, kLongest}, {3, 1, 1000}, {3, 3, kLongest}, {3, 20, kLongest}, {9, 1, kLongest}}) {
    SCOPED_TRACE(testing::Message() << heads << " heads, " << count << " queries before " << end);
    const LayerShape shape{heads, 3, 64, 64};
    auto cache = make_cache<TypeParam>(shape, kLongest);
    cache.resize(1, 521);
    cache.resize(2, 1);
    Random random(8);
    for (Index h = 0; h < heads; ++h) {
      for (Index t = 0; t < cache.size(h); t += 3) cache.write_log_mass(h, t, random.normal());
    }
    OtherPlaces<TypeParam> places(cache, kLongest);
    const auto queries = make_queries(shape, count, end);
    const auto wanted = run_attend(cache, queries.view());
    ASSERT_FALSE(wanted.out.empty());
    places.fill(cache, [](Index page) { return page; });
    const auto by_token = run_attend(places.by_token(), queries.view());
    EXPECT_EQ(by_token.out, wanted.out);
    EXPECT_EQ(by_token.log_sum_exp, wanted.log_sum_exp);
    places.fill(cache, [&](Index page) { return (page * 7 + 3) % places.pages; });
    const auto in_pages = run_attend(places.in_pages(), queries.view());
    EXPECT_EQ(in_pages.out, wanted.out);
    EXPECT_EQ(in_pages.log_sum_exp, wanted.log_sum_exp);
    if (count > 1) continue;
    for (const Index bad_row : {0, 999, 1000, 1299}) {  // seen by all queries, by some, by none of those before 1000
      places.masses[static_cast<std::size_t>(bad_row)] = std::numeric_limits<float>::quiet_NaN();
      EXPECT_TRUE(run_attend(places.by_token(), queries.view()).out.empty()) << bad_row;
      places.masses[static_cast<std::size_t>(bad_row)] = 0.f;
    }
  }
}

TEST(Attend, TakesQueriesOfEveryLayoutAndScale) {
  const LayerShape shape{2, 3, 8, 8};
  const auto cache = ragged_cache(shape, 60);
  const auto queries = make_queries(shape, 4, 60);
  expect_oracle(cache, token_major_queries(queries.data.data(), 6, 8, queries.positions));
  QueryRows scaled = queries.view();
  scaled.scale = 1.7f;
  expect_oracle(cache, scaled);
}

TEST(Attend, AQuerySeesItsOwnRowButNoLaterOne) {
  const LayerShape shape{1, 1, 4, 1};
  auto cache = make_cache(shape, 5);
  for (Index t = 0; t < 5; ++t) {
    cache.write_key(0, t, std::vector<float>(4, 0.f));
    cache.write_value(0, t, std::vector<float>{static_cast<float>(t)});
  }
  const auto out = run_attend(cache, make_queries(shape, 5, 5).view()).out;
  EXPECT_EQ(out, (std::vector<float>{0.f, 0.5f, 1.f, 1.5f, 2.f}));
}

TEST(Attend, VisibilityGoesByPositionNotByRow) {
  const LayerShape shape{1, 2, 6, 6};
  auto cache = make_cache(shape, 40);
  for (Index t = 0; t < 10; ++t) cache.move_row(0, 4 * t, t);  // positions 0, 4, 8, ...
  cache.resize(0, 10);
  expect_oracle(cache, make_queries(shape, 30, 40).view());
}

TEST(Attend, RowsAtOnePositionAreSeenTogether) {
  const LayerShape shape{1, 1, 6, 6};
  auto cache = RaggedCache<>::create(shape).value();
  Random random(1);
  const auto data = normals(4 * 6, random);
  const std::vector<Position> positions{3, 3, 3, 7};
  ASSERT_TRUE(
      cache.append(data.data(), Strides::head_major(4, 6), data.data(), Strides::head_major(4, 6), positions).ok());
  expect_oracle(cache, make_queries(shape, 5, 8).view());
}

TEST(Attend, ALogMassOfLogNWeighsAsMuchAsNEqualRows) {
  const LayerShape shape{1, 2, 8, 8};
  auto repeated = make_cache(shape, 6);
  for (const Index t : {3, 4, 5}) {
    repeated.write_key(0, t, {repeated.key_rows(0, 2, 1), 8});
    repeated.write_value(0, t, {repeated.value_rows(0, 2, 1), 8});
  }
  auto merged = repeated.clone().value();
  merged.resize(0, 3);
  merged.write_log_mass(0, 2, std::log(4.f));
  const auto queries = make_queries(shape, 2, 8);
  EXPECT_LT(relative_error(run_attend(merged, queries.view()).out, run_attend(repeated, queries.view()).out), 1e-6);
}

/// A cache that tells of log masses one by one.
struct MassesOneByOne : RaggedCache<float> {
  explicit MassesOneByOne(RaggedCache&& cache) : RaggedCache(std::move(cache)) {}
  void stored_log_masses(Index, Index, Index) const = delete;
};
static_assert(HasStoredLogMass<RaggedCache<float>> && !HasStoredLogMass<MassesOneByOne>);

TEST(Attend, LogMassesThatLieTogetherAreUsedInPlaceWithTheSameBits) {
  const LayerShape shape{3, 3, 16, 10};
  const auto cache = ragged_cache(shape, 1700);
  const MassesOneByOne one_by_one(cache.clone().value());
  for (const Index count : {1, 40}) {
    const auto queries = make_queries(shape, count, 1700);
    const auto got = run_attend(cache, queries.view()), wanted = run_attend(one_by_one, queries.view());
    ASSERT_FALSE(wanted.out.empty());
    EXPECT_EQ(got.out, wanted.out);
    EXPECT_EQ(got.log_sum_exp, wanted.log_sum_exp);
  }
}

// --- Numbers at the edge ---------------------------------------------------------------------------------------

TEST(Attend, HugeLogitsDoNotOverflow) {
  const LayerShape shape{1, 1, 4, 2};
  for (const Index rows : {3, 300}) {
    auto cache = make_cache(shape, rows);
    for (Index t = 0; t < rows; ++t) {
      cache.write_key(0, t, std::vector<float>{1e4f * static_cast<float>(t + 1), 0, 0, 0});
      cache.write_value(0, t, std::vector<float>{static_cast<float>(t), 1});
    }
    const std::vector<Position> positions{rows};
    for (const float q : {1e10f, -1e10f}) {
      const std::vector<float> query{q, 0, 0, 0};
      const auto got = run_attend(cache, head_major_queries(query.data(), 1, 4, positions));
      ASSERT_EQ(got.out.size(), 2u);
      EXPECT_NEAR(got.out[0], q > 0 ? static_cast<float>(rows - 1) : 0.f, 1e-30f);  // all weight on one row
      EXPECT_EQ(got.out[1], 1.f);
      EXPECT_FLOAT_EQ(got.log_sum_exp[0], q * 0.5f * 1e4f * (q > 0 ? static_cast<float>(rows) : 1.f));
    }
  }
}

TEST(Attend, AVerySmallLogMassHidesARow) {
  const LayerShape shape{1, 1, 4, 4};
  auto cache = make_cache(shape, 200);
  cache.write_log_mass(0, 100, -1e4f);
  const auto queries = make_queries(shape, 1, 200);
  const auto wanted = attend_oracle(cache, queries.view(), [](Index, Index t) { return t != 100; });
  EXPECT_LT(relative_error(run_attend(cache, queries.view()).out, wanted.out), kTolerance);
}

/// Rows that no query of the call can see.
class UnseenRow : public testing::TestWithParam<float> {};

TEST_P(UnseenRow, DoesNotReachTheOutputWhateverIsInIt) {
  const LayerShape shape{1, 3, 8, 8};
  auto cache = make_cache(shape, 20);
  const auto queries = make_queries(shape, 4, 14);  // positions 10 .. 13
  const auto wanted = run_attend(cache, queries.view());
  const std::vector<float> bad(8, GetParam());
  for (const Index t : {14, 19}) {
    cache.write_key(0, t, bad);
    cache.write_value(0, t, bad);
  }
  EXPECT_EQ(run_attend(cache, queries.view()).out, wanted.out);
}

INSTANTIATE_TEST_SUITE_P(Contents, UnseenRow,
                         testing::Values(3e38f, std::numeric_limits<float>::infinity(),
                                         std::numeric_limits<float>::quiet_NaN()));

// --- Calls -----------------------------------------------------------------------------------------------------

TEST(Attend, GivesTheSameBitsForEveryExecutor) {
  const LayerShape shape{5, 3, 16, 24};
  for (const auto& [rows, count] : {std::pair<Index, Index>{300, 50}, {5000, 1}}) {
    const auto cache = ragged_cache(shape, rows);
    const auto queries = make_queries(shape, count, rows);
    const auto serial = run_attend(cache, queries.view());
    for (const Index threads : {1, 2, 3, 4}) {
      const auto pooled = run_attend(cache, queries.view(), ThreadPool(threads));
      EXPECT_EQ(pooled.out, serial.out);
      EXPECT_EQ(pooled.log_sum_exp, serial.log_sum_exp);
    }
  }
}

/// A call of `attend` whose arguments are all good, to be spoilt one at a time.
struct Call {
  LayerShape shape{2, 2, 8, 6};
  RaggedCache<> cache = make_cache(shape, 20);
  OwnedQueries owned = make_queries(shape, 3, 20);
  QueryRows queries = owned.view();
  std::vector<float> data = std::vector<float>(4 * 3 * 6, -7.f);
  std::vector<float> log_sum_exp = std::vector<float>(4 * 3);
  AttentionOutput out{.data = data.data(), .head_stride = 18, .row_stride = 6, .log_sum_exp = log_sum_exp};
  std::size_t bytes = attend_workspace_bytes(shape, 1);

  Status run() {
    std::vector<std::byte> memory(bytes);
    SerialExecutor executor;
    return attend(cache, queries, out, memory, executor);
  }
};

TEST(Attend, WritesOutputsOfAnyStrideAndNothingElse) {
  Call plain, strided;
  ASSERT_TRUE(plain.run().ok());
  constexpr Index row_stride = 4 * 6 + 5;  // [rows][H * G][E] and a gap
  std::vector<float> data(3 * row_stride, -7.f);
  strided.out = {.data = data.data(), .head_stride = 6, .row_stride = row_stride};
  ASSERT_TRUE(strided.run().ok());
  for (std::size_t i = 0; i < 3; ++i) {
    for (std::size_t x = 0; x < row_stride; ++x) {
      const bool gap = x >= 24;
      EXPECT_EQ(data[i * row_stride + x], gap ? -7.f : plain.data[x / 6 * 18 + i * 6 + x % 6]);
    }
  }
}

TEST(Attend, NamesABadArgumentAndWritesNothing) {
  const auto expect_refused = [](Call& call, StatusCode code, std::string_view argument) {
    const Status status = call.run();
    EXPECT_EQ(status.code(), code) << status.detail();
    EXPECT_EQ(status.argument(), argument) << status.detail();
    EXPECT_EQ(call.data, std::vector<float>(4 * 3 * 6, -7.f));
  };
  const auto refused = [&](StatusCode code, std::string_view argument, auto spoil) {
    Call call;
    spoil(call);
    expect_refused(call, code, argument);
  };
  using enum StatusCode;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  refused(invalid_argument, "queries", [](Call& c) { c.queries.data = nullptr; });
  refused(invalid_argument, "queries", [](Call& c) { c.queries.positions = {}; });
  refused(invalid_argument, "queries", [](Call& c) { c.queries.row_stride = 7; });
  refused(invalid_argument, "queries", [](Call& c) { c.queries.head_stride = -24; });
  refused(invalid_argument, "queries", [&](Call& c) { c.queries.scale = nan; });
  refused(invalid_argument, "queries", [](Call& c) { c.queries.scale = -1.f; });
  refused(size_mismatch, "queries", [](Call& c) { c.queries.query_heads = 2; });
  refused(size_mismatch, "queries", [](Call& c) { c.queries.dim = 6; });
  refused(invalid_argument, "queries", [](Call& c) { std::swap(c.owned.positions[0], c.owned.positions[2]); });
  refused(invalid_argument, "queries", [](Call& c) { c.owned.positions[0] = -1; });  // before every row
  refused(invalid_argument, "out", [](Call& c) { c.out.data = nullptr; });
  refused(invalid_argument, "out", [](Call& c) { c.out.row_stride = 5; });
  refused(invalid_argument, "out", [](Call& c) { c.out.head_stride = -18; });
  refused(size_mismatch, "out", [](Call& c) { c.out.log_sum_exp = c.out.log_sum_exp.first(11); });
  refused(invalid_argument, "view", [](Call& c) { c.cache.resize(1, 0); });
  refused(not_finite, "log_mass", [&](Call& c) { c.cache.write_log_mass(1, 7, nan); });
  refused(workspace_too_small, "workspace", [](Call& c) { c.bytes /= 2; });
  refused(workspace_too_small, "workspace", [](Call& c) { c.bytes = 0; });
}

TEST(Attend, FindsABadLogMassInEveryPartOfLongRowsAndWritesNothing) {
  const LayerShape shape{2, 2, 8, 6};
  constexpr Index kRows = 3000;
  const auto queries = make_queries(shape, 1, 1500);  // sees half of them
  const std::size_t bytes = attend_workspace_bytes(shape, 1);
  for (const Index bad_row : {0, 1023, 1499, 1500, 2999}) {
    for (const float bad : {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()}) {
      auto cache = make_cache(shape, kRows);
      cache.write_log_mass(1, bad_row, bad);
      const auto expect_found = [&](const auto& view) {
        std::vector<float> data(4 * 6, -7.f), log_sum_exp(4, -7.f);
        std::vector<std::byte> memory(bytes);
        SerialExecutor executor;
        const AttentionOutput out{.data = data.data(), .head_stride = 6, .row_stride = 6, .log_sum_exp = log_sum_exp};
        const Status status = attend(view, queries.view(), out, memory, executor);
        EXPECT_EQ(status.code(), StatusCode::not_finite) << bad_row << " " << bad;
        EXPECT_EQ(status.argument(), "log_mass");
        EXPECT_EQ(status.head(), 1);
        EXPECT_EQ(status.row(), bad_row);
        EXPECT_EQ(data, std::vector<float>(4 * 6, -7.f));
        EXPECT_EQ(log_sum_exp, std::vector<float>(4, -7.f));
      };
      expect_found(cache);
      expect_found(MassesOneByOne(cache.clone().value()));
    }
  }
}

TEST(Attend, NamesTheHeadWhoseRowsAQueryPrecedes) {
  Call call;
  for (Index t = 0; t < 5; ++t) call.cache.move_row(1, t + 15, t);
  call.cache.resize(1, 5);  // positions 15 .. 19
  call.owned.positions = {10, 15, 16};
  call.queries = call.owned.view();
  EXPECT_EQ(call.run().argument(), "queries");
  EXPECT_EQ(call.run().head(), 1);
}

}  // namespace
}  // namespace kvfold::test
