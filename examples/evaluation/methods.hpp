/// \file
/// The compression methods that the evaluator compares, by name, and the evidence they get.
#pragma once

#include <kvfold/kvfold.hpp>

#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include "decoder/decoder.hpp"

namespace evaluation {

/// Every option that can be set from outside; the rest are the library's defaults.
struct Options {
  /// One of them by its name, as on the command line without the dashes. Throws std::runtime_error.
  void set(const std::string& name, const std::string& value);
  [[nodiscard]] nlohmann::json to_json() const;

  kvfold::GlobalLocalScorer::Options score{};
  kvfold::AdaptiveHeadBudget::Options budget{};
  kvfold::EvictThenMerge<>::Options merge{};
  kvfold::SnapKvScorer::Options snapkv{};
  kvfold::StreamingLlmScorer::Options streaming_llm{};
};

/// What a user may set.
struct OptionField {
  std::string name, help;
  std::function<void(Options&, const std::string&)> set;
  std::function<nlohmann::json(const Options&)> get;
};
[[nodiscard]] const std::vector<OptionField>& option_fields();

/// Watches a prompt go by and keeps, for every layer, what scorers ask for: streamed column sums and the last queries.
class Evidence {
 public:
  /// \param rows the most rows that a layer's heads will have
  /// \param wanted options of all methods that will ask: each distinct window and stride is accumulated
  Evidence(const decoder::Decoder& model, kvfold::Index rows, const std::vector<Options>& wanted,
           kvfold::ThreadPool& pool);

  [[nodiscard]] decoder::Observer observer(const decoder::Sequence& sequence);
  /// The sums over the whole prompt, made from the caches as they were observed. Valid until the next call for this layer.
  [[nodiscard]] kvfold::ColumnSums sums(const Options& options, std::size_t layer, const decoder::Cache& cache);
  /// The queries of the last positions, at least as many as any window.
  [[nodiscard]] kvfold::QueryRows last_queries(std::size_t layer) const;
  /// Time spent on the sums of these options while the prompt was read.
  [[nodiscard]] double observe_ms(const Options& options) const;
  [[nodiscard]] double observe_ms() const;

 private:
  struct Tail {
    std::vector<float> queries;  // [W][H * G][D], oldest first
    std::vector<kvfold::Position> positions;
  };
  struct Stream {
    std::vector<kvfold::GlobalLocalAccumulator> layers;
    double ms = 0.0;
  };
  using Key = std::pair<kvfold::Index, kvfold::Index>;  // window, stride

  void remember(std::size_t layer, const kvfold::QueryRows& queries);

  kvfold::ThreadPool& pool_;
  kvfold::LayerShape shape_;
  kvfold::Index window_ = 1;
  std::map<Key, Stream> streams_;
  std::vector<Tail> tails_;
  kvfold::WorkspaceBuffer workspace_;
};

/// What a method did to one sequence.
struct Outcome {
  kvfold::CompressionReport report;  ///< summed over layers; shares are means
  double score_ms = 0.0;             ///< evidence and scores, all layers
  double compress_ms = 0.0;          ///< budgets, classes, merging and writing, all layers
  /// [layer][head] one letter for each row: k kept, m merged into a kept one, e evicted.
  std::vector<std::vector<std::string>> fates;
};

/// A method of the evaluation: a name, and options that may differ from the common ones.
struct Method {
  std::string label;  ///< as the user wrote it
  Options options;
  std::function<Outcome(decoder::Sequence&, Evidence&, kvfold::Index rows)> compress;  ///< to `rows` rows per head
};

[[nodiscard]] std::vector<std::string> method_names();

/// A method from "name" or "name@option=value@option=value". Throws std::runtime_error for what is not known or out of range.
[[nodiscard]] Method make_method(const std::string& text, const Options& common, kvfold::ThreadPool& pool);

}  // namespace evaluation
