/// \file
/// Classes of the candidates: the similarities between candidates and centres.

#include "support/main.hpp"
#include "support/pipeline.hpp"

namespace kvfold::bench {

void register_benchmarks(const Settings& settings) {
  add_stage(settings, "classes", [](Pipeline<Float16>& p) {
    return Stage{.run = [&] { return timed([&] { return p.assign().ok(); }); },
                 .works = p.class_work(),
                 .rows = p.all_rows(),
                 .workspace_bytes = p.class_bytes()};
  });
}

}  // namespace kvfold::bench
