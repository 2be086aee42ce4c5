/// \file
/// Whether a model still finds the answer after its cache was compressed.

#pragma once

#include "evaluation/engine.hpp"
#include "evaluation/tasks.hpp"

namespace evaluation {

/// When the question is known.
enum class TaskMode {
  aware,     ///< it is part of the prompt that is compressed
  agnostic,  ///< it comes after compression
};

/// One case, read once with the full cache and answered after each method.
///
/// The last token of the prompt is held back: it is read from the compressed cache, so that no token of the answer is
/// predicted from the full one.
class TaskRun {
 public:
  TaskRun(Engine& engine, const TokenCase& task, TaskMode mode);

  /// Whether greedy decoding from the compressed cache gives the answer, token for token.
  [[nodiscard]] bool answers(const Method& method, kvfold::Index budget);

 private:
  Engine& engine_;
  std::vector<decoder::Token> tail_;  // what is read after compression, and the answer
  std::size_t answer_size_;
};

/// Exact answers of one method at one budget, task, length and depth.
struct Answers {
  std::string task, mode, method;
  std::size_t length = 0;
  double depth = 0.0;
  kvfold::Index budget = 0;  ///< the length, for the full cache
  int correct = 0, cases = 0;

  [[nodiscard]] nlohmann::json to_json() const;
};

/// Asks every case in every mode ("aware", "agnostic") after every method. Results are grouped by mode, task, length and
/// depth, in the order of the cases.
/// \throws std::runtime_error for cases that are longer than the model can read
std::vector<Answers> run_tasks(std::span<const TokenCase> cases, const std::vector<std::string>& modes, Engine& engine,
                               const std::vector<Method>& methods, const std::vector<kvfold::Index>& budgets);

/// One table for each task and mode, share of exact answers by method and budget, over depths and lengths; and where there
/// are several tasks, one of their mean.
void print_answers(const std::vector<Answers>& answers, int label_width);

}  // namespace evaluation
