/// \file
/// Registers of integers of 16 bits and sums of their products, where the target has wide_loads.hpp: there are
/// instructions for two products in each lane, and with VNNI for adding them in the same step.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "kvfold/detail/lanes.hpp"
#include "kvfold/detail/wide_loads.hpp"
#include "kvfold/storage/quantised.hpp"
#include "kvfold/types.hpp"

namespace kvfold::detail {

#if defined(__AVX2__) && defined(__F16C__)

#if defined(__AVX512BW__)

/// 2 * kLanes integers of 16 bits, or kLanes sums of 32.
using Words = __m512i;

[[nodiscard]] inline Words load_words(const std::int16_t* from) noexcept { return _mm512_loadu_si512(from); }
/// 2 * kLanes elements of a block, from `first` on, before they are scaled.
[[nodiscard]] inline Words load_words(const BlockQ8_0& block, Index first) noexcept {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(block.values.data() + first)));
}
[[nodiscard]] inline Words load_words(const BlockQ4_0& block, Index /*first*/) noexcept {
  const __m128i pairs = load_16_bytes(block.pairs.data());
  const __m256i halves = _mm256_set_m128i(_mm_srli_epi16(pairs, 4), pairs);
  const __m256i bytes = _mm256_sub_epi8(_mm256_and_si256(halves, _mm256_set1_epi8(0xf)), _mm256_set1_epi8(8));
  return _mm512_cvtepi8_epi16(bytes);
}
[[nodiscard]] inline Words in_all_lanes(std::int32_t x) noexcept { return _mm512_set1_epi32(x); }
/// Each of the first half of every four lanes' words beside that of y, and of the second half.
[[nodiscard]] inline Words low_pairs(Words x, Words y) noexcept { return _mm512_unpacklo_epi16(x, y); }
[[nodiscard]] inline Words high_pairs(Words x, Words y) noexcept { return _mm512_unpackhi_epi16(x, y); }
/// x[2 i] * y[2 i] + x[2 i + 1] * y[2 i + 1] in each lane i.
[[nodiscard]] inline Words products(Words x, Words y) noexcept { return _mm512_madd_epi16(x, y); }
/// sums + products(x, y).
[[nodiscard]] inline Words add_products(Words sums, Words x, Words y) noexcept {
#if defined(__AVX512VNNI__)
  return _mm512_dpwssd_epi32(sums, x, y);
#else
  return _mm512_add_epi32(sums, products(x, y));
#endif
}

/// 2 * kLanes numbers of at most 32767 to the nearest integers, in the rounding mode of the thread.
inline void store_rounded_lanes(Lanes low, Lanes high, std::int16_t* to) noexcept {
  auto* out = reinterpret_cast<__m256i*>(to);
  _mm256_storeu_si256(out, _mm512_maskz_cvtsepi32_epi16(kAllLanes, _mm512_maskz_cvtps_epi32(kAllLanes, low)));
  _mm256_storeu_si256(out + 1, _mm512_maskz_cvtsepi32_epi16(kAllLanes, _mm512_maskz_cvtps_epi32(kAllLanes, high)));
}

#else

using Words = __m256i;

[[nodiscard]] inline Words load_words(const std::int16_t* from) noexcept {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}
[[nodiscard]] inline Words load_words(const BlockQ8_0& block, Index first) noexcept {
  return _mm256_cvtepi8_epi16(load_16_bytes(block.values.data() + first));
}
[[nodiscard]] inline Words load_words(const BlockQ4_0& block, Index first) noexcept {
  const __m128i pairs = load_16_bytes(block.pairs.data()), halves = first == 0 ? pairs : _mm_srli_epi16(pairs, 4);
  return _mm256_cvtepi8_epi16(_mm_sub_epi8(_mm_and_si128(halves, _mm_set1_epi8(0xf)), _mm_set1_epi8(8)));
}
[[nodiscard]] inline Words in_all_lanes(std::int32_t x) noexcept { return _mm256_set1_epi32(x); }
[[nodiscard]] inline Words low_pairs(Words x, Words y) noexcept { return _mm256_unpacklo_epi16(x, y); }
[[nodiscard]] inline Words high_pairs(Words x, Words y) noexcept { return _mm256_unpackhi_epi16(x, y); }
[[nodiscard]] inline Words products(Words x, Words y) noexcept { return _mm256_madd_epi16(x, y); }
[[nodiscard]] inline Words add_products(Words sums, Words x, Words y) noexcept {
#if defined(__AVXVNNI__)
  return _mm256_dpwssd_avx_epi32(sums, x, y);
#else
  return _mm256_add_epi32(sums, products(x, y));
#endif
}

inline void store_rounded_lanes(Lanes low, Lanes high, std::int16_t* to) noexcept {
  const __m256i packed = _mm256_packs_epi32(_mm256_cvtps_epi32(low), _mm256_cvtps_epi32(high));  // by halves of both
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(packed, 0b11'01'10'00));
}

#endif

[[nodiscard]] inline Lanes to_lanes(Words sums) noexcept {
  return __builtin_convertvector(reinterpret_cast<IntLanes>(sums), Lanes);
}

/// x, of which compilers know nothing: see lanes.hpp.
[[nodiscard]] inline Words in_register(Words x) noexcept {
  asm("" : "+x"(x));
  return x;
}

/// 32 integers of 16 bits.
class WideWords {
 public:
  explicit WideWords(const std::int16_t* from) noexcept {
    for (Index i = 0; i < kParts; ++i) words_[i] = load_words(from + i * 2 * kLanes);
  }
  /// Elements of a block, before they are scaled.
  template <class Block>
  explicit WideWords(const Block& block) noexcept {
    for (Index i = 0; i < kParts; ++i) words_[i] = load_words(block, i * 2 * kLanes);
  }
  void keep_in_registers() noexcept {
    for (Words& words : words_) words = in_register(words);
  }

  /// Sums of 32 / kLanes products each. Exact, of bytes and of words but -2^15: all of them together are below 2^27.
  [[nodiscard]] friend IntLanes dots(const WideWords& x, const WideWords& y) noexcept {
    Words sums = products(x.words_[0], y.words_[0]);
    for (Index i = 1; i < kParts; ++i) sums = add_products(sums, x.words_[i], y.words_[i]);
    return reinterpret_cast<IntLanes>(sums);
  }

 private:
  static constexpr Index kParts = 16 / kLanes;
  Words words_[kParts];
};

/// 2 * kLanes elements of a block from `first` on, before they are scaled, and those below them in another row.
struct PairsOfRows {
  Words low, high;

  template <class Block>
  PairsOfRows(const Block& block, const Block& other, Index first) noexcept {
    const Words x = load_words(block, first), y = load_words(other, first);
    low = low_pairs(x, y);
    high = high_pairs(x, y);
  }
};

/// Sums of columns of such rows, each times an integer of 16 bits. Exact for 512 rows of bytes: they are below 2^31.
class SumsOfRows {
 public:
  void add(const PairsOfRows& rows, const std::int16_t* factors) noexcept {
    std::int32_t pair;
    std::memcpy(&pair, factors, sizeof pair);
    const Words by = in_all_lanes(pair);
    low_ = in_register(add_products(low_, rows.low, by));  // which g++ else keeps on the stack
    high_ = in_register(add_products(high_, rows.high, by));
  }
  /// to += unit * sums, for 2 * kLanes columns.
  void add_to(float* to, float unit) const noexcept { add_to(to, unit, std::make_index_sequence<kLanes>{}); }

 private:
  /// Columns lie in groups of four, of which every other one is in `low_`.
  template <std::size_t... i>
  void add_to(float* to, float unit, std::index_sequence<i...>) const noexcept {
    constexpr auto source = [](Index column) {
      return static_cast<int>(column / 4 % 2 * kLanes + column / 8 * 4 + column % 4);
    };
    const Lanes low = to_lanes(low_), high = to_lanes(high_);
    const Lanes first = __builtin_shufflevector(low, high, source(i)...);
    const Lanes second = __builtin_shufflevector(low, high, source(kLanes + i)...);
    store_lanes(unit * first + load_lanes(to), to);
    store_lanes(unit * second + load_lanes(to + kLanes), to + kLanes);
  }

  Words low_{}, high_{};
};

#else

void store_rounded_lanes(Lanes low, Lanes high, std::int16_t* to) noexcept;  // these only where there are wide loads
struct WideWords {
  template <class From>
  explicit WideWords(const From& from) noexcept;
  void keep_in_registers() noexcept;
};
[[nodiscard]] IntLanes dots(const WideWords& x, const WideWords& y) noexcept;
struct PairsOfRows {
  template <class Block>
  PairsOfRows(const Block& block, const Block& other, Index first) noexcept;
};
struct SumsOfRows {
  void add(const PairsOfRows& rows, const std::int16_t* factors) noexcept;
  void add_to(float* to, float unit) const noexcept;
};

#endif

}  // namespace kvfold::detail
