#include "evaluation/task_run.hpp"

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

}  // namespace evaluation
