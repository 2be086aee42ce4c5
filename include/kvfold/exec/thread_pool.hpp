/// \file
/// A small pool for programs that have none. Engines pass their own executor instead.
#pragma once

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "kvfold/exec/executor.hpp"

namespace kvfold {

/// An executor over `threads` threads, the caller's among them. `run` may be called by one thread at a time.
///
/// Threads that have nothing to do look out for work for some 50 us, letting others run meanwhile, before they sleep: the
/// stages of a policy follow each other faster than threads wake up.
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
    task_ = nullptr;
    generation_.fetch_add(1, std::memory_order_release);
    generation_.notify_all();
    for (std::thread& helper : helpers_) helper.join();
  }

  [[nodiscard]] Index concurrency() const noexcept { return static_cast<Index>(helpers_.size()) + 1; }

  void run(Index n, TaskRef task) noexcept {
    if (n <= 0) return;
    if (n == 1 || helpers_.empty()) {
      for (Index i = 0; i < n; ++i) task(i, 0);
      return;
    }
    task_ = &task;
    count_ = n;
    next_.store(0, std::memory_order_relaxed);
    busy_.store(concurrency() - 1, std::memory_order_relaxed);
    generation_.fetch_add(1, std::memory_order_release);
    generation_.notify_all();
    work(task, n, 0);
    for (Index left = busy_.load(std::memory_order_acquire); left != 0; left = busy_.load(std::memory_order_acquire)) {
      wait_for_change(busy_, left);
    }
  }

 private:
  static void wait_for_change(const std::atomic<Index>& x, Index old) noexcept {
    constexpr int kLooks = 100;
    for (int i = 0; i < kLooks; ++i) {
      if (x.load(std::memory_order_acquire) != old) return;
      std::this_thread::yield();
    }
    x.wait(old, std::memory_order_acquire);
  }

  void work(TaskRef task, Index n, Index worker) noexcept {
    for (Index i = next_.fetch_add(1, std::memory_order_relaxed); i < n;
         i = next_.fetch_add(1, std::memory_order_relaxed)) {
      task(i, worker);
    }
  }

  void serve(Index worker) {
    for (Index seen = 0;; ++seen) {  // a generation ends when all helpers are done with it: none is missed
      wait_for_change(generation_, seen);
      if (task_ == nullptr) return;
      work(*task_, count_, worker);
      busy_.fetch_sub(1, std::memory_order_acq_rel);
      busy_.notify_one();
    }
  }

  std::vector<std::thread> helpers_;
  std::atomic<Index> next_{0}, busy_{0}, generation_{0};
  const TaskRef* task_ = nullptr;  // of this generation; null ends the helpers
  Index count_ = 0;
};

static_assert(Executor<ThreadPool>);

}  // namespace kvfold
