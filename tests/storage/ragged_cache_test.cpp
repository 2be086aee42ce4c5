// RaggedCache: rows in, rows out, and memory that really goes back.
#include <kvfold/storage/ragged_cache.hpp>

#include <bit>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "new_rows.hpp"

namespace kvfold {
namespace {

/// The heap, with a count of live bytes and a plan of when to fail.
struct CountingMemory {
  static inline std::size_t live = 0;
  static inline std::size_t largest_request = 0;
  static inline int calls = 0;
  static inline int fail_from = -1;  ///< from this call on, nothing can grow; -1: memory never ends
  static inline bool fails_to_shrink = false;

  static void reset() {
    largest_request = 0;
    calls = 0;
    fail_from = -1;
    fails_to_shrink = false;
  }

  [[nodiscard]] static void* resize(void* block, std::size_t old_bytes, std::size_t new_bytes) noexcept {
    largest_request = std::max(largest_request, new_bytes);
    const bool fails = fail_from >= 0 && calls >= fail_from && new_bytes > old_bytes;
    ++calls;
    if (new_bytes != 0 && (fails || (fails_to_shrink && new_bytes < old_bytes))) return nullptr;
    live += new_bytes;
    live -= old_bytes;
    return HeapMemory::resize(block, old_bytes, new_bytes);
  }
};

constexpr LayerShape kShape{.kv_heads = 3, .group_size = 2, .key_dim = 5, .value_dim = 4};

std::size_t at(Index i) { return static_cast<std::size_t>(i); }

/// Exact in every element type.
float key_of(Index h, Index t, Index d) { return static_cast<float>((h * 59 + t * 7 + d) % 255 - 127); }
float value_of(Index h, Index t, Index d) { return static_cast<float>((h * 83 + t * 11 + d) % 255 - 127) / 2.f; }

/// Rows of these numbers.
void fill_exactly(Index h, Index t, std::span<float> key, std::span<float> value) {
  for (Index d = 0; d < kShape.key_dim; ++d) key[at(d)] = key_of(h, t, d);
  for (Index d = 0; d < kShape.value_dim; ++d) value[at(d)] = value_of(h, t, d);
}
test::NewRows new_rows(Index first, Index n) { return {kShape, first, n, fill_exactly}; }

template <class View>
std::vector<float> keys_of(const View& view, Index h) {
  std::vector<float> out(at(view.size(h) * view.shape().key_dim));
  view.read_keys(h, 0, view.size(h), out);
  return out;
}

/// Whether head h holds exactly `rows`, numbers of rows that `new_rows` makes.
template <class View>
void expect_rows(const View& view, Index h, const std::vector<Index>& rows) {
  ASSERT_EQ(view.size(h), static_cast<Index>(rows.size()));
  std::vector<float> key(at(kShape.key_dim)), value(at(kShape.value_dim));
  for (Index i = 0; i < view.size(h); ++i) {
    const Index t = rows[at(i)];
    view.read_keys(h, i, 1, key);
    view.read_values(h, i, 1, value);
    for (Index d = 0; d < kShape.key_dim; ++d) ASSERT_EQ(key[at(d)], key_of(h, t, d)) << h << " " << i << " " << d;
    for (Index d = 0; d < kShape.value_dim; ++d)
      ASSERT_EQ(value[at(d)], value_of(h, t, d)) << h << " " << i << " " << d;
    ASSERT_EQ(view.position(h, i), t);
    ASSERT_EQ(view.log_mass(h, i), 0.f);
  }
}

std::vector<Index> numbers(Index n) {
  std::vector<Index> out;
  for (Index i = 0; i < n; ++i) out.push_back(i);
  return out;
}

template <class View>
void expect_first_rows(const View& view, Index n) {
  for (Index h = 0; h < kShape.kv_heads; ++h) expect_rows(view, h, numbers(n));
}

template <class K, class V>
struct Elements {
  using Key = K;
  using Value = V;
};

struct ElementsName {
  template <class E>
  static std::string GetName(int) {  // NOLINT(readability-identifier-naming): GoogleTest's
    return std::same_as<typename E::Key, float>     ? "f32_f32"
           : std::same_as<typename E::Key, Float16> ? "f16_f16"
                                                    : "bf16_f32";
  }
};

template <class E>
class RaggedCacheTest : public testing::Test {
 protected:
  using Cache = RaggedCache<typename E::Key, typename E::Value, CountingMemory>;

  RaggedCacheTest() { CountingMemory::reset(); }
  ~RaggedCacheTest() override { EXPECT_EQ(CountingMemory::live, 0u) << "memory leaks"; }

  static Cache make(Index rows) {
    Cache cache = Cache::create(kShape).value();
    EXPECT_TRUE(new_rows(0, rows).append_to(cache).ok());
    return cache;
  }
};
using ElementPairs = testing::Types<Elements<float, float>, Elements<Float16, Float16>, Elements<BFloat16, float>>;
TYPED_TEST_SUITE(RaggedCacheTest, ElementPairs, ElementsName);

TYPED_TEST(RaggedCacheTest, ModelsTheWholeContract) {
  using Tested = typename TestFixture::Cache;
  static_assert(MutableKVCacheView<Tested>);
  static_assert(HasWritableLogMass<Tested> && HasRope<Tested> && HasRowBytes<Tested> && HasContiguousRows<Tested>);
  static_assert(!std::copyable<Tested> && std::movable<Tested>);
  const auto cache = Tested::create(kShape);
  ASSERT_TRUE(cache.ok());
  EXPECT_EQ(cache->shape(), kShape);
  EXPECT_EQ(cache->size(0), 0);
  EXPECT_EQ(cache->live_bytes(), 0);
  EXPECT_TRUE(can_store_log_mass(cache.value()));
}

TYPED_TEST(RaggedCacheTest, AppendsRowsOfAnyStrides) {
  const auto orders = [](Index n, Index width) {
    return std::vector<Strides>{Strides::head_major(n, width), Strides::token_major(kShape.kv_heads, width),
                                Strides::transposed(n, width)};
  };
  for (const Strides& keys : orders(6, kShape.key_dim)) {
    for (const Strides& values : orders(6, kShape.value_dim)) {
      auto cache = TestFixture::Cache::create(kShape);
      ASSERT_TRUE(test::NewRows(kShape, 0, 6, fill_exactly, keys, values).append_to(cache.value()).ok());
      expect_first_rows(cache.value(), 6);
    }
  }
}

TYPED_TEST(RaggedCacheTest, GrowsWithoutLosingEarlierRows) {
  auto cache = TestFixture::make(1);
  Index rows = 1;
  for (const Index more : {1, 1, 3, 20, 1, 1, 40}) {
    ASSERT_TRUE(new_rows(rows, more).append_to(cache).ok());
    rows += more;
    expect_first_rows(cache, rows);
  }
}

TYPED_TEST(RaggedCacheTest, GrowsRarelyWhenRowsComeOneByOne) {
  auto cache = TestFixture::make(1);
  CountingMemory::calls = 0;
  for (Index t = 1; t < 500; ++t) ASSERT_TRUE(new_rows(t, 1).append_to(cache).ok());
  EXPECT_LT(CountingMemory::calls, 500);
  EXPECT_LT(cache.live_bytes(), 2 * 500 * kShape.kv_heads * cache.row_bytes(0));
}

TYPED_TEST(RaggedCacheTest, AppendingNoRowsChangesNothing) {
  auto cache = TestFixture::make(2);
  const float any = 1.f;
  EXPECT_TRUE(cache.append(&any, {}, &any, {}, {}).ok());
  expect_first_rows(cache, 2);
}

TYPED_TEST(RaggedCacheTest, RefusesPositionsThatDoNotAscend) {
  auto cache = TestFixture::make(4);
  const auto refused = [&](std::vector<Position> positions) {
    test::NewRows rows = new_rows(4, static_cast<Index>(positions.size()));
    rows.positions = std::move(positions);
    const Status status = rows.append_to(cache);
    return status.code() == StatusCode::invalid_argument && status.argument() == "positions";
  };
  EXPECT_TRUE(refused({5, 4}));
  EXPECT_TRUE(refused({2}));
  expect_first_rows(cache, 4);
  EXPECT_FALSE(refused({3, 3, 9})) << "equal positions and gaps are fine";
  EXPECT_EQ(cache.position(0, 6), 9);
}

TYPED_TEST(RaggedCacheTest, RefusesNullData) {
  auto cache = TestFixture::make(1);
  const std::vector<float> data(100);
  const std::vector<Position> positions{1};
  const Status no_keys = cache.append(nullptr, {}, data.data(), {}, positions);
  EXPECT_EQ(no_keys.code(), StatusCode::invalid_argument);
  EXPECT_EQ(no_keys.argument(), "keys");
  const Status no_values = cache.append(data.data(), {}, nullptr, {}, positions);
  EXPECT_EQ(no_values.code(), StatusCode::invalid_argument);
  EXPECT_EQ(no_values.argument(), "values");
  expect_first_rows(cache, 1);
}

TYPED_TEST(RaggedCacheTest, AnAppendThatFailsHalfwayChangesNoRow) {
  auto cache = TestFixture::make(5);
  Status status;
  int failing_call = -1;
  do {  // every allocation of the append fails once
    CountingMemory::calls = 0;
    CountingMemory::fail_from = ++failing_call;
    status = new_rows(5, 30).append_to(cache);
    if (!status.ok()) {
      ASSERT_EQ(status.code(), StatusCode::out_of_memory);
      expect_first_rows(cache, 5);
      ASSERT_EQ(cache.live_bytes(), static_cast<Index>(CountingMemory::live));
    }
  } while (!status.ok());
  EXPECT_GT(failing_call, 0);
  expect_first_rows(cache, 35);
}

TYPED_TEST(RaggedCacheTest, ResizeGivesTheMemoryOfRowsBack) {
  auto cache = TestFixture::make(40);
  EXPECT_EQ(cache.live_bytes(), static_cast<Index>(CountingMemory::live));
  const std::vector<Index> left{7, 40, 1};
  Index rows = 0;
  for (Index h = 0; h < kShape.kv_heads; ++h) {
    cache.resize(h, left[at(h)]);
    rows += left[at(h)];
    expect_rows(cache, h, numbers(left[at(h)]));
  }
  EXPECT_EQ(cache.live_bytes(), rows * cache.row_bytes(0));
  EXPECT_EQ(cache.live_bytes(), static_cast<Index>(CountingMemory::live));
  for (Index h = 0; h < kShape.kv_heads; ++h) cache.resize(h, 0);
  EXPECT_EQ(CountingMemory::live, 0u);
}

TYPED_TEST(RaggedCacheTest, RowsCanBeAppendedToHeadsOfUnequalLength) {
  auto cache = TestFixture::make(10);
  cache.resize(0, 3);
  cache.resize(2, 0);
  ASSERT_TRUE(new_rows(10, 2).append_to(cache).ok());
  expect_rows(cache, 0, {0, 1, 2, 10, 11});
  expect_rows(cache, 1, {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11});
  expect_rows(cache, 2, {10, 11});
}

TYPED_TEST(RaggedCacheTest, AShrinkThatFailsKeepsTheRowsAndTheMemory) {
  auto cache = TestFixture::make(20);
  const Index before = cache.live_bytes();
  CountingMemory::fails_to_shrink = true;
  cache.resize(1, 6);
  expect_rows(cache, 1, numbers(6));
  EXPECT_EQ(cache.live_bytes(), before);
  CountingMemory::fails_to_shrink = false;
  EXPECT_TRUE(new_rows(20, 50).append_to(cache).ok());
  std::vector<Index> expected = numbers(6);
  for (Index t = 20; t < 70; ++t) expected.push_back(t);
  expect_rows(cache, 1, expected);
  EXPECT_EQ(cache.live_bytes(), static_cast<Index>(CountingMemory::live));
}

TYPED_TEST(RaggedCacheTest, ACloneIsIndependentAndHasNoSpareRoom) {
  auto cache = TestFixture::make(9);
  ASSERT_TRUE(cache.reserve(50).ok());
  cache.resize(1, 4);
  cache.write_log_mass(0, 3, 1.5f);
  auto copy = cache.clone();
  ASSERT_TRUE(copy.ok());
  EXPECT_EQ(copy->live_bytes(), (9 + 4 + 9) * cache.row_bytes(0));
  EXPECT_EQ(copy->log_mass(0, 3), 1.5f);
  cache.resize(2, 0);
  cache.write_log_mass(0, 3, 0.f);
  expect_rows(copy.value(), 1, numbers(4));
  expect_rows(copy.value(), 2, numbers(9));
  EXPECT_EQ(copy->log_mass(0, 3), 1.5f);
}

TYPED_TEST(RaggedCacheTest, ACloneThatFindsNoMemoryLeavesNoneBehind) {
  const auto cache = TestFixture::make(9);
  const std::size_t before = CountingMemory::live;
  CountingMemory::calls = 0;
  CountingMemory::fail_from = 6;  // in the second head
  EXPECT_EQ(cache.clone().status().code(), StatusCode::out_of_memory);
  EXPECT_EQ(CountingMemory::live, before);
}

TYPED_TEST(RaggedCacheTest, MovesTakeTheRowsAlong) {
  auto cache = TestFixture::make(8);
  auto moved = std::move(cache);
  expect_first_rows(moved, 8);
  auto other = TestFixture::make(3);
  other = std::move(moved);
  expect_first_rows(other, 8);
}

TYPED_TEST(RaggedCacheTest, MoveRowCopiesBitsNanPayloadsIncluded) {
  auto cache = TestFixture::make(4);
  std::vector<float> key(at(kShape.key_dim)), value(at(kShape.value_dim));
  key[0] = std::bit_cast<float>(0x7fd23000u);  // quiet NaNs with a payload that 16 bits can hold
  key[1] = std::bit_cast<float>(0xffe50000u);
  key[2] = -0.f;
  value[0] = std::bit_cast<float>(0x7fc70000u);
  cache.write_key(1, 3, key);
  cache.write_value(1, 3, value);
  cache.write_log_mass(1, 3, 2.5f);
  std::vector<float> stored_key(key.size()), stored_value(value.size());
  cache.read_keys(1, 3, 1, stored_key);
  cache.read_values(1, 3, 1, stored_value);

  cache.move_row(1, 3, 0);
  std::vector<float> moved_key(key.size()), moved_value(value.size());
  cache.read_keys(1, 0, 1, moved_key);
  cache.read_values(1, 0, 1, moved_value);
  for (std::size_t d = 0; d < key.size(); ++d) {
    EXPECT_EQ(std::bit_cast<std::uint32_t>(moved_key[d]), std::bit_cast<std::uint32_t>(stored_key[d])) << d;
  }
  for (std::size_t d = 0; d < value.size(); ++d) {
    EXPECT_EQ(std::bit_cast<std::uint32_t>(moved_value[d]), std::bit_cast<std::uint32_t>(stored_value[d])) << d;
  }
  EXPECT_EQ(cache.position(1, 0), 3);
  EXPECT_EQ(cache.log_mass(1, 0), 2.5f);
  EXPECT_EQ(cache.stored_log_masses(1, 0, 2)[0], 2.5f);
  expect_rows(cache, 0, numbers(4));
  expect_rows(cache, 2, numbers(4));
}

TYPED_TEST(RaggedCacheTest, FloatRowsAreUsedInPlaceAndOthersAreNot) {
  auto cache = TestFixture::make(4);
  if (std::same_as<typename TypeParam::Key, float>) {
    ASSERT_NE(cache.key_rows(1, 2, 2), nullptr);
    EXPECT_EQ(cache.key_rows(1, 2, 2)[kShape.key_dim], key_of(1, 3, 0));
  } else {
    EXPECT_EQ(cache.key_rows(1, 2, 2), nullptr);
  }
  EXPECT_EQ(cache.value_rows(1, 2, 2) != nullptr, (std::same_as<typename TypeParam::Value, float>));
}

TYPED_TEST(RaggedCacheTest, RowsAreGivenAsTheyAreStored) {
  auto cache = TestFixture::make(4);
  const auto keys = cache.stored_keys(1, 2, 2);
  const auto values = cache.stored_values(1, 2, 2);
  EXPECT_EQ(keys.count, 2);
  EXPECT_EQ(values.count, 2);
  EXPECT_EQ(to_float(keys.data[keys.stride]), key_of(1, 3, 0));
  EXPECT_EQ(to_float(values.data[values.stride]), value_of(1, 3, 0));
}

TYPED_TEST(RaggedCacheTest, StoredRowsHaveNoScalesButThoseOfInt8) {
  const auto cache = TestFixture::make(4);
  EXPECT_EQ(cache.stored_keys(1, 2, 1).scales, nullptr);
  EXPECT_EQ(cache.stored_values(1, 2, 1).scales, nullptr);
  const auto scaled = test::make_cache<Int8>(kShape, 5);
  std::vector<float> row(static_cast<std::size_t>(kShape.key_dim));
  scaled.read_keys(1, 3, 1, row);
  const StoredRows<Int8> stored = scaled.stored_keys(1, 2, 2);
  EXPECT_EQ(stored.scales[stored.scale_stride] * static_cast<float>(stored.data[stored.stride + 1].value), row[1]);
}

TYPED_TEST(RaggedCacheTest, ReservedRoomMakesAppendingFreeOfAllocation) {
  auto cache = TestFixture::make(2);
  ASSERT_TRUE(cache.reserve(30).ok());
  EXPECT_EQ(cache.live_bytes(), 30 * kShape.kv_heads * cache.row_bytes(0));
  CountingMemory::calls = 0;
  ASSERT_TRUE(new_rows(2, 28).append_to(cache).ok());
  EXPECT_EQ(CountingMemory::calls, 0);
  expect_first_rows(cache, 30);
  EXPECT_TRUE(cache.reserve(3).ok());
  EXPECT_EQ(CountingMemory::calls, 0) << "less room than there is";
}

TYPED_TEST(RaggedCacheTest, ReserveMakesRoomInAllHeadsOrNone) {
  auto cache = TestFixture::make(2);
  const Index before = cache.live_bytes();
  CountingMemory::calls = 0;
  CountingMemory::fail_from = 6;  // in the second head
  EXPECT_EQ(cache.reserve(100).code(), StatusCode::out_of_memory);
  EXPECT_EQ(cache.live_bytes(), static_cast<Index>(CountingMemory::live));
  EXPECT_EQ(cache.live_bytes(), before);
  expect_first_rows(cache, 2);
}

TYPED_TEST(RaggedCacheTest, RefusesShapesThatAreOutOfRange) {
  const auto refused = [](LayerShape shape) {
    const Status status = TestFixture::Cache::create(shape).status();
    return status.code() == StatusCode::invalid_argument && status.argument() == "shape";
  };
  for (const Index bad : {Index{0}, Index{-1}, kMaxHeads + 1, INT64_MIN, INT64_MAX}) {
    EXPECT_TRUE(refused({bad, 1, 4, 4})) << bad;
    EXPECT_TRUE(refused({1, bad, 4, 4})) << bad;
  }
  for (const Index bad : {Index{0}, Index{-1}, kMaxWidth + 1, INT64_MIN, INT64_MAX}) {
    EXPECT_TRUE(refused({1, 1, bad, 4})) << bad;
    EXPECT_TRUE(refused({1, 1, 4, bad})) << bad;
  }
  EXPECT_TRUE(refused({2, kMaxHeads, 4, 4})) << "H * G is limited too";
}

TYPED_TEST(RaggedCacheTest, RefusesRowCountsThatAreOutOfRange) {
  auto cache = TestFixture::make(2);
  for (const Index bad : {Index{-1}, kMaxRows + 1, INT64_MIN, INT64_MAX}) {
    const Status status = cache.reserve(bad);
    EXPECT_EQ(status.code(), StatusCode::invalid_argument) << bad;
    EXPECT_EQ(status.argument(), "rows") << bad;
  }
  expect_first_rows(cache, 2);
}

TYPED_TEST(RaggedCacheTest, TheLargestSizesDoNotOverflow) {
  const LayerShape widest{.kv_heads = 1, .group_size = 1, .key_dim = kMaxWidth, .value_dim = kMaxWidth};
  auto cache = TestFixture::Cache::create(widest);
  ASSERT_TRUE(cache.ok());
  CountingMemory::fail_from = 0;
  EXPECT_EQ(cache->reserve(kMaxRows).code(), StatusCode::out_of_memory);
  EXPECT_EQ(CountingMemory::largest_request,
            static_cast<std::size_t>(kMaxRows) * static_cast<std::size_t>(kMaxWidth) * sizeof(typename TypeParam::Key));
}

// --- Quantised rows --------------------------------------------------------------------------------------------

constexpr LayerShape kBlocks{.kv_heads = 2, .group_size = 1, .key_dim = 64, .value_dim = 32};

/// The same without its kinds, for names.
struct QuantisedName {
  template <class E>
  static std::string GetName(int i) {  // NOLINT(readability-identifier-naming): GoogleTest's
    return std::vector<std::string>{"int8_int8", "q8_0_int8", "fp8_q4_0"}[at(i)];
  }
};

template <class E>
class QuantisedRaggedCacheTest : public testing::Test {
 protected:
  using Cache = RaggedCache<typename E::Key, typename E::Value, CountingMemory>;

  QuantisedRaggedCacheTest() { CountingMemory::reset(); }
  ~QuantisedRaggedCacheTest() override { EXPECT_EQ(CountingMemory::live, 0u) << "memory leaks"; }

  static float number(Index h, Index t, Index d) {
    return static_cast<float>((h * 31 + t * 17 + d * 7) % 101 - 50) / 9.f;
  }

  /// Rows [first, first + n), at `order` of their tensors.
  static Status append(Cache& cache, Index first, Index n, bool transposed = false) {
    const Strides key_order = transposed ? Strides::transposed(n, 64) : Strides::head_major(n, 64);
    const Strides value_order = transposed ? Strides::transposed(n, 32) : Strides::head_major(n, 32);
    std::vector<float> keys(at(2 * n * 64)), values(at(2 * n * 32));
    std::vector<Position> positions;
    for (Index i = 0; i < n; ++i) {
      positions.push_back(first + i);
      for (Index h = 0; h < 2; ++h) {
        for (Index d = 0; d < 64; ++d) {
          keys[at(h * key_order.head + i * key_order.token + d * key_order.dim)] = number(h, first + i, d);
        }
        for (Index d = 0; d < 32; ++d) {
          values[at(h * value_order.head + i * value_order.token + d * value_order.dim)] = number(h, first + i, d + 5);
        }
      }
    }
    return cache.append(keys.data(), key_order, values.data(), value_order, positions);
  }
  static Cache make(Index rows) {
    Cache cache = Cache::create(kBlocks).value();
    EXPECT_TRUE(append(cache, 0, rows).ok());
    return cache;
  }
  static std::vector<float> row_of(const Cache& cache, Index h, Index t) {
    std::vector<float> all(96);
    cache.read_keys(h, t, 1, std::span(all).first(64));
    cache.read_values(h, t, 1, std::span(all).subspan(64));
    return all;
  }
  /// Row `row` of the source, up to a step of the coarsest kind.
  static void expect_row(const Cache& cache, Index h, Index t, Index row) {
    const std::vector<float> got = row_of(cache, h, t);
    for (Index d = 0; d < 64; ++d) ASSERT_NEAR(got[at(d)], number(h, row, d), 0.5f) << h << " " << t << " " << d;
    for (Index d = 0; d < 32; ++d) {
      ASSERT_NEAR(got[at(64 + d)], number(h, row, d + 5), 0.8f) << h << " " << t << " " << d;
    }
    ASSERT_EQ(cache.position(h, t), row);
  }
};
using QuantisedPairs = testing::Types<Elements<Int8, Int8>, Elements<BlockQ8_0, Int8>, Elements<Float8E4M3, BlockQ4_0>>;
TYPED_TEST_SUITE(QuantisedRaggedCacheTest, QuantisedPairs, QuantisedName);

template <class E>
Index bytes_of_a_row() {
  Index bytes = sizeof(Position) + sizeof(float);
  if (std::same_as<typename E::Key, Int8>) bytes += 64 + 4;
  if (std::same_as<typename E::Key, BlockQ8_0>) bytes += 2 * 34;
  if (std::same_as<typename E::Key, Float8E4M3>) bytes += 64;
  return bytes + (std::same_as<typename E::Value, Int8> ? 32 + 4 : 18);
}

TYPED_TEST(QuantisedRaggedCacheTest, ModelsTheWholeContract) {
  using Tested = typename TestFixture::Cache;
  static_assert(MutableKVCacheView<Tested> && HasWritableLogMass<Tested> && HasRowBytes<Tested>);
  auto cache = TestFixture::make(3);
  EXPECT_EQ(cache.key_rows(0, 0, 1), nullptr);
  EXPECT_EQ(cache.value_rows(0, 0, 1), nullptr);
}

TYPED_TEST(QuantisedRaggedCacheTest, AppendingQuantisesRowsOfAnyStrides) {
  const auto cache = TestFixture::make(7);
  auto transposed = TestFixture::Cache::create(kBlocks).value();
  ASSERT_TRUE(TestFixture::append(transposed, 0, 7, true).ok());
  for (Index h = 0; h < 2; ++h) {
    for (Index t = 0; t < 7; ++t) {
      TestFixture::expect_row(cache, h, t, t);
      EXPECT_EQ(TestFixture::row_of(cache, h, t), TestFixture::row_of(transposed, h, t));
    }
  }
}

TYPED_TEST(QuantisedRaggedCacheTest, RowBytesAndLiveBytesCountScalesToo) {
  auto cache = TestFixture::make(40);
  EXPECT_EQ(cache.row_bytes(0), bytes_of_a_row<TypeParam>());
  EXPECT_EQ(cache.live_bytes(), static_cast<Index>(CountingMemory::live));
  cache.resize(0, 11);
  cache.resize(1, 3);
  EXPECT_EQ(cache.live_bytes(), 14 * bytes_of_a_row<TypeParam>());
  EXPECT_EQ(cache.live_bytes(), static_cast<Index>(CountingMemory::live));
  TestFixture::expect_row(cache, 0, 10, 10);
}

TYPED_TEST(QuantisedRaggedCacheTest, GrowsWithoutLosingEarlierRows) {
  auto cache = TestFixture::make(1);
  Index rows = 1;
  for (const Index more : {1, 3, 20, 1}) {
    ASSERT_TRUE(TestFixture::append(cache, rows, more).ok());
    rows += more;
    for (Index t = 0; t < rows; ++t) TestFixture::expect_row(cache, 1, t, t);
  }
}

TYPED_TEST(QuantisedRaggedCacheTest, AnAppendThatFailsHalfwayChangesNoRow) {
  auto cache = TestFixture::make(5);
  Status status;
  int failing_call = -1;
  do {  // every allocation of the append fails once
    CountingMemory::calls = 0;
    CountingMemory::fail_from = ++failing_call;
    status = TestFixture::append(cache, 5, 30);
    if (!status.ok()) {
      ASSERT_EQ(status.code(), StatusCode::out_of_memory);
      ASSERT_EQ(cache.size(0), 5);
      for (Index t = 0; t < 5; ++t) TestFixture::expect_row(cache, 1, t, t);
      ASSERT_EQ(cache.live_bytes(), static_cast<Index>(CountingMemory::live));
    }
  } while (!status.ok());
  EXPECT_GE(failing_call, 2 * 4);
}

TYPED_TEST(QuantisedRaggedCacheTest, MovedAndClonedRowsHaveTheirScales) {
  auto cache = TestFixture::make(9);
  const auto row = TestFixture::row_of(cache, 1, 8);
  cache.move_row(1, 8, 2);
  EXPECT_EQ(TestFixture::row_of(cache, 1, 2), row);
  const auto copy = cache.clone();
  ASSERT_TRUE(copy.ok());
  cache.write_key(1, 2, std::vector<float>(64, 100.f));
  cache.write_value(1, 2, std::vector<float>(32, 100.f));
  EXPECT_EQ(TestFixture::row_of(copy.value(), 1, 2), row);
  EXPECT_NE(TestFixture::row_of(cache, 1, 2), row);
  TestFixture::expect_row(cache, 1, 3, 3);
}

TEST(RaggedCacheOfBlocks, RefusesWidthsThatAreNotWholeBlocks) {
  const auto refused = [](Status status) {
    return status.code() == StatusCode::invalid_argument && status.argument() == "shape";
  };
  EXPECT_TRUE(refused(RaggedCache<BlockQ8_0, float>::create({1, 1, 48, 32}).status()));
  EXPECT_TRUE(refused(RaggedCache<float, BlockQ4_0>::create({1, 1, 32, 33}).status()));
  EXPECT_TRUE(refused(RaggedCache<BlockQ4_0>::create({1, 1, 16, 16}).status()));
  EXPECT_TRUE((RaggedCache<BlockQ8_0, float>::create({1, 1, 32, 33}).ok()));
  EXPECT_TRUE((RaggedCache<Int8>::create({1, 1, 33, 1}).ok()));
}

}  // namespace
}  // namespace kvfold
