// The evaluator's engine over llama.cpp, with SmolLM2: its figures mean what kvfold-evaluate's do.
#include <cstdlib>

#include <gtest/gtest.h>

#include "evaluation/decoder_engine.hpp"
#include "evaluation/document_run.hpp"
#include "llama/llama_engine.hpp"
#include "llama_engine.hpp"

namespace kvfold::test {
namespace {

using evaluation::LlamaEngine;
using evaluation::Measured;

constexpr std::size_t kContext = 300, kContinuation = 40;

class LlamaEvaluation : public testing::Test {
 protected:
  void SetUp() override {
    KVFOLD_NEEDS_SMOLLM2();
    tokens_ = book_tokens(kContext + kContinuation + 1);
  }

  /// Methods that llama.cpp can hold.
  static std::vector<evaluation::Method> methods(const std::vector<std::string>& names) {
    evaluation::Options options;
    options.merge.mass_mode = MassMode::none;
    std::vector<evaluation::Method> made;
    for (const std::string& name : names) made.push_back(evaluation::make_method(name, options));
    return made;
  }

  /// In fp32, without flash attention.
  [[nodiscard]] LlamaEngine exact_engine(std::size_t chunk) {
    return {std::getenv("KVFOLD_SMOLLM2_GGUF"),
            pool_,
            chunk,
            {.cache_type_k = "f32", .cache_type_v = "f32", .flash_attention = false, .ubatch = 128}};
  }

  void load(evaluation::Engine& engine, const std::vector<evaluation::Method>& methods) const {
    engine.load({.prompt = kContext, .sequence = kContext + kContinuation}, methods);
  }

  [[nodiscard]] std::span<const decoder::Token> prompt() const { return std::span(tokens_).first(kContext); }
  [[nodiscard]] std::span<const decoder::Token> next() const {
    return std::span(tokens_).subspan(kContext, kContinuation);
  }

  std::vector<Measured> measure(evaluation::Engine& engine, const std::vector<evaluation::Method>& methods,
                                Index budget) {
    load(engine, methods);
    evaluation::DocumentRun run(engine, pool_, {.name = "book", .tokens = tokens_}, kContext, kContinuation);
    std::vector<Measured> results;
    for (const auto& method : methods) results.push_back(run.measure(method, budget));
    return results;
  }

  ThreadPool pool_{1};
  std::vector<decoder::Token> tokens_;
};

TEST_F(LlamaEvaluation, CompressesThePromptAsItWasRead) {
  LlamaEngine engine = exact_engine(512);
  const auto used = methods({"ems", "full", "snapkv"});
  load(engine, used);
  engine.read(prompt());
  const decoder::Matrix full = engine.forward(next());
  const Index all = static_cast<Index>(kContext) * 30 * 3;  // layers, heads
  const auto row_of = [](const decoder::Matrix& logits) {
    return std::span<const float>(logits.data(), static_cast<std::size_t>(logits.size()));
  };

  EXPECT_EQ(engine.compress(used[0], 32).report.rows_kept, 32 * 30 * 3);
  const decoder::Matrix small = engine.forward(next());
  EXPECT_GT(relative_difference(row_of(small), row_of(full)), 1e-2f);

  const evaluation::Outcome whole = engine.compress(used[1], 32);
  EXPECT_EQ(whole.report.rows_kept, all);
  EXPECT_EQ(whole.report.bytes_after, all * 2 * 64 * 4) << "keys and values of 64 fp32 channels";
  EXPECT_LT(relative_difference(row_of(engine.forward(next())), row_of(full)), 1e-5f) << "the prompt is there again";

  EXPECT_EQ(engine.compress(used[0], kContext).report.rows_kept, all);
  EXPECT_LT(relative_difference(row_of(engine.forward(next())), row_of(full)), 1e-5f) << "a budget of all rows";

  engine.compress(used[2], 32);
  const evaluation::Outcome again = engine.compress(used[0], 32);
  EXPECT_GT(again.report.rows_merged, 0);
  EXPECT_EQ(again.fates.size(), 30u);
  EXPECT_LT(relative_difference(row_of(engine.forward(next())), row_of(small)), 1e-5f) << "so is the evidence";
}

TEST_F(LlamaEvaluation, HasTheFiguresOfTheDecoder) {
  const char* directory = std::getenv("KVFOLD_SMOLLM2_DIR");
  if (directory == nullptr) {
    GTEST_SKIP() << "KVFOLD_SMOLLM2_DIR is not set: run tools/test, or tools/prepare_smollm2 model";
  }
  // With a floor of 1, all heads of the decoder keep the same number of rows, too.
  const auto used = methods({"full", "streaming-llm", "h2o", "snapkv", "tova", "ems-evict@floor-share=1",
                             "ems@floor-share=1", "ems-window@floor-share=1"});
  LlamaEngine theirs = exact_engine(128);
  evaluation::DecoderEngine ours(directory, pool_, 128);
  EXPECT_EQ(theirs.vocabulary().size, ours.vocabulary().size);
  EXPECT_EQ(theirs.max_positions(), ours.max_positions());
  const auto through_llama = measure(theirs, used, 32), through_decoder = measure(ours, used, 32);
  for (std::size_t i = 0; i < used.size(); ++i) {
    const Measured &a = through_llama[i], &b = through_decoder[i];
    EXPECT_NEAR(a.full_nll, b.full_nll, 1e-4);
    EXPECT_NEAR(a.nll, b.nll, 1e-3) << used[i].label;
    EXPECT_NEAR(a.kl, b.kl, 1e-3) << used[i].label;
    EXPECT_EQ(a.outcome.report.rows_kept, b.outcome.report.rows_kept) << used[i].label;
  }
}

TEST_F(LlamaEvaluation, EmsPredictsBetterThanTheBaselines) {
  LlamaEngine engine = exact_engine(512);
  const auto results = measure(engine, methods({"ems", "ems-evict", "streaming-llm", "tova"}), 32);
  for (const Measured& m : results) RecordProperty(m.method, std::to_string(m.kl));
  for (const std::size_t baseline : {2U, 3U}) {
    EXPECT_LT(results[0].kl, 0.9 * results[baseline].kl) << results[baseline].method;
    EXPECT_LT(results[1].kl, 0.9 * results[baseline].kl) << results[baseline].method;
  }
}

TEST_F(LlamaEvaluation, WhatTheEngineCannotHoldIsRefused) {
  const auto refused = [&](evaluation::LlamaOptions options) {
    LlamaEngine engine(std::getenv("KVFOLD_SMOLLM2_GGUF"), pool_, 512, std::move(options));
    engine.load({.prompt = 16, .sequence = 16}, {});
  };
  EXPECT_THROW(refused({.cache_type_v = "q8_0", .flash_attention = false}), std::runtime_error);
  EXPECT_THROW(refused({.cache_type_k = "q5_1"}), std::runtime_error);
  EXPECT_THROW(LlamaEngine("no/such/file.gguf", pool_, 512, {}), std::runtime_error);

  LlamaEngine engine = exact_engine(512);
  const std::vector<evaluation::Method> used{evaluation::make_method("ems", {})};  // it writes log masses
  load(engine, used);
  engine.read(prompt());
  EXPECT_THROW(static_cast<void>(engine.compress(used[0], 32)), std::runtime_error);
}

}  // namespace
}  // namespace kvfold::test
