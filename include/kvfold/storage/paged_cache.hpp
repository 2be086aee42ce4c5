/// \file
/// An owning KV cache whose rows lie in pages of a pool that it shares with other sequences and layers.
#pragma once

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <span>
#include <utility>

#include "kvfold/detail/page_tables.hpp"
#include "kvfold/detail/row_codec.hpp"
#include "kvfold/storage/page_pool.hpp"
#include "kvfold/view/strided.hpp"

namespace kvfold {

/// Who a page of a `PagedCache` belongs to.
enum class PageTables : unsigned char {
  shared,    ///< all heads: row t of every head is in the same page, which goes when no head needs it any more
  per_head,  ///< one head: each head gives pages back by itself
};

struct PagedCacheOptions {
  Index page_size = 16;  ///< tokens in a page, at least 1
  PageTables tables = PageTables::shared;
  RowCounts counts = RowCounts::per_head;
  Rope rope = {};
};

/// One sequence of one layer over a pool: per-head counts, positions and log masses; a `MutableKVCacheView` by itself.
///
/// For engines that have no cache of their own, for tests and for examples. The pool outlives the cache, and stays in place.
/// `resize` (what compression calls) gives pages back to the pool, where other sequences can take them at once.
template <Stored K = float, Stored V = K, class Memory = HeapMemory>
class PagedCache {
 public:
  using Pool = PagePool<Memory>;

  /// Bytes that a page needs: what to create the pool with. `invalid_argument` where a size is out of range.
  [[nodiscard]] static Result<std::size_t> page_bytes(LayerShape shape, PagedCacheOptions options) noexcept {
    if (Status bad = check(shape, options); !bad.ok()) return bad;
    return layout_of(shape, options).bytes;
  }

  /// \returns an empty cache that has no page yet, or `invalid_argument`, `size_mismatch` / `out_of_memory`.
  [[nodiscard]] static Result<PagedCache> create(LayerShape shape, Pool& pool, PagedCacheOptions options) noexcept {
    if (Status bad = check(shape, options); !bad.ok()) return bad;
    PagedCache cache;
    cache.layout_ = layout_of(shape, options);
    if (cache.layout_.bytes > pool.page_bytes()) {
      return Status{StatusCode::size_mismatch, "pool", "has pages of fewer bytes than page_bytes() asks for"};
    }
    const auto heads = static_cast<std::size_t>(shape.kv_heads);
    cache.rows_.reset(new (std::nothrow) Index[heads]());
    cache.tables_.reset(new (std::nothrow) Table[options.tables == PageTables::shared ? 1 : heads]);
    if (cache.rows_ == nullptr || cache.tables_ == nullptr) {
      return Status{StatusCode::out_of_memory, "shape", "the heads could not be allocated"};
    }
    cache.shape_ = shape;
    cache.options_ = options;
    cache.pool_ = &pool;
    return cache;
  }

  PagedCache(PagedCache&& other) noexcept { swap(other); }
  PagedCache& operator=(PagedCache&& other) noexcept {
    swap(other);
    return *this;
  }
  PagedCache(const PagedCache&) = delete;
  PagedCache& operator=(const PagedCache&) = delete;
  ~PagedCache() {
    for (Index i = 0; i < table_count(); ++i) static_cast<void>(set_pages(tables_[at(i)], 0));
  }

  /// Appends `positions.size()` rows to every head, with log mass 0. Nothing changes when it fails.
  /// \param keys, values element (h, i, d) of the new rows at `h * head + i * token + d * dim` of the strides.
  /// \param positions of the new rows, ascending, none below the last row's.
  Status append(const float* keys, Strides key_strides, const float* values, Strides value_strides,
                std::span<const Position> positions) noexcept {
    using enum StatusCode;
    const auto n = static_cast<Index>(positions.size());
    if (keys == nullptr) return {invalid_argument, "keys", "null data"};
    if (values == nullptr) return {invalid_argument, "values", "null data"};
    if (!std::is_sorted(positions.begin(), positions.end())) {
      return {invalid_argument, "positions", "must be in ascending order"};
    }
    if (n == 0) return {};
    for (Index h = 0; h < shape_.kv_heads; ++h) {
      if (size(h) > 0 && position(h, size(h) - 1) > positions.front()) {
        return {invalid_argument, "positions", "lie before rows that are in the cache", h};
      }
      if (n > kMaxRows - size(h)) return {invalid_argument, "positions", "more than kMaxRows rows", h};
    }
    if (Status bad = grow(n); !bad.ok()) return bad;
    for (Index h = 0; h < shape_.kv_heads; ++h) {
      for (Index i = 0; i < n; ++i) {
        const Index t = rows_[at(h)] + i;
        detail::write_strided_row(keys + h * key_strides.head + i * key_strides.token, key_strides.dim, shape_.key_dim,
                                  key(h, t), 1, scale(kKeyScales, h, t));
        detail::write_strided_row(values + h * value_strides.head + i * value_strides.token, value_strides.dim,
                                  shape_.value_dim, value(h, t), 1, scale(kValueScales, h, t));
        *place<Position>(kPositions, h, t) = positions[at(i)];
        *place<float>(kLogMasses, h, t) = 0.f;
      }
      rows_[at(h)] += n;
    }
    return {};
  }

  /// The pages of head h, in the order of its rows; the same for all heads where the table is shared.
  [[nodiscard]] std::span<const PageId> page_table(Index h) const noexcept {
    return {table(h).ids, at(table(h).pages)};
  }
  /// Bytes of the pages that this cache holds, and of its page tables.
  [[nodiscard]] Index live_bytes() const noexcept {
    Index bytes = 0;
    for (Index i = 0; i < table_count(); ++i) {
      bytes +=
          tables_[at(i)].pages * static_cast<Index>(pool_->page_bytes()) + static_cast<Index>(tables_[at(i)].bytes);
    }
    return bytes;
  }

  // --- KVCacheView -------------------------------------------------------------------------------------------------
  [[nodiscard]] LayerShape shape() const noexcept { return shape_; }
  [[nodiscard]] Index size(Index h) const noexcept { return rows_[at(h)]; }
  [[nodiscard]] Position position(Index h, Index t) const noexcept { return *place<Position>(kPositions, h, t); }
  [[nodiscard]] float log_mass(Index h, Index t) const noexcept { return *place<float>(kLogMasses, h, t); }
  [[nodiscard]] Rope rope() const noexcept { return options_.rope; }
  [[nodiscard]] RowCounts row_counts() const noexcept { return options_.counts; }
  [[nodiscard]] Index row_bytes(Index /*h*/) const noexcept {
    return detail::row_bytes<K>(shape_.key_dim) + detail::row_bytes<V>(shape_.value_dim) +
           static_cast<Index>(sizeof(Position) + sizeof(float));
  }
  void read_keys(Index h, Index t, Index n, std::span<float> out) const noexcept {
    detail::for_pages(t, n, options_.page_size, [&](Index, Index, Index done, Index count) {
      detail::read_rows<K>(key(h, t + done), detail::row_units<K>(shape_.key_dim), 1, count, shape_.key_dim,
                           scale(kKeyScales, h, t + done), 1, out.data() + done * shape_.key_dim);
    });
  }
  void read_values(Index h, Index t, Index n, std::span<float> out) const noexcept {
    detail::for_pages(t, n, options_.page_size, [&](Index, Index, Index done, Index count) {
      detail::read_rows<V>(value(h, t + done), detail::row_units<V>(shape_.value_dim), 1, count, shape_.value_dim,
                           scale(kValueScales, h, t + done), 1, out.data() + done * shape_.value_dim);
    });
  }
  [[nodiscard]] const float* key_rows(Index h, Index t, Index n) const noexcept {
    if (detail::rows_in_page(t, n, options_.page_size) < n) return nullptr;
    return detail::rows_in_place<K>(key(h, t), shape_.key_dim, 1, shape_.key_dim);
  }
  [[nodiscard]] const float* value_rows(Index h, Index t, Index n) const noexcept {
    if (detail::rows_in_page(t, n, options_.page_size) < n) return nullptr;
    return detail::rows_in_place<V>(value(h, t), shape_.value_dim, 1, shape_.value_dim);
  }

  [[nodiscard]] StoredRows<K> stored_keys(Index h, Index t, Index n) const noexcept {
    return {key(h, t), detail::row_units<K>(shape_.key_dim), detail::rows_in_page(t, n, options_.page_size),
            scale(kKeyScales, h, t), 1};
  }
  [[nodiscard]] StoredRows<V> stored_values(Index h, Index t, Index n) const noexcept {
    return {value(h, t), detail::row_units<V>(shape_.value_dim), detail::rows_in_page(t, n, options_.page_size),
            scale(kValueScales, h, t), 1};
  }

  // --- MutableKVCacheView ------------------------------------------------------------------------------------------
  void write_key(Index h, Index t, std::span<const float> in) noexcept {
    detail::write_row(in.data(), shape_.key_dim, key(h, t), 1, scale(kKeyScales, h, t));
  }
  void write_value(Index h, Index t, std::span<const float> in) noexcept {
    detail::write_row(in.data(), shape_.value_dim, value(h, t), 1, scale(kValueScales, h, t));
  }
  void write_log_mass(Index h, Index t, float mass) noexcept { *place<float>(kLogMasses, h, t) = mass; }
  void move_row(Index h, Index from, Index to) noexcept {
    for (std::size_t s = 0; s < kSections; ++s) {
      const std::size_t bytes = layout_.row_bytes[s];
      if (bytes > 0) std::memmove(bytes_of(s, h, to), bytes_of(s, h, from), bytes);
    }
  }
  /// Shrinks head h to n rows and gives the pages that are not needed any more back to the pool: behind row n, or with a
  /// shared table behind the last row of the longest head. O(pages given back), and O(H) with a shared table.
  void resize(Index h, Index n) noexcept {
    KVFOLD_ASSERT(n >= 0 && n <= size(h));
    rows_[at(h)] = n;
    static_cast<void>(set_pages(table(h), detail::pages_for(longest(h), options_.page_size)));
  }

 private:
  // Parts of a page, each [heads of the page][page_size] rows.
  static constexpr std::size_t kPositions = 0, kLogMasses = 1, kKeyScales = 2, kValueScales = 3, kKeys = 4, kValues = 5,
                               kSections = 6;

  struct Layout {
    std::array<std::size_t, kSections> row_bytes{};
    std::array<std::size_t, kSections> offset{};
    std::size_t bytes = 0;
  };
  struct Table {
    PageId* ids = nullptr;
    std::size_t bytes = 0;  // of `ids`
    Index pages = 0;
    Index previous_pages = 0;  // while tables grow
  };

  PagedCache() noexcept = default;

  static constexpr std::size_t at(Index i) noexcept { return static_cast<std::size_t>(i); }

  [[nodiscard]] static Status check(const LayerShape& shape, const PagedCacheOptions& options) noexcept {
    using enum StatusCode;
    if (shape.kv_heads < 1 || shape.kv_heads > kMaxHeads || shape.group_size < 1 || shape.group_size > kMaxHeads ||
        shape.query_heads() > kMaxHeads) {
      return {invalid_argument, "shape", "kv_heads and group_size must be in [1, kMaxHeads]"};
    }
    if (shape.key_dim < 1 || shape.key_dim > kMaxWidth || shape.value_dim < 1 || shape.value_dim > kMaxWidth) {
      return {invalid_argument, "shape", "key_dim and value_dim must be in [1, kMaxWidth]"};
    }
    if (!detail::width_fits<K>(shape.key_dim) || !detail::width_fits<V>(shape.value_dim)) {
      return {invalid_argument, "shape", "key_dim and value_dim must be whole blocks of the stored types"};
    }
    // A row takes less than 2^20 bytes, so that no size of a page can overflow.
    if (options.page_size < 1 || options.page_size > (Index{1} << 24)) {
      return {invalid_argument, "page_size", "must be in [1, 2^24]"};
    }
    return {};
  }

  [[nodiscard]] static Layout layout_of(const LayerShape& shape, const PagedCacheOptions& options) noexcept {
    const Index heads = options.tables == PageTables::shared ? shape.kv_heads : 1;
    Layout layout;
    layout.row_bytes = {sizeof(Position),
                        sizeof(float),
                        kRowScaled<K> ? sizeof(float) : 0,
                        kRowScaled<V> ? sizeof(float) : 0,
                        at(detail::row_units<K>(shape.key_dim)) * sizeof(K),
                        at(detail::row_units<V>(shape.value_dim)) * sizeof(V)};
    for (std::size_t s = 0; s < kSections; ++s) {
      layout.offset[s] = layout.bytes;
      const std::size_t bytes = at(heads * options.page_size) * layout.row_bytes[s];
      layout.bytes += (bytes + sizeof(Position) - 1) / sizeof(Position) * sizeof(Position);
    }
    return layout;
  }

  [[nodiscard]] Index table_count() const noexcept {
    if (tables_ == nullptr) return 0;
    return options_.tables == PageTables::shared ? 1 : shape_.kv_heads;
  }
  [[nodiscard]] Table& table(Index h) const noexcept {
    KVFOLD_ASSERT(h >= 0 && h < shape_.kv_heads);
    return tables_[options_.tables == PageTables::shared ? 0 : at(h)];
  }
  /// The most rows of the heads that share the table of head h.
  [[nodiscard]] Index longest(Index h) const noexcept {
    return options_.tables == PageTables::shared ? *std::max_element(rows_.get(), rows_.get() + shape_.kv_heads)
                                                 : rows_[at(h)];
  }

  [[nodiscard]] std::byte* bytes_of(std::size_t section, Index h, Index t) const noexcept {
    const Index head = options_.tables == PageTables::shared ? h : 0;
    const Index row = head * options_.page_size + t % options_.page_size;
    std::byte* page = pool_->page(table(h).ids[t / options_.page_size]);
    return page + layout_.offset[section] + at(row) * layout_.row_bytes[section];
  }
  template <class T>
  [[nodiscard]] T* place(std::size_t section, Index h, Index t) const noexcept {
    return reinterpret_cast<T*>(bytes_of(section, h, t));
  }
  [[nodiscard]] K* key(Index h, Index t) const noexcept { return place<K>(kKeys, h, t); }
  [[nodiscard]] V* value(Index h, Index t) const noexcept { return place<V>(kValues, h, t); }
  [[nodiscard]] float* scale(std::size_t section, Index h, Index t) const noexcept {
    return layout_.row_bytes[section] == 0 ? nullptr : place<float>(section, h, t);
  }

  /// Makes room for n more rows in every head: in all of them, or in none.
  Status grow(Index n) noexcept {
    for (Index i = 0; i < table_count(); ++i) {
      Table& to = tables_[at(i)];
      to.previous_pages = to.pages;
      if (set_pages(to, detail::pages_for(longest(i) + n, options_.page_size))) continue;
      for (Index j = 0; j < i; ++j) static_cast<void>(set_pages(tables_[at(j)], tables_[at(j)].previous_pages));
      return {StatusCode::out_of_memory, "rows", "the pool has no pages for them"};
    }
    return {};
  }

  /// Takes pages from the pool or gives them back. Growing may fail, with every page still in place.
  [[nodiscard]] bool set_pages(Table& to, Index pages) noexcept {
    if (pages > to.pages) {
      if (!resize_ids(to, pages)) return false;
      if (!pool_->allocate({to.ids + to.pages, at(pages - to.pages)}).ok()) {
        static_cast<void>(resize_ids(to, to.pages));
        return false;
      }
    } else if (pages < to.pages) {
      const Status released = pool_->release({to.ids + pages, at(to.pages - pages)});
      KVFOLD_ASSERT(released.ok());
      static_cast<void>(released);
      static_cast<void>(resize_ids(to, pages));
    }
    to.pages = pages;
    return true;
  }

  /// A list that cannot shrink stays longer than asked.
  [[nodiscard]] static bool resize_ids(Table& to, Index pages) noexcept {
    const std::size_t bytes = at(pages) * sizeof(PageId);
    if (bytes == to.bytes) return true;
    void* moved = Memory::resize(to.ids, to.bytes, bytes);
    if (moved == nullptr && bytes != 0) return bytes < to.bytes;
    to.ids = static_cast<PageId*>(moved);
    to.bytes = bytes;
    return true;
  }

  void swap(PagedCache& other) noexcept {
    std::swap(shape_, other.shape_);
    std::swap(options_, other.options_);
    std::swap(layout_, other.layout_);
    std::swap(pool_, other.pool_);
    std::swap(rows_, other.rows_);
    std::swap(tables_, other.tables_);
  }

  LayerShape shape_;
  PagedCacheOptions options_;
  Layout layout_;
  Pool* pool_ = nullptr;
  std::unique_ptr<Index[]> rows_;    // [H]
  std::unique_ptr<Table[]> tables_;  // [H], or one
};

}  // namespace kvfold
