#include "evaluation/decoder_engine.hpp"

#include <kvfold/report_of_layers.hpp>
#include <kvfold/throwing.hpp>

#include <algorithm>
#include <utility>

#include "evaluation/watched.hpp"

namespace evaluation {

using kvfold::Index;

namespace {

/// What is to be said of a cache that was left as it is.
Outcome outcome_of_full(const decoder::Sequence& sequence) {
  Outcome outcome;
  outcome.report.rows_before = outcome.report.rows_kept = sequence.rows();
  for (const decoder::Cache& cache : sequence.layers) {
    for (Index h = 0; h < cache.shape().kv_heads; ++h) {
      outcome.report.bytes_before += cache.size(h) * cache.row_bytes(h);
    }
  }
  outcome.report.bytes_after = outcome.report.bytes_before;
  return outcome;
}

}  // namespace

DecoderEngine::DecoderEngine(std::filesystem::path directory, kvfold::ThreadPool& pool, std::size_t chunk)
    : directory_(std::move(directory)),
      pool_(pool),
      chunk_(chunk),
      config_(decoder::Config::load(directory_ / "config.json")) {}

Vocabulary DecoderEngine::vocabulary() const { return {config_.vocab_size, config_.tokenizer == "bytes"}; }

std::size_t DecoderEngine::max_positions() const { return static_cast<std::size_t>(config_.max_positions); }

void DecoderEngine::load(Longest /*longest*/, std::span<const Method> methods) {
  methods_.assign(methods.begin(), methods.end());
  model_.emplace(directory_, pool_);
}

ReadTimes DecoderEngine::read(std::span<const decoder::Token> prompt) {
  prompt_ = model_->new_sequence();
  evidence_.emplace(*model_, static_cast<Index>(prompt.size()), methods_, pool_);
  const auto start = Clock::now();
  model_->prefill(prompt, prompt_, chunk_, evidence_->observer(prompt_));
  const double both = ms_since(start), observe = evidence_->observe_ms();
  sequence_ = prompt_.clone();
  return {both - observe, observe};
}

Outcome DecoderEngine::compress(const Method& method, Index rows) {
  sequence_ = prompt_.clone();
  if (method.is_full()) return outcome_of_full(sequence_);
  return std::visit([&](const auto& compressor) { return compress_layers(method, compressor); },
                    method.compressor(rows));
}

template <class Compressor>
Outcome DecoderEngine::compress_layers(const Method& method, const Compressor& compressor) {
  Outcome outcome;
  const Watched watched(compressor, outcome);
  kvfold::WorkspaceBuffer workspace;
  kvfold::ReportOfLayers layers;
  const auto compress = [&](decoder::Cache& cache, const auto& seen) {
    kvfold::or_throw(workspace.reserve(kvfold::or_throw(watched.workspace_bytes(cache, seen, pool_.concurrency()))));
    const auto plan = kvfold::or_throw(watched.plan(std::as_const(cache), seen, workspace.get(), pool_));
    const auto start = Clock::now();
    const auto report = kvfold::or_throw(kvfold::apply(plan, cache));
    outcome.compress_ms += ms_since(start);
    layers.add(report);
  };
  double evidence_ms = 0.0;
  for (std::size_t i = 0; i < sequence_.layers.size(); ++i) {
    decoder::Cache& cache = sequence_.layers[i];
    if (method.asked == Asked::last_queries) {
      compress(cache, evidence_->last_queries(i));
    } else {
      const auto start = Clock::now();
      const kvfold::ColumnSums sums = evidence_->sums(method.options, i, cache);
      evidence_ms += ms_since(start);
      compress(cache, sums);
    }
  }
  outcome.compress_ms -= outcome.score_ms;
  if (method.asked == Asked::whole_prompt) outcome.score_ms += evidence_ms + evidence_->observe_ms(method.options);
  outcome.report = layers.total();
  return outcome;
}

decoder::Matrix DecoderEngine::forward(std::span<const decoder::Token> tokens) {
  decoder::Matrix all(static_cast<Eigen::Index>(tokens.size()), config_.vocab_size);
  for (std::size_t first = 0; first < tokens.size(); first += chunk_) {
    const auto piece = tokens.subspan(first, std::min(chunk_, tokens.size() - first));
    all.middleRows(static_cast<Eigen::Index>(first), static_cast<Eigen::Index>(piece.size())) =
        model_->forward(piece, sequence_, decoder::Logits::all);
  }
  return all;
}

}  // namespace evaluation
