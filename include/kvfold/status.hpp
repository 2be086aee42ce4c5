/// \file
/// How the library says no: a code, the argument it is about, and why. No exceptions, no allocation.
#pragma once

#include <optional>
#include <string_view>
#include <utility>

#include "kvfold/detail/assert.hpp"
#include "kvfold/types.hpp"

namespace kvfold {

enum class StatusCode : unsigned char {
  ok,
  invalid_argument,     ///< a value outside of its documented range
  size_mismatch,        ///< two sizes that must agree do not
  not_finite,           ///< NaN or infinity where a number is needed
  unsupported,          ///< the view or the evidence lacks something that the chosen options need
  workspace_too_small,  ///< the workspace holds fewer bytes than `workspace_bytes` asks for
  out_of_memory,        ///< an owning container could not allocate
  engine_failed,        ///< the engine did not do what an adaptor asked of it
};

[[nodiscard]] constexpr std::string_view to_string(StatusCode code) noexcept {
  switch (code) {
    case StatusCode::ok: return "ok";
    case StatusCode::invalid_argument: return "invalid argument";
    case StatusCode::size_mismatch: return "size mismatch";
    case StatusCode::not_finite: return "not finite";
    case StatusCode::unsupported: return "unsupported";
    case StatusCode::workspace_too_small: return "workspace too small";
    case StatusCode::out_of_memory: return "out of memory";
    case StatusCode::engine_failed: return "engine failed";
  }
  return "unknown";
}

/// The outcome of a fallible call. `argument()` names what was wrong, `detail()` says why; both are literals.
class [[nodiscard]] Status {
 public:
  constexpr Status() noexcept = default;
  constexpr Status(StatusCode code, const char* argument, const char* detail, Index head = -1, Index row = -1) noexcept
      : code_(code), argument_(argument), detail_(detail), head_(head), row_(row) {}

  [[nodiscard]] constexpr bool ok() const noexcept { return code_ == StatusCode::ok; }
  [[nodiscard]] constexpr StatusCode code() const noexcept { return code_; }
  [[nodiscard]] constexpr std::string_view argument() const noexcept { return argument_; }
  [[nodiscard]] constexpr std::string_view detail() const noexcept { return detail_; }
  [[nodiscard]] constexpr Index head() const noexcept { return head_; }  ///< KV head concerned, or -1
  [[nodiscard]] constexpr Index row() const noexcept { return row_; }    ///< row concerned, or -1

 private:
  StatusCode code_ = StatusCode::ok;
  const char* argument_ = "";
  const char* detail_ = "";
  Index head_ = -1;
  Index row_ = -1;
};

/// A value, or the status that says why there is none.
template <class T>
class [[nodiscard]] Result {
 public:
  Result(T value) : value_(std::move(value)) {}                                   // NOLINT: implicit on purpose
  Result(Status error) noexcept : status_(error) { KVFOLD_ASSERT(!error.ok()); }  // NOLINT: implicit on purpose

  [[nodiscard]] bool ok() const noexcept { return value_.has_value(); }
  [[nodiscard]] Status status() const noexcept { return status_; }
  /// The value; the result must be ok.
  [[nodiscard]] T& value() & noexcept {
    KVFOLD_ASSERT(ok());
    return *value_;
  }
  [[nodiscard]] const T& value() const& noexcept {
    KVFOLD_ASSERT(ok());
    return *value_;
  }
  [[nodiscard]] T&& value() && noexcept {
    KVFOLD_ASSERT(ok());
    return std::move(*value_);
  }
  [[nodiscard]] T& operator*() & noexcept { return value(); }
  [[nodiscard]] const T& operator*() const& noexcept { return value(); }
  [[nodiscard]] T* operator->() noexcept { return &value(); }
  [[nodiscard]] const T* operator->() const noexcept { return &value(); }

 private:
  std::optional<T> value_;
  Status status_;
};

}  // namespace kvfold
