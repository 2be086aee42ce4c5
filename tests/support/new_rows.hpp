/// \file
/// Rows of an engine, to be appended to a cache.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "builders.hpp"
#include "kvfold/status.hpp"
#include "kvfold/view/strided.hpp"

namespace kvfold::test {

/// Rows [first, first + n) of every head, at positions of the same numbers, as an engine lays them out.
struct NewRows {
  std::vector<float> keys, values;
  Strides key_strides, value_strides;
  std::vector<Position> positions;

  /// \param fill fill(h, t, key, value) writes row t of head h
  template <class Fill>
  NewRows(LayerShape shape, Index first, Index n, const Fill& fill, Strides key_order, Strides value_order)
      : keys(static_cast<std::size_t>(shape.kv_heads * n * shape.key_dim)),
        values(static_cast<std::size_t>(shape.kv_heads * n * shape.value_dim)),
        key_strides(key_order),
        value_strides(value_order),
        positions(positions_from(first, n)) {
    std::vector<float> key(static_cast<std::size_t>(shape.key_dim)), value(static_cast<std::size_t>(shape.value_dim));
    for (Index h = 0; h < shape.kv_heads; ++h) {
      for (Index i = 0; i < n; ++i) {
        fill(h, first + i, std::span(key), std::span(value));
        place(key, h, i, key_order, keys);
        place(value, h, i, value_order, values);
      }
    }
  }
  /// `[H][n][D]` and `[H][n][E]`.
  template <class Fill>
  NewRows(LayerShape shape, Index first, Index n, const Fill& fill)
      : NewRows(shape, first, n, fill, Strides::head_major(n, shape.key_dim), Strides::head_major(n, shape.value_dim)) {
  }

  template <class Cache>
  Status append_to(Cache& cache) const {
    return cache.append(keys.data(), key_strides, values.data(), value_strides, positions);
  }

 private:
  static void place(const std::vector<float>& row, Index h, Index i, Strides order, std::vector<float>& tensor) {
    for (std::size_t d = 0; d < row.size(); ++d) {
      tensor[static_cast<std::size_t>(h * order.head + i * order.token + static_cast<Index>(d) * order.dim)] = row[d];
    }
  }
};

}  // namespace kvfold::test
