/// \file
/// The main kernels at fixed sizes, for valgrind's callgrind: tools/lib/count_instructions.py runs it and reads the
/// counts.
///
/// Given the name of a kernel and a number, runs that kernel as often, for other profilers.

#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <valgrind/callgrind.h>
#include <vector>

#include "support/pipeline.hpp"

namespace kvfold::bench {

namespace {

constexpr Model kSmallLayer{"", {2, 4, 128, 128}, 256};
constexpr Index kRows = 2048, kPrompt = 512;

struct Kernel {
  std::string name;
  std::function<bool()> run;
};

/// Reads all keys of a layer, tile by tile.
template <Stored E>
Kernel conversion(const char* name) {
  auto layer = std::make_shared<Layer<E>>(LayerShape{1, 1, 128, 128}, kRows);
  return {std::string("convert_") + name, [layer] {
            std::vector<float> tile(at(detail::kKeyTile * 128));
            for (Index t = 0; t < kRows; t += detail::kKeyTile) {
              layer->view().read_keys(0, t, detail::kKeyTile, tile);
              benchmark::DoNotOptimize(tile.data());
            }
            return true;
          }};
}

/// One decode step over a layer's rows.
template <Stored E>
Kernel attention(const char* name) {
  const LayerShape shape = kSmallLayer.shape;
  struct State {
    Layer<E> layer;
    Queries queries;
    SerialExecutor serial = {};
    WorkspaceBuffer workspace = {};
    std::vector<float> out;
  };
  const auto state = std::make_shared<State>(State{
      .layer = {shape, kRows}, .queries = {shape, 1, kRows}, .out = std::vector<float>(at(shape.query_heads() * 128))});
  require(state->workspace.reserve(attend_workspace_bytes(shape, 1)), "workspace");
  return {std::string("attend_") + name, [state] {
            return attend(state->layer.view(), state->queries.view(), {state->out.data(), 128, 128},
                          state->workspace.get(), state->serial)
                .ok();
          }};
}

std::vector<Kernel> kernels() {
  using P = Pipeline<Float16>;
  const auto window = std::make_shared<P>(kSmallLayer, kRows, 1);
  window->run_all();
  const auto exact = std::make_shared<P>(kSmallLayer, kPrompt, 1, kPrompt);
  const auto sampled = std::make_shared<P>(kSmallLayer, kRows, 1, kRows,
                                           GlobalLocalScorer::Options{.window = kWindow, .query_stride = 16});
  const auto given = std::make_shared<P>(kSmallLayer, kPrompt, 1, kPrompt);
  fill_log_sum_exps(*given);
  return {{"score_window", [=] { return window->score().ok(); }},
          {"score_global_exact", [=] { return exact->score().ok(); }},
          {"score_global_given_lse", [=] { return given->score().ok(); }},
          {"score_global_sampled_16", [=] { return sampled->score().ok(); }},
          {"budget", [=] { return window->allocate().ok(); }},
          {"tiers", [=] { return window->rank().ok(); }},
          {"classes", [=] { return window->assign().ok(); }},
          {"tiers_and_merge", [=] { return window->merge().ok(); }},
          {"apply",
           [=] {
             window->layer.restore();
             return window->apply().ok();
           }},
          attention<float>("f32"),
          attention<Float16>("f16"),
          attention<BlockQ8_0>("q8_0"),
          conversion<Float16>("f16"),
          conversion<BFloat16>("bf16"),
          conversion<Float8E4M3>("fp8_e4m3"),
          conversion<Int8>("int8"),
          conversion<BlockQ8_0>("q8_0"),
          conversion<BlockQ4_0>("q4_0")};
}

}  // namespace

int count(std::string_view only, int repeats) {
  for (const Kernel& kernel : kernels()) {
    if (!only.empty() && only != kernel.name) continue;
    if (!kernel.run()) return 1;  // allocates
    CALLGRIND_START_INSTRUMENTATION;
    CALLGRIND_ZERO_STATS;
    for (int i = 0; i < repeats; ++i) {
      if (!kernel.run()) return 1;
    }
    CALLGRIND_DUMP_STATS_AT(kernel.name.c_str());
    CALLGRIND_STOP_INSTRUMENTATION;
  }
  return 0;
}

}  // namespace kvfold::bench

int main(int argc, char** argv) {
  return kvfold::bench::count(argc > 1 ? argv[1] : "", argc > 2 ? std::atoi(argv[2]) : 1);
}
