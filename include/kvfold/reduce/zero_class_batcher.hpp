/// \file
/// Classes for candidates by redundancy, with a zero class for what is like nothing kept (EMS, arXiv 2412.08521).
#pragma once

#include <algorithm>
#include <cmath>

#include "kvfold/detail/arena.hpp"
#include "kvfold/detail/few_rows.hpp"
#include "kvfold/detail/linalg.hpp"
#include "kvfold/detail/panel_products.hpp"
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
///
/// Values are compared first. A cosine of keys is at most 1, so keys are compared only where that of the values is
/// above tau, and above the best centre so far: no class is another for it.
/// Cost: 2 * R * C * E FLOPs per head, and at most 2 * R * C * D for the keys; memory O(tile) per worker.
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
    static_cast<void>(arena.take<Status>(shape.kv_heads, tiles_of(max_candidates, kPiece)));
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
    const Index tile = tile_for(shape.kv_heads, problem.max_candidates);
    const Index tiles = tiles_of(problem.max_candidates, tile);
    detail::Arena arena(workspace);
    const std::span<Status> status = arena.take<Status>(shape.kv_heads, tiles_of(problem.max_candidates, kPiece))
                                         .first(detail::at(shape.kv_heads * tiles));
    const auto workers = static_cast<Index>(executor.concurrency());
    const std::span<Scratch> scratch = arena.take<Scratch>(workers);
    for (Index w = 0; w < workers; ++w) {
      const Scratch s = Scratch::take(arena, shape);
      if (!scratch.empty()) scratch[detail::at(w)] = s;
    }
    if (Status bad = detail::check(arena); !bad.ok()) return bad;

    auto task = [&](Index i, Index worker) noexcept {
      const Index h = i / tiles, first = i % tiles * tile;
      const Index rows = std::clamp<Index>(problem.candidate_count[detail::at(h)] - first, 0, tile);
      const Index padded = std::min(tile, problem.max_candidates - first);
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
  static constexpr Index kPiece = detail::kQueryTile;  // candidates of one product
  static constexpr Index kMostPieces = 8;              // of a tile: what of the centres is loaded serves them all
  static constexpr Index kTasks = 16;                  // tiles of a layer that are better than large ones
  static constexpr Index kCentreTile = detail::kKeyTile;
  static_assert(kCentreTile % detail::kPanelWidth == 0);
  /// Products round by their place in a tile, so what is closer than fp32 can tell is a tie.
  static constexpr float kTie = 1e-6f;
  /// More than by what the rounded cosine of two unit vectors may be above 1.
  static constexpr float kMostCosine = 1.f + 1e-5f;
  /// One product of all keys of a piece and a centre tile costs as much as the pairs of this share one by one.
  static constexpr Index kPairShare = 4;

  struct Scratch {
    std::span<float> keys, values;                // [kMostPieces * kPiece][D], [kMostPieces * kPiece][E]
    std::span<float> centre_keys, centre_values;  // [kCentreTile][D], [kCentreTile][E]
    std::span<float> key_panels, value_panels;    // the same as panels
    std::span<float> key_sim, value_sim;          // [kPiece][kCentreTile]
    std::span<float> inverse;                     // [kMostPieces * kPiece]
    std::span<float> best;                        // [kMostPieces * kPiece]

    static Scratch take(detail::Arena& arena, const LayerShape& shape) noexcept {
      constexpr Index most = kMostPieces * kPiece;
      static_assert(most >= kCentreTile);
      Scratch s;
      s.keys = arena.take<float>(most, shape.key_dim);
      s.values = arena.take<float>(most, shape.value_dim);
      s.centre_keys = arena.take<float>(kCentreTile, shape.key_dim);
      s.centre_values = arena.take<float>(kCentreTile, shape.value_dim);
      s.key_panels = arena.take<float>(kCentreTile, shape.key_dim);
      s.value_panels = arena.take<float>(kCentreTile, shape.value_dim);
      s.key_sim = arena.take<float>(kPiece, kCentreTile);
      s.value_sim = arena.take<float>(kPiece, kCentreTile);
      s.inverse = arena.take<float>(most);
      s.best = arena.take<float>(most);
      return s;
    }
  };

  [[nodiscard]] static constexpr Index tiles_of(Index candidates, Index tile) noexcept {
    return (candidates + tile - 1) / tile;
  }
  /// Candidates of a tile: whole pieces, as many as leave `kTasks` tiles. Not a matter of how many workers there are.
  [[nodiscard]] static constexpr Index tile_for(Index heads, Index candidates) noexcept {
    const Index pieces = heads * tiles_of(candidates, kPiece) / kTasks;
    return kPiece * std::clamp<Index>(pieces, 1, kMostPieces);
  }

  template <KVCacheView V>
  Status assign_tile(const V& view, Index h, std::span<const RowId> candidates, std::span<const RowId> centres,
                     const Scratch& s, std::span<RowId> out) const noexcept {
    const auto rows = static_cast<Index>(candidates.size());
    const LayerShape shape = view.shape();
    if (Status bad = load_directions(view, h, candidates, s.keys, s.values, s.inverse); !bad.ok()) return bad;
    std::fill_n(s.best.begin(), rows, options_.tau);
    for (Index first = 0; first < static_cast<Index>(centres.size()); first += kCentreTile) {
      const Index count = std::min(kCentreTile, static_cast<Index>(centres.size()) - first);
      const auto tile = centres.subspan(detail::at(first), detail::at(count));
      if (Status bad = load_directions(view, h, tile, s.centre_keys, s.centre_values, s.inverse); !bad.ok()) return bad;
      detail::make_panels(s.centre_values.data(), shape.value_dim, count, shape.value_dim, s.value_panels.data());
      bool has_key_panels = false;
      for (Index row = 0; row < rows; row += kPiece) {
        compare(shape, s, row, std::min(kPiece, rows - row), first, count, has_key_panels, out);
      }
    }
    return {};
  }

  /// Candidates [row, row + rows) of the tile with the `count` centres that are loaded, of which `first` is the first.
  static void compare(const LayerShape& shape, const Scratch& s, Index row, Index rows, Index first, Index count,
                      bool& has_key_panels, std::span<RowId> out) noexcept {
    const float* keys = s.keys.data() + row * shape.key_dim;
    detail::multiply_panels(s.values.data() + row * shape.value_dim, shape.value_dim, rows, s.value_panels.data(),
                            count, shape.value_dim, s.value_sim.data(), kCentreTile);
    const auto least_of = [&](Index j) { return s.best[detail::at(row + j)] / kMostCosine; };
    Index pairs = 0, above[kPiece];
    for (Index j = 0; j < rows; ++j) {
      pairs += above[j] = detail::count_above(s.value_sim.data() + j * kCentreTile, count, least_of(j));
    }
    if (pairs == 0) return;
    const bool all = pairs * kPairShare > rows * count;
    if (all) {
      if (!has_key_panels) {
        detail::make_panels(s.centre_keys.data(), shape.key_dim, count, shape.key_dim, s.key_panels.data());
        has_key_panels = true;
      }
      detail::multiply_panels(keys, shape.key_dim, rows, s.key_panels.data(), count, shape.key_dim, s.key_sim.data(),
                              kCentreTile);
    }
    for (Index j = 0; j < rows; ++j) {
      float* sim = s.key_sim.data() + j * kCentreTile;
      const float* value_sim = s.value_sim.data() + j * kCentreTile;
      float& best = s.best[detail::at(row + j)];
      RowId& winner = out[detail::at(row + j)];
      if (all) {
        detail::multiply_clamped(sim, value_sim, count);
        if (const Index c = choose(sim, count, best, winner); c >= 0) winner = static_cast<RowId>(first + c + 1);
      } else if (above[j] > 0) {
        RowId places[kCentreTile + detail::kPlacesBeyond];
        detail::places_above(value_sim, count, least_of(j), places);
        detail::dots_at(keys + j * shape.key_dim, s.centre_keys.data(), shape.key_dim, places, above[j], sim);
        for (Index i = 0; i < above[j]; ++i) sim[i] = std::max(sim[i], 0.f) * std::max(value_sim[places[i]], 0.f);
        if (const Index i = choose(sim, above[j], best, winner); i >= 0) {
          winner = static_cast<RowId>(first + places[i] + 1);
        }
      }
    }
  }

  /// The first of `count` similarities that is the largest, ties included, if it beats the best so far, which it then
  /// is; else -1.
  static Index choose(const float* sim, Index count, float& best, RowId winner) noexcept {
    const float most = detail::max_of(sim, count);
    if (most <= best + (winner == 0 ? 0.f : kTie)) return -1;
    const float least = std::max(most - kTie, best);
    best = most;
    return std::find_if(sim, sim + count, [&](float x) { return x >= most || x > least; }) - sim;
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
