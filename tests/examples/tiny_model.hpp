/// \file
/// A decoder small enough to be made on the spot, with random weights: for everything that does not need sense.
#pragma once

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <map>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "builders.hpp"

namespace kvfold::test {

/// Sizes of the model that `write_tiny_model` makes.
struct TinyModel {
  Index hidden = 24, intermediate = 40, layers = 2, query_heads = 6, kv_heads = 2, head_dim = 8, vocab = 50;
  bool tied = true;
  std::string rope_layout = "half_split";
};

/// Writes config.json and model.safetensors (F32). The same seed gives the same model in both RoPE layouts: for "adjacent",
/// the rows of the query and key projections are permuted.
inline void write_tiny_model(const std::filesystem::path& directory, const TinyModel& m, std::uint64_t seed) {
  std::filesystem::create_directories(directory);
  Random random(seed);
  std::map<std::string, std::pair<std::vector<Index>, std::vector<float>>> tensors;
  const auto matrix = [&](const std::string& name, Index rows, Index columns) {
    tensors[name] = {{rows, columns}, normals(rows * columns, random, 1.f / std::sqrt(static_cast<float>(columns)))};
  };
  const auto vector = [&](const std::string& name) {
    auto w = normals(m.hidden, random, 0.1f);
    for (float& x : w) x += 1.f;
    tensors[name] = {{m.hidden}, w};
  };
  matrix("model.embed_tokens.weight", m.vocab, m.hidden);
  for (Index i = 0; i < m.layers; ++i) {
    const std::string p = "model.layers." + std::to_string(i) + ".";
    matrix(p + "self_attn.q_proj.weight", m.query_heads * m.head_dim, m.hidden);
    matrix(p + "self_attn.k_proj.weight", m.kv_heads * m.head_dim, m.hidden);
    matrix(p + "self_attn.v_proj.weight", m.kv_heads * m.head_dim, m.hidden);
    matrix(p + "self_attn.o_proj.weight", m.hidden, m.query_heads * m.head_dim);
    matrix(p + "mlp.gate_proj.weight", m.intermediate, m.hidden);
    matrix(p + "mlp.up_proj.weight", m.intermediate, m.hidden);
    matrix(p + "mlp.down_proj.weight", m.hidden, m.intermediate);
    vector(p + "input_layernorm.weight");
    vector(p + "post_attention_layernorm.weight");
  }
  vector("model.norm.weight");
  if (!m.tied) matrix("lm_head.weight", m.vocab, m.hidden);

  if (m.rope_layout == "adjacent") {
    for (auto& [name, tensor] : tensors) {
      if (name.find("q_proj") == std::string::npos && name.find("k_proj") == std::string::npos) continue;
      const std::vector<float> split = tensor.second;
      const Index half = m.head_dim / 2;
      for (Index row = 0; row < tensor.first[0]; ++row) {
        const Index head = row / m.head_dim, d = row % m.head_dim;
        const Index to = head * m.head_dim + (d < half ? 2 * d : 2 * (d - half) + 1);
        std::copy_n(split.begin() + row * m.hidden, m.hidden, tensor.second.begin() + to * m.hidden);
      }
    }
  }

  nlohmann::json header = nlohmann::json::object();
  std::size_t offset = 0;
  for (const auto& [name, tensor] : tensors) {
    const std::size_t bytes = tensor.second.size() * sizeof(float);
    header[name] = {{"dtype", "F32"}, {"shape", tensor.first}, {"data_offsets", {offset, offset + bytes}}};
    offset += bytes;
  }
  const std::string text = header.dump();
  std::ofstream out(directory / "model.safetensors", std::ios::binary);
  for (int i = 0; i < 8; ++i) out.put(static_cast<char>(text.size() >> (8 * i) & 0xff));
  out << text;
  for (const auto& [name, tensor] : tensors) {
    out.write(reinterpret_cast<const char*>(tensor.second.data()),
              static_cast<std::streamsize>(tensor.second.size() * sizeof(float)));
  }
  std::ofstream(directory / "config.json") << nlohmann::json{{"hidden_size", m.hidden},
                                                             {"intermediate_size", m.intermediate},
                                                             {"num_hidden_layers", m.layers},
                                                             {"num_attention_heads", m.query_heads},
                                                             {"num_key_value_heads", m.kv_heads},
                                                             {"head_dim", m.head_dim},
                                                             {"vocab_size", m.vocab},
                                                             {"max_position_embeddings", 512},
                                                             {"tie_word_embeddings", m.tied},
                                                             {"rope_layout", m.rope_layout},
                                                             {"tokenizer", "bytes"}};
}

}  // namespace kvfold::test
