/// \file
/// An engine with a page pool: the rows of a RaggedCache in scattered pages, in the page layouts that engines have.
#pragma once

#include <bit>
#include <cstring>
#include <numeric>
#include <utility>
#include <vector>

#include "builders.hpp"
#include "kvfold/storage/ragged_cache.hpp"
#include "kvfold/view/paged.hpp"

namespace kvfold::test {

/// Where K and V of an engine's pages lie; where they share a tensor, V is the second half of each page.
struct PageOrder {
  PageStrides keys, values;
};

// Each layout: `kPerHead` whether heads have page tables of their own, `kCombined` whether K and V share a tensor.
struct FlashInferNhd {
  static constexpr bool kPerHead = false, kCombined = true;
  static PageOrder order(Index page_size, const LayerShape& s) {
    const auto both = PageStrides::token_major(page_size, s.kv_heads, s.key_dim, PageHolds::keys_and_values);
    return {both, both};
  }
};
struct FlashInferHnd {
  static constexpr bool kPerHead = false, kCombined = true;
  static PageOrder order(Index page_size, const LayerShape& s) {
    const auto both = PageStrides::head_major(page_size, s.kv_heads, s.key_dim, PageHolds::keys_and_values);
    return {both, both};
  }
};
struct OnnxRuntimeGenAi {
  static constexpr bool kPerHead = false, kCombined = false;
  static PageOrder order(Index page_size, const LayerShape& s) {
    return {PageStrides::token_major(page_size, s.kv_heads, s.key_dim),
            PageStrides::token_major(page_size, s.kv_heads, s.value_dim)};
  }
};
struct OpenVinoCpu {
  static constexpr bool kPerHead = false, kCombined = false;
  static PageOrder order(Index page_size, const LayerShape& s) {
    return {PageStrides::head_major(page_size, s.kv_heads, s.key_dim),
            PageStrides::head_major(page_size, s.kv_heads, s.value_dim)};
  }
};
struct OpenVinoGpu {
  static constexpr bool kPerHead = false, kCombined = false;
  static PageOrder order(Index page_size, const LayerShape& s) {
    return {PageStrides::transposed(page_size, s.kv_heads, s.key_dim),
            PageStrides::head_major(page_size, s.kv_heads, s.value_dim)};
  }
};
/// [page][layer of 3][K, V][kv_head][token][dim]: a pool for all layers.
struct TensorRtLlm {
  static constexpr bool kPerHead = false, kCombined = true;
  static PageOrder order(Index page_size, const LayerShape& s) {
    auto both = PageStrides::head_major(page_size, s.kv_heads, s.key_dim, PageHolds::keys_and_values);
    both.page *= 3;
    return {both, both};
  }
};
/// A page for each head, found through a table for each head.
struct VllmKvCompress {
  static constexpr bool kPerHead = true, kCombined = false;
  static PageOrder order(Index page_size, const LayerShape& s) {
    return {PageStrides::one_head(page_size, s.key_dim), PageStrides::one_head(page_size, s.value_dim)};
  }
};
struct OneHeadCombined {
  static constexpr bool kPerHead = true, kCombined = true;
  static PageOrder order(Index page_size, const LayerShape& s) {
    const auto both = PageStrides::one_head(page_size, s.key_dim, PageHolds::keys_and_values);
    return {both, both};
  }
};
/// Tables for each head over pages in which each head has its part: heads may share pages, not places.
struct TablesOverWholePages {
  static constexpr bool kPerHead = true, kCombined = false;
  static PageOrder order(Index page_size, const LayerShape& s) { return OpenVinoCpu::order(page_size, s); }
};

/// A value that no row has, and that spoils every sum.
template <class E>
[[nodiscard]] E poison() {
  if constexpr (std::same_as<E, float>)
    return std::bit_cast<float>(0x7fc0beefu);
  else
    return E{0x7fbe};
}

/// The rows of `cache` in pages of a pool, which also has pages of others: those hold poison.
template <class E, class Layout>
struct PagedEngine {
  static constexpr Index kPages = 97;

  LayerShape shape;
  Index page_size;
  PageOrder order;
  Index table_stride = 0;
  std::vector<E> keys, values;  // one tensor where K and V share it
  std::vector<PageId> tables;
  std::vector<Index> rows;
  std::vector<Position> positions;
  Index capacity = 0;  // rows that a head has places for
  std::vector<float> masses;
  RowCounts counts = RowCounts::per_head;

  /// \param pieces the shape; K and V must be of one width where they share a tensor
  PagedEngine(const RaggedCache<E>& cache, Index tokens, std::uint64_t seed = 3)
      : shape(cache.shape()), page_size(tokens), order(Layout::order(tokens, cache.shape())) {
    const Index H = shape.kv_heads;
    for (Index h = 0; h < H; ++h) rows.push_back(cache.size(h));
    const Index most = *std::max_element(rows.begin(), rows.end());
    const Index places = detail::pages_for(most, page_size) + 1;  // a spare page at the end of each table
    capacity = most + 5;
    keys.assign(ix(kPages * order.keys.page), poison<E>());
    if (!Layout::kCombined) values.assign(ix(kPages * order.values.page), poison<E>());
    make_tables(places, seed);
    positions.assign(ix(H * capacity), -1);
    masses.assign(ix(H * capacity), 0.f);
    std::vector<float> row(ix(std::max(shape.key_dim, shape.value_dim)));
    for (Index h = 0; h < H; ++h) {
      for (Index t = 0; t < cache.size(h); ++t) {
        cache.read_keys(h, t, 1, row);
        for (Index d = 0; d < shape.key_dim; ++d) key(h, t, d) = from_float<E>(row[ix(d)]);
        cache.read_values(h, t, 1, row);
        for (Index d = 0; d < shape.value_dim; ++d) value(h, t, d) = from_float<E>(row[ix(d)]);
        positions[ix(h * capacity + t)] = cache.position(h, t);
        masses[ix(h * capacity + t)] = cache.log_mass(h, t);
      }
    }
  }

  [[nodiscard]] PagedView<E> view() {
    return {.layer = shape,
            .page_size = page_size,
            .pages = kPages,
            .keys = keys.data(),
            .key_strides = order.keys,
            .values = value_data(),
            .value_strides = order.values,
            .tables = tables,
            .table_stride = table_stride,
            .rows = rows,
            .positions = positions,
            .position_stride = capacity,
            .log_masses = masses,
            .log_mass_stride = capacity,
            .counts = counts};
  }

  [[nodiscard]] E& key(Index h, Index t, Index d) { return keys[place(order.keys, h, t, d)]; }
  [[nodiscard]] E& value(Index h, Index t, Index d) { return value_data()[place(order.values, h, t, d)]; }
  [[nodiscard]] bool same_pools(const PagedEngine& other) const {
    return same_bytes(keys, other.keys) && same_bytes(values, other.values);
  }

  static std::size_t ix(Index i) { return static_cast<std::size_t>(i); }

 private:
  /// Pages in no order; heads that share pages where they may get the same ones.
  void make_tables(Index places, std::uint64_t seed) {
    std::vector<PageId> ids(kPages);
    std::iota(ids.begin(), ids.end(), PageId{0});
    Random random(seed);
    for (Index i = kPages - 1; i > 0; --i) std::swap(ids[ix(i)], ids[ix(random.below(i + 1))]);
    table_stride = Layout::kPerHead ? places + 2 : 0;
    tables.assign(ix(Layout::kPerHead ? shape.kv_heads * table_stride : places), PageId{-1});
    const bool share_pages = order.keys.head != 0;
    for (Index h = 0; h < (Layout::kPerHead ? shape.kv_heads : 1); ++h) {
      for (Index i = 0; i < places; ++i) {
        tables[ix(h * table_stride + i)] = ids[ix(share_pages ? (h + i) % (places + 1) : h * places + i)];
      }
    }
  }

  [[nodiscard]] E* value_data() { return Layout::kCombined ? keys.data() + half() : values.data(); }
  /// Where V begins in a page that has both: behind the K of all heads.
  [[nodiscard]] Index half() const {
    const Index heads = order.keys.head == 0 ? 1 : shape.kv_heads;
    return page_size * heads * shape.key_dim;
  }
  [[nodiscard]] std::size_t place(const PageStrides& s, Index h, Index t, Index d) const {
    const Index page = tables[ix(h * table_stride + t / page_size)];
    return ix(page * s.page + h * s.head + t % page_size * s.token + d * s.dim);
  }
  static bool same_bytes(const std::vector<E>& a, const std::vector<E>& b) {
    return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(E)) == 0);
  }
};

}  // namespace kvfold::test
