/// \file
/// Conversions of stored numbers with the processor's own instructions, where the target has them (AVX2 and F16C): with
/// wide_words.hpp and two functions of lanes.hpp the only explicit SIMD of the library. The loads and stores of rows do as many numbers as
/// fit, and \returns how many; the caller does the others, all of them on other targets. Results are those of the
/// portable loops, bit for bit, but that NaNs which signal in fp16 come out quiet.
///
/// Compilers do not vectorise these loops, or not reliably. Measured on 16 K numbers in cache, 10^9 of them per second,
/// g++ 12 -O3 -march=x86-64-v3, portable loops and these: fp16 2.7 and 28, fp8 4.8 and 12, int8 22 and 31, q8_0 3 and
/// 21, q4_0 2 and 17.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "kvfold/detail/lanes.hpp"
#include "kvfold/types.hpp"

#if defined(__AVX2__) && defined(__F16C__)
#include <immintrin.h>
#endif

namespace kvfold::detail {

#if defined(__AVX2__) && defined(__F16C__)

inline constexpr bool kHasWideLoads = true;

/// 16 bytes from any address.
[[nodiscard]] inline __m128i load_16_bytes(const void* from) noexcept {
  return _mm_loadu_si128(static_cast<const __m128i*>(from));
}
[[nodiscard]] inline __m256i load_twice_16_bytes(const void* low, const void* high) noexcept {
  return _mm256_set_m128i(load_16_bytes(high), load_16_bytes(low));
}

/// 16 signed bytes as floats, times a scale.
inline void widen_16_bytes(__m128i bytes, __m256 scale, float* to) noexcept {
  const __m256 low = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
  const __m256 high = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_unpackhi_epi64(bytes, bytes)));
  _mm256_storeu_ps(to, _mm256_mul_ps(low, scale));
  _mm256_storeu_ps(to + 8, _mm256_mul_ps(high, scale));
}

inline Index load_wide_f16(const void* from, Index n, float* to) noexcept {
  const auto* bytes = static_cast<const unsigned char*>(from);
  const Index whole = n - n % 8;
  const auto load = [&](Index i) { _mm256_storeu_ps(to + i, _mm256_cvtph_ps(load_16_bytes(bytes + 2 * i))); };
  Index i = 0;
  for (; i + 32 <= whole; i += 32) {  // four at a time: a loop's own instructions are as many as a conversion's
    for (const Index j : {0, 8, 16, 24}) load(i + j);
  }
  for (; i < whole; i += 8) load(i);
  return whole;
}

/// Rounds to nearest even, whatever the mode of the thread.
inline Index store_wide_f16(const float* from, Index n, void* to) noexcept {
  auto* bytes = static_cast<unsigned char*>(to);
  const Index whole = n - n % 8;
  for (Index i = 0; i < whole; i += 8) {
    const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes + 2 * i), halves);
  }
  return whole;
}

/// 16 fp8 e4m3 numbers times 2^-8 in fp16: codes' bits, moved by 7, are those of such numbers.
[[nodiscard]] inline __m256i f16_of_16_f8(__m128i from) noexcept {
  const __m256i codes = _mm256_cvtepi8_epi16(from);  // the sign is in the upper nine bits
  const __m256i sign_and_number = _mm256_set1_epi16(static_cast<std::int16_t>(0xbf80));
  const __m256i numbers = _mm256_and_si256(_mm256_slli_epi16(codes, 7), sign_and_number);
  const __m256i is_nan = _mm256_cmpeq_epi16(_mm256_add_epi16(numbers, numbers), _mm256_set1_epi16(0x7f << 8));
  const __m256i moved_nan_to_nan = _mm256_set1_epi16((0x7f << 7) ^ 0x7e00);
  return _mm256_xor_si256(numbers, _mm256_and_si256(is_nan, moved_nan_to_nan));
}

inline Index load_wide_f8(const void* from, Index n, float* to) noexcept {
  const auto* bytes = static_cast<const unsigned char*>(from);
  const __m256 scale = _mm256_set1_ps(0x1p8f);
  const Index whole = n - n % 16;
  for (Index i = 0; i < whole; i += 16) {
    const __m256i halves = f16_of_16_f8(load_16_bytes(bytes + i));
    _mm256_storeu_ps(to + i, _mm256_mul_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(halves)), scale));
    _mm256_storeu_ps(to + i + 8, _mm256_mul_ps(_mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1)), scale));
  }
  return whole;
}

/// One fp16 number, for arithmetic: a NaN that signals is quiet then anyway.
[[nodiscard]] inline float wide_f16(std::uint16_t bits) noexcept { return _cvtsh_ss(bits); }

/// Signed bytes times a scale.
inline Index load_wide_i8(const void* from, Index n, float scale, float* to) noexcept {
  const auto* bytes = static_cast<const unsigned char*>(from);
  const __m256 factor = _mm256_set1_ps(scale);
  const Index whole = n - n % 16;
  for (Index i = 0; i < whole; i += 16) widen_16_bytes(load_16_bytes(bytes + i), factor, to + i);
  return whole;
}

/// Halves of n / 2 bytes less 8, times a scale: the lower ones first.
inline Index load_wide_i4(const void* from, Index n, float scale, float* to) noexcept {
  if (n != 32) return 0;
  const __m128i pairs = load_16_bytes(from), half = _mm_set1_epi8(0xf), eight = _mm_set1_epi8(8);
  const __m256 factor = _mm256_set1_ps(scale);
  widen_16_bytes(_mm_sub_epi8(_mm_and_si128(pairs, half), eight), factor, to);
  widen_16_bytes(_mm_sub_epi8(_mm_and_si128(_mm_srli_epi16(pairs, 4), half), eight), factor, to + 16);
  return n;
}

/// kLanes fp16 numbers.
[[nodiscard]] inline Lanes load_f16_lanes(const void* from) noexcept {
#if defined(__AVX512BW__)
  return _mm512_maskz_cvtph_ps(kAllLanes, _mm256_loadu_si256(static_cast<const __m256i*>(from)));
#else
  return _mm256_cvtph_ps(load_16_bytes(from));
#endif
}

/// kLanes signed bytes.
[[nodiscard]] inline Lanes load_i8_lanes(const void* from) noexcept {
#if defined(__AVX512BW__)
  return _mm512_maskz_cvtepi32_ps(kAllLanes, _mm512_maskz_cvtepi8_epi32(kAllLanes, load_16_bytes(from)));
#else
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadu_si64(from)));
#endif
}

/// kLanes fp8 e4m3 numbers times 2^-8.
[[nodiscard]] inline Lanes load_f8_lanes(const void* from) noexcept {
#if defined(__AVX512BW__)
  return _mm512_maskz_cvtph_ps(kAllLanes, f16_of_16_f8(load_16_bytes(from)));
#else
  return _mm256_cvtph_ps(_mm256_castsi256_si128(f16_of_16_f8(_mm_loadu_si64(from))));
#endif
}

/// 2 * kLanes of them.
inline void load_twice_f8_lanes(const void* from, Lanes (&to)[2]) noexcept {
#if defined(__AVX512BW__)
  for (Index i = 0; i < 2; ++i) to[i] = load_f8_lanes(static_cast<const std::byte*>(from) + i * kLanes);
#else
  const __m256i halves = f16_of_16_f8(load_16_bytes(from));
  to[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
  to[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
#endif
}

/// kLanes bf16 numbers.
[[nodiscard]] inline Lanes load_bf16_lanes(const void* from) noexcept {
#if defined(__AVX512BW__)
  const __m256i halves = _mm256_loadu_si256(static_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(kAllLanes, _mm512_maskz_cvtepu16_epi32(kAllLanes, halves), 16));
#else
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_16_bytes(from)), 16));
#endif
}

/// One fp16 number in all lanes.
[[nodiscard]] inline Lanes f16_in_all_lanes(const void* from) noexcept {
  std::int16_t bits;
  std::memcpy(&bits, from, sizeof bits);
#if defined(__AVX512BW__)
  return _mm512_maskz_cvtph_ps(kAllLanes, _mm256_set1_epi16(bits));
#else
  return _mm256_cvtph_ps(_mm_set1_epi16(bits));
#endif
}

/// Four fp16 numbers from the addresses that at(0) to at(3) give, of which four bytes can be read each.
template <class F>
[[nodiscard]] __m128i gather_4_f16(F at) noexcept {
  const auto load = [&](Index i) {
    std::int32_t bits;
    std::memcpy(&bits, at(i), sizeof bits);
    return _mm_cvtsi32_si128(bits);
  };
  const auto pair = [&](Index i) { return _mm_unpacklo_epi16(load(i), load(i + 1)); };
  return _mm_unpacklo_epi32(pair(0), pair(2));
}

/// Eight of them.
template <class F>
[[nodiscard]] __m128i gather_8_f16(Index first, F at) noexcept {
  const auto four = [&](Index i) { return gather_4_f16([&](Index j) { return at(first + i + j); }); };
  return _mm_unpacklo_epi64(four(0), four(4));
}

/// kLanes fp16 numbers, lane i from the address that at(i) gives, of which four bytes can be read.
template <class F>
[[nodiscard]] Lanes gather_f16_lanes(F at) noexcept {
#if defined(__AVX512BW__)
  return _mm512_maskz_cvtph_ps(kAllLanes, _mm256_set_m128i(gather_8_f16(8, at), gather_8_f16(0, at)));
#else
  return _mm256_cvtph_ps(gather_8_f16(0, at));
#endif
}

#else

inline constexpr bool kHasWideLoads = false;

/// kLanes bf16 numbers.
[[nodiscard]] inline Lanes load_bf16_lanes(const void* from) noexcept {
  using Halves [[gnu::vector_size(kLanes * sizeof(std::uint16_t))]] = std::uint16_t;
  using Words [[gnu::vector_size(kLanes * sizeof(std::uint32_t))]] = std::uint32_t;
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  return std::bit_cast<Lanes>(__builtin_convertvector(halves, Words) << 16);
}

Lanes load_f16_lanes(const void* from) noexcept;  // these only where there are wide loads
Lanes load_i8_lanes(const void* from) noexcept;
Lanes load_f8_lanes(const void* from) noexcept;
void load_twice_f8_lanes(const void* from, Lanes (&to)[2]) noexcept;
template <class F>
Lanes gather_f16_lanes(F at) noexcept;
float wide_f16(std::uint16_t bits) noexcept;
inline Index load_wide_f16(const void*, Index, float*) noexcept { return 0; }
inline Index store_wide_f16(const float*, Index, void*) noexcept { return 0; }
inline Index load_wide_f8(const void*, Index, float*) noexcept { return 0; }
inline Index load_wide_i8(const void*, Index, float, float*) noexcept { return 0; }
inline Index load_wide_i4(const void*, Index, float, float*) noexcept { return 0; }

#endif

}  // namespace kvfold::detail
