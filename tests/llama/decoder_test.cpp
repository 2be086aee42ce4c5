// kvfold's own decoder beside llama.cpp, on the same numbers of the same model: two readings of one architecture.
#include "decoder/decoder.hpp"

#include <kvfold/exec/thread_pool.hpp>

#include <cstdlib>

#include <gtest/gtest.h>

#include "llama_engine.hpp"

namespace kvfold::test {
namespace {

TEST(DecoderBesideLlama, HasTheSameLogits) {
  KVFOLD_NEEDS_SMOLLM2();
  const char* directory = std::getenv("KVFOLD_SMOLLM2_DIR");
  if (directory == nullptr) {
    GTEST_SKIP() << "KVFOLD_SMOLLM2_DIR is not set: run tools/test, or tools/prepare_smollm2 model";
  }
  const auto tokens = book_tokens(100);
  ThreadPool pool(2);
  decoder::Decoder ours(directory, pool);
  decoder::Sequence sequence = ours.new_sequence();
  const decoder::Matrix logits = ours.forward(tokens, sequence, decoder::Logits::all);

  Engine theirs({.tapped = false});
  for (const std::size_t length : {std::size_t{1}, std::size_t{10}, tokens.size()}) {
    llama_memory_clear(theirs.memory(), true);
    const Logits expected = theirs.decode(std::span(tokens).first(length), 0);
    const float* row = logits.row(static_cast<Eigen::Index>(length) - 1).data();
    EXPECT_LT(largest_difference({row, static_cast<std::size_t>(logits.cols())}, expected), 2e-3f) << length;
  }
}

}  // namespace
}  // namespace kvfold::test
