/// \file
/// Attention of a block of queries over the rows of one head: the hot loops of `attend`.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
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
  std::span<float> queries;  // [kQueryTile][D]
  RoundedRows rounded;       // [kFewQueries][D]
  BlockSpace blocks;         // for E
  std::span<float> panels;   // [kQueryTile / kPanelWidth][D][kPanelWidth] the queries
  std::span<float> keys;     // [max(kPanelKeys, kFewTile)][D]
  std::span<float> values;   // [kPanelTile][E]
  std::span<float> weights;  // [kPanelTile][kQueryTile] or [kFewQueries][kFewKeys]
  std::span<float> out;      // [kQueryTile][E]
  std::span<float> masses;   // [kFewKeys]
  std::span<float> scales;   // [kFewKeys]

  static AttendScratch take(Arena& arena, const LayerShape& shape) noexcept {
    AttendScratch s;
    s.queries = arena.take<float>(kQueryTile, shape.key_dim);
    s.rounded = RoundedRows::take(arena, kFewQueries, shape.key_dim);
    s.blocks = BlockSpace::take(arena, shape.value_dim);
    s.panels = arena.take<float>(kQueryTile, shape.key_dim);
    s.keys = arena.take<float>(std::max(kPanelKeys, kFewTile), shape.key_dim);
    s.values = arena.take<float>(kPanelTile, shape.value_dim);
    s.weights = arena.take<float>(std::max(kQueryTile * kPanelTile, kFewQueries * kFewKeys));
    s.out = arena.take<float>(kQueryTile, shape.value_dim);
    s.masses = arena.take<float>(kFewKeys);
    s.scales = arena.take<float>(kFewKeys);
    return s;
  }
};

/// Memory of `attend`.
struct AttendSpace {
  std::span<AttendScratch> scratch;  // [workers]
  AttendParts parts;

  static AttendSpace take(Arena& arena, const LayerShape& shape, Index workers) noexcept {
    AttendSpace s;
    s.scratch = arena.take<AttendScratch>(workers);
    for (Index w = 0; w < workers; ++w) {
      const auto scratch = AttendScratch::take(arena, shape);
      if (!s.scratch.empty()) s.scratch[at(w)] = scratch;
    }
    s.parts = AttendParts::take(arena, shape);
    return s;
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

  /// All query rows, few, and rows [first, last) of the head, after those that `part` has seen.
  void continue_part(const AttendPart& part, Index first, Index last) noexcept {
    load(0, queries_.rows() * shape_.group_size);
    const Index numbers = count_ * shape_.value_dim;
    std::copy_n(part.max, count_, max_);
    std::copy_n(part.sum, count_, sum_);
    std::copy_n(part.out, numbers, s_.out.begin());
    add_rows(first, std::min(last, most_visible_));
    for (Index t = std::max(first, most_visible_); t < last; t += tile_) load_masses(t, std::min(tile_, last - t));
    *part.masses_are_finite = *part.masses_are_finite && masses_are_finite_;
    std::copy_n(max_, count_, part.max);
    std::copy_n(sum_, count_, part.sum);
    std::copy_n(s_.out.begin(), numbers, part.out);
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

  void add_tile(Index t, Index n) noexcept {
    if (!few_) return add_tile_of_panels(t, n);
    fetch_masses(t, n);
    set_logits(t, n);
    add_values(t, n);
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
      const auto dots = [&](const auto& keys, bool scaled) {
        if constexpr (kAreIntegers<Key>) {
          few_dots(rounded_, keys, s_.weights.data(), tile_);
        } else {
          few_dots(s_.queries.data(), width, count_, keys, width, s_.weights.data(), tile_);
        }
        scale_columns<Key>(n, scaled);
      };
      if (with_rows(stored, width, t, n, keys_, dots)) return;
    }
    for (Index first = 0; first < n; first += kFewTile) {
      const Index m = std::min(kFewTile, n - first);
      const RowsTogether<float> keys{key_tile(view_, h_, t + first, m, s_.keys), width, m};
      few_dots(s_.queries.data(), width, count_, keys, width, s_.weights.data() + first, tile_);
    }
  }

  /// Weights of what `set_logits` has set, and the values that they are of.
  void add_values(Index t, Index n) noexcept {
    const Index width = shape_.value_dim;
    if constexpr (kInRegisters<Value>) {
      const auto stored = [&](Index row, Index rows) { return view_.stored_values(h_, row, rows); };
      const auto add = [&](const auto& values, bool scaled) {
        set_weights(t, n);
        scale_columns<Value>(n, scaled);
        if constexpr (kAreIntegers<Value>) {
          add_few(s_.weights.data(), tile_, count_, values, s_.blocks, width, s_.out.data(), width);
        } else {
          add_few(s_.weights.data(), tile_, count_, values, width, s_.out.data(), width);
        }
      };
      if (with_rows(stored, width, t, n, values_, add)) return;
    }
    set_weights(t, n);
    for (Index first = 0; first < n; first += kFewTile) {
      const Index m = std::min(kFewTile, n - first);
      const RowsTogether<float> values{value_tile(view_, h_, t + first, m, s_.values), width, m};
      add_few(s_.weights.data() + first, tile_, count_, values, width, s_.out.data(), width);
    }
  }

  /// Calls f(rows, whether they have scales) where rows can be converted in registers. \returns whether it did.
  template <class F, class E, class G>
  [[nodiscard]] bool with_rows(const F& stored, Index width, Index t, Index n, const E** to, const G& f) noexcept {
    return with_stored_rows<E>(stored, row_units<E>(width), t, n, static_cast<Index>(view_.size(h_)), to,
                               s_.scales.data(), f);
  }

  /// Logits times the scales of n keys, where they have any, or weights times those of values.
  template <Stored E>
  void scale_columns(Index n, bool scaled) noexcept {
    constexpr float kFactor = kAreIntegers<E> ? 1.f : kLaneFactor<E>;
    if (!scaled && kFactor == 1.f) return;
    if (scaled && kFactor != 1.f) scale(s_.scales.data(), n, kFactor);
    for (Index r = 0; r < count_; ++r) {
      float* row = s_.weights.data() + r * tile_;
      if (scaled) {
        multiply(row, s_.scales.data(), n);
      } else {
        scale(row, n, kFactor);
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

  /// Asks for what `load_masses` needs after the keys of these rows.
  void fetch_masses(Index t, Index n) const noexcept {
    if constexpr (HasStoredLogMass<V>) {
      const auto masses = std::as_bytes(view_.stored_log_masses(h_, t, n));
      for (Index i = 0; i < std::ssize(masses) + kCacheLine; i += kCacheLine)
        fetch_line<Cache::kSecond>(masses.data(), i);
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
  const Key* keys_[kFewKeys + kMostAhead];
  const Value* values_[kFewKeys + kMostAhead];
  Index visible_[kQueryTile] = {};
  float max_[kQueryTile] = {};
  float sum_[kQueryTile] = {};
};

/// Task i of a split: what few queries see of a part of some heads.
template <KVCacheView V>
void run_task(const V& view, const QueryRows& queries, const AttendSplit& split, Index i, const AttendScratch& scratch,
              const AttendParts& parts) noexcept {
  const Index number = i % split.parts(), first_head = i / split.parts() * split.heads_per_task();
  const Index last_head = std::min(first_head + split.heads_per_task(), split.heads);
  const Index size = split.rows_per_part(), first = number * size, last = std::min(first + size, split.rows);
  const auto part = [&](Index h) { return parts[h * split.parts() + number]; };
  for (Index h = first_head; h < last_head; ++h) part(h).clear(queries.rows() * view.shape().group_size, parts.width);
  const Index step = split.together ? kFewKeys : size;
  for (Index t = first; t < last; t += step) {
    for (Index h = first_head; h < last_head; ++h) {
      const Index end = std::min({t + step, last, static_cast<Index>(view.size(h))});
      if (t < end) AttendBlock<V>(view, h, queries, scratch).continue_part(part(h), t, end);
    }
  }
}

}  // namespace kvfold::detail
