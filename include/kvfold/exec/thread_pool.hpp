/// \file
/// A small pool for programs that have none. Engines pass their own executor instead.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
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
    busy_.store(static_cast<std::uint32_t>(helpers_.size()), std::memory_order_relaxed);
    generation_.fetch_add(1, std::memory_order_release);
    generation_.notify_all();
    work(task, n, 0);
    for (std::uint32_t left = busy_.load(std::memory_order_acquire); left != 0;) {
      left = wait_for_change(busy_, left);
    }
  }

 private:
  /// \returns what it has become.
  static std::uint32_t wait_for_change(const std::atomic<std::uint32_t>& x, std::uint32_t old) noexcept {
    constexpr int kLooks = 100;
    for (int i = 0; i < kLooks; ++i) {
      if (const std::uint32_t now = x.load(std::memory_order_acquire); now != old) return now;
      std::this_thread::yield();
    }
    x.wait(old, std::memory_order_acquire);
    return x.load(std::memory_order_acquire);
  }

  void work(TaskRef task, Index n, Index worker) noexcept {
    for (Index i = next_.fetch_add(1, std::memory_order_relaxed); i < n;
         i = next_.fetch_add(1, std::memory_order_relaxed)) {
      task(i, worker);
    }
  }

  void serve(Index worker) {
    for (std::uint32_t seen = 0;;) {  // a generation ends when all helpers are done with it: none is missed
      seen = wait_for_change(generation_, seen);
      if (task_ == nullptr) return;
      work(*task_, count_, worker);
      busy_.fetch_sub(1, std::memory_order_acq_rel);
      busy_.notify_one();
    }
  }

  std::vector<std::thread> helpers_;
  std::atomic<Index> next_{0};
  std::atomic<std::uint32_t> busy_{0}, generation_{0};  // of a size that the system can wait for
  const TaskRef* task_ = nullptr;                       // of this generation; null ends the helpers
  Index count_ = 0;
};

static_assert(Executor<ThreadPool>);

}  // namespace kvfold
