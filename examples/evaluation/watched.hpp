/// \file
/// What every engine measures of a compressor at work.
#pragma once

#include <chrono>
#include <utility>

#include "evaluation/engine.hpp"

namespace evaluation {

using Clock = std::chrono::steady_clock;

[[nodiscard]] inline double ms_since(Clock::time_point start) noexcept {
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

/// A scorer that adds the time another one takes to a counter: how a policy is wrapped in a policy.
template <class Scorer>
class Timed {
 public:
  using Options = typename Scorer::Options;
  Timed(Scorer scorer, double& ms) : scorer_(std::move(scorer)), ms_(&ms) {}
  [[nodiscard]] kvfold::Status validate() const noexcept { return scorer_.validate(); }
  template <class V, class E>
  [[nodiscard]] std::size_t workspace_bytes(const V& view, const E& evidence, kvfold::Index workers) const noexcept {
    return scorer_.workspace_bytes(view, evidence, workers);
  }
  template <class V, class E, class X>
  kvfold::Status score(const V& view, const E& evidence, kvfold::ScoreTable table, kvfold::Workspace workspace,
                       X& executor) const noexcept {
    const auto start = Clock::now();
    const kvfold::Status status = scorer_.score(view, evidence, table, workspace, executor);
    *ms_ += ms_since(start);
    return status;
  }

 private:
  Scorer scorer_;
  double* ms_;
};

/// A compressor that tells an outcome how long its scores and plans take (`compress_ms` holds both), and the rows' fates.
template <class Scorer, class Budget, class Reducer>
class Watched {
 public:
  Watched(const kvfold::Compressor<Scorer, Budget, Reducer>& compressor, Outcome& outcome)
      : compressor_(Timed<Scorer>(compressor.scorer(), outcome.score_ms), compressor.budget(), compressor.reducer()),
        outcome_(&outcome) {}

  template <class V, class E>
  [[nodiscard]] kvfold::Result<std::size_t> workspace_bytes(const V& view, const E& evidence,
                                                            kvfold::Index workers) const noexcept {
    return compressor_.workspace_bytes(view, evidence, workers);
  }
  template <class V, class E, class X>
  [[nodiscard]] kvfold::Result<kvfold::CompressionPlan> plan(const V& view, const E& evidence,
                                                             kvfold::Workspace workspace, X& executor) const noexcept {
    const auto start = Clock::now();
    auto plan = compressor_.plan(view, evidence, workspace, executor);
    outcome_->compress_ms += ms_since(start);
    if (plan.ok()) outcome_->fates.push_back(fates_of(*plan));
    return plan;
  }

 private:
  static std::vector<std::string> fates_of(const kvfold::CompressionPlan& plan) {
    std::vector<std::string> heads;
    for (kvfold::Index h = 0; h < plan.shape.kv_heads; ++h) {
      std::string& letters = heads.emplace_back();
      for (const kvfold::RowFate fate : plan.fates(h)) letters += "ekm"[static_cast<std::size_t>(fate)];
    }
    return heads;
  }

  kvfold::Compressor<Timed<Scorer>, Budget, Reducer> compressor_;
  Outcome* outcome_;
};

}  // namespace evaluation
