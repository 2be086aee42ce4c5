#include <kvfold/adaptors/llama_cpp.hpp>
#include <kvfold/exec/thread_pool.hpp>

#include <random>
#include <tuple>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "llama_engine.hpp"

namespace kvfold::test {
namespace {

constexpr Index kPrompt = 160;

/// Scores 1 for chosen rows, 0 for others: any subset, the same for all heads and layers.
class ChosenRows {
 public:
  struct Options {
    std::vector<bool> chosen;
  };
  ChosenRows() = default;
  explicit ChosenRows(Options options) : options_(std::move(options)) {}
  [[nodiscard]] const Options& options() const noexcept { return options_; }
  [[nodiscard]] Status validate() const noexcept { return {}; }
  template <KVCacheView V, class E>
  [[nodiscard]] std::size_t workspace_bytes(const V&, const E&, Index) const noexcept {
    return 0;
  }
  template <KVCacheView V, class E, Executor X>
  Status score(const V&, const E&, ScoreTable table, Workspace, X&) const noexcept {
    for (Index h = 0; h < table.heads(); ++h) {
      for (std::size_t t = 0; t < options_.chosen.size(); ++t) table.scores(h)[t] = options_.chosen[t] ? 1.f : 0.f;
    }
    std::fill(table.protection.begin(), table.protection.end(), Protection::none);
    return {};
  }

 private:
  Options options_;
};

std::vector<bool> random_subset(Index rows, Index count) {
  std::vector<std::size_t> order(static_cast<std::size_t>(rows));
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::mt19937 random(7);
  for (std::size_t i = order.size() - 1; i > 0; --i) std::swap(order[i], order[random() % (i + 1)]);
  std::vector<bool> chosen(order.size());
  for (Index i = 0; i < count; ++i) chosen[order[static_cast<std::size_t>(i)]] = true;
  return chosen;
}

/// A prompt that was read, and the tokens that follow it.
class LlamaCompression : public testing::Test {
 protected:
  void SetUp() override { KVFOLD_NEEDS_SMOLLM2(); }

  static std::span<const llama_token> prompt() { return tokens().first(kPrompt); }
  static std::span<const llama_token> following(std::size_t count) { return tokens().subspan(kPrompt, count); }
  static std::span<const llama_token> tokens() {
    static const std::vector<llama_token> all = book_tokens(kPrompt + 64);
    return all;
  }
};

TEST_F(LlamaCompression, OfASubsetIsWhatTheEngineGetsByRemovingTheOtherRows) {
  constexpr Index kKept = 40;
  const std::vector<bool> chosen = random_subset(kPrompt, kKept);
  Engine ours, theirs;
  ASSERT_FALSE(ours.decode(prompt(), 0).empty());
  const Logits before = theirs.decode(prompt(), 0);
  const Compressor<ChosenRows, UniformBudget, EvictOnly> method(
      {.score = {.chosen = chosen}, .budget = {.rows = kKept}});
  const auto report = ours.compress(method);
  ASSERT_TRUE(report.ok()) << report.status().detail();
  EXPECT_EQ(report->rows_before, kPrompt);
  EXPECT_EQ(report->rows_after, kKept);
  EXPECT_EQ(report->next_position, kPrompt);
  EXPECT_EQ(report->state_bytes_before, theirs.state().size());
  for (llama_pos t = 0; t < kPrompt; ++t) {
    if (!chosen[static_cast<std::size_t>(t)]) {
      ASSERT_TRUE(llama_memory_seq_rm(theirs.memory(), 0, t, t + 1));
    }
  }
  EXPECT_EQ(report->state_bytes_after, theirs.state().size());

  Engine full,
      moved;  // `moved` has the engine's own choice in the cells that ours is in: side by side from the first on
  ASSERT_FALSE(full.decode(prompt(), 0).empty());
  ASSERT_TRUE(moved.set_state(theirs.state()));
  // The tokens after it come one by one, and then in a batch.
  for (llama_pos i = 0; i < 3; ++i) {
    const auto token = following(4).subspan(static_cast<std::size_t>(i), 1);
    const Logits logits = ours.decode(token, kPrompt + i), expected = theirs.decode(token, kPrompt + i);
    EXPECT_LT(largest_difference(logits, moved.decode(token, kPrompt + i)), 1e-5f) << i;
    EXPECT_LT(relative_difference(logits, expected), 1e-5f) << i;
    EXPECT_GT(relative_difference(full.decode(token, kPrompt + i), expected), 0.05f)
        << "the rows removed do not matter";
  }
  const auto batch = tokens().subspan(kPrompt + 3, 20);
  const Logits logits = ours.decode(batch, kPrompt + 3);
  EXPECT_LT(largest_difference(logits, moved.decode(batch, kPrompt + 3)), 1e-5f);
  EXPECT_LT(relative_difference(logits, theirs.decode(batch, kPrompt + 3)), 1e-5f);
}

TEST_F(LlamaCompression, ToAsManyRowsAsThereAreChangesNothing) {
  Engine engine;
  ASSERT_FALSE(engine.decode(prompt(), 0).empty());
  const Blob before = engine.state();
  const auto report = engine.compress(ems_without_masses(kPrompt));
  ASSERT_TRUE(report.ok()) << report.status().detail();
  EXPECT_EQ(report->rows_after, kPrompt);
  EXPECT_EQ(report->layers.rows_merged, 0);
  EXPECT_EQ(engine.state(), before);
  Engine untouched;
  ASSERT_FALSE(untouched.decode(prompt(), 0).empty());
  EXPECT_EQ(engine.decode(following(1), kPrompt), untouched.decode(following(1), kPrompt));
}

TEST_F(LlamaCompression, LeavesTheEngineWithExactlyTheStateThatWasWritten) {
  Engine engine;
  ASSERT_FALSE(engine.decode(prompt(), 0).empty());
  LlamaBuffers buffers;
  SerialExecutor executor;
  const auto report = kvfold::compress(engine.get(), 0, ems_without_masses(32), engine.tap(), buffers, executor);
  ASSERT_TRUE(report.ok()) << report.status().detail();
  EXPECT_GT(report->layers.rows_merged, 0);
  EXPECT_EQ(report->layers.rows_kept, 32 * 3 * 30);
  const auto written = buffers.compressed.get().first(report->state_bytes_after);
  EXPECT_EQ(engine.state(), Blob(written.begin(), written.end()));
  EXPECT_EQ(llama_memory_seq_pos_min(engine.memory(), 0), kPrompt - 32);
  EXPECT_EQ(llama_memory_seq_pos_max(engine.memory(), 0), kPrompt - 1);
}

TEST_F(LlamaCompression, GivesTheSameStateForAnyNumberOfThreads) {
  Engine one, two;
  ASSERT_FALSE(one.decode(prompt(), 0).empty());
  ASSERT_FALSE(two.decode(prompt(), 0).empty());
  ASSERT_TRUE(one.compress(ems_without_masses(32)).ok());
  LlamaBuffers buffers;
  ThreadPool pool(3);
  ASSERT_TRUE(kvfold::compress(two.get(), 0, ems_without_masses(32), two.tap(), buffers, pool).ok());
  EXPECT_EQ(one.state(), two.state());
}

TEST_F(LlamaCompression, CanBeRepeatedWhileASequenceGrows) {
  Engine engine;
  ASSERT_FALSE(engine.decode(prompt(), 0).empty());
  ASSERT_TRUE(engine.compress(ems_without_masses(48)).ok());
  ASSERT_FALSE(engine.decode(following(40), kPrompt).empty());
  const auto again = engine.compress(ems_without_masses(48));
  ASSERT_TRUE(again.ok()) << again.status().detail();
  EXPECT_EQ(again->rows_before, 88);
  EXPECT_EQ(again->rows_after, 48);
  EXPECT_EQ(again->next_position, kPrompt + 40);
  EXPECT_FALSE(engine.decode(tokens().subspan(kPrompt + 40, 1), kPrompt + 40).empty());
}

TEST_F(LlamaCompression, OfOneSequenceLeavesTheOthersAlone) {
  for (const bool unified : {false, true}) {
    const EngineOptions options{.sequences = 2, .unified = unified};
    Engine engine(options), untouched(options);
    const auto other = tokens().subspan(40, 60);
    for (Engine* e : {&engine, &untouched}) {
      ASSERT_FALSE(e->decode(other, 0, 1).empty());
      ASSERT_FALSE(e->decode(prompt(), 0, 0).empty());
    }
    const auto report = engine.compress(ems_without_masses(32), 0);
    ASSERT_TRUE(report.ok()) << report.status().detail();
    EXPECT_EQ(engine.state(1), untouched.state(1));
    const auto next = tokens().subspan(100, 1);
    EXPECT_LT(largest_difference(engine.decode(next, 60, 1), untouched.decode(next, 60, 1)), 1e-5f);
  }
}

TEST_F(LlamaCompression, FreesCellsForOtherTokens) {
  Engine engine({.tokens = 256});  // cells are counted in 256s
  ASSERT_FALSE(engine.decode(tokens(), 0).empty());
  const auto more = tokens().first(64);
  const auto start = static_cast<llama_pos>(tokens().size());
  EXPECT_TRUE(engine.decode(more, start).empty()) << "224 + 64 rows fit";
  ASSERT_TRUE(engine.compress(ems_without_masses(32)).ok());
  EXPECT_FALSE(engine.decode(more, start).empty());
}

// --- Whatever the engine's cache is made of ----------------------------------------------------------------------------

struct Kind {
  ggml_type keys, values;
  bool flash_attention;
  const char* name;
};

class LlamaCacheKinds : public testing::TestWithParam<Kind> {
 protected:
  void SetUp() override { KVFOLD_NEEDS_SMOLLM2(); }
};

TEST_P(LlamaCacheKinds, RoundTripByteForByteAndCompress) {
  const Kind& kind = GetParam();
  const EngineOptions options{.keys = kind.keys, .values = kind.values, .flash_attention = kind.flash_attention};
  const std::vector<llama_token> tokens = book_tokens(kPrompt + 1);
  const auto prompt = std::span(tokens).first(kPrompt), next = std::span(tokens).last(1);
  Engine engine(options);
  ASSERT_FALSE(engine.decode(prompt, 0).empty());

  const Blob saved = engine.state();
  const auto model = llama_model_of(smollm2());
  ASSERT_TRUE(model.ok());
  const auto state = LlamaState::parse(saved, *model);
  ASSERT_TRUE(state.ok()) << state.status().argument() << ": " << state.status().detail();
  EXPECT_EQ(static_cast<int>(state->key_type()), static_cast<int>(kind.keys));
  EXPECT_EQ(static_cast<int>(state->value_type()), static_cast<int>(kind.values));
  EXPECT_EQ(state->has_transposed_values(), !kind.flash_attention);

  // What is written from a plan that keeps everything is what was read, and the engine takes it.
  WorkspaceBuffer workspace;
  SerialExecutor executor;
  Blob rewritten(saved.size());
  auto writer = LlamaStateWriter::create(*state, kPrompt, rewritten);
  ASSERT_TRUE(writer.ok());
  const StreamingLlm everything = keep_ends(kPrompt);
  for (Index l = 0; l < state->layers(); ++l) {
    const auto bytes = everything.workspace_bytes(state->layer(l), NoEvidence{}, 1);
    ASSERT_TRUE(workspace.reserve(*bytes).ok());
    const auto plan = everything.plan(state->layer(l), NoEvidence{}, workspace.get(), executor);
    ASSERT_TRUE(plan.ok());
    ASSERT_TRUE(writer->add_layer(*plan).ok());
  }
  EXPECT_EQ(rewritten, saved);
  Engine other(options);
  ASSERT_TRUE(other.set_state(rewritten));
  EXPECT_EQ(other.state(), saved);

  // Fewer rows, with merged ones among them: these are what the engine has from now on.
  const auto report = engine.compress(ems_without_masses(48));
  ASSERT_TRUE(report.ok()) << report.status().argument() << ": " << report.status().detail();
  EXPECT_EQ(report->rows_after, 48);
  EXPECT_GT(report->layers.rows_merged, 0);
  EXPECT_EQ(engine.state().size(), report->state_bytes_after);
  const Logits compressed = engine.decode(next, kPrompt), full = other.decode(next, kPrompt);
  EXPECT_LT(relative_difference(compressed, full), 0.3f);
}

INSTANTIATE_TEST_SUITE_P(All, LlamaCacheKinds,
                         testing::Values(Kind{GGML_TYPE_F32, GGML_TYPE_F32, false, "f32"},
                                         Kind{GGML_TYPE_F32, GGML_TYPE_F32, true, "f32_fa"},
                                         Kind{GGML_TYPE_F16, GGML_TYPE_F16, false, "f16"},
                                         Kind{GGML_TYPE_F16, GGML_TYPE_F16, true, "f16_fa"},
                                         Kind{GGML_TYPE_BF16, GGML_TYPE_BF16, false, "bf16"},
                                         Kind{GGML_TYPE_Q8_0, GGML_TYPE_F16, false, "q8_0_f16"},
                                         Kind{GGML_TYPE_Q8_0, GGML_TYPE_Q8_0, true, "q8_0_fa"},
                                         Kind{GGML_TYPE_Q4_0, GGML_TYPE_F32, false, "q4_0_f32"},
                                         Kind{GGML_TYPE_Q4_0, GGML_TYPE_Q4_0, true, "q4_0_fa"}),
                         [](const auto& kind) { return kind.param.name; });

// --- What can go wrong, goes wrong before anything is written -----------------------------------------------------------

/// Whether a context still has this state, and answers from it.
testing::AssertionResult goes_on(Engine& engine, const Blob& before, std::span<const llama_token> next) {
  if (engine.state() != before) return testing::AssertionFailure() << "the state is another one";
  Engine untouched;
  if (!untouched.set_state(before)) return testing::AssertionFailure() << "the state is damaged";
  const llama_pos at = llama_memory_seq_pos_max(untouched.memory(), 0) + 1;
  const float off = largest_difference(engine.decode(next, at), untouched.decode(next, at));
  if (off > 1e-5f) return testing::AssertionFailure() << "logits are off by " << off;
  return testing::AssertionSuccess();
}

TEST_F(LlamaCompression, RefusesBadArguments) {
  Engine engine;
  ASSERT_FALSE(engine.decode(prompt(), 0).empty());
  const Blob before = engine.state();
  const auto method = ems_without_masses(32);
  EXPECT_EQ(kvfold::compress(nullptr, 0, method, engine.tap()).status().argument(), "context");
  EXPECT_EQ(engine.compress(method, -1).status().argument(), "sequence");
  EXPECT_EQ(engine.compress(method, 1).status().argument(), "sequence");
  EXPECT_EQ(engine.compress(ems_without_masses(0)).status().argument(), "budget");
  EXPECT_EQ(engine.compress(Ems({.budget = {.rows = 32}})).status().code(), StatusCode::unsupported)
      << "there is no place for log masses";
  EXPECT_TRUE(goes_on(engine, before, following(1)));
}

TEST_F(LlamaCompression, RefusesATapThatDidNotSeeTheSequence) {
  const auto method = ems_without_masses(32);
  Engine engine;
  EXPECT_EQ(engine.compress(method).status().argument(), "tap") << "nothing was decoded";
  ASSERT_FALSE(engine.decode(prompt(), 0).empty());

  Engine other;  // other tokens at the same positions
  ASSERT_FALSE(other.decode(tokens().last(kPrompt), 0).empty());
  const auto foreign = kvfold::compress(engine.get(), 0, method, other.tap());
  EXPECT_EQ(foreign.status().argument(), "state");

  engine.tap().pause();
  ASSERT_FALSE(engine.decode(following(1), kPrompt).empty());
  const Blob before = engine.state();
  const auto late = engine.compress(method);
  EXPECT_EQ(late.status().argument(), "tap");
  EXPECT_TRUE(goes_on(engine, before, tokens().subspan(kPrompt + 1, 1)));
}

TEST_F(LlamaCompression, RefusesModelsThatAreNot) {
  EXPECT_EQ(llama_model_of(nullptr).status().argument(), "model");
  EXPECT_EQ(LlamaQueryTap::create(nullptr, {}).status().argument(), "model");
  EXPECT_EQ(LlamaQueryTap::create(smollm2(), {.queries = 0}).status().argument(), "queries");
  EXPECT_EQ(LlamaQueryTap::create(smollm2(), {.queries = kMaxRows + 1}).status().argument(), "queries");
}

TEST_F(LlamaCompression, KnowsTheModel) {
  const auto model = llama_model_of(smollm2());
  ASSERT_TRUE(model.ok());
  EXPECT_EQ(model->layers, 30);
  EXPECT_EQ(model->shape, (LayerShape{3, 3, 64, 64}));
}

TEST_F(LlamaCompression, RefusesDamagedStatesAndTheEngineIsUnharmed) {
  Engine engine;
  ASSERT_FALSE(engine.decode(prompt(), 0).empty());
  const Blob good = engine.state();
  const LlamaModel model = *llama_model_of(smollm2());
  ASSERT_TRUE(LlamaState::parse(good, model).ok());
  for (const std::size_t size : {std::size_t{0}, std::size_t{11}, std::size_t{400}, good.size() / 2, good.size() - 1}) {
    EXPECT_FALSE(LlamaState::parse(std::span(good).first(size), model).ok()) << size;
  }
  Blob longer = good;
  longer.push_back(std::byte{0});
  EXPECT_EQ(LlamaState::parse(longer, model).status().argument(), "end");
  // Every bit of everything before the first row of keys.
  const std::size_t head = 16 + 12 * static_cast<std::size_t>(kPrompt) + 8 + 12;
  for (std::size_t bit = 0; bit < 8 * head; ++bit) {
    Blob bad = good;
    bad[bit / 8] ^= std::byte{1} << (bit % 8);
    const auto parsed = LlamaState::parse(bad, model);
    // Another number of the sequence, in the state and in none of its cells, or positions that still ascend, are no damage
    // that can be seen; nor is a transposed V where its header would be as long.
    if (parsed.ok()) {
      EXPECT_TRUE(bit / 8 >= 16 && (bit / 8 - 16) % 12 < 4) << "byte " << bit / 8;
    }
  }
  LlamaModel larger = model;
  larger.shape.kv_heads = 9;
  larger.shape.group_size = 1;
  EXPECT_FALSE(LlamaState::parse(good, larger).ok());
  EXPECT_TRUE(goes_on(engine, good, following(1)));
}

TEST_F(LlamaCompression, PutsTheOldStateBackWhenTheEngineRefusesTheNewOne) {
  Engine engine;
  ASSERT_FALSE(engine.decode(prompt(), 0).empty());
  const Blob good = engine.state();
  const std::span<const std::byte> short_of_one(good.data(), good.size() - 1);
  const Status status = detail::replace_llama_sequence(engine.get(), 0, short_of_one, good);
  EXPECT_EQ(status.code(), StatusCode::engine_failed);
  EXPECT_TRUE(goes_on(engine, good, following(1)));
}

TEST_F(LlamaCompression, SaysWhenTheEngineTakesNeither) {
  Engine engine;
  ASSERT_FALSE(engine.decode(prompt(), 0).empty());
  const Blob good = engine.state();
  const std::span<const std::byte> bad(good.data(), good.size() - 1);
  const Status status = detail::replace_llama_sequence(engine.get(), 0, bad, bad);
  EXPECT_EQ(status.code(), StatusCode::engine_failed);
  EXPECT_THAT(std::string(status.detail()), testing::HasSubstr("lost"));
}

TEST_F(LlamaCompression, DoesNotDependOnTheOrderOfRows) {
  Engine engine, permuted;
  ASSERT_FALSE(engine.decode(prompt(), 0).empty());
  const Blob good = engine.state();
  const auto state = LlamaState::parse(good, *llama_model_of(smollm2()));
  ASSERT_TRUE(state.ok());
  Blob turned = good;  // rows in reverse order under the same positions, in every layer
  const detail::LlamaLayout& layout = state->layout();
  const auto rows = static_cast<std::size_t>(kPrompt), key_row = static_cast<std::size_t>(layout.key_row_bytes);
  for (Index l = 0; l < layout.layers; ++l) {
    const auto keys = static_cast<std::size_t>(layout.keys(l) + detail::kLlamaLayerHeader);
    const auto values = static_cast<std::size_t>(layout.values(l) + detail::kLlamaLayerHeader);
    for (std::size_t t = 0; t < rows; ++t) {
      std::copy_n(&good[keys + t * key_row], key_row, &turned[keys + (rows - 1 - t) * key_row]);
      for (std::size_t channel = 0; channel < 3 * 64; ++channel) {
        std::copy_n(&good[values + (channel * rows + t) * 4], 4, &turned[values + (channel * rows + rows - 1 - t) * 4]);
      }
    }
  }
  ASSERT_TRUE(permuted.set_state(turned));
  EXPECT_LT(relative_difference(engine.decode(following(1), kPrompt), permuted.decode(following(1), kPrompt)), 1e-5f);
}

}  // namespace
}  // namespace kvfold::test
