// PagePool: pages out, pages in, and slabs that really go back.
#include <kvfold/storage/page_pool.hpp>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <set>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "builders.hpp"
#include "counting_memory.hpp"

namespace kvfold {
namespace {

struct PoolTag {};
using Memory = test::CountingMemory<PoolTag>;
using Pool = PagePool<Memory>;

class PagePoolTest : public testing::Test {
 protected:
  PagePoolTest() { Memory::reset(); }
  ~PagePoolTest() override { EXPECT_EQ(Memory::live, 0u) << "memory leaks"; }

  static std::vector<PageId> take(Pool& pool, Index n) {
    std::vector<PageId> pages(static_cast<std::size_t>(n), -1);
    EXPECT_TRUE(pool.allocate(pages).ok());
    return pages;
  }
};

TEST_F(PagePoolTest, HoldsNoMemoryUntilAPageIsNeeded) {
  Pool pool = Pool::create({.page_bytes = 100, .pages_per_slab = 8, .max_slabs = 3}).value();
  EXPECT_EQ(pool.live_bytes(), 0);
  EXPECT_EQ(Memory::live, 0u);
  EXPECT_EQ(pool.pages_free(), 0);
  EXPECT_EQ(pool.page_bytes(), 112u) << "rounded up";
  const auto pages = take(pool, 1);
  EXPECT_EQ(pool.pages_in_use(), 1);
  EXPECT_EQ(pool.pages_free(), 7);
  EXPECT_EQ(pool.live_bytes(), static_cast<Index>(Memory::live));
  EXPECT_GE(pool.live_bytes(), 8 * 112);
  EXPECT_TRUE(pool.release(pages).ok());
}

TEST_F(PagePoolTest, GivesEachPageOnceAndAligned) {
  for (const Index per_slab : {1, 5, 64, 65, 200}) {
    Pool pool = Pool::create({.page_bytes = 24, .pages_per_slab = per_slab, .max_slabs = 3}).value();
    auto pages = take(pool, 2);
    const auto more = take(pool, 3 * per_slab - 2 > 0 ? 3 * per_slab - 2 : 1);
    pages.insert(pages.end(), more.begin(), more.end());
    std::set<PageId> ids(pages.begin(), pages.end());
    EXPECT_EQ(static_cast<Index>(ids.size()), 3 * per_slab);
    EXPECT_EQ(*ids.begin(), 0);
    EXPECT_EQ(*ids.rbegin(), 3 * per_slab - 1);
    for (const PageId id : pages) {
      EXPECT_EQ(reinterpret_cast<std::uintptr_t>(pool.page(id)) % Pool::kAlignment, 0u);
      std::memset(pool.page(id), id % 251, pool.page_bytes());
    }
    for (const PageId id : pages) {  // no page has been written through another
      const auto* bytes = pool.page(id);
      EXPECT_TRUE(std::all_of(bytes, bytes + 24, [&](std::byte b) { return b == static_cast<std::byte>(id % 251); }));
    }
    EXPECT_TRUE(pool.release(pages).ok());
  }
}

TEST_F(PagePoolTest, GivesPagesAgainThatHaveComeBack) {
  Pool pool = Pool::create({.page_bytes = 16, .pages_per_slab = 4, .max_slabs = 2}).value();
  const auto pages = take(pool, 8);
  const std::vector<PageId> back{6, 1, 3};
  ASSERT_TRUE(pool.release(back).ok());
  EXPECT_EQ(pool.pages_free(), 3);
  EXPECT_EQ(take(pool, 3), (std::vector<PageId>{1, 3, 6})) << "from the first slab first";
  EXPECT_TRUE(pool.release(pages).ok());
}

TEST_F(PagePoolTest, GivesAllPagesThatAreAskedForOrNone) {
  Pool pool = Pool::create({.page_bytes = 16, .pages_per_slab = 4, .max_slabs = 2}).value();
  const auto pages = take(pool, 5);
  std::vector<PageId> four(4, -1);
  const Index live = pool.live_bytes();
  const Status status = pool.allocate(four);
  EXPECT_EQ(status.code(), StatusCode::out_of_memory);
  EXPECT_EQ(status.argument(), "pages");
  EXPECT_EQ(four, std::vector<PageId>(4, -1));
  EXPECT_EQ(pool.pages_in_use(), 5);
  EXPECT_EQ(pool.live_bytes(), live);
  EXPECT_TRUE(pool.allocate(std::span(four).first(3)).ok());
  EXPECT_TRUE(pool.allocate({}).ok());
  EXPECT_TRUE(pool.release(std::span(four).first(3)).ok());
  EXPECT_TRUE(pool.release(pages).ok());
}

TEST_F(PagePoolTest, KeepsNoSlabOfAnAllocationThatFailed) {
  Pool pool = Pool::create({.page_bytes = 16, .pages_per_slab = 4, .max_slabs = 5}).value();
  const auto pages = take(pool, 5);
  std::vector<PageId> more(12);
  for (const int failing_call : {0, 1}) {  // the first new slab, and the second
    const Index live = pool.live_bytes();
    Memory::calls = 0;
    Memory::fail_from = failing_call;
    EXPECT_EQ(pool.allocate(more).code(), StatusCode::out_of_memory);
    Memory::fail_from = -1;
    EXPECT_EQ(pool.live_bytes(), live);
    EXPECT_EQ(static_cast<Index>(Memory::live), live);
    EXPECT_EQ(pool.pages_in_use(), 5);
  }
  EXPECT_TRUE(pool.allocate(more).ok());
  EXPECT_TRUE(pool.release(more).ok());
  EXPECT_TRUE(pool.release(pages).ok());
}

TEST_F(PagePoolTest, TrimReleasesTheSlabsThatAreEmptyAndNoOther) {
  Pool pool = Pool::create({.page_bytes = 1000, .pages_per_slab = 4, .max_slabs = 4}).value();
  auto pages = take(pool, 16);
  EXPECT_EQ(pool.trim(), 0u);
  const std::vector<PageId> back{4, 5, 6, 7, 12, 13, 14, 15, 0};
  ASSERT_TRUE(pool.release(back).ok());
  const std::size_t before = Memory::live;
  const std::size_t freed = pool.trim();
  EXPECT_GE(freed, 8u * 1000);
  EXPECT_EQ(Memory::live, before - freed);
  EXPECT_EQ(pool.live_bytes(), static_cast<Index>(Memory::live));
  EXPECT_EQ(pool.pages_in_use(), 7);
  EXPECT_EQ(pool.pages_free(), 1);
  EXPECT_EQ(pool.trim(), 0u);
  EXPECT_EQ(take(pool, 6), (std::vector<PageId>{0, 4, 5, 6, 7, 12})) << "released slabs can come back";
  ASSERT_TRUE(pool.release(std::vector<PageId>{0, 4, 5, 6, 7, 12}).ok());
  ASSERT_TRUE(pool.release(std::vector<PageId>{1, 2, 3, 8, 9, 10, 11}).ok());
  pool.trim();
  EXPECT_EQ(Memory::live, 0u);
}

TEST_F(PagePoolTest, RefusesPagesThatAreNotInUse) {
  Pool pool = Pool::create({.page_bytes = 16, .pages_per_slab = 4, .max_slabs = 3}).value();
  const auto pages = take(pool, 3);
  for (const PageId wrong : {-1, 3, 4, 11, 12, INT32_MAX, INT32_MIN}) {
    const Status status = pool.release({&wrong, 1});
    EXPECT_EQ(status.code(), StatusCode::invalid_argument) << wrong;
    EXPECT_EQ(status.argument(), "pages");
    EXPECT_EQ(status.row(), wrong == -1 ? -1 : wrong);
  }
  EXPECT_EQ(pool.pages_in_use(), 3);
  EXPECT_FALSE(pool.release(std::vector<PageId>{0, 1, 1, 2}).ok()) << "a page that comes back twice";
  EXPECT_EQ(pool.pages_in_use(), 1) << "those before it have come back";
  EXPECT_TRUE(pool.release(std::vector<PageId>{2}).ok());
}

TEST_F(PagePoolTest, RefusesOptionsThatAreOutOfRange) {
  const auto argument = [](PagePoolOptions options) { return Pool::create(options).status().argument(); };
  constexpr std::size_t huge = std::numeric_limits<std::size_t>::max();
  EXPECT_EQ(argument({.page_bytes = 0}), "page_bytes");
  EXPECT_EQ(argument({.page_bytes = huge}), "page_bytes");
  EXPECT_EQ(argument({.page_bytes = huge / 8, .pages_per_slab = 8}), "page_bytes");
  EXPECT_EQ(argument({.page_bytes = 1, .pages_per_slab = 0}), "pages_per_slab");
  EXPECT_EQ(argument({.page_bytes = 1, .pages_per_slab = -5}), "pages_per_slab");
  EXPECT_EQ(argument({.page_bytes = 1, .pages_per_slab = kMaxRows, .max_slabs = 2}), "pages_per_slab");
  EXPECT_EQ(argument({.page_bytes = 1, .max_slabs = 0}), "max_slabs");
  EXPECT_EQ(argument({.page_bytes = 1, .max_slabs = (1 << 16) + 1}), "max_slabs");
  EXPECT_TRUE(Pool::create({.page_bytes = 1, .pages_per_slab = kMaxRows, .max_slabs = 1}).ok());
}

TEST_F(PagePoolTest, AnEmptyPoolCanMoveWithItsSlabs) {
  Pool pool = Pool::create({.page_bytes = 16, .pages_per_slab = 4, .max_slabs = 2}).value();
  ASSERT_TRUE(pool.release(take(pool, 3)).ok());
  Pool moved = std::move(pool);
  EXPECT_EQ(moved.pages_free(), 4);
  EXPECT_EQ(moved.live_bytes(), static_cast<Index>(Memory::live));
  PageId page = 0;
  EXPECT_EQ(pool.allocate({&page, 1}).code(), StatusCode::out_of_memory)
      << "nothing is left here";  // NOLINT: on purpose
  EXPECT_FALSE(pool.release({&page, 1}).ok());
  EXPECT_EQ(pool.trim(), 0u);
}

TEST(PagePoolOfManyThreads, LosesNoPage) {
  PagePool<> pool = PagePool<>::create({.page_bytes = 64, .pages_per_slab = 32, .max_slabs = 40}).value();
  std::vector<std::thread> threads;
  for (int worker = 0; worker < 4; ++worker) {
    threads.emplace_back([&pool, worker] {
      test::Random random(static_cast<std::uint64_t>(worker));
      std::vector<PageId> mine;
      for (int i = 0; i < 300; ++i) {
        const auto n = static_cast<std::size_t>(1 + random.below(20));
        if (mine.size() + n > 250) {
          for (const PageId id : mine) ASSERT_EQ(*pool.page(id), static_cast<std::byte>(worker)) << "another's page";
          ASSERT_TRUE(pool.release(std::span(mine).last(n)).ok());
          mine.resize(mine.size() - n);
          pool.trim();
          continue;
        }
        mine.resize(mine.size() + n);
        const auto fresh = std::span(mine).last(n);
        ASSERT_TRUE(pool.allocate(fresh).ok());
        for (const PageId id : fresh) *pool.page(id) = static_cast<std::byte>(worker);
      }
      ASSERT_TRUE(pool.release(mine).ok());
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(pool.pages_in_use(), 0);
  pool.trim();
  EXPECT_EQ(pool.live_bytes(), 0);
}

}  // namespace
}  // namespace kvfold
