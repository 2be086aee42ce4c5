// The state of a llama.cpp sequence with fewer rows, byte by byte.
#include <kvfold/adaptors/llama_state_writer.hpp>
#include <kvfold/compressor.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <numeric>
#include <string_view>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "builders.hpp"
#include "llama_sequence.hpp"

namespace kvfold {
namespace {

using namespace test;

TEST(LlamaStateWriter, KeepingEverythingGivesTheSameBytes) {
  for (const Sequence& s : all_kinds()) {
    SCOPED_TRACE(name_of(s));
    const Bytes bytes = s.state();
    const LlamaState state = LlamaState::parse(bytes, s.model()).value();
    const OwnedPlan all = keep_first(s, s.rows());
    Bytes out(bytes.size() + 5, std::byte{0xcd});
    const auto written = write_llama_state(state, for_all_layers(s, all.plan), out);
    ASSERT_TRUE(written.ok()) << written.status().detail();
    EXPECT_TRUE(std::ranges::equal(written.value(), bytes));
    EXPECT_TRUE(std::all_of(out.end() - 5, out.end(), [](std::byte b) { return b == std::byte{0xcd}; }));
  }
}

TEST(LlamaStateWriter, KeepingEverythingOfAGappedSequenceChangesPositionsOnly) {
  Sequence s;
  s.positions = {0, 1, 5, 9, 10, 11, 12, 20, 21, 22, 23, 24, 30};
  const Bytes bytes = s.fill().state();
  const LlamaState state = LlamaState::parse(bytes, s.model()).value();
  const OwnedPlan all = keep_first(s, s.rows());
  Bytes out(bytes.size());
  ASSERT_TRUE(write_llama_state(state, for_all_layers(s, all.plan), out).ok());
  Sequence nominal = s;
  std::iota(nominal.positions.begin(), nominal.positions.end(), 18);  // N is 31
  EXPECT_EQ(out, nominal.state());
}

TEST(LlamaStateWriter, CompressesEveryKindToTheKeptBytes) {
  for (Sequence s : all_kinds()) {
    SCOPED_TRACE(name_of(s));
    s.set_rows(70);
    const Bytes bytes = s.fill(7).state();
    const LlamaState state = LlamaState::parse(bytes, s.model()).value();
    EmsEvict::Options options;
    options.budget.rows = 20;
    const EmsEvict method(options);
    SerialExecutor executor;
    WorkspaceBuffer space;  // shared by all layers
    const Index count = 20;
    Bytes out(llama_state_bytes(state, count).value());
    Result<LlamaStateWriter> writer = LlamaStateWriter::create(state, count, out);
    ASSERT_TRUE(writer.ok());
    std::vector<std::vector<std::vector<RowId>>> kept;
    bool heads_differ = false;
    for (Index l = 0; l < s.layers; ++l) {
      const LlamaLayerView view = state.layer(l);
      const OwnedQueries queries = make_queries(view.shape(), 16, 70, at(l) + 3);
      ASSERT_TRUE(space.reserve(method.workspace_bytes(view, queries.view(), 1).value()).ok());
      const auto plan = method.plan(view, queries.view(), space.get(), executor);
      ASSERT_TRUE(plan.ok()) << plan.status().detail();
      kept.emplace_back();
      for (Index h = 0; h < s.heads; ++h) {
        kept.back().emplace_back(plan->kept_rows(h).begin(), plan->kept_rows(h).end());
        ASSERT_EQ(kept.back().back().size(), 20u);
      }
      heads_differ = heads_differ || kept.back()[0] != kept.back()[1];
      EXPECT_EQ(writer->next_layer(), l);
      EXPECT_EQ(writer->finish().status().code(), StatusCode::size_mismatch);
      ASSERT_TRUE(writer->add_layer(plan.value()).ok());
    }
    EXPECT_TRUE(heads_differ);
    const auto written = writer->finish();
    ASSERT_TRUE(written.ok());
    const Sequence expected = kept_by(s, kept);
    EXPECT_EQ(Bytes(written->begin(), written->end()), expected.state());
    const Result<LlamaState> again = LlamaState::parse(written.value(), s.model());
    ASSERT_TRUE(again.ok()) << again.status().detail();
    EXPECT_EQ(again->length(), 70);
    EXPECT_EQ(again->position(0), 50);
    expect_rows_of(again.value(), expected);
  }
}

TEST(LlamaStateWriter, RewritesMergedRowsAndOnlyThem) {
  for (const Sequence& s : all_kinds()) {
    for (const bool with_keys : {false, true}) {
      SCOPED_TRACE(name_of(s) + (with_keys ? " with keys" : ""));
      const Bytes bytes = s.state();
      const LlamaState state = LlamaState::parse(bytes, s.model()).value();
      const std::vector<std::vector<RowId>> rows{{0, 3, 4, 12}, {1, 2, 7, 9}};
      OwnedPlan owned(s, rows);
      owned.merged = {{1, 2, 0.f}, {3, 1, 0.f}, {0, 1, 0.f}};
      owned.merged_offset = {0, 2, 3};
      Random random(9);
      owned.merged_values = normals(3 * s.value_dim, random, 2.f);
      if (with_keys) owned.merged_keys = normals(3 * s.key_dim, random, 2.f);
      Bytes out(llama_state_bytes(state, 4).value());
      ASSERT_TRUE(write_llama_state(state, for_all_layers(s, owned.refresh()), out).ok());

      Sequence expected = kept_by(s, std::vector<std::vector<std::vector<RowId>>>(at(s.layers), rows));
      const std::array<std::pair<Index, Index>, 3> places{{{0, 1}, {0, 3}, {1, 0}}};  // head, slot
      for (Index l = 0; l < s.layers; ++l) {
        for (std::size_t m = 0; m < 3; ++m) {
          const std::size_t place = at(places[m].second * s.heads + places[m].first);
          const auto row = [&](const std::vector<float>& all, Index width) {
            const auto first = all.begin() + static_cast<Index>(m) * width;
            return std::vector<float>(first, first + width);
          };
          expected.values[at(l)][place] = encode(s.value_type, row(owned.merged_values, s.value_dim));
          if (with_keys) expected.keys[at(l)][place] = encode(s.key_type, row(owned.merged_keys, s.key_dim));
        }
      }
      EXPECT_EQ(out, expected.state());
    }
  }
}

TEST(LlamaStateWriter, CarriesOutMergesWithoutMasses) {
  Sequence s;
  s.layers = 1;
  s.set_rows(60);
  const Bytes bytes = s.fill().state();
  const LlamaState state = LlamaState::parse(bytes, s.model()).value();
  Ems::Options options;
  options.budget.rows = 24;
  options.reduce.mass_mode = MassMode::none;
  options.reduce.key_mode = KeyMode::direction;
  const OwnedQueries queries = make_queries(s.model().shape, 16, 60);
  SerialExecutor executor;
  WorkspaceBuffer space;
  ASSERT_TRUE(space.reserve(Ems(options).workspace_bytes(state.layer(0), queries.view(), 1).value()).ok());
  const auto plan = Ems(options).plan(state.layer(0), queries.view(), space.get(), executor);
  ASSERT_TRUE(plan.ok()) << plan.status().detail();
  ASSERT_FALSE(plan->merged.empty());
  Bytes out(llama_state_bytes(state, 24).value());
  ASSERT_TRUE(write_llama_state(state, {&plan.value(), 1}, out).ok());
  const LlamaState merged = LlamaState::parse(out, s.model()).value();
  std::vector<float> value(at(s.value_dim));
  for (Index h = 0, m = 0; h < s.heads; ++h) {
    for (const MergedRow& row : plan->merged_rows(h)) {
      merged.layer(0).read_values(h, row.slot, 1, value);
      for (Index d = 0; d < s.value_dim; ++d) {
        EXPECT_EQ(value[at(d)], to_float(from_float<Float16>(plan->merged_values[at(m * s.value_dim + d)])));
      }
      ++m;
    }
  }

  options.reduce.mass_mode = MassMode::log_count;
  const auto heavy = Ems(options).plan(state.layer(0), queries.view(), space.get(), executor);
  EXPECT_EQ(heavy.status().code(), StatusCode::unsupported);
}

TEST(LlamaStateWriter, KeepsTheStreams) {
  for (const std::uint32_t stream : {0u, 2u, 3u}) {
    Sequence s;
    s.streams = 4;
    s.stream = stream;
    const Bytes bytes = s.fill().state();
    const Result<LlamaState> state = LlamaState::parse(bytes, s.model());
    ASSERT_TRUE(state.ok()) << state.status().detail();
    expect_rows_of(state.value(), s);
    const std::vector<std::vector<RowId>> rows{{0, 3, 4}, {1, 2, 12}};
    const OwnedPlan plan(s, rows);
    Bytes out(llama_state_bytes(state.value(), 3).value());
    ASSERT_TRUE(write_llama_state(state.value(), for_all_layers(s, plan.plan), out).ok());
    EXPECT_EQ(out, kept_by(s, std::vector<std::vector<std::vector<RowId>>>(3, rows)).state());
  }
}

TEST(LlamaStateWriter, ReachesTheLargestPosition) {
  Sequence s;
  s.positions.back() = std::numeric_limits<std::int32_t>::max();
  const Bytes bytes = s.fill().state();
  const LlamaState state = LlamaState::parse(bytes, s.model()).value();
  EXPECT_EQ(state.length(), Position{1} << 31);
  Bytes out(llama_state_bytes(state, 2).value());
  ASSERT_TRUE(write_llama_state(state, for_all_layers(s, keep_first(s, 2).plan), out).ok());
  EXPECT_EQ(LlamaState::parse(out, s.model())->length(), Position{1} << 31);
}

/// A status and nothing written.
void expect_refused(const LlamaState& state, std::span<const CompressionPlan> plans, std::string_view argument,
                    StatusCode code) {
  Bytes out(state.bytes().size(), std::byte{0xcd});
  const auto written = write_llama_state(state, plans, out);
  EXPECT_EQ(written.status().argument(), argument);
  EXPECT_EQ(written.status().code(), code) << written.status().detail();
  EXPECT_EQ(out, Bytes(out.size(), std::byte{0xcd}));
}

TEST(LlamaStateWriter, RefusesPlansThatDoNotFit) {
  const Sequence s = Sequence().fill();
  const Bytes bytes = s.state();
  const LlamaState state = LlamaState::parse(bytes, s.model()).value();
  const OwnedPlan good = keep_first(s, 4), more = keep_first(s, 5);
  const auto last_layer = [&](const CompressionPlan& bad) {
    std::vector<CompressionPlan> plans = for_all_layers(s, good.plan);
    plans.back() = bad;
    return plans;
  };
  expect_refused(state, {&good.plan, 1}, "plans", StatusCode::size_mismatch);
  expect_refused(state, {}, "plans", StatusCode::size_mismatch);
  expect_refused(state, for_all_layers(s, {}), "plan", StatusCode::size_mismatch);
  expect_refused(state, last_layer({}), "plan", StatusCode::size_mismatch);
  expect_refused(state, last_layer(more.plan), "plan", StatusCode::size_mismatch);
  expect_refused(state, last_layer(OwnedPlan(s, {{0, 1, 2, 3}, {0, 1, 2}}).plan), "plan", StatusCode::unsupported);
  expect_refused(state, last_layer(OwnedPlan(s, {{0, 1, 2, 3}, {0, 2, 1, 3}}).plan), "plan",
                 StatusCode::invalid_argument);
  expect_refused(state, last_layer(OwnedPlan(s, {{0, 1, 2, 3}, {0, 1, 2, 13}}).plan), "plan",
                 StatusCode::invalid_argument);
  expect_refused(state, last_layer(OwnedPlan(s, {{}, {}}).plan), "plan", StatusCode::invalid_argument);
  CompressionPlan heavy = good.plan;
  heavy.writes_log_mass = true;
  expect_refused(state, last_layer(heavy), "view", StatusCode::unsupported);
  Sequence longer = s;
  longer.set_rows(14);
  expect_refused(state, last_layer(keep_first(longer, 4).plan), "plan", StatusCode::size_mismatch);
}

TEST(LlamaStateWriter, RefusesCountsAndPlacesThatDoNotFit) {
  const Sequence s = Sequence().fill();
  Bytes bytes = s.state();
  const LlamaState state = LlamaState::parse(bytes, s.model()).value();
  for (const Index count : {Index{-1}, Index{0}, Index{14}, std::numeric_limits<Index>::max()}) {
    EXPECT_EQ(llama_state_bytes(state, count).status().argument(), "count");
    Bytes out(bytes.size());
    EXPECT_EQ(LlamaStateWriter::create(state, count, out).status().argument(), "count");
  }
  const std::size_t needed = llama_state_bytes(state, 4).value();
  Bytes small(needed - 1, std::byte{0xcd});
  EXPECT_EQ(LlamaStateWriter::create(state, 4, small).status().code(), StatusCode::size_mismatch);
  EXPECT_EQ(small, Bytes(needed - 1, std::byte{0xcd}));
  EXPECT_EQ(LlamaStateWriter::create(state, 4, {}).status().argument(), "out");

  const Bytes before = bytes;
  EXPECT_EQ(LlamaStateWriter::create(state, 4, bytes).status().code(), StatusCode::invalid_argument);
  EXPECT_EQ(LlamaStateWriter::create(state, 4, std::span(bytes).last(needed)).status().argument(), "out");
  EXPECT_EQ(bytes, before);

  Bytes out(needed, std::byte{0xcd});
  Result<LlamaStateWriter> writer = LlamaStateWriter::create(state, 4, out);
  const Bytes started = out;
  EXPECT_EQ(writer->add_layer(keep_first(s, 5).plan).argument(), "plan");
  EXPECT_EQ(out, started);
  EXPECT_EQ(writer->next_layer(), 0);
  for (Index l = 0; l < 3; ++l) EXPECT_TRUE(writer->add_layer(keep_first(s, 4).plan).ok());
  const Bytes done = out;
  EXPECT_EQ(writer->add_layer(keep_first(s, 4).plan).code(), StatusCode::invalid_argument);
  EXPECT_EQ(out, done);
  EXPECT_TRUE(writer->finish().ok());
}

}  // namespace
}  // namespace kvfold
