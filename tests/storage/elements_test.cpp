// Element types: what 16-bit floats mean, and how fp32 is rounded to them.
#include <kvfold/storage/elements.hpp>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "flushing_subnormals.hpp"
#include "golden_blocks.hpp"

namespace kvfold {
namespace {

// The 16-bit formats as IEEE 754 describes them: sign, exponent and mantissa from the top.
template <class T>
struct Format;
template <>
struct Format<Float16> {
  static constexpr int kExponentBits = 5, kMantissaBits = 10;
};
template <>
struct Format<BFloat16> {
  static constexpr int kExponentBits = 8, kMantissaBits = 7;
};

template <class T>
constexpr unsigned kInfinityBits = ((1u << Format<T>::kExponentBits) - 1) << Format<T>::kMantissaBits;

template <class T>
T from_bits(unsigned bits) {
  return T{static_cast<std::uint16_t>(bits)};
}

/// The value of a bit pattern, with the step beyond the largest number as if exponents went on.
template <class T>
double value_of(unsigned bits) {
  const unsigned magnitude = bits & 0x7fffu;
  const int mantissa_bits = Format<T>::kMantissaBits;
  const int bias = (1 << (Format<T>::kExponentBits - 1)) - 1;
  const int exponent = static_cast<int>(magnitude >> mantissa_bits);
  const int mantissa = static_cast<int>(magnitude & ((1u << mantissa_bits) - 1));
  const double absolute = exponent == 0 ? std::ldexp(mantissa, 1 - bias - mantissa_bits)
                                        : std::ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits);
  return (bits & 0x8000u) != 0 ? -absolute : absolute;
}

std::uint32_t bits_of(float x) { return std::bit_cast<std::uint32_t>(x); }

struct ElementName {
  template <class T>
  static std::string GetName(int) {  // NOLINT(readability-identifier-naming): GoogleTest's
    return std::same_as<T, float>      ? "float"
           : std::same_as<T, Float16>  ? "Float16"
           : std::same_as<T, BFloat16> ? "BFloat16"
                                       : "Float8E4M3";
  }
};

template <class T>
class SixteenBitElement : public testing::Test {};
using SixteenBitTypes = testing::Types<Float16, BFloat16>;
TYPED_TEST_SUITE(SixteenBitElement, SixteenBitTypes, ElementName);

TYPED_TEST(SixteenBitElement, EveryNumberReadsAsItsFormulaSays) {
  for (unsigned bits = 0; bits <= 0xffffu; ++bits) {
    if ((bits & 0x7fffu) >= kInfinityBits<TypeParam>) continue;
    const auto expected = static_cast<float>(value_of<TypeParam>(bits));  // exact
    ASSERT_EQ(bits_of(to_float(from_bits<TypeParam>(bits))), bits_of(expected)) << std::hex << bits;
  }
}

TYPED_TEST(SixteenBitElement, InfinitiesReadAsInfinities) {
  const float infinity = std::numeric_limits<float>::infinity();
  EXPECT_EQ(to_float(from_bits<TypeParam>(kInfinityBits<TypeParam>)), infinity);
  EXPECT_EQ(to_float(from_bits<TypeParam>(kInfinityBits<TypeParam> | 0x8000u)), -infinity);
}

TYPED_TEST(SixteenBitElement, NansReadWithSignAndPayload) {
  const int widened = 23 - Format<TypeParam>::kMantissaBits;
  for (const unsigned sign : {0u, 0x8000u}) {
    for (unsigned bits = kInfinityBits<TypeParam> + 1; bits <= 0x7fffu; ++bits) {
      const unsigned payload = bits - kInfinityBits<TypeParam>;
      ASSERT_EQ(bits_of(to_float(from_bits<TypeParam>(sign | bits))), sign << 16 | 0x7f800000u | payload << widened)
          << std::hex << bits;
    }
  }
}

TYPED_TEST(SixteenBitElement, EveryNumberSurvivesTheRoundTrip) {
  for (unsigned bits = 0; bits <= 0xffffu; ++bits) {
    if ((bits & 0x7fffu) > kInfinityBits<TypeParam>) continue;
    ASSERT_EQ(from_float<TypeParam>(to_float(from_bits<TypeParam>(bits))).bits, bits) << std::hex << bits;
  }
}

TYPED_TEST(SixteenBitElement, NanStaysNanWithItsSign) {
  for (const std::uint32_t nan : {0x7fc00000u, 0x7f800001u, 0x7fffffffu, 0xffc00000u, 0xff800001u}) {
    const unsigned bits = from_float<TypeParam>(std::bit_cast<float>(nan)).bits;
    EXPECT_GT(bits & 0x7fffu, kInfinityBits<TypeParam>) << std::hex << nan;
    EXPECT_EQ(bits >> 15, nan >> 31) << std::hex << nan;
  }
}

// Between each number and the next one up, infinity among them.
TYPED_TEST(SixteenBitElement, RoundsToTheNearestNumberAndTiesToTheEvenOne) {
  for (unsigned low = 0; low < kInfinityBits<TypeParam>; ++low) {
    const double below = value_of<TypeParam>(low), above = value_of<TypeParam>(low + 1);
    const auto exact = static_cast<float>(below);
    const auto middle = static_cast<float>((below + above) / 2);  // exact: fp32 has mantissa bits to spare
    const unsigned even = (low & 1u) == 0 ? low : low + 1;
    const auto rounded = [](float x) { return unsigned{from_float<TypeParam>(x).bits}; };
    ASSERT_EQ(rounded(std::nextafter(exact, middle)), low) << std::hex << low;
    ASSERT_EQ(rounded(std::nextafter(middle, 0.f)), low) << std::hex << low;
    ASSERT_EQ(rounded(middle), even) << std::hex << low;
    ASSERT_EQ(rounded(std::nextafter(middle, std::numeric_limits<float>::max())), low + 1) << std::hex << low;
    ASSERT_EQ(rounded(-middle), even | 0x8000u) << std::hex << low;
  }
}

TYPED_TEST(SixteenBitElement, KeepsTheSignOfZeroAndOfWhatVanishes) {
  EXPECT_EQ(from_float<TypeParam>(0.f).bits, 0x0000u);
  EXPECT_EQ(from_float<TypeParam>(-0.f).bits, 0x8000u);
  const float tiniest = std::numeric_limits<float>::denorm_min();
  EXPECT_EQ(from_float<TypeParam>(tiniest).bits, 0x0000u);
  EXPECT_EQ(from_float<TypeParam>(-tiniest).bits, 0x8000u);
}

TYPED_TEST(SixteenBitElement, WhatIsTooLargeBecomesInfinity) {
  const float largest = std::numeric_limits<float>::max();
  EXPECT_EQ(from_float<TypeParam>(largest).bits, kInfinityBits<TypeParam>);
  EXPECT_EQ(from_float<TypeParam>(-largest).bits, kInfinityBits<TypeParam> | 0x8000u);
  EXPECT_EQ(from_float<TypeParam>(std::numeric_limits<float>::infinity()).bits, kInfinityBits<TypeParam>);
}

TEST(Float16Test, OverflowsFrom65520On) {
  EXPECT_EQ(to_float(from_float<Float16>(65519.996f)), 65504.f);
  EXPECT_TRUE(std::isinf(to_float(from_float<Float16>(65520.f))));
}

TEST(Float16Test, ConversionsAreConstantExpressions) {
  static_assert(to_float(Float16{0x3c00}) == 1.f && from_float<Float16>(1.f).bits == 0x3c00);
  static_assert(to_float(BFloat16{0x3f80}) == 1.f && from_float<BFloat16>(1.f).bits == 0x3f80);
}

TEST(Float8E4M3Test, EveryCodeReadsAsMlDtypesReadsIt) {
  const auto lines = test::golden_blocks("e4m3_read");
  ASSERT_EQ(lines.size(), 256u);
  for (const auto& line : lines) {
    const Float8E4M3 code{static_cast<std::uint8_t>(test::hex(line[0]))};
    const float expected = test::hex_float(line[1]);
    float loaded = 0.f;
    load_floats(&code, 1, &loaded);
    EXPECT_EQ(bits_of(loaded), bits_of(to_float(code))) << line[0];
    if (std::isnan(expected)) {
      EXPECT_TRUE(std::isnan(to_float(code))) << line[0];
    } else {
      EXPECT_EQ(bits_of(to_float(code)), bits_of(expected)) << line[0];
    }
  }
}

TEST(Float8E4M3Test, RoundsAsMlDtypesDoesAndSaturates) {
  const auto lines = test::golden_blocks("e4m3_write");
  ASSERT_GT(lines.size(), 1000u);
  for (const auto& line : lines) {
    EXPECT_EQ(unsigned{from_float<Float8E4M3>(test::hex_float(line[0])).bits}, test::hex(line[1])) << line[0];
  }
}

TEST(Float8E4M3Test, OnlyNanIsNan) {
  for (const std::uint32_t nan : {0x7fc00000u, 0x7f800001u, 0x7fffffffu}) {
    EXPECT_EQ(from_float<Float8E4M3>(std::bit_cast<float>(nan)).bits, 0x7f) << std::hex << nan;
    EXPECT_EQ(from_float<Float8E4M3>(std::bit_cast<float>(nan | 0x80000000u)).bits, 0xff) << std::hex << nan;
  }
  EXPECT_EQ(from_float<Float8E4M3>(std::numeric_limits<float>::infinity()).bits, 0x7e);
  EXPECT_EQ(from_float<Float8E4M3>(-std::numeric_limits<float>::max()).bits, 0xfe);
}

TEST(Float8E4M3Test, ConversionsAreConstantExpressions) {
  static_assert(to_float(Float8E4M3{0x38}) == 1.f && from_float<Float8E4M3>(1.f).bits == 0x38);
  static_assert(to_float(Float8E4M3{0x7e}) == 448.f && from_float<Float8E4M3>(1e9f).bits == 0x7e);
  static_assert(to_float(Float8E4M3{0x01}) == 0x1p-9f && from_float<Float8E4M3>(-0x1p-9f).bits == 0x81);
}

#if defined(__SSE2__)
TYPED_TEST(SixteenBitElement, ThreadsThatFlushSubnormalsReadTheSameNumbers) {
  std::vector<TypeParam> stored;
  std::vector<std::uint32_t> expected;
  for (unsigned bits = 0; bits < kInfinityBits<TypeParam>; ++bits) {
    stored.push_back(from_bits<TypeParam>(bits));
    expected.push_back(bits_of(static_cast<float>(value_of<TypeParam>(bits))));
  }
  std::vector<float> one_by_one(stored.size()), at_once(stored.size());
  {
    const test::FlushingSubnormals mode;
    for (std::size_t i = 0; i < stored.size(); ++i) one_by_one[i] = to_float(stored[i]);
    load_floats(stored.data(), static_cast<Index>(stored.size()), at_once.data());
  }
  for (std::size_t i = 0; i < stored.size(); ++i) {
    ASSERT_EQ(bits_of(one_by_one[i]), expected[i]) << std::hex << i;
    ASSERT_EQ(bits_of(at_once[i]), expected[i]) << std::hex << i;
  }
}

TYPED_TEST(SixteenBitElement, ThreadsThatFlushSubnormalsWriteTheSameNumbers) {
  std::vector<float> floats;  // numbers and the middles between them
  std::vector<unsigned> expected;
  for (unsigned low = 0; low < kInfinityBits<TypeParam>; ++low) {
    floats.push_back(static_cast<float>(value_of<TypeParam>(low)));
    expected.push_back(low);
    floats.push_back(static_cast<float>((value_of<TypeParam>(low) + value_of<TypeParam>(low + 1)) / 2));
    expected.push_back((low & 1u) == 0 ? low : low + 1);
  }
  std::vector<TypeParam> stored(floats.size());
  {
    const test::FlushingSubnormals mode;
    store_floats(floats.data(), static_cast<Index>(floats.size()), stored.data());
  }
  for (std::size_t i = 0; i < stored.size(); ++i) ASSERT_EQ(stored[i].bits, expected[i]) << std::hex << i;
}
#endif

template <class T>
class ElementRows : public testing::Test {};
using AllTypes = testing::Types<float, Float16, BFloat16, Float8E4M3>;
TYPED_TEST_SUITE(ElementRows, AllTypes, ElementName);

TYPED_TEST(ElementRows, LoadConvertsAsManyAsAskedForAndNoMore) {
  std::vector<TypeParam> stored(64);
  for (std::size_t i = 0; i < stored.size(); ++i) {
    stored[i] = from_float<TypeParam>((static_cast<float>(i) - 20.f) * 0.37f);
  }
  for (std::size_t start = 0; start < 4; ++start) {
    for (std::size_t n = 0; n <= 41; ++n) {
      std::vector<float> out(n + 2, 77.f);
      load_floats(stored.data() + start, static_cast<Index>(n), out.data());
      for (std::size_t i = 0; i < n; ++i) ASSERT_EQ(out[i], to_float(stored[start + i])) << n << " " << i;
      ASSERT_EQ(out[n], 77.f) << n;
    }
  }
}

/// As the bits of numbers; NaNs, which processors make quiet, are all the same but for their sign.
std::uint32_t bits_or_nan(float x) { return std::isnan(x) ? (bits_of(x) & 0x80000000u) | 0x7fc00000u : bits_of(x); }

TYPED_TEST(ElementRows, EveryCodeReadsInARowAsItDoesAlone) {
  if constexpr (!std::same_as<TypeParam, float>) {
    std::vector<TypeParam> stored(std::size_t{1} << 8 * sizeof(TypeParam));
    for (std::size_t i = 0; i < stored.size(); ++i) stored[i].bits = static_cast<decltype(stored[i].bits)>(i);
    std::vector<float> out(stored.size());
    load_floats(stored.data(), static_cast<Index>(stored.size()), out.data());
    for (std::size_t i = 0; i < stored.size(); ++i) {
      ASSERT_EQ(bits_or_nan(out[i]), bits_or_nan(to_float(stored[i]))) << std::hex << i;
    }
  }
}

TYPED_TEST(ElementRows, NumbersAreRoundedInARowAsTheyAreAlone) {
  std::vector<float> floats;  // every sign and exponent, and mantissas on both sides of where rounding turns
  for (unsigned top = 0; top <= 0xffffu; ++top) {
    for (const unsigned rest : {0x0000u, 0x0001u, 0x0fffu, 0x1000u, 0x1001u, 0x7fffu, 0x8000u, 0x8001u, 0xf000u}) {
      floats.push_back(std::bit_cast<float>(top << 16 | rest));
    }
  }
  std::vector<TypeParam> out(floats.size());
  store_floats(floats.data(), static_cast<Index>(floats.size()), out.data());
  for (std::size_t i = 0; i < floats.size(); ++i) {
    ASSERT_EQ(bits_of(to_float(out[i])), bits_of(to_float(from_float<TypeParam>(floats[i])))) << bits_of(floats[i]);
  }
}

TYPED_TEST(ElementRows, StoreConvertsAsManyAsAskedForAndNoMore) {
  std::vector<float> floats(64);
  for (std::size_t i = 0; i < floats.size(); ++i) floats[i] = (static_cast<float>(i) - 20.f) * 0.37f;
  const TypeParam untouched = from_float<TypeParam>(77.f);
  for (std::size_t start = 0; start < 4; ++start) {
    for (std::size_t n = 0; n <= 41; ++n) {
      std::vector<TypeParam> out(n + 2, untouched);
      store_floats(floats.data() + start, static_cast<Index>(n), out.data());
      for (std::size_t i = 0; i < n; ++i) ASSERT_EQ(out[i], from_float<TypeParam>(floats[start + i])) << n << " " << i;
      ASSERT_EQ(out[n], untouched) << n;
    }
  }
}

TYPED_TEST(ElementRows, NothingIsReadOrWrittenForNoElements) {
  load_floats(static_cast<const TypeParam*>(nullptr), 0, nullptr);
  float untouched = 77.f;
  load_floats(static_cast<const TypeParam*>(nullptr), 0, &untouched);
  EXPECT_EQ(untouched, 77.f);
}

}  // namespace
}  // namespace kvfold
