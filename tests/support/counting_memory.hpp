/// \file
/// A heap that counts, for stores that take their memory as a template parameter.
#pragma once

#include <algorithm>
#include <cstddef>

#include "kvfold/storage/ragged_cache.hpp"

namespace kvfold::test {

/// `HeapMemory`, with a count of live bytes and a plan of when to fail. `Tag` gives each user counters of its own.
template <class Tag>
struct CountingMemory {
  static inline std::size_t live = 0;
  static inline std::size_t most = 0;  ///< largest `live` since `reset`
  static inline int calls = 0;
  static inline int fail_from = -1;  ///< from this call on, nothing can grow; -1: memory never ends

  static void reset() {
    most = live;
    calls = 0;
    fail_from = -1;
  }

  [[nodiscard]] static void* resize(void* block, std::size_t old_bytes, std::size_t new_bytes) noexcept {
    const bool fails = fail_from >= 0 && calls >= fail_from && new_bytes > old_bytes;
    ++calls;
    if (fails) return nullptr;
    live += new_bytes;
    live -= old_bytes;
    most = std::max(most, live);
    return HeapMemory::resize(block, old_bytes, new_bytes);
  }
};

}  // namespace kvfold::test
