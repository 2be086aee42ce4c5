/// \file
/// Fixed-size pages of memory that sequences share, take and give back.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstddef>
#include <limits>
#include <memory>
#include <new>
#include <span>
#include <utility>

#include "kvfold/status.hpp"
#include "kvfold/storage/ragged_cache.hpp"
#include "kvfold/types.hpp"

namespace kvfold {

struct PagePoolOptions {
  std::size_t page_bytes = 0;  ///< at least 1; rounded up so that pages are aligned for every type
  Index pages_per_slab = 256;  ///< pages that come from `Memory` as one block, at least 1
  Index max_slabs = 1;         ///< in [1, 65,536]; no more than 2^31 - 1 pages in all
};

/// Pages in slabs, which are allocated when they are needed and released by `trim` when no page of them is in use.
///
/// May be used from several threads at once: sequences compress at the same time. Pages come from the slab with the lowest
/// number first, so that the others empty. Whoever takes a page gives it back before the pool goes.
///
/// \tparam Memory where slabs come from: see `HeapMemory`
template <class Memory = HeapMemory>
class PagePool {
 public:
  static constexpr std::size_t kAlignment = alignof(std::max_align_t);

  /// \returns a pool that holds no slab yet, or `invalid_argument` / `out_of_memory`.
  [[nodiscard]] static Result<PagePool> create(PagePoolOptions options) noexcept {
    using enum StatusCode;
    constexpr Index most_slabs = 1 << 16;
    constexpr std::size_t most_bytes = std::numeric_limits<std::ptrdiff_t>::max();
    if (options.max_slabs < 1 || options.max_slabs > most_slabs) {
      return Status{invalid_argument, "max_slabs", "must be in [1, 65536]"};
    }
    if (options.pages_per_slab < 1 || options.pages_per_slab > kMaxRows / options.max_slabs) {
      return Status{invalid_argument, "pages_per_slab", "must be at least 1, and at most 2^31 - 1 in all slabs"};
    }
    const auto per_slab = static_cast<std::size_t>(options.pages_per_slab);
    if (options.page_bytes < 1 || options.page_bytes > (most_bytes / 2) / per_slab - kAlignment) {
      return Status{invalid_argument, "page_bytes", "must be at least 1, and a slab smaller than half of memory"};
    }
    options.page_bytes = (options.page_bytes + kAlignment - 1) / kAlignment * kAlignment;
    PagePool pool;
    pool.slabs_.reset(new (std::nothrow) Slab[static_cast<std::size_t>(options.max_slabs)]);
    if (pool.slabs_ == nullptr) return Status{out_of_memory, "max_slabs", "the list of slabs could not be allocated"};
    pool.options_ = options;
    return pool;
  }

  /// Pools that pages have been taken from stay where they are: caches point to them. What is left is a pool without room.
  PagePool(PagePool&& other) noexcept
      : options_(std::exchange(other.options_, {.max_slabs = 0})),
        slabs_(std::move(other.slabs_)),
        held_(std::exchange(other.held_, 0)) {
    KVFOLD_ASSERT(other.in_use_ == 0);
  }
  PagePool& operator=(PagePool&&) = delete;
  ~PagePool() {
    KVFOLD_ASSERT(in_use_ == 0);
    if (slabs_ != nullptr) static_cast<void>(trim());
  }

  [[nodiscard]] const PagePoolOptions& options() const noexcept { return options_; }
  [[nodiscard]] std::size_t page_bytes() const noexcept { return options_.page_bytes; }

  /// Fills `out` with pages, whose contents are whatever was left there; all of them, or none and `out_of_memory`.
  /// O(slabs + pages per slab / 64 + pages).
  Status allocate(std::span<PageId> out) noexcept {
    const Guard guard(lock_);
    const Index wanted = static_cast<Index>(out.size());
    const Index missing = wanted - (held_ * options_.pages_per_slab - in_use_);
    if (missing > 0) {
      if (Status bad = add_slabs((missing - 1) / options_.pages_per_slab + 1); !bad.ok()) return bad;
    }
    for (Index s = 0; !out.empty(); ++s) out = take_from(s, out);
    in_use_ += wanted;
    return {};
  }

  /// Gives pages back. `invalid_argument` for a page that is not in use; those before it in the list are then given back,
  /// and the others are not.
  Status release(std::span<const PageId> pages) noexcept {
    const Guard guard(lock_);
    for (const PageId id : pages) {
      const Index s = id / options_.pages_per_slab, i = id % options_.pages_per_slab;
      if (id < 0 || s >= options_.max_slabs || slab(s).memory == nullptr || (word(slab(s), i) & bit(i)) == 0) {
        return {StatusCode::invalid_argument, "pages", "is not in use", -1, id};
      }
      word(slab(s), i) &= ~bit(i);
      --slab(s).in_use;
      --in_use_;
    }
    return {};
  }

  /// Where a page in use begins: `page_bytes()` bytes, aligned for every type.
  [[nodiscard]] std::byte* page(PageId id) const noexcept {
    const std::byte* slab_memory = slab(id / options_.pages_per_slab).memory;
    KVFOLD_ASSERT(slab_memory != nullptr);
    return const_cast<std::byte*>(slab_memory) + at(id % options_.pages_per_slab) * options_.page_bytes;
  }

  /// Releases the slabs that no page is in use of. \returns the bytes that went back to `Memory`.
  std::size_t trim() noexcept {
    const Guard guard(lock_);
    std::size_t bytes = 0;
    for (Index s = 0; s < options_.max_slabs; ++s) {
      if (slab(s).memory == nullptr || slab(s).in_use > 0) continue;
      drop(slab(s));
      bytes += slab_bytes();
    }
    return bytes;
  }

  [[nodiscard]] Index pages_in_use() const noexcept {
    const Guard guard(lock_);
    return in_use_;
  }
  /// Pages that `allocate` can give without another slab.
  [[nodiscard]] Index pages_free() const noexcept {
    const Guard guard(lock_);
    return held_ * options_.pages_per_slab - in_use_;
  }
  /// Bytes of the slabs that are held now, whether their pages are in use or not.
  [[nodiscard]] Index live_bytes() const noexcept {
    const Guard guard(lock_);
    return held_ * static_cast<Index>(slab_bytes());
  }

 private:
  struct Slab {
    std::byte* memory = nullptr;  // pages, and behind them a bit per page: 1 = in use
    Index in_use = 0;
    bool fresh = false;  // while slabs are added
  };

  /// A lock that neither allocates nor throws.
  class Guard {
   public:
    explicit Guard(std::atomic_flag& flag) noexcept : flag_(flag) {
      while (flag_.test_and_set(std::memory_order_acquire)) flag_.wait(true, std::memory_order_relaxed);
    }
    Guard(const Guard&) = delete;
    Guard& operator=(const Guard&) = delete;
    ~Guard() {
      flag_.clear(std::memory_order_release);
      flag_.notify_one();
    }

   private:
    std::atomic_flag& flag_;
  };

  PagePool() noexcept = default;

  static constexpr std::size_t at(Index i) noexcept { return static_cast<std::size_t>(i); }
  [[nodiscard]] Slab& slab(Index s) const noexcept { return slabs_[at(s)]; }
  [[nodiscard]] std::size_t words() const noexcept { return at((options_.pages_per_slab + 63) / 64); }
  [[nodiscard]] std::size_t slab_bytes() const noexcept {
    return at(options_.pages_per_slab) * options_.page_bytes + words() * sizeof(std::uint64_t);
  }
  [[nodiscard]] std::uint64_t& word(const Slab& s, Index page) const noexcept {
    return reinterpret_cast<std::uint64_t*>(s.memory + at(options_.pages_per_slab) * options_.page_bytes)[page / 64];
  }
  static constexpr std::uint64_t bit(Index page) noexcept {
    return std::uint64_t{1} << static_cast<unsigned>(page % 64);
  }

  Status add_slabs(Index count) noexcept {
    constexpr Status no_room{StatusCode::out_of_memory, "pages", "the pool has no room for them"};
    if (count > options_.max_slabs - held_) return no_room;
    for (Index s = 0; count > 0; ++s) {
      if (slab(s).memory != nullptr) continue;
      slab(s).memory = static_cast<std::byte*>(Memory::resize(nullptr, 0, slab_bytes()));
      if (slab(s).memory == nullptr) {
        for (Index added = 0; added < s; ++added) {
          if (slab(added).fresh) drop(slab(added));
        }
        return no_room;
      }
      for (Index i = 0; i < options_.pages_per_slab; i += 64) word(slab(s), i) = 0;
      slab(s).fresh = true;
      ++held_;
      --count;
    }
    for (Index s = 0; s < options_.max_slabs; ++s) slab(s).fresh = false;
    return {};
  }

  void drop(Slab& s) noexcept {
    static_cast<void>(Memory::resize(s.memory, slab_bytes(), 0));
    s = {};
    --held_;
  }

  /// Takes free pages of a slab. \returns the part of `out` that is still to be filled.
  std::span<PageId> take_from(Index s, std::span<PageId> out) noexcept {
    Slab& from = slab(s);
    if (from.memory == nullptr || from.in_use == options_.pages_per_slab) return out;
    for (Index first = 0; first < options_.pages_per_slab && !out.empty(); first += 64) {
      std::uint64_t& used = word(from, first);
      const Index end = std::min<Index>(options_.pages_per_slab - first, 64);
      for (Index i = std::countr_one(used); i < end && !out.empty(); i = std::countr_one(used)) {
        used |= bit(i);
        out.front() = static_cast<PageId>(s * options_.pages_per_slab + first + i);
        out = out.subspan(1);
        ++from.in_use;
      }
    }
    return out;
  }

  PagePoolOptions options_;
  std::unique_ptr<Slab[]> slabs_;
  Index held_ = 0;    // slabs
  Index in_use_ = 0;  // pages
  mutable std::atomic_flag lock_;
};

}  // namespace kvfold
