/// \file
/// kvfold in one page: an engine has read a text, and its own tensors are compressed in place.

#include <kvfold/kvfold.hpp>
#include <kvfold/throwing.hpp>

#include <algorithm>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "decoder/decoder.hpp"

namespace {

using kvfold::Index;

constexpr Index kWindow = 32;  // queries that an engine has to remember

/// What an engine holds for one layer: keys and values in fp16, token by token, and the queries of the last positions.
struct EngineLayer {
  Index tokens, heads, group, dim;
  std::vector<kvfold::Float16> keys, values;      // [tokens][heads][dim]
  std::vector<float> queries;                     // [kWindow][heads * group][dim], after RoPE
  std::vector<kvfold::Position> query_positions;  // [kWindow]
  std::vector<kvfold::Position> positions;        // [heads][tokens]
  std::vector<float> bias;                        // [heads][tokens], added to the logits by the attention kernel
  std::vector<Index> rows;                        // [heads] rows in use
};

kvfold::CompressionReport compress(EngineLayer& engine) {
  // [readme]
  // One layer of one sequence, where the engine keeps it: fp16, [token][head][dim].
  kvfold::StridedView<kvfold::Float16> cache{
      .layer = {.kv_heads = engine.heads, .group_size = engine.group, .key_dim = engine.dim, .value_dim = engine.dim},
      .keys = engine.keys.data(),
      .key_strides = kvfold::Strides::token_major(engine.heads, engine.dim),
      .values = engine.values.data(),
      .value_strides = kvfold::Strides::token_major(engine.heads, engine.dim),
      .rows = engine.rows,  // rows per head: shrinks
      .positions = engine.positions,
      .position_stride = engine.tokens,
      .log_masses = engine.bias,  // what merged rows add to their logit
      .log_mass_stride = engine.tokens};

  // What the last 32 queries of the prompt looked at decides what stays.
  const auto queries = kvfold::token_major_queries(engine.queries.data(), engine.heads * engine.group, engine.dim,
                                                   engine.query_positions);

  const kvfold::Ems ems({.budget = {.rows = 256}});  // 256 rows per head, on average
  const kvfold::CompressionReport report = kvfold::or_throw(ems.compress(cache, queries));
  // [/readme]
  return report;
}

/// Lets a model read a text, and lays its cache out as an engine might.
std::vector<EngineLayer> read_text(const std::filesystem::path& model_directory, const std::string& text) {
  kvfold::ThreadPool pool(2);
  decoder::Decoder model(model_directory, pool);
  decoder::Sequence sequence = model.new_sequence();
  const kvfold::LayerShape shape = model.config().layer_shape();
  const auto tokens = static_cast<Index>(text.size());  // this model reads bytes
  std::vector<EngineLayer> layers(sequence.layers.size());

  const std::vector<decoder::Token> bytes(text.begin(), text.end());
  model.prefill(bytes, sequence, 512, [&](std::size_t i, const kvfold::QueryRows& chunk) {
    EngineLayer& layer = layers[i];
    layer.queries.clear();
    layer.query_positions.assign(chunk.positions.end() - kWindow, chunk.positions.end());
    for (Index row = chunk.rows() - kWindow; row < chunk.rows(); ++row) {
      for (Index q = 0; q < shape.query_heads(); ++q) {
        layer.queries.insert(layer.queries.end(), chunk.row(q, row), chunk.row(q, row) + shape.key_dim);
      }
    }
  });
  for (std::size_t i = 0; i < layers.size(); ++i) {
    EngineLayer& layer = layers[i];
    layer.tokens = tokens;
    layer.heads = shape.kv_heads;
    layer.group = shape.group_size;
    layer.dim = shape.key_dim;
    layer.keys.resize(static_cast<std::size_t>(tokens * shape.kv_heads * shape.key_dim));
    layer.values.resize(layer.keys.size());
    layer.bias.assign(static_cast<std::size_t>(tokens * shape.kv_heads), 0.f);
    layer.rows.assign(static_cast<std::size_t>(shape.kv_heads), tokens);
    for (Index h = 0; h < shape.kv_heads; ++h) {
      for (Index t = 0; t < tokens; ++t) {
        const Index at = (t * shape.kv_heads + h) * shape.key_dim;
        kvfold::store_floats(sequence.layers[i].key_rows(h, t, 1), shape.key_dim, layer.keys.data() + at);
        kvfold::store_floats(sequence.layers[i].value_rows(h, t, 1), shape.value_dim, layer.values.data() + at);
        layer.positions.push_back(t);
      }
    }
  }
  return layers;
}

/// The text as head h sees it now: bytes whose row is gone are dots.
void print_kept(const EngineLayer& layer, Index h, const std::string& text) {
  std::string seen(text.size(), '.');
  for (Index t = 0; t < layer.rows[static_cast<std::size_t>(h)]; ++t) {
    const auto at = static_cast<std::size_t>(layer.positions[static_cast<std::size_t>(h * layer.tokens + t)]);
    seen[at] = text[at] == '\n' ? ' ' : text[at];
  }
  for (std::size_t at = 0; at < seen.size(); at += 100) std::printf("  %s\n", seen.substr(at, 100).c_str());
}

int run(const std::filesystem::path& root) {
  std::string text(2000, ' ');
  std::ifstream book(root / "data/texts/frankenstein.txt", std::ios::binary);
  if (!book.read(text.data(), static_cast<std::streamsize>(text.size()))) throw std::runtime_error("no text to read");
  std::vector<EngineLayer> layers = read_text(root / "models/tiny-books", text);

  std::printf("layer  rows          merged  evicted  bytes              score kept  rows of each head\n");
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const kvfold::CompressionReport report = compress(layers[i]);
    std::printf("%5zu  %lld -> %-5lld %6lld  %7lld  %lld -> %-7lld %9.1f %%  ", i,
                static_cast<long long>(report.rows_before), static_cast<long long>(report.rows_kept),
                static_cast<long long>(report.rows_merged), static_cast<long long>(report.rows_evicted),
                static_cast<long long>(report.bytes_before), static_cast<long long>(report.bytes_after),
                100.0 * static_cast<double>(report.kept_score_share));
    for (const Index rows : layers[i].rows) std::printf("%lld ", static_cast<long long>(rows));
    std::printf("\n");
  }
  std::printf("\nWhat the first head of the last layer kept of the text:\n\n");
  print_kept(layers.back(), 0, text);
  return 0;
}

}  // namespace

/// The argument is the folder that has models/ and data/; the default is the current one.
int main(int argc, char** argv) {
  try {
    return run(argc > 1 ? argv[1] : ".");
  } catch (const std::exception& error) {
    std::fprintf(stderr, "kvfold-quickstart: %s\n", error.what());
    return 1;
  }
}
