// What a view need not have, and what is assumed without it.
#include <kvfold/compressor.hpp>
#include <kvfold/detail/rows.hpp>

#include <algorithm>
#include <vector>

#include <gtest/gtest.h>

#include "builders.hpp"

namespace kvfold {
namespace {

/// A view that has the five required functions, and no more.
class MinimalView {
 public:
  explicit MinimalView(const RaggedCache<float>& cache) : cache_(&cache) {}

  [[nodiscard]] LayerShape shape() const noexcept { return cache_->shape(); }
  [[nodiscard]] Index size(Index h) const noexcept { return cache_->size(h); }
  [[nodiscard]] Position position(Index h, Index t) const noexcept { return cache_->position(h, t); }
  void read_keys(Index h, Index t, Index n, std::span<float> out) const noexcept { cache_->read_keys(h, t, n, out); }
  void read_values(Index h, Index t, Index n, std::span<float> out) const noexcept {
    cache_->read_values(h, t, n, out);
  }

 private:
  const RaggedCache<float>* cache_;
};

/// The same with types that only convert to those of the contract: engines count in 32 bits.
struct NarrowView : MinimalView {
  using MinimalView::MinimalView;
  [[nodiscard]] int size(Index h) const noexcept { return static_cast<int>(MinimalView::size(h)); }
  [[nodiscard]] int position(Index h, Index t) const noexcept { return static_cast<int>(MinimalView::position(h, t)); }
};

static_assert(KVCacheView<MinimalView> && KVCacheView<NarrowView>);
static_assert(!MutableKVCacheView<MinimalView>);
static_assert(!HasLogMass<MinimalView> && !HasWritableLogMass<MinimalView> && !MayLackLogMass<MinimalView>);
static_assert(!HasContiguousRows<MinimalView> && !HasStoredRows<MinimalView> && !HasRope<MinimalView>);
static_assert(HasStoredRows<RaggedCache<Float16, BlockQ8_0>> && HasStoredRows<RaggedCache<Int8>>);
static_assert(!HasLiveBytes<MinimalView> && !HasOwnCheck<MinimalView>);
static_assert(HasLiveBytes<RaggedCache<float>>);
static_assert(!HasRowBytes<MinimalView> && !HasRowCounts<MinimalView> && !HasChannelRotation<MinimalView>);

constexpr LayerShape kShape{.kv_heads = 2, .group_size = 2, .key_dim = 8, .value_dim = 6};

TEST(OptionalCapabilities, WithoutThemDefaultsAreAssumed) {
  const auto cache = test::make_cache(kShape, 10);
  const MinimalView view(cache);
  EXPECT_EQ(rope_of(view).kind, RopeKind::unknown);
  EXPECT_EQ(row_counts_of(view), RowCounts::per_head);
  EXPECT_EQ(row_bytes_of(view, 0), 0);
  EXPECT_EQ(live_bytes_of(view), 0);
  EXPECT_TRUE(own_check_of(view).ok());
  EXPECT_EQ(channel_rotation_of(view).key_block, 0);
  EXPECT_EQ(channel_rotation_of(view).value_block, 0);
  EXPECT_EQ(log_mass_of(view, 0, 0), 0.f);
  EXPECT_FALSE(can_store_log_mass(view));
}

/// Complains once its shape is in range, and must then be left alone.
struct ComplainingView : MinimalView {
  using MinimalView::MinimalView;
  [[nodiscard]] static Status check() noexcept { return {StatusCode::invalid_argument, "tables", "are wrong", 1, 7}; }
  [[nodiscard]] static Index size(Index) noexcept {
    ADD_FAILURE() << "rows were asked for";
    return 1;
  }
};

TEST(OptionalCapabilities, AViewsOwnComplaintIsHeardBeforeItsRowsAreLookedAt) {
  static_assert(HasOwnCheck<ComplainingView>);
  const auto cache = test::make_cache(kShape, 10);
  SerialExecutor executor;
  const Status status = detail::check_view(ComplainingView(cache), executor);
  EXPECT_EQ(status.argument(), "tables");
  EXPECT_EQ(status.head(), 1);
  EXPECT_EQ(status.row(), 7);
}

/// Log masses that can be read but not written.
struct ReadOnlyMasses : MinimalView {
  using MinimalView::MinimalView;
  [[nodiscard]] float log_mass(Index, Index) const noexcept { return 0.5f; }
};
/// Log masses without a say at run time: the place is always there.
struct Masses : ReadOnlyMasses {
  using ReadOnlyMasses::ReadOnlyMasses;
  void write_log_mass(Index, Index, float) noexcept {}
};

TEST(OptionalCapabilities, LogMassesCanBeReadOnlyOrAlwaysThere) {
  const auto cache = test::make_cache(kShape, 10);
  EXPECT_EQ(log_mass_of(ReadOnlyMasses(cache), 0, 0), 0.5f);
  EXPECT_FALSE(can_store_log_mass(ReadOnlyMasses(cache)));
  EXPECT_TRUE(can_store_log_mass(Masses(cache)));
}

TEST(OptionalCapabilities, RowsThatCannotBeUsedInPlaceAreCopied) {
  const auto cache = test::make_cache(kShape, 10);
  const MinimalView view(cache);
  std::vector<float> scratch(4 * 8);
  EXPECT_EQ(detail::key_tile(view, 1, 3, 4, scratch), scratch.data());
  EXPECT_TRUE(std::equal(scratch.begin(), scratch.end(), cache.key_rows(1, 3, 4)));
  EXPECT_EQ(detail::value_tile(view, 1, 3, 4, scratch), scratch.data());
  EXPECT_TRUE(std::equal(scratch.begin(), scratch.begin() + 4 * 6, cache.value_rows(1, 3, 4)));
  EXPECT_EQ(detail::key_tile(cache, 1, 3, 4, scratch), cache.key_rows(1, 3, 4))
      << "with the capability, nothing is copied";
}

template <class View>
CompressionPlan plan_with(const View& view, const QueryRows& queries, WorkspaceBuffer& buffer) {
  const EmsEvict method({.budget = {.rows = 30}});
  SerialExecutor executor;
  EXPECT_TRUE(buffer.reserve(method.workspace_bytes(view, queries, 1).value()).ok());
  const auto plan = method.plan(view, queries, buffer.get(), executor);
  EXPECT_TRUE(plan.ok());
  return plan.value();
}

TEST(OptionalCapabilities, FiveFunctionsAreEnoughToPlanAndThePlanIsTheSame) {
  const auto cache = test::make_cache(kShape, 200);
  const auto queries = test::make_queries(kShape, 50, 200);
  WorkspaceBuffer first, second, third;
  const CompressionPlan expected = plan_with(cache, queries.view(), first);
  const CompressionPlan minimal = plan_with(MinimalView(cache), queries.view(), second);
  const CompressionPlan narrow = plan_with(NarrowView(cache), queries.view(), third);
  ASSERT_EQ(expected.kept.size(), 60u);
  EXPECT_TRUE(std::equal(expected.kept.begin(), expected.kept.end(), minimal.kept.begin(), minimal.kept.end()));
  EXPECT_TRUE(std::equal(expected.kept.begin(), expected.kept.end(), narrow.kept.begin(), narrow.kept.end()));
}

TEST(OptionalCapabilities, ReportsOfViewsWithoutRowBytesCountRowsOnly) {
  const auto cache = test::make_cache(kShape, 200);
  const auto queries = test::make_queries(kShape, 50, 200);
  WorkspaceBuffer buffer;
  const CompressionPlan plan = plan_with(MinimalView(cache), queries.view(), buffer);
  const CompressionReport report = report_of(plan, MinimalView(cache));
  EXPECT_EQ(report.rows_before, 400);
  EXPECT_EQ(report.rows_kept, 60);
  EXPECT_EQ(report.bytes_before, 0);
  EXPECT_EQ(report.bytes_after, 0);
  EXPECT_EQ(report_of(plan, cache).bytes_after, 60 * cache.row_bytes(0));
}

}  // namespace
}  // namespace kvfold
