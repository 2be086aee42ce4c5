/// \file
/// Whether a model still finds the answer after its cache was compressed.

#pragma once

#include "evaluation/methods.hpp"
#include "evaluation/tasks.hpp"

namespace evaluation {

/// When the question is known.
enum class TaskMode {
  aware,     ///< it is part of the prompt that is compressed
  agnostic,  ///< it comes after compression
};

/// One case, read once with the full cache and answered after each method.
///
/// The last byte of the prompt is held back: it is read from the compressed cache, so that no byte of the answer is
/// predicted from the full one.
class TaskRun {
 public:
  TaskRun(decoder::Decoder& model, kvfold::ThreadPool& pool, const TaskCase& task, TaskMode mode,
          const std::vector<Options>& options, std::size_t chunk);

  /// Whether greedy decoding from the compressed cache gives the answer, byte for byte.
  [[nodiscard]] bool answers(const Method& method, kvfold::Index budget);

 private:
  decoder::Decoder& model_;
  std::vector<decoder::Token> tail_;  // what is read after compression, and the answer
  std::size_t answer_size_;
  decoder::Sequence prompt_;
  Evidence evidence_;
};

/// Which cases are run: every task at every length and depth, in every mode.
struct TaskSuite {
  std::vector<std::string> names;
  std::filesystem::path templates = "data/tasks/templates.json";
  std::vector<std::size_t> lengths{2048};  ///< bytes of context and question
  std::vector<double> depths{0.0, 0.25, 0.5, 0.75, 1.0};
  std::vector<std::string> modes{"aware"};  ///< "aware", "agnostic"
  std::size_t cases = 4;                    ///< for each task, length and depth
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

/// Runs a suite. All methods and modes get the same cases; another seed gives fresh ones.
/// Throws std::runtime_error for tasks that are not known, and lengths that the model cannot read.
std::vector<Answers> run_tasks(const TaskSuite& suite, decoder::Decoder& model, kvfold::ThreadPool& pool,
                               std::span<const Text> texts, const std::vector<Method>& methods,
                               const std::vector<kvfold::Index>& budgets, std::uint64_t seed, std::size_t chunk);

/// One table for each task and mode: share of exact answers by method and budget, over depths and lengths.
void print_answers(const std::vector<Answers>& answers, int label_width);

}  // namespace evaluation
