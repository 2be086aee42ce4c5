/// \file
/// Counts every call to the heap while something works. To be included by one source file of a program.
///
/// On glibc, malloc and its siblings are replaced in the program; operator new and Eigen's allocation end there as
/// well. Elsewhere, and under sanitizers, which bring a heap of their own, nothing is counted: `COUNTS_HEAP_CALLS` is
/// 0.
#pragma once

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdlib>

#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer) || __has_feature(memory_sanitizer)
#define COUNTS_HEAP_CALLS 0
#endif
#endif
#if !defined(COUNTS_HEAP_CALLS) && defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define COUNTS_HEAP_CALLS 1
#endif
#ifndef COUNTS_HEAP_CALLS
#define COUNTS_HEAP_CALLS 0
#endif

namespace kvfold::test {

inline constinit std::atomic<bool> counting{false};
inline constinit std::atomic<long> heap_calls{0};

[[maybe_unused]] inline void note_heap_call() noexcept {
  if (counting.load(std::memory_order_relaxed)) heap_calls.fetch_add(1, std::memory_order_relaxed);
}

}  // namespace kvfold::test

#if COUNTS_HEAP_CALLS
// NOLINTBEGIN(bugprone-reserved-identifier,readability-identifier-naming): the names of glibc
extern "C" {
void* __libc_malloc(std::size_t size) noexcept;
void* __libc_calloc(std::size_t count, std::size_t size) noexcept;
void* __libc_realloc(void* block, std::size_t size) noexcept;
void* __libc_memalign(std::size_t alignment, std::size_t size) noexcept;
void __libc_free(void* block) noexcept;

void* malloc(std::size_t size) noexcept {
  kvfold::test::note_heap_call();
  return __libc_malloc(size);
}
void* calloc(std::size_t count, std::size_t size) noexcept {
  kvfold::test::note_heap_call();
  return __libc_calloc(count, size);
}
void* realloc(void* block, std::size_t size) noexcept {
  kvfold::test::note_heap_call();
  return __libc_realloc(block, size);
}
void* memalign(std::size_t alignment, std::size_t size) noexcept {
  kvfold::test::note_heap_call();
  return __libc_memalign(alignment, size);
}
void* aligned_alloc(std::size_t alignment, std::size_t size) noexcept {
  kvfold::test::note_heap_call();
  return __libc_memalign(alignment, size);
}
int posix_memalign(void** block, std::size_t alignment, std::size_t size) noexcept {
  kvfold::test::note_heap_call();
  *block = __libc_memalign(alignment, size);
  return *block == nullptr ? ENOMEM : 0;
}
void free(void* block) noexcept {
  if (block != nullptr)
    kvfold::test::note_heap_call();  // Eigen frees the null pointers of buffers that it did not need
  __libc_free(block);
}
}
// NOLINTEND(bugprone-reserved-identifier,readability-identifier-naming)
#endif

namespace kvfold::test {

/// How often the heap was called, by any thread, while f ran.
template <class F>
[[nodiscard]] long heap_calls_of(F f) {
  heap_calls = 0;
  counting = true;
  f();
  counting = false;
  return heap_calls;
}

}  // namespace kvfold::test
