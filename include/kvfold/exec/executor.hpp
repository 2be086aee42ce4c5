/// \file
/// How kvfold uses threads: it has none. The caller gives an executor; results are the same bits for every executor.
#pragma once

#include <concepts>
#include <memory>
#include <type_traits>

#include "kvfold/types.hpp"

namespace kvfold {

/// A non-owning reference to a callable `void(Index task, Index worker) noexcept`. Must not outlive the callable.
class TaskRef {
 public:
  // clang-format off
  template <class F>
    requires(!std::same_as<std::remove_cvref_t<F>, TaskRef> && std::invocable<F&, Index, Index>)
  TaskRef(F& f) noexcept  // NOLINT: implicit on purpose
      : object_(std::addressof(f)), call_([](void* object, Index task, Index worker) noexcept {
          (*static_cast<F*>(object))(task, worker);
        }) {}
  // clang-format on

  void operator()(Index task, Index worker) const noexcept { call_(object_, task, worker); }

 private:
  void* object_;
  void (*call_)(void*, Index, Index) noexcept;
};

/// Runs independent tasks.
///
/// - `concurrency()`: an upper bound on the number of tasks that run at the same time, at least 1; constant.
/// - `run(n, task)`: calls `task(i, worker)` once for each i in [0, n), in any order, and returns when all are done.
///   `worker` is in [0, concurrency()), and no two calls that overlap in time have the same one.
// clang-format off
template <class X>
concept Executor = requires(X& x, const X& cx, Index n, TaskRef task) {
  { cx.concurrency() } noexcept -> std::convertible_to<Index>;
  { x.run(n, task) } noexcept;
};
// clang-format on

/// The reference: one task after the other, on the calling thread.
struct SerialExecutor {
  [[nodiscard]] static constexpr Index concurrency() noexcept { return 1; }
  void run(Index n, TaskRef task) const noexcept {
    for (Index i = 0; i < n; ++i) task(i, 0);
  }
};

static_assert(Executor<SerialExecutor>);

}  // namespace kvfold
