/// \file
/// What compression costs beside a real prompt, and what it saves in decoding, on the example decoder. Writes a section for
/// docs/performance.md.

#include <kvfold/kvfold.hpp>
#include <kvfold/throwing.hpp>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "decoder/decoder.hpp"
#include "evaluation/documents.hpp"
#include "support/quantile.hpp"

namespace {

using Clock = std::chrono::steady_clock;
using kvfold::Index;
using kvfold::bench::median;
using kvfold::bench::quantile;
using nlohmann::json;

constexpr Index kWindow = 32;
constexpr std::size_t kChunk = 512;
constexpr Index kStrides[] = {16, 1};  // of the global term: sampled, exact

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

std::string fixed(double value, int digits) {
  char text[32];
  std::snprintf(text, sizeof text, "%.*f", digits, value);
  return text;
}

/// A prompt that has been read, and what was seen of its attention.
class Prompt {
 public:
  Prompt(decoder::Decoder& model, std::span<const decoder::Token> tokens, kvfold::ThreadPool& pool)
      : sequence(model.new_sequence()), shape_(model.config().layer_shape()), pool_(pool) {
    const auto layers = static_cast<std::size_t>(model.config().layers);
    const auto rows = static_cast<Index>(tokens.size());
    window_.resize(layers);
    for (std::size_t s = 0; s < std::size(kStrides); ++s) {
      for (std::size_t i = 0; i < layers; ++i) {
        streams_[s].push_back(kvfold::or_throw(kvfold::GlobalLocalAccumulator::create(
            shape_, rows, {.window = kWindow, .query_stride = kStrides[s], .group = kvfold::GroupReduction::max})));
      }
      kvfold::or_throw(space_.reserve(streams_[s].front().workspace_bytes(rows, pool.concurrency())));
    }
    const auto start = Clock::now();
    model.prefill(tokens, sequence, kChunk, [&](std::size_t layer, const kvfold::QueryRows& queries) {
      const auto before = Clock::now();
      for (std::size_t s = 0; s < std::size(kStrides); ++s) {
        const auto begun = Clock::now();
        kvfold::or_throw(streams_[s][layer].observe(sequence.layers[layer], queries, space_.get(), pool_));
        observe_seconds[s] += seconds_since(begun);
      }
      if (queries.positions.back() + 1 == rows) keep_window(layer, queries);
      observer_seconds_ += seconds_since(before);
    });
    prefill_seconds = seconds_since(start) - observer_seconds_;
  }

  /// Compresses every layer of a copy. \returns the seconds that it took.
  double compress(const kvfold::Ems& ems, decoder::Sequence& copy) {
    double spent = 0.0;
    for (std::size_t i = 0; i < copy.layers.size(); ++i) {
      auto queries = kvfold::token_major_queries(window_[i].queries.data(), shape_.query_heads(), shape_.key_dim,
                                                 window_[i].positions);
      queries.log_sum_exp = window_[i].log_sum_exp;
      const auto start = Clock::now();
      run(ems, copy.layers[i], queries);
      spent += seconds_since(start);
    }
    return spent;
  }
  /// The same from the sums over the whole prompt, summing up included.
  double compress(const kvfold::Ems& ems, std::size_t stream, decoder::Sequence& copy) {
    double spent = 0.0;
    for (std::size_t i = 0; i < copy.layers.size(); ++i) {
      const auto start = Clock::now();
      const auto sums = kvfold::or_throw(streams_[stream][i].summarize(copy.layers[i], space_.get(), pool_));
      run(ems, copy.layers[i], sums);
      spent += seconds_since(start);
    }
    return spent;
  }

  decoder::Sequence sequence;
  double prefill_seconds = 0.0;  ///< without the evidence
  double observe_seconds[std::size(kStrides)] = {};

 private:
  struct Window {
    std::vector<float> queries, log_sum_exp;
    std::vector<kvfold::Position> positions;
  };

  void keep_window(std::size_t layer, const kvfold::QueryRows& queries) {
    Window& window = window_[layer];
    for (Index i = queries.rows() - kWindow; i < queries.rows(); ++i) {
      window.positions.push_back(queries.positions[static_cast<std::size_t>(i)]);
      for (Index q = 0; q < shape_.query_heads(); ++q) {
        window.queries.insert(window.queries.end(), queries.row(q, i), queries.row(q, i) + shape_.key_dim);
      }
    }
    for (Index q = 0; q < shape_.query_heads(); ++q) {
      const auto end = queries.log_sum_exp.begin() + (q + 1) * queries.rows();
      window.log_sum_exp.insert(window.log_sum_exp.end(), end - kWindow, end);
    }
  }

  template <class Evidence>
  void run(const kvfold::Ems& ems, decoder::Cache& cache, const Evidence& evidence) {
    const auto bytes = kvfold::or_throw(ems.workspace_bytes(std::as_const(cache), evidence, pool_.concurrency()));
    kvfold::or_throw(workspace_.reserve(bytes));
    static_cast<void>(kvfold::or_throw(ems.compress(cache, evidence, workspace_.get(), pool_)));
  }

  kvfold::LayerShape shape_;
  kvfold::ThreadPool& pool_;
  std::vector<Window> window_;
  std::vector<kvfold::GlobalLocalAccumulator> streams_[std::size(kStrides)];
  kvfold::WorkspaceBuffer space_, workspace_;
  double observer_seconds_ = 0.0;
};

struct Settings {
  std::vector<Index> contexts{2048, 4096, 8160};  ///< the last leaves room for the steps below 8192 positions
  std::vector<Index> budgets{256, 512, 1024};
  int readings = 3;  ///< of each prompt, so that a worse moment of the machine counts as one
  int repetitions = 15, steps = 16;
};

/// What compression takes of a prompt's prefill.
struct Shares {
  double window, evict, global[std::size(kStrides)];
};

Shares shares_of_prefill(Prompt& prompt, int repetitions) {
  const kvfold::Ems ems({.score = {.window = kWindow}, .budget = {.rows = 256}});
  const kvfold::Ems evicting({.score = {.window = kWindow}, .budget = {.rows = 256}, .reduce = {.gamma = 0.f}});
  const auto share = [&](double before, auto compress) {
    std::vector<double> spent;
    for (int i = 0; i < repetitions; ++i) {
      decoder::Sequence copy = prompt.sequence.clone();
      spent.push_back(compress(copy));
    }
    return (before + median(spent)) / prompt.prefill_seconds;
  };
  Shares shares{};
  shares.window = share(0.0, [&](auto& copy) { return prompt.compress(ems, copy); });
  shares.evict = share(0.0, [&](auto& copy) { return prompt.compress(evicting, copy); });
  for (std::size_t s = 0; s < std::size(kStrides); ++s) {
    shares.global[s] = share(prompt.observe_seconds[s], [&](auto& copy) { return prompt.compress(ems, s, copy); });
  }
  return shares;
}

/// Compression as a share of prefill. \returns the last prompt.
std::unique_ptr<Prompt> measure_shares(decoder::Decoder& model, std::span<const decoder::Token> tokens,
                                       const Settings& settings, kvfold::ThreadPool& pool, json& section) {
  std::unique_ptr<Prompt> last;
  json table{
      {"caption", "Evidence and compression of all layers to 256 rows per head, as a share of prefill; medians of " +
                      std::to_string(settings.readings) + " readings of the prompt"},
      {"columns", {"prompt", "prefill", "window", "sampled, stride 16", "exact", "window, to evict only"}},
      {"rows", json::array()}};
  for (const Index context : settings.contexts) {
    std::vector<double> prefill;
    std::vector<Shares> readings;
    for (int i = 0; i < settings.readings; ++i) {
      last.reset();  // before the next one is made: both are large
      last = std::make_unique<Prompt>(model, tokens.first(static_cast<std::size_t>(context)), pool);
      prefill.push_back(last->prefill_seconds);
      readings.push_back(shares_of_prefill(*last, settings.repetitions));
    }
    const auto middle = [&](auto share_of) {
      std::vector<double> shares;
      for (const Shares& reading : readings) shares.push_back(share_of(reading));
      return median(shares);
    };
    const double window = middle([](const Shares& s) { return s.window; });
    const double evict = middle([](const Shares& s) { return s.evict; });
    const double sampled = middle([](const Shares& s) { return s.global[0]; });
    const double exact = middle([](const Shares& s) { return s.global[1]; });
    const auto percent = [](double share) { return fixed(100 * share, 2) + " %"; };
    const std::string took = fixed(median(prefill), 2) + " s";
    table["rows"].push_back(
        {std::to_string(context), took, percent(window), percent(sampled), percent(exact), percent(evict)});
    const std::string of = "Share of prefill, SmolLM2, prompt of " + std::to_string(context) + ": ";
    section["targets"].push_back(
        {{"target", of + "window evidence at most 1 %"}, {"measured", percent(window)}, {"held", window <= 0.01}});
    section["targets"].push_back({{"target", of + "sampled global (stride 16) at most 3 %"},
                                  {"measured", percent(sampled)},
                                  {"held", sampled <= 0.03}});
    section["targets"].push_back(
        {{"target", of + "exact global, stated"}, {"measured", percent(exact)}, {"held", nullptr}});
    std::cout << context << ": prefill " << took << ", window " << percent(window) << ", sampled " << percent(sampled)
              << ", exact " << percent(exact) << ", evict only " << percent(evict) << std::endl;
  }
  section["tables"].push_back(table);
  return last;
}

/// Decode steps over the full cache and compressed ones, in turn.
void measure_steps(decoder::Decoder& model, Prompt& prompt, std::span<const decoder::Token> tokens,
                   const Settings& settings, json& section) {
  const auto context = static_cast<std::size_t>(prompt.sequence.next);
  std::vector<decoder::Sequence> sequences;
  sequences.push_back(prompt.sequence.clone());
  for (const Index budget : settings.budgets) {
    sequences.push_back(prompt.sequence.clone());
    prompt.compress(kvfold::Ems({.score = {.window = kWindow}, .budget = {.rows = budget}}), sequences.back());
  }
  std::vector<std::vector<double>> seconds(sequences.size()), ratios(sequences.size());
  for (int step = 0; step < settings.steps; ++step) {
    for (std::size_t s = 0; s < sequences.size(); ++s) {
      const auto start = Clock::now();
      static_cast<void>(model.forward(tokens.subspan(context + static_cast<std::size_t>(step), 1), sequences[s],
                                      decoder::Logits::last));
      seconds[s].push_back(seconds_since(start));
      ratios[s].push_back(seconds[0].back() / seconds[s].back());
    }
  }
  json table{{"caption", "One decode step after a prompt of " + std::to_string(context) + " tokens, " +
                             std::to_string(settings.steps) + " steps of each in turn"},
             {"columns", {"cache", "MB", "median", "10 % to 90 %", "speed-up"}},
             {"rows", json::array()}};
  for (std::size_t s = 0; s < sequences.size(); ++s) {
    const std::string name = s == 0 ? "full" : std::to_string(settings.budgets[s - 1]) + " rows per head";
    const auto ms = [&](double share) { return fixed(1e3 * quantile(seconds[s], share), 1); };
    const std::string speedup = fixed(quantile(ratios[s], 0.5), 2) + "x";
    table["rows"].push_back({name, fixed(static_cast<double>(sequences[s].live_bytes()) / 1e6, 1), ms(0.5) + " ms",
                             ms(0.1) + " to " + ms(0.9) + " ms", speedup});
    std::cout << name << ": " << ms(0.5) << " ms, " << speedup << std::endl;
    if (s > 0) {
      section["targets"].push_back({{"target", "Decode step of SmolLM2 after " + std::to_string(context) + " tokens, " +
                                                   name + " against the full cache: stated"},
                                    {"measured", speedup},
                                    {"held", nullptr}});
    }
  }
  section["tables"].push_back(table);
}

int run(int argc, char** argv) {
  std::string model_dir, text, out;
  Settings settings;
  Index threads = 2;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    const bool has_value = i + 1 < argc;
    if (name == "--quick") {
      settings = {.contexts = {256}, .budgets = {64}, .readings = 1, .repetitions = 1, .steps = 2};
    } else if (name == "--model" && has_value) {
      model_dir = argv[++i];
    } else if (name == "--text" && has_value) {
      text = argv[++i];
    } else if (name == "--out" && has_value) {
      out = argv[++i];
    } else if (name == "--threads" && has_value) {
      threads = std::atol(argv[++i]);
    } else {
      std::cerr << "usage: measure_decoder --model DIR --text FILE --out FILE [--threads N] [--quick]\n";
      return 2;
    }
  }
  kvfold::ThreadPool pool(std::max<Index>(threads, 1));
  decoder::Decoder model(model_dir, pool);
  const decoder::Config& config = model.config();
  const evaluation::Text read = evaluation::load_text(text, {config.vocab_size, config.tokenizer == "bytes"});
  const std::size_t wanted = static_cast<std::size_t>(settings.contexts.back() + settings.steps);
  if (read.tokens.size() < wanted) throw std::runtime_error(text + ": is too short");
  json section{
      {"section", "SmolLM2 in the example decoder"},
      {"order", 90},
      {"text",
       "SmolLM2-135M-Instruct (30 layers, H 3, G 3, D 64) reads a novel in chunks of 512 with fp32 caches, " +
           std::to_string(pool.concurrency()) +
           " threads; evidence is gathered while it reads, with attention's log-sum-exps. The decoder multiplies "
           "its fp32 weights anew for every token (540 MB), which bounds what a smaller cache can save."},
      {"tables", json::array()},
      {"targets", json::array()}};
  const auto prompt = measure_shares(model, read.tokens, settings, pool, section);
  measure_steps(model, *prompt, read.tokens, settings, section);
  std::ofstream(out) << section.dump(2) << '\n';
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const std::exception& error) {
    std::cerr << "measure_decoder: " << error.what() << '\n';
    return 1;
  }
}
