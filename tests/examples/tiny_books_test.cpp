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
    std::vector<evaluation::Method> methods;
    std::vector<evaluation::Options> options;
    for (const std::string& name : names) {
      methods.push_back(evaluation::make_method(name, {}, pool_));
      options.push_back(methods.back().options);
    }
    std::map<std::string, int> found;
    for (std::uint64_t seed = 1; seed <= 8; ++seed) {
      const auto example = maker.make("single", text_, 1900, seed % 2 == 0 ? 0.3 : 0.6, seed);
      evaluation::TaskRun run(model_, pool_, example, evaluation::TaskMode::aware, options, 512);
      for (const auto& method : methods) found[method.label] += run.answers(method, budget) ? 1 : 0;
    }
    return found;
  }

  ThreadPool pool_{2};
  decoder::Decoder model_{kRoot / "models/tiny-books", pool_};
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
  auto found = needles({"full", "ems-window", "streaming-llm", "h2o"}, 256);
  EXPECT_GE(found["full"], 7);
  EXPECT_GE(found["ems-window"], 6);
  EXPECT_LE(found["streaming-llm"], 1);
  EXPECT_LE(found["h2o"], 2);
}

}  // namespace
}  // namespace kvfold
