/// \file
/// One sequence of a llama.cpp context: text in, answers out, its cache compressed by kvfold. The calls of `compress` and
/// of the tap are the whole integration.
#pragma once

#include <kvfold/adaptors/llama_cpp.hpp>
#include <kvfold/exec/thread_pool.hpp>
#include <kvfold/throwing.hpp>

#include <algorithm>
#include <chrono>
#include <functional>
#include <llama-cpp.h>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

namespace llama_chat {

using kvfold::Index;
using Tokens = std::vector<llama_token>;

inline double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// The first error that llama.cpp tells: the later ones are its consequences. Other messages are dropped.
class EngineLog {
 public:
  EngineLog() { llama_log_set(&EngineLog::listen, &text_); }
  EngineLog(const EngineLog&) = delete;
  EngineLog& operator=(const EngineLog&) = delete;
  ~EngineLog() { llama_log_set(nullptr, nullptr); }

  /// An error: what failed, and why if llama.cpp said so.
  [[nodiscard]] std::runtime_error error(const std::string& what) const {
    return std::runtime_error(text_.empty() ? what : what + ": " + text_);
  }

 private:
  static void listen(ggml_log_level level, const char* text, void* data) {
    std::string& kept = *static_cast<std::string*>(data);
    if (level != GGML_LOG_LEVEL_ERROR || !kept.empty()) return;
    kept = text;
    while (!kept.empty() && kept.back() == '\n') kept.pop_back();
  }

  std::string text_;
};

struct SessionOptions {
  std::uint32_t context = 512;  ///< cells
  Index queries = 0;            ///< that the tap keeps for each layer; 0 for no tap
  ggml_type key_type = GGML_TYPE_F16;
  ggml_type value_type = GGML_TYPE_F16;
  llama_flash_attn_type flash_attention = LLAMA_FLASH_ATTN_TYPE_AUTO;
  int threads = 1;
};

/// A method with its options: how it compresses a context's sequence 0.
using Compress = std::function<kvfold::Result<kvfold::LlamaReport>(llama_context*, kvfold::LlamaQueryTap&,
                                                                   kvfold::LlamaBuffers&, kvfold::ThreadPool&)>;

template <kvfold::LlamaMethod Method>
Compress compress_by(Method method) {
  return [method](llama_context* context, kvfold::LlamaQueryTap& tap, kvfold::LlamaBuffers& buffers,
                  kvfold::ThreadPool& pool) { return kvfold::compress(context, 0, method, tap, buffers, pool); };
}

/// A saved sequence.
struct Saved {
  std::vector<std::uint8_t> state;
  std::size_t cells = 0;
};

class ChatSession {
 public:
  ChatSession(const EngineLog& log, llama_model* model, const SessionOptions& options)
      : log_(&log), vocabulary_(llama_model_get_vocab(model)), pool_(options.threads) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx = options.context;
    params.n_batch = params.n_ubatch;  // Progress is told after each batch.
    params.type_k = options.key_type;
    params.type_v = options.value_type;
    params.flash_attn_type = options.flash_attention;
    params.n_threads = params.n_threads_batch = options.threads;
    if (options.queries > 0) {
      tap_.emplace(kvfold::or_throw(kvfold::LlamaQueryTap::create(model, {.queries = options.queries})));
      tap_->attach(params);
    }
    context_.reset(llama_init_from_model(model, params));
    if (context_ == nullptr) throw log.error("llama.cpp cannot make this context");
    sampler_.reset(llama_sampler_init_greedy());
  }

  /// Whether a text may hold the model's special tokens, as templates do and documents must not.
  enum class Markup : bool { none, special_tokens };
  /// Tokens of a text, which is the conversation's beginning or not.
  [[nodiscard]] Tokens tokens_of(std::string_view text, Markup markup, bool begins = false) const {
    Tokens tokens(text.size() + 2);
    std::int32_t count = -1;
    try {
      count = llama_tokenize(vocabulary_, text.data(), static_cast<std::int32_t>(text.size()), tokens.data(),
                             static_cast<std::int32_t>(tokens.size()), begins, markup == Markup::special_tokens);
    } catch (const std::exception&) {  // As llama.cpp throws at bytes that are no characters.
    }
    if (count < 0) throw std::runtime_error("llama.cpp cannot turn the text into tokens: is it UTF-8?");
    tokens.resize(static_cast<std::size_t>(count));
    return tokens;
  }

  [[nodiscard]] std::string text_of(llama_token token) const {
    std::string piece(64, '\0');
    std::int32_t size = 0;
    while ((size = llama_token_to_piece(vocabulary_, token, piece.data(), static_cast<std::int32_t>(piece.size()), 0,
                                        false)) < 0) {
      piece.resize(static_cast<std::size_t>(-size));
    }
    piece.resize(static_cast<std::size_t>(size));
    return piece;
  }

  /// Decodes tokens after those that the sequence has. `done` hears how many of them are.
  void read(std::span<const llama_token> tokens, const std::function<void(std::size_t)>& done = {}) {
    const std::size_t most = llama_n_batch(context_.get());
    for (std::size_t from = 0; from < tokens.size(); from += most) {
      Tokens batch(tokens.begin() + static_cast<std::ptrdiff_t>(from),
                   tokens.begin() + static_cast<std::ptrdiff_t>(std::min(from + most, tokens.size())));
      const auto size = static_cast<std::int32_t>(batch.size());
      if (llama_decode(context_.get(), llama_batch_get_one(batch.data(), size)) != 0) {
        throw log_->error("llama.cpp cannot decode");
      }
      cells_ += batch.size();
      if (done) done(from + batch.size());
    }
    llama_synchronize(context_.get());
  }

  /// Greedy continuation of what was read last, a token at a time, until the model ends it or `say` returns false.
  /// \returns whether the model ended it
  bool answer(int most, const std::function<bool(const std::string&)>& say) {
    for (int i = 0; i < most; ++i) {
      const llama_token token = llama_sampler_sample(sampler_.get(), context_.get(), -1);
      if (llama_vocab_is_eog(vocabulary_, token) || !say(text_of(token))) return true;
      read({&token, 1});
    }
    return false;
  }

  /// Tokens per second: the median time of decoding a few, which are taken back. Not while listening.
  [[nodiscard]] double decoding_speed() {
    constexpr int kTokens = 16;
    constexpr llama_token token = 0;  // Any one takes the same time.
    const llama_pos here = next_position();
    std::vector<double> times;
    for (int i = 0; i < kTokens; ++i) {
      const auto start = std::chrono::steady_clock::now();
      read({&token, 1});
      times.push_back(seconds_since(start));
    }
    take_back(here);
    std::nth_element(times.begin(), times.begin() + kTokens / 2, times.end());
    return 1.0 / times[kTokens / 2];
  }

  /// Shortens the cache. Decoding goes on at the same position as before.
  [[nodiscard]] kvfold::LlamaReport compress(const Compress& method) {
    const kvfold::LlamaReport report = kvfold::or_throw(method(context_.get(), *tap_, buffers_, pool_));
    cells_ = static_cast<std::size_t>(report.rows_after);
    return report;
  }
  /// The tap's evidence begins with what is read next. Evidence is for `compress`: not hearing answers saves time.
  void listen() {
    if (!tap_) return;
    tap_->reset();
    tap_->resume();
  }
  void stop_listening() {
    if (tap_) tap_->pause();
  }

  [[nodiscard]] llama_pos next_position() const {
    return llama_memory_seq_pos_max(llama_get_memory(context_.get()), 0) + 1;
  }
  /// Removes all tokens from a position on, which must not be before one at which the cache was compressed.
  void take_back(llama_pos position) {
    cells_ -= static_cast<std::size_t>(next_position() - position);
    if (!llama_memory_seq_rm(llama_get_memory(context_.get()), 0, position, -1)) {
      throw std::runtime_error("llama.cpp cannot take tokens back from this model's cache");
    }
  }

  [[nodiscard]] std::size_t state_bytes() const { return llama_state_seq_get_size(context_.get(), 0); }
  [[nodiscard]] Saved save() const {
    Saved saved{std::vector<std::uint8_t>(state_bytes()), cells_};
    if (llama_state_seq_get_data(context_.get(), saved.state.data(), saved.state.size(), 0) != saved.state.size()) {
      throw log_->error("llama.cpp cannot save the cache");
    }
    return saved;
  }
  void restore(const Saved& saved) {
    if (llama_state_seq_set_data(context_.get(), saved.state.data(), saved.state.size(), 0) != saved.state.size()) {
      throw log_->error("llama.cpp cannot restore the cache");
    }
    cells_ = saved.cells;
  }

  /// Cells of the cache that hold a token, and all of them.
  [[nodiscard]] std::size_t cells() const { return cells_; }
  [[nodiscard]] std::size_t all_cells() const { return llama_n_ctx(context_.get()); }

 private:
  const EngineLog* log_;
  const llama_vocab* vocabulary_;
  kvfold::ThreadPool pool_;
  kvfold::LlamaBuffers buffers_;
  std::optional<kvfold::LlamaQueryTap> tap_;  // The context holds its address: made before, freed after.
  llama_context_ptr context_;
  llama_sampler_ptr sampler_;
  std::size_t cells_ = 0;
};

}  // namespace llama_chat
