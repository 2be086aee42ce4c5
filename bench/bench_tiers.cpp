/// \file
/// Kept rows and candidates of every head.

#include "support/main.hpp"
#include "support/pipeline.hpp"

namespace kvfold::bench {

void register_benchmarks(const Settings& settings) {
  add_stage(settings, "tiers", [](Pipeline<Float16>& p) {
    return Stage{.run = [&] { return timed([&] { return p.rank().ok(); }); },
                 .works = p.tier_work(),
                 .rows = p.all_rows(),
                 .workspace_bytes = p.tier_bytes()};
  });
}

}  // namespace kvfold::bench
