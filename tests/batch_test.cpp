// Batches: each view is compressed as it would be alone, fails alone, and workers are kept busy.
#include <kvfold/batch.hpp>
#include <kvfold/exec/thread_pool.hpp>
#include <kvfold/storage/ragged_cache.hpp>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include <gtest/gtest.h>

#include "builders.hpp"
#include "merge_oracle.hpp"
#include "same_report.hpp"

namespace kvfold::test {
namespace {

using Results = std::vector<Result<CompressionReport>>;

constexpr LayerShape kShape{.kv_heads = 4, .group_size = 2, .key_dim = 16, .value_dim = 12};
constexpr Index kWindow = 8;

Ems ems() { return Ems({.score = {.window = kWindow}, .budget = {.rows = 20}}); }

Results no_results(std::size_t count) { return {count, CompressionReport{.rows_before = -1}}; }

/// Caches of some lengths, and the last queries of each.
struct Sequences {
  std::vector<RaggedCache<>> caches;
  std::vector<OwnedQueries> queries;
  std::vector<QueryRows> evidence;

  explicit Sequences(const std::vector<Index>& lengths, LayerShape shape = kShape) {
    for (const Index rows : lengths) {
      const auto seed = static_cast<std::uint64_t>(caches.size());
      caches.push_back(make_cache(shape, rows, seed));
      queries.push_back(make_queries(shape, std::min(kWindow, rows), rows, seed + 100));
    }
    for (const OwnedQueries& q : queries) evidence.push_back(q.view());
  }
};

/// Compresses in exactly the workspace that is asked for.
template <class Method, class Views, class Evidence, class X>
Status run(const Method& method, Views& views, const Evidence& evidence, Results& results, X&& executor) {
  const auto bytes = batch_workspace_bytes(method, views, evidence, executor.concurrency());
  if (!bytes.ok()) return bytes.status();
  WorkspaceBuffer buffer;
  if (Status bad = buffer.reserve(bytes.value()); !bad.ok()) return bad;
  return compress_batch(method, views, evidence, results, buffer.get().first(bytes.value()), executor);
}

void expect_same(const RaggedCache<>& got, const RaggedCache<>& wanted) {
  const LayerShape shape = wanted.shape();
  for (Index h = 0; h < shape.kv_heads; ++h) {
    ASSERT_EQ(got.size(h), wanted.size(h));
    const auto same = [&](const float* a, const float* b, Index width) {
      return std::memcmp(a, b, ix(wanted.size(h) * width) * sizeof(float)) == 0;
    };
    EXPECT_TRUE(same(got.key_rows(h, 0, got.size(h)), wanted.key_rows(h, 0, wanted.size(h)), shape.key_dim));
    EXPECT_TRUE(same(got.value_rows(h, 0, got.size(h)), wanted.value_rows(h, 0, wanted.size(h)), shape.value_dim));
    for (Index t = 0; t < wanted.size(h); ++t) {
      EXPECT_EQ(got.position(h, t), wanted.position(h, t));
      EXPECT_EQ(got.log_mass(h, t), wanted.log_mass(h, t));
    }
  }
}

// --- Results ---------------------------------------------------------------------------------------------------

/// Batches of which none, some and all views are worked on together.
const std::vector<Index> kLengths[] = {{50},
                                       {50, 50},
                                       {60, 300, 25, 40},
                                       {40, 41, 39, 60, 50, 70, 33, 30, 64, 55, 47},
                                       {700, 20, 30, 25, 40, 21, 22, 23, 24, 600}};

class CompressBatch : public testing::TestWithParam<Index> {};
INSTANTIATE_TEST_SUITE_P(Threads, CompressBatch, testing::Values(1, 2, 3, 5), testing::PrintToStringParamName());

TEST_P(CompressBatch, GivesTheBitsOfEachViewCompressedAlone) {
  for (const auto& lengths : kLengths) {
    Sequences batch(lengths), alone(lengths);
    Results results = no_results(lengths.size());
    ASSERT_TRUE(run(ems(), batch.caches, batch.evidence, results, ThreadPool(GetParam())).ok());
    for (std::size_t i = 0; i < lengths.size(); ++i) {
      const auto wanted = ems().compress(alone.caches[i], alone.evidence[i]);
      ASSERT_TRUE(wanted.ok() && results[i].ok());
      expect_same_report(results[i].value(), wanted.value());
      expect_same(batch.caches[i], alone.caches[i]);
    }
  }
}

TEST_P(CompressBatch, AViewThatFailsIsLeftAsItIsAndDoesNotTouchTheOthers) {
  const std::vector<Index> lengths{60, 300, 25, 40, 45};
  for (std::size_t broken = 0; broken < lengths.size(); ++broken) {
    Sequences batch(lengths), alone(lengths);
    batch.queries[broken].data[5] = std::numeric_limits<float>::quiet_NaN();
    Results results = no_results(lengths.size());
    ASSERT_TRUE(run(ems(), batch.caches, batch.evidence, results, ThreadPool(GetParam())).ok());
    for (std::size_t i = 0; i < lengths.size(); ++i) {
      if (i == broken) {
        EXPECT_EQ(results[i].status().code(), StatusCode::not_finite);
      } else {
        ASSERT_TRUE(results[i].ok());
        ASSERT_TRUE(ems().compress(alone.caches[i], alone.evidence[i]).ok());
      }
      expect_same(batch.caches[i], alone.caches[i]);
    }
  }
}

TEST_P(CompressBatch, AViewOfInvalidSizesGetsItsStatus) {
  Sequences batch({60, 30, 50});
  batch.caches.push_back(RaggedCache<>::create(kShape).value());  // no rows
  batch.evidence.push_back(batch.evidence[0]);
  Results results = no_results(4);
  ASSERT_TRUE(run(ems(), batch.caches, batch.evidence, results, ThreadPool(GetParam())).ok());
  EXPECT_EQ(results[3].status().argument(), "view");
  for (std::size_t i = 0; i < 3; ++i) EXPECT_TRUE(results[i].ok());
}

TEST_P(CompressBatch, ViewsMayHaveOtherShapes) {
  Sequences batch({60, 30}), other({200, 40}, {2, 3, 8, 20});
  for (auto& cache : other.caches) batch.caches.push_back(std::move(cache));
  for (const auto& evidence : other.evidence) batch.evidence.push_back(evidence);
  Results results = no_results(4);
  ASSERT_TRUE(run(ems(), batch.caches, batch.evidence, results, ThreadPool(GetParam())).ok());
  for (std::size_t i = 0; i < 4; ++i) {
    ASSERT_TRUE(results[i].ok());
    EXPECT_EQ(results[i]->rows_kept, 20 * batch.caches[i].shape().kv_heads);
  }
}

TEST_P(CompressBatch, NoViewsAreNoWork) {
  std::vector<RaggedCache<>> caches;
  std::vector<QueryRows> evidence;
  Results results;
  EXPECT_TRUE(run(ems(), caches, evidence, results, ThreadPool(GetParam())).ok());
}

TEST_P(CompressBatch, MethodsThatLookAtNothingWorkToo) {
  Sequences batch({60, 300, 25});
  const std::vector<NoEvidence> nothing(3);
  Results results = no_results(3);
  const StreamingLlm method({.budget = {.rows = 20}});
  ASSERT_TRUE(run(method, batch.caches, nothing, results, ThreadPool(GetParam())).ok());
  for (const auto& result : results) EXPECT_EQ(result->rows_kept, 80);
}

// --- Refusals --------------------------------------------------------------------------------------------------

struct Refusal : testing::Test {
  Sequences batch{{60, 30, 50}}, before{{60, 30, 50}};
  Results results = no_results(3);

  void expect_refused(const Status& status, StatusCode code, std::string_view argument) {
    EXPECT_EQ(status.code(), code);
    EXPECT_EQ(status.argument(), argument);
    for (std::size_t i = 0; i < 3; ++i) {
      expect_same(batch.caches[i], before.caches[i]);
      EXPECT_EQ(results[i]->rows_before, -1) << "results are unchanged";
    }
  }
};
using CompressBatchRefuses = Refusal;

TEST_F(CompressBatchRefuses, ListsOfOtherLengths) {
  batch.evidence.pop_back();
  SerialExecutor serial;
  expect_refused(compress_batch(ems(), batch.caches, batch.evidence, results, {}, serial), StatusCode::size_mismatch,
                 "evidence");
  expect_refused(batch_workspace_bytes(ems(), batch.caches, batch.evidence, 1).status(), StatusCode::size_mismatch,
                 "evidence");
  expect_refused(compress_batch(ems(), batch.caches, before.evidence, std::span(results).first(2), {}, serial),
                 StatusCode::size_mismatch, "results");
}

TEST_F(CompressBatchRefuses, OptionsOutOfRange) {
  const Ems bad({.budget = {.rows = 0}});
  expect_refused(run(bad, batch.caches, batch.evidence, results, SerialExecutor{}), StatusCode::invalid_argument,
                 "budget");
  SerialExecutor serial;
  expect_refused(compress_batch(bad, batch.caches, batch.evidence, results, {}, serial), StatusCode::invalid_argument,
                 "budget");
}

TEST_F(CompressBatchRefuses, AnExecutorWithoutWorkers) {
  struct Idle {
    static Index concurrency() noexcept { return 0; }
    void run(Index, TaskRef) const noexcept {}
  } idle;
  expect_refused(compress_batch(ems(), batch.caches, batch.evidence, results, {}, idle), StatusCode::invalid_argument,
                 "executor");
  expect_refused(batch_workspace_bytes(ems(), batch.caches, batch.evidence, -1).status(), StatusCode::invalid_argument,
                 "executor");
}

TEST_F(CompressBatchRefuses, TooSmallAWorkspace) {
  for (const Index threads : {1, 2, 4}) {
    ThreadPool pool(threads);
    const std::size_t bytes = batch_workspace_bytes(ems(), batch.caches, batch.evidence, threads).value();
    for (const std::size_t part : {std::size_t{0}, bytes / 2, bytes - 128}) {
      std::vector<std::byte> memory(part);
      expect_refused(compress_batch(ems(), batch.caches, batch.evidence, results, memory, pool),
                     StatusCode::workspace_too_small, "workspace");
    }
  }
}

// --- Balance ---------------------------------------------------------------------------------------------------

Index rows_read = 0;  // by all views, on one thread

/// A cache whose reads are counted: the work of scoring and merging.
struct CountingView {
  RaggedCache<>* cache;

  [[nodiscard]] LayerShape shape() const noexcept { return cache->shape(); }
  [[nodiscard]] Index size(Index h) const noexcept { return cache->size(h); }
  [[nodiscard]] Position position(Index h, Index t) const noexcept { return cache->position(h, t); }
  void read_keys(Index h, Index t, Index n, std::span<float> out) const noexcept {
    rows_read += n;
    cache->read_keys(h, t, n, out);
  }
  void read_values(Index h, Index t, Index n, std::span<float> out) const noexcept {
    rows_read += n;
    cache->read_values(h, t, n, out);
  }
  void write_key(Index h, Index t, std::span<const float> in) noexcept { cache->write_key(h, t, in); }
  void write_value(Index h, Index t, std::span<const float> in) noexcept { cache->write_value(h, t, in); }
  void move_row(Index h, Index from, Index to) noexcept { cache->move_row(h, from, to); }
  void resize(Index h, Index n) noexcept { cache->resize(h, n); }
};

/// Workers that take the next task as soon as they are free, in a time that is counted in rows read.
class GreedyWorkers {
 public:
  explicit GreedyWorkers(Index workers) : load_(ix(workers)) {}
  [[nodiscard]] Index concurrency() const noexcept { return static_cast<Index>(load_.size()); }
  void run(Index n, TaskRef task) noexcept {
    std::fill(load_.begin(), load_.end(), 0);
    for (Index i = 0; i < n; ++i) {
      const auto free = std::min_element(load_.begin(), load_.end());
      const Index before = rows_read;
      task(i, free - load_.begin());
      *free += rows_read - before;
    }
    time_ += *std::max_element(load_.begin(), load_.end());
  }
  [[nodiscard]] Index time() const noexcept { return time_; }

 private:
  std::vector<Index> load_;
  Index time_ = 0;
};

/// How long the workers take for a batch, as a multiple of the time in which all would have been busy to the end.
double imbalance(const std::vector<Index>& lengths, Index workers, LayerShape shape) {
  Sequences sequences(lengths, shape);
  std::vector<CountingView> views;
  for (auto& cache : sequences.caches) views.push_back({&cache});
  Results results = no_results(lengths.size());
  GreedyWorkers executor(workers);
  rows_read = 0;
  const EmsEvict method({.score = {.window = kWindow}, .budget = {.rows = 4}});
  EXPECT_TRUE(run(method, views, sequences.evidence, results, executor).ok());
  for (const auto& result : results) EXPECT_TRUE(result.ok());
  return static_cast<double>(executor.time() * workers) / static_cast<double>(rows_read);
}

constexpr LayerShape kEightHeads{.kv_heads = 8, .group_size = 1, .key_dim = 4, .value_dim = 4};

TEST(BatchBalance, IsWithinThreeFifthsForAnyLengths) {
  Random random(3);
  for (const Index workers : {2, 3, 4, 8}) {
    double sum = 0.0;
    constexpr int kRounds = 40;
    for (int round = 0; round < kRounds; ++round) {
      std::vector<Index> lengths(ix(1 + random.below(20)));
      const double range = 4.0 * random.uniform();  // up to a factor of e^4 between the lengths
      for (Index& length : lengths) length = 10 + static_cast<Index>(10.0 * std::exp(range * random.uniform()));
      const double found = imbalance(lengths, workers, kEightHeads);
      EXPECT_LT(found, 1.6) << testing::PrintToString(lengths) << " on " << workers;
      sum += found;
    }
    EXPECT_LT(sum / kRounds, 1.15) << workers;
  }
}

TEST(BatchBalance, OneViewIsSpreadOverItsHeads) {
  for (const Index workers : {2, 4, 8}) EXPECT_LT(imbalance({200}, workers, kEightHeads), 1.01) << workers;
}

TEST(BatchBalance, AViewLongerThanTheFairShareIsSpreadOverItsHeads) {
  // Alone, it would keep one worker busy for 4 times the fair share.
  EXPECT_LT(imbalance({1000, 20, 30, 25, 20, 40, 30, 20}, 4, kEightHeads), 1.1);
}

TEST(BatchBalance, WhatIsLeftOverAfterFullRoundsIsSpread) {
  // As tasks: two rounds for 5 views on 4 workers, 1.6 times the fair share.
  EXPECT_LT(imbalance({50, 50, 50, 50, 50}, 4, kEightHeads), 1.1);
}

TEST(BatchBalance, ViewsWithFewHeadsRunSideBySide) {
  // 2 heads can use 2 of 8 workers: one after the other, 4 views would take twice as long as side by side.
  EXPECT_LT(imbalance({50, 50, 50, 50}, 8, {.kv_heads = 2, .group_size = 1, .key_dim = 4, .value_dim = 4}), 2.01);
}

/// Notes the sizes of the task lists that it is given.
struct NotingExecutor {
  std::vector<Index> runs;
  static Index concurrency() noexcept { return 4; }
  void run(Index n, TaskRef task) noexcept {
    runs.push_back(n);
    for (Index i = 0; i < n; ++i) task(i, i % 4);
  }
};

TEST(BatchBalance, ManyViewsAlikeAreOneTaskEach) {
  Sequences sequences(std::vector<Index>(12, 40));
  Results results = no_results(12);
  NotingExecutor executor;
  ASSERT_TRUE(run(ems(), sequences.caches, sequences.evidence, results, executor).ok());
  EXPECT_EQ(executor.runs, std::vector<Index>{12});
}

TEST(BatchBalance, TasksAreHandedOutLongestFirstAndByIndexWhereEqual) {
  Sequences sequences({30, 50, 40, 50, 20, 60, 30, 45, 30, 40, 25, 33});
  std::vector<CountingView> views;
  for (auto& cache : sequences.caches) views.push_back({&cache});
  struct Watching {
    std::vector<CountingView>* views;
    std::vector<Index> order{};
    static Index concurrency() noexcept { return 2; }
    void run(Index n, TaskRef task) noexcept {
      for (Index i = 0; i < n; ++i) {
        std::vector<Index> before;
        for (const CountingView& view : *views) before.push_back(view.size(0));
        task(i, 0);
        for (std::size_t v = 0; v < before.size(); ++v) {
          if ((*views)[v].size(0) != before[v]) order.push_back(static_cast<Index>(v));
        }
      }
    }
  } executor{&views};
  Results results = no_results(12);
  const StreamingLlm method({.score = {.sinks = 2}, .budget = {.rows = 10}});
  ASSERT_TRUE(run(method, views, std::vector<NoEvidence>(12), results, executor).ok());
  EXPECT_EQ(executor.order, (std::vector<Index>{5, 1, 3, 7, 2, 9, 11, 0, 6, 8, 10, 4}));
}

}  // namespace
}  // namespace kvfold::test
