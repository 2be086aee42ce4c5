/// \file
/// Scores from the last W queries, by model, length and number of threads; and of all lengths in turn.

#include <memory>
#include <string>
#include <vector>

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

/// What a row of a head takes in layers of each length, which are scored in turn: shorter ones more often.
void score_lengths(benchmark::State& state, const Settings& settings, const Model& model,
                   const std::vector<Index>& lengths) {
  std::vector<std::unique_ptr<Pipeline<Float16>>> layers;
  std::vector<std::vector<double>> per_row(lengths.size());
  const auto repeats_of = [&](std::size_t i) { return std::size_t{1} << (lengths.size() - 1 - i); };
  for (std::size_t i = 0; i < lengths.size(); ++i) {
    layers.push_back(std::make_unique<Pipeline<Float16>>(model, lengths[i], 1));
    require(layers[i]->score(), "score");
    per_row[i].reserve(at(settings.max_repeats + 2) * repeats_of(i));
  }
  const auto run = [&] {
    double sum = 0.0;
    for (std::size_t i = 0; i < lengths.size(); ++i) {
      for (std::size_t repeat = 0; repeat < repeats_of(i); ++repeat) {
        const double spent = timed([&] { return layers[i]->score().ok(); });
        if (spent < 0) return -1.0;
        per_row[i].push_back(spent / layers[i]->all_rows());
        sum += spent;
      }
    }
    return sum;
  };
  measure(state, settings, {.run = run}, layers.back()->pool);
  for (std::size_t i = 0; i < lengths.size(); ++i) {
    state.counters["T:" + std::to_string(lengths[i])] = median(per_row[i]);
  }
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
  const std::vector<Index> lengths =
      settings.quick ? std::vector<Index>{512, 2048} : std::vector<Index>(kContexts.begin(), kContexts.end());
  add(name_of("score_window_lengths", kLlama.name, "f16", lengths.back(), 1),
      [=](benchmark::State& state) { score_lengths(state, settings, kLlama, lengths); });
}

}  // namespace kvfold::bench
