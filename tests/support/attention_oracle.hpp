/// \file
/// What evidence and scorers are held against: attention and the scores made of it, in plain loops and double.
#pragma once

#include <kvfold/attend.hpp>
#include <kvfold/score/column_scorers.hpp>
#include <kvfold/score/global_local_scorer.hpp>
#include <kvfold/score/streaming_llm_scorer.hpp>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <span>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "builders.hpp"

namespace kvfold::test {

using Numbers = std::vector<double>;

template <class Container>
[[nodiscard]] constexpr decltype(auto) nth(Container&& container, Index i) {
  return container[static_cast<std::size_t>(i)];
}
template <class Container>
[[nodiscard]] constexpr Index count_of(const Container& container) {
  return static_cast<Index>(container.size());
}

// --- Attention -------------------------------------------------------------------------------------------------

/// How many rows of a head have a position of at most `position`.
template <KVCacheView V>
[[nodiscard]] Index visible_oracle(const V& view, Index h, Position position) {
  Index count = 0;
  for (Index t = 0; t < view.size(h); ++t) count += view.position(h, t) <= position ? 1 : 0;
  return count;
}

/// Softmax weights [H * G][rows][T_h]. A row that a query cannot see weighs 0.
using AttentionTable = std::vector<std::vector<Numbers>>;

template <KVCacheView V>
[[nodiscard]] AttentionTable attention_oracle(const V& view, const QueryRows& queries) {
  const LayerShape shape = view.shape();
  const Index D = shape.key_dim;
  AttentionTable table;
  for (Index q = 0; q < shape.query_heads(); ++q) {
    const Index h = q / shape.group_size, T = view.size(h);
    std::vector<float> stored(static_cast<std::size_t>(T * D));
    view.read_keys(h, 0, T, stored);
    const Numbers keys(stored.begin(), stored.end());
    auto& rows = table.emplace_back();
    for (Index i = 0; i < queries.rows(); ++i) {
      const Numbers query(queries.row(q, i), queries.row(q, i) + D);
      const Index seen = visible_oracle(view, h, nth(queries.positions, i));
      Numbers& weights = rows.emplace_back(static_cast<std::size_t>(T), 0.0);
      for (Index t = 0; t < seen; ++t) {
        const double dot = std::inner_product(query.begin(), query.end(), keys.begin() + t * D, 0.0);
        nth(weights, t) =
            static_cast<double>(queries.logit_scale()) * dot + static_cast<double>(log_mass_of(view, h, t));
      }
      if (seen == 0) continue;
      const double most = *std::max_element(weights.begin(), weights.begin() + seen);
      double sum = 0.0;
      for (Index t = 0; t < seen; ++t) sum += nth(weights, t) = std::exp(nth(weights, t) - most);
      for (Index t = 0; t < seen; ++t) nth(weights, t) /= sum;
    }
  }
  return table;
}

/// [H * G][rows] as an engine that runs `attend` (or flash attention) has them.
template <KVCacheView V>
[[nodiscard]] std::vector<float> log_sum_exps(const V& view, const QueryRows& queries) {
  const LayerShape shape = view.shape();
  SerialExecutor serial;
  std::vector<float> result(static_cast<std::size_t>(shape.query_heads() * queries.rows()));
  std::vector<float> out(result.size() * static_cast<std::size_t>(shape.value_dim));
  std::vector<std::byte> memory(attend_workspace_bytes(shape, 1));
  const Status status =
      attend(view, queries, {out.data(), queries.rows() * shape.value_dim, shape.value_dim, result}, memory, serial);
  EXPECT_TRUE(status.ok()) << status.detail();
  return result;
}

// --- Column sums -----------------------------------------------------------------------------------------------

struct OracleColumns {
  std::vector<Numbers> global;  // [H * G][T_h]
  std::vector<Numbers> local;   // [H * G][T_h]
  std::vector<Numbers> seen;    // [H][T_h]
};

/// What query i of n weighs in the global sums: the last W count once; of those before, every s-th counts s times.
[[nodiscard]] inline double global_weight(Index i, Index n, Index window, Index stride) {
  if (i >= n - window) return 1.0;
  return i % stride == stride / 2 ? static_cast<double>(stride) : 0.0;
}

template <KVCacheView V>
[[nodiscard]] OracleColumns columns_oracle(const V& view, const QueryRows& queries, const AttentionTable& attention,
                                           Index window, Index stride = 1) {
  const LayerShape shape = view.shape();
  OracleColumns columns;
  for (Index q = 0; q < shape.query_heads(); ++q) {
    const Index h = q / shape.group_size, n = queries.rows();
    Numbers& global = columns.global.emplace_back(static_cast<std::size_t>(view.size(h)), 0.0);
    Numbers& local = columns.local.emplace_back(static_cast<std::size_t>(view.size(h)), 0.0);
    Numbers seen(static_cast<std::size_t>(view.size(h)), 0.0);
    for (Index i = 0; i < n; ++i) {
      const double weight = global_weight(i, n, window, stride);
      const Index visible = visible_oracle(view, h, nth(queries.positions, i));
      for (Index t = 0; t < visible; ++t) {
        const double attended = nth(nth(nth(attention, q), i), t);
        nth(global, t) += weight * attended;
        nth(local, t) += i >= n - window ? attended : 0.0;
        nth(seen, t) += weight;
      }
    }
    if (q % shape.group_size == 0) columns.seen.push_back(seen);
  }
  return columns;
}

template <KVCacheView V>
[[nodiscard]] OracleColumns columns_oracle(const V& view, const QueryRows& queries, Index window, Index stride = 1) {
  return columns_oracle(view, queries, attention_oracle(view, queries), window, stride);
}

/// Columns of query heads [H * G][T_h] joined into [H][T_h].
[[nodiscard]] inline std::vector<Numbers> over_group(const std::vector<Numbers>& columns, Index group_size,
                                                     GroupReduction reduction) {
  std::vector<Numbers> joined;
  for (Index first = 0; first < count_of(columns); first += group_size) {
    Numbers row = nth(columns, first);
    for (Index g = 1; g < group_size; ++g) {
      for (std::size_t t = 0; t < row.size(); ++t) {
        const double x = nth(columns, first + g)[t];
        row[t] = reduction == GroupReduction::max ? std::max(row[t], x) : row[t] + x;
      }
    }
    if (reduction == GroupReduction::mean) {
      for (double& x : row) x /= static_cast<double>(group_size);
    }
    joined.push_back(row);
  }
  return joined;
}

// --- Scores ----------------------------------------------------------------------------------------------------

/// Rows [first, end) of a head that are neither sinks nor recent.
struct Evictable {
  Index first, end;
  Evictable(Index rows, Index sinks, Index recent)
      : first(std::min(sinks, rows)), end(std::max(first, rows - recent)) {}
};

/// x with the evictable rows pooled among themselves.
[[nodiscard]] inline Numbers pooled(const Numbers& x, Evictable rows, Pool pool) {
  Numbers out = x;
  if (pool.kind == PoolKind::none) return out;
  for (Index j = rows.first; j < rows.end; ++j) {
    double sum = 0.0, most = 0.0;
    Index count = 0;
    for (Index k = std::max(rows.first, j - pool.width / 2); k < std::min(rows.end, j + pool.width / 2 + 1); ++k) {
      sum += nth(x, k);
      most = std::max(most, nth(x, k));
      ++count;
    }
    nth(out, j) = pool.kind == PoolKind::max ? most : sum / static_cast<double>(count);
  }
  return out;
}

[[nodiscard]] inline double sum_over(const Numbers& x, Evictable rows) {
  return std::accumulate(x.begin() + rows.first, x.begin() + rows.end, 0.0);
}

/// What x has to be multiplied with to have the mean of `reference`.
[[nodiscard]] inline double alignment_oracle(const Numbers& reference, const Numbers& x, Evictable rows) {
  const double wanted = sum_over(reference, rows), got = sum_over(x, rows);
  return wanted > 0.0 && got > 0.0 ? wanted / got : 1.0;
}

/// The score of one head from its reduced columns.
[[nodiscard]] inline Numbers global_local_oracle(Numbers glo, const Numbers& local, const Numbers& seen,
                                                 const GlobalLocalScorer::Options& o) {
  const Evictable rows(count_of(glo), o.protect.sinks, o.protect.recent);
  const auto combine = [&](double a, double b) {
    return o.combine == GlobalLocalScorer::Combine::max ? std::max(a, b) : a + b;
  };
  if (o.normalise == GlobalLocalScorer::Normalise::lifetime) {
    for (std::size_t j = 0; j < glo.size(); ++j) glo[j] /= std::max(seen[j], 1.0);
  }
  const Numbers loc = pooled(local, rows, o.local_pool);
  const double alpha = static_cast<double>(o.global_weight) * alignment_oracle(loc, glo, rows);
  Numbers score(glo.size());
  for (std::size_t j = 0; j < glo.size(); ++j) score[j] = combine(alpha * glo[j], loc[j]);
  if (o.span_weight > 0.f) {
    for (Index j = rows.first; j < rows.end; ++j) {
      double most = 0.0;
      for (Index i = std::max(rows.first, j - o.span_width); i < j; ++i) most = std::max(most, nth(loc, i));
      nth(score, j) = combine(nth(score, j), static_cast<double>(o.span_weight) * most);
    }
  }
  return pooled(score, rows, o.score_pool);
}

/// All heads, [H][T_h].
[[nodiscard]] inline std::vector<Numbers> global_local_oracle(const OracleColumns& columns, Index group_size,
                                                              const GlobalLocalScorer::Options& o) {
  const auto glo = over_group(columns.global, group_size, o.group),
             loc = over_group(columns.local, group_size, o.group);
  std::vector<Numbers> scores;
  for (std::size_t h = 0; h < glo.size(); ++h) {
    scores.push_back(global_local_oracle(glo[h], loc[h], columns.seen[h], o));
  }
  return scores;
}

template <KVCacheView V>
[[nodiscard]] std::vector<Numbers> global_local_oracle(const V& view, const QueryRows& queries,
                                                       const GlobalLocalScorer::Options& o) {
  return global_local_oracle(columns_oracle(view, queries, o.window, o.query_stride), view.shape().group_size, o);
}

/// H2O: attention from all queries; those before the last 32 may be sampled.
template <KVCacheView V>
[[nodiscard]] std::vector<Numbers> h2o_oracle(const V& view, const QueryRows& queries, const H2oScorer::Options& o) {
  const auto columns = columns_oracle(view, queries, 32, o.query_stride);
  return over_group(columns.global, view.shape().group_size, GroupReduction::mean);
}

/// SnapKV: attention from the last W queries, pooled.
template <KVCacheView V>
[[nodiscard]] std::vector<Numbers> snap_kv_oracle(const V& view, const QueryRows& queries,
                                                  const SnapKvScorer::Options& o) {
  const auto columns = columns_oracle(view, queries, o.window);
  auto scores = over_group(columns.local, view.shape().group_size, GroupReduction::mean);
  for (Numbers& score : scores) score = pooled(score, Evictable(count_of(score), 0, o.recent), o.pool);
  return scores;
}

/// TOVA: attention from the last query, the mean over all query heads for every KV head.
template <KVCacheView V>
[[nodiscard]] std::vector<Numbers> tova_oracle(const V& view, const QueryRows& queries) {
  const Numbers mean =
      over_group(columns_oracle(view, queries, 1).local, view.shape().query_heads(), GroupReduction::mean).front();
  return std::vector<Numbers>(static_cast<std::size_t>(view.shape().kv_heads), mean);
}

/// StreamingLLM: later is better.
template <KVCacheView V>
[[nodiscard]] std::vector<Numbers> streaming_llm_oracle(const V& view) {
  std::vector<Numbers> scores;
  for (Index h = 0; h < view.shape().kv_heads; ++h) {
    Numbers& score = scores.emplace_back(static_cast<std::size_t>(view.size(h)));
    std::iota(score.begin(), score.end(), 1.0);
  }
  return scores;
}

// --- Running scorers, comparing --------------------------------------------------------------------------------

/// What a scorer wrote, and what it said.
struct Scored {
  Status status;
  std::vector<Index> offset{0};
  std::vector<float> score;
  std::vector<Protection> protection;

  [[nodiscard]] ScoreTable table() { return {.offset = offset, .score = score, .protection = protection}; }
};

/// Runs a scorer in exactly the memory that it asks for, none of it aligned. Scores are poisoned first.
template <class Scorer, KVCacheView V, class Evidence, class X = SerialExecutor>
[[nodiscard]] Scored run_score(const Scorer& scorer, const V& view, const Evidence& evidence, X&& executor = {}) {
  Scored scored;
  for (Index h = 0; h < view.shape().kv_heads; ++h) scored.offset.push_back(scored.offset.back() + view.size(h));
  scored.score.assign(static_cast<std::size_t>(scored.offset.back()), -77.f);
  scored.protection.assign(scored.score.size(), Protection{77});
  const std::size_t bytes = scorer.workspace_bytes(view, evidence, executor.concurrency());
  std::vector<std::byte> memory(bytes + 1);
  scored.status = scorer.score(view, evidence, scored.table(), std::span(memory).subspan(1), executor);
  return scored;
}

[[nodiscard]] inline Numbers flat(const std::vector<Numbers>& rows) {
  Numbers all;
  for (const Numbers& row : rows) all.insert(all.end(), row.begin(), row.end());
  return all;
}

/// Whether all numbers agree to a share of the largest.
template <class Got, class Wanted>
[[nodiscard]] testing::AssertionResult close_to(const Got& got, const Wanted& wanted, double share = 1e-5) {
  if (got.size() != wanted.size()) {
    return testing::AssertionFailure() << got.size() << " numbers for " << wanted.size();
  }
  double largest = 0.0;
  for (const auto x : wanted) largest = std::max(largest, std::abs(static_cast<double>(x)));
  for (std::size_t i = 0; i < got.size(); ++i) {
    const auto x = static_cast<double>(got[i]), y = static_cast<double>(wanted[i]);
    if (!(std::abs(x - y) <= share * largest)) {
      return testing::AssertionFailure() << "number " << i << " is " << x << " for " << y << ", largest " << largest;
    }
  }
  return testing::AssertionSuccess();
}

[[nodiscard]] inline testing::AssertionResult close_to(const Scored& got, const std::vector<Numbers>& wanted,
                                                       double share = 1e-5) {
  if (!got.status.ok()) return testing::AssertionFailure() << got.status.argument() << ": " << got.status.detail();
  return close_to(got.score, flat(wanted), share);
}

/// Whether a status has this code and names this argument.
[[nodiscard]] inline testing::AssertionResult says(const Status& status, StatusCode code, std::string_view argument) {
  if (status.code() == code && status.argument() == argument && !status.detail().empty()) {
    return testing::AssertionSuccess();
  }
  return testing::AssertionFailure() << to_string(status.code()) << ", " << status.argument() << ": "
                                     << status.detail();
}

}  // namespace kvfold::test
