// Executors: every task once, and worker numbers that can index scratch memory.
#include <kvfold/exec/thread_pool.hpp>

#include <atomic>
#include <chrono>
#include <memory>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

namespace kvfold {
namespace {

/// Runs n tasks and watches what the contract of `Executor` promises.
template <class X>
void expect_contract(X& executor, Index n) {
  const auto workers = static_cast<std::size_t>(executor.concurrency());
  std::vector<std::atomic<int>> runs(static_cast<std::size_t>(std::max<Index>(n, 0)));
  std::vector<std::atomic<int>> inside(workers);
  std::atomic<int> broken{0};
  auto task = [&](Index i, Index worker) noexcept {
    if (i < 0 || i >= n || worker < 0 || worker >= static_cast<Index>(workers)) {
      ++broken;
      return;
    }
    if (inside[static_cast<std::size_t>(worker)].fetch_add(1) != 0) ++broken;
    for (int spin = 0; spin < 50; ++spin) runs[static_cast<std::size_t>(i)].load();
    ++runs[static_cast<std::size_t>(i)];
    inside[static_cast<std::size_t>(worker)].fetch_sub(1);
  };
  executor.run(n, task);
  ASSERT_EQ(broken, 0) << "a number out of range, or a worker at two places";
  for (const auto& count : runs) ASSERT_EQ(count, 1);
}

TEST(SerialExecutorTest, RunsTasksInOrderAsWorkerZero) {
  std::vector<Index> order;
  auto task = [&](Index i, Index worker) {
    EXPECT_EQ(worker, 0);
    order.push_back(i);
  };
  SerialExecutor executor;
  executor.run(4, task);
  EXPECT_EQ(order, (std::vector<Index>{0, 1, 2, 3}));
  EXPECT_EQ(executor.concurrency(), 1);
}

class ThreadPoolTest : public testing::TestWithParam<Index> {};
INSTANTIATE_TEST_SUITE_P(Threads, ThreadPoolTest, testing::Values(1, 2, 3, 8), testing::PrintToStringParamName());

TEST_P(ThreadPoolTest, HasTheConcurrencyItWasMadeWith) { EXPECT_EQ(ThreadPool(GetParam()).concurrency(), GetParam()); }

TEST_P(ThreadPoolTest, RunsEachTaskOnceAndNoWorkerTwiceAtATime) {
  ThreadPool pool(GetParam());
  for (const Index n : {0, 1, 2, 3, 7, 8, 9, 1000}) expect_contract(pool, n);
}

TEST_P(ThreadPoolTest, CanBeUsedThousandsOfTimes) {
  ThreadPool pool(GetParam());
  for (Index i = 0; i < 2000; ++i) expect_contract(pool, i % 5);
}

TEST_P(ThreadPoolTest, WakesUpAfterItHasSlept) {
  ThreadPool pool(GetParam());
  for (int i = 0; i < 30; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(i % 3));  // longer than helpers look out for work
    std::atomic<Index> sum{0};
    auto task = [&](Index n, Index) noexcept {
      if (n % 4 == 0) std::this_thread::sleep_for(std::chrono::microseconds(700));  // and longer than `run` does
      sum += n;
    };
    pool.run(9, task);
    ASSERT_EQ(sum, 36);
  }
}

TEST_P(ThreadPoolTest, WhatTasksWroteIsSeenAfterRun) {
  ThreadPool pool(GetParam());
  std::vector<Index> plain(257);
  for (Index round = 1; round <= 50; ++round) {
    auto task = [&](Index i, Index) noexcept { plain[static_cast<std::size_t>(i)] += i * round; };
    pool.run(static_cast<Index>(plain.size()), task);
  }
  for (Index i = 0; i < 257; ++i) ASSERT_EQ(plain[static_cast<std::size_t>(i)], i * 50 * 51 / 2);
}

TEST(ThreadPoolOfAnySize, LessThanOneThreadCountsAsOne) {
  for (const Index threads : {Index{0}, Index{-1}, INT64_MIN}) {
    ThreadPool pool(threads);
    EXPECT_EQ(pool.concurrency(), 1) << threads;
    expect_contract(pool, 3);
  }
}

TEST(ThreadPoolOfAnySize, ANegativeNumberOfTasksIsNone) {
  ThreadPool pool(2);
  expect_contract(pool, -5);
}

TEST(ThreadPoolOfAnySize, CanBeMadeAndDroppedWithoutWork) {
  for (int i = 0; i < 20; ++i) EXPECT_EQ(ThreadPool(4).concurrency(), 4);
}

}  // namespace
}  // namespace kvfold
