/// \file
/// Kept rows and candidates of every head.

#include "support/main.hpp"
#include "support/pipeline.hpp"

namespace kvfold::bench {

namespace {

void tiers(benchmark::State& state, const Settings& settings, const Model& model, Index rows) {
  Pipeline<Float16> p(model, rows, 1);
  p.run_all();
  measure(state, settings,
          {.run = [&] { return timed([&] { return p.rank().ok(); }); },
           .works = p.tier_work(),
           .rows = p.all_rows(),
           .workspace_bytes = p.tier_bytes()},
          p.pool);
}

}  // namespace

void register_benchmarks(const Settings& settings) {
  for (const Model& model : kModels) {
    for (const Index rows : kContexts) {
      if (settings.quick && (rows > kContexts[0] || model.name != kSmolLm.name)) continue;
      add(name_of("tiers", model.name, "f16", rows, 1),
          [=](benchmark::State& state) { tiers(state, settings, model, rows); });
    }
  }
}

}  // namespace kvfold::bench
