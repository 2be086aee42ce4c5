/// \file
/// The results of an evaluation as tables.
#pragma once

#include <filesystem>
#include <vector>

#include "evaluation/document_run.hpp"
#include "evaluation/settings.hpp"
#include "evaluation/task_run.hpp"

namespace evaluation {

/// Means over the documents of one context, with the full cache.
struct Reading {
  std::size_t context = 0;
  double full_nll = 0.0, prefill_ms = 0.0;
};

/// The means over documents of every method at every budget, to stdout.
void print_table(const Settings& settings, const std::vector<Measured>& results, const Reading& reading);

/// One line for each measurement, with the same columns for perplexity and for tasks.
/// \throws std::runtime_error when the file cannot be written
void write_csv(const std::filesystem::path& file, const std::vector<Measured>& results,
               const std::vector<Answers>& answers);

}  // namespace evaluation
