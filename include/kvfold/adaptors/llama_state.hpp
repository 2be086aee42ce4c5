/// \file
/// The saved state of one llama.cpp sequence, read from its bytes. Not part of the umbrella header.
///
/// Written for `llama_state_seq_get_data` of llama.cpp 0.5.0-dev, commit 0c1e57098. Other formats are refused.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "kvfold/adaptors/llama_format.hpp"
#include "kvfold/status.hpp"
#include "kvfold/view/concepts.hpp"

namespace kvfold {

/// One layer of a `LlamaState`: a `KVCacheView` that can be read and planned, not written. Non-owning.
///
/// Types are known at run time only, so they are chosen when rows are read: one type of view for all of them. Packed
/// rows need no alignment. One list of cells serves all layers and heads, so all keep the same number of rows
/// (`RowCounts::per_model`), and there is no place for log masses.
class LlamaLayerView {
 public:
  [[nodiscard]] LayerShape shape() const noexcept { return shape_; }
  [[nodiscard]] Index size(Index /*h*/) const noexcept { return keys_.cells; }
  [[nodiscard]] Position position(Index /*h*/, Index t) const noexcept {
    return detail::load_packed_field<std::int32_t>(cells_ + t * detail::kLlamaCell);
  }
  [[nodiscard]] Rope rope() const noexcept { return rope_; }
  [[nodiscard]] ChannelRotation channel_rotation() const noexcept { return turned_; }
  [[nodiscard]] RowCounts row_counts() const noexcept { return RowCounts::per_model; }
  [[nodiscard]] Index row_bytes(Index /*h*/) const noexcept {
    return detail::llama_row_bytes(keys_.type, keys_.width) + detail::llama_row_bytes(values_.type, values_.width);
  }
  void read_keys(Index h, Index t, Index n, std::span<float> out) const noexcept { keys_.read(h, t, n, out.data()); }
  void read_values(Index h, Index t, Index n, std::span<float> out) const noexcept {
    values_.read(h, t, n, out.data());
  }

  /// The layer's tensors as they are stored.
  [[nodiscard]] const detail::LlamaTensor& keys() const noexcept { return keys_; }
  [[nodiscard]] const detail::LlamaTensor& values() const noexcept { return values_; }

 private:
  friend class LlamaState;
  LlamaLayerView() noexcept = default;

  LayerShape shape_;
  Rope rope_;
  ChannelRotation turned_;
  const std::byte* cells_ = nullptr;
  detail::LlamaTensor keys_;
  detail::LlamaTensor values_;
};

/// One sequence as llama.cpp saves it. Non-owning: the bytes must outlive it and its views, and stay as they are.
class LlamaState {
 public:
  /// Reads the bytes that `llama_state_seq_get_data` gave, for a model as described. Nothing is allocated, and nothing
  /// is read beyond the bytes, whatever they hold. O(cells + layers).
  /// \returns the state, or a status whose argument is the field that surprised; its row is the cell, if it is in one.
  ///
  /// Refused are: states that are truncated or longer (models with sliding windows write a second block), another
  /// magic, empty sequences, more than one stream with cells, cells that several sequences share, positions that do
  /// not ascend, cells with several positions (M-RoPE), types other than `LlamaType`, layers of different types or
  /// sizes, head rows that are not whole blocks, and transposed V in blocks.
  [[nodiscard]] static Result<LlamaState> parse(std::span<const std::byte> bytes, const LlamaModel& model) noexcept;

  [[nodiscard]] Index layers() const noexcept { return layout_.layers; }
  [[nodiscard]] Index rows() const noexcept { return layout_.cells; }  ///< T, of every head
  [[nodiscard]] Position position(Index t) const noexcept {
    return detail::load_packed_field<std::int32_t>(field(layout_.first_cell() + t * detail::kLlamaCell));
  }
  /// N: the position of the token to come, one past the last row's.
  [[nodiscard]] Position length() const noexcept { return position(rows() - 1) + 1; }
  [[nodiscard]] std::int32_t sequence() const noexcept { return detail::load_packed_field<std::int32_t>(field(4)); }
  [[nodiscard]] LlamaType key_type() const noexcept { return layout_.key_type; }
  [[nodiscard]] LlamaType value_type() const noexcept { return layout_.value_type; }
  [[nodiscard]] bool has_transposed_values() const noexcept { return layout_.transposed; }
  /// How the stored rows are turned: quantised K by the largest 64 * 2^k that divides D, quantised V by 64 where that
  /// divides E. Queries have to be turned alike (`rotate_channels`).
  [[nodiscard]] ChannelRotation channel_rotation() const noexcept {
    ChannelRotation turned;
    const LayerShape& shape = model_.shape;
    if (model_.hadamard && detail::is_quantised(layout_.key_type) && shape.key_dim % 64 == 0) {
      for (turned.key_block = 64; shape.key_dim % (2 * turned.key_block) == 0;) turned.key_block *= 2;
    }
    if (model_.hadamard && detail::is_quantised(layout_.value_type) && shape.value_dim % 64 == 0)
      turned.value_block = 64;
    return turned;
  }

  /// The view of layer l, which must be in [0, layers()).
  [[nodiscard]] LlamaLayerView layer(Index l) const noexcept {
    KVFOLD_ASSERT(l >= 0 && l < layers());
    const LayerShape& shape = model_.shape;
    const auto tensor = [&](Index header, LlamaType type, Index width, bool transposed) {
      return detail::LlamaTensor{
          field(header + detail::kLlamaLayerHeader), type, shape.kv_heads, width, rows(), transposed};
    };
    LlamaLayerView view;
    view.shape_ = shape;
    view.rope_ = model_.rope;
    view.turned_ = channel_rotation();
    view.cells_ = field(layout_.first_cell());
    view.keys_ = tensor(layout_.keys(l), key_type(), shape.key_dim, false);
    view.values_ = tensor(layout_.values(l), value_type(), shape.value_dim, layout_.transposed);
    return view;
  }

  [[nodiscard]] std::span<const std::byte> bytes() const noexcept { return bytes_; }
  [[nodiscard]] const detail::LlamaLayout& layout() const noexcept { return layout_; }

 private:
  LlamaState() noexcept = default;
  [[nodiscard]] const std::byte* field(Index offset) const noexcept { return bytes_.data() + offset; }

  std::span<const std::byte> bytes_;
  LlamaModel model_;
  detail::LlamaLayout layout_;
};

inline Result<LlamaState> LlamaState::parse(std::span<const std::byte> bytes, const LlamaModel& model) noexcept {
  const Result<detail::LlamaLayout> layout = detail::LlamaParser(bytes, model).parse();
  if (!layout.ok()) return layout.status();
  LlamaState state;
  state.bytes_ = bytes;
  state.model_ = model;
  state.layout_ = layout.value();
  return state;
}

}  // namespace kvfold
