#include "evaluation/methods.hpp"

#include <kvfold/throwing.hpp>

#include <algorithm>
#include <map>
#include <stdexcept>

namespace evaluation {
namespace {

using kvfold::Index;

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

using MakeCompressor = std::function<AnyCompressor(Index)>;

struct Kind {
  Asked asked = Asked::last_queries;
  std::function<MakeCompressor(const Options&)> with;  // empty: the full cache
};

/// A kind of method from functions that make its policies for a budget.
template <class MakeScorer, class MakeBudget, class MakeReducer>
Kind make_kind(Asked asked, MakeScorer scorer, MakeBudget budget, MakeReducer reducer) {
  return {asked, [=](const Options& o) -> MakeCompressor {
            return [=](Index rows) { return kvfold::Compressor(scorer(o, rows), budget(o, rows), reducer(o)); };
          }};
}

const std::map<std::string, Kind>& kinds() {
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
  static const std::map<std::string, Kind> kAll = {
      {"full", {}},
      {"streaming-llm", make_kind(Asked::last_queries, streaming, uniform, evict)},
      {"h2o", make_kind(Asked::whole_prompt, h2o, uniform, evict)},
      {"snapkv", make_kind(Asked::last_queries, snapkv, uniform, evict)},
      {"tova", make_kind(Asked::last_queries, tova, uniform, evict)},
      {"ems-evict", make_kind(Asked::whole_prompt, global_local, adaptive, evict)},
      {"ems-evict-uniform", make_kind(Asked::whole_prompt, global_local, uniform, evict)},
      {"ems-window", make_kind(Asked::last_queries, global_local, adaptive, merge)},
      {"ems-uniform", make_kind(Asked::whole_prompt, global_local, uniform, merge)},
      {"ems", make_kind(Asked::whole_prompt, global_local, adaptive, merge)},
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
          "span-width", "w, rows after an attended one in the span term",
          [](auto& o) -> auto& { return o.score.span_width; }),
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

std::vector<std::string> method_names() {
  std::vector<std::string> names;
  for (const auto& [name, kind] : kinds()) names.push_back(name);
  return names;
}

Method make_method(const std::string& text, const Options& common) {
  Method method{text, common, Asked::last_queries, {}};
  std::size_t end = text.find('@');
  const auto found = kinds().find(text.substr(0, end));
  if (found == kinds().end()) {
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
  const Kind& kind = found->second;
  method.asked = kind.asked;
  if (kind.with) {
    method.compressor = kind.with(method.options);
    std::visit([](const auto& compressor) { kvfold::or_throw(compressor.validate()); }, method.compressor(64));
  }
  return method;
}

Index window_of(std::span<const Method> methods) {
  Index window = 1;
  for (const Method& method : methods) {
    window = std::max({window, method.options.score.window, method.options.snapkv.window});
  }
  return window;
}

}  // namespace evaluation
