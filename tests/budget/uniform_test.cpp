#include <kvfold/budget/uniform.hpp>

#include <vector>

#include <gtest/gtest.h>

namespace kvfold::test {
namespace {

/// A table of heads with these rows; scores play no part.
struct Table {
  std::vector<Index> offset{0};
  std::vector<float> score;
  std::vector<Protection> protection;

  Table(std::initializer_list<Index> rows) {
    for (const Index n : rows) offset.push_back(offset.back() + n);
    score.assign(static_cast<std::size_t>(offset.back()), 1.f);
    protection.resize(score.size());
  }
  [[nodiscard]] ScoreTable view() { return {offset, score, protection}; }
};

TEST(UniformBudget, GivesEveryHeadTheSameRowsUpToWhatItHas) {
  Table first{5, 100, 7}, second{8, 1};
  const std::vector<ScoreTable> tables{first.view(), second.view()};
  std::vector<Index> budgets(5, -1);
  ASSERT_TRUE(UniformBudget({.rows = 7}).allocate(tables, budgets, {}).ok());
  EXPECT_EQ(budgets, (std::vector<Index>{5, 7, 7, 7, 1}));
  ASSERT_TRUE(UniformBudget({.rows = 1}).allocate(tables, budgets, {}).ok());
  EXPECT_EQ(budgets, (std::vector<Index>(5, 1)));
  ASSERT_TRUE(UniformBudget({.rows = kMaxRows}).allocate(tables, budgets, {}).ok());
  EXPECT_EQ(budgets, (std::vector<Index>{5, 100, 7, 8, 1}));
}

TEST(UniformBudget, NeedsNoWorkspaceAndTellsItsLimits) {
  EXPECT_EQ(UniformBudget::workspace_bytes(1000), 0u);
  EXPECT_EQ(UniformBudget({.rows = 20}).limits(3).per_head, 20);
  EXPECT_EQ(UniformBudget({.rows = 20}).limits(3).total, 60);
}

TEST(UniformBudget, RefusesRowsOutOfRange) {
  for (const Index bad : {Index{0}, Index{-1}, kMaxRows + 1}) {
    const Status status = UniformBudget({.rows = bad}).validate();
    EXPECT_EQ(status.code(), StatusCode::invalid_argument);
    EXPECT_EQ(status.argument(), "budget");
  }
  EXPECT_TRUE(UniformBudget({.rows = 1}).validate().ok());
}

TEST(UniformBudget, RefusesTablesAndBudgetsThatDoNotFit) {
  Table table{5, 5};
  const std::vector<ScoreTable> tables{table.view()};
  std::vector<Index> budgets(3, -1);
  const UniformBudget policy;
  EXPECT_EQ(policy.allocate(tables, budgets, {}).argument(), "budgets");
  EXPECT_EQ(policy.allocate(tables, std::span(budgets).first(1), {}).argument(), "budgets");
  EXPECT_EQ(policy.allocate({}, {}, {}).argument(), "tables");
  const std::vector<ScoreTable> with_an_empty_one{ScoreTable{}, table.view()};
  EXPECT_EQ(policy.allocate(with_an_empty_one, std::span(budgets).first(1), {}).argument(), "tables");
  EXPECT_EQ(budgets, (std::vector<Index>(3, -1)));  // nothing was written
}

}  // namespace
}  // namespace kvfold::test
