// Where rows of a view lie, and where they are told to lie.
#include <kvfold/detail/stored_rows.hpp>

#include <type_traits>
#include <vector>

#include <gtest/gtest.h>

namespace kvfold::test {
namespace {

using detail::kMostAhead;
using detail::RowsAnywhere;
using detail::RowsTogether;

constexpr Index kUnits = 64, kSize = 400;

/// Rows [t, t + n) of a head of kSize rows that lie at `stride` in pages of kPage, whose places are in reverse order.
struct Pages {
  Index stride, page;
  std::vector<float> memory = std::vector<float>(static_cast<std::size_t>(2 * kSize * stride));
  std::vector<float> scales = {};

  [[nodiscard]] const float* row(Index t) const {
    const Index pages = kSize / page;
    return memory.data() + ((pages - 1 - t / page) * page + t % page) * stride;
  }
  [[nodiscard]] StoredRows<float> operator()(Index t, Index n) const {
    return {row(t), stride, std::min(n, page - t % page), scales.empty() ? nullptr : scales.data() + 2 * t, 2};
  }
};

template <class Rows>
constexpr bool kTogether = false;
template <Stored E, detail::Cache kFar>
constexpr bool kTogether<RowsTogether<E, kFar>> = true;

/// What `with_stored_rows` calls with.
struct Located {
  bool called = false, together = false, scaled = false;
  Index count = 0, ahead = 0;
  std::vector<const float*> rows;  // and those ahead
  std::vector<float> scales;
};

template <class F>
Located locate(const F& stored, Index t, Index n) {
  Located got;
  std::vector<const void*> to(static_cast<std::size_t>(n + kMostAhead));
  std::vector<float> scales(static_cast<std::size_t>(n));
  const auto keep = [&](const auto& rows, bool scaled) {
    got.together = kTogether<std::remove_cvref_t<decltype(rows)>>;
    got.count = rows.count;
    if constexpr (std::is_same_v<std::remove_cvref_t<decltype(rows)>, RowsAnywhere<float>>) got.ahead = rows.ahead;
    for (Index i = 0; i < rows.count + got.ahead; ++i) got.rows.push_back(rows.row(i));
    got.scaled = scaled;
  };
  got.called = detail::with_stored_rows<float>(stored, kUnits, t, n, kSize, to.data(), scales.data(), keep);
  got.scales = scales;
  return got;
}

void expect_rows(const Located& got, const Pages& pages, Index t, Index n) {
  ASSERT_TRUE(got.called);
  EXPECT_EQ(got.count, n);
  ASSERT_EQ(static_cast<Index>(got.rows.size()), n + got.ahead);
  for (Index i = 0; i < n + got.ahead; ++i) {
    EXPECT_EQ(got.rows[static_cast<std::size_t>(i)], pages.row(std::min(t + i, kSize - 1))) << i;
  }
}

TEST(StoredRowsOfAView, AreTogetherWhereNothingIsBetweenThem) {
  const Pages pages{kUnits, kSize};
  const Located got = locate(pages, 10, 100);
  EXPECT_TRUE(got.together);
  expect_rows(got, pages, 10, 100);
}

TEST(StoredRowsOfAView, AreAnywhereWhereThereAreGapsOrPages) {
  for (const auto& [stride, page] : {std::pair<Index, Index>{kUnits + 1, kSize}, {3 * kUnits, kSize}, {kUnits, 16}}) {
    const Pages pages{stride, page};
    for (const auto& [t, n] : {std::pair<Index, Index>{0, 100}, {5, 17}, {380, 20}, {382, 3}}) {
      SCOPED_TRACE(testing::Message() << "stride " << stride << ", pages of " << page << ", rows from " << t);
      const Located got = locate(pages, t, n);
      EXPECT_FALSE(got.together);
      EXPECT_EQ(got.ahead, 32);  // 8 KiB of rows of 256 bytes
      expect_rows(got, pages, t, n);
    }
  }
}

TEST(StoredRowsOfAView, WithinOnePageAreTogether) {
  const Pages pages{kUnits, 16};
  EXPECT_TRUE(locate(pages, 16, 16).together);
  EXPECT_FALSE(locate(pages, 17, 16).together);
}

TEST(StoredRowsOfAView, BringTheirScales) {
  for (const Index page : {kSize, Index{16}}) {
    Pages pages{kUnits, page};
    EXPECT_FALSE(locate(pages, 7, 30).scaled);
    for (Index i = 0; i < 2 * kSize; ++i) pages.scales.push_back(static_cast<float>(i));
    const Located got = locate(pages, 7, 30);
    EXPECT_TRUE(got.scaled);
    for (Index i = 0; i < 30; ++i) EXPECT_EQ(got.scales[static_cast<std::size_t>(i)], static_cast<float>(2 * (7 + i)));
  }
}

TEST(StoredRowsOfAView, MayHaveScalesInSomePages) {
  Pages pages{kUnits, 16};
  for (Index i = 0; i < 2 * kSize; ++i) pages.scales.push_back(static_cast<float>(i));
  const auto in_the_second = [&](Index t, Index n) {
    StoredRows<float> rows = pages(t, n);
    if (t / 16 != 1) rows.scales = nullptr;
    return rows;
  };
  const Located got = locate(in_the_second, 10, 30);
  EXPECT_TRUE(got.scaled);
  for (Index t = 10; t < 40; ++t) {
    EXPECT_EQ(got.scales[static_cast<std::size_t>(t - 10)], t / 16 == 1 ? static_cast<float>(2 * t) : 1.f) << t;
  }
}

TEST(StoredRowsOfAView, AreNotGivenWhereTheViewDoesNotTellOfAllOfThem) {
  EXPECT_FALSE(locate([](Index, Index) { return StoredRows<float>{}; }, 0, 10).called);
  const Pages pages{kUnits, 16};
  const auto some = [&](Index t, Index n) { return t < 16 ? pages(t, n) : StoredRows<float>{}; };
  EXPECT_TRUE(locate(some, 0, 16).called);
  EXPECT_FALSE(locate(some, 0, 17).called);
  const auto none_of_them = [&](Index t, Index) { return StoredRows<float>{pages.row(t), kUnits, 0}; };
  EXPECT_FALSE(locate(none_of_them, 0, 10).called);
}

TEST(StoredRowsOfAView, AreAskedForAheadAFewAtATime) {
  for (const Index units : {Index{1}, Index{1} << 16}) {
    std::vector<const void*> to(1 + kMostAhead);
    const float row = 0.f;
    float scale = 0.f;
    const auto stored = [&](Index, Index n) { return StoredRows<float>{&row, 0, n}; };
    EXPECT_TRUE(
        detail::with_stored_rows<float>(stored, units, 0, 1, kSize, to.data(), &scale, [&](const auto& rows, bool) {
          if constexpr (requires { rows.ahead; }) {
            EXPECT_EQ(rows.ahead, units == 1 ? kMostAhead : 1);
          } else {
            ADD_FAILURE() << "these rows are one";
          }
        }));
  }
}

}  // namespace
}  // namespace kvfold::test
