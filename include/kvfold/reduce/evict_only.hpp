/// \file
/// The reference reducer: the best rows stay, the others go.
#pragma once

#include "kvfold/reduce/tiers.hpp"

namespace kvfold {

/// Keeps the B_h best rows of each head. Cost O(T_h) per head.
class EvictOnly {
 public:
  struct Options {
    [[nodiscard]] static Status validate() noexcept { return {}; }
  };

  EvictOnly() noexcept = default;
  explicit EvictOnly(Options /*options*/) noexcept {}

  [[nodiscard]] static Status validate() noexcept { return {}; }

  template <KVCacheView V>
  [[nodiscard]] static std::size_t workspace_bytes(const V& view, RowLimits limits, Index /*workers*/) noexcept {
    detail::Arena arena;
    const Index heads = view.shape().kv_heads, rows = detail::total_rows(view);
    static_cast<void>(detail::take_tiers(arena, heads, rows, std::min(limits.total, rows), 0));
    static_cast<void>(arena.take<Index>(heads + 1));
    return arena.required_bytes();
  }

  template <KVCacheView V, Executor X>
  [[nodiscard]] Result<CompressionPlan> reduce(const V& view, const ScoreTable& table, std::span<const Index> budgets,
                                               Workspace workspace, X& executor) const noexcept {
    detail::Arena arena(workspace);
    const Result<detail::Tiers> tiers = detail::make_tiers(view, table, budgets, {}, arena, executor);
    if (!tiers.ok()) return tiers.status();
    const std::span<Index> merged_offset = arena.take<Index>(view.shape().kv_heads + 1);
    if (Status bad = detail::check(arena); !bad.ok()) return bad;
    std::fill(merged_offset.begin(), merged_offset.end(), Index{0});
    return detail::plan_of(view.shape(), tiers.value(), merged_offset);
  }
};

}  // namespace kvfold
