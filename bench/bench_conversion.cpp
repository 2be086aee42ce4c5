/// \file
/// Stored rows to floats, by storage type: a head is read tile by tile into memory that stays in the cache.

#include <kvfold/detail/linalg.hpp>

#include "support/main.hpp"
#include "support/pipeline.hpp"

namespace kvfold::bench {

namespace {

template <Stored E>
void convert(benchmark::State& state, const Settings& settings, Index rows) {
  ThreadPool pool(1);
  const LayerShape shape{.kv_heads = 1, .group_size = 1, .key_dim = 128, .value_dim = 128};
  Layer<E> layer(shape, rows);
  const auto view = layer.view();
  std::vector<float> tile(at(detail::kKeyTile * shape.key_dim));
  const auto run = [&] {
    for (Index t = 0; t < rows; t += detail::kKeyTile) {
      view.read_keys(0, t, std::min(detail::kKeyTile, rows - t), tile);
      benchmark::DoNotOptimize(tile.data());
    }
    return true;
  };
  measure(state, settings,
          {.run = [&] { return timed(run); },
           .works = {{.read_bytes = static_cast<double>(rows * detail::row_bytes<E>(shape.key_dim))}},
           .rows = static_cast<double>(rows),
           .workspace_bytes = tile.size() * sizeof(float)},
          pool);
}

template <Stored E>
void add_type(const Settings& settings, const char* name) {
  const Index rows = settings.quick ? 512 : Index{1} << 19;  // more than caches hold
  add(name_of("conversion", "width_128", name, rows, 1),
      [=](benchmark::State& state) { convert<E>(state, settings, rows); });
}

}  // namespace

void register_benchmarks(const Settings& settings) {
  for_each_storage([&]<Stored E>(const char* storage) { add_type<E>(settings, storage); });
}

}  // namespace kvfold::bench
