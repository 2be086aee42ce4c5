/// \file
/// A scorer of your own in a kvfold pipeline: rows whose keys are short matter most (arXiv 2406.11430 found that such
/// keys get much attention), so no evidence is needed.

#include <kvfold/compressor.hpp>
#include <kvfold/storage/ragged_cache.hpp>
#include <kvfold/throwing.hpp>

#include <cstdio>
#include <memory>
#include <vector>

namespace {

using kvfold::Index;

/// score = 1 / (1 + |k|^2). Sinks and recent rows are protected.
class ShortKeyScorer {
 public:
  struct Options {
    kvfold::Protect protect{.sinks = 2, .recent = 4};
  };
  ShortKeyScorer() noexcept = default;
  explicit ShortKeyScorer(Options options) noexcept : options_(options) {}

  kvfold::Status validate() const noexcept { return options_.protect.validate(); }

  /// Called before any work, so that the memory for the whole pipeline can be asked for at once: one key per worker.
  std::size_t workspace_bytes(const kvfold::KVCacheView auto& view, const auto& /*evidence*/,
                              Index workers) const noexcept {
    return static_cast<std::size_t>(workers * view.shape().key_dim) * sizeof(float) + alignof(float);
  }

  /// Heads are independent tasks: each writes its own part of the table, so results do not depend on the executor.
  kvfold::Status score(const kvfold::KVCacheView auto& view, const auto& /*evidence*/, kvfold::ScoreTable table,
                       kvfold::Workspace workspace, kvfold::Executor auto& executor) const noexcept {
    const auto dim = static_cast<std::size_t>(view.shape().key_dim);
    void* memory = workspace.data();
    std::size_t bytes = workspace.size();
    const std::size_t needed = static_cast<std::size_t>(executor.concurrency()) * dim * sizeof(float);
    if (std::align(alignof(float), needed, memory, bytes) == nullptr) {
      return {kvfold::StatusCode::workspace_too_small, "workspace", "is smaller than workspace_bytes()"};
    }
    const std::span<float> keys(static_cast<float*>(memory), needed / sizeof(float));
    auto task = [&](Index h, Index worker) noexcept {
      const std::span<float> key = keys.subspan(static_cast<std::size_t>(worker) * dim, dim);
      for (Index t = 0; t < table.rows(h); ++t) {
        view.read_keys(h, t, 1, key);
        float length = 0.f;
        for (const float x : key) length += x * x;
        table.scores(h)[static_cast<std::size_t>(t)] = 1.f / (1.f + length);
      }
      options_.protect.mark(table.protections(h));
    };
    executor.run(view.shape().kv_heads, task);
    return {};
  }

 private:
  Options options_;
};

/// With kvfold's budgets and merging, it is a method.
using ShortKeys = kvfold::Compressor<ShortKeyScorer, kvfold::UniformBudget, kvfold::EvictThenMerge<>>;

}  // namespace

int main() {
  constexpr Index kHeads = 2, kDim = 16, kRows = 64;
  std::vector<float> keys, values;
  for (Index i = 0; i < kHeads * kRows * kDim; ++i) {
    const Index t = i / kDim % kRows;
    keys.push_back(t % 8 == 5 ? 0.1f : 1.f);  // rows 5, 13, 21, ... have short keys
    values.push_back(static_cast<float>(t));
  }
  std::vector<kvfold::Position> positions;
  for (Index t = 0; t < kRows; ++t) positions.push_back(t);
  auto cache = kvfold::or_throw(kvfold::RaggedCache<>::create({kHeads, 1, kDim, kDim}));
  const auto layout = kvfold::Strides::head_major(kRows, kDim);
  kvfold::or_throw(cache.append(keys.data(), layout, values.data(), layout, positions));

  const auto report = kvfold::or_throw(ShortKeys({.budget = {.rows = 14}}).compress(cache, kvfold::NoEvidence{}));
  std::printf("%d rows -> %d, %d merged\n", static_cast<int>(report.rows_before), static_cast<int>(report.rows_kept),
              static_cast<int>(report.rows_merged));

  const kvfold::Position wanted[] = {0, 1, 5, 13, 21, 29, 37, 45, 53, 60, 61, 62, 63};
  bool ok = cache.size(0) == 14 && report.rows_merged > 0;
  for (const kvfold::Position position : wanted) {
    bool found = false;
    for (Index t = 0; t < cache.size(0); ++t) found = found || cache.position(0, t) == position;
    ok = ok && found;
  }
  std::puts(ok ? "sinks, recent rows and short keys stayed" : "FAILED");
  return ok ? 0 : 1;
}
