#include "evaluation/report.hpp"

#include <cmath>
#include <cstdio>
#include <fstream>
#include <map>
#include <stdexcept>

namespace evaluation {

using kvfold::Index;

namespace {

/// Means over documents of one method at one budget.
struct Cell {
  double log_ratio = 0.0, kl = 0.0, bytes = 0.0, bytes_before = 0.0, score_ms = 0.0, compress_ms = 0.0, rows = 0.0;
  int count = 0;

  void add(const Measured& m) {
    log_ratio += m.nll - m.full_nll;
    kl += m.kl;
    rows += static_cast<double>(m.outcome.report.rows_kept);
    bytes += static_cast<double>(m.outcome.report.bytes_after);
    bytes_before += static_cast<double>(m.outcome.report.bytes_before);
    score_ms += m.outcome.score_ms;
    compress_ms += m.outcome.compress_ms;
    ++count;
  }
};

}  // namespace

void print_table(const Settings& settings, const std::vector<Measured>& results, const Reading& reading) {
  std::map<std::pair<std::string, Index>, Cell> cells;
  for (const Measured& m : results) {
    if (m.context == reading.context) cells[{m.method, m.budget}].add(m);
  }
  const int width = settings.label_width();
  std::printf("\n%zu documents, context %zu, continuation %zu, full-cache perplexity %.3f, prefill %.0f ms\n",
              settings.documents, reading.context, settings.continuation, std::exp(reading.full_nll),
              reading.prefill_ms);
  std::printf("perplexity ratio to the full cache / mean KL divergence from it, by rows per head:\n\n%-*s", width,
              "method");
  for (const Index budget : settings.budgets) std::printf(" %15lld", static_cast<long long>(budget));
  std::printf("   score ms  compress ms  of prefill   MB kept (of)\n");
  for (const std::string& method : settings.methods) {
    if (method == "full") continue;
    std::printf("%-*s", width, method.c_str());
    Cell last;
    for (const Index budget : settings.budgets) {
      last = cells[{method, budget}];
      std::printf("   %.4f/%.4f", std::exp(last.log_ratio / last.count), last.kl / last.count);
    }
    std::printf("   %8.1f  %11.1f  %8.2f %%   %.2f (%.2f)\n", last.score_ms / last.count, last.compress_ms / last.count,
                100.0 * (last.score_ms + last.compress_ms) / last.count / reading.prefill_ms,
                last.bytes / last.count / 1e6, last.bytes_before / last.count / 1e6);
  }
  std::printf(
      "\nscore, compress and MB: all layers, at the last budget; score contains the evidence gathered during prefill, "
      "which\n"
      "prefill does not contain\n");
}

void write_csv(const std::filesystem::path& file, const std::vector<Measured>& results,
               const std::vector<Answers>& answers) {
  std::ofstream out(file);
  out << "measure,method,budget,context,document,mode,depth,correct,cases,perplexity,ratio,kl,rows,rows_merged,"
         "bytes,bytes_before,score_ms,compress_ms\n";
  for (const Measured& m : results) {
    const kvfold::CompressionReport& r = m.outcome.report;
    out << "perplexity," << m.method << ',' << m.budget << ',' << m.context << ',' << m.document << ",,,,,"
        << std::exp(m.nll) << ',' << std::exp(m.nll - m.full_nll) << ',' << m.kl << ',' << r.rows_kept << ','
        << r.rows_merged << ',' << r.bytes_after << ',' << r.bytes_before << ',' << m.outcome.score_ms << ','
        << m.outcome.compress_ms << '\n';
  }
  for (const Answers& a : answers) {
    out << a.task << ',' << a.method << ',' << a.budget << ',' << a.length << ",," << a.mode << ',' << a.depth << ','
        << a.correct << ',' << a.cases << ",,,,,,,,,\n";
  }
  if (!out.flush()) throw std::runtime_error(file.string() + ": cannot be written");
}

}  // namespace evaluation
