// EigenView: heads that are Eigen matrices, or blocks of larger ones.
#include <kvfold/compressor.hpp>
#include <kvfold/view/eigen_map.hpp>

#include <bit>
#include <cstdint>
#include <vector>

#include <gtest/gtest.h>

namespace kvfold {
namespace {

constexpr Index kHeads = 2, kRows = 20, kKeyDim = 6, kValueDim = 4;

using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

std::size_t at(Index i) { return static_cast<std::size_t>(i); }

/// Keys and values of all heads side by side in one matrix [T][H * D | H * E], as some engines project them.
struct FusedCache {
  Matrix all = Matrix::Random(kRows, kHeads*(kKeyDim + kValueDim));
  std::vector<RowsMap> keys, values;
  std::vector<Index> rows = std::vector<Index>(kHeads, kRows);
  std::vector<Position> positions;

  FusedCache() {
    for (Index h = 0; h < kHeads; ++h) {
      keys.push_back(block(h * kKeyDim, kKeyDim));
      values.push_back(block(kHeads * kKeyDim + h * kValueDim, kValueDim));
    }
  }
  FusedCache(const FusedCache&) = delete;
  FusedCache& operator=(const FusedCache&) = delete;

  RowsMap block(Index column, Index width) {
    return RowsMap(all.data() + column, kRows, width, Eigen::OuterStride<>(all.cols()));
  }
  EigenView view() { return {.group_size = 2, .keys = keys, .values = values, .rows = rows, .positions = positions}; }
};

/// Each head in matrices of its own.
struct SplitCache {
  std::vector<Matrix> key_matrices, value_matrices;
  std::vector<RowsMap> keys, values;
  std::vector<Index> rows = std::vector<Index>(kHeads, kRows);

  SplitCache() {
    for (Index h = 0; h < kHeads; ++h) {
      key_matrices.push_back(Matrix::Random(kRows, kKeyDim));
      value_matrices.push_back(Matrix::Random(kRows, kValueDim));
    }
    for (Index h = 0; h < kHeads; ++h) {
      keys.push_back(map(key_matrices[at(h)]));
      values.push_back(map(value_matrices[at(h)]));
    }
  }
  static RowsMap map(Matrix& m) { return RowsMap(m.data(), m.rows(), m.cols(), Eigen::OuterStride<>(m.cols())); }
  EigenView view() { return {.group_size = 2, .keys = keys, .values = values, .rows = rows}; }
};

TEST(EigenViewTest, ModelsTheContractWithoutLogMasses) {
  static_assert(MutableKVCacheView<EigenView> && HasContiguousRows<EigenView>);
  static_assert(!HasLogMass<EigenView>);
  SplitCache cache;
  EXPECT_EQ(cache.view().shape(), (LayerShape{kHeads, 2, kKeyDim, kValueDim}));
  EXPECT_FALSE(can_store_log_mass(cache.view()));
  EXPECT_EQ(row_bytes_of(cache.view(), 0), (kKeyDim + kValueDim) * 4);
}

TEST(EigenViewTest, ReadsWholeMatricesInPlace) {
  SplitCache cache;
  const EigenView view = cache.view();
  ASSERT_NE(view.key_rows(1, 3, 5), nullptr);
  EXPECT_EQ(view.key_rows(1, 3, 5)[kKeyDim + 2], cache.key_matrices[1](4, 2));
  EXPECT_EQ(view.value_rows(1, 3, 5)[kValueDim + 2], cache.value_matrices[1](4, 2));
}

TEST(EigenViewTest, GivesRowsOfWholeMatricesAndOfBlocksAsTheyAreStored) {
  SplitCache split;
  const auto whole = split.view().stored_keys(1, 3, 5);
  EXPECT_EQ(whole.count, 5);
  EXPECT_EQ(whole.data[whole.stride + 2], split.key_matrices[1](4, 2));
  FusedCache fused;
  const auto block = fused.view().stored_values(1, 3, 5);
  EXPECT_EQ(block.count, 5);
  EXPECT_EQ(block.data[block.stride + 2], fused.all(4, kHeads * kKeyDim + kValueDim + 2));
}

TEST(EigenViewTest, ReadsBlocksOfLargerMatricesByCopy) {
  FusedCache cache;
  const EigenView view = cache.view();
  EXPECT_EQ(view.key_rows(1, 3, 5), nullptr);
  EXPECT_EQ(view.value_rows(1, 3, 5), nullptr);
  std::vector<float> keys(5 * kKeyDim + 1, 7.f), values(5 * kValueDim + 1, 7.f);
  view.read_keys(1, 3, 5, keys);
  view.read_values(1, 3, 5, values);
  for (Index i = 0; i < 5; ++i) {
    for (Index d = 0; d < kKeyDim; ++d) ASSERT_EQ(keys[at(i * kKeyDim + d)], cache.all(3 + i, kKeyDim + d));
    for (Index d = 0; d < kValueDim; ++d) {
      ASSERT_EQ(values[at(i * kValueDim + d)], cache.all(3 + i, kHeads * kKeyDim + kValueDim + d));
    }
  }
  EXPECT_EQ(keys.back(), 7.f);
  EXPECT_EQ(values.back(), 7.f);
}

TEST(EigenViewTest, WritesOneRowOfABlockAndNothingElse) {
  FusedCache cache;
  Matrix expected = cache.all;
  const std::vector<float> key{1, 2, 3, 4, 5, 6}, value{7, 8, 9, 10};
  for (Index d = 0; d < kKeyDim; ++d) expected(4, kKeyDim + d) = key[at(d)];
  for (Index d = 0; d < kValueDim; ++d) expected(5, kHeads * kKeyDim + d) = value[at(d)];
  EigenView view = cache.view();
  view.write_key(1, 4, key);
  view.write_value(0, 5, value);
  EXPECT_EQ(cache.all, expected);
}

TEST(EigenViewTest, MoveRowCopiesBitsAndNothingElse) {
  FusedCache cache;
  cache.all(9, 1) = std::bit_cast<float>(0x7fc12345u);
  const Matrix before = cache.all;
  EigenView view = cache.view();
  view.move_row(0, 9, 2);
  for (Index t = 0; t < kRows; ++t) {
    for (Index c = 0; c < before.cols(); ++c) {
      const bool of_head_0 = c < kKeyDim || (c >= kHeads * kKeyDim && c < kHeads * kKeyDim + kValueDim);
      const float expected = before(t == 2 && of_head_0 ? 9 : t, c);
      ASSERT_EQ(std::bit_cast<std::uint32_t>(cache.all(t, c)), std::bit_cast<std::uint32_t>(expected)) << t << " " << c;
    }
  }
}

TEST(EigenViewTest, PositionsCountFromZeroOrAreSharedOrMoveWithTheirHead) {
  FusedCache cache;
  EXPECT_EQ(cache.view().position(1, 7), 7);
  cache.positions.resize(kHeads * kRows);
  for (Index i = 0; i < kHeads * kRows; ++i) cache.positions[at(i)] = 5 * i;
  EigenView shared = cache.view();
  EXPECT_EQ(shared.position(1, 7), 35);
  shared.move_row(1, 9, 7);
  EXPECT_EQ(shared.position(1, 7), 35);
  EigenView own = cache.view();
  own.position_stride = kRows;
  EXPECT_EQ(own.position(1, 7), 5 * (kRows + 7));
  own.move_row(1, 9, 7);
  EXPECT_EQ(own.position(1, 7), 5 * (kRows + 9));
  EXPECT_EQ(own.position(0, 7), 35);
}

TEST(EigenViewTest, ResizeChangesTheCountOfOneHeadAndNoMatrix) {
  SplitCache cache;
  cache.view().resize(1, 3);
  EXPECT_EQ(cache.rows, (std::vector<Index>{kRows, 3}));
  EXPECT_EQ(cache.key_matrices[1].rows(), kRows);
}

TEST(EigenViewTest, HeadsThatDoNotFitTogetherAreRefused) {
  const auto refused = [](const EigenView& view) {
    StreamingLlm method;
    const Status status = method.workspace_bytes(view, NoEvidence{}, 1).status();
    return status.code() == StatusCode::invalid_argument && status.argument() == "view";
  };
  SplitCache cache;
  EXPECT_FALSE(refused(cache.view()));
  EigenView fewer_values = cache.view();
  fewer_values.values = fewer_values.values.first(1);
  EXPECT_TRUE(refused(fewer_values));
  EigenView fewer_counts = cache.view();
  fewer_counts.rows = fewer_counts.rows.first(1);
  EXPECT_TRUE(refused(fewer_counts));
  EXPECT_TRUE(refused(EigenView{}));

  Matrix wider = Matrix::Random(kRows, kKeyDim + 1);
  std::vector<RowsMap> keys{cache.keys[0], SplitCache::map(wider)};
  EigenView other_width = cache.view();
  other_width.keys = keys;
  EXPECT_TRUE(refused(other_width)) << "all heads have keys of one width";
}

}  // namespace
}  // namespace kvfold
