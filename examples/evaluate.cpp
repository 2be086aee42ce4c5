/// \file
/// kvfold-evaluate: what each compression method costs a real model in quality, and what it saves.
///
/// For each document: reads N tokens, compresses every layer's cache by each method, reads the next M tokens from the
/// compressed cache, and compares the predictions with those from the full cache.

#include <chrono>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <map>
#include <thread>

#include <CLI/CLI.hpp>

#include "evaluation/documents.hpp"
#include "evaluation/methods.hpp"
#include "evaluation/metrics.hpp"
#include "evaluation/task_run.hpp"

namespace {

using kvfold::Index;

struct Settings {
  std::filesystem::path model;
  std::vector<std::filesystem::path> texts;
  std::size_t context = 2048, continuation = 512, documents = 4, chunk = 512;
  std::vector<Index> budgets{32, 64, 128, 256};
  std::vector<std::string> methods{"full", "streaming-llm", "h2o", "snapkv", "tova", "ems-evict", "ems"};
  std::uint64_t seed = 1;
  Index threads = static_cast<Index>(std::max(1u, std::thread::hardware_concurrency()));
  std::filesystem::path json;
  evaluation::Options options;
  evaluation::TaskSuite tasks;  // no names: perplexity only
};

/// One line of the results.
struct Measured {
  std::string method;
  Index budget;
  std::string document;
  double nll, full_nll, kl;
  evaluation::Outcome outcome;

  [[nodiscard]] nlohmann::json to_json() const {
    return {{"method", method},
            {"budget", budget},
            {"document", document},
            {"perplexity", std::exp(nll)},
            {"ratio", std::exp(nll - full_nll)},
            {"kl", kl},
            {"rows", outcome.report.rows_kept},
            {"rows_merged", outcome.report.rows_merged},
            {"rows_evicted", outcome.report.rows_evicted},
            {"bytes", outcome.report.bytes_after},
            {"bytes_before", outcome.report.bytes_before},
            {"kept_score_share", outcome.report.kept_score_share},
            {"score_ms", outcome.score_ms},
            {"compress_ms", outcome.compress_ms}};
  }
};

void add_policy_options(CLI::App& app, evaluation::Options& options) {
  for (const auto& field : evaluation::option_fields()) {
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

/// Everything that is measured on one document.
class DocumentRun {
 public:
  DocumentRun(decoder::Decoder& model, kvfold::ThreadPool& pool, const Settings& settings,
              const std::vector<evaluation::Options>& options, const evaluation::Document& document)
      : model_(model),
        pool_(pool),
        settings_(settings),
        document_(document),
        prompt_(model.new_sequence()),
        evidence_(model, static_cast<Index>(settings.context), options, pool) {
    const auto start = std::chrono::steady_clock::now();
    model_.prefill(document.tokens.first(settings.context), prompt_, settings.chunk, evidence_.observer(prompt_));
    prefill_ms_ = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count() -
                  evidence_.observe_ms();
    full_ = continue_from(prompt_.clone());
    full_nll_ = evaluation::negative_log_likelihood(full_, next_tokens());
  }

  [[nodiscard]] double prefill_ms() const { return prefill_ms_; }
  [[nodiscard]] double observe_ms() const { return evidence_.observe_ms(); }
  [[nodiscard]] double full_nll() const { return full_nll_; }

  Measured measure(const evaluation::Method& method, Index budget) {
    decoder::Sequence sequence = prompt_.clone();
    const evaluation::Outcome outcome = method.compress(sequence, evidence_, budget);
    const std::string& name = method.label;
    if (name == "full") return {name, budget, document_.name, full_nll_, full_nll_, 0.0, outcome};
    const decoder::Matrix log_probabilities = continue_from(std::move(sequence));
    return {name,           budget,
            document_.name, evaluation::negative_log_likelihood(log_probabilities, next_tokens()),
            full_nll_,      evaluation::mean_kl(full_, log_probabilities, pool_),
            outcome};
  }

 private:
  [[nodiscard]] std::span<const decoder::Token> next_tokens() const {
    return document_.tokens.subspan(settings_.context + 1, settings_.continuation);
  }

  /// Log probabilities of the next M tokens, teacher-forced.
  decoder::Matrix continue_from(decoder::Sequence sequence) {
    const auto tokens = document_.tokens.subspan(settings_.context, settings_.continuation);
    decoder::Matrix all(static_cast<Eigen::Index>(tokens.size()), model_.config().vocab_size);
    for (std::size_t first = 0; first < tokens.size(); first += settings_.chunk) {
      const auto piece = tokens.subspan(first, std::min(settings_.chunk, tokens.size() - first));
      all.middleRows(static_cast<Eigen::Index>(first), static_cast<Eigen::Index>(piece.size())) =
          model_.forward(piece, sequence, decoder::Logits::all);
    }
    evaluation::log_softmax(all, pool_);
    return all;
  }

  decoder::Decoder& model_;
  kvfold::ThreadPool& pool_;
  const Settings& settings_;
  const evaluation::Document& document_;
  decoder::Sequence prompt_;
  evaluation::Evidence evidence_;
  decoder::Matrix full_;
  double full_nll_ = 0.0, prefill_ms_ = 0.0;
};

/// Means over documents of one method at one budget.
struct Cell {
  double log_ratio = 0.0, kl = 0.0, bytes = 0.0, bytes_before = 0.0, score_ms = 0.0, compress_ms = 0.0, rows = 0.0;
  int count = 0;

  void add(const Measured& m) {
    log_ratio += m.nll - m.full_nll;
    kl += m.kl;
    rows += static_cast<double>(m.outcome.report.rows_kept);
    bytes += static_cast<double>(m.outcome.report.bytes_after);
    bytes_before += static_cast<double>(m.outcome.report.bytes_before);
    score_ms += m.outcome.score_ms;
    compress_ms += m.outcome.compress_ms;
    ++count;
  }
};

int label_width(const Settings& settings) {
  std::size_t width = 16;
  for (const std::string& method : settings.methods) width = std::max(width, method.size());
  return static_cast<int>(width);
}

void print_table(const Settings& settings, const std::vector<Measured>& results, double full_nll, double prefill_ms) {
  std::map<std::pair<std::string, Index>, Cell> cells;
  for (const Measured& m : results) cells[{m.method, m.budget}].add(m);
  const int width = label_width(settings);
  std::printf("\n%zu documents, context %zu, continuation %zu, full-cache perplexity %.3f, prefill %.0f ms\n",
              settings.documents, settings.context, settings.continuation, std::exp(full_nll), prefill_ms);
  std::printf("perplexity ratio to the full cache / mean KL divergence from it, by rows per head:\n\n%-*s", width,
              "method");
  for (const Index budget : settings.budgets) std::printf(" %15lld", static_cast<long long>(budget));
  std::printf("   score ms  compress ms  of prefill   MB kept (of)\n");
  for (const std::string& method : settings.methods) {
    if (method == "full") continue;
    std::printf("%-*s", width, method.c_str());
    Cell last;
    for (const Index budget : settings.budgets) {
      last = cells[{method, budget}];
      std::printf("   %.4f/%.4f", std::exp(last.log_ratio / last.count), last.kl / last.count);
    }
    std::printf("   %8.1f  %11.1f  %8.2f %%   %.2f (%.2f)\n", last.score_ms / last.count, last.compress_ms / last.count,
                100.0 * (last.score_ms + last.compress_ms) / last.count / prefill_ms, last.bytes / last.count / 1e6,
                last.bytes_before / last.count / 1e6);
  }
  std::printf(
      "\nscore, compress and MB: all layers, at the last budget; score contains the evidence gathered during prefill, "
      "which\n"
      "prefill does not contain\n");
}

nlohmann::json settings_json(const Settings& s) {
  std::vector<std::string> texts;
  for (const auto& text : s.texts) texts.push_back(text.filename().string());
  return {{"model", s.model.filename().string()},
          {"texts", texts},
          {"context", s.context},
          {"continue", s.continuation},
          {"documents", s.documents},
          {"budgets", s.budgets},
          {"methods", s.methods},
          {"seed", s.seed},
          {"chunk", s.chunk},
          {"threads", s.threads},
          {"tasks", s.tasks.names},
          {"lengths", s.tasks.lengths},
          {"depths", s.tasks.depths},
          {"modes", s.tasks.modes},
          {"cases", s.tasks.cases},
          {"policy", s.options.to_json()}};
}

int run(Settings& settings) {
  // Everything that can be refused is refused before the first second of work.
  kvfold::ThreadPool pool(settings.threads);
  std::vector<evaluation::Method> methods;
  std::vector<evaluation::Options> options;
  for (const std::string& text : settings.methods) {
    methods.push_back(evaluation::make_method(text, settings.options, pool));
    options.push_back(methods.back().options);
  }
  const auto config = decoder::Config::load(settings.model / "config.json");
  std::vector<evaluation::Text> texts;
  for (const auto& file : settings.texts) texts.push_back(evaluation::load_text(file, config));
  const std::size_t length = settings.context + settings.continuation + 1;
  if (settings.documents > 0 && length > static_cast<std::size_t>(config.max_positions)) {
    throw std::runtime_error("context + continuation is longer than the model can read");
  }
  const auto documents = evaluation::choose_documents(texts, settings.documents, length, settings.seed);
  if (!settings.tasks.names.empty() && config.tokenizer != "bytes") {
    throw std::runtime_error("--tasks needs a model that reads bytes");
  }
  std::fprintf(stderr, "loading %s\n", settings.model.filename().c_str());
  decoder::Decoder model(settings.model, pool);
  std::vector<Measured> results;
  double full_nll = 0.0, prefill_ms = 0.0;
  auto per_document = nlohmann::json::array();
  for (std::size_t d = 0; d < documents.size(); ++d) {
    std::fprintf(stderr, "document %zu of %zu, %s: reading\n", d + 1, documents.size(), documents[d].name.c_str());
    DocumentRun run(model, pool, settings, options, documents[d]);
    full_nll += run.full_nll() / static_cast<double>(documents.size());
    prefill_ms += run.prefill_ms() / static_cast<double>(documents.size());
    per_document.push_back({{"document", documents[d].name},
                            {"full_perplexity", std::exp(run.full_nll())},
                            {"prefill_ms", run.prefill_ms()},
                            {"observe_ms", run.observe_ms()}});
    for (const evaluation::Method& method : methods) {
      for (const Index budget : settings.budgets) {
        const bool full = method.label == "full";
        if (full && budget != settings.budgets.front()) continue;
        results.push_back(run.measure(method, full ? static_cast<Index>(settings.context) : budget));
        const Measured& m = results.back();
        std::fprintf(stderr, "  %-*s %5lld rows  perplexity %8.3f  ratio %.4f  KL %.4f\n", label_width(settings),
                     method.label.c_str(), static_cast<long long>(m.budget), std::exp(m.nll),
                     std::exp(m.nll - m.full_nll), m.kl);
      }
    }
  }
  if (!results.empty()) print_table(settings, results, full_nll, prefill_ms);
  std::vector<evaluation::Answers> answers;
  if (!settings.tasks.names.empty()) {
    answers = evaluation::run_tasks(settings.tasks, model, pool, texts, methods, settings.budgets, settings.seed,
                                    settings.chunk);
    evaluation::print_answers(answers, label_width(settings));
  }
  if (!settings.json.empty()) {
    auto list = nlohmann::json::array();
    for (const Measured& m : results) list.push_back(m.to_json());
    auto tasks = nlohmann::json::array();
    for (const evaluation::Answers& a : answers) tasks.push_back(a.to_json());
    std::ofstream out(settings.json);
    out << nlohmann::json{{"settings", settings_json(settings)},
                          {"documents", per_document},
                          {"results", list},
                          {"tasks", tasks}}
               .dump(1)
        << "\n";
    if (!out.flush()) throw std::runtime_error(settings.json.string() + ": cannot be written");
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  Settings settings;
  CLI::App app("Perplexity, divergence, memory and time of KV-cache compression methods on a real model.");
  app.add_option("--model", settings.model, "directory with config.json and model.safetensors")
      ->required()
      ->check(CLI::ExistingDirectory);
  app.add_option("--text", settings.texts, "text file (byte models) or token file; may be given several times")
      ->required()
      ->check(CLI::ExistingFile);
  app.add_option("--context", settings.context, "N, tokens read before compression")
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
  const std::string group = "Retrieval tasks (byte models)";
  app.add_option("--tasks", settings.tasks.names, "single, keys, two_values, assignment; comma-separated")
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
  app.add_option("--modes", settings.tasks.modes,
                 "aware: the question is compressed with the text; agnostic: it comes after")
      ->delimiter(',')
      ->check(CLI::IsMember({"aware", "agnostic"}))
      ->group(group)
      ->capture_default_str();
  app.add_option("--cases", settings.tasks.cases, "cases for each task, length and depth")
      ->check(CLI::PositiveNumber)
      ->group(group)
      ->capture_default_str();
  add_policy_options(app, settings.options);
  CLI11_PARSE(app, argc, argv);
  try {
    return run(settings);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "kvfold-evaluate: %s\n", error.what());
    return 1;
  }
}
