/// \file
/// An engine's layer with made-up rows, and queries that look at it.
#pragma once

#include <kvfold/detail/row_codec.hpp>
#include <kvfold/evidence/query_rows.hpp>
#include <kvfold/view/strided.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <span>
#include <vector>

namespace kvfold::bench {

[[nodiscard]] inline std::size_t at(Index i) noexcept { return static_cast<std::size_t>(i); }

/// Numbers that are roughly normal, fast to make, and the same on every platform.
class Noise {
 public:
  explicit Noise(std::uint64_t seed) : state_(seed) {}

  float operator()() {
    std::uint64_t x = state_ += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    x ^= x >> 31;
    const auto part = [x](int i) { return static_cast<float>(x >> 16 * i & 0xffffu); };
    return (part(0) + part(1) + part(2) + part(3) - 131070.f) * (1.7320508f / 65536.f);  // variance 1
  }
  [[nodiscard]] std::vector<float> row(Index width, float scale = 1.f) {
    std::vector<float> x(at(width));
    for (float& v : x) v = scale * (*this)();
    return x;
  }

 private:
  std::uint64_t state_;
};

/// K and V of one layer as [H][T][D] and [H][T][E], with positions and log masses of each head's own. Keys of a head
/// have a mean in common, values lie around 64 directions, both with as much noise: so a part of the rows is redundant.
template <Stored E>
class Layer {
 public:
  Layer(const LayerShape& shape, Index rows)
      : shape_(shape),
        rows_(rows),
        keys_(shape.kv_heads * rows, shape.key_dim),
        values_(shape.kv_heads * rows, shape.value_dim),
        counts_(at(shape.kv_heads), rows),
        positions_(at(shape.kv_heads * rows)),
        masses_(positions_.size()) {
    Noise noise(1);
    for (Index h = 0; h < shape.kv_heads; ++h) {
      std::iota(positions_.begin() + h * rows, positions_.begin() + (h + 1) * rows, Position{0});
      const std::vector<float> mean = noise.row(shape.key_dim), places = noise.row(64 * shape.value_dim);
      for (Index t = 0; t < rows; ++t) {
        keys_.set(h * rows + t, mean.data(), noise);
        values_.set(h * rows + t, places.data() + (t * 37 + t / 64) % 64 * shape.value_dim, noise);
      }
    }
  }

  [[nodiscard]] StridedView<E> view() {
    return {.layer = shape_,
            .keys = keys_.units.data(),
            .key_strides = strides(keys_),
            .values = values_.units.data(),
            .value_strides = strides(values_),
            .rows = counts_,
            .positions = positions_,
            .position_stride = rows_,
            .log_masses = masses_,
            .log_mass_stride = rows_,
            .key_scales = keys_.scale_data(),
            .key_scale_strides = scale_strides(),
            .value_scales = values_.scale_data(),
            .value_scale_strides = scale_strides()};
  }
  [[nodiscard]] const LayerShape& shape() const { return shape_; }
  [[nodiscard]] Index rows() const { return rows_; }
  /// Bytes of a row of K and one of V.
  [[nodiscard]] double row_bytes() const {
    return static_cast<double>(detail::row_bytes<E>(shape_.key_dim) + detail::row_bytes<E>(shape_.value_dim));
  }

  /// Keys, values and log masses, and where rows have scales, these.
  [[nodiscard]] std::vector<std::span<const std::byte>> memory() const {
    return {std::as_bytes(std::span(keys_.units)), std::as_bytes(std::span(keys_.scales)),
            std::as_bytes(std::span(values_.units)), std::as_bytes(std::span(values_.scales)),
            std::as_bytes(std::span(masses_))};
  }

  /// Keeps the first `count` rows of each head, so that `restore` can undo an `apply` that keeps no more.
  void save(Index count) {
    saved_ = std::min(count, rows_);
    for (Index h = 0; h < shape_.kv_heads; ++h) {
      keys_.save(h * rows_, saved_, h);
      values_.save(h * rows_, saved_, h);
    }
  }
  void restore() {
    for (Index h = 0; h < shape_.kv_heads; ++h) {
      keys_.restore(h * rows_, saved_, h);
      values_.restore(h * rows_, saved_, h);
      std::iota(positions_.begin() + h * rows_, positions_.begin() + h * rows_ + saved_, Position{0});
      std::fill_n(masses_.begin() + h * rows_, saved_, 0.f);
    }
    std::fill(counts_.begin(), counts_.end(), rows_);
  }

 private:
  struct Tensor {
    Tensor(Index rows, Index width)
        : row_units(detail::row_units<E>(width)),
          units(at(rows * row_units)),
          scales(kRowScaled<E> ? at(rows) : 0),
          scratch(at(width)) {}

    void set(Index row, const float* mean, Noise& noise) {
      for (std::size_t d = 0; d < scratch.size(); ++d) scratch[d] = mean[d] + noise();
      detail::write_row<E>(scratch.data(), static_cast<Index>(scratch.size()), &units[at(row * row_units)], 1,
                           scales.empty() ? nullptr : &scales[at(row)]);
    }
    [[nodiscard]] float* scale_data() { return scales.empty() ? nullptr : scales.data(); }
    void save(Index first, Index count, Index h) {
      saved.resize(at((h + 1) * count * row_units));
      std::copy_n(units.begin() + first * row_units, count * row_units, saved.begin() + h * count * row_units);
    }
    void restore(Index first, Index count, Index h) {
      std::copy_n(saved.begin() + h * count * row_units, count * row_units, units.begin() + first * row_units);
    }

    Index row_units;
    std::vector<E> units, saved;
    std::vector<float> scales, scratch;
  };

  [[nodiscard]] Strides strides(const Tensor& tensor) const { return {rows_ * tensor.row_units, tensor.row_units, 1}; }
  [[nodiscard]] ScaleStrides scale_strides() const { return kRowScaled<E> ? ScaleStrides{rows_, 1} : ScaleStrides{}; }

  LayerShape shape_;
  Index rows_;
  Tensor keys_, values_;
  std::vector<Index> counts_;
  std::vector<Position> positions_;
  std::vector<float> masses_;
  Index saved_ = 0;
};

/// The queries of the last `count` of `length` positions, as [H * G][count][D].
struct Queries {
  Queries(const LayerShape& shape, Index count, Index length)
      : query_heads(shape.query_heads()), dim(shape.key_dim), positions(at(count)) {
    Noise noise(2);
    data = noise.row(query_heads * count * dim);
    std::iota(positions.begin(), positions.end(), Position{length - count});
  }

  [[nodiscard]] QueryRows view() const {
    QueryRows rows = head_major_queries(data.data(), query_heads, dim, positions);
    rows.log_sum_exp = log_sum_exp;
    return rows;
  }

  Index query_heads, dim;
  std::vector<float> data, log_sum_exp;
  std::vector<Position> positions;
};

/// Calls f.template operator()<E>(name) for each storage type.
template <class F>
void for_each_storage(F f) {
  f.template operator()<float>("f32");
  f.template operator()<Float16>("f16");
  f.template operator()<BFloat16>("bf16");
  f.template operator()<Float8E4M3>("fp8_e4m3");
  f.template operator()<Int8>("int8");
  f.template operator()<BlockQ8_0>("q8_0");
  f.template operator()<BlockQ4_0>("q4_0");
}

}  // namespace kvfold::bench
