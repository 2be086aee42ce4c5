// Products of blocks of rows, against plain loops in double.
#include <kvfold/detail/panel_products.hpp>
#include <kvfold/storage/ragged_cache.hpp>

#include <cmath>
#include <cstddef>
#include <vector>

#include <gtest/gtest.h>

#include "builders.hpp"

namespace kvfold::test {
namespace {

constexpr float kUntouched = 77.f;

/// A product with gaps between the rows of every operand.
struct Product {
  Index m, n, k;
  Index a_stride = k + 3, b_stride = k + 5, c_stride = n + 7;
  std::vector<float> a, b;

  Product(Index m_, Index n_, Index k_) : m(m_), n(n_), k(k_) {
    Random random(static_cast<std::uint64_t>(m * 10007 + n * 101 + k));
    a = normals(m * a_stride, random);
    b = normals(n * b_stride, random);
  }

  [[nodiscard]] std::vector<float> run() const {
    std::vector<float> c(static_cast<std::size_t>(m * c_stride), kUntouched);
    detail::multiply_transposed(a.data(), a_stride, m, b.data(), b_stride, n, k, c.data(), c_stride);
    return c;
  }
  [[nodiscard]] float x(Index i, Index d) const { return a[static_cast<std::size_t>(i * a_stride + d)]; }
  [[nodiscard]] float y(Index j, Index d) const { return b[static_cast<std::size_t>(j * b_stride + d)]; }
};

class PanelProducts : public testing::TestWithParam<std::tuple<Index, Index, Index>> {};

TEST_P(PanelProducts, AreThoseOfEveryPairAndNothingElseIsWritten) {
  const auto [m, n, k] = GetParam();
  const Product product(m, n, k);
  const std::vector<float> c = product.run();
  for (Index i = 0; i < m; ++i) {
    for (Index j = 0; j < product.c_stride; ++j) {
      const float got = c[static_cast<std::size_t>(i * product.c_stride + j)];
      SCOPED_TRACE(testing::Message() << i << ", " << j);
      if (j >= n) {
        ASSERT_EQ(got, kUntouched);
        continue;
      }
      double sum = 0.0, magnitude = 0.0;
      for (Index d = 0; d < k; ++d) {
        const double term = static_cast<double>(product.x(i, d)) * static_cast<double>(product.y(j, d));
        sum += term;
        magnitude += std::abs(term);
      }
      ASSERT_LE(std::abs(static_cast<double>(got) - sum), 1e-6 * magnitude);
    }
  }
}

// Around the heights, widths and depths of panels on every target, and key dimensions of models.
INSTANTIATE_TEST_SUITE_P(Sizes, PanelProducts,
                         testing::Combine(testing::Values(1, 2, 3, 4, 5, 6, 7, 12, 64),
                                          testing::Values(1, 7, 8, 9, 16, 31, 32, 33, 128),
                                          testing::Values(1, 3, 4, 6, 64, 80, 256, 257, 576)));

TEST(PanelProductsBits, DoNotDependOnWhichOtherRowsThereAre) {
  const Product all(13, 37, 100);
  const std::vector<float> wanted = all.run();
  for (const Index i : {0, 5, 6, 12}) {
    for (const Index j : {0, 15, 16, 36}) {
      float alone = 0.f;
      detail::multiply_transposed(all.a.data() + i * all.a_stride, all.a_stride, 1, all.b.data() + j * all.b_stride,
                                  all.b_stride, 1, all.k, &alone, 1);
      EXPECT_EQ(alone, wanted[static_cast<std::size_t>(i * all.c_stride + j)]) << i << " " << j;
    }
  }
}

TEST(PanelProductsNumbers, ARowWithNanSpoilsItsOwnProductsOnly) {
  Product product(7, 20, 33);
  product.b[static_cast<std::size_t>(4 * product.b_stride + 7)] = std::nanf("");
  const std::vector<float> c = product.run();
  for (Index i = 0; i < product.m; ++i) {
    for (Index j = 0; j < product.n; ++j) {
      EXPECT_EQ(std::isnan(c[static_cast<std::size_t>(i * product.c_stride + j)]), j == 4) << i << " " << j;
    }
  }
}

template <class E>
class MultiplyKeys : public testing::Test {};
using KeyTypes = testing::Types<float, Float16, BFloat16, Float8E4M3, Int8, BlockQ8_0, BlockQ4_0>;
TYPED_TEST_SUITE(MultiplyKeys, KeyTypes);

TYPED_TEST(MultiplyKeys, MultipliesWhatTheViewReads) {
  constexpr LayerShape kShape{2, 1, 64, 32};
  constexpr Index kRows = 50, kFirst = 3, kCount = 41, kQueries = 7;
  const auto cache = make_cache<TypeParam>(kShape, kRows);
  Random random(8);
  const std::vector<float> queries = normals(kQueries * kShape.key_dim, random);
  std::vector<float> keys(kCount * kShape.key_dim), scratch(keys.size());
  cache.read_keys(1, kFirst, kCount, keys);
  std::vector<float> got(kQueries * kCount), wanted(got.size());
  detail::multiply_keys(queries.data(), kQueries, cache, 1, kFirst, kCount, scratch, got.data(), kCount);
  detail::multiply_transposed(queries.data(), kShape.key_dim, kQueries, keys.data(), kShape.key_dim, kCount,
                              kShape.key_dim, wanted.data(), kCount);
  EXPECT_EQ(got, wanted);
}

}  // namespace
}  // namespace kvfold::test
