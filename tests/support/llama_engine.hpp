/// \file
/// llama.cpp with SmolLM2, for tests that run kvfold on the engine itself.
#pragma once

#include <kvfold/adaptors/llama_cpp.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <llama.h>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include <gtest/gtest.h>

namespace kvfold::test {

/// Bytes of a state, and logits of the next token.
using Blob = std::vector<std::byte>;
using Logits = std::vector<float>;

/// How a context is made; the defaults are those in which the engine is exact.
struct EngineOptions {
  ggml_type keys = GGML_TYPE_F32, values = GGML_TYPE_F32;
  bool flash_attention = false;
  std::uint32_t tokens = 512, piece = 512, sequences = 1;  // n_ctx, n_ubatch, n_seq_max
  bool unified = false;
  Index queries = 32;  // of the tap
  bool tapped = true;
};

/// SmolLM2 with f32 weights: loaded once per process, never freed. Null when KVFOLD_SMOLLM2_GGUF is not set.
inline llama_model* smollm2() {
  static llama_model* const model = []() -> llama_model* {
    const char* file = std::getenv("KVFOLD_SMOLLM2_GGUF");
    if (file == nullptr) return nullptr;
    llama_log_set([](ggml_log_level, const char*, void*) {}, nullptr);
    llama_backend_init();
    return llama_model_load_from_file(file, llama_model_default_params());
  }();
  return model;
}

#define KVFOLD_NEEDS_SMOLLM2()                                                                                     \
  if (smollm2() == nullptr) {                                                                                      \
    GTEST_SKIP() << "KVFOLD_SMOLLM2_GGUF is not set: run tools/test, or tools/prepare_smollm2 gguf --weights f32"; \
  }

/// The first `count` tokens of a text.
inline std::vector<llama_token> book_tokens(std::size_t count) {
  std::ifstream in(std::string(KVFOLD_TESTS_DIR) + "/../data/texts/frankenstein.txt");
  const std::string text((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  std::vector<llama_token> tokens(text.size());
  const int found = llama_tokenize(llama_model_get_vocab(smollm2()), text.data(), 12 * static_cast<int>(count),
                                   tokens.data(), static_cast<int>(tokens.size()), false, false);
  tokens.resize(static_cast<std::size_t>(std::max(found, 0)));
  EXPECT_GE(tokens.size(), count);
  tokens.resize(count);
  return tokens;
}

/// A context and its tap.
class Engine {
 public:
  explicit Engine(const EngineOptions& options = {}, ggml_backend_sched_eval_callback other = nullptr,
                  void* other_data = nullptr) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx = options.tokens;
    params.n_batch = options.tokens;
    params.n_ubatch = options.piece;
    params.n_seq_max = options.sequences;
    params.kv_unified = options.unified;
    params.type_k = options.keys;
    params.type_v = options.values;
    params.flash_attn_type = options.flash_attention ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
    params.n_threads = params.n_threads_batch = 1;  // tests run side by side
    params.cb_eval = other;
    params.cb_eval_user_data = other_data;
    if (options.tapped) {
      Result<LlamaQueryTap> made = LlamaQueryTap::create(smollm2(), {.queries = options.queries});
      EXPECT_TRUE(made.ok()) << made.status().detail();
      tap_ = std::move(made).value();
      tap_->attach(params);
    }
    context_.reset(llama_init_from_model(smollm2(), params));
    EXPECT_NE(context_, nullptr);
  }

  [[nodiscard]] llama_context* get() const { return context_.get(); }
  [[nodiscard]] llama_memory_t memory() const { return llama_get_memory(context_.get()); }
  [[nodiscard]] LlamaQueryTap& tap() { return *tap_; }

  /// Decodes tokens at positions first, first + 1, ...
  /// \returns the logits after the last one; empty when the engine fails
  Logits decode(std::span<const llama_token> tokens, llama_pos first, llama_seq_id sequence = 0) {
    llama_batch batch = llama_batch_init(static_cast<std::int32_t>(tokens.size()), 0, 1);
    batch.n_tokens = static_cast<std::int32_t>(tokens.size());
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      batch.token[i] = tokens[i];
      batch.pos[i] = first + static_cast<llama_pos>(i);
      batch.n_seq_id[i] = 1;
      batch.seq_id[i][0] = sequence;
      batch.logits[i] = i + 1 == tokens.size() ? 1 : 0;
    }
    const int failed = llama_decode(get(), batch);
    llama_batch_free(batch);
    if (failed != 0) return {};
    const float* logits = llama_get_logits_ith(get(), -1);
    return {logits, logits + llama_vocab_n_tokens(llama_model_get_vocab(smollm2()))};
  }

  [[nodiscard]] Blob state(llama_seq_id sequence = 0) const {
    Blob bytes(llama_state_seq_get_size(get(), sequence));
    EXPECT_EQ(llama_state_seq_get_data(get(), reinterpret_cast<std::uint8_t*>(bytes.data()), bytes.size(), sequence),
              bytes.size());
    return bytes;
  }
  [[nodiscard]] bool set_state(std::span<const std::byte> bytes, llama_seq_id sequence = 0) const {
    const auto* from = reinterpret_cast<const std::uint8_t*>(bytes.data());
    return llama_state_seq_set_data(get(), from, bytes.size(), sequence) == bytes.size();
  }

  template <class Method>
  Result<LlamaReport> compress(const Method& method, llama_seq_id sequence = 0) {
    return kvfold::compress(get(), sequence, method, tap());
  }

 private:
  struct Free {
    void operator()(llama_context* context) const { llama_free(context); }
  };
  std::optional<LlamaQueryTap> tap_;  // outlives the context
  std::unique_ptr<llama_context, Free> context_;
};

inline float largest_difference(std::span<const float> a, std::span<const float> b) {
  if (a.empty() || a.size() != b.size()) return INFINITY;
  float most = 0.f;
  for (std::size_t i = 0; i < a.size(); ++i) most = std::max(most, std::abs(a[i] - b[i]));
  return most;
}

/// The same, in units of the largest logit: what is left of another order of sums.
inline float relative_difference(std::span<const float> a, std::span<const float> b) {
  float size = 0.f;
  for (const float x : b) size = std::max(size, std::abs(x));
  return largest_difference(a, b) / size;
}

/// The first `sinks` and the last rows of every head: a choice that the engine can make by itself, too.
inline StreamingLlm keep_ends(Index rows, Index sinks = 4) {
  return StreamingLlm({.score = {.sinks = sinks}, .budget = {.rows = rows}});
}
/// EMS as it is for engines without a place for log masses.
inline Ems ems_without_masses(Index rows) {
  return Ems({.budget = {.rows = rows}, .reduce = {.mass_mode = MassMode::none}});
}

}  // namespace kvfold::test
