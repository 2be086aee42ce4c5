#include <kvfold/adaptors/llama_query_tap.hpp>

#include <cmath>
#include <cstdlib>
#include <cstring>

#include <gtest/gtest.h>

#include "llama_engine.hpp"

namespace kvfold::test {
namespace {

constexpr Index kPrompt = 150;

/// What another callback that was there before keeps: the softmax of the first layer, [query heads][tokens][cells].
struct Softmax {
  std::vector<float> weights;
  std::int64_t cells = 0, tokens = 0;
  int calls = 0;

  static bool callback(ggml_tensor* node, bool asked, void* data) {
    Softmax& self = *static_cast<Softmax*>(data);
    const bool wanted = std::strcmp(node->name, "kq_soft_max-0") == 0;
    if (asked) return wanted;
    ++self.calls;
    EXPECT_TRUE(wanted) << node->name;
    self.cells = node->ne[0];
    self.tokens = node->ne[1];
    self.weights.resize(static_cast<std::size_t>(ggml_nelements(node)));
    ggml_backend_tensor_get(node, self.weights.data(), 0, ggml_nbytes(node));
    return true;
  }
};

class LlamaTap : public testing::Test {
 protected:
  void SetUp() override { KVFOLD_NEEDS_SMOLLM2(); }

  struct Seen {
    std::vector<Position> positions;
    std::vector<float> floats;
    QueryRows rows;
  };
  static Seen seen(Engine& engine, Index layer, ChannelRotation turned = {}) {
    Seen s;
    s.positions.resize(static_cast<std::size_t>(engine.tap().rows()));
    s.floats.resize(static_cast<std::size_t>(engine.tap().query_floats()));
    s.rows = engine.tap().queries(layer, turned, s.positions, s.floats);
    return s;
  }
};

TEST_F(LlamaTap, JoinsPiecesOfAPrompt) {
  const auto tokens = book_tokens(kPrompt);
  Engine whole({.piece = 512, .queries = 40}), pieces({.piece = 32, .queries = 40});
  ASSERT_FALSE(whole.decode(tokens, 0).empty());
  ASSERT_FALSE(pieces.decode(tokens, 0).empty());
  for (const Index layer : {0, 17, 29}) {
    const Seen a = seen(whole, layer), b = seen(pieces, layer);
    ASSERT_EQ(a.rows.rows(), 40);
    EXPECT_EQ(a.positions.front(), kPrompt - 40);
    EXPECT_EQ(a.positions.back(), kPrompt - 1);
    EXPECT_EQ(a.positions, b.positions);
    EXPECT_LT(largest_difference(a.floats, b.floats), 1e-3f);
  }
}

TEST_F(LlamaTap, KeepsTheLastQueriesOfMany) {
  const auto tokens = book_tokens(kPrompt);
  Engine all({.queries = 512}), few({.queries = 7});
  ASSERT_FALSE(all.decode(tokens, 0).empty());
  ASSERT_FALSE(few.decode(tokens, 0).empty());
  const Seen a = seen(all, 11), b = seen(few, 11);
  ASSERT_EQ(a.rows.rows(), kPrompt);
  ASSERT_EQ(b.rows.rows(), 7);
  EXPECT_EQ(std::vector<float>(a.floats.end() - static_cast<std::ptrdiff_t>(b.floats.size()), a.floats.end()),
            b.floats);
}

TEST_F(LlamaTap, GoesOnTokenByToken) {
  const auto tokens = book_tokens(kPrompt);
  Engine engine({.queries = 16});
  ASSERT_FALSE(engine.decode(std::span(tokens).first(kPrompt - 5), 0).empty());
  for (Index i = kPrompt - 5; i < kPrompt; ++i) {
    ASSERT_FALSE(
        engine.decode(std::span(tokens).subspan(static_cast<std::size_t>(i), 1), static_cast<llama_pos>(i)).empty());
  }
  Engine whole({.queries = 16});
  ASSERT_FALSE(whole.decode(tokens, 0).empty());
  EXPECT_EQ(seen(engine, 4).positions, seen(whole, 4).positions);
  EXPECT_LT(largest_difference(seen(engine, 4).floats, seen(whole, 4).floats), 1e-3f);
  EXPECT_EQ(engine.tap().newest_position(), kPrompt - 1);
}

TEST_F(LlamaTap, StartsAfreshWithANewSequence) {
  const auto tokens = book_tokens(kPrompt);
  Engine engine({.sequences = 2, .queries = 100});
  ASSERT_FALSE(engine.decode(tokens, 0, 0).empty());
  ASSERT_FALSE(engine.decode(std::span(tokens).first(20), 0, 1).empty());
  EXPECT_TRUE(engine.tap().status().ok());
  EXPECT_EQ(engine.tap().rows(), 20);
}

TEST_F(LlamaTap, KeepsWhatItHasWhilePaused) {
  const auto tokens = book_tokens(kPrompt);
  Engine engine;
  EXPECT_EQ(engine.tap().status().argument(), "tap");
  EXPECT_EQ(engine.tap().rows(), 0);
  ASSERT_FALSE(engine.decode(std::span(tokens).first(50), 0).empty());
  engine.tap().pause();
  ASSERT_FALSE(engine.decode(std::span(tokens).subspan(50, 10), 50).empty());
  EXPECT_EQ(engine.tap().newest_position(), 49);
  engine.tap().resume();
  ASSERT_FALSE(engine.decode(std::span(tokens).subspan(60, 10), 60).empty());
  EXPECT_EQ(engine.tap().newest_position(), 69);
  engine.tap().reset();
  EXPECT_EQ(engine.tap().rows(), 0);
}

TEST_F(LlamaTap, LetsAnotherCallbackBeCalledAsBefore) {
  const auto tokens = book_tokens(kPrompt);
  Softmax with_tap, alone;
  Engine tapped({}, &Softmax::callback, &with_tap), plain({.tapped = false}, &Softmax::callback, &alone);
  ASSERT_FALSE(tapped.decode(tokens, 0).empty());
  ASSERT_FALSE(plain.decode(tokens, 0).empty());
  EXPECT_EQ(with_tap.calls, 1);
  EXPECT_EQ(alone.calls, 1);
  EXPECT_LT(largest_difference(with_tap.weights, alone.weights), 1e-6f);
}

/// The softmax of tapped queries and saved keys is the engine's own: queries, keys, their heads, their order, their rotations.
void expect_attention_of_the_engine(ggml_type keys, bool hadamard, float tolerance) {
  if (!hadamard) setenv("LLAMA_ATTN_ROT_DISABLE", "1", 1);
  Softmax engine_own;
  Engine engine({.keys = keys, .values = GGML_TYPE_F32, .queries = 512}, &Softmax::callback, &engine_own);
  if (!hadamard) unsetenv("LLAMA_ATTN_ROT_DISABLE");
  ASSERT_FALSE(engine.decode(book_tokens(kPrompt), 0).empty());

  const Blob bytes = engine.state();
  std::vector<float> turned(3 * 64), stored(3 * 64);
  const auto state = detail::recognise_llama_state(bytes, engine.tap(), turned, stored);
  ASSERT_TRUE(state.ok()) << state.status().detail();
  const bool in_blocks = keys == GGML_TYPE_Q8_0 || keys == GGML_TYPE_Q4_0;
  EXPECT_EQ(state->channel_rotation().key_block, hadamard && in_blocks ? 64 : 0);

  std::vector<Position> positions(static_cast<std::size_t>(engine.tap().rows()));
  std::vector<float> floats(static_cast<std::size_t>(engine.tap().query_floats()));
  const QueryRows queries = engine.tap().queries(0, state->channel_rotation(), positions, floats);
  const LlamaLayerView layer = state->layer(0);
  std::vector<float> head_keys(kPrompt * 64), row(kPrompt);
  float worst = 0.f;
  for (Index q = 0; q < 9; ++q) {
    layer.read_keys(q / 3, 0, kPrompt, head_keys);
    for (Index i = 0; i < kPrompt; ++i) {
      float sum = 0.f;
      for (Index t = 0; t <= i; ++t) {
        float dot = 0.f;
        for (Index d = 0; d < 64; ++d) dot += queries.row(q, i)[d] * head_keys[static_cast<std::size_t>(t * 64 + d)];
        row[static_cast<std::size_t>(t)] = std::exp(dot / 8.f);
        sum += row[static_cast<std::size_t>(t)];
      }
      for (Index t = 0; t <= i; ++t) {
        const auto place = static_cast<std::size_t>((q * engine_own.tokens + i) * engine_own.cells + t);
        worst = std::max(worst, std::abs(row[static_cast<std::size_t>(t)] / sum - engine_own.weights[place]));
      }
    }
  }
  EXPECT_LT(worst, tolerance);
}

TEST_F(LlamaTap, SeesTheAttentionOfTheEngine) { expect_attention_of_the_engine(GGML_TYPE_F32, true, 1e-5f); }
TEST_F(LlamaTap, SeesTheAttentionOfTheEngineOverHalves) { expect_attention_of_the_engine(GGML_TYPE_F16, true, 2e-3f); }
TEST_F(LlamaTap, SeesTheAttentionOfTheEngineOverTurnedBlocks) {
  expect_attention_of_the_engine(GGML_TYPE_Q8_0, true, 2e-2f);
}
TEST_F(LlamaTap, SeesTheAttentionOfTheEngineOverBlocksThatAreNotTurned) {
  expect_attention_of_the_engine(GGML_TYPE_Q8_0, false, 2e-2f);
}

}  // namespace
}  // namespace kvfold::test
