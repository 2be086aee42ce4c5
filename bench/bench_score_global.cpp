/// \file
/// Scores from all queries of a prompt: exact, exact with log-sum-exps that the engine has, and every 16th query.

#include "support/main.hpp"
#include "support/pipeline.hpp"

namespace kvfold::bench {

namespace {

enum class Kind { exact, given_sums, sampled };
constexpr Index kStride = 16;  // s

GlobalLocalScorer::Options options(Kind kind) {
  return {.window = kWindow, .query_stride = kind == Kind::sampled ? kStride : 1};
}

void score(benchmark::State& state, const Settings& settings, const Model& model, Kind kind, Index rows,
           Index threads) {
  Pipeline<Float16> p(model, rows, threads, rows, options(kind));
  if (kind == Kind::given_sums) fill_log_sum_exps(p);
  require(p.score(), "score");
  Stage stage{.run = [&] { return timed([&] { return p.score().ok(); }); },
              .works = p.score_work(),
              .rows = p.all_rows(),
              .workspace_bytes = p.score_bytes()};
  Pipeline<Float16> other(model, rows, kind == Kind::sampled ? threads : 1, rows);
  if (kind == Kind::sampled) {  // a sampled score is compared with the exact one; its floor is that of what it looks at
    const double window = static_cast<double>(kWindow), all = static_cast<double>(rows);
    Work& work = stage.works.front();
    const double share = (window + (all - window) / (2.0 * kStride)) / (all / 2.0);
    work.flops *= share;
    work.exps *= share;
  } else if (kind == Kind::given_sums) {
    other.evidence.log_sum_exp = p.evidence.log_sum_exp;
  }
  if (kind == Kind::sampled || threads > 1) {
    require(other.score(), "score");
    stage.baseline = [&] { return timed([&] { return other.score().ok(); }); };
  }
  measure(state, settings, stage, p.pool);
}

}  // namespace

void register_benchmarks(const Settings& settings) {
  const auto name = [](Kind kind) {
    return kind == Kind::exact ? "exact" : kind == Kind::given_sums ? "given_lse" : "sampled_16";
  };
  for (const Kind kind : {Kind::exact, Kind::given_sums, Kind::sampled}) {
    for (const Model& model : kModels) {
      for (const Index rows : {Index{512}, kContexts[0], kContexts[1]}) {
        for (const Index threads : {1, 2}) {
          const bool tiny = rows == 512;
          if (tiny != settings.quick || (tiny && model.name != kSmolLm.name)) continue;
          add(name_of("score_global", model.name, name(kind), rows, threads),
              [=](benchmark::State& state) { score(state, settings, model, kind, rows, threads); });
        }
      }
    }
  }
}

}  // namespace kvfold::bench
