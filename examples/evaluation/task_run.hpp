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

}  // namespace evaluation
