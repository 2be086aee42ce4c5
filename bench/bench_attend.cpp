/// \file
/// Decode attention: one query row for each query head, over long rows of each storage type.

#include <kvfold/attend.hpp>

#include "support/main.hpp"
#include "support/pipeline.hpp"

namespace kvfold::bench {

namespace {

/// As Llama-2-7B has them, a quarter of its heads: every query head has keys of its own.
constexpr Model kMultiHead{"llama2_7b_8", {8, 1, 128, 128}, 1024};

/// What the products would take at the speed of large ones, and the exps: where many queries share a row that is stored in
/// few bytes, more than reading it. Few queries never reach that speed with Eigen.
double arithmetic_seconds(const Model& model, Index rows, ThreadPool& pool) {
  const LayerShape& s = model.shape;
  const double weights = static_cast<double>(s.query_heads() * rows);
  Floor floor({{.flops = 2.0 * weights * static_cast<double>(s.key_dim + s.value_dim),
                .exps = weights,
                .product = {64, 256, s.key_dim}}},
              pool);
  std::vector<double> seconds(7);
  for (double& x : seconds) x = floor.seconds();
  return median(seconds);
}

template <Stored E>
void decode(benchmark::State& state, const Settings& settings, const Model& model, Index rows, Index threads) {
  ThreadPool pool(threads);
  Layer<E> layer(model.shape, rows);
  const Queries queries(model.shape, 1, rows);
  std::vector<float> out(at(model.shape.query_heads() * model.shape.value_dim));
  const std::size_t bytes = attend_workspace_bytes(model.shape, threads);
  WorkspaceBuffer workspace;
  require(workspace.reserve(bytes), "workspace");
  const auto view = layer.view();
  const auto run = [&] {
    return attend(view, queries.view(),
                  {.data = out.data(), .head_stride = model.shape.value_dim, .row_stride = model.shape.value_dim},
                  workspace.get(), pool)
        .ok();
  };
  measure(state, settings,
          {.run = [&] { return timed(run); },
           .works = {{.read_bytes = static_cast<double>(model.shape.kv_heads * rows) * layer.row_bytes()}},
           .rows = static_cast<double>(model.shape.kv_heads * rows),
           .workspace_bytes = bytes},
          pool);
  const double seconds = state.counters["seconds"];
  state.counters["share_of_floor"] = 1.0 / state.counters["ratio"];
  state.counters["share_of_arithmetic"] = arithmetic_seconds(model, rows, pool) / seconds;
}

template <Stored E>
void add_type(const Settings& settings, const char* storage) {
  for (const Model& model : {kMultiHead, kLlama, kQwen, kSmolLm}) {
    for (const Index rows : {Index{2048}, Index{32768}}) {
      if (settings.quick && rows > 2048) continue;
      for (const Index threads : {1, 2}) {
        add(name_of("attend", model.name, storage, rows, threads),
            [=](benchmark::State& state) { decode<E>(state, settings, model, rows, threads); });
      }
    }
  }
}

}  // namespace

void register_benchmarks(const Settings& settings) {
  for_each_storage([&]<Stored E>(const char* storage) { add_type<E>(settings, storage); });
}

}  // namespace kvfold::bench
