/// \file
/// Compresses a sequence of a running llama.cpp context, through its public API. Needs llama.h; not part of the umbrella
/// header.
///
/// Written for llama.cpp 0.5.0-dev, commit 0c1e57098. The saved state has no version, so it is taken apart to the last byte
/// and its newest key compared with the one that was seen being computed; whatever is unexpected is refused before anything
/// is written.
#pragma once

#include <algorithm>
#include <cmath>
#include <llama.h>
#include <span>

#include "kvfold/adaptors/llama_query_tap.hpp"
#include "kvfold/adaptors/llama_state_writer.hpp"
#include "kvfold/compressor.hpp"
#include "kvfold/report_of_layers.hpp"

namespace kvfold {

/// What a compression did to a sequence.
struct LlamaReport {
  CompressionReport layers;            ///< of all of them, see ReportOfLayers
  Index rows_before = 0;               ///< cells of the sequence, the same in every layer and head
  Index rows_after = 0;                ///< after it
  std::size_t state_bytes_before = 0;  ///< of the saved state
  std::size_t state_bytes_after = 0;
  Position next_position = 0;  ///< N, where decoding goes on, as before
};

/// Memory that compressing llama.cpp sequences needs, kept from one call to the next. It only grows: two saved states, and
/// what one layer takes.
struct LlamaBuffers {
  WorkspaceBuffer state, compressed, evidence, workspace;
};

/// What becomes of the tap when its sequence has been compressed.
enum class TapAfter : unsigned char {
  reset,  ///< it forgets: the cache's positions are nominal from now on, and older queries would not fit them
  kept,   ///< its queries stay, for a caller who puts the old state back, to compress it in another way
};

/// A compression method as `compress` wants it; `Compressor` is one where its merging needs no log masses.
template <class M>
concept LlamaMethod = requires(const M& method, const LlamaLayerView& view, const QueryRows& queries,
                               Workspace workspace, SerialExecutor& executor, Index workers) {
  { method.workspace_bytes(view, queries, workers) }
  noexcept->std::same_as<Result<std::size_t>>;
  { method.plan(view, queries, workspace, executor) }
  noexcept->std::same_as<Result<CompressionPlan>>;
};

namespace detail {

/// The saved state of a sequence, in `buffer`.
[[nodiscard]] inline Result<std::span<const std::byte>> save_llama_sequence(::llama_context* context,
                                                                            ::llama_seq_id sequence,
                                                                            WorkspaceBuffer& buffer) noexcept {
  llama_synchronize(context);
  const std::size_t bytes = llama_state_seq_get_size(context, sequence);
  if (Status bad = buffer.reserve(bytes); !bad.ok()) return bad;
  auto* to = reinterpret_cast<std::uint8_t*>(buffer.get().data());
  if (bytes == 0 || llama_state_seq_get_data(context, to, bytes, sequence) != bytes) {
    return Status{StatusCode::engine_failed, "sequence", "llama.cpp did not save its state"};
  }
  return std::span<const std::byte>(buffer.get().first(bytes));
}

[[nodiscard]] inline bool load_llama_sequence(::llama_context* context, ::llama_seq_id sequence,
                                              std::span<const std::byte> state) noexcept {
  const auto* from = reinterpret_cast<const std::uint8_t*>(state.data());
  return llama_state_seq_set_data(context, from, state.size(), sequence) == state.size();
}

/// Gives a sequence another state. llama.cpp may have dropped the old one when it refuses the new: then `old` is put back.
[[nodiscard]] inline Status replace_llama_sequence(::llama_context* context, ::llama_seq_id sequence,
                                                   std::span<const std::byte> fresh,
                                                   std::span<const std::byte> old) noexcept {
  if (load_llama_sequence(context, sequence, fresh)) return {};
  if (load_llama_sequence(context, sequence, old)) {
    return {StatusCode::engine_failed, "sequence", "llama.cpp refused the compressed state; it has the old one again"};
  }
  return {StatusCode::engine_failed, "sequence", "llama.cpp refused the compressed state and the old one: it is lost"};
}

/// Whether the last row of the first layer is this key, within what 4 bits can hold; a wrong reading is off by about 1.4.
[[nodiscard]] inline bool is_newest_key(const LlamaState& state, std::span<const float> key, std::span<float> turned,
                                        std::span<float> stored) noexcept {
  constexpr double kTolerance = 0.2;
  const LlamaLayerView layer = state.layer(0);
  const Index width = layer.shape().key_dim;
  std::copy(key.begin(), key.end(), turned.begin());
  static_cast<void>(rotate_channels(turned, width, state.channel_rotation().key_block));
  for (Index h = 0; h < layer.shape().kv_heads; ++h) {
    layer.read_keys(h, state.rows() - 1, 1, stored.subspan(at(h * width), at(width)));
  }
  double difference = 0.0, size = 0.0;
  for (std::size_t i = 0; i < key.size(); ++i) {
    const double d = static_cast<double>(stored[i]) - static_cast<double>(turned[i]);
    difference += d * d;
    size += static_cast<double>(turned[i]) * static_cast<double>(turned[i]);
  }
  return std::sqrt(difference) <= kTolerance * std::sqrt(size);
}

/// A saved state that has been found to be what the tap saw being computed.
[[nodiscard]] inline Result<LlamaState> recognise_llama_state(std::span<const std::byte> bytes,
                                                              const LlamaQueryTap& tap, std::span<float> turned,
                                                              std::span<float> stored) noexcept {
  LlamaModel model = tap.model();
  for (const bool hadamard : {true, false}) {
    model.hadamard = hadamard;
    const Result<LlamaState> state = LlamaState::parse(bytes, model);
    if (!state.ok()) return state.status();
    if (state->length() != tap.newest_position() + 1) {
      return Status{StatusCode::size_mismatch, "tap", "the last query it saw is not of the sequence's last position"};
    }
    if (is_newest_key(*state, tap.newest_key(), turned, stored)) return state;
  }
  return Status{StatusCode::unsupported, "state",
                "its newest key is not the one that was computed last: another "
                "sequence, or another format than that of commit 0c1e57098"};
}

}  // namespace detail

/// Compresses a sequence: its state comes out, every layer is planned on the evidence of the tap, and the kept rows go back
/// in at the nominal positions N - C .. N - 1. The next token is decoded at N, as if nothing had happened.
///
/// llama.cpp has one number of rows for all layers and heads, C, and no place for log masses: budgets are evened out
/// (`equal_counts_cost` says what that costs), and merging needs `MassMode::none`. Afterwards, positions in the cache no
/// longer tell which tokens they were, so a prefix can't be reused or removed by position. The cache's memory stays with the
/// context; freed cells take other tokens.
///
/// \param sequence decoded alone since the tap last started, to its last token
/// \param tap      attached to this context
/// \param after    what becomes of the tap on success
/// \returns the report, or a status; then the sequence is as it was, unless the status says that it is lost. Nothing is
///          changed where the method keeps all rows.
/// Cost: saving and loading the state, and `plan` for each layer, one after the other.
template <LlamaMethod Method, Executor X>
[[nodiscard]] Result<LlamaReport> compress(::llama_context* context, ::llama_seq_id sequence, const Method& method,
                                           LlamaQueryTap& tap, LlamaBuffers& buffers, X& executor,
                                           TapAfter after = TapAfter::reset) noexcept {
  if (context == nullptr) return Status{StatusCode::invalid_argument, "context", "is null"};
  if (sequence < 0 || static_cast<std::uint32_t>(sequence) >= llama_n_seq_max(context)) {
    return Status{StatusCode::invalid_argument, "sequence", "must be in [0, n_seq_max)"};
  }
  if (Status bad = tap.status(); !bad.ok()) return bad;
  const Result<std::span<const std::byte>> old = detail::save_llama_sequence(context, sequence, buffers.state);
  if (!old.ok()) return old.status();

  const auto key_floats = static_cast<Index>(tap.newest_key().size());
  std::span<Position> positions;
  std::span<float> queries, turned, stored;
  const auto take = [&](detail::Arena arena) noexcept {
    positions = arena.take<Position>(tap.rows());
    queries = arena.take<float>(tap.query_floats());
    turned = arena.take<float>(key_floats);
    stored = arena.take<float>(key_floats);
    return arena.required_bytes();
  };
  if (Status bad = buffers.evidence.reserve(take(detail::Arena{})); !bad.ok()) return bad;
  static_cast<void>(take(detail::Arena(buffers.evidence.get())));
  const Result<LlamaState> state = detail::recognise_llama_state(*old, tap, turned, stored);
  if (!state.ok()) return state.status();

  LlamaReport report;
  report.rows_before = state->rows();
  report.state_bytes_before = old->size();
  report.next_position = state->length();
  ReportOfLayers layers;
  std::optional<LlamaStateWriter> writer;
  for (Index l = 0; l < state->layers(); ++l) {
    const LlamaLayerView layer = state->layer(l);
    const QueryRows evidence = tap.queries(l, state->channel_rotation(), positions, queries);
    const Result<std::size_t> bytes =
        method.workspace_bytes(layer, evidence, static_cast<Index>(executor.concurrency()));
    if (!bytes.ok()) return bytes.status();
    if (Status bad = buffers.workspace.reserve(*bytes); !bad.ok()) return bad;
    const Result<CompressionPlan> plan = method.plan(layer, evidence, buffers.workspace.get(), executor);
    if (!plan.ok()) return plan.status();
    if (l == 0) {
      const auto count = static_cast<Index>(plan->kept_rows(0).size());
      const Result<std::size_t> size = llama_state_bytes(*state, count);
      if (!size.ok()) return size.status();
      if (Status bad = buffers.compressed.reserve(*size); !bad.ok()) return bad;
      const Result<LlamaStateWriter> made = LlamaStateWriter::create(*state, count, buffers.compressed.get());
      if (!made.ok()) return made.status();
      writer = *made;
      report.rows_after = count;
      report.state_bytes_after = *size;
    }
    if (Status bad = writer->add_layer(*plan); !bad.ok()) return bad;
    layers.add(report_of(*plan, layer));
  }
  report.layers = layers.total();
  const Result<std::span<const std::byte>> fresh = writer->finish();
  if (!fresh.ok()) return fresh.status();
  if (report.layers.rows_kept == report.layers.rows_before && report.layers.rows_rewritten == 0) return report;
  if (Status bad = detail::replace_llama_sequence(context, sequence, *fresh, *old); !bad.ok()) return bad;
  if (after == TapAfter::reset) tap.reset();
  return report;
}

/// Convenience: the same on the calling thread, with memory that is allocated and released again.
template <LlamaMethod Method>
[[nodiscard]] Result<LlamaReport> compress(::llama_context* context, ::llama_seq_id sequence, const Method& method,
                                           LlamaQueryTap& tap) noexcept {
  LlamaBuffers buffers;
  SerialExecutor executor;
  return compress(context, sequence, method, tap, buffers, executor);
}

}  // namespace kvfold
