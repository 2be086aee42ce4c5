/// \file
/// What `attend` is held against: decode attention in plain loops and double.
#pragma once

#include <kvfold/attend.hpp>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

namespace kvfold::test {

/// Outputs [H * G][rows][E] and log-sum-exps [H * G][rows].
template <class Number>
struct Attention {
  std::vector<Number> out;
  std::vector<Number> log_sum_exp;
};

/// Softmax over the rows of each head that are visible by position and for which `takes_part(h, t)`.
template <KVCacheView V, class Predicate>
[[nodiscard]] Attention<double> attend_oracle(const V& view, const QueryRows& queries, Predicate takes_part) {
  const LayerShape shape = view.shape();
  const auto D = static_cast<std::size_t>(shape.key_dim), E = static_cast<std::size_t>(shape.value_dim);
  Attention<double> result;
  std::vector<float> key(D), value(E);
  for (Index q = 0; q < shape.query_heads(); ++q) {
    const Index h = q / shape.group_size;
    for (Index i = 0; i < queries.rows(); ++i) {
      std::vector<std::pair<Index, double>> logits;  // row, logit
      double most = -std::numeric_limits<double>::infinity();
      for (Index t = 0; t < view.size(h); ++t) {
        if (view.position(h, t) > queries.positions[static_cast<std::size_t>(i)] || !takes_part(h, t)) continue;
        view.read_keys(h, t, 1, key);
        double dot = 0.0;
        for (std::size_t d = 0; d < D; ++d) {
          dot += static_cast<double>(queries.row(q, i)[d]) * static_cast<double>(key[d]);
        }
        dot = dot * static_cast<double>(queries.logit_scale()) + static_cast<double>(log_mass_of(view, h, t));
        logits.emplace_back(t, dot);
        most = std::max(most, dot);
      }
      double sum = 0.0;
      std::vector<double> out(E, 0.0);
      for (const auto& [t, logit] : logits) {
        const double weight = std::exp(logit - most);
        sum += weight;
        view.read_values(h, t, 1, value);
        for (std::size_t e = 0; e < E; ++e) out[e] += weight * static_cast<double>(value[e]);
      }
      for (const double x : out) result.out.push_back(x / sum);
      result.log_sum_exp.push_back(most + std::log(sum));
    }
  }
  return result;
}

template <KVCacheView V>
[[nodiscard]] Attention<double> attend_oracle(const V& view, const QueryRows& queries) {
  return attend_oracle(view, queries, [](Index, Index) { return true; });
}

/// `attend` in exactly the workspace that it asks for; empty where it refuses.
template <KVCacheView V, Executor X = SerialExecutor>
[[nodiscard]] Attention<float> run_attend(const V& view, const QueryRows& queries, X&& executor = {}) {
  const LayerShape shape = view.shape();
  const auto count = static_cast<std::size_t>(shape.query_heads() * queries.rows());
  Attention<float> result{std::vector<float>(count * static_cast<std::size_t>(shape.value_dim)),
                          std::vector<float>(count)};
  const std::size_t bytes = attend_workspace_bytes(shape, executor.concurrency());
  WorkspaceBuffer memory;
  const AttentionOutput out{.data = result.out.data(),
                            .head_stride = queries.rows() * shape.value_dim,
                            .row_stride = shape.value_dim,
                            .log_sum_exp = result.log_sum_exp};
  if (!memory.reserve(bytes).ok() || !attend(view, queries, out, memory.get().first(bytes), executor).ok()) return {};
  return result;
}

/// The largest difference, as a share of the largest number; infinite where sizes differ or a number is none.
template <class A, class B>
[[nodiscard]] double relative_error(const std::vector<A>& got, const std::vector<B>& wanted) {
  if (got.size() != wanted.size()) return std::numeric_limits<double>::infinity();
  double worst = 0.0, largest = 1e-30;
  for (std::size_t i = 0; i < got.size(); ++i) {
    const double difference = std::abs(static_cast<double>(got[i]) - static_cast<double>(wanted[i]));
    if (!std::isfinite(difference)) return std::numeric_limits<double>::infinity();
    worst = std::max(worst, difference);
    largest = std::max(largest, std::abs(static_cast<double>(wanted[i])));
  }
  return worst / largest;
}

}  // namespace kvfold::test
