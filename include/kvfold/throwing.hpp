/// \file
/// For programs that use exceptions: statuses as text and as throws. Not part of the umbrella header.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>

#include "kvfold/status.hpp"

namespace kvfold {

/// "argument: detail (code, head 3, row 17)".
[[nodiscard]] inline std::string to_text(const Status& status) {
  if (status.ok()) return "ok";
  std::string text(status.argument());
  text.append(": ").append(status.detail()).append(" (").append(to_string(status.code()));
  if (status.head() >= 0) text.append(", head ").append(std::to_string(status.head()));
  if (status.row() >= 0) text.append(", row ").append(std::to_string(status.row()));
  return text.append(")");
}

/// A status that was not ok.
class Error : public std::runtime_error {
 public:
  explicit Error(Status status) : std::runtime_error(to_text(status)), status_(status) {}
  [[nodiscard]] Status status() const noexcept { return status_; }

 private:
  Status status_;
};

inline void or_throw(Status status) {
  if (!status.ok()) throw Error(status);
}

template <class T>
[[nodiscard]] T or_throw(Result<T> result) {
  if (!result.ok()) throw Error(result.status());
  return std::move(result).value();
}

}  // namespace kvfold
