/// \file
/// kvfold's own decoder as the engine that is evaluated: ragged heads, log masses, exact evidence.
#pragma once

#include <filesystem>
#include <optional>

#include "evaluation/engine.hpp"
#include "evaluation/evidence.hpp"

namespace evaluation {

class DecoderEngine final : public Engine {
 public:
  /// \param directory with config.json, which is read now, and model.safetensors
  /// \param chunk     tokens per forward pass
  DecoderEngine(std::filesystem::path directory, kvfold::ThreadPool& pool, std::size_t chunk);

  [[nodiscard]] Vocabulary vocabulary() const override;
  [[nodiscard]] std::size_t max_positions() const override;
  void load(Longest longest, std::span<const Method> methods) override;
  ReadTimes read(std::span<const decoder::Token> prompt) override;
  Outcome compress(const Method& method, kvfold::Index rows) override;
  decoder::Matrix forward(std::span<const decoder::Token> tokens) override;

  /// The sequence as it is now.
  [[nodiscard]] const decoder::Sequence& sequence() const { return sequence_; }

 private:
  template <class Compressor>
  Outcome compress_layers(const Method& method, const Compressor& compressor);

  std::filesystem::path directory_;
  kvfold::ThreadPool& pool_;
  std::size_t chunk_;
  decoder::Config config_;
  std::vector<Method> methods_;
  std::optional<decoder::Decoder> model_;
  std::optional<Evidence> evidence_;
  decoder::Sequence prompt_, sequence_;
};

}  // namespace evaluation
