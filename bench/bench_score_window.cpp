/// \file
/// Scores from the last W queries, by model, length and number of threads.

#include "support/main.hpp"
#include "support/pipeline.hpp"

namespace kvfold::bench {

namespace {

void score(benchmark::State& state, const Settings& settings, const Model& model, Index rows, Index threads) {
  Pipeline<Float16> p(model, rows, threads), alone(model, threads == 1 ? 1 : rows, 1);
  require(p.score(), "score");
  Stage stage{.run = [&] { return timed([&] { return p.score().ok(); }); },
              .works = p.score_work(),
              .rows = p.all_rows(),
              .workspace_bytes = p.score_bytes()};
  if (threads > 1) {
    require(alone.score(), "score");
    stage.baseline = [&] { return timed([&] { return alone.score().ok(); }); };
  }
  measure(state, settings, stage, p.pool);
}

}  // namespace

void register_benchmarks(const Settings& settings) {
  for (const Model& model : kModels) {
    for (const Index rows : kContexts) {
      for (const Index threads : {1, 2}) {
        if (is_left_out(settings, model, rows)) continue;
        add(name_of("score_window", model.name, "f16", rows, threads),
            [=](benchmark::State& state) { score(state, settings, model, rows, threads); });
      }
    }
  }
}

}  // namespace kvfold::bench
