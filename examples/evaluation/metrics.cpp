#include "evaluation/metrics.hpp"

#include <cmath>

namespace evaluation {

void log_softmax(decoder::Matrix& logits, kvfold::ThreadPool& pool) {
  auto task = [&](kvfold::Index i, kvfold::Index) {
    auto row = logits.row(i).array();
    row -= row.maxCoeff();
    row -= static_cast<float>(std::log(static_cast<double>(row.exp().sum())));
  };
  pool.run(logits.rows(), task);
}

double negative_log_likelihood(const decoder::Matrix& log_probabilities, std::span<const decoder::Token> next) {
  double sum = 0.0;
  for (Eigen::Index i = 0; i < log_probabilities.rows(); ++i) {
    sum -= static_cast<double>(log_probabilities(i, next[static_cast<std::size_t>(i)]));
  }
  return sum / static_cast<double>(log_probabilities.rows());
}

double mean_kl(const decoder::Matrix& reference, const decoder::Matrix& other, kvfold::ThreadPool& pool) {
  Eigen::VectorXd rows(reference.rows());
  auto task = [&](kvfold::Index i, kvfold::Index) {
    const auto p = reference.row(i).array();
    rows[i] = static_cast<double>((p.exp() * (p - other.row(i).array())).sum());
  };
  pool.run(reference.rows(), task);
  return rows.mean();
}

}  // namespace evaluation
