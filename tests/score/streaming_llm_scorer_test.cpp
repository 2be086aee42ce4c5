#include <kvfold/detail/row_ranks.hpp>
#include <kvfold/score/streaming_llm_scorer.hpp>

#include <algorithm>
#include <vector>

#include <gtest/gtest.h>

#include "attention_oracle.hpp"
#include "builders.hpp"

namespace kvfold::test {
namespace {

TEST(StreamingLlm, ScoresLaterRowsHigher) {
  auto cache = make_cache({3, 1, 4, 4}, 50);
  cache.resize(1, 7);
  EXPECT_TRUE(close_to(run_score(StreamingLlmScorer{}, cache, NoEvidence{}), streaming_llm_oracle(cache), 0.0));
}

TEST(StreamingLlm, KeepsTheFirstSAndTheLastRowsOfAnyBudget) {
  const auto cache = make_cache({1, 1, 4, 4}, 30);
  const Scored scored = run_score(StreamingLlmScorer({.sinks = 4}), cache, NoEvidence{});
  for (const Index budget : {1, 3, 4, 5, 12, 30}) {
    std::vector<detail::Rank> scratch(30);
    const detail::RowRanks rank(scored.score, scored.protection, scratch);
    const detail::Rank lowest = rank.lowest_of_best(budget);
    std::vector<RowId> rows;
    for (Index t = 0; t < 30; ++t) {
      if (rank[t] >= lowest) rows.push_back(static_cast<RowId>(t));
    }
    std::vector<RowId> wanted;
    for (Index t = 0; t < 30; ++t) {
      const bool sink = t < std::min<Index>(budget, 4), last = t >= 30 - (budget - 4);
      if (sink || last) wanted.push_back(static_cast<RowId>(t));
    }
    EXPECT_EQ(rows, wanted) << budget;
  }
}

TEST(StreamingLlm, NeedsNoEvidenceAndTakesAny) {
  const LayerShape shape{1, 1, 4, 4};
  const auto cache = make_cache(shape, 10);
  const Scored none = run_score(StreamingLlmScorer{}, cache, NoEvidence{});
  EXPECT_EQ(run_score(StreamingLlmScorer{}, cache, make_queries(shape, 3, 10).view()).score, none.score);
  EXPECT_EQ(StreamingLlmScorer::workspace_bytes(cache, NoEvidence{}, 4), 0u);
}

TEST(StreamingLlm, RefusesSinksOutOfRangeAndATableOfOtherRows) {
  for (const Index bad : {Index{-1}, kMaxRows + 1}) {
    EXPECT_TRUE(says(StreamingLlmScorer({.sinks = bad}).validate(), StatusCode::invalid_argument, "sinks"));
  }
  const auto cache = make_cache({1, 1, 4, 4}, 10);
  Scored scored = run_score(StreamingLlmScorer{}, cache, NoEvidence{});
  scored.score.pop_back();
  SerialExecutor serial;
  EXPECT_TRUE(says(StreamingLlmScorer{}.score(cache, NoEvidence{}, scored.table(), {}, serial),
                   StatusCode::size_mismatch, "table"));
}

}  // namespace
}  // namespace kvfold::test
