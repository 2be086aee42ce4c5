/// \file
/// What is said of repeated measurements.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

namespace kvfold::bench {

/// The value that a share of `x` lies below; 0 of nothing.
[[nodiscard]] inline double quantile(std::vector<double> x, double share) {
  if (x.empty()) return 0.0;
  const auto place = static_cast<std::ptrdiff_t>(share * static_cast<double>(x.size() - 1) + 0.5);
  std::nth_element(x.begin(), x.begin() + place, x.end());
  return x[static_cast<std::size_t>(place)];
}
[[nodiscard]] inline double median(const std::vector<double>& x) { return quantile(x, 0.5); }

}  // namespace kvfold::bench
