/// \file
/// The model that the repository ships, on text that it was not trained on.

#include <cmath>
#include <map>

#include <gtest/gtest.h>

#include "evaluation/decoder_engine.hpp"
#include "evaluation/metrics.hpp"
#include "evaluation/task_run.hpp"

namespace kvfold {
namespace {

using decoder::Matrix;

const std::filesystem::path kRoot = std::filesystem::path(KVFOLD_TESTS_DIR) / "..";

class TinyBooks : public testing::Test {
 protected:
  /// How many of eight single needles each method keeps at `budget` rows, of about 1,900. Each text is read once.
  std::map<std::string, int> needles(const std::vector<std::string>& names, Index budget) {
    const evaluation::TaskMaker maker(kRoot / "data/tasks/templates.json");
    load(names);
    std::map<std::string, int> found;
    for (std::uint64_t seed = 1; seed <= 8; ++seed) {
      const auto example = maker.make("single", text_, 1900, seed % 2 == 0 ? 0.3 : 0.6, seed);
      evaluation::TaskRun run(engine_, evaluation::byte_case(example), evaluation::TaskMode::aware);
      for (const auto& method : methods_) found[method.label] += run.answers(method, budget) ? 1 : 0;
    }
    return found;
  }

  /// The model, and methods by their names.
  void load(const std::vector<std::string>& names) {
    for (const std::string& name : names) methods_.push_back(evaluation::make_method(name, {}));
    engine_.load({.prompt = 2048, .sequence = 2048}, methods_);
  }

  /// Log probabilities after each of the tokens that are read on.
  Matrix read_on(std::span<const decoder::Token> tokens) {
    Matrix p = engine_.forward(tokens);
    evaluation::log_softmax(p, pool_);
    return p;
  }

  ThreadPool pool_{2};
  evaluation::DecoderEngine engine_{kRoot / "models/tiny-books", pool_, 512};
  std::vector<evaluation::Method> methods_;
  evaluation::Text text_ = evaluation::load_text(kRoot / "data/texts/dracula.txt", engine_.vocabulary());
};

TEST_F(TinyBooks, PredictsABookThatItHasNotRead) {
  constexpr std::size_t kWindows = 5, kCounted = 511;  // the last bytes of windows, with a full context before them
  load({});
  double bits = 0.0;
  for (std::size_t i = 0; i < kWindows; ++i) {
    const auto bytes = std::span(text_.tokens).subspan(i * 30000, 2048);
    engine_.read(bytes.first(2047 - kCounted));
    const Matrix p = read_on(bytes.subspan(2047 - kCounted, kCounted));
    bits += evaluation::negative_log_likelihood(p, bytes.last(kCounted)) / std::log(2.0) / kWindows;
  }
  EXPECT_LT(bits, 2.2);
  EXPECT_GT(bits, 1.0) << "no model of this size is that good: does it see what it predicts?";
}

TEST_F(TinyBooks, EmsKeepsNeedlesWhereStreamingLlmAndH2oLoseThem) {
  // An answer spans more bytes than it does tokens.
  auto found = needles({"full", "ems@span-width=13", "ems-window@span-width=13", "streaming-llm", "h2o"}, 256);
  EXPECT_GE(found["full"], 7);
  EXPECT_GE(found["ems-window@span-width=13"], 6);
  EXPECT_GE(found["ems@span-width=13"], 4) << "the whole prompt's evidence costs needles here: see docs/decisions.md";
  EXPECT_LE(found["streaming-llm"], 1);
  EXPECT_LE(found["h2o"], 2);
}

TEST_F(TinyBooks, ABudgetOfAllRowsChangesNothing) {
  constexpr std::size_t kContext = 600, kContinuation = 60;
  load(evaluation::method_names());
  const auto tokens = std::span(text_.tokens).subspan(5000, kContext + kContinuation);
  engine_.read(tokens.first(kContext));
  const Matrix expected = engine_.forward(tokens.last(kContinuation));
  for (const auto& method : methods_) {
    const auto outcome = engine_.compress(method, kContext);
    EXPECT_EQ(outcome.report.rows_evicted + outcome.report.rows_merged, 0) << method.label;
    EXPECT_TRUE(engine_.forward(tokens.last(kContinuation)) == expected) << method.label;
  }
}

TEST_F(TinyBooks, EmsPredictsTheTextBetterThanTheBaselinesAtOneInTwentyFourRows) {
  constexpr std::size_t kContext = 1536, kContinuation = 256, kDocuments = 4;
  constexpr Index kBudget = 64;
  load({"ems", "ems-window", "streaming-llm", "h2o", "tova"});
  std::map<std::string, double> divergence;
  const std::vector<evaluation::Text> texts{text_};
  for (const auto& document : evaluation::choose_documents(texts, kDocuments, kContext + kContinuation, 1)) {
    const auto next = document.tokens.last(kContinuation);
    engine_.read(document.tokens.first(kContext));
    const Matrix full = read_on(next);
    for (const auto& method : methods_) {
      engine_.compress(method, kBudget);
      divergence[method.label] += evaluation::mean_kl(full, read_on(next), pool_) / kDocuments;
    }
  }
  for (const auto& [name, kl] : divergence) RecordProperty(name, std::to_string(kl));
  EXPECT_GT(divergence["ems"], 0.0);
  for (const char* baseline : {"streaming-llm", "h2o", "tova"}) {
    EXPECT_LT(divergence["ems"], 0.95 * divergence[baseline]) << baseline;
    EXPECT_LT(divergence["ems-window"], 0.95 * divergence[baseline]) << baseline;
  }
}

}  // namespace
}  // namespace kvfold
