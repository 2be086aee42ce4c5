/// \file
/// A whole evaluation: for each document, the predictions from every compressed cache beside those from the full one; for
/// each retrieval task, whether the model still answers exactly.
#pragma once

#include <functional>
#include <memory>

#include "evaluation/engine.hpp"
#include "evaluation/settings.hpp"

namespace evaluation {

/// Called once, when the model is needed. \throws std::runtime_error when there is none
using MakeEngine = std::function<std::unique_ptr<Engine>(kvfold::ThreadPool&)>;

/// Measures what the settings ask for, prints tables to stdout and progress to stderr, and writes the files asked for.
/// \throws std::runtime_error for what cannot be done: before the first second of work where that can be known
void run(const Settings& settings, const MakeEngine& make_engine);

}  // namespace evaluation
