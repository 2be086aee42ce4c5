/// \file
/// kvfold-llama-evaluate: what each compression method costs a model that llama.cpp runs. Measures what kvfold-evaluate
/// does, in the same tables and files, on the engine's own cache.

#include <cstdio>

#include <CLI/CLI.hpp>

#include "evaluation/evaluation.hpp"
#include "llama/llama_engine.hpp"

int main(int argc, char** argv) {
  evaluation::Settings settings;
  settings.options.merge.mass_mode = kvfold::MassMode::none;  // llama.cpp has no place for log masses
  evaluation::LlamaOptions llama;
  std::string flash_attention = "on";
  CLI::App app("Perplexity, divergence, memory and time of KV-cache compression methods on a model run by llama.cpp.");
  app.add_option("--model", settings.model, "GGUF file")->check(CLI::ExistingFile);
  const auto types = CLI::IsMember(evaluation::llama_cache_types());
  app.add_option("--cache-type-k", llama.cache_type_k, "of the cache's keys")->check(types)->capture_default_str();
  app.add_option("--cache-type-v", llama.cache_type_v, "of the cache's values; quantised ones need flash attention")
      ->check(types)
      ->capture_default_str();
  app.add_option("--flash-attention", flash_attention, "on or off")
      ->check(CLI::IsMember({"on", "off"}))
      ->capture_default_str();
  app.add_option("--n-ubatch", llama.ubatch, "tokens of one graph, at most --chunk")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  evaluation::add_options(app, settings);
  CLI11_PARSE(app, argc, argv);
  llama.flash_attention = flash_attention == "on";
  try {
    evaluation::run(settings, [&](kvfold::ThreadPool& pool) {
      return std::make_unique<evaluation::LlamaEngine>(settings.model, pool, settings.chunk, llama);
    });
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "kvfold-llama-evaluate: %s\n", error.what());
    return 1;
  }
}
