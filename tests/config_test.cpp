// Settings and spans: what is right, and which of two rules decides. What each mistake is told is in status_test.cpp.
#include "fastv/config.hpp"

#include <gtest/gtest.h>

#include <type_traits>

#include "oracle.hpp"

namespace config_test {
namespace {

using namespace fastv;

Errc code_of(std::vector<TokenSpan> visual, std::size_t tokens = 100) {
  return validate(Span<const TokenSpan>(visual), tokens).code;
}
Errc code_of(const Config& config, std::vector<TokenSpan> visual, std::size_t tokens = 100) {
  return validate(config, Span<const TokenSpan>(visual), tokens).code;
}
TokenSpan with_ratio(TokenSpan span, double ratio) {
  span.filtering_ratio = ratio;
  return span;
}

// ---- settings -----------------------------------------------------------------------------------

TEST(Config, DefaultsAreThePapersK2R50OnTheLastRow) {
  const Config config;
  EXPECT_EQ(config.filtering_layer, 2u);
  EXPECT_EQ(config.filtering_ratio, 0.5);
  EXPECT_EQ(config.ratio_of, RatioOf::remaining);
  EXPECT_EQ(config.rounding, Rounding::half_even);
  EXPECT_EQ(config.keep_count, by_ratio);
  EXPECT_EQ(config.quota, Quota::per_image);
  EXPECT_EQ(config.min_per_image, 0u);
  EXPECT_EQ(config.score_rows, ScoreRows::last);
  EXPECT_EQ(config.selection, Selection::top_k);
  EXPECT_TRUE(validate(config));
  static_assert(std::is_aggregate<Config>::value, "designated initialisers work under C++20");
  static_assert(std::is_aggregate<TokenSpan>::value && std::is_trivially_copyable<Config>::value, "plain data");
}

TEST(Config, TheEndsOfEveryRangeAreValid) {
  Config config;
  for (const double share : {0.0, -0.0, 1.0, 0.5, std::nextafter(0.0, 1.0), std::nextafter(1.0, 0.0)}) {
    config.filtering_ratio = config.uniform_share = share;
    EXPECT_TRUE(validate(config)) << share;
  }
  const double none[] = {std::nextafter(0.0, -1.0),
                         std::nextafter(1.0, 2.0),
                         -1.0,
                         HUGE_VAL,
                         -HUGE_VAL,
                         static_cast<double>(oracle::nan_float())};
  for (const double share : none) {
    config = {};
    config.filtering_ratio = share;
    EXPECT_EQ(validate(config).code, Errc::bad_setting) << share;
    config = {};
    config.uniform_share = share;
    EXPECT_EQ(validate(config).code, Errc::bad_setting) << share;
  }
  config = {};
  config.filtering_layer = 1;
  EXPECT_TRUE(validate(config));
}

TEST(Config, LayerZeroTakesEveryRule) {
  Config config;
  config.filtering_layer = 0;
  for (const Selection rule : {Selection::top_k, Selection::random, Selection::uniform, Selection::diverse}) {
    config.selection = rule;
    EXPECT_TRUE(validate(config));
  }
}

TEST(Config, WhatOnlyTopKReadsIsReadByTopKAlone) {
  Config config;
  config.window_rows = 4;
  config.quota = Quota::pooled;
  config.score_rows = ScoreRows::listed;
  EXPECT_EQ(validate(config).code, Errc::bad_setting);
  config.selection = Selection::uniform;
  EXPECT_TRUE(validate(config));
  EXPECT_EQ(code_of(config, {{3, 8}}), Errc::ok) << "nor is a grid asked for";
}

TEST(Config, WindowsNeedBothSidesAGridAndImagesOfTheirOwn) {
  Config config;
  config.window_rows = 4;
  EXPECT_EQ(code_of(config, {{0, 64, 8}}), Errc::bad_setting);
  config.window_columns = 4;
  EXPECT_EQ(code_of(config, {{0, 64, 8}}), Errc::ok);
  EXPECT_EQ(code_of(config, {{0, 64}}), Errc::bad_prompt);
  EXPECT_EQ(code_of(config, {{0, 32, 8}, {40, 32}}), Errc::bad_prompt);
  EXPECT_EQ(code_of(config, {{0, 32, 8}, {40, 32, 0, true}}), Errc::ok) << "the grid is that of the first span";
  EXPECT_EQ(code_of(config, {{0, 32, 8}, {40, 0, 0, false, 9}}), Errc::ok) << "an image without tokens has no windows";
  EXPECT_EQ(code_of(config, {{0, 0, 0, false, 9}, {40, 9, 0, true}}), Errc::bad_prompt)
      << "its first span is empty, but the image is not";
  config.quota = Quota::pooled;
  EXPECT_EQ(code_of(config, {{0, 64, 8}}), Errc::bad_setting);
}

// ---- spans --------------------------------------------------------------------------------------

TEST(TokenSpans, FromTheFirstTokenToTheLast) {
  EXPECT_EQ(code_of({}), Errc::ok);
  EXPECT_EQ(code_of({}, max_tokens), Errc::ok);
  EXPECT_EQ(code_of({}, max_tokens + 1), Errc::bad_prompt);
  EXPECT_EQ(code_of({}, 0), Errc::bad_prompt);
  EXPECT_EQ(code_of({{0, 100}}), Errc::ok) << "the last token may be visual";
  EXPECT_EQ(code_of({{0, 101}}), Errc::bad_prompt);
  EXPECT_EQ(code_of({{99, 1}}), Errc::ok);
  EXPECT_EQ(code_of({{100, 1}}), Errc::bad_prompt);
  EXPECT_EQ(code_of({{5, 3}, {8, 3}}), Errc::ok) << "spans may touch";
  EXPECT_EQ(code_of({{5, 3}, {7, 3}}), Errc::bad_prompt);
  EXPECT_EQ(code_of({{5, 36, 6}}), Errc::ok);
  EXPECT_EQ(code_of({{5, 36, 36}}), Errc::ok);
  EXPECT_EQ(code_of({{5, 36, 37}}), Errc::bad_prompt);
}

TEST(TokenSpans, AnEmptyOneIsAnImageThatWasDropped) {
  EXPECT_EQ(code_of({{5, 0}}), Errc::bad_prompt);
  EXPECT_EQ(code_of({{5, 0, 0, false, 7}}), Errc::ok);
  EXPECT_EQ(code_of({{5, 3}, {8, 0, 0, false, 7}, {8, 3}}), Errc::ok);
  EXPECT_EQ(code_of({{100, 0, 0, false, 7}}), Errc::ok) << "behind the last token";
  EXPECT_EQ(code_of({{101, 0, 0, false, 7}}), Errc::bad_prompt);
}

TEST(TokenSpans, OfOneImageMakeOneGrid) {
  EXPECT_EQ(code_of({{3, 8, 8}, {12, 8, 8, true}}), Errc::ok);
  EXPECT_EQ(code_of({{3, 8, 8, true}}), Errc::bad_prompt) << "it continues nothing";
  EXPECT_EQ(code_of({{3, 8, 16}, {12, 8, 0, true}}), Errc::ok) << "two spans make one row";
  EXPECT_EQ(code_of({{3, 8, 5}, {12, 8, 0, true}}), Errc::bad_prompt);
  EXPECT_EQ(code_of({{3, 8, 0, false, 7}}), Errc::bad_prompt) << "fewer before than now";
  EXPECT_EQ(code_of({{3, 8, 0, false, max_tokens + 1}}), Errc::bad_prompt);
}

TEST(TokenSpans, ARatioOfTheirOwnIsAShareByImage) {
  for (const double share : {0.0, 0.3, 1.0, by_config}) EXPECT_EQ(code_of({with_ratio({3, 8}, share)}), Errc::ok);
  for (const double none : {-0.5, 1.5, HUGE_VAL, static_cast<double>(oracle::nan_float())})
    EXPECT_EQ(code_of({with_ratio({3, 8}, none)}), Errc::bad_prompt) << none;
  TokenSpan second = with_ratio({12, 8}, 0.3);
  second.continues = true;
  EXPECT_EQ(code_of({{3, 8}, second}), Errc::bad_prompt) << "it is that of the image's first span";
  EXPECT_EQ(code_of({with_ratio({3, 8}, 0.3), {12, 8, 0, true}}), Errc::ok);
}

TEST(TokenSpans, ARatioOfTheirOwnContradictsACountAndAPool) {
  const std::vector<TokenSpan> visual = {{3, 8}, with_ratio({12, 8}, 0.3)};
  Config config;
  EXPECT_EQ(code_of(config, visual), Errc::ok);
  config.keep_count = 5;
  EXPECT_EQ(code_of(config, visual), Errc::bad_prompt);
  config = {};
  config.quota = Quota::pooled;
  EXPECT_EQ(code_of(config, visual), Errc::bad_prompt);
  EXPECT_EQ(code_of(config, {{3, 8}, {12, 8}}), Errc::ok);
}

}  // namespace
}  // namespace config_test
