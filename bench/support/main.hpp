/// \file
/// `main` of a benchmark program, which has to define `register_benchmarks`.
#pragma once

#include <string_view>
#include <vector>

#include <benchmark/benchmark.h>

#include "measure.hpp"

namespace kvfold::bench {

/// Registers the benchmarks of the program.
void register_benchmarks(const Settings& settings);

}  // namespace kvfold::bench

int main(int argc, char** argv) {
  kvfold::bench::Settings settings;
  std::vector<char*> rest;
  for (int i = 0; i < argc; ++i) {
    if (std::string_view(argv[i]) == "--quick") {
      settings.quick = true;
    } else {
      rest.push_back(argv[i]);
    }
  }
  auto count = static_cast<int>(rest.size());
  kvfold::bench::register_benchmarks(settings);
  benchmark::Initialize(&count, rest.data());
  if (benchmark::ReportUnrecognizedArguments(count, rest.data())) return 2;
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return kvfold::bench::any_failed ? 1 : 0;
}
