/// \file
/// What reducers are held against: tiers, classes and merged rows as the formulas say, in plain loops and double.
#pragma once

#include <kvfold/reduce/evict_then_merge.hpp>

#include <algorithm>
#include <bit>
#include <cmath>
#include <complex>
#include <numeric>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

namespace kvfold::test {

using Doubles = std::vector<double>;

[[nodiscard]] constexpr std::size_t ix(Index i) { return static_cast<std::size_t>(i); }

// --- Inputs ----------------------------------------------------------------------------------------------------

/// Scores and protections that own their memory.
struct OwnedScores {
  std::vector<Index> offset{0};
  std::vector<float> score;
  std::vector<Protection> protection;

  void add_head(const std::vector<float>& scores, std::vector<Protection> marks = {}) {
    marks.resize(scores.size(), Protection::none);
    score.insert(score.end(), scores.begin(), scores.end());
    protection.insert(protection.end(), marks.begin(), marks.end());
    offset.push_back(static_cast<Index>(score.size()));
  }
  [[nodiscard]] ScoreTable table() { return {.offset = offset, .score = score, .protection = protection}; }
};

/// The first `sinks` and the last `recent` of `rows` rows are protected.
[[nodiscard]] inline std::vector<Protection> protections(Index rows, Index sinks, Index recent) {
  std::vector<Protection> marks(ix(rows), Protection::none);
  for (Index t = std::max<Index>(rows - recent, 0); t < rows; ++t) marks[ix(t)] = Protection::recent;
  for (Index t = 0; t < std::min(sinks, rows); ++t) marks[ix(t)] = Protection::sink;
  return marks;
}

/// All rows of one head.
struct OracleHead {
  std::vector<Doubles> keys;    // [T][D]
  std::vector<Doubles> values;  // [T][E]
  std::vector<Position> positions;
  Doubles log_masses;
  Rope rope;
};

template <KVCacheView V>
[[nodiscard]] OracleHead read_head(const V& view, Index h) {
  const LayerShape shape = view.shape();
  OracleHead head;
  head.rope = rope_of(view);
  std::vector<float> key(ix(shape.key_dim)), value(ix(shape.value_dim));
  for (Index t = 0; t < view.size(h); ++t) {
    view.read_keys(h, t, 1, key);
    view.read_values(h, t, 1, value);
    head.keys.emplace_back(key.begin(), key.end());
    head.values.emplace_back(value.begin(), value.end());
    head.positions.push_back(view.position(h, t));
    head.log_masses.push_back(static_cast<double>(log_mass_of(view, h, t)));
  }
  return head;
}

// --- Tiers -----------------------------------------------------------------------------------------------------

struct OracleTiers {
  std::vector<RowId> kept;        // ascending
  std::vector<RowId> candidates;  // ascending
};

/// All rows, best first: sinks, then the latest of the recent rows, then by score; ties to the lower index.
[[nodiscard]] inline std::vector<RowId> ranked(std::span<const float> score, std::span<const Protection> protection) {
  std::vector<RowId> rows(score.size());
  std::iota(rows.begin(), rows.end(), RowId{0});
  std::stable_sort(rows.begin(), rows.end(), [&](RowId a, RowId b) {
    const Protection p = protection[ix(a)], q = protection[ix(b)];
    if (p != q) return p > q;
    if (p == Protection::recent) return a > b;
    return p == Protection::none && score[ix(a)] > score[ix(b)];
  });
  return rows;
}

/// B kept rows; the next gamma * B are candidates, fewer where kept rows and candidates hold `mass_share` of the score.
[[nodiscard]] inline OracleTiers split_tiers(std::span<const float> score, std::span<const Protection> protection,
                                             Index budget, double gamma, double mass_share) {
  const std::vector<RowId> rows = ranked(score, protection);
  const auto below = static_cast<double>(static_cast<Index>(rows.size()) - budget);
  auto room = static_cast<Index>(std::min(std::floor(gamma * static_cast<double>(budget)), below));
  if (mass_share > 0.0) {
    const double all = std::accumulate(score.begin(), score.end(), 0.0);
    double held = 0.0;
    for (Index i = 0; i < budget; ++i) held += static_cast<double>(score[ix(rows[ix(i)])]);
    Index used = 0;
    while (used < room && held < mass_share * all) {
      held += static_cast<double>(score[ix(rows[ix(budget + used)])]);
      ++used;
    }
    room = used;
  }
  OracleTiers tiers;
  tiers.kept.assign(rows.begin(), rows.begin() + budget);
  tiers.candidates.assign(rows.begin() + budget, rows.begin() + budget + room);
  std::sort(tiers.kept.begin(), tiers.kept.end());
  std::sort(tiers.candidates.begin(), tiers.candidates.end());
  return tiers;
}

// --- Classes ---------------------------------------------------------------------------------------------------

[[nodiscard]] inline double norm(const Doubles& x) {
  return std::sqrt(std::inner_product(x.begin(), x.end(), x.begin(), 0.0));
}

/// The cosine of two vectors; a zero vector is like nothing.
[[nodiscard]] inline double cosine(const Doubles& a, const Doubles& b) {
  const double lengths = norm(a) * norm(b);
  return lengths > 0.0 ? std::inner_product(a.begin(), a.end(), b.begin(), 0.0) / lengths : 0.0;
}

/// A key at position p, turned to p + delta: each pair of channels is a complex number.
[[nodiscard]] inline Doubles rotated(Doubles key, const Rope& rope, double delta) {
  if (rope.kind != RopeKind::half_split && rope.kind != RopeKind::adjacent) return key;
  const std::size_t width = rope.rotary_dim == 0 ? key.size() : ix(rope.rotary_dim);
  for (std::size_t i = 0; i < width / 2; ++i) {
    const bool half_split = rope.kind == RopeKind::half_split;
    double& x = key[half_split ? i : 2 * i];
    double& y = key[half_split ? i + width / 2 : 2 * i + 1];
    const double exponent = -2.0 * static_cast<double>(i) / static_cast<double>(width);
    const double frequency =
        rope.inv_freq.empty() ? std::pow(rope.theta, exponent) : static_cast<double>(rope.inv_freq[i]);
    const std::complex<double> turned = std::complex<double>(x, y) * std::polar(1.0, delta * frequency);
    x = turned.real();
    y = turned.imag();
  }
  return key;
}

/// [R][C] of max(cos of keys, 0) * max(cos of values, 0).
[[nodiscard]] inline std::vector<Doubles> similarities(const OracleHead& head, std::span<const RowId> candidates,
                                                       std::span<const RowId> centres,
                                                       ZeroClassBatcher::KeySpace space) {
  const auto key = [&](RowId t) {
    const bool as_stored = space == ZeroClassBatcher::KeySpace::stored;
    return as_stored ? head.keys[ix(t)]
                     : rotated(head.keys[ix(t)], head.rope, -static_cast<double>(head.positions[ix(t)]));
  };
  std::vector<Doubles> sim;
  for (const RowId j : candidates) {
    Doubles row;
    for (const RowId c : centres) {
      row.push_back(std::max(cosine(key(j), key(c)), 0.0) *
                    std::max(cosine(head.values[ix(j)], head.values[ix(c)]), 0.0));
    }
    sim.push_back(row);
  }
  return sim;
}

/// argmax(tau, sim[0], sim[1], ...), ties to the lower index: 0 is the zero class.
[[nodiscard]] inline RowId class_of(const Doubles& sim, double tau) {
  double best = tau;
  RowId winner = 0;
  for (std::size_t c = 0; c < sim.size(); ++c) {
    if (sim[c] > best) {
      best = sim[c];
      winner = static_cast<RowId>(c + 1);
    }
  }
  return winner;
}

// --- Merged rows -----------------------------------------------------------------------------------------------

struct OracleMerged {
  RowId slot = 0;
  RowId absorbed = 0;
  Doubles value, key;
  double log_mass = 0.0;
};

[[nodiscard]] inline OracleMerged merge_class(const OracleHead& head, std::span<const float> score, RowId centre,
                                              std::span<const RowId> members, KeyMode key_mode, MassMode mass_mode) {
  std::vector<RowId> rows{centre};
  rows.insert(rows.end(), members.begin(), members.end());
  double score_sum = 0.0, stands_for = 0.0;
  for (const RowId t : rows) {
    score_sum += static_cast<double>(score[ix(t)]);
    stands_for += std::exp(head.log_masses[ix(t)]);
  }
  OracleMerged out;
  out.absorbed = static_cast<RowId>(members.size());
  out.value.assign(head.values[0].size(), 0.0);
  Doubles direction(head.keys[0].size(), 0.0);
  for (const RowId t : rows) {
    const double w =
        score_sum > 0.0 ? static_cast<double>(score[ix(t)]) / score_sum : 1.0 / static_cast<double>(rows.size());
    for (std::size_t d = 0; d < out.value.size(); ++d) out.value[d] += w * head.values[ix(t)][d];
    const auto turn = static_cast<double>(head.positions[ix(centre)] - head.positions[ix(t)]);
    const Doubles key = key_mode == KeyMode::rotated ? rotated(head.keys[ix(t)], head.rope, turn) : head.keys[ix(t)];
    if (const double length = norm(key); length > 0.0) {
      for (std::size_t d = 0; d < key.size(); ++d) direction[d] += w * key[d] / length;
    }
  }
  out.key = head.keys[ix(centre)];
  if (key_mode != KeyMode::centre && norm(direction) > 0.0 && norm(out.key) > 0.0) {
    const double factor = norm(out.key) / norm(direction);
    for (std::size_t d = 0; d < direction.size(); ++d) out.key[d] = direction[d] * factor;
  }
  const double own = head.log_masses[ix(centre)], own_score = static_cast<double>(score[ix(centre)]);
  switch (mass_mode) {
    case MassMode::none: out.log_mass = own; break;
    case MassMode::log_count: out.log_mass = std::log(stands_for); break;
    case MassMode::score_ratio:
      out.log_mass = own_score > 0.0 ? own + std::log(score_sum / own_score) : std::log(stands_for);
      break;
  }
  return out;
}

// --- Whole plans -----------------------------------------------------------------------------------------------

/// What a plan says of one head.
struct OraclePlan {
  OracleTiers tiers;
  std::vector<RowId> centres;        // kept rows that may absorb
  std::vector<Doubles> similarity;   // [candidates][centres]
  std::vector<RowFate> fate;         // [T]
  std::vector<RowId> row_class;      // [T]
  std::vector<OracleMerged> merged;  // ascending slots
};

/// The merged rows that follow from the fate and class of every row.
[[nodiscard]] inline std::vector<OracleMerged> merge_rows(const OracleHead& head, std::span<const float> score,
                                                          std::span<const RowId> kept, std::span<const RowFate> fate,
                                                          std::span<const RowId> row_class, KeyMode key_mode,
                                                          MassMode mass_mode) {
  std::vector<OracleMerged> merged;
  for (std::size_t slot = 0; slot < kept.size(); ++slot) {
    std::vector<RowId> members;
    for (std::size_t t = 0; t < fate.size(); ++t) {
      if (fate[t] == RowFate::merged && row_class[t] == static_cast<RowId>(slot)) {
        members.push_back(static_cast<RowId>(t));
      }
    }
    if (members.empty()) continue;
    merged.push_back(merge_class(head, score, kept[slot], members, key_mode, mass_mode));
    merged.back().slot = static_cast<RowId>(slot);
  }
  return merged;
}

[[nodiscard]] inline OraclePlan plan_head(const OracleHead& head, std::span<const float> score,
                                          std::span<const Protection> protection, Index budget,
                                          const EvictThenMerge<>::Options& o) {
  OraclePlan plan;
  plan.tiers =
      split_tiers(score, protection, budget, static_cast<double>(o.gamma), static_cast<double>(o.candidate_mass_share));
  plan.fate.assign(score.size(), RowFate::evicted);
  plan.row_class.assign(score.size(), -1);
  std::vector<RowId> slot_of_centre;
  for (std::size_t slot = 0; slot < plan.tiers.kept.size(); ++slot) {
    const RowId t = plan.tiers.kept[slot];
    plan.fate[ix(t)] = RowFate::kept;
    plan.row_class[ix(t)] = static_cast<RowId>(slot);
    const bool absorbs = protection[ix(t)] == Protection::sink     ? o.sinks_absorb
                         : protection[ix(t)] == Protection::recent ? o.recent_absorb
                                                                   : true;
    if (!absorbs) continue;
    plan.centres.push_back(t);
    slot_of_centre.push_back(static_cast<RowId>(slot));
  }
  plan.similarity = similarities(head, plan.tiers.candidates, plan.centres, o.assigner.key_space);
  for (std::size_t j = 0; j < plan.tiers.candidates.size(); ++j) {
    const RowId c = class_of(plan.similarity[j], static_cast<double>(o.assigner.tau));
    if (c == 0) continue;
    plan.fate[ix(plan.tiers.candidates[j])] = RowFate::merged;
    plan.row_class[ix(plan.tiers.candidates[j])] = slot_of_centre[ix(c - 1)];
  }
  plan.merged = merge_rows(head, score, plan.tiers.kept, plan.fate, plan.row_class, o.key_mode, o.mass_mode);
  return plan;
}

// --- Running the library ---------------------------------------------------------------------------------------

/// A plan and the memory that it lives in.
struct OwnedPlan {
  WorkspaceBuffer memory;
  Result<CompressionPlan> plan;
};

/// Runs a reducer in exactly the workspace that it asks for.
template <class Reducer, KVCacheView V, Executor X = SerialExecutor>
[[nodiscard]] OwnedPlan run_reduce(const Reducer& reducer, const V& view, OwnedScores& scores,
                                   const std::vector<Index>& budgets, X&& executor = {}) {
  const RowLimits limits{std::accumulate(budgets.begin(), budgets.end(), Index{0}),
                         budgets.empty() ? 0 : *std::max_element(budgets.begin(), budgets.end())};
  const std::size_t bytes = reducer.workspace_bytes(view, limits, executor.concurrency());
  WorkspaceBuffer memory;
  if (Status bad = memory.reserve(bytes); !bad.ok()) return {WorkspaceBuffer{}, bad};
  const Workspace exact = memory.get().first(bytes);
  Result<CompressionPlan> plan = reducer.reduce(view, scores.table(), budgets, exact, executor);
  return {std::move(memory), plan};
}

/// Every bit of a plan, to be compared when its workspace is gone.
[[nodiscard]] inline std::vector<std::int64_t> plan_bits(const CompressionPlan& plan) {
  std::vector<std::int64_t> bits{plan.shape.kv_heads, plan.shape.group_size, plan.shape.key_dim, plan.shape.value_dim,
                                 plan.writes_log_mass ? 1 : 0};
  const auto put = [&](const auto& x) {
    if constexpr (std::is_same_v<std::remove_cvref_t<decltype(x)>, float>) {
      bits.push_back(std::bit_cast<std::int32_t>(x));
    } else {
      bits.push_back(static_cast<std::int64_t>(x));
    }
  };
  const auto put_all = [&](const auto& table) {
    bits.push_back(static_cast<std::int64_t>(table.size()));
    for (const auto& x : table) put(x);
  };
  put_all(plan.source_rows);
  put_all(plan.kept_offset);
  put_all(plan.kept);
  put_all(plan.merged_offset);
  for (const MergedRow& row : plan.merged) {
    put(row.slot);
    put(row.absorbed);
    put(row.log_mass);
  }
  put_all(plan.merged_values);
  put_all(plan.merged_keys);
  put_all(plan.row_offset);
  put_all(plan.fate);
  put_all(plan.row_class);
  put(plan.kept_score_share);
  put(plan.merged_score_share);
  put(plan.equal_counts_cost);
  return bits;
}

}  // namespace kvfold::test
