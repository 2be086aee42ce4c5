/// \file
/// The bytes of one llama.cpp sequence as its engine saves them: types, sizes, places. See `llama_state.hpp`.
///
/// The format is that of `llama_state_seq_get_data` in llama.cpp 0.5.0-dev, commit 0c1e57098, native endian and packed.
/// It has no version number of its own. So every byte has to be accounted for, and whatever else comes is refused.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <type_traits>

#include "kvfold/detail/extent.hpp"
#include "kvfold/detail/packed_rows.hpp"
#include "kvfold/status.hpp"
#include "kvfold/view/concepts.hpp"

/// What every refusal ends with.
#define KVFOLD_LLAMA_VERSION "; written for llama.cpp 0.5.0-dev, commit 0c1e57098"

namespace kvfold {

/// The types of K and V that are understood, with their numbers in ggml (`ggml_type`).
enum class LlamaType : std::int32_t { f32 = 0, f16 = 1, q4_0 = 2, q8_0 = 8, bf16 = 30 };

/// What the caller knows of the model, and the state does not say. Layers have the same sizes.
struct LlamaModel {
  Index layers = 0;  ///< L, layers with a KV cache, in [1, kMaxLlamaLayers]
  LayerShape shape;  ///< of each layer, ranges as everywhere
  Rope rope =
      {};  ///< Llama: `RopeKind::adjacent`. `unknown` for a state that was compressed: its positions are nominal
  bool hadamard = true;  ///< false where the engine ran with LLAMA_ATTN_ROT_DISABLE=1
};

inline constexpr Index kMaxLlamaLayers = 1 << 16;

namespace detail {

/// Calls f with the `std::type_identity` of the storage type.
template <class F>
auto with_llama_type(LlamaType type, F f) noexcept {
  switch (type) {
    case LlamaType::f16: return f(std::type_identity<Float16>{});
    case LlamaType::bf16: return f(std::type_identity<BFloat16>{});
    case LlamaType::q8_0: return f(std::type_identity<BlockQ8_0>{});
    case LlamaType::q4_0: return f(std::type_identity<BlockQ4_0>{});
    case LlamaType::f32: break;
  }
  return f(std::type_identity<float>{});
}

[[nodiscard]] constexpr bool is_llama_type(std::int32_t number) noexcept {
  return number == 0 || number == 1 || number == 2 || number == 8 || number == 30;
}

[[nodiscard]] inline bool is_quantised(LlamaType type) noexcept {
  return with_llama_type(type, []<class E>(std::type_identity<E>) noexcept { return kInBlocks<E>; });
}

/// Bytes of `width` numbers; -1 where blocks do not divide them.
[[nodiscard]] inline Index llama_row_bytes(LlamaType type, Index width) noexcept {
  return with_llama_type(type, [width]<class E>(std::type_identity<E>) noexcept {
    return width_fits<E>(width) ? row_bytes<E>(width) : Index{-1};
  });
}

/// The K or the V of one layer: `[cells][heads][width]`, or transposed `[heads][width][cells]`.
struct LlamaTensor {
  const std::byte* data = nullptr;
  LlamaType type = LlamaType::f32;
  Index heads = 0, width = 0, cells = 0;
  bool transposed = false;

  /// Rows [t, t + n) of head h as n * width floats.
  void read(Index h, Index t, Index n, float* out) const noexcept {
    with_llama_type(type, [&]<class E>(std::type_identity<E>) noexcept {
      constexpr auto size = static_cast<Index>(sizeof(E));
      if constexpr (Element<E>) {
        if (transposed) {
          load_packed_columns<E>(data + (h * width * cells + t) * size, cells * size, n, width, out);
          return;
        }
      }
      for (Index i = 0; i < n; ++i) {
        load_packed<E>(data + ((t + i) * heads + h) * row_bytes<E>(width), row_units<E>(width), out + i * width);
      }
    });
  }
};

template <class T>
[[nodiscard]] T load_packed_field(const std::byte* from) noexcept {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

inline constexpr std::uint32_t kLlamaMagic = 0xaf143cd8u;
inline constexpr Index kLlamaStart = 12;        // magic, seq_id, n_stream
inline constexpr Index kLlamaCell = 12;         // pos, n_seq_id, seq_id
inline constexpr Index kLlamaLayerHeader = 12;  // type and row_bytes, or type, elem_bytes and n_embd_v_gqa

/// Where things are in a state. The sizes of a state with another number of cells follow from it, too.
struct LlamaLayout {
  Index streams = 0;        // n_stream
  Index stream = 0;         // the one that has cells
  Index cells = 0;          // N or fewer
  Index layers = 0;         // L
  Index key_row_bytes = 0;  // of all heads
  Index value_row_bytes = 0;
  LlamaType key_type = LlamaType::f32, value_type = LlamaType::f32;
  bool transposed = false;

  [[nodiscard]] Index first_cell() const noexcept { return kLlamaStart + 4 * (stream + 1); }
  [[nodiscard]] Index after_cells() const noexcept { return first_cell() + kLlamaCell * cells; }
  /// The headers of a layer's K and V; their data follow.
  [[nodiscard]] Index keys(Index layer) const noexcept {
    return after_cells() + 8 + layer * (kLlamaLayerHeader + cells * key_row_bytes);
  }
  [[nodiscard]] Index values(Index layer) const noexcept {
    return keys(layers) + layer * (kLlamaLayerHeader + cells * value_row_bytes);
  }
  [[nodiscard]] Index streams_after() const noexcept { return values(layers); }
  [[nodiscard]] Index bytes() const noexcept { return streams_after() + 4 * (streams - 1 - stream); }
};

/// Goes through a state from its first byte to its last, and fills in a layout.
class LlamaParser {
 public:
  LlamaParser(std::span<const std::byte> bytes, const LlamaModel& model) noexcept : bytes_(bytes), model_(model) {}

  [[nodiscard]] Result<LlamaLayout> parse() noexcept {
    if (Status bad = check_model(); !bad.ok()) return bad;
    if (Status bad = read_start(); !bad.ok()) return bad;
    if (Status bad = read_cells(); !bad.ok()) return bad;
    if (Status bad = read_kinds(); !bad.ok()) return bad;
    const LayerShape& shape = model_.shape;
    const TensorFields keys{"K type", "K row_bytes", "K row_bytes", "K data"};
    const TensorFields values{"V type", layout_.transposed ? "V elem_bytes" : "V row_bytes", "V n_embd_v_gqa",
                              "V data"};
    if (Status bad = read_tensors(keys, shape.key_dim, false, layout_.key_type, layout_.key_row_bytes); !bad.ok()) {
      return bad;
    }
    if (Status bad =
            read_tensors(values, shape.value_dim, layout_.transposed, layout_.value_type, layout_.value_row_bytes);
        !bad.ok()) {
      return bad;
    }
    if (Status bad = read_end(); !bad.ok()) return bad;
    KVFOLD_ASSERT(layout_.bytes() == static_cast<Index>(bytes_.size()));
    return layout_;
  }

 private:
  struct TensorFields {
    const char *type, *size, *channels, *data;
  };

  static Status wrong(const char* field, const char* detail, Index row = -1) noexcept {
    return {StatusCode::invalid_argument, field, detail, -1, row};
  }
  static Status unsupported(const char* field, const char* detail, Index row = -1) noexcept {
    return {StatusCode::unsupported, field, detail, -1, row};
  }
  static Status ends(const char* field) noexcept {
    return {StatusCode::size_mismatch, field, "the state ends before the end of this field" KVFOLD_LLAMA_VERSION};
  }

  [[nodiscard]] Index left() const noexcept { return static_cast<Index>(bytes_.size()) - at_; }

  template <class T>
  [[nodiscard]] bool read(T& value) noexcept {
    if (left() < static_cast<Index>(sizeof(T))) return false;
    value = load_packed_field<T>(bytes_.data() + at_);
    at_ += static_cast<Index>(sizeof(T));
    return true;
  }

  [[nodiscard]] Status check_model() const noexcept {
    const LayerShape& shape = model_.shape;
    if (model_.layers < 1 || model_.layers > kMaxLlamaLayers) {
      return {StatusCode::invalid_argument, "model", "layers must be in [1, kMaxLlamaLayers]"};
    }
    if (shape.kv_heads < 1 || shape.kv_heads > kMaxHeads || shape.group_size < 1 || shape.group_size > kMaxHeads ||
        shape.query_heads() > kMaxHeads) {
      return {StatusCode::invalid_argument, "model",
              "kv_heads, group_size and their product must be in [1, kMaxHeads]"};
    }
    if (shape.key_dim < 1 || shape.key_dim > kMaxWidth || shape.value_dim < 1 || shape.value_dim > kMaxWidth) {
      return {StatusCode::invalid_argument, "model", "key_dim and value_dim must be in [1, kMaxWidth]"};
    }
    return {};
  }

  /// Magic, sequence, streams up to the one that has cells, and how many it has.
  [[nodiscard]] Status read_start() noexcept {
    std::uint32_t magic = 0, streams = 0, cells = 0;
    if (!read(magic)) return ends("magic");
    if (magic != kLlamaMagic) return wrong("magic", "is not that of a sequence's state" KVFOLD_LLAMA_VERSION);
    if (!read(sequence_)) return ends("seq_id");
    if (sequence_ < 0) return wrong("seq_id", "is not that of one sequence" KVFOLD_LLAMA_VERSION);
    if (!read(streams)) return ends("n_stream");
    if (streams == 0) return wrong("n_stream", "there are no streams" KVFOLD_LLAMA_VERSION);
    if (Index{streams} > left() / 4) return ends("n_stream");
    layout_.streams = streams;
    for (; layout_.stream < layout_.streams; ++layout_.stream) {
      if (!read(cells)) return ends("cells");
      if (cells != 0) break;
    }
    if (cells == 0) return wrong("cells", "the sequence is empty" KVFOLD_LLAMA_VERSION);
    if (Index{cells} > kMaxRows || Index{cells} > left() / kLlamaCell) return ends("cells");
    layout_.cells = cells;
    return {};
  }

  /// Whether each cell of `size` bytes belongs to this sequence alone.
  [[nodiscard]] bool cells_are(Index size) const noexcept {
    if (layout_.cells > left() / size) return false;
    for (Index t = 0; t < layout_.cells; ++t) {
      const std::byte* cell = bytes_.data() + at_ + t * size;
      if (load_packed_field<std::uint32_t>(cell + 4) != 1) return false;
      if (load_packed_field<std::int32_t>(cell + size - 4) != sequence_) return false;
    }
    return true;
  }

  [[nodiscard]] Status read_cells() noexcept {
    if (!cells_are(kLlamaCell) && (cells_are(kLlamaCell + 8) || cells_are(kLlamaCell + 12))) {
      return unsupported("cells", "cells have several positions each (M-RoPE)" KVFOLD_LLAMA_VERSION);
    }
    std::int64_t previous = -1;
    for (Index t = 0; t < layout_.cells; ++t) {
      std::int32_t position = 0, sequence = 0;
      std::uint32_t sequences = 0;
      if (!read(position)) return ends("pos");
      if (!read(sequences)) return ends("n_seq_id");
      if (!read(sequence)) return ends("cell seq_id");
      if (sequences != 1) {
        return unsupported("n_seq_id", "a cell is not of exactly one sequence" KVFOLD_LLAMA_VERSION, t);
      }
      if (sequence != sequence_) {
        return unsupported("cell seq_id", "a cell is of another sequence than the state" KVFOLD_LLAMA_VERSION, t);
      }
      if (position <= previous) {
        return unsupported("pos", "positions do not ascend from at least 0" KVFOLD_LLAMA_VERSION, t);
      }
      previous = position;
    }
    return {};
  }

  [[nodiscard]] Status read_kinds() noexcept {
    std::uint32_t transposed = 0, layers = 0;
    if (!read(transposed)) return ends("v_trans");
    if (transposed > 1) return wrong("v_trans", "is neither 0 nor 1" KVFOLD_LLAMA_VERSION);
    layout_.transposed = transposed == 1;
    if (!read(layers)) return ends("n_layer");
    if (Index{layers} != model_.layers) {
      return {StatusCode::size_mismatch, "n_layer", "is not the model's number of layers" KVFOLD_LLAMA_VERSION};
    }
    layout_.layers = model_.layers;
    return {};
  }

  /// All K layers, or all V layers.
  [[nodiscard]] Status read_tensors(const TensorFields& names, Index width, bool transposed, LlamaType& type,
                                    Index& row_bytes) noexcept {
    for (Index l = 0; l < layout_.layers; ++l) {
      std::int32_t number = 0;
      if (!read(number)) return ends(names.type);
      if (!is_llama_type(number)) {
        return unsupported(names.type, "is not f32, f16, bf16, q8_0 or q4_0" KVFOLD_LLAMA_VERSION);
      }
      if (l == 0) type = static_cast<LlamaType>(number);
      if (type != static_cast<LlamaType>(number)) {
        return unsupported(names.type, "layers have different types" KVFOLD_LLAMA_VERSION);
      }
      const Index head_bytes = llama_row_bytes(type, width);
      if (head_bytes < 0 || (transposed && is_quantised(type))) {
        return unsupported(names.type,
                           "blocks do not divide the rows of heads, or V is transposed" KVFOLD_LLAMA_VERSION);
      }
      row_bytes = model_.shape.kv_heads * head_bytes;
      if (Status bad = transposed ? read_channels(names, width, type) : read_row_bytes(names, row_bytes); !bad.ok()) {
        return bad;
      }
      const Index data = product({layout_.cells, row_bytes});
      if (data < 0 || data > left()) return ends(names.data);
      at_ += data;
    }
    return {};
  }

  [[nodiscard]] Status read_row_bytes(const TensorFields& names, Index expected) noexcept {
    std::uint64_t row_bytes = 0;
    if (!read(row_bytes)) return ends(names.size);
    if (row_bytes != static_cast<std::uint64_t>(expected)) {
      return {StatusCode::size_mismatch, names.size,
              "is not what a row of the model's heads takes in this type" KVFOLD_LLAMA_VERSION};
    }
    return {};
  }

  [[nodiscard]] Status read_channels(const TensorFields& names, Index width, LlamaType type) noexcept {
    std::uint32_t element_bytes = 0, channels = 0;
    if (!read(element_bytes)) return ends(names.size);
    if (Index{element_bytes} != llama_row_bytes(type, 1)) {
      return {StatusCode::size_mismatch, names.size, "is not the size of this type" KVFOLD_LLAMA_VERSION};
    }
    if (!read(channels)) return ends(names.channels);
    if (Index{channels} != model_.shape.kv_heads * width) {
      return {StatusCode::size_mismatch, names.channels,
              "is not kv_heads * value_dim of the model" KVFOLD_LLAMA_VERSION};
    }
    return {};
  }

  /// The streams that follow, all empty, and nothing after them.
  [[nodiscard]] Status read_end() noexcept {
    for (Index s = layout_.stream + 1; s < layout_.streams; ++s) {
      std::uint32_t cells = 0;
      if (!read(cells)) return ends("cells");
      if (cells != 0) return unsupported("cells", "more than one stream has cells" KVFOLD_LLAMA_VERSION);
    }
    if (left() != 0) {
      return {StatusCode::size_mismatch, "end",
              "bytes are left over: a second block (sliding windows), or another format" KVFOLD_LLAMA_VERSION};
    }
    return {};
  }

  std::span<const std::byte> bytes_;
  const LlamaModel& model_;
  LlamaLayout layout_;
  std::int32_t sequence_ = 0;
  Index at_ = 0;
};

}  // namespace detail
}  // namespace kvfold

#undef KVFOLD_LLAMA_VERSION
