/// \file
/// The sizes of real models' layers, and what the benchmarks compress them to.
#pragma once

#include <kvfold/types.hpp>

#include <array>

namespace kvfold::bench {

struct Model {
  const char* name;
  LayerShape shape;
  Index budget;  ///< B, rows per head
};

inline constexpr Model kLlama{"llama3_8b", {8, 4, 128, 128}, 1024};
inline constexpr Model kQwen{"qwen2.5_7b", {4, 7, 128, 128}, 1024};
inline constexpr Model kSmolLm{"smollm2_135m", {3, 3, 64, 64}, 256};
inline constexpr std::array kModels{kLlama, kQwen, kSmolLm};

inline constexpr std::array<Index, 4> kContexts{2048, 8192, 32768, 131072};  ///< T
inline constexpr Index kWindow = 32;                                         ///< W

}  // namespace kvfold::bench
