/// \file
/// The queries of a running llama.cpp context, read while they are computed. Needs llama.h; not part of the umbrella header.
#pragma once

#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <llama.h>
#include <memory>
#include <new>

#include "kvfold/adaptors/llama_state.hpp"
#include "kvfold/detail/arena.hpp"
#include "kvfold/evidence/query_rows.hpp"
#include "kvfold/exec/workspace.hpp"
#include "kvfold/view/channel_rotation.hpp"

namespace kvfold {

namespace detail {

/// A number from the model's metadata, `<architecture>.<key>`, or `otherwise` where it has none.
[[nodiscard]] inline Index llama_metadata(const ::llama_model* model, const char* key, Index otherwise) noexcept {
  char architecture[64], name[128], value[32];
  if (llama_model_meta_val_str(model, "general.architecture", architecture, sizeof architecture) < 0) return otherwise;
  std::snprintf(name, sizeof name, "%s.%s", architecture, key);
  if (llama_model_meta_val_str(model, name, value, sizeof value) < 0) return otherwise;
  return static_cast<Index>(std::strtol(value, nullptr, 10));
}

}  // namespace detail

/// The shape of a loaded model's cache. Its RoPE stays `unknown`: llama.cpp does not tell all that changes frequencies,
/// and positions in a cache that was compressed before are nominal.
/// \returns `unsupported` for models whose caches cannot be compressed through saved states: recurrent and hybrid ones,
/// encoders, sliding windows, and such without plain RoPE (ALiBi would take nominal positions for true ones).
[[nodiscard]] inline Result<LlamaModel> llama_model_of(const ::llama_model* model) noexcept {
  const auto refuse = [](const char* why) { return Status{StatusCode::unsupported, "model", why}; };
  if (model == nullptr) return Status{StatusCode::invalid_argument, "model", "is null"};
  if (llama_model_is_recurrent(model) || llama_model_is_hybrid(model)) return refuse("has recurrent layers");
  if (llama_model_has_encoder(model)) return refuse("has an encoder");
  if (llama_model_n_swa(model) > 0) return refuse("has layers with sliding windows: these read nominal positions");
  const llama_rope_type rope = llama_model_rope_type(model);
  if (rope != LLAMA_ROPE_TYPE_NORM && rope != LLAMA_ROPE_TYPE_NEOX) {
    return refuse("does not carry its positions in plain RoPE");
  }
  const Index heads = llama_model_n_head(model), kv_heads = llama_model_n_head_kv(model);
  if (heads < 1 || kv_heads < 1 || heads % kv_heads != 0) return refuse("its KV heads do not divide its heads");
  const Index width = llama_model_n_embd(model) / heads;
  LlamaModel made;
  made.layers = llama_model_n_layer(model);
  made.shape = {kv_heads, heads / kv_heads, detail::llama_metadata(model, "attention.key_length", width),
                detail::llama_metadata(model, "attention.value_length", width)};
  return made;
}

/// Keeps the last queries of every layer, after RoPE, while a context decodes one sequence.
///
/// ```
/// auto tap = LlamaQueryTap::create(model, {.queries = 32});
/// tap->attach(context_params);            // before llama_init_from_model; the tap must outlive the context
/// ...decode the prompt, compress...
/// tap->pause();                           // costs nothing from here on
/// ```
///
/// llama.cpp calls it for each node of its graph; it asks for the nodes of `Qcur-<layer>` that RoPE made, wherever they
/// are computed, and reads their positions beside them. Pieces of a prompt (`n_ubatch`) are joined. While it listens, the
/// context must decode one sequence at a time: a position that is not above the last one starts afresh.
/// Not thread-safe: the callback runs on the thread that decodes.
class LlamaQueryTap {
 public:
  struct Options {
    /// Queries kept in every layer, at least 1: W for window evidence, the prompt's length for the whole prompt's.
    /// Memory: layers * queries * query heads * D floats.
    Index queries = 32;
  };

  /// Refuses what `llama_model_of` refuses.
  [[nodiscard]] static Result<LlamaQueryTap> create(const ::llama_model* model, Options options) noexcept {
    const Result<LlamaModel> shape = llama_model_of(model);
    if (!shape.ok()) return shape.status();
    if (options.queries < 1 || options.queries > kMaxRows) {
      return Status{StatusCode::invalid_argument, "queries", "must be in [1, kMaxRows]"};
    }
    LlamaQueryTap tap;
    tap.state_.reset(new (std::nothrow) State{*shape, options.queries});
    if (tap.state_ == nullptr) return Status{StatusCode::out_of_memory, "tap", "could not be allocated"};
    detail::Arena measuring;
    tap.state_->take(measuring);
    if (Status bad = tap.state_->memory.reserve(measuring.required_bytes()); !bad.ok()) return bad;
    detail::Arena arena(tap.state_->memory.get());
    tap.state_->take(arena);
    if (Status bad = detail::check(arena); !bad.ok()) return bad;
    tap.reset();
    return tap;
  }

  /// Puts the tap into the parameters of a context to be made. A callback that is there goes on being called.
  void attach(::llama_context_params& params) noexcept {
    state_->next = params.cb_eval;
    state_->next_data = params.cb_eval_user_data;
    params.cb_eval = &State::callback;
    params.cb_eval_user_data = state_.get();
  }

  void pause() noexcept { state_->listening = false; }
  void resume() noexcept { state_->listening = true; }
  /// Forgets what was seen.
  void reset() noexcept {
    for (Track& track : state_->tracks) track = {};
    state_->status = {};
  }

  [[nodiscard]] const LlamaModel& model() const noexcept { return state_->model; }
  /// What went wrong while listening, or that layers have seen different queries (names in the graph are not as expected).
  [[nodiscard]] Status status() const noexcept {
    if (!state_->status.ok()) return state_->status;
    for (const Track& track : state_->tracks) {
      if (track.seen == 0) return {StatusCode::unsupported, "tap", "has not seen the queries and keys of every layer"};
      if (track.seen != state_->tracks[0].seen || track.last != state_->tracks[0].last) {
        return {StatusCode::unsupported, "tap", "layers have seen different positions"};
      }
    }
    return {};
  }
  /// Queries kept of each layer now.
  [[nodiscard]] Index rows() const noexcept { return std::min(state_->tracks[0].seen, state_->capacity); }
  /// Floats that `queries` writes.
  [[nodiscard]] Index query_floats() const noexcept { return rows() * state_->row(); }

  /// Copies the queries of a layer, oldest first, turned as the keys of the cache are.
  /// \param positions [rows()], filled
  /// \param out `query_floats()` floats, filled: [rows()][query heads][D]
  [[nodiscard]] QueryRows queries(Index layer, ChannelRotation turned, std::span<Position> positions,
                                  std::span<float> out) const noexcept {
    const Index n = rows(), row = state_->row(), first = state_->tracks[0].seen - n;
    for (Index i = 0; i < n; ++i) {
      const Index slot = (first + i) % state_->capacity;
      positions[detail::at(i)] = state_->positions[detail::at(slot)];
      std::copy_n(state_->ring(layer) + slot * row, row, out.data() + i * row);
    }
    const LayerShape& shape = state_->model.shape;
    static_cast<void>(rotate_channels(out.first(detail::at(n * row)), shape.key_dim, turned.key_block));
    return token_major_queries(out.data(), shape.query_heads(), shape.key_dim, positions.first(detail::at(n)));
  }
  /// The key of the last position in the first layer, [H][D], after RoPE, not turned.
  [[nodiscard]] std::span<const float> newest_key() const noexcept { return state_->key; }
  [[nodiscard]] Position newest_position() const noexcept { return state_->tracks[0].last; }

 private:
  struct Track {
    Index seen = 0;      // queries since the start
    Position last = -1;  // of the last of them
  };

  /// Stays where it is: the engine holds its address.
  struct State {
    LlamaModel model;
    Index capacity;  // queries per layer
    bool listening = true;
    bool next_wants = false;
    ggml_backend_sched_eval_callback next = nullptr;
    void* next_data = nullptr;
    Status status{};
    WorkspaceBuffer memory{};
    std::span<Track> tracks{};        // [layers] and one for the first layer's keys
    std::span<Position> positions{};  // [capacity]
    std::span<float> key{};           // [H * D]
    std::span<float> rings{};         // [layers][capacity][query heads * D]; query number i in slot i % capacity

    void take(detail::Arena& arena) noexcept {
      tracks = arena.take<Track>(model.layers + 1);
      positions = arena.take<Position>(capacity);
      key = arena.take<float>(model.shape.kv_heads, model.shape.key_dim);
      rings = arena.take<float>(model.layers, capacity, row());
    }
    [[nodiscard]] Index row() const noexcept { return model.shape.query_heads() * model.shape.key_dim; }
    [[nodiscard]] float* ring(Index layer) const noexcept { return rings.data() + layer * capacity * row(); }

    /// The layer whose rotated queries a node holds (or keys: `layers`), -1 for other nodes.
    [[nodiscard]] Index layer_of(const ggml_tensor* node) const noexcept {
      if (node->op != GGML_OP_ROPE) return -1;
      if (std::strcmp(node->name, "Kcur-0") == 0) return model.layers;
      if (std::strncmp(node->name, "Qcur-", 5) != 0) return -1;
      char* end = nullptr;
      const long layer = std::strtol(node->name + 5, &end, 10);
      return *end == '\0' && end != node->name + 5 && layer >= 0 && layer < model.layers ? layer : -1;
    }

    static bool callback(ggml_tensor* node, bool asked, void* data) noexcept {
      State& state = *static_cast<State*>(data);
      const Index layer = state.listening ? state.layer_of(node) : -1;
      if (asked) {
        state.next_wants = state.next != nullptr && state.next(node, true, state.next_data);
        return layer >= 0 || state.next_wants;
      }
      if (layer >= 0 && state.status.ok()) state.status = state.listen(node, layer);
      return !state.next_wants || state.next(node, false, state.next_data);
    }

    [[nodiscard]] Status listen(const ggml_tensor* node, Index layer) noexcept {
      const Index heads = layer == model.layers ? model.shape.kv_heads : model.shape.query_heads();
      if (node->type != GGML_TYPE_F32 || node->ne[0] != model.shape.key_dim || node->ne[1] != heads ||
          node->ne[3] != 1 || !ggml_is_contiguous(node)) {
        return {StatusCode::unsupported, "tap", "queries or keys are not dense fp32 [tokens][heads][key_dim]"};
      }
      const ggml_tensor* places = node->src[1];
      const Index tokens = node->ne[2];
      if (places == nullptr || places->type != GGML_TYPE_I32 || places->ne[0] != tokens ||
          !ggml_is_contiguous(places)) {
        return {StatusCode::unsupported, "tap", "tokens do not have one position each"};
      }
      Track& track = tracks[detail::at(layer)];
      std::array<std::int32_t, 256> piece;  // where the graph is on a device, each reading waits for it
      for (Index i = 0; i < tokens; i += static_cast<Index>(piece.size())) {
        const auto n = std::min(piece.size(), detail::at(tokens - i));
        ggml_backend_tensor_get(places, piece.data(), detail::at(i) * sizeof piece[0], n * sizeof piece[0]);
        for (const Position position : std::span(piece).first(n)) {
          if (position <= track.last) track = {};
          track.last = position;
          if (layer < model.layers) positions[detail::at(track.seen % capacity)] = position;
          ++track.seen;
        }
      }
      if (layer == model.layers) {
        const std::size_t bytes = key.size_bytes();
        ggml_backend_tensor_get(node, key.data(), detail::at(tokens - 1) * bytes, bytes);
      } else {
        read_queries(node, layer, track.seen, std::min({tokens, capacity, track.seen}));
      }
      return {};
    }

    /// The last n tokens of a node become queries seen - n .. seen - 1; in one piece, or two around the ring's end.
    void read_queries(const ggml_tensor* node, Index layer, Index seen, Index n) noexcept {
      const auto bytes = detail::at(row()) * sizeof(float);
      for (Index i = 0; i < n;) {
        const Index slot = (seen - n + i) % capacity;
        const Index piece = std::min(n - i, capacity - slot);
        ggml_backend_tensor_get(node, ring(layer) + slot * row(), detail::at(node->ne[2] - n + i) * bytes,
                                detail::at(piece) * bytes);
        i += piece;
      }
    }
  };

  LlamaQueryTap() noexcept = default;

  std::unique_ptr<State> state_;
};

}  // namespace kvfold
