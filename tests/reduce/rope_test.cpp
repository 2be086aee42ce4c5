#include <kvfold/detail/rope.hpp>

#include <algorithm>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "builders.hpp"
#include "merge_oracle.hpp"

namespace kvfold::test {
namespace {

constexpr Index kWidth = 20;  // D

std::vector<float> turned(std::vector<float> key, const Rope& rope, double delta) {
  detail::rotate(key.data(), static_cast<Index>(key.size()), rope, delta);
  return key;
}

double dot(const std::vector<float>& a, const std::vector<float>& b) {
  return std::inner_product(a.begin(), a.end(), b.begin(), 0.0, std::plus<>{},
                            [](float x, float y) { return static_cast<double>(x) * static_cast<double>(y); });
}

/// The largest difference between two keys whose entries are about 1.
double distance(const std::vector<float>& a, const std::vector<float>& b) {
  double most = 0.0;
  for (std::size_t d = 0; d < a.size(); ++d) {
    most = std::max(most, std::abs(static_cast<double>(a[d]) - static_cast<double>(b[d])));
  }
  return most;
}

constexpr double kRounding = 1e-6;
constexpr float kFrequencies[] = {1.f, 0.25f, 0.01f};

struct Convention {
  std::string name;
  Rope rope;
};

class Rotation : public testing::TestWithParam<Convention> {
 protected:
  Rope rope = GetParam().rope;
  Random random{11};
  std::vector<float> key = normals(kWidth, random);
  std::vector<float> query = normals(kWidth, random);
};

TEST_P(Rotation, TurnsEachPairOfChannelsAsAComplexNumber) {
  for (const double delta : {1.0, -1.0, 17.0, 4096.0, 1e6}) {
    const Doubles wanted = rotated(Doubles(key.begin(), key.end()), rope, delta);
    EXPECT_LT(distance(turned(key, rope, delta), std::vector<float>(wanted.begin(), wanted.end())), kRounding);
  }
}

TEST_P(Rotation, BackAndForthGivesTheKeyAgain) {
  for (const double position : {1.0, 100.0, 32767.0, 131072.0, 1e6}) {
    EXPECT_LT(distance(turned(turned(key, rope, -position), rope, position), key), kRounding) << position;
  }
}

TEST_P(Rotation, TwoTurnsAreOneTurnByTheSum) {
  for (const double a : {3.0, 5000.0, 999999.0}) {
    for (const double b : {-2.0, 40.0, -999999.0}) {
      EXPECT_LT(distance(turned(turned(key, rope, a), rope, b), turned(key, rope, a + b)), kRounding) << a << " " << b;
    }
  }
}

TEST_P(Rotation, AQuerySeesOnlyTheDifferenceOfPositions) {
  const double wanted = dot(turned(query, rope, 30.0), key);
  for (const double shift : {1.0, 777.0, 1e6}) {
    EXPECT_NEAR(dot(turned(query, rope, 30.0 + shift), turned(key, rope, shift)), wanted, 2e-5) << shift;
  }
  EXPECT_GT(std::abs(dot(turned(query, rope, 31.0), key) - wanted), 1e-3);  // and it does see the difference
}

TEST_P(Rotation, KeepsLengthsAndTheChannelsThatAreNotRotated) {
  const auto out = turned(key, rope, 12345.0);
  EXPECT_NEAR(dot(out, out), dot(key, key), 1e-5);
  const Index width = rope.rotary_dim == 0 ? kWidth : rope.rotary_dim;
  EXPECT_TRUE(std::equal(out.begin() + width, out.end(), key.begin() + width));
  EXPECT_FALSE(std::equal(out.begin(), out.begin() + width, key.begin()));
}

TEST_P(Rotation, ByNothingChangesNoBit) { EXPECT_EQ(turned(key, rope, 0.0), key); }

INSTANTIATE_TEST_SUITE_P(
    Conventions, Rotation,
    testing::Values(
        Convention{"HalfSplit", {.kind = RopeKind::half_split}}, Convention{"Adjacent", {.kind = RopeKind::adjacent}},
        Convention{"HalfSplitPartialLargeBase", {.kind = RopeKind::half_split, .rotary_dim = 12, .theta = 5e5}},
        Convention{"AdjacentPartial", {.kind = RopeKind::adjacent, .rotary_dim = 8}},
        Convention{"HalfSplitTable", {.kind = RopeKind::half_split, .rotary_dim = 6, .inv_freq = kFrequencies}},
        Convention{"AdjacentTable", {.kind = RopeKind::adjacent, .rotary_dim = 6, .inv_freq = kFrequencies}}),
    [](const auto& c) { return c.param.name; });

TEST(Rope, ConventionsPairDifferentChannels) {
  const std::vector<float> key{1, 0, 0, 0};
  const auto half_split = turned(key, {.kind = RopeKind::half_split}, 1.0);
  EXPECT_NE(half_split[2], 0.f);
  EXPECT_EQ(half_split[1], 0.f);
  const auto adjacent = turned(key, {.kind = RopeKind::adjacent}, 1.0);
  EXPECT_NE(adjacent[1], 0.f);
  EXPECT_EQ(adjacent[2], 0.f);
}

TEST(Rope, KeysStoredWithoutRotationAreLeftAlone) {
  const std::vector<float> key{1, 2, 3, 4};
  EXPECT_EQ(turned(key, {.kind = RopeKind::none}, 5.0), key);
  EXPECT_EQ(turned(key, {.kind = RopeKind::pre_rope}, 5.0), key);
}

TEST(Rope, IsRefusedWhereItCannotBeUndone) {
  const auto code = [](const Rope& rope) { return detail::check_rope(rope, 8).code(); };
  EXPECT_EQ(code({.kind = RopeKind::unknown}), StatusCode::unsupported);
  EXPECT_EQ(code({.kind = RopeKind::half_split, .rotary_dim = 7}), StatusCode::invalid_argument);
  EXPECT_EQ(code({.kind = RopeKind::half_split, .rotary_dim = 10}), StatusCode::invalid_argument);
  EXPECT_EQ(code({.kind = RopeKind::adjacent, .rotary_dim = -2}), StatusCode::invalid_argument);
  EXPECT_EQ(code({.kind = RopeKind::adjacent, .theta = 0.0}), StatusCode::invalid_argument);
  EXPECT_EQ(code({.kind = RopeKind::adjacent, .theta = std::numeric_limits<double>::infinity()}),
            StatusCode::invalid_argument);
  EXPECT_EQ(code({.kind = RopeKind::adjacent, .inv_freq = kFrequencies}), StatusCode::size_mismatch);
  EXPECT_EQ(code({.kind = RopeKind::adjacent, .rotary_dim = 6, .inv_freq = kFrequencies}), StatusCode::ok);
  EXPECT_EQ(code({.kind = RopeKind::half_split}), StatusCode::ok);
}

}  // namespace
}  // namespace kvfold::test
