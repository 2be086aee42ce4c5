/// \file
/// What the user may ask of an evaluation, whatever the engine.
#pragma once

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <string>
#include <thread>
#include <vector>

#include <nlohmann/json.hpp>

#include "evaluation/methods.hpp"
#include "evaluation/tasks.hpp"

namespace CLI {  // NOLINT: it is not ours
class App;
}

namespace evaluation {

struct Settings {
  std::filesystem::path model;  // what it is, the engine knows
  std::vector<std::filesystem::path> texts;
  std::vector<std::size_t> contexts{2048};
  std::size_t continuation = 512, documents = 4, chunk = 512;
  std::vector<kvfold::Index> budgets{32, 64, 128, 256};
  std::vector<std::string> methods{"full", "streaming-llm", "h2o", "snapkv", "tova", "ems-evict", "ems"};
  std::uint64_t seed = 1;
  kvfold::Index threads = static_cast<kvfold::Index>(std::max(1u, std::thread::hardware_concurrency()));
  std::filesystem::path json, csv;
  std::string trace;  // the method whose row fates go to the JSON file
  Options options;    // of all methods that do not say otherwise
  TaskSuite tasks;    // no names: none are made
  std::vector<std::string> modes{"aware"};
  std::filesystem::path write_cases, read_cases;

  [[nodiscard]] nlohmann::json to_json() const;
  /// Of the column that names methods.
  [[nodiscard]] int label_width() const;
};

/// Everything but `--model`, which differs between engines. `settings` holds the defaults, and must outlive the parsing.
void add_options(CLI::App& app, Settings& settings);

}  // namespace evaluation
