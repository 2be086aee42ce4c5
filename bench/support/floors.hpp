/// \file
/// What a machine can do at best, measured next to what is compared with it.
#pragma once

#include <kvfold/exec/thread_pool.hpp>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <ctime>
#include <span>
#include <utility>
#include <vector>

#include <Eigen/Core>
#include <benchmark/benchmark.h>

namespace kvfold::bench {

/// What is timed on one thread is timed in the thread's own processor time, so that other work on the machine is not
/// counted; what is timed on several, in wall time.
class Stopwatch {
 public:
  [[nodiscard]] double seconds() const { return now() - start_; }

  /// For all stopwatches that are started from now on.
  static void set_threads(Index threads) { clock_ = threads == 1 ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC; }

 private:
  [[nodiscard]] static double now() {
    timespec t{};
    clock_gettime(clock_, &t);
    return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
  }

  static inline clockid_t clock_ = CLOCK_MONOTONIC;
  double start_ = now();
};

/// A product of an [m][k] and a transposed [n][k] matrix.
struct Product {
  Index m = 0, n = 0, k = 0;
};

/// What cannot be avoided. Arithmetic and memory traffic may overlap, so its floor is the longer of the two:
/// max(read / read speed + copied / copy speed, flops / GEMM speed + exps / exp speed).
struct Work {
  double read_bytes = 0, copied_bytes = 0;
  double flops = 0, exps = 0;
  Product product = {};  ///< the shape that flops are measured with
  /// What is read, if it is to be read itself, once, from memory. Else as many bytes of others are.
  std::vector<std::span<const std::byte>> memory = {};

  [[nodiscard]] static Work reading(std::vector<std::span<const std::byte>> memory) {
    double bytes = 0;
    for (const auto& part : memory) bytes += static_cast<double>(part.size());
    return {.read_bytes = bytes, .memory = std::move(memory)};
  }
};

/// Measures floors on the threads that do the work, all of them at the same time.
class Floor {
 public:
  Floor(std::vector<Work> works, ThreadPool& pool) : works_(std::move(works)), pool_(pool) {
    for (Index w = 0; w < pool.concurrency(); ++w) workers_.emplace_back(works_);
  }

  /// Seconds, from speeds that are measured now, for a few milliseconds each.
  [[nodiscard]] double seconds() { return seconds(pool_.concurrency()); }
  /// The same on some of the threads, while the others do nothing.
  [[nodiscard]] double seconds(Index threads) {
    speeds_.resize(static_cast<std::size_t>(threads));
    double sum = 0.0;
    for (std::size_t i = 0; i < works_.size(); ++i) {
      const Work& work = works_[i];
      double memory = 0.0, arithmetic = 0.0;
      if (!work.memory.empty()) {
        memory += seconds_of_reading(work.memory);
      } else if (work.read_bytes > 0) {
        memory += work.read_bytes / speed([](Worker& w, std::size_t) { return w.read(); }, i);
      }
      if (work.copied_bytes > 0)
        memory += work.copied_bytes / speed([](Worker& w, std::size_t) { return w.copy(); }, i);
      if (work.flops > 0) {
        // Of whole operands or of tiles that stay in the cache: whichever is faster here.
        const double whole = speed([](Worker& w, std::size_t k) { return w.multiply(w.whole[k]); }, i);
        const double tile = speed([](Worker& w, std::size_t k) { return w.multiply(w.tile[k]); }, i);
        arithmetic += work.flops / std::max(whole, tile);
      }
      if (work.exps > 0) arithmetic += work.exps / speed([](Worker& w, std::size_t) { return w.exponentiate(); }, i);
      sum += std::max(memory, arithmetic);
    }
    return sum;
  }

 private:
  using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  static constexpr std::size_t kBytes = std::size_t{64} << 20;  // more than a core's own caches hold
  static constexpr double kSampleSeconds = 3e-3;

  static void read_floats(const float* from, Index n) noexcept {
    benchmark::DoNotOptimize(Eigen::Map<const Eigen::ArrayXf>(from, n).sum());
  }

  struct Operands {
    explicit Operands(Product p)
        : a(Matrix::Random(p.m, p.k)), b(Matrix::Random(p.n, p.k)), c(Matrix::Zero(p.m, p.n)) {}
    Matrix a, b, c;
  };

  struct Worker {
    explicit Worker(const std::vector<Work>& works) : numbers(Eigen::ArrayXf::Random(4096)), exps(4096) {
      for (const Work& work : works) {
        const Product p = work.product;
        whole.emplace_back(Product{std::min<Index>(p.m, 512), std::min<Index>(p.n, 4096), p.k});
        tile.emplace_back(Product{std::min<Index>(p.m, 64), std::min<Index>(p.n, 256), p.k});
        if (work.read_bytes > 0 || work.copied_bytes > 0) from.resize(kBytes / sizeof(float), 1.f);
        if (work.copied_bytes > 0) to.resize(kBytes / sizeof(float));
      }
    }

    double read() {
      read_floats(from.data(), static_cast<Index>(from.size()));
      return static_cast<double>(kBytes);
    }
    double copy() {
      std::memcpy(to.data(), from.data(), kBytes);
      benchmark::DoNotOptimize(to.data());
      return static_cast<double>(kBytes);
    }
    static double multiply(Operands& o) {
      o.c.noalias() = o.a * o.b.transpose();
      benchmark::DoNotOptimize(o.c.data());
      return 2.0 * static_cast<double>(o.a.rows()) * static_cast<double>(o.b.rows()) * static_cast<double>(o.a.cols());
    }
    double exponentiate() {
      exps = numbers.exp();
      benchmark::DoNotOptimize(exps.data());
      return static_cast<double>(exps.size());
    }

    Eigen::ArrayXf numbers, exps;
    std::vector<float> from, to;
    std::vector<Operands> whole, tile;
  };

  /// Units per second of f, summed over the threads of `speeds_`.
  template <class F>
  double speed(F f, std::size_t work) {
    auto task = [&](Index i, Index) noexcept {
      const auto k = static_cast<std::size_t>(i);
      double done = 0.0, spent = 0.0;
      for (const Stopwatch watch; spent < kSampleSeconds; spent = watch.seconds()) {
        done += f(workers_[k], work);
      }
      speeds_[k] = done / spent;
    };
    pool_.run(static_cast<Index>(speeds_.size()), task);
    double sum = 0.0;
    for (const double s : speeds_) sum += s;
    return sum;
  }

  /// Of all spans, by the threads of `speeds_`. They are in no cache before, and in none afterwards.
  double seconds_of_reading(const std::vector<std::span<const std::byte>>& spans) {
    const auto threads = static_cast<Index>(speeds_.size());
    auto read_others = [&](Index i, Index) noexcept { workers_[static_cast<std::size_t>(i)].read(); };
    auto read = [&](Index i, Index) noexcept {
      for (const auto& span : spans) {
        const auto words = static_cast<Index>(span.size() / sizeof(float));
        const Index first = words * i / threads, last = words * (i + 1) / threads;
        read_floats(reinterpret_cast<const float*>(span.data()) + first, last - first);
      }
    };
    pool_.run(pool_.concurrency(), read_others);
    const Stopwatch watch;
    pool_.run(threads, read);
    const double seconds = watch.seconds();
    pool_.run(pool_.concurrency(), read_others);
    return seconds;
  }

  std::vector<Work> works_;
  ThreadPool& pool_;
  std::vector<Worker> workers_;
  std::vector<double> speeds_;
};

}  // namespace kvfold::bench
