/// \file
/// What the evaluation asks of an inference engine: read a prompt, compress its cache, read on.
#pragma once

#include <span>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "decoder/decoder.hpp"
#include "evaluation/documents.hpp"
#include "evaluation/methods.hpp"

namespace evaluation {

/// What a method did to one sequence.
struct Outcome {
  kvfold::CompressionReport report;  ///< of all layers, see kvfold::ReportOfLayers
  double score_ms = 0.0;             ///< evidence and scores, all layers
  double compress_ms = 0.0;          ///< budgets, classes, merging and writing, all layers
  /// [layer][head] one letter for each row: k kept, m merged into a kept one, e evicted.
  std::vector<std::vector<std::string>> fates;
};

/// What reading a prompt took.
struct ReadTimes {
  double prefill_ms = 0.0;
  double observe_ms = 0.0;  ///< spent on evidence while it was read, not in `prefill_ms`
};

/// The longest that an engine will be asked for, in tokens.
struct Longest {
  std::size_t prompt = 0;
  std::size_t sequence = 0;  ///< a prompt and what is read after it
};

/// A model and one sequence. Everything throws std::runtime_error when it fails.
class Engine {
 public:
  virtual ~Engine() = default;

  /// Known before `load`.
  [[nodiscard]] virtual Vocabulary vocabulary() const = 0;
  [[nodiscard]] virtual std::size_t max_positions() const = 0;
  /// What the JSON file says about the engine beside the common settings.
  [[nodiscard]] virtual nlohmann::json settings() const { return nlohmann::json::object(); }

  /// Gets ready; once, before the first prompt. \param methods all that `compress` will be called with
  virtual void load(Longest longest, std::span<const Method> methods) = 0;
  /// Reads a prompt with an empty cache, and gathers the evidence that the methods want.
  virtual ReadTimes read(std::span<const decoder::Token> prompt) = 0;
  /// Compresses the cache of the prompt as it was when it had been read, whatever was done since, to `rows` rows per head.
  virtual Outcome compress(const Method& method, kvfold::Index rows) = 0;
  /// Reads tokens after the prompt, or after what was read last. \returns the logits after each, [tokens][vocabulary]
  virtual decoder::Matrix forward(std::span<const decoder::Token> tokens) = 0;

 protected:
  Engine() = default;
  Engine(const Engine&) = default;
  Engine& operator=(const Engine&) = default;
};

}  // namespace evaluation
