/// \file
/// A register of floats, of g++'s and clang's vector types, which exist on every target.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "kvfold/types.hpp"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace kvfold::detail {

#if defined(__AVX512BW__)
inline constexpr Index kLanes = 16;
/// A mask for instructions that have one: g++ 12 warns of what those without it leave undefined.
inline constexpr std::uint16_t kAllLanes = 0xffff;
#elif defined(__AVX__)
inline constexpr Index kLanes = 8;
#else
inline constexpr Index kLanes = 4;
#endif

/// As many floats as the target's registers hold: a vector type of g++ and clang, which they have on every target.
using Lanes [[gnu::vector_size(kLanes * sizeof(float))]] = float;
using IntLanes [[gnu::vector_size(kLanes * sizeof(std::int32_t))]] = std::int32_t;

using LanesInMemory [[gnu::vector_size(kLanes * sizeof(float)), gnu::aligned(alignof(float)), gnu::may_alias]] = float;

/// Neither needs aligned memory.
[[nodiscard]] inline Lanes load_lanes(const float* from) noexcept {
  return *reinterpret_cast<const LanesInMemory*>(from);
}
inline void store_lanes(Lanes x, float* to) noexcept { *reinterpret_cast<LanesInMemory*>(to) = x; }

/// x, in a register, of which compilers know nothing: they neither read it again from memory for each use, which takes
/// longer than the arithmetic, nor rearrange arithmetic over it.
[[nodiscard]] inline Lanes in_register(Lanes x) noexcept {
#if defined(__SSE2__)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

inline constexpr Index kCacheLine = 64;  ///< bytes
/// Where `offset` bytes after an address is, which need not be in what it points into.
[[nodiscard]] inline std::uintptr_t place_after(const void* from, Index offset) noexcept {
  return reinterpret_cast<std::uintptr_t>(from) + static_cast<std::uintptr_t>(offset);
}
enum class Cache { kFirst, kSecond };
/// Asks for the cache line `offset` bytes after an address; harmless where nothing is. What is on its way to the first cache
/// holds one of the few places that all reads need, so what is far ahead goes to the second.
template <Cache kTo = Cache::kFirst>
inline void fetch_line(const void* from, Index offset) noexcept {
  __builtin_prefetch(reinterpret_cast<const void*>(place_after(from, offset)), 0, kTo == Cache::kFirst ? 3 : 2);
  // g++ takes functions that do nothing but prefetch for ones without effects, and drops calls of them.
  asm volatile("");
}

/// Bytes from there to the next cache line, in [1, kCacheLine].
[[nodiscard]] inline Index rest_of_line(const void* from, Index offset) noexcept {
  return kCacheLine - static_cast<Index>(place_after(from, offset) % kCacheLine);
}

/// The larger and the smaller of each two, x where they do not compare. g++ does not find the instructions for this.
#if defined(__AVX512BW__)
[[nodiscard]] inline Lanes larger(Lanes x, Lanes y) noexcept { return _mm512_maskz_max_ps(kAllLanes, y, x); }
[[nodiscard]] inline Lanes smaller(Lanes x, Lanes y) noexcept { return _mm512_maskz_min_ps(kAllLanes, y, x); }
#elif defined(__AVX__)
[[nodiscard]] inline Lanes larger(Lanes x, Lanes y) noexcept { return _mm256_max_ps(y, x); }
[[nodiscard]] inline Lanes smaller(Lanes x, Lanes y) noexcept { return _mm256_min_ps(y, x); }
#elif defined(__SSE2__)
[[nodiscard]] inline Lanes larger(Lanes x, Lanes y) noexcept { return _mm_max_ps(y, x); }
[[nodiscard]] inline Lanes smaller(Lanes x, Lanes y) noexcept { return _mm_min_ps(y, x); }
#else
[[nodiscard]] inline Lanes larger(Lanes x, Lanes y) noexcept { return x < y ? y : x; }
[[nodiscard]] inline Lanes smaller(Lanes x, Lanes y) noexcept { return x > y ? y : x; }
#endif

/// Bit i tells whether lane i of x is above that of y.
[[nodiscard]] inline std::uint32_t lanes_above(Lanes x, Lanes y) noexcept {
#if defined(__AVX512BW__)
  return _mm512_cmp_ps_mask(x, y, _CMP_GT_OQ);
#elif defined(__AVX__)
  return static_cast<std::uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(x, y, _CMP_GT_OQ)));
#elif defined(__SSE2__)
  return static_cast<std::uint32_t>(_mm_movemask_ps(_mm_cmpgt_ps(x, y)));
#else
  std::uint32_t bits = 0;
  for (Index i = 0; i < kLanes; ++i) bits |= static_cast<std::uint32_t>(x[i] > y[i]) << i;
  return bits;
#endif
}

/// Calls f with each constant from 0 to kCount - 1: elements of arrays that only these index are in registers, and g++ does
/// not store them where a loop ends.
template <Index kCount, class F>
[[gnu::always_inline]] inline void for_constants(const F& f) noexcept {
  [&]<Index... i>(std::integer_sequence<Index, i...>) { (f(std::integral_constant<Index, i>{}), ...); }
  (std::make_integer_sequence<Index, kCount>{});
}

/// All of x = 0. Of a loop, or of `= {}`, g++ makes a call or an instruction that sets memory, for registers.
template <std::size_t n>
[[gnu::always_inline]] inline void clear(Lanes (&x)[n]) noexcept {
  for_constants<static_cast<Index>(n)>([&](auto i) { x[i] = Lanes{}; });
}

[[nodiscard]] inline float sum_of_lanes(Lanes x) noexcept {
  float part[kLanes];
  store_lanes(x, part);
  for (Index half = kLanes / 2; half > 0; half /= 2) {
    for (Index i = 0; i < half; ++i) part[i] += part[half + i];
  }
  return part[0];
}

/// Adds the lower half of every segment to its upper half: the segments of x, then those of y, half as wide as before.
template <Index kSegment, std::size_t... i>
[[nodiscard]] Lanes fold_segments(Lanes x, Lanes y, std::index_sequence<i...>) noexcept {
  constexpr auto source = [](Index lane, Index upper) {
    constexpr Index kHalf = kSegment / 2, kInEach = kLanes / kSegment;
    const Index segment = lane / kHalf;
    return static_cast<int>(segment / kInEach * kLanes + segment % kInEach * kSegment + upper * kHalf + lane % kHalf);
  };
  return __builtin_shufflevector(x, y, source(i, 0)...) + __builtin_shufflevector(x, y, source(i, 1)...);
}

/// Adds halves of groups of four lanes, which processors do fastest: the first time to (x, y, x, y), then to (x, x, y, y).
template <bool kFirst, std::size_t... i>
[[nodiscard]] Lanes fold_groups(Lanes x, Lanes y, std::index_sequence<i...>) noexcept {
  constexpr auto source = [](Index lane, Index upper) {
    const Index in_group = lane % 4, from_y = kFirst ? in_group % 2 : in_group / 2;
    const Index place = kFirst ? in_group / 2 : in_group % 2;
    return static_cast<int>(from_y * kLanes + lane / 4 * 4 + upper * 2 + place);
  };
  return __builtin_shufflevector(x, y, source(i, 0)...) + __builtin_shufflevector(x, y, source(i, 1)...);
}

/// Lane i of the result is the sum of the lanes of x[i]; there are kLanes of them when it is called.
template <std::size_t kCount>
[[nodiscard, gnu::always_inline]] inline Lanes sums_of_each(const Lanes (&x)[kCount]) noexcept {
  constexpr auto kSize = static_cast<Index>(kCount);
  constexpr auto kIndices = std::make_index_sequence<kLanes>{};
  if constexpr (kCount == 1) {
    return x[0];
  } else {
    Lanes folded[kCount / 2];
    for (std::size_t i = 0; i < kCount / 2; ++i) {
      if constexpr (kSize > kLanes / 4) {
        folded[i] = fold_groups<kSize == kLanes>(x[2 * i], x[2 * i + 1], kIndices);
      } else {
        folded[i] = fold_segments<4 * kSize>(x[2 * i], x[2 * i + 1], kIndices);
      }
    }
    return sums_of_each(folded);
  }
}

/// The first `count` lanes, 1 to kLanes of them, and a number in the others.
[[nodiscard]] inline Lanes load_first_lanes(const float* from, Index count, float others) noexcept {
  if (count == kLanes) return load_lanes(from);  // a constant count is no call
  float x[kLanes];
  std::fill_n(x, kLanes, others);
  std::copy_n(from, count, x);
  return load_lanes(x);
}
inline void store_first_lanes(Lanes x, Index count, float* to) noexcept {
  if (count == kLanes) return store_lanes(x, to);
  float all[kLanes];
  store_lanes(x, all);
  std::copy_n(all, count, to);
}

/// Calls f with a constant of 1 to kMost.
template <Index kMost, class F>
void with_constant(Index n, F f) noexcept {
  if constexpr (kMost > 1) {
    if (n < kMost) return with_constant<kMost - 1>(n, f);
  }
  f(std::integral_constant<Index, kMost>{});
}

/// Calls f(first row, constant number of rows) for up to kMost of m rows at a time: kernels have the sums of so many in
/// registers.
template <Index kMost, class F>
void for_groups_of_rows(Index m, F f) noexcept {
  for (Index i = 0; i < m; i += kMost) {
    with_constant<kMost>(std::min(kMost, m - i), [&](auto rows) { f(i, rows); });
  }
}

}  // namespace kvfold::detail
