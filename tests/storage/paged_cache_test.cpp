// PagedCache: rows in pages of a shared pool, which get them back when rows go.
#include <kvfold/compressor.hpp>
#include <kvfold/storage/paged_cache.hpp>

#include <algorithm>
#include <cstring>
#include <limits>
#include <set>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "builders.hpp"
#include "counting_memory.hpp"
#include "merge_oracle.hpp"
#include "new_rows.hpp"

namespace kvfold::test {
namespace {

struct CacheTag {};
using Memory = CountingMemory<CacheTag>;
using Pool = PagePool<Memory>;

constexpr LayerShape kShape{.kv_heads = 3, .group_size = 2, .key_dim = 32, .value_dim = 64};
constexpr Index kPageSize = 16;

/// The same rows for every cache.
void fill(Index h, Index t, std::span<float> key, std::span<float> value) {
  Random own(static_cast<std::uint64_t>(1000 * h + t)), topic(static_cast<std::uint64_t>(t % 5));
  const auto next = [&] { return topic.normal() + 0.3f * own.normal(); };  // some rows say nearly the same
  for (float& x : key) x = next();
  for (float& x : value) x = next();
}
NewRows new_rows(Index first, Index n) { return {kShape, first, n, fill}; }

/// Everything that can be read of a cache.
template <class View>
std::vector<std::vector<double>> contents(const View& view) {
  std::vector<std::vector<double>> all;
  for (Index h = 0; h < view.shape().kv_heads; ++h) {
    const OracleHead head = read_head(view, h);
    all.insert(all.end(), head.keys.begin(), head.keys.end());
    all.insert(all.end(), head.values.begin(), head.values.end());
    all.emplace_back(head.positions.begin(), head.positions.end());
    all.push_back(head.log_masses);
  }
  return all;
}

template <class K, class V, PageTables T>
struct Kind {
  using Key = K;
  using Value = V;
  static constexpr PageTables kTables = T;
};

struct KindName {
  template <class K>
  static std::string GetName(int i) {  // NOLINT(readability-identifier-naming): GoogleTest's
    constexpr const char* elements[] = {"F32", "F16", "Bf16F32", "Fp8", "Int8", "Q8Q4"};
    return std::string(elements[i % 6]) + (K::kTables == PageTables::shared ? "SharedTable" : "TablePerHead");
  }
};
constexpr auto kShared = PageTables::shared;
constexpr auto kPerHead = PageTables::per_head;
using Kinds =
    testing::Types<Kind<float, float, kShared>, Kind<Float16, Float16, kShared>, Kind<BFloat16, float, kShared>,
                   Kind<Float8E4M3, Float8E4M3, kShared>, Kind<Int8, Int8, kShared>,
                   Kind<BlockQ8_0, BlockQ4_0, kShared>, Kind<float, float, kPerHead>, Kind<Float16, Float16, kPerHead>,
                   Kind<BFloat16, float, kPerHead>, Kind<Float8E4M3, Float8E4M3, kPerHead>, Kind<Int8, Int8, kPerHead>,
                   Kind<BlockQ8_0, BlockQ4_0, kPerHead>>;

template <class K>
class PagedCacheTest : public testing::Test {
 protected:
  using Cache = PagedCache<typename K::Key, typename K::Value, Memory>;
  static constexpr Index kHeadsOfAPage = K::kTables == PageTables::shared ? 1 : kShape.kv_heads;

  PagedCacheTest() { Memory::reset(); }
  ~PagedCacheTest() override { EXPECT_EQ(Memory::live, 0u) << "memory leaks"; }

  static PagedCacheOptions options() { return {.page_size = kPageSize, .tables = K::kTables}; }
  static Pool make_pool(Index max_slabs = 20, Index pages_per_slab = 8) {
    return Pool::create({.page_bytes = Cache::page_bytes(kShape, options()).value(),
                         .pages_per_slab = pages_per_slab,
                         .max_slabs = max_slabs})
        .value();
  }
  static Cache make(Pool& pool, Index rows = 0) {
    Cache cache = Cache::create(kShape, pool, options()).value();
    if (rows > 0) {
      EXPECT_TRUE(new_rows(0, rows).append_to(cache).ok());
    }
    return cache;
  }
  /// Pages that heads of these rows need.
  static Index pages_for(const std::vector<Index>& rows) {
    if (K::kTables == PageTables::shared) {
      return detail::pages_for(*std::max_element(rows.begin(), rows.end()), kPageSize);
    }
    Index pages = 0;
    for (const Index n : rows) pages += detail::pages_for(n, kPageSize);
    return pages;
  }
  static Index pages_of(const Cache& cache) {
    std::set<PageId> ids;
    for (Index h = 0; h < kShape.kv_heads; ++h) {
      for (const PageId id : cache.page_table(h)) ids.insert(id);
    }
    return static_cast<Index>(ids.size());
  }
};
TYPED_TEST_SUITE(PagedCacheTest, Kinds, KindName);

TYPED_TEST(PagedCacheTest, ModelsTheWholeContract) {
  using Tested = typename TestFixture::Cache;
  static_assert(MutableKVCacheView<Tested> && HasWritableLogMass<Tested> && HasRope<Tested> && HasRowBytes<Tested>);
  static_assert(HasContiguousRows<Tested> && HasRowCounts<Tested> && HasLiveBytes<Tested>);
  static_assert(!std::copyable<Tested> && std::movable<Tested>);
  Pool pool = TestFixture::make_pool();
  const auto cache = TestFixture::make(pool);
  EXPECT_EQ(cache.shape(), kShape);
  EXPECT_EQ(cache.size(2), 0);
  EXPECT_EQ(cache.live_bytes(), 0);
  EXPECT_TRUE(cache.page_table(0).empty());
  EXPECT_EQ(pool.live_bytes(), 0) << "no page before there is a row";
}

/// What a row reads as after it has been written to storage of type E.
template <class E>
std::vector<float> stored(std::span<const float> row) {
  std::vector<E> units(ix(detail::row_units<E>(static_cast<Index>(row.size()))));
  float scale = 1.f;
  std::vector<float> out(row.size());
  const auto width = static_cast<Index>(row.size());
  detail::write_row<E>(row.data(), width, units.data(), 1, &scale);
  detail::read_rows<E>(units.data(), detail::row_units<E>(width), 1, 1, width, &scale, 1, out.data());
  return out;
}

TYPED_TEST(PagedCacheTest, HoldsTheRowsThatAreAppendedWhateverTheirStrides) {
  const auto orders = [](Index n, Index width) {
    return std::vector<Strides>{Strides::head_major(n, width), Strides::token_major(kShape.kv_heads, width),
                                Strides::transposed(n, width)};
  };
  const NewRows plain = new_rows(0, 21);
  for (std::size_t order = 0; order < 3; ++order) {
    Pool pool = TestFixture::make_pool();
    auto cache = TestFixture::make(pool);
    const NewRows rows(kShape, 0, 21, fill, orders(21, kShape.key_dim)[order], orders(21, kShape.value_dim)[2 - order]);
    ASSERT_TRUE(rows.append_to(cache).ok());
    std::vector<float> key(ix(kShape.key_dim)), value(ix(kShape.value_dim)), row(key.size());
    for (Index h = 0; h < kShape.kv_heads; ++h) {
      ASSERT_EQ(cache.size(h), 21);
      for (Index t = 0; t < 21; ++t) {
        cache.read_keys(h, t, 1, key);
        cache.read_values(h, t, 1, value);
        const std::span<const float> keys(plain.keys), values(plain.values);
        EXPECT_EQ(key, stored<typename TypeParam::Key>(keys.subspan(ix((h * 21 + t) * kShape.key_dim), key.size())));
        EXPECT_EQ(value,
                  stored<typename TypeParam::Value>(values.subspan(ix((h * 21 + t) * kShape.value_dim), value.size())));
        EXPECT_EQ(cache.position(h, t), t);
        EXPECT_EQ(cache.log_mass(h, t), 0.f);
        const auto as_stored = cache.stored_keys(h, t, 21 - t);
        detail::read_rows(as_stored.data, as_stored.stride, 1, 1, kShape.key_dim, as_stored.scales, 1, row.data());
        EXPECT_EQ(row, key);
        EXPECT_LE(as_stored.count, 21 - t);
      }
    }
  }
}

TYPED_TEST(PagedCacheTest, GrowsPageByPageWithoutLosingEarlierRows) {
  Pool pool = TestFixture::make_pool();
  auto cache = TestFixture::make(pool);
  const auto all = [&] {
    Pool other_pool = TestFixture::make_pool();
    return contents(TestFixture::make(other_pool, 100));
  }();
  Index rows = 0;
  for (const Index more : {1, 1, 13, 1, 1, 40, 42, 1}) {
    ASSERT_TRUE(new_rows(rows, more).append_to(cache).ok());
    rows += more;
    EXPECT_EQ(pool.pages_in_use(), TestFixture::pages_for({rows, rows, rows}));
    EXPECT_EQ(TestFixture::pages_of(cache), pool.pages_in_use()) << "no page twice";
  }
  EXPECT_EQ(contents(cache), all);
}

TYPED_TEST(PagedCacheTest, ReadsAnyRunOfRows) {
  Pool pool = TestFixture::make_pool();
  const auto cache = TestFixture::make(pool, 70);
  std::vector<float> all(ix(70 * kShape.value_dim)), some(all.size());
  for (Index h = 0; h < kShape.kv_heads; ++h) {
    for (Index t = 0; t < 70; ++t) {
      cache.read_values(h, t, 1, std::span(all).subspan(ix(t * kShape.value_dim)));
    }
    for (const auto& [t, n] : {std::pair<Index, Index>{0, 70}, {15, 2}, {16, 16}, {31, 39}, {69, 1}}) {
      cache.read_values(h, t, n, some);
      EXPECT_TRUE(std::equal(some.begin(), some.begin() + n * kShape.value_dim, all.begin() + t * kShape.value_dim));
      const float* in_place = cache.value_rows(h, t, n);
      const bool may = std::same_as<typename TypeParam::Value, float> && t % kPageSize + n <= kPageSize;
      ASSERT_EQ(in_place != nullptr, may) << t << " " << n;
      if (may) {
        EXPECT_TRUE(std::equal(some.begin(), some.begin() + n * kShape.value_dim, in_place));
      }
    }
  }
}

TYPED_TEST(PagedCacheTest, ResizeGivesThePagesBackThatNoRowNeeds) {
  Pool pool = TestFixture::make_pool();
  auto cache = TestFixture::make(pool, 100);
  std::vector<Index> rows(3, 100);
  const auto before = contents(cache);
  const std::pair<Index, Index> cuts[] = {{0, 33}, {1, 32}, {2, 97}, {2, 96}, {2, 17}, {0, 1}, {1, 0}, {2, 0}, {0, 0}};
  for (const auto& [h, n] : cuts) {
    cache.resize(h, n);
    rows[ix(h)] = n;
    EXPECT_EQ(cache.size(h), n);
    EXPECT_EQ(pool.pages_in_use(), TestFixture::pages_for(rows)) << h << " " << n;
    EXPECT_EQ(TestFixture::pages_of(cache), pool.pages_in_use());
    for (Index g = 0; g < 3; ++g) {
      const OracleHead left = read_head(cache, g);
      for (Index t = 0; t < rows[ix(g)]; ++t) {
        const std::vector<double>& row = before[ix(g * 202 + t)];  // 100 keys, 100 values, positions, masses
        ASSERT_EQ(left.keys[ix(t)], row);
      }
    }
  }
  EXPECT_EQ(cache.live_bytes(), 0);
  pool.trim();
  EXPECT_EQ(pool.live_bytes(), 0);
}

TYPED_TEST(PagedCacheTest, RowsCanBeAppendedToHeadsOfUnequalLength) {
  Pool pool = TestFixture::make_pool();
  auto cache = TestFixture::make(pool, 40);
  cache.resize(0, 3);
  cache.resize(2, 0);
  ASSERT_TRUE(new_rows(40, 30).append_to(cache).ok());
  EXPECT_EQ(pool.pages_in_use(), TestFixture::pages_for({33, 70, 30}));
  Pool other_pool = TestFixture::make_pool();
  const auto whole = TestFixture::make(other_pool, 70);
  const OracleHead all = read_head(whole, 0), cut = read_head(cache, 0);
  EXPECT_EQ(cut.keys[2], all.keys[2]);
  for (Index i = 0; i < 30; ++i) {
    EXPECT_EQ(cut.keys[ix(3 + i)], all.keys[ix(40 + i)]);
    EXPECT_EQ(cut.values[ix(3 + i)], all.values[ix(40 + i)]);
    EXPECT_EQ(cut.positions[ix(3 + i)], 40 + i);
  }
}

TYPED_TEST(PagedCacheTest, AnAppendThatThePoolHasNoPagesForChangesNothing) {
  Pool pool = TestFixture::make_pool(1, 7 * TestFixture::kHeadsOfAPage - 1);  // short of one page
  auto cache = TestFixture::make(pool, 40);
  const auto before = contents(cache);
  const Index pages = pool.pages_in_use(), bytes = cache.live_bytes();
  const std::size_t live = Memory::live;
  const Status status = new_rows(40, 60).append_to(cache);
  EXPECT_EQ(status.code(), StatusCode::out_of_memory);
  EXPECT_EQ(contents(cache), before);
  EXPECT_EQ(pool.pages_in_use(), pages);
  EXPECT_EQ(cache.live_bytes(), bytes);
  EXPECT_EQ(Memory::live, live);
  EXPECT_TRUE(new_rows(40, 50).append_to(cache).ok());
}

TYPED_TEST(PagedCacheTest, AnAppendThatFindsNoMemoryChangesNothing) {
  Pool pool = TestFixture::make_pool(20, 4);
  auto cache = TestFixture::make(pool, 5);
  const auto before = contents(cache);
  Status status;
  int failing_call = -1;
  do {  // every allocation of the append fails once
    const std::size_t live = Memory::live;
    Memory::calls = 0;
    Memory::fail_from = ++failing_call;
    status = new_rows(5, 90).append_to(cache);
    if (!status.ok()) {
      ASSERT_EQ(status.code(), StatusCode::out_of_memory);
      ASSERT_EQ(contents(cache), before);
      Memory::fail_from = -1;
      pool.trim();  // slabs that came for tables that were grown before are empty, and stay the pool's until then
      ASSERT_EQ(Memory::live, live);
    }
  } while (!status.ok());
  EXPECT_GT(failing_call, 1);
  Memory::fail_from = -1;
  EXPECT_EQ(cache.size(1), 95);
}

TYPED_TEST(PagedCacheTest, RefusesWhatCannotBeAppended) {
  Pool pool = TestFixture::make_pool();
  auto cache = TestFixture::make(pool, 4);
  const auto before = contents(cache);
  NewRows rows = new_rows(4, 2);
  EXPECT_EQ(cache.append(nullptr, {}, rows.values.data(), {}, rows.positions).argument(), "keys");
  EXPECT_EQ(cache.append(rows.keys.data(), {}, nullptr, {}, rows.positions).argument(), "values");
  rows.positions = {6, 5};
  EXPECT_EQ(rows.append_to(cache).argument(), "positions");
  rows.positions = {2, 5};
  EXPECT_EQ(rows.append_to(cache).argument(), "positions");
  EXPECT_EQ(contents(cache), before);
  rows.positions = {};
  EXPECT_TRUE(rows.append_to(cache).ok());
  rows.positions = {3, 9};
  EXPECT_TRUE(rows.append_to(cache).ok()) << "equal positions and gaps are fine";
  EXPECT_EQ(cache.position(2, 5), 9);
}

TYPED_TEST(PagedCacheTest, MovesAndReleasesItsPages) {
  Pool pool = TestFixture::make_pool();
  auto first = TestFixture::make(pool, 20);
  const auto before = contents(first);
  auto second = std::move(first);
  EXPECT_EQ(contents(second), before);
  {
    auto third = TestFixture::make(pool, 40);
    third = std::move(second);
    EXPECT_EQ(contents(third), before);
  }
  second = TestFixture::make(pool);
  EXPECT_EQ(pool.pages_in_use(), 0);
}

/// The rows of a paged cache as they read, in contiguous memory of the same type.
template <class K, class V, class Cache>
RaggedCache<float, float> as_floats(const Cache& cache) {
  auto copy = RaggedCache<float, float>::create(kShape).value();
  const Index T = cache.size(0);
  std::vector<float> keys(ix(kShape.kv_heads * T * kShape.key_dim)), values(ix(kShape.kv_heads * T * kShape.value_dim));
  for (Index h = 0; h < kShape.kv_heads; ++h) {
    cache.read_keys(h, 0, T, std::span(keys).subspan(ix(h * T * kShape.key_dim)));
    cache.read_values(h, 0, T, std::span(values).subspan(ix(h * T * kShape.value_dim)));
  }
  EXPECT_TRUE(copy.append(keys.data(), Strides::head_major(T, kShape.key_dim), values.data(),
                          Strides::head_major(T, kShape.value_dim), positions_from(0, T))
                  .ok());
  return copy;
}

TYPED_TEST(PagedCacheTest, CompressesAsContiguousRowsDo) {
  const auto queries = make_queries(kShape, 40, 150);
  const Ems method({.score = {.window = 16}, .budget = {.rows = 40}, .reduce = {.key_mode = KeyMode::direction}});
  Pool pool = TestFixture::make_pool();
  auto cache = TestFixture::make(pool, 150);
  auto floats = as_floats<typename TypeParam::Key, typename TypeParam::Value>(cache);
  const auto report = method.compress(cache, queries.view());
  const auto wanted = method.compress(floats, queries.view());
  ASSERT_TRUE(report.ok()) << report.status().detail();
  EXPECT_EQ(report->rows_kept, 120);
  EXPECT_EQ(report->rows_rewritten, wanted->rows_rewritten);
  EXPECT_GT(report->rows_rewritten, 0);
  EXPECT_EQ(report->kept_score_share, wanted->kept_score_share);
  for (Index h = 0; h < kShape.kv_heads; ++h) {
    const OracleHead got = read_head(cache, h), expected = read_head(floats, h);
    EXPECT_EQ(got.positions, expected.positions);
    EXPECT_EQ(got.log_masses, expected.log_masses);
    const auto as_stored = [&]<class E>(const Doubles& row, E /*type*/) {
      const std::vector<float> narrow(row.begin(), row.end());
      const std::vector<float> read = stored<E>(narrow);
      return Doubles(read.begin(), read.end());
    };
    for (Index t = 0; t < cache.size(h); ++t) {  // merged rows have been rounded to the storage type, and only they
      const auto &key = got.keys[ix(t)], &value = got.values[ix(t)];
      EXPECT_TRUE(key == expected.keys[ix(t)] || key == as_stored(expected.keys[ix(t)], typename TypeParam::Key{}));
      EXPECT_TRUE(value == expected.values[ix(t)] ||
                  value == as_stored(expected.values[ix(t)], typename TypeParam::Value{}));
    }
  }
}

TYPED_TEST(PagedCacheTest, ReportsTheBytesThatThePoolHasGotBack) {
  const auto queries = make_queries(kShape, 40, 150);
  const EmsEvict method({.score = {.window = 16}, .budget = {.rows = 30}, .reduce = {}});
  Pool pool = TestFixture::make_pool();
  auto cache = TestFixture::make(pool, 150);
  const auto page_bytes = static_cast<Index>(pool.page_bytes());
  const auto table_bytes = [](Index pages) { return pages * static_cast<Index>(sizeof(PageId)); };
  const Index before = pool.pages_in_use();
  const auto report = method.compress(cache, queries.view());
  ASSERT_TRUE(report.ok());
  const Index after = pool.pages_in_use();
  ASSERT_LT(after, before / 2);
  EXPECT_EQ(report->live_bytes_before, before * page_bytes + table_bytes(before));
  EXPECT_EQ(report->live_bytes_after, after * page_bytes + table_bytes(after));
  EXPECT_EQ(report->live_bytes_after, cache.live_bytes());
  EXPECT_LT(report->bytes_after, report->live_bytes_after) << "rows fill the last pages in part";

  const std::size_t live = Memory::live;
  const std::size_t freed = pool.trim();
  EXPECT_EQ(Memory::live, live - freed);
  EXPECT_GE(static_cast<Index>(freed), (before - after - 8) / 8 * 8 * page_bytes) << "all slabs but those in use";
  EXPECT_EQ(pool.live_bytes() + table_bytes(after), static_cast<Index>(Memory::live));
}

TYPED_TEST(PagedCacheTest, PagesThatOneSequenceGivesBackServeAnotherAndLeaveTheFirstAlone) {
  const auto queries = make_queries(kShape, 40, 100);
  const EmsEvict method({.score = {.window = 16}, .budget = {.rows = 20}, .reduce = {}});
  const Index pages = TestFixture::pages_for({100, 100, 100});
  Pool pool = TestFixture::make_pool(1, pages);  // room for one sequence
  auto first = TestFixture::make(pool, 100);
  auto second = TestFixture::Cache::create(kShape, pool, TestFixture::options()).value();
  ASSERT_EQ(new_rows(0, 48).append_to(second).code(), StatusCode::out_of_memory);
  ASSERT_TRUE(method.compress(first, queries.view()).ok());
  const auto kept = contents(first);
  ASSERT_TRUE(new_rows(500, 48).append_to(second).ok());
  const auto other = contents(second);
  EXPECT_EQ(contents(first), kept);
  std::set<PageId> mine;
  for (Index h = 0; h < 3; ++h) mine.insert(first.page_table(h).begin(), first.page_table(h).end());
  for (Index h = 0; h < 3; ++h) {
    for (const PageId id : second.page_table(h)) EXPECT_EQ(mine.count(id), 0u);
  }
  // Compressing one of them again does not change a byte of the other.
  const EmsEvict harder({.score = {.window = 16}, .budget = {.rows = 10}, .reduce = {}});
  ASSERT_TRUE(harder.compress(first, queries.view()).ok());
  EXPECT_EQ(contents(second), other);
}

TYPED_TEST(PagedCacheTest, LayersOfDifferentShapesShareAPool) {
  Pool pool = TestFixture::make_pool();
  auto wide = TestFixture::make(pool, 40);
  const LayerShape narrow{.kv_heads = 2, .group_size = 1, .key_dim = 32, .value_dim = 32};
  auto other = TestFixture::Cache::create(narrow, pool, TestFixture::options());
  ASSERT_TRUE(other.ok()) << "its pages are smaller than the pool's";
  const auto before = contents(wide);
  const std::vector<float> rows(ix(2 * 40 * 32), 7.f);
  ASSERT_TRUE(other
                  ->append(rows.data(), Strides::head_major(40, 32), rows.data(), Strides::head_major(40, 32),
                           positions_from(0, 40))
                  .ok());
  EXPECT_EQ(contents(wide), before);
}

// --- Bit for bit beside RaggedCache ------------------------------------------------------------------------------------

template <class E>
void expect_bits_of_ragged(PageTables tables) {
  const LayerShape shape{.kv_heads = 3, .group_size = 2, .key_dim = 16, .value_dim = 12};
  auto ragged = make_cache<E>(shape, 200);
  const auto queries = make_queries(shape, 60, 200);
  const PagedCacheOptions options{.page_size = 32, .tables = tables};
  auto pool = PagePool<>::create({.page_bytes = PagedCache<E>::page_bytes(shape, options).value()}).value();
  auto paged = PagedCache<E>::create(shape, pool, options).value();
  std::vector<float> keys(ix(3 * 200 * 16)), values(ix(3 * 200 * 12));
  for (Index h = 0; h < 3; ++h) {
    ragged.read_keys(h, 0, 200, std::span(keys).subspan(ix(h * 200 * 16)));
    ragged.read_values(h, 0, 200, std::span(values).subspan(ix(h * 200 * 12)));
  }
  ASSERT_TRUE(paged
                  .append(keys.data(), Strides::head_major(200, 16), values.data(), Strides::head_major(200, 12),
                          positions_from(0, 200))
                  .ok());
  for (Index t = 0; t < 200; t += 3) {  // some rows stand for several already
    ragged.write_log_mass(1, t, 0.01f * static_cast<float>(t));
    paged.write_log_mass(1, t, 0.01f * static_cast<float>(t));
  }
  for (const Index budget : {150, 60, 20}) {  // again and again
    const Ems method({.score = {.window = 16}, .budget = {.rows = budget}, .reduce = {.key_mode = KeyMode::direction}});
    const auto a = method.compress(ragged, queries.view());
    const auto b = method.compress(paged, queries.view());
    ASSERT_TRUE(a.ok() && b.ok());
    EXPECT_GT(b->rows_rewritten, 0);
    EXPECT_EQ(a->rows_merged, b->rows_merged);
    EXPECT_EQ(a->bytes_after, b->bytes_after) << "both count positions and log masses";
    EXPECT_EQ(contents(ragged), contents(paged));
  }
}

TEST(PagedCacheBesideRagged, CompressesToTheSameBits) {
  for (const PageTables tables : {PageTables::shared, PageTables::per_head}) {
    expect_bits_of_ragged<float>(tables);
    expect_bits_of_ragged<Float16>(tables);
    expect_bits_of_ragged<BFloat16>(tables);
  }
}

// --- Many sequences at once --------------------------------------------------------------------------------------------

TEST(PagedCachesOfOnePool, GrowAndCompressAtTheSameTime) {
  constexpr LayerShape shape{.kv_heads = 2, .group_size = 1, .key_dim = 16, .value_dim = 16};
  const PagedCacheOptions options{.page_size = 8, .tables = PageTables::per_head};
  const auto queries = make_queries(shape, 20, 120);
  const EmsEvict method({.score = {.window = 16}, .budget = {.rows = 30}, .reduce = {}});
  auto pool =
      PagePool<>::create(
          {.page_bytes = PagedCache<>::page_bytes(shape, options).value(), .pages_per_slab = 16, .max_slabs = 40})
          .value();
  constexpr int sequences = 6;
  std::vector<PagedCache<>> caches;
  std::vector<RaggedCache<>> wanted;
  for (int i = 0; i < sequences; ++i) {
    caches.push_back(PagedCache<>::create(shape, pool, options).value());
    wanted.push_back(make_cache(shape, 120, static_cast<std::uint64_t>(i)));
  }
  const auto fill_and_compress = [&](int i) {
    const RaggedCache<>& rows = wanted[static_cast<std::size_t>(i)];
    PagedCache<>& cache = caches[static_cast<std::size_t>(i)];
    std::vector<float> keys(ix(2 * 120 * 16)), values(keys.size());
    for (Index h = 0; h < 2; ++h) {
      rows.read_keys(h, 0, 120, std::span(keys).subspan(ix(h * 120 * 16)));
      rows.read_values(h, 0, 120, std::span(values).subspan(ix(h * 120 * 16)));
    }
    for (Index t = 0; t < 120; ++t) {
      const Position position = t;
      ASSERT_TRUE(cache
                      .append(keys.data() + t * 16, Strides::head_major(120, 16), values.data() + t * 16,
                              Strides::head_major(120, 16), std::span(&position, 1))
                      .ok());
    }
    ASSERT_TRUE(method.compress(cache, queries.view()).ok());
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < sequences; ++i) threads.emplace_back([&, i] { fill_and_compress(i); });
  for (std::thread& thread : threads) thread.join();
  for (int i = 0; i < sequences; ++i) {
    auto& rows = wanted[static_cast<std::size_t>(i)];
    ASSERT_TRUE(method.compress(rows, queries.view()).ok());
    EXPECT_EQ(contents(caches[static_cast<std::size_t>(i)]), contents(rows)) << i;
  }
}

// --- What is refused ---------------------------------------------------------------------------------------------------

TEST(PagedCacheOptionsTest, ThatAreOutOfRangeAreRefused) {
  using Cache = PagedCache<float, BlockQ8_0>;
  const LayerShape good{.kv_heads = 2, .group_size = 1, .key_dim = 8, .value_dim = 32};
  const auto argument = [](LayerShape shape, PagedCacheOptions options) {
    return Cache::page_bytes(shape, options).status().argument();
  };
  EXPECT_TRUE(Cache::page_bytes(good, {}).ok());
  EXPECT_EQ(argument(good, {.page_size = 0}), "page_size");
  EXPECT_EQ(argument(good, {.page_size = -1}), "page_size");
  EXPECT_EQ(argument(good, {.page_size = std::numeric_limits<Index>::max()}), "page_size");
  for (const LayerShape bad : {LayerShape{.kv_heads = 0, .key_dim = 8, .value_dim = 32},
                               LayerShape{.kv_heads = kMaxHeads + 1, .key_dim = 8, .value_dim = 32},
                               LayerShape{.kv_heads = 2, .group_size = 0, .key_dim = 8, .value_dim = 32},
                               LayerShape{.kv_heads = 2, .group_size = kMaxHeads, .key_dim = 8, .value_dim = 32},
                               LayerShape{.kv_heads = 2, .key_dim = 0, .value_dim = 32},
                               LayerShape{.kv_heads = 2, .key_dim = 8, .value_dim = kMaxWidth + 32},
                               LayerShape{.kv_heads = 2, .key_dim = 8, .value_dim = 33}}) {
    EXPECT_EQ(argument(bad, {}), "shape");
  }
  auto pool = PagePool<>::create({.page_bytes = Cache::page_bytes(good, {}).value()}).value();
  EXPECT_TRUE(Cache::create(good, pool, {}).ok());
  EXPECT_EQ(Cache::create(good, pool, {.page_size = 0}).status().argument(), "page_size");
  const Status larger = Cache::create(good, pool, {.page_size = 64}).status();
  EXPECT_EQ(larger.code(), StatusCode::size_mismatch);
  EXPECT_EQ(larger.argument(), "pool");
}

TEST(PagedCacheOptionsTest, TellRowCountsAndRotation) {
  const LayerShape shape{.kv_heads = 2, .group_size = 1, .key_dim = 8, .value_dim = 8};
  auto pool = PagePool<>::create({.page_bytes = 1 << 14}).value();
  const auto cache =
      PagedCache<>::create(shape, pool, {.counts = RowCounts::per_model, .rope = {.kind = RopeKind::adjacent}}).value();
  EXPECT_EQ(row_counts_of(cache), RowCounts::per_model);
  EXPECT_EQ(rope_of(cache).kind, RopeKind::adjacent);
}

}  // namespace
}  // namespace kvfold::test
