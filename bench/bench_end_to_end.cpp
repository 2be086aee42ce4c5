/// \file
/// Scoring and planning one layer, beside the products and exps that no implementation can avoid.

#include <kvfold/kvfold.hpp>

#include <chrono>
#include <random>
#include <vector>

#include <Eigen/Core>
#include <benchmark/benchmark.h>

namespace {

using kvfold::Index;

struct Layer {
  kvfold::RaggedCache<kvfold::Float16> cache;
  std::vector<float> queries;
  std::vector<kvfold::Position> positions;
};

Layer make_layer(kvfold::LayerShape shape, Index rows, Index window) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  const auto fill = [&](Index n) {
    std::vector<float> x(static_cast<std::size_t>(n));
    for (float& v : x) v = normal(random);
    return x;
  };
  std::vector<kvfold::Position> positions(static_cast<std::size_t>(rows));
  for (Index t = 0; t < rows; ++t) positions[static_cast<std::size_t>(t)] = t;
  auto cache = kvfold::RaggedCache<kvfold::Float16>::create(shape);
  const auto keys = fill(shape.kv_heads * rows * shape.key_dim), values = fill(shape.kv_heads * rows * shape.value_dim);
  const auto status = cache->append(keys.data(), kvfold::Strides::head_major(rows, shape.key_dim), values.data(),
                                    kvfold::Strides::head_major(rows, shape.value_dim), positions);
  if (!status.ok()) std::abort();
  return {std::move(cache).value(),
          fill(shape.query_heads() * window * shape.key_dim),
          {positions.end() - window, positions.end()}};
}

/// Seconds for the least work that window scores and classes need: their products at Eigen's speed, and the exps.
double floor_seconds(kvfold::LayerShape shape, Index rows, Index window, Index budget) {
  using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  const Matrix queries = Matrix::Random(shape.group_size * window, shape.key_dim),
               keys = Matrix::Random(rows, shape.key_dim);
  const Matrix unit_keys = Matrix::Random(budget, shape.key_dim), unit_values = Matrix::Random(budget, shape.value_dim);
  Matrix logits(queries.rows(), rows), key_sims(budget, budget), value_sims(budget, budget);
  const auto start = std::chrono::steady_clock::now();
  for (Index h = 0; h < shape.kv_heads; ++h) {
    logits.noalias() = queries * keys.transpose();
    logits = logits.array().exp();
    key_sims.noalias() = unit_keys * unit_keys.transpose();
    value_sims.noalias() = unit_values * unit_values.transpose();
    benchmark::DoNotOptimize(logits.data());
    benchmark::DoNotOptimize(key_sims.data());
    benchmark::DoNotOptimize(value_sims.data());
  }
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// EMS with window evidence on one thread: score, budgets, tiers, classes, merged rows.
void BM_PlanWindow(benchmark::State& state, kvfold::LayerShape shape, Index budget) {
  constexpr Index kWindow = 32;
  const Index rows = state.range(0);
  const Layer layer = make_layer(shape, rows, kWindow);
  const auto queries =
      kvfold::head_major_queries(layer.queries.data(), shape.query_heads(), shape.key_dim, layer.positions);
  const kvfold::Ems ems({.budget = {.rows = budget}});
  kvfold::SerialExecutor executor;
  kvfold::WorkspaceBuffer workspace;
  const auto bytes = ems.workspace_bytes(layer.cache, queries, 1);
  if (!bytes.ok() || !workspace.reserve(bytes.value()).ok()) return state.SkipWithError("workspace");
  double floor = floor_seconds(shape, rows, kWindow, budget);
  for (int i = 0; i < 4; ++i) floor = std::min(floor, floor_seconds(shape, rows, kWindow, budget));
  double best = 1e9;
  for (auto _ : state) {
    const auto start = std::chrono::steady_clock::now();
    const auto plan = ems.plan(layer.cache, queries, workspace.get(), executor);
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    if (!plan.ok()) return state.SkipWithError("plan");
    benchmark::DoNotOptimize(plan.value());
  }
  state.counters["rows/s"] =
      benchmark::Counter(static_cast<double>(shape.kv_heads * rows), benchmark::Counter::kIsIterationInvariantRate);
  state.counters["best/floor"] = best / floor;
  state.counters["workspace_MB"] = static_cast<double>(bytes.value()) / 1e6;
}

BENCHMARK_CAPTURE(BM_PlanWindow, smollm2_135m, kvfold::LayerShape{3, 3, 64, 64}, 256)
    ->Arg(2048)
    ->Arg(8192)
    ->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(BM_PlanWindow, llama3_8b, kvfold::LayerShape{8, 4, 128, 128}, 1024)
    ->Arg(8192)
    ->Arg(32768)
    ->Unit(benchmark::kMillisecond);

}  // namespace

BENCHMARK_MAIN();
