// WorkspaceBuffer: memory that a caller keeps between calls.
#include <kvfold/exec/workspace.hpp>

#include <algorithm>
#include <limits>

#include <gtest/gtest.h>

namespace kvfold {
namespace {

TEST(WorkspaceBufferTest, IsEmptyAtFirst) {
  const WorkspaceBuffer buffer;
  EXPECT_EQ(buffer.size_bytes(), 0u);
  EXPECT_TRUE(buffer.get().empty());
}

TEST(WorkspaceBufferTest, GivesAsManyBytesAsAskedForAndAllCanBeWritten) {
  WorkspaceBuffer buffer;
  ASSERT_TRUE(buffer.reserve(1000).ok());
  ASSERT_EQ(buffer.get().size(), 1000u);
  std::fill(buffer.get().begin(), buffer.get().end(), std::byte{1});
  EXPECT_EQ(buffer.get().back(), std::byte{1});
}

TEST(WorkspaceBufferTest, OnlyGrows) {
  WorkspaceBuffer buffer;
  ASSERT_TRUE(buffer.reserve(1000).ok());
  const std::byte* place = buffer.get().data();
  for (const std::size_t less : {999u, 0u, 1000u}) {
    ASSERT_TRUE(buffer.reserve(less).ok());
    EXPECT_EQ(buffer.size_bytes(), 1000u);
    EXPECT_EQ(buffer.get().data(), place) << "nothing is allocated for less than there is";
  }
  ASSERT_TRUE(buffer.reserve(5000).ok());
  EXPECT_EQ(buffer.size_bytes(), 5000u);
}

// Sanitizers stop the program at such a size, unless told otherwise.
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
TEST(WorkspaceBufferTest, SaysWhenThereIsNoMemoryAndKeepsWhatItHas) {
  WorkspaceBuffer buffer;
  ASSERT_TRUE(buffer.reserve(100).ok());
  for (const std::size_t huge :
       {std::numeric_limits<std::size_t>::max() / 4, std::numeric_limits<std::size_t>::max()}) {
    const Status status = buffer.reserve(huge);
    EXPECT_EQ(status.code(), StatusCode::out_of_memory) << huge;
    EXPECT_EQ(status.argument(), "bytes") << huge;
    EXPECT_EQ(buffer.size_bytes(), 100u) << huge;
  }
}
#endif

}  // namespace
}  // namespace kvfold
