/// \file
/// What the processor that the program runs on can do beyond what its code is compiled for.
#pragma once

/// 0: nothing is asked, and kernels have only what the compiler may use. The same in all files of a program.
#ifndef KVFOLD_ENABLE_DISPATCH
#define KVFOLD_ENABLE_DISPATCH 1
#endif

#if KVFOLD_ENABLE_DISPATCH && defined(__GNUC__) && defined(__x86_64__)
#include <cpuid.h>

namespace kvfold::detail {

/// Whether products of integers of 16 bits and their sums are one instruction for registers of 256 bits (AVX-VNNI: Intel
/// from Alder Lake and Sapphire Rapids on, AMD from Zen 5 on). Code that is compiled for AVX2 has all else that it needs.
[[nodiscard]] inline bool has_avx_vnni() noexcept {
  static const bool has = []() noexcept {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & 1U << 4) != 0;
  }();
  return has;
}

/// Whether AMD has made it.
[[nodiscard]] inline bool is_amd() noexcept {
  static const bool is = []() noexcept {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (__get_cpuid(0, &a, &b, &c, &d) == 0) return false;
    return b == signature_AMD_ebx && c == signature_AMD_ecx && d == signature_AMD_edx;
  }();
  return is;
}

}  // namespace kvfold::detail

#else

namespace kvfold::detail {

[[nodiscard]] constexpr bool has_avx_vnni() noexcept { return false; }
[[nodiscard]] constexpr bool is_amd() noexcept { return false; }

}  // namespace kvfold::detail

#endif
