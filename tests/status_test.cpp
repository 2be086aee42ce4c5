// Status and Result: how the library says no.
#include <kvfold/status.hpp>

#include <memory>
#include <set>
#include <string_view>

#include <gtest/gtest.h>

namespace kvfold {
namespace {

constexpr StatusCode kCodes[] = {
    StatusCode::ok,          StatusCode::invalid_argument,    StatusCode::size_mismatch, StatusCode::not_finite,
    StatusCode::unsupported, StatusCode::workspace_too_small, StatusCode::out_of_memory, StatusCode::engine_failed};

TEST(StatusTest, IsOkUnlessToldOtherwise) {
  static_assert(Status{}.ok());
  EXPECT_EQ(Status{}.code(), StatusCode::ok);
  EXPECT_EQ(Status{}.argument(), "");
  EXPECT_EQ(Status{}.head(), -1);
  EXPECT_EQ(Status{}.row(), -1);
}

TEST(StatusTest, TellsTheArgumentTheReasonAndThePlace) {
  constexpr Status status(StatusCode::not_finite, "keys", "has a NaN", 3, 17);
  static_assert(!status.ok());
  EXPECT_EQ(status.code(), StatusCode::not_finite);
  EXPECT_EQ(status.argument(), "keys");
  EXPECT_EQ(status.detail(), "has a NaN");
  EXPECT_EQ(status.head(), 3);
  EXPECT_EQ(status.row(), 17);
}

TEST(StatusTest, EveryCodeHasANameOfItsOwn) {
  std::set<std::string_view> names;
  for (const StatusCode code : kCodes) names.insert(to_string(code));
  EXPECT_EQ(names.size(), std::size(kCodes));
  EXPECT_FALSE(names.contains("unknown"));
  EXPECT_EQ(to_string(static_cast<StatusCode>(200)), "unknown");
}

TEST(ResultTest, HoldsAValueOrTheReasonWhyThereIsNone) {
  const Result<int> value = 5;
  ASSERT_TRUE(value.ok());
  EXPECT_EQ(value.value(), 5);
  EXPECT_TRUE(value.status().ok());
  const Result<int> none = Status{StatusCode::out_of_memory, "rows", "no memory"};
  EXPECT_FALSE(none.ok());
  EXPECT_EQ(none.status().code(), StatusCode::out_of_memory);
  EXPECT_EQ(none.status().argument(), "rows");
}

TEST(ResultTest, CarriesValuesThatCanOnlyMove) {
  Result<std::unique_ptr<int>> made = std::make_unique<int>(7);
  ASSERT_TRUE(made.ok());
  const std::unique_ptr<int> taken = std::move(made).value();
  EXPECT_EQ(*taken, 7);
}

TEST(ResultTest, ReachesMembersOfTheValue) {
  Result<std::string_view> text = std::string_view("abc");
  EXPECT_EQ(text->size(), 3u);
  text.value() = "de";
  EXPECT_EQ(std::as_const(text)->size(), 2u);
}

}  // namespace
}  // namespace kvfold
