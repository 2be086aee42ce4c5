#include <kvfold/kvfold.hpp>

#include <array>
#include <cstdio>

/// A project that found kvfold: compresses 16 rows of its own to 4.
int main() {
  std::array<float, 16 * 4> keys{}, values{};
  for (std::size_t i = 0; i < keys.size(); ++i) keys[i] = values[i] = static_cast<float>(i % 7);
  std::array<kvfold::Index, 1> rows{16};
  kvfold::StridedView<float> view{.layer = {.kv_heads = 1, .group_size = 1, .key_dim = 4, .value_dim = 4},
                                  .keys = keys.data(),
                                  .key_strides = kvfold::Strides::token_major(1, 4),
                                  .values = values.data(),
                                  .value_strides = kvfold::Strides::token_major(1, 4),
                                  .rows = rows};
  const std::array<float, 4> query{1.f, 0.f, 0.f, 0.f};
  const std::array<kvfold::Position, 1> position{15};
  const auto report = kvfold::EmsEvict({.score = {.protect = {.sinks = 1, .recent = 1}}, .budget = {.rows = 4}})
                          .compress(view, kvfold::head_major_queries(query.data(), 1, 4, position));
  std::printf("kvfold %d.%d.%d kept %d rows\n", kvfold::kVersionMajor, kvfold::kVersionMinor, kvfold::kVersionPatch,
              report.ok() ? static_cast<int>(report->rows_kept) : -1);
  return report.ok() && rows[0] == 4 ? 0 : 1;
}
