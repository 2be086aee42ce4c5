/// \file
/// Budgets that follow the heads' needs (AdaKV, arXiv 2407.11550).
#pragma once

#include <cmath>

#include "kvfold/budget/budget_policy.hpp"
#include "kvfold/detail/row_ranks.hpp"
#include "kvfold/exec/executor.hpp"

namespace kvfold {

/// Each head keeps a floor of its best rows; the rest of H * B goes to the best normalised scores over all heads.
///
/// Scores are normalised to the sum over the head's unprotected rows: sinks, which every head keeps, would otherwise make
/// heads that lean on them look less needy than they are. Given the tables of several layers, rows move between layers too. The budgets
/// sum to min(H * B, sum of T_h) exactly. Cost O(sum of T_h).
class AdaptiveHeadBudget {
 public:
  struct Options {
    Index rows = 256;  ///< B, mean rows per head, at least 1
    /// phi: each head keeps at least phi * B rows (and its protected ones, up to B), in [0, 1]
    float floor_share = 0.75f;

    [[nodiscard]] Status validate() const noexcept {
      if (rows < 1 || rows > kMaxRows) return {StatusCode::invalid_argument, "budget", "rows must be in [1, kMaxRows]"};
      if (!(floor_share >= 0.f && floor_share <= 1.f)) {
        return {StatusCode::invalid_argument, "floor_share", "must be in [0, 1]"};
      }
      return {};
    }
  };

  AdaptiveHeadBudget() noexcept = default;
  explicit AdaptiveHeadBudget(Options options) noexcept : options_(options) {}

  [[nodiscard]] const Options& options() const noexcept { return options_; }
  [[nodiscard]] Status validate() const noexcept { return options_.validate(); }
  [[nodiscard]] RowLimits limits(Index heads) const noexcept { return {options_.rows * heads, options_.rows * heads}; }
  [[nodiscard]] static std::size_t workspace_bytes(Index rows) noexcept {
    detail::Arena arena;
    static_cast<void>(arena.take<detail::Rank>(rows));
    static_cast<void>(arena.take<Claim>(rows));
    return arena.required_bytes();
  }

  Status allocate(std::span<const ScoreTable> tables, std::span<Index> budgets, Workspace workspace) const noexcept {
    SerialExecutor serial;
    return allocate(tables, budgets, workspace, serial);
  }
  /// The same, one task for each head.
  template <Executor X>
  Status allocate(std::span<const ScoreTable> tables, std::span<Index> budgets, Workspace workspace,
                  X& executor) const noexcept {
    if (Status bad = validate(); !bad.ok()) return bad;
    if (Status bad = detail::check_budget_call(tables, budgets); !bad.ok()) return bad;
    if (Status bad = detail::check_scores(tables); !bad.ok()) return bad;
    Index rows = 0;
    for (const ScoreTable& table : tables) rows += static_cast<Index>(table.score.size());
    detail::Arena arena(workspace);
    const std::span<detail::Rank> ranks = arena.take<detail::Rank>(rows);
    const std::span<Claim> claims = arena.take<Claim>(rows);
    if (Status bad = detail::check(arena); !bad.ok()) return bad;

    Index left = std::min(options_.rows * static_cast<Index>(budgets.size()), rows);
    Index head = 0;
    for (const ScoreTable& table : tables) {
      for (Index h = 0; h < table.heads(); ++h, ++head) left -= budgets[detail::at(head)] = floor_of(table, h);
    }
    auto task = [&](Index i, Index) noexcept {
      const Place place = place_of(tables, i);
      const auto mine = detail::at(place.first_row), size = detail::at(place.table->rows(place.head));
      make_claims(place, i, budgets[detail::at(i)], left, ranks.subspan(mine, size), claims.subspan(mine, size));
    };
    executor.run(static_cast<Index>(budgets.size()), task);
    Index claim_count = 0;  // together at the front, in the order of heads
    for (Index i = 0; i < static_cast<Index>(budgets.size()); ++i) {
      const Place place = place_of(tables, i);
      const Index count = claims_of(*place.table, place.head, budgets[detail::at(i)], left);
      std::copy_n(claims.begin() + place.first_row, count, claims.begin() + claim_count);
      claim_count += count;
    }
    const std::span<Claim> made = claims.first(detail::at(claim_count));
    if (left > 0 && left < claim_count) {
      std::nth_element(made.begin(), made.begin() + (left - 1), made.end(), [](const Claim& a, const Claim& b) {
        if (a.share != b.share) return a.share > b.share;
        return a.head != b.head ? a.head < b.head : a.row < b.row;
      });
    }
    for (Index i = 0; i < std::min(left, claim_count); ++i) ++budgets[detail::at(made[detail::at(i)].head)];
    return {};
  }

 private:
  /// A row beyond its head's floor that competes with those of all heads.
  struct Claim {
    float share;  // score over that of the head's unprotected rows
    RowId head;   // counted over all tables
    RowId row;
  };

  [[nodiscard]] static Index protected_rows(std::span<const Protection> marks) noexcept {
    std::uint32_t count = 0;  // as wide as is needed: compilers count more of them at a time
    for (const Protection p : marks) count += p != Protection::none ? 1 : 0;
    return static_cast<Index>(count);
  }

  [[nodiscard]] Index floor_of(const ScoreTable& table, Index h) const noexcept {
    const Index is_protected = protected_rows(table.protections(h));
    const auto share = static_cast<Index>(std::ceil(options_.floor_share * static_cast<float>(options_.rows)));
    const Index floor = std::max({share, std::min(is_protected, options_.rows), Index{1}});
    return std::min({floor, options_.rows, table.rows(h)});
  }

  /// A head among those of all tables, and how many rows the heads before it have.
  struct Place {
    const ScoreTable* table;
    Index head, first_row;
  };

  [[nodiscard]] static Place place_of(std::span<const ScoreTable> tables, Index head) noexcept {
    Index first_row = 0;
    const ScoreTable* table = tables.data();
    for (; head >= table->heads(); ++table) {
      head -= table->heads();
      first_row += static_cast<Index>(table->score.size());
    }
    return {table, head, first_row + table->offset[detail::at(head)]};
  }

  /// How many rows of a head claim. It cannot get more than the `left` rows that are left for all: only its best so many
  /// beyond the floor claim, unless protected rows are among them, which do not come in the order of their scores.
  [[nodiscard]] static Index claims_of(const ScoreTable& table, Index h, Index floor, Index left) noexcept {
    const Index rest = table.rows(h) - floor;
    return protected_rows(table.protections(h)) > floor ? rest : std::min(left, rest);
  }

  static void make_claims(const Place& place, Index head, Index floor, Index left, std::span<detail::Rank> ranks,
                          std::span<Claim> claims) noexcept {
    const auto scores = place.table->scores(place.head);
    const auto marks = place.table->protections(place.head);
    const Index count = claims_of(*place.table, place.head, floor, left);
    const detail::RowRanks rank(scores, marks, ranks);
    const detail::Rank lowest_kept = rank.lowest_of_best(floor), lowest = rank.lowest_of_best(floor + count);
    double sum = rank.sum_of_unprotected();
    std::size_t made = 0;
    rank.for_best(lowest, [&](Index t, detail::Rank of_row) {
      if (of_row >= lowest_kept) return;
      const float score = scores[detail::at(t)];
      // Protected rows beyond the floor claim like others.
      if (marks[detail::at(t)] != Protection::none) sum += static_cast<double>(score);
      claims[made++] = {score, static_cast<RowId>(head), static_cast<RowId>(t)};
    });
    const double inverse = sum > 0.0 ? 1.0 / sum : 0.0;
    for (Claim& claim : claims.first(made)) {
      claim.share = static_cast<float>(static_cast<double>(claim.share) * inverse);
    }
  }

  Options options_;
};

static_assert(BudgetPolicy<AdaptiveHeadBudget>);

}  // namespace kvfold
