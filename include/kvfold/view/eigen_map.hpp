/// \file
/// A view on caches that are Eigen matrices, one pair for each head.
#pragma once

#include <span>

#include <Eigen/Core>

#include "kvfold/storage/elements.hpp"
#include "kvfold/view/concepts.hpp"

namespace kvfold {

/// Row-major fp32 rows, possibly a block of a larger matrix.
using RowsMap = Eigen::Map<Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>, Eigen::Unaligned,
                           Eigen::OuterStride<>>;

/// A view on H key matrices (at least T_h x D) and H value matrices (at least T_h x E) that outlive it.
/// `rows[h]` is T_h and is what `resize` changes; matrices keep their capacity. Row t is at position
/// `positions[h * position_stride + t]` (stride 0 shares one list), or at t where `positions` is empty.
struct EigenView {
  Index group_size = 1;
  std::span<RowsMap> keys;
  std::span<RowsMap> values;
  std::span<Index> rows;
  std::span<Position> positions = {};
  Index position_stride = 0;
  Rope rotation = {};

  [[nodiscard]] LayerShape shape() const noexcept {
    if (keys.empty() || values.size() != keys.size() || rows.size() != keys.size()) return {};
    for (std::size_t h = 1; h < keys.size(); ++h) {
      if (keys[h].cols() != keys[0].cols() || values[h].cols() != values[0].cols()) return {};
    }
    return {static_cast<Index>(keys.size()), group_size, keys[0].cols(), values[0].cols()};
  }
  [[nodiscard]] Index size(Index h) const noexcept { return rows[index(h)]; }
  [[nodiscard]] Position position(Index h, Index t) const noexcept {
    return positions.empty() ? t : positions[index(h * position_stride + t)];
  }
  [[nodiscard]] Rope rope() const noexcept { return rotation; }
  [[nodiscard]] Index row_bytes(Index h) const noexcept {
    return (keys[index(h)].cols() + values[index(h)].cols()) * static_cast<Index>(sizeof(float));
  }

  void read_keys(Index h, Index t, Index n, std::span<float> out) const noexcept { read(keys[index(h)], t, n, out); }
  void read_values(Index h, Index t, Index n, std::span<float> out) const noexcept {
    read(values[index(h)], t, n, out);
  }
  [[nodiscard]] const float* key_rows(Index h, Index t, Index /*n*/) const noexcept {
    return in_place(keys[index(h)], t);
  }
  [[nodiscard]] const float* value_rows(Index h, Index t, Index /*n*/) const noexcept {
    return in_place(values[index(h)], t);
  }

  [[nodiscard]] StoredRows<float> stored_keys(Index h, Index t, Index n) const noexcept {
    return {keys[index(h)].row(t).data(), keys[index(h)].outerStride(), n};
  }
  [[nodiscard]] StoredRows<float> stored_values(Index h, Index t, Index n) const noexcept {
    return {values[index(h)].row(t).data(), values[index(h)].outerStride(), n};
  }

  void write_key(Index h, Index t, std::span<const float> in) noexcept { write(keys[index(h)], t, in); }
  void write_value(Index h, Index t, std::span<const float> in) noexcept { write(values[index(h)], t, in); }
  void move_row(Index h, Index from, Index to) noexcept {
    keys[index(h)].row(to) = keys[index(h)].row(from);
    values[index(h)].row(to) = values[index(h)].row(from);
    if (!positions.empty() && position_stride != 0) {
      positions[index(h * position_stride + to)] = positions[index(h * position_stride + from)];
    }
  }
  void resize(Index h, Index n) noexcept { rows[index(h)] = n; }

 private:
  static constexpr std::size_t index(Index i) noexcept { return static_cast<std::size_t>(i); }
  static const float* in_place(const RowsMap& m, Index t) noexcept {
    return m.outerStride() == m.cols() ? m.data() + t * m.cols() : nullptr;
  }
  static void read(const RowsMap& m, Index t, Index n, std::span<float> out) noexcept {
    for (Index i = 0; i < n; ++i)
      load_floats(m.data() + (t + i) * m.outerStride(), m.cols(), out.data() + i * m.cols());
  }
  static void write(RowsMap& m, Index t, std::span<const float> in) noexcept {
    load_floats(in.data(), m.cols(), m.data() + t * m.outerStride());
  }
};

}  // namespace kvfold
