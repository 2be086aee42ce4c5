/// \file
/// kvfold-evaluate: what each compression method costs a real model in quality, and what it saves.
///
/// For each document: reads N tokens, compresses every layer's cache by each method, reads the next M tokens from the
/// compressed cache, and compares the predictions with those from the full cache. For each retrieval task: whether the
/// model still answers exactly.

#include <cstdio>

#include <CLI/CLI.hpp>

#include "evaluation/decoder_engine.hpp"
#include "evaluation/evaluation.hpp"

int main(int argc, char** argv) {
  evaluation::Settings settings;
  CLI::App app("Perplexity, divergence, memory and time of KV-cache compression methods on a real model.");
  app.add_option("--model", settings.model, "directory with config.json and model.safetensors")
      ->check(CLI::ExistingDirectory);
  evaluation::add_options(app, settings);
  CLI11_PARSE(app, argc, argv);
  try {
    evaluation::run(settings, [&](kvfold::ThreadPool& pool) {
      return std::make_unique<evaluation::DecoderEngine>(settings.model, pool, settings.chunk);
    });
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "kvfold-evaluate: %s\n", error.what());
    return 1;
  }
}
