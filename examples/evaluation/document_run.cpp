#include "evaluation/document_run.hpp"

#include <cmath>

#include "evaluation/metrics.hpp"

namespace evaluation {

nlohmann::json Measured::to_json() const {
  return {{"method", method},
          {"budget", budget},
          {"context", context},
          {"document", document},
          {"perplexity", std::exp(nll)},
          {"ratio", std::exp(nll - full_nll)},
          {"kl", kl},
          {"rows", outcome.report.rows_kept},
          {"rows_merged", outcome.report.rows_merged},
          {"rows_evicted", outcome.report.rows_evicted},
          {"bytes", outcome.report.bytes_after},
          {"bytes_before", outcome.report.bytes_before},
          {"kept_score_share", outcome.report.kept_score_share},
          {"score_ms", outcome.score_ms},
          {"compress_ms", outcome.compress_ms}};
}

DocumentRun::DocumentRun(Engine& engine, kvfold::ThreadPool& pool, const Document& document, std::size_t context,
                         std::size_t continuation)
    : engine_(engine),
      pool_(pool),
      name_(document.name),
      tokens_(document.tokens.last(context + continuation + 1)),
      context_(context),
      continuation_(continuation),
      times_(engine.read(tokens_.first(context))),
      full_(read_on()),
      full_nll_(negative_log_likelihood(full_, next_tokens())) {}

Measured DocumentRun::measure(const Method& method, kvfold::Index budget) {
  const Outcome outcome = engine_.compress(method, budget);
  const std::string& name = method.label;
  if (method.is_full()) return {name, budget, context_, name_, full_nll_, full_nll_, 0.0, outcome};
  const decoder::Matrix log_probabilities = read_on();
  const double nll = negative_log_likelihood(log_probabilities, next_tokens());
  return {name, budget, context_, name_, nll, full_nll_, mean_kl(full_, log_probabilities, pool_), outcome};
}

std::span<const decoder::Token> DocumentRun::next_tokens() const {
  return tokens_.subspan(context_ + 1, continuation_);
}

decoder::Matrix DocumentRun::read_on() {
  decoder::Matrix all = engine_.forward(tokens_.subspan(context_, continuation_));
  log_softmax(all, pool_);
  return all;
}

}  // namespace evaluation
