#include "evaluation/task_run.hpp"

#include <cstdio>
#include <set>
#include <stdexcept>

namespace evaluation {

TaskRun::TaskRun(Engine& engine, const TokenCase& task, TaskMode mode)
    : engine_(engine), tail_(task.answer), answer_size_(task.answer.size()) {
  std::vector<decoder::Token> head = task.context, question = task.question;
  if (mode == TaskMode::aware) {
    head.insert(head.end(), question.begin(), question.end() - 1);
    question.erase(question.begin(), question.end() - 1);
  }
  tail_.insert(tail_.begin(), question.begin(), question.end());
  engine_.read(head);
}

bool TaskRun::answers(const Method& method, kvfold::Index budget) {
  static_cast<void>(engine_.compress(method, budget));
  // Greedy decoding follows the answer for as long as it is right, so one pass over the answer tells.
  const decoder::Matrix logits = engine_.forward(std::span(tail_).first(tail_.size() - 1));
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

std::vector<Answers> run_tasks(std::span<const TokenCase> cases, const std::vector<std::string>& modes, Engine& engine,
                               const std::vector<Method>& methods, const std::vector<kvfold::Index>& budgets) {
  for (const TokenCase& c : cases) {
    if (c.context.size() + c.question.size() + c.answer.size() > engine.max_positions())
      throw std::runtime_error("a case of task " + c.task + " is longer than the model can read");
  }
  std::vector<Answers> results;
  for (const std::string& mode : modes) {
    std::size_t group = results.size();  // where the answers of the cell of the last case begin
    const TokenCase* last = nullptr;
    for (const TokenCase& c : cases) {
      if (last == nullptr || c.task != last->task) {
        std::fprintf(stderr, "task %s, question %s compression\n", c.task.c_str(),
                     mode == "aware" ? "before" : "after");
      }
      if (last == nullptr || c.task != last->task || c.length != last->length || c.depth != last->depth) {
        group = results.size();
        for (const Method& method : methods) {
          for (const kvfold::Index budget :
               method.is_full() ? std::vector{static_cast<kvfold::Index>(c.length)} : budgets) {
            results.push_back({c.task, mode, method.label, c.length, c.depth, budget});
          }
        }
      }
      last = &c;
      TaskRun run(engine, c, mode == "aware" ? TaskMode::aware : TaskMode::agnostic);
      std::size_t cell = group;
      for (const Method& method : methods) {
        for (; cell < results.size() && results[cell].method == method.label; ++cell) {
          results[cell].correct += run.answers(method, results[cell].budget) ? 1 : 0;
          ++results[cell].cases;
        }
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
  std::set<std::string> tasks;
  for (const Answers& a : answers) tasks.insert(a.task);
  const auto count = [&](const std::string& task, const Answers& a) {
    const std::string title = task + ", question " + (a.mode == "aware" ? "before" : "after") + " compression";
    // The full cache has as many rows as the text: one column, whatever the lengths.
    auto& cell = entry(entry(entry(tables, title), a.method), a.method == "full" ? 0 : a.budget);
    cell.first += a.correct;
    cell.second += a.cases;
  };
  for (const Answers& a : answers) count(a.task, a);
  if (tasks.size() > 1) {  // every task has as many cases as the others
    for (const Answers& a : answers) count("all tasks", a);
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
