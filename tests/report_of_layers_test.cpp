// ReportOfLayers: many layers in one report.
#include <kvfold/report_of_layers.hpp>

#include <gtest/gtest.h>

#include "same_report.hpp"

namespace kvfold::test {
namespace {

constexpr CompressionReport kFirst{.rows_before = 100,
                                   .rows_kept = 40,
                                   .rows_merged = 20,
                                   .rows_evicted = 40,
                                   .rows_rewritten = 7,
                                   .bytes_before = 6400,
                                   .bytes_after = 2560,
                                   .live_bytes_before = 8192,
                                   .live_bytes_after = 4096,
                                   .kept_score_share = 0.75f,
                                   .merged_score_share = 0.125f,
                                   .equal_counts_cost = -0.25f};
constexpr CompressionReport kSecond{.rows_before = 300,
                                    .rows_kept = 50,
                                    .rows_merged = 0,
                                    .rows_evicted = 250,
                                    .rows_rewritten = 0,
                                    .bytes_before = 19200,
                                    .bytes_after = 3200,
                                    .live_bytes_before = 24576,
                                    .live_bytes_after = 5000,
                                    .kept_score_share = 0.25f,
                                    .merged_score_share = 0.f,
                                    .equal_counts_cost = 0.75f};

TEST(ReportOfLayersTest, OfNoLayersIsThatOfAnEmptyCache) {
  expect_same_report(ReportOfLayers().total(), CompressionReport{});
}

TEST(ReportOfLayersTest, OfOneLayerIsItsOwn) {
  ReportOfLayers layers;
  layers.add(kFirst);
  expect_same_report(layers.total(), kFirst);
}

TEST(ReportOfLayersTest, SumsCountsAndBytesAndTakesTheMeanOfShares) {
  ReportOfLayers layers;
  layers.add(kFirst);
  layers.add(kSecond);
  expect_same_report(layers.total(), {.rows_before = 400,
                                      .rows_kept = 90,
                                      .rows_merged = 20,
                                      .rows_evicted = 290,
                                      .rows_rewritten = 7,
                                      .bytes_before = 25600,
                                      .bytes_after = 5760,
                                      .live_bytes_before = 32768,
                                      .live_bytes_after = 9096,
                                      .kept_score_share = 0.5f,
                                      .merged_score_share = 0.0625f,
                                      .equal_counts_cost = 0.25f});
}

TEST(ReportOfLayersTest, LayersMayBeAddedAfterATotal) {
  ReportOfLayers layers, at_once;
  layers.add(kSecond);
  expect_same_report(layers.total(), kSecond);
  layers.add(kFirst);
  at_once.add(kSecond);
  at_once.add(kFirst);
  expect_same_report(layers.total(), at_once.total());
}

TEST(ReportOfLayersTest, LayersThatKeepAllKeepAllTogether) {
  ReportOfLayers layers;
  for (int l = 0; l < 61; ++l) layers.add({.rows_before = 3, .rows_kept = 3});
  EXPECT_EQ(layers.total().rows_kept, 183);
  EXPECT_EQ(layers.total().kept_score_share, 1.f);
}

}  // namespace
}  // namespace kvfold::test
