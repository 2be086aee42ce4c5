/// \file
/// kvfold on the engine's own threads: an executor is two functions around whatever pool there is.

#include <kvfold/compressor.hpp>
#include <kvfold/storage/ragged_cache.hpp>
#include <kvfold/throwing.hpp>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <functional>
#include <thread>
#include <vector>

namespace {

using kvfold::Index;

/// Stands for the engine's pool: it runs one job on each of its threads, and waits.
struct EnginePool {
  int threads = 4;
  void on_every_thread(const std::function<void(int thread)>& job) const {
    std::vector<std::thread> team;
    for (int i = 1; i < threads; ++i) team.emplace_back(job, i);
    job(0);
    for (std::thread& thread : team) thread.join();
  }
};

/// Each task once, and never two at a time with the same worker number: threads take the next task when they are free.
struct EngineExecutor {
  const EnginePool* pool;

  Index concurrency() const noexcept { return pool->threads; }
  void run(Index n, kvfold::TaskRef task) const noexcept {
    std::atomic<Index> next{0};
    pool->on_every_thread([&](int thread) {
      for (Index i = next++; i < n; i = next++) task(i, thread);
    });
  }
};

static_assert(kvfold::Executor<EngineExecutor>);

constexpr kvfold::LayerShape kShape{.kv_heads = 4, .group_size = 2, .key_dim = 32, .value_dim = 32};
constexpr Index kRows = 300;

kvfold::RaggedCache<> make_cache(const std::vector<kvfold::Position>& positions) {
  std::vector<float> rows;
  for (Index i = 0; i < kShape.kv_heads * kRows * 32; ++i) rows.push_back(std::sin(static_cast<float>(i * i % 1009)));
  auto cache = kvfold::or_throw(kvfold::RaggedCache<>::create(kShape));
  const auto layout = kvfold::Strides::head_major(kRows, 32);
  kvfold::or_throw(cache.append(rows.data(), layout, rows.data(), layout, positions));
  return cache;
}

}  // namespace

int main() {
  std::vector<kvfold::Position> positions, last;
  for (Index t = 0; t < kRows; ++t) (t < kRows - 16 ? positions : last).push_back(t);
  positions.insert(positions.end(), last.begin(), last.end());
  std::vector<float> query;
  for (Index i = 0; i < kShape.query_heads() * 16 * 32; ++i) query.push_back(std::cos(static_cast<float>(i % 911)));
  const auto queries = kvfold::head_major_queries(query.data(), kShape.query_heads(), 32, last);
  const kvfold::Ems method({.score = {.window = 16}, .budget = {.rows = 60}});

  // Once at the start: how much memory for this many threads. The engine may take it from its own arena.
  const EnginePool pool;
  EngineExecutor executor{&pool};
  auto threaded = make_cache(positions), serial = make_cache(positions);
  const auto bytes = kvfold::or_throw(method.workspace_bytes(threaded, queries, executor.concurrency()));
  std::vector<std::byte> workspace(bytes);
  const auto report = kvfold::or_throw(method.compress(threaded, queries, workspace, executor));
  std::printf("%d rows -> %d on %d threads\n", static_cast<int>(report.rows_before), static_cast<int>(report.rows_kept),
              static_cast<int>(executor.concurrency()));

  // The same bits as on one thread.
  static_cast<void>(kvfold::or_throw(method.compress(serial, queries)));
  bool ok = true;
  for (Index h = 0; h < kShape.kv_heads; ++h) {
    ok = ok && threaded.size(h) == serial.size(h);
    for (Index t = 0; ok && t < serial.size(h); ++t) {
      ok = threaded.position(h, t) == serial.position(h, t) &&
           std::equal(serial.value_rows(h, t, 1), serial.value_rows(h, t, 1) + 32, threaded.value_rows(h, t, 1));
    }
  }
  std::puts(ok ? "the same cache as on one thread" : "FAILED");
  return ok ? 0 : 1;
}
