/// \file
/// Classes for candidates by redundancy, with a zero class for what is like nothing kept (EMS, arXiv 2412.08521).
#pragma once

#include <algorithm>
#include <cmath>

#include "kvfold/detail/arena.hpp"
#include "kvfold/detail/linalg.hpp"
#include "kvfold/detail/rope.hpp"
#include "kvfold/detail/rows.hpp"
#include "kvfold/exec/executor.hpp"

namespace kvfold {

/// Candidates and class centres of every head, as an assigner sees them.
struct ClassProblem {
  std::span<const Index> centre_offset;     ///< [H + 1]
  std::span<const RowId> centres;           ///< source rows, ascending within each head
  std::span<const Index> candidate_offset;  ///< [H] first candidate of each head
  std::span<const Index> candidate_count;   ///< [H] R_h
  std::span<const RowId> candidates;        ///< source rows, ascending within each head
  Index max_candidates = 0;                 ///< max R_h
};

/// Gives each candidate the class whose centre it is most like, or class 0, the zero class.
///
/// sim(j, c) = max(cos(k_j, k_c), 0) * max(cos(v_j, v_c), 0), where a zero vector is like nothing. Column 0 is the constant
/// tau; class_j = argmax(tau, sim(j, 1..C)), ties to the lower index; centres within 1e-6 of each other are a tie. What lands in class 0 is evicted.
///
/// All heads are one batch of equal tiles, `[H, max R, 1 + max C]`: heads that have fewer candidates or centres are padded,
/// padding rows fall into class 0 and padding columns do not win. Tiles without a row in them cost nothing.
/// Cost: 2 * R * C * (D + E) FLOPs per head; memory O(tile) per worker.
class ZeroClassBatcher {
 public:
  enum class KeySpace : unsigned char {
    stored,     ///< keys are compared as they are stored
    unrotated,  ///< without their rotation: needs a view that knows its RoPE
  };
  struct Options {
    float tau = 0.3f;  ///< similarity of the zero class, in [0, 1]; tau in EMS
    KeySpace key_space = KeySpace::stored;

    [[nodiscard]] Status validate() const noexcept {
      if (!(tau >= 0.f && tau <= 1.f)) return {StatusCode::invalid_argument, "tau", "must be in [0, 1]"};
      return {};
    }
  };

  ZeroClassBatcher() noexcept = default;
  explicit ZeroClassBatcher(Options options) noexcept : options_(options) {}

  [[nodiscard]] const Options& options() const noexcept { return options_; }
  [[nodiscard]] Status validate() const noexcept { return options_.validate(); }

  [[nodiscard]] static std::size_t workspace_bytes(const LayerShape& shape, Index max_candidates,
                                                   Index workers) noexcept {
    detail::Arena arena;
    static_cast<void>(arena.take<Status>(shape.kv_heads, tiles_of(max_candidates)));
    static_cast<void>(arena.take<Scratch>(workers));
    for (Index w = 0; w < workers; ++w) static_cast<void>(Scratch::take(arena, shape));
    return arena.required_bytes();
  }

  /// \param classes [H][max R]: 0 for the zero class and for padding, c for centre c - 1 of the head.
  template <KVCacheView V, Executor X>
  Status assign(const V& view, const ClassProblem& problem, std::span<RowId> classes, Workspace workspace,
                X& executor) const noexcept {
    const LayerShape shape = view.shape();
    if (options_.key_space == KeySpace::unrotated) {
      if (Status bad = detail::check_rope(view); !bad.ok()) return bad;
    }
    const Index tiles = tiles_of(problem.max_candidates);
    detail::Arena arena(workspace);
    const std::span<Status> status = arena.take<Status>(shape.kv_heads, tiles);
    const auto workers = static_cast<Index>(executor.concurrency());
    const std::span<Scratch> scratch = arena.take<Scratch>(workers);
    for (Index w = 0; w < workers; ++w) {
      const Scratch s = Scratch::take(arena, shape);
      if (!scratch.empty()) scratch[detail::at(w)] = s;
    }
    if (Status bad = detail::check(arena); !bad.ok()) return bad;

    auto task = [&](Index i, Index worker) noexcept {
      const Index h = i / tiles, first = i % tiles * kTile;
      const Index rows = std::clamp<Index>(problem.candidate_count[detail::at(h)] - first, 0, kTile);
      const Index padded = std::min(kTile, problem.max_candidates - first);
      const auto out = classes.subspan(detail::at(h * problem.max_candidates + first), detail::at(padded));
      std::fill(out.begin(), out.end(), RowId{0});
      const auto mine = problem.candidates.subspan(detail::at(problem.candidate_offset[detail::at(h)]),
                                                   detail::at(problem.candidate_count[detail::at(h)]));
      const Index begin = problem.centre_offset[detail::at(h)], end = problem.centre_offset[detail::at(h + 1)];
      status[detail::at(i)] = rows == 0
                                  ? Status{}
                                  : assign_tile(view, h, mine.subspan(detail::at(first), detail::at(rows)),
                                                problem.centres.subspan(detail::at(begin), detail::at(end - begin)),
                                                scratch[detail::at(worker)], out);
    };
    executor.run(shape.kv_heads * tiles, task);
    for (const Status& s : status) {
      if (!s.ok()) return s;
    }
    return {};
  }

 private:
  static constexpr Index kTile = detail::kQueryTile;  // candidates
  static constexpr Index kCentreTile = detail::kKeyTile;
  /// Products round by their place in a tile, so what is closer than fp32 can tell is a tie.
  static constexpr float kTie = 1e-6f;

  struct Scratch {
    std::span<float> keys, values;                // [kTile][D], [kTile][E]
    std::span<float> centre_keys, centre_values;  // [kCentreTile][D], [kCentreTile][E]
    std::span<float> key_sim, value_sim;          // [kTile][kCentreTile]
    std::span<float> inverse;                     // [kCentreTile]
    std::span<float> best;                        // [kTile]

    static Scratch take(detail::Arena& arena, const LayerShape& shape) noexcept {
      Scratch s;
      s.keys = arena.take<float>(kTile, shape.key_dim);
      s.values = arena.take<float>(kTile, shape.value_dim);
      s.centre_keys = arena.take<float>(kCentreTile, shape.key_dim);
      s.centre_values = arena.take<float>(kCentreTile, shape.value_dim);
      s.key_sim = arena.take<float>(kTile, kCentreTile);
      s.value_sim = arena.take<float>(kTile, kCentreTile);
      s.inverse = arena.take<float>(kCentreTile);
      s.best = arena.take<float>(kTile);
      return s;
    }
  };

  [[nodiscard]] static constexpr Index tiles_of(Index candidates) noexcept { return (candidates + kTile - 1) / kTile; }

  template <KVCacheView V>
  Status assign_tile(const V& view, Index h, std::span<const RowId> candidates, std::span<const RowId> centres,
                     const Scratch& s, std::span<RowId> out) const noexcept {
    const LayerShape shape = view.shape();
    const auto rows = static_cast<Index>(candidates.size());
    if (Status bad = load_directions(view, h, candidates, s.keys, s.values, s.inverse); !bad.ok()) return bad;
    std::fill_n(s.best.begin(), rows, options_.tau);
    for (Index first = 0; first < static_cast<Index>(centres.size()); first += kCentreTile) {
      const Index count = std::min(kCentreTile, static_cast<Index>(centres.size()) - first);
      const auto tile = centres.subspan(detail::at(first), detail::at(count));
      if (Status bad = load_directions(view, h, tile, s.centre_keys, s.centre_values, s.inverse); !bad.ok()) return bad;
      detail::multiply_transposed(s.keys.data(), shape.key_dim, rows, s.centre_keys.data(), shape.key_dim, count,
                                  shape.key_dim, s.key_sim.data(), kCentreTile);
      detail::multiply_transposed(s.values.data(), shape.value_dim, rows, s.centre_values.data(), shape.value_dim,
                                  count, shape.value_dim, s.value_sim.data(), kCentreTile);
      for (Index j = 0; j < rows; ++j) {
        float* sim = s.key_sim.data() + j * kCentreTile;
        detail::multiply_clamped(sim, s.value_sim.data() + j * kCentreTile, count);
        const float most = detail::max_of(sim, count);
        const float best = s.best[detail::at(j)];
        if (most <= best + (out[detail::at(j)] == 0 ? 0.f : kTie)) continue;
        const float least = std::max(most - kTie, best);
        s.best[detail::at(j)] = most;
        const Index winner = std::find_if(sim, sim + count, [&](float x) { return x >= most || x > least; }) - sim;
        out[detail::at(j)] = static_cast<RowId>(first + winner + 1);
      }
    }
    return {};
  }

  /// Rows scaled to unit length; zero rows stay zero.
  template <KVCacheView V>
  Status load_directions(const V& view, Index h, std::span<const RowId> ids, std::span<float> keys,
                         std::span<float> values, std::span<float> inverse) const noexcept {
    const LayerShape shape = view.shape();
    detail::gather_keys(view, h, ids, keys);
    detail::gather_values(view, h, ids, values);
    if (Index bad = normalise(keys, static_cast<Index>(ids.size()), shape.key_dim, inverse); bad >= 0) {
      return {StatusCode::not_finite, "keys", "has a NaN or an infinity", h, ids[detail::at(bad)]};
    }
    if (Index bad = normalise(values, static_cast<Index>(ids.size()), shape.value_dim, inverse); bad >= 0) {
      return {StatusCode::not_finite, "values", "has a NaN or an infinity", h, ids[detail::at(bad)]};
    }
    if (options_.key_space == KeySpace::unrotated) {
      const Rope rope = rope_of(view);
      for (std::size_t i = 0; i < ids.size(); ++i) {
        detail::rotate(keys.data() + static_cast<Index>(i) * shape.key_dim, shape.key_dim, rope,
                       -static_cast<double>(view.position(h, ids[i])));
      }
    }
    return {};
  }

  /// \returns the first row that is not finite, or -1.
  static Index normalise(std::span<float> rows, Index n, Index width, std::span<float> inverse) noexcept {
    detail::inverse_norms(rows.data(), n, width, inverse.data());
    for (Index i = 0; i < n; ++i) {
      if (std::isnan(inverse[detail::at(i)])) return i;
      detail::scale(rows.data() + i * width, width, inverse[detail::at(i)]);
    }
    return -1;
  }

  Options options_;
};

}  // namespace kvfold
