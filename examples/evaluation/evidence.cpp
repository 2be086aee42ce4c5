#include "evaluation/evidence.hpp"

#include <kvfold/throwing.hpp>

#include <algorithm>

#include "evaluation/watched.hpp"

namespace evaluation {

using kvfold::Index;

Evidence::Evidence(const decoder::Decoder& model, Index rows, std::span<const Method> methods, kvfold::ThreadPool& pool)
    : pool_(pool),
      shape_(model.config().layer_shape()),
      window_(window_of(methods)),
      tails_(static_cast<std::size_t>(model.config().layers)) {
  for (const Method& method : methods) {
    const kvfold::GlobalLocalScorer::Options& score = method.options.score;
    Stream& stream = streams_[{score.window, score.query_stride}];
    if (!stream.layers.empty()) continue;
    // Query heads are kept apart, so that methods may join them as they like.
    const kvfold::GlobalLocalAccumulator::Options keep{
        .window = score.window, .query_stride = score.query_stride, .group = kvfold::GroupReduction::max};
    for (std::size_t i = 0; i < tails_.size(); ++i) {
      stream.layers.push_back(kvfold::or_throw(kvfold::GlobalLocalAccumulator::create(shape_, rows, keep)));
    }
    kvfold::or_throw(workspace_.reserve(stream.layers.front().workspace_bytes(rows, pool.concurrency())));
  }
}

decoder::Observer Evidence::observer(const decoder::Sequence& sequence) {
  return [this, &sequence](std::size_t layer, const kvfold::QueryRows& queries) {
    for (auto& [key, stream] : streams_) {
      const auto start = Clock::now();
      kvfold::or_throw(stream.layers[layer].observe(sequence.layers[layer], queries, workspace_.get(), pool_));
      stream.ms += ms_since(start);
    }
    remember(layer, queries);
  };
}

void Evidence::remember(std::size_t layer, const kvfold::QueryRows& queries) {
  Tail& tail = tails_[layer];
  const Index width = shape_.query_heads() * shape_.key_dim;
  const Index fresh = std::min(window_, queries.rows());
  const Index old = std::min(window_ - fresh, static_cast<Index>(tail.positions.size()));
  tail.positions.erase(tail.positions.begin(), tail.positions.end() - old);
  tail.queries.erase(tail.queries.begin(), tail.queries.end() - old * width);
  for (Index i = queries.rows() - fresh; i < queries.rows(); ++i) {
    tail.positions.push_back(queries.positions[static_cast<std::size_t>(i)]);
    for (Index q = 0; q < shape_.query_heads(); ++q) {
      tail.queries.insert(tail.queries.end(), queries.row(q, i), queries.row(q, i) + shape_.key_dim);
    }
  }
}

kvfold::ColumnSums Evidence::sums(const Options& options, std::size_t layer, const decoder::Cache& cache) {
  Stream& stream = streams_.at({options.score.window, options.score.query_stride});
  return kvfold::or_throw(stream.layers[layer].summarize(cache, workspace_.get(), pool_));
}

kvfold::QueryRows Evidence::last_queries(std::size_t layer) const {
  const Tail& tail = tails_[layer];
  return kvfold::token_major_queries(tail.queries.data(), shape_.query_heads(), shape_.key_dim, tail.positions);
}

double Evidence::observe_ms(const Options& options) const {
  return streams_.at({options.score.window, options.score.query_stride}).ms;
}

double Evidence::observe_ms() const {
  double sum = 0.0;
  for (const auto& [key, stream] : streams_) sum += stream.ms;
  return sum;
}

}  // namespace evaluation
