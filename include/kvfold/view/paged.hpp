/// \file
/// Rows in the pages of an engine's pool, found through page tables.
#pragma once

#include <algorithm>
#include <span>
#include <type_traits>

#include "kvfold/detail/extent.hpp"
#include "kvfold/detail/page_tables.hpp"
#include "kvfold/detail/row_codec.hpp"
#include "kvfold/view/concepts.hpp"

namespace kvfold {

/// What a page of a pool holds: one of K and V, or first all of its K and then all of its V.
enum class PageHolds : unsigned char { one_tensor, keys_and_values };

/// Where unit (page, head, token, dim) of a pool lies, counted in stored units from the data pointer. A unit is an element,
/// or a block of `kUnit` elements; `width` below is a row's units. Engines that put more into a page (other layers, scales)
/// have a larger `page`: assign it last.
struct PageStrides {
  Index page = 0;
  Index head = 0;
  Index token = 0;
  Index dim = 1;

  /// `[page][token][head][dim]`: ONNX Runtime GenAI (256 tokens), FlashInfer NHD with pools of their own for K and V;
  /// with `keys_and_values` `[page][2][token][head][dim]`: vLLM and FlashInfer NHD.
  [[nodiscard]] static constexpr PageStrides token_major(Index page_size, Index heads, Index width,
                                                         PageHolds holds = PageHolds::one_tensor) noexcept {
    return {tensors(holds) * page_size * heads * width, width, heads * width, 1};
  }
  /// `[page][head][token][dim]`: OpenVINO on CPUs (32 tokens), V of OpenVINO on GPUs (16), TensorRT-LLM;
  /// with `keys_and_values` `[page][2][head][token][dim]`: vLLM and FlashInfer HND.
  [[nodiscard]] static constexpr PageStrides head_major(Index page_size, Index heads, Index width,
                                                        PageHolds holds = PageHolds::one_tensor) noexcept {
    return {tensors(holds) * page_size * heads * width, page_size * width, width, 1};
  }
  /// `[page][head][dim][token]`: K of OpenVINO on GPUs (16 tokens).
  [[nodiscard]] static constexpr PageStrides transposed(Index page_size, Index heads, Index width,
                                                        PageHolds holds = PageHolds::one_tensor) noexcept {
    return {tensors(holds) * page_size * heads * width, page_size * width, 1, page_size};
  }
  /// `[page][token][dim]`: a page belongs to one head, and each head has a page table of its own (vllm-kvcompress).
  [[nodiscard]] static constexpr PageStrides one_head(Index page_size, Index width,
                                                      PageHolds holds = PageHolds::one_tensor) noexcept {
    return {tensors(holds) * page_size * width, 0, width, 1};
  }
  /// Where V begins in pages that hold K and V of the same width and nothing else: `values = keys + strides.second_half()`.
  [[nodiscard]] constexpr Index second_half() const noexcept { return page / 2; }

 private:
  static constexpr Index tensors(PageHolds holds) noexcept { return holds == PageHolds::keys_and_values ? 2 : 1; }
};

/// A view on a sequence whose rows lie in pages of a pool that the engine owns and keeps alive; copying it copies pointers.
///
/// \tparam K, V storage types of keys and values; `const` ones make a view that can be read and planned, not written.
///
/// Row t of head h lies at token t % page_size of page `tables[h * table_stride + t / page_size]`; `table_stride` 0 shares
/// one table between all heads. No page may be named twice by what the rows in use reach into, and no other sequence may
/// use it: pages that sequences share (prefix caching) have to be copied first. `resize` changes `rows` only; the pages
/// beyond `pages_used(h)` are then the engine's to give to others: with a shared table, beyond the most of all heads.
///
/// Scales: rows of `Int8` need one each, which is written and moved with the row (`const` rows may share scales). Rows of fp8
/// may have scales, which are only read: one for the tensor or for each head, and only `const` rows one per page or token,
/// because moving rows would part them from it. Other kinds have none.
///
/// Positions and log masses are those of `StridedView`: by row, not by page. Offset tables (TensorRT-LLM) are page numbers
/// times a stride: divide by it.
template <class K, class V = K>
  requires(Stored<std::remove_const_t<K>>&& Stored<std::remove_const_t<V>>)
struct PagedView {
  using StoredKey = std::remove_const_t<K>;
  using StoredValue = std::remove_const_t<V>;

  /// Scales that go with rows of E: written with `Int8` rows, else only read.
  template <class E>
  using ScalePointer = std::conditional_t<std::is_const_v<E>, const float, detail::RowScale<std::remove_const_t<E>>>*;

  LayerShape layer;
  Index page_size = 0;  ///< tokens in a page, at least 1
  Index pages = 0;      ///< pages in the pool: page numbers are in [0, pages)
  K* keys = nullptr;
  PageStrides key_strides;
  V* values = nullptr;
  PageStrides value_strides;
  std::span<const PageId> tables = {};  ///< [H][table_stride], or one shared table
  Index table_stride = 0;
  std::span<Index> rows = {};          ///< [H]
  std::span<Position> positions = {};  ///< [H][position_stride], or one shared list, or empty
  Index position_stride = 0;
  Position first_position = 0;
  std::span<float> log_masses = {};  ///< [H][log_mass_stride], or empty: the engine has no bias per row
  Index log_mass_stride = 0;
  ScalePointer<K> key_scales = nullptr;  ///< of row (page, head, token) at these strides, in floats; `dim` is unused
  PageStrides key_scale_strides = {};
  ScalePointer<V> value_scales = nullptr;
  PageStrides value_scale_strides = {};
  Rope rotation = {};
  RowCounts counts = RowCounts::per_head;

  // --- KVCacheView -------------------------------------------------------------------------------------------------
  [[nodiscard]] LayerShape shape() const noexcept {
    const bool keys_fit =
        detail::width_fits<StoredKey>(layer.key_dim) && (kUnit<StoredKey> == 1 || key_strides.dim == 1);
    const bool values_fit =
        detail::width_fits<StoredValue>(layer.value_dim) && (kUnit<StoredValue> == 1 || value_strides.dim == 1);
    return keys_fit && values_fit ? layer : LayerShape{};
  }
  [[nodiscard]] Index size(Index h) const noexcept { return rows[detail::at(h)]; }
  [[nodiscard]] Position position(Index h, Index t) const noexcept {
    return positions.empty() ? first_position + t : positions[detail::at(h * position_stride + t)];
  }
  [[nodiscard]] Rope rope() const noexcept { return rotation; }
  [[nodiscard]] RowCounts row_counts() const noexcept { return counts; }
  [[nodiscard]] Index row_bytes(Index /*h*/) const noexcept {
    return detail::row_bytes<StoredKey>(layer.key_dim) + detail::row_bytes<StoredValue>(layer.value_dim);
  }
  /// Pages that the rows of head h reach into: the first ones of its table.
  [[nodiscard]] Index pages_used(Index h) const noexcept { return detail::pages_for(size(h), page_size); }

  void read_keys(Index h, Index t, Index n, std::span<float> out) const noexcept {
    read(key_tensor(), h, t, n, out.data());
  }
  void read_values(Index h, Index t, Index n, std::span<float> out) const noexcept {
    read(value_tensor(), h, t, n, out.data());
  }
  [[nodiscard]] const float* key_rows(Index h, Index t, Index n) const noexcept {
    return in_place(key_tensor(), h, t, n);
  }
  [[nodiscard]] const float* value_rows(Index h, Index t, Index n) const noexcept {
    return in_place(value_tensor(), h, t, n);
  }
  [[nodiscard]] StoredRows<StoredKey> stored_keys(Index h, Index t, Index n) const noexcept {
    return stored(key_tensor(), h, t, n);
  }
  [[nodiscard]] StoredRows<StoredValue> stored_values(Index h, Index t, Index n) const noexcept {
    return stored(value_tensor(), h, t, n);
  }
  [[nodiscard]] float log_mass(Index h, Index t) const noexcept {
    return log_masses.empty() ? 0.f : log_masses[detail::at(h * log_mass_stride + t)];
  }
  [[nodiscard]] std::span<const float> stored_log_masses(Index h, Index t, Index n) const noexcept {
    if (log_masses.empty()) return {};
    return log_masses.subspan(detail::at(h * log_mass_stride + t), detail::at(n));
  }
  [[nodiscard]] bool stores_log_mass() const noexcept { return !log_masses.empty(); }

  // --- MutableKVCacheView ------------------------------------------------------------------------------------------
  void write_log_mass(Index h, Index t, float mass) noexcept {
    if (!log_masses.empty()) log_masses[detail::at(h * log_mass_stride + t)] = mass;
  }
  void write_key(Index h, Index t, std::span<const float> in) noexcept requires(!std::is_const_v<K>) {
    write(key_tensor(), h, t, in.data());
  }
  void write_value(Index h, Index t, std::span<const float> in) noexcept requires(!std::is_const_v<V>) {
    write(value_tensor(), h, t, in.data());
  }
  void move_row(Index h, Index from, Index to) noexcept requires(!std::is_const_v<K> && !std::is_const_v<V>) {
    move(key_tensor(), h, from, to);
    move(value_tensor(), h, from, to);
    if (!positions.empty() && position_stride != 0) {
      positions[detail::at(h * position_stride + to)] = positions[detail::at(h * position_stride + from)];
    }
    write_log_mass(h, to, log_mass(h, from));
  }
  void resize(Index h, Index n) noexcept requires(!std::is_const_v<K> && !std::is_const_v<V>) {
    rows[detail::at(h)] = n;
  }

  /// Whether everything can be read that the rows in use reach into: sizes and strides, and every entry of the tables, each
  /// page once. The library asks before it reads. O(entries * (1 + pages / 2^15)), and no memory.
  [[nodiscard]] Status check() const noexcept {
    if (Status bad = check_sizes(); !bad.ok()) return bad;
    if (Status bad = check_tensor(key_tensor(), "keys", "key_strides", "key_scales"); !bad.ok()) return bad;
    if (Status bad = check_tensor(value_tensor(), "values", "value_strides", "value_scales"); !bad.ok()) return bad;
    for (Index h = 0; h < layer.kv_heads; ++h) {
      if (Status bad = check_table(h); !bad.ok()) return bad;
    }
    return check_pages_once();
  }

 private:
  template <class E>
  struct Tensor {
    E* data;
    const PageStrides& strides;
    ScalePointer<E> scales;
    const PageStrides& scale_strides;
    Index width;
  };
  [[nodiscard]] Tensor<K> key_tensor() const noexcept {
    return {keys, key_strides, key_scales, key_scale_strides, layer.key_dim};
  }
  [[nodiscard]] Tensor<V> value_tensor() const noexcept {
    return {values, value_strides, value_scales, value_scale_strides, layer.value_dim};
  }

  [[nodiscard]] Index page(Index h, Index place) const noexcept { return tables[detail::at(h * table_stride + place)]; }
  static constexpr Index offset(const PageStrides& s, Index page, Index h, Index token) noexcept {
    return page * s.page + h * s.head + token * s.token;
  }
  template <class E>
  [[nodiscard]] E* row_of(const Tensor<E>& x, Index h, Index t) const noexcept {
    return x.data + offset(x.strides, page(h, t / page_size), h, t % page_size);
  }
  template <class E>
  [[nodiscard]] ScalePointer<E> scale_of(const Tensor<E>& x, Index h, Index t) const noexcept {
    if (x.scales == nullptr) return nullptr;
    return x.scales + offset(x.scale_strides, page(h, t / page_size), h, t % page_size);
  }

  template <class E>
  void read(const Tensor<E>& x, Index h, Index t, Index n, float* out) const noexcept {
    detail::for_pages(t, n, page_size, [&](Index, Index, Index done, Index count) {
      detail::read_rows<std::remove_const_t<E>>(row_of(x, h, t + done), x.strides.token, x.strides.dim, count, x.width,
                                                scale_of(x, h, t + done), x.scale_strides.token, out + done * x.width);
    });
  }
  template <class E>
  [[nodiscard]] const float* in_place(const Tensor<E>& x, Index h, Index t, Index n) const noexcept {
    if (detail::rows_in_page(t, n, page_size) < n) return nullptr;
    return detail::rows_in_place<std::remove_const_t<E>>(row_of(x, h, t), x.strides.token, x.strides.dim, x.width);
  }
  template <class E>
  [[nodiscard]] StoredRows<std::remove_const_t<E>> stored(const Tensor<E>& x, Index h, Index t,
                                                          Index n) const noexcept {
    if (kUnit<std::remove_const_t<E>> == 1 && x.strides.dim != 1) return {};
    return {row_of(x, h, t), x.strides.token, detail::rows_in_page(t, n, page_size), scale_of(x, h, t),
            x.scale_strides.token};
  }
  template <class E>
  void write(const Tensor<E>& x, Index h, Index t, const float* in) const noexcept {
    detail::write_row(in, x.width, row_of(x, h, t), x.strides.dim, scale_of(x, h, t));
  }
  template <class E>
  void move(const Tensor<E>& x, Index h, Index from, Index to) const noexcept {
    detail::copy_row<E>(row_of(x, h, from), row_of(x, h, to), x.strides.dim, x.width);
    if constexpr (kRowScaled<E>) *scale_of(x, h, to) = *scale_of(x, h, from);
  }

  // --- Checks ------------------------------------------------------------------------------------------------------
  [[nodiscard]] Status check_sizes() const noexcept {
    using enum StatusCode;
    if (page_size < 1 || page_size > kMaxRows) return {invalid_argument, "page_size", "must be in [1, kMaxRows]"};
    if (pages < 1 || pages > kMaxRows) return {invalid_argument, "pages", "must be in [1, 2^31 - 1]"};
    if (rows.empty() || static_cast<Index>(rows.size()) != layer.kv_heads) {
      return {size_mismatch, "rows", "must have one entry per head"};
    }
    if (layer.kv_heads > kMaxHeads || layer.key_dim < 1 || layer.key_dim > kMaxWidth || layer.value_dim < 1 ||
        layer.value_dim > kMaxWidth) {
      return {invalid_argument, "layer", "kv_heads, key_dim or value_dim is out of range"};
    }
    if (table_stride < 0) return {invalid_argument, "table_stride", "must be at least 0"};
    for (Index h = 0; h < layer.kv_heads; ++h) {
      if (size(h) < 0 || size(h) > kMaxRows) return {invalid_argument, "rows", "must be in [1, kMaxRows]", h};
      if (!positions.empty() && !holds(positions.size(), position_stride, h, size(h))) {
        return {size_mismatch, "positions", "are fewer than the rows of the head", h};
      }
      if (!log_masses.empty() && !holds(log_masses.size(), log_mass_stride, h, size(h))) {
        return {size_mismatch, "log_masses", "are fewer than the rows of the head", h};
      }
    }
    return {};
  }

  /// Whether a list of `count` entries holds `needed` of head h, and does not run into those of the next head.
  static bool holds(std::size_t count, Index stride, Index h, Index needed) noexcept {
    const auto all = static_cast<Index>(count);
    if (stride < 0 || stride > all || (stride != 0 && needed > stride)) return false;
    return needed <= all && h * stride <= all - needed;
  }

  template <class E>
  [[nodiscard]] Status check_tensor(const Tensor<E>& x, const char* name, const char* strides_name,
                                    const char* scales_name) const noexcept {
    using enum StatusCode;
    using Unit = std::remove_const_t<E>;
    if (x.data == nullptr) return {invalid_argument, name, "null data"};
    if (!nests(x.strides, detail::row_units<Unit>(x.width), sizeof(Unit))) {
      return {invalid_argument, strides_name, "negative, overlapping or larger than memory"};
    }
    return check_scales(x, scales_name);
  }
  template <class E>
  [[nodiscard]] Status check_scales(const Tensor<E>& x, const char* name) const noexcept {
    using enum StatusCode;
    using Unit = std::remove_const_t<E>;
    if (x.scales == nullptr) {
      return kRowScaled<Unit> ? Status{invalid_argument, name, "rows of this type have a scale each"} : Status{};
    }
    if (!kMayBeScaled<Unit>) return {invalid_argument, name, "rows of this type have no scale"};
    const PageStrides& s = x.scale_strides;
    if (detail::spanned_elements(axes(s, 1), sizeof(float)) < 0) {
      return {invalid_argument, name, "strides are negative or larger than memory"};
    }
    if (std::is_const_v<E>) return {};
    if (kRowScaled<Unit> && !nests(s, 1, sizeof(float))) return {invalid_argument, name, "rows share a scale"};
    if (!kRowScaled<Unit> && (s.page != 0 || s.token != 0)) {
      return {invalid_argument, name, "belong to pages or tokens, but rows of this type move without them"};
    }
    return {};
  }
  /// Pages of one head need no stride from head to head: their tables tell heads apart.
  [[nodiscard]] bool nests(const PageStrides& s, Index units, std::size_t unit_bytes) const noexcept {
    return detail::spanned_elements(axes(s, units), unit_bytes) >= 0 && detail::extents_nest(axes(s, units));
  }
  [[nodiscard]] std::array<detail::Extent, 4> axes(const PageStrides& s, Index units) const noexcept {
    const bool one_head = table_stride != 0 && s.head == 0;
    return {{{pages, s.page}, {one_head ? 1 : layer.kv_heads, s.head}, {page_size, s.token}, {units, s.dim}}};
  }

  [[nodiscard]] Status check_table(Index h) const noexcept {
    using enum StatusCode;
    if (!holds(tables.size(), table_stride, h, pages_used(h))) {
      return {size_mismatch, "tables", "are shorter than the rows of the head", h};
    }
    for (Index i = 0; i < pages_used(h); ++i) {
      if (page(h, i) < 0 || page(h, i) >= pages) {
        return {invalid_argument, "tables", "name a page that is not in [0, pages)", h, i * page_size};
      }
    }
    return {};
  }

  [[nodiscard]] Status check_pages_once() const noexcept {
    detail::PageEntry repeated;
    if (table_stride == 0) {
      const Index longest = std::max_element(rows.begin(), rows.end()) - rows.begin();
      repeated = detail::find_repeated_page([&](auto f) { each_page(longest, f); });
    } else if (key_strides.head == 0 || value_strides.head == 0) {
      repeated = detail::find_repeated_page([&](auto f) {
        for (Index h = 0; h < layer.kv_heads; ++h) each_page(h, f);
      });
    } else {  // heads have parts of their own in a page
      for (Index h = 0; h < layer.kv_heads && repeated.head < 0; ++h) {
        repeated = detail::find_repeated_page([&](auto f) { each_page(h, f); });
      }
    }
    if (repeated.head < 0) return {};
    return {StatusCode::invalid_argument, "tables", "name a page twice", repeated.head, repeated.place * page_size};
  }
  template <class F>
  void each_page(Index h, F& f) const noexcept {
    for (Index i = 0; i < pages_used(h); ++i) f(detail::PageEntry{h, i}, page(h, i));
  }
};

}  // namespace kvfold
