/// \file
/// A bump allocator over a workspace. The same layout code measures (over nothing) and places (over memory), so the
/// size that is asked for and the size that is used cannot drift apart.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <span>
#include <type_traits>

#include "kvfold/exec/workspace.hpp"
#include "kvfold/types.hpp"

namespace kvfold::detail {

class Arena {
 public:
  static constexpr std::size_t kAlignment = 64;

  /// An arena that only measures: every `take` returns an empty span.
  Arena() noexcept = default;
  explicit Arena(Workspace memory) noexcept : base_(memory.data()), size_(memory.size()), measuring_(false) {
    const auto address = reinterpret_cast<std::uintptr_t>(base_);
    used_ = (kAlignment - address % kAlignment) % kAlignment;
  }

  /// `a * b * c` objects of T, uninitialised. Empty when measuring, or when the memory ends (`overflowed()`).
  template <class T>
  std::span<T> take(Index a, Index b = 1, Index c = 1) noexcept {
    static_assert(std::is_trivially_copyable_v<T> && std::is_trivially_destructible_v<T>);
    const std::size_t count = multiply(multiply(to_size(a), to_size(b)), to_size(c));
    const std::size_t bytes = multiply(count, sizeof(T));
    const std::size_t start = used_;
    grow(bytes);
    if (measuring_ || overflowed_ || count == 0) return {};
    return {reinterpret_cast<T*>(base_ + start), count};
  }

  /// The rest of the memory, for a stage that lays it out by itself; `bytes` when measuring.
  Workspace take_bytes(std::size_t bytes) noexcept {
    const std::size_t start = used_;
    grow(bytes);
    if (measuring_ || overflowed_) return {};
    return {base_ + start, bytes};
  }

  [[nodiscard]] std::size_t mark() const noexcept { return used_; }
  void rewind(std::size_t mark) noexcept { used_ = mark; }

  [[nodiscard]] bool overflowed() const noexcept { return overflowed_; }
  /// Bytes to ask for: what the layout took at its peak, and room to align the start.
  [[nodiscard]] std::size_t required_bytes() const noexcept { return add(peak_, kAlignment); }

  static constexpr std::size_t multiply(std::size_t a, std::size_t b) noexcept {
    return a != 0 && b > kMax / a ? kMax : a * b;
  }
  static constexpr std::size_t add(std::size_t a, std::size_t b) noexcept { return b > kMax - a ? kMax : a + b; }

 private:
  static constexpr std::size_t kMax = std::numeric_limits<std::size_t>::max();
  static constexpr std::size_t to_size(Index i) noexcept { return i < 0 ? kMax : static_cast<std::size_t>(i); }

  void grow(std::size_t bytes) noexcept {
    const std::size_t padded = bytes > kMax - kAlignment ? kMax : (bytes + kAlignment - 1) / kAlignment * kAlignment;
    used_ = add(used_, padded);
    peak_ = std::max(peak_, used_);
    if (!measuring_ && used_ > size_) overflowed_ = true;
  }

  std::byte* base_ = nullptr;
  std::size_t size_ = 0;
  std::size_t used_ = 0;
  std::size_t peak_ = 0;
  bool measuring_ = true;
  bool overflowed_ = false;
};

[[nodiscard]] inline Status check(const Arena& arena) noexcept {
  if (arena.overflowed()) {
    return {StatusCode::workspace_too_small, "workspace", "holds fewer bytes than workspace_bytes() asks for"};
  }
  return {};
}

}  // namespace kvfold::detail
