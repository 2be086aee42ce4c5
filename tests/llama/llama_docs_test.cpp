// The snippet of docs/engines.md on llama.cpp, run.
#include <kvfold/adaptors/llama_cpp.hpp>

#include <gtest/gtest.h>

#include "llama_engine.hpp"

namespace kvfold::test {
namespace {

struct Outcome {
  LlamaReport report;
  llama_pos last = -1;
};

/// Leaves `outcome` as it is where it gives up.
void compress_and_go_on(llama_model* model, std::vector<llama_token> prompt, llama_token next_token,
                        llama_context_params params, Outcome& outcome) {
  // [readme]
  auto tap = kvfold::LlamaQueryTap::create(model, {.queries = 32});  // the last 32 queries of each layer
  if (!tap.ok()) return;                                             // a model that cannot be compressed, and why
  tap->attach(params);                                               // sets cb_eval; the tap outlives the context
  llama_context* context = llama_init_from_model(model, params);

  llama_decode(context, llama_batch_get_one(prompt.data(), static_cast<std::int32_t>(prompt.size())));

  const kvfold::Ems method({.budget = {.rows = 64}, .reduce = {.mass_mode = kvfold::MassMode::none}});
  const auto report = kvfold::compress(context, 0, method, *tap);
  if (!report.ok()) return;  // the sequence is as it was; report.status() names the argument and says why
  tap->pause();              // from here on it costs nothing

  llama_decode(context, llama_batch_get_one(&next_token, 1));  // at position N, as if nothing had happened
  // [/readme]
  outcome = {*report, llama_memory_seq_pos_max(llama_get_memory(context), 0)};
  llama_free(context);
}

TEST(LlamaDocs, CompressAContextAndGoOn) {
  KVFOLD_NEEDS_SMOLLM2();
  std::vector<llama_token> prompt = book_tokens(120);
  const llama_token next_token = prompt.back();
  prompt.pop_back();
  llama_context_params params = llama_context_default_params();
  params.n_ctx = 512;
  params.n_threads = params.n_threads_batch = 1;
  Outcome outcome;
  compress_and_go_on(smollm2(), prompt, next_token, params, outcome);
  EXPECT_EQ(outcome.report.rows_before, 119);
  EXPECT_EQ(outcome.report.rows_after, 64);
  EXPECT_EQ(outcome.last, 119);
}

}  // namespace
}  // namespace kvfold::test
