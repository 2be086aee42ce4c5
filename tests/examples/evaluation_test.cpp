#include <cmath>
#include <fstream>
#include <set>

#include <gtest/gtest.h>

#include "evaluation/decoder_engine.hpp"
#include "evaluation/documents.hpp"
#include "evaluation/methods.hpp"
#include "evaluation/metrics.hpp"
#include "evaluation/task_run.hpp"
#include "tiny_model.hpp"

namespace kvfold {
namespace {

using decoder::Matrix;
using evaluation::Text;

std::vector<Text> numbered_texts() {
  std::vector<Text> texts{{"a", {}}, {"b", {}}};
  for (int i = 0; i < 1000; ++i) texts[0].tokens.push_back(i);
  for (int i = 0; i < 600; ++i) texts[1].tokens.push_back(5000 + i);
  return texts;
}

TEST(Documents, AreDealtToTheTextsInTurnAndDoNotOverlap) {
  const auto texts = numbered_texts();
  const auto documents = evaluation::choose_documents(texts, 5, 100, 3);
  ASSERT_EQ(documents.size(), 5u);
  std::set<decoder::Token> seen;
  for (std::size_t i = 0; i < documents.size(); ++i) {
    EXPECT_EQ(documents[i].name.front(), i % 2 == 0 ? 'a' : 'b');
    EXPECT_EQ(documents[i].tokens.size(), 100u);
    for (const auto token : documents[i].tokens) EXPECT_TRUE(seen.insert(token).second) << "shared by two documents";
  }
}

TEST(Documents, DependOnTheSeedAndOnNothingElse) {
  const auto texts = numbered_texts();
  const auto starts = [&](std::uint64_t seed) {
    std::vector<decoder::Token> first;
    for (const auto& d : evaluation::choose_documents(texts, 4, 50, seed)) first.push_back(d.tokens.front());
    return first;
  };
  EXPECT_EQ(starts(1), starts(1));
  EXPECT_NE(starts(1), starts(2));
}

TEST(Documents, ATextThatIsTooShortIsRefused) {
  EXPECT_THROW(evaluation::choose_documents(numbered_texts(), 2, 601, 1), std::runtime_error);
  EXPECT_THROW(evaluation::choose_documents(numbered_texts(), 4, 301, 1), std::runtime_error);
  EXPECT_NO_THROW(evaluation::choose_documents(numbered_texts(), 4, 300, 1));
}

TEST(Texts, ByteModelsReadPlainTextAndOthersNeedTokens) {
  const auto file = std::filesystem::path(testing::TempDir()) / "kvfold_text.txt";
  std::ofstream(file, std::ios::binary) << "h\xc3\xa9\n";
  const evaluation::Vocabulary bytes{.size = 256, .is_bytes = true}, words{.size = 256};
  EXPECT_EQ(evaluation::load_text(file, bytes).tokens, (std::vector<decoder::Token>{'h', 0xc3, 0xa9, '\n'}));
  EXPECT_THROW(evaluation::load_text(file, words), std::runtime_error);
  std::ofstream(file) << R"({"format": "kvfold-tokens-1", "ids": [3, 255]})";
  EXPECT_EQ(evaluation::load_text(file, words).tokens, (std::vector<decoder::Token>{3, 255}));
  std::ofstream(file) << R"({"format": "kvfold-tokens-1", "ids": [3, 256]})";
  EXPECT_THROW(evaluation::load_text(file, words), std::runtime_error);
}

TEST(Metrics, AgreeWithTheirDefinitions) {
  ThreadPool pool(2);
  Matrix p(2, 3), q(2, 3);
  p << 1.f, 2.f, 3.f, 500.f, 500.f, -500.f;
  q << 3.f, 2.f, 1.f, 0.f, 0.f, 0.f;
  evaluation::log_softmax(p, pool);
  evaluation::log_softmax(q, pool);
  const double z = std::exp(1.0) + std::exp(2.0) + std::exp(3.0);
  EXPECT_NEAR(p(0, 2), 3.0 - std::log(z), 1e-6);
  EXPECT_NEAR(evaluation::negative_log_likelihood(p, std::vector<decoder::Token>{2, 0}),
              (std::log(z) - 3.0 + std::log(2.0)) / 2, 1e-6);
  const double first = (std::exp(3.0) - std::exp(1.0)) * 2.0 / z;  // sum of p_i * (i - (4 - i))
  const double second = std::log(3.0) - std::log(2.0);
  EXPECT_NEAR(evaluation::mean_kl(p, q, pool), (first + second) / 2, 1e-5);
  EXPECT_EQ(evaluation::mean_kl(p, p, pool), 0.0);
}

TEST(Methods, TakeOptionsOfTheirOwn) {
  evaluation::Options common;
  common.set("tau", "0.5");
  const auto method = evaluation::make_method("ems@recent=3@key-mode=rotated@span-weight=0.25", common);
  EXPECT_EQ(method.options.score.protect.recent, 3);
  EXPECT_EQ(method.options.merge.key_mode, KeyMode::rotated);
  EXPECT_FLOAT_EQ(method.options.score.span_weight, 0.25f);
  EXPECT_FLOAT_EQ(method.options.merge.assigner.tau, 0.5f);
}

TEST(Methods, WhatIsNotKnownOrOutOfRangeIsRefused) {
  for (const char* text : {"emz", "ems@", "ems@tau", "ems@tau=", "ems@tau=x", "ems@tau=2", "ems@window=0",
                           "ems@window=1.5", "ems@span-width=0", "ems@key-mode=left", "ems@budget=3", "ems@gamma=-1"}) {
    EXPECT_THROW(static_cast<void>(evaluation::make_method(text, {})), std::runtime_error) << text;
  }
}

TEST(Methods, EveryOneKeepsItsBudgetOnARealForwardPass) {
  const auto directory = std::filesystem::path(testing::TempDir()) / "kvfold_methods";
  test::write_tiny_model(directory, {}, 3);
  ThreadPool pool(2);
  std::vector<decoder::Token> prompt(200);
  for (std::size_t i = 0; i < prompt.size(); ++i) prompt[i] = static_cast<decoder::Token>(i * 13 % 50);
  std::vector<evaluation::Method> methods;
  for (const auto& name : evaluation::method_names()) methods.push_back(evaluation::make_method(name, {}));
  evaluation::DecoderEngine engine(directory, pool, 64);
  engine.load({.prompt = 200, .sequence = 200}, methods);
  engine.read(prompt);
  for (const auto& method : methods) {
    const auto outcome = engine.compress(method, 40);
    const Index expected = (method.is_full() ? 200 : 40) * 2 * 2;  // two layers, two heads
    EXPECT_EQ(engine.sequence().rows(), expected) << method.label;
    EXPECT_EQ(outcome.report.rows_kept, expected) << method.label;
    EXPECT_EQ(engine.sequence().next, 200);
  }
}

TEST(Engines, CompressThePromptAsItWasRead) {
  const auto directory = std::filesystem::path(testing::TempDir()) / "kvfold_engine";
  test::write_tiny_model(directory, {}, 5);
  ThreadPool pool(1);
  const std::vector<evaluation::Method> methods{evaluation::make_method("ems", {}),
                                                evaluation::make_method("full", {})};
  evaluation::DecoderEngine engine(directory, pool, 16);
  EXPECT_EQ(engine.vocabulary().size, 50);
  EXPECT_EQ(engine.max_positions(), 512u);
  engine.load({.prompt = 60, .sequence = 80}, methods);
  std::vector<decoder::Token> prompt(60), next(20);
  for (std::size_t i = 0; i < prompt.size(); ++i) prompt[i] = static_cast<decoder::Token>(i * 7 % 50);
  for (std::size_t i = 0; i < next.size(); ++i) next[i] = static_cast<decoder::Token>(i * 11 % 50);
  engine.read(prompt);
  const Matrix full = engine.forward(next);
  engine.compress(methods[0], 10);
  const Matrix small = engine.forward(next);
  EXPECT_GT((small - full).cwiseAbs().maxCoeff(), 1e-3f);
  engine.compress(methods[1], 10);
  EXPECT_EQ(engine.forward(next), full) << "what was done before is forgotten";
  engine.compress(methods[0], 10);
  EXPECT_EQ(engine.forward(next), small);
  engine.compress(methods[0], 60);
  EXPECT_EQ(engine.forward(next), full) << "a budget of all rows changes nothing";
}

const std::filesystem::path kTemplates = std::filesystem::path(KVFOLD_TESTS_DIR) / "../data/tasks/templates.json";

Text lines_of_text() {
  Text text{"lines", {}};
  for (int i = 0; i < 4000; ++i) text.tokens.push_back(i % 60 == 59 ? '\n' : 'a' + i % 7);
  return text;
}

TEST(Tasks, HideTheAnswerOnceAtTheDepthAskedFor) {
  const evaluation::TaskMaker maker(kTemplates);
  for (const double depth : {0.0, 0.5, 1.0}) {
    for (std::uint64_t seed = 0; seed < 30; ++seed) {
      const auto made = maker.make("single", lines_of_text(), 1500, depth, seed);
      const std::string value = made.answer.substr(1, made.answer.size() - 2);  // " 4711."
      const std::size_t at = made.context.find(value);
      ASSERT_NE(at, std::string::npos) << made.context;
      EXPECT_EQ(made.context.find(value, at + 1), std::string::npos);
      EXPECT_EQ(made.question.find(value), std::string::npos);
      EXPECT_NEAR(static_cast<double>(at) / static_cast<double>(made.context.size()), depth, 0.16);
      EXPECT_LE(made.context.size() + made.question.size(), 1500u);
      EXPECT_GE(made.context.size() + made.question.size(), 1490u);
    }
  }
}

TEST(Tasks, SeveralKeysShareTheNounAndDifferInNames) {
  const evaluation::TaskMaker maker(kTemplates);
  for (std::uint64_t seed = 0; seed < 30; ++seed) {
    const auto made = maker.make("keys", lines_of_text(), 1500, 0.5, seed);
    const auto lines = [&] {
      int n = 0;
      for (std::size_t i = 2; i + 1 < made.context.size(); ++i)
        n += made.context[i] == '\n' && std::isdigit(made.context[i - 2]);
      return n;
    }();
    EXPECT_GE(lines, 2);
    EXPECT_LE(lines, 6);
  }
}

TEST(Tasks, TwoValuesAndAssignmentsNeedBothStatements) {
  const evaluation::TaskMaker maker(kTemplates);
  const auto two = maker.make("two_values", lines_of_text(), 1500, 0.25, 5);
  EXPECT_NE(two.answer.find("also"), std::string::npos);
  const auto step = maker.make("assignment", lines_of_text(), 1500, 0.25, 5);
  const std::string other = step.answer.substr(1, step.answer.find_first_of(" =", 1) - 1);
  EXPECT_EQ(step.question.find(other + " ="), std::string::npos);
  for (const auto* made : {&two, &step}) EXPECT_EQ((made->question + made->answer).find('{'), std::string::npos);
}

TEST(Tasks, DependOnTheSeedAndOnNothingElse) {
  const evaluation::TaskMaker maker(kTemplates);
  const auto text_of = [&](std::uint64_t seed) {
    const auto made = maker.make("keys", lines_of_text(), 1200, 0.5, seed);
    return made.context + made.question + made.answer;
  };
  EXPECT_EQ(text_of(4), text_of(4));
  EXPECT_NE(text_of(4), text_of(5));
}

TEST(Cases, OneForEachTaskLengthAndDepthAndAllOfThemDifferent) {
  const std::vector<Text> texts{lines_of_text()};
  const evaluation::TaskSuite suite{
      .names = {"single", "keys"}, .templates = kTemplates, .lengths = {400, 800}, .depths = {0.0, 1.0}, .cases = 3};
  const auto cases = evaluation::make_cases(suite, texts, 1);
  ASSERT_EQ(cases.size(), 24u);
  std::set<std::string> seen;
  for (const auto& c : cases) {
    EXPECT_LE(c.context.size() + c.question.size(), c.length);
    seen.insert(c.context + c.question);
  }
  EXPECT_EQ(seen.size(), cases.size());
  EXPECT_NE(cases[0].question, cases[12].question) << "tasks share their names";
  EXPECT_EQ(evaluation::make_cases(suite, texts, 1)[5].context, cases[5].context);
  EXPECT_NE(evaluation::make_cases(suite, texts, 2)[5].context, cases[5].context);
}

TEST(Cases, GoThroughAFileAsTextAndComeBackAsTokens) {
  const auto file = std::filesystem::path(testing::TempDir()) / "kvfold_cases.json";
  const std::vector<Text> texts{lines_of_text()};
  const auto made = evaluation::make_cases(
      {.names = {"single"}, .templates = kTemplates, .lengths = {400}, .depths = {0.5}, .cases = 2}, texts, 1);
  evaluation::write_cases(file, made);
  std::ifstream in(file);
  auto json = nlohmann::json::parse(in);
  EXPECT_EQ(json.at("format"), "kvfold-cases-1");
  EXPECT_EQ(json.at("cases").at(1).at("answer"), made[1].answer);

  evaluation::Vocabulary vocabulary{.size = 256};
  EXPECT_THROW(static_cast<void>(evaluation::read_cases(file, vocabulary)), std::runtime_error)
      << "these are no tokens";
  json["format"] = "kvfold-token-cases-1";
  for (auto& c : json["cases"]) {  // what a tokeniser would do
    for (const char* part : {"context", "question", "answer"}) {
      const auto text = c[part].get<std::string>();
      c[part] = std::vector<decoder::Token>(text.begin(), text.end());
    }
  }
  std::ofstream(file) << json;
  const auto read = evaluation::read_cases(file, vocabulary);
  ASSERT_EQ(read.size(), 2u);
  EXPECT_EQ(read[1].context, evaluation::byte_case(made[1]).context);
  EXPECT_EQ(read[1].answer, evaluation::byte_case(made[1]).answer);

  vocabulary.size = 100;
  EXPECT_THROW(static_cast<void>(evaluation::read_cases(file, vocabulary)), std::runtime_error) << "unknown tokens";
  vocabulary.size = 256;
  json["cases"][0]["answer"] = nlohmann::json::array();
  std::ofstream(file) << json;
  EXPECT_THROW(static_cast<void>(evaluation::read_cases(file, vocabulary)), std::runtime_error) << "no answer";
  json["cases"][0].erase("answer");
  std::ofstream(file) << json;
  EXPECT_THROW(static_cast<void>(evaluation::read_cases(file, vocabulary)), std::runtime_error) << "a field is missing";
}

TEST(Tasks, WhatDoesNotFitIsRefused) {
  const evaluation::TaskMaker maker(kTemplates);
  EXPECT_THROW(static_cast<void>(maker.make("single", lines_of_text(), 60, 0.5, 1)), std::runtime_error);
  EXPECT_THROW(static_cast<void>(maker.make("single", lines_of_text(), 4001, 0.5, 1)), std::runtime_error);
  EXPECT_THROW(static_cast<void>(maker.make("riddle", lines_of_text(), 1500, 0.5, 1)), std::runtime_error);
  EXPECT_THROW(evaluation::TaskMaker("no/such/file.json"), std::runtime_error);
}

}  // namespace
}  // namespace kvfold
