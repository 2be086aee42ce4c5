/// \file
/// Merging the classes into their centres. It is timed together with the tiers, which are timed again and subtracted.

#include "support/main.hpp"
#include "support/pipeline.hpp"

namespace kvfold::bench {

namespace {

void merge(benchmark::State& state, const Settings& settings, const Model& model, Index rows) {
  Pipeline<Float16> p(model, rows, 1);
  p.run_all();
  const auto run = [&] {
    const double both = timed([&] { return p.merge().ok(); });
    const double tiers = timed([&] { return p.rank().ok(); });
    return both < 0 || tiers < 0 ? -1.0 : std::max(both - tiers, 1e-9);
  };
  measure(
      state, settings,
      {.run = run, .works = p.merge_work(), .rows = p.all_rows(), .workspace_bytes = p.merge_bytes() - p.tier_bytes()},
      p.pool);
}

}  // namespace

void register_benchmarks(const Settings& settings) {
  for (const Model& model : kModels) {
    for (const Index rows : kContexts) {
      if (settings.quick && (rows > kContexts[0] || model.name != kSmolLm.name)) continue;
      add(name_of("merge", model.name, "f16", rows, 1),
          [=](benchmark::State& state) { merge(state, settings, model, rows); });
    }
  }
}

}  // namespace kvfold::bench
