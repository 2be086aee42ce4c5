// Statuses as text and as exceptions, for programs that use them.
#include <kvfold/throwing.hpp>

#include <gtest/gtest.h>

namespace kvfold {
namespace {

TEST(ThrowingTest, ReadsAsOneLine) {
  EXPECT_EQ(to_text(Status{}), "ok");
  EXPECT_EQ(to_text({StatusCode::not_finite, "keys", "has a NaN", 3, 17}),
            "keys: has a NaN (not finite, head 3, row 17)");
  EXPECT_EQ(to_text({StatusCode::invalid_argument, "tau", "must be in [0, 1]"}),
            "tau: must be in [0, 1] (invalid argument)");
}

TEST(ThrowingTest, ThrowsTheStatusOfWhatFailed) {
  const Status bad(StatusCode::invalid_argument, "tau", "must be in [0, 1]");
  try {
    or_throw(bad);
    FAIL() << "nothing was thrown";
  } catch (const Error& error) {
    EXPECT_EQ(error.status().argument(), "tau");
    EXPECT_EQ(error.what(), to_text(bad));
  }
  EXPECT_THROW(static_cast<void>(or_throw(Result<int>(bad))), Error);
}

TEST(ThrowingTest, HandsOverWhatSucceeded) {
  EXPECT_NO_THROW(or_throw(Status{}));
  EXPECT_EQ(or_throw(Result<int>(3)), 3);
}

}  // namespace
}  // namespace kvfold
