/// \file
/// Caches of every storage kind behind one interface, so that one test goes through all of them and methods are
/// compiled once.
#pragma once

#include <kvfold/storage/paged_cache.hpp>
#include <kvfold/storage/ragged_cache.hpp>
#include <kvfold/view/paged.hpp>
#include <kvfold/view/strided.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "builders.hpp"

namespace kvfold::test {

using Bytes = std::vector<std::byte>;

/// A view with a vtable. `key_bytes` and `value_bytes` are what a row is in memory, its scale included.
class AnyCache {
 public:
  AnyCache() = default;
  AnyCache(const AnyCache&) = delete;
  AnyCache& operator=(const AnyCache&) = delete;
  virtual ~AnyCache() = default;

  [[nodiscard]] virtual LayerShape shape() const noexcept = 0;
  [[nodiscard]] virtual Index size(Index h) const noexcept = 0;
  [[nodiscard]] virtual Position position(Index h, Index t) const noexcept = 0;
  [[nodiscard]] virtual Index row_bytes(Index h) const noexcept = 0;
  [[nodiscard]] virtual float log_mass(Index h, Index t) const noexcept = 0;
  virtual void read_keys(Index h, Index t, Index n, std::span<float> out) const noexcept = 0;
  virtual void read_values(Index h, Index t, Index n, std::span<float> out) const noexcept = 0;
  [[nodiscard]] virtual const float* key_rows(Index h, Index t, Index n) const noexcept = 0;
  [[nodiscard]] virtual const float* value_rows(Index h, Index t, Index n) const noexcept = 0;
  virtual void write_key(Index h, Index t, std::span<const float> in) noexcept = 0;
  virtual void write_value(Index h, Index t, std::span<const float> in) noexcept = 0;
  virtual void write_log_mass(Index h, Index t, float mass) noexcept = 0;
  virtual void move_row(Index h, Index from, Index to) noexcept = 0;
  virtual void resize(Index h, Index n) noexcept = 0;

  [[nodiscard]] virtual Bytes key_bytes(Index h, Index t) const = 0;
  [[nodiscard]] virtual Bytes value_bytes(Index h, Index t) const = 0;
  /// How far number i of a row may be from what was written.
  [[nodiscard]] virtual double key_error(Index h, std::span<const float> row, std::size_t i) const = 0;
  [[nodiscard]] virtual double value_error(Index h, std::span<const float> row, std::size_t i) const = 0;
};
static_assert(MutableKVCacheView<AnyCache> && HasWritableLogMass<AnyCache> && HasContiguousRows<AnyCache>);

/// Forwards to a view or a cache.
template <class View>
class AnyCacheOf : public AnyCache {
 public:
  explicit AnyCacheOf(View view) : view_(std::move(view)) {}

  [[nodiscard]] LayerShape shape() const noexcept override { return view_.shape(); }
  [[nodiscard]] Index size(Index h) const noexcept override { return view_.size(h); }
  [[nodiscard]] Position position(Index h, Index t) const noexcept override { return view_.position(h, t); }
  [[nodiscard]] Index row_bytes(Index h) const noexcept override { return view_.row_bytes(h); }
  [[nodiscard]] float log_mass(Index h, Index t) const noexcept override { return view_.log_mass(h, t); }
  void read_keys(Index h, Index t, Index n, std::span<float> out) const noexcept override {
    view_.read_keys(h, t, n, out);
  }
  void read_values(Index h, Index t, Index n, std::span<float> out) const noexcept override {
    view_.read_values(h, t, n, out);
  }
  [[nodiscard]] const float* key_rows(Index h, Index t, Index n) const noexcept override {
    return view_.key_rows(h, t, n);
  }
  [[nodiscard]] const float* value_rows(Index h, Index t, Index n) const noexcept override {
    return view_.value_rows(h, t, n);
  }
  void write_key(Index h, Index t, std::span<const float> in) noexcept override { view_.write_key(h, t, in); }
  void write_value(Index h, Index t, std::span<const float> in) noexcept override { view_.write_value(h, t, in); }
  void write_log_mass(Index h, Index t, float mass) noexcept override { view_.write_log_mass(h, t, mass); }
  void move_row(Index h, Index from, Index to) noexcept override { view_.move_row(h, from, to); }
  void resize(Index h, Index n) noexcept override { view_.resize(h, n); }

 protected:
  View view_;
};

// --- Kinds -----------------------------------------------------------------------------------------------------

/// What is known of a kind without asking the library: its name, the bytes of a row, and how far off it may be.
template <class E>
struct FloatKind {
  using Stored = E;
  static constexpr bool kScaled = false;
  static constexpr int kDigits = std::is_same_v<E, float> ? 24 : std::is_same_v<E, Float16> ? 11 : 8;
  static std::string name() { return kDigits == 24 ? "f32" : kDigits == 11 ? "f16" : "bf16"; }
  static Index row_bytes(Index width) { return width * (kDigits == 24 ? 4 : 2); }
  static double error(std::span<const float> row, std::size_t i, float /*scale*/) {
    return kDigits == 24 ? 0.0 : std::ldexp(std::abs(static_cast<double>(row[i])), -kDigits) + 0x1p-25;
  }
};

template <bool IsScaled>
struct Fp8Kind {
  using Stored = Float8E4M3;
  static constexpr bool kScaled = IsScaled;  // by one number for each head
  static std::string name() { return kScaled ? "scaledfp8" : "fp8"; }
  static Index row_bytes(Index width) { return width; }
  static double error(std::span<const float> row, std::size_t i, float scale) {
    return 1.00001 * (std::abs(static_cast<double>(row[i])) * 0x1p-4 + 0x1p-10 * static_cast<double>(scale));
  }
};

inline double largest_of(std::span<const float> row) {
  float most = 0.f;
  for (const float x : row) most = std::max(most, std::abs(x));
  return static_cast<double>(most);
}

struct Int8Kind {
  using Stored = Int8;
  static constexpr bool kScaled = true;  // by one number for each row
  static std::string name() { return "int8"; }
  static Index row_bytes(Index width) { return width + 4; }
  static double error(std::span<const float> row, std::size_t, float) {
    return 0.5001 * largest_of(row) / 127.0;  // half a step
  }
};

struct Q8Kind {
  using Stored = BlockQ8_0;
  static constexpr bool kScaled = false;
  static std::string name() { return "q8"; }
  static Index row_bytes(Index width) { return width / 32 * 34; }
  static double error(std::span<const float> row, std::size_t i, float) {
    const double step = largest_of(row.subspan(i / 32 * 32, 32)) / 127.0;
    return (0.5001 + 127.0 * 0x1p-11) * step;  // half a step, and that of an fp16 scale
  }
};

struct Q4Kind {
  using Stored = BlockQ4_0;
  static constexpr bool kScaled = false;
  static std::string name() { return "q4"; }
  static Index row_bytes(Index width) { return width / 32 * 18; }
  static double error(std::span<const float> row, std::size_t i, float) {
    const double step = largest_of(row.subspan(i / 32 * 32, 32)) / 8.0;
    const double cut_off = std::abs(static_cast<double>(row[i])) - 7.0 * step;  // steps go from -8 to 7
    return std::max(0.5001 * step, 1.0001 * cut_off) + 8.0 * 0x1p-11 * step;
  }
};

// --- Caches ----------------------------------------------------------------------------------------------------

/// One tensor of an engine, zeros at first, with the scales that its kind has: one for each head, one for each row, or none.
/// Rows lie where `Order` says, their scales where `ScaleOrder` does.
template <class Kind, class Order, class ScaleOrder>
class StoredTensor {
 public:
  using E = typename Kind::Stored;

  /// \param rows of all heads together
  StoredTensor(Index heads, Index rows, Index row_units, Order order, ScaleOrder row_scales)
      : strides(order), units(static_cast<std::size_t>(rows * row_units)), row_units_(row_units) {
    if (kRowScaled<E>) {
      scale_strides = row_scales;
      scales.resize(static_cast<std::size_t>(rows));
    } else if (Kind::kScaled) {
      scale_strides.head = 1;
      for (Index h = 0; h < heads; ++h) scales.push_back(0.013f * static_cast<float>(h + 1));
    }
  }

  /// The bytes of a row; where there are pages, of token t of the page.
  [[nodiscard]] Bytes row(Index h, Index t, Index page = 0) const {
    const auto place = [&](const auto& s) {
      const Index in_page = h * s.head + t * s.token;
      if constexpr (requires { s.page; }) {
        return page * s.page + in_page;
      } else {
        return in_page;
      }
    };
    Bytes bytes;
    const auto append = [&bytes](const void* from, std::size_t n) {
      const std::size_t end = bytes.size();
      bytes.resize(end + n);
      std::memcpy(bytes.data() + end, from, n);
    };
    for (Index u = 0; u < row_units_; ++u) {
      append(&units[static_cast<std::size_t>(place(strides) + u * strides.dim)], sizeof(E));
    }
    if (kRowScaled<E>) append(&scales[static_cast<std::size_t>(place(scale_strides))], sizeof(float));
    return bytes;
  }
  [[nodiscard]] float* scale_data() { return scales.empty() ? nullptr : scales.data(); }
  [[nodiscard]] float head_scale(Index h) const {
    return Kind::kScaled && !kRowScaled<E> ? scales[static_cast<std::size_t>(h)] : 1.f;
  }

  Order strides;
  ScaleOrder scale_strides;
  std::vector<E> units;
  std::vector<float> scales;

 private:
  Index row_units_;
};

enum class Layout { head_major, token_major, transposed };

template <class Kind>
using StridedTensor = StoredTensor<Kind, Strides, ScaleStrides>;

template <class Kind>
[[nodiscard]] StridedTensor<Kind> strided_tensor(Layout layout, Index heads, Index capacity, Index width) {
  const Index units = width / kUnit<typename Kind::Stored>;
  const Strides strides = layout == Layout::head_major    ? Strides::head_major(capacity, units)
                          : layout == Layout::token_major ? Strides::token_major(heads, units)
                                                          : Strides::transposed(capacity, units);
  return {heads, heads * capacity, units, strides, {.head = capacity, .token = 1}};
}

/// Tensors and tables of an engine's cache, and a StridedView on them.
template <class K, class V>
class StridedCache final : public AnyCacheOf<StridedView<typename K::Stored, typename V::Stored>> {
 public:
  StridedCache(LayerShape shape, Index capacity, Layout key_layout, Layout value_layout)
      : AnyCacheOf<StridedView<typename K::Stored, typename V::Stored>>({}),
        keys_(strided_tensor<K>(key_layout, shape.kv_heads, capacity, shape.key_dim)),
        values_(strided_tensor<V>(value_layout, shape.kv_heads, capacity, shape.value_dim)),
        rows_(static_cast<std::size_t>(shape.kv_heads), capacity),
        log_masses_(static_cast<std::size_t>(shape.kv_heads * capacity)) {
    for (Index i = 0; i < shape.kv_heads * capacity; ++i) positions_.push_back(i % capacity);
    this->view_ = {.layer = shape,
                   .keys = keys_.units.data(),
                   .key_strides = keys_.strides,
                   .values = values_.units.data(),
                   .value_strides = values_.strides,
                   .rows = rows_,
                   .positions = positions_,
                   .position_stride = capacity,
                   .log_masses = log_masses_,
                   .log_mass_stride = capacity,
                   .key_scales = keys_.scale_data(),
                   .key_scale_strides = keys_.scale_strides,
                   .value_scales = values_.scale_data(),
                   .value_scale_strides = values_.scale_strides};
  }

  [[nodiscard]] Bytes key_bytes(Index h, Index t) const override { return keys_.row(h, t); }
  [[nodiscard]] Bytes value_bytes(Index h, Index t) const override { return values_.row(h, t); }
  [[nodiscard]] double key_error(Index h, std::span<const float> row, std::size_t i) const override {
    return K::error(row, i, keys_.head_scale(h));
  }
  [[nodiscard]] double value_error(Index h, std::span<const float> row, std::size_t i) const override {
    return V::error(row, i, values_.head_scale(h));
  }

 private:
  StridedTensor<K> keys_;
  StridedTensor<V> values_;
  std::vector<Index> rows_;
  std::vector<Position> positions_;
  std::vector<float> log_masses_;
};

enum class Pages { token_major, head_major, transposed, one_head };

inline constexpr Index kPoolPageSize = 16;

template <class Kind>
using PagedTensor = StoredTensor<Kind, PageStrides, PageStrides>;

/// The tensor of a page pool, whose pages hold `kPoolPageSize` tokens of all heads or of one.
template <class Kind>
[[nodiscard]] PagedTensor<Kind> paged_tensor(Pages order, Index heads, Index pages, Index width) {
  const Index units = width / kUnit<typename Kind::Stored>;
  const PageStrides strides = order == Pages::token_major  ? PageStrides::token_major(kPoolPageSize, heads, units)
                              : order == Pages::head_major ? PageStrides::head_major(kPoolPageSize, heads, units)
                              : order == Pages::transposed ? PageStrides::transposed(kPoolPageSize, heads, units)
                                                           : PageStrides::one_head(kPoolPageSize, units);
  const bool one_head = order == Pages::one_head;
  const Index page_rows = (one_head ? 1 : heads) * kPoolPageSize;
  const PageStrides scales{.page = page_rows, .head = one_head ? 0 : kPoolPageSize, .token = 1};
  return {heads, pages * page_rows, units, strides, scales};
}

/// A page pool of an engine, tables that name its pages in no order, and a PagedView on them.
template <class K, class V>
class PooledCache final : public AnyCacheOf<PagedView<typename K::Stored, typename V::Stored>> {
 public:
  PooledCache(LayerShape shape, Index rows, Pages key_order, Pages value_order)
      : AnyCacheOf<PagedView<typename K::Stored, typename V::Stored>>({}),
        places_((rows + kPoolPageSize - 1) / kPoolPageSize),
        stride_(key_order == Pages::one_head ? places_ : 0),
        pages_((key_order == Pages::one_head ? shape.kv_heads : 1) * places_ * 7 + 1),  // not a multiple of 7
        keys_(paged_tensor<K>(key_order, shape.kv_heads, pages_, shape.key_dim)),
        values_(paged_tensor<V>(value_order, shape.kv_heads, pages_, shape.value_dim)),
        rows_(static_cast<std::size_t>(shape.kv_heads), rows),
        log_masses_(static_cast<std::size_t>(shape.kv_heads * rows)) {
    for (Index i = 0; i < (stride_ == 0 ? 1 : shape.kv_heads) * places_; ++i) {
      tables_.push_back(static_cast<PageId>((i * 7 * 7 + 3) % pages_));
    }
    for (Index i = 0; i < shape.kv_heads * rows; ++i) positions_.push_back(i % rows);
    this->view_ = {.layer = shape,
                   .page_size = kPoolPageSize,
                   .pages = pages_,
                   .keys = keys_.units.data(),
                   .key_strides = keys_.strides,
                   .values = values_.units.data(),
                   .value_strides = values_.strides,
                   .tables = tables_,
                   .table_stride = stride_,
                   .rows = rows_,
                   .positions = positions_,
                   .position_stride = rows,
                   .log_masses = log_masses_,
                   .log_mass_stride = rows,
                   .key_scales = keys_.scale_data(),
                   .key_scale_strides = keys_.scale_strides,
                   .value_scales = values_.scale_data(),
                   .value_scale_strides = values_.scale_strides};
    const Status checked = this->view_.check();
    EXPECT_TRUE(checked.ok()) << checked.argument() << ": " << checked.detail();
  }

  [[nodiscard]] Bytes key_bytes(Index h, Index t) const override { return row_of(keys_, h, t); }
  [[nodiscard]] Bytes value_bytes(Index h, Index t) const override { return row_of(values_, h, t); }
  [[nodiscard]] double key_error(Index h, std::span<const float> row, std::size_t i) const override {
    return K::error(row, i, keys_.head_scale(h));
  }
  [[nodiscard]] double value_error(Index h, std::span<const float> row, std::size_t i) const override {
    return V::error(row, i, values_.head_scale(h));
  }

 private:
  template <class Kind>
  [[nodiscard]] Bytes row_of(const PagedTensor<Kind>& tensor, Index h, Index t) const {
    return tensor.row(h, t % kPoolPageSize, tables_[static_cast<std::size_t>(h * stride_ + t / kPoolPageSize)]);
  }

  Index places_, stride_, pages_;
  PagedTensor<K> keys_;
  PagedTensor<V> values_;
  std::vector<PageId> tables_;
  std::vector<Index> rows_;
  std::vector<Position> positions_;
  std::vector<float> log_masses_;
};

/// A cache that owns its memory and does not show it: the bits of what it reads as stand for the bytes of a row.
template <class K, class V, class Cache>
class OwnedCacheOf : public AnyCacheOf<Cache> {
 public:
  OwnedCacheOf(Cache empty, LayerShape shape, Index rows) : AnyCacheOf<Cache>(std::move(empty)) {
    const std::vector<float> zeros(static_cast<std::size_t>(std::max(shape.key_dim, shape.value_dim)));
    const Strides same{.head = 0, .token = 0, .dim = 1};
    const auto positions = positions_from(0, rows);
    EXPECT_TRUE(this->view_.append(zeros.data(), same, zeros.data(), same, positions).ok());
  }

  [[nodiscard]] Bytes key_bytes(Index h, Index t) const override {
    std::vector<float> row(static_cast<std::size_t>(this->shape().key_dim));
    this->read_keys(h, t, 1, row);
    return bits_of(row);
  }
  [[nodiscard]] Bytes value_bytes(Index h, Index t) const override {
    std::vector<float> row(static_cast<std::size_t>(this->shape().value_dim));
    this->read_values(h, t, 1, row);
    return bits_of(row);
  }
  [[nodiscard]] double key_error(Index, std::span<const float> row, std::size_t i) const override {
    return K::error(row, i, 1.f);
  }
  [[nodiscard]] double value_error(Index, std::span<const float> row, std::size_t i) const override {
    return V::error(row, i, 1.f);
  }

 private:
  static Bytes bits_of(const std::vector<float>& row) {
    Bytes bytes(row.size() * sizeof(float));
    std::memcpy(bytes.data(), row.data(), bytes.size());
    return bytes;
  }
};

/// A RaggedCache.
template <class K, class V>
class OwnedCache final : public OwnedCacheOf<K, V, RaggedCache<typename K::Stored, typename V::Stored>> {
 public:
  using Cache = RaggedCache<typename K::Stored, typename V::Stored>;
  OwnedCache(LayerShape shape, Index rows) : OwnedCacheOf<K, V, Cache>(Cache::create(shape).value(), shape, rows) {}
};

/// A pool, made before the cache over it.
struct PoolOfOne {
  PoolOfOne(std::size_t page_bytes, Index pages)
      : pool(PagePool<>::create({.page_bytes = page_bytes, .pages_per_slab = pages, .max_slabs = 1}).value()) {}
  PagePool<> pool;
};

/// A PagedCache over a pool of its own.
template <class K, class V>
class OwnedPages final : private PoolOfOne,
                         public OwnedCacheOf<K, V, PagedCache<typename K::Stored, typename V::Stored>> {
 public:
  using Cache = PagedCache<typename K::Stored, typename V::Stored>;
  OwnedPages(LayerShape shape, Index rows, PageTables tables)
      : PoolOfOne(Cache::page_bytes(shape, {.tables = tables}).value(), shape.kv_heads * (rows / 16 + 1)),
        OwnedCacheOf<K, V, Cache>(Cache::create(shape, this->pool, {.tables = tables}).value(), shape, rows) {}
};

/// How to make a cache of `rows` rows of zeros in every head, at positions 0, 1, ..., and what it ought to weigh.
struct StorageCase {
  std::string name;
  std::unique_ptr<AnyCache> (*make)(LayerShape shape, Index rows);
  Index (*row_bytes)(LayerShape shape);
};

template <class K, class V, Layout KeyLayout, Layout ValueLayout>
[[nodiscard]] StorageCase strided_case(const std::string& layout) {
  return {K::name() + "_" + V::name() + "_" + layout,
          [](LayerShape shape, Index rows) -> std::unique_ptr<AnyCache> {
            return std::make_unique<StridedCache<K, V>>(shape, rows, KeyLayout, ValueLayout);
          },
          [](LayerShape shape) { return K::row_bytes(shape.key_dim) + V::row_bytes(shape.value_dim); }};
}

template <class K, class V, Pages KeyPages, Pages ValuePages>
[[nodiscard]] StorageCase paged_case(const std::string& layout) {
  return {K::name() + "_" + V::name() + "_" + layout,
          [](LayerShape shape, Index rows) -> std::unique_ptr<AnyCache> {
            return std::make_unique<PooledCache<K, V>>(shape, rows, KeyPages, ValuePages);
          },
          [](LayerShape shape) { return K::row_bytes(shape.key_dim) + V::row_bytes(shape.value_dim); }};
}

/// Every layout that the two kinds can have, and the caches that own their memory (which have no scales for fp8).
template <class K, class V>
void add_cases(std::vector<StorageCase>& cases) {
  constexpr bool key_blocks = kInBlocks<typename K::Stored>, value_blocks = kInBlocks<typename V::Stored>;
  cases.push_back(strided_case<K, V, Layout::head_major, Layout::head_major>("headmajor"));
  cases.push_back(strided_case<K, V, Layout::token_major, Layout::token_major>("tokenmajor"));
  if constexpr (!value_blocks) {
    cases.push_back(strided_case<K, V, Layout::token_major, Layout::transposed>("transposedvalues"));
  }
  if constexpr (!key_blocks) {
    cases.push_back(strided_case<K, V, Layout::transposed, Layout::head_major>("transposedkeys"));
  }
  cases.push_back(paged_case<K, V, Pages::token_major, Pages::token_major>("tokenmajorpages"));
  cases.push_back(paged_case<K, V, Pages::head_major, Pages::head_major>("headmajorpages"));
  cases.push_back(paged_case<K, V, Pages::one_head, Pages::one_head>("pagesofheads"));
  if constexpr (!key_blocks) {
    cases.push_back(paged_case<K, V, Pages::transposed, Pages::head_major>("transposedkeypages"));
  }
  if constexpr (!(K::kScaled && !kRowScaled<typename K::Stored>)&&!(V::kScaled && !kRowScaled<typename V::Stored>)) {
    cases.push_back({K::name() + "_" + V::name() + "_ragged",
                     [](LayerShape shape, Index rows) -> std::unique_ptr<AnyCache> {
                       return std::make_unique<OwnedCache<K, V>>(shape, rows);
                     },
                     [](LayerShape shape) {  // positions and log masses are memory of the cache
                       return K::row_bytes(shape.key_dim) + V::row_bytes(shape.value_dim) + 12;
                     }});
    cases.push_back(
        {K::name() + "_" + V::name() + "_ownedpages",
         [](LayerShape shape, Index rows) -> std::unique_ptr<AnyCache> {
           return std::make_unique<OwnedPages<K, V>>(shape, rows, PageTables::per_head);
         },
         [](LayerShape shape) { return K::row_bytes(shape.key_dim) + V::row_bytes(shape.value_dim) + 12; }});
  }
}

[[nodiscard]] inline std::vector<StorageCase> storage_cases() {
  using F32 = FloatKind<float>;
  using F16 = FloatKind<Float16>;
  using Bf16 = FloatKind<BFloat16>;
  using Fp8 = Fp8Kind<false>;
  using ScaledFp8 = Fp8Kind<true>;
  std::vector<StorageCase> cases;
  add_cases<F32, F32>(cases);
  add_cases<F16, F16>(cases);
  add_cases<Bf16, Bf16>(cases);
  add_cases<Fp8, Fp8>(cases);
  add_cases<ScaledFp8, ScaledFp8>(cases);
  add_cases<Int8Kind, Int8Kind>(cases);
  add_cases<Q8Kind, Q8Kind>(cases);
  add_cases<Q4Kind, Q4Kind>(cases);
  add_cases<Q8Kind, F16>(cases);
  add_cases<F16, Int8Kind>(cases);
  add_cases<Int8Kind, Q4Kind>(cases);
  add_cases<ScaledFp8, Bf16>(cases);
  return cases;
}

}  // namespace kvfold::test
