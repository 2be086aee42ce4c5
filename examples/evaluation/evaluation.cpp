#include "evaluation/evaluation.hpp"

#include <cmath>
#include <cstdio>
#include <fstream>
#include <stdexcept>

#include "evaluation/report.hpp"

namespace evaluation {

using kvfold::Index;

namespace {

/// What is measured, in the order in which it is.
class Evaluation {
 public:
  explicit Evaluation(const Settings& settings) : settings_(settings), pool_(settings.threads) {}

  void run(const MakeEngine& make_engine) {
    if (!settings_.write_cases.empty()) return write_cases();
    prepare(make_engine);
    std::fprintf(stderr, "loading %s\n", settings_.model.filename().c_str());
    engine_->load(longest(), methods_);
    for (const std::size_t context : settings_.contexts) {
      if (!documents_.empty()) measure(context);
    }
    for (const Reading& reading : readings_) print_table(settings_, results_, reading);
    if (!cases_.empty()) {
      answers_ = run_tasks(cases_, settings_.modes, *engine_, methods_, settings_.budgets);
      print_answers(answers_, settings_.label_width());
    }
    if (!settings_.json.empty()) write_json();
    if (!settings_.csv.empty()) write_csv(settings_.csv, results_, answers_);
  }

 private:
  /// Everything that can be refused is refused before the first second of work.
  void prepare(const MakeEngine& make_engine) {
    for (const std::string& text : settings_.methods) methods_.push_back(make_method(text, settings_.options));
    if (settings_.model.empty()) throw std::runtime_error("--model is needed");
    engine_ = make_engine(pool_);
    const Vocabulary vocabulary = engine_->vocabulary();
    for (const auto& file : settings_.texts) texts_.push_back(load_text(file, vocabulary));
    const std::size_t length = longest_context() + settings_.continuation + 1;
    if (settings_.documents > 0 && length > engine_->max_positions()) {
      throw std::runtime_error("context + continuation is longer than the model can read");
    }
    if (settings_.documents > 0 && texts_.empty()) throw std::runtime_error("--text is needed");
    documents_ = choose_documents(texts_, settings_.documents, length, settings_.seed);
    if (!settings_.read_cases.empty()) cases_ = read_cases(settings_.read_cases, vocabulary);
    if (settings_.tasks.names.empty()) return;
    if (!vocabulary.is_bytes) {
      throw std::runtime_error("--tasks needs a model that reads bytes; for others see --write-cases");
    }
    if (texts_.empty()) throw std::runtime_error("--text is needed");
    for (const auto& made : make_cases(settings_.tasks, texts_, settings_.seed)) cases_.push_back(byte_case(made));
  }

  void write_cases() {
    const Vocabulary bytes{.size = 256, .is_bytes = true};
    for (const auto& file : settings_.texts) texts_.push_back(load_text(file, bytes));
    if (texts_.empty() || settings_.tasks.names.empty())
      throw std::runtime_error("--write-cases needs --text and --tasks");
    const auto cases = make_cases(settings_.tasks, texts_, settings_.seed);
    evaluation::write_cases(settings_.write_cases, cases);
    std::printf("%zu cases in %s\n", cases.size(), settings_.write_cases.c_str());
  }

  [[nodiscard]] std::size_t longest_context() const {
    return *std::max_element(settings_.contexts.begin(), settings_.contexts.end());
  }

  [[nodiscard]] Longest longest() const {
    Longest longest;
    if (!documents_.empty()) longest = {longest_context(), longest_context() + settings_.continuation};
    for (const TokenCase& c : cases_) {
      const std::size_t prompt = c.context.size() + c.question.size();
      longest = {std::max(longest.prompt, prompt), std::max(longest.sequence, prompt + c.answer.size())};
    }
    return longest;
  }

  void measure(std::size_t context) {
    Reading reading{context};
    const auto count = static_cast<double>(documents_.size());
    for (std::size_t d = 0; d < documents_.size(); ++d) {
      std::fprintf(stderr, "document %zu of %zu, %s, context %zu: reading\n", d + 1, documents_.size(),
                   documents_[d].name.c_str(), context);
      DocumentRun run(*engine_, pool_, documents_[d], context, settings_.continuation);
      reading.full_nll += run.full_nll() / count;
      reading.prefill_ms += run.times().prefill_ms / count;
      per_document_.push_back({{"document", run.name()},
                               {"context", context},
                               {"full_perplexity", std::exp(run.full_nll())},
                               {"prefill_ms", run.times().prefill_ms},
                               {"observe_ms", run.times().observe_ms}});
      for (const Method& method : methods_) compress(run, method, context, d == 0);
    }
    readings_.push_back(reading);
  }

  void compress(DocumentRun& run, const Method& method, std::size_t context, bool first) {
    for (const Index budget : method.is_full() ? std::vector{static_cast<Index>(context)} : settings_.budgets) {
      results_.push_back(run.measure(method, budget));
      Measured& m = results_.back();
      std::fprintf(stderr, "  %-*s %5lld rows  perplexity %8.3f  ratio %.4f  KL %.4f\n", settings_.label_width(),
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
    for (const Answers& a : answers_) tasks.push_back(a.to_json());
    auto settings = settings_.to_json();
    settings.update(engine_->settings());
    std::ofstream out(settings_.json);
    out << nlohmann::json{{"settings", settings},
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
  std::vector<Method> methods_;
  std::unique_ptr<Engine> engine_;
  std::vector<Text> texts_;
  std::vector<Document> documents_;
  std::vector<TokenCase> cases_;
  std::vector<Reading> readings_;
  std::vector<Measured> results_;
  std::vector<Answers> answers_;
  nlohmann::json per_document_ = nlohmann::json::array(), traces_ = nlohmann::json::array();
};

}  // namespace

void run(const Settings& settings, const MakeEngine& make_engine) { Evaluation(settings).run(make_engine); }

}  // namespace evaluation
