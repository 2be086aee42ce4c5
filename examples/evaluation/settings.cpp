#include "evaluation/settings.hpp"

#include <algorithm>
#include <stdexcept>

#include <CLI/CLI.hpp>

namespace evaluation {

namespace {

void add_policy_options(CLI::App& app, Options& options) {
  for (const auto& field : option_fields()) {
    app.add_option_function<std::string>(
           "--" + field.name,
           [&](const std::string& text) {
             try {
               field.set(options, text);
             } catch (const std::runtime_error& error) {
               throw CLI::ValidationError(error.what());
             }
           },
           field.help)
        ->group("Policy options")
        ->default_str(field.get(options).dump())
        ->run_callback_for_default(false);
  }
}

}  // namespace

nlohmann::json Settings::to_json() const {
  std::vector<std::string> text_names;
  for (const auto& text : texts) text_names.push_back(text.filename().string());
  return {{"model", model.filename().string()},
          {"texts", text_names},
          {"contexts", contexts},
          {"continue", continuation},
          {"documents", documents},
          {"budgets", budgets},
          {"methods", methods},
          {"seed", seed},
          {"chunk", chunk},
          {"threads", threads},
          {"tasks", tasks.names},
          {"lengths", tasks.lengths},
          {"depths", tasks.depths},
          {"modes", modes},
          {"cases", tasks.cases},
          {"policy", options.to_json()}};
}

int Settings::label_width() const {
  std::size_t width = 16;
  for (const std::string& method : methods) width = std::max(width, method.size());
  return static_cast<int>(width);
}

void add_options(CLI::App& app, Settings& settings) {
  app.add_option("--text", settings.texts, "text file (byte models) or token file; may be given several times")
      ->check(CLI::ExistingFile);
  app.add_option("--context", settings.contexts,
                 "N, tokens read before compression, comma-separated; all predict the same tokens")
      ->delimiter(',')
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--continue", settings.continuation, "M, tokens predicted after it")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--documents", settings.documents, "documents, dealt to the texts in turn; 0 for tasks only")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  app.add_option("--budgets", settings.budgets, "rows per head, comma-separated")
      ->delimiter(',')
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--methods", settings.methods, "comma-separated; name@option=value@... sets an option for one of them")
      ->delimiter(',')
      ->capture_default_str();
  app.add_option("--seed", settings.seed, "chooses where documents start")->capture_default_str();
  app.add_option("--chunk", settings.chunk, "tokens per forward pass")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--threads", settings.threads, "threads")->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--json", settings.json, "where every figure and setting goes");
  app.add_option("--csv", settings.csv, "where the figures go as a table, a line for each measurement");
  app.add_option("--trace", settings.trace,
                 "a method; what it did with each row of the first document goes to the JSON file");
  const std::string group = "Retrieval tasks";
  app.add_option("--tasks", settings.tasks.names,
                 "made from --text: single, keys, two_values, assignment; comma-separated")
      ->delimiter(',')
      ->group(group);
  app.add_option("--task-templates", settings.tasks.templates, "wording of the tasks")
      ->group(group)
      ->capture_default_str();
  app.add_option("--lengths", settings.tasks.lengths, "bytes of context and question, comma-separated")
      ->delimiter(',')
      ->check(CLI::PositiveNumber)
      ->group(group)
      ->capture_default_str();
  app.add_option("--depths", settings.tasks.depths, "where the statement stands, 0 to 1, comma-separated")
      ->delimiter(',')
      ->check(CLI::Range(0.0, 1.0))
      ->group(group)
      ->capture_default_str();
  app.add_option("--modes", settings.modes, "aware: the question is compressed with the text; agnostic: it comes after")
      ->delimiter(',')
      ->check(CLI::IsMember({"aware", "agnostic"}))
      ->group(group)
      ->capture_default_str();
  app.add_option("--cases", settings.tasks.cases, "cases for each task, length and depth")
      ->check(CLI::PositiveNumber)
      ->group(group)
      ->capture_default_str();
  app.add_option("--write-cases", settings.write_cases,
                 "write the cases of --tasks as text and end, for tools/prepare_smollm2 tasks to turn into tokens")
      ->group(group);
  app.add_option("--read-cases", settings.read_cases, "run these cases, which are tokens of the model")
      ->check(CLI::ExistingFile)
      ->group(group);
  add_policy_options(app, settings.options);
}

}  // namespace evaluation
