/// \file
/// Memory that the caller gives to the library, so that the library needs none of its own.
#pragma once

#include <cstddef>
#include <memory>
#include <new>
#include <span>
#include <utility>

#include "kvfold/status.hpp"

namespace kvfold {

/// Bytes to work in. Ask the stage's `workspace_bytes` for the size. Any alignment will do.
using Workspace = std::span<std::byte>;

/// An owning workspace that only grows.
class WorkspaceBuffer {
 public:
  WorkspaceBuffer() noexcept = default;
  WorkspaceBuffer(WorkspaceBuffer&& other) noexcept
      : data_(std::move(other.data_)), size_(std::exchange(other.size_, 0)) {}
  WorkspaceBuffer& operator=(WorkspaceBuffer&& other) noexcept {
    data_ = std::move(other.data_);
    size_ = std::exchange(other.size_, 0);
    return *this;
  }

  /// Makes at least `bytes` available; allocates only when that is more than ever before.
  Status reserve(std::size_t bytes) noexcept {
    if (bytes <= size_) return {};
    auto* grown = new (std::nothrow) std::byte[bytes];
    if (grown == nullptr) return {StatusCode::out_of_memory, "bytes", "the workspace could not be allocated"};
    data_.reset(grown);
    size_ = bytes;
    return {};
  }
  [[nodiscard]] Workspace get() const noexcept { return {data_.get(), size_}; }
  [[nodiscard]] std::size_t size_bytes() const noexcept { return size_; }

 private:
  std::unique_ptr<std::byte[]> data_;
  std::size_t size_ = 0;
};

}  // namespace kvfold
