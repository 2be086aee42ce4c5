/// \file
/// A mode of x86 processors in which inference engines compute.
#pragma once

#if defined(__SSE2__)
#include <xmmintrin.h>

namespace kvfold::test {

/// Flushes subnormal results to zero and reads subnormal operands as zero, as inference engines do.
class FlushingSubnormals {
 public:
  FlushingSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040u); }
  ~FlushingSubnormals() { _mm_setcsr(saved_); }
  FlushingSubnormals(const FlushingSubnormals&) = delete;
  FlushingSubnormals& operator=(const FlushingSubnormals&) = delete;

 private:
  unsigned saved_;
};

}  // namespace kvfold::test

#endif
