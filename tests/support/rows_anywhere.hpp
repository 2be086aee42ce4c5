/// \file
/// Rows for kernels: one after the other, or each at a place of its own.
#pragma once

#include <kvfold/detail/stored_rows.hpp>

#include <cstddef>
#include <vector>

namespace kvfold::test {

/// Rows of `units` each, without gaps.
template <class E>
[[nodiscard]] detail::RowsTogether<E> together(const std::vector<E>& rows, Index units) {
  return {rows.data(), units, static_cast<Index>(rows.size()) / units};
}

/// Copies of rows in memory of their own each, and addresses of two more rows that may be asked for ahead.
template <class E>
class Anywhere {
 public:
  Anywhere(const std::vector<E>& rows, Index units) : units_(units) {
    for (auto row = rows.begin(); row != rows.end(); row += units) copies_.emplace_back(row, row + units);
    for (const std::vector<E>& copy : copies_) to_.push_back(copy.data());
    to_.insert(to_.end(), kAhead, to_.back());
  }
  [[nodiscard]] detail::RowsAnywhere<E> rows() const {
    return {to_.data(), units_, static_cast<Index>(copies_.size()), kAhead, to_.data() + kAhead};
  }

 private:
  static constexpr Index kAhead = 2;
  Index units_;
  std::vector<std::vector<E>> copies_;
  std::vector<const void*> to_;
};

}  // namespace kvfold::test
