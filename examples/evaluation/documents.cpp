#include "evaluation/documents.hpp"

#include <fstream>
#include <iterator>
#include <random>
#include <stdexcept>

#include <nlohmann/json.hpp>

namespace evaluation {

Text load_text(const std::filesystem::path& file, const Vocabulary& vocabulary) {
  std::ifstream in(file, std::ios::binary);
  if (!in) throw std::runtime_error(file.string() + ": cannot be opened");
  Text text{file.stem().string(), {}};
  if (vocabulary.is_bytes) {
    for (std::istreambuf_iterator<char> c(in), end; c != end; ++c)
      text.tokens.push_back(static_cast<unsigned char>(*c));
    return text;
  }
  const auto json = nlohmann::json::parse(in, nullptr, false);
  if (!json.is_object() || json.value("format", "") != "kvfold-tokens-1" || !json.contains("ids")) {
    throw std::runtime_error(file.string() + ": is not a token file; make one with tools/prepare_smollm2 tokenize");
  }
  text.tokens = json["ids"].get<std::vector<decoder::Token>>();
  for (const decoder::Token token : text.tokens) {
    if (token < 0 || token >= vocabulary.size)
      throw std::runtime_error(file.string() + ": has tokens of another model");
  }
  return text;
}

std::vector<Document> choose_documents(std::span<const Text> texts, std::size_t count, std::size_t length,
                                       std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<Document> documents;
  for (std::size_t i = 0; i < count; ++i) {
    const Text& text = texts[i % texts.size()];
    const std::size_t parts = (count - i % texts.size() + texts.size() - 1) / texts.size();
    if (text.tokens.size() < length * parts) {
      throw std::runtime_error(text.name + ": is too short for " + std::to_string(parts) + " documents of " +
                               std::to_string(length) + " tokens");
    }
    const std::size_t part = text.tokens.size() / parts;
    const std::size_t offset = i / texts.size() * part + random() % (part - length + 1);
    documents.push_back({text.name + "@" + std::to_string(offset), std::span(text.tokens).subspan(offset, length)});
  }
  return documents;
}

}  // namespace evaluation
