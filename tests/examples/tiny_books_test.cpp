/// \file
/// The model that the repository ships, on text that it was not trained on.

#include <cmath>
#include <map>

#include <gtest/gtest.h>

#include "evaluation/documents.hpp"
#include "evaluation/metrics.hpp"
#include "evaluation/task_run.hpp"

namespace kvfold {
namespace {

const std::filesystem::path kRoot = std::filesystem::path(KVFOLD_TESTS_DIR) / "..";

class TinyBooks : public testing::Test {
 protected:
  /// How many of eight single needles each method keeps at `budget` rows, of about 1,900. Each text is read once.
  std::map<std::string, int> needles(const std::vector<std::string>& names, Index budget) {
    const evaluation::TaskMaker maker(kRoot / "data/tasks/templates.json");
    use(names);
    std::map<std::string, int> found;
    for (std::uint64_t seed = 1; seed <= 8; ++seed) {
      const auto example = maker.make("single", text_, 1900, seed % 2 == 0 ? 0.3 : 0.6, seed);
      evaluation::TaskRun run(model_, pool_, evaluation::byte_case(example), evaluation::TaskMode::aware, options_,
                              512);
      for (const auto& method : methods_) found[method.label] += run.answers(method, budget) ? 1 : 0;
    }
    return found;
  }

  /// Methods with the options that their evidence has to be gathered for.
  void use(const std::vector<std::string>& names) {
    for (const std::string& name : names) {
      methods_.push_back(evaluation::make_method(name, {}, pool_));
      options_.push_back(methods_.back().options);
    }
  }

  ThreadPool pool_{2};
  decoder::Decoder model_{kRoot / "models/tiny-books", pool_};
  std::vector<evaluation::Method> methods_;
  std::vector<evaluation::Options> options_;
  evaluation::Text text_ = evaluation::load_text(kRoot / "data/texts/dracula.txt", model_.config());
};

TEST_F(TinyBooks, PredictsABookThatItHasNotRead) {
  constexpr std::size_t kWindows = 5, kCounted = 511;  // the last bytes of windows, with a full context before them
  double bits = 0.0;
  for (std::size_t i = 0; i < kWindows; ++i) {
    decoder::Sequence sequence = model_.new_sequence();
    const auto bytes = std::span(text_.tokens).subspan(i * 30000, 2048);
    decoder::Matrix p = model_.forward(bytes.first(2047), sequence, decoder::Logits::all).bottomRows(kCounted);
    evaluation::log_softmax(p, pool_);
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
  use(evaluation::method_names());
  const auto tokens = std::span(text_.tokens).subspan(5000, kContext + kContinuation);
  decoder::Sequence prompt = model_.new_sequence();
  evaluation::Evidence evidence(model_, kContext, options_, pool_);
  model_.prefill(tokens.first(kContext), prompt, 256, evidence.observer(prompt));
  decoder::Sequence untouched = prompt.clone();
  const decoder::Matrix expected = model_.forward(tokens.last(kContinuation), untouched, decoder::Logits::all);
  for (const auto& method : methods_) {
    decoder::Sequence sequence = prompt.clone();
    const auto outcome = method.compress(sequence, evidence, kContext);
    EXPECT_EQ(outcome.report.rows_evicted + outcome.report.rows_merged, 0) << method.label;
    const decoder::Matrix logits = model_.forward(tokens.last(kContinuation), sequence, decoder::Logits::all);
    EXPECT_TRUE(logits == expected) << method.label;
  }
}

TEST_F(TinyBooks, EmsPredictsTheTextBetterThanTheBaselinesAtOneInTwentyFourRows) {
  constexpr std::size_t kContext = 1536, kContinuation = 256, kDocuments = 4;
  constexpr Index kBudget = 64;
  use({"ems", "ems-window", "streaming-llm", "h2o", "tova"});
  std::map<std::string, double> divergence;
  const std::vector<evaluation::Text> texts{text_};
  for (const auto& document : evaluation::choose_documents(texts, kDocuments, kContext + kContinuation, 1)) {
    decoder::Sequence prompt = model_.new_sequence();
    evaluation::Evidence evidence(model_, kContext, options_, pool_);
    model_.prefill(document.tokens.first(kContext), prompt, 512, evidence.observer(prompt));
    const auto next = [&](decoder::Sequence sequence) {
      decoder::Matrix p = model_.forward(document.tokens.last(kContinuation), sequence, decoder::Logits::all);
      evaluation::log_softmax(p, pool_);
      return p;
    };
    const decoder::Matrix full = next(prompt.clone());
    for (const auto& method : methods_) {
      decoder::Sequence sequence = prompt.clone();
      static_cast<void>(method.compress(sequence, evidence, kBudget));
      divergence[method.label] += evaluation::mean_kl(full, next(std::move(sequence)), pool_) / kDocuments;
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
