/// \file
/// Budgets that follow the heads.

#include "support/main.hpp"
#include "support/pipeline.hpp"

namespace kvfold::bench {

namespace {

void budget(benchmark::State& state, const Settings& settings, const Model& model, Index rows) {
  Pipeline<Float16> p(model, rows, 1);
  p.run_all();
  measure(state, settings,
          {.run = [&] { return timed([&] { return p.allocate().ok(); }); },
           .works = p.budget_work(),
           .rows = p.all_rows(),
           .workspace_bytes = p.budget_bytes()},
          p.pool);
}

}  // namespace

void register_benchmarks(const Settings& settings) {
  for (const Model& model : kModels) {
    for (const Index rows : kContexts) {
      if (settings.quick && (rows > kContexts[0] || model.name != kSmolLm.name)) continue;
      add(name_of("budget", model.name, "f16", rows, 1),
          [=](benchmark::State& state) { budget(state, settings, model, rows); });
    }
  }
}

}  // namespace kvfold::bench
