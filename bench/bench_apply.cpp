/// \file
/// Carrying a plan out: kept rows move to the front, merged ones are written.

#include "support/main.hpp"
#include "support/pipeline.hpp"

namespace kvfold::bench {

void register_benchmarks(const Settings& settings) {
  add_stage(settings, "apply", [](Pipeline<Float16>& p) {
    return Stage{.run = [&] { return timed([&] { return p.apply().ok(); }); },
                 .prepare = [&] { p.layer.restore(); },
                 .works = p.apply_work(),
                 .rows = static_cast<double>(p.plan.kept.size())};
  });
}

}  // namespace kvfold::bench
