// Rows at addresses that are not aligned for their type: the same floats and the same bytes as aligned ones.
#include <kvfold/detail/packed_rows.hpp>

#include <cstddef>
#include <cstring>
#include <vector>

#include <gtest/gtest.h>

#include "builders.hpp"

namespace kvfold {
namespace {

std::size_t at(Index i) { return static_cast<std::size_t>(i); }

template <class E>
class PackedRowsTest : public testing::Test {};
using Types = testing::Types<float, Float16, BFloat16, Float8E4M3, BlockQ8_0, BlockQ4_0>;
TYPED_TEST_SUITE(PackedRowsTest, Types);

static_assert(detail::Packable<float> && detail::Packable<BlockQ4_0> && !detail::Packable<Int8>);

template <class E>
std::vector<E> units_of(const std::vector<float>& floats) {
  std::vector<E> out(floats.size() / at(kUnit<E>));
  detail::write_row<E>(floats.data(), static_cast<Index>(floats.size()), out.data(), 1, nullptr);
  return out;
}

TYPED_TEST(PackedRowsTest, AreReadAtAnyAddressAndLength) {
  using E = TypeParam;
  test::Random random(1);
  for (const Index units : {1, 63, 64, 65, 200}) {
    const std::vector<E> stored = units_of<E>(test::normals(units * kUnit<E>, random));
    std::vector<float> expected(at(units * kUnit<E>)), read(expected.size());
    detail::load_units(stored.data(), units, expected.data());
    for (const std::size_t shift : {0u, 1u, 2u, 3u}) {
      std::vector<std::byte> bytes(shift + stored.size() * sizeof(E));
      std::memcpy(bytes.data() + shift, stored.data(), stored.size() * sizeof(E));
      detail::load_packed<E>(bytes.data() + shift, units, read.data());
      ASSERT_EQ(read, expected) << units << " units, shifted by " << shift;
    }
  }
}

TYPED_TEST(PackedRowsTest, AreWrittenAtAnyAddressAndStride) {
  using E = TypeParam;
  test::Random random(2);
  for (const Index units : {1, 64, 65, 150}) {
    const std::vector<float> floats = test::normals(units * kUnit<E>, random);
    const std::vector<E> expected = units_of<E>(floats);
    for (const Index gap : {0, 1, 5}) {
      const Index stride = static_cast<Index>(sizeof(E)) + gap;
      std::vector<std::byte> bytes(at(1 + units * stride), std::byte{0xcd});
      detail::store_packed<E>(floats.data(), units, bytes.data() + 1, stride);
      ASSERT_EQ(bytes[0], std::byte{0xcd});
      for (Index i = 0; i < units; ++i) {
        const std::byte* unit = bytes.data() + 1 + i * stride;
        ASSERT_EQ(std::memcmp(unit, &expected[at(i)], sizeof(E)), 0) << i;
        for (Index g = 0; g < gap; ++g) ASSERT_EQ(unit[static_cast<Index>(sizeof(E)) + g], std::byte{0xcd});
      }
    }
  }
}

TYPED_TEST(PackedRowsTest, AreReadFromColumns) {
  using E = TypeParam;
  if constexpr (Element<E>) {
    constexpr Index kWidth = 7, kColumn = 41;
    test::Random random(3);
    const std::vector<E> stored = units_of<E>(test::normals(kWidth * kColumn, random));
    std::vector<std::byte> bytes(1 + stored.size() * sizeof(E));
    std::memcpy(bytes.data() + 1, stored.data(), stored.size() * sizeof(E));
    const auto size = static_cast<Index>(sizeof(E));
    for (const Index n : {1, 15, 16, 17, 38}) {
      std::vector<float> expected(at(n * kWidth)), read(expected.size());
      detail::read_rows<E>(stored.data() + 3, 1, kColumn, n, kWidth, nullptr, 0, expected.data());
      detail::load_packed_columns<E>(bytes.data() + 1 + 3 * size, kColumn * size, n, kWidth, read.data());
      ASSERT_EQ(read, expected) << n << " rows";
    }
  }
}

}  // namespace
}  // namespace kvfold
