/// \file
/// kvfold-evaluate: what each compression method costs a real model in quality, and what it saves.
///
/// For each document: reads N tokens, compresses every layer's cache by each method, reads the next M tokens from the
/// compressed cache, and compares the predictions with those from the full cache. For each retrieval task: whether the
/// model still answers exactly.

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
  std::vector<std::size_t> contexts{2048};
  std::size_t continuation = 512, documents = 4, chunk = 512;
  std::vector<Index> budgets{32, 64, 128, 256};
  std::vector<std::string> methods{"full", "streaming-llm", "h2o", "snapkv", "tova", "ems-evict", "ems"};
  std::uint64_t seed = 1;
  Index threads = static_cast<Index>(std::max(1u, std::thread::hardware_concurrency()));
  std::filesystem::path json, csv;
  std::string trace;  // the method whose row fates go to the JSON file
  evaluation::Options options;
  evaluation::TaskSuite tasks;  // no names: none are made
  std::vector<std::string> modes{"aware"};
  std::filesystem::path write_cases, read_cases;
};

/// One line of the results.
struct Measured {
  std::string method;
  Index budget;
  std::size_t context;
  std::string document;
  double nll, full_nll, kl;
  evaluation::Outcome outcome;

  [[nodiscard]] nlohmann::json to_json() const {
    return {{"method", method},
            {"budget", budget},
            {"context", context},
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
  /// Reads the last `context` tokens before the continuation, so that every context predicts the same tokens.
  DocumentRun(decoder::Decoder& model, kvfold::ThreadPool& pool, const Settings& settings, std::size_t context,
              const std::vector<evaluation::Options>& options, const evaluation::Document& document)
      : model_(model),
        pool_(pool),
        settings_(settings),
        name_(document.name),
        tokens_(document.tokens.last(context + settings.continuation + 1)),
        context_(context),
        prompt_(model.new_sequence()),
        evidence_(model, static_cast<Index>(context), options, pool) {
    const auto start = std::chrono::steady_clock::now();
    model_.prefill(tokens_.first(context), prompt_, settings.chunk, evidence_.observer(prompt_));
    prefill_ms_ = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count() -
                  evidence_.observe_ms();
    full_ = continue_from(prompt_.clone());
    full_nll_ = evaluation::negative_log_likelihood(full_, next_tokens());
  }

  [[nodiscard]] double prefill_ms() const { return prefill_ms_; }
  [[nodiscard]] double observe_ms() const { return evidence_.observe_ms(); }
  [[nodiscard]] double full_nll() const { return full_nll_; }
  [[nodiscard]] const std::string& name() const { return name_; }

  Measured measure(const evaluation::Method& method, Index budget) {
    decoder::Sequence sequence = prompt_.clone();
    const evaluation::Outcome outcome = method.compress(sequence, evidence_, budget);
    const std::string& name = method.label;
    if (name == "full") return {name, budget, context_, name_, full_nll_, full_nll_, 0.0, outcome};
    const decoder::Matrix log_probabilities = continue_from(std::move(sequence));
    const double nll = evaluation::negative_log_likelihood(log_probabilities, next_tokens());
    return {name,   budget, context_, name_, nll, full_nll_, evaluation::mean_kl(full_, log_probabilities, pool_),
            outcome};
  }

 private:
  [[nodiscard]] std::span<const decoder::Token> next_tokens() const {
    return tokens_.subspan(context_ + 1, settings_.continuation);
  }

  /// Log probabilities of the next M tokens, teacher-forced.
  decoder::Matrix continue_from(decoder::Sequence sequence) {
    const auto tokens = tokens_.subspan(context_, settings_.continuation);
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
  std::string name_;
  std::span<const decoder::Token> tokens_;  // the context, the continuation, and what follows it
  std::size_t context_;
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

/// Means over the documents of one context, with the full cache.
struct Reading {
  std::size_t context = 0;
  double full_nll = 0.0, prefill_ms = 0.0;
};

void print_table(const Settings& settings, const std::vector<Measured>& results, const Reading& reading) {
  std::map<std::pair<std::string, Index>, Cell> cells;
  for (const Measured& m : results) {
    if (m.context == reading.context) cells[{m.method, m.budget}].add(m);
  }
  const int width = label_width(settings);
  std::printf("\n%zu documents, context %zu, continuation %zu, full-cache perplexity %.3f, prefill %.0f ms\n",
              settings.documents, reading.context, settings.continuation, std::exp(reading.full_nll),
              reading.prefill_ms);
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
                100.0 * (last.score_ms + last.compress_ms) / last.count / reading.prefill_ms,
                last.bytes / last.count / 1e6, last.bytes_before / last.count / 1e6);
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
          {"contexts", s.contexts},
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
          {"modes", s.modes},
          {"cases", s.tasks.cases},
          {"policy", s.options.to_json()}};
}

/// One line for each measurement, with the same columns for perplexity and for tasks.
void write_csv(const std::filesystem::path& file, const std::vector<Measured>& results,
               const std::vector<evaluation::Answers>& answers) {
  std::ofstream out(file);
  out << "measure,method,budget,context,document,mode,depth,correct,cases,perplexity,ratio,kl,rows,rows_merged,"
         "bytes,bytes_before,score_ms,compress_ms\n";
  for (const Measured& m : results) {
    const kvfold::CompressionReport& r = m.outcome.report;
    out << "perplexity," << m.method << ',' << m.budget << ',' << m.context << ',' << m.document << ",,,,,"
        << std::exp(m.nll) << ',' << std::exp(m.nll - m.full_nll) << ',' << m.kl << ',' << r.rows_kept << ','
        << r.rows_merged << ',' << r.bytes_after << ',' << r.bytes_before << ',' << m.outcome.score_ms << ','
        << m.outcome.compress_ms << '\n';
  }
  for (const evaluation::Answers& a : answers) {
    out << a.task << ',' << a.method << ',' << a.budget << ',' << a.length << ",," << a.mode << ',' << a.depth << ','
        << a.correct << ',' << a.cases << ",,,,,,,,,\n";
  }
  if (!out.flush()) throw std::runtime_error(file.string() + ": cannot be written");
}

/// What is measured, in the order in which it is.
class Evaluation {
 public:
  explicit Evaluation(const Settings& settings) : settings_(settings), pool_(settings.threads) {}

  int run() {
    if (!settings_.write_cases.empty()) return write_cases();
    prepare();
    std::fprintf(stderr, "loading %s\n", settings_.model.filename().c_str());
    decoder::Decoder model(settings_.model, pool_);
    for (const std::size_t context : settings_.contexts) {
      if (!documents_.empty()) measure(model, context);
    }
    for (const Reading& reading : readings_) print_table(settings_, results_, reading);
    if (!cases_.empty()) {
      answers_ =
          evaluation::run_tasks(cases_, settings_.modes, model, pool_, methods_, settings_.budgets, settings_.chunk);
      evaluation::print_answers(answers_, label_width(settings_));
    }
    if (!settings_.json.empty()) write_json();
    if (!settings_.csv.empty()) write_csv(settings_.csv, results_, answers_);
    return 0;
  }

 private:
  /// Everything that can be refused is refused before the first second of work.
  void prepare() {
    for (const std::string& text : settings_.methods) {
      methods_.push_back(evaluation::make_method(text, settings_.options, pool_));
      options_.push_back(methods_.back().options);
    }
    if (settings_.model.empty()) throw std::runtime_error("--model is needed");
    const auto config = decoder::Config::load(settings_.model / "config.json");
    for (const auto& file : settings_.texts) texts_.push_back(evaluation::load_text(file, config));
    const std::size_t longest = *std::max_element(settings_.contexts.begin(), settings_.contexts.end());
    const std::size_t length = longest + settings_.continuation + 1;
    if (settings_.documents > 0 && length > static_cast<std::size_t>(config.max_positions)) {
      throw std::runtime_error("context + continuation is longer than the model can read");
    }
    if (settings_.documents > 0 && texts_.empty()) throw std::runtime_error("--text is needed");
    documents_ = evaluation::choose_documents(texts_, settings_.documents, length, settings_.seed);
    if (!settings_.read_cases.empty()) cases_ = evaluation::read_cases(settings_.read_cases, config);
    if (settings_.tasks.names.empty()) return;
    if (config.tokenizer != "bytes") {
      throw std::runtime_error("--tasks needs a model that reads bytes; for others see --write-cases");
    }
    if (texts_.empty()) throw std::runtime_error("--text is needed");
    for (const auto& made : evaluation::make_cases(settings_.tasks, texts_, settings_.seed))
      cases_.push_back(evaluation::byte_case(made));
  }

  int write_cases() {
    decoder::Config bytes;
    bytes.vocab_size = 256;
    bytes.tokenizer = "bytes";
    for (const auto& file : settings_.texts) texts_.push_back(evaluation::load_text(file, bytes));
    if (texts_.empty() || settings_.tasks.names.empty())
      throw std::runtime_error("--write-cases needs --text and --tasks");
    const auto cases = evaluation::make_cases(settings_.tasks, texts_, settings_.seed);
    evaluation::write_cases(settings_.write_cases, cases);
    std::printf("%zu cases in %s\n", cases.size(), settings_.write_cases.c_str());
    return 0;
  }

  void measure(decoder::Decoder& model, std::size_t context) {
    Reading reading{context};
    const auto count = static_cast<double>(documents_.size());
    for (std::size_t d = 0; d < documents_.size(); ++d) {
      std::fprintf(stderr, "document %zu of %zu, %s, context %zu: reading\n", d + 1, documents_.size(),
                   documents_[d].name.c_str(), context);
      DocumentRun run(model, pool_, settings_, context, options_, documents_[d]);
      reading.full_nll += run.full_nll() / count;
      reading.prefill_ms += run.prefill_ms() / count;
      per_document_.push_back({{"document", run.name()},
                               {"context", context},
                               {"full_perplexity", std::exp(run.full_nll())},
                               {"prefill_ms", run.prefill_ms()},
                               {"observe_ms", run.observe_ms()}});
      for (const evaluation::Method& method : methods_) compress(run, method, context, d == 0);
    }
    readings_.push_back(reading);
  }

  void compress(DocumentRun& run, const evaluation::Method& method, std::size_t context, bool first) {
    const bool full = method.label == "full";
    for (const Index budget : full ? std::vector{static_cast<Index>(context)} : settings_.budgets) {
      results_.push_back(run.measure(method, budget));
      Measured& m = results_.back();
      std::fprintf(stderr, "  %-*s %5lld rows  perplexity %8.3f  ratio %.4f  KL %.4f\n", label_width(settings_),
                   method.label.c_str(), static_cast<long long>(m.budget), std::exp(m.nll),
                   std::exp(m.nll - m.full_nll), m.kl);
      if (first && method.label == settings_.trace) {
        traces_.push_back({{"document", run.name()},
                           {"context", context},
                           {"method", method.label},
                           {"budget", budget},
                           {"fates", m.outcome.fates}});
      }
      m.outcome.fates.clear();
    }
  }

  void write_json() const {
    auto list = nlohmann::json::array();
    for (const Measured& m : results_) list.push_back(m.to_json());
    auto tasks = nlohmann::json::array();
    for (const evaluation::Answers& a : answers_) tasks.push_back(a.to_json());
    std::ofstream out(settings_.json);
    out << nlohmann::json{{"settings", settings_json(settings_)},
                          {"documents", per_document_},
                          {"results", list},
                          {"tasks", tasks},
                          {"traces", traces_}}
               .dump(1)
        << "\n";
    if (!out.flush()) throw std::runtime_error(settings_.json.string() + ": cannot be written");
  }

  const Settings& settings_;
  kvfold::ThreadPool pool_;
  std::vector<evaluation::Method> methods_;
  std::vector<evaluation::Options> options_;
  std::vector<evaluation::Text> texts_;
  std::vector<evaluation::Document> documents_;
  std::vector<evaluation::TokenCase> cases_;
  std::vector<Reading> readings_;
  std::vector<Measured> results_;
  std::vector<evaluation::Answers> answers_;
  nlohmann::json per_document_ = nlohmann::json::array(), traces_ = nlohmann::json::array();
};

}  // namespace

int main(int argc, char** argv) {
  Settings settings;
  CLI::App app("Perplexity, divergence, memory and time of KV-cache compression methods on a real model.");
  app.add_option("--model", settings.model, "directory with config.json and model.safetensors")
      ->check(CLI::ExistingDirectory);
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
  CLI11_PARSE(app, argc, argv);
  try {
    return Evaluation(settings).run();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "kvfold-evaluate: %s\n", error.what());
    return 1;
  }
}
