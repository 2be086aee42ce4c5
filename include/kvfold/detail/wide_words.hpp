/// \file
/// Registers of integers of 16 bits and sums of their products, where the target has wide_loads.hpp: there are
/// instructions for two products in each lane, and with VNNI for adding them in the same step. Sums are the same bits.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "kvfold/detail/lanes.hpp"
#include "kvfold/detail/wide_loads.hpp"
#include "kvfold/storage/quantised.hpp"
#include "kvfold/types.hpp"

namespace kvfold::detail {

/// Rows that `WordsOfBlocks` has side by side: a quarter of each register is of one row.
inline constexpr Index kRowsOfWords = 4;
/// Words of a block of another row, once for each of them.
inline constexpr Index kSpreadBlock = kRowsOfWords * kBlockSize;

/// How products are added to sums.
enum class Adding {
  kAsCompiled,   // in the same step where the target has VNNI
  kWithAvxVnni,  // in the same step: the caller knows that the processor has AVX-VNNI
};

#if defined(__AVX2__) && defined(__F16C__) && !defined(__AVX512BW__) && !defined(__AVXVNNI__)
/// Whether the second one may be faster.
inline constexpr bool kAddingIsAsked = true;
#else
inline constexpr bool kAddingIsAsked = false;
#endif

/// Where element d of such a block lies first. The next kLanes / 2 words are of every other element, then they come again.
[[nodiscard]] constexpr Index place_of_word(Index d) noexcept {
  const Index pair_of_registers = d / kLanes, is_odd = d % 2;
  return (2 * pair_of_registers + is_odd) * 2 * kLanes + d % kLanes / 2;
}

#if defined(__AVX2__) && defined(__F16C__)

/// The lower halves of bytes, less 8.
[[nodiscard]] inline __m256i signed_halves(__m256i bytes) noexcept {
  return _mm256_sub_epi8(_mm256_and_si256(bytes, _mm256_set1_epi8(0xf)), _mm256_set1_epi8(8));
}

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
  return _mm512_cvtepi8_epi16(signed_halves(_mm256_set_m128i(_mm_srli_epi16(pairs, 4), pairs)));
}
/// 16 elements of each of four blocks, before they are scaled: one after the other, those from 16 on in `to[1]`.
inline void load_bytes(const BlockQ8_0* const (&blocks)[kRowsOfWords], Words (&to)[2]) noexcept {
  const auto load = [&](Index i) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(blocks[i]->values.data()));
  };
  const auto two = [&](Index i) {
    return _mm512_maskz_inserti64x4(0xff, _mm512_castsi256_si512(load(i)), load(i + 1), 1);
  };
  const Words x = two(0), y = two(2);
  to[0] = _mm512_maskz_shuffle_i64x2(0xff, x, y, 0b10'00'10'00);
  to[1] = _mm512_maskz_shuffle_i64x2(0xff, x, y, 0b11'01'11'01);
}
inline void load_bytes(const BlockQ4_0* const (&blocks)[kRowsOfWords], Words (&to)[2]) noexcept {
  const auto two = [&](Index i) { return load_twice_16_bytes(blocks[i]->pairs.data(), blocks[i + 1]->pairs.data()); };
  const Words pairs = _mm512_maskz_inserti64x4(0xff, _mm512_castsi256_si512(two(0)), two(2), 1);
  const auto bytes = [](Words halves) {
    return _mm512_sub_epi8(_mm512_and_si512(halves, _mm512_set1_epi8(0xf)), _mm512_set1_epi8(8));
  };
  to[0] = bytes(pairs);
  to[1] = bytes(_mm512_srli_epi16(pairs, 4));
}
/// Bytes of even or odd numbers, as words.
[[nodiscard]] inline Words even_bytes(Words x) noexcept { return _mm512_maddubs_epi16(_mm512_set1_epi16(1), x); }
[[nodiscard]] inline Words odd_bytes(Words x) noexcept { return _mm512_maddubs_epi16(_mm512_set1_epi16(1 << 8), x); }
[[nodiscard]] inline Words in_all_lanes(std::int32_t x) noexcept { return _mm512_set1_epi32(x); }
/// Each of the first half of every four lanes' words beside that of y, and of the second half.
[[nodiscard]] inline Words low_pairs(Words x, Words y) noexcept { return _mm512_unpacklo_epi16(x, y); }
[[nodiscard]] inline Words high_pairs(Words x, Words y) noexcept { return _mm512_unpackhi_epi16(x, y); }
/// x[2 i] * y[2 i] + x[2 i + 1] * y[2 i + 1] in each lane i.
[[nodiscard]] inline Words products(Words x, Words y) noexcept { return _mm512_madd_epi16(x, y); }
/// sums + products(x, y).
template <Adding>
[[nodiscard]] Words add_products(Words sums, Words x, Words y) noexcept {
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

/// Each of four numbers in kLanes / 4 lanes.
[[nodiscard]] inline Lanes spread_numbers(__m128 x) noexcept {
  const __m512i source = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  return _mm512_maskz_permutexvar_ps(kAllLanes, source, _mm512_castps128_ps512(x));
}
/// Sums of the kLanes / 4 lanes that each of four rows has in kLanes / 4 registers: [register][row].
template <std::size_t... i>
[[nodiscard]] Lanes sums_of_rows(const Lanes* x, std::index_sequence<i...> lanes) noexcept {
  const Lanes low = fold_groups<true>(x[0], x[1], lanes), high = fold_groups<true>(x[2], x[3], lanes);
  const Lanes sums = fold_groups<false>(low, high, lanes);  // [row][register]
  return __builtin_shufflevector(sums, sums, static_cast<int>(i % 4 * 4 + i / 4)...);
}
[[nodiscard]] inline Lanes sums_of_rows(const Lanes* x) noexcept {
  return sums_of_rows(x, std::make_index_sequence<kLanes>{});
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
/// 16 elements of each of two blocks, before they are scaled, from `first` on.
[[nodiscard]] inline Words load_bytes(const BlockQ8_0& x, const BlockQ8_0& y, Index first) noexcept {
  return load_twice_16_bytes(x.values.data() + first, y.values.data() + first);
}
[[nodiscard]] inline Words load_bytes(const BlockQ4_0& x, const BlockQ4_0& y, Index first) noexcept {
  const Words pairs = load_twice_16_bytes(x.pairs.data(), y.pairs.data());
  return signed_halves(first == 0 ? pairs : _mm256_srli_epi16(pairs, 4));
}
/// Eight elements of each of four blocks: one after the other, those from 8 i on in `to[i]`.
template <class Block>
void load_bytes(const Block* const (&blocks)[kRowsOfWords], Words (&to)[4]) noexcept {
  for (Index half = 0; half < 2; ++half) {
    const Words even = load_bytes(*blocks[0], *blocks[2], 16 * half);
    const Words odd = load_bytes(*blocks[1], *blocks[3], 16 * half);
    to[2 * half] = _mm256_unpacklo_epi64(even, odd);
    to[2 * half + 1] = _mm256_unpackhi_epi64(even, odd);
  }
}
[[nodiscard]] inline Words even_bytes(Words x) noexcept { return _mm256_maddubs_epi16(_mm256_set1_epi16(1), x); }
[[nodiscard]] inline Words odd_bytes(Words x) noexcept { return _mm256_maddubs_epi16(_mm256_set1_epi16(1 << 8), x); }
[[nodiscard]] inline Words in_all_lanes(std::int32_t x) noexcept { return _mm256_set1_epi32(x); }
[[nodiscard]] inline Words low_pairs(Words x, Words y) noexcept { return _mm256_unpacklo_epi16(x, y); }
[[nodiscard]] inline Words high_pairs(Words x, Words y) noexcept { return _mm256_unpackhi_epi16(x, y); }
[[nodiscard]] inline Words products(Words x, Words y) noexcept { return _mm256_madd_epi16(x, y); }
template <Adding kAdding>
[[nodiscard]] Words add_products(Words sums, Words x, Words y) noexcept {
#if defined(__AVXVNNI__)
  return _mm256_dpwssd_avx_epi32(sums, x, y);
#else
  if constexpr (kAdding == Adding::kWithAvxVnni) {
    // By hand: functions that are compiled for AVX-VNNI would not be put into those that call them.
#if defined(__clang__)  // which always takes memory where it may
    asm("%{vex%} vpdpwssd %2, %1, %0" : "+x"(sums) : "x"(x), "x"(y));
#else
    asm("%{vex%} vpdpwssd %2, %1, %0" : "+x"(sums) : "x"(x), "xm"(y));
#endif
    return sums;
  }
  return _mm256_add_epi32(sums, products(x, y));
#endif
}

inline void store_rounded_lanes(Lanes low, Lanes high, std::int16_t* to) noexcept {
  const __m256i packed = _mm256_packs_epi32(_mm256_cvtps_epi32(low), _mm256_cvtps_epi32(high));  // by halves of both
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(packed, 0b11'01'10'00));
}

[[nodiscard]] inline Lanes spread_numbers(__m128 x) noexcept {
  return _mm256_permutevar8x32_ps(_mm256_castps128_ps256(x), _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3));
}
[[nodiscard]] inline Lanes sums_of_rows(const Lanes* x) noexcept {
  const Lanes even = __builtin_shufflevector(x[0], x[1], 0, 2, 8, 10, 4, 6, 12, 14);
  const Lanes odd = __builtin_shufflevector(x[0], x[1], 1, 3, 9, 11, 5, 7, 13, 15);
  const Lanes sums = even + odd;  // rows 0 and 1 of both registers, then rows 2 and 3
  return __builtin_shufflevector(sums, sums, 0, 1, 4, 5, 2, 3, 6, 7);
}

#endif

[[nodiscard]] inline Words sums_of(Words x, Words y) noexcept {
  return reinterpret_cast<Words>(reinterpret_cast<IntLanes>(x) + reinterpret_cast<IntLanes>(y));
}
[[nodiscard]] inline Lanes to_lanes(Words sums) noexcept {
  return __builtin_convertvector(reinterpret_cast<IntLanes>(sums), Lanes);
}

/// x, of which compilers know nothing: see lanes.hpp.
[[nodiscard]] inline Words in_register(Words x) noexcept {
  asm("" : "+x"(x));
  return x;
}

/// 2 * kLanes neighbours of a row, to `place_of_word` of the first.
inline void spread_words(const std::int16_t* from, std::int16_t* to) noexcept {
  constexpr Index kWords = kLanes / 2;
  for (Index first = 0; first < 2 * kLanes; first += kLanes) {
    for (const Index is_odd : {0, 1}) {
      std::int16_t words[kWords];
      for (Index i = 0; i < kWords; ++i) words[i] = from[first + 2 * i + is_odd];
      for (Index row = 0; row < kRowsOfWords; ++row) to = std::copy_n(words, kWords, to);
    }
  }
}

/// One block of each of four rows: a register has kLanes / 2 words of each.
class WordsOfBlocks {
 public:
  template <class Block>
  explicit WordsOfBlocks(const Block* const (&blocks)[kRowsOfWords]) noexcept
      : scales_(spread_numbers(_mm_cvtph_ps(gather_4_f16([&](Index i) { return &blocks[i]->scale; })))) {
    Words bytes[kParts / 2];
    load_bytes(blocks, bytes);
    for (Index i = 0; i < kParts; i += 2) {
      words_[i] = in_register(even_bytes(bytes[i / 2]));
      words_[i + 1] = in_register(odd_bytes(bytes[i / 2]));
    }
  }
  /// sums + what the blocks mean times the words of another row, as `spread_words` lays them: kLanes / 4 lanes for each row.
  /// Before the blocks' scales it is exact, of bytes and of words but -2^15: all lanes together are below 2^27.
  template <Adding kAdding>
  [[nodiscard]] Lanes add_dots(const std::int16_t* words, Lanes sums) const noexcept {
    Words dots = products(words_[0], load_words(words));
    for (Index i = 1; i < kParts; ++i) {
      dots = in_register(add_products<kAdding>(dots, words_[i], load_words(words + i * 2 * kLanes)));
    }
    return in_register(to_lanes(dots) * scales_ + sums);
  }

 private:
  static constexpr Index kParts = kSpreadBlock / (2 * kLanes);
  Words words_[kParts];
  Lanes scales_;
};

/// A block of another row, which is multiplied with one block after the other.
class BlockOfWords {
 public:
  /// \param words [kBlockSize], in their order
  explicit BlockOfWords(const std::int16_t* words) noexcept {
    for (Index i = 0; i < kParts; ++i) words_[i] = in_register(load_words(words + i * 2 * kLanes));
  }
  /// sums + what it means times what a block of a row means; exact before the block's scale.
  template <Adding kAdding, class Block>
  [[nodiscard]] Lanes add_dots(const Block& block, Lanes sums) const noexcept {
    Words dots = products(load_words(block, 0), words_[0]);
    for (Index i = 1; i < kParts; ++i) {
      dots = in_register(add_products<kAdding>(dots, words_[i], load_words(block, i * 2 * kLanes)));
    }
    return in_register(to_lanes(dots) * f16_in_all_lanes(&block.scale) + sums);
  }

 private:
  static constexpr Index kParts = kBlockSize / (2 * kLanes);
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
  template <Adding kAdding>
  void add(const PairsOfRows& rows, const std::int16_t* factors) noexcept {
    std::int32_t pair;
    std::memcpy(&pair, factors, sizeof pair);
    const Words by = in_all_lanes(pair);
    low_ = in_register(add_products<kAdding>(low_, rows.low, by));  // which g++ else keeps on the stack
    high_ = in_register(add_products<kAdding>(high_, rows.high, by));
  }
  void add(const SumsOfRows& other) noexcept {
    low_ = sums_of(low_, other.low_);
    high_ = sums_of(high_, other.high_);
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
void spread_words(const std::int16_t* from, std::int16_t* to) noexcept;
[[nodiscard]] Lanes sums_of_rows(const Lanes* x) noexcept;
struct WordsOfBlocks {
  template <class Block>
  explicit WordsOfBlocks(const Block* const (&blocks)[kRowsOfWords]) noexcept;
  template <Adding kAdding>
  [[nodiscard]] Lanes add_dots(const std::int16_t* words, Lanes sums) const noexcept;
};
struct BlockOfWords {
  explicit BlockOfWords(const std::int16_t* words) noexcept;
  template <Adding kAdding, class Block>
  [[nodiscard]] Lanes add_dots(const Block& block, Lanes sums) const noexcept;
};
struct PairsOfRows {
  template <class Block>
  PairsOfRows(const Block& block, const Block& other, Index first) noexcept;
};
struct SumsOfRows {
  template <Adding kAdding>
  void add(const PairsOfRows& rows, const std::int16_t* factors) noexcept;
  void add(const SumsOfRows& other) noexcept;
  void add_to(float* to, float unit) const noexcept;
};

#endif

}  // namespace kvfold::detail
