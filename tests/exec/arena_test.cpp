// Arena: the layout that measures is the layout that places.
#include <kvfold/detail/arena.hpp>

#include <cstdint>
#include <limits>
#include <vector>

#include <gtest/gtest.h>

#include "builders.hpp"

namespace kvfold::detail {
namespace {

constexpr std::size_t kMost = std::numeric_limits<std::size_t>::max();

struct Piece {
  std::byte* begin;
  std::byte* end;
};

template <class T>
void take(Arena& arena, Index a, Index b, std::vector<Piece>& pieces) {
  const std::span<T> span = arena.take<T>(a, b);
  const auto bytes = std::as_writable_bytes(span);
  if (!bytes.empty()) pieces.push_back({bytes.data(), bytes.data() + bytes.size()});
}

/// The same sequence of takes, marks and rewinds for a seed. \returns what was live at the end.
std::vector<Piece> random_layout(Arena& arena, std::uint64_t seed) {
  test::Random random(seed);
  std::vector<Piece> pieces;
  std::size_t mark = arena.mark(), kept = 0;
  for (Index steps = random.below(20); steps > 0; --steps) {
    const Index a = random.below(40), b = random.below(5);
    switch (random.below(6)) {
      case 0: take<char>(arena, a, b, pieces); break;
      case 1: take<float>(arena, a, b, pieces); break;
      case 2: take<double>(arena, a, b, pieces); break;
      case 3: take<Index>(arena, a, b, pieces); break;
      case 4:
        mark = arena.mark();
        kept = pieces.size();
        break;
      default: arena.rewind(mark); pieces.resize(kept);
    }
  }
  return pieces;
}

TEST(ArenaTest, WhatWasMeasuredIsEnoughWhereverTheMemoryStarts) {
  for (std::uint64_t seed = 0; seed < 200; ++seed) {
    Arena measuring;
    random_layout(measuring, seed);
    const std::size_t bytes = measuring.required_bytes();
    std::vector<std::byte> memory(bytes + 64);
    const std::size_t start = seed % 64;
    Arena placing(Workspace(memory).subspan(start, bytes));
    const std::vector<Piece> pieces = random_layout(placing, seed);
    ASSERT_FALSE(placing.overflowed()) << seed;
    for (std::size_t i = 0; i < pieces.size(); ++i) {
      ASSERT_EQ(reinterpret_cast<std::uintptr_t>(pieces[i].begin) % Arena::kAlignment, 0u) << seed;
      ASSERT_GE(pieces[i].begin, memory.data() + start) << seed;
      ASSERT_LE(pieces[i].end, memory.data() + start + bytes) << seed;
      const std::byte* previous_end = i > 0 ? pieces[i - 1].end : memory.data();
      ASSERT_GE(pieces[i].begin, previous_end) << seed;
    }
  }
}

TEST(ArenaTest, WhatWasMeasuredIsNotMoreThanAlignmentNeeds) {
  alignas(64) std::byte memory[1024];
  Arena measuring;
  static_cast<void>(measuring.take<float>(100));
  const std::size_t bytes = measuring.required_bytes() - Arena::kAlignment;
  Arena exact(Workspace(memory, bytes));
  EXPECT_EQ(exact.take<float>(100).size(), 100u);
  Arena short_of_one(Workspace(memory, bytes - 1));
  EXPECT_TRUE(short_of_one.take<float>(100).empty());
  EXPECT_TRUE(short_of_one.overflowed());
}

TEST(ArenaTest, MeasuringGivesOutNothing) {
  Arena arena;
  EXPECT_TRUE(arena.take<float>(10).empty());
  EXPECT_TRUE(arena.take_bytes(10).empty());
  EXPECT_FALSE(arena.overflowed());
}

TEST(ArenaTest, RewoundMemoryIsGivenOutAgainAndThePeakCounts) {
  alignas(64) std::byte memory[512];
  Arena arena{Workspace(memory)};
  const std::size_t mark = arena.mark();
  const float* first = arena.take<float>(100).data();
  arena.rewind(mark);
  EXPECT_EQ(arena.take<float>(10).data(), first);
  Arena measuring;
  static_cast<void>(measuring.take<float>(100));
  measuring.rewind(0);
  static_cast<void>(measuring.take<float>(10));
  EXPECT_GE(measuring.required_bytes(), 400u);
}

TEST(ArenaTest, TheNestedWorkspaceOfAStageIsAlignedAndOfTheSizeItAskedFor) {
  std::vector<std::byte> memory(1024);
  Arena arena(Workspace(memory).subspan(5));
  static_cast<void>(arena.take<char>(3));
  const Workspace inner = arena.take_bytes(100);
  EXPECT_EQ(inner.size(), 100u);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(inner.data()) % Arena::kAlignment, 0u);
}

TEST(ArenaTest, SizesThatCannotBeAreReportedAndNeverWrapAround) {
  struct Size {
    Index a, b, c;
  };
  const Size hostile[] = {{-1, 1, 1},
                          {1, -1, 1},
                          {1, 1, INT64_MIN},
                          {INT64_MAX, 1, 1},
                          {INT64_MAX, INT64_MAX, 1},
                          {Index{1} << 32, Index{1} << 32, 1},
                          {Index{1} << 31, Index{1} << 31, 4},
                          {Index{1} << 62, 1, 1}};
  for (const Size& size : hostile) {
    std::byte memory[256];
    Arena placing{Workspace(memory)};
    EXPECT_TRUE(placing.take<double>(size.a, size.b, size.c).empty()) << size.a;
    EXPECT_TRUE(placing.overflowed()) << size.a;
    EXPECT_EQ(check(placing).code(), StatusCode::workspace_too_small) << size.a;
    EXPECT_EQ(check(placing).argument(), "workspace");
    Arena measuring;
    static_cast<void>(measuring.take<double>(size.a, size.b, size.c));
    EXPECT_EQ(measuring.required_bytes(), kMost) << size.a << " " << size.b << " " << size.c;
    static_cast<void>(measuring.take<double>(100));
    EXPECT_EQ(measuring.required_bytes(), kMost) << "more does not wrap around";
  }
}

TEST(ArenaTest, NothingTimesAnythingIsNothing) {
  Arena arena;
  static_cast<void>(arena.take<double>(0, INT64_MAX, INT64_MAX));
  EXPECT_EQ(arena.required_bytes(), Arena::kAlignment);
}

TEST(ArenaTest, AfterOverflowNothingMoreIsGivenOut) {
  std::byte memory[256];
  Arena arena{Workspace(memory)};
  static_cast<void>(arena.take<float>(1000));
  arena.rewind(0);
  EXPECT_TRUE(arena.take<float>(1).empty());
  EXPECT_TRUE(arena.overflowed());
}

TEST(ArenaTest, NoMemoryIsEnoughForNothing) {
  Arena arena{Workspace()};
  EXPECT_TRUE(check(arena).ok());
  EXPECT_TRUE(arena.take<float>(0).empty());
  EXPECT_TRUE(check(arena).ok());
  static_cast<void>(arena.take<float>(1));
  EXPECT_FALSE(check(arena).ok());
}

}  // namespace
}  // namespace kvfold::detail
