// The saved state of a llama.cpp sequence: what is in it, and what is refused.
#include <kvfold/adaptors/llama_state.hpp>
#include <kvfold/adaptors/llama_state_writer.hpp>
#include <kvfold/compressor.hpp>
#include <kvfold/view/strided.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string_view>
#include <vector>

#include <gtest/gtest.h>

#include "builders.hpp"
#include "llama_sequence.hpp"

namespace kvfold {
namespace {

using namespace test;

static_assert(KVCacheView<LlamaLayerView> && !MutableKVCacheView<LlamaLayerView>);
static_assert(HasRope<LlamaLayerView> && HasChannelRotation<LlamaLayerView> && HasRowCounts<LlamaLayerView>);
static_assert(HasRowBytes<LlamaLayerView> && !HasLogMass<LlamaLayerView>);

/// Where the default sequence of 13 cells has its cells, `v_trans`, and its first layer.
constexpr std::size_t kCells = 16, kKinds = kCells + 13 * 12, kFirstLayer = kKinds + 8;

template <class T>
void set(Bytes& bytes, std::size_t offset, T value) {
  std::memcpy(bytes.data() + offset, &value, sizeof(T));
}

TEST(LlamaState, HasTheSizesThatTheEngineHas) {
  struct Case {
    Type key, value;
    bool transposed;
    std::size_t bytes;
  };
  for (const Case& c :
       {Case{kF16, kF16, false, 34'578'744}, Case{kF16, kF16, true, 34'578'744}, Case{kF32, kF32, false, 69'138'744},
        Case{kF32, kF32, true, 69'138'744}, Case{kQ8, kQ8, false, 18'378'744}, Case{kQ8, kF16, true, 26'478'744}}) {
    Sequence s;
    s.key_type = c.key;
    s.value_type = c.value;
    s.transposed = c.transposed;
    s.layers = 30;
    s.heads = s.group = 3;
    s.key_dim = s.value_dim = 64;
    s.set_rows(1500);
    SCOPED_TRACE(name_of(s));
    s.keys.assign(30, std::vector<Bytes>(4500, Bytes(at(2 * c.key.bytes_of_32))));
    s.values.assign(30, std::vector<Bytes>(4500, Bytes(at(2 * c.value.bytes_of_32))));
    const Bytes bytes = s.state();
    ASSERT_EQ(bytes.size(), c.bytes);
    const Result<LlamaState> state = LlamaState::parse(bytes, s.model());
    ASSERT_TRUE(state.ok()) << state.status().detail();
    EXPECT_EQ(state->rows(), 1500);
    EXPECT_EQ(llama_state_bytes(state.value(), 1500).value(), c.bytes);
    EXPECT_EQ(llama_state_bytes(state.value(), 256).value() - llama_state_bytes(state.value(), 255).value(),
              at(12 + 30 * 6 * (c.key.bytes_of_32 + c.value.bytes_of_32)));
  }
}

TEST(LlamaState, ReadsWhatIsStoredAtAnyAddress) {
  for (const Sequence& s : all_kinds()) {
    SCOPED_TRACE(name_of(s));
    const Bytes bytes = s.state();
    for (const std::size_t shift : {0u, 1u, 2u, 3u}) {
      Bytes shifted(bytes.size() + shift);
      std::copy(bytes.begin(), bytes.end(), shifted.begin() + static_cast<std::ptrdiff_t>(shift));
      const Result<LlamaState> state = LlamaState::parse(std::span(shifted).subspan(shift), s.model());
      ASSERT_TRUE(state.ok()) << state.status().argument() << ": " << state.status().detail();
      expect_rows_of(state.value(), s);
    }
  }
}

TEST(LlamaState, ReadsPartsOfLongTransposedAndWideRows) {
  for (const bool transposed : {false, true}) {
    Sequence s;
    s.transposed = transposed;
    s.layers = 1;
    s.key_dim = 192;
    s.value_dim = 160;
    s.set_rows(53);  // more than three tiles
    const Bytes bytes = s.fill().state();
    const Result<LlamaState> state = LlamaState::parse(bytes, s.model());
    ASSERT_TRUE(state.ok());
    expect_rows_of(state.value(), s);
    std::vector<float> out(at(2 * s.value_dim));
    state->layer(0).read_values(1, 31, 2, out);
    auto expected = decode(s.value_type, s.value(0, 1, 31));
    const auto second = decode(s.value_type, s.value(0, 1, 32));
    expected.insert(expected.end(), second.begin(), second.end());
    EXPECT_EQ(out, expected);
  }
}

TEST(LlamaState, TellsWhatItHolds) {
  Sequence s;
  s.key_type = kQ8;
  s.transposed = true;
  s.positions.back() = 40;
  const Bytes bytes = s.fill().state();
  const LlamaState state = LlamaState::parse(bytes, s.model()).value();
  EXPECT_EQ(state.layers(), 3);
  EXPECT_EQ(state.rows(), 13);
  EXPECT_EQ(state.length(), 41);
  EXPECT_EQ(state.position(11), 11);
  EXPECT_EQ(state.sequence(), 5);
  EXPECT_EQ(state.key_type(), LlamaType::q8_0);
  EXPECT_EQ(state.value_type(), LlamaType::f16);
  EXPECT_TRUE(state.has_transposed_values());
  const LlamaLayerView view = state.layer(2);
  EXPECT_EQ(view.shape(), (LayerShape{2, 2, 64, 32}));
  EXPECT_EQ(view.size(1), 13);
  EXPECT_EQ(view.row_bytes(0), 68 + 64);
  EXPECT_EQ(view.row_counts(), RowCounts::per_model);
  EXPECT_EQ(view.rope().kind, RopeKind::adjacent);
}

TEST(LlamaState, TellsHowQuantisedRowsAreTurned) {
  struct Case {
    Type key, value;
    Index key_dim, value_dim, key_block, value_block;
    bool hadamard = true;
  };
  for (const Case& c :
       {Case{kQ8, kQ8, 64, 64, 64, 64}, Case{kQ4, kQ8, 128, 128, 128, 64}, Case{kQ8, kQ4, 192, 192, 64, 64},
        Case{kQ8, kQ8, 256, 320, 256, 64}, Case{kQ8, kQ8, 96, 96, 0, 0}, Case{kQ8, kF16, 64, 64, 64, 0},
        Case{kF16, kQ8, 64, 64, 0, 64}, Case{kF16, kF32, 64, 64, 0, 0}, Case{kQ8, kQ8, 128, 128, 0, 0, false}}) {
    Sequence s;
    s.key_type = c.key;
    s.value_type = c.value;
    s.key_dim = c.key_dim;
    s.value_dim = c.value_dim;
    const Bytes bytes = s.fill().state();
    LlamaModel model = s.model();
    model.hadamard = c.hadamard;
    const Result<LlamaState> state = LlamaState::parse(bytes, model);
    ASSERT_TRUE(state.ok());
    EXPECT_EQ(state->layer(1).channel_rotation().key_block, c.key_block) << c.key_dim;
    EXPECT_EQ(state->layer(1).channel_rotation().value_block, c.value_block) << c.value_dim;
  }
}

TEST(LlamaState, PlansAsAViewOnAlignedRowsDoes) {
  for (const bool transposed : {false, true}) {
    Sequence s;
    s.key_type = s.value_type = kF32;
    s.transposed = transposed;
    s.layers = 1;
    s.set_rows(90);
    const Bytes bytes = s.fill().state();
    const LlamaState state = LlamaState::parse(bytes, s.model()).value();
    std::vector<float> keys(at(90 * 2 * s.key_dim)), values(at(90 * 2 * s.value_dim));
    std::memcpy(keys.data(), &bytes[16 + 90 * 12 + 8 + 12], keys.size() * 4);
    std::memcpy(values.data(), &bytes[16 + 90 * 12 + 8 + 12 + keys.size() * 4 + 12], values.size() * 4);
    std::vector<Index> rows(2, 90);
    const StridedView<const float> aligned{
        .layer = s.model().shape,
        .keys = keys.data(),
        .key_strides = Strides::token_major(2, s.key_dim),
        .values = values.data(),
        .value_strides = transposed ? Strides::transposed(90, s.value_dim) : Strides::token_major(2, s.value_dim),
        .rows = rows,
        .counts = RowCounts::per_model};
    const OwnedQueries queries = make_queries(s.model().shape, 20, 90);
    EmsEvict::Options options;
    options.budget.rows = 24;
    const EmsEvict method(options);
    SerialExecutor executor;
    WorkspaceBuffer first, second;
    ASSERT_TRUE(first.reserve(method.workspace_bytes(state.layer(0), queries.view(), 1).value()).ok());
    ASSERT_TRUE(second.reserve(method.workspace_bytes(aligned, queries.view(), 1).value()).ok());
    const auto a = method.plan(state.layer(0), queries.view(), first.get(), executor);
    const auto b = method.plan(aligned, queries.view(), second.get(), executor);
    ASSERT_TRUE(a.ok() && b.ok()) << a.status().detail();
    EXPECT_TRUE(std::ranges::equal(a->kept, b->kept));
    EXPECT_EQ(a->kept_score_share, b->kept_score_share);
  }
}

// --- What is not a state ---------------------------------------------------------------------------------------------

/// The refusal names the field and the version.
void expect_refused(const Bytes& bytes, const LlamaModel& model, std::string_view field, StatusCode code,
                    Index row = -1) {
  const Result<LlamaState> state = LlamaState::parse(bytes, model);
  ASSERT_FALSE(state.ok()) << field;
  EXPECT_EQ(state.status().argument(), field) << state.status().detail();
  EXPECT_EQ(state.status().code(), code) << state.status().detail();
  EXPECT_EQ(state.status().row(), row);
  if (field != "model") {
    EXPECT_NE(state.status().detail().find("llama.cpp 0.5.0-dev, commit 0c1e57098"), std::string_view::npos);
  }
}

template <class T>
Bytes with(Bytes bytes, std::size_t offset, T value) {
  set(bytes, offset, value);
  return bytes;
}

TEST(LlamaStateRefusals, NameTheFieldOfTheStart) {
  const Sequence s = Sequence().fill();
  const Bytes bytes = s.state();
  using enum StatusCode;
  expect_refused(with(bytes, 0, std::uint32_t{0x67677371}), s.model(), "magic", invalid_argument);
  expect_refused(with(bytes, 4, std::int32_t{-1}), s.model(), "seq_id", invalid_argument);
  expect_refused(with(bytes, 4, std::int32_t{6}), s.model(), "cell seq_id", unsupported, 0);
  expect_refused(with(bytes, 8, std::uint32_t{0}), s.model(), "n_stream", invalid_argument);
  expect_refused(with(bytes, 8, std::uint32_t{0xffffffff}), s.model(), "n_stream", size_mismatch);
  expect_refused(with(bytes, 8, std::uint32_t{2}), s.model(), "cells", size_mismatch);
  expect_refused(with(bytes, 12, std::uint32_t{0xffffffff}), s.model(), "cells", size_mismatch);
  expect_refused(with(bytes, 12, std::uint32_t{0x7fffffff}), s.model(), "cells", size_mismatch);
  expect_refused(with(bytes, 12, std::uint32_t{14}), s.model(), "n_seq_id", unsupported, 13);
}

TEST(LlamaStateRefusals, CoverEmptySequences) {
  const LlamaModel model = Sequence().model();
  Bytes empty;
  append(empty, std::uint32_t{0xaf143cd8});
  append(empty, std::int32_t{0});
  append(empty, std::uint32_t{1});
  append(empty, std::uint32_t{0});
  ASSERT_EQ(empty.size(), 16u);  // as the engine's
  expect_refused(empty, model, "cells", StatusCode::invalid_argument);
  expect_refused({}, model, "magic", StatusCode::size_mismatch);
}

TEST(LlamaStateRefusals, CoverASecondStreamInUse) {
  Sequence s;
  s.streams = 2;
  Bytes bytes = s.fill().state();
  const Bytes all = bytes;
  set(bytes, bytes.size() - 4, std::uint32_t{13});
  bytes.insert(bytes.end(), all.begin() + 16, all.end() - 4);
  expect_refused(bytes, s.model(), "cells", StatusCode::unsupported);
}

TEST(LlamaStateRefusals, NameTheCell) {
  const Sequence s = Sequence().fill();
  const Bytes bytes = s.state();
  using enum StatusCode;
  expect_refused(with(bytes, kCells + 3 * 12 + 4, std::uint32_t{2}), s.model(), "n_seq_id", unsupported, 3);
  expect_refused(with(bytes, kCells + 3 * 12 + 4, std::uint32_t{0}), s.model(), "n_seq_id", unsupported, 3);
  expect_refused(with(bytes, kCells + 12 * 12 + 8, std::int32_t{4}), s.model(), "cell seq_id", unsupported, 12);
  expect_refused(with(bytes, kCells, std::int32_t{-1}), s.model(), "pos", unsupported, 0);
  expect_refused(with(bytes, kCells + 5 * 12, std::int32_t{4}), s.model(), "pos", unsupported, 5);
  expect_refused(with(bytes, kCells + 5 * 12, std::int32_t{6}), s.model(), "pos", unsupported, 6);
}

TEST(LlamaStateRefusals, CoverCellsOfSeveralSequences) {
  const Sequence s = Sequence().fill();
  Bytes bytes = s.state();
  set(bytes, kCells + 4, std::uint32_t{2});  // a shared cell lists both
  Bytes other;
  append(other, std::int32_t{9});
  bytes.insert(bytes.begin() + kCells + 12, other.begin(), other.end());
  expect_refused(bytes, s.model(), "n_seq_id", StatusCode::unsupported, 0);
}

TEST(LlamaStateRefusals, CoverPositionsOfSeveralAxes) {
  for (const std::size_t extra : {8u, 12u}) {
    const Sequence s = Sequence().fill();
    const Bytes plain = s.state();
    Bytes bytes(plain.begin(), plain.begin() + kCells);
    for (Index t = 0; t < 13; ++t) {
      append(bytes, std::int32_t{s.positions[at(t)]});
      append(bytes, std::uint32_t{1});
      for (std::size_t i = 0; i < extra; i += 4) append(bytes, std::int32_t{s.positions[at(t)]});
      append(bytes, s.id);
    }
    bytes.insert(bytes.end(), plain.begin() + kKinds, plain.end());
    expect_refused(bytes, s.model(), "cells", StatusCode::unsupported);
    for (std::size_t n = kCells; n < kCells + 13 * (12 + extra);
         ++n) {  // vectors of exact size: nothing beyond is read
      const Bytes shorter(bytes.begin(), bytes.begin() + static_cast<Index>(n));
      const Result<LlamaState> state = LlamaState::parse(shorter, s.model());
      ASSERT_FALSE(state.ok());
      EXPECT_EQ(state.status().argument(), n < kCells + 13 * 12 ? "cells" : "cell seq_id") << n << " bytes";
    }
  }
}

TEST(LlamaStateRefusals, NameTheFieldOfALayer) {
  Sequence s;
  const Bytes bytes = s.fill().state();
  const std::size_t second = kFirstLayer + 12 + 13 * 2 * 64 * 2;  // the second layer's K
  const std::size_t values = kFirstLayer + 3 * (12 + 13 * 2 * 64 * 2);
  using enum StatusCode;
  expect_refused(with(bytes, kKinds, std::uint32_t{2}), s.model(), "v_trans", invalid_argument);
  expect_refused(with(bytes, kKinds, std::uint32_t{1}), s.model(), "V elem_bytes", size_mismatch);
  expect_refused(with(bytes, kKinds + 4, std::uint32_t{2}), s.model(), "n_layer", size_mismatch);
  expect_refused(with(bytes, kFirstLayer, std::int32_t{3}), s.model(), "K type", unsupported);
  expect_refused(with(bytes, kFirstLayer, std::int32_t{-1}), s.model(), "K type", unsupported);
  expect_refused(with(bytes, kFirstLayer, std::int32_t{0}), s.model(), "K row_bytes", size_mismatch);
  expect_refused(with(bytes, second, std::int32_t{30}), s.model(), "K type", unsupported);
  expect_refused(with(bytes, kFirstLayer + 4, std::uint64_t{257}), s.model(), "K row_bytes", size_mismatch);
  expect_refused(with(bytes, second + 4, std::uint64_t{1} << 63), s.model(), "K row_bytes", size_mismatch);
  expect_refused(with(bytes, values, std::int32_t{14}), s.model(), "V type", unsupported);
  expect_refused(with(bytes, values + 4, std::uint64_t{127}), s.model(), "V row_bytes", size_mismatch);
  s.transposed = true;
  const Bytes turned = s.state();
  expect_refused(with(turned, kKinds, std::uint32_t{0}), s.model(), "V row_bytes", size_mismatch);
  expect_refused(with(turned, values, std::int32_t{8}), s.model(), "V type", unsupported);
  expect_refused(with(turned, values + 4, std::uint32_t{4}), s.model(), "V elem_bytes", size_mismatch);
  expect_refused(with(turned, values + 8, std::uint32_t{65}), s.model(), "V n_embd_v_gqa", size_mismatch);
}

TEST(LlamaStateRefusals, CoverBlocksThatHeadsShare) {
  Sequence s;
  s.key_type = kQ8;
  s.heads = 2;
  s.key_dim = 64;
  const Bytes bytes = s.fill().state();
  LlamaModel model = s.model();
  model.shape.kv_heads = 8;
  model.shape.key_dim = 16;  // the rows of all heads have the same bytes, but heads begin within blocks
  expect_refused(bytes, model, "K type", StatusCode::unsupported);
}

TEST(LlamaStateRefusals, CoverWhatFollows) {
  const Sequence s = Sequence().fill();
  Bytes bytes = s.state();
  bytes.push_back(std::byte{0});
  expect_refused(bytes, s.model(), "end", StatusCode::size_mismatch);
  const Bytes again = s.state();
  bytes = again;
  bytes.insert(bytes.end(), again.begin() + 8, again.end());  // the block of the layers with sliding windows
  expect_refused(bytes, s.model(), "end", StatusCode::size_mismatch);
}

TEST(LlamaStateRefusals, CoverOtherModels) {
  const Sequence s = Sequence().fill();
  const Bytes bytes = s.state();
  const auto changed = [&](auto change) {
    LlamaModel model = s.model();
    change(model);
    return model;
  };
  using enum StatusCode;
  expect_refused(bytes, changed([](LlamaModel& m) { m.layers = 4; }), "n_layer", size_mismatch);
  expect_refused(bytes, changed([](LlamaModel& m) { m.shape.kv_heads = 3; }), "K row_bytes", size_mismatch);
  expect_refused(bytes, changed([](LlamaModel& m) { m.shape.key_dim = 32; }), "K row_bytes", size_mismatch);
  expect_refused(bytes, changed([](LlamaModel& m) { m.shape.value_dim = 64; }), "V row_bytes", size_mismatch);
  const Index most = std::numeric_limits<Index>::max();
  for (const Index bad : {Index{-1}, Index{0}, (Index{1} << 16) + 1, most}) {
    expect_refused(bytes, changed([&](LlamaModel& m) { m.layers = bad; }), "model", invalid_argument);
    expect_refused(bytes, changed([&](LlamaModel& m) { m.shape.kv_heads = bad; }), "model", invalid_argument);
    expect_refused(bytes, changed([&](LlamaModel& m) { m.shape.group_size = bad; }), "model", invalid_argument);
    expect_refused(bytes, changed([&](LlamaModel& m) { m.shape.key_dim = bad; }), "model", invalid_argument);
    expect_refused(bytes, changed([&](LlamaModel& m) { m.shape.value_dim = bad; }), "model", invalid_argument);
  }
  expect_refused(bytes, changed([](LlamaModel& m) { m.shape.group_size = 1 << 16; }), "model", invalid_argument);
  // The largest rows that a model may have, in a state that names them and holds nothing.
  const LlamaModel largest = changed([](LlamaModel& m) { m.shape = {1 << 16, 1, 1 << 16, 1 << 16}; });
  Bytes hostile = with(bytes, kFirstLayer, std::int32_t{0});
  set(hostile, kFirstLayer + 4, std::uint64_t{1} << 34);
  expect_refused(hostile, largest, "K data", size_mismatch);
}

TEST(LlamaStateRefusals, CoverEveryTruncation) {
  for (Sequence s : all_kinds()) {
    SCOPED_TRACE(name_of(s));
    s.layers = 2;
    s.set_rows(3);
    s.streams = 2;
    const Bytes bytes = s.fill().state();
    ASSERT_TRUE(LlamaState::parse(bytes, s.model()).ok());
    for (std::size_t n = 0; n < bytes.size(); ++n) {
      const Bytes shorter(bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(n));
      const Result<LlamaState> state = LlamaState::parse(shorter, s.model());
      ASSERT_EQ(state.status().code(), StatusCode::size_mismatch) << n << " bytes";
    }
  }
}

TEST(LlamaStateRefusals, CoverEveryBitOfEveryHeader) {
  for (Sequence s : all_kinds()) {
    SCOPED_TRACE(name_of(s));
    s.streams = 3;
    s.stream = 1;
    std::vector<std::size_t> headers;
    const Bytes bytes = s.fill().state(&headers);
    const std::size_t cells = 12 + 2 * 4;
    ASSERT_EQ(headers.size(), cells + 13 * 12 + 8 + 6 * 12 + 4);
    for (const std::size_t byte : headers) {
      for (unsigned bit = 0; bit < 8; ++bit) {
        Bytes flipped = bytes;
        flipped[byte] ^= static_cast<std::byte>(1u << bit);
        const Result<LlamaState> state = LlamaState::parse(flipped, s.model());
        const bool is_position = byte >= cells && byte < cells + 13 * 12 && (byte - cells) % 12 < 4;
        if (is_position && state.ok()) {  // another position that ascends, too
          EXPECT_EQ(state->rows(), 13);
        } else {
          EXPECT_FALSE(state.ok()) << "byte " << byte << ", bit " << bit;
        }
      }
    }
  }
}

TEST(LlamaStateRefusals, SurviveRandomDamage) {
  Random random(2024);
  const std::vector<Sequence> kinds = all_kinds();
  Index accepted = 0;
  for (int round = 0; round < 4000; ++round) {
    const Sequence& s = kinds[at(random.below(static_cast<Index>(kinds.size())))];
    std::vector<std::size_t> headers;
    Bytes bytes = s.state(&headers);
    const Index changes = 1 + random.below(4);
    for (Index i = 0; i < changes; ++i) {
      const bool in_header = random.below(4) != 0;
      const std::size_t byte = in_header ? headers[at(random.below(static_cast<Index>(headers.size())))]
                                         : at(random.below(static_cast<Index>(bytes.size())));
      if (byte < bytes.size()) bytes[byte] = static_cast<std::byte>(random.below(256));
      if (random.below(16) == 0) bytes.resize(at(random.below(static_cast<Index>(bytes.size() + 64))));
    }
    const Bytes exact(bytes.begin(), bytes.end());  // so that the sanitiser sees its end
    const Result<LlamaState> state = LlamaState::parse(exact, s.model());
    if (!state.ok()) continue;
    ++accepted;
    ASSERT_EQ(exact.size(), s.state().size());
    ASSERT_EQ(state->rows(), 13);
    std::vector<float> floats(at(13 * 64));
    for (Index l = 0; l < 3; ++l) {
      for (Index h = 0; h < 2; ++h) {
        state->layer(l).read_keys(h, 0, 13, floats);
        state->layer(l).read_values(h, 0, 13, floats);
      }
    }
    Bytes out(llama_state_bytes(state.value(), 5).value());
    ASSERT_TRUE(write_llama_state(state.value(), for_all_layers(s, keep_first(s, 5).plan), out).ok());
  }
  EXPECT_GT(accepted, 50);  // damage to rows and positions goes unnoticed, as it must
}

}  // namespace
}  // namespace kvfold
