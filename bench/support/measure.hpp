/// \file
/// How every benchmark is run: the stage and its floor in turn, medians of what they took, heap calls counted.
/// To be included by one source file of a program (see heap_calls.hpp).
#pragma once

#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include <benchmark/benchmark.h>

#include "floors.hpp"
#include "heap_calls.hpp"
#include "quantile.hpp"

namespace kvfold::bench {

/// How long to measure. `--quick` is for tests: small sizes, one repetition, so that crashes are seen.
struct Settings {
  bool quick = false;
  double min_seconds = 1.0;       ///< of a stage, all repetitions together
  double min_wall_seconds = 2.0;  ///< the same on several threads, where wall time counts: other work is part of it
  Index min_repeats = 7, max_repeats = 400;
  double long_seconds = 5.0;  ///< what takes this long, all together, is repeated 3 times at least
};

inline bool any_failed = false;

inline void fail(benchmark::State& state, const std::string& why) {
  any_failed = true;
  state.SkipWithError(why.c_str());
}

/// What is timed. `run` returns the seconds that count, or less than 0 when it failed; `prepare` is not timed.
struct Stage {
  std::function<double()> run;
  std::function<void()> prepare = [] {};
  std::vector<Work> works = {};           ///< for the floor
  std::function<double()> baseline = {};  ///< seconds of what `speedup` compares with, measured in turn
  double rows = 0;                        ///< rows that a run goes over
  std::size_t workspace_bytes = 0;
};

/// Seconds of f, or -1 when it returns false.
template <class F>
[[nodiscard]] double timed(F f) {
  const Stopwatch watch;
  const bool ok = f();
  const double seconds = watch.seconds();
  return ok ? seconds : -1.0;
}

/// Runs a stage and what it is compared with in turn. Counters, all of medians: seconds, spread ((p90 - p10) / median),
/// floor_seconds and ratio (of each repetition to the floor measured with it), speedup, what the floor gains by the threads
/// in the same moment, rates, heap calls of a run.
inline void measure(benchmark::State& state, const Settings& settings, const Stage& stage, ThreadPool& pool) {
  Stopwatch::set_threads(pool.concurrency());
  Floor floor(stage.works, pool);
  std::vector<double> seconds, floors, ratios, speedups, floor_speedups;
  const auto repeat = [&] {
    stage.prepare();
    const double floor_seconds = floor.seconds();
    const double spent = stage.run();
    if (spent < 0) return false;
    seconds.push_back(spent);
    floors.push_back(floor_seconds);
    ratios.push_back(spent / floor_seconds);
    if (stage.baseline) {
      stage.prepare();
      speedups.push_back(stage.baseline() / spent);
      if (pool.concurrency() > 1 && !stage.works.empty()) floor_speedups.push_back(floor.seconds(1) / floor_seconds);
    }
    return true;
  };
  for ([[maybe_unused]] auto _ : state) {
    stage.prepare();
    if (stage.run() < 0) return fail(state, "the stage failed");
    stage.prepare();
    double last = 0.0;
    const long heap_calls = test::heap_calls_of([&] { last = stage.run(); });
    if (heap_calls != 0) return fail(state, "the heap was called " + std::to_string(heap_calls) + " times");
    double sum = 0.0;
    const double least = pool.concurrency() > 1 ? settings.min_wall_seconds : settings.min_seconds;
    const auto enough = [&](Index repeats) {
      if (settings.quick) return repeats > 0;
      if (repeats < settings.min_repeats) return repeats >= 3 && sum > settings.long_seconds;
      return sum > least || repeats == settings.max_repeats;
    };
    for (Index i = 0; !enough(i); ++i) {
      if (!repeat()) return fail(state, "the stage failed");
      sum += seconds.back();
    }
    state.SetIterationTime(median(seconds));
  }
  const double middle = median(seconds);
  state.counters["seconds"] = middle;
  state.counters["min_seconds"] = quantile(seconds, 0.0);
  state.counters["spread"] = (quantile(seconds, 0.9) - quantile(seconds, 0.1)) / middle;
  state.counters["repeats"] = static_cast<double>(seconds.size());
  state.counters["heap_calls"] = 0;
  if (stage.rows > 0) state.counters["rows/s"] = stage.rows / middle;
  if (stage.workspace_bytes > 0) state.counters["workspace_bytes"] = static_cast<double>(stage.workspace_bytes);
  double bytes = 0.0, flops = 0.0;
  for (const Work& work : stage.works) {
    bytes += work.read_bytes + work.copied_bytes;
    flops += work.flops;
  }
  if (bytes > 0) state.counters["bytes/s"] = bytes / middle;
  if (flops > 0) state.counters["FLOP/s"] = flops / middle;
  if (!stage.works.empty()) {
    state.counters["floor_seconds"] = median(floors);
    state.counters["ratio"] = median(ratios);
    state.counters["ratio_spread"] = quantile(ratios, 0.9) - quantile(ratios, 0.1);
  }
  if (!speedups.empty()) state.counters["speedup"] = median(speedups);
  if (!floor_speedups.empty()) state.counters["floor_speedup"] = median(floor_speedups);
}

/// Registers `make(state)`, which builds its data and calls `measure`. Names are stage/model/variant/T:rows/threads:n.
template <class F>
void add(const std::string& name, F make) {
  benchmark::RegisterBenchmark(name.c_str(), [make](benchmark::State& state) { make(state); })
      ->Iterations(1)
      ->UseManualTime()
      ->Unit(benchmark::kMillisecond);
}

[[nodiscard]] inline std::string name_of(const std::string& stage, const char* model, const std::string& variant,
                                         Index rows, Index threads) {
  return stage + "/" + model + "/" + variant + "/T:" + std::to_string(rows) + "/threads:" + std::to_string(threads);
}

}  // namespace kvfold::bench
