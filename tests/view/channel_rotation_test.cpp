// Caches whose channels were turned by a Hadamard matrix are compressed as plain ones are.
#include <kvfold/attend.hpp>
#include <kvfold/compressor.hpp>
#include <kvfold/view/channel_rotation.hpp>
#include <kvfold/view/strided.hpp>

#include <bit>
#include <cmath>
#include <vector>

#include <gtest/gtest.h>

#include "attend_oracle.hpp"
#include "builders.hpp"
#include "merge_oracle.hpp"

namespace kvfold::test {
namespace {

// --- The transform ---------------------------------------------------------------------------------------------

/// Entry (i, j) of the normalised Hadamard matrix: its sign is the parity of the bits that i and j share.
double hadamard(Index i, Index j, Index block) {
  const int shared = std::popcount(static_cast<std::uint64_t>(i) & static_cast<std::uint64_t>(j));
  return (shared % 2 == 0 ? 1.0 : -1.0) / std::sqrt(static_cast<double>(block));
}

std::vector<float> turned(std::vector<float> rows, Index width, Index block) {
  EXPECT_TRUE(rotate_channels(rows, width, block).ok());
  return rows;
}

class RotateChannels : public testing::TestWithParam<Index> {};
INSTANTIATE_TEST_SUITE_P(Blocks, RotateChannels, testing::Values(1, 2, 4, 8, 16), testing::PrintToStringParamName());

TEST_P(RotateChannels, MultipliesEachBlockByTheNormalisedMatrix) {
  constexpr Index kWidth = 48, kCount = 3;
  const Index block = GetParam();
  Random random(1);
  const std::vector<float> x = normals(kWidth * kCount, random);
  const std::vector<float> y = turned(x, kWidth, block);
  for (Index first = 0; first < kWidth * kCount; first += block) {
    for (Index i = 0; i < block; ++i) {
      double wanted = 0.0;
      for (Index j = 0; j < block; ++j) wanted += hadamard(i, j, block) * static_cast<double>(x[ix(first + j)]);
      EXPECT_NEAR(static_cast<double>(y[ix(first + i)]), wanted, 1e-6);
    }
  }
}

TEST_P(RotateChannels, TurnsBackWhenItIsCalledAgain) {
  Random random(2);
  const std::vector<float> x = normals(5 * 16, random);
  EXPECT_LT(relative_error(turned(turned(x, 16, GetParam()), 16, GetParam()), x), 1e-6);
}

TEST(RotateChannelsOf, NoRowsAndNoBlockAreLeftAsTheyAre) {
  std::vector<float> none;
  EXPECT_TRUE(rotate_channels(none, 16, 8).ok());
  const std::vector<float> x{1.f, 2.f, 3.f};
  EXPECT_EQ(turned(x, 3, 0), x);
  EXPECT_EQ(turned(x, 3, 1), x);
}

TEST(RotateChannelsOf, ABadArgumentIsNamedAndTheRowsStay) {
  const auto expect = [](Index width, Index block, StatusCode code, std::string_view argument) {
    std::vector<float> rows(24, 1.f);
    const Status status = rotate_channels(rows, width, block);
    EXPECT_EQ(status.code(), code) << width << " " << block;
    EXPECT_EQ(status.argument(), argument);
    EXPECT_EQ(rows, std::vector<float>(24, 1.f));
  };
  expect(0, 0, StatusCode::invalid_argument, "width");
  expect(-8, 8, StatusCode::invalid_argument, "width");
  expect(kMaxWidth + 1, 8, StatusCode::invalid_argument, "width");
  expect(16, 8, StatusCode::size_mismatch, "rows");
  expect(12, 3, StatusCode::invalid_argument, "block");
  expect(12, 8, StatusCode::invalid_argument, "block");
  expect(12, -4, StatusCode::invalid_argument, "block");
  expect(12, INT64_MIN, StatusCode::invalid_argument, "block");
}

// --- Caches ----------------------------------------------------------------------------------------------------

constexpr LayerShape kShape{.kv_heads = 2, .group_size = 2, .key_dim = 32, .value_dim = 24};
constexpr ChannelRotation kTurned{.key_block = 32, .value_block = 8};
constexpr Index kRows = 200;  // T

/// A cache in plain memory, and what it needs to be compressed.
struct Dense {
  std::vector<float> keys, values, masses;
  std::vector<Index> rows;
  std::vector<Position> positions;
  OwnedQueries queries;
  ChannelRotation rotation;
  Rope rope{};

  explicit Dense(ChannelRotation turns) : queries(make_queries(kShape, kRows, kRows)), rotation(turns) {
    const auto cache = make_cache(kShape, kRows);
    for (Index h = 0; h < kShape.kv_heads; ++h) {
      keys.insert(keys.end(), cache.key_rows(h, 0, kRows), cache.key_rows(h, 0, kRows) + kRows * kShape.key_dim);
      values.insert(values.end(), cache.value_rows(h, 0, kRows),
                    cache.value_rows(h, 0, kRows) + kRows * kShape.value_dim);
      for (Index t = 0; t < kRows; ++t) positions.push_back(t);
    }
    masses.assign(ix(kShape.kv_heads * kRows), 0.f);
    rows.assign(ix(kShape.kv_heads), kRows);
    keys = turned(std::move(keys), kShape.key_dim, turns.key_block);
    values = turned(std::move(values), kShape.value_dim, turns.value_block);
    queries.data = turned(std::move(queries.data), kShape.key_dim, turns.key_block);
  }

  StridedView<float> view() {
    return {.layer = kShape,
            .keys = keys.data(),
            .key_strides = Strides::head_major(kRows, kShape.key_dim),
            .values = values.data(),
            .value_strides = Strides::head_major(kRows, kShape.value_dim),
            .rows = rows,
            .positions = positions,
            .position_stride = kRows,
            .log_masses = masses,
            .log_mass_stride = kRows,
            .rotation = rope,
            .hadamard = rotation};
  }
};

static_assert(HasChannelRotation<StridedView<float>>);

Ems ems() { return Ems({.score = {.window = 32}, .budget = {.rows = 40}, .reduce = {.key_mode = KeyMode::direction}}); }
SnapKv snap_kv() { return SnapKv({.score = {.window = 32, .recent = 16}, .budget = {.rows = 40}}); }

template <class Scorer>
std::vector<float> scores_of(const Scorer& scorer, Dense& dense) {
  const auto view = dense.view();
  std::vector<Index> offset;
  for (Index h = 0; h <= kShape.kv_heads; ++h) offset.push_back(h * kRows);
  std::vector<float> score(ix(kShape.kv_heads * kRows));
  std::vector<Protection> protection(score.size());
  std::vector<std::byte> memory(scorer.workspace_bytes(view, dense.queries.view(), 1));
  SerialExecutor executor;
  const ScoreTable table{offset, score, protection};
  EXPECT_TRUE(scorer.score(view, dense.queries.view(), table, memory, executor).ok());
  return score;
}

/// Plans for both caches, and what must be equal in them.
template <class Method>
void expect_equal_plans(const Method& method, bool merges) {
  Dense plain({}), rotated(kTurned);
  EXPECT_LT(relative_error(scores_of(method.scorer(), rotated), scores_of(method.scorer(), plain)), 1e-5);

  SerialExecutor executor;
  const auto memory_for = [&](Dense& dense) {
    return std::vector<std::byte>(method.workspace_bytes(dense.view(), dense.queries.view(), 1).value());
  };
  auto first_memory = memory_for(plain), second_memory = memory_for(rotated);
  const auto a = method.plan(plain.view(), plain.queries.view(), first_memory, executor).value();
  const auto b = method.plan(rotated.view(), rotated.queries.view(), second_memory, executor).value();
  EXPECT_TRUE(std::ranges::equal(b.kept_offset, a.kept_offset)) << "budgets";
  EXPECT_TRUE(std::ranges::equal(b.kept, a.kept));
  EXPECT_TRUE(std::ranges::equal(b.fate, a.fate));
  EXPECT_TRUE(std::ranges::equal(b.row_class, a.row_class)) << "classes";
  ASSERT_EQ(!a.merged.empty(), merges);
  ASSERT_EQ(b.merged.size(), a.merged.size());

  const auto floats = [](std::span<const float> x) { return std::vector<float>(x.begin(), x.end()); };
  if (merges) {
    const auto values = turned(floats(a.merged_values), kShape.value_dim, kTurned.value_block);
    const auto keys = turned(floats(a.merged_keys), kShape.key_dim, kTurned.key_block);
    EXPECT_LT(relative_error(floats(b.merged_values), values), 1e-5);
    EXPECT_LT(relative_error(floats(b.merged_keys), keys), 1e-5);
  }
  for (std::size_t m = 0; m < a.merged.size(); ++m) {
    EXPECT_EQ(b.merged[m].slot, a.merged[m].slot);
    EXPECT_EQ(b.merged[m].absorbed, a.merged[m].absorbed);
    EXPECT_NEAR(b.merged[m].log_mass, a.merged[m].log_mass, 1e-5);
  }
}

TEST(TurnedCache, EmsScoresBudgetsClassesAndMergesAsInThePlainOne) { expect_equal_plans(ems(), true); }
TEST(TurnedCache, SnapKvScoresAndKeepsAsInThePlainOne) { expect_equal_plans(snap_kv(), false); }

TEST(TurnedCache, AttentionGivesTheOutputOfThePlainOneTurned) {
  Dense plain({}), rotated(kTurned);
  const auto wanted = run_attend(plain.view(), plain.queries.view()).out;
  const auto got = run_attend(rotated.view(), rotated.queries.view()).out;
  EXPECT_LT(relative_error(got, turned(wanted, kShape.value_dim, kTurned.value_block)), 1e-5);
}

TEST(TurnedCache, QueriesThatAreNotTurnedGiveOtherScores) {
  Dense plain({}), rotated(kTurned);
  rotated.queries = plain.queries;
  EXPECT_GT(relative_error(scores_of(ems().scorer(), rotated), scores_of(ems().scorer(), plain)), 0.1);
}

Status status_of(Dense& dense, const Ems& method) {
  auto view = dense.view();
  return method.compress(view, dense.queries.view()).status();
}

TEST(TurnedCache, WhatUnrotatesKeysRefusesTurnedOnes) {
  const Ems rotating({.budget = {.rows = 40}, .reduce = {.key_mode = KeyMode::rotated}});
  const Ems comparing(
      {.budget = {.rows = 40}, .reduce = {.assigner = {.key_space = ZeroClassBatcher::KeySpace::unrotated}}});
  for (const Ems& method : {rotating, comparing}) {
    for (const RopeKind kind : {RopeKind::half_split, RopeKind::adjacent}) {
      Dense dense(kTurned);
      dense.rope.kind = kind;
      const std::vector<float> before = dense.keys;
      const Status status = status_of(dense, method);
      EXPECT_EQ(status.code(), StatusCode::unsupported);
      EXPECT_EQ(status.argument(), "view");
      EXPECT_EQ(dense.keys, before);
      EXPECT_EQ(dense.rows, std::vector<Index>(2, kRows));
    }
  }
}

TEST(TurnedCache, WhatUnrotatesKeysTakesThoseThatHaveNoRotationAndThoseWhoseValuesAloneAreTurned) {
  const Ems rotating({.budget = {.rows = 40}, .reduce = {.key_mode = KeyMode::rotated}});
  Dense pre_rope(kTurned), values_only({.value_block = 8});
  pre_rope.rope.kind = RopeKind::pre_rope;
  values_only.rope.kind = RopeKind::half_split;
  EXPECT_TRUE(status_of(pre_rope, rotating).ok());
  EXPECT_TRUE(status_of(values_only, rotating).ok());
}

TEST(TurnedCache, BlocksThatDoNotFitAreRefused) {
  for (const ChannelRotation bad : {ChannelRotation{.key_block = 64}, ChannelRotation{.key_block = 3},
                                    ChannelRotation{.key_block = -2}, ChannelRotation{.value_block = 16},
                                    ChannelRotation{.value_block = 12}, ChannelRotation{.value_block = INT64_MIN}}) {
    Dense dense({});
    dense.rotation = bad;
    const Status status = status_of(dense, ems());
    EXPECT_EQ(status.code(), StatusCode::invalid_argument) << bad.key_block << " " << bad.value_block;
    EXPECT_EQ(status.argument(), "view");
  }
}

TEST(TurnedCache, ViewsThatDoNotTellAreNotTurned) {
  const auto cache = make_cache(kShape, 4);
  static_assert(!HasChannelRotation<RaggedCache<float>>);
  EXPECT_EQ(channel_rotation_of(cache).key_block, 0);
  EXPECT_EQ(channel_rotation_of(cache).value_block, 0);
}

}  // namespace
}  // namespace kvfold::test
