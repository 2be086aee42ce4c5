// Products of a few rounded rows with rows in blocks, against plain loops in double.
#include <kvfold/detail/few_block_rows.hpp>

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include <gtest/gtest.h>

#include "builders.hpp"
#include "rows_anywhere.hpp"

namespace kvfold::test {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN(), kInfinity = std::numeric_limits<float>::infinity();

std::size_t at(Index i) { return static_cast<std::size_t>(i); }

template <class Block>
class FewBlockRows : public testing::Test {
 protected:
  void SetUp() override {
    if (!detail::kAreIntegers<Block>) GTEST_SKIP() << "no instructions for this on this target";
  }
};
using RoundedRows = FewBlockRows<BlockQ8_0>;
using Blocks = testing::Types<BlockQ8_0, BlockQ4_0>;
TYPED_TEST_SUITE(FewBlockRows, Blocks);

/// Rows in blocks and what they mean.
template <class Block>
struct StoredBlocks {
  std::vector<Block> blocks;
  std::vector<float> floats;

  StoredBlocks(Index rows, Index width, Random& random)
      : blocks(at(rows * width / kBlockSize)), floats(normals(rows * width, random)) {
    const Index units = width / kBlockSize;
    for (Index i = 0; i < rows; ++i) {
      detail::write_row<Block>(floats.data() + i * width, width, blocks.data() + i * units, 1, nullptr);
    }
    detail::read_rows<Block>(blocks.data(), units, 1, rows, width, nullptr, 0, floats.data());
  }
};

/// Memory of what T::take wants.
template <class T>
struct Taken {
  std::vector<std::byte> memory;
  T value;

  template <class... Sizes>
  explicit Taken(Sizes... sizes) {
    detail::Arena measuring;
    static_cast<void>(T::take(measuring, sizes...));
    memory.assign(measuring.required_bytes(), std::byte{0xff});  // NaNs, where something is read before it is written
    detail::Arena arena(memory);
    value = T::take(arena, sizes...);
  }
};

/// Rows of a rounded.
struct Rounded {
  Taken<detail::RoundedRows> taken;
  detail::RoundedRows rows;

  Rounded(const std::vector<float>& a, Index m, Index width) : taken(m, width) {
    if constexpr (detail::kAreIntegers<BlockQ8_0>) rows = taken.value.set(a.data(), m);
  }
  [[nodiscard]] double element(Index i) const {
    const auto value = static_cast<double>(rows.value[at(rows.place(i / rows.k, i % rows.k))]);
    return static_cast<double>(rows.unit[at(i / rows.k)]) * value;
  }
};

double magnitude(float x) { return std::abs(static_cast<double>(x)); }

double largest_of(const float* x, Index n) {
  double largest = 0.0;
  for (Index i = 0; i < n; ++i) largest = std::max(largest, magnitude(x[i]));
  return largest;
}

TEST_F(RoundedRows, AreWithinHalfAUnitOfWhichTheLargestOfTheRowHas32767) {
  constexpr Index kMost = 5, kWidth = 96;
  Random random(6);
  std::vector<float> a = normals(kMost * kWidth, random);
  for (Index d = 0; d < kWidth; ++d) {
    a[at(kWidth + d)] = 0.f;
    a[at(2 * kWidth + d)] *= 1e-20f;
  }
  for (const Index rows : {Index{1}, Index{2}, kMost}) {
    const Rounded rounded(a, rows, kWidth);
    for (Index i = 0; i < rows; ++i) {
      const double largest = largest_of(a.data() + i * kWidth, kWidth);
      for (Index e = i * kWidth; e < (i + 1) * kWidth; ++e) {
        EXPECT_LE(std::abs(rounded.element(e) - static_cast<double>(a[at(e)])), largest / 32767 / 2 + 1e-7 * largest)
            << rows << " rows, " << e;
      }
    }
  }
}

TEST_F(RoundedRows, AreZeroWhereTheirInverseWouldOverflowAndNanWhereTheyAreNotFinite) {
  std::vector<float> a(4 * kBlockSize, 1.f);
  a[at(2)] = kNan;
  a[at(kBlockSize + 2)] = -kInfinity;
  for (Index d = 2 * kBlockSize; d < 3 * kBlockSize; ++d) a[at(d)] = 1e-38f;
  const Rounded rounded(a, 4, kBlockSize);
  EXPECT_TRUE(std::isnan(rounded.element(0)));
  EXPECT_TRUE(std::isnan(rounded.element(kBlockSize)));
  EXPECT_EQ(rounded.element(2 * kBlockSize), 0.0);
  EXPECT_FLOAT_EQ(static_cast<float>(rounded.element(3 * kBlockSize)), 1.f);
}

TYPED_TEST(FewBlockRows, DotsAreThoseOfRoundedRowsAndNothingElseIsWritten) {
  if constexpr (detail::kAreIntegers<TypeParam>) {
    Random random(5);
    for (const Index width : {32, 64, 128, 160, 576}) {
      for (const Index n : {1, 7, 33, 67}) {
        const StoredBlocks<TypeParam> b(n, width, random);
        for (const Index m : {1, 2, 3, 4, 5, 7}) {
          const Rounded a(normals(m * width, random), m, width);
          const Index stride = n + 3;
          std::vector<float> got(at(m * stride), 77.f);
          detail::few_dots(a.rows, together(b.blocks, width / kBlockSize), got.data(), stride);
          std::vector<float> same(at(m * stride), 77.f);
          const Anywhere<TypeParam> anywhere(b.blocks, width / kBlockSize);
          detail::few_dots(a.rows, anywhere.rows(), same.data(), stride);
          ASSERT_EQ(same, got);
          for (Index i = 0; i < m; ++i) {
            for (Index j = 0; j < stride; ++j) {
              SCOPED_TRACE(testing::Message()
                           << "width " << width << ", n " << n << ", m " << m << ": " << i << " " << j);
              const float x = got[at(i * stride + j)];
              if (j >= n) {
                ASSERT_EQ(x, 77.f);
                continue;
              }
              double sum = 0.0, of_magnitudes = 0.0;
              for (Index d = 0; d < width; ++d) {
                const double product = a.element(i * width + d) * static_cast<double>(b.floats[at(j * width + d)]);
                sum += product;
                of_magnitudes += std::abs(product);
              }
              EXPECT_LE(std::abs(static_cast<double>(x) - sum), 1e-6 * of_magnitudes);
            }
          }
        }
      }
    }
  }
}

/// Blocks of the least elements that there are, of so many units.
template <class Block>
std::vector<Block> largest_blocks(Index n, float scale) {
  Block block;
  block.scale = from_float<Float16>(scale);
  if constexpr (std::same_as<Block, BlockQ8_0>) {
    block.values.fill(-128);
  } else {
    block.pairs.fill(0);  // of -8
  }
  return std::vector<Block>(at(n), block);
}
template <class Block>
constexpr float kMostOf = std::same_as<Block, BlockQ8_0> ? 128.f : 8.f;

TYPED_TEST(FewBlockRows, DotsOfTheLargestNumbersAreExact) {
  if constexpr (detail::kAreIntegers<TypeParam>) {
    for (const Index m : {1, 4}) {
      const Rounded a(std::vector<float>(at(m * 64), -32767.f), m, 64);  // a unit of 1
      std::vector<float> got(at(m));
      detail::few_dots(a.rows, together(largest_blocks<TypeParam>(2, 1.f), 2), got.data(), 1);
      for (const float x : got) EXPECT_EQ(x, 32767.f * kMostOf<TypeParam> * 64.f);
    }
  }
}

/// a * b is added to c, whose rows are `stride` apart; a's are k apart.
template <class Block>
std::vector<float> sums_of(const std::vector<float>& a, Index m, const std::vector<Block>& b, Index k, Index width,
                           Index stride, float before) {
  std::vector<float> c(at(m * stride), before);
  if constexpr (detail::kAreIntegers<Block>) {
    const Taken<detail::BlockSpace> space(width);
    detail::add_few(a.data(), k, m, together(b, width / kBlockSize), space.value, width, c.data(), stride);
    std::vector<float> same(at(m * stride), before);
    const Anywhere<Block> anywhere(b, width / kBlockSize);
    detail::add_few(a.data(), k, m, anywhere.rows(), space.value, width, same.data(), stride);
    EXPECT_EQ(std::memcmp(same.data(), c.data(), c.size() * sizeof(float)), 0);  // bits: there are NaNs
  }
  return c;
}

/// By how much a sum may be off: each factor by half a unit, of which the largest weight times the largest scale of 64 rows
/// has 32767.
template <class Block>
double error_bound(const float* weights, const StoredBlocks<Block>& b, Index k, Index width, Index column) {
  double bound = 0.0;
  for (Index first = 0; first < k; first += 64) {
    const Index count = std::min<Index>(64, k - first), units = width / kBlockSize;
    double largest_scale = 0.0, integers = 0.0;
    for (Index j = first; j < first + count; ++j) {
      const double scale = magnitude(to_float(b.blocks[at(j * units + column / kBlockSize)].scale));
      largest_scale = std::max(largest_scale, scale);
      if (scale > 0.0) integers += magnitude(b.floats[at(j * width + column)]) / scale;
    }
    bound += largest_of(weights + first, count) * largest_scale / 32767 * 0.501 * integers;
  }
  return bound;
}

TYPED_TEST(FewBlockRows, ProductsOfRoundedFactorsAreAddedToWhatIsThereAndNothingElseIsWritten) {
  Random random(7);
  for (const Index width : {32, 64, 96, 160, 288}) {
    for (const Index k : {1, 7, 32, 64, 65, 200}) {
      const StoredBlocks<TypeParam> b(k, width, random);
      for (const Index m : {1, 2, 3, 4, 5, 7}) {
        const std::vector<float> a = normals(m * k, random);
        const Index stride = width + 3;
        const std::vector<float> c = sums_of(a, m, b.blocks, k, width, stride, 0.5f);
        for (Index i = 0; i < m; ++i) {
          for (Index x = 0; x < stride; ++x) {
            SCOPED_TRACE(testing::Message()
                         << "width " << width << ", k " << k << ", m " << m << ": " << i << " " << x);
            const float got = c[at(i * stride + x)];
            if (x >= width) {
              ASSERT_EQ(got, 0.5f);
              continue;
            }
            double sum = 0.5, of_magnitudes = 0.5;
            for (Index j = 0; j < k; ++j) {
              const double product =
                  static_cast<double>(a[at(i * k + j)]) * static_cast<double>(b.floats[at(j * width + x)]);
              sum += product;
              of_magnitudes += std::abs(product);
            }
            const double bound = error_bound(a.data() + i * k, b, k, width, x);
            EXPECT_LE(std::abs(static_cast<double>(got) - sum), bound + 1e-6 * of_magnitudes);
          }
        }
      }
    }
  }
}

TYPED_TEST(FewBlockRows, ProductsOfTheLargestNumbersAreExact) {
  constexpr Index kRows = 64;
  const auto b = largest_blocks<TypeParam>(kRows, -1.f);
  const std::vector<float> c = sums_of(std::vector<float>(kRows, 32767.f), 1, b, kRows, kBlockSize, kBlockSize, 0.f);
  for (const float x : c) EXPECT_EQ(x, 32767.f * kMostOf<TypeParam> * kRows);
}

TYPED_TEST(FewBlockRows, WeightsThatAreNotFiniteSpoilTheirOwnRowAndScalesTheirOwnBlock) {
  constexpr Index kRows = 70, kWidth = 3 * kBlockSize, m = 3;
  Random random(8);
  for (const float bad : {kNan, kInfinity, -kInfinity}) {
    StoredBlocks<TypeParam> b(kRows, kWidth, random);
    std::vector<float> a = normals(m * kRows, random);
    a[at(kRows + 5)] = bad;
    b.blocks[at(66 * 3 + 2)].scale = from_float<Float16>(bad);  // the last columns of a row
    const std::vector<float> c = sums_of(a, m, b.blocks, kRows, kWidth, kWidth, 0.f);
    for (Index i = 0; i < m; ++i) {
      for (Index x = 0; x < kWidth; ++x) {
        EXPECT_EQ(std::isnan(c[at(i * kWidth + x)]), i == 1 || x >= 2 * kBlockSize) << bad << " " << i << " " << x;
      }
    }
  }
}

TYPED_TEST(FewBlockRows, WeightsWhoseInverseWouldOverflowCountAsZero) {
  Random random(9);
  const StoredBlocks<TypeParam> b(3, kBlockSize, random);
  EXPECT_EQ(sums_of({1e-38f, 0.f, 1e-31f}, 1, b.blocks, 3, kBlockSize, kBlockSize, 0.25f),
            std::vector<float>(32, 0.25f));
}

TYPED_TEST(FewBlockRows, BitsDoNotDependOnHowProductsAreAdded) {
  if constexpr (detail::kAddingIsAsked) {
    if (!detail::has_avx_vnni()) GTEST_SKIP() << "there is only one way on this processor";
    constexpr Index kRows = 67, kWidth = 96;
    Random random(10);
    const StoredBlocks<TypeParam> b(kRows, kWidth, random);
    const auto rows = together(b.blocks, kWidth / kBlockSize);
    const Taken<detail::BlockSpace> space(kWidth);
    for (const Index m : {1, 2, 3, 4, 5}) {
      const std::vector<float> a = normals(m * kWidth, random), weights = normals(m * kRows, random);
      const Rounded rounded(a, m, kWidth);
      const auto products = [&](auto adding) {
        std::vector<float> dots(at(m * kRows)), sums(at(m * kWidth));
        detail::few_dots<adding()>(rounded.rows, rows, dots.data(), kRows);
        detail::add_few<adding()>(weights.data(), kRows, m, rows, space.value, kWidth, sums.data(), kWidth);
        dots.insert(dots.end(), sums.begin(), sums.end());
        return dots;
      };
      using detail::Adding;
      EXPECT_EQ(products(std::integral_constant<Adding, Adding::kAsCompiled>{}),
                products(std::integral_constant<Adding, Adding::kWithAvxVnni>{}))
          << m;
    }
  } else {
    GTEST_SKIP() << "there is only one way on this target";
  }
}

}  // namespace
}  // namespace kvfold::test
