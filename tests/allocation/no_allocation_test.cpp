// In steady state the library allocates nothing: every call to the heap is counted while it works.
// These tests have a program of their own because of how `heap_calls.hpp` counts. Where it cannot, they are skipped.
#include <kvfold/attend.hpp>
#include <kvfold/batch.hpp>
#include <kvfold/compressor.hpp>
#include <kvfold/evidence/global_local_accumulator.hpp>
#include <kvfold/exec/thread_pool.hpp>
#include <kvfold/view/strided.hpp>

#include <cstdlib>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "builders.hpp"
#include "heap_calls.hpp"
#include "paged_engine.hpp"

namespace kvfold {
namespace {

using test::heap_calls_of;

class HeapTest : public testing::Test {
 protected:
  void SetUp() override {
    if (!COUNTS_HEAP_CALLS) GTEST_SKIP() << "heap calls cannot be counted in this build";
  }
};

TEST_F(HeapTest, EveryWayToTheHeapIsCounted) {
  // Through volatile, so that the compiler does not remove pairs that it knows.
  void* volatile block = nullptr;
  EXPECT_EQ(heap_calls_of([] {}), 0);
  EXPECT_EQ(heap_calls_of([&] { block = std::malloc(10); }), 1);
  EXPECT_EQ(heap_calls_of([&] { block = std::realloc(block, 1000); }), 1);
  EXPECT_EQ(heap_calls_of([&] { std::free(block); }), 1);
  EXPECT_EQ(heap_calls_of([&] { block = ::operator new(10); }), 1);
  EXPECT_EQ(heap_calls_of([&] { ::operator delete(block); }), 1);
  EXPECT_EQ(heap_calls_of([&] { block = ::operator new (64, std::align_val_t{64}); }), 1);
  EXPECT_EQ(heap_calls_of([&] { ::operator delete (block, std::align_val_t{64}); }), 1);
  EXPECT_GE(heap_calls_of([&] { block = Eigen::internal::aligned_malloc(100); }), 1);
  EXPECT_GE(heap_calls_of([&] { Eigen::internal::aligned_free(block); }), 1);
}

constexpr Index kHeads = 2, kWindow = 16;

/// Sizes of a layer. Products of a single row or column take another way through Eigen, so some tiles end with one.
struct Sizes {
  Index group, width, rows, queries;
};
constexpr Sizes kSizes[] = {{2, 64, 300, 32}, {2, 128, 300, 32}, {2, 256, 300, 32}, {2, 512, 300, 32},
                            {1, 64, 257, 1},  {1, 257, 129, 65}, {3, 513, 257, 43}};

std::size_t at(Index i) { return static_cast<std::size_t>(i); }

/// An engine's cache that can be filled again without allocating.
template <class T>
class Engine {
 public:
  explicit Engine(const Sizes& sizes)
      : shape_{kHeads, sizes.group, sizes.width, sizes.width},
        capacity_(sizes.rows),
        keys_(stored(1)),
        values_(stored(2)),
        rows_(kHeads, sizes.rows),
        masses_(at(kHeads * sizes.rows)) {
    for (Index h = 0; h < kHeads; ++h) {
      for (Index t = 0; t < capacity_; ++t) positions_.push_back(t);
    }
    full_positions_ = positions_;
  }

  void refill() {
    std::fill(rows_.begin(), rows_.end(), capacity_);
    std::copy(full_positions_.begin(), full_positions_.end(), positions_.begin());
    std::fill(masses_.begin(), masses_.end(), 0.f);
  }
  StridedView<T> view() {
    return {.layer = shape_,
            .keys = keys_.data(),
            .key_strides = Strides::head_major(capacity_, shape_.key_dim),
            .values = values_.data(),
            .value_strides = Strides::transposed(capacity_, shape_.value_dim),
            .rows = rows_,
            .positions = positions_,
            .position_stride = capacity_,
            .log_masses = masses_,
            .log_mass_stride = capacity_,
            .rotation = {.kind = RopeKind::half_split, .rotary_dim = 64}};
  }
  [[nodiscard]] LayerShape shape() const { return shape_; }
  [[nodiscard]] Index capacity() const { return capacity_; }

 private:
  [[nodiscard]] std::vector<T> stored(std::uint64_t seed) const {
    test::Random random(seed);
    std::vector<T> out;
    for (const float x : test::clustered_rows(kHeads * capacity_, shape_.key_dim, 5, 0.3f, random)) {
      out.push_back(from_float<T>(x));
    }
    return out;
  }

  LayerShape shape_;
  Index capacity_;
  std::vector<T> keys_, values_;
  std::vector<Index> rows_;
  std::vector<Position> positions_, full_positions_;
  std::vector<float> masses_;
};

struct ElementName {
  template <class T>
  static std::string GetName(int) {  // NOLINT(readability-identifier-naming): GoogleTest's
    return std::same_as<T, float> ? "f32" : "f16";
  }
};

template <class T>
class NoAllocation : public HeapTest {
 protected:
  template <class F>
  static void for_sizes(F f) {
    for (const Sizes& sizes : kSizes) {
      SCOPED_TRACE(testing::Message() << "G = " << sizes.group << ", D = E = " << sizes.width
                                      << ", T = " << sizes.rows);
      Engine<T> engine(sizes);
      f(engine, test::make_queries(engine.shape(), sizes.queries, sizes.rows));
    }
  }

  /// Compresses twice: the second time is the steady state.
  template <class Method, class X>
  static void expect_none(const Method& method, Engine<T>& engine, const QueryRows& queries, X& executor) {
    auto view = engine.view();
    engine.refill();
    WorkspaceBuffer buffer;
    const auto bytes = method.workspace_bytes(view, queries, executor.concurrency());
    ASSERT_TRUE(bytes.ok());
    ASSERT_TRUE(buffer.reserve(bytes.value()).ok());
    bool ok = false;
    const auto work = [&] {
      const auto again = method.workspace_bytes(view, queries, executor.concurrency());
      const auto plan = method.plan(view, queries, buffer.get(), executor);
      ok = again.ok() && plan.ok() && apply(plan.value(), view).ok();
    };
    work();
    ASSERT_TRUE(ok);
    ASSERT_LT(view.size(0), engine.capacity());
    engine.refill();
    EXPECT_EQ(heap_calls_of(work), 0);
    EXPECT_TRUE(ok);
  }

  template <class Method>
  static void expect_none(const Method& method) {
    SerialExecutor serial;
    for_sizes([&](Engine<T>& engine, const test::OwnedQueries& queries) {
      expect_none(method, engine, queries.view(), serial);
    });
  }
};
using StoredTypes = testing::Types<float, Float16>;
TYPED_TEST_SUITE(NoAllocation, StoredTypes, ElementName);

TYPED_TEST(NoAllocation, EmsPlansAndAppliesWithoutTheHeap) {
  TestFixture::expect_none(Ems({.score = {.window = kWindow}, .budget = {.rows = 60}}));
}

TYPED_TEST(NoAllocation, EmsOnAThreadPoolPlansAndAppliesWithoutTheHeap) {
  ThreadPool pool(3);
  TestFixture::for_sizes([&](Engine<TypeParam>& engine, const test::OwnedQueries& queries) {
    TestFixture::expect_none(Ems({.score = {.window = kWindow}, .budget = {.rows = 60}}), engine, queries.view(), pool);
  });
}

TYPED_TEST(NoAllocation, BatchesAreCompressedWithoutTheHeap) {
  ThreadPool pool(2);
  const Ems method({.score = {.window = kWindow}, .budget = {.rows = 60}});
  std::vector<Engine<TypeParam>> engines;
  std::vector<test::OwnedQueries> queries;
  for (const Index rows : {900, 200, 150, 257, 129, 100, 100}) {  // the first is spread over its heads
    engines.emplace_back(Sizes{2, 64, rows, 32});
    queries.push_back(test::make_queries(engines.back().shape(), 32, rows));
  }
  std::vector<StridedView<TypeParam>> views;
  std::vector<QueryRows> evidence;
  for (std::size_t i = 0; i < engines.size(); ++i) {
    views.push_back(engines[i].view());
    evidence.push_back(queries[i].view());
  }
  std::vector<Result<CompressionReport>> results(views.size(), CompressionReport{});
  WorkspaceBuffer buffer;
  ASSERT_TRUE(buffer.reserve(batch_workspace_bytes(method, views, evidence, 2).value()).ok());
  bool ok = false;
  const auto work = [&] {
    ok = batch_workspace_bytes(method, views, evidence, 2).ok() &&
         compress_batch(method, views, evidence, results, buffer.get(), pool).ok();
  };
  work();
  ASSERT_TRUE(ok);
  for (auto& engine : engines) engine.refill();
  EXPECT_EQ(heap_calls_of(work), 0);
  EXPECT_TRUE(ok);
  for (const auto& result : results) EXPECT_TRUE(result.ok());
}

TYPED_TEST(NoAllocation, EmsThatRotatesKeysPlansAndAppliesWithoutTheHeap) {
  TestFixture::expect_none(Ems({.score = {.window = kWindow},
                                .budget = {.rows = 60},
                                .reduce = {.gamma = 3.f,
                                           .key_mode = KeyMode::rotated,
                                           .assigner = {.key_space = ZeroClassBatcher::KeySpace::unrotated}}}));
}

TYPED_TEST(NoAllocation, EmsEvictPlansAndAppliesWithoutTheHeap) {
  TestFixture::expect_none(EmsEvict({.score = {.window = kWindow}, .budget = {.rows = 60}}));
}

TYPED_TEST(NoAllocation, BaselinesPlanAndApplyWithoutTheHeap) {
  TestFixture::expect_none(StreamingLlm({.budget = {.rows = 60}}));
  TestFixture::expect_none(H2o({.score = {.recent = 30}, .budget = {.rows = 60}}));
  TestFixture::expect_none(SnapKv({.score = {.window = kWindow}, .budget = {.rows = 60}}));
  TestFixture::expect_none(Tova({.score = {}, .budget = {.rows = 60}}));
}

TYPED_TEST(NoAllocation, PagesWithEqualCountsPlanAndApplyWithoutTheHeap) {
  constexpr LayerShape shape{kHeads, 2, 64, 64};
  const auto cache = test::make_cache<TypeParam>(shape, 300);
  const auto queries = test::make_queries(shape, 32, 300);
  const Ems method({.score = {.window = kWindow}, .budget = {.rows = 60}});
  for (const RowCounts counts : {RowCounts::per_head, RowCounts::per_layer, RowCounts::per_model}) {
    test::PagedEngine<TypeParam, test::FlashInferNhd> engine(cache, 16);
    engine.counts = counts;
    auto view = engine.view();
    SerialExecutor executor;
    WorkspaceBuffer buffer;
    ASSERT_TRUE(buffer.reserve(method.workspace_bytes(view, queries.view(), 1).value()).ok());
    bool ok = false;
    const auto work = [&] { ok = method.compress(view, queries.view(), buffer.get(), executor).ok(); };
    const auto full_rows = engine.rows;
    const auto full_positions = engine.positions;
    work();
    ASSERT_TRUE(ok);
    std::copy(full_rows.begin(), full_rows.end(), engine.rows.begin());
    std::copy(full_positions.begin(), full_positions.end(), engine.positions.begin());
    EXPECT_EQ(heap_calls_of(work), 0);
    EXPECT_TRUE(ok);
    EXPECT_LT(engine.rows[0], 300);
  }
}

TYPED_TEST(NoAllocation, TheAccumulatorObservesAndSummarizesWithoutTheHeap) {
  ThreadPool pool(3);
  TestFixture::for_sizes([&](Engine<TypeParam>& engine, const test::OwnedQueries& queries) {
    auto accumulator = GlobalLocalAccumulator::create(engine.shape(), engine.capacity(), {.window = kWindow});
    ASSERT_TRUE(accumulator.ok());
    WorkspaceBuffer buffer;
    ASSERT_TRUE(buffer.reserve(accumulator->workspace_bytes(engine.capacity(), pool.concurrency())).ok());
    const auto view = engine.view();
    const auto last = test::make_queries(engine.shape(), 1, engine.capacity());
    bool ok = true;
    const auto work = [&] {
      accumulator->reset();
      ok = ok && accumulator->observe(view, queries.view(), buffer.get(), pool).ok();
      ok = ok && accumulator->observe(view, last.view(), buffer.get(), pool).ok();
      ok = ok && accumulator->summarize(view, buffer.get(), pool).ok();
    };
    work();
    EXPECT_EQ(heap_calls_of(work), 0);
    EXPECT_TRUE(ok);
  });
}

TYPED_TEST(NoAllocation, AttendWorksWithoutTheHeap) {
  ThreadPool pool(3);
  TestFixture::for_sizes([&](Engine<TypeParam>& engine, const test::OwnedQueries& queries) {
    const LayerShape shape = engine.shape();
    const Index rows = queries.view().rows();
    std::vector<float> out(at(shape.query_heads() * rows * shape.value_dim)), sums(at(shape.query_heads() * rows));
    const AttentionOutput output{out.data(), rows * shape.value_dim, shape.value_dim, sums};
    WorkspaceBuffer buffer;
    ASSERT_TRUE(buffer.reserve(attend_workspace_bytes(shape, pool.concurrency())).ok());
    const auto view = engine.view();
    bool ok = true;
    const auto work = [&] { ok = ok && attend(view, queries.view(), output, buffer.get(), pool).ok(); };
    work();
    EXPECT_EQ(heap_calls_of(work), 0);
    EXPECT_TRUE(ok);
  });
}

}  // namespace
}  // namespace kvfold
