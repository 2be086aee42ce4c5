/// \file
/// The text around a document and a question, as the model's chat template wants it.
#pragma once

#include <array>
#include <cstdint>
#include <llama.h>
#include <string>

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

}  // namespace llama_chat
