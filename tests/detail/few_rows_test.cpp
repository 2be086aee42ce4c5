// Products of a few rows, against plain loops in double.
#include <kvfold/detail/few_rows.hpp>

#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

#include <gtest/gtest.h>

#include "builders.hpp"

namespace kvfold::test {
namespace {

std::size_t at(Index i) { return static_cast<std::size_t>(i); }

/// Rows m, and the width that both operands share or give to the result.
class FewRows : public testing::TestWithParam<std::tuple<Index, Index>> {
 protected:
  static constexpr Index kStride = 150;

  Index m = std::get<0>(GetParam()), width = std::get<1>(GetParam());
  Random random{3};
};

/// Within rounding of the sum of the products' magnitudes.
void expect_near(float got, double wanted, double magnitude) {
  EXPECT_LE(std::abs(static_cast<double>(got) - wanted), 1e-6 * magnitude);
}

TEST_P(FewRows, DotsAreThoseOfEveryPairAndNothingElseIsWritten) {
  for (const Index n : {1, 2, 3, 5, 15, 16, 17, 40}) {
    const auto a = normals(m * kStride, random), b = normals(n * width, random);
    std::vector<float> c(at(m * kStride), 77.f);
    detail::few_dots(a.data(), kStride, m, b.data(), n, width, c.data(), kStride);
    for (Index i = 0; i < m; ++i) {
      for (Index j = 0; j < n; ++j) {
        double sum = 0.0, magnitude = 0.0;
        for (Index d = 0; d < width; ++d) {
          const double product =
              static_cast<double>(a[at(i * kStride + d)]) * static_cast<double>(b[at(j * width + d)]);
          sum += product;
          magnitude += std::abs(product);
        }
        SCOPED_TRACE(testing::Message() << "n " << n << ", row " << i << ", column " << j);
        expect_near(c[at(i * kStride + j)], sum, magnitude);
      }
      for (Index j = n; j < kStride; ++j) ASSERT_EQ(c[at(i * kStride + j)], 77.f) << n << " " << i << " " << j;
    }
  }
}

TEST_P(FewRows, ProductsAreAddedToWhatIsThereAndNothingElseIsWritten) {
  for (const Index k : {1, 2, 16, 37}) {
    const auto a = normals(m * kStride, random), b = normals(k * width, random);
    std::vector<float> c(at(m * kStride), 0.5f);
    detail::add_few(a.data(), kStride, m, b.data(), k, width, c.data(), kStride);
    for (Index i = 0; i < m; ++i) {
      for (Index x = 0; x < width; ++x) {
        double sum = 0.5, magnitude = 0.5;
        for (Index j = 0; j < k; ++j) {
          const double product =
              static_cast<double>(a[at(i * kStride + j)]) * static_cast<double>(b[at(j * width + x)]);
          sum += product;
          magnitude += std::abs(product);
        }
        SCOPED_TRACE(testing::Message() << "k " << k << ", row " << i << ", column " << x);
        expect_near(c[at(i * kStride + x)], sum, magnitude);
      }
      for (Index x = width; x < kStride; ++x) ASSERT_EQ(c[at(i * kStride + x)], 0.5f) << k << " " << i << " " << x;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Sizes, FewRows,
                         testing::Combine(testing::Values(1, 2, 3, 4, 5, 6, 7, 8, 11, 16),
                                          testing::Values(1, 3, 4, 7, 8, 15, 16, 17, 31, 32, 64, 80, 128, 144)));

/// Types that are converted in registers, against the same rows read as floats.
template <class E>
class FewStoredRows : public testing::Test {};
using LaneTypes = testing::Types<float, BFloat16, Float16>;
TYPED_TEST_SUITE(FewStoredRows, LaneTypes);

TYPED_TEST(FewStoredRows, AreMultipliedAsTheFloatsThatTheyMean) {
  if constexpr (!detail::kHasLanes<TypeParam>) {
    GTEST_SKIP() << "no instructions for this type on this target";
  } else {
    Random random(5);
    for (const Index width : {32, 64, 96, 128, 160, 20, 33}) {
      for (const Index n : {1, 7, 33}) {
        const Index units = width;
        const auto numbers = normals(n * width, random), a = normals(4 * width, random), w = normals(4 * n, random);
        std::vector<TypeParam> stored(at(n * units));
        std::vector<float> floats(at(n * width));
        for (Index i = 0; i < n; ++i) {
          detail::write_row<TypeParam>(numbers.data() + i * width, width, stored.data() + i * units, 1, nullptr);
        }
        detail::read_rows<TypeParam>(stored.data(), units, 1, n, width, nullptr, 0, floats.data());
        for (const Index m : {1, 2, 3, 4}) {
          SCOPED_TRACE(testing::Message() << "width " << width << ", n " << n << ", m " << m);
          std::vector<float> got(at(m * n)), expected(at(m * n)), sums(at(m * width), 1.f), expected_sums = sums;
          detail::few_dots(a.data(), width, m, stored.data(), n, width, got.data(), n);
          detail::few_dots(a.data(), width, m, floats.data(), n, width, expected.data(), n);
          EXPECT_EQ(got, expected);
          detail::add_few(w.data(), n, m, stored.data(), n, width, sums.data(), width);
          detail::add_few(w.data(), n, m, floats.data(), n, width, expected_sums.data(), width);
          EXPECT_EQ(sums, expected_sums);
        }
      }
    }
  }
}

/// Rows in q8_0 and what they mean.
struct StoredBlocks {
  std::vector<BlockQ8_0> blocks;
  std::vector<float> floats;

  StoredBlocks(Index rows, Index width, Random& random)
      : blocks(at(rows * width / kBlockSize)), floats(normals(rows * width, random)) {
    const Index units = width / kBlockSize;
    for (Index i = 0; i < rows; ++i) {
      detail::write_row<BlockQ8_0>(floats.data() + i * width, width, blocks.data() + i * units, 1, nullptr);
    }
    detail::read_rows<BlockQ8_0>(blocks.data(), units, 1, rows, width, nullptr, 0, floats.data());
  }
};

/// Rows of a rounded for products with bytes, in memory of their own.
struct Rounded {
  std::vector<std::byte> memory;
  detail::RoundedRows rows;

  Rounded(const std::vector<float>& a, Index m, Index width) {
    detail::Arena measuring;
    static_cast<void>(detail::RoundedRows::take(measuring, m, width));
    memory.resize(measuring.required_bytes());
    detail::Arena arena(memory);
    rows = detail::RoundedRows::take(arena, m, width);
    for (Index i = 0; i < m; ++i) rows.set(i, a.data() + i * width, width);
  }
  [[nodiscard]] double element(Index i) const {
    return static_cast<double>(rows.unit[at(i / kBlockSize)]) * static_cast<double>(rows.value[at(i)]);
  }
};

TEST(RoundedRows, AreWithinHalfAUnitOfWhichTheLargestOf32Has32767) {
  constexpr Index kRows = 3, kWidth = 96;
  Random random(6);
  std::vector<float> a = normals(kRows * kWidth, random);
  for (Index d = 32; d < 64; ++d) a[at(d)] = 0.f;
  for (Index d = 64; d < 96; ++d) a[at(d)] *= 1e-20f;
  const Rounded rounded(a, kRows, kWidth);
  for (Index d = 0; d < kRows * kWidth; d += kBlockSize) {
    double largest = 0.0;
    for (Index e = d; e < d + kBlockSize; ++e) largest = std::max(largest, std::abs(static_cast<double>(a[at(e)])));
    for (Index e = d; e < d + kBlockSize; ++e) {
      const double half = largest / 32767 / 2;
      EXPECT_LE(std::abs(rounded.element(e) - static_cast<double>(a[at(e)])), half + 1e-7 * largest) << e;
    }
  }
}

TEST(RoundedRows, AreZeroWhereTheirInverseWouldOverflowAndNanWhereTheyAreNotFinite) {
  std::vector<float> a(4 * kBlockSize, 1.f);
  a[at(2)] = std::numeric_limits<float>::quiet_NaN();
  a[at(kBlockSize + 2)] = -std::numeric_limits<float>::infinity();
  for (Index d = 2 * kBlockSize; d < 3 * kBlockSize; ++d) a[at(d)] = 1e-38f;
  const Rounded rounded(a, 1, 4 * kBlockSize);
  EXPECT_TRUE(std::isnan(rounded.element(0)));
  EXPECT_TRUE(std::isnan(rounded.element(kBlockSize)));
  EXPECT_EQ(rounded.element(2 * kBlockSize), 0.0);
  EXPECT_FLOAT_EQ(static_cast<float>(rounded.element(3 * kBlockSize)), 1.f);
}

TEST(FewRowsOfBytes, DotsAreThoseOfRoundedRowsAndNothingElseIsWritten) {
  if constexpr (!detail::kHasLanes<BlockQ8_0>) {
    GTEST_SKIP() << "no instructions for this type on this target";
  } else {
    Random random(5);
    for (const Index width : {32, 64, 128, 160, 576}) {
      for (const Index n : {1, 7, 33}) {
        StoredBlocks b(n, width, random);
        for (const Index m : {1, 2, 3, 4, 5, 7}) {
          const Rounded a(normals(m * width, random), m, width);
          const Index stride = n + 3;
          std::vector<float> got(at(m * stride), 77.f);
          detail::few_dots(a.rows, m, b.blocks.data(), n, width, got.data(), stride);
          for (Index i = 0; i < m; ++i) {
            for (Index j = 0; j < stride; ++j) {
              SCOPED_TRACE(testing::Message()
                           << "width " << width << ", n " << n << ", m " << m << ": " << i << " " << j);
              const float x = got[at(i * stride + j)];
              if (j >= n) {
                ASSERT_EQ(x, 77.f);
                continue;
              }
              double sum = 0.0, magnitude = 0.0;
              for (Index d = 0; d < width; ++d) {
                const double product = a.element(i * width + d) * static_cast<double>(b.floats[at(j * width + d)]);
                sum += product;
                magnitude += std::abs(product);
              }
              expect_near(x, sum, magnitude);
            }
          }
        }
      }
    }
  }
}

TEST(FewRowsOfBytes, DotsOfTheLargestNumbersAreExact) {
  if constexpr (!detail::kHasLanes<BlockQ8_0>) {
    GTEST_SKIP() << "no instructions for this type on this target";
  } else {
    const Rounded a(std::vector<float>(64, -32767.f), 1, 64);  // a unit of 1
    std::vector<BlockQ8_0> b(2);
    for (BlockQ8_0& block : b) {
      block.scale = from_float<Float16>(1.f);
      block.values.fill(-128);
    }
    float got = 0.f;
    detail::few_dots(a.rows, 1, b.data(), 1, 64, &got, 1);
    EXPECT_EQ(got, 32767.f * 128.f * 64.f);
  }
}

TEST(FewRowsOfBytes, ProductsAreAddedToWhatIsThere) {
  if constexpr (!detail::kHasLanes<BlockQ8_0>) {
    GTEST_SKIP() << "no instructions for this type on this target";
  } else {
    Random random(7);
    for (const Index width : {32, 64, 96, 128, 160}) {
      for (const Index k : {1, 7, 33}) {
        const StoredBlocks b(k, width, random);
        for (const Index m : {1, 2, 3, 4, 5}) {
          const std::vector<float> a = normals(m * k, random);
          std::vector<float> c(at(m * width), 0.5f);
          detail::add_few(a.data(), k, m, b.blocks.data(), k, width, c.data(), width);
          for (Index i = 0; i < m; ++i) {
            for (Index x = 0; x < width; ++x) {
              double sum = 0.5, magnitude = 0.5;
              for (Index j = 0; j < k; ++j) {
                const double product =
                    static_cast<double>(a[at(i * k + j)]) * static_cast<double>(b.floats[at(j * width + x)]);
                sum += product;
                magnitude += std::abs(product);
              }
              SCOPED_TRACE(testing::Message()
                           << "width " << width << ", k " << k << ", m " << m << ": " << i << " " << x);
              expect_near(c[at(i * width + x)], sum, magnitude);
            }
          }
        }
      }
    }
  }
}

TEST(FewRowsNumbers, ARowWithNanSpoilsItsOwnProductsOnly) {
  constexpr Index m = 3, n = 9, width = 20;
  Random random(4);
  const auto a = normals(m * width, random);
  auto b = normals(n * width, random);
  b[4 * width + 7] = std::numeric_limits<float>::quiet_NaN();
  std::vector<float> c(m * n);
  detail::few_dots(a.data(), width, m, b.data(), n, width, c.data(), n);
  for (Index i = 0; i < m; ++i) {
    for (Index j = 0; j < n; ++j) EXPECT_EQ(std::isnan(c[at(i * n + j)]), j == 4) << i << " " << j;
  }
}

}  // namespace
}  // namespace kvfold::test
