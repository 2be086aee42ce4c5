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
///
/// Threads that have nothing to do look out for work for about half a millisecond, letting others run meanwhile, before they
/// sleep: the stages of a policy, and the layers of a model, follow each other faster than threads wake up.
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
    begin(nullptr, 0);
    for (std::thread& helper : helpers_) helper.join();
  }

  [[nodiscard]] Index concurrency() const noexcept { return static_cast<Index>(helpers_.size()) + 1; }

  void run(Index n, TaskRef task) noexcept {
    if (n <= 0) return;
    if (n == 1 || helpers_.empty()) {
      for (Index i = 0; i < n; ++i) task(i, 0);
      return;
    }
    begin(&task, n);
    work(task, n, 0);
    wait_until(done_, [this] { return busy_.load(std::memory_order_acquire) == 0; });
  }

 private:
  /// Gives the helpers a task, or null: to end.
  void begin(const TaskRef* task, Index n) noexcept {
    {
      const std::lock_guard lock(mutex_);
      task_ = task;
      count_ = n;
      next_.store(0, std::memory_order_relaxed);
      busy_.store(static_cast<Index>(helpers_.size()), std::memory_order_relaxed);
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
  }

  template <class Condition>
  void wait_until(std::condition_variable& change, Condition holds) noexcept {
    constexpr int kLooks = 2000;
    for (int i = 0; i < kLooks; ++i) {
      if (holds()) return;
      std::this_thread::yield();
    }
    std::unique_lock lock(mutex_);
    change.wait(lock, holds);
  }

  void work(TaskRef task, Index n, Index worker) noexcept {
    for (Index i = next_.fetch_add(1, std::memory_order_relaxed); i < n;
         i = next_.fetch_add(1, std::memory_order_relaxed)) {
      task(i, worker);
    }
  }

  void serve(Index worker) noexcept {
    for (Index seen = 0;; ++seen) {  // a generation ends when all helpers are done with it: none is missed
      wait_until(wake_, [&] { return generation_.load(std::memory_order_acquire) != seen; });
      if (task_ == nullptr) return;
      work(*task_, count_, worker);
      if (busy_.fetch_sub(1, std::memory_order_acq_rel) > 1) continue;
      { const std::lock_guard lock(mutex_); }  // who waits has either seen this, or sleeps by now
      done_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> helpers_;
  std::atomic<Index> next_{0}, busy_{0}, generation_{0};
  const TaskRef* task_ = nullptr;  // of this generation; null ends the helpers
  Index count_ = 0;
};

static_assert(Executor<ThreadPool>);

}  // namespace kvfold
