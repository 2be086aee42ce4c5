/// \file
/// kvfold for Python, as far as the comparison with other libraries needs it: a layer of fp16 rows that is compressed again
/// and again, and a cache to attend to. Every function that can fail returns a message, or null.

#include <kvfold/exec/thread_pool.hpp>
#include <kvfold/kvfold.hpp>

#include <algorithm>
#include <memory>
#include <numeric>
#include <string>
#include <variant>
#include <vector>

namespace {

using kvfold::Index;

using SnapKv = kvfold::Compressor<kvfold::SnapKvScorer, kvfold::UniformBudget, kvfold::EvictOnly>;
using AdaSnapKv = kvfold::Compressor<kvfold::SnapKvScorer, kvfold::AdaptiveHeadBudget, kvfold::EvictOnly>;
using H2o = kvfold::Compressor<kvfold::H2oScorer, kvfold::UniformBudget, kvfold::EvictOnly>;

thread_local std::string message;  // of the last failure

const char* result(const kvfold::Status& status) {
  if (status.ok()) return nullptr;
  message = std::string(status.argument()) + ": " + std::string(status.detail());
  return message.c_str();
}

std::size_t at(Index i) { return static_cast<std::size_t>(i); }

/// Rows [H][T][D] that were given, and a copy of them that is compressed.
class Layer {
 public:
  Layer(kvfold::LayerShape shape, Index rows, const std::uint16_t* keys, const std::uint16_t* values, Index threads)
      : pool(threads), shape_(shape), rows_(rows), from_{keys, values}, counts_(at(shape.kv_heads)) {
    const std::size_t all = at(shape.kv_heads * rows);
    for (std::size_t i = 0; i < 2; ++i) {
      units_[i].resize(all * at(shape.key_dim));
      for (std::size_t d = 0; d < units_[i].size(); ++d) units_[i][d].bits = from_[i][d];
    }
    positions_.resize(all);
    masses_.resize(all);
    std::fill(counts_.begin(), counts_.end(), rows);
    for (Index h = 0; h < shape.kv_heads; ++h) number(h, rows);
  }

  [[nodiscard]] kvfold::StridedView<kvfold::Float16> view() {
    const auto strides = kvfold::Strides::head_major(rows_, shape_.key_dim);
    return {.layer = shape_,
            .keys = units_[0].data(),
            .key_strides = strides,
            .values = units_[1].data(),
            .value_strides = strides,
            .rows = counts_,
            .positions = positions_,
            .position_stride = rows_,
            .log_masses = masses_,
            .log_mass_stride = rows_};
  }

  /// Undoes a compression: rows only moved towards the front.
  void restore() {
    for (Index h = 0; h < shape_.kv_heads; ++h) {
      const Index first = h * rows_ * shape_.key_dim, count = counts_[at(h)] * shape_.key_dim;
      for (std::size_t i = 0; i < 2; ++i) {
        for (Index d = first; d < first + count; ++d) units_[i][at(d)].bits = from_[i][d];
      }
      number(h, counts_[at(h)]);
      counts_[at(h)] = rows_;
    }
  }

  template <class Method, class Evidence>
  kvfold::Status compress(const Method& method, const Evidence& evidence) {
    auto layer = view();
    const auto bytes = method.workspace_bytes(std::as_const(layer), evidence, pool.concurrency());
    if (!bytes.ok()) return bytes.status();
    if (kvfold::Status bad = workspace_.reserve(bytes.value()); !bad.ok()) return bad;
    return method.compress(layer, evidence, workspace_.get(), pool).status();
  }

  template <class Scorer, class Evidence>
  kvfold::Status score(const Scorer& scorer, const Evidence& evidence, float* scores) {
    const auto layer = view();
    std::vector<Index> offset(at(shape_.kv_heads + 1));
    for (std::size_t h = 0; h < offset.size(); ++h) offset[h] = static_cast<Index>(h) * rows_;
    std::vector<kvfold::Protection> marks(at(shape_.kv_heads * rows_));
    const std::size_t bytes = scorer.workspace_bytes(layer, evidence, pool.concurrency());
    if (kvfold::Status bad = workspace_.reserve(bytes); !bad.ok()) return bad;
    return scorer.score(layer, evidence, {offset, {scores, marks.size()}, marks}, workspace_.get(), pool);
  }

  [[nodiscard]] kvfold::QueryRows queries(const float* data, Index window) {
    query_positions_.resize(at(window));
    std::iota(query_positions_.begin(), query_positions_.end(), rows_ - window);
    return kvfold::head_major_queries(data, shape_.query_heads(), shape_.key_dim, query_positions_);
  }
  [[nodiscard]] kvfold::AttentionWeights weights(const float* data) const {
    return {.data = data,
            .query_heads = shape_.query_heads(),
            .rows = rows_,
            .head_stride = rows_ * rows_,
            .row_stride = rows_};
  }

  /// The rows of a head after compression.
  void read(Index h, std::uint16_t* keys, std::uint16_t* values, Index* positions, float* masses) const {
    const Index first = h * rows_, count = counts_[at(h)];
    for (Index d = 0; d < count * shape_.key_dim; ++d) {
      keys[d] = units_[0][at(first * shape_.key_dim + d)].bits;
      values[d] = units_[1][at(first * shape_.key_dim + d)].bits;
    }
    std::copy_n(positions_.begin() + first, count, positions);
    std::copy_n(masses_.begin() + first, count, masses);
  }
  [[nodiscard]] Index size(Index h) const { return counts_[at(h)]; }

  kvfold::ThreadPool pool;

 private:
  void number(Index h, Index count) {
    std::iota(positions_.begin() + h * rows_, positions_.begin() + h * rows_ + count, kvfold::Position{0});
    std::fill_n(masses_.begin() + h * rows_, count, 0.f);
  }

  kvfold::LayerShape shape_;
  Index rows_;
  const std::uint16_t* from_[2];
  std::vector<kvfold::Float16> units_[2];
  std::vector<Index> counts_;
  std::vector<kvfold::Position> positions_, query_positions_;
  std::vector<float> masses_;
  kvfold::WorkspaceBuffer workspace_;
};

/// A ragged cache of one of the storage types, filled from fp32 rows [H][T][D].
class Cache {
 public:
  template <class E>
  static kvfold::Status make(kvfold::LayerShape shape, Index rows, const float* keys, const float* values,
                             Index threads, std::unique_ptr<Cache>& made) {
    auto cache = kvfold::RaggedCache<E>::create(shape);
    if (!cache.ok()) return cache.status();
    std::vector<kvfold::Position> positions(at(rows));
    std::iota(positions.begin(), positions.end(), kvfold::Position{0});
    const auto strides = kvfold::Strides::head_major(rows, shape.key_dim);
    if (kvfold::Status bad = cache->append(keys, strides, values, strides, positions); !bad.ok()) return bad;
    made.reset(new Cache(std::move(cache).value(), rows, threads));
    return made->workspace_.reserve(kvfold::attend_workspace_bytes(shape, threads));
  }

  kvfold::Status attend(const float* queries, float* out) {
    return std::visit(
        [&](const auto& cache) {
          const kvfold::LayerShape shape = cache.shape();
          const auto rows = kvfold::head_major_queries(queries, shape.query_heads(), shape.key_dim, {&position_, 1});
          return kvfold::attend(cache, rows,
                                {.data = out, .head_stride = shape.value_dim, .row_stride = shape.value_dim},
                                workspace_.get(), pool_);
        },
        cache_);
  }

 private:
  using Any = std::variant<kvfold::RaggedCache<float>, kvfold::RaggedCache<kvfold::Float16>,
                           kvfold::RaggedCache<kvfold::BlockQ8_0>>;
  Cache(Any cache, Index rows, Index threads) : cache_(std::move(cache)), position_(rows), pool_(threads) {}

  Any cache_;
  kvfold::Position position_;
  kvfold::ThreadPool pool_;
  kvfold::WorkspaceBuffer workspace_;
};

}  // namespace

extern "C" {

/// `keys` and `values` are fp16 [H][T][D] and must outlive the layer.
void* kvfold_layer_new(Index heads, Index group, Index dim, Index rows, const std::uint16_t* keys,
                       const std::uint16_t* values, Index threads) {
  return new Layer({heads, group, dim, dim}, rows, keys, values, threads);
}
void kvfold_layer_free(void* layer) { delete static_cast<Layer*>(layer); }
void kvfold_layer_restore(void* layer) { static_cast<Layer*>(layer)->restore(); }
Index kvfold_layer_size(void* layer, Index h) { return static_cast<Layer*>(layer)->size(h); }
void kvfold_layer_read(void* layer, Index h, std::uint16_t* keys, std::uint16_t* values, Index* positions,
                       float* masses) {
  static_cast<Layer*>(layer)->read(h, keys, values, positions, masses);
}

/// `queries` are fp32 [H * G][window][D].
const char* kvfold_ems(void* to, const float* queries, Index window, Index budget, float gamma, float tau) {
  auto& layer = *static_cast<Layer*>(to);
  const kvfold::Ems ems(
      {.score = {.window = window}, .budget = {.rows = budget}, .reduce = {.gamma = gamma, .assigner = {.tau = tau}}});
  return result(layer.compress(ems, layer.queries(queries, window)));
}
const char* kvfold_snapkv(void* to, const float* queries, Index window, Index budget) {
  auto& layer = *static_cast<Layer*>(to);
  const SnapKv snapkv({.score = {.window = window, .recent = window}, .budget = {.rows = budget}});
  return result(layer.compress(snapkv, layer.queries(queries, window)));
}
const char* kvfold_ada_snapkv(void* to, const float* queries, Index window, Index budget, float floor_share) {
  auto& layer = *static_cast<Layer*>(to);
  const AdaSnapKv ada({.score = {.window = window, .recent = window}, .budget = {budget, floor_share}});
  return result(layer.compress(ada, layer.queries(queries, window)));
}
/// `weights` are fp32 [H * G][T][T].
const char* kvfold_h2o(void* to, const float* weights, Index budget) {
  auto& layer = *static_cast<Layer*>(to);
  const H2o h2o({.budget = {.rows = budget}});
  return result(layer.compress(h2o, layer.weights(weights)));
}
/// `scores` are [H][T].
const char* kvfold_snapkv_scores(void* to, const float* queries, Index window, float* scores) {
  auto& layer = *static_cast<Layer*>(to);
  const kvfold::SnapKvScorer scorer({.window = window, .recent = window});
  return result(layer.score(scorer, layer.queries(queries, window), scores));
}
const char* kvfold_h2o_scores(void* to, const float* weights, float* scores) {
  auto& layer = *static_cast<Layer*>(to);
  return result(layer.score(kvfold::H2oScorer(), layer.weights(weights), scores));
}

/// `storage` is 0 for fp32, 1 for fp16, 2 for q8_0; null where that fails.
void* kvfold_cache_new(int storage, Index heads, Index group, Index dim, Index rows, const float* keys,
                       const float* values, Index threads) {
  std::unique_ptr<Cache> made;
  const kvfold::LayerShape shape{heads, group, dim, dim};
  const kvfold::Status status = storage == 0 ? Cache::make<float>(shape, rows, keys, values, threads, made)
                                : storage == 1
                                    ? Cache::make<kvfold::Float16>(shape, rows, keys, values, threads, made)
                                    : Cache::make<kvfold::BlockQ8_0>(shape, rows, keys, values, threads, made);
  return status.ok() ? made.release() : nullptr;
}
void kvfold_cache_free(void* cache) { delete static_cast<Cache*>(cache); }
/// One query per query head, [H * G][D], after the last row; `out` is [H * G][D].
const char* kvfold_cache_attend(void* cache, const float* queries, float* out) {
  return result(static_cast<Cache*>(cache)->attend(queries, out));
}
}
