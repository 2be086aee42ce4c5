/// \file
/// kvfold in one page: an engine's own tensors, compressed in place.

#include <kvfold/kvfold.hpp>
#include <kvfold/throwing.hpp>

#include <cstdio>
#include <random>
#include <vector>

namespace {

/// What an engine has: one layer's cache as [token][head][dim] in fp16, and the queries of the last prompt positions.
struct Engine {
  static constexpr kvfold::Index kHeads = 8, kGroup = 4, kDim = 64, kTokens = 4096, kWindow = 32, kTopics = 64;
  std::vector<kvfold::Float16> keys, values;  // [kTokens][kHeads][kDim]
  std::vector<float> queries;                 // [kWindow][kHeads * kGroup][kDim], after RoPE
  std::vector<float> bias;                    // [kHeads][kTokens], added to the logits by the attention kernel
  std::vector<kvfold::Index> rows;            // [kHeads] rows in use
  std::vector<kvfold::Position> query_positions;

  Engine() : bias(kHeads * kTokens, 0.f), rows(kHeads, kTokens) {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    std::vector<float> topics;  // what rows are about: some say nearly the same
    for (kvfold::Index i = 0; i < kTopics * kDim; ++i) topics.push_back(2.f * normal(random));
    for (kvfold::Index row = 0; row < kTokens * kHeads; ++row) {
      const std::size_t topic = random() % kTopics * kDim;
      for (std::size_t d = 0; d < kDim; ++d) {
        keys.push_back(kvfold::from_float<kvfold::Float16>(topics[topic + d] + normal(random)));
        values.push_back(kvfold::from_float<kvfold::Float16>(topics[topic + d] + normal(random)));
      }
    }
    for (kvfold::Index i = 0; i < kWindow * kHeads * kGroup * kDim; ++i) queries.push_back(normal(random));
    for (kvfold::Index i = 0; i < kWindow; ++i) query_positions.push_back(kTokens - kWindow + i);
  }
};

}  // namespace

int main() {
  Engine engine;

  // [readme]
  // One layer of one sequence, where the engine keeps it: fp16, [token][head][dim].
  kvfold::StridedView<kvfold::Float16> cache{.layer = {.kv_heads = 8, .group_size = 4, .key_dim = 64, .value_dim = 64},
                                             .keys = engine.keys.data(),
                                             .key_strides = kvfold::Strides::token_major(8, 64),
                                             .values = engine.values.data(),
                                             .value_strides = kvfold::Strides::token_major(8, 64),
                                             .rows = engine.rows,  // rows per head: shrinks
                                             .log_masses = engine.bias,
                                             .log_mass_stride = 4096};  // what merged rows add to their logit

  // What the last 32 queries of the prompt looked at decides what stays.
  const auto queries = kvfold::token_major_queries(engine.queries.data(), 32, 64, engine.query_positions);

  const kvfold::Ems ems({.budget = {.rows = 512}});  // 512 of 4096 rows per head, on average
  const kvfold::CompressionReport report = kvfold::or_throw(ems.compress(cache, queries));
  // [/readme]

  std::printf("rows   %lld -> %lld (%lld merged, %lld evicted)\n", static_cast<long long>(report.rows_before),
              static_cast<long long>(report.rows_kept), static_cast<long long>(report.rows_merged),
              static_cast<long long>(report.rows_evicted));
  std::printf("bytes  %lld -> %lld\n", static_cast<long long>(report.bytes_before),
              static_cast<long long>(report.bytes_after));
  std::printf("kept rows hold %.1f %% of the score\n", 100.0 * static_cast<double>(report.kept_score_share));
  std::printf("rows per head:");
  for (const kvfold::Index rows : engine.rows) std::printf(" %lld", static_cast<long long>(rows));
  std::printf("\n");
}
