/// \file
/// Sequences as llama.cpp would save them, built from the description of the format, and plans for them.
#pragma once

#include <kvfold/adaptors/llama_state.hpp>
#include <kvfold/types.hpp>

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "builders.hpp"

namespace kvfold::test {

using Bytes = std::vector<std::byte>;

inline std::size_t at(Index i) { return static_cast<std::size_t>(i); }

template <class T>
void append(Bytes& to, T value) {
  const auto* first = reinterpret_cast<const std::byte*>(&value);
  to.insert(to.end(), first, first + sizeof(T));
}

/// ggml's numbers, and what 32 numbers take: from its documentation, not from the code under test.
struct Type {
  std::int32_t number;
  Index bytes_of_32;
  const char* name;
};
inline constexpr Type kF32{0, 128, "f32"}, kF16{1, 64, "f16"}, kQ4{2, 18, "q4_0"}, kQ8{8, 34, "q8_0"},
    kBF16{30, 64, "bf16"};

inline bool in_blocks(const Type& type) { return type.number == 2 || type.number == 8; }

/// `floats` in a storage type.
template <class E>
Bytes elements(const std::vector<float>& floats) {
  Bytes out;
  for (const float x : floats) append(out, from_float<E>(x));
  return out;
}
template <class B>
Bytes blocks(const std::vector<float>& floats) {
  Bytes out;
  for (std::size_t i = 0; i < floats.size(); i += 32) {
    B block;
    store_block(&floats[i], block);
    append(out, block);
  }
  return out;
}
inline Bytes encode(const Type& type, const std::vector<float>& floats) {
  switch (type.number) {
    case 0: return elements<float>(floats);
    case 1: return elements<Float16>(floats);
    case 30: return elements<BFloat16>(floats);
    case 8: return blocks<BlockQ8_0>(floats);
    default: return blocks<BlockQ4_0>(floats);
  }
}

/// The floats that stored bytes mean.
inline std::vector<float> decode(const Type& type, const Bytes& bytes) {
  std::vector<float> out;
  const auto each = [&]<class E>(E unit) {
    for (std::size_t i = 0; i < bytes.size(); i += sizeof(E)) {
      std::memcpy(&unit, &bytes[i], sizeof(E));
      if constexpr (Element<E>) {
        out.push_back(to_float(unit));
      } else {
        std::array<float, 32> floats{};
        load_block(unit, floats.data());
        out.insert(out.end(), floats.begin(), floats.end());
      }
    }
  };
  switch (type.number) {
    case 0: each(float{}); break;
    case 1: each(Float16{}); break;
    case 30: each(BFloat16{}); break;
    case 8: each(BlockQ8_0{}); break;
    default: each(BlockQ4_0{}); break;
  }
  return out;
}

/// A sequence, and the state that the engine would save.
struct Sequence {
  Type key_type = kF16, value_type = kF16;
  bool transposed = false;
  Index layers = 3, heads = 2, group = 2, key_dim = 64, value_dim = 32;
  std::int32_t id = 5;
  std::uint32_t streams = 1, stream = 0;
  std::vector<std::int32_t> positions;
  std::vector<std::vector<Bytes>> keys, values;  // [layer][cell * heads + head], the bytes of a row

  Sequence() { set_rows(13); }

  void set_rows(Index count) {
    positions.resize(at(count));
    std::iota(positions.begin(), positions.end(), 0);
  }
  [[nodiscard]] Index rows() const { return static_cast<Index>(positions.size()); }
  [[nodiscard]] const Bytes& key(Index l, Index h, Index t) const { return keys[at(l)][at(t * heads + h)]; }
  [[nodiscard]] const Bytes& value(Index l, Index h, Index t) const { return values[at(l)][at(t * heads + h)]; }
  [[nodiscard]] LlamaModel model() const {
    return {.layers = layers, .shape = {heads, group, key_dim, value_dim}, .rope = {.kind = RopeKind::adjacent}};
  }

  Sequence& fill(std::uint64_t seed = 1) {
    Random random(seed);
    const auto rows_of = [&](const Type& type, Index width) {
      const std::vector<float> floats = clustered_rows(rows() * heads, width, 5, 0.3f, random);
      std::vector<Bytes> out;
      for (auto row = floats.begin(); row != floats.end(); row += width) {
        out.push_back(encode(type, std::vector<float>(row, row + width)));
      }
      return out;
    };
    keys.clear();
    values.clear();
    for (Index l = 0; l < layers; ++l) {
      keys.push_back(rows_of(key_type, key_dim));
      values.push_back(rows_of(value_type, value_dim));
    }
    return *this;
  }

  /// \param headers gets the offsets of all bytes that are not of rows
  Bytes state(std::vector<std::size_t>* headers = nullptr) const {
    Bytes out;
    std::size_t start = 0;
    const auto note = [&] {
      for (; headers != nullptr && start < out.size(); ++start) headers->push_back(start);
      start = out.size();
    };
    append(out, std::uint32_t{0xaf143cd8});
    append(out, id);
    append(out, streams);
    for (std::uint32_t s = 0; s < stream; ++s) append(out, std::uint32_t{0});
    append(out, static_cast<std::uint32_t>(rows()));
    for (const std::int32_t p : positions) {
      append(out, p);
      append(out, std::uint32_t{1});
      append(out, id);
    }
    append(out, std::uint32_t{transposed ? 1u : 0u});
    append(out, static_cast<std::uint32_t>(layers));
    for (Index l = 0; l < layers; ++l) {
      append(out, key_type.number);
      append(out, static_cast<std::uint64_t>(heads * key_dim / 32 * key_type.bytes_of_32));
      note();
      for (const Bytes& row : keys[at(l)]) out.insert(out.end(), row.begin(), row.end());
      start = out.size();
    }
    for (Index l = 0; l < layers; ++l) {
      append(out, value_type.number);
      if (transposed) {
        append(out, static_cast<std::uint32_t>(value_type.bytes_of_32 / 32));
        append(out, static_cast<std::uint32_t>(heads * value_dim));
      } else {
        append(out, static_cast<std::uint64_t>(heads * value_dim / 32 * value_type.bytes_of_32));
      }
      note();
      append_values(l, out);
      start = out.size();
    }
    for (std::uint32_t s = stream + 1; s < streams; ++s) append(out, std::uint32_t{0});
    note();
    return out;
  }

 private:
  void append_values(Index l, Bytes& out) const {
    if (!transposed) {
      for (const Bytes& row : values[at(l)]) out.insert(out.end(), row.begin(), row.end());
      return;
    }
    const Index size = value_type.bytes_of_32 / 32;
    for (Index h = 0; h < heads; ++h) {
      for (Index d = 0; d < value_dim; ++d) {
        for (Index t = 0; t < rows(); ++t) {
          const auto element = value(l, h, t).begin() + d * size;
          out.insert(out.end(), element, element + size);
        }
      }
    }
  }
};

inline std::vector<Sequence> all_kinds() {
  std::vector<Sequence> out;
  const std::array<std::pair<Type, Type>, 7> types{
      {{kF32, kF32}, {kF16, kF16}, {kBF16, kBF16}, {kQ8, kQ8}, {kQ4, kQ4}, {kQ8, kF16}, {kQ4, kF32}}};
  for (const auto& [key, value] : types) {
    for (const bool transposed : {false, true}) {
      if (transposed && in_blocks(value)) continue;
      Sequence s;
      s.key_type = key;
      s.value_type = value;
      s.transposed = transposed;
      out.push_back(s.fill());
    }
  }
  return out;
}

inline std::string name_of(const Sequence& s) {
  return std::string(s.key_type.name) + "/" + s.value_type.name + (s.transposed ? " transposed" : "");
}

/// A plan that owns its tables, and keeps the same number of rows of every head.
struct OwnedPlan {
  std::vector<Index> source, kept_offset, merged_offset;
  std::vector<RowId> kept;
  std::vector<MergedRow> merged;
  std::vector<float> merged_values, merged_keys;
  CompressionPlan plan;

  OwnedPlan(const Sequence& s, const std::vector<std::vector<RowId>>& rows)
      : source(at(s.heads), s.rows()), kept_offset{0}, merged_offset(at(s.heads) + 1, 0) {
    for (const auto& head : rows) {
      kept.insert(kept.end(), head.begin(), head.end());
      kept_offset.push_back(static_cast<Index>(kept.size()));
    }
    plan.shape = s.model().shape;
    refresh();
  }
  OwnedPlan(OwnedPlan&&) = default;
  OwnedPlan(const OwnedPlan&) = delete;

  CompressionPlan& refresh() {
    plan.source_rows = source;
    plan.kept_offset = kept_offset;
    plan.kept = kept;
    plan.merged_offset = merged_offset;
    plan.merged = merged;
    plan.merged_values = merged_values;
    plan.merged_keys = merged_keys;
    return plan;
  }
};

inline OwnedPlan keep_first(const Sequence& s, Index count) {
  std::vector<RowId> rows(at(count));
  std::iota(rows.begin(), rows.end(), 0);
  return {s, std::vector<std::vector<RowId>>(at(s.heads), rows)};
}

inline std::vector<CompressionPlan> for_all_layers(const Sequence& s, const CompressionPlan& plan) {
  return std::vector<CompressionPlan>(at(s.layers), plan);
}

/// What keeping these rows should give, by the test's own builder.
inline Sequence kept_by(const Sequence& s, const std::vector<std::vector<std::vector<RowId>>>& rows) {
  Sequence out = s;
  const auto count = static_cast<Index>(rows[0][0].size());
  out.positions.assign(at(count), 0);
  std::iota(out.positions.begin(), out.positions.end(), s.positions.back() + 1 - static_cast<std::int32_t>(count));
  for (Index l = 0; l < s.layers; ++l) {
    out.keys[at(l)].clear();
    out.values[at(l)].clear();
    for (Index i = 0; i < count; ++i) {
      for (Index h = 0; h < s.heads; ++h) {
        out.keys[at(l)].push_back(s.key(l, h, rows[at(l)][at(h)][at(i)]));
        out.values[at(l)].push_back(s.value(l, h, rows[at(l)][at(h)][at(i)]));
      }
    }
  }
  return out;
}

inline void expect_rows_of(const LlamaState& state, const Sequence& s) {
  ASSERT_EQ(state.rows(), s.rows());
  std::vector<float> keys(at(s.rows() * s.key_dim)), values(at(s.rows() * s.value_dim));
  for (Index l = 0; l < s.layers; ++l) {
    const LlamaLayerView view = state.layer(l);
    for (Index h = 0; h < s.heads; ++h) {
      std::vector<float> expected_keys, expected_values;
      for (Index t = 0; t < s.rows(); ++t) {
        const auto key = decode(s.key_type, s.key(l, h, t)), value = decode(s.value_type, s.value(l, h, t));
        expected_keys.insert(expected_keys.end(), key.begin(), key.end());
        expected_values.insert(expected_values.end(), value.begin(), value.end());
        ASSERT_EQ(view.position(h, t), s.positions[at(t)]);
      }
      view.read_keys(h, 0, s.rows(), keys);
      view.read_values(h, 0, s.rows(), values);
      ASSERT_EQ(keys, expected_keys) << "layer " << l << ", head " << h;
      ASSERT_EQ(values, expected_values) << "layer " << l << ", head " << h;
    }
  }
}

}  // namespace kvfold::test
