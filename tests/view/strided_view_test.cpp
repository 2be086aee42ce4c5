// StridedView: rows of an engine's tensors, in any order of head, token and dim.
#include <kvfold/attend.hpp>
#include <kvfold/compressor.hpp>
#include <kvfold/view/strided.hpp>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

namespace kvfold {
namespace {

constexpr Index kHeads = 3, kRows = 37, kCapacity = 41, kKeyDim = 5, kValueDim = 4;

std::size_t at(Index i) { return static_cast<std::size_t>(i); }

/// Exact in every element type, and different for neighbours in each direction.
float element(Index h, Index t, Index d, Index seed) {
  return static_cast<float>((h * 59 + t * 7 + d + seed) % 255 - 127);
}

enum class Order { head_major, token_major, transposed };
constexpr std::array<Order, 3> kOrders{Order::head_major, Order::token_major, Order::transposed};

Strides strides_of(Order order, Index width) {
  switch (order) {
    case Order::head_major: return Strides::head_major(kCapacity, width);
    case Order::token_major: return Strides::token_major(kHeads, width);
    default: return Strides::transposed(kCapacity, width);
  }
}

/// One tensor of an engine.
template <class T>
struct Tensor {
  Strides strides;
  Index width;
  Index seed;
  std::vector<T> data;

  Tensor(Strides order, Index row_width, Index tensor_seed)
      : strides(order), width(row_width), seed(tensor_seed), data(at(kHeads * kCapacity * row_width)) {
    for (Index h = 0; h < kHeads; ++h) {
      for (Index t = 0; t < kRows; ++t) {
        for (Index d = 0; d < width; ++d) *place(h, t, d) = from_float<T>(element(h, t, d, seed));
      }
    }
  }
  T* place(Index h, Index t, Index d) { return &data[at(h * strides.head + t * strides.token + d * strides.dim)]; }
};

/// An engine's cache of one layer, and the view on it.
template <class K, class V>
struct Engine {
  Tensor<K> keys;
  Tensor<V> values;
  std::vector<Index> rows = std::vector<Index>(kHeads, kRows);

  Engine(Strides key_order, Strides value_order) : keys(key_order, kKeyDim, 0), values(value_order, kValueDim, 100) {}
  Engine(Order key_order, Order value_order)
      : Engine(strides_of(key_order, kKeyDim), strides_of(value_order, kValueDim)) {}

  StridedView<K, V> view() {
    return {.layer = {kHeads, 2, kKeyDim, kValueDim},
            .keys = keys.data.data(),
            .key_strides = keys.strides,
            .values = values.data.data(),
            .value_strides = values.strides,
            .rows = rows};
  }
};

template <class K, class V>
struct Elements {
  using Key = K;
  using Value = V;
};
struct ElementsName {
  template <class T>
  static std::string one() {
    return std::same_as<T, float> ? "f32" : std::same_as<T, Float16> ? "f16" : "bf16";
  }
  template <class E>
  static std::string GetName(int) {  // NOLINT(readability-identifier-naming): GoogleTest's
    return one<typename E::Key>() + "_" + one<typename E::Value>();
  }
};

/// Every pair of element types; each test goes through every pair of orders.
template <class E>
class StridedViewTest : public testing::Test {
 protected:
  using TestedEngine = Engine<typename E::Key, typename E::Value>;

  template <class F>
  static void for_orders(F f) {
    for (const Order keys : kOrders) {
      for (const Order values : kOrders) {
        SCOPED_TRACE(testing::Message() << "keys in order " << static_cast<int>(keys) << ", values in order "
                                        << static_cast<int>(values));
        TestedEngine engine(keys, values);
        f(engine);
      }
    }
  }
};
using ElementPairs =
    testing::Types<Elements<float, float>, Elements<float, Float16>, Elements<float, BFloat16>,
                   Elements<Float16, float>, Elements<Float16, Float16>, Elements<Float16, BFloat16>,
                   Elements<BFloat16, float>, Elements<BFloat16, Float16>, Elements<BFloat16, BFloat16>>;
TYPED_TEST_SUITE(StridedViewTest, ElementPairs, ElementsName);

TYPED_TEST(StridedViewTest, ModelsTheContractAndWhatIsOptional) {
  using View = StridedView<typename TypeParam::Key, typename TypeParam::Value>;
  static_assert(MutableKVCacheView<View>);
  static_assert(HasWritableLogMass<View> && MayLackLogMass<View> && HasContiguousRows<View>);
  static_assert(HasRope<View> && HasRowBytes<View> && HasRowCounts<View>);
  TestFixture::for_orders([](auto& engine) {
    EXPECT_EQ(engine.view().shape(), (LayerShape{kHeads, 2, kKeyDim, kValueDim}));
    EXPECT_EQ(engine.view().size(1), kRows);
    EXPECT_EQ(engine.view().row_bytes(0), kKeyDim * static_cast<Index>(sizeof(typename TypeParam::Key)) +
                                              kValueDim * static_cast<Index>(sizeof(typename TypeParam::Value)));
  });
}

// Transposed tensors are read in tiles of 16 tokens.
TYPED_TEST(StridedViewTest, ReadsAnyRunOfRowsAndNothingBeyondIt) {
  const std::pair<Index, Index> runs[] = {{0, 37}, {0, 16}, {0, 17}, {15, 2}, {16, 16}, {5, 31}, {36, 1}, {3, 0}};
  TestFixture::for_orders([&](auto& engine) {
    const auto view = engine.view();
    for (Index h = 0; h < kHeads; ++h) {
      for (const auto& [first, n] : runs) {
        std::vector<float> keys(at(n * kKeyDim) + 1, 777.f), values(at(n * kValueDim) + 1, 777.f);
        view.read_keys(h, first, n, keys);
        view.read_values(h, first, n, values);
        for (Index i = 0; i < n; ++i) {
          for (Index d = 0; d < kKeyDim; ++d) ASSERT_EQ(keys[at(i * kKeyDim + d)], element(h, first + i, d, 0));
          for (Index d = 0; d < kValueDim; ++d) ASSERT_EQ(values[at(i * kValueDim + d)], element(h, first + i, d, 100));
        }
        ASSERT_EQ(keys.back(), 777.f);
        ASSERT_EQ(values.back(), 777.f);
      }
    }
  });
}

TYPED_TEST(StridedViewTest, WritesOneRowAndNothingElse) {
  using K = typename TypeParam::Key;
  using V = typename TypeParam::Value;
  const std::vector<float> key{1.f, -2.f, 0.5f, 96.f, -0.25f}, value{-8.f, 3.f, 0.125f, 64.f};
  TestFixture::for_orders([&](auto& engine) {
    auto expected = engine;
    for (Index d = 0; d < kKeyDim; ++d) *expected.keys.place(1, 17, d) = from_float<K>(key[at(d)]);
    auto view = engine.view();
    view.write_key(1, 17, key);
    EXPECT_TRUE(engine.keys.data == expected.keys.data);
    EXPECT_TRUE(engine.values.data == expected.values.data);
    for (Index d = 0; d < kValueDim; ++d) *expected.values.place(2, 0, d) = from_float<V>(value[at(d)]);
    view.write_value(2, 0, value);
    EXPECT_TRUE(engine.keys.data == expected.keys.data);
    EXPECT_TRUE(engine.values.data == expected.values.data);
  });
}

TYPED_TEST(StridedViewTest, WritesRoundToNearestEven) {
  using K = typename TypeParam::Key;
  const std::vector<float> key{1.f + 0x1p-11f, 1.f + 0x1p-8f, 1.f / 3.f, -1e9f, 1e-9f};
  TestFixture::for_orders([&](auto& engine) {
    engine.view().write_key(0, 3, key);
    for (Index d = 0; d < kKeyDim; ++d) EXPECT_EQ(*engine.keys.place(0, 3, d), from_float<K>(key[at(d)])) << d;
  });
}

/// A NaN whose payload no conversion would keep as it is.
template <class T>
T odd_nan() {
  if constexpr (std::same_as<T, float>)
    return std::bit_cast<float>(0x7fc12345u);
  else if constexpr (std::same_as<T, Float16>)
    return Float16{0x7c01};
  else
    return BFloat16{0x7f81};
}

template <class T>
bool same_bytes(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

TYPED_TEST(StridedViewTest, MoveRowCopiesTheBitsOfARowAndNothingElse) {
  TestFixture::for_orders([](auto& engine) {
    *engine.keys.place(1, 20, 2) = odd_nan<typename TypeParam::Key>();
    *engine.values.place(1, 20, 3) = odd_nan<typename TypeParam::Value>();
    auto expected = engine;
    for (Index d = 0; d < kKeyDim; ++d) {
      std::memcpy(expected.keys.place(1, 4, d), engine.keys.place(1, 20, d), sizeof(typename TypeParam::Key));
    }
    for (Index d = 0; d < kValueDim; ++d) {
      std::memcpy(expected.values.place(1, 4, d), engine.values.place(1, 20, d), sizeof(typename TypeParam::Value));
    }
    engine.view().move_row(1, 20, 4);
    EXPECT_TRUE(same_bytes(engine.keys.data, expected.keys.data));
    EXPECT_TRUE(same_bytes(engine.values.data, expected.values.data));
  });
}

TYPED_TEST(StridedViewTest, OnlyFloatRowsThatFollowEachOtherAreUsedInPlace) {
  for (const Order keys : kOrders) {
    for (const Order values : kOrders) {
      typename TestFixture::TestedEngine engine(keys, values);
      const auto view = engine.view();
      const bool keys_in_place = keys == Order::head_major && std::same_as<typename TypeParam::Key, float>;
      const bool values_in_place = values == Order::head_major && std::same_as<typename TypeParam::Value, float>;
      const float* key_rows = view.key_rows(2, 5, 10);
      const float* value_rows = view.value_rows(2, 5, 10);
      ASSERT_EQ(key_rows != nullptr, keys_in_place);
      ASSERT_EQ(value_rows != nullptr, values_in_place);
      for (Index i = 0; i < 10 * kKeyDim && keys_in_place; ++i) {
        ASSERT_EQ(key_rows[i], element(2, 5 + i / kKeyDim, i % kKeyDim, 0));
      }
      for (Index i = 0; i < 10 * kValueDim && values_in_place; ++i) {
        ASSERT_EQ(value_rows[i], element(2, 5 + i / kValueDim, i % kValueDim, 100));
      }
    }
  }
}

TYPED_TEST(StridedViewTest, RowsWhoseNumbersFollowEachOtherAreGivenAsTheyAreStored) {
  for (const Order keys : kOrders) {
    for (const Order values : kOrders) {
      typename TestFixture::TestedEngine engine(keys, values);
      const auto view = engine.view();
      const auto of_keys = view.stored_keys(2, 5, 10);
      const auto of_values = view.stored_values(2, 5, 10);
      ASSERT_EQ(of_keys.data != nullptr, keys != Order::transposed);
      ASSERT_EQ(of_values.data != nullptr, values != Order::transposed);
      for (Index i = 0; i < 10 * kKeyDim && keys != Order::transposed; ++i) {
        ASSERT_EQ(of_keys.count, 10);
        ASSERT_EQ(to_float(of_keys.data[i / kKeyDim * of_keys.stride + i % kKeyDim]),
                  element(2, 5 + i / kKeyDim, i % kKeyDim, 0));
      }
      for (Index i = 0; i < 10 * kValueDim && values != Order::transposed; ++i) {
        ASSERT_EQ(of_values.count, 10);
        ASSERT_EQ(to_float(of_values.data[i / kValueDim * of_values.stride + i % kValueDim]),
                  element(2, 5 + i / kValueDim, i % kValueDim, 100));
      }
    }
  }
}

TYPED_TEST(StridedViewTest, ResizeChangesTheCountOfOneHead) {
  TestFixture::for_orders([](auto& engine) {
    engine.view().resize(1, 9);
    EXPECT_EQ(engine.rows, (std::vector<Index>{kRows, 9, kRows}));
  });
}

using FloatEngine = Engine<float, float>;

TEST(StridedViewOfFloats, PaddedRowsAreReadButNotUsedInPlace) {
  FloatEngine engine(Strides{.head = kKeyDim, .token = kHeads * kKeyDim, .dim = 1},
                     Strides{.head = kValueDim, .token = kHeads * kValueDim, .dim = 1});
  EXPECT_EQ(engine.view().key_rows(0, 0, 1), nullptr);
  auto one_head = engine.view();
  one_head.layer.kv_heads = 1;
  one_head.key_strides = Strides::token_major(1, kKeyDim);
  EXPECT_NE(one_head.key_rows(0, 0, 3), nullptr) << "with one head, token-major rows follow each other";
}

TEST(StridedViewOfFloats, RowsArePositionedFromTheFirstPositionWhereNoneAreGiven) {
  FloatEngine engine(Order::head_major, Order::head_major);
  auto view = engine.view();
  EXPECT_EQ(view.position(2, 5), 5);
  view.first_position = 1000;
  EXPECT_EQ(view.position(2, 5), 1005);
}

TEST(StridedViewOfFloats, HeadsMayShareOneListOfPositionsWhichMovesLeaveAlone) {
  FloatEngine engine(Order::head_major, Order::head_major);
  std::vector<Position> positions(kRows);
  for (Index t = 0; t < kRows; ++t) positions[at(t)] = 3 * t;
  const std::vector<Position> before = positions;
  auto view = engine.view();
  view.positions = positions;
  EXPECT_EQ(view.position(0, 4), 12);
  EXPECT_EQ(view.position(2, 4), 12);
  view.move_row(1, 20, 4);
  EXPECT_EQ(positions, before);
}

TEST(StridedViewOfFloats, HeadsMayHavePositionsOfTheirOwnWhichMoveWithTheRows) {
  FloatEngine engine(Order::head_major, Order::head_major);
  std::vector<Position> positions(at(kHeads * kCapacity));
  for (Index i = 0; i < kHeads * kCapacity; ++i) positions[at(i)] = 10 * i;
  auto expected = positions;
  expected[at(kCapacity + 4)] = expected[at(kCapacity + 20)];
  auto view = engine.view();
  view.positions = positions;
  view.position_stride = kCapacity;
  EXPECT_EQ(view.position(2, 4), 10 * (2 * kCapacity + 4));
  view.move_row(1, 20, 4);
  EXPECT_EQ(positions, expected);
}

TEST(StridedViewOfFloats, WithoutAPlaceForLogMassesTheyAreZeroAndCannotBeStored) {
  FloatEngine engine(Order::head_major, Order::head_major);
  auto view = engine.view();
  EXPECT_FALSE(can_store_log_mass(view));
  EXPECT_EQ(log_mass_of(view, 0, 0), 0.f);
  EXPECT_TRUE(view.stored_log_masses(0, 0, 5).empty());
  view.write_log_mass(0, 0, 1.f);  // goes nowhere
  EXPECT_EQ(log_mass_of(view, 0, 0), 0.f);
}

TEST(StridedViewOfFloats, LogMassesAreStoredAndMoveWithTheRows) {
  FloatEngine engine(Order::head_major, Order::head_major);
  std::vector<float> masses(at(kHeads * kCapacity));
  auto view = engine.view();
  view.log_masses = masses;
  view.log_mass_stride = kCapacity;
  EXPECT_TRUE(can_store_log_mass(view));
  view.write_log_mass(1, 20, 1.5f);
  EXPECT_EQ(masses[at(kCapacity + 20)], 1.5f);
  view.move_row(1, 20, 4);
  EXPECT_EQ(log_mass_of(view, 1, 4), 1.5f);
  EXPECT_EQ(view.stored_log_masses(1, 3, 7).data(), &masses[at(kCapacity + 3)]);
  EXPECT_EQ(view.stored_log_masses(1, 3, 7).size(), 7u);
  EXPECT_EQ(std::count(masses.begin(), masses.end(), 0.f), kHeads * kCapacity - 2);
}

TEST(StridedViewOfFloats, TellsRowCountsAndRotationAsItWasTold) {
  FloatEngine engine(Order::head_major, Order::head_major);
  auto view = engine.view();
  EXPECT_EQ(row_counts_of(view), RowCounts::per_head);
  EXPECT_EQ(rope_of(view).kind, RopeKind::unknown);
  view.counts = RowCounts::per_layer;
  view.rotation = {.kind = RopeKind::half_split, .theta = 5e5};
  EXPECT_EQ(row_counts_of(view), RowCounts::per_layer);
  EXPECT_EQ(rope_of(view).theta, 5e5);
}

TEST(StridedViewOfConst, CanBeReadButNotWritten) {
  static_assert(KVCacheView<StridedView<const float>> && !MutableKVCacheView<StridedView<const float>>);
  static_assert(KVCacheView<StridedView<const Float16>> && !MutableKVCacheView<StridedView<const Float16>>);
  static_assert(!MutableKVCacheView<StridedView<const BFloat16, float>>);
  static_assert(!MutableKVCacheView<StridedView<float, const BFloat16>>);
  FloatEngine engine(Order::head_major, Order::transposed);
  const StridedView<const float> view{.layer = {kHeads, 2, kKeyDim, kValueDim},
                                      .keys = engine.keys.data.data(),
                                      .key_strides = engine.keys.strides,
                                      .values = engine.values.data.data(),
                                      .value_strides = engine.values.strides,
                                      .rows = engine.rows};
  std::vector<float> row(kValueDim);
  view.read_values(2, 30, 1, row);
  EXPECT_EQ(row[3], element(2, 30, 3, 100));
  EXPECT_NE(view.key_rows(0, 0, 1), nullptr);
}

// --- Blocks and scales -----------------------------------------------------------------------------------------

/// Tensors of zeros, [H][T][D] and [H][T][E] in units of their types.
template <class K, class V>
struct QuantisedEngine {
  static constexpr LayerShape kLayer{.kv_heads = 2, .group_size = 1, .key_dim = 64, .value_dim = 32};
  std::vector<K> keys = std::vector<K>(2 * kRows * 64 / kUnit<K>);
  std::vector<V> values = std::vector<V>(2 * kRows * 32 / kUnit<V>);
  std::vector<float> key_scales = std::vector<float>(2 * kRows, 1.f);
  std::vector<float> value_scales = std::vector<float>(2 * kRows, 1.f);
  std::vector<Index> rows = std::vector<Index>(2, kRows);
  std::vector<float> masses = std::vector<float>(2 * kRows);

  StridedView<K, V> view() {
    StridedView<K, V> made{.layer = kLayer,
                           .keys = keys.data(),
                           .key_strides = Strides::head_major(kRows, 64 / kUnit<K>),
                           .values = values.data(),
                           .value_strides = Strides::head_major(kRows, 32 / kUnit<V>),
                           .rows = rows,
                           .log_masses = masses,
                           .log_mass_stride = kRows};
    if (kMayBeScaled<K>) {
      made.key_scales = key_scales.data();
      made.key_scale_strides = kRowScaled<K> ? ScaleStrides{kRows, 1} : ScaleStrides{1, 0};
    }
    if (kMayBeScaled<V>) {
      made.value_scales = value_scales.data();
      made.value_scale_strides = kRowScaled<V> ? ScaleStrides{kRows, 1} : ScaleStrides{1, 0};
    }
    return made;
  }
};

/// Whether every stage says that the view is wrong, and writes nothing.
template <class View>
bool refused(View view) {
  const auto names_view = [](const Status& status) {
    return status.code() == StatusCode::invalid_argument && status.argument() == "view";
  };
  const std::vector<float> query(64);
  const std::vector<Position> positions{kRows};
  const QueryRows queries = head_major_queries(query.data(), 1, 64, positions);
  std::vector<float> out(32);
  SerialExecutor serial;
  const bool attends =
      !names_view(attend(view, queries, {.data = out.data(), .head_stride = 32, .row_stride = 32}, {}, serial));
  const bool plans = !names_view(StreamingLlm{}.workspace_bytes(view, NoEvidence{}, 1).status());
  EXPECT_EQ(attends, plans);
  return !attends && !plans;
}

TEST(StridedViewOfBlocks, NeedsWidthsOfWholeBlocks) {
  QuantisedEngine<BlockQ8_0, BlockQ4_0> engine;
  auto view = engine.view();
  EXPECT_EQ(view.shape(), engine.kLayer);
  EXPECT_FALSE(refused(view));
  view.layer.key_dim = 48;
  EXPECT_EQ(view.shape(), LayerShape{});
  EXPECT_TRUE(refused(view));
  view = engine.view();
  view.layer.value_dim = 31;
  EXPECT_TRUE(refused(view));
}

TEST(StridedViewOfBlocks, NeedsBlocksThatFollowEachOther) {
  QuantisedEngine<BlockQ8_0, BlockQ4_0> engine;
  auto view = engine.view();
  view.key_strides.dim = 2;
  EXPECT_TRUE(refused(view));
  view = engine.view();
  view.value_strides = Strides::transposed(kRows, 1);
  EXPECT_TRUE(refused(view));
}

TEST(StridedViewOfBlocks, HasNoScalesApart) {
  QuantisedEngine<BlockQ8_0, float> engine;
  auto view = engine.view();
  view.key_scales = engine.key_scales.data();
  EXPECT_TRUE(refused(view));
  view = engine.view();
  view.value_scales = engine.key_scales.data();
  EXPECT_TRUE(refused(view)) << "nor have floats";
}

TEST(StridedViewOfInt8, NeedsAScaleForEachRow) {
  QuantisedEngine<Int8, Int8> engine;
  EXPECT_FALSE(refused(engine.view()));
  auto view = engine.view();
  view.key_scales = nullptr;
  EXPECT_TRUE(refused(view));
  view = engine.view();
  view.value_scales = nullptr;
  EXPECT_TRUE(refused(view));
  view = engine.view();
  view.key_scale_strides.token = 0;
  EXPECT_TRUE(refused(view)) << "rows of a head share one";
  view = engine.view();
  view.value_scale_strides.head = 0;
  EXPECT_TRUE(refused(view)) << "heads share them";
  view.layer.kv_heads = 1;
  EXPECT_FALSE(refused(view));
}

TEST(StridedViewOfInt8, ConstRowsMayShareScales) {
  QuantisedEngine<Int8, Int8> engine;
  engine.keys[3].value = 7;
  engine.key_scales[0] = 0.5f;
  const float shared = 2.f;
  StridedView<const Int8> view{.layer = engine.kLayer,
                               .keys = engine.keys.data(),
                               .key_strides = Strides::head_major(kRows, 64),
                               .values = engine.values.data(),
                               .value_strides = Strides::head_major(kRows, 32),
                               .rows = engine.rows,
                               .key_scales = engine.key_scales.data(),
                               .key_scale_strides = {.head = kRows, .token = 1},
                               .value_scales = &shared};
  static_assert(!MutableKVCacheView<decltype(view)>);
  EXPECT_FALSE(refused(view));
  std::vector<float> row(64);
  view.read_keys(0, 0, 1, row);
  EXPECT_EQ(row[3], 3.5f);
  view.value_scales = nullptr;
  EXPECT_TRUE(refused(view)) << "but they need some";
}

TEST(StridedViewOfFp8, MayHaveAScaleForTheTensorOrEachHeadButNotForEachRow) {
  QuantisedEngine<Float8E4M3, Float8E4M3> engine;
  EXPECT_FALSE(refused(engine.view())) << "one for each head";
  auto view = engine.view();
  view.key_scale_strides.head = 0;
  EXPECT_FALSE(refused(view)) << "one for the tensor";
  view.key_scales = nullptr;
  EXPECT_FALSE(refused(view)) << "none";
  view.value_scale_strides.token = 1;
  EXPECT_TRUE(refused(view));
}

TEST(StridedViewOfFp8, NeverWritesItsScales) {
  QuantisedEngine<Float8E4M3, Float8E4M3> engine;
  engine.key_scales = {0.5f, 4.f};
  static_assert(std::same_as<decltype(engine.view().key_scales), const float*>);
  auto view = engine.view();
  const std::vector<float> key(64, 3.f);
  view.write_key(1, 5, key);
  view.move_row(1, 5, 2);
  EXPECT_EQ(to_float(engine.keys[(kRows + 2) * 64]), 0.75f);
  std::vector<float> row(64);
  view.read_keys(1, 2, 1, row);
  EXPECT_EQ(row, key);
  EXPECT_EQ(engine.key_scales, (std::vector<float>{0.5f, 4.f}));
}

TEST(StridedViewOfInt8, MoveRowTakesTheScaleAlong) {
  QuantisedEngine<Int8, Int8> engine;
  auto view = engine.view();
  view.write_key(1, 9, std::vector<float>(64, 254.f));
  view.write_value(1, 9, std::vector<float>(32, -508.f));
  auto expected_keys = engine.key_scales, expected_values = engine.value_scales;
  EXPECT_EQ(expected_keys[kRows + 9], 2.f);
  EXPECT_EQ(expected_values[kRows + 9], 4.f);
  expected_keys[kRows + 4] = 2.f;
  expected_values[kRows + 4] = 4.f;
  view.move_row(1, 9, 4);
  EXPECT_EQ(engine.key_scales, expected_keys);
  EXPECT_EQ(engine.value_scales, expected_values);
}

// The pipeline on the view itself: storage_kinds_test.cpp goes through an interface.
TEST(StridedViewOfBlocks, IsCompressedInPlace) {
  QuantisedEngine<BlockQ8_0, BlockQ4_0> engine;
  auto view = engine.view();
  static_assert(MutableKVCacheView<decltype(view)>);
  std::vector<float> key(64), value(32);
  for (Index h = 0; h < 2; ++h) {
    for (Index t = 0; t < kRows; ++t) {
      for (Index d = 0; d < 64; ++d) key[at(d)] = element(h, t, d * 3, 1) / 100.f;
      for (Index d = 0; d < 32; ++d) value[at(d)] = element(h, t, d * 5, 2) / 100.f;
      view.write_key(h, t, key);
      view.write_value(h, t, value);
    }
  }
  const std::vector<Position> positions{kRows - 1};
  const std::vector<float> queries(2 * 64, 0.3f);
  const Ems ems({.score = {.window = 1, .protect = {.sinks = 1, .recent = 2}}, .budget = {.rows = 10}});
  const auto report = ems.compress(view, head_major_queries(queries.data(), 2, 64, positions));
  ASSERT_TRUE(report.ok()) << report.status().detail();
  EXPECT_EQ(report->rows_kept, 20);
  EXPECT_GT(report->rows_rewritten, 0);
  EXPECT_EQ(report->bytes_before, 2 * kRows * (2 * 34 + 18));
  EXPECT_EQ(report->bytes_after, 20 * (2 * 34 + 18));
  EXPECT_EQ(engine.rows[0] + engine.rows[1], 20);
}

TEST(StridedViewOfBlocks, BlocksAndRowsWithScalesAreGivenAsTheyAreStored) {
  QuantisedEngine<BlockQ8_0, Int8> engine;
  const auto view = engine.view();
  const StoredRows<BlockQ8_0> keys = view.stored_keys(1, 3, 4);
  EXPECT_EQ(keys.data, &engine.keys[(kRows + 3) * 2]);
  EXPECT_EQ(keys.stride, 2);
  EXPECT_EQ(keys.scales, nullptr);
  const StoredRows<Int8> values = view.stored_values(1, 3, 4);
  EXPECT_EQ(values.data, &engine.values[(kRows + 3) * 32]);
  EXPECT_EQ(values.scales, &engine.value_scales[kRows + 3]);
  EXPECT_EQ(values.scale_stride, 1);
  QuantisedEngine<Float8E4M3, Float8E4M3> scaled_by_head;
  EXPECT_EQ(scaled_by_head.view().stored_keys(1, 3, 1).scales, &scaled_by_head.key_scales[1]);
  EXPECT_EQ(scaled_by_head.view().stored_keys(1, 3, 1).scale_stride, 0);
}

}  // namespace
}  // namespace kvfold
