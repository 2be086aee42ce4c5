/// \file
/// An engine's own struct as a view: the functions that kvfold reads and writes through, and nothing else.

#include <kvfold/compressor.hpp>
#include <kvfold/throwing.hpp>

#include <algorithm>
#include <cstdio>
#include <vector>

namespace {

using kvfold::Index;

/// How some engine stores a layer: a record per token and head, key and value side by side.
struct Engine {
  static constexpr Index kHeads = 4, kGroup = 2, kDim = 8;
  struct Record {
    float key[kDim], value[kDim];
    int position;
  };
  std::vector<Record> records[kHeads];

  explicit Engine(int tokens) {
    for (Index h = 0; h < kHeads; ++h) {
      for (int t = 0; t < tokens; ++t) {
        Record record{};
        record.key[t % kDim] = 1.f;
        std::fill_n(record.value, kDim, static_cast<float>(t));
        record.position = t;
        records[h].push_back(record);
      }
    }
  }
};

/// The whole of what kvfold needs to know of it. Small, copied freely, owns nothing.
struct EngineView {
  Engine* engine;

  // To be planned for:
  kvfold::LayerShape shape() const noexcept { return {Engine::kHeads, Engine::kGroup, Engine::kDim, Engine::kDim}; }
  Index size(Index h) const noexcept { return static_cast<Index>(engine->records[h].size()); }
  kvfold::Position position(Index h, Index t) const noexcept { return at(h, t).position; }
  void read_keys(Index h, Index t, Index n, std::span<float> out) const noexcept {
    for (Index i = 0; i < n; ++i) std::copy_n(at(h, t + i).key, Engine::kDim, out.data() + i * Engine::kDim);
  }
  void read_values(Index h, Index t, Index n, std::span<float> out) const noexcept {
    for (Index i = 0; i < n; ++i) std::copy_n(at(h, t + i).value, Engine::kDim, out.data() + i * Engine::kDim);
  }
  // To be compressed:
  void write_key(Index h, Index t, std::span<const float> in) noexcept { std::ranges::copy(in, at(h, t).key); }
  void write_value(Index h, Index t, std::span<const float> in) noexcept { std::ranges::copy(in, at(h, t).value); }
  void move_row(Index h, Index from, Index to) noexcept { at(h, to) = at(h, from); }
  void resize(Index h, Index n) noexcept { engine->records[h].resize(static_cast<std::size_t>(n)); }

 private:
  Engine::Record& at(Index h, Index t) const noexcept { return engine->records[h][static_cast<std::size_t>(t)]; }
};

static_assert(kvfold::MutableKVCacheView<EngineView>);  // says which function is missing, if one is

}  // namespace

int main() {
  Engine engine(100);
  EngineView view{&engine};

  // One query per query head, at the last token, that looks at the keys of channel 3: tokens 3, 11, ..., 99.
  std::vector<float> queries(Engine::kHeads * Engine::kGroup * Engine::kDim, 0.f);
  for (std::size_t i = 3; i < queries.size(); i += Engine::kDim) queries[i] = 30.f;
  const std::vector<kvfold::Position> positions{99};
  const auto evidence =
      kvfold::head_major_queries(queries.data(), Engine::kHeads * Engine::kGroup, Engine::kDim, positions);

  const kvfold::SnapKv method({.score = {.window = 1, .recent = 1, .pool = {}}, .budget = {.rows = 13}});
  const auto report = kvfold::or_throw(method.compress(view, evidence));
  std::printf("%d rows -> %d\n", static_cast<int>(report.rows_before), static_cast<int>(report.rows_kept));

  bool ok = report.rows_kept == 13 * Engine::kHeads;
  for (const auto& head : engine.records) {
    for (std::size_t t = 0; t < head.size(); ++t) {
      const int wanted = static_cast<int>(3 + 8 * t);
      ok = ok && head[t].position == wanted && head[t].value[0] == static_cast<float>(wanted);
    }
  }
  std::puts(ok ? "each head kept the rows that were looked at" : "FAILED");
  return ok ? 0 : 1;
}
