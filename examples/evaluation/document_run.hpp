/// \file
/// How well a model goes on with a text after its cache was compressed.
#pragma once

#include "evaluation/engine.hpp"

namespace evaluation {

/// One line of the results.
struct Measured {
  std::string method;
  kvfold::Index budget;
  std::size_t context;
  std::string document;
  double nll, full_nll, kl;
  Outcome outcome;

  [[nodiscard]] nlohmann::json to_json() const;
};

/// Everything that is measured on one document.
class DocumentRun {
 public:
  /// Reads the last `context` tokens before the continuation, so that every context predicts the same tokens.
  DocumentRun(Engine& engine, kvfold::ThreadPool& pool, const Document& document, std::size_t context,
              std::size_t continuation);

  [[nodiscard]] const ReadTimes& times() const { return times_; }
  [[nodiscard]] double full_nll() const { return full_nll_; }
  [[nodiscard]] const std::string& name() const { return name_; }

  [[nodiscard]] Measured measure(const Method& method, kvfold::Index budget);

 private:
  [[nodiscard]] std::span<const decoder::Token> next_tokens() const;
  /// Log probabilities of the next M tokens, teacher-forced.
  [[nodiscard]] decoder::Matrix read_on();

  Engine& engine_;
  kvfold::ThreadPool& pool_;
  std::string name_;
  std::span<const decoder::Token> tokens_;  // the context, the continuation, and what follows it
  std::size_t context_, continuation_;
  ReadTimes times_;
  decoder::Matrix full_;
  double full_nll_ = 0.0;
};

}  // namespace evaluation
