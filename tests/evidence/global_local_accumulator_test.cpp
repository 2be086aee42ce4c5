#include <kvfold/evidence/global_local_accumulator.hpp>
#include <kvfold/exec/thread_pool.hpp>

#include <atomic>
#include <cerrno>
#include <functional>
#include <limits>
#include <ostream>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "attention_oracle.hpp"
#include "builders.hpp"

// --- Counting allocations --------------------------------------------------------------------------------------
// With glibc, every way to allocate ends in one of these functions. Sanitizers bring their own.

#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define KVFOLD_TEST_SANITIZED 1
#endif
#endif
#if defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__) && \
    !defined(KVFOLD_TEST_SANITIZED)
#define KVFOLD_TEST_COUNTS_ALLOCATIONS 1

namespace {
std::atomic<long> allocation_count{0};
}

extern "C" {
// NOLINTBEGIN(bugprone-reserved-identifier,readability-identifier-naming)
void* __libc_malloc(std::size_t);
void* __libc_calloc(std::size_t, std::size_t);
void* __libc_realloc(void*, std::size_t);
void* __libc_memalign(std::size_t, std::size_t);
// NOLINTEND(bugprone-reserved-identifier,readability-identifier-naming)

void* malloc(std::size_t bytes) noexcept {
  ++allocation_count;
  return __libc_malloc(bytes);
}
void* calloc(std::size_t count, std::size_t bytes) noexcept {
  ++allocation_count;
  return __libc_calloc(count, bytes);
}
void* realloc(void* block, std::size_t bytes) noexcept {
  ++allocation_count;
  return __libc_realloc(block, bytes);
}
void* memalign(std::size_t alignment, std::size_t bytes) noexcept {
  ++allocation_count;
  return __libc_memalign(alignment, bytes);
}
void* aligned_alloc(std::size_t alignment, std::size_t bytes) noexcept { return memalign(alignment, bytes); }
int posix_memalign(void** block, std::size_t alignment, std::size_t bytes) noexcept {
  *block = memalign(alignment, bytes);
  return *block == nullptr ? ENOMEM : 0;
}
}
#endif

namespace kvfold::test {
namespace {

using Options = GlobalLocalAccumulator::Options;
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// --- Reading a prompt chunk by chunk ---------------------------------------------------------------------------

/// The first rows of a cache: what is in it while the prompt is being read.
struct CacheSoFar {
  const RaggedCache<>* cache;
  Index rows;

  [[nodiscard]] LayerShape shape() const noexcept { return cache->shape(); }
  [[nodiscard]] Index size(Index h) const noexcept { return std::min(rows, cache->size(h)); }
  [[nodiscard]] Position position(Index h, Index t) const noexcept { return cache->position(h, t); }
  [[nodiscard]] float log_mass(Index h, Index t) const noexcept { return cache->log_mass(h, t); }
  void read_keys(Index h, Index t, Index n, std::span<float> out) const noexcept { cache->read_keys(h, t, n, out); }
  void read_values(Index h, Index t, Index n, std::span<float> out) const noexcept { cache->read_values(h, t, n, out); }
};

/// Queries [first, first + n) of a prompt.
QueryRows slice(QueryRows queries, Index first, Index n) {
  queries.data += first * queries.row_stride;
  queries.positions = queries.positions.subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(n));
  return queries;
}

struct Prompt {
  RaggedCache<> cache;
  OwnedQueries queries;

  Prompt(LayerShape shape, Index length)
      : cache(make_cache(shape, length)), queries(make_queries(shape, length, length)) {}
  [[nodiscard]] Index length() const { return count_of(queries.positions); }
  [[nodiscard]] CacheSoFar so_far(Index rows) const { return {&cache, rows}; }
  [[nodiscard]] QueryRows chunk(Index first, Index n) const { return slice(queries.view(), first, n); }
};

/// Sums that outlive the accumulator.
struct OwnedSums {
  ColumnDetail detail{};
  std::vector<Index> offset;
  std::vector<float> global, local, seen;
  Index window = 0;

  OwnedSums() = default;
  explicit OwnedSums(const ColumnSums& sums)
      : detail(sums.detail),
        offset(sums.offset.begin(), sums.offset.end()),
        global(sums.global.begin(), sums.global.end()),
        local(sums.local.begin(), sums.local.end()),
        seen(sums.seen.begin(), sums.seen.end()),
        window(sums.window) {}
  [[nodiscard]] ColumnSums view() const { return {detail, offset, global, local, seen, window}; }
  friend bool operator==(const OwnedSums&, const OwnedSums&) = default;
};

GlobalLocalAccumulator make_accumulator(LayerShape shape, Index max_rows, Options options) {
  auto made = GlobalLocalAccumulator::create(shape, max_rows, options);
  EXPECT_TRUE(made.ok()) << made.status().detail();
  return std::move(made).value();
}

/// Observes in exactly the workspace that is asked for.
template <KVCacheView V, class X = SerialExecutor>
Status observe(GlobalLocalAccumulator& accumulator, const V& view, const QueryRows& queries, X&& executor = {}) {
  std::vector<std::byte> memory(accumulator.workspace_bytes(detail::max_rows(view), executor.concurrency()));
  return accumulator.observe(view, queries, memory, executor);
}

template <KVCacheView V, class X = SerialExecutor>
OwnedSums summarize(GlobalLocalAccumulator& accumulator, const V& view, X&& executor = {}) {
  std::vector<std::byte> memory(accumulator.workspace_bytes(detail::max_rows(view), executor.concurrency()));
  const auto sums = accumulator.summarize(view, memory, executor);
  EXPECT_TRUE(sums.ok()) << sums.status().detail();
  return sums.ok() ? OwnedSums(sums.value()) : OwnedSums{};
}

enum class Given { queries, queries_and_log_sum_exps };

/// Reads the prompt from query `first` on in chunks of these lengths.
template <class X = SerialExecutor>
Status read(GlobalLocalAccumulator& accumulator, const Prompt& prompt, const std::vector<Index>& chunks,
            Given given = Given::queries, Index first = 0, X&& executor = {}) {
  for (const Index n : chunks) {
    const CacheSoFar view = prompt.so_far(first + n);
    QueryRows queries = prompt.chunk(first, n);
    std::vector<float> lse;
    if (given == Given::queries_and_log_sum_exps) lse = log_sum_exps(view, queries);
    queries.log_sum_exp = lse;
    if (Status bad = observe(accumulator, view, queries, executor); !bad.ok()) return bad;
    first += n;
  }
  return {};
}

std::vector<Index> equal_chunks(Index length, Index each) {
  std::vector<Index> chunks(static_cast<std::size_t>(length / each), each);
  if (length % each != 0) chunks.push_back(length % each);
  return chunks;
}

std::vector<Index> random_chunks(Index length, std::uint64_t seed) {
  Random random(seed);
  std::vector<Index> chunks;
  for (Index left = length; left > 0; left -= chunks.back()) chunks.push_back(std::min(left, 1 + random.below(50)));
  return chunks;
}

std::vector<std::vector<Index>> all_chunkings(Index length) {
  return {equal_chunks(length, 1),
          equal_chunks(length, 7),
          equal_chunks(length, 32),
          equal_chunks(length, 33),
          equal_chunks(length, 64),
          random_chunks(length, 11),
          {length}};
}

// --- Streaming equals one-shot ---------------------------------------------------------------------------------

struct StreamCase {
  Index group_size;
  GroupReduction reduction;
  Index window, stride;

  friend std::ostream& operator<<(std::ostream& out, const StreamCase& c) {
    return out << 'G' << c.group_size << (c.reduction == GroupReduction::max ? "Max" : "Mean") << 'W' << c.window << 'S'
               << c.stride;
  }
};

class GlobalLocalAccumulatorSweep : public testing::TestWithParam<StreamCase> {
 protected:
  static constexpr Index kLength = 150;  // crosses a key tile; times any group size, query tiles
  StreamCase c_ = GetParam();
  Options options_{.window = c_.window, .query_stride = c_.stride, .group = c_.reduction};
  LayerShape shape_{2, c_.group_size, 8, 4};
  Prompt prompt_{shape_, kLength};
};

TEST_P(GlobalLocalAccumulatorSweep, GivesTheSumsOfThePlainLoopsForEveryChunking) {
  const auto columns = columns_oracle(prompt_.cache, prompt_.queries.view(), c_.window, c_.stride);
  const auto joined = [&](const std::vector<Numbers>& all) {
    return flat(c_.reduction == GroupReduction::max ? all : over_group(all, c_.group_size, GroupReduction::mean));
  };
  const Numbers global = joined(columns.global), local = joined(columns.local), seen = flat(columns.seen);
  for (const auto& chunks : all_chunkings(kLength)) {
    SCOPED_TRACE("first chunk of " + std::to_string(chunks[0]));
    auto accumulator = make_accumulator(shape_, kLength, options_);
    ASSERT_TRUE(read(accumulator, prompt_, chunks).ok());
    EXPECT_EQ(accumulator.observed_queries(), kLength);
    const OwnedSums sums = summarize(accumulator, prompt_.cache);
    EXPECT_TRUE(close_to(sums.global, global));
    EXPECT_TRUE(close_to(sums.local, local));
    EXPECT_EQ(Numbers(sums.seen.begin(), sums.seen.end()), seen);
    EXPECT_EQ(sums.detail, c_.reduction == GroupReduction::max ? ColumnDetail::query_head : ColumnDetail::kv_head);
    EXPECT_EQ(sums.window, c_.window);
    EXPECT_EQ(sums.offset, (std::vector<Index>{0, kLength, 2 * kLength}));
  }
}

TEST_P(GlobalLocalAccumulatorSweep, GivesTheScoresOfOneShotScoring) {
  auto accumulator = make_accumulator(shape_, kLength, options_);
  ASSERT_TRUE(read(accumulator, prompt_, equal_chunks(kLength, 33)).ok());
  const OwnedSums sums = summarize(accumulator, prompt_.cache);
  for (const auto normalise : {GlobalLocalScorer::Normalise::none, GlobalLocalScorer::Normalise::lifetime}) {
    const GlobalLocalScorer scorer(
        {.window = c_.window, .group = c_.reduction, .normalise = normalise, .query_stride = c_.stride});
    const Scored streamed = run_score(scorer, prompt_.cache, sums.view());
    const Scored at_once = run_score(scorer, prompt_.cache, prompt_.queries.view());
    ASSERT_TRUE(streamed.status.ok() && at_once.status.ok());
    EXPECT_TRUE(close_to(streamed.score, at_once.score));
    EXPECT_EQ(streamed.protection, at_once.protection);
  }
}

TEST_P(GlobalLocalAccumulatorSweep, OnePassWithLogSumExpsEqualsTwoPasses) {
  for (const auto& chunks : {equal_chunks(kLength, 33), equal_chunks(kLength, 100), {kLength}}) {
    auto two_passes = make_accumulator(shape_, kLength, options_);
    auto one_pass = make_accumulator(shape_, kLength, options_);
    ASSERT_TRUE(read(two_passes, prompt_, chunks).ok());
    ASSERT_TRUE(read(one_pass, prompt_, chunks, Given::queries_and_log_sum_exps).ok());
    const OwnedSums wanted = summarize(two_passes, prompt_.cache), got = summarize(one_pass, prompt_.cache);
    EXPECT_TRUE(close_to(got.global, wanted.global));
    EXPECT_EQ(got.local, wanted.local);
    EXPECT_EQ(got.seen, wanted.seen);
  }
}

TEST_P(GlobalLocalAccumulatorSweep, LogSumExpsMayBeGivenForSomeChunks) {
  auto never = make_accumulator(shape_, kLength, options_);
  auto sometimes = make_accumulator(shape_, kLength, options_);
  ASSERT_TRUE(read(never, prompt_, {kLength}).ok());
  for (Index first = 0; first < kLength; first += 50) {
    const Given given = first / 50 % 2 == 0 ? Given::queries_and_log_sum_exps : Given::queries;
    ASSERT_TRUE(read(sometimes, prompt_, {std::min<Index>(50, kLength - first)}, given, first).ok());
  }
  const OwnedSums wanted = summarize(never, prompt_.cache), got = summarize(sometimes, prompt_.cache);
  EXPECT_TRUE(close_to(got.global, wanted.global));
  EXPECT_EQ(got.local, wanted.local);
}

INSTANTIATE_TEST_SUITE_P(
    Cases, GlobalLocalAccumulatorSweep,
    testing::Values(StreamCase{1, GroupReduction::max, 32, 1}, StreamCase{1, GroupReduction::mean, 1, 3},
                    StreamCase{3, GroupReduction::max, 32, 1}, StreamCase{3, GroupReduction::mean, 32, 1},
                    StreamCase{3, GroupReduction::max, 8, 4}, StreamCase{3, GroupReduction::mean, 8, 5},
                    StreamCase{3, GroupReduction::max, 400, 1},   // W larger than the prompt
                    StreamCase{3, GroupReduction::mean, 149, 2},  // one query leaves, and is not in the sample
                    StreamCase{7, GroupReduction::max, 32, 1}, StreamCase{7, GroupReduction::mean, 33, 16},
                    StreamCase{7, GroupReduction::max, 1, 200}),  // sampled so thinly that few queries are seen
    testing::PrintToStringParamName());

TEST(GlobalLocalAccumulator, CountsLogMassesAndHeadsOfUnequalSize) {
  const LayerShape shape{3, 2, 8, 4};
  Prompt prompt(shape, 140);
  prompt.cache.resize(1, 60);  // its rows end early: later queries see all of them
  for (Index h = 0; h < 3; ++h) prompt.cache.write_log_mass(h, 10 + h, 1.5f);
  auto accumulator = make_accumulator(shape, 140, {.window = 16});
  ASSERT_TRUE(read(accumulator, prompt, equal_chunks(140, 20)).ok());
  const OwnedSums sums = summarize(accumulator, prompt.cache);
  const auto columns = columns_oracle(prompt.cache, prompt.queries.view(), 16);
  EXPECT_TRUE(close_to(sums.global, flat(columns.global)));
  EXPECT_TRUE(close_to(sums.local, flat(columns.local)));
  EXPECT_EQ(sums.offset, (std::vector<Index>{0, 140, 200, 340}));
}

TEST(GlobalLocalAccumulator, GivesTheSameBitsForEveryExecutor) {
  const LayerShape shape{5, 3, 8, 4};
  const Prompt prompt(shape, 140);
  auto serial = make_accumulator(shape, 140, {.window = 16});
  ASSERT_TRUE(read(serial, prompt, equal_chunks(140, 50)).ok());
  const OwnedSums wanted = summarize(serial, prompt.cache);
  for (Index threads = 1; threads <= 4; ++threads) {
    ThreadPool pool(threads);
    auto accumulator = make_accumulator(shape, 140, {.window = 16});
    ASSERT_TRUE(read(accumulator, prompt, equal_chunks(140, 50), Given::queries, 0, pool).ok());
    EXPECT_TRUE(summarize(accumulator, prompt.cache, pool) == wanted) << threads;
  }
}

TEST(GlobalLocalAccumulator, MaySummarizeAtAnyTimeAndGoOn) {
  const LayerShape shape{2, 2, 8, 4};
  const Prompt prompt(shape, 90);
  auto asked_once = make_accumulator(shape, 90, {.window = 16});
  auto asked_often = make_accumulator(shape, 90, {.window = 16});
  for (Index first = 0; first < 90; first += 30) {
    ASSERT_TRUE(read(asked_once, prompt, {30}, Given::queries, first).ok());
    ASSERT_TRUE(read(asked_often, prompt, {30}, Given::queries, first).ok());
    const OwnedSums now = summarize(asked_often, prompt.so_far(first + 30));
    const auto columns = columns_oracle(prompt.so_far(first + 30), prompt.chunk(0, first + 30), 16);
    EXPECT_TRUE(close_to(now.global, flat(columns.global)));
  }
  EXPECT_TRUE(summarize(asked_often, prompt.cache) == summarize(asked_once, prompt.cache));
}

TEST(GlobalLocalAccumulator, RowsThatNoQueryHasSeenHaveSumsOfZero) {
  const LayerShape shape{1, 1, 8, 4};
  const Prompt prompt(shape, 60);
  auto accumulator = make_accumulator(shape, 60, {.window = 8});
  ASSERT_TRUE(read(accumulator, prompt, {40}).ok());
  const OwnedSums sums = summarize(accumulator, prompt.cache);
  ASSERT_EQ(sums.global.size(), 60u);
  EXPECT_GT(sums.global[39], 0.f);
  for (std::size_t t = 40; t < 60; ++t) EXPECT_EQ(sums.global[t] + sums.local[t] + sums.seen[t], 0.f);
}

TEST(GlobalLocalAccumulator, DoesNotReadQueriesThatAreNeitherSampledNorInTheWindow) {
  const LayerShape shape{2, 2, 8, 4};
  const Options options{.window = 16, .query_stride = 4};  // takes numbers 2, 6, ... and keeps 64 to 79 of 80
  const Prompt prompt(shape, 100);
  Prompt spoiled(shape, 100);
  for (const Index i : {0, 3, 29, 63}) {
    for (Index q = 0; q < shape.query_heads(); ++q) {
      const float* row = spoiled.queries.view().row(q, i);
      std::fill_n(spoiled.queries.data.begin() + (row - spoiled.queries.data.data()), shape.key_dim, kNaN);
    }
  }
  auto accumulator = make_accumulator(shape, 100, options), other = make_accumulator(shape, 100, options);
  ASSERT_TRUE(read(accumulator, prompt, {80, 20}).ok());
  ASSERT_TRUE(read(other, spoiled, {80, 20}).ok());
  EXPECT_TRUE(summarize(other, prompt.so_far(100)) == summarize(accumulator, prompt.so_far(100)));
}

TEST(GlobalLocalAccumulator, ResetForgetsEverything) {
  const LayerShape shape{2, 2, 8, 4};
  const Prompt prompt(shape, 90);
  auto fresh = make_accumulator(shape, 90, {.window = 16});
  auto used = make_accumulator(shape, 90, {.window = 16});
  QueryRows other_scale = prompt.queries.view();
  other_scale.scale = 0.5f;
  ASSERT_TRUE(observe(used, prompt.cache, other_scale).ok());
  used.reset();
  EXPECT_EQ(used.observed_queries(), 0);
  ASSERT_TRUE(read(fresh, prompt, {20, 20}).ok());
  ASSERT_TRUE(read(used, prompt, {20, 20}).ok());  // fewer rows, earlier positions, another scale: all of it is new
  EXPECT_TRUE(summarize(used, prompt.so_far(40)) == summarize(fresh, prompt.so_far(40)));
}

// --- Memory ----------------------------------------------------------------------------------------------------

TEST(GlobalLocalAccumulator, KeepsItsMemoryHoweverManyQueriesItObserves) {
  const LayerShape shape{2, 2, 8, 4};
  const Prompt prompt(shape, 20);
  auto accumulator = make_accumulator(shape, 20, {.window = 4});
  const std::size_t bytes = accumulator.memory_bytes();
  EXPECT_GT(bytes, 0u);
  const std::vector<Position> late(500, 19);
  std::vector<float> data(500 * 4 * 8, 0.25f);
  for (int i = 0; i < 4; ++i) {
    ASSERT_TRUE(observe(accumulator, prompt.cache, token_major_queries(data.data(), 4, 8, late)).ok());
  }
  EXPECT_EQ(accumulator.observed_queries(), 2000);
  EXPECT_EQ(accumulator.memory_bytes(), bytes);
}

TEST(GlobalLocalAccumulator, AllocatesNothingAfterItWasMade) {
#ifndef KVFOLD_TEST_COUNTS_ALLOCATIONS
  GTEST_SKIP() << "allocations are counted with glibc and without sanitizers";
#else
  void* volatile probe = ::operator new(16);
  const long before_probe = allocation_count;
  ::operator delete(probe);
  probe = ::operator new(16);
  ASSERT_EQ(allocation_count, before_probe + 1) << "allocations are not counted";
  ::operator delete(probe);

  const LayerShape shape{3, 3, 80, 8};
  const Prompt prompt(shape, 300);
  for (const Given given : {Given::queries, Given::queries_and_log_sum_exps}) {
    for (const Index threads : {1, 3}) {
      ThreadPool pool(threads);
      auto accumulator = make_accumulator(shape, 300, {.window = 32});
      std::vector<std::byte> memory(accumulator.workspace_bytes(300, threads));
      for (Index first = 0; first < 300; first += 100) {
        const CacheSoFar view = prompt.so_far(first + 100);
        QueryRows queries = prompt.chunk(first, 100);
        const std::vector<float> lse = log_sum_exps(view, queries);
        if (given == Given::queries_and_log_sum_exps) queries.log_sum_exp = lse;
        const long before = allocation_count;
        const Status observed = accumulator.observe(view, queries, memory, pool);
        const auto sums = accumulator.summarize(view, memory, pool);
        const long after = allocation_count;
        ASSERT_TRUE(observed.ok() && sums.ok());
        EXPECT_EQ(after, before) << "chunk at " << first << ", " << threads << " threads";
      }
    }
  }
#endif
}

// --- What is refused -------------------------------------------------------------------------------------------

/// A chunk of 40 queries and what it is observed with, to be spoiled.
struct Call {
  RaggedCache<> cache;
  Index rows;  // in the cache so far
  OwnedQueries owned;
  std::vector<float> log_sum_exp;
  QueryRows queries;
  std::size_t missing_bytes = 0;
};

struct Refusal {
  const char* name;
  StatusCode code;
  const char* argument;
  std::function<void(Call&)> spoil;
  friend std::ostream& operator<<(std::ostream& out, const Refusal& r) { return out << r.name; }
};

class GlobalLocalAccumulatorRefuses : public testing::TestWithParam<Refusal> {
 protected:
  static constexpr LayerShape kShape{2, 2, 8, 4};
  static constexpr Options kOptions{.window = 16};

  [[nodiscard]] Call second_chunk() const {
    const QueryRows chunk = prompt_.chunk(40, 40);
    OwnedQueries owned{{}, {chunk.positions.begin(), chunk.positions.end()}, 4, 8};
    for (Index q = 0; q < 4; ++q) owned.data.insert(owned.data.end(), chunk.row(q, 0), chunk.row(q, 40));
    Call call{std::move(prompt_.cache.clone()).value(), 80, std::move(owned), {}, {}};
    call.queries = call.owned.view();
    return call;
  }
  static Status make(GlobalLocalAccumulator& accumulator, const Call& call) {
    const CacheSoFar view{&call.cache, call.rows};
    std::vector<std::byte> memory(accumulator.workspace_bytes(call.rows, 1) - call.missing_bytes);
    SerialExecutor serial;
    return accumulator.observe(view, call.queries, memory, serial);
  }

  Prompt prompt_{kShape, 120};
};

TEST_P(GlobalLocalAccumulatorRefuses, AndNothingHasChanged) {
  auto accumulator = make_accumulator(kShape, 110, kOptions);
  ASSERT_TRUE(read(accumulator, prompt_, {40}).ok());
  const OwnedSums before = summarize(accumulator, prompt_.so_far(40));

  Call call = second_chunk();
  GetParam().spoil(call);
  EXPECT_TRUE(says(make(accumulator, call), GetParam().code, GetParam().argument));

  EXPECT_EQ(accumulator.observed_queries(), 40);
  EXPECT_TRUE(summarize(accumulator, prompt_.so_far(40)) == before);
  auto never_failed = make_accumulator(kShape, 110, kOptions);
  ASSERT_TRUE(read(never_failed, prompt_, {40, 40}).ok());
  ASSERT_TRUE(read(accumulator, prompt_, {40}, Given::queries, 40).ok());
  EXPECT_TRUE(summarize(accumulator, prompt_.so_far(80)) == summarize(never_failed, prompt_.so_far(80)));
}

constexpr auto kInvalid = StatusCode::invalid_argument;
constexpr auto kMismatch = StatusCode::size_mismatch;
constexpr auto kNotFinite = StatusCode::not_finite;

const Refusal kRefusals[] = {
    {"NullQueries", kInvalid, "queries", [](Call& c) { c.queries.data = nullptr; }},
    {"NoQueries", kInvalid, "queries", [](Call& c) { c.queries.positions = {}; }},
    {"QueriesOfTooFewHeads", kMismatch, "queries", [](Call& c) { c.queries.query_heads = 3; }},
    {"QueriesOfAnotherWidth", kMismatch, "queries", [](Call& c) { c.queries.dim = 7; }},
    {"OverlappingQueryRows", kInvalid, "queries", [](Call& c) { c.queries.row_stride = 7; }},
    {"NegativeHeadStride", kInvalid, "queries", [](Call& c) { c.queries.head_stride = -8; }},
    {"ScaleThatIsNoNumber", kInvalid, "queries", [](Call& c) { c.queries.scale = kNaN; }},
    {"ScaleThatChanges", kInvalid, "queries", [](Call& c) { c.queries.scale = 0.5f; }},
    {"PositionsOutOfOrder", kInvalid, "queries",
     [](Call& c) { std::swap(c.owned.positions[5], c.owned.positions[6]); }},
    {"PositionsBeforeThoseObserved", kInvalid, "queries", [](Call& c) { c.owned.positions[0] = 38; }},
    {"NaNInAQueryThatLeavesTheWindow", kNotFinite, "queries", [](Call& c) { c.owned.data[3] = kNaN; }},
    {"NaNInAQueryThatStays", kNotFinite, "queries", [](Call& c) { c.owned.data.back() = kNaN; }},
    {"InfinityInAQuery", kNotFinite, "queries",
     [](Call& c) { c.owned.data[39 * 8] = std::numeric_limits<float>::infinity(); }},
    {"NaNInAKey", kNotFinite, "keys",
     [](Call& c) {
       c.cache.write_key(1, 20, std::vector<float>{0, 0, kNaN, 0, 0, 0, 0, 0});
     }},
    {"InfinityInAKey", kNotFinite, "keys",
     [](Call& c) { c.cache.write_key(0, 0, std::vector<float>(8, std::numeric_limits<float>::infinity())); }},
    {"NaNInALogMass", kNotFinite, "log_mass", [](Call& c) { c.cache.write_log_mass(0, 3, kNaN); }},
    {"TooFewLogSumExps", kMismatch, "queries",
     [](Call& c) {
       c.log_sum_exp.assign(159, 1.f);
       c.queries.log_sum_exp = c.log_sum_exp;
     }},
    {"LogSumExpThatIsNoNumber", kNotFinite, "queries",
     [](Call& c) {
       c.log_sum_exp.assign(160, kNaN);
       c.queries.log_sum_exp = c.log_sum_exp;
     }},
    {"MoreRowsThanMaxRows", kMismatch, "view", [](Call& c) { c.rows = 120; }},
    {"RowsThatWereLost", kMismatch, "view", [](Call& c) { c.rows = 39; }},
    {"AHeadThatLostRows", kMismatch, "view", [](Call& c) { c.cache.resize(1, 30); }},
    {"NoRows", kInvalid, "view", [](Call& c) { c.rows = 0; }},
    {"AnotherShape", kMismatch, "view",
     [](Call& c) {
       c.cache = make_cache({2, 1, 8, 4}, 120);
     }},
    {"AnotherKeyWidth", kMismatch, "view",
     [](Call& c) {
       c.cache = make_cache({2, 2, 16, 4}, 120);
     }},
    {"TooSmallAWorkspace", StatusCode::workspace_too_small, "workspace", [](Call& c) { c.missing_bytes = 65; }},
};
INSTANTIATE_TEST_SUITE_P(Calls, GlobalLocalAccumulatorRefuses, testing::ValuesIn(kRefusals),
                         testing::PrintToStringParamName());

/// Log-sum-exps that are of something else: with too small ones the weights of a query sum to more than 1, with too
/// large ones to less.
class WrongLogSumExps : public testing::TestWithParam<float> {};

TEST_P(WrongLogSumExps, AreRefusedAndNothingHasChanged) {
  const LayerShape shape{2, 2, 8, 4};
  const Prompt prompt(shape, 300);
  auto accumulator = make_accumulator(shape, 300, {.window = 16});
  ASSERT_TRUE(read(accumulator, prompt, {150}).ok());
  const OwnedSums before = summarize(accumulator, prompt.so_far(150));
  QueryRows queries = prompt.chunk(150, 150);
  std::vector<float> lse = log_sum_exps(prompt.cache, queries);
  for (float& x : lse) x += GetParam();
  queries.log_sum_exp = lse;
  ASSERT_TRUE(says(observe(accumulator, prompt.cache, queries), StatusCode::invalid_argument, "queries"));
  EXPECT_EQ(accumulator.observed_queries(), 150);
  EXPECT_TRUE(summarize(accumulator, prompt.so_far(150)) == before);
}
TEST_P(WrongLogSumExps, AreFoundWhenTheirQueriesLeaveTheWindow) {
  const LayerShape shape{2, 2, 8, 4};
  const Prompt prompt(shape, 200);
  auto accumulator = make_accumulator(shape, 200, {.window = 16});
  ASSERT_TRUE(read(accumulator, prompt, {100}, Given::queries_and_log_sum_exps).ok());
  const CacheSoFar view = prompt.so_far(116);
  QueryRows queries = prompt.chunk(100, 16);
  std::vector<float> lse = log_sum_exps(view, queries);
  for (float& x : lse) x += GetParam();
  queries.log_sum_exp = lse;
  ASSERT_TRUE(observe(accumulator, view, queries).ok());
  const Status late = read(accumulator, prompt, {84}, Given::queries_and_log_sum_exps, 116);
  EXPECT_TRUE(says(late, StatusCode::invalid_argument, "queries"));
  EXPECT_EQ(accumulator.observed_queries(), 116);
}
INSTANTIATE_TEST_SUITE_P(Offsets, WrongLogSumExps, testing::Values(-20.f, -3.f, -0.5f, 0.5f, 3.f, 20.f),
                         [](const auto& c) {
                           const std::string size = std::to_string(static_cast<int>(10.f * std::abs(c.param)));
                           return (c.param < 0.f ? "TooSmallBy" : "TooLargeBy") + size + "Tenths";
                         });

TEST(GlobalLocalAccumulator, HasNothingToSummarizeBeforeTheFirstQueries) {
  const auto cache = make_cache({1, 1, 8, 4}, 10);
  auto accumulator = make_accumulator(cache.shape(), 10, {});
  std::vector<std::byte> memory(accumulator.workspace_bytes(10, 1));
  SerialExecutor serial;
  EXPECT_TRUE(says(accumulator.summarize(cache, memory, serial).status(), StatusCode::invalid_argument, "evidence"));
}

TEST(GlobalLocalAccumulator, SummarizingRefusesWhatObservingDoes) {
  Prompt prompt({1, 1, 8, 4}, 40);
  auto accumulator = make_accumulator(prompt.cache.shape(), 40, {.window = 8});
  ASSERT_TRUE(read(accumulator, prompt, {40}).ok());
  std::vector<std::byte> memory(accumulator.workspace_bytes(40, 1));
  SerialExecutor serial;
  const auto summary = [&](const auto& view, std::size_t bytes) {
    return accumulator.summarize(view, std::span(memory).first(bytes), serial).status();
  };
  EXPECT_TRUE(says(summary(prompt.so_far(39), memory.size()), StatusCode::size_mismatch, "view"));
  EXPECT_TRUE(says(summary(make_cache({1, 1, 4, 4}, 40), memory.size()), StatusCode::size_mismatch, "view"));
  EXPECT_TRUE(says(summary(prompt.cache, 100), StatusCode::workspace_too_small, "workspace"));
  EXPECT_TRUE(summary(prompt.cache, memory.size()).ok());
  prompt.cache.write_key(0, 5, std::vector<float>(8, kNaN));
  EXPECT_TRUE(says(summary(prompt.cache, memory.size()), StatusCode::not_finite, "keys"));
}

TEST(GlobalLocalAccumulator, RefusesAnExecutorWithoutWorkers) {
  struct Nobody {
    [[nodiscard]] static Index concurrency() noexcept { return 0; }
    void run(Index, TaskRef) const noexcept {}
  };
  const Prompt prompt({1, 1, 8, 4}, 40);
  auto accumulator = make_accumulator(prompt.cache.shape(), 40, {.window = 8});
  EXPECT_TRUE(says(observe(accumulator, prompt.cache, prompt.queries.view(), Nobody{}), StatusCode::invalid_argument,
                   "executor"));
}

TEST(GlobalLocalAccumulator, IsOnlyMadeForShapesAndOptionsInRange) {
  const LayerShape good{2, 2, 8, 8};
  const auto refused = [](LayerShape shape, Index max_rows, Options options, const char* argument) {
    const auto made = GlobalLocalAccumulator::create(shape, max_rows, options);
    return made.ok() ? testing::AssertionFailure() << "made"
                     : says(made.status(), StatusCode::invalid_argument, argument);
  };
  EXPECT_TRUE(refused(good, 10, {.window = 0}, "window"));
  EXPECT_TRUE(refused(good, 10, {.window = kMaxRows + 1}, "window"));
  EXPECT_TRUE(refused(good, 10, {.query_stride = 0}, "query_stride"));
  EXPECT_TRUE(refused(good, 10, {.query_stride = kMaxRows + 1}, "query_stride"));
  EXPECT_TRUE(refused(good, 0, {}, "max_rows"));
  EXPECT_TRUE(refused(good, kMaxRows + 1, {}, "max_rows"));
  EXPECT_TRUE(refused({0, 1, 8, 8}, 10, {}, "shape"));
  EXPECT_TRUE(refused({-1, -1, 8, 8}, 10, {}, "shape"));
  EXPECT_TRUE(refused({1, 0, 8, 8}, 10, {}, "shape"));
  EXPECT_TRUE(refused({1, 1, 0, 8}, 10, {}, "shape"));
  EXPECT_TRUE(refused({kMaxHeads, 2, 8, 8}, 10, {}, "shape"));
  EXPECT_TRUE(refused({1, 1, kMaxWidth + 1, 8}, 10, {}, "shape"));
  EXPECT_TRUE(refused({4, Index{1} << 62, 8, 8}, 10, {}, "shape"));  // H * G does not fit into an Index
}

}  // namespace
}  // namespace kvfold::test
