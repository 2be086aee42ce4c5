/// \file
/// Rows of any storage kind in the engine's own memory, in any order of (head, token, dim).
#pragma once

#include <span>
#include <type_traits>

#include "kvfold/detail/row_codec.hpp"
#include "kvfold/storage/elements.hpp"
#include "kvfold/storage/quantised.hpp"
#include "kvfold/view/concepts.hpp"

namespace kvfold {

/// Where element (head, token, dim) of a tensor lies, counted in elements from its data pointer. Tensors of blocks are
/// counted in blocks, and `width` below is then the blocks of a row.
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

/// Where the scale of row (head, token) lies, counted in floats.
struct ScaleStrides {
  Index head = 0;
  Index token = 0;
};

/// A view on tensors that the engine owns and keeps alive; copying it copies pointers.
///
/// \tparam K, V storage types of keys and values, `Stored` each; `const` ones make a view that can be read and planned,
/// not written.
///
/// Positions: `positions[h * position_stride + t]` where given (`position_stride` 0 shares one list between all heads);
/// otherwise row t is at `first_position + t`, which is only true until heads keep rows of their own, so give each
/// head its own list if the cache is to be compressed twice or un-rotated after compression.
/// `rows` has T_h for each head and is what `resize` changes; log masses work like positions and may be absent.
///
/// Scales: rows of `Int8` need them; each row has one of its own, which is written and moved with it (`const` rows may
/// share scales). Rows of fp8 may have them, one for the tensor (strides 0) or for each head; they are only read, and
/// only `const` rows may have one per token, because moving rows would part them from it. Other kinds have none.
///
/// A view that breaks these rules, or with blocks that do not divide the width or whose dim stride is not 1, has no
/// `shape()`: every stage refuses it with `invalid_argument`.
template <class K, class V = K>
  requires(Stored<std::remove_const_t<K>>&& Stored<std::remove_const_t<V>>)
struct StridedView {
  using StoredKey = std::remove_const_t<K>;
  using StoredValue = std::remove_const_t<V>;

  /// The type of scales that go with rows of S.
  template <class S>
  using Scale = std::conditional_t<std::is_const_v<S>, const float, detail::RowScale<std::remove_const_t<S>>>;

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
  Scale<K>* key_scales = nullptr;  ///< of head h, row t at h * head + t * token of the strides; null: there are none
  ScaleStrides key_scale_strides = {};
  Scale<V>* value_scales = nullptr;
  ScaleStrides value_scale_strides = {};
  ChannelRotation hadamard = {};  ///< of the stored rows

  [[nodiscard]] LayerShape shape() const noexcept {
    const bool sound = is_sound<K>(key_strides, layer.key_dim, key_scales, key_scale_strides) &&
                       is_sound<V>(value_strides, layer.value_dim, value_scales, value_scale_strides);
    return sound ? layer : LayerShape{};
  }
  [[nodiscard]] Index size(Index h) const noexcept { return rows[index(h)]; }
  [[nodiscard]] Position position(Index h, Index t) const noexcept {
    return positions.empty() ? first_position + t : positions[index(h * position_stride + t)];
  }
  [[nodiscard]] Rope rope() const noexcept { return rotation; }
  [[nodiscard]] RowCounts row_counts() const noexcept { return counts; }
  [[nodiscard]] ChannelRotation channel_rotation() const noexcept { return hadamard; }
  [[nodiscard]] Index row_bytes(Index /*h*/) const noexcept {
    return detail::row_bytes<StoredKey>(layer.key_dim) + detail::row_bytes<StoredValue>(layer.value_dim);
  }

  void read_keys(Index h, Index t, Index n, std::span<float> out) const noexcept {
    detail::read_rows<StoredKey>(place(keys, key_strides, h, t), key_strides.token, key_strides.dim, n, layer.key_dim,
                                 place(key_scales, key_scale_strides, h, t), key_scale_strides.token, out.data());
  }
  void read_values(Index h, Index t, Index n, std::span<float> out) const noexcept {
    detail::read_rows<StoredValue>(place(values, value_strides, h, t), value_strides.token, value_strides.dim, n,
                                   layer.value_dim, place(value_scales, value_scale_strides, h, t),
                                   value_scale_strides.token, out.data());
  }

  [[nodiscard]] const float* key_rows(Index h, Index t, Index /*n*/) const noexcept {
    return detail::rows_in_place<StoredKey>(place(keys, key_strides, h, t), key_strides.token, key_strides.dim,
                                            layer.key_dim);
  }
  [[nodiscard]] const float* value_rows(Index h, Index t, Index /*n*/) const noexcept {
    return detail::rows_in_place<StoredValue>(place(values, value_strides, h, t), value_strides.token,
                                              value_strides.dim, layer.value_dim);
  }

  [[nodiscard]] StoredRows<StoredKey> stored_keys(Index h, Index t, Index n) const noexcept {
    return stored<K>(keys, key_strides, key_scales, key_scale_strides, h, t, n);
  }
  [[nodiscard]] StoredRows<StoredValue> stored_values(Index h, Index t, Index n) const noexcept {
    return stored<V>(values, value_strides, value_scales, value_scale_strides, h, t, n);
  }

  [[nodiscard]] float log_mass(Index h, Index t) const noexcept {
    return log_masses.empty() ? 0.f : log_masses[index(h * log_mass_stride + t)];
  }
  [[nodiscard]] std::span<const float> stored_log_masses(Index h, Index t, Index n) const noexcept {
    if (log_masses.empty()) return {};
    return log_masses.subspan(index(h * log_mass_stride + t), index(n));
  }
  /// Whether there is a place for log masses; asked before anything is written.
  [[nodiscard]] bool stores_log_mass() const noexcept { return !log_masses.empty(); }

  void write_log_mass(Index h, Index t, float mass) noexcept {
    if (!log_masses.empty()) log_masses[index(h * log_mass_stride + t)] = mass;
  }
  void write_key(Index h, Index t, std::span<const float> in) noexcept requires(!std::is_const_v<K>) {
    detail::write_row<StoredKey>(in.data(), layer.key_dim, place(keys, key_strides, h, t), key_strides.dim,
                                 place(key_scales, key_scale_strides, h, t));
  }
  void write_value(Index h, Index t, std::span<const float> in) noexcept requires(!std::is_const_v<V>) {
    detail::write_row<StoredValue>(in.data(), layer.value_dim, place(values, value_strides, h, t), value_strides.dim,
                                   place(value_scales, value_scale_strides, h, t));
  }
  void move_row(Index h, Index from, Index to) noexcept requires(!std::is_const_v<K> && !std::is_const_v<V>) {
    detail::copy_row<StoredKey>(place(keys, key_strides, h, from), place(keys, key_strides, h, to), key_strides.dim,
                                layer.key_dim);
    detail::copy_row<StoredValue>(place(values, value_strides, h, from), place(values, value_strides, h, to),
                                  value_strides.dim, layer.value_dim);
    if constexpr (kRowScaled<StoredKey>) {
      *place(key_scales, key_scale_strides, h, to) = *place(key_scales, key_scale_strides, h, from);
    }
    if constexpr (kRowScaled<StoredValue>) {
      *place(value_scales, value_scale_strides, h, to) = *place(value_scales, value_scale_strides, h, from);
    }
    if (!positions.empty() && position_stride != 0) {
      positions[index(h * position_stride + to)] = positions[index(h * position_stride + from)];
    }
    if (!log_masses.empty())
      log_masses[index(h * log_mass_stride + to)] = log_masses[index(h * log_mass_stride + from)];
  }
  void resize(Index h, Index n) noexcept requires(!std::is_const_v<K> && !std::is_const_v<V>) { rows[index(h)] = n; }

 private:
  static constexpr std::size_t index(Index i) noexcept { return static_cast<std::size_t>(i); }

  /// Whether rows of S can be read, and written and moved where they are not const.
  template <class S>
  [[nodiscard]] bool is_sound(const Strides& s, Index width, const float* scales,
                              const ScaleStrides& at) const noexcept {
    using E = std::remove_const_t<S>;
    if (!detail::width_fits<E>(width) || (kUnit<E> != 1 && s.dim != 1)) return false;
    if (scales == nullptr) return !kRowScaled<E>;
    if (!kMayBeScaled<E>) return false;
    if (std::is_const_v<S>) return true;
    return kRowScaled<E> ? at.token != 0 && (at.head != 0 || layer.kv_heads == 1) : at.token == 0;
  }

  template <class S>
  [[nodiscard]] static StoredRows<std::remove_const_t<S>> stored(const S* data, const Strides& s, const float* scales,
                                                                 const ScaleStrides& of_scales, Index h, Index t,
                                                                 Index n) noexcept {
    if (kUnit<std::remove_const_t<S>> == 1 && s.dim != 1) return {};
    return {place(data, s, h, t), s.token, n, place(scales, of_scales, h, t), of_scales.token};
  }

  template <class T, class S>
  static T* place(T* data, const S& strides, Index h, Index t) noexcept {
    return data == nullptr ? nullptr : data + h * strides.head + t * strides.token;
  }
};

}  // namespace kvfold
