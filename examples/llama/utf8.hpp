/// \file
/// Where a text that came in pieces may be cut.
#pragma once

#include <algorithm>
#include <cstddef>
#include <string_view>

namespace llama_chat {

/// Whether a byte is of a UTF-8 character but not its first.
inline bool continues_character(char byte) { return (static_cast<unsigned char>(byte) & 0xC0U) == 0x80U; }

/// Bytes at the end of a text that begin a character without ending it, 0 to 3. A byte that begins none counts as whole.
inline std::size_t unfinished_utf8(std::string_view text) {
  for (std::size_t bytes = 1; bytes <= std::min<std::size_t>(3, text.size()); ++bytes) {
    const char first = text[text.size() - bytes];
    if (continues_character(first)) continue;
    const auto lead = static_cast<unsigned char>(first);
    const std::size_t length = lead < 0xC0 ? 1 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : lead < 0xF8 ? 4 : 1;
    return length > bytes ? bytes : 0;
  }
  return 0;
}

/// Bytes at the beginning of a text that belong to a character which began before it, 0 to 3.
inline std::size_t continued_utf8(std::string_view text) {
  std::size_t bytes = 0;
  while (bytes < std::min<std::size_t>(3, text.size()) && continues_character(text[bytes])) ++bytes;
  return bytes;
}

}  // namespace llama_chat
