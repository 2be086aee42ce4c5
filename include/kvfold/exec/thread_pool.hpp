/// \file
/// A small pool for programs that have none. Engines pass their own executor instead.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "kvfold/exec/executor.hpp"

namespace kvfold {

/// An executor over `threads` threads, the caller's among them. `run` may be called by one thread at a time.
class ThreadPool {
 public:
  /// \param threads threads that work together, the calling one included; below 1 counts as 1.
  explicit ThreadPool(Index threads) {
    const Index helpers = std::max<Index>(threads, 1) - 1;
    helpers_.reserve(static_cast<std::size_t>(helpers));
    for (Index worker = 1; worker <= helpers; ++worker) helpers_.emplace_back([this, worker] { serve(worker); });
  }

  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  ~ThreadPool() {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    wake_.notify_all();
    for (std::thread& helper : helpers_) helper.join();
  }

  [[nodiscard]] Index concurrency() const noexcept { return static_cast<Index>(helpers_.size()) + 1; }

  void run(Index n, TaskRef task) noexcept {
    if (n <= 0) return;
    if (n == 1 || helpers_.empty()) {
      for (Index i = 0; i < n; ++i) task(i, 0);
      return;
    }
    {
      const std::lock_guard lock(mutex_);
      task_ = &task;
      count_ = n;
      next_.store(0, std::memory_order_relaxed);
      busy_ = static_cast<Index>(helpers_.size());
      ++generation_;
    }
    wake_.notify_all();
    work(task, n, 0);
    std::unique_lock lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
  }

 private:
  void work(TaskRef task, Index n, Index worker) noexcept {
    for (Index i = next_.fetch_add(1, std::memory_order_relaxed); i < n;
         i = next_.fetch_add(1, std::memory_order_relaxed)) {
      task(i, worker);
    }
  }

  void serve(Index worker) {
    Index seen = 0;
    std::unique_lock lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return stopping_ || generation_ != seen; });
      if (stopping_) return;
      seen = generation_;
      const TaskRef task = *task_;
      const Index n = count_;
      lock.unlock();
      work(task, n, worker);
      lock.lock();
      if (--busy_ == 0) done_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> helpers_;
  std::atomic<Index> next_{0};
  const TaskRef* task_ = nullptr;
  Index count_ = 0;
  Index busy_ = 0;
  Index generation_ = 0;
  bool stopping_ = false;
};

static_assert(Executor<ThreadPool>);

}  // namespace kvfold
