/// \file
/// EMS taken apart: every stage can be run and timed alone, on what the stages before it have made.
#pragma once

#include <kvfold/attend.hpp>
#include <kvfold/compressor.hpp>
#include <kvfold/exec/thread_pool.hpp>

#include <cstdlib>
#include <iostream>
#include <memory>
#include <utility>
#include <vector>

#include "layer.hpp"
#include "measure.hpp"
#include "models.hpp"

namespace kvfold::bench {

/// Ends the program: a benchmark that is set up wrongly has nothing to measure.
inline void require(const Status& status, const char* what) {
  if (status.ok()) return;
  std::cerr << what << ": " << status.argument() << ' ' << status.detail() << '\n';
  std::abort();
}
inline void require(bool holds, const char* what) {
  if (holds) return;
  std::cerr << what << '\n';
  std::abort();
}

/// An assigner that knows the classes already, so that merging can be timed without them.
class GivenClasses {
 public:
  struct Options {
    std::span<const RowId> classes = {};
    [[nodiscard]] static Status validate() noexcept { return {}; }
  };
  GivenClasses() noexcept = default;
  explicit GivenClasses(Options options) noexcept : options_(options) {}
  [[nodiscard]] static Status validate() noexcept { return {}; }
  [[nodiscard]] static std::size_t workspace_bytes(const LayerShape&, Index, Index) noexcept { return 0; }
  template <KVCacheView V, Executor X>
  Status assign(const V&, const ClassProblem&, std::span<RowId> classes, Workspace, X&) const noexcept {
    std::copy_n(options_.classes.begin(), classes.size(), classes.begin());
    return {};
  }

 private:
  Options options_;
};

/// Runs tasks one after the other, as several workers, and tells what the workers would save if each took the next task
/// as soon as it had done one: how evenly work is split can be measured where threads disturb each other.
class PretendedWorkers {
 public:
  explicit PretendedWorkers(Index workers) : busy_(at(workers)) {}

  [[nodiscard]] Index concurrency() const noexcept { return static_cast<Index>(busy_.size()); }
  void run(Index n, TaskRef task) noexcept {
    std::fill(busy_.begin(), busy_.end(), 0.0);
    double sum = 0.0;
    for (Index i = 0; i < n; ++i) {
      const auto next = std::min_element(busy_.begin(), busy_.end());
      const Stopwatch watch;
      task(i, next - busy_.begin());
      const double spent = watch.seconds();
      *next += spent;
      sum += spent;
    }
    saved_ += sum - *std::max_element(busy_.begin(), busy_.end());
  }
  /// Seconds that were saved since this was asked.
  [[nodiscard]] double take_saved() { return std::exchange(saved_, 0.0); }

 private:
  std::vector<double> busy_;
  double saved_ = 0.0;
};

template <Stored E>
class Pipeline {
 public:
  using View = StridedView<E>;

  /// \param queries the last `queries` of the sequence are the evidence
  Pipeline(const Model& model, Index rows, Index threads, Index queries = kWindow,
           GlobalLocalScorer::Options score = {.window = kWindow})
      : pool(threads),
        layer(model.shape, rows),
        evidence(model.shape, queries, rows),
        ems({.score = score, .budget = {.rows = model.budget}}),
        budgets(at(model.shape.kv_heads)),
        offset_(at(model.shape.kv_heads + 1)),
        scores_(at(model.shape.kv_heads * rows)),
        protection_(scores_.size()) {
    for (std::size_t h = 0; h < offset_.size(); ++h) offset_[h] = static_cast<Index>(h) * rows;
  }

  /// Runs all stages once, so that each can be run again.
  void run_all() {
    require(score(), "score");
    require(allocate(), "budget");
    require(rank(), "tiers");
    make_problem();
    require(assign(), "classes");
    require(merge(), "merge");
    layer.save(*std::max_element(budgets.begin(), budgets.end()));
  }

  [[nodiscard]] ScoreTable table() { return {offset_, scores_, protection_}; }

  // Each stage asks for its workspace every time, as callers may; only the first time allocates.
  Status score() {
    return in(score_space_, ems.scorer().workspace_bytes(layer.view(), evidence.view(), pool.concurrency()),
              [&](Workspace w) { return ems.scorer().score(layer.view(), evidence.view(), table(), w, pool); });
  }
  Status allocate() {
    const ScoreTable scores = table();
    return in(budget_space_, ems.budget().workspace_bytes(static_cast<Index>(scores_.size())), [&](Workspace w) {
      return ems.budget().allocate({&scores, 1}, budgets, w, pool);
    });
  }
  Status rank() {
    const auto make = [&](detail::Arena& arena) {
      return detail::make_tiers(layer.view(), table(), budgets, rule(), arena, pool);
    };
    const Index total = static_cast<Index>(scores_.size());
    detail::Arena measuring;
    Index kept = 0;
    for (const Index b : budgets) kept += b;
    static_cast<void>(detail::take_tiers(measuring, layer.shape().kv_heads, total, kept,
                                         detail::candidate_limit(rule().gamma, kept, total)));
    return in(tier_space_, measuring.required_bytes(), [&](Workspace w) {
      detail::Arena arena(w);
      const auto made = make(arena);
      if (made.ok()) tiers = made.value();
      return made.status();
    });
  }
  Status assign() {
    classes.resize(at(layer.shape().kv_heads * problem.max_candidates));
    const ZeroClassBatcher batcher(ems.reducer().options().assigner);
    return in(class_space_, batcher.workspace_bytes(layer.shape(), problem.max_candidates, pool.concurrency()),
              [&](Workspace w) { return batcher.assign(layer.view(), problem, classes, w, pool); });
  }
  /// Tiers, and the merged rows of the classes.
  Status merge() {
    const EvictThenMerge<GivenClasses> reducer({.gamma = rule().gamma, .assigner = {classes}});
    const Index total = static_cast<Index>(scores_.size());
    return in(merge_space_, reducer.workspace_bytes(layer.view(), {total, layer.rows()}, pool.concurrency()),
              [&](Workspace w) {
                const auto made = reducer.reduce(layer.view(), table(), budgets, w, pool);
                if (made.ok()) plan = made.value();
                return made.status();
              });
  }
  Status apply() {
    auto view = layer.view();
    return kvfold::apply(plan, view).status();
  }
  /// All of it, as a caller would.
  Status compress() { return compress(pool); }
  template <Executor X>
  Status compress(X& executor) {
    auto view = layer.view();
    const auto bytes = ems.workspace_bytes(std::as_const(view), evidence.view(), executor.concurrency());
    if (!bytes.ok()) return bytes.status();
    return in(whole_space_, bytes.value(),
              [&](Workspace w) { return ems.compress(view, evidence.view(), w, executor).status(); });
  }

  // What the stages cannot avoid.
  [[nodiscard]] std::vector<Work> score_work() const {
    const LayerShape& s = layer.shape();
    double visible = 0.0;
    for (const Position p : evidence.positions) visible += static_cast<double>(p + 1);
    const double weights = visible * static_cast<double>(s.query_heads());
    return {{.read_bytes = static_cast<double>(s.kv_heads * layer.rows() * detail::row_bytes<E>(s.key_dim)),
             .flops = 2.0 * weights * static_cast<double>(s.key_dim),
             .exps = weights,
             .product = {s.group_size * std::min(kWindow, static_cast<Index>(evidence.positions.size())), layer.rows(),
                         s.key_dim}}};
  }
  [[nodiscard]] std::vector<Work> budget_work() const {
    return {{.read_bytes = static_cast<double>(scores_.size() * (sizeof(float) + sizeof(Protection)))}};
  }
  [[nodiscard]] std::vector<Work> tier_work() const {
    return {{.read_bytes = static_cast<double>(
                 scores_.size() * (sizeof(float) + sizeof(Protection) + sizeof(RowFate) + sizeof(RowId)))}};
  }
  [[nodiscard]] std::vector<Work> class_work() const {
    const LayerShape& s = layer.shape();
    double pairs = 0.0, rows = 0.0;
    for (Index h = 0; h < s.kv_heads; ++h) {
      const auto candidates = static_cast<double>(problem.candidate_count[at(h)]);
      const auto centres = static_cast<double>(problem.centre_offset[at(h + 1)] - problem.centre_offset[at(h)]);
      pairs += candidates * centres;
      rows += candidates + centres;
    }
    return {{.read_bytes = rows * layer.row_bytes(),
             .flops = 2.0 * pairs * static_cast<double>(s.key_dim + s.value_dim),
             .product = {problem.max_candidates, problem.max_candidates, s.key_dim}}};
  }
  [[nodiscard]] std::vector<Work> merge_work() const {
    const Index width = layer.shape().value_dim;
    double members = static_cast<double>(plan.merged.size());
    for (const MergedRow& row : plan.merged) members += static_cast<double>(row.absorbed);
    return {{.read_bytes = members * static_cast<double>(detail::row_bytes<E>(width)) +
                           static_cast<double>(plan.merged.size()) * static_cast<double>(width) * sizeof(float)}};
  }
  [[nodiscard]] std::vector<Work> apply_work() const {
    return {{.copied_bytes = static_cast<double>(plan.kept.size()) * layer.row_bytes()}};
  }
  [[nodiscard]] std::vector<Work> whole_work() const {
    std::vector<Work> all;
    for (const auto& part : {score_work(), budget_work(), tier_work(), class_work(), merge_work(), apply_work()}) {
      all.insert(all.end(), part.begin(), part.end());
    }
    return all;
  }

  [[nodiscard]] std::size_t score_bytes() const { return score_space_.size_bytes(); }
  [[nodiscard]] std::size_t budget_bytes() const { return budget_space_.size_bytes(); }
  [[nodiscard]] std::size_t tier_bytes() const { return tier_space_.size_bytes(); }
  [[nodiscard]] std::size_t class_bytes() const { return class_space_.size_bytes(); }
  [[nodiscard]] std::size_t merge_bytes() const { return merge_space_.size_bytes(); }
  [[nodiscard]] std::size_t whole_bytes() const { return whole_space_.size_bytes(); }
  [[nodiscard]] double all_rows() const { return static_cast<double>(scores_.size()); }

  ThreadPool pool;
  Layer<E> layer;
  Queries evidence;
  Ems ems;
  std::vector<Index> budgets;
  detail::Tiers tiers;
  ClassProblem problem;
  std::vector<RowId> classes;
  CompressionPlan plan;

 private:
  template <class F>
  static Status in(WorkspaceBuffer& space, std::size_t bytes, F f) {
    if (Status bad = space.reserve(bytes); !bad.ok()) return bad;
    return f(space.get());
  }
  [[nodiscard]] detail::CandidateRule rule() const { return {.gamma = ems.reducer().options().gamma}; }

  /// The centres that EMS would take: kept rows that are no sinks.
  void make_problem() {
    centres_.clear();
    centre_offset_.assign(1, 0);
    for (Index h = 0; h < layer.shape().kv_heads; ++h) {
      const auto marks = table().protections(h);
      for (const RowId row : tiers.kept_of(h)) {
        if (marks[at(row)] != Protection::sink) centres_.push_back(row);
      }
      centre_offset_.push_back(static_cast<Index>(centres_.size()));
    }
    problem = {.centre_offset = centre_offset_,
               .centres = centres_,
               .candidate_offset = tiers.candidate_offset,
               .candidate_count = tiers.candidate_count,
               .candidates = tiers.candidates,
               .max_candidates = *std::max_element(tiers.candidate_count.begin(), tiers.candidate_count.end())};
  }

  std::vector<Index> offset_;
  std::vector<float> scores_;
  std::vector<Protection> protection_;
  std::vector<RowId> centres_;
  std::vector<Index> centre_offset_;
  WorkspaceBuffer score_space_, budget_space_, tier_space_, class_space_, merge_space_, whole_space_;
};

/// Whether a quick run leaves this out: it takes the smallest model and length.
[[nodiscard]] inline bool is_left_out(const Settings& settings, const Model& model, Index rows) {
  return settings.quick && (rows > kContexts[0] || model.name != kSmolLm.name);
}

/// Registers a stage that is run alone, on one thread, for each model and length. \param stage_of Stage(Pipeline&)
template <class F>
void add_stage(const Settings& settings, const char* name, F stage_of) {
  for (const Model& model : kModels) {
    for (const Index rows : kContexts) {
      if (is_left_out(settings, model, rows)) continue;
      add(name_of(name, model.name, "f16", rows, 1), [=](benchmark::State& state) {
        Pipeline<Float16> p(model, rows, 1);
        p.run_all();
        measure(state, settings, stage_of(p), p.pool);
      });
    }
  }
}

/// The log-sum-exps of all queries, as an engine's attention would leave them.
template <Stored E>
void fill_log_sum_exps(Pipeline<E>& p) {
  const LayerShape& shape = p.layer.shape();
  const auto count = static_cast<Index>(p.evidence.positions.size());
  p.evidence.log_sum_exp.clear();
  std::vector<float> sums(at(shape.query_heads() * count)), out(sums.size() * at(shape.value_dim));
  WorkspaceBuffer buffer;
  require(buffer.reserve(attend_workspace_bytes(shape, p.pool.concurrency())), "workspace");
  require(attend(p.layer.view(), p.evidence.view(), {out.data(), count * shape.value_dim, shape.value_dim, sums},
                 buffer.get(), p.pool),
          "attend");
  p.evidence.log_sum_exp = sums;
}

}  // namespace kvfold::bench
