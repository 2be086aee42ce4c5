#include "decoder/decoder.hpp"

#include <kvfold/throwing.hpp>

#include <cstdlib>
#include <fstream>

#include <gtest/gtest.h>

#include "decoder/safetensors.hpp"
#include "tiny_model.hpp"

namespace kvfold {
namespace {

using decoder::Decoder;
using decoder::Logits;
using decoder::Matrix;
using decoder::Token;

class DecoderTest : public testing::Test {
 protected:
  std::filesystem::path make(const test::TinyModel& model = {}) {
    const auto* info = testing::UnitTest::GetInstance()->current_test_info();
    const auto directory =
        std::filesystem::path(testing::TempDir()) / (std::string("kvfold_") + info->name()) / model.rope_layout;
    test::write_tiny_model(directory, model, 7);
    return directory;
  }
  static std::vector<Token> tokens(std::size_t n) {
    std::vector<Token> t(n);
    for (std::size_t i = 0; i < n; ++i) t[i] = static_cast<Token>(i * i * 7 % 50);
    return t;
  }
  static float distance(const Matrix& a, const Matrix& b) { return (a - b).cwiseAbs().maxCoeff(); }

  ThreadPool pool_{2};
};

TEST_F(DecoderTest, ReadsAPromptInChunksAsInOnePiece) {
  Decoder model(make(), pool_);
  const auto prompt = tokens(150);
  decoder::Sequence whole = model.new_sequence();
  const Matrix expected = model.forward(prompt, whole, Logits::last);
  for (const std::size_t chunk : {1u, 7u, 64u, 149u}) {
    decoder::Sequence pieces = model.new_sequence();
    model.prefill(std::span(prompt).first(149), pieces, chunk);
    EXPECT_LT(distance(model.forward(std::span(prompt).last(1), pieces, Logits::last), expected), 2e-5f) << chunk;
    EXPECT_EQ(pieces.next, 150);
  }
}

TEST_F(DecoderTest, BothRopeLayoutsAreTheSameModel) {
  Decoder split(make({.rope_layout = "half_split"}), pool_);
  Decoder adjacent(make({.rope_layout = "adjacent"}), pool_);
  decoder::Sequence a = split.new_sequence(), b = adjacent.new_sequence();
  EXPECT_LT(distance(split.forward(tokens(40), a, Logits::all), adjacent.forward(tokens(40), b, Logits::all)), 2e-5f);
}

TEST_F(DecoderTest, TheLastLogitsAreTheLastRowOfAllLogits) {
  Decoder model(make({.tied = false}), pool_);
  decoder::Sequence a = model.new_sequence(), b = model.new_sequence();
  const Matrix all = model.forward(tokens(20), a, Logits::all);
  ASSERT_EQ(all.rows(), 20);
  EXPECT_LT(distance(all.bottomRows(1), model.forward(tokens(20), b, Logits::last)), 1e-5f);
}

TEST_F(DecoderTest, NextPositionsDoNotDependOnWhatCompressionLeft) {
  Decoder model(make(), pool_);
  decoder::Sequence sequence = model.new_sequence();
  model.forward(tokens(60), sequence, Logits::none);
  for (decoder::Cache& cache : sequence.layers) {
    EXPECT_EQ(or_throw(StreamingLlm({.budget = {.rows = 16}}).compress(cache, NoEvidence{})).rows_kept, 2 * 16);
  }
  model.forward(tokens(1), sequence, Logits::last);
  EXPECT_EQ(sequence.next, 61);
  for (const decoder::Cache& cache : sequence.layers) {
    ASSERT_EQ(cache.size(0), 17);
    EXPECT_EQ(cache.position(0, 16), 60);
  }
}

TEST_F(DecoderTest, ABudgetThatHoldsEverythingChangesNoBitOfTheLogits) {
  Decoder model(make(), pool_);
  decoder::Sequence sequence = model.new_sequence();
  std::vector<test::OwnedQueries> seen(2);
  model.forward(tokens(60), sequence, Logits::none, [&](std::size_t layer, const QueryRows& q) {
    seen[layer] = {{}, {q.positions.begin(), q.positions.end()}, q.query_heads, q.dim};
    for (Index head = 0; head < q.query_heads; ++head) {
      for (Index i = 0; i < q.rows(); ++i)
        seen[layer].data.insert(seen[layer].data.end(), q.row(head, i), q.row(head, i) + q.dim);
    }
  });
  decoder::Sequence compressed = sequence.clone();
  for (std::size_t i = 0; i < compressed.layers.size(); ++i) {
    const auto report =
        or_throw(Ems(Ems::Options{.budget = {.rows = 60}}).compress(compressed.layers[i], seen[i].view()));
    EXPECT_EQ(report.rows_evicted + report.rows_merged, 0);
  }
  EXPECT_EQ(model.forward(tokens(20), compressed, Logits::all), model.forward(tokens(20), sequence, Logits::all));
}

TEST_F(DecoderTest, RefusesTokensOutsideOfItsVocabularyAndSequencesBeyondItsPositions) {
  Decoder model(make(), pool_);
  decoder::Sequence sequence = model.new_sequence();
  EXPECT_THROW(model.forward(std::vector<Token>{50}, sequence, Logits::last), std::runtime_error);
  EXPECT_THROW(model.forward(std::vector<Token>{-1}, sequence, Logits::last), std::runtime_error);
  EXPECT_THROW(model.forward(tokens(513), sequence, Logits::last), std::runtime_error);
  EXPECT_EQ(sequence.rows(), 0);
}

TEST_F(DecoderTest, RefusesAFileThatIsCutShort) {
  const auto directory = make();
  const auto file = directory / "model.safetensors";
  for (const auto size :
       {std::filesystem::file_size(file) - 1, std::uintmax_t{100}, std::uintmax_t{4}, std::uintmax_t{0}}) {
    std::filesystem::resize_file(file, size);
    EXPECT_THROW(Decoder(directory, pool_), std::runtime_error) << size;
  }
  std::filesystem::remove(file);
  EXPECT_THROW(Decoder(directory, pool_), std::runtime_error);
}

TEST_F(DecoderTest, RefusesAConfigThatDoesNotFitTheWeights) {
  const auto directory = make();
  std::ifstream in(directory / "config.json");
  const auto good = nlohmann::json::parse(in);
  const nlohmann::json changes{{"hidden_size", 25},
                               {"num_hidden_layers", 3},
                               {"vocab_size", 0},
                               {"num_key_value_heads", 4},
                               {"rope_layout", "spiral"}};
  for (const auto& [name, value] : changes.items()) {
    auto bad = good;
    bad[name] = value;
    std::ofstream(directory / "config.json") << bad;
    EXPECT_THROW(Decoder(directory, pool_), std::runtime_error) << name;
  }
}

/// A model's logits against those that an independent implementation gave for the same weights (tools/make_golden_logits).
void expect_golden_logits(const std::filesystem::path& directory, const char* file) {
  std::ifstream in(std::filesystem::path(KVFOLD_TESTS_DIR) / "golden" / file);
  const auto golden = nlohmann::json::parse(in);
  ThreadPool pool(2);
  Decoder model(directory, pool);
  const auto ids = golden.at("ids").get<std::vector<Token>>();
  decoder::Sequence sequence = model.new_sequence();
  const Matrix logits = model.forward(ids, sequence, Logits::all);

  constexpr float kTolerance = 1e-3f;  // two other implementations differ by 1e-4; logits reach 32
  const auto argmax = golden.at("argmax").get<std::vector<Eigen::Index>>();
  ASSERT_EQ(static_cast<std::size_t>(logits.rows()), argmax.size());
  for (Eigen::Index t = 0; t < logits.rows(); ++t) {
    Eigen::Index best = 0;
    logits.row(t).maxCoeff(&best);
    EXPECT_EQ(best, argmax[static_cast<std::size_t>(t)]) << t;
  }
  const auto strided = golden.at("strided_ids").get<std::vector<Eigen::Index>>();
  for (const auto& at : golden.at("positions")) {
    const auto row = logits.row(at.at("position").get<Eigen::Index>());
    const auto top = at.at("top_ids").get<std::vector<Eigen::Index>>();
    for (std::size_t i = 0; i < top.size(); ++i)
      EXPECT_NEAR(row[top[i]], at.at("top_logits")[i].get<float>(), kTolerance);
    for (std::size_t i = 0; i < strided.size(); ++i) {
      EXPECT_NEAR(row[strided[i]], at.at("strided_logits")[i].get<float>(), kTolerance);
    }
    const float most = row.maxCoeff();
    EXPECT_NEAR(most + std::log((row.array() - most).exp().sum()), at.at("log_sum_exp").get<float>(), kTolerance);
  }
}

/// tools/test prepares the model and says where it is.
TEST(GoldenLogits, OfSmolLm2) {
  const char* directory = std::getenv("KVFOLD_SMOLLM2_DIR");
  if (directory == nullptr)
    GTEST_SKIP() << "KVFOLD_SMOLLM2_DIR is not set: run tools/test, or tools/prepare_smollm2 model";
  expect_golden_logits(directory, "smollm2_logits.json");
}

TEST(GoldenLogits, OfTinyBooks) {
  expect_golden_logits(std::filesystem::path(KVFOLD_TESTS_DIR) / "../models/tiny-books", "tiny_books_logits.json");
}

}  // namespace
}  // namespace kvfold
