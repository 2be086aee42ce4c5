#include <kvfold/score/scorer.hpp>

#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "attention_oracle.hpp"

namespace kvfold::test {
namespace {

/// Marks as letters: s for sinks, r for recent rows, a dot for the others.
std::string marks(Protect protect, std::size_t rows) {
  std::vector<Protection> protection(rows, Protection{77});
  protect.mark(protection);
  std::string letters;
  for (const Protection p : protection) {
    letters += p == Protection::sink ? 's' : p == Protection::recent ? 'r' : p == Protection::none ? '.' : '?';
  }
  return letters;
}

TEST(Protect, MarksTheFirstAndTheLastRows) {
  EXPECT_EQ(marks({.sinks = 2, .recent = 3}, 8), "ss...rrr");
  EXPECT_EQ(marks({.sinks = 0, .recent = 0}, 3), "...");
  EXPECT_EQ(marks({.sinks = 1, .recent = 0}, 3), "s..");
  EXPECT_EQ(marks({.sinks = 0, .recent = 1}, 3), "..r");
}

TEST(Protect, GivesSinksTheRowsThatAreBoth) {
  EXPECT_EQ(marks({.sinks = 2, .recent = 3}, 4), "ssrr");
  EXPECT_EQ(marks({.sinks = 5, .recent = 3}, 4), "ssss");
  EXPECT_EQ(marks({.sinks = 1, .recent = kMaxRows}, 3), "srr");
  EXPECT_EQ(marks({.sinks = kMaxRows, .recent = kMaxRows}, 2), "ss");
}

TEST(Protect, LeavesNoRowEvictableWhereAllAreProtected) {
  for (Index rows = 1; rows < 8; ++rows) {
    const Protect protect{.sinks = 4, .recent = 3};
    EXPECT_EQ(protect.first_evictable(rows), std::min<Index>(rows, 4));
    EXPECT_EQ(protect.end_evictable(rows), protect.first_evictable(rows));
  }
}

}  // namespace
}  // namespace kvfold::test
