/// \file
/// llama.cpp as the engine that is evaluated: equal counts for all heads and layers, no log masses, the engine's own cache.
#pragma once

#include <kvfold/adaptors/llama_cpp.hpp>

#include <filesystem>
#include <llama-cpp.h>
#include <optional>
#include <string>
#include <vector>

#include "evaluation/engine.hpp"

namespace evaluation {

/// How llama.cpp runs the model.
struct LlamaOptions {
  std::string cache_type_k = "f16", cache_type_v = "f16";  ///< one of `llama_cache_types`
  bool flash_attention = true;                             ///< quantised V needs it
  std::size_t ubatch = 512;                                ///< tokens of one graph
};

/// f32, f16, bf16, q8_0, q4_0.
[[nodiscard]] std::vector<std::string> llama_cache_types();

/// Methods that merge must be told to write no log masses. Evidence is the queries that a tap has seen: of the whole prompt
/// where a method asks for it, else of its last positions. Reading them is part of `prefill_ms`.
class LlamaEngine final : public Engine {
 public:
  /// \param file  a GGUF file, which is loaded now
  /// \param chunk tokens per call of llama.cpp
  LlamaEngine(const std::filesystem::path& file, kvfold::ThreadPool& pool, std::size_t chunk, LlamaOptions options);

  [[nodiscard]] Vocabulary vocabulary() const override;
  [[nodiscard]] std::size_t max_positions() const override;
  [[nodiscard]] nlohmann::json settings() const override;
  void load(Longest longest, std::span<const Method> methods) override;
  ReadTimes read(std::span<const decoder::Token> prompt) override;
  Outcome compress(const Method& method, kvfold::Index rows) override;
  decoder::Matrix forward(std::span<const decoder::Token> tokens) override;

 private:
  enum class Wanted { nothing, logits };

  /// Reads one chunk at most at the next positions.
  void decode(std::span<const decoder::Token> tokens, Wanted wanted);

  kvfold::ThreadPool& pool_;
  std::size_t chunk_;
  LlamaOptions options_;
  llama_model_ptr model_;
  kvfold::Index window_ = 1;
  std::optional<kvfold::LlamaQueryTap> tap_;
  llama_context_ptr context_;  // ends before the tap that it calls
  kvfold::LlamaBuffers buffers_;
  std::vector<std::uint8_t> prompt_;                   // the state when the prompt had been read
  kvfold::Position prompt_length_ = 0, position_ = 0;  // of the prompt; of the next token
};

}  // namespace evaluation
