/// \file
/// Budgets that follow the heads.

#include "support/main.hpp"
#include "support/pipeline.hpp"

namespace kvfold::bench {

void register_benchmarks(const Settings& settings) {
  add_stage(settings, "budget", [](Pipeline<Float16>& p) {
    return Stage{.run = [&] { return timed([&] { return p.allocate().ok(); }); },
                 .works = p.budget_work(),
                 .rows = p.all_rows(),
                 .workspace_bytes = p.budget_bytes()};
  });
}

}  // namespace kvfold::bench
