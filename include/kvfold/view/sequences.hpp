/// \file
/// The sequences of a batch in one tensor as views: padded to equal lengths, or packed one after the other.
#pragma once

#include <concepts>
#include <ranges>
#include <span>

#include "kvfold/detail/extent.hpp"
#include "kvfold/detail/rows.hpp"
#include "kvfold/status.hpp"
#include "kvfold/view/strided.hpp"

namespace kvfold {

/// Where the sequences of a padded tensor lie, counted in elements. Statics with sizes that overflow give negative
/// strides, which `padded_sequence` refuses.
struct BatchStrides {
  Index sequence = 0;  ///< from one sequence to the next
  Strides row;         ///< within a sequence

  /// `[B][H][T][D]`.
  [[nodiscard]] static constexpr BatchStrides head_major(Index heads, Index tokens, Index width) noexcept {
    return {detail::product({heads, tokens, width}), {detail::product({tokens, width}), width, 1}};
  }
  /// `[B][T][H][D]`.
  [[nodiscard]] static constexpr BatchStrides token_major(Index heads, Index tokens, Index width) noexcept {
    return {detail::product({heads, tokens, width}), {width, detail::product({heads, width}), 1}};
  }
};

enum class Padding : unsigned char {
  left,   ///< sequence b is in the last lengths[b] columns
  right,  ///< sequence b is in the first lengths[b] columns
};

/// One layer of a batch whose sequences are padded to T columns. Non-owning, as `StridedView` is.
///
/// The lists are the engine's, and go along with the views: `rows` is what compression shrinks; entry (b, h, column) of
/// `positions` and `log_masses` belongs to the row that is stored in that column. A view begins at its sequence's first
/// real token and compression moves rows to the front of the view: with left padding they begin where the padding ends.
/// What a `StridedView` has and a batch has not can be set on the view.
template <class K, class V = K>
  requires(Element<std::remove_const_t<K>>&& Element<std::remove_const_t<V>>)
struct PaddedBatch {
  LayerShape layer;
  Index sequences = 0;  ///< B
  Index tokens = 0;     ///< T, columns with the padding
  K* keys = nullptr;
  BatchStrides key_strides;
  V* values = nullptr;
  BatchStrides value_strides;
  Padding padding = Padding::right;
  std::span<Index> rows = {};          ///< [B][H] rows in use; `set_rows` gives those of a cache that is still whole
  std::span<Position> positions = {};  ///< [B][H][T], or empty: rows are at first_position, first_position + 1, ...
  Position first_position = 0;         ///< of each sequence's first real token: padding has no position
  std::span<float> log_masses = {};    ///< [B][H][T], or empty
  Rope rotation = {};
  RowCounts counts = RowCounts::per_head;
};

/// One layer of a batch whose sequences are stored one after the other, as `[sum of T][H][D]`. Non-owning.
template <class K, class V = K>
  requires(Element<std::remove_const_t<K>>&& Element<std::remove_const_t<V>>)
struct PackedBatch {
  LayerShape layer;
  Index sequences = 0;                 ///< B
  Index tokens = 0;                    ///< sum of T over the sequences
  K* keys = nullptr;                   ///< [tokens][H][D]
  V* values = nullptr;                 ///< [tokens][H][E]
  std::span<Index> rows = {};          ///< [B][H] rows in use
  std::span<Position> positions = {};  ///< [H][tokens], or empty: rows are at first_position, first_position + 1, ...
  Position first_position = 0;         ///< of each sequence's first token
  std::span<float> log_masses = {};    ///< [H][tokens], or empty
  Rope rotation = {};
  RowCounts counts = RowCounts::per_head;
};

namespace detail {

/// Lengths or cumulative lengths, in whatever integers the engine has.
template <class R>
concept Lengths = std::ranges::random_access_range<const R> && std::ranges::sized_range<const R> &&
    std::integral<std::ranges::range_value_t<const R>>;

template <Lengths R>
[[nodiscard]] Index length_at(const R& lengths, Index i) noexcept {
  const auto x = std::ranges::begin(lengths)[i];
  return std::in_range<Index>(x) ? static_cast<Index>(x) : -1;
}

/// What padded and packed batches have in common.
template <class B>
[[nodiscard]] Status check_batch_of_sequences(const B& batch, Index b) noexcept {
  const LayerShape& layer = batch.layer;
  if (layer.kv_heads < 1 || layer.kv_heads > kMaxHeads || layer.key_dim < 1 || layer.key_dim > kMaxWidth ||
      layer.value_dim < 1 || layer.value_dim > kMaxWidth) {
    return {StatusCode::invalid_argument, "layer",
            "kv_heads must be in [1, kMaxHeads], key_dim and value_dim in [1, kMaxWidth]"};
  }
  if (batch.sequences < 1 || batch.tokens < 1) {
    return {StatusCode::invalid_argument, "batch", "sequences and tokens must be at least 1"};
  }
  if (b < 0 || b >= batch.sequences) return {StatusCode::invalid_argument, "b", "must be in [0, sequences)"};
  if (batch.keys == nullptr) return {StatusCode::invalid_argument, "keys", "is null"};
  if (batch.values == nullptr) return {StatusCode::invalid_argument, "values", "is null"};
  if (static_cast<Index>(batch.rows.size()) != product({batch.sequences, layer.kv_heads})) {
    return {StatusCode::size_mismatch, "rows", "must have one entry per sequence and head"};
  }
  return {};
}

/// Whether the counts of a sequence fit into the place that it has.
[[nodiscard]] inline Status check_counts(std::span<const Index> rows, Index length) noexcept {
  for (std::size_t h = 0; h < rows.size(); ++h) {
    if (rows[h] < 0 || rows[h] > length) {
      return {StatusCode::invalid_argument, "rows", "must be in [0, length of the sequence]", static_cast<Index>(h)};
    }
  }
  return {};
}

/// Entries from `first` on of a list that may be absent.
template <class T>
[[nodiscard]] std::span<T> from(std::span<T> list, Index first) noexcept {
  return list.empty() ? list : list.subspan(at(first));
}

}  // namespace detail

/// Sets the rows of a batch whose caches are whole: rows[b * heads + h] = lengths[b].
template <detail::Lengths R>
[[nodiscard]] Status set_rows(const R& lengths, Index heads, std::span<Index> rows) noexcept {
  const auto sequences = static_cast<Index>(std::ranges::size(lengths));
  if (heads < 1 || heads > kMaxHeads) return {StatusCode::invalid_argument, "heads", "must be in [1, kMaxHeads]"};
  if (static_cast<Index>(rows.size()) != detail::product({sequences, heads})) {
    return {StatusCode::size_mismatch, "rows", "must have one entry per length and head"};
  }
  for (Index b = 0; b < sequences; ++b) {
    if (detail::length_at(lengths, b) < 0) {
      return {StatusCode::invalid_argument, "lengths", "must be at least 0", -1, b};
    }
  }
  for (Index b = 0; b < sequences; ++b) {
    std::fill_n(rows.begin() + b * heads, heads, detail::length_at(lengths, b));
  }
  return {};
}

/// The view of sequence b, which has lengths[b] in [1, T] real tokens. Padding lies outside of it. O(H).
///
/// \param lengths [B] integers: tokens of each sequence before compression
/// \returns the view, or a status that names the member or argument that is out of range, missing or of another size;
/// its `row()` is b where lengths[b] is at fault.
template <class K, class V, detail::Lengths R>
[[nodiscard]] Result<StridedView<K, V>> padded_sequence(const PaddedBatch<K, V>& batch, const R& lengths,
                                                        Index b) noexcept {
  const LayerShape& layer = batch.layer;
  const Index heads = layer.kv_heads, tokens = batch.tokens;
  if (Status bad = detail::check_batch_of_sequences(batch, b); !bad.ok()) return bad;
  const auto fits = [&](const BatchStrides& s, Index width, std::size_t bytes) {
    return detail::spanned_elements(
               {{batch.sequences, s.sequence}, {heads, s.row.head}, {tokens, s.row.token}, {width, s.row.dim}}, bytes) >
           0;
  };
  if (!fits(batch.key_strides, layer.key_dim, sizeof(K))) {
    return Status{StatusCode::invalid_argument, "key_strides", "are negative or overflow"};
  }
  if (!fits(batch.value_strides, layer.value_dim, sizeof(V))) {
    return Status{StatusCode::invalid_argument, "value_strides", "are negative or overflow"};
  }
  const Index entries = detail::product({batch.sequences, heads, tokens});
  if (!batch.positions.empty() && static_cast<Index>(batch.positions.size()) != entries) {
    return Status{StatusCode::size_mismatch, "positions", "must have one entry per sequence, head and column"};
  }
  if (!batch.log_masses.empty() && static_cast<Index>(batch.log_masses.size()) != entries) {
    return Status{StatusCode::size_mismatch, "log_masses", "must have one entry per sequence, head and column"};
  }
  if (static_cast<Index>(std::ranges::size(lengths)) != batch.sequences) {
    return Status{StatusCode::size_mismatch, "lengths", "must have one entry per sequence"};
  }
  const Index length = detail::length_at(lengths, b);
  if (length < 1 || length > tokens) {
    return Status{StatusCode::invalid_argument, "lengths", "must be in [1, tokens]", -1, b};
  }
  const std::span<Index> rows = batch.rows.subspan(detail::at(b * heads), detail::at(heads));
  if (Status bad = detail::check_counts(rows, length); !bad.ok()) return bad;

  const Index first = batch.padding == Padding::left ? tokens - length : 0;
  const BatchStrides &k = batch.key_strides, &v = batch.value_strides;
  return StridedView<K, V>{.layer = layer,
                           .keys = batch.keys + b * k.sequence + first * k.row.token,
                           .key_strides = k.row,
                           .values = batch.values + b * v.sequence + first * v.row.token,
                           .value_strides = v.row,
                           .rows = rows,
                           .positions = detail::from(batch.positions, b * heads * tokens + first),
                           .position_stride = batch.positions.empty() ? 0 : tokens,
                           .first_position = batch.first_position,
                           .log_masses = detail::from(batch.log_masses, b * heads * tokens + first),
                           .log_mass_stride = batch.log_masses.empty() ? 0 : tokens,
                           .rotation = batch.rotation,
                           .counts = batch.counts};
}

/// The view of sequence b, which is tokens [cumulative_lengths[b], cumulative_lengths[b + 1]), at least one. O(B + H).
///
/// \param cumulative_lengths [B + 1] integers (`cu_seqlens`), ascending from 0 to at most `batch.tokens`
/// \returns the view, or a status as for `padded_sequence`.
template <class K, class V, detail::Lengths R>
[[nodiscard]] Result<StridedView<K, V>> packed_sequence(const PackedBatch<K, V>& batch, const R& cumulative_lengths,
                                                        Index b) noexcept {
  const LayerShape& layer = batch.layer;
  const Index heads = layer.kv_heads, tokens = batch.tokens;
  if (Status bad = detail::check_batch_of_sequences(batch, b); !bad.ok()) return bad;
  const auto fits = [&](Index width, std::size_t bytes) {
    return detail::spanned_elements({{tokens, detail::product({heads, width})}, {heads * width, 1}}, bytes) > 0;
  };
  if (!fits(layer.key_dim, sizeof(K)) || !fits(layer.value_dim, sizeof(V))) {
    return Status{StatusCode::invalid_argument, "tokens", "tokens * kv_heads * width overflows"};
  }
  const Index entries = detail::product({heads, tokens});
  if (!batch.positions.empty() && static_cast<Index>(batch.positions.size()) != entries) {
    return Status{StatusCode::size_mismatch, "positions", "must have one entry per head and token"};
  }
  if (!batch.log_masses.empty() && static_cast<Index>(batch.log_masses.size()) != entries) {
    return Status{StatusCode::size_mismatch, "log_masses", "must have one entry per head and token"};
  }
  if (static_cast<Index>(std::ranges::size(cumulative_lengths)) - 1 != batch.sequences) {
    return Status{StatusCode::size_mismatch, "cumulative_lengths", "must have one entry per sequence, and one more"};
  }
  if (detail::length_at(cumulative_lengths, 0) != 0) {
    return Status{StatusCode::invalid_argument, "cumulative_lengths", "must begin with 0", -1, 0};
  }
  for (Index i = 0; i < batch.sequences; ++i) {
    const Index next = detail::length_at(cumulative_lengths, i + 1);
    if (next < detail::length_at(cumulative_lengths, i) || next > tokens) {
      return Status{StatusCode::invalid_argument, "cumulative_lengths", "must ascend, and end within the tokens", -1,
                    i + 1};
    }
  }
  const Index first = detail::length_at(cumulative_lengths, b);
  const Index length = detail::length_at(cumulative_lengths, b + 1) - first;
  if (length < 1) {
    return Status{StatusCode::invalid_argument, "cumulative_lengths", "sequence b has no tokens", -1, b};
  }
  const std::span<Index> rows = batch.rows.subspan(detail::at(b * heads), detail::at(heads));
  if (Status bad = detail::check_counts(rows, length); !bad.ok()) return bad;
  return StridedView<K, V>{.layer = layer,
                           .keys = batch.keys + first * heads * layer.key_dim,
                           .key_strides = Strides::token_major(heads, layer.key_dim),
                           .values = batch.values + first * heads * layer.value_dim,
                           .value_strides = Strides::token_major(heads, layer.value_dim),
                           .rows = rows,
                           .positions = detail::from(batch.positions, first),
                           .position_stride = batch.positions.empty() ? 0 : tokens,
                           .first_position = batch.first_position,
                           .log_masses = detail::from(batch.log_masses, first),
                           .log_mass_stride = batch.log_masses.empty() ? 0 : tokens,
                           .rotation = batch.rotation,
                           .counts = batch.counts};
}

}  // namespace kvfold
