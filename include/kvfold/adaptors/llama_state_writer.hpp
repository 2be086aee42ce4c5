/// \file
/// The state of a llama.cpp sequence with fewer rows, written as llama.cpp reads it. Not part of the umbrella header.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <type_traits>

#include "kvfold/adaptors/llama_state.hpp"
#include "kvfold/apply.hpp"
#include "kvfold/detail/packed_rows.hpp"

namespace kvfold {

namespace detail {

/// Whether a plan is for a layer of this state, and keeps `count` rows of each head.
[[nodiscard]] inline Status check_llama_plan(const LlamaState& state, Index layer, const CompressionPlan& plan,
                                             Index count) noexcept {
  if (Status bad = check_plan(plan, state.layer(layer)); !bad.ok()) return bad;
  if (static_cast<Index>(plan.kept_rows(0).size()) != count) {
    return {StatusCode::size_mismatch, "plan",
            "keeps other counts than the state is to have: all layers have the same"};
  }
  return {};
}

/// The kept rows of one tensor, one cell after the other (or transposed): bit for bit, but for the rewritten ones.
/// \param rewritten [plan.merged.size()][width], or empty
inline void write_llama_tensor(const LlamaTensor& from, const CompressionPlan& plan, std::span<const float> rewritten,
                               std::byte* out) noexcept {
  with_llama_type(from.type, [&]<class E>(std::type_identity<E>) noexcept {
    const Index heads = from.heads, width = from.width, count = plan.kept_offset[1];
    const Index head_bytes = row_bytes<E>(width);
    constexpr auto size = static_cast<Index>(sizeof(E));
    for (Index h = 0; h < heads; ++h) {
      const std::span<const RowId> kept = plan.kept_rows(h);
      if (from.transposed) {
        for (Index channel = h * width; channel < (h + 1) * width; ++channel) {
          for (Index slot = 0; slot < count; ++slot) {
            std::memcpy(out + (channel * count + slot) * size,
                        from.data + (channel * from.cells + kept[at(slot)]) * size, sizeof(E));
          }
        }
      } else {
        for (Index slot = 0; slot < count; ++slot) {
          std::memcpy(out + (slot * heads + h) * head_bytes, from.data + (kept[at(slot)] * heads + h) * head_bytes,
                      at(head_bytes));
        }
      }
      if (rewritten.empty()) continue;
      Index m = plan.merged_offset[at(h)];
      for (const MergedRow& row : plan.merged_rows(h)) {
        const float* numbers = rewritten.data() + m * width;
        if (from.transposed) {
          store_packed<E>(numbers, row_units<E>(width), out + (h * width * count + row.slot) * size, count * size);
        } else {
          store_packed<E>(numbers, row_units<E>(width), out + (row.slot * heads + h) * head_bytes, size);
        }
        ++m;
      }
    }
  });
}

}  // namespace detail

/// Bytes of the state with `count` rows in every head, or `invalid_argument` where it is not in [1, rows()].
[[nodiscard]] inline Result<std::size_t> llama_state_bytes(const LlamaState& state, Index count) noexcept {
  if (count < 1 || count > state.rows()) return Status{StatusCode::invalid_argument, "count", "must be in [1, rows()]"};
  detail::LlamaLayout layout = state.layout();
  layout.cells = count;
  return static_cast<std::size_t>(layout.bytes());
}

/// Writes the state layer by layer, so that plans may share a workspace.
///
/// The new state has `count` cells at the nominal positions N - count .. N - 1, where N is the old one's length: the
/// engine decodes on at N. Rows that were not merged are the old ones bit for bit; keys keep the rotation of their true
/// positions. Non-owning: the state's bytes and `out` must outlive it.
class LlamaStateWriter {
 public:
  /// Writes all but the layers.
  /// \param count rows that every head of every layer keeps, in [1, rows()]
  /// \param out at least `llama_state_bytes(state, count)` bytes, none of them the state's
  /// \returns a status, with nothing written, where these do not hold. O(count + layers).
  [[nodiscard]] static Result<LlamaStateWriter> create(const LlamaState& state, Index count,
                                                       std::span<std::byte> out) noexcept {
    const Result<std::size_t> bytes = llama_state_bytes(state, count);
    if (!bytes.ok()) return bytes.status();
    if (out.size() < bytes.value()) {
      return Status{StatusCode::size_mismatch, "out", "holds fewer bytes than llama_state_bytes() asks for"};
    }
    const auto from = reinterpret_cast<std::uintptr_t>(state.bytes().data());
    const auto to = reinterpret_cast<std::uintptr_t>(out.data());
    if (to < from + state.bytes().size() && from < to + bytes.value()) {
      return Status{StatusCode::invalid_argument, "out", "overlaps the bytes of the state"};
    }
    LlamaStateWriter writer(state, count, out.first(bytes.value()));
    writer.write_cells();
    return writer;
  }

  /// The layer that comes next; `layers()` of the state when all are written.
  [[nodiscard]] Index next_layer() const noexcept { return next_; }

  /// Writes the next layer. The plan must be of `state.layer(next_layer())`, keep `count` rows of each head and write
  /// no log masses; otherwise a status says so, and nothing has been written. O(count * row bytes).
  Status add_layer(const CompressionPlan& plan) noexcept {
    if (next_ == state_.layers()) return {StatusCode::invalid_argument, "plan", "all layers have been written"};
    if (Status bad = detail::check_llama_plan(state_, next_, plan, layout_.cells); !bad.ok()) return bad;
    const LlamaLayerView layer = state_.layer(next_);
    const detail::LlamaLayout& before = state_.layout();
    copy(before.keys(next_), layout_.keys(next_), detail::kLlamaLayerHeader);
    copy(before.values(next_), layout_.values(next_), detail::kLlamaLayerHeader);
    detail::write_llama_tensor(layer.keys(), plan, plan.merged_keys,
                               out_.data() + layout_.keys(next_) + detail::kLlamaLayerHeader);
    detail::write_llama_tensor(layer.values(), plan, plan.merged_values,
                               out_.data() + layout_.values(next_) + detail::kLlamaLayerHeader);
    ++next_;
    return {};
  }

  /// The whole state, or `size_mismatch` while layers are missing.
  [[nodiscard]] Result<std::span<const std::byte>> finish() const noexcept {
    if (next_ != state_.layers()) return Status{StatusCode::size_mismatch, "plans", "layers are missing"};
    return std::span<const std::byte>(out_);
  }

 private:
  LlamaStateWriter(const LlamaState& state, Index count, std::span<std::byte> out) noexcept
      : state_(state), layout_(state.layout()), out_(out) {
    layout_.cells = count;
  }

  template <class T>
  void put(Index offset, T value) const noexcept {
    std::memcpy(out_.data() + offset, &value, sizeof(T));
  }
  void copy(Index from, Index to, Index bytes) const noexcept {
    std::memcpy(out_.data() + to, state_.bytes().data() + from, static_cast<std::size_t>(bytes));
  }

  void write_cells() const noexcept {
    copy(0, 0, detail::kLlamaStart + 4 * layout_.stream);
    put(layout_.first_cell() - 4, static_cast<std::uint32_t>(layout_.cells));
    const Position first = state_.length() - layout_.cells;
    for (Index t = 0; t < layout_.cells; ++t) {
      const Index cell = layout_.first_cell() + t * detail::kLlamaCell;
      put(cell, static_cast<std::int32_t>(first + t));
      put(cell + 4, std::uint32_t{1});
      put(cell + 8, state_.sequence());
    }
    copy(state_.layout().after_cells(), layout_.after_cells(), 8);
    copy(state_.layout().streams_after(), layout_.streams_after(), layout_.bytes() - layout_.streams_after());
  }

  LlamaState state_;
  detail::LlamaLayout layout_;  // of the new state
  std::span<std::byte> out_;
  Index next_ = 0;
};

/// Writes the state that one plan for each layer makes; see `LlamaStateWriter`. All or nothing: every plan is checked
/// before anything is written.
/// \param plans [layers()], each of `state.layer(l)`, all keeping the same number of rows of every head
/// \returns the bytes of `out` that are the new state, or a status.
[[nodiscard]] inline Result<std::span<const std::byte>> write_llama_state(const LlamaState& state,
                                                                          std::span<const CompressionPlan> plans,
                                                                          std::span<std::byte> out) noexcept {
  if (static_cast<Index>(plans.size()) != state.layers()) {
    return Status{StatusCode::size_mismatch, "plans", "there must be one for each layer"};
  }
  if (plans[0].kept_offset.size() < 2) {
    return Status{StatusCode::size_mismatch, "plan", "was made for a cache of another shape"};
  }
  const Index count = plans[0].kept_offset[1];
  for (Index l = 0; l < state.layers(); ++l) {
    if (Status bad = detail::check_llama_plan(state, l, plans[detail::at(l)], count); !bad.ok()) return bad;
  }
  Result<LlamaStateWriter> writer = LlamaStateWriter::create(state, count, out);
  if (!writer.ok()) return writer.status();
  for (const CompressionPlan& plan : plans) {
    if (Status bad = writer->add_layer(plan); !bad.ok()) return bad;
  }
  return writer->finish();
}

}  // namespace kvfold
