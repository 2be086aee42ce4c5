#include "evaluation/methods.hpp"

#include <kvfold/throwing.hpp>

#include <chrono>
#include <cmath>
#include <stdexcept>

namespace evaluation {
namespace {

using Clock = std::chrono::steady_clock;
using kvfold::Index;

double ms_since(Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

/// A scorer that adds the time another one takes to a counter: how a policy is wrapped in a policy.
template <class Scorer>
class Timed {
 public:
  using Options = typename Scorer::Options;
  Timed(Scorer scorer, double& ms) : scorer_(std::move(scorer)), ms_(&ms) {}
  [[nodiscard]] kvfold::Status validate() const noexcept { return scorer_.validate(); }
  template <class V, class E>
  [[nodiscard]] std::size_t workspace_bytes(const V& view, const E& evidence, Index workers) const noexcept {
    return scorer_.workspace_bytes(view, evidence, workers);
  }
  template <class V, class E, class X>
  kvfold::Status score(const V& view, const E& evidence, kvfold::ScoreTable table, kvfold::Workspace workspace,
                       X& executor) const noexcept {
    const auto start = Clock::now();
    const kvfold::Status status = scorer_.score(view, evidence, table, workspace, executor);
    *ms_ += ms_since(start);
    return status;
  }

 private:
  Scorer scorer_;
  double* ms_;
};

enum class Source { sums, last_queries };

template <class T>
T parse_number(const std::string& name, const std::string& text) {
  std::size_t used = 0;
  double value = 0.0;
  try {
    value = std::stod(text, &used);
  } catch (const std::exception&) {
    used = 0;
  }
  if (used == 0 || used != text.size() || value != static_cast<double>(static_cast<T>(value))) {
    throw std::runtime_error(name + ": '" + text + "' is not a number that it takes");
  }
  return static_cast<T>(value);
}
template <>
float parse_number<float>(const std::string& name, const std::string& text) {
  return static_cast<float>(parse_number<double>(name, text));
}

/// A field that holds a number.
template <class Access>
OptionField number(const std::string& name, const std::string& help, Access access) {
  return {name, help,
          [=](Options& o, const std::string& text) {
            auto& field = access(o);
            field = parse_number<std::remove_reference_t<decltype(field)>>(name, text);
          },
          [=](const Options& o) { return nlohmann::json(access(o)); }};
}

/// A field that is one of a few words.
template <class Enum, class Access>
OptionField choice(const std::string& name, const std::string& help,
                   const std::vector<std::pair<std::string, Enum>>& words, Access access) {
  std::string known;
  for (const auto& [word, value] : words) known += (known.empty() ? "" : ", ") + word;
  return {name, help + ": " + known,
          [=](Options& o, const std::string& text) {
            for (const auto& [word, value] : words) {
              if (word == text) {
                access(o) = value;
                return;
              }
            }
            throw std::runtime_error(name + ": '" + text + "' is none of " + known);
          },
          [=](const Options& o) -> nlohmann::json {
            for (const auto& [word, value] : words) {
              if (access(o) == value) return word;
            }
            return nullptr;
          }};
}

/// What a plan does with each row of a layer, head by head, as letters.
std::vector<std::string> fates_of(const kvfold::CompressionPlan& plan) {
  std::vector<std::string> heads;
  for (Index h = 0; h < plan.shape.kv_heads; ++h) {
    std::string& letters = heads.emplace_back();
    for (const kvfold::RowFate fate : plan.fates(h)) letters += "ekm"[static_cast<std::size_t>(fate)];
  }
  return heads;
}

/// Runs a compressor over all layers.
template <class Scorer, class Budget, class Reducer>
Outcome compress_all(decoder::Sequence& sequence, Evidence& evidence, const Options& options, Source source,
                     Scorer scorer, Budget budget, Reducer reducer, kvfold::ThreadPool& pool) {
  Outcome outcome;
  const kvfold::Compressor compressor(Timed<Scorer>(std::move(scorer), outcome.score_ms), std::move(budget),
                                      std::move(reducer));
  kvfold::WorkspaceBuffer workspace;
  const auto compress = [&](decoder::Cache& cache, const auto& seen) {
    kvfold::or_throw(workspace.reserve(kvfold::or_throw(compressor.workspace_bytes(cache, seen, pool.concurrency()))));
    auto start = Clock::now();
    const auto plan = kvfold::or_throw(compressor.plan(std::as_const(cache), seen, workspace.get(), pool));
    outcome.compress_ms += ms_since(start);
    outcome.fates.push_back(fates_of(plan));
    start = Clock::now();
    const auto report = kvfold::or_throw(kvfold::apply(plan, cache));
    outcome.compress_ms += ms_since(start);
    outcome.report.rows_before += report.rows_before;
    outcome.report.rows_kept += report.rows_kept;
    outcome.report.rows_merged += report.rows_merged;
    outcome.report.rows_evicted += report.rows_evicted;
    outcome.report.rows_rewritten += report.rows_rewritten;
    outcome.report.bytes_before += report.bytes_before;
    outcome.report.bytes_after += report.bytes_after;
    outcome.report.kept_score_share += report.kept_score_share;
    outcome.report.merged_score_share += report.merged_score_share;
  };
  outcome.report.kept_score_share = 0.f;
  double evidence_ms = 0.0;
  for (std::size_t i = 0; i < sequence.layers.size(); ++i) {
    decoder::Cache& cache = sequence.layers[i];
    if (source == Source::last_queries) {
      compress(cache, evidence.last_queries(i));
    } else {
      const auto start = Clock::now();
      const kvfold::ColumnSums sums = evidence.sums(options, i, cache);
      evidence_ms += ms_since(start);
      compress(cache, sums);
    }
  }
  outcome.compress_ms -= outcome.score_ms;
  if (source == Source::sums) outcome.score_ms += evidence_ms + evidence.observe_ms(options);
  const auto layers = static_cast<float>(sequence.layers.size());
  outcome.report.kept_score_share /= layers;
  outcome.report.merged_score_share /= layers;
  return outcome;
}

using Compress = std::function<Outcome(decoder::Sequence&, Evidence&, Index)>;
using Factory = std::function<Compress(const Options&, kvfold::ThreadPool&)>;

/// A method from functions that make its policies for a budget.
template <class MakeScorer, class MakeBudget, class MakeReducer>
Factory factory(Source source, MakeScorer scorer, MakeBudget budget, MakeReducer reducer) {
  return [=](const Options& o, kvfold::ThreadPool& pool) -> Compress {
    kvfold::or_throw(scorer(o, 64).validate());
    kvfold::or_throw(budget(o, 64).validate());
    kvfold::or_throw(reducer(o).validate());
    return [=, &pool](decoder::Sequence& sequence, Evidence& evidence, Index rows) {
      return compress_all(sequence, evidence, o, source, scorer(o, rows), budget(o, rows), reducer(o), pool);
    };
  };
}

const std::map<std::string, Factory>& factories() {
  const auto uniform = [](const Options&, Index rows) { return kvfold::UniformBudget({.rows = rows}); };
  const auto adaptive = [](const Options& o, Index rows) {
    auto options = o.budget;
    options.rows = rows;
    return kvfold::AdaptiveHeadBudget(options);
  };
  const auto evict = [](const Options&) { return kvfold::EvictOnly(); };
  const auto merge = [](const Options& o) { return kvfold::EvictThenMerge<>(o.merge); };
  const auto global_local = [](const Options& o, Index) { return kvfold::GlobalLocalScorer(o.score); };
  const auto streaming = [](const Options& o, Index) { return kvfold::StreamingLlmScorer(o.streaming_llm); };
  const auto h2o = [](const Options&, Index rows) {
    return kvfold::H2oScorer(kvfold::H2oScorer::Options::for_budget(rows));
  };
  const auto snapkv = [](const Options& o, Index rows) { return kvfold::SnapKvScorer(o.snapkv.for_budget(rows)); };
  const auto tova = [](const Options&, Index) { return kvfold::TovaScorer(); };
  static const std::map<std::string, Factory> kAll = {
      {"full",
       [](const Options&, kvfold::ThreadPool&) -> Compress {
         return [](decoder::Sequence& sequence, Evidence&, Index) {
           Outcome outcome;
           outcome.report.rows_before = outcome.report.rows_kept = sequence.rows();
           for (const decoder::Cache& cache : sequence.layers) {
             for (Index h = 0; h < cache.shape().kv_heads; ++h) {
               outcome.report.bytes_before += cache.size(h) * cache.row_bytes(h);
             }
           }
           outcome.report.bytes_after = outcome.report.bytes_before;
           return outcome;
         };
       }},
      {"streaming-llm", factory(Source::last_queries, streaming, uniform, evict)},
      {"h2o", factory(Source::sums, h2o, uniform, evict)},
      {"snapkv", factory(Source::last_queries, snapkv, uniform, evict)},
      {"tova", factory(Source::last_queries, tova, uniform, evict)},
      {"ems-evict", factory(Source::sums, global_local, adaptive, evict)},
      {"ems-evict-uniform", factory(Source::sums, global_local, uniform, evict)},
      {"ems-window", factory(Source::last_queries, global_local, adaptive, merge)},
      {"ems-uniform", factory(Source::sums, global_local, uniform, merge)},
      {"ems", factory(Source::sums, global_local, adaptive, merge)},
  };
  return kAll;
}

}  // namespace

const std::vector<OptionField>& option_fields() {
  using Scorer = kvfold::GlobalLocalScorer;
  using kvfold::GroupReduction, kvfold::KeyMode, kvfold::MassMode;
  static const std::vector<OptionField> kFields = {
      number(
          "window", "W, queries of the local term", [](auto& o) -> auto& { return o.score.window; }),
      number(
          "sinks", "first rows that stay", [](auto& o) -> auto& { return o.score.protect.sinks; }),
      number(
          "recent", "last rows that stay", [](auto& o) -> auto& { return o.score.protect.recent; }),
      choice<GroupReduction>(
          "group", "over the query heads of a group", {{"max", GroupReduction::max}, {"mean", GroupReduction::mean}},
          [](auto& o) -> auto& { return o.score.group; }),
      choice<Scorer::Combine>(
          "combine", "of the aligned terms", {{"max", Scorer::Combine::max}, {"sum", Scorer::Combine::sum}},
          [](auto& o) -> auto& { return o.score.combine; }),
      choice<Scorer::Normalise>(
          "normalise", "of the global term",
          {{"none", Scorer::Normalise::none}, {"lifetime", Scorer::Normalise::lifetime}},
          [](auto& o) -> auto& { return o.score.normalise; }),
      number(
          "query-stride", "s, every s-th query in the global term",
          [](auto& o) -> auto& { return o.score.query_stride; }),
      number(
          "global-weight", "omega of the global term", [](auto& o) -> auto& { return o.score.global_weight; }),
      number(
          "span-weight", "beta of the span term, 0 for none", [](auto& o) -> auto& { return o.score.span_weight; }),
      number(
          "span-width", "w, rows after an attended one in the span term", [](auto& o) -> auto& { return o.score.span_width; }),
      number(
          "floor-share", "share of the budget that every head keeps",
          [](auto& o) -> auto& { return o.budget.floor_share; }),
      number(
          "gamma", "candidates to merge per kept row", [](auto& o) -> auto& { return o.merge.gamma; }),
      number(
          "candidate-mass-share", "candidates end at this share of the score",
          [](auto& o) -> auto& { return o.merge.candidate_mass_share; }),
      number(
          "tau", "similarity of the zero class", [](auto& o) -> auto& { return o.merge.assigner.tau; }),
      choice<KeyMode>(
          "key-mode", "key of a merged row",
          {{"centre", KeyMode::centre}, {"direction", KeyMode::direction}, {"rotated", KeyMode::rotated}},
          [](auto& o) -> auto& { return o.merge.key_mode; }),
      choice<MassMode>(
          "mass-mode", "log mass of a merged row",
          {{"log-count", MassMode::log_count}, {"score-ratio", MassMode::score_ratio}, {"none", MassMode::none}},
          [](auto& o) -> auto& { return o.merge.mass_mode; }),
      number(
          "snapkv-window", "queries of SnapKV", [](auto& o) -> auto& { return o.snapkv.window; }),
      number(
          "snapkv-pool", "pooling of SnapKV, rows", [](auto& o) -> auto& { return o.snapkv.pool.width; }),
      number(
          "streaming-llm-sinks", "sinks of StreamingLLM", [](auto& o) -> auto& { return o.streaming_llm.sinks; }),
  };
  return kFields;
}

void Options::set(const std::string& name, const std::string& value) {
  for (const OptionField& field : option_fields()) {
    if (field.name == name) return field.set(*this, value);
  }
  throw std::runtime_error("unknown option " + name);
}

nlohmann::json Options::to_json() const {
  nlohmann::json json;
  for (const OptionField& field : option_fields()) json[field.name] = field.get(*this);
  return json;
}

Evidence::Evidence(const decoder::Decoder& model, Index rows, const std::vector<Options>& wanted,
                   kvfold::ThreadPool& pool)
    : pool_(pool), shape_(model.config().layer_shape()), tails_(static_cast<std::size_t>(model.config().layers)) {
  for (const Options& options : wanted) {
    window_ = std::max({window_, options.score.window, options.snapkv.window});
    Stream& stream = streams_[{options.score.window, options.score.query_stride}];
    if (!stream.layers.empty()) continue;
    // Query heads are kept apart, so that methods may join them as they like.
    const kvfold::GlobalLocalAccumulator::Options keep{.window = options.score.window,
                                                       .query_stride = options.score.query_stride,
                                                       .group = kvfold::GroupReduction::max};
    for (std::size_t i = 0; i < tails_.size(); ++i) {
      stream.layers.push_back(kvfold::or_throw(kvfold::GlobalLocalAccumulator::create(shape_, rows, keep)));
    }
    kvfold::or_throw(workspace_.reserve(stream.layers.front().workspace_bytes(rows, pool.concurrency())));
  }
}

decoder::Observer Evidence::observer(const decoder::Sequence& sequence) {
  return [this, &sequence](std::size_t layer, const kvfold::QueryRows& queries) {
    for (auto& [key, stream] : streams_) {
      const auto start = Clock::now();
      kvfold::or_throw(stream.layers[layer].observe(sequence.layers[layer], queries, workspace_.get(), pool_));
      stream.ms += ms_since(start);
    }
    remember(layer, queries);
  };
}

void Evidence::remember(std::size_t layer, const kvfold::QueryRows& queries) {
  Tail& tail = tails_[layer];
  const Index width = shape_.query_heads() * shape_.key_dim;
  const Index fresh = std::min(window_, queries.rows());
  const Index old = std::min(window_ - fresh, static_cast<Index>(tail.positions.size()));
  tail.positions.erase(tail.positions.begin(), tail.positions.end() - old);
  tail.queries.erase(tail.queries.begin(), tail.queries.end() - old * width);
  for (Index i = queries.rows() - fresh; i < queries.rows(); ++i) {
    tail.positions.push_back(queries.positions[static_cast<std::size_t>(i)]);
    for (Index q = 0; q < shape_.query_heads(); ++q) {
      tail.queries.insert(tail.queries.end(), queries.row(q, i), queries.row(q, i) + shape_.key_dim);
    }
  }
}

kvfold::ColumnSums Evidence::sums(const Options& options, std::size_t layer, const decoder::Cache& cache) {
  Stream& stream = streams_.at({options.score.window, options.score.query_stride});
  return kvfold::or_throw(stream.layers[layer].summarize(cache, workspace_.get(), pool_));
}

kvfold::QueryRows Evidence::last_queries(std::size_t layer) const {
  const Tail& tail = tails_[layer];
  return kvfold::token_major_queries(tail.queries.data(), shape_.query_heads(), shape_.key_dim, tail.positions);
}

double Evidence::observe_ms(const Options& options) const {
  return streams_.at({options.score.window, options.score.query_stride}).ms;
}

double Evidence::observe_ms() const {
  double sum = 0.0;
  for (const auto& [key, stream] : streams_) sum += stream.ms;
  return sum;
}

std::vector<std::string> method_names() {
  std::vector<std::string> names;
  for (const auto& [name, make] : factories()) names.push_back(name);
  return names;
}

Method make_method(const std::string& text, const Options& common, kvfold::ThreadPool& pool) {
  Method method{text, common, {}};
  std::size_t end = text.find('@');
  const auto found = factories().find(text.substr(0, end));
  if (found == factories().end()) {
    std::string known;
    for (const std::string& each : method_names()) known.append(" ").append(each);
    throw std::runtime_error("unknown method " + text.substr(0, end) + "; known are" + known);
  }
  while (end != std::string::npos) {
    const std::size_t begin = end + 1;
    end = text.find('@', begin);
    const std::string setting = text.substr(begin, end == std::string::npos ? end : end - begin);
    const std::size_t equals = setting.find('=');
    if (equals == std::string::npos) throw std::runtime_error(text + ": '" + setting + "' is not option=value");
    method.options.set(setting.substr(0, equals), setting.substr(equals + 1));
  }
  method.compress = found->second(method.options, pool);
  return method;
}

}  // namespace evaluation
