/// \file
/// Merging the classes into their centres. It is timed together with the tiers, which are timed again and subtracted.

#include "support/main.hpp"
#include "support/pipeline.hpp"

namespace kvfold::bench {

void register_benchmarks(const Settings& settings) {
  add_stage(settings, "merge", [](Pipeline<Float16>& p) {
    const auto run = [&] {
      const double both = timed([&] { return p.merge().ok(); });
      const double tiers = timed([&] { return p.rank().ok(); });
      return both < 0 || tiers < 0 ? -1.0 : std::max(both - tiers, 1e-9);
    };
    return Stage{
        .run = run, .works = p.merge_work(), .rows = p.all_rows(), .workspace_bytes = p.merge_bytes() - p.tier_bytes()};
  });
}

}  // namespace kvfold::bench
