// The row codec: strides, scales and bits, for every storage type.
#include <kvfold/detail/row_codec.hpp>

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "builders.hpp"

namespace kvfold::test {
namespace {

constexpr Index kWidth = 64;

std::size_t at(Index i) { return static_cast<std::size_t>(i); }

template <class E>
class RowCodec : public testing::Test {
 protected:
  static constexpr Index kUnits = detail::row_units<E>(kWidth);

  std::vector<float> row = [] {
    Random random(21);
    return normals(kWidth, random);
  }();
};
struct StoredName {
  template <class E>
  static std::string GetName(int i) {  // NOLINT(readability-identifier-naming): GoogleTest's
    return std::array<const char*, 7>{"f32", "f16", "bf16", "fp8", "int8", "q8_0", "q4_0"}[at(i)];
  }
};
using StoredTypes = testing::Types<float, Float16, BFloat16, Float8E4M3, Int8, BlockQ8_0, BlockQ4_0>;
TYPED_TEST_SUITE(RowCodec, StoredTypes, StoredName);

template <class E>
bool same_bits(const std::vector<E>& a, const std::vector<E>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(E)) == 0;
}

TEST(RowCodecSizes, RowsTakeTheirUnitsAndTheirOwnScale) {
  EXPECT_EQ(detail::row_bytes<float>(64), 256);
  EXPECT_EQ(detail::row_bytes<Float16>(64), 128);
  EXPECT_EQ(detail::row_bytes<BFloat16>(64), 128);
  EXPECT_EQ(detail::row_bytes<Float8E4M3>(64), 64);
  EXPECT_EQ(detail::row_bytes<Int8>(64), 68);
  EXPECT_EQ(detail::row_bytes<BlockQ8_0>(64), 68);
  EXPECT_EQ(detail::row_bytes<BlockQ4_0>(64), 36);
}

TYPED_TEST(RowCodec, WidthsFitWhereTheyAreWholeUnits) {
  const bool blocks = sizeof(TypeParam) > 4;
  EXPECT_TRUE(detail::width_fits<TypeParam>(64));
  EXPECT_EQ(detail::width_fits<TypeParam>(48), !blocks);
  EXPECT_EQ(detail::row_units<TypeParam>(64), blocks ? 2 : 64);
}

TYPED_TEST(RowCodec, NumbersThatLieApartAreStoredAsThoseThatFollowEachOther) {
  std::vector<TypeParam> expected(at(this->kUnits)), got(at(this->kUnits));
  float expected_scale = 1.f, scale = 1.f;
  detail::write_row<TypeParam>(this->row.data(), kWidth, expected.data(), 1, &expected_scale);
  std::vector<float> spread(at(3 * kWidth), 1e9f);
  for (Index d = 0; d < kWidth; ++d) spread[at(3 * d)] = this->row[at(d)];
  detail::write_strided_row<TypeParam>(spread.data(), 3, kWidth, got.data(), 1, &scale);
  EXPECT_TRUE(same_bits(got, expected));
  EXPECT_EQ(scale, expected_scale);
}

/// Types whose numbers may lie apart.
template <class E>
class RowCodecOfNumbers : public RowCodec<E> {};
using NumberTypes = testing::Types<float, Float16, BFloat16, Float8E4M3, Int8>;
TYPED_TEST_SUITE(RowCodecOfNumbers, NumberTypes, StoredName);

TYPED_TEST(RowCodecOfNumbers, UnitsThatLieApartAreWrittenAndReadAndNothingBetweenThem) {
  const Index rows = 21, dim_stride = 25;  // transposed, more tokens than are converted at a time
  std::vector<TypeParam> together(at(rows * kWidth)), apart(at(dim_stride * kWidth));
  std::vector<float> scales(at(rows), 1.f), same_scales(at(rows), 1.f);
  for (Index i = 0; i < rows; ++i) {
    for (float& x : this->row) x *= -1.01f;
    detail::write_row<TypeParam>(this->row.data(), kWidth, &together[at(i * kWidth)], 1, &scales[at(i)]);
    detail::write_row<TypeParam>(this->row.data(), kWidth, &apart[at(i)], dim_stride, &same_scales[at(i)]);
  }
  EXPECT_EQ(scales, same_scales);
  std::vector<float> expected(at(rows * kWidth)), got(at(rows * kWidth));
  detail::read_rows<TypeParam>(together.data(), kWidth, 1, rows, kWidth, scales.data(), 1, expected.data());
  detail::read_rows<TypeParam>(apart.data(), 1, dim_stride, rows, kWidth, scales.data(), 1, got.data());
  EXPECT_TRUE(same_bits(got, expected));
  for (Index d = 0; d < kWidth; ++d) {
    for (Index i = rows; i < dim_stride; ++i) {
      const TypeParam untouched{};
      ASSERT_EQ(std::memcmp(&apart[at(d * dim_stride + i)], &untouched, sizeof(TypeParam)), 0) << d << " " << i;
    }
  }
}

TYPED_TEST(RowCodec, CopiesEveryBitWhateverItMeans) {
  Random random(31);
  for (const Index dim_stride : {1, 3}) {
    if (dim_stride != 1 && kUnit<TypeParam> != 1) continue;
    std::vector<TypeParam> from(at(this->kUnits * dim_stride)), to(from.size());
    std::vector<unsigned char> bytes(from.size() * sizeof(TypeParam));
    for (unsigned char& b : bytes) b = static_cast<unsigned char>(random.below(256));
    if (sizeof(TypeParam) == 4) bytes[2] = 0xa0, bytes[3] = 0x7f;  // a signalling NaN
    std::memcpy(static_cast<void*>(from.data()), bytes.data(), bytes.size());
    detail::copy_row<TypeParam>(from.data(), to.data(), dim_stride, kWidth);
    for (Index u = 0; u < this->kUnits * dim_stride; ++u) {
      const TypeParam untouched{};
      const TypeParam* expected = u % dim_stride == 0 ? &from[at(u)] : &untouched;
      ASSERT_EQ(std::memcmp(&to[at(u)], expected, sizeof(TypeParam)), 0) << u;
    }
  }
}

TYPED_TEST(RowCodec, NoRowsAreReadWhereNoneAreAskedFor) {
  const std::vector<TypeParam> rows(at(this->kUnits));
  float untouched = 7.f;
  detail::read_rows<TypeParam>(rows.data(), this->kUnits, 1, 0, kWidth, nullptr, 0, &untouched);
  EXPECT_EQ(untouched, 7.f);
}

TYPED_TEST(RowCodec, OnlyFloatRowsThatFollowEachOtherAreUsedInPlace) {
  const std::vector<TypeParam> rows(128);
  const bool is_float = std::same_as<TypeParam, float>;
  EXPECT_EQ(detail::rows_in_place<TypeParam>(rows.data(), kWidth, 1, kWidth) != nullptr, is_float);
  EXPECT_EQ(detail::rows_in_place<TypeParam>(rows.data(), kWidth + 1, 1, kWidth), nullptr);
  EXPECT_EQ(detail::rows_in_place<TypeParam>(rows.data(), kWidth, 2, kWidth), nullptr);
}

TEST(RowCodecOfInt8, EveryNumberOfARowIsMultipliedByTheScale) {
  std::vector<Int8> stored(256);
  for (std::size_t i = 0; i < stored.size(); ++i) stored[i].value = static_cast<std::int8_t>(static_cast<int>(i) - 128);
  const float scale = 0x1.a35p-5f;
  for (const Index width : {1, 15, 16, 17, 33, 256}) {
    std::vector<float> out(at(width) + 1, 77.f);
    detail::read_rows<Int8>(stored.data(), width, 1, 1, width, &scale, 1, out.data());
    for (Index d = 0; d < width; ++d) ASSERT_EQ(out[at(d)], scale * static_cast<float>(d - 128)) << width << " " << d;
    ASSERT_EQ(out[at(width)], 77.f) << width;
  }
}

TEST(RowCodecOfFp8, ReadingMultipliesByTheScaleAndWritingDividesByIt) {
  const std::vector<float> in{1.f, -3.f, 0.1f, 448.f, 1000.f};
  std::vector<Float8E4M3> stored(in.size());
  std::vector<float> out(in.size());
  const float scale = 2.f;
  detail::write_row<Float8E4M3>(in.data(), 5, stored.data(), 1, &scale);
  detail::read_rows<Float8E4M3>(stored.data(), 5, 1, 1, 5, &scale, 0, out.data());
  EXPECT_EQ(out, (std::vector<float>{1.f, -3.f, 2.f * to_float(from_float<Float8E4M3>(0.05f)), 448.f, 896.f}));
  EXPECT_EQ(to_float(stored[1]), -1.5f);
  EXPECT_EQ(scale, 2.f);
  detail::write_row<Float8E4M3>(in.data(), 5, stored.data(), 1, nullptr);
  detail::read_rows<Float8E4M3>(stored.data(), 5, 1, 1, 5, nullptr, 0, out.data());
  EXPECT_EQ(out[1], -3.f);
  EXPECT_EQ(out[4], 448.f) << "saturated";
}

TEST(RowCodecOfInt8, EachRowHasTheScaleAtItsStride) {
  const std::vector<Int8> rows{{1}, {-128}, {100}, {127}};
  const std::vector<float> scales{0.5f, 99.f, 3.f, 99.f};
  std::vector<float> out(4);
  detail::read_rows<Int8>(rows.data(), 2, 1, 2, 2, scales.data(), 2, out.data());
  EXPECT_EQ(out, (std::vector<float>{0.5f, -64.f, 300.f, 381.f}));
}

TEST(RowCodecOfInt8, ARowOfZerosHasScaleZeroAndANanMakesTheRowNan) {
  std::vector<float> in(4), out(4);
  std::vector<Int8> row(4, Int8{9});
  float scale = 7.f;
  detail::write_row<Int8>(in.data(), 4, row.data(), 1, &scale);
  EXPECT_EQ(scale, 0.f);
  EXPECT_EQ(row, std::vector<Int8>(4));
  for (const float bad : {std::nanf(""), HUGE_VALF, -HUGE_VALF}) {
    in[2] = bad;
    detail::write_row<Int8>(in.data(), 4, row.data(), 1, &scale);
    detail::read_rows<Int8>(row.data(), 4, 1, 1, 4, &scale, 1, out.data());
    for (const float x : out) EXPECT_TRUE(std::isnan(x)) << bad;
  }
}

}  // namespace
}  // namespace kvfold::test
