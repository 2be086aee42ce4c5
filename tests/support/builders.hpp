/// \file
/// Small caches and queries with enough structure that selection and merging have something to find.
#pragma once

#include <cstdint>
#include <random>
#include <span>
#include <vector>

#include "kvfold/evidence/query_rows.hpp"
#include "kvfold/storage/ragged_cache.hpp"

namespace kvfold::test {

/// Deterministic on every platform: the standard's distributions are not.
class Random {
 public:
  explicit Random(std::uint64_t seed) : engine_(seed) {}
  /// Uniform in [0, 1).
  double uniform() { return static_cast<double>(engine_() >> 11) * 0x1p-53; }
  /// Roughly normal: mean 0, variance 1.
  float normal() {
    double sum = 0.0;
    for (int i = 0; i < 12; ++i) sum += uniform();
    return static_cast<float>(sum - 6.0);
  }
  Index below(Index n) { return static_cast<Index>(uniform() * static_cast<double>(n)); }

 private:
  std::mt19937_64 engine_;
};

[[nodiscard]] inline std::vector<float> normals(Index count, Random& random, float scale = 1.f) {
  std::vector<float> x(static_cast<std::size_t>(count));
  for (float& v : x) v = scale * random.normal();
  return x;
}

/// Rows that lie around a few directions, so that some are redundant: [rows][width].
[[nodiscard]] inline std::vector<float> clustered_rows(Index rows, Index width, Index clusters, float noise,
                                                       Random& random) {
  const std::vector<float> centres = normals(clusters * width, random);
  std::vector<float> out(static_cast<std::size_t>(rows * width));
  for (Index t = 0; t < rows; ++t) {
    const Index c = random.below(clusters);
    for (Index d = 0; d < width; ++d) {
      out[static_cast<std::size_t>(t * width + d)] =
          centres[static_cast<std::size_t>(c * width + d)] + noise * random.normal();
    }
  }
  return out;
}

[[nodiscard]] inline std::vector<Position> positions_from(Position first, Index count) {
  std::vector<Position> p(static_cast<std::size_t>(count));
  for (Index i = 0; i < count; ++i) p[static_cast<std::size_t>(i)] = first + i;
  return p;
}

/// A cache of `rows` rows in every head at positions 0, 1, ..., with clustered keys and values.
template <class K = float, class V = K>
[[nodiscard]] RaggedCache<K, V> make_cache(LayerShape shape, Index rows, std::uint64_t seed = 1, Rope rope = {}) {
  Random random(seed);
  std::vector<float> keys, values;
  for (Index h = 0; h < shape.kv_heads; ++h) {
    const auto k = clustered_rows(rows, shape.key_dim, 5, 0.3f, random);
    const auto v = clustered_rows(rows, shape.value_dim, 3, 0.3f, random);
    keys.insert(keys.end(), k.begin(), k.end());
    values.insert(values.end(), v.begin(), v.end());
  }
  auto cache = RaggedCache<K, V>::create(shape, rope);
  const auto positions = positions_from(0, rows);
  const Status status = cache->append(keys.data(), Strides::head_major(rows, shape.key_dim), values.data(),
                                      Strides::head_major(rows, shape.value_dim), positions);
  KVFOLD_ASSERT(status.ok());
  static_cast<void>(status);
  return std::move(cache).value();
}

/// Queries that own their memory, [H * G][rows][D], at the last positions of a sequence of `length`.
struct OwnedQueries {
  std::vector<float> data;
  std::vector<Position> positions;
  Index query_heads;
  Index dim;

  [[nodiscard]] QueryRows view() const { return head_major_queries(data.data(), query_heads, dim, positions); }
};

[[nodiscard]] inline OwnedQueries make_queries(LayerShape shape, Index rows, Index length, std::uint64_t seed = 2) {
  Random random(seed);
  return {normals(shape.query_heads() * rows * shape.key_dim, random), positions_from(length - rows, rows),
          shape.query_heads(), shape.key_dim};
}

}  // namespace kvfold::test
