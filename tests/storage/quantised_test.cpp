// Quantised rows: ggml's blocks bit for bit, and int8 with scales.
#include <kvfold/storage/quantised.hpp>

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <iomanip>
#include <limits>
#include <sstream>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "builders.hpp"
#include "golden_blocks.hpp"

namespace kvfold::test {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

using Numbers = std::array<float, kBlockSize>;

template <class Block>
Block block_of(const Numbers& in) {
  Block block;
  store_block(in.data(), block);
  return block;
}

template <class Block>
Numbers numbers_of(const Block& block) {
  Numbers out{};
  load_block(block, out.data());
  return out;
}

template <class Block>
std::string bytes_of(const Block& block) {
  std::array<unsigned char, sizeof(Block)> bytes{};
  std::memcpy(bytes.data(), &block, sizeof(Block));
  std::ostringstream out;
  for (const unsigned char b : bytes) out << std::hex << std::setw(2) << std::setfill('0') << unsigned{b};
  return out.str();
}

struct BlockName {
  template <class Block>
  static std::string GetName(int) {  // NOLINT(readability-identifier-naming): GoogleTest's
    return std::same_as<Block, BlockQ8_0> ? "q8_0" : "q4_0";
  }
};

/// The quantised integers of a block, and what the scale may be multiplied by.
std::vector<int> quants_of(const BlockQ8_0& block) { return {block.values.begin(), block.values.end()}; }
std::vector<int> quants_of(const BlockQ4_0& block) {
  std::vector<int> quants;
  for (const std::uint8_t pair : block.pairs) quants.push_back((pair & 15) - 8);
  for (const std::uint8_t pair : block.pairs) quants.push_back((pair >> 4) - 8);
  return quants;
}

template <class Block>
class GgmlBlock : public testing::Test {
 protected:
  static constexpr float kLargestQuant = std::same_as<Block, BlockQ8_0> ? 127.f : 8.f;
};
using Blocks = testing::Types<BlockQ8_0, BlockQ4_0>;
TYPED_TEST_SUITE(GgmlBlock, Blocks, BlockName);

TYPED_TEST(GgmlBlock, HasTheBytesAndTheNumbersOfGgml) {
  const auto lines = golden_blocks(BlockName::GetName<TypeParam>(0));
  ASSERT_GT(lines.size(), 30u);
  for (const auto& line : lines) {
    ASSERT_EQ(line.size(), 65u);
    Numbers in{};
    for (std::size_t i = 0; i < in.size(); ++i) in[i] = hex_float(line[i]);
    const TypeParam block = block_of<TypeParam>(in);
    ASSERT_EQ(bytes_of(block), line[32]) << line[0];
    const Numbers out = numbers_of(block);
    for (std::size_t i = 0; i < out.size(); ++i) {
      const float expected = hex_float(line[33 + i]);
      if (std::isnan(expected)) {
        ASSERT_TRUE(std::isnan(out[i])) << i;
      } else {
        ASSERT_EQ(std::bit_cast<std::uint32_t>(out[i]), hex(line[33 + i])) << line[0] << " " << i;
      }
    }
  }
}

TYPED_TEST(GgmlBlock, ReadsAsScaleTimesInteger) {
  Random random(3);
  Numbers in{};
  for (float& x : in) x = random.normal();
  const TypeParam block = block_of<TypeParam>(in);
  const std::vector<int> quants = quants_of(block);
  const Numbers out = numbers_of(block);
  for (std::size_t i = 0; i < out.size(); ++i) {
    ASSERT_EQ(out[i], to_float(block.scale) * static_cast<float>(quants[i])) << i;
  }
}

// In fp32 the quotients round before they are cut to integers; whether a compiler fuses operations must not matter.
TYPED_TEST(GgmlBlock, RoundsTheScaledNumberToFp32FirstWhateverTheCompilerFuses) {
  Random random(5);
  Index ties = 0;
  for (int repeat = 0; repeat < 20000; ++repeat) {
    Numbers in{};
    for (float& x : in) x = 3.f * random.normal();
    float largest = 0.f;
    for (const float x : in) largest = std::abs(x) > std::abs(largest) ? x : largest;
    volatile float scale = std::same_as<TypeParam, BlockQ8_0> ? std::abs(largest) / 127.f : largest / -8.f;
    volatile float inverse = 1.f / scale;
    // Numbers next to the border between two integers.
    for (std::size_t i = 0; i < in.size(); ++i) {
      const float border = static_cast<float>(static_cast<int>(i % 8)) + 0.5f;
      if (in[i] != largest) in[i] = std::nextafter(border * scale, i < 16 ? 0.f : largest);
    }
    const std::vector<int> quants = quants_of(block_of<TypeParam>(in));
    for (std::size_t i = 0; i < in.size(); ++i) {
      volatile float scaled = in[i] * inverse;
      volatile float shifted = scaled + 8.5f;
      const int expected = std::same_as<TypeParam, BlockQ8_0>
                               ? static_cast<int>(std::round(scaled))
                               : std::min(15, static_cast<int>(static_cast<float>(shifted))) - 8;
      ASSERT_EQ(quants[i], expected) << repeat << " " << i;
      const double exact = static_cast<double>(in[i]) * static_cast<double>(inverse);
      ties += static_cast<double>(static_cast<float>(scaled)) != exact &&
                      std::abs(std::abs(exact) - std::floor(std::abs(exact)) - 0.5) < 1e-6
                  ? 1
                  : 0;
    }
  }
  EXPECT_GT(ties, 1000) << "no number was near a border";
}

TYPED_TEST(GgmlBlock, RequantisingWhatWasReadGivesTheSameBytes) {
  Random random(7);
  for (int repeat = 0; repeat < 2000; ++repeat) {
    Numbers in{};
    const float size = std::ldexp(1.f, static_cast<int>(random.below(24)) - 14);
    for (float& x : in) x = size * random.normal();
    const TypeParam block = block_of<TypeParam>(in);
    ASSERT_EQ(bytes_of(block_of<TypeParam>(numbers_of(block))), bytes_of(block)) << repeat;
  }
}

TYPED_TEST(GgmlBlock, ANumberThatIsNotFiniteMakesTheWholeBlockNan) {
  for (const float bad : {kNan, -kNan, kInfinity, -kInfinity}) {
    for (const std::size_t place : {0u, 13u, 31u}) {
      Numbers in{};
      for (std::size_t i = 0; i < in.size(); ++i) in[i] = static_cast<float>(i) - 15.f;
      in[place] = bad;
      for (const float x : numbers_of(block_of<TypeParam>(in))) EXPECT_TRUE(std::isnan(x)) << bad << " " << place;
    }
  }
}

TYPED_TEST(GgmlBlock, ScalesWithoutAFiniteReciprocalMakeZeros) {
  Numbers in{};
  in.fill(1e-44f);
  in[3] = -1e-42f;
  for (const float x : numbers_of(block_of<TypeParam>(in))) EXPECT_EQ(x, 0.f);
  for (const int quant : quants_of(block_of<TypeParam>(in))) EXPECT_EQ(quant, 0);
}

TYPED_TEST(GgmlBlock, TheLargestFloatsAreHandledAsInfinities) {
  Numbers in{};
  in.fill(std::numeric_limits<float>::max());
  in[9] = -in[9];
  for (const float x : numbers_of(block_of<TypeParam>(in))) EXPECT_TRUE(std::isinf(x)) << x;
  in.fill(60000.f * TestFixture::kLargestQuant);
  for (const float x : numbers_of(block_of<TypeParam>(in))) EXPECT_TRUE(std::isfinite(x)) << x;
}

TEST(Int8Rows, ScaleIsTheLargestMagnitudeOver127At17Bits) {
  EXPECT_EQ(int8_scale(127.f), 1.f);
  EXPECT_EQ(int8_scale(0.f), 0.f);
  Random random(9);
  for (int repeat = 0; repeat < 10000; ++repeat) {
    const float most = std::abs(random.normal()) * std::ldexp(1.f, static_cast<int>(random.below(80)) - 40);
    const float scale = int8_scale(most);
    ASSERT_EQ(std::bit_cast<std::uint32_t>(scale) & 0x7fu, 0u) << most;
    ASSERT_NEAR(scale / most * 127.f, 1.f, 0x1p-16f) << most;
    ASSERT_EQ(int8_scale(127.f * scale), scale) << most;
    ASSERT_EQ(static_cast<double>(127.f * scale), 127.0 * static_cast<double>(scale)) << most;
    ASSERT_EQ(int8_of(most, scale).value, 127) << most;
    ASSERT_EQ(int8_of(-most, scale).value, -127) << most;
  }
}

TEST(Int8Rows, NumbersRoundToTheNearestAndTiesAwayFromZero) {
  for (const float scale : {1.f, 0.25f, 3.f, 0x1.8ccp-3f}) {
    for (int k = 0; k < 127; ++k) {
      const float middle = (static_cast<float>(k) + 0.5f) * scale;  // exact
      EXPECT_EQ(int8_of(middle, scale).value, k + 1) << scale;
      EXPECT_EQ(int8_of(-middle, scale).value, -k - 1) << scale;
      EXPECT_EQ(int8_of(std::nextafter(middle, 0.f), scale).value, k) << scale;
      EXPECT_EQ(int8_of(-std::nextafter(middle, 0.f), scale).value, -k) << scale;
    }
  }
}

TEST(Int8Rows, NumbersBeyondTheScaleAreCutOff) {
  EXPECT_EQ(int8_of(1e30f, 1.f).value, 127);
  EXPECT_EQ(int8_of(-1e30f, 1.f).value, -127);
}

TEST(Int8Rows, ScalesThatAreZeroOrNotFiniteGiveZeros) {
  EXPECT_EQ(int8_of(3.f, 0.f).value, 0);
  EXPECT_EQ(int8_of(3.f, kNan).value, 0);
  EXPECT_EQ(int8_of(kNan, kInfinity).value, 0);
  EXPECT_TRUE(std::isnan(int8_scale(kNan)));
  EXPECT_EQ(int8_scale(kInfinity), kInfinity);
}

TEST(Int8Rows, RowsBelowTheSmallestScaleAreZeros) {
  EXPECT_EQ(int8_scale(126.f * 0x1p-100f), 0.f);
  EXPECT_EQ(int8_scale(127.f * 0x1p-100f), 0x1p-100f);
  EXPECT_EQ(int8_scale(std::numeric_limits<float>::denorm_min()), 0.f);
  EXPECT_TRUE(std::isfinite(int8_scale(std::numeric_limits<float>::max())));
}

TEST(StoredKinds, TellTheirSizesAndScales) {
  static_assert(Stored<float> && Stored<Float16> && Stored<BFloat16> && Stored<Float8E4M3>);
  static_assert(Stored<Int8> && Stored<BlockQ8_0> && Stored<BlockQ4_0>);
  static_assert(!Stored<double> && !Stored<int> && !Stored<const float> && !Element<Int8>);
  static_assert(kUnit<float> == 1 && kUnit<Float8E4M3> == 1 && kUnit<Int8> == 1);
  static_assert(kUnit<BlockQ8_0> == 32 && kUnit<BlockQ4_0> == 32);
  static_assert(kRowScaled<Int8> && !kRowScaled<Float8E4M3> && !kRowScaled<BlockQ8_0>);
  static_assert(kMayBeScaled<Int8> && kMayBeScaled<Float8E4M3> && !kMayBeScaled<float> && !kMayBeScaled<BlockQ4_0>);
}

}  // namespace
}  // namespace kvfold::test
