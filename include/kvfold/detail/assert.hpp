/// \file
/// Assertions on the library's own invariants. What a caller can cause gets a Status instead.
#pragma once

#ifndef KVFOLD_ENABLE_ASSERTIONS
#define KVFOLD_ENABLE_ASSERTIONS 0
#endif

#if KVFOLD_ENABLE_ASSERTIONS
#include <cstdio>
#include <cstdlib>
/// Stops the program when an invariant of the library is broken; nothing unless KVFOLD_ENABLE_ASSERTIONS is 1.
#define KVFOLD_ASSERT(condition) \
  ((condition)                   \
       ? static_cast<void>(0)    \
       : (std::fprintf(stderr, "%s:%d: kvfold invariant broken: %s\n", __FILE__, __LINE__, #condition), std::abort()))
#else
#define KVFOLD_ASSERT(condition) static_cast<void>(0)
#endif
