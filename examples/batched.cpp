/// \file
/// A padded batch, compressed at once: one view per sequence, one report per sequence.

#include <kvfold/batch.hpp>
#include <kvfold/exec/thread_pool.hpp>
#include <kvfold/throwing.hpp>
#include <kvfold/view/sequences.hpp>

#include <algorithm>
#include <cstdio>
#include <random>
#include <vector>

namespace {

using kvfold::Index;

constexpr Index kBatch = 4, kHeads = 2, kGroup = 2, kDim = 32, kTokens = 400, kWindow = 16;

}  // namespace

int main() {
  // What an engine has after the prompts: [batch][head][token][dim], padded on the left.
  const std::vector<int> lengths{400, 90, 250, 60};
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  const auto tensor = [&](Index floats) {
    std::vector<float> x(static_cast<std::size_t>(floats));
    for (float& v : x) v = normal(random);
    return x;
  };
  std::vector<float> keys = tensor(kBatch * kHeads * kTokens * kDim), values = keys;
  const std::vector<float> queries = tensor(kBatch * kHeads * kGroup * kWindow * kDim);  // of the last tokens
  std::vector<float> bias(kBatch * kHeads * kTokens, 0.f);  // added to the logits by the attention kernel
  std::vector<Index> rows(kBatch * kHeads);
  kvfold::or_throw(kvfold::set_rows(lengths, kHeads, rows));
  const std::vector<float> padding(keys.begin() + kHeads * kTokens * kDim,
                                   keys.begin() + (kHeads * kTokens + kTokens - 90) * kDim);

  // One view and one piece of evidence per sequence. Positions begin at 0 with the first real token.
  const kvfold::PaddedBatch<float> batch{.layer = {kHeads, kGroup, kDim, kDim},
                                         .sequences = kBatch,
                                         .tokens = kTokens,
                                         .keys = keys.data(),
                                         .key_strides = kvfold::BatchStrides::head_major(kHeads, kTokens, kDim),
                                         .values = values.data(),
                                         .value_strides = kvfold::BatchStrides::head_major(kHeads, kTokens, kDim),
                                         .padding = kvfold::Padding::left,
                                         .rows = rows,
                                         .log_masses = bias};
  std::vector<kvfold::StridedView<float>> views;
  std::vector<kvfold::QueryRows> evidence;
  std::vector<std::vector<kvfold::Position>> positions;
  for (Index b = 0; b < kBatch; ++b) {
    views.push_back(kvfold::or_throw(kvfold::padded_sequence(batch, lengths, b)));
    auto& last = positions.emplace_back();
    for (Index i = 0; i < kWindow; ++i) last.push_back(lengths[static_cast<std::size_t>(b)] - kWindow + i);
    evidence.push_back(
        kvfold::head_major_queries(queries.data() + b * kHeads * kGroup * kWindow * kDim, kHeads * kGroup, kDim, last));
  }

  const kvfold::Ems ems({.score = {.window = kWindow}, .budget = {.rows = 80}});
  kvfold::ThreadPool pool(4);
  std::vector<std::byte> workspace(kvfold::or_throw(kvfold::batch_workspace_bytes(ems, views, evidence, 4)));
  std::vector<kvfold::Result<kvfold::CompressionReport>> results(kBatch, kvfold::CompressionReport{});
  kvfold::or_throw(kvfold::compress_batch(ems, views, evidence, results, workspace, pool));

  bool ok = true;
  for (std::size_t b = 0; b < kBatch; ++b) {
    const kvfold::CompressionReport report = kvfold::or_throw(results[b]);
    std::printf("sequence %d: %d tokens, %d rows kept, %d merged\n", static_cast<int>(b), lengths[b],
                static_cast<int>(report.rows_kept), static_cast<int>(report.rows_merged));
    ok = ok && report.rows_kept == kHeads * std::min(lengths[b], 80) &&
         report.rows_kept == rows[2 * b] + rows[2 * b + 1];
  }
  ok = ok && std::equal(padding.begin(), padding.end(), keys.begin() + kHeads * kTokens * kDim);
  std::puts(ok ? "every sequence has its budget, and padding was not touched" : "FAILED");
  return ok ? 0 : 1;
}
