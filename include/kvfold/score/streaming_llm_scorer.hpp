/// \file
/// StreamingLLM (arXiv 2309.17453): the first rows and the last ones, whatever they say.
#pragma once

#include "kvfold/score/scorer.hpp"

namespace kvfold {

/// s_j = j + 1: later is better. With `sinks` protected and budget B, the first S and the last B - S rows stay.
class StreamingLlmScorer {
 public:
  struct Options {
    Index sinks = 4;  ///< S, at least 0
    [[nodiscard]] Status validate() const noexcept { return Protect{.sinks = sinks}.validate(); }
  };

  StreamingLlmScorer() noexcept = default;
  explicit StreamingLlmScorer(Options options) noexcept : options_(options) {}

  [[nodiscard]] const Options& options() const noexcept { return options_; }
  [[nodiscard]] Status validate() const noexcept { return options_.validate(); }
  /// Any evidence will do: none is looked at.
  template <KVCacheView V, class E>
  [[nodiscard]] static std::size_t workspace_bytes(const V&, const E&, Index /*workers*/) noexcept {
    return 0;
  }
  template <KVCacheView V, class E, Executor X>
  Status score(const V& view, const E&, ScoreTable table, Workspace, X& executor) const noexcept {
    if (Status bad = detail::check_score_call(*this, view, table, executor); !bad.ok()) return bad;
    for (Index h = 0; h < table.heads(); ++h) {
      Protect{.sinks = options_.sinks}.mark(table.protections(h));
      // Exact up to 2^24 rows; beyond, rows that round to one score tie, and ties go to the lower index.
      for (Index t = 0; t < table.rows(h); ++t) table.scores(h)[detail::at(t)] = static_cast<float>(t + 1);
    }
    return {};
  }

 private:
  Options options_;
};

}  // namespace kvfold
