// The sequences of padded and packed batches: each view has the rows of its sequence, and no others.
#include <kvfold/compressor.hpp>
#include <kvfold/view/sequences.hpp>

#include <cstdint>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "builders.hpp"
#include "merge_oracle.hpp"

namespace kvfold::test {
namespace {

constexpr LayerShape kLayer{.kv_heads = 2, .group_size = 2, .key_dim = 4, .value_dim = 3};
constexpr Index kHeads = 2, kTokens = 6;

/// A number that says whose element it is. Padding has the token -1.
float element(Index sequence, Index token, Index head, Index dim) {
  return static_cast<float>(((sequence * 100 + token) * 10 + head) * 10 + dim);
}

/// A padded tensor of sequences of `lengths`.
struct Padded {
  std::vector<int> lengths;
  std::vector<float> keys, values, masses;
  std::vector<Index> rows;
  std::vector<Position> positions;
  PaddedBatch<float> batch;

  explicit Padded(const std::vector<int>& of, Padding padding = Padding::right, bool head_major = true) : lengths(of) {
    const auto B = static_cast<Index>(lengths.size());
    const auto strides = [&](Index width) {
      return head_major ? BatchStrides::head_major(kHeads, kTokens, width)
                        : BatchStrides::token_major(kHeads, kTokens, width);
    };
    keys.assign(ix(B * kHeads * kTokens * 4), -1.f);
    values.assign(ix(B * kHeads * kTokens * 3), -1.f);
    rows.assign(ix(B * kHeads), 0);
    EXPECT_TRUE(set_rows(lengths, kHeads, rows).ok());
    batch = {.layer = kLayer,
             .sequences = B,
             .tokens = kTokens,
             .keys = keys.data(),
             .key_strides = strides(4),
             .values = values.data(),
             .value_strides = strides(3),
             .padding = padding,
             .rows = rows};
    for (Index b = 0; b < B; ++b) {
      const Index pad = padding == Padding::left ? kTokens - lengths[ix(b)] : 0;
      for (Index t = 0; t < lengths[ix(b)]; ++t) {
        const auto put = [&](std::vector<float>& all, Index h, Index d, Index width) {
          const Index column = pad + t;
          const Index row = head_major ? (b * kHeads + h) * kTokens + column : (b * kTokens + column) * kHeads + h;
          all[ix(row * width + d)] = element(b, t, h, d);
        };
        for (Index h = 0; h < kHeads; ++h) {
          for (Index d = 0; d < 4; ++d) put(keys, h, d, 4);
          for (Index d = 0; d < 3; ++d) put(values, h, d, 3);
        }
      }
    }
  }
  Padded(const Padded&) = delete;
  Padded& operator=(const Padded&) = delete;

  void give_lists() {
    for (std::size_t i = 0; i < lengths.size() * ix(kHeads * kTokens); ++i) {
      positions.push_back(static_cast<Position>(i));
      masses.push_back(static_cast<float>(i) / 8.f);
    }
    batch.positions = positions;
    batch.log_masses = masses;
  }
  [[nodiscard]] Result<StridedView<float>> view(Index b) const { return padded_sequence(batch, lengths, b); }
};

void expect_rows_of(const StridedView<float>& view, Index sequence, Index length) {
  ASSERT_EQ(view.shape(), kLayer);
  for (Index h = 0; h < kHeads; ++h) {
    ASSERT_EQ(view.size(h), length);
    const OracleHead head = read_head(view, h);
    for (Index t = 0; t < length; ++t) {
      for (Index d = 0; d < 4; ++d) EXPECT_EQ(head.keys[ix(t)][ix(d)], element(sequence, t, h, d));
      for (Index d = 0; d < 3; ++d) EXPECT_EQ(head.values[ix(t)][ix(d)], element(sequence, t, h, d));
    }
  }
}

// --- Padded ----------------------------------------------------------------------------------------------------

class PaddedSequences : public testing::TestWithParam<std::tuple<Padding, bool>> {};
INSTANTIATE_TEST_SUITE_P(Layouts, PaddedSequences,
                         testing::Combine(testing::Values(Padding::left, Padding::right), testing::Bool()),
                         [](const auto& layout) {
                           return std::string(std::get<0>(layout.param) == Padding::left ? "Left" : "Right") +
                                  (std::get<1>(layout.param) ? "HeadMajor" : "TokenMajor");
                         });

TEST_P(PaddedSequences, HaveTheirOwnRowsWithoutPadding) {
  const Padded padded({3, 6, 1}, std::get<0>(GetParam()), std::get<1>(GetParam()));
  for (Index b = 0; b < 3; ++b) expect_rows_of(padded.view(b).value(), b, padded.lengths[ix(b)]);
}

TEST_P(PaddedSequences, BeginAtTheFirstPositionWithTheFirstRealToken) {
  Padded padded({3, 6}, std::get<0>(GetParam()), std::get<1>(GetParam()));
  EXPECT_EQ(padded.view(0)->position(0, 0), 0);
  EXPECT_EQ(padded.view(0)->position(1, 2), 2);
  padded.batch.first_position = 7;
  EXPECT_EQ(padded.view(0)->position(0, 0), 7);
  EXPECT_EQ(padded.view(1)->position(1, 5), 12);
}

TEST_P(PaddedSequences, TakeTheListEntriesOfTheirColumns) {
  Padded padded({3, 6, 2}, std::get<0>(GetParam()), std::get<1>(GetParam()));
  padded.give_lists();
  for (Index b = 0; b < 3; ++b) {
    const Index pad = std::get<0>(GetParam()) == Padding::left ? kTokens - padded.lengths[ix(b)] : 0;
    const auto view = padded.view(b).value();
    for (Index h = 0; h < kHeads; ++h) {
      for (Index t = 0; t < padded.lengths[ix(b)]; ++t) {
        const Index entry = (b * kHeads + h) * kTokens + pad + t;
        EXPECT_EQ(view.position(h, t), entry);
        EXPECT_EQ(view.log_mass(h, t), static_cast<float>(entry) / 8.f);
      }
    }
  }
}

TEST_P(PaddedSequences, AreCompressedWithoutTouchingPaddingOrNeighbours) {
  Padded padded({5, 6, 4}, std::get<0>(GetParam()), std::get<1>(GetParam()));
  const Padded whole({5, 6, 4}, std::get<0>(GetParam()), std::get<1>(GetParam()));
  auto view = padded.view(1).value();
  ASSERT_TRUE(StreamingLlm({.score = {.sinks = 1}, .budget = {.rows = 3}}).compress(view, NoEvidence{}).ok());
  EXPECT_EQ(padded.rows, (std::vector<Index>{5, 5, 3, 3, 4, 4}));
  for (Index h = 0; h < kHeads; ++h) {
    EXPECT_EQ(read_head(view, h).keys[0][0], element(1, 0, h, 0));
    EXPECT_EQ(read_head(view, h).keys[1][0], element(1, 4, h, 0));
    EXPECT_EQ(read_head(view, h).keys[2][0], element(1, 5, h, 0));
  }
  for (const Index b : {0, 2}) expect_rows_of(padded.view(b).value(), b, padded.lengths[ix(b)]);
  const std::size_t block = ix(kHeads * kTokens * 4);
  for (std::size_t i = 0; i < padded.keys.size(); ++i) {
    if (i / block != 1) {
      EXPECT_EQ(padded.keys[i], whole.keys[i]) << i;
    }
  }
}

TEST(PaddedSequence, CanBeReadOnly) {
  Padded padded({3});
  const PaddedBatch<const float> batch{.layer = kLayer,
                                       .sequences = 1,
                                       .tokens = kTokens,
                                       .keys = padded.keys.data(),
                                       .key_strides = padded.batch.key_strides,
                                       .values = padded.values.data(),
                                       .value_strides = padded.batch.value_strides,
                                       .rows = padded.rows};
  const auto view = padded_sequence(batch, padded.lengths, 0);
  ASSERT_TRUE(view.ok());
  EXPECT_EQ(view->keys, padded.keys.data());
}

void expect_refused(const Status& status, StatusCode code, std::string_view argument, Index row = -1) {
  EXPECT_EQ(status.code(), code) << argument;
  EXPECT_EQ(status.argument(), argument);
  EXPECT_EQ(status.row(), row);
}

TEST(PaddedSequence, LengthsOutOfRangeAreRefusedForTheirSequenceOnly) {
  Padded padded({3, 3, 3});
  for (const int bad : {0, -1, INT32_MIN, 7, INT32_MAX}) {
    padded.lengths[1] = bad;
    expect_refused(padded.view(1).status(), StatusCode::invalid_argument, "lengths", 1);
    EXPECT_TRUE(padded.view(0).ok());
    EXPECT_TRUE(padded.view(2).ok());
  }
  const std::vector<std::uint64_t> huge(3, UINT64_MAX);
  expect_refused(padded_sequence(padded.batch, huge, 1).status(), StatusCode::invalid_argument, "lengths", 1);
  const std::vector<int> two{3, 3};
  expect_refused(padded_sequence(padded.batch, two, 1).status(), StatusCode::size_mismatch, "lengths");
}

TEST(PaddedSequence, ABadMemberIsNamed) {
  const auto expect = [](StatusCode code, std::string_view argument, auto change) {
    Padded padded({3, 4});
    padded.give_lists();
    ASSERT_TRUE(padded.view(1).ok());
    change(padded.batch);
    expect_refused(padded.view(1).status(), code, argument);
  };
  using Batch = PaddedBatch<float>;
  for (const Index bad : {Index{0}, Index{-1}, kMaxHeads + 1, INT64_MIN, INT64_MAX}) {
    expect(StatusCode::invalid_argument, "layer", [&](Batch& b) { b.layer.kv_heads = bad; });
    expect(StatusCode::invalid_argument, "layer", [&](Batch& b) { b.layer.key_dim = bad; });
    expect(StatusCode::invalid_argument, "layer", [&](Batch& b) { b.layer.value_dim = bad; });
  }
  expect(StatusCode::invalid_argument, "batch", [](Batch& b) { b.sequences = 0; });
  expect(StatusCode::invalid_argument, "batch", [](Batch& b) { b.tokens = 0; });
  expect(StatusCode::invalid_argument, "batch", [](Batch& b) { b.tokens = -5; });
  expect(StatusCode::invalid_argument, "keys", [](Batch& b) { b.keys = nullptr; });
  expect(StatusCode::invalid_argument, "values", [](Batch& b) { b.values = nullptr; });
  expect(StatusCode::size_mismatch, "rows", [](Batch& b) { b.rows = b.rows.first(3); });
  expect(StatusCode::size_mismatch, "rows", [](Batch& b) { b.sequences = INT64_MAX; });
  expect(StatusCode::size_mismatch, "positions", [](Batch& b) { b.positions = b.positions.first(5); });
  expect(StatusCode::size_mismatch, "log_masses", [](Batch& b) { b.log_masses = b.log_masses.first(5); });
  for (const Index bad : {Index{-1}, INT64_MIN, INT64_MAX, INT64_MAX / 4}) {
    expect(StatusCode::invalid_argument, "key_strides", [&](Batch& b) { b.key_strides.sequence = bad; });
    expect(StatusCode::invalid_argument, "key_strides", [&](Batch& b) { b.key_strides.row.head = bad; });
    expect(StatusCode::invalid_argument, "value_strides", [&](Batch& b) { b.value_strides.row.token = bad; });
    expect(StatusCode::invalid_argument, "value_strides", [&](Batch& b) { b.value_strides.row.dim = bad; });
  }
}

TEST(PaddedSequence, ASequenceOutOfRangeIsRefused) {
  const Padded padded({3, 4});
  for (const Index b : {Index{-1}, Index{2}, INT64_MIN, INT64_MAX}) {
    expect_refused(padded.view(b).status(), StatusCode::invalid_argument, "b");
  }
}

TEST(PaddedSequence, CountsBeyondTheSequenceAreRefused) {
  Padded padded({3, 4});
  for (const Index bad : {Index{-1}, Index{5}, INT64_MAX}) {
    padded.rows[3] = bad;
    const Status status = padded.view(1).status();
    expect_refused(status, StatusCode::invalid_argument, "rows");
    EXPECT_EQ(status.head(), 1);
    EXPECT_TRUE(padded.view(0).ok());
  }
}

TEST(BatchStridesOf, SizesThatOverflowAreRefused) {
  Padded padded({3, 4});
  padded.batch.key_strides = BatchStrides::head_major(INT64_MAX, INT64_MAX, 4);
  expect_refused(padded.view(0).status(), StatusCode::invalid_argument, "key_strides");
  padded.batch.key_strides = BatchStrides::token_major(INT64_MAX, 2, 4);
  expect_refused(padded.view(0).status(), StatusCode::invalid_argument, "key_strides");
}

TEST(SetRows, GivesEveryHeadTheLengthOfItsSequence) {
  std::vector<Index> rows(6, -1);
  EXPECT_TRUE(set_rows(std::vector<std::int32_t>{3, 0, 5}, 2, rows).ok());
  EXPECT_EQ(rows, (std::vector<Index>{3, 3, 0, 0, 5, 5}));
}

TEST(SetRows, ABadArgumentIsNamedAndNothingIsWritten) {
  std::vector<Index> rows(4, -1);
  expect_refused(set_rows(std::vector<int>{1, -2}, 2, rows), StatusCode::invalid_argument, "lengths", 1);
  expect_refused(set_rows(std::vector<int>{1, 2}, 0, rows), StatusCode::invalid_argument, "heads");
  expect_refused(set_rows(std::vector<int>{1, 2}, kMaxHeads + 1, rows), StatusCode::invalid_argument, "heads");
  expect_refused(set_rows(std::vector<int>{1, 2, 3}, 2, rows), StatusCode::size_mismatch, "rows");
  EXPECT_EQ(rows, std::vector<Index>(4, -1));
}

// --- Packed ----------------------------------------------------------------------------------------------------

/// Sequences of 3, 1 and 4 tokens, one after the other.
struct Packed {
  std::vector<std::int32_t> cumulative{0, 3, 4, 8};
  std::vector<float> keys, values, masses;
  std::vector<Index> rows{3, 3, 1, 1, 4, 4};
  std::vector<Position> positions;
  PackedBatch<float> batch;

  Packed() {
    for (Index b = 0; b < 3; ++b) {
      for (Index t = 0; t < length(b); ++t) {
        for (Index h = 0; h < kHeads; ++h) {
          for (Index d = 0; d < 4; ++d) keys.push_back(element(b, t, h, d));
          for (Index d = 0; d < 3; ++d) values.push_back(element(b, t, h, d));
        }
      }
    }
    batch = {.layer = kLayer, .sequences = 3, .tokens = 8, .keys = keys.data(), .values = values.data(), .rows = rows};
  }
  Packed(const Packed&) = delete;
  Packed& operator=(const Packed&) = delete;

  void give_lists() {
    for (Index i = 0; i < kHeads * 8; ++i) {
      positions.push_back(i);
      masses.push_back(static_cast<float>(i) / 8.f);
    }
    batch.positions = positions;
    batch.log_masses = masses;
  }
  [[nodiscard]] Index length(Index b) const { return cumulative[ix(b + 1)] - cumulative[ix(b)]; }
  [[nodiscard]] Result<StridedView<float>> view(Index b) const { return packed_sequence(batch, cumulative, b); }
};

TEST(PackedSequence, HasItsOwnRows) {
  const Packed packed;
  for (Index b = 0; b < 3; ++b) expect_rows_of(packed.view(b).value(), b, packed.length(b));
}

TEST(PackedSequence, BeginsAtTheFirstPosition) {
  Packed packed;
  EXPECT_EQ(packed.view(2)->position(0, 3), 3);
  packed.batch.first_position = 5;
  EXPECT_EQ(packed.view(2)->position(0, 3), 8);
}

TEST(PackedSequence, TakesTheListEntriesOfItsTokens) {
  Packed packed;
  packed.give_lists();
  for (Index b = 0; b < 3; ++b) {
    for (Index h = 0; h < kHeads; ++h) {
      for (Index t = 0; t < packed.length(b); ++t) {
        const Index entry = h * 8 + packed.cumulative[ix(b)] + t;
        EXPECT_EQ(packed.view(b)->position(h, t), entry);
        EXPECT_EQ(packed.view(b)->log_mass(h, t), static_cast<float>(entry) / 8.f);
      }
    }
  }
}

TEST(PackedSequence, IsCompressedWithoutTouchingItsNeighbours) {
  Packed packed;
  auto view = packed.view(0).value();
  ASSERT_TRUE(StreamingLlm({.score = {.sinks = 1}, .budget = {.rows = 2}}).compress(view, NoEvidence{}).ok());
  EXPECT_EQ(packed.rows, (std::vector<Index>{2, 2, 1, 1, 4, 4}));
  for (const Index b : {1, 2}) expect_rows_of(packed.view(b).value(), b, packed.length(b));
}

TEST(PackedSequence, CumulativeLengthsThatDoNotAscendOrEndInTimeAreRefused) {
  const auto expect = [](const std::vector<std::int32_t>& cumulative, StatusCode code, Index row) {
    Packed packed;
    packed.cumulative = cumulative;
    expect_refused(packed.view(0).status(), code, "cumulative_lengths", row);
  };
  expect({0, 3, 2, 8}, StatusCode::invalid_argument, 2);
  expect({0, 3, 4, 9}, StatusCode::invalid_argument, 3);
  expect({0, 3, 4, INT32_MIN}, StatusCode::invalid_argument, 3);
  expect({1, 3, 4, 8}, StatusCode::invalid_argument, 0);
  expect({-1, 3, 4, 8}, StatusCode::invalid_argument, 0);
  expect({0, 3, 8}, StatusCode::size_mismatch, -1);
  expect({}, StatusCode::size_mismatch, -1);
}

TEST(PackedSequence, AnEmptySequenceIsRefusedAndTheOthersAreNot) {
  Packed packed;
  packed.cumulative = {0, 3, 3, 8};
  packed.rows = {3, 3, 0, 0, 4, 4};
  packed.batch.rows = packed.rows;
  expect_refused(packed.view(1).status(), StatusCode::invalid_argument, "cumulative_lengths", 1);
  EXPECT_TRUE(packed.view(0).ok());
  EXPECT_TRUE(packed.view(2).ok());
}

TEST(PackedSequence, ABadMemberIsNamed) {
  const auto expect = [](StatusCode code, std::string_view argument, auto change) {
    Packed packed;
    packed.give_lists();
    ASSERT_TRUE(packed.view(1).ok());
    change(packed);
    expect_refused(packed.view(1).status(), code, argument);
  };
  expect(StatusCode::invalid_argument, "layer", [](Packed& p) { p.batch.layer.kv_heads = 0; });
  expect(StatusCode::invalid_argument, "batch", [](Packed& p) { p.batch.sequences = -1; });
  expect(StatusCode::invalid_argument, "batch", [](Packed& p) { p.batch.tokens = 0; });
  expect(StatusCode::invalid_argument, "tokens", [](Packed& p) { p.batch.tokens = INT64_MAX; });
  expect(StatusCode::invalid_argument, "keys", [](Packed& p) { p.batch.keys = nullptr; });
  expect(StatusCode::invalid_argument, "values", [](Packed& p) { p.batch.values = nullptr; });
  expect(StatusCode::size_mismatch, "rows", [](Packed& p) { p.batch.rows = {}; });
  expect(StatusCode::invalid_argument, "rows", [](Packed& p) { p.rows[2] = 2; });
  expect(StatusCode::size_mismatch, "positions", [](Packed& p) { p.batch.positions = p.batch.positions.first(8); });
  expect(StatusCode::size_mismatch, "log_masses", [](Packed& p) { p.batch.log_masses = p.batch.log_masses.first(8); });
  const Packed packed;
  for (const Index b : {Index{-1}, Index{3}}) {
    expect_refused(packed.view(b).status(), StatusCode::invalid_argument, "b");
  }
}

// --- Sizes from outside ----------------------------------------------------------------------------------------

}  // namespace
}  // namespace kvfold::test
