// Products of a few rows, against plain loops in double.
#include <kvfold/detail/few_rows.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

#include <gtest/gtest.h>

#include "builders.hpp"
#include "rows_anywhere.hpp"

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
    detail::few_dots(a.data(), kStride, m, together(b, width), width, c.data(), kStride);
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
    detail::add_few(a.data(), kStride, m, together(b, width), width, c.data(), kStride);
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

TEST_P(FewRows, DotsAtPlacesAreThoseOfTheRowsThere) {
  constexpr Index kRows = 20;
  const auto x = normals(width, random), rows = normals(kRows * width, random);
  std::vector<RowId> places;
  for (Index i = 0; i < m; ++i) places.push_back(static_cast<RowId>((i * 7 + 3) % kRows));
  std::vector<float> got(at(m + 1), 77.f);
  detail::dots_at(x.data(), rows.data(), width, places.data(), m, got.data());
  for (Index i = 0; i < m; ++i) {
    double sum = 0.0, magnitude = 0.0;
    for (Index d = 0; d < width; ++d) {
      const double term = static_cast<double>(x[at(d)]) * static_cast<double>(rows[at(places[at(i)] * width + d)]);
      sum += term;
      magnitude += std::abs(term);
    }
    SCOPED_TRACE(i);
    expect_near(got[at(i)], sum, magnitude);
  }
  EXPECT_EQ(got.back(), 77.f);
}

INSTANTIATE_TEST_SUITE_P(Sizes, FewRows,
                         testing::Combine(testing::Values(1, 2, 3, 4, 5, 6, 7, 8, 11, 16),
                                          testing::Values(1, 3, 4, 7, 8, 15, 16, 17, 31, 32, 64, 80, 128, 144)));

/// Types that are converted in registers, against the same rows read as floats.
template <class E>
class FewStoredRows : public testing::Test {};
using LaneTypes = testing::Types<float, BFloat16, Float16, Float8E4M3, Int8>;
TYPED_TEST_SUITE(FewStoredRows, LaneTypes);

TYPED_TEST(FewStoredRows, AreMultipliedAsTheFloatsThatTheyMean) {
  if constexpr (!detail::kHasLanes<TypeParam>) {
    GTEST_SKIP() << "no instructions for this type on this target";
  } else {
    Random random(5);
    for (const Index width : {32, 64, 96, 128, 160, 20, 33}) {
      for (const Index n : {1, 7, 33}) {
        const auto numbers = normals(n * width, random), a = normals(4 * width, random), w = normals(4 * n, random);
        std::vector<TypeParam> stored(at(n * width));
        std::vector<float> floats(at(n * width));
        float scale = 1.f;  // of a row, for types that have one: it is not in the products
        for (Index i = 0; i < n; ++i) {
          detail::write_row<TypeParam>(numbers.data() + i * width, width, stored.data() + i * width, 1,
                                       kRowScaled<TypeParam> ? &scale : nullptr);
        }
        detail::read_rows<TypeParam>(stored.data(), width, 1, n, width, nullptr, 0, floats.data());
        for (float& x : floats) x /= detail::kLaneFactor<TypeParam>;
        const Anywhere<TypeParam> anywhere(stored, width);
        for (const Index m : {1, 2, 3, 4}) {
          SCOPED_TRACE(testing::Message() << "width " << width << ", n " << n << ", m " << m);
          std::vector<float> got(at(m * n)), expected(at(m * n)), sums(at(m * width), 1.f), expected_sums = sums;
          detail::few_dots(a.data(), width, m, together(floats, width), width, expected.data(), n);
          detail::add_few(w.data(), n, m, together(floats, width), width, expected_sums.data(), width);
          detail::few_dots(a.data(), width, m, together(stored, width), width, got.data(), n);
          detail::add_few(w.data(), n, m, together(stored, width), width, sums.data(), width);
          EXPECT_EQ(got, expected);
          EXPECT_EQ(sums, expected_sums);
          std::fill(got.begin(), got.end(), 0.f);
          std::fill(sums.begin(), sums.end(), 1.f);
          detail::few_dots(a.data(), width, m, anywhere.rows(), width, got.data(), n);
          detail::add_few(w.data(), n, m, anywhere.rows(), width, sums.data(), width);
          EXPECT_EQ(got, expected);
          EXPECT_EQ(sums, expected_sums);
        }
      }
    }
  }
}

TEST(FewRowsNumbers, LanesOfFp8AreTheNumbersOfAllCodes) {
  if constexpr (!detail::kHasLanes<Float8E4M3>) {
    GTEST_SKIP() << "no instructions for this type on this target";
  } else {
    std::vector<Float8E4M3> codes(256);
    for (Index i = 0; i < 256; ++i) codes[at(i)].bits = static_cast<std::uint8_t>(i);
    for (Index i = 0; i < 256; i += detail::kLanes) {
      float lanes[detail::kLanes];
      detail::store_lanes(detail::load_lanes_of(codes.data() + i), lanes);
      for (Index l = 0; l < detail::kLanes; ++l) {
        const float wanted = to_float(codes[at(i + l)]);
        if (std::isnan(wanted)) {
          EXPECT_TRUE(std::isnan(lanes[l])) << i + l;
        } else {
          EXPECT_EQ(lanes[l] * detail::kLaneFactor<Float8E4M3>, wanted) << i + l;
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
  detail::few_dots(a.data(), width, m, together(b, width), width, c.data(), n);
  for (Index i = 0; i < m; ++i) {
    for (Index j = 0; j < n; ++j) EXPECT_EQ(std::isnan(c[at(i * n + j)]), j == 4) << i << " " << j;
  }
}

}  // namespace
}  // namespace kvfold::test
