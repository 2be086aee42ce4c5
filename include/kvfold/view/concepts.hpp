/// \file
/// The contract between kvfold and an engine's KV cache.
///
/// A view is one sequence of one layer. It is small and non-owning: batches, pages, layers and streams are many views.
/// Rows of a head are in ascending order of position; all functions may be called from several threads at once as long
/// as no two of them touch the same head.
#pragma once

#include <concepts>
#include <span>

#include "kvfold/status.hpp"
#include "kvfold/storage/quantised.hpp"
#include "kvfold/types.hpp"

namespace kvfold {

/// What every policy needs to read.
///
/// - `shape()`: H, G, D, E.
/// - `size(h)`: T_h, rows in head h.
/// - `position(h, t)`: the RoPE position that the stored key was rotated to; non-decreasing in t.
/// - `read_keys(h, t, n, out)`: rows [t, t + n) as n * D floats, converted where the storage is not fp32.
/// - `read_values(h, t, n, out)`: the same for values, n * E floats.
// clang-format off
template <class V>
concept KVCacheView = requires(const V& v, Index h, Index t, Index n, std::span<float> out) {
  { v.shape() } noexcept -> std::same_as<LayerShape>;
  { v.size(h) } noexcept -> std::convertible_to<Index>;
  { v.position(h, t) } noexcept -> std::convertible_to<Position>;
  { v.read_keys(h, t, n, out) } noexcept;
  { v.read_values(h, t, n, out) } noexcept;
};
// clang-format on

/// What `apply` needs to write. None of these may fail: whatever can go wrong has been checked before.
///
/// - `write_key(h, t, in)`, `write_value(h, t, in)`: store a row, converted where the storage is not fp32.
/// - `move_row(h, from, to)`: copy everything that belongs to a row (bytes of K and V, scales, position, log mass).
/// - `resize(h, n)`: shrink head h to n rows. Ragged storage gives memory back.
// clang-format off
template <class V>
concept MutableKVCacheView =
    KVCacheView<V> && requires(V& v, Index h, Index t, Index from, Index n, std::span<const float> in) {
      { v.write_key(h, t, in) } noexcept;
      { v.write_value(h, t, in) } noexcept;
      { v.move_row(h, from, t) } noexcept;
      { v.resize(h, n) } noexcept;
    };

/// Optional: attention adds `log_mass(h, t)` to the logit of row t, so that a merged row can weigh as much as what it
/// has absorbed. Without it, merging with a mass mode other than `MassMode::none` is refused.
template <class V>
concept HasLogMass = requires(const V& v, Index h, Index t) {
  { v.log_mass(h, t) } noexcept -> std::convertible_to<float>;
};
// clang-format on

/// Optional: where the log masses of rows [t, t + n) lie one after the other, so that they can be asked for ahead and used in
/// place. Nothing where those of all rows are 0.
// clang-format off
template <class V>
concept HasStoredLogMass = HasLogMass<V> && requires(const V& v, Index h, Index t, Index n) {
  { v.stored_log_masses(h, t, n) } noexcept -> std::same_as<std::span<const float>>;
};
// clang-format on

/// Optional: log masses can be stored too.
// clang-format off
template <class V>
concept HasWritableLogMass = HasLogMass<V> && requires(V& v, Index h, Index t, float m) {
  { v.write_log_mass(h, t, m) } noexcept;
};
// clang-format on

/// Optional: a view whose place for log masses may be absent at run time says so; asked before anything is written.
// clang-format off
template <class V>
concept MayLackLogMass = requires(const V& v) {
  { v.stores_log_mass() } noexcept -> std::same_as<bool>;
};
// clang-format on

/// Optional: fp32 rows that lie one after the other are used in place. Each function returns the address of row t when
/// rows [t, t + n) are n * width consecutive floats, else nullptr (then they are read through `read_keys/values`).
// clang-format off
template <class V>
concept HasContiguousRows = requires(const V& v, Index h, Index t, Index n) {
  { v.key_rows(h, t, n) } noexcept -> std::same_as<const float*>;
  { v.value_rows(h, t, n) } noexcept -> std::same_as<const float*>;
};
// clang-format on

/// Rows of a head as they are stored: `count` of them, the units of each one after the other.
template <Stored E>
struct StoredRows {
  const E* data = nullptr;        ///< of the first row; null: there are none
  Index stride = 0;               ///< objects of type E from one row to the next
  Index count = 0;                ///< at least 1 where there are any
  const float* scales = nullptr;  ///< of the first row, with which its numbers are to be multiplied; null: all are 1
  Index scale_stride = 0;         ///< floats from one scale to the next
};

namespace detail {
template <class T>
inline constexpr bool kAreStoredRows = false;
template <Stored E>
inline constexpr bool kAreStoredRows<StoredRows<E>> = true;
}  // namespace detail

/// Optional: rows as they are stored, for kernels that convert in registers. Each function tells of row t and of those of
/// the n - 1 rows after it that lie at one distance from each other: in pages, those up to the end of a page.
// clang-format off
template <class V>
concept HasStoredRows = requires(const V& v, Index h, Index t, Index n) {
  { v.stored_keys(h, t, n) } noexcept;
  { v.stored_values(h, t, n) } noexcept;
  requires detail::kAreStoredRows<decltype(v.stored_keys(h, t, n))>;
  requires detail::kAreStoredRows<decltype(v.stored_values(h, t, n))>;
};
// clang-format on

/// How stored keys carry their position.
enum class RopeKind : unsigned char {
  none,        ///< the model does not rotate keys
  half_split,  ///< channel i is rotated with channel i + rotary_dim / 2 (NeoX, Hugging Face Llama, Qwen2)
  adjacent,    ///< channel 2i is rotated with channel 2i + 1 (GPT-J, Llama in GGUF)
  pre_rope,    ///< the engine rotates when it reads: keys are stored without rotation
  unknown,     ///< not told; whoever needs to un-rotate refuses
};

/// Rotation of the stored keys. Frequencies: `inv_freq` where given, else theta^(-2i / rotary_dim).
struct Rope {
  RopeKind kind = RopeKind::unknown;
  Index rotary_dim = 0;                  ///< rotated channels, from the first; 0 = all D; even
  double theta = 10000.0;                ///< base, above 0
  std::span<const float> inv_freq = {};  ///< [rotary_dim / 2] radians per position, or empty
};

/// Optional: needed by policies that un-rotate keys. Absent means `RopeKind::unknown`.
// clang-format off
template <class V>
concept HasRope = requires(const V& v) {
  { v.rope() } noexcept -> std::convertible_to<Rope>;
};
// clang-format on

/// Rows that are stored turned: each block of channels times the normalised Hadamard matrix of that size (some engines
/// do so before they quantise). Products of keys and turned queries, cosines and weighted sums are what they were, so
/// scores, budgets, classes and merges are those of the plain cache; give queries turned by `rotate_channels` with
/// `key_block`.
struct ChannelRotation {
  Index key_block = 0;    ///< channels in a block of a key: a power of two that divides D; 0 = not turned
  Index value_block = 0;  ///< the same for values and E; the output of attention comes turned like them
};

/// Optional: absent means that nothing is turned. Policies that un-rotate RoPE refuse turned keys.
// clang-format off
template <class V>
concept HasChannelRotation = requires(const V& v) {
  { v.channel_rotation() } noexcept -> std::same_as<ChannelRotation>;
};
// clang-format on

/// Optional: bytes of memory that one row of a head takes (K, V, scales), so that reports speak of real memory.
// clang-format off
template <class V>
concept HasRowBytes = requires(const V& v, Index h) {
  { v.row_bytes(h) } noexcept -> std::convertible_to<Index>;
};
// clang-format on

/// Optional: which row counts are possible after compression. Absent means `RowCounts::per_head`.
// clang-format off
template <class V>
concept HasRowCounts = requires(const V& v) {
  { v.row_counts() } noexcept -> std::same_as<RowCounts>;
};
// clang-format on

/// Optional: bytes of memory that the storage really holds for this view now: rows, spare room and tables, but not what it
/// has given back. Asked before and after a compression, so that reports tell what was freed.
// clang-format off
template <class V>
concept HasLiveBytes = requires(const V& v) {
  { v.live_bytes() } noexcept -> std::convertible_to<Index>;
};
// clang-format on

/// Optional: a view that can be wrong in ways of its own (page tables) looks itself over. Asked before any row is, once the
/// shape is known to be in range; a status that is not ok becomes the call's.
// clang-format off
template <class V>
concept HasOwnCheck = requires(const V& v) {
  { v.check() } noexcept -> std::same_as<Status>;
};
// clang-format on

template <KVCacheView V>
[[nodiscard]] Rope rope_of(const V& view) noexcept {
  if constexpr (HasRope<V>) return view.rope();
  return Rope{};
}

template <KVCacheView V>
[[nodiscard]] ChannelRotation channel_rotation_of(const V& view) noexcept {
  if constexpr (HasChannelRotation<V>) return view.channel_rotation();
  return ChannelRotation{};
}

template <KVCacheView V>
[[nodiscard]] RowCounts row_counts_of(const V& view) noexcept {
  if constexpr (HasRowCounts<V>) return view.row_counts();
  return RowCounts::per_head;
}

template <KVCacheView V>
[[nodiscard]] Index row_bytes_of(const V& view, Index h) noexcept {
  if constexpr (HasRowBytes<V>) return static_cast<Index>(view.row_bytes(h));
  return 0;
}

/// 0 where the view does not tell.
template <KVCacheView V>
[[nodiscard]] Index live_bytes_of(const V& view) noexcept {
  if constexpr (HasLiveBytes<V>) return static_cast<Index>(view.live_bytes());
  return 0;
}

template <KVCacheView V>
[[nodiscard]] Status own_check_of(const V& view) noexcept {
  if constexpr (HasOwnCheck<V>) return view.check();
  return {};
}

/// Whether merged rows can be given a log mass.
template <KVCacheView V>
[[nodiscard]] bool can_store_log_mass(const V& view) noexcept {
  if constexpr (!HasWritableLogMass<V>)
    return false;
  else if constexpr (MayLackLogMass<V>)
    return view.stores_log_mass();
  else
    return true;
}

template <KVCacheView V>
[[nodiscard]] float log_mass_of(const V& view, Index h, Index t) noexcept {
  if constexpr (HasLogMass<V>) return static_cast<float>(view.log_mass(h, t));
  return 0.f;
}

}  // namespace kvfold
