#include "evaluation/task_run.hpp"

#include <cstdio>
#include <stdexcept>

namespace evaluation {
namespace {

std::vector<decoder::Token> bytes_of(const std::string& text) {
  std::vector<decoder::Token> tokens;
  for (const char c : text) tokens.push_back(static_cast<unsigned char>(c));
  return tokens;
}

}  // namespace

TaskRun::TaskRun(decoder::Decoder& model, kvfold::ThreadPool& pool, const TaskCase& task, TaskMode mode,
                 const std::vector<Options>& options, std::size_t chunk)
    : model_(model),
      tail_(bytes_of(task.answer)),
      answer_size_(task.answer.size()),
      prompt_(model.new_sequence()),
      evidence_(model, static_cast<kvfold::Index>(task.context.size() + task.question.size()), options, pool) {
  std::vector<decoder::Token> head = bytes_of(task.context), question = bytes_of(task.question);
  if (mode == TaskMode::aware) {
    head.insert(head.end(), question.begin(), question.end() - 1);
    question.erase(question.begin(), question.end() - 1);
  }
  tail_.insert(tail_.begin(), question.begin(), question.end());
  model_.prefill(head, prompt_, chunk, evidence_.observer(prompt_));
}

bool TaskRun::answers(const Method& method, kvfold::Index budget) {
  decoder::Sequence sequence = prompt_.clone();
  static_cast<void>(method.compress(sequence, evidence_, budget));
  // Greedy decoding follows the answer for as long as it is right, so one pass over the answer tells.
  const auto read = std::span(tail_).first(tail_.size() - 1);
  const decoder::Matrix logits = model_.forward(read, sequence, decoder::Logits::all);
  for (std::size_t i = tail_.size() - answer_size_; i < tail_.size(); ++i) {
    Eigen::Index best = 0;
    logits.row(static_cast<Eigen::Index>(i) - 1).maxCoeff(&best);
    if (best != tail_[i]) return false;
  }
  return true;
}

nlohmann::json Answers::to_json() const {
  return {{"task", task},   {"mode", mode},     {"method", method},   {"length", length},
          {"depth", depth}, {"budget", budget}, {"correct", correct}, {"cases", cases}};
}

std::vector<Answers> run_tasks(const TaskSuite& suite, decoder::Decoder& model, kvfold::ThreadPool& pool,
                               std::span<const Text> texts, const std::vector<Method>& methods,
                               const std::vector<kvfold::Index>& budgets, std::uint64_t seed, std::size_t chunk) {
  constexpr std::size_t kLongestAnswer = 128;  // bytes
  const TaskMaker maker(suite.templates);
  for (const std::size_t length : suite.lengths) {
    if (length + kLongestAnswer > static_cast<std::size_t>(model.config().max_positions)) {
      throw std::runtime_error("tasks of " + std::to_string(length) + " bytes are longer than the model can read");
    }
  }
  std::vector<Options> options;
  options.reserve(methods.size());
  for (const Method& method : methods) options.push_back(method.options);

  std::vector<Answers> results;
  const auto run_cell = [&](const std::string& mode, const std::string& task, std::size_t length, double depth) {
    std::vector<Answers> row;
    for (const Method& method : methods) {
      if (method.label == "full") {
        row.push_back({task, mode, method.label, length, depth, static_cast<kvfold::Index>(length)});
        continue;
      }
      for (const kvfold::Index budget : budgets) row.push_back({task, mode, method.label, length, depth, budget});
    }
    for (std::size_t i = 0; i < suite.cases; ++i) {
      const auto cell = static_cast<std::uint64_t>(depth * 1000.0) * 1000003u + length * 10007u + i;
      const TaskCase example =
          maker.make(task, texts[i % texts.size()], length, depth, seed * 0x9e3779b97f4a7c15u + cell);
      TaskRun run(model, pool, example, mode == "aware" ? TaskMode::aware : TaskMode::agnostic, options, chunk);
      auto answers = row.begin();
      for (const Method& method : methods) {
        do {
          answers->correct += run.answers(method, answers->budget) ? 1 : 0;
          ++answers->cases;
          ++answers;
        } while (answers != row.end() && answers->method == method.label);
      }
    }
    results.insert(results.end(), row.begin(), row.end());
  };
  for (const std::string& mode : suite.modes) {
    for (const std::string& task : suite.names) {
      std::fprintf(stderr, "task %s, question %s compression\n", task.c_str(), mode == "aware" ? "before" : "after");
      for (const std::size_t length : suite.lengths) {
        for (const double depth : suite.depths) run_cell(mode, task, length, depth);
      }
    }
  }
  return results;
}

void print_answers(const std::vector<Answers>& answers, int label_width) {
  // Tables, their lines and columns, in the order in which they were run.
  using Line = std::pair<std::string, std::vector<std::pair<kvfold::Index, std::pair<int, int>>>>;
  std::vector<std::pair<std::string, std::vector<Line>>> tables;
  const auto entry = [](auto& list, const auto& key) -> auto& {
    for (auto& [known, value] : list) {
      if (known == key) return value;
    }
    return list.emplace_back(key, typename std::remove_reference_t<decltype(list)>::value_type::second_type{}).second;
  };
  for (const Answers& a : answers) {
    const std::string title = a.task + ", question " + (a.mode == "aware" ? "before" : "after") + " compression";
    // The full cache has as many rows as the text: one column, whatever the lengths.
    auto& cell = entry(entry(entry(tables, title), a.method), a.method == "full" ? 0 : a.budget);
    cell.first += a.correct;
    cell.second += a.cases;
  }
  for (const auto& [title, lines] : tables) {
    std::printf("\n%s: exact answers in %%, by rows per head\n\n%-*s", title.c_str(), label_width, "method");
    for (const auto& [budget, cell] : lines.back().second) std::printf(" %8lld", static_cast<long long>(budget));
    std::printf("\n");
    for (const auto& [method, cells] : lines) {
      std::printf("%-*s", label_width, method.c_str());
      for (const auto& [budget, cell] : cells) std::printf(" %8.1f", 100.0 * cell.first / cell.second);
      std::printf("\n");
    }
  }
}

}  // namespace evaluation
