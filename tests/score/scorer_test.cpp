#include <kvfold/score/scorer.hpp>

#include <algorithm>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "builders.hpp"

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

using detail::at;

std::vector<float> weights(Index n, Random& random) {
  std::vector<float> x(at(n));
  for (float& w : x) w = static_cast<float>(random.uniform());
  return x;
}

TEST(TrailingMax, IsOfAsManyRowsBeforeAsThereAre) {
  Random random(5);
  for (Index n = 1; n <= 70; ++n) {
    const std::vector<float> x = weights(n, random);
    for (const Index width : {1, 2, 3, 5, 8, 13, 40, 100}) {
      std::vector<float> out(at(n + 1), -7.f);
      detail::trailing_max(x, width, std::span(out).first(at(n)));
      for (Index j = 0; j < n; ++j) {
        const auto first = x.begin() + std::max<Index>(j - width, 0);
        ASSERT_EQ(out[at(j)], j == 0 ? 0.f : *std::max_element(first, x.begin() + j)) << n << ' ' << width << ' ' << j;
      }
      EXPECT_EQ(out.back(), -7.f);
    }
  }
}

TEST(ReduceColumns, TakesTheLargestOrTheMeanOfAGroup) {
  Random random(6);
  for (const Index rows : {1, 7, 8, 33}) {
    for (const Index count : {1, 3, 4}) {
      const std::vector<float> columns = weights(count * rows, random);
      for (const bool by_max : {true, false}) {
        std::vector<float> out(at(rows));
        detail::reduce_columns(columns, rows, by_max, out);
        for (Index j = 0; j < rows; ++j) {
          float most = 0.f, sum = 0.f;
          for (Index c = 0; c < count; ++c) {
            most = std::max(most, columns[at(c * rows + j)]);
            sum += columns[at(c * rows + j)];
          }
          ASSERT_EQ(out[at(j)], by_max ? most : sum / static_cast<float>(count)) << rows << ' ' << count << ' ' << j;
        }
      }
    }
  }
}

}  // namespace
}  // namespace kvfold::test
