/// \file
/// The lines of tests/golden/blocks.txt, which tools/make_golden_blocks has made.
#pragma once

#include <bit>
#include <cstdint>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

namespace kvfold::test {

/// What follows `kind` on each line that begins with it.
[[nodiscard]] inline std::vector<std::vector<std::string>> golden_blocks(const std::string& kind) {
  std::vector<std::vector<std::string>> lines;
  std::ifstream file(KVFOLD_TESTS_DIR "/golden/blocks.txt");
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    std::string word;
    if (!(words >> word) || word != kind) continue;
    auto& rest = lines.emplace_back();
    while (words >> word) rest.push_back(word);
  }
  return lines;
}

[[nodiscard]] inline std::uint32_t hex(const std::string& digits) {
  return static_cast<std::uint32_t>(std::stoul(digits, nullptr, 16));
}
[[nodiscard]] inline float hex_float(const std::string& digits) { return std::bit_cast<float>(hex(digits)); }

}  // namespace kvfold::test
