/// \file
/// What a prompt in kvfold's own decoder leaves behind for the methods.
#pragma once

#include <kvfold/kvfold.hpp>

#include <map>
#include <span>
#include <utility>
#include <vector>

#include "decoder/decoder.hpp"
#include "evaluation/methods.hpp"

namespace evaluation {

/// Watches a prompt go by and keeps, for every layer, what scorers ask for: streamed column sums and the last queries.
class Evidence {
 public:
  /// \param rows the most rows that a layer's heads will have
  /// \param methods all that will ask: each distinct window and stride is accumulated
  Evidence(const decoder::Decoder& model, kvfold::Index rows, std::span<const Method> methods,
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

}  // namespace evaluation
