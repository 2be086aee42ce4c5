// The snippets of docs/engines.md. Each test lays out a little memory as the engine does, makes the view as the page
// says, and holds it against the layout's own index arithmetic and against a RaggedCache of the same numbers.
// What stands between [doc: name] and [/doc] is put into the page by tools/remake_figures.
#include <kvfold/kvfold.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <set>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "builders.hpp"

namespace kvfold::test {
namespace {

constexpr Index heads = 3, group = 2, dim = 64;  // of most tests, in the letters of the page
constexpr Index tokens = 37, window = 8;

std::size_t ix(Index i) { return static_cast<std::size_t>(i); }

// --- Memory of engines -----------------------------------------------------------------------------------------

/// Where number d of row t of head h lies: a layout in plain index arithmetic.
using Place = std::function<Index(Index h, Index t, Index d)>;
/// What lies there.
using Numbers = std::function<float(Index h, Index t, Index d)>;

/// Memory in which every number that nobody has written spoils what it touches.
template <Element E>
std::vector<E> untouched(Index size) {
  return std::vector<E>(ix(size), from_float<E>(std::numeric_limits<float>::quiet_NaN()));
}

/// Clustered rows for every head, divided by `scale`.
template <Element E>
void fill(std::vector<E>& memory, const Place& at, Index head_count, Index rows, Index width, std::uint64_t seed,
          float scale = 1.f) {
  Random random(seed);
  for (Index h = 0; h < head_count; ++h) {
    const std::vector<float> x = clustered_rows(rows, width, 5, 0.3f, random);
    for (Index t = 0; t < rows; ++t) {
      for (Index d = 0; d < width; ++d) memory[ix(at(h, t, d))] = from_float<E>(x[ix(t * width + d)] / scale);
    }
  }
}

template <Element E>
Numbers numbers(const std::vector<E>& memory, const Place& at, float scale = 1.f) {
  return [&memory, at, scale](Index h, Index t, Index d) { return to_float(memory[ix(at(h, t, d))]) * scale; };
}

/// Pages as a sequence may have got them from a pool: in no order. `pages` must not be a multiple of 7.
std::vector<PageId> scattered(Index count, Index pages) {
  std::vector<PageId> table;
  for (Index i = 0; i < count; ++i) table.push_back(static_cast<PageId>((5 + 7 * i) % pages));
  return table;
}

OwnedQueries last_queries(const LayerShape& layer, Index length) { return make_queries(layer, window, length); }

// --- What every view is held against ----------------------------------------------------------------------------

/// Any view behind one type, so that methods are compiled once.
class AnyView {
 public:
  AnyView() = default;
  AnyView(const AnyView&) = delete;
  AnyView& operator=(const AnyView&) = delete;
  virtual ~AnyView() = default;

  [[nodiscard]] virtual LayerShape shape() const noexcept = 0;
  [[nodiscard]] virtual Index size(Index h) const noexcept = 0;
  [[nodiscard]] virtual Position position(Index h, Index t) const noexcept = 0;
  [[nodiscard]] virtual float log_mass(Index h, Index t) const noexcept = 0;
  [[nodiscard]] virtual bool stores_log_mass() const noexcept = 0;
  [[nodiscard]] virtual RowCounts row_counts() const noexcept = 0;
  [[nodiscard]] virtual ChannelRotation channel_rotation() const noexcept = 0;
  [[nodiscard]] virtual Status check() const noexcept = 0;
  virtual void read_keys(Index h, Index t, Index n, std::span<float> out) const noexcept = 0;
  virtual void read_values(Index h, Index t, Index n, std::span<float> out) const noexcept = 0;
  virtual void write_key(Index h, Index t, std::span<const float> in) noexcept = 0;
  virtual void write_value(Index h, Index t, std::span<const float> in) noexcept = 0;
  virtual void write_log_mass(Index h, Index t, float mass) noexcept = 0;
  virtual void move_row(Index h, Index from, Index to) noexcept = 0;
  virtual void resize(Index h, Index n) noexcept = 0;
};
static_assert(MutableKVCacheView<AnyView> && HasWritableLogMass<AnyView> && HasRowCounts<AnyView> &&
              HasChannelRotation<AnyView> && HasOwnCheck<AnyView>);

template <MutableKVCacheView V>
class AnyViewOf final : public AnyView {
 public:
  explicit AnyViewOf(V& view) : view_(view) {}

  LayerShape shape() const noexcept override { return view_.shape(); }
  Index size(Index h) const noexcept override { return view_.size(h); }
  Position position(Index h, Index t) const noexcept override { return view_.position(h, t); }
  float log_mass(Index h, Index t) const noexcept override { return log_mass_of(view_, h, t); }
  bool stores_log_mass() const noexcept override { return can_store_log_mass(view_); }
  RowCounts row_counts() const noexcept override { return row_counts_of(view_); }
  ChannelRotation channel_rotation() const noexcept override { return channel_rotation_of(view_); }
  Status check() const noexcept override { return own_check_of(view_); }
  void read_keys(Index h, Index t, Index n, std::span<float> out) const noexcept override {
    view_.read_keys(h, t, n, out);
  }
  void read_values(Index h, Index t, Index n, std::span<float> out) const noexcept override {
    view_.read_values(h, t, n, out);
  }
  void write_key(Index h, Index t, std::span<const float> in) noexcept override { view_.write_key(h, t, in); }
  void write_value(Index h, Index t, std::span<const float> in) noexcept override { view_.write_value(h, t, in); }
  void write_log_mass([[maybe_unused]] Index h, [[maybe_unused]] Index t,
                      [[maybe_unused]] float mass) noexcept override {
    if constexpr (HasWritableLogMass<V>) view_.write_log_mass(h, t, mass);
  }
  void move_row(Index h, Index from, Index to) noexcept override { view_.move_row(h, from, to); }
  void resize(Index h, Index n) noexcept override { view_.resize(h, n); }

 private:
  V& view_;
};

/// A RaggedCache that is told to have the counts of an engine.
struct Ragged : RaggedCache<float> {
  RowCounts counts;
  [[nodiscard]] RowCounts row_counts() const noexcept { return counts; }
};

/// All rows of a head.
using Rows = std::vector<float>;

Rows read_all(const AnyView& view, Index h, bool values) {
  const Index width = values ? view.shape().value_dim : view.shape().key_dim, n = view.size(h);
  const Index part = n / 3;  // views are read in parts, which begin and end within pages
  Rows out(ix(n * width));
  for (const auto& [first, count] : {std::pair<Index, Index>{0, part}, {part, n - part}}) {
    const std::span<float> to = std::span(out).subspan(ix(first * width), ix(count * width));
    values ? view.read_values(h, first, count, to) : view.read_keys(h, first, count, to);
  }
  return out;
}

Rows numbers_of(const Numbers& at, Index h, Index n, Index width) {
  Rows out;
  for (Index t = 0; t < n; ++t) {
    for (Index d = 0; d < width; ++d) out.push_back(at(h, t, d));
  }
  return out;
}

std::span<const float> row_of(const Rows& rows, Index t, Index width) {
  return std::span(rows).subspan(ix(t * width), ix(width));
}

Ragged ragged_of(const std::vector<Rows>& keys, const std::vector<Rows>& values, const LayerShape& layer,
                 RowCounts counts) {
  Rows all_keys, all_values;
  for (const Rows& x : keys) all_keys.insert(all_keys.end(), x.begin(), x.end());
  for (const Rows& x : values) all_values.insert(all_values.end(), x.begin(), x.end());
  const Index n = static_cast<Index>(keys[0].size()) / layer.key_dim;
  Ragged cache{RaggedCache<float>::create(layer).value(), counts};
  const std::vector<Position> positions = positions_from(0, n);
  EXPECT_TRUE(cache
                  .append(all_keys.data(), Strides::head_major(n, layer.key_dim), all_values.data(),
                          Strides::head_major(n, layer.value_dim), positions)
                  .ok());
  return cache;
}

enum class Method { evict, merge };

CompressionReport compress(AnyView& view, const QueryRows& queries, Method method) {
  const GlobalLocalScorer::Options score{.window = window, .protect = {.sinks = 2, .recent = 4}};
  const Result<CompressionReport> report =
      method == Method::merge
          ? Ems({.score = score, .budget = {.rows = 12}, .reduce = {}}).compress(view, queries)
          : EmsEvict({.score = score, .budget = {.rows = 12}, .reduce = {}}).compress(view, queries);
  if (report.ok()) return report.value();
  ADD_FAILURE() << report.status().argument() << ": " << report.status().detail();
  return {};
}

/// What each head has kept: source rows.
using Kept = std::vector<std::vector<Position>>;

/// Reads `view` and compresses it, and a RaggedCache of the numbers that lie in the engine's memory. Afterwards the memory
/// has the same rows: kept ones bit for bit, merged ones to what their storage can hold (`merged_share` of the largest).
template <MutableKVCacheView V>
Kept expect_like_ragged(V& engine_view, const Numbers& key, const Numbers& value, const QueryRows& queries,
                        Method method, float merged_share = 0.01f) {
  AnyViewOf<V> view(engine_view);
  const LayerShape layer = view.shape();
  std::vector<Rows> keys, values;
  for (Index h = 0; h < layer.kv_heads; ++h) {
    keys.push_back(numbers_of(key, h, view.size(h), layer.key_dim));
    values.push_back(numbers_of(value, h, view.size(h), layer.value_dim));
    EXPECT_EQ(read_all(view, h, false), keys.back()) << "keys of head " << h;
    EXPECT_EQ(read_all(view, h, true), values.back()) << "values of head " << h;
  }
  Ragged cache = ragged_of(keys, values, layer, view.row_counts());
  AnyViewOf<Ragged> reference(cache);

  const CompressionReport wanted = compress(reference, queries, method), got = compress(view, queries, method);
  EXPECT_EQ(got.rows_kept, 12 * layer.kv_heads);
  EXPECT_EQ(got.rows_kept, wanted.rows_kept);
  EXPECT_EQ(got.rows_merged, wanted.rows_merged);
  EXPECT_EQ(got.rows_merged > 0, method == Method::merge);

  Kept kept;
  for (Index h = 0; h < layer.kv_heads; ++h) {
    EXPECT_EQ(view.size(h), cache.size(h));
    const Rows keys_now = numbers_of(key, h, cache.size(h), layer.key_dim);
    const Rows values_now = numbers_of(value, h, cache.size(h), layer.value_dim);
    kept.emplace_back();
    for (Index t = 0; t < cache.size(h); ++t) {
      const Position source = cache.position(h, t);
      kept.back().push_back(source);
      EXPECT_TRUE(std::ranges::equal(row_of(keys_now, t, layer.key_dim), row_of(keys[ix(h)], source, layer.key_dim)))
          << "key " << t << " of head " << h;
      EXPECT_EQ(view.log_mass(h, t), cache.log_mass(h, t));
      const auto now = row_of(values_now, t, layer.value_dim);
      if (cache.log_mass(h, t) == 0.f) {
        EXPECT_TRUE(std::ranges::equal(now, row_of(values[ix(h)], source, layer.value_dim)))
            << "value " << t << " of head " << h;
        continue;
      }
      Rows merged(ix(layer.value_dim));
      cache.read_values(h, t, 1, merged);
      float most = 0.f;
      for (const float x : merged) most = std::max(most, std::abs(x));
      for (Index d = 0; d < layer.value_dim; ++d) EXPECT_NEAR(now[ix(d)], merged[ix(d)], merged_share * most);
    }
  }
  return kept;
}

template <KVCacheView V>
void expect_positions(const V& view, const Kept& kept) {
  for (Index h = 0; h < view.shape().kv_heads; ++h) {
    for (Index t = 0; t < view.size(h); ++t) EXPECT_EQ(view.position(h, t), kept[ix(h)][ix(t)]);
  }
}

/// [H][capacity] lists of 0, 1, 2, ...
std::vector<Position> own_positions(Index head_count, Index capacity) {
  std::vector<Position> all;
  for (Index h = 0; h < head_count; ++h) {
    for (Index t = 0; t < capacity; ++t) all.push_back(t);
  }
  return all;
}

template <Element E>
bool same_bits(const std::vector<E>& a, const std::vector<E>& b, const std::function<bool(Index)>& is_compared) {
  for (Index i = 0; i < static_cast<Index>(a.size()); ++i) {
    if (is_compared(i) && std::memcmp(&a[ix(i)], &b[ix(i)], sizeof(E)) != 0) return false;
  }
  return true;
}

/// Elements that no (h, t, d) of a sequence is at.
std::function<bool(Index)> outside(const Place& at, Index head_count, Index rows, Index width) {
  std::set<Index> inside;
  for (Index h = 0; h < head_count; ++h) {
    for (Index t = 0; t < rows; ++t) {
      for (Index d = 0; d < width; ++d) inside.insert(at(h, t, d));
    }
  }
  return [inside](Index i) { return !inside.contains(i); };
}

/// Snippets return where something is wrong: then the test has not reached its end, and fails.
class EnginesPage : public testing::Test {
 protected:
  void TearDown() override { EXPECT_TRUE(reached_end); }
  bool reached_end = false;
};

// --- llama.cpp -------------------------------------------------------------------------------------------------

TEST_F(EnginesPage, LlamaCppWithFlashAttention) {
  constexpr Index cells = tokens;
  auto k_memory = untouched<Float16>(cells * heads * dim), v_memory = untouched<Float16>(cells * heads * dim);
  const Place at = [](Index h, Index t, Index d) { return (t * heads + h) * dim + d; };
  fill(k_memory, at, heads, cells, dim, 1);
  fill(v_memory, at, heads, cells, dim, 2);
  Float16 *k = k_memory.data(), *v = v_memory.data();
  const OwnedQueries owned = last_queries({heads, group, dim, dim}, cells);
  const QueryRows queries = owned.view();

  // [doc: llama.cpp]
  // k, v: [cells][heads][dim] of fp16: one layer of the state blob, or of one stream of the cache.
  std::vector<kvfold::Index> rows(heads, cells);
  kvfold::StridedView<kvfold::Float16> cache{.layer = {heads, group, dim, dim},
                                             .keys = k,
                                             .key_strides = kvfold::Strides::token_major(heads, dim),
                                             .values = v,
                                             .value_strides = kvfold::Strides::token_major(heads, dim),
                                             .rows = rows,
                                             .counts = kvfold::RowCounts::per_model};
  // [/doc]
  const Kept kept = expect_like_ragged(cache, numbers(k_memory, at), numbers(v_memory, at), queries, Method::evict);
  EXPECT_NE(kept[0], kept[1]) << "heads have rows of their own";
  reached_end = true;
}

TEST_F(EnginesPage, LlamaCppWithoutFlashAttention) {
  constexpr Index cells = tokens;
  auto k_memory = untouched<Float16>(cells * heads * dim), v_memory = untouched<Float16>(cells * heads * dim);
  const Place k_at = [](Index h, Index t, Index d) { return (t * heads + h) * dim + d; };
  const Place v_at = [](Index h, Index t, Index d) { return (h * dim + d) * cells + t; };
  fill(k_memory, k_at, heads, cells, dim, 1);
  fill(v_memory, v_at, heads, cells, dim, 2);
  Float16 *k = k_memory.data(), *v = v_memory.data();
  const OwnedQueries owned = last_queries({heads, group, dim, dim}, cells);

  // [doc: llama.cpp transposed]
  // k: [cells][heads][dim]; v: [heads * dim][cells], a column for each cell.
  std::vector<kvfold::Index> rows(heads, cells);
  kvfold::StridedView<kvfold::Float16> cache{.layer = {heads, group, dim, dim},
                                             .keys = k,
                                             .key_strides = kvfold::Strides::token_major(heads, dim),
                                             .values = v,
                                             .value_strides = kvfold::Strides::transposed(cells, dim),
                                             .rows = rows,
                                             .counts = kvfold::RowCounts::per_model};
  // [/doc]
  expect_like_ragged(cache, numbers(k_memory, k_at), numbers(v_memory, v_at), owned.view(), Method::evict);

  // [doc: llama.cpp transposed]
  // After compression rows 0..C-1 of V are still `cells` apart: the new blob takes the first C of each channel.
  const kvfold::Index kept = rows[0];
  std::vector<kvfold::Float16> v_section;  // [heads * dim][kept]
  for (kvfold::Index channel = 0; channel < heads * dim; ++channel) {
    v_section.insert(v_section.end(), v + channel * cells, v + channel * cells + kept);
  }
  // [/doc]
  ASSERT_EQ(static_cast<Index>(v_section.size()), heads * dim * kept);
  std::vector<float> row(dim);
  for (Index h = 0; h < heads; ++h) {
    for (Index t = 0; t < kept; ++t) {
      cache.read_values(h, t, 1, row);
      for (Index d = 0; d < dim; ++d) ASSERT_EQ(to_float(v_section[ix((h * dim + d) * kept + t)]), row[ix(d)]);
    }
  }
  reached_end = true;
}

/// K of q8_0 and V of q4_0, turned as llama.cpp turns them.
TEST_F(EnginesPage, LlamaCppWithQuantisedRotatedRows) {
  constexpr Index cells = tokens, width = 128, blocks = width / 32;
  const LayerShape layer{heads, group, width, width};
  const RaggedCache<float> plain = make_cache(layer, cells);
  std::vector<BlockQ8_0> k_memory(cells * heads * blocks);
  std::vector<BlockQ4_0> v_memory(cells * heads * blocks);
  for (Index h = 0; h < heads; ++h) {
    for (Index t = 0; t < cells; ++t) {
      std::vector<float> key(width), value(width);
      plain.read_keys(h, t, 1, key);
      plain.read_values(h, t, 1, value);
      ASSERT_TRUE(rotate_channels(key, width, 128).ok() && rotate_channels(value, width, 64).ok());
      for (Index b = 0; b < blocks; ++b) {
        store_block(key.data() + b * 32, k_memory[ix((t * heads + h) * blocks + b)]);
        store_block(value.data() + b * 32, v_memory[ix((t * heads + h) * blocks + b)]);
      }
    }
  }
  const Numbers key = [&](Index h, Index t, Index d) {
    const BlockQ8_0& block = k_memory[ix((t * heads + h) * blocks + d / 32)];
    return to_float(block.scale) * static_cast<float>(block.values[ix(d % 32)]);
  };
  const Numbers value = [&](Index h, Index t, Index d) {
    const BlockQ4_0& block = v_memory[ix((t * heads + h) * blocks + d / 32)];
    const int pair = block.pairs[ix(d % 16)];
    return to_float(block.scale) * static_cast<float>((d % 32 < 16 ? pair & 0xf : pair >> 4) - 8);
  };
  BlockQ8_0* k = k_memory.data();
  BlockQ4_0* v = v_memory.data();
  const OwnedQueries plain_queries = last_queries(layer, cells);
  std::vector<float> query_data = plain_queries.data;
  const std::vector<Position>& query_positions = plain_queries.positions;
  const QueryRows unturned = token_major_queries(plain_queries.data.data(), heads * group, width, query_positions);

  // [doc: llama.cpp quantised]
  // k, v: [cells][heads][blocks] with blocks = width / 32; strides count blocks. Width is 128 here.
  std::vector<kvfold::Index> rows(heads, cells);
  kvfold::StridedView<kvfold::BlockQ8_0, kvfold::BlockQ4_0> cache{
      .layer = {heads, group, width, width},
      .keys = k,
      .key_strides = kvfold::Strides::token_major(heads, blocks),
      .values = v,
      .value_strides = kvfold::Strides::token_major(heads, blocks),
      .rows = rows,
      .counts = kvfold::RowCounts::per_model,
      .hadamard = {.key_block = 128, .value_block = 64}};  // the largest 64 * 2^k that divides width; always 64

  // Queries of the graph, [tokens][query heads][width], are not turned yet.
  const kvfold::Status turned = kvfold::rotate_channels(query_data, width, cache.hadamard.key_block);
  const auto queries = kvfold::token_major_queries(query_data.data(), heads * group, width, query_positions);
  // [/doc]
  ASSERT_TRUE(turned.ok());

  // The same rows, turned back, with the queries as they were.
  std::vector<Rows> keys, values;
  for (Index h = 0; h < heads; ++h) {
    keys.push_back(numbers_of(key, h, cells, width));
    values.push_back(numbers_of(value, h, cells, width));
    ASSERT_TRUE(rotate_channels(keys.back(), width, 128).ok() && rotate_channels(values.back(), width, 64).ok());
  }
  Ragged turned_back = ragged_of(keys, values, layer, RowCounts::per_model);
  AnyViewOf<Ragged> reference(turned_back);
  EXPECT_EQ(compress(reference, unturned, Method::evict).rows_kept, 12 * heads);

  expect_positions(turned_back, expect_like_ragged(cache, key, value, queries, Method::evict));
  reached_end = true;
}

// --- OpenVINO GenAI --------------------------------------------------------------------------------------------

TEST_F(EnginesPage, OpenVinoOnCpus) {
  constexpr Index pool_blocks = 11;
  auto k_memory = untouched<Float16>(pool_blocks * heads * 32 * dim);
  auto v_memory = untouched<Float16>(pool_blocks * heads * 32 * dim);
  std::vector<PageId> block_table = scattered(2, pool_blocks);
  const Place at = [&](Index h, Index t, Index d) {
    return ((block_table[ix(t / 32)] * heads + h) * 32 + t % 32) * dim + d;
  };
  fill(k_memory, at, heads, tokens, dim, 1);
  fill(v_memory, at, heads, tokens, dim, 2);
  Float16 *k = k_memory.data(), *v = v_memory.data();
  const OwnedQueries owned = last_queries({heads, group, dim, dim}, tokens);

  // [doc: OpenVINO CPU]
  // k, v: [pool_blocks][heads][32][dim] of this layer; block_table: int32, of this sequence and layer.
  std::vector<kvfold::Index> rows(heads, tokens);
  const auto strides = kvfold::PageStrides::head_major(32, heads, dim);
  kvfold::PagedView<kvfold::Float16> cache{.layer = {heads, group, dim, dim},
                                           .page_size = 32,
                                           .pages = pool_blocks,
                                           .keys = k,
                                           .key_strides = strides,
                                           .values = v,
                                           .value_strides = strides,
                                           .tables = block_table,
                                           .rows = rows,
                                           .counts = kvfold::RowCounts::per_layer};
  // [/doc]
  const std::vector<PageId> before = block_table;
  const Place at_before = [&](Index h, Index t, Index d) {
    return ((before[ix(t / 32)] * heads + h) * 32 + t % 32) * dim + d;
  };
  expect_like_ragged(cache, numbers(k_memory, at_before), numbers(v_memory, at_before), owned.view(), Method::evict);

  // [doc: OpenVINO CPU]
  // After compression: the blocks behind pages_used go back to the pool.
  const auto used = block_table.begin() + cache.pages_used(0);
  const std::vector<kvfold::PageId> free_blocks(used, block_table.end());
  block_table.erase(used, block_table.end());
  // [/doc]
  EXPECT_EQ(block_table, std::vector<PageId>{before[0]});
  EXPECT_EQ(free_blocks, std::vector<PageId>{before[1]});
  reached_end = true;
}

TEST_F(EnginesPage, OpenVinoOnGpus) {
  constexpr Index pool_blocks = 11;
  auto k_memory = untouched<Float16>(pool_blocks * heads * 16 * dim);
  auto v_memory = untouched<Float16>(pool_blocks * heads * 16 * dim);
  const std::vector<PageId> block_table = scattered(3, pool_blocks);
  const Place k_at = [&](Index h, Index t, Index d) {
    return ((block_table[ix(t / 16)] * heads + h) * dim + d) * 16 + t % 16;
  };
  const Place v_at = [&](Index h, Index t, Index d) {
    return ((block_table[ix(t / 16)] * heads + h) * 16 + t % 16) * dim + d;
  };
  fill(k_memory, k_at, heads, tokens, dim, 1);
  fill(v_memory, v_at, heads, tokens, dim, 2);
  Float16 *host_k = k_memory.data(), *host_v = v_memory.data();
  const OwnedQueries owned = last_queries({heads, group, dim, dim}, tokens);

  // [doc: OpenVINO GPU]
  // Copies on the host of K [pool_blocks][heads][dim][16] and V [pool_blocks][heads][16][dim].
  std::vector<kvfold::Index> rows(heads, tokens);
  kvfold::PagedView<kvfold::Float16> cache{.layer = {heads, group, dim, dim},
                                           .page_size = 16,
                                           .pages = pool_blocks,
                                           .keys = host_k,
                                           .key_strides = kvfold::PageStrides::transposed(16, heads, dim),
                                           .values = host_v,
                                           .value_strides = kvfold::PageStrides::head_major(16, heads, dim),
                                           .tables = block_table,
                                           .rows = rows,
                                           .counts = kvfold::RowCounts::per_layer};
  // [/doc]
  expect_like_ragged(cache, numbers(k_memory, k_at), numbers(v_memory, v_at), owned.view(), Method::evict);
  reached_end = true;
}

// --- ONNX Runtime GenAI ----------------------------------------------------------------------------------------

TEST_F(EnginesPage, OnnxRuntimeContiguous) {
  constexpr Index batch = 2, max_tokens = 50, b = 1;
  auto k_memory = untouched<Float16>(batch * heads * max_tokens * dim);
  auto v_memory = untouched<Float16>(batch * heads * max_tokens * dim);
  const std::array<std::int32_t, batch> lengths{45, tokens};
  const auto place = [](Index sequence) -> Place {
    return [sequence](Index h, Index t, Index d) { return ((sequence * heads + h) * max_tokens + t) * dim + d; };
  };
  for (Index s = 0; s < batch; ++s) {
    fill(k_memory, place(s), heads, lengths[ix(s)], dim, 1 + ix(s));
    fill(v_memory, place(s), heads, lengths[ix(s)], dim, 11 + ix(s));
  }
  const std::vector<Float16> others = k_memory;
  Float16 *k = k_memory.data(), *v = v_memory.data();
  const OwnedQueries owned = last_queries({heads, group, dim, dim}, tokens);

  // [doc: ONNX Runtime]
  // k, v: [batch][heads][max_tokens][dim], sequence b in the first lengths[b] columns.
  std::vector<kvfold::Index> rows(batch * heads);
  if (!kvfold::set_rows(lengths, heads, rows).ok()) return;
  const kvfold::PaddedBatch<kvfold::Float16> layer{
      .layer = {heads, group, dim, dim},
      .sequences = batch,
      .tokens = max_tokens,
      .keys = k,
      .key_strides = kvfold::BatchStrides::head_major(heads, max_tokens, dim),
      .values = v,
      .value_strides = kvfold::BatchStrides::head_major(heads, max_tokens, dim),
      .padding = kvfold::Padding::right,
      .rows = rows,
      .counts = kvfold::RowCounts::per_model};
  auto cache = kvfold::padded_sequence(layer, lengths, b);  // a StridedView, or what is wrong
  // [/doc]
  ASSERT_TRUE(cache.ok());
  EXPECT_EQ(rows[0], 45);
  expect_like_ragged(cache.value(), numbers(k_memory, place(b)), numbers(v_memory, place(b)), owned.view(),
                     Method::evict);
  EXPECT_TRUE(same_bits(k_memory, others, outside(place(b), heads, tokens, dim)));
  EXPECT_EQ(rows[0], 45) << "the other sequence is as it was";
  EXPECT_EQ(rows[heads], 12);
  reached_end = true;
}

TEST_F(EnginesPage, OnnxRuntimePaged) {
  constexpr Index pool_blocks = 3, length = 300;
  auto k_memory = untouched<BFloat16>(pool_blocks * 256 * heads * dim);
  auto v_memory = untouched<BFloat16>(pool_blocks * 256 * heads * dim);
  const std::vector<PageId> block_table{2, 0};
  const Place at = [&](Index h, Index t, Index d) {
    return ((block_table[ix(t / 256)] * 256 + t % 256) * heads + h) * dim + d;
  };
  fill(k_memory, at, heads, length, dim, 1);
  fill(v_memory, at, heads, length, dim, 2);
  const std::vector<BFloat16> others = k_memory;
  BFloat16 *k = k_memory.data(), *v = v_memory.data();
  const OwnedQueries owned = last_queries({heads, group, dim, dim}, length);

  // [doc: ONNX Runtime paged]
  // k, v: [pool_blocks][256][heads][dim]; block_table: int32, of this sequence.
  std::vector<kvfold::Index> rows(heads, length);
  const auto strides = kvfold::PageStrides::token_major(256, heads, dim);
  kvfold::PagedView<kvfold::BFloat16> cache{.layer = {heads, group, dim, dim},
                                            .page_size = 256,
                                            .pages = pool_blocks,
                                            .keys = k,
                                            .key_strides = strides,
                                            .values = v,
                                            .value_strides = strides,
                                            .tables = block_table,
                                            .rows = rows,
                                            .counts = kvfold::RowCounts::per_model};
  // [/doc]
  expect_like_ragged(cache, numbers(k_memory, at), numbers(v_memory, at), owned.view(), Method::evict);
  EXPECT_TRUE(same_bits(k_memory, others, outside(at, heads, length, dim)));
  EXPECT_EQ(cache.pages_used(0), 1);
  reached_end = true;
}

// --- CTranslate2 -----------------------------------------------------------------------------------------------

TEST_F(EnginesPage, CTranslate2) {
  constexpr Index batch = 2, query_heads = heads * group, time = tokens, b = 1;
  auto k_memory = untouched<Float16>(batch * query_heads * time * dim);
  auto v_memory = untouched<Float16>(batch * query_heads * time * dim);
  const Place at = [](Index h, Index t, Index d) { return ((b * query_heads + h) * time + t) * dim + d; };
  const Place original = [&](Index h, Index t, Index d) { return at(h * group, t, d); };
  fill(k_memory, original, heads, time, dim, 1);
  fill(v_memory, original, heads, time, dim, 2);
  for (Index h = 0; h < query_heads; ++h) {  // each head is stored once for each of its query heads
    for (Index t = 0; t < time; ++t) {
      for (Index d = 0; d < dim; ++d) {
        k_memory[ix(at(h, t, d))] = k_memory[ix(original(h / group, t, d))];
        v_memory[ix(at(h, t, d))] = v_memory[ix(original(h / group, t, d))];
      }
    }
  }
  const std::vector<Float16> others = k_memory;
  Float16 *k = k_memory.data(), *v = v_memory.data();
  const OwnedQueries owned = last_queries({query_heads, 1, dim, dim}, time);

  // [doc: CTranslate2]
  // k, v: [batch][query_heads][time][dim]: stored once for each query head, so that groups have size 1.
  // With flash attention [batch][time][query_heads][dim]: Strides::token_major(query_heads, dim).
  std::vector<kvfold::Index> rows(query_heads, time);
  const kvfold::Index sequence = b * query_heads * time * dim;
  kvfold::StridedView<kvfold::Float16> cache{
      .layer = {.kv_heads = query_heads, .group_size = 1, .key_dim = dim, .value_dim = dim},
      .keys = k + sequence,
      .key_strides = kvfold::Strides::head_major(time, dim),
      .values = v + sequence,
      .value_strides = kvfold::Strides::head_major(time, dim),
      .rows = rows,
      .counts = kvfold::RowCounts::per_model};
  // [/doc]
  const Kept kept =
      expect_like_ragged(cache, numbers(k_memory, at), numbers(v_memory, at), owned.view(), Method::evict);
  EXPECT_TRUE(same_bits(k_memory, others, outside(at, query_heads, time, dim)));
  EXPECT_NE(kept[0], kept[1]) << "query heads of one group choose for themselves";
  reached_end = true;
}

// --- vLLM, FlashInfer ------------------------------------------------------------------------------------------

TEST_F(EnginesPage, FlashInferNhd) {
  constexpr Index page_size = 16, pool_pages = 13, s = 1;
  std::vector<PageId> all_indices{9, 1, 4, 11, 0, 7};
  std::vector<std::int32_t> all_indptr{0, 2, 5, 6}, all_last{3, tokens - 2 * page_size, 16};
  auto kv_memory = untouched<BFloat16>(pool_pages * 2 * page_size * heads * dim);
  const std::vector<PageId> mine{4, 11, 0};
  const auto place = [&mine](Index half) -> Place {
    return [&mine, half](Index h, Index t, Index d) {
      return (((mine[ix(t / page_size)] * 2 + half) * page_size + t % page_size) * heads + h) * dim + d;
    };
  };
  fill(kv_memory, place(0), heads, tokens, dim, 1);
  fill(kv_memory, place(1), heads, tokens, dim, 2);
  BFloat16* kv = kv_memory.data();
  const OwnedQueries owned = last_queries({heads, group, dim, dim}, tokens);
  PageId* indices = all_indices.data();
  std::int32_t *indptr = all_indptr.data(), *last_page_len = all_last.data();

  // [doc: FlashInfer]
  // kv: [pool_pages][2][page_size][heads][dim] (NHD); indptr, indices, last_page_len: int32 on the host; sequence s.
  const std::span<const kvfold::PageId> table(indices + indptr[s], indices + indptr[s + 1]);
  const kvfold::Index pages = indptr[s + 1] - indptr[s];
  std::vector<kvfold::Index> rows(heads, (pages - 1) * page_size + last_page_len[s]);
  const auto strides = kvfold::PageStrides::token_major(page_size, heads, dim, kvfold::PageHolds::keys_and_values);
  kvfold::PagedView<kvfold::BFloat16> cache{.layer = {heads, group, dim, dim},
                                            .page_size = page_size,
                                            .pages = pool_pages,
                                            .keys = kv,
                                            .key_strides = strides,
                                            .values = kv + strides.second_half(),
                                            .value_strides = strides,
                                            .tables = table,
                                            .rows = rows,
                                            .counts = kvfold::RowCounts::per_model};
  // [/doc]
  expect_like_ragged(cache, numbers(kv_memory, place(0)), numbers(kv_memory, place(1)), owned.view(), Method::evict);

  // [doc: FlashInfer]
  // After compression: pages of `table` from `used` on are free; close the gap in indices and in indptr.
  const kvfold::Index used = cache.pages_used(0);
  last_page_len[s] = static_cast<std::int32_t>(rows[0] - (used - 1) * page_size);
  // [/doc]
  EXPECT_EQ(used, 1);
  EXPECT_EQ(last_page_len[s], 12);
  reached_end = true;
}

TEST_F(EnginesPage, FlashInferHndWithFp8) {
  constexpr Index page_size = 16, pool_pages = 13;
  const std::vector<PageId> table = scattered(3, pool_pages);
  auto kv_memory = untouched<Float8E4M3>(pool_pages * 2 * heads * page_size * dim);
  const float k_scale = 0.03f, v_scale = 0.05f;
  const auto place = [&table](Index half) -> Place {
    return [&table, half](Index h, Index t, Index d) {
      return (((table[ix(t / page_size)] * 2 + half) * heads + h) * page_size + t % page_size) * dim + d;
    };
  };
  fill(kv_memory, place(0), heads, tokens, dim, 1, k_scale);
  fill(kv_memory, place(1), heads, tokens, dim, 2, v_scale);
  Float8E4M3* kv = kv_memory.data();
  const OwnedQueries owned = last_queries({heads, group, dim, dim}, tokens);

  // [doc: FlashInfer fp8]
  // kv: [pool_pages][2][heads][page_size][dim] (HND) of fp8 e4m3; k_scale, v_scale: one float each for the layer.
  std::vector<kvfold::Index> rows(heads, tokens);
  const auto strides = kvfold::PageStrides::head_major(page_size, heads, dim, kvfold::PageHolds::keys_and_values);
  kvfold::PagedView<kvfold::Float8E4M3> cache{.layer = {heads, group, dim, dim},
                                              .page_size = page_size,
                                              .pages = pool_pages,
                                              .keys = kv,
                                              .key_strides = strides,
                                              .values = kv + strides.second_half(),
                                              .value_strides = strides,
                                              .tables = table,
                                              .rows = rows,
                                              .key_scales = &k_scale,  // its strides stay 0: one for all rows
                                              .value_scales = &v_scale,
                                              .counts = kvfold::RowCounts::per_model};
  // [/doc]
  expect_like_ragged(cache, numbers(kv_memory, place(0), k_scale), numbers(kv_memory, place(1), v_scale), owned.view(),
                     Method::evict);
  reached_end = true;
}

TEST_F(EnginesPage, VllmKvCompress) {
  constexpr Index page_size = 16, pool_pages = 40, sequences = 2, max_blocks = 4, capacity = max_blocks * page_size;
  constexpr Index l = 1, s = 1;
  std::vector<PageId> tables(2 * sequences * heads * max_blocks, -1);
  for (Index i = 0; i < heads * max_blocks; ++i) {
    tables[ix((l * sequences + s) * heads * max_blocks + i)] = static_cast<PageId>((3 + 7 * i) % pool_pages);
  }
  auto k_memory = untouched<Float16>(pool_pages * page_size * dim);
  auto v_memory = untouched<Float16>(pool_pages * page_size * dim);
  const Place at = [&](Index h, Index t, Index d) {
    const Index page = tables[ix(((l * sequences + s) * heads + h) * max_blocks + t / page_size)];
    return (page * page_size + t % page_size) * dim + d;
  };
  fill(k_memory, at, heads, tokens, dim, 1);
  fill(v_memory, at, heads, tokens, dim, 2);
  Float16 *k = k_memory.data(), *v = v_memory.data();
  PageId* block_tables = tables.data();
  std::vector<Position> positions = own_positions(heads, capacity);
  std::vector<float> bias(ix(heads * capacity));
  const OwnedQueries owned = last_queries({heads, group, dim, dim}, tokens);

  // [doc: vllm-kvcompress]
  // block_tables: int32 [layer][sequence][heads][max_blocks]; a page is [page_size][dim] of one head.
  // positions, bias: yours, [heads][capacity].
  std::vector<kvfold::Index> rows(heads, tokens);  // the context lengths of sequence s in layer l, by head
  const auto* first = block_tables + (l * sequences + s) * heads * max_blocks;
  kvfold::PagedView<kvfold::Float16> cache{.layer = {heads, group, dim, dim},
                                           .page_size = page_size,
                                           .pages = pool_pages,
                                           .keys = k,
                                           .key_strides = kvfold::PageStrides::one_head(page_size, dim),
                                           .values = v,
                                           .value_strides = kvfold::PageStrides::one_head(page_size, dim),
                                           .tables = {first, first + heads * max_blocks},
                                           .table_stride = max_blocks,
                                           .rows = rows,
                                           .positions = positions,
                                           .position_stride = capacity,
                                           .log_masses = bias,
                                           .log_mass_stride = capacity,
                                           .counts = kvfold::RowCounts::per_head};
  // [/doc]
  expect_positions(
      cache, expect_like_ragged(cache, numbers(k_memory, at), numbers(v_memory, at), owned.view(), Method::merge));
  EXPECT_FALSE(rows[0] == rows[1] && rows[1] == rows[2]) << "heads have counts of their own";

  // [doc: vllm-kvcompress]
  // After compression: each head gives back the blocks behind its own rows.
  std::vector<kvfold::PageId> free_blocks;
  for (kvfold::Index h = 0; h < heads; ++h) {
    const auto* blocks = first + h * max_blocks;
    free_blocks.insert(free_blocks.end(), blocks + cache.pages_used(h), blocks + max_blocks);
  }
  // [/doc]
  Index used = 0;
  for (const Index n : rows) used += (n + page_size - 1) / page_size;
  EXPECT_EQ(static_cast<Index>(free_blocks.size()), heads * max_blocks - used);
  reached_end = true;
}

// --- TensorRT-LLM ----------------------------------------------------------------------------------------------

TEST_F(EnginesPage, TensorRtLlm) {
  constexpr Index page_size = 32, pool_pages = 8, layers = 3, l = 2;
  constexpr Index block = heads * page_size * dim;
  const std::vector<PageId> pages = scattered(2, pool_pages);
  std::vector<std::int32_t> offsets;  // in blocks
  for (const PageId page : pages) offsets.push_back(static_cast<std::int32_t>(page * layers * 2));
  auto memory = untouched<Float16>(pool_pages * layers * 2 * block);
  const auto place = [&](Index half) -> Place {
    return [&offsets, half](Index h, Index t, Index d) {
      const Index block_number = offsets[ix(t / page_size)] + l * 2 + half;
      return block_number * block + (h * page_size + t % page_size) * dim + d;
    };
  };
  fill(memory, place(0), heads, tokens, dim, 1);
  fill(memory, place(1), heads, tokens, dim, 2);
  Float16* pool = memory.data();
  const OwnedQueries owned = last_queries({heads, group, dim, dim}, tokens);

  // [doc: TensorRT-LLM]
  // pool, copied to the host: [pool_pages][layers][2][heads][page_size][dim]; offsets count [heads][page_size][dim] blocks.
  std::vector<kvfold::PageId> table;
  for (const std::int32_t offset : offsets) table.push_back(offset / (layers * 2));
  std::vector<kvfold::Index> rows(heads, tokens);
  auto strides = kvfold::PageStrides::head_major(page_size, heads, dim);
  const kvfold::Index block_elements = strides.page;
  strides.page = layers * 2 * block_elements;  // from one page to the next, in elements
  kvfold::Float16* keys = pool + l * 2 * block_elements;
  kvfold::PagedView<kvfold::Float16> cache{.layer = {heads, group, dim, dim},
                                           .page_size = page_size,
                                           .pages = pool_pages,
                                           .keys = keys,
                                           .key_strides = strides,
                                           .values = keys + block_elements,
                                           .value_strides = strides,
                                           .tables = table,
                                           .rows = rows,
                                           .counts = kvfold::RowCounts::per_model};
  // [/doc]
  expect_like_ragged(cache, numbers(memory, place(0)), numbers(memory, place(1)), owned.view(), Method::evict);
  reached_end = true;
}

// --- PyTorch, NumPy --------------------------------------------------------------------------------------------

/// The members of dlpack.h's struct.
struct DLTensor {
  void* data;
  struct {
    std::int32_t device_type, device_id;
  } device;
  std::int32_t ndim;
  struct {
    std::uint8_t code, bits;
    std::uint16_t lanes;
  } dtype;
  std::int64_t *shape, *strides;
  std::uint64_t byte_offset;
};

TEST_F(EnginesPage, PyTorchThroughDlpack) {
  constexpr Index batch = 2, b = 1, capacity = tokens;
  auto k_memory = untouched<BFloat16>(batch * heads * tokens * dim);
  auto v_memory = untouched<BFloat16>(batch * heads * tokens * dim);
  const Place at = [](Index h, Index t, Index d) { return ((b * heads + h) * tokens + t) * dim + d; };
  fill(k_memory, at, heads, tokens, dim, 1);
  fill(v_memory, at, heads, tokens, dim, 2);
  std::array<std::int64_t, 4> sizes{batch, heads, tokens, dim};
  DLTensor k{k_memory.data(), {1, 0}, 4, {4, 16, 1}, sizes.data(), nullptr, 0};
  DLTensor v = k;
  v.data = v_memory.data();
  std::vector<Position> positions = own_positions(heads, capacity);
  std::vector<float> bias(ix(heads * capacity));
  const OwnedQueries owned = last_queries({heads, group, dim, dim}, tokens);

  // [doc: DLPack]
  // k, v: DLTensor of shape [batch][heads][tokens][dim], bf16, on the host; positions, bias: yours, [heads][tokens].
  std::vector<kvfold::Index> rows(heads, tokens);
  const auto axes = kvfold::TensorAxes::batch_head_major(b);
  auto cache = kvfold::view_of_tensors<kvfold::BFloat16>(k, axes, v, axes, rows, group);
  if (!cache.ok()) return;  // cache.status() names the tensor and what is wrong with it
  cache->positions = positions;
  cache->position_stride = tokens;
  cache->log_masses = bias;
  cache->log_mass_stride = tokens;
  cache->counts = kvfold::RowCounts::per_layer;
  // [/doc]
  expect_positions(cache.value(), expect_like_ragged(cache.value(), numbers(k_memory, at), numbers(v_memory, at),
                                                     owned.view(), Method::merge));
  EXPECT_GT(*std::max_element(bias.begin(), bias.end()), 0.f);
  reached_end = true;
}

// --- Tensors of K and V together -------------------------------------------------------------------------------

TEST_F(EnginesPage, CombinedKeysAndValues) {
  constexpr Index capacity = 40;
  auto memory = untouched<Float16>(capacity * heads * 2 * dim);
  const auto place = [](Index half) -> Place {
    return [half](Index h, Index t, Index d) { return ((t * heads + h) * 2 + half) * dim + d; };
  };
  fill(memory, place(0), heads, tokens, dim, 1);
  fill(memory, place(1), heads, tokens, dim, 2);
  Float16* kv = memory.data();
  const OwnedQueries owned = last_queries({heads, group, dim, dim}, tokens);

  // [doc: combined]
  // kv: [token][heads][2][dim]: a row of V behind each row of K. For [2][...], values begin half of the tensor on.
  const kvfold::Strides strides{.head = 2 * dim, .token = heads * 2 * dim, .dim = 1};
  std::vector<kvfold::Index> rows(heads, tokens);
  kvfold::StridedView<kvfold::Float16> cache{.layer = {heads, group, dim, dim},
                                             .keys = kv,
                                             .key_strides = strides,
                                             .values = kv + dim,
                                             .value_strides = strides,
                                             .rows = rows,
                                             .counts = kvfold::RowCounts::per_layer};
  // [/doc]
  expect_like_ragged(cache, numbers(memory, place(0)), numbers(memory, place(1)), owned.view(), Method::evict);
  reached_end = true;
}

// --- An engine's own struct ------------------------------------------------------------------------------------

constexpr Index hP = 8, lP = 4, seq_blocks = 6;

// [doc: own view]
using kvfold::Index;

/// K as [heads][seq / hP][dim / lP][hP][lP], an order that no strides can tell; V as [heads][seq][dim].
struct BlockedView {
  float *k, *v;
  Index* rows;  // [heads]

  float& key(Index h, Index t, Index d) const noexcept {
    return k[(((h * seq_blocks + t / hP) * (dim / lP) + d / lP) * hP + t % hP) * lP + d % lP];
  }
  float* value(Index h, Index t) const noexcept { return v + (h * seq_blocks * hP + t) * dim; }

  kvfold::LayerShape shape() const noexcept { return {heads, group, dim, dim}; }
  kvfold::RowCounts row_counts() const noexcept { return kvfold::RowCounts::per_layer; }
  Index size(Index h) const noexcept { return rows[h]; }
  kvfold::Position position(Index, Index t) const noexcept { return t; }  // until rows have moved
  void read_keys(Index h, Index t, Index n, std::span<float> out) const noexcept {
    for (Index i = 0; i < n * dim; ++i) out.data()[i] = key(h, t + i / dim, i % dim);
  }
  void read_values(Index h, Index t, Index n, std::span<float> out) const noexcept {
    std::copy_n(value(h, t), n * dim, out.data());
  }
  void write_key(Index h, Index t, std::span<const float> in) noexcept {
    for (Index d = 0; d < dim; ++d) key(h, t, d) = in.data()[d];
  }
  void write_value(Index h, Index t, std::span<const float> in) noexcept { std::copy_n(in.data(), dim, value(h, t)); }
  void move_row(Index h, Index from, Index to) noexcept {
    for (Index d = 0; d < dim; ++d) key(h, to, d) = key(h, from, d);
    std::copy_n(value(h, from), dim, value(h, to));
  }
  void resize(Index h, Index n) noexcept { rows[h] = n; }
};
static_assert(kvfold::MutableKVCacheView<BlockedView>);  // says which function is missing, if one is
// [/doc]

const Place blocked = [](Index h, Index t, Index d) {
  const Index block = (h * seq_blocks + t / hP) * (dim / lP) + d / lP;
  return block * hP * lP + t % hP * lP + d % lP;
};
const Place plain_rows = [](Index h, Index t, Index d) { return (h * seq_blocks * hP + t) * dim + d; };

TEST_F(EnginesPage, OwnViewOfABlockedLayout) {
  auto k_memory = untouched<float>(heads * seq_blocks * hP * dim), v_memory = k_memory;
  fill(k_memory, blocked, heads, tokens, dim, 1);
  fill(v_memory, plain_rows, heads, tokens, dim, 2);
  std::array<Index, heads> rows;
  rows.fill(tokens);
  BlockedView cache{k_memory.data(), v_memory.data(), rows.data()};
  static_assert(HasRowCounts<BlockedView>);
  const OwnedQueries owned = last_queries(cache.shape(), tokens);
  expect_like_ragged(cache, numbers(k_memory, blocked), numbers(v_memory, plain_rows), owned.view(), Method::evict);
  reached_end = true;
}

// --- Staging ---------------------------------------------------------------------------------------------------

/// Where rows come from and go to, in a form that only the engine can read.
struct Device {
  std::vector<float> k, v;  // [heads][tokens][dim]
  Index rows = 0;

  [[nodiscard]] std::vector<float> download_keys() const { return k; }
  [[nodiscard]] std::vector<float> download_values() const { return v; }
  void upload(Index h, Index n, const std::vector<float>& key_rows, const std::vector<float>& value_rows) {
    std::copy_n(key_rows.begin(), n * dim, k.begin() + h * tokens * dim);
    std::copy_n(value_rows.begin(), n * dim, v.begin() + h * tokens * dim);
    rows = n;
  }
};

TEST_F(EnginesPage, StagingThroughARaggedCache) {
  Device engine{untouched<float>(heads * tokens * dim), untouched<float>(heads * tokens * dim)};
  const Place at = [](Index h, Index t, Index d) { return (h * tokens + t) * dim + d; };
  fill(engine.k, at, heads, tokens, dim, 1);
  fill(engine.v, at, heads, tokens, dim, 2);
  const std::vector<float> keys_before = engine.k, values_before = engine.v;
  const std::vector<Position> positions = positions_from(0, tokens);
  const OwnedQueries owned = last_queries({heads, group, dim, dim}, tokens);
  const QueryRows queries = owned.view();
  const SnapKv method({.score = {.window = window}, .budget = {.rows = 16}, .reduce = {}});

  // [doc: staging]
  // The engine gives its rows as floats, [heads][tokens][dim], and takes the kept ones back.
  auto cache = kvfold::RaggedCache<float>::create({heads, group, dim, dim});
  if (!cache.ok()) return;
  const std::vector<float> keys = engine.download_keys(), values = engine.download_values();
  const auto strides = kvfold::Strides::head_major(tokens, dim);
  if (!cache->append(keys.data(), strides, values.data(), strides, positions).ok()) return;

  const auto report = method.compress(cache.value(), queries);
  if (!report.ok()) return;  // the engine's rows are as they were

  std::vector<float> key_rows(tokens * dim), value_rows(tokens * dim);
  for (kvfold::Index h = 0; h < heads; ++h) {
    cache->read_keys(h, 0, cache->size(h), key_rows);
    cache->read_values(h, 0, cache->size(h), value_rows);
    engine.upload(h, cache->size(h), key_rows, value_rows);
  }
  // [/doc]
  ASSERT_EQ(report->rows_kept, heads * 16);
  EXPECT_EQ(engine.rows, 16);
  for (Index h = 0; h < heads; ++h) {
    for (Index t = 0; t < 16; ++t) {
      const Position source = cache->position(h, t);
      for (Index d = 0; d < dim; ++d) {
        ASSERT_EQ(engine.k[ix(at(h, t, d))], keys_before[ix(at(h, source, d))]);
        ASSERT_EQ(engine.v[ix(at(h, t, d))], values_before[ix(at(h, source, d))]);
      }
    }
  }
  reached_end = true;
}

// --- What all have in common -----------------------------------------------------------------------------------

TEST_F(EnginesPage, OneCallForEveryEngine) {
  auto k_memory = untouched<Float16>(tokens * heads * dim), v_memory = k_memory;
  const Place at = [](Index h, Index t, Index d) { return (t * heads + h) * dim + d; };
  fill(k_memory, at, heads, tokens, dim, 1);
  fill(v_memory, at, heads, tokens, dim, 2);
  std::vector<Index> rows(heads, tokens);
  StridedView<Float16> strided{.layer = {heads, group, dim, dim},
                               .keys = k_memory.data(),
                               .key_strides = Strides::token_major(heads, dim),
                               .values = v_memory.data(),
                               .value_strides = Strides::token_major(heads, dim),
                               .rows = rows,
                               .counts = RowCounts::per_layer};
  AnyViewOf<StridedView<Float16>> engine(strided);
  AnyView& cache = engine;
  const OwnedQueries owned = last_queries(strided.layer, tokens);
  const std::vector<float>& q = owned.data;
  const std::vector<Position>& q_positions = owned.positions;
  Index next_position = 0;

  // [doc: everywhere]
  // q: the last 8 queries of the prompt, rotated as the keys are, [query head][8][dim]; q_positions: theirs.
  const auto queries = kvfold::head_major_queries(q.data(), heads * group, dim, q_positions);
  const kvfold::EmsEvict method({.score = {.window = 8}, .budget = {.rows = 16}, .reduce = {}});
  const auto report = method.compress(cache, queries);
  if (!report.ok()) return;                // nothing has been written; report.status() names the argument and says why
  next_position = q_positions.back() + 1;  // N, as before: never the number of rows
  // [/doc]
  EXPECT_EQ(report->rows_kept, heads * 16);
  EXPECT_EQ(rows, std::vector<Index>(heads, 16));
  EXPECT_EQ(next_position, tokens);

  const std::vector<Float16> before = v_memory;
  const Result<CompressionReport> refused =
      Ems({.score = {.window = 8}, .budget = {.rows = 8}, .reduce = {}}).compress(cache, queries);
  EXPECT_EQ(refused.status().code(), StatusCode::unsupported) << "there is no place for log masses";
  EXPECT_EQ(rows[0], 16);
  EXPECT_TRUE(same_bits(v_memory, before, [](Index) { return true; }));
  reached_end = true;
}

/// OpenVINO's sums over all heads say nothing of a head.
TEST_F(EnginesPage, SumsOverAllHeadsAreRefused) {
  RaggedCache<float> ragged = make_cache({heads, group, dim, dim}, tokens);
  AnyViewOf<RaggedCache<float>> engine(ragged);
  AnyView& cache = engine;
  const std::vector<float> sums(ix(tokens), 1.f);
  const std::array<Index, 2> offset{0, tokens};
  const ColumnSums evidence{
      .detail = ColumnDetail::layer, .offset = offset, .global = sums, .local = sums, .seen = {}, .window = 8};
  const EmsEvict method({.score = {.window = 8}, .budget = {.rows = 16}, .reduce = {}});
  const Result<CompressionReport> report = method.compress(cache, evidence);
  EXPECT_EQ(report.status().code(), StatusCode::unsupported);
  EXPECT_EQ(report.status().argument(), "evidence");
  reached_end = true;
}

}  // namespace
}  // namespace kvfold::test
