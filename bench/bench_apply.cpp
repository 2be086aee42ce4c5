/// \file
/// Carrying a plan out: kept rows move to the front, merged ones are written.

#include "support/main.hpp"
#include "support/pipeline.hpp"

namespace kvfold::bench {

namespace {

void apply(benchmark::State& state, const Settings& settings, const Model& model, Index rows) {
  Pipeline<Float16> p(model, rows, 1);
  p.run_all();
  measure(state, settings,
          {.run = [&] { return timed([&] { return p.apply().ok(); }); },
           .prepare = [&] { p.layer.restore(); },
           .works = p.apply_work(),
           .rows = static_cast<double>(p.plan.kept.size())},
          p.pool);
}

}  // namespace

void register_benchmarks(const Settings& settings) {
  for (const Model& model : kModels) {
    for (const Index rows : kContexts) {
      if (settings.quick && (rows > kContexts[0] || model.name != kSmolLm.name)) continue;
      add(name_of("apply", model.name, "f16", rows, 1),
          [=](benchmark::State& state) { apply(state, settings, model, rows); });
    }
  }
}

}  // namespace kvfold::bench
