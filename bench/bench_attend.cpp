/// \file
/// Decode attention: one query row for each query head, over long rows of each storage type, and where engines have them.

#include <kvfold/attend.hpp>
#include <kvfold/view/paged.hpp>

#include <algorithm>
#include <cstddef>
#include <span>
#include <string>
#include <vector>

#include "support/main.hpp"
#include "support/pipeline.hpp"

namespace kvfold::bench {

namespace {

/// As Llama-2-7B has them, a quarter of its heads: every query head has keys of its own.
constexpr Model kMultiHead{"llama2_7b_8", {8, 1, 128, 128}, 1024};

/// What the products would take at the speed of large ones, and the exps: where many queries share a row that is stored in
/// few bytes, more than reading it. Few queries never reach that speed with Eigen.
double arithmetic_seconds(const Model& model, Index rows, ThreadPool& pool) {
  const LayerShape& s = model.shape;
  const double weights = static_cast<double>(s.query_heads() * rows);
  Floor floor({{.flops = 2.0 * weights * static_cast<double>(s.key_dim + s.value_dim),
                .exps = weights,
                .product = {64, 256, s.key_dim}}},
              pool);
  std::vector<double> seconds(7);
  for (double& x : seconds) x = floor.seconds();
  return median(seconds);
}

/// One decode step over a layer, of which `memory` is read.
template <KVCacheView V>
void decode(benchmark::State& state, const Settings& settings, const Model& model, const V& view,
            const std::vector<std::span<const std::byte>>& memory, Index threads) {
  const auto rows = static_cast<Index>(view.size(0));
  ThreadPool pool(threads);
  const Queries queries(model.shape, 1, rows);
  std::vector<float> out(at(model.shape.query_heads() * model.shape.value_dim));
  const std::size_t bytes = attend_workspace_bytes(model.shape, threads);
  WorkspaceBuffer workspace;
  require(workspace.reserve(bytes), "workspace");
  const auto run = [&] {
    return attend(view, queries.view(),
                  {.data = out.data(), .head_stride = model.shape.value_dim, .row_stride = model.shape.value_dim},
                  workspace.get(), pool)
        .ok();
  };
  measure(state, settings,
          {.run = [&] { return timed(run); },
           .works = {Work::reading(memory)},
           .rows = static_cast<double>(model.shape.kv_heads * rows),
           .workspace_bytes = bytes},
          pool);
  const double seconds = state.counters["seconds"];
  state.counters["share_of_floor"] = 1.0 / state.counters["ratio"];
  state.counters["share_of_arithmetic"] = arithmetic_seconds(model, rows, pool) / seconds;
}

/// The rows of a layer where engines have them: in a tensor [T][H][D], in whose place may be pages of 16 tokens in any order.
template <Stored E>
class RowsByToken {
 public:
  RowsByToken(Layer<E>& layer, bool in_pages)
      : layer_(layer.view()),
        strides_{.head = detail::row_units<E>(layer.shape().key_dim),
                 .token = layer.shape().kv_heads * detail::row_units<E>(layer.shape().key_dim)},
        pages_(layer.rows() / kPage),
        keys_(at(layer.rows() * strides_.token)),
        values_(keys_) {
    for (Index p = 0; p < pages_; ++p) table_.push_back(static_cast<PageId>(in_pages ? (p * 7 + 3) % pages_ : p));
    for (Index t = 0; t < layer.rows(); ++t) {
      const Index token = table_[at(t / kPage)] * kPage + t % kPage;
      for (Index h = 0; h < layer.shape().kv_heads; ++h) {
        const Index place = token * strides_.token + h * strides_.head;
        std::copy_n(layer_.stored_keys(h, t, 1).data, strides_.head, keys_.data() + place);
        std::copy_n(layer_.stored_values(h, t, 1).data, strides_.head, values_.data() + place);
      }
    }
  }

  /// Keys, values and log masses; rows have no scales.
  [[nodiscard]] std::vector<std::span<const std::byte>> memory() const {
    const std::span masses(layer_.log_masses);
    return {std::as_bytes(std::span(keys_)), std::as_bytes(std::span(values_)), std::as_bytes(masses)};
  }
  [[nodiscard]] StridedView<E> tensor() {
    StridedView<E> view = layer_;
    view.keys = keys_.data();
    view.values = values_.data();
    view.key_strides = view.value_strides = strides_;
    return view;
  }
  [[nodiscard]] PagedView<E> pages() {
    PagedView<E> view{};
    view.layer = layer_.layer;
    view.page_size = kPage;
    view.pages = pages_;
    view.keys = keys_.data();
    view.values = values_.data();
    view.key_strides =
        view.value_strides = {.page = kPage * strides_.token, .head = strides_.head, .token = strides_.token};
    view.tables = table_;
    view.rows = layer_.rows;
    view.log_masses = layer_.log_masses;
    view.log_mass_stride = layer_.log_mass_stride;
    return view;
  }

 private:
  static constexpr Index kPage = 16;

  StridedView<E> layer_;
  Strides strides_;
  Index pages_;
  std::vector<E> keys_, values_;
  std::vector<PageId> table_;
};

template <Stored E>
void add_type(const Settings& settings, const char* storage) {
  for (const Model& model : {kMultiHead, kLlama, kQwen, kSmolLm}) {
    for (const Index rows : {Index{2048}, Index{32768}}) {
      if (settings.quick && rows > 2048) continue;
      for (const Index threads : {1, 2}) {
        add(name_of("attend", model.name, storage, rows, threads), [=](benchmark::State& state) {
          Layer<E> layer(model.shape, rows);
          decode(state, settings, model, layer.view(), layer.memory(), threads);
        });
      }
    }
  }
}

template <Stored E>
void add_other_places(const Settings& settings, const std::string& storage) {
  const Index rows = settings.quick ? 2048 : 32768;
  for (const bool in_pages : {false, true}) {
    for (const Index threads : {1, 2}) {
      const std::string where = in_pages ? ", pages of 16" : ", by token";
      add(name_of("attend", kLlama.name, storage + where, rows, threads), [=](benchmark::State& state) {
        Layer<E> layer(kLlama.shape, rows);
        RowsByToken<E> by_token(layer, in_pages);
        if (in_pages) return decode(state, settings, kLlama, by_token.pages(), by_token.memory(), threads);
        decode(state, settings, kLlama, by_token.tensor(), by_token.memory(), threads);
      });
    }
  }
}

}  // namespace

void register_benchmarks(const Settings& settings) {
  for_each_storage([&]<Stored E>(const char* storage) { add_type<E>(settings, storage); });
  add_other_places<float>(settings, "f32");
  add_other_places<Float16>(settings, "f16");
  add_other_places<BlockQ8_0>(settings, "q8_0");
}

}  // namespace kvfold::bench
