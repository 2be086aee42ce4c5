#include <kvfold/budget/adaptive_heads.hpp>
#include <kvfold/exec/thread_pool.hpp>

#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include <gtest/gtest.h>

#include "builders.hpp"

namespace kvfold::test {
namespace {

using Options = AdaptiveHeadBudget::Options;
using Budgets = std::vector<Index>;

struct Head {
  std::vector<int> scores;  // whole numbers, so that the oracle can compare shares exactly
  Index sinks = 0, recent = 0;

  [[nodiscard]] Index rows() const { return static_cast<Index>(scores.size()); }
  [[nodiscard]] Protection protection(Index t) const {
    return t < sinks ? Protection::sink : t >= rows() - recent ? Protection::recent : Protection::none;
  }
};
using Layer = std::vector<Head>;

struct Table {
  std::vector<Index> offset{0};
  std::vector<float> score;
  std::vector<Protection> protection;

  explicit Table(const Layer& heads) {
    for (const Head& head : heads) {
      offset.push_back(offset.back() + head.rows());
      for (Index t = 0; t < head.rows(); ++t) {
        score.push_back(static_cast<float>(head.scores[static_cast<std::size_t>(t)]));
        protection.push_back(head.protection(t));
      }
    }
  }
  [[nodiscard]] ScoreTable view() { return {offset, score, protection}; }
};

/// Runs the policy in exactly the workspace that it asks for. Empty where it refuses.
Budgets allocate(const std::vector<Layer>& layers, Options options) {
  std::vector<Table> tables(layers.begin(), layers.end());
  std::vector<ScoreTable> views;
  Index rows = 0;
  for (Table& table : tables) {
    views.push_back(table.view());
    rows += table.offset.back();
  }
  std::size_t heads = 0;
  for (const Layer& layer : layers) heads += layer.size();
  Budgets budgets(heads, -1);
  std::vector<std::byte> memory(AdaptiveHeadBudget::workspace_bytes(rows) + 1);
  const Workspace workspace = std::span(memory).subspan(1);
  const Status status = AdaptiveHeadBudget(options).allocate(views, budgets, workspace);
  EXPECT_TRUE(status.ok()) << status.detail();
  ThreadPool pool(3);
  Budgets of_threads(heads, -1);
  EXPECT_TRUE(AdaptiveHeadBudget(options).allocate(views, of_threads, workspace, pool).ok());
  EXPECT_EQ(of_threads, budgets) << "by three threads";
  return status.ok() ? budgets : Budgets{};
}
Budgets allocate(const Layer& layer, Options options) { return allocate(std::vector<Layer>{layer}, options); }

Index sum(const Budgets& budgets) { return std::accumulate(budgets.begin(), budgets.end(), Index{0}); }

// --- By hand ---------------------------------------------------------------------------------------------------

TEST(AdaptiveHeadBudget, GivesRowsToTheHeadWhoseScoresAreSpreadOut) {
  const Head sparse{{97, 1, 1, 1}}, flat{{25, 25, 25, 25}};
  EXPECT_EQ(allocate({sparse, flat}, {.rows = 2, .floor_share = 0.f}), (Budgets{1, 3}));
  EXPECT_EQ(allocate({sparse, flat}, {.rows = 3, .floor_share = 0.f}), (Budgets{2, 4}));
}

TEST(AdaptiveHeadBudget, ComparesSharesOfTheHeadNotScores) {
  const Head small{{3, 3, 2, 2}}, large{{4000, 3000, 2000, 1000}};
  EXPECT_EQ(allocate({small, large}, {.rows = 2, .floor_share = 0.f}), (Budgets{2, 2}));  // .4 .3 | .3 .3
}

TEST(AdaptiveHeadBudget, DoesNotThinkLessOfHeadsThatLeanOnTheirSinks) {
  const Head leaning{{90, 4, 3, 3}, 1}, upright{{0, 4, 3, 3}, 1};
  EXPECT_EQ(allocate({upright, leaning}, {.rows = 2, .floor_share = 0.f}), (Budgets{2, 2}));  // .4 .3 .3 each
}

TEST(AdaptiveHeadBudget, GivesTiesToTheLowerHead) {
  const Head head{{1, 1, 1, 1}};
  EXPECT_EQ(allocate({head, head, head}, {.rows = 2, .floor_share = 0.f}), (Budgets{4, 1, 1}));
  const Head nothing{{0, 0, 0, 0}};
  EXPECT_EQ(allocate({nothing, nothing, nothing}, {.rows = 2, .floor_share = 0.f}), (Budgets{4, 1, 1}));
}

TEST(AdaptiveHeadBudget, RespectsTheFloor) {
  const Head sparse{{1000, 0, 0, 0, 0, 0, 0, 0}}, flat{{1, 1, 1, 1, 1, 1, 1, 1}};
  EXPECT_EQ(allocate({sparse, flat}, {.rows = 4, .floor_share = 0.f}), (Budgets{1, 7}));
  EXPECT_EQ(allocate({sparse, flat}, {.rows = 4, .floor_share = 0.5f}), (Budgets{2, 6}));
  EXPECT_EQ(allocate({sparse, flat}, {.rows = 4, .floor_share = 0.6f}), (Budgets{3, 5}));
  EXPECT_EQ(allocate({sparse, flat}, {.rows = 4, .floor_share = 1.f}), (Budgets{4, 4}));
}

TEST(AdaptiveHeadBudget, AFloorOfOneFifthOf100RowsIs20Rows) {
  Head sparse{std::vector<int>(200, 0)}, flat{std::vector<int>(200, 1)};
  sparse.scores[0] = 1;
  EXPECT_EQ(allocate({sparse, flat}, {.rows = 100, .floor_share = 0.2f}), (Budgets{20, 180}));
}

TEST(AdaptiveHeadBudget, KeepsProtectedRowsUpToTheMeanBudget) {
  const Head guarded{{0, 0, 0, 9, 9, 0}, 3, 1}, flat{{1, 1, 1, 1, 1, 1}};
  EXPECT_EQ(allocate({guarded, flat}, {.rows = 4, .floor_share = 0.f}), (Budgets{6, 2}));
  const Head idle{{0, 0, 0, 0, 0, 0}, 3, 1};
  EXPECT_EQ(allocate({idle, flat}, {.rows = 4, .floor_share = 0.f}), (Budgets{4, 4}));
  EXPECT_EQ(allocate({idle, flat}, {.rows = 2, .floor_share = 0.f}), (Budgets{2, 2}));
}

TEST(AdaptiveHeadBudget, GivesNoHeadMoreRowsThanItHas) {
  const Head few{{5, 5}}, many{{1, 1, 1, 1, 1, 1, 1, 1, 1, 1}};
  EXPECT_EQ(allocate({few, many}, {.rows = 5}), (Budgets{2, 8}));
  EXPECT_EQ(allocate({few, many}, {.rows = 100}), (Budgets{2, 10}));
  EXPECT_EQ(allocate({few, many}, {.rows = kMaxRows, .floor_share = 1.f}), (Budgets{2, 10}));
}

TEST(AdaptiveHeadBudget, MovesRowsBetweenLayersToo) {
  const Head sparse{{97, 1, 1, 1}}, flat{{25, 25, 25, 25}};
  EXPECT_EQ(allocate({{sparse, sparse}, {flat}}, {.rows = 2, .floor_share = 0.f}), (Budgets{1, 1, 4}));
  const Options options{.rows = 2, .floor_share = 0.f};
  EXPECT_EQ(allocate({{flat}, {sparse, flat}}, options), allocate({flat, sparse, flat}, options));
}

// --- Against the oracle ----------------------------------------------------------------------------------------

/// One row after the other goes to the head whose next one has the largest share; ties to the lower head, then row.
Budgets oracle(const Layer& heads, Options options) {
  struct Claim {
    Index score, sum, head, row;
  };
  Budgets budgets;
  std::vector<Claim> claims;
  Index all = 0;
  for (std::size_t h = 0; h < heads.size(); ++h) {
    const Head& head = heads[h];
    std::vector<Index> rows(head.scores.size());
    std::iota(rows.begin(), rows.end(), Index{0});
    const auto score = [&](Index t) { return head.scores[static_cast<std::size_t>(t)]; };
    std::stable_sort(rows.begin(), rows.end(), [&](Index a, Index b) {
      const Protection p = head.protection(a), q = head.protection(b);
      if (p != q) return p > q;
      return p == Protection::recent ? a > b : p == Protection::none && score(a) > score(b);
    });
    Index guarded = 0;
    for (Index t = 0; t < head.rows(); ++t) guarded += head.protection(t) != Protection::none ? 1 : 0;
    const auto share = static_cast<Index>(std::ceil(options.floor_share * static_cast<float>(options.rows)));
    budgets.push_back(
        std::min({std::max({share, std::min(guarded, options.rows), Index{1}}), options.rows, head.rows()}));
    Index whole = 0;  // of the rows that may claim; where it is 0, all shares are
    for (Index i = 0; i < head.rows(); ++i) {
      const Index t = rows[static_cast<std::size_t>(i)];
      if (i >= budgets.back() || head.protection(t) == Protection::none) whole += score(t);
    }
    for (Index i = budgets.back(); i < head.rows(); ++i) {
      const Index t = rows[static_cast<std::size_t>(i)];
      claims.push_back({whole > 0 ? score(t) : 0, std::max<Index>(whole, 1), static_cast<Index>(h), t});
    }
    all += head.rows();
  }
  std::sort(claims.begin(), claims.end(), [](const Claim& a, const Claim& b) {
    if (a.score * b.sum != b.score * a.sum) return a.score * b.sum > b.score * a.sum;
    return a.head != b.head ? a.head < b.head : a.row < b.row;
  });
  const Index left = std::min(options.rows * static_cast<Index>(heads.size()), all) - sum(budgets);
  for (Index i = 0; i < left; ++i) {
    ++budgets[static_cast<std::size_t>(claims[static_cast<std::size_t>(i)].head)];
  }
  return budgets;
}

TEST(AdaptiveHeadBudget, IsWhatTheOracleGivesForRandomTables) {
  Random random(13);
  for (int round = 0; round < 1500; ++round) {
    const Options options{.rows = 1 + random.below(24), .floor_share = static_cast<float>(random.below(5)) * 0.25f};
    std::vector<Layer> layers(static_cast<std::size_t>(1 + random.below(3)));
    Layer all;
    for (Layer& layer : layers) {
      layer.resize(static_cast<std::size_t>(1 + random.below(4)));
      for (Head& head : layer) {
        const Index rows = 1 + random.below(30), most = 1 + random.below(12);
        for (Index t = 0; t < rows; ++t) head.scores.push_back(static_cast<int>(random.below(most)));
        head.sinks = std::min(rows, random.below(4));
        head.recent = random.below(rows - head.sinks + 1) / 2;
        all.push_back(head);
      }
    }
    const Budgets budgets = allocate(layers, options);
    ASSERT_EQ(budgets, oracle(all, options)) << "round " << round;
    Index rows = 0;
    for (std::size_t h = 0; h < all.size(); ++h) {
      ASSERT_GE(budgets[h], 1);
      ASSERT_LE(budgets[h], all[h].rows());
      rows += all[h].rows();
    }
    ASSERT_EQ(sum(budgets), std::min(options.rows * static_cast<Index>(all.size()), rows));
  }
}

// --- What is refused -------------------------------------------------------------------------------------------

TEST(AdaptiveHeadBudget, RefusesOptionsOutOfRange) {
  const auto refused = [](Options options) {
    const Status status = AdaptiveHeadBudget(options).validate();
    return status.code() == StatusCode::invalid_argument ? status.argument() : "accepted";
  };
  for (const Index bad : {Index{0}, Index{-5}, kMaxRows + 1}) EXPECT_EQ(refused({.rows = bad}), "budget");
  for (const float bad :
       {-0.1f, 1.1f, std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    EXPECT_EQ(refused({.floor_share = bad}), "floor_share");
  }
  EXPECT_TRUE(AdaptiveHeadBudget({.rows = 1, .floor_share = 1.f}).validate().ok());
}

class AdaptiveHeadBudgetCall : public testing::Test {
 protected:
  Table table_{Layer{{{4, 3, 2, 1}}, {{1, 1, 1, 1}}}};
  std::vector<ScoreTable> tables_{table_.view()};
  Budgets budgets_ = Budgets(3, -1);
  std::vector<std::byte> memory_{AdaptiveHeadBudget::workspace_bytes(8)};
  AdaptiveHeadBudget policy_{{.rows = 2}};
};

TEST_F(AdaptiveHeadBudgetCall, NeedsTheWorkspaceThatItAsksFor) {
  const auto budgets = std::span(budgets_).first(2);
  EXPECT_TRUE(policy_.allocate(tables_, budgets, memory_).ok());
  for (const std::size_t bytes : {memory_.size() - 65, std::size_t{64}, std::size_t{1}, std::size_t{0}}) {
    const Status status = policy_.allocate(tables_, budgets, std::span(memory_).first(bytes));
    EXPECT_EQ(status.code(), StatusCode::workspace_too_small) << bytes;
    EXPECT_EQ(status.argument(), "workspace");
  }
}

TEST_F(AdaptiveHeadBudgetCall, AsksForWhatCannotBeGivenWhereRowsAreHostile) {
  for (const Index rows : {Index{-1}, std::numeric_limits<Index>::min(), std::numeric_limits<Index>::max()}) {
    EXPECT_GT(AdaptiveHeadBudget::workspace_bytes(rows), std::size_t{1} << 60);
  }
}

TEST_F(AdaptiveHeadBudgetCall, RefusesBudgetsOfAnotherSize) {
  EXPECT_EQ(policy_.allocate(tables_, budgets_, memory_).argument(), "budgets");
  EXPECT_EQ(policy_.allocate(tables_, std::span(budgets_).first(1), memory_).argument(), "budgets");
  EXPECT_EQ(policy_.allocate({}, {}, memory_).argument(), "tables");
  EXPECT_EQ(budgets_, Budgets(3, -1));
}

TEST_F(AdaptiveHeadBudgetCall, RefusesATableWithoutOffsets) {
  tables_.insert(tables_.begin(), ScoreTable{});
  EXPECT_EQ(policy_.allocate(tables_, std::span(budgets_).first(1), memory_).argument(), "tables");
}

TEST_F(AdaptiveHeadBudgetCall, RefusesATableWhoseScoresAndOffsetsDisagree) {
  tables_[0].score = tables_[0].score.first(7);
  EXPECT_EQ(policy_.allocate(tables_, std::span(budgets_).first(2), memory_).argument(), "tables");
}

TEST_F(AdaptiveHeadBudgetCall, RefusesScoresThatAreNoNumbers) {
  table_.score[5] = std::numeric_limits<float>::quiet_NaN();
  const Status status = policy_.allocate(tables_, std::span(budgets_).first(2), memory_);
  EXPECT_EQ(status.code(), StatusCode::not_finite);
  EXPECT_EQ(status.argument(), "tables");
}

}  // namespace
}  // namespace kvfold::test
