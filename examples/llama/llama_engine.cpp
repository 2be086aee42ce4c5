#include "llama/llama_engine.hpp"

#include <kvfold/throwing.hpp>

#include <algorithm>
#include <cstdio>
#include <stdexcept>
#include <utility>

#include "evaluation/watched.hpp"

namespace evaluation {

using kvfold::Index;

namespace {

constexpr std::pair<const char*, ggml_type> kCacheTypes[] = {{"f32", GGML_TYPE_F32},
                                                             {"f16", GGML_TYPE_F16},
                                                             {"bf16", GGML_TYPE_BF16},
                                                             {"q8_0", GGML_TYPE_Q8_0},
                                                             {"q4_0", GGML_TYPE_Q4_0}};

ggml_type cache_type(const std::string& name) {
  for (const auto& [known, type] : kCacheTypes) {
    if (name == known) return type;
  }
  throw std::runtime_error("unknown cache type " + name);
}

/// Warnings and errors only.
void log(ggml_log_level level, const char* text, void* /*data*/) {
  static bool shown = false;  // whether the line that a continuation belongs to was
  if (level != GGML_LOG_LEVEL_CONT) shown = level == GGML_LOG_LEVEL_WARN || level == GGML_LOG_LEVEL_ERROR;
  if (shown) std::fputs(text, stderr);
}

/// A method that ranks by the last queries, where the tap has kept more of them.
template <class Method>
class OfLastQueries {
 public:
  OfLastQueries(Method method, Index count) : method_(std::move(method)), count_(count) {}

  template <class V>
  [[nodiscard]] kvfold::Result<std::size_t> workspace_bytes(const V& view, const kvfold::QueryRows& queries,
                                                            Index workers) const noexcept {
    return method_.workspace_bytes(view, last(queries), workers);
  }
  template <class V, class X>
  [[nodiscard]] kvfold::Result<kvfold::CompressionPlan> plan(const V& view, const kvfold::QueryRows& queries,
                                                             kvfold::Workspace workspace, X& executor) const noexcept {
    return method_.plan(view, last(queries), workspace, executor);
  }

 private:
  [[nodiscard]] kvfold::QueryRows last(kvfold::QueryRows queries) const noexcept {
    const Index left_out = queries.rows() - std::min(queries.rows(), count_);
    queries.data += left_out * queries.row_stride;
    queries.positions = queries.positions.subspan(static_cast<std::size_t>(left_out));
    return queries;
  }

  Method method_;
  Index count_;
};

/// What `full` is where every method goes through the engine's state: a budget that leaves all rows.
AnyCompressor keep_everything() {
  return kvfold::StreamingLlm({.score = {}, .budget = {.rows = kvfold::kMaxRows}, .reduce = {}});
}

}  // namespace

std::vector<std::string> llama_cache_types() {
  std::vector<std::string> names;
  for (const auto& [name, type] : kCacheTypes) names.emplace_back(name);
  return names;
}

LlamaEngine::LlamaEngine(const std::filesystem::path& file, kvfold::ThreadPool& pool, std::size_t chunk,
                         LlamaOptions options)
    : pool_(pool), chunk_(chunk), options_(std::move(options)) {
  llama_log_set(log, nullptr);
  llama_backend_init();
  model_.reset(llama_model_load_from_file(file.c_str(), llama_model_default_params()));
  if (model_ == nullptr) throw std::runtime_error(file.string() + ": llama.cpp cannot load it");
  static_cast<void>(kvfold::or_throw(kvfold::llama_model_of(model_.get())));
}

Vocabulary LlamaEngine::vocabulary() const {
  return {.size = llama_vocab_n_tokens(llama_model_get_vocab(model_.get())), .is_bytes = false};
}

std::size_t LlamaEngine::max_positions() const {
  return static_cast<std::size_t>(llama_model_n_ctx_train(model_.get()));
}

nlohmann::json LlamaEngine::settings() const {
  return {{"engine", "llama.cpp"},
          {"cache_type_k", options_.cache_type_k},
          {"cache_type_v", options_.cache_type_v},
          {"flash_attention", options_.flash_attention},
          {"n_ubatch", options_.ubatch}};
}

void LlamaEngine::load(Longest longest, std::span<const Method> methods) {
  window_ = window_of(methods);
  const bool all =
      std::any_of(methods.begin(), methods.end(), [](const Method& m) { return m.asked == Asked::whole_prompt; });
  const Index queries = all ? std::max(window_, static_cast<Index>(longest.prompt)) : window_;
  tap_ = kvfold::or_throw(kvfold::LlamaQueryTap::create(model_.get(), {.queries = queries}));

  llama_context_params params = llama_context_default_params();
  params.n_ctx = static_cast<std::uint32_t>(longest.sequence);
  params.n_batch = static_cast<std::uint32_t>(chunk_);
  params.n_ubatch = static_cast<std::uint32_t>(std::min(options_.ubatch, chunk_));
  params.n_threads = params.n_threads_batch = static_cast<std::int32_t>(pool_.concurrency());
  params.flash_attn_type = options_.flash_attention ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
  params.type_k = cache_type(options_.cache_type_k);
  params.type_v = cache_type(options_.cache_type_v);
  tap_->attach(params);
  context_.reset(llama_init_from_model(model_.get(), params));
  if (context_ == nullptr) throw std::runtime_error("llama.cpp cannot run the model with this cache");
}

ReadTimes LlamaEngine::read(std::span<const decoder::Token> prompt) {
  llama_memory_clear(llama_get_memory(context_.get()), true);
  tap_->reset();
  tap_->resume();
  position_ = 0;
  const auto start = Clock::now();
  for (std::size_t first = 0; first < prompt.size(); first += chunk_) {
    decode(prompt.subspan(first, std::min(chunk_, prompt.size() - first)), Wanted::nothing);
  }
  llama_synchronize(context_.get());
  const double ms = ms_since(start);
  tap_->pause();
  prompt_length_ = position_;
  prompt_.resize(llama_state_seq_get_size(context_.get(), 0));
  if (llama_state_seq_get_data(context_.get(), prompt_.data(), prompt_.size(), 0) != prompt_.size()) {
    throw std::runtime_error("llama.cpp did not save the prompt's state");
  }
  return {.prefill_ms = ms};
}

Outcome LlamaEngine::compress(const Method& method, Index rows) {
  if (llama_state_seq_set_data(context_.get(), prompt_.data(), prompt_.size(), 0) != prompt_.size()) {
    throw std::runtime_error("llama.cpp did not take back the prompt's state");
  }
  position_ = prompt_length_;
  Outcome outcome;
  const auto run = [&](const auto& compressor) {
    const OfLastQueries watched(Watched(compressor, outcome),
                                method.asked == Asked::whole_prompt ? kvfold::kMaxRows : window_);
    return kvfold::or_throw(
        kvfold::compress(context_.get(), 0, watched, *tap_, buffers_, pool_, kvfold::TapAfter::kept));
  };
  const AnyCompressor compressor = method.is_full() ? keep_everything() : method.compressor(rows);
  const auto start = Clock::now();
  outcome.report = std::visit(run, compressor).layers;
  outcome.compress_ms = ms_since(start) - outcome.score_ms;
  return outcome;
}

decoder::Matrix LlamaEngine::forward(std::span<const decoder::Token> tokens) {
  const auto size = vocabulary().size;
  decoder::Matrix all(static_cast<Eigen::Index>(tokens.size()), size);
  for (std::size_t first = 0; first < tokens.size(); first += chunk_) {
    const auto piece = tokens.subspan(first, std::min(chunk_, tokens.size() - first));
    decode(piece, Wanted::logits);
    for (std::size_t i = 0; i < piece.size(); ++i) {
      const float* logits = llama_get_logits_ith(context_.get(), static_cast<std::int32_t>(i));
      if (logits == nullptr) throw std::runtime_error("llama.cpp has no logits");
      std::copy_n(logits, size, all.row(static_cast<Eigen::Index>(first + i)).data());
    }
  }
  return all;
}

void LlamaEngine::decode(std::span<const decoder::Token> tokens, Wanted wanted) {
  llama_batch batch = llama_batch_init(static_cast<std::int32_t>(tokens.size()), 0, 1);
  batch.n_tokens = static_cast<std::int32_t>(tokens.size());
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    batch.token[i] = tokens[i];
    batch.pos[i] = static_cast<llama_pos>(position_++);
    batch.n_seq_id[i] = 1;
    batch.seq_id[i][0] = 0;
    batch.logits[i] = wanted == Wanted::logits ? 1 : 0;
  }
  const std::int32_t failed = llama_decode(context_.get(), batch);
  llama_batch_free(batch);
  if (failed != 0) throw std::runtime_error("llama.cpp cannot decode (" + std::to_string(failed) + ")");
}

}  // namespace evaluation
