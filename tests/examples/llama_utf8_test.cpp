#include <string>

#include <gtest/gtest.h>

#include "llama/utf8.hpp"

namespace {

using llama_chat::continued_utf8, llama_chat::unfinished_utf8;

// One, two, three and four bytes.
const std::string kText = "a\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80z";

TEST(LlamaUtf8, CutsNoCharacterWhereverATextEndsOrBegins) {
  const std::size_t begin_of[] = {0, 1, 1, 3, 3, 3, 6, 6, 6, 6, 10, 11};
  const std::size_t end_of[] = {0, 1, 3, 3, 6, 6, 6, 10, 10, 10, 10, 11};
  ASSERT_EQ(kText.size(), 11U);
  for (std::size_t cut = 0; cut <= kText.size(); ++cut) {
    EXPECT_EQ(cut - unfinished_utf8(kText.substr(0, cut)), begin_of[cut]) << cut;
    EXPECT_EQ(cut + continued_utf8(kText.substr(cut)), end_of[cut]) << cut;
  }
}

TEST(LlamaUtf8, HoldsBackNothingThatCannotBecomeACharacter) {
  EXPECT_EQ(unfinished_utf8("abc\x80"), 0U);
  EXPECT_EQ(unfinished_utf8("\x80\x80\x80\x80\x80"), 0U);
  EXPECT_EQ(unfinished_utf8("abc\xFF"), 0U);
  EXPECT_EQ(continued_utf8("\x80\x80\x80\x80\x80"), 3U);
}

}  // namespace
