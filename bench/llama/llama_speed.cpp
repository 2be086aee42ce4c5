/// \file
/// What compression costs and saves a llama.cpp context: time of prefill, of compressing, and of decoding before and after.
///
/// For each context length, one context keeps its full cache and another is compressed to each budget in turn; both decode the
/// same tokens in alternating rounds, so that what else the machine does falls on both.

#include <kvfold/adaptors/llama_cpp.hpp>
#include <kvfold/exec/thread_pool.hpp>

#include <chrono>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <llama.h>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "support/quantile.hpp"

namespace {

using kvfold::Index;
using kvfold::bench::median;

struct Settings {
  std::string model, text;
  std::vector<Index> contexts{2048, 4096, 8064}, budgets{256, 512, 1024};
  int rounds = 5, tokens = 16, threads = 2;
  std::string json;
};

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

struct FreeModel {
  void operator()(llama_model* model) const { llama_model_free(model); }
};
struct FreeContext {
  void operator()(llama_context* context) const { llama_free(context); }
};
using Model = std::unique_ptr<llama_model, FreeModel>;
using Context = std::unique_ptr<llama_context, FreeContext>;

llama_context_params parameters(const Settings& settings, Index tokens) {
  llama_context_params params = llama_context_default_params();
  params.n_ctx = static_cast<std::uint32_t>(tokens);
  params.n_threads = params.n_threads_batch = settings.threads;
  return params;
}

Context make_context(llama_model* model, const llama_context_params& params) {
  Context context(llama_init_from_model(model, params));
  if (context == nullptr) throw std::runtime_error("llama.cpp could not make a context");
  return context;
}

std::vector<llama_token> read_tokens(const llama_model* model, const std::string& file, Index count) {
  std::ifstream in(file);
  const std::string text((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  std::vector<llama_token> tokens(text.size() + 1);
  const int found = llama_tokenize(llama_model_get_vocab(model), text.data(), static_cast<int>(text.size()),
                                   tokens.data(), static_cast<int>(tokens.size()), false, false);
  if (found < count) throw std::runtime_error(file + ": has fewer tokens than the longest context and the rounds need");
  tokens.resize(static_cast<std::size_t>(count));
  return tokens;
}

/// Decodes tokens; \returns the seconds that takes, in pieces of `piece`.
double decode(llama_context* context, std::span<llama_token> tokens, std::size_t piece) {
  const double start = seconds();
  for (std::size_t i = 0; i < tokens.size(); i += piece) {
    const std::size_t n = std::min(piece, tokens.size() - i);
    if (llama_decode(context, llama_batch_get_one(&tokens[i], static_cast<std::int32_t>(n))) != 0) {
      throw std::runtime_error("llama.cpp could not decode");
    }
  }
  llama_synchronize(context);
  return seconds() - start;
}

class Speed {
 public:
  explicit Speed(const Settings& settings) : settings_(settings), pool_(settings.threads) {
    llama_log_set([](ggml_log_level, const char*, void*) {}, nullptr);
    llama_backend_init();
    model_.reset(llama_model_load_from_file(settings.model.c_str(), llama_model_default_params()));
    if (model_ == nullptr) throw std::runtime_error(settings.model + ": llama.cpp could not load it");
    const Index most = *std::max_element(settings.contexts.begin(), settings.contexts.end());
    tokens_ = read_tokens(model_.get(), settings.text, most + Index{settings.rounds} * settings.tokens);
  }

  nlohmann::json run() {
    auto rows = nlohmann::json::array();
    std::printf("%8s %6s %10s %9s %12s %11s %10s %10s %8s\n", "context", "rows", "prefill s", "with tap", "compress ms",
                "of prefill", "full tok/s", "tok/s", "ratio");
    for (const Index context : settings_.contexts) measure(context, rows);
    return rows;
  }

 private:
  void measure(Index n, nlohmann::json& rows) {
    const Index room = n + Index{settings_.rounds} * settings_.tokens;
    const auto prompt = std::span(tokens_).first(static_cast<std::size_t>(n));
    const Context full = make_context(model_.get(), parameters(settings_, room));
    auto tap = kvfold::LlamaQueryTap::create(model_.get(), {.queries = 32});
    if (!tap.ok()) throw std::runtime_error(std::string(tap.status().detail()));
    llama_context_params tapped = parameters(settings_, room);
    tap->attach(tapped);
    const Context compressed = make_context(model_.get(), tapped);
    decode(full.get(), prompt.first(64), 64);  // what is made at first use is made now
    llama_memory_clear(llama_get_memory(full.get()), false);
    const double prefill = decode(full.get(), prompt, 2048);

    for (const Index budget : settings_.budgets) {
      llama_memory_clear(llama_get_memory(compressed.get()), false);
      tap->reset();
      tap->resume();
      const double with_tap = decode(compressed.get(), prompt, 2048);
      const kvfold::Ems method({.budget = {.rows = budget}, .reduce = {.mass_mode = kvfold::MassMode::none}});
      const double start = seconds();
      const auto report = kvfold::compress(compressed.get(), 0, method, *tap, buffers_, pool_);
      const double compress = seconds() - start;
      if (!report.ok()) throw std::runtime_error(std::string(report.status().detail()));
      tap->pause();
      std::vector<double> full_speed, speed, ratio;
      for (int round = 0; round < settings_.rounds; ++round) {
        const auto next = std::span(tokens_).subspan(static_cast<std::size_t>(n + round * settings_.tokens),
                                                     static_cast<std::size_t>(settings_.tokens));
        const double a = decode(full.get(), next, 1), b = decode(compressed.get(), next, 1);
        full_speed.push_back(settings_.tokens / a);
        speed.push_back(settings_.tokens / b);
        ratio.push_back(a / b);
      }
      llama_memory_seq_rm(llama_get_memory(full.get()), 0, static_cast<llama_pos>(n), -1);
      std::printf("%8lld %6lld %10.2f %9.2f %12.1f %9.2f %% %10.1f %10.1f %8.2f\n", static_cast<long long>(n),
                  static_cast<long long>(report->rows_after), prefill, with_tap, 1e3 * compress,
                  100 * compress / prefill, median(full_speed), median(speed), median(ratio));
      rows.push_back({{"context", n},
                      {"budget", budget},
                      {"rows", report->rows_after},
                      {"prefill_s", prefill},
                      {"prefill_with_tap_s", with_tap},
                      {"compress_s", compress},
                      {"state_bytes_before", report->state_bytes_before},
                      {"state_bytes_after", report->state_bytes_after},
                      {"full_tokens_per_s", full_speed},
                      {"tokens_per_s", speed},
                      {"ratio", ratio}});
    }
  }

  const Settings& settings_;
  kvfold::ThreadPool pool_;
  Model model_;
  std::vector<llama_token> tokens_;
  kvfold::LlamaBuffers buffers_;
};

}  // namespace

int main(int argc, char** argv) {
  Settings settings;
  CLI::App app(
      "Decoding speed of a llama.cpp context with its full and with a compressed cache, and what compressing costs.");
  app.add_option("--model", settings.model, "GGUF file")->required()->check(CLI::ExistingFile);
  app.add_option("--text", settings.text, "what is read")->required()->check(CLI::ExistingFile);
  app.add_option("--contexts", settings.contexts, "tokens, comma-separated")
      ->delimiter(',')
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--budgets", settings.budgets, "rows per head, comma-separated")
      ->delimiter(',')
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--rounds", settings.rounds, "rounds that alternate")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--tokens", settings.tokens, "tokens decoded in a round")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--threads", settings.threads, "threads")->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--json", settings.json, "where every figure goes");
  CLI11_PARSE(app, argc, argv);
  try {
    const nlohmann::json rows = Speed(settings).run();
    if (settings.json.empty()) return 0;
    std::ofstream out(settings.json);
    out << nlohmann::json{{"llama_speed", rows},
                          {"model", std::filesystem::path(settings.model).filename().string()},
                          {"threads", settings.threads},
                          {"rounds", settings.rounds},
                          {"tokens", settings.tokens}}
               .dump(1)
        << "\n";
    if (!out.flush()) throw std::runtime_error(settings.json + ": cannot be written");
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "kvfold-llama-speed: %s\n", error.what());
    return 1;
  }
}
