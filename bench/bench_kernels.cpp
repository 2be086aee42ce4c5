/// \file
/// The kernels below the stages, on operands that stay in the first cache, against Eigen's products and exps on the same
/// numbers as floats: what is converted is converted by the kernels only.

#include <kvfold/detail/few_block_rows.hpp>
#include <kvfold/detail/few_rows.hpp>
#include <kvfold/detail/linalg.hpp>
#include <kvfold/detail/panel_products.hpp>
#include <kvfold/detail/softmax.hpp>

#include "support/main.hpp"
#include "support/pipeline.hpp"

namespace kvfold::bench {

namespace {

using detail::ConstRows;
using detail::Rows;

constexpr Index kTimes = 500;  // a kernel takes microseconds: it is timed so many times in a row

/// 128, of which compilers know nothing: kernels are compiled for any width.
Index width_of_rows() {
  Index width = 128;
  benchmark::DoNotOptimize(width);
  return width;
}

ConstRows rows_of(const std::vector<float>& x, Index rows, Index width) {
  return ConstRows(x.data(), rows, width, Eigen::OuterStride<>(width));
}
Rows rows_of(std::vector<float>& x, Index rows, Index width) {
  return Rows(x.data(), rows, width, Eigen::OuterStride<>(width));
}

/// Times `kernel` against `baseline`, both of which go over so many numbers and write to `out`.
template <class Kernel, class Baseline>
void compare(benchmark::State& state, const Settings& settings, double numbers, std::vector<float>& out, Kernel kernel,
             Baseline baseline) {
  ThreadPool pool(1);
  const auto seconds = [&out](auto& f) {
    return timed([&] {
      for (Index i = 0; i < kTimes; ++i) {
        f();
        benchmark::DoNotOptimize(out.data());
        benchmark::ClobberMemory();
      }
      return true;
    });
  };
  measure(state, settings, {.run = [&] { return seconds(kernel); }, .baseline = [&] { return seconds(baseline); }},
          pool);
  state.counters["numbers/s"] = numbers * static_cast<double>(kTimes) / state.counters["seconds"];
}

/// Queries of one decode step with stored rows: their dot products, or the rows' weighted sums.
template <Stored E>
  requires(detail::kHasLanes<E> || detail::kAreIntegers<E>)
void few(benchmark::State& state, const Settings& settings, bool dots, Index queries, Index rows) {
  const Index width = width_of_rows();
  const LayerShape shape{.kv_heads = 1, .group_size = 1, .key_dim = width, .value_dim = width};
  Layer<E> layer(shape, rows);
  const auto view = layer.view();
  const detail::RowsTogether<E> stored{view.stored_keys(0, 0, rows).data, detail::row_units<E>(width), rows};
  std::vector<float> floats(at(rows * width)), out(at(queries * std::max(rows, width)));
  view.read_keys(0, 0, rows, floats);
  Noise noise(2);
  const std::vector<float> a = noise.row(queries * width), weights = noise.row(queries * rows, 1e-6f);
  WorkspaceBuffer memory;
  detail::Arena measuring;
  static_cast<void>(detail::RoundedRows::take(measuring, queries, width));
  static_cast<void>(detail::BlockSpace::take(measuring, width));
  require(memory.reserve(measuring.required_bytes()), "memory of the kernels");
  detail::Arena arena(memory.get());
  const auto rounded = detail::RoundedRows::take(arena, queries, width);
  const auto space = detail::BlockSpace::take(arena, width);
  const auto kernel = [&] {
    if constexpr (detail::kAreIntegers<E>) {
      if (!dots) return detail::add_few(weights.data(), rows, queries, stored, space, width, out.data(), width);
      detail::few_dots(rounded.set(a.data(), queries), stored, out.data(), rows);
    } else {
      if (!dots) return detail::add_few(weights.data(), rows, queries, stored, width, out.data(), width);
      detail::few_dots(a.data(), width, queries, stored, width, out.data(), rows);
    }
  };
  const auto eigen = [&] {
    if (dots) {
      rows_of(out, queries, rows).noalias() = rows_of(a, queries, width) * rows_of(floats, rows, width).transpose();
    } else {
      rows_of(out, queries, width).noalias() += rows_of(weights, queries, rows) * rows_of(floats, rows, width);
    }
  };
  compare(state, settings, static_cast<double>(rows * width), out, kernel, eigen);
}

/// Blocks of queries, of which panels are made once for all keys, with fp32 keys.
void block(benchmark::State& state, const Settings& settings, Index queries, Index rows) {
  const Index width = width_of_rows(), columns = detail::panel_columns(queries);
  Noise noise(3);
  const std::vector<float> a = noise.row(queries * width), b = noise.row(rows * width);
  std::vector<float> panels(at(detail::panel_rows(queries) * width)), out(at(rows * columns));
  detail::make_panels(a.data(), width, queries, width, panels.data());
  const auto kernel = [&] {
    detail::multiply_panels(b.data(), width, rows, panels.data(), queries, width, out.data(), columns);
  };
  const auto eigen = [&] {
    rows_of(out, queries, rows).noalias() = rows_of(a, queries, width) * rows_of(b, rows, width).transpose();
  };
  compare(state, settings, static_cast<double>(rows * width), out, kernel, eigen);
}

void exponentials(benchmark::State& state, const Settings& settings, Index rows) {
  const Index width = width_of_rows();
  const Index n = rows * width;
  Noise noise(4);
  const std::vector<float> x = noise.row(n, 3.f);
  std::vector<float> out(at(n));
  const auto kernel = [&] {
    std::copy_n(x.begin(), n, out.begin());
    benchmark::DoNotOptimize(detail::exp_shifted(out.data(), n, 5.f));
  };
  const auto eigen = [&] {
    std::copy_n(x.begin(), n, out.begin());
    detail::Floats e(out.data(), n);
    e = (e - 5.f).exp();
    benchmark::DoNotOptimize(e.sum());
  };
  compare(state, settings, static_cast<double>(n), out, kernel, eigen);
}

}  // namespace

void register_benchmarks(const Settings& settings) {
  constexpr Index kRows = 64;
  const auto name = [](const std::string& kernel) { return name_of("kernels", "width_128", kernel, kRows, 1); };
  const auto add_type = [&]<Stored E>(const char* storage) {
    if constexpr (detail::kHasLanes<E> || detail::kAreIntegers<E>) {
      for (const bool dots : {true, false}) {
        for (const Index queries : {1, 2, 4}) {
          const std::string kernel = dots ? "dots of " : "weighted sums for ";
          add(name(kernel + std::to_string(queries) + (queries > 1 ? " queries, " : " query, ") + storage),
              [=](benchmark::State& state) { few<E>(state, settings, dots, queries, kRows); });
        }
      }
    }
  };
  for_each_storage(add_type);
  for (const Index queries : {32, 64}) {
    add(name("dots of " + std::to_string(queries) + " queries, f32"),
        [=](benchmark::State& state) { block(state, settings, queries, kRows); });
  }
  add(name("exps"), [=](benchmark::State& state) { exponentials(state, settings, kRows); });
}

}  // namespace kvfold::bench
