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

/// n rows times m rows of panels, with gaps between the rows of each.
struct Product {
  Index n, m, k;
  Index a_stride = k + 3, b_stride = k + 5, c_stride = detail::panel_columns(m) + 7;
  std::vector<float> a, b;

  Product(Index n_, Index m_, Index k_) : n(n_), m(m_), k(k_) {
    Random random(static_cast<std::uint64_t>(n * 10007 + m * 101 + k));
    a = normals(n * a_stride, random);
    b = normals(m * b_stride, random);
  }

  [[nodiscard]] std::vector<float> run() const {
    std::vector<float> panels(static_cast<std::size_t>(detail::panel_rows(m) * k), kUntouched);
    detail::make_panels(b.data(), b_stride, m, k, panels.data());
    std::vector<float> c(static_cast<std::size_t>(n * c_stride), kUntouched);
    detail::multiply_panels(a.data(), a_stride, n, panels.data(), m, k, c.data(), c_stride);
    return c;
  }
  [[nodiscard]] float x(Index i, Index d) const { return a[static_cast<std::size_t>(i * a_stride + d)]; }
  [[nodiscard]] float y(Index j, Index d) const { return b[static_cast<std::size_t>(j * b_stride + d)]; }
};

class PanelProducts : public testing::TestWithParam<std::tuple<Index, Index, Index>> {};

TEST_P(PanelProducts, AreThoseOfEveryPairAndNothingButWholeLanesIsWritten) {
  const auto [n, m, k] = GetParam();
  const Product product(n, m, k);
  const std::vector<float> c = product.run();
  for (Index i = 0; i < n; ++i) {
    for (Index j = 0; j < product.c_stride; ++j) {
      const float got = c[static_cast<std::size_t>(i * product.c_stride + j)];
      SCOPED_TRACE(testing::Message() << i << ", " << j);
      if (j >= m) {
        ASSERT_EQ(got, j < detail::panel_columns(m) ? 0.f : kUntouched);  // panels end with rows of 0
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
      Product alone(1, 1, 100);
      alone.a.assign(all.a.begin() + i * all.a_stride, all.a.begin() + (i + 1) * all.a_stride);
      alone.b.assign(all.b.begin() + j * all.b_stride, all.b.begin() + (j + 1) * all.b_stride);
      EXPECT_EQ(alone.run()[0], wanted[static_cast<std::size_t>(i * all.c_stride + j)]) << i << " " << j;
    }
  }
}

TEST(PanelProductsNumbers, ARowWithNanSpoilsItsOwnProductsOnly) {
  Product product(7, 20, 33);
  product.b[static_cast<std::size_t>(4 * product.b_stride + 7)] = std::nanf("");
  const std::vector<float> c = product.run();
  for (Index i = 0; i < product.n; ++i) {
    for (Index j = 0; j < product.m; ++j) {
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
  constexpr Index kRows = 50, kFirst = 3, kCount = 41, kQueries = 7, kStride = detail::panel_columns(kQueries);
  const auto cache = make_cache<TypeParam>(kShape, kRows);
  Random random(8);
  const std::vector<float> queries = normals(kQueries * kShape.key_dim, random);
  std::vector<float> keys(kCount * kShape.key_dim), scratch(detail::kPanelKeys * kShape.key_dim);
  std::vector<float> panels(static_cast<std::size_t>(detail::panel_rows(kQueries) * kShape.key_dim));
  cache.read_keys(1, kFirst, kCount, keys);
  detail::make_panels(queries.data(), kShape.key_dim, kQueries, kShape.key_dim, panels.data());
  std::vector<float> got(kCount * kStride), wanted(got.size());
  detail::multiply_panels(keys.data(), kShape.key_dim, kCount, panels.data(), kQueries, kShape.key_dim, wanted.data(),
                          kStride);
  detail::multiply_keys(cache, 1, kFirst, kCount, panels.data(), kQueries, scratch, got.data(), kStride);
  EXPECT_EQ(got, wanted);
}

class WeightedRows : public testing::TestWithParam<std::tuple<Index, Index, Index>> {};

TEST_P(WeightedRows, AreAddedToWhatIsThereAndNothingElseIsWritten) {
  const auto [m, n, width] = GetParam();
  const Index weight_stride = m + 3, c_stride = width + 5;
  const auto at = [](Index i) { return static_cast<std::size_t>(i); };
  Random random(static_cast<std::uint64_t>(m * 10007 + n * 101 + width));
  const std::vector<float> weights = normals(n * weight_stride, random), rows = normals(n * width, random);
  std::vector<float> c(at(m * c_stride), 0.5f);
  detail::add_weighted_rows(weights.data(), weight_stride, m, rows.data(), n, width, c.data(), c_stride);
  for (Index i = 0; i < m; ++i) {
    for (Index x = 0; x < c_stride; ++x) {
      double sum = 0.5, magnitude = 0.5;
      for (Index j = 0; j < n && x < width; ++j) {
        const double term =
            static_cast<double>(weights[at(j * weight_stride + i)]) * static_cast<double>(rows[at(j * width + x)]);
        sum += term;
        magnitude += std::abs(term);
      }
      ASSERT_LE(std::abs(static_cast<double>(c[at(i * c_stride + x)]) - sum), 1e-6 * magnitude) << i << " " << x;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Sizes, WeightedRows,
                         testing::Combine(testing::Values(1, 5, 6, 7, 17, 64), testing::Values(1, 2, 95, 96),
                                          testing::Values(1, 3, 8, 16, 20, 64, 80, 129)));

}  // namespace
}  // namespace kvfold::test
