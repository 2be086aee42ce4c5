/// \file
/// Retrieval tasks inside book text, in the manner of RULER, for models that read bytes.

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

}  // namespace evaluation
