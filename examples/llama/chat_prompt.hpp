/// \file
/// The text around a document and a question, as the model's chat template wants it.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <llama.h>
#include <string>
#include <string_view>

namespace llama_chat {

/// What stands around the user's messages and the answers.
struct ChatTemplate {
  std::string before_message;  ///< from the beginning of the conversation to the user's first message
  std::string before_answer;   ///< from a message to its answer
  std::string next_message;    ///< from an answer to the user's next message
  bool line_answers = false;   ///< answers end with their line: the model was not taught to end them
};

/// Of a model that has no template, or one which llama.cpp does not know.
inline ChatTemplate plain_template() { return {"", "\nAnswer:", "\n\nQuestion:", true}; }

/// Lets llama.cpp write a conversation with marks for messages, and takes it apart at the marks.
inline ChatTemplate chat_template_of(const llama_model* model) {
  const char* source = llama_model_chat_template(model, nullptr);
  if (source == nullptr) return plain_template();
  constexpr std::array<const char*, 3> kMarks = {"{first message}", "{answer}", "{second message}"};
  const std::array<llama_chat_message, 3> chat = {{{"user", kMarks[0]}, {"assistant", kMarks[1]}, {"user", kMarks[2]}}};
  std::string text(4096, '\0');
  for (;;) {
    const std::int32_t size = llama_chat_apply_template(source, chat.data(), chat.size(), true, text.data(),
                                                        static_cast<std::int32_t>(text.size()));
    if (size < 0) return plain_template();
    const bool whole = static_cast<std::size_t>(size) <= text.size();
    text.resize(static_cast<std::size_t>(size));
    if (whole) break;
  }
  std::array<std::string, 3> before;
  std::size_t from = 0;
  for (std::size_t i = 0; i < before.size(); ++i) {
    const std::size_t mark = text.find(kMarks[i], from);
    if (mark == std::string::npos) return plain_template();
    before[i] = text.substr(from, mark - from);
    from = mark + std::string(kMarks[i]).size();
  }
  return {before[0], before[1], before[2]};
}

/// Bytes at the end of a text that begin a UTF-8 character without ending it, 0 to 3.
inline std::size_t unfinished_utf8(std::string_view text) {
  for (std::size_t back = 1; back <= std::min<std::size_t>(3, text.size()); ++back) {
    const auto byte = static_cast<unsigned char>(text[text.size() - back]);
    if ((byte & 0xC0U) == 0x80U) continue;  // Not the first of its character.
    const std::size_t length = byte >= 0xF0 ? 4 : byte >= 0xE0 ? 3 : byte >= 0xC0 ? 2 : 1;
    return length > back ? back : 0;
  }
  return 0;
}

/// Bytes at the beginning of a text that belong to a character which began before, 0 to 3.
inline std::size_t continued_utf8(std::string_view text) {
  std::size_t bytes = 0;
  while (bytes < std::min<std::size_t>(3, text.size()) && (static_cast<unsigned char>(text[bytes]) & 0xC0U) == 0x80U) {
    ++bytes;
  }
  return bytes;
}

}  // namespace llama_chat
