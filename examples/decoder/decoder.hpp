/// \file
/// A compact Llama-family decoder whose KV cache is kvfold's: RMSNorm, RoPE, grouped queries, SwiGLU; fp32 arithmetic.
///
/// It shows where an engine calls kvfold, and gives the evaluator a real model. It is not tuned for generation.
#pragma once

#include <kvfold/exec/thread_pool.hpp>
#include <kvfold/kvfold.hpp>

#include <filesystem>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include <Eigen/Core>

namespace decoder {

using Token = std::int32_t;
using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using Cache = kvfold::RaggedCache<float>;

/// config.json, in the field names of Hugging Face's Llama.
struct Config {
  Eigen::Index hidden_size = 0;
  Eigen::Index intermediate_size = 0;
  Eigen::Index layers = 0;       ///< num_hidden_layers
  Eigen::Index query_heads = 0;  ///< num_attention_heads
  Eigen::Index kv_heads = 0;     ///< num_key_value_heads
  Eigen::Index head_dim = 0;     ///< default hidden_size / num_attention_heads
  Eigen::Index vocab_size = 0;
  Eigen::Index max_positions = 0;  ///< max_position_embeddings
  float rms_norm_eps = 1e-5f;
  double rope_theta = 10000.0;
  bool tied_output = true;                               ///< tie_word_embeddings
  kvfold::RopeKind rope = kvfold::RopeKind::half_split;  ///< rope_layout: "half_split" (default) or "adjacent"
  std::string tokenizer;                                 ///< "bytes": token = byte; else the tokenizer's file

  /// Throws std::runtime_error when a field is missing or makes no sense.
  static Config load(const std::filesystem::path& file);
  [[nodiscard]] kvfold::LayerShape layer_shape() const;
};

/// One sequence: a cache per layer, and the position of the next token, which compression does not change.
struct Sequence {
  std::vector<Cache> layers;
  kvfold::Position next = 0;

  [[nodiscard]] Sequence clone() const;
  [[nodiscard]] kvfold::Index rows() const;  ///< over all layers and heads
  [[nodiscard]] kvfold::Index live_bytes() const;
};

/// Called for each layer and chunk after attention: the chunk's queries as evidence, with their log-sum-exps. The rows of
/// the chunk are in the layer's cache already.
using Observer = std::function<void(std::size_t layer, const kvfold::QueryRows& queries)>;

/// Which logits a forward pass computes.
enum class Logits { none, last, all };

class Decoder {
 public:
  /// Loads `config.json` and `model.safetensors`. \param pool is used by every forward pass and must outlive the decoder.
  Decoder(const std::filesystem::path& directory, kvfold::ThreadPool& pool);

  [[nodiscard]] const Config& config() const { return config_; }
  [[nodiscard]] Sequence new_sequence() const;

  /// Runs tokens at the sequence's next positions and appends their rows to its caches, as one causal chunk.
  /// \returns the logits asked for, [rows][vocab_size]. The result does not depend on how a prompt is cut, to rounding.
  Matrix forward(std::span<const Token> tokens, Sequence& sequence, Logits logits, const Observer& observe = {});

  /// `forward` in chunks of at most `chunk` tokens, without logits.
  void prefill(std::span<const Token> tokens, Sequence& sequence, std::size_t chunk, const Observer& observe = {});

 private:
  struct Layer {
    Matrix query, key, value, output;  // projections, [out][in]
    Matrix gate, up, down;
    Eigen::VectorXf attention_norm, mlp_norm;
  };

  Matrix multiply(const Matrix& x, const Matrix& weight);
  Matrix normalise(const Matrix& x, const Eigen::VectorXf& weight) const;
  void rotate(Matrix& rows, Eigen::Index heads, std::span<const kvfold::Position> positions) const;
  Matrix attention(std::size_t layer, const Matrix& x, std::span<const kvfold::Position> positions, Cache& cache,
                   const Observer& observe);

  Config config_;
  kvfold::ThreadPool& pool_;
  kvfold::WorkspaceBuffer workspace_;
  Matrix embedding_, output_;  // output_ is empty where it is tied
  Eigen::VectorXf final_norm_;
  std::vector<Layer> layers_;
};

}  // namespace decoder
