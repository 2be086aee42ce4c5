/// \file
/// Rows of f32, f16 or bf16 in the engine's own memory, in any order of (head, token, dim).
#pragma once

#include <algorithm>
#include <cstring>
#include <span>

#include "kvfold/storage/elements.hpp"
#include "kvfold/view/concepts.hpp"

namespace kvfold {

/// Where element (head, token, dim) of a tensor lies, counted in elements from its data pointer.
struct Strides {
  Index head = 0;
  Index token = 0;
  Index dim = 1;

  /// `[H][T][D]` with room for `capacity` tokens in each head.
  [[nodiscard]] static constexpr Strides head_major(Index capacity, Index width) noexcept {
    return {capacity * width, width, 1};
  }
  /// `[T][H][D]`.
  [[nodiscard]] static constexpr Strides token_major(Index heads, Index width) noexcept {
    return {width, heads * width, 1};
  }
  /// `[H][D][T]` with room for `capacity` tokens: the transposed V of llama.cpp without flash attention.
  [[nodiscard]] static constexpr Strides transposed(Index capacity, Index width) noexcept {
    return {capacity * width, 1, capacity};
  }
};

/// A view on tensors that the engine owns and keeps alive; copying it copies pointers.
///
/// \tparam K, V storage types of keys and values; `const` ones make a view that can be read and planned, not written.
///
/// Positions: `positions[h * position_stride + t]` where given (`position_stride` 0 shares one list between all heads);
/// otherwise row t is at `first_position + t`, which is only true until heads keep rows of their own, so give each
/// head its own list if the cache is to be compressed twice or un-rotated after compression.
/// `rows` has T_h for each head and is what `resize` changes; log masses work like positions and may be absent.
template <class K, class V = K>
  requires(Element<std::remove_const_t<K>>&& Element<std::remove_const_t<V>>)
struct StridedView {
  LayerShape layer;
  K* keys = nullptr;
  Strides key_strides;
  V* values = nullptr;
  Strides value_strides;
  std::span<Index> rows = {};          ///< [H]
  std::span<Position> positions = {};  ///< [H][position_stride], or one shared list, or empty
  Index position_stride = 0;
  Position first_position = 0;
  std::span<float> log_masses = {};  ///< [H][log_mass_stride], or empty: the engine has no bias per row
  Index log_mass_stride = 0;
  Rope rotation = {};
  RowCounts counts = RowCounts::per_head;
  ChannelRotation hadamard = {};  ///< of the stored rows

  [[nodiscard]] LayerShape shape() const noexcept { return layer; }
  [[nodiscard]] Index size(Index h) const noexcept { return rows[index(h)]; }
  [[nodiscard]] Position position(Index h, Index t) const noexcept {
    return positions.empty() ? first_position + t : positions[index(h * position_stride + t)];
  }
  [[nodiscard]] Rope rope() const noexcept { return rotation; }
  [[nodiscard]] RowCounts row_counts() const noexcept { return counts; }
  [[nodiscard]] ChannelRotation channel_rotation() const noexcept { return hadamard; }
  [[nodiscard]] Index row_bytes(Index /*h*/) const noexcept {
    return layer.key_dim * static_cast<Index>(sizeof(K)) + layer.value_dim * static_cast<Index>(sizeof(V));
  }

  void read_keys(Index h, Index t, Index n, std::span<float> out) const noexcept {
    read(keys, key_strides, layer.key_dim, h, t, n, out.data());
  }
  void read_values(Index h, Index t, Index n, std::span<float> out) const noexcept {
    read(values, value_strides, layer.value_dim, h, t, n, out.data());
  }

  [[nodiscard]] const float* key_rows(Index h, Index t, Index /*n*/) const noexcept {
    return in_place(keys, key_strides, layer.key_dim, h, t);
  }
  [[nodiscard]] const float* value_rows(Index h, Index t, Index /*n*/) const noexcept {
    return in_place(values, value_strides, layer.value_dim, h, t);
  }

  [[nodiscard]] float log_mass(Index h, Index t) const noexcept {
    return log_masses.empty() ? 0.f : log_masses[index(h * log_mass_stride + t)];
  }
  /// Whether there is a place for log masses; asked before anything is written.
  [[nodiscard]] bool stores_log_mass() const noexcept { return !log_masses.empty(); }

  void write_log_mass(Index h, Index t, float mass) noexcept {
    if (!log_masses.empty()) log_masses[index(h * log_mass_stride + t)] = mass;
  }
  void write_key(Index h, Index t, std::span<const float> in) noexcept requires(!std::is_const_v<K>) {
    write(keys, key_strides, layer.key_dim, h, t, in.data());
  }
  void write_value(Index h, Index t, std::span<const float> in) noexcept requires(!std::is_const_v<V>) {
    write(values, value_strides, layer.value_dim, h, t, in.data());
  }
  void move_row(Index h, Index from, Index to) noexcept requires(!std::is_const_v<K> && !std::is_const_v<V>) {
    move(keys, key_strides, layer.key_dim, h, from, to);
    move(values, value_strides, layer.value_dim, h, from, to);
    if (!positions.empty() && position_stride != 0) {
      positions[index(h * position_stride + to)] = positions[index(h * position_stride + from)];
    }
    if (!log_masses.empty())
      log_masses[index(h * log_mass_stride + to)] = log_masses[index(h * log_mass_stride + from)];
  }
  void resize(Index h, Index n) noexcept requires(!std::is_const_v<K> && !std::is_const_v<V>) { rows[index(h)] = n; }

 private:
  /// Tokens of a transposed tensor that are converted together: one cache line of f32 per dim.
  static constexpr Index kTransposeTile = 16;

  static constexpr std::size_t index(Index i) noexcept { return static_cast<std::size_t>(i); }

  template <class E>
  static void read(const E* data, const Strides& s, Index width, Index h, Index t, Index n, float* out) noexcept {
    const E* rows_at = data + h * s.head + t * s.token;
    if (s.dim == 1 && s.token == width) return load_floats(rows_at, n * width, out);
    if (s.dim == 1) {
      for (Index i = 0; i < n; ++i) load_floats(rows_at + i * s.token, width, out + i * width);
      return;
    }
    for (Index first = 0; first < n; first += kTransposeTile) {
      const Index count = std::min(kTransposeTile, n - first);
      for (Index d = 0; d < width; ++d) {
        const E* column = rows_at + first * s.token + d * s.dim;
        for (Index i = 0; i < count; ++i) out[(first + i) * width + d] = to_float(column[i * s.token]);
      }
    }
  }

  template <class E>
  static const float* in_place(const E* data, const Strides& s, Index width, Index h, Index t) noexcept {
    if constexpr (std::same_as<std::remove_const_t<E>, float>) {
      if (s.dim == 1 && s.token == width) return data + h * s.head + t * s.token;
    }
    return nullptr;
  }

  template <class E>
  static void write(E* data, const Strides& s, Index width, Index h, Index t, const float* in) noexcept {
    E* row = data + h * s.head + t * s.token;
    for (Index d = 0; d < width; ++d) row[d * s.dim] = from_float<E>(in[d]);
  }

  template <class E>
  static void move(E* data, const Strides& s, Index width, Index h, Index from, Index to) noexcept {
    const E* source = data + h * s.head + from * s.token;
    E* target = data + h * s.head + to * s.token;
    for (Index d = 0; d < width; ++d) target[d * s.dim] = source[d * s.dim];
  }
};

}  // namespace kvfold
