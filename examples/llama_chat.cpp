/// \file
/// Asks a model about a long document from a compressed cache, on llama.cpp.
///
/// The document is the beginning of the user's message. It is read once, its cache is compressed once, and each question is
/// asked from there. With --aware, each question is read before the compression, which then knows what to keep.

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <map>
#include <string>
#include <unistd.h>

#include <CLI/CLI.hpp>

#include "llama/chat_prompt.hpp"
#include "llama/chat_session.hpp"
#include "llama/utf8.hpp"

namespace {

using kvfold::Index;
using llama_chat::ChatSession, llama_chat::Compress, llama_chat::Saved, llama_chat::seconds_since, llama_chat::Tokens;
using Clock = std::chrono::steady_clock;
using Markup = ChatSession::Markup;

constexpr std::uint32_t kUsualContext = 8192;
constexpr Index kWindow = 32;                // queries that methods score by
constexpr std::size_t kTypedQuestion = 256;  // tokens that stay free for one

double megabytes(auto bytes) { return static_cast<double>(bytes) / 1e6; }

struct Settings {
  std::filesystem::path model, document;
  std::size_t offset = 0;
  Index budget = 512;
  std::string method = "ems-evict";
  std::vector<std::string> questions;
  std::string instruction = "Answer the question from the text above in one short sentence. Question:";
  bool aware = false, conversation = false, compare = false;
  std::string queries = "window";
  int max_answer = 128;
  std::uint32_t context = 0;
  std::string key_type = "f16", value_type = "f16", flash_attention = "auto";
  int threads = static_cast<int>(std::max(1U, std::thread::hardware_concurrency()));
};

const std::map<std::string, ggml_type> kCacheTypes = {{"f32", GGML_TYPE_F32},
                                                      {"f16", GGML_TYPE_F16},
                                                      {"bf16", GGML_TYPE_BF16},
                                                      {"q8_0", GGML_TYPE_Q8_0},
                                                      {"q4_0", GGML_TYPE_Q4_0}};
const std::map<std::string, llama_flash_attn_type> kFlashAttention = {{"auto", LLAMA_FLASH_ATTN_TYPE_AUTO},
                                                                      {"on", LLAMA_FLASH_ATTN_TYPE_ENABLED},
                                                                      {"off", LLAMA_FLASH_ATTN_TYPE_DISABLED}};

/// llama.cpp has no place for log masses, so merged rows have none. Empty for the full cache.
Compress method_of(const std::string& name, Index rows) {
  using namespace kvfold;
  if (name == "ems") {
    return llama_chat::compress_by(
        Ems({.score = {.window = kWindow}, .budget = {.rows = rows}, .reduce = {.mass_mode = MassMode::none}}));
  }
  if (name == "ems-evict")
    return llama_chat::compress_by(EmsEvict({.score = {.window = kWindow}, .budget = {.rows = rows}}));
  if (name == "snapkv") {
    return llama_chat::compress_by(
        SnapKv({.score = SnapKvScorer::Options{.window = kWindow}.for_budget(rows), .budget = {.rows = rows}}));
  }
  if (name == "full") return {};
  return llama_chat::compress_by(StreamingLlm({.budget = {.rows = rows}}));
}

/// At most so many bytes of a file, up to the end of a character. O(most), whatever the file's size.
std::string read_text(const std::filesystem::path& file, std::size_t offset, std::size_t most) {
  std::ifstream in(file, std::ios::binary);
  if (!in.seekg(static_cast<std::streamoff>(offset))) throw std::runtime_error(file.string() + ": cannot be read");
  std::string text(most, '\0');
  in.read(text.data(), static_cast<std::streamsize>(most));
  text.resize(static_cast<std::size_t>(in.gcount()));
  text.resize(text.size() - llama_chat::unfinished_utf8(text));
  return text;
}

llama_model_ptr load_model(const std::filesystem::path& file, const llama_chat::EngineLog& log) {
  std::string magic(4, '\0');
  std::ifstream(file, std::ios::binary).read(magic.data(), 4);
  if (magic != "GGUF") throw std::runtime_error(file.string() + ": is not a GGUF file");
  llama_model_ptr model(llama_model_load_from_file(file.c_str(), llama_model_default_params()));
  if (model == nullptr) throw log.error(file.string() + ": llama.cpp cannot load it");
  return model;
}

struct ContextFull : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Chat {
 public:
  explicit Chat(const Settings& settings)
      : settings_(settings),
        method_(method_of(settings.method, settings.budget)),
        model_(load_model(settings.model, log_)),
        wording_(llama_chat::chat_template_of(model_.get())),
        session_(log_, model_.get(), session_options()) {}

  void run() {
    read_document();
    if (settings_.aware || settings_.compare) full_ = session_.save();
    if (!method_) {
      print_full_cache();
    } else if (!settings_.aware) {
      compress(read_seconds_);
    }
    if (settings_.compare && !settings_.aware) compressed_ = session_.save();
    for (const std::string& question : settings_.questions) {
      std::printf("\n> %s\n", question.c_str());
      ask(question);
    }
    if (settings_.questions.empty()) ask_what_is_typed();
  }

 private:
  [[nodiscard]] llama_chat::SessionOptions session_options() const {
    const auto trained = static_cast<std::uint32_t>(trained_length());
    if (settings_.context > trained) {
      throw std::runtime_error("--context: the model reads " + std::to_string(trained) + " tokens at most");
    }
    llama_chat::SessionOptions options;
    options.context = settings_.context > 0 ? settings_.context : std::min(kUsualContext, trained);
    if (method_) options.queries = settings_.queries == "all" ? static_cast<Index>(options.context) : kWindow;
    options.key_type = kCacheTypes.at(settings_.key_type);
    options.value_type = kCacheTypes.at(settings_.value_type);
    options.flash_attention = kFlashAttention.at(settings_.flash_attention);
    options.threads = settings_.threads;
    return options;
  }

  /// Plain text, then what the template wants after it.
  [[nodiscard]] Tokens with_markup(const std::string& text, const std::string& markup) const {
    Tokens tokens = session_.tokens_of(text, Markup::none);
    const Tokens end = session_.tokens_of(markup, Markup::special_tokens);
    tokens.insert(tokens.end(), end.begin(), end.end());
    return tokens;
  }
  [[nodiscard]] Tokens first_question(const std::string& question) const {
    return with_markup(" " + question, wording_.before_answer);
  }
  [[nodiscard]] Tokens next_question(const std::string& question) const {
    Tokens tokens = session_.tokens_of(wording_.next_message, Markup::special_tokens);
    const Tokens rest = with_markup(question, wording_.before_answer);
    tokens.insert(tokens.end(), rest.begin(), rest.end());
    return tokens;
  }

  /// Tokens that stay free for questions and answers.
  [[nodiscard]] std::size_t reserve() const {
    std::size_t question = settings_.questions.empty() ? kTypedQuestion : 0;
    for (const std::string& known : settings_.questions) question = std::max(question, first_question(known).size());
    const std::size_t turn = question + static_cast<std::size_t>(settings_.max_answer);
    return settings_.conversation ? std::max(turn, session_.all_cells() / 4) : turn;
  }

  /// As much of the document as fits, and what asks for a question.
  void read_document() {
    Tokens tokens = session_.tokens_of(wording_.before_message, Markup::special_tokens, true);
    const Tokens end = session_.tokens_of("\n\n" + settings_.instruction, Markup::none);
    const std::size_t around = tokens.size() + end.size() + reserve();
    if (around >= session_.all_cells()) {
      throw std::runtime_error("--context: no room for a document beside " + std::to_string(around) +
                               " tokens of question and answer");
    }
    const std::size_t room = session_.all_cells() - around;
    constexpr std::size_t kBytesPerToken = 64;  // More than any text has. What lies beyond cannot fit.
    std::string text = read_text(settings_.document, settings_.offset, room * kBytesPerToken);
    const std::size_t begin = settings_.offset + (settings_.offset > 0 ? llama_chat::continued_utf8(text) : 0);
    text.erase(0, begin - settings_.offset);
    if (text.find_first_not_of(" \t\r\n") == std::string::npos) {
      throw std::runtime_error(settings_.document.string() + ": no text there");
    }
    Tokens document = session_.tokens_of(text, Markup::none);
    std::size_t bytes = text.size();
    if (document.size() > room) {
      document.resize(room);
      bytes = 0;
      for (const llama_token token : document) bytes += session_.text_of(token).size();
    }

    tokens.insert(tokens.end(), document.begin(), document.end());
    tokens.insert(tokens.end(), end.begin(), end.end());
    read_seconds_ = seconds_to_read(tokens);
    start_ = session_.next_position();
    const auto size = static_cast<std::size_t>(std::filesystem::file_size(settings_.document));
    std::printf("Read %zu tokens in %.1f s, %s: bytes %zu to %zu of %zu, %s\n", tokens.size(), read_seconds_,
                settings_.document.filename().c_str(), begin, begin + bytes, size,
                begin + bytes < size ? "as much as fits" : "to its end");
  }

  double seconds_to_read(std::span<const llama_token> tokens) {
    const bool shown = isatty(STDERR_FILENO) != 0 && tokens.size() > 1000;
    const auto start = Clock::now();
    session_.read(tokens, [&](std::size_t done) {
      if (shown) std::fprintf(stderr, "\rreading: %zu of %zu tokens ", done, tokens.size());
    });
    const double seconds = seconds_since(start);
    if (shown) std::fputs("\r\033[K", stderr);
    return seconds;
  }

  void print_full_cache() {
    std::printf("Its cache has %zu rows per head (%.1f MB saved) and decodes %.1f tokens/s.\n", session_.cells(),
                megabytes(session_.state_bytes()), session_.decoding_speed());
  }

  void compress(double reading_seconds) {
    session_.stop_listening();
    const double speed = session_.decoding_speed();
    const auto start = Clock::now();
    const kvfold::LlamaReport report = session_.compress(method_);
    const double seconds = seconds_since(start);
    const kvfold::CompressionReport& layers = report.layers;
    std::printf("Compressed by %s in %.2f s, %.1f %% of the time of reading:\n", settings_.method.c_str(), seconds,
                100.0 * seconds / reading_seconds);
    std::printf("  rows per head %9lld -> %lld\n", static_cast<long long>(report.rows_before),
                static_cast<long long>(report.rows_after));
    std::printf("  K and V       %9.1f -> %.1f MB\n", megabytes(layers.bytes_before), megabytes(layers.bytes_after));
    std::printf("  saved state   %9.1f -> %.1f MB\n", megabytes(report.state_bytes_before),
                megabytes(report.state_bytes_after));
    std::printf("  decoding      %9.1f -> %.1f tokens/s\n", speed, session_.decoding_speed());
  }

  void ask(const std::string& question) {
    const bool follows = settings_.conversation && session_.next_position() > start_;
    const Tokens tokens = follows ? next_question(question) : first_question(question);
    const std::size_t turn = tokens.size() + static_cast<std::size_t>(settings_.max_answer);
    if (turn + session_.cells() > session_.all_cells() ||
        turn + static_cast<std::size_t>(session_.next_position()) > trained_length()) {
      throw ContextFull("the context is full: no room for another " + std::to_string(turn) +
                        " tokens of question and answer");
    }
    if (settings_.aware) {
      ask_aware(tokens);
      return;
    }
    if (settings_.compare) {
      session_.restore(*full_);
      answer(tokens, "full cache: ");
      session_.restore(*compressed_);
    }
    answer(tokens, settings_.compare ? "compressed: " : "");
    if (!settings_.conversation) session_.take_back(start_);
  }

  /// All of the question but its last token is read before the compression, which takes its queries for evidence.
  void ask_aware(std::span<const llama_token> question) {
    const auto last = question.last(1);
    session_.restore(*full_);
    session_.listen();
    const double seconds = seconds_to_read(question.first(question.size() - 1));
    session_.stop_listening();
    if (settings_.compare) {
      const llama_pos here = session_.next_position();
      answer(last, "full cache: ");
      session_.take_back(here);
    }
    compress(read_seconds_ + seconds);
    answer(last, settings_.compare ? "compressed: " : "");
  }

  void answer(std::span<const llama_token> tokens, const char* label) {
    session_.read(tokens);
    std::fputs(label, stdout);
    std::string bytes;  // A character may come in several tokens.
    bool begun = false;
    const bool ended = session_.answer(settings_.max_answer, [&](const std::string& piece) {
      bytes += piece;
      if (!begun) bytes.erase(0, bytes.find_first_not_of(" \n"));
      begun = begun || !bytes.empty();
      const std::size_t line = wording_.line_answers ? bytes.find('\n') : std::string::npos;
      const std::size_t whole = std::min(line, bytes.size() - llama_chat::unfinished_utf8(bytes));
      std::fwrite(bytes.data(), 1, whole, stdout);
      std::fflush(stdout);
      bytes.erase(0, whole);
      return line == std::string::npos;
    });
    std::puts(ended ? "" : " [...]");
  }

  void ask_what_is_typed() {
    const bool terminal = isatty(STDIN_FILENO) != 0;
    std::puts("\nAsk; an empty line ends.");
    for (std::string line;;) {
      std::fputs("\n> ", stdout);
      std::fflush(stdout);
      if (!std::getline(std::cin, line) || line.find_first_not_of(" \t\r") == std::string::npos) break;
      if (!terminal) std::puts(line.c_str());
      try {
        ask(line);
      } catch (const ContextFull& full) {
        if (settings_.conversation) throw;
        std::puts(full.what());  // A shorter question may fit.
      }
    }
    std::puts("");
  }

  [[nodiscard]] std::size_t trained_length() const {
    return static_cast<std::size_t>(llama_model_n_ctx_train(model_.get()));
  }

  const Settings& settings_;
  Compress method_;  // Empty for the full cache.
  llama_chat::EngineLog log_;
  llama_model_ptr model_;
  llama_chat::ChatTemplate wording_;
  ChatSession session_;
  llama_pos start_ = 0;              // of a question
  double read_seconds_ = 0.0;        // of the document
  std::optional<Saved> full_;        // the cache of the document, where it is needed again
  std::optional<Saved> compressed_;  // --compare alternates between the two
};

void add_options(CLI::App& app, Settings& s) {
  const auto one_of = [](const auto& words) {
    std::vector<std::string> names;
    for (const auto& word : words) names.push_back(word.first);
    return CLI::IsMember(names).description("");
  };
  app.add_option("--model", s.model, "GGUF file")->required()->check(CLI::ExistingFile);
  app.add_option("--document", s.document, "text file, UTF-8")->required()->check(CLI::ExistingFile);
  app.add_option("--offset", s.offset, "byte of the document to begin at");
  app.add_option("--question", s.questions, "may be given several times; without, questions are typed")
      ->allow_extra_args(false);
  app.add_option("--budget", s.budget, "rows per head that the compressed cache keeps")
      ->check(CLI::Range(Index{1}, kvfold::kMaxRows).description(""))
      ->capture_default_str();
  app.add_option("--method", s.method, "ems, ems-evict, snapkv, streaming-llm, or full: no compression")
      ->check(CLI::IsMember({"ems", "ems-evict", "snapkv", "streaming-llm", "full"}).description(""))
      ->capture_default_str();
  auto* aware = app.add_flag("--aware", s.aware,
                             "compress after each question instead of once before all: the cache keeps what that "
                             "question needs (takes memory for the saved state of the full cache)");
  app.add_flag("--conversation", s.conversation,
               "go on after an answer; without, each question is asked of the document alone")
      ->excludes(aware);
  app.add_flag("--compare", s.compare, "answer each question from the full cache, too")->excludes("--conversation");
  app.add_option("--queries", s.queries,
                 "that decide what stays: those of the window (the last 32), or all (takes layers x context x query "
                 "heads x head size x 4 bytes)")
      ->check(CLI::IsMember({"window", "all"}).description(""))
      ->capture_default_str()
      ->excludes(aware);
  app.add_option("--instruction", s.instruction, "stands between the document and the question")->capture_default_str();
  app.add_option("--max-answer", s.max_answer, "tokens of an answer")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--context", s.context,
                 "tokens of document, question and answer (default: 8192, or what the model was trained for)")
      ->check(CLI::PositiveNumber);
  app.add_option("--cache-type-k", s.key_type, "f32, f16, bf16, q8_0 or q4_0")
      ->check(one_of(kCacheTypes))
      ->capture_default_str();
  app.add_option("--cache-type-v", s.value_type, "the same; quantised types need flash attention")
      ->check(one_of(kCacheTypes))
      ->capture_default_str();
  app.add_option("--flash-attention", s.flash_attention, "on, off or auto")
      ->check(one_of(kFlashAttention))
      ->capture_default_str();
  app.add_option("--threads", s.threads, "threads")->check(CLI::Range(1, 512).description(""))->capture_default_str();
}

}  // namespace

int main(int argc, char** argv) {
  Settings settings;
  CLI::App app("Asks a model on llama.cpp about a long document, from a compressed KV cache.");
  try {
    add_options(app, settings);
    app.parse(argc, argv);
    if (settings.method == "full" && (settings.aware || settings.compare)) {
      throw std::runtime_error("--method full compresses nothing: there is no --aware and no --compare");
    }
    Chat(settings).run();
    return 0;
  } catch (const CLI::CallForHelp& help) {
    return app.exit(help);
  } catch (const std::exception& error) {
    std::fflush(stdout);
    std::fprintf(stderr, "kvfold-llama-chat: %s\n", error.what());
    return 1;
  }
}
