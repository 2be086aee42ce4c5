/// \file
/// Evict-then-Merge (EMS, arXiv 2412.08521): the unimportant rows go, the middling ones are merged into the kept.
#pragma once

#include <cmath>

#include "kvfold/reduce/tiers.hpp"
#include "kvfold/reduce/zero_class_batcher.hpp"

namespace kvfold {

/// The key of a row that has absorbed others.
enum class KeyMode : unsigned char {
  centre,     ///< (a) the centre's own, unchanged
  direction,  ///< (b) the weighted mean direction, at the centre's length
  rotated,    ///< (c) as (b), with each key first rotated to the centre's position: needs a view that knows its RoPE
};

/// What a merged row adds to its logit.
enum class MassMode : unsigned char {
  none,         ///< nothing is written; for engines without a bias per row
  log_count,    ///< log of the rows it stands for: log(1 + |M|) when none of them was merged before
  score_ratio,  ///< log(sum of s_i / s_c)
};

/// Splits each head's rows into class centres (the B_h best), candidates (the next gamma * B_h) and the rest, which is
/// evicted; asks the assigner for the candidates' classes; merges each class into its centre.
///
/// With weights w_i = s_i / sum of s over the class and its centre (equal weights where all scores are 0):
/// v_c' = sum of w_i v_i, the key by `KeyMode`, the log mass by `MassMode`. Masses of rows that had one add up.
/// Cost: the assigner's, and O(R * (D + E)) per head.
template <class Assigner = ZeroClassBatcher>
class EvictThenMerge {
 public:
  struct Options {
    float gamma = 1.f;  ///< candidates per kept row, at least 0; gamma in EMS
    /// Above 0: candidates end where kept rows and candidates hold this share of the head's score, in [0, 1].
    float candidate_mass_share = 0.f;
    KeyMode key_mode = KeyMode::centre;
    MassMode mass_mode = MassMode::log_count;
    bool sinks_absorb = false;  ///< whether sinks are class centres
    bool recent_absorb = true;  ///< whether protected recent rows are class centres
    typename Assigner::Options assigner{};

    [[nodiscard]] Status validate() const noexcept {
      if (!(gamma >= 0.f) || !std::isfinite(gamma)) {
        return {StatusCode::invalid_argument, "gamma", "must be a number of at least 0"};
      }
      if (!(candidate_mass_share >= 0.f && candidate_mass_share <= 1.f)) {
        return {StatusCode::invalid_argument, "candidate_mass_share", "must be in [0, 1]"};
      }
      return assigner.validate();
    }
  };

  EvictThenMerge() noexcept = default;
  explicit EvictThenMerge(Options options) noexcept : options_(options), assigner_(options.assigner) {}

  [[nodiscard]] const Options& options() const noexcept { return options_; }
  [[nodiscard]] Status validate() const noexcept { return options_.validate(); }

  template <KVCacheView V>
  [[nodiscard]] std::size_t workspace_bytes(const V& view, RowLimits limits, Index workers) const noexcept {
    const LayerShape shape = view.shape();
    const Index rows = detail::total_rows(view);
    const Index kept = std::min(limits.total, rows);
    const Index candidates = detail::candidate_limit(options_.gamma, kept, rows);
    const Index per_head =
        detail::candidate_limit(options_.gamma, std::min(limits.per_head, rows), detail::max_rows(view));
    detail::Arena arena;
    static_cast<void>(detail::take_tiers(arena, shape.kv_heads, rows, kept, candidates));
    static_cast<void>(Buffers::take(arena, shape, kept, per_head));
    static_cast<void>(Output::take(arena, shape, std::min(kept, candidates), options_.key_mode));
    static_cast<void>(arena.take_bytes(assigner_.workspace_bytes(shape, per_head, workers)));
    static_cast<void>(arena.take<float>(workers, scratch_floats(shape)));
    return arena.required_bytes();
  }

  template <KVCacheView V, Executor X>
  [[nodiscard]] Result<CompressionPlan> reduce(const V& view, const ScoreTable& table, std::span<const Index> budgets,
                                               Workspace workspace, X& executor) const noexcept {
    const LayerShape shape = view.shape();
    if (options_.mass_mode != MassMode::none && !can_store_log_mass(view)) {
      return Status{StatusCode::unsupported, "view", "has no place for log masses: choose MassMode::none or EvictOnly"};
    }
    if (options_.key_mode == KeyMode::rotated) {
      if (Status bad = detail::check_rope(view); !bad.ok()) return bad;
    }
    detail::Arena arena(workspace);
    const detail::CandidateRule rule{options_.gamma, options_.candidate_mass_share};
    Result<detail::Tiers> made = detail::make_tiers(view, table, budgets, rule, arena, executor);
    if (!made.ok()) return made.status();
    const detail::Tiers& tiers = made.value();
    const auto workers = static_cast<Index>(executor.concurrency());
    const Index most = *std::max_element(tiers.candidate_count.begin(), tiers.candidate_count.end());
    const Buffers buffers = Buffers::take(arena, shape, static_cast<Index>(tiers.kept.size()), most);
    const Workspace inner = arena.take_bytes(assigner_.workspace_bytes(shape, most, workers));
    const std::span<float> scratch = arena.take<float>(workers, scratch_floats(shape));
    if (Status bad = detail::check(arena); !bad.ok()) return bad;

    const ClassProblem problem = make_problem(table, tiers, buffers, most);
    if (Status bad = assigner_.assign(view, problem, buffers.classes, inner, executor); !bad.ok()) return bad;
    const Index merged = count_members(tiers, buffers, most);
    const Output output = Output::take(arena, shape, merged, options_.key_mode);
    if (Status bad = detail::check(arena); !bad.ok()) return bad;

    const Merge<V> merge{view, table, tiers, buffers, output, options_.key_mode, options_.mass_mode};
    auto task = [&](Index h, Index worker) noexcept {
      merge.run(h, scratch.subspan(detail::at(worker * scratch_floats(shape)), detail::at(scratch_floats(shape))));
    };
    executor.run(shape.kv_heads, task);
    CompressionPlan plan = detail::plan_of(shape, tiers, buffers.merged_offset);
    plan.merged = output.rows;
    plan.merged_values = output.values;
    plan.merged_keys = output.keys;
    plan.writes_log_mass = options_.mass_mode != MassMode::none;
    plan.merged_score_share = merged_share(table, tiers);
    return plan;
  }

 private:
  struct Buffers {
    std::span<Index> centre_offset;  // [H + 1]
    std::span<RowId> centres;        // source rows of kept rows that may absorb
    std::span<RowId> centre_slot;    // their places among the kept rows
    std::span<RowId> classes;        // [H][max R]
    std::span<RowId> members;        // [kept] |M| per kept row
    std::span<double> score_sum;     // [kept] scores of a class, its centre among them
    std::span<double> mass_sum;      // [kept] rows that a class stands for, per row that its centre stands for
    std::span<Index> merged_offset;  // [H + 1]

    static Buffers take(detail::Arena& arena, const LayerShape& shape, Index kept, Index max_candidates) noexcept {
      Buffers b;
      b.centre_offset = arena.take<Index>(shape.kv_heads + 1);
      b.centres = arena.take<RowId>(kept);
      b.centre_slot = arena.take<RowId>(kept);
      b.classes = arena.take<RowId>(shape.kv_heads, max_candidates);
      b.members = arena.take<RowId>(kept);
      b.score_sum = arena.take<double>(kept);
      b.mass_sum = arena.take<double>(kept);
      b.merged_offset = arena.take<Index>(shape.kv_heads + 1);
      return b;
    }
  };

  struct Output {
    std::span<MergedRow> rows;
    std::span<float> values, keys;

    static Output take(detail::Arena& arena, const LayerShape& shape, Index merged, KeyMode mode) noexcept {
      Output o;
      o.rows = arena.take<MergedRow>(merged);
      o.values = arena.take<float>(merged, shape.value_dim);
      o.keys = arena.take<float>(mode == KeyMode::centre ? 0 : merged, shape.key_dim);
      return o;
    }
  };

  [[nodiscard]] static Index scratch_floats(const LayerShape& shape) noexcept {
    return std::max(shape.key_dim, shape.value_dim);
  }

  [[nodiscard]] bool absorbs(Protection protection) const noexcept {
    if (protection == Protection::sink) return options_.sinks_absorb;
    return protection != Protection::recent || options_.recent_absorb;
  }

  ClassProblem make_problem(const ScoreTable& table, const detail::Tiers& tiers, const Buffers& b,
                            Index most) const noexcept {
    Index count = 0;
    b.centre_offset[0] = 0;
    for (Index h = 0; h < table.heads(); ++h) {
      const auto kept = tiers.kept_of(h);
      const auto marks = table.protections(h);
      for (std::size_t slot = 0; slot < kept.size(); ++slot) {
        if (!absorbs(marks[detail::at(kept[slot])])) continue;
        b.centres[detail::at(count)] = kept[slot];
        b.centre_slot[detail::at(count++)] = static_cast<RowId>(slot);
      }
      b.centre_offset[detail::at(h + 1)] = count;
    }
    return {.centre_offset = b.centre_offset,
            .centres = b.centres,
            .candidate_offset = tiers.candidate_offset,
            .candidate_count = tiers.candidate_count,
            .candidates = tiers.candidates,
            .max_candidates = most};
  }

  /// Turns classes into fates, and counts the members of each kept row. \returns the number of merged rows.
  static Index count_members(const detail::Tiers& tiers, const Buffers& b, Index most) noexcept {
    std::fill(b.members.begin(), b.members.end(), RowId{0});
    b.merged_offset[0] = 0;
    const auto heads = static_cast<Index>(tiers.source_rows.size());
    Index merged = 0;
    for (Index h = 0; h < heads; ++h) {
      const auto candidates = tiers.candidates_of(h);
      const auto members = b.members.subspan(detail::at(tiers.kept_offset[detail::at(h)]), tiers.kept_of(h).size());
      for (std::size_t j = 0; j < candidates.size(); ++j) {
        const RowId c = b.classes[detail::at(h * most) + j];
        if (c == 0) continue;
        const RowId slot = b.centre_slot[detail::at(b.centre_offset[detail::at(h)] + c - 1)];
        tiers.fate_of(h)[detail::at(candidates[j])] = RowFate::merged;
        tiers.class_of(h)[detail::at(candidates[j])] = slot;
        if (members[detail::at(slot)]++ == 0) ++merged;
      }
      b.merged_offset[detail::at(h + 1)] = merged;
    }
    return merged;
  }

  static float merged_share(const ScoreTable& table, const detail::Tiers& tiers) noexcept {
    double mean = 0.0;
    for (Index h = 0; h < table.heads(); ++h) {
      const auto scores = table.scores(h);
      const auto fate = tiers.fate_of(h);
      const double all = detail::sum_in_fp64(scores.data(), table.rows(h));
      double merged = 0.0;
      for (const RowId t : tiers.candidates_of(h)) {
        if (fate[detail::at(t)] == RowFate::merged) merged += static_cast<double>(scores[detail::at(t)]);
      }
      if (all > 0.0) mean += merged / all;
    }
    return static_cast<float>(mean / static_cast<double>(table.heads()));
  }

  /// Merges the classes of one head. Members come in ascending order, so sums are the same for every executor.
  template <KVCacheView V>
  struct Merge {
    const V& view;
    const ScoreTable& table;
    const detail::Tiers& tiers;
    const Buffers& buffers;
    const Output& out;
    KeyMode key_mode;
    MassMode mass_mode;

    void run(Index h, std::span<float> scratch) const noexcept {
      Head head = head_of(h);
      sum_classes(head);
      std::fill(head.values.begin(), head.values.end(), 0.f);
      std::fill(head.keys.begin(), head.keys.end(), 0.f);
      for (std::size_t m = 0; m < head.merged.size(); ++m) {
        const auto slot = detail::at(head.merged[m].slot);
        head.merged_of[slot] = static_cast<RowId>(m);
        add_row(head, slot, head.kept[slot], scratch);
      }
      for_members(head, [&](std::size_t slot, RowId row) { add_row(head, slot, row, scratch); });
      for (std::size_t m = 0; m < head.merged.size(); ++m) finish(head, m, scratch);
    }

   private:
    /// The parts of all tables that concern one head.
    struct Head {
      Index h;
      std::span<const RowId> kept;
      std::span<const float> scores;
      std::span<RowId> merged_of;             // [kept] |M|, later the number of the slot's merged row
      std::span<double> score_sum, mass_sum;  // [kept]
      std::span<MergedRow> merged;
      std::span<float> values, keys;  // [merged][E], [merged][D] or empty
    };

    [[nodiscard]] Head head_of(Index h) const noexcept {
      const LayerShape shape = view.shape();
      const auto kept = tiers.kept_of(h);
      const auto first_kept = detail::at(tiers.kept_offset[detail::at(h)]);
      const Index first = buffers.merged_offset[detail::at(h)];
      const Index count = buffers.merged_offset[detail::at(h + 1)] - first;
      const auto rows_of = [&](std::span<float> all, Index width) {
        return all.empty() ? all : all.subspan(detail::at(first * width), detail::at(count * width));
      };
      return {h,
              kept,
              table.scores(h),
              buffers.members.subspan(first_kept, kept.size()),
              buffers.score_sum.subspan(first_kept, kept.size()),
              buffers.mass_sum.subspan(first_kept, kept.size()),
              out.rows.subspan(detail::at(first), detail::at(count)),
              rows_of(out.values, shape.value_dim),
              rows_of(out.keys, shape.key_dim)};
    }

    /// Calls f(slot, row) for every row of head h that is merged, in ascending order.
    template <class F>
    void for_members(const Head& head, F f) const noexcept {
      const auto fate = tiers.fate_of(head.h);
      const auto slot = tiers.class_of(head.h);
      for (const RowId row : tiers.candidates_of(head.h)) {
        if (fate[detail::at(row)] == RowFate::merged) f(detail::at(slot[detail::at(row)]), row);
      }
    }

    void sum_classes(const Head& head) const noexcept {
      std::size_t next = 0;
      for (std::size_t slot = 0; slot < head.kept.size(); ++slot) {
        head.score_sum[slot] = weight_of(head, head.kept[slot]);
        head.mass_sum[slot] = 1.0;
        if (head.merged_of[slot] > 0) {
          head.merged[next++] = {.slot = static_cast<RowId>(slot), .absorbed = head.merged_of[slot], .log_mass = 0.f};
        }
      }
      for_members(head, [&](std::size_t slot, RowId row) {
        head.score_sum[slot] += weight_of(head, row);
        head.mass_sum[slot] += relative_count(head, row, head.kept[slot]);
      });
    }

    /// Scores are weights; those below 0, which some scorers give, weigh nothing.
    [[nodiscard]] static double weight_of(const Head& head, RowId row) noexcept {
      return std::max(static_cast<double>(head.scores[detail::at(row)]), 0.0);
    }

    /// How many rows a row stands for, for each that its centre stands for: 1, unless one has absorbed others before.
    [[nodiscard]] double relative_count(const Head& head, RowId row, RowId centre) const noexcept {
      constexpr double kMost = 700.0;  // exp of more is infinite
      return std::exp(std::min(
          static_cast<double>(log_mass_of(view, head.h, row)) - static_cast<double>(log_mass_of(view, head.h, centre)),
          kMost));
    }

    /// Adds w * row to its class: its value, and its key's direction.
    void add_row(const Head& head, std::size_t slot, RowId row, std::span<float> scratch) const noexcept {
      const LayerShape shape = view.shape();
      const auto m = head.merged_of[slot];
      const double sum = head.score_sum[slot];
      const auto w = static_cast<float>(sum > 0.0 ? weight_of(head, row) / sum
                                                  : 1.0 / (head.merged[detail::at(m)].absorbed + 1.0));
      view.read_values(head.h, row, 1, scratch.first(detail::at(shape.value_dim)));
      detail::add_scaled(head.values.data() + m * shape.value_dim, scratch.data(), shape.value_dim, w);
      if (key_mode == KeyMode::centre) return;
      view.read_keys(head.h, row, 1, scratch.first(detail::at(shape.key_dim)));
      if (key_mode == KeyMode::rotated) {
        const auto to = static_cast<Position>(view.position(head.h, head.kept[slot]));
        const auto from = static_cast<Position>(view.position(head.h, row));
        detail::rotate(scratch.data(), shape.key_dim, rope_of(view), static_cast<double>(to - from));
      }
      float inverse = 0.f;
      detail::inverse_norms(scratch.data(), 1, shape.key_dim, &inverse);
      detail::add_scaled(head.keys.data() + m * shape.key_dim, scratch.data(), shape.key_dim, w * inverse);
    }

    /// The log mass of merged row m, and the length of its key.
    void finish(const Head& head, std::size_t m, std::span<float> scratch) const noexcept {
      const LayerShape shape = view.shape();
      const auto slot = detail::at(head.merged[m].slot);
      const RowId centre = head.kept[slot];
      const float own = log_mass_of(view, head.h, centre);
      const float score = head.scores[detail::at(centre)];
      if (mass_mode == MassMode::none) {
        head.merged[m].log_mass = own;
      } else if (mass_mode == MassMode::score_ratio && score > 0.f) {
        head.merged[m].log_mass = own + static_cast<float>(std::log(head.score_sum[slot] / static_cast<double>(score)));
      } else {
        head.merged[m].log_mass = own + static_cast<float>(std::log(head.mass_sum[slot]));
      }
      if (key_mode == KeyMode::centre) return;
      float* key = head.keys.data() + static_cast<Index>(m) * shape.key_dim;
      view.read_keys(head.h, centre, 1, scratch.first(detail::at(shape.key_dim)));
      float direction = 0.f, length = 0.f;  // inverse norms
      detail::inverse_norms(key, 1, shape.key_dim, &direction);
      detail::inverse_norms(scratch.data(), 1, shape.key_dim, &length);
      if (direction > 0.f && length > 0.f) {
        detail::scale(key, shape.key_dim, direction / length);
      } else {
        std::copy_n(scratch.begin(), shape.key_dim, key);  // the directions cancel: the centre's key stays
      }
    }
  };

  Options options_;
  Assigner assigner_;
};

}  // namespace kvfold
