/// \file
/// Retrieval tasks inside book text, in the manner of RULER.

#pragma once

#include <cstdint>
#include <filesystem>
#include <random>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "evaluation/documents.hpp"

namespace evaluation {

/// One question that the text answers.
struct TaskCase {
  std::string task;
  double depth = 0.0;      ///< where the statement asked for stands: 0 first, 1 last
  std::size_t length = 0;  ///< bytes of context and question
  std::string context;     ///< book text with the statements in it
  std::string question;    ///< ends where the answer begins
  std::string answer;
};

/// A case in the tokens of a model.
struct TokenCase {
  std::string task;
  double depth = 0.0;
  std::size_t length = 0;  ///< bytes of the text that it was made of
  std::vector<decoder::Token> context, question, answer;
};

/// Which cases are made: every task at every length and depth.
struct TaskSuite {
  std::vector<std::string> names;
  std::filesystem::path templates = "data/tasks/templates.json";
  std::vector<std::size_t> lengths{1900};  ///< bytes of context and question
  std::vector<double> depths{0.0, 0.25, 0.5, 0.75, 1.0};
  std::size_t cases = 4;  ///< for each task, length and depth
};

/// Wording from data/tasks/templates.json; cases from seeds. The same seed gives the same case on every platform.
class TaskMaker {
 public:
  /// Throws std::runtime_error when the file is missing or has no tasks.
  explicit TaskMaker(const std::filesystem::path& templates);

  [[nodiscard]] std::vector<std::string> names() const;

  /// \param text a byte text that statements are hidden in, at least `length` long
  /// \throws std::runtime_error for an unknown task, or a length that the task does not fit in
  [[nodiscard]] TaskCase make(const std::string& task, const Text& text, std::size_t length, double depth,
                              std::uint64_t seed) const;

 private:
  class Draw;
  nlohmann::json spec_;
};

/// All cases of a suite, dealt to the texts in turn. Another seed gives fresh ones.
/// \throws std::runtime_error as TaskMaker does
[[nodiscard]] std::vector<TaskCase> make_cases(const TaskSuite& suite, std::span<const Text> texts, std::uint64_t seed);

/// A case for a model that reads bytes.
[[nodiscard]] TokenCase byte_case(const TaskCase& text);

/// Cases as text, for `tools/prepare_smollm2 tasks` and its like to turn into tokens.
/// \throws std::runtime_error when the file cannot be written
void write_cases(const std::filesystem::path& file, std::span<const TaskCase> cases);

/// Cases that another program has turned into tokens.
/// \throws std::runtime_error when the file is missing, malformed or has tokens that the model does not know
[[nodiscard]] std::vector<TokenCase> read_cases(const std::filesystem::path& file, const Vocabulary& vocabulary);

}  // namespace evaluation
