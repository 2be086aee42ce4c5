/// \file
/// Memory that is really freed: two sequences share a page pool that is too small for both, until one is compressed.

#include <kvfold/kvfold.hpp>
#include <kvfold/throwing.hpp>

#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <vector>

namespace {

using kvfold::Index;
using Cache = kvfold::PagedCache<kvfold::Float16>;

constexpr kvfold::LayerShape kLayer{.kv_heads = 4, .group_size = 2, .key_dim = 64, .value_dim = 64};
constexpr Index kWindow = 32;  // queries of the prompt's end that say what matters

/// What attention makes of a prompt: rows and queries. Here they are random.
struct Prompt {
  std::vector<float> keys, values;  // [tokens][kv_heads][64]
  std::vector<float> queries;       // [kWindow][kv_heads * group_size][64]
  std::vector<kvfold::Position> positions;

  Prompt(Index tokens, unsigned seed) : positions(static_cast<std::size_t>(tokens)) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    for (Index i = 0; i < tokens * kLayer.kv_heads * 64; ++i) keys.push_back(normal(random));
    for (Index i = 0; i < tokens * kLayer.kv_heads * 64; ++i) values.push_back(normal(random));
    for (Index i = 0; i < kWindow * kLayer.query_heads() * 64; ++i) queries.push_back(normal(random));
    std::iota(positions.begin(), positions.end(), kvfold::Position{0});
  }
  [[nodiscard]] kvfold::Status append_to(Cache& cache) const {
    const auto strides = kvfold::Strides::token_major(kLayer.kv_heads, 64);
    return cache.append(keys.data(), strides, values.data(), strides, positions);
  }
  [[nodiscard]] kvfold::QueryRows last_queries() const {
    return kvfold::token_major_queries(queries.data(), kLayer.query_heads(), 64,
                                       std::span(positions).last(static_cast<std::size_t>(kWindow)));
  }
};

void expect(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "paged_engine: %s\n", what);
  std::exit(EXIT_FAILURE);
}

void print(const char* what, const kvfold::PagePool<>& pool) {
  std::printf("%-42s %4lld pages in use, %4lld free, %6.2f MiB held\n", what,
              static_cast<long long>(pool.pages_in_use()), static_cast<long long>(pool.pages_free()),
              static_cast<double>(pool.live_bytes()) / (1 << 20));
}

}  // namespace

int main() {
  // Each head has a page table of its own, so that pages of 16 tokens go back head by head. The pool has 600 of them.
  const kvfold::PagedCacheOptions options{.page_size = 16, .tables = kvfold::PageTables::per_head};
  auto pool = kvfold::or_throw(kvfold::PagePool<>::create(
      {.page_bytes = kvfold::or_throw(Cache::page_bytes(kLayer, options)), .pages_per_slab = 100, .max_slabs = 6}));
  Cache first = kvfold::or_throw(Cache::create(kLayer, pool, options));
  Cache second = kvfold::or_throw(Cache::create(kLayer, pool, options));

  const Prompt prompt(2048, 1), other(1024, 2);
  kvfold::or_throw(prompt.append_to(first));
  print("a prompt of 2048 tokens", pool);
  expect(other.append_to(second).code() == kvfold::StatusCode::out_of_memory, "both prompts fit before compression");
  print("another of 1024 does not fit", pool);

  const kvfold::Ems ems({.score = {.window = kWindow}, .budget = {.rows = 256}, .reduce = {}});
  const kvfold::CompressionReport report = kvfold::or_throw(ems.compress(first, prompt.last_queries()));
  print("the first, compressed to 256 rows per head", pool);
  std::printf(
      "  its memory: %.2f MiB -> %.2f MiB; rows per head:", static_cast<double>(report.live_bytes_before) / (1 << 20),
      static_cast<double>(report.live_bytes_after) / (1 << 20));
  for (Index h = 0; h < kLayer.kv_heads; ++h) std::printf(" %lld", static_cast<long long>(first.size(h)));
  std::printf("\n");
  expect(report.live_bytes_after < report.live_bytes_before / 6, "compression has not freed the pages");

  kvfold::or_throw(other.append_to(second));
  print("the other takes pages that were freed", pool);

  second = kvfold::or_throw(Cache::create(kLayer, pool, options));  // that sequence has ended
  const std::size_t released = pool.trim();
  print("after it has ended, and a trim", pool);
  expect(released > 0, "no slab went back to the system");
}
