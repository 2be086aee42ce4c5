/// \file
/// What is read: token sequences, and the pieces of them that an evaluation takes.
#pragma once

#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "decoder/decoder.hpp"

namespace evaluation {

/// The tokens that a model knows: 0 to `size` - 1.
struct Vocabulary {
  std::int64_t size = 0;
  bool is_bytes = false;  ///< a token is a byte
};

/// A whole text as tokens.
struct Text {
  std::string name;
  std::vector<decoder::Token> tokens;
};

/// Plain text where the model reads bytes; else the JSON file of `tools/prepare_smollm2 tokenize`.
/// Throws std::runtime_error when the file is missing, malformed or has tokens that the model does not know.
Text load_text(const std::filesystem::path& file, const Vocabulary& vocabulary);

/// A piece of a text.
struct Document {
  std::string name;  ///< "text@offset"
  std::span<const decoder::Token> tokens;
};

/// `count` documents of `length` tokens, dealt to the texts in turn; each text is cut into as many equal parts as it has
/// documents, and a document starts at a place in its part that the seed chooses. The same on every platform.
std::vector<Document> choose_documents(std::span<const Text> texts, std::size_t count, std::size_t length,
                                       std::uint64_t seed);

}  // namespace evaluation
