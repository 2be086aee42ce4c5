/// \file
/// Classes of the candidates: the similarities between candidates and centres.

#include "support/main.hpp"
#include "support/pipeline.hpp"

namespace kvfold::bench {

namespace {

void classes(benchmark::State& state, const Settings& settings, const Model& model, Index rows, Index threads) {
  Pipeline<Float16> p(model, rows, threads);
  p.run_all();
  measure(state, settings,
          {.run = [&] { return timed([&] { return p.assign().ok(); }); },
           .works = p.class_work(),
           .rows = p.all_rows(),
           .workspace_bytes = p.class_bytes()},
          p.pool);
}

}  // namespace

void register_benchmarks(const Settings& settings) {
  for (const Model& model : kModels) {
    for (const Index rows : kContexts) {
      for (const Index threads : {1, 2}) {
        if (settings.quick && (rows > kContexts[0] || model.name != kSmolLm.name)) continue;
        add(name_of("classes", model.name, "f16", rows, threads),
            [=](benchmark::State& state) { classes(state, settings, model, rows, threads); });
      }
    }
  }
}

}  // namespace kvfold::bench
