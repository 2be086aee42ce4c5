/// \file
/// Attention of a block of queries over the rows of one head: the hot loops of `attend`.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <span>
#include <type_traits>
#include <utility>

#include "kvfold/detail/arena.hpp"
#include "kvfold/detail/attend_parts.hpp"
#include "kvfold/detail/few_block_rows.hpp"
#include "kvfold/detail/few_rows.hpp"
#include "kvfold/detail/linalg.hpp"
#include "kvfold/detail/panel_products.hpp"
#include "kvfold/detail/rows.hpp"
#include "kvfold/detail/softmax.hpp"
#include "kvfold/evidence/query_rows.hpp"
#include "kvfold/storage/quantised.hpp"

namespace kvfold::detail {

/// Rows of the cache that `few_dots` and `add_few` go over at a time, keys first and values next, so that memory is read in
/// long pieces; and rows that are converted at a time where that is not done in registers.
inline constexpr Index kFewKeys = 512;
inline constexpr Index kFewTile = 16;

/// Scratch of one worker of `attend`.
struct AttendScratch {
  BlockSpace blocks;        // for E
  std::span<float> panels;  // [kQueryTile / kPanelWidth][D][kPanelWidth] the queries
  std::span<float> keys;    // [max(kPanelKeys, kFewTile)][D]
  std::span<float> values;  // [kPanelTile][E]
  std::span<float> masses;  // [kFewKeys]
  // Of one head. Those of heads that are gone over side by side have room for few queries.
  std::span<float> queries;           // [kQueryTile][D]
  RoundedRows rounded;                // [kFewQueries][D]
  std::span<float> weights;           // [kPanelTile][kQueryTile] or [kFewQueries][kFewKeys]
  std::span<float> out;               // [kQueryTile][E]
  std::span<const void*> key_rows;    // [kFewKeys + kMostAhead]
  std::span<const void*> value_rows;  // [kFewKeys + kMostAhead]
  std::span<float> key_scales;        // [kFewKeys]
  std::span<float> value_scales;      // [kFewKeys]

  static AttendScratch take(Arena& arena, const LayerShape& shape) noexcept {
    AttendScratch s;
    s.blocks = BlockSpace::take(arena, shape.value_dim);
    s.panels = arena.take<float>(kQueryTile, shape.key_dim);
    s.keys = arena.take<float>(std::max(kPanelKeys, kFewTile), shape.key_dim);
    s.values = arena.take<float>(kPanelTile, shape.value_dim);
    s.masses = arena.take<float>(kFewKeys);
    s.take_head(arena, shape, kQueryTile, std::max(kQueryTile * kPanelTile, kFewQueries * kFewKeys));
    return s;
  }
  /// For few queries of another head, by the same worker.
  [[nodiscard]] AttendScratch take_beside(Arena& arena, const LayerShape& shape) const noexcept {
    AttendScratch s = *this;
    s.take_head(arena, shape, kFewQueries, kFewQueries * kFewKeys);
    return s;
  }

 private:
  void take_head(Arena& arena, const LayerShape& shape, Index rows, Index numbers) noexcept {
    queries = arena.take<float>(rows, shape.key_dim);
    rounded = RoundedRows::take(arena, kFewQueries, shape.key_dim);
    weights = arena.take<float>(numbers);
    out = arena.take<float>(rows, shape.value_dim);
    key_rows = arena.take<const void*>(kFewKeys + kMostAhead);
    value_rows = arena.take<const void*>(kFewKeys + kMostAhead);
    key_scales = arena.take<float>(kFewKeys);
    value_scales = arena.take<float>(kFewKeys);
  }
};

/// Memory of `attend`.
struct AttendSpace {
  std::span<AttendScratch> scratch;  // [workers][heads]
  Index heads = 1;                   // that are gone over side by side
  AttendParts parts;

  static AttendSpace take(Arena& arena, const LayerShape& shape, Index workers) noexcept {
    AttendSpace s;
    s.heads = std::clamp<Index>(shape.kv_heads, 1, AttendSplit::kHeadsTogether);
    s.scratch = arena.take<AttendScratch>(workers, s.heads);
    for (Index w = 0; w < workers; ++w) {
      const auto first = AttendScratch::take(arena, shape);
      for (Index h = 0; h < s.heads; ++h) {
        const auto scratch = h == 0 ? first : first.take_beside(arena, shape);
        if (!s.scratch.empty()) s.scratch[at(w * s.heads + h)] = scratch;
      }
    }
    s.parts = AttendParts::take(arena, shape);
    return s;
  }
  [[nodiscard]] std::span<const AttendScratch> of(Index worker) const noexcept {
    return scratch.subspan(at(worker * heads), at(heads));
  }
};

/// What rows are stored as, where the view tells.
template <class V>
struct StoredTypes {
  using Key = float;
  using Value = float;
};
template <HasStoredRows V>
struct StoredTypes<V> {
  using Key = std::remove_cvref_t<decltype(*std::declval<const V&>().stored_keys(0, 0, 0).data)>;
  using Value = std::remove_cvref_t<decltype(*std::declval<const V&>().stored_values(0, 0, 0).data)>;
};

/// Attention of up to kQueryTile query rows of one KV head, tile by tile with a running maximum.
template <KVCacheView V>
class AttendBlock {
  using Key = typename StoredTypes<V>::Key;
  using Value = typename StoredTypes<V>::Value;
  template <Stored E>
  static constexpr bool kInRegisters = HasStoredRows<V> && (kHasLanes<E> || kAreIntegers<E>);

 public:
  AttendBlock(const V& view, Index h, const QueryRows& queries, const AttendScratch& scratch) noexcept
      : view_(view), h_(h), queries_(queries), s_(scratch), shape_(view.shape()) {}

  /// Rows [first, first + count) in the order (query, query head of the group).
  void run(Index first, Index count, const AttentionOutput& to) noexcept {
    load(first, count);
    add_rows(0, most_visible_);
    for (Index r = 0; r < count_; ++r) {
      store(first + r, s_.out.data() + r * shape_.value_dim, max_[r], sum_[r], to);
    }
  }

  /// All query rows, few, and rows [first, last) of the head, of which there may be none. What they have seen is put into
  /// `part`.
  void run_part(Index first, Index last, const AttendPart& part) noexcept {
    begin_part();
    add_rows(first, std::min(last, most_visible_));
    finish_part(first, last, part);
  }

  // The same, one tile after the other, of which other heads have some as well.
  void begin_part() noexcept { load(0, queries_.rows() * shape_.group_size); }
  /// Rows of a tile that begins with row t which any query sees, at most kFewKeys.
  [[nodiscard]] Index tile_rows(Index t, Index last) const noexcept {
    return std::clamp<Index>(std::min(last, most_visible_) - t, 0, kFewKeys);
  }
  void add_tile(Index t, Index n) noexcept {
    if (!few_) return add_tile_of_panels(t, n);
    fetch_masses(t, n);
    set_logits(t, n);
    set_weights(t, n);
    add_values(t, n);
  }
  /// Finds the keys and values of a tile. \returns whether the view tells of all of them, and they are used as they are stored
  [[nodiscard]] bool locate(Index t, Index n) noexcept {
    if constexpr (kInRegisters<Key> && kInRegisters<Value>) {
      const auto keys = [&](Index row, Index rows) { return view_.stored_keys(h_, row, rows); };
      const auto values = [&](Index row, Index rows) { return view_.stored_values(h_, row, rows); };
      const auto size = static_cast<Index>(view_.size(h_));
      return locate_rows<Key>(keys(t, n), keys, t, n, size, kMostAhead, s_.key_rows.data(), s_.key_scales.data(),
                              keys_are_scaled_) &&
             locate_rows<Value>(values(t, n), values, t, n, size, kMostAhead, s_.value_rows.data(),
                                s_.value_scales.data(), values_are_scaled_);
    }
    return false;
  }
  /// Of a tile that is located: logits of keys [first, first + n), with each of which a row of `ask` is asked for.
  void set_logits_of(Index first, Index n, const void* const* ask) noexcept {
    if constexpr (kInRegisters<Key>) {
      const RowsAnywhere<Key> keys{s_.key_rows.data() + first, row_units<Key>(shape_.key_dim), n, kMostAhead, ask};
      multiply(keys, first, keys_are_scaled_);
    }
  }
  /// The same for values, once weights are set.
  void add_values_of(Index first, Index n, const void* const* ask) noexcept {
    if constexpr (kInRegisters<Value>) {
      const RowsAnywhere<Value> values{s_.value_rows.data() + first, row_units<Value>(shape_.value_dim), n, kMostAhead,
                                       ask};
      sum_up(values, first, values_are_scaled_);
    }
  }
  /// Asks for what `set_weights` needs after the keys of these rows.
  void fetch_masses(Index t, Index n) const noexcept {
    if constexpr (HasStoredLogMass<V>) {
      const auto masses = std::as_bytes(view_.stored_log_masses(h_, t, n));
      for (Index i = 0; i < std::ssize(masses) + kCacheLine; i += kCacheLine) {
        fetch_line<Cache::kSecond>(masses.data(), i);
      }
    }
  }
  /// Logits to weights under the largest logit so far; what was summed under a smaller one is corrected.
  void set_weights(Index t, Index n) noexcept {
    const bool any_mass = load_masses(t, n);
    for (Index r = 0; r < count_; ++r) {
      float* w = s_.weights.data() + r * tile_;
      const Index seen = std::clamp<Index>(visible_[r] - t, 0, n);
      if (any_mass) add(w, masses_, seen);
      std::fill(w + seen, w + n, 0.f);
      if (seen == 0) continue;
      const float new_max = std::max(max_[r], max_of(w, seen));
      const float correction = std::exp(max_[r] - new_max);
      sum_[r] = sum_[r] * correction + exp_shifted(w, seen, new_max);
      if (correction != 1.f) scale(s_.out.data() + r * shape_.value_dim, shape_.value_dim, correction);
      max_[r] = new_max;
    }
  }
  /// After all tiles of rows [first, last): those that no query sees have log masses, too.
  void finish_part(Index first, Index last, const AttendPart& part) noexcept {
    for (Index t = std::max(first, most_visible_); t < last; t += tile_) load_masses(t, std::min(tile_, last - t));
    *part.masses_are_finite = masses_are_finite_;
    std::copy_n(max_, count_, part.max);
    std::copy_n(sum_, count_, part.sum);
    std::copy_n(s_.out.begin(), count_ * shape_.value_dim, part.out);
  }

  /// Of the rows of a located tile, and of the kMostAhead after it.
  [[nodiscard]] const void* const* addresses(bool of_keys) const noexcept {
    return (of_keys ? s_.key_rows : s_.value_rows).data();
  }

  /// Puts parts [first, first + count) together, which are those of the head.
  void join(const AttendParts& parts, Index first, Index count, const AttentionOutput& to) noexcept {
    const Index width = shape_.value_dim;
    float* joined = s_.out.data();
    for (Index r = 0; r < queries_.rows() * shape_.group_size; ++r) {
      float max = -std::numeric_limits<float>::infinity(), sum = 0.f;
      for (Index i = first; i < first + count; ++i) max = std::max(max, parts[i].max[r]);
      std::fill_n(joined, width, 0.f);
      for (Index i = first; i < first + count; ++i) {
        const AttendPart part = parts[i];
        const float factor = std::exp(part.max[r] - max);
        sum += factor * part.sum[r];
        add_scaled(joined, part.out + r * width, width, factor);
      }
      store(r, joined, max, sum, to);
    }
  }

 private:
  void load(Index first, Index count) noexcept {
    count_ = count;
    masses_are_finite_ = true;
    few_ = count <= kFewQueries;
    tile_ = few_ ? kFewKeys : kPanelTile;
    most_visible_ = 0;
    for (Index r = 0; r < count; ++r) {
      const Index i = (first + r) / shape_.group_size, g = (first + r) % shape_.group_size;
      std::copy_n(queries_.row(h_ * shape_.group_size + g, i), shape_.key_dim, s_.queries.data() + r * shape_.key_dim);
      visible_[r] = r > 0 && g > 0 ? visible_[r - 1] : visible_rows(view_, h_, queries_.positions[at(i)]);
      most_visible_ = std::max(most_visible_, visible_[r]);
      max_[r] = -std::numeric_limits<float>::infinity();
      sum_[r] = 0.f;
    }
    scale(s_.queries.data(), count * shape_.key_dim, queries_.logit_scale());
    if constexpr (kInRegisters<Key> && kAreIntegers<Key>) {
      if (few_) rounded_ = s_.rounded.set(s_.queries.data(), count);
    }
    if (!few_) {
      columns_ = panel_columns(count);
      make_panels(s_.queries.data(), shape_.key_dim, count, shape_.key_dim, s_.panels.data());
      least_visible_ = *std::min_element(visible_, visible_ + count);
      std::fill(visible_ + count, visible_ + columns_, most_visible_);
    }
    std::fill_n(s_.out.begin(), count * shape_.value_dim, 0.f);
  }

  void add_rows(Index first, Index last) noexcept {
    for (Index t = first; t < last; t += tile_) add_tile(t, std::min(tile_, last - t));
  }

  /// The same for many queries: a row of weights for each row of the tile, with a column for each query.
  void add_tile_of_panels(Index t, Index n) noexcept {
    float* w = s_.weights.data();
    multiply_keys(view_, h_, t, n, s_.panels.data(), count_, s_.keys, w, columns_);
    if (load_masses(t, n)) {
      for (Index j = 0; j < n; ++j) add_number(w + j * columns_, columns_, masses_[j]);
    }
    if (t + n > least_visible_) hide_unseen(w, columns_, n, visible_, t);
    float correction[kQueryTile];
    for (Index c = 0; c < columns_; c += kLanes) {
      const Lanes before = load_lanes(max_ + c), most = larger(before, max_of_columns(w + c, columns_, n));
      const Lanes corrected = exp_lanes(before - most);
      store_lanes(load_lanes(sum_ + c) * corrected + exp_columns(w + c, columns_, n, most), sum_ + c);
      store_lanes(most, max_ + c);
      store_lanes(corrected, correction + c);
    }
    const Index width = shape_.value_dim;
    for (Index r = 0; r < count_; ++r) {
      if (correction[r] != 1.f) scale(s_.out.data() + r * width, width, correction[r]);
    }
    add_weighted_rows(w, columns_, count_, value_tile(view_, h_, t, n, s_.values), n, width, s_.out.data(), width);
  }

  void set_logits(Index t, Index n) noexcept {
    const Index width = shape_.key_dim;
    if constexpr (kInRegisters<Key>) {
      const auto stored = [&](Index row, Index rows) { return view_.stored_keys(h_, row, rows); };
      const auto with = [&](const auto& keys, bool scaled) { multiply(keys, 0, scaled); };
      if (with_rows<Key>(stored, width, t, n, s_.key_rows, s_.key_scales, with)) return;
    }
    for (Index first = 0; first < n; first += kFewTile) {
      const Index m = std::min(kFewTile, n - first);
      const RowsTogether<float> keys{key_tile(view_, h_, t + first, m, s_.keys), width, m};
      few_dots(s_.queries.data(), width, count_, keys, width, s_.weights.data() + first, tile_);
    }
  }
  /// Logits of keys, from that of key `first` of the tile on.
  template <class Rows>
  void multiply(const Rows& keys, Index first, bool scaled) noexcept {
    const Index width = shape_.key_dim;
    if constexpr (kAreIntegers<Key>) {
      few_dots(rounded_, keys, s_.weights.data() + first, tile_);
    } else {
      few_dots(s_.queries.data(), width, count_, keys, width, s_.weights.data() + first, tile_);
    }
    scale_columns<Key>(first, keys.count, scaled ? s_.key_scales.data() : nullptr);
  }

  void add_values(Index t, Index n) noexcept {
    const Index width = shape_.value_dim;
    if constexpr (kInRegisters<Value>) {
      const auto stored = [&](Index row, Index rows) { return view_.stored_values(h_, row, rows); };
      const auto with = [&](const auto& values, bool scaled) { sum_up(values, 0, scaled); };
      if (with_rows<Value>(stored, width, t, n, s_.value_rows, s_.value_scales, with)) return;
    }
    for (Index first = 0; first < n; first += kFewTile) {
      const Index m = std::min(kFewTile, n - first);
      const RowsTogether<float> values{value_tile(view_, h_, t + first, m, s_.values), width, m};
      add_few(s_.weights.data() + first, tile_, count_, values, width, s_.out.data(), width);
    }
  }
  /// Adds weighted values, of which the first is that of row `first` of the tile.
  template <class Rows>
  void sum_up(const Rows& values, Index first, bool scaled) noexcept {
    const Index width = shape_.value_dim;
    scale_columns<Value>(first, values.count, scaled ? s_.value_scales.data() : nullptr);
    if constexpr (kAreIntegers<Value>) {
      add_few(s_.weights.data() + first, tile_, count_, values, s_.blocks, width, s_.out.data(), width);
    } else {
      add_few(s_.weights.data() + first, tile_, count_, values, width, s_.out.data(), width);
    }
  }

  /// Calls f(rows, whether they have scales) where rows can be converted in registers. \returns whether it did.
  template <Stored E, class F, class G>
  [[nodiscard]] bool with_rows(const F& stored, Index width, Index t, Index n, std::span<const void*> to,
                               std::span<float> scales, const G& f) noexcept {
    return with_stored_rows<E>(stored, row_units<E>(width), t, n, static_cast<Index>(view_.size(h_)), to.data(),
                               scales.data(), f);
  }

  /// Logits times the scales of n keys of a tile, where they have any, or weights times those of values.
  template <Stored E>
  void scale_columns(Index first, Index n, float* scales) noexcept {
    constexpr float kFactor = kAreIntegers<E> ? 1.f : kLaneFactor<E>;
    if (scales == nullptr && kFactor == 1.f) return;
    if (scales != nullptr && kFactor != 1.f) scale(scales + first, n, kFactor);
    for (Index r = 0; r < count_; ++r) {
      float* row = s_.weights.data() + r * tile_ + first;
      if (scales != nullptr) {
        detail::multiply(row, scales + first, n);
      } else {
        scale(row, n, kFactor);
      }
    }
  }

  /// Sets masses_. \returns whether any of them is not 0.
  bool load_masses(Index t, Index n) noexcept {
    if constexpr (HasLogMass<V>) {
      if constexpr (HasStoredLogMass<V>) {
        const std::span<const float> stored = view_.stored_log_masses(h_, t, n);
        if (stored.empty()) return false;
        masses_ = stored.data();
      } else {
        for (Index j = 0; j < n; ++j) s_.masses[at(j)] = log_mass_of(view_, h_, t + j);
        masses_ = s_.masses.data();
      }
      const float largest = largest_magnitude(masses_, 1, n);
      masses_are_finite_ = masses_are_finite_ && all_finite(&largest, 1);
      return largest != 0.f;
    }
    return false;
  }

  /// Row r of all query rows of the head. \param out weighted sum of values; `sum` that of weights exp(logit - max)
  void store(Index r, const float* out, float max, float sum, const AttentionOutput& to) const noexcept {
    const Index i = r / shape_.group_size, q = h_ * shape_.group_size + r % shape_.group_size;
    float* row = to.data + q * to.head_stride + i * to.row_stride;
    std::fill_n(row, shape_.value_dim, 0.f);
    add_scaled(row, out, shape_.value_dim, 1.f / sum);
    if (!to.log_sum_exp.empty()) to.log_sum_exp[at(q * queries_.rows() + i)] = max + std::log(sum);
  }

  const V& view_;
  Index h_;
  const QueryRows& queries_;
  const AttendScratch& s_;
  LayerShape shape_;
  Index count_ = 0, columns_ = 0, most_visible_ = 0, least_visible_ = 0;
  bool few_ = false;
  Index tile_ = kPanelTile;
  bool masses_are_finite_ = true;  // of the rows that were loaded
  RoundedRows rounded_;            // the queries, where they are few and keys are integers
  const float* masses_ = nullptr;  // [n] of a tile
  bool keys_are_scaled_ = false, values_are_scaled_ = false;
  Index visible_[kQueryTile] = {};
  float max_[kQueryTile] = {};
  float sum_[kQueryTile] = {};
};

/// What few queries see of rows of heads that lie together, as in a tensor [token][head][dim], or in pages of such.
///
/// Tiles of all heads are gone over side by side, kRowsBeside rows of each in turn: these stay in the second cache, and so do as
/// many after them, which are asked for meanwhile as they lie in memory, all heads of a token one after the other.
template <KVCacheView V>
class HeadsTogether {
 public:
  HeadsTogether(const V& view, Index first_head, Index heads, const QueryRows& queries,
                std::span<const AttendScratch> scratch) noexcept
      : heads_(heads) {
    for (Index h = 0; h < heads; ++h) {
      block(h).emplace(view, first_head + h, queries, scratch[at(h)]);
      block(h)->begin_part();
    }
  }

  /// \param last [heads] rows [first, last[h]) of head h are gone over
  template <class Part>
  void run(Index first, const Index* last, const Part& part) noexcept {
    const Index most = *std::max_element(last, last + heads_);
    for (Index t = first; t < most; t += kFewKeys) add_tiles(t, last);
    for (Index h = 0; h < heads_; ++h) block(h)->finish_part(first, last[h], part(h));
  }

 private:
  static constexpr Index kRowsBeside =
      64;  // a multiple of what kernels go over at a time, so that sums are the same bits
  static_assert(kRowsBeside % kRoundedDepth == 0 && kRowsBeside % kFewDepth == 0 && kRowsBeside <= kMostAhead);

  void add_tiles(Index t, const Index* last) noexcept {
    bool located = true;
    Index most = 0;
    for (Index h = 0; h < heads_; ++h) {
      rows_[h] = block(h)->tile_rows(t, last[h]);
      most = std::max(most, rows_[h]);
      located = located && (rows_[h] == 0 || block(h)->locate(t, rows_[h]));
    }
    if (!located) {
      for (Index h = 0; h < heads_; ++h) {
        if (rows_[h] > 0) block(h)->add_tile(t, rows_[h]);
      }
      return;
    }
    const void* ask[kRowsBeside];
    for (Index first = 0; first < most; first += kRowsBeside) {
      const Index next = first + kRowsBeside;
      for_heads_with(first, [&](Index h, Index n) {
        if (first == 0) block(h)->fetch_masses(t, rows_[h]);
        ask_for(h, n, next < most, next < most ? next : 0, ask);
        block(h)->set_logits_of(first, n, ask);
      });
    }
    for (Index h = 0; h < heads_; ++h) {
      if (rows_[h] > 0) block(h)->set_weights(t, rows_[h]);
    }
    for (Index first = 0; first < most; first += kRowsBeside) {
      const Index next = first + kRowsBeside;
      for_heads_with(first, [&](Index h, Index n) {
        ask_for(h, n, next >= most, next, ask);  // the keys after the tile's, at last
        block(h)->add_values_of(first, n, ask);
      });
    }
  }

  /// Calls f(h, how many) for the heads that have rows of the tile from `first` on.
  template <class F>
  void for_heads_with(Index first, const F& f) noexcept {
    for (Index h = 0; h < heads_; ++h) {
      if (const Index n = std::min(rows_[h] - first, kRowsBeside); n > 0) f(h, n);
    }
  }

  /// Head h's share of rows `next` to `next + kRowsBeside` of all heads, keys or values, as they lie in memory.
  void ask_for(Index h, Index n, bool keys, Index next, const void** ask) const noexcept {
    const void* const* rows[AttendSplit::kHeadsTogether] = {};
    Index last[AttendSplit::kHeadsTogether] = {};
    for (Index head = 0; head < heads_; ++head) {
      const Index of = rows_[head] > 0 ? head : h;
      rows[head] = block(of)->addresses(keys);
      last[head] = rows_[of] + kMostAhead - 1;
    }
    Index row = next + h * kRowsBeside / heads_, head = h * kRowsBeside % heads_;
    for (Index i = 0; i < n; ++i) {
      ask[i] = rows[head][std::min(row, last[head])];
      if (++head < heads_) continue;
      head = 0;
      ++row;
    }
  }

  [[nodiscard]] auto& block(Index h) noexcept { return blocks_[h]; }
  [[nodiscard]] const auto& block(Index h) const noexcept { return blocks_[h]; }

  Index heads_;
  Index rows_[AttendSplit::kHeadsTogether] = {};  // of the tile
  std::optional<AttendBlock<V>> blocks_[AttendSplit::kHeadsTogether];
};

/// Task i of a split: what few queries see of a part of some heads.
/// \param scratch [heads that are gone over side by side]
template <KVCacheView V>
void run_task(const V& view, const QueryRows& queries, const AttendSplit& split, Index i,
              std::span<const AttendScratch> scratch, const AttendParts& parts) noexcept {
  const Index number = i % split.parts(), first_head = i / split.parts() * split.heads_per_task();
  const Index heads = std::min(split.heads_per_task(), split.heads - first_head);
  const Index size = split.rows_per_part(), first = number * size;
  const auto part = [&](Index h) { return parts[(first_head + h) * split.parts() + number]; };
  Index last[AttendSplit::kHeadsTogether] = {};
  for (Index h = 0; h < heads; ++h) {
    last[h] = std::min({first + size, split.rows, static_cast<Index>(view.size(first_head + h))});
  }
  if (heads > 1) {
    HeadsTogether<V>(view, first_head, heads, queries, scratch).run(first, last, part);
  } else {
    AttendBlock<V>(view, first_head, queries, scratch[0]).run_part(first, last[0], part(0));
  }
}

}  // namespace kvfold::detail
