/// \file
/// The compression methods that the evaluator compares, by name.
#pragma once

#include <kvfold/kvfold.hpp>

#include <functional>
#include <span>
#include <string>
#include <variant>
#include <vector>

#include <nlohmann/json.hpp>

namespace evaluation {

/// Every option that can be set from outside; the rest are the library's defaults.
struct Options {
  /// One of them by its name, as on the command line without the dashes. Throws std::runtime_error.
  void set(const std::string& name, const std::string& value);
  [[nodiscard]] nlohmann::json to_json() const;

  kvfold::GlobalLocalScorer::Options score{};
  kvfold::AdaptiveHeadBudget::Options budget{};
  kvfold::EvictThenMerge<>::Options merge{};
  kvfold::SnapKvScorer::Options snapkv{};
  kvfold::StreamingLlmScorer::Options streaming_llm{};
};

/// What a user may set.
struct OptionField {
  std::string name, help;
  std::function<void(Options&, const std::string&)> set;
  std::function<nlohmann::json(const Options&)> get;
};
[[nodiscard]] const std::vector<OptionField>& option_fields();

/// Every kind of compressor that a method may be. Engines visit it with their views and evidence.
using AnyCompressor =
    std::variant<kvfold::StreamingLlm, kvfold::H2o, kvfold::SnapKv, kvfold::Tova, kvfold::EmsEvict, kvfold::Ems,
                 kvfold::Compressor<kvfold::GlobalLocalScorer, kvfold::UniformBudget, kvfold::EvictOnly>,
                 kvfold::Compressor<kvfold::GlobalLocalScorer, kvfold::UniformBudget, kvfold::EvictThenMerge<>>>;

/// Whose attention a method ranks rows by.
enum class Asked {
  last_queries,  ///< of the last positions, `window_of` of them
  whole_prompt,
};

/// A method of the evaluation: a name, and options that may differ from the common ones.
struct Method {
  std::string label;  ///< as the user wrote it
  Options options;
  Asked asked = Asked::last_queries;
  std::function<AnyCompressor(kvfold::Index rows)> compressor;  ///< to `rows` rows per head; empty: the full cache

  [[nodiscard]] bool is_full() const { return !compressor; }
};

[[nodiscard]] std::vector<std::string> method_names();

/// A method from "name" or "name@option=value@option=value". Throws std::runtime_error for what is not known or out of range.
[[nodiscard]] Method make_method(const std::string& text, const Options& common);

/// The queries of the last positions that are kept for these methods: as many as any window has.
[[nodiscard]] kvfold::Index window_of(std::span<const Method> methods);

}  // namespace evaluation
