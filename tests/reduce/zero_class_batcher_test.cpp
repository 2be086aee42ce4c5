#include <kvfold/exec/thread_pool.hpp>
#include <kvfold/reduce/zero_class_batcher.hpp>

#include <limits>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "builders.hpp"
#include "merge_oracle.hpp"

namespace kvfold::test {
namespace {

using KeySpace = ZeroClassBatcher::KeySpace;

struct HeadSizes {
  Index candidates, centres;
};
using Sizes = std::vector<HeadSizes>;

/// Candidates and centres that alternate evenly: head h needs candidates + centres rows.
class Problem {
 public:
  explicit Problem(const Sizes& heads) {
    for (const auto& [candidates, centres] : heads) {
      candidate_offset_.push_back(static_cast<Index>(candidates_.size()));
      candidate_count_.push_back(candidates);
      max_candidates_ = std::max(max_candidates_, candidates);
      const Index rows = candidates + centres;
      for (Index t = 0; t < rows; ++t) {
        const bool centre = (t + 1) * centres / rows > t * centres / rows;
        (centre ? centres_ : candidates_).push_back(static_cast<RowId>(t));
      }
      candidates_.push_back(-1);  // room that a head does not use
      centre_offset_.push_back(static_cast<Index>(centres_.size()));
    }
  }
  Problem(std::vector<RowId> candidates, std::vector<RowId> centres)
      : centre_offset_{0, static_cast<Index>(centres.size())},
        centres_(std::move(centres)),
        candidate_offset_{0},
        candidate_count_{static_cast<Index>(candidates.size())},
        candidates_(std::move(candidates)),
        max_candidates_(candidate_count_[0]) {}

  [[nodiscard]] ClassProblem view() const {
    return {centre_offset_, centres_, candidate_offset_, candidate_count_, candidates_, max_candidates_};
  }
  [[nodiscard]] std::span<const RowId> candidates(Index h) const {
    return std::span(candidates_).subspan(ix(candidate_offset_[ix(h)]), ix(candidate_count_[ix(h)]));
  }
  [[nodiscard]] std::span<const RowId> centres(Index h) const {
    const Index first = centre_offset_[ix(h)];
    return std::span(centres_).subspan(ix(first), ix(centre_offset_[ix(h + 1)] - first));
  }

 private:
  std::vector<Index> centre_offset_{0};
  std::vector<RowId> centres_;
  std::vector<Index> candidate_offset_;
  std::vector<Index> candidate_count_;
  std::vector<RowId> candidates_;
  Index max_candidates_ = 0;
};

/// The classes [H][max R]; entries are poisoned first, so that one which is not written shows.
template <KVCacheView V, Executor X = SerialExecutor>
Result<std::vector<RowId>> assign(const V& view, const Problem& problem, ZeroClassBatcher::Options options,
                                  X&& executor = {}) {
  const ZeroClassBatcher batcher(options);
  const ClassProblem p = problem.view();
  std::vector<RowId> classes(ix(view.shape().kv_heads * p.max_candidates), RowId{-77});
  const std::size_t bytes = ZeroClassBatcher::workspace_bytes(view.shape(), p.max_candidates, executor.concurrency());
  WorkspaceBuffer memory;
  if (Status bad = memory.reserve(bytes); !bad.ok()) return bad;
  if (Status bad = batcher.assign(view, p, classes, memory.get().first(bytes), executor); !bad.ok()) return bad;
  return classes;
}

/// Classes are those of the oracle, except where two similarities are closer than fp32 can tell.
template <KVCacheView V>
void expect_oracle_classes(const V& view, const Problem& problem, ZeroClassBatcher::Options options,
                           const std::vector<RowId>& classes) {
  const Index stride = problem.view().max_candidates;
  for (Index h = 0; h < view.shape().kv_heads; ++h) {
    const auto candidates = problem.candidates(h);
    const auto sim = similarities(read_head(view, h), candidates, problem.centres(h), options.key_space);
    for (Index j = 0; j < stride; ++j) {
      const RowId got = classes[ix(h * stride + j)];
      if (j >= static_cast<Index>(candidates.size())) {
        ASSERT_EQ(got, 0) << "padding row " << j << " of head " << h;
        continue;
      }
      Doubles columns = sim[ix(j)];
      columns.insert(columns.begin(), static_cast<double>(options.tau));
      const RowId wanted = class_of(sim[ix(j)], static_cast<double>(options.tau));
      ASSERT_GE(got, 0);
      ASSERT_LT(ix(got), columns.size());
      ASSERT_NEAR(columns[ix(got)], columns[ix(wanted)], got == wanted ? 0.0 : 3e-6)
          << "class " << got << " for " << wanted << ", candidate " << j << " of head " << h;
    }
  }
}

/// A cache of one head whose keys and values are given.
RaggedCache<> cache_of(const std::vector<std::vector<float>>& keys, const std::vector<std::vector<float>>& values,
                       Rope rope = {}) {
  const auto rows = static_cast<Index>(keys.size());
  auto cache =
      make_cache({1, 1, static_cast<Index>(keys[0].size()), static_cast<Index>(values[0].size())}, rows, 1, rope);
  for (Index t = 0; t < rows; ++t) {
    cache.write_key(0, t, keys[ix(t)]);
    cache.write_value(0, t, values[ix(t)]);
  }
  return cache;
}

// --- Against the oracle ----------------------------------------------------------------------------------------

struct Case {
  std::string name;
  Index key_dim, value_dim;
  Sizes heads;
};

class ZeroClassBatcherSweep : public testing::TestWithParam<Case> {
 protected:
  template <class Element>
  void sweep_tau() {
    const Case& c = GetParam();
    Index most = 1;
    for (const HeadSizes& s : c.heads) most = std::max(most, s.candidates + s.centres);
    const auto heads = static_cast<Index>(c.heads.size());
    auto cache = make_cache<Element>({heads, 1, c.key_dim, c.value_dim}, most);
    for (Index h = 0; h < heads; ++h) cache.resize(h, c.heads[ix(h)].candidates + c.heads[ix(h)].centres);
    const Problem problem(c.heads);
    for (const float tau : {0.f, 0.3f, 0.8f, 1.f}) {
      SCOPED_TRACE(tau);
      const auto classes = assign(cache, problem, {.tau = tau});
      ASSERT_TRUE(classes.ok());
      expect_oracle_classes(cache, problem, {.tau = tau}, classes.value());
      ThreadPool pool(3);
      EXPECT_EQ(assign(cache, problem, {.tau = tau}, pool).value(), classes.value());
    }
  }
};

TEST_P(ZeroClassBatcherSweep, AssignsFp32RowsAsThePlainLoopsDo) { sweep_tau<float>(); }
TEST_P(ZeroClassBatcherSweep, AssignsFp16RowsAsThePlainLoopsDo) { sweep_tau<Float16>(); }

INSTANTIATE_TEST_SUITE_P(
    Sizes, ZeroClassBatcherSweep,
    testing::Values(Case{"OneRowOneCentre", 8, 8, {{1, 1}}}, Case{"JustBelowTheTiles", 16, 8, {{63, 127}}},
                    Case{"FullTiles", 8, 16, {{64, 128}}}, Case{"OneMoreThanTheTiles", 16, 12, {{65, 129}}},
                    Case{"SeveralTiles", 4, 6, {{150, 260}}}, Case{"KeysWiderThanTheDepthTile", 300, 7, {{20, 30}}},
                    Case{"HeadsOfUnequalSize", 16, 24, {{5, 9}, {70, 20}, {1, 140}, {64, 1}}},
                    Case{"TilesOfSeveralPieces", 8, 8, {{1100, 140}, {300, 130}}},
                    Case{"AHeadWithoutCandidates", 8, 8, {{6, 4}, {0, 12}, {66, 3}}},
                    Case{"AHeadWithoutCentres", 8, 8, {{6, 4}, {12, 0}}},
                    Case{"NoCandidatesAtAll", 8, 8, {{0, 5}, {0, 3}}}),
    [](const auto& c) { return c.param.name; });

// From a few values that are alike in a tile, whose keys are compared one by one, to many, whose keys are compared all
// at once.
TEST(ZeroClassBatcher, AssignsAsThePlainLoopsDoHoweverManyValuesAreAlike) {
  constexpr Index kRows = 420, kDim = 32;
  const Problem problem(Sizes{{200, 220}});
  for (const Index clusters : {1, 2, 4, 8, 30, 100}) {
    SCOPED_TRACE(clusters);
    Random random(static_cast<std::uint64_t>(clusters));
    auto cache = make_cache({1, 1, kDim, kDim}, kRows);
    const auto values = clustered_rows(kRows, kDim, clusters, 0.3f, random);
    for (Index t = 0; t < kRows; ++t) cache.write_value(0, t, std::span(values).subspan(ix(t * kDim), ix(kDim)));
    for (const float tau : {0.f, 0.3f, 0.7f}) {
      const auto classes = assign(cache, problem, {.tau = tau});
      ASSERT_TRUE(classes.ok());
      expect_oracle_classes(cache, problem, {.tau = tau}, classes.value());
    }
  }
}

TEST(ZeroClassBatcher, FindsTheRowsThatAreRedundant) {
  const auto cache = make_cache({2, 1, 16, 16}, 120);
  const Problem problem(Sizes{{80, 40}, {80, 40}});
  const auto classes = assign(cache, problem, {.tau = 0.3f});
  ASSERT_TRUE(classes.ok());
  const auto assigned = std::count_if(classes->begin(), classes->end(), [](RowId c) { return c > 0; });
  EXPECT_GT(assigned, 120);  // 160 candidates of 5 * 3 clusters
}

// --- What similarity means -------------------------------------------------------------------------------------

TEST(ZeroClassBatcher, TwoVectorsBothOpposedAreNotAlike) {
  const auto cache = cache_of({{1, 2, 3, 4}, {-1, -2, -3, -4}}, {{5, 6}, {-5, -6}});
  EXPECT_EQ(assign(cache, Problem({1}, {0}), {.tau = 0.f}).value(), std::vector<RowId>{0});
}

TEST(ZeroClassBatcher, RowsMustBeAlikeInKeyAndInValue) {
  const auto cache = cache_of({{1, 2}, {1, 2}, {2, -1}, {1, 2}}, {{3, 4}, {4, -3}, {3, 4}, {3, 4}});
  EXPECT_EQ(assign(cache, Problem({1, 2, 3}, {0}), {.tau = 0.1f}).value(), (std::vector<RowId>{0, 0, 1}));
}

TEST(ZeroClassBatcher, LengthDoesNotMatter) {
  const auto cache = cache_of({{1, 2}, {1e-30f, 2e-30f}, {1e30f, 2e30f}, {1e-18f, 2e-18f}},
                              {{3, 1}, {3e30f, 1e30f}, {3e-30f, 1e-30f}, {3e18f, 1e18f}});
  EXPECT_EQ(assign(cache, Problem({1, 2, 3}, {0}), {.tau = 0.9999f}).value(), (std::vector<RowId>{1, 1, 1}));
}

TEST(ZeroClassBatcher, ZeroVectorsAreLikeNothingNotEvenEachOther) {
  const auto zero_keys = cache_of({{0, 0}, {0, 0}, {1, 0}}, {{1, 1}, {1, 1}, {1, 1}});
  EXPECT_EQ(assign(zero_keys, Problem({1, 2}, {0}), {.tau = 0.f}).value(), (std::vector<RowId>{0, 0}));
  const auto zero_values = cache_of({{1, 1}, {1, 1}, {1, 1}}, {{0, 0}, {0, 0}, {1, 0}});
  EXPECT_EQ(assign(zero_values, Problem({1, 2}, {0}), {.tau = 0.f}).value(), (std::vector<RowId>{0, 0}));
}

TEST(ZeroClassBatcher, ATieWithTauIsTheZeroClass) {
  const auto cache = cache_of({{1, 0, 0, 0}, {1, 1, 1, 1}}, {{2, 0}, {4, 0}});  // cosines 1/2 and 1
  EXPECT_EQ(assign(cache, Problem({1}, {0}), {.tau = 0.5f}).value(), std::vector<RowId>{0});
  EXPECT_EQ(assign(cache, Problem({1}, {0}), {.tau = std::nextafter(0.5f, 0.f)}).value(), std::vector<RowId>{1});
}

TEST(ZeroClassBatcher, NothingIsMoreAlikeThanTauOne) {
  const auto cache = cache_of({{0, 2}, {0, 2}}, {{4, 0}, {4, 0}});
  EXPECT_EQ(assign(cache, Problem({1}, {0}), {.tau = 1.f}).value(), std::vector<RowId>{0});
}

TEST(ZeroClassBatcher, TiesOfDifferentCentresGoToTheLowerIndex) {
  // Both centres are at 60 degrees of the candidate's key.
  const auto cache = cache_of({{1, 0, 0, 0}, {0, 1, 0, 0}, {1, 1, 1, 1}}, {{1}, {1}, {1}});
  EXPECT_EQ(assign(cache, Problem({2}, {0, 1}), {.tau = 0.1f}).value(), std::vector<RowId>{1});
}

class EqualCentres : public testing::TestWithParam<Index> {};

TEST_P(EqualCentres, TieWhereverTheyStandAndTheFirstWins) {
  const Index centres = GetParam();
  for (const Index width : {3, 16, 64, 100}) {
    for (const Index candidates : {1, 2, 5, 64, 65}) {
      SCOPED_TRACE(testing::Message() << "D " << width << ", R " << candidates);
      auto cache = make_cache({1, 1, width, width}, centres + candidates, 3);
      Random random(7);
      const auto key = normals(width, random), value = normals(width, random);
      std::vector<RowId> centre_rows, candidate_rows;
      for (Index t = 0; t < centres + candidates; ++t) {
        (t < centres ? centre_rows : candidate_rows).push_back(static_cast<RowId>(t));
        auto k = key, v = value;
        for (Index d = 0; t >= centres && d < width; ++d) k[ix(d)] += 0.2f * random.normal();
        for (Index d = 0; t >= centres && d < width; ++d) v[ix(d)] += 0.2f * random.normal();
        cache.write_key(0, t, k);
        cache.write_value(0, t, v);
      }
      const auto classes = assign(cache, Problem(candidate_rows, centre_rows), {.tau = 0.1f});
      EXPECT_EQ(classes.value(), std::vector<RowId>(ix(candidates), 1));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Counts, EqualCentres, testing::Values(2, 3, 5, 8, 9, 128, 129, 130, 257));

// --- Keys without their rotation -------------------------------------------------------------------------------

class UnrotatedKeySpace : public testing::TestWithParam<Rope> {};

TEST_P(UnrotatedKeySpace, ComparesWhatTheKeysWereBeforeRope) {
  const Rope rope = GetParam();
  auto cache = make_cache({2, 1, 12, 8}, 90, 4, rope);
  const Problem problem(Sizes{{60, 30}, {60, 30}});
  const ZeroClassBatcher::Options options{.tau = 0.3f, .key_space = KeySpace::unrotated};
  const auto classes = assign(cache, problem, options);
  ASSERT_TRUE(classes.ok());
  expect_oracle_classes(cache, problem, options, classes.value());
}

TEST_P(UnrotatedKeySpace, RecognisesAContentWhereverItStands) {
  const Rope rope = GetParam();
  Random random(5);
  const auto content = normals(12, random), value = normals(8, random);
  auto cache = make_cache({1, 1, 12, 8}, 40, 4, rope);
  const RowId candidate = 37;
  for (const RowId row : {RowId{3}, candidate}) {
    const Doubles key = rotated(Doubles(content.begin(), content.end()), rope, static_cast<double>(row));
    const std::vector<float> stored(key.begin(), key.end());
    cache.write_key(0, row, stored);
    cache.write_value(0, row, value);
  }
  const Problem problem({candidate}, {3});
  EXPECT_EQ(assign(cache, problem, {.tau = 0.999f, .key_space = KeySpace::unrotated}).value(), std::vector<RowId>{1});
  const bool rotates = rope.kind == RopeKind::half_split || rope.kind == RopeKind::adjacent;
  EXPECT_EQ(assign(cache, problem, {.tau = 0.999f}).value(), std::vector<RowId>{rotates ? 0 : 1});
}

constexpr float kFrequencies[] = {1.f, 0.4f, 0.09f};
INSTANTIATE_TEST_SUITE_P(Conventions, UnrotatedKeySpace,
                         testing::Values(Rope{.kind = RopeKind::half_split}, Rope{.kind = RopeKind::adjacent},
                                         Rope{.kind = RopeKind::half_split, .rotary_dim = 8, .theta = 500.0},
                                         Rope{.kind = RopeKind::adjacent, .rotary_dim = 6, .inv_freq = kFrequencies},
                                         Rope{.kind = RopeKind::pre_rope}, Rope{.kind = RopeKind::none}));

TEST(ZeroClassBatcher, RefusesToUnrotateWhatIsNotKnown) {
  const auto cache = make_cache({1, 1, 8, 8}, 10);
  const auto classes = assign(cache, Problem(Sizes{{5, 5}}), {.tau = 0.3f, .key_space = KeySpace::unrotated});
  EXPECT_EQ(classes.status().code(), StatusCode::unsupported);
  EXPECT_EQ(classes.status().argument(), "view");
}

// --- Bad input -------------------------------------------------------------------------------------------------

class NotFiniteRow : public testing::TestWithParam<float> {};

TEST_P(NotFiniteRow, IsNamedWithItsHead) {
  const Problem problem(Sizes{{70, 130}, {70, 130}});
  for (const Index head : {0, 1}) {
    for (const RowId row : {problem.candidates(0).front(), problem.candidates(0).back(), problem.centres(0).front(),
                            problem.centres(0).back()}) {
      SCOPED_TRACE(row);
      auto cache = make_cache({2, 1, 8, 6}, 200);
      std::vector<float> bad(8, 1.f);
      bad[5] = GetParam();
      cache.write_value(head, row, bad);
      const Status of_value = assign(cache, problem, {}).status();
      EXPECT_EQ(of_value.code(), StatusCode::not_finite);
      EXPECT_EQ(of_value.argument(), "values");
      EXPECT_EQ(of_value.head(), head);
      EXPECT_EQ(of_value.row(), row);
      cache.write_key(head, row, bad);  // of a row that is bad in both, the key is named
      const Status of_key = assign(cache, problem, {}).status();
      EXPECT_EQ(of_key.code(), StatusCode::not_finite);
      EXPECT_EQ(of_key.argument(), "keys");
      EXPECT_EQ(of_key.head(), head);
      EXPECT_EQ(of_key.row(), row);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Kinds, NotFiniteRow,
                         testing::Values(std::numeric_limits<float>::quiet_NaN(),
                                         std::numeric_limits<float>::infinity(),
                                         -std::numeric_limits<float>::infinity()));

TEST(ZeroClassBatcher, NamesAWorkspaceThatIsTooSmall) {
  const auto cache = make_cache({1, 1, 8, 8}, 20);
  const Problem problem(Sizes{{10, 10}});
  std::vector<RowId> classes(10);
  std::vector<std::byte> memory(ZeroClassBatcher::workspace_bytes(cache.shape(), 10, 1) / 2);
  SerialExecutor executor;
  const Status status = ZeroClassBatcher().assign(cache, problem.view(), classes, memory, executor);
  EXPECT_EQ(status.code(), StatusCode::workspace_too_small);
}

TEST(ZeroClassBatcher, TauIsASimilarity) {
  for (const float good : {0.f, 0.3f, 1.f}) EXPECT_TRUE(ZeroClassBatcher::Options{.tau = good}.validate().ok());
  for (const float bad : {-0.1f, 1.1f, std::numeric_limits<float>::quiet_NaN()}) {
    EXPECT_EQ(ZeroClassBatcher::Options{.tau = bad}.validate().argument(), "tau");
  }
}

}  // namespace
}  // namespace kvfold::test
