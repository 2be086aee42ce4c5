/// \file
/// Compressing a layer from window evidence: score, budget, tiers, classes, merge, apply; and what share each stage
/// has.

#include "support/main.hpp"
#include "support/pipeline.hpp"

namespace kvfold::bench {

namespace {

void compress(benchmark::State& state, const Settings& settings, const Model& model, Index rows, Index threads) {
  Pipeline<Float16> p(model, rows, threads), alone(model, threads == 1 ? 1 : rows, 1);
  p.run_all();
  p.layer.restore();
  require(p.compress(), "compress");
  Stage stage{.run = [&] { return timed([&] { return p.compress().ok(); }); },
              .prepare = [&] { p.layer.restore(); },
              .works = p.whole_work(),
              .rows = p.all_rows(),
              .workspace_bytes = p.whole_bytes()};
  if (threads > 1) {
    alone.run_all();
    stage.prepare = [&] {
      p.layer.restore();
      alone.layer.restore();
    };
    stage.baseline = [&] { return timed([&] { return alone.compress().ok(); }); };
  }
  measure(state, settings, stage, p.pool);
}

/// The speed-up that two workers would have if they did not disturb each other: all work on one thread, as if on two.
void balance(benchmark::State& state, const Settings& settings, const Model& model, Index rows) {
  Pipeline<Float16> p(model, rows, 1);
  p.run_all();
  PretendedWorkers workers(2);
  std::vector<double> gains;
  gains.reserve(static_cast<std::size_t>(settings.max_repeats) + 2);
  const auto run = [&] {
    const double spent = timed([&] { return p.compress(workers).ok(); });
    if (gains.size() < gains.capacity()) gains.push_back(spent / (spent - workers.take_saved()));
    return spent;
  };
  measure(state, settings, {.run = run, .prepare = [&] { p.layer.restore(); }, .rows = p.all_rows()}, p.pool);
  state.counters["balance"] = median(gains);
}

/// The median share of each stage in the sum of all, the stages run one after the other.
void shares(benchmark::State& state, const Settings& settings, const Model& model, Index rows) {
  Pipeline<Float16> p(model, rows, 1);
  p.run_all();
  constexpr std::array names{"score", "budget", "tiers", "classes", "merge", "apply"};
  std::array<std::vector<double>, names.size()> shares;
  const auto seconds = [&](auto f) { return timed([&] { return f().ok(); }); };
  const auto run = [&] {
    std::array<double, names.size()> spent{seconds([&] { return p.score(); }), seconds([&] { return p.allocate(); }),
                                           seconds([&] { return p.rank(); }),  seconds([&] { return p.assign(); }),
                                           seconds([&] { return p.merge(); }), seconds([&] { return p.apply(); })};
    spent[4] = std::max(spent[4] - spent[2], 0.0);
    double sum = 0.0;
    for (const double s : spent) {
      if (s < 0) return -1.0;
      sum += s;
    }
    for (std::size_t i = 0; i < spent.size(); ++i) {
      if (shares[i].size() < shares[i].capacity()) shares[i].push_back(spent[i] / sum);
    }
    return sum;
  };
  for (auto& s : shares) s.reserve(static_cast<std::size_t>(settings.max_repeats) + 2);
  measure(state, settings, {.run = run, .prepare = [&] { p.layer.restore(); }, .rows = p.all_rows()}, p.pool);
  for (std::size_t i = 0; i < names.size(); ++i) {
    state.counters[std::string(names[i]) + "_share"] = median(shares[i]);
  }
}

}  // namespace

void register_benchmarks(const Settings& settings) {
  for (const Model& model : kModels) {
    for (const Index rows : kContexts) {
      if (is_left_out(settings, model, rows)) continue;
      for (const Index threads : {1, 2}) {
        add(name_of("end_to_end", model.name, "f16", rows, threads),
            [=](benchmark::State& state) { compress(state, settings, model, rows, threads); });
      }
      add(name_of("balance", model.name, "f16", rows, 1),
          [=](benchmark::State& state) { balance(state, settings, model, rows); });
      add(name_of("shares", model.name, "f16", rows, 1),
          [=](benchmark::State& state) { shares(state, settings, model, rows); });
    }
  }
}

}  // namespace kvfold::bench
