/// \file
/// An owning KV cache whose heads have row counts of their own, and which gives memory back when they shrink.
#pragma once

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <span>
#include <utility>

#include "kvfold/detail/row_codec.hpp"
#include "kvfold/status.hpp"
#include "kvfold/storage/elements.hpp"
#include "kvfold/storage/quantised.hpp"
#include "kvfold/view/concepts.hpp"
#include "kvfold/view/strided.hpp"

namespace kvfold {

/// Where a `RaggedCache` gets memory: one function with the meaning of std::realloc, size 0 releasing.
struct HeapMemory {
  /// \returns the block resized to `new_bytes` with its first min(old, new) bytes kept, or nullptr when there is no
  /// memory (the old block is then untouched) or `new_bytes` is 0 (it is then released).
  [[nodiscard]] static void* resize(void* block, std::size_t /*old_bytes*/, std::size_t new_bytes) noexcept {
    if (new_bytes == 0) {
      std::free(block);
      return nullptr;
    }
    return std::realloc(block, new_bytes);
  }
};

/// One sequence of one layer: per-head counts, positions and log masses; a `MutableKVCacheView` by itself.
///
/// For engines that have no cache of their own, for tests and for examples. Rows of a head are contiguous. Appending
/// grows capacity by half; `resize` (what compression calls) returns the memory of the rows that went. Rows of `Int8`
/// are kept with their scales, rows of fp8 without.
template <Stored K = float, Stored V = K, class Memory = HeapMemory>
class RaggedCache {
 public:
  /// \returns an empty cache, or `invalid_argument` / `out_of_memory`.
  [[nodiscard]] static Result<RaggedCache> create(LayerShape shape, Rope rope = {}) noexcept {
    if (shape.kv_heads < 1 || shape.kv_heads > kMaxHeads || shape.group_size < 1 || shape.group_size > kMaxHeads ||
        shape.query_heads() > kMaxHeads) {
      return Status{StatusCode::invalid_argument, "shape", "kv_heads and group_size must be in [1, kMaxHeads]"};
    }
    if (shape.key_dim < 1 || shape.key_dim > kMaxWidth || shape.value_dim < 1 || shape.value_dim > kMaxWidth) {
      return Status{StatusCode::invalid_argument, "shape", "key_dim and value_dim must be in [1, kMaxWidth]"};
    }
    if (!detail::width_fits<K>(shape.key_dim) || !detail::width_fits<V>(shape.value_dim)) {
      return Status{StatusCode::invalid_argument, "shape",
                    "key_dim or value_dim is not a multiple of its storage's block of 32"};
    }
    RaggedCache cache;
    cache.heads_.reset(new (std::nothrow) Head[static_cast<std::size_t>(shape.kv_heads)]);
    if (cache.heads_ == nullptr) return Status{StatusCode::out_of_memory, "shape", "the heads could not be allocated"};
    cache.shape_ = shape;
    cache.rope_ = rope;
    return cache;
  }

  RaggedCache(RaggedCache&& other) noexcept
      : shape_(std::exchange(other.shape_, {})), rope_(other.rope_), heads_(std::move(other.heads_)) {}
  RaggedCache& operator=(RaggedCache&& other) noexcept {
    std::swap(shape_, other.shape_);
    std::swap(rope_, other.rope_);
    std::swap(heads_, other.heads_);
    return *this;
  }
  RaggedCache(const RaggedCache&) = delete;  // copies are explicit: see clone()
  RaggedCache& operator=(const RaggedCache&) = delete;
  ~RaggedCache() {
    for (Index h = 0; h < shape_.kv_heads; ++h) release(head(h));
  }

  /// An independent copy with the same rows and no spare capacity.
  [[nodiscard]] Result<RaggedCache> clone() const noexcept {
    Result<RaggedCache> copy = create(shape_, rope_);
    if (!copy.ok()) return copy;
    for (Index h = 0; h < shape_.kv_heads; ++h) {
      const Head& from = head(h);
      Head& to = copy->head(h);
      if (!copy->set_capacity(to, from.rows)) return no_memory();
      for (std::size_t a = 0; a < kArrays; ++a) {
        if (copy->array_bytes(a, from.rows) > 0)
          std::memcpy(to.block[a], from.block[a], copy->array_bytes(a, from.rows));
      }
      to.rows = from.rows;
    }
    return copy;
  }

  /// Makes room for `rows` rows in every head. All heads or none; no row changes either way.
  Status reserve(Index rows) noexcept {
    if (rows < 0 || rows > kMaxRows) return {StatusCode::invalid_argument, "rows", "must be in [0, kMaxRows]"};
    return grow([rows](const Head&) { return rows; });
  }

  /// Appends `positions.size()` rows to every head, with log mass 0, converted to the storage types. Nothing changes
  /// when it fails.
  /// \param keys, values element (h, i, d) of the new rows at `h * head + i * token + d * dim` of the strides.
  /// \param positions of the new rows, ascending, none below the last row's.
  Status append(const float* keys, Strides key_strides, const float* values, Strides value_strides,
                std::span<const Position> positions) noexcept {
    const auto n = static_cast<Index>(positions.size());
    if (keys == nullptr) return {StatusCode::invalid_argument, "keys", "null data"};
    if (values == nullptr) return {StatusCode::invalid_argument, "values", "null data"};
    if (!std::is_sorted(positions.begin(), positions.end())) {
      return {StatusCode::invalid_argument, "positions", "must be in ascending order"};
    }
    if (n == 0) return {};
    for (Index h = 0; h < shape_.kv_heads; ++h) {
      if (head(h).rows > 0 && position(h, head(h).rows - 1) > positions.front()) {
        return {StatusCode::invalid_argument, "positions", "lie before rows that are in the cache", h};
      }
      if (n > kMaxRows - head(h).rows) return {StatusCode::invalid_argument, "positions", "more than kMaxRows rows", h};
    }
    const Status grown = grow([n](const Head& to) {
      const Index needed = to.rows + n;
      return needed <= to.capacity ? needed : std::min(kMaxRows, std::max(needed, to.capacity + to.capacity / 2));
    });
    if (!grown.ok()) return grown;
    for (Index h = 0; h < shape_.kv_heads; ++h) {
      Head& to = head(h);
      for (Index i = 0; i < n; ++i) {
        const float* new_key = keys + h * key_strides.head + i * key_strides.token;
        const float* new_value = values + h * value_strides.head + i * value_strides.token;
        detail::write_strided_row<K>(new_key, key_strides.dim, shape_.key_dim, key(h, to.rows + i), 1,
                                     key_scale(h, to.rows + i));
        detail::write_strided_row<V>(new_value, value_strides.dim, shape_.value_dim, value(h, to.rows + i), 1,
                                     value_scale(h, to.rows + i));
        this->positions(to)[to.rows + i] = positions[static_cast<std::size_t>(i)];
        log_masses(to)[to.rows + i] = 0.f;
      }
      to.rows += n;
    }
    return {};
  }

  /// Bytes held for rows and spare capacity, K, V, positions and log masses together.
  [[nodiscard]] Index live_bytes() const noexcept {
    Index bytes = 0;
    for (Index h = 0; h < shape_.kv_heads; ++h) {
      for (const std::size_t block : head(h).block_bytes) bytes += static_cast<Index>(block);
    }
    return bytes;
  }

  // --- KVCacheView -------------------------------------------------------------------------------------------------
  [[nodiscard]] LayerShape shape() const noexcept { return shape_; }
  [[nodiscard]] Index size(Index h) const noexcept { return head(h).rows; }
  [[nodiscard]] Position position(Index h, Index t) const noexcept { return positions(head(h))[t]; }
  [[nodiscard]] float log_mass(Index h, Index t) const noexcept { return log_masses(head(h))[t]; }
  [[nodiscard]] std::span<const float> stored_log_masses(Index h, Index t, Index n) const noexcept {
    return {log_masses(head(h)) + t, static_cast<std::size_t>(n)};
  }
  [[nodiscard]] Rope rope() const noexcept { return rope_; }
  [[nodiscard]] Index row_bytes(Index /*h*/) const noexcept {
    Index bytes = 0;
    for (std::size_t a = 0; a < kArrays; ++a) bytes += static_cast<Index>(element_bytes(a));
    return bytes;
  }
  void read_keys(Index h, Index t, Index n, std::span<float> out) const noexcept {
    detail::read_rows<K>(key(h, t), detail::row_units<K>(shape_.key_dim), 1, n, shape_.key_dim, key_scale(h, t), 1,
                         out.data());
  }
  void read_values(Index h, Index t, Index n, std::span<float> out) const noexcept {
    detail::read_rows<V>(value(h, t), detail::row_units<V>(shape_.value_dim), 1, n, shape_.value_dim, value_scale(h, t),
                         1, out.data());
  }
  [[nodiscard]] const float* key_rows(Index h, Index t, Index /*n*/) const noexcept {
    return detail::rows_in_place<K>(key(h, t), shape_.key_dim, 1, shape_.key_dim);
  }
  [[nodiscard]] const float* value_rows(Index h, Index t, Index /*n*/) const noexcept {
    return detail::rows_in_place<V>(value(h, t), shape_.value_dim, 1, shape_.value_dim);
  }

  [[nodiscard]] StoredRows<K> stored_keys(Index h, Index t, Index n) const noexcept {
    return {key(h, t), detail::row_units<K>(shape_.key_dim), n, key_scale(h, t), 1};
  }
  [[nodiscard]] StoredRows<V> stored_values(Index h, Index t, Index n) const noexcept {
    return {value(h, t), detail::row_units<V>(shape_.value_dim), n, value_scale(h, t), 1};
  }

  // --- MutableKVCacheView ------------------------------------------------------------------------------------------
  void write_key(Index h, Index t, std::span<const float> in) noexcept {
    detail::write_row<K>(in.data(), shape_.key_dim, key(h, t), 1, key_scale(h, t));
  }
  void write_value(Index h, Index t, std::span<const float> in) noexcept {
    detail::write_row<V>(in.data(), shape_.value_dim, value(h, t), 1, value_scale(h, t));
  }
  void write_log_mass(Index h, Index t, float mass) noexcept { log_masses(head(h))[t] = mass; }
  void move_row(Index h, Index from, Index to) noexcept {
    Head& at = head(h);
    for (std::size_t a = 0; a < kArrays; ++a) {
      const std::size_t bytes = element_bytes(a);
      if (bytes == 0) continue;
      auto* base = static_cast<std::byte*>(at.block[a]);
      std::memmove(base + static_cast<std::size_t>(to) * bytes, base + static_cast<std::size_t>(from) * bytes, bytes);
    }
  }
  /// Shrinks head h to n rows and releases the rest of its memory, spare capacity included.
  void resize(Index h, Index n) noexcept {
    KVFOLD_ASSERT(n >= 0 && n <= head(h).rows);
    head(h).rows = n;
    static_cast<void>(set_capacity(head(h), n));
  }

 private:
  static constexpr std::size_t kArrays = 6;  // keys, values, positions, log masses, scales of keys and of values

  struct Head {
    std::array<void*, kArrays> block{};
    std::array<std::size_t, kArrays> block_bytes{};
    Index rows = 0;
    Index capacity = 0;
    Index previous_capacity = 0;  // while all heads grow
  };

  RaggedCache() noexcept = default;

  static Status no_memory() noexcept { return {StatusCode::out_of_memory, "rows", "the rows could not be allocated"}; }

  [[nodiscard]] Head& head(Index h) const noexcept {
    KVFOLD_ASSERT(h >= 0 && h < shape_.kv_heads);
    return heads_[static_cast<std::size_t>(h)];
  }
  [[nodiscard]] K* key(Index h, Index t) const noexcept {
    return static_cast<K*>(head(h).block[0]) + t * detail::row_units<K>(shape_.key_dim);
  }
  [[nodiscard]] V* value(Index h, Index t) const noexcept {
    return static_cast<V*>(head(h).block[1]) + t * detail::row_units<V>(shape_.value_dim);
  }
  /// Null where rows have no scale of their own.
  [[nodiscard]] float* key_scale(Index h, Index t) const noexcept {
    return kRowScaled<K> ? static_cast<float*>(head(h).block[4]) + t : nullptr;
  }
  [[nodiscard]] float* value_scale(Index h, Index t) const noexcept {
    return kRowScaled<V> ? static_cast<float*>(head(h).block[5]) + t : nullptr;
  }
  [[nodiscard]] static Position* positions(const Head& at) noexcept { return static_cast<Position*>(at.block[2]); }
  [[nodiscard]] static float* log_masses(const Head& at) noexcept { return static_cast<float*>(at.block[3]); }

  [[nodiscard]] std::size_t element_bytes(std::size_t array) const noexcept {
    switch (array) {
      case 0: return static_cast<std::size_t>(detail::row_units<K>(shape_.key_dim)) * sizeof(K);
      case 1: return static_cast<std::size_t>(detail::row_units<V>(shape_.value_dim)) * sizeof(V);
      case 2: return sizeof(Position);
      case 3: return sizeof(float);
      case 4: return kRowScaled<K> ? sizeof(float) : 0;
      default: return kRowScaled<V> ? sizeof(float) : 0;
    }
  }
  [[nodiscard]] std::size_t array_bytes(std::size_t array, Index rows) const noexcept {
    return static_cast<std::size_t>(rows) * element_bytes(array);
  }

  /// Gives each head at least the capacity that `wanted(head)` says: all heads, or none.
  template <class Wanted>
  Status grow(Wanted wanted) noexcept {
    for (Index h = 0; h < shape_.kv_heads; ++h) {
      head(h).previous_capacity = head(h).capacity;
      if (head(h).capacity >= wanted(head(h)) || set_capacity(head(h), wanted(head(h)))) continue;
      for (Index g = 0; g <= h; ++g) static_cast<void>(set_capacity(head(g), head(g).previous_capacity));
      return no_memory();
    }
    return {};
  }

  /// Gives every array of a head room for `capacity` rows. Growing may fail, with every row still in place; a block
  /// that cannot shrink stays larger than asked.
  [[nodiscard]] bool set_capacity(Head& at, Index capacity) noexcept {
    for (std::size_t a = 0; a < kArrays; ++a) {
      const std::size_t bytes = array_bytes(a, capacity);
      if (at.block_bytes[a] == bytes) continue;
      void* block = Memory::resize(at.block[a], at.block_bytes[a], bytes);
      if (block == nullptr && bytes != 0) {
        if (bytes < at.block_bytes[a]) continue;
        return false;
      }
      at.block[a] = block;
      at.block_bytes[a] = bytes;
    }
    at.capacity = capacity;
    return true;
  }
  void release(Head& at) noexcept { static_cast<void>(set_capacity(at, 0)); }

  LayerShape shape_;
  Rope rope_;
  std::unique_ptr<Head[]> heads_;
};

}  // namespace kvfold
